"""Numbers → warnings in plain words: which modules, which ranks, how much survives, and what to do about it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

from qmerge.predict import Survival, total_kept
from qmerge.report.json import MetRecord, PairRecord

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


def warnings(survivals: Sequence[Survival], predicted: bool) -> list[str]:
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


def onto(merge_onto: str, gap: float | None) -> list[str]:
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


def clipped(share: float | None, keeps_grid: bool) -> list[str]:
    """A delta that leads out of the base's own scales is cut off at their ends."""
    if not keeps_grid or share is None or share < CLIPPED:
        return []
    return [
        f"{percent(share)} of the merged values lie past the ends of the base's scales and were cut off: use --scales fresh"
    ]


def fighting(pairs: Sequence[PairRecord], combine: str) -> list[str]:
    """Adapters that undo each other: where, how much, and what to do."""
    return [_fight_line(pair, found, combine) for pair in pairs if (found := [m for m in pair.modules if _fights(m)])]


def _fights(met: MetRecord) -> bool:
    opposed = met.cosine is not None and met.cosine < OPPOSED
    return opposed or (met.sign_conflict is not None and met.sign_conflict > CONFLICTING)


def _fight_line(pair: PairRecord, found: Sequence[MetRecord], combine: str) -> str:
    conflicts = [m.sign_conflict for m in found if m.sign_conflict is not None]
    signs = f", opposite signs in {_span(percent, conflicts)} of what both change" if conflicts else ""
    lower = "lower the weight of one of them, or leave one out"
    way_out = (
        lower if combine in ELECTING else f"use --combine ties or dare_ties, which elect one sign per entry, {lower}"
    )
    return (
        f"{pair.one} and {pair.other} work against each other in {_names(found)}: cosine "
        f"{_span('{:.2f}'.format, [m.cosine for m in found])}{signs}. To keep more of both, {way_out}."
    )


def oversized(survivals: Sequence[Survival]) -> str:
    """Deltas that are large against their weights."""
    return (
        f"{_names(list(survivals))}: the delta is {_span(percent, [s.relative_size for s in survivals])} of the weight, where "
        f"fine-tuning usually changes 0.3 % to 8 %. Right on a residual model that PiSSA or OLoRA left as base; else look "
        f"whether lora_alpha is what it was in training, and judge the result on held-out text (--verify)."
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
    return (
        f"{_names(group)}: rank {group[0].rank}, delta is {_span(percent, [s.relative_size for s in group])} of the weight, "
        f"a{_n(group[0].target)} {group[0].target.upper()} step is {_span(times, [s.gap_to_delta for s in group])} larger; "
        f"{percent(total_kept(group) or 0.0)} {verb} {group[0].rounding} rounding. {_way_out(group[0])}"
    )


def _loud_line(group: list[Survival], predicted: bool) -> str:
    verb = "will be" if predicted else "is"
    return (
        f"{_names(group)}: rank {group[0].rank}, the delta is kept on average, but {group[0].rounding} rounding noise {verb} "
        f"{_span(times, [s.noise for s in group])} its size. {_way_out(group[0])}"
    )


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


def _names(group: Sequence[Survival | MetRecord]) -> str:
    """``q_proj, v_proj of 24 layers``; the whole name where there is one."""
    if len(group) == 1:
        return group[0].module
    kinds = Counter(s.module.rpartition(".")[2] for s in group)
    by_count: dict[int, list[str]] = defaultdict(list)
    for kind, count in kinds.items():
        by_count[count].append(kind)
    return "; ".join(f"{', '.join(names)} of {n} layer{'s' * (n > 1)}" for n, names in by_count.items())


def _span(face: Callable[[float], str], values: Iterable[float | None]) -> str:
    """Smallest to largest, once if they read the same."""
    known = [value for value in values if value is not None] or [0.0]
    low, high = face(min(known)), face(max(known))
    return low if low == high else f"{low} to {high}"


def _n(target: str) -> str:
    return "n" if target[0] in "aeiou" or target.startswith(("nf", "fp")) else ""


def percent(share: float) -> str:
    """0.0123 → ``1.2 %``: two digits below 10 %, whole numbers above."""
    value = 100 * share
    if 0 < abs(value) < 0.01:
        return "< 0.01 %" if value > 0 else "-0.0 %"
    if value == 0 or abs(value) >= 9.95:
        return f"{value:.0f} %"
    return f"{value:.1f} %" if abs(value) >= 0.95 else f"{value:.2f} %"


def times(ratio: float) -> str:
    if not ratio < 1e6:
        return "over a million times"
    return f"{ratio:.0f}x" if ratio >= 9.95 else f"{ratio:.1f}x"
