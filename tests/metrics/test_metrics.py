"""Every metric against its formula in plain numpy float64, and against the others."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qmerge import plugins
from qmerge.adapters.updates.lora import LoraUpdate
from qmerge.grids import Grid
from qmerge.metrics import base
from qmerge.metrics._dots import count_different
from qmerge.metrics.base import MergedRows, added, over_weights, plain, sums_of, values_of
from qmerge.rounding import nearest, stochastic
from qmerge.rounding.base import RoundingContext
from qmerge.types import Rows

from ..formats.test_grids import gaussian, grid_for

SHAPE = (96, 160)
RANK = 4
# As if the weight were a stack of so many matrices.
EXPERTS = 4
# Inputs of a layer, as a calibration would see them: some directions far stronger than others.
INPUTS_NI = np.random.default_rng(0).normal(size=(300, SHAPE[1])) * np.geomspace(1, 0.05, SHAPE[1])
TARGETS = ["nf4", "fp4", "int8", "bf16", "fp32"]


def update_of(size: float, seed: int = 1, shape: tuple[int, int] = SHAPE, rank: int = RANK) -> LoraUpdate:
    """A delta whose rms is about ``size``, every rank of another strength."""
    strength_R = torch.linspace(1, 2, rank)
    B_OR = gaussian(seed, (shape[0], rank)) * strength_R
    A_RI = gaussian(seed + 1, (rank, shape[1]))
    return LoraUpdate(A_RI, B_OR, size / float((B_OR @ A_RI).square().mean().sqrt()))


def comparison(
    target: str, size: float = 0.05, rounding: Any = nearest, shape: tuple[int, int] = SHAPE, base_OI: Tensor | None = None
) -> MergedRows:  # fmt: skip
    """A Gaussian weight on the target's grid, a LoRA delta, and what rounding makes of the sum."""
    values_OI = gaussian(0, shape) if base_OI is None else base_OI
    grid: Grid = grid_for(target, values_OI)
    codes_OI = grid.nearest(values_OI)
    base_OI, rows, update = grid.decode(codes_OI), Rows(0, shape[0]), update_of(size, shape=shape)
    merged_OI = update.apply(base_OI, rows)
    chosen_OI = rounding.ROUNDING.choose(merged_OI, grid, RoundingContext(name="layer.weight", rows=rows))
    seen_II = torch.from_numpy(INPUTS_NI.T @ INPUTS_NI).float() if shape[1] == SHAPE[1] else None
    return MergedRows(
        base_OI=base_OI,
        merged_OI=merged_OI,
        stored_OI=grid.decode(chosen_OI),
        base_codes_OI=codes_OI,
        codes_OI=chosen_OI,
        grid=grid,
        position=rows,
        weight_rows=shape[0],
        update=update,
        hessian_II=seen_II,
        matrices=EXPERTS if shape == SHAPE else 1,
    )


def numbers(c: MergedRows) -> dict[str, float | None]:
    return values_of(plain(sums_of(c)))


# --- formulas --------------------------------------------------------------------------------------------------------


def np64(*tensors: Tensor) -> tuple[np.ndarray[Any, Any], ...]:
    return tuple(tensor.double().numpy() for tensor in tensors)


def delta_and_change(c: MergedRows) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    base, merged, stored = np64(c.base_OI, c.merged_OI, c.stored_OI)
    return merged - base, stored - base


def kept(c: MergedRows) -> float:
    delta, change = delta_and_change(c)
    return float((change * delta).sum() / (delta * delta).sum())


def noise(c: MergedRows) -> float:
    delta, change = delta_and_change(c)
    return float(np.linalg.norm(change - delta) / np.linalg.norm(delta))


def cosine(c: MergedRows) -> float:
    delta, change = delta_and_change(c)
    lengths = np.linalg.norm(change) * np.linalg.norm(delta)
    return float((change * delta).sum() / lengths) if lengths else 0.0


def relative_size(c: MergedRows) -> float:
    delta, _ = delta_and_change(c)
    return float(np.sqrt((delta**2).mean() / (np64(c.base_OI)[0] ** 2).mean()))


def codes_changed(c: MergedRows) -> float:
    return float((c.codes_OI.float().numpy() != c.base_codes_OI.float().numpy()).mean())


def gaps(c: MergedRows) -> np.ndarray[Any, Any]:
    """Distance to the next level on the delta's side: the smallest positive one, over all levels that any entry has."""
    return np64(c.grid.gap(c.base_codes_OI, c.delta_OI))[0]


def under_half_gap(c: MergedRows) -> float:
    return float((np.abs(delta_and_change(c)[0]) * 2 < gaps(c)).mean())


def gap_to_delta(c: MergedRows) -> float:
    found = gaps(c)
    return float(found[np.isfinite(found)].mean() / np.sqrt((delta_and_change(c)[0] ** 2).mean()))


def clipped(c: MergedRows) -> float:
    """Entries that are further from what was stored than half the only step that leads away from there."""
    merged, stored = np64(c.merged_OI, c.stored_OI)
    up, down = (np64(c.grid.decode(c.grid.step(c.codes_OI, direction)))[0] for direction in (1, -1))
    highest, lowest = up == stored, down == stored
    above = highest & (merged - stored > (stored - down) / 2)
    below = lowest & (stored - merged > (up - stored) / 2)
    return float((above | below).mean())


def output_kept(c: MergedRows) -> float:
    """By explicit inputs: what the stored change adds to the outputs, along what the delta adds."""
    (delta, change), x = delta_and_change(c), INPUTS_NI
    return float(((x @ change.T) * (x @ delta.T)).sum() / ((x @ delta.T) ** 2).sum())


def output_noise(c: MergedRows) -> float:
    (delta, change), x = delta_and_change(c), INPUTS_NI
    return float(np.linalg.norm(x @ (change - delta).T) / np.linalg.norm(x @ delta.T))


def ranks(c: MergedRows) -> list[float]:
    """u_kᵀ (stored − base) v_k / s_k, by a full decomposition of B·A in float64."""
    assert isinstance(c.update, LoraUpdate)
    B, A = np64(c.update.B_OR, c.update.A_RI)
    u, s, vt = np.linalg.svd(c.update.scale * B @ A)
    change = delta_and_change(c)[1]
    return [float(u[:, k] @ change @ vt[k] / s[k]) for k in range(c.update.rank)]


def experts(c: MergedRows) -> list[float]:
    delta, change = delta_and_change(c)
    pairs = zip(np.split(delta, EXPERTS), np.split(change, EXPERTS), strict=True)
    return [float((change * delta).sum() / (delta**2).sum()) for delta, change in pairs]


FORMULAS: dict[str, Callable[[MergedRows], float]] = {
    "kept": kept,
    "noise": noise,
    "cosine": cosine,
    "relative_size": relative_size,
    "codes_changed": codes_changed,
    "clipped": clipped,
    "under_half_gap": under_half_gap,
    "gap_to_delta": gap_to_delta,
    "output_kept": output_kept,
    "output_noise": output_noise,
    "rank_kept_min": lambda c: min(ranks(c)),
    "rank_kept_median": lambda c: statistics.median(ranks(c)),
    "expert_kept_min": lambda c: min(experts(c)),
    "expert_kept_median": lambda c: statistics.median(experts(c)),
}


def test_every_metric_has_a_formula_here() -> None:
    """predicted_kept is held against what is measured, below."""
    assert {*FORMULAS, "predicted_kept"} == set(plugins.names("metrics"))


@pytest.mark.parametrize("rounding", [nearest, stochastic])
@pytest.mark.parametrize("size", [0.002, 0.05, 0.5])
@pytest.mark.parametrize("target", TARGETS)
def test_formulas(target: str, size: float, rounding: Any) -> None:
    """float32 differences of numbers near 1 carry 1e-7; what is left of a delta of 0.002 is exact to 1e-4."""
    c = comparison(target, size, rounding)
    found = numbers(c)
    for name, formula in FORMULAS.items():
        value = found[name]
        assert value is not None
        assert value == pytest.approx(formula(c), rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("samples", [(2**14, 2**22), (2**10, 2**12)])
@pytest.mark.parametrize("target", TARGETS)
def test_sums_add_up_over_row_blocks(target: str, samples: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples, too, are the same however the rows are grouped: one sample of all, or several."""
    monkeypatch.setattr(base, "SAMPLE_ENTRIES", samples[0])
    monkeypatch.setattr(base, "SAMPLE_SPACING", samples[1])
    c = comparison(target)
    total = None
    step = 2 * c.grid.row_step
    for start in range(0, SHAPE[0], step):
        total = added(total, sums_of(c.part(Rows(start, start + step))))
    assert total is not None
    whole, apart = numbers(c), values_of(plain(total))
    for name, value in whole.items():
        # The mean gap leaves the ends of the grid out, block by block: a share of a share, in a number for orientation.
        rel = 1e-3 if name == "gap_to_delta" else 1e-5
        assert apart[name] == pytest.approx(value, rel=rel, abs=1e-6), name


def test_a_sample_stands_for_the_whole_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights count by the size of their whole delta, however small the samples are."""
    monkeypatch.setattr(base, "SAMPLE_ENTRIES", 2**10)
    monkeypatch.setattr(base, "SAMPLE_SPACING", 2**12)
    c = comparison("nf4")
    sums = sums_of(c)
    assert sums["under_half_gap"]["count"] < SHAPE[0] * SHAPE[1] / 3
    assert sums["predicted_kept"]["weight"] == pytest.approx(c.delta_delta, rel=0.3)


CODE_DTYPES = [
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bfloat16,
    torch.float16,
    torch.float32,
]


@pytest.mark.parametrize("dtype", CODE_DTYPES)
def test_codes_that_differ_are_counted(dtype: torch.dtype) -> None:
    """As torch counts them: the two zeros of a float are the same, the lowest integer is not 0."""
    codes = (gaussian(0, (40, 7)).abs() * 3).to(dtype)
    others = (gaussian(1, (40, 7)).abs() * 3).to(dtype)
    codes[0], others[0] = 0, -0.0 if dtype.is_floating_point else 0
    if not dtype.is_floating_point:
        codes[1], others[1] = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    assert count_different(codes, others) == int((codes != others).sum()) > 0
    assert count_different(codes[:1], others[:1]) == count_different(codes, codes) == 0


def test_totals_count_each_weight_by_its_delta() -> None:
    """kept of two weights together is that of one matrix that holds both."""
    small, large = comparison("nf4", 0.01), comparison("nf4", 0.2)
    total = values_of(over_weights([plain(sums_of(small)), plain(sums_of(large))]))
    one, other = (delta_and_change(c) for c in (small, large))
    delta, change = (np.concatenate(pair) for pair in zip(one, other, strict=True))
    assert total["kept"] == pytest.approx((change * delta).sum() / (delta**2).sum(), rel=1e-4)
    assert total["noise"] == pytest.approx(np.linalg.norm(change - delta) / np.linalg.norm(delta), rel=1e-4)
    assert total["rank_kept_min"] == pytest.approx(min(ranks(small) + ranks(large)), rel=1e-3, abs=1e-5)
    assert total["expert_kept_min"] == pytest.approx(min(experts(small) + experts(large)), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("rounding", [nearest, stochastic])
@pytest.mark.parametrize("target", ["nf4", "int8", "bf16"])
def test_noise_follows_from_kept(target: str, rounding: Any) -> None:
    """‖stored − merged‖² = (1 − 2·kept)‖D‖² + ‖stored − base‖²: kept alone says nothing of the noise."""
    c = comparison(target, rounding=rounding)
    found, (delta, change) = numbers(c), delta_and_change(c)
    assert found["noise"] is not None and found["kept"] is not None
    squared = (delta**2).sum()
    assert found["noise"] ** 2 * squared == pytest.approx(
        (1 - 2 * found["kept"]) * squared + (change**2).sum(), rel=1e-4
    )


@pytest.mark.parametrize("target", TARGETS)
def test_a_delta_of_zero_has_no_survival(target: str) -> None:
    c = comparison(target)
    nothing = LoraUpdate(c.update.A_RI, torch.zeros_like(c.update.B_OR), 1.0)  # type: ignore[attr-defined]
    c = replace(c, merged_OI=c.base_OI, stored_OI=c.base_OI, codes_OI=c.base_codes_OI, update=nothing)
    found = numbers(c)
    assert [found[name] for name in ("kept", "noise", "cosine", "gap_to_delta", "predicted_kept", "rank_kept_min")] == [
        None
    ] * 6
    assert found["codes_changed"] == 0 and found["relative_size"] == 0


# --- the small factors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(96, 160), (160, 96), (3, 160), (96, 3)])
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_row_norms_and_directions(shape: tuple[int, int], rank: int) -> None:
    """From B and A alone, also where the rank is larger than the matrix."""
    update = update_of(0.1, shape=shape, rank=rank)
    B, A = np64(update.B_OR, update.A_RI)
    delta = update.scale * B @ A
    assert update.row_norms().numpy() == pytest.approx(np.linalg.norm(delta, axis=1), rel=1e-5)
    u_OR, s_R, v_IR = update.directions()
    (u, s, v), count = np64(u_OR, s_R, v_IR), min(*shape, rank)
    assert s[:count] == pytest.approx(np.linalg.svd(delta)[1][:count], rel=1e-5)
    assert (u * s) @ v.T == pytest.approx(delta, abs=1e-5 * np.abs(delta).max())
    assert u.T @ u == pytest.approx(np.eye(u.shape[1]), abs=1e-5)


def test_ranks_that_carry_nothing_do_not_count() -> None:
    c = comparison("bf16", 0.05)
    assert isinstance(c.update, LoraUpdate)
    B_OR = c.update.B_OR.clone()
    B_OR[:, 0] = 0
    update = replace(c.update, B_OR=B_OR)
    merged_OI = update.apply(c.base_OI, c.position)
    codes_OI = c.grid.nearest(merged_OI)
    c = replace(c, merged_OI=merged_OI, stored_OI=c.grid.decode(codes_OI), codes_OI=codes_OI, update=update)
    assert numbers(c)["rank_kept_min"] == pytest.approx(min(ranks(replace(c, update=trimmed(update)))), rel=1e-4)


def trimmed(update: LoraUpdate) -> LoraUpdate:
    return replace(update, B_OR=update.B_OR[:, 1:], A_RI=update.A_RI[1:])


# --- what is predicted is what is measured ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "size"), [("nf4", 0.05), ("nf4", 0.1), ("fp4", 0.1), ("int8", 0.008), ("bf16", 0.001), ("bf16", 0.01)]
)
def test_predicted_kept_is_what_is_measured(target: str, size: float) -> None:
    """For a Gaussian delta. kept is a mean over N entries of Q·d/σ², whose variance is at most E[(gap + |d|)² d²]/σ⁴:
    with the entries' own numbers that is five standard errors here; 1 % of it more for what rows share."""
    shape = (256, 512)
    c = comparison(target, size, shape=shape)
    rank = 256  # a delta of this rank is Gaussian, entry by entry, to within 1/√rank in its variance
    update = update_of(size, shape=shape, rank=rank)
    merged_OI = update.apply(c.base_OI, c.position)
    codes_OI = c.grid.nearest(merged_OI)
    c = replace(c, merged_OI=merged_OI, stored_OI=c.grid.decode(codes_OI), codes_OI=codes_OI, update=update)
    found, (delta, change) = numbers(c), delta_and_change(c)
    each = change * delta / (delta**2).mean()
    error = float(each.std() / np.sqrt(each.size))
    assert found["predicted_kept"] is not None and found["kept"] is not None
    assert error < 0.02
    assert abs(found["predicted_kept"] - found["kept"]) < 5 * error + 0.01 * found["kept"]


@pytest.mark.parametrize(("size", "low", "high"), [(0.01, 0, 0.02), (0.071, 0.4, 0.6), (0.5, 0.9, 1.1)])
def test_what_survives_in_nf4(size: float, low: float, high: float) -> None:
    """Nearly nothing of a typical QLoRA delta, about half at 7 % of the weight, nearly all of a large one."""
    value = numbers(comparison("nf4", size, shape=(512, 512)))["kept"]
    assert value is not None and low <= value <= high
