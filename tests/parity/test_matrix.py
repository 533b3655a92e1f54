"""Every base format into every target: the stock loader computes with the base plus the delta, within rounding.

Bases are written by their own libraries (``bases``), the delta is peft's, the reference is a float32 model of both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qmerge.errors import CheckpointError, RecipeError
from qmerge.formats import all_formats, all_targets, get_target

from .. import models
from . import bases, stock

# Format → the kind of ``bases`` that has it; None for those that bitsandbytes and plain saving make.
BASES = {
    "bf16": None, "nf4": None, "fp4": None, "int8": None, "gptq": "gptq-act-order-asym", "awq": "awq", "fp8": "fp8",
    "w4a16": "ct-int4-asym", "w8a16": "ct-int8", "w8a8": "ct-int8-w8a8", "nvfp4": "ct-nvfp4", "mxfp4a16": "ct-mxfp4",
    "mxfp4": "mxfp4", "hqq": "hqq", "mlx": "mlx", "mlx_mxfp4": "mlx-mxfp4", "mlx_nvfp4": "mlx-nvfp4", "torchao": "torchao-int8",
}  # fmt: skip

# Target → relative error of nearest rounding on a Gaussian weight, rounded up (``qmerge plan`` predicts the same). For dense
# targets it is the unit roundoff, and for float32 the effect of sums in another order.
ERRORS = {
    "nf4": 0.10, "fp4": 0.15, "gptq": 0.12, "awq": 0.11, "mlx": 0.11, "mlx_mxfp4": 0.15, "mlx_nvfp4": 0.15,
    "w4a16": 0.12, "nvfp4": 0.11, "mxfp4a16": 0.15, "mxfp4": 0.15, "fp8": 0.03,
    "int8": 0.012, "w8a8": 0.012, "w8a16": 0.012, "bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-18,
}  # fmt: skip

# Matrices that a token passes through: seven linear layers, twice, and the head.
DEPTH = 15

UNREADABLE = {("mxfp4", "fp8"): "transformers' FP8 loader takes no blocks that end in the middle (64 inputs)"}

# gpt-oss' stacks of experts, and the format that stores nothing else.
NO_STACKS = "is a stack of experts, which mlx_lm arranges otherwise"
REFUSED = {("mxfp4", target): NO_STACKS for target in ("mlx", "mlx_mxfp4", "mlx_nvfp4")}
REFUSED |= {(name, "mxfp4"): "expected gpt-oss' experts" for name in BASES if name != "mxfp4"}

Made = Callable[[str], Path]


def test_every_format_is_there() -> None:
    formats = all_formats()
    # GGUF files are not folders: tests/gguf/test_targets.py.
    assert set(ERRORS) == set(all_targets()) - {"gguf"}
    assert set(BASES) == set(formats) - {"raw", "fp16", "fp32", "gguf"}, "fp16 and fp32 are read as bf16 is"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("matrix")

    @cache
    def make(name: str) -> Path:
        if (kind := BASES[name]) is not None:
            pytest.importorskip(bases.needs(kind))
            # Every expert sees every token: with fewer, the smallest error may send a token elsewhere.
            return bases.make(kind, folder / name, **({"num_experts_per_tok": 4} if name == "mxfp4" else {}))
        dense = folder / "bf16"
        if not dense.exists():
            models.save(models.llama(**bases.LLAMA), dense)
        config = stock.BASES[name]
        return models.quantize(dense, folder / name, **config) if config else dense

    return make


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """About half as large as the weights, or more where it is on attention only: without it, every target is far off."""
    folder = tmp_path_factory.mktemp("matrix")

    @cache
    def make(oss: bool) -> Path:
        model = bases.gpt_oss() if oss else models.llama(torch.float32, **bases.LLAMA)
        modules = ["q_proj", "k_proj", "v_proj", "o_proj"] if oss else models.LINEAR
        size = 0.06 if oss else 0.015
        return models.adapter(model.float(), folder / str(oss), size=size, target_modules=modules)

    return make


# gpt2: Conv1D, which most loaders do not replace. qwen2: biases and tied embeddings.
OTHERS = {"gpt2": ["c_attn", "c_proj", "c_fc"], "qwen2": models.LINEAR}


def other(name: str) -> torch.nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    if name == "gpt2":
        return models.gpt2()
    sizes = {**models.LLAMA, "hidden_size": 128, "intermediate_size": 256, "tie_word_embeddings": True}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes)).eval()
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.02)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("target", ERRORS)
@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(tmp_path: Path, name: str, target: str) -> None:
    """Dense float32 bases: refused before anything is written, or taken by the stock loader with the stored values."""
    skip_without_mlx(target)
    model = other(name)
    base = models.save(model, tmp_path / "base")
    lora = models.adapter(model, tmp_path / "lora", target_modules=OTHERS[name], fan_in_fan_out=name == "gpt2")
    target_info = get_target(target).info
    if target_info.takes_stacks:
        with pytest.raises(CheckpointError, match="expected gpt-oss' experts"):
            stock.merged(tmp_path / "out", base, lora, target)
        return
    if name == "gpt2" and target_info.is_quantized and not target_info.takes_conv1d:
        with pytest.raises(RecipeError, match="is a Conv1D, which no loader of"):
            stock.merged(tmp_path / "out", base, lora, target)
        assert not (tmp_path / "out").exists()
        return
    out = stock.merged(tmp_path / "out", base, lora, target)
    if (name, target) == ("gpt2", "gptq"):
        return  # transformers cannot build it (gptqmodel can)
    stored = logits_of(out, values_of(out))
    assert stock.distance(loaded_logits(out), stored) < (0.03 if target == "int8" else 0.01)


def skip_without_mlx(target: str) -> None:
    """mlx is not made for every system that the other libraries are made for."""
    if target.startswith("mlx"):
        pytest.importorskip("mlx_lm")


def has_other_library(folder: Path) -> bool:
    """Whether another library than bitsandbytes has quantized the model."""
    return bases.quantization_config(folder).get("quant_method") not in (None, "bitsandbytes")


def values_of(folder: Path) -> dict[str, Tensor]:
    """float32 values of all weights, by the library that the folder's format belongs to."""
    return bases.values(folder) if has_other_library(folder) else stock.values(folder)


def loaded_logits(folder: Path) -> Tensor:
    """Logits of the model as its stock loader loads it, which finds all tensors, and no others."""
    if has_other_library(folder):
        model, info = bases.loads(folder)
    else:
        model, info = stock.loaded(folder)
        model = stock.in_float32(model)
    assert not any(info.values()), info
    return models.logits(model)


def logits_of(folder: Path, values: dict[str, Tensor]) -> Tensor:
    return models.logits(stock.float_model(folder, like=values))


@pytest.fixture(scope="module")
def reference(base: Made, adapter: Callable[[bool], Path]) -> Callable[[str], tuple[Tensor, Tensor]]:
    """Logits of base and delta unmerged, and of the base alone, in float32."""

    @cache
    def make(name: str) -> tuple[Tensor, Tensor]:
        values = values_of(base(name))
        model = stock.float_model(base(name), like=values)
        alone = models.logits(model)
        return models.logits(stock.adapted(model, adapter(name == "mxfp4"))), alone

    return make


@pytest.mark.slow
@pytest.mark.parametrize("target", ERRORS)
@pytest.mark.parametrize("name", BASES)
def test_base_into_target(
    base: Made, adapter: Callable[[bool], Path], reference: Callable[[str], tuple[Tensor, Tensor]], tmp_path: Path,
    name: str, target: str,
) -> None:  # fmt: skip
    """Errors of the matrices are independent, so they add up as squares. The bound is half as much again. The control is the
    base without the adapter."""
    skip_without_mlx(target)
    folder = base(name)
    if (name, target) in REFUSED:
        with pytest.raises((RecipeError, CheckpointError), match=REFUSED[name, target]):
            stock.merged(tmp_path / "out", folder, adapter(name == "mxfp4"), target, scales="fresh")
        return
    out = stock.merged(tmp_path / "out", folder, adapter(name == "mxfp4"), target, scales="fresh")
    expected, alone = reference(name)
    bound = 1.5 * DEPTH**0.5 * ERRORS[target]
    stored = logits_of(out, values_of(out))
    assert stock.distance(stored, expected) < bound < stock.distance(alone, expected)
    if (name, target) in UNREADABLE:
        return
    # LLM.int8() quantizes activations too.
    tolerance = ERRORS["w8a8"] if target == "int8" else 0.01
    assert stock.distance(loaded_logits(out), stored) < tolerance
