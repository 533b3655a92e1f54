"""NF4 and FP4, bitsandbytes' 4-bit blocks (arXiv 2305.14314; bitsandbytes 0.50, functional.py).

``absmax`` belongs to blocks of the flattened, row-major weight, so a block may span rows. Two codes share a byte, the first in
the high nibble. With double quantization ``absmax`` itself is stored in 8 bits, in blocks of 256, after its mean
(``nested_offset``) was subtracted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qmerge.errors import RecipeError
from qmerge.formats._bnb4bit_find import (
    BLOCK_SIZES,
    QUANT_MAP_ENTRIES,
    Bnb4bitOptions,
    find_4bit,
    read_absmax,
    state_part,
)
from qmerge.formats._bnb4bit_grid import (
    Bnb4bitGrid,
    code_table,
    from_disk_codes,
    pack_nibbles,
    rows_of_whole_blocks,
    standard_quant_map,
    to_disk_codes,
    unpack_nibbles,
    unpack_values,
)
from qmerge.formats._bnb4bit_kernels import SMALLEST_ABSMAX
from qmerge.formats.base import NOT_QUANTIZED, FormatInfo, ModuleLayout, Stored, TargetFormat, with_asked
from qmerge.grids import Grid
from qmerge.safetensors_io.reader import Reader
from qmerge.types import SAFETENSORS_DTYPES, TORCH_DTYPES, Options, Parts, Rows, TensorInfo, TensorSpec, Weight

# Absmax values that share a scale with double quantization, as bitsandbytes writes it.
NESTED_BLOCK_SIZE = 256

# quantization_config of transformers, before anything is set (transformers 5.23, BitsAndBytesConfig).
DEFAULT_CONFIG: Mapping[str, Any] = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": False,
    "load_in_8bit": False,
    "_load_in_4bit": False,
    "_load_in_8bit": False,
    "llm_int8_threshold": 6.0,
    "llm_int8_skip_modules": None,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_use_double_quant": False,
    "bnb_4bit_compute_dtype": "float32",
    "bnb_4bit_quant_storage": "uint8",
}

# transformers stacks the bytes of separate experts as if they were values, without their scales.
EXPERTS_PROBLEM = "transformers 5.23 does not load experts in bitsandbytes' formats"

# torch dtypes of the tensor with the codes. (FSDP shards only tensors of one dtype, so their bytes may pose as another.)
STORAGES = ("uint8", "int8", "bfloat16", "float16", "float32", "int32", "float8_e4m3fn")


class Stored4bit(Stored):
    """A weight of two or more dimensions, read as a matrix: its axes after the first one are flattened."""

    def __init__(
        self, weight: Weight, options: Bnb4bitOptions, reader: Reader, device: torch.device, *, quant_type: str
    ) -> None:
        self._info = weight.parts[weight.local]
        self._reader = reader
        self._device = device
        self._columns = math.prod(weight.shape[1:])
        absmax_B = read_absmax(weight, reader).to(device)
        self.grid: Bnb4bitGrid = Bnb4bitGrid(
            quant_type=quant_type,
            block_size=options.block_size,
            columns=self._columns,
            absmax_B=absmax_B,
            rounding_absmax_B=absmax_B,
        )

    def codes(self, rows: Rows) -> Tensor:
        disk_codes = unpack_nibbles(self._packed(rows), len(rows) * self._columns)
        return from_disk_codes(disk_codes, self.grid.quant_type).view(len(rows), self._columns)

    def values(self, rows: Rows) -> Tensor:
        grid = self.grid.rows(rows)
        if self._device.type == "cpu":
            return grid.decode(self.codes(rows))
        return unpack_values(
            self._packed(rows),
            grid.absmax_B,
            block_size=grid.block_size,
            quant_type=grid.quant_type,
            shape=(len(rows), self._columns),
        )

    def _packed(self, rows: Rows) -> Tensor:
        """The bytes of some rows, uint8, whatever dtype they are stored as."""
        itemsize = TORCH_DTYPES[self._info.dtype].itemsize
        start = rows.start * self._columns // 2
        stop = -(-rows.stop * self._columns // 2)
        elements = self._reader.elements(self._info, start // itemsize, -(-stop // itemsize))
        return elements.view(torch.uint8)[: stop - start].to(self._device)


class Bnb4bit(TargetFormat[Bnb4bitOptions]):
    """NF4 or FP4.

    Tensors: ``weight`` (bytes of codes, any storage dtype), ``weight.absmax``, ``weight.quant_map``, with double quantization
    ``weight.nested_absmax`` and ``weight.nested_quant_map``, and ``weight.quant_state.bitsandbytes__…``.
    """

    def __init__(self, name: str) -> None:
        self.info = FormatInfo(
            name=name,
            quant_method="bitsandbytes",
            loaders="transformers, vLLM (CUDA)",
            accepted_options=("block_size", "double_quant", "quant_storage"),
            takes_conv1d=True,
            experts_problem=EXPERTS_PROBLEM,
        )

    def find(
        self, tensors: Mapping[str, TensorInfo], reader: Reader, quantization: Mapping[str, Any] = NOT_QUANTIZED
    ) -> list[Weight]:
        suffix = state_part("", self.name)
        names = [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]
        return [find_4bit(name, self.name, tensors, reader) for name in names]

    def open(self, weight: Weight, reader: Reader, device: torch.device) -> Stored:
        return Stored4bit(weight, self.options_of(weight), reader, device, quant_type=self.name)

    def options(self, asked: Mapping[str, Any], source: Options | None, dtype: str) -> Bnb4bitOptions:
        model_dtype = str(TORCH_DTYPES[dtype]).removeprefix("torch.")
        default = source if isinstance(source, Bnb4bitOptions) else Bnb4bitOptions(dtype=model_dtype)
        options = with_asked(default, asked)
        if options.block_size not in BLOCK_SIZES:
            sizes = ", ".join(map(str, BLOCK_SIZES))
            raise RecipeError(f"--block-size {options.block_size}: bitsandbytes supports {sizes}")
        if options.quant_storage not in STORAGES:
            raise RecipeError(f"--quant-storage {options.quant_storage!r}: expected one of {', '.join(STORAGES)}")
        return options

    def same_grid(self, one: Bnb4bitOptions, other: Bnb4bitOptions) -> bool:
        return one.block_size == other.block_size and one.double_quant == other.double_quant

    def outputs(self, local: str, shape: tuple[int, ...], options: Bnb4bitOptions) -> dict[str, TensorSpec]:
        numel = math.prod(shape)
        blocks = -(-numel // options.block_size)
        nbytes = (numel + 1) // 2
        storage: torch.dtype = getattr(torch, options.quant_storage)
        if nbytes % storage.itemsize:
            raise RecipeError(
                f"a weight of {list(shape)} has {nbytes} bytes of codes, which do not fill whole {options.quant_storage} "
                f"numbers: use --quant-storage uint8"
            )
        specs = {
            local: TensorSpec(SAFETENSORS_DTYPES[storage], (nbytes // storage.itemsize, 1)),
            f"{local}.absmax": TensorSpec("U8" if options.double_quant else "F32", (blocks,)),
            f"{local}.quant_map": TensorSpec("F32", (16,)),
        }
        if options.double_quant:
            specs[f"{local}.nested_absmax"] = TensorSpec("F32", (-(-blocks // NESTED_BLOCK_SIZE),))
            specs[f"{local}.nested_quant_map"] = TensorSpec("F32", (QUANT_MAP_ENTRIES,))
        specs[state_part(local, self.name)] = TensorSpec("U8", (-1,))
        return specs

    def row_step(self, shape: tuple[int, int], options: Bnb4bitOptions) -> int:
        return rows_of_whole_blocks(options.block_size, shape[1])

    def scales(self, values_OI: Tensor, options: Bnb4bitOptions, inputs_I: Tensor | None = None) -> Tensor:
        """float32 [B]: absmax of every block."""
        flat, size = values_OI.flatten(), options.block_size
        whole = flat.numel() // size * size
        absmax_B = flat[:whole].view(-1, size).abs().amax(dim=1)
        if whole < flat.numel():
            # bitsandbytes clamps the absmax of the short last block only.
            last = flat[whole:].abs().amax().clamp(min=SMALLEST_ABSMAX)
            absmax_B = torch.cat([absmax_B, last[None]])
        return absmax_B

    def grid(
        self, scales: Tensor, shape: tuple[int, int], options: Bnb4bitOptions, inputs_I: Tensor | None = None
    ) -> Grid:  # fmt: skip
        if options.double_quant:
            return self._double_quantized_grid(scales, shape[1], options.block_size)
        return Bnb4bitGrid(
            quant_type=self.name,
            block_size=options.block_size,
            columns=shape[1],
            absmax_B=scales,
            rounding_absmax_B=scales,
            scale_parts={"absmax": scales.cpu()},
        )

    def sample_grid(self, values_OI: Tensor, options: Bnb4bitOptions) -> Grid:
        # Quantized scales change the rounding error by a hundredth at most, and need bitsandbytes, whose import takes seconds.
        return super().sample_grid(values_OI, replace(options, double_quant=False))

    def _double_quantized_grid(self, absmax_B: Tensor, columns: int, block_size: int) -> Bnb4bitGrid:
        # On the CPU, so that the bytes do not depend on the device: its table lookup differs from CUDA's nearest.
        from bitsandbytes import functional as bnb  # takes seconds

        exact_B = absmax_B.cpu()
        offset = exact_B.mean()
        codes_B, state = bnb.quantize_blockwise(exact_B - offset, blocksize=NESTED_BLOCK_SIZE)
        stored_B = bnb.dequantize_blockwise(codes_B, state) + offset
        return Bnb4bitGrid(
            quant_type=self.name,
            block_size=block_size,
            columns=columns,
            absmax_B=stored_B.to(absmax_B.device),
            rounding_absmax_B=absmax_B,
            scale_parts={"absmax": codes_B, "nested_absmax": state.absmax, "nested_quant_map": state.code},
            offset=float(offset),
        )

    def pack(self, codes_OI: Tensor, grid: Grid, options: Bnb4bitOptions) -> Tensor:
        # bitsandbytes pads an odd number of codes with that of the value 0.
        padding = code_table(self.name, codes_OI.device).zero_code
        return pack_nibbles(to_disk_codes(codes_OI, self.name), padding)

    def scale_tensors(self, grid: Grid, local: str, shape: tuple[int, ...], options: Bnb4bitOptions) -> Parts:
        assert isinstance(grid, Bnb4bitGrid)
        tensors = {f"{local}.{name}": part for name, part in grid.scale_parts.items()}
        tensors[f"{local}.quant_map"] = standard_quant_map(self.name)
        tensors[state_part(local, self.name)] = self._state_text(grid, shape, options)
        return tensors

    def _state_text(self, grid: Bnb4bitGrid, shape: tuple[int, ...], options: Bnb4bitOptions) -> Tensor:
        """uint8: the quant state as JSON, with the keys and in the order of bitsandbytes."""
        state: dict[str, Any] = {
            "quant_type": self.name,
            "blocksize": options.block_size,
            "dtype": options.dtype,
            "shape": list(shape),
        }
        if grid.offset is not None:
            state["nested_blocksize"] = NESTED_BLOCK_SIZE
            state["nested_dtype"] = "float32"
            state["nested_offset"] = grid.offset
        return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    def quantization_config(
        self, options: Bnb4bitOptions, base: Mapping[str, Any], compute_dtype: str, layout: ModuleLayout
    ) -> dict[str, Any] | None:
        loader_dtype = base.get("bnb_4bit_compute_dtype", compute_dtype)
        if isinstance(loader_dtype, str):
            loader_dtype = loader_dtype.removeprefix("torch.")
        return bitsandbytes_config(
            base,
            layout,
            load_in_4bit=True,
            bnb_4bit_quant_type=self.name,
            bnb_4bit_use_double_quant=options.double_quant,
            bnb_4bit_quant_storage=options.quant_storage,
            bnb_4bit_compute_dtype=loader_dtype,
        )


def bitsandbytes_config(base: Mapping[str, Any], layout: ModuleLayout, **settings: Any) -> dict[str, Any]:
    """``quantization_config`` as transformers writes it, with the thresholds and the skip list of ``base``.

    Without a list the loader has its own, which a written list replaces. The import of transformers' BitsAndBytesConfig
    would take longer than the merge of a small model.
    """
    kept = {name: base[name] for name in ("llm_int8_skip_modules", "llm_int8_threshold") if name in base}
    if layout.dense:
        listed = kept.get("llm_int8_skip_modules") or layout.skipped
        kept["llm_int8_skip_modules"] = list(dict.fromkeys([*listed, *layout.dense]))
    config = {**DEFAULT_CONFIG, **kept, **settings}
    for name in ("load_in_4bit", "load_in_8bit"):
        config[f"_{name}"] = config[name]
    return config
