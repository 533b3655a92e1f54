"""The part of the model card that says how to load the model: a command or a few lines of Python for each program."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qmerge.calibration.tasks import CAUSAL_LM, task_of
from qmerge.checkpoint.documents import read_json
from qmerge.errors import CheckpointError
from qmerge.formats import get_format
from qmerge.formats.serving import PACKAGES, PROGRAMS, Program, programs_for
from qmerge.gguf.output import FILE

CARD_NAME = "README.md"

HEADING = "## How to load it"

FOLDER = "path/to/this-folder"
"""What commands name before the model is on the Hub."""

PIPELINE_TAGS = {
    "text generation": "text-generation",
    "text classification": "text-classification",
    "token classification": "token-classification",
    "question answering": "question-answering",
    "masked tokens": "fill-mask",
    "speech to text": "automatic-speech-recognition",
    "audio classification": "audio-classification",
    "image classification": "image-classification",
    "embeddings": "feature-extraction",
}
"""Name of a task → the Hub's name of it. It has none for models that write a text for a text."""

PIPELINE = """\
from transformers import pipeline

model = pipeline("{tag}", model="{model}", device_map="auto")"""

TEXT_TO_TEXT = """\
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

model = AutoModelForSeq2SeqLM.from_pretrained("{model}", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("{model}")"""


def pipeline_tag(config: Mapping[str, Any]) -> str | None:
    """The Hub's name of what a model does, from its config.json; None where it has none."""
    task = task_of(config)
    if task is CAUSAL_LM and config.get("vision_config"):
        return "image-text-to-text"
    return PIPELINE_TAGS.get(task.name)


def loading_lines(target: str, config: Mapping[str, Any], hub_id: str | None = None) -> list[str]:
    """The section, as lines of Markdown.

    Args:
        target: the format that the model is stored in.
        config: its config.json; empty for a GGUF file.
        hub_id: where it is on the Hub; None: the commands name a folder.
    """
    lines = [HEADING, ""]
    if hub_id is None:
        lines += [f"Put the folder with these files in the place of `{FOLDER}`.", ""]
    tag = pipeline_tag(config) if config else "text-generation"
    if tag != "text-generation":
        return [*lines, *_other_task(target, tag, hub_id or FOLDER)]
    for program in programs_for(target):
        lines += _program_lines(program, target, hub_id)
    return lines


def _program_lines(program: Program, target: str, hub_id: str | None) -> list[str]:
    command = program.command(hub_id or FOLDER, file=FILE, on_hub=hub_id is not None)
    return [
        _title(program, target),
        "",
        f"```{program.language}",
        *command.splitlines(),
        "```",
        "",
        *([f"{program.remarks[target]}.", ""] if target in program.remarks else []),
    ]


def _title(program: Program, target: str) -> str:
    """``**vLLM** (needs a GPU):``."""
    needs = program.needs
    if program.name == "transformers" and target in PACKAGES:
        needs = PACKAGES[target]
    return f"**{program.title}** (needs {needs}):" if needs else f"**{program.title}**:"


def _other_task(target: str, tag: str | None, model: str) -> list[str]:
    """transformers alone: the other programs are for models that write text."""
    code = TEXT_TO_TEXT if tag is None else PIPELINE
    title = _title(PROGRAMS["transformers"], target)
    return [title, "", "```python", *code.format(tag=tag, model=model).splitlines(), "```", ""]


def name_model(card: str, out: Path, target: str, hub_id: str) -> str:
    """The card of a finished folder, with commands that name the model on the Hub.

    Args:
        card: its text; a card without the section stays as it is.
        out: the folder.
        target: the format that it is stored in.

    Raises:
        CheckpointError: its config.json cannot be read.
    """
    config: dict[str, Any] = {}
    if get_format(target).info.container is None:
        config = read_json(out / "config.json", CheckpointError)
    section = "\n".join(loading_lines(target, config, hub_id)) + "\n"
    # Up to the next heading of the same level; code in the section has none.
    pattern = re.compile(rf"^{re.escape(HEADING)}$.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    return pattern.sub(lambda _: section, card, count=1)
