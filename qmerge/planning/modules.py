"""What kind of layer a weight belongs to, as transformers and the target's loaders see it, and what of it they quantize."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Set
from dataclasses import dataclass
from functools import cached_property

from qmerge.checkpoint.architecture import ModuleKinds, module_kinds
from qmerge.checkpoint.config import shared_quantization_config
from qmerge.checkpoint.names import UNCONVERTED
from qmerge.errors import CheckpointError, RecipeError
from qmerge.formats import get_format
from qmerge.formats.base import Format, Layout
from qmerge.planning.inputs import Inputs
from qmerge.types import Step, Weight


@dataclass(frozen=True)
class Modules:
    """``simulates``: dense weights are first quantized as in training, whatever the target is."""

    inputs: Inputs
    target: Format
    simulates: bool

    @cached_property
    def conv1d(self) -> frozenset[str]:
        """Modules whose dense weight lies as [I, O]. Where transformers does not know the architecture, the adapter's
        word counts: peft sets ``fan_in_fan_out`` for such layers."""
        try:
            return self._module_kinds.conv1d
        except CheckpointError:
            adapted = {name.removesuffix(".weight") for name in self.inputs.adapter.updates}
            return frozenset(adapted if self.inputs.adapter.config.get("fan_in_fan_out") else ())

    def is_conv1d(self, weight: Weight) -> bool:
        return self._module(weight) in self.conv1d

    def is_quantizable(self, weight: Weight) -> bool:
        """Whether the stock loader quantizes it, or finds it quantized."""
        if self._towers and self._module(weight) in self._towers and weight.format != self.target.name:
            return False
        if get_format(weight.format).quant_method:
            same = weight.format == self.target.name
            return same or not self.target.quant_method or self.target.accepts(weight.shape)
        matrix = weight.local == "weight" and len(weight.shape) == 2 and get_format(weight.format).dense_dtype
        wanted = self.target.quant_method or self.simulates
        if not (matrix and wanted):
            return False
        if self.target.single_experts and self._is_single_expert(weight):
            return self.target.name not in self.inputs.base.formats()
        return self._quantizes_dense and self._module(weight) in self._module_kinds.quantizable

    def layout(self, steps: tuple[Step, ...], promoted: Set[str]) -> Layout:
        """Which linear layers are quantized in the output, and which are not though the loader would expect it: promoted
        ones, and what a base of another library left dense on purpose.

        Raises:
            RecipeError: what stays dense would be lost by the loader.
        """
        if not self.target.quant_method:
            return Layout()
        module = {step.name: self._loaded_module(step.weight) for step in steps}
        stored = [step for step in steps if step.target == self.target.name]
        quantized = tuple(module[step.name] for step in stored)
        usual = Counter(step.options for step in stored).most_common(1)
        others = tuple((module[step.name], step.options) for step in stored if usual and step.options != usual[0][0])
        dense = {module[step.name] for step in steps if step.name in promoted} | self._towers - set(quantized)
        known, library = self._default_module_kinds, shared_quantization_config(self.inputs.base, self.target)
        if self.inputs.base.quantization and (not library or self.target.lists_dense):
            dense |= known.quantizable - set(quantized)
        self._check_experts(steps)
        left = tuple(dict.fromkeys(module[step.name] for step in steps if module[step.name] in dense))
        return Layout(quantized, left, known.skipped, dense_experts(steps, self.target), others)

    @cached_property
    def _module_kinds(self) -> ModuleKinds:
        skip = self.inputs.base.quantization.get("llm_int8_skip_modules")
        return module_kinds(self.inputs.base.config, skip)

    @cached_property
    def _default_module_kinds(self) -> ModuleKinds:
        """What the stock loader quantizes when it is not told what to skip."""
        try:
            return module_kinds(self.inputs.base.config, None)
        except CheckpointError:
            return ModuleKinds(quantizable=frozenset(), conv1d=frozenset(), skipped=("lm_head",))

    @cached_property
    def _towers(self) -> frozenset[str]:
        """What stays dense beside the text of a multimodal model: bitsandbytes quantizes it, the others' tools leave it, and
        some of their loaders fail on it (Siglip and Gemma 3 in transformers 5.23)."""
        if self.target.quant_method in (None, "bitsandbytes") or self._unconverted:
            return frozenset()
        return self._default_module_kinds.towers

    @cached_property
    def _quantizes_dense(self) -> bool:
        """A base that is quantized leaves weights dense on purpose, and so they stay; unless the target takes none of its
        quantized ones (gpt-oss: only the fused experts are quantized, and for other formats those are no linear layers)."""
        quantized = [w for w in self.inputs.base.weights.values() if get_format(w.format).quant_method]
        return not any(w.format == self.target.name or self.target.accepts(w.shape) for w in quantized)

    def _is_single_expert(self, weight: Weight) -> bool:
        """Whether the matrix is a part of a stack in memory."""
        if ".experts." not in weight.name or len(weight.shape) != 2:
            return False
        return self._parameter(weight).rpartition(".")[2] != weight.local

    def _parameter(self, weight: Weight) -> str:
        return self.inputs.names.parameter_of(weight.name) or weight.name

    def _module(self, weight: Weight) -> str:
        """What transformers calls its module, if it is a weight by itself in memory, too."""
        module, _, local = self._parameter(weight).rpartition(".")
        return module if local == weight.local else weight.module

    def _loaded_module(self, weight: Weight) -> str:
        """The same without asking, where weights are on disk under their names."""
        return weight.module if self._unconverted else self._module(weight)

    @property
    def _unconverted(self) -> bool:
        return self.inputs.base.config.get("model_type") in UNCONVERTED

    def _check_experts(self, steps: tuple[Step, ...]) -> None:
        if self.target.quant_method != "compressed-tensors" or self.target.name in self.inputs.base.formats():
            return
        dense = [s for s in steps if s.target != self.target.name and self._is_single_expert(s.weight)]
        if dense:
            raise RecipeError(
                f"{dense[0].name} would stay dense, and transformers 5.23 drops dense single experts of a compressed-tensors "
                f"model: use --target w4a16 or w8a16, which quantize them, or nf4, gptq, awq or fp8"
            )


def dense_experts(steps: tuple[Step, ...], target: Format) -> tuple[str, ...]:
    """Modules ``….experts`` of which nothing is stored in the target format."""
    found = {step.weight.name: re.match(r"(.*\.experts)(?:\.|$)", step.weight.module) for step in steps}
    stored = {match[1] for step in steps if (match := found[step.weight.name]) and step.target == target.name}
    return tuple(dict.fromkeys(match[1] for match in found.values() if match and match[1] not in stored))
