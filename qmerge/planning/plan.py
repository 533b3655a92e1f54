"""Headers → steps. Everything that can be wrong with the inputs is found here, before a byte is written.

Every adapter tensor is used exactly once, or nothing starts. Reads headers, configs, the adapter, and no weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qmerge.checkpoint.scan import SINGLE
from qmerge.errors import CheckpointError, RecipeError
from qmerge.formats import all_formats, get_format
from qmerge.pipeline import RunContext, compute_device
from qmerge.planning.inputs import Inputs, read_inputs
from qmerge.planning.memory import block_entries, step_memory
from qmerge.planning.steps import StepMaker
from qmerge.recipe import Recipe, make_recipe, parse_size
from qmerge.safetensors_io import writer
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Step


@dataclass(frozen=True)
class Shard:
    """One output file and the steps that write to it."""

    file: str
    steps: tuple[Step, ...]

    @cached_property
    def layout(self) -> writer.FileLayout:
        return writer.FileLayout.of({name: spec for step in self.steps for name, spec in step.outputs.items()})


@dataclass(frozen=True)
class Plan:
    """What will happen, weight by weight."""

    recipe: Recipe
    inputs: Inputs
    steps: tuple[Step, ...]
    shards: tuple[Shard, ...]
    config: dict[str, Any]
    block_entries: int
    promoted: frozenset[str] = frozenset()

    @property
    def merged(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.action == "merge")

    @property
    def rounded(self) -> tuple[Step, ...]:
        """The merged weights, and the others that are rounded with calibration because they come onto a fresh grid."""
        return tuple(
            s for s in self.steps if s.action == "merge" or (s.action == "convert" and s.rounding == "preserve")
        )

    @property
    def bytes_in(self) -> int:
        return sum(step.weight.nbytes + (step.original.nbytes if step.original else 0) for step in self.steps)

    @property
    def bytes_out(self) -> int:
        return sum(shard.layout.most_bytes for shard in self.shards)

    @property
    def bits_per_weight(self) -> float:
        """Of the weights that are stored in the target's format, scales included."""
        stored = [step for step in self.steps if step.target == self.recipe.target]
        nbytes = sum(max(0, spec.nbytes) for step in stored for spec in step.outputs.values())
        return 8 * nbytes / max(1, sum(math.prod(step.shape) for step in stored))

    @property
    def peak_memory(self) -> int:
        """Bytes for the weights being worked on (the interpreter and its libraries come on top, about 0.6 GB)."""
        return max((step_memory(step, self.block_entries) for step in self.steps), default=0) * self.recipe.workers


def make_plan(recipe: Recipe, reader: Reader) -> Plan:
    """Resolve the inputs and decide what happens to every weight.

    Raises:
        RecipeError, CheckpointError, AdapterError: the inputs do not fit together; the message names the first thing.
        RoomError: one row of the largest weight does not fit into ``max_memory``.
    """
    return plan_from(recipe, read_inputs(recipe, reader))


def plan_from(recipe: Recipe, inputs: Inputs, promoted: frozenset[str] = frozenset()) -> Plan:
    """The plan for inputs that have been read already (``measure`` makes several from the same inputs).

    Args:
        promoted: weights that stay dense, in the model's own dtype, beside a quantized target.
    """
    check_recipe(recipe, inputs)
    maker = StepMaker(recipe, inputs, promoted)
    changes = maker.changes()
    steps = tuple(maker.step(weight, changes.get(weight.name)) for weight in maker.weights.values())
    applied = sum(step.update is not None or step.replacement is not None for step in steps)
    assert applied == len(changes), "a change was matched, but no step applies it"
    entries = block_entries(recipe, steps)
    return Plan(
        recipe,
        inputs,
        steps,
        shards_of(steps, parse_size(recipe.max_shard_size)),
        maker.config(steps),
        entries,
        promoted,
    )


def make_run_context(plan: Plan, reader: Reader) -> RunContext:
    """Where the steps of a plan are done.

    Raises:
        RecipeError: cuda was asked for, and there is none.
    """
    return RunContext(reader, compute_device(plan.recipe.device), plan.recipe.seed, plan.block_entries)


def check_recipe(recipe: Recipe, inputs: Inputs) -> None:
    quantized = bool(inputs.base.quantization)
    if recipe.trained_on and quantized:
        raise RecipeError(
            f"--trained-on {recipe.trained_on}: the base is quantized already; its own codes are what was seen"
        )
    if recipe.merge_onto == "original" and quantized and not recipe.original:
        raise RecipeError(
            "--merge-onto original: the base is quantized, so --original (its 16-bit model) is needed too"
        )
    if recipe.original and not quantized:
        raise RecipeError("--original is for a quantized base; this one is dense and is the original itself")
    if inputs.original and inputs.original.quantization:
        raise CheckpointError(f"--original {recipe.original} is quantized itself; expected a dense 16- or 32-bit model")
    target = get_format(recipe.target)
    for name in recipe.asked.keys() - set(target.accepted_options):
        takers = [known for known, taker in all_formats().items() if name in taker.accepted_options]
        raise RecipeError(f"--{name.replace('_', '-')} is for {', '.join(takers)}, but the target is {recipe.target}")


def shards_of(steps: tuple[Step, ...], limit: int) -> tuple[Shard, ...]:
    """Steps in the base's order, cut into files of at most ``limit`` bytes (a larger weight gets its own)."""
    groups: list[list[Step]] = [[]]
    size = 0
    for step in steps:
        nbytes = sum(max(0, spec.nbytes) for spec in step.outputs.values())
        if groups[-1] and size + nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(step)
        size += nbytes
    count = len(groups)
    names = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    return tuple(Shard(name, tuple(group)) for name, group in zip(names, groups, strict=True))


def retargeted(recipe: Recipe, target: str) -> Recipe:
    """The same recipe for another target, without options that the other target lacks."""
    lacking: dict[str, Any] = {name: None for name in recipe.asked if name not in get_format(target).accepted_options}
    lacking["max_size"] = None
    return make_recipe({**recipe.model_dump(), "target": target, **lacking})
