"""The general text: every part of it is in every cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import qmerge.demo
from qmerge.calibration import texts
from qmerge.calibration.general import FOLDER, general_documents, general_tokens, plain_text
from qmerge.errors import TokenizerError

DEMO = Path(qmerge.demo.__file__).parent / "base-nf4"
PARTS = {
    "arabic", "chinese", "code", "dialogues", "dutch", "english", "french", "german", "italian", "japanese", "manuals",
    "mathematics", "others", "portuguese", "russian", "spanish",
}  # fmt: skip


def cut(tokens: int, length: int = 512) -> torch.Tensor:
    return general_tokens(DEMO, tokens=tokens, length=length, vocab_size=10**6)


def test_all_parts_are_there() -> None:
    assert general_documents().keys() == PARTS
    for part, documents in general_documents().items():
        assert len(documents) >= 5 and all(plain_text(document).strip() for document in documents), part


def test_every_part_is_described() -> None:
    """README.md says where each comes from, under which licence."""
    readme = (FOLDER / "README.md").read_text()
    assert all(part in readme for part in PARTS)


@pytest.mark.parametrize("tokens", [4096, 16384])
def test_every_part_is_in_a_cut(tokens: int) -> None:
    ids = cut(tokens)
    assert ids.shape == (tokens // 512, 512)
    tokenizer = texts.load_tokenizer(DEMO)
    text = " ".join(map(str, ids.flatten().tolist()))
    for part, documents in general_documents().items():
        first = tokenizer(plain_text(documents[0]))["input_ids"][:40]
        assert " ".join(map(str, first)) in text, part


def test_no_document_is_there_twice() -> None:
    lines = [line for path in FOLDER.glob("*.jsonl") for line in path.read_text().splitlines()]
    assert len(lines) == len(set(lines)) and all(json.loads(line) for line in lines)


def test_more_than_there_is() -> None:
    """Fewer tokens than asked for, none twice."""
    most = cut(10**6)
    assert 10_000 < most.numel() < 10**6 and len(torch.unique(most, dim=0)) == len(most)


def test_fewer_than_a_sequence() -> None:
    assert cut(100).shape == (0, 512)


def test_another_models_tokenizer() -> None:
    with pytest.raises(TokenizerError, match="belong to another model"):
        general_tokens(DEMO, tokens=512, length=64, vocab_size=3)
