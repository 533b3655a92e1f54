"""Names of models: which ones are Hub ids or folders, and which ones mean the same model."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qmerge.hub import HUB_ID

CACHE_FOLDER = re.compile(r"models--([\w.-]+?)--([\w.-]+)(?:[/\\]snapshots[/\\]([0-9a-f]+))?")
"""A folder of the Hub's cache: owner, name, commit."""

LOCAL_OWNERS = re.compile(
    r"\.{1,2}|models?|base|bases|outputs?|out|results?|runs?|saves?|saved|ckpts?|checkpoints?|data|work|workspace|content|"
    r"tmp|home|root|mnt|drive|exp|experiments?|train|training|trained|adapters?|lora|loras"
)
"""First parts of relative paths that look like Hub ids (``outputs/merged``)."""

TRAINING_RUN = re.compile(r"(checkpoint|step|epoch|ckpt)[-_]?\d+")
"""A name that a training run gives to a folder: ``checkpoint-500``."""

STORAGE_MARK = re.compile(
    r"[-_.](?P<mark>(?:bnb[-_])?[48][-_]?bit|gptq|awq|fp8|nf4|fp4|nvfp4|mxfp4|int[48]|w4a16|w8a16|w8a8|hqq|bf16|fp16|fp32|"
    r"bfloat16|float16|16bit|dynamic|unsloth|quantized|\d+g)$"
)
"""The end of a checkpoint's name that tells how it is stored, not which model it is."""

OPTIONAL_PART = re.compile(r"^meta-(?=llama)|-hf$|-v0\.1$")
"""Parts that copies of a model leave out: ``Meta-Llama-3`` and ``Llama-3``, ``Llama-2-7b-hf``, ``Mistral-7B-v0.1``."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a model comes from, as somebody wrote it.

    text       as written
    last       the model's name without owner or folders
    id         its id, where it is on the Hub
    commit     its commit on the Hub, where the text names one
    is_folder  it is a path on somebody's disk
    """

    text: str
    last: str
    id: str | None = None
    commit: str | None = None
    is_folder: bool = False


def origin_of(text: str) -> Origin:
    """The origin that ``owner/name``, a path, or a folder of the Hub's cache stands for."""
    cached = CACHE_FOLDER.search(text)
    if cached:
        owner, name, commit = cached.groups()
        return Origin(text=text, last=name, id=f"{owner}/{name}", commit=commit)
    parts = [part for part in re.split(r"[/\\]", text.strip()) if part]
    last = parts[-1] if parts else ""
    if _is_hub_id(text, parts):
        return Origin(text=text, last=last, id=text)
    # A name without slashes (gpt2) may be an old id of the Hub, or a folder.
    return Origin(text=text, last=last, is_folder="/" in text or "\\" in text or text.startswith("."))


def _is_hub_id(text: str, parts: list[str]) -> bool:
    if not HUB_ID.fullmatch(text) or LOCAL_OWNERS.fullmatch(parts[0].lower()):
        return False
    return not TRAINING_RUN.fullmatch(parts[-1].lower())


def storage_marks(origin: Origin) -> list[str]:
    """How the checkpoint is stored, by its name: ``Llama-3.1-8B-unsloth-bnb-4bit`` → [bnb-4bit, unsloth]."""
    _, marks = _split_marks(origin)
    return marks


def _split_marks(origin: Origin) -> tuple[str, list[str]]:
    """The name without its storage marks; and the marks, the last one first."""
    name = origin.last.lower()
    marks: list[str] = []
    while match := STORAGE_MARK.search(name):
        # One spelling for all: bnb_4-bit, bnb-4_bit and bnb-4bit.
        mark = match["mark"].replace("_", "-")
        marks.append(re.sub(r"(?<=[48])[-_]?bit", "bit", mark))
        name = name[: match.start()]
    return name, marks


def is_same_model(a: Origin, b: Origin) -> bool:
    """Whether two names mean the same model, copies and quantized siblings included. An empty name means no model."""
    name = _plain_name(a)
    return bool(name) and name == _plain_name(b)


def _plain_name(origin: Origin) -> str:
    """``unsloth/Meta-Llama-3.1-8B-bnb-4bit`` → ``llama-3.1-8b``."""
    name, _ = _split_marks(origin)
    # Twice, because a name may have two optional parts at its end: the pattern takes one at a time.
    for _ in range(2):
        name = OPTIONAL_PART.sub("", name)
    return name.replace("_", "-")
