"""AWQ: qmerge reads gptqmodel's files bit for bit, and gptqmodel dequantizes qmerge's to the same values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qmerge.checkpoint.scan import scan
from qmerge.errors import CheckpointError, RecipeError
from qmerge.formats import awq
from qmerge.formats._packing import pack_bits
from qmerge.formats.awq import FORMAT, AwqOptions
from qmerge.formats.base import ModuleLayout
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Rows

from .. import models
from ..formats.test_grids import grid_for
from . import bases, stock
from .bnb import same
from .reading import read

pytest.importorskip("gptqmodel")
KINDS = ["awq", "awq-g32"]
CPU = torch.device("cpu")
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base of every kind, the dense one, adapters on all and on some layers, and a merged model."""
    home = tmp_path_factory.mktemp("awq")
    paths = {kind: bases.make(kind, home / kind) for kind in KINDS}
    paths["dense"] = models.save(models.llama(torch.float16, **bases.LLAMA), home / "dense")
    full = models.llama(torch.float32, **bases.LLAMA)
    paths["all"] = models.adapter(full, home / "all")
    paths["some"] = models.adapter(full, home / "some", target_modules=["q_proj", "down_proj"])
    paths["written"] = stock.merged(home / "written", paths["dense"], paths["all"], "awq", group_size=64)
    return paths


@pytest.mark.parametrize("step", [0, 8, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_reads_what_gptqmodel_reads(kind: str, step: int, folders: dict[str, Path]) -> None:
    oracle = bases.oracle(folders[kind])
    assert len(oracle) == 14 and not stock.differing(read(folders[kind], step), oracle)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_those_that_gptqmodel_unpacks(kind: str, folders: dict[str, Path]) -> None:
    from gptqmodel.quantization.awq.utils.packing_utils import reverse_awq_order, unpack_awq

    parts = load_file(folders[kind] / "model.safetensors")
    fields = unpack_awq(parts[f"{Q_PROJ}.qweight"], parts[f"{Q_PROJ}.qzeros"], 4)
    codes_IO, zeros_GO = (part & 15 for part in reverse_awq_order(*fields, 4))
    with Reader() as reader:
        stored = FORMAT.open(scan(folders[kind], reader).weights[f"{Q_PROJ}.weight"], reader, CPU)
        assert torch.equal(stored.codes(Rows(0, 256)).int(), codes_IO.T)
        assert torch.equal(stored.grid.zero_OG.int(), zeros_GO.T)


def test_control_another_order_of_fields_differs(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = bases.oracle(folders["awq"])
    monkeypatch.setattr(awq, "FIELD_OF_ROW", list(range(8)))
    assert stock.differing(read(folders["awq"]), oracle)


def test_packs_as_gptqmodel_does() -> None:
    from gptqmodel.quantization.awq.utils.packing_utils import pack_awq

    codes_XO = torch.randint(0, 16, (24, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    expected, _ = pack_awq(codes_XO.int(), codes_XO.int(), 4)
    assert same(awq.pack_rows(codes_XO), expected)
    assert torch.equal(awq.unpack_rows(expected), codes_XO)
    assert not torch.equal(pack_bits(codes_XO, 4), expected)


# --- writing ---------------------------------------------------------------------------------------------------------


def test_gptqmodel_reads_the_same_values(folders: dict[str, Path]) -> None:
    oracle = bases.oracle(folders["written"])
    assert len(oracle) == 14 and not stock.differing(read(folders["written"]), oracle)


def test_codes_are_nearest_to_the_merged_weight(folders: dict[str, Path]) -> None:
    """Within half a step of base + peft's delta, or at an end of the range."""
    deltas = stock.deltas(models.llama(torch.float32, **bases.LLAMA), folders["all"])
    dense = load_file(folders["dense"] / "model.safetensors")
    parts = load_file(folders["written"] / "model.safetensors")
    oracle = bases.oracle(folders["written"])
    for name, stored_OI in oracle.items():
        merged_OI = dense[name].float() + deltas[name]
        scale_OG = parts[name.replace("weight", "scales")].float().T
        zero_OG = awq.unpack_rows(parts[name.replace("weight", "qzeros")]).float().T
        scale_OI, zero_OI = (part.repeat_interleave(64, dim=1) for part in (scale_OG, zero_OG))
        code_OI = (merged_OI / scale_OI + zero_OI).round().clamp(0, 15)
        assert float(((code_OI - zero_OI) * scale_OI != stored_OI).float().mean()) < 1e-3, name  # ties
        assert float((stored_OI - merged_OI).norm() / merged_OI.norm()) < 0.1


def test_fits_better_than_the_extremes(folders: dict[str, Path]) -> None:
    """The library's rule (AutoAWQ's pseudo_quantize_tensor): scales from the extremes of every group."""
    weight_OI = load_file(folders["dense"] / "model.safetensors")[f"{Q_PROJ}.weight"].float()
    groups_OGN = weight_OI.view(len(weight_OI), -1, 64)
    low, high = groups_OGN.amin(-1, keepdim=True), groups_OGN.amax(-1, keepdim=True)
    scale = (high - low) / 15
    zero = (-low / scale).round().clamp(0, 15)
    theirs = (((groups_OGN / scale + zero).round().clamp(0, 15) - zero) * scale).view_as(weight_OI)
    grid = grid_for("awq", weight_OI, group_size=64)
    ours = grid.decode(grid.nearest(weight_OI))
    assert float((ours - weight_OI).norm()) < 0.97 * float((theirs - weight_OI).norm())


def test_scales_depend_on_the_inputs() -> None:
    values_OI = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    inputs_I = torch.where(torch.arange(64) < 8, 100.0, 0.01)
    errors = []
    for seen in (None, inputs_I):
        grid = grid_for("awq", values_OI, seen, group_size=64)
        error_OI = grid.decode(grid.nearest(values_OI)) - values_OI
        errors.append(float((error_OI.square() * inputs_I).sum()))
    assert errors[1] < 0.7 * errors[0]


def test_config_is_as_autoawq_writes_it(folders: dict[str, Path]) -> None:
    assert bases.quantization_config(folders["written"]) == bases.quantization_config(folders["awq"])
    config = FORMAT.quantization_config(AwqOptions(), {}, "float16", ModuleLayout(("a",), ("b.c",)))
    assert config is not None and config["modules_to_not_convert"] == ["b.c"]


def test_same_format_keeps_scales(folders: dict[str, Path], tmp_path: Path) -> None:
    for kind in KINDS:
        out = stock.merged(tmp_path / kind, folders[kind], folders["some"], "awq")
        before, after = stock.tensors(folders[kind]), stock.tensors(out)
        changed = stock.differing(before, after)
        assert changed == sorted(n for n in before if n.endswith("qweight") and ("q_proj" in n or "down_proj" in n))
        assert bases.quantization_config(out) == bases.quantization_config(folders[kind])


def test_to_bf16_and_back_to_float(folders: dict[str, Path], tmp_path: Path) -> None:
    out = stock.merged(tmp_path / "out", folders["awq"], folders["some"], "fp32")
    deltas = stock.deltas(models.llama(torch.float32, **bases.LLAMA), folders["some"])
    stored, oracle = stock.tensors(out), bases.oracle(folders["awq"])
    for name in oracle:
        expected = oracle[name] + deltas.get(name, 0.0)
        assert float((stored[name] - expected).abs().max()) < 1e-6


def test_the_stock_loader_reads_it(folders: dict[str, Path]) -> None:
    """gptqmodel computes in float16: each linear layer is off by 2**-11 of its inputs and weights; 14 in a row."""
    model, info = bases.loads(folders["written"])
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = models.logits(stock.float_model(folders["written"], bases.values(folders["written"])))
    assert stock.distance(models.logits(model), expected) < 14 * 2**-11
    unmerged = models.logits(stock.float_model(folders["dense"]))
    assert stock.distance(unmerged, expected) > 14 * 2**-11


# --- old folders, bad bases ----------------------------------------------------------------------------------


def test_old_folders_have_a_config_of_their_own(folders: dict[str, Path], tmp_path: Path) -> None:
    old = changed(folders["awq"], tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    del config["quantization_config"]
    (old / "config.json").write_text(json.dumps(config))
    (old / "quant_config.json").write_text(
        json.dumps({"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"})
    )
    assert not stock.differing(read(old), bases.oracle(folders["awq"]))
    out = stock.merged(tmp_path / "out", old, folders["some"], "awq")
    assert bases.quantization_config(out) == bases.quantization_config(folders["awq"])


def changed(
    folder: Path, out: Path, edit: Callable[[dict[str, torch.Tensor]], None] | None = None, **config: Any
) -> Path:
    """A copy with other tensors, and with changes to quantization_config."""
    out.mkdir()
    tensors = load_file(folder / "model.safetensors")
    if edit:
        edit(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text((folder / "config.json").read_text())
    models.edit_json(out / "config.json", quantization_config={**bases.quantization_config(folder), **config})
    return out


def narrow(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q_PROJ}.qzeros"] = tensors[f"{Q_PROJ}.qzeros"][:, :-1].contiguous()


def as_floats(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q_PROJ}.qzeros"] = tensors[f"{Q_PROJ}.qzeros"].float()


def damage(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q_PROJ}.scales"][0, 0] = torch.nan


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (None, {"version": "gemv"}, "layout 'gemv'; qmerge reads 'gemm'"),
    (None, {"bits": 8}, "AWQ with 8 bits; qmerge reads AWQ with 4"),
    (None, {"group_size": 128}, "groups of 128, but there are 6 for 384 inputs.*config.json that belongs"),
    (None, {"group_size": -1}, "groups of -1"),
    (None, {"group_size": "64"}, "group_size.*found '64'"),
    (lambda tensors: tensors.pop(f"{Q_PROJ}.scales"), {}, f"{Q_PROJ}.scales is missing"),
    (lambda tensors: tensors.pop(f"{Q_PROJ}.qzeros"), {}, f"{Q_PROJ}.qzeros is missing"),
    (narrow, {}, "do not belong to one AWQ weight"),
    (as_floats, {}, f"{Q_PROJ}.qzeros is F32, expected I32"),
    (damage, {}, f"{Q_PROJ}.scales holds NaN"),
]


@pytest.mark.parametrize(("edit", "config", "message"), BAD, ids=[message[:24] for _, _, message in BAD])
def test_bad_bases(edit: Any, config: dict[str, Any], message: str, folders: dict[str, Path], tmp_path: Path) -> None:
    base = changed(folders["awq"], tmp_path / "bad", edit, **config)
    with pytest.raises(CheckpointError, match=message):
        stock.merged(tmp_path / "out", base, folders["some"], "awq")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"group_size": 48}, "--group-size 48: awq supports 32, 64, 128, -1"),
        ({"bits": 8}, "--bits is for .*, but the target is awq"),
        ({"sym": True}, "--sym is for"),
    ],
)
def test_bad_recipes(asked: dict[str, Any], message: str, folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        stock.merged(tmp_path / "out", folders["dense"], folders["all"], "awq", **asked)
    assert not (tmp_path / "out").exists()


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(
        RecipeError, match=r"x.weight has 96 inputs, which is not a multiple of .* 64: use --group-size 32"
    ):
        FORMAT.check("x.weight", (64, 96), AwqOptions(64))
    with pytest.raises(RecipeError, match=r"x.weight has 63 outputs.*multiple of 8; use --target w4a16 or nf4"):
        FORMAT.check("x.weight", (63, 64), AwqOptions(64))
    assert FORMAT.options_for_model({}, [(64, 96), (64, 128)]) == {"group_size": 32}
    assert FORMAT.options_for_model({}, [(64, 100)]) == {"group_size": -1}


def test_gptq_folders_are_not_awqs() -> None:
    with Reader() as reader:
        assert FORMAT.find({}, reader, {"quant_method": "gptq"}) == [] and FORMAT.find({}, reader) == []
