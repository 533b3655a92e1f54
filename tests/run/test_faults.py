"""Faults of the disk and signals, anywhere in every command that writes: see ``faults.py``, which also runs all of them."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from qmerge.checkpoint import at_once, folder
from qmerge.checkpoint.journal import NAME as JOURNAL
from qmerge.cli import program
from qmerge.errors import RecipeError
from qmerge.gguf import export
from qmerge.patch import direct, restore
from qmerge.patch import file as patch_file

from ..conftest import Cli, snapshot
from .faults import FAULTS, MERGE, SCENARIOS, SHARDS, Scenario, Site, Undisturbed, moments
from .saboteur import FULL, Saboteur

WRITING = [scenario for scenario in SCENARIOS if scenario.name != "verify --text"]
NAMES = [scenario.name for scenario in WRITING]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    made = Site(tmp_path_factory.mktemp("faults"))
    made.build()
    return made


@pytest.mark.parametrize("scenario", WRITING, ids=NAMES)
def test_a_few_faults(site: Site, scenario: Scenario) -> None:
    chosen = random.Random(scenario.name).sample(list(FAULTS), 2)
    problems_at(site, scenario, chosen, most=1)


MORE = random.Random(0).sample([(scenario, kind) for scenario in WRITING for kind in FAULTS], 16)
"""A sample: each fault takes seconds. ``python -m tests.run.faults`` makes all of them."""


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "kind"), MORE, ids=[f"{scenario.name}-{kind}" for scenario, kind in MORE])
def test_more_faults(site: Site, scenario: Scenario, kind: str) -> None:
    problems_at(site, scenario, [kind], most=2)


def problems_at(site: Site, scenario: Scenario, kinds: list[str], most: int) -> None:
    wrong = []
    for kind in kinds:
        for at in moments(site, scenario, kind, most, seed=1):
            call = site.undisturbed(scenario).calls[at - 1]
            wrong += [f"{kind} at {at} ({call}): {line}" for line in site.check(scenario, kind, at)[1]]
    assert not wrong, "\n".join(wrong)


def test_verify_writes_nothing(site: Site) -> None:
    assert site.undisturbed(SCENARIOS[-1]).calls == []


# --- the checks and the saboteur -------------------------------------------------------------------------------------


def test_problems_are_found(tmp_path: Path) -> None:
    """The control: each kind of damage is a problem."""
    site = Site(tmp_path)
    site.prepare(None)
    out = tmp_path / "work" / "out"
    out.mkdir()
    for name in ("config.json", "model.safetensors"):
        (out / name).write_bytes(b"whole")
    expected = Undisturbed([], {}, site.contents())
    scenario = Scenario("x", (), last="out/config.json")

    def problems(is_done: bool = False) -> str:
        return "; ".join(site._problems_of_files(scenario, expected, is_done))

    assert problems() == problems(is_done=True) == ""
    (out / "model.safetensors.partial").write_bytes(b"half")
    assert problems() == "" and "exit code 0 with other files" in problems(is_done=True)
    (out / "model.safetensors").write_bytes(b"half")
    assert "is not whole" in problems()
    (out / "model.safetensors").unlink()
    assert "config.json is there before" in problems()
    for code, printed in ((1, "qmerge: no"), (6, "Traceback\nqmerge: no"), (6, "no line"), (6, "qmerge: a\nqmerge: b")):
        assert list(site._problems_of_end(code, printed, 6))
    assert not list(site._problems_of_end(6, "a warning\nqmerge: no room", 6))


CHANGES: dict[str, Callable[[Path], object]] = {
    "os.open": lambda path: os.close(os.open(path / "new", os.O_WRONLY | os.O_CREAT)),
    "open": lambda path: (path / "new").open("w").close(),
    "write_text": lambda path: (path / "old").write_text("x"),
    "append": lambda path: (path / "old").open("ab").close(),
    "mkdir": lambda path: (path / "new").mkdir(),
    "unlink": lambda path: (path / "old").unlink(),
    "replace": lambda path: (path / "old").replace(path / "new"),
    "rename": lambda path: (path / "old").rename(path / "new"),
    "link": lambda path: (path / "new").hardlink_to(path / "old"),
    "symlink": lambda path: (path / "new").symlink_to(path / "old"),
    "rmtree": lambda path: shutil.rmtree(path / "folder"),
    "copy": lambda path: shutil.copyfile(path / "old", path / "new"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_saboteur_sees_every_change(name: str, tmp_path: Path, restored_os: None) -> None:
    (tmp_path / "old").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inner").write_text("x")
    before = snapshot(tmp_path)
    saboteur = Saboteur(tmp_path, 1, "EIO")
    saboteur.install()
    with pytest.raises(OSError) as raised:
        CHANGES[name](tmp_path)
    assert raised.value.errno == errno.EIO and len(saboteur.log) >= 1
    assert snapshot(tmp_path) == before


def test_a_full_disk_stays_full(tmp_path: Path, restored_os: None) -> None:
    (tmp_path / "old").write_text("old")
    Saboteur(tmp_path, 2, FULL).install()
    (tmp_path / "new").mkdir()
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            (tmp_path / "file").write_text("x")
    (tmp_path / "old").unlink()  # which needs no space


@pytest.fixture
def restored_os(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the saboteur wraps is as before afterwards."""
    import builtins
    import io

    from .saboteur import ON_DESCRIPTORS, ON_PATHS, ON_TWO_PATHS

    for name in ("open", *ON_DESCRIPTORS, *ON_PATHS, *ON_TWO_PATHS):
        monkeypatch.setattr(os, name, getattr(os, name))
    monkeypatch.setattr(io, "open", io.open)
    monkeypatch.setattr(builtins, "open", builtins.open)


@pytest.mark.parametrize("handler", [program._interrupt, signal.default_int_handler])
def test_a_thread_that_starts_is_not_interrupted(handler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool would not know of it, and the process would wait for it for ever. The control: Python's own handler."""
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        os.kill(os.getpid(), signal.SIGINT)

    previous = signal.signal(signal.SIGINT, handler)
    pool = ThreadPoolExecutor(1)
    try:
        monkeypatch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.submit(int)
            time.sleep(5)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert len(pool._threads) == (handler is program._interrupt)
    pool._work_queue.put(None)  # type: ignore[arg-type]  # ends the thread of the control, too
    pool.shutdown()


# --- links -----------------------------------------------------------------------------------------------------------

PLANTED = {
    "patch": ("patch", "p.safetensors.partial"),
    "gguf": ("gguf", "m.gguf.partial"),
    "report": ("report", "out/qmerge.html.partial"),
    "merge, journal": ("merge", f"out/{JOURNAL}.partial"),
    "merge, lock": ("merge", "out/.qmerge.lock"),
    "merge, file": ("merge", "out/model.safetensors.partial"),
    "apply, lock": ("apply", "out/.qmerge.lock"),
    "apply, file": ("apply", "out/model.safetensors.partial"),
    "extract, file": ("extract", "out/adapter_model.safetensors.factors.partial"),
    "extract, with a lock": ("extract", "out/adapter_model.safetensors.factors.partial"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_planted_links_are_not_followed(site: Site, case: str) -> None:
    """A link at a temporary name is replaced, or refused; the file that it names stays as it is."""
    command, name = PLANTED[case]
    scenario = next(scenario for scenario in SCENARIOS if scenario.name == command)
    site.prepare(scenario.template)
    victim = site.path / "victim"
    victim.write_text("mine")
    link = site.path / "work" / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(victim)
    if case == "extract, with a lock":
        (link.parent / ".qmerge.lock").touch()
    code, printed = site.run(*scenario.arguments)
    assert code in (0, 2, 7) and "Traceback" not in printed, printed
    assert victim.read_text() == "mine"


def test_another_folder_is_not_cleaned(tmp_path: Path) -> None:
    """Only what a killed run of the same command has left may be removed."""
    for extra in ("mine.txt", "config.json", JOURNAL):
        out = tmp_path / extra
        out.mkdir()
        for name in (extra, ".qmerge.lock", "model.safetensors", "model.safetensors.partial"):
            (out / name).write_text("x")
        before = set(snapshot(out)) - {".qmerge.lock"}
        with pytest.raises(RecipeError, match=r"not empty|unfinished"):
            at_once.check_new(out, {}, ["config.json", "model.safetensors"], "config.json")
        assert set(snapshot(out)) - {".qmerge.lock"} == before


def test_only_hidden_folders_of_killed_runs_are_removed(tmp_path: Path) -> None:
    file = tmp_path / "p.safetensors"
    kept = (
        ".p.safetensors-original/p",
        ".p.safetensors-abcdefgh/p",
        ".p.safetensors-ab/p",
        ".p.safetensors-12345678/q",
    )
    left = (".p.safetensors-abcd_123/p", ".p.safetensors-abcd_124")
    for name in (*kept, *left):
        (tmp_path / name).mkdir(parents=True)
    for name in (".p.safetensors-12345678", ".p.safetensors-ab", ".p.safetensors-abcd_123"):
        (tmp_path / name / ".qmerge.lock").touch()
    direct.remove_hidden_folders(file)
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob(".p*/*") if path.is_dir()} == set(kept)
    assert not [name for name in left if (tmp_path / name).exists()]


# --- real disks ------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(site: Site) -> Iterator[Path]:
    """A file system of its own in the working folder, too small for anything."""
    site.prepare(None)
    place = site.path / "work" / "disk"
    place.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", place], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as cause:
        pytest.skip(f"no file system can be mounted here: {cause}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)  # a failed run's files may be open until they are collected


COMMANDS = {
    "merge": ((*MERGE, *SHARDS), ("--resume",)),
    "patch": (("patch", "in/base", "in/merged", "--out", "work/p.safetensors"), ()),
    "apply": (("apply", "in/base", "in/patch.safetensors", "--out", "work/out"), ()),
    "extract": (("extract", "in/tuned", "in/dense", "--rank", "2", "--out", "work/out"), ()),
    "gguf": (("gguf", "in/dense", "--type", "f16", "--out", "work/m.gguf"), ()),
}


@pytest.mark.parametrize("limit", ["size=12k", "size=160k", "nr_inodes=1", "nr_inodes=3"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_disk_that_is_really_full(
    site: Site, disk: Path, command: str, limit: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tmpfs without room, or without inodes; then it gets both."""
    arguments, again = COMMANDS[command]
    arguments = tuple(argument.replace("work/", "work/disk/") for argument in arguments)
    monkeypatch.chdir(site.path)
    for module in (folder, export, restore):  # a run that is refused before it begins would test nothing
        monkeypatch.setattr(module, "check_room", lambda *_: None)
    for module in (folder, patch_file):
        monkeypatch.setattr(module, "free_bytes", lambda _: 10**12)
    remount(disk, limit if limit.startswith("size") else f"size=40m,{limit}")
    ran = cli(*arguments)
    assert ran.code == 6 or (limit in ("size=160k", "nr_inodes=3") and ran.code == 0), (ran.code, ran.err)
    if ran.code == 6:
        assert ran.err.splitlines()[-1].startswith("qmerge: ") and "Traceback" not in ran.err
        remount(disk, "size=40m,nr_inodes=1000")
        ran = cli(*arguments, *again)
        assert ran.code == 0, ran.err
    assert not [path for path in disk.rglob("*") if path.name.startswith(".") or path.name.endswith(".partial")]


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True, capture_output=True)
