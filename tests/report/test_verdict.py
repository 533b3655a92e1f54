"""The verdict on a whole model: its thresholds, what it is about, and reports from before it existed."""

from __future__ import annotations

import json

import pytest

from qmerge.schema import LEAST_IMPROVEMENT, FidelityRecord, ReportData, Verdict, verdict_of

from .reports import FIDELITY, fidelity, report


@pytest.mark.parametrize(
    ("gain", "kl", "verdict"),
    [
        # The edges of each threshold, from both sides.
        (0.95, 0.02, "kept"), (0.9499, 0.02, "mostly kept"), (0.95, 0.0201, "mostly kept"),
        (0.85, 0.15, "mostly kept"), (0.8499, 0.15, "damaged"), (0.85, 0.1501, "damaged"),
        (0.3, 0.5, "damaged"), (0.2999, 0.5, "lost"), (0.2999, 0.0, "lost"), (-1.0, 2.0, "lost"),
        # A gain above 1 is no success by itself.
        (1.0, 0.0, "kept"), (1.5, 0.16, "damaged"), (9.0, 5.0, "damaged"),
        # Without a gain, the KL ratio decides; without both, nothing can be said.
        (None, 0.02, "kept"), (None, 0.15, "mostly kept"), (None, 0.7, "damaged"), (None, 0.71, "lost"), (None, None, None),
    ],
)  # fmt: skip
def test_thresholds_at_their_edges(gain: float | None, kl: float | None, verdict: Verdict | None) -> None:
    assert verdict_of(gain, kl) == verdict


@pytest.mark.parametrize(
    ("merge", "gain", "kl", "verdict"),
    [
        ("peft", 0.019, 0.975, "lost"),
        ("16-bit detour", 0.930, 0.1045, "mostly kept"),
        ("stochastic", 0.922, 0.104, "mostly kept"),
        ("preserve, random tokens", 0.807, 0.107, "damaged"),
        ("preserve, generate", 0.935, 0.0147, "mostly kept"),
        ("preserve, text of the task", 0.975, 0.0058, "kept"),
        ("int8 as bitsandbytes runs it", 0.922, 0.073, "mostly kept"),
        ("16-bit original with the adapter", 1.177, 0.724, "damaged"),
        ("bf16", 0.997, 0.0003, "kept"),
    ],
)
def test_verdicts_on_what_was_measured(merge: str, gain: float, kl: float, verdict: Verdict) -> None:
    """SmolLM2-135M-Instruct, docs/benchmarks.md."""
    assert fidelity(gain, kl).verdict == verdict, merge


def test_a_gain_by_chance_does_not_count() -> None:
    """On a text that the adapter hardly improves, the gain is a ratio of two small numbers."""
    assert fidelity(-3.0, 0.004, improvement=LEAST_IMPROVEMENT * 0.9).verdict == "kept"
    assert fidelity(-3.0, 0.004, improvement=LEAST_IMPROVEMENT * 1.1).verdict == "lost"
    assert fidelity(-3.0, 0.004, improvement=LEAST_IMPROVEMENT * 0.9).gain_that_counts is None


def test_records_without_the_new_fields_are_read() -> None:
    stored = json.loads(report(fidelity=FIDELITY).model_dump_json())
    for name in ("text_kind", "measured_on", "verdict"):
        del stored["fidelity"][name]
    read = ReportData.model_validate_json(json.dumps(stored)).fidelity
    assert read == FIDELITY
    assert read is not None and (read.text_kind, read.measured_on, read.verdict) == (
        "given", "20,480 tokens of heldout.txt", "damaged",
    )  # fmt: skip


def test_what_a_record_says_itself_stays() -> None:
    """A stored verdict is that of the version that measured."""
    record = fidelity(
        0.9, 0.1, measured_on="2,048 tokens that the adapter model wrote", text_kind="generated", verdict="damaged"
    )
    again = FidelityRecord.model_validate_json(record.model_dump_json())
    assert again == record and again.verdict == "damaged" and again.measured_on.endswith("wrote")
