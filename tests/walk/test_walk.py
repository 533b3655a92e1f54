"""docs/models.md is complete, and a sample of its rows says today what the page says."""

from __future__ import annotations

import os
import random
import shutil
from datetime import date
from pathlib import Path

import pytest
import transformers

from .. import models
from .architectures import architectures
from .exceptions import EXCEPTIONS
from .page import PAGE, listed, page, version
from .sizes import scaled, tiny_config
from .verdicts import CRASH, OK, WRONG, Outcome
from .walk import WrongError, make, walk

TEXT = PAGE.read_text()
LISTED = listed(TEXT)

SEED = int(os.environ.get("QMERGE_WALK_SEED") or date.today().isocalendar().week)
"""The sample changes from week to week."""

SAMPLED = 24
ALWAYS = (
    "causal:llama", "causal:mixtral", "image:resnet", "ctc:wav2vec2", "causal:bamba", "causal:gemma3n_text", "causal:hrm_text",
    "causal:inkling2_text", "embedding:gte", "image-text:minimax_m3_vl",
)  # fmt: skip
"""A plain model, one with stacked experts, two without embeddings, and some that went wrong once."""


def sample() -> list[str]:
    """Names of architectures that the walk can build."""
    names = sorted(name for name, (fp32, _) in LISTED.items() if fp32 == OK and name not in ALWAYS)
    return [*ALWAYS, *random.Random(SEED).sample(names, SAMPLED)]


@pytest.mark.slow
@pytest.mark.parametrize("name", sample())
def test_a_sample_is_what_the_page_says(name: str) -> None:
    """``python -m tests.walk --in-this-process NAME`` does the same alone."""
    (architecture,) = (one for one in architectures() if one.name == name)
    outcome = walk(architecture)
    reproduce = f"python -m tests.walk --in-this-process {name}"
    for found, expected in zip((outcome.fp32, outcome.nf4), LISTED[name], strict=True):
        assert found in (expected, OK), f"{'; '.join(outcome.notes)} (seed {SEED}; reproduce: {reproduce})"


def test_a_wrong_merge_is_noticed(tmp_path: Path) -> None:
    """The control of the walk: an adapter whose scale is changed before the merge."""
    (architecture,) = (one for one in architectures() if one.name == "causal:llama")
    made = make(architecture, tmp_path)
    made.check_fp32()
    shutil.move(tmp_path / "fp32", tmp_path / "right")
    models.edit_json(tmp_path / "adapter/adapter_config.json", lora_alpha=9)
    with pytest.raises(WrongError, match="weights are not peft's"):
        made.check_fp32()
    shutil.rmtree(tmp_path / "fp32")
    shutil.move(tmp_path / "right", tmp_path / "fp32")
    with pytest.raises(WrongError, match="weights are not what bitsandbytes makes of them"):
        made.check_nf4()


def test_the_page_lists_every_architecture() -> None:
    """Write it again after an update of transformers: ``python -m tests.walk``."""
    known = {architecture.name for architecture in architectures()}
    if version(TEXT) == transformers.__version__:
        assert LISTED.keys() == known
    elif _number(transformers.__version__) > _number(version(TEXT)):
        assert not known - LISTED.keys(), "transformers has architectures that were not walked"


def _number(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".")[:2])


def test_nothing_on_the_page_is_wrong() -> None:
    bad = {name for name, verdicts in LISTED.items() if {WRONG, CRASH} & set(verdicts)}
    assert not bad


def test_the_page_is_read_as_it_is_written() -> None:
    outcomes = [
        Outcome("causal", "a", "A", OK, OK, 1e-7),
        Outcome("token", "a", "B", OK, OK, 2e-6),
        Outcome("image", "b-c", "C", "unbuilt", "", None, ["no such library"]),
    ]
    assert listed(page(outcomes)) == {"causal:a": (OK, OK), "token:a": (OK, OK), "image:b-c": ("unbuilt", "")}
    assert "| `a` | causal, token | ok (2e-06) | ok |  |" in page(outcomes)
    assert version(page(outcomes)) == transformers.__version__


def test_sizes_become_smaller_and_kinds_of_layers_stay() -> None:
    config = tiny_config("qwen3_next")
    assert sorted(set(config.layer_types)) == ["full_attention", "linear_attention"]
    assert config.num_hidden_layers == len(config.layer_types) == 3
    assert (config.hidden_size, config.num_experts, config.vocab_size) == (32, 4, 96)
    assert scaled({"hidden_sizes": [64, 128], "num_heads": 3, "tie_word_embeddings": True}) == {
        "hidden_sizes": [32, 32], "num_heads": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    assert all(reason and fields for reason, fields in EXCEPTIONS.values())
