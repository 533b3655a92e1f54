"""Tensors that hold no values but remember where each of them lies on disk: transformers' own conversions run on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from qmerge.errors import CheckpointError

Shape = tuple[int, ...]

MOST_PIECES = 2**16


@dataclass(frozen=True)
class Place:
    """A block of what an adapter names, and where it lies on disk.

    ``named[region]`` is ``disk[disk_region]`` with its axes in the order ``axes``: axis k of the block runs along axis
    ``axes[k]`` of the disk weight, or has length 1 (None).

    ``weight``: name on disk. ``parameter``: name in memory (of the first one, where the weight becomes several).
    ``shape``: of all that the adapter names: the parameter, or the part of it that has a name of its own on disk
    (one expert's ``w1``). A delta must have this shape.
    """

    weight: str
    parameter: str
    shape: Shape
    region: tuple[range, ...]
    disk_region: tuple[range, ...]
    axes: tuple[int | None, ...]

    @property
    def expert(self) -> int | None:
        """Index into a stack [E, …] of matrices, where the block lies in one of them."""
        return self.region[0].start if len(self.region) == 3 and len(self.region[0]) == 1 else None

    @property
    def rows(self) -> range:
        """Rows of the matrix (of the expert's matrix) that the adapter names."""
        return self.region[-2] if len(self.region) > 1 else self.region[-1]

    @property
    def columns(self) -> range:
        return self.region[-1]

    @property
    def transposed(self) -> bool:
        """Whether rows are columns on disk."""
        last = len(self.disk_region) - 1
        return len(self.axes) > 1 and last > 0 and (self.axes[-1] == last - 1 or self.axes[-2] == last)

    def covers(self, disk_shape: Sequence[int]) -> bool:
        """Whether the block is the whole disk weight."""
        return self.disk_region == _all(disk_shape)

    def factors(self, A_RI: Tensor, B_OR: Tensor, disk_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A delta B·A [O, I] of the matrix that the adapter names (of the matrix of ``expert``) → A and B of its share in
        the disk weight (in the matrix ``disk_region[0].start`` of it, where that is a stack); zero outside the block.

        Raises:
            CheckpointError: rows and columns are not the last two axes on disk.
        """
        last = len(self.disk_region) - 1
        if last < 1 or not {*self.axes[-2:], None} <= {last - 1, last, None}:
            raise CheckpointError(f"{self.weight} holds rows and columns of {self.parameter} in no matrix")
        A_RI, B_OR = A_RI[:, _slice(self.columns)], B_OR[_slice(self.rows)]
        if self.transposed:
            A_RI, B_OR = B_OR.T, A_RI.T
        rows, columns = self.disk_region[-2:]
        if (rows, columns) == _all(disk_shape[-2:]):
            return A_RI, B_OR
        A_on_disk, B_on_disk = A_RI.new_zeros(len(A_RI), disk_shape[-1]), B_OR.new_zeros(disk_shape[-2], len(A_RI))
        A_on_disk[:, _slice(columns)], B_on_disk[_slice(rows)] = A_RI, B_OR
        return A_on_disk, B_on_disk


@dataclass(frozen=True)
class Piece:
    """A block of a tensor: element (i, j, …) of it, counted from ``start``, is element ``offset`` + i·strides[0] + … of
    the flattened disk weight."""

    start: Shape
    size: Shape
    weight: str
    offset: int
    strides: Shape


class Traced(Tensor):
    """A shape without values; ``pieces`` cover it exactly once.

    What torch does to it is done to the pieces, for operations that only rearrange.

    Raises:
        CheckpointError: on any other operation.
    """

    pieces: list[Piece]

    @staticmethod
    def __new__(cls, shape: Sequence[int], pieces: list[Piece]) -> Traced:
        if len(pieces) > MOST_PIECES:
            raise CheckpointError(f"it falls into {len(pieces)} blocks")
        made = Tensor._make_wrapper_subclass(cls, tuple(shape), device=torch.device("meta"))
        made.pieces = pieces
        return made

    def __init__(self, shape: Sequence[int], pieces: list[Piece]) -> None:
        pass

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # fmt: skip
        rule = RULES.get(function.overloadpacket.__name__)
        if rule is None:
            raise CheckpointError(f"torch's {function.overloadpacket.__name__} is no rearrangement that is followed")
        return rule(*args)


def traced(name: str, shape: Shape) -> Traced:
    """A whole disk weight."""
    return Traced(shape, [Piece((0,) * len(shape), shape, name, 0, _contiguous(shape))])


def whole(name: str, parameter: str, shape: Shape) -> Place:
    """The place of what is a weight on disk, as it is."""
    return Place(name, parameter, shape, _all(shape), _all(shape), tuple(range(len(shape))))


def _all(shape: Sequence[int]) -> tuple[range, ...]:
    return tuple(range(size) for size in shape)


def _slice(taken: range) -> slice:
    return slice(taken.start, taken.stop, taken.step)


def _contiguous(shape: Sequence[int]) -> Shape:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _permuted(tensor: Traced, order: Sequence[int]) -> Traced:
    def moved(values: Sequence[int]) -> Shape:
        return tuple(values[axis] for axis in order)

    return Traced(
        moved(tensor.shape),
        [replace(p, start=moved(p.start), size=moved(p.size), strides=moved(p.strides)) for p in tensor.pieces],
    )


def _transposed(tensor: Traced, one: int, other: int) -> Traced:
    order = list(range(tensor.ndim))
    order[one], order[other] = order[other], order[one]
    return _permuted(tensor, order)


def _narrowed(tensor: Traced, axis: int, start: int, stop: int) -> Traced:
    axis %= tensor.ndim
    shape, pieces = list(tensor.shape), []
    shape[axis] = stop - start
    for piece in tensor.pieces:
        begin, end = piece.start[axis], piece.start[axis] + piece.size[axis]
        low, high = max(begin, start), min(end, stop)
        if low < high:
            offset = piece.offset + (low - begin) * piece.strides[axis]
            starts, sizes = _put(piece.start, axis, low - start), _put(piece.size, axis, high - low)
            pieces.append(replace(piece, start=starts, size=sizes, offset=offset))
    return Traced(shape, pieces)


def _put(values: Shape, axis: int, value: int) -> Shape:
    return (*values[:axis], value, *values[axis + 1 :])


def _sliced(tensor: Traced, axis: int = 0, start: int | None = None, stop: int | None = None, step: int = 1) -> Traced:
    if step != 1:
        raise CheckpointError("a slice with steps is no rearrangement that is followed")
    begin, end, _ = slice(start, stop).indices(tensor.shape[axis])
    return _narrowed(tensor, axis, begin, max(begin, end))


def _joined(tensors: Sequence[Traced], axis: int = 0) -> Traced:
    axis %= tensors[0].ndim
    pieces, at = [], 0
    for tensor in tensors:
        if _put(tuple(tensor.shape), axis, 0) != _put(tuple(tensors[0].shape), axis, 0):
            raise CheckpointError(f"shapes {list(tensors[0].shape)} and {list(tensor.shape)} do not fit together")
        pieces += [replace(p, start=_put(p.start, axis, p.start[axis] + at)) for p in tensor.pieces]
        at += tensor.shape[axis]
    return Traced(_put(tuple(tensors[0].shape), axis, at), pieces)


def _stacked(tensors: Sequence[Traced], axis: int = 0) -> Traced:
    return _joined([_unsqueezed(tensor, axis) for tensor in tensors], axis)


def _unsqueezed(tensor: Traced, axis: int) -> Traced:
    axis %= tensor.ndim + 1
    return _reshaped(tensor, (*tensor.shape[:axis], 1, *tensor.shape[axis:]))


def _squeezed(tensor: Traced, axis: int) -> Traced:
    axis %= tensor.ndim
    return _reshaped(tensor, (*tensor.shape[:axis], *tensor.shape[axis + 1 :])) if tensor.shape[axis] == 1 else tensor


def _split(tensor: Traced, size: int | Sequence[int], axis: int = 0) -> list[Traced]:
    length = tensor.shape[axis]
    sizes = [min(size, length - at) for at in range(0, length, size)] if isinstance(size, int) else [*size]
    stops = [sum(sizes[: k + 1]) for k in range(len(sizes))]
    return [_narrowed(tensor, axis, stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]


def _selected(tensor: Traced, axis: int, index: int) -> Traced:
    index %= tensor.shape[axis]
    return _squeezed(_narrowed(tensor, axis, index, index + 1), axis)


def _unbound(tensor: Traced, axis: int = 0) -> list[Traced]:
    return [_selected(tensor, axis, index) for index in range(tensor.shape[axis])]


def _reshaped(tensor: Traced, shape: Sequence[int]) -> Traced:
    """Axes that are merged, split, added or dropped, group by group of axes with equal products."""
    known = math.prod(size for size in shape if size != -1)
    shape = tuple(tensor.numel() // known if size == -1 else size for size in shape)
    pairs = list(_groups(tuple(tensor.shape), shape))
    pieces = []
    for piece in tensor.pieces:
        for parts in product(*(_regrouped(piece, tensor.shape, old, new) for old, new in pairs)):
            start, size, strides = (
                tuple(value for part in parts for value in part[0]),
                tuple(value for part in parts for value in part[1]),
                tuple(value for part in parts for value in part[2]),
            )
            pieces.append(Piece(start, size, piece.weight, piece.offset + sum(part[3] for part in parts), strides))
    return Traced(shape, pieces)


Block = tuple[Shape, Shape, Shape, int]
"""start, size, strides, and what is added to the offset: a piece's share in some axes."""

Run = tuple[int, int, int, int]
"""The same in one axis."""


def _groups(old: Shape, new: Shape) -> Iterator[tuple[range, Shape]]:
    """(axes of the old shape, sizes of the new one) whose products are equal, as small as can be."""
    i = j = 0
    while i < len(old) or j < len(new):
        begin, at = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while (left := math.prod(old[begin:i])) != (right := math.prod(new[at:j])):
            i, j = (i + 1, j) if left < right else (i, j + 1)
        yield range(begin, i), new[at:j]


def _regrouped(piece: Piece, shape: Sequence[int], axes: range, sizes: Shape) -> list[Block]:
    inner = [(shape[k], (piece.start[k], piece.size[k], piece.strides[k], 0)) for k in axes]
    if len(sizes) == 1 and len(inner) == 1:
        start, size, stride, _ = inner[0][1]
        return [((start,), (size,), (stride,), 0)]
    runs: list[Run] = [(0, 1, 0, 0)]
    for length, run in inner:
        runs = [merged for outer in runs for merged in _merged(outer, length, run)]
        if len(runs) > MOST_PIECES:
            raise CheckpointError(f"it falls into more than {MOST_PIECES} blocks")
    return [block for run in runs for block in _spread(run, sizes)]


def _merged(outer: Run, length: int, inner: Run) -> list[Run]:
    """Two axes as one: the inner one has ``length`` entries, of which the piece has some."""
    (begin, count, jump, offset), (start, size, stride, _) = outer, inner
    if length == 1:
        return [outer]
    if count == 1:
        return [(begin * length + start, size, stride, offset)]
    if size == length and jump == length * stride:
        return [(begin * length, count * length, stride, offset)]
    return [((begin + k) * length + start, size, stride, offset + k * jump) for k in range(count)]


def _spread(run: Run, sizes: Shape) -> list[Block]:
    """One axis as several, of these sizes: whole rows of the first one, and what is left before and after them."""
    start, size, stride, offset = run
    if not sizes:
        return [((), (), (), offset)]
    if len(sizes) == 1:
        return [((start,), (size,), (stride,), offset)]
    length = math.prod(sizes[1:])
    blocks, at = [], start
    while at < start + size:
        row, within = divmod(at, length)
        rows = (start + size - at) // length if within == 0 else 0
        taken = rows * length or min(length - within, start + size - at)
        here = offset + (at - start) * stride
        for begins, counts, strides, more in _spread((within, min(taken, length), stride, here), sizes[1:]):
            blocks.append(((row, *begins), (rows or 1, *counts), (length * stride, *strides), more))
        at += taken
    return blocks


def _same(tensor: Traced, *_: Any) -> Traced:
    return tensor


RULES: dict[str, Callable[..., Any]] = {
    "alias": _same, "detach": _same, "clone": _same,
    "cat": _joined, "stack": _stacked,
    "split": _split, "split_with_sizes": _split, "unbind": _unbound, "select": _selected, "slice": _sliced,
    "transpose": _transposed, "permute": _permuted,
    "view": _reshaped, "_unsafe_view": _reshaped, "squeeze": _squeezed, "unsqueeze": _unsqueezed,
}  # fmt: skip
"""Operations of torch that only rearrange. ``chunk``, ``flatten``, ``reshape``, ``contiguous`` arrive as these."""


def _place(parameter: str, shape: Shape, piece: Piece, disk_shape: Shape) -> Place:
    """Offset and strides → axes of the disk weight.

    Raises:
        CheckpointError: an axis runs across several axes of the disk weight (a convolution flattened).
    """
    at = [piece.offset // stride % size for stride, size in zip(_contiguous(disk_shape), disk_shape, strict=True)]
    disk_region, axes = [range(k, k + 1) for k in at], list[int | None]()
    for size, stride in zip(piece.size, piece.strides, strict=True):
        found = _axis(size, stride, at, disk_shape) if size > 1 else None
        if size > 1 and (found is None or found[0] in axes):
            raise CheckpointError(
                f"{parameter} {list(shape)} is {piece.weight} {list(disk_shape)} with its axes flattened or split, and "
                f"adapters are not taken there"
            )
        axes.append(found[0] if found else None)
        if found:
            axis, step = found
            disk_region[axis] = range(at[axis], at[axis] + size * step, step)
    region = tuple(range(start, start + size) for start, size in zip(piece.start, piece.size, strict=True))
    return Place(piece.weight, parameter, shape, region, tuple(disk_region), tuple(axes))


def _axis(size: int, stride: int, at: Sequence[int], disk_shape: Shape) -> tuple[int, int] | None:
    """(axis of the disk weight, step along it) of ``size`` values that lie ``stride`` apart."""
    for axis, unit in enumerate(_contiguous(disk_shape)):
        step = stride // unit
        if step and stride % unit == 0 and at[axis] + step * (size - 1) < disk_shape[axis]:
            return axis, step
    return None
