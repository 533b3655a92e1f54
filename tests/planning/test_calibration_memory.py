"""What a plan says about the memory of a calibration."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmerge.demo import build
from qmerge.forecast.calibration import tokens_of_source
from qmerge.planning.memory import calibration_memory
from qmerge.planning.plan import Plan, make_plan
from qmerge.recipe import make_recipe
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


def test_nearest_needs_none() -> None:
    assert calibration_memory(demo_plan(rounding="nearest").steps, 1000, sequential=True) == 0


@pytest.mark.parametrize(
    ("source", "tokens"), [("train.jsonl", 1500), (None, 1250), ("generate", 1250), ("random", 1000)]
)
def test_general_text_is_counted(source: str | None, tokens: int) -> None:
    assert tokens_of_source(source, 1000) == tokens
