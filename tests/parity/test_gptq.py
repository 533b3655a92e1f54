"""GPTQ against gptqmodel and auto-gptq: every variant read bit for bit, written as they read it, and loaded by transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

import qmerge
import qmerge.demo
from qmerge.checkpoint.scan import scan
from qmerge.errors import CheckpointError, RecipeError
from qmerge.formats._affine import AffineGrid, sequential_groups
from qmerge.formats._fit_scales import fit_scales
from qmerge.formats._gptq_find import GptqOptions
from qmerge.formats._packing import pack_bits, unpack_bits
from qmerge.formats.gptq import FORMAT
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Rows

from .. import models
from ..conftest import Cli, snapshot
from . import bases, stock
from .reading import read

pytest.importorskip("gptqmodel")

KINDS = [kind for kind, settings in bases.KINDS.items() if settings["family"] == "gptq"]
WRITTEN: dict[str, dict[str, Any]] = {
    "default": {},
    "g32": {"group_size": 32},
    "channel": {"group_size": -1},
    "v2": {"checkpoint_format": "gptq_v2"},
    "asym": {"sym": False},
    "asym v1": {"sym": False, "checkpoint_format": "gptq"},
    "act-order": {"act_order": True, "rounding": "preserve"},
    "static groups": {"act_order": True, "static_groups": True, "rounding": "preserve"},
    "2 bits": {"bits": 2, "group_size": 32},
    "3 bits": {"bits": 3},
    "3 bits asym": {"bits": 3, "sym": False},
    "8 bits": {"bits": 8},
    "8 bits asym": {"bits": 8, "sym": False},
}
"""What a user may ask for, as fields of the recipe."""

Made = Callable[[str], Path]
DEMO = Path(qmerge.demo.__file__).parent


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """As gptqmodel packs it."""
    folder = tmp_path_factory.mktemp("gptq")
    return cache(lambda kind: bases.make(kind, folder / kind))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(models.llama(**bases.LLAMA), tmp_path_factory.mktemp("gptq") / "dense")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On some of the layers, so that others are only converted, or copied."""
    model = models.llama(torch.float32, **bases.LLAMA)
    return models.adapter(model, tmp_path_factory.mktemp("gptq") / "adapter", target_modules=["q_proj", "down_proj"])


@pytest.fixture(scope="module")
def written(dense: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """As qmerge writes it from a dense base."""
    folder = tmp_path_factory.mktemp("written")
    text = folder / "text.txt"
    text.write_text("the quick brown fox")

    @cache
    def make(kind: str) -> Path:
        settings = {"sequence_length": 16, "calibration_tokens": 256, **WRITTEN[kind]}
        return stock.merged(folder / kind, dense, adapter, "gptq", **settings)

    return make


# --- bits on disk ----------------------------------------------------------------------------------------------------


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32))
def test_bits_survive_packing(bits: int, rows: int, words: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, 32 * words), generator=torch.Generator().manual_seed(seed))
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.int32 and packed.shape == (rows, bits * words)
    assert torch.equal(unpack_bits(packed, bits), codes.to(torch.uint8))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bits_lie_as_compressed_tensors_packs_them(bits: int) -> None:
    """Somebody else's dense stream of bits: the same words, also where codes straddle two of them."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(0, 2**bits, (5, 96), generator=torch.Generator().manual_seed(0))
    signed = (codes - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack_bits(codes, bits), helpers.pack_to_int32(signed, bits))


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_gptqmodels(base: Made, kind: str) -> None:
    expected = bases.oracle(base(kind))
    assert stock.differing(read(base(kind)), expected) == []
    assert stock.differing(read(base(kind), block=40), expected) == []


def test_zeros_that_borrowed_are_given_back(base: Made) -> None:
    """The control: field by field, zeros of 0 in v1 come out wrong."""
    tensors = load_file(base("gptq-asym-edge") / "model.safetensors")
    words = tensors["model.layers.0.mlp.up_proj.qzeros"]
    by_fields = (unpack_bits(words, 4) + 1) & 15
    by_words = unpack_bits(words + 0x11111111, 4)
    assert bool((by_words == 0).any()) and not torch.equal(by_fields, by_words)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("order", ["sequential", "act-order"])
def test_files_of_auto_gptq(tmp_path: Path, bits: int, order: str) -> None:
    """Packed by auto-gptq 0.7.1: the codes that it was given come back."""
    if bases.auto_gptq() is None:
        pytest.skip("auto-gptq 0.7.1 is not installed (it has wheels for Python 3.8 to 3.11)")
    generator = torch.Generator().manual_seed(bits)
    group_I = sequential_groups(128, 32)
    group_I = group_I[torch.randperm(128, generator=generator)] if order == "act-order" else group_I
    scale_OG = (torch.rand(64, 4, generator=generator) * 0.01 + 0.001).half().float()
    zero_OG = torch.randint(1, 2**bits, (64, 4), generator=generator).float()
    grid = AffineGrid(scale_OG, zero_OG, group_I, 2**bits)
    codes_OI = torch.randint(0, 2**bits, (64, 128), generator=generator, dtype=torch.uint8)
    g_idx = group_I.int() if order == "act-order" else None
    parts = bases.auto_gptq_packed(
        grid.decode(codes_OI), scales_OG=scale_OG, zeros_OG=zero_OG, g_idx=g_idx, bits=bits, group_size=32
    )
    save_file({f"layer.proj.{name}": part for name, part in parts.items()}, tmp_path / "model.safetensors")
    config = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": False}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "quantize_config.json").write_text(json.dumps(config))
    with Reader() as reader:
        weight = scan(tmp_path, reader).weights["layer.proj.weight"]
        stored = FORMAT.open(weight, reader, torch.device("cpu"))
        assert torch.equal(stored.codes(Rows(0, 64)), codes_OI)
        assert torch.equal(stored.values(Rows(0, 64)), grid.decode(codes_OI))


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WRITTEN)
def test_gptqmodel_reads_what_is_written(written: Made, kind: str) -> None:
    out = written(kind)
    values = read(out)
    assert len(values) == 14 and stock.differing(values, bases.oracle(out)) == []
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config == json.loads((out / "quantize_config.json").read_text())
    tensors = load_file(out / "model.safetensors")
    columns = torch.arange(384, dtype=torch.int32)
    g_idx = tensors["model.layers.1.mlp.down_proj.g_idx"]
    size = 384 if config["group_size"] == -1 else config["group_size"]
    assert torch.equal(g_idx, columns // size) == (kind != "act-order")
    assert config["desc_act"] == (kind == "act-order")
    assert torch.equal(g_idx.bincount(), (columns // size).bincount())
    assert tensors["model.layers.0.self_attn.q_proj.scales"].dtype == torch.float16


@pytest.mark.parametrize("kind", WRITTEN)
def test_loads_in_transformers(written: Made, kind: str) -> None:
    """Nothing missing, nothing left over, and the logits of a float32 model with the stored values: DEPTH matrices in
    float32, whose sums may come in another order."""
    out = written(kind)
    model, info = bases.loads(out)
    assert not any(info.values()), info
    expected = models.logits(stock.float_model(out, like=bases.values(out)))
    assert stock.distance(models.logits(model), expected) < 4 * 15 * 2**-24 * 384**0.5


@pytest.mark.parametrize("kind", WRITTEN)
def test_auto_gptq_multiplies_alike(written: Made, kind: str) -> None:
    """auto-gptq's rules are those of v1: its layer, loaded with our parts, gives the product with the stored values."""
    if bases.auto_gptq() is None:
        pytest.skip("auto-gptq 0.7.1 is not installed (it has wheels for Python 3.8 to 3.11)")
    out = written(kind)
    config = json.loads((out / "quantize_config.json").read_text())
    name = "model.layers.0.mlp.down_proj"
    tensors = load_file(out / "model.safetensors")
    parts = {local: tensors[f"{name}.{local}"] for local in ("qweight", "qzeros", "scales", "g_idx")}
    x = torch.randn(3, 384, generator=torch.Generator().manual_seed(0))
    product = bases.auto_gptq_product(parts, config["bits"], config["group_size"], x)
    expected = x @ read(out)[f"{name}.weight"].T
    right = config["checkpoint_format"] == "gptq"  # the control: it takes v2 zeros for v1, every value one step off
    assert (stock.distance(product, expected) < 4 * 2**-24 * 384**0.5) == right


def test_scales_are_better_than_the_range() -> None:
    """The search never loses to the plain scale that it begins with, and wins on a Gaussian weight with 4 bits."""
    weight_OI = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    group_I = sequential_groups(256, 64)
    for sym in (True, False):
        fitted = fit_scales(weight_OI, group_I, bits=4, sym=sym, dtype=torch.float16, least_zero=1)
        scale_OG, zero_OG = fitted.unbind(dim=2)
        assert torch.equal(scale_OG, scale_OG.half().float()) and int(zero_OG.min()) >= 1 and int(zero_OG.max()) <= 15
        grid = AffineGrid(scale_OG, zero_OG, group_I, 16)
        groups_OGN = weight_OI.view(64, 4, 64)
        low_OG, high_OG = groups_OGN.amin(2), groups_OGN.amax(2)
        plain_OG = torch.maximum(-low_OG / 8, high_OG / 7) if sym else (high_OG - low_OG) / 15
        plain = AffineGrid(plain_OG, torch.full_like(plain_OG, 8) if sym else (-low_OG / plain_OG).round(), group_I, 16)
        error, before = (
            (g.decode(g.nearest(weight_OI)) - weight_OI).square().view(64, 4, 64).sum(2) for g in (grid, plain)
        )
        assert bool((error <= before * (1 + 1e-3)).all()), "float16 scales may lose a thousandth"
        assert float(error.sum() / before.sum()) < 0.95


def test_scales_weigh_by_the_inputs() -> None:
    """What the inputs do not see may be clipped; the control weighs all alike."""
    weight_OI = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    weight_OI[:, 0] = 30
    inputs_I = torch.ones(64)
    inputs_I[0] = 0
    group_I = sequential_groups(64, 64)
    seen, blind = (
        fit_scales(weight_OI, group_I, bits=4, sym=True, dtype=torch.float16, inputs_I=weights)[..., 0]
        for weights in (inputs_I, None)
    )
    assert bool((seen < 0.6 * blind).all())


def test_nothing_but_codes_of_adapted_weights_changes(base: Made, adapter: Path, tmp_path: Path) -> None:
    """GPTQ → GPTQ: scales, zeros and g_idx of the base stay, byte for byte, and so does every untouched weight."""
    for kind in ("gptq", "gptq-asym-edge", "gptq-act-order-asym", "gptq-3bit"):
        out = stock.merged(tmp_path / kind, base(kind), adapter, "gptq")
        before, after = stock.tensors(base(kind)), stock.tensors(out)
        touched = sorted(n for n in before if n.endswith(("q_proj.qweight", "down_proj.qweight")))
        assert stock.differing(before, after) == touched
        goal, values = bases.oracle(base(kind)), read(out)
        for name, delta in stock.deltas(models.llama(torch.float32, **bases.LLAMA), adapter).items():
            goal[name] = goal[name] + delta
        with Reader() as reader:
            for name, weight in scan(base(kind), reader).weights.items():
                if weight.format == "gptq":
                    grid = FORMAT.open(weight, reader, torch.device("cpu")).grid
                    assert torch.equal(values[name], grid.decode(grid.nearest(goal[name]))), name


@pytest.mark.parametrize("kind", ["gptq", "gptq-act-order-asym", "gptq-3bit-asym", "gptq-8bit"])
def test_merged_into_float32_is_base_plus_delta(base: Made, adapter: Path, tmp_path: Path, kind: str) -> None:
    out = stock.merged(tmp_path / "out", base(kind), adapter, "fp32")
    expected = bases.values(base(kind))
    for name, delta in stock.deltas(models.llama(torch.float32, **bases.LLAMA), adapter).items():
        expected[name] = expected[name] + delta
    assert stock.differing(stock.tensors(out), expected) == []
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert not (out / "quantize_config.json").exists()


def test_g_idx_is_always_written(base: Made, adapter: Path, tmp_path: Path) -> None:
    """Old files lack it where groups are sequential; llama.cpp's converter asks for it."""
    folder = shutil.copytree(base("gptq"), tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    save_file({n: part for n, part in tensors.items() if not n.endswith("g_idx")}, folder / "model.safetensors")
    out = stock.merged(tmp_path / "out", folder, adapter, "gptq")
    expected = stock.tensors(stock.merged(tmp_path / "with", base("gptq"), adapter, "gptq"))
    written = stock.tensors(out)
    untouched = {n for n in expected if n.endswith("g_idx") and "q_proj" not in n and "down_proj" not in n}
    assert stock.differing(expected, written) == sorted(untouched), "weights that are copied stay as they were"


def test_preserve_beats_nearest_on_the_demo_model(tmp_path: Path) -> None:
    ratios = {}
    for rounding, more in (
        ("nearest", {}),
        ("auto", {"calibration": str(DEMO / "calibration.txt"), "sequence_length": 128}),
    ):
        out, inputs = tmp_path / rounding, {"base": str(DEMO / "base-nf4"), "adapter": str(DEMO / "adapter")}
        qmerge.merge(**inputs, target="gptq", rounding=rounding, **more, out=str(out), quiet=True)
        record = qmerge.fidelity(
            out=str(out), text=str(DEMO / "heldout.txt"), sequence_length=128, tokens=4096, quiet=True
        )
        ratios[rounding] = record.kl_ratio or 1.0
    assert ratios["auto"] < ratios["nearest"] / 5, ratios


@pytest.mark.parametrize("scales", ["keep", "fresh"])
def test_a_delta_past_the_ends_of_the_scales_is_said(base: Made, tmp_path: Path, cli: Cli, scales: str) -> None:
    adapter = models.adapter(models.llama(torch.float32, **bases.LLAMA), tmp_path / "large", size=0.1)
    run = (
        "--base",
        base("gptq-8bit"),
        "--adapter",
        adapter,
        "--target",
        "gptq",
        "--rounding",
        "nearest",
        "--scales",
        scales,
    )
    ran = cli(*run, "--out", tmp_path / "out")
    assert ran.code == 0 and ("past the ends of the base's scales" in ran.err) == (scales == "keep"), ran.err


@pytest.fixture
def ruled(base: Made, tmp_path: Path) -> Path:
    """A base with rules for single modules, as gptqmodel's ``dynamic`` has them: down_proj in 8 bits and groups of 32, v_proj
    dense."""
    folder, other = shutil.copytree(base("gptq"), tmp_path / "ruled"), bases.make("gptq-8bit", tmp_path / "other")
    tensors, more = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
    values = bases.values(base("gptq"))
    for name in [n for n in tensors if "v_proj" in n]:
        del tensors[name]
    tensors |= {name: part for name, part in more.items() if "down_proj" in name}
    tensors |= {name: value.to(torch.bfloat16) for name, value in values.items() if "v_proj" in name}
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    rules = {r"+:.*down_proj": {"bits": 8}, r"-:.*v_proj": {}}
    models.edit_json(folder / "config.json", quantization_config={**config, "dynamic": rules})
    with_tokenizer(folder)
    return folder


def with_tokenizer(folder: Path) -> None:
    """Add a tokenizer: gptqmodel does not load a folder without one."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "base-nf4" / name, folder)


@pytest.mark.parametrize("scales", ["keep", "fresh"])
def test_rules_for_single_modules_survive(ruled: Path, adapter: Path, tmp_path: Path, scales: str) -> None:
    """gptqmodel loads the output by its config, with the values that qmerge reads."""
    from gptqmodel import BACKEND, GPTQModel

    out = stock.merged(tmp_path / "out", ruled, adapter, "gptq", scales=scales)
    config = bases.quantization_config(out)
    assert config["bits"] == 4 and "-:^model\\.layers\\.0\\.self_attn\\.v_proj$" in config["dynamic"]
    eight = {rule for rule, changes in config["dynamic"].items() if changes.get("bits") == 8}
    assert eight == {f"+:^model\\.layers\\.{layer}\\.mlp\\.down_proj$" for layer in (0, 1)}
    values = {**bases.values(ruled), **read(out)}
    dense = {
        name: tensor.float() for name, tensor in stock.tensors(out).items() if name in values and name not in read(out)
    }
    model = GPTQModel.load(str(out), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model
    for layer in model.modules():
        if hasattr(layer, "qweight"):
            layer.scales = layer.scales.float()
    expected = models.logits(stock.float_model(out, like={**values, **dense}))
    with torch.compiler.set_stance("force_eager"):
        assert stock.distance(models.logits(model.float()), expected) < 1e-3


# --- labels that lie -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "label"), [("gptq", "gptq_v2"), ("gptq-v2", "gptq"), ("gptq-8bit", "gptq_v2")])
def test_symmetric_zeros_say_which_convention(
    base: Made, adapter: Path, tmp_path: Path, cli: Cli, kind: str, label: str
) -> None:
    """The label is ignored, with a warning; the output has the right one."""
    folder = shutil.copytree(base(kind), tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    right = config["checkpoint_format"]
    models.edit_json(
        folder / "config.json", quantization_config={**config, "checkpoint_format": label, "format": label}
    )
    assert stock.differing(read(folder), bases.oracle(base(kind))) == []
    ran = cli(
        "--base", folder, "--adapter", adapter, "--target", "gptq", "--rounding", "nearest", "--out", tmp_path / "out"
    )
    assert ran.code == 0 and f"labelled '{label}'" in ran.err and f"'{right}'" in ran.err
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written["checkpoint_format"] == right
    assert stock.differing(read(tmp_path / "out"), bases.oracle(tmp_path / "out")) == []


# --- bad inputs ------------------------------------------------------------------------------------------------------

Damage = Callable[[dict[str, Tensor], dict[str, Any]], None]
FIRST = "model.layers.0.self_attn.q_proj"


def without(local: str) -> Damage:
    def damage(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        del tensors[f"{FIRST}.{local}"]

    return damage


def with_config(**changes: Any) -> Damage:
    return lambda tensors, config: config.update(changes)


def put(local: str, change: Callable[[Tensor], Tensor]) -> Damage:
    def damage(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        tensors[f"{FIRST}.{local}"] = change(tensors[f"{FIRST}.{local}"]).contiguous()

    return damage


def twice(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors |= {f"{FIRST}.SCB": torch.ones(256), f"{FIRST}.weight": torch.zeros(256, 256, dtype=torch.int8)}


def mixed(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    for local in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{FIRST}.{local}"]
    twice(tensors, config)


DAMAGED: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "wrong_bits": (with_config(bits=8), ("4 bits", "config says 8", "down_proj")),
    "wrong_group_size": (with_config(group_size=64), ("groups of 64", "makes 6 for 384 inputs", "there are 3")),
    "missing_scales": (without("scales"), (f"{FIRST}.scales is missing",)),
    "missing_zeros": (without("qzeros"), (f"{FIRST}.qzeros is missing",)),
    "g_idx_too_large": (put("g_idx", lambda t: t + 1), ("g_idx holds 1 to 2", "2 groups", "0 to 1")),
    "g_idx_negative": (put("g_idx", lambda t: t - 1), ("g_idx holds -1 to 0",)),
    "g_idx_too_short": (put("g_idx", lambda t: t[:-1]), ("g_idx has shape [255]", "[256]")),
    "other_zeros": (put("qzeros", lambda t: t + 0x11111111 * 2), ("sym", "stored as 9 to 9", '"sym": false')),
    "scales_of_nan": (put("scales", lambda t: t * float("nan")), ("scales holds NaN",)),
    "scales_as_integers": (put("scales", lambda t: t.int()), ("scales is I32", "F16")),
    "other_shape": (put("qweight", lambda t: t[:, :-1]), ("do not belong to one GPTQ weight",)),
    "mixed_formats": (mixed, ("mixes several quantized formats",)),
    "stored_twice": (twice, (f"{FIRST}.weight", "twice", "gptq", "int8")),
    "no_config": (lambda tensors, config: config.clear(), ("quant",)),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_bases_are_refused(base: Made, adapter: Path, tmp_path: Path, cli: Cli, name: str) -> None:
    damage, words = DAMAGED[name]
    folder = shutil.copytree(base("gptq"), tmp_path / "base")
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    damage(tensors, config["quantization_config"])
    if not config["quantization_config"]:
        (folder / "quantize_config.json").unlink()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    before = snapshot(tmp_path)
    ran = cli("--base", folder, "--adapter", adapter, "--target", "gptq", "--out", tmp_path / "out")
    assert isinstance(ran.error, CheckpointError) and ran.code == 3, ran.err
    assert all(word in ran.err for word in words), ran.err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--bits", "5"), ("--bits 5", "2, 3, 4, 8")),
        (("--group-size", "100"), ("--group-size 100", "32, 64, 128, -1")),
        (("--checkpoint-format", "v3"), ("gptq_v2",)),
        (("--static-groups",), ("--act-order",)),
        (("--block-size", "64"), ("--block-size is for fp4, nf4", "gptq")),
    ],
)
def test_bad_options_are_refused(
    dense: Path, adapter: Path, tmp_path: Path, cli: Cli, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    ran = cli("--base", dense, "--adapter", adapter, "--target", "gptq", "--out", tmp_path / "out", *arguments)
    assert isinstance(ran.error, RecipeError) and all(word in ran.err for word in words), ran.err
    assert not (tmp_path / "out").exists()


def test_groups_must_divide(adapter: Path, tmp_path: Path, cli: Cli) -> None:
    """An explicit size is an error that names one that fits; the default is the largest that does."""
    model = models.llama(hidden_size=192, intermediate_size=320)
    base = models.save(model, tmp_path / "base")
    lora = models.adapter(models.llama(torch.float32, hidden_size=192, intermediate_size=320), tmp_path / "lora")
    run = ("--base", base, "--adapter", lora, "--target", "gptq", "--rounding", "nearest")
    ran = cli(*run, "--group-size", "128", "--out", tmp_path / "out")
    assert ran.code == 2 and "inputs, which is not a multiple of the group size 128: use --group-size 64" in ran.err
    assert not (tmp_path / "out").exists()
    ran = cli(*run, "--out", tmp_path / "out")
    assert ran.code == 0 and "4 bits, groups of 64, symmetric" in ran.err
    assert bases.quantization_config(tmp_path / "out")["group_size"] == 64


def test_sizes_that_no_loader_takes(lora: Path, tmp_path: Path, cli: Cli) -> None:
    base = models.save(models.llama(hidden_size=192, intermediate_size=136), tmp_path / "base")
    lora = models.adapter(models.llama(torch.float32, hidden_size=192, intermediate_size=136), tmp_path / "lora")
    ran = cli("--base", base, "--adapter", lora, "--target", "gptq", "--group-size", "-1", "--out", tmp_path / "out")
    assert ran.code == 2 and "multiples of 32" in ran.err and "136" in ran.err, ran.err


@pytest.mark.parametrize("target", ["gptq", "awq"])
def test_small_layers_stay_dense(tmp_path: Path, target: str) -> None:
    """One row per head (Qwen 3.5's in_proj_a): the config names it, and transformers leaves it dense, too."""
    pytest.importorskip("gptqmodel")
    small = {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 4}  # k_proj and v_proj have 4 rows
    base = models.save(models.llama(**small), tmp_path / "base")
    lora = models.adapter(models.llama(torch.float32, **small), tmp_path / "lora", target_modules=["k_proj", "up_proj"])
    out = stock.merged(tmp_path / "out", base, lora, target, group_size=32)
    stored = stock.tensors(out)
    assert "model.layers.0.mlp.up_proj.qweight" in stored
    kernel = GPTQConfig(bits=4, backend="gptq_torch") if target == "gptq" else AwqConfig(backend="torch_awq")
    model, info = AutoModelForCausalLM.from_pretrained(
        out, quantization_config=kernel, device_map="cpu", output_loading_info=True
    )
    assert not any(info.values()), info
    loaded = model.model.layers[0].self_attn.k_proj
    assert type(loaded) is torch.nn.Linear
    assert torch.equal(loaded.weight.float(), stored["model.layers.0.self_attn.k_proj.weight"].float())


def test_options_of_the_base_are_taken_over() -> None:
    base = GptqOptions(bits=3, group_size=64, sym=False, checkpoint_format="gptq")
    assert FORMAT.options({}, base, "BF16") == base
    assert FORMAT.options({"sym": False}, None, "BF16").checkpoint_format == "gptq_v2"
