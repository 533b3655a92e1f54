"""Every command that writes, with a fault at every call that changes the disk: errors, a full disk, signals.

    python -m tests.run.faults                       all commands, all faults, all calls; prints a table
    python -m tests.run.faults apply gguf --most 20  two commands, at most 20 calls for each kind of fault

What is checked is in ``Site.check``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import qmerge.demo
from qmerge.checkpoint import journal
from qmerge.errors import DiskError, RoomError, StoppedError

from .. import models
from ..conftest import NF4, SERVER, snapshot
from .saboteur import FULL, Saboteur

DEMO = Path(qmerge.demo.__file__).parent

FAULTS: dict[str, tuple[str | int, int]] = {
    "ENOSPC": ("ENOSPC", RoomError.exit_code),
    FULL: (FULL, RoomError.exit_code),
    "EIO": ("EIO", DiskError.exit_code),
    "EACCES": ("EACCES", DiskError.exit_code),
    "SIGINT": (int(signal.SIGINT), StoppedError.exit_code),
    "SIGTERM": (int(signal.SIGTERM), StoppedError.exit_code),
    "SIGKILL": (int(signal.SIGKILL), -signal.SIGKILL),
}
"""Kind → what the saboteur does, and the exit code that is documented for it."""


@dataclass(frozen=True)
class Scenario:
    """A command that writes.

    arguments  of the command, with the paths of ``Site``
    template   a folder with what must be in the working folder before
    again      further arguments of the run after the fault
    last       the file without which the result does not load
    """

    name: str
    arguments: tuple[str, ...]
    template: str | None = None
    again: tuple[str, ...] = ()
    last: str | None = None


MERGE = ("merge", "--base", "in/base", "--adapter", "in/adapter", "--device", "cpu", "--rounding", "nearest", "-q")
SHARDS = ("--target", "nf4", "--max-shard-size", "90kB", "--out", "work/out")

SCENARIOS = (
    Scenario("merge", (*MERGE, *SHARDS), again=("--resume",), last="out/config.json"),
    Scenario("merge --patch", (*MERGE, "--target", "nf4", "--patch", "work/p.safetensors")),
    Scenario("merge --residual", (*MERGE, "--target", "nf4", "--residual", "2", "--out", "work/out"),
             again=("--resume",), last="out/config.json"),
    Scenario("merge --target q8_0", (*MERGE, "--target", "q8_0", "--out", "work/out"), again=("--resume",)),
    Scenario("merge --shard", (*MERGE, *SHARDS, "--shard", "2/2"), template="part", again=("--resume",)),
    Scenario("finalize", ("finalize", "work/out"), template="parts", last="out/config.json"),
    Scenario("patch", ("patch", "in/base", "in/merged", "--out", "work/p.safetensors")),
    Scenario("apply", ("apply", "in/base", "in/patch.safetensors", "--out", "work/out"), last="out/config.json"),
    Scenario("unmerge", ("unmerge", "in/merged", "in/patch.safetensors", "--out", "work/out"), last="out/config.json"),
    Scenario("extract", ("extract", "in/tuned", "in/dense", "--rank", "2", "--save-modules", "--out", "work/out"),
             last="out/adapter_config.json"),
    Scenario("gguf", ("gguf", "in/dense", "--type", "f16", "--out", "work/m.gguf")),
    Scenario("report", ("report", "work/out"), template="merged"),
    Scenario("verify --text", ("verify", "work/out", "--text", "in/text.txt", "--tokens", "64"), template="merged"),
)  # fmt: skip

UNFINISHED = re.compile(r"(^|/)\.|\.partial$|^tmp(/|$)")
"""Names of files that no loader takes for a model's."""


def run_command(
    site: str, arguments: tuple[str, ...], at: int, fault: str | int, log: str, calls: str | None
) -> None:  # fmt: skip
    """The console command in this (new) process, in the folder ``site``. What it prints goes to the file ``log``."""
    from qmerge.report import make

    with Path(log).open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(site)
    tempfile.tempdir = str(Path(site) / "work" / "tmp")
    # The date and the duration in reports, so that two runs write the same bytes.
    stopped = {
        "datetime": types.SimpleNamespace(now=datetime_of_tests),
        "time": types.SimpleNamespace(monotonic=NoTime),
    }
    vars(make).update(stopped)
    saboteur = Saboteur(Path(site), at, fault)
    saboteur.install()
    from qmerge.cli import main

    sys.argv = ["qmerge", *arguments]
    try:
        main()
    finally:
        if calls:
            saboteur.at = 0
            Path(calls).write_text(json.dumps(saboteur.log))


def datetime_of_tests(zone: Any) -> Any:
    from datetime import datetime

    return datetime(2026, 1, 1, tzinfo=zone)


class NoTime:
    """A clock that stands still: every difference is 0."""

    def __sub__(self, other: float) -> float:
        return 0.0


@dataclass
class Undisturbed:
    """A run without a fault: its calls, and the working folder before and after it."""

    calls: list[str]
    before: dict[str, str]
    after: dict[str, str]


@dataclass
class Site:
    """A folder with inputs (``in``), templates, and the working folder (``work``) in which every run starts anew."""

    path: Path
    known: dict[str, Undisturbed] = field(default_factory=dict)

    def build(self) -> None:
        """Make inputs and templates."""
        inputs = self.path / "in"
        small: dict[str, Any] = {"num_hidden_layers": 1, "vocab_size": 768, "hidden_size": 64, "intermediate_size": 64}
        dense = models.save(models.llama(**small), inputs / "dense")
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copy(DEMO / "base-nf4" / name, dense)
        models.save(models.llama(seed=1, **small), inputs / "tuned")
        base = models.quantize(dense, inputs / "base", **NF4)  # type: ignore[arg-type]
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(DEMO / "base-nf4" / name, base)
        import torch

        models.adapter(models.llama(torch.float32, **small), inputs / "adapter")
        (inputs / "text.txt").write_text((DEMO / "heldout.txt").read_text()[:4000])
        self.prepare(None)
        self.must_run(*MERGE, "--target", "nf4", "--out", "work/out")
        self.keep("merged")
        shutil.copytree(self.path / "work" / "out", inputs / "merged")
        self.must_run("patch", "in/base", "in/merged", "--out", "in/patch.safetensors")
        self.prepare(None)
        self.must_run(*MERGE, *SHARDS, "--shard", "1/2")
        self.keep("part")
        self.must_run(*MERGE, *SHARDS, "--shard", "2/2")
        self.keep("parts")

    def prepare(self, template: str | None) -> None:
        """A new working folder."""
        work = self.path / "work"
        shutil.rmtree(work, ignore_errors=True)
        if template:
            shutil.copytree(self.path / "templates" / template, work)
        (work / "tmp").mkdir(parents=True, exist_ok=True)

    def keep(self, template: str) -> None:
        """Make the working folder a template."""
        shutil.copytree(self.path / "work", self.path / "templates" / template)

    def run(self, *arguments: str, at: int = 0, fault: str | int = 0, calls: bool = False) -> tuple[int, str]:
        """A command in a process of its own → exit code and what it printed."""
        log, calls_file = self.path / "log", self.path / "calls"
        process = SERVER.Process(
            target=run_command,
            args=(str(self.path), arguments, at, fault, str(log), str(calls_file) if calls else None),
        )
        process.start()
        process.join(300)
        if process.exitcode is None:
            process.kill()
            process.join()
            return -1000, "still running after 300 s"
        return process.exitcode, log.read_text(errors="replace")

    def must_run(self, *arguments: str) -> None:
        code, printed = self.run(*arguments)
        assert code == 0, printed

    def contents(self) -> dict[str, str]:
        """Hash of every file in the working folder; of a folder, nothing; of a journal, its lines in any order."""
        work = self.path / "work"
        found = snapshot(work)
        for path in work.rglob("*"):
            name = path.relative_to(work).as_posix()
            if path.is_dir():
                found[f"{name}/"] = ""
            elif path.name.startswith(journal.STEM):  # threads write it
                found[name] = "\n".join(sorted(path.read_text(errors="replace").splitlines()))
        return found

    def undisturbed(self, scenario: Scenario) -> Undisturbed:
        """The run without a fault."""
        if scenario.name not in self.known:
            self.prepare(scenario.template)
            before = self.contents()
            code, printed = self.run(*scenario.arguments, calls=True)
            assert code == 0, printed
            calls = json.loads((self.path / "calls").read_text())
            self.known[scenario.name] = Undisturbed(calls, before, self.contents())
        return self.known[scenario.name]

    def check(self, scenario: Scenario, kind: str, at: int) -> tuple[int, list[str]]:
        """Strike once → the exit code, and everything that is wrong, in words.

        1. No folder loads that is not whole; no file has its final name and other bytes than in the end (or than before).
        2. The inputs are what they were.
        3. The exit code is the documented one, with one line on stderr and no traceback.
        4. The run after it ends with the bytes of an undisturbed run, and leaves nothing else behind.
        """
        expected = self.undisturbed(scenario)
        fault, documented = FAULTS[kind]
        inputs = snapshot(self.path / "in")
        self.prepare(scenario.template)
        code, printed = self.run(*scenario.arguments, at=at, fault=fault)
        wrong = list(self._problems_of_end(code, printed, documented))
        wrong += self._problems_of_files(scenario, expected, is_done=code == 0)
        again, printed_again = self.run(*scenario.arguments, *scenario.again)
        # A command that has done its work before it was struck may refuse to do it again.
        if again != 0 and not (again == 2 and self.contents() == expected.after):
            wrong.append(f"the next run ends with {again}: {last_line(printed_again)}")
        difference = sorted(set(self.contents().items()) ^ set(expected.after.items()))
        if again == 0 and difference:
            wrong.append(f"the next run leaves other files: {sorted({name for name, _ in difference})[:6]}")
        if snapshot(self.path / "in") != inputs:
            wrong.append("an input has changed")
        return code, wrong

    def _problems_of_end(self, code: int, printed: str, documented: int) -> Iterator[str]:
        if code not in (documented, 0):
            yield f"exit code {code} instead of {documented}: {last_line(printed)}"
        if "Traceback" in printed:
            yield f"a traceback: {last_line(printed)}"
        if code not in (0, -signal.SIGKILL):
            lines = [line for line in printed.splitlines() if line.startswith("qmerge: ")]
            if len(lines) != 1 or lines[0] != last_line(printed):
                yield f"no single line at the end: {last_line(printed)}"

    def _problems_of_files(self, scenario: Scenario, expected: Undisturbed, is_done: bool) -> Iterator[str]:
        found = self.contents()
        for name, sha256 in found.items():
            if not UNFINISHED.search(name) and sha256 not in (expected.after.get(name), expected.before.get(name)):
                yield f"{name} has its final name and is not whole"
        whole = {name for name in expected.after if not UNFINISHED.search(name)}
        if scenario.last in found and whole - found.keys():
            yield f"{scenario.last} is there before {sorted(whole - found.keys())[:3]}"
        if is_done and found != expected.after:
            yield f"exit code 0 with other files: {sorted(set(found.items()) ^ set(expected.after.items()))[:3]}"


def last_line(printed: str) -> str:
    lines = printed.strip().splitlines()
    return lines[-1][:300] if lines else "(nothing printed)"


def moments(site: Site, scenario: Scenario, kind: str, most: int | None, seed: int = 0) -> list[int]:
    """Numbers of the calls to strike at: all, or some that differ, with the first and the last."""
    count = len(site.undisturbed(scenario).calls)
    if most is None or count <= most:
        return list(range(1, count + 1))
    numbers = random.Random(f"{seed} {scenario.name} {kind}").sample(range(2, count), max(0, most - 2))
    return sorted([1, *numbers, count])[-most:]


def main() -> None:
    """Print what happened at each fault that was not survived well, then the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commands", nargs="*", help="names of scenarios; default: all")
    parser.add_argument("--most", type=int, help="calls to strike at, for each command and kind of fault; default: all")
    parser.add_argument("--faults", nargs="*", default=list(FAULTS), choices=list(FAULTS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        site = Site(Path(folder))
        site.build()
        rows = []
        for scenario in SCENARIOS:
            if options.commands and scenario.name not in options.commands:
                continue
            for kind in options.faults:
                codes: Counter[int] = Counter()
                failed = 0
                for at in moments(site, scenario, kind, options.most):
                    code, wrong = site.check(scenario, kind, at)
                    codes[code] += 1
                    failed += bool(wrong)
                    for line in wrong:
                        call = site.undisturbed(scenario).calls[at - 1]
                        print(f"{scenario.name}, {kind} at {at} ({call}): {line}", flush=True)
                rows.append((scenario.name, kind, codes, failed))
                print(row_of_table(*rows[-1]), flush=True)
    print("\n| command | fault | injected | right | exit codes |\n|---|---|---|---|---|")
    for row in rows:
        print(row_of_table(*row))
    injected = sum(sum(codes.values()) for _, _, codes, _ in rows)
    print(f"| all | all | {injected} | {injected - sum(failed for *_, failed in rows)} | |")


def row_of_table(name: str, kind: str, codes: Counter[int], failed: int) -> str:
    """A row of the table in docs/reliability.md."""
    count = sum(codes.values())
    ended = ", ".join(f"{number} × {'killed' if code < 0 else code}" for code, number in sorted(codes.items()))
    return f"| `{name}` | {kind} | {count} | {count - failed} | {ended} |"


if __name__ == "__main__":
    main()
