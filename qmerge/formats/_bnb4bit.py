"""What NF4 and FP4 share: bitsandbytes' 4-bit blocks (arXiv 2305.14314; bitsandbytes 0.50, functional.py).

``absmax`` belongs to blocks of the flattened, row-major weight, so a block may straddle rows. Two codes share a byte,
the first in the high nibble. With double quantization ``absmax`` itself is stored in 8 bits, in blocks of 256, after
its mean (``nested_offset``) was taken off.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from qmerge.errors import CheckpointError, RecipeError
from qmerge.formats._bnb4bit_grid import Bnb4bitGrid, levels, pack_nibbles, unpack_nibbles, unpack_values
from qmerge.formats.base import NOT_QUANTIZED, FormatInfo, ModuleLayout, Stored, TargetFormat
from qmerge.grids import Grid
from qmerge.safetensors_io.reader import Reader
from qmerge.types import SAFETENSORS_DTYPES, TORCH_DTYPES, Options, Parts, Rows, TensorInfo, TensorSpec, Weight

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256
STORAGES = ("uint8", "int8", "bfloat16", "float16", "float32", "int32", "float8_e4m3fn")


@dataclass(frozen=True)
class Bnb4bitOptions:
    """``dtype`` is what the stock loader dequantizes to (the model's dtype when it was quantized)."""

    block_size: int = 64
    double_quant: bool = False
    quant_storage: str = "uint8"
    dtype: str = "bfloat16"


class Stored4bit(Stored):
    def __init__(
        self, weight: Weight, options: Bnb4bitOptions, reader: Reader, device: torch.device, quant_type: str
    ) -> None:
        self._info, self._reader, self._device = weight.parts[weight.local], reader, device
        self._quant_type = quant_type
        self._columns = math.prod(weight.shape[1:])
        absmax_B = read_absmax(weight, reader).to(device)
        if not bool(absmax_B.isfinite().all()):
            raise CheckpointError(f"{weight.name}.absmax holds NaN or infinity")
        self.grid: Bnb4bitGrid = Bnb4bitGrid(quant_type, options.block_size, self._columns, absmax_B, absmax_B)

    def _packed(self, rows: Rows) -> Tensor:
        size = TORCH_DTYPES[self._info.dtype].itemsize
        start, stop = rows.start * self._columns // 2, -(-rows.stop * self._columns // 2)
        return self._reader.elements(self._info, start // size, -(-stop // size)).view(torch.uint8)[: stop - start]

    def codes(self, rows: Rows) -> Tensor:
        disk = unpack_nibbles(self._packed(rows).to(self._device), len(rows) * self._columns)
        if self._quant_type != "nf4":
            disk = torch.argsort(levels(self._quant_type, self._device)[2]).to(torch.uint8)[disk.long()]
        return disk.view(len(rows), self._columns)

    def values(self, rows: Rows) -> Tensor:
        grid, shape = self.grid.rows(rows), (len(rows), self._columns)
        return unpack_values(
            self._packed(rows).to(self._device), grid.absmax_B, grid.block_size, self._quant_type, shape
        )


def read_absmax(weight: Weight, reader: Reader) -> Tensor:
    """float32 [B]; double quantization undone in bitsandbytes' order of operations."""
    absmax = reader.tensor(weight.parts[f"{weight.local}.absmax"]).flatten()
    nested = weight.parts.get(f"{weight.local}.nested_absmax")
    if nested is None:
        return absmax.float()
    state = quant_state(weight.parts, weight.local, reader)
    blockwise = torch.ops.bitsandbytes.dequantize_blockwise(
        absmax,
        reader.tensor(nested).float(),
        reader.tensor(weight.parts[f"{weight.local}.nested_quant_map"]).float(),
        state["nested_blocksize"],
        torch.float32,
    )
    result: Tensor = blockwise + torch.tensor(state["nested_offset"])
    return result


def quant_state(parts: Mapping[str, TensorInfo], local: str, reader: Reader) -> dict[str, Any]:
    """The JSON text in ``…quant_state.bitsandbytes__nf4``."""
    info = next(info for name, info in parts.items() if name.startswith(f"{local}.quant_state."))
    try:
        state = dict(json.loads(bytes(reader.bytes(info, 0, info.nbytes))))
        state |= {"blocksize": int(state["blocksize"]), "shape": tuple(int(n) for n in state["shape"])}
        state |= {"dtype": str(state["dtype"]), "quant_type": str(state["quant_type"])}
        for name, convert in (("nested_blocksize", int), ("nested_offset", float)):
            if name in state:
                state[name] = convert(state[name])
    except (ValueError, KeyError, TypeError) as cause:
        raise CheckpointError(f"{info.name} is no bitsandbytes quant state: {cause!r}") from cause
    return state


class Bnb4bit(TargetFormat[Bnb4bitOptions]):
    """Parts: ``weight`` (bytes of codes, any storage dtype), ``weight.absmax``, ``weight.quant_map``, with double
    quantization ``weight.nested_absmax`` and ``weight.nested_quant_map``, and ``weight.quant_state.bitsandbytes__…``."""

    def __init__(self, name: str) -> None:
        self.info = FormatInfo(
            name=name,
            quant_method="bitsandbytes",
            loaders="transformers, vLLM (CUDA)",
            accepted_options=("block_size", "double_quant", "quant_storage"),
            takes_conv1d=True,
        )
        self._mark = f".quant_state.bitsandbytes__{name}"

    def find(
        self, tensors: Mapping[str, TensorInfo], reader: Reader, quantization: Mapping[str, Any] = NOT_QUANTIZED
    ) -> list[Weight]:
        return [
            self._weight(name.removesuffix(self._mark), tensors, reader)
            for name in tensors
            if name.endswith(self._mark)
        ]

    def _weight(self, name: str, tensors: Mapping[str, TensorInfo], reader: Reader) -> Weight:
        module, _, local = name.rpartition(".")
        suffixes = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", self._mark)
        parts = {local + suffix: tensors[name + suffix] for suffix in suffixes if name + suffix in tensors}
        needed = [local, f"{local}.absmax"]
        if f"{local}.nested_absmax" in parts or f"{local}.nested_quant_map" in parts:
            needed += [f"{local}.nested_absmax", f"{local}.nested_quant_map"]
        missing = [part for part in needed if part not in parts]
        if missing:
            raise CheckpointError(f"{name} is stored as {self.name}, but {module}.{missing[0]} is missing")
        state = quant_state(parts, local, reader)
        options = Bnb4bitOptions(
            block_size=state["blocksize"],
            double_quant=f"{local}.nested_absmax" in parts,
            quant_storage=str(TORCH_DTYPES[parts[local].dtype]).removeprefix("torch."),
            dtype=state["dtype"],
        )
        shape = state["shape"]
        self._check(name, shape, parts, local, options, state, reader)
        return Weight(module, local, self.name, shape, parts, options)

    def _check(
        self, name: str, shape: tuple[int, ...], parts: Mapping[str, TensorInfo], local: str, options: Bnb4bitOptions,
        state: Mapping[str, Any], reader: Reader,
    ) -> None:  # fmt: skip
        numel, absmax = math.prod(shape), parts[f"{local}.absmax"]
        blocks = -(-numel // options.block_size) if options.block_size in BLOCK_SIZES else -1
        if len(shape) < 2 or parts[local].nbytes != (numel + 1) // 2 or math.prod(absmax.shape) != blocks:
            raise CheckpointError(
                f"{name}: a {list(shape)} weight in blocks of {options.block_size} needs {(numel + 1) // 2} bytes of codes "
                f"and {blocks} absmax, found {parts[local].nbytes} and {math.prod(absmax.shape)}"
            )
        if state["quant_type"] != self.name:
            raise CheckpointError(
                f"{name}: its quant state says {state['quant_type']!r}, its name bitsandbytes__{self.name}"
            )
        if options.double_quant:
            self._check_nested(name, parts, local, blocks, state)
        quant_map = parts.get(f"{local}.quant_map")
        if quant_map is not None:
            standard_L = bnb.get_4bit_type(self.name, device=torch.device("cpu"))
            if not torch.equal(reader.tensor(quant_map).float().flatten(), standard_L):
                raise CheckpointError(
                    f"{name}.quant_map is not {self.name}'s: most loaders would ignore it, and so must qmerge"
                )
        if absmax.dtype != ("U8" if options.double_quant else "F32"):
            raise CheckpointError(
                f"{name}.absmax is {absmax.dtype}, expected {'U8' if options.double_quant else 'F32'}"
            )

    def _check_nested(
        self, name: str, parts: Mapping[str, TensorInfo], local: str, blocks: int, state: Mapping[str, Any]
    ) -> None:
        if "nested_offset" not in state or state.get("nested_blocksize", 0) < 1:
            raise CheckpointError(
                f"{name}: double quantization needs nested_blocksize and nested_offset in its quant state"
            )
        needed = {"nested_absmax": -(-blocks // state["nested_blocksize"]), "nested_quant_map": 256}
        for part, count in needed.items():
            info = parts[f"{local}.{part}"]
            if math.prod(info.shape) != count or info.dtype != "F32":
                raise CheckpointError(f"{name}.{part} is {info.dtype} {list(info.shape)}, expected F32 [{count}]")

    def open(self, weight: Weight, reader: Reader, device: torch.device) -> Stored:
        return Stored4bit(weight, self.options_of(weight), reader, device, self.name)

    def options(self, asked: Mapping[str, Any], source: Options | None, dtype: str) -> Bnb4bitOptions:
        torch_name = str(TORCH_DTYPES[dtype]).removeprefix("torch.")
        like = source if isinstance(source, Bnb4bitOptions) else Bnb4bitOptions(dtype=torch_name)
        options = replace(like, **{name: value for name, value in asked.items() if value is not None})
        if options.block_size not in BLOCK_SIZES:
            raise RecipeError(f"block size {options.block_size}: bitsandbytes has {', '.join(map(str, BLOCK_SIZES))}")
        if options.quant_storage not in STORAGES:
            raise RecipeError(f"quant storage {options.quant_storage!r}: there are {', '.join(STORAGES)}")
        return options

    def same_grid(self, one: Bnb4bitOptions, other: Bnb4bitOptions) -> bool:
        return (one.block_size, one.double_quant) == (other.block_size, other.double_quant)

    def outputs(self, local: str, shape: tuple[int, ...], options: Bnb4bitOptions) -> dict[str, TensorSpec]:
        numel = math.prod(shape)
        storage = getattr(torch, options.quant_storage)
        blocks, count = -(-numel // options.block_size), (numel + 1) // 2
        if count % storage.itemsize:
            raise RecipeError(
                f"a {list(shape)} weight has {count} bytes of codes: no whole number of {options.quant_storage}"
            )
        specs = {
            local: TensorSpec(SAFETENSORS_DTYPES[storage], (count // storage.itemsize, 1)),
            f"{local}.absmax": TensorSpec("U8" if options.double_quant else "F32", (blocks,)),
            f"{local}.quant_map": TensorSpec("F32", (16,)),
        }
        if options.double_quant:
            specs[f"{local}.nested_absmax"] = TensorSpec("F32", (-(-blocks // NESTED_BLOCK_SIZE),))
            specs[f"{local}.nested_quant_map"] = TensorSpec("F32", (256,))
        specs[local + self._mark] = TensorSpec("U8", (-1,))
        return specs

    def row_step(self, shape: tuple[int, int], options: Bnb4bitOptions) -> int:
        return options.block_size // math.gcd(options.block_size, shape[1])

    def scales(self, values_OI: Tensor, options: Bnb4bitOptions, inputs_I: Tensor | None = None) -> Tensor:
        flat, size = values_OI.flatten(), options.block_size
        whole = flat.numel() // size * size
        absmax_B = flat[:whole].view(-1, size).abs().amax(dim=1)
        if whole < flat.numel():  # bitsandbytes clamps only the short last block
            absmax_B = torch.cat([absmax_B, flat[whole:].abs().amax().clamp(min=1e-38)[None]])
        return absmax_B

    def grid(
        self, scales: Tensor, shape: tuple[int, int], options: Bnb4bitOptions, inputs_I: Tensor | None = None
    ) -> Grid:  # fmt: skip
        if not options.double_quant:
            parts = {"absmax": scales.cpu()}
            return Bnb4bitGrid(self.name, options.block_size, shape[1], scales, scales, parts)
        # On the CPU, so that the bytes do not depend on the device (its table lookup differs from CUDA's nearest).
        exact_B = scales.cpu()
        offset = exact_B.mean()
        codes_B, state = bnb.quantize_blockwise(exact_B - offset, blocksize=NESTED_BLOCK_SIZE)
        stored_B = bnb.dequantize_blockwise(codes_B, state) + offset
        parts = {"absmax": codes_B, "nested_absmax": state.absmax, "nested_quant_map": state.code}
        return Bnb4bitGrid(
            self.name, options.block_size, shape[1], stored_B.to(scales.device), scales, parts, float(offset)
        )

    def pack(self, codes_OI: Tensor, options: Bnb4bitOptions) -> Tensor:
        _, midpoints, disk_L = levels(self.name, codes_OI.device)
        disk_OI = codes_OI if self.name == "nf4" else disk_L[codes_OI.long()]
        zero = int(disk_L[torch.bucketize(torch.zeros(1, device=midpoints.device), midpoints)])
        return pack_nibbles(disk_OI, padding=zero)  # bitsandbytes pads an odd count with the value 0

    def scale_tensors(self, grid: Grid, local: str, shape: tuple[int, ...], options: Bnb4bitOptions) -> Parts:
        assert isinstance(grid, Bnb4bitGrid)
        state: dict[str, Any] = {
            "quant_type": self.name,
            "blocksize": options.block_size,
            "dtype": options.dtype,
            "shape": list(shape),
        }
        if grid.offset is not None:
            nested = {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32", "nested_offset": grid.offset}
            state.update(nested)
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        quant_map = bnb.get_4bit_type(self.name, device=torch.device("cpu"))
        scales = {f"{local}.{name}": part for name, part in grid.scale_parts.items()}
        return {**scales, f"{local}.quant_map": quant_map, local + self._mark: text}

    def quantization_config(
        self, options: Bnb4bitOptions, base: Mapping[str, Any], compute_dtype: str, layout: ModuleLayout
    ) -> dict[str, Any] | None:
        return bitsandbytes_config(
            base,
            load_in_4bit=True,
            bnb_4bit_quant_type=self.name,
            bnb_4bit_use_double_quant=options.double_quant,
            bnb_4bit_quant_storage=options.quant_storage,
            bnb_4bit_compute_dtype=base.get("bnb_4bit_compute_dtype", compute_dtype),
            layout=layout,
        )


def bitsandbytes_config(base: Mapping[str, Any], layout: ModuleLayout, **settings: Any) -> dict[str, Any]:
    """``quantization_config`` as transformers writes it; ``base`` keeps its skip list and thresholds. Where there is no
    list, the loader has its own; one that is written replaces it."""
    from transformers import BitsAndBytesConfig

    kept = {name: base[name] for name in ("llm_int8_skip_modules", "llm_int8_threshold") if name in base}
    if layout.dense:
        kept["llm_int8_skip_modules"] = [*(kept.get("llm_int8_skip_modules") or layout.skipped), *layout.dense]
    if isinstance(settings.get("bnb_4bit_compute_dtype"), str):
        settings["bnb_4bit_compute_dtype"] = str(settings["bnb_4bit_compute_dtype"]).removeprefix("torch.")
    return dict(BitsAndBytesConfig(**kept, **settings).to_dict())
