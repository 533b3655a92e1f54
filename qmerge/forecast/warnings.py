"""Numbers → warnings in plain words: which modules, which ranks, how much survives, and what to do about it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from qmerge.forecast.predict import Survival, total_kept
from qmerge.schema import ModulePairRecord, PairRecord
from qmerge.wording import article, module_names, percent, span, times

ENOUGH = 0.5
"""A weight that keeps less of its delta than this is warned about."""

CLIPPED = 0.001
"""Share of entries that may be cut off before it is said."""

NEAR = 0.25
"""Where original and dequantized base differ by less than this share of the delta, it does not matter which one it is."""

OPPOSED, CONFLICTING = -0.2, 0.6
"""Deltas fight below this cosine (of two that are equally large, a sum then loses a fifth of their squares), or where more
than this share of what both change has opposite signs (0.5 in adapters that have nothing to do with each other, 0.62 in
normally distributed deltas of that cosine)."""

ELECTING = ("ties", "dare_ties", "della", "sce")
"""Ways to combine that settle on one sign per entry."""

LOUD, LOUD_PRESERVED = 2.0, 5.0
"""So is rounding noise that is larger than this many times the delta. ``preserve`` is measured in the layers' output, where
a good part of its noise makes up for earlier layers: twice the delta went with a KL ratio of 0.013 (GPTQ, demo model)."""


def survival_warnings(survivals: Sequence[Survival], predicted: bool) -> list[str]:
    """One line per kind of module, rank and trouble; the worst first.

    Args:
        survivals: of every merged weight.
        predicted: from the closed form, before the run; else measured on what was written.
    """
    lines = [_nothing_to_merge(survivals)] if not any(s.delta_squared for s in survivals) else []
    lost = [s for s in survivals if s.kept is not None and s.kept < ENOUGH]
    loud = [s for s in survivals if s.noise is not None and s.noise > _loud(s) and s not in lost]
    lines += [_lost_line(group, predicted) for group in _by_rank(lost)]
    lines += [_loud_line(group, predicted) for group in _by_rank(loud)]
    total = total_kept(survivals)
    if lost and total is not None and len(lost) > 1:
        lines.append(_total_line(lost, survivals, total, predicted))
    return lines


def original_warnings(merge_onto: str, gap: float | None) -> list[str]:
    """What merging onto one base gives up against the other. ``gap``: ‖original − dequantized‖ / ‖delta‖."""
    if gap is None or gap < NEAR:
        return []
    size = f"original and dequantized base differ by {times(gap)} the delta"
    line = f"{size}: merging onto the dequantized one gives the model that was trained, with the base's quantization error. "
    other = "--merge-onto original is without it; compare on held-out text (--verify)"
    if merge_onto == "original":
        line = f"{size}: the adapter was trained on the dequantized one, and what it learned to correct is gone in the original. "
        other = "Compare on held-out text (--verify) with --merge-onto dequantized"
    return [line + other]


def clipping_warnings(share: float | None, keeps_grid: bool) -> list[str]:
    """A delta that leads out of the base's own scales is cut off at their ends."""
    if not keeps_grid or share is None or share < CLIPPED:
        return []
    return [
        f"{percent(share)} of the merged values lie past the ends of the base's scales and were cut off: use --scales fresh"
    ]


def interference_warnings(pairs: Sequence[PairRecord], combine: str) -> list[str]:
    """Adapters that undo each other: where, how much, and what to do."""
    return [_fight_line(pair, found, combine) for pair in pairs if (found := [m for m in pair.modules if _fights(m)])]


def _fights(met: ModulePairRecord) -> bool:
    opposed = met.cosine is not None and met.cosine < OPPOSED
    return opposed or (met.sign_conflict is not None and met.sign_conflict > CONFLICTING)


def _fight_line(pair: PairRecord, found: Sequence[ModulePairRecord], combine: str) -> str:
    conflicts = [m.sign_conflict for m in found if m.sign_conflict is not None]
    signs = f", opposite signs in {span(percent, conflicts)} of what both change" if conflicts else ""
    lower = "lower the weight of one of them, or leave one out"
    way_out = (
        lower if combine in ELECTING else f"use --combine ties or dare_ties, which elect one sign per entry, {lower}"
    )
    return (
        f"{pair.one} and {pair.other} work against each other in {module_names([m.module for m in found])}: cosine "
        f"{span('{:.2f}'.format, [m.cosine for m in found])}{signs}. To keep more of both, {way_out}."
    )


def _loud(s: Survival) -> float:
    return LOUD_PRESERVED if s.rounding == "preserve" else LOUD


def _by_rank(survivals: Iterable[Survival]) -> list[list[Survival]]:
    """One group per rank; the one that lost most delta first."""
    groups: dict[int, list[Survival]] = defaultdict(list)
    for s in survivals:
        groups[s.rank].append(s)
    return sorted(groups.values(), key=lambda group: -sum(s.delta_squared * (1 - (s.kept or 0)) for s in group))


def _lost_line(group: list[Survival], predicted: bool) -> str:
    verb = "will survive" if predicted else "survived"
    target, sizes = group[0].target, span(percent, [s.relative_size for s in group])
    steps = span(times, [s.gap_to_delta for s in group])
    return (
        f"{_modules(group)}: rank {group[0].rank}, delta is {sizes} of the weight, "
        f"a{article(target)} {target.upper()} step is {steps} larger; "
        f"{percent(total_kept(group) or 0.0)} {verb} {group[0].rounding} rounding. {_way_out(group[0])}"
    )


def _loud_line(group: list[Survival], predicted: bool) -> str:
    verb = "will be" if predicted else "is"
    noise = span(times, [s.noise for s in group])
    return (
        f"{_modules(group)}: rank {group[0].rank}, the delta is kept on average, but {group[0].rounding} rounding noise {verb} "
        f"{noise} its size. {_way_out(group[0])}"
    )


def _modules(group: Sequence[Survival]) -> str:
    return module_names([s.module for s in group])


def _total_line(lost: list[Survival], survivals: Sequence[Survival], total: float, predicted: bool) -> str:
    verb = "will be" if predicted else "was"
    return (
        f"{len(lost)} of {len(survivals)} merged weights lose more than half of their delta; in all, {percent(total)} of the "
        f"fine-tuning {verb} kept (each weight counted by the size of its delta)."
    )


def _nothing_to_merge(survivals: Sequence[Survival]) -> str:
    return f"the adapter changes nothing: the delta of all {len(survivals)} weights is zero (lora_B was never trained)."


def _way_out(s: Survival) -> str:
    better = {"bf16": "fp16", "fp16": "fp32"}.get(s.target, "bf16")
    if s.rounding == "preserve":
        first = ["--calibration with text of your training", "more --calibration-tokens"]
    else:
        first = ["--rounding preserve"]
    return f"Use {', or '.join([*first, f'--target {better}', 'serve the adapter unmerged'])}."
