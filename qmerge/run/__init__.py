"""Runs a recipe: ``merge`` writes a model folder, ``measure`` does the same work without writing it."""

from qmerge.run.measure_targets import check_targets, measure
from qmerge.run.merge_model import merge

__all__ = ["check_targets", "measure", "merge"]
