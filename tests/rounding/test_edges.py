"""Roundings where there is nothing to choose."""

from __future__ import annotations

import pytest
import torch

from qmerge.formats._affine import AffineGrid, sequential_groups
from qmerge.rounding import preserve, stochastic
from qmerge.rounding.base import EFFORTS, RoundingContext
from qmerge.types import Rows


def test_codes_stay_where_all_have_the_same_value() -> None:
    """In a group with a scale of zero, another code would be the same number, and another byte on the disk."""
    grid = AffineGrid(torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2), sequential_groups(128, 64), 16)
    values_OI = torch.full((1, 128), 3.5)
    base_OI = torch.full((1, 128), 5, dtype=torch.uint8)
    context = RoundingContext(name="w", rows=Rows(0, 1), seed=0, effort=EFFORTS["default"], base_codes_OI=base_OI)
    codes_OI = stochastic.ROUNDING.choose(values_OI, grid, context)
    assert codes_OI[:, :64].unique().tolist() == [5]
    assert codes_OI[:, 64:].unique().tolist() == [3, 4]


@pytest.mark.parametrize(("change", "share"), [(0.0, 0.0), (0.25, 0.25), (1.5, 1.0), (-1.0, 0.0)])
def test_share_of_a_change_along_the_delta(change: float, share: float) -> None:
    delta_IO = torch.tensor([[1.0, -2.0]])
    assert preserve.share_along(delta_IO, change * delta_IO) == pytest.approx(share)
    assert preserve.share_along(torch.zeros(1, 2), delta_IO) == 1.0


def test_texts_of_each_effort_are_those_of_the_documentation() -> None:
    assert {name: effort.tokens for name, effort in EFFORTS.items()} == {"fast": 8192, "default": 16384, "best": 32768}
