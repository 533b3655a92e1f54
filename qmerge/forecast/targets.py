"""All targets for these inputs: size of the model, survival by nearest rounding; and the best target that fits a size.

Reads headers, the adapter, and a few rows of some adapted weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qmerge.errors import CheckpointError, RecipeError, RoomError
from qmerge.forecast.kinds import Prediction, predict_kinds
from qmerge.forecast.predict import Survival, total_kept, total_noise
from qmerge.forecast.roundings import NEAREST_IS_ENOUGH, with_roundings
from qmerge.formats import MIXES, all_targets, get_target
from qmerge.gguf.base import GgufCheckpoint
from qmerge.gguf.output import OWN_TYPES
from qmerge.planning.inputs import Inputs
from qmerge.planning.modules import GPT_OSS
from qmerge.planning.plan import Plan, make_run_context, plan_from, retargeted
from qmerge.recipe import Recipe, parse_size
from qmerge.safetensors_io.reader import Reader
from qmerge.weights.context import RunContext
from qmerge.weights.parallel import one_torch_thread

NEGLIGIBLE_NOISE = 0.02
"""Noise, in deltas, below which more bits gain nothing."""

READ_WEIGHTS, READ_ENTRIES = 3, 2**10
"""Weights of each kind of module, and values in each group of their rows, that are read to compare targets."""

LISTED_TARGETS = 3
"""Targets that fit, and are named after the best one."""

LISTED_LARGER_TARGETS = 2
"""Targets that are too large, and are named too."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One target with its default options.

    target        name of the format
    loaders       programs that read it
    impossible    why these inputs cannot be written so; None if they can. Otherwise the other fields mean nothing.
    nbytes        size of the model
    bits          bits per weight, scales included
    kept          kept by nearest rounding, over all weights; None for a delta of zero
    noise         noise by nearest rounding, in deltas; None for a delta of zero
    gap_to_delta  median over weights of the gap between levels, in deltas
    read          number of weights that kept, noise and gap_to_delta were predicted from
    keeps_grid    the base's own scales are kept
    disturbance   noise, in deltas, of a rounding that keeps the delta
    """

    target: str
    loaders: str
    impossible: str | None = None
    nbytes: int = 0
    bits: float = 0.0
    kept: float | None = None
    noise: float | None = None
    gap_to_delta: float | None = None
    read: int = 0
    keeps_grid: bool = False
    disturbance: float = 0.0


def all_candidates(recipe: Recipe, inputs: Inputs, reader: Reader) -> list[Candidate]:
    """Every target, the smallest model first; impossible ones last.

    GGUF files are candidates for a GGUF base only: llama.cpp's converter, which says what is in one, takes seconds. The format
    of gpt-oss' experts is one for gpt-oss only.
    """
    targets = [target for target in all_targets() if get_target(target).info.container is None]
    if inputs.base.config.get("model_type") != GPT_OSS:
        targets = [target for target in targets if not get_target(target).info.takes_stacks]
    if isinstance(inputs.base, GgufCheckpoint):
        targets += [OWN_TYPES, *MIXES]
    elif recipe.target in (OWN_TYPES, *MIXES):
        targets.append(recipe.target)
    with one_torch_thread():  # for samples, more threads only wait for one another
        candidates = [candidate(recipe, target, inputs, reader) for target in targets]
    return sorted(candidates, key=lambda c: (c.impossible is not None, c.nbytes, c.target))


def candidate(recipe: Recipe, target: str, inputs: Inputs, reader: Reader) -> Candidate:
    """One target, for the inputs and the options of a recipe (as far as the target has them)."""
    loaders = get_target(target).info.loaders
    try:
        # Planning and predicting find out whether these inputs can be written so.
        plan = plan_from(retargeted(recipe, target), inputs)
        context = make_run_context(plan, reader)
        prediction = _predict(plan, context)
        survivals = prediction.survivals
        disturbance = _disturbance(plan, context, survivals)
    except (RecipeError, CheckpointError, RoomError) as error:
        return Candidate(target=target, loaders=loaders, impossible=str(error))
    return Candidate(
        target=target,
        loaders=loaders,
        nbytes=plan.bytes_out,
        bits=plan.bits_per_weight,
        kept=total_kept(survivals),
        noise=total_noise(survivals),
        gap_to_delta=_median_gap(survivals),
        read=prediction.read,
        keeps_grid=_keeps_grid(plan),
        disturbance=disturbance or 0.0,
    )


def _predict(plan: Plan, context: RunContext) -> Prediction:
    return predict_kinds(plan, context, weights=READ_WEIGHTS, entries=READ_ENTRIES)


def _keeps_grid(plan: Plan) -> bool:
    return all(step.source.keeps_grid for step in plan.merged)


def _median_gap(survivals: Sequence[Survival]) -> float | None:
    gaps = sorted(survival.gap_to_delta for survival in survivals if survival.gap_to_delta is not None)
    if not gaps:
        return None
    return gaps[len(gaps) // 2]  # of an even number, the upper one


def _disturbance(plan: Plan, context: RunContext, survivals: Sequence[Survival]) -> float | None:
    """Noise of a rounding that keeps the delta. Nearest rounding on the base's own grid may move nothing, and then it
    has no noise either: stochastic rounding stands for ``preserve`` there."""
    kept = total_kept(survivals)
    if not _keeps_grid(plan) or kept is None or kept >= NEAREST_IS_ENOUGH:
        return total_noise(survivals)
    stochastic = dict.fromkeys((step.name for step in plan.merged), "stochastic")
    return total_noise(_predict(with_roundings(plan, stochastic), context).survivals)


def resolve_auto(recipe: Recipe, inputs: Inputs, candidates: Sequence[Candidate]) -> tuple[Recipe, str]:
    """``--target auto``: choose the target with the least disturbance among those that fit into ``max_size``.

    Disturbance ranks formats as the quality of whole models does (docs/choosing-a-target.md). Of targets with
    negligible disturbance the smallest one is chosen.

    Args:
        candidates: as ``all_candidates`` returns them.

    Returns:
        The recipe for that target, and the reason in words.

    Raises:
        RecipeError: no target fits, or none has the options that the recipe asks for.
    """
    assert recipe.max_size is not None
    limit = parse_size(recipe.max_size)
    container = "gguf" if isinstance(inputs.base, GgufCheckpoint) else None
    possible = [c for c in candidates if c.impossible is None and _is_choice(c.target, recipe)]
    possible = [c for c in possible if get_target(c.target).info.container == container]
    fitting = [c for c in possible if c.nbytes <= limit]
    too_large = [c for c in possible if c.nbytes > limit]
    if not possible:
        # Where the inputs are the reason, planning for any target raises the error that names it.
        plan_from(retargeted(recipe, candidates[0].target), inputs)
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in recipe.format_options)
        raise RecipeError(f"--target auto: no target has {flags}; leave one of them out, or name a target")
    if not fitting:
        smallest = min(possible, key=lambda c: c.nbytes)
        raise RecipeError(
            f"--max-size {recipe.max_size}: nothing fits; the smallest target is {_with_size(smallest)}. A base with fewer "
            f"bits may fit, or --target gptq --bits 3"
        )
    # Of targets whose disturbance is negligible, the smallest counts as the best.
    best = min(fitting, key=lambda c: (max(NEGLIGIBLE_NOISE, c.disturbance), c.nbytes))
    return retargeted(recipe, best.target), _reason(best, fitting, too_large, recipe.max_size)


def _is_choice(target: str, recipe: Recipe) -> bool:
    """Whether a target may be chosen without being named, and has the options that the recipe asks for."""
    info = get_target(target).info
    return info.chosen_by_auto and recipe.format_options.keys() <= set(info.accepted_options)


def _reason(best: Candidate, fitting: Sequence[Candidate], too_large: Sequence[Candidate], limit: str) -> str:
    reason = f"Target {_with_size(best)}: of what fits into {limit}, rounding to it disturbs least"
    reason += f" ({best.disturbance:.2g} deltas"
    ranked = sorted(fitting, key=lambda c: c.disturbance)
    others = [f"{c.target} {c.disturbance:.2g}" for c in ranked if c is not best]
    if others:
        reason += f"; next: {', '.join(others[:LISTED_TARGETS])}"
    reason += ")"
    larger = sorted(too_large, key=lambda c: c.nbytes)[:LISTED_LARGER_TARGETS]
    if larger:
        reason += f"; too large: {', '.join(map(_with_size, larger))}"
    return f"{reason}."


def _with_size(c: Candidate) -> str:
    # In gigabytes as far down as two decimals tell sizes apart.
    if c.nbytes >= 5e7:
        return f"{c.target} ({c.nbytes / 1e9:.2f} GB)"
    return f"{c.target} ({c.nbytes / 1e6:.2f} MB)"
