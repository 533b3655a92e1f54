"""FP8 in blocks (DeepSeek, Qwen) and per tensor, by transformers; per row, for fbgemm's kernels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .layers import Tensors, Written, bias_of, pack_linear_layers, pad_to_blocks, quantized_modules


def write(
    model: PreTrainedModel, block: tuple[int, int] | None = (128, 128), scale_fmt: str = "float"
) -> Written:  # fmt: skip
    """The model as transformers saves it; ``block`` None is one scale per tensor."""
    from transformers import FineGrainedFP8Config

    settings = FineGrainedFP8Config(
        activation_scheme="dynamic" if block else "static", weight_block_size=block, scale_fmt=scale_fmt
    )
    config = settings.to_dict()
    return Written(pack_linear_layers(model, lambda layer: pack(layer, config)), {**config, "fmt": "e4m3"})


def pack(layer: nn.Linear, config: dict[str, Any]) -> Tensors:
    """The tensors of one layer."""
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    rows, columns = layer.weight.shape
    block = config["weight_block_size"] or (rows, columns)
    quantize = Fp8Quantize(SimpleNamespace(quantization_config=SimpleNamespace(**config)))
    # transformers leaves weights with short blocks unquantized; DeepSeek's own converter quantizes them like this.
    parts: Tensors = quantize._quantize_one("weight", pad_to_blocks(layer.weight, block))
    parts["weight"] = parts["weight"][:rows, :columns]
    if config["weight_block_size"] is None:
        parts["weight_scale_inv"] = parts["weight_scale_inv"].reshape(())
        parts["activation_scale"] = torch.tensor(0.05)
    return {**parts, **bias_of(layer)}


def read(tensors: Tensors, config: dict[str, Any], metadata: dict[str, str]) -> dict[str, Tensor]:
    """``code * scale``, by the dequantization of the backward pass. That of the loader infers blocks from the shapes."""
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    result = {}
    for name, parts in quantized_modules(tensors, "weight_scale_inv"):
        codes, scales = parts["weight"], parts["weight_scale_inv"]
        result[name] = _dequantize_fp8_weight(codes, scales, config["weight_block_size"], torch.float32)
    return result


def write_fbgemm(model: PreTrainedModel) -> Written:
    """The model as transformers saves it for fbgemm."""
    from transformers import FbgemmFp8Config

    config = FbgemmFp8Config(modules_to_not_convert=["lm_head"]).to_dict()
    return Written(pack_linear_layers(model, _pack_rows), config)


def _pack_rows(layer: nn.Linear) -> Tensors:
    # fbgemm itself needs a GPU; transformers has the same quantization in torch.
    from transformers.integrations.compressed_tensors import quantize_fp8_per_row

    codes, scales = quantize_fp8_per_row(layer.weight)
    return {"weight": codes, "weight_scale": scales.view(-1, 1), **bias_of(layer)}


def read_fbgemm(tensors: Tensors, config: dict[str, Any], metadata: dict[str, str]) -> dict[str, Tensor]:
    """``code * scale``, as the scales are used in fbgemm's product: no library has a dequantization of its own."""
    result = {}
    for name, parts in quantized_modules(tensors, "weight_scale"):
        result[name] = parts["weight"].float() * parts["weight_scale"].float()
    return result
