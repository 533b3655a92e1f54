"""The compiled loops against torch's: those for the CPU, and those for a GPU by Triton's interpreter. (On a GPU: test_gpu.py.)"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from qmerge.rounding import _cpu_kernels, preserve
from qmerge.rounding._loops import TORCH_LOOPS, TorchLoops

from .problems import CASES, Case

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="needs triton, which CPU builds of torch leave out: pip install triton (290 MB)"
)
ROOT = Path(__file__).parent.parent.parent
STEPS = ("feedback", "sweep", "second sweep")


@pytest.fixture(scope="module")
def differences() -> dict[str, dict[str, int]]:
    """Case → step → entries that differ."""
    child = subprocess.run(
        [sys.executable, "-m", "tests.rounding.interpreted_kernels"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    found: dict[str, dict[str, int]] = json.loads(child.stdout.splitlines()[-1])
    return found


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("case", [case.name for case in CASES])
def test_kernels_choose_the_levels_that_torch_chooses(case: str, differences: dict[str, dict[str, int]]) -> None:
    found = differences[case]
    assert [found[f"kernel: {step}"] for step in STEPS] == [0, 0, 0]
    assert all(found[f"control: {step}"] for step in STEPS), "the control: other scales lead to other levels"


@needs_triton
@pytest.mark.slow
def test_some_rows_stay_in_the_second_sweep(differences: dict[str, dict[str, int]]) -> None:
    """Otherwise the comparison would not tell whether kernels report which rows moved."""
    assert any(found["rows that stay"] for found in differences.values())


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [75, 90])
@pytest.mark.parametrize("level_bits", [0, 4])
@pytest.mark.parametrize("kernel", ["_feedback_block", "_sweep_block"])
def test_kernels_compile_without_fused_multiply_add(kernel: str, level_bits: int, capability: int) -> None:
    """For a T4 and an H100, by Triton's own compiler, which needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from qmerge.rounding import _block_kernels

    function = getattr(_block_kernels, kernel)
    constants = {"LEVEL_BITS": level_bits, "DIVISOR": 64, "BLOCK": 64, "TILE": 16}
    types = {"rows_ptr": "*i64", "offset_ptr": "*i64", "first": "fp32", "last": "fp32"}
    signature = {}
    for name in function.arg_names:
        default = "*fp32" if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in constants else types.get(name, default)
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    target = GPUTarget("cuda", capability, 32)
    fused = {}
    for option in (False, True):
        made = triton.compile(source, target=target, options={"num_warps": 1, "enable_fp_fusion": option})
        fused[option] = made.asm["ptx"].count("fma.")
    assert fused[False] == 0
    assert fused[True] > 0, "the control: the option decides"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("threads", [1, 2])
def test_compiled_for_the_cpu_they_choose_the_levels_that_torch_chooses(
    case: Case, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cpu_kernels, "FEWEST_ROWS", 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    problem, nearest_IO = case.problem()
    assert isinstance(problem.loops, _cpu_kernels.CpuKernels)
    by_torch = replace(problem, loops=TorchLoops(problem.grid, problem.columns))
    for sweeps in (1, 3):
        found = [*preserve.feedback(problem), *preserve.descend(nearest_IO, problem, sweeps)]
        expected = [*preserve.feedback(by_torch), *preserve.descend(nearest_IO, by_torch, sweeps)]
        for levels, squared_errors in ((0, 1), (2, 3)):
            assert torch.equal(found[levels], expected[levels])
            torch.testing.assert_close(found[squared_errors], expected[squared_errors], rtol=1e-5, atol=0)
    table = problem.grid.scale_table(len(problem.columns))
    assert table is not None
    wrong = _cpu_kernels.make_cpu_kernels(replace(table, inverse=table.inverse * 1.2), problem.columns)
    other_IO, _ = preserve.feedback(replace(problem, loops=wrong))
    assert not torch.equal(other_IO, expected[0]), "the control: other scales lead to other levels"


def test_torch_goes_column_by_column_where_it_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TORCH_LOOPS, "1")
    problem, _ = CASES[0].problem()
    assert isinstance(problem.loops, TorchLoops)
