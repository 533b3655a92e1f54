"""Values at the edges of float32, and weights of odd sizes, in every format and with every rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qmerge import run
from qmerge.errors import AdapterError, NumbersError
from qmerge.formats import all_targets, get_target
from qmerge.grids import DOWN, UP
from qmerge.recipe import make_recipe
from qmerge.rounding import get_rounding
from qmerge.rounding.base import RoundingContext
from qmerge.types import Rows

from .. import models
from ..test_plugins import takes
from .test_grids import gaussian, grid_for

TARGETS = [name for name, target in all_targets().items() if not target.info.takes_stacks]
SHAPE = (32, 256)  # which every format takes
ONE_ROW, ONE_COLUMN, ODD = (1, 256), (32, 1), (7, 33)

NO_MORE = 2e-38
"""What float32 cannot compute with exactly: below its smallest normal number, 1.2e-38, and a little above."""


def values_of(case: str) -> Tensor:
    values_OI = 0.05 * gaussian(3, SHAPE)
    if case == "a block of zeros":
        values_OI[:, :64] = 0
        values_OI[3] = 0
    elif case == "one outlier":
        values_OI[5, 7] = 1000
    elif case == "every second one tiny":
        values_OI[:, ::2] *= 1e-35
    elif case in ("one row", "one column", "odd sizes"):
        return 0.05 * gaussian(4, {"one row": ONE_ROW, "one column": ONE_COLUMN, "odd sizes": ODD}[case])
    return values_OI * FACTORS.get(case, 1.0)


FACTORS = {"zeros": 0.0, "negative zeros": -0.0, "denormals": 1e-40, "tiny": 1e-30, "large": 1e3}
CASES = [*FACTORS, "a block of zeros", "one outlier", "every second one tiny", "one row", "one column", "odd sizes"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", TARGETS)
def test_values_at_the_edges(name: str, case: str) -> None:
    values_OI = values_of(case)
    shape = (values_OI.shape[0], values_OI.shape[1])
    if not takes(name, shape):
        pytest.skip(f"{name} does not take {shape}, and says so")
    grid = grid_for(name, values_OI)
    largest = float(values_OI.abs().max())
    for rounding in ("nearest", "stochastic", "preserve"):
        context = RoundingContext(name="layer.weight", rows=Rows(0, len(values_OI)))
        stored_OI = grid.decode(get_rounding(rounding).choose(values_OI, grid, context))
        assert bool(stored_OI.isfinite().all()), rounding
        assert float(stored_OI.abs().max()) <= 2 * largest + NO_MORE, rounding
        is_zero = values_OI == 0
        if case in ("zeros", "negative zeros", "a block of zeros"):
            assert float(stored_OI[is_zero].abs().max()) <= NO_MORE / 1e3, (
                rounding
            )  # scales may be positive for zeros, too
        if rounding == "nearest":
            check_nearest(stored_OI, values_OI, grid)


def check_nearest(stored_OI: Tensor, values_OI: Tensor, grid: Any) -> None:
    """No neighbour on the grid is nearer, but for the last bits of float32."""
    error_OI = (stored_OI - values_OI).abs()
    codes_OI = grid.nearest(values_OI)
    for direction in (UP, DOWN):
        neighbour_OI = grid.decode(grid.step(codes_OI, direction))
        gained_OI = error_OI - (neighbour_OI - values_OI).abs()
        assert bool((gained_OI <= 1e-6 * values_OI.abs() + NO_MORE).all())


def test_a_neighbour_that_is_nearer_would_be_seen() -> None:
    """The control."""
    values_OI = values_of("large")
    grid = grid_for("nf4", values_OI)
    with pytest.raises(AssertionError):
        check_nearest(grid.decode(grid.step(grid.nearest(values_OI), UP)), values_OI, grid)


@pytest.mark.parametrize(("name", "most"), [("fp16", 65504), ("mlx_nvfp4", 2688)])
def test_values_past_the_end_are_refused(name: str, most: int) -> None:
    """Formats with a largest number; the others have a scale of more bits."""
    target = get_target(name)
    inside, outside = torch.full(SHAPE, 0.99 * most), torch.full(SHAPE, 1.1 * most)
    for values_OI in (inside, -inside):
        grid = grid_for(name, values_OI)
        target.check_range(grid.decode(grid.nearest(values_OI)), values_OI, "w")
    for values_OI in (outside, -outside):
        grid = grid_for(name, values_OI)
        with pytest.raises(NumbersError, match=f"reaches .*{name} ends at {most}.*--target"):
            target.check_range(grid.decode(grid.nearest(values_OI)), values_OI, "w")


# --- adapters --------------------------------------------------------------------------------------------------------

ADAPTERS: dict[str, tuple[int, float]] = {
    "rank 1": (1, 8.0),
    "rank above the matrix": (100, 8.0),
    "alpha 0": (4, 0.0),
    "alpha negative": (4, -8.0),
    "alpha tiny": (4, 1e-30),
    "alpha large": (4, 1e4),
}
"""Rank and alpha. The matrices are 64 x 64 and smaller."""


@pytest.mark.parametrize("case", ADAPTERS)
def test_ranks_and_alphas(case: str, dense: Path, tmp_path: Path) -> None:
    """base + alpha / rank · B A, against float64."""
    rank, alpha = ADAPTERS[case]
    merged = merge(dense, tmp_path, "fp32", r=rank, lora_alpha=alpha, target_modules=["k_proj"])
    base, factors = (
        load_file(dense / "model.safetensors"),
        load_file(tmp_path / "adapter" / "adapter_model.safetensors"),
    )
    name = "model.layers.0.self_attn.k_proj"
    A_RI = factors[f"base_model.model.{name}.lora_A.weight"].double()
    B_OR = factors[f"base_model.model.{name}.lora_B.weight"].double()
    base_OI = base[f"{name}.weight"].double()
    expected_OI = base_OI + alpha / rank * (B_OR @ A_RI)
    merged_OI = merged[f"{name}.weight"].double()
    assert torch.allclose(merged_OI, expected_OI, rtol=1e-5, atol=1e-6)
    assert bool((merged_OI == base_OI).all()) == (case in ("alpha 0", "alpha tiny"))


@pytest.mark.parametrize("target", ["nf4", "int8", "bf16"])
def test_an_adapter_of_zero_keeps_every_byte_of_its_grid(target: str, nf4: Path, tmp_path: Path) -> None:
    """Onto the base's own grid, nothing moves; with every rounding."""
    for rounding in ("nearest", "stochastic", "preserve"):
        out = tmp_path / rounding
        out.mkdir()
        merged = merge(nf4, out, target, lora_alpha=0.0, rounding=rounding)
        if target == "nf4":
            base = load_file(nf4 / "model.safetensors")
            assert all(torch.equal(merged[name], base[name]) for name in base if "quant_state" not in name)
        assert all(bool(values.isfinite().all()) for values in merged.values() if values.is_floating_point())


BAD: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "rank 0": ({"r": 0}, None, AdapterError),
    "alpha huge": ({"lora_alpha": 1e30}, None, AdapterError),
    "NaN in A": ({}, ("lora_A", float("nan")), (AdapterError, NumbersError)),
    "infinity in B": ({}, ("lora_B", float("inf")), (AdapterError, NumbersError)),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("target", ["nf4", "gptq", "bf16"])
def test_what_no_weight_can_hold(case: str, target: str, nf4: Path, tmp_path: Path) -> None:
    """An error on purpose, and nothing is left."""
    changes, damage, error = BAD[case]
    folder = models.adapter(models.llama(torch.float32), tmp_path / "adapter")
    models.edit_json(folder / "adapter_config.json", **changes)
    if damage:
        tensors = load_file(folder / "adapter_model.safetensors")
        damaged = next(name for name in tensors if damage[0] in name)
        tensors[damaged][0, 0] = damage[1]
        save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(error):
        run.merge(recipe(nf4, tmp_path, target))
    assert not (tmp_path / "out").exists()


def merge(base: Path, folder: Path, target: str, rounding: str = "nearest", **config: Any) -> dict[str, Tensor]:
    """All tensors of a merge with an adapter of this config."""
    models.adapter(models.llama(torch.float32), folder / "adapter", **config)
    run.merge(recipe(base, folder, target, rounding=rounding))
    return dict(load_file(folder / "out" / "model.safetensors"))


def recipe(base: Path, folder: Path, target: str, **settings: Any) -> Any:
    paths = {"base": str(base), "adapter": str(folder / "adapter"), "out": str(folder / "out")}
    settings = {"rounding": "nearest", **settings}
    if settings["rounding"] == "preserve":
        settings["calibration"] = "none"
    return make_recipe({"device": "cpu", **paths, "target": target, **settings})
