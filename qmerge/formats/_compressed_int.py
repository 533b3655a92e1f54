"""compressed-tensors' integer weights: int4 and int8, packed into words or one to a byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from qmerge.errors import CheckpointError, RecipeError
from qmerge.formats._affine import (
    GROUP_SIZES,
    WHOLE_ROW,
    AffineGrid,
    check_groups,
    group_count,
    largest_group_size,
    sequential_groups,
)
from qmerge.formats._compressed import SCALE_DTYPES, Compressed, CompressedOptions
from qmerge.formats._compressed_config import TAKE_CONFIG, Scheme, group_size_of
from qmerge.formats._fit_scales import fit_scales, fitted_grid
from qmerge.formats._packing import pack_padded, unpack_bits, words_for
from qmerge.formats._tensors import check_dtype, check_finite, read_rows
from qmerge.formats.base import Stored, with_asked
from qmerge.grids import Grid
from qmerge.safetensors_io.reader import Reader
from qmerge.types import TORCH_DTYPES, Options, Parts, Rows, TensorInfo, TensorSpec, Weight


class StoredInt(Stored):
    """Codes on disk are words of a bit stream in every row, or int8; on the grid they are unsigned."""

    def __init__(
        self, weight: Weight, options: CompressedOptions, reader: Reader, device: torch.device, *, bits: int
    ) -> None:
        packed = weight.parts.get("weight_packed")
        self._info = weight.parts["weight"] if packed is None else packed
        self._reader = reader
        self._device = device
        self._bits = bits
        rows, self._columns = weight.shape
        scale_OG = reader.tensor(weight.parts["weight_scale"]).float().reshape(rows, -1)
        check_finite(scale_OG, f"{weight.module}.weight_scale")
        zero_OG = read_zeros(weight, options, scale_OG, reader, bits=bits)
        group_I = sequential_groups(self._columns, options.group_size)
        if options.act_order:
            group_I = reader.tensor(weight.parts["weight_g_idx"]).long()
        self.grid: AffineGrid = AffineGrid(scale_OG.to(device), zero_OG.to(device), group_I.to(device), 2**bits)

    def codes(self, rows: Rows) -> Tensor:
        stored = read_rows(self._info, rows, self._reader).to(self._device)
        if self._info.dtype == "I8":
            return (stored.short() + middle_code(self._bits)).to(torch.uint8)
        return unpack_bits(stored, self._bits)[:, : self._columns].contiguous()


def middle_code(bits: int) -> int:
    """The unsigned code of the signed code 0."""
    return 1 << (bits - 1)


def read_zeros(
    weight: Weight, options: CompressedOptions, scale_OG: Tensor, reader: Reader, *, bits: int
) -> Tensor:  # fmt: skip
    """float32 [O, G], unsigned as the codes.

    Raises:
        CheckpointError: the weight is symmetric, but a zero is not the middle code.
    """
    middle = middle_code(bits)
    if "weight_zero_point" not in weight.parts:
        return torch.full_like(scale_OG, middle)
    stored = reader.tensor(weight.parts["weight_zero_point"])
    if stored.dtype == torch.int32:
        # Packed as the codes are, but down the rows.
        zero_GO = unpack_bits(stored.T.contiguous(), bits)[:, : len(scale_OG)]
        zero_OG: Tensor = zero_GO.T.contiguous().float()
    else:
        # Older files have int8.
        zero_OG = stored.float().reshape(scale_OG.shape).add_(middle)
    if options.sym and bool((zero_OG != middle).any()):
        raise CheckpointError(
            f"{weight.module}: config.json says symmetric, but weight_zero_point is not 0. {TAKE_CONFIG}"
        )
    return zero_OG


class CompressedInt(Compressed):
    """Integer codes with a scale, and where asymmetric a zero, for every row or group.

    Tensors: ``weight_packed`` int32 [O, I·bits/32], codes + 2**(bits − 1) as a stream of bits, ``weight_scale`` [O, G],
    ``weight_shape`` int64 [2], and where asymmetric ``weight_zero_point`` int32 [O·bits/32, G].
    """

    bits: ClassVar[int]

    # --- read ---

    def required_parts(self, scheme: Scheme) -> tuple[str, ...]:
        names = [self.codes_tensor, "weight_scale"]
        if self.codes_tensor == "weight_packed":
            names.append("weight_shape")
        if not scheme.symmetric:
            names.append("weight_zero_point")
        if scheme.weights.get("actorder") in ("group", True):
            names.append("weight_g_idx")
        return tuple(names)

    def shape_and_options(
        self, module: str, parts: Mapping[str, TensorInfo], scheme: Scheme, reader: Reader
    ) -> tuple[tuple[int, int], CompressedOptions]:
        scale = parts["weight_scale"]
        check_dtype(scale, SCALE_DTYPES)
        rows, columns = self._read_shape(module, parts, reader)
        self._check_codes(module, parts[self.codes_tensor], rows, columns)
        group_size = group_size_of(module, columns, scheme)
        groups = group_count(columns, group_size)
        self._check_scale(module, scale, (rows, columns), group_size)
        self._check_zeros(module, parts, rows, groups)
        options = CompressedOptions(
            format=self.name,
            group_size=group_size,
            sym=scheme.symmetric,
            scale_dtype=scale.dtype,
            act_order=self._has_column_order(parts, columns, groups, reader),
        )
        return (rows, columns), options

    def _read_shape(self, module: str, parts: Mapping[str, TensorInfo], reader: Reader) -> tuple[int, int]:
        """[O, I]: ``weight_shape`` of packed codes, whose last word may not be full; otherwise the shape of the codes."""
        codes = parts[self.codes_tensor]
        is_packed = self.codes_tensor == "weight_packed"
        dtype = "I32" if is_packed else "I8"
        if codes.dtype != dtype or len(codes.shape) != 2:
            raise CheckpointError(
                f"{codes.name} is {codes.dtype} {list(codes.shape)}, expected {dtype} with two dimensions. Download the model "
                f"again"
            )
        if not is_packed:
            return codes.shape[0], codes.shape[1]
        shape = parts["weight_shape"]
        if shape.dtype not in ("I64", "I32") or shape.shape != (2,):
            raise CheckpointError(
                f"{module}.weight_shape is {shape.dtype} {list(shape.shape)}, expected I64 [2]. Download the model again"
            )
        rows, columns = reader.tensor(shape).tolist()
        return int(rows), int(columns)

    def _check_codes(self, module: str, codes: TensorInfo, rows: int, columns: int) -> None:
        width = words_for(columns, self.bits) if codes.dtype == "I32" else columns
        if codes.shape != (rows, width):
            raise CheckpointError(
                f"{module}.{self.codes_tensor} has shape {list(codes.shape)}, but {rows} x {columns} with {self.bits} bits, as "
                f"config.json says, makes {[rows, width]}. {TAKE_CONFIG}"
            )

    def _check_scale(self, module: str, scale: TensorInfo, shape: tuple[int, int], group_size: int) -> None:
        rows, columns = shape
        groups = group_count(columns, group_size)
        is_flat = group_size == WHOLE_ROW and scale.shape == (rows,)
        if scale.shape != (rows, groups) and not is_flat:
            kind = "with a scale per row" if group_size == WHOLE_ROW else f"in groups of {group_size}"
            raise CheckpointError(
                f"{module}.weight_scale has shape {list(scale.shape)}, but {rows} x {columns} {kind}, as config.json says, makes "
                f"{[rows, groups]}. {TAKE_CONFIG}"
            )

    def _check_zeros(self, module: str, parts: Mapping[str, TensorInfo], rows: int, groups: int) -> None:
        zeros = parts.get("weight_zero_point")
        if zeros is None:
            return
        packed_shape = (words_for(rows, self.bits), groups)
        is_packed = zeros.dtype == "I32" and zeros.shape == packed_shape
        is_flat = groups == 1 and zeros.shape == (rows,)
        is_plain = zeros.dtype == "I8" and (zeros.shape == (rows, groups) or is_flat)
        if not is_packed and not is_plain:
            raise CheckpointError(
                f"{module}.weight_zero_point is {zeros.dtype} {list(zeros.shape)}, expected I32 {list(packed_shape)} or I8 "
                f"{[rows, groups]}. Download the model again"
            )

    def _has_column_order(
        self, parts: Mapping[str, TensorInfo], columns: int, groups: int, reader: Reader
    ) -> bool:  # fmt: skip
        """Whether the weight has the act-order of compressed-tensors before 0.20, which vLLM still reads."""
        order = parts.get("weight_g_idx")
        if order is None:
            return False
        if order.dtype not in ("I32", "I64") or order.shape != (columns,):
            raise CheckpointError(
                f"{order.name} is {order.dtype} {list(order.shape)}, expected I32 [{columns}], one for every input. Download the "
                f"model again"
            )
        check_groups(reader.tensor(order), groups, order.name)
        return True

    def open(self, weight: Weight, reader: Reader, device: torch.device) -> Stored:
        return StoredInt(weight, self.options_of(weight), reader, device, bits=self.bits)

    # --- options ---

    @property
    def _has_groups(self) -> bool:
        """Whether the group size can be chosen; otherwise there is a scale per row."""
        return "group_size" in self.info.accepted_options

    def options(self, asked: Mapping[str, Any], source: Options | None, dtype: str) -> CompressedOptions:
        options = with_asked(self._default_options(source, dtype), asked)
        if "group_size" in asked and options.group_size not in GROUP_SIZES:
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise RecipeError(f"--group-size {options.group_size}: {self.name} supports {sizes} (-1: a scale per row)")
        return options

    def _default_options(self, source: Options | None, dtype: str) -> CompressedOptions:
        """Those of the base if it is stored this way, otherwise llm-compressor's."""
        if isinstance(source, CompressedOptions) and source.format == self.name:
            return source
        return CompressedOptions(
            format=self.name,
            group_size=128 if self._has_groups else WHOLE_ROW,
            scale_dtype=dtype if dtype in SCALE_DTYPES else "BF16",
        )

    def options_for_model(self, asked: Mapping[str, Any], shapes: Sequence[tuple[int, ...]]) -> Mapping[str, Any]:
        """Groups of 128, or as large as divides the inputs of every weight: the library has no short last group."""
        if "group_size" in asked or not self._has_groups:
            return asked
        return {**asked, "group_size": largest_group_size(shape[1] for shape in shapes)}

    def check(self, name: str, shape: tuple[int, int], options: CompressedOptions) -> None:
        super().check(name, shape, options)
        if ".experts." in name and not options.sym:
            raise RecipeError(
                f"{name}: transformers 5.23 does not read zero points of experts: use --sym, symmetric codes"
            )

    def describe_options(self, options: CompressedOptions) -> str:
        groups = "a scale per row" if options.group_size == WHOLE_ROW else f"groups of {options.group_size}"
        symmetry = "symmetric" if options.sym else "asymmetric"
        text = f"{self.bits} bits, {groups}, {symmetry}"
        return f"{text}, act-order" if options.act_order else text

    def target_warnings(self, options: CompressedOptions, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
        if options.act_order:
            warning = (
                "weight_g_idx: vLLM reads it; compressed-tensors 0.20, and so transformers, no longer does. For transformers use "
                "--target gptq"
            )
            return [warning]
        if options.sym:
            return []
        warning = (
            f"{self.name}, asymmetric: vLLM reads it; transformers loads it only with "
            f"CompressedTensorsConfig(dequantize=True), because compressed-tensors 0.20 expects zero points that are not packed. "
            f"For transformers use --sym"
        )
        return [warning]

    # --- write ---

    def outputs(self, local: str, shape: tuple[int, ...], options: CompressedOptions) -> dict[str, TensorSpec]:
        rows, columns = shape
        groups = group_count(columns, options.group_size)
        specs = {
            "weight_packed": TensorSpec("I32", (rows, words_for(columns, self.bits))),
            "weight_scale": TensorSpec(options.scale_dtype, (rows, groups)),
            "weight_shape": TensorSpec("I64", (2,)),
        }
        if not options.sym:
            specs["weight_zero_point"] = TensorSpec("I32", (words_for(rows, self.bits), groups))
        if options.act_order:
            specs["weight_g_idx"] = TensorSpec("I32", (columns,))
        return specs

    def scales(self, values_OI: Tensor, options: CompressedOptions, inputs_I: Tensor | None = None) -> Tensor:
        """float32 [rows, G, 2]: scale and zero."""
        group_I = sequential_groups(values_OI.shape[1], options.group_size, values_OI.device)
        dtype = TORCH_DTYPES[options.scale_dtype]
        return fit_scales(values_OI, group_I, bits=self.bits, sym=options.sym, dtype=dtype, inputs_I=inputs_I)

    def grid(
        self, scales: Tensor, shape: tuple[int, int], options: CompressedOptions, inputs_I: Tensor | None = None
    ) -> Grid:  # fmt: skip
        return fitted_grid(scales, sequential_groups(shape[1], options.group_size), self.bits)

    def pack(self, codes_OI: Tensor, grid: Grid, options: CompressedOptions) -> Tensor:
        return pack_padded(codes_OI, self.bits)

    def scale_tensors(self, grid: Grid, local: str, shape: tuple[int, ...], options: CompressedOptions) -> Parts:
        assert isinstance(grid, AffineGrid)
        tensors = {
            "weight_scale": grid.scale_OG.to(TORCH_DTYPES[options.scale_dtype]).cpu(),
            "weight_shape": torch.tensor(shape),
        }
        if not options.sym:
            zero_GO = grid.zero_OG.T.to(torch.uint8)
            tensors["weight_zero_point"] = pack_padded(zero_GO, self.bits).T.contiguous().cpu()
        if options.act_order:
            tensors["weight_g_idx"] = grid.group_I.int().cpu()
        return tensors

    def weights_args(self, options: CompressedOptions) -> dict[str, Any]:
        has_groups = options.group_size != WHOLE_ROW
        args = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": options.sym,
            "group_size": options.group_size if has_groups else None,
            "strategy": "group" if has_groups else "channel",
            "dynamic": False,
        }
        if options.act_order:
            args["actorder"] = "group"
        return args
