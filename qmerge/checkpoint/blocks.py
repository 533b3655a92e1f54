"""Blocks of weights on disk: which part of a file an adapter's delta belongs to, and how its axes run there.

A parameter in memory may consist of several blocks. In Mixtral, ``experts.gate_up_proj`` is [E, 2·I, H] in memory, while the
disk has two matrices [I, H] per expert, ``w1`` and ``w3``: 2·E blocks, each the whole of one weight on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from qmerge.checkpoint.traced import Piece, Shape, contiguous_strides
from qmerge.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class DiskBlock:
    """A block of a named tensor (a parameter, or one expert's ``w1``), and where its values are on disk.

    With ``named`` the tensor that the adapter names and ``disk`` the weight on disk:

        named[region] = disk[disk_region], with its axes in the order ``axes``

    weight       name of the weight on disk
    parameter    name of the parameter in memory (of the first one, where the weight becomes several)
    shape        of all of ``named``; an adapter's delta must have this shape
    region       indices into ``named``, one range per axis
    disk_region  indices into ``disk``, one range per axis
    axes         per axis of the block, the axis of ``disk`` along which it runs; None for an axis of length 1
    """

    weight: str
    parameter: str
    shape: Shape
    region: tuple[range, ...]
    disk_region: tuple[range, ...]
    axes: tuple[int | None, ...]

    @property
    def expert(self) -> int | None:
        """The block's index in a stack [E, …] of matrices; None where it is not in a stack, or in several matrices of it."""
        is_one_expert = len(self.region) == 3 and len(self.region[0]) == 1
        return self.region[0].start if is_one_expert else None

    @property
    def rows(self) -> range:
        """The block's rows in the matrix (in the expert's matrix) that the adapter names; the entries of a vector."""
        return self.region[-2] if len(self.region) > 1 else self.region[-1]

    @property
    def columns(self) -> range:
        """The block's columns in the matrix that the adapter names."""
        return self.region[-1]

    @property
    def transposed(self) -> bool:
        """Whether rows in memory are columns on disk."""
        last = len(self.disk_region) - 1
        if last < 1 or len(self.axes) < 2:
            return False
        return self.axes[-1] == last - 1 or self.axes[-2] == last

    def covers(self, disk_shape: Sequence[int]) -> bool:
        """Whether the block is all of the weight on disk, which has this shape."""
        return self.disk_region == full_region(disk_shape)

    def factors(self, A_RI: Tensor, B_OR: Tensor, disk_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The factors of a delta B·A, cut and transposed for the weight on disk.

        Args:
            A_RI, B_OR: of the delta [O, I] of the matrix that the adapter names (of the matrix of ``expert``).
            disk_shape: of the weight on disk.

        Returns:
            A and B of the block's share of that delta in the weight on disk (in its matrix ``disk_region[0].start``,
            where it is a stack). The share is zero outside the block.

        Raises:
            CheckpointError: rows and columns are not the last two axes on disk.
        """
        last = len(self.disk_region) - 1
        if last < 1 or not {last - 1, last, None}.issuperset(self.axes[-2:]):
            raise CheckpointError(
                f"{self.weight}: rows and columns of {self.parameter} are not the last two axes of this weight on disk, so a "
                f"LoRA cannot be added to it"
            )
        A_RI = A_RI[:, _as_slice(self.columns)]
        B_OR = B_OR[_as_slice(self.rows)]
        if self.transposed:  # (B·A)ᵀ = Aᵀ·Bᵀ
            A_RI, B_OR = B_OR.T, A_RI.T
        rows, columns = self.disk_region[-2:]
        if (rows, columns) == full_region(disk_shape[-2:]):
            return A_RI, B_OR
        # The block is a part of the weight on disk: the delta is zero everywhere else.
        A_on_disk = A_RI.new_zeros(len(A_RI), disk_shape[-1])
        B_on_disk = B_OR.new_zeros(disk_shape[-2], len(A_RI))
        A_on_disk[:, _as_slice(columns)] = A_RI
        B_on_disk[_as_slice(rows)] = B_OR
        return A_on_disk, B_on_disk


def whole_weight(name: str, parameter: str, shape: Shape) -> DiskBlock:
    """The block of a weight that is on disk as the adapter names it."""
    region = full_region(shape)
    return DiskBlock(
        weight=name,
        parameter=parameter,
        shape=shape,
        region=region,
        disk_region=region,
        axes=tuple(range(len(shape))),
    )


def full_region(shape: Sequence[int]) -> tuple[range, ...]:
    """All indices of a tensor: one range per axis."""
    return tuple(range(size) for size in shape)


def disk_block(piece: Piece, disk_shape: Shape, *, parameter: str, shape: Shape) -> DiskBlock:
    """A piece of a traced tensor, with its offset and strides expressed as axes of the weight on disk.

    Args:
        disk_shape: of the weight on disk.
        parameter, shape: of the traced tensor.

    Raises:
        CheckpointError: an axis runs across several axes of the weight on disk (a convolution that was flattened).
    """
    # The offset says where the block begins on disk; each stride says along which axis it goes on from there.
    first_indices = _unraveled(piece.offset, disk_shape)
    disk_region = [range(index, index + 1) for index in first_indices]
    axes: list[int | None] = []
    for size, stride in zip(piece.size, piece.strides, strict=True):
        if size == 1:  # nothing to run along
            axes.append(None)
            continue
        line = _line_on_disk(size, stride, first_indices, disk_shape)
        if line is None or line.axis in axes:
            raise CheckpointError(
                f"{parameter} {list(shape)} is {piece.weight} {list(disk_shape)} with its axes flattened or split: an adapter of "
                f"such a weight is not supported"
            )
        axes.append(line.axis)
        first = first_indices[line.axis]
        disk_region[line.axis] = range(first, first + size * line.step, line.step)
    region = tuple(range(start, start + size) for start, size in zip(piece.start, piece.size, strict=True))
    return DiskBlock(
        weight=piece.weight,
        parameter=parameter,
        shape=shape,
        region=region,
        disk_region=tuple(disk_region),
        axes=tuple(axes),
    )


class _Line(NamedTuple):
    """An axis of a tensor, and the step between entries along it."""

    axis: int
    step: int


def _line_on_disk(size: int, stride: int, first_indices: Sequence[int], disk_shape: Shape) -> _Line | None:
    """The axis of the weight on disk that ``size`` values run along, ``stride`` apart in the flattened weight."""
    for axis, unit in enumerate(contiguous_strides(disk_shape)):
        step = stride // unit
        if step == 0 or stride % unit != 0:
            continue
        # Past the end of the axis, the values would go on in the next row: that is another axis.
        if first_indices[axis] + step * (size - 1) < disk_shape[axis]:
            return _Line(axis, step)
    return None


def _unraveled(offset: int, shape: Shape) -> list[int]:
    """Index along every axis of the entry that has this offset in the flattened tensor."""
    return [offset // stride % size for stride, size in zip(contiguous_strides(shape), shape, strict=True)]


def _as_slice(indices: range) -> slice:
    return slice(indices.start, indices.stop, indices.step)
