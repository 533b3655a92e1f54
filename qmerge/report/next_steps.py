"""What to do after a merge, from its report; and the command that makes it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qmerge.formats import get_target
from qmerge.formats.serving import programs_for
from qmerge.gguf.output import FILE
from qmerge.recipe import Recipe
from qmerge.report.headline import CALIBRATE, OTHER_TEXT, needs_users_text
from qmerge.schema import ReportData, overall_kept

ENOUGH_KEPT = 0.95
"""Share of the delta above which nothing was lost that calibrated rounding could save, as in ``--rounding auto``."""

PROMOTED = "100MB"
"""Extra bytes of the command that leaves the worst weights dense."""

INPUTS_OF_PLAN = ("base", "revision", "adapter", "adapter_revision", "trained_on")
"""Fields of a recipe that ``qmerge plan`` needs to predict all targets."""


@dataclass(frozen=True)
class NextStep:
    """What to do, in a sentence, and the command that does it; None where there is none."""

    text: str
    command: str | None = None


def merge_command(recipe: Mapping[str, Any], **changes: Any) -> str:
    """The command line of a recipe, without options that have their defaults.

    Args:
        recipe: as ``qmerge.json`` has it; the output folder, which it does not name, is called OUT.
        changes: values of some fields instead of the recipe's.
    """
    settings = {**recipe, "out": "OUT", **changes}
    words = ["qmerge"]
    for field, info in Recipe.model_fields.items():
        value = settings.get(field)
        if value is None or (not info.is_required() and value == info.default):
            continue
        words += _option(field, value)
    return shlex.join(words)


def _option(field: str, value: Any) -> list[str]:
    flag = field.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    # Several adapters are one option each.
    values = value if isinstance(value, list) else [value]
    words = []
    for item in values:
        words += [f"--{flag}", f"{item}"]
    return words


def next_steps(report: ReportData) -> list[NextStep]:
    """What the report suggests, the most useful step first."""
    if not report.is_written:
        return _steps_to_write(report)
    fidelity = report.fidelity
    if fidelity is None:
        return _steps_without_verdict(report)
    if fidelity.verdict in ("damaged", "lost"):
        return _steps_to_repair(report)
    steps = []
    # A good verdict on text that is not the user's own does not tell about the task.
    if fidelity.text_kind in OTHER_TEXT:
        steps.append(NextStep("Measure it on a text of your own task:", "qmerge verify OUT --text FILE"))
    steps += _steps_to_use(report)
    if fidelity.verdict == "mostly kept":
        # Where calibration had other text, text of the task is the first thing to try.
        position = 0 if needs_users_text(report) else len(steps)
        steps.insert(position, _steps_to_repair(report)[0])
    return steps


def _steps_to_write(report: ReportData) -> list[NextStep]:
    """After ``qmerge measure``: the merge itself; something better first, where the model would be bad."""
    write = NextStep("Nothing was written. This merge writes the model:", merge_command(report.recipe))
    if report.fidelity and report.fidelity.verdict in ("damaged", "lost"):
        return [*_steps_to_repair(report), write]
    if report.fidelity is None:
        return [write, NextStep("To measure the whole model, add --verify FILE to this command or to qmerge measure.")]
    return [write]


def _steps_without_verdict(report: ReportData) -> list[NextStep]:
    steps = [
        NextStep(
            "Measure the whole model on text of your task (or merge again with --verify FILE):",
            "qmerge verify OUT --text FILE",
        )
    ]
    kept = overall_kept(report.total.values)
    if kept is not None and kept < ENOUGH_KEPT:
        steps += _steps_to_repair(report)[:1]
    return steps


def _steps_to_use(report: ReportData) -> list[NextStep]:
    steps = [NextStep("Check the files:", "qmerge verify OUT")]
    target = report.recipe["target"]
    programs = programs_for(target)
    # The commands are those of models that write text.
    if programs and report.fidelity and report.fidelity.judged == "next tokens":
        first = programs[0]
        remark = first.remarks.get(target)
        sentences = [f"Use it, for example with {first.title}."]
        if remark:
            sentences.append(f"{remark.replace('`', '')}.")
        if len(programs) > 1:
            sentences.append(f"It can also be loaded by {', '.join(program.title for program in programs[1:])}.")
        steps.append(NextStep(" ".join(sentences), first.command("OUT", file=FILE, on_hub=False)))
    return steps


def _steps_to_repair(report: ReportData) -> list[NextStep]:
    """How to keep more: calibrate on text of the task, or give the worst weights more room; or choose another target."""
    inputs = {name: report.recipe.get(name) for name in INPUTS_OF_PLAN}
    plan = merge_command(inputs, out=None).replace("qmerge", "qmerge plan", 1)
    other = "hoose another target. This predicts what each would keep:"
    changes: dict[str, Any] = {"calibration": "TRAINING.jsonl"}
    if "preserve" not in report.rounding:
        words = "Merge again with rounding that is calibrated on text like your training data:"
        changes["rounding"] = "preserve"
    elif report.calibration is None or not report.calibration.is_users_text:
        words = f"{CALIBRATE}, for example on your training data:"
    elif report.recipe.get("promote") or get_target(report.recipe["target"]).info.container:
        return [NextStep(f"C{other}", plan)]
    else:
        words = "Merge again, and leave the weights that keep least unquantized:"
        changes = {"promote": PROMOTED}
    return [NextStep(words, merge_command(report.recipe, **changes, out="OUT-2")), NextStep(f"Or c{other}", plan)]
