"""qmerge merges QLoRA adapters into quantized language models and measures how much of the fine-tuning survives.

    report = qmerge.merge(base="base-nf4", adapter="adapter", target="nf4", out="merged")

Importing this package is quick; torch and the other libraries are imported by the first call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qmerge.api import fidelity, inspect, measure, merge, plan, push, verify
from qmerge.report.result import Checks, Report

if TYPE_CHECKING:
    from qmerge.training import QmergeCallback

__all__ = [
    "Checks",
    "QmergeCallback",
    "Report",
    "__version__",
    "fidelity",
    "inspect",
    "measure",
    "merge",
    "plan",
    "push",
    "verify",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """``QmergeCallback``, whose base class is of transformers, which takes seconds to import."""
    if name == "QmergeCallback":
        from qmerge.training import QmergeCallback

        return QmergeCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
