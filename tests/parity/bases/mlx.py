# mypy: disable-error-code="import-untyped,import-not-found"
"""MLX: quantized, saved, loaded and run by mlx and mlx_lm on the CPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .layers import Tensors, Written, quantized_modules

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def to_mlx(tensor: Tensor) -> Any:
    """An ``mx.array`` with the same bits. numpy has no bfloat16: it takes the way by float32."""
    import mlx.core as mx

    if tensor.dtype == torch.bfloat16:
        return mx.array(tensor.float().numpy()).astype(mx.bfloat16)
    return mx.array(tensor.numpy())


def from_mlx(array: Any) -> Tensor:
    """The reverse."""
    import mlx.core as mx

    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(array.astype(mx.float32))).bfloat16()
    return torch.from_numpy(np.array(array))


def quantized(weight_OI: Tensor, bits: int = 4, group_size: int = 64, mode: str = "affine") -> Tensors:
    """Local name → tensor, by ``mx.quantize``."""
    import mlx.core as mx

    arrays = mx.quantize(to_mlx(weight_OI), group_size=group_size, bits=bits, mode=mode)
    return {name: from_mlx(array) for name, array in zip(("weight", "scales", "biases"), arrays, strict=False)}


def dequantized(parts: Tensors, bits: int, group_size: int, mode: str = "affine") -> Tensor:
    """float32 values by ``mx.dequantize``. (With 16-bit scales it would round to 16 bits.)"""
    import mlx.core as mx

    scales, biases = to_mlx(parts["scales"]), None
    if mode == "affine":
        scales, biases = scales.astype(mx.float32), to_mlx(parts["biases"]).astype(mx.float32)
    values = mx.dequantize(
        to_mlx(parts["weight"]), scales, biases, group_size=group_size, bits=bits, mode=mode, dtype=mx.float32
    )
    return from_mlx(values)


def write(model: PreTrainedModel, bits: int = 4, group_size: int = 64, mode: str = "affine") -> Written:
    """The model as ``mlx_lm.convert -q`` saves it: linear layers, embeddings and lm_head."""
    state: Tensors = dict(model.state_dict())
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Embedding):
            for local, tensor in quantized(layer.weight, bits, group_size, mode).items():
                state[f"{name}.{local}"] = tensor
    return Written(state, {"group_size": group_size, "bits": bits, "mode": mode})


def read(tensors: Tensors, config: dict[str, Any], metadata: dict[str, str]) -> dict[str, Tensor]:
    """By ``mx.dequantize``, with scales and biases in float32."""
    result = {}
    for name, parts in quantized_modules(tensors, "scales"):
        settings = config.get(name.removesuffix(".weight"), config)
        result[name] = dequantized(parts, settings["bits"], settings["group_size"], settings.get("mode", "affine"))
    return result


class MlxModel:
    """A folder that mlx_lm has loaded, to be called as a model of transformers. It computes in float32."""

    def __init__(self, folder: Path) -> None:
        import mlx.core as mx
        from mlx_lm.utils import load_model

        self.model, self.config = load_model(folder)
        self.model.set_dtype(mx.float32)

    def __call__(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=from_mlx(self.model(to_mlx(input_ids))))
