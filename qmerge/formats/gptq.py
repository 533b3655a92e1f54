"""GPTQ's layout: 2, 3, 4 or 8 bits in groups, as vLLM, ExLlama, SGLang, gptqmodel and llama.cpp's converter read it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

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
from qmerge.formats.base import NOT_QUANTIZED, FormatInfo, ModuleLayout, Stored, TargetFormat
from qmerge.grids import Grid
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Options, Parts, Rows, TensorInfo, TensorSpec, Weight

BITS, CHECKPOINT_FORMATS = (2, 3, 4, 8), ("gptq", "gptq_v2")
PARTS = ("qweight", "qzeros", "scales", "g_idx")
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""A one in every field of a word: v1 stores zeros less this word, so a field may borrow from the next."""


@dataclass(frozen=True)
class GptqOptions:
    """``checkpoint_format``: ``gptq`` (v1) stores zeros less one, ``gptq_v2`` as they are. ``act_order``: groups are made of
    columns that matter alike, so ``g_idx`` jumps; with ``static_groups`` they stay neighbours."""

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    act_order: bool = False
    static_groups: bool = False
    checkpoint_format: str = "gptq"


class StoredGptq(Stored):
    """Rows of the weight are columns on disk, so the packed codes are held whole."""

    def __init__(self, weight: Weight, options: GptqOptions, reader: Reader, device: torch.device) -> None:
        self._weight, self._reader, self._device, self._bits = weight, reader, device, options.bits
        self._packed: Tensor | None = None
        scale_GO = reader.tensor(weight.parts["scales"]).float()
        if not bool(scale_GO.isfinite().all()):
            raise CheckpointError(f"{weight.module}.scales holds NaN or infinity")
        zero_GO = read_zeros(reader.tensor(weight.parts["qzeros"]), options)[:, : scale_GO.shape[1]]
        group_I = read_groups(weight, options, reader)
        self.grid: AffineGrid = AffineGrid(
            scale_GO.T.contiguous().to(device), zero_GO.T.contiguous().to(device), group_I.to(device), 2**options.bits
        )

    def codes(self, rows: Rows) -> Tensor:
        if self._packed is None:
            self._packed = self._reader.tensor(self._weight.parts["qweight"])
        words_OW = self._packed[:, rows.start : rows.stop].T.contiguous().to(self._device)
        return unpack_bits(words_OW, self._bits)

    def values(self, rows: Rows) -> Tensor:
        return self.grid.rows(rows).decode(self.codes(rows))


def read_zeros(words_GW: Tensor, options: GptqOptions) -> Tensor:
    """float32 [G, O]. Fields of v1 are one too small; where they were packed by whole words, a zero of 0 has borrowed from
    its neighbour, and adding whole words gives it back (gptqmodel 7.6, utils/model.py)."""
    if options.checkpoint_format == "gptq_v2":
        return unpack_bits(words_GW, options.bits).float()
    if options.bits == 3:  # fields straddle words: one by one, as gptqmodel does
        return ((unpack_bits(words_GW, 3) + 1) & 7).float()
    return unpack_bits(words_GW + torch.tensor(ONES[options.bits], dtype=torch.int32), options.bits).float()


def read_groups(weight: Weight, options: GptqOptions, reader: Reader) -> Tensor:
    """int64 [I]: the group of every column."""
    if "g_idx" in weight.parts:
        return reader.tensor(weight.parts["g_idx"]).long()
    return sequential_groups(weight.shape[1], options.group_size)


class Gptq(TargetFormat[GptqOptions]):
    """Parts: ``qweight`` int32 [I·bits/32, O], ``qzeros`` int32 [G, O·bits/32], ``scales`` float16 [G, O], ``g_idx`` int32 [I]."""

    info = FormatInfo(
        name="gptq",
        quant_method="gptq",
        loaders="vLLM, SGLang, transformers, gptqmodel",
        accepted_options=("bits", "group_size", "sym", "act_order", "static_groups", "checkpoint_format"),
        row_axis=1,
        always_written=("g_idx",),
        takes_conv1d=True,
        lists_dense=True,
    )

    def find(
        self, tensors: Mapping[str, TensorInfo], reader: Reader, quantization: Mapping[str, Any] = NOT_QUANTIZED
    ) -> list[Weight]:
        if quantization.get("quant_method", self.info.quant_method) != self.info.quant_method:
            return []
        modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
        return [_weight(module, tensors, reader, quantization) for module in modules]

    def open(self, weight: Weight, reader: Reader, device: torch.device) -> Stored:
        return StoredGptq(weight, self.options_of(weight), reader, device)

    def options(self, asked: Mapping[str, Any], source: Options | None, dtype: str) -> GptqOptions:
        like = source if isinstance(source, GptqOptions) else GptqOptions()
        options = replace(like, **{name: value for name, value in asked.items() if value is not None})
        if "checkpoint_format" not in asked and not isinstance(source, GptqOptions) and not options.sym:
            # gptqmodel takes asymmetric v1 zeros from nobody but itself
            options = replace(options, checkpoint_format="gptq_v2")
        for name, known in (("bits", BITS), ("group_size", GROUP_SIZES), ("checkpoint_format", CHECKPOINT_FORMATS)):
            if name in asked and getattr(options, name) not in known:
                raise RecipeError(f"{name} {getattr(options, name)}: GPTQ has {', '.join(map(str, known))}")
        if options.static_groups and not options.act_order and not isinstance(source, GptqOptions):
            raise RecipeError("static_groups is for act_order: without it, groups are static anyway")
        return options

    def options_for_model(self, asked: Mapping[str, Any], shapes: Sequence[tuple[int, ...]]) -> Mapping[str, Any]:
        """Groups of 128, or of the most that divides the inputs of every weight: few loaders read a short last group."""
        if "group_size" in asked:
            return asked
        return {**asked, "group_size": dividing(shape[1] for shape in shapes)}

    def describe_options(self, options: GptqOptions) -> str:
        groups = "one group" if options.group_size == -1 else f"groups of {options.group_size}"
        order = ", act-order" if options.act_order else ""
        return f"{options.bits} bits, {groups}, {'symmetric' if options.sym else 'asymmetric'}{order}"

    def same_grid(self, one: GptqOptions, other: GptqOptions) -> bool:
        return replace(one, static_groups=False) == replace(other, static_groups=False)

    def check(self, name: str, shape: tuple[int, int], options: GptqOptions) -> None:
        rows, columns = shape
        if options.group_size != -1 and columns % options.group_size:
            raise RecipeError(
                f"{name} has {columns} inputs, no multiple of the group size {options.group_size}: use --group-size "
                f"{dividing([columns])}"
            )
        if rows % WORD or columns % WORD:
            raise RecipeError(
                f"{name} is {rows} x {columns}: GPTQ's loaders need multiples of {WORD} both ways; use --target nf4 or int8"
            )

    def outputs(self, local: str, shape: tuple[int, ...], options: GptqOptions) -> dict[str, TensorSpec]:
        rows, columns = shape
        groups = 1 if options.group_size == -1 else -(-columns // options.group_size)
        return {
            "qweight": TensorSpec("I32", (columns * options.bits // WORD, rows)),
            "qzeros": TensorSpec("I32", (groups, rows * options.bits // WORD)),
            "scales": TensorSpec("F16", (groups, rows)),
            "g_idx": TensorSpec("I32", (columns,)),
        }

    def codes_part(self, local: str) -> str:
        return "qweight"

    def scales(self, values_OI: Tensor, options: GptqOptions, inputs_I: Tensor | None = None) -> Tensor:
        """float32 [rows, G, 2]: scale and zero."""
        group_I = fresh_groups(values_OI.shape[1], options, inputs_I).to(values_OI.device)
        found = fit_scales(values_OI, group_I, options.bits, options.sym, torch.float16, inputs_I, least_zero=1)
        return torch.stack(found, dim=2)

    def grid(
        self, scales: Tensor, shape: tuple[int, int], options: GptqOptions, inputs_I: Tensor | None = None
    ) -> Grid:  # fmt: skip
        group_I = fresh_groups(shape[1], options, inputs_I).to(scales.device)
        return AffineGrid(scales[..., 0].contiguous(), scales[..., 1].contiguous(), group_I, 2**options.bits)

    def pack(self, codes_OI: Tensor, options: GptqOptions) -> Tensor:
        return pack_bits(codes_OI, options.bits).T

    def scale_tensors(self, grid: Grid, local: str, shape: tuple[int, ...], options: GptqOptions) -> Parts:
        """Zeros are 1 or more, so that nothing borrows: readers of v1 by words and by fields agree."""
        assert isinstance(grid, AffineGrid)
        less = 1 if options.checkpoint_format == "gptq" else 0
        stored_GO = grid.zero_OG.T.to(torch.uint8) - less
        return {
            "qzeros": pack_bits(stored_GO, options.bits).cpu(),
            "scales": grid.scale_OG.T.half().contiguous().cpu(),
            "g_idx": grid.group_I.int().cpu(),
        }

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

    def target_warnings(self, options: GptqOptions, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
        if options.sym and options.bits in (4, 8):
            return []
        kind = f"{options.bits} bits{'' if options.sym else ', asymmetric'}"
        return [f"GPTQ with {kind}: transformers and gptqmodel read it; vLLM reads 4 and 8 bits, symmetric"]

    def base_warnings(self, weights: Sequence[Weight], quantization: Mapping[str, Any]) -> list[str]:
        label = quantization.get("checkpoint_format", quantization.get("format", "gptq"))
        found = Counter(
            weight.options.checkpoint_format for weight in weights if isinstance(weight.options, GptqOptions)
        )
        if set(found) <= {label}:
            return []
        (kind, count), *_ = found.most_common()
        line = (
            f"the base is labelled {label!r}, but the zeros of {count} weights are those of {kind!r}, and are read so. "
            f"Loaders that believe the label shift every weight by one step"
        )
        return [line]


FORMAT = Gptq()


def fresh_groups(columns: int, options: GptqOptions, inputs_I: Tensor | None) -> Tensor:
    """int64 [I]. With ``act_order``, the inputs with the largest mean squares share the first group, and so on."""
    group_I = sequential_groups(columns, options.group_size)
    if not options.act_order or options.static_groups or inputs_I is None:
        return group_I
    order = inputs_I.cpu().argsort(descending=True, stable=True)
    return torch.empty_like(group_I).index_copy_(0, order, group_I)


def exceptions(layout: ModuleLayout) -> dict[str, Any]:
    """How a config says that some layers are dense, or stored otherwise: ``modules_in_block_to_quantize`` for optimum (it
    compares the ends of names, and knows one kind of layer), ``dynamic`` for gptqmodel, vLLM and SGLang (regular
    expressions; ``-:`` leaves out, ``+:`` changes)."""
    config: dict[str, Any] = {}
    rules: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in layout.dense}
    for name, options in layout.others:
        assert isinstance(options, GptqOptions)
        said = {
            "bits": options.bits,
            "group_size": options.group_size,
            "sym": options.sym,
            "desc_act": options.act_order,
        }
        rules[f"+:^{re.escape(name)}$"] = said
    if layout.dense:
        tails = {tail(name) for name in layout.quantized} - {tail(name) for name in layout.dense}
        rest = [name for name in layout.quantized if tail(name) not in tails]
        config["modules_in_block_to_quantize"] = [sorted(tails) + rest]
    return {**config, "dynamic": rules} if rules else config


def tail(module: str) -> str:
    """``self_attn.q_proj``: the name inside its decoder layer."""
    return re.sub(r"^.*\.\d+\.", "", module)


def _weight(module: str, tensors: Mapping[str, TensorInfo], reader: Reader, quantization: Mapping[str, Any]) -> Weight:
    parts = {local: tensors[f"{module}.{local}"] for local in PARTS if f"{module}.{local}" in tensors}
    missing = [local for local in PARTS[:3] if local not in parts]
    if missing:
        raise CheckpointError(f"{module} is stored as GPTQ, but {module}.{missing[0]} is missing")
    for local, dtypes in zip(PARTS, (("I32",), ("I32",), ("F16", "BF16", "F32"), ("I32", "I64")), strict=True):
        if local in parts and parts[local].dtype not in dtypes:
            raise CheckpointError(f"{module}.{local} is {parts[local].dtype}, expected {' or '.join(dtypes)}")
    bits = _bits(module, parts, quantization)
    rows, columns, groups = parts["scales"].shape[1], parts["qweight"].shape[0] * WORD // bits, parts["scales"].shape[0]
    group_I = _groups(module, parts, columns, groups, reader, quantization)
    size = _group_size(columns, groups, quantization)
    jumps = not torch.equal(group_I, sequential_groups(columns, size))
    options = GptqOptions(
        bits, size, bool(quantization.get("sym", True)), jumps,
        checkpoint_format=str(quantization.get("checkpoint_format", quantization.get("format", "gptq"))),
    )  # fmt: skip
    if options.sym:
        options = replace(options, checkpoint_format=_convention(module, parts["qzeros"], rows, bits, reader))
    return Weight(module, "weight", "gptq", (rows, columns), parts, options)


def _bits(module: str, parts: Mapping[str, TensorInfo], quantization: Mapping[str, Any]) -> int:
    """From the shapes; the config must say the same (unless it has rules for single modules)."""
    qweight, qzeros, scales = (parts[local].shape for local in PARTS[:3])
    if not (len(qweight) == len(qzeros) == len(scales) == 2) or qweight[1] != scales[1] or qzeros[0] != scales[0]:
        raise CheckpointError(
            f"{module}: qweight {list(qweight)}, qzeros {list(qzeros)} and scales {list(scales)} do not belong to one GPTQ "
            f"weight: expected [I*bits/32, O], [G, O*bits/32] and [G, O]"
        )
    bits = qzeros[1] * WORD / max(1, scales[1])
    said = quantization.get("bits")
    if bits not in BITS or (said not in (None, bits) and not quantization.get("dynamic")):
        raise CheckpointError(
            f"{module}: qzeros {list(qzeros)} for {scales[1]} outputs are {bits:.3g} bits, but the config says {said}; "
            f"GPTQ has {', '.join(map(str, BITS))}. Take the config.json that belongs to these files"
        )
    return int(bits)


def _groups(
    module: str, parts: Mapping[str, TensorInfo], columns: int, groups: int, reader: Reader, quantization: Mapping[str, Any]
) -> Tensor:  # fmt: skip
    said = quantization.get("group_size")
    expected = groups if said is None else 1 if said == -1 else -(-columns // said)
    if expected != groups and not quantization.get("dynamic"):
        raise CheckpointError(
            f"{module}: the config says groups of {said}, which makes {expected} for {columns} inputs, but there are {groups}. "
            f"Take the config.json that belongs to these files"
        )
    if "g_idx" not in parts:
        return sequential_groups(columns, columns if groups == 1 else -(-columns // groups))
    if parts["g_idx"].shape != (columns,):
        raise CheckpointError(
            f"{module}.g_idx has shape {list(parts['g_idx'].shape)}, expected [{columns}], one for every input"
        )
    group_I = reader.tensor(parts["g_idx"]).long()
    if int(group_I.min()) < 0 or int(group_I.max()) >= groups:
        raise CheckpointError(
            f"{module}.g_idx holds {int(group_I.min())} to {int(group_I.max())}, but there are {groups} groups: expected 0 to "
            f"{groups - 1}"
        )
    return group_I


def _group_size(columns: int, groups: int, quantization: Mapping[str, Any]) -> int:
    said = quantization.get("group_size")
    if said is not None and not quantization.get("dynamic"):
        return int(said)
    return -1 if groups == 1 else -(-columns // groups)


def _convention(module: str, qzeros: TensorInfo, rows: int, bits: int, reader: Reader) -> str:
    """v1 or v2, from the zeros: symmetric ones are all the middle code, or all one less. Labels are often wrong
    (transformers' save_pretrained turns v1 zeros into v2 zeros and keeps the label)."""
    first_O = unpack_bits(reader.elements(qzeros, 0, qzeros.shape[1])[None], bits)[0, :rows]
    low, high, middle = int(first_O.min()), int(first_O.max()), 2 ** (bits - 1)
    if low == high and low in (middle - 1, middle):
        return "gptq" if low == middle - 1 else "gptq_v2"
    raise CheckpointError(
        f"{module}: the config says sym, but its zeros are stored as {low} to {high}; symmetric ones are all {middle - 1} "
        f'(gptq) or all {middle} (gptq_v2). If it is asymmetric, set "sym": false in quantization_config'
    )
