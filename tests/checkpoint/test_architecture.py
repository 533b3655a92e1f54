"""What qmerge asks transformers about an architecture, against what transformers' own loaders do with it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from transformers import (
    BambaForCausalLM,
    BitsAndBytesConfig,
    DeepseekV4ForCausalLM,
    Gemma3nForCausalLM,
    ResNetForImageClassification,
    Wav2Vec2ForCTC,
)

from qmerge.checkpoint.architecture import embedding_weights, meta_model, module_kinds

from ..parity import stock
from ..walk.inputs import inputs_of, outputs_of
from ..walk.sizes import tiny_config
from ..walk.walk import OUTPUT_BOUND, largest_distance


def config_on_disk(model: Any, folder: Path) -> dict[str, Any]:
    model.save_pretrained(folder)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def test_infinities_in_a_config_are_numbers(tmp_path: Path) -> None:
    """transformers saves them as {"__float__": "Infinity"}, and does not take them so."""
    config = config_on_disk(BambaForCausalLM(tiny_config("bamba")), tmp_path)
    assert config["time_step_limit"][1] == {"__float__": "Infinity"}
    assert meta_model(config).config.time_step_limit[1] == float("inf")
    assert module_kinds(config, None).quantizable


def test_a_tied_model_is_quantized_as_transformers_loads_it(tmp_path: Path) -> None:
    """Its last layer before the tied head, too: loaders choose before they tie."""
    config = config_on_disk(Gemma3nForCausalLM(tiny_config("gemma3n_text")), tmp_path)
    assert config["tie_word_embeddings"] is True
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    loaded = Gemma3nForCausalLM.from_pretrained(tmp_path, quantization_config=settings, device_map="cpu")
    quantized = {name for name, module in loaded.named_modules() if isinstance(module, Linear4bit)}
    assert "model.altup_unembed_projections.2" in quantized
    assert module_kinds(config, None).quantizable == quantized


def test_what_stays_dense_by_a_pattern_has_its_name(tmp_path: Path) -> None:
    """transformers keeps "compressor.kv_proj" of DeepSeek V4 in float32; compressed-tensors takes whole names only."""
    config = config_on_disk(DeepseekV4ForCausalLM(tiny_config("deepseek_v4")), tmp_path)
    kinds = module_kinds(config, None)
    assert "model.layers.0.self_attn.compressor.kv_proj" in kinds.skipped
    assert "model.layers.0.self_attn.kv_proj" in kinds.quantizable
    linear = {name for name, layer in meta_model(config).named_modules() if isinstance(layer, torch.nn.Linear)}
    assert "model.layers.0.self_attn.o_a_proj" in kinds.skipped, "a class of its own"
    assert linear == kinds.quantizable | (linear & set(kinds.skipped)), "each of them is named, or quantized"
    assert not kinds.quantizable & set(kinds.skipped)


@pytest.mark.parametrize(
    ("model_type", "kind", "layers", "saved"),
    [
        ("resnet", ResNetForImageClassification, r".*shortcut\.convolution", "classifier"),
        ("wav2vec2", Wav2Vec2ForCTC, r".*(k|v)_proj", "lm_head"),
    ],
)
def test_models_without_embeddings_take_modules_to_save(
    tmp_path: Path, model_type: str, kind: Any, layers: str, saved: str
) -> None:
    torch.manual_seed(0)
    model = kind(tiny_config(model_type)).eval()
    assert embedding_weights(config_on_disk(model, tmp_path / "base")) is None
    inputs = inputs_of(model)
    alone = outputs_of(model, inputs)
    settings = LoraConfig(r=4, target_modules=layers, modules_to_save=[saved])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, settings, autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = outputs_of(wrapped, inputs)
    out = stock.merged(tmp_path / "out", tmp_path / "base", tmp_path / "adapter", "fp32")
    merged = kind.from_pretrained(out, dtype=torch.float32).eval()
    assert largest_distance(outputs_of(merged, inputs), expected) < OUTPUT_BOUND
    assert largest_distance(alone, expected) > 1e-3, "the control"
