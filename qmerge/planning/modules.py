"""What kind of layer a weight belongs to, and which layers the target's stock loaders expect quantized."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Set
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from qmerge.adapters.updates.lora import TokenRowsUpdate
from qmerge.checkpoint.architecture import ModuleKinds, embedding_weights, module_kinds, ties_embeddings
from qmerge.checkpoint.config import shared_quantization_config
from qmerge.checkpoint.names import UNCONVERTED, WITHOUT_CONV1D
from qmerge.errors import CheckpointError, RecipeError
from qmerge.formats import get_format
from qmerge.formats.base import ModuleLayout, TargetFormat
from qmerge.planning.inputs import Inputs
from qmerge.types import Options, Step, Update, Weight

LLAMA_4 = ("llama4", "llama4_text")
"""``model_type`` of models whose loader replaces stacks of experts by single ones where the model is quantized."""

GPT_OSS = "gpt_oss"
"""The ``model_type`` whose experts are stacks [E, I, O]."""

SMALLEST_MATRIX = 16
"""Rows and columns of the smallest matrix of a stack. (A weight of three axes may be a convolution, with a short last one.)"""

NUMBERED = re.compile(r"\.\d+\.")
"""In the names of modules of decoder blocks."""

EXPERTS = re.compile(r"(.*\.experts)(?:\.|$)")
"""The module that holds all experts of a layer, at the start of a module name."""


@dataclass(frozen=True)
class Modules:
    """The modules of the base, as transformers and the target's loaders see them.

    simulates_training: dense weights are first quantized as in training, whatever the target is.
    """

    inputs: Inputs
    target: TargetFormat[Any]
    simulates_training: bool

    # --- Conv1D ---

    @cached_property
    def conv1d(self) -> frozenset[str]:
        """Modules whose dense weight is stored as [I, O].

        Where transformers does not know the architecture, shapes decide: a Conv1D has a bias as long as its columns.
        """
        # Asking transformers means to import and build the model, which takes seconds.
        if self.inputs.base.config.get("model_type") in WITHOUT_CONV1D:
            return frozenset()
        try:
            return self._module_kinds.conv1d
        except CheckpointError:  # an unknown architecture is an error only where nothing else gives the answer
            weights = self.inputs.base.weights.values()
            return frozenset(weight.module for weight in weights if self._looks_like_conv1d(weight))

    def _looks_like_conv1d(self, weight: Weight) -> bool:
        if weight.local != "weight" or len(weight.shape) != 2:
            return False
        rows, columns = weight.shape
        bias = self.inputs.base.weights.get(f"{weight.prefix}bias")
        if bias is not None and rows != columns:
            return bias.shape == (columns,)
        # peft sets fan_in_fan_out for the layers that an adapter changes; the rows of an embedding are tokens either way.
        update = self.inputs.adapter.updates.get(weight.name)
        if update is None or not self.inputs.adapter.config.get("fan_in_fan_out"):
            return False
        trains_rows = any(isinstance(member, TokenRowsUpdate) for member in update.members)
        shape_O, shape_I = update.shape
        return not trains_rows and shape_O in (columns, -1) and shape_I in (rows, -1)

    def is_conv1d(self, weight: Weight) -> bool:
        """Whether a weight belongs to a Conv1D, in whichever format it is stored."""
        return bool(self.conv1d) and self._module(weight) in self.conv1d

    def is_dense_conv1d(self, weight: Weight, update: Update | None = None) -> bool:
        """Whether a weight is stored as [I, O]. An ``update`` whose shape tells spares the question to transformers."""
        if not get_format(weight.format).info.is_dense or len(weight.shape) != 2 or weight.local != "weight":
            return False
        if update is not None and update.shape == weight.shape and update.shape[0] != update.shape[1]:
            return False
        return self.is_conv1d(weight)

    # --- quantizable ---

    def is_quantizable(self, weight: Weight) -> bool:
        """Whether the stock loader quantizes a weight, or expects it quantized."""
        if self.target.info.container:
            return True
        is_in_target_format = weight.format == self.target.name
        if self._towers and self._module(weight) in self._towers and not is_in_target_format:
            return False
        if self.target.info.takes_stacks:
            return is_in_target_format or self._is_gpt_oss_stack(weight)
        if get_format(weight.format).info.is_quantized:
            if is_in_target_format or not self.target.info.is_quantized:
                return True
            return self.target.accepts(weight.shape) and not self._is_embedding_for_others(weight)
        if not self._is_dense_matrix(weight):
            return False
        if not (self.target.info.is_quantized or self.simulates_training):
            return False
        # In memory these experts are a stack, where transformers' rules find no linear layers.
        if self.target.info.takes_single_experts and self._is_single_expert(weight):
            return self.target.name not in self.inputs.base.formats()
        if self.is_quantizable_embedding(weight):
            return self.target.name not in self.inputs.base.formats()
        module = self._module(weight)
        # GPTQ's loaders replace layers in the decoder's blocks only (Gemma 4 has one outside).
        if self.target.info.quant_method == "gptq" and not NUMBERED.search(module):
            return False
        is_expected = (
            self._quantizes_dense and module in self._module_kinds.quantizable and module not in self._converted
        )
        return is_expected and self.target.accepts(weight.shape)

    def _is_embedding_for_others(self, weight: Weight) -> bool:
        """Whether a weight is an embedding that the base's library has quantized, and the target's would not."""
        if self.target.info.quantizes_embeddings or not get_format(weight.format).info.quantizes_embeddings:
            return False
        return self._is_embedding(weight)

    def is_quantizable_embedding(self, weight: Weight) -> bool:
        """Whether a weight is an embedding that the target's library quantizes, too."""
        if not self.target.info.quantizes_embeddings:
            return False
        is_stored_so = self._is_dense_matrix(weight) and self.target.accepts(weight.shape)
        return is_stored_so and self._is_embedding(weight)

    def _is_dense_matrix(self, weight: Weight) -> bool:
        if len(weight.shape) != 2 or not get_format(weight.format).info.is_dense:
            return False
        # On disk, a few architectures have other names for what is a linear layer's weight in memory.
        return "weight" in (weight.local, self._parameter(weight).rpartition(".")[2])

    @cached_property
    def _quantizes_dense(self) -> bool:
        """Whether dense weights become quantized. A quantized base leaves weights dense on purpose, and they stay
        dense.

        The exception is a base none of whose quantized weights the target takes (gpt-oss: only the stacked experts are
        quantized, which are not linear layers for other formats).
        """
        for weight in self.inputs.base.weights.values():
            if not get_format(weight.format).info.is_quantized:
                continue
            if weight.format == self.target.name or self.target.accepts(weight.shape):
                return False
        return True

    # --- the quantization config ---

    def layout(self, steps: tuple[Step, ...], kept_dense: Set[str]) -> ModuleLayout:
        """Which linear layers are quantized in the output, and which stay dense although the loader expects them
        quantized: those kept dense, and those that a base of another library left dense on purpose.

        Args:
            kept_dense: names of weights that were promoted, or are heads that were trained whole.
        """
        if not self.target.info.is_quantized or self.target.info.container:
            return ModuleLayout()
        modules: list[str] = []  # of all steps
        quantized: list[str] = []
        options: list[Options] = []  # of the quantized ones
        exceptions = set()  # kept dense, or of a shape that the target does not take
        for step in steps:
            module = self._loaded_module(step.weight)
            modules.append(module)
            if step.target == self.target.name:
                quantized.append(module)
                options.append(step.options)
            elif (step.name in kept_dense and len(step.weight.shape) == 2) or self._is_misshapen(step.weight):
                exceptions.add(module)
        dense = self._dense_modules(quantized) | exceptions
        # Of several layers that one weight on disk becomes, only the first is the module of a step.
        named = dict.fromkeys([*modules, *sorted(self._converted)])
        layout = ModuleLayout(
            quantized=tuple(quantized),
            dense=tuple(module for module in named if module in dense),
            experts=dense_experts(steps, self.target),
            others=_with_other_options(quantized, options),
        )
        # Only these configs contain the loader's own list, for which transformers has to build the model.
        if layout.dense or layout.experts or self.target.info.quant_method == "compressed-tensors":
            layout = replace(layout, skipped=self._default_module_kinds.skipped)
        return layout

    def _is_misshapen(self, weight: Weight) -> bool:
        """Whether a weight stays dense because of its shape alone."""
        if not self._is_dense_matrix(weight) or self.target.accepts(weight.shape):
            return False
        return self._module(weight) in self._module_kinds.quantizable

    def _dense_modules(self, quantized: list[str]) -> frozenset[str]:
        """Modules that stay dense although the loader expects them quantized."""
        dense = self._towers | self._converted
        # Where base and target are of the same library, the config of the base names already what is dense in it.
        library = shared_quantization_config(self.inputs.base, self.target)
        if self.inputs.base.quantization and (not library or self.target.info.lists_dense):
            dense |= self._default_module_kinds.quantizable
        return dense - set(quantized)

    def check_experts(self, steps: tuple[Step, ...]) -> None:
        """Raise RecipeError where the target's loader would not take a weight that stays dense."""
        if self.target.info.quant_method == "mlx":
            self._check_stacks(steps)
        if self.target.info.takes_stacks:
            self._check_whole_modules(steps)
        elif self.target.info.is_quantized and self.target.info.quant_method not in ("mlx", "fp8"):
            self._check_llama_4(steps)
        if self.target.info.quant_method != "compressed-tensors" or self.target.name in self.inputs.base.formats():
            return
        for step in steps:
            if step.target != self.target.name and self._is_single_expert(step.weight):
                problem = self.target.info.experts_problem or "this expert is not quantized"
                raise RecipeError(
                    f"{step.name} would stay dense ({problem}), and transformers 5.23 drops dense single experts of a "
                    f"compressed-tensors model: use --target w4a16, w8a16, mxfp4a16 or fp8, which quantize them, or nf4"
                )

    def _check_stacks(self, steps: tuple[Step, ...]) -> None:
        for step in steps:
            if len(step.weight.shape) > 2 and EXPERTS.match(step.weight.module):
                raise RecipeError(
                    f"{step.name} is a stack of experts, which mlx_lm arranges otherwise: use another target, or bf16 and then "
                    f"mlx_lm.convert"
                )

    def _check_llama_4(self, steps: tuple[Step, ...]) -> None:
        """transformers/quantizers/base.py, SequentialLlama4TextExperts: for any quantization but FP8 in 5.23."""
        if self.inputs.base.config.get("model_type") not in LLAMA_4 or self.target.info.container:
            return
        for step in steps:
            if is_expert_stack(step.weight):
                raise RecipeError(
                    f"{step.name} is a stack of experts, which transformers does not load in a quantized Llama 4: use --target fp8 "
                    f"or bf16"
                )

    def _check_whole_modules(self, steps: tuple[Step, ...]) -> None:
        """Of a module of experts, loaders take both stacks in the target format, or neither (--promote)."""
        dense = dense_experts(steps, self.target)
        for step in steps:
            is_left_dense = step.target != self.target.name and step.weight.module not in dense
            if is_left_dense and is_expert_stack(step.weight):
                raise RecipeError(
                    f"{step.name} would stay dense and the other stack of the module be {self.target.name}, which no loader takes: "
                    f"leave out --promote, or use --target bf16"
                )

    # --- what transformers knows ---

    @cached_property
    def _module_kinds(self) -> ModuleKinds:
        skip = self.inputs.base.quantization.get("llm_int8_skip_modules")
        return module_kinds(self.inputs.base.config, skip)

    @cached_property
    def _default_module_kinds(self) -> ModuleKinds:
        """The modules that the stock loader quantizes without a list of modules to skip."""
        try:
            return module_kinds(self.inputs.base.config, None)
        except CheckpointError:
            return ModuleKinds(quantizable=frozenset(), conv1d=frozenset(), skipped=("lm_head",))

    @cached_property
    def _towers(self) -> frozenset[str]:
        """Linear layers of a multimodal model outside its text model, where the target leaves them dense.

        bitsandbytes quantizes them; the tools of the other formats do not, and some of their loaders fail on quantized
        ones (Siglip and Gemma 3 in transformers 5.23).
        """
        if self.target.info.quant_method in (None, "bitsandbytes") or self._keeps_names:
            return frozenset()
        return self._default_module_kinds.towers

    @cached_property
    def _converted(self) -> frozenset[str]:
        """Linear layers that transformers makes of a part of a weight on disk, or of several weights. They stay dense: its
        loaders do not do that with quantized weights. mlx_lm has the layers of the disk."""
        if self.target.info.quant_method in (None, "mlx") or self._keeps_names:
            return frozenset()
        modules = {name.removesuffix(".weight") for name in self.inputs.names.converted}
        return self._default_module_kinds.quantizable & modules

    def _is_embedding(self, weight: Weight) -> bool:
        # Names on disk are often those in memory, and to ask for these takes seconds.
        return weight.name in self._embeddings or self._parameter(weight) in self._embeddings

    @cached_property
    def _embeddings(self) -> tuple[str, ...]:
        """Weights of the input and the output embedding; of the first one only where they are tied."""
        config = self.inputs.base.config
        both = embedding_weights(config) or ()
        return both[:1] if ties_embeddings(config) else both

    # --- names ---

    def _module(self, weight: Weight) -> str:
        """Name of a weight's module in memory, where the weight is a parameter of its own in memory; else its name on
        disk."""
        module, _, local = self._parameter(weight).rpartition(".")
        return module if local in (weight.local, "weight") else weight.module

    def _loaded_module(self, weight: Weight) -> str:
        """The same, without building the model where names in memory are those on disk."""
        return weight.module if self._keeps_names else self._module(weight)

    def _parameter(self, weight: Weight) -> str:
        """Name of the parameter in memory that a weight on disk becomes, or becomes part of."""
        return self.inputs.names.parameter_of(weight.name) or weight.name

    def _is_single_expert(self, weight: Weight) -> bool:
        """Whether a matrix on disk becomes part of a stack of experts in memory."""
        if ".experts." not in weight.name or len(weight.shape) != 2:
            return False
        return self._parameter(weight).rpartition(".")[2] != weight.local

    def _is_gpt_oss_stack(self, weight: Weight) -> bool:
        """Whether a weight is a stack [E, I, O] of gpt-oss' experts, not their biases."""
        return is_expert_stack(weight) and self.inputs.base.config.get("model_type") == GPT_OSS

    @property
    def _keeps_names(self) -> bool:
        """Whether transformers loads this kind of model under the names on disk."""
        return self.inputs.base.config.get("model_type") in UNCONVERTED


def dense_expert_steps(steps: tuple[Step, ...], target: TargetFormat[Any]) -> list[Step]:
    """The steps whose weight is one expert, or a stack of them, and stays dense although the target is quantized."""
    if not target.info.is_quantized or target.info.container:
        return []
    return [step for step in steps if step.target != target.name and is_expert(step.weight)]


def is_expert_stack(weight: Weight) -> bool:
    """Whether a weight is a stack of matrices, or one of larger things, of a module ``….experts``."""
    return len(weight.shape) == 3 and EXPERTS.match(weight.module) is not None


def is_expert(weight: Weight) -> bool:
    """Whether a weight is the matrix of one expert or a stack of matrices; biases of experts are neither."""
    if len(weight.shape) == 3:
        return min(weight.shape[1:]) >= SMALLEST_MATRIX
    return len(weight.shape) == 2 and weight.local == "weight" and EXPERTS.match(weight.module) is not None


def dense_experts(steps: tuple[Step, ...], target: TargetFormat[Any]) -> tuple[str, ...]:
    """Modules ``….experts`` of which no weight is stored in the target format."""
    all_experts: dict[str, None] = {}
    stored_experts: set[str] = set()
    for step in steps:
        match = EXPERTS.match(step.weight.module)
        if match is None:
            continue
        all_experts[match[1]] = None
        if step.target == target.name:
            stored_experts.add(match[1])
    return tuple(module for module in all_experts if module not in stored_experts)


def _with_other_options(modules: list[str], options: list[Options]) -> tuple[tuple[str, Options], ...]:
    """The modules that are stored with other options than most, with their options.

    Args:
        modules: names of all modules in the target format.
        options: how each of them is stored.
    """
    if not modules:
        return ()
    [(usual, _)] = Counter(options).most_common(1)
    return tuple(pair for pair in zip(modules, options, strict=True) if pair[1] != usual)
