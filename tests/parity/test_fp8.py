"""FP8 against transformers and compressed-tensors: every kind read bit for bit, written byte for byte as transformers does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qmerge.checkpoint.scan import scan
from qmerge.errors import CheckpointError, NumbersError, RecipeError
from qmerge.formats._fp8_blocks import ROW
from qmerge.formats._scaled_float import ScaledFloatGrid
from qmerge.formats.base import ModuleLayout
from qmerge.formats.fp8 import FORMAT, Fp8Options, read_scales
from qmerge.grids import DOWN, UP
from qmerge.safetensors_io.header import read_header
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Rows, TensorInfo

from .. import models
from ..conftest import Cli, snapshot
from . import bases, stock
from .bases import compressed, fp8
from .reading import read

KINDS = [kind for kind in bases.KINDS if "fp8" in kind and not kind.startswith("torchao")]
LOADABLE = [kind for kind in KINDS if kind in bases.LOADABLE]
FIRST = "model.layers.0.self_attn.q_proj"
FEW = ("q_proj", "down_proj")
BOUND = 4 * 15 * 2**-24 * 384**0.5
"""Logits of one model computed twice in float32: 15 matrices deep, sums of 384 that may come in another order."""

Made = Callable[[str], Path]
Damage = Callable[[dict[str, Tensor], dict[str, Any]], object]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """As the stock libraries write it."""
    folder = tmp_path_factory.mktemp("fp8")

    @cache
    def make(kind: str) -> Path:
        pytest.importorskip(bases.needs(kind))
        return bases.make(kind, folder / kind)

    return make


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """``dense("odd")``: blocks of 128 end in the middle."""
    folder = tmp_path_factory.mktemp("dense")
    return cache(lambda sizes: models.save(models.llama(**sizes_of(sizes)), folder / sizes))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """On some of the layers, so that others are only converted, or copied."""
    folder = tmp_path_factory.mktemp("adapters")

    @cache
    def make(sizes: str) -> Path:
        model = models.llama(torch.float32, **sizes_of(sizes))
        return models.adapter(model, folder / sizes, target_modules=list(FEW))

    return make


@pytest.fixture(scope="module")
def written(dense: Made, adapter: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """As qmerge writes it from a dense base."""
    folder = tmp_path_factory.mktemp("written")
    return cache(lambda sizes: stock.merged(folder / sizes, dense(sizes), adapter(sizes), "fp8"))


def sizes_of(name: str) -> dict[str, Any]:
    return bases.ODD if name.endswith("odd") else bases.LLAMA


def size_name(kind: str) -> str:
    return "odd" if kind.endswith("odd") else "even"


def goal_of(folder: Path, adapter: Path, sizes: dict[str, int]) -> dict[str, Tensor]:
    """float32: every value of a quantized base as its library reads it, plus peft's delta."""
    values = bases.values(folder)
    for name, delta in stock.deltas(models.llama(torch.float32, **sizes), adapter).items():
        values[name] = values[name] + delta
    return values


def refused(
    source: Path, damage: Damage, words: tuple[str, ...], adapter: Path, tmp_path: Path, cli: Cli, target: str = "bf16"
) -> None:  # fmt: skip
    """A damaged copy of a base is an error with these words, and nothing is written."""
    folder = shutil.copytree(source, tmp_path / "base")
    tensors, metadata = bases.read_tensors(folder)
    config = json.loads((folder / "config.json").read_text())
    damage(tensors, config["quantization_config"])
    save_file({name: part.contiguous() for name, part in tensors.items()}, folder / "model.safetensors", metadata)
    (folder / "config.json").write_text(json.dumps(config))
    before = snapshot(tmp_path)
    ran = cli("--base", folder, "--adapter", adapter, "--target", target, "--out", tmp_path / "out")
    assert isinstance(ran.error, CheckpointError) and ran.code == 3, ran.err
    assert all(word in ran.err for word in words), ran.err
    assert snapshot(tmp_path) == before


# --- the grid --------------------------------------------------------------------------------------------------------


def every_level() -> Tensor:
    """float32, ascending: all finite numbers of E4M3, by torch's own cast; the two zeros are one."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return torch.tensor(sorted(set(every[every.isfinite()].tolist())))


def small_grid() -> ScaledFloatGrid:
    """Three blocks of rows, two of columns, the last ones short, one of zeros."""
    scale_RC = torch.tensor([[0.5, 0.003], [0.0, 1.0], [7.0, 0.1]])
    return ScaledFloatGrid(scale_RC, (10, 7), (4, 4))


def test_nearest_is_the_nearest_of_all_levels() -> None:
    levels = every_level()
    middles = (levels[1:] + levels[:-1]) / 2
    values = torch.cat([levels, middles, middles * 1.0001, middles * 0.9999, torch.tensor([1e9, -1e9, 449.0, 1e-9])])
    grid = ScaledFloatGrid(torch.tensor([[0.25]]), (1, len(values)), (1, len(values)))
    codes = grid.nearest(0.25 * values[None])
    error = (grid.decode(codes)[0] / 0.25 - values).abs()
    assert torch.equal(error, (values[:, None] - levels).abs().amin(dim=1))
    ties = codes[0, len(levels) : len(levels) + len(middles)]
    assert bool((ties % 2 == 0).all()), "halfway goes to the even code"


def test_values_beyond_the_ends_are_clipped() -> None:
    """Some versions of torch cast them to NaN, others to 448."""
    beyond = torch.tensor([[500.0, -1e30, torch.inf]])
    grid = ScaledFloatGrid(torch.ones(1, 1), (1, 3), (1, 3))
    assert grid.decode(grid.nearest(beyond)).tolist() == [[448.0, -448.0, 448.0]]


@pytest.mark.parametrize("direction", [UP, DOWN])
def test_step_walks_every_level(direction: int) -> None:
    every = torch.arange(256, dtype=torch.uint8)
    every = every[every.view(torch.float8_e4m3fn).float().isfinite()][None]
    grid, levels = ScaledFloatGrid(torch.ones(1, 1), (1, 254), (1, 254)), every_level()
    positions = torch.searchsorted(levels, grid.decode(every)) + direction
    assert torch.equal(grid.decode(grid.step(every, direction)), levels[positions.clamp(0, len(levels) - 1)])
    assert grid.levels_count == len(levels) == 253


def test_blocks_rows_and_columns_agree() -> None:
    """All operations see the same scales: by brute force, by rows and column by column."""
    grid = small_grid()
    scale_OI = grid.scale_RC.repeat_interleave(4, 0)[:10].repeat_interleave(4, 1)[:, :7]
    values_OI = 100 * torch.randn(10, 7, generator=torch.Generator().manual_seed(0))
    codes_OI = grid.nearest(values_OI)
    stored_OI = codes_OI.view(torch.float8_e4m3fn).float() * scale_OI
    assert torch.equal(grid.decode(codes_OI), stored_OI)
    assert [
        torch.equal(end.expand(10, 7), sign * 448 * scale_OI) for end, sign in zip(grid.ends(), (-1, 1), strict=True)
    ]
    for rows in (Rows(0, 4), Rows(4, 10), Rows(8, 10)):
        part_OI = grid.rows(rows).decode(codes_OI[rows.start : rows.stop])
        assert torch.equal(part_OI, stored_OI[rows.start : rows.stop])
    columns, rows_O = torch.tensor([6, 0, 3]), torch.tensor([9, 5, 0, 4])
    nearest = grid.column_rounder(columns, rows_O)
    for i, column in enumerate(columns):
        assert torch.equal(nearest(i, values_OI[rows_O, column]), stored_OI[rows_O, column])


@pytest.mark.parametrize("sigma", [1e-5, 1e-4, 1e-3, 1e-2, 0.1])
def test_expected_slope_is_the_sum_over_all_thresholds(sigma: float) -> None:
    """Steps grow with the numbers, and only 16 of them are walked to each side: the rest may cost a hundredth."""
    values_OI = 0.02 * torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    grid = FORMAT.grid(FORMAT.scales(values_OI, Fp8Options()), (16, 64), Fp8Options())
    assert isinstance(grid, ScaledFloatGrid)
    levels = every_level().double() * float(grid.scale_RC)
    base_OI = grid.decode(grid.nearest(values_OI))
    distances = ((levels[1:] + levels[:-1]) / 2 - base_OI.double()[..., None]) / sigma
    expected_OI = (levels.diff() / sigma * torch.exp(-0.5 * distances**2)).sum(dim=2) / (2 * torch.pi) ** 0.5
    found_OI = grid.expected_slope(base_OI, torch.full((16, 1), sigma))
    assert float((found_OI - expected_OI).abs().max()) < 0.02
    assert abs(float(found_OI.mean()) - float(expected_OI.mean())) < 0.003


def test_near_codes_decide_only_between_equal_values() -> None:
    grid = small_grid()
    values_OI = torch.zeros(10, 7)
    near_OI = torch.full((10, 7), 0x80, dtype=torch.uint8)
    near_OI[4:8, :4] = 0x35  # where the scale is 0
    assert torch.equal(grid.nearest(values_OI, near_OI), near_OI)
    assert torch.equal(grid.decode(grid.nearest(values_OI + 3, near_OI)), grid.decode(grid.nearest(values_OI + 3)))


def test_tiny_and_empty_blocks_stay_finite() -> None:
    values_OI = torch.zeros(2, 256)
    values_OI[0, 0], values_OI[1, 200] = 1e-38, -3.0
    inverse_RC = FORMAT.scales(values_OI, Fp8Options())
    assert inverse_RC.tolist() == [[1.0, pytest.approx(448 / 3)]]
    grid = FORMAT.grid(inverse_RC, (2, 256), Fp8Options())
    assert torch.equal(grid.decode(grid.nearest(values_OI)).round(decimals=6), values_OI.round(decimals=6))


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_the_librarys(base: Made, kind: str) -> None:
    expected = bases.oracle(base(kind))
    assert len(expected) == 14
    assert stock.differing(read(base(kind)), expected) == []
    assert stock.differing(read(base(kind), block=128), expected) == []
    assert stock.differing(read(base(kind), block=128, decoded=True), expected) == []


def test_another_order_of_scales_is_seen(base: Made) -> None:
    """The control: with the scales of two blocks exchanged, the values differ."""
    folder = base("fp8")
    tensors = load_file(folder / "model.safetensors")
    parts = {"weight": tensors[f"{FIRST}.weight"], "weight_scale_inv": tensors[f"{FIRST}.weight_scale_inv"].flip(1)}
    flipped = fp8.read({f"{FIRST}.{n}": part for n, part in parts.items()}, bases.quantization_config(folder), {})
    assert not torch.equal(flipped[f"{FIRST}.weight"], read(folder)[f"{FIRST}.weight"])


@pytest.mark.parametrize("dtype", ["F8_E8M0", "U8"])
def test_exponents_are_powers_of_two(tmp_path: Path, dtype: str) -> None:
    (tmp_path / "bytes").write_bytes(bytes(range(256)))
    info = TensorInfo(dtype, (2, 128), name="scale", file=tmp_path / "bytes", offset=0)
    with Reader() as reader:
        scales = read_scales(info, reader)
    assert scales.flatten().tolist()[:255] == [2.0 ** (exponent - 127) for exponent in range(255)]
    assert scales.shape == (2, 128) and bool(scales[1, 127].isnan())


def test_microscaled_groups(tmp_path: Path) -> None:
    """MXFP8 as compressed-tensors writes it: groups of 32 with exponents as scales."""
    pytest.importorskip("compressed_tensors")
    scheme = compressed.make_scheme("MXFP8A16")
    linear = torch.nn.Linear(96, 64, bias=False).bfloat16()
    with torch.no_grad():
        parts = compressed.pack(linear, scheme)
    assert parts["weight_scale"].dtype == torch.uint8
    path = tmp_path / "model.safetensors"
    save_file({f"layer.{name}": part.contiguous() for name, part in parts.items()}, path)
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": scheme.model_dump(mode="json")}}
    exponents_OG = parts["weight_scale"].view(torch.float8_e8m0fnu).float()
    with Reader() as reader:
        (weight,) = FORMAT.find(read_header(path, CheckpointError)[0], reader, config)
        values_OI = FORMAT.open(weight, reader, torch.device("cpu")).values(Rows(0, 64))
    assert torch.equal(values_OI, parts["weight"].float() * exponents_OG.repeat_interleave(32, 1))
    assert stock.distance(values_OI, linear.weight.float()) < 2**-4


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", ["even", "odd"])
def test_bytes_are_those_of_transformers(written: Made, dense: Made, adapter: Made, sizes: str) -> None:
    """Scales and codes as its quantizer makes them of the merged float32 weights, ties and all."""
    out, source = written(sizes), stock.tensors(dense(sizes))
    deltas = stock.deltas(models.llama(torch.float32, **sizes_of(sizes)), adapter(sizes))
    config = {**bases.quantization_config(out), "scale_fmt": "float"}
    expected = dict(source)
    for name in [name for name in source if "proj" in name]:
        merged = source[name].float() + deltas[name] if name in deltas else source[name].float()
        parts = fp8.pack(SimpleNamespace(weight=merged, bias=None), config)  # type: ignore[arg-type]
        expected[name], expected[f"{name}_scale_inv"] = parts["weight"], parts["weight_scale_inv"]
    assert stock.differing(stock.tensors(out), expected) == []


@pytest.mark.parametrize("sizes", ["even", "odd"])
def test_transformers_reads_what_is_written(written: Made, sizes: str) -> None:
    values = read(written(sizes))
    assert len(values) == 14 and stock.differing(values, bases.oracle(written(sizes))) == []


def test_a_written_model_loads_in_transformers(written: Made) -> None:
    model, info = bases.loads(written("even"))
    assert not any(info.values()), info
    expected = models.logits(stock.float_model(written("even"), like=bases.values(written("even"))))
    assert stock.distance(models.logits(model), expected) < BOUND


def test_logits_show_a_wrong_scale(written: Made, dense: Made) -> None:
    """The control of the bound: FP8's rounding error is far above it."""
    rounded = models.logits(stock.float_model(written("even"), like=bases.values(written("even"))))
    assert stock.distance(rounded, models.logits(stock.float_model(dense("even")))) > 100 * BOUND


def test_config_is_the_one_that_transformers_writes(written: Made) -> None:
    from transformers import FineGrainedFP8Config

    config = bases.quantization_config(written("even"))
    assert config.pop("fmt") == "e4m3"
    stock_config = FineGrainedFP8Config().to_dict()
    stock_config["weight_block_size"] = list(stock_config["weight_block_size"])
    assert config.items() <= stock_config.items()
    assert FineGrainedFP8Config(**config).to_dict() == FineGrainedFP8Config().to_dict() | {
        "weight_block_size": [128, 128]
    }


def test_odd_blocks_come_with_a_caution(dense: Made, adapter: Made, tmp_path: Path, cli: Cli) -> None:
    for sizes, is_warned in (("odd", True), ("even", False)):
        ran = cli(
            "--base", dense(sizes), "--adapter", adapter(sizes), "--target", "fp8", "--rounding", "nearest", "--out",
            tmp_path / sizes,
        )  # fmt: skip
        assert ran.code == 0 and ("whole blocks of 128 x 128" in ran.err) == is_warned, ran.err


def test_what_stays_dense_is_named() -> None:
    left = ModuleLayout(dense=("model.layers.0.self_attn.q_proj",), experts=("model.layers.1.mlp.experts",))
    config = FORMAT.quantization_config(Fp8Options(), {}, "bfloat16", left) or {}
    assert config["modules_to_not_convert"] == ["lm_head", *left.dense, *left.experts]
    like = {"quant_method": "compressed-tensors", "ignore": ["lm_head"], "config_groups": {}}
    config = FORMAT.quantization_config(Fp8Options(), like, "bfloat16", left) or {}
    assert config == {**like, "ignore": ["lm_head", *left.dense, *left.experts]}
    for base in ({"quant_method": "fp8", "modules_to_not_convert": None}, {"quant_method": "fbgemm_fp8"}, like):
        assert FORMAT.quantization_config(Fp8Options(), base, "bfloat16", ModuleLayout()) == base


def test_dense_stacks_stay_dense_in_transformers(tmp_path: Path) -> None:
    """Stacks on disk (gpt-oss) stay dense; transformers' FP8 loader, which replaces every module of experts, must hear of it."""
    from transformers import AutoConfig, FineGrainedFP8Config, GptOssForCausalLM
    from transformers.integrations.finegrained_fp8 import FP8Linear, replace_with_fp8_linear

    model = bases.gpt_oss(hidden_size=128, intermediate_size=128, head_dim=64)
    base = models.save(model, tmp_path / "base")
    lora = models.adapter(model.float(), tmp_path / "lora", target_modules=["q_proj"])
    out = stock.merged(tmp_path / "out", base, lora, "fp8")
    config = bases.quantization_config(out)
    assert {"lm_head", *(f"model.layers.{layer}.mlp.experts" for layer in (0, 1))} <= set(
        config["modules_to_not_convert"]
    )
    with torch.device("meta"):
        empty = GptOssForCausalLM(AutoConfig.from_pretrained(base))
    settings = FineGrainedFP8Config(**config)
    empty = replace_with_fp8_linear(empty, settings.modules_to_not_convert, settings, pre_quantized=True)
    expected = {name.removesuffix(".weight") for name in read(out)}
    assert {name for name, layer in empty.named_modules() if isinstance(layer, FP8Linear)} == expected
    loaded, info = bases.loads(out)
    assert not any(info.values()), info
    assert bool(models.logits(loaded).isfinite().all())


# --- from one FP8 model to another -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_codes_of_adapted_weights_changes(base: Made, adapter: Made, tmp_path: Path, kind: str) -> None:
    """Scales, also those of inputs, and the config stay, whichever library they are for."""
    sizes = size_name(kind)
    out = stock.merged(tmp_path / "out", base(kind), adapter(sizes), "fp8")
    before, after = stock.tensors(base(kind)), stock.tensors(out)
    assert stock.differing(before, after) == sorted(n for n in before if n.endswith(tuple(f"{f}.weight" for f in FEW)))
    assert bases.quantization_config(out) == bases.quantization_config(base(kind))
    goal, values = goal_of(base(kind), adapter(sizes), sizes_of(sizes)), read(out)
    assert stock.differing(values, bases.oracle(out)) == []
    with Reader() as reader:
        for name, weight in scan(base(kind), reader).weights.items():
            if weight.format == "fp8":
                grid = FORMAT.open(weight, reader, torch.device("cpu")).grid
                assert torch.equal(values[name], grid.decode(grid.nearest(goal[name]))), name


@pytest.mark.parametrize("kind", LOADABLE)
def test_merged_bases_load_in_transformers(base: Made, adapter: Made, tmp_path: Path, kind: str) -> None:
    out = stock.merged(tmp_path / "out", base(kind), adapter(size_name(kind)), "fp8")
    model, info = bases.loads(out)
    assert not any(info.values()), info
    expected = models.logits(stock.float_model(out, like=bases.values(out)))
    assert stock.distance(models.logits(model), expected) < (BOUND if kind in bases.EXACT else 0.01)


def test_fresh_scales_are_those_of_transformers(base: Made, adapter: Made, tmp_path: Path) -> None:
    out = stock.merged(tmp_path / "out", base("fp8"), adapter("even"), "fp8", scales="fresh")
    goal = goal_of(base("fp8"), adapter("even"), bases.LLAMA)
    config, written = bases.quantization_config(out), stock.tensors(out)
    for name in stock.deltas(models.llama(torch.float32, **bases.LLAMA), adapter("even")):
        parts = fp8.pack(SimpleNamespace(weight=goal[name], bias=None), config)  # type: ignore[arg-type]
        expected = {name: parts["weight"], f"{name}_scale_inv": parts["weight_scale_inv"]}
        assert stock.differing({n: written[n] for n in expected}, expected) == []


@pytest.mark.parametrize("kind", ["fp8-tensor", "fp8-ue8m0", "fbgemm-fp8", "ct-fp8-block"])
def test_other_scales_are_kept_only(base: Made, adapter: Made, tmp_path: Path, cli: Cli, kind: str) -> None:
    ran = cli(
        "--base",
        base(kind),
        "--adapter",
        adapter("even"),
        "--target",
        "fp8",
        "--scales",
        "fresh",
        "--out",
        tmp_path / "out",
    )
    assert isinstance(ran.error, RecipeError) and "--scales keep" in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_merged_into_bf16_is_base_plus_delta(base: Made, adapter: Made, tmp_path: Path, kind: str) -> None:
    """Rounded once; and nothing of the quantized model is left."""
    sizes = size_name(kind)
    out = stock.merged(tmp_path / "out", base(kind), adapter(sizes), "bf16")
    goal = goal_of(base(kind), adapter(sizes), sizes_of(sizes))
    assert stock.differing(stock.tensors(out), {name: value.bfloat16() for name, value in goal.items()}) == []
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


def test_another_target_names_what_it_leaves(base: Made, adapter: Made, tmp_path: Path) -> None:
    """FP8 → NF4, as bitsandbytes' own loader finds it."""
    out = stock.merged(tmp_path / "out", base("fp8"), adapter("even"), "nf4")
    model, info = stock.loaded(out)
    assert not any(info.values()), info
    assert bool(models.logits(stock.in_float32(model)).isfinite().all())


# --- bad inputs ------------------------------------------------------------------------------------------------------


def without(local: str) -> Damage:
    return lambda tensors, config: tensors.pop(f"{FIRST}.{local}")


def put(local: str, change: Callable[[Tensor], Tensor], first: str = FIRST) -> Damage:
    def damage(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        tensors[f"{first}.{local}"] = change(tensors[f"{first}.{local}"])

    return damage


def with_config(**changes: Any) -> Damage:
    return lambda tensors, config: config.update(changes)


def both_formats(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors[f"{FIRST}.SCB"] = torch.ones(256)
    tensors[f"{FIRST}.weight"] = torch.zeros(256, 256, dtype=torch.int8)
    del tensors[f"{FIRST}.weight_scale_inv"]


DAMAGED: dict[str, tuple[str, Damage, tuple[str, ...]]] = {
    "no_scale": ("fp8", without("weight_scale_inv"), (f"{FIRST}.weight", "scale is missing", "Download")),
    "no_weight": ("fp8", without("weight"), (f"{FIRST}.weight_scale_inv", "parts", "Download")),
    "no_weight_ct": ("ct-fp8-channel", without("weight"), (f"{FIRST}.weight",)),
    "too_few_blocks": ("fp8", put("weight_scale_inv", lambda t: t[:1]), ("[1, 2]", "[2, 2]", "block of 128 x 128")),
    "other_block": ("fp8", with_config(weight_block_size=[64, 64]), ("[2, 3]", "[4, 6]", "block of 64 x 64", "config.json")),
    "no_block": ("fp8", with_config(weight_block_size=None), ("[2, 3]", "[1, 1]", "every row", "config.json")),
    "block_as_text": ("fp8", with_config(weight_block_size="big"), ("'big'", "two positive integers")),
    "block_of_zero": ("fp8", with_config(weight_block_size=[0, 128]), ("[0, 128]", "two positive integers")),
    "scale_of_nan": ("fp8", put("weight_scale_inv", lambda t: t * torch.nan), ("weight_scale_inv holds NaN", "Download")),
    "scale_below_zero": ("fp8", put("weight_scale_inv", lambda t: -t), ("negative",)),
    "exponent_of_nan": (
        "fp8-ue8m0",
        put("weight_scale_inv", lambda t: torch.full_like(t.view(torch.uint8), 255).view(t.dtype)),
        ("weight_scale_inv holds NaN",),
    ),
    "scale_as_integers": ("fp8", put("weight_scale_inv", lambda t: t.int()), ("weight_scale_inv is I32", "F32")),
    "e5m2": ("fp8", put("weight", lambda t: t.float().to(torch.float8_e5m2)), ("F8_E5M2", "F8_E4M3 [O, I]")),
    "cube": ("fp8", put("weight", lambda t: t[None]), ("[1, 256, 256]", "[O, I]")),
    "rows_for_fbgemm": ("fbgemm-fp8", put("weight_scale", lambda t: t[:1]), ("[1, 1]", "[256, 1]", "every row")),
    "mixed_formats": ("fp8", both_formats, ("mixes several quantized formats",)),
    "other_method": ("fp8", with_config(quant_method="gptq", bits=4), ("weight_scale_inv", "how it is quantized")),
    "no_config": ("fp8", lambda tensors, config: config.clear(), ("stored as fp8", "quant_method None")),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_bases_are_refused(base: Made, adapter: Made, tmp_path: Path, cli: Cli, name: str) -> None:
    kind, damage, words = DAMAGED[name]
    pytest.importorskip(bases.needs(kind))
    refused(base(kind), damage, words, adapter("even"), tmp_path, cli)


def test_codes_of_nan_are_refused(base: Made, adapter: Made, tmp_path: Path, cli: Cli) -> None:
    """Only merging finds them; the unfinished file does not have its final name."""
    folder = shutil.copytree(base("fp8"), tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{FIRST}.weight"].view(torch.uint8)[3, 5] = 0x7F
    save_file(tensors, folder / "model.safetensors")
    ran = cli("--base", folder, "--adapter", adapter("even"), "--target", "bf16", "--out", tmp_path / "out")
    assert isinstance(ran.error, NumbersError) and f"{FIRST}.weight" in ran.err and "NaN" in ran.err
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_scales_of_rows_may_have_one_axis() -> None:
    """The control of the shapes: [O] is read as [O, 1]."""
    info = {
        "a.weight": TensorInfo("F8_E4M3", (6, 4), name="a.weight", file=Path(), offset=0),
        "a.weight_scale": TensorInfo("F32", (6,), name="a.weight_scale", file=Path(), offset=0),
    }
    (weight,) = FORMAT.find(info, Reader(), {"quant_method": "fbgemm_fp8"})
    assert weight.options == Fp8Options(block=ROW, scale="weight_scale", scale_dtype="F32") and weight.shape == (6, 4)
