"""Every merge writes the bytes that are known of it: see ``__init__.py``."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .merges import DEMO, ROUNDINGS, TARGETS, exact_adapter, golden_hashes, known_hashes, name_of


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("target", TARGETS)
def test_bytes_are_those_that_are_known(target: str, rounding: str, tmp_path: Path) -> None:
    assert golden_hashes(tmp_path / "out", target, rounding) == known_hashes()[name_of(target, rounding)], (
        "bytes have changed. If that is meant: python -m tests.golden, and a line in CHANGELOG.md"
    )


def test_no_two_merges_have_the_same_weights() -> None:
    """The control: the hashes tell targets and roundings apart."""
    known = known_hashes()
    assert known.keys() == {name_of(target, rounding) for target in TARGETS for rounding in ROUNDINGS}
    weights = [files["model.safetensors"] for name, files in known.items() if not name.startswith("fp32")]
    base = hashlib.sha256((DEMO / "base-nf4" / "model.safetensors").read_bytes()).hexdigest()
    assert len({*weights, base}) == len(weights) + 1


def test_the_delta_is_exact_in_any_order(tmp_path: Path) -> None:
    tensors = load_file(exact_adapter(tmp_path / "adapter") / "adapter_model.safetensors")
    for name, B_OR in tensors.items():
        if "lora_B" not in name:
            continue
        A_RI = tensors[name.replace("lora_B", "lora_A")]
        assert bool(B_OR.any()) and bool(A_RI.any())
        forward, backward = torch.zeros(len(B_OR), A_RI.shape[1]), torch.zeros(len(B_OR), A_RI.shape[1])
        for r in range(len(A_RI)):
            forward += torch.outer(B_OR[:, r], A_RI[r])
            backward += torch.outer(B_OR[:, -1 - r], A_RI[-1 - r])
        exact = B_OR.double() @ A_RI.double()
        assert torch.equal(forward.double(), exact) and torch.equal(backward.double(), exact)
