"""Roundings where there is nothing to choose."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qmerge.adapters.updates.experts import StackUpdate
from qmerge.adapters.updates.lora import LoraUpdate
from qmerge.adapters.updates.transposed_stack import TransposedStackUpdate
from qmerge.errors import NumbersError
from qmerge.formats._affine import AffineGrid, sequential_groups
from qmerge.pipeline import add_delta, objective_of_block
from qmerge.rounding import _loops, preserve, stochastic
from qmerge.rounding._cpu_kernels import _round_to_levels
from qmerge.rounding._objective import stack_statistics
from qmerge.rounding.base import EFFORTS, InputStatistics, RoundingContext, make_objective
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


def test_halves_go_to_the_even_code() -> None:
    """As ``torch.round`` does: the compiled code has no function for it, and adds a large number instead."""
    values = np.array([-1.5, -0.5, 0.5, 1.5, 2.5, 6.5, 7.5, 9.0], np.float32)
    one, place = np.ones(1, np.float32), np.zeros(len(values), np.int64)
    expected = torch.from_numpy(values).round().clamp(-1, 7)
    level, nothing = np.zeros(len(values), np.int32), np.zeros(0, np.float32)
    _round_to_levels(values, level, place, one, one, 0 * one, nothing, nothing, np.float32(-1), np.float32(7), 0)
    assert values.tolist() == expected.tolist() == [-1, 0, 0, 2, 2, 6, 7, 7]


def test_efforts_are_those_that_the_numbers_in_the_documentation_were_measured_with() -> None:
    found = {name: (effort.tokens, effort.orders, effort.sweeps) for name, effort in EFFORTS.items()}
    assert found == {"fast": (8192, 1, 1), "default": (16384, 2, 3), "best": (32768, 8, 6)}


def test_devices_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    is_compiled_for = _loops.is_compiled_for.__wrapped__
    assert is_compiled_for(torch.device("cpu"))
    assert not is_compiled_for(torch.device("meta"))
    monkeypatch.setattr(_loops, "find_spec", lambda name: None)
    assert not is_compiled_for(torch.device("cpu"))


def statistics(seed: int, tokens: int, borrowed: float) -> InputStatistics:
    inputs_NI = torch.randn(64, 8, generator=torch.Generator().manual_seed(seed))
    return InputStatistics(inputs_NI.T @ inputs_NI / 64, cross_II=None, tokens=tokens, borrowed=borrowed)


def test_statistics_of_a_stack_are_means() -> None:
    one, other = statistics(0, 10, 0.2), statistics(1, 30, 0.6)
    found = stack_statistics([one, None, other])
    torch.testing.assert_close(found.hessian_II, (one.hessian_II + other.hessian_II) / 2)
    assert (found.tokens, found.borrowed, found.of_matrices) == (40, pytest.approx(0.4), (one, None, other))


@pytest.mark.parametrize("keeps_grid", [True, False])
def test_each_matrix_of_a_stack_has_its_own_objective(keeps_grid: bool) -> None:
    """Its own inputs; and its own directions, where errors along the delta add up, or nothing else is known."""
    matrices = [statistics(0, 10, 0.0), None, statistics(1, 30, 0.0)]
    inputs = stack_statistics(matrices)
    experts = {
        number: LoraUpdate(torch.randn(2, 4, generator=torch.Generator().manual_seed(number)), torch.ones(8, 2), 1.0)
        for number in (0, 2)
    }
    update = TransposedStackUpdate(StackUpdate(3, (8, 4), experts), (8, 4))
    step = SimpleNamespace(source=SimpleNamespace(keeps_grid=keeps_grid), shape=(12, 8))
    work: Any = SimpleNamespace(
        objective=object(), update=update, inputs=inputs, step=step, context=SimpleNamespace(device=torch.device("cpu"))
    )
    for number, of_matrix in enumerate(matrices):
        found = objective_of_block(work, Rows(4 * number, 4 * number + 4))
        directions = update.matrix_directions(number) if keeps_grid else None
        expected = make_objective(of_matrix or inputs, directions, 8, torch.device("cpu"))
        assert found is not None and torch.equal(found.K_II, expected.K_II)
    work.update = None
    assert objective_of_block(work, Rows(0, 4)) is work.objective, "of a weight that is no stack"
    work.objective = None
    assert objective_of_block(work, Rows(0, 4)) is None


@pytest.mark.parametrize(
    ("local", "target", "updated", "is_checked"),
    [("weight", "bf16", False, True), ("mask", "bf16", False, False), ("mask", "nf4", False, True),
     ("gate_up_proj", "bf16", True, True), ("weight", "bf16", True, True)],
)  # fmt: skip
def test_values_that_are_checked_after_merging(local: str, target: str, updated: bool, is_checked: bool) -> None:
    """All but masks that stay dense, which may hold infinity."""
    base_OI = torch.tensor([[1.0, -torch.inf]])
    step: Any = SimpleNamespace(target=target, weight=SimpleNamespace(local=local), name="m")
    update: Any = SimpleNamespace(apply=lambda base_OI, rows: base_OI) if updated else None
    if is_checked:
        with pytest.raises(NumbersError, match="m: the base or the merged weight contains NaN or infinity"):
            add_delta(step, base_OI, update, Rows(0, 1))
    else:
        assert add_delta(step, base_OI, update, Rows(0, 1)) is base_OI
