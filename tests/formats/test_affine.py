"""Codes and values of integer grids in compiled code, compared with torch."""

from __future__ import annotations

import pytest
import torch

from qmerge.formats._affine import AffineGrid, sequential_groups
from qmerge.types import Rows

GROUPS = {
    "neighbours": sequential_groups(96, 32),
    "short last group": sequential_groups(96, 40),
    "act-order": torch.randperm(96, generator=torch.Generator().manual_seed(1)) // 32,
    "one": torch.zeros(96, dtype=torch.int64),
}


@pytest.mark.parametrize("fraction", [0.0, 0.37])
@pytest.mark.parametrize("groups", GROUPS)
def test_codes_and_values_are_those_of_torch(groups: str, fraction: float) -> None:
    """Bit by bit: ties, values outside the range, negative scales, scales of zero, and zeros that are no integers."""
    group_I, generator = GROUPS[groups], torch.Generator().manual_seed(0)
    shape = (16, int(group_I.max()) + 1)
    scale_OG = torch.rand(shape, generator=generator) * 0.25
    scale_OG[0], scale_OG[1] = 0, 0.25
    scale_OG[2] *= -1
    zero_OG = torch.randint(0, 16, shape, generator=generator) + fraction
    values_OI = torch.randn(16, 96, generator=generator)
    values_OI[1] = (values_OI[1] * 8).round() / 8  # multiples of half a step

    grid = AffineGrid(scale_OG, zero_OG, group_I, 16)
    scale_OI, zero_OI = scale_OG[:, group_I], zero_OG[:, group_I]
    inverse_OI = torch.where(scale_OI == 0, 0.0, 1.0 / scale_OI)
    codes_OI = (values_OI * inverse_OI + zero_OI).round().clamp(0, 15).to(torch.uint8)
    assert torch.equal(grid.nearest(values_OI), codes_OI)
    assert torch.equal(grid.nearest(values_OI.T.contiguous().T), codes_OI)
    assert torch.equal(grid.decode(codes_OI), (codes_OI.float() - zero_OI) * scale_OI)
    assert torch.equal(grid.rows(Rows(3, 9)).nearest(values_OI[3:9]), codes_OI[3:9])
    # The control: one code fewer.
    assert not torch.equal(AffineGrid(scale_OG, zero_OG, group_I, 15).nearest(values_OI), codes_OI)


def test_a_grid_of_another_weight_is_refused() -> None:
    grid = AffineGrid(torch.ones(4, 3), torch.zeros(4, 3), sequential_groups(96, 32), 16)
    for shape in ((5, 96), (4, 97)):
        with pytest.raises(AssertionError, match="another weight"):
            grid.nearest(torch.zeros(shape))
