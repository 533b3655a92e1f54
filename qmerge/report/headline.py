"""What a report says first: what became of the whole model, or that this was not measured. Every view shows these words."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from qmerge.recipe import Recipe, names_for_against
from qmerge.schema import LEAST_GAIN, MOST_KL, FidelityRecord, Judged, ReportData, Verdict, overall_kept
from qmerge.wording import counted, exceeds_all, share, share_or_dash, times

OTHER_TEXT = {
    "generated": "Text of its own shows no gain.",
    "general": "General text, not of your task.",
    "mixed": "Not all of it is text of your task.",
    "random": "Random tokens are no text.",
}
"""Kind of text → what to know about numbers that were measured on it."""

TOP_NAMES: dict[Judged, str] = {
    "next tokens": "same top token",
    "target tokens": "same top token",
    "masked tokens": "same top token",
    "classes": "same class",
    "classes of tokens": "same class",
    "answer spans": "same position",
    "frames": "same class",
}
"""What was judged → name of ``top1_agreement``; without those that have no likeliest output."""

WORTH_SAYING = 0.5
"""Noise of at least so many deltas, without the loss, is named next to the share that is kept."""

GAIN_ABOVE_ALL = 1.02
"""Above this, gain kept is explained. Equally good merges differ by about 0.01."""


MEASURING = "qmerge verify OUT --text FILE"
"""Measures a whole model. In files of a folder, which may be moved, the folder is called OUT, and its inputs have no paths."""

CALIBRATE = "Calibrate on text of your task to keep more"

FEW_TOKENS = 256
"""With fewer, the verdict depends on a handful of sentences."""

HARDLY_KEPT = 0.05
"""Share of the delta below which the merge holds almost nothing of the adapter."""

ALMOST_BASE = "it holds almost nothing of the adapter"


def ratio_name(fidelity: FidelityRecord) -> str:
    """Name of ``kl_ratio``."""
    return "distance ratio" if fidelity.has_distances else "KL ratio"


def losses(fidelity: FidelityRecord) -> tuple[float, float, float] | None:
    """Of base, unmerged and merged model; None where the right outputs are not known."""
    base, unmerged, merged = fidelity.loss_base, fidelity.loss_unmerged, fidelity.loss_merged
    if base is None or unmerged is None or merged is None:
        return None
    return base, unmerged, merged


def verdict_sentence(fidelity: FidelityRecord) -> str:
    """``The fine-tuning is mostly kept: …``, in one sentence."""
    verdict = fidelity.verdict
    if verdict is None:
        return "No verdict: on this text, the adapter changes nothing."
    meaning = _meaning(verdict, fidelity.gain_that_counts)
    if fidelity.has_distances:
        meaning = meaning.replace("predicts", "computes")
    return f"The fine-tuning is {verdict}: {meaning}."


def _meaning(verdict: Verdict, gain: float | None) -> str:
    """What a verdict is about. ``gain``: gain kept, where it counts."""
    if verdict == "kept":
        return "the model predicts almost like the adapter model"
    if verdict == "mostly kept":
        return "with small differences from the adapter model"
    if gain is None or gain >= LEAST_GAIN["mostly kept"]:
        return "the model predicts unlike the adapter model"
    if verdict == "damaged":
        return "a good part of the adapter's gain is gone"
    return "the adapter's gain is gone"


def fidelity_remarks(fidelity: FidelityRecord, measuring: str = MEASURING) -> list[str]:
    """What to know about the numbers of a whole model, a line each; empty where they speak for themselves.

    Args:
        measuring: the command that measures the model on another text.
    """
    remarks = []
    if fidelity.tokens < FEW_TOKENS:
        remarks.append(f"{counted(fidelity.tokens, 'token')} say little about a model: give a longer text.")
    gain = fidelity.gain_kept
    if losses(fidelity) is None:
        if fidelity.judged == "classes":
            remarks.append('No gain: the lines have no "label". The KL ratio decides.')
    elif gain is None and fidelity.text_kind != "generated":
        remarks.append("The adapter does not lower the loss of this text: so no gain can be kept.")
    elif gain is not None and fidelity.gain_that_counts is None:
        remarks.append("The adapter hardly improves this text: the gain is chance, KL ratio decides.")
    elif gain is not None and gain > GAIN_ABOVE_ALL:
        remarks.append(_gain_above_all(fidelity.kl_ratio))
    if fidelity.judged == "hidden states":
        remarks.append("What a head makes of the hidden states was not judged.")
    if fidelity.text_kind in OTHER_TEXT:
        remarks.append(f"{OTHER_TEXT[fidelity.text_kind]} For your text: {measuring}")
    return remarks


def expert_lines(report: ReportData) -> list[str]:
    """How stacked experts survived, one by one; empty where no adapted weight is a stack."""
    values = report.total.values
    if values.get("expert_kept_min") is None:
        return []
    middle, least = share_or_dash(values["expert_kept_median"]), share_or_dash(values["expert_kept_min"])
    return [f"Stacked experts: {middle} kept in the middle one, {least} in the worst."]


def _gain_above_all(kl_ratio: float | None) -> str:
    if kl_ratio is not None and kl_ratio > MOST_KL["mostly kept"]:
        return f"A gain above 1 is no success: KL ratio {kl_ratio:.2f} shows that it is another model."
    return "A gain above 1 is not better than 1: the aim is to be like the adapter model."


def unmeasured_lines(report: ReportData, measuring: str = MEASURING) -> list[str]:
    """The same for a report without numbers of the whole model: what was measured instead, and how to get them."""
    first = "No verdict: the whole model was not measured."
    if is_almost_base(report):
        first = f"The whole model was not measured, but {ALMOST_BASE}."
    last = f"To measure it: {way_to_measure(report, measuring)}"
    if report.is_written:
        last += ", or merge with --verify FILE"
    return [first, measured_instead(report), f"{last}."]


def needs_users_text(report: ReportData) -> bool:
    """Whether rounding was calibrated on text that the user did not give, and the model is not as good as it could be."""
    calibration, fidelity = report.calibration, report.fidelity
    if calibration is None or calibration.is_users_text or "preserve" not in report.rounding:
        return False
    return fidelity is not None and fidelity.verdict not in (None, "kept")


def measuring_command(out: str, against: Sequence[str] | None = None) -> str:
    """The command that measures a merged folder on a text; ``against``: base and adapter, where they must be named."""
    named = ["--against", *against] if against else []
    return shlex.join(["qmerge", "verify", out, "--text", "FILE", *named])


def measuring_command_of(recipe: Recipe) -> str:
    """The same for the model that a recipe has made here. It may name absolute paths: it is for the terminal, and for no file."""
    if recipe.out is None:  # a patch
        return MEASURING
    return measuring_command(recipe.out, names_for_against(recipe, Path(recipe.out).expanduser()))


def way_to_measure(report: ReportData, command: str = MEASURING) -> str:
    """How to measure the whole model on a text.

    Args:
        command: the one that measures a merged folder.
    """
    return command if report.is_written else "add --verify FILE"


def is_almost_base(report: ReportData) -> bool:
    """Whether so little of the adapter is in the stored weights that this says enough without a measured whole model."""
    kept = overall_kept(report.total.values)
    return report.fidelity is None and kept is not None and abs(kept) < HARDLY_KEPT


def measured_instead(report: ReportData) -> str:
    """The share kept of the delta, and what it is worth, in one sentence."""
    kept = overall_kept(report.total.values)
    if kept is None:
        return "The delta of every weight is zero: there is nothing to keep."
    if report.outputs_measured:
        return (
            f"In the layers' outputs on {report.calibration_text}, which rounding was fitted to, {share_of(kept)} the adapter's "
            f"effect; other text can give less."
        )
    line = f"In the stored weights, {share_of(kept)} the adapter's change."
    noise = report.total.values["noise"]
    # noise² is the loss (1 − kept)², which the share does show, and what is not along the delta.
    if noise is not None and noise**2 - (1 - kept) ** 2 >= WORTH_SAYING**2:
        line += f" Rounding adds noise of {times(noise)} its size, which this share does not show."
    return line


def share_of(kept: float) -> str:
    """What goes before "the adapter's change": ``there is 78 % of``, ``there is 1.33 times``."""
    if exceeds_all(kept):
        return f"there is {kept:.2f} times"
    return f"there is {share(kept)} of"


def calibration_lines(report: ReportData) -> list[str]:
    """That text of the task may keep more, where ``needs_users_text``."""
    if not needs_users_text(report):
        return []
    return [f"Rounding was calibrated on {report.calibration_text}. {CALIBRATE}: --calibration FILE"]


def kept_of_what(report: ReportData) -> str:
    """What ``overall_kept`` is a share of.

    In the layers' outputs it is measured on the text that rounding was calibrated on, and is about 100 % by construction:
    it must not be read as a result on other text.
    """
    if report.outputs_measured:
        return f"of the adapter's effect on the layers' outputs on {report.calibration_text}"
    return "of the adapter's change to the weights"
