"""The scale search in compiled code, compared with torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qmerge.formats import _fit_scales_kernels as kernels
from qmerge.formats._affine import sequential_groups
from qmerge.formats._fit_scales import _Search, by_groups, fit_scales

from .scale_search import with_sums_of_torch

GROUPS = {
    "neighbours": sequential_groups(256, 64),
    "short last group": sequential_groups(256, 96),
    "act-order": torch.randperm(256, generator=torch.Generator().manual_seed(1)) // 32,
    "one": torch.zeros(256, dtype=torch.int64),
}


def gaussian(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("groups", GROUPS)
def test_groups_hold_their_columns(groups: str) -> None:
    group_I, values_OI = GROUPS[groups], gaussian(4, 256)
    inputs_I = values_OI[0].square()
    values_OGN, weights_GN = by_groups(values_OI.T.contiguous().T, group_I, inputs_I)
    assert values_OGN.is_contiguous() and weights_GN.is_contiguous()
    for group in range(int(group_I.max()) + 1):
        own = group_I == group
        size = int(own.sum())
        assert torch.equal(values_OGN[:, group, :size], values_OI[:, own])
        assert torch.equal(weights_GN[group, :size], inputs_I[own])
        assert not weights_GN[group, size:].any()


def test_sums_are_those_of_torch() -> None:
    """On values in the middle between two codes too, where another order of the arithmetic takes another code."""
    values_OGN, weights_GN = gaussian(16, 5, 50), gaussian(5, 50).square()
    scale_OG = torch.full((16, 5), 0.3)
    scale_OG[8:] = 0.25
    values_OGN[8:] = (values_OGN[8:] * 8).round() / 8  # multiples of half a step
    zero_OG = (gaussian(16, 5) * 3 + 7).round()
    steps_OGN = (values_OGN / scale_OG[..., None] + zero_OG[..., None]).round().clamp(0, 15) - zero_OG[..., None]
    errors_OGN = (steps_OGN * scale_OG[..., None] - values_OGN).double()
    steps_OGN, weights = steps_OGN.double(), weights_GN.double()
    product_OG = (steps_OGN * values_OGN * weights).sum(2)
    refitted_OG = (product_OG / (steps_OGN.square() * weights).sum(2)).float()
    tensors = (values_OGN, weights_GN, scale_OG, zero_OG)
    error_OG = kernels.squared_error(*tensors, last_code=15)
    assert torch.allclose(error_OG, (errors_OGN.square() * weights).sum(2), rtol=1e-12)
    assert torch.allclose(kernels.refitted_scale(*tensors, last_code=15), refitted_OG, rtol=1e-6)
    assert not torch.allclose(kernels.squared_error(*tensors, last_code=14), error_OG, rtol=1e-3)


def test_without_codes_but_zero_the_scale_stays() -> None:
    ones_OG = torch.ones(1, 1)
    refitted_OG = kernels.refitted_scale(torch.zeros(1, 1, 8), torch.ones(1, 8), ones_OG, 8 * ones_OG, last_code=15)
    assert torch.equal(refitted_OG, ones_OG)


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("groups", GROUPS)
def test_scales_are_those_of_torch(monkeypatch: pytest.MonkeyPatch, groups: str, sym: bool) -> None:
    """A search whose sums are torch's, as on a GPU, finds the same scales; but for float32 sums that tie, in few groups."""
    weight_OI, inputs_I = gaussian(128, 256), gaussian(256).square()

    def fitted() -> Tensor:
        return fit_scales(weight_OI, GROUPS[groups], bits=4, sym=sym, dtype=torch.float16, inputs_I=inputs_I)

    compiled = fitted()

    with_sums_of_torch(monkeypatch, _Search, kernels)
    assert float((fitted() != compiled).float().mean()) < 0.01
