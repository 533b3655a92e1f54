"""The checks of ``qmerge verify``, a line each."""

from __future__ import annotations

from qmerge.report.result import Check
from qmerge.report.terminal.console import printable
from qmerge.schema import FidelityRecord


def llama_cpp_line(record: FidelityRecord) -> str:
    """What llama.cpp made of a text, as the result of a check."""
    return (
        f"as it runs the file, on {record.tokens} tokens: loss {record.loss_merged:.3f} (base {record.loss_base:.3f}, unmerged "
        f"{record.loss_unmerged:.3f}), KL ratio {record.kl_ratio or 0:.4f}"
    )


def check_line(check: Check) -> str:
    """``ok     hashes: 1 file``: one check of ``qmerge verify``. One that was left out has found nothing, and is not ok."""
    mark = "ok"
    if not check.ok:
        mark = "FAILED"
    elif check.is_left_out:
        mark = "-"
    elif check.is_warning:
        mark = "WARN"
    return printable(f"{mark:<6} {check.name}: {check.found}")
