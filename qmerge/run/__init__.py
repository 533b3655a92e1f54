"""Runs a recipe: ``merge`` writes a model folder, ``measure`` does the same work without writing it; ``merge_part`` and
``finalize`` write a model with several processes."""

from qmerge.run.measure_targets import check_targets, measure
from qmerge.run.merge_model import merge
from qmerge.run.parts import finalize, merge_part
from qmerge.run.ray_tasks import merge_with_ray

__all__ = ["check_targets", "finalize", "measure", "merge", "merge_part", "merge_with_ray"]
