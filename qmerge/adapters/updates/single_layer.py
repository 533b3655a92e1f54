"""One layer of an adapter by itself: its rank, its bias, and its share of what the layers of an adapter have together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qmerge.adapters.updates.peft_layer import PeftLayerUpdate
from qmerge.adapters.updates.shapes import Parts
from qmerge.errors import AdapterError


def bias_update(update: PeftLayerUpdate) -> PeftLayerUpdate:
    """The update of a layer's bias, from that of its weight.

    Raises:
        AdapterError: it depends on the weight.
    """
    C = next((part for part in update.tensors if part.startswith("glora_C.")), None)
    # The merged bias is b + W C + D b + E (arXiv 2306.07967): without C it follows from b alone.
    if C not in (None, "glora_C.zeros"):
        raise AdapterError(
            f"{update.module} has {C}: GLoRA adds weight · C to the bias, and qmerge merges one tensor at a time. Train with "
            f"config_C='none', or merge with peft into the 16-bit base, then quantize"
        )
    inputs = update.tensors[C].shape[0] if C else 1
    return replace(update, part="bias", shape=(1, update.shape[0]), inputs=inputs)


def rank_of(parts: Parts, config: Mapping[str, Any]) -> int:
    """The rank, for reports; 1 for types without a rank."""
    # AdaLoRA's r is the largest rank; lora_E has one entry per rank that was left.
    rank = parts["lora_E"].shape[0] if "lora_E" in parts else config.get("r")
    return rank if isinstance(rank, int) and rank > 0 else 1


def module_pattern(module: str, pattern: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The entries of AdaLoRA's ``rank_pattern`` for one module; None if there are none.

    Its keys are the full names of parameters, and peft looks up every one of them in the model.
    """
    entries: dict[str, Any] = {}
    for name, ranks in (pattern or {}).items():
        if f".{module}.lora_" in f".{name}":
            entries[name] = ranks
    return entries or None


def own_vector(module: str, P_URR: Tensor, shared: Parts, *, seed: int, layers: int) -> dict[str, Tensor]:
    """The trained vector of one layer of TinyLoRA, as the first and only one.

    Layers share vectors by their index among the targeted layers, which is not saved. But the projection is saved, and it was
    drawn with a seed that is ``seed`` plus the index (peft 0.21, tinylora/model.py and layer.py).

    Args:
        P_URR: float32, the layer's projection.
        shared: the adapter's tensors above all modules.
        seed: ``projection_seed``.
        layers: number of layers in the adapter.

    Raises:
        AdapterError: no index gives this projection.
    """
    vectors = [name for name in shared if name.startswith("tinylora_v.")]
    if len(vectors) == 1:
        return {"tinylora_v.0": shared[vectors[0]]}
    std = P_URR.shape[1] ** -0.5
    for index in range(layers):
        generator = torch.Generator().manual_seed(seed + index)
        drawn_URR = torch.normal(0.0, std, tuple(P_URR.shape), generator=generator)
        if torch.allclose(drawn_URR, P_URR, rtol=2**-7, atol=2**-7):  # it may have been saved in half precision
            layers_per_vector = max(1, layers // len(vectors))
            group = min(index // layers_per_vector, len(vectors) - 1)
            return {"tinylora_v.0": shared[f"tinylora_v.{group}"]}
    raise AdapterError(
        f"{module}: the adapter has {len(vectors)} vectors tinylora_v, and the projection of this layer is that of none of "
        f"{layers} layers, so its vector is unknown; merge it with peft into the 16-bit base, then quantize"
    )
