"""tokenizer.json, as the tokenizers library writes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmerge.checkpoint.documents import read_json
from qmerge.errors import CheckpointError

SAVE_AGAIN = "AutoTokenizer.from_pretrained(…).save_pretrained(…) writes it"


@dataclass(frozen=True)
class TokenizerFile:
    """The content of the file. Its parts are read when they are used: KeyError, TypeError, AttributeError where they are not
    as expected."""

    content: Mapping[str, Any]

    @property
    def model(self) -> Mapping[str, Any]:
        """Type, vocabulary and merges."""
        return dict(self.content["model"])

    @property
    def added_tokens(self) -> list[Mapping[str, Any]]:
        """Tokens that are recognized before a text is split."""
        return self.content.get("added_tokens") or []

    @property
    def normalizer_steps(self) -> list[Mapping[str, Any]]:
        """Changes of the text, in order."""
        return list(_steps(self.content.get("normalizer")))

    @property
    def pre_tokenizer_steps(self) -> list[Mapping[str, Any]]:
        """Ways to split the text before merging, in order."""
        return list(_steps(self.content.get("pre_tokenizer")))

    @property
    def is_byte_level(self) -> bool:
        """Whether it is byte-level BPE; else only SentencePiece's BPE can be exported."""
        return any(step.get("type") == "ByteLevel" for step in self.pre_tokenizer_steps)


def _steps(part: Any) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, with sequences unrolled."""
    if part is None:
        return
    if part.get("type") == "Sequence":
        for inner in part.get("pretokenizers") or part.get("normalizers") or []:
            yield from _steps(inner)
    else:
        yield part


def read_tokenizer(folder: Path) -> TokenizerFile:
    """Read tokenizer.json.

    Raises:
        CheckpointError: there is none, or it is not JSON.
    """
    if not (folder / "tokenizer.json").is_file():
        present = "no tokenizer"
        if (folder / "tokenizer.model").is_file():
            present = "only tokenizer.model"
        raise CheckpointError(f"{folder} has {present}: expected tokenizer.json ({SAVE_AGAIN})")
    return TokenizerFile(read_json(folder / "tokenizer.json", CheckpointError))


def check_model(tokenizer: TokenizerFile) -> None:
    """Raise CheckpointError for a model of tokens that llama.cpp does not have."""
    model = tokenizer.model
    is_known = tokenizer.is_byte_level or model.get("byte_fallback")
    if model["type"] != "BPE" or not is_known:
        raise CheckpointError(
            f"tokenizer.json: a {model['type']} model cannot be exported, expected byte-level BPE or SentencePiece BPE with byte "
            f"fallback; llama.cpp's convert_hf_to_gguf.py may support it"
        )
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise CheckpointError(
                f"tokenizer.json: llama.cpp does not support {name}; the tokenizer cannot be exported"
            )
    if not model["merges"]:
        raise CheckpointError("tokenizer.json has no merges; the tokenizer cannot be exported")
