"""A base whose decoder layers are used several times (peft's ``layer_replication``): each use is a layer of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qmerge.checkpoint.scan import Checkpoint
from qmerge.errors import AdapterError, CheckpointError
from qmerge.types import Weight

LAYER = re.compile(r"(?P<before>(?:[a-z_]+\.)?(?:layers|h|encoder\.layer)\.)(?P<number>\d+)(?P<after>\..+)")
"""peft replicates the stack of layers at ``model.layers``, ``bert.encoder.layer`` or ``transformer.h`` (replicate_layers)."""


def replicate_layers(base: Checkpoint, ranges: Any) -> Checkpoint:
    """The base with the layers that the ranges name, in their order, under new numbers; their bytes lie where they lay.

    Args:
        ranges: ``[[0, 4], [2, 5]]`` gives layers 0, 1, 2, 3, 2, 3, 4, as peft counts.

    Raises:
        AdapterError: these are no ranges of the base's layers.
        CheckpointError: the config says things of single layers that cannot be moved with them.
    """
    found = {name: match for name in base.weights if (match := LAYER.fullmatch(name))}
    count = 1 + max((int(match["number"]) for match in found.values()), default=-1)
    order = _order(ranges, count)
    config = _config(base.config, order, count)
    of_layer: dict[int, list[tuple[Weight, re.Match[str]]]] = {}
    for name, match in found.items():
        of_layer.setdefault(int(match["number"]), []).append((base.weights[name], match))
    weights = {name: weight for name, weight in base.weights.items() if name not in found}
    for number, old in enumerate(order):
        for weight, match in of_layer[old]:
            moved = _moved(weight, match["before"], number)
            weights[moved.name] = moved
    return replace(base, config=config, weights=weights)


def _order(ranges: Any, count: int) -> list[int]:
    try:
        order = [layer for start, stop in ranges for layer in range(start, stop)]
    except (TypeError, ValueError) as cause:
        raise AdapterError(
            f"adapter_config.json has layer_replication={ranges!r}; expected pairs like [[0, 4], [2, 5]]"
        ) from cause
    if not order or not 0 <= min(order) <= max(order) < count:
        raise AdapterError(f"adapter_config.json has layer_replication={ranges!r}, but the base has {count} layers")
    return order


def _moved(weight: Weight, before: str, number: int) -> Weight:
    def renamed(name: str) -> str:
        return before + re.sub(r"^\d+", str(number), name.removeprefix(before))

    parts = {local: replace(info, name=renamed(info.name)) for local, info in weight.parts.items()}
    return replace(weight, module=renamed(weight.module), parts=parts)


def _config(config: Mapping[str, Any], order: Sequence[int], count: int) -> dict[str, Any]:
    """The config for as many layers; kinds of layers (``layer_types``) move with them."""
    numbered = [
        name for name in _names_of_modules(config.get("quantization_config")) if re.search(r"\.\d+(\.|$)", name)
    ]
    if numbered:
        raise CheckpointError(
            f"the adapter replicates layers, but config.json's quantization_config names single ones ({numbered[0]}): "
            f"use the 16-bit model as base"
        )
    counted = next((name for name in ("num_hidden_layers", "n_layer") if config.get(name) == count), None)
    if counted is None:
        raise CheckpointError(f"the adapter replicates layers, but config.json does not say that the base has {count}")
    per_layer = {
        name: [values[old] for old in order]
        for name, values in {**config, **_layer_types(config)}.items()
        if isinstance(values, list) and "layer" in name and len(values) == count
    }
    return {**config, **per_layer, counted: len(order)}


def _layer_types(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the architecture's config class makes of a config that leaves them out: it counts them off."""
    from transformers import AutoConfig

    try:
        plain = {name: value for name, value in config.items() if name not in ("quantization_config", "auto_map")}
        kinds = getattr(AutoConfig.for_model(**plain), "layer_types", None)
    except Exception:  # an architecture of its own
        return {}
    return {"layer_types": list(kinds)} if kinds else {}


def _names_of_modules(quantization: Any) -> list[str]:
    if isinstance(quantization, dict):
        return [name for key, value in quantization.items() for name in [str(key), *_names_of_modules(value)]]
    if isinstance(quantization, list | tuple):
        return [name for value in quantization for name in _names_of_modules(value)]
    return [quantization] if isinstance(quantization, str) else []
