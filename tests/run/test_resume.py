"""Runs that are killed, interrupted, or run out of disk space at any moment: the files that they leave behind, and
``--resume``, which must end with the bytes of an undisturbed run."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import qmerge.demo
from qmerge.calibration import generate
from qmerge.checkpoint.journal import CHECKSUM, Journal, _encoded
from qmerge.checkpoint.journal import NAME as JOURNAL
from qmerge.recipe import make_recipe
from qmerge.report import records
from qmerge.run import destinations
from qmerge.run import merge_model as run_module

from ..conftest import SERVER, Cli, snapshot, timeless
from ..models import edit_json

DEMO = Path(qmerge.demo.__file__).parent
TOKENIZER = {"tokenizer.json": '{"version": "1.0"}', "tokenizer_config.json": "{}", "LICENSE": "Do as you like.\n"}


class Saboteur:
    """Counts the moments at which a run changes the disk, and calls ``strike`` at one of them.

    ``mode``: before the change, half-way through it (where it has a half), or after it.
    """

    def __init__(self, at: int, mode: str, strike: Callable[[], None]) -> None:
        self.at, self.mode, self.strike, self.count = at, mode, strike, 0
        self.log: list[str] = []

    def around(self, label: str, change: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        self.count += 1
        self.log.append(label)
        if self.count != self.at:
            return change()
        if self.mode == "half" and half:
            half()
        result = change() if self.mode == "after" else None
        self.strike()
        return result if self.mode == "after" else change()

    def install(self) -> None:
        pwrite, fsync, replace, unlink = os.pwrite, os.fsync, Path.replace, Path.unlink
        append, hash_file, reserve = Journal._append, records.hash_file, os.posix_fallocate

        def half_line(journal: Journal, line: dict[str, Any]) -> None:
            text = json.dumps(line)
            with journal.path.open("a") as file:
                file.write(text[: len(text) // 2])

        def wrapped_pwrite(fd: int, data: Any, position: int) -> Any:
            halved = bytes(data)[: len(data) // 2]
            return self.around("pwrite", lambda: pwrite(fd, data, position), lambda: pwrite(fd, halved, position))

        def wrapped_append(journal: Journal, line: dict[str, Any], sync: bool = False) -> Any:
            label = f"journal {next(iter(line))}"
            return self.around(label, lambda: append(journal, line, sync), lambda: half_line(journal, line))

        os.pwrite = wrapped_pwrite
        os.fsync = lambda fd: self.around("fsync", lambda: fsync(fd))
        os.posix_fallocate = lambda *a: self.around("reserve", lambda: reserve(*a))  # type: ignore[misc]
        Path.replace = lambda path, to: self.around(f"rename {Path(to).name}", lambda: replace(path, to))  # type: ignore[method-assign, assignment, return-value]
        Path.unlink = lambda path, **o: self.around(f"unlink {path.name}", lambda: unlink(path, **o))  # type: ignore[method-assign, assignment]
        Journal._append = wrapped_append  # type: ignore[method-assign]
        records.hash_file = lambda path: self.around(f"hash {path.name}", lambda: hash_file(path))  # type: ignore[attr-defined]


def merge_in_child(settings: dict[str, Any], resume: bool, at: int, mode: str, number: int, log: Path | None) -> None:
    """One merge; the process sends itself signal ``number`` at moment ``at``."""
    saboteur = Saboteur(at, mode, lambda: os.kill(os.getpid(), number))
    saboteur.install()
    run_module.merge(make_recipe(settings), resume)
    if log:
        log.write_text("\n".join(saboteur.log))


def command_in_child(arguments: list[str], at: int, number: int, log: Path) -> None:
    """The console command, with everything that it prints in a file."""
    from qmerge.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    Saboteur(at, "before", lambda: os.kill(os.getpid(), number)).install()
    sys.argv = ["qmerge", *arguments]
    main()


def child(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    process = SERVER.Process(target=target, args=arguments)
    process.start()
    return process


def finished(process: BaseProcess) -> int:
    process.join(120)
    assert process.exitcode is not None, "still running"
    return process.exitcode


class Job:
    """One merge into several shards, and its undisturbed result."""

    def __init__(self, base: Path, adapter: Path, tmp: Path, target: str, **more: Any) -> None:
        self.base, self.adapter, self.tmp = base, adapter, tmp
        for name, text in TOKENIZER.items():
            (base / name).write_text(text)
        self.settings: dict[str, Any] = {
            "base": str(base), "adapter": str(adapter), "target": target, "max_shard_size": "30kB", "device": "cpu", **more,
        }  # fmt: skip
        whole, log = self.out(), tmp / "log"
        assert finished(child(merge_in_child, {**self.settings, "out": str(whole)}, False, 0, "", 0, log)) == 0
        self.moments = log.read_text().splitlines()
        self.whole = timeless(whole)
        self.hashes = snapshot(whole)
        # Room is asked for the tensors, with a reserve for everything else.
        self.bytes = sum(path.stat().st_size for path in whole.rglob("*.safetensors"))

    def out(self) -> Path:
        """A new folder. It has always the same path, because the recipe in the output names it."""
        shutil.rmtree(self.tmp / "out", ignore_errors=True)
        return self.tmp / "out"

    def killed(self, at: int, mode: str = "before", out: Path | None = None, resume: bool = False) -> Path:
        out = out or self.out()
        settings = {**self.settings, "out": str(out)}
        assert finished(child(merge_in_child, settings, resume, at, mode, int(signal.SIGKILL), None)) == -signal.SIGKILL
        return out

    def resumed(self, out: Path, **changes: Any) -> Path:
        settings = {**self.settings, "out": str(out), **changes}
        assert finished(child(merge_in_child, settings, True, 0, "", 0, None)) == 0
        return out

    def arguments(self, out: Path, *more: str) -> list[str]:
        options = {**self.settings, "out": str(out)}
        texts = [
            (f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])) for name, value in options.items()
        ]
        return [*(text for pair in texts for text in pair), *more]

    def moment(self, label: str, which: int = 0) -> int:
        """The number of the moment with this label."""
        return [n for n, found in enumerate(self.moments, 1) if found == label][which]


def check_unfinished(job: Job, out: Path) -> None:
    """A file with its final name is complete, and the folder loads as a model only when all files are."""
    for path in out.glob("*.safetensors"):
        assert snapshot(out)[path.name] == job.hashes[path.name], f"{path.name} has its name, but is not whole"
        with safe_open(path, "pt") as opened:
            assert opened.keys()
    if (out / "config.json").exists():
        missing = job.whole.keys() - snapshot(out).keys()
        assert not missing, f"config.json is there before {missing}"


@pytest.fixture(scope="module")
def job(nf4: Path, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """NF4 to NF4: copies, kept grids, and texts of unknown length."""
    tmp = tmp_path_factory.mktemp("resume")
    return Job(shutil.copytree(nf4, tmp / "base"), shutil.copytree(lora, tmp / "adapter"), tmp, "nf4")


@pytest.fixture(scope="module")
def fresh_job(nf4: Path, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Another block size and stochastic rounding: fresh grids, seeded noise; several workers."""
    tmp = tmp_path_factory.mktemp("resume-fresh")
    more = {"block_size": 128, "double_quant": True, "rounding": "stochastic", "seed": 7, "workers": 3}
    return Job(shutil.copytree(nf4, tmp / "base"), shutil.copytree(lora, tmp / "adapter"), tmp, "nf4", **more)


def test_there_is_enough_to_interrupt(job: Job) -> None:
    shards = [name for name in job.whole if name.endswith(".safetensors")]
    assert len(shards) >= 3 and "model.safetensors.index.json" in job.whole and "tokenizer.json" in job.whole
    assert JOURNAL not in job.whole and ".qmerge.lock" not in job.whole
    assert job.moments[-1].startswith("unlink")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["before", "half", "after"])
def test_killed_anywhere(job: Job, mode: str) -> None:
    """Random moments, and moments that happen once (renames, finish, clean-up)."""
    numbers = random.Random(mode)
    rare = [label for label in set(job.moments) if job.moments.count(label) == 1 and not label.startswith("hash")]
    chosen = numbers.sample(range(1, len(job.moments) + 1), 8) + [
        job.moment(label) for label in numbers.sample(rare, 6)
    ]
    for at in chosen:
        out = job.killed(at, mode)
        check_unfinished(job, out)
        if (out / JOURNAL).exists() or not (out / "config.json").exists():
            job.resumed(out)
        (out / ".qmerge.lock").unlink(missing_ok=True)  # all that a kill after the last file may leave
        assert timeless(out) == job.whole, f"{mode} {at}: {job.moments[at - 1]}"
        shutil.rmtree(out)


@pytest.mark.slow
def test_killed_again_and_again(job: Job) -> None:
    out = job.killed(job.moment("journal step", 5))
    for at in (10, 16, 22):
        job.killed(at, out=out, resume=True)
        check_unfinished(job, out)
    assert timeless(job.resumed(out)) == job.whole


@pytest.mark.slow
def test_several_workers_are_killed(fresh_job: Job) -> None:
    numbers = random.Random(1)
    for at in numbers.sample(range(len(fresh_job.moments) // 8, len(fresh_job.moments)), 8):
        out = fresh_job.killed(at)
        check_unfinished(fresh_job, out)
        if (out / JOURNAL).exists():
            # Where the work is done may change: the bytes must not.
            fresh_job.resumed(out, workers=1 + at % 2, max_memory="1GB")
        (out / ".qmerge.lock").unlink(missing_ok=True)
        assert timeless(out) == fresh_job.whole, at


def test_killed_while_inputs_are_hashed(job: Job) -> None:
    """For a large model this stage takes minutes, and nothing was written yet: both ways to go on must work."""
    at = job.moment("hash adapter_model.safetensors")
    assert timeless(job.resumed(job.killed(at))) == job.whole


def test_killed_while_inputs_are_hashed_starts_again_without_resume(job: Job, cli: Cli) -> None:
    out = job.killed(job.moment("hash adapter_model.safetensors"))
    ran = cli(*job.arguments(out))
    assert ran.code == 0, ran.err
    assert timeless(out) == job.whole


def test_done_steps_are_not_done_again(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    out = job.killed(job.moment("journal step", -1))
    done: list[str] = []
    real = destinations.run_step

    def counted(step: Any, *rest: Any) -> Any:
        done.append(step.name)
        return real(step, *rest)

    monkeypatch.setattr(destinations, "run_step", counted)
    run_module.merge(make_recipe({**job.settings, "out": str(out)}), resume=True)
    assert len(done) == 1
    assert timeless(out) == job.whole


@pytest.mark.parametrize("where", ["partial", "published"])
def test_spoiled_bytes_are_found_and_written_again(job: Job, where: str) -> None:
    """A journal line says that a step is done; the bytes on the disk decide."""
    out = job.killed(job.moment("journal step", -1))
    path = next(iter(sorted(out.glob("*.partial" if where == "partial" else "*.safetensors"))))
    for offset in range(0, path.stat().st_size, path.stat().st_size // 7):
        with path.open("r+b") as file:
            file.seek(offset)
            old = file.read(1)
            file.seek(offset)
            file.write(bytes([old[0] ^ 0xFF]))
    assert timeless(job.resumed(out)) == job.whole


def test_a_shard_that_was_cut_short_is_written_again(job: Job) -> None:
    out = job.killed(job.moment("journal step", -1))
    path = sorted(out.glob("*.safetensors"))[0]
    os.truncate(path, 100)
    assert timeless(job.resumed(out)) == job.whole


def test_a_shard_that_is_gone_is_written_again(job: Job) -> None:
    out = job.killed(job.moment("journal step", -1))
    sorted(out.glob("*.safetensors"))[0].unlink()
    assert timeless(job.resumed(out)) == job.whole


@pytest.mark.parametrize(
    "spoiled", [b"\x00" * 4096 + b"\n", b'{"step": "x"}\n', b"no json\n", b"[1]\n", b'{"step": "x", "sha']
)
def test_a_spoiled_journal_costs_work_but_no_bytes(job: Job, spoiled: bytes, cli: Cli) -> None:
    """After a power cut a journal may end in zeros. Whatever it contains, the result is right or the error is clear."""
    out = job.killed(job.moment("journal step", -1))
    with (out / JOURNAL).open("ab") as file:
        file.write(spoiled)
    ran = cli(*job.arguments(out, "--resume"))
    assert ran.code in (0, 2), ran.err
    if ran.code == 0:
        assert timeless(out) == job.whole
    else:
        assert JOURNAL in ran.err


def test_a_journal_whose_first_line_is_cut(job: Job) -> None:
    out = job.killed(job.moment("journal step", -1))
    whole = (out / JOURNAL).read_bytes()
    (out / JOURNAL).write_bytes(whole[: whole.index(b"\n") // 2])
    assert timeless(job.resumed(out)) == job.whole


def test_a_journal_that_was_not_begun(job: Job, cli: Cli) -> None:
    """Killed while its first line was written: both ways to go on work."""
    for more in ([], ["--resume"]):
        out = job.out()
        out.mkdir()
        (out / f"{JOURNAL}.partial").write_text('{"run"')
        ran = cli(*job.arguments(out, *more))
        assert ran.code == 0, ran.err
        assert timeless(out) == job.whole


@pytest.mark.parametrize("damage", ["quant_state", "outcome", "name", "half"])
def test_a_damaged_line_is_done_again(job: Job, damage: str) -> None:
    """What only the journal holds (bitsandbytes' quant_state, what was measured) is not taken from a line with another
    checksum."""
    out = job.killed(job.moment("journal step", -1))
    lines = (out / JOURNAL).read_text().splitlines()
    number = next(n for n, line in enumerate(lines) if '"outcome": {' in line)
    line = json.loads(lines[number])
    if damage == "quant_state":
        line["texts"] = {name: text.replace("64", "128") for name, text in line["texts"].items()}
    elif damage == "outcome":
        line["outcome"] = {**line["outcome"], "kept": 0.5}
    elif damage == "name":
        line["step"] = 7
    lines[number] = lines[number][:200] if damage == "half" else json.dumps(line)
    (out / JOURNAL).write_text("\n".join(lines) + "\n")
    assert timeless(job.resumed(out)) == job.whole


def test_a_default_run_goes_on_when_less_memory_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter model writes the same text, whether it fits into memory or not."""
    settings = {"base": str(DEMO / "base-nf4"), "adapter": str(DEMO / "adapter"), "target": "nf4", "device": "cpu"}
    settings |= {"rounding": "preserve", "calibration_tokens": 768, "sequence_length": 96, "out": str(tmp_path / "out")}
    run_module.merge(make_recipe(settings))
    undisturbed = timeless(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Journal, "file_done", _interrupted)
        run_module.merge(make_recipe(settings))
    monkeypatch.setattr(generate, "fits_whole", lambda *_: False)
    run_module.merge(make_recipe(settings), resume=True)
    assert timeless(tmp_path / "out") == undisturbed


def _interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


# --- what must be the same -------------------------------------------------------------------------------------------


@pytest.fixture
def unfinished(job: Job, tmp_path: Path) -> tuple[Job, Path]:
    """A killed run whose inputs may be changed."""
    copy = object.__new__(Job)
    copy.__dict__.update(job.__dict__, base=shutil.copytree(job.base, tmp_path / "base"), tmp=tmp_path)
    copy.adapter = shutil.copytree(job.adapter, tmp_path / "adapter")
    copy.settings = {**job.settings, "base": str(copy.base), "adapter": str(copy.adapter)}
    return copy, copy.killed(len(job.moments) // 2)


def journal_says(out: Path, **changes: Any) -> None:
    lines = (out / JOURNAL).read_text().splitlines()
    first = json.loads(lines[0])
    first.pop(CHECKSUM)
    first["run"].update(changes)
    (out / JOURNAL).write_text("\n".join([_encoded(first).decode().rstrip(), *lines[1:]]) + "\n")


def touch_weight(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8 + int.from_bytes(data[:8], "little")] ^= 1  # the lowest bit of the first scale
    path.write_bytes(data)


CHANGES: dict[str, tuple[Callable[[Job, Path], object], tuple[str, ...], tuple[str, ...]]] = {
    "base": (lambda job, out: touch_weight(job.base), (), ("input base model.safetensors",)),
    "adapter": (
        lambda job, out: edit_json(job.adapter / "adapter_config.json", lora_alpha=9),
        (),
        ("adapter_config.json",),
    ),
    "config": (lambda job, out: edit_json(job.base / "config.json", rope_theta=5), (), ("input base config.json",)),
    "seed": (lambda job, out: None, ("--seed", "3"), ("recipe seed", "0", "3")),
    "rounding": (lambda job, out: None, ("--rounding", "stochastic"), ("recipe rounding", "auto", "stochastic")),
    "target": (lambda job, out: None, ("--target", "bf16"), ("target", "nf4", "bf16")),
    "shards": (lambda job, out: None, ("--max-shard-size", "1GB"), ("max_shard_size", "30kB", "1GB")),
    "version": (lambda job, out: journal_says(out, qmerge="0.0.1"), (), ("qmerge", "0.0.1")),
    "torch": (lambda job, out: journal_says(out, torch="2.0"), (), ("torch", "2.0")),
    "device": (lambda job, out: journal_says(out, device="cuda"), (), ("device", "cuda", "cpu")),
}


@pytest.mark.parametrize("name", CHANGES)
def test_resume_refuses_what_has_changed(unfinished: tuple[Job, Path], name: str, cli: Cli) -> None:
    job, out = unfinished
    change, arguments, words = CHANGES[name]
    change(job, out)
    before = snapshot(out)
    ran = cli(*job.arguments(out, "--resume", *arguments))
    assert ran.code == 2, ran.err
    last = ran.err.splitlines()[-1]
    assert last.startswith("qmerge: --resume: ") and not [word for word in words if word not in last], last
    before.pop(".qmerge.lock", None)  # which the killed run left
    assert snapshot(out) == before


def test_resume_goes_on_where_nothing_has_changed(unfinished: tuple[Job, Path], cli: Cli) -> None:
    """The control of the refusals above."""
    job, out = unfinished
    ran = cli(*job.arguments(out, "--resume", "--workers", "2", "--max-memory", "1GB"))
    assert ran.code == 0, ran.err


def test_unfinished_run_without_resume(unfinished: tuple[Job, Path], cli: Cli) -> None:
    job, out = unfinished
    before = snapshot(out)
    ran = cli(*job.arguments(out))
    assert ran.code == 2 and "unfinished run" in ran.err and "--resume" in ran.err
    before.pop(".qmerge.lock", None)  # which the killed run left
    after = snapshot(out)
    after.pop(".qmerge.lock", None)
    assert after == before


@pytest.mark.parametrize("exists", [True, False])
def test_resume_of_nothing_starts(job: Job, cli: Cli, exists: bool) -> None:
    out = job.out()
    if exists:
        out.mkdir()
    assert cli(*job.arguments(out, "--resume")).code == 0
    assert timeless(out) == job.whole


# --- interrupted, full, busy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("label", ["hash model.safetensors", "pwrite", "journal step", "rename config.json"])
def test_interrupted(job: Job, number: int, label: str) -> None:
    out, log = job.out(), job.tmp / "interrupted.log"
    at = job.moment(label, -1)
    assert finished(child(command_in_child, job.arguments(out), at, int(number), log)) == 130, log.read_text()
    assert "--resume" in log.read_text() and "Traceback" not in log.read_text(), log.read_text()
    check_unfinished(job, out)
    assert not (out / ".qmerge.lock").exists() and not (out / "config.json").exists()
    assert timeless(job.resumed(out)) == job.whole


def test_interrupted_with_several_workers(fresh_job: Job) -> None:
    out, log = fresh_job.out(), fresh_job.tmp / "interrupted.log"
    at = fresh_job.moment("journal step", 5)
    assert finished(child(command_in_child, fresh_job.arguments(out), at, int(signal.SIGINT), log)) == 130, (
        log.read_text()
    )
    assert "--resume" in log.read_text() and "Traceback" not in log.read_text(), log.read_text()
    assert timeless(fresh_job.resumed(out)) == fresh_job.whole


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("at", [1, 40, -1])
def test_no_room_in_the_middle(job: Job, cli: Cli, monkeypatch: pytest.MonkeyPatch, at: int, code: int) -> None:
    out, calls, real = job.out(), [0], os.pwrite
    at = at if at > 0 else job.moments.count("pwrite")

    def full(*arguments: Any) -> int:
        calls[0] += 1
        if calls[0] >= at:
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        ran = cli(*job.arguments(out))
    assert ran.code == 6, ran.err
    last = ran.err.splitlines()[-1]
    assert last.startswith("qmerge: no room left in") and "--resume" in last, last
    check_unfinished(job, out)
    again = cli(*job.arguments(out, "--resume"))
    assert again.code == 0, again.err
    assert timeless(out) == job.whole


def test_no_room_for_a_shard(job: Job, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disk space is reserved before the work on a shard begins."""

    def full(*arguments: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = job.out()
    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        assert cli(*job.arguments(out)).code == 6
    assert cli(*job.arguments(out, "--resume")).code == 0
    assert timeless(out) == job.whole


def test_resume_needs_space_for_missing_bytes_only(job: Job, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run needs space only for the bytes that are missing."""
    out = job.killed(job.moment("journal step", -1))
    there = sum(path.stat().st_size for path in out.iterdir() if ".safetensors" in path.name)
    usage = shutil._ntuple_diskusage(10**12, 10**12, 64 * 2**20 + job.bytes - there)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert cli(*job.arguments(out, "--resume")).code == 0
    assert cli(*job.arguments(job.out())).code == 6  # the control: from nothing it does not fit


def test_a_second_run_in_the_same_folder_is_refused(job: Job, cli: Cli) -> None:
    """While the first one lives (here: is stopped in the middle), with and without --resume."""
    out = job.out()
    settings, at = {**job.settings, "out": str(out)}, job.moment("journal step", 10)
    first = child(merge_in_child, settings, False, at, "before", int(signal.SIGSTOP), None)
    deadline = time.monotonic() + 60
    while _state(first) != "T" and time.monotonic() < deadline:
        time.sleep(0.02)
    before = snapshot(out)
    refused = [cli(*job.arguments(out, *more)) for more in (["--resume"], [])]
    after = snapshot(out)
    assert first.pid
    os.kill(first.pid, signal.SIGCONT)
    assert finished(first) == 0
    assert after == before
    for ran in refused:
        assert ran.code == 2 and "another qmerge is writing to it" in ran.err, ran.err
    assert timeless(out) == job.whole


def _state(process: BaseProcess) -> str:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]


# --- inputs that change while they are read --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", ["overwritten", "overwritten with its time kept", "removed", "touched", "replaced by itself"]
)
def test_inputs_that_change(
    nf4: Path, lora: Path, tmp_path: Path, cli: Cli, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base that is overwritten after it was hashed would be merged in part, with the old hash in the report."""
    base, out = shutil.copytree(nf4, tmp_path / "base"), tmp_path / "out"
    weights = base / "model.safetensors"
    before, times = weights.read_bytes(), weights.stat()
    real = destinations.run_step
    done: list[str] = []

    def changing(step: Any, *rest: Any) -> Any:
        done.append(step.name)
        if len(done) == 3:
            if change.startswith("overwritten"):
                with weights.open("r+b") as file:
                    file.seek(-2000, os.SEEK_END)
                    file.write(os.urandom(2000))
            if change == "overwritten with its time kept":
                os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
            if change == "removed":
                weights.unlink()
            if change == "touched":
                weights.touch()
            if change == "replaced by itself":
                shutil.copy(weights, base / "copy")
                (base / "copy").replace(weights)
        return real(step, *rest)

    monkeypatch.setattr(destinations, "run_step", changing)
    ran = cli("--base", base, "--adapter", lora, "--target", "nf4", "--out", out, "--rounding", "nearest")
    if change in ("touched", "replaced by itself"):
        assert ran.code == 0 and weights.read_bytes() == before, ran.err
        return
    assert ran.code == 3 and "model.safetensors" in ran.err.splitlines()[-1], ran.err
    assert not out.exists(), "nothing is left"


def test_resume_of_a_finished_run(job: Job, cli: Cli) -> None:
    """Interrupted when nothing but a lock was left to be removed."""
    out = job.killed(len(job.moments))
    assert (out / ".qmerge.lock").exists()
    ran = cli(*job.arguments(out, "--resume"))
    assert ran.code == 0 and "complete already" in ran.err, ran.err
    assert timeless(out) == job.whole and not (out / ".qmerge.lock").exists()
    other = cli(*job.arguments(out, "--resume", "--seed", "3"))
    assert other.code == 2, "the control: another recipe"
