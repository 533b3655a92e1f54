"""`qmerge verify --loader`: stock loaders load written models and compute the right logits; a failure is reported."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qmerge
import qmerge.demo
from qmerge.errors import CheckpointError
from qmerge.evaluation import loaders

from .. import models
from ..conftest import Cli

DEMO = Path(qmerge.demo.__file__).parent


@pytest.fixture(scope="module")
def gptq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("loaders") / "gptq"
    inputs = {"base": str(DEMO / "base-nf4"), "adapter": str(DEMO / "adapter")}
    qmerge.merge(**inputs, target="gptq", rounding="nearest", out=str(out), quiet=True)
    return out


@pytest.mark.parametrize(
    ("loader", "module"), [("transformers", "gptqmodel"), ("gptqmodel", "gptqmodel"), ("auto-gptq", "auto_gptq")]
)
def test_loads_and_computes_the_right_logits(gptq: Path, cli: Cli, loader: str, module: str) -> None:
    if find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    ran = cli("verify", gptq, "--loader", loader)
    assert ran.code == 0, ran.out + ran.err
    assert loader in ran.out and ran.err == ""


def test_auto_gptq_refuses_other_zeros(gptq: Path, tmp_path: Path) -> None:
    """The control: auto-gptq reads v2 zeros as v1, which shifts every weight by a step."""
    if find_spec("auto_gptq") is None:
        pytest.skip("auto-gptq 0.7.1 is not installed (it has wheels for Python 3.8 to 3.11)")
    for path in gptq.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    found = load_file(gptq / "model.safetensors")
    changed = {name: part + 0x11111111 if name.endswith("qzeros") else part for name, part in found.items()}
    save_file(changed, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"auto-gptq's product is .* off; it takes every file for v1 \(gptq_v2\)"):
        loaders.load_with_auto_gptq(tmp_path)


def test_logits_of_nan_are_a_failure(dense: Path, tmp_path: Path) -> None:
    for path in dense.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    found = load_file(dense / "model.safetensors")
    save_file({**found, "model.norm.weight": found["model.norm.weight"] * torch.nan}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="loads it, but its logits hold NaN"):
        loaders.load_with_transformers(tmp_path)


def test_unknown_and_missing_loaders(gptq: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = cli("verify", gptq, "--loader", "vllm")
    assert ran.code == 2 and "There are: transformers, gptqmodel, auto-gptq" in ran.err
    monkeypatch.setitem(sys.modules, "gptqmodel", None)
    ran = cli("verify", gptq, "--loader", "gptqmodel")
    assert ran.code == 2 and 'needs gptqmodel: pip install "qmerge[gptq]"' in ran.err and ran.out == ""


def test_fidelity_of_a_folder_of_another_tool(dense: Path, lora: Path, tmp_path: Path, cli: Cli) -> None:
    """With --against any folder can be compared; without it, qmerge.json is needed."""
    text = tmp_path / "text.txt"
    text.write_text("a b c")
    ran = cli("verify", dense, "--no-reload")
    assert ran.code == 3 and "qmerge.json" in ran.err
    model = models.llama()
    other = models.save(model, tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"qmerge\.json"):
        qmerge.fidelity(out=str(other), text=str(DEMO / "heldout.txt"), quiet=True)
    inputs = (str(DEMO / "base-nf4"), str(DEMO / "adapter"))
    found = qmerge.fidelity(
        out=inputs[0], text=str(DEMO / "heldout.txt"), against=inputs, tokens=512, sequence_length=64, quiet=True
    )
    assert found.kl_ratio == pytest.approx(1.0) and found.gain_kept == pytest.approx(0.0, abs=1e-6)
