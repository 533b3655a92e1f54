"""Adapters that mlx_lm trained, in the terms of PEFT: LoRA and DoRA of linear layers, and LoRA of embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qmerge.checkpoint.documents import LARGEST_SIZE
from qmerge.errors import AdapterError

TENSORS = "adapters.safetensors"

EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "tok_embeddings", "word_embeddings")
"""Last parts of the names of input embeddings in mlx_lm's models."""

# The last part of a tensor's name → PEFT's, for linear layers and for embeddings.
LINEAR_PARTS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
EMBEDDING_PARTS = {"lora_a": "lora_embedding_A", "lora_b": "lora_embedding_B"}


def is_mlx(config: Mapping[str, Any]) -> bool:
    """Whether mlx_lm wrote this adapter_config.json."""
    return "peft_type" not in config and "lora_parameters" in config


def peft_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter_config.json that PEFT would have written.

    Raises:
        AdapterError: the adapter is not LoRA or DoRA; rank or scale is missing.
    """
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise AdapterError(
            f"adapter_config.json has fine_tune_type {kind!r}, which trained whole weights: write them into the model with "
            f"mlx_lm.fuse, or train with lora or dora"
        )
    parameters = config["lora_parameters"] or {}
    if not isinstance(parameters, dict):
        raise AdapterError(f"adapter_config.json: lora_parameters is {str(parameters)[:80]}; expected an object")
    rank: Any = parameters.get("rank")
    scale: Any = parameters.get("scale")
    are_numbers = isinstance(rank, int) and isinstance(scale, int | float)
    # NaN is not below the limit, either.
    if not are_numbers or not abs(rank) <= LARGEST_SIZE or not abs(scale) <= LARGEST_SIZE:
        raise AdapterError(
            f"adapter_config.json: lora_parameters has rank {repr(rank)[:80]} and scale {repr(scale)[:80]}; expected numbers "
            f"such as 8 and 20.0"
        )
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": parameters.get("dropout", 0.0),
        "use_dora": kind == "dora",
        "ensure_weight_tying": True,  # LoRA of a tied embedding acts on the output, too
        "target_modules": parameters.get("keys"),
        "base_model_name_or_path": config.get("model"),
    }


def peft_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by PEFT's names, without their prefix. mlx_lm's matrices are the transposed ones.

    Raises:
        AdapterError: a tensor belongs to something other than a linear layer or an embedding.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        parts = LINEAR_PARTS
        if module.rpartition(".")[2] in EMBEDDINGS:
            parts = EMBEDDING_PARTS
        if part not in parts or tensor.ndim > 2:
            raise AdapterError(
                f"{TENSORS}: {name} {list(tensor.shape)} is not LoRA or DoRA of a linear layer, or LoRA of an embedding; "
                f"qmerge merges no other MLX adapters: use mlx_lm.fuse"
            )
        renamed[f"{module}.{parts[part]}"] = tensor.T.contiguous() if tensor.ndim == 2 else tensor
    return renamed
