"""--min-kept and --max-kl-ratio: exit code 5, and one line that says which number it was."""

from __future__ import annotations

import pytest

from qmerge.cli.output import exit_code
from qmerge.schema import ReportData

from ..report.reports import fidelity, report

JUDGED = report(output_kept=1.0, calibration="train.txt", fidelity=fidelity(0.807, 0.107))
CHANCE = report(fidelity=fidelity(0.1, 0.004, improvement=0.001))


@pytest.mark.parametrize(
    ("shown", "min_kept", "line"),
    [
        (JUDGED, 0.807, None),
        (
            JUDGED,
            0.81,
            "gain kept 0.8070 is less than --min-kept 0.81 (nf4: whole model, 20,480 tokens of heldout.txt)",
        ),
        (report(), 0.78, None),
        (
            report(),
            0.79,
            "share of the delta kept in the weights 0.7800 is less than --min-kept 0.79 (nf4: no gain was measured",
        ),
        (
            report(output_kept=0.5, calibration="random"),
            0.79,
            "share of the delta kept in the layers' outputs 0.5000 is less",
        ),
        (CHANCE, 0.5, None),
        (CHANCE, 0.79, "share of the delta kept in the weights 0.7800"),
    ],
)
def test_min_kept(shown: ReportData, min_kept: float, line: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    code = exit_code([shown], min_kept=min_kept, max_kl_ratio=None)
    lines = capsys.readouterr().err.splitlines()
    assert (code, len(lines)) == ((0, 0) if line is None else (5, 1))
    if line:
        assert lines[0].startswith(f"qmerge: {line}")


@pytest.mark.parametrize(
    ("shown", "most", "line"),
    [
        (JUDGED, 0.107, None),
        (JUDGED, 0.1, "KL ratio 0.1070 is more than --max-kl-ratio 0.1 (nf4: 20,480 tokens of heldout.txt)"),
        (report(fidelity=fidelity(None, None)), 0.0, None),
        (report(), 1.0, "--max-kl-ratio 1: no KL ratio was measured (nf4); add --verify TEXT"),
    ],
)
def test_max_kl_ratio(shown: ReportData, most: float, line: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    code = exit_code([shown], min_kept=None, max_kl_ratio=most)
    assert code == (5 if line else 0)
    assert capsys.readouterr().err == (f"qmerge: {line}\n" if line else "")


def test_the_worst_of_several_models_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    others = [report(fidelity=fidelity(0.5, 0.3), recipe={"target": "gptq"}), report(fidelity=fidelity(0.7, 0.2))]
    assert exit_code([JUDGED, *others], min_kept=0.9, max_kl_ratio=0.01) == 5
    gain, ratio = capsys.readouterr().err.splitlines()
    assert "gain kept 0.5000" in gain and "gptq" in gain and "KL ratio 0.3000" in ratio and "gptq" in ratio


def test_without_limits_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code([report(fidelity=fidelity(0.0, 1.0))], min_kept=None, max_kl_ratio=None) == 0
    assert capsys.readouterr().err == ""
