"""A base whose decoder layers are used several times (peft's ``layer_replication``): each use is a layer of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qmerge.checkpoint.documents import MOST_LAYERS
from qmerge.checkpoint.scan import Checkpoint
from qmerge.errors import AdapterError, CheckpointError
from qmerge.types import Weight

LAYER = re.compile(r"(?P<before>(?:[a-z_]+\.)?(?:layers|h|encoder\.layer)\.)(?P<number>\d+)(?P<after>\..+)")
"""peft replicates the stack of layers at ``model.layers``, ``bert.encoder.layer`` or ``transformer.h`` (replicate_layers)."""

LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer")


def replicate_layers(base: Checkpoint, ranges: Any) -> Checkpoint:
    """The base with its layers repeated: weights get the new layers' numbers, their bytes stay where they are.

    Args:
        ranges: ``[[0, 4], [2, 5]]`` gives layers 0, 1, 2, 3, 2, 3, 4, as in peft.

    Raises:
        AdapterError: the ranges are not valid, or not ranges of the base's layers.
        CheckpointError: the config has settings of single layers that cannot be moved with them.
    """
    # Everything outside the layers (embeddings, final norm, head) stays as it is.
    weights: dict[str, Weight] = {}
    matches_in_layer: dict[int, list[re.Match[str]]] = {}
    for name, weight in base.weights.items():
        match = LAYER.fullmatch(name)
        if match:
            matches_in_layer.setdefault(int(match["number"]), []).append(match)
        else:
            weights[name] = weight
    layer_count = 1 + max(matches_in_layer, default=-1)
    order = _layer_order(ranges, layer_count)
    config = _replicated_config(base.config, order, layer_count)
    for new_number, old_number in enumerate(order):
        for match in matches_in_layer[old_number]:
            weight = _renumbered(base.weights[match[0]], match["before"], new_number)
            weights[weight.name] = weight
    return replace(base, config=config, weights=weights)


def _layer_order(ranges: Any, layer_count: int) -> list[int]:
    """Number of the base's layer for every layer of the replicated model."""
    try:
        if sum(max(0, stop - start) for start, stop in ranges) > MOST_LAYERS:
            raise ValueError(f"more than {MOST_LAYERS} layers")
        order = [layer for start, stop in ranges for layer in range(start, stop)]
    except (TypeError, ValueError) as cause:
        raise AdapterError(
            f"adapter_config.json has layer_replication={str(ranges)[:80]}; expected pairs like [[0, 4], [2, 5]]"
        ) from cause
    if not order or min(order) < 0 or max(order) >= layer_count:
        raise AdapterError(
            f"adapter_config.json has layer_replication={str(ranges)[:80]}, but the base has {layer_count} layers. "
            f"Is this the base that the adapter was trained on?"
        )
    return order


def _renumbered(weight: Weight, before: str, number: int) -> Weight:
    """The weight under another layer number; ``before``: its name up to the number."""

    def renumbered_name(name: str) -> str:
        """``name``, of the module or of a tensor, with the other number."""
        return before + re.sub(r"^\d+", str(number), name.removeprefix(before))

    parts = {local: replace(info, name=renumbered_name(info.name)) for local, info in weight.parts.items()}
    return replace(weight, module=renumbered_name(weight.module), parts=parts)


def _replicated_config(config: Mapping[str, Any], order: Sequence[int], layer_count: int) -> dict[str, Any]:
    """The config with the new number of layers; lists with an entry per layer (``layer_types``) are repeated alike."""
    # "layers.3.mlp" in a skip list would mean another layer after the replication.
    for name in _texts_inside(config.get("quantization_config")):
        if re.search(r"\.\d+(\.|$)", name):
            raise CheckpointError(
                f"the adapter replicates layers, but config.json's quantization_config names single ones ({name}): "
                f"use the 16-bit model as base"
            )
    count_key = next((key for key in LAYER_COUNT_KEYS if config.get(key) == layer_count), None)
    if count_key is None:
        raise CheckpointError(
            f"the adapter replicates layers, but config.json does not say that the base has {layer_count}"
        )
    # Known by their length: layer_types, and lists like it of single architectures.
    result = dict(config)
    for key, value in {**config, **_default_layer_types(config)}.items():
        if isinstance(value, list) and "layer" in key and len(value) == layer_count:
            result[key] = [value[old_number] for old_number in order]
    result[count_key] = len(order)
    return result


def _default_layer_types(config: Mapping[str, Any]) -> dict[str, Any]:
    """``layer_types`` of the architecture's config class, which derives them where config.json leaves them out."""
    from transformers import AutoConfig

    try:
        plain = {name: value for name, value in config.items() if name not in ("quantization_config", "auto_map")}
        layer_types = getattr(AutoConfig.for_model(**plain), "layer_types", None)
    except Exception:  # transformers does not know the architecture
        return {}
    return {"layer_types": list(layer_types)} if layer_types else {}


def _texts_inside(value: Any) -> list[str]:
    """All keys and texts of nested dicts and lists: names and patterns of modules are among them."""
    if isinstance(value, str):
        return [value]
    texts: list[str] = []
    if isinstance(value, dict):
        for key, inner in value.items():
            texts += [str(key), *_texts_inside(inner)]
    elif isinstance(value, list | tuple):
        for inner in value:
            texts += _texts_inside(inner)
    return texts
