"""The hyperparameters of a model as keys of a GGUF file. ``gguf`` and ``writer`` are the gguf package and its GGUFWriter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
"""Type of the matrices → its name in gguf.LlamaFileType."""


def head_size(config: Any) -> int:
    """Size of an attention head; configs of older models leave it out."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope_parameters(config: Any) -> dict[str, Any]:
    """The parameters of rotary embeddings in the layers that see all tokens."""
    parameters = config.rope_parameters or {}
    # Gemma has one set for each kind of layer, other architectures have one.
    return dict(parameters.get("full_attention", parameters))


def rope_factors(parameters: Mapping[str, Any], size: int) -> Tensor | None:
    """float32 [size / 2]: the divisor of every frequency for Llama 3's scaling; None for any other scaling.

    High frequencies stay, low ones are divided by ``factor``, those between are interpolated by their wavelength
    (transformers, modeling_rope_utils.py). llama.cpp reads the factors from the tensor ``rope_freqs.weight``.
    """
    if parameters.get("rope_type") != "llama3":
        return None
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
    wavelengths = 2 * math.pi * parameters["rope_theta"] ** exponents
    factor = parameters["factor"]
    low = parameters["low_freq_factor"]
    high = parameters["high_freq_factor"]
    # How often a frequency turns within the context of the original training.
    turns = parameters["original_max_position_embeddings"] / wavelengths
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - smooth) / factor + smooth)
    return factors


def add_hyperparameters(gguf: Any, writer: Any, config: Any, *, type: str, has_window: bool) -> None:
    """Add every key that llama.cpp's converter writes for these architectures, except names, sizes and the tokenizer.

    Args:
        type: of the matrices: f32, f16, bf16 or q8_0.
        has_window: whether llama.cpp reads the size of a sliding window for this architecture.
    """
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_rope_dimension_count(head_size(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(int(gguf.LlamaFileType[FILE_TYPES[type]]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if has_window:
        writer.add_sliding_window(config.sliding_window)
    attention_cap = getattr(config, "attn_logit_softcapping", None)
    if attention_cap:
        writer.add_attn_logit_softcapping(attention_cap)
    final_cap = getattr(config, "final_logit_softcapping", None)
    if final_cap:
        writer.add_final_logit_softcapping(final_cap)
    _add_rope(gguf, writer, rope_parameters(config))


def _add_rope(gguf: Any, writer: Any, parameters: Mapping[str, Any]) -> None:
    writer.add_rope_freq_base(parameters["rope_theta"])
    # Llama 3's scaling is a tensor, not a key.
    kind = parameters.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType[kind.upper()])
        writer.add_rope_scaling_factor(parameters["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(parameters["original_max_position_embeddings"])
