"""The tokens that a run calibrates on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from qmerge import hub
from qmerge.calibration import texts
from qmerge.calibration.general import general_tokens
from qmerge.calibration.generate import generate_tokens
from qmerge.calibration.layered import LayeredModel
from qmerge.calibration.room import planned_memory
from qmerge.calibration.starts import find_starts
from qmerge.calibration.tasks import CAUSAL_LM
from qmerge.calibration.texts import CalibrationTokens
from qmerge.checkpoint.model_cards import card_fields
from qmerge.errors import CheckpointError, RecipeError, TokenizerError
from qmerge.forecast.warnings import uncalibrated_warning
from qmerge.planning.plan import Plan
from qmerge.schema import CalibrationRecord
from qmerge.weights.context import RunContext

GENERAL_SHARE = 0.5
"""Tokens of the general text that are added to text of the task, as a share of the tokens that were asked for. Without it, a
model changes where the text of the task does not show it: the KL ratio on other text is two to three times as high."""

GENERATED_SHARE, GENERAL_WITH_GENERATED = 0.5, 0.75
"""The same shares of generated text, which takes time to write, and of the general text that is added to it."""


@dataclass(frozen=True)
class Calibration:
    """The calibration of a run.

    record   what the report contains about it; None where no weight needs calibration
    tokens   None without calibration
    note     what the user should know, or nothing
    warning  what is wrong with it, or nothing
    """

    record: CalibrationRecord | None
    tokens: CalibrationTokens | None = None
    note: str = ""
    warning: str = ""


NO_CALIBRATION = Calibration(None)
"""Of a run that rounds no weight with ``preserve``."""


def prepare_calibration(plan: Plan, context: RunContext, report_progress: Callable[[str], None]) -> Calibration:
    """Read, generate or draw the tokens that the plan asks for.

    The default is text that the model writes; for models that write none (BERT, T5), the general text.

    Raises:
        RecipeError: the text cannot be used, or the model cannot write one.
        RoomError: calibration does not fit into ``--max-memory``.
        CheckpointError: the model cannot be run, or its tokenizer not be loaded, and the plan asks for calibration.
    """
    settings = plan.calibration
    if settings.source == "none":
        return Calibration(CalibrationRecord(source="none"))
    is_default = settings.source in (None, "default")
    try:
        # Only to find out, before the long work, whether transformers can run the model.
        model = LayeredModel(plan.config, (), context.device)
    except CheckpointError as error:
        if not is_default:
            raise  # the user asked for calibration, and gets it or an error
        return Calibration(CalibrationRecord(source="none"), warning=uncalibrated_warning(str(error)))
    writes_text = model.task is CAUSAL_LM
    if settings.source == "generate" and not writes_text:
        raise RecipeError(
            f"--calibration generate: a model for {model.task.name} writes no text by itself; use --calibration general, or a file"
        )
    # Before the long work: it raises where there is not enough memory.
    planned_memory(plan, tokens_of_source(settings.source, settings.tokens), context.device)
    if not is_default:
        return _Preparation(plan, context, report_progress).calibration(str(settings.source))
    try:
        source = "generate" if writes_text else "general"
        calibration = _Preparation(plan, context, report_progress).calibration(source)
        return replace(calibration, note=_dataset_note(plan.inputs.adapter_files_folder))
    except TokenizerError as error:
        calibration = _Preparation(plan, context, report_progress).calibration("random")
        note = f"Calibrating on random tokens, which is much worse than on text (docs/benchmarks.md): {error}"
        return replace(calibration, note=note)


def tokens_of_source(source: str | None, tokens: int) -> int:
    """How many tokens a run calibrates on, with the general text that is added; where the text has so many.

    Args:
        source: of the plan's calibration; None for the default.
        tokens: those that were asked for.
    """
    if source in ("general", "random"):
        return tokens
    if source in (None, "default", "generate"):
        return round((GENERATED_SHARE + GENERAL_WITH_GENERATED) * tokens)
    return round((1 + GENERAL_SHARE) * tokens)


@dataclass(frozen=True)
class _Preparation:
    """The calibration of a plan from a source that is given."""

    plan: Plan
    context: RunContext
    report_progress: Callable[[str], None]

    def calibration(self, source: str) -> Calibration:
        """Tokens of a source, with a share of general text; a part is held out."""
        settings = self.plan.calibration
        published = _published_name(source)
        ids = self._token_ids(source)
        tokens = texts.hold_out(ids, published)
        if not settings.sequential:  # no second model runs that could be judged
            tokens = replace(tokens, seen=texts.split_batches(ids), held_out=[], judged_on="")
        general_count = ids.numel() if source == "general" else 0
        if source not in ("general", "random"):  # where random tokens are asked for, nothing else is added
            share = GENERAL_WITH_GENERATED if source == "generate" else GENERAL_SHARE
            general = self._general(round(share * settings.tokens))
            general_count = general.numel()
            tokens = texts.add_batches(tokens, general)
        record = CalibrationRecord(
            source=published,
            tokens=_count(tokens.seen),
            general_tokens=general_count,
            held_out_tokens=_count(tokens.held_out),
            sequence_length=ids.shape[1],
            sequential=settings.sequential,
            sha256=texts.batches_sha256([*tokens.seen, *tokens.held_out]),
        )
        return Calibration(record, tokens)

    @property
    def _length(self) -> int:
        """Tokens per sequence."""
        return min(self.plan.calibration.sequence_length, texts.max_sequence_length(self.plan.config))

    @property
    def _vocab_size(self) -> int:
        return texts.vocab_size(self.plan.config)

    def _token_ids(self, source: str) -> Tensor:
        """int64 [sequences, length]."""
        settings = self.plan.calibration
        tokenizer_folder = self.plan.inputs.tokenizer_folder
        if source == "random":
            return torch.cat(
                texts.random_tokens(self._vocab_size, tokens=settings.tokens, length=self._length, seed=settings.seed)
            )
        if source == "general":
            return self._general(settings.tokens)
        if source == "generate":
            return generate_tokens(
                self.plan,
                self.context,
                find_starts(tokenizer_folder, vocab_size=self._vocab_size, seed=settings.seed),
                tokens=round(GENERATED_SHARE * settings.tokens),
                length=self._length,
                seed=settings.seed,
                report_progress=self.report_progress,
            )
        batches = texts.token_batches(
            texts.find_text(source),
            tokenizer_folder,
            tokens=settings.tokens,
            length=self._length,
            vocab_size=self._vocab_size,
        )
        return torch.cat(batches)

    def _general(self, tokens: int) -> Tensor:
        """A cut of the general text: int64 [sequences, length]."""
        return general_tokens(
            self.plan.inputs.tokenizer_folder,
            tokens=tokens,
            length=max(2, min(tokens, self._length)),
            vocab_size=self._vocab_size,
        )


def _dataset_note(adapter_folder: Path) -> str:
    """Names the dataset that the adapter's own card names; "" where it names none."""
    datasets = card_fields(adapter_folder, ("datasets",)).get("datasets", [])
    if isinstance(datasets, str):
        datasets = [datasets]
    for name in datasets:
        if hub.HUB_ID.fullmatch(name):
            return f"The adapter's card names the dataset {name}: --calibration {name} would be closer to the task."
    return ""


def _count(batches: list[Tensor]) -> int:
    return sum(batch.numel() for batch in batches)


def _published_name(source: str) -> str:
    """The source in the report. Reports are published: of a file they have the name, not the folder."""
    if source in texts.TEXT_KINDS:
        return source
    return Path(source).name
