"""Other bases: MXFP4 experts, HQQ and torchao (the last two are only read), each bit for bit as its own library reads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qmerge.checkpoint.scan import scan
from qmerge.errors import CheckpointError, RecipeError
from qmerge.formats import get_format
from qmerge.formats.base import TargetFormat
from qmerge.safetensors_io.header import read_header
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Rows

from .. import models
from ..conftest import Cli
from . import bases, stock
from .reading import read
from .test_fp8 import BOUND, FEW, Damage, refused

FAMILIES = ("mxfp4", "hqq", "torchao")
KINDS = [kind for kind, settings in bases.KINDS.items() if settings["family"] in FAMILIES]
LINEAR = [kind for kind in KINDS if kind != "mxfp4"]
Q, EXPERTS = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts"

Made = Callable[[str], Path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """As the stock libraries write it."""
    folder = tmp_path_factory.mktemp("bases")

    @cache
    def make(kind: str) -> Path:
        pytest.importorskip(bases.needs(kind))
        return bases.make(kind, folder / kind)

    return make


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """``adapter("llama")``, ``adapter("gpt-oss")``: on some of the linear layers."""
    folder = tmp_path_factory.mktemp("adapters")

    @cache
    def make(name: str) -> Path:
        return models.adapter(
            dense_model(name), folder / name, target_modules=list(FEW[:1] if name == "gpt-oss" else FEW)
        )

    return make


def dense_model(name: str) -> Any:
    return bases.gpt_oss(0).float() if name == "gpt-oss" else models.llama(torch.float32, **bases.LLAMA)


def of(kind: str) -> str:
    return "gpt-oss" if kind == "mxfp4" else "llama"


def goal_of(kind: str, folder: Path, adapter: Path) -> dict[str, Tensor]:
    """float32: every value of a quantized base as its library reads it, plus peft's delta."""
    values = bases.values(folder)
    if kind == "mxfp4":  # whose biases are in the modules of the quantized experts
        tensors, _ = bases.read_tensors(folder)
        for name, tensor in tensors.items():
            if name.endswith("_bias"):
                values[name] = tensor.float()
    for name, delta in stock.deltas(dense_model(of(kind)), adapter).items():
        values[name] = values[name] + delta
    return {name: value for name, value in values.items() if not name.endswith(("_blocks", "_scales"))}


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [0, 1, 40])
def test_values_are_the_librarys(base: Made, kind: str, block: int) -> None:
    expected = bases.oracle(base(kind))
    assert len(expected) == (4 if kind == "mxfp4" else 14)
    assert stock.differing(read(base(kind), block), expected) == []
    assert stock.differing(read(base(kind), block, decoded=True), expected) == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_belongs_to_its_weight(base: Made, kind: str) -> None:
    """Settings and all: tensors that are left over would be copied into a model that has no use for them."""
    with Reader() as reader:
        weights = scan(base(kind), reader).weights.values()
    left = {name for weight in weights if weight.format not in FAMILIES for name in weight.parts}
    assert left == (
        {"weight", "bias", "sinks", "gate_up_proj_bias", "down_proj_bias"} if kind == "mxfp4" else {"weight"}
    )


def test_scales_of_experts_at_their_ends(tmp_path: Path, base: Made) -> None:
    """No scale is NaN: 0 is 2^-127, and 255 is 2^128, which only makes 0 and 0.5 finite."""
    folder = shutil.copytree(base("mxfp4"), tmp_path / "base")
    tensors, metadata = bases.read_tensors(folder)
    tensors[f"{EXPERTS}.down_proj_scales"][0, 0, :2] = torch.tensor([0, 255], dtype=torch.uint8)
    tensors[f"{EXPERTS}.down_proj_blocks"][0, 0, 1] = torch.arange(16, dtype=torch.uint8) % 2 * 17
    save_file(tensors, folder / "model.safetensors", metadata)
    values = read(folder)[f"{EXPERTS}.down_proj"]
    assert stock.differing({"w": values}, {"w": bases.oracle(folder)[f"{EXPERTS}.down_proj"]}) == []
    assert bool(values.isfinite().all()) and float(values[0, 32:64, 0].max()) == 2.0**127


def test_high_nibble_first_would_be_wrong(tmp_path: Path, base: Made) -> None:
    """The control: the same bytes with their halves exchanged."""
    folder = shutil.copytree(base("mxfp4"), tmp_path / "base")
    tensors, metadata = bases.read_tensors(folder)
    name = f"{EXPERTS}.gate_up_proj"
    tensors[f"{name}_blocks"] = tensors[f"{name}_blocks"] << 4 | tensors[f"{name}_blocks"] >> 4
    save_file(tensors, folder / "model.safetensors", metadata)
    assert not torch.equal(read(folder)[name], read(base("mxfp4"))[name])


@pytest.mark.parametrize(
    "settings",
    [
        {"view_as_float": True}, {"view_as_float": True, "nbits": 3}, {"nbits": 1, "group_size": 32}, {"group_size": None},
        {"nbits": 3, "group_size": None, "axis": 0}, {"nbits": 2, "axis": 0, "group_size": 48},
    ],
    ids=str,
)  # fmt: skip
def test_other_layouts_of_hqq(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Words under a float dtype, one bit, no groups, and groups whose stride is no whole number of rows."""
    core = pytest.importorskip("hqq.core.quantize")
    torch.manual_seed(0)
    layer = torch.nn.Linear(96, 40, bias=False).bfloat16()
    config = core.BaseQuantizeConfig(**{"nbits": 4, "group_size": 64, "axis": 1, **settings})
    made = core.HQQLinear(layer, config, compute_dtype=torch.bfloat16, device="cpu", del_orig=False)
    path = tmp_path / "model.safetensors"
    save_file(
        {f"layer.{name}": part.contiguous() for name, part in made.state_dict().items() if part is not None}, path
    )
    hqq = get_format("hqq")
    with Reader() as reader:
        (weight,) = hqq.find(read_header(path, CheckpointError)[0], reader)
        stored = hqq.open(weight, reader, torch.device("cpu"))
        values_OI = torch.cat([stored.values(Rows(at, at + 8)) for at in range(0, 40, 8)])
    meta = {**made.meta, "scale": made.meta["scale"].float(), "zero": made.meta["zero"].float()}
    expected = core.Quantizer.dequantize(made.W_q.data, {**meta, "compute_dtype": torch.float32})
    assert torch.equal(values_OI, expected)


# --- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["bf16", "fp32"])
def test_merged_is_base_plus_delta(base: Made, adapter: Made, tmp_path: Path, kind: str, target: str) -> None:
    """Rounded once; nothing of the quantized model is left, and transformers loads it."""
    lora = adapter(of(kind))
    out = stock.merged(tmp_path / "out", base(kind), lora, target)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[target]
    goal = {name: value.to(dtype) for name, value in goal_of(kind, base(kind), lora).items()}
    assert stock.differing(stock.tensors(out), goal) == []
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    model, info = stock.loaded(out)
    assert not any(info.values()), info
    assert bool(models.logits(model).isfinite().all())


def test_experts_are_what_transformers_dequantizes(base: Made, adapter: Made, tmp_path: Path) -> None:
    """The MXFP4 model in bfloat16 with peft's unmerged adapter, against our merged model."""
    out = stock.merged(tmp_path / "out", base("mxfp4"), adapter("gpt-oss"), "bf16")
    theirs, info = bases.loads(base("mxfp4"))
    assert not any(info.values()), info
    state, written = theirs.state_dict(), stock.tensors(out)
    experts = [name for name in written if name.endswith(("gate_up_proj", "down_proj"))]
    assert len(experts) == 4
    assert stock.differing({n: written[n].float() for n in experts}, {n: state[n].float() for n in experts}) == []
    ours, without = models.logits(stock.in_float32(stock.loaded(out)[0])), models.logits(theirs)
    difference = stock.distance(ours, models.logits(stock.adapted(theirs, adapter("gpt-oss"))))
    assert difference < 2**-8, "only the merged layers are rounded, to bfloat16"
    assert stock.distance(ours, without) > 4 * difference, "the control: without the adapter"


@pytest.mark.parametrize("kind", [kind for kind in LINEAR if kind in bases.LOADABLE])
def test_bases_load_in_transformers_with_these_values(base: Made, kind: str) -> None:
    """The values that qmerge reads are those that the stock loader computes with."""
    model, info = bases.loads(base(kind))
    assert not any(info.values()), info
    like = {**bases.values(base(kind)), **read(base(kind))}
    expected = models.logits(stock.float_model(base(kind), like=like))
    assert stock.distance(models.logits(model), expected) < (BOUND if kind in bases.EXACT else 0.01)


@pytest.mark.parametrize("kind", ["hqq", "hqq-3bit", "torchao-int8", "torchao-fp8"])
@pytest.mark.parametrize("target", ["int8", "nf4"])
def test_written_in_another_format(base: Made, adapter: Made, tmp_path: Path, kind: str, target: str) -> None:
    """A quantized target: bitsandbytes reads values near base + delta, and its loader finds all tensors."""
    lora = adapter("llama")
    out = stock.merged(tmp_path / "out", base(kind), lora, target)
    model, info = stock.loaded(out)
    assert not any(info.values()), info
    goal, values = goal_of(kind, base(kind), lora), stock.weights_of(model)
    for name in (f"{Q}.weight", "model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        assert stock.distance(values[name], goal[name]) < (0.02 if target == "int8" else 0.12), name


@pytest.mark.parametrize("name", ["hqq", "torchao"])
def test_no_targets(base: Made, adapter: Made, tmp_path: Path, cli: Cli, name: str) -> None:
    assert not isinstance(get_format(name), TargetFormat)
    kind = next(kind for kind in KINDS if bases.KINDS[kind]["family"] == name)
    ran = cli("--base", base(kind), "--adapter", adapter(of(kind)), "--target", name, "--out", tmp_path / "out")
    assert isinstance(ran.error, RecipeError) and name in ran.err and not (tmp_path / "out").exists()


# --- bad inputs ------------------------------------------------------------------------------------------------------


def without(name: str) -> Damage:
    return lambda tensors, config: tensors.pop(name)


def put(name: str, change: Callable[[Tensor], Tensor]) -> Damage:
    def damage(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        tensors[name] = change(tensors[name])

    return damage


def both_formats(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors["model.layers.0.mlp.gate_proj.SCB"] = torch.ones(384)
    tensors["model.layers.0.mlp.gate_proj.weight"] = torch.zeros(384, 256, dtype=torch.int8)


def no_config(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config.clear()


DAMAGED: dict[str, tuple[str, Damage, tuple[str, ...]]] = {
    "mxfp4_no_scales": ("mxfp4", without(f"{EXPERTS}.down_proj_scales"), ("down_proj_scales is missing", "Download")),
    "mxfp4_no_blocks": ("mxfp4", without(f"{EXPERTS}.down_proj_blocks"), ("down_proj_scales", "parts", "Download")),
    "mxfp4_other_shape": ("mxfp4", put(f"{EXPERTS}.down_proj_scales", lambda t: t[:, :-1]), ("[4, 63, 3]", "[E, O, I/32]")),
    "mxfp4_no_config": ("mxfp4", no_config, ("stored as mxfp4", "quant_method None")),
    "hqq_no_codes": ("hqq", without(f"{Q}.W_q"), (Q, "parts", "Download")),
    "hqq_no_zero": ("hqq", without(f"{Q}.zero"), (f"{Q}.zero is missing", "Download")),
    "hqq_no_shape": ("hqq", without(f"{Q}.shape"), (f"{Q}.shape is missing",)),
    "hqq_scale_of_nan": ("hqq", put(f"{Q}.scale", lambda t: t * torch.nan), (f"{Q}.scale holds NaN",)),
    "hqq_too_few_scales": ("hqq", put(f"{Q}.scale", lambda t: t[:-1]), ("scale [1023, 1]", "1024 scales")),
    "hqq_too_few_codes": ("hqq", put(f"{Q}.W_q", lambda t: t[:-1]), ("W_q [511, 64]", "512 rows of 64")),
    "hqq_other_packing": ("hqq", put(f"{Q}.packing", lambda t: t + 1), ("packing '5cju`v9'", "4bit_u8")),
    "hqq_other_axis": ("hqq", put(f"{Q}.axis", lambda t: t + 1), ("axis 2", "axis 0 or 1")),
    "hqq_mixed": ("hqq", both_formats, ("stored twice", "hqq", "int8")),
    "hqq_no_config": ("hqq", no_config, ("stored as hqq", "quant_method None")),
    "torchao_no_scale": ("torchao-int8", without(f"{Q}._weight_scale"), ("_weight_scale", "missing", "Download")),
    "torchao_no_zero": ("torchao-int8", without(f"{Q}._weight_zero_point"), ("_weight_zero_point", "missing")),
    "torchao_no_codes": ("torchao-int8", without(f"{Q}._weight_qdata"), (f"{Q}._weight", "parts")),
    "torchao_scale_of_nan": ("torchao-int8", put(f"{Q}._weight_scale", lambda t: t * torch.nan), ("holds NaN",)),
    "torchao_wrong_groups": ("torchao-int8-g32", put(f"{Q}._weight_scale", lambda t: t[:, :4]), ("[256, 4]", "[256, 8]")),
    "torchao_other_codes": ("torchao-int8", put(f"{Q}._weight_qdata", lambda t: t.int()), ("I32", "I8 [O, I]")),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_bases_are_refused(base: Made, adapter: Made, tmp_path: Path, cli: Cli, name: str) -> None:
    kind, damage, words = DAMAGED[name]
    target = "fp32" if "nan" in name else "bf16"
    refused(base(kind), damage, words, adapter(of(kind)), tmp_path, cli, target)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda declared: declared.clear(), ("metadata", "which of torchao's classes", "Download")),
        (lambda declared: declared.update(_type="Int4Tensor"), ("Int4Tensor, which is not read", "Int8Tensor")),
        (lambda declared: declared["_data"].update(block_size=[1]), ("block_size is [1]", "two positive integers")),
        (lambda declared: declared["_data"].update(block_size=[1, 100]), ("1 x 100", "do not divide", "256 x 256")),
        (
            lambda declared: declared["_tensor_data_names"].append("act_pre_scale"),
            ("_weight_act_pre_scale, which is missing",),
        ),
    ],
    ids=["none", "other_class", "short_block", "odd_block", "more_parts"],
)
def test_metadata_of_torchao_is_checked(
    base: Made, adapter: Made, tmp_path: Path, cli: Cli, change: Callable[[Any], Any], words: tuple[str, ...]
) -> None:
    folder = shutil.copytree(base("torchao-int8"), tmp_path / "base")
    tensors, metadata = bases.read_tensors(folder)
    declared = json.loads(metadata[f"{Q}.weight"])
    change(declared)
    metadata[f"{Q}.weight"] = json.dumps(declared)
    if not declared:
        del metadata[f"{Q}.weight"]
    save_file(tensors, folder / "model.safetensors", metadata)
    ran = cli("--base", folder, "--adapter", adapter("llama"), "--target", "bf16", "--out", tmp_path / "out")
    assert isinstance(ran.error, CheckpointError) and all(word in ran.err for word in words), ran.err
    assert not (tmp_path / "out").exists()
