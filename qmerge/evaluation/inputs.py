"""The base, adapters and original that a finished folder was merged from, found again on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qmerge.errors import CheckpointError, QmergeError, listed
from qmerge.planning.inputs import Inputs, read_inputs
from qmerge.recipe import Recipe, find_inputs, make_recipe
from qmerge.report.records import changed_inputs
from qmerge.safetensors_io.reader import Reader
from qmerge.schema import NAME, ReportData


def located_recipe(report: ReportData, folder: Path, **changes: Any) -> Recipe:
    """The recipe of a finished folder, with names that lead to the inputs from here.

    Args:
        changes: settings to replace.
    """
    return make_recipe({**report.recipe, **find_inputs(report.recipe, folder), **changes})


def inputs_of_folder(recipe: Recipe, report: ReportData, reader: Reader, *, hashed: bool, option: str = "") -> Inputs:
    """Open the inputs that a folder was merged from.

    Args:
        recipe: from ``located_recipe``.
        option: what else can be done where an input is not at hand, in words.
        hashed: compare every input file with its SHA-256 in the report; else only its size.

    Raises:
        CheckpointError: an input is not at hand, or is not the one that was merged.
    """
    how = (
        f"{NAME} holds no absolute paths: {option}put the inputs (or links to them) next to the folder or, if they had relative "
        f"paths, start this command where the merge was started"
    )
    # A folder of the same name may be another model: without a comparison, its numbers would be about that one.
    try:
        inputs = read_inputs(recipe, reader)
    except QmergeError as cause:
        raise CheckpointError(f"{cause}. {how}") from cause
    changed = changed_inputs(inputs, report.inputs, hashed=hashed)
    if changed:
        raise CheckpointError(f"{listed(changed)}: not the file that was merged. {how}")
    return inputs
