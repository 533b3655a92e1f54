"""Numbers about one merged weight, one file each: how much of the delta survives, how large the error is, and why.

A plug-in defines ``METRIC``, a ``Metric`` (see ``base.py``), and its docstring's first line is its help text.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from qmerge import plugins

if TYPE_CHECKING:  # this package itself: its import would bring torch before anything is measured
    from qmerge.metrics.base import Metric


def get_metric(name: str) -> Metric:
    """The metric of that name.

    Raises:
        RecipeError: there is none; the message lists those that exist.
    """
    metric: Metric = plugins.load("metrics", name).METRIC
    return metric


@cache
def all_metrics() -> dict[str, Metric]:
    """Every metric, by name."""
    return {name: get_metric(name) for name in plugins.names("metrics")}
