"""Models that transformers does not know: shapes alone tell what a weight is."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qmerge.checkpoint.scan import SINGLE

from .. import models
from . import stock


class Net(nn.Module):
    """An embedding, a Conv1D [in, out], a square one, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(96, 8)
        self.wide = Conv1D(24, 8)
        self.square = Conv1D(24, 24)
        self.narrow = nn.Linear(24, 8)
        self.even = nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.square(torch.tanh(self.wide(self.emb(ids)))))
        out: Tensor = self.even(torch.tanh(self.narrow(hidden)))
        return out


class Attention(nn.Module):
    """An nn.MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(96, 8)
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.emb(ids)
        out: Tensor = self.last(self.mha(hidden, hidden, hidden)[0])
        return out


TRAINED: dict[str, dict[str, Any]] = {
    "tokens": {"target_modules": ["wide"], "trainable_token_indices": {"emb": [0, 10]}, "fan_in_fan_out": True},
    "square": {"target_modules": ["wide", "square"], "fan_in_fan_out": True},
    "both kinds": {"target_modules": ["wide", "narrow"]},
    "linear": {"target_modules": ["narrow", "even"]},
    "embedding": {"target_modules": ["emb", "wide"], "fan_in_fan_out": True},
    "parameter": {"target_parameters": ["narrow.weight"]},
    "attention": {"target_modules": ["mha", "last"]},
}


@pytest.mark.parametrize("name", TRAINED)
def test_weights_are_those_of_peft(tmp_path: Path, name: str) -> None:
    """The merged weights are those of peft's own merge, and answer as the unmerged model does."""
    torch.manual_seed(0)
    net: nn.Module = Attention() if name == "attention" else Net()
    (tmp_path / "base").mkdir()
    save_file(net.state_dict(), tmp_path / "base" / SINGLE)
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "net"}))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's about fan_in_fan_out, which it resets for linear layers
        wrapped = get_peft_model(
            copy.deepcopy(net), LoraConfig(r=4, lora_alpha=8, **TRAINED[name]), autocast_adapter_dtype=False
        ).eval()
        torch.manual_seed(3)
        models.train(wrapped)
        wrapped.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(32).view(2, 16)
    with torch.no_grad():
        unmerged = wrapped(ids)
    out = stock.tensors(stock.merged(tmp_path / "out", tmp_path / "base", tmp_path / "adapter", "fp32"))
    expected = wrapped.merge_and_unload().state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(out[key], value, rtol=0, atol=2**-20)
    net.load_state_dict(out)
    with torch.no_grad():
        torch.testing.assert_close(net(ids), unmerged, rtol=0, atol=2**-20)
    assert [key for key in before if not torch.equal(before[key], out[key])], "the control"
