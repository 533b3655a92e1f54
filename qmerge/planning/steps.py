"""What happens to one weight: is it copied, converted or merged, in which format is it stored, and on which grid?"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from qmerge.adapters.updates.lora import AddUpdate, OwnBaseUpdate, TokenRowsUpdate, fitted, refuse_quantized
from qmerge.checkpoint.architecture import embedding_weights, tied_embedding_weights
from qmerge.checkpoint.config import output_config, with_setting, with_vocab_size
from qmerge.errors import AdapterError, CheckpointError, RecipeError
from qmerge.formats import get_format
from qmerge.formats.base import Format, NoOptions
from qmerge.planning.inputs import Inputs
from qmerge.planning.modules import Modules
from qmerge.recipe import Recipe
from qmerge.types import Action, Options, Replacement, Step, TensorSpec, Update, Weight, as_matrix

DENSE = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
"""The model's own dtype → the format of promoted weights: transformers does not cast what a quantized checkpoint holds."""


@dataclass(frozen=True)
class StepMaker:
    recipe: Recipe
    inputs: Inputs
    promoted: frozenset[str] = frozenset()

    @property
    def target(self) -> Format:
        return get_format(self.recipe.target)

    @cached_property
    def modules(self) -> Modules:
        return Modules(self.inputs, self.target, bool(self.recipe.trained_on))

    @cached_property
    def _asked(self) -> Mapping[str, Any]:
        """The recipe's options for the target, and the target's defaults for this model where the base has none."""
        if not self.target.quant_method or self.target.name in self.inputs.base.formats():
            return self.recipe.asked
        weights = [weight for weight in self.inputs.base.weights.values() if self.modules.is_quantizable(weight)]
        shapes = [w.shape[::-1] if self._is_dense_conv1d(w) else w.shape for w in weights]
        return self.target.fitted(self.recipe.asked, shapes)

    @cached_property
    def weights(self) -> Mapping[str, Weight]:
        """The base's weights; with the output embedding as one of its own, where the adapter changes one of two tied ones."""
        base, tied = self.inputs.base.weights, self._untied
        if tied is None:
            return base
        embedding = base[tied[0]]
        module, _, local = tied[1].rpartition(".")
        return {**base, tied[1]: replace(embedding, module=module, local=local, parts=dict(embedding.parts))}

    @cached_property
    def _tied(self) -> tuple[str, str] | None:
        """Names of input and output embedding where the base ties them. (No model is built to find out where the adapter
        changes nothing outside the numbered layers.)"""
        adapter = self.inputs.adapter
        outside = [name for name in (*adapter.updates, *adapter.replaced) if not re.search(r"\.\d+\.", name)]
        return self._embeddings(tied_embedding_weights(self.inputs.base.config)) if outside else None

    @cached_property
    def _both_embeddings(self) -> tuple[str, str] | None:
        """Names of input and output embedding, tied or not."""
        return self._embeddings(embedding_weights(self.inputs.base.config))

    def _embeddings(self, names: tuple[str, str] | None) -> tuple[str, str] | None:
        """As they are called on disk. (An output embedding that is tied is on no disk.)"""
        if names is None:
            return None
        places = [self.inputs.names.blocks_of(name) if name not in self.inputs.base.weights else None for name in names]
        one, other = (found[0].weight if found else name for name, found in zip(names, places, strict=True))
        return one, other

    @cached_property
    def _untied(self) -> tuple[str, str] | None:
        """Names of input and output embedding where the base ties them and the adapter leaves them different."""
        tied = self._tied
        if tied is None or tied[0] not in self.inputs.base.weights:
            return None
        adapter = self.inputs.adapter
        one, other = (adapter.replaced.get(name) or adapter.updates.get(name) for name in tied)
        rows = [isinstance(part, TokenRowsUpdate) for part in getattr(one, "updates", [one])]
        if len(self.inputs.adapter_sources) > 1 and any(rows) and (not all(rows) or other):
            raise AdapterError(
                f"{tied[0]} is tied to {tied[1]}; one adapter trained rows of both, another changes one of them: merge one by one"
            )
        alike = (
            isinstance(one, Replacement) and isinstance(other, Replacement) and torch.equal(one.values, other.values)
        )
        tokens = all(rows)  # peft puts trained tokens into both of two tied embeddings
        kept = alike or (other is None and (tokens or bool(adapter.config.get("ensure_weight_tying"))))
        return tied if (one or other) and not kept else None

    def changes(self) -> dict[str, Update | Replacement]:
        """Weight name → what the adapter does to it; everything finds its weight, of its shape, or AdapterError says what
        does not."""
        adapter, found, lost = self.inputs.adapter, dict[str, Update | Replacement](), list[str]()
        tied = self._tied
        wanted: dict[str, Update | Replacement] = {**adapter.updates, **adapter.replaced}
        for name, change in wanted.items():
            weight = self.weights.get(name)
            if weight is None and tied and name == tied[1] and self._untied is None:
                continue  # tied, and the same as the input embedding's
            if weight is None and getattr(change, "optional", False):
                continue  # the bias of a layer that has none
            if weight is None:
                lost += adapter.tensors[name]
                continue
            found[name] = self._checked(weight, change)
        if lost:
            raise AdapterError(
                f"{len(lost)} adapter tensors match no weight of the base, the first is {lost[0]}. "
                f"{_nearest_module(lost[0], self.weights)}Is this the base that the adapter was trained on?"
            )
        return found

    def _checked(self, weight: Weight, change: Update | Replacement) -> Update | Replacement:
        """The change, where it fits; values that come onto a quantized grid are rounded as a merge is."""
        if weight.format == "raw":
            stored = weight.parts[weight.local].dtype
            raise CheckpointError(f"{weight.name} is stored as {stored}, which qmerge copies but cannot merge into")
        if isinstance(change, Replacement):
            values = change.values
            if values.shape == weight.shape and self._target_of(weight, merged=True).quant_method:
                return OwnBaseUpdate(values, AddUpdate(torch.zeros_like(values)))
            resizable = weight.name in (self._both_embeddings or ())
            if tuple(values.shape) != weight.shape and not (resizable and tuple(values.shape[1:]) == weight.shape[1:]):
                raise _misfit(weight, tuple(values.shape))
            return change
        worked = as_matrix(weight.shape)
        change = fitted(change, worked)
        shapes = [change.shape, change.shape[::-1]] if self._is_dense_conv1d(weight, change) else [change.shape]
        if not any(all(b in (a, -1) for a, b in zip(worked, shape, strict=False)) for shape in shapes):
            raise _misfit(weight, change.shape)
        return change

    def _is_dense_conv1d(self, weight: Weight, update: Update | None = None) -> bool:
        if not get_format(weight.format).dense_dtype or len(weight.shape) != 2 or weight.local != "weight":
            return False
        if update is not None and update.shape == weight.shape and update.shape[0] != update.shape[1]:
            return False  # plain to see, without asking transformers
        return self.modules.is_conv1d(weight)

    def step(self, weight: Weight, change: Update | Replacement | None) -> Step:
        """What happens to one weight of the base."""
        if isinstance(change, Replacement):
            return self._replaced(weight, change)
        update = change
        conv1d = self._conv1d(weight, update)
        target = self._target_of(weight, merged=update is not None)
        simulated = self._trained_on(weight)
        options = self._options(weight, target, simulated)
        keeps_grid = bool(target.quant_method) and self._same_grid(weight, target, options, simulated)
        source, original = weight, None
        if (
            self.recipe.merge_onto == "original"
            and self.inputs.original
            and self._comes_from_original(weight, update, keeps_grid)
        ):
            other = self._in_original(weight)
            source, original = (weight, other) if keeps_grid else (other, None)
        on_original = self.recipe.merge_onto == "original"
        is_dense = original is not None or not get_format(source.format).quant_method
        if update and not (is_dense and (on_original or not simulated)):
            refuse_quantized(weight.name, update)
        action: Action = "merge" if update else "convert"
        if (
            not update
            and weight.is_itself
            and source.format == target.name
            and source.options == options
            and not (simulated and target.dense_dtype)
        ):
            action = "copy"
        outputs = dict(self._outputs(source, action, target, options, conv1d))
        if keeps_grid and not simulated:  # the scales leave as they came, whichever optional parts there are
            own = {info.name: TensorSpec(info.dtype, info.shape) for info in weight.parts.values()}
            added = {weight.prefix + local for local in target.always_written}
            needed = {weight.prefix + target.codes_part(weight.local), *(added - own.keys())}
            outputs = {**own, **{name: outputs[name] for name in needed if name in outputs}}
        step = Step(
            source, action, target.name, options, outputs, update, keeps_grid and action != "copy",
            simulated, bool(simulated) and on_original, original, conv1d,
            self._rounding(weight, update, target, keeps_grid), self._beside(weight, update, keeps_grid),
        )  # fmt: skip
        if target.quant_method and action != "copy" and not step.keeps_grid:
            if not target.takes_conv1d and self.modules.is_conv1d(weight):
                raise RecipeError(
                    f"{step.name} is a Conv1D, which no loader of {target.name} replaces: use --target nf4, int8 or bf16"
                )
            target.check(step.name, step.shape, options)
        return step

    def _replaced(self, weight: Weight, change: Replacement) -> Step:
        """Trained values as they are, in the width that the base's had (in a dense target's, where that is asked for)."""
        target = self._target_of(weight, merged=True)
        spec = TensorSpec(str(target.dense_dtype), tuple(change.values.shape))
        return Step(weight, "replace", target.name, NoOptions(), {weight.name: spec}, replacement=change)

    def _rounding(self, weight: Weight, update: Update | None, target: Format, keeps_grid: bool) -> str:
        """Weights without an update are rounded too, where they come onto a fresh quantized grid; ``preserve`` then keeps
        their layer's output. (``auto`` is settled later, by what it does to the merged ones.) Stacks of matrices and
        convolutions have no one layer's inputs, and only dense targets take them."""
        if len(weight.shape) > 2:
            return "nearest"
        anew = bool(target.quant_method) and not keeps_grid and self.recipe.rounding == "preserve"
        return self.recipe.rounding if update or anew else "nearest"

    def _beside(self, weight: Weight, update: Update | None, keeps_grid: bool) -> Weight | None:
        """The 16-bit weight, where it is given for ``preserve`` to lean on."""
        wanted = self.inputs.original and self.recipe.merge_onto != "original"
        return self._in_original(weight) if wanted and update and keeps_grid else None

    def _conv1d(self, weight: Weight, update: Update | None) -> bool:
        if weight.local != "weight" or len(weight.shape) != 2:
            return False
        if get_format(weight.format).dense_dtype:
            # Blocks run over [O, I] in training, too.
            changes = update is not None or self.target.quant_method is not None or self._trained_on(weight) is not None
            return changes and self._is_dense_conv1d(weight, update)
        return bool(self.target.dense_dtype) and self.modules.is_conv1d(weight)

    def _target_of(self, weight: Weight, merged: bool) -> Format:
        """Quantized targets take what the stock loader would quantize. Dense targets take all that is quantized, and
        all that is stored in the base's own dtype; what the base keeps in another width on purpose keeps it."""
        own = get_format(weight.format)
        if own.name == "raw":
            return own
        if weight.name in self.promoted:
            return get_format(DENSE[self.inputs.base.dtype])
        if self.target.quant_method:
            dense = get_format(DENSE[self.inputs.base.dtype]) if own.quant_method else own
            return self.target if self.modules.is_quantizable(weight) else dense
        return self.target if own.quant_method or merged or own.dense_dtype == self.inputs.base.stored_dtype else own

    def _trained_on(self, weight: Weight) -> tuple[str, Options] | None:
        spec = self.recipe.trained_on_format
        if spec is None or not self.modules.is_quantizable(weight):
            return None
        name, options = spec
        if self.recipe.merge_onto == "original" and name != self.target.name:
            return None  # neither the values nor the grid of training are wanted
        return name, get_format(name).options(options, None, self.inputs.base.dtype)

    def _options(self, weight: Weight, target: Format, simulated: tuple[str, Options] | None) -> Options:
        if target.name == weight.format and (target.dense_dtype or target.name == "raw"):
            return weight.options
        source = simulated[1] if simulated else weight.options
        return target.options(self._asked, source, self.inputs.base.dtype)

    def _same_grid(
        self, weight: Weight, target: Format, options: Options, simulated: tuple[str, Options] | None
    ) -> bool:
        name, own = simulated if simulated else (weight.format, weight.options)
        return self.recipe.scales == "keep" and name == target.name and target.same_grid(own, options)

    def _comes_from_original(self, weight: Weight, update: Update | None, keeps_grid: bool) -> bool:
        """With an original, everything that is rounded anew starts from it; untouched codes on kept grids do not."""
        quantized = bool(get_format(weight.format).quant_method)
        return quantized and (update is not None or not keeps_grid)

    def _in_original(self, weight: Weight) -> Weight:
        assert self.inputs.original is not None
        other = self.inputs.original.weights.get(weight.name)
        shapes = (weight.shape, weight.shape[::-1]) if self.modules.is_conv1d(weight) else (weight.shape,)
        if other is None or other.shape not in shapes or not get_format(other.format).dense_dtype:
            found = f"{other.format} {list(other.shape)}" if other else "nothing"
            raise CheckpointError(
                f"--original: expected a dense {weight.name} of shape {list(weight.shape)}, found {found}"
            )
        return other

    def _outputs(
        self, weight: Weight, action: Action, target: Format, options: Options, conv1d: bool
    ) -> Mapping[str, TensorSpec]:  # fmt: skip
        if action == "copy":
            return {info.name: TensorSpec(info.dtype, info.shape) for info in weight.parts.values()}
        shape = weight.shape
        if conv1d and bool(target.dense_dtype) != bool(get_format(weight.format).dense_dtype):
            shape = shape[::-1]
        return {weight.prefix + local: spec for local, spec in target.outputs(weight.local, shape, options).items()}

    def config(self, steps: tuple[Step, ...]) -> dict[str, Any]:
        """config.json of the output: dtype and quantization_config as the stock library would have written them."""
        kinds = Counter(step.options for step in steps if step.target == self.target.name)
        if not kinds and self.target.quant_method:
            raise CheckpointError(f"the base has no module that can be stored as {self.target.name}")
        options = kinds.most_common(1)[0][0] if kinds else None
        config = output_config(self.inputs.base, self.target, options, self.modules.layout(steps, self.promoted))
        if self._untied:
            config = with_setting(config, "tie_word_embeddings", False)
        if not any(step.replacement for step in steps):
            return config
        return with_vocab_size(config, steps, self._both_embeddings)


def _misfit(weight: Weight, shape: tuple[int, ...]) -> AdapterError:
    return AdapterError(
        f"{weight.name} is {list(weight.shape)}, but the adapter's delta is {list(shape)}. "
        f"Is this the base that the adapter was trained on?"
    )


def _nearest_module(tensor: str, weights: Mapping[str, Weight]) -> str:
    """A hint when the base has the module under another prefix."""
    module = tensor.split(".lora_")[0]
    tail = ".".join(module.split(".")[-4:])
    found = [weight.module for weight in weights.values() if weight.local == "weight" and weight.module.endswith(tail)]
    close = [name for name in found if not module.startswith(name)]
    return f"The base has {close[0]}, under another prefix. " if close else ""
