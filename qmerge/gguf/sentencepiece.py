"""SentencePiece's BPE: llama.cpp merges by a score of the result, tokenizer.json by a list of pairs.

Scores are derived from the list, only where both give the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from qmerge.errors import CheckpointError
from qmerge.gguf.token_types import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from qmerge.gguf.tokenizer_file import TokenizerFile

SPACE = "\u2581"
"""The character that stands for a space in tokens."""

FIXED_SCORES = {CONTROL: -1000.0, USER_DEFINED: -1000.0, UNUSED: -10000.0, UNKNOWN: 0.0, BYTE: 0.0}
"""Token type → score of the tokens that are never merged, as in llama.cpp's converter."""

Merge = tuple[str, ...]
"""The two texts that a merge joins."""


# --- spaces ----------------------------------------------------------------------------------------------------------


def puts_space_first(tokenizer: TokenizerFile) -> bool:
    """Whether a space goes before every text.

    Raises:
        CheckpointError: text is changed or split in another way than by SentencePiece.
    """
    space_first = False
    spaces_replaced = False
    for step in [*tokenizer.normalizer_steps, *tokenizer.pre_tokenizer_steps]:
        kind = step["type"]
        if kind == "Prepend" and step["prepend"] == SPACE:
            space_first = True
        elif kind == "Replace" and _is_space_replacement(step):
            spaces_replaced = True
        elif kind == "Metaspace" and step["replacement"] == SPACE and not step.get("split", True):
            space_first = step.get("prepend_scheme") != "never"
            spaces_replaced = True
        elif kind == "Split" and step["pattern"] == {"String": " "} and spaces_replaced:
            continue  # no space is left to split at
        else:
            raise CheckpointError(
                f"tokenizer.json: llama.cpp has no step {kind} in a SentencePiece tokenizer; it cannot be exported"
            )
    if not spaces_replaced:
        raise CheckpointError(
            f"tokenizer.json: spaces are not replaced by {SPACE}, as in SentencePiece tokenizers; it cannot be exported"
        )
    return space_first


def _is_space_replacement(step: Mapping[str, Any]) -> bool:
    return bool(step["pattern"] == {"String": " "} and step["content"] == SPACE)


# --- scores ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MergeOrder:
    """The list of merges as an order of the tokens that they make.

    ``positions``  token → its position among all made tokens
    ``scattered``  tokens whose merges do not follow each other in the list, so that they have no position
    """

    positions: Mapping[str, int]
    scattered: frozenset[str]


def scores_of(tokenizer: TokenizerFile, tokens: list[str], types: list[int]) -> list[float]:
    """A score for every token, so that merging the best-scored pair first is merging by the list.

    This is possible where the list goes through the made tokens one after the other and has every pair that makes a token:
    then the position of a pair depends on the made token only. SentencePiece's own scores are these positions, counted
    downwards. Runs of one character (spaces) may share a position, where that splits every run as the list does.

    Raises:
        CheckpointError: no scores give the same tokens.
    """
    merges = _merges_of(tokenizer)
    order = merge_order(merges, frozenset())
    runs = frozenset(text[0] for text in order.scattered if len(set(text)) == 1)
    if order.scattered:
        order = merge_order(merges, runs)
    if order.scattered:
        raise CheckpointError(
            f"tokenizer.json: the merges that make {min(order.scattered)!r} do not follow each other, so no scores give the same "
            f"tokens; it cannot be exported"
        )
    for character in runs:
        check_runs(character, merges, order.positions)
    normal_texts = {text for text, type in zip(tokens, types, strict=True) if type == NORMAL}
    check_complete(set(merges), normal_texts)
    return _assign_scores(tokens, types, order.positions)


def _assign_scores(tokens: list[str], types: list[int], positions: Mapping[str, int]) -> list[float]:
    scores = []
    next_position = len(positions)  # single characters, which no merge makes, come after all others
    for text, type in zip(tokens, types, strict=True):
        position = positions.get(text, next_position)
        scores.append(FIXED_SCORES.get(type, -float(position)))
        if type == NORMAL and text not in positions:
            next_position += 1
    return scores


def _merges_of(tokenizer: TokenizerFile) -> list[Merge]:
    """The merges of the file, which older versions write as one text with a space."""
    merges = []
    for pair in tokenizer.model["merges"]:
        parts = pair if isinstance(pair, list) else pair.split(" ")
        merges.append(tuple(parts))
    return merges


def merge_order(merges: list[Merge], runs: frozenset[str]) -> MergeOrder:
    """The order of the made tokens; all runs of one of the characters ``runs`` share a position."""
    positions: dict[str, int] = {}
    scattered: set[str] = set()
    group_positions: dict[str, int] = {}
    last_group = ""
    for pair in merges:
        made = "".join(pair)
        is_run = made[0] in runs and len(set(made)) == 1
        group = made[0] if is_run else made
        if group in group_positions and group != last_group:
            scattered.add(made)
        positions[made] = group_positions.setdefault(group, len(group_positions))
        last_group = group
    return MergeOrder(positions, frozenset(scattered))


def check_runs(character: str, merges: list[Merge], positions: Mapping[str, int]) -> None:
    """Raise CheckpointError unless runs of a character split into the same tokens by the list and by positions."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    longest = max(len(text) for text in positions if set(text) == {character})
    # Twice the longest token is enough: longer runs repeat the pattern.
    for length in range(2, 2 * longest + 2):
        run = [character] * length
        by_list = apply_merges(run, lambda left, right: ranks.get((left, right)))
        by_position = apply_merges(run, lambda left, right: positions.get(left + right))
        if by_list != by_position:
            raise CheckpointError(
                f"tokenizer.json: no scores split {length} times {character!r} as its merges do; it cannot be exported"
            )


def apply_merges(texts: list[str], rank_of: Callable[[str, str], int | None]) -> list[str]:
    """Join the neighbours of the lowest rank, the leftmost first, until no two neighbours have a rank."""
    while True:
        best_rank = None
        best_index = 0
        for index, (left, right) in enumerate(pairwise(texts)):
            rank = rank_of(left, right)
            if rank is not None and (best_rank is None or rank < best_rank):
                best_rank = rank
                best_index = index
        if best_rank is None:
            return texts
        joined = texts[best_index] + texts[best_index + 1]
        texts = [*texts[:best_index], joined, *texts[best_index + 2 :]]


def check_complete(merges: set[Merge], texts: set[str]) -> None:
    """Raise CheckpointError where two tokens make a third one and no merge joins them: llama.cpp would join them."""
    for text in texts:
        for cut in range(1, len(text)):
            left = text[:cut]
            right = text[cut:]
            if left in texts and right in texts and (left, right) not in merges:
                raise CheckpointError(
                    f"tokenizer.json: {left!r}, {right!r} and {text!r} are tokens, but no merge joins the first two, and "
                    f"llama.cpp's SentencePiece tokenizer would; it cannot be exported"
                )
