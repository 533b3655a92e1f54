"""On a GPU: the compiled kernels against torch, and merges on CUDA against merges on the CPU.

Skipped without a CUDA device and QMERGE_TEST_GPU=1.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import qmerge
from qmerge.demo import build
from qmerge.rounding import preserve
from qmerge.rounding._loops import TORCH_LOOPS, TorchLoops

from .problems import CASES, Case

DEMO = Path(build.__file__).parent
BIG = [
    Case("nf4", (300, 1024), shuffled=True),
    Case("gptq", (300, 1024), shuffled=True, options={"group_size": 64}),
    Case("int8", (300, 512)),
]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and QMERGE_TEST_GPU=1")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")


def both_ways(case: Case, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Levels of feedback, levels of a sweep and which rows moved: with the kernels, and with torch's loops."""
    rows = case.rows("cuda")
    found = []
    for torch_loops in ("0", "1"):
        monkeypatch.setenv(TORCH_LOOPS, torch_loops)
        problem, nearest_IO = case.problem("cuda")
        assert isinstance(problem.loops, TorchLoops) == (torch_loops == "1")
        levels_IO, moved_O, _ = preserve.sweep(nearest_IO[:, rows].clone(), rows, problem)
        found.append((preserve.feedback(problem)[0], levels_IO, moved_O))
    return found


def share_that_differs(left: Tensor, right: Tensor) -> float:
    return float((left != right).float().mean())


@needs_cuda
@needs_triton
@pytest.mark.parametrize("case", [*CASES, *BIG], ids=lambda case: case.name)
def test_kernels_choose_the_levels_that_torch_chooses(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value on a tie within float32 rounding may differ, and then the columns after it in its row."""
    kernels, torchs = both_ways(case, monkeypatch)
    assert share_that_differs(kernels[0], torchs[0]) < 0.02
    assert share_that_differs(kernels[1], torchs[1]) < 0.02
    assert share_that_differs(kernels[2], torchs[2]) < 0.02


@needs_cuda
@needs_triton
@pytest.mark.parametrize("case", BIG, ids=lambda case: case.name)
def test_kernels_reach_the_same_error(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, torchs = both_ways(case, monkeypatch)
    problem, _ = case.problem("cuda")
    found_O, expected_O = preserve.squared_error(kernels[0], problem), preserve.squared_error(torchs[0], problem)
    torch.testing.assert_close(found_O.sum(), expected_O.sum(), rtol=2e-3, atol=0)


@needs_cuda
@needs_triton
def test_the_comparison_can_tell() -> None:
    """The control: with other scales, other levels."""
    from qmerge.rounding._block_kernels import make_block_kernels

    problem, _ = BIG[0].problem("cuda")
    table = problem.grid.scale_table(len(problem.columns))
    assert table is not None
    wrong = make_block_kernels(replace(table, inverse=table.inverse * 1.2), problem.columns)
    found_IO, _ = preserve.feedback(replace(problem, loops=wrong))
    assert share_that_differs(found_IO, preserve.feedback(problem)[0]) > 0.1


@needs_cuda
@pytest.mark.parametrize(
    ("target", "rounding", "most"),
    [("nf4", "nearest", 1e-5), ("nf4", "stochastic", 1e-4), ("int8", "nearest", 1e-5), ("bf16", "nearest", 1e-4)],
)
def test_merges_on_cuda_are_those_on_the_cpu(target: str, rounding: str, most: float, tmp_path: Path) -> None:
    """Sums of float32 products differ in their last bits, so a value on a tie may differ."""
    merged = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        qmerge.merge(
            base=DEMO / "base-nf4", adapter=DEMO / "adapter", target=target, rounding=rounding, device=device,
            out=out, quiet=True,
        )  # fmt: skip
        merged[device] = load_file(out / "model.safetensors")
    assert merged["cpu"].keys() == merged["cuda"].keys()
    for name, tensor in merged["cpu"].items():
        if tensor.dtype == torch.float32:  # scales, of which a few differ in their last bit
            torch.testing.assert_close(merged["cuda"][name], tensor, rtol=1e-6, atol=0)
        else:
            assert share_that_differs(tensor, merged["cuda"][name]) <= most, name


@needs_cuda
@pytest.mark.parametrize("target", ["nf4", "gptq"])
def test_preserve_on_cuda_keeps_as_much_as_on_the_cpu(target: str, tmp_path: Path) -> None:
    kept = {}
    for device in ("cpu", "cuda"):
        report = qmerge.merge(
            base=DEMO / "base-nf4", adapter=DEMO / "adapter", target=target, rounding="preserve", device=device,
            calibration=DEMO / "calibration.txt", calibration_tokens=1024, out=tmp_path / device, quiet=True,
        )  # fmt: skip
        assert report.kept is not None
        kept[device] = report.kept
    assert kept["cuda"] == pytest.approx(kept["cpu"], abs=0.01)
