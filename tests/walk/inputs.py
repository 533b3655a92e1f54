"""Inputs with which a tiny model of any architecture answers."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

TOKENS = 12


def inputs_of(model: Any) -> dict[str, Tensor]:
    """Random inputs, made from the name of the model's main input and from its config."""
    generator = torch.Generator().manual_seed(0)
    config = model.config.get_text_config()
    vocabulary = int(getattr(config, "vocab_size", None) or getattr(model.config, "vocab_size", None) or 96)
    tokens = torch.randint(4, min(vocabulary, 90), (1, TOKENS), generator=generator)
    if isinstance(getattr(config, "eos_token_id", None), int):
        tokens[:, -1] = config.eos_token_id  # BART's classifier looks there
    name = model.main_input_name
    codebooks = getattr(model.config, "num_codebooks", 0)
    if codebooks and name == "input_ids":  # MusicGen: one row of tokens for each codebook
        tokens = tokens.repeat(codebooks, 1)
    if name == "input_ids":
        made = {"input_ids": tokens}
    else:
        made = {name: torch.randn(_shape_of(name, model.config), generator=generator)}
    if model.config.is_encoder_decoder:
        made["decoder_input_ids"] = tokens
    return made


def _shape_of(name: str, config: Any) -> tuple[int, ...]:
    """The shape of an input that is not made of tokens."""
    vision = getattr(config, "vision_config", config)
    if name == "pixel_values":
        size = getattr(vision, "image_size", 32)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return (1, getattr(vision, "num_channels", 3), height, width)
    if name == "input_values":
        return (1, 2000)
    bins = getattr(config, "num_mel_bins", None) or getattr(config, "input_feat_per_channel", 16)
    positions = 2 * getattr(config, "max_source_positions", 32)
    return (1, bins, positions)


def outputs_of(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every float tensor of a model's answer, by name."""
    inside = model.get_base_model() if isinstance(model, PeftModel) else model
    more = {"use_cache": False} if "use_cache" in inspect.signature(inside.forward).parameters else {}
    torch.manual_seed(0)
    with torch.no_grad():
        answer = inside(**inputs, **more)
    return dict(_tensors("", answer))


def _tensors(name: str, value: Any) -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [(name, value)] if value.is_floating_point() else []
    entries = value.items() if hasattr(value, "items") else enumerate(value) if isinstance(value, list | tuple) else ()
    return [pair for key, entry in entries for pair in _tensors(f"{name}.{key}", entry)]
