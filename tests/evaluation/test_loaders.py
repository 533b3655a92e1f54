"""`qmerge verify --loader`: stock loaders load written models and compute the right logits; a failure is reported."""

from __future__ import annotations

import json
import shutil
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

import qmerge
import qmerge.demo
from qmerge.checkpoint.scan import Checkpoint
from qmerge.errors import CheckpointError
from qmerge.evaluation import loaders, sample_inputs
from qmerge.report.output_record import write_record
from qmerge.safetensors_io.reader import Reader
from qmerge.schema import read_report

from .. import models
from ..conftest import Cli

DEMO = Path(qmerge.demo.__file__).parent


def config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


@pytest.fixture(scope="module")
def gptq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("loaders") / "gptq"
    inputs = {"base": str(DEMO / "base-nf4"), "adapter": str(DEMO / "adapter")}
    qmerge.merge(**inputs, target="gptq", rounding="nearest", out=str(out), quiet=True)
    return out


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("loaders") / "nf4"
    inputs = {"base": str(DEMO / "base-nf4"), "adapter": str(DEMO / "adapter")}
    qmerge.merge(**inputs, target="nf4", rounding="stochastic", out=str(out), quiet=True)
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


@pytest.mark.parametrize("loader", ["transformers", "gptqmodel"])
def test_no_loader_needs_a_compiler(gptq: Path, cli: Cli, loader: str) -> None:
    """gptqmodel compiles its layers by default; where that is impossible, a sound folder must not be said to fail."""
    pytest.importorskip("gptqmodel")
    torch.compiler.reset()
    config = import_module("torch._inductor.config")
    with config.patch({"cpp.cxx": (None, "/bin/false"), "force_disable_caches": True}):
        ran = cli("verify", gptq, "--loader", loader)
    assert ran.code == 0 and "of the stored values" in ran.out, ran.out


def test_mlx_loads_mlx_folders(cli: Cli, tmp_path: Path) -> None:
    """Without being named. The control: another group of scales is another model."""
    pytest.importorskip("mlx_lm")
    out = tmp_path / "mlx"
    inputs = {"base": str(DEMO / "base-nf4"), "adapter": str(DEMO / "adapter")}
    qmerge.merge(**inputs, target="mlx", rounding="nearest", out=str(out), quiet=True)
    ran = cli("verify", out)
    assert ran.code == 0 and "mlx_lm.models.llama with mlx_lm" in ran.out, ran.out + ran.err
    tensors = load_file(out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    models.edit_json(out / "config.json", rope_theta=config["rope_theta"] / 100)
    with pytest.raises(loaders.WrongOutputsError, match="off those of the stored values"):
        loaders.load_with_mlx(out)
    del tensors["model.norm.weight"]
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"mlx_lm .* does not load it"):
        loaders.load_with_mlx(out)


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


def test_asks_ordinary_text_in_float32(merged: Path, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ids are special tokens, which a model was seldom trained on; bfloat16 is off by half a percent."""
    ids = sample_inputs.question_ids(config(merged), merged)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.decode(ids[0]) == sample_inputs.SENTENCE
    ids = sample_inputs.question_ids(config(dense), dense)  # without a tokenizer
    assert ids.shape == (1, sample_inputs.TOKENS) and int(ids.min()) >= models.LLAMA["vocab_size"] // 2
    assert int(ids.max()) < models.LLAMA["vocab_size"]
    monkeypatch.setattr(loaders, "TOLERANCE", 1e-5)
    for folder in (merged, dense):
        line = loaders.load_with_transformers(folder)
        assert line.endswith("its logits for a sentence are within 0.0 % of those of the stored values")


def test_a_loader_that_is_wrong_for_the_base_too(merged: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the folder is not at fault. If only the folder's logits are wrong, it is, and --text runs all the same."""
    wrong = [merged, DEMO / "base-nf4"]

    def stored_outputs(checkpoint: Checkpoint, inputs: dict[str, Any], reader: Reader) -> tuple[Tensor, str]:
        outputs, compared = right(checkpoint, inputs, reader)
        return outputs * (1.5 if checkpoint.folder in wrong else 1), compared

    right = loaders.stored_outputs
    monkeypatch.setattr(loaders, "stored_outputs", stored_outputs)
    ran = cli("verify", merged)
    assert ran.code == 0, ran.out
    assert "33 % off those of the stored values, and for the unmerged base 33 %" in ran.out
    wrong.remove(DEMO / "base-nf4")
    ran = cli("verify", merged, "--text", DEMO / "heldout.txt", "--tokens", 256, "--sequence-length", 64)
    assert ran.code == 3 and "FAILED reload" in ran.out and "33 % off" in ran.out
    assert "KL ratio" in ran.out and ran.err == ""


def test_inputs_of_the_recipe_that_are_not_found(
    merged: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path in the recipe means nothing in another folder: --against is the way out."""
    copy = shutil.copytree(merged, tmp_path / "copy")
    report = read_report(copy)
    report.recipe["base"] = "models/some/base"
    write_record(copy, report, {})
    monkeypatch.chdir(tmp_path)
    asked = ["--no-reload", "--text", DEMO / "heldout.txt", "--tokens", 256, "--sequence-length", 64]
    ran = cli("verify", copy, *asked)
    assert ran.code == 3 and "ok     hashes" in ran.out
    assert "FAILED text: models/some/base: no such folder" in ran.out
    assert "holds no absolute paths" in ran.out and "name base and adapter with --against BASE ADAPTER" in ran.out
    ran = cli("verify", copy, *asked, "--against", DEMO / "base-nf4", DEMO / "adapter")
    assert ran.code == 0 and "KL ratio" in ran.out


def test_unknown_and_missing_loaders(gptq: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = cli("verify", gptq, "--loader", "vllm")
    assert ran.code == 2 and "There are: transformers, llama.cpp, gptqmodel, auto-gptq, mlx" in ran.err
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
