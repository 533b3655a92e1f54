"""Every metric against a plain formula in float64, and the closed form against what happens to Gaussian deltas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qmerge import plugins
from qmerge.formats._base import Format
from qmerge.grids import Grid
from qmerge.metrics._totals import over_weights, plain, sums_of, values_of
from qmerge.metrics.predicted_kept import expected_kept
from qmerge.types import Comparison, Rows, Update

from .models import lora_update

SHAPE = (64, 192)
ROWS = Rows(0, SHAPE[0])


def compared(size: float, target: str = "nf4", update: Update | None = None, seed: int = 0) -> Comparison:
    """A weight of rms 1 on a target's grid, merged with a delta of rms ``size``, rounded to nearest."""
    base, grid = on_grid(target, seed)
    update = update or lora_update(SHAPE, size=size)
    merged = update.apply(base, ROWS)
    base_codes = grid.nearest(base)
    codes = grid.nearest(merged, base_codes)
    return Comparison(base, merged, grid.decode(codes), base_codes, codes, grid, ROWS, update)


def on_grid(target: str, seed: int = 0, shape: tuple[int, int] = SHAPE) -> tuple[torch.Tensor, Grid]:
    form: Format = plugins.load("formats", target).FORMAT
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    options = form.options({}, None, "BF16")
    grid = form.grid(form.scales(values, options), shape, options)
    return grid.decode(grid.nearest(values)), grid


def measured(c: Comparison) -> dict[str, float | None]:
    return values_of(plain(sums_of(c)))


@pytest.mark.parametrize("size", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("target", ["nf4", "fp4", "int8", "bf16"])
def test_against_float64(target: str, size: float) -> None:
    c = compared(size, target)
    base, merged, stored = (x.double().numpy() for x in (c.base_OI, c.merged_OI, c.stored_OI))
    delta, change = merged - base, stored - base
    found = measured(c)
    expected = {
        "kept": (change * delta).sum() / (delta * delta).sum(),
        "noise": np.linalg.norm(stored - merged) / np.linalg.norm(delta),
        "cosine": (change * delta).sum() / max(np.linalg.norm(change) * np.linalg.norm(delta), 1e-300),
        "codes_changed": (stored != base).mean(),
        "relative_size": np.linalg.norm(delta) / np.linalg.norm(base),
    }
    for name, value in expected.items():
        # float32 sums within a row of 192: relative error below 192 * 2**-24
        assert found[name] == pytest.approx(value, rel=2e-5, abs=2e-6), name


def test_kept_and_noise_hang_together() -> None:
    """‖stored − merged‖² = (1 − 2 kept) ‖delta‖² + ‖stored − base‖²."""
    c = compared(0.1)
    found = measured(c)
    kept, noise = found["kept"], found["noise"]
    assert kept is not None and noise is not None
    assert noise**2 * c.delta_delta == pytest.approx((1 - 2 * kept) * c.delta_delta + c.change_change, rel=1e-5)


def test_ranks_against_a_full_svd() -> None:
    c = compared(0.2)
    u, s, vt = np.linalg.svd(c.delta_OI.double().numpy(), full_matrices=False)
    change = c.change_OI.double().numpy()
    survival = [float(u[:, k] @ change @ vt[k] / s[k]) for k in range(4)]
    found = measured(c)
    assert found["rank_kept_min"] == pytest.approx(min(survival), rel=1e-3)
    assert found["rank_kept_median"] == pytest.approx(float(np.median(survival)), rel=1e-3)


def test_under_half_gap_counts_what_nearest_leaves_alone() -> None:
    """On the base's own grid, away from its ends, an entry moves exactly when it passes half its gap."""
    c = compared(0.1)
    found = measured(c)
    inside = (c.base_codes_OI > 0) & (c.base_codes_OI < 15)
    still = (c.codes_OI == c.base_codes_OI)[inside].double().mean()
    assert found["under_half_gap"] == pytest.approx(float(still), abs=0.04)  # the 3 % at the ends count as still


@pytest.mark.parametrize("target", ["nf4", "int8", "bf16", "fp16"])
def test_a_delta_of_zero_has_no_numbers(target: str) -> None:
    found = measured(compared(0.0, target))
    for name in ("kept", "noise", "cosine", "predicted_kept", "rank_kept_min", "gap_to_delta"):
        assert found[name] is None, name
    assert found["codes_changed"] == 0.0


@pytest.mark.parametrize(
    ("target", "sizes"),
    [("nf4", (0.03, 0.05, 0.1, 0.3)), ("fp4", (0.05, 0.2)), ("int8", (0.005, 0.01)), ("bf16", (3e-4, 1e-3, 3e-3))],
)
def test_closed_form_against_gaussian_deltas(target: str, sizes: tuple[float, ...]) -> None:
    """kept is a mean over n entries of Q'-weighted d²; its standard error over 400 k entries is below 0.01."""
    base, grid = on_grid(target, seed=7, shape=(640, 640))
    for size in sizes:
        delta = torch.randn(base.shape, generator=torch.Generator().manual_seed(8)) * size
        change = grid.decode(grid.nearest(base + delta)) - base
        kept = float((change * delta).sum() / (delta * delta).sum())
        norms = torch.full((640,), size * math.sqrt(640))
        assert expected_kept(base, norms, grid) == pytest.approx(kept, abs=0.03), (target, size)


def test_totals_count_each_weight_by_its_delta() -> None:
    small, large = compared(0.02), compared(0.5)
    total = values_of(over_weights([plain(sums_of(small)), plain(sums_of(large))]))
    numerator = small.change_delta + large.change_delta
    assert total["kept"] == pytest.approx(numerator / (small.delta_delta + large.delta_delta))
    assert total["rank_kept_min"] == pytest.approx(min(measured(c)["rank_kept_min"] or 0.0 for c in (small, large)))
