"""The references of qmerge's results: values, deltas and logits of a model folder, by the stock libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qmerge.recipe import make_recipe
from qmerge.run import merge

from .. import models

# Name of a kind of base → arguments of BitsAndBytesConfig.
BASES = {
    "bf16": None,
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}  # fmt: skip

SCALES = ("SCB", "absmax", "quant_map", "nested_absmax", "nested_quant_map")


def merged(out: Path, base: Path, adapter: Path, target: str, **more: Any) -> Path:
    """qmerge's output folder, made on the CPU by rounding to nearest."""
    settings = {
        "base": str(base),
        "adapter": str(adapter),
        "target": target,
        "out": str(out),
        "device": "cpu",
        "rounding": "nearest",
    }
    merge(make_recipe({**settings, **more}))
    return out


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of every file."""
    result: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        result.update(load_file(path))
    return result


def values(folder: Path) -> dict[str, Tensor]:
    """Weight name → float32 values, by bitsandbytes where they are quantized."""
    stored = tensors(folder)
    result = {}
    for name, tensor in stored.items():
        module, _, local = name.rpartition(".")
        if f"{module}.SCB" in stored and local == "weight":
            result[name] = bnb.int8_vectorwise_dequant(tensor, stored[f"{module}.SCB"])
        elif f"{name}.absmax" in stored:
            result[name] = dequantized(name, stored)
        elif tensor.is_floating_point() and not is_scale(name):
            result[name] = tensor.float()
    return result


def dequantized(name: str, stored: dict[str, Tensor]) -> Tensor:
    """float32 values of a 4-bit weight, by bitsandbytes."""
    prefix = f"{name}."
    parts = {other.removeprefix(prefix): part for other, part in stored.items() if other.startswith(prefix)}
    state = bnb.QuantState.from_dict(parts, torch.device("cpu"))
    state.dtype = torch.float32
    return bnb.dequantize_4bit(stored[name], state).reshape(state.shape)


def is_scale(name: str) -> bool:
    """Whether a tensor is a part of a quantized weight other than its codes."""
    return name.rpartition(".")[2] in SCALES


def quantized_names(folder: Path) -> set[str]:
    """Names of the weights that are quantized."""
    stored = tensors(folder)
    names = set()
    for name in stored:
        has_scale = f"{name}.absmax" in stored or f"{name.removesuffix('weight')}SCB" in stored
        if has_scale and not is_scale(name):
            names.add(name)
    return names


def adapted(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """A float32 model with an unmerged adapter."""
    return PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).eval()


def deltas(model: PreTrainedModel, adapter: Path) -> dict[str, Tensor]:
    """Weight name → its delta by peft, float32, with peft's own scaling."""
    wrapped = adapted(model, adapter)
    result = {}
    for name, layer in wrapped.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            result[f"{name}.weight"] = layer.get_delta_weight("default").detach().clone()
    wrapped.unload()
    return result


def float_model(folder: Path, like: dict[str, Tensor] | None = None) -> PreTrainedModel:
    """A float32 model with exactly the values of a folder, in whatever format they are stored.

    Args:
        like: the values, if another library than bitsandbytes reads them.
    """
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = dict(like or values(folder))
    conv1d = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, Conv1D)}
    for name in conv1d & quantized_names(folder):
        state[name] = state[name].T  # quantized as [O, I]
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model


def loaded(folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model as a user loads it, and transformers' lists of missing and unexpected tensors."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, device_map="cpu")


def in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, computing in float32: a loader's choice of compute dtype is not tested here."""
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.compute_dtype = layer.weight.quant_state.dtype = torch.float32
            layer.compute_type_is_set = True
        for name, parameter in layer.named_parameters(recurse=False):
            if not (isinstance(layer, Linear4bit | Linear8bitLt) and name == "weight"):
                parameter.data = parameter.data.float()
    return model.eval()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """float32 values of every linear layer of a loaded model, as its own forward pass uses them."""
    result = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            layer.weight.quant_state.dtype = torch.float32
            state = layer.weight.quant_state
            result[f"{name}.weight"] = bnb.dequantize_4bit(layer.weight.data, state).reshape(state.shape)
        elif isinstance(layer, Linear8bitLt):
            scb = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
            result[f"{name}.weight"] = bnb.int8_vectorwise_dequant(layer.weight.data, scb)
        elif isinstance(layer, nn.Linear | Conv1D):
            result[f"{name}.weight"] = layer.weight.detach().float()
    return result


def distance(one: Tensor, other: Tensor) -> float:
    """‖one − other‖ / ‖other‖."""
    return float((one - other).norm() / other.norm())


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of tensors that differ in dtype, shape or a bit, or are missing from one side."""
    from .bnb import same

    unpaired = one.keys() ^ other.keys()
    changed = {name for name in one.keys() & other.keys() if not same(one[name], other[name])}
    return sorted(unpaired | changed)


def fresh_adapter(folder: Path, **config: Any) -> Path:
    """An adapter of a small Llama; ``config`` is that of peft."""
    return models.adapter(models.llama(torch.float32), folder, **config)
