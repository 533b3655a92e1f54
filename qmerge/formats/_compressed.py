"""What all compressed-tensors formats share: how the config tells which module is stored how, and the integer ones whole.

``config_groups`` name schemes and their targets: a module's own name or a pattern (``re:``) first, else its class
(compressed-tensors 0.20, utils/match.py). Scales have the model's dtype; values are (code − zero) · scale in float32.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from qmerge.errors import CheckpointError, RecipeError
from qmerge.formats import all_formats
from qmerge.formats._affine import dividing
from qmerge.formats.base import NOT_QUANTIZED, ModuleLayout, TargetFormat
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Options, TensorInfo, Weight

QUANT_METHOD, VERSION = "compressed-tensors", "0.20.0"
"""``version`` is that of the layout: the library's, whose bytes these are."""

SCALE_DTYPES = ("F16", "BF16", "F32")
FP8_LAYOUTS = ("mxfp8-quantized", "float-quantized", "naive-quantized")
"""Of 8-bit floats, which are another module's."""

BESIDE = (
    "weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale",
    "input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point",
)  # fmt: skip
"""Parts that a module may have beside its codes and scales."""

STATIC_INPUTS = ("input_scale", "input_global_scale")
TAKE_CONFIG = "Take the config.json that belongs to these files"


@dataclass(frozen=True)
class CompressedOptions:
    """``form`` is the format's name. ``group_size`` -1: a scale per row. ``act_order``: ``weight_g_idx`` says which group a
    column is in. ``static_inputs``: there are scales for activations too, measured on data that qmerge has not."""

    form: str
    group_size: int = -1
    sym: bool = True
    scale_dtype: str = "BF16"
    act_order: bool = False
    static_inputs: bool = False


@dataclass(frozen=True)
class Scheme:
    """``layout`` is what compressed-tensors calls format; ``weights`` are its QuantizationArgs."""

    layout: str
    weights: Mapping[str, Any]

    @property
    def kind(self) -> tuple[str, str, int]:
        bits = self.weights.get("num_bits", 8)
        return self.layout, str(self.weights.get("type", "int")), bits if isinstance(bits, int) else 0

    def __str__(self) -> str:
        layout, kind, bits = self.kind
        return f"{layout!r} with {bits} bits ({kind})"


class Compressed(TargetFormat[CompressedOptions]):
    """A layout of compressed-tensors.

    kinds    (layout, type, bits) of the schemes that are stored this way
    codes    local name of the part that holds the codes
    """

    kinds: ClassVar[tuple[tuple[str, str, int], ...]]
    codes: ClassVar[str] = "weight_packed"

    def find(
        self, tensors: Mapping[str, TensorInfo], reader: Reader, quantization: Mapping[str, Any] = NOT_QUANTIZED
    ) -> list[Weight]:
        packed = next((name for name in tensors if name.endswith(".weight_packed")), None)
        if packed and not quantization:
            raise CheckpointError(
                f"{packed} is {QUANT_METHOD}', but config.json has no quantization_config, so it is not known how many bits "
                f"it has. {TAKE_CONFIG}"
            )
        if quantization.get("quant_method") != self.info.quant_method:
            return []
        check_config(quantization)
        found = []
        for module in modules_of(tensors):
            scheme = scheme_of(module, quantization)
            if scheme is not None and scheme.kind in self.kinds:
                found.append(self._weight(module, tensors, scheme, reader))
        return found

    def _weight(self, module: str, tensors: Mapping[str, TensorInfo], scheme: Scheme, reader: Reader) -> Weight:
        names = (self.codes, "weight_scale", *BESIDE)
        parts = {local: tensors[f"{module}.{local}"] for local in names if f"{module}.{local}" in tensors}
        for local in self.needed(scheme):
            if local not in parts:
                raise CheckpointError(
                    f"config.json says that {module} is stored as {scheme}, but {module}.{local} is missing. {TAKE_CONFIG}"
                )
        shape, options = self.read_shape(module, parts, scheme, reader)
        if any(local in parts for local in STATIC_INPUTS):
            options = replace(options, static_inputs=True)
        return Weight(module, "weight", self.name, shape, parts, options)

    @abstractmethod
    def needed(self, scheme: Scheme) -> tuple[str, ...]:
        """Local names of the parts that must be there."""

    @abstractmethod
    def read_shape(
        self, module: str, parts: Mapping[str, TensorInfo], scheme: Scheme, reader: Reader
    ) -> tuple[tuple[int, int], CompressedOptions]:
        """[O, I] and options, from shapes and scheme, which must agree."""

    @abstractmethod
    def weights_args(self, options: CompressedOptions) -> dict[str, Any]:
        """``weights`` of the scheme, as the library dumps it."""

    def inputs_args(self) -> dict[str, Any] | None:
        """``input_activations`` of the scheme."""
        return None

    def like(self, source: Options | None, dtype: str) -> CompressedOptions:
        """What the base had, where it is stored this way; else the library's defaults."""
        if isinstance(source, CompressedOptions) and source.form == self.name:
            return source
        return CompressedOptions(self.name, scale_dtype=dtype if dtype in SCALE_DTYPES else "BF16")

    def check(self, name: str, shape: tuple[int, int], options: CompressedOptions) -> None:
        if options.static_inputs:
            raise RecipeError(
                f"{name} has scales for its inputs, which were measured on data: with fresh weight scales they would be "
                f"lost. Leave out --scales fresh, or use --target w4a16 or another one without them"
            )
        if options.group_size != -1 and shape[1] % options.group_size:
            raise RecipeError(
                f"{name} has {shape[1]} inputs, no multiple of the group size {options.group_size}: {self.way_out(shape[1])}"
            )

    def way_out(self, columns: int) -> str:
        return f"use --group-size {dividing([columns])}"

    def codes_part(self, local: str) -> str:
        return self.codes

    def quantization_config(
        self, options: CompressedOptions, base: Mapping[str, Any], compute_dtype: str, layout: ModuleLayout
    ) -> dict[str, Any] | None:
        """The base's own where it says the same of the weights (it may also say how activations are quantized)."""
        weights, ignore = self.weights_args(options), ignored(base, layout)
        schemes = schemes_of(base).values()
        if schemes and all(same_args(scheme, weights) and scheme.kind in self.kinds for scheme in schemes):
            return {**base, "ignore": ignore}
        name = self.kinds[0][0]
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": self.inputs_args(),
            "output_activations": None,
            "format": name,
        }
        return {
            "config_groups": {"group_0": group},
            "kv_cache_scheme": base.get("kv_cache_scheme"),
            "format": name,
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "ignore": ignore,
            "moe_sparsity_config": None,
            "quant_method": QUANT_METHOD,
            "version": VERSION,
            "sparsity_config": {},
            "transform_config": {},
        }


def modules_of(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Modules that have codes or scales."""
    modules = []
    for name, info in tensors.items():
        module, _, local = name.rpartition(".")
        if local in ("weight_packed", "weight_scale") or (local == "weight" and info.dtype == "I8"):
            modules.append(module)
    return list(dict.fromkeys(modules))


def check_config(quantization: Mapping[str, Any]) -> None:
    """What would change the meaning of the weights, or is not known."""
    if quantization.get("transform_config"):
        raise CheckpointError(
            "transform_config: the weights are stored rotated, and an adapter's delta would have to be rotated too, which "
            "this version does not do; take the model without transforms"
        )
    sparsity = (quantization.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise CheckpointError(f"sparsity_config: weights stored as {sparsity!r} are not read; take the dense model")
    schemes = schemes_of(quantization)
    if not schemes:
        raise CheckpointError(
            f"quantization_config has no config_groups, so it is not known what is stored how. {TAKE_CONFIG}"
        )
    formats = list(all_formats().values())
    known = {kind for form in formats if isinstance(form, Compressed) for kind in form.kinds}
    for name, scheme in schemes.items():
        fp8 = scheme.layout in FP8_LAYOUTS and scheme.kind[1:] == ("float", 8)
        if not fp8 and scheme.kind not in known:
            read = ", ".join(f"{layout} ({bits} bits, {kind})" for layout, kind, bits in sorted(known))
            raise CheckpointError(f"{name} is stored as {scheme}, which this version does not read. It reads: {read}")


def schemes_of(quantization: Mapping[str, Any]) -> dict[str, Scheme]:
    """Name of a config group → its scheme; groups without weights (attention, caches) are left out."""
    groups = quantization.get("config_groups")
    return {
        name: Scheme(str(group.get("format") or quantization.get("format")), group["weights"])
        for name, group in (groups.items() if isinstance(groups, dict) else ())
        if isinstance(group, dict) and isinstance(group.get("weights"), dict)
    }


def scheme_of(module: str, quantization: Mapping[str, Any]) -> Scheme | None:
    """The scheme of the group that names the module, else of one that names a class."""
    schemes, by_class = schemes_of(quantization), []
    for name, scheme in schemes.items():
        targets = [str(target) for target in quantization["config_groups"][name].get("targets") or ()]
        if any(matches(target, module) for target in targets):
            return scheme
        if any(not target.startswith("re:") and "." not in target for target in targets):
            by_class.append(scheme)
    return by_class[0] if by_class else None


def matches(target: str, module: str) -> bool:
    if not target.startswith("re:"):
        return target == module
    try:
        return re.match(target.removeprefix("re:"), module) is not None
    except re.error as cause:
        raise CheckpointError(f"quantization_config: {target!r} is no regular expression ({cause})") from cause


def ignored(base: Mapping[str, Any], layout: ModuleLayout) -> list[str]:
    """Names and patterns of what is dense, though its class is a target: the base's, and what they leave out."""
    ignore = [str(target) for target in base.get("ignore") or layout.skipped]
    dense = [module for module in layout.dense if not any(matches(target, module) for target in ignore)]
    experts = [module for module in layout.experts if not any(matches(target, module) for target in ignore)]
    return [*ignore, *dense, *(f"re:{re.escape(module)}" for module in experts)]


def same_args(scheme: Scheme, weights: Mapping[str, Any]) -> bool:
    told = ("num_bits", "type", "symmetric", "strategy", "group_size")
    defaults = {"type": "int", "symmetric": True}
    return all((scheme.weights.get(key, defaults.get(key)) or None) == (weights[key] or None) for key in told)


# --- integers --------------------------------------------------------------------------------------------------------


def group_size_of(module: str, columns: int, scheme: Scheme) -> int:
    """-1 for a scale per row."""
    strategy, size = scheme.weights.get("strategy"), scheme.weights.get("group_size")
    if strategy is None:
        strategy = "channel" if size == -1 else "tensor" if size is None else "group"
    if strategy == "channel":
        return -1
    if strategy not in ("group", "tensor_group") or not isinstance(size, int) or size < 1:
        raise CheckpointError(
            f"{module}: strategy {strategy!r} with group_size {size!r} is not read for {scheme}; expected 'channel', or "
            f"'group' with a size"
        )
    if columns % size:
        raise CheckpointError(
            f"{module} has {columns} inputs, but config.json says groups of {size}, which do not fit. {TAKE_CONFIG}"
        )
    return size
