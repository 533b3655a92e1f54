"""``preserve``: its two steps against plain float64 code, its promise, its objective."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as cases
from hypothesis import strategies as st
from torch import Tensor

from qmerge.grids import Grid
from qmerge.rounding import preserve, stochastic
from qmerge.rounding._loops import TorchLoops
from qmerge.rounding._objective import DAMPING, READ, READ_OTHER, damped
from qmerge.rounding.base import Effort, InputStatistics, Objective, RoundingContext, make_objective
from qmerge.types import Rows

from ..formats.test_grids import gaussian, grid_for

TARGETS = ["nf4", "fp4", "int8", "bf16"]
SHAPE = (24, 96)  # NF4 blocks of 64 straddle its rows; 96 is no multiple of preserve's own block
CPU = torch.device("cpu")


def directions(shape: tuple[int, int], rank: int = 4, seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vt = torch.linalg.svd(
        gaussian(seed, (shape[0], rank)) @ gaussian(seed + 1, (rank, shape[1])), full_matrices=False
    )
    return u[:, :rank], s[:rank], vt[:rank].T.contiguous()


def hessian(columns: int, seed: int = 7, spread: float = 2.0) -> Tensor:
    """Inputs whose directions differ in strength by ``10 ** spread``."""
    x = gaussian(seed, (4 * columns, columns)) * torch.logspace(0, -spread, columns)
    return x.T @ x / len(x)


def objective_for(shape: tuple[int, int], hessian_II: Tensor | None = None) -> Objective:
    seen = hessian(shape[1]) if hessian_II is None else hessian_II
    # With the larger factor of P, which makes nearest rounding clearly worse.
    return make_objective(InputStatistics(seen, None, 100, of_task=False), directions(shape), shape[1], CPU)


def problem_for(target: str, shape: tuple[int, int] = SHAPE) -> tuple[preserve.Problem, Tensor, Grid]:
    values_OI = gaussian(5, shape)
    grid = grid_for(target, values_OI)
    step = 0.05 if target in ("nf4", "fp4") else 0.002
    aim_OI = grid.decode(grid.nearest(values_OI)) + step * gaussian(6, shape)
    return preserve.in_order(torch.arange(shape[1]), aim_OI.T.contiguous(), objective_for(shape), grid), aim_OI, grid


def squared_error(stored_OI: Tensor, aim_OI: Tensor, K_II: Tensor) -> Tensor:
    """e K eᵀ of every row, in float64."""
    error_OI = (stored_OI - aim_OI).double()
    return ((error_OI @ K_II.double()) * error_OI).sum(dim=1)


def gptq(aim_OI: Tensor, K_II: Tensor, grid: Grid) -> Tensor:
    """The paper's own form (arXiv 2210.17323, algorithm 1) in float64: the error of a column, over the diagonal of the
    upper Cholesky factor of K⁻¹, is taken off all later columns."""
    U = torch.linalg.cholesky(torch.linalg.inv(K_II.double()), upper=True)
    left, levels = aim_OI.double().clone(), torch.empty_like(aim_OI)
    for j in range(aim_OI.shape[1]):
        column = left.float()
        levels[:, j] = grid.decode(grid.nearest(column))[:, j]
        error = (left[:, j] - levels[:, j].double()) / U[j, j]
        left[:, j:] -= error[:, None] * U[j, j:]
    return levels


@pytest.mark.parametrize("product_block", [64, 512])
@pytest.mark.parametrize("target", TARGETS)
def test_feedback_is_gptq_with_another_quantizer(
    target: str, product_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float32 and float64 part ways where a value lies on a midpoint to 1e-6, and then in the rest of that row: seldom on
    16 levels, in every row of a fine grid, whose squared error is the same all the same."""
    monkeypatch.setattr(preserve, "PRODUCT_BLOCK", product_block)
    problem, aim_OI, grid = problem_for(target)
    expected_OI = gptq(aim_OI, problem.K_II, grid)
    same_O = (expected_OI == preserve.feedback(problem)[0].T).all(dim=1)
    assert float(same_O.float().mean()) >= (0.9 if target in ("nf4", "fp4") else 0)
    found, expected = (
        float(squared_error(x, aim_OI, problem.K_II).sum()) for x in (preserve.feedback(problem)[0].T, expected_OI)
    )
    assert found == pytest.approx(expected, rel=0.02)
    nearest_OI = grid.decode(grid.nearest(aim_OI))
    assert expected < 0.95 * float(squared_error(nearest_OI, aim_OI, problem.K_II).sum()), (
        "the control: nearest is far off"
    )


@pytest.mark.parametrize("target", TARGETS)
def test_a_sweep_never_raises_the_error(target: str) -> None:
    problem, aim_OI, grid = problem_for(target)
    problem = replace(problem, loops=TorchLoops(grid, problem.columns))
    levels_IO = grid.decode(grid.nearest(aim_OI)).T.contiguous()
    rows = torch.arange(SHAPE[0])
    before = squared_error(levels_IO.T, aim_OI, problem.K_II)
    for _ in range(4):
        levels_IO, _, gained_O = preserve.sweep(levels_IO.clone(), rows, problem)
        after = squared_error(levels_IO.T, aim_OI, problem.K_II)
        torch.testing.assert_close(before - after, gained_O, rtol=1e-3, atol=1e-5 * float(before.max()))
        assert bool((after <= before * (1 + 1e-5)).all())
        before = after


def test_descent_ends_where_no_single_code_can_do_better() -> None:
    problem, aim_OI, grid = problem_for("nf4", (4, 32))
    found_OI = preserve.descend(preserve.feedback(problem)[0], problem, 100)[0].T
    best = squared_error(found_OI, aim_OI, problem.K_II)
    codes_OI = grid.nearest(found_OI)
    for j, code in product(range(32), range(16)):
        other_OI = codes_OI.clone()
        other_OI[:, j] = code
        assert bool((squared_error(grid.decode(other_OI), aim_OI, problem.K_II) >= best * (1 - 1e-5)).all())


def test_close_to_the_best_of_all_codes() -> None:
    """16⁴ codes, all of them: the optimum is a lower bound, and not far."""
    shape = (6, 4)
    values_OI = gaussian(5, shape)
    grid, objective = grid_for("nf4", values_OI), objective_for(shape, hessian(4, spread=0.5))
    aim_OI = grid.decode(grid.nearest(values_OI)) + 0.1 * gaussian(6, shape)
    found = squared_error(
        grid.decode(
            preserve.ROUNDING.choose(aim_OI, grid, RoundingContext(name="w", rows=Rows(0, 6), objective=objective))
        ),
        aim_OI,
        objective.K_II,
    )
    best = torch.full((6,), torch.inf, dtype=torch.float64)
    for combination in product(range(16), repeat=4):
        codes_OI = torch.tensor(combination, dtype=torch.uint8).repeat(6, 1)
        best = torch.minimum(best, squared_error(grid.decode(codes_OI), aim_OI, objective.K_II))
    assert bool((found >= best * (1 - 1e-5)).all())
    assert found.sum() <= 1.5 * best.sum()


def test_more_orders_are_never_worse() -> None:
    _, aim_OI, grid = problem_for("nf4")
    objective, found = objective_for(SHAPE), []
    for orders in (1, 2, 4):
        context = RoundingContext(name="w", rows=Rows(0, SHAPE[0]), objective=objective, effort=Effort(0, orders, 2))
        codes_OI = preserve.ROUNDING.choose(aim_OI, grid, context)
        found.append(squared_error(grid.decode(codes_OI), aim_OI, objective.K_II))
    assert bool((found[1] <= found[0] * (1 + 1e-5)).all()) and bool((found[2] <= found[1] * (1 + 1e-5)).all())
    assert found[2].sum() < 0.995 * found[0].sum()


def odd_hessian(kind: str, columns: int, seed: int) -> Tensor:
    x = gaussian(seed, (columns // 2, columns))
    made = {
        "singular": x.T @ x,
        "dead": hessian(columns, seed).index_fill(0, torch.arange(5), 0.0).index_fill(1, torch.arange(5), 0.0),
        "zero": torch.zeros(columns, columns),
        "one direction": x[:1].T @ x[:1],
        "steep": hessian(columns, seed, spread=5.0),
        "tiny": 1e-20 * hessian(columns, seed),
    }
    return made[kind]


@cases(max_examples=40)
@given(
    kind=st.sampled_from(["singular", "dead", "zero", "one direction", "steep", "tiny"]), target=st.sampled_from(TARGETS),
    seed=st.integers(0, 1000), size=st.sampled_from([0.0, 1e-3, 0.05, 3.0]), delta=st.booleans(),
)  # fmt: skip
def test_never_worse_than_nearest(kind: str, target: str, seed: int, size: float, delta: bool) -> None:
    """Row by row, by the objective itself, whatever the inputs look like and however far off the grid the values are."""
    values_OI = gaussian(seed, SHAPE)
    grid = grid_for(target, values_OI)
    base_OI = grid.decode(grid.nearest(values_OI))
    aim_OI = base_OI + size * gaussian(seed + 1, SHAPE)
    objective = objective_for(SHAPE, odd_hessian(kind, SHAPE[1], seed))
    context = RoundingContext(
        name="w", rows=Rows(0, SHAPE[0]), objective=objective, delta_OI=aim_OI - base_OI if delta else None
    )
    found_OI = grid.decode(preserve.ROUNDING.choose(aim_OI, grid, context))
    worst = squared_error(grid.decode(grid.nearest(aim_OI)), aim_OI, objective.K_II)
    assert bool((squared_error(found_OI, aim_OI, objective.K_II) <= worst * (1 + 1e-4) + 1e-12).all())


def test_the_same_bound_refuses_stochastic_rounding() -> None:
    _, aim_OI, grid = problem_for("nf4")
    objective, context = objective_for(SHAPE), RoundingContext(name="w", rows=Rows(0, SHAPE[0]))
    worst = squared_error(grid.decode(grid.nearest(aim_OI)), aim_OI, objective.K_II)
    assert bool(
        (
            squared_error(grid.decode(stochastic.ROUNDING.choose(aim_OI, grid, context)), aim_OI, objective.K_II)
            > worst
        ).any()
    )


def test_compensation_removes_the_error_along_the_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    values_OI = gaussian(5, (64, 96))
    grid = grid_for("nf4", values_OI)
    base_OI = grid.decode(grid.nearest(values_OI))
    u, s, v = directions((64, 96))
    delta_OI = 0.02 * (u * s) @ v.T
    objective = make_objective(InputStatistics(hessian(96), None, 9), (u, s, v), 96, CPU)

    def lost(delta: Tensor | None) -> float:
        context = RoundingContext(name="w", rows=Rows(0, 64), objective=objective, delta_OI=delta)
        error_OI = base_OI + delta_OI - grid.decode(preserve.ROUNDING.choose(base_OI + delta_OI, grid, context))
        seen_OI = delta_OI @ objective.K_II
        return float((error_OI * seen_OI).sum() / (delta_OI * seen_OI).sum())

    assert abs(lost(delta_OI)) < 0.5 * abs(lost(None))


# --- the objective ---------------------------------------------------------------------------------------------------


def test_objective_by_its_formulas() -> None:
    """H + factor · tr(VᵀHV) / R · P + 1 %, in float64 numpy, from an explicit delta."""
    u, s, v = directions(SHAPE)
    seen_II = hessian(SHAPE[1])
    H = seen_II.double().numpy()
    V, w = v.double().numpy(), (s / s[0]).double().numpy() ** 2
    size = np.trace(V.T @ H @ V) / V.shape[1]
    for of_task, factor in ((True, READ), (False, READ_OTHER)):
        statistics = InputStatistics(seen_II, None, 9, of_task=of_task)
        found = make_objective(statistics, (u, s, v), SHAPE[1], CPU)
        K = H + factor * size * (V * w) @ V.T
        K += 0.01 * np.diag(K).mean() * np.eye(len(K))
        assert found.damping == DAMPING
        np.testing.assert_allclose(found.K_II.numpy(), K, atol=2e-5 * np.abs(K).max())
        assert torch.equal(found.hessian_II, seen_II)


def test_damping_rises_until_the_objective_can_be_factored() -> None:
    """A matrix that is no sum of squares, as float32 sums over many tokens may come out."""
    K_II = torch.diag(torch.cat([torch.ones(30), torch.tensor([-0.05, 1.0])]))
    objective = make_objective(InputStatistics(K_II, None, 9), None, 32, CPU)
    assert objective.damping == pytest.approx(0.1)
    assert bool(torch.linalg.eigvalsh(objective.K_II.double()).min() > 0)


def test_a_delta_of_zero_and_one_without_directions() -> None:
    u, s, v = directions(SHAPE)
    for given_directions in ((u, torch.zeros_like(s), v), None):
        objective = make_objective(InputStatistics(hessian(SHAPE[1]), None, 9), given_directions, SHAPE[1], CPU)
        assert objective.hessian_II is not None
        torch.testing.assert_close(objective.K_II, damped(objective.hessian_II, 0.01))


def test_correction_is_the_least_squares_answer() -> None:
    """T (I + R) x̃ comes as close to T x as any matrix can (numpy's lstsq; damping of 0.2 % apart)."""
    x = gaussian(1, (400, 24))
    seen = x + 0.1 * gaussian(2, (400, 24))
    statistics = InputStatistics(seen.T @ seen / 400, (x - seen).T @ seen / 400, 400)
    T_OI = gaussian(3, (8, 24))
    objective = make_objective(statistics, None, 24, CPU)
    expected = np.linalg.lstsq(seen.double().numpy(), (x @ T_OI.T).double().numpy(), rcond=None)[0].T
    np.testing.assert_allclose(objective.aim(T_OI, Rows(0, 8)).numpy(), expected, atol=5e-3 * np.abs(expected).max())
    assert np.abs(T_OI.numpy() - expected).max() > 1e-2 * np.abs(expected).max(), "the control: without it, far off"


def test_compensation_makes_up_for_the_residual_stream() -> None:
    """r̃ + T' x̃ comes as close to r + T x as any T' can, for any rows of it (numpy's lstsq; damping of 0.2 % apart)."""
    x, stream = gaussian(1, (400, 24)), gaussian(4, (400, 8))
    seen = x + 0.1 * gaussian(2, (400, 24))
    lost = 0.1 * seen[:, :8] + 0.1 * gaussian(5, (400, 8))  # in part explained by the inputs
    crosses = {"cross_II": (x - seen).T @ seen / 400, "missing_OI": lost.T @ seen / 400}
    statistics = InputStatistics(seen.T @ seen / 400, tokens=400, **crosses)
    T_OI = gaussian(3, (8, 24))
    objective = make_objective(statistics, None, 24, CPU)
    wanted = stream + x @ T_OI.T - (stream - lost)
    expected = np.linalg.lstsq(seen.double().numpy(), wanted.double().numpy(), rcond=None)[0].T
    close = {"atol": 5e-3 * np.abs(expected).max()}
    np.testing.assert_allclose(objective.aim(T_OI, Rows(0, 8)).numpy(), expected, **close)
    np.testing.assert_allclose(objective.aim(T_OI[2:5], Rows(2, 5)).numpy(), expected[2:5], **close)
    without = T_OI + T_OI @ objective.correction_II
    assert np.abs(without.numpy() - expected).max() > 2e-2 * np.abs(expected).max(), "the control"


def test_inputs_that_are_all_zero_ask_for_no_correction() -> None:
    """A dead input: the equations have no solution, and nothing is to be corrected."""
    zero_II = torch.zeros(8, 8)
    statistics = InputStatistics(zero_II, zero_II, 9, missing_OI=torch.zeros(4, 8))
    objective = make_objective(statistics, None, 8, CPU)
    T_OI = gaussian(3, (4, 8))
    assert torch.equal(objective.aim(T_OI, Rows(0, 4)), T_OI)


def test_the_aim_goes_further_only_where_the_delta_would_be_lost() -> None:
    """With other text than that of the task: by 2 % on NF4, not at all where nearest rounding keeps the delta."""
    u, s, v = directions((64, 96))
    delta_OI = 0.02 * (u * s) @ v.T
    values_OI = gaussian(5, (64, 96))
    objective = make_objective(InputStatistics(hessian(96), None, 9, of_task=False), (u, s, v), 96, CPU)
    assert objective.unseen_loss > 0
    assert make_objective(InputStatistics(hessian(96), None, 9), (u, s, v), 96, CPU).unseen_loss == 0
    kept = {}
    for target in ("nf4", "fp32"):
        grid = grid_for(target, values_OI)
        base_OI = grid.decode(grid.nearest(values_OI))
        for unseen_loss in (0.0, objective.unseen_loss):
            context = RoundingContext(
                name="w", rows=Rows(0, 64), objective=replace(objective, unseen_loss=unseen_loss), delta_OI=delta_OI
            )
            change_OI = grid.decode(preserve.ROUNDING.choose(base_OI + delta_OI, grid, context)) - base_OI
            seen_OI = delta_OI @ objective.K_II
            kept[target, unseen_loss > 0] = float((change_OI * seen_OI).sum() / (delta_OI * seen_OI).sum())
    assert kept["fp32", True] == pytest.approx(kept["fp32", False], abs=1e-4)
    assert kept["nf4", True] > kept["nf4", False] + 0.01


# --- grids, column by column -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [*TARGETS, "fp16", "fp32"])
def test_column_rounder_is_the_grid_itself(target: str) -> None:
    values_OI = gaussian(5, SHAPE)
    grid = grid_for(target, values_OI)
    goal_OI = values_OI * 1.1 + 0.01 * gaussian(6, SHAPE)
    expected_OI = grid.decode(grid.nearest(goal_OI))
    columns, rows = torch.randperm(SHAPE[1], generator=torch.Generator().manual_seed(1)), torch.tensor([5, 2, 23, 0])
    nearest = grid.column_rounder(columns, rows)
    for i, column in enumerate(columns.tolist()):
        torch.testing.assert_close(nearest(i, goal_OI[rows, column]), expected_OI[rows, column], rtol=1e-6, atol=0)


def test_an_absmax_of_zero_and_a_negative_one() -> None:
    from qmerge.formats._bnb4bit_grid import Bnb4bitGrid

    absmax_B = torch.tensor([0.0, -0.5, 1.0])
    grid = Bnb4bitGrid(quant_type="nf4", block_size=64, columns=96, absmax_B=absmax_B, rounding_absmax_B=absmax_B)
    goal_OI = 0.3 * gaussian(1, (2, 96))
    nearest = grid.column_rounder(torch.arange(96), torch.arange(2))
    found_OI = torch.stack([nearest(j, goal_OI[:, j]) for j in range(96)], dim=1)
    assert bool(found_OI.isfinite().all()) and torch.equal(found_OI, grid.decode(grid.nearest(goal_OI)))
