"""Roundings: neighbours only, right on average, reproducible, and blind to how the rows were grouped."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qmerge import plugins
from qmerge.grids import UP, Grid
from qmerge.rounding import get_rounding, nearest, stochastic
from qmerge.rounding.base import RoundingContext
from qmerge.types import Rows

from ..formats.test_grids import gaussian, grid_for

TARGETS = ["nf4", "fp4", "int8", "bf16", "fp16", "fp32"]
SHAPE = (24, 96)  # NF4 blocks of 64 straddle its rows


def goal_and_grid(name: str) -> tuple[Tensor, Grid]:
    """Values between the levels, some of them past the ends of a quantized grid."""
    values_OI = gaussian(5, SHAPE)
    return values_OI * 1.1 + 0.01 * gaussian(6, SHAPE), grid_for(name, values_OI)


def whole(shape: tuple[int, int] = SHAPE, **changes: object) -> RoundingContext:
    return replace(RoundingContext(name="layer.weight", rows=Rows(0, shape[0]), seed=0), **changes)  # type: ignore[arg-type]


def neighbours(goal_OI: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    below_OI = grid.floor(goal_OI)
    return grid.decode(below_OI), grid.decode(grid.step(below_OI, UP))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rounding", plugins.names("rounding"))
def test_only_neighbours(rounding: str, target: str) -> None:
    goal_OI, grid = goal_and_grid(target)
    stored_OI = grid.decode(get_rounding(rounding).choose(goal_OI, grid, whole()))
    low_OI, high_OI = neighbours(goal_OI, grid)
    assert bool(((stored_OI == low_OI) | (stored_OI == high_OI)).all())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rounding", plugins.names("rounding"))
def test_values_on_the_grid_stay(rounding: str, target: str) -> None:
    values_OI = gaussian(5, SHAPE)
    grid = grid_for(target, values_OI)
    codes_OI = grid.nearest(values_OI)
    for seed in range(5):
        chosen_OI = get_rounding(rounding).choose(grid.decode(codes_OI), grid, whole(seed=seed))
        assert torch.equal(grid.decode(chosen_OI), grid.decode(codes_OI))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rounding", plugins.names("rounding"))
def test_row_grouping_changes_nothing(rounding: str, target: str) -> None:
    goal_OI, grid = goal_and_grid(target)
    choose = get_rounding(rounding).choose
    expected_OI = choose(goal_OI, grid, whole())
    for size in (2, 4, 6, 10):
        parts = []
        for start in range(0, SHAPE[0], size):
            rows = Rows(start, min(start + size, SHAPE[0]))
            parts.append(choose(goal_OI[rows.start : rows.stop], grid.rows(rows), whole(rows=rows)))
        assert torch.equal(torch.cat(parts), expected_OI), size


@pytest.mark.parametrize("columns", [1, 3, 5, 97])
def test_random_numbers_do_not_depend_on_the_grouping(columns: int) -> None:
    """Rows that begin in the middle of a step of the generator's counter."""
    values_OI = torch.zeros(13, columns)
    expected_OI = stochastic.uniform(values_OI, seed=0, name="layer.weight", start_row=0)
    for start in range(13):
        part_OI = stochastic.uniform(values_OI[start:], seed=0, name="layer.weight", start_row=start)
        assert torch.equal(part_OI, expected_OI[start:])


@pytest.mark.parametrize("target", TARGETS)
def test_a_hint_changes_no_value(target: str) -> None:
    goal_OI, grid = goal_and_grid(target)
    near_OI = grid.nearest(gaussian(5, SHAPE))
    for rounding in plugins.names("rounding"):
        choose = get_rounding(rounding).choose
        plain_OI, hinted_OI = (choose(goal_OI, grid, whole(base_codes_OI=near)) for near in (None, near_OI))
        assert torch.equal(grid.decode(plain_OI), grid.decode(hinted_OI)), rounding


@pytest.mark.parametrize("target", TARGETS)
def test_stochastic_is_right_on_average(target: str) -> None:
    """A share p goes up: the mean of N tries has standard deviation √(p(1 − p)/N) gaps. Six of those for each of the
    2304 entries (2e-9 each, for a normal distribution), and 20/N where p is too near 0 or 1 to be normal."""
    tries = 1000
    goal_OI, grid = goal_and_grid(target)
    low_OI, high_OI = (side.double() for side in neighbours(goal_OI, grid))
    total_OI = torch.zeros(SHAPE, dtype=torch.float64)
    for seed in range(tries):
        total_OI += grid.decode(stochastic.ROUNDING.choose(goal_OI, grid, whole(seed=seed))).double()
    gap_OI = (high_OI - low_OI).where(high_OI > low_OI, torch.ones(1, dtype=torch.float64))
    wanted_OI = torch.maximum(torch.minimum(goal_OI.double(), high_OI), low_OI)  # past the ends: the end
    share_OI = (wanted_OI - low_OI) / gap_OI
    error_OI = (total_OI / tries - wanted_OI).abs() / gap_OI
    bound_OI = 6 * (share_OI * (1 - share_OI) / tries).clamp(min=0).sqrt() + 20 / tries
    assert bool((error_OI <= bound_OI).all())
    # All entries together: far tighter, and it would see a share that is off by a hundredth.
    inside = (high_OI > low_OI) & (share_OI > 0) & (share_OI < 1)
    if bool(inside.any()):
        bias = float(((total_OI / tries - wanted_OI) / gap_OI)[inside].mean())
        assert abs(bias) < 6 * 0.5 / (tries * int(inside.sum())) ** 0.5


def test_nearest_is_not_right_on_average() -> None:
    """The control: the same bound refuses nearest rounding."""
    goal_OI, grid = goal_and_grid("nf4")
    low_OI, high_OI = neighbours(goal_OI, grid)
    error_OI = (grid.decode(nearest.ROUNDING.choose(goal_OI, grid, whole())) - goal_OI).abs() / (high_OI - low_OI)
    assert float((error_OI > 6 * 0.5 / 1000**0.5 + 20 / 1000).float().mean()) > 0.5


@pytest.mark.parametrize("target", ["nf4", "int8", "bf16"])
def test_stochastic_is_reproducible(target: str) -> None:
    goal_OI, grid = goal_and_grid(target)
    first = stochastic.ROUNDING.choose(goal_OI, grid, whole(seed=3))
    assert torch.equal(first, stochastic.ROUNDING.choose(goal_OI, grid, whole(seed=3)))
    assert not torch.equal(first, stochastic.ROUNDING.choose(goal_OI, grid, whole(seed=4)))
    assert not torch.equal(first, stochastic.ROUNDING.choose(goal_OI, grid, whole(seed=3, name="other.weight")))


def test_uniform_numbers_are_uniform_and_unrelated() -> None:
    """Mean 1/2 ± 6/√(12 N), variance 1/12, and no correlation between two weights or two seeds."""
    values_OI = torch.zeros(500, 400)
    sequences = [(0, "layer.weight"), (1, "layer.weight"), (0, "other.weight")]
    drawn = [stochastic.uniform(values_OI, seed=seed, name=name, start_row=0).double() for seed, name in sequences]
    for numbers in drawn:
        assert abs(float(numbers.mean()) - 0.5) < 6 / (12 * numbers.numel()) ** 0.5
        assert abs(float(numbers.var()) - 1 / 12) < 6 * 0.0745 / numbers.numel() ** 0.5
        assert float(numbers.min()) >= 0 and float(numbers.max()) <= 1
    centred = [(numbers - 0.5).flatten() * 12**0.5 for numbers in drawn]
    for one, other in [(0, 1), (0, 2), (1, 2)]:
        assert abs(float((centred[one] * centred[other]).mean())) < 6 / centred[0].numel() ** 0.5
