"""Warnings about what survives: which modules, how much, and what to do about it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from qmerge.forecast.predict import Survival, total_kept
from qmerge.recipe import AS_STORED
from qmerge.schema import ModulePairRecord, PairRecord
from qmerge.wording import article, module_names, percent, span, times

ENOUGH_KEPT = 0.5
"""A weight that keeps less than this fraction of its delta is warned about."""

LOUD_NOISE = 2.0
"""Rounding noise that is larger than this many deltas is warned about."""

LOUD_PRESERVED_NOISE = 5.0
"""The same for ``preserve``, whose noise is measured in the outputs of the layers. A good part of it makes up for the
rounding of earlier layers: noise of twice the delta went with a KL ratio of 0.013 (GPTQ, demo model)."""

MOST_CLIPPED = 0.001
"""Clipping of more than this fraction of the entries is warned about."""

NEAR_ORIGINAL = 0.25
"""Where original and dequantized base differ by less than this fraction of the delta, it does not matter which one the
delta is added to."""

OPPOSED_COSINE = -0.2
"""Deltas work against each other below this cosine. (A sum of two deltas of the same size then loses a fifth of their
squares.)"""

CONFLICTING_SIGNS = 0.6
"""They also do where more than this fraction of what both change has opposite signs. (Unrelated adapters have 0.5;
normally distributed deltas of the cosine above have 0.62.)"""

SIGN_ELECTING = ("ties", "dare_ties", "della", "sce")
"""Combinations that settle on one sign per entry."""

# --- survival --------------------------------------------------------------------------------------------------------


def survival_warnings(survivals: Sequence[Survival], predicted: bool, *, has_text: bool = False) -> list[str]:
    """One line per rank and kind of trouble, the worst first.

    Args:
        survivals: of the merged weights.
        predicted: before the run, from the closed form; else measured on what was written.
        has_text: the user gave a text to calibrate on.
    """
    lines = []
    if not any(survival.delta_squared for survival in survivals):
        lines.append(
            f"the adapter changes nothing: the delta of all {len(survivals)} weights is zero (lora_B was never trained); "
            f"check that this is the trained adapter"
        )
    lost = [survival for survival in survivals if _is_lost(survival)]
    # A weight that lost its delta is warned about once, also where its noise is loud.
    loud = [survival for survival in survivals if _is_loud(survival) and not _is_lost(survival)]
    for group in _by_rank(lost):
        lines.append(_lost_line(group, predicted, has_text))
    for group in _by_rank(loud):
        lines.append(_loud_line(group, predicted, has_text))
    # How bad it is in all: the lost weights may be the ones with small deltas.
    total = total_kept(survivals)
    if total is not None and len(lost) > 1:
        verb = "will be" if predicted else "was"
        lines.append(
            f"{len(lost)} of {len(survivals)} merged weights lose more than half of their delta; in all, {percent(total)} of "
            f"the delta {verb} kept (each weight counted by the size of its delta)."
        )
    return lines


def is_same_warning(line: str, other: str) -> bool:
    """Whether two lines warn about the same trouble with the same modules: once predicted, once measured."""
    return _without_measurements(line) == _without_measurements(other)


def _without_measurements(line: str) -> str:
    line = MEASURED_VALUE.sub("#", line)
    # The two tenses of _lost_line, of the line about all weights, and of _loud_line.
    for predicted, measured in (("will survive", "survived"), ("will be kept", "was kept"), ("will be", "is")):
        line = line.replace(predicted, measured)
    return line


MEASURED_VALUE = re.compile(
    r"(?<=\s)(?:over a million times|(?:< )?-?\d[\d.]*(?: %|x))(?: to (?:over a million times|(?:< )?-?\d[\d.]*(?: %|x)))?"
)
"""A percentage or a factor, or a range of them (``wording.percent``, ``times`` and ``span``)."""


def _is_lost(survival: Survival) -> bool:
    return survival.kept is not None and survival.kept < ENOUGH_KEPT


def _is_loud(survival: Survival) -> bool:
    limit = LOUD_PRESERVED_NOISE if survival.rounding == "preserve" else LOUD_NOISE
    return survival.noise is not None and survival.noise > limit


def _by_rank(survivals: Iterable[Survival]) -> list[list[Survival]]:
    """One group per rank; the group that loses most of its deltas first."""
    groups: dict[int, list[Survival]] = defaultdict(list)
    for survival in survivals:
        groups[survival.rank].append(survival)
    return sorted(groups.values(), key=_lost_squares, reverse=True)


def _lost_squares(group: Sequence[Survival]) -> float:
    return sum(survival.delta_squared * (1 - (survival.kept or 0)) for survival in group)


def _lost_line(group: Sequence[Survival], predicted: bool, has_text: bool) -> str:
    first = group[0]
    sizes = span(percent, [survival.relative_size for survival in group])
    steps = span(times, [survival.gap_to_delta for survival in group])
    kept = percent(total_kept(group) or 0.0)
    verb = "will survive" if predicted else "survived"
    return (
        f"{_modules(group)}: rank {first.rank}, delta is {sizes} of the weight, "
        f"a{article(first.target)} {first.target.upper()} step is {steps} larger; "
        f"{kept} {verb} {first.rounding} rounding. {_way_out(first, has_text)}"
    )


def _loud_line(group: Sequence[Survival], predicted: bool, has_text: bool) -> str:
    first = group[0]
    verb = "will be" if predicted else "is"
    noise = span(times, [survival.noise for survival in group])
    return (
        f"{_modules(group)}: rank {first.rank}, the delta is kept on average, but {first.rounding} rounding noise {verb} "
        f"{noise} its size. {_way_out(first, has_text)}"
    )


def _modules(group: Sequence[Survival]) -> str:
    return module_names([survival.module for survival in group])


def _way_out(survival: Survival, has_text: bool) -> str:
    if survival.rounding == "preserve":
        ways = ["more --calibration-tokens"]
        if not has_text:
            ways.insert(0, "--calibration with text of your training")
    else:
        ways = ["--rounding preserve with calibration"]
    # bf16 itself loses small deltas: it has 8 bits of mantissa, fp16 has 11.
    wider = {"bf16": "fp16", "fp16": "fp32"}.get(survival.target, "bf16")
    ways += [f"--target {wider}", "serve the adapter unmerged"]
    return f"Use {', or '.join(ways)}."


# --- the base, the grid, other adapters ------------------------------------------------------------------------------


ANOTHER_MODEL = (
    "Added to the 16-bit original and kept in 16 bits, it makes another model than the one that was trained: on SmolLM2-135M its "
    "loss was lower than the adapter model's (gain kept 1.18), but its KL ratio was 0.72 (docs/benchmarks.md)"
)
"""About a QLoRA adapter that was trained on quantized weights."""


def original_warnings(
    merge_onto: str, gap: float | None, *, dense_target: bool, trained_on: str | None
) -> list[str]:  # fmt: skip
    """The price of merging onto the original or onto the dequantized base, where they differ much.

    Args:
        gap: ‖original − dequantized‖ / ‖delta‖; None without an original.
        dense_target: whether the merged weights are stored in 16 or 32 bits.
        trained_on: how training quantized a dense base, which then is the original.
    """
    if trained_on not in (None, AS_STORED) and merge_onto == "original" and dense_target:
        return [f"the adapter was trained on values that were quantized ({trained_on}). {ANOTHER_MODEL}"]
    if gap is None or gap < NEAR_ORIGINAL:
        return []
    line = f"original and dequantized base differ by {times(gap)} the delta"
    if merge_onto == "original":
        line += (
            ": the adapter was trained on the dequantized one, and what it learned to correct is gone in the original. Compare "
            "on held-out text (--verify) with --merge-onto dequantized"
        )
    else:
        line += (
            ": merging onto the dequantized one gives the model that was trained, with the base's quantization error. "
            "--merge-onto original is without it; compare on held-out text (--verify)"
        )
    if dense_target:
        line += f". {ANOTHER_MODEL}"
    return [line]


def uncalibrated_warning(reason: str) -> str:
    """About a model that no text can be run through.

    Args:
        reason: why, in words.
    """
    return (
        f"rounding was calibrated on nothing, because the model cannot be run on a text ({reason}): kept and noise are about the "
        f"stored weights alone, and how far the outputs are from those of the adapter model is not known. Compare both on inputs "
        f"of yours, or use --target bf16, which hardly rounds"
    )


def clipping_warnings(fraction: float | None, keeps_grid: bool) -> list[str]:
    """Values past the ends of the base's own scales.

    Args:
        fraction: fraction of all merged values that were clipped.
    """
    if not keeps_grid or fraction is None or fraction < MOST_CLIPPED:
        return []
    return [
        f"{percent(fraction)} of the merged values were past the ends of the base's scales and were clipped: use --scales fresh"
    ]


def interference_warnings(pairs: Sequence[PairRecord], combine: str) -> list[str]:
    """Pairs of adapters that undo each other: in which modules, how much, and what to do.

    Args:
        combine: how the adapters are combined.
    """
    lines = []
    for pair in pairs:
        modules = [module for module in pair.modules if _work_against_each_other(module)]
        if modules:
            lines.append(_interference_line(pair, modules, combine))
    return lines


def _work_against_each_other(record: ModulePairRecord) -> bool:
    if record.cosine is not None and record.cosine < OPPOSED_COSINE:
        return True
    return record.sign_conflict is not None and record.sign_conflict > CONFLICTING_SIGNS


def _interference_line(pair: PairRecord, modules: Sequence[ModulePairRecord], combine: str) -> str:
    names: list[str] = []
    cosines: list[float | None] = []
    conflicts: list[float] = []
    for module in modules:
        names.append(module.module)
        cosines.append(module.cosine)
        if module.sign_conflict is not None:  # None where no entry is changed by both
            conflicts.append(module.sign_conflict)
    signs = ""
    if conflicts:
        signs = f", opposite signs in {span(percent, conflicts)} of what both change"
    way_out = "lower the weight of one of them, or leave one out"
    if combine not in SIGN_ELECTING:
        way_out = f"use --combine ties or dare_ties, which elect one sign per entry, {way_out}"
    return (
        f"{pair.one} and {pair.other} work against each other in {module_names(names)}: "
        f"cosine {span('{:.2f}'.format, cosines)}{signs}. To keep more of both, {way_out}."
    )
