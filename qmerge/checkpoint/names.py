"""Adapter keys ↔ weights on disk, where transformers renames, stacks, joins, splits or transposes weights as it loads them.

transformers has a list of conversions per architecture (``conversion_mapping.py``) and code that runs them on tensors
(``core_model_loading.py``). That code itself is run here, on tensors that hold no values but remember where each of
their values lies on disk. Nothing is allocated, whatever the model's size; what is no pure rearrangement is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor

from qmerge.checkpoint.skeleton import meta_model
from qmerge.errors import CheckpointError, listed

Shape = tuple[int, ...]

UNCONVERTED = frozenset(
    {"gemma", "gemma2", "gpt2", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "starcoder2"}
)
"""``model_type`` of text models for which transformers has no conversion (a test asks it): a module that is on disk under
its name is that weight, and nothing needs to be imported or built to know it."""

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


class Names:
    """
    Args:
        config: config.json of the base.
        disk: name → shape of every weight on disk (of the values: [O, I] for a packed matrix).

    Nothing is imported or built before a key needs it.
    """

    def __init__(self, config: Mapping[str, Any], disk: Mapping[str, Sequence[int]]) -> None:
        self._config = config
        self._disk = {name: tuple(shape) for name, shape in disk.items()}

    def module_of(self, name: str) -> str | None:
        """The (first) parameter in memory that a weight on disk becomes, or becomes part of; None: it is not loaded.

        Where transformers does not know the architecture, names in memory are taken to be those on disk.
        """
        if self._loading is None:
            return name if name in self._disk else None
        return self._loading.parameter_of.get(name)

    def disk_of(self, key: str) -> tuple[Place, ...] | None:
        """Where the weight lies that an adapter names, by module or by parameter, in the old or the new spelling, with or
        without the base model's prefix (``base_model.model.`` and ``.lora_A.weight`` are taken off already).

        Returns:
            Blocks that cover it exactly once. None: there is no such weight on disk, or more than one.

        Raises:
            CheckpointError: transformers makes the weight by what is no pure rearrangement, or the parts on disk do
                not make up its parameter.
        """
        spellings = [name for name in (f"{key}.weight", key) if name]
        if self._config.get("model_type") in UNCONVERTED or self._loading is None:
            here = [name for name in spellings if name in self._disk]
            if len(here) == 1 or self._loading is None:
                return (whole(here[0], here[0], self._disk[here[0]]),) if len(here) == 1 else None
        found = [places for name in spellings if (places := self._loading.places(name)) is not None]
        return found[0] if len(found) == 1 else None

    def targeted(self, key: str, target_parameters: Iterable[str]) -> str:
        """The parameter that a key of a peft adapter with ``target_parameters`` belongs to; any other key as it is.

        peft wraps the targeted parameters of a module in the order of their declaration, each wrapper around the one
        before: with two of them, ``experts.base_layer`` is the first and ``experts`` the second
        (peft/tuners/tuners_utils.py, _inject_parameters).
        """
        module, depth = key, 0
        while module.endswith(".base_layer"):
            module, depth = module.removesuffix(".base_layer"), depth + 1
        wanted = tuple(target_parameters)
        owned = self._loading.parameters_in(module) if self._loading and wanted else []
        chosen = [name for name in owned if any(f".{name}".endswith(f".{target}") for target in wanted)]
        return chosen[-1 - depth] if depth < len(chosen) else key

    @cached_property
    def _loading(self) -> _Loading | None:
        try:
            model = meta_model(self._config)
        except CheckpointError:
            return None
        return _Loading(model, self._disk)


class _Loading:
    """What transformers does with the names and tensors of one checkpoint."""

    def __init__(self, model: Any, disk: Mapping[str, Shape]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key

        mapping = get_model_conversion_mapping(model)
        self._model, self._disk = model, disk
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        self._meta: dict[str, Tensor] = model.state_dict()
        self._traced: dict[str, Traced] = {}
        self._taken_apart: dict[str, dict[str, Traced]] = {}
        self.parameter_of: dict[str, str] = {}
        self._sources: dict[str, list[tuple[str, str | None]]] = {}
        self._first_target: dict[str, str] = {}
        self._spelled: dict[str, list[str]] = {}
        for name in sorted(disk, key=dot_natural_key):
            self._add(name)

    def _add(self, name: str) -> None:
        """As convert_and_load_state_dict_in_model (transformers/core_model_loading.py) collects tensors."""
        parameter, pattern = self._renamed(name)
        if parameter not in self._meta:
            return
        self.parameter_of[name] = parameter
        self._sources.setdefault(parameter, []).append((name, pattern))
        for target in self._targets(parameter, pattern):
            self._first_target.setdefault(target, parameter)
        if pattern is not None:
            self._spelled.setdefault(self._spelling(name), []).append(name)

    def _renamed(self, name: str) -> tuple[str, str | None]:
        """(name in memory, pattern of the converter that the weight goes through)."""
        from transformers.core_model_loading import rename_source_key

        prefix, meta = self._model.base_model_prefix, self._meta
        renamed, pattern = rename_source_key(name, self._renamings, self._converters, prefix, meta)
        if renamed not in meta and name in meta:
            renamed, pattern = rename_source_key(name, [], [], prefix, meta)
        return renamed, pattern

    def _targets(self, parameter: str, pattern: str | None) -> list[str]:
        """All parameters that are made together with the first one."""
        if pattern is None:
            return [parameter]
        first, *others = self._by_pattern[pattern].target_patterns
        return [parameter, *(parameter.replace(first, other) for other in others)]

    def _spelling(self, name: str) -> str:
        """What converters see of a name, without the base model's prefix: the same for every old and new spelling."""
        from transformers.core_model_loading import rename_source_key

        return self._unprefixed(rename_source_key(name, self._renamings, [])[0])

    def _unprefixed(self, name: str) -> str:
        prefix = self._model.base_model_prefix
        return name.removeprefix(f"{prefix}.") if prefix else name

    def parameters_in(self, module: str) -> list[str]:
        """Parameters that a module itself declares, in that order; the module in any spelling."""
        from transformers.core_model_loading import rename_source_key

        prefix = self._model.base_model_prefix
        for spelled in (module, rename_source_key(module, self._renamings, [])[0]):
            for name in (spelled, f"{prefix}.{spelled}", self._unprefixed(spelled)):
                try:
                    declared = self._model.get_submodule(name).named_parameters(recurse=False)
                except AttributeError:
                    continue
                return [f"{name}.{local}" for local, _ in declared]
        return []

    def places(self, name: str) -> tuple[Place, ...] | None:
        """Where a weight lies, by its full name in any spelling."""
        if name in self._meta:
            elsewhere = name in self._disk and name not in (source for source, _ in self._made_of(name))
            return None if elsewhere else self._of_parameter(name)
        parameter, pattern = self._renamed(name)
        if parameter not in self._meta:
            return None
        if pattern is None:
            return self._of_parameter(parameter)
        return self._of_part(name, parameter, pattern)

    def _made_of(self, parameter: str) -> list[tuple[str, str | None]]:
        return self._sources.get(self._first_target.get(parameter, parameter), [])

    def _of_parameter(self, parameter: str) -> tuple[Place, ...] | None:
        sources = self._made_of(parameter)
        if not sources or (sources[0][1] is None and len(sources) > 1):
            return None
        return self._decoded(parameter, self._trace(parameter))

    def _of_part(self, name: str, parameter: str, pattern: str) -> tuple[Place, ...] | None:
        """A name that only converters know: one expert's ``w1``. On disk it is there as such, or in what it is part of."""
        alike = self._spelled.get(self._spelling(name), [])
        if alike:
            return (whole(alike[0], parameter, self._disk[alike[0]]),) if len(alike) == 1 else None
        targets = self._targets(parameter, pattern)
        if not all(self._made_of(target) for target in targets):
            return None
        if parameter not in self._taken_apart:
            self._taken_apart[parameter] = self._parts(targets, pattern)
        found = self._taken_apart[parameter].get(self._spelling(name))
        return None if found is None else self._decoded(parameter, found)

    def _parts(self, targets: list[str], pattern: str) -> dict[str, Traced]:
        """The parameters taken apart again, as transformers does when it saves: spelling → part."""
        traced = {target: self._trace(target) for target in targets}
        with _conversion(targets[0], list(traced), self._by_pattern[pattern]):
            backward = self._by_pattern[pattern].reverse_transform()
            renamed = {target: backward.rename_source_key(target) for target in targets}
            for target, (key, source) in renamed.items():
                backward.add_tensor(key, target, source, traced[target])
            made = backward.convert(renamed[targets[0]][0], model=self._model, config=self._model.config)
        return {self._unprefixed(name): _one(part) for name, part in made.items()}

    def _trace(self, parameter: str) -> Traced:
        """A parameter made by transformers' own conversion of tensors that know where they lie."""
        if parameter not in self._traced:
            first = self._first_target.get(parameter, parameter)
            sources = self._sources[first]
            name, pattern = sources[0]
            if pattern is None:
                self._traced[parameter] = traced(name, self._disk[name])
            else:
                self._traced.update(self._converted(first, sources, deepcopy(self._by_pattern[pattern])))
        if parameter not in self._traced:
            raise CheckpointError(f"transformers does not make {parameter} of {listed([name for name, _ in sources])}")
        return self._traced[parameter]

    def _converted(
        self, parameter: str, sources: list[tuple[str, str | None]], converter: Any
    ) -> dict[str, Traced]:  # fmt: skip
        names = [name for name, _ in sources]
        with _conversion(parameter, names, converter):
            for name, pattern in sources:
                converter.add_tensor(parameter, name, pattern, traced(name, self._disk[name]))
            made = converter.convert(parameter, model=self._model, config=self._model.config)
        found = {name: _one(tensor) for name, tensor in made.items()}
        for name, tensor in found.items():
            if name in self._meta and tensor.shape != self._meta[name].shape:
                raise CheckpointError(
                    f"{name} is {list(self._meta[name].shape)}, but {listed(names)} on disk make up "
                    f"{list(tensor.shape)}. Download the model again"
                )
        return found

    def _decoded(self, parameter: str, tensor: Traced) -> tuple[Place, ...]:
        shape = tuple(tensor.shape)
        return tuple(_place(parameter, shape, piece, self._disk[piece.weight]) for piece in tensor.pieces)


@contextmanager
def _conversion(parameter: str, sources: list[str], converter: Any) -> Iterator[None]:
    """Errors inside say which weight transformers makes of what, and how."""
    try:
        yield
    except Exception as cause:
        steps = ", ".join(type(operation).__name__ for operation in converter.operations)
        raise CheckpointError(
            f"{parameter}, which transformers makes of {listed(sources)} by {steps}, cannot be traced to the disk: {cause}"
        ) from cause


def _one(tensor: Any) -> Traced:
    first = tensor[0] if isinstance(tensor, list) else tensor
    assert isinstance(first, Traced)
    return first


# --- tensors that remember where their values lie --------------------------------------------------------------------


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
