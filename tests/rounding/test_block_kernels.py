"""The Triton kernels against torch, by Triton's interpreter: no GPU is needed. (On a GPU: test_gpu.py.)"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from qmerge.rounding import preserve

from .problems import CASES

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
    types = {"rows_ptr": "*i64", "offset_ptr": "*i64", "moved_ptr": "*i32", "first": "fp32", "last": "fp32"}
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


def test_torch_goes_column_by_column_on_a_cpu() -> None:
    problem, _ = CASES[0].problem()
    assert preserve.block_kernels(problem) is None
    assert not preserve.kernels_run_on(torch.device("cpu"))
