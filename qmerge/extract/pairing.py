"""Which weight is which: what is a linear layer, how both checkpoints correspond, and their difference, block by block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qmerge.checkpoint.architecture import meta_model, ties_embeddings
from qmerge.checkpoint.names import Names
from qmerge.checkpoint.scan import Checkpoint
from qmerge.errors import CheckpointError, NumbersError, listed
from qmerge.formats import get_format
from qmerge.formats.base import Stored, Transposed
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Rows, Weight

BLOCK_ENTRIES, PIECE = 2**22, 2**22
"""Values that are subtracted at once, bytes that are compared at once."""

INPUT_EMBEDDINGS = ("embed_tokens", "word_embeddings", "wte")
EMBEDDINGS = (*INPUT_EMBEDDINGS, "wpe", "lm_head", "embed_out", "output", "score")
"""2-D weights that are no linear layers to adapt, by name: only where transformers does not know the architecture."""


@dataclass(frozen=True)
class Anatomy:
    """What transformers says about the modules of a model; names are those in the loaded model, which peft uses.

    linear      layers that get a LoRA (the output layer, which peft leaves out too, is not among them)
    conv1d      those whose dense weight lies as [I, O]
    leaves      modules without modules in them
    parameters  every parameter; None where transformers does not know the architecture
    embedding   the input embedding
    tied        the output layer's weight where it is the input embedding
    """

    modules: frozenset[str]
    linear: frozenset[str]
    conv1d: frozenset[str]
    leaves: frozenset[str]
    parameters: frozenset[str] | None
    embedding: str | None
    tied: str | None


def anatomy_of(base: Checkpoint) -> Anatomy:
    """Asked of transformers, on a model without weights; else told from names and shapes."""
    try:
        model: Any = meta_model(base.config)
    except CheckpointError:
        return guessed_anatomy(base)
    from transformers.pytorch_utils import Conv1D

    modules = dict(model.named_modules())
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    linear = {
        name for name, module in modules.items() if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head
    }
    tied = next((f"{name}.weight" for name, module in modules.items() if module is head), None)
    return Anatomy(
        modules=frozenset(modules),
        linear=frozenset(linear),
        conv1d=frozenset(name for name in linear if isinstance(modules[name], Conv1D)),
        leaves=frozenset(name for name, module in modules.items() if name and not list(module.children())),
        parameters=frozenset(name for name, _ in model.named_parameters(remove_duplicate=False)),
        embedding=next((name for name, module in modules.items() if module is embedding), None),
        tied=tied if ties_embeddings(base.config) else None,
    )


def guessed_anatomy(base: Checkpoint) -> Anatomy:
    modules = {weight.module for weight in base.weights.values() if weight.module}
    linear = {
        weight.module for weight in base.weights.values()
        if weight.local == "weight" and len(weight.shape) == 2 and weight.module.rpartition(".")[2] not in EMBEDDINGS
    }  # fmt: skip
    parents = {name.rpartition(".")[0] for name in modules}
    tied = "lm_head.weight" if ties_embeddings(base.config) else None
    everything = (frozenset(modules), frozenset(linear), frozenset[str](), frozenset(modules - parents))
    embedding = next((name for name in modules if name.rpartition(".")[2] in INPUT_EMBEDDINGS), None)
    return Anatomy(*everything, parameters=None, embedding=embedding, tied=tied)


# --- both checkpoints ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """One weight in both checkpoints. ``shape``: (O, I) of a matrix, (1, n) of a vector, else (first, rest)."""

    name: str
    module: str
    merged: Weight
    base: Weight
    linear: bool
    conv1d: bool

    @property
    def local(self) -> str:
        return self.base.local

    @property
    def raw(self) -> bool:
        """Whether one of them holds no numbers to subtract."""
        return "raw" in (self.merged.format, self.base.format)

    @property
    def shape(self) -> tuple[int, int]:
        shape = oriented(self.base, self.conv1d)
        return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def pair_up(merged: Checkpoint, base: Checkpoint, anatomy: Anatomy) -> list[Pair]:
    """Every weight of one model in both of its checkpoints.

    Raises:
        CheckpointError: another architecture, a weight that only one of them has, shapes that disagree.
    """
    kinds = [str(checkpoint.config.get("model_type")) for checkpoint in (merged, base)]
    if kinds[0] != kinds[1]:
        raise CheckpointError(
            f"MERGED is a {kinds[0]!r} model, BASE a {kinds[1]!r}: expected two checkpoints of one model"
        )
    theirs, ours = by_name(merged, anatomy), by_name(base, anatomy)
    check_same_names(theirs, ours, anatomy.parameters, "MERGED has no", "which BASE has")
    if theirs.keys() - ours.keys():
        check_same_names(ours, theirs, anatomy_of(merged).parameters, "BASE has no", "which MERGED has")
    ties = [ties_embeddings(checkpoint.config) for checkpoint in (merged, base)]
    if ties[0] != ties[1]:
        which = ("MERGED", "BASE") if ties[0] else ("BASE", "MERGED")
        raise CheckpointError(
            f"{which[0]} ties its output layer to the input embedding, {which[1]} does not: expected two checkpoints of one model"
        )
    pairs = [make_pair(name, theirs[name], ours[name], anatomy) for name in ours if name in theirs]
    for pair in pairs:
        check_shapes(pair)
    return pairs


def by_name(checkpoint: Checkpoint, anatomy: Anatomy) -> dict[str, Weight]:
    """Weights by their names in the loaded model; without the copy of a tied embedding, which loaders ignore."""
    names = Names.of(checkpoint)
    found = {loaded_name(weight, names): weight for weight in checkpoint.weights.values()}
    if anatomy.tied:
        found.pop(anatomy.tied, None)
    return found


def loaded_name(weight: Weight, names: Names) -> str:
    """What is only a part of a parameter in memory keeps its name (single experts)."""
    name = names.parameter_of(weight.name) or weight.name
    return name if name.rpartition(".")[2] == weight.local else weight.name


def check_same_names(
    lacks: Mapping[str, Weight], has: Mapping[str, Weight], parameters: frozenset[str] | None, who: str, other: str
) -> None:  # fmt: skip
    """Masks and frequencies that old versions saved are no parameters, and may be missing."""
    missing = [name for name in has if name not in lacks and (parameters is None or name in parameters)]
    if missing:
        raise CheckpointError(f"{who} {listed(missing)}, {other}: expected two checkpoints of one model")


def make_pair(name: str, merged: Weight, base: Weight, anatomy: Anatomy) -> Pair:
    module = name.rpartition(".")[0]
    linear = module in anatomy.linear and base.local == "weight" and len(base.shape) == 2
    return Pair(name, module, merged, base, linear, linear and module in anatomy.conv1d)


def check_shapes(pair: Pair) -> None:
    shapes = [oriented(weight, pair.conv1d) for weight in (pair.merged, pair.base)]
    if shapes[0] != shapes[1]:
        hint = "expected two checkpoints of one model"
        if len(shapes[0]) == 2 and not pair.linear and shapes[0][1:] == shapes[1][1:]:
            hint = "were tokens added? Give BASE the same rows (resize_token_embeddings), or MERGED without them"
        raise CheckpointError(f"{pair.name} is {list(shapes[0])} in MERGED and {list(shapes[1])} in BASE: {hint}")


def oriented(weight: Weight, conv1d: bool) -> tuple[int, ...]:
    """(O, I), also where a dense Conv1D lies as [I, O]."""
    return weight.shape[::-1] if conv1d and get_format(weight.format).info.is_dense else weight.shape


# --- their difference ------------------------------------------------------------------------------------------------


def differences(pair: Pair, reader: Reader, device: torch.device) -> Iterator[tuple[Rows, Tensor, Tensor]]:
    """(rows, base_OI, delta_OI), both float32 [rows, I], block by block.

    Raises:
        NumbersError: NaN or infinity in one of them.
    """
    merged, base = (opened(weight, pair, reader, device) for weight in (pair.merged, pair.base))
    for rows in blocks(pair):
        base_OI = base.values(rows)
        delta_OI = merged.values(rows) - base_OI
        if not bool(delta_OI.isfinite().all()):
            raise NumbersError(f"{pair.name}: MERGED or BASE holds NaN or infinity; it is damaged, download it again")
        yield rows, base_OI, delta_OI


def opened(weight: Weight, pair: Pair, reader: Reader, device: torch.device) -> Stored:
    form = get_format(weight.format)
    stored = form.open(weight, reader, device)
    return Transposed(stored, pair.shape[1]) if pair.conv1d and form.info.is_dense else stored


def blocks(pair: Pair) -> Iterator[Rows]:
    """Row blocks of about ``BLOCK_ENTRIES`` values; what is transposed on the way goes in one."""
    rows, columns = pair.shape
    sides = (pair.merged, pair.base)
    unit = math.lcm(*(get_format(weight.format).row_step(pair.shape, weight.options) for weight in sides))
    count = rows if pair.conv1d else max(unit, BLOCK_ENTRIES // max(1, columns) // unit * unit)
    for start in range(0, rows, max(1, count)):
        yield Rows(start, min(start + count, rows))


def same_bytes(one: Weight, other: Weight, reader: Reader) -> bool:
    """For what holds no numbers to subtract (``raw``)."""
    pairs = list(zip(one.parts.values(), other.parts.values(), strict=False))
    if one.format != other.format or any(a.dtype != b.dtype or a.shape != b.shape for a, b in pairs):
        return False
    return all(
        reader.bytes(a, start, min(start + PIECE, a.nbytes)) == reader.bytes(b, start, min(start + PIECE, b.nbytes))
        for a, b in pairs
        for start in range(0, a.nbytes, PIECE)
    )
