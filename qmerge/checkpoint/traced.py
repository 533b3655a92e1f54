"""Tensors without values that know where their values are on disk, so that a conversion can be followed by running it.

Question: which entries of which weight on disk become entry (3, 5) of a parameter? transformers has the answer only as
code that stacks, joins, splits and transposes tensors. So that code is run, on ``TracedTensor``: a subclass of torch's
Tensor that has a shape but no memory. Instead of values it has ``pieces``: blocks that cover it exactly once, each with the
name of a weight on disk, an offset and strides. Both mean the same as in ``torch.as_strided``.

    traced_weight("w1", (48, 32))       one piece: start (0, 0), size (48, 32), offset 0, strides (32, 1) in w1
    torch.cat([w1, w3])                 two pieces: the second has start (48, 0), and offset 0 in w3
    ….transpose(0, 1)                   the same two, with start, size and strides swapped

Every operation that only rearranges is a rule on pieces (``RULES``); any other one is an error, since its result is not
made of entries on disk. Nothing is allocated, whatever the size of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qmerge.errors import CheckpointError

Shape = tuple[int, ...]

MOST_PIECES = 2**16
"""Most pieces of one tensor: a reshape that cuts every row apart is refused, before it takes the memory of a real tensor."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A block of a traced tensor, and where it is on disk.

    Entry (i, j, …) of the block, counted from ``start``, is entry ``offset`` + i·strides[0] + j·strides[1] + … of the
    flattened weight on disk.
    """

    start: Shape
    size: Shape
    weight: str
    offset: int
    strides: Shape


class TracedTensor(Tensor):
    """A shape without values; ``pieces`` cover it exactly once.

    Raises:
        CheckpointError: on an operation that does more than rearrange.
    """

    pieces: list[Piece]

    @staticmethod
    def __new__(cls, shape: Sequence[int], pieces: list[Piece]) -> TracedTensor:
        if len(pieces) > MOST_PIECES:
            raise CheckpointError(f"it falls into {len(pieces)} blocks")
        tensor = Tensor._make_wrapper_subclass(cls, tuple(shape), device=torch.device("meta"))
        tensor.pieces = pieces
        return tensor

    def __init__(self, shape: Sequence[int], pieces: list[Piece]) -> None:
        pass  # __new__ has done it: torch's wrapper subclasses are made there

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # fmt: skip
        """torch calls this for every basic operation, after it has broken composite ones (``chunk``) down."""
        name = function.overloadpacket.__name__
        rule = RULES.get(name)
        if rule is None:
            raise CheckpointError(f"torch's {name} is not a rearrangement that can be followed")
        return rule(*args)


def traced_weight(name: str, shape: Shape) -> TracedTensor:
    """A whole weight on disk."""
    piece = Piece(start=(0,) * len(shape), size=shape, weight=name, offset=0, strides=contiguous_strides(shape))
    return TracedTensor(shape, [piece])


def contiguous_strides(shape: Sequence[int]) -> Shape:
    """Strides, in entries, of a tensor in row-major order."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


# --- rules: one per operation of torch, with torch's own arguments ---------------------------------------------------


def _unchanged(tensor: TracedTensor, *_: Any) -> TracedTensor:
    return TracedTensor(tensor.shape, tensor.pieces)  # torch refuses the tensor itself as its own view


def _permute(tensor: TracedTensor, order: Sequence[int]) -> TracedTensor:
    def reordered(values: Sequence[int]) -> Shape:
        return tuple(values[axis] for axis in order)

    pieces: list[Piece] = []
    for piece in tensor.pieces:
        pieces.append(
            replace(
                piece,
                start=reordered(piece.start),
                size=reordered(piece.size),
                strides=reordered(piece.strides),
            )
        )
    return TracedTensor(reordered(tensor.shape), pieces)


def _transpose(tensor: TracedTensor, first_axis: int, second_axis: int) -> TracedTensor:
    order = list(range(tensor.ndim))
    order[first_axis], order[second_axis] = order[second_axis], order[first_axis]
    return _permute(tensor, order)


def _narrow(tensor: TracedTensor, axis: int, start: int, stop: int) -> TracedTensor:
    """Entries ``start`` … ``stop`` along one axis: pieces are cut, or left out."""
    axis %= tensor.ndim  # torch counts negative axes from the end
    pieces: list[Piece] = []
    for piece in tensor.pieces:
        first = piece.start[axis]
        low = max(first, start)
        high = min(first + piece.size[axis], stop)
        if low >= high:  # the piece is outside
            continue
        pieces.append(
            replace(
                piece,
                start=_with_entry(piece.start, axis, low - start),
                size=_with_entry(piece.size, axis, high - low),
                offset=piece.offset + (low - first) * piece.strides[axis],
            )
        )
    return TracedTensor(_with_entry(tuple(tensor.shape), axis, stop - start), pieces)


def _slice(
    tensor: TracedTensor, axis: int = 0, start: int | None = None, stop: int | None = None, step: int = 1
) -> TracedTensor:
    if step != 1:
        raise CheckpointError("a slice with steps is not a rearrangement that can be followed")
    # torch accepts positions past the end, and negative ones; range has the same rule.
    entries = range(tensor.shape[axis])[start:stop]
    return _narrow(tensor, axis, entries.start, max(entries.start, entries.stop))


def _select(tensor: TracedTensor, axis: int, index: int) -> TracedTensor:
    index %= tensor.shape[axis]
    return _squeeze(_narrow(tensor, axis, index, index + 1), axis)


def _unbind(tensor: TracedTensor, axis: int = 0) -> list[TracedTensor]:
    return [_select(tensor, axis, index) for index in range(tensor.shape[axis])]


def _split(tensor: TracedTensor, sizes: int | Sequence[int], axis: int = 0) -> list[TracedTensor]:
    """Parts of these sizes along an axis; an int is the size of all but the last one, which may be smaller."""
    length = tensor.shape[axis]
    if isinstance(sizes, int):
        sizes = [min(sizes, length - start) for start in range(0, length, sizes)]
    parts: list[TracedTensor] = []
    start = 0
    for part_size in sizes:
        parts.append(_narrow(tensor, axis, start, start + part_size))
        start += part_size
    return parts


def _cat(tensors: Sequence[TracedTensor], axis: int = 0) -> TracedTensor:
    first_shape = tuple(tensors[0].shape)
    axis %= len(first_shape)
    pieces: list[Piece] = []
    length = 0
    for tensor in tensors:
        shape = tuple(tensor.shape)
        if _with_entry(shape, axis, 0) != _with_entry(first_shape, axis, 0):
            raise CheckpointError(f"shapes {list(first_shape)} and {list(shape)} do not fit together")
        for piece in tensor.pieces:
            pieces.append(replace(piece, start=_with_entry(piece.start, axis, piece.start[axis] + length)))
        length += shape[axis]
    return TracedTensor(_with_entry(first_shape, axis, length), pieces)


def _stack(tensors: Sequence[TracedTensor], axis: int = 0) -> TracedTensor:
    return _cat([_unsqueeze(tensor, axis) for tensor in tensors], axis)


def _unsqueeze(tensor: TracedTensor, axis: int) -> TracedTensor:
    axis %= tensor.ndim + 1
    return _reshape(tensor, (*tensor.shape[:axis], 1, *tensor.shape[axis:]))


def _squeeze(tensor: TracedTensor, axis: int | None = None) -> TracedTensor:
    if axis is None:  # transformers up to 5.18 removes all axes of length 1
        return _reshape(tensor, tuple(size for size in tensor.shape if size != 1))
    axis %= tensor.ndim
    if tensor.shape[axis] != 1:  # as torch: nothing happens
        return _unchanged(tensor)
    return _reshape(tensor, (*tensor.shape[:axis], *tensor.shape[axis + 1 :]))


def _with_entry(values: Shape, axis: int, value: int) -> Shape:
    return (*values[:axis], value, *values[axis + 1 :])


# --- reshape: the one rule that may cut pieces apart -----------------------------------------------------------------


class Run(NamedTuple):
    """A piece along one axis: ``size`` entries from ``start`` on, which are ``stride`` apart on disk.

    ``offset``: added to the piece's offset, it gives the first of them.
    """

    start: int
    size: int
    stride: int
    offset: int


class Block(NamedTuple):
    """The same along several axes."""

    start: Shape
    size: Shape
    strides: Shape
    offset: int


def _reshape(tensor: TracedTensor, shape: Sequence[int]) -> TracedTensor:
    """Axes that are merged, split, added or dropped.

    Old and new axes fall into groups with equal numbers of entries: [4, 6] → [2, 2, 6] has the groups 4 → 2·2 and 6 → 6.
    Each group is worked on by itself, and every combination of the groups' blocks is a piece of the result.
    """
    known = math.prod(size for size in shape if size != -1)
    new_shape = tuple(tensor.numel() // known if size == -1 else size for size in shape)
    axis_groups = list(_axis_groups(tuple(tensor.shape), new_shape))
    pieces: list[Piece] = []
    for piece in tensor.pieces:
        blocks_per_group = [_reshaped_group(piece, tensor.shape, group) for group in axis_groups]
        for blocks in product(*blocks_per_group):
            pieces.append(_piece_of_blocks(piece, blocks))
    return TracedTensor(new_shape, pieces)


def _piece_of_blocks(piece: Piece, blocks: Sequence[Block]) -> Piece:
    """One block per group of axes, side by side."""
    start: Shape = ()
    size: Shape = ()
    strides: Shape = ()
    offset = piece.offset
    for block in blocks:
        start += block.start
        size += block.size
        strides += block.strides
        offset += block.offset
    return Piece(start=start, size=size, weight=piece.weight, offset=offset, strides=strides)


class AxisGroup(NamedTuple):
    """Axes of the old shape, and the sizes that they have in the new shape, with the same product."""

    old_axes: range
    new_sizes: Shape


def _axis_groups(old: Shape, new: Shape) -> Iterator[AxisGroup]:
    """The smallest groups of axes with equal products, in order."""
    old_end = new_end = 0
    while old_end < len(old) or new_end < len(new):
        old_start, new_start = old_end, new_end
        old_end = min(old_end + 1, len(old))
        new_end = min(new_end + 1, len(new))
        # The side with fewer entries takes the next axis, until both have as many.
        while True:
            old_size = math.prod(old[old_start:old_end])
            new_size = math.prod(new[new_start:new_end])
            if old_size == new_size:
                break
            if old_size < new_size:
                old_end += 1
            else:
                new_end += 1
        yield AxisGroup(range(old_start, old_end), new[new_start:new_end])


def _reshaped_group(piece: Piece, shape: Sequence[int], group: AxisGroup) -> list[Block]:
    """A piece along one group of axes: all old axes are merged into one, which is then split into the new ones."""
    runs_per_axis = [Run(piece.start[axis], piece.size[axis], piece.strides[axis], 0) for axis in group.old_axes]
    if len(runs_per_axis) == 1 and len(group.new_sizes) == 1:  # an axis that stays as it is
        run = runs_per_axis[0]
        return [Block((run.start,), (run.size,), (run.stride,), 0)]
    merged = [Run(0, 1, 0, 0)]
    for axis, inner in zip(group.old_axes, runs_per_axis, strict=True):
        outer_runs, merged = merged, []
        for outer in outer_runs:
            merged += _merge_axes(outer, inner, shape[axis])
        if len(merged) > MOST_PIECES:
            raise CheckpointError(f"it falls into more than {MOST_PIECES} blocks")
    blocks: list[Block] = []
    for run in merged:
        blocks += _split_axis(run, group.new_sizes)
    return blocks


def _merge_axes(outer: Run, inner: Run, length: int) -> list[Run]:
    """Two axes as one. ``inner`` is a part of an axis of ``length`` entries, ``outer`` of the axis before it."""
    if length == 1:
        return [outer]
    if outer.size == 1:  # one row, or a part of one: still a single run
        return [Run(outer.start * length + inner.start, inner.size, inner.stride, outer.offset)]
    # Whole rows, one right after the other on disk: they are one long run.
    is_contiguous = inner.size == length and outer.stride == length * inner.stride
    if is_contiguous:
        return [Run(outer.start * length, outer.size * length, inner.stride, outer.offset)]
    # Parts of rows, or rows with gaps between them: one run each.
    runs: list[Run] = []
    for row in range(outer.size):
        start = (outer.start + row) * length + inner.start
        runs.append(Run(start, inner.size, inner.stride, outer.offset + row * outer.stride))
    return runs


def _split_axis(run: Run, sizes: Shape) -> list[Block]:
    """One axis as several, of these sizes.

    Whole rows of the first new axis become one block. The entries before the first whole row, and those after the last
    one, are parts of a row each.
    """
    if not sizes:
        return [Block((), (), (), run.offset)]
    if len(sizes) == 1:
        return [Block((run.start,), (run.size,), (run.stride,), run.offset)]
    row_length = math.prod(sizes[1:])
    end = run.start + run.size
    blocks: list[Block] = []
    position = run.start
    while position < end:
        row, column = divmod(position, row_length)
        whole_rows = (end - position) // row_length if column == 0 else 0
        offset = run.offset + (position - run.start) * run.stride
        if whole_rows:
            first_row = Run(0, row_length, run.stride, offset)
            taken = whole_rows * row_length
        else:
            taken = min(row_length - column, end - position)
            first_row = Run(column, taken, run.stride, offset)
        for inner in _split_axis(first_row, sizes[1:]):
            blocks.append(
                Block(
                    (row, *inner.start),
                    (whole_rows or 1, *inner.size),
                    (row_length * run.stride, *inner.strides),
                    inner.offset,
                )
            )
        position += taken
    return blocks


RULES: dict[str, Callable[..., Any]] = {
    "alias": _unchanged, "detach": _unchanged, "clone": _unchanged,
    "cat": _cat, "stack": _stack,
    "split": _split, "split_with_sizes": _split, "unbind": _unbind, "select": _select, "slice": _slice,
    "transpose": _transpose, "permute": _permute,
    "view": _reshape, "_unsafe_view": _reshape, "squeeze": _squeeze, "unsqueeze": _unsqueeze,
}  # fmt: skip
"""Operations of torch that only rearrange. ``chunk``, ``flatten``, ``reshape``, ``contiguous`` arrive as these."""
