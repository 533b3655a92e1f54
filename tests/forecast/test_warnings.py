"""Warnings before and after a run: the same trouble is shown once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qmerge.forecast.predict import Survival
from qmerge.forecast.warnings import is_same_warning, survival_warnings

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
