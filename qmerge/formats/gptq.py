"""GPTQ's layout: 2, 3, 4 or 8 bits in groups, as vLLM, ExLlama, SGLang, gptqmodel and llama.cpp's converter read it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from qmerge.errors import RecipeError
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
from qmerge.formats._gptq_find import BITS, GptqOptions, declared_checkpoint_format, find_gptq
from qmerge.formats._packing import SMALL, WORD, pack_bits, unpack_bits
from qmerge.formats._tensors import check_finite, experts_warnings, modules_with
from qmerge.formats.base import NOT_QUANTIZED, FormatInfo, ModuleLayout, Stored, TargetFormat, with_asked
from qmerge.grids import Grid
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Options, Parts, Rows, TensorInfo, TensorSpec, Weight

CHECKPOINT_FORMATS = ("gptq", "gptq_v2")

# A one in every field of a word: v1 stores zeros less this word, so a field may borrow from the next.
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


class StoredGptq(Stored):
    """Rows of the weight are columns on disk, so the packed codes stay in memory as a whole."""

    def __init__(self, weight: Weight, options: GptqOptions, reader: Reader, device: torch.device) -> None:
        self._weight = weight
        self._reader = reader
        self._device = device
        self._bits = options.bits
        self._words_WO: Tensor | None = None
        scale_GO = reader.tensor(weight.parts["scales"]).float()
        check_finite(scale_GO, f"{weight.module}.scales")
        zero_GO = read_zeros(reader.tensor(weight.parts["qzeros"]), options)[:, : scale_GO.shape[1]]
        self.grid: AffineGrid = AffineGrid(
            scale_GO.T.contiguous().to(device),
            zero_GO.T.contiguous().to(device),
            read_groups(weight, options, reader).to(device),
            levels_count=2**options.bits,
        )

    def codes(self, rows: Rows) -> Tensor:
        if self._words_WO is None:
            self._words_WO = self._reader.tensor(self._weight.parts["qweight"])
        words_OW = self._words_WO[:, rows.start : rows.stop].T.contiguous().to(self._device)
        return unpack_bits(words_OW, self._bits)


def read_zeros(words_GW: Tensor, options: GptqOptions) -> Tensor:
    """float32 [G, O], or a few more columns where the last word is not full."""
    if options.checkpoint_format == "gptq_v2":
        return unpack_bits(words_GW, options.bits).float()
    # Fields of v1 are one too small.
    if options.bits == 3:  # fields span words: one by one, as gptqmodel does
        return ((unpack_bits(words_GW, 3) + 1) & 7).float()
    # Where they were packed by whole words, a zero of 0 has borrowed from its neighbour, and adding whole words gives it back
    # (gptqmodel 7.6, utils/model.py).
    ones = torch.tensor(ONES[options.bits], dtype=torch.int32)
    return unpack_bits(words_GW + ones, options.bits).float()


def read_groups(weight: Weight, options: GptqOptions, reader: Reader) -> Tensor:
    """int64 [I]: the group of every column."""
    if "g_idx" in weight.parts:
        return reader.tensor(weight.parts["g_idx"]).long()
    return sequential_groups(weight.shape[1], options.group_size)


class Gptq(TargetFormat[GptqOptions]):
    """Tensors: ``qweight`` int32 [I·bits/32, O], ``qzeros`` int32 [G, O·bits/32], ``scales`` float16 [G, O], ``g_idx`` int32
    [I]."""

    info = FormatInfo(
        name="gptq",
        quant_method="gptq",
        loaders="vLLM, SGLang, transformers, gptqmodel",
        accepted_options=("bits", "group_size", "sym", "act_order", "static_groups", "checkpoint_format"),
        row_axis=1,
        always_written=("g_idx",),
        takes_conv1d=True,
        takes_single_experts=True,
        lists_dense=True,
    )

    def find(
        self, tensors: Mapping[str, TensorInfo], reader: Reader, quantization: Mapping[str, Any] = NOT_QUANTIZED
    ) -> list[Weight]:
        if quantization.get("quant_method", self.info.quant_method) != self.info.quant_method:
            return []
        return [find_gptq(module, tensors, reader, quantization) for module in modules_with("qweight", tensors)]

    def open(self, weight: Weight, reader: Reader, device: torch.device) -> Stored:
        return StoredGptq(weight, self.options_of(weight), reader, device)

    # --- options ---

    def options(self, asked: Mapping[str, Any], source: Options | None, dtype: str) -> GptqOptions:
        default = source if isinstance(source, GptqOptions) else GptqOptions()
        options = with_asked(default, asked)
        if options.bits not in BITS and "bits" in asked:
            raise RecipeError(f"--bits {options.bits}: gptq supports {', '.join(map(str, BITS))}")
        if options.group_size not in GROUP_SIZES and "group_size" in asked:
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise RecipeError(f"--group-size {options.group_size}: gptq supports {sizes} (-1: one group)")
        if options.checkpoint_format not in CHECKPOINT_FORMATS and "checkpoint_format" in asked:
            raise RecipeError(
                f"--checkpoint-format {options.checkpoint_format}: gptq supports {', '.join(CHECKPOINT_FORMATS)}"
            )
        if default is source:
            return options  # written as the base is
        if options.static_groups and not options.act_order:
            raise RecipeError("--static-groups needs --act-order: without it groups are static anyway")
        if not options.sym and "checkpoint_format" not in asked:
            # gptqmodel reads asymmetric v1 zeros only if it has written them itself.
            options = replace(options, checkpoint_format="gptq_v2")
        return options

    def options_for_model(self, asked: Mapping[str, Any], shapes: Sequence[tuple[int, ...]]) -> Mapping[str, Any]:
        """Groups of 128, or as large as divides the inputs of every weight: few loaders read a short last group."""
        if "group_size" in asked:
            return asked
        return {**asked, "group_size": largest_group_size(shape[1] for shape in shapes)}

    def describe_options(self, options: GptqOptions) -> str:
        groups = "one group" if options.group_size == WHOLE_ROW else f"groups of {options.group_size}"
        symmetry = "symmetric" if options.sym else "asymmetric"
        text = f"{options.bits} bits, {groups}, {symmetry}"
        return f"{text}, act-order" if options.act_order else text

    def uses_input_order(self, options: GptqOptions) -> bool:
        return options.act_order

    def same_grid(self, one: GptqOptions, other: GptqOptions) -> bool:
        # Static groups say how groups were made, not which ones.
        return replace(one, static_groups=False) == replace(other, static_groups=False)

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Layers of a few rows (gates, one row per head) stay dense where they fit into no words; larger ones are an error."""
        return len(shape) == 2 and (min(shape) >= SMALL or not any(size % WORD for size in shape))

    def check(self, name: str, shape: tuple[int, int], options: GptqOptions) -> None:
        rows, columns = shape
        check_group_size(name, columns, options.group_size)
        if rows % WORD or columns % WORD:
            raise RecipeError(
                f"{name} is {rows} x {columns}: GPTQ's loaders need multiples of {WORD} both ways; use --target nf4 or int8"
            )

    # --- tensors ---

    def outputs(self, local: str, shape: tuple[int, ...], options: GptqOptions) -> dict[str, TensorSpec]:
        rows, columns = shape
        groups = group_count(columns, options.group_size)
        return {
            "qweight": TensorSpec("I32", (columns * options.bits // WORD, rows)),
            "qzeros": TensorSpec("I32", (groups, rows * options.bits // WORD)),
            "scales": TensorSpec("F16", (groups, rows)),
            "g_idx": TensorSpec("I32", (columns,)),
        }

    def codes_part(self, local: str) -> str:
        return "qweight"

    def scales(self, values_OI: Tensor, options: GptqOptions, inputs_I: Tensor | None = None) -> Tensor:
        """float32 [rows, G, 2]: scale and zero.

        Zeros are 1 or more, so that none borrows when v1 takes one off: readers by words and by fields then agree.
        """
        group_I = fresh_groups(values_OI.shape[1], options, inputs_I).to(values_OI.device)
        return fit_scales(
            values_OI,
            group_I,
            bits=options.bits,
            sym=options.sym,
            dtype=torch.float16,
            inputs_I=inputs_I,
            least_zero=1,
        )

    def grid(
        self, scales: Tensor, shape: tuple[int, int], options: GptqOptions, inputs_I: Tensor | None = None
    ) -> Grid:  # fmt: skip
        return fitted_grid(scales, fresh_groups(shape[1], options, inputs_I), options.bits)

    def pack(self, codes_OI: Tensor, grid: Grid, options: GptqOptions) -> Tensor:
        return pack_bits(codes_OI, options.bits).T

    def scale_tensors(self, grid: Grid, local: str, shape: tuple[int, ...], options: GptqOptions) -> Parts:
        assert isinstance(grid, AffineGrid)
        zero_GO = grid.zero_OG.T.to(torch.uint8)
        if options.checkpoint_format == "gptq":
            zero_GO = zero_GO - 1
        return {
            "qzeros": pack_bits(zero_GO, options.bits).cpu(),
            "scales": grid.scale_OG.T.half().contiguous().cpu(),
            "g_idx": grid.group_I.int().cpu(),
        }

    # --- files ---

    def quantization_config(
        self, options: GptqOptions, base: Mapping[str, Any], compute_dtype: str, layout: ModuleLayout
    ) -> dict[str, Any] | None:
        return {
            "bits": options.bits,
            "group_size": options.group_size,
            "sym": options.sym,
            "desc_act": options.act_order and not options.static_groups,
            "static_groups": options.static_groups,
            "true_sequential": bool(base.get("true_sequential", True)),
            "lm_head": "lm_head" in layout.quantized,
            "quant_method": "gptq",
            "checkpoint_format": options.checkpoint_format,
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"qmerge:{version('qmerge')}"]},
            **exceptions(layout),
        }

    def side_files(self, quantization: Mapping[str, Any]) -> dict[str, Any]:
        return {"quantize_config.json": dict(quantization)}

    # --- warnings ---

    def target_warnings(self, options: GptqOptions, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
        warnings = experts_warnings("GPTQ", shapes)
        if options.sym and options.bits in (4, 8):
            return warnings
        symmetry = "" if options.sym else ", asymmetric"
        warning = (
            f"GPTQ with {options.bits} bits{symmetry}: transformers and gptqmodel read it; vLLM reads only symmetric 4 and 8 "
            f"bits. For vLLM use --bits 4 --sym"
        )
        return [warning, *warnings]

    def base_warnings(self, weights: Sequence[Weight], quantization: Mapping[str, Any]) -> list[str]:
        declared = declared_checkpoint_format(quantization)
        found = Counter(self.options_of(weight).checkpoint_format for weight in weights)
        if set(found) <= {declared}:
            return []
        most_common, count = found.most_common(1)[0]
        warning = (
            f"the base is labelled {declared!r}, but the zeros of {count} weights are those of {most_common!r}; qmerge reads "
            f"them as such. Loaders that trust the label shift every weight by one step: correct checkpoint_format in "
            f"quantization_config"
        )
        return [warning]


FORMAT = Gptq()


def fresh_groups(columns: int, options: GptqOptions, inputs_I: Tensor | None) -> Tensor:
    """int64 [I]: the group of every column of a fresh grid.

    With ``act_order`` the inputs with the largest mean squares share the first group, and so on.
    """
    group_I = sequential_groups(columns, options.group_size)
    if not options.act_order or options.static_groups or inputs_I is None:
        return group_I
    order = inputs_I.cpu().argsort(descending=True, stable=True)
    return torch.empty_like(group_I).index_copy_(0, order, group_I)


def exceptions(layout: ModuleLayout) -> dict[str, Any]:
    """Entries of a config for layers that are dense, or stored with other options.

    ``modules_in_block_to_quantize`` is for optimum, which compares the ends of names and knows one kind of decoder layer.
    ``dynamic`` is for gptqmodel, vLLM and SGLang: regular expressions, of which ``-:`` leaves out and ``+:`` changes.
    """
    config: dict[str, Any] = {}
    if layout.dense:
        dense_tails = {tail(name) for name in layout.dense}
        tails = {tail(name) for name in layout.quantized} - dense_tails
        # Layers whose tail is dense elsewhere can only be named in full.
        others = [name for name in layout.quantized if tail(name) not in tails]
        config["modules_in_block_to_quantize"] = [sorted(tails) + others]
    rules: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in layout.dense}
    for name, options in layout.others:
        assert isinstance(options, GptqOptions)
        rules[f"+:^{re.escape(name)}$"] = {
            "bits": options.bits,
            "group_size": options.group_size,
            "sym": options.sym,
            "desc_act": options.act_order,
        }
    if rules:
        config["dynamic"] = rules
    return config


def tail(module: str) -> str:
    """The name of a module in its decoder layer: ``self_attn.q_proj``."""
    return re.sub(r"^.*\.\d+\.", "", module)
