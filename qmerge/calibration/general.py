"""The general text that ships with qmerge: prose in several languages, dialogues, code, mathematics, manual pages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmerge.calibration import texts
from qmerge.calibration.documents import Document, Exchange, read_texts
from qmerge.errors import RecipeError

FOLDER = Path(__file__).parent / "general_text"
"""One .jsonl file per part; README.md says where each comes from."""

PART_WEIGHTS: Mapping[str, float] = {"dialogues": 4, "english": 3, "code": 3, "manuals": 2, "mathematics": 2}
"""Weight of a part in a cut of the general text; every other part (a language) has 1."""


@lru_cache(maxsize=1)
def general_documents() -> Mapping[str, list[Document]]:
    """Part → its documents."""
    documents = {}
    for path in sorted(FOLDER.glob("*.jsonl")):
        documents[path.stem] = read_texts(path)
    return documents


def general_tokens(tokenizer_folder: Path, *, tokens: int, length: int, vocab_size: int) -> Tensor:
    """A cut of the general text to which every part contributes.

    Args:
        tokens: how many; fewer where the text has no more.
        length: tokens per sequence.
        vocab_size: number of token ids that the model knows.

    Returns:
        Token ids, int64 [sequences, length]; no sequence where ``tokens`` are fewer than ``length``.

    Raises:
        TokenizerError: the tokenizer cannot be loaded, or makes tokens that the model does not know.
    """
    sequences = tokens // length
    documents = general_documents()
    total_weight = sum(PART_WEIGHTS.get(part, 1) for part in documents)
    tokenizer = texts.load_tokenizer(tokenizer_folder)
    ids: list[int] = []
    for part, part_documents in documents.items():
        # Rounded up: together they are enough, and the end of the last part is cut.
        share = math.ceil(sequences * length * PART_WEIGHTS.get(part, 1) / total_weight)
        ids += _tokenize_part(tokenizer, part_documents)[:share]
    texts.check_vocabulary(ids, vocab_size, tokenizer_folder)
    sequences = min(sequences, len(ids) // length)
    return torch.tensor(ids[: sequences * length], dtype=torch.int64).view(sequences, length)


def _tokenize_part(tokenizer: Any, documents: Sequence[Document]) -> list[int]:
    try:
        return texts.tokenize_with(tokenizer, documents)
    except RecipeError:  # no chat template, or one that refuses these chats
        return texts.tokenize_with(tokenizer, [plain_text(document) for document in documents])


def plain_text(document: Document) -> str:
    """A document as text: of a chat, one paragraph per message."""
    if isinstance(document, str):
        return document
    if isinstance(document, Exchange):
        return document.text
    return "\n\n".join(str(message["content"]) for message in document)
