"""Which rows of which weights make up each tensor of a GGUF file, for every architecture that llama.cpp's converter knows.

The converter (``converter.py``) has the answer only as code that renames, permutes and
stacks tensors. So its code is run on ``TracedTensor``, which has a shape and no values: afterwards every tensor of the file
knows where its rows came from. Tensors whose values the code changes are found too: a constant that is added (Gemma's norms)
is measured, anything else is computed from the values and becomes a constant of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmerge.checkpoint.traced import TracedTensor, traced_weight
from qmerge.errors import CheckpointError
from qmerge.gguf.converter import converter_of, keys_of, packages, scalars_of
from qmerge.gguf.mixes import unquantized_type

NOT_CONVERTED = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")
"""Ends of the names that the converter skips."""

LARGEST_CONSTANT = 2**24
"""Values of a tensor that may be computed from the base's values while planning."""

Values = Callable[[str], Tensor]
"""Name of a weight → its float32 values."""


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """A tensor of the file.

    shape   as PyTorch counts it: the last axis is the row. (GGUF stores it reversed.)
    always  type that llama.cpp expects whatever the other tensors have ("F32"); None for the others
    """

    name: str
    shape: tuple[int, ...]
    always: str | None = None


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a weight is in the file.

    tensor     name of the tensor that it is, or is a part of
    first_row  of that tensor
    rows       how many rows of the weight, from the first one on, are in the file; a vector or a number counts as one
    order      row i of a run of rows in the file is row ``order[i]`` of the weight, counted from the start of the same run; the
               weight's rows are such runs, one after the other. Empty: the same order
    shift      added to the values
    """

    tensor: str
    first_row: int = 0
    rows: int = 1
    order: tuple[int, ...] = ()
    shift: float = 0.0


@dataclass(frozen=True, kw_only=True)
class GgufMap:
    """The tensors of a GGUF file, in its order, and where each weight of the model is in them.

    arch       ``general.architecture``
    constants  tensors that no weight gives the bytes of: name → float32 values
    scalars    keys that hold one number or one text: name → value
    keys       hyperparameters, tokenizer and the rest, as bytes of a file; empty where they were not asked for
    key_count  number of keys
    """

    arch: str
    tensors: Mapping[str, GgufTensor]
    places: Mapping[str, Place]
    constants: Mapping[str, Tensor]
    scalars: Mapping[str, Any] = field(default_factory=dict)
    keys: bytes = b""
    key_count: int = 0


def trace(
    folder: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, Sequence[int]],
    *,
    values: Values | None = None,
    file_type: int | None = None,
    name: str | None = None,
) -> GgufMap:
    """Run the converter on the weights of a model.

    Args:
        folder: has the tokenizer.
        config: config.json.
        weights: name → shape of every weight on disk, [O, I] for a matrix.
        values: reads a weight, where the converter computes with it; None: such weights have no place.
        file_type: number of the mix (``gguf.LlamaFileType``); None: the tokenizer and the other keys are not needed yet.
        name: of the model, for ``general.name``.

    Raises:
        RecipeError: the converter is not installed.
        CheckpointError: it does not know the architecture or the tokenizer, or does more than rearrange a large weight.
    """
    shapes = {weight: tuple(shape) for weight, shape in weights.items()}
    with converter_of(folder, config, shapes, file_type=file_type or 0, name=name) as converter:
        traced = _Tracer(converter, shapes, values).trace()
        if file_type is None:
            converter.set_gguf_parameters()
            return replace(traced, scalars=scalars_of(converter))
        keys = keys_of(converter, ((tensor.name, tensor.shape) for tensor in traced.tensors.values()))
        key_count = len(converter.gguf_writer.kv_data[0])
        return replace(traced, keys=keys, key_count=key_count, scalars=scalars_of(converter))


class _Tracer:
    """Runs the converter's code on every weight, and collects where the rows go."""

    def __init__(self, converter: Any, weights: Mapping[str, tuple[int, ...]], values: Values | None) -> None:
        self._converter = converter
        self._weights = weights
        self._values = values
        self._tensors: dict[str, GgufTensor] = {}
        self._places: dict[str, Place] = {}
        self._constants: dict[str, Tensor] = {}

    def trace(self) -> GgufMap:
        """See ``trace`` of this module."""
        for name, tensor in self._converter.generate_extra_tensors():
            for new_name, data in self._converter.modify_tensors(tensor, name, _block(name)):
                self._add_constant(name, new_name, data)
        for name in self._converter.model_tensors:
            if not name.endswith(NOT_CONVERTED):
                self._convert(name)
        gguf, _ = packages()
        return GgufMap(
            arch=gguf.MODEL_ARCH_NAMES[self._converter.model_arch],
            tensors=self._tensors,
            places=self._places,
            constants=self._constants,
        )

    def _convert(self, name: str) -> None:
        """One weight, under the name that the converter sees (``language_model.`` is cut off)."""
        weight = self._weight_called(name)
        shape = self._weights[weight]
        try:
            results = list(self._converter.modify_tensors(traced_weight(weight, shape), name, _block(name)))
            places = [self._places_in(new_name, tensor) for new_name, tensor in results]
        except Exception as cause:  # the code does more than rearrange
            self._add_computed(name, weight, cause)
            return
        for (new_name, tensor), found in zip(results, places, strict=True):
            self._places.update(found)
            self._add(name, new_name, tuple(tensor.shape))

    def _weight_called(self, name: str) -> str:
        if name in self._weights:
            return name
        found = [weight for weight in self._weights if _as_converter_names(weight) == name]
        if len(found) != 1:
            raise CheckpointError(f"{name}: llama.cpp's converter renames this weight; choose another --target")
        return found[0]

    def _places_in(self, new_name: str, tensor: Any) -> dict[str, Place]:
        """Where the weights are in a tensor that was only rearranged.

        Raises:
            CheckpointError: it was not, or the rows of a weight are not together.
        """
        places: dict[str, Place] = {}
        if not isinstance(tensor, TracedTensor):
            raise CheckpointError(f"{new_name} does not come from a weight")
        for weight, rows in _rows_of(tensor, self._weights).items():
            pairs = torch.tensor(rows)
            in_file = pairs[pairs[:, 0].argsort()]
            first = int(in_file[0, 0])
            # Rows without a token may be cut off at the end of an embedding.
            has_first_rows = bool((in_file[:, 1].sort().values == torch.arange(len(rows))).all())
            if not has_first_rows or not bool((in_file[:, 0] == torch.arange(first, first + len(rows))).all()):
                raise CheckpointError(f"{weight}: its rows are not together in {new_name}")
            if weight in self._places:
                raise CheckpointError(f"{weight} is used twice")
            order = shortest_order(in_file[:, 1])
            places[weight] = Place(tensor=new_name, first_row=first, rows=len(rows), order=order)
        return places

    def _add_computed(self, name: str, weight: str, cause: Exception) -> None:
        """A tensor that the converter computes: a shift of the values, or a constant."""
        shape = self._weights[weight]
        if torch.Size(shape).numel() > LARGEST_CONSTANT:
            raise CheckpointError(
                f"{weight}: llama.cpp's converter does more than rearrange it ({cause}), which cannot be followed; choose "
                f"another --target"
            ) from cause
        count = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
        zeros = self._run_on(name, torch.zeros(shape))
        counts = self._run_on(name, count)
        if len(zeros) == len(counts) == 1:
            ((new_name, zero), (_, counted)) = (zeros[0], counts[0])
            shift = float(zero.flatten()[0])
            is_same_shape = zero.shape == torch.Size(shape)
            if is_same_shape and bool((zero == shift).all()) and bool((counted - zero == count).all()):
                rows = torch.Size(shape[:-1]).numel()
                self._places[weight] = Place(tensor=new_name, rows=rows, shift=shift)
                self._add(name, new_name, shape)
                return
        if self._values is None:
            return
        for new_name, data in self._run_on(name, self._values(weight)):
            self._add_constant(name, new_name, data)

    def _run_on(self, name: str, values: Tensor) -> list[tuple[str, Tensor]]:
        return list(self._converter.modify_tensors(values, name, _block(name)))

    def _add_constant(self, name: str, new_name: str, data: Tensor) -> None:
        self._constants[new_name] = data.float().contiguous()
        self._add(name, new_name, tuple(data.shape))
        self._tensors[new_name] = replace(self._tensors[new_name], always="F32")  # whose bytes it has

    def _add(self, name: str, new_name: str, shape: tuple[int, ...]) -> None:
        if new_name in self._tensors:
            raise CheckpointError(f"{new_name} is made twice")
        self._tensors[new_name] = GgufTensor(name=new_name, shape=shape, always=self._always(name, new_name, shape))

    def _always(self, name: str, new_name: str, shape: tuple[int, ...]) -> str | None:
        """The type that the converter gives a tensor whatever the others have (conversion/base.py, prepare_tensors)."""
        if len(shape) > 1 and not new_name.endswith("_norm.weight"):
            forced = self._converter.tensor_force_quant(name, new_name, _block(name), len(shape))
            if not isinstance(forced, bool):
                return str(forced.name)
        return "F32" if unquantized_type(new_name, shape, "") == "F32" else None


def _block(name: str) -> int | None:
    """The number of a layer in a name: the first part that is a number."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _as_converter_names(weight: str) -> str:
    return weight.replace("language_model.", "").replace("text_model.", "")


def _rows_of(tensor: TracedTensor, weights: Mapping[str, tuple[int, ...]]) -> dict[str, list[tuple[int, int]]]:
    """Weight → (row in the tensor, row in the weight) of all its rows in the tensor.

    Raises:
        CheckpointError: a row is cut, or transposed.
    """
    shape = tuple(tensor.shape)
    columns = shape[-1]
    rows: dict[str, list[tuple[int, int]]] = {}
    for piece in tensor.pieces:
        width = weights[piece.weight][-1]
        is_whole = piece.size[-1] == columns and (piece.strides[-1] == 1 or columns == 1)
        is_matched = columns == width or len(weights[piece.weight]) == 1 or columns == 1
        if not is_whole or not is_matched or piece.offset % columns:
            raise CheckpointError(f"{piece.weight}: its rows are cut or transposed")
        for position, offset in _rows_of_piece(piece.start[:-1], piece.size[:-1], piece.strides[:-1], shape[:-1]):
            rows.setdefault(piece.weight, []).append((position, (piece.offset + offset) // columns))
    return rows


def _rows_of_piece(
    start: tuple[int, ...], size: tuple[int, ...], strides: tuple[int, ...], shape: tuple[int, ...]
) -> Iterator[tuple[int, int]]:
    """(row in the tensor, offset in the weight) of every row of a piece; all axes but the last one are given."""
    if not size:
        yield 0, 0
        return
    inner = torch.Size(shape[1:]).numel()
    for step in range(size[0]):
        base = (start[0] + step) * inner
        for position, offset in _rows_of_piece(start[1:], size[1:], strides[1:], shape[1:]):
            yield base + position, step * strides[0] + offset


def shortest_order(source: Tensor) -> tuple[int, ...]:
    """The shortest run of rows that, repeated, gives an order of all rows; empty if the order is unchanged.

    Args:
        source: int64, the row of the weight for every row in the file.
    """
    count = len(source)
    position = torch.arange(count)
    if bool((source == position).all()):
        return ()
    # A run can end where everything so far was taken from the rows so far.
    ends = (torch.cummax(source, 0).values == position).nonzero().flatten() + 1
    for length in ends.tolist():
        if count % length:
            continue
        runs = source.view(-1, length) - torch.arange(0, count, length)[:, None]
        if bool((runs == runs[0]).all()):
            return tuple(runs[0].tolist())
    return tuple(source.tolist())
