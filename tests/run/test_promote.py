"""Weights that are promoted: dense in a quantized model, within a budget of bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import qmerge
import qmerge.demo
from qmerge.errors import RecipeError
from qmerge.recipe import make_recipe
from qmerge.run.promote import choose_within_budget

DEMO = Path(qmerge.demo.__file__).parent
INPUTS = {"base": str(DEMO / "base-nf4"), "adapter": str(DEMO / "adapter"), "target": "nf4", "device": "cpu"}


def merged(out: Path, promote: str) -> Any:
    settings = {**INPUTS, "rounding": "preserve", "calibration": "none", "quiet": True}
    return qmerge.merge(**settings, promote=promote, out=str(out))


@pytest.fixture(scope="module")
def promoted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("promoted") / "out"
    return out, merged(out, promote="600kB")


def test_promoted_weights_are_dense_and_in_the_skip_list(promoted: tuple[Path, Any]) -> None:
    out, report = promoted
    names = report.data.promoted
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert names and {name.removesuffix(".weight") for name in names} < set(config["llm_int8_skip_modules"])
    assert "lm_head" in config["llm_int8_skip_modules"]
    tensors = load_file(out / "model.safetensors")
    assert all(tensors[name].dtype == torch.float32 and f"{name}.absmax" not in tensors for name in names)
    assert {w.module + ".weight" for w in report.data.weights if w.target != "nf4"} == set(names)


def test_the_budget_is_kept(promoted: tuple[Path, Any]) -> None:
    out, report = promoted
    extra = (out / "model.safetensors").stat().st_size - (DEMO / "base-nf4" / "model.safetensors").stat().st_size
    assert 0 < extra <= 600_000
    assert report.data.total.values["noise"] < merged_noise()


def merged_noise() -> float:
    report = qmerge.measure(**INPUTS, rounding="preserve", calibration="none", quiet=True)[0]
    assert report.noise is not None
    return report.noise


def test_a_promoted_checkpoint_loads_with_nothing_missing(promoted: tuple[Path, Any]) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(
        promoted[0], dtype=torch.float32, device_map="cpu", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert bool(model(input_ids=torch.arange(8)[None]).logits.isfinite().all())


def test_too_small_a_budget_promotes_nothing(tmp_path: Path) -> None:
    report = merged(tmp_path / "out", promote="1kB")
    assert report.data.promoted == [] and (tmp_path / "out" / "config.json").exists()


def test_dense_targets_have_nothing_to_promote() -> None:
    with pytest.raises(RecipeError, match="promote"):
        make_recipe({**INPUTS, "target": "bf16", "promote": "1MB"})


def test_the_worst_per_byte_comes_first() -> None:
    """``c`` loses most for each byte but does not fit any more; ``dense`` costs nothing; ``fine`` loses nothing."""
    losses = {"a": 6.0, "b": 9.0, "c": 40.0, "dense": 5.0, "fine": 0.0}
    costs = {"a": 2, "b": 3, "c": 10, "dense": 0, "fine": 1}
    assert choose_within_budget(losses, costs, budget=6) == ["a", "b"]
    assert choose_within_budget(losses, costs, budget=12) == ["c", "a"]
