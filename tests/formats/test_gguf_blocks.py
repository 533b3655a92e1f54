"""GGUF's block types against gguf-py and libgguf, bit for bit, and as grids for every rounding."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qmerge.errors import RecipeError
from qmerge.formats._gguf_blocks import BLOCK_TYPES, BlockType, PackedType, Plane
from qmerge.formats._gguf_grid import BlockGrid
from qmerge.grids import DOWN, UP, Grid
from qmerge.rounding import nearest, preserve
from qmerge.rounding._loops import TORCH_LOOPS
from qmerge.rounding.base import InputStatistics, Objective, RoundingContext, make_objective
from qmerge.types import Rows

from .test_grids import ascending, gaussian

gguf = pytest.importorskip("gguf")
libgguf = pytest.importorskip("libgguf")

DENSE = ("F32", "F16", "BF16")
PACKED = tuple(name for name in BLOCK_TYPES if name not in DENSE)
WITH_MINIMUM = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")
SHAPE = (24, 512)


def weights(shape: tuple[int, int] = SHAPE, seed: int = 0) -> Tensor:
    """Weights with a row of zeros, a constant group, an outlier, tiny rows and rows of one sign."""
    values_OI = gaussian(seed, shape) * 0.02
    values_OI[0] = 0
    values_OI[1, :32] = 0.75
    values_OI[2, 100] = 3
    values_OI[3] *= 1e-6
    values_OI[4] = values_OI[4].abs()
    values_OI[5] = -values_OI[5].abs()
    return values_OI


def stored_by_libgguf(name: str, values_OI: Tensor, inputs_I: Tensor | None = None) -> Tensor:
    importance = None if inputs_I is None else inputs_I.numpy()
    rows = libgguf.quantize_rows(values_OI.numpy(), libgguf.GGMLQuantizationType[name], importance)
    return torch.from_numpy(rows.view(np.uint8))


def random_rows(name: str, rows: int = 64, columns: int = 1024, seed: int = 0) -> Tensor:
    """Random bytes: every code, every scale, both signs; scales that are no finite number are made finite."""
    generator = torch.Generator().manual_seed(seed)
    block_type = BLOCK_TYPES[name]
    size = (rows, block_type.row_bytes(columns))
    stored_OB = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    # The byte with the highest bit of the exponent: without it, no number is infinite or NaN.
    highest = {"F32": (3,), "F16": (1,), "BF16": (1,), "Q2_K": (81, 83), "Q3_K": (109,), "Q6_K": (209,)}
    stored_OB.view(-1, block_type.block_bytes)[:, list(highest.get(name, (1, 3)))] &= 0xBF
    return stored_OB


def by_gguf(name: str, stored_OB: Tensor) -> np.ndarray[Any, Any]:
    values: np.ndarray[Any, Any] = gguf.quants.dequantize(stored_OB.numpy(), gguf.GGMLQuantizationType[name])
    return values


def grid_of(block_type: BlockType, stored_OB: Tensor) -> Grid:
    columns = stored_OB.shape[1] // block_type.block_bytes * block_type.block
    return block_type.grid(block_type.scales(stored_OB), columns)


def same_bits(left: Tensor, right: np.ndarray[Any, Any]) -> bool:
    return np.array_equal(left.numpy().view(np.uint32), right.view(np.uint32))


SAMPLES = {"quantized": lambda name: stored_by_libgguf(name, weights()), "random": random_rows}


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_sizes_are_those_of_gguf(name: str) -> None:
    block_type = BLOCK_TYPES[name]
    sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert (block_type.block, block_type.block_bytes) == sizes
    assert block_type.bits_per_weight == sizes[1] * 8 / sizes[0]
    assert block_type.row_bytes(512) == 512 // sizes[0] * sizes[1]


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_values_are_those_of_gguf_and_libgguf(name: str, sample: str) -> None:
    stored_OB = SAMPLES[sample](name)
    block_type = BLOCK_TYPES[name]
    grid = grid_of(block_type, stored_OB)
    values_OI = grid.decode(block_type.codes(stored_OB))
    assert bool(values_OI.isfinite().all())
    assert same_bits(values_OI, by_gguf(name, stored_OB))
    if name in PACKED:
        assert same_bits(values_OI, libgguf.dequantize_rows(stored_OB.numpy(), libgguf.GGMLQuantizationType[name]))


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_packing_gives_the_bytes_back(name: str, sample: str) -> None:
    stored_OB = SAMPLES[sample](name)
    block_type = BLOCK_TYPES[name]
    codes_OI, grid = block_type.codes(stored_OB), grid_of(block_type, stored_OB)
    assert torch.equal(block_type.pack(codes_OI, grid), stored_OB)
    some = Rows(3, 11)
    part = grid.rows(some)
    assert torch.equal(block_type.pack(codes_OI[3:11], part), stored_OB[3:11])
    assert torch.equal(part.decode(codes_OI[3:11]), grid.decode(codes_OI)[3:11])


@pytest.mark.parametrize("name", PACKED)
def test_every_code_comes_back(name: str) -> None:
    """Codes that no file had: all of them, at every position of a block."""
    block_type = BLOCK_TYPES[name]
    grid = grid_of(block_type, random_rows(name, rows=256, columns=256))
    codes_OI = (torch.arange(256)[:, None] + torch.arange(256)).remainder(grid.levels_count).to(torch.uint8)
    stored_OB = block_type.pack(codes_OI, grid)
    assert torch.equal(block_type.codes(stored_OB), codes_OI)
    assert same_bits(grid.decode(codes_OI), by_gguf(name, stored_OB))


def test_the_comparison_can_tell() -> None:
    """The controls: the order of nibbles, the order of operations, one bit of a scale."""
    stored_OB = stored_by_libgguf("Q4_K", weights())
    q4_k = BLOCK_TYPES["Q4_K"]
    assert isinstance(q4_k, PackedType)
    expected = by_gguf("Q4_K", stored_OB)
    other_order = replace(q4_k, planes=(Plane(4, 64),))
    assert not same_bits(grid_of(q4_k, stored_OB).decode(other_order.codes(stored_OB)), expected)
    grid = grid_of(q4_k, stored_OB)
    assert isinstance(grid, BlockGrid) and grid.minimum_OG is not None
    scale_OI, minimum_OI = (part.repeat_interleave(32, dim=1) for part in (grid.scale_OG, grid.minimum_OG))
    zero_OI = torch.where(scale_OI == 0, 0.0, minimum_OI / scale_OI)
    assert not same_bits((q4_k.codes(stored_OB).float() - zero_OI) * scale_OI, expected)
    scales_OS = q4_k.scales(stored_OB)
    scales_OS[7, 9] ^= 1
    assert not same_bits(q4_k.grid(scales_OS, SHAPE[1]).decode(q4_k.codes(stored_OB)), expected)


# --- scales -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("weighted", [False, True])
def test_fresh_scales_are_those_of_libgguf(name: str, weighted: bool) -> None:
    values_OI = weights()
    inputs_I = torch.logspace(0, -3, SHAPE[1]) if weighted else None
    expected = stored_by_libgguf(name, values_OI, inputs_I)
    scales_OS = BLOCK_TYPES[name].fresh_scales(values_OI, inputs_I)
    assert torch.equal(scales_OS, BLOCK_TYPES[name].scales(expected))
    grid = BLOCK_TYPES[name].grid(scales_OS, SHAPE[1])
    own_OI = grid.decode(BLOCK_TYPES[name].codes(expected))
    nearest_OI = grid.decode(grid.nearest(values_OI))
    assert float((nearest_OI - values_OI).square().sum()) <= float((own_OI - values_OI).square().sum())


@pytest.mark.parametrize("name", PACKED)
def test_scales_do_not_depend_on_the_grouping_of_rows(name: str) -> None:
    block_type, inputs_I = BLOCK_TYPES[name], torch.logspace(0, -3, SHAPE[1])
    parts = [block_type.fresh_scales(part_OI, inputs_I) for part_OI in weights().split(7)]
    assert torch.equal(torch.cat(parts), block_type.fresh_scales(weights(), inputs_I))
    assert not torch.equal(torch.cat(parts), block_type.fresh_scales(weights().flip(0), inputs_I))


@pytest.mark.parametrize("name", PACKED)
def test_inputs_that_calibration_never_saw_keep_their_weights(name: str) -> None:
    """libgguf gives a group without importance the scale 0."""
    values_OI = gaussian(1, SHAPE)
    inputs_I = torch.ones(SHAPE[1])
    inputs_I[:256] = 0
    for some_I in (inputs_I, torch.zeros(SHAPE[1])):
        grid = BLOCK_TYPES[name].grid(BLOCK_TYPES[name].fresh_scales(values_OI, some_I), SHAPE[1])
        error_I = (grid.decode(grid.nearest(values_OI)) - values_OI).square().mean(dim=0)
        assert float(error_I[:256].mean()) < 1.5 * float(error_I[256:].mean())


def test_a_missing_libgguf_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libgguf", None)
    with pytest.raises(RecipeError, match=r'libgguf package is missing.*pip install "qmerge\[gguf\]"'):
        BLOCK_TYPES["Q4_K"].fresh_scales(weights())


# --- grids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("name", PACKED)
def test_nearest_floor_and_gap_by_brute_force(name: str, sample: str) -> None:
    stored_OB = SAMPLES[sample](name)[:, : BLOCK_TYPES[name].row_bytes(256)]
    grid = grid_of(BLOCK_TYPES[name], stored_OB)
    codes_OI = BLOCK_TYPES[name].codes(stored_OB)
    values_OI = grid.decode(codes_OI)
    goal_OI = values_OI * 1.1 + 0.3 * values_OI.abs().mean(dim=1, keepdim=True) * gaussian(2, tuple(values_OI.shape))
    levels = torch.stack([grid.decode(torch.full_like(codes_OI, code)) for code in range(grid.levels_count)])
    # Half a rounding error of a value: at a tie either level is as good.
    tolerance_OI = levels.abs().amax(dim=0) * 2**-23
    best_OI = (levels - goal_OI).abs().amin(dim=0)
    assert bool(((grid.decode(grid.nearest(goal_OI)) - goal_OI).abs() <= best_OI + tolerance_OI).all())
    below_OI = torch.where(levels <= goal_OI, levels, levels.amin(dim=0)).amax(dim=0)
    assert bool(((grid.decode(grid.floor(goal_OI)) - below_OI).abs() <= tolerance_OI).all())
    gap_OI = grid.gap(codes_OI, torch.ones_like(values_OI))
    above = torch.where(levels > values_OI + tolerance_OI, levels, torch.inf).amin(dim=0)
    inside = above.isfinite()
    torch.testing.assert_close(gap_OI[inside], (above - values_OI)[inside])
    low_OI, high_OI = grid.ends()
    torch.testing.assert_close(low_OI, levels.amin(dim=0), rtol=1e-6, atol=0)
    torch.testing.assert_close(high_OI, levels.amax(dim=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", PACKED)
def test_a_hint_stays_where_its_value_does(name: str) -> None:
    stored_OB = torch.cat([stored_by_libgguf(name, weights(SHAPE)), random_rows(name, 24, SHAPE[1])])
    codes_OI, grid = BLOCK_TYPES[name].codes(stored_OB), grid_of(BLOCK_TYPES[name], stored_OB)
    assert torch.equal(grid.nearest(grid.decode(codes_OI), codes_OI), codes_OI)
    goal_OI = grid.decode(codes_OI) * 1.02
    assert torch.equal(grid.decode(grid.nearest(goal_OI, codes_OI)), grid.decode(grid.nearest(goal_OI)))


@pytest.mark.parametrize("name", PACKED)
def test_walking_up_meets_every_level_once(name: str) -> None:
    values_OI = gaussian(shape=(8, 256))
    grid = BLOCK_TYPES[name].grid(BLOCK_TYPES[name].fresh_scales(values_OI), 256)
    levels = ascending(grid, values_OI)
    assert len(levels) == grid.levels_count
    assert bool((levels.diff(dim=0) > 0).all())
    highest = grid.nearest(torch.full_like(values_OI, 1e30))
    assert bool(grid.gap(highest, torch.ones_like(values_OI)).isinf().all())
    assert torch.equal(grid.decode(grid.step(grid.step(highest, DOWN), UP)), grid.decode(highest))


@pytest.mark.parametrize("name", PACKED)
def test_column_rounder_is_the_grid_itself(name: str) -> None:
    """With a minimum, up to a rounding error of the largest value of a group. Groups with scale 0 included."""
    stored_OB = stored_by_libgguf(name, weights())
    grid = grid_of(BLOCK_TYPES[name], stored_OB)
    assert not bool(grid.scale_OG.all())  # type: ignore[attr-defined]
    goal_OI = weights() + 0.003 * gaussian(6, SHAPE)
    rows, columns = torch.tensor([5, 2, 23, 0, 1]), torch.randperm(SHAPE[1])
    expected_OI = grid.decode(grid.nearest(goal_OI))
    rounder = grid.column_rounder(columns, rows)
    for i, column in enumerate(columns.tolist()):
        found_O = rounder(i, goal_OI[rows, column].clone())
        exact = name not in WITH_MINIMUM
        torch.testing.assert_close(found_O, expected_OI[rows, column], rtol=0, atol=0 if exact else 2e-6)


def test_a_flat_group_is_its_minimum_in_the_kernels() -> None:
    """Scale 0 or next to it, and a minimum: every code has this value, in every form of the grid."""
    scale_OG = torch.tensor([[0.0, 1e-9, 0.0, -0.5]])
    minimum_OG = torch.tensor([[0.25, -3.0, 0.0, 0.5]])
    scales_OS = torch.zeros(1, 0, dtype=torch.uint8)
    grid = BlockGrid(scale_OG, minimum_OG, group_size=32, offset=0, levels_count=16, scales_OS=scales_OS)
    goal_OI = gaussian(3, (1, 128))
    rounder = grid.column_rounder(torch.arange(128), torch.arange(1))
    found_OI = torch.stack([rounder(i, goal_OI[:, i]) for i in range(128)], dim=1)
    torch.testing.assert_close(found_OI, grid.decode(grid.nearest(goal_OI)), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found_OI[0, ::32], torch.tensor([-0.25, 3.0, 0.0, float(found_OI[0, 96])]))
    near_OI = torch.full((1, 128), 7, dtype=torch.uint8)
    assert bool((grid.nearest(goal_OI, near_OI)[0, :32] == 7).all())
    assert torch.equal(grid.nearest(found_OI, grid.nearest(goal_OI)), grid.nearest(goal_OI))


# --- roundings --------------------------------------------------------------------------------------------------------

OUTPUTS, INPUTS = 64, 512


def layer() -> tuple[Tensor, Tensor, InputStatistics]:
    """A weight, a delta of 1 % of it whose directions are those of strong inputs, and statistics of inputs (power law)."""
    x = gaussian(3, (2048, INPUTS)) @ torch.diag(torch.arange(1, INPUTS + 1).float().rsqrt())
    x = x @ torch.linalg.qr(gaussian(4, (INPUTS, INPUTS)))[0]
    weight_OI = gaussian(5, (OUTPUTS, INPUTS)) * 0.03
    delta_OI = gaussian(6, (OUTPUTS, 4)) @ (gaussian(7, (4, len(x))) @ x)
    delta_OI *= 0.01 * weight_OI.norm() / delta_OI.norm()
    return weight_OI, delta_OI, InputStatistics(x.T @ x / len(x), None, len(x))


def objective_of(delta_OI: Tensor, statistics: InputStatistics) -> Objective:
    u, s, vt = torch.linalg.svd(delta_OI, full_matrices=False)
    return make_objective(statistics, (u[:, :4], s[:4], vt[:4].T.contiguous()), INPUTS, torch.device("cpu"))


def size_in(matrix_II: Tensor, error_OI: Tensor) -> float:
    return float(((error_OI @ matrix_II) * error_OI).sum())


def kept_of(delta_OI: Tensor, change_OI: Tensor, statistics: InputStatistics) -> float:
    """How much of the delta's effect on the layer's outputs a change has."""
    weighted_OI = delta_OI @ statistics.hessian_II
    return float((change_OI * weighted_OI).sum() / (delta_OI * weighted_OI).sum())


def rounded(kind: str, merged_OI: Tensor, grid: Grid, **known: Any) -> Tensor:
    rounding = {"nearest": nearest.ROUNDING, "preserve": preserve.ROUNDING}[kind]
    return rounding.choose(merged_OI, grid, RoundingContext(name="w", rows=Rows(0, OUTPUTS), **known))


@pytest.mark.parametrize("name", PACKED)
def test_preserve_keeps_the_delta_on_the_scales_of_the_base(name: str) -> None:
    weight_OI, delta_OI, statistics = layer()
    block_type = BLOCK_TYPES[name]
    stored_OB = stored_by_libgguf(name, weight_OI, statistics.hessian_II.diagonal().contiguous())
    grid, base_codes_OI = grid_of(block_type, stored_OB), block_type.codes(stored_OB)
    base_OI = grid.decode(base_codes_OI)
    objective = objective_of(delta_OI, statistics)
    known = {"base_codes_OI": base_codes_OI, "objective": objective, "delta_OI": delta_OI}
    kept, errors = {}, {}
    for kind in ("nearest", "preserve"):
        codes_OI = rounded(kind, base_OI + delta_OI, grid, **known)
        written_OI = torch.from_numpy(by_gguf(name, block_type.pack(codes_OI, grid)))
        assert torch.equal(written_OI, grid.decode(codes_OI))
        kept[kind] = kept_of(delta_OI, written_OI - base_OI, statistics)
        errors[kind] = size_in(objective.K_II, written_OI - base_OI - delta_OI)
    assert abs(kept["preserve"] - 1) < 0.15
    assert errors["preserve"] < 0.65 * errors["nearest"]
    if name != "Q8_0":
        assert kept["nearest"] < 0.25, "the control: the delta is below half a gap"


@pytest.mark.parametrize("name", PACKED)
def test_preserve_on_fresh_scales(name: str) -> None:
    weight_OI, delta_OI, statistics = layer()
    merged_OI = weight_OI + delta_OI
    scales_OS = BLOCK_TYPES[name].fresh_scales(merged_OI, statistics.hessian_II.diagonal().contiguous())
    grid = BLOCK_TYPES[name].grid(scales_OS, INPUTS)
    objective = objective_of(delta_OI, statistics)
    errors = {}
    for kind in ("nearest", "preserve"):
        codes_OI = rounded(kind, merged_OI, grid, objective=objective, delta_OI=delta_OI)
        errors[kind] = size_in(statistics.hessian_II, grid.decode(codes_OI) - merged_OI)
    assert errors["preserve"] < 0.5 * errors["nearest"]


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "IQ4_XS"])
def test_kernels_choose_the_levels_that_torch_chooses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OI, delta_OI, statistics = layer()
    weight_OI[:4, :64] = 0.5  # groups with scale 0
    grid = BLOCK_TYPES[name].grid(BLOCK_TYPES[name].fresh_scales(weight_OI), INPUTS)
    objective = objective_of(delta_OI, statistics)
    by_kernels = rounded("preserve", weight_OI + delta_OI, grid, objective=objective)
    monkeypatch.setenv(TORCH_LOOPS, "1")
    assert torch.equal(rounded("preserve", weight_OI + delta_OI, grid, objective=objective), by_kernels)
    other = BLOCK_TYPES[name].grid(BLOCK_TYPES[name].fresh_scales(weight_OI * 1.1), INPUTS)
    assert not torch.equal(rounded("preserve", weight_OI + delta_OI, other, objective=objective), by_kernels)
