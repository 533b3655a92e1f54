"""Embeddings that the base ties, or says that it ties: the merged model answers as the trained one did.

peft ties what it trains only where an embedding has one of two names, and transformers ties embeddings only where a file does
not hold different values for both.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from qmerge.checkpoint.scan import SINGLE

from .. import models
from . import stock
from .test_models import BOUND

NAMES = {"gpt2": ("c_attn", "wte"), "llama": ("q_proj", "embed_tokens")}
"""Model → (a linear layer, the input embedding); both call the output embedding lm_head."""

OPTIONS: dict[str, dict[str, Any]] = {
    "tokens": {"trainable_token_indices": {"EMBEDDING": [1, 5]}},
    "tokens of the output": {"trainable_token_indices": {"lm_head": [1, 5]}},
    "other tokens of both": {"trainable_token_indices": {"lm_head": [1, 5], "EMBEDDING": [2, 3]}},
    "saved input": {"modules_to_save": ["EMBEDDING"]},
    "saved output": {"modules_to_save": ["lm_head"]},
    "saved both": {"modules_to_save": ["lm_head", "EMBEDDING"]},
    "input": {"target_modules": ["LINEAR", "EMBEDDING"]},
    "output": {"target_modules": ["LINEAR", "lm_head"]},
    "linear layers only": {},
    "tokens, kept tied": {"trainable_token_indices": {"EMBEDDING": [1, 5]}, "ensure_weight_tying": True},
    "saved input, kept tied": {"modules_to_save": ["EMBEDDING"], "ensure_weight_tying": True},
    "saved output, kept tied": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "input, kept tied": {"target_modules": ["LINEAR", "EMBEDDING"], "ensure_weight_tying": True},
    "output, kept tied": {"target_modules": ["LINEAR", "lm_head"], "ensure_weight_tying": True},
    "input by pattern, kept tied": {"target_modules": "(.*\\.)?(LINEAR|EMBEDDING)", "ensure_weight_tying": True},
}
"""Settings of LoraConfig; EMBEDDING and LINEAR stand for the names that the model has."""

STORED = {"once": None, "twice": 0.0, "twice, differing": 0.1}
"""How the base stores the output embedding, which its config ties → what is added to the input embedding's values."""


def settings(option: Any, model: str) -> Any:
    """An option with the model's own names."""
    if isinstance(option, str):
        linear, embedding = NAMES[model]
        return option.replace("LINEAR", linear).replace("EMBEDDING", embedding)
    if isinstance(option, dict):
        return {settings(key, model): settings(value, model) for key, value in option.items()}
    if isinstance(option, list):
        return [settings(part, model) for part in option]
    return option


def tied_base(folder: Path, model: str, added: float | None) -> Path:
    made = models.gpt2() if model == "gpt2" else models.llama(torch.float32, tie_word_embeddings=True)
    models.save(made, folder)
    if added is not None:
        tensors = load_file(folder / SINGLE)
        (name,) = [name for name in tensors if name.endswith(f"{NAMES[model][1]}.weight")]
        tensors["lm_head.weight"] = tensors[name] + added * torch.randn(tensors[name].shape)
        save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


def loaded(base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("model", NAMES)
def test_answers_as_the_trained_model_does(tmp_path: Path, model: str, option: str, stored: str) -> None:
    base = tied_base(tmp_path / "base", model, STORED[stored])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's about tied embeddings
        config = LoraConfig(
            **{"r": 4, "lora_alpha": 8, "target_modules": ["LINEAR"], "task_type": "CAUSAL_LM"}
            | settings({"target_modules": ["LINEAR"], **OPTIONS[option]}, model)
        )
        wrapped = get_peft_model(loaded(base), config, autocast_adapter_dtype=False).eval()
        torch.manual_seed(3)
        models.train(wrapped)
        wrapped.save_pretrained(tmp_path / "adapter")
    expected = models.logits(wrapped)
    out = stock.merged(tmp_path / "out", base, tmp_path / "adapter", "fp32")
    answered, info = stock.loaded(out)
    assert not any(info.values()), info
    assert stock.distance(models.logits(answered.eval()), expected) < BOUND
    assert stock.distance(models.logits(loaded(base)), expected) > 1e-3, "the control: the base answers otherwise"
