"""`qmerge demo`: the whole job on a small trained model that ships with the package. ``build.py`` made it."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from qmerge import run
from qmerge.recipe import make_recipe
from qmerge.report.terminal import TerminalProgress, measured_table, out, share, survival_table
from qmerge.schema import FidelityRecord

TARGETS = ("nf4", "int8", "bf16")
ROUNDINGS = ("nearest", "stochastic", "preserve")
CALIBRATION = {"calibration_tokens": 8192, "sequence_length": 128}


def run_demo(keep: Path | None) -> None:
    """Measure three targets, merge into NF4 with every rounding, judge the models on held-out text, verify what was
    written."""
    from qmerge.evaluation.fidelity import fidelity_of_folder
    from qmerge.evaluation.verify import verify

    with as_file(files("qmerge.demo")) as here, _folder(keep) as folder:
        inputs = {"base": str(here / "base-nf4"), "adapter": str(here / "adapter")}
        typer.echo("A small Llama in NF4 and a QLoRA adapter trained on it. What survives a plain merge:\n")
        plain = make_recipe({**inputs, "target": "nf4", "rounding": "nearest"})
        out().print(measured_table(run.measure(plain, TARGETS, TerminalProgress(quiet=True))))
        judged = {}
        for rounding in ROUNDINGS:
            merged = Path(folder) / f"nf4-{rounding}"
            settings: dict[str, Any] = {**inputs, "target": "nf4", "rounding": rounding, "out": str(merged)}
            if rounding == "preserve":
                settings |= {**CALIBRATION, "calibration": str(here / "calibration.txt")}
            typer.echo(
                f"\nqmerge --base base-nf4 --adapter adapter --target nf4 --rounding {rounding} --out {merged.name}"
            )
            report = run.merge(make_recipe(settings), progress=TerminalProgress(quiet=rounding != "preserve"))
            text, tokens = here / "heldout.txt", CALIBRATION["calibration_tokens"]
            judged[rounding] = fidelity_of_folder(
                merged,
                text,
                against=None,
                tokens=tokens,
                length=128,
                device="auto",
                progress=TerminalProgress(quiet=True),
            )
        out().print(survival_table(report))
        typer.echo("")
        out().print(side_by_side(judged))
        for check in verify(merged):
            typer.echo(f"{'ok    ' if check.ok else 'FAILED'} {check.name}: {check.found}")
        typer.echo(f"\nKept in {folder}." if keep else "\nGive --out DIR to keep the merged models.")


def side_by_side(judged: dict[str, FidelityRecord]) -> Table:
    """The merged models against the unmerged one, on text that nobody saw."""
    table = Table(title="What the models do on held-out text", title_justify="left", title_style="bold")
    for name in ("rounding into nf4", "gain kept", "KL ratio", "same top token"):
        table.add_column(name, justify="left" if name.startswith("rounding") else "right")
    for rounding, record in judged.items():
        ratio = "–" if record.kl_ratio is None else f"{record.kl_ratio:.3f}"
        table.add_row(rounding, share(record.gain_kept), ratio, share(record.top1_agreement))
    table.caption = "gain kept: 100 % is the adapter model, 0 % the base; KL ratio: 0 and 1"
    table.caption_justify = "left"
    return table


def _folder(keep: Path | None) -> tempfile.TemporaryDirectory[str] | nullcontext[Path]:
    return nullcontext(keep) if keep else tempfile.TemporaryDirectory(prefix="qmerge-demo-")
