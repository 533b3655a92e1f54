"""`qmerge --adapter FOLDER` alone: the base that the adapter names, and how the training folder says it was quantized."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from qmerge import merge
from qmerge.base_check.declared import declared_warnings
from qmerge.base_check.from_training import with_training
from qmerge.base_check.training_quantization import WAS_IT_QUANTIZED
from qmerge.planning.inputs import read_inputs
from qmerge.planning.plan import plan_from
from qmerge.recipe import make_recipe
from qmerge.safetensors_io.reader import Reader
from qmerge.schema import read_report

from .. import models
from ..conftest import Cli
from ..models import edit_json
from ..parity import bases, stock

COMMIT = "c" * 40

QLORA = "finetuning_type: lora\nquantization_bit: 4\nquantization_method: bnb\n"


@pytest.fixture
def run(lora: Path, dense: Path, tmp_path: Path) -> Path:
    """A folder of LLaMA-Factory, with a checkpoint and no finished adapter."""
    folder = tmp_path / "my-run"
    for name in ("checkpoint-9", "checkpoint-10"):
        shutil.copytree(lora, folder / name)
        edit_json(folder / name / "adapter_config.json", base_model_name_or_path=str(dense))
    (folder / "training_args.yaml").write_text(QLORA)
    return folder


def edit_base(run: Path, name: str, **more: str) -> None:
    edit_json(run / "checkpoint-10/adapter_config.json", base_model_name_or_path=name, **more)


def recorded(out: Path) -> dict[str, Any]:
    return read_report(out).recipe


def test_one_command(cli: Cli, run: Path, dense: Path, tmp_path: Path) -> None:
    """Base, checkpoint and quantization are found, each named in one line, and recorded; the bytes are those of the long form."""
    asked = ("--target", "bf16", "--device", "cpu")
    ran = cli("--adapter", run, *asked, "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    lines = [" ".join(line.split()) for line in ran.err.splitlines()]
    assert f"base {dense}: the adapter names it" in lines
    assert "adapter checkpoint-10 of my-run: its last checkpoint of 2" in lines
    assert any(line.startswith("training nf4-dq: training_args.yaml of LLaMA-Factory says") for line in lines)
    assert recorded(tmp_path / "out")["trained_on"] == "nf4-dq"
    assert "warning: nothing tells" not in ran.err
    long = ("--base", dense, "--adapter", run / "checkpoint-10", "--trained-on", "nf4-dq", *asked)
    assert cli(*long, "--out", tmp_path / "long").code == 0
    assert not stock.differing(stock.tensors(tmp_path / "out"), stock.tensors(tmp_path / "long"))
    confirmed = cli("--base", "auto", "--adapter", run, *asked, "--out", tmp_path / "16", "--merge-onto", "original")
    assert confirmed.code == 0 and "in memory" not in confirmed.err and "trained_on" not in recorded(tmp_path / "16")
    assert stock.differing(stock.tensors(tmp_path / "16"), stock.tensors(tmp_path / "long")), "the control"


def test_inspect_names_run_and_checkpoint(cli: Cli, run: Path, lora: Path) -> None:
    for reference in (run, run / "checkpoint-10"):
        shown = cli("inspect", reference).out
        assert shown.startswith("my-run: checkpoint-10, checkpoint 2 of 2\n")
    (run / "training_args.yaml").unlink()
    assert "  base in training           not known\n" in cli("inspect", run).out
    assert cli("inspect", lora).out.startswith(f"{lora.name}\n"), "a finished adapter is no checkpoint"


def test_checkpoints_without_an_adapter_are_named(cli: Cli, run: Path) -> None:
    """Training was stopped while it wrote the last ones."""
    for name in ("checkpoint-100", "checkpoint-30"):
        (run / name).mkdir()
        (run / name / "optimizer.pt").write_bytes(b"")
    found = cli("plan", "--adapter", run, "--target", "bf16").out
    assert "checkpoint-30, checkpoint-100 have no adapter; checkpoint-10 is taken" in " ".join(found.split())


def test_plan_and_python_do_the_same(cli: Cli, run: Path, tmp_path: Path) -> None:
    ran = cli("plan", "--adapter", run, "--target", "bf16")
    assert ran.code == 0 and "training nf4-dq" in ran.out and "the adapter names it" in ran.err
    report = merge(adapter=run, target="bf16", out=tmp_path / "out", device="cpu", quiet=True)
    assert report.data.recipe["trained_on"] == "nf4-dq"


def test_a_better_checkpoint_is_named(run: Path, dense: Path) -> None:
    """As Trainer notes it; no other text in its place, and no checkpoint that is gone."""
    state = run / "checkpoint-10/trainer_state.json"

    def planned(best: object) -> list[str]:
        state.write_text(json.dumps({"best_model_checkpoint": best}))
        recipe = make_recipe({"base": str(dense), "adapter": str(run), "target": "bf16"})
        with Reader() as reader:
            return with_training(recipe, read_inputs(recipe, reader))[1]

    line = "adapter  checkpoint-10 of my-run: its last checkpoint of 2"
    better = f"{line}. By its evaluation, checkpoint-9 is better: --adapter {run}#checkpoint-9"
    assert better in planned("elsewhere/my-run/checkpoint-9") and better in planned("my-run\\checkpoint-9")
    for other in (None, 9, "my-run/checkpoint-10", "my-run/checkpoint-8", "my-run/other"):
        assert line in planned(other)


def test_what_the_callback_saved(cli: Cli, run: Path, lora: Path, dense: Path) -> None:
    """It goes before the checkpoints, and the run above it tells how it was trained, as for a checkpoint."""
    saved = shutil.copytree(lora, run / "qmerge-adapter")
    edit_json(saved / "adapter_config.json", base_model_name_or_path=str(dense))
    ran = cli("plan", "--adapter", run, "--target", "bf16")
    assert ran.code == 0, ran.err
    assert "adapter  qmerge-adapter of my-run: QmergeCallback saved it at the end of the training" in ran.out
    assert "training nf4-dq" in ran.out


def warned(run: Path, base: Path, **settings: str) -> list[str]:
    recipe = make_recipe({"base": str(base), "adapter": str(run), "target": "bf16", **settings})
    with Reader() as reader:
        inputs = read_inputs(recipe, reader)
        recipe, _ = with_training(recipe, inputs)
        return declared_warnings(inputs, recipe)


def test_what_nothing_tells_is_asked(run: Path, dense: Path, nf4: Path) -> None:
    """Once, with both choices; not where the base is quantized, or the folder or the user has answered."""
    assert WAS_IT_QUANTIZED not in warned(run, dense)
    (run / "training_args.yaml").unlink()
    assert warned(run, dense) == [WAS_IT_QUANTIZED]
    assert warned(run, nf4) == warned(run, dense, trained_on="nf4") == warned(run, dense, merge_onto="original") == []
    (run / "training_args.yaml").write_text("finetuning_type: lora\n")
    assert warned(run, dense) == []


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (QLORA, QLORA, "nf4-dq"),
        (QLORA, "", None),
        ("", QLORA, None),
        (QLORA, "finetuning_type: lora\n", None),
        (QLORA, "finetuning_type: lora\nquantization_bit: 8\n", None),
    ],
)
def test_several_adapters_must_agree(first: str, second: str, expected: str | None, run: Path, dense: Path) -> None:
    adapters = (run / "checkpoint-9", run / "checkpoint-10")
    (run / "training_args.yaml").unlink()
    for folder, told in zip(adapters, (first, second), strict=True):
        (folder / "training_args.yaml").write_text(told)
    recipe = make_recipe({"base": str(dense), "adapter": [*map(str, adapters)], "target": "bf16"})
    with Reader() as reader:
        recipe, lines = with_training(recipe, read_inputs(recipe, reader))
    assert recipe.trained_on == expected and bool(lines) == bool(expected)


def test_a_base_that_is_stored_quantized_was_not_quantized_in_memory(run: Path, dense: Path) -> None:
    edit_base(run, "someone/base-bnb-4bit")
    recipe = make_recipe({"base": str(dense), "adapter": str(run / "checkpoint-10"), "target": "bf16"})
    with Reader() as reader:
        recipe, _ = with_training(recipe, read_inputs(recipe, reader))
    assert recipe.trained_on is None


@pytest.mark.parametrize(
    ("told", "expected", "told_later"),
    [("", "none", QLORA), ("finetuning_type: lora\n", "none", QLORA), (QLORA, "nf4-dq", "finetuning_type: lora\n")],
)
def test_a_recorded_recipe_makes_the_same_model(
    told: str, expected: str, told_later: str, cli: Cli, run: Path, dense: Path, tmp_path: Path
) -> None:
    """Whatever the training folder says later. Where it said nothing, or that nothing was quantized, that is recorded, too."""
    (run / "training_args.yaml").write_text(told)
    out, again = tmp_path / "out", tmp_path / "again"
    asked = ("--adapter", run, "--target", "bf16", "--device", "cpu", "--out", out)
    assert cli(*asked).code == 0
    assert recorded(out)["trained_on"] == expected
    assert cli(*asked, "--resume").code == 0, "the recipe of the finished run"
    (run / "training_args.yaml").write_text(told_later)
    ran = cli("run", out / "qmerge_recipe.yaml", "--base", dense, "--adapter", run, "--out", again)
    assert ran.code == 0 and "in memory" not in ran.err, ran.err
    assert not stock.differing(stock.tensors(again), stock.tensors(out))
    assert recorded(again)["trained_on"] == expected


def test_trained_on_none_is_the_base_as_it_is_stored(run: Path, dense: Path, nf4: Path) -> None:
    """It is an answer like the others, and right for a base that is stored quantized."""
    assert warned(run, dense, trained_on="none") == []
    (run / "training_args.yaml").unlink()
    assert warned(run, dense, trained_on="none") == warned(run, nf4, trained_on="none") == []
    recipe = make_recipe({"base": str(nf4), "adapter": str(run), "target": "nf4", "trained_on": "none"})
    with Reader() as reader:
        assert plan_from(recipe, read_inputs(recipe, reader)).merged


def test_a_target_that_cannot_repeat_the_training(cli: Cli, tmp_path: Path) -> None:
    """Experts in MXFP4 next to dense linear layers: the user, who gave no --trained-on, gets a warning and a model."""
    base = models.save(bases.gpt_oss(), tmp_path / "base")
    adapter = models.adapter(bases.gpt_oss(), tmp_path / "adapter", target_modules=["q_proj"])
    (adapter / "training_args.yaml").write_text(QLORA)
    common = ("--base", base, "--adapter", adapter)
    for command in ((), ("measure",)):
        out = () if command else ("--out", tmp_path / "out")
        ran = cli(*command, *common, "--target", "mxfp4", "--rounding", "nearest", *out)
        assert ran.code == 0 and "the adapter was trained on a base in nf4" in ran.err, ran.err
    assert recorded(tmp_path / "out")["trained_on"] == "none"
    asked = cli("plan", *common, "--target", "mxfp4", "--trained-on", "nf4")
    assert asked.code == 2 and "--trained-on none" in asked.err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/home/bob/models/llama", ("/home/bob/models/llama", "not on this machine", "--base ID|DIR")),
        ("models/llama", ("models/llama", "not on this machine", "--base ID|DIR")),
        ("", ("names no base", "--base ID|DIR")),
        ("meta-llama/Nope-8B", ("meta-llama/Nope-8B", "not in the Hub's cache", "hf download meta-llama/Nope-8B")),
    ],
)
def test_a_base_that_is_not_here(
    name: str, words: tuple[str, ...], cli: Cli, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    edit_base(run, name)
    ran = cli("--adapter", run, "--target", "nf4", "--out", tmp_path / "out")
    assert ran.code == 3 and not (tmp_path / "out").exists()
    assert not [word for word in words if word not in ran.err] and "local_files_only" not in ran.err


@pytest.mark.parametrize(
    ("bits", "words", "verdict"), [("4", "nf4-dq", "fits"), ("8", "int8", "fits"), ("", "none", "unknown")]
)
def test_inspect_says_what_a_merge_does(bits: str, words: str, verdict: str, cli: Cli, run: Path, dense: Path) -> None:
    """The base is quantized first where the folder says so: nothing differs, and no option is asked for."""
    (run / "training_args.yaml").write_text(f"finetuning_type: lora\nquantization_bit: {bits}\n")
    found = json.loads(cli("inspect", run, "--base", dense, "--json").out)
    assert found["training"]["quantization"] == words
    (remark,) = [remark for remark in found["comparison"] if remark["topic"] == "quantization"]
    assert (remark["verdict"], remark["warning"]) == (verdict, "")
    assert (words in remark["given"]) == bool(bits)
    shown = cli("inspect", run)
    assert f"{f'quantized to {words}' if bits else 'not quantized'} (training_args.yaml of LLaMA-Factory)" in shown.out


def test_inspect_of_another_quantized_base(cli: Cli, run: Path, nf4: Path) -> None:
    """A base that is stored in another format than training had it still differs."""
    (run / "training_args.yaml").write_text("finetuning_type: lora\nquantization_bit: 8\n")
    ran = cli("inspect", run, "--base", nf4)
    assert "differs" in ran.out and "their quantization errors differ" in " ".join(ran.err.split())


def test_an_adapter_on_an_adapter(cli: Cli, run: Path, lora: Path) -> None:
    edit_base(run, str(lora))
    ran = cli("plan", "--adapter", run)
    assert ran.code == 3 and f"--combine chain: --adapter {lora} --adapter {run}" in ran.err


@pytest.mark.parametrize(
    ("name", "revision"),
    [("someone/base", COMMIT), (f"/home/bob/.cache/huggingface/hub/models--someone--base/snapshots/{COMMIT}", "main")],
)
def test_the_revision_of_training(
    cli: Cli, run: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, revision: str
) -> None:
    """From the Hub's cache, at the commit that adapter_config.json names, or that the path on another machine holds."""
    shutil.copytree(dense, tmp_path / f"hub/models--someone--base/snapshots/{COMMIT}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    edit_base(run, name, revision=revision)
    ran = cli("plan", "--adapter", run)
    assert ran.code == 0 and f"someone/base at {COMMIT[:12]}: the adapter names it" in ran.err, ran.err
