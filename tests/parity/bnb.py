"""One weight at a time, by bitsandbytes and by qmerge's formats: the same bytes on disk, the same values back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import save_file
from torch import Tensor

from qmerge.errors import CheckpointError
from qmerge.formats import get_target
from qmerge.formats._bnb4bit_find import Bnb4bitOptions
from qmerge.formats.base import ModuleLayout, Stored
from qmerge.safetensors_io.header import read_header
from qmerge.safetensors_io.reader import Reader
from qmerge.types import TORCH_DTYPES, Options, Rows, Weight

MODULE = "layer.proj"
STORAGES = {
    name: getattr(torch, name)
    for name in ("uint8", "int8", "bfloat16", "float16", "float32", "int32", "float8_e4m3fn")
}  # fmt: skip


def same(one: Tensor, other: Tensor) -> bool:
    """Same dtype, shape and bits (so that 0 and -0 differ)."""
    return one.dtype == other.dtype and one.shape == other.shape and raw(one) == raw(other)


def same_values(one: Tensor, other: Tensor) -> bool:
    """The same but for the sign of zero: FP4 has two zeros, and bitsandbytes' own kernels disagree about the second."""
    return same(one + 0.0, other + 0.0)


def raw(tensor: Tensor) -> bytes:
    """The bytes of a tensor."""
    flat = tensor.detach().contiguous().flatten()
    if not flat.numel():
        return b""
    return flat.view(torch.uint8).numpy().tobytes()


def quantized_4bit(weight_OI: Tensor, name: str, options: Bnb4bitOptions) -> tuple[Tensor, Any]:
    """(packed codes, quant state) by bitsandbytes."""
    return bnb.quantize_4bit(
        weight_OI,
        blocksize=options.block_size,
        compress_statistics=options.double_quant,
        quant_type=name,
        quant_storage=STORAGES[options.quant_storage],
    )


def tensors_4bit(packed: Tensor, state: Any) -> dict[str, Tensor]:
    """Local name → tensor, as in the state dict of a Linear4bit."""
    parts = {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    return {"weight": packed, **parts}


def dequantized_4bit(packed: Tensor, state: Any) -> Tensor:
    """float32 values by bitsandbytes, whatever dtype the weight had."""
    state.dtype = torch.float32
    return bnb.dequantize_4bit(packed, state).reshape(state.shape)  # it transposes what fits into one element


def tensors_int8(weight_OI: Tensor) -> dict[str, Tensor]:
    """Local name → tensor, as in the state dict of a Linear8bitLt."""
    codes, scb, _ = bnb.int8_vectorwise_quant(weight_OI.clone())
    return {"weight": codes, "SCB": scb, "weight_format": torch.zeros((), dtype=torch.uint8)}


def saved(tensors: Mapping[str, Tensor], folder: Path) -> Path:
    """A file with the tensors of one module."""
    path = folder / "model.safetensors"
    save_file({f"{MODULE}.{name}": part.contiguous() for name, part in tensors.items()}, path)
    return path


def opened(path: Path, name: str, reader: Reader, options: Options | None = None) -> tuple[Weight, Stored]:
    """The one weight in a file, read with the config for ``options``, or without one."""
    fmt = get_target(name)
    infos, _ = read_header(path, CheckpointError)
    config = None
    if options is not None:
        config = fmt.quantization_config(options, {}, "bfloat16", ModuleLayout())
    (weight,) = fmt.find(infos, reader, config or {})
    return weight, fmt.open(weight, reader, torch.device("cpu"))


def row_blocks(name: str, shape: tuple[int, int], options: Options, many: int = 1) -> Iterator[Rows]:
    """Blocks of ``many`` times the rows of the smallest one that the format allows."""
    unit = get_target(name).row_step(shape, options) * many
    for start in range(0, shape[0], unit):
        yield Rows(start, min(start + unit, shape[0]))


def fresh(values_OI: Tensor, name: str, options: Options) -> dict[str, Tensor]:
    """Local name → tensor, as qmerge writes values on a fresh grid, one row block at a time."""
    target = get_target(name)
    shape = (values_OI.shape[0], values_OI.shape[1])
    blocks = list(row_blocks(name, shape, options))
    scales = [target.scales(values_OI[rows.start : rows.stop], options) for rows in blocks]
    grid = target.grid(torch.cat(scales), shape, options)
    packed = []
    for rows in blocks:
        part = grid.rows(rows)
        codes_OI = part.nearest(values_OI[rows.start : rows.stop])
        packed.append(target.pack(codes_OI, part, options))
    if target.info.row_axis == 0:
        joined = torch.cat([part.flatten() for part in packed])
    else:
        joined = torch.cat(packed, dim=target.info.row_axis)
    codes_name = target.codes_part("weight")
    spec = target.outputs("weight", shape, options)[codes_name]
    codes = torch.frombuffer(bytearray(raw(joined)), dtype=torch.uint8)
    codes = codes.view(TORCH_DTYPES[spec.dtype]).view(spec.shape)
    return {codes_name: codes, **target.scale_tensors(grid, "weight", shape, options)}
