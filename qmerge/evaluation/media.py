"""Held-out images and sound: files in a folder → inputs and right answers, by the model's own processor."""

from __future__ import annotations

import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qmerge.calibration import texts
from qmerge.calibration.documents import read_file
from qmerge.calibration.tasks import Task, shifted_right, without_start
from qmerge.errors import RecipeError
from qmerge.evaluation.examples import NO_NUMBER, Example, class_of

SUFFIXES: dict[str, tuple[str, ...]] = {"images": (".png", ".jpg", ".jpeg", ".webp", ".bmp"), "sound": (".wav",)}


def media_files(folder: Path, task: Task) -> list[Path]:
    """The images or the sound files in a folder and its subfolders, sorted.

    Raises:
        RecipeError: there are none, or the model takes something else.
    """
    if not task.media:
        raise RecipeError(f"{folder}: expected a text file; a model for {task.name} takes lines like {task.text}")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES[task.media])
    if not found:
        raise RecipeError(
            f"{folder}: no {task.media} in it; expected files that end in {', '.join(SUFFIXES[task.media])}"
        )
    return found


def media_examples(files: Sequence[Path], task: Task, *, model: Any, processor_folder: Path) -> list[Example]:
    """Read files as the model's processor does.

    The name of an image's or a sound's folder is its class, if the model has a class of that name. What is said in ``x.wav`` is
    in ``x.txt``, for models that write it token by token.

    Args:
        model: without weights; its config and its ``main_input_name`` are read.
        processor_folder: with preprocessor_config.json, and the tokenizer.

    Raises:
        RecipeError: a file cannot be read, or the folder has no processor.
    """
    from transformers import AutoFeatureExtractor, AutoImageProcessor

    loader = AutoImageProcessor if task.media == "images" else AutoFeatureExtractor
    try:
        processor = loader.from_pretrained(processor_folder, trust_remote_code=False, local_files_only=True)
    except Exception as cause:  # transformers passes on whatever a processor's file or class raises
        raise RecipeError(
            f"a model for {task.name} {NO_NUMBER}: {processor_folder} has no processor ({cause})"
        ) from cause
    examples: list[Example] = []
    for path in files:
        if task.media == "images":
            inputs = {"pixel_values": _pixels(path, processor)}
        else:
            inputs = {model.main_input_name: _sound(path, processor)[model.main_input_name]}
        answers = torch.tensor([-1])
        if task.judged == "target tokens":
            said_1L = without_start(model.config, _said(path, processor_folder)[None])
            inputs["decoder_input_ids"] = shifted_right(model.config, said_1L)
            answers = said_1L[0]
        elif task.judged == "classes" and path.parent.name in model.config.label2id:
            answers = torch.tensor([class_of(path.parent.name, model.config)])
        examples.append(Example(inputs=inputs, answers=answers))
    return examples


def _pixels(path: Path, processor: Any) -> Tensor:
    """float32 [1, channels, height, width]."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            pixels: Tensor = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
    except (OSError, UnidentifiedImageError) as cause:
        raise RecipeError(f"{path}: no image that can be read: {cause}") from cause
    return pixels


def _sound(path: Path, processor: Any) -> dict[str, Tensor]:
    """What the processor makes of a wav file with 16 bits per sample; several channels are averaged."""
    try:
        with wave.open(str(path)) as file:
            rate, channels, width = file.getframerate(), file.getnchannels(), file.getsampwidth()
            data = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as cause:
        raise RecipeError(f"{path}: no wav file that can be read: {cause}") from cause
    if width != 2 or rate != processor.sampling_rate:
        raise RecipeError(
            f"{path}: {8 * width} bits at {rate} Hz; expected 16 bits at {processor.sampling_rate} Hz, which the model was "
            f"trained on"
        )
    samples = np.frombuffer(data, dtype="<i2").reshape(-1, channels).mean(axis=1) / 2**15
    return dict(processor(samples.astype(np.float32), sampling_rate=rate, return_tensors="pt"))


def _said(path: Path, tokenizer_folder: Path) -> Tensor:
    """Token ids of the text next to a sound file, int64 [L]."""
    text = read_file(path.with_suffix(".txt")).strip()
    ids: Tensor = texts.load_tokenizer(tokenizer_folder)(text_target=text, return_tensors="pt")["input_ids"]
    return ids[0]
