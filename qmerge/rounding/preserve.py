"""Round so that the layer's output moves as the adapter moved it: error feedback, then descent, on a calibrated objective.

    minimise  tr((Q − T) K (Q − T)ᵀ)   over codes on the grid; rows of Q are independent, columns are not

Feedback goes through the columns once and lets each make up for the errors of those before it (GPTQ, arXiv 2210.17323;
with another quantizer than its own it is Babai's nearest plane, arXiv 2507.18553). Descent then goes through the columns
again and moves each to its best level, given all others; the squared error in K never rises. The result depends on the
order of the columns, so several orders are tried, and every row of the weight keeps its best. Both work on blocks of
columns, so that nearly all of the time goes into matrix products. Everything is [I, O] in this file: one column of the
weight is one row of memory.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qmerge.grids import Grid
from qmerge.rounding._objective import Objective, damped, make_objective, upper_factor
from qmerge.rounding.base import Rounding, RoundingContext

if TYPE_CHECKING:  # triton is there with CUDA builds of torch only
    from qmerge.rounding._block_kernels import BlockKernels

ORDERS = 4
"""Orders of the columns that are tried: as they are, what matters most first, and at random."""

SWEEPS = 2
"""Most sweeps of descent from each start; a row that did not move in a sweep has arrived. (Eight instead of two lower
the KL by 4 %, two more orders by 10 %.)"""

ORIGINAL_SHARE = 0.17
"""How far the aim moves towards the 16-bit original: more brings more of its lower loss, and more noise."""

BLOCK = 64
"""Columns that are decided one by one between two matrix products."""

TORCH_LOOPS = "QMERGE_TORCH_LOOPS"
"""Environment variable: with "1", a GPU goes column by column with torch, too, to compare with the kernels."""

OLDEST_CAPABILITY = (7, 0)
"""Triton compiles for GPUs from Volta on. (A P100 has 6.0.)"""

ERROR_BLOCK = 512
"""Columns whose squared error is computed at once: bounds memory, and fixes the order of the sum."""


class Preserve(Rounding):
    """Codes with the smallest error in ``context.objective``; without one all inputs count alike."""

    def choose(self, values_OI: Tensor, grid: Grid, context: RoundingContext) -> Tensor:
        """Never worse than the nearest codes, row by row, by the same objective."""
        objective = context.objective or make_objective(None, None, values_OI.shape[1], values_OI.device)
        nearest_IO = grid.decode(grid.nearest(values_OI, context.base_codes_OI)).T.contiguous()
        aim_IO = objective.aim(toward_original(values_OI, context), context.rows).T.contiguous()
        best_IO = nearest_IO
        best_error_O = torch.full((len(values_OI),), torch.inf, dtype=torch.float64, device=values_OI.device)
        problems = [in_order(columns, aim_IO, objective, grid) for columns in column_orders(objective.K_II)]
        for problem in problems:
            levels_IO, error_O = solve(problem, nearest_IO)
            best_IO = torch.where(error_O < best_error_O, levels_IO, best_IO)
            best_error_O = torch.minimum(error_O, best_error_O)
        if context.delta_OI is not None:
            # The first order is the weight's own, in which best_IO and the delta are.
            best_IO = compensate_delta_loss(best_IO, context.delta_OI.T, nearest_IO, problems[0])
        # The levels are on the grid: this finds their codes, the base's own where several codes have one value.
        return grid.nearest(best_IO.T.contiguous(), context.base_codes_OI)


ROUNDING = Preserve()


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One weight with its columns in some order.

    Attributes:
        aim_IO: float32 T, the values to come close to.
        K_II: float32 K.
        factor_II: float32 F, upper triangular, K = F Fᵀ.
        columns: int64 [I], the order: column ``columns[i]`` of the weight is row i of all other tensors.
        grid: of the weight, its columns in their own order.
    """

    aim_IO: Tensor
    K_II: Tensor
    factor_II: Tensor
    columns: Tensor
    grid: Grid


def toward_original(values_OI: Tensor, context: RoundingContext) -> Tensor:
    """The merged weight, moved a little towards the 16-bit original where it is known: the original has the lower loss."""
    if context.original_OI is None:
        return values_OI
    return torch.lerp(values_OI, context.original_OI, ORIGINAL_SHARE)


def column_orders(K_II: Tensor) -> list[Tensor]:
    """``ORDERS`` orders of the columns, int64 [I] each, on the device of K.

    As they are; what matters most first, when most columns are left to make up for it (GPTQ's act-order); and at random.
    """
    count = len(K_II)
    # The same random orders for every weight and seed: they are starts of a search, not noise.
    generator = torch.Generator().manual_seed(0)
    orders = [torch.arange(count), K_II.diagonal().argsort(descending=True, stable=True)]
    for _ in range(ORDERS - 2):
        orders.append(torch.randperm(count, generator=generator))
    return [order.to(K_II.device) for order in orders[:ORDERS]]


def in_order(columns: Tensor, aim_IO: Tensor, objective: Objective, grid: Grid) -> Problem:
    """The problem with the columns in this order."""
    K_II = objective.K_II[columns][:, columns]
    factor_II = upper_factor(K_II)
    damping = objective.damping
    while factor_II is None:  # another order rounds differently, where float32 can only just factor K
        factor_II = upper_factor(damped(K_II, damping))
        damping *= 2
    return Problem(aim_IO=aim_IO[columns], K_II=K_II, factor_II=factor_II, columns=columns, grid=grid)


def solve(problem: Problem, nearest_IO: Tensor) -> tuple[Tensor, Tensor]:
    """Descent from the better of feedback and nearest, row by row.

    Args:
        nearest_IO: float32, the nearest levels, in the weight's own order of columns.

    Returns:
        Levels, float32 [I, O] in the weight's own order of columns, and their squared error, float64 [O].
    """
    nearest_IO = nearest_IO[problem.columns]
    nearest_O = squared_error(nearest_IO, problem)
    feedback_IO = feedback(problem)
    feedback_O = squared_error(feedback_IO, problem)
    start_IO = torch.where(nearest_O < feedback_O, nearest_IO, feedback_IO)
    start_O = torch.minimum(nearest_O, feedback_O)
    levels_IO = descend(start_IO, problem)
    levels_O = squared_error(levels_IO, problem)
    # In float32, descent may lose a little where there was nothing to gain: such rows stay at their start.
    levels_IO = torch.where(levels_O > start_O, start_IO, levels_IO)
    own_order = problem.columns.argsort()
    return levels_IO[own_order], torch.minimum(levels_O, start_O)


def compensate_delta_loss(levels_IO: Tensor, delta_IO: Tensor, nearest_IO: Tensor, problem: Problem) -> Tensor:
    """Aim past the part of the error that lies along the delta, and descend again. The problem has the columns as they are.

    Other errors point anywhere and cancel over layers; this part weakens in every layer what was learned.
    Rows that would end up worse than the nearest codes stay as they were.
    """
    weighted_delta_IO = problem.K_II @ delta_IO
    delta_size = float((delta_IO * weighted_delta_IO).sum(dtype=torch.float64))
    if not delta_size:
        return levels_IO
    error_IO = problem.aim_IO - levels_IO
    lost_share = float((error_IO * weighted_delta_IO).sum(dtype=torch.float64)) / delta_size
    compensated_IO = descend(levels_IO, replace(problem, aim_IO=problem.aim_IO + lost_share * delta_IO))
    worse_O = squared_error(compensated_IO, problem) > squared_error(nearest_IO, problem)
    return torch.where(worse_O, levels_IO, compensated_IO)


def feedback(problem: Problem) -> Tensor:
    """float32 [I, O]: levels, chosen column by column; each column aims past the errors of those before it.

    The squared error is ‖(Q − T) F‖²: component j of it holds F_jj e_j and the errors e of columns before j.
    """
    aim_IO = problem.aim_IO
    F_II = problem.factor_II
    kernels = block_kernels(problem)
    if kernels is not None:
        return feedback_with_kernels(problem, kernels)
    diagonal = F_II.diagonal().tolist()
    errors_IO = torch.empty_like(aim_IO)
    levels_IO = torch.empty_like(aim_IO)
    rows = torch.arange(aim_IO.shape[1], device=aim_IO.device)
    for start, stop in blocks(len(aim_IO), BLOCK):
        # The errors of all earlier blocks in one product; those of this block are added one by one.
        carried = F_II[:start, start:stop].T @ errors_IO[:start]
        nearest = problem.grid.column_rounder(problem.columns[start:stop], rows)
        for j in range(start, stop):
            i = j - start
            levels_IO[j] = nearest(i, aim_IO[j] - carried[i] / diagonal[j])
            torch.sub(levels_IO[j], aim_IO[j], out=errors_IO[j])
            carried[i + 1 :].addr_(F_II[j, j + 1 : stop], errors_IO[j])
    return levels_IO


def descend(start_IO: Tensor, problem: Problem) -> Tensor:
    """float32 [I, O]: levels from which no single column can move to a better one, or the levels after ``SWEEPS`` sweeps."""
    result_IO = start_IO.clone()
    rows = torch.arange(start_IO.shape[1], device=start_IO.device)
    for _ in range(SWEEPS):
        levels_IO, moved_O = sweep(result_IO[:, rows], rows, problem)
        result_IO[:, rows] = levels_IO
        # A row that did not move would not move in the next sweep either.
        rows = rows[moved_O]
        if not len(rows):
            break
    return result_IO


def sweep(levels_IO: Tensor, rows: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Move every column once to its best level, given all others. ``levels_IO`` are those of ``rows`` and are changed in place.

    Column j is best at Q_j − G_j / K_jj, with the slope G = K (Q − T).

    Returns:
        The levels, and which rows moved (bool).
    """
    kernels = block_kernels(problem)
    if kernels is not None:
        return sweep_with_kernels(levels_IO, rows, problem, kernels)
    K_II = problem.K_II
    diagonal = K_II.diagonal().tolist()
    errors_IO = levels_IO - problem.aim_IO[:, rows]
    moved_O = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    for start, stop in blocks(len(levels_IO), BLOCK):
        # The slope of the whole block in one product; moves within the block are added to it one by one.
        slope = K_II[start:stop] @ errors_IO
        nearest = problem.grid.column_rounder(problem.columns[start:stop], rows)
        before = levels_IO[start:stop].clone()
        for j in range(start, stop):
            i = j - start
            level_O = nearest(i, levels_IO[j] - slope[i] / diagonal[j])
            slope.addr_(K_II[start:stop, j], level_O - levels_IO[j])
            levels_IO[j] = level_O
        change = levels_IO[start:stop] - before
        # Later blocks take the moves of this one into account.
        errors_IO[start:stop] += change
        moved_O |= change.any(dim=0)
    return levels_IO, moved_O


def block_kernels(problem: Problem) -> BlockKernels | None:
    """The kernels for this problem; None where torch goes column by column: on a CPU, or on a grid without a scale table."""
    if not kernels_run_on(problem.aim_IO.device) or os.environ.get(TORCH_LOOPS) == "1":
        return None
    table = problem.grid.scale_table(len(problem.columns))
    if table is None:
        return None
    from qmerge.rounding._block_kernels import make_block_kernels

    return make_block_kernels(table, problem.columns)


@cache
def kernels_run_on(device: torch.device) -> bool:
    """Whether Triton is there and compiles for this device."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY


def feedback_with_kernels(problem: Problem, kernels: BlockKernels) -> Tensor:
    """``feedback`` with one kernel for each block."""
    # Kernels read and write rows of memory.
    aim_IO = problem.aim_IO.contiguous()
    F_II = problem.factor_II.contiguous()
    errors_IO = torch.empty_like(aim_IO)
    levels_IO = torch.empty_like(aim_IO)
    for start, stop in blocks(len(aim_IO), BLOCK):
        carried = F_II[:start, start:stop].T @ errors_IO[:start]
        kernels.feedback(
            start, stop, aim_IO=aim_IO, carried=carried, factor_II=F_II, levels_IO=levels_IO, errors_IO=errors_IO
        )
    return levels_IO


def sweep_with_kernels(
    levels_IO: Tensor, rows: Tensor, problem: Problem, kernels: BlockKernels
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``sweep`` with one kernel for each block."""
    K_II = problem.K_II.contiguous()
    levels_IO = levels_IO.contiguous()
    errors_IO = (levels_IO - problem.aim_IO[:, rows]).contiguous()
    moved_O = torch.zeros(len(rows), dtype=torch.int32, device=rows.device)
    for start, stop in blocks(len(levels_IO), BLOCK):
        slope = K_II[start:stop] @ errors_IO
        kernels.sweep(
            start, stop, slope=slope, K_II=K_II, levels_IO=levels_IO, errors_IO=errors_IO, rows=rows, moved_O=moved_O
        )
    return levels_IO, moved_O.bool()


def squared_error(levels_IO: Tensor, problem: Problem) -> Tensor:
    """float64 [O]: e K eᵀ of every row of the weight, as ‖e F‖²."""
    errors_IO = levels_IO - problem.aim_IO
    total_O = torch.zeros(errors_IO.shape[1], dtype=torch.float64, device=errors_IO.device)
    for start, stop in blocks(len(errors_IO), ERROR_BLOCK):
        # F is upper triangular: columns start … stop of e F depend on the first ``stop`` errors only.
        part = problem.factor_II[:stop, start:stop].T @ errors_IO[:stop]
        total_O += part.square_().sum(dim=0, dtype=torch.float64)
    return total_O


def blocks(count: int, size: int) -> list[tuple[int, int]]:
    """(start, stop) of consecutive blocks of ``size`` that cover 0 … ``count``."""
    return [(start, min(start + size, count)) for start in range(0, count, size)]
