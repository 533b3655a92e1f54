"""The command line: help, JSON, quiet, exit codes, recipes and the flags that override them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import qmerge
from qmerge import __version__, plugins
from qmerge.errors import RecipeError
from qmerge.recipe import Recipe

from ..conftest import Cli, snapshot

COMMANDS = (
    "merge", "run", "plan", "measure", "inspect", "verify", "report", "compare", "formats", "demo", "patch", "apply", "unmerge",
    "extract", "gguf", "finalize", "recipe", "push",
)  # fmt: skip
WITH_MANY_OPTIONS = ("merge", "run", "plan", "measure")
MOST_LINES = 80


@pytest.fixture
def asked(dense: Path, lora: Path, tmp_path: Path) -> list[str]:
    """A merge that keeps everything: bfloat16 to float32."""
    return [
        "--base",
        str(dense),
        "--adapter",
        str(lora),
        "--target",
        "fp32",
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]


@pytest.fixture
def lossy(nf4: Path, lora: Path, tmp_path: Path) -> list[str]:
    return [
        "--base",
        str(nf4),
        "--adapter",
        str(lora),
        "--target",
        "nf4",
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.parametrize("arguments", [("--help",), ("-h",), ()])
def test_help_fits_a_person(cli: Cli, arguments: tuple[str, ...]) -> None:
    """The options that most people use, every command, and where to find the rest: on one page."""
    ran = cli(*arguments)
    assert ran.code == 0, ran.err
    shown = plain(ran.out)
    used = (
        "base",
        "adapter",
        "target",
        "out",
        "calibration",
        "rounding",
        "verify",
        "min-kept",
        "max-kl-ratio",
        "device",
        "resume",
    )
    assert not [name for name in (*used, "json", "quiet", "version") if f"--{name} " not in shown]
    assert not [command for command in COMMANDS if not re.search(rf"│ {command} ", shown)]
    assert "--block-size" not in shown and "qmerge --help-all" in shown
    assert len(shown.splitlines()) < MOST_LINES


@pytest.mark.parametrize("command", [(), ("merge",), ("run",)])
def test_help_all_names_every_option(cli: Cli, command: tuple[str, ...]) -> None:
    ran = cli(*command, "--help-all")
    assert ran.code == 0, ran.err
    shown = plain(ran.out)
    flags = [f"--{name.replace('_', '-')}" for name in Recipe.model_fields]
    assert not [flag for flag in (*flags, "--resume", "--json", "--quiet", "--help-all") if f"{flag} " not in shown]


@pytest.mark.parametrize("page", ["--help", "--help-all"])
@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_fits_80_columns(cli: Cli, command: tuple[str, ...], page: str) -> None:
    if page == "--help-all" and command and command[0] not in WITH_MANY_OPTIONS:
        pytest.skip("its --help shows everything")
    ran = cli(*command, page)
    assert ran.code == 0
    assert max(len(line) for line in plain(ran.out).splitlines()) <= 80


def test_shell_completion(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands, options that --help does not show, and values."""
    monkeypatch.setattr("shellingham.detect_shell", lambda: ("bash", "bash"))  # whatever shell or make runs the tests
    assert "qmerge" in cli("--show-completion").out
    for words, expected in (
        ("qmerge mea", "measure"), ("qmerge merge --block", "--block-size"), ("qmerge plan --rounding pre", "preserve"),
        ("qmerge --combine ch", "chain"), ("qmerge run --trained-on fp", "fp4-dq"), ("qmerge --target gpt", "gptq"),
    ):  # fmt: skip
        monkeypatch.setenv("_QMERGE_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
        assert expected in cli().out.split(), words


def test_help_is_quick() -> None:
    """No torch for a page of help."""
    code = "import sys; sys.argv = ['qmerge', '--help']\nimport qmerge.cli\ntry: qmerge.cli.main()\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}print('torch' in sys.modules)"], capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("command", ["formats", "inspect"], ids=["lines", "a table of rich"])
def test_a_reader_that_ends_is_no_bug(command: str) -> None:
    """As ``qmerge formats | head -1``: both libraries that print would end with 1."""
    reading, writing = os.pipe()
    os.close(reading)
    arguments = [str(Path(qmerge.__file__).parent / "demo/adapter")] if command == "inspect" else []
    done = subprocess.run(
        [sys.executable, "-m", "qmerge", command, *arguments], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    assert version("qmerge") == __version__


def test_unknown_option_and_command(cli: Cli) -> None:
    for arguments in (("--bse", "x"), ("mesure",)):
        ran = cli(*arguments)
        assert ran.code == 2 and ran.out == "" and arguments[0] in ran.err


def test_options_before_a_command_are_refused_not_ignored(cli: Cli) -> None:
    ran = cli("--target", "bf16", "measure", "--base", "x", "--adapter", "y")
    assert ran.code == 2 and "--target belongs after the command" in ran.err
    for flag in ("--json", "--quiet", "--resume"):
        ran = cli(flag, "inspect", "x")
        assert ran.code == 2 and f"{flag} belongs after the command: qmerge inspect {flag}" in ran.err


def test_resume_without_its_command_is_an_error(cli: Cli) -> None:
    ran = cli("--resume")
    assert ran.code == 2 and "repeat its whole command with --resume" in ran.err and ran.out == ""


def test_inspect_of_neither_an_adapter_nor_a_model(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    ran = cli("inspect", tmp_path)
    assert ran.code == 3 and "neither an adapter (adapter_config.json) nor a model" in ran.err


def test_measure_takes_formats_by_name(cli: Cli) -> None:
    ran = cli("measure", "--base", "x", "--adapter", "y", "--target", "auto")
    assert ran.code == 2 and "measure takes formats by name" in ran.err
    with pytest.raises(RecipeError, match="measure takes formats by name"):
        qmerge.measure(base="x", adapter="y", target="auto")


def test_formats(cli: Cli) -> None:
    lines = cli("formats").out.splitlines()
    found = json.loads(cli("formats", "--json").out)
    assert found.keys() == set(plugins.KINDS)
    for kind in plugins.KINDS:
        no_plugin = {"chain"} if kind == "combine" else set()
        assert set(found[kind]) == set(plugins.names(kind)) | no_plugin
        shown = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines if line.startswith("  ")}
        assert all(len(text) > 10 and text.endswith(shown[name]) for name, text in found[kind].items())


def test_the_word_merge_may_be_left_out(cli: Cli, asked: list[str], tmp_path: Path) -> None:
    assert cli("merge", *asked).code == 0
    with_it = snapshot(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert cli(*asked).code == 0
    assert snapshot(tmp_path / "out")["model.safetensors"] == with_it["model.safetensors"]


def test_merge_prints_a_table_on_stdout(cli: Cli, lossy: list[str]) -> None:
    ran = cli(*lossy)
    assert ran.code == 0
    assert "what survived in nf4 (preserve)" in ran.out and "q_proj" in ran.out and "qmerge verify" in ran.out
    assert "warning" not in ran.out


def test_json_is_json_and_nothing_else(cli: Cli, lossy: list[str], tmp_path: Path) -> None:
    ran = cli(*lossy, "--json")
    assert ran.code == 0
    assert json.loads(ran.out) == json.loads((tmp_path / "out" / "qmerge.json").read_text())


def test_quiet_is_silent_but_for_warnings(cli: Cli, asked: list[str], tmp_path: Path) -> None:
    from .. import models

    usual = models.adapter(models.llama(), tmp_path / "usual", size=1e-3)  # 4 % of the weights, like a trained one
    base = shutil.copytree(asked[1], tmp_path / "base")
    (base / "tokenizer_config.json").write_text("{}")
    ran = cli("--base", base, "--adapter", usual, *asked[4:], "--merge-onto", "original", "--quiet")
    assert ran.code == 0 and ran.err == ""


def test_quiet_does_not_hide_warnings(cli: Cli, lossy: list[str], nf4: Path, tmp_path: Path) -> None:
    from .. import models

    faint = models.adapter(models.llama(), tmp_path / "faint", size=1e-5)
    ran = cli(
        *["--base", nf4, "--adapter", faint, "--target", "nf4", "--out", tmp_path / "o", "--rounding", "nearest", "-q"]
    )
    assert ran.code == 0
    lines = ran.err.splitlines()
    assert lines and all(line.startswith("warning: ") for line in lines)
    assert [line for line in lines if "will survive" in line and "--target" in line]
    assert len(set(lines)) == len(lines) and not any("survived" in line for line in lines), "said once"


def test_quiet_does_not_hide_errors(cli: Cli, tmp_path: Path) -> None:
    assert cli("--base", tmp_path, "--adapter", tmp_path, "--target", "nf4", "--out", tmp_path / "o", "-q").err != ""


@pytest.mark.parametrize(("target", "least", "code"), [("fp32", 0.99, 0), ("nf4", 1.0, 5), ("nf4", -1.0, 0)])
def test_min_kept_gates_the_exit_code(
    cli: Cli, lossy: list[str], tmp_path: Path, target: str, least: float, code: int
) -> None:
    ran = cli(*lossy, "--target", target, "--rounding", "nearest", "--min-kept", least)
    kept = json.loads((tmp_path / "out" / "qmerge.json").read_text())["total"]["values"]["kept"]
    assert (kept < least) == (code == 5)
    assert ran.code == code, ran.err
    assert (tmp_path / "out" / "config.json").exists(), "the model is written either way"
    if code == 5:
        assert "--min-kept" in ran.err.splitlines()[-1] and f"{least:g}" in ran.err.splitlines()[-1]


def measured(cli: Cli, asked: list[str], *more: object) -> Any:
    return cli("measure", *asked[:4], "--device", "cpu", *more)


def test_measure_several_targets(cli: Cli, lossy: list[str], tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    ran = measured(cli, lossy, "--target", "nf4", "--target", "int8", "--target", "fp32", "--json")
    assert ran.code == 0, ran.err
    reports = json.loads(ran.out)
    assert [report["recipe"]["target"] for report in reports] == ["nf4", "int8", "fp32"]
    kept = [report["total"]["values"]["kept"] for report in reports]
    noise = [report["total"]["values"]["noise"] for report in reports]
    assert abs(kept[2] - 1) < 1e-4 and noise[0] > noise[1] > noise[2]
    assert snapshot(tmp_path) == before, "measure writes nothing"
    table = measured(cli, lossy, "--target", "nf4", "--target", "int8", "--target", "fp32").out
    assert all(name in table for name in ("nf4", "int8", "fp32"))


def test_measure_tells_what_merge_tells(cli: Cli, lossy: list[str], tmp_path: Path) -> None:
    report = json.loads(measured(cli, lossy, "--target", "nf4", "--json").out)[0]
    merged = json.loads(cli(*lossy, "--json").out)
    for part in ("total", "groups", "weights", "inputs", "predicted", "warnings"):
        assert report[part] == merged[part], part


def test_measure_min_kept(cli: Cli, lossy: list[str]) -> None:
    assert measured(cli, lossy, "--target", "nf4", "--rounding", "nearest", "--min-kept", 1).code == 5
    assert measured(cli, lossy, "--target", "nf4", "--min-kept", -1).code == 0


def test_workers_and_blocks_change_no_byte_and_no_number(cli: Cli, lossy: list[str], tmp_path: Path) -> None:
    outs = []
    for n, more in enumerate((["--workers", "1"], ["--workers", "4"], ["--workers", "4", "--max-memory", "100MB"])):
        out = tmp_path / f"out-{n}"
        assert cli(*[str(out) if x == str(tmp_path / "out") else x for x in lossy], *more).code == 0
        report = json.loads((out / "qmerge.json").read_text())
        outs.append((snapshot(out)["model.safetensors"], report["total"], report["groups"], report["weights"]))
    assert outs[0] == outs[1] == outs[2]


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(nf4: Path, lora: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    settings = {"base": str(nf4), "adapter": str(lora), "target": "nf4", "out": str(tmp_path / "out"), "device": "cpu"}
    path.write_text(yaml.safe_dump({**settings, "rounding": "stochastic", "seed": 3}))
    return path


def test_run_a_recipe(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    ran = cli("run", recipe, "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)["recipe"]
    assert (found["target"], found["rounding"], found["seed"]) == ("nf4", "stochastic", 3)


def test_flags_override_a_recipe(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "other"
    ran = cli("run", recipe, "--target", "fp32", "--rounding", "nearest", "--out", out, "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)["recipe"]
    assert (found["target"], found["rounding"], found["seed"]) == ("fp32", "nearest", 3)
    assert (out / "config.json").exists() and not (tmp_path / "out").exists()


def test_a_recipe_replays_what_it_was_written_for(
    cli: Cli, recipe: Path, nf4: Path, lora: Path, tmp_path: Path
) -> None:
    """It names base and adapter without absolute paths: they have to be given."""
    assert cli("run", recipe).code == 0
    inputs = ("--base", nf4, "--adapter", lora)
    again = cli("run", tmp_path / "out" / "qmerge_recipe.yaml", *inputs, "--out", tmp_path / "again")
    assert again.code == 0, again.err
    assert snapshot(tmp_path / "out")["model.safetensors"] == snapshot(tmp_path / "again")["model.safetensors"]


# --- the other commands ----------------------------------------------------------------------------------------------


def test_plan(cli: Cli, lossy: list[str], tmp_path: Path) -> None:
    ran = cli("plan", *lossy, "--json")
    assert ran.code == 0, ran.err
    assert isinstance(json.loads(ran.out), dict)
    assert not (tmp_path / "out").exists()
    shown = cli("plan", *lossy, "--all")
    assert shown.code == 0 and "model.layers.0.self_attn.q_proj" in shown.out
    without_target = cli("plan", *lossy[:4])
    assert without_target.code == 0 and all(name in without_target.out for name in ("nf4", "int8", "bf16"))


def test_inspect(cli: Cli, lora: Path) -> None:
    found = json.loads(cli("inspect", lora, "--json").out)
    assert found["problem"] is None and len(found["modules"]) == 14
    assert {module["rank"] for module in found["modules"]} == {4} and {
        module["scale"] for module in found["modules"]
    } == {2.0}
    shown = cli("inspect", lora)
    assert shown.code == 0 and "q_proj" in shown.out


def test_inspect_what_cannot_be_merged(cli: Cli, lora: Path, tmp_path: Path) -> None:
    """It still tells what it is, and why not."""
    import shutil

    from ..models import edit_json

    folder = shutil.copytree(lora, tmp_path / "dora")
    edit_json(folder / "adapter_config.json", use_dora=True)
    assert "use_dora" in json.loads(cli("inspect", folder, "--json").out)["problem"]
    assert "use_dora" in cli("inspect", folder).err


def test_inspect_what_is_no_adapter(cli: Cli, tmp_path: Path) -> None:
    ran = cli("inspect", tmp_path)
    assert ran.code == 3 and "adapter_config.json" in ran.err


def test_verify(cli: Cli, lossy: list[str], tmp_path: Path) -> None:
    assert cli(*lossy).code == 0
    ran = cli("verify", tmp_path / "out", "--no-reload", "--json")
    assert ran.code == 0 and all(check["ok"] for check in json.loads(ran.out)["checks"])
    with (tmp_path / "out" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    ran = cli("verify", tmp_path / "out", "--no-reload")
    assert ran.code == 3 and "FAILED hashes: model.safetensors" in ran.out


def test_verify_what_qmerge_did_not_write(cli: Cli, dense: Path) -> None:
    ran = cli("verify", dense)
    assert ran.code == 3 and "qmerge.json" in ran.err


def test_report_again(cli: Cli, lossy: list[str], tmp_path: Path) -> None:
    assert cli(*lossy).code == 0
    page = tmp_path / "out" / "qmerge.html"
    first = page.read_bytes()
    page.unlink()
    assert cli("report", tmp_path / "out").code == 0
    assert page.read_bytes() == first
    assert cli("report", tmp_path / "out", "--html", tmp_path / "page.html").code == 0
    assert (tmp_path / "page.html").read_bytes() == first


def test_merges_are_compared(cli: Cli, lossy: list[str], tmp_path: Path) -> None:
    assert cli(*lossy).code == 0
    out, page = tmp_path / "out", tmp_path / "compare.html"
    ran = cli("compare", out, out, "--html", page)
    assert ran.code == 0 and "out (2)" in ran.out and str(page) in ran.out
    assert "2 merges side by side" in page.read_text()
    assert json.loads(cli("compare", out, out, "--json").out).keys() == {"out", "out (2)"}
    ran = cli("compare", out)
    assert ran.code == 2 and "two or more folders" in ran.err
    ran = cli("compare", out, tmp_path, "--html", tmp_path / "none.html")
    assert ran.code == 3 and "qmerge.json" in ran.err and not (tmp_path / "none.html").exists()


def test_measure_writes_a_page(cli: Cli, lossy: list[str], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert measured(cli, lossy, "--target", "nf4", "--target", "int8", "--html", page).code == 0
    assert "2 merges side by side" in page.read_text() and 'data-n="' in page.read_text()
    ran = measured(cli, lossy, "--target", "int8", "--html", page)
    assert ran.code == 0 and f"Page written to {page}" in ran.out
    assert "measured as int8, not written" in page.read_text()


def test_a_report_of_another_schema(cli: Cli, lossy: list[str], tmp_path: Path) -> None:
    from ..models import edit_json

    assert cli(*lossy).code == 0
    edit_json(tmp_path / "out" / "qmerge.json", schema_version=99)
    ran = cli("report", tmp_path / "out")
    assert ran.code == 3 and "schema" in ran.err, ran.err
