"""A model that several processes write: ``--shard i/n`` and ``qmerge finalize``, ``--workers ray``. Its bytes and numbers are
those of one run; a missing, doubled, interrupted or foreign part is one clear error."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from qmerge import run
from qmerge.checkpoint.parts import Part, name_of_part, part_of_name, read_part
from qmerge.errors import InputError, RecipeError
from qmerge.recipe import make_recipe
from qmerge.run import complete
from qmerge.run import texts as run_texts

from .. import models
from ..conftest import Cli, snapshot, timeless
from ..models import edit_json
from .test_resume import Saboteur, child, finished

COUNT = 3


@pytest.fixture(scope="module")
def settings(nf4: Path, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """NF4 to NF4, stochastic, in seven files: kept grids, copies, and texts of unknown length."""
    tmp = tmp_path_factory.mktemp("parts")
    return {
        "base": str(shutil.copytree(nf4, tmp / "base")), "adapter": str(shutil.copytree(lora, tmp / "adapter")),
        "target": "nf4", "rounding": "stochastic", "seed": 7, "device": "cpu", "max_shard_size": "12kB",
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process writes."""
    return timeless(merged_by_one(settings, tmp_path_factory))


def merged_by_one(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that one process writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run.merge(make_recipe({**settings, "out": str(out)}))
    return out


def arguments(settings: Mapping[str, Any], out: Path, *more: str) -> list[str]:
    options = []
    for name, value in {**settings, "out": str(out)}.items():
        options += [f"--{name.replace('_', '-')}", str(value)]
    return [*options, *more]


def write_part(settings: Mapping[str, Any], out: Path, number: int, count: int = COUNT, resume: bool = False) -> None:
    run.merge_part(make_recipe({**settings, "out": str(out)}), Part(number, count), resume)


@pytest.fixture
def parts(settings: dict[str, Any], tmp_path: Path) -> Path:
    """An output folder with all parts, not finalized."""
    out = tmp_path / "out"
    for number in (2, 3, 1):
        write_part(settings, out, number)
    return out


# --- shares ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_every_item_is_in_one_share_and_shares_are_alike(count: int) -> None:
    sizes = {"a": 5, "b": 5, "c": 5, "d": 2, "e": 5, "f": 5, "g": 1}
    shares = [Part(number, count).share(sizes) for number in range(1, count + 1)]
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert min(loads) > 0 and max(loads) - min(loads) <= 5


def test_a_part_names_its_files() -> None:
    name = name_of_part(".qmerge.lock", Part(2, 8))
    assert name == ".qmerge-00002-of-00008.lock"
    assert part_of_name(name, ".qmerge.lock") == Part(2, 8)
    assert part_of_name(name, ".qmerge-journal.jsonl") is None
    assert part_of_name("model-00002-of-00008.safetensors", ".qmerge.lock") is None
    assert name_of_part(".qmerge.lock", None) == ".qmerge.lock"


@pytest.mark.parametrize("text", ["", "2", "0/3", "4/3", "1/0", "a/b", "1/2/3", "-1/2", "1/100000"])
def test_what_is_no_part_is_an_error(text: str) -> None:
    with pytest.raises(RecipeError, match=r"--shard .*: expected i/n"):
        read_part(text)


# --- the same model --------------------------------------------------------------------------------------------------


def test_parts_make_the_bytes_and_numbers_of_one_run(
    settings: dict[str, Any], whole: dict[str, Any], tmp_path: Path, cli: Cli
) -> None:
    out = tmp_path / "out"
    for number in (3, 1, 2):
        ran = cli(*arguments(settings, out, "--shard", f"{number}/{COUNT}"))
        assert ran.code == 0, ran.err
        assert f"Part {number}/{COUNT} is written" in ran.out and f"qmerge finalize {out}" in ran.out
        assert not (out / "config.json").exists() and not (out / "model.safetensors.index.json").exists()
    ran = cli("finalize", out)
    assert ran.code == 0, ran.err
    assert timeless(out) == whole
    assert len([name for name in whole if name.endswith(".safetensors")]) > COUNT
    assert cli("verify", out, "--no-reload").code == 0


def test_each_input_file_is_hashed_once(
    sharded: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qmerge.report import records

    hashed: list[str] = []
    real = records.hash_file
    monkeypatch.setattr(records, "hash_file", lambda path: hashed.append(path.name) or real(path))
    settings = {"base": str(sharded), "adapter": str(lora), "target": "fp32", "max_shard_size": "60kB"}
    for number in (1, 2):
        write_part(settings, tmp_path / "out", number, 2)
    report = run.finalize(tmp_path / "out")
    files = [path.name for path in sharded.glob("*.safetensors")]
    assert len(files) > 2 and [hashed.count(name) for name in files] == [1] * len(files)
    hashed.clear()
    one = run.merge(make_recipe({**settings, "out": str(tmp_path / "one")}))
    assert report.inputs == one.inputs


def test_finalize_ends_with_the_exit_code_of_the_recipe(settings: dict[str, Any], tmp_path: Path, cli: Cli) -> None:
    for number in (1, 2):
        assert cli(*arguments(settings, tmp_path / "out", "--min-kept", "1", "--shard", f"{number}/2")).code == 0
    ran = cli("finalize", tmp_path / "out", "--json")
    assert ran.code == 5, ran.err
    assert json.loads(ran.out)["schema_version"]


# --- what goes wrong -------------------------------------------------------------------------------------------------


def refused(ran: Any, out: Path, before: Mapping[str, str], *words: str) -> None:
    """Exit code 2, one line with these words, and nothing has changed."""
    assert ran.code == 2, ran.err
    last = ran.err.splitlines()[-1]
    assert last.startswith("qmerge: ") and not [word for word in words if word not in last], last
    assert snapshot(out) == before


def test_a_missing_part(settings: dict[str, Any], whole: dict[str, Any], tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "out"
    write_part(settings, out, 1)
    refused(cli("finalize", out), out, snapshot(out), "parts 2/3, 3/3 are missing: run", "--shard 2/3")
    write_part(settings, out, 3)
    refused(cli("finalize", out), out, snapshot(out), "part 2/3 is missing: run your merge command with --shard 2/3")
    write_part(settings, out, 2)
    assert cli("finalize", out).code == 0
    assert timeless(out) == whole


@pytest.mark.parametrize("gone", ["file", "half a file", "first line"])
def test_an_unfinished_part(settings: dict[str, Any], whole: dict[str, Any], parts: Path, cli: Cli, gone: str) -> None:
    journal = parts / name_of_part(".qmerge-journal.jsonl", Part(2, COUNT))
    file = parts / json.loads(journal.read_text().splitlines()[0])["part"]["files"][0]
    if gone == "file":
        file.unlink()
    elif gone == "half a file":
        os.truncate(file, file.stat().st_size // 2)
    else:
        journal.write_text("\0" * 100 + journal.read_text())
    refused(cli("finalize", parts), parts, snapshot(parts), "part 2/3 is not finished", "--shard 2/3 --resume")
    write_part(settings, parts, 2, resume=True)
    assert cli("finalize", parts).code == 0
    assert timeless(parts) == whole


def test_a_part_that_was_begun_is_not_begun_again(settings: dict[str, Any], parts: Path, cli: Cli) -> None:
    ran = cli(*arguments(settings, parts, "--shard", "2/3"))
    refused(ran, parts, snapshot(parts), "--shard 2/3", "is complete", f"qmerge finalize {parts}")
    journal = parts / name_of_part(".qmerge-journal.jsonl", Part(2, COUNT))
    journal.write_text(journal.read_text().splitlines()[0] + "\n")
    ran = cli(*arguments(settings, parts, "--shard", "2/3"))
    refused(ran, parts, snapshot(parts), "--shard 2/3", "begun", "--resume")


def test_two_processes_with_the_same_number(settings: dict[str, Any], tmp_path: Path, cli: Cli) -> None:
    from qmerge.checkpoint.folder import locked

    out = tmp_path / "out"
    write_part(settings, out, 1)
    with locked(out, Part(2, COUNT)):
        before = snapshot(out)
        refused(cli(*arguments(settings, out, "--shard", "2/3")), out, before, "writing part 2/3")
    with locked(out, Part(1, COUNT)):
        before = snapshot(out)
        refused(cli(*arguments(settings, out, "--shard", "1/3", "--resume")), out, before, "writing part 1/3")
        write_part(settings, out, 2)  # the control: another part is not in the way
        write_part(settings, out, 3)
        before = snapshot(out)
        refused(cli("finalize", out), out, before, "writing part 1/3")
    assert cli("finalize", out).code == 0


CHANGES: dict[str, tuple[Callable[[Path, Path], object], tuple[str, ...], str]] = {
    "recipe": (lambda base, adapter: None, ("--seed", "8"), "recipe seed was 7 and is 8"),
    "adapter": (
        lambda base, adapter: edit_json(adapter / "adapter_config.json", lora_alpha=9),
        (),
        "adapter_config.json",
    ),
    "config": (lambda base, adapter: edit_json(base / "config.json", rope_theta=5), (), "as the base"),
    "number": (lambda base, adapter: None, ("--shard", "2/2"), "holds a run in 3 parts"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_parts_of_different_runs(settings: dict[str, Any], tmp_path: Path, cli: Cli, name: str) -> None:
    base = shutil.copytree(settings["base"], tmp_path / "base")
    adapter = shutil.copytree(settings["adapter"], tmp_path / "adapter")
    changed = {**settings, "base": str(base), "adapter": str(adapter)}
    out = tmp_path / "out"
    write_part(changed, out, 1)
    change, more, words = CHANGES[name]
    change(base, adapter)
    ran = cli(*arguments(changed, out, *(more if "--shard" in more else ("--shard", "2/3", *more))))
    if ran.code == 0:
        write_part(changed, out, 3)
        ran = cli("finalize", out)
    refused(ran, out, snapshot(out), words)


@pytest.fixture
def judged_parts(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output folder with all parts of a run that ends with judging the model."""
    monkeypatch.setattr(run_texts, "load_tokenizer", lambda folder: None)  # the base has none
    text = tmp_path / "text.txt"
    text.write_text("some text")
    out = tmp_path / "out"
    for number in (1, 2):
        write_part({**settings, "verify": str(text)}, out, number, 2)
    return out


def fail_with(error: BaseException) -> Callable[..., Any]:
    def failing(*arguments: Any, **options: Any) -> Any:
        raise error

    return failing


def weights_in(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("*.safetensors"))


def test_interrupted_judging_is_done_again(judged_parts: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(complete, "fidelity", fail_with(KeyboardInterrupt()))
        ran = cli("finalize", judged_parts)
        assert "the same command goes on" in ran.err
    assert (judged_parts / "config.json").exists()
    judged = []
    monkeypatch.setattr(complete, "fidelity", lambda *arguments, **options: judged.append(arguments))
    run.finalize(judged_parts)
    assert len(judged) == 1 and not list(judged_parts.glob(".qmerge*"))


def test_the_model_stays_when_it_cannot_be_judged(
    judged_parts: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(complete, "fidelity", fail_with(InputError("no words")))
    with pytest.raises(InputError, match="no words"):
        run.finalize(judged_parts)
    assert (judged_parts / "config.json").exists() and not list(judged_parts.glob(".qmerge*"))
    assert weights_in(judged_parts) == sorted(name for name in whole if name.endswith(".safetensors"))


def test_inputs_that_changed_before_finalize(settings: dict[str, Any], tmp_path: Path, cli: Cli) -> None:
    adapter = shutil.copytree(settings["adapter"], tmp_path / "adapter")
    changed = {**settings, "adapter": str(adapter)}
    for number in (1, 2):
        write_part(changed, tmp_path / "out", number, 2)
    edit_json(adapter / "adapter_config.json", lora_alpha=9)
    refused(cli("finalize", tmp_path / "out"), tmp_path / "out", snapshot(tmp_path / "out"), "adapter_config.json")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--shard", "4/3"), ("--shard 4/3", "expected i/n")),
        (("--shard", "1/99"), ("--shard 1/99", "files", "fewer parts")),
        (("--shard", "1/2", "--residual", "2"), ("--residual",)),
        (("--shard", "1/2", "--promote", "1MB"), ("--promote",)),
        (("--shard", "1/2", "--rounding", "preserve"), ("preserve", "--calibration none")),
        (("--shard", "1/2", "--rounding", "auto"), ("rounding auto", "preserve", "--rounding stochastic")),
    ],
)
def test_what_cannot_be_done_in_parts(
    settings: dict[str, Any], tmp_path: Path, cli: Cli, more: tuple[str, ...], words: tuple[str, ...]
) -> None:
    given = {name: value for name, value in settings.items() if f"--{name}" not in more}
    refused(cli(*arguments(given, tmp_path / "out", *more)), tmp_path / "out", {}, *words)


def test_preserve_without_calibration_is_done_in_parts(settings: dict[str, Any], tmp_path: Path) -> None:
    preserved = {**settings, "rounding": "preserve", "calibration": "none"}
    for number in (1, 2):
        write_part(preserved, tmp_path / "out", number, 2)
    run.finalize(tmp_path / "out")
    run.merge(make_recipe({**preserved, "out": str(tmp_path / "one")}))
    assert timeless(tmp_path / "out") == timeless(tmp_path / "one")


def test_a_whole_run_and_a_part_do_not_share_a_folder(settings: dict[str, Any], tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "out"
    write_part(settings, out, 1)
    for more in ((), ("--resume",)):
        refused(cli(*arguments(settings, out, *more)), out, snapshot(out), "a run in 3 parts", "--shard")
    run.merge(make_recipe({**settings, "out": str(tmp_path / "one")}))
    for more in ((), ("--resume",)):
        ran = cli(*arguments(settings, tmp_path / "one", "--shard", "1/3", *more))
        refused(ran, tmp_path / "one", snapshot(tmp_path / "one"), "not empty", "no run in parts")


def test_finalize_of_something_else(tmp_path: Path, cli: Cli) -> None:
    refused(cli("finalize", tmp_path / "none"), tmp_path, {}, "no run in parts", "--shard")


def test_numbers_that_do_not_fit_leave_the_other_parts(dense: Path, tmp_path: Path, cli: Cli) -> None:
    """float16 cannot store the merged values of the first file; the other part's files stay."""
    big = models.adapter(models.llama(torch.float32), tmp_path / "big", size=1e6, target_modules=["q_proj"])
    settings = {"base": str(dense), "adapter": str(big), "target": "fp16", "device": "cpu", "max_shard_size": "60kB"}
    settings |= {"rounding": "nearest"}
    codes = []
    for number in range(1, 5):
        before = snapshot(tmp_path / "out")
        codes.append(cli(*arguments(settings, tmp_path / "out", "--shard", f"{number}/4")).code)
        if codes[-1] == 4:
            assert snapshot(tmp_path / "out") == before
    assert set(codes) == {0, 4}
    assert cli("finalize", tmp_path / "out").code == 2


# --- killed and interrupted ------------------------------------------------------------------------------------------


def part_in_child(settings: dict[str, Any], number: int, resume: bool, at: int, log: Path | None) -> None:
    saboteur = Saboteur(at, "before", lambda: os.kill(os.getpid(), signal.SIGKILL))
    saboteur.install()
    run.merge_part(make_recipe(settings), Part(number, COUNT), resume)
    if log:
        log.write_text("\n".join(saboteur.log))


def finalize_in_child(out: Path, at: int, log: Path | None) -> None:
    saboteur = Saboteur(at, "before", lambda: os.kill(os.getpid(), signal.SIGKILL))
    saboteur.install()
    run.finalize(out)
    if log:
        log.write_text("\n".join(saboteur.log))


@pytest.mark.slow
def test_a_killed_part_is_resumed(settings: dict[str, Any], whole: dict[str, Any], tmp_path: Path) -> None:
    log = tmp_path / "log"
    asked = {**settings, "out": str(tmp_path / "out")}
    assert finished(child(part_in_child, asked, 2, False, 0, log)) == 0
    moments = len(log.read_text().splitlines())
    for at in range(1, moments, moments // 12):
        shutil.rmtree(asked["out"])
        write_part(settings, tmp_path / "out", 1)
        assert finished(child(part_in_child, asked, 2, False, at, None)) == -signal.SIGKILL
        with pytest.raises(RecipeError, match=r"missing|not finished"):
            run.finalize(tmp_path / "out")
        for number in (2, 3):
            write_part(settings, tmp_path / "out", number, resume=True)
        run.finalize(tmp_path / "out")
        assert timeless(tmp_path / "out") == whole, at


@pytest.mark.slow
def test_a_killed_finalize_is_done_again(
    settings: dict[str, Any], whole: dict[str, Any], parts: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    kept = shutil.copytree(parts, tmp_path / "kept")
    assert finished(child(finalize_in_child, parts, 0, log)) == 0
    moments = log.read_text().splitlines()
    for at in range(1, len(moments) + 1):
        shutil.rmtree(parts)
        shutil.copytree(kept, parts)
        assert finished(child(finalize_in_child, parts, at, None)) == -signal.SIGKILL
        if any(parts.glob(".qmerge*")):
            run.finalize(parts)
        assert timeless(parts) == whole, moments[at - 1]
