"""The residual adapter, which compensates for rounding; and a merge whose --verify fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import qmerge
import qmerge.demo
from qmerge.errors import RecipeError
from qmerge.planning.plan import make_plan, make_run_context
from qmerge.recipe import make_recipe
from qmerge.rounding.base import InputStatistics, make_objective
from qmerge.run.residual import fit_residual
from qmerge.safetensors_io.reader import Reader
from qmerge.weights.values import base_values, merged_values

DEMO = Path(qmerge.demo.__file__).parent
INPUTS = {"base": str(DEMO / "base-nf4"), "adapter": str(DEMO / "adapter"), "target": "nf4", "device": "cpu"}
TEXT = {"calibration": str(DEMO / "calibration.txt"), "calibration_tokens": 2048, "sequence_length": 64}

MORE = {"calibration_tokens": 8192, "sequence_length": 128}


def merged(out: Path, **more: Any) -> Any:
    return qmerge.merge(**{**INPUTS, **TEXT, "rounding": "preserve", "quiet": True, **more}, out=str(out))


@pytest.fixture(scope="module")
def with_residual(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("residual") / "out"
    return out, merged(out, residual=4, **MORE)


def test_residual_is_the_best_of_its_rank() -> None:
    """Against numpy's full decomposition in the metric: nothing of rank 3 comes closer (Eckart, Young)."""
    with Reader() as reader:
        plan = make_plan(make_recipe({**INPUTS, "rounding": "preserve"}), reader)
        context, step = make_run_context(plan, reader), plan.merged[3]
        stored_OI = base_values(step, context)
        x = torch.randn(400, step.shape[1], generator=torch.Generator().manual_seed(0)) * torch.logspace(
            0, -1, step.shape[1]
        )
        inputs = InputStatistics(x.T @ x / 400, None, 400)
        found = fit_residual(step, stored_OI, inputs, context=context, rank=3)
        assert step.update is not None
        K = make_objective(inputs, step.update.directions(), step.shape[1], context.device).K_II.double().numpy()
        E = (merged_values(step, context) - stored_OI).double().numpy()
    L = np.linalg.cholesky(K)
    left = (E - (found.B_OR @ found.A_RI).double().numpy()) @ L
    best = np.sqrt((np.linalg.svd(E @ L, compute_uv=False)[3:] ** 2).sum())
    assert best * (1 - 1e-6) <= np.linalg.norm(left) <= best * 1.001
    assert found.error_with < found.error_without


def test_residual_brings_the_model_closer(with_residual: tuple[Path, Any], tmp_path: Path) -> None:
    """The model with it has a lower KL than one without. Stock peft loads it on top and computes the same logits."""
    out, report = with_residual
    record = report.data.residual
    assert record.rank == 4 and record.noise_with < record.noise_without
    dense = tmp_path / "dense"
    qmerge.merge(
        base=str(out), adapter=str(out / "residual"), target="fp32", rounding="nearest", out=str(dense), quiet=True
    )
    together = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    merged(tmp_path / "alone", **MORE)
    found = qmerge.fidelity(
        out=str(tmp_path / "alone"), text=str(DEMO / "heldout.txt"), tokens=8192, sequence_length=128, quiet=True
    )
    whole = qmerge.fidelity(
        out=str(dense), text=str(DEMO / "heldout.txt"), tokens=8192, sequence_length=128, quiet=True,
        against=(INPUTS["base"], INPUTS["adapter"]),
    )  # fmt: skip
    assert whole.kl_merged < found.kl_merged
    ids = torch.arange(64).view(2, 32)
    model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, device_map="cpu").eval()
    with torch.no_grad():
        with_residual = PeftModel.from_pretrained(model, out / "residual").eval()(input_ids=ids).logits
        torch.testing.assert_close(with_residual, together(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_model_stays_when_verify_fails(tmp_path: Path) -> None:
    text = tmp_path / "one.txt"
    text.write_text("a")
    with pytest.raises(RecipeError):
        merged(tmp_path / "out", rounding="nearest", calibration=None, verify=str(text))
    assert (tmp_path / "out" / "config.json").exists() and qmerge.fidelity(
        out=str(tmp_path / "out"), text=str(DEMO / "heldout.txt"), tokens=256, sequence_length=64, quiet=True
    )
