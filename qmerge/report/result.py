"""What the functions of ``import qmerge`` return. (Importing this does not import torch.)"""

from __future__ import annotations

from dataclasses import dataclass

from qmerge.schema import ReportData, Verdict, overall_kept


@dataclass(frozen=True)
class Report:
    """What a run did. It shows itself in a notebook, and as a table with ``print``.

    ``data`` is the content of qmerge.json (docs/qmerge-json.md).
    """

    data: ReportData

    @property
    def verdict(self) -> Verdict | None:
        """What became of the fine-tuning: ``"kept"``, ``"mostly kept"``, ``"damaged"`` or ``"lost"``.

        It is about the whole model, on tokens that rounding did not see; None where that was not measured (``verify`` does).
        """
        return self.data.fidelity.verdict if self.data.fidelity else None

    @property
    def gain_kept(self) -> float | None:
        """Share of the adapter's improvement of the loss that the whole model has; None where it was not measured."""
        return self.data.fidelity.gain_kept if self.data.fidelity else None

    @property
    def kl_ratio(self) -> float | None:
        """0: the whole model predicts like the adapter model, 1: as far off as the base; None where it was not measured."""
        return self.data.fidelity.kl_ratio if self.data.fidelity else None

    @property
    def kept(self) -> float | None:
        """Share of the delta that was kept, each weight counted by its ‖delta‖²; None for a delta of zero.

        Where calibration saw the layers' inputs, it is measured in the layers' outputs on the calibration text, which rounding
        was fitted to; else in the weights. A high share does not show that the whole model is good: ``verdict`` does.
        """
        return overall_kept(self.data.total.values)

    @property
    def noise(self) -> float | None:
        """Rounding error of the weights, ‖stored − merged‖ / ‖delta‖; None for a delta of zero."""
        return self.data.total.values["noise"]

    @property
    def warnings(self) -> list[str]:
        """What you should know before you use the model, one line each."""
        return self.data.warnings

    def _repr_html_(self) -> str:
        from qmerge.report.html import summary

        return summary(self.data)

    def __str__(self) -> str:
        from qmerge.report.terminal.console import stdout
        from qmerge.report.terminal.tables import report_tables

        console = stdout()
        with console.capture() as capture:
            for table in report_tables(self.data):
                console.print(table)
        return capture.get()


class LeftOut(str):
    """What a check returns that was not done: why, in one line."""


@dataclass(frozen=True)
class Check:
    """One check of a folder.

    ok           nothing wrong was found, which is also so where the check was left out
    found        one line, the result or the error
    is_warning   nothing is wrong with the files, but the model cannot be used as they are
    is_left_out  the check was not done; ``found`` says why
    """

    name: str
    ok: bool
    found: str
    is_warning: bool = False
    is_left_out: bool = False


class Checks(list[Check]):
    """The checks of a folder, in order."""

    @property
    def ok(self) -> bool:
        """Whether all of them passed."""
        return all(check.ok for check in self)
