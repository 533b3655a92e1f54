"""Scales and zeros of fresh integer grids, chosen by the squared error of rounding to nearest."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from qmerge.formats import _fit_scales_kernels as kernels
from qmerge.formats._affine import AffineGrid

# Fractions of a group's range that the search tries: clipping a few large values makes all steps finer.
SHRINKS = torch.linspace(1.0, 0.45, 34).tolist()

# Least-squares steps after the search: the best scale for the codes, then the codes for that scale.
REFITS = 2


def fit_scales(
    values_OI: Tensor,
    group_I: Tensor,
    *,
    bits: int,
    sym: bool,
    dtype: torch.dtype,
    inputs_I: Tensor | None = None,
    least_zero: int = 0,
) -> Tensor:
    """float32 [O, G, 2]: scale and zero with the least squared error of nearest rounding.

    The range is shrunk step by step, as GPTQ's ``mse`` option does (arXiv 2210.17323). Then scale and codes are fitted to each
    other by least squares.

    Args:
        values_OI: float32.
        group_I: int64, the group of every column; groups may differ in size.
        sym: the zero is the middle code; otherwise it is fitted too.
        dtype: dtype in which scales are stored; they are chosen among its numbers.
        inputs_I: float32, mean square of every input, which weights the errors; None: all count alike.
        least_zero: smallest zero that the format can store.
    """
    values_OGN, weights_GN = by_groups(values_OI, group_I, inputs_I)
    search = _Search(values_OGN, weights_GN, last_code=2**bits - 1, dtype=dtype)
    low_OG = values_OGN.amin(dim=2).clamp_(max=0)
    high_OG = values_OGN.amax(dim=2).clamp_(min=0)
    for shrink in SHRINKS:
        if sym:
            search.try_symmetric(shrink, low_OG, high_OG)
        else:
            search.try_asymmetric(shrink, low_OG, high_OG, least_zero)
    for _ in range(REFITS):
        search.offer(search.refitted(), search.offset_OG)
    return torch.stack((search.scale_OG, search.offset_OG), dim=2)


def fitted_grid(scales_OG2: Tensor, group_I: Tensor, bits: int) -> AffineGrid:
    """The grid of the scales and zeros that ``fit_scales`` has found, on their device."""
    scale_OG, zero_OG = scales_OG2[..., 0].contiguous(), scales_OG2[..., 1].contiguous()
    return AffineGrid(scale_OG, zero_OG, group_I.to(scales_OG2.device), 2**bits)


def by_groups(values_OI: Tensor, group_I: Tensor, inputs_I: Tensor | None) -> tuple[Tensor, Tensor]:
    """Values group by group, [O, G, N], and the weights of their errors, [G, N], both contiguous.

    N is the size of the largest group. Shorter ones are padded with zeros of weight zero. The values may share memory with
    ``values_OI``.
    """
    order = group_I.argsort(stable=True)
    groups = int(group_I.max()) + 1
    size = int(group_I.bincount().max())
    missing = groups * size - len(order)
    weights_I = torch.ones_like(values_OI[0]) if inputs_I is None else inputs_I
    values_OI, weights_I = values_OI.contiguous(), weights_I.contiguous()
    # A copy only where columns must move: nearly always, groups are neighbours of one size.
    if bool((order.diff() != 1).any()):
        values_OI, weights_I = values_OI[:, order], weights_I[order]
    if missing:
        values_OI, weights_I = pad(values_OI, (0, missing)), pad(weights_I, (0, missing))
    return values_OI.view(-1, groups, size), weights_I.view(groups, size)


class GroupSearch:
    """The best scale and offset (a zero, or a bias) of every group so far. ``dtype``: of scales in the file."""

    def __init__(self, values_OGN: Tensor, weights_GN: Tensor, *, last_code: int, dtype: torch.dtype) -> None:
        self.values_OGN = values_OGN
        self.weights_GN = weights_GN
        self.last_code = last_code
        self.dtype = dtype
        self.scale_OG = torch.zeros_like(values_OGN[..., 0])
        self.offset_OG = torch.zeros_like(self.scale_OG)
        self.cost_OG = torch.full_like(self.scale_OG, torch.inf, dtype=torch.float64)
        self.is_on_cpu = values_OGN.device.type == "cpu"

    def take(self, better_OG: Tensor, scale_OG: Tensor, offset_OG: Tensor, cost_OG: Tensor) -> None:
        """Keep these in the groups that are better (bool)."""
        self.scale_OG = torch.where(better_OG, scale_OG, self.scale_OG)
        self.offset_OG = torch.where(better_OG, offset_OG, self.offset_OG)
        self.cost_OG = torch.where(better_OG, cost_OG, self.cost_OG)


class _Search(GroupSearch):
    """Keeps the best scale and zero of those that were offered, group by group."""

    def try_symmetric(self, shrink: float, low_OG: Tensor, high_OG: Tensor) -> None:
        """Offer the scale at which codes around the middle one reach this part of the range."""
        middle = (self.last_code + 1) // 2
        # There is one code more below the middle than above it.
        reach_OG = torch.maximum(-low_OG / middle, high_OG / (middle - 1))
        self.offer(shrink * reach_OG, torch.full_like(reach_OG, middle))

    def try_asymmetric(self, shrink: float, low_OG: Tensor, high_OG: Tensor, least_zero: int) -> None:
        """Offer the scale at which all codes together span this part of the range, and the zero that belongs to it."""
        scale_OG = (shrink * (high_OG - low_OG) / self.last_code).to(self.dtype).float()
        inverse_OG = torch.where(scale_OG == 0, 0.0, 1.0 / scale_OG)
        zero_OG = (-shrink * low_OG * inverse_OG).round_().clamp_(least_zero, self.last_code)
        self.offer(scale_OG, zero_OG)

    def offer(self, scale_OG: Tensor, zero_OG: Tensor) -> None:
        """Take the scale and the zero of the groups in which they make the error smaller."""
        # At least the smallest number of the dtype: a group of zeros has a scale all the same.
        info = torch.finfo(self.dtype)
        scale_OG = scale_OG.clamp(min=info.tiny * info.eps).to(self.dtype).float()
        cost_OG = self._squared_error(scale_OG, zero_OG)
        self.take(cost_OG < self.cost_OG, scale_OG, zero_OG, cost_OG)

    def refitted(self) -> Tensor:
        """The scale with the least squared error for the codes of the best one so far."""
        if self.is_on_cpu:
            return kernels.refitted_scale(
                self.values_OGN, self.weights_GN, self.scale_OG, self.offset_OG, last_code=self.last_code
            )
        steps_OGN = self._steps(self.scale_OG, self.offset_OG)
        products_OG = torch.einsum("ogn,ogn,gn->og", steps_OGN, self.values_OGN, self.weights_GN)
        squares_OG = torch.einsum("ogn,ogn,gn->og", steps_OGN, steps_OGN, self.weights_GN)
        return torch.where(squares_OG > 0, products_OG / squares_OG, self.scale_OG)

    def _squared_error(self, scale_OG: Tensor, zero_OG: Tensor) -> Tensor:
        """float64 [O, G], of rounding to the nearest codes."""
        if self.is_on_cpu:
            return kernels.squared_error(self.values_OGN, self.weights_GN, scale_OG, zero_OG, last_code=self.last_code)
        errors_OGN = self._steps(scale_OG, zero_OG).mul_(scale_OG[..., None]).sub_(self.values_OGN)
        return torch.einsum("ogn,ogn,gn->og", errors_OGN, errors_OGN, self.weights_GN).double()

    def _steps(self, scale_OG: Tensor, zero_OG: Tensor) -> Tensor:
        """code − zero, for the nearest codes."""
        position_OGN = self.values_OGN / scale_OG[..., None] + zero_OG[..., None]
        return position_OGN.round_().clamp_(0, self.last_code).sub_(zero_OG[..., None])
