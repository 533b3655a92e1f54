"""Several adapters as one: the methods against peft's functions and against small cases by hand; the weights, end to end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import merge_utils
from torch import Tensor

from qmerge import plugins
from qmerge.adapters.combining.combined import CombinedUpdate, combined, delta_of
from qmerge.adapters.reading.folder import Adapter, read_adapter
from qmerge.adapters.updates.lora import AddUpdate, DoraUpdate, LoraUpdate, OwnBaseUpdate, TokenRowsUpdate
from qmerge.combine import base as common
from qmerge.combine import breadcrumbs, della, get_method, sce
from qmerge.combine.base import CombineSettings
from qmerge.errors import AdapterError, QmergeError, RecipeError
from qmerge.recipe import make_recipe
from qmerge.run import merge
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Replacement, Rows, Update

from .. import models
from ..parity import stock

METHODS = plugins.names("combine")
ROWWISE = [name for name in METHODS if get_method(name).rowwise]
NAME = "layer.weight"
SETTINGS = CombineSettings(density=0.5, seed=7, name=NAME)


def deltas_of(count: int = 3, shape: tuple[int, int] = (24, 40), seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * 0.01 for _ in range(count)]


def by(method: str, deltas: Sequence[Tensor], weights: Sequence[float], settings: CombineSettings = SETTINGS) -> Tensor:
    return get_method(method).combine(deltas, weights, settings)


def table(*rows: Sequence[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32)


# --- the contract ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_contract(method: str) -> None:
    """One sentence of help; a new float32 delta; the inputs as they were; one delta alone is possible."""
    line = plugins.help_line("combine", method)
    assert 10 < len(line) <= 120 and line[-1] in ".)"
    for count, shape in ((1, (24, 40)), (2, (1, 7)), (3, (5, 1)), (5, (24, 40))):
        deltas = deltas_of(count, shape)
        before = [delta.clone() for delta in deltas]
        for density in (1.0, 0.5, 0.01):
            made = by(method, deltas, [0.7, -0.3, 1.0, 0.2, 2.0][:count], replace(SETTINGS, density=density))
            assert made.dtype == torch.float32 and made.shape == shape and bool(made.isfinite().all())
            assert all(map(torch.equal, deltas, before)), "changed in place"
            assert all(made.data_ptr() != delta.data_ptr() for delta in deltas)


@pytest.mark.parametrize("method", METHODS)
def test_same_inputs_same_bytes_and_zero_stays_zero(method: str) -> None:
    deltas = deltas_of()
    assert torch.equal(by(method, deltas, [0.5] * 3), by(method, deltas_of(), [0.5] * 3))
    assert not by(method, [torch.zeros(4, 6)] * 2, [0.5, 0.5]).any()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_odd_in_the_deltas_where_no_sums_are_zero(method: str) -> None:
    """Nothing favours a sign: −Δ gives −combine(Δ)."""
    deltas = deltas_of()
    made, mirrored = by(method, deltas, [0.7, 0.3, 0.5]), by(method, [-delta for delta in deltas], [0.7, 0.3, 0.5])
    assert torch.allclose(made, -mirrored, atol=1e-9)


@pytest.mark.parametrize("method", ROWWISE)
def test_rowwise_methods_do_not_depend_on_row_blocks(method: str) -> None:
    deltas = deltas_of(5, (23, 37))  # rows that straddle the steps of the generator's counter
    whole = by(method, deltas, [0.7, -0.3, 1.0, 0.2, 0.1])
    for size in (1, 4, 5, 22):
        parts = [
            by(
                method,
                [d[row : row + size] for d in deltas],
                [0.7, -0.3, 1.0, 0.2, 0.1],
                replace(SETTINGS, start_row=row),
            )
            for row in range(0, 23, size)
        ]
        assert torch.equal(torch.cat(parts), whole), size


def test_methods_that_are_not_rowwise_do() -> None:
    """The control: what ROWWISE is False for gives other values in row blocks (svd with less than full rank)."""
    deltas = deltas_of()
    for method in set(METHODS) - set(ROWWISE):
        settings = replace(SETTINGS, rank=2)
        whole = by(method, deltas, [0.7, 0.3, 0.5], settings)
        parts = [by(method, [d[r : r + 8] for d in deltas], [0.7, 0.3, 0.5], settings) for r in (0, 8, 16)]
        assert not torch.allclose(torch.cat(parts), whole, atol=1e-5), method


# --- peft's functions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.0, -0.5, 0.25], [0.7], [2.0, 0.0, -1.0, 0.5]], ids=str)
@pytest.mark.parametrize("density", [0.5, 0.2, 0.33])
def test_equals_peft_bit_for_bit(weights: list[float], density: float) -> None:
    deltas, numbers = deltas_of(len(weights)), torch.tensor(weights)
    settings = replace(SETTINGS, density=density)
    assert torch.equal(by("linear", deltas, weights, settings), merge_utils.task_arithmetic(deltas, numbers))
    for method in ("magnitude_prune", "ties"):
        expected = getattr(merge_utils, method)(deltas, numbers, density)
        assert torch.equal(by(method, deltas, weights, settings), expected), method
        other = getattr(merge_utils, method)(deltas, numbers, density / 2)
        assert not torch.equal(by(method, deltas, weights, settings), other), "the control"


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_equals_peft_given_the_same_draws(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, deltas = [0.7, -0.3, 0.5], deltas_of()
    places = iter(range(3))
    monkeypatch.setattr(
        torch, "bernoulli", lambda p: (common.uniform_draws(p, next(places), SETTINGS) < p).to(p.dtype)
    )  # one call per adapter, in order
    expected = getattr(merge_utils, method)(deltas, torch.tensor(weights), SETTINGS.density)
    assert torch.equal(by(method, deltas, weights), expected)
    assert not torch.equal(by(method, deltas, weights, replace(SETTINGS, seed=8)), expected), "the control"


@pytest.mark.filterwarnings("ignore:The density")
def test_density_1_drops_nothing() -> None:
    deltas, weights, whole = deltas_of(), [0.7, -0.3, 0.5], replace(SETTINGS, density=1.0)
    linear = by("linear", deltas, weights, whole)
    for method in ("magnitude_prune", "dare_linear", "breadcrumbs", "svd"):
        assert torch.equal(by(method, deltas, weights, whole), linear), method
    assert torch.equal(by("dare_ties", deltas, weights, whole), by("ties", deltas, weights, whole))
    assert torch.equal(by("ties", deltas, weights, whole), merge_utils.ties(deltas, torch.tensor(weights), 1.0))


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_ties_by_hand() -> None:
    """Figure 1 of the paper, in numbers: trim to half, elect by the sum, average those that agree."""
    one, other = table([4, -3, 0.5, 1]), table([-1, -5, 0.5, 2])
    assert by("ties", [one, other], [1, 1]).tolist() == [[4, -4, 0, 2]]
    assert by("ties", [one, other], [1, 1], replace(SETTINGS, density=1.0)).tolist() == [[4, -4, 0.5, 1.5]]


def test_breadcrumbs_by_hand() -> None:
    """Ten entries, γ = 0.2, density 0.3: the two largest are outliers, the next three stay."""
    delta = table([1, -2, 3, -4, 5, -6, 7, -8, 9, -10])
    settings = replace(SETTINGS, density=0.3, gamma=0.2)
    assert by("breadcrumbs", [delta], [1], settings).tolist() == [[0, 0, 0, 0, 0, -6, 7, -8, 0, 0]]
    assert by("breadcrumbs", [delta, delta], [1, -0.5], settings).tolist() == [[0, 0, 0, 0, 0, -3, 3.5, -4, 0, 0]]
    assert torch.equal(breadcrumbs.masked(delta, 0.3, 0), by("magnitude_prune", [delta], [1], settings))
    assert int(breadcrumbs.masked(delta, 0.9, 0.2).count_nonzero()) == 9, "density goes before outliers"


def test_sce_by_hand() -> None:
    """Variances 4, 0, 9, 1: half of the three that differ is one, the third; at density 0.7 two, the first and third."""
    one, other = table([1, 2, 4, 1]), table([5, 2, -2, 3])
    assert by("sce", [one, other], [1, 1]).tolist() == [[0, 0, 4, 0]]
    # At density 0.7 squares are 1 + 16 = 17 and 25 + 4 = 29: η = 17/46, 29/46; the third has one positive, so it is 4.
    made = by("sce", [one, other], [1, 1], replace(SETTINGS, density=0.7))
    assert torch.allclose(made, table([(17 * 1 + 29 * 5) / 46, 0, 4, 0]))
    assert sce.energy_shares([one, other]) == [22 / 64, 42 / 64]
    assert by("sce", [one], [2]).tolist() == [[0, 4, 8, 0]], "one alone: its largest"
    assert by("sce", [one, -other], [1, -1], replace(SETTINGS, density=0.7)).tolist() == made.tolist()


def test_model_stock_by_hand() -> None:
    """cos θ = 1/√2: t = 2cos/(1 + cos) = 0.8284; at right angles t = 0: the base."""
    one, other, third = table([1, 0]), table([1, 1]), table([0, 2])
    t = 2 / (1 + 2**0.5)
    assert torch.allclose(by("model_stock", [one, other], [1, 1]), t * table([1, 0.5]))
    assert not by("model_stock", [one, third], [1, 1]).any()
    assert not by("model_stock", [one, other], [1, -1]).any(), "an obtuse angle counts as a right one"
    mean = (2**0.5 / 2 * 2 + 0) / 3
    assert torch.allclose(
        by("model_stock", [one, other, third], [1, 1, 1]), 3 * mean / (1 + 2 * mean) * table([2 / 3, 1])
    )
    assert by("model_stock", [other], [0.5]).tolist() == [[0.5, 0.5]]
    assert torch.allclose(by("model_stock", [one, one], [1, 1]), one)


def test_della_by_hand() -> None:
    """Keep probabilities go up with the rank within the row, and are ``density`` on average."""
    delta = table([3, -1, 2, -5, 4], [0, 0, 1, -1, -9])
    shares = della.keep_probability(delta, 0.5, 0.2)
    assert torch.allclose(shares, table([0.5, 0.4, 0.45, 0.6, 0.55], [0.4, 0.45, 0.5, 0.55, 0.6]))
    assert torch.allclose(della.keep_probability(delta, 0.05, 0.4).amin(), torch.tensor(0.025)), "narrowed"
    assert torch.allclose(della.keep_probability(delta, 0.9, 0.4).amax(), torch.tensor(0.95)), "narrowed"
    made, draws = by("della", [delta], [2], replace(SETTINGS, epsilon=0.2)), common.uniform_draws(delta, 0, SETTINGS)
    assert torch.allclose(made, torch.where(draws < shares, 2 * delta / shares, 0.0))


@pytest.mark.parametrize("method", ["dare_linear", "della"])
def test_what_is_dropped_is_right_on_average(method: str) -> None:
    """The mean over 400 seeds lies within 5 standard errors of the delta, in every entry; the control is biased."""
    delta = deltas_of(1, (10, 20))[0]
    made = torch.stack([by(method, [delta], [1], replace(SETTINGS, seed=seed)) for seed in range(400)])
    errors = (made.mean(dim=0) - delta).abs() / (made.std(dim=0) / 20)
    assert float(errors.max()) < 5
    assert float(((made / 2).mean(dim=0) - delta).abs().div(made.std(dim=0) / 40).max()) > 5, "the control"
    assert float((made != 0).float().mean()) == pytest.approx(0.5, abs=0.01)


def test_svd_is_the_nearest_of_its_rank() -> None:
    deltas, settings = deltas_of(2), replace(SETTINGS, rank=3)
    total = (0.7 * deltas[0] - 0.3 * deltas[1]).double()
    made = by("svd", deltas, [0.7, -0.3], settings).double()
    values = torch.linalg.svdvals(total)
    assert int(torch.linalg.matrix_rank(made, rtol=1e-5)) == 3
    assert float((total - made).norm()) == pytest.approx(float(values[3:].norm()), rel=1e-5)


# --- what is drawn ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della"])
def test_draws_depend_on_seed_weight_and_place(method: str) -> None:
    deltas, weights = deltas_of(2), [0.5, 0.5]
    made = by(method, deltas, weights)
    for changes in ({"seed": 8}, {"name": "other.weight"}, {"positions": (0, 2)}):
        assert not torch.equal(by(method, deltas, weights, replace(SETTINGS, **changes)), made), changes
    assert torch.equal(by(method, deltas, weights, replace(SETTINGS, positions=(0, 1))), made)
    # An adapter that is absent from this weight changes no draw of the others.
    alone = by(method, deltas[1:], weights[1:], replace(SETTINGS, positions=(1,)))
    assert torch.equal(alone != 0, by(method, [0 * deltas[0], deltas[1]], weights) != 0)


def test_two_adapters_are_dropped_independently() -> None:
    kept = [d != 0 for d in common.dropped([torch.ones(200, 200)] * 2, [0.5, 0.5], SETTINGS)]
    assert float((kept[0] & kept[1]).float().mean()) == pytest.approx(0.25, abs=0.01)


# --- updates ---------------------------------------------------------------------------------------------------------

SHAPE = (48, 40)
BASE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5)) * 0.05
ALL = Rows(0, SHAPE[0])


def lora(rank: int, seed: int) -> LoraUpdate:
    return models.lora_update(SHAPE, rank, seed=seed)


def dora(rank: int, seed: int) -> DoraUpdate:
    magnitude = BASE.norm(dim=1) * (1 + 0.1 * torch.randn(SHAPE[0], generator=torch.Generator().manual_seed(seed)))
    return DoraUpdate(lora(rank, seed), magnitude)


def together(
    updates: Sequence[Update], weights: Sequence[float], method: str = "linear", **more: Any
) -> CombinedUpdate:
    settings = replace(SETTINGS, positions=tuple(range(len(updates))), **more)
    return CombinedUpdate(tuple(updates), tuple(weights), method, settings)


def test_linear_of_loras_is_the_sum_of_products() -> None:
    """base + (w₁·s₁B₁A₁ + w₂·s₂B₂A₂), each product as peft makes it; the control: products of sums have cross terms."""
    one, two = lora(4, 1), lora(8, 2)
    update = together([one, two], [0.7, -0.3])
    products = [u.B_OR @ u.A_RI * u.scale for u in (one, two)]
    assert torch.equal(update.apply(BASE, ALL), BASE + (products[0] * 0.7 + products[1] * -0.3))
    same_rank = lora(4, 3)
    crossed = (one.B_OR * 0.5**0.5 + same_rank.B_OR * 0.5**0.5) @ (one.A_RI * 0.5**0.5 + same_rank.A_RI * 0.5**0.5)
    exact = together([one, same_rank], [0.5, 0.5]).apply(BASE, ALL) - BASE
    assert stock.distance(crossed * one.scale, exact) > 0.5
    assert update.rank == 12 and update.scale == 1 and update.shape == SHAPE and not update.whole
    assert update.to(torch.device("cpu")).updates[0].rank == 4


@pytest.mark.parametrize("method", ["linear", "svd"])
def test_directions_and_norms_are_those_of_the_whole_delta(method: str) -> None:
    update = together([lora(4, 1), lora(8, 2)], [0.7, -0.3], method, rank=8)
    delta = (update.apply(torch.zeros(SHAPE), ALL)).double()
    found = update.directions()
    assert found is not None and update.rank == (12 if method == "linear" else 8)
    u, s, v = (part.double() for part in found)
    assert stock.distance(u * s @ v.T, delta) < 1e-6
    assert torch.allclose(s[: update.rank], torch.linalg.svdvals(delta)[: update.rank], rtol=1e-5)
    norms = update.row_norms()
    assert norms is not None and torch.allclose(norms.double(), delta.norm(dim=1), rtol=1e-5)
    more_than_all = together([lora(30, 1), lora(30, 2)], [0.7, -0.3])  # ranks that add up to more than there are
    u, s, v = more_than_all.directions()  # type: ignore[misc]
    assert stock.distance(u * s @ v.T, more_than_all.apply(torch.zeros(SHAPE), ALL)) < 1e-5


def test_no_directions_where_the_delta_is_no_small_product() -> None:
    for update in (together([lora(4, 1), dora(4, 2)], [0.7, 0.3]), together([lora(4, 1), lora(4, 2)], [1, 1], "ties")):
        assert update.directions() is None and update.row_norms() is None
    assert together([dora(4, 2), lora(4, 1)], [1, 1], "svd", rank=4).directions() is None


def test_svd_from_small_factors_is_that_of_whole_deltas() -> None:
    update = together([lora(4, 1), lora(8, 2)], [0.7, -0.3], "svd", rank=6)
    whole = by("svd", [delta_of(u, BASE, ALL) for u in update.updates], update.weights, update.settings)
    assert stock.distance(update.apply(BASE, ALL) - BASE, whole) < 1e-5 and not update.whole
    assert together([dora(4, 1), lora(8, 2)], [0.7, -0.3], "svd", rank=6).whole


def test_different_kinds_add_up() -> None:
    own = OwnBaseUpdate(BASE + 0.01, lora(2, 4))
    tokens = TokenRowsUpdate([0, 17], torch.ones(2, SHAPE[1]))
    updates: list[Update] = [lora(4, 1), dora(8, 2), AddUpdate(deltas_of(1, SHAPE)[0]), own, tokens]
    weights = [0.7, -0.3, 0.5, 1.5, 0.25]
    update = together(updates, weights)
    expected = BASE.double()
    for one, weight in zip(updates, weights, strict=True):
        expected = expected + weight * (one.apply(BASE, ALL).double() - BASE.double())
    found = update.apply(BASE, ALL)
    assert stock.distance(found, expected) < 1e-6
    assert update.shape == SHAPE and update.rank == 4 + 8 + 1 + 2 + 2
    parts = [update.apply(BASE[row : row + 16], Rows(row, row + 16)) for row in range(0, 48, 16)]
    assert torch.equal(torch.cat(parts), found)


def test_delta_of_a_lora_is_exact() -> None:
    """Beside a base of 1000, a difference would lose ten bits of it: the control is the difference."""
    update, large = lora(4, 1), torch.full(SHAPE, 1000.0)
    exact = update.B_OR @ update.A_RI * update.scale
    assert torch.equal(delta_of(update, large, ALL), exact)
    assert torch.equal(delta_of(AddUpdate(exact), large, ALL), exact)
    assert stock.distance(update.apply(large, ALL) - large, exact) > 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_row_blocks_change_no_byte(method: str) -> None:
    update = together([lora(4, 1), lora(8, 2)], [0.7, 0.3], method, rank=8)
    assert update.whole == (method not in ROWWISE and method != "svd")
    if not update.whole:
        found = update.apply(BASE, ALL)
        for size in (1, 5, 16):
            rows = [Rows(row, min(row + size, SHAPE[0])) for row in range(0, SHAPE[0], size)]
            parts = [update.apply(BASE[r.start : r.stop], r) for r in rows]
            assert torch.equal(torch.cat(parts), found), size
        return
    with pytest.raises(AssertionError, match="all rows"):
        update.apply(BASE[:8], Rows(0, 8))


# --- adapters --------------------------------------------------------------------------------------------------------


def adapter(
    updates: dict[str, Update], replaced: dict[str, Tensor] | None = None, name: str = "a", **config: Any
) -> Adapter:
    whole = {weight: Replacement(values) for weight, values in (replaced or {}).items()}
    tensors = {weight: [f"{weight}.part"] for weight in (*updates, *whole)}
    return Adapter(
        folder=Path(name),
        kind="lora",
        config={"r": 4, **config},
        updates=updates,
        replaced=whole,
        tensors=tensors,
    )


def test_weights_of_one_adapter_go_through_the_method_too() -> None:
    a, b = adapter({"x": lora(4, 1), "y": lora(4, 2)}), adapter({"y": lora(8, 3), "z": lora(8, 4)}, name="b")
    made = combined([a, b], [0.5, 1.0], "linear", CombineSettings())
    assert list(made.updates) == ["x", "y", "z"] and made.tensors["y"] == ["y.part"] * 2 and made.kind == "lora"
    x = made.updates["x"]
    assert isinstance(x, CombinedUpdate) and x.settings.positions == (0,) and x.weights == (0.5,)
    assert stock.distance(x.apply(BASE, ALL) - BASE, 0.5 * delta_of(a.updates["x"], BASE, ALL)) < 1e-6
    assert made.updates["z"] is b.updates["z"], "to the bit what the adapter alone does"
    ties = combined([a, b], [0.5, 1.0], "ties", CombineSettings(density=0.5))
    z = ties.updates["z"]
    assert isinstance(z, CombinedUpdate) and z.settings.positions == (1,) and z.settings.name == "z"
    assert float((z.apply(torch.zeros(SHAPE), ALL) != 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    svd = combined([a, b], [0.5, 1.0], "svd", CombineSettings()).updates["y"]
    assert svd.rank == 8, "the larger of the two"


def test_values_that_were_trained_whole() -> None:
    norm, other = torch.ones(4), torch.full((4,), 2.0)
    a, b = adapter({"x": lora(4, 1)}, {"n": norm}), adapter({"x": lora(4, 2)}, {"n": norm.clone()}, "b")
    made = combined([a, b], [0.7, 0.3], "linear", CombineSettings())
    assert torch.equal(made.replaced["n"].values, norm) and "n" not in made.updates
    alone = combined([a, adapter({"x": lora(4, 2)})], [1.0, 0.3], "ties", CombineSettings())
    assert torch.equal(alone.replaced["n"].values, norm)
    cases: list[tuple[Adapter, float, str]] = [
        (adapter({"x": lora(4, 2)}, {"n": other}, "b"), 1.0, r"n was trained whole in a, b, to different values"),
        (adapter({"x": lora(4, 2)}, None, "b"), 0.7, r"n was trained whole in a, whose weight is 0.7.*weight 1"),
        (
            adapter({"n": lora(4, 2)}, None, "b"),
            1.0,
            r"n was trained whole in one adapter and changed by another \(a, b\)",
        ),
    ]
    for second, weight, message in cases:
        with pytest.raises(AdapterError, match=message):
            combined([a, second], [weight, 1.0], "linear", CombineSettings())


def test_config_is_merged_or_refused() -> None:
    a = adapter({"x": lora(4, 1)}, bias="none", modules_to_save=["norm"], base_model_name_or_path="base")
    b = adapter({"model.embed_tokens.weight": lora(4, 2)}, None, "b", bias="all", modules_to_save=["head", "norm"],
                ensure_weight_tying=True)  # fmt: skip
    config = combined([a, b], [1.0, 1.0], "linear", CombineSettings()).config
    assert config["bias"] == "all" and config["modules_to_save"] == ["norm", "head"]
    assert config["ensure_weight_tying"] is True and config["base_model_name_or_path"] == "base"
    assert combined([a, a], [1.0, 1.0], "linear", CombineSettings()).config["bias"] == "none"
    untied = replace(b, config={}, folder=Path("c"))
    with pytest.raises(AdapterError, match="ensure_weight_tying is True in b, False in c"):
        combined([b, untied], [1.0, 1.0], "linear", CombineSettings())
    with pytest.raises(AdapterError, match="fan_in_fan_out is False in a, True in b"):
        combined([a, replace(b, config={"fan_in_fan_out": True})], [1.0, 1.0], "linear", CombineSettings())


def test_bad_input_is_refused() -> None:
    a = adapter({"x": lora(4, 1)})
    smaller = adapter({"x": models.lora_update((40, 40))}, None, "b")
    cases: list[tuple[Callable[[], object], type[QmergeError], str]] = [
        (
            lambda: combined([a, smaller], [1, 1], "linear", CombineSettings()),
            AdapterError,
            r"x is \[48, 40\] for a and \[40, 40\] for b",
        ),
        (lambda: combined([a], [1, 1], "linear", CombineSettings()), RecipeError, "2 weights for 1 adapters"),
        (lambda: combined([], [], "linear", CombineSettings()), RecipeError, "0 weights for 0 adapters"),
        (lambda: combined([a], [float("nan")], "linear", CombineSettings()), RecipeError, "weights are nan"),
        (lambda: combined([a], [1], "tise", CombineSettings()), RecipeError, "Did you mean 'ties'"),
        (lambda: CombineSettings(density=0), RecipeError, "density is 0"),
        (lambda: CombineSettings(density=1.5), RecipeError, "density is 1.5"),
        (lambda: CombineSettings(rank=0), RecipeError, "rank of svd is 0"),
        (lambda: CombineSettings(gamma=1), RecipeError, "gamma is 1"),
        (lambda: CombineSettings(epsilon=-0.1), RecipeError, "epsilon is -0.1"),
    ]  # fmt: skip
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()


# --- peft's add_weighted_adapter -------------------------------------------------------------------------------------

TWO = {
    "a": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
    "b": {"r": 8, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
}
WEIGHTS = [0.7, -0.3]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[PeftModel, list[Adapter], Path]:
    """A model with two adapters of different ranks on different modules, and the same two as folders beside its base."""
    folder = tmp_path_factory.mktemp("combine")
    model = models.llama(torch.float32)
    models.save(model, folder / "base")
    configs = {name: LoraConfig(**settings) for name, settings in TWO.items()}
    wrapped = get_peft_model(model, configs["a"], adapter_name="a", autocast_adapter_dtype=False)
    wrapped.add_adapter("b", configs["b"])
    torch.manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) * (0.1 if "lora_B" in name else 0.2)
    wrapped.save_pretrained(folder)
    with Reader() as reader:
        return wrapped, [read_adapter(folder / name, reader) for name in TWO], folder


def peft_deltas(model: PeftModel, name: str) -> dict[str, Tensor]:
    """What an adapter adds to each weight, by peft."""
    found = {}
    for module_name, module in model.base_model.model.named_modules():
        if name in getattr(module, "lora_A", {}):
            found[f"{module_name}.weight"] = module.get_delta_weight(name).detach()
    return found


@pytest.mark.parametrize(
    ("ours", "peft", "more"),
    [("linear", "cat", {}), ("svd", "svd", {"svd_full_matrices": False}), ("svd", "svd", {"svd_rank": 3})],
    ids=["linear", "svd", "svd rank 3"],
)
def test_deltas_are_those_of_add_weighted_adapter(
    two: tuple[PeftModel, list[Adapter], Path], ours: str, peft: str, more: dict[str, Any]
) -> None:
    model, adapters, _ = two
    name = f"{peft} {len(more)} {more.get('svd_rank')}".replace(" ", "_")
    model.add_weighted_adapter(list(TWO), WEIGHTS, name, combination_type=peft, **more)
    expected = peft_deltas(model, name)
    rank = more.get("svd_rank", 8 if ours == "svd" else None)  # peft: the largest of the adapters, on every module
    made = combined(adapters, WEIGHTS, ours, CombineSettings(rank=rank))
    assert made.updates.keys() == expected.keys()
    for weight, update in made.updates.items():
        delta = update.apply(torch.zeros_like(expected[weight]), Rows(0, len(expected[weight])))
        assert stock.distance(delta, expected[weight]) < 2e-6, weight
    model.add_weighted_adapter(["a", "b"], [0.7, 0.3], f"{name}_control", combination_type=peft, **more)
    control = peft_deltas(model, f"{name}_control")
    both = [w for w in expected if "q_proj" in w]
    assert min(stock.distance(control[w], expected[w]) for w in both) > 0.1, "the control: another weight"


@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
def test_deltas_are_those_of_peft_where_it_combines_whole_deltas(
    two: tuple[PeftModel, list[Adapter], Path], method: str
) -> None:
    """peft's ``ties_svd`` combines deltas as is done here, then cuts their rank: to full rank, it cuts nothing."""
    model, adapters, _ = two
    more = {"combination_type": f"{method}_svd", "svd_rank": 64, "svd_full_matrices": False}
    for name, density in ((method, 0.5), (f"{method}_control", 0.4)):
        model.add_weighted_adapter(list(TWO), WEIGHTS, name, density=density, **more)
    expected, control = peft_deltas(model, method), peft_deltas(model, f"{method}_control")
    made = combined(adapters, WEIGHTS, method, CombineSettings(density=0.5))
    assert made.updates.keys() == expected.keys()
    for weight, update in made.updates.items():
        delta = update.apply(torch.zeros_like(expected[weight]), Rows(0, len(expected[weight])))
        assert stock.distance(delta, expected[weight]) < 5e-6, weight
        assert stock.distance(delta, control[weight]) > 0.01, "the control: another density"


def test_pefts_own_linear_has_cross_terms(two: tuple[PeftModel, list[Adapter], Path]) -> None:
    """Why deltas are combined and not factors: peft's ``linear`` needs equal ranks and is far from the sum of the deltas."""
    model, adapters, _ = two
    with pytest.raises(ValueError, match="same r value"):
        model.add_weighted_adapter(list(TWO), WEIGHTS, "linear", combination_type="linear")
    model.add_weighted_adapter(["a", "a"], [0.5, 0.5], "twice", combination_type="linear")
    found, once = peft_deltas(model, "twice"), peft_deltas(model, "a")
    assert all(stock.distance(found[w], once[w]) > 0.5 for w in once), (
        "a half and a half of one adapter: peft doubles it"
    )
    made = combined([adapters[0]] * 2, [0.5, 0.5], "linear", CombineSettings())
    for weight, delta in once.items():
        assert stock.distance(made.updates[weight].apply(torch.zeros_like(delta), Rows(0, len(delta))), delta) < 1e-6


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
def test_merged_end_to_end(two: tuple[PeftModel, list[Adapter], Path], tmp_path: Path, method: str) -> None:
    """The folder holds base + combined delta, and no byte depends on the number of workers or the size of row blocks."""
    _, adapters, folder = two
    made = combined(adapters, WEIGHTS, method, CombineSettings(density=0.5, seed=1))
    asked = {
        "base": str(folder / "base"),
        "adapter": [f"{folder / name}={weight}" for name, weight in zip(TWO, WEIGHTS, strict=True)],
        "combine": method,
        "density": 0.5,
        "seed": 1,
        "rounding": "nearest",
        "device": "cpu",
    }
    out = tmp_path / "out"
    merge(make_recipe({**asked, "target": "fp32", "out": str(out)}))
    found, base = stock.tensors(out), stock.tensors(folder / "base")
    for name, values in base.items():
        update = made.updates.get(name)
        expected = update.apply(values, Rows(0, len(values))) if update else values
        assert torch.equal(found[name], expected), name
    assert not torch.equal(
        found["model.layers.0.self_attn.v_proj.weight"], base["model.layers.0.self_attn.v_proj.weight"]
    )
    for n in (1, 2):
        merge(
            make_recipe(
                {**asked, "target": "nf4", "out": str(tmp_path / str(n)), "workers": n, "max_memory": f"{n * 30}MB"}
            )
        )
    nf4 = [stock.tensors(tmp_path / str(n)) for n in (1, 2)]
    assert all(torch.equal(tensor, nf4[1][name]) for name, tensor in nf4[0].items())
