"""The same merge gives the same files, whatever the resources, the order of options and the hash seed are."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from qmerge import run
from qmerge.recipe import make_recipe

from .. import models
from ..conftest import Cli, timeless

LARGE = {"hidden_size": 256, "intermediate_size": 1024}
"""Weights of several row blocks, from the default down to those of ``--max-memory 6MB``."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("same")
    models.save(models.llama(**LARGE), place / "dense")
    models.adapter(models.llama(torch.float32, **LARGE), place / "lora", target_modules=["q_proj", "up_proj"])
    return place


def options(place: Path, out: Path) -> dict[str, object]:
    return {
        "--base": place / "dense", "--adapter": place / "lora", "--target": "nf4", "--rounding": "stochastic",
        "--device": "cpu", "--max-shard-size": "300kB", "--out": out, "--seed": 3,
    }  # fmt: skip


def flat(given: Sequence[tuple[str, object]]) -> list[str]:
    return [str(part) for pair in given for part in pair]


@pytest.fixture(scope="module")
def whole(place: Path) -> dict[str, Any]:
    settings = {name[2:].replace("-", "_"): value for name, value in options(place, place / "whole").items()}
    run.merge(make_recipe(settings))
    return timeless(place / "whole")


@pytest.mark.parametrize(
    "more",
    [(), ("--workers", 3), ("--max-memory", "6MB"), ("--max-memory", "40MB", "--workers", 2)],
    ids=lambda more: " ".join(map(str, more)) or "other order",
)
def test_resources_and_order(place: Path, whole: dict[str, Any], cli: Cli, tmp_path: Path, more: Sequence[Any]) -> None:
    backwards = list(reversed(options(place, tmp_path / "whole").items()))
    assert cli("merge", *flat(backwards), *more).code == 0
    assert timeless(tmp_path / "whole") == whole
    assert cli("merge", *flat(backwards), *more, "--out", tmp_path / "other", "--seed", 4).code == 0
    assert timeless(tmp_path / "other") != whole, "the control: another seed"


def test_hash_seed(place: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "qmerge",
        "merge",
        *flat(list(options(place, tmp_path / "whole").items())),
        "--quiet",
    ]
    ran = subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "4711"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert timeless(tmp_path / "whole") == whole
