"""Stacks of experts that are one weight on disk: their matrices are observed one by one, under names of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from qmerge.calibration.capture import with_expert_number, without_expert_number
from qmerge.rounding.base import InputStatistics, stack_statistics
from qmerge.types import Step


def matrix_names(step: Step) -> list[str]:
    """Names of the matrices that a step rounds by themselves: every one of a stack, or the weight."""
    if not step.source.transposed_stack:
        return [step.name]
    return [with_expert_number(step.name, number) for number in range(step.weight.shape[0])]


def steps_of(names: Iterable[str], steps: Mapping[str, Step]) -> list[Step]:
    """The steps that weights and matrices of stacks belong to, each once."""
    found = [steps.get(name) or steps[without_expert_number(name)] for name in names]
    return list({step.name: step for step in found}.values())


def of_stacks(steps: Iterable[Step], statistics: Mapping[str, InputStatistics]) -> dict[str, InputStatistics]:
    """Statistics of stacks by their names, from those of their matrices. A stack of which no matrix got a token is left out."""
    result = {}
    for step in steps:
        if step.source.transposed_stack:
            of_matrices = tuple(statistics.get(name) for name in matrix_names(step))
            if any(of_matrices):
                result[step.name] = stack_statistics(of_matrices)
    return result
