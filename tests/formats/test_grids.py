"""Grids: neighbours and gaps against numpy, and the closed form against a simulation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qmerge.formats import get_target
from qmerge.formats._dense import FloatGrid, stepped_by_torch
from qmerge.grids import DOWN, UP, Grid
from qmerge.types import Rows

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
QUANTIZED = ["nf4", "fp4", "int8"]
SHAPE = (16, 64)


def grid_for(name: str, values_OI: Tensor, inputs_I: Tensor | None = None, **asked: Any) -> Grid:
    """A fresh grid for these values, with the format's defaults and the options that are asked for."""
    target = get_target(name)
    shape = (values_OI.shape[0], values_OI.shape[1])
    options = target.options(target.options_for_model(asked, [shape]), None, "BF16")
    return target.grid(target.scales(values_OI, options, inputs_I), shape, options, inputs_I)


def gaussian(seed: int = 0, shape: tuple[int, int] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ascending(grid: Grid, values_OI: Tensor) -> Tensor:
    """float32 [L, O, I]: all distinct levels of every entry, from the lowest up, by walking."""
    codes_OI = grid.nearest(torch.full_like(values_OI, -torch.inf).clamp(min=-1e30))
    levels = [grid.decode(codes_OI)]
    for _ in range(grid.levels_count):
        codes_OI = grid.step(codes_OI, UP)
        levels.append(grid.decode(codes_OI))
    return torch.stack(levels).unique_consecutive(dim=0)


# --- dense numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direction", [UP, DOWN])
def test_step_walks_every_16_bit_number(dtype: torch.dtype, direction: int) -> None:
    """Exhaustive: all finite numbers in order, the two zeros as one, the last one its own neighbour."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    ordered = every.double().unique()  # sorted; 0 and -0 are one
    position = torch.searchsorted(ordered, every.double())
    expected = ordered[(position + direction).clamp(0, len(ordered) - 1)]
    for step in (FloatGrid(dtype).step, stepped_by_torch):  # compiled, and as on a GPU
        assert torch.equal(step(every, direction).double(), expected)


@pytest.mark.parametrize("direction", [UP, DOWN])
@pytest.mark.parametrize("name", ["fp16", "fp32"])
def test_step_is_numpys_nextafter(name: str, direction: int) -> None:
    info = torch.finfo(DTYPES[name])
    some = torch.cat([gaussian().flatten() * 10.0**e for e in (-44, -40, -20, -3, 0, 3, 30)]).clamp(info.min, info.max)
    edges = torch.tensor([0.0, -0.0, info.tiny, -info.tiny, info.smallest_normal, info.max, info.min, 1.0, -1.0])
    codes = torch.cat([some, edges]).to(DTYPES[name])
    codes = codes[codes.isfinite()]
    toward = np.array(direction * np.inf, dtype=codes.numpy().dtype)
    with np.errstate(over="ignore", under="ignore"):
        expected = torch.from_numpy(np.nextafter(codes.numpy(), toward))
    stepped = FloatGrid(DTYPES[name]).step(codes, direction)
    assert torch.equal(stepped, torch.where(expected.isfinite(), expected, codes))


@pytest.mark.parametrize("name", DTYPES)
def test_gap_of_dense_numbers(name: str) -> None:
    codes = torch.cat([gaussian().flatten(), torch.tensor([1.0, -1.0, 2.0])]).to(DTYPES[name])[None]
    grid, eps = FloatGrid(DTYPES[name]), torch.finfo(DTYPES[name]).eps
    mantissa, exponent = np.frexp(codes.double().numpy())
    away = torch.from_numpy(np.ldexp(1.0, exponent - 1)) * eps  # the ulp; towards zero it halves at a power of two
    toward = torch.where(torch.from_numpy(np.abs(mantissa) == 0.5), away / 2, away)
    assert torch.equal(grid.gap(codes, codes.float()).double(), away)
    assert torch.equal(grid.gap(codes, -codes.float()).double(), toward)


@pytest.mark.parametrize("name", DTYPES)
def test_no_gap_beyond_the_ends(name: str) -> None:
    last = torch.tensor([[torch.finfo(DTYPES[name]).max]]).to(DTYPES[name])
    grid = FloatGrid(DTYPES[name])
    assert math.isinf(float(grid.gap(last, torch.ones(1, 1)))) and torch.equal(grid.step(last, UP), last)
    assert math.isinf(float(grid.gap(-last, -torch.ones(1, 1)))) and torch.equal(grid.step(-last, DOWN), -last)
    assert math.isfinite(float(grid.gap(last, -torch.ones(1, 1))))


@pytest.mark.parametrize("relative_sigma", [1e-5, 1e-3, 3e-3, 1e-2, 0.1])
@pytest.mark.parametrize("scale", [1e-6, 0.02, 1e4])
@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_compiled_slope_of_dense_numbers(name: str, scale: float, relative_sigma: float) -> None:
    """The kernel adds up what the loop over whole tensors adds up, in another order."""
    grid = FloatGrid(DTYPES[name])
    values_OI = (gaussian() * scale).clamp(-6e4, 6e4)
    values_OI[0, 0] = 0
    sigma_O1 = torch.linspace(0.5, 2, SHAPE[0])[:, None] * scale * relative_sigma
    expected_OI = Grid.expected_slope(grid, values_OI, sigma_O1)
    assert torch.allclose(grid.expected_slope(values_OI, sigma_O1), expected_OI, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("relative_sigma", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_compiled_slope_of_4_bit_numbers(name: str, relative_sigma: float) -> None:
    values_OI = gaussian(shape=(8, 96))  # a row has one and a half blocks
    values_OI[:2] = 0
    grid = grid_for(name, values_OI)
    sigma_O1 = torch.linspace(0.5, 2, 8)[:, None] * relative_sigma
    expected_OI = Grid.expected_slope(grid, values_OI, sigma_O1)
    assert expected_OI.max() > 0
    assert torch.allclose(grid.expected_slope(values_OI, sigma_O1), expected_OI, rtol=1e-4, atol=1e-5)


# --- quantized grids -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUANTIZED)
def test_walking_up_meets_every_level_once(name: str) -> None:
    values_OI = gaussian()
    grid = grid_for(name, values_OI)
    levels = ascending(grid, values_OI)
    assert len(levels) == {"nf4": 16, "fp4": 15, "int8": 255}[name]
    assert bool((levels.diff(dim=0) > 0).all())


@pytest.mark.parametrize("name", QUANTIZED)
def test_down_undoes_up(name: str) -> None:
    values_OI = gaussian()
    grid = grid_for(name, values_OI)
    codes_OI = grid.nearest(values_OI * 0.8)
    inside_OI = grid.decode(grid.step(codes_OI, UP)) != grid.decode(codes_OI)
    back_OI = grid.decode(grid.step(grid.step(codes_OI, UP), DOWN))
    assert torch.equal(back_OI[inside_OI], grid.decode(codes_OI)[inside_OI])


@pytest.mark.parametrize("name", QUANTIZED)
def test_nearest_floor_and_gap_by_brute_force(name: str) -> None:
    values_OI = gaussian()
    grid = grid_for(name, values_OI)
    levels = ascending(grid, values_OI).double()
    goal_OI = values_OI * 1.2 + 0.01  # some are past the ends
    error_OI = (grid.decode(grid.nearest(goal_OI)).double() - goal_OI.double()).abs()
    best_OI = (levels - goal_OI.double()).abs().amin(dim=0)
    assert bool((error_OI <= best_OI + 1e-6).all())
    below_OI = torch.where(levels <= goal_OI, levels, levels[:1]).amax(dim=0)
    assert torch.equal(grid.decode(grid.floor(goal_OI)).double(), below_OI)
    codes_OI = grid.nearest(goal_OI)
    position_OI = (levels == grid.decode(codes_OI)).int().argmax(dim=0, keepdim=True)
    for direction in (UP, DOWN):
        neighbour_OI = levels.gather(0, (position_OI + direction).clamp(0, len(levels) - 1))[0]
        expected_OI = (neighbour_OI.float() - grid.decode(codes_OI)).abs()
        gap_OI = grid.gap(codes_OI, torch.full(SHAPE, float(direction)))
        assert torch.equal(gap_OI, expected_OI.masked_fill(expected_OI == 0, math.inf))


@pytest.mark.parametrize("name", QUANTIZED)
def test_some_rows_of_a_grid_are_the_same_grid(name: str) -> None:
    values_OI = gaussian(shape=(96, 96))  # NF4 blocks span rows
    grid = grid_for(name, values_OI)
    codes_OI = grid.nearest(values_OI)
    for start in range(0, 96, 2 * grid.row_step):
        rows = Rows(start, start + 2 * grid.row_step)
        part = grid.rows(rows)
        assert torch.equal(part.nearest(values_OI[rows.start : rows.stop]), codes_OI[rows.start : rows.stop])
        assert torch.equal(part.decode(codes_OI[rows.start : rows.stop]), grid.decode(codes_OI)[rows.start : rows.stop])


def test_the_two_zeros_of_fp4() -> None:
    """Two codes have one value: neither is the other's neighbour, and the base's own code stays."""
    values_OI = gaussian()
    grid = grid_for("fp4", values_OI)
    codes = [torch.full(SHAPE, code, dtype=torch.uint8) for code in range(16)]
    zeros = [code for code in codes if bool((grid.decode(code) == 0).all())]
    assert len(zeros) == 2
    up, down = grid.step(zeros[0], UP), grid.step(zeros[0], DOWN)
    assert torch.equal(grid.step(zeros[1], UP), up) and torch.equal(grid.step(zeros[1], DOWN), down)
    assert bool((grid.decode(up) > 0).all()) and bool((grid.decode(down) < 0).all())
    for zero in zeros:
        assert torch.equal(grid.nearest(torch.zeros(SHAPE), zero), zero)
        assert bool(grid.gap(zero, torch.ones(SHAPE)).isfinite().all())
        assert torch.equal(grid.nearest(grid.decode(up), zero), grid.nearest(grid.decode(up)))


# --- the closed form -------------------------------------------------------------------------------------------------


def simulated_slope(grid: Grid, base_OI: Tensor, sigma_O1: Tensor, draws: int) -> tuple[float, float]:
    """Mean over entries of E[(Q(x + d) − Q(x)) d] / sigma², and its standard error."""
    generator, before_OI = torch.Generator().manual_seed(7), grid.decode(grid.nearest(base_OI)).double()
    means = []
    for _ in range(draws):
        delta_OI = torch.randn(base_OI.shape, generator=generator) * sigma_O1
        after_OI = grid.decode(grid.nearest(base_OI + delta_OI)).double()
        means.append(float(((after_OI - before_OI) * delta_OI / sigma_O1.double().square()).mean()))
    return float(np.mean(means)), float(np.std(means, ddof=1) / math.sqrt(draws))


SIZES = {
    "nf4": (0.01, 0.05, 0.1, 0.5, 2.0),
    "fp4": (0.02, 0.1, 0.5),
    "int8": (0.002, 0.008, 0.05, 1.0),
    "bf16": (2e-4, 1e-3, 5e-3, 0.1),
    "fp16": (5e-5, 1e-4, 1e-2),
}
CLOSED_FORM = [(name, size) for name, sizes in SIZES.items() for size in sizes]


@pytest.mark.parametrize(("name", "size"), CLOSED_FORM)
@pytest.mark.parametrize("on_grid", [True, False], ids=["base on the grid", "base anywhere"])
def test_expected_slope_against_a_simulation(name: str, size: float, on_grid: bool) -> None:
    """Within five standard errors of the simulation, and 0.1 % for the approximations: thresholds further than ``FINE_LEVELS``
    levels are left out, and a sum over narrow levels is taken as an integral."""
    values_OI = gaussian(3, (64, 256))
    grid = grid_for(name, values_OI)
    base_OI = grid.decode(grid.nearest(values_OI)) if on_grid else values_OI
    sigma_O1 = torch.linspace(0.5, 1.5, 64)[:, None] * size
    mean, error = simulated_slope(grid, base_OI, sigma_O1, draws=100)
    assert abs(float(grid.expected_slope(base_OI, sigma_O1).double().mean()) - mean) < 5 * error + 1e-3
    assert error < 0.05


def test_the_simulation_can_tell() -> None:
    """The control: a delta of another size is outside those bounds."""
    values_OI = gaussian(3, (64, 256))
    grid = grid_for("nf4", values_OI)
    sigma_O1 = torch.full((64, 1), 0.1)
    mean, error = simulated_slope(grid, grid.decode(grid.nearest(values_OI)), sigma_O1, draws=100)
    wrong = grid.expected_slope(grid.decode(grid.nearest(values_OI)), sigma_O1 * 0.9)
    assert abs(float(wrong.double().mean()) - mean) > 5 * error + 1e-3
