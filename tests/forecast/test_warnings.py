"""Warnings before and after a run: the same trouble is shown once."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from qmerge.forecast.predict import Survival
from qmerge.forecast.warnings import is_same_warning, original_warnings, survival_warnings

from .. import models
from ..conftest import Cli

LOST = Survival(
    module="model.layers.0.self_attn.q_proj",
    target="nf4",
    rounding="nearest",
    rank=8,
    kept=0.0005,
    noise=1.0,
    relative_size=0.012,
    gap_to_delta=8.6,
    delta_squared=1.0,
)
LOUD = replace(LOST, rounding="stochastic", kept=1.0, noise=3.2)
MEASURED = {"kept": 0.2, "relative_size": 0.3, "gap_to_delta": 1e9, "delta_squared": 2.0}


def layers(survival: Survival, *numbers: int) -> list[Survival]:
    return [replace(survival, module=f"model.layers.{n}.self_attn.q_proj") for n in numbers]


@pytest.mark.parametrize(
    ("predicted", "measured"),
    [
        ([LOST], [replace(LOST, **MEASURED)]),
        ([LOUD], [replace(LOUD, noise=12.5)]),
        (layers(LOST, 0, 1, 2), layers(replace(LOST, kept=0.3), 0, 1, 2)),
        (
            layers(LOST, 0, 1),
            [*layers(LOST, 0), replace(LOST, module="model.layers.1.self_attn.q_proj", gap_to_delta=50)],
        ),
    ],
)
def test_a_measured_warning_repeats_the_predicted_one(predicted: list[Survival], measured: list[Survival]) -> None:
    before, after = survival_warnings(predicted, predicted=True), survival_warnings(measured, predicted=False)
    assert len(before) == len(after) and before != after
    assert all(is_same_warning(line, other) for line, other in zip(before, after, strict=True))


@pytest.mark.parametrize(
    "measured",
    [
        layers(LOST, 1),
        [replace(LOST, rank=4)],
        [replace(LOST, target="fp4")],
        [LOUD],
        layers(LOST, 0, 1),
    ],
)
def test_other_modules_or_another_trouble_are_new(measured: list[Survival]) -> None:
    (before,) = survival_warnings([LOST], predicted=True)
    assert not any(is_same_warning(before, line) for line in survival_warnings(measured, predicted=False))


def test_an_untrained_adapter_changes_nothing() -> None:
    zero = replace(LOST, kept=None, noise=None, gap_to_delta=None, relative_size=0.0, delta_squared=0.0)
    (line,) = survival_warnings([zero], predicted=True)
    assert "changes nothing" in line and "never trained" in line


# --- the 16-bit original ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("merge_onto", "gap", "dense_target", "trained_on", "warned", "another"),
    [
        ("original", 8.0, True, None, True, True),
        ("original", 8.0, False, None, True, False),
        ("dequantized", 8.0, True, None, True, True),
        ("original", 0.2, True, None, False, False),  # the two bases are nearly the same
        ("original", None, True, None, False, False),
        ("original", None, True, "nf4-dq", True, True),
        ("original", None, False, "nf4-dq", False, False),
        ("dequantized", None, True, "nf4-dq", False, False),
    ],
)
def test_the_original_in_16_bits_is_another_model(
    merge_onto: str, gap: float | None, dense_target: bool, trained_on: str | None, warned: bool, another: bool
) -> None:
    lines = original_warnings(merge_onto, gap, dense_target=dense_target, trained_on=trained_on)
    assert len(lines) == int(warned)
    assert ("gain kept 1.18" in " ".join(lines) and "KL ratio was 0.72" in " ".join(lines)) == another


def test_plan_says_so(cli: Cli, nf4: Path, dense: Path, tmp_path: Path) -> None:
    usual = models.adapter(models.llama(), tmp_path / "usual", size=1e-3)  # the bases differ by more than this delta
    inputs = ("plan", "--base", nf4, "--adapter", usual, "--original", dense, "--device", "cpu")
    assert "KL ratio was 0.72" in cli(*inputs).err
    assert "KL ratio was 0.72" in cli(*inputs, "--merge-onto", "original", "--target", "bf16").err
    assert "KL ratio was 0.72" not in cli(*inputs[:5], "--target", "bf16").err


# --- int8 ------------------------------------------------------------------------------------------------------------


def test_loaders_of_int8_quantize_activations(cli: Cli, nf4: Path, lora: Path, tmp_path: Path) -> None:
    """The numbers are about stored values; bitsandbytes runs int8 with int8 activations."""
    inputs = ("--base", nf4, "--adapter", lora, "--device", "cpu")
    every = cli("plan", *inputs)
    assert re.search(r"fp8.*int8.*: loaders quantize activations, too", every.out.replace("w8a8, ", "")), every.out
    as_it_runs = "KL ratio was 0.063 as it runs, but 0.004 by the stored values"
    assert as_it_runs not in every.err
    assert as_it_runs in cli("plan", *inputs, "--target", "int8").err
    assert as_it_runs not in cli("plan", *inputs, "--target", "w8a16").err
    ran = cli(*inputs, "--target", "int8", "--out", tmp_path / "out")
    assert ran.err.count(as_it_runs) == 1
    assert as_it_runs in (tmp_path / "out" / "README.md").read_text()
