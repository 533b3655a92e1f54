"""Adapters one after the other, against peft: the first merged, the second beside the result, unmerged."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, OFTConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from qmerge.adapters.combining.chain import ChainedUpdate, chained, in_order, lineage, updated_values
from qmerge.adapters.reading.folder import Adapter
from qmerge.adapters.updates.lora import AddUpdate, DoraUpdate, TokenRowsUpdate
from qmerge.errors import AdapterError, RecipeError
from qmerge.recipe import make_recipe
from qmerge.types import Replacement, Rows, Update

from .. import models
from ..conftest import Cli
from ..parity import stock

BOUND = 4 * 15 * 2**-24 * 160**0.5
"""Relative: float32 in another order, 15 matrices deep, as in parity/test_adapters.py."""

TIED, BIASED = {"tie_word_embeddings": True}, {"attention_bias": True}


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **settings})


PAIRS: dict[str, tuple[Any, Any, dict[str, Any] | None]] = {
    "lora, lora": (lora(), lora(r=8, target_modules=["q_proj", "v_proj"]), {}),
    "lora, dora": (lora(), lora(use_dora=True), {}),
    "dora, dora": (lora(use_dora=True), lora(use_dora=True, r=2), {}),
    "dora, oft": (lora(use_dora=True), OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj", "down_proj"]), {}),
    "ia3, lora": (IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]), lora(), {}),
    "saved, lora on it": (lora(modules_to_save=["lm_head"]), lora(target_modules=["lm_head", "q_proj"]), {}),
    "lora, saved": (lora(), lora(target_modules=["q_proj"], modules_to_save=["down_proj"]), {}),
    "bias, lora_bias": (lora(bias="all"), lora(lora_bias=True, target_modules=["q_proj"]), BIASED),
    "bias, bias": (lora(bias="all"), lora(bias="all"), BIASED),
    "tokens, tokens": (lora(trainable_token_indices=[1, 5]), lora(trainable_token_indices=[5, 7]), TIED),
    "tokens, embedding": (lora(trainable_token_indices=[1, 5]), lora(target_modules=["embed_tokens"]), {}),
    "embedding, saved": (lora(target_modules=["embed_tokens"]), lora(modules_to_save=["embed_tokens"]), {}),
    "conv1d: saved, dora on it": (
        lora(target_modules=["c_attn"], modules_to_save=["c_fc"]),
        lora(target_modules=["c_fc", "c_attn"], use_dora=True),
        None,
    ),
    "conv1d: saved square, lora on it": (
        lora(target_modules=["c_attn"], modules_to_save=["attn.c_proj"]),
        lora(target_modules=["attn.c_proj"]),
        None,
    ),
}
"""Two adapters, and the settings of the Llama (None: a GPT-2, whose layers are Conv1D) that they are trained on."""
Made = Callable[[str], tuple[Path, Path, Path, torch.Tensor]]


def reload(base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, device_map="cpu").eval()


def trained(model: PreTrainedModel, config: Any, folder: Path, seed: int) -> Path:
    """Every parameter that would have been trained is moved, as training moves it."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's about tied embeddings
        wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape) * (0.2 if "lora_A" in name else 0.05))
        wrapped.save_pretrained(folder)
    return folder


def first_merged(base: Path, first: Path) -> PreTrainedModel:
    return stock.adapted(reload(base), first).merge_and_unload()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(base, first, second, logits of the second beside the merged first), all float32."""
    folder = tmp_path_factory.mktemp("chain")

    @cache
    def make(name: str) -> tuple[Path, Path, Path, torch.Tensor]:
        one, other, changes = PAIRS[name]
        place = folder / name.replace(" ", "_")
        model = models.gpt2() if changes is None else models.llama(torch.float32, **changes)
        base = models.save(model, place / "base")
        first = trained(reload(base), one, place / "first", 3)
        second = trained(first_merged(base, first), other, place / "second", 4)
        both = PeftModel.from_pretrained(first_merged(base, first), second, autocast_adapter_dtype=False).eval()
        return base, first, second, models.logits(both)

    return make


def merged(base: Path, adapters: list[Path], out: Path, target: str = "fp32", **more: Any) -> Path:
    from qmerge.run import merge

    settings = {"base": str(base), "adapter": [str(path) for path in adapters], "combine": "chain", "device": "cpu"}
    merge(make_recipe({**settings, "target": target, "rounding": "nearest", "out": str(out), **more}))
    return out


@pytest.mark.parametrize("name", PAIRS)
def test_answers_as_the_second_beside_the_merged_first(made: Made, tmp_path: Path, name: str) -> None:
    """The control is the first alone; the other order has a test of its own."""
    base, first, second, expected = made(name)
    model, info = stock.loaded(merged(base, [first, second], tmp_path / "out"))
    assert not any(info.values()), info
    assert stock.distance(models.logits(model), expected) < BOUND
    alone = stock.merged(tmp_path / "alone", base, first, "fp32")
    assert stock.distance(models.logits(stock.loaded(alone)[0]), expected) > 1e-3, "the control"


@pytest.mark.parametrize("name", ["lora, dora", "dora, oft", "tokens, tokens", "lora, saved", "bias, bias"])
def test_another_order_is_another_model(made: Made, tmp_path: Path, name: str) -> None:
    base, first, second, expected = made(name)
    turned = stock.loaded(merged(base, [second, first], tmp_path / "turned"))[0]
    assert stock.distance(models.logits(turned), expected) > 100 * BOUND


def test_three(made: Made, tmp_path: Path) -> None:
    """A third one, trained on what the first two make."""
    base, first, second, _ = made("lora, dora")
    two = PeftModel.from_pretrained(first_merged(base, first), second, autocast_adapter_dtype=False).merge_and_unload()
    third = trained(two, lora(use_dora=True, target_modules=["q_proj", "up_proj"]), tmp_path / "third", 5)
    below = PeftModel.from_pretrained(
        first_merged(base, first), second, autocast_adapter_dtype=False
    ).merge_and_unload()
    expected = models.logits(PeftModel.from_pretrained(below, third, autocast_adapter_dtype=False).eval())
    found = stock.loaded(merged(base, [first, second, third], tmp_path / "out"))[0]
    assert stock.distance(models.logits(found), expected) < BOUND


@pytest.mark.parametrize("name", ["lora, lora", "ia3, lora"])
def test_what_ends_in_loras_is_a_sum(made: Made, tmp_path: Path, name: str) -> None:
    """IA³ does not know how many columns its weight has; LoRA does."""
    base, first, second, _ = made(name)
    chain = stock.tensors(merged(base, [first, second], tmp_path / "chain"))
    linear = stock.tensors(merged(base, [first, second], tmp_path / "linear", combine="linear"))
    assert all(stock.distance(chain[name], linear[name]) < 1e-6 for name in chain)


def test_rounded_once(made: Made, tmp_path: Path) -> None:
    """NF4 of a chain is NF4 of the float32 chain; two merges in NF4, one after the other, are not."""
    base, first, second, _ = made("dora, dora")
    once = stock.tensors(merged(base, [first, second], tmp_path / "once", "nf4"))
    dense = merged(base, [first, second], tmp_path / "dense")
    nothing = models.adapter(models.llama(torch.float32), tmp_path / "nothing", size=0.0)
    assert not stock.differing(once, stock.tensors(stock.merged(tmp_path / "again", dense, nothing, "nf4")))
    step = stock.merged(tmp_path / "step", base, first, "nf4")
    assert stock.differing(once, stock.tensors(stock.merged(tmp_path / "twice", step, second, "nf4"))), "the control"


def test_calibrated(made: Made, tmp_path: Path) -> None:
    """The unmerged model that preserve calibrates on is the chain: NF4 is nearer to it than to the base."""
    base, first, second, expected = made("dora, dora")
    more = {"rounding": "preserve", "calibration_tokens": 256, "sequence_length": 32}
    found = models.logits(stock.float_model(merged(base, [first, second], tmp_path / "nf4", "nf4", **more)))
    assert stock.distance(found, expected) < stock.distance(found, models.logits(reload(base)))


def test_by_recipe_and_no_byte_depends_on_the_work(made: Made, tmp_path: Path, cli: Cli) -> None:
    base, first, second, _ = made("dora, dora")
    inputs = ("--base", base, "--adapter", first, "--adapter", second)
    arguments = (*inputs, "--combine", "chain", "--target", "nf4")
    ran = cli(*arguments, "--out", tmp_path / "out", "--device", "cpu", "--rounding", "nearest")
    assert ran.code == 0, ran.err
    again = cli(
        "run",
        tmp_path / "out/qmerge_recipe.yaml",
        *inputs,
        "--out",
        tmp_path / "again",
        "--workers",
        2,
        "--max-memory",
        "30MB",
    )
    assert again.code == 0 and not stock.differing(stock.tensors(tmp_path / "out"), stock.tensors(tmp_path / "again"))
    report = json.loads((tmp_path / "out/qmerge.json").read_text())
    assert report["recipe"]["combine"] == "chain" and report["interference"] == []
    assert {weight["rank"] for weight in report["weights"]} == {6}
    assert cli("plan", *arguments).code == 0


# --- the order -------------------------------------------------------------------------------------------------------


def test_an_adapter_on_an_adapter_says_so(
    made: Made, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given alone, or before the one that it was trained on: the command that applies both; that one works."""
    base, first, second, _ = made("lora, dora")
    monkeypatch.chdir(tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    for path, source in ((one, first), (two, second)):
        path.mkdir()
        for file in source.iterdir():
            (path / file.name).write_bytes(file.read_bytes())
    models.edit_json(two / "adapter_config.json", base_model_name_or_path="one")
    common = ("--base", base, "--target", "nf4", "--device", "cpu", "--out", tmp_path / "out")
    wanted = f"--adapter {one} --adapter {two} --combine chain"
    for given in (("--adapter", two), ("--adapter", two, "--adapter", one, "--combine", "chain")):
        ran = cli(*common, *given)
        assert ran.code == 3 and isinstance(ran.error, AdapterError) and wanted in ran.err, ran.err
        assert not (tmp_path / "out").exists()
    assert cli(*common, *wanted.split()).code == 0
    assert lineage(two) == [one, two]
    models.edit_json(one / "adapter_config.json", base_model_name_or_path="two")
    assert lineage(two) == [one, two], "a circle ends"
    models.edit_json(two / "adapter_config.json", base_model_name_or_path=str(base))
    assert cli(*common[:-1], tmp_path / "alone", "--adapter", two).code == 0, "the control: its base is a model"


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"adapter": ["a/b=0.7", "c/d"]}, "a/b=0.7"),
        ({"adapter": "a/b"}, "one adapter"),
        ({"adapter": ["a/b", "c/d"], "density": 0.5}, "density 0.5"),
    ],
)
def test_what_has_no_meaning_in_a_chain(settings: dict[str, Any], found: str) -> None:
    with pytest.raises(RecipeError, match=f"combine chain applies two or more .*found {found}"):
        make_recipe({"base": "x/y", "target": "nf4", "combine": "chain", **settings})


# --- updates ---------------------------------------------------------------------------------------------------------

SHAPE = (48, 40)
BASE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5)) * 0.05
ALL = Rows(0, SHAPE[0])
ONE, TWO = models.lora_update(SHAPE, 4, seed=1), models.lora_update(SHAPE, 8, seed=2)


def adapter(name: str, *changes: tuple[str, Update | Replacement], **config: Any) -> Adapter:
    folder = Path(__file__).parent / "nowhere" / name
    updates = {weight: change for weight, change in changes if not isinstance(change, Replacement)}
    replaced = {weight: change for weight, change in changes if isinstance(change, Replacement)}
    return Adapter(
        folder=folder,
        kind="lora",
        config={"r": 4, **config},
        updates=updates,
        replaced=replaced,
        tensors={weight: [weight] for weight, _ in changes},
    )


@pytest.fixture(autouse=True)
def no_order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters made here have no folders."""
    if "made" not in request.fixturenames:
        monkeypatch.setattr("qmerge.adapters.combining.chain.check_order", lambda adapters, merged_files: None)


def test_the_second_sees_what_the_first_made() -> None:
    dora = DoraUpdate(TWO, BASE.norm(dim=1))
    update = in_order([ONE, dora])
    assert isinstance(update, ChainedUpdate)
    assert torch.equal(update.apply(BASE, ALL), dora.apply(ONE.apply(BASE, ALL), ALL))
    assert not torch.equal(update.apply(BASE, ALL), in_order([dora, ONE]).apply(BASE, ALL)), "the control"
    parts = [update.apply(BASE[row : row + 5], Rows(row, min(row + 5, 48))) for row in range(0, 48, 5)]
    assert torch.equal(torch.cat(parts), update.apply(BASE, ALL))
    assert update.rank == 12 and update.shape == SHAPE and update.scale == 1 and not update.whole
    assert update.directions() is None and update.row_norms() is None


def test_directions_of_loras_are_those_of_their_sum() -> None:
    assert in_order([ONE]) is ONE
    found = in_order([ONE, TWO])
    assert isinstance(found, ChainedUpdate)
    u, s, v = found.directions()  # type: ignore[misc]
    delta = found.apply(torch.zeros(SHAPE), ALL)
    assert stock.distance(u * s @ v.T, delta) < 1e-5
    norms_O = found.row_norms()
    assert norms_O is not None and torch.allclose(norms_O, delta.norm(dim=1), rtol=1e-5)


def test_values_that_were_trained_whole() -> None:
    """The last ones win over what was done before; what comes after is done to them."""
    early, late = Replacement(BASE + 1), Replacement(BASE + 2)
    cases: list[tuple[list[tuple[str, Update | Replacement]], torch.Tensor]] = [
        ([("x", ONE), ("x", late)], late.values),
        ([("x", early), ("x", late)], late.values),
        ([("x", early), ("x", ONE)], ONE.apply(early.values, ALL)),
        ([("x", TWO), ("x", early), ("x", ONE), ("x", TWO)], TWO.apply(ONE.apply(early.values, ALL), ALL)),
    ]
    for changes, expected in cases:
        made = chained([adapter(str(place), change) for place, change in enumerate(changes)])
        assert not made.updates and torch.equal(made.replaced["x"].values, expected)
    bias = chained(
        [adapter("a", ("b", Replacement(torch.ones(4)))), adapter("b", ("b", AddUpdate(torch.full((1, 4), 0.5))))]
    )
    assert bias.replaced["b"].values.tolist() == [1.5] * 4


def test_values_of_a_conv1d_lie_the_other_way() -> None:
    values = Replacement(BASE.T.contiguous())
    found = updated_values("h.c_fc.weight", values, ONE, adapter("a"))
    assert torch.equal(found.values, ONE.apply(BASE, ALL).T)
    square = models.lora_update((40, 40), 4)
    own = Replacement(BASE[:40])
    turned = updated_values("h.c_proj.weight", own, square, adapter("a", fan_in_fan_out=True))
    assert torch.equal(turned.values, square.apply(BASE[:40].T.contiguous(), Rows(0, 40)).T)
    assert torch.equal(
        updated_values("h.c_proj.weight", own, square, adapter("a")).values, square.apply(BASE[:40], Rows(0, 40))
    )
    with pytest.raises(AdapterError, match=r"x was trained whole .* to \[48, 40\], but this one's delta is \[40, 40\]"):
        updated_values("x", Replacement(BASE), square, adapter("a"))


def test_token_rows() -> None:
    """Later rows win, earlier ones stay; rows of a resized embedding, too."""
    one, two = TokenRowsUpdate([0, 5], torch.ones(2, 40)), TokenRowsUpdate([5, 7], torch.full((2, 40), 2.0))
    found = in_order([one, two])
    assert isinstance(found, TokenRowsUpdate) and found.indices == [0, 5, 7]
    assert torch.equal(found.apply(BASE, ALL), two.apply(one.apply(BASE, ALL), ALL))
    resized = Replacement(torch.zeros(50, 40))
    made = chained([adapter("a", ("x", resized)), adapter("b", ("x", two))])
    assert made.replaced["x"].values[:, 0].tolist() == [2.0 if row in (5, 7) else 0.0 for row in range(50)]


def test_shapes_that_disagree() -> None:
    with pytest.raises(AdapterError, match=r"x is \[48, 40\] for .* and \[40, 40\]"):
        chained([adapter("a", ("x", ONE)), adapter("b", ("x", models.lora_update((40, 40))))])


@pytest.mark.parametrize("combine", ["chain", "linear"])
def test_token_rows_of_tied_embeddings(made: Made, tmp_path: Path, combine: str) -> None:
    """Both of two adapters train rows: the embeddings stay tied; one trains rows, the other the output: an error."""
    base, first, second, _ = made("tokens, tokens")
    out = merged(base, [first, second], tmp_path / "out", combine=combine)
    assert "lm_head.weight" not in stock.tensors(out)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
    head = trained(reload(base), lora(target_modules=["lm_head"]), tmp_path / "head", 6)
    with pytest.raises(AdapterError, match=r"embed_tokens.weight is tied to lm_head.weight; .* merge one by one"):
        merged(base, [first, head], tmp_path / "mixed", combine=combine)
