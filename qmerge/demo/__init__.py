"""`qmerge demo`: the whole job on a small trained model that ships with the package. ``build.py`` made it."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from importlib.resources import as_file, files
from pathlib import Path

import typer

from qmerge import run
from qmerge.recipe import make_recipe
from qmerge.report.terminal import TerminalWatcher, measured_table, out, survival_table

TARGETS = ("nf4", "int8", "bf16")


def run_demo(keep: Path | None) -> None:
    """Measure three targets, merge into NF4 for real, and verify what was written."""
    from qmerge.verify import verify

    with as_file(files("qmerge.demo")) as here, _folder(keep) as folder:
        inputs = {"base": str(here / "base-nf4"), "adapter": str(here / "adapter")}
        typer.echo("A small Llama in NF4 and a QLoRA adapter trained on it. What survives a plain merge:\n")
        reports = run.measure(make_recipe({**inputs, "target": "nf4"}), TARGETS, TerminalWatcher(quiet=True))
        out().print(measured_table(reports))
        merged = Path(folder) / "merged-nf4"
        typer.echo(f"\nqmerge --base base-nf4 --adapter adapter --target nf4 --out {merged.name}\n")
        recipe = make_recipe({**inputs, "target": "nf4", "out": str(merged)})
        report = run.merge(recipe, watcher=TerminalWatcher())
        out().print(survival_table(report))
        for check in verify(merged):
            typer.echo(f"{'ok    ' if check.ok else 'FAILED'} {check.name}: {check.found}")
        typer.echo(f"\nKept in {merged}." if keep else "\nGive --out DIR to keep the merged model.")


def _folder(keep: Path | None) -> tempfile.TemporaryDirectory[str] | nullcontext[Path]:
    return nullcontext(keep) if keep else tempfile.TemporaryDirectory(prefix="qmerge-demo-")
