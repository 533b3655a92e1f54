"""What was measured of a whole model, and the verdict on it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, model_validator

Verdict = Literal["kept", "mostly kept", "damaged", "lost"]
"""What became of the fine-tuning, in a word (``verdict_of``)."""

TextKind = Literal["given", "held out", "generated", "general", "mixed", "random"]
"""The text that a model was judged on: given by the user for this; a part of the calibration text that calibration did not
use; written by the adapter model; general text that comes with qmerge; several of these; random tokens."""

Judged = Literal[
    "next tokens", "target tokens", "masked tokens", "classes", "classes of tokens", "answer spans", "frames", "scores",
    "embeddings", "hidden states",
]  # fmt: skip
"""Which outputs of a whole model were compared. The last three are not probabilities: their distances are measured."""

LEAST_GAIN: dict[Verdict, float] = {"kept": 0.95, "mostly kept": 0.85, "damaged": 0.3}
"""Verdict → smallest gain kept. Equally good merges differ by about 0.01. On SmolLM2-135M in NF4, ``preserve`` with text of
the task has 0.973, quantizing the 16-bit merge again 0.930, peft's merge, which is the base again, 0.019."""

MOST_KL: dict[Verdict, float] = {"kept": 0.02, "mostly kept": 0.15}
"""Verdict → largest KL ratio, whatever the gain. Of the same merges: 0.004, 0.105 and 0.975. The 16-bit original with the
adapter has a gain of 1.18, but a KL ratio of 0.72: its loss is lower than that of the adapter model, but it is another model."""

LOST_KL = 0.7
"""Where the text says nothing about the gain, a model with a larger KL ratio than this has lost the fine-tuning."""

LEAST_IMPROVEMENT = 0.01
"""Nats per token by which the adapter must improve the loss of a text for its gain to count. On some thousand tokens, the
loss of two models with nearly the same predictions differs by some thousandths by chance."""


def verdict_of(gain_kept: float | None, kl_ratio: float | None) -> Verdict | None:
    """What became of the fine-tuning: the best verdict whose thresholds for gain kept *and* KL ratio both hold.

    Args:
        gain_kept: None where the text says nothing about it; then the KL ratio decides alone.
        kl_ratio: None for an adapter without effect on the text: there is no verdict.
    """
    if kl_ratio is None:
        return None
    for verdict, most_kl in MOST_KL.items():
        if kl_ratio <= most_kl and (gain_kept is None or gain_kept >= LEAST_GAIN[verdict]):
            return verdict
    if gain_kept is None:
        return "damaged" if kl_ratio <= LOST_KL else "lost"
    return "damaged" if gain_kept >= LEAST_GAIN["damaged"] else "lost"


class ContinuationRecord(BaseModel):
    """The beginning of a held-out text, and how three models go on with it, each by its likeliest tokens."""

    model_config = ConfigDict(extra="forbid")
    prompt: str
    base: str
    unmerged: str
    merged: str


class FidelityRecord(BaseModel):
    """A whole merged model on inputs that rounding did not see, compared with its base and with the unmerged adapter model.

    Losses and divergences are in nats per output (``judged``: a token, an example). ``gain_kept``: (loss_base − loss_merged) /
    (loss_base − loss_unmerged); ``kl_ratio``: KL(unmerged ‖ merged) / KL(unmerged ‖ base). Both are None where the denominator
    is not positive; losses and ``gain_kept`` also where the right outputs are not known.

    Of outputs other than probabilities, half the squared distance ‖unmerged − merged‖² / ‖unmerged‖² takes the place of the
    divergence (between normal distributions of equal width, the divergence is such a distance), and nothing is the top one.
    Of embeddings, which have length 1, it is 1 − cosine.

    ``measured_on`` and ``verdict`` follow from the other fields where they are not given.
    """

    model_config = ConfigDict(extra="forbid")
    text: str
    tokens: int
    sequence_length: int
    # Nats per output, of the same inputs for all three models
    loss_base: float | None
    loss_unmerged: float | None
    loss_merged: float | None
    gain_kept: float | None
    # Of the unmerged model's outputs: from the base's, and from the merged model's
    kl_base: float
    kl_merged: float
    kl_ratio: float | None
    top1_agreement: float | None
    kl_p99: float
    # Added later: records without them are still read.
    text_kind: TextKind = "given"
    measured_on: str = ""
    """In words: ``2,048 tokens that the adapter model wrote``."""
    verdict: Verdict | None = None
    judged: Judged = "next tokens"
    continuations: list[ContinuationRecord] = []

    @model_validator(mode="after")
    def _complete(self) -> FidelityRecord:
        if not self.measured_on:
            self.measured_on = f"{self.tokens:,} tokens of {self.text}"
        if self.verdict is None:
            self.verdict = verdict_of(self.gain_that_counts, self.kl_ratio)
        return self

    @property
    def gain_that_counts(self) -> float | None:
        """Gain kept; None where the adapter improves the loss of this text so little that its gain is chance."""
        if self.loss_base is None or self.loss_unmerged is None:
            return None
        if self.loss_base - self.loss_unmerged < LEAST_IMPROVEMENT:
            return None
        return self.gain_kept

    @property
    def has_distances(self) -> bool:
        """Whether the outputs are not probabilities, so that distances take the place of divergences."""
        return self.judged in ("scores", "embeddings", "hidden states")
