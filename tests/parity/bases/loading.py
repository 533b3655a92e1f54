"""The stock loader on a folder of any kind, computing in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from . import mlx, torchao
from .folder import quantization_config
from .kinds import KINDS

# Kinds that transformers loads and runs on a CPU.
LOADABLE = set(KINDS) - {
    "fp8-odd",  # transformers infers blocks from the shapes: 320 rows in 3 blocks are an error, 192 in 2 are silently wrong
    "fbgemm-fp8",  # asks for a GPU
    "hqq", "hqq-axis0", "hqq-2bit", "hqq-3bit", "hqq-8bit",  # transformers 5.23 ignores W_q and starts at random weights
}  # fmt: skip

# Kinds whose logits, as loaded here, are those of a float32 model with the oracle's values; those of the rest within 1 %.
EXACT = LOADABLE - {
    "awq", "awq-g32",  # gptqmodel computes in float16
    "ct-int4-asym", "ct-int4-asym-g32", "ct-nvfp4",  # dequantized on loading, to bfloat16
}  # fmt: skip


def loads(folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The stock loader's model, computing in float32, and its lists of missing and unexpected tensors."""
    if quantization_config(folder).get("quant_method") == "mlx":
        return cast(PreTrainedModel, mlx.MlxModel(folder)), {}  # it raises where a tensor is missing or left over
    options = _options(quantization_config(folder))
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, device_map="cpu", **options
    )
    for layer in model.modules():
        _to_float32(layer)
    return model.eval(), info


def _options(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the loader in addition to config.json. (A quantization_config of None makes it ignore the file's.)"""
    import transformers

    method = config["quant_method"]
    # gptqmodel's own choice of a kernel for 4 bits rounds to bfloat16, and takes few group sizes.
    if method == "gptq":
        return {"quantization_config": transformers.GPTQConfig(bits=config["bits"], backend="gptq_torch")}
    if method == "awq":
        return {"quantization_config": transformers.AwqConfig(backend="torch_awq")}
    if method == "compressed-tensors":
        weights = config["config_groups"]["group_0"]["weights"]
        is_fp4 = weights["type"] == "float" and weights["num_bits"] == 4
        # compressed-tensors 0.20 expects zero points that are not packed, and computes with FP4 in bfloat16 only.
        if not weights["symmetric"] or is_fp4:
            return {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    return {}


def _to_float32(layer: nn.Module) -> None:
    """Remove all rounding but that of the weights: 16-bit scales and parameters, and quantized activations."""
    if hasattr(layer, "qweight"):
        layer.scales = layer.scales.float()
    if hasattr(layer, "quantization_scheme"):
        layer.quantization_enabled = False  # type: ignore[assignment]
    for name, parameter in layer.named_parameters(recurse=False):
        if type(parameter.data) is not Tensor:
            setattr(layer, name, nn.Parameter(torchao.dequantized(parameter.data), requires_grad=False))
        elif parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
