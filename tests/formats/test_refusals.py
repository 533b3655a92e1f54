"""Damaged and unusual tensors of each format, from their headers: each is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qmerge.errors import CheckpointError, NumbersError
from qmerge.formats import get_format, get_target
from qmerge.formats._bnb4bit_find import QuantState, _Check
from qmerge.formats._compressed_config import Scheme, group_size_of
from qmerge.formats._fp8_blocks import block_of
from qmerge.formats._gptq_find import _bits
from qmerge.formats.awq import _check_version, _group_size
from qmerge.formats.hqq import HqqOptions, _check_sizes, _weight
from qmerge.formats.torchao import _check_groups
from qmerge.safetensors_io.reader import MemoryReader, Reader
from qmerge.types import TensorInfo, Weight


def info(name: str, dtype: str, *shape: int) -> TensorInfo:
    return TensorInfo(dtype=dtype, shape=shape, name=name, file=Path("model.safetensors"), offset=0)


# --- bitsandbytes ----------------------------------------------------------------------------------------------------


def nf4_check(nested_offset: float | None = 0.1, **changed: TensorInfo) -> _Check:
    """A weight of 64 x 64 with double quantization."""
    parts = {
        "weight": info("weight", "U8", 2048, 1),
        "weight.absmax": info("absmax", "U8", 64),
        "weight.quant_map": info("quant_map", "F32", 16),
        "weight.nested_absmax": info("nested_absmax", "F32", 1),
        "weight.nested_quant_map": info("nested_quant_map", "F32", 256),
    }
    parts.update({f"weight.{name}": part for name, part in changed.items()})
    state = QuantState(
        quant_type="nf4",
        block_size=64,
        dtype="bfloat16",
        shape=(64, 64),
        nested_block_size=256,
        nested_offset=nested_offset,
    )
    return _Check(name="m.weight", local="weight", quant_type="nf4", parts=parts, state=state)


def test_parts_of_double_quantization() -> None:
    nf4_check().absmax()
    with pytest.raises(
        CheckpointError, match=r"m.weight: double quantization needs nested_blocksize and nested_offset"
    ):
        nf4_check(nested_offset=None).absmax()
    for wrong in (info("x", "F32", 2), info("x", "F16", 1)):
        with pytest.raises(CheckpointError, match=r"m.weight.nested_absmax is F\d\d \[\d\], expected F32 \[1\]"):
            nf4_check(nested_absmax=wrong).absmax()
    with pytest.raises(CheckpointError, match=r"nested_quant_map is F32 \[255\], expected F32 \[256\]"):
        nf4_check(nested_quant_map=info("x", "F32", 255)).absmax()


def test_levels_of_another_format() -> None:
    check = nf4_check()
    with pytest.raises(CheckpointError, match=r"m.weight.quant_map is not that of nf4"):
        check.quant_type_and_map(MemoryReader(lambda name: torch.linspace(-1, 1, 16).numpy().tobytes()))
    del check.parts["weight.quant_map"]  # type: ignore[attr-defined]
    check.quant_type_and_map(Reader())  # then nothing is wrong


@pytest.mark.parametrize("shape", [(8,), (8, 1), (4,), (1, 8), (8, 2)])
def test_scales_of_int8(shape: tuple[int, ...]) -> None:
    tensors = {"m.weight": info("m.weight", "I8", 8, 32), "m.SCB": info("m.SCB", "F32", *shape)}
    if shape in ((8,), (8, 1)):
        (weight,) = get_format("int8").find(tensors, Reader(), {})
        assert weight.shape == (8, 32)
    else:
        with pytest.raises(CheckpointError, match=r"m.SCB has shape \[.*\], expected \[8\], one for every row"):
            get_format("int8").find(tensors, Reader(), {})


# --- HQQ, torchao, AWQ, FP8, compressed-tensors ----------------------------------------------------------------------


def test_hqq_whose_scales_are_quantized() -> None:
    tensors = {f"m.{local}": info(f"m.{local}", "F16", 1) for local in ("W_q", "scale", "zero", "zero_scale")}
    with pytest.raises(CheckpointError, match="m: its HQQ scales or zeros are quantized too"):
        _weight("m", tensors, Reader())


def test_hqq_without_a_matrix_of_words() -> None:
    parts = {"W_q": info("m.W_q", "U8", 8), "scale": info("scale", "F16", 1), "zero": info("zero", "F16", 1)}
    with pytest.raises(CheckpointError, match=r"m.W_q is U8 \[8\], expected a matrix of words"):
        _check_sizes("m", parts, HqqOptions("4bit_u8", 1), 16)


def test_torchao_scales_and_zeros() -> None:
    def parts(zero: str, *shape: int) -> dict[str, TensorInfo]:
        return {
            "_weight_qdata": info("codes", "I8", 8, 32), "_weight_scale": info("scale", "F32", *shape),
            "_weight_zero_point": info("m.zero", zero, *shape),
        }  # fmt: skip

    for shape in ((), (1,), (1, 1)):
        _check_groups("m", parts("I8", *shape), (8, 32))  # one scale for all
    with pytest.raises(CheckpointError, match=r"scale has shape \[2\], expected \[1, 1\]"):
        _check_groups("m", parts("I8", 2), (8, 32))
    with pytest.raises(CheckpointError, match=r"m.zero is F16, expected I8"):
        _check_groups("m", parts("F16", 1), (8, 32))


def test_awq_groups_without_a_group_size() -> None:
    assert (_group_size("m", 128, 4, {}), _group_size("m", 128, 1, {})) == (32, -1)
    with pytest.raises(CheckpointError, match="m: the config says groups of 25, but there are 5 for 128 inputs"):
        _group_size("m", 128, 5, {})


def test_layout_of_awq() -> None:
    for config in ({}, {"version": "GEMM"}, {"format": "gemm"}, {"version": "gemm", "format": "gemv"}):
        _check_version(config)
    for config in ({"version": "gemv"}, {"checkpoint_format": "marlin"}, {"version": "gemv", "format": "gemm"}):
        with pytest.raises(CheckpointError, match="the base is stored in AWQ's layout"):
            _check_version(config)


@pytest.mark.parametrize(
    ("qweight", "qzeros", "scales"),
    [((8, 64), (1, 4), (1, 32)), ((8, 16), (1, 4), (1, 32)), ((8, 32), (2, 4), (1, 32)), ((8, 32), (1, 4), (2, 32))],
)
def test_gptq_tensors_of_different_sizes(qweight: Any, qzeros: Any, scales: Any) -> None:
    def parts(**shapes: tuple[int, ...]) -> dict[str, TensorInfo]:
        return {name: info(name, "I32", *shape) for name, shape in shapes.items()}

    assert _bits("m", parts(qweight=(8, 32), qzeros=(1, 4), scales=(1, 32)), {"bits": 4}) == 4
    with pytest.raises(CheckpointError, match="do not belong to one GPTQ weight"):
        _bits("m", parts(qweight=qweight, qzeros=qzeros, scales=scales), {"bits": 4})


@pytest.mark.parametrize(("size", "expected"), [(-1, -1), (32, 32)])
def test_compressed_tensors_without_a_strategy(size: int, expected: int) -> None:
    assert group_size_of("m", 128, scheme(group_size=size)) == expected


def test_compressed_tensors_with_one_scale() -> None:
    with pytest.raises(CheckpointError, match="m: strategy 'tensor' with group_size None is not read"):
        group_size_of("m", 128, scheme())


@pytest.mark.parametrize("size", [0, -2, "32", None, 24.0])
def test_compressed_tensors_with_groups_of_no_size(size: Any) -> None:
    with pytest.raises(CheckpointError, match=r"m: strategy 'group' with group_size .* is not read"):
        group_size_of("m", 128, scheme(strategy="group", group_size=size))


def scheme(**weights: Any) -> Scheme:
    return Scheme(format="pack-quantized", weights={"num_bits": 4, "type": "int", **weights})


def test_fp8_without_groups_has_no_scales() -> None:
    with pytest.raises(
        CheckpointError, match=r"m.weight_scale has shape \[1\], but the config asks for no FP8 scales of a"
    ):
        block_of(info("m.weight_scale", "F32", 1), (8, 32), {"quant_method": "compressed-tensors"})


# --- values ----------------------------------------------------------------------------------------------------------


def test_values_that_float16_cannot_hold() -> None:
    target = get_target("q8_0")
    merged_OI = torch.tensor([[1.0, -1e9]])
    target.check_range(merged_OI, merged_OI, "m.weight")
    with pytest.raises(NumbersError, match=r"m.weight reaches 1e\+09, which float16 cannot hold"):
        target.check_range(torch.tensor([[1.0, -torch.inf]]), merged_OI, "m.weight")


def test_an_empty_weight_is_in_range() -> None:
    get_target("fp16").check_range(torch.empty(0, 4), torch.empty(0, 4), "m.weight")


def test_integers_are_copied_only() -> None:
    part = info("m.weight", "I64", 4)
    weight = Weight(module="m", local="weight", format="raw", shape=(4,), parts={"weight": part}, options=None)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"m.weight is stored as I64, which qmerge copies but cannot merge into"):
        get_format("raw").open(weight, Reader(), torch.device("cpu"))


@pytest.mark.parametrize(("name", "axes"), [("mxfp4", 3), ("gptq", 2)])
def test_shapes_that_a_format_accepts(name: str, axes: int) -> None:
    shapes = ((64,), (64, 64), (4, 64, 64), (2, 4, 64, 64))
    assert [shape for shape in shapes if get_target(name).accepts(shape)] == [shapes[axes - 1]]
    assert all(get_target("q8_0").accepts(shape) for shape in shapes), "a GGUF file holds every shape"
