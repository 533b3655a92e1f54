# mypy: disable-error-code="import-untyped,import-not-found"
"""MLX: qmerge reads mlx's files bit for bit, mlx dequantizes qmerge's to the same values, and mlx_lm loads and runs them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from torch import Tensor

from qmerge.errors import RecipeError
from qmerge.formats import get_target
from qmerge.formats._fit_scales import by_groups
from qmerge.formats._mlx_scales import fit_mlx, mlx_scales
from qmerge.formats.base import NoOptions
from qmerge.formats.mlx import BITS, FORMAT, GROUP_SIZES, BiasGrid, MlxOptions
from qmerge.safetensors_io.reader import Reader
from qmerge.types import SAFETENSORS_DTYPES, Rows

from .. import models
from ..conftest import Cli
from ..formats.test_grids import gaussian
from . import bases, bnb, stock
from .bases import mlx as oracle
from .reading import read
from .test_fp8 import BOUND, Damage, refused

pytest.importorskip("mlx_lm")
Q_PROJ = "model.layers.0.self_attn.q_proj"
FLOATS = [torch.float32, torch.float16, torch.bfloat16]

Made = Callable[[str], Path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """As mlx writes it; "dense" as transformers does."""
    folder = tmp_path_factory.mktemp("mlx")

    @cache
    def make(kind: str) -> Path:
        if kind == "dense":
            return models.save(models.llama(**bases.LLAMA), folder / kind)
        return bases.make(kind, folder / kind)

    return make


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = models.llama(torch.float32, **bases.LLAMA)
    return models.adapter(model, tmp_path_factory.mktemp("adapter"), target_modules=["q_proj", "down_proj"])


def weight(dtype: torch.dtype, shape: tuple[int, int] = (24, 256)) -> Tensor:
    """With large values, groups of one sign, one of equal values, and one of zeros."""
    values_OI = gaussian(5, shape)
    values_OI[:, ::97] *= 5
    values_OI[0] = values_OI[0].abs()
    values_OI[1] = -values_OI[1].abs()
    values_OI[2], values_OI[3] = 0.25, 0.0
    return values_OI.to(dtype)


# --- one weight ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_mlx_dequantizes_what_qmerge_writes(bits: int, group_size: int, dtype: torch.dtype) -> None:
    options = MlxOptions(bits, group_size, SAFETENSORS_DTYPES[dtype])
    values_OI = weight(dtype).float()
    parts = bnb.fresh(values_OI, "mlx", options)
    grid = FORMAT.grid(FORMAT.scales(values_OI, options), (24, 256), options)
    assert bnb.same(oracle.dequantized(parts, bits, group_size), grid.decode(grid.nearest(values_OI)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_qmerge_reads_what_mlx_quantizes(bits: int, group_size: int, dtype: torch.dtype, tmp_path: Path) -> None:
    parts = oracle.quantized(weight(dtype), bits, group_size)
    path = bnb.saved(parts, tmp_path)
    with Reader() as reader:
        found, stored = bnb.opened(path, "mlx", reader, MlxOptions(bits, group_size))
        assert found.options == MlxOptions(bits, group_size, SAFETENSORS_DTYPES[dtype])
        assert bnb.same(stored.values(Rows(0, 24)), oracle.dequantized(parts, bits, group_size))
        assert torch.equal(stored.values(Rows(7, 16)), stored.values(Rows(0, 24))[7:16])


def test_another_order_of_codes_would_be_wrong() -> None:
    """The control: the same bytes with their halves exchanged."""
    parts = oracle.quantized(weight(torch.float32))
    words = parts["weight"].view(torch.uint8)
    exchanged = {**parts, "weight": (words << 4 | words >> 4).view(torch.uint32)}
    assert not torch.equal(oracle.dequantized(exchanged, 4, 64), oracle.dequantized(parts, 4, 64))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_mlxs_own_choice(bits: int, dtype: torch.dtype) -> None:
    """Scales and biases bit for bit. The codes too in float32; in 16 bits mlx rounds with scales that it has not cast yet, so
    that some codes are not the nearest ones on the grid that it stores."""
    values_OI = weight(dtype)
    parts = oracle.quantized(values_OI, bits)
    groups, _ = by_groups(values_OI.float(), torch.arange(256) // 64, None)
    scale_OG, bias_OG = mlx_scales(groups, 2**bits - 1)
    assert bnb.same(scale_OG.to(dtype), parts["scales"]) and bnb.same(bias_OG.to(dtype), parts["biases"])
    grid = BiasGrid(parts["scales"].float(), parts["biases"].float(), torch.arange(256) // 64, 2**bits)
    nearest_OI = grid.decode(grid.nearest(values_OI.float()))
    theirs_OI = oracle.dequantized(parts, bits, 64)
    if dtype == torch.float32:
        assert torch.equal(nearest_OI, theirs_OI)
    assert float((nearest_OI - values_OI.float()).norm()) <= float((theirs_OI - values_OI.float()).norm())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_fits_better_than_mlx(bits: int, dtype: torch.dtype, weighted: bool) -> None:
    """Squared error on a Gaussian weight, each against mlx's: at most 0.9, by inputs of unequal size too."""
    values_OI = gaussian(6, (64, 512)).to(dtype)
    inputs_I = torch.ones(512)
    if weighted:
        inputs_I = torch.logspace(0, -2, 512)[torch.randperm(512, generator=torch.Generator().manual_seed(0))]
    group_I = torch.arange(512) // 64
    given_inputs_I = inputs_I if weighted else None
    fitted = fit_mlx(values_OI.float(), group_I, bits=bits, dtype=dtype, inputs_I=given_inputs_I)
    grid = BiasGrid(fitted[..., 0].contiguous(), fitted[..., 1].contiguous(), group_I, 2**bits)
    theirs_OI = oracle.dequantized(oracle.quantized(values_OI, bits), bits, 64)
    ours_OI = grid.decode(grid.nearest(values_OI.float()))
    assert cost(ours_OI - values_OI.float(), inputs_I) < 0.9 * cost(theirs_OI - values_OI.float(), inputs_I)


def cost(error_OI: Tensor, inputs_I: Tensor) -> float:
    return float((error_OI.square() * inputs_I).sum())


FP4 = {"mlx_mxfp4": ("mxfp4", 32), "mlx_nvfp4": ("nvfp4", 16)}
"""Target → mlx's mode and size of groups."""


@pytest.mark.parametrize("size", [1.0, 0.02])
@pytest.mark.parametrize("target", FP4)
def test_fp4_is_mlxs(target: str, size: float, tmp_path: Path) -> None:
    """Both ways, with scales at the lower end of FP8's range, too. The error is no larger than mlx's."""
    fmt, (mode, group_size) = get_target(target), FP4[target]
    values_OI = weight(torch.float32) * size
    parts = oracle.quantized(values_OI, 4, group_size, mode)
    theirs_OI = oracle.dequantized(parts, 4, group_size, mode)
    (tmp_path / "theirs").mkdir()
    with Reader() as reader:
        _, stored = bnb.opened(bnb.saved(parts, tmp_path / "theirs"), target, reader, NoOptions())
        assert bnb.same(stored.values(Rows(0, 24)), theirs_OI)
    written = bnb.fresh(values_OI, target, NoOptions())
    grid = fmt.grid(fmt.scales(values_OI, NoOptions()), (24, 256), NoOptions())
    ours_OI = grid.decode(grid.nearest(values_OI))
    assert bnb.same(oracle.dequantized(written, 4, group_size, mode), ours_OI)
    assert float((ours_OI - values_OI).norm()) < 0.99 * float((theirs_OI - values_OI).norm())


@pytest.mark.parametrize("target", FP4)
def test_mlx_lm_runs_fp4(target: str, base: Made, adapter: Path, tmp_path: Path) -> None:
    out = stock.merged(tmp_path / "out", base("dense"), adapter, target)
    assert bases.quantization_config(out)["mode"] == FP4[target][0]
    expected = models.logits(stock.float_model(out, like=read_all(out)))
    assert stock.distance(models.logits(oracle.MlxModel(out)), expected) < BOUND  # type: ignore[arg-type]


@pytest.mark.parametrize("target", FP4)
def test_fp4_keeps_scales(target: str, base: Made, adapter: Path, tmp_path: Path) -> None:
    source = base(target.replace("_", "-"))
    out = stock.merged(tmp_path / "out", source, adapter, target)
    assert stock.differing(stock.tensors(source), stock.tensors(out)) == CHANGED
    assert bases.quantization_config(out) == bases.quantization_config(source)


def test_fp4_scales_that_are_nan(base: Made, adapter: Path, tmp_path: Path, cli: Cli) -> None:
    for kind, code in (("mlx-mxfp4", 255), ("mlx-nvfp4", 0x7F)):
        (tmp_path / kind).mkdir()
        damage = put(f"{Q_PROJ}.scales", lambda t, code=code: torch.full_like(t, code))  # type: ignore[misc]
        refused(base(kind), damage, (f"{Q_PROJ}.scales holds NaN",), adapter, tmp_path / kind, cli, "fp32")


# --- models ----------------------------------------------------------------------------------------------------------

CHANGED = [f"model.layers.{layer}.{name}.weight" for layer in (0, 1) for name in ("mlp.down_proj", "self_attn.q_proj")]
"""Tensors that the adapter changes in an MLX model."""


KINDS = [kind for kind, settings in bases.KINDS.items() if settings["family"] == "mlx"]


@pytest.mark.parametrize("block", [0, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_mlxs(kind: str, block: int, base: Made) -> None:
    expected = bases.oracle(base(kind))
    assert len(expected) == 16, "14 linear layers, the embedding and lm_head"
    assert stock.differing(read(base(kind), block), expected) == []


def test_mlx_lm_runs_what_qmerge_writes(base: Made, adapter: Path, tmp_path: Path) -> None:
    out = stock.merged(tmp_path / "out", base("dense"), adapter, "mlx")
    logits = models.logits(oracle.MlxModel(out))  # type: ignore[arg-type]
    expected = models.logits(stock.float_model(out, like=read_all(out)))
    assert stock.distance(logits, expected) < BOUND
    unmerged = models.logits(stock.float_model(base("dense")))
    assert stock.distance(logits, unmerged) > 100 * BOUND, "the control: the base before it was quantized"


def read_all(folder: Path) -> dict[str, Tensor]:
    """float32 values of all weights, by mlx where they are quantized."""
    return bases.values(folder)


def converted(dense: Path, folder: Path, **more: Any) -> Path:
    """As ``mlx_lm.convert -q`` writes it, without the tokenizer."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    model, config = load_model(dense)
    model, config = quantize_model(model, config, **{"group_size": None, "bits": None, **more})
    save_model(folder, model)
    save_config(config, folder / "config.json")
    return folder


def test_same_tensors_and_config_as_mlx_lm(base: Made, adapter: Path, tmp_path: Path) -> None:
    theirs = converted(base("dense"), tmp_path / "theirs")
    out = stock.merged(tmp_path / "out", base("dense"), adapter, "mlx")
    shapes = [{name: (t.dtype, t.shape) for name, t in stock.tensors(folder).items()} for folder in (theirs, out)]
    assert shapes[0] == shapes[1]
    assert ModelCard.load(out / "README.md").data.library_name == "mlx"
    expected, found = (json.loads((folder / "config.json").read_text()) for folder in (theirs, out))
    assert found == {"rope_theta": 10000.0, **expected}


def test_rope_is_what_transformers_has(adapter: Path, tmp_path: Path) -> None:
    """mlx_lm's Llama does not look into ``rope_parameters``."""
    rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16}  # fmt: skip
    dense = models.save(models.llama(torch.float32, **bases.LLAMA, rope_parameters=rope), tmp_path / "dense")
    out = stock.merged(tmp_path / "out", dense, adapter, "mlx")
    expected = models.logits(stock.float_model(out, like=read_all(out)))
    assert stock.distance(models.logits(oracle.MlxModel(out)), expected) < BOUND  # type: ignore[arg-type]
    config = json.loads((out / "config.json").read_text())
    models.edit_json(out / "config.json", rope_theta=10000.0)
    assert stock.distance(models.logits(oracle.MlxModel(out)), expected) > 100 * BOUND  # type: ignore[arg-type]
    assert config["rope_scaling"] == config["rope_parameters"]


ARCHITECTURES = {
    "Qwen3": ["q_proj", "down_proj"], "Mistral": ["q_proj", "down_proj"], "Gemma2": ["q_proj", "down_proj"],
    "Phi3": ["qkv_proj", "gate_up_proj"], "Starcoder2": ["q_proj", "c_fc"],
}  # fmt: skip
"""Prefix of transformers' classes → modules of the adapter."""


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        **{**models.LLAMA, "tie_word_embeddings": name == "Gemma2"}, head_dim=16, pad_token_id=0
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    dense = models.save(model, tmp_path / "dense")
    lora = models.adapter(model, tmp_path / "lora", target_modules=ARCHITECTURES[name])
    out = stock.merged(tmp_path / "out", dense, lora, "mlx")
    expected = models.logits(stock.float_model(out, like=read_all(out)))
    assert stock.distance(models.logits(oracle.MlxModel(out)), expected) < BOUND  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.endswith("fp4")])
def test_same_format_keeps_scales(kind: str, base: Made, adapter: Path, tmp_path: Path) -> None:
    out = stock.merged(tmp_path / "out", base(kind), adapter, "mlx")
    before, after = stock.tensors(base(kind)), stock.tensors(out)
    assert stock.differing(before, after) == CHANGED
    assert bases.quantization_config(out) == bases.quantization_config(base(kind))
    settings = bases.quantization_config(out)
    columns = torch.arange(256) // settings["group_size"]
    first_OI, scale_OI = (after[f"{Q_PROJ}.{part}"].float()[:, columns] for part in ("biases", "scales"))
    last_OI = first_OI + (2 ** settings["bits"] - 1) * scale_OI
    reachable_OI = goal(base(kind), adapter).clamp(torch.minimum(first_OI, last_OI), torch.maximum(first_OI, last_OI))
    error_OI = (bases.oracle(out)[f"{Q_PROJ}.weight"] - reachable_OI).abs()
    assert bool((error_OI <= scale_OI.abs() * 0.5001).all()), "half a step, but beyond the ends of the range"


def goal(folder: Path, adapter: Path) -> Tensor:
    name = f"{Q_PROJ}.weight"
    return bases.oracle(folder)[name] + stock.deltas(models.llama(torch.float32, **bases.LLAMA), adapter)[name]


def test_to_float(base: Made, adapter: Path, tmp_path: Path) -> None:
    """A dense folder for transformers: mlx's values plus peft's delta, and nothing of mlx in its config."""
    out = stock.merged(tmp_path / "out", base("mlx"), adapter, "fp32")
    assert float((stock.tensors(out)[f"{Q_PROJ}.weight"] - goal(base("mlx"), adapter)).abs().max()) < 1e-6
    assert not {"quantization", "quantization_config"} & json.loads((out / "config.json").read_text()).keys()
    _, info = stock.loaded(out)
    assert not any(info.values()), info


@pytest.mark.parametrize("target", ["nf4", "w4a16"])
def test_embeddings_become_dense_for_other_libraries(target: str, base: Made, adapter: Path, tmp_path: Path) -> None:
    """transformers finds every tensor of a folder made of an MLX base, and no other."""
    if target == "w4a16":
        pytest.importorskip("compressed_tensors")
    out = stock.merged(tmp_path / "out", base("mlx"), adapter, target)
    _, info = stock.loaded(out)
    assert not any(info.values()), info
    expected = bases.oracle(base("mlx"))["lm_head.weight"].bfloat16()
    assert torch.equal(stock.tensors(out)["lm_head.weight"], expected)


def test_layers_of_several_widths(base: Made, adapter: Path, tmp_path: Path) -> None:
    """As ``mlx_lm.convert --quant-predicate mixed_3_6`` writes them: an entry for every layer."""
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import load_model

    model, _ = load_model(base("dense"))
    predicate = mixed_quant_predicate_builder("mixed_3_6", model)
    mixed = converted(base("dense"), tmp_path / "mixed", quant_predicate=predicate)
    assert stock.differing(read(mixed), bases.oracle(mixed)) == []
    out = stock.merged(tmp_path / "out", mixed, adapter, "mlx")
    logits = models.logits(oracle.MlxModel(out))  # type: ignore[arg-type]
    assert stock.distance(logits, models.logits(stock.float_model(out, like=read_all(out)))) < BOUND
    entries = {name: entry for name, entry in bases.quantization_config(out).items() if isinstance(entry, dict)}
    assert entries and {entry["bits"] for entry in entries.values()} < {3, 6}, "the most common width needs no entry"


def test_dense_modules_of_an_mlx_base_stay_dense(base: Made, adapter: Path, tmp_path: Path) -> None:
    def predicate(path: str, module: Any) -> bool:
        return path not in ("lm_head", "model.embed_tokens")

    partly = converted(base("dense"), tmp_path / "partly", quant_predicate=predicate)
    out = stock.merged(tmp_path / "out", partly, adapter, "mlx")
    assert stock.tensors(out)["lm_head.weight"].dtype == stock.tensors(partly)["lm_head.weight"].dtype == torch.bfloat16
    assert models.logits(oracle.MlxModel(out)).isfinite().all()  # type: ignore[arg-type]


def test_embeddings_of_an_nf4_base_are_quantized(base: Made, adapter: Path, tmp_path: Path) -> None:
    """As mlx_lm would; where they are tied, a token's row is the output's too."""
    tied = models.llama(**{**bases.LLAMA, "tie_word_embeddings": True})
    nf4 = models.quantize(
        models.save(tied, tmp_path / "dense"), tmp_path / "nf4", load_in_4bit=True, bnb_4bit_quant_type="nf4"
    )
    out = stock.merged(tmp_path / "out", nf4, adapter, "mlx", group_size=32, bits=8)
    tensors = stock.tensors(out)
    assert tensors["model.embed_tokens.weight"].dtype == torch.uint32 and "lm_head.weight" not in tensors
    logits = models.logits(oracle.MlxModel(out))  # type: ignore[arg-type]
    assert stock.distance(logits, models.logits(stock.float_model(out, like=read_all(out)))) < BOUND


# --- bad inputs ------------------------------------------------------------------------------------------------------


def put(name: str, change: Callable[[Tensor], Tensor]) -> Damage:
    def damage(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        tensors[name] = change(tensors[name])

    return damage


def without(name: str) -> Damage:
    return lambda tensors, config: tensors.pop(name)


DAMAGED: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "no_biases": (without(f"{Q_PROJ}.biases"), (f"{Q_PROJ}.biases is missing", "Download")),
    "no_codes": (without(f"{Q_PROJ}.weight"), (f"{Q_PROJ}.weight is missing", "Download")),
    "no_scales": (without(f"{Q_PROJ}.scales"), (f"{Q_PROJ}.scales is missing", "Download")),
    "signed_codes": (put(f"{Q_PROJ}.weight", lambda t: t.view(torch.int32)), ("I32, expected U32",)),
    "few_scales": (put(f"{Q_PROJ}.scales", lambda t: t[:, :-1]), ("[256, 3]", "4 bits in groups of 64", "config.json")),
    "scale_of_nan": (put(f"{Q_PROJ}.scales", lambda t: t * torch.nan), (f"{Q_PROJ}.scales holds NaN",)),
    "bias_of_nan": (put(f"{Q_PROJ}.biases", lambda t: t * torch.nan), (f"{Q_PROJ}.biases holds NaN",)),
    "experts": (put(f"{Q_PROJ}.weight", lambda t: t[None]), ("stack of experts", "Hugging Face's form")),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_bases_are_refused(base: Made, adapter: Path, tmp_path: Path, cli: Cli, name: str) -> None:
    damage, words = DAMAGED[name]
    refused(base("mlx"), damage, words, adapter, tmp_path, cli, "bf16")


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"group_size": 32, "bits": 4}, "4 bits in groups of 32, as config.json says"),
        ({"group_size": 64, "bits": "4"}, "bits '4' and group_size 64"),
        ({"group_size": 64, "bits": 4, "mode": "mxfp8"}, "MLX's mode 'mxfp8'; qmerge reads affine, mxfp4, nvfp4"),
    ],
)
def test_configs_that_do_not_fit(base: Made, adapter: Path, tmp_path: Path, quantization: Any, words: str) -> None:
    folder = shutil.copytree(base("mlx"), tmp_path / "base")
    models.edit_json(folder / "config.json", quantization=quantization)
    with pytest.raises(Exception, match=words):
        stock.merged(tmp_path / "out", folder, adapter, "bf16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"group_size": 48}, "--group-size 48: mlx supports 32, 64, 128"),
        ({"bits": 7}, "--bits 7: mlx supports 2, 3, 4, 5, 6, 8"),
        ({"sym": True}, "--sym is for"),
    ],
)
def test_bad_recipes(asked: dict[str, Any], message: str, base: Made, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        stock.merged(tmp_path / "out", base("dense"), adapter, "mlx", **asked)
    assert not (tmp_path / "out").exists()


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(
        RecipeError, match=r"x.weight has 96 inputs, which is not a multiple of .* 64: use --group-size 32"
    ):
        FORMAT.check("x.weight", (64, 96), MlxOptions())
    with pytest.raises(RecipeError, match="is an expert"):
        FORMAT.check("model.layers.0.mlp.experts.3.up_proj.weight", (64, 64), MlxOptions())
    assert FORMAT.options_for_model({}, [(64, 96), (64, 128)]) == {"group_size": 32}
    assert FORMAT.options_for_model({}, [(64, 128)]) == {}
