"""Time of ``preserve`` on one weight, compared with the matrix products that it consists of.

    python benchmarks/rounding_speed.py [--size 4096] [--runs 1]

Measures the CPU time to round a size × size weight to NF4, and the time that the same multiplications take in plain matrix
products on this machine, measured right before; prints the ratio. The time to make the objective is in its own column: it
depends on the number of inputs alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from qmerge.formats._bnb4bit_grid import Bnb4bitGrid
from qmerge.rounding import preserve
from qmerge.rounding.base import EFFORTS, InputStatistics, Objective, RoundingContext, make_objective
from qmerge.types import Rows

BLOCK_SIZE = 64
RANK = 16
HEADER = "| run | GFLOP/s | objective, s | rounding, s | its products, GFLOP | ratio |\n|---|---|---|---|---|---|"


class Example:
    """A random weight on the grid of NF4, a delta of rank 16, and inputs whose strength falls over the columns."""

    def __init__(self, size: int) -> None:
        self.size = size
        inputs = torch.randn(2 * size, size) * torch.logspace(0, -1.5, size)
        self.statistics = InputStatistics(inputs.T @ inputs / len(inputs), None, len(inputs))
        values_OI = torch.randn(size, size)
        absmax_B = values_OI.view(-1, BLOCK_SIZE).abs().amax(dim=1)
        self.grid = Bnb4bitGrid(
            quant_type="nf4",
            block_size=BLOCK_SIZE,
            columns=size,
            absmax_B=absmax_B,
            rounding_absmax_B=absmax_B,
        )
        self.base_codes_OI = self.grid.nearest(values_OI)
        u_OR = torch.linalg.qr(torch.randn(size, RANK)).Q
        v_IR = torch.linalg.qr(torch.randn(size, RANK)).Q
        s_R = 0.01 * size / 4 * torch.linspace(1, 0.3, RANK)
        self.directions = (u_OR, s_R, v_IR)
        self.delta_OI = (u_OR * s_R) @ v_IR.T

    def make_objective(self) -> Objective:
        """Which errors matter."""
        return make_objective(self.statistics, self.directions, self.size, torch.device("cpu"))

    def round(self, objective: Objective) -> None:
        """The timed work."""
        merged_OI = self.grid.decode(self.base_codes_OI) + self.delta_OI
        context = RoundingContext(
            name="example",
            rows=Rows(0, self.size),
            base_codes_OI=self.base_codes_OI,
            objective=objective,
            delta_OI=self.delta_OI,
        )
        preserve.ROUNDING.choose(merged_OI, self.grid, context)


def seconds_of(work: Callable[[], object]) -> float:
    """CPU time of a call."""
    started = time.process_time()
    work()
    return time.process_time() - started


def measure_rate(size: int) -> float:
    """GFLOP/s of a plain float32 product, the best of three."""
    left = torch.randn(size, size)
    right = torch.randn(size, size)
    seconds = min(seconds_of(lambda: left @ right) for _ in range(3))
    return 2 * size**3 / seconds / 1e9


def products_done() -> float:
    """Products of two size × size matrices that one rounding consists of."""
    # For every order: feedback is half a product, as the factor of K is triangular; factoring K is a sixth of one
    # (size³ / 3 multiplications and additions); and the slope that descent starts from is one.
    orders = EFFORTS["default"].orders * (0.5 + 1 / 6 + 1)
    nearest_error = 0.5
    # Compensation for the loss along the delta: its product with K, and a descent.
    compensation = 1 + 1
    return orders + nearest_error + compensation


def table_row(run: int, example: Example) -> str:
    """Measure once, and format the row."""
    rate = measure_rate(example.size)
    started = time.process_time()
    objective = example.make_objective()
    objective_seconds = time.process_time() - started
    seconds = seconds_of(lambda: example.round(objective))
    gflop = 2 * example.size**3 * products_done() / 1e9
    ratio = seconds / (gflop / rate)
    return f"| {run} | {rate:.0f} | {objective_seconds:.1f} | {seconds:.1f} | {gflop:.0f} | {ratio:.2f} |"


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="inputs and outputs of the weight (default: 4096)")
    parser.add_argument("--runs", type=int, default=1)
    given = parser.parse_args()
    torch.manual_seed(0)
    example = Example(given.size)
    print(HEADER)
    for run in range(1, given.runs + 1):
        print(table_row(run, example), flush=True)


if __name__ == "__main__":
    main()
