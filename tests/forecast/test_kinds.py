"""Predictions from a few weights of each kind: as good as from all of them, and the same roundings."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import qmerge.demo
from qmerge.forecast import kinds
from qmerge.forecast.kinds import predict_kinds, spread, weights_by_kind
from qmerge.forecast.predict import predict, total_kept, total_noise
from qmerge.forecast.roundings import choose_roundings, is_settled
from qmerge.forecast.targets import READ_ENTRIES, READ_WEIGHTS
from qmerge.formats import all_targets
from qmerge.planning.plan import Plan, make_plan, make_run_context
from qmerge.recipe import make_recipe
from qmerge.safetensors_io.reader import Reader

from .. import models

DEMO = Path(qmerge.demo.__file__).parent
LAYERS = 12


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A Llama of 12 layers whose deltas differ in size by a factor of 30, in no order; layer 5 has none."""
    folder = tmp_path_factory.mktemp("deep")
    model = models.llama(num_hidden_layers=LAYERS)
    models.save(model, folder / "base")
    models.adapter(model, folder / "adapter", size=0.0005)
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        layer = int(name.split(".layers.")[1].split(".")[0])
        if "lora_B" in name:
            tensors[name] = tensor * (0.0 if layer == 5 else 30 ** ((layer * 7 % LAYERS) / LAYERS) / 30)
    save_file(tensors, path)
    return {"base": str(folder / "base"), "adapter": str(folder / "adapter")}


NOT_OF_THE_DEMO = {"gguf", "mxfp4"}
"""Targets whose kinds depend on the mix, and those of gpt-oss only."""


def planned(reader: Reader, inputs: dict[str, str], **settings: str) -> Plan:
    return make_plan(make_recipe({**inputs, "device": "cpu", **settings}), reader)


@pytest.mark.parametrize("target", sorted(all_targets().keys() - NOT_OF_THE_DEMO))
def test_a_few_weights_predict_all_of_the_demo(target: str) -> None:
    """Kept within 0.05, noise within 5 %, with as few values as the comparison of targets reads."""
    with Reader() as reader:
        plan = planned(reader, {"base": str(DEMO / "base-nf4"), "adapter": str(DEMO / "adapter")}, target=target)
        context = make_run_context(plan, reader)
        every = predict(plan, context)
        few = predict_kinds(plan, context, weights=READ_WEIGHTS, entries=READ_ENTRIES)
    assert (few.kinds, few.read) == (7, 21)
    assert total_kept(few.survivals) == pytest.approx(total_kept(every), abs=0.05)
    assert total_noise(few.survivals) == pytest.approx(total_noise(every), rel=0.05)


@pytest.mark.parametrize("target", ["nf4", "int8", "bf16", "fp16", "gptq"])
def test_the_roundings_are_those_of_all_weights(target: str, deep: dict[str, str]) -> None:
    """Where the largest and the smallest delta of a kind are rounded differently, every weight is read."""
    with Reader() as reader:
        plan = planned(reader, deep, target=target)
        context = make_run_context(plan, reader)
        expected, _ = choose_roundings(plan, predict(plan, context))
        prediction = predict_kinds(plan, context, is_settled=is_settled)
        found, _ = choose_roundings(plan, prediction.survivals)
    assert [step.rounding for step in found.steps] == [step.rounding for step in expected.steps]
    if target == "bf16":
        assert {step.rounding for step in found.merged} == {"nearest", "preserve"}
        assert prediction.read == 7 * LAYERS
    if target == "gptq":
        assert prediction.read == 7 * 4


def test_weights_that_are_not_read_lie_between_those_that_are(deep: dict[str, str]) -> None:
    with Reader() as reader:
        plan = planned(reader, deep, target="bf16")
        context = make_run_context(plan, reader)
        every = predict(plan, context)
        few = predict_kinds(plan, context).survivals
    assert [survival.module for survival in few] == [survival.module for survival in every]
    for found, expected in zip(few, every, strict=True):
        assert found.delta_squared == pytest.approx(expected.delta_squared)
        if ".layers.5." in found.module:
            assert (found.kept, found.noise, found.gap_to_delta, found.relative_size) == (None, None, None, 0.0)
            continue
        assert found.kept == pytest.approx(expected.kept, abs=0.1)
        assert found.noise == pytest.approx(expected.noise, rel=0.15)
        assert found.relative_size == pytest.approx(expected.relative_size, rel=0.1)
        assert found.gap_to_delta == pytest.approx(expected.gap_to_delta, rel=0.1)


def test_unknown_sizes_are_never_settled(deep: dict[str, str], tmp_path: Path) -> None:
    """DoRA's delta depends on the base: which of them is the largest is not known."""
    model = models.llama(num_hidden_layers=LAYERS)
    dora = models.adapter(model, tmp_path / "dora", use_dora=True)
    with Reader() as reader:
        plan = planned(reader, {**deep, "adapter": str(dora)}, target="nf4")
        context = make_run_context(plan, reader)
        assert predict_kinds(plan, context, is_settled=is_settled).read == 7 * LAYERS
        few = predict_kinds(plan, context)
        every = predict(plan, context)
    assert few.read == 7 * 4
    assert total_kept(few.survivals) == pytest.approx(total_kept(every), abs=0.05)
    assert total_noise(few.survivals) == pytest.approx(total_noise(every), rel=0.1)


def test_a_kind_is_read_and_written_in_one_way(deep: dict[str, str]) -> None:
    with Reader() as reader:
        plan = planned(reader, deep, target="nf4")
    by_kind = weights_by_kind(plan.merged)
    assert [len(steps) for steps in by_kind.values()] == [LAYERS] * 7
    for steps in by_kind.values():
        assert len({step.shape for step in steps}) == 1
        assert len({step.name.split(".")[-2] for step in steps}) == 1


@pytest.mark.parametrize(
    ("length", "positions"),
    [(1, [0]), (2, [0, 1]), (4, [0, 1, 2, 3]), (30, [0, 10, 19, 29]), (200_000, [0, 66_666, 133_333, 199_999])],
)
def test_positions_are_spread_from_first_to_last(length: int, positions: list[int]) -> None:
    assert spread(length, kinds.READ_WEIGHTS) == positions
