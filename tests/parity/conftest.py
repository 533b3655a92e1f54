"""For all comparisons with the stock libraries: bases of every kind, made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from .. import models
from . import stock

Made = Callable[[str], Path]


@pytest.fixture(autouse=True, scope="package")
def eager() -> Iterator[None]:
    """bitsandbytes compiles its code for odd shapes, once per shape: many seconds for the same arithmetic."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.fixture(scope="session")
def base(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The bfloat16 Llama, and the same as the stock library quantizes and saves it: ``base("nf4-dq")``."""
    folder = tmp_path_factory.mktemp("bases")

    @cache
    def make(kind: str) -> Path:
        config = stock.BASES[kind]
        return models.quantize(dense, folder / kind, **config) if config else dense

    return make


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on some of the linear layers."""
    return stock.fresh_adapter(tmp_path_factory.mktemp("adapters") / "few", target_modules=["q_proj", "down_proj"])


@pytest.fixture(scope="session")
def adapter(lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Adapters with every way to say what the scale is: ``adapter("patterns")``."""
    folder = tmp_path_factory.mktemp("adapters")
    kinds = {
        "rslora": {"use_rslora": True, "r": 8},
        "patterns": {
            "r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 8},
            "alpha_pattern": {"k_proj": 32, "^model.layers.0.self_attn.o_proj": 3},
        },
        "rslora patterns": {"use_rslora": True, "rank_pattern": {"down_proj": 9}, "alpha_pattern": {"v_proj": 5}},
    }  # fmt: skip

    @cache
    def make(kind: str) -> Path:
        return lora if kind == "lora" else stock.fresh_adapter(folder / kind, **kinds[kind])

    return make


@pytest.fixture(scope="session")
def result(base: Made, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """qmerge's output for a kind of base and a target, made once: ``result("nf4", "bf16")``."""
    folder = tmp_path_factory.mktemp("results")

    @cache
    def make(kind: str, target: str) -> Path:
        return stock.merged(folder / f"{kind}-{target}", base(kind), lora, target)

    return make
