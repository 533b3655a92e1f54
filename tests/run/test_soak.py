"""A few merges in one process leave nothing; ``python -m tests.run.soak`` does 200."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from .soak import WORK, Sample, Site, problems, slope

WARM = Sample(memory=500_000_000, files=9, threads=4, temporary=())


def test_leaks_are_found() -> None:
    """The control: whatever grows is a problem."""
    assert problems(WARM, [replace(WARM, memory=501_000_000)]) == []
    assert "5.0 MB per merge" in problems(WARM, [WARM, replace(WARM, memory=510_000_000)])[0]
    assert problems(WARM, [replace(WARM, files=10)]) == ["1 more open files"]
    assert problems(WARM, [replace(WARM, threads=6)]) == ["2 more threads"]
    assert "left" in problems(WARM, [replace(WARM, temporary=("left",))])[0]


def test_slope_is_that_of_a_leak() -> None:
    """30 kB per merge, in samples that differ by megabytes from one kind of merge to the next."""
    noise = random.Random(0)
    samples = [
        replace(
            WARM, memory=500_000_000 + 30_000 * number + 2_000_000 * (number % len(WORK)) + noise.randrange(100_000)
        )
        for number in range(20 * len(WORK))
    ]
    found = slope(samples)
    assert abs(found.per_merge - 30_000) < 4 * found.error < 2000


@pytest.mark.slow
def test_merges_leave_nothing(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.build()
    samples = list(site.samples(len(WORK) + 6))
    assert problems(samples[len(WORK) - 1], samples[len(WORK) :]) == []
