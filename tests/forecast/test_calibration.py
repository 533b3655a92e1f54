"""Which tokens a run calibrates on: the default, and what each source adds."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qmerge.demo
from qmerge.calibration.texts import CalibrationTokens
from qmerge.errors import TokenizerError
from qmerge.forecast.calibration import (
    GENERAL_SHARE,
    GENERAL_WITH_GENERATED,
    GENERATED_SHARE,
    Calibration,
    _dataset_note,
    prepare_calibration,
)
from qmerge.planning.plan import make_plan, make_run_context
from qmerge.recipe import make_recipe
from qmerge.safetensors_io.reader import Reader

DEMO = Path(qmerge.demo.__file__).parent
TOKENS, LENGTH = 512, 16


@pytest.fixture(scope="module")
def without_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bare") / "base"
    shutil.copytree(DEMO / "base-nf4", folder, ignore=shutil.ignore_patterns("tokenizer*"))
    return folder


def prepared(calibration: str | None, base: Path = DEMO / "base-nf4") -> Calibration:
    settings: dict[str, Any] = {"base": str(base), "adapter": str(DEMO / "adapter"), "target": "nf4", "device": "cpu"}
    if calibration:
        settings["calibration"] = calibration
    settings |= {"calibration_tokens": TOKENS, "sequence_length": LENGTH, "rounding": "preserve", "out": "unused"}
    with Reader() as reader:
        plan = make_plan(make_recipe(settings), reader)
        return prepare_calibration(plan, make_run_context(plan, reader), lambda line: None)


def rows(batches: list[Any]) -> Iterator[tuple[int, ...]]:
    for batch in batches:
        yield from map(tuple, batch.tolist())


def tokens_of(calibration: Calibration) -> CalibrationTokens:
    assert calibration.tokens is not None and calibration.record is not None
    return calibration.tokens


@pytest.mark.parametrize(
    ("asked", "source", "own", "general", "judged_on"),
    [
        (None, "generate", GENERATED_SHARE, GENERAL_WITH_GENERATED, "64 tokens that the adapter model wrote"),
        ("default", "generate", GENERATED_SHARE, GENERAL_WITH_GENERATED, "64 tokens that the adapter model wrote"),
        ("generate", "generate", GENERATED_SHARE, GENERAL_WITH_GENERATED, "64 tokens that the adapter model wrote"),
        (str(DEMO / "calibration.txt"), "calibration.txt", 1, GENERAL_SHARE, "128 tokens of calibration.txt"),
        ("general", "general", 1, 0, "128 tokens of qmerge's general text"),
        ("random", "random", 1, 0, "128 tokens drawn at random"),
    ],
)
def test_sources(asked: str | None, source: str, own: float, general: float, judged_on: str) -> None:
    calibration = prepared(asked)
    tokens, record = tokens_of(calibration), calibration.record
    assert record is not None and record.source == source and calibration.note == ""
    assert tokens.judged_on == judged_on
    assert record.general_tokens == (TOKENS if source == "general" else TOKENS * general)
    assert record.held_out_tokens == TOKENS * own / 4
    assert record.tokens == TOKENS * (own * 3 / 4 + general) == sum(batch.numel() for batch in tokens.seen)
    assert not set(rows(tokens.seen)) & set(rows(tokens.held_out))


def test_the_default_is_generated_text() -> None:
    default, asked = prepared(None), prepared("generate")
    assert default.record == asked.record and default.record != prepared("general").record


def test_without_a_tokenizer_the_default_is_random_tokens(without_tokenizer: Path) -> None:
    calibration = prepared(None, without_tokenizer)
    assert calibration.record == prepared("random").record
    assert "random tokens" in calibration.note and "no tokenizer" in calibration.note


@pytest.mark.parametrize(
    ("card", "named"),
    [
        ("---\ndatasets:\n- ./data\n- someone/man-pages\n---\n# An adapter\n", "someone/man-pages"),
        ("---\ndatasets: someone/man-pages\n---\n", "someone/man-pages"),
        ("---\nlicense: mit\n---\n", ""),
        ("# No metadata\n", ""),
        ("---\ndatasets: [\n---\n", ""),
        (None, ""),
    ],
)
def test_the_dataset_of_the_adapters_card_is_named(card: str | None, named: str, tmp_path: Path) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    note = _dataset_note(tmp_path)
    assert (f"--calibration {named} " in note) if named else note == ""


@pytest.mark.parametrize("asked", ["generate", "general"])
def test_without_a_tokenizer_a_source_that_was_asked_for_is_an_error(asked: str, without_tokenizer: Path) -> None:
    with pytest.raises(TokenizerError, match="no tokenizer"):
        prepared(asked, without_tokenizer)


def test_none() -> None:
    calibration = prepared("none")
    assert calibration.tokens is None and calibration.record is not None and calibration.record.source == "none"
