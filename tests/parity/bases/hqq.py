# mypy: disable-error-code="import-untyped"
"""HQQ, as transformers 4 saved it: the state dict of every HQQLinear, settings and all, as tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .layers import Tensors, Written, pack_linear_layers, quantized_modules


def write(model: PreTrainedModel, nbits: int = 4, group_size: int = 64, axis: int = 1) -> Written:
    """The model as hqq quantizes it."""
    from hqq.core.quantize import HQQLinear
    from transformers import HqqConfig

    config = HqqConfig(nbits=nbits, group_size=group_size, axis=axis).to_dict()

    def pack(layer: nn.Linear) -> Tensors:
        quantized = HQQLinear(
            layer, config["quant_config"], compute_dtype=layer.weight.dtype, device="cpu", del_orig=False
        )
        return {name: tensor for name, tensor in quantized.state_dict().items() if tensor is not None}

    return Written(pack_linear_layers(model, pack), config)


def read(tensors: Tensors, config: dict[str, Any], metadata: dict[str, str]) -> dict[str, Tensor]:
    """``(code - zero) * scale``, by ``Quantizer.dequantize``, with scales and zeros in float32."""
    from hqq.core.quantize import _META_TYPE, Quantizer
    from hqq.core.utils import decode_safetensor_type

    result = {}
    for name, parts in quantized_modules(tensors, "W_q"):
        meta = {key: decode_safetensor_type(parts[key], kind) for key, kind in _META_TYPE.items() if key in parts}
        meta.update(scale=meta["scale"].float(), zero=meta["zero"].float(), compute_dtype=torch.float32)
        result[name] = Quantizer.dequantize(parts["W_q"], meta)
    return result
