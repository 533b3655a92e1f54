"""tokenizer.json → the tokenizer keys of a GGUF file.

llama.cpp does not read tokenizer.json: it has its own tokenizers. Two of them matter here: ``gpt2``, byte-level BPE
(``byte_level.py``), and ``llama``, SentencePiece's BPE (``sentencepiece.py``). A tokenizer for which llama.cpp would give other
tokens is refused; nothing is guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmerge.errors import CheckpointError, RecipeError
from qmerge.gguf.byte_level import pre_tokenizer_name
from qmerge.gguf.sentencepiece import puts_space_first, scores_of
from qmerge.gguf.token_types import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from qmerge.gguf.tokenizer_file import SAVE_AGAIN, TokenizerFile, check_model, read_tokenizer

BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")

SPECIAL_TEXTS = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
SPECIAL_ENDS = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
"""Added tokens that are control tokens though not marked so (``does_token_look_special`` in llama.cpp's converter)."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The tokenizer keys.

    model         ``gpt2`` or ``llama``
    pre           llama.cpp's name for the way that text is split before merging
    special       gguf.SpecialVocab: special ids, tokens that are added to a text, chat template
    scores        of every token; SentencePiece only
    space_prefix  whether a space goes before a text; SentencePiece only
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    special: Any
    scores: list[float] | None = None
    space_prefix: bool | None = None
    notes: tuple[str, ...] = ()

    def add_to(self, writer: Any) -> None:
        """Add all keys to a gguf.GGUFWriter."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        if self.space_prefix is not None:
            writer.add_add_space_prefix(self.space_prefix)
        self.special.add_to_gguf(writer, quiet=True)

    def describe(self) -> str:
        """``gpt2, llama-bpe, 128256 tokens``."""
        return f"{self.model}, {self.pre}, {len(self.tokens)} tokens"


def read_vocabulary(gguf: Any, folder: Path, size: int, pre: str | None) -> Vocabulary:
    """The tokenizer of a folder, for an embedding of ``size`` rows.

    Args:
        gguf: the gguf package.
        pre: llama.cpp's name of the pre-tokenizer, for a byte-level tokenizer that qmerge does not know.

    Raises:
        CheckpointError: no tokenizer.json, or llama.cpp has no tokenizer that gives the same tokens.
        RecipeError: ``pre`` is needed and missing, or has no meaning for this tokenizer.
    """
    tokenizer = read_tokenizer(folder)
    try:
        check_model(tokenizer)
        tokens, types = tokens_and_types(tokenizer, size)
        special = special_tokens(gguf, folder, tokenizer, size)
        notes = tokenizer_notes(tokenizer, special)
        if tokenizer.is_byte_level:
            name = pre or known_pre_tokenizer(tokenizer)
            return Vocabulary(model="gpt2", pre=name, tokens=tokens, types=types, special=special, notes=notes)
        check_no_pre(pre)
        # The list of added tokens does not say which one stands for unknown text.
        if "unk" in special.special_token_ids:
            types[special.special_token_ids["unk"]] = UNKNOWN
        scores = scores_of(tokenizer, tokens, types)
        return Vocabulary(
            model="llama", pre="default", tokens=tokens, types=types, special=special, scores=scores,
            space_prefix=puts_space_first(tokenizer), notes=notes,
        )  # fmt: skip
    # The file has no schema to check it against: any of these means that a part is not as expected.
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as cause:
        raise CheckpointError(
            f"{folder}: tokenizer.json is not as the tokenizers library writes it ({cause!r}); {SAVE_AGAIN}"
        ) from cause


def known_pre_tokenizer(tokenizer: TokenizerFile) -> str:
    """llama.cpp's name for the pre-tokenizer, or RecipeError: only the user may know it."""
    name = pre_tokenizer_name(tokenizer)
    if name is None:
        raise RecipeError(
            "tokenizer.json splits text in a way that qmerge does not know: give llama.cpp's name for it with --pre NAME "
            "(get_vocab_base_pre in its converter lists the names)"
        )
    return name


def check_no_pre(pre: str | None) -> None:
    """Raise RecipeError where ``--pre`` is given for a SentencePiece tokenizer."""
    if pre is not None:
        raise RecipeError(
            f"--pre {pre}: only byte-level tokenizers have a pre-tokenizer, and this is a SentencePiece tokenizer; leave it out"
        )


# --- tokens ----------------------------------------------------------------------------------------------------------


def tokens_and_types(tokenizer: TokenizerFile, size: int) -> tuple[list[str], list[int]]:
    """Text and type of every id. Rows of the embedding without a token get the names that llama.cpp's converter gives them."""
    vocabulary: Mapping[str, int] = tokenizer.model["vocab"]
    check_ids(tokenizer, size)
    tokens = [f"[PAD{token_id}]" for token_id in range(size)]
    types = [UNUSED] * size
    has_bytes = bool(tokenizer.model.get("byte_fallback"))
    for text, token_id in vocabulary.items():
        is_byte = has_bytes and BYTE_TOKEN.fullmatch(text)
        tokens[token_id] = text
        types[token_id] = BYTE if is_byte else NORMAL
    for token in tokenizer.added_tokens:
        is_control = token.get("special") or looks_special(token["content"])
        tokens[token["id"]] = token["content"]
        types[token["id"]] = CONTROL if is_control else USER_DEFINED
    return tokens, types


def check_ids(tokenizer: TokenizerFile, size: int) -> None:
    """Raise CheckpointError where a token has no row in an embedding of this size."""
    largest = max(tokenizer.model["vocab"].values(), default=-1)
    for token in tokenizer.added_tokens:
        largest = max(largest, token["id"])
    if largest >= size:
        raise CheckpointError(
            f"tokenizer.json has ids up to {largest}, but the embedding has {size} rows: use the tokenizer of this model"
        )


def looks_special(text: str) -> bool:
    """Whether an added token is a control token by its text."""
    if text in SPECIAL_TEXTS:
        return True
    return any(text.startswith(start) and text.endswith(end) for start, end in SPECIAL_ENDS)


# --- special tokens --------------------------------------------------------------------------------------------------


def special_tokens(gguf: Any, folder: Path, tokenizer: TokenizerFile, size: int) -> Any:
    """Special ids and chat template as the gguf package reads them, and whether a token goes before and after a text.

    The last two are always written, because llama.cpp has its own default for every pre-tokenizer.

    Raises:
        CheckpointError: the tokenizer adds other tokens to a text than its bos and eos tokens.
    """
    special = gguf.SpecialVocab(folder, load_merges=tokenizer.is_byte_level, n_vocab=size)
    first, last = added_to_text(tokenizer)
    _set_added(special, "bos", first, "before")
    _set_added(special, "eos", last, "after")
    return special


def _set_added(special: Any, kind: str, added: int | None, where: str) -> None:
    known = special.special_token_ids.get(kind)
    # setdefault: a setting in tokenizer_config.json wins, as in llama.cpp's converter.
    special.add_special_token.setdefault(kind, added is not None and added == known)
    if added is not None and added != known:
        raise CheckpointError(
            f"the tokenizer puts token {added} {where} a text, but its {kind} token is {known}: llama.cpp adds no other token; "
            f"it cannot be exported"
        )


def added_to_text(tokenizer: TokenizerFile) -> tuple[int | None, int | None]:
    """The ids that the tokenizer puts before and after a text, found by trying; None for none."""
    from tokenizers import Tokenizer

    try:
        loaded = Tokenizer.from_str(json.dumps(tokenizer.content))
        plain = loaded.encode("a", add_special_tokens=False).ids
        full = loaded.encode("a", add_special_tokens=True).ids
    except Exception as cause:  # the library raises bare Exceptions
        raise CheckpointError(f"the tokenizers library cannot load tokenizer.json: {cause}") from cause
    # The tokens of the text itself are somewhere in the full list; the others were added.
    added_count = len(full) - len(plain)
    for before in range(added_count + 1):
        after = added_count - before
        if full[before : before + len(plain)] == plain and before <= 1 and after <= 1:
            first = full[0] if before else None
            last = full[-1] if after else None
            return first, last
    raise CheckpointError(
        "the tokenizer puts more than one token before or after a text, and llama.cpp adds one at most; it cannot be exported"
    )


def tokenizer_notes(tokenizer: TokenizerFile, special: Any) -> tuple[str, ...]:
    """Differences in llama.cpp that do not make an export wrong, for the user to know."""
    notes = []
    for token in tokenizer.added_tokens:
        if token.get("lstrip") or token.get("rstrip"):
            notes.append(f"{token['content']} strips the spaces next to it, and a GGUF file cannot store that")
            break  # one example is enough
    if "eos" not in special.special_token_ids:
        notes.append(
            "eos_token is missing in tokenizer_config.json: llama.cpp will guess where an answer ends; set it there"
        )
    return tuple(notes)
