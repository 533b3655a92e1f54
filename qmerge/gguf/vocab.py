"""tokenizer.json → the tokenizer keys of a GGUF file.

llama.cpp has two tokenizers that matter here: ``gpt2``, byte-level BPE, whose way of splitting text into words it knows
only by name (``tokenizer.ggml.pre``); and ``llama``, SentencePiece's BPE, which merges by score instead of by a list.
A name is chosen only where llama.cpp (src/llama-vocab.cpp) does under it what the tokenizer does; scores are derived
from the list of merges only where both give the same result. Anything else is refused, never guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from qmerge.checkpoint.scan import read_json
from qmerge.errors import CheckpointError, RecipeError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Token types (gguf.TokenType)."""

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
KNOWN: dict[tuple[tuple[str, ...], bool], str] = {
    (("split " + LLAMA3, "bytes"), True): "llama-bpe",
    (("split " + LLAMA3, "bytes"), False): "smaug-bpe",
    (("split " + QWEN2, "bytes"), False): "qwen2",
    (("split " + TEKKEN, "bytes"), True): "tekken",
    (("words and bytes",), False): "gpt-2",
    (("digits", "words and bytes"), False): "smollm",
}
"""(steps of the pre-tokenizer, whether words in the vocabulary skip the merges) → tokenizer.ggml.pre."""

SPACE = "\u2581"
FIXED_SCORES = {CONTROL: -1000.0, USER_DEFINED: -1000.0, UNUSED: -10000.0, UNKNOWN: 0.0, BYTE: 0.0}
"""Scores of tokens that are not merged (llama.cpp's converter)."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer keys. ``special`` is a gguf.SpecialVocab: special ids, what is added to a text, chat template."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    special: Any
    scores: list[float] | None = None
    space_prefix: bool | None = None
    notes: tuple[str, ...] = ()

    def add_to(self, writer: Any) -> None:
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        if self.space_prefix is not None:
            writer.add_add_space_prefix(self.space_prefix)
        self.special.add_to_gguf(writer, quiet=True)


def read_vocabulary(gguf: Any, folder: Path, size: int, pre: str | None) -> Vocabulary:
    """The tokenizer of a folder, for an embedding of ``size`` rows.

    Raises:
        CheckpointError: there is no tokenizer.json, or llama.cpp has no tokenizer that does the same.
        RecipeError: the name of the pre-tokenizer is not known, and ``pre`` not given (or given for nothing).
    """
    tokenizer = read_tokenizer(folder)
    try:
        byte_level = any(step.get("type") == "ByteLevel" for step in steps(tokenizer.get("pre_tokenizer")))
        check_model(tokenizer["model"], byte_level)
        tokens, types = listed_tokens(tokenizer, size)
        special = special_tokens(gguf, folder, tokenizer, size, byte_level)
        notes = remarks(tokenizer, special)
        if byte_level:
            name = pre or pre_name(tokenizer)
            if name is None:
                raise RecipeError(
                    "tokenizer.json splits text in a way that is not known here: give the name that llama.cpp has for it "
                    "(get_vocab_base_pre in its converter lists them) with --pre NAME"
                )
            return Vocabulary("gpt2", name, tokens, types, special, notes=notes)
        if pre is not None:
            raise RecipeError(
                f"--pre {pre}: only byte-level tokenizers have a pre-tokenizer, this is a SentencePiece one"
            )
        if "unk" in special.special_token_ids:
            types[special.special_token_ids["unk"]] = UNKNOWN
        scores = scores_of(tokenizer["model"], tokens, types)
        return Vocabulary("llama", "default", tokens, types, special, scores, space_prefix(tokenizer), notes)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as cause:
        raise CheckpointError(
            f"tokenizer.json of {folder} is not as the tokenizers library writes it: {cause!r}"
        ) from cause


def read_tokenizer(folder: Path) -> dict[str, Any]:
    if not (folder / "tokenizer.json").is_file():
        there = "tokenizer.model alone" if (folder / "tokenizer.model").is_file() else "no tokenizer"
        raise CheckpointError(
            f"{folder} has {there}: expected tokenizer.json (AutoTokenizer.from_pretrained(…).save_pretrained(…) writes it)"
        )
    return read_json(folder / "tokenizer.json", CheckpointError)


def check_model(model: Mapping[str, Any], byte_level: bool) -> None:
    if model["type"] != "BPE" or (not byte_level and not model.get("byte_fallback")):
        raise CheckpointError(
            f"the tokenizer is a {model['type']} model, neither byte-level BPE nor SentencePiece BPE with byte fallback: "
            f"not exported here; llama.cpp's convert_hf_to_gguf.py may know it"
        )
    odd = [name for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    if odd or not model["merges"]:
        raise CheckpointError(f"tokenizer.json: {odd[0] if odd else 'no merges'}: llama.cpp has no such tokenizer")


def listed_tokens(tokenizer: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Text and type of every id; rows of the embedding that no token has are filled up, as llama.cpp's converter does."""
    tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    vocabulary = tokenizer["model"]["vocab"]
    added = tokenizer.get("added_tokens") or []
    largest = max([*vocabulary.values(), *(token["id"] for token in added)])
    if largest >= size:
        raise CheckpointError(f"the tokenizer has ids up to {largest}, but the embedding has {size} rows")
    fallback = bool(tokenizer["model"].get("byte_fallback"))
    for text, i in vocabulary.items():
        tokens[i], types[i] = text, BYTE if fallback and re.fullmatch(r"<0x[0-9A-F]{2}>", text) else NORMAL
    for token in added:
        text, i = token["content"], token["id"]
        tokens[i], types[i] = text, CONTROL if token.get("special") or looks_special(text) else USER_DEFINED
    return tokens, types


def looks_special(text: str) -> bool:
    """Added tokens that are meant to be control tokens though not marked so (llama.cpp's does_token_look_special)."""
    ends = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        text.startswith(start) and text.endswith(end) for start, end in ends
    )


def special_tokens(gguf: Any, folder: Path, tokenizer: Mapping[str, Any], size: int, byte_level: bool) -> Any:
    """Special ids and chat template by the gguf package; what is added to a text is said in any case, because llama.cpp
    has defaults of its own for every pre-tokenizer."""
    special = gguf.SpecialVocab(folder, load_merges=byte_level, n_vocab=size)
    first, last = surrounded(tokenizer)
    for kind, added in (("bos", first), ("eos", last)):
        known = special.special_token_ids.get(kind)
        special.add_special_token.setdefault(kind, added is not None and added == known)
        if added is not None and added != known:
            raise CheckpointError(
                f"the tokenizer puts token {added} {'before' if kind == 'bos' else 'after'} a text, which is not its "
                f"{kind} token ({known}): llama.cpp adds no other"
            )
    return special


def surrounded(tokenizer: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """The token that is put before a text and the one after it, by trying."""
    from tokenizers import Tokenizer

    try:
        loaded = Tokenizer.from_str(json.dumps(tokenizer))
        plain, full = (loaded.encode("a", add_special_tokens=special).ids for special in (False, True))
    except Exception as cause:  # the library raises bare Exceptions
        raise CheckpointError(f"the tokenizers library does not load tokenizer.json: {cause}") from cause
    for before in range(len(full) - len(plain) + 1):
        after = len(full) - len(plain) - before
        if full[before : before + len(plain)] == plain and before <= 1 and after <= 1:
            return full[0] if before else None, full[-1] if after else None
    raise CheckpointError("the tokenizer puts more than one token before or after a text: llama.cpp adds no more")


def remarks(tokenizer: Mapping[str, Any], special: Any) -> tuple[str, ...]:
    notes = []
    stripping = [t["content"] for t in tokenizer.get("added_tokens") or [] if t.get("lstrip") or t.get("rstrip")]
    if stripping:
        notes.append(f"{stripping[0]} strips the spaces beside it, which a GGUF file cannot say")
    if "eos" not in special.special_token_ids:
        notes.append("no end-of-text token is known (eos_token in tokenizer_config.json): llama.cpp would guess one")
    return tuple(notes)


# --- byte-level BPE --------------------------------------------------------------------------------------------------


def steps(part: Any) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, sequences unrolled."""
    if part is None:
        return
    if part.get("type") == "Sequence":
        for inner in part.get("pretokenizers") or part.get("normalizers") or []:
            yield from steps(inner)
    else:
        yield part


def pre_name(tokenizer: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for the way text is split, None where it is not one of the known ones.

    Unicode normalization (Qwen's NFC) is no part of it: llama.cpp does none.
    """
    if any(step["type"] != "NFC" for step in steps(tokenizer.get("normalizer"))):
        return None
    found = tuple(step_name(step) for step in steps(tokenizer["pre_tokenizer"]))
    return KNOWN.get((found, bool(tokenizer["model"].get("ignore_merges"))))


def step_name(step: Mapping[str, Any]) -> str:
    names: dict[str, Callable[[], str]] = {
        "Split": lambda: f"split {step['pattern'].get('Regex')}",
        "Digits": lambda: "digits" if step["individual_digits"] else "",
        "ByteLevel": lambda: "words and bytes" if step.get("use_regex", True) else "bytes",
    }
    plain = not step.get("add_prefix_space") and not step.get("invert")
    plain = plain and step.get("behavior", "Isolated") == "Isolated"
    return names[step["type"]]() if plain and step["type"] in names else ""


# --- SentencePiece's BPE ---------------------------------------------------------------------------------------------


def space_prefix(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text; refuses what is not SentencePiece's way with spaces."""
    prefix, replaced = False, False
    for step in [*steps(tokenizer.get("normalizer")), *steps(tokenizer.get("pre_tokenizer"))]:
        if step["type"] == "Prepend" and step["prepend"] == SPACE:
            prefix = True
        elif step["type"] == "Replace" and (step["pattern"], step["content"]) == ({"String": " "}, SPACE):
            replaced = True
        elif step["type"] == "Metaspace" and step["replacement"] == SPACE and not step.get("split", True):
            prefix, replaced = step.get("prepend_scheme") != "never", True
        elif not (step["type"] == "Split" and step["pattern"] == {"String": " "} and replaced):  # nothing left to split
            raise CheckpointError(f"tokenizer.json: llama.cpp has no step {step['type']} in a SentencePiece tokenizer")
    if not replaced:
        raise CheckpointError(f"tokenizer.json: spaces do not become {SPACE}, as in a SentencePiece tokenizer")
    return prefix


def scores_of(model: Mapping[str, Any], tokens: list[str], types: list[int]) -> list[float]:
    """A score for every token such that merging the best-scored pair is merging by the list.

    That holds when the list goes through the tokens one after the other, and has every pair that makes a token: then a
    pair's place in the list is a function of the token it makes. SentencePiece's own scores are these places, counted
    downwards. Runs of one character (spaces) may share a place, where that gives the same pieces of every run.

    Raises:
        CheckpointError: it does not hold.
    """
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    place, scattered = places(merges, set())
    runs = {text[0] for text in scattered if len(set(text)) == 1}
    place, scattered = places(merges, runs) if scattered else (place, scattered)
    if scattered:
        raise CheckpointError(
            f"tokenizer.json: the merges that make {min(scattered)!r} do not follow each other: no scores do the same"
        )
    for character in runs:
        check_runs(character, merges, place)
    check_complete(set(merges), {text for text, type in zip(tokens, types, strict=True) if type == NORMAL})
    scores, rest = [], len(place)
    for text, type in zip(tokens, types, strict=True):
        scores.append(FIXED_SCORES.get(type, -float(place.get(text, rest))))
        rest += type == NORMAL and text not in place
    return scores


def places(merges: list[tuple[str, ...]], runs: set[str]) -> tuple[dict[str, int], set[str]]:
    """Token → its place among the tokens that merges make, and the tokens whose merges do not follow each other; runs of
    these characters have one place together."""
    place: dict[str, int] = {}
    seen: dict[str, int] = {}
    scattered, last = set(), ""
    for pair in merges:
        made = "".join(pair)
        group = made[0] if made[0] in runs and len(set(made)) == 1 else made
        if group in seen and group != last:
            scattered.add(made)
        place[made] = seen.setdefault(group, len(seen))
        last = group
    return place, scattered


def check_runs(character: str, merges: list[tuple[str, ...]], place: Mapping[str, int]) -> None:
    """Runs of a character must fall into the same pieces by the list and by places (the leftmost of equals first)."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    longest = max(len(text) for text in place if set(text) == {character})
    for length in range(2, 2 * longest + 2):
        by_list = merged([character] * length, lambda left, right: ranks.get((left, right)))
        if by_list != merged([character] * length, lambda left, right: place.get(left + right)):
            raise CheckpointError(f"tokenizer.json: no scores split {length} times {character!r} as its merges do")


def merged(pieces: list[str], rank: Callable[[str, str], int | None]) -> list[str]:
    """Merge the neighbours of the lowest rank, the leftmost first, until none has any."""
    while True:
        ranked = [(r, i) for i, pair in enumerate(pairwise(pieces)) if (r := rank(*pair)) is not None]
        if not ranked:
            return pieces
        i = min(ranked)[1]
        pieces = [*pieces[:i], pieces[i] + pieces[i + 1], *pieces[i + 2 :]]


def check_complete(merges: set[tuple[str, ...]], texts: set[str]) -> None:
    for text in texts:
        for cut in range(1, len(text)):
            pair = text[:cut], text[cut:]
            if pair not in merges and pair[0] in texts and pair[1] in texts:
                raise CheckpointError(
                    f"tokenizer.json: {pair[0]!r} and {pair[1]!r} are tokens and so is {text!r}, but they are not merged; "
                    f"llama.cpp's SentencePiece tokenizer would merge them"
                )
