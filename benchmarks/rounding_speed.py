"""Time of ``preserve`` on one weight against the plain matrix products that it contains, on this machine.

    python benchmarks/rounding_speed.py [--size 4096] [--runs 3]

Counts the multiplications of feedback, objectives and sweeps (as many as were really done), measures the machine's rate
on a plain product of the same size right before, and prints the ratio. Factoring the objective is timed apart: it depends on
the number of inputs alone.
"""

from __future__ import annotations

import argparse
import time

import torch

from qmerge.formats._bnb4bit_grid import Bnb4bitGrid
from qmerge.rounding import preserve
from qmerge.rounding.base import InputStatistics, RoundingContext, make_objective
from qmerge.types import Rows


def gflops(size: int) -> float:
    """Rate of a plain float32 product, the best of three."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = min(timed(lambda: a @ b) for _ in range(3))
    return 2 * size**3 / best / 1e9


def timed(work: object) -> float:
    started = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - started


class Counting:
    """Rows that took part in sweeps, so that only products that were done are counted."""

    def __init__(self) -> None:
        self.rows, self._real = 0, preserve.sweep

    def __enter__(self) -> Counting:
        def counted(
            levels_IO: torch.Tensor, rows: torch.Tensor, problem: preserve.Problem
        ) -> tuple[torch.Tensor, torch.Tensor]:
            self.rows += len(rows)
            return self._real(levels_IO, rows, problem)

        preserve.sweep = counted
        return self

    def __exit__(self, *_: object) -> None:
        preserve.sweep = self._real


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--size", type=int, default=4096)
    asked.add_argument("--runs", type=int, default=1)
    given = asked.parse_args()
    size = given.size
    torch.manual_seed(0)
    x = torch.randn(2 * size, size) * torch.logspace(0, -1.5, size)
    statistics = InputStatistics(x.T @ x / len(x), None, len(x))
    values_OI = torch.randn(size, size)
    absmax_B = values_OI.view(-1, 64).abs().amax(dim=1)
    grid = Bnb4bitGrid("nf4", 64, size, absmax_B, absmax_B)
    near_OI = grid.nearest(values_OI)
    u, v = torch.linalg.qr(torch.randn(size, 16))[0], torch.linalg.qr(torch.randn(size, 16))[0]
    s = 0.01 * size / 4 * torch.linspace(1, 0.3, 16)
    delta_OI = (u * s) @ v.T
    print("| run | GFLOP/s | objective, s | rounding, s | its products, GFLOP | ratio |\n|---|---|---|---|---|---|")
    for run in range(given.runs):
        rate = gflops(size)
        started = time.perf_counter()
        objective = make_objective(statistics, (u, s, v), size, torch.device("cpu"))
        made = time.perf_counter() - started
        context = RoundingContext(
            name="w", rows=Rows(0, size), base_codes_OI=near_OI, objective=objective, delta_OI=delta_OI
        )
        with Counting() as count:
            seconds = timed(lambda: preserve.ROUNDING.choose(grid.decode(near_OI) + delta_OI, grid, context))  # noqa: B023
        # Per order: feedback and three squared errors, half a product each (triangular), and a third of one to factor K;
        # a product for every sweep over all rows; compensation for the loss along the delta: one product, two errors.
        products = preserve.ORDERS * (0.5 * 4 + 1 / 6) + count.rows / size + 1 + 2 * 0.5
        work = 2 * size**3 * products / 1e9
        print(
            f"| {run + 1} | {rate:.0f} | {made:.1f} | {seconds:.1f} | {work:.0f} | {seconds / (work / rate):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
