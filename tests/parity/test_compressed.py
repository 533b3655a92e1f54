"""compressed-tensors: qmerge reads the library's files bit for bit, and the library decompresses qmerge's to the same values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qmerge.checkpoint.scan import scan
from qmerge.errors import CheckpointError, RecipeError
from qmerge.formats import _compressed_int, _fp4, get_target
from qmerge.formats._compressed import CompressedOptions
from qmerge.formats._compressed_config import scheme_of
from qmerge.formats._fp4 import powers_of_two
from qmerge.formats._levels import FP4_LEVELS, LevelsGrid
from qmerge.formats.base import ModuleLayout
from qmerge.grids import DOWN, UP
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Rows

from .. import models
from ..formats.test_grids import ascending, gaussian, grid_for
from . import bases, stock
from .bases import compressed
from .bnb import fresh, opened, same, saved
from .reading import read

pytest.importorskip("compressed_tensors")
CPU = torch.device("cpu")
Q_PROJ = "model.layers.0.self_attn.q_proj"

KINDS = {
    "ct-int4": "w4a16", "ct-int4-g32": "w4a16", "ct-int4-asym": "w4a16", "ct-int4-asym-g32": "w4a16",
    "ct-int8": "w8a16", "ct-int8-w8a8": "w8a8", "ct-nvfp4": "nvfp4", "ct-mxfp4": "mxfp4a16",
}  # fmt: skip
"""Kind of base → the format that it is."""

WRITTEN: dict[str, tuple[str, dict[str, Any]]] = {
    "ct-int4": ("w4a16", {}),
    "ct-int4-g32": ("w4a16", {"group_size": 32}),
    "ct-int4-asym": ("w4a16", {"sym": False}),
    "ct-int8": ("w8a16", {"group_size": -1}),
    "ct-int8-w8a8": ("w8a8", {}),
    "ct-nvfp4": ("nvfp4", {}),
    "ct-mxfp4": ("mxfp4a16", {}),
}
"""Kind of base → target and options that write the like of it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``ct-…`` as the library makes it, ``to ct-…`` as qmerge writes it from the dense base, and adapters."""
    home, full = tmp_path_factory.mktemp("compressed"), models.llama(torch.float32, **bases.LLAMA)

    def make(name: str) -> Path:
        path = home / name.replace(" ", "-")
        if path.exists():
            return path
        if name == "dense":
            return models.save(models.llama(**bases.LLAMA), path)
        if name == "all":
            return models.adapter(full, path)
        if name == "some":
            return models.adapter(full, path, target_modules=["q_proj", "down_proj"])
        if name.startswith("to "):
            target, options = WRITTEN[name.removeprefix("to ")]
            return stock.merged(path, make("dense"), make("all"), target, **options)
        return bases.make(name, path)

    return make


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 1, 48])
@pytest.mark.parametrize("kind", KINDS)
def test_reads_what_the_library_reads(kind: str, step: int, folder: Callable[[str], Path]) -> None:
    oracle = bases.oracle(folder(kind))
    assert len(oracle) == 14 and not stock.differing(read(folder(kind), step), oracle)
    with Reader() as reader:
        formats = scan(folder(kind), reader).formats()
    assert formats[KINDS[kind]] == 14


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_those_that_the_library_unpacks(kind: str, folder: Callable[[str], Path]) -> None:
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    parts = load_file(folder(kind) / "model.safetensors")
    codes = parts.get(f"{Q_PROJ}.weight_packed", parts.get(f"{Q_PROJ}.weight"))
    assert codes is not None
    with Reader() as reader:
        weight = scan(folder(kind), reader).weights[f"{Q_PROJ}.weight"]
        ours = get_target(weight.format).open(weight, reader, CPU).codes(Rows(0, 256))
    shape = torch.Size(weight.shape)
    if codes.dtype == torch.uint8:
        assert same(FP4_LEVELS.values_L[ours.int()], unpack_fp4_from_uint8(codes, *shape, dtype=torch.float32))
    elif codes.dtype == torch.int8:
        assert torch.equal(ours.int() - 128, codes.int())
    else:
        bits = 8 if kind == "ct-int8" else 4
        assert torch.equal(ours.int() - 2 ** (bits - 1), unpack_from_int32(codes, bits, shape).int())


def test_control_the_other_nibble_first_differs(folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    unpack, unpack_fp4 = _compressed_int.unpack_bits, _fp4.unpack_fp4
    monkeypatch.setattr(
        _compressed_int, "unpack_bits", lambda words, bits: unpack(words, bits).unflatten(1, (-1, 2)).flip(2).flatten(1)
    )
    monkeypatch.setattr(_fp4, "unpack_fp4", lambda packed: unpack_fp4((packed << 4) | (packed >> 4)))
    for kind in ("ct-int4", "ct-int4-asym", "ct-nvfp4", "ct-mxfp4"):
        assert stock.differing(read(folder(kind)), bases.oracle(folder(kind)))


def test_control_the_order_of_operations_matters(folder: Callable[[str], Path]) -> None:
    """Scales that are multiplied by the reciprocal of the global scale are not those of the library."""
    parts, name = load_file(folder("ct-nvfp4") / "model.safetensors"), f"{Q_PROJ}.weight_scale"
    scale_OG, whole = parts[name].float(), parts[f"{Q_PROJ}.weight_global_scale"]
    assert not torch.equal(scale_OG * (1 / whole), scale_OG / whole)


def test_zero_points_that_are_not_packed(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """compressed-tensors before 0.10 wrote them as int8, [O, G]."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    def unpack(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("weight_zero_point")]:
            shape = tensors[name.replace("zero_point", "scale")].shape
            tensors[name] = unpack_from_int32(tensors[name], 4, shape, packed_dim=0).contiguous()

    path = changed(folder("ct-int4-asym-g32"), tmp_path / "old", unpack)
    assert not stock.differing(read(path), bases.oracle(folder("ct-int4-asym-g32")))


def test_act_order_of_older_files(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """``weight_g_idx``: the library no longer makes it. Undoing the order gives the values that it reads without one."""
    order = torch.randperm(256, generator=torch.Generator().manual_seed(3))
    name = f"{Q_PROJ}.weight_packed"

    def reorder(tensors: dict[str, Tensor]) -> None:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

        for module in [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]:
            columns = int(tensors[f"{module}.weight_shape"][1])
            tensors[f"{module}.weight_g_idx"] = (torch.arange(columns) // 32).int()
        codes = unpack_from_int32(tensors[name], 4, torch.Size((256, 256)))
        tensors[name] = pack_to_int32(codes[:, order], 4)
        tensors[f"{Q_PROJ}.weight_g_idx"] = (order // 32).int()

    path = changed(folder("ct-int4-g32"), tmp_path / "ordered", reorder)
    oracle = bases.oracle(folder("ct-int4-g32"))
    oracle[f"{Q_PROJ}.weight"] = oracle[f"{Q_PROJ}.weight"][:, order]
    assert not stock.differing(read(path), oracle)
    out = stock.merged(tmp_path / "out", path, folder("some"), "w4a16")
    assert {n.rpartition(".")[2] for n in stock.differing(stock.tensors(path), stock.tensors(out))} == {"weight_packed"}
    fresh = stock.merged(tmp_path / "fresh", path, folder("some"), "w4a16", scales="fresh")
    assert len(read(fresh)) == 14


def test_groups_by_pattern_and_by_class() -> None:
    """A module's own name or a pattern comes before its class."""
    four, eight = ({"num_bits": bits, "type": "int"} for bits in (4, 8))
    config = {
        "format": "pack-quantized",
        "config_groups": {
            "all": {"targets": ["Linear"], "weights": four},
            "some": {"targets": ["re:.*down_proj$", "model.x"], "weights": eight},
            "none": {"targets": ["re:.*attn"], "weights": None, "input_activations": eight},
        },
    }
    schemes = [scheme_of(name, config) for name in ("model.layers.0.mlp.down_proj", "model.x", "model.xy")]
    assert [scheme.weights["num_bits"] for scheme in schemes if scheme] == [8, 8, 4]
    assert scheme_of("a", {"config_groups": {"g": {"targets": ["re:b"], "weights": four}}}) is None


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WRITTEN)
def test_what_is_written_the_library_reads(kind: str, folder: Callable[[str], Path]) -> None:
    oracle = bases.oracle(folder(f"to {kind}"))
    assert len(oracle) == 14 and not stock.differing(read(folder(f"to {kind}")), oracle)


@pytest.mark.parametrize("kind", WRITTEN)
def test_parts_are_those_of_the_library(kind: str, folder: Callable[[str], Path]) -> None:
    """Names, dtypes, shapes, and the whole config."""
    ours, theirs = (stock.tensors(folder(name)) for name in (f"to {kind}", kind))
    assert {n: (p.dtype, p.shape) for n, p in ours.items()} == {n: (p.dtype, p.shape) for n, p in theirs.items()}
    config, expected = (bases.quantization_config(folder(name)) for name in (f"to {kind}", kind))
    assert {**config, "version": None} == {**expected, "version": None}


@pytest.mark.parametrize("kind", WRITTEN)
def test_codes_are_what_the_library_chooses(kind: str, folder: Callable[[str], Path]) -> None:
    """For base + peft's delta and the scales that were written; ties may differ where it divides and qmerge multiplies."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    path = folder(f"to {kind}")
    deltas = stock.deltas(models.llama(torch.float32, **bases.LLAMA), folder("all"))
    dense, oracle = load_file(folder("dense") / "model.safetensors"), bases.oracle(path)
    scheme = schemes(path)["group_0"]
    with Reader() as reader:
        for name, weight in scan(path, reader).weights.items():
            if name not in oracle:
                continue
            grid: Any = get_target(weight.format).open(weight, reader, CPU).grid
            zeros = grid.zero_OG - grid.levels_count / 2 if hasattr(grid, "zero_OG") else None
            merged_OI = dense[name].float() + deltas[name]
            theirs = fake_quantize(merged_OI, grid.scale_OG, zeros, scheme.weights)
            assert float((theirs != oracle[name]).float().mean()) < 1e-3, name


def schemes(path: Path) -> dict[str, Any]:
    from compressed_tensors.quantization import QuantizationConfig

    config = bases.quantization_config(path)
    given = {name: value for name, value in config.items() if name in QuantizationConfig.model_fields}
    groups: dict[str, Any] = QuantizationConfig(**given).config_groups
    return groups


@pytest.mark.parametrize("kind", WRITTEN)
def test_scales_are_no_worse_than_the_librarys(kind: str, folder: Callable[[str], Path]) -> None:
    """The same weights, with scales from the extremes of every group as the library makes them."""
    target, asked = WRITTEN[kind]
    dense, oracle = load_file(folder("dense") / "model.safetensors"), bases.oracle(folder(kind))
    theirs = ours = 0.0
    for name in list(oracle)[:7]:
        weight_OI = dense[name].float()
        grid = grid_for(target, weight_OI, **asked)
        theirs += float((oracle[name] - weight_OI).square().sum())
        ours += float((grid.decode(grid.nearest(weight_OI)) - weight_OI).square().sum())
    assert ours < theirs, (ours, theirs)


@pytest.mark.parametrize("target", ["w4a16", "nvfp4", "mxfp4a16"])
def test_scales_depend_on_the_inputs(target: str) -> None:
    values_OI = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    inputs_I = torch.where(torch.arange(64) % 8 < 1, 100.0, 0.01)
    asked = {"group_size": 32} if target == "w4a16" else {}
    errors = []
    for seen in (None, inputs_I):
        grid = grid_for(target, values_OI, seen, **asked)
        error_OI = grid.decode(grid.nearest(values_OI)) - values_OI
        errors.append(float((error_OI.square() * inputs_I).sum()))
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("kind", KINDS)
def test_same_format_keeps_scales(kind: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    out = stock.merged(tmp_path / "out", folder(kind), folder("some"), KINDS[kind])
    before, after = stock.tensors(folder(kind)), stock.tensors(out)
    codes = get_target(KINDS[kind]).codes_part("weight")
    adapted = [n for n in before if n.endswith(f".{codes}") and ("q_proj" in n or "down_proj" in n)]
    assert stock.differing(before, after) == sorted(adapted)
    assert bases.quantization_config(out) == bases.quantization_config(folder(kind))


@pytest.mark.parametrize("kind", ["ct-int4-asym", "ct-nvfp4"])
def test_fresh_scales_of_the_same_format(kind: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    out = stock.merged(tmp_path / "out", folder(kind), folder("some"), KINDS[kind], scales="fresh")
    assert bases.quantization_config(out) == bases.quantization_config(folder(kind))
    assert not stock.differing(read(out), bases.oracle(out))


def test_static_scales_of_inputs_are_copied(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Fresh ones cannot be made: they were measured on data."""

    def add(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            tensors[name.replace("weight_scale", "input_scale")] = torch.tensor([0.05], dtype=torch.bfloat16)

    base = changed(folder("ct-int8-w8a8"), tmp_path / "static", add)
    out = stock.merged(tmp_path / "out", base, folder("some"), "w8a8")
    changes = stock.differing(stock.tensors(base), stock.tensors(out))
    assert changes and all(name.endswith("proj.weight") for name in changes)
    with pytest.raises(RecipeError, match=r"scales for its inputs.*Leave out --scales fresh"):
        stock.merged(tmp_path / "fresh", base, folder("some"), "w8a8", scales="fresh")
    other = stock.merged(tmp_path / "other", base, folder("some"), "w4a16")
    assert not [name for name in stock.tensors(other) if name.endswith("input_scale")]


def test_from_one_layout_to_another(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """The base's list of dense modules stays, its scheme does not."""
    out = stock.merged(tmp_path / "out", folder("ct-nvfp4"), folder("some"), "w4a16")
    assert not stock.differing(read(out), bases.oracle(out))
    config = bases.quantization_config(out)
    assert (config["format"], config["ignore"]) == ("pack-quantized", ["lm_head"])


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("name", ["w4a16", "w8a16", "w8a8"])
def test_words_that_are_not_full(name: str, sym: bool, tmp_path: Path) -> None:
    """33 columns, 7 rows: codes and zero points end in the middle of a word."""
    options = CompressedOptions(format=name, sym=sym)
    parts = fresh(gaussian(1, (7, 33)), name, options)
    config = get_target(name).quantization_config(options, {}, "bfloat16", ModuleLayout())
    assert config is not None
    with Reader() as reader:
        weight, stored = opened(saved(parts, tmp_path), name, reader, options)
        assert weight.options == options
        oracle = compressed.read({f"x.{local}": part for local, part in parts.items()}, config, {})
        assert same(stored.values(Rows(0, 7)), oracle["x.weight"])


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WRITTEN)
def test_the_stock_loader_reads_it(kind: str, folder: Callable[[str], Path]) -> None:
    """Logits are those of a float32 model with the stored values. Where the loader dequantizes to bfloat16, each of 14
    layers in a row is off by up to 2**-9 of its weights."""
    model, info = bases.loads(folder(f"to {kind}"))
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = models.logits(stock.float_model(folder(f"to {kind}"), bases.values(folder(f"to {kind}"))))
    bound = 1e-5 if kind in bases.EXACT else 14 * 2**-9
    assert stock.distance(models.logits(model), expected) < bound
    unmerged = models.logits(stock.float_model(folder("dense")))
    assert stock.distance(unmerged, expected) > 14 * 2**-9


# --- FP4's grids -----------------------------------------------------------------------------------------------------


def test_fp4_rounds_as_the_library_does() -> None:
    """Every number around every level and every tie, both zeros too."""
    from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4

    ticks = torch.arange(-56, 57) / 8.0
    around = torch.cat([ticks, ticks.nextafter(torch.tensor(9.0)), ticks.nextafter(torch.tensor(-9.0))])
    ours = FP4_LEVELS.values_L[FP4_LEVELS.nearest(around).int()]
    assert same(ours, cast_to_fp4(around.clone()))


def test_walking_up_meets_every_level_once() -> None:
    values_OI = gaussian()
    for target in ("nvfp4", "mxfp4a16"):
        grid = grid_for(target, values_OI)
        levels = ascending(grid, values_OI)
        assert len(levels) == 15 and bool((levels.diff(dim=0) > 0).all())


def test_the_two_zeros() -> None:
    """Two codes have one value: neither is the other's neighbour, and the base's own code stays."""
    grid = LevelsGrid(FP4_LEVELS, torch.tensor([[1.0, 0.5], [2.0, -0.25]]), 4)
    minus, plus = (torch.full((2, 7), code, dtype=torch.uint8) for code in (7, 8))
    assert bool((grid.decode(minus) == 0).all()) and bool((grid.decode(plus) == 0).all())
    for zero in (minus, plus):
        assert bool((grid.decode(grid.step(zero, UP)) > 0).all()), "a negative scale reverses the order"
        assert bool((grid.decode(grid.step(zero, DOWN)) < 0).all())
        assert torch.equal(grid.nearest(torch.zeros(2, 7), zero), zero)
    low, high = grid.ends()
    assert bool((low[:, :7] == -6 * grid._per_column(grid.scale_OG, minus).abs()).all()) and bool((high == -low).all())


def test_columns_one_by_one_are_rounded_alike() -> None:
    values_OI, columns = gaussian(), torch.randperm(64, generator=torch.Generator().manual_seed(1))
    rows = torch.tensor([3, 0, 11])
    for target in ("w4a16", "nvfp4", "mxfp4a16"):
        grid = grid_for(target, values_OI)
        nearest, whole = grid.column_rounder(columns, rows), grid.decode(grid.nearest(values_OI))
        for i, column in enumerate(columns.tolist()):
            assert torch.equal(nearest(i, values_OI[rows, column]), whole[rows, column])


def test_scales_of_zero_leave_zero() -> None:
    grid = LevelsGrid(FP4_LEVELS, torch.zeros(2, 1), 4)
    codes_OI = grid.nearest(torch.ones(2, 4))
    assert bool((grid.decode(codes_OI) == 0).all())
    assert torch.equal(
        grid.nearest(torch.ones(2, 4), torch.full((2, 4), 3, dtype=torch.uint8)).unique(), torch.tensor([3])
    )


def test_weights_of_zeros_large_and_small() -> None:
    """NVFP4's global scale: the same for all ordinary weights, another one where FP8 would not hold the scales."""
    for size, global_scale in ((0.0, 256.0), (1.0, 256.0), (30.0, 64.0), (1e-6, 2.0**31)):
        values_OI = torch.full((2, 32), size)
        grid: Any = grid_for("nvfp4", values_OI)
        assert bool(grid.scale_OG.isfinite().all()) and bool((grid.scale_OG > 0).all())
        assert float((grid.decode(grid.nearest(values_OI)) - values_OI).abs().max()) <= size / 32
        assert grid.global_scale == global_scale


def test_powers_of_two() -> None:
    from compressed_tensors.compressors.mx_utils import decompress_mx_scale

    every = torch.arange(255, dtype=torch.uint8)
    assert same(powers_of_two(every.int()), decompress_mx_scale(every).float())


# --- bad bases ---------------------------------------------------------------------------------------------------


def changed(path: Path, out: Path, edit: Callable[[dict[str, Tensor]], Any] | None = None, **config: Any) -> Path:
    """A copy with other tensors, and with changes to quantization_config."""
    out.mkdir()
    tensors = load_file(path / "model.safetensors")
    if edit:
        edit(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text((path / "config.json").read_text())
    models.edit_json(out / "config.json", quantization_config={**bases.quantization_config(path), **config})
    return out


def without(part: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.pop(f"{Q_PROJ}.{part}")


def put(part: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], Any]:
    def edit(tensors: dict[str, Tensor]) -> None:
        old = tensors.get(f"{Q_PROJ}.{part}", torch.zeros(1))
        tensors[f"{Q_PROJ}.{part}"] = make(old).contiguous()

    return edit


def weights(**args: Any) -> dict[str, Any]:
    """A config with other ``weights`` of its scheme."""
    return {"weights": args}


BAD: list[tuple[str, Any, dict[str, Any], str]] = [
    ("ct-int4", without("weight_scale"), {}, f"'pack-quantized' with 4 bits.*{Q_PROJ}.weight_scale is missing"),
    ("ct-int4", without("weight_packed"), {}, f"{Q_PROJ}.weight_packed is missing"),
    ("ct-int4", without("weight_shape"), {}, f"{Q_PROJ}.weight_shape is missing"),
    ("ct-int4-asym", without("weight_zero_point"), {}, f"{Q_PROJ}.weight_zero_point is missing"),
    ("ct-nvfp4", without("weight_global_scale"), {}, f"{Q_PROJ}.weight_global_scale is missing"),
    ("ct-int4", None, weights(num_bits=8), "with 8 bits, as config.json says.*config.json that belongs"),
    ("ct-int4", None, weights(num_bits=3), "'pack-quantized' with 3 bits .int., which this version does not read. It reads"),
    ("ct-int4", None, weights(group_size=64), "in groups of 64, as config.json says"),
    ("ct-int4", None, weights(group_size=100), "groups of 100, which do not fit"),
    ("ct-int4", None, weights(strategy="channel"), "with a scale per row, as config.json says"),
    ("ct-int4", None, weights(strategy="tensor"), "strategy 'tensor' with group_size 128 is not read"),
    ("ct-int4", None, weights(actorder="group"), "weight_g_idx is missing"),
    ("ct-int4-asym", None, weights(symmetric=True), "says symmetric, but weight_zero_point is not 0"),
    ("ct-int4", put("weight_scale", lambda t: t.int()), {}, "weight_scale is I32, expected F16 or BF16 or F32"),
    ("ct-int4", put("weight_scale", lambda t: t * torch.nan), {}, "weight_scale holds NaN"),
    ("ct-int4", put("weight_shape", lambda t: t + 1), {}, "257 x 257"),
    ("ct-int4", put("weight_shape", lambda t: t[:1]), {}, r"weight_shape is I64 \[1\], expected I64 \[2\]"),
    ("ct-int4-asym", put("weight_zero_point", lambda t: t[1:]), {}, "weight_zero_point is I32"),
    ("ct-int4", put("weight_g_idx", lambda t: torch.zeros(3).int()), {}, r"expected I32 \[256\]"),
    ("ct-int4", put("weight_g_idx", lambda t: torch.full((256,), 2).int()), {}, "holds 2 to 2, but there are 2 groups"),
    ("ct-int8-w8a8", put("weight", lambda t: t.float()), {}, "weight is F32 .*, expected I8"),
    ("ct-nvfp4", put("weight_scale", lambda t: t[:, 1:]), {}, "do not belong to 256 x 256 in groups of 16"),
    ("ct-nvfp4", put("weight_scale", lambda t: t.float()), {}, "weight_scale F32, expected"),
    ("ct-nvfp4", put("weight_global_scale", lambda t: t * 0), {}, "make NaN or infinity"),
    ("ct-mxfp4", put("weight_scale", lambda t: t.fill_(255)), {}, "weight_scale holds 255, which is NaN"),
    ("ct-int4", None, {"config_groups": {}}, "has no config_groups"),
    ("ct-int4", None, {"transform_config": {"config_groups": {"a": {}}}}, "transform_config: the weights are stored rotated"),
    ("ct-int4", None, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "stored as 'sparse-24-bitmask' are not read"),
    ("ct-int4", None, {"targets": ["re:("]}, "is not a regular expression"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "edit", "config", "message"), BAD, ids=[f"{k}: {m[:30]}" for k, _, _, m in BAD])
def test_bad_bases(
    kind: str, edit: Any, config: dict[str, Any], message: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    groups = bases.quantization_config(folder(kind))["config_groups"]
    if "weights" in config:
        groups["group_0"]["weights"].update(config["weights"])
        config = {"config_groups": groups}
    if "targets" in config:
        config = {"config_groups": {"group_0": {**groups["group_0"], **config}}}
    base = changed(folder(kind), tmp_path / "bad", edit, **config)
    with pytest.raises(CheckpointError, match=message):
        stock.merged(tmp_path / "out", base, folder("some"), KINDS[kind])
    assert not (tmp_path / "out").exists()


def test_without_a_config(folder: Callable[[str], Path], tmp_path: Path) -> None:
    base = changed(folder("ct-int4"), tmp_path / "bad")
    models.edit_json(base / "config.json", quantization_config=None)
    with pytest.raises(CheckpointError, match=r"config\.json has no quantization_config.*config\.json that belongs"):
        stock.merged(tmp_path / "out", base, folder("some"), "w4a16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("target", "asked", "message"),
    [
        ("w4a16", {"group_size": 48}, "--group-size 48: w4a16 supports 32, 64, 128, -1"),
        ("w8a8", {"group_size": 64}, "--group-size is for .*, but the target is w8a8"),
        ("nvfp4", {"sym": True}, "--sym is for"),
        ("w4a16", {"bits": 8}, "--bits is for"),
    ],
)
def test_bad_recipes(
    target: str, asked: dict[str, Any], message: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        stock.merged(tmp_path / "out", folder("dense"), folder("all"), target, **asked)
    assert not (tmp_path / "out").exists()


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(
        RecipeError, match=r"x.weight has 96 inputs, which is not a multiple of .* 64: use --group-size 32"
    ):
        get_target("w4a16").check("x.weight", (64, 96), CompressedOptions(format="w4a16", group_size=64))
    with pytest.raises(
        RecipeError, match=r"x.weight has 24 inputs, which is not a multiple of .* 16: use --target w4a16 or nf4"
    ):
        get_target("nvfp4").check("x.weight", (64, 24), CompressedOptions(format="nvfp4", group_size=16))
    assert get_target("w4a16").options_for_model({}, [(64, 96), (64, 128)]) == {"group_size": 32}
    assert get_target("w8a8").options_for_model({}, [(64, 96)]) == {}


def test_dense_modules_are_ignored_once() -> None:
    layout = ModuleLayout(("a.q",), ("a.k", "a.v"), ("lm_head",), ("a.experts",))
    options = CompressedOptions(format="w4a16", group_size=128)
    fresh = get_target("w4a16").quantization_config(options, {}, "bfloat16", layout)
    assert fresh is not None and fresh["ignore"] == ["lm_head", "a.k", "a.v", r"re:a\.experts"]
    kept = get_target("w4a16").quantization_config(
        options, {**fresh, "ignore": ["re:a.[kv]", "re:.*experts"]}, "bfloat16", layout
    )
    assert kept is not None and kept["ignore"] == ["re:a.[kv]", "re:.*experts"]


def test_warnings_are_about_options_that_few_loaders_read() -> None:
    assert not get_target("w4a16").target_warnings(CompressedOptions(format="w4a16", group_size=128), {})
    (asymmetric,) = get_target("w4a16").target_warnings(
        CompressedOptions(format="w4a16", group_size=128, sym=False), {}
    )
    (ordered,) = get_target("w4a16").target_warnings(
        CompressedOptions(format="w4a16", group_size=128, act_order=True), {}
    )
    assert "dequantize=True" in asymmetric and "weight_g_idx" in ordered
