"""What happens to each weight of the base: is it copied, converted, merged or replaced, from which source, to which
tensors?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from qmerge.adapters.reading.saved_weights import is_embedding
from qmerge.adapters.updates.lora import refuse_quantized
from qmerge.adapters.updates.transposed_stack import TransposedStackUpdate
from qmerge.checkpoint.config import output_config, with_setting, with_vocab_size
from qmerge.errors import CheckpointError, RecipeError
from qmerge.formats import get_format, get_target
from qmerge.formats.base import NoOptions
from qmerge.gguf.base import GgufCheckpoint
from qmerge.gguf.output import GgufOutput, gguf_output
from qmerge.planning.changes import ChangeMatcher
from qmerge.planning.embeddings import Embeddings
from qmerge.planning.inputs import Inputs
from qmerge.planning.modules import NUMBERED, Modules
from qmerge.planning.targets import TargetChooser, WeightTarget
from qmerge.recipe import Recipe
from qmerge.types import Change, Options, Replacement, Step, StepSource, TensorSpec, Update, Weight


@dataclass(frozen=True)
class StepMaker:
    """Makes the step of every weight.

    promoted: names of weights that stay dense although the target is quantized.
    """

    recipe: Recipe
    inputs: Inputs
    promoted: frozenset[str] = frozenset()

    @cached_property
    def modules(self) -> Modules:
        """What kind of layer each weight belongs to."""
        target = get_target(self.recipe.target)
        return Modules(self.inputs, target, simulates_training=self.recipe.trained_on_format is not None)

    @cached_property
    def embeddings(self) -> Embeddings:
        """Names of the input and the output embedding."""
        return Embeddings(self.inputs)

    @cached_property
    def targets(self) -> TargetChooser:
        """How each weight is written."""
        return TargetChooser(self.recipe, self.inputs, self.modules, self.dense, self.gguf)

    @cached_property
    def dense(self) -> frozenset[str]:
        """Names of the weights that stay dense although the target is quantized: promoted ones, and heads that were trained
        whole, which training had in full precision."""
        heads: set[str] = set()
        for name in self.inputs.adapter.replaced:
            if not NUMBERED.search(name) and not is_embedding(name):
                heads.add(name)
        return self.promoted | heads

    @cached_property
    def gguf(self) -> GgufOutput | None:
        """The GGUF file, where the target is one."""
        if get_target(self.recipe.target).info.container != "gguf":
            return None
        return gguf_output(
            self.recipe.target,
            self.inputs.base,
            self.embeddings.untied,
            tokenizer=self.inputs.tokenizer_folder,
            name=self.inputs.base_source.name,
        )

    @cached_property
    def weights(self) -> Mapping[str, Weight]:
        """The weights to write, by name: those of the base, and the output embedding where it is no longer tied."""
        base = self.inputs.base.weights
        if self.gguf is not None:
            base = {name: self.gguf.fitted(weight) for name, weight in base.items() if self.gguf.has(weight)}
        elif isinstance(self.inputs.base, GgufCheckpoint):
            # Tensors that are not weights of the model (rope factors) belong to a GGUF file only.
            base = {name: weight for name, weight in base.items() if weight.format != "raw"}
        if self.embeddings.untied is None or self.embeddings.untied[1] in base:
            return base
        input_name, output_name = self.embeddings.untied
        input_embedding = base[input_name]
        module, _, local = output_name.rpartition(".")
        output_embedding = replace(input_embedding, module=module, local=local, parts=dict(input_embedding.parts))
        return {**base, output_name: output_embedding}

    def changes(self) -> dict[str, Change]:
        """Weight name → what the adapter does to it.

        Raises:
            AdapterError: a part of the adapter has no weight in the base, or another shape than its weight.
            CheckpointError: a changed weight has a dtype that cannot be merged into.
        """
        matcher = ChangeMatcher(
            inputs=self.inputs,
            modules=self.modules,
            embeddings=self.embeddings,
            targets=self.targets,
            weights=self.weights,
        )
        return matcher.match()

    def step(self, weight: Weight, change: Change | None) -> Step:
        """What happens to one weight.

        Raises:
            RecipeError: the target cannot store the weight.
            CheckpointError: the original lacks the weight.
            AdapterError: the update cannot be applied to a quantized weight.
        """
        if isinstance(change, Replacement):
            return self._replacement_step(weight, change)
        if weight.format == "raw":
            return _copy_step(StepSource(weight=weight), weight.format, weight.options)
        update = change
        target = self.targets.choose(weight, merged=update is not None)
        source = self._choose_source(weight, update, target)
        if update is not None and not self._base_is_dense(source):
            refuse_quantized(weight.name, update)
        if update is None and self._can_be_copied(weight, source, target):
            return _copy_step(source, target.format.name, target.options)
        if update is not None and source.transposed_stack:
            _, columns, rows = weight.shape
            update = TransposedStackUpdate(update, (columns, rows))
        step = Step(
            source=source,
            action="merge" if update else "convert",
            target=target.format.name,
            options=target.options,
            outputs=_outputs(source, target),
            update=update,
            rounding=self._choose_rounding(weight, update, target),
        )
        self._check_storable(step)
        return step

    def _replacement_step(self, weight: Weight, change: Replacement) -> Step:
        """The adapter's own values, in the dtype of the base's (in a dense target's dtype)."""
        target = self.targets.format_of_replacement(weight)
        # The shape is the adapter's: an embedding may have more or fewer tokens than that of the base.
        shape = tuple(change.values.shape)
        options: Options = NoOptions()
        if self.gguf is not None:
            options = self.gguf.options_of(weight)
        return Step(
            source=StepSource(weight=weight),
            action="replace",
            target=target.name,
            options=options,
            outputs={
                weight.prefix + local: spec for local, spec in target.outputs(weight.local, shape, options).items()
            },
            replacement=change,
        )

    # --- source ---

    def _choose_source(self, weight: Weight, update: Update | None, target: WeightTarget) -> StepSource:
        """Where values and grid come from."""
        source = StepSource(
            weight=weight,
            conv1d=self._works_transposed(weight, update, target),
            transposed_stack=target.format.info.takes_stacks,
            keeps_grid=target.keeps_grid,
            training_format=target.training_format,
            merges_onto_original=self.recipe.merge_onto == "original",
        )
        if self.inputs.original is None:
            return source
        if not source.merges_onto_original:
            if update is None or not target.keeps_grid:
                return source
            # preserve rounds a little towards the original.
            return replace(source, original_weight=self._original_of(weight))
        is_rounded = update is not None or not target.keeps_grid
        if not is_rounded or not get_format(weight.format).info.is_quantized:
            return source  # the codes stay the same, or there are none
        if target.keeps_grid:
            return replace(source, original_weight=self._original_of(weight))
        # The quantized weight is not needed at all: neither its values nor its grid.
        return replace(source, weight=self._original_of(weight))

    def _original_of(self, weight: Weight) -> Weight:
        """The 16-bit weight that a quantized weight was made from."""
        assert self.inputs.original is not None
        original = self.inputs.original.weights.get(weight.name)
        shapes = [weight.shape]
        if self.modules.is_conv1d(weight):
            shapes.append(weight.shape[::-1])
        if original is not None and original.shape in shapes and get_format(original.format).info.is_dense:
            return original
        found = f"{original.format} {list(original.shape)}" if original else "no such weight"
        raise CheckpointError(
            f"--original: expected a dense {weight.name} of shape {list(weight.shape)}, found {found}; give the 16-bit model "
            f"that the base was quantized from"
        )

    def _works_transposed(self, weight: Weight, update: Update | None, target: WeightTarget) -> bool:
        """Whether the dense form of the weight is that of a Conv1D, [I, O], and has to be transposed for the work."""
        if weight.local != "weight" or len(weight.shape) != 2:
            return False
        if not get_format(weight.format).info.is_dense:
            return self.targets.format.info.is_dense and self.modules.is_conv1d(weight)
        is_quantized = self.targets.format.info.is_quantized or target.training_format is not None
        if update is None and not is_quantized:
            return False
        return self.modules.is_dense_conv1d(weight, update)

    def _base_is_dense(self, source: StepSource) -> bool:
        """Whether the delta is added to values that were never quantized."""
        return not source.simulates_training and not get_format(source.base_weight.format).info.is_quantized

    # --- action, outputs, rounding ---

    def _can_be_copied(self, weight: Weight, source: StepSource, target: WeightTarget) -> bool:
        """Whether the bytes on disk are already what the target stores."""
        if source.training_format is not None and target.format.info.is_dense:
            return False  # the values change: they are quantized as in training
        return target.format.stores(source.weight, target.options) and weight.has_own_parts

    def _choose_rounding(self, weight: Weight, update: Update | None, target: WeightTarget) -> str:
        """The recipe's rounding for merged weights. ``auto`` is settled later, by what it does to them.

        With ``preserve``, weights without an update are rounded so too where they come onto a fresh quantized grid,
        which keeps the output of their layer. Stacks of matrices and convolutions have no single layer whose inputs
        could be observed: only where a stack is rounded matrix by matrix, the adapter's own directions tell what matters.
        """
        if len(weight.shape) > 2 and (update is None or not target.format.info.takes_stacks):
            return "nearest"
        is_requantized = target.format.info.is_quantized and not target.keeps_grid
        if update is not None or (is_requantized and self.recipe.rounding == "preserve"):
            return self.recipe.rounding
        return "nearest"

    def _check_storable(self, step: Step) -> None:
        """Raise RecipeError where the target cannot store the weight on a fresh grid."""
        target = get_target(step.target)
        if not target.info.is_quantized or step.source.keeps_grid:
            return
        if not target.info.takes_conv1d and self.modules.is_conv1d(step.weight):
            raise RecipeError(
                f"{step.name} is a Conv1D, which no loader of {target.name} replaces: use --target nf4, int8 or bf16"
            )
        target.check(step.name, step.shape, step.options)

    # --- the model ---

    def check(self, steps: tuple[Step, ...]) -> None:
        """Check all steps together.

        Raises:
            CheckpointError: no weight is stored in the target format.
            RecipeError: a weight that stays dense would be lost by the target's loaders.
            AdapterError: only one of two embeddings would be resized.
        """
        target = self.targets.format
        if target.info.is_quantized and not any(step.target == target.name for step in steps):
            expected = "gpt-oss' experts" if target.info.takes_stacks else "linear layers"
            raise CheckpointError(
                f"no module of the base can be stored as {target.name}: expected {expected}; choose a dense target (bf16)"
            )
        self.modules.check_experts(steps)
        if target.info.takes_stacks and self.recipe.trained_on_format:
            raise RecipeError(
                f"--trained-on {self.recipe.trained_on}: with --target {target.name} the linear layers stay dense, and their "
                f"quantization in training is not repeated: use --target bf16, or --trained-on none, which merges onto the "
                f"base as it is stored"
            )
        if self.recipe.residual:
            _check_no_stacks(steps)
        self._with_vocab_size({}, steps)

    def config(self, steps: tuple[Step, ...]) -> dict[str, Any]:
        """config.json of the output: dtype and quantization_config as the stock library would have written them."""
        target = self.targets.format
        options_used = Counter(step.options for step in steps if step.target == target.name)
        options = options_used.most_common(1)[0][0] if options_used else None
        config = output_config(self.inputs.base, target, options, self.modules.layout(steps, self.dense))
        if self.embeddings.untied:
            config = with_setting(config, "tie_word_embeddings", False)
        return self._with_vocab_size(config, steps)

    def _with_vocab_size(self, config: dict[str, Any], steps: tuple[Step, ...]) -> dict[str, Any]:
        if not any(step.replacement for step in steps):
            return config
        return with_vocab_size(config, steps, self.embeddings.both)


def _check_no_stacks(steps: tuple[Step, ...]) -> None:
    """A LoRA of all matrices of a stack would have other factors than ``--residual`` computes."""
    for step in steps:
        if step.update is not None and len(step.weight.shape) > 2:
            raise RecipeError(
                f"--residual: {step.name} is a stack of matrices, for which it is not computed: leave it out"
            )


def _copy_step(source: StepSource, target: str, options: Options) -> Step:
    return Step(
        source=replace(source, keeps_grid=False),
        action="copy",
        target=target,
        options=options,
        outputs=_specs_on_disk(source.weight),
    )


def _outputs(source: StepSource, target: WeightTarget) -> dict[str, TensorSpec]:
    """Full name → dtype and shape of every tensor that a conversion or a merge writes."""
    weight, fmt = source.weight, target.format
    shape = weight.shape
    if source.conv1d and fmt.info.is_dense != get_format(weight.format).info.is_dense:
        shape = shape[::-1]  # [I, O] on one side, [O, I] on the other
    outputs: dict[str, TensorSpec] = {}
    # The base's scales are copied, whichever optional parts they have.
    copies_scales = source.keeps_grid and source.training_format is None
    if copies_scales:
        outputs = _specs_on_disk(weight)
    codes = fmt.codes_part(weight.local)
    for local, spec in fmt.outputs(weight.local, shape, target.options).items():
        name = weight.prefix + local
        is_lacking = local in fmt.info.always_written and name not in outputs
        if not copies_scales or local == codes or is_lacking:
            outputs[name] = spec
    return outputs


def _specs_on_disk(weight: Weight) -> dict[str, TensorSpec]:
    return {info.name: TensorSpec(info.dtype, info.shape) for info in weight.parts.values()}
