"""Which modules of a model are linear layers: from transformers' own classes, else guessed from names and shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qmerge.checkpoint.architecture import meta_model, ties_embeddings
from qmerge.checkpoint.scan import Checkpoint
from qmerge.errors import CheckpointError
from qmerge.types import Weight

INPUT_EMBEDDINGS = ("embed_tokens", "word_embeddings", "wte")
NOT_LINEAR = (*INPUT_EMBEDDINGS, "wpe", "lm_head", "embed_out", "output", "score")
"""Last parts of the names of modules that have a matrix and get no LoRA; used only where transformers does not know the
architecture."""

OUTPUT_LAYER = "lm_head"


@dataclass(frozen=True, kw_only=True)
class ModelModules:
    """The modules of a model, by their names in the loaded model, which peft uses.

    names            all modules
    linear           layers that can get a LoRA; without the output layer, as in peft's ``all-linear``
    conv1d           linear layers whose dense weight is stored as [I, O] (GPT-2)
    leaves           modules that contain no other module; peft can store these whole
    parameters       names of all parameters; None where transformers does not know the architecture
    input_embedding  the module of the input embedding
    tied_weight      the weight of the output layer, where it is the input embedding
    """

    names: frozenset[str]
    linear: frozenset[str]
    conv1d: frozenset[str]
    leaves: frozenset[str]
    parameters: frozenset[str] | None
    input_embedding: str | None
    tied_weight: str | None


def modules_of(checkpoint: Checkpoint) -> ModelModules:
    """The modules of the model that a checkpoint belongs to; builds it without weights."""
    is_tied = ties_embeddings(checkpoint.config)
    try:
        model = meta_model(checkpoint.config)
    except CheckpointError:  # an architecture that transformers does not know
        return _guess_modules(checkpoint, is_tied)
    return _modules_of_model(model, is_tied)


def _modules_of_model(model: Any, is_tied: bool) -> ModelModules:
    from transformers.pytorch_utils import Conv1D

    embedding = model.get_input_embeddings()
    output_layer = model.get_output_embeddings()
    linear: set[str] = set()
    conv1d: set[str] = set()
    leaves: set[str] = set()
    input_embedding = tied_weight = None
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not output_layer:
            linear.add(name)
        if isinstance(module, Conv1D) and module is not output_layer:
            conv1d.add(name)
        if name and not list(module.children()):  # the model itself has the name ""
            leaves.add(name)
        if module is embedding:
            input_embedding = name
        if module is output_layer and is_tied:
            tied_weight = f"{name}.weight"
    return ModelModules(
        names=frozenset(dict(model.named_modules())),
        linear=frozenset(linear),
        conv1d=frozenset(conv1d),
        leaves=frozenset(leaves),
        # Without remove_duplicate=False, a tied weight would be listed under one of its names only.
        parameters=frozenset(name for name, _ in model.named_parameters(remove_duplicate=False)),
        input_embedding=input_embedding,
        tied_weight=tied_weight,
    )


def _guess_modules(checkpoint: Checkpoint, is_tied: bool) -> ModelModules:
    """By the names and shapes of the weights."""
    names: set[str] = set()
    parents: set[str] = set()
    linear: set[str] = set()
    input_embedding = None
    for weight in checkpoint.weights.values():
        if not weight.module:
            continue
        names.add(weight.module)
        parents.add(weight.module.rpartition(".")[0])
        if _looks_linear(weight):
            linear.add(weight.module)
        if input_embedding is None and _last_part(weight.module) in INPUT_EMBEDDINGS:
            input_embedding = weight.module
    return ModelModules(
        names=frozenset(names),
        linear=frozenset(linear),
        conv1d=frozenset(),  # names do not tell how a dense weight is oriented
        leaves=frozenset(names - parents),
        parameters=None,
        input_embedding=input_embedding,
        tied_weight=f"{OUTPUT_LAYER}.weight" if is_tied else None,
    )


def _looks_linear(weight: Weight) -> bool:
    is_matrix = weight.local == "weight" and len(weight.shape) == 2
    return is_matrix and _last_part(weight.module) not in NOT_LINEAR


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]
