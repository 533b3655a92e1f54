"""A recipe becomes a finished folder: plan, check, walk the steps, publish; or the same without writing."""

from qmerge.run.merge_model import measure, merge

__all__ = ["measure", "merge"]
