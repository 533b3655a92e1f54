"""Round so that the layer's output moves as the adapter moved it: error feedback, then descent, on a calibrated objective.

    minimise  tr((Q − T) K (Q − T)ᵀ)   over codes on the grid; rows of Q are independent, columns are not

Feedback goes through the columns once and lets each make up for the errors of those before it (GPTQ, arXiv 2210.17323;
with another quantizer than its own it is Babai's nearest plane, arXiv 2507.18553). Descent then goes through the columns
again and moves each to its best level, given all others; the squared error in K never rises. The result depends on the
order of the columns, so several orders are tried, and every row of the weight keeps its best. Nearly all of the time goes into
matrix products: between blocks of columns, and on the CPU one for each descent (``RowLoops``). Everything is [I, O] in this
file: one column of the weight is one row of memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qmerge.grids import Grid
from qmerge.rounding._loops import BLOCK, ColumnLoops, RowLoops, column_loops
from qmerge.rounding._objective import Objective, damped, make_objective, upper_factor
from qmerge.rounding.base import Rounding, RoundingContext

COMPENSATING_SWEEPS = 2
"""Sweeps of descent towards the aim that makes up for what is lost along the delta."""

ORIGINAL_SHARE = 0.17
"""How far the aim moves towards the 16-bit original: more brings more of its lower loss, and more noise."""

PRODUCT_BLOCK = 512
"""Columns whose products with all others are computed at once: bounds memory, and fixes the order of the sum. (Products of 64
columns reach two thirds of the speed.)"""


class Preserve(Rounding):
    """Codes with the smallest error in ``context.objective``; without one all inputs count alike."""

    def choose(self, values_OI: Tensor, grid: Grid, context: RoundingContext) -> Tensor:
        """Never worse than the nearest codes, row by row, by the same objective."""
        objective = context.objective or make_objective(None, None, values_OI.shape[1], values_OI.device)
        nearest_IO = grid.decode(grid.nearest(values_OI, context.base_codes_OI)).T.contiguous()
        aim_IO = objective.aim(toward_original(values_OI, context), context.rows).T.contiguous()
        sweeps = context.effort.sweeps
        # The best of the single orders comes last: its problem is needed again.
        first, *others = reversed(column_orders(objective.K_II, context.effort.orders))
        problem = in_order(first, aim_IO, objective, grid)
        nearest_O = squared_error(nearest_IO[first], problem)
        best_IO, best_O = solve(problem, nearest_IO, nearest_O, sweeps)
        for columns in others:
            del problem  # there is memory for one
            problem = in_order(columns, aim_IO, objective, grid)
            levels_IO, error_O = solve(problem, nearest_IO, nearest_O, sweeps)
            best_IO = torch.where(error_O < best_O, levels_IO, best_IO)
            best_O = torch.minimum(error_O, best_O)
        if context.delta_OI is not None:
            delta_IO = context.delta_OI.T
            lost_by_nearest = 1 - share_along(delta_IO, nearest_IO - values_OI.T + delta_IO)
            best_IO = compensate_delta_loss(
                best_IO,
                delta_IO,
                nearest_O - best_O,
                problem=problem,
                unseen_loss=objective.unseen_loss * lost_by_nearest,
            )
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
        loops: through the columns of a block, on the grid.
    """

    aim_IO: Tensor
    K_II: Tensor
    factor_II: Tensor
    columns: Tensor
    grid: Grid
    loops: ColumnLoops


def toward_original(values_OI: Tensor, context: RoundingContext) -> Tensor:
    """The merged weight, moved a little towards the 16-bit original where it is known: the original has the lower loss."""
    if context.original_OI is None:
        return values_OI
    return torch.lerp(values_OI, context.original_OI, ORIGINAL_SHARE)


def column_orders(K_II: Tensor, number: int) -> list[Tensor]:
    """Orders of the columns, int64 [I] each, on the device of K.

    What matters most first, when most columns are left to make up for it (GPTQ's act-order: by far the best of single
    orders); as they are; and at random.
    """
    count = len(K_II)
    # The same random orders for every weight and seed: they are starts of a search, not noise.
    generator = torch.Generator().manual_seed(0)
    orders = [K_II.diagonal().argsort(descending=True, stable=True), torch.arange(count)]
    for _ in range(number - 2):
        orders.append(torch.randperm(count, generator=generator))
    return [order.to(K_II.device) for order in orders[:number]]


def in_order(columns: Tensor, aim_IO: Tensor, objective: Objective, grid: Grid) -> Problem:
    """The problem with the columns in this order."""
    K_II = objective.K_II[columns][:, columns]
    factor_II = upper_factor(K_II)
    damping = objective.damping
    while factor_II is None:  # another order rounds differently, where float32 can only just factor K
        assert damping < 1e6, "K is not finite"
        factor_II = upper_factor(damped(K_II, damping))
        damping *= 2
    return Problem(
        aim_IO=aim_IO[columns],
        K_II=K_II,
        factor_II=factor_II,
        columns=columns,
        grid=grid,
        loops=column_loops(grid, columns),
    )


def solve(problem: Problem, nearest_IO: Tensor, nearest_O: Tensor, sweeps: int) -> tuple[Tensor, Tensor]:
    """Descent from the better of feedback and nearest, row by row.

    Args:
        nearest_IO: float32, the nearest levels, in the weight's own order of columns.
        nearest_O: float64, their squared error.
        sweeps: most sweeps of descent.

    Returns:
        Levels, float32 [I, O] in the weight's own order of columns, and their squared error, float64 [O].
    """
    start_IO, feedback_O = feedback(problem)
    better_O = nearest_O < feedback_O
    start_IO[:, better_O] = nearest_IO[:, better_O][problem.columns]
    start_O = torch.minimum(nearest_O, feedback_O)
    levels_IO, gained_O = descend(start_IO, problem, sweeps)
    # In float32, descent may lose a little where there was nothing to gain: such rows stay at their start.
    lost_O = gained_O < 0
    levels_IO[:, lost_O] = start_IO[:, lost_O]
    own_order = problem.columns.argsort()
    return levels_IO[own_order], start_O - gained_O.clamp(min=0)


def compensate_delta_loss(
    levels_IO: Tensor, delta_IO: Tensor, margin_O: Tensor, *, problem: Problem, unseen_loss: float
) -> Tensor:
    """Aim past the part of the error that lies along the delta, and descend again, from levels in the weight's own order.

    Other errors point anywhere and cancel over layers; this part weakens in every layer what was learned.
    Rows that would end up worse than the nearest codes stay as they were.

    Args:
        margin_O: float64, by how much the squared error may rise: as far as that of the nearest codes.
        unseen_loss: share of the delta to aim further, besides what was lost.
    """
    delta_IO = delta_IO[problem.columns]
    start_IO = levels_IO[problem.columns]
    weighted_delta_IO = problem.K_II @ delta_IO
    delta_size = float((delta_IO * weighted_delta_IO).sum(dtype=torch.float64))
    if not delta_size:
        return levels_IO
    error_IO = problem.aim_IO - start_IO
    lost_share = float((error_IO * weighted_delta_IO).sum(dtype=torch.float64)) / delta_size
    lost_share += unseen_loss
    moved_problem = replace(problem, aim_IO=problem.aim_IO + lost_share * delta_IO)
    compensated_IO, gained_O = descend(start_IO, moved_problem, COMPENSATING_SWEEPS)
    # The gain is towards the new aim; towards the old one, the squared error e K eᵀ falls by so much less.
    rise_O = 2 * lost_share * ((compensated_IO - start_IO) * weighted_delta_IO).sum(dim=0, dtype=torch.float64)
    worse_O = rise_O - gained_O > margin_O
    return torch.where(worse_O, start_IO, compensated_IO)[problem.columns.argsort()]


def share_along(delta_IO: Tensor, change_IO: Tensor) -> float:
    """⟨change, delta⟩ / ⟨delta, delta⟩, from 0 to 1; 1 for a delta of zero."""
    size = float((delta_IO * delta_IO).sum(dtype=torch.float64))
    if not size:
        return 1.0
    return min(1.0, max(0.0, float((change_IO * delta_IO).sum(dtype=torch.float64)) / size))


def feedback(problem: Problem) -> tuple[Tensor, Tensor]:
    """Levels, float32 [I, O], chosen column by column, and their squared error, float64 [O].

    Each column aims past the errors of those before it. The squared error is ‖(Q − T) F‖²: component j of it holds F_jj e_j
    and the errors e of columns before j.
    """
    aim_IO = problem.aim_IO
    F_II = problem.factor_II
    errors_IO = torch.empty_like(aim_IO)
    levels_IO = torch.empty_like(aim_IO)
    error_O = torch.zeros(aim_IO.shape[1], dtype=torch.float64, device=aim_IO.device)
    for outer, outer_stop in blocks(len(aim_IO), PRODUCT_BLOCK):
        # The errors of all earlier blocks in one large product, those of this one block by block, and then one by one.
        carried_IO = F_II[:outer, outer:outer_stop].T @ errors_IO[:outer]
        for start, stop in blocks(outer_stop, BLOCK, outer):
            carried = carried_IO[start - outer : stop - outer]
            problem.loops.feedback(
                start, stop, aim_IO=aim_IO, carried=carried, factor_II=F_II, levels_IO=levels_IO, errors_IO=errors_IO
            )
            later = carried_IO[stop - outer :]
            later.addmm_(F_II[start:stop, stop:outer_stop].T, errors_IO[start:stop])
        carried_IO.addcmul_(errors_IO[outer:outer_stop], F_II.diagonal()[outer:outer_stop, None])
        error_O += carried_IO.square_().sum(dim=0, dtype=torch.float64)
    return levels_IO, error_O


def descend(start_IO: Tensor, problem: Problem, sweeps: int) -> tuple[Tensor, Tensor]:
    """Levels, float32 [I, O], from which no single column can move to a better one, or those after the last sweep.

    Args:
        sweeps: most sweeps; a row that did not move in a sweep has arrived.

    Returns:
        The levels, and by how much the squared error fell, float64 [O].
    """
    if isinstance(problem.loops, RowLoops):
        slope_OI = (start_IO - problem.aim_IO).T @ problem.K_II
        return problem.loops.descend(start_IO, slope_OI, problem.K_II, sweeps)
    result_IO = start_IO.clone()
    gained_O = torch.zeros(start_IO.shape[1], dtype=torch.float64, device=start_IO.device)
    rows = torch.arange(start_IO.shape[1], device=start_IO.device)
    for _ in range(sweeps):
        levels_IO, moved_O, gained_in_sweep_O = sweep(result_IO[:, rows], rows, problem)
        result_IO[:, rows] = levels_IO
        gained_O[rows] += gained_in_sweep_O
        # A row that did not move would not move in the next sweep either.
        rows = rows[moved_O]
        if not len(rows):
            break
    return result_IO, gained_O


def sweep(levels_IO: Tensor, rows: Tensor, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Move every column once to its best level, given all others. ``levels_IO`` are those of ``rows`` and are changed in place.

    Column j is best at Q_j − G_j / K_jj, with the slope G = K (Q − T). A move by c changes the squared error by
    2 c G_j + c² K_jj.

    Returns:
        The levels, which rows moved (bool), and by how much their squared error fell (float64).
    """
    loops, K_II = problem.loops, problem.K_II
    assert not isinstance(loops, RowLoops), "they descend by themselves"
    errors_IO = levels_IO - problem.aim_IO[:, rows]
    moved_O = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    gained_O = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for start, stop in blocks(len(levels_IO), BLOCK):
        # The slope of the whole block in one product; moves within the block are added to it one by one.
        slope = K_II[start:stop] @ errors_IO
        change = levels_IO[start:stop].clone()
        loops.sweep(start, stop, slope=slope, K_II=K_II, levels_IO=levels_IO, errors_IO=errors_IO, rows=rows)
        torch.sub(levels_IO[start:stop], change, out=change)
        moved_O |= change.any(dim=0)
        slope.mul_(2).addcmul_(change, K_II.diagonal()[start:stop, None])
        gained_O -= slope.mul_(change).sum(dim=0, dtype=torch.float64)
    return levels_IO, moved_O, gained_O


def squared_error(levels_IO: Tensor, problem: Problem) -> Tensor:
    """float64 [O]: e K eᵀ of every row of the weight, as ‖e F‖²."""
    errors_IO = levels_IO - problem.aim_IO
    total_O = torch.zeros(errors_IO.shape[1], dtype=torch.float64, device=errors_IO.device)
    for start, stop in blocks(len(errors_IO), PRODUCT_BLOCK):
        # F is upper triangular: columns start … stop of e F depend on the first ``stop`` errors only.
        part = problem.factor_II[:stop, start:stop].T @ errors_IO[:stop]
        total_O += part.square_().sum(dim=0, dtype=torch.float64)
    return total_O


def blocks(count: int, size: int, first: int = 0) -> list[tuple[int, int]]:
    """(start, stop) of consecutive blocks of ``size`` that cover ``first`` … ``count``."""
    return [(start, min(start + size, count)) for start in range(first, count, size)]
