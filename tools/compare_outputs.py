"""Compare the outputs of two versions of qmerge: weights byte for byte, reports number by number, wording ignored.

    python tools/compare_outputs.py snapshot TREE OUTDIR [--only PATTERN]   run every command with the code in TREE
    python tools/compare_outputs.py diff DIR_A DIR_B [--prose]              exit code 1 when two snapshots differ
    python tools/compare_outputs.py check DIR                               control: diff must notice every damage
    python tools/compare_outputs.py list                                    the commands

``diff`` also takes --only PATTERN, and --renamed OLD=NEW for a plug-in that has another name.

A snapshot runs about 115 commands on the demo model that ships with the package: merges into many formats, patches, reports as
JSON, and inputs that must be refused. It takes four to five minutes on an idle core. ``--only 'nf4-*'`` runs some of them,
``--python`` chooses the interpreter.

Compared exactly:

- exit codes, the names of all files that a command left, and the number of warnings and errors on stderr
- every file, byte for byte, except the ones named below (safetensors, GGUF, tokenizers, configs, recipes)
- JSON (qmerge.json, ``--json`` on stdout, the manifest of a patch): keys, numbers and strings, without times, versions, free
  disk space and free text (warnings, reasons, help lines). Numbers are compared as they are written. The length of a list of
  warnings counts.
- ``--help``: the names of all options
- tables: the numbers in every row on the terminal, of the model card (README.md) and of qmerge.html, with its drawings
- a patch (its bytes contain a time): everything else in its manifest; ``apply`` restores the folder, which is compared

Numbers in prose (warnings, sentences of the card, messages on stderr) are reported as ``note`` and count as a difference with
``--prose`` only, because a better sentence may well name other numbers.

Commands run in one folder with relative paths, so that recipes and reports of two snapshots name the same paths.
"""

from __future__ import annotations

import argparse
import array
import fnmatch
import hashlib
import html.parser
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# --- the commands ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One command. ``{out}`` in an argument is this run's output; ``runs/NAME/out`` is that of an earlier run."""

    name: str
    arguments: tuple[str, ...]
    code: int = 0  # what a sane version exits with; only reported, the comparison is between snapshots


BASE = ("--base", "inputs/base-nf4")
ADAPTER = ("--adapter", "inputs/adapter")
BOTH = (*BASE, *ADAPTER)
TEXT = ("--calibration", "inputs/calibration.txt", "--calibration-tokens", "2048", "--sequence-length", "256")
FEW = ("--calibration-tokens", "1024", "--sequence-length", "256")
NEAREST = ("--rounding", "nearest")
PRESERVE = ("--rounding", "preserve")
TWO = (*BASE, "--adapter", "inputs/adapter=0.7", "--adapter", "inputs/adapter-2=0.3")
ZERO = (*BASE, "--adapter", "inputs/adapter-zero")
OUT = ("--out", "{out}")


def merge(name: str, target: str, *arguments: str, inputs: tuple[str, ...] = BOTH, code: int = 0) -> Run:
    """A merge into the folder ``runs/NAME/out``."""
    return Run(name, (*inputs, "--target", target, *arguments, *OUT), code)


MERGES = (
    merge("nf4-nearest", "nf4", *NEAREST),
    merge("nf4-stochastic", "nf4", "--rounding", "stochastic", "--seed", "3"),
    merge("nf4-preserve-text", "nf4", *PRESERVE, *TEXT),
    merge("nf4-preserve-random", "nf4", *PRESERVE, "--calibration", "random", *FEW, "--seed", "5"),
    merge("nf4-preserve-none", "nf4", *PRESERVE, "--calibration", "none"),
    merge("nf4-preserve-parallel", "nf4", *PRESERVE, *TEXT[:2], *FEW, "--no-sequential"),
    merge("nf4-auto-rounding", "nf4", *FEW),
    merge("nf4-fresh-nearest", "nf4", "--scales", "fresh", *NEAREST),
    merge("nf4-double-quant", "nf4", "--double-quant", "--block-size", "128", *NEAREST),
    merge("fp4-nearest", "fp4", *NEAREST),
    merge("gptq-preserve-text", "gptq", *PRESERVE, *TEXT),
    merge("gptq-act-order", "gptq", *PRESERVE, *TEXT[:2], *FEW, "--act-order", "--bits", "8", "--group-size", "64"),
    merge("gptq-asymmetric", "gptq", *NEAREST, "--no-sym", "--bits", "3", "--checkpoint-format", "gptq_v2"),
    merge("awq-preserve", "awq", *PRESERVE, *TEXT[:2], *FEW),
    merge("int8-nearest", "int8", *NEAREST),
    merge("w4a16-preserve", "w4a16", *PRESERVE, *FEW),
    merge("w8a16-nearest", "w8a16", *NEAREST),
    merge("w8a8-nearest", "w8a8", *NEAREST),
    merge("fp8-nearest", "fp8", *NEAREST),
    merge("nvfp4-nearest", "nvfp4", *NEAREST),
    merge("mxfp4a16-nearest", "mxfp4a16", *NEAREST),
    merge("bf16", "bf16"),
    merge("fp32", "fp32"),
    merge("bf16-shards", "bf16", "--max-shard-size", "500kB", "--workers", "2", "--max-memory", "10MB"),
    merge("auto-target", "auto", "--max-size", "3MB", *FEW),
    merge("fp16-ties", "fp16", "--combine", "ties", "--density", "0.5", inputs=TWO),
    merge("fp16-linear", "fp16", inputs=TWO),
    merge("nf4-dare", "nf4", "--combine", "dare_ties", "--density", "0.5", "--seed", "7", *NEAREST, inputs=TWO),
    merge("bf16-chain", "bf16", "--combine", "chain", inputs=(*BOTH, "--adapter", "inputs/adapter-2")),
    merge("nf4-residual", "nf4", *PRESERVE, *TEXT[:2], *FEW, "--residual", "4"),
    merge("nf4-promote", "nf4", *PRESERVE, *TEXT[:2], *FEW, "--promote", "1MB"),
    merge("nf4-verify", "nf4", *NEAREST, "--verify", "inputs/heldout.txt"),
    merge("base-gptq", "gptq", *NEAREST, inputs=ZERO),
    merge("base-int8", "int8", *NEAREST, inputs=ZERO),
    merge("base-bf16", "bf16", inputs=ZERO),
    merge("gptq-to-gptq", "gptq", *PRESERVE, *TEXT[:2], *FEW, inputs=("--base", "runs/base-gptq/out", *ADAPTER)),
    merge("int8-to-int8", "int8", *NEAREST, inputs=("--base", "runs/base-int8/out", *ADAPTER)),
    merge("trained-on-nf4", "bf16", "--trained-on", "nf4-dq", inputs=("--base", "runs/base-bf16/out", *ADAPTER)),
    merge("onto-original", "nf4", "--original", "runs/base-bf16/out", "--merge-onto", "original", *NEAREST),
    Run("recipe", ("run", "inputs/recipe.yaml", "--seed", "9", *OUT)),
    Run("nf4-patch", (*BOTH, "--target", "nf4", *NEAREST, "--patch", "{out}.patch")),
)

FOLDERS = (
    Run("patch", ("patch", "inputs/base-nf4", "runs/nf4-preserve-text/out", "--out", "{out}.patch", "--json")),
    Run(
        "patch-one-way", ("patch", "inputs/base-nf4", "runs/nf4-fresh-nearest/out", "--one-way", "--out", "{out}.patch")
    ),
    Run("apply", ("apply", "inputs/base-nf4", "runs/nf4-patch/out.patch", *OUT, "--json")),
    Run("unmerge", ("unmerge", "runs/nf4-preserve-text/out", "runs/patch/out.patch", *OUT)),
    Run("extract", ("extract", "runs/fp32/out", "inputs/base-nf4", "--rank", "8", *OUT, "--json")),
    Run(
        "extract-energy",
        ("extract", "runs/int8-nearest/out", "inputs/base-nf4", "--energy", "0.9", "--save-modules", *OUT),
    ),
    Run("gguf", ("gguf", "runs/fp16-linear/out", "--type", "q8_0", "--out", "{out}.gguf", "--json", "--pre", "gpt-2")),
    Run("report", ("report", "runs/fp16-ties/out", "--html", "{out}.html")),
    Run("verify", ("verify", "runs/nf4-nearest/out", "--json")),
    Run(
        "verify-text",
        ("verify", "runs/bf16/out", "--no-reload", "--text", "inputs/heldout.txt", "--tokens", "2048", "--json"),
    ),
)

COMMANDS = (
    "run",
    "plan",
    "measure",
    "inspect",
    "verify",
    "report",
    "patch",
    "apply",
    "unmerge",
    "extract",
    "gguf",
    "formats",
    "demo",
)

HELP = (Run("help", ("--help",)), *(Run(f"help-{name}", (name, "--help")) for name in COMMANDS))

JSONS = (
    Run("version", ("--version",)),
    Run("formats", ("formats", "--json")),
    Run("plan", ("plan", *BOTH, "--json")),
    Run("plan-nf4", ("plan", *BOTH, "--target", "nf4", "--json")),
    Run("plan-auto", ("plan", *BOTH, "--target", "auto", "--max-size", "3MB", "--json")),
    Run("plan-two", ("plan", *TWO, "--combine", "ties", "--target", "bf16", "--json")),
    Run("plan-table", ("plan", *BOTH, "--target", "nf4", "--all")),
    Run("measure", ("measure", *BOTH, "--target", "nf4", "--target", "int8", *FEW, "--json")),
    Run("measure-table", ("measure", *TWO, "--target", "fp8", "--target", "bf16", *NEAREST)),
    Run("inspect-adapter", ("inspect", "inputs/adapter", "--json")),
    Run("inspect-against-base", ("inspect", "inputs/adapter-2", "--base", "inputs/base-nf4", "--json")),
    Run("inspect-zero", ("inspect", "inputs/adapter-zero", "--json")),
    Run("inspect-base", ("inspect", "inputs/base-nf4", "--json")),
    Run("inspect-merged", ("inspect", "runs/fp16-ties/out", "--json")),
)

BAD = (
    merge("bad-no-base", "nf4", inputs=("--base", "inputs/nothing", *ADAPTER), code=3),
    merge("bad-no-adapter", "nf4", inputs=(*BASE, "--adapter", "inputs/nothing"), code=3),
    merge("bad-target", "nf5", code=2),
    merge("bad-rounding", "nf4", "--rounding", "up", code=2),
    merge("bad-combination", "nf4", "--combine", "tie", inputs=TWO, code=2),
    merge("bad-option", "nf4", "--bse", "x", code=2),
    Run("bad-command", ("mesure",), 2),
    Run("bad-option-before-command", ("--target", "bf16", "measure", *BOTH), 2),
    Run("bad-no-out", (*BOTH, "--target", "nf4"), 2),
    merge("bad-out-and-patch", "nf4", "--patch", "{out}.patch", code=2),
    Run("bad-out-not-empty", (*BOTH, "--target", "bf16", "--out", "inputs/full"), 2),
    merge("bad-shapes", "bf16", inputs=(*BASE, "--adapter", "inputs/adapter-shapes"), code=3),
    merge("bad-layers", "bf16", inputs=(*BASE, "--adapter", "inputs/adapter-layers"), code=3),
    merge("bad-nan", "bf16", inputs=(*BASE, "--adapter", "inputs/adapter-nan"), code=3),
    merge("bad-range", "fp16", *NEAREST, inputs=(*BASE, "--adapter", "inputs/adapter-huge"), code=4),
    merge("bad-cut-base", "bf16", inputs=("--base", "inputs/base-cut", *ADAPTER), code=3),
    merge("bad-pickle", "bf16", inputs=(*BASE, "--adapter", "inputs/adapter-pickle"), code=3),
    merge("bad-merged-twice", "bf16", inputs=("--base", "runs/fp32/out", *ADAPTER), code=3),
    merge("bad-no-room", "bf16", "--max-memory", "1kB", code=6),
    merge("bad-min-kept", "nf4", *NEAREST, "--min-kept", "0.5", code=5),
    merge("bad-max-size", "auto", "--max-size", "10kB", code=2),
    merge("bad-no-max-size", "auto", code=2),
    merge("bad-size", "bf16", "--max-memory", "much", code=2),
    merge("bad-calibration-unused", "nf4", *NEAREST, "--calibration", "inputs/calibration.txt", code=2),
    merge("bad-calibration-missing", "nf4", *PRESERVE, "--calibration", "inputs/none.txt", code=2),
    merge("bad-bits", "gptq", "--bits", "5", code=2),
    merge("bad-group-size", "gptq", "--group-size", "100", code=2),
    merge("bad-option-of-target", "nf4", "--bits", "4", code=2),
    merge("bad-density", "bf16", "--density", "0.5", code=2),
    Run("bad-recipe-twice", ("run", "inputs/twice.yaml", *OUT), 2),
    Run("bad-recipe-key", ("run", "inputs/unknown.yaml", *OUT), 2),
    Run("bad-measure-auto", ("measure", *BOTH, "--target", "auto"), 2),
    Run("bad-inspect", ("inspect", "inputs/adapter-layers", "--base", "inputs/base-nf4", "--json"), 3),
    Run("bad-verify", ("verify", "inputs/base-nf4", "--no-reload", "--json"), 3),
    Run("bad-apply", ("apply", "inputs/base-nf4", "inputs/adapter/adapter_model.safetensors", *OUT), 3),
    Run("bad-gguf", ("gguf", "inputs/base-nf4", "--type", "f16", "--out", "{out}.gguf"), 3),
    Run("bad-extract", ("extract", "runs/fp32/out", "inputs/base-nf4", *OUT), 2),
)

RUNS = (*MERGES, *FOLDERS, *JSONS, *HELP, *BAD)


def needed(pattern: str) -> list[Run]:
    """The runs that match, and the earlier ones that they read."""
    chosen = {run.name for run in RUNS if fnmatch.fnmatch(run.name, pattern)}
    for run in reversed(RUNS):
        if run.name in chosen:
            chosen |= {match for argument in run.arguments for match in re.findall(r"runs/([\w-]+)/", argument)}
    return [run for run in RUNS if run.name in chosen]


# --- inputs ----------------------------------------------------------------------------------------------------------

TENSORS = "adapter_model.safetensors"


def read_tensors(path: Path) -> tuple[dict[str, Any], bytearray]:
    """Header and data of a safetensors file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])


def write_tensors(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))


def adapter_variant(inputs: Path, name: str, change: Callable[[dict[str, Any], bytearray], None]) -> None:
    """A copy of the adapter with other tensors."""
    shutil.copytree(inputs / "adapter", inputs / name)
    header, data = read_tensors(inputs / name / TENSORS)
    change(header, data)
    write_tensors(inputs / name / TENSORS, header, data)


def change_values(part: str, change: Callable[[int, float], float]) -> Callable[[dict[str, Any], bytearray], None]:
    """Change every float32 value of the tensors whose name has ``part``: position and value → value."""

    def changed(header: dict[str, Any], data: bytearray) -> None:
        for name, entry in header.items():
            if part in name:
                assert entry["dtype"] == "F32", entry
                start, end = entry["data_offsets"]
                values = array.array("f", bytes(data[start:end]))
                data[start:end] = array.array("f", [change(i, value) for i, value in enumerate(values)]).tobytes()

    return changed


def turn(header: dict[str, Any], data: bytearray) -> None:
    """The first A and its layer get shapes that fit nowhere."""
    name = next(name for name in header if "lora_A" in name)
    header[name]["shape"].reverse()


def rename(header: dict[str, Any], data: bytearray) -> None:
    """Layer 1 becomes layer 7, which the base does not have."""
    for name in list(header):
        header[name.replace("layers.1.", "layers.7.")] = header.pop(name)


RECIPE = """\
base: inputs/base-nf4
adapter: inputs/adapter
target: w4a16
rounding: stochastic
group_size: 32
"""


def make_inputs(inputs: Path, demo: Path) -> None:
    """The demo model, its adapter and texts, and variants that are wrong in one way each."""
    inputs.mkdir(parents=True)
    for name in ("base-nf4", "adapter"):
        shutil.copytree(demo / name, inputs / name)
    for name in ("calibration.txt", "heldout.txt"):
        shutil.copy(demo / name, inputs / name)
    adapter_variant(inputs, "adapter-2", change_values("lora_A", lambda i, value: value * (0.5, -1, 2)[i % 3]))
    adapter_variant(inputs, "adapter-zero", change_values("lora_B", lambda i, value: 0.0))
    adapter_variant(
        inputs, "adapter-nan", change_values("layers.2.self_attn.v_proj.lora_B", lambda i, value: float("nan"))
    )
    adapter_variant(inputs, "adapter-huge", change_values("layers.3.mlp.up_proj.lora_B", lambda i, value: value * 1e9))
    adapter_variant(inputs, "adapter-shapes", turn)
    adapter_variant(inputs, "adapter-layers", rename)
    shutil.copytree(inputs / "adapter", inputs / "adapter-pickle")
    (inputs / "adapter-pickle" / TENSORS).rename(inputs / "adapter-pickle" / "adapter_model.bin")
    shutil.copytree(inputs / "base-nf4", inputs / "base-cut")
    cut = inputs / "base-cut" / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    (inputs / "full").mkdir()
    (inputs / "full" / "mine.txt").write_text("mine")
    (inputs / "recipe.yaml").write_text(RECIPE)
    (inputs / "twice.yaml").write_text(RECIPE + "target: nf4\n")
    (inputs / "unknown.yaml").write_text(RECIPE + "tarket: nf4\n")


# --- snapshot --------------------------------------------------------------------------------------------------------

HEAVY = ("numpy", "torch", "safetensors.torch", "transformers", "transformers.models.llama.modeling_llama", "peft",
         "bitsandbytes", "huggingface_hub", "pydantic", "typer", "rich.console", "jinja2", "yaml", "psutil")  # fmt: skip
"""Libraries that the server imports once, before it forks a child for every command."""


def environment(tree: Path, home: Path) -> dict[str, str]:
    """One thread, no network, no terminal; qmerge from ``tree``."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {
        **kept, **threads, "PYTHONPATH": str(tree), "PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "HOME": str(home),
        "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(home / "hub"), "COLUMNS": "300",
        "TERM": "dumb", "NO_COLOR": "1", "GPTQMODEL_CPU_WORKERS": "1",
    }  # fmt: skip


class Plain:
    """Every command in an interpreter of its own."""

    def __init__(self, python: str, tree: Path, work: Path) -> None:
        self.python, self.work = python, work
        self.environment = environment(tree, work / "home")

    def run(self, arguments: list[str], stdout: Path, stderr: Path) -> int:
        code = "from qmerge.cli import main; main()"
        with stdout.open("wb") as out, stderr.open("wb") as err:
            command = [self.python, "-c", code, *arguments]
            return subprocess.run(command, cwd=self.work, env=self.environment, stdout=out, stderr=err).returncode

    def close(self) -> None:
        pass


class Server(Plain):
    """One interpreter that has imported the large libraries, and a forked child of it for every command."""

    def __init__(self, python: str, tree: Path, work: Path) -> None:
        super().__init__(python, tree, work)
        self.process = subprocess.Popen(
            [python, __file__, "serve"], cwd=work, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def run(self, arguments: list[str], stdout: Path, stderr: Path) -> int:
        assert self.process.stdin and self.process.stdout
        print(json.dumps([arguments, str(stdout), str(stderr)]), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def serve() -> None:
    """Read commands from stdin, one JSON list per line; print the exit code of each."""
    import importlib

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints while it is imported is no answer
    for name in HEAVY:
        importlib.import_module(name)
    importlib.import_module("qmerge.cli")
    for line in sys.stdin:
        arguments, stdout, stderr = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(child_main(arguments, stdout, stderr))
        status = os.waitpid(child, 0)[1]
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def child_main(arguments: list[str], stdout: str, stderr: str) -> int:
    """Run the console command as the interpreter would, and return its exit code."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(stdout, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 1)
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 2)
    sys.argv = ["-c", *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code: Any = 0
    try:
        from qmerge.cli import main

        main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code or 0


def snapshot(tree: Path, work: Path, only: str, python: str, demo: Path | None, plain: bool) -> int:
    """Run the commands; exit code 1 when one did not end as a sane version does."""
    tree, work = tree.resolve(), work.resolve()
    if work.exists() and any(work.iterdir()):
        if not (work / "snapshot.json").exists():
            sys.exit(f"{work} exists and is not a snapshot: choose a new folder")
        shutil.rmtree(work)
    (work / "home").mkdir(parents=True)
    check_tree(python, tree, work)
    make_inputs(work / "inputs", (demo or tree / "qmerge" / "demo").resolve())
    (work / "snapshot.json").write_text(
        json.dumps({"tree": str(tree), "python": python, "commit": commit_of(tree), "folder": str(work)})
    )
    started, odd = time.monotonic(), []
    shell = Plain(python, tree, work) if plain else Server(python, tree, work)
    for run in needed(only):
        begun = time.monotonic()
        code = run_one(shell, run, work)
        expected = (
            "" if code == run.code else f"   expected {run.code}: {last_line(work / 'runs' / run.name / 'stderr')}"
        )
        odd += [run.name] if expected else []
        print(f"{time.monotonic() - begun:6.1f} s  exit {code}  {run.name}{expected}", flush=True)
    shell.close()
    print(f"{time.monotonic() - started:.0f} s in all; unexpected exit codes: {', '.join(odd) or 'none'}")
    return 1 if odd else 0


def check_tree(python: str, tree: Path, work: Path) -> None:
    """The package that is measured must be the one in ``tree``."""
    code = "import qmerge.cli; print(qmerge.__file__)"
    done = subprocess.run(
        [python, "-c", code], cwd=work, env=environment(tree, work / "home"), capture_output=True, text=True
    )
    if not Path(done.stdout.strip() or "/").resolve().is_relative_to(tree):
        sys.exit(f"qmerge is not imported from {tree}: {done.stdout}{done.stderr}")


def commit_of(tree: Path) -> str:
    done = subprocess.run(["git", "-C", tree, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return done.stdout.strip()


def run_one(shell: Plain, run: Run, work: Path) -> int:
    """Run a command and keep its exit code, stdout and stderr in ``runs/NAME``."""
    folder = work / "runs" / run.name
    folder.mkdir(parents=True)
    arguments = [argument.replace("{out}", f"runs/{run.name}/out") for argument in run.arguments]
    before = contents(work / "inputs")
    code = shell.run(arguments, folder / "stdout", folder / "stderr")
    changed = "" if contents(work / "inputs") == before else "inputs changed"
    (folder / "command.json").write_text(json.dumps({"arguments": arguments, "code": code, "changed": changed}))
    return code


def contents(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of all files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else ""


# --- diff ------------------------------------------------------------------------------------------------------------

VOLATILE = {"created", "seconds", "versions", "disk_free", "made_by", "checksum"}
"""Keys of JSON whose values depend on the time, the machine or the version; checksum: of a file with such values."""

SIZES_WITH_TEXT = {"nbytes", "merged_size", "merged_bytes"}
"""What ``patch``, ``apply`` and ``unmerge`` print of a folder's size: reports are part of it, and their length varies."""

PROGRESS = re.compile(r"\w+: .*B/s, .* left|calibrating layer \d+ of \d+|.*: \w+ \d+ of \d+")

FREE_TEXT = {
    "warnings", "notes", "rounding_reason", "reason", "why", "impossible", "loaders", "suspicious", "problem", "topic", "said",
    "given", "verdict", "warning", "found", "help",
}  # fmt: skip
"""Keys of JSON whose strings are sentences: whether there is one counts, its words do not."""

NUMBER = re.compile(r"[-−+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
TIMES = re.compile(
    r"\d{4}-\d\d-\d\dT[\d:.]+(?:Z|[+-]\d\d:\d\d)?|[\d.]+ (?:s|MB/s)\b|[\d.]+ [kMGT]?i?B free|\b\d+\.\d+\.\d+(?:[.+]\w+)*|qmerge \d\S*"
)
"""Times, rates, free disk space, versions."""

RENAMED: dict[str, str] = {}
"""Old name → new name of what was renamed on purpose (``diff --renamed``): a word in reports and on stdout, in no other file."""

Facts = dict[str, Any]


def numbers_in(text: str) -> Counter[str]:
    """Every number of a text, as written, without times and versions."""
    return Counter(NUMBER.findall(TIMES.sub(" ", text)))


def json_facts(value: Any, prose: list[str], path: str = "", key: str = "") -> Iterator[tuple[str, Any]]:
    """Path → number, string, true, false or null; sentences go to ``prose``."""
    if key in VOLATILE:
        return
    # The page shows times; it is compared as tables and drawings.
    if isinstance(value, dict) and value.get("file") == "qmerge.html":
        value = {"file": value["file"]}
    if isinstance(value, dict):
        yield f"{path}{{}}", list(value)
        for name, inner in value.items():
            yield from json_facts(inner, prose, f"{path}.{name}", key if key in FREE_TEXT else name)
    elif isinstance(value, list):
        yield f"{path}[]", len(value)
        for index, inner in enumerate(value):
            yield from json_facts(inner, prose, f"{path}[{index}]", key)
    elif isinstance(value, str) and key in FREE_TEXT:
        prose.append(value)
        yield path, "text"
    else:
        yield path, value


def read_json(text: str, prose: list[str]) -> Facts:
    """The facts of a JSON document; numbers stay as they are written."""
    return dict(json_facts(json.loads(text, parse_float=Written, parse_int=Written), prose))


class Written(str):
    """A number as it is written: 1.0 is not 1."""

    def __repr__(self) -> str:
        return str(self)


def formats_facts(text: str, prose: list[str]) -> Facts:
    """``formats --json``: every name counts, the help lines do not."""
    found = json.loads(text)
    prose += [line for lines in found.values() for line in lines.values()]
    return {kind: sorted(lines) for kind, lines in found.items()}


def terminal_facts(text: str, prose: list[str]) -> Facts:
    """Numbers of every row of a table, in order; other lines go to ``prose``."""
    rows = []
    for line in text.splitlines():
        if line.lstrip().startswith(("│", "┃", "|")):
            rows.append(list(numbers_in(line).elements()))
        else:
            prose.append(line)
    return {f"row {index}": row for index, row in enumerate(row for row in rows if row)}


def help_facts(text: str, prose: list[str]) -> Facts:
    """Names of the options: the first word of a row, and ``--no-…`` where there is one."""
    prose.append(text)
    first = re.findall(r"^│ +(?:\* +)?(--[\w-]+)", text, re.MULTILINE)
    return {"options": sorted({*first, *re.findall(r"--no-[\w-]+", text)})}


def card_facts(text: str, prose: list[str]) -> Facts:
    """The metadata, and the numbers of every row of a table."""
    parts = text.split("---\n", 2)
    assert len(parts) == 3, "no metadata"
    return {"metadata": parts[1], **terminal_facts(parts[2], prose)}


class Page(html.parser.HTMLParser):
    """qmerge.html: numbers in cells, bold facts and drawings are facts; the rest is prose."""

    FACTS = ("td", "b", "script")
    VOID = ("meta", "input", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.facts: list[str] = []
        self.prose: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        if tag not in ("meta", "link", "html"):
            # Width, colour and place of everything drawn; a title may be worded, its numbers may not change.
            for name, value in attributes:
                self.facts += NUMBER.findall(f"{value}") if name not in ("class", "id") else []

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, text: str) -> None:
        if "style" in self.open:
            return
        if any(tag in self.FACTS for tag in self.open):
            self.facts += NUMBER.findall(text)
        else:
            self.prose.append(text)


def html_facts(text: str, prose: list[str]) -> Facts:
    page = Page()
    page.feed(text)
    prose.append(TIMES.sub(" ", " ".join(page.prose)))
    return {f"number {index}": number for index, number in enumerate(page.facts)}


def patch_facts(path: Path, prose: list[str]) -> Facts:
    """A patch's manifest and its blobs of weights; of other files (reports contain a time) only the names."""
    header, data = read_tensors(path)
    metadata = header.pop("__metadata__")
    manifest = json.loads(metadata["manifest"])
    facts: Facts = {"version": metadata["qmerge_patch"], "reversible": manifest["reversible"]}
    for side in ("base", "merged"):
        facts[f"{side} name"] = manifest[side]["name"]
        for file in manifest[side]["files"]:
            weights = file["path"].endswith(".safetensors")
            keep = file if weights else {"path": file["path"]}
            facts[f"{side} {file['path']}"] = without_blob_names(keep, header, data)
    return facts


def without_blob_names(file: Facts, header: dict[str, Any], data: bytes) -> Facts:
    """Segments with the hash of their blob instead of its name, which counts on through all files."""
    segments = []
    for nbytes, how, other, offset, blob in file.get("segments", []):
        digest = ""
        if blob:
            start, end = header[blob]["data_offsets"]
            digest = hashlib.sha256(data[start:end]).hexdigest()
        segments.append([nbytes, how, other, offset, digest])
    return {**file, "segments": segments}


def text_facts(path: Path, reader: Callable[[str, list[str]], Facts], prose: list[str]) -> Facts:
    """The facts of a text, without the name of the snapshot's own folder."""
    text = path.read_text(encoding="utf-8", errors="replace")
    work = next(parent for parent in path.parents if (parent / "snapshot.json").exists())
    text = text.replace(json.loads((work / "snapshot.json").read_text())["folder"], "")
    for old, new in RENAMED.items():
        text = re.sub(rf"\b{re.escape(old)}\b", new, text)
    return reader(text, prose)


def stderr_facts(text: str, prose: list[str]) -> Facts:
    """How many warnings and errors; lines that only say how far the work is are left out."""
    lines = [line for line in text.splitlines() if not PROGRESS.fullmatch(line)]
    prose += lines
    starts = ("warning:", "qmerge:", "Traceback")
    return {f"lines with {start}": sum(line.startswith(start) for line in lines) for start in starts}


def sizes_removed(text: str, prose: list[str]) -> Facts:
    """The JSON of commands on patches."""
    facts = read_json(text, prose)
    return {key: value for key, value in facts.items() if key.removeprefix(".") not in SIZES_WITH_TEXT}


def reader_of(relative: str, path: Path, arguments: list[str]) -> Callable[[Path, list[str]], Facts] | None:
    """How to read a file for facts; None where every byte counts."""
    readers: dict[str, Callable[[str, list[str]], Facts]] = {"qmerge.json": read_json, "README.md": card_facts}
    if relative == "stdout":
        return lambda file, prose: text_facts(file, stdout_reader(path, arguments), prose)
    if relative == "stderr":
        return lambda file, prose: text_facts(file, stderr_facts, prose)
    if path.suffix == ".html":
        return lambda file, prose: text_facts(file, html_facts, prose)
    if path.suffix == ".patch":
        return patch_facts
    if path.name in readers:
        return lambda file, prose: text_facts(file, readers[path.name], prose)
    return None


def stdout_reader(path: Path, arguments: list[str]) -> Callable[[str, list[str]], Facts]:
    """How to read what a command printed."""
    if "--help" in arguments:
        return help_facts
    if arguments == ["formats", "--json"]:
        return formats_facts
    if path.read_bytes().lstrip()[:1] not in (b"{", b"["):
        return terminal_facts
    return sizes_removed if arguments[0] in ("patch", "apply", "unmerge") else read_json


def diff_run(one: Path, two: Path) -> tuple[list[str], list[str]]:
    """What differs between two runs of one command, and the notes about prose."""
    first, second = (json.loads((folder / "command.json").read_text()) for folder in (one, two))
    problems = [f"{key}: {first[key]} ≠ {second[key]}" for key in first if first[key] != second[key]]
    notes: list[str] = []
    ours, theirs = files_of(one), files_of(two)
    problems += [f"only in A: {name}" for name in sorted(ours - theirs)]
    problems += [f"only in B: {name}" for name in sorted(theirs - ours)]
    for name in sorted(ours & theirs):
        found, noted = diff_file(name, one / name, two / name, first["arguments"])
        problems += [f"{name}: {line}" for line in found]
        notes += [f"{name}: {line}" for line in noted]
    return problems, notes


def files_of(folder: Path) -> set[str]:
    """All files and empty folders, relative; locks and the command itself are no output."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() or not any(path.iterdir())}
    return found - {"command.json"}


def diff_file(relative: str, one: Path, two: Path, arguments: list[str]) -> tuple[list[str], list[str]]:
    if one.is_dir() or two.is_dir():
        return ([] if one.is_dir() and two.is_dir() else ["folder against file"]), []
    if one.read_bytes() == two.read_bytes():
        return [], []
    reader = reader_of(relative, one, arguments)
    if reader is None:
        return [first_difference(one.read_bytes(), two.read_bytes())], []
    said: list[list[str]] = [[], []]
    try:
        ours, theirs = reader(one, said[0]), reader(two, said[1])
    except (ValueError, KeyError, AssertionError, IndexError) as cause:
        return [f"cannot be read as facts ({type(cause).__name__}: {cause})"], []
    keys = [key for key in {**ours, **theirs} if ours.get(key, "missing") != theirs.get(key, "missing")]
    shown = [f"{key}: {ours.get(key, 'missing')} ≠ {theirs.get(key, 'missing')}"[:300] for key in keys[:3]]
    more = [f"and {len(keys) - 3} more places"] if len(keys) > 3 else []
    return shown + more, prose_notes(*("\n".join(lines) for lines in said))


def prose_notes(one: str, two: str) -> list[str]:
    """Numbers that only one of two texts has."""
    ours, theirs = numbers_in(one), numbers_in(two)
    gone, new = list((ours - theirs).elements()), list((theirs - ours).elements())
    return [f"prose: only in A {gone[:12]}, only in B {new[:12]}"] if gone or new else []


def first_difference(one: bytes, two: bytes) -> str:
    if len(one) != len(two):
        return f"{len(one)} bytes ≠ {len(two)} bytes"
    places = [index for index, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]
    return f"{len(places)} of {len(one)} bytes differ, the first at {places[0]}"


def diff(one: Path, two: Path, only: str, prose: bool, quiet: bool) -> int:
    """One line per command; exit code 1 when anything differs."""
    names = [run.name for run in RUNS if fnmatch.fnmatch(run.name, only)]
    differ, noted, missing = [], 0, []
    problems = diff_inputs(one / "inputs", two / "inputs")
    if problems:
        print("\n    ".join(["DIFF  inputs", *problems]))
        differ.append("inputs")
    for name in names:
        if not all((folder / "runs" / name / "command.json").exists() for folder in (one, two)):
            missing.append(name)
            continue
        problems, notes = diff_run(one / "runs" / name, two / "runs" / name)
        problems += [f"{note}" for note in notes] if prose else []
        noted += bool(notes)
        if problems:
            differ.append(name)
        if not (quiet and not problems):
            print("\n    ".join([f"{'DIFF' if problems else 'same'}  {name}", *problems]))
        if notes and not prose and not quiet:
            print("\n    ".join(["", *(f"note {note}" for note in notes)]).lstrip("\n"))
    absent = f"; not in both snapshots: {', '.join(missing)}" if missing else ""
    print(f"{len(names) - len(missing)} compared, {len(differ)} differ, {noted} with other numbers in prose{absent}")
    return 1 if differ or missing or not names else 0


def diff_inputs(one: Path, two: Path) -> list[str]:
    """Inputs must be the same, or nothing else can be."""
    ours, theirs = files_of(one), files_of(two)
    changed = [
        name
        for name in sorted(ours & theirs)
        if (one / name).is_file() and (one / name).read_bytes() != (two / name).read_bytes()
    ]
    return [f"only in one: {name}" for name in sorted(ours ^ theirs)] + [f"changed: {name}" for name in changed]


# --- check -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Damage:
    """A change of one file of a run. ``noticed``: whether ``diff`` must call it a difference."""

    what: str
    run: str
    file: str
    change: Callable[[bytes], bytes | None]
    noticed: bool = True


def replaced(pattern: str, new: str) -> Callable[[bytes], bytes]:
    """The first match of a pattern becomes something else."""

    def change(content: bytes) -> bytes:
        text, count = re.subn(pattern, new, content.decode(), count=1, flags=re.DOTALL)
        assert count, f"nothing matches {pattern}"
        return text.encode()

    return change


def flipped(content: bytes) -> bytes:
    """One bit of the last byte but 100."""
    changed = bytearray(content)
    changed[-100] ^= 1
    return bytes(changed)


def blob_flipped(content: bytes) -> bytes:
    """One bit of a patch, in what it holds of the weights."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    files = json.loads(header["__metadata__"]["manifest"])["merged"]["files"]
    blobs = [segment[4] for file in files if file["path"].endswith(".safetensors") for segment in file["segments"]]
    start = header[next(blob for blob in blobs if blob)]["data_offsets"][0]
    changed = bytearray(content)
    changed[8 + length + start + 5] ^= 1
    return bytes(changed)


DAMAGES = (
    Damage("nothing", "nf4-nearest", "out/config.json", lambda content: content, noticed=False),
    Damage("one bit of a weight", "nf4-preserve-text", "out/model.safetensors", flipped),
    Damage("one bit of a patch", "nf4-patch", "out.patch", blob_flipped),
    Damage("one bit of a GGUF file", "gguf", "out.gguf", flipped),
    Damage("one bit of a residual", "nf4-residual", "out/residual/adapter_model.safetensors", flipped),
    Damage("a file is gone", "fp8-nearest", "out/generation_config.json", lambda content: None),
    Damage("the config", "gptq-preserve-text", "out/config.json", replaced('"bits": 4', '"bits": 8')),
    Damage("the recipe", "fp16-ties", "out/qmerge_recipe.yaml", replaced("seed: 0", "seed: 1")),
    Damage("last digit of a number in qmerge.json", "nf4-nearest", "out/qmerge.json", replaced(r'("noise": \d\.\d+)\d', r"\g<1>00")),
    Damage("a null in qmerge.json", "nf4-nearest", "out/qmerge.json", replaced('"output_kept": null', '"output_kept": 0.0')),
    Damage("a key of qmerge.json", "nf4-nearest", "out/qmerge.json", replaced('"cosine"', '"cosines"')),
    Damage("a string of qmerge.json", "nf4-nearest", "out/qmerge.json", replaced('"rounding": "nearest"', '"rounding": "up"')),
    Damage("a warning less", "nf4-nearest", "out/qmerge.json", replaced(r'"warnings": \[.*?\],', '"warnings": [],')),
    Damage("a warning in other words", "nf4-nearest", "out/qmerge.json", replaced(r'"warnings": \[\n *"', '"warnings": ["Look: '), noticed=False),
    Damage("the time", "nf4-nearest", "out/qmerge.json", replaced(r'"seconds": \d', '"seconds": 99'), noticed=False),
    Damage("the model card's table", "int8-nearest", "out/README.md", replaced(r"(\| q\\_proj \| )4", r"\g<1>5")),
    Damage("the model card's metadata", "int8-nearest", "out/README.md", replaced("- qmerge\n", "- merge\n")),
    Damage("the model card's words", "int8-nearest", "out/README.md", replaced("## How it was made", "## Provenance"), noticed=False),
    Damage("a cell of the HTML page", "bf16", "out/qmerge.html", replaced(r">8</td>", ">9</td>")),
    Damage("a point of the HTML page's plot", "bf16", "out/qmerge.html", replaced(r'"steps":\[(\d)', r'"steps":[9\1')),
    Damage("the HTML page's words", "bf16", "out/qmerge.html", replaced("Every weight, worst first", "All weights"), noticed=False),
    Damage("a row of the terminal's table", "nf4-fresh-nearest", "stdout", replaced(r"(│ q_proj +│ +)4", r"\g<1>5")),
    Damage("an exit code", "bad-min-kept", "command.json", replaced('"code": 5', '"code": 0')),
    Damage("an error in other words", "bad-target", "stderr", replaced("no target is called", "unknown target"), noticed=False),
    Damage("a second error line", "bad-target", "stderr", lambda content: content + b"qmerge: again\n"),
    Damage("a number of plan --json", "plan-nf4", "stdout", replaced(r'("predicted_noise": \d\.\d)', r"\g<1>1")),
    Damage("a number of inspect --json", "inspect-adapter", "stdout", replaced(r'("effective_rank": \d)', r"\g<1>1")),
    Damage("a name in formats --json", "formats", "stdout", replaced('"nvfp4":', '"nvfp5":')),
    Damage("a help line in formats --json", "formats", "stdout", replaced('"nvfp4": "', '"nvfp4": "The format '), noticed=False),
    Damage("an option of --help", "help-plan", "stdout", replaced("│ --device ", "│ --devices ")),
    Damage("a patch's size", "patch", "stdout", replaced(r'"nbytes": \d', '"nbytes": 9'), noticed=False),
    Damage("a patch's changed tensors", "patch", "stdout", replaced(r'"changed": \d', '"changed": 9')),
)  # fmt: skip


def check(original: Path) -> int:
    """Exit code 1 when ``diff`` misses a change, or sees one that is none."""
    wrong = 0
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place)
        shutil.copy(original / "snapshot.json", copy)
        for damage in DAMAGES:
            one, two = original / "runs" / damage.run, copy / "runs" / damage.run
            shutil.copytree(one, two)
            content = damage.change((one / damage.file).read_bytes())
            if content is None:
                (two / damage.file).unlink()
            else:
                (two / damage.file).write_bytes(content)
            problems = diff_run(one, two)[0]
            shutil.rmtree(two)
            wrong += bool(problems) != damage.noticed
            verdict = "ok   " if bool(problems) == damage.noticed else "WRONG"
            print(f"{verdict} {damage.what}: {problems[0] if problems else 'same'}")
    print(f"{len(DAMAGES)} changes, {wrong} judged wrongly")
    return 1 if wrong else 0


def main() -> int:
    if sys.argv[1:] == ["serve"]:
        serve()
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    taking = commands.add_parser("snapshot", help="run every command, keep the outputs")
    taking.add_argument("tree", type=Path, help="folder that has qmerge/")
    taking.add_argument("out", type=Path, help="folder to write to; an older snapshot there is replaced")
    taking.add_argument("--only", default="*", help="names of commands, such as 'nf4-*'; runs what they need, too")
    taking.add_argument("--python", default=sys.executable, help="interpreter (default: this one)")
    taking.add_argument("--demo", type=Path, help="folder with base-nf4, adapter and texts (default: TREE/qmerge/demo)")
    taking.add_argument("--plain", action="store_true", help="a new interpreter for every command (slower)")
    comparing = commands.add_parser("diff", help="compare two snapshots")
    comparing.add_argument("one", type=Path, metavar="DIR_A")
    comparing.add_argument("two", type=Path, metavar="DIR_B")
    comparing.add_argument("--only", default="*", help="names of commands to compare")
    comparing.add_argument("--prose", action="store_true", help="other numbers in sentences are a difference, too")
    comparing.add_argument(
        "--renamed", action="append", default=[], metavar="OLD=NEW", help="a name that was changed on purpose"
    )
    comparing.add_argument("--quiet", action="store_true", help="print what differs only")
    checking = commands.add_parser("check", help="damage copies of a whole snapshot: diff must notice every change")
    checking.add_argument("one", type=Path, metavar="DIR")
    commands.add_parser("list", help="print the commands")
    given = parser.parse_args()
    if given.command == "snapshot":
        return snapshot(given.tree, given.out, given.only, given.python, given.demo, given.plain)
    if given.command == "diff":
        RENAMED.update(pair.split("=", 1) for pair in given.renamed)
        return diff(given.one, given.two, given.only, given.prose, given.quiet)
    if given.command == "check":
        return check(given.one)
    for run in RUNS:
        print(f"{run.name:<26} exit {run.code}  qmerge {' '.join(run.arguments)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
