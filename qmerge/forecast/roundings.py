"""``--rounding auto``: which rounding each weight gets, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qmerge.forecast.kinds import delta_size
from qmerge.forecast.predict import Survival
from qmerge.formats import get_target
from qmerge.planning.plan import Plan
from qmerge.types import Step
from qmerge.wording import percent

NEAREST_IS_ENOUGH = 0.95
"""Nearest rounding is good enough for a weight that keeps at least this fraction of its delta."""

FINE_ENOUGH = 0.015
"""On a fresh grid, nearest rounding is good enough for an error of at most this fraction of the weight. (int8 has an
error of about 0.01, 4 bits one of 0.1.)"""


CLEARLY_LOST, CLEARLY_KEPT = 0.6, 0.98
"""Where the weights of a kind that were read keep less, or all keep more, the others of the kind are taken to be like them."""

CLEARLY_COARSE, CLEARLY_FINE = 1.25 * FINE_ENOUGH, 0.8 * FINE_ENOUGH
"""The same for the error of nearest rounding, as a fraction of the weight."""


def is_settled(steps: Sequence[Step], read: Sequence[Survival]) -> bool:
    """Whether the weights of a kind that were read tell the rounding of all of them.

    Args:
        steps: all weights of the kind.
        read: the survival of some of them, those with the smallest and the largest delta included.
    """
    if any(delta_size(step) is None for step in steps):
        return False  # it is not known which deltas are the smallest and the largest
    kept = [_kept(survival) for survival in read]
    if max(kept) < CLEARLY_LOST:
        return True
    is_kept = min(kept) > CLEARLY_KEPT
    if steps[0].source.keeps_grid:
        return is_kept
    errors = [_error(survival) for survival in read]
    return min(errors) > CLEARLY_COARSE or (is_kept and max(errors) < CLEARLY_FINE)


def choose_roundings(plan: Plan, predicted: Sequence[Survival]) -> tuple[Plan, str]:
    """A plan with ``nearest`` for the weights that it is good enough for and ``preserve`` for the others.

    Args:
        predicted: survival of every merged weight by nearest rounding.

    Returns:
        The plan, and the reason in words.
    """
    need = _need_for_preserve(plan, predicted)
    roundings = dict.fromkeys((step.name for step in plan.merged), "nearest")
    for step in plan.merged:
        if step.label in need.modules:
            roundings[step.name] = "preserve"
    if need.too_coarse or need.act_order:
        # Then other weights on fresh grids lose as much; preserve keeps the output of their layers.
        roundings |= dict.fromkeys(_requantized_names(plan), "preserve")
    return with_roundings(plan, roundings), _reason(need, predicted)


def without_calibration(plan: Plan, reason: str) -> tuple[Plan, str]:
    """``stochastic`` instead of ``preserve`` on the base's own grid, where nothing is known about the layers' inputs.

    In real models, a few inputs are hundreds of times larger than the others, and codes that change there ruin the model: on
    SmolLM2-135M the KL ratio of preserve without calibration was 0.8 and more, that of stochastic 0.10 (docs/benchmarks.md).

    Args:
        reason: why the plan has its roundings.

    Returns:
        The plan, and the reason in words.
    """
    roundings = {}
    for step in plan.merged:
        if step.rounding == "preserve" and step.source.keeps_grid:
            roundings[step.name] = "stochastic"
    if not roundings:
        return plan, reason
    return with_roundings(plan, roundings), f"{reason}; preserve would need calibration"


@dataclass(frozen=True, kw_only=True)
class _Need:
    """Modules that need ``preserve``, by reason.

    lost        nearest rounding would lose too much of their delta
    too_coarse  module → error of nearest rounding as a fraction of the weight, where that is too large
    act_order   GPTQ groups their inputs by importance, which only calibration knows
    """

    lost: frozenset[str]
    too_coarse: Mapping[str, float]
    act_order: frozenset[str]

    @property
    def modules(self) -> frozenset[str]:
        return self.lost | self.too_coarse.keys() | self.act_order


def _need_for_preserve(plan: Plan, predicted: Sequence[Survival]) -> _Need:
    on_fresh_grid = {step.label: step for step in plan.merged if not step.source.keeps_grid}
    lost = set()
    too_coarse = {}
    for survival in predicted:
        if _kept(survival) < NEAREST_IS_ENOUGH:
            lost.add(survival.module)
        # On the base's own grid, the error of nearest rounding is that of the delta alone, and "lost" tells all about it.
        error = _error(survival)
        if survival.module in on_fresh_grid and error > FINE_ENOUGH:
            too_coarse[survival.module] = error
    act_order = set()
    for label, step in on_fresh_grid.items():
        if get_target(step.target).uses_input_order(step.options):
            act_order.add(label)
    return _Need(lost=frozenset(lost), too_coarse=too_coarse, act_order=frozenset(act_order))


def _kept(survival: Survival) -> float:
    """A delta of zero is kept by any rounding."""
    return 1.0 if survival.kept is None else survival.kept


def _error(survival: Survival) -> float:
    """Error of nearest rounding as a fraction of the weight; 0 for a delta of zero."""
    return (survival.noise or 0.0) * (survival.relative_size or 0.0)


def _reason(need: _Need, predicted: Sequence[Survival]) -> str:
    least = percent(min(map(_kept, predicted), default=1.0))
    if not need.modules:
        if predicted and not any(survival.delta_squared for survival in predicted):
            return "the adapter changes nothing, because the delta of every weight is zero"
        kept = "all" if least == "100 %" else f"{least} or more"
        return f"nearest rounding is predicted to keep {kept} of every weight's delta"
    reason = f"nearest rounding is predicted to keep {_only(least)} of the delta in the worst weight"
    if need.too_coarse and not need.lost:
        worst = percent(max(need.too_coarse.values()))
        reason = f"nearest rounding is predicted to change weights by {worst} of their size"
    others = len(predicted) - len(need.modules)
    if others:
        reason += f"; {others} of {len(predicted)} weights keep enough and are rounded to nearest"
    return reason


def _only(share: str) -> str:
    return "nothing" if share == "0 %" else f"only {share}"


def _requantized_names(plan: Plan) -> list[str]:
    """Names of the weights without an update that come onto a fresh quantized grid."""
    target = get_target(plan.target)
    if not target.info.is_quantized:
        return []
    return [step.name for step in plan.steps if _is_converted_to(step, target.name) and not step.source.keeps_grid]


def _is_converted_to(step: Step, target: str) -> bool:
    return step.action == "convert" and step.target == target


def with_roundings(plan: Plan, roundings: Mapping[str, str]) -> Plan:
    """The plan with other roundings for some weights.

    Args:
        roundings: name of a weight → name of its rounding.
    """
    steps: dict[str, Step] = {}
    for step in plan.steps:
        steps[step.name] = replace(step, rounding=roundings.get(step.name, step.rounding))
    # The shards hold the same steps: both views of the plan must agree.
    shards = []
    for shard in plan.shards:
        shards.append(replace(shard, steps=tuple(steps[step.name] for step in shard.steps)))
    return replace(plan, steps=tuple(steps.values()), shards=tuple(shards))


def rounding_names(plan: Plan) -> str:
    """The roundings of the merged weights, the most frequent first: ``preserve``, or ``preserve and nearest``."""
    counts = Counter(step.rounding for step in plan.merged)
    return " and ".join(name for name, _ in counts.most_common())
