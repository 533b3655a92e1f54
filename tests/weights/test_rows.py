"""Which rows of a weight are read at a time."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from qmerge.adapters.updates.peft_layer import PeftLayerUpdate
from qmerge.formats._bnb4bit_find import Bnb4bitOptions
from qmerge.weights.blocks import AMPLE_ENTRIES, CACHED_ENTRIES, entries_per_block
from qmerge.weights.rows import row_blocks, sampled_rows

SHAPE = (40, 16)


def step(*, conv1d: bool = False, whole: bool | None = None, nf4: bool = False, stack: bool = False) -> Any:
    """``whole``: of the update; None: there is none. In NF4, blocks of 64 values take 4 rows."""
    name, options = ("nf4", Bnb4bitOptions()) if nf4 else ("bf16", None)
    weight = SimpleNamespace(format="bf16", shape=(5, 16, 8) if stack else SHAPE, options=None)
    source = SimpleNamespace(conv1d=conv1d, transposed_stack=stack, training_format=None)
    update = None if whole is None else SimpleNamespace(whole=whole)
    return SimpleNamespace(weight=weight, target=name, options=options, shape=SHAPE, source=source, update=update)


def starts(found: Any) -> list[int]:
    rows = list(found)
    assert rows[0].start == 0 and rows[-1].stop == 40
    assert all(one.stop == next_one.start for one, next_one in pairwise(rows))
    return [block.start for block in rows]


@pytest.mark.parametrize("entries", [1, 100, 16 * 15])
def test_blocks_of_rows(entries: int) -> None:
    count = max(1, entries // 16)
    assert starts(row_blocks(step(), entries)) == list(range(0, 40, count))
    assert starts(row_blocks(step(whole=False), entries)) == list(range(0, 40, count))
    assert starts(row_blocks(step(nf4=True), entries)) == list(range(0, 40, max(4, count // 4 * 4)))
    assert starts(row_blocks(step(stack=True), entries)) == list(range(0, 40, 8)), "a matrix of the stack"


@pytest.mark.parametrize("settings", [{"conv1d": True}, {"whole": True}, {"conv1d": True, "whole": True}])
def test_weights_in_one_block(settings: dict[str, bool]) -> None:
    assert starts(row_blocks(step(**settings), 1)) == [0]


def test_peft_merges_whole_layers() -> None:
    assert starts(row_blocks(step(whole=PeftLayerUpdate.whole), 1)) == [0]


@pytest.mark.parametrize(
    ("entries", "expected"), [(AMPLE_ENTRIES - 1, 1), (AMPLE_ENTRIES, 4), (AMPLE_ENTRIES + 1, 4), (9, 1)]
)
def test_blocks_of_preserve_are_larger_where_memory_is_ample(entries: int, expected: int) -> None:
    context: Any = SimpleNamespace(block_entries=entries, device=SimpleNamespace(type="cpu"))
    step: Any = SimpleNamespace(rounding="preserve")
    assert entries_per_block(step, context) == expected * entries
    step.rounding = "nearest"
    assert entries_per_block(step, context) == min(entries, CACHED_ENTRIES)


def test_a_sample_reaches_from_the_first_row_to_the_last() -> None:
    rows = sampled_rows(step(), 32)
    assert [len(block) for block in rows] == [2] * 4
    assert (rows[0].start, rows[-1].stop) == (0, 40)
    for whole in (sampled_rows(step(whole=True), 32), sampled_rows(step(), 16 * 10)):
        assert [(block.start, block.stop) for block in whole] == [(0, 40)]
    assert [block.start % 4 for block in sampled_rows(step(nf4=True), 32)] == [0, 0, 0, 0]
