"""What the stock libraries make of a folder: the values, the deltas and the logits that qmerge's results are held against."""

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

BASES = {
    "bf16": None,
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}  # fmt: skip
"""Name of a kind of base → arguments of BitsAndBytesConfig."""


def merged(out: Path, base: Path, adapter: Path, target: str, **more: Any) -> Path:
    """qmerge's result, in float32 on the CPU."""
    settings = {"base": str(base), "adapter": str(adapter), "target": target, "out": str(out), "device": "cpu"}
    settings["rounding"] = "nearest"
    merge(make_recipe({**settings, **more}))
    return out


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of every file."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def values(folder: Path) -> dict[str, Tensor]:
    """Weight name → float32 values, by bitsandbytes where they are quantized."""
    found, result = tensors(folder), {}
    for name, tensor in found.items():
        module, _, local = name.rpartition(".")
        if f"{module}.SCB" in found and local == "weight":
            result[name] = bnb.int8_vectorwise_dequant(tensor, found[f"{module}.SCB"])
        elif f"{name}.absmax" in found:
            result[name] = dequantized(name, found)
        elif tensor.is_floating_point() and not is_scale(name, found):
            result[name] = tensor.float()
    return result


def dequantized(name: str, found: dict[str, Tensor]) -> Tensor:
    parts = {other.removeprefix(f"{name}."): part for other, part in found.items() if other.startswith(f"{name}.")}
    state = bnb.QuantState.from_dict(parts, torch.device("cpu"))
    state.dtype = torch.float32
    return bnb.dequantize_4bit(found[name], state).reshape(state.shape)


def is_scale(name: str, found: dict[str, Tensor]) -> bool:
    return name.endswith(".SCB") or any(
        name.endswith(f".{part}") for part in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
    )


def quantized_names(folder: Path) -> set[str]:
    """Names of the weights that are quantized."""
    found = tensors(folder)
    return {name for name in found if f"{name}.absmax" in found or f"{name.removesuffix('weight')}SCB" in found} - {
        name for name in found if is_scale(name, found)
    }


def adapted(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """A float32 model with the adapter beside it, unmerged."""
    return PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).eval()


def deltas(model: PreTrainedModel, adapter: Path) -> dict[str, Tensor]:
    """Weight name → what peft adds to it, float32, with peft's own scaling."""
    wrapped = adapted(model, adapter)
    layers = {name: layer for name, layer in wrapped.base_model.model.named_modules() if isinstance(layer, LoraLayer)}
    found = {f"{name}.weight": layer.get_delta_weight("default").detach().clone() for name, layer in layers.items()}
    wrapped.unload()
    return found


def float_model(folder: Path, like: dict[str, Tensor] | None = None) -> PreTrainedModel:
    """A float32 model that carries exactly the values of a folder, whatever they are stored as."""
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    found = like or values(folder)
    transposed = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, Conv1D)}
    quantized = quantized_names(folder)
    state = {name: value.T if name in transposed & quantized else value for name, value in found.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model


def loaded(folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """As a user loads it, and what transformers says about missing and unexpected tensors."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, device_map="cpu"
    )  # fmt: skip


def in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """The same stored weights, computed with in float32: a loader's choice of compute dtype is not under test."""
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.compute_dtype = layer.weight.quant_state.dtype = torch.float32
            layer.compute_type_is_set = True
        for name, parameter in layer.named_parameters(recurse=False):
            if not (isinstance(layer, Linear4bit | Linear8bitLt) and name == "weight"):
                parameter.data = parameter.data.float()
    return model.eval()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """float32 values of every linear layer of a loaded model, as its own forward pass will see them."""
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
    """Names of tensors that are not the same in dtype, shape and every bit; missing ones too."""
    from .bnb import same

    return sorted(
        name
        for name in one.keys() | other.keys()
        if name not in one or name not in other or not same(one[name], other[name])
    )


def fresh_adapter(folder: Path, **config: Any) -> Path:
    return models.adapter(models.llama(torch.float32), folder, **config)
