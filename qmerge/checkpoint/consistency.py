"""Do config.json and the tensors describe the same model? A merge copies config.json, so its errors reach the output.

Only sizes that mean the same in every architecture with these names are compared, and only for architectures whose rule is known:
``LlamaForCausalLM`` and its relatives (transformers, models/llama/modeling_llama.py).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from qmerge.types import Weight

COMPARED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")
"""``model_type`` of architectures with Llama's names and rules."""

OWN_HEAD_SIZE = ("qwen3", "gemma", "gemma2")
"""Those of them whose heads have another size by default than a share of ``hidden_size``."""

LAYER = re.compile(r"model\.layers\.(\d+)\.")


def config_problem(config: Mapping[str, Any], weights: Mapping[str, Weight]) -> str | None:
    """The first size in a config.json that the tensors contradict, in words; None where all agree or cannot be compared.

    Args:
        weights: of the checkpoint, by name.
    """
    if config.get("model_type") not in COMPARED:
        return None
    for key, found in _sizes(weights).items():
        # Where the config leaves a size out, transformers has a default, which need not be known here.
        declared = config.get(key, found)
        if declared != found:
            return f"{key} is {declared!r}, but the tensors have {found}"
    return _heads_problem(config, weights)


VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json",
)  # fmt: skip
"""Files that hold a vocabulary, or name a tokenizer that needs none (ByT5)."""


def tokenizer_problem(files: Collection[str], config: Mapping[str, Any]) -> str | None:
    """The files that a model without a tokenizer lacks, and the consequence, as the end of a sentence that says of what; None
    where it has one or needs none.

    Args:
        files: names of the files in the model's folder.
    """
    text_config = config.get("text_config")
    vocab_size = config.get("vocab_size") or (text_config.get("vocab_size") if isinstance(text_config, dict) else None)
    if not vocab_size or any(name in files for name in VOCABULARIES):
        return None
    return (
        f"none of {', '.join(VOCABULARIES[:3])}, …: programs that serve the model refuse it, and no text can be used to calibrate "
        f"and judge it. Copy the tokenizer files of the model on the Hub"
    )


def _sizes(weights: Mapping[str, Weight]) -> dict[str, int]:
    """The sizes of a model, as its tensors show them, by their keys in config.json."""
    sizes: dict[str, int] = {}
    # [tokens, features]
    embedding = weights.get("model.embed_tokens.weight")
    if embedding is not None:
        sizes["vocab_size"], sizes["hidden_size"] = embedding.shape[:2]
    layers = [int(match[1]) for match in map(LAYER.match, weights) if match]
    if layers:
        sizes["num_hidden_layers"] = max(layers) + 1
    # [intermediate, features]; experts have other names.
    gate = weights.get("model.layers.0.mlp.gate_proj.weight")
    if gate is not None:
        sizes["intermediate_size"] = gate.shape[0]
    return sizes


def _heads_problem(config: Mapping[str, Any], weights: Mapping[str, Weight]) -> str | None:
    """Projections of attention have heads · size of a head rows."""
    heads = config.get("num_attention_heads")
    if heads is None:
        return None
    # Not isinstance: True is an int in Python.
    if type(heads) is not int or heads < 1:
        return f"num_attention_heads is {heads!r}"
    # Without it, every head has its own keys.
    key_heads = config.get("num_key_value_heads")
    head_size = config.get("head_dim")
    if head_size is None and isinstance(config.get("hidden_size"), int) and config["model_type"] not in OWN_HEAD_SIZE:
        head_size = config["hidden_size"] // heads
    if type(head_size) is not int:
        return None
    if key_heads is None:
        key_heads = heads
    projections = (("num_attention_heads", heads, "q_proj"), ("num_key_value_heads", key_heads, "k_proj"))
    for key, count, local in projections:
        weight = weights.get(f"model.layers.0.self_attn.{local}.weight")
        if weight is not None and (type(count) is not int or count * head_size != weight.shape[0]):
            return f"{key} is {count!r}, of {head_size} rows each, but {weight.name} has {weight.shape[0]}"
    return None
