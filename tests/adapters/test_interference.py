"""What two adapters do to each other: against numpy on whole deltas made by peft, and where it is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qmerge.adapters.combining.combined import CombinedUpdate
from qmerge.adapters.combining.interference import PairStats, delta_cosine, pair_stats, sign_conflict, sums_from_factors
from qmerge.adapters.updates.lora import AddUpdate, DoraUpdate, LoraUpdate
from qmerge.checkpoint import folder
from qmerge.combine.base import CombineSettings
from qmerge.forecast.warnings import interference_warnings
from qmerge.schema import ModulePairRecord, PairRecord, distinct_names
from qmerge.types import Rows, Update

from .. import models
from ..conftest import Cli
from ..parity import stock

SHAPE = (48, 40)
BASE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5)) * 0.05
WEIGHTS = (0.7, -0.3, 1.5)


def lora(rank: int, seed: int) -> LoraUpdate:
    return models.lora_update(SHAPE, rank, seed=seed)


def together(*updates: Update, weights: tuple[float, ...] = WEIGHTS, method: str = "linear") -> CombinedUpdate:
    places = tuple(range(len(updates)))
    return CombinedUpdate(updates, weights[: len(updates)], method, CombineSettings(name="x", positions=places))


def met(update: CombinedUpdate, size: int = SHAPE[0], base: Tensor = BASE) -> dict[str, dict[str, float]]:
    found = PairStats(update)
    for row in range(0, len(base), size):
        found.add(base[row : row + size], Rows(row, min(row + size, len(base))))
    return found.sums()


def by_numpy(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Cosine and sign conflict of two whole deltas, float64, by the words of the documentation."""
    smaller = np.minimum(np.abs(one), np.abs(other))
    return (
        float((one * other).sum() / (np.linalg.norm(one) * np.linalg.norm(other))),
        float(smaller[np.sign(one) != np.sign(other)].sum() / smaller.sum()),
    )


def dense(update: Update, weight: float) -> np.ndarray:
    return (update.apply(BASE, Rows(0, SHAPE[0])).double() - BASE.double()).numpy() * weight


def test_all_pairs_against_numpy() -> None:
    """LoRA, DoRA and a whole delta, weighted. The difference of float32 values of size 0.2 is good to 2**-26, a delta is
    about 0.02: a thousand entries average that out far below 1e-5."""
    updates = [lora(4, 1), DoraUpdate(lora(8, 2), BASE.norm(dim=1)), AddUpdate(torch.randn(SHAPE) * 0.02)]
    found = met(together(*updates))
    assert list(found) == ["0 1", "0 2", "1 2"]
    for pair, sums in found.items():
        one, other = (dense(updates[int(place)], WEIGHTS[int(place)]) for place in pair.split())
        expected = by_numpy(one, other)
        assert (delta_cosine(sums), sign_conflict(sums)) == pytest.approx(expected, abs=1e-5)
        assert delta_cosine(sums) != pytest.approx(by_numpy(one, -other)[0], abs=1e-4), (
            "the control: the sign of a weight"
        )


def test_row_blocks_change_no_bit() -> None:
    """What is summed row by row, and what comes from the factors: the same numbers to the last bit."""
    update = together(lora(4, 1), DoraUpdate(lora(8, 2), BASE.norm(dim=1)), lora(8, 3))
    whole = met(update)
    assert all(met(update, size) == whole for size in (1, 5, 16, 47))


def test_small_factors_are_exact() -> None:
    """Beside a base of 1000, the rows of a difference would be noise; two LoRAs need no base at all."""
    update = together(lora(4, 1), lora(8, 2))
    sums, one, other = sums_from_factors(update)["0 1"], dense(update.updates[0], 0.7), dense(update.updates[1], -0.3)
    assert delta_cosine(sums) == pytest.approx(by_numpy(one, other)[0], abs=1e-6) and sign_conflict(sums) is None
    assert delta_cosine(met(update, base=BASE + 1000)["0 1"]) == delta_cosine(sums)
    assert not sums_from_factors(together(lora(4, 1), AddUpdate(BASE)))


def test_like_opposite_and_nothing() -> None:
    one = lora(4, 1)
    cases: list[tuple[float, tuple[float | None, float | None]]] = [(1.0, (1, 0)), (-1.0, (-1, 1)), (0.0, (None, None))]
    for scale, expected in cases:
        sums = met(together(one, replace(one, scale=scale * one.scale), weights=(1.0, 1.0)))["0 1"]
        assert (delta_cosine(sums), sign_conflict(sums)) == (pytest.approx(expected[0]), pytest.approx(expected[1]))
    taken_away = met(together(one, one, weights=(1.0, -0.5)))["0 1"]
    assert delta_cosine(taken_away) == pytest.approx(-1), "what is taken away fights what it is like"
    assert sign_conflict(met(together(one, lora(8, 2)))["0 1"]) == pytest.approx(0.5, abs=0.1), "unrelated ones: a half"


def test_by_hand() -> None:
    """min(|a|, |b|) = 1, 2, 0, 3; opposite in the second: 2 of 6."""
    one, two = AddUpdate(torch.tensor([[1.0, -2, 0, 3]])), AddUpdate(torch.tensor([[5.0, 4, 1, 3]]))
    sums = met(together(one, two, weights=(1.0, 1.0)), base=torch.zeros(1, 4))["0 1"]
    assert sums == {"product": 6.0, "one": 14.0, "other": 51.0, "against": 2.0, "both": 6.0}
    assert sign_conflict(sums) == pytest.approx(2 / 6) and delta_cosine(sums) == pytest.approx(6 / (14**0.5 * 51**0.5))


def test_one_adapter_meets_nobody() -> None:
    assert pair_stats(lora(4, 1)) is None and pair_stats(together(lora(4, 1))) is None and pair_stats(None) is None


def test_names_of_two_adapters_in_folders_of_one_name() -> None:
    assert distinct_names(["a", "b", "a", "a"]) == ["a", "b", "a (2)", "a (3)"]


# --- what is said ----------------------------------------------------------------------------------------------------


def pair(*modules: tuple[str, float | None, float | None]) -> PairRecord:
    records = [ModulePairRecord(module=m, cosine=c, sign_conflict=s) for m, c, s in modules]
    return PairRecord(one="math", other="chat", cosine=0.0, sign_conflict=0.5, modules=records)


def test_a_fight_is_told_with_the_way_out() -> None:
    calm, opposed, conflicting = ("l.0.q", -0.19, 0.59), ("l.1.q", -0.5, None), ("l.1.v", 0.1, 0.7)
    assert not interference_warnings([pair(calm)], "linear")
    (line,) = interference_warnings([pair(calm, opposed, conflicting)], "linear")
    assert "math and chat work against each other in q, v of 1 layer" in line
    assert "-0.50 to 0.10" in line and "70 %" in line and "--combine ties" in line
    (line,) = interference_warnings([pair(opposed)], "ties")
    assert "l.1.q" in line and "--combine" not in line and "lower the weight" in line
    assert not interference_warnings([pair(("l.0.q", None, None))], "linear")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with two adapters of different modules, and a third that undoes most of the first."""
    folder = tmp_path_factory.mktemp("two")
    model = models.llama(torch.float32)
    models.save(model, folder / "base")
    models.adapter(models.llama(torch.float32), folder / "a", target_modules=["q_proj", "v_proj"])
    models.adapter(models.llama(torch.float32), folder / "b", seed=2, target_modules=["q_proj", "down_proj"], r=8)
    return folder


def peft_deltas(folder: Path, name: str) -> dict[str, Tensor]:
    return stock.deltas(stock.loaded(folder / "base")[0], folder / name)


def test_the_report_of_a_merge(two: Path, tmp_path: Path, cli: Cli) -> None:
    """Every report has the numbers of peft's deltas by numpy; ties and more workers change none of them."""
    arguments = ("--base", two / "base", "--adapter", f"{two / 'a'}=0.7", "--adapter", f"{two / 'b'}=0.3")
    ran = cli(*arguments, "--target", "nf4", "--rounding", "nearest", "--device", "cpu", "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    report = json.loads((tmp_path / "out/qmerge.json").read_text())
    (found,) = report["interference"]
    deltas = [peft_deltas(two, name) for name in "ab"]
    both = sorted(deltas[0].keys() & deltas[1].keys())
    assert (found["one"], found["other"]) == ("a", "b") and [m["module"] + ".weight" for m in found["modules"]] == both
    for module in found["modules"]:
        one, other = (
            d[module["module"] + ".weight"].double().numpy() * w for d, w in zip(deltas, (0.7, 0.3), strict=True)
        )
        assert (module["cosine"], module["sign_conflict"]) == pytest.approx(by_numpy(one, other), abs=1e-5)
    whole = [
        np.concatenate([d[name].double().numpy() * w for name in both]) for d, w in zip(deltas, (0.7, 0.3), strict=True)
    ]
    assert (found["cosine"], found["sign_conflict"]) == pytest.approx(by_numpy(*whole), abs=1e-5)
    assert f"a and b: cosine {found['cosine']:.2f}, opposite signs in" in ran.out
    assert "adapters combined by linear," in (tmp_path / "out/README.md").read_text()
    for page in ("qmerge.html", "README.md"):
        assert "How alike the adapters are" in (tmp_path / "out" / page).read_text(), page
    again = cli(*arguments, "--target", "nf4", "--combine", "ties", "--rounding", "nearest", "--device", "cpu",
                "--workers", 2, "--max-memory", "30MB", "--out", tmp_path / "ties", "--json")  # fmt: skip
    assert json.loads(again.out)["interference"] == report["interference"], again.err
    plan = cli("plan", *arguments, "--json")
    (planned,) = json.loads(plan.out)["interference"]
    assert planned["cosine"] == found["cosine"] and planned["sign_conflict"] is None
    assert "a and b: cosine" in cli("plan", *arguments).out


def test_a_resumed_run_knows_it_too(two: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended after the last weight: the sums come from the journal, to the last bit."""
    arguments = (
        "--base",
        two / "base",
        "--adapter",
        two / "a",
        "--adapter",
        two / "b",
        "--target",
        "bf16",
        "--device",
        "cpu",
    )

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(folder, "write_index", stop)
        assert cli(*arguments, "--out", tmp_path / "out").code == 130
    resumed = cli(*arguments, "--out", tmp_path / "out", "--resume", "--json")
    at_once = cli(*arguments, "--out", tmp_path / "other", "--json")
    found = [json.loads(ran.out)["interference"] for ran in (resumed, at_once)]
    assert found[0] == found[1] and len(found[0][0]["modules"]) == 2


def test_a_fight_is_a_warning(two: Path, tmp_path: Path, cli: Cli) -> None:
    """An adapter and its own negative; the control is the run before, which has no such line."""
    arguments = ("--base", two / "base", "--adapter", two / "a", "--adapter", f"{two / 'a'}=-0.5")
    for command in (("measure", "--target", "fp32"), ("plan",)):
        ran = cli(*command, *arguments, "--device", "cpu")
        assert (
            ran.code == 0
            and "a and a (2) work against each other in q_proj, v_proj of 2 layers: cosine -1.00"
            in " ".join(ran.err.split())
        ), ran.err
    assert (
        "against each other"
        not in cli("plan", "--base", two / "base", "--adapter", two / "a", "--adapter", two / "b").err
    )


def test_one_adapter_has_no_such_section(two: Path, tmp_path: Path, cli: Cli) -> None:
    ran = cli(
        "--base", two / "base", "--adapter", two / "a", "--target", "bf16", "--out", tmp_path / "out", "--device", "cpu"
    )
    assert ran.code == 0 and json.loads((tmp_path / "out/qmerge.json").read_text())["interference"] == []
    assert "combined" not in (tmp_path / "out/README.md").read_text()
    assert not [face for face in ("qmerge.html", "README.md") if "Between" in (tmp_path / "out" / face).read_text()]
