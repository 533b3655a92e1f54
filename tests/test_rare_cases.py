"""Options that exclude each other, limits on reports, and names of folders and models."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import qmerge
from qmerge import hub
from qmerge.errors import RecipeError
from qmerge.forecast.kinds import _interpolated
from qmerge.forecast.predict import total_noise
from qmerge.plugins import every
from qmerge.recipe import make_recipe
from qmerge.report import limits

INPUTS = {"base": "b", "adapter": "a", "target": "nf4"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rounding": "nearest", "calibration": "general"},
            "calibration is for preserve rounding, nearest does not use it",
        ),
        ({"target": "auto", "max_size": "1GB", "promote": "1MB"}, "promote adds bytes to a target: name the target"),
        (
            {"target": "gptq", "act_order": True, "rounding": "nearest"},
            "act_order groups inputs by what calibration sees",
        ),
        (
            {"target": "gptq", "act_order": True, "calibration": "none"},
            "act_order groups inputs by what calibration sees",
        ),
    ],
)
def test_options_that_exclude_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_recipe({**INPUTS, **settings})


def test_options_that_go_together() -> None:
    make_recipe({**INPUTS, "rounding": "preserve", "calibration": "general"})
    make_recipe({**INPUTS, "target": "gptq", "act_order": True, "rounding": "preserve"})
    make_recipe({**INPUTS, "target": "gptq", "act_order": True, "static_groups": True, "rounding": "nearest"})


def test_an_equals_sign_in_the_name_of_a_folder() -> None:
    recipe = make_recipe({**INPUTS, "adapter": ["run=best", "run=0.5", "a=b=2"]})
    assert recipe.adapters == [("run=best", 1.0), ("run", 0.5), ("a=b", 2.0)]


# --- limits ----------------------------------------------------------------------------------------------------------


def report(kept: float | None) -> Any:
    values = {} if kept is None else {"kept": kept}
    return SimpleNamespace(
        recipe={"target": "nf4"}, fidelity=None, total=SimpleNamespace(values=values), outputs_measured=False
    )


@pytest.mark.parametrize(
    ("kept", "least", "is_past"),
    [((0.9,), 0.8, False), ((0.7,), 0.8, True), ((1.2,), 0.8, False), ((1.21,), 0.8, True), ((9.0,), 0.0, False),
     ((0.9, 0.7), 0.8, True), ((0.9, 1.3), 0.8, True), ((None,), 0.8, False), ((None, 0.7), 0.8, True), ((0.1,), None, False)],
)  # fmt: skip
def test_min_kept(
    kept: tuple[float | None, ...], least: float | None, is_past: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too little, and as far past 1; weights without a delta do not count."""
    monkeypatch.setattr(limits, "overall_kept", lambda values: values.get("kept"))
    lines = limits.past_limits([report(each) for each in kept], min_kept=least, max_kl_ratio=None)
    assert len(lines) == int(is_past)


# --- names -----------------------------------------------------------------------------------------------------------


def test_a_model_that_is_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found: dict[str, Any] = {}

    def snapshot(reference: str, **settings: Any) -> str:
        found.update(settings, reference=reference)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert hub.find_local("owner/name", "main") == tmp_path
    assert found == {"reference": "owner/name", "revision": "main", "local_files_only": True}
    monkeypatch.undo()
    assert hub.find_local("owner/name-that-nobody-has", None) is None
    assert hub.find_local("no such folder", None) is None


def test_names_for_an_output() -> None:
    assert hub.published_name("~nosuchuser/model") == "model"
    assert hub.published_name("") == ""
    assert hub.published_name("owner/name") == "owner/name"


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_between_and_beyond_points() -> None:
    points = [(1.0, 10.0), (3.0, 30.0)]
    assert [_interpolated(points, x) for x in (0, 1, 2, 3, 4)] == [10, 10, 20, 30, 30]
    assert _interpolated([], 1) is None


def test_noise_of_all_weights() -> None:
    weights = [SimpleNamespace(noise=3.0, delta_squared=1.0), SimpleNamespace(noise=1.0, delta_squared=7.0)]
    assert total_noise(weights) == pytest.approx((16 / 8) ** 0.5)  # type: ignore[arg-type]
    assert total_noise([SimpleNamespace(noise=None, delta_squared=0.0)]) is None  # type: ignore[list-item]


def test_every_plugin_of_a_kind() -> None:
    assert {"nearest", "preserve", "stochastic"} == every("rounding").keys()


def test_one_target_to_measure() -> None:
    with pytest.raises(RecipeError, match=r"no target is called 'nf5'"):
        qmerge.measure(base="b", adapter="a", targets="nf5")
