"""One model that several processes write: which of them writes what, and what each calls its own files."""

from __future__ import annotations

import heapq
import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import TypeVar

from qmerge.errors import RecipeError

Name = TypeVar("Name", bound=Hashable)

MOST_PARTS = 99_999
"""As many as five digits can number."""


@dataclass(frozen=True, order=True)
class Part:
    """Part ``number``, from 1, of a model that ``count`` processes write."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def share(self, sizes: Mapping[Name, int]) -> set[Name]:
        """The items of this part. Every process computes the same shares: each item is in one of them.

        Args:
            sizes: item → bytes. The largest item goes first, each to the part that has least so far.
        """
        loads = [(0, number) for number in range(1, self.count + 1)]  # a heap: the part with the least bytes is on top
        mine = set()
        for name in sorted(sizes, key=lambda name: -sizes[name]):  # equal sizes stay in their order
            load, number = loads[0]
            heapq.heapreplace(loads, (load + sizes[name], number))
            if number == self.number:
                mine.add(name)
        return mine


def read_part(text: str) -> Part:
    """``2/8`` → part 2 of 8.

    Raises:
        RecipeError: it is not two such numbers.
    """
    match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
    if match:
        part = Part(int(match[1]), int(match[2]))
        if 1 <= part.number <= part.count:
            return part
    raise RecipeError(
        f"--shard {text}: expected i/n, the number of this part and that of all parts, from 1/n to n/n (at most {MOST_PARTS})"
    )


def name_of_part(name: str, part: Part | None) -> str:
    """The name of a part's own file: ``.qmerge.lock`` → ``.qmerge-00002-of-00008.lock``; the same name without a part."""
    if part is None:
        return name
    path = PurePath(name)
    return f"{path.stem}-{part.number:05d}-of-{part.count:05d}{path.suffix}"


def part_of_name(name: str, whole: str) -> Part | None:
    """The part that ``name_of_part`` gives this name to; None for any other name.

    Args:
        whole: the name of the file without a part.
    """
    match = re.search(r"-(\d{5})-of-(\d{5})\.", name)
    if match is None:
        return None
    part = Part(int(match[1]), int(match[2]))
    return part if name == name_of_part(whole, part) else None
