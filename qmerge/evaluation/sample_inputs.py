"""One small input for a model of any kind, always the same: text, an image of noise, a second of noise."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmerge.calibration import texts
from qmerge.calibration.tasks import CAUSAL_LM, shifted_right, task_of, token_arguments
from qmerge.checkpoint.architecture import empty_model
from qmerge.errors import CheckpointError
from qmerge.evaluation.quiet import silenced

SENTENCE = "Water boils at 100 degrees and freezes at zero. The book that she read last week is on the table."
"""Ordinary text, which a loaded model must compute outputs for. Hidden states of seldom trained tokens (the first ids are often
special tokens) can be so large that compute dtypes alone make logits differ by 30 %."""

TOKENS = 16
"""Number of token ids that replace the sentence where a folder has no tokenizer."""

IMAGE_SIZE, SECONDS, SAMPLES_PER_SECOND, FRAMES = 224, 1, 16_000, 128
"""Of inputs, where the model's config does not say."""


def sample_inputs(config_json: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Arguments of a model's forward function.

    Args:
        config_json: of the model.
        folder: with its tokenizer.

    Raises:
        CheckpointError: transformers does not know the architecture, or it takes another kind of input.
    """
    if task_of(config_json) is CAUSAL_LM:  # images are optional
        return {"input_ids": question_ids(config_json, folder)}
    model: Any = empty_model(config_json)
    config = model.config
    main = model.main_input_name
    if main == "input_ids":
        inputs = token_arguments(model, question_ids(config_json, folder))
        if getattr(config, "vision_config", None) is not None:  # CLIP compares texts and images
            inputs["pixel_values"] = _image(config.vision_config)
        return inputs
    if main not in NOISE:
        raise CheckpointError(f"{type(model).__name__} takes {main}, which qmerge cannot make")
    inputs = {main: NOISE[main](config)}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = shifted_right(config, torch.arange(TOKENS)[None] % config.vocab_size)
    return inputs


def described(inputs: Mapping[str, Any]) -> str:
    """What the inputs are, in words: ``a sentence and an image of noise``."""
    return " and ".join(words for name, words in WORDS.items() if name in inputs)


def question_ids(config_json: Mapping[str, Any], folder: Path) -> Tensor:
    """Token ids [1, L] of a sentence; ids from the middle of the vocabulary where no tokenizer in the folder knows any."""
    vocab_size = texts.vocab_size(config_json)
    ids: list[int] = []
    with contextlib.suppress(Exception), silenced():  # tokenizers raise bare Exceptions
        ids = texts.load_tokenizer(folder)(SENTENCE)["input_ids"]
    if len(ids) < 2 or max(ids) >= vocab_size:
        return (vocab_size // 2 + torch.arange(TOKENS) % max(1, vocab_size // 2))[None]
    return torch.tensor(ids)[None]


def _noise(*shape: int) -> Tensor:
    """Normally distributed, as images and sound are after a processor."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _image(config: Any) -> Tensor:
    size = getattr(config, "image_size", None) or IMAGE_SIZE
    height, width = (size, size) if isinstance(size, int) else size
    return _noise(1, getattr(config, "num_channels", 3), height, width)


def _spectrogram(config: Any) -> Tensor:
    """[1, bands, frames] for Whisper, whose length is fixed; else [1, frames, bands]."""
    if hasattr(config, "max_source_positions") and hasattr(config, "num_mel_bins"):
        return _noise(1, config.num_mel_bins, 2 * config.max_source_positions)
    bands = getattr(config, "feature_projection_input_dim", None) or getattr(config, "input_feat_per_channel", None)
    return _noise(1, FRAMES, bands or config.num_mel_bins)


def _sound(config: Any) -> Tensor:
    """[1, samples]; [1, frames, bands] where the model takes a spectrogram under this name (AST)."""
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return _noise(1, config.max_length, config.num_mel_bins)
    return _noise(1, SECONDS * SAMPLES_PER_SECOND)


NOISE: dict[str, Callable[[Any], Tensor]] = {
    "pixel_values": _image,
    "input_features": _spectrogram,
    "input_values": _sound,
}
"""transformers' ``main_input_name`` → an input."""

WORDS = {
    "input_ids": "a sentence",
    "pixel_values": "an image of noise",
    "input_features": "a spectrogram of noise",
    "input_values": "a second of noise",
}
"""The same, in words."""
