"""Grids of integer formats: value = (code − zero) · scale, with a scale and a zero for every row and group of columns.

GPTQ, AWQ and compressed-tensors' integer formats arrange these differently on disk; the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from qmerge.errors import CheckpointError, RecipeError
from qmerge.formats import _affine_kernels as kernels
from qmerge.grids import ColumnRounder, Grid, ScaleTable
from qmerge.types import Rows

# Group size of one group for all inputs, as GPTQ, AWQ and llm-compressor write it.
WHOLE_ROW = -1

# Group sizes that GPTQ, AWQ and compressed-tensors can have: inputs that share a scale.
GROUP_SIZES = (32, 64, 128, WHOLE_ROW)


def largest_group_size(input_counts: Iterable[int]) -> int:
    """The largest group size that divides all of these numbers of inputs; -1 if none does.

    (Few loaders read a short last group.)
    """
    counts = set(input_counts)
    for size in sorted(GROUP_SIZES, reverse=True):
        if size != WHOLE_ROW and all(count % size == 0 for count in counts):
            return size
    return WHOLE_ROW


def group_count(columns: int, group_size: int) -> int:
    """How many groups the columns make, a short last one included."""
    if group_size == WHOLE_ROW:
        return 1
    return -(-columns // group_size)


def check_group_size(name: str, columns: int, group_size: int) -> None:
    """Check that the groups of a fresh grid have no short last one.

    Raises:
        RecipeError: they have; the message suggests another group size.
    """
    if group_size != WHOLE_ROW and columns % group_size:
        raise RecipeError(
            f"{name} has {columns} inputs, which is not a multiple of the group size {group_size}: use --group-size "
            f"{largest_group_size([columns])}"
        )


def sequential_groups(columns: int, group_size: int, device: torch.device | None = None) -> Tensor:
    """int64 [I]: the group of every column, where groups are runs of neighbouring columns."""
    width = columns if group_size == WHOLE_ROW else group_size
    return torch.arange(columns, device=device) // width


def check_groups(group_I: Tensor, groups: int, name: str) -> None:
    """Check that the columns are in groups that exist.

    Raises:
        CheckpointError: one is not.
    """
    first, last = int(group_I.min()), int(group_I.max())
    if first < 0 or last >= groups:
        raise CheckpointError(
            f"{name} holds {first} to {last}, but there are {groups} groups: expected 0 to {groups - 1}. Download the model "
            f"again"
        )


class AffineGrid(Grid):
    """Codes 0 … ``levels_count`` − 1, as uint8.

    Args:
        scale_OG: float32; may be zero (all codes then mean 0) or negative.
        zero_OG: float32, the code that means 0; may be a fraction.
        group_I: int64, the group of every column.
        levels_count: number of codes.
    """

    def __init__(self, scale_OG: Tensor, zero_OG: Tensor, group_I: Tensor, levels_count: int) -> None:
        self.scale_OG = scale_OG
        self.zero_OG = zero_OG
        self.group_I = group_I
        self.levels_count = levels_count
        # The inverse of the smallest numbers is infinite: their codes, too, all mean 0. (A group of zeros may have such a scale.)
        inverse_OG = 1.0 / scale_OG
        self._inverse_OG = torch.where(inverse_OG.isinf(), 0.0, inverse_OG)

    def nearest(self, values_OI: Tensor, near_OI: Tensor | None = None) -> Tensor:
        codes_OI = self._nearest(values_OI)
        if near_OI is None or bool(self._inverse_OG.all()):
            return codes_OI
        return torch.where(self._per_column(self._inverse_OG) == 0, near_OI, codes_OI)

    def _nearest(self, values_OI: Tensor) -> Tensor:
        last = self.levels_count - 1
        if values_OI.device.type == "cpu":
            return kernels.nearest_codes(values_OI, self._inverse_OG, self.zero_OG, self.group_I, last_code=last)
        position_OI = values_OI * self._per_column(self._inverse_OG) + self._per_column(self.zero_OG)
        return position_OI.round_().clamp_(0, last).to(torch.uint8)

    def decode(self, codes_OI: Tensor) -> Tensor:
        if codes_OI.device.type == "cpu":
            return kernels.decoded(codes_OI, self.scale_OG, self.zero_OG, self.group_I)
        return (codes_OI.float() - self._per_column(self.zero_OG)) * self._per_column(self.scale_OG)

    def step(self, codes_OI: Tensor, direction: int) -> Tensor:
        # With a negative scale the higher code has the lower value.
        signed_OI = self._per_column(self.scale_OG).sign().short() * direction
        return (codes_OI.short() + signed_OI).clamp_(0, self.levels_count - 1).to(torch.uint8)

    def column_rounder(self, columns: Tensor, rows: Tensor) -> ColumnRounder:
        groups = self.group_I[columns]
        scale_IO = self.scale_OG[rows][:, groups].T.contiguous()
        zero_IO = self.zero_OG[rows][:, groups].T.contiguous()
        inverse_IO = self._inverse_OG[rows][:, groups].T.contiguous()
        last = self.levels_count - 1

        def nearest(i: int, values_O: Tensor) -> Tensor:
            codes_O = torch.addcmul(zero_IO[i], values_O, inverse_IO[i]).round_().clamp_(0, last)
            return codes_O.sub_(zero_IO[i]).mul_(scale_IO[i])

        return nearest

    def scale_table(self, columns: int) -> ScaleTable:
        return ScaleTable(
            scale=self.scale_OG.flatten(),
            inverse=self._inverse_OG.flatten(),
            zero=self.zero_OG.expand_as(self.scale_OG).flatten(),
            row_stride=self.scale_OG.shape[1],
            column_offset_I=self.group_I.long(),
            levels_L=self.scale_OG.new_empty(0),
            edges=self.scale_OG.new_empty(0),
            last=self.levels_count - 1,
        )

    def ends(self) -> tuple[Tensor, Tensor]:
        first_OG = -self.zero_OG * self.scale_OG
        last_OG = (self.levels_count - 1 - self.zero_OG) * self.scale_OG
        low_OG, high_OG = torch.minimum(first_OG, last_OG), torch.maximum(first_OG, last_OG)
        return self._per_column(low_OG), self._per_column(high_OG)

    def rows(self, rows: Rows) -> AffineGrid:
        part = slice(rows.start, rows.stop)
        return AffineGrid(self.scale_OG[part], self.zero_OG[part], self.group_I, self.levels_count)

    def _per_column(self, values_OG: Tensor) -> Tensor:
        """[O, G] → [O, I]; a single group broadcasts."""
        if values_OG.shape[1] == 1:
            return values_OG
        return values_OG[:, self.group_I]
