"""What a plan says about the memory of a calibration."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmerge.demo import build
from qmerge.forecast.calibration import tokens_of_source
from qmerge.planning.memory import calibration_memory
from qmerge.planning.plan import Plan, make_plan
from qmerge.recipe import make_recipe
from qmerge.report.describe.plan import describe_plan
from qmerge.safetensors_io.reader import Reader

DEMO = Path(build.__file__).parent
WIDTH, INNER, VOCABULARY = 192, 512, 768
LAYER = 2 * WIDTH * WIDTH + 2 * 64 * WIDTH + 3 * WIDTH * INNER + 2 * WIDTH
"""Values of a decoder layer of the demo model: q and o; k and v; gate, up and down; two norms."""


def demo_plan(**settings: str) -> Plan:
    inputs = {"base": str(DEMO / "base-nf4"), "adapter": str(DEMO / "adapter"), "target": "nf4", "device": "cpu"}
    with Reader() as reader:
        return make_plan(make_recipe({**inputs, **settings}), reader)


@pytest.mark.parametrize(("sequential", "models"), [(True, 2), (False, 1)])
def test_hidden_states_one_layer_and_matrices(sequential: bool, models: int) -> None:
    plan = demo_plan(rounding="preserve")
    waiting = models * 1000 * (4 * WIDTH + INNER)
    layer = (models + 1) * LAYER + 6 * INNER**2
    assert calibration_memory(plan.steps, 1000, sequential=sequential) == 4 * (
        waiting + max(layer, 2 * VOCABULARY * WIDTH)
    )


@pytest.mark.parametrize(("effort", "tokens"), [("fast", 8192), ("default", 16384), ("best", 32768)])
def test_effort_sets_the_tokens(effort: str, tokens: int) -> None:
    assert demo_plan(effort=effort).calibration.tokens == tokens
    assert demo_plan(effort=effort, calibration_tokens="100").calibration.tokens == 100


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({}, 1250),
        ({"calibration": str(DEMO / "calibration.txt")}, 1500),
        ({"calibration": "none"}, None),
        ({"rounding": "nearest"}, None),
    ],
)
def test_qmerge_plan_says_it(settings: dict[str, str], tokens: int | None) -> None:
    """Rounding auto takes preserve for the demo: then calibration needs memory."""
    given = {"base": str(DEMO / "base-nf4"), "adapter": str(DEMO / "adapter"), "target": "nf4", "device": "cpu"}
    described = describe_plan(make_recipe({**given, "calibration_tokens": 1000, **settings}), target_given=True)
    expected = 0
    if tokens is not None:
        expected = calibration_memory(demo_plan(rounding="preserve").steps, tokens, sequential=True)
        assert expected > 0
    assert described["calibration_memory"] == expected


def test_nearest_needs_none() -> None:
    assert calibration_memory(demo_plan(rounding="nearest").steps, 1000, sequential=True) == 0


@pytest.mark.parametrize(
    ("source", "tokens"), [("train.jsonl", 1500), (None, 1250), ("generate", 1250), ("random", 1000)]
)
def test_general_text_is_counted(source: str | None, tokens: int) -> None:
    assert tokens_of_source(source, 1000) == tokens
