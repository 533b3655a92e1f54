"""The base class of all formats of compressed-tensors: finding weights by the config's schemes, options, and the config itself.

Scales have the model's dtype; values are (code − zero) · scale in float32.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from qmerge.errors import CheckpointError, RecipeError
from qmerge.formats import all_formats
from qmerge.formats._affine import WHOLE_ROW, largest_group_size
from qmerge.formats._compressed_config import (
    QUANT_METHOD,
    TAKE_CONFIG,
    Kind,
    Scheme,
    check_config,
    ignored,
    make_config,
    scheme_of,
    schemes_of,
)
from qmerge.formats._tensors import parts_of
from qmerge.formats.base import NOT_QUANTIZED, ModuleLayout, TargetFormat
from qmerge.safetensors_io.reader import Reader
from qmerge.types import TensorInfo, Weight

SCALE_DTYPES = ("F16", "BF16", "F32")

# Local names of tensors that a module may have in addition to its codes and scales.
FURTHER_PARTS = (
    "weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale",
    "input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point",
)  # fmt: skip

# Scales of the inputs that were measured on data.
STATIC_INPUTS = ("input_scale", "input_global_scale")


@dataclass(frozen=True, kw_only=True)
class CompressedOptions:
    """How a weight is stored."""

    format: str
    """Name of the format, which these options belong to."""

    group_size: int = WHOLE_ROW
    """Inputs that share a scale; -1: a scale per row."""

    sym: bool = True
    """Whether the code that means 0 is the middle one."""

    scale_dtype: str = "BF16"
    """safetensors dtype of the scales."""

    act_order: bool = False
    """Whether ``weight_g_idx`` says which group a column is in."""

    static_inputs: bool = False
    """Whether the module has scales of its inputs, measured on data that qmerge does not have."""


class Compressed(TargetFormat[CompressedOptions]):
    """A format of compressed-tensors."""

    kinds: ClassVar[tuple[Kind, ...]]
    """The schemes that are stored this way. The first one is written."""

    codes_tensor: ClassVar[str] = "weight_packed"
    """Local name of the tensor with the codes."""

    def find(
        self, tensors: Mapping[str, TensorInfo], reader: Reader, quantization: Mapping[str, Any] = NOT_QUANTIZED
    ) -> list[Weight]:
        if not quantization:
            _check_nothing_packed(tensors)
        if quantization.get("quant_method") != QUANT_METHOD:
            return []
        check_config(quantization, _known_kinds())
        weights = []
        for module in modules_of(tensors):
            scheme = scheme_of(module, quantization)
            if scheme is not None and scheme.kind in self.kinds:
                weights.append(self._weight(module, tensors, scheme, reader))
        return weights

    def _weight(self, module: str, tensors: Mapping[str, TensorInfo], scheme: Scheme, reader: Reader) -> Weight:
        parts = parts_of(module, (self.codes_tensor, "weight_scale", *FURTHER_PARTS), tensors)
        for local in self.required_parts(scheme):
            if local not in parts:
                raise CheckpointError(
                    f"config.json says that {module} is stored as {scheme}, but {module}.{local} is missing. {TAKE_CONFIG}"
                )
        shape, options = self.shape_and_options(module, parts, scheme, reader)
        if any(local in parts for local in STATIC_INPUTS):
            options = replace(options, static_inputs=True)
        return Weight(module=module, local="weight", format=self.name, shape=shape, parts=parts, options=options)

    @abstractmethod
    def required_parts(self, scheme: Scheme) -> tuple[str, ...]:
        """Local names of the tensors that a weight of this scheme must have."""

    @abstractmethod
    def shape_and_options(
        self, module: str, parts: Mapping[str, TensorInfo], scheme: Scheme, reader: Reader
    ) -> tuple[tuple[int, int], CompressedOptions]:
        """[O, I] and options, from the tensors and the scheme.

        Raises:
            CheckpointError: they contradict each other.
        """

    @abstractmethod
    def weights_args(self, options: CompressedOptions) -> dict[str, Any]:
        """``weights`` of the scheme (QuantizationArgs), as the library dumps it."""

    def inputs_args(self) -> dict[str, Any] | None:
        """``input_activations`` of the scheme; None if loaders compute in 16 bits."""
        return None

    def uses_input_order(self, options: CompressedOptions) -> bool:
        return options.act_order

    def check(self, name: str, shape: tuple[int, int], options: CompressedOptions) -> None:
        if options.static_inputs:
            raise RecipeError(
                f"{name} has scales for its inputs, which were measured on data: with fresh weight scales they would be lost. "
                f"Leave out --scales fresh, or use --target w4a16 or another one without them"
            )
        if options.group_size != WHOLE_ROW and shape[1] % options.group_size:
            raise RecipeError(
                f"{name} has {shape[1]} inputs, which is not a multiple of the group size {options.group_size}: "
                f"{self.advice_for_inputs(shape[1])}"
            )

    def advice_for_inputs(self, columns: int) -> str:
        """Advice for the user if groups do not divide this number of inputs."""
        return f"use --group-size {largest_group_size([columns])}"

    def codes_part(self, local: str) -> str:
        return self.codes_tensor

    def quantization_config(
        self, options: CompressedOptions, base: Mapping[str, Any], compute_dtype: str, layout: ModuleLayout
    ) -> dict[str, Any] | None:
        weights = self.weights_args(options)
        ignore = ignored(base, layout)
        schemes = schemes_of(base).values()
        if schemes and all(scheme.same_weights(weights) and scheme.kind in self.kinds for scheme in schemes):
            # The base's own config also says how activations are quantized.
            return {**base, "ignore": ignore}
        return make_config(
            self.kinds[0][0],
            weights=weights,
            inputs=self.inputs_args(),
            ignore=ignore,
            kv_cache_scheme=base.get("kv_cache_scheme"),
        )


def modules_of(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Modules that have codes or scales."""
    modules = []
    # Codes that are not packed have a name that dense weights have too, so their dtype decides.
    for name, info in tensors.items():
        module, _, local = name.rpartition(".")
        if local in ("weight_packed", "weight_scale") or (local == "weight" and info.dtype == "I8"):
            modules.append(module)
    return list(dict.fromkeys(modules))


def _check_nothing_packed(tensors: Mapping[str, TensorInfo]) -> None:
    """Without a config, packed codes cannot be read."""
    for name in tensors:
        if name.endswith(".weight_packed"):
            raise CheckpointError(
                f"{name} belongs to {QUANT_METHOD}, but config.json has no quantization_config, so the number of bits is "
                f"unknown. {TAKE_CONFIG}"
            )


def _known_kinds() -> set[Kind]:
    """All schemes that some format reads."""
    kinds: set[Kind] = set()
    for fmt in all_formats().values():
        if isinstance(fmt, Compressed):
            kinds.update(fmt.kinds)
    return kinds
