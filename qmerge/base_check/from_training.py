"""Answers that the adapter and its training folder give, so that the user need not: which base, and how training quantized it."""

from __future__ import annotations

from collections.abc import Callable

from qmerge import hub
from qmerge.adapters.combining.chain import adapter_folder
from qmerge.adapters.reading.folder import read_config
from qmerge.adapters.reading.named import find_adapter, split_reference
from qmerge.adapters.reading.training_folder import best_checkpoint, checkpoint_number, checkpoints_of, read_training
from qmerge.base_check.peft_options import text_setting
from qmerge.base_check.training_quantization import declared_base, stored_format_marks
from qmerge.errors import AdapterError, RecipeError, listed
from qmerge.formats import get_target
from qmerge.planning.inputs import Inputs
from qmerge.recipe import AS_STORED, AUTO_BASE, Recipe

GIVE_BASE = "give the model that it was trained on with --base ID|DIR"


def with_named_base(recipe: Recipe, report: Callable[[str], None]) -> Recipe:
    """The recipe with the base that its (first) adapter names, where it names none itself.

    Args:
        report: called with a line that says which base it is.

    Raises:
        RecipeError: the adapter is of a kind that names no base.
        AdapterError: the adapter cannot be read, names no base, or one that is not on this machine and not on the Hub.
    """
    if recipe.base != AUTO_BASE:
        return recipe
    reference = recipe.adapters[0][0]
    source = find_adapter(reference, recipe.adapter_revision)
    if source.file is not None:
        raise RecipeError(f"{source.file.name}: an adapter in a GGUF file does not name its base: {GIVE_BASE}")
    config = read_config(source.folder)
    # Its text as it is may be a folder here; an id is taken from it only where it is none.
    origin = declared_base(config)
    named = origin.text
    if not named:
        raise AdapterError(f"{reference}: adapter_config.json names no base: {GIVE_BASE}")
    if adapter_folder(named) is not None:
        raise AdapterError(
            f"{reference} was trained on top of another adapter ({named}): give both in order, with --combine chain: "
            f"--adapter {named} --adapter {reference}"
        )
    # A relative path is meant from here, as peft reads it.
    folder = hub.local_path(named)
    if folder is not None and folder.exists():
        report(f"base     {named}: the adapter names it")
        return recipe.model_copy(update={"base": named})
    if origin.id is None:
        raise AdapterError(
            f"the adapter names {named} as its base, which is not on this machine: {GIVE_BASE} (where it is here, or its Hub id)"
        )
    # A folder of the Hub's cache on another machine stands for an id and a commit.
    revision = recipe.revision or origin.commit or text_setting(config, "revision") or None
    report(f"base     {origin.id}{f' at {revision[:12]}' if revision else ''}: the adapter names it")
    return recipe.model_copy(update={"base": origin.id, "revision": revision})


def with_training(recipe: Recipe, inputs: Inputs) -> tuple[Recipe, list[str]]:
    """The recipe with ``trained_on`` where the training folders say that a dense base was quantized in memory.

    Returns:
        The recipe, and lines that say what was taken from the folders.
    """
    lines = _state_lines(recipe, inputs)
    if not _is_open(recipe, inputs) or not _can_quantize_first(recipe):
        return recipe, lines
    trainings = []
    for source, adapter in zip(inputs.adapter_sources, inputs.adapters, strict=True):
        # A checkpoint that is stored quantized was not quantized in memory: its own codes are what training saw.
        if stored_format_marks(declared_base(adapter.config)):
            return recipe, lines
        trainings.append(read_training(source.folder, adapter.config))
    # No answer of one adapter may hide that another one says nothing.
    answers = {training.quantization for training in trainings}
    # Adapters that were trained on different values of one base: whichever is taken, it is wrong for one of them.
    if len(answers) != 1 or not answers.isdisjoint({None, AS_STORED}):
        return recipe, lines
    trained_on = answers.pop()
    lines.append(
        f"training {trained_on}: {trainings[0].source} says that the base was quantized in memory. The delta is added to the "
        f"values that training saw (--trained-on {trained_on}); --merge-onto original adds it to the 16-bit weights instead"
    )
    return recipe.model_copy(update={"trained_on": trained_on}), lines


def recorded(recipe: Recipe, inputs: Inputs) -> Recipe:
    """The recipe as an output shows it (``Recipe.published``), with ``trained_on: none`` where ``with_training`` found no answer.

    So it makes the same model wherever it is run, whatever the adapter's folder there says.
    """
    published = recipe.published()
    return published.model_copy(update={"trained_on": AS_STORED}) if _is_open(recipe, inputs) else published


def _is_open(recipe: Recipe, inputs: Inputs) -> bool:
    """Whether the recipe leaves open how training quantized the base in memory."""
    has_answer = recipe.trained_on is not None or recipe.merge_onto == "original" or recipe.original is not None
    return not has_answer and not inputs.base.quantization


def _can_quantize_first(recipe: Recipe) -> bool:
    """Whether the target can be made from values that were quantized as in training; of auto, the choice can."""
    return recipe.target == "auto" or not get_target(recipe.target).info.takes_stacks


def _state_lines(recipe: Recipe, inputs: Inputs) -> list[str]:
    """Which state of a training was taken from its folder, a line for each adapter of which the user named none."""
    lines = []
    for (reference, _), source in zip(recipe.adapters, inputs.adapter_sources, strict=True):
        run = source.adapters_folder
        if run is None or split_reference(reference)[1] is not None:
            continue
        taken = source.folder.name
        if taken == hub.SAVED_BY_CALLBACK:
            lines.append(f"adapter  {taken} of {run.name}: QmergeCallback saved it at the end of the training")
            continue
        states = checkpoints_of(run)
        later = [name for name in states if checkpoint_number(name) > checkpoint_number(taken)]
        number = f" of {len(states)}" if len(states) > 1 else ""
        line = f"adapter  {taken} of {run.name}: its last checkpoint{number}"
        if later:
            verb = "has" if len(later) == 1 else "have"
            line = f"adapter  {run.name}: {listed(later)} {verb} no adapter; {taken} is taken"
        best = best_checkpoint(source.folder)
        if best:
            line += f". By its evaluation, {best} is better: --adapter {reference}#{best}"
        lines.append(line)
    return lines
