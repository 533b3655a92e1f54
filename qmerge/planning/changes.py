"""Which weight of the base each part of the adapter changes, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from qmerge.adapters.reading.saved_weights import is_saved_module
from qmerge.adapters.updates.lora import AddUpdate, OwnBaseUpdate
from qmerge.errors import AdapterError, CheckpointError, listed
from qmerge.planning.embeddings import Embeddings
from qmerge.planning.inputs import Inputs
from qmerge.planning.modules import Modules
from qmerge.planning.targets import TargetChooser
from qmerge.types import Change, Replacement, Update, Weight, as_matrix


@dataclass(frozen=True, kw_only=True)
class ChangeMatcher:
    """Matches the adapter's changes with the weights of the base.

    weights: by name, with an output embedding that is no longer tied.
    """

    inputs: Inputs
    modules: Modules
    embeddings: Embeddings
    targets: TargetChooser
    weights: Mapping[str, Weight]

    def match(self) -> dict[str, Change]:
        """Weight name → the adapter's change of it.

        Raises:
            AdapterError: a change has no weight in the base, or another shape than its weight.
            CheckpointError: a changed weight has a dtype that cannot be merged into.
        """
        adapter = self.inputs.adapter
        changes: dict[str, Change] = {}
        unmatched: dict[str, list[str]] = {}
        wanted: dict[str, Change] = {**adapter.updates, **adapter.replaced, **self.embeddings.shared}
        # Every tensor of the adapter is applied exactly once, or the run does not start.
        for name, change in wanted.items():
            weight = self.weights.get(name)
            if weight is not None:
                changes[name] = self._fitting(weight, change)
            elif not self._may_be_missing(name, change):
                unmatched[name] = adapter.tensors[name]
        if unmatched:
            first, tensors = next(iter(unmatched.items()))
            raise AdapterError(
                f"{sum(map(len, unmatched.values()))} adapter tensors match no weight of the base; the first is {tensors[0]}. "
                f"{self._cause(first)}"
            )
        return changes

    def _cause(self, name: str) -> str:
        """Why the base has no weight of this name, which the adapter changes, and what to do."""
        module, _, local = name.rpartition(".")
        if local == "bias" and f"{module}.weight" in self.weights:
            return (
                f"{module} has no bias in the base, so the one that the adapter trained cannot be added to it: train without "
                f"lora_bias, or use the adapter unmerged, with peft"
            )
        if is_saved_module(name, self.inputs.adapter.config.get("modules_to_save") or []):
            return (
                f"The base has no {module}, which was trained whole: give the model as it was before training, saved with its head "
                f"(save_pretrained), as --base"
            )
        parameters = [other for other in self.weights if other.startswith(f"{module}.")]
        if parameters:
            return (
                f"The base has {listed(parameters)}, so {module} is a kind of layer that qmerge cannot merge this adapter into: "
                f"merge it with peft into the 16-bit base, then quantize the result"
            )
        # Layer number, block and projection, and the name before them: layers.0.self_attn.q_proj.
        tail = ".".join(module.split(".")[-4:])
        for weight in self.weights.values():
            if weight.local == "weight" and weight.module.endswith(tail) and not module.startswith(weight.module):
                return f"The base has {weight.module}, under another prefix. {WRONG_BASE}"
        return WRONG_BASE

    def _may_be_missing(self, name: str, change: Change) -> bool:
        """The output embedding while it stays tied to the input embedding, and the bias of a layer that has none."""
        tied = self.embeddings.tied
        if tied is not None and name == tied[1] and self.embeddings.untied is None:
            return True
        return isinstance(change, Update) and change.optional

    def _fitting(self, weight: Weight, change: Change) -> Change:
        """The change as it is applied to the weight; new values for a quantized target become an update, which is
        rounded."""
        if weight.format == "raw":
            dtype = weight.parts[weight.local].dtype
            raise CheckpointError(
                f"{weight.name} is stored as {dtype}, which qmerge can copy but not merge into; expected a float or "
                f"quantized weight"
            )
        if isinstance(change, Replacement):
            return self._fitting_replacement(weight, change)
        matrix = as_matrix(weight.shape)
        # Where peft ignores a variant of LoRA in some layers, the shape of the weight tells which of the two it is.
        update = change.fitted(matrix)
        shapes = [update.shape]
        if self.modules.is_dense_conv1d(weight, update):
            shapes.append(update.shape[::-1])  # the update is [O, I], the weight on disk [I, O]
        if not any(_is_shape(matrix, shape) for shape in shapes):
            raise _misfit(weight, update.shape)
        return update

    def _fitting_replacement(self, weight: Weight, change: Replacement) -> Change:
        shape = tuple(change.values.shape)
        if shape == weight.shape and self.targets.format_of(weight, merged=True).info.is_quantized:
            # An update of zero on the new values goes through rounding and measuring like any other.
            values_OI = change.values.view(as_matrix(shape))
            return OwnBaseUpdate(values_OI, AddUpdate(torch.zeros_like(values_OI)))
        if shape != weight.shape and not self._is_resized_embedding(weight, shape):
            raise _misfit(weight, shape)
        return change

    def _is_resized_embedding(self, weight: Weight, shape: tuple[int, ...]) -> bool:
        """Whether new values differ from an embedding in the number of tokens only."""
        return shape[1:] == weight.shape[1:] and weight.name in (self.embeddings.both or ())


def _is_shape(matrix: tuple[int, int], shape: tuple[int, int]) -> bool:
    """Whether an update's shape is that of the weight; -1 fits any size (token rows of an embedding)."""
    return all(actual in (size, -1) for size, actual in zip(matrix, shape, strict=False))


def _misfit(weight: Weight, shape: tuple[int, ...]) -> AdapterError:
    return AdapterError(
        f"{weight.name} has shape {list(weight.shape)}, but the adapter's delta has shape {list(shape)}. {WRONG_BASE}"
    )


WRONG_BASE = "Is this the base that the adapter was trained on?"
