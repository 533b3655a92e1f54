"""The search of FP4's scales in compiled code, compared with torch."""

from __future__ import annotations

import torch

from qmerge.formats import _fp4_kernels as kernels
from qmerge.formats._levels import FP4_LEVELS


def test_sums_are_those_of_torch() -> None:
    """On values in the middle between two levels too, and for scales of zero."""
    generator = torch.Generator().manual_seed(0)
    values_OGN = 2 * torch.randn(16, 5, 16, generator=generator)
    weights_GN = torch.rand(5, 16, generator=generator)
    scale_OG = torch.full((16, 5), 0.3)
    scale_OG[8:] = 0.25
    scale_OG[0] = 0
    values_OGN[8:] = (values_OGN[8:] * 16).round() / 16  # multiples of a quarter step
    scaled_OGN = values_OGN / torch.where(scale_OG == 0, 1.0, scale_OG)[..., None]
    errors_OGN = FP4_LEVELS.rounded(scaled_OGN) * scale_OG[..., None] - values_OGN
    expected_OG = (errors_OGN.double().square() * weights_GN.double()).sum(2)
    error_OG = kernels.squared_error(values_OGN, weights_GN, scale_OG)
    torch.testing.assert_close(error_OG, expected_OG, rtol=1e-12, atol=0)
    assert not torch.allclose(kernels.squared_error(values_OGN, weights_GN, 1.01 * scale_OG), error_OG, rtol=1e-4)
