"""Feedback, a sweep and a whole rounding with torch and with the Triton kernels, compared; run with TRITON_INTERPRET=1.

Triton decides at its import whether kernels are interpreted, so this is a process of its own (test_block_kernels.py). Prints
one JSON object: name of a case → differing entries of the kernel's result, and of a control with one wrong scale.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import torch
from torch import Tensor

from qmerge.grids import ScaleTable
from qmerge.rounding import _block_kernels as kernels
from qmerge.rounding import preserve
from qmerge.rounding._loops import TorchLoops

from . import problems


def with_wrong_scales(table: ScaleTable) -> ScaleTable:
    """The control: values are divided by other scales than those that levels are multiplied by."""
    return replace(table, inverse=table.inverse * 1.2)


def differing(found: Tensor, expected: Tensor) -> int:
    """Sums that differ by more than their last bits."""
    return int((~torch.isclose(found, expected, rtol=1e-5, atol=0)).sum())


def compare(case: problems.Case) -> dict[str, int]:
    """Entries that differ from torch's, by what was computed."""
    problem, nearest_IO = case.problem()
    problem = replace(problem, loops=TorchLoops(problem.grid, problem.columns))
    rows = case.rows()
    table = problem.grid.scale_table(len(problem.columns))
    assert table is not None
    expected_IO, expected_O = preserve.feedback(problem)
    first_IO, first_O, gained_O = preserve.sweep(nearest_IO[:, rows].clone(), rows, problem)
    second_IO, second_O, _ = preserve.sweep(first_IO.clone(), rows, problem)
    found = {"rows that stay": int((~second_O).sum())}
    for name, used in (("kernel", table), ("control", with_wrong_scales(table))):
        with_kernels = replace(problem, loops=kernels.make_block_kernels(used, problem.columns))
        feedback_IO, error_O = preserve.feedback(with_kernels)
        levels_IO, moved_O, fell_O = preserve.sweep(nearest_IO[:, rows].clone(), rows, with_kernels)
        again_IO, again_O, _ = preserve.sweep(first_IO.clone(), rows, with_kernels)
        found[f"{name}: feedback"] = int((feedback_IO != expected_IO).sum()) + differing(error_O, expected_O)
        found[f"{name}: sweep"] = int((levels_IO != first_IO).sum()) + int((moved_O != first_O).sum())
        found[f"{name}: sweep"] += differing(fell_O, gained_O)
        found[f"{name}: second sweep"] = int((again_IO != second_IO).sum()) + int((again_O != second_O).sum())
    return found


def main() -> None:
    """Every case."""
    json.dump({case.name: compare(case) for case in problems.CASES}, sys.stdout)


if __name__ == "__main__":
    main()
