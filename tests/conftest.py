"""Models that several test files share, made once; and the command line, run in this process."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a network
os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
# A GPU adds in another order, and most tests compare bytes. `make test` runs tests/rounding/test_gpu.py apart from the others.
if os.environ.get("QMERGE_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
from hypothesis import settings

from qmerge.errors import QmergeError

from . import models
from .hub_server import HubServer, connected


class FlatKernels:
    """bitsandbytes' native CPU library, dequantizing 4-bit weights as one row: with AVX512 it begins a new block at every
    row (bitsandbytes 0.50), which is wrong where rows are no multiple of the block. Elsewhere this changes nothing."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(self._library, name)
        if not name.startswith(("cdequantize_blockwise_cpu_nf4", "cdequantize_blockwise_cpu_fp4")):
            return kernel
        return lambda packed, absmax, out, size, rows, columns: kernel(
            packed, absmax, out, size, type(rows)(1), type(columns)(rows.value * columns.value)
        )


def pytest_runtest_logstart(nodeid: str) -> None:
    """`make coverage` records which test function runs a line, for tools/mutants.py."""
    if "coverage" not in sys.modules:
        return
    measured = sys.modules["coverage"].Coverage.current()
    if measured is not None:
        measured.switch_context(nodeid.partition("[")[0])


@pytest.fixture(scope="session", autouse=True)
def sound_bitsandbytes() -> None:
    """The oracle must be right on every CPU. With AVX512-BF16, bitsandbytes 0.50 also repacks 4-bit weights in their first
    forward pass: it then computes in bfloat16, and is wrong once an adapter is attached."""
    from bitsandbytes import functional
    from bitsandbytes.backends.cpu import ops
    from bitsandbytes.nn import modules

    for module in (functional, ops, modules):
        module.has_avx512bf16 = lambda: False  # type: ignore[assignment]
    ops.lib = FlatKernels(ops.lib)


settings.register_profile("qmerge", deadline=None, max_examples=60)
settings.load_profile("qmerge")

# For tests that need whole processes: the server imports everything once and computes nothing, so each is a quick fork of
# a clean process.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["tests.conftest", "qmerge.cli", "qmerge.run", "qmerge.report.terminal.progress", "bitsandbytes"]
)

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 Llama in one file."""
    return models.save(models.llama(), tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in several files, with an index."""
    return models.save(models.llama(), tmp_path_factory.mktemp("models") / "sharded", max_shard_size="60kB")


@pytest.fixture(scope="session")
def nf4(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, quantized by the stock library."""
    return models.quantize(dense, tmp_path_factory.mktemp("models") / "nf4", **NF4)


@pytest.fixture(scope="session")
def nf4_dq(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With double quantization."""
    folder = tmp_path_factory.mktemp("models") / "nf4-dq"
    return models.quantize(dense, folder, **NF4, bnb_4bit_use_double_quant=True)


@pytest.fixture(scope="session")
def int8(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.quantize(dense, tmp_path_factory.mktemp("models") / "int8", load_in_8bit=True)


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter on every linear layer of those."""
    return models.adapter(models.llama(torch.float32), tmp_path_factory.mktemp("models") / "lora")


@dataclass(frozen=True)
class Ran:
    """What a command did. ``error`` is what was raised on purpose, if anything was."""

    code: int
    out: str
    err: str
    error: QmergeError | None = None


Cli = Callable[..., Ran]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    """``cli("measure", "--base", folder, …)``: the console command, as a user would see it."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: object) -> Ran:
        from qmerge.cli import main

        monkeypatch.setattr(sys, "argv", ["qmerge", *map(str, arguments)])
        capsys.readouterr()
        code, error = 0, None
        try:
            main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
            error = ended.__context__ if isinstance(ended.__context__, QmergeError) else None
        except Exception:  # a bug: the interpreter would print it and end with 1
            code = 1
            traceback.print_exc(limit=-2)
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err, error)

    yield run
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A stand-in for the Hub, which huggingface_hub uses, without a token."""
    with connected(monkeypatch, tmp_path / "cache") as hub:
        yield hub


def nearest_merge(base: Path, adapter: Path, out: Path) -> tuple[object, ...]:
    """Arguments of a quick merge into NF4."""
    return (
        "--base", base, "--adapter", adapter, "--target", "nf4", "--rounding", "nearest", "--out", out, "--device", "cpu",
    )  # fmt: skip


def snapshot(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def timeless(folder: Path) -> dict[str, Any]:
    """SHA-256 of every file of an output folder, by relative path; of qmerge.json and the page everything except date and
    duration, and what follows from them."""
    found: dict[str, Any] = snapshot(folder)
    report = json.loads((folder / "qmerge.json").read_text())
    created, seconds = report.pop("created"), report.pop("seconds")
    del report["checksum"]
    report["files"] = [record for record in report["files"] if record["file"] != "qmerge.html"]
    page = (folder / "qmerge.html").read_text()
    time = f"{created}, {seconds:.0f} s"
    assert time in page
    return {**found, "qmerge.json": report, "qmerge.html": page.replace(time, "")}
