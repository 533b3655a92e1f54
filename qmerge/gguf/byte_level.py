"""Byte-level BPE: llama.cpp's names for the ways to split text before merging (``tokenizer.ggml.pre``).

llama.cpp has the code of each way under a name (src/llama-vocab.cpp) and does not read the pattern from the file. So a name is
chosen only where its code splits text as the tokenizer does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qmerge.gguf.tokenizer_file import TokenizerFile

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Steps of a pre-tokenizer, in a few words.
SPLIT = "split "  # then the pattern
DIGITS = "digits"
BYTES = "bytes"
WORDS_AND_BYTES = "words and bytes"
UNKNOWN_STEP = ""

NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    ((SPLIT + LLAMA3, BYTES), True): "llama-bpe",
    ((SPLIT + LLAMA3, BYTES), False): "smaug-bpe",
    ((SPLIT + QWEN2, BYTES), False): "qwen2",
    ((SPLIT + TEKKEN, BYTES), True): "tekken",
    ((WORDS_AND_BYTES,), False): "gpt-2",
    ((DIGITS, WORDS_AND_BYTES), False): "smollm",
}
"""(steps of the pre-tokenizer, whether words in the vocabulary skip the merges) → ``tokenizer.ggml.pre``."""


def pre_tokenizer_name(tokenizer: TokenizerFile) -> str | None:
    """llama.cpp's name for the way that a tokenizer splits text; None where qmerge knows none.

    Unicode normalization (NFC, in Qwen's tokenizers) does not count: llama.cpp does none under any name.
    """
    if any(step["type"] != "NFC" for step in tokenizer.normalizer_steps):
        return None
    steps = tuple(_step_name(step) for step in tokenizer.pre_tokenizer_steps)
    skips_merges = bool(tokenizer.model.get("ignore_merges"))
    return NAMES.get((steps, skips_merges))


def pre_tokenizer_of(name: str) -> tuple[dict[str, Any], bool] | None:
    """The reverse: ``pre_tokenizer`` for tokenizer.json, and ``ignore_merges``; None for a name that qmerge does not know."""
    for (steps, skips_merges), known in NAMES.items():
        if known == name:
            return {"type": "Sequence", "pretokenizers": [_step(step) for step in steps]}, skips_merges
    return None


def _step(name: str) -> dict[str, Any]:
    """A step of ``NAMES`` as the tokenizers library writes it."""
    if name == DIGITS:
        return {"type": "Digits", "individual_digits": True}
    if name.startswith(SPLIT):
        pattern = {"Regex": name.removeprefix(SPLIT)}
        return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    use_regex = name == WORDS_AND_BYTES
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _step_name(step: Mapping[str, Any]) -> str:
    """A step as in ``NAMES``; UNKNOWN_STEP where it has another setting."""
    is_isolated = step.get("behavior", "Isolated") == "Isolated"
    if step.get("add_prefix_space") or step.get("invert") or not is_isolated:
        return UNKNOWN_STEP
    if step["type"] == "Split":
        return f"{SPLIT}{step['pattern'].get('Regex')}"
    if step["type"] == "Digits" and step["individual_digits"]:
        return DIGITS
    if step["type"] == "ByteLevel":
        # use_regex: it splits into words by GPT-2's pattern first.
        return WORDS_AND_BYTES if step.get("use_regex", True) else BYTES
    return UNKNOWN_STEP
