"""Every target for these inputs: how large the model would be, and what nearest rounding would leave; the best that fits.

Reads headers, the adapter, and a few rows of each adapted weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qmerge.errors import CheckpointError, RecipeError, RoomError
from qmerge.forecast.predict import predict, total_kept, total_noise
from qmerge.forecast.preflight import NEAREST_IS_ENOUGH, with_roundings
from qmerge.formats import all_targets, get_target
from qmerge.planning.inputs import Inputs
from qmerge.planning.plan import make_run_context, plan_from, retargeted
from qmerge.recipe import Recipe, parse_size
from qmerge.safetensors_io.reader import Reader

NEGLIGIBLE = 0.02
"""Noise, in deltas, below which more bits buy nothing."""


@dataclass(frozen=True)
class Candidate:
    """One target, with its defaults. ``kept``, ``noise`` and ``gap_to_delta`` are what nearest rounding would leave (None
    for a delta of zero). ``disturbance``: noise, in deltas, of a rounding that keeps the delta. ``impossible`` says why the
    target cannot be, and then the rest means nothing."""

    target: str
    loaders: str
    impossible: str | None = None
    nbytes: int = 0
    bits: float = 0.0
    kept: float | None = None
    noise: float | None = None
    gap_to_delta: float | None = None
    keeps_grid: bool = False
    disturbance: float = 0.0


def all_candidates(recipe: Recipe, inputs: Inputs, reader: Reader) -> list[Candidate]:
    """The smallest first; those that cannot be last."""
    found = [candidate(recipe, name, inputs, reader) for name in all_targets()]
    return sorted(found, key=lambda c: (c.impossible is not None, c.nbytes, c.target))


def candidate(recipe: Recipe, name: str, inputs: Inputs, reader: Reader) -> Candidate:
    loaders = get_target(name).info.loaders
    try:
        plan = plan_from(retargeted(recipe, name), inputs)
        context = make_run_context(plan, reader)
        survivals = predict(plan, context)
        kept, noise = total_kept(survivals), total_noise(survivals)
        keeps_grid = all(step.source.keeps_grid for step in plan.merged)
        disturbance = noise
        if keeps_grid and kept is not None and kept < NEAREST_IS_ENOUGH:  # nearest is quiet because nothing moves
            at_random = dict.fromkeys((step.name for step in plan.merged), "stochastic")
            disturbance = total_noise(predict(with_roundings(plan, at_random), context))
    except (RecipeError, CheckpointError, RoomError) as error:
        return Candidate(name, loaders, impossible=str(error))
    gaps = sorted(s.gap_to_delta for s in survivals if s.gap_to_delta is not None)
    return Candidate(
        name, loaders, None, plan.bytes_out, plan.bits_per_weight, kept, noise, gaps[len(gaps) // 2] if gaps else None,
        keeps_grid, disturbance or 0.0,
    )  # fmt: skip


def resolve_auto(recipe: Recipe, inputs: Inputs, reader: Reader) -> tuple[Recipe, str]:
    """``--target auto``: the recipe with the target that is disturbed least among those that fit, and why it is that one.

    The noise that it takes to keep the delta ranks formats as whole models are ranked (docs/choosing-a-target.md). What is
    negligible counts alike, and then the smaller wins.

    Raises:
        RecipeError: nothing fits.
    """
    assert recipe.max_size is not None
    found = all_candidates(recipe, inputs, reader)
    possible = [
        c
        for c in found
        if c.impossible is None and recipe.asked.keys() <= set(get_target(c.target).info.accepted_options)
    ]
    if not possible:
        plan_from(
            retargeted(recipe, found[0].target), inputs
        )  # what is wrong with the inputs is said by whoever finds it
        raise RecipeError(f"no target takes {' and '.join(f'--{n.replace(chr(95), chr(45))}' for n in recipe.asked)}")
    fitting = [c for c in possible if c.nbytes <= parse_size(recipe.max_size)]
    if not fitting:
        smallest = min(possible, key=lambda c: c.nbytes)
        raise RecipeError(
            f"--max-size {recipe.max_size}: nothing fits; the smallest target is {_sized(smallest)}. A base with fewer "
            f"bits, or --bits 3 with --target gptq, may"
        )
    best = min(fitting, key=lambda c: (max(NEGLIGIBLE, c.disturbance), c.nbytes))
    return retargeted(recipe, best.target), _reason(best, fitting, possible, recipe.max_size)


def _reason(best: Candidate, fitting: Sequence[Candidate], possible: Sequence[Candidate], limit: str) -> str:
    others = sorted((c for c in fitting if c is not best), key=lambda c: c.disturbance)[:3]
    larger = sorted((c for c in possible if c not in fitting), key=lambda c: c.nbytes)[:2]
    beside = f"; next: {', '.join(f'{c.target} {c.disturbance:.2g}' for c in others)}" if others else ""
    over = f"; too large: {', '.join(map(_sized, larger))}" if larger else ""
    return (
        f"Target {_sized(best)}: of what fits into {limit}, rounding to it disturbs least ({best.disturbance:.2g} deltas"
        f"{beside}){over}."
    )


def _sized(c: Candidate) -> str:
    return f"{c.target} ({c.nbytes / 1e9:.2f} GB)" if c.nbytes >= 5e7 else f"{c.target} ({c.nbytes / 1e6:.2f} MB)"
