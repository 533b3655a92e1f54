"""LoRAs in the file that the config does not target."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from qmerge.base_check.targets import untargeted_modules
from qmerge.errors import AdapterError
from qmerge.schema import read_report

from .. import models
from ..parity import stock

MODULES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.0.mlp.up_proj",
    "lm_head",
]


@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj"], ["q_proj", "up_proj", "lm_head"], ["0.self_attn.q_proj"], ["proj"], ["layers.0.self_attn.q_proj", "up_proj"],
        r".*\.q_proj", r".*layers\.0\..*", r"(?:.*?(?:language|text|model).*?\.)?(?:self_attn|mlp)\.(?:q_proj|up_proj)", "q_proj",
    ],
)  # fmt: skip
def test_by_the_rule_of_peft(targets: Any) -> None:
    """As peft itself answers, module by module."""
    config = LoraConfig(target_modules=targets)
    expected = [module for module in MODULES if not check_target_module_exists(config, module)]
    tensors = [f"{module}.lora_{half}.weight" for module in MODULES for half in "AB"]
    assert untargeted_modules({"target_modules": targets}, tensors) == expected


def test_peft_leaves_out_what_the_config_does_not_target(dense: Path, tmp_path: Path) -> None:
    """qmerge merges it, and says so."""
    adapter = stock.fresh_adapter(tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    models.edit_json(adapter / "adapter_config.json", target_modules=["q_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not [name for name in stock.deltas(stock.float_model(dense), adapter) if "up_proj" in name]
    out = stock.merged(tmp_path / "out", dense, adapter, "fp32")
    (told,) = [line for line in read_report(out).warnings if "target_modules" in line]
    assert "model.layers.0.mlp.up_proj" in told and "q_proj" not in told
    moved = {name for name, value in stock.tensors(out).items() if not torch.equal(value, stock.values(dense)[name])}
    assert {name.split(".")[-2] for name in moved} == {"q_proj", "up_proj"}


def test_a_pattern_that_is_none(dense: Path, tmp_path: Path) -> None:
    adapter = stock.fresh_adapter(tmp_path / "adapter")
    models.edit_json(adapter / "adapter_config.json", target_modules="(q_proj")
    with pytest.raises(AdapterError, match=r"\(q_proj.*not valid"):
        stock.merged(tmp_path / "out", dense, adapter, "fp32")
