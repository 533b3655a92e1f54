"""The most important number of a report, and where it was measured."""

from __future__ import annotations

from qmerge.schema import ReportData


def kept_of_what(report: ReportData) -> str:
    """What ``overall_kept`` is a share of; goes into "97 % … is kept".

    In the layers' outputs it is measured on the text that rounding was calibrated on, and is about 100 % by construction:
    it must not be read as a result on other text.
    """
    if report.outputs_measured:
        return f"of the adapter's effect on the layers' outputs on {report.calibration_text}"
    return "of the adapter's change to the weights"


def card_sentence(report: ReportData, kept: str) -> str:
    """The same for the model card (Markdown); ``kept`` is the share in words."""
    if not report.outputs_measured:
        return (
            f"**{kept}** of the adapter's change is in the stored weights (100 % is all of it, 0 % is the base; each weight "
            f"counts by the size of its change)."
        )
    tokens = f" ({report.calibration.tokens} tokens)" if report.calibration else ""
    return (
        f"**{kept}** of the adapter's effect on the layers' outputs is kept, measured on {report.calibration_text}{tokens}, "
        f"which the rounding was fitted to. Other text can give less: `qmerge verify` measures that on a held-out text."
    )
