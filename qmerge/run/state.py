"""What a merge knows before its first step, and after its last one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmerge.checkpoint.parts import Part
from qmerge.errors import RecipeError
from qmerge.forecast.preflight import Preflight
from qmerge.pipeline import Outcome
from qmerge.planning.plan import Plan, Shard
from qmerge.progress import Progress
from qmerge.recipe import Recipe
from qmerge.run.residual import Residual
from qmerge.schema import FidelityRecord, InputRecord
from qmerge.weights.context import RunContext
from qmerge.wording import counted


@dataclass(frozen=True, kw_only=True)
class Run:
    """A merge that is ready to start.

    out        folder to write to
    preflight  what is known beforehand
    started    ``time.monotonic()`` when planning began
    part       which part of the model this process writes; None for all of it
    """

    recipe: Recipe
    plan: Plan
    context: RunContext
    out: Path
    preflight: Preflight
    progress: Progress
    started: float
    part: Part | None = None

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The output files that this process writes."""
        return shards_of_part(self.plan, self.part)


def shards_of_part(plan: Plan, part: Part | None) -> tuple[Shard, ...]:
    """The output files of a part, about the same number of bytes for each; all files without a part.

    Raises:
        RecipeError: there are more parts than files.
    """
    if part is None:
        return plan.shards
    if part.count > len(plan.shards):
        raise RecipeError(
            f"--shard {part}: --max-shard-size 500MB, for example, gives more files, or use fewer parts: the model has "
            f"{counted(len(plan.shards), 'file')} (--max-shard-size {plan.recipe.max_shard_size}), and each part writes at "
            f"least one"
        )
    mine = part.share({shard.file: shard.layout.most_bytes for shard in plan.shards})
    return tuple(shard for shard in plan.shards if shard.file in mine)


@dataclass(frozen=True, kw_only=True)
class Written:
    """What is known when all files with weights are written.

    records    the inputs
    device     name of the device that computed them
    files      name of an output file → its size and hash
    texts      name → content of the tensors whose size was known only at the end
    outcomes   what was measured of every merged weight
    residuals  LoRAs that compensate for the rounding, if they were asked for
    fidelity   of the whole model, where calibration measured it
    """

    records: list[InputRecord]
    device: str
    files: Mapping[str, Mapping[str, Any]]
    texts: Mapping[str, str]
    outcomes: Mapping[str, Outcome]
    residuals: Mapping[str, Residual]
    fidelity: FidelityRecord | None
