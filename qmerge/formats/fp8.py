"""FP8 (E4M3) with a scale per block, row or matrix; written in blocks of 128 x 128, as DeepSeek and Qwen ship it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qmerge.errors import CheckpointError, RecipeError
from qmerge.formats._scaled_float import FLOAT8, LARGEST, ScaledFloatGrid
from qmerge.formats.base import NOT_QUANTIZED, FormatInfo, ModuleLayout, Stored, TargetFormat
from qmerge.grids import Grid
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Options, Parts, Rows, TensorInfo, TensorSpec, Weight

Block = tuple[int | None, int | None]
"""Rows and columns that share a scale; None: all of them."""

MATRIX: Block = (None, None)
ROW: Block = (1, None)
SQUARE = (128, 128)

SCALES = ("weight_scale_inv", "weight_scale")
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
BESIDE = ("activation_scale", "input_scale", "input_scale_ub")
"""Scales of the layer's inputs: they go along with the weight."""


@dataclass(frozen=True)
class Fp8Options:
    """``power_of_two``: scales are powers of two (``scale_fmt`` ue8m0), whatever they are stored as; ``beside``: further
    parts. The defaults are how fresh weights are written; anything else is kept as the base has it."""

    block: Block = SQUARE
    scale: str = "weight_scale_inv"
    scale_dtype: str = "F32"
    power_of_two: bool = False
    beside: tuple[str, ...] = ()


class StoredFp8(Stored):
    def __init__(self, weight: Weight, options: Fp8Options, reader: Reader, device: torch.device) -> None:
        self._info, self._reader, self._device = weight.parts["weight"], reader, device
        shape = (weight.shape[0], weight.shape[1])
        scale_RC = read_scales(weight.parts[options.scale], reader).view(blocks_of(shape, options.block))
        if not bool((scale_RC.isfinite() & (scale_RC >= 0)).all()):
            raise CheckpointError(
                f"{weight.module}.{options.scale} holds NaN, infinity or negative numbers; it is damaged, download it again"
            )
        self.grid: ScaledFloatGrid = ScaledFloatGrid(scale_RC.to(device), shape, whole(options.block, shape))

    def codes(self, rows: Rows) -> Tensor:
        columns = self._info.shape[1]
        flat = self._reader.elements(self._info, rows.start * columns, rows.stop * columns)
        return flat.view(torch.uint8).view(len(rows), columns).to(self._device)

    def values(self, rows: Rows) -> Tensor:
        return self.grid.rows(rows).decode(self.codes(rows))


class Fp8(TargetFormat[Fp8Options]):
    """Parts: ``weight`` float8 [O, I], ``weight_scale_inv`` float32 [⌈O/128⌉, ⌈I/128⌉]; in bases also ``weight_scale`` or
    other blocks, and scales of the inputs beside them. value = code · scale."""

    info = FormatInfo(
        name="fp8",
        quant_method="fp8",
        other_read_methods=("fbgemm_fp8", "compressed-tensors"),
        loaders="vLLM, SGLang, transformers (without a GPU it dequantizes)",
    )

    def find(
        self, tensors: Mapping[str, TensorInfo], reader: Reader, quantization: Mapping[str, Any] = NOT_QUANTIZED
    ) -> list[Weight]:
        if quantization.get("quant_method", self.info.quant_method) not in self.info.read_methods:
            return []
        found = []
        for name, info in tensors.items():
            module = name.removesuffix(".weight")
            scaled = any(f"{module}.{scale}" in tensors for scale in SCALES)
            if module != name and info.dtype.startswith("F8") and (scaled or quantization):
                found.append(_weight(module, tensors, quantization))
        return found

    def open(self, weight: Weight, reader: Reader, device: torch.device) -> Stored:
        return StoredFp8(weight, self.options_of(weight), reader, device)

    def options(self, asked: Mapping[str, Any], source: Options | None, dtype: str) -> Fp8Options:
        return source if isinstance(source, Fp8Options) else Fp8Options()

    def describe_options(self, options: Fp8Options) -> str:
        return f"a scale for every {_words(options.block)}"

    def check(self, name: str, shape: tuple[int, int], options: Fp8Options) -> None:
        if options != Fp8Options():
            raise RecipeError(
                f"{name}: fresh FP8 scales are float32, for blocks of 128 x 128, without scales of the inputs; this base has "
                f"others, which can be kept: use --scales keep"
            )

    def target_warnings(self, options: Fp8Options, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
        odd = [name for name, shape in shapes.items() if any(size % 128 for size in shape)]
        if options.block != SQUARE or options.scale != "weight_scale_inv" or not odd:
            return []
        rows, columns = shapes[odd[0]]
        line = (
            f"FP8: {len(odd)} weights are not made of whole blocks of 128 x 128, the first is {odd[0]} ({rows} x {columns}). "
            f"transformers reads them wrongly where it dequantizes (without a GPU), and vLLM cannot split them over GPUs"
        )
        return [line]

    def row_step(self, shape: tuple[int, int], options: Fp8Options) -> int:
        return options.block[0] or 1

    def outputs(self, local: str, shape: tuple[int, ...], options: Fp8Options) -> dict[str, TensorSpec]:
        return {
            "weight": TensorSpec("F8_E4M3", shape),
            "weight_scale_inv": TensorSpec("F32", blocks_of((shape[0], shape[1]), SQUARE)),
        }

    def scales(self, values_OI: Tensor, options: Fp8Options, inputs_I: Tensor | None = None) -> Tensor:
        """float32 [R, C]: what values are multiplied with; its reciprocal is stored.

        Both as transformers computes them, so that nearest rounding gives its bytes. A search over other scales gains 1 %
        of the error (2 % where tails are heavy): the steps of floats grow with the numbers, wherever the scale puts them.
        """
        rows, columns = values_OI.shape
        (height, width), (R, C) = SQUARE, blocks_of((rows, columns), SQUARE)
        padded_OI = torch.nn.functional.pad(values_OI, (0, C * width - columns, 0, R * height - rows))
        inverse_RC = LARGEST / padded_OI.view(R, height, C, width).abs().amax(dim=(1, 3))
        return torch.where(inverse_RC.isfinite(), inverse_RC, 1.0)  # a block of zeros

    def grid(
        self, scales: Tensor, shape: tuple[int, int], options: Fp8Options, inputs_I: Tensor | None = None
    ) -> Grid:  # fmt: skip
        return ScaledFloatGrid(1.0 / scales, shape, SQUARE, scales)

    def pack(self, codes_OI: Tensor, options: Fp8Options) -> Tensor:
        return codes_OI.view(FLOAT8)

    def scale_tensors(self, grid: Grid, local: str, shape: tuple[int, ...], options: Fp8Options) -> Parts:
        assert isinstance(grid, ScaledFloatGrid)
        return {"weight_scale_inv": grid.scale_RC.cpu()}

    def quantization_config(
        self, options: Fp8Options, base: Mapping[str, Any], compute_dtype: str, layout: ModuleLayout
    ) -> dict[str, Any] | None:
        """A base's own config, where its weights keep their scales: the layout is the base's, whichever it is."""
        fresh: dict[str, Any] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(SQUARE),
            "modules_to_not_convert": None,
        }
        config = dict(base) or fresh
        left = (*layout.dense, *layout.experts)
        names = ("ignore", "ignored_layers", "modules_to_not_convert")
        key = next((name for name in names if name in config), "modules_to_not_convert")
        if left:
            named = layout.skipped if config.get(key) is None else config[key]
            config[key] = [*named, *(module for module in left if module not in named)]
        return config


FORMAT = Fp8()


def whole(block: Block, shape: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a block in a weight of this shape."""
    return block[0] or max(1, shape[0]), block[1] or max(1, shape[1])


def blocks_of(shape: tuple[int, int], block: Block) -> tuple[int, int]:
    """How many blocks there are, down and across; the last ones may be short."""
    height, width = whole(block, shape)
    return -(-shape[0] // height), -(-shape[1] // width)


def read_scales(info: TensorInfo, reader: Reader) -> Tensor:
    """float32, in the tensor's own shape. E8M0 (which some files call U8) is an exponent: 2^(byte − 127), 255 is NaN."""
    if info.dtype not in ("F8_E8M0", "U8"):
        return reader.tensor(info).float()
    exponents = torch.frombuffer(reader.bytes(info, 0, info.nbytes), dtype=torch.uint8)
    return exponents.view(torch.float8_e8m0fnu).float().view(info.shape)


def _weight(module: str, tensors: Mapping[str, TensorInfo], quantization: Mapping[str, Any]) -> Weight:
    codes = tensors[f"{module}.weight"]
    scale = next((name for name in SCALES if f"{module}.{name}" in tensors), None)
    if scale is None:
        raise CheckpointError(
            f"{module}.weight is stored as {codes.dtype}, but its scale is missing: expected {module}.{SCALES[0]} or "
            f"{module}.{SCALES[1]}. Download the model again"
        )
    if codes.dtype != "F8_E4M3" or len(codes.shape) != 2:
        raise CheckpointError(
            f"{module}.weight is {codes.dtype} {list(codes.shape)}, but FP8 weights are read as F8_E4M3 [O, I] only"
        )
    beside = tuple(name for name in BESIDE if f"{module}.{name}" in tensors)
    parts = {name: tensors[f"{module}.{name}"] for name in ("weight", scale, *beside)}
    if parts[scale].dtype not in SCALE_DTYPES:
        raise CheckpointError(f"{module}.{scale} is {parts[scale].dtype}, expected {' or '.join(SCALE_DTYPES)}")
    block = _block(f"{module}.{scale}", parts[scale].shape, (codes.shape[0], codes.shape[1]), quantization)
    power_of_two = quantization.get("scale_fmt") == "ue8m0" or parts[scale].dtype in ("F8_E8M0", "U8")
    options = Fp8Options(block, scale, parts[scale].dtype, power_of_two, beside)
    return Weight(module, "weight", "fp8", codes.shape, parts, options)


def _block(name: str, found: tuple[int, ...], shape: tuple[int, int], quantization: Mapping[str, Any]) -> Block:
    """The one of the config's blocks that makes so many scales of this weight."""
    said = list(dict.fromkeys(_said(quantization)))
    for block in said:
        count = blocks_of(shape, block)
        flat: dict[Block, list[tuple[int, ...]]] = {MATRIX: [(), (1,)], ROW: [count[:1]]}
        if found in (count, *flat.get(block, [])):
            return block
    expected = " or ".join(f"{list(blocks_of(shape, block))} (a scale for every {_words(block)})" for block in said)
    raise CheckpointError(
        f"{name} has shape {list(found)}, but the config asks for {expected or 'no FP8 scales'} of a weight of {list(shape)}. "
        f"Take the config.json that belongs to these files"
    )


def _said(quantization: Mapping[str, Any]) -> Iterator[Block]:
    """The blocks that a config speaks of (all that there are, where it is silent)."""
    method = quantization.get("quant_method")
    if method == "compressed-tensors":
        yield from _strategies(quantization)
    elif method == "fp8" and quantization.get("weight_block_size") is not None:
        yield _pair(quantization["weight_block_size"])
    else:
        known: dict[str, list[Block]] = {"fp8": [MATRIX, ROW], "fbgemm_fp8": [ROW]}
        yield from known.get(str(method), [SQUARE, MATRIX, ROW])


def _strategies(quantization: Mapping[str, Any]) -> Iterator[Block]:
    groups = quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = (group.get("weights") if isinstance(group, dict) else None) or {}
        strategy = weights.get("strategy")
        if strategy in ("tensor", "channel"):
            yield MATRIX if strategy == "tensor" else ROW
        elif strategy == "block":
            yield _pair(weights.get("block_structure"))
        elif strategy == "group":
            yield _pair([1, weights.get("group_size")])


def _pair(said: object) -> Block:
    """[128, 128]; older files of compressed-tensors write "128x128"."""
    numbers = [int(part) if part.isdigit() else 0 for part in said.split("x")] if isinstance(said, str) else said
    if not isinstance(numbers, list) or len(numbers) != 2 or not all(isinstance(n, int) and n > 0 for n in numbers):
        raise CheckpointError(f"quantization_config: blocks of {said!r}; expected two positive integers, as [128, 128]")
    return numbers[0], numbers[1]


def _words(block: Block) -> str:
    if block in (MATRIX, ROW):
        return "matrix" if block == MATRIX else "row"
    return f"block of {block[0]} x {block[1]}"
