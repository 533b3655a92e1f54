"""qmerge merges QLoRA adapters into quantized language models and measures how much of the fine-tuning survives.

    report = qmerge.merge(base="base-nf4", adapter="adapter", target="nf4", out="merged")

Importing this package is quick; torch and the other libraries are imported by the first call.
"""

from __future__ import annotations

from qmerge.api import fidelity, inspect, measure, merge, plan, verify
from qmerge.report.result import Checks, Report

__all__ = ["Checks", "Report", "__version__", "fidelity", "inspect", "measure", "merge", "plan", "verify"]
__version__ = "0.1.0"
