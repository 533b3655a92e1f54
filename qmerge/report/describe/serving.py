"""`qmerge plan --for PROGRAM`: the target that fits the program which will serve the model, among those that are possible here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qmerge import plugins
from qmerge.errors import RecipeError
from qmerge.forecast.targets import Candidate
from qmerge.formats import get_target
from qmerge.formats.serving import PACKAGES, PROGRAMS, Program
from qmerge.gguf.output import FILE

COLAB = "colab"

OTHER_NAMES = {
    COLAB: "transformers", "kaggle": "transformers", "hf": "transformers", "huggingface": "transformers",
    "llamacpp": "llama.cpp", "llama-cpp": "llama.cpp", "mlx_lm": "mlx", "mlx-lm": "mlx", "mac": "mlx",
    "lm-studio": "lmstudio",
}  # fmt: skip
"""What users may type → a program. On Colab, it is transformers that loads a model."""

COLAB_REMARK = (
    "a T4 of Colab has 15 GB: in 4 bits that is a model of up to about 20 billion parameters, in 16 bits 6 billion"
)

BITS_OF_8, BITS_OF_16 = (7.5, 9.0), (15.5, 16.5)
"""Bits per weight, scales included, of targets that are called 8-bit and 16-bit."""


def find_program(name: str) -> Program:
    """The program that a user names.

    Raises:
        RecipeError: there is none of this name.
    """
    lower = name.lower()
    known = OTHER_NAMES.get(lower, lower)
    if known not in PROGRAMS:
        raise RecipeError(f"--for: no program is called {name!r}. {plugins.suggestion(lower, [*PROGRAMS, COLAB])}")
    return PROGRAMS[known]


def describe_serving(name: str, candidates: Sequence[Candidate], target: str | None) -> dict[str, Any]:
    """Which target to write for a program, the command that serves it, and what to know: the JSON key ``serve``.

    Args:
        name: of the program, as the user typed it.
        candidates: all targets for these inputs.
        target: the one that the user asks for; None where none is given.

    Raises:
        RecipeError: the program is unknown.
    """
    program = find_program(name)
    # In the program's own order, which is that of its users' choices.
    possible = {candidate.target: candidate for candidate in candidates if candidate.impossible is None}
    choices = [possible[known] for known in program.targets if known in possible]
    best = _best(program, choices)
    remarks = _remarks(program, [choice.target for choice in choices])
    if name.lower() == COLAB:
        remarks.append(COLAB_REMARK)
    if target and target not in program.targets:
        # The first thing to know, since the user has asked for this target.
        remarks.insert(0, f"{target}: {program.title} does not load it")
    return {
        "program": program.title,
        "targets": [choice.target for choice in choices],
        "recommended": best.target if best else None,
        "8 bits": _first_with(choices, *BITS_OF_8),
        "16 bits": _first_with(choices, *BITS_OF_16),
        "command": _command(program),
        "needs": _needs(program, best),
        "remarks": remarks,
    }


def first_choice(name: str) -> str:
    """The target that a program is given where nothing else is known."""
    return find_program(name).targets[0]


def _best(program: Program, choices: Sequence[Candidate]) -> Candidate | None:
    """The base's own format, which changes the model least, unless the program may drop it; else the program's first choice."""
    for choice in choices:
        # A dense base keeps its values in a dense target, but that does not choose a size.
        info = get_target(choice.target).info
        if choice.keeps_grid and info.is_quantized and choice.target not in program.remarks:
            return choice
    return choices[0] if choices else None


def _first_with(choices: Sequence[Candidate], least: float, most: float) -> str | None:
    return next((choice.target for choice in choices if least <= choice.bits <= most), None)


def _command(program: Program) -> str | None:
    """The shell command for a merged folder; None for a program that is a Python library."""
    if program.language != "sh":
        return None
    return " && ".join(program.command("OUT", file=FILE, on_hub=False).splitlines())


def _needs(program: Program, best: Candidate | None) -> str:
    packages = PACKAGES.get(best.target, "") if best and program.name == "transformers" else ""
    return " and ".join(filter(None, (program.needs, packages)))


def _remarks(program: Program, targets: Sequence[str]) -> list[str]:
    """``nf4, fp4, int8: vLLM discusses …``: one line for all targets with the same remark."""
    targets_of_remark: dict[str, list[str]] = {}
    for target in targets:
        if target in program.remarks:
            targets_of_remark.setdefault(program.remarks[target], []).append(target)
    return [f"{', '.join(names)}: {text.replace('`', '')}" for text, names in targets_of_remark.items()]
