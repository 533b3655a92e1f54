"""The types of named mixes against llama.cpp: its quantizer's choices for small models, and files that were made with it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qmerge.formats._gguf_blocks import BLOCK_TYPES
from qmerge.gguf.mixes import DENSE_TYPES, FALLBACKS, FILE_TYPES, Model, basic_type, tensor_types, unquantized_type

from .record_mixes import MODELS, WITH_IMPORTANCE, by_kind

RECORDED = Path(__file__).parent / "recorded"
MADE: dict[str, dict[str, dict[str, str]]] = json.loads((RECORDED / "mixes.json").read_text(encoding="utf-8"))
FILES: dict[str, dict[str, Any]] = json.loads((RECORDED / "files.json").read_text(encoding="utf-8"))


def test_every_mix_and_model_was_recorded() -> None:
    assert list(MADE) == list(MODELS)
    for mixes in MADE.values():
        assert {mix.removesuffix(WITH_IMPORTANCE) for mix in mixes} == {
            mix for mix in FILE_TYPES if basic_type(mix) not in DENSE_TYPES
        }


@pytest.mark.parametrize("name", MADE)
def test_types_are_those_of_llama_cpp(name: str) -> None:
    model, shapes = MODELS[name]
    for mix, expected in MADE[name].items():
        mix, importance, _ = mix.partition(WITH_IMPORTANCE)
        types = tensor_types(mix, shapes, replace(model, has_importance=bool(importance)))
        assert list(types) == list(shapes)
        assert by_kind(types) == expected, mix
        if mix + WITH_IMPORTANCE not in MADE[name]:
            assert by_kind(tensor_types(mix, shapes, replace(model, has_importance=True))) == expected, mix


def test_the_comparison_can_tell() -> None:
    """The controls: another number of layers, of heads or of experts, another architecture leads to other types."""
    model, shapes = MODELS["llama"]
    changed = {
        "q4_k_m": replace(model, layers=16),
        "iq4_xs": replace(model, kv_heads=32),
        "q5_k_m": replace(model, experts=8),
        "q4_0": replace(model, has_importance=True),
        "q3_k_m": replace(model, arch="falcon"),
    }
    for mix, other in changed.items():
        assert by_kind(tensor_types(mix, shapes, model)) == MADE["llama"][mix]
        assert by_kind(tensor_types(mix, shapes, other)) != MADE["llama"][mix]


def numbered_as_in_file(name: str, layers: dict[str, int]) -> str:
    """The name with its layer's position in the file. (Older builds count layers in the order of the file: 0, 1, 10, 11, …)"""
    return re.sub(r"^blk\.(\d+)", lambda found: f"blk.{layers.setdefault(found[1], len(layers))}", name)


@pytest.mark.parametrize("name", FILES)
def test_types_are_those_of_files_in_use(name: str) -> None:
    file, layers = FILES[name], dict[str, int]()
    tensors = {numbered_as_in_file(tensor, layers): described for tensor, described in file["tensors"].items()}
    shapes = {tensor: tuple(shape) for tensor, (_, *shape) in tensors.items()}
    expected = {tensor: described[0] for tensor, described in tensors.items()}
    assert tensor_types(file["mix"], shapes, Model(**file["model"])) == expected
    assert len(set(expected.values())) > 2


@pytest.mark.parametrize("mix", ["f32", "f16", "bf16"])
def test_dense_mixes(mix: str) -> None:
    model, shapes = MODELS["mixtral"]
    types = tensor_types(mix, shapes, model)
    for name, type_ in types.items():
        is_float32 = "norm" in name or "ffn_gate_inp" in name
        assert type_ == ("F32" if is_float32 else mix.upper()), name


def test_tensors_that_are_not_quantized() -> None:
    model, shapes = MODELS["llama"]
    small = {
        "blk.0.attn_q.bias": (256,),
        "blk.0.altup_proj.weight": (4, 256, 256),
        "blk.0.altup_correct_coef.weight": (4, 4),
        "blk.0.attn_v.weight.scale": (2, 256),
        "blk.0.one_row.weight": (1, 256),
        "position_embd.weight": (512, 256),
    }
    types = tensor_types("q4_k_m", {**shapes, **small}, model, dense_type="BF16")
    assert [types[name] for name in small] == ["F32", "BF16", "F32", "F32", "BF16", "F32"]
    assert unquantized_type("blk.0.attn_q.weight", (256, 256), "F16") == "F16"


def test_rows_that_no_block_fits() -> None:
    """llama.cpp refuses most of these; its converter writes float16 where Q8_0 does not fit."""
    model = Model(arch="llama", layers=8, heads=4, kv_heads=4)
    shapes = {"blk.4.attn_q.weight": (8, 40), "blk.4.attn_k.weight": (8, 64), "blk.4.ffn_up.weight": (8, 256)}
    for mix in FILE_TYPES:
        if basic_type(mix) not in DENSE_TYPES:
            odd, short, long = tensor_types(mix, shapes, model).values()
            assert (odd, long) == ("F16", basic_type(mix))
            assert short == FALLBACKS.get(long, long)


def test_numbers_and_types_are_those_of_gguf() -> None:
    gguf = pytest.importorskip("gguf")
    for mix, number in FILE_TYPES.items():
        name = gguf.LlamaFileType(number).name
        assert re.sub("^(MOSTLY|ALL)_", "", name).lower() == mix
        assert basic_type(mix) in BLOCK_TYPES
