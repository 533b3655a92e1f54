# mypy: disable-error-code="import-untyped"
"""GPTQ, by auto-gptq 0.7.1 (archived in 2025)."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .layers import Tensors


def auto_gptq() -> ModuleType | None:
    """auto-gptq, or None if it is not installed."""
    from qmerge.evaluation import loaders

    if importlib.util.find_spec("auto_gptq") is None:
        return None
    return loaders.import_auto_gptq()


def auto_gptq_packed(
    weight_OI: Tensor, *, scales_OG: Tensor, zeros_OG: Tensor, g_idx: Tensor | None, bits: int, group_size: int
) -> Tensors:
    """The tensors of one weight as auto-gptq packs them.

    Args:
        weight_OI: values on the grid.
        zeros_OG: from 1 on (auto-gptq corrupts words at 0).
        g_idx: None for the class for sequential groups, otherwise the one for act-order. auto-gptq chooses alike.
    """
    rows, columns = weight_OI.shape
    module = _quant_linear(bits, group_size, columns, rows, sequential=g_idx is None)
    linear = nn.Linear(columns, rows, bias=False, dtype=torch.float16)
    linear.weight.data = weight_OI.half()
    module.pack(linear, scales_OG.clone(), zeros_OG.clone(), g_idx)  # clones: it subtracts 1 in place
    return {name: tensor.contiguous() for name, tensor in module.state_dict().items()}


def auto_gptq_product(parts: Tensors, bits: int, group_size: int, x: Tensor) -> Tensor:
    """x · Wᵀ by auto-gptq's forward pass, with float32 scales; x is float32 [N, I]."""
    columns = len(parts["g_idx"])
    rows = parts["scales"].shape[1]
    size = columns if group_size == -1 else group_size
    sequential = torch.equal(parts["g_idx"].long(), torch.arange(columns) // size)
    module = _quant_linear(bits, group_size, columns, rows, sequential=sequential)
    module.load_state_dict(parts)
    module.scales = parts["scales"].float()
    with torch.no_grad():
        product: Tensor = module(x)
    return product


def _quant_linear(bits: int, group_size: int, columns: int, rows: int, *, sequential: bool) -> Any:
    assert auto_gptq() is not None, "auto-gptq 0.7.1 is not installed"
    file = "qlinear_cuda_old" if sequential else "qlinear_cuda"
    layer_class = importlib.import_module(f"auto_gptq.nn_modules.qlinear.{file}").QuantLinear
    return layer_class(bits, group_size, columns, rows, bias=False)
