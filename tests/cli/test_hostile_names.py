"""Names, sizes and reports that are made to crash a reader: one clear line each."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qmerge.checkpoint.consistency import config_problem
from qmerge.checkpoint.scan import scan
from qmerge.errors import AdapterError, CheckpointError, QmergeError, RecipeError
from qmerge.plugins import names
from qmerge.report.html import html_report
from qmerge.safetensors_io.reader import Reader
from qmerge.schema import NAME, read_report

from .. import models
from ..conftest import Cli
from ..report.reports import report as example_report
from .test_bad_inputs import ADAPTER, INDEX, Place, check, configure, index, merge, option, place
from .test_hostile_inputs import HUGE, within_bounds

__all__ = ["place"]

LONG = "x" * 300

NAMES = {
    "long": LONG,
    "deep": "a/" * 5000,
    "nul": "a\0b",
    "surrogate": "\udfff",
    "no_utf8": "\udcff",
    "user": "~nosuchuser/x",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_folders(place: Place, cli: Cli, name: str) -> None:
    value = NAMES[name]
    options = {"--base": place.base, "--adapter": place.adapter, "--target": "nf4", "--out": place.out}
    for option_name in ("--base", "--adapter", "--original", "--calibration", "--verify", "--out", "--patch"):
        given = {**options, option_name: value}
        if option_name == "--patch":
            del given["--out"]
        ran = cli(*(word for pair in given.items() for word in pair))
        check(ran, AdapterError if option_name == "--adapter" else RecipeError, ("can have this name",))
        assert len(ran.err) < 5000


@pytest.mark.parametrize("command", ["verify", "report", "finalize", "inspect"])
def test_long_names_in_other_commands(cli: Cli, command: str) -> None:
    ran = cli(command, LONG)
    assert ran.code in (2, 3) and len(ran.err.splitlines()) == 1, ran.err


@pytest.mark.parametrize("place", ["sharded"], indirect=True)
@pytest.mark.parametrize(
    "file", [f"{LONG}.safetensors", "a/" * 3000 + "x.safetensors", "a\0.safetensors", "a\n.safetensors", "x" * 10**6]
)
def test_names_in_the_index(place: Place, cli: Cli, file: str) -> None:
    index(lambda weight_map: weight_map.update({next(iter(weight_map)): file}))(place)
    check(merge(cli, place), CheckpointError, (INDEX, "inside the model's folder"))


@pytest.mark.parametrize("place", ["sharded"], indirect=True)
def test_an_index_of_many_entries(place: Place, cli: Cli) -> None:
    index(lambda weight_map: weight_map.update({f"k{number}": "x.safetensors" for number in range(10**6)}))(place)
    check(within_bounds(lambda: merge(cli, place)), CheckpointError, (INDEX, "x.safetensors"))


def add_tensors(tensors: dict[str, torch.Tensor]) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        path = place.adapter / ADAPTER
        save_file({**load_file(path), **tensors}, path)

    return spoil


@pytest.mark.parametrize("name", ["base_model.model.x{}.lora_A.weight", "base_model.model.x.lora_A.n{}.weight"])
def test_adapters_of_many_tensors(place: Place, cli: Cli, name: str) -> None:
    """50,000 tensors are read in a few seconds: in a square of that time, if at all, something else would be wrong."""
    add_tensors({name.format(number): torch.zeros(1, 1) for number in range(50_000)})(place)
    check(within_bounds(lambda: merge(cli, place)), AdapterError, ())


TOKEN_ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(
    "indices",
    [[0, 10**9], [0, -1], [0, HUGE], ["a", "b"], [1], {"embed_tokens": 5}, 7, list(range(10**6)), [0.5, float("inf")], [[1], [2]]],
    ids=lambda indices: str(indices)[:20],
)  # fmt: skip
def test_indices_of_tokens(place: Place, cli: Cli, indices: Any) -> None:
    add_tensors({TOKEN_ROWS: torch.ones(2, 64)})(place)
    option(trainable_token_indices=indices)(place)
    check(within_bounds(lambda: merge(cli, place)), AdapterError, ())
    assert not place.out.exists()


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ("max_memory: " + "9" * 400 + "GB", "size"),
        ("max_shard_size: " + "9" * 400, "size"),
        ("max_memory: 0.0000001kB", "size"),
        ("promote: " + "9" * 400 + "GB", "size"),
        ("seed: " + "9" * 100, "seed"),
        ("calibration_tokens: 1" + "0" * 18, "calibration_tokens"),
        ("sequence_length: 1" + "0" * 18, "sequence_length"),
        ("residual: 1" + "0" * 12, "residual"),
        ("calibration: ~nosuchuser", "can have this name"),
        ("'\\ud800': 3", "unknown key"),
        ("min_kept: .inf", "min_kept"),
        ("density: .nan", "density"),
    ],
    ids=lambda value: value[:20],
)
def test_numbers_in_recipes(place: Place, cli: Cli, setting: str, word: str) -> None:
    lines = {"base": place.base, "adapter": place.adapter, "target": "nf4", "out": place.out, "rounding": "preserve"}
    text = "".join(f"{name}: {value}\n" for name, value in lines.items())
    (place.tmp / "recipe.yaml").write_text(f"{text}{setting}\n")
    check(within_bounds(lambda: cli("run", place.tmp / "recipe.yaml")), RecipeError, (word,))


# --- one row, one column -----------------------------------------------------------------------------------------------


ONE_FEATURE = {"hidden_size": 1, "head_dim": 2, "num_attention_heads": 1, "num_key_value_heads": 1}


@pytest.fixture(scope="module", params=[{"intermediate_size": 1}, ONE_FEATURE], ids=["one_column", "one_feature"])
def thin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with weights of one row and of one column, and its adapter."""
    folder = tmp_path_factory.mktemp("thin")
    models.save(models.llama(**request.param), folder / "base")
    models.adapter(models.llama(torch.float32, **request.param), folder / "lora", r=1)
    return folder


@pytest.mark.parametrize("target", [name for name in names("formats") if name not in ("hqq", "torchao", "raw")])
def test_weights_of_one_row_or_column(thin: Path, tmp_path: Path, cli: Cli, target: str) -> None:
    """They are merged and read back as written, or refused in one line."""
    out = tmp_path / "out"
    ran = cli(
        "--base", thin / "base", "--adapter", thin / "lora", "--target", target, "--out", out, "--rounding", "nearest"
    )
    if ran.code != 0:
        assert ran.error is not None and not out.exists(), ran.err
        return
    assert cli("verify", out, "--no-reload").code == 0
    total = json.loads((out / NAME).read_text())["total"]["values"]
    assert total["noise"] < {"bf16": 0.3, "fp16": 0.05, "fp32": 1e-5}.get(target, 3), total


# --- reports -------------------------------------------------------------------------------------------------------------


def test_reports_without_some_metrics_are_shown(tmp_path: Path) -> None:
    content = json.loads(example_report().model_dump_json())
    for record in (content["total"], *content["groups"], *content["weights"]):
        record["values"] = {}
    (tmp_path / NAME).write_text(json.dumps(content))
    assert "<html" in html_report(read_report(tmp_path))


REPORTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no_target": lambda report: report["recipe"].clear(),
    "target_is_a_number": lambda report: report["recipe"].update(target=5),
    "no_version": lambda report: report["versions"].clear(),
    "no_inputs": lambda report: report["inputs"].clear(),
    "nan": lambda report: report["total"]["values"].update(kept=float("nan")),
    "huge": lambda report: report["weights"][0]["values"].update(kept=1e308),
    "metric_is_text": lambda report: report["total"]["values"].update(kept="x"),
    "metric_is_nested": lambda report: report["total"]["values"].update(kept=[[1]]),
    "outside": lambda report: report["outputs"].append({"file": "../x", "bytes": 1, "sha256": ""}),
    "long_file": lambda report: report["outputs"].append({"file": LONG, "bytes": 1, "sha256": ""}),
    "long_module": lambda report: report["weights"][0].update(module="x" * 10**5),
    "surrogate": lambda report: report.update(warnings=["\ud800"]),
    "unknown": lambda report: report.update(x=1),
}


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("command", ["report", "verify"])
def test_reports_that_qmerge_did_not_write(tmp_path: Path, cli: Cli, name: str, command: str) -> None:
    content = json.loads(example_report().model_dump_json())
    REPORTS[name](content)
    (tmp_path / NAME).write_text(json.dumps(content))
    check(cli(command, tmp_path), CheckpointError, (NAME,))
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_huge_report(tmp_path: Path, cli: Cli) -> None:
    with (tmp_path / NAME).open("wb") as file:
        file.truncate(5 * 2**30)
    check(within_bounds(lambda: cli("report", tmp_path)), CheckpointError, (NAME, "larger than"))


# --- a config that is not the tensors' -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 0}, {"num_attention_heads": 3}, {"num_key_value_heads": 0}, {"num_key_value_heads": 4},
        {"hidden_size": 128}, {"intermediate_size": 32}, {"num_hidden_layers": 3}, {"vocab_size": 97}, {"head_dim": 8},
        {"hidden_size": "64"},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_that_does_not_fit_is_told(place: Place, changes: dict[str, Any]) -> None:
    configure(**changes)(place)
    with Reader() as reader:
        base = scan(place.base, reader)
    problem = config_problem(base.config, base.weights)
    assert problem is not None and next(iter(changes)).removeprefix("head_") in problem.replace("rows each", "dim")


def test_a_config_that_does_not_fit_is_a_warning(place: Place, cli: Cli) -> None:
    configure(num_hidden_layers=3)(place)
    ran = merge(cli, place)
    assert "num_hidden_layers is 3, but the tensors have 2" in ran.err


def test_a_config_that_fits_is_not_told(dense: Path, nf4: Path) -> None:
    """The control."""
    for folder in (dense, nf4):
        with Reader() as reader:
            base = scan(folder, reader)
        assert config_problem(base.config, base.weights) is None


# --- stdout --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["{} >&-", "{} 2>&-", "{} | true", "{} >/dev/full"])
def test_closed_and_broken_pipes(shell: str) -> None:
    command = f"{sys.executable} -m qmerge formats"
    done = subprocess.run(["bash", "-c", shell.format(command)], capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr[-500:]


def test_messages_are_short() -> None:
    assert len(str(QmergeError("x" * 10**6))) < 5000
