"""The tokens that a run calibrates on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qmerge.calibration import texts
from qmerge.calibration.generate import generate_tokens
from qmerge.calibration.layered import LayeredModel
from qmerge.calibration.texts import CalibrationTokens
from qmerge.errors import CheckpointError
from qmerge.planning.plan import Plan
from qmerge.schema import CalibrationRecord
from qmerge.weights.context import RunContext

BETTER_CALIBRATION = (
    "Calibrating on random tokens (the default). Text of your task is far better: on SmolLM2-135M the KL ratio was 0.107 with "
    "random tokens, 0.015 with --calibration generate and 0.006 with --calibration train.jsonl (docs/benchmarks.md)."
)
"""KL ratios of NF4 → NF4 merges with ``preserve``, on held-out text."""

JUDGED_ON = {"random": "drawn at random", "generate": "that the adapter model wrote"}
"""Source → what its held-out tokens are, after "2,048 tokens"."""


@dataclass(frozen=True)
class Calibration:
    """The calibration of a run.

    record   what the report contains about it; None where no weight needs calibration
    tokens   None without calibration
    note     what the user should know, or nothing
    """

    record: CalibrationRecord | None
    tokens: CalibrationTokens | None = None
    note: str = ""


NO_CALIBRATION = Calibration(None)
"""Of a run that rounds no weight with ``preserve``."""


def prepare_calibration(plan: Plan, context: RunContext, report_progress: Callable[[str], None]) -> Calibration:
    """Read, generate or draw the tokens that the plan asks for. The default is random tokens.

    Raises:
        RecipeError: the text cannot be used.
        CheckpointError: the model cannot be run, and the plan asks for calibration.
    """
    settings = plan.calibration
    if settings.source == "none":
        return Calibration(CalibrationRecord(source="none"))
    try:
        # Only to find out, before the long work, whether transformers can run the model.
        LayeredModel(plan.config, (), context.device)
    except CheckpointError as error:
        if settings.source:
            raise  # the user asked for calibration, and gets it or an error
        note = f"No calibration (as with --calibration none), because the model cannot be run: {error}"
        return Calibration(CalibrationRecord(source="none"), note=note)
    length = min(settings.sequence_length, texts.max_sequence_length(plan.config))
    batches = _token_batches(plan, context, length, report_progress)
    source = _published_name(settings.source or "random")
    tokens = texts.hold_out(torch.cat(batches), JUDGED_ON.get(source, f"of {source}"))
    record = CalibrationRecord(
        source=source,
        tokens=sum(batch.numel() for batch in tokens.seen),
        held_out_tokens=sum(batch.numel() for batch in tokens.held_out),
        sequence_length=length,
        sequential=settings.sequential,
        sha256=texts.batches_sha256(batches),
    )
    return Calibration(record, tokens, note="" if settings.source else BETTER_CALIBRATION)


def _published_name(source: str) -> str:
    """The source in the report. Reports are published: of a file they have the name, not the folder."""
    if source in ("random", "generate"):
        return source
    return Path(source).name


def _token_batches(
    plan: Plan, context: RunContext, length: int, report_progress: Callable[[str], None]
) -> list[Tensor]:  # fmt: skip
    settings = plan.calibration
    source = settings.source or "random"
    if source == "random":
        vocab_size = texts.vocab_size(plan.config)
        return texts.random_tokens(vocab_size, tokens=settings.tokens, length=length, seed=settings.seed)
    if source == "generate":
        return generate_tokens(
            plan,
            context,
            tokens=settings.tokens,
            length=length,
            seed=settings.seed,
            report_progress=report_progress,
        )
    return texts.token_batches(
        texts.find_text(source),
        plan.inputs.tokenizer_folder,
        tokens=settings.tokens,
        length=length,
        vocab_size=texts.vocab_size(plan.config),
    )
