"""compressed-tensors' integer weights: int4 and int8, packed into words or one to a byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from qmerge.errors import CheckpointError, RecipeError
from qmerge.formats._affine import (
    GROUP_SIZES,
    WORD,
    AffineGrid,
    dividing,
    fit_scales,
    pack_bits,
    sequential_groups,
    unpack_bits,
)
from qmerge.formats._compressed import (
    SCALE_DTYPES,
    TAKE_CONFIG,
    Compressed,
    CompressedOptions,
    Scheme,
    group_size_of,
)
from qmerge.formats.base import Stored
from qmerge.grids import Grid
from qmerge.safetensors_io.reader import Reader
from qmerge.types import TORCH_DTYPES, Options, Parts, Rows, TensorInfo, TensorSpec, Weight


class StoredInt(Stored):
    """Codes on disk are words of a bit stream in every row, or int8; on the grid they are unsigned."""

    def __init__(
        self, weight: Weight, options: CompressedOptions, reader: Reader, device: torch.device, bits: int
    ) -> None:
        self._weight, self._reader, self._device, self._bits = weight, reader, device, bits
        rows, columns = weight.shape
        scale_OG = reader.tensor(weight.parts["weight_scale"]).float().reshape(rows, -1)
        if not bool(scale_OG.isfinite().all()):
            raise CheckpointError(f"{weight.module}.weight_scale holds NaN or infinity")
        zero_OG = read_zeros(weight, options, scale_OG, reader, bits)
        group_I = sequential_groups(columns, options.group_size)
        if options.act_order:
            group_I = reader.tensor(weight.parts["weight_g_idx"]).long()
        self.grid: AffineGrid = AffineGrid(scale_OG.to(device), zero_OG.to(device), group_I.to(device), 2**bits)

    def codes(self, rows: Rows) -> Tensor:
        info = self._weight.parts.get("weight_packed", self._weight.parts.get("weight"))
        assert info is not None
        width = info.shape[1]
        flat = self._reader.elements(info, rows.start * width, rows.stop * width)
        stored = flat.view(len(rows), width).to(self._device)
        if info.dtype == "I8":
            return (stored.short() + (1 << (self._bits - 1))).to(torch.uint8)
        return unpack_bits(stored, self._bits)[:, : self._weight.shape[1]].contiguous()

    def values(self, rows: Rows) -> Tensor:
        return self.grid.rows(rows).decode(self.codes(rows))


def read_zeros(weight: Weight, options: CompressedOptions, scale_OG: Tensor, reader: Reader, bits: int) -> Tensor:
    """float32 [O, G], unsigned as the codes. Packed like the codes, but down the rows; as int8 in older files."""
    middle = 1 << (bits - 1)
    if "weight_zero_point" not in weight.parts:
        return torch.full_like(scale_OG, middle)
    stored = reader.tensor(weight.parts["weight_zero_point"])
    if stored.dtype == torch.int32:
        zero_GO = unpack_bits(stored.T.contiguous(), bits)[:, : len(scale_OG)]
        zero_OG: Tensor = zero_GO.T.contiguous().float()
    else:
        zero_OG = stored.float().reshape(scale_OG.shape).add_(middle)
    if options.sym and bool((zero_OG != middle).any()):
        raise CheckpointError(
            f"{weight.module}: config.json says symmetric, but weight_zero_point is not 0. {TAKE_CONFIG}"
        )
    return zero_OG


class CompressedInt(Compressed):
    """Parts: ``weight_packed`` int32 [O, I·bits/32], codes + 2**(bits − 1) as a stream of bits, ``weight_scale`` [O, G],
    ``weight_shape`` int64 [2], and where asymmetric ``weight_zero_point`` int32 [O·bits/32, G]."""

    bits: ClassVar[int]

    def needed(self, scheme: Scheme) -> tuple[str, ...]:
        zeros = () if scheme.weights.get("symmetric", True) else ("weight_zero_point",)
        shape = ("weight_shape",) if self.codes == "weight_packed" else ()
        order = ("weight_g_idx",) if scheme.weights.get("actorder") in ("group", True) else ()
        return (self.codes, "weight_scale", *shape, *zeros, *order)

    def read_shape(
        self, module: str, parts: Mapping[str, TensorInfo], scheme: Scheme, reader: Reader
    ) -> tuple[tuple[int, int], CompressedOptions]:
        codes, scale = parts[self.codes], parts["weight_scale"]
        if scale.dtype not in SCALE_DTYPES:
            raise CheckpointError(f"{module}.weight_scale is {scale.dtype}, expected {' or '.join(SCALE_DTYPES)}")
        rows, columns = self._sizes(module, parts, reader)
        words = -(-columns * self.bits // WORD) if codes.dtype == "I32" else columns
        if codes.shape != (rows, words):
            raise CheckpointError(
                f"{module}.{self.codes} has shape {list(codes.shape)}, but {rows} x {columns} with {self.bits} bits, as "
                f"config.json says, makes {[rows, words]}. {TAKE_CONFIG}"
            )
        size = group_size_of(module, columns, scheme)
        groups = 1 if size == -1 else columns // size
        if scale.shape != (rows, groups) and not (size == -1 and scale.shape == (rows,)):
            raise CheckpointError(
                f"{module}.weight_scale has shape {list(scale.shape)}, but {rows} x {columns} "
                f"{'with a scale per row' if size == -1 else f'in groups of {size}'}, as config.json says, makes "
                f"{[rows, groups]}. {TAKE_CONFIG}"
            )
        self._check_zeros(module, parts, (rows, groups))
        ordered = self._is_ordered(module, parts, columns, groups, reader)
        sym = bool(scheme.weights.get("symmetric", True))
        return (rows, columns), CompressedOptions(self.name, size, sym, scale.dtype, ordered)

    def _sizes(self, module: str, parts: Mapping[str, TensorInfo], reader: Reader) -> tuple[int, int]:
        codes = parts[self.codes]
        dtype = "I32" if self.codes == "weight_packed" else "I8"
        if codes.dtype != dtype or len(codes.shape) != 2:
            raise CheckpointError(
                f"{module}.{self.codes} is {codes.dtype} {list(codes.shape)}, expected {dtype} with two dimensions"
            )
        if self.codes == "weight":
            return codes.shape[0], codes.shape[1]
        shape = parts["weight_shape"]
        if shape.dtype not in ("I64", "I32") or shape.shape != (2,):
            raise CheckpointError(f"{module}.weight_shape is {shape.dtype} {list(shape.shape)}, expected I64 [2]")
        rows, columns = reader.tensor(shape).tolist()
        return int(rows), int(columns)

    def _check_zeros(self, module: str, parts: Mapping[str, TensorInfo], shape: tuple[int, int]) -> None:
        zeros = parts.get("weight_zero_point")
        if zeros is None:
            return
        packed = (-(-shape[0] * self.bits // WORD), shape[1])
        one = shape[1] == 1 and zeros.shape == shape[:1]
        if (zeros.dtype, zeros.shape) not in (("I32", packed), ("I8", shape)) and not (zeros.dtype == "I8" and one):
            raise CheckpointError(
                f"{module}.weight_zero_point is {zeros.dtype} {list(zeros.shape)}, expected I32 {list(packed)} or "
                f"I8 {list(shape)}"
            )

    def _is_ordered(
        self, module: str, parts: Mapping[str, TensorInfo], columns: int, groups: int, reader: Reader
    ) -> bool:  # fmt: skip
        """Act-order of compressed-tensors before 0.20; vLLM still reads it."""
        order = parts.get("weight_g_idx")
        if order is None:
            return False
        if order.dtype not in ("I32", "I64") or order.shape != (columns,):
            raise CheckpointError(
                f"{module}.weight_g_idx is {order.dtype} {list(order.shape)}, expected I32 [{columns}], one for every input"
            )
        group_I = reader.tensor(order)
        if int(group_I.min()) < 0 or int(group_I.max()) >= groups:
            raise CheckpointError(
                f"{module}.weight_g_idx holds {int(group_I.min())} to {int(group_I.max())}, but there are {groups} groups: "
                f"expected 0 to {groups - 1}"
            )
        return True

    def open(self, weight: Weight, reader: Reader, device: torch.device) -> Stored:
        return StoredInt(weight, self.options_of(weight), reader, device, self.bits)

    def options(self, asked: Mapping[str, Any], source: Options | None, dtype: str) -> CompressedOptions:
        like = self.like(source, dtype)
        if like is not source and "group_size" in self.info.accepted_options:
            like = replace(like, group_size=128)
        options = replace(like, **{name: value for name, value in asked.items() if value is not None})
        if "group_size" in asked and options.group_size not in GROUP_SIZES:
            raise RecipeError(
                f"group_size {options.group_size}: {self.name} has {', '.join(map(str, GROUP_SIZES))} (-1: a scale per row)"
            )
        return options

    def options_for_model(self, asked: Mapping[str, Any], shapes: Sequence[tuple[int, ...]]) -> Mapping[str, Any]:
        """Groups of 128, or of the most that divides the inputs of every weight: the library takes no short last group."""
        if "group_size" in asked or "group_size" not in self.info.accepted_options:
            return asked
        return {**asked, "group_size": dividing(shape[1] for shape in shapes)}

    def check(self, name: str, shape: tuple[int, int], options: CompressedOptions) -> None:
        super().check(name, shape, options)
        if ".experts." in name and not options.sym:
            raise RecipeError(
                f"{name}: transformers 5.23 reads experts without zero points: use --sym, symmetric codes"
            )

    def describe_options(self, options: CompressedOptions) -> str:
        groups = "a scale per row" if options.group_size == -1 else f"groups of {options.group_size}"
        order = ", act-order" if options.act_order else ""
        return f"{self.bits} bits, {groups}, {'symmetric' if options.sym else 'asymmetric'}{order}"

    def target_warnings(self, options: CompressedOptions, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
        if options.act_order:
            return ["weight_g_idx: vLLM reads it; compressed-tensors 0.20, and with it transformers, no longer does"]
        if options.sym:
            return []
        line = (
            f"{self.name}, asymmetric: vLLM reads it; transformers loads it only with "
            f"CompressedTensorsConfig(dequantize=True) (compressed-tensors 0.20 expects zero points that are not packed)"
        )
        return [line]

    def outputs(self, local: str, shape: tuple[int, ...], options: CompressedOptions) -> dict[str, TensorSpec]:
        rows, columns = shape
        groups = 1 if options.group_size == -1 else columns // options.group_size
        specs = {
            "weight_packed": TensorSpec("I32", (rows, -(-columns * self.bits // WORD))),
            "weight_scale": TensorSpec(options.scale_dtype, (rows, groups)),
            "weight_shape": TensorSpec("I64", (2,)),
        }
        if not options.sym:
            specs["weight_zero_point"] = TensorSpec("I32", (-(-rows * self.bits // WORD), groups))
        if options.act_order:
            specs["weight_g_idx"] = TensorSpec("I32", (columns,))
        return specs

    def scales(self, values_OI: Tensor, options: CompressedOptions, inputs_I: Tensor | None = None) -> Tensor:
        """float32 [rows, G, 2]: scale and zero."""
        group_I = sequential_groups(values_OI.shape[1], options.group_size, values_OI.device)
        dtype = TORCH_DTYPES[options.scale_dtype]
        return torch.stack(fit_scales(values_OI, group_I, self.bits, options.sym, dtype, inputs_I), dim=2)

    def grid(
        self, scales: Tensor, shape: tuple[int, int], options: CompressedOptions, inputs_I: Tensor | None = None
    ) -> Grid:  # fmt: skip
        group_I = sequential_groups(shape[1], options.group_size, scales.device)
        return AffineGrid(scales[..., 0].contiguous(), scales[..., 1].contiguous(), group_I, 2**self.bits)

    def pack(self, codes_OI: Tensor, options: CompressedOptions) -> Tensor:
        return pack_padded(codes_OI, self.bits)

    def scale_tensors(self, grid: Grid, local: str, shape: tuple[int, ...], options: CompressedOptions) -> Parts:
        assert isinstance(grid, AffineGrid)
        parts = {
            "weight_scale": grid.scale_OG.to(TORCH_DTYPES[options.scale_dtype]).cpu(),
            "weight_shape": torch.tensor(shape),
        }
        if not options.sym:
            zeros_GO = grid.zero_OG.T.to(torch.uint8)
            parts["weight_zero_point"] = pack_padded(zeros_GO, self.bits).T.contiguous().cpu()
        if options.act_order:
            parts["weight_g_idx"] = grid.group_I.int().cpu()
        return parts

    def weights_args(self, options: CompressedOptions) -> dict[str, Any]:
        grouped = options.group_size != -1
        return {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": options.sym,
            "group_size": options.group_size if grouped else None,
            "strategy": "group" if grouped else "channel",
            "dynamic": False,
            **({"actorder": "group"} if options.act_order else {}),
        }


def pack_padded(codes_XN: Tensor, bits: int) -> Tensor:
    """uint8 [X, N] → int32 [X, N·bits/32], the last word filled up with zeros."""
    return pack_bits(pad(codes_XN, (0, -codes_XN.shape[1] % (WORD // bits))), bits)
