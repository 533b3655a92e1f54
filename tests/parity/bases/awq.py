# mypy: disable-error-code="import-untyped"
"""AWQ, packed by gptqmodel, with the config that AutoAWQ writes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .layers import Tensors, Written, float_copy, pack_linear_layers, quantized_modules


def write(model: PreTrainedModel, group_size: int) -> Written:
    """The model as AutoAWQ saves it."""
    config = {
        "bits": 4,
        "group_size": group_size,
        "modules_to_not_convert": None,
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }
    return Written(pack_linear_layers(model, lambda layer: _pack(layer, group_size)), config)


def read(tensors: Tensors, config: dict[str, Any], metadata: dict[str, str]) -> dict[str, Tensor]:
    """``(code - zero) * scale``, by ``dequantize_gemm``."""
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    result = {}
    for name, parts in quantized_modules(tensors, "qweight"):
        scales = parts["scales"].float()
        weight_IO = dequantize_gemm(
            parts["qweight"], parts["qzeros"], scales, bits=config["bits"], group_size=config["group_size"]
        )
        result[name] = weight_IO.T.contiguous()
    return result


def _pack(layer: nn.Linear, group_size: int) -> Tensors:
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    rows, columns = layer.weight.shape
    groups_OGN = layer.weight.float().view(rows, -1, group_size)
    low_OG1 = groups_OGN.amin(-1, keepdim=True)
    high_OG1 = groups_OGN.amax(-1, keepdim=True)
    scales_OG1 = (high_OG1 - low_OG1).clamp(min=1e-5) / 15
    zeros_OG1 = (-(low_OG1 / scales_OG1).round()).clamp(0, 15)
    # pack() does not clamp: the values must be on the grid already.
    codes_OGN = (groups_OGN / scales_OG1 + zeros_OG1).round().clamp(0, 15)
    linear = float_copy(layer)
    linear.weight.data = ((codes_OGN - zeros_OG1) * scales_OG1).view(rows, columns)
    module = AwqTorchLinear(
        bits=4,
        group_size=group_size,
        sym=False,
        desc_act=False,
        in_features=columns,
        out_features=rows,
        bias=layer.bias is not None,
        register_buffers=True,
    )
    module.pack(linear, scales_OG1.squeeze(-1), zeros_OG1.squeeze(-1))
    return dict(module.state_dict())
