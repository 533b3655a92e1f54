"""Names of models: what is a Hub id, what a folder, and which names mean one model."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qmerge.hub import HUB_ID

CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)(?:[/\\]snapshots[/\\]([0-9a-f]+))?")
"""A folder of the Hub's cache: owner, name, commit."""

LOCAL_OWNERS = re.compile(
    r"\.{1,2}|models?|base|bases|outputs?|out|results?|runs?|saves?|saved|ckpts?|checkpoints?|data|work|workspace|content|"
    r"tmp|home|root|mnt|drive|exp|experiments?|train|training|trained|adapters?|lora|loras"
)
"""First parts of relative paths that look like a Hub id (``outputs/merged``) and are none."""

MARK = re.compile(
    r"[-_.](?P<mark>(?:bnb[-_])?[48][-_]?bit|gptq|awq|fp8|nf4|fp4|nvfp4|mxfp4|int[48]|w4a16|w8a16|w8a8|hqq|bf16|fp16|fp32|"
    r"bfloat16|float16|16bit|dynamic|unsloth|quantized|\d+g)$"
)
"""What the name of a checkpoint ends in, that says how it is stored, and not which model it is."""

SMALL = re.compile(r"^meta-(?=llama)|-hf$|-v0\.1$")
"""What copies of a model leave out: ``Meta-Llama-3`` and ``Llama-3``, ``Llama-2-7b-hf``, ``Mistral-7B-v0.1``."""


@dataclass(frozen=True)
class Origin:
    """Where a model comes from, as someone wrote it. ``id`` and ``commit`` where it is on the Hub; ``folder`` where it is a
    path on somebody's disk; ``last`` is the model's name by itself."""

    text: str
    last: str
    id: str | None = None
    commit: str | None = None
    folder: bool = False


def origin_of(text: str) -> Origin:
    """``owner/name``, a path, or a folder of the Hub's cache."""
    cached = CACHE.search(text)
    if cached:
        return Origin(text, cached[2], f"{cached[1]}/{cached[2]}", cached[3])
    parts = [part for part in re.split(r"[/\\]", text.strip()) if part]
    last = parts[-1] if parts else ""
    if HUB_ID.fullmatch(text) and not LOCAL_OWNERS.fullmatch(parts[0].lower()) and not numbered(last):
        return Origin(text, last, text)
    return Origin(text, last, folder="/" in text or "\\" in text or text.startswith("."))


def numbered(last: str) -> bool:
    """``checkpoint-500``: a name that a training run gives."""
    return re.fullmatch(r"(checkpoint|step|epoch|ckpt)[-_]?\d+", last.lower()) is not None


def marks_of(origin: Origin) -> list[str]:
    """``Llama-3.1-8B-unsloth-bnb-4bit`` → [bnb-4bit, unsloth]: how it is stored, the last first."""
    return peeled(origin)[1]


def peeled(origin: Origin) -> tuple[str, list[str]]:
    """(the name without its marks, the marks, the last first)."""
    rest, marks = origin.last.lower(), []
    while match := MARK.search(rest):
        marks.append(re.sub(r"(?<=[48])[-_]?bit", "bit", match["mark"].replace("_", "-")))
        rest = rest[: match.start()]
    return rest, marks


def same_model(one: Origin, other: Origin) -> bool:
    """Whether two names mean one model, copies and quantized siblings included. Empty names mean nothing."""
    first, second = stem(one), stem(other)
    return bool(first) and first == second


def stem(origin: Origin) -> str:
    """``unsloth/Meta-Llama-3.1-8B-bnb-4bit`` → ``llama-3.1-8b``."""
    return SMALL.sub("", SMALL.sub("", peeled(origin)[0])).replace("_", "-")
