"""Adapters whose tensors or options contradict each other, and updates for shapes that adapters do not show."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qmerge.adapters.lora import KEY, LoraParts, refuse_options
from qmerge.adapters.reading.folder import select_adapter
from qmerge.adapters.reading.placement import _loras_of_block, _summed, _values_of_block
from qmerge.adapters.updates import layers, shapes, variants
from qmerge.adapters.updates.expert_layout import layout_of, rank_major_lead
from qmerge.adapters.updates.experts import stack_update
from qmerge.adapters.updates.lora import LoraUpdate
from qmerge.adapters.updates.shapes import UNKNOWN
from qmerge.adapters.updates.variants import ByWidthUpdate
from qmerge.checkpoint.blocks import DiskBlock
from qmerge.errors import AdapterError
from qmerge.types import Replacement, Rows


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- options and names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["yes", 2, []])
def test_use_rslora_that_is_no_truth_value(value: Any) -> None:
    refuse_options({"use_rslora": True})
    with pytest.raises(AdapterError, match=r"use_rslora=.*; expected true or false"):
        refuse_options({"use_rslora": value})


def test_two_tensors_for_one_part() -> None:
    parts = LoraParts(module="m", tensors={})
    for number, name in enumerate(("base_model.model.m.lora_A.weight", "base_model.model.m.lora_A.other.weight")):
        match = KEY.fullmatch(name)
        assert match is not None
        if number == 0:
            parts.add(match, name)
        else:
            with pytest.raises(AdapterError, match="are both lora_A of m: the file contains several adapters"):
                parts.add(match, name)


def test_one_of_several_adapters_in_a_file() -> None:
    names = ["m.lora_A.one.weight", "m.lora_A.two.weight", "m.lora_A.weight", "m.modules_to_save.weight"]
    infos: dict[str, Any] = dict.fromkeys(names)
    with pytest.raises(AdapterError, match="contains the adapters one, two, default; name one of them: DIR#one"):
        select_adapter(infos, "three")
    assert set(select_adapter(infos, "one")) == {"m.lora_A.weight", "m.modules_to_save.weight"}
    assert set(select_adapter(infos, "default")) == {"m.lora_A.weight", "m.modules_to_save.weight"}
    assert select_adapter({"m.lora_A.weight": infos["m.lora_A.weight"]}, None).keys() == {"m.lora_A.weight"}


# --- stacks of experts -----------------------------------------------------------------------------------------------


def test_layout_of_stacked_experts() -> None:
    B_OR = gaussian(16, 8)
    with pytest.raises(AdapterError, match=r"lora_B_layout='columns'; expected rank_major or expert_major"):
        layout_of("m", B_OR, count=4, rank=2, config={"lora_B_layout": "columns"})
    assert layout_of("m", B_OR, count=4, rank=2, config={"lora_B_layout": "expert_major"}) == "expert_major"
    for count, rank in ((8, 1), (1, 8)):  # both layouts are the same, whoever made the adapter
        made_by = {"unsloth_training_method": "qlora"}
        assert layout_of("m", B_OR, count=count, rank=rank, config=made_by) == "rank_major"
    same = torch.ones(16, 8)
    assert rank_major_lead(same, 4, 2) == 0.0, "all columns are alike: nothing tells"
    assert rank_major_lead(B_OR, 4, 2) != 0.0


def parameter(*shape: int) -> Any:
    return SimpleNamespace(name="m.experts", shape=shape, is_transposed=False)


@pytest.mark.parametrize(
    ("A", "B", "message"),
    [
        ((7, 6), (5, 8), "are not of rank 2 for each of 4 experts"),
        ((8, 6), (5, 7), "are not of rank 2 for each of 4 experts"),
        ((8, 6, 1), (5, 8), "are not of rank 2 for each of 4 experts"),
        ((8, 6), (4, 8), "do not fit. Is this the base that the adapter was trained on"),
        ((8, 7), (5, 8), "do not fit. Is this the base that the adapter was trained on"),
    ],
)
def test_factors_that_do_not_fit_a_stack(A: tuple[int, ...], B: tuple[int, ...], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        stack_update(parameter(4, 5, 6), gaussian(*A), gaussian(*B), rank=2, scale=1.0, config={})


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [(3,), (3, 2), (3, 2, 1)])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_hold_the_tensors_that_they_are_given(kernel: tuple[int, ...], groups: int) -> None:
    weight, bias_O = gaussian(4, 6 // groups, *kernel), gaussian(4)
    inputs = gaussian(2, 6, *(5 for _ in kernel))
    layer = layers.convolution(weight, bias_O, groups)
    function = (functional.conv1d, functional.conv2d, functional.conv3d)[len(kernel) - 1]
    assert torch.equal(layer(inputs), function(inputs, weight, bias_O, groups=groups))
    assert layer.weight.data_ptr() == weight.data_ptr()
    assert layers.convolution(weight, None, groups).bias is None


def test_factors_of_a_convolution() -> None:
    A, B = gaussian(4, 3, 5), gaussian(6, 4, 1)
    flat_A, flat_B = variants.convolution("m", A, B, 4)
    assert torch.equal(flat_A, A.view(4, 15)) and torch.equal(flat_B, B.view(6, 4))
    with pytest.raises(AdapterError, match="is that of a convolution in 2 groups"):
        variants.convolution("m", A, B[:, :2], 4)
    assert variants.convolution("m", A, B[:, :3], 4)[1].shape == (6, 3), (
        "no groups: the pair does not fit, as said later"
    )
    for wrong_A, wrong_B in ((A, B[..., 0]), (A, gaussian(6, 4, 2))):
        with pytest.raises(AdapterError, match="are not the factors of one convolution"):
            variants.convolution("m", wrong_A, wrong_B, 4)


# --- blocks on disk --------------------------------------------------------------------------------------------------


def block(weight: str, shape: tuple[int, int], rows: range, **changed: Any) -> DiskBlock:
    values = {
        "weight": weight, "parameter": "m.qkv", "shape": shape, "region": (rows, range(shape[1])),
        "disk_region": (range(len(rows)), range(shape[1])), "axes": (0, 1),
    }  # fmt: skip
    return DiskBlock(**{**values, **changed})


def test_new_values_of_a_parameter_that_is_two_weights_on_disk() -> None:
    values_OI = gaussian(6, 4)
    disk = {"q": (4, 4), "k": (2, 4)}
    for name, rows in (("q", range(4)), ("k", range(4, 6))):
        replaced = _values_of_block(Replacement(values_OI), block(name, (6, 4), rows), disk)
        assert torch.equal(replaced.values, values_OI[rows.start : rows.stop])
    with pytest.raises(
        AdapterError, match=r"m.qkv \[6, 4\] was trained whole, as \[5, 4\], which does not make up q \[4, 4\]"
    ):
        _values_of_block(Replacement(values_OI[:5]), block("q", (6, 4), range(4)), disk)
    with pytest.raises(AdapterError, match="does not make up"):
        _values_of_block(Replacement(values_OI), block("q", (6, 4), range(4)), {"q": (8, 4)})


def test_updates_that_blocks_do_not_take() -> None:
    lora = LoraUpdate(gaussian(2, 4), gaussian(6, 2), 0.5)
    assert _loras_of_block("m", lora, block("q", (6, 4), range(4))) == {None: lora}
    with pytest.raises(AdapterError, match=r"m has shape \[7, 4\], but the adapter's delta has shape \[6, 4\]"):
        _loras_of_block("m", lora, block("q", (7, 4), range(4)))
    with pytest.raises(AdapterError, match="m is only a part of q on disk, or transposed in it, where only plain LoRA"):
        _loras_of_block("m", ByWidthUpdate(lora, lora), block("q", (6, 4), range(4)))


@pytest.mark.parametrize("scales", [(0.5, 0.5), (0.5, 2.0)])
def test_several_loras_of_one_matrix_are_their_sum(scales: tuple[float, float]) -> None:
    loras = [LoraUpdate(gaussian(2, 4, seed=k), gaussian(6, 2, seed=9 + k), scale) for k, scale in enumerate(scales)]
    base_OI, rows = torch.zeros(6, 4), Rows(0, 6)
    expected = sum(lora.apply(base_OI, rows) for lora in loras)
    torch.testing.assert_close(_summed(loras).apply(base_OI, rows), expected)


# --- shapes ----------------------------------------------------------------------------------------------------------


def test_a_variant_is_decided_by_the_width_of_the_weight() -> None:
    grouped, plain = LoraUpdate(gaussian(2, 8), gaussian(6, 2), 1.0), LoraUpdate(gaussian(2, 4), gaussian(6, 2), 1.0)
    update = ByWidthUpdate(grouped, plain).to(torch.device("cpu"))
    rows = Rows(0, 6)
    for columns, lora in ((4, plain), (8, grouped)):
        assert torch.equal(update.apply(torch.zeros(6, columns), rows), lora.apply(torch.zeros(6, columns), rows))


@pytest.mark.parametrize(
    ("shape_of", "parts", "config", "expected"),
    [
        (shapes.of_ia3, {"ia3_l": (6, 1)}, {}, (6, -1)),
        (shapes.of_ia3, {"ia3_l": (1, 4)}, {}, (-1, 4)),
        (shapes.of_ia3, {"ia3_l": (1, 4, 1, 1)}, {}, UNKNOWN),
        (shapes.of_road, {"road_theta": (6,)}, {"variant": "road_2"}, (6, -1)),
        (shapes.of_road, {"road_theta": (6,)}, {"variant": "road_3"}, UNKNOWN),
        (
            shapes.of_vblora,
            {"vblora_logits_A": (2, 3, 9), "vblora_logits_B": (4, 2, 9)},
            {"vector_length": 5},
            (20, 15),
        ),
        (shapes.of_vblora, {"vblora_logits_A": (2, 3, 9), "vblora_logits_B": (4, 2, 9)}, {}, UNKNOWN),
        (shapes.of_vblora, {"vblora_logits_A": (2, 3, 9)}, {"vector_length": 5}, UNKNOWN),
        (shapes.of_loha, {"hada_w1_a": (6, 2), "hada_w1_b": (2, 4)}, {}, (6, 4)),
        (shapes.of_loha, {"hada_t1": (2, 2, 3, 3), "hada_w1_a": (2, 6), "hada_w1_b": (2, 4)}, {}, (6, -1)),
        (shapes.of_hira, {"hira_A": (2, 3, 5), "hira_B": (6, 2)}, {}, (6, 15)),
        (shapes.of_hira, {"hira_B": (6, 2)}, {}, (6, -1)),
        (shapes.of_hira, {"hira_embedding_A": (2, 9), "hira_embedding_B": (4, 2)}, {}, (9, 4)),
        (shapes.of_glora, {"glora_C.x": (4, 1), "glora_A.Xd": (6, 2)}, {}, (6, 4)),
    ],
)
def test_shapes_by_the_adapter_alone(
    shape_of: Any, parts: dict[str, tuple[int, ...]], config: Any, expected: Any
) -> None:
    assert shape_of({name: torch.zeros(shape) for name, shape in parts.items()}, config) == expected


def test_glora_without_its_in_features() -> None:
    with pytest.raises(KeyError, match="glora_C"):
        shapes.of_glora({"glora_A.Xd": torch.zeros(6, 2)}, {})
