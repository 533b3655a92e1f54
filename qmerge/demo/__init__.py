"""`qmerge demo`: the whole job on a small trained model that ships with the package. ``build.py`` made it."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import typer

from qmerge import run
from qmerge.checkpoint.folder import check_content
from qmerge.evaluation.fidelity import fidelity_of_folder
from qmerge.evaluation.verify import verify
from qmerge.recipe import make_recipe
from qmerge.report.terminal.checks import check_line
from qmerge.report.terminal.console import NotedTable, make_table, stdout, with_notes
from qmerge.report.terminal.progress import TerminalProgress
from qmerge.report.terminal.tables import measured_table, survival_table
from qmerge.schema import FidelityRecord, ReportData
from qmerge.wording import DASH, fixed_or_dash, percent_with_tenths

TARGETS = ("nf4", "int8", "bf16")
ROUNDINGS = ("nearest", "stochastic", "preserve")
TOKENS = 8192
SEQUENCE_LENGTH = 128


def run_demo(keep: Path | None) -> None:
    """Measure three targets, merge into NF4 with every rounding, compare the models on held-out text, verify the last one.

    Args:
        keep: folder for the merged models; None for a temporary one.
    """
    if keep:
        check_content(keep, resume=False)
    with as_file(files("qmerge.demo")) as demo, _output_folder(keep) as folder:
        inputs = {"base": str(demo / "base-nf4"), "adapter": str(demo / "adapter"), "target": "nf4"}
        typer.echo("A small Llama in NF4, and a QLoRA adapter that was trained on it.")
        typer.echo("What merges with nearest rounding keep:\n")
        nearest = make_recipe({**inputs, "rounding": "nearest"})
        stdout().print(measured_table(run.measure(nearest, TARGETS, TerminalProgress(quiet=True))))
        fidelity_of_rounding = {}
        for rounding in ROUNDINGS:
            merged = Path(folder) / f"nf4-{rounding}"
            report = _merge(demo, inputs, rounding, merged)
            fidelity_of_rounding[rounding] = _fidelity(merged, demo)
        typer.echo("")
        stdout().print(_fidelity_table(fidelity_of_rounding))
        stdout().print(survival_table(report))
        for check in verify(merged):
            typer.echo(check_line(check))
        typer.echo(
            f"\nThe merged models are in {folder}." if keep else "\nTo keep the merged models: qmerge demo --out DIR"
        )


def _merge(demo: Path, inputs: dict[str, str], rounding: str, out: Path) -> ReportData:
    """One merge, with the command line that does the same."""
    settings: dict[str, Any] = {**inputs, "rounding": rounding, "out": str(out)}
    calibration = ""
    if rounding == "preserve":
        settings |= {
            "calibration": str(demo / "calibration.txt"),
            "calibration_tokens": TOKENS,
            "sequence_length": SEQUENCE_LENGTH,
        }
        calibration = (
            f" --calibration calibration.txt --calibration-tokens {TOKENS} --sequence-length {SEQUENCE_LENGTH}"
        )
    typer.echo(
        f"\nqmerge --base base-nf4 --adapter adapter --target nf4 --rounding {rounding}{calibration} --out {out.name}"
    )
    # preserve is the only one that takes more than a moment.
    return run.merge(make_recipe(settings), progress=TerminalProgress(quiet=rounding != "preserve"))


def _fidelity(merged: Path, demo: Path) -> FidelityRecord:
    return fidelity_of_folder(
        merged,
        demo / "heldout.txt",
        # The recipe of a merged model holds no absolute paths, and the demo's inputs are in the package.
        against=(str(demo / "base-nf4"), str(demo / "adapter")),
        tokens=TOKENS,
        length=SEQUENCE_LENGTH,
        device="auto",
        progress=TerminalProgress(quiet=True),
    )


def _fidelity_table(fidelity_of_rounding: dict[str, FidelityRecord]) -> NotedTable:
    """The merged models compared with the unmerged one, on text that was used for neither training nor calibration."""
    title = "What became of the fine-tuning: the whole models, on held-out text"
    table = make_table(title, ("rounding into nf4", "verdict", "gain kept", "KL ratio", "same top token"))
    for rounding, record in fidelity_of_rounding.items():
        numbers = [
            fixed_or_dash(record.gain_kept, 3),
            fixed_or_dash(record.kl_ratio, 4),
            percent_with_tenths(record.top1_agreement or 0.0),
        ]
        table.add_row(rounding, record.verdict or DASH, *numbers)
    notes = [
        ("gain kept", "share of what the adapter improves the loss by; 1 is all"),
        ("KL ratio", "0: predicts like the unmerged adapter model; 1: like the base"),
        ("same top token", "as the unmerged adapter model, share of all positions"),
    ]
    return with_notes(table, notes)


def _output_folder(keep: Path | None) -> tempfile.TemporaryDirectory[str] | nullcontext[Path]:
    if keep:
        return nullcontext(keep)
    return tempfile.TemporaryDirectory(prefix="qmerge-demo-")
