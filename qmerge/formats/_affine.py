"""What all integer formats share: value = (code − zero) · scale, with a scale and a zero for every row and group of columns.

GPTQ, AWQ and compressed-tensors' integer formats differ in how they lay these out on disk, not in the numbers.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from qmerge.grids import ColumnRounder, Grid
from qmerge.types import Rows

SHRINKS = torch.linspace(1.0, 0.45, 34).tolist()
"""Shares of a group's range that the search tries: clipping a few large values makes all steps finer."""

REFITS = 2
"""Least-squares steps after the search: the best scale for the codes, then the codes for that scale."""

WORD = 32


GROUP_SIZES = (32, 64, 128, -1)
"""Inputs that share a scale, in the layouts of GPTQ, AWQ and compressed-tensors; -1 is all of them."""


def dividing(columns: Iterable[int]) -> int:
    """The largest group size that divides all of these numbers of inputs; -1 where none does. (Few loaders read a short last
    group.)"""
    counts = set(columns)
    return max((size for size in GROUP_SIZES if size > 0 and not any(n % size for n in counts)), default=-1)


class AffineGrid(Grid):
    """Codes 0 … ``levels_count`` − 1, as uint8.

    Args:
        scale_OG, zero_OG: float32 [O, G]; scales may be zero (all codes then mean 0) or negative.
        group_I: int64 [I], the group of every column.
        count: how many codes there are.
    """

    def __init__(self, scale_OG: Tensor, zero_OG: Tensor, group_I: Tensor, count: int) -> None:
        self.scale_OG, self.zero_OG, self.group_I, self.levels_count = scale_OG, zero_OG, group_I, count
        self._inverse_OG = torch.where(scale_OG == 0, 0.0, 1.0 / scale_OG)

    def nearest(self, values_OI: Tensor, near_OI: Tensor | None = None) -> Tensor:
        places_OI = values_OI * self._of(self._inverse_OG) + self._of(self.zero_OG)
        codes_OI = places_OI.round_().clamp_(0, self.levels_count - 1).to(torch.uint8)
        if near_OI is None or bool(self.scale_OG.all()):
            return codes_OI
        return torch.where(self._of(self.scale_OG) == 0, near_OI, codes_OI)

    def decode(self, codes_OI: Tensor) -> Tensor:
        return (codes_OI.float() - self._of(self.zero_OG)) * self._of(self.scale_OG)

    def step(self, codes_OI: Tensor, direction: int) -> Tensor:
        signed_OI = self._of(self.scale_OG).sign().short() * direction
        return (codes_OI.short() + signed_OI).clamp_(0, self.levels_count - 1).to(torch.uint8)

    def column_rounder(self, columns: Tensor, rows: Tensor) -> ColumnRounder:
        groups = self.group_I[columns]
        scale_IO, zero_IO, inverse_IO = (
            part_OG[rows][:, groups].T.contiguous() for part_OG in (self.scale_OG, self.zero_OG, self._inverse_OG)
        )
        last = self.levels_count - 1

        def nearest(i: int, values_O: Tensor) -> Tensor:
            codes_O = torch.addcmul(zero_IO[i], values_O, inverse_IO[i]).round_().clamp_(0, last)
            return codes_O.sub_(zero_IO[i]).mul_(scale_IO[i])

        return nearest

    def ends(self) -> tuple[Tensor, Tensor]:
        first_OG, last_OG = -self.zero_OG * self.scale_OG, (self.levels_count - 1 - self.zero_OG) * self.scale_OG
        return self._of(torch.minimum(first_OG, last_OG)), self._of(torch.maximum(first_OG, last_OG))

    def rows(self, rows: Rows) -> AffineGrid:
        part = slice(rows.start, rows.stop)
        return AffineGrid(self.scale_OG[part], self.zero_OG[part], self.group_I, self.levels_count)

    def _of(self, parts_OG: Tensor) -> Tensor:
        """[O, G] → [O, I]; one group for all columns broadcasts."""
        return parts_OG if parts_OG.shape[1] == 1 else parts_OG[:, self.group_I]


def sequential_groups(columns: int, group_size: int, device: torch.device | None = None) -> Tensor:
    """int64 [I]: columns in groups as they follow one another; -1 is one group for all."""
    return torch.arange(columns, device=device) // (columns if group_size == -1 else group_size)


def fit_scales(
    values_OI: Tensor, group_I: Tensor, bits: int, sym: bool, dtype: torch.dtype, inputs_I: Tensor | None = None,
    least_zero: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(scale, zero), float32 [O, G], by the least squared error of nearest rounding: the range is shrunk step by step
    (as GPTQ's ``mse`` option does, arXiv 2210.17323), then scale and codes are fitted to each other by least squares.

    Args:
        values_OI: float32 [O, I].
        group_I: int64 [I]; the last group may have fewer columns than the others.
        sym: the zero is the middle code; else it is fitted too.
        dtype: what scales are stored as; they are chosen among its numbers.
        inputs_I: float32 [I], mean square of every input, which the errors are weighted with; None: all alike.
        least_zero: smallest zero that the layout can store.
    """
    values_OGN, weights_GN = by_groups(values_OI, group_I, inputs_I)
    search = _Search(values_OGN, weights_GN, 2**bits - 1, dtype)
    low_OG, high_OG = values_OGN.amin(dim=2).clamp_(max=0), values_OGN.amax(dim=2).clamp_(min=0)
    for shrink in SHRINKS:
        if sym:
            middle = 2 ** (bits - 1)
            reach_OG = torch.maximum(-low_OG / middle, high_OG / (middle - 1))
            search.offer(shrink * reach_OG, torch.full_like(reach_OG, middle))
        else:
            scale_OG = (shrink * (high_OG - low_OG) / (2**bits - 1)).to(dtype).float()
            inverse_OG = torch.where(scale_OG == 0, 0.0, 1.0 / scale_OG)
            zero_OG = (-shrink * low_OG * inverse_OG).round_().clamp_(least_zero, 2**bits - 1)
            search.offer(scale_OG, zero_OG)
    for _ in range(REFITS):
        search.offer(search.refitted(), search.zero_OG)
    return search.scale_OG, search.zero_OG


def by_groups(values_OI: Tensor, group_I: Tensor, inputs_I: Tensor | None) -> tuple[Tensor, Tensor]:
    """Columns group by group, [O, G, N], and what their errors count, [G, N]: nothing where a short last group is padded."""
    order, groups = group_I.argsort(stable=True), int(group_I.max()) + 1
    most = int(group_I.bincount().max())
    missing = groups * most - len(order)
    counts_I = torch.ones_like(values_OI[0]) if inputs_I is None else inputs_I
    values_OGN = torch.nn.functional.pad(values_OI[:, order], (0, missing)).view(-1, groups, most)
    return values_OGN, torch.nn.functional.pad(counts_I[order], (0, missing)).view(groups, most)


class _Search:
    """Keeps the best scale and zero that were offered, group by group."""

    def __init__(self, values_OGN: Tensor, weights_GN: Tensor, last: int, dtype: torch.dtype) -> None:
        self.values_OGN, self.weights_GN, self.last, self.dtype = values_OGN, weights_GN, last, dtype
        self.scale_OG = torch.zeros_like(values_OGN[..., 0])
        self.zero_OG = torch.zeros_like(self.scale_OG)
        self.cost_OG = torch.full_like(self.scale_OG, torch.inf)

    def offer(self, scale_OG: Tensor, zero_OG: Tensor) -> None:
        info = torch.finfo(self.dtype)
        scale_OG = (
            scale_OG.clamp(min=info.tiny * info.eps).to(self.dtype).float()
        )  # a group of zeros has a scale all the same
        errors_OGN = self._steps(scale_OG, zero_OG).mul_(scale_OG[..., None]).sub_(self.values_OGN)
        cost_OG = torch.einsum("ogn,ogn,gn->og", errors_OGN, errors_OGN, self.weights_GN)
        better_OG = cost_OG < self.cost_OG
        self.scale_OG = torch.where(better_OG, scale_OG, self.scale_OG)
        self.zero_OG = torch.where(better_OG, zero_OG, self.zero_OG)
        self.cost_OG = torch.minimum(cost_OG, self.cost_OG)

    def refitted(self) -> Tensor:
        """The scale of least squares for the codes of the best one so far."""
        steps_OGN = self._steps(self.scale_OG, self.zero_OG)
        products_OG = torch.einsum("ogn,ogn,gn->og", steps_OGN, self.values_OGN, self.weights_GN)
        squares_OG = torch.einsum("ogn,ogn,gn->og", steps_OGN, steps_OGN, self.weights_GN)
        return torch.where(squares_OG > 0, products_OG / squares_OG, self.scale_OG)

    def _steps(self, scale_OG: Tensor, zero_OG: Tensor) -> Tensor:
        """code − zero of the nearest codes."""
        places_OGN = self.values_OGN / scale_OG[..., None] + zero_OG[..., None]
        return places_OGN.round_().clamp_(0, self.last).sub_(zero_OG[..., None])


def pack_bits(codes_XN: Tensor, bits: int) -> Tensor:
    """Codes below 2**bits, integers [X, N] → int32 [X, N·bits/32]: one little-endian stream of bits in every row.

    Both orders on disk are this one: "least significant first" for 2, 4 and 8 bits, and GPTQ's three words for 32 codes of
    3 bits, two of which straddle words. N is a multiple of 32/bits (3 bits: of 32).
    """
    rows, count = codes_XN.shape
    if bits != 3:
        per_word = WORD // bits
        shifts = torch.arange(per_word, device=codes_XN.device) * bits
        words = (codes_XN.long().view(rows, count // per_word, per_word) << shifts).sum(dim=2)
        return _as_int32(words)
    codes = codes_XN.long().view(rows, count // WORD, WORD)
    places = torch.arange(WORD, device=codes_XN.device) * bits
    words = torch.zeros(rows, count // WORD, bits, dtype=torch.int64, device=codes_XN.device)
    for word in range(bits):
        shifts = places - WORD * word
        here = (shifts > -bits) & (shifts < WORD)
        part = torch.where(shifts >= 0, codes << shifts.clamp(min=0), codes >> (-shifts).clamp(min=0))
        words[:, :, word] = (part * here).sum(dim=2) & 0xFFFFFFFF
    return _as_int32(words.flatten(1))


def unpack_bits(words_XW: Tensor, bits: int) -> Tensor:
    """The reverse: int32 [X, W] → uint8 [X, W·32/bits]."""
    rows, count = words_XW.shape
    if bits != 3:
        shifts = torch.arange(WORD // bits, device=words_XW.device, dtype=torch.int32) * bits
        fields: Tensor = (words_XW[:, :, None] >> shifts) & (2**bits - 1)
        return fields.to(torch.uint8).view(rows, -1)
    groups = (words_XW.long() & 0xFFFFFFFF).view(rows, count // bits, bits)
    places = torch.arange(WORD, device=words_XW.device) * bits
    first, shifts = places // WORD, places % WORD
    after = groups[:, :, (first + 1).clamp(max=bits - 1)] << (WORD - shifts)
    fields = (groups[:, :, first] >> shifts) | torch.where(shifts > WORD - bits, after, 0)
    codes: Tensor = (fields & (2**bits - 1)).to(torch.uint8)
    return codes.view(rows, -1)


def _as_int32(words: Tensor) -> Tensor:
    """Words of 32 bits in int64 → int32 with the same bits."""
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
