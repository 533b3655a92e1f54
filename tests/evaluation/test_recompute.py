"""`qmerge verify` computes weights again from base, adapter and recipe, and compares bytes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from qmerge import run
from qmerge.errors import CheckpointError
from qmerge.evaluation.recompute import check_against_inputs
from qmerge.recipe import make_recipe
from qmerge.report.output_record import file_record, write_record
from qmerge.safetensors_io.header import read_header
from qmerge.schema import read_report

from .. import models
from ..conftest import Cli
from ..models import edit_json

WEIGHTS = 21


@pytest.fixture
def inputs(nf4: Path, lora: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Base and adapter next to the output folder, where they are found again."""
    return shutil.copytree(nf4, tmp_path / "base"), shutil.copytree(lora, tmp_path / "lora")


def merged(inputs: tuple[Path, Path], out: Path, **settings: Any) -> Path:
    base, adapter = inputs
    recipe = {"base": base, "adapter": adapter, "target": "nf4", "rounding": "stochastic", "device": "cpu", "seed": 5}
    run.merge(make_recipe({**recipe, "out": out, "max_shard_size": "60kB", **settings}))
    return out


def result(out: Path, every: bool = True) -> str:
    return check_against_inputs(out, read_report(out), every=every)


def change_byte(out: Path, weight: str) -> None:
    """Change a tensor, and record the changed file: as a wrong merge would have written it."""
    for path in out.glob("*.safetensors"):
        tensors, _ = read_header(path, CheckpointError)
        if weight in tensors:
            content = bytearray(path.read_bytes())
            content[tensors[weight].offset + 7] ^= 1
            path.write_bytes(content)
            report = read_report(out)
            outputs = [file_record(out, record.file) for record in report.outputs]
            write_record(out, report.model_copy(update={"outputs": outputs}), {})
            return
    raise AssertionError(weight)


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"rounding": "nearest"}, {"target": "int8"}, {"target": "bf16"}, {"target": "gptq", "rounding": "nearest"},
        {"workers": 2, "max_memory": "50MB"},
    ],
    ids=str,
)  # fmt: skip
def test_all_weights_are_the_same_again(inputs: tuple[Path, Path], tmp_path: Path, settings: dict[str, Any]) -> None:
    out = merged(inputs, tmp_path / "out", **settings)
    assert result(out) == f"{WEIGHTS} of {WEIGHTS} weights computed again, same bytes"
    for weight in ("lm_head.weight", "model.layers.1.input_layernorm.weight"):  # converted or copied
        copy = shutil.copytree(out, tmp_path / weight)
        change_byte(copy, weight)
        with pytest.raises(
            CheckpointError, match=f"{weight}: computed again .* 1 weight of {WEIGHTS} have other bytes"
        ):
            result(copy)


def test_a_wrong_merged_weight_is_found_although_all_hashes_are_right(
    inputs: tuple[Path, Path], tmp_path: Path, cli: Cli
) -> None:
    out = merged(inputs, tmp_path / "out")
    change_byte(out, "model.layers.0.mlp.up_proj.weight")
    ran = cli("verify", out, "--no-reload", "--against-inputs")
    assert ran.code == 3 and "ok     hashes" in ran.out
    assert "FAILED inputs: model.layers.0.mlp.up_proj.weight: computed again" in " ".join(ran.out.split())


def test_one_weight_of_each_file_without_being_asked(inputs: tuple[Path, Path], tmp_path: Path, cli: Cli) -> None:
    out = merged(inputs, tmp_path / "out")
    files = len(list(out.glob("*.safetensors")))
    found = result(out, every=False)
    assert files == 2 and found.startswith("computed again, same bytes: ") and "(1 of each file, seed 0)" in found
    first = found.removeprefix("computed again, same bytes: ").split(",")[0]
    change_byte(out, first)
    with pytest.raises(CheckpointError, match=first):
        result(out, every=False)


def test_preserve_is_left_to_its_hashes(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    out = merged(inputs, tmp_path / "out", rounding="preserve", calibration="random", calibration_tokens=512)
    assert result(out) == (
        f"7 of {WEIGHTS} weights computed again, same bytes; of 14 that preserve may have rounded, only the hashes are compared"
    )
    assert result(out, every=False).endswith("; of 14 that preserve may have rounded, only the hashes are compared")


def test_inputs_that_are_missing_or_others(inputs: tuple[Path, Path], tmp_path: Path, cli: Cli) -> None:
    """No failure for a plain verify, which says so; a failure where it was asked for."""
    out = merged(inputs, tmp_path / "out")
    base, adapter = inputs
    config = (adapter / "adapter_config.json").read_text()
    edit_json(adapter / "adapter_config.json", lora_alpha=9)
    plain, asked = ("verify", out, "--no-reload"), ("verify", out, "--no-reload", "--against-inputs")
    ran = cli(*plain)
    assert (
        ran.code == 0
        and "-      inputs: left out" in ran.out
        and "not the file that was merged" in " ".join(ran.out.split())
    )
    assert cli(*asked).code == 3
    (adapter / "adapter_config.json").write_text(config)
    assert cli(*asked).code == 0, "the control"
    base.rename(tmp_path / "elsewhere")
    ran = cli(*plain)
    assert ran.code == 0 and "base is not at hand" in " ".join(ran.out.split())
    ran = cli(*asked)
    assert ran.code == 3 and "holds no absolute paths" in " ".join(ran.out.split())


def test_other_versions(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    out = merged(inputs, tmp_path / "out")
    report = read_report(out)
    report = report.model_copy(update={"versions": {**report.versions, "torch": "1.0"}})
    assert "torch 1.0, not" in check_against_inputs(out, report, every=False)
    with pytest.raises(CheckpointError, match="other last bits"):
        check_against_inputs(out, report, every=True)


def test_several_adapters(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    _, adapter = inputs
    other = models.adapter(models.llama(), tmp_path / "other", seed=9)
    out = merged(inputs, tmp_path / "out", adapter=[f"{adapter}=0.7", f"{other}=0.3"], combine="ties", density=0.5)
    assert read_report(out).recipe["adapter"] == ["lora=0.7", "other=0.3"]
    assert result(out) == f"{WEIGHTS} of {WEIGHTS} weights computed again, same bytes"
