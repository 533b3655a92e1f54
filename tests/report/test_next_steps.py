"""What a report suggests, and the commands in it: each is read again by the program's own parser."""

from __future__ import annotations

import shlex

import pytest
import typer

from qmerge.cli import app
from qmerge.formats.serving import programs_for
from qmerge.recipe import Recipe, make_recipe
from qmerge.report.headline import calibration_lines
from qmerge.report.next_steps import merge_command, next_steps
from qmerge.schema import CalibrationRecord, FidelityRecord, ReportData

from .reports import HOSTILE, fidelity, report

SETTINGS = {
    "base": "owner/base", "adapter": ["one=0.5", "two words"], "target": "gptq", "combine": "ties", "density": 0.3,
    "bits": 3, "sym": False, "act_order": True, "rounding": "preserve", "calibration": "text.jsonl", "verify": "h.txt",
    "max_shard_size": "1GB", "sequential": False, "seed": 7,
}  # fmt: skip


def parsed(command: str) -> dict[str, object]:
    """The options of a command line, as the program reads them."""
    program, *words = shlex.split(command)
    assert program == "qmerge"
    group = typer.main.get_command(app)
    name = words.pop(0) if words[0] in group.commands else None  # type: ignore[attr-defined]
    parser = group.commands[name] if name else group  # type: ignore[attr-defined]
    context = parser.make_context("qmerge", list(words))
    return {
        key: value
        for key, value in context.params.items()
        if value not in (None, False, (), []) or f"--no-{key}" in words
    }


def test_the_command_makes_the_recipe_again() -> None:
    recipe = make_recipe({**SETTINGS, "out": "OUT"})
    command = merge_command(recipe.published().model_dump(exclude_none=True))
    options = {key: value for key, value in parsed(command).items() if key in Recipe.model_fields}
    assert make_recipe({**options, "adapter": list(options["adapter"])}) == recipe  # type: ignore[call-overload]


def test_names_are_quoted() -> None:
    command = merge_command({"base": "$(reboot)", "adapter": HOSTILE, "target": "nf4"})
    assert shlex.split(command) == [
        "qmerge",
        "--base",
        "$(reboot)",
        "--adapter",
        HOSTILE,
        "--target",
        "nf4",
        "--out",
        "OUT",
    ]


def test_defaults_are_left_out() -> None:
    recipe = make_recipe({"base": "b", "adapter": "a", "target": "nf4", "out": "OUT"})
    assert merge_command(recipe.model_dump()) == "qmerge --base b --adapter a --target nf4 --out OUT"


CALIBRATED = "--rounding preserve --calibration TRAINING.jsonl"
LOST = fidelity(0.0, 1.0)
KEPT = fidelity(0.99, 0.001)
GENERAL = fidelity(0.99, 0.001, text_kind="general")
GENERATED = fidelity(0.9, 0.1, text_kind="generated")
USERS_TEXT = CalibrationRecord(source="mine.txt", tokens=16384)
OF_THE_MODEL = CalibrationRecord(source="generate", tokens=16384)
# Name → verdict, calibration (None: nearest rounding), and what the commands contain.
CASES: dict[str, tuple[FidelityRecord | None, CalibrationRecord | None, list[str]]] = {
    "unmeasured": (None, None, ["verify OUT --text FILE", CALIBRATED]),
    "kept": (KEPT, None, ["qmerge verify OUT"]),
    "kept on general text": (GENERAL, None, ["--text FILE", "qmerge verify OUT"]),
    "mostly kept": (fidelity(0.9, 0.1), None, ["qmerge verify OUT", CALIBRATED]),
    "mostly kept on the model's text": (
        GENERATED,
        OF_THE_MODEL,
        ["--calibration TRAINING.jsonl", "--text FILE", "verify OUT"],
    ),
    "lost by nearest": (LOST, None, [CALIBRATED, "qmerge plan --base b"]),
    "lost on the model's text": (LOST, OF_THE_MODEL, ["--calibration TRAINING.jsonl", "qmerge plan"]),
    "lost on the user's text": (LOST, USERS_TEXT, ["--promote 100MB", "qmerge plan"]),
}


def shown(case: str) -> tuple[ReportData, list[str]]:
    judged, calibration, expected = CASES[case]
    rounding = "preserve" if calibration else "nearest"
    recipe = {"base": "b", "adapter": "a", "target": "nf4", "rounding": rounding}
    changes = {"recipe": recipe, "rounding": rounding, "calibration": calibration}
    return report(fidelity=judged).model_copy(update=changes), expected


@pytest.mark.parametrize("case", CASES)
def test_steps_are_commands_that_the_program_reads(case: str) -> None:
    measured, expected = shown(case)
    commands = [step.command for step in next_steps(measured) if step.command and step.command.startswith("qmerge")]
    assert len(commands) == len(expected)
    for command, words in zip(commands, expected, strict=True):
        assert words in command
        assert parsed(command.replace(" FILE", " f.txt"))


@pytest.mark.parametrize("more", [{"target": "q4_k_m"}, {"promote": "100MB"}])
def test_dense_weights_are_not_advised_where_they_cannot_be_or_are_already(more: dict[str, str]) -> None:
    measured, _ = shown("lost on the user's text")
    steps = next_steps(measured.model_copy(update={"recipe": {**measured.recipe, **more}}))
    assert "Choose another target. This predicts what each would keep:" in [step.text for step in steps]
    assert not any(
        "--promote 100MB --out" in (step.command or "") or "leave the weights" in step.text for step in steps
    )


def test_text_of_the_task_is_the_first_advice_where_calibration_had_none() -> None:
    measured, _ = shown("mostly kept on the model's text")
    assert next_steps(measured)[0].text.startswith("Calibrate on text of your task")
    assert calibration_lines(measured) == [
        "Rounding was calibrated on text that the model wrote. Calibrate on text of your task to keep more: --calibration FILE"
    ]
    for changes in ({"fidelity": KEPT}, {"calibration": USERS_TEXT}, {"rounding": "nearest", "calibration": None}):
        assert not calibration_lines(measured.model_copy(update=changes)), changes


def test_what_was_only_measured_is_written_first() -> None:
    """No command is about a folder that does not exist."""
    unwritten = {"outputs": []}
    (step,) = next_steps(shown("kept")[0].model_copy(update=unwritten))
    assert step.command and parsed(step.command)["out"] and "Nothing was written" in step.text
    assert "--verify FILE" in next_steps(shown("unmeasured")[0].model_copy(update=unwritten))[1].text
    steps = next_steps(shown("lost by nearest")[0].model_copy(update=unwritten))
    assert [CALIBRATED in (step.command or "") for step in steps] == [True, False, False]
    assert all("verify OUT" not in (step.command or "") for step in steps)


def test_what_is_kept_is_used_and_not_repaired() -> None:
    check, use = next_steps(shown("kept")[0])
    assert check.command == "qmerge verify OUT"
    program, *others = programs_for("nf4")
    assert program.name == "transformers", "vLLM may drop the format"
    assert use.command == program.command("OUT", on_hub=False) and "OUT" in use.command
    assert program.title in use.text and all(other.title in use.text for other in others)
    assert len(next_steps(report(recipe={"target": "nowhere"}, fidelity=KEPT))) == 1
