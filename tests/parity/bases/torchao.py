# mypy: disable-error-code="import-untyped"
"""torchao, flattened for safetensors as transformers does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .layers import Tensors, Written


def write(model: PreTrainedModel, config: str, group_size: int | None = None) -> Written:
    """The model as transformers saves it; ``config`` is the name of torchao's class."""
    import torchao.quantization as ao
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from transformers import TorchAoConfig

    args: dict[str, Any] = {}
    if group_size:
        args["granularity"] = ao.PerGroup(group_size)
    if config == "IntxWeightOnlyConfig":
        args["weight_dtype"] = torch.int4  # type: ignore[attr-defined]
    settings = getattr(ao, config)(**args)
    ao.quantize_(model, settings, lambda layer, name: isinstance(layer, nn.Linear) and name != "lm_head")
    state, metadata = flatten_tensor_state_dict(model.state_dict())
    return Written(state, TorchAoConfig(settings, modules_to_not_convert=["lm_head"]).to_dict(), metadata)


def read(tensors: Tensors, config: dict[str, Any], metadata: dict[str, str]) -> dict[str, Tensor]:
    """``(code - zero) * scale``, by the tensors' own ``dequantize``, with scale and result in float32."""
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    restored, left_over = unflatten_tensor_state_dict(tensors, metadata)
    assert not left_over, sorted(left_over)
    return {name: dequantized(tensor) for name, tensor in restored.items() if type(tensor) is not Tensor}


def dequantized(tensor: Any) -> Tensor:
    """float32 values of one of torchao's tensors."""
    # Intx takes its dtype from the scales, the others as an argument.
    if type(tensor).__name__.startswith("Intx"):
        values: Tensor = tensor.to(torch.float32).dequantize()
    else:
        values = tensor.dequantize(torch.float32)
    return values
