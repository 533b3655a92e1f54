"""Damaged inputs: every reader returns, or raises one of qmerge's errors, in bounded time and memory."""

from __future__ import annotations

import contextlib
import resource
import time
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmerge.errors import QmergeError

from .readers import READERS

CORPUS = Path(__file__).parent / "corpus"

SECONDS = 5.0
"""CPU time of one input; ordinary ones take milliseconds."""

MEMORY = 300_000
"""kB that all examples of a reader may add."""

EXAMPLES = 60
"""Damaged inputs of each reader; ``MANY`` in the slow tests."""

MANY = 3000


def check(name: str, content: bytes) -> None:
    started = time.process_time()
    with contextlib.suppress(QmergeError):
        READERS[name].run(content)
    assert time.process_time() - started < SECONDS


def check_many(name: str, examples: int) -> None:
    # The same ones in every run; the fuzzer looks for new ones.
    @settings(
        max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True
    )
    @given(st.integers(0, 2**32))
    def damaged_inputs(seed: int) -> None:
        random = Random(seed)
        reader = READERS[name]
        check(name, reader.damaged(random.choice(reader.seeds()), random))

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    damaged_inputs()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY


@pytest.mark.parametrize("name", READERS)
def test_good_inputs_are_read(name: str) -> None:
    """The control. (The files that an index names are missing.)"""
    for content in READERS[name].seeds():
        if name == "index":
            with pytest.raises(QmergeError, match="which is not in"):
                READERS[name].run(content)
        else:
            READERS[name].run(content)


@pytest.mark.parametrize("name", READERS)
def test_damaged_inputs(name: str) -> None:
    check_many(name, EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_damaged_inputs(name: str) -> None:
    check_many(name, MANY)


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_inputs_that_were_found_before(path: Path) -> None:
    check(path.parent.name, path.read_bytes())
