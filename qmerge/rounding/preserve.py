"""Round so that the layer's output moves as the adapter moved it: error feedback, then descent, in a calibrated metric.

    minimise  tr((Q − T) K (Q − T)ᵀ)   over codes on the grid; rows of Q are independent, columns are not

Feedback goes through the columns once and lets each make up for the errors of those before it (GPTQ, arXiv 2210.17323;
with another quantizer than its own it is Babai's nearest plane, arXiv 2507.18553). Descent then goes through the columns
again and moves each to where it is best, given all others; the objective never rises. What they find depends on the
order of the columns, so several orders are tried, and every row of the weight keeps its best. Both work on blocks of
columns, so that nearly all of the time goes into matrix products. Everything is [I, O] here: one column of the weight
is one row of memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qmerge.grids import Grid
from qmerge.rounding.base import Metric, RoundingContext, damped, make_metric, upper_factor

ORDERS = 4
"""Orders of the columns that are tried: as they are, what matters most first, and at random."""

SWEEPS = 2
"""Most sweeps of descent from each start; a row that did not move in a sweep has arrived. (Eight instead of two lower
the KL by 4 %, two more orders by 10 %.)"""

LEAN = 0.17
"""How far the aim moves towards the 16-bit original: more brings more of its lower loss, and more noise."""

BLOCK = 64


@dataclass(frozen=True)
class Problem:
    """Columns in some order: what to come close to, and in which metric. ``factor_II`` F is upper, K = F Fᵀ."""

    aim_IO: Tensor
    K_II: Tensor
    factor_II: Tensor
    columns: Tensor
    grid: Grid


def choose(values_OI: Tensor, grid: Grid, context: RoundingContext) -> Tensor:
    """Codes whose error is smallest in ``context.metric`` (without one: all inputs count alike).

    Never worse than the nearest codes, row by row, by the same objective.
    """
    metric = context.metric or make_metric(None, None, values_OI.shape[1], values_OI.device)
    nearest_IO = grid.decode(grid.nearest(values_OI, context.near_OI)).T.contiguous()
    aim_IO = metric.aim(toward_original(values_OI, context)).T.contiguous()
    best_IO, cost_O = nearest_IO, torch.full((len(values_OI),), torch.inf, dtype=torch.float64, device=values_OI.device)
    as_they_are, *others = column_orders(metric.K_II)
    first = in_order(as_they_are, aim_IO, metric, grid)
    for problem in (first, *(in_order(columns, aim_IO, metric, grid) for columns in others)):
        found_IO, found_O = solve(problem, nearest_IO)
        best_IO, cost_O = torch.where(found_O < cost_O, found_IO, best_IO), torch.minimum(found_O, cost_O)
    if context.delta_OI is not None:
        best_IO = compensate_delta_loss(best_IO, context.delta_OI.T, nearest_IO, first)
    return grid.nearest(best_IO.T.contiguous(), context.near_OI)


def toward_original(values_OI: Tensor, context: RoundingContext) -> Tensor:
    """The merged weight, moved a little towards the 16-bit original where there is one: it has the lower loss."""
    return values_OI if context.original_OI is None else torch.lerp(values_OI, context.original_OI, LEAN)


def column_orders(K_II: Tensor) -> list[Tensor]:
    """int64 [I] each: as they are; what matters most first (GPTQ's act-order), when most columns are left to make up for
    it; and at random."""
    count, generator = len(K_II), torch.Generator().manual_seed(0)
    weightiest = K_II.diagonal().argsort(descending=True, stable=True)
    orders = [torch.arange(count), weightiest, *(torch.randperm(count, generator=generator) for _ in range(ORDERS - 2))]
    return [order.to(K_II.device) for order in orders[:ORDERS]]


def in_order(columns: Tensor, aim_IO: Tensor, metric: Metric, grid: Grid) -> Problem:
    K_II, more = metric.K_II[columns][:, columns], metric.damping
    factor_II = upper_factor(K_II)
    while factor_II is None:  # another order, another rounding: on the brink of what float32 can factor
        factor_II, more = upper_factor(damped(K_II, more)), 2 * more
    return Problem(aim_IO[columns], K_II, factor_II, columns, grid)


def solve(problem: Problem, nearest_IO: Tensor) -> tuple[Tensor, Tensor]:
    """(levels float32 [I, O], objective float64 [O]): descent from the better of feedback and nearest, row by row.
    Levels come in and go out in the weight's own order of columns."""
    back = problem.columns.argsort()
    start_IO, nearest_IO = feedback(problem), nearest_IO[problem.columns]
    start_O, nearest_O = objective(start_IO, problem), objective(nearest_IO, problem)
    start_IO, start_O = torch.where(nearest_O < start_O, nearest_IO, start_IO), torch.minimum(nearest_O, start_O)
    found_IO = descend(start_IO, problem)
    found_O = objective(found_IO, problem)
    # By float32 rounding, where nothing was to be gained, descent may lose a little.
    return torch.where(found_O > start_O, start_IO, found_IO)[back], torch.minimum(found_O, start_O)


def compensate_delta_loss(levels_IO: Tensor, delta_IO: Tensor, nearest_IO: Tensor, problem: Problem) -> Tensor:
    """Aim past the part of the error that lies along the delta, and descend again (columns as they are).

    Other errors point anywhere and cancel over layers; this part weakens what was learned in every one of them.
    Rows that would end up worse than the nearest codes stay as they were.
    """
    seen_IO = problem.K_II @ delta_IO
    size = float((delta_IO * seen_IO).sum(dtype=torch.float64))
    if not size:
        return levels_IO
    lost = float(((problem.aim_IO - levels_IO) * seen_IO).sum(dtype=torch.float64)) / size
    found_IO = descend(levels_IO, replace(problem, aim_IO=problem.aim_IO + lost * delta_IO))
    worse_O = objective(found_IO, problem) > objective(nearest_IO, problem)
    return torch.where(worse_O, levels_IO, found_IO)


def feedback(problem: Problem) -> Tensor:
    """float32 [I, O]: levels, chosen column by column; each column aims past the errors of those before it.

    The objective is ‖(Q − T) F‖²: component j of it holds F_jj e_j and the errors e of columns before j.
    """
    aim_IO, F_II = problem.aim_IO, problem.factor_II
    errors_IO, levels_IO = torch.empty_like(aim_IO), torch.empty_like(aim_IO)
    rows, diagonal = torch.arange(aim_IO.shape[1], device=aim_IO.device), F_II.diagonal().tolist()
    for start, stop in blocks(len(aim_IO)):
        carried = F_II[:start, start:stop].T @ errors_IO[:start]
        nearest = problem.grid.column_rounder(problem.columns[start:stop], rows)
        for j in range(start, stop):
            here = j - start
            levels_IO[j] = nearest(here, aim_IO[j] - carried[here] / diagonal[j])
            torch.sub(levels_IO[j], aim_IO[j], out=errors_IO[j])
            carried[here + 1 :].addr_(F_II[j, j + 1 : stop], errors_IO[j])
    return levels_IO


def descend(start_IO: Tensor, problem: Problem) -> Tensor:
    """float32 [I, O]: levels from which no single column can move to a better one (or the sweeps are over)."""
    result_IO = start_IO.clone()
    rows = torch.arange(start_IO.shape[1], device=start_IO.device)
    for _ in range(SWEEPS):
        levels_IO, moved_O = sweep(result_IO[:, rows], rows, problem)
        result_IO[:, rows] = levels_IO
        rows = rows[moved_O]
        if not len(rows):
            break
    return result_IO


def sweep(levels_IO: Tensor, rows: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Every column once: (levels, which rows moved). Column j is best at Q_j − G_j / K_jj, with G = K (Q − T)."""
    errors_IO, K_II = levels_IO - problem.aim_IO[:, rows], problem.K_II
    diagonal = K_II.diagonal().tolist()
    moved_O = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    for start, stop in blocks(len(levels_IO)):
        slope = K_II[start:stop] @ errors_IO
        nearest = problem.grid.column_rounder(problem.columns[start:stop], rows)
        before = levels_IO[start:stop].clone()
        for j in range(start, stop):
            here = j - start
            level_O = nearest(here, levels_IO[j] - slope[here] / diagonal[j])
            slope.addr_(K_II[start:stop, j], level_O - levels_IO[j])
            levels_IO[j] = level_O
        change = levels_IO[start:stop] - before
        errors_IO[start:stop] += change
        moved_O |= change.any(dim=0)
    return levels_IO, moved_O


def objective(levels_IO: Tensor, problem: Problem) -> Tensor:
    """float64 [O]: e K eᵀ of every row of the weight, as ‖e F‖²."""
    errors_IO = levels_IO - problem.aim_IO
    total_O = torch.zeros(errors_IO.shape[1], dtype=torch.float64, device=errors_IO.device)
    for start, stop in blocks(len(errors_IO), 512):
        part = problem.factor_II[:stop, start:stop].T @ errors_IO[:stop]
        total_O += part.square_().sum(dim=0, dtype=torch.float64)
    return total_O


def blocks(count: int, size: int = BLOCK) -> list[tuple[int, int]]:
    return [(start, min(start + size, count)) for start in range(0, count, size)]
