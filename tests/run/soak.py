"""Many merges in one process: memory, open files, threads and temporary files after each, and what grows.

python -m tests.run.soak                  200 merges; prints the slope of memory, and what else is left; exit code 1 on a leak
python -m tests.run.soak --merges 50
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import psutil
import torch

from qmerge import run
from qmerge.errors import AdapterError
from qmerge.recipe import make_recipe

from .. import models
from ..conftest import NF4

WORK: tuple[Mapping[str, Any], ...] = (
    {"target": "nf4", "rounding": "nearest"},
    {"target": "int8", "rounding": "stochastic", "workers": 2},
    {"target": "nf4", "rounding": "preserve", "calibration": "random", "calibration_tokens": 256, "effort": "fast"},
    {"target": "gptq", "rounding": "nearest", "max_memory": "8MB"},
    {"target": "nf4", "rounding": "preserve", "calibration": "none", "effort": "fast", "residual": 2},
    {"target": "bf16", "rounding": "nearest", "max_shard_size": "60kB"},
    {"target": "nf4", "rounding": "nearest", "adapter": "wrong"},  # an error, after which nothing may be left either
    {"target": "w8a8", "rounding": "nearest"},
)
"""What is done in turn; ``Site.merge`` adds base, adapter and output."""

MOST_GROWTH = 4.0
"""MB per merge: more is a leak even in a few merges. (The model has 0.2 MB; a merge of it allocates some 10 MB.)"""


@dataclass(frozen=True)
class Sample:
    """What the process holds after a merge: bytes in memory, open files, threads, names in the folder for temporary files."""

    memory: int
    files: int
    threads: int
    temporary: tuple[str, ...]


def sample() -> Sample:
    gc.collect()
    process = psutil.Process()
    names = tuple(sorted(path.name for path in Path(tempfile.gettempdir()).iterdir()))
    return Sample(process.memory_info().rss, process.num_fds(), process.num_threads(), names)


@dataclass(frozen=True)
class Site:
    """A folder with inputs, and with ``tmp`` as the folder for temporary files."""

    path: Path

    def build(self) -> None:
        dense = models.save(models.llama(), self.path / "dense")
        models.quantize(dense, self.path / "base", **NF4)  # type: ignore[arg-type]
        models.adapter(models.llama(torch.float32), self.path / "adapter")
        models.adapter(models.llama(torch.float32, hidden_size=128), self.path / "wrong")
        (self.path / "tmp").mkdir()

    def merge(self, work: Mapping[str, Any], number: int) -> None:
        """One merge into a folder of its own, which is checked and removed."""
        adapter = self.path / work.get("adapter", "adapter")
        with tempfile.TemporaryDirectory(dir=self.path) as out:
            paths = {
                "base": str(self.path / "base"),
                "adapter": str(adapter),
                "out": f"{out}/{number}",
                "device": "cpu",
            }
            try:
                run.merge(make_recipe({**work, **paths}))
            except AdapterError:
                assert work.get("adapter") == "wrong"
            assert Path(paths["out"], "config.json").exists() != (work.get("adapter") == "wrong")

    def samples(self, merges: int) -> Iterator[Sample]:
        """What the process holds after each merge."""
        before, tempfile.tempdir = tempfile.tempdir, str(self.path / "tmp")
        try:
            for number, work in enumerate(islice(cycle(WORK), merges)):
                self.merge(work, number)
                yield sample()
        finally:
            tempfile.tempdir = before


@dataclass(frozen=True)
class Slope:
    """Growth of memory in bytes per merge, and its standard error."""

    per_merge: float
    error: float


def slope(samples: Sequence[Sample]) -> Slope:
    """By least squares over the means of whole turns through ``WORK``, which differ by what has grown only."""
    turns = [samples[start : start + len(WORK)] for start in range(0, len(samples) - len(WORK) + 1, len(WORK))]
    means = [statistics.fmean(one.memory for one in turn) for turn in turns]
    numbers = range(len(means))
    fit = statistics.linear_regression(numbers, means)
    squares = sum((mean - fit.intercept - fit.slope * number) ** 2 for number, mean in zip(numbers, means, strict=True))
    spread = statistics.pvariance(numbers) * len(means)
    error = math.sqrt(squares / (len(means) - 2) / spread) if len(means) > 2 else math.inf
    return Slope(fit.slope / len(WORK), error / len(WORK))


def problems(warm: Sample, samples: Sequence[Sample]) -> list[str]:
    """What has grown since a sample that was taken when everything had been loaded, in words."""
    last = samples[-1]
    found = []
    growth = (last.memory - warm.memory) / len(samples) / 1e6
    if growth > MOST_GROWTH:
        found.append(f"memory grows by {growth:.1f} MB per merge")
    if last.files > warm.files:
        found.append(f"{last.files - warm.files} more open files")
    if last.threads > warm.threads:
        found.append(f"{last.threads - warm.threads} more threads")
    if last.temporary != warm.temporary:
        found.append(f"temporary files: {last.temporary}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--merges", type=int, default=200)
    merges = parser.parse_args().merges
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        site = Site(Path(folder))
        site.build()
        samples = []
        for one in site.samples(merges):
            samples.append(one)
            print(f"{len(samples)}: {one.memory / 1e6:.1f} MB, {one.files} files, {one.threads} threads", flush=True)
    warm = 2 * len(WORK)  # twice through everything: caches are full, and torch has its memory
    measured = slope(samples[warm:])
    first, last = samples[warm - 1], samples[-1]
    print(
        f"\n{merges} merges, from number {warm} on: memory {measured.per_merge / 1e3:+.1f} ± {2 * measured.error / 1e3:.1f} kB "
        f"per merge (95 %), from {first.memory / 1e6:.1f} to {last.memory / 1e6:.1f} MB; open files {first.files} → "
        f"{last.files}, threads {first.threads} → {last.threads}, temporary files {len(last.temporary)}"
    )
    leaks = problems(first, samples[warm:])
    for leak in leaks:
        print(f"a leak: {leak}")
    if leaks:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
