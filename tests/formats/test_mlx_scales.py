"""The search of MLX's scales and biases in compiled code, compared with torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qmerge.formats import _mlx_scales_kernels as kernels
from qmerge.formats._affine import sequential_groups
from qmerge.formats._mlx_scales import _Search, fit_mlx

from .scale_search import with_sums_of_torch


def gaussian(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_sums_are_those_of_torch() -> None:
    """On values in the middle between two codes too, where another order of the arithmetic takes another code."""
    values_OGN, weights_GN = gaussian(16, 5, 50), gaussian(5, 50).square()
    scale_OG = torch.full((16, 5), 0.3)
    scale_OG[8:] = -0.25
    values_OGN[8:] = (values_OGN[8:] * 8).round() / 8  # multiples of half a step
    bias_OG = -7.0 * scale_OG
    codes_OGN = ((values_OGN - bias_OG[..., None]) / scale_OG[..., None]).round().clamp(0, 15)
    errors_OGN = (codes_OGN * scale_OG[..., None] + bias_OG[..., None] - values_OGN).double()
    codes_OGN, weights = codes_OGN.double(), weights_GN.double()
    shares = weights / weights.sum(1, keepdim=True)
    code_mean_OG, value_mean_OG = (codes_OGN * shares).sum(2), (values_OGN * shares).sum(2)
    distance_OGN = codes_OGN - code_mean_OG[..., None]
    slope_OG = (distance_OGN * values_OGN * shares).sum(2) / (distance_OGN.square() * shares).sum(2)
    tensors = (values_OGN, weights_GN, scale_OG, bias_OG)
    error_OG = kernels.squared_error(*tensors, last_code=15)
    torch.testing.assert_close(error_OG, (errors_OGN.square() * weights).sum(2), rtol=1e-12, atol=0)
    expected = tuple(each.float() for each in (slope_OG, code_mean_OG, value_mean_OG))
    torch.testing.assert_close(kernels.regression(*tensors, last_code=15), expected, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(kernels.squared_error(*tensors, last_code=14), error_OG, rtol=1e-3)


def test_inputs_of_zero_have_finite_scales() -> None:
    values_OGN, scale_OG = gaussian(1, 1, 8), torch.ones(1, 1)
    for weights_GN in (torch.zeros(1, 8), torch.ones(1, 8)):
        slope_OG, _, _ = kernels.regression(values_OGN, weights_GN, scale_OG, 99 * scale_OG, last_code=15)
        assert torch.equal(slope_OG, scale_OG), "all codes are 0"


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_scales_are_those_of_torch(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    """A search whose sums are torch's, as on a GPU, finds the same scales; but for float32 sums that tie, in few groups."""
    weight_OI, inputs_I = gaussian(128, 256), gaussian(256).square()

    def fitted() -> Tensor:
        return fit_mlx(weight_OI, sequential_groups(256, 64), bits=bits, dtype=torch.float16, inputs_I=inputs_I)

    compiled = fitted()

    with_sums_of_torch(monkeypatch, _Search, kernels)
    assert float((fitted() != compiled).float().mean()) < 0.01
