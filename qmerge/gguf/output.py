"""A GGUF file that is to be written: types, places and header (``header.py``), before any value is known."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmerge.checkpoint.config import with_setting
from qmerge.checkpoint.scan import Checkpoint
from qmerge.errors import RecipeError
from qmerge.formats import get_format
from qmerge.formats.gguf import GgufOptions
from qmerge.gguf.base import GgufCheckpoint
from qmerge.gguf.converter import packages
from qmerge.gguf.header import ALIGNMENT, FILE_TYPE, MAGIC, START, VERSION
from qmerge.gguf.mapping import GgufMap, trace
from qmerge.gguf.mixes import FILE_TYPES, Model, tensor_types
from qmerge.safetensors_io.reader import Reader
from qmerge.safetensors_io.writer import FileLayout, PlacedTensor
from qmerge.types import Rows, Step, Weight, as_matrix

Shape = tuple[int, ...]

OWN_TYPES = "gguf"
"""The target that keeps the types of a GGUF base; of another base, it is the default mix."""

DEFAULT_MIX = "q4_k_m"
"""What Ollama and LM Studio run most."""

EMBEDDING = "token_embd.weight"

FILE = "model.gguf"
"""Name of the file in the output folder."""


@dataclass(frozen=True)
class GgufLayout(FileLayout):
    """Where the bytes of every step go in a GGUF file.

    start  everything before the tensors of the steps: header, keys, infos and constants
    """

    start: bytes = b""

    def header(self, tensors: Mapping[str, PlacedTensor]) -> bytes:
        return self.start

    @property
    def data_start(self) -> int:
        return len(self.start)

    @property
    def most_bytes(self) -> int:
        return self.data_start + self.fixed_bytes


@dataclass(frozen=True, kw_only=True)
class GgufOutput:
    """A GGUF file before it is written.

    mapped     its tensors, and where the weights of the model are in them
    complete   gives the same with all keys, for a model with weights of these shapes; None: they are there already
    types      name of a tensor → type of its blocks
    alignment  every tensor starts at a multiple of so many bytes
    """

    mapped: GgufMap
    types: Mapping[str, str]
    complete: Callable[[Mapping[str, Shape]], GgufMap] | None = None
    alignment: int = ALIGNMENT

    def has(self, weight: Weight) -> bool:
        """Whether a weight is in the file. llama.cpp's converter leaves some out: vision towers, buffers."""
        return self._tensor(weight.name) in self.types

    def fitted(self, weight: Weight) -> Weight:
        """The weight without the rows that the file does not have."""
        place = self.mapped.places.get(weight.name)
        rows = torch.Size(weight.shape[:-1]).numel()
        if place is None or place.rows == rows:
            return weight
        return replace(weight, shape=(place.rows, *weight.shape[1:]))

    def options_of(self, weight: Weight) -> GgufOptions:
        """How a weight is stored."""
        place = self.mapped.places[weight.name]
        return GgufOptions(self.types[place.tensor], place.order, place.shift)

    def layout(self, steps: Sequence[Step]) -> GgufLayout:
        """Where the outputs of these steps go: all steps of the model."""
        if self.complete is None:
            self._check_shapes(steps)
            return self._layout(steps)
        shapes = {step.name: shape_of(step) for step in steps}
        return replace(self, mapped=self.complete(shapes), complete=None)._layout(steps)

    def _check_shapes(self, steps: Sequence[Step]) -> None:
        """Raise RecipeError where the adapter brings more or fewer tokens than a GGUF base's own tokenizer has."""
        for step in steps:
            if step.replacement is not None and shape_of(step) != step.weight.shape:
                raise RecipeError(
                    f"the adapter resizes {step.name} to {list(shape_of(step))}, but a GGUF base keeps its tokenizer, for "
                    f"{list(step.weight.shape)}: give the Hugging Face model as --base"
                )

    def _layout(self, steps: Sequence[Step]) -> GgufLayout:
        specs = {name: spec for step in steps for name, spec in step.outputs.items()}
        sizes: dict[str, int] = {name: 4 * values.numel() for name, values in self.mapped.constants.items()}
        for name, spec in specs.items():
            tensor = self._tensor(name)
            sizes[tensor] = sizes.get(tensor, 0) + spec.nbytes
        # Constants come first: they are part of the same bytes as the header.
        offsets: dict[str, int] = {}
        position = 0
        for tensor in sorted(sizes, key=lambda tensor: tensor not in self.mapped.constants):
            offsets[tensor] = position
            position += sizes[tensor] + -sizes[tensor] % self.alignment
        start = self._start(offsets)
        constants = b""
        for values in self.mapped.constants.values():
            constants += self._padded(values.numpy().tobytes())
        placed: dict[str, PlacedTensor] = {}
        for name, spec in specs.items():
            row_bytes = spec.shape[-1]
            first_row = self.mapped.places[name].first_row if name in self.mapped.places else 0
            placed[name] = PlacedTensor(spec, offsets[self._tensor(name)] + first_row * row_bytes - len(constants))
        return GgufLayout(placed, (), 0, position - len(constants), start + constants)

    def _tensor(self, name: str) -> str:
        """The tensor that a weight belongs to. Other tensors of a GGUF base have their own names."""
        place = self.mapped.places.get(name)
        return place.tensor if place else name

    def _start(self, offsets: Mapping[str, int]) -> bytes:
        """Header, keys and tensor infos, up to the first tensor."""
        gguf, _ = packages()
        start = bytearray(START.pack(MAGIC, VERSION, len(offsets), self.mapped.key_count) + self.mapped.keys)
        for name, offset in offsets.items():
            shape = self.mapped.tensors[name].shape
            encoded = name.encode()
            start += struct.pack("<Q", len(encoded)) + encoded
            start += struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
            start += struct.pack("<IQ", int(gguf.GGMLQuantizationType[self.types[name]]), offset)
        return self._padded(bytes(start))

    def _padded(self, data: bytes) -> bytes:
        """The same bytes, with zeros up to the alignment."""
        return data + bytes(-len(data) % self.alignment)


def shape_of(step: Step) -> Shape:
    """The shape of the values that a step writes."""
    return step.weight.shape if step.replacement is None else tuple(step.replacement.values.shape)


def gguf_output(
    target: str, base: Checkpoint, untied: tuple[str, str] | None, *, tokenizer: Path, name: str
) -> GgufOutput:  # fmt: skip
    """The GGUF file that a model becomes.

    Args:
        target: name of a mix.
        untied: names of input and output embedding, where the base ties them and the output does not.
        tokenizer: folder of the tokenizer.
        name: of the model, for ``general.name``.

    Raises:
        RecipeError: a package is missing.
        CheckpointError: llama.cpp's converter does not know the model.
    """
    if isinstance(base, GgufCheckpoint):
        return _from_gguf(target, base)
    config = base.config
    shapes = {weight.name: weight.shape for weight in base.weights.values() if weight.format != "raw"}
    if untied is not None:
        shapes[untied[1]] = shapes[untied[0]]
        config = with_setting(config, "tie_word_embeddings", False)
    mapped = trace(tokenizer, config, shapes, values=_reads(base))

    def complete(shapes: Mapping[str, Shape]) -> GgufMap:
        rows = [shape[0] for weight, shape in shapes.items() if mapped.places[weight].tensor == EMBEDDING]
        resized = with_setting(config, "vocab_size", rows[0]) if rows else config
        file_type = FILE_TYPES[mix_of(target)]
        return trace(tokenizer, resized, shapes, values=_reads(base), file_type=file_type, name=name)

    return GgufOutput(mapped=mapped, types=types_of(mix_of(target), mapped, mapped.scalars), complete=complete)


def mix_of(target: str) -> str:
    """The mix of a target, as llama.cpp spells it: ``gguf_f16`` → ``f16``."""
    return DEFAULT_MIX if target == OWN_TYPES else target.removeprefix("gguf_")


def _from_gguf(target: str, base: GgufCheckpoint) -> GgufOutput:
    """The keys stay, and with the base's own mix all types do."""
    header = base.header
    mapped = replace(base.mapped, keys=header.keys, key_count=header.key_count, tensors=header.tensors, constants={})
    types = header.types
    if target != OWN_TYPES and FILE_TYPES[mix_of(target)] != header.scalars.get(FILE_TYPE):
        types = {**types, **types_of(mix_of(target), base.mapped, header.scalars)}
        mapped = replace(mapped, keys=header.keys_with_file_type(FILE_TYPES[mix_of(target)]))
    return GgufOutput(mapped=mapped, types=types, alignment=header.alignment)


def _reads(base: Checkpoint) -> Callable[[str], Tensor]:
    """Reads float32 values of a weight, for the few that the converter computes with."""

    def values(name: str) -> Tensor:
        weight = base.weights[name]
        with Reader() as reader:
            rows, _ = as_matrix(weight.shape)
            opened = get_format(weight.format).open(weight, reader, torch.device("cpu"))
            return opened.values(Rows(0, rows)).view(weight.shape)

    return values


def types_of(mix: str, mapped: GgufMap, scalars: Mapping[str, Any]) -> dict[str, str]:
    """Tensor → type, as llama.cpp chooses them for a mix.

    Args:
        scalars: keys of the file.
    """
    arch = mapped.arch
    model = Model(
        arch=arch,
        layers=int(scalars.get(f"{arch}.block_count", 0)),
        heads=int(scalars.get(f"{arch}.attention.head_count", 0)),
        kv_heads=int(scalars.get(f"{arch}.attention.head_count_kv", 0)),
        experts=int(scalars.get(f"{arch}.expert_count", 0)),
    )
    types = tensor_types(mix, {name: tensor.shape for name, tensor in mapped.tensors.items()}, model)
    for name, tensor in mapped.tensors.items():
        if tensor.always:
            types[name] = tensor.always
    return types
