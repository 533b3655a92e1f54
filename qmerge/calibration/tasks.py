"""What models do: one table of tasks, and how a model of each task is run on token ids.

The task follows from the model class that config.json names, by transformers' own lists of classes (``modeling_auto.py``).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from qmerge.checkpoint.architecture import auto_classes
from qmerge.schema import Judged


@dataclass(frozen=True, kw_only=True)
class Task:
    """One kind of model.

    name    what it does, in words
    lists   transformers' lists of the model classes that do this (``auto_classes``)
    judged  what ``qmerge verify --text`` compares
    text    form of a line of the .jsonl file that it reads; "" where the inputs are not text
    plain   whether it also reads a .txt file
    media   what it reads from the files of a folder instead: images, sound, or nothing
    """

    name: str
    lists: tuple[str, ...]
    judged: Judged
    text: str = '{"text": …}'
    plain: bool = True
    media: Literal["", "images", "sound"] = ""


CAUSAL_LM = Task(
    name="text generation",
    lists=("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"),
    judged="next tokens",
    text='{"text": …} or {"messages": …}',
)

TASKS = (
    CAUSAL_LM,
    Task(
        name="text classification",
        lists=("SEQUENCE_CLASSIFICATION",),
        judged="classes",
        text='{"text": …, "label": …}, without a label where it is not known, with "text_pair" for pairs of texts',
    ),
    Task(name="token classification", lists=("TOKEN_CLASSIFICATION",), judged="classes of tokens"),
    Task(
        name="question answering",
        lists=("QUESTION_ANSWERING",),
        judged="answer spans",
        text='{"question": …, "context": …}',
        plain=False,
    ),
    Task(
        name="text to text",
        lists=("SEQ_TO_SEQ_CAUSAL_LM",),
        judged="target tokens",
        text='{"source": …, "target": …}',
        plain=False,
    ),
    Task(name="masked tokens", lists=("MASKED_LM",), judged="masked tokens"),
    Task(name="speech to text", lists=("SPEECH_SEQ_2_SEQ",), judged="target tokens", text="", media="sound"),
    Task(name="speech to text", lists=("CTC",), judged="frames", text="", media="sound"),
    Task(name="audio classification", lists=("AUDIO_CLASSIFICATION",), judged="classes", text="", media="sound"),
    Task(name="image classification", lists=("IMAGE_CLASSIFICATION",), judged="classes", text="", media="images"),
    Task(name="embeddings", lists=("", "TEXT_ENCODING"), judged="embeddings"),
)
"""The first task whose lists have the class is taken."""


def task_of(config: Mapping[str, Any]) -> Task:
    """The task of the model of a config.json; text generation where its class is in none of the lists."""
    names = config.get("architectures") or []
    for task in TASKS:
        for listed in task.lists:
            if names and names[0] in _classes(listed):
                return task
    return CAUSAL_LM


@cache
def _classes(listed: str) -> frozenset[str]:
    """Names of the model classes in one of transformers' lists."""
    names: set[str] = set()
    for entry in auto_classes(listed).values():
        names.update([entry] if isinstance(entry, str) else entry)
    return frozenset(names)


def takes_text(model: Any, task: Task) -> bool:
    """Whether token ids are all that a model needs. (Models that generate text take images if there are any.)"""
    if task is CAUSAL_LM:
        return True
    has_vision = getattr(model.config, "vision_config", None) is not None
    return bool(task.text) and model.main_input_name == "input_ids" and not has_vision


def token_arguments(model: Any, ids_NL: Tensor) -> dict[str, Any]:
    """Arguments of a model's forward function for token ids. A decoder after an encoder gets the same ids, one later.

    Args:
        ids_NL: int64 [N, L], on the model's device.
    """
    arguments: dict[str, Any] = {"input_ids": ids_NL}
    if model.config.is_encoder_decoder:
        arguments["decoder_input_ids"] = shifted_right(model.config, ids_NL)
    if _accepts(model, "use_cache"):
        arguments["use_cache"] = False
    return arguments


def _accepts(model: Any, argument: str) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return argument in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def shifted_right(config: Any, ids_NL: Tensor) -> Tensor:
    """What a decoder sees when it predicts these tokens: its start token, then all but the last one.

    mBART has no start token: the last token goes to the front (transformers' shift_tokens_right).
    """
    start = config.decoder_start_token_id
    if start is not None:
        first_N1 = torch.full_like(ids_NL[:, :1], start)
    elif config.model_type == "mbart":
        first_N1 = ids_NL[:, -1:]
    else:
        first_N1 = torch.full_like(ids_NL[:, :1], config.pad_token_id or 0)
    return torch.cat([first_N1, ids_NL[:, :-1]], dim=1)


def without_start(config: Any, ids_1L: Tensor) -> Tensor:
    """Target tokens without the decoder's start token, which some tokenizers (Whisper's) put first: ``shifted_right`` adds it,
    as collators for training do."""
    if ids_1L.shape[1] > 1 and int(ids_1L[0, 0]) == config.decoder_start_token_id:
        return ids_1L[:, 1:]
    return ids_1L


def predicted_ids(model: Any, ids_NL: Tensor) -> Tensor:
    """The token that each position of the output predicts, int64 [N, L]; −1 where it is not known.

    Args:
        ids_NL: what the model was run on, with ``token_arguments``.
    """
    return ids_NL if model.config.is_encoder_decoder else next_ids(ids_NL)


def next_ids(ids_NL: Tensor) -> Tensor:
    """The token that follows each position, int64 [N, L]; −1 after the last one of a sequence, which is not known."""
    return torch.cat([ids_NL[:, 1:], torch.full_like(ids_NL[:, :1], -1)], dim=1)
