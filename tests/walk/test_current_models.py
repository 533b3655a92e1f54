"""The models that people fine-tune now, as published: their structure, the names on disk, and the usual lists of layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from qmerge.errors import RecipeError

from ..parity import stock
from .adapter import trained
from .published import MODELS, Published
from .sizes import scaled
from .walk import Made, fill, largest_distance, made_of, outputs_of

REFUSED = ("Llama-4-Scout",)
"""Models with stacks of experts that transformers replaces by single ones where a model is quantized, except in FP8."""


def build(published: Published) -> Any:
    model_class = getattr(transformers, published.class_name)
    torch.manual_seed(0)
    # transformers reads the published spelling of older versions; what it makes of it is scaled down.
    full = transformers.AutoConfig.for_model(**published.config).to_dict()
    values = scaled(full)
    for name, value in published.small.items():
        *parts, last = name.split(".")
        place = values
        for part in parts:
            place = place[part]
        place[last] = value
    config = transformers.AutoConfig.for_model(**values)
    assert isinstance(config, model_class.config_class)
    model = model_class(config).float().eval()
    fill(model)
    return model


def make(name: str, folder: Path) -> Made:
    published = MODELS[name]
    others = {key: torch.randn(shape) for key, shape in published.others.items()}
    layers: Any = list(published.layers)
    settings = {
        # A single entry is a regular expression.
        "target_modules": layers[0] if len(layers) == 1 else layers,
        "target_parameters": list(published.experts) or None,
        "task_type": "CAUSAL_LM",
    }
    made = made_of(build(published), folder, lambda model: trained(model, folder / "adapter", **settings), others)
    assert made.inputs is not None, made.problem
    return made


@pytest.mark.parametrize("name", MODELS)
def test_merges_as_the_unmerged_model_answers(name: str, tmp_path: Path) -> None:
    made = make(name, tmp_path)
    keys = stock.tensors(tmp_path / "adapter")
    assert any(".experts." in key for key in keys) == bool(MODELS[name].experts)
    assert made.check_fp32() is not None
    check_others(made, "fp32", MODELS[name].others)
    if name in REFUSED:
        with pytest.raises(RecipeError, match="stack of experts"):
            made.merged("nf4")
        return
    made.check_nf4()
    check_others(made, "nf4", MODELS[name].others)
    assert stock.quantized_names(tmp_path / "nf4")


LOADERS = {"w4a16": {"group_size": -1}, "fp8": {}}
"""Target → its options: the small layers have fewer columns than a group."""


@pytest.mark.slow
@pytest.mark.parametrize("target", [*LOADERS, "gptq"])
@pytest.mark.parametrize("name", MODELS)
def test_loads_in_the_loaders_of_other_formats(name: str, target: str, tmp_path: Path) -> None:
    """Nothing missing, nothing left over, and an answer much nearer to the adapter model's than the base's is."""
    if target == "gptq" and MODELS[name].experts:
        pytest.skip("gptqmodel loads these experts, transformers does not (test_experts.py)")
    pytest.importorskip({"w4a16": "compressed_tensors", "gptq": "gptqmodel"}.get(target, "transformers"))
    made = make(name, tmp_path)
    if name in REFUSED and target != "fp8":
        with pytest.raises(RecipeError, match="stack of experts"):
            made.merged(target, group_size=-1)
        return
    out = made.merged(target, **LOADERS.get(target, {"group_size": -1}))
    model = made.loaded(out)
    assert made.inputs is not None
    rounded = largest_distance(outputs_of(model, made.inputs), made.expected)
    assert rounded < 0.6 * largest_distance(made.alone, made.expected)
    check_others(made, target, MODELS[name].others)


def check_others(made: Made, target: str, others: Mapping[str, Any]) -> None:
    """Tensors that transformers does not load are copied."""
    base, out = stock.tensors(made.folder / "base"), stock.tensors(made.folder / target)
    assert out.keys() >= others.keys() and all(torch.equal(out[name], base[name]) for name in others)
