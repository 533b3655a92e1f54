"""NF4, FP4 and int8 against bitsandbytes, bit for bit: reading, and writing on a fresh grid."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qmerge.errors import RecipeError
from qmerge.formats import get_target
from qmerge.formats._bnb4bit_find import BLOCK_SIZES, Bnb4bitOptions
from qmerge.formats.base import NoOptions, Stored
from qmerge.grids import DOWN, UP
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Rows

from . import bnb as parity

COLUMNS = (1, 2, 3, 7, 31, 32, 33, 64, 65, 96, 100, 127, 128, 160, 257, 512, 1000)
SCALES = (1e-6, 1e-3, 1.0, 37.5, 1e3)
FILLS = ("normal", "zero blocks", "all zero", "ties", "near ties", "one entry", "negative zero")

quick = settings(max_examples=120, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Case:
    """One weight and how it is stored."""

    name: str
    shape: tuple[int, int]
    options: Bnb4bitOptions
    scale: float
    fill: str
    seed: int

    def values(self) -> Tensor:
        """float32 [O, I]."""
        generator = torch.Generator().manual_seed(self.seed)
        values_OI = torch.randn(self.shape, generator=generator) * self.scale
        flat = values_OI.view(-1)
        if self.fill == "zero blocks":
            flat[: self.options.block_size] = 0
            flat[-(flat.numel() % self.options.block_size or 1) :] = 0
        elif self.fill == "all zero":
            flat.zero_()
        elif self.fill == "negative zero":
            flat[::2] = -0.0
        elif self.fill == "one entry":
            flat[1:] = 0
        elif "ties" in self.fill:
            self._put_on_midpoints(flat, generator)
        return values_OI

    def _put_on_midpoints(self, flat: Tensor, generator: torch.Generator) -> None:
        """Every value on a midpoint between two levels. For "ties" absmax is 1, and the scaled value exact; for "near
        ties" absmax is anything, and the last bit of the scaled value decides: it shows how bitsandbytes divides."""
        table = bnb.get_4bit_type(self.name, device="cpu").sort().values
        middle = ((table[1:] + table[:-1]) / 2)[torch.randint(15, flat.shape, generator=generator)]
        size = self.options.block_size
        absmax_B = torch.rand(-(-flat.numel() // size), generator=generator) + 0.5
        absmax_B = torch.ones_like(absmax_B) if self.fill == "ties" else absmax_B * self.scale
        absmax = absmax_B.repeat_interleave(size)[: flat.numel()]
        flat.copy_(middle * absmax)
        flat[::size] = absmax[::size]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shape = (draw(st.integers(1, 70)), draw(st.sampled_from(COLUMNS)))
    storage = draw(st.sampled_from(sorted(parity.STORAGES)))
    count = (shape[0] * shape[1] + 1) // 2
    if count % parity.STORAGES[storage].itemsize or count == 1:  # bitsandbytes cannot view such a weight either
        storage = "uint8"
    options = Bnb4bitOptions(draw(st.sampled_from(BLOCK_SIZES)), draw(st.booleans()), storage, "float32")
    fill, scale = draw(st.sampled_from(FILLS)), draw(st.sampled_from(SCALES))
    name, seed = draw(st.sampled_from(["nf4", "fp4"])), draw(st.integers(0, 2**31))
    return Case(name=name, shape=shape, options=options, scale=scale, fill=fill, seed=seed)


def values_by_blocks(stored: Stored, blocks: Iterable[Rows]) -> Tensor:
    return torch.cat([stored.values(rows) for rows in blocks])


def codes_by_blocks(stored: Stored, blocks: Iterable[Rows]) -> Tensor:
    return torch.cat([stored.codes(rows) for rows in blocks])


@quick
@given(cases(), st.integers(1, 3))
def test_reading_4bit(case: Case, many: int) -> None:
    equal = parity.same_values if case.name == "fp4" else parity.same
    packed, state = parity.quantized_4bit(case.values(), case.name, case.options)
    with tempfile.TemporaryDirectory() as folder, Reader() as reader:
        path = parity.saved(parity.tensors_4bit(packed, state), Path(folder))
        weight, stored = parity.opened(path, case.name, reader)
        expected_OI = parity.dequantized_4bit(packed, state)
        assert (weight.shape, weight.options) == (case.shape, case.options)
        assert equal(stored.values(Rows(0, case.shape[0])), expected_OI)
        blocks = list(parity.row_blocks(case.name, case.shape, case.options, many))
        assert equal(values_by_blocks(stored, blocks), expected_OI)
        assert equal(stored.grid.decode(codes_by_blocks(stored, blocks)), expected_OI)


@quick
@given(cases())
def test_writing_4bit(case: Case) -> None:
    values_OI = case.values()
    expected = parity.tensors_4bit(*parity.quantized_4bit(values_OI, case.name, case.options))
    written = parity.fresh(values_OI, case.name, case.options)
    assert written.keys() == expected.keys()
    different = [name for name in expected if not parity.same(written[name], expected[name])]
    assert not different, {name: (written[name], expected[name]) for name in different}


@quick
@given(cases(), st.floats(0, 2))
def test_nearest_with_a_hint_4bit(case: Case, moved: float) -> None:
    """The base's codes make nearest faster; they never change a value, nor (NF4) a code."""
    values_OI = case.values()
    with tempfile.TemporaryDirectory() as folder, Reader() as reader:
        tensors = parity.tensors_4bit(*parity.quantized_4bit(values_OI, case.name, case.options))
        _, stored = parity.opened(parity.saved(tensors, Path(folder)), case.name, reader)
        near_OI, grid = stored.codes(Rows(0, case.shape[0])), stored.grid
    assume(bool((grid.absmax_B >= 0).all()))  # type: ignore[attr-defined]  # the other case has a test of its own
    step = moved * values_OI.abs().mean()
    goal_OI = grid.decode(near_OI) + step * torch.randn(case.shape, generator=torch.Generator().manual_seed(case.seed))
    plain_OI, hinted_OI = grid.nearest(goal_OI), grid.nearest(goal_OI, near_OI)
    assert torch.equal(grid.decode(plain_OI), grid.decode(hinted_OI))
    # Where the block's absmax is 0 every code has the same value, and the base's own stays.
    different = (plain_OI != hinted_OI) & (
        grid.decode(grid.step(plain_OI, UP)) != grid.decode(grid.step(plain_OI, DOWN))
    )
    assert case.name != "nf4" or not bool(different.any())


def negative_absmax() -> tuple[Any, Tensor]:
    """A grid with a block of zeros whose absmax double quantization has made a little less than zero."""
    options = Bnb4bitOptions(64, double_quant=True, dtype="float32")
    for seed in range(100):
        values_OI = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
        values_OI[0] = 0
        values_OI[1, 0] = 9  # the largest of the absmax, so that zero is no longer stored exactly
        target = get_target("nf4")
        grid: Any = target.grid(target.scales(values_OI, options), (64, 64), options)
        if grid.absmax_B[0] < 0:
            return replace(grid, rounding_absmax_B=grid.absmax_B), values_OI
    raise AssertionError("no seed makes a negative absmax")


def test_nearest_where_absmax_is_negative() -> None:
    """Rounding to a kept grid finds the nearest of the values that the loader reads, the sign included."""
    grid, values_OI = negative_absmax()
    levels_L = bnb.get_4bit_type("nf4", device="cpu") * grid.absmax_B[0]
    goal_OI = values_OI.clone()
    goal_OI[0] = torch.linspace(-1, 1, 64) * 1.5 * grid.absmax_B[0]
    stored_OI = grid.decode(grid.nearest(goal_OI))
    best_I = (goal_OI[0][:, None] - levels_L).abs().amin(dim=1)
    assert torch.allclose((goal_OI[0] - stored_OI[0]).abs(), best_I, rtol=1e-5, atol=0)


def test_floor_and_steps_where_absmax_is_negative() -> None:
    """Stochastic rounding needs the value below and the one above it."""
    grid, values_OI = negative_absmax()
    levels_L = (bnb.get_4bit_type("nf4", device="cpu") * grid.absmax_B[0]).sort().values
    goal_OI = values_OI.clone()
    goal_OI[0] = torch.linspace(-0.99, 0.99, 64) * grid.absmax_B[0].abs()
    below_OI = grid.floor(goal_OI)
    position_I = torch.searchsorted(levels_L, goal_OI[0], right=True)
    assert torch.equal(grid.decode(below_OI)[0], levels_L[position_I - 1])
    assert torch.equal(grid.decode(grid.step(below_OI, UP))[0], levels_L[position_I])


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_nearest_with_a_hint_near_midpoints(name: str, block_size: int) -> None:
    """Values on the thresholds and one float to either side of them, where a shortcut would fail first."""
    options = Bnb4bitOptions(block_size)
    torch.manual_seed(block_size)
    base_OI = torch.randn(33, 96)  # the last block is short
    target = get_target(name)
    grid = target.grid(target.scales(base_OI, options), (33, 96), options)
    table = bnb.get_4bit_type(name, device="cpu").sort().values
    absmax = grid.absmax_B.repeat_interleave(block_size)[: 33 * 96].view(33, 96)  # type: ignore[attr-defined]
    middle_OI = ((table[1:] + table[:-1]) / 2)[torch.randint(15, (33, 96))] * absmax
    for goal_OI in (middle_OI, torch.nextafter(middle_OI, absmax), torch.nextafter(middle_OI, -absmax)):
        plain_OI = grid.nearest(goal_OI)
        for offset in (-1, 0, 1):
            near_OI = (plain_OI.short() + offset).clamp(0, 15).to(torch.uint8)
            hinted_OI = grid.nearest(goal_OI, near_OI)
            assert torch.equal(grid.decode(plain_OI), grid.decode(hinted_OI))
            assert name != "nf4" or torch.equal(plain_OI, hinted_OI)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e-38, 1e30])
def test_extreme_scales(name: str, scale: float) -> None:
    values_OI, options = torch.randn(5, 96) * scale, Bnb4bitOptions(64, dtype="float32")
    expected = parity.tensors_4bit(*parity.quantized_4bit(values_OI, name, options))
    written = parity.fresh(values_OI, name, options)
    assert [name for name in expected if not parity.same(written[name], expected[name])] == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_quant_state_text(dtype: str, double_quant: bool) -> None:
    """The JSON, byte for byte, for every dtype that a model may have had."""
    options = Bnb4bitOptions(64, double_quant, "uint8", dtype)
    values_OI = torch.randn(12, 96).to(getattr(torch, dtype))
    expected = parity.tensors_4bit(*parity.quantized_4bit(values_OI, "nf4", options))
    written = parity.fresh(values_OI.float(), "nf4", options)
    name = "weight.quant_state.bitsandbytes__nf4"
    assert json.loads(parity.raw(written[name])) == json.loads(parity.raw(expected[name]))
    assert [name for name in expected if not parity.same(written[name], expected[name])] == []


def test_storage_that_does_not_fit_is_refused() -> None:
    options = Bnb4bitOptions(64, quant_storage="float32")
    with pytest.raises(RecipeError, match="do not fill whole float32 numbers"):
        get_target("nf4").outputs("weight", (3, 3), options)


@quick
@given(st.integers(1, 40), st.sampled_from(COLUMNS), st.sampled_from(SCALES), st.booleans(), st.integers(0, 2**31))
def test_int8(rows: int, columns: int, scale: float, zeros: bool, seed: int) -> None:
    values_OI = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale
    values_OI[:: 3 if zeros else rows + 1] = 0
    expected = parity.tensors_int8(values_OI)
    written = parity.fresh(values_OI, "int8", NoOptions())
    assert [name for name in expected if not parity.same(written[name], expected[name])] == []
    with tempfile.TemporaryDirectory() as folder, Reader() as reader:
        weight, stored = parity.opened(parity.saved(expected, Path(folder)), "int8", reader)
        expected_OI = bnb.int8_vectorwise_dequant(expected["weight"], expected["SCB"])
        assert weight.shape == (rows, columns)
        assert parity.same(stored.values(Rows(0, rows)), expected_OI)
        blocks = parity.row_blocks("int8", (rows, columns), NoOptions())
        assert parity.same(values_by_blocks(stored, blocks), expected_OI)
        near_OI = stored.codes(Rows(0, rows))
        assert torch.equal(stored.grid.nearest(expected_OI), near_OI)
        goal_OI = expected_OI * 1.01
        assert torch.equal(stored.grid.nearest(goal_OI, near_OI), stored.grid.nearest(goal_OI))


def test_int8_ties_and_order_of_multiplication() -> None:
    """Halves go to even, and scales that make the order of multiplication visible."""
    values_OI = torch.arange(-127, 128).float().div(2).repeat(64, 1) * torch.rand(64, 1).add(0.5)
    expected = parity.tensors_int8(values_OI)
    assert parity.same(parity.fresh(values_OI, "int8", NoOptions())["weight"], expected["weight"])
    grid = get_target("int8").grid(expected["SCB"], (64, 255), NoOptions())
    codes, scb = expected["weight"], expected["SCB"]
    assert parity.same(grid.decode(codes), bnb.int8_vectorwise_dequant(codes, scb))
    assert not torch.equal(codes * (scb / 127)[:, None], bnb.int8_vectorwise_dequant(codes, scb))  # the control


# --- these comparisons can fail --------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["weight", "weight.absmax"])
def test_one_changed_byte_is_seen(part: str, tmp_path: Path) -> None:
    packed, state = parity.quantized_4bit(torch.randn(4, 64), "nf4", Bnb4bitOptions(64, dtype="float32"))
    tensors = {name: tensor.clone() for name, tensor in parity.tensors_4bit(packed, state).items()}
    tensors[part].view(torch.uint8).view(-1)[0] ^= 1 if part.endswith("absmax") else 0x10
    with Reader() as reader:
        _, stored = parity.opened(parity.saved(tensors, tmp_path), "nf4", reader)
        assert not parity.same(stored.values(Rows(0, 4)), parity.dequantized_4bit(packed, state))


def test_exact_nearest_for_absmax_would_be_seen() -> None:
    """bitsandbytes looks absmax up in a table on the CPU; the exactly nearest code is another one now and then."""
    options = Bnb4bitOptions(64, double_quant=True, dtype="float32")
    values_OI = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    _, state = parity.quantized_4bit(values_OI, "nf4", options)
    exact_B = values_OI.view(-1, 64).abs().amax(dim=1)
    shifted = (exact_B - exact_B.mean()).view(-1, 256)
    scaled = (shifted / shifted.abs().amax(dim=1, keepdim=True)).view(-1)
    exact_codes = (scaled[:, None] - state.state2.code).abs().argmin(dim=1).to(torch.uint8)
    differing = int((exact_codes != state.absmax).sum())
    assert 0 < differing < 0.01 * exact_codes.numel()
    assert parity.same(parity.fresh(values_OI, "nf4", options)["weight.absmax"], state.absmax)
