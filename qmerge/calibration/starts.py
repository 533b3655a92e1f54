"""What generated text starts from: nothing, an open turn of the user, a question, the beginning of a general text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qmerge.calibration import texts
from qmerge.calibration.documents import Document
from qmerge.calibration.general import general_documents

START_SHARES: Mapping[str, float] = {
    "nothing": 0.25,  # the start-of-text token alone
    "user turn": 0.25,  # the chat template up to the user's words: the model writes a question, then the answer
    "question": 0.125,  # a question of the general text, in the chat template: the model writes the answer
    "beginning": 0.375,  # the first tokens of a document of the general text
}
"""Shares of the sequences by what they start from. Kinds that a tokenizer does not allow are left out."""

BEGINNING_TOKENS = (16, 32)
"""A document of the general text gives a number of tokens between these two."""

USER_WORDS = "QMERGE-USER-WORDS"
"""Put into a chat template, to find what it writes before and after the user's words."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """What one text starts from.

    ids      its first token ids, which are given
    is_chat  the text ends with the assistant's turn, and another one follows
    reply    token ids that are given once the model has ended the user's turn: they begin the assistant's
    """

    ids: Sequence[int]
    is_chat: bool = False
    reply: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True)
class Starts:
    """All starts of a tokenizer.

    by_kind   kind, as in ``START_SHARES`` → starts; none is empty
    turn_end  id that ends a turn of a chat; None without a chat template
    """

    by_kind: Mapping[str, Sequence[Start]]
    turn_end: int | None

    def for_sequences(self, count: int, random: torch.Generator) -> list[Iterator[Start]]:
        """Per sequence, its start and the starts of the texts that follow in it. Sequences of a kind follow one another."""
        shares = [START_SHARES[kind] for kind in self.by_kind]
        endless = [_endless(starts, random) for starts in self.by_kind.values()]
        chosen = []
        for number in range(count):
            position = (number + 0.5) / count * sum(shares)
            kind = 0
            while position > shares[kind]:
                position -= shares[kind]
                kind += 1
            chosen.append(endless[kind])
        return chosen


def _endless(starts: Sequence[Start], random: torch.Generator) -> Iterator[Start]:
    """All starts in random order, again and again."""
    while True:
        for number in torch.randperm(len(starts), generator=random).tolist():
            yield starts[number]


def find_starts(tokenizer_folder: Path, *, vocab_size: int, seed: int) -> Starts:
    """The starts that a tokenizer allows.

    Args:
        vocab_size: number of token ids that the model knows.
        seed: of the lengths of beginnings.

    Raises:
        TokenizerError: the tokenizer cannot be loaded, or makes tokens that the model does not know.
    """
    tokenizer = texts.load_tokenizer(tokenizer_folder)
    documents = [document for part in general_documents().values() for document in part]
    by_kind: dict[str, Sequence[Start]] = {}
    first_id = tokenizer.bos_token_id
    if first_id is None:  # texts are separated by the end-of-text token, so the next one starts after it
        first_id = tokenizer.eos_token_id
    if first_id is not None:
        by_kind["nothing"] = [Start(ids=[first_id])]
    chat = _ChatTemplate.of(tokenizer)
    if chat:
        by_kind["user turn"] = [Start(ids=chat.before_user, is_chat=True, reply=chat.reply)]
        by_kind["question"] = [Start(ids=chat.question(words), is_chat=True) for words in _questions(documents)]
    by_kind["beginning"] = _beginnings(tokenizer, documents, seed)
    # A tokenizer may make nothing of a text in a script that it does not know.
    by_kind = {kind: [start for start in starts if start.ids] for kind, starts in by_kind.items()}
    by_kind = {kind: starts for kind, starts in by_kind.items() if starts}
    for starts in by_kind.values():
        for start in starts:
            texts.check_vocabulary([*start.ids, *start.reply], vocab_size, tokenizer_folder)
    return Starts(by_kind=by_kind, turn_end=chat.turn_end if chat else None)


def _questions(documents: Sequence[Document]) -> list[str]:
    return [str(document[0]["content"]) for document in documents if isinstance(document, list)]


def _beginnings(tokenizer: Any, documents: Sequence[Document], seed: int) -> list[Start]:
    random = torch.Generator().manual_seed(seed)
    least, most = BEGINNING_TOKENS
    starts = []
    for document in documents:
        if isinstance(document, str):
            length = int(torch.randint(least, most + 1, (1,), generator=random))
            starts.append(Start(ids=tokenizer(document)["input_ids"][:length]))
    return starts


@dataclass(frozen=True, kw_only=True)
class _ChatTemplate:
    """The parts of a chat template.

    before_user  token ids before the user's words
    turn_end     the token that ends the user's turn
    reply        token ids between ``turn_end`` and the assistant's words
    """

    tokenizer: Any
    before_user: Sequence[int]
    turn_end: int
    reply: Sequence[int]

    @classmethod
    def of(cls, tokenizer: Any) -> _ChatTemplate | None:
        """None without a template, and for one that ends the user's turn with no special token."""
        if not tokenizer.chat_template:
            return None
        try:
            text = _rendered(tokenizer, USER_WORDS)
        except Exception:  # a template may raise anything; without it, the other starts are left
            return None
        before, _, after = text.partition(USER_WORDS)
        before_ids = tokenizer(before, add_special_tokens=False)["input_ids"]
        after_ids = tokenizer(after, add_special_tokens=False)["input_ids"]
        # An ordinary token (a line break, say) would also occur within the user's words.
        if not before_ids or not after_ids or after_ids[0] not in tokenizer.added_tokens_decoder:
            return None
        return cls(tokenizer=tokenizer, before_user=before_ids, turn_end=after_ids[0], reply=after_ids[1:])

    def question(self, words: str) -> list[int]:
        """Token ids up to the assistant's words."""
        return list(self.tokenizer(_rendered(self.tokenizer, words), add_special_tokens=False)["input_ids"])


def _rendered(tokenizer: Any, words: str) -> str:
    messages = [{"role": "user", "content": words}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
