# mypy: disable-error-code="import-untyped"
"""GPTQ, by gptqmodel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .layers import Tensors, Written, float_copy, pack_linear_layers, quantized_modules


def write(
    model: PreTrainedModel,
    bits: int = 4,
    group_size: int = 128,
    sym: bool = True,
    desc_act: bool = False,
    format: str = "gptq",
) -> Written:
    """The model as gptqmodel saves it."""
    from gptqmodel.quantization import QuantizeConfig

    config = QuantizeConfig(
        bits=bits,
        group_size=group_size,
        sym=sym,
        desc_act=desc_act,
        format=format,
        offload_to_disk=False,
        act_group_aware=group_size > 0 and not desc_act,
    )
    return Written(pack_linear_layers(model, lambda layer: _pack(layer, config)), config.to_dict())


def read(tensors: Tensors, config: dict[str, Any], metadata: dict[str, str]) -> dict[str, Tensor]:
    """``scales[g_idx] * (code - zero)``, by ``TorchLinear.dequantize_weight``; the label says which zeros these are."""
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    result = {}
    for name, parts in quantized_modules(tensors, "qweight"):
        module = _torch_linear(config, columns=len(parts["g_idx"]), rows=parts["scales"].shape[1])
        for local in ("qweight", "qzeros", "g_idx"):
            setattr(module, local, parts[local].clone())
        module.scales = parts["scales"].float()
        if config["checkpoint_format"] == "gptq":
            convert_gptq_v1_to_v2_format_module(module, config["bits"], torch.int32)
        result[name] = module.dequantize_weight().T.contiguous()
    return result


def _pack(layer: nn.Linear, config: Any) -> Tensors:
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    scales_OG, zeros_OG, g_idx = _fit_grid(layer.weight.float(), config)
    rows, columns = layer.weight.shape
    module = _torch_linear(config.to_dict(), columns=columns, rows=rows, bias=layer.bias is not None)
    # pack() gives the same, after it has compiled C++ for a minute.
    module.pack_original(float_copy(layer), scales_OG, zeros_OG, g_idx)
    if config.format == "gptq":
        convert_gptq_v2_to_v1_format_module(module, config)
    return {name: tensor for name, tensor in module.state_dict().items() if tensor is not None}


def _fit_grid(weight_OI: Tensor, config: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Scales and zeros [O, G], and the group of every column [I].

    Act-order is a random order here. It depends only on the number of inputs, so layers with the same inputs share it.
    """
    from gptqmodel.quantization.quantizer import Quantizer

    rows, columns = weight_OI.shape
    size = columns if config.group_size == -1 else config.group_size
    order = torch.arange(columns)
    if config.desc_act:
        order = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
    g_idx = torch.empty(columns, dtype=torch.int32)
    g_idx[order] = torch.arange(columns, dtype=torch.int32) // size
    quantizer = Quantizer(config)
    quantizer.configure(perchannel=True)
    quantizer.find_params(weight_OI[:, order].reshape(-1, size), weight=True)
    return quantizer.scale.view(rows, -1), quantizer.zero.view(rows, -1), g_idx


def _torch_linear(config: dict[str, Any], *, columns: int, rows: int, bias: bool = False) -> Any:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    return TorchLinear(
        bits=config["bits"],
        group_size=config["group_size"],
        sym=config["sym"],
        desc_act=config["desc_act"],
        in_features=columns,
        out_features=rows,
        bias=bias,
    )
