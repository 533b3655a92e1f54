"""A few merges in one process leave nothing; ``python -m tests.run.soak`` does 200."""

from __future__ import annotations

import random
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from .soak import WORK, Sample, Site, main, problems, slope

WARM = Sample(memory=500_000_000, files=9, threads=4, temporary=())


def test_leaks_are_found() -> None:
    """The control: whatever grows is a problem."""
    assert problems(WARM, [replace(WARM, memory=501_000_000)]) == []
    assert "5.0 MB per merge" in problems(WARM, [WARM, replace(WARM, memory=510_000_000)])[0]
    assert problems(WARM, [replace(WARM, files=10)]) == ["1 more open files"]
    assert problems(WARM, [replace(WARM, threads=6)]) == ["2 more threads"]
    assert "left" in problems(WARM, [replace(WARM, temporary=("left",))])[0]


@pytest.mark.parametrize("leaked", [0, 1])
def test_exit_code(leaked: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """1 where each merge leaves a file open."""
    samples = [replace(WARM, files=WARM.files + leaked * number) for number in range(4 * len(WORK))]
    monkeypatch.setattr(Site, "build", lambda _: None)
    monkeypatch.setattr(Site, "samples", lambda _, merges: samples[:merges])
    monkeypatch.setattr("sys.argv", ["soak", "--merges", str(len(samples))])
    with pytest.raises(SystemExit, match=r"^1$") if leaked else nullcontext():
        main()
    assert ("a leak: 16 more open files" in capsys.readouterr().out) == bool(leaked)


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
