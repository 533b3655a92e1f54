"""Folders of every kind, and the values that their libraries read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ... import models
from . import awq, compressed, fp8, gptq, hqq, mlx, mxfp4, torchao
from .kinds import KINDS, LLAMA
from .layers import Tensors, Written

# Family → model and settings to a checkpoint.
WRITERS: dict[str, Callable[..., Written]] = {
    "gptq": gptq.write,
    "awq": awq.write,
    "fp8": fp8.write,
    "fbgemm_fp8": fp8.write_fbgemm,
    "mxfp4": mxfp4.write,
    "compressed-tensors": compressed.write,
    "hqq": hqq.write,
    "torchao": torchao.write,
    "mlx": mlx.write,
}

# quant_method → tensors, quantization_config and metadata of a file to values.
READERS: dict[str, Callable[[Tensors, dict[str, Any], dict[str, str]], dict[str, Tensor]]] = {
    "gptq": gptq.read,
    "awq": awq.read,
    "fp8": fp8.read,
    "fbgemm_fp8": fp8.read_fbgemm,
    "mxfp4": mxfp4.read,
    "compressed-tensors": compressed.read,
    "hqq": hqq.read,
    "torchao": torchao.read,
    "mlx": mlx.read,
}


def make(kind: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A complete model folder; ``changes`` are those of the model's config (``attention_bias=True``)."""
    settings = dict(KINDS[kind])
    family = settings.pop("family")
    sizes = {**settings.pop("sizes", LLAMA), **changes}
    model = mxfp4.gpt_oss(seed, **changes) if family == "mxfp4" else models.llama(seed=seed, **sizes)
    if settings.pop("one_sided", False):
        _make_one_sided(model)
    model.save_pretrained(folder)  # for the config and the side files: the weights are written again
    with torch.no_grad():
        written = WRITERS[family](model, **settings)
    contiguous = {name: tensor.contiguous() for name, tensor in written.tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt", **written.metadata})
    models.edit_json(folder / "config.json", quantization_config=written.config)
    if family == "mlx":
        models.edit_json(folder / "config.json", quantization=written.config)
    if family == "gptq":
        (folder / "quantize_config.json").write_text(json.dumps(written.config, indent=2))
    return folder


def _make_one_sided(model: PreTrainedModel) -> None:
    for layer in model.model.layers.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data[::3] = layer.weight.data[::3].abs()
            layer.weight.data[1::3] = -layer.weight.data[1::3].abs()


def oracle(folder: Path) -> dict[str, Tensor]:
    """Weight name → float32 values as the library dequantizes them: [O, I]; experts [E, I, O], as their parameter.

    Everything is computed in float32, also where the library itself would round to 16 bits in the end.
    """
    config = quantization_config(folder)
    tensors, metadata = read_tensors(folder)
    with torch.no_grad():
        return READERS[config["quant_method"]](tensors, config, metadata)


def values(folder: Path) -> dict[str, Tensor]:
    """The oracle's values and those of the tensors that are not quantized: all that a float32 model needs."""
    result = oracle(folder)
    quantized_modules = {name.rpartition(".")[0] for name in result}
    tensors, _ = read_tensors(folder)
    for name, tensor in tensors.items():
        module, _, local = name.rpartition(".")
        if module not in quantized_modules or local.endswith("bias"):
            result[name] = tensor.float()
    return result


def quantization_config(folder: Path) -> dict[str, Any]:
    """That of config.json; empty for a dense model."""
    config = json.loads((folder / "config.json").read_text())
    if "quantization" in config:  # mlx_lm has no quant_method
        return {"quant_method": "mlx", **config["quantization"]}
    return dict(config.get("quantization_config") or {})


def read_tensors(folder: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors and the metadata of a model of one file."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
