# mypy: disable-error-code="import-untyped,import-not-found"
"""Adapters that mlx_lm saved, against mlx_lm's own fused weights and its own forward pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qmerge.errors import AdapterError

from .. import models
from ..conftest import Cli
from ..parity import bases, stock
from ..parity.bases.mlx import MlxModel, from_mlx
from ..parity.test_fp8 import BOUND

pytest.importorskip("mlx_lm")
KEYS = ["self_attn.q_proj", "mlp.down_proj"]
SETTINGS = {"rank": 4, "scale": 3.0, "dropout": 0.0}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(models.llama(torch.float32, **bases.LLAMA), tmp_path_factory.mktemp("dense"))


def adapted(base: Path, kind: str, keys: list[str], layers: int = 2) -> Any:
    """The model as mlx_lm trains it, with random adapters."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_map_with_path
    from mlx_lm.tuner.utils import linear_to_lora_layers

    mx.random.seed(0)
    model = MlxModel(base)
    model.model.freeze()
    linear_to_lora_layers(model.model, layers, {**SETTINGS, "keys": keys}, use_dora=kind == "dora")

    def moved(name: str, array: Any) -> Any:
        return array * 1.1 if name.endswith(".m") else mx.random.normal(array.shape) * 0.02

    model.model.update(tree_map_with_path(moved, model.model.trainable_parameters()))
    assert tree_flatten(model.model.trainable_parameters())
    return model


def saved(model: Any, folder: Path, kind: str, keys: list[str] | None) -> Path:
    """As ``mlx_lm.lora`` saves it."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), dict(tree_flatten(model.model.trainable_parameters())))
    config = {
        "fine_tune_type": kind,
        "num_layers": 2,
        "model": "some/model",
        "lora_parameters": {**SETTINGS, "keys": keys},
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def fused(model: Any) -> dict[str, Tensor]:
    """Weight name → float32 values, by ``mlx_lm.fuse --dequantize``."""
    return {
        f"{name}.weight": from_mlx(layer.fuse(dequantize=True).weight)
        for name, layer in model.model.named_modules()
        if hasattr(layer, "fuse")
    }


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merged_weights_are_mlx_lms(kind: str, dense: Path, tmp_path: Path) -> None:
    """Up to sums in another order: some roundings of float32 in the delta, and in the norm of a row."""
    model = adapted(dense, kind, KEYS)
    out = stock.merged(tmp_path / "out", dense, saved(model, tmp_path / "adapter", kind, KEYS), "fp32")
    merged, before, expected = stock.tensors(out), stock.tensors(dense), fused(model)
    assert len(expected) == 4 and stock.differing(merged, before) == sorted(expected)
    for name, values in expected.items():
        assert stock.distance(merged[name], values) < 8 * 2**-24 < 1e-3 < stock.distance(before[name], values), name


def test_the_scale_matters(dense: Path, tmp_path: Path) -> None:
    """The control: another scale is outside that bound."""
    model = adapted(dense, "lora", KEYS)
    folder = saved(model, tmp_path / "adapter", "lora", KEYS)
    models.edit_json(folder / "adapter_config.json", lora_parameters={**SETTINGS, "scale": 2.9})
    merged = stock.tensors(stock.merged(tmp_path / "out", dense, folder, "fp32"))
    assert all(stock.distance(merged[name], values) > 8 * 2**-24 for name, values in fused(model).items())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merged_onto_an_mlx_base(kind: str, tmp_path: Path) -> None:
    """The merged values compute as mlx_lm does with the base and the adapter on it."""
    base = bases.make("mlx", tmp_path / "base")
    model = adapted(base, kind, KEYS)
    out = stock.merged(tmp_path / "out", base, saved(model, tmp_path / "adapter", kind, KEYS), "fp32")
    expected = models.logits(model)
    assert stock.distance(models.logits(stock.float_model(out)), expected) < BOUND
    assert stock.distance(models.logits(MlxModel(base)), expected) > 100 * BOUND  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [False, True])
def test_embedding(tied: bool, tmp_path: Path) -> None:
    model = models.llama(torch.float32, **{**bases.LLAMA, "tie_word_embeddings": tied})
    base = models.save(model, tmp_path / "base")
    keys = ["model.embed_tokens"]
    trained = adapted(base, "lora", keys)
    out = stock.merged(tmp_path / "out", base, saved(trained, tmp_path / "adapter", "lora", keys), "fp32")
    assert stock.distance(models.logits(stock.float_model(out)), models.logits(trained)) < BOUND


def test_inspect_says_what_it_is(dense: Path, tmp_path: Path, cli: Cli) -> None:
    folder = saved(adapted(dense, "lora", KEYS), tmp_path / "adapter", "lora", KEYS)
    ran = cli("inspect", folder, "--json")
    described = json.loads(ran.out)
    assert described["file"] == "adapters.safetensors" and described["config"]["r"] == 4
    assert {module["scale"] for module in described["modules"]} == {3.0} and described["problem"] is None
    assert described["config"]["base_model_name_or_path"] == "some/model"


def changed(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("fine_tune_type", "full"), "fine_tune_type 'full', which trained whole weights.*mlx_lm.fuse"),
        (changed("lora_parameters", {"rank": 4}), "rank 4 and scale None; expected numbers"),
        (changed("lora_parameters", {"rank": 8, "scale": 3.0}), "not of rank 8"),
    ],
)
def test_configs_that_cannot_be_merged(change: Any, message: str, dense: Path, tmp_path: Path) -> None:
    folder = saved(adapted(dense, "lora", KEYS), tmp_path / "adapter", "lora", KEYS)
    config = json.loads((folder / "adapter_config.json").read_text())
    change(config)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=message):
        stock.merged(tmp_path / "out", dense, folder, "fp32")
    assert not (tmp_path / "out").exists()


def test_experts_are_refused(dense: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved(adapted(dense, "lora", KEYS), tmp_path / "adapter", "lora", KEYS)
    tensors = load_file(folder / "adapters.safetensors")
    tensors["model.layers.0.mlp.switch_mlp.up_proj.lora_b"] = torch.zeros(4, 64, 8)
    save_file(tensors, folder / "adapters.safetensors")
    with pytest.raises(
        AdapterError, match=r"switch_mlp.up_proj.lora_b \[4, 64, 8\] is not LoRA or DoRA of a linear layer"
    ):
        stock.merged(tmp_path / "out", dense, folder, "fp32")


def test_without_tensors(dense: Path, tmp_path: Path) -> None:
    folder = saved(adapted(dense, "lora", KEYS), tmp_path / "adapter", "lora", KEYS)
    (folder / "adapters.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"has no adapter_model\.safetensors"):
        stock.merged(tmp_path / "out", dense, folder, "fp32")
