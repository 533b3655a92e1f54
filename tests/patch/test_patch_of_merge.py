"""``--patch`` on a merge: base and patch give the files that ``--out`` would have written, and nothing else is left behind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import qmerge
from qmerge import run
from qmerge.checkpoint import folder as folder_module
from qmerge.errors import CheckpointError, RecipeError, RoomError, StoppedError
from qmerge.patch import apply_patch, direct, unmerge
from qmerge.progress import NoProgress
from qmerge.recipe import Recipe, make_recipe

from .. import models
from ..conftest import Cli, snapshot, timeless
from ..patch.test_patch import STRIKES, install


def recipe(nf4: Path, lora: Path, **more: Any) -> Recipe:
    settings = {"base": str(nf4), "adapter": str(lora), "target": "nf4", "rounding": "stochastic", "device": "cpu"}
    return make_recipe({**settings, **more})


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Hashes of the temporary merged folders, taken when the patch is made."""
    snapshots: list[dict[str, str]] = []
    make_patch = direct.make_patch

    def watched(base: Path, merged: Path, *rest: Any, **more: Any) -> Any:
        snapshots.append(snapshot(merged))
        return make_patch(base, merged, *rest, **more)

    monkeypatch.setattr(direct, "make_patch", watched)
    return snapshots


@pytest.mark.parametrize("more", [{}, {"max_shard_size": "60kB", "residual": 2}, {"target": "bf16"}], ids=str)
def test_apply_gives_what_out_would_have_been(
    nf4: Path, lora: Path, tmp_path: Path, seen: list[dict[str, str]], more: dict[str, Any]
) -> None:
    """Bit for bit the folder that the patch was made from. Except for times, also that of a run with --out."""
    report, summary = direct.merge(recipe(nf4, lora, patch=str(tmp_path / "a.patch"), **more), False, NoProgress())
    assert [path.name for path in tmp_path.iterdir()] == ["a.patch"]
    assert summary is not None and summary.nbytes == (tmp_path / "a.patch").stat().st_size
    apply_patch(nf4, tmp_path / "a.patch", tmp_path / "applied")
    assert [snapshot(tmp_path / "applied")] == seen
    run.merge(recipe(nf4, lora, out=str(tmp_path / "a"), **more))  # a residual adapter names the folder as its base
    assert timeless(tmp_path / "applied") == timeless(tmp_path / "a")
    assert json.loads((tmp_path / "applied/qmerge.json").read_text()) == json.loads(report.model_dump_json())
    run.merge(recipe(nf4, lora, out=str(tmp_path / "other"), seed=1, **more))
    if "bf16" not in more.values():
        assert timeless(tmp_path / "applied")["config.json"] == timeless(tmp_path / "other")["config.json"]
        assert snapshot(tmp_path / "applied") != snapshot(tmp_path / "other"), "the control: another seed"
    unmerge(tmp_path / "applied", tmp_path / "a.patch", tmp_path / "base")
    assert snapshot(tmp_path / "base") == snapshot(nf4)


def test_no_path_of_the_temporary_folder_stays(nf4: Path, lora: Path, tmp_path: Path) -> None:
    direct.merge(recipe(nf4, lora, patch=str(tmp_path / "a.patch")), False, NoProgress())
    apply_patch(nf4, tmp_path / "a.patch", tmp_path / "applied")
    for path in (tmp_path / "applied").iterdir():
        assert b".a.patch-" not in path.read_bytes(), path.name
    assert b".a.patch-" not in (tmp_path / "a.patch").read_bytes()
    settings = yaml.safe_load((tmp_path / "applied/qmerge_recipe.yaml").read_text())
    assert "patch" not in settings and "out" not in settings


def test_command_recipe_and_python(nf4: Path, lora: Path, tmp_path: Path, cli: Cli) -> None:
    """Each can make a patch. The command line wins over the recipe: --out over its patch, and --patch over its out."""
    common = ("--base", nf4, "--adapter", lora, "--target", "nf4", "--rounding", "nearest", "--device", "cpu")
    ran = cli(*common, "--patch", tmp_path / "a.patch", "--min-kept", "1")
    assert ran.code == 5 and (tmp_path / "a.patch").is_file(), ran.err
    assert f"qmerge apply {nf4} {tmp_path / 'a.patch'} --out DIR" in ran.out and re.search(
        r"\d\.\d % of the merged folder", ran.out
    )
    assert cli("apply", nf4, tmp_path / "a.patch", "--out", tmp_path / "applied").code == 0
    stored_recipe = tmp_path / "applied/qmerge_recipe.yaml"
    assert "--base DIR" in cli("run", stored_recipe).err
    inputs = ("--base", nf4, "--adapter", lora)
    assert "out is needed" in cli("run", stored_recipe, *inputs).err
    assert cli("run", stored_recipe, *inputs, "--out", tmp_path / "out", "--min-kept", "-1").code == 0
    assert timeless(tmp_path / "out").keys() == timeless(tmp_path / "applied").keys()
    again = cli(
        "run",
        tmp_path / "out/qmerge_recipe.yaml",
        *inputs,
        "--patch",
        tmp_path / "b.patch",
        "--json",
        "--min-kept",
        "-1",
    )
    assert again.code == 0 and json.loads(again.out)["schema_version"] == 1
    settings = {"base": str(nf4), "adapter": str(lora), "device": "cpu", "quiet": True}
    report = qmerge.merge(**settings, target="nf4", rounding="nearest", patch=str(tmp_path / "c.patch"))
    assert report.kept is not None and (tmp_path / "c.patch").is_file()
    assert cli("plan", *common, "--patch", tmp_path / "d.patch").code == 0 and not (tmp_path / "d.patch").exists()


def test_several_adapters(nf4: Path, lora: Path, tmp_path: Path, seen: list[dict[str, str]]) -> None:
    other = models.adapter(models.llama(), tmp_path / "other", seed=9)
    pair = {"adapter": [f"{lora}=0.7", f"{other}=0.3"], "combine": "ties", "density": 0.5}
    direct.merge(recipe(nf4, lora, patch=str(tmp_path / "a.patch"), **pair), False, NoProgress())
    apply_patch(nf4, tmp_path / "a.patch", tmp_path / "applied")
    assert [snapshot(tmp_path / "applied")] == seen


# --- refused before any work -----------------------------------------------------------------------------------------


def test_out_and_patch_are_one_or_the_other() -> None:
    with pytest.raises(RecipeError, match=r"out \(x\) and patch \(y\): a run writes only one of them"):
        make_recipe({"base": "a/b", "adapter": "c/d", "target": "nf4", "out": "x", "patch": "y"})


def test_resume_is_refused(nf4: Path, lora: Path, tmp_path: Path, cli: Cli) -> None:
    ran = cli("--base", nf4, "--adapter", lora, "--target", "nf4", "--patch", tmp_path / "a.patch", "--resume")
    assert (
        ran.code == 2
        and "--resume: a run with --patch keeps nothing to resume from" in ran.err
        and not any(tmp_path.iterdir())
    )


BAD_PATHS: dict[str, tuple[Callable[[Path, Path, Path], Path], str]] = {
    "an existing file": (lambda folder, base, adapter: folder / "taken", "exists"),
    "in the base": (lambda folder, base, adapter: base / "a.patch", "is inside the base"),
    "in the adapter": (lambda folder, base, adapter: adapter / "a.patch", "is inside the adapter"),
    "in a missing folder": (lambda folder, base, adapter: folder / "no/a.patch", "does not exist; make it first"),
}


@pytest.mark.parametrize("case", BAD_PATHS)
def test_where_a_patch_cannot_go(
    nf4: Path, lora: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    def no_work(*_: Any, **__: Any) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr(run, "merge", no_work)
    (tmp_path / "taken").write_text("mine")
    path_of, match = BAD_PATHS[case]
    before = [snapshot(folder) for folder in (tmp_path, nf4, lora)]
    ran = cli("--base", nf4, "--adapter", lora, "--target", "nf4", "--patch", path_of(tmp_path, nf4, lora))
    assert ran.code == 2 and match in ran.err, ran.err
    assert [snapshot(folder) for folder in (tmp_path, nf4, lora)] == before


def test_a_base_that_cannot_be_compared(nf4: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before the merge, which would accept it."""
    base = shutil.copytree(nf4, tmp_path / "base")
    (tmp_path / "secret").write_text("mine")
    (base / "notes.txt").symlink_to(tmp_path / "secret")
    before = snapshot(tmp_path)
    with monkeypatch.context() as patched, pytest.raises(CheckpointError, match="a link that leads out"):
        patched.setattr(run, "merge", None)
        direct.merge(recipe(base, lora, patch=str(tmp_path / "a.patch")), False, NoProgress())
    assert snapshot(tmp_path) == before
    run.merge(recipe(base, lora, out=str(tmp_path / "out")))  # the control


# --- room, interruption ----------------------------------------------------------------------------------------------


def test_room_for_the_model_is_checked_first(
    nf4: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "free_bytes", lambda out: 1000)
    with pytest.raises(RoomError, match=r"--patch .*a\.patch temporarily needs disk space for the merged model.* free"):
        direct.merge(recipe(nf4, lora, patch=str(tmp_path / "a.patch")), False, NoProgress())
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("strike", STRIKES, ids=["no-room", "ctrl-c"])
def test_an_interruption_leaves_nothing_behind(
    nf4: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strike: BaseException
) -> None:
    """Interrupt every third sync or rename, in the merge and in the patch, until a run is complete."""
    at = 0
    while True:
        with monkeypatch.context() as patched:
            struck = install(patched, at, strike)
            try:
                direct.merge(
                    recipe(nf4, lora, patch=str(tmp_path / "a.patch"), rounding="nearest"), False, NoProgress()
                )
            except (RoomError, OSError, KeyboardInterrupt) as raised:
                assert isinstance(raised, KeyboardInterrupt) == isinstance(strike, KeyboardInterrupt)
            if not struck():
                break
        assert not any(tmp_path.iterdir()), at
        at += 3
    assert at >= 9 and [path.name for path in tmp_path.iterdir()] == ["a.patch"]


def test_the_message_of_an_interruption(
    nf4: Path, lora: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not offer --resume: there is nothing to resume from."""
    install(monkeypatch, 5, KeyboardInterrupt())
    ran = cli("--base", nf4, "--adapter", lora, "--target", "nf4", "--patch", tmp_path / "a.patch", "--device", "cpu")
    assert ran.code == 130 and isinstance(ran.error, StoppedError)
    assert re.search("Nothing was left behind", ran.err) and "--resume" not in ran.err and not any(tmp_path.iterdir())
