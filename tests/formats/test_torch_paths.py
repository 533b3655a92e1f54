"""What torch computes on a GPU, here on the CPU: the same as the compiled code."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from qmerge.formats import _fp4
from qmerge.formats._affine import AffineGrid, sequential_groups
from qmerge.formats._bnb4bit_grid import Bnb4bitGrid, pack_nibbles
from qmerge.formats._dense import FloatGrid
from qmerge.formats._levels import FP4_LEVELS
from qmerge.formats.mlx import BiasGrid
from qmerge.grids import DOWN, UP
from qmerge.metrics._dots import changes_of, count_different


class Elsewhere(Tensor):
    """A tensor that says it is on a GPU."""

    device = property(lambda self: SimpleNamespace(type="cuda"))


def elsewhere(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Elsewhere)


def plain(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Tensor)


def gaussian(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def affine() -> AffineGrid:
    scale_OG = gaussian(8, 4)
    scale_OG[0, 0] = 0
    return AffineGrid(scale_OG, torch.full((8, 4), 7.0), sequential_groups(128, 32), 16)


def nf4(name: str = "nf4") -> Bnb4bitGrid:
    absmax_B = gaussian(16).abs()
    return Bnb4bitGrid(quant_type=name, block_size=64, columns=128, absmax_B=absmax_B, rounding_absmax_B=absmax_B)


@pytest.mark.parametrize("grid", [affine(), nf4(), nf4("fp4")], ids=["affine", "nf4", "fp4"])
def test_nearest_codes(grid: AffineGrid | Bnb4bitGrid) -> None:
    values_OI = gaussian(8, 128)
    codes_OI = grid.nearest(values_OI)
    assert torch.equal(plain(grid.nearest(elsewhere(values_OI))), codes_OI)
    assert not torch.equal(plain(grid.nearest(elsewhere(-values_OI))), codes_OI)


@pytest.mark.parametrize("grid", [affine(), nf4()], ids=["affine", "nf4"])
def test_decoded_values(grid: AffineGrid | Bnb4bitGrid) -> None:
    codes_OI = torch.arange(16, dtype=torch.uint8).repeat(8, 8)
    values_OI = plain(grid.decode(elsewhere(codes_OI)))
    assert torch.equal(values_OI, grid.decode(codes_OI))
    assert not torch.equal(values_OI, grid.decode(codes_OI.flip(1)))


def test_expected_slope_of_nf4() -> None:
    values_OI, sigma_O1 = gaussian(8, 128), torch.full((8, 1), 0.2)
    slope_OI = nf4().expected_slope(values_OI, sigma_O1)
    by_torch_OI = plain(nf4().expected_slope(elsewhere(values_OI), sigma_O1))
    torch.testing.assert_close(by_torch_OI, slope_OI, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(by_torch_OI, nf4().expected_slope(values_OI, 2 * sigma_O1), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("count", [6, 7])
def test_two_codes_in_a_byte(count: int) -> None:
    codes = torch.arange(1, count + 1, dtype=torch.uint8)
    assert torch.equal(plain(pack_nibbles(elsewhere(codes), padding=9)), pack_nibbles(codes, padding=9))


@pytest.mark.parametrize("direction", [UP, DOWN])
def test_next_number_of_a_dense_format(direction: int) -> None:
    codes = torch.cat([gaussian(999), torch.tensor([0.0, -0.0, 65504.0])]).half()
    stepped = plain(FloatGrid(torch.float16).step(elsewhere(codes), direction))
    assert torch.equal(stepped, FloatGrid(torch.float16).step(codes, direction))
    assert not torch.equal(stepped, codes)


def test_errors_of_fp4_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fp4, "FP4_LEVELS", SimpleNamespace(to=lambda device: FP4_LEVELS))
    values_OGN, weights_GN, scale_OG = gaussian(8, 4, 16), gaussian(4, 16).square(), gaussian(8, 4).abs()
    scale_OG[0] = 0
    by_torch_OG = plain(_fp4.squared_error(elsewhere(values_OGN), weights_GN, scale_OG))
    torch.testing.assert_close(by_torch_OG, _fp4.squared_error(values_OGN, weights_GN, scale_OG), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(by_torch_OG, _fp4.squared_error(values_OGN, weights_GN, 2 * scale_OG), rtol=1e-2)


def test_sums_of_metrics() -> None:
    base_OI = gaussian(8, 128)
    merged_OI, stored_OI = base_OI + 0.1, base_OI.half().float()
    expected = changes_of(base_OI, merged_OI, stored_OI)
    found = changes_of(elsewhere(base_OI), merged_OI, stored_OI)
    assert torch.equal(plain(found.change_OI), expected.change_OI)
    assert found.dots == pytest.approx(expected.dots, rel=1e-5)
    codes = torch.tensor([0.0, -0.0, 1.0, 2.0])
    assert count_different(elsewhere(codes), codes.flip(0)) == count_different(codes, codes.flip(0)) == 4
    assert count_different(elsewhere(codes), codes.abs()) == 0


@pytest.mark.parametrize("kind", [AffineGrid, BiasGrid])
def test_where_all_codes_have_one_value_the_nearest_code_is_the_one_that_was_given(kind: type[AffineGrid]) -> None:
    scale_OG = torch.tensor([[0.0, 1.0]])
    grid = kind(scale_OG, torch.zeros(1, 2), sequential_groups(8, 4), 16)
    near_OI = torch.full((1, 8), 5, dtype=torch.uint8)
    assert grid.nearest(torch.full((1, 8), 3.0), near_OI).tolist() == [[5] * 4 + [3] * 4]
    assert grid.nearest(torch.full((1, 8), 3.0)).tolist() == [[0] * 4 + [3] * 4]
