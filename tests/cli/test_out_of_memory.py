"""Memory that runs out, on the CPU or the GPU: one line with what to do, and exit code 6; a folder is not blamed for it."""

from __future__ import annotations

import errno
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qmerge import pipeline
from qmerge.errors import CheckpointError, is_out_of_memory
from qmerge.evaluation import stored
from qmerge.evaluation.loaders import as_checkpoint_error
from qmerge.run import destinations

from ..conftest import Cli, nearest_merge, snapshot

GPU = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 15.77 GiB of which 1.00 GiB is free."
)


def raise_(error: BaseException) -> Any:
    raise error


# What really happens, where it can happen here; the GPU's errors as torch raises them.
CAUSES: dict[str, Callable[[], object]] = {
    "torch on the CPU": lambda: torch.empty(2**60, dtype=torch.uint8),
    "numpy": lambda: np.zeros(2**60, np.uint8),
    "Python": lambda: bytearray(2**62),
    "torch on Windows": lambda: raise_(RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 64 bytes.")),
    "the GPU": lambda: raise_(torch.OutOfMemoryError(GPU)),
    "CUDA": lambda: raise_(RuntimeError("CUDA error: out of memory")),
    "cuBLAS": lambda: raise_(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
    "the system": lambda: raise_(OSError(errno.ENOMEM, "Cannot allocate memory")),
}  # fmt: skip


def failing(cause: Callable[[], object]) -> Callable[..., Any]:
    """A function that fails at its third call, when some work is done."""
    calls: list[None] = []
    real = pipeline.run_step

    def run_step(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == 3:
            cause()
        return real(*arguments)

    return run_step


@pytest.mark.parametrize("name", CAUSES)
def test_one_line_and_resume(name: str, nf4: Path, lora: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(destinations, "run_step", failing(CAUSES[name]))
        ran = cli(*nearest_merge(nf4, lora, out), "-q")
    assert ran.code == 6
    lines = [line for line in ran.err.splitlines() if line.startswith("qmerge: ")]
    assert len(lines) == 1 and "Traceback" not in ran.err
    assert lines[0].startswith("qmerge: out of memory")
    for advice in ("--max-memory", "--resume", "--calibration-tokens", "--rounding stochastic", "--device cpu"):
        assert advice in lines[0]
    assert ("on the GPU" in lines[0]) == (name in ("the GPU", "CUDA", "cuBLAS"))
    if name == "the GPU":
        assert "(Tried to allocate 2.50 GiB)" in lines[0] and "capacity" not in lines[0]
        # What was done is kept.
        assert cli(*nearest_merge(nf4, lora, out), "-q", "--resume").code == 0
        assert cli(*nearest_merge(nf4, lora, tmp_path / "undisturbed"), "-q").code == 0
        weights = "model.safetensors"
        assert snapshot(out)[weights] == snapshot(tmp_path / "undisturbed")[weights]


def test_other_errors_stay_bugs(
    nf4: Path, lora: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control."""
    monkeypatch.setattr(
        destinations, "run_step", failing(lambda: raise_(RuntimeError("mat1 and mat2 cannot be multiplied")))
    )
    ran = cli(*nearest_merge(nf4, lora, tmp_path / "out"), "-q")
    assert ran.code == 1 and "Traceback" in ran.err


@pytest.mark.parametrize("name", CAUSES)
def test_a_folder_is_not_blamed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((MemoryError, RuntimeError, OSError)) as raised, as_checkpoint_error("transformers"):
        CAUSES[name]()
    assert is_out_of_memory(raised.value)
    with pytest.raises(CheckpointError, match="does not load it: no such class"), as_checkpoint_error("transformers"):
        raise RuntimeError("no such class")

    class Model:
        def __call__(self, **_: object) -> None:
            CAUSES[name]()

    checkpoint = types.SimpleNamespace(config={"architectures": ["BertModel"], "model_type": "bert"})
    monkeypatch.setattr(stored, "whole_stored_model", lambda *_: Model())
    with pytest.raises(stored.CannotCompareError, match="memory ran out"):
        stored.stored_outputs(checkpoint, {}, None)  # type: ignore[arg-type]
