"""How ``quantization_config`` of compressed-tensors tells which module is stored how (compressed-tensors 0.20).

``config_groups`` hold schemes with their targets. A target is a module's own name, a pattern (``re:``) or a class. Names and
patterns come first (utils/match.py).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from qmerge.errors import CheckpointError
from qmerge.formats._affine import WHOLE_ROW
from qmerge.formats.base import ModuleLayout

QUANT_METHOD = "compressed-tensors"

# ``version`` in the configs that qmerge writes: that of the library whose layout they have.
VERSION = "0.20.0"

TAKE_CONFIG = "Take the config.json that belongs to these files"

# Formats of 8-bit floats, which ``fp8`` reads.
FP8_FORMATS = ("mxfp8-quantized", "float-quantized", "naive-quantized")

# Format, number type and bits of a scheme: ("pack-quantized", "int", 4).
Kind = tuple[str, str, int]


@dataclass(frozen=True)
class Scheme:
    """How the weights of a config group are stored."""

    format: str
    """compressed-tensors' name of the format."""

    weights: Mapping[str, Any]
    """QuantizationArgs of the weights."""

    @property
    def kind(self) -> Kind:
        """Format, number type and bits; 0 bits if the config does not give a number."""
        # Defaults of QuantizationArgs (quant_args.py).
        bits = self.weights.get("num_bits", 8)
        return self.format, str(self.weights.get("type", "int")), bits if isinstance(bits, int) else 0

    @property
    def symmetric(self) -> bool:
        """Whether zero points are zero."""
        return bool(self.weights.get("symmetric", True))

    def __str__(self) -> str:
        _, number_type, bits = self.kind
        return f"{self.format!r} with {bits} bits ({number_type})"

    def same_weights(self, args: Mapping[str, Any]) -> bool:
        """Whether these QuantizationArgs mean the same for weights."""
        # Absent entries have the library's defaults; null and absent mean the same.
        defaults = {"type": "int", "symmetric": True}
        for key in ("num_bits", "type", "symmetric", "strategy", "group_size"):
            if (self.weights.get(key, defaults.get(key)) or None) != (args[key] or None):
                return False
        return True


def schemes_of(quantization: Mapping[str, Any]) -> dict[str, Scheme]:
    """Name of a config group → its scheme. Groups without weights (attention, caches) are left out."""
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict):
        return {}
    schemes = {}
    for name, group in groups.items():
        if isinstance(group, dict) and isinstance(group.get("weights"), dict):
            schemes[name] = Scheme(str(group.get("format") or quantization.get("format")), group["weights"])
    return schemes


def scheme_of(module: str, quantization: Mapping[str, Any]) -> Scheme | None:
    """The scheme of the group that names the module, otherwise that of the first group that names a class."""
    of_class = None
    for name, scheme in schemes_of(quantization).items():
        targets = [str(target) for target in quantization["config_groups"][name].get("targets") or ()]
        if any(matches(target, module) for target in targets):
            return scheme
        if of_class is None and any(_is_class(target) for target in targets):
            of_class = scheme
    return of_class


def _is_class(target: str) -> bool:
    """Whether a target is the name of a class (``Linear``): it is not a pattern, and modules have dots in their names."""
    return not target.startswith("re:") and "." not in target


def matches(target: str, module: str) -> bool:
    """Whether a target is this module's name, or a pattern that it begins with.

    Raises:
        CheckpointError: the pattern is not a regular expression.
    """
    if not target.startswith("re:"):
        return target == module
    # As in the library, a pattern need not reach to the end of the name.
    try:
        return re.match(target.removeprefix("re:"), module) is not None
    except re.error as cause:
        raise CheckpointError(
            f"quantization_config: {target!r} is not a regular expression ({cause}). {TAKE_CONFIG}"
        ) from cause


def ignored(base: Mapping[str, Any], layout: ModuleLayout) -> list[str]:
    """``ignore``: names and patterns of dense modules of a target class. Those of ``base``, and modules that they do not cover."""
    ignore = [str(target) for target in base.get("ignore") or layout.skipped]

    def is_covered(module: str) -> bool:
        return any(matches(target, module) for target in ignore)

    dense = [module for module in layout.dense if not is_covered(module)]
    experts = [f"re:{re.escape(module)}" for module in layout.experts if not is_covered(module)]
    return [*ignore, *dense, *experts]


def check_config(quantization: Mapping[str, Any], known: Collection[Kind]) -> None:
    """Check that the config has only entries that qmerge knows the meaning of.

    Args:
        known: the schemes that qmerge reads, except for 8-bit floats.

    Raises:
        CheckpointError: something would change the meaning of the weights, or is unknown.
    """
    if quantization.get("transform_config"):
        raise CheckpointError(
            "transform_config: the weights are stored rotated, and an adapter's delta would have to be rotated too, which this "
            "version does not do; take the model without transforms"
        )
    sparsity = (quantization.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise CheckpointError(f"sparsity_config: weights stored as {sparsity!r} are not read; take the dense model")
    schemes = schemes_of(quantization)
    if not schemes:
        raise CheckpointError(
            f"quantization_config has no config_groups, so nothing says which weights are stored how. {TAKE_CONFIG}"
        )
    for name, scheme in schemes.items():
        is_fp8 = scheme.format in FP8_FORMATS and scheme.kind[1:] == ("float", 8)
        if not is_fp8 and scheme.kind not in known:
            read = ", ".join(f"{fmt} ({bits} bits, {number_type})" for fmt, number_type, bits in sorted(known))
            raise CheckpointError(f"{name} is stored as {scheme}, which this version does not read. It reads: {read}")


def group_size_of(module: str, columns: int, scheme: Scheme) -> int:
    """The group size of a module with so many inputs; -1 for a scale per row.

    Raises:
        CheckpointError: the scheme has scales for something else, or its groups do not divide the inputs.
    """
    size = scheme.weights.get("group_size")
    strategy = scheme.weights.get("strategy")
    if strategy is None:
        strategy = _default_strategy(size)
    if strategy == "channel":
        return WHOLE_ROW
    if strategy not in ("group", "tensor_group") or not isinstance(size, int) or size < 1:
        raise CheckpointError(
            f"{module}: strategy {strategy!r} with group_size {size!r} is not read for {scheme}; expected 'channel', or 'group' "
            f"with a size. Choose another variant of the model"
        )
    if columns % size:
        raise CheckpointError(
            f"{module} has {columns} inputs, but config.json says groups of {size}, which do not fit. {TAKE_CONFIG}"
        )
    return size


def _default_strategy(group_size: object) -> str:
    """The strategy of a scheme that does not name one (quant_args.py)."""
    if group_size is None:
        return "tensor"
    return "channel" if group_size == WHOLE_ROW else "group"


def make_config(
    fmt: str,
    *,
    weights: Mapping[str, Any],
    inputs: Mapping[str, Any] | None,
    ignore: list[str],
    kv_cache_scheme: Any,
) -> dict[str, Any]:
    """``quantization_config`` with one scheme for all linear layers, as compressed-tensors dumps it."""
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": fmt,
    }
    return {
        "config_groups": {"group_0": group},
        "kv_cache_scheme": kv_cache_scheme,
        "format": fmt,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": ignore,
        "moe_sparsity_config": None,
        "quant_method": QUANT_METHOD,
        "version": VERSION,
        "sparsity_config": {},
        "transform_config": {},
    }
