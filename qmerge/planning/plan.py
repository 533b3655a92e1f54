"""Headers → steps. Every error in the inputs is found here, before a byte is written.

Reads headers, configs and the adapter, but no weight. Every adapter tensor is used exactly once, or the run does not
start.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from qmerge.checkpoint.scan import SINGLE
from qmerge.errors import CheckpointError, RecipeError
from qmerge.formats import all_targets, get_target
from qmerge.gguf.output import FILE as GGUF_FILE
from qmerge.gguf.output import GgufOutput
from qmerge.planning.inputs import Inputs, read_inputs
from qmerge.planning.memory import WEIGHTS_MEMORY, block_entries, step_memory
from qmerge.planning.steps import StepMaker
from qmerge.recipe import Recipe, make_recipe, parse_size
from qmerge.rounding.base import EFFORTS
from qmerge.safetensors_io import writer
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Step, TensorSpec
from qmerge.weights.context import RunContext, compute_device

LIBRARIES_BYTES = 600_000_000
"""Memory that the interpreter and its libraries take."""


@dataclass(frozen=True)
class Shard:
    """One output file and the steps that write to it. ``gguf``: it is a GGUF file."""

    file: str
    steps: tuple[Step, ...]
    gguf: GgufOutput | None = None

    @cached_property
    def layout(self) -> writer.FileLayout:
        """Names, dtypes and shapes of the tensors in the file, and where their bytes go."""
        if self.gguf is not None:
            return self.gguf.layout(self.steps)
        specs: dict[str, TensorSpec] = {}
        for step in self.steps:
            specs.update(step.outputs)
        return writer.FileLayout.of(specs)


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """How a run calibrates, as the recipe asks for it.

    source           a text file, a dataset on the Hub, ``generate``, ``general``, ``random`` or ``none``; None or ``default``:
                     ``generate``, with ``random`` or ``none`` in its place where it cannot be done
    tokens           tokens to calibrate on
    sequence_length  tokens per sequence
    sequential       each layer is calibrated after the layers before it were rounded
    seed             of random and of generated tokens
    """

    source: str | None
    tokens: int
    sequence_length: int
    sequential: bool
    seed: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run does, weight by weight.

    recipe         read by the report and the journal, which name every setting, and for the comparison with the settings
                   that the adapter declares; everything else that a stage needs has a field of its own
    inputs         the base and the adapters
    target         name of the format to write
    merge_onto     the values that the delta is added to: ``dequantized`` or ``original``
    steps          one per weight, in the order of the base
    shards         the same steps, by output file
    make_config    makes ``config``
    calibration    how ``preserve`` is calibrated
    block_entries  float32 values of a weight to work on at a time
    workers        steps to work on at once
    promoted       names of weights that stay dense although the target is quantized
    """

    recipe: Recipe
    inputs: Inputs
    target: str
    merge_onto: Literal["dequantized", "original"]
    steps: tuple[Step, ...]
    shards: tuple[Shard, ...]
    make_config: Callable[[], dict[str, Any]]
    calibration: CalibrationSettings
    block_entries: int
    workers: int
    promoted: frozenset[str] = frozenset()

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json of the output. For some targets it takes seconds, because transformers builds the model for it."""
        return self.make_config()

    @property
    def is_gguf(self) -> bool:
        """Whether the output is a GGUF file."""
        return get_target(self.target).info.container == "gguf"

    @cached_property
    def merged(self) -> tuple[Step, ...]:
        """The steps that apply an update."""
        return tuple(step for step in self.steps if step.action == "merge")

    @cached_property
    def rounded(self) -> tuple[Step, ...]:
        """The merged weights, and those that ``preserve`` rounds although no update changes them."""
        return tuple(step for step in self.steps if step.action == "merge" or _is_preserved_conversion(step))

    @property
    def uses_preserve(self) -> bool:
        """Whether ``preserve`` rounds any weight."""
        return any(step.rounding == "preserve" for step in self.rounded)

    @property
    def bytes_in(self) -> int:
        """Bytes of all weights that are read."""
        return sum(step.source.nbytes for step in self.steps)

    @property
    def bytes_out(self) -> int:
        """Bytes of all output files with weights (at most: the length of texts is known at the end)."""
        return sum(shard.layout.most_bytes for shard in self.shards)

    @property
    def bits_per_weight(self) -> float:
        """Bits per value of the weights that are stored in the target format, scales included."""
        nbytes = 0
        values = 0
        for step in self.steps:
            if step.target == self.target:
                nbytes += output_bytes(step)
                values += math.prod(step.shape)
        return 8 * nbytes / max(1, values)

    @property
    def peak_memory(self) -> int:
        """Bytes for the weights that are worked on at once, without ``LIBRARIES_BYTES``."""
        # Each worker may be at its peak at the same time.
        return self.workers * max((step_memory(step, self.block_entries) for step in self.steps), default=0)


def output_bytes(step: Step) -> int:
    """Bytes of the tensors that a step writes, without texts whose length is known at the end."""
    # The shape of such a text is (-1,): its bytes are negative.
    return sum(max(0, spec.nbytes) for spec in step.outputs.values())


def _is_preserved_conversion(step: Step) -> bool:
    return step.action == "convert" and step.rounding == "preserve"


def make_plan(recipe: Recipe, reader: Reader) -> Plan:
    """Resolve the inputs and decide what happens to every weight.

    Raises:
        RecipeError, CheckpointError, AdapterError: the inputs do not fit together; the message names the first problem.
        RoomError: the largest weight does not fit into ``max_memory`` even in the smallest row blocks.
    """
    return plan_from(recipe, read_inputs(recipe, reader))


def plan_from(recipe: Recipe, inputs: Inputs, promoted: frozenset[str] = frozenset()) -> Plan:
    """The plan for inputs that have been read already. (``measure`` makes several plans from the same inputs.)

    Args:
        promoted: names of weights that stay dense, in the model's own dtype, although the target is quantized.

    Raises:
        As ``make_plan``.
    """
    check_recipe(recipe, inputs)
    maker = StepMaker(recipe, inputs, promoted)
    changes = maker.changes()
    steps = tuple(maker.step(weight, changes.get(weight.name)) for weight in maker.weights.values())
    unchanged = [step for step in steps if step.update is None and step.replacement is None]
    assert len(steps) - len(unchanged) == len(changes), "a change was matched, but no step applies it"
    maker.check(steps)
    entries = block_entries(steps, recipe.max_memory or WEIGHTS_MEMORY, recipe.threads)
    return Plan(
        recipe=recipe,
        inputs=inputs,
        target=recipe.target,
        merge_onto=recipe.merge_onto,
        steps=steps,
        shards=shards_of(steps, parse_size(recipe.max_shard_size), maker.gguf),
        make_config=lambda: maker.config(steps),
        calibration=CalibrationSettings(
            source=recipe.calibration,
            tokens=recipe.calibration_tokens or EFFORTS[recipe.effort].tokens,
            sequence_length=recipe.sequence_length,
            sequential=recipe.sequential,
            seed=recipe.seed,
        ),
        block_entries=entries,
        workers=recipe.threads,
        promoted=promoted,
    )


def make_run_context(plan: Plan, reader: Reader, device_name: str | None = None) -> RunContext:
    """Where the steps of a plan are done.

    Args:
        device_name: instead of the recipe's device.

    Raises:
        RecipeError: the recipe asks for CUDA, and torch finds no CUDA device.
    """
    device = compute_device(device_name or plan.recipe.device)
    return RunContext(
        reader=reader,
        device=device,
        seed=plan.recipe.seed,
        block_entries=plan.block_entries,
        effort=plan.recipe.effort,
    )


def check_recipe(recipe: Recipe, inputs: Inputs) -> None:
    """Check the recipe against the inputs.

    Raises:
        RecipeError: an option does not suit the base or the target.
        CheckpointError: the original is quantized.
    """
    base_is_quantized = bool(inputs.base.quantization)
    if recipe.trained_on_format and base_is_quantized:
        raise RecipeError(
            f"--trained-on {recipe.trained_on} is for a dense base, but this base is quantized: leave --trained-on out; the "
            f"adapter was trained on the base's own codes"
        )
    if recipe.merge_onto == "original" and base_is_quantized and not recipe.original:
        raise RecipeError(
            "--merge-onto original: the base is quantized; give the 16-bit model that it was made from with --original"
        )
    if recipe.original and not base_is_quantized:
        raise RecipeError("--original is for a quantized base, but this base is dense: leave --original out")
    if inputs.original and inputs.original.quantization:
        raise CheckpointError(
            f"--original {recipe.original} is quantized; expected the dense 16- or 32-bit model that the base was made from"
        )
    if recipe.promote and get_target(recipe.target).info.container:
        raise RecipeError(
            f"--promote: a GGUF file has the types of its mix ({recipe.target}): leave it out, or use q8_0 or q6_k"
        )
    accepted = get_target(recipe.target).info.accepted_options
    for name in recipe.format_options.keys() - set(accepted):
        # Which targets have this option: the user may have forgotten --target.
        accepting = [known for known, fmt in all_targets().items() if name in fmt.info.accepted_options]
        raise RecipeError(
            f"--{name.replace('_', '-')} is for {', '.join(accepting)}, but the target is {recipe.target}: leave it out"
        )


def shards_of(steps: tuple[Step, ...], limit: int, gguf: GgufOutput | None) -> tuple[Shard, ...]:
    """Steps in the base's order, cut into files of at most ``limit`` bytes. A larger weight gets a file of its own.

    A GGUF file is one.
    """
    if gguf is not None:
        return (Shard(GGUF_FILE, steps, gguf),)
    groups: list[list[Step]] = [[]]
    size = 0
    for step in steps:
        nbytes = output_bytes(step)
        if groups[-1] and size + nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(step)
        size += nbytes
    return tuple(Shard(_shard_name(i, len(groups)), tuple(group)) for i, group in enumerate(groups, 1))


def _shard_name(number: int, count: int) -> str:
    """File name as transformers' save_pretrained gives it."""
    return SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def retargeted(recipe: Recipe, target: str) -> Recipe:
    """The same recipe for another target, without the options that the other target does not have."""
    accepted = get_target(target).info.accepted_options
    dropped: dict[str, Any] = dict.fromkeys(recipe.format_options.keys() - set(accepted))
    # max_size belongs to target auto, which this recipe is no longer.
    return make_recipe({**recipe.model_dump(), "target": target, **dropped, "max_size": None})
