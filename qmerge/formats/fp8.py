"""FP8 (E4M3) with a scale per block, row or matrix; written in blocks of 128 x 128, as DeepSeek and Qwen ship it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qmerge.errors import CheckpointError, RecipeError
from qmerge.formats._fp8_blocks import SQUARE, Block, block_of, blocks_of, describe_block, sizes_of
from qmerge.formats._scaled_float import FLOAT8, LARGEST, ScaledFloatGrid
from qmerge.formats._tensors import check_dtype, parts_of, read_rows
from qmerge.formats.base import NOT_QUANTIZED, FormatInfo, ModuleLayout, Stored, TargetFormat
from qmerge.grids import Grid
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Options, Parts, Rows, TensorInfo, TensorSpec, Weight

# Names of the scale: DeepSeek's, which is multiplied by although it is called inverse, and everybody else's.
SCALES = ("weight_scale_inv", "weight_scale")

SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
# Powers of two, stored as their exponents. Some files call them U8.
EXPONENT_DTYPES = ("F8_E8M0", "U8")

# Scales of the layer's inputs: they are copied with the weight.
INPUT_SCALES = ("activation_scale", "input_scale", "input_scale_ub")


@dataclass(frozen=True, kw_only=True)
class Fp8Options:
    """How a weight is stored. The defaults are those of fresh weights; anything else is kept as the base has it."""

    block: Block = SQUARE
    """Rows and columns that share a scale."""

    scale: str = "weight_scale_inv"
    """Local name of the scale."""

    scale_dtype: str = "F32"

    power_of_two: bool = False
    """Whether scales are powers of two (``scale_fmt`` ue8m0), in whatever dtype."""

    input_scales: tuple[str, ...] = ()
    """Local names of the scales of the inputs."""


class StoredFp8(Stored):
    """Codes on disk are those of the grid."""

    def __init__(self, weight: Weight, options: Fp8Options, reader: Reader, device: torch.device) -> None:
        self._info = weight.parts["weight"]
        self._reader = reader
        self._device = device
        rows, columns = weight.shape
        shape = (rows, columns)
        scale_RC = read_scales(weight.parts[options.scale], reader).view(blocks_of(shape, options.block))
        if not bool((scale_RC.isfinite() & (scale_RC >= 0)).all()):
            raise CheckpointError(
                f"{weight.module}.{options.scale} holds NaN, infinity or negative numbers, so it is damaged. Download the model "
                f"again"
            )
        self.grid: ScaledFloatGrid = ScaledFloatGrid(scale_RC.to(device), shape, sizes_of(options.block, shape))

    def codes(self, rows: Rows) -> Tensor:
        return read_rows(self._info, rows, self._reader).view(torch.uint8).to(self._device)


class Fp8(TargetFormat[Fp8Options]):
    """Tensors: ``weight`` float8 [O, I], ``weight_scale_inv`` float32 [⌈O/128⌉, ⌈I/128⌉]. value = code · scale.

    Bases may also have ``weight_scale``, other blocks, and scales of the inputs.
    """

    info = FormatInfo(
        name="fp8",
        quant_method="fp8",
        other_read_methods=("fbgemm_fp8", "compressed-tensors"),
        loaders="vLLM, SGLang, transformers (without a GPU it dequantizes)",
        quantizes_activations=True,
        takes_single_experts=True,
    )

    def find(
        self, tensors: Mapping[str, TensorInfo], reader: Reader, quantization: Mapping[str, Any] = NOT_QUANTIZED
    ) -> list[Weight]:
        if quantization.get("quant_method", self.info.quant_method) not in self.info.read_methods:
            return []
        weights = []
        for name, info in tensors.items():
            module = name.removesuffix(".weight")
            if module == name or not info.dtype.startswith("F8"):
                continue
            # Without a scale it is an unscaled float8 tensor, unless the config says otherwise.
            has_scale = any(f"{module}.{scale}" in tensors for scale in SCALES)
            if has_scale or quantization:
                weights.append(_weight(module, tensors, quantization))
        return weights

    def open(self, weight: Weight, reader: Reader, device: torch.device) -> Stored:
        return StoredFp8(weight, self.options_of(weight), reader, device)

    # --- options ---

    def options(self, asked: Mapping[str, Any], source: Options | None, dtype: str) -> Fp8Options:
        return source if isinstance(source, Fp8Options) else Fp8Options()

    def describe_options(self, options: Fp8Options) -> str:
        return f"a scale for every {describe_block(options.block)}"

    def check(self, name: str, shape: tuple[int, int], options: Fp8Options) -> None:
        if options != Fp8Options():
            raise RecipeError(
                f"{name}: fresh FP8 scales are float32, for blocks of 128 x 128, without scales of the inputs; this base has "
                f"others, which can be kept: use --scales keep"
            )

    # --- tensors ---

    def row_step(self, shape: tuple[int, int], options: Fp8Options) -> int:
        return options.block[0] or 1

    def outputs(self, local: str, shape: tuple[int, ...], options: Fp8Options) -> dict[str, TensorSpec]:
        return {
            "weight": TensorSpec("F8_E4M3", shape),
            "weight_scale_inv": TensorSpec("F32", blocks_of((shape[0], shape[1]), SQUARE)),
        }

    def scales(self, values_OI: Tensor, options: Fp8Options, inputs_I: Tensor | None = None) -> Tensor:
        """float32 [R, C]: the factors of values before rounding; their reciprocals are stored.

        Both are computed as in transformers, so that nearest rounding gives its bytes. A search over other scales gains 1 % of
        the error (2 % with heavy tails): the steps of floats grow with the numbers, wherever the scale puts them.
        """
        rows, columns = values_OI.shape
        height, width = SQUARE
        R, C = blocks_of((rows, columns), SQUARE)
        padded_OI = torch.nn.functional.pad(values_OI, (0, C * width - columns, 0, R * height - rows))
        inverse_RC = LARGEST / padded_OI.view(R, height, C, width).abs().amax(dim=(1, 3))
        return torch.where(inverse_RC.isfinite(), inverse_RC, 1.0)  # infinite in a block of zeros

    def grid(
        self, scales: Tensor, shape: tuple[int, int], options: Fp8Options, inputs_I: Tensor | None = None
    ) -> Grid:  # fmt: skip
        return ScaledFloatGrid(1.0 / scales, shape, SQUARE, inverse_RC=scales)

    def pack(self, codes_OI: Tensor, grid: Grid, options: Fp8Options) -> Tensor:
        return codes_OI.view(FLOAT8)

    def scale_tensors(self, grid: Grid, local: str, shape: tuple[int, ...], options: Fp8Options) -> Parts:
        assert isinstance(grid, ScaledFloatGrid)
        return {"weight_scale_inv": grid.scale_RC.cpu()}

    # --- files, warnings ---

    def quantization_config(
        self, options: Fp8Options, base: Mapping[str, Any], compute_dtype: str, layout: ModuleLayout
    ) -> dict[str, Any] | None:
        """The base's own config if it has one: the target then keeps the base's layout, whichever it is."""
        config: dict[str, Any] = dict(base) or {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(SQUARE),
            "modules_to_not_convert": None,
        }
        dense = (*layout.dense, *layout.experts)
        if dense:
            key = _key_of_dense_modules(config)
            listed = layout.skipped if config.get(key) is None else config[key]
            config[key] = [*listed, *(module for module in dense if module not in listed)]
        return config

    def target_warnings(self, options: Fp8Options, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
        with_short_blocks = [name for name, shape in shapes.items() if shape[0] % 128 or shape[1] % 128]
        is_fresh_layout = options.block == SQUARE and options.scale == "weight_scale_inv"
        if not is_fresh_layout or not with_short_blocks:
            return []
        first = with_short_blocks[0]
        rows, columns = shapes[first]
        warning = (
            f"FP8: {len(with_short_blocks)} weights are not made of whole blocks of 128 x 128, the first is {first} ({rows} x "
            f"{columns}). transformers reads them wrongly where it dequantizes (without a GPU), and vLLM cannot split them over "
            f"GPUs: use --target int8 or w8a16 for these loaders"
        )
        return [warning]


FORMAT = Fp8()


def _key_of_dense_modules(config: Mapping[str, Any]) -> str:
    """The key under which a config lists the modules that stay dense: compressed-tensors', vLLM's or transformers'."""
    for key in ("ignore", "ignored_layers"):
        if key in config:
            return key
    return "modules_to_not_convert"


def read_scales(info: TensorInfo, reader: Reader) -> Tensor:
    """float32, in the tensor's own shape. E8M0 is an exponent: 2^(byte − 127), and 255 is NaN."""
    if info.dtype not in EXPONENT_DTYPES:
        return reader.tensor(info).float()
    exponents = torch.frombuffer(reader.bytes(info, 0, info.nbytes), dtype=torch.uint8)
    return exponents.view(torch.float8_e8m0fnu).float().view(info.shape)


def _weight(module: str, tensors: Mapping[str, TensorInfo], quantization: Mapping[str, Any]) -> Weight:
    parts = parts_of(module, ("weight", *SCALES, *INPUT_SCALES), tensors)
    codes = parts["weight"]
    names = [name for name in SCALES if name in parts]
    if not names:
        raise CheckpointError(
            f"{module}.weight is stored as {codes.dtype}, but its scale is missing: expected {module}.{SCALES[0]} or "
            f"{module}.{SCALES[1]}. Download the model again"
        )
    if codes.dtype != "F8_E4M3" or len(codes.shape) != 2:
        raise CheckpointError(
            f"{module}.weight is {codes.dtype} {list(codes.shape)}, but qmerge reads FP8 weights only as F8_E4M3 [O, I]. Choose "
            f"another variant of the model"
        )
    scale = names[0]
    for unused in names[1:]:
        del parts[unused]
    check_dtype(parts[scale], SCALE_DTYPES)
    options = Fp8Options(
        block=block_of(parts[scale], (codes.shape[0], codes.shape[1]), quantization),
        scale=scale,
        scale_dtype=parts[scale].dtype,
        power_of_two=quantization.get("scale_fmt") == "ue8m0" or parts[scale].dtype in EXPONENT_DTYPES,
        input_scales=tuple(name for name in INPUT_SCALES if name in parts),
    )
    return Weight(module=module, local="weight", format="fp8", shape=codes.shape, parts=parts, options=options)
