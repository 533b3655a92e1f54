"""Models that several test files share, made once; and the command line, run in this process."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a network
os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")

import pytest
import torch
from hypothesis import settings

from qmerge.errors import QmergeError

from . import models

settings.register_profile("qmerge", deadline=None, max_examples=60)
settings.load_profile("qmerge")

# For tests that need whole processes: the server imports everything once and computes nothing, so each is a quick fork of
# a clean process.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.conftest", "qmerge.cli", "qmerge.run", "qmerge.report.terminal", "bitsandbytes"])

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
        from qmerge import cli as module

        monkeypatch.setattr(sys, "argv", ["qmerge", *map(str, arguments)])
        capsys.readouterr()
        code, error = 0, None
        try:
            module.main()
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


def snapshot(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
