"""AWQ's GEMM layout: 4 bits in groups, asymmetric, as vLLM, SGLang, transformers and gptqmodel read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qmerge.errors import CheckpointError, RecipeError
from qmerge.formats._affine import (
    GROUP_SIZES,
    AffineGrid,
    dividing,
    fit_scales,
    pack_bits,
    sequential_groups,
    unpack_bits,
)
from qmerge.formats.base import NOT_QUANTIZED, FormatInfo, ModuleLayout, Stored, TargetFormat
from qmerge.grids import Grid
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Options, Parts, Rows, TensorInfo, TensorSpec, Weight

PARTS = ("qweight", "qzeros", "scales")
BITS, PER_WORD = 4, 8
FIELD = [0, 4, 1, 5, 2, 6, 3, 7]
"""Row 8c + j of the weight lies in field ``FIELD[j]`` of word c, counted from the lowest bits (AutoAWQ, packing_utils.py)."""

ROW = [FIELD.index(field) for field in range(PER_WORD)]


@dataclass(frozen=True)
class AwqOptions:
    group_size: int = 128


class StoredAwq(Stored):
    """Rows of the weight are columns on disk, so the packed codes are held whole."""

    def __init__(self, weight: Weight, options: AwqOptions, reader: Reader, device: torch.device) -> None:
        self._weight, self._reader, self._device = weight, reader, device
        self._packed: Tensor | None = None
        scale_GO = reader.tensor(weight.parts["scales"]).float()
        if not bool(scale_GO.isfinite().all()):
            raise CheckpointError(f"{weight.module}.scales holds NaN or infinity")
        zero_GO = unpack_rows(reader.tensor(weight.parts["qzeros"])).float()
        group_I = sequential_groups(weight.shape[1], options.group_size, device)
        self.grid: AffineGrid = AffineGrid(
            scale_GO.T.contiguous().to(device), zero_GO.T.contiguous().to(device), group_I, 2**BITS
        )

    def codes(self, rows: Rows) -> Tensor:
        if self._packed is None:
            self._packed = self._reader.tensor(self._weight.parts["qweight"])
        first, last = rows.start // PER_WORD, -(-rows.stop // PER_WORD)
        codes_IO = unpack_rows(self._packed[:, first:last].contiguous().to(self._device))
        return codes_IO[:, rows.start - first * PER_WORD : rows.stop - first * PER_WORD].T.contiguous()

    def values(self, rows: Rows) -> Tensor:
        return self.grid.rows(rows).decode(self.codes(rows))


def unpack_rows(words_XW: Tensor) -> Tensor:
    """int32 [X, O/8] → uint8 [X, O]."""
    return unpack_bits(words_XW, BITS).view(len(words_XW), -1, PER_WORD)[..., FIELD].flatten(1)


def pack_rows(codes_XO: Tensor) -> Tensor:
    """The reverse: uint8 [X, O] → int32 [X, O/8]."""
    return pack_bits(codes_XO.reshape(len(codes_XO), -1, PER_WORD)[..., ROW].flatten(1), BITS)


class Awq(TargetFormat[AwqOptions]):
    """Parts: ``qweight`` int32 [I, O/8], ``qzeros`` int32 [G, O/8] (zeros as they are), ``scales`` float16 [G, O]."""

    info = FormatInfo(
        name="awq",
        quant_method="awq",
        loaders="vLLM, SGLang, transformers, gptqmodel",
        accepted_options=("group_size",),
        row_axis=1,
    )

    def find(
        self, tensors: Mapping[str, TensorInfo], reader: Reader, quantization: Mapping[str, Any] = NOT_QUANTIZED
    ) -> list[Weight]:
        """GPTQ's parts have the same names: only the config tells."""
        if quantization.get("quant_method") != self.info.quant_method:
            return []
        _check_version(quantization)
        modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
        return [_weight(module, tensors, quantization) for module in modules]

    def open(self, weight: Weight, reader: Reader, device: torch.device) -> Stored:
        return StoredAwq(weight, self.options_of(weight), reader, device)

    def options(self, asked: Mapping[str, Any], source: Options | None, dtype: str) -> AwqOptions:
        like = source if isinstance(source, AwqOptions) else AwqOptions()
        options = replace(like, **{name: value for name, value in asked.items() if value is not None})
        if "group_size" in asked and options.group_size not in GROUP_SIZES:
            raise RecipeError(f"group_size {options.group_size}: AWQ has {', '.join(map(str, GROUP_SIZES))}")
        return options

    def options_for_model(self, asked: Mapping[str, Any], shapes: Sequence[tuple[int, ...]]) -> Mapping[str, Any]:
        """Groups of 128, or of the most that divides the inputs of every weight."""
        if "group_size" in asked:
            return asked
        return {**asked, "group_size": dividing(shape[1] for shape in shapes)}

    def describe_options(self, options: AwqOptions) -> str:
        return "4 bits, " + ("one group" if options.group_size == -1 else f"groups of {options.group_size}")

    def check(self, name: str, shape: tuple[int, int], options: AwqOptions) -> None:
        rows, columns = shape
        if options.group_size != -1 and columns % options.group_size:
            raise RecipeError(
                f"{name} has {columns} inputs, no multiple of the group size {options.group_size}: use --group-size "
                f"{dividing([columns])}"
            )
        if rows % PER_WORD:
            raise RecipeError(
                f"{name} has {rows} outputs: AWQ packs {PER_WORD} of them into a word, so it needs a multiple of "
                f"{PER_WORD}; use --target w4a16 or nf4"
            )

    def row_step(self, shape: tuple[int, int], options: AwqOptions) -> int:
        return PER_WORD

    def outputs(self, local: str, shape: tuple[int, ...], options: AwqOptions) -> dict[str, TensorSpec]:
        rows, columns = shape
        groups = 1 if options.group_size == -1 else columns // options.group_size
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
        return torch.stack(fit_scales(values_OI, group_I, BITS, False, torch.float16, inputs_I), dim=2)

    def grid(
        self, scales: Tensor, shape: tuple[int, int], options: AwqOptions, inputs_I: Tensor | None = None
    ) -> Grid:  # fmt: skip
        group_I = sequential_groups(shape[1], options.group_size, scales.device)
        return AffineGrid(scales[..., 0].contiguous(), scales[..., 1].contiguous(), group_I, 2**BITS)

    def pack(self, codes_OI: Tensor, options: AwqOptions) -> Tensor:
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
        """As AutoAWQ writes it. Loaders skip lm_head by themselves."""
        kept = [*(base.get("modules_to_not_convert") or ()), *layout.dense, *layout.experts]
        return {
            "bits": BITS,
            "group_size": options.group_size,
            "modules_to_not_convert": list(dict.fromkeys(kept)) or None,
            "quant_method": self.info.quant_method,
            "version": "gemm",
            "zero_point": True,
        }


FORMAT = Awq()


def _check_version(quantization: Mapping[str, Any]) -> None:
    """gptqmodel calls it format, AutoAWQ version; both mean the layout."""
    said = quantization.get("version") or quantization.get("checkpoint_format") or quantization.get("format") or "gemm"
    if str(said).lower() != "gemm":
        raise CheckpointError(
            f"the base is stored in AWQ's layout {said!r}; qmerge reads 'gemm', which is what most AWQ models have: "
            f"take that variant of the model"
        )
    bits = quantization.get("bits", quantization.get("w_bit", BITS))
    if bits != BITS:
        raise CheckpointError(f"the base is AWQ with {bits} bits; qmerge reads AWQ with {BITS} bits")


def _weight(module: str, tensors: Mapping[str, TensorInfo], quantization: Mapping[str, Any]) -> Weight:
    parts = {local: tensors[f"{module}.{local}"] for local in PARTS if f"{module}.{local}" in tensors}
    for local, dtypes in zip(PARTS, (("I32",), ("I32",), ("F16", "BF16", "F32")), strict=True):
        if local not in parts:
            raise CheckpointError(f"{module} is stored as AWQ, but {module}.{local} is missing")
        if parts[local].dtype not in dtypes:
            raise CheckpointError(f"{module}.{local} is {parts[local].dtype}, expected {' or '.join(dtypes)}")
    qweight, qzeros, scales = (parts[local].shape for local in PARTS)
    matrices = len(qweight) == len(qzeros) == len(scales) == 2
    if not matrices or not (qweight[1] * PER_WORD == qzeros[1] * PER_WORD == scales[1]) or qzeros[0] != scales[0]:
        raise CheckpointError(
            f"{module}: qweight {list(qweight)}, qzeros {list(qzeros)} and scales {list(scales)} do not belong to one AWQ "
            f"weight: expected [I, O/{PER_WORD}], [G, O/{PER_WORD}] and [G, O]"
        )
    size = _group_size(module, qweight[0], scales[0], quantization)
    return Weight(module, "weight", "awq", (scales[1], qweight[0]), parts, AwqOptions(size))


def _group_size(module: str, columns: int, groups: int, quantization: Mapping[str, Any]) -> int:
    """What the config says; the shapes must say the same."""
    said = quantization.get("group_size", quantization.get("q_group_size"))
    size = said if said is not None else -1 if groups == 1 else columns // max(1, groups)
    expected = 1 if size == -1 else columns / size if isinstance(size, int) and size > 0 else None
    if expected != groups:
        raise CheckpointError(
            f"{module}: the config says groups of {size}, but there are {groups} for {columns} inputs. "
            f"Take the config.json that belongs to these files"
        )
    return int(size)
