"""benchmarks/real_model.py, run as a user would, on the demo model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import qmerge
import qmerge.demo

ROOT = Path(__file__).parent.parent
DEMO = Path(qmerge.demo.__file__).parent


def run_benchmark(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "benchmarks/real_model.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    ran = run_benchmark("--work", tmp_path, "--text", DEMO / "heldout.txt")
    assert ran.returncode == 1 and ran.stderr == "--text, and --adapter or --train, are needed; or --boolq N\n"


@pytest.mark.slow
def test_the_judge_agrees_with_qmerge_fidelity(tmp_path: Path) -> None:
    """They share no code. The row of the detour needs the 16-bit original, which is not given."""
    base, adapter, text = DEMO / "base-nf4", DEMO / "adapter", DEMO / "heldout.txt"
    sizes = ("--length", 64, "--tokens", 1024)
    rows = ("--rows", "stochastic", "detour")
    ran = run_benchmark("--work", tmp_path, "--base", base, "--adapter", adapter, "--text", text, *sizes, *rows)
    assert ran.returncode == 0, ran.stderr
    assert "left out: detour needs --original" in ran.stderr
    (line,) = [line for line in ran.stdout.splitlines() if line.startswith("| NF4: qmerge, stochastic")]
    _, gain, kl_ratio, top, cpu, memory, *reported = (cell.strip() for cell in line.strip("|").split("|"))
    own = qmerge.fidelity(out=tmp_path / "merged/stochastic", text=text, tokens=1024, sequence_length=64, quiet=True)
    assert own.gain_kept == pytest.approx(float(gain), abs=0.001)
    assert own.kl_ratio == pytest.approx(float(kl_ratio), abs=2e-4)
    assert 100 * own.top1_agreement == pytest.approx(float(top.removesuffix(" %")), abs=0.3)
    assert float(cpu) > 1 and 0.1 < float(memory.removesuffix(" GB")) < 4
    assert reported == ["–", "–", "–"], "without calibration, qmerge measures no whole model"
    # A second call runs nothing again.
    used = tmp_path / "results/stochastic.usage.json"
    used.write_text(json.dumps({"cpu": 12345, "memory": 1}))
    ran = run_benchmark("--work", tmp_path, "--base", base, "--adapter", adapter, "--text", text, *sizes, *rows)
    assert "12345" in ran.stdout
