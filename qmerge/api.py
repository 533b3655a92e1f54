"""What Python callers get: a ``Report`` that shows itself, and settings by keyword."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmerge import run
from qmerge.evaluation.fidelity import fidelity_of_folder
from qmerge.patch import direct
from qmerge.recipe import JUDGED_TOKENS, make_recipe
from qmerge.report.terminal.console import stdout
from qmerge.report.terminal.progress import TerminalProgress
from qmerge.report.terminal.tables import survival_table
from qmerge.schema import FidelityRecord, ReportData, overall_kept


@dataclass(frozen=True)
class Report:
    """What a run did. ``data`` is the content of qmerge.json (``qmerge.schema.ReportData``)."""

    data: ReportData

    @property
    def kept(self) -> float | None:
        """Share of the delta that survived: in the layers' output where calibration saw their inputs, else in the weights,
        each counted by its ‖delta‖². None when the delta is zero."""
        return overall_kept(self.data.total.values)

    @property
    def noise(self) -> float | None:
        """‖stored − merged‖ / ‖delta‖ over all merged weights."""
        return self.data.total.values["noise"]

    @property
    def warnings(self) -> list[str]:
        return self.data.warnings

    def _repr_html_(self) -> str:
        from qmerge.report.html import summary

        return summary(self.data)

    def __str__(self) -> str:
        console = stdout()
        with console.capture() as capture:
            console.print(survival_table(self.data))
        return capture.get()


def merge(settings: dict[str, Any]) -> Report:
    resume, quiet = bool(settings.pop("resume", False)), bool(settings.pop("quiet", False))
    data, _ = direct.merge(make_recipe(settings), resume, TerminalProgress(quiet))
    return Report(data)


def measure(settings: dict[str, Any], targets: list[str] | None) -> list[Report]:
    quiet = bool(settings.pop("quiet", False))
    targets = targets or [settings.get("target", "nf4")]
    recipe = make_recipe({**settings, "target": targets[0]})
    return [Report(data) for data in run.measure(recipe, targets, TerminalProgress(quiet))]


def fidelity(
    out: str, text: str, against: tuple[str, str] | None, tokens: int = JUDGED_TOKENS, sequence_length: int = 512,
    device: str = "auto", quiet: bool = False,
) -> FidelityRecord:  # fmt: skip
    progress = TerminalProgress(quiet)
    return fidelity_of_folder(
        Path(out).expanduser(),
        Path(text).expanduser(),
        against=against,
        tokens=tokens,
        length=sequence_length,
        device=device,
        progress=progress,
    )
