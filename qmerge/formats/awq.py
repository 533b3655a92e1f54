"""AWQ's GEMM layout: 4 bits in groups, asymmetric, as vLLM, SGLang, transformers and gptqmodel read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qmerge.errors import CheckpointError, RecipeError
from qmerge.formats._affine import (
    GROUP_SIZES,
    WHOLE_ROW,
    AffineGrid,
    check_group_size,
    group_count,
    largest_group_size,
    sequential_groups,
)
from qmerge.formats._fit_scales import fit_scales, fitted_grid
from qmerge.formats._packing import SMALL, pack_bits, unpack_bits
from qmerge.formats._tensors import (
    check_dtype,
    check_finite,
    check_present,
    experts_warnings,
    modules_with,
    parts_of,
)
from qmerge.formats.base import NOT_QUANTIZED, FormatInfo, ModuleLayout, Stored, TargetFormat, with_asked
from qmerge.grids import Grid
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Options, Parts, Rows, TensorInfo, TensorSpec, Weight

PARTS = ("qweight", "qzeros", "scales")
BITS, PER_WORD = 4, 8

# Row 8c + j of the weight is in field ``FIELD_OF_ROW[j]`` of word c, counted from the lowest bits (AutoAWQ,
# packing_utils.py).
FIELD_OF_ROW = [0, 4, 1, 5, 2, 6, 3, 7]

ROW_OF_FIELD = [FIELD_OF_ROW.index(field) for field in range(PER_WORD)]


@dataclass(frozen=True)
class AwqOptions:
    """How a weight is stored."""

    group_size: int = 128
    """Inputs that share a scale and a zero; -1: all of them."""


class StoredAwq(Stored):
    """Rows of the weight are columns on disk, so the packed codes stay in memory as a whole."""

    def __init__(self, weight: Weight, options: AwqOptions, reader: Reader, device: torch.device) -> None:
        self._weight = weight
        self._reader = reader
        self._device = device
        self._words_IW: Tensor | None = None
        scale_GO = reader.tensor(weight.parts["scales"]).float()
        check_finite(scale_GO, f"{weight.module}.scales")
        zero_GO = unpack_rows(reader.tensor(weight.parts["qzeros"])).float()
        self.grid: AffineGrid = AffineGrid(
            scale_GO.T.contiguous().to(device),
            zero_GO.T.contiguous().to(device),
            sequential_groups(weight.shape[1], options.group_size, device),
            levels_count=2**BITS,
        )

    def codes(self, rows: Rows) -> Tensor:
        if self._words_IW is None:
            self._words_IW = self._reader.tensor(self._weight.parts["qweight"])
        # Whole words of eight rows, of which the rows before and after are dropped.
        first, last = rows.start // PER_WORD, -(-rows.stop // PER_WORD)
        codes_IO = unpack_rows(self._words_IW[:, first:last].contiguous().to(self._device))
        skipped = first * PER_WORD
        return codes_IO[:, rows.start - skipped : rows.stop - skipped].T.contiguous()


def unpack_rows(words_XW: Tensor) -> Tensor:
    """int32 [X, O/8] → uint8 [X, O]."""
    return unpack_bits(words_XW, BITS).view(len(words_XW), -1, PER_WORD)[..., FIELD_OF_ROW].flatten(1)


def pack_rows(codes_XO: Tensor) -> Tensor:
    """The reverse of ``unpack_rows``: uint8 [X, O] → int32 [X, O/8]."""
    return pack_bits(codes_XO.reshape(len(codes_XO), -1, PER_WORD)[..., ROW_OF_FIELD].flatten(1), BITS)


class Awq(TargetFormat[AwqOptions]):
    """Tensors: ``qweight`` int32 [I, O/8], ``qzeros`` int32 [G, O/8] (zeros as they are), ``scales`` float16 [G, O]."""

    info = FormatInfo(
        name="awq",
        quant_method="awq",
        loaders="vLLM, SGLang, transformers, gptqmodel",
        accepted_options=("group_size",),
        row_axis=1,
        takes_single_experts=True,
    )

    def find(
        self, tensors: Mapping[str, TensorInfo], reader: Reader, quantization: Mapping[str, Any] = NOT_QUANTIZED
    ) -> list[Weight]:
        # GPTQ's tensors have the same names: only the config tells one from the other.
        if quantization.get("quant_method") != self.info.quant_method:
            return []
        _check_version(quantization)
        return [_weight(module, tensors, quantization) for module in modules_with("qweight", tensors)]

    def open(self, weight: Weight, reader: Reader, device: torch.device) -> Stored:
        return StoredAwq(weight, self.options_of(weight), reader, device)

    def options(self, asked: Mapping[str, Any], source: Options | None, dtype: str) -> AwqOptions:
        default = source if isinstance(source, AwqOptions) else AwqOptions()
        options = with_asked(default, asked)
        if "group_size" in asked and options.group_size not in GROUP_SIZES:
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise RecipeError(f"--group-size {options.group_size}: awq supports {sizes} (-1: one group)")
        return options

    def options_for_model(self, asked: Mapping[str, Any], shapes: Sequence[tuple[int, ...]]) -> Mapping[str, Any]:
        """Groups of 128, or as large as divides the inputs of every weight."""
        if "group_size" in asked:
            return asked
        return {**asked, "group_size": largest_group_size(shape[1] for shape in shapes)}

    def describe_options(self, options: AwqOptions) -> str:
        if options.group_size == WHOLE_ROW:
            return "4 bits, one group"
        return f"4 bits, groups of {options.group_size}"

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Layers of a few rows (gates, one row per head) stay dense where they fit into no words; larger ones are an error."""
        return len(shape) == 2 and (min(shape) >= SMALL or shape[0] % PER_WORD == 0)

    def check(self, name: str, shape: tuple[int, int], options: AwqOptions) -> None:
        check_group_size(name, shape[1], options.group_size)
        if shape[0] % PER_WORD:
            raise RecipeError(
                f"{name} has {shape[0]} outputs: AWQ packs {PER_WORD} of them into a word, so it needs a multiple of "
                f"{PER_WORD}; use --target w4a16 or nf4"
            )

    def row_step(self, shape: tuple[int, int], options: AwqOptions) -> int:
        return PER_WORD

    def outputs(self, local: str, shape: tuple[int, ...], options: AwqOptions) -> dict[str, TensorSpec]:
        rows, columns = shape
        groups = group_count(columns, options.group_size)
        return {
            "qweight": TensorSpec("I32", (columns, rows // PER_WORD)),
            "qzeros": TensorSpec("I32", (groups, rows // PER_WORD)),
            "scales": TensorSpec("F16", (groups, rows)),
        }

    def codes_part(self, local: str) -> str:
        return "qweight"

    def scales(self, values_OI: Tensor, options: AwqOptions, inputs_I: Tensor | None = None) -> Tensor:
        """float32 [rows, G, 2]: scale and zero."""
        group_I = sequential_groups(values_OI.shape[1], options.group_size, values_OI.device)
        return fit_scales(values_OI, group_I, bits=BITS, sym=False, dtype=torch.float16, inputs_I=inputs_I)

    def grid(
        self, scales: Tensor, shape: tuple[int, int], options: AwqOptions, inputs_I: Tensor | None = None
    ) -> Grid:  # fmt: skip
        return fitted_grid(scales, sequential_groups(shape[1], options.group_size), BITS)

    def pack(self, codes_OI: Tensor, grid: Grid, options: AwqOptions) -> Tensor:
        return pack_rows(codes_OI.T)

    def scale_tensors(self, grid: Grid, local: str, shape: tuple[int, ...], options: AwqOptions) -> Parts:
        assert isinstance(grid, AffineGrid)
        return {
            "qzeros": pack_rows(grid.zero_OG.T.to(torch.uint8)).cpu(),
            "scales": grid.scale_OG.T.half().contiguous().cpu(),
        }

    def quantization_config(
        self, options: AwqOptions, base: Mapping[str, Any], compute_dtype: str, layout: ModuleLayout
    ) -> dict[str, Any] | None:
        """As AutoAWQ writes it. Loaders leave lm_head dense without being asked."""
        not_converted = [*(base.get("modules_to_not_convert") or ()), *layout.dense, *layout.experts]
        return {
            "bits": BITS,
            "group_size": options.group_size,
            "modules_to_not_convert": list(dict.fromkeys(not_converted)) or None,
            "quant_method": self.info.quant_method,
            "version": "gemm",
            "zero_point": True,
        }

    def target_warnings(self, options: AwqOptions, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
        return experts_warnings("AWQ", shapes)


FORMAT = Awq()


def _check_version(quantization: Mapping[str, Any]) -> None:
    """Check that the config declares the GEMM layout with 4 bits."""
    # The layout is called version by AutoAWQ, and format by gptqmodel.
    layout = "gemm"
    for key in ("version", "checkpoint_format", "format"):
        if quantization.get(key):
            layout = str(quantization[key])
            break
    if layout.lower() != "gemm":
        raise CheckpointError(
            f"the base is stored in AWQ's layout {layout!r}; qmerge reads 'gemm', which most AWQ models have: take that variant "
            f"of the model"
        )
    bits = quantization.get("bits", quantization.get("w_bit", BITS))
    if bits != BITS:
        raise CheckpointError(
            f"the base is AWQ with {bits} bits; qmerge reads AWQ with {BITS} bits: take that variant of the model"
        )


def _weight(module: str, tensors: Mapping[str, TensorInfo], quantization: Mapping[str, Any]) -> Weight:
    parts = parts_of(module, PARTS, tensors)
    check_present(module, PARTS, parts, "AWQ")
    check_dtype(parts["qweight"], ("I32",))
    check_dtype(parts["qzeros"], ("I32",))
    check_dtype(parts["scales"], ("F16", "BF16", "F32"))
    columns, groups, rows = _sizes(module, parts)
    options = AwqOptions(_group_size(module, columns, groups, quantization))
    return Weight(module=module, local="weight", format="awq", shape=(rows, columns), parts=parts, options=options)


def _sizes(module: str, parts: Mapping[str, TensorInfo]) -> tuple[int, int, int]:
    """(inputs, groups, outputs), which the shapes must agree on."""
    qweight = parts["qweight"].shape
    qzeros = parts["qzeros"].shape
    scales = parts["scales"].shape
    if len(qweight) == len(qzeros) == len(scales) == 2:
        same_outputs = qweight[1] * PER_WORD == qzeros[1] * PER_WORD == scales[1]
        if same_outputs and qzeros[0] == scales[0]:
            return qweight[0], scales[0], scales[1]
    raise CheckpointError(
        f"{module}: qweight {list(qweight)}, qzeros {list(qzeros)} and scales {list(scales)} do not belong to one AWQ weight: "
        f"expected [I, O/{PER_WORD}], [G, O/{PER_WORD}] and [G, O]. Download the model again"
    )


def _group_size(module: str, columns: int, groups: int, quantization: Mapping[str, Any]) -> int:
    """The group size of the config, which the shapes must agree with; without one, that of the shapes."""
    size = quantization.get("group_size", quantization.get("q_group_size"))
    if size is None:
        size = WHOLE_ROW if groups == 1 else columns // max(1, groups)
    is_valid = isinstance(size, int) and (size == WHOLE_ROW or size > 0)
    if is_valid and (groups == 1 if size == WHOLE_ROW else groups * size == columns):
        return int(size)
    raise CheckpointError(
        f"{module}: the config says groups of {size}, but there are {groups} for {columns} inputs. Take the config.json that "
        f"belongs to these files"
    )
