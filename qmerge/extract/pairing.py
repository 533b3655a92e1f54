"""Pair the weights of two checkpoints of one model, by their names in the loaded model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qmerge.checkpoint.architecture import ties_embeddings
from qmerge.checkpoint.names import Names
from qmerge.checkpoint.scan import Checkpoint
from qmerge.errors import CheckpointError, listed
from qmerge.extract.modules import ModelModules, modules_of
from qmerge.formats import get_format
from qmerge.types import Weight, as_matrix

RAW = "raw"
"""The format of tensors that are not numbers to compute with."""

TWO_CHECKPOINTS = "expected two checkpoints of one model"


@dataclass(frozen=True, kw_only=True)
class WeightPair:
    """One weight in both checkpoints.

    ``name``       in the loaded model
    ``is_linear``  the weight of a linear layer: it can get a LoRA
    ``is_conv1d``  its dense form is stored as [I, O]
    """

    name: str
    module: str
    merged: Weight
    base: Weight
    is_linear: bool
    is_conv1d: bool

    @property
    def local(self) -> str:
        """Name inside the module: ``weight``, ``bias``."""
        return self.base.local

    @property
    def is_raw(self) -> bool:
        """Whether one of the two cannot be subtracted."""
        return RAW in (self.merged.format, self.base.format)

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I) of a matrix, (1, n) of a vector, (first, product of the others) of a stack."""
        return as_matrix(shape_OI(self.base, self.is_conv1d))

    @property
    def nbytes(self) -> int:
        """Bytes of both on disk."""
        return self.merged.nbytes + self.base.nbytes


@dataclass(frozen=True)
class CheckpointPair:
    """Two checkpoints of one model. ``modules`` are those of the base; ``weights``: every weight that both have, in the order
    of the base."""

    merged: Checkpoint
    base: Checkpoint
    modules: ModelModules
    weights: list[WeightPair]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights of both."""
        return sum(pair.nbytes for pair in self.weights)

    def weights_of(self, module: str) -> list[WeightPair]:
        """All weights of a module."""
        return [pair for pair in self.weights if pair.module == module]


def pair_checkpoints(merged: Checkpoint, base: Checkpoint) -> CheckpointPair:
    """Pair the weights of two checkpoints.

    Raises:
        CheckpointError: another architecture, a parameter that only one of them has, or shapes that differ.
    """
    check_model_types(merged, base)
    modules = modules_of(base)
    merged_weights = weights_by_name(merged, modules)
    base_weights = weights_by_name(base, modules)
    check_missing(merged_weights, base_weights, modules, ("MERGED", "BASE"))
    # Only where MERGED has more names: its parameters take another model to build.
    if merged_weights.keys() - base_weights.keys():
        check_missing(base_weights, merged_weights, modules_of(merged), ("BASE", "MERGED"))
    check_ties(merged, base)
    pairs = []
    for name, base_weight in base_weights.items():
        if name in merged_weights:
            pair = make_pair(name, merged_weights[name], base_weight, modules)
            check_shapes(pair)
            pairs.append(pair)
    return CheckpointPair(merged, base, modules, pairs)


def weights_by_name(checkpoint: Checkpoint, modules: ModelModules) -> dict[str, Weight]:
    """The weights by their names in the loaded model; without a copy of a tied embedding, which loaders ignore."""
    names = Names.of(checkpoint)
    weights = {loaded_name(weight, names): weight for weight in checkpoint.weights.values()}
    # Some files have the output layer once more, which could differ without any effect.
    if modules.tied_weight:
        weights.pop(modules.tied_weight, None)
    return weights


def loaded_name(weight: Weight, names: Names) -> str:
    """The name of a weight in the loaded model. A part of a parameter (a single expert of a stack) keeps its own."""
    parameter = names.parameter_of(weight.name) or weight.name
    is_whole = parameter.rpartition(".")[2] == weight.local
    return parameter if is_whole else weight.name


def make_pair(name: str, merged: Weight, base: Weight, modules: ModelModules) -> WeightPair:
    """Two weights of the same name as a pair."""
    module = name.rpartition(".")[0]
    # Two dimensions: peft's LoRA for linear layers does not fit a stack of experts.
    is_linear = module in modules.linear and base.local == "weight" and len(base.shape) == 2
    is_conv1d = is_linear and module in modules.conv1d
    return WeightPair(name=name, module=module, merged=merged, base=base, is_linear=is_linear, is_conv1d=is_conv1d)


def shape_OI(weight: Weight, is_conv1d: bool) -> tuple[int, ...]:
    """The shape of a weight; (O, I) also for a dense Conv1D, which is stored as [I, O]."""
    is_transposed = is_conv1d and get_format(weight.format).info.is_dense
    return weight.shape[::-1] if is_transposed else weight.shape


# --- checks ----------------------------------------------------------------------------------------------------------


def check_model_types(merged: Checkpoint, base: Checkpoint) -> None:
    """Raise CheckpointError where config.json names two architectures."""
    merged_type = str(merged.config.get("model_type"))
    base_type = str(base.config.get("model_type"))
    if merged_type != base_type:
        raise CheckpointError(f"MERGED is a {merged_type!r} model, BASE is a {base_type!r} model: {TWO_CHECKPOINTS}")


def check_missing(
    weights: Mapping[str, Weight], others: Mapping[str, Weight], modules: ModelModules, roles: tuple[str, str]
) -> None:
    """Raise CheckpointError where ``weights`` lack a parameter that ``others`` have; ``roles`` are their names in messages.

    Buffers that old versions of transformers saved (masks, rotary frequencies) are not parameters and may be missing.
    """
    missing = []
    for name in others:
        is_parameter = modules.parameters is None or name in modules.parameters
        if name not in weights and is_parameter:
            missing.append(name)
    if missing:
        raise CheckpointError(f"{roles[0]} has no {listed(missing)}, which {roles[1]} has: {TWO_CHECKPOINTS}")


def check_ties(merged: Checkpoint, base: Checkpoint) -> None:
    """Raise CheckpointError where only one of them uses the input embedding as its output layer."""
    merged_is_tied = ties_embeddings(merged.config)
    if merged_is_tied != ties_embeddings(base.config):
        tied, untied = ("MERGED", "BASE") if merged_is_tied else ("BASE", "MERGED")
        raise CheckpointError(
            f"{tied} ties its output layer to the input embedding, {untied} does not: {TWO_CHECKPOINTS}"
        )


def check_shapes(pair: WeightPair) -> None:
    """Raise CheckpointError where both weights have different shapes."""
    merged_shape = shape_OI(pair.merged, pair.is_conv1d)
    base_shape = shape_OI(pair.base, pair.is_conv1d)
    if merged_shape == base_shape:
        return
    hint = TWO_CHECKPOINTS
    # Another number of rows of an embedding: the usual trace of added tokens.
    if len(merged_shape) == 2 and not pair.is_linear and merged_shape[1:] == base_shape[1:]:
        hint = "were tokens added? Give BASE the same rows (resize_token_embeddings), or use a MERGED without them"
    raise CheckpointError(
        f"{pair.name} has shape {list(merged_shape)} in MERGED and {list(base_shape)} in BASE: {hint}"
    )
