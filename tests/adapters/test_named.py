"""Folders, repositories and files that hold several adapters, as peft makes them: none is guessed, each can be named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor

from qmerge.adapters.reading.named import adapters_in, find_adapter, split_reference
from qmerge.errors import AdapterError, QmergeError

from .. import models
from ..conftest import Cli
from ..parity import stock

NAMES = ("default", "math", "code")
RANKS = {"default": 4, "math": 8, "code": 2}
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[PeftModel, Path]:
    """A model with three adapters, saved by peft: all (one of them in the root), and two of them (none in the root)."""
    folder = tmp_path_factory.mktemp("named")
    model = models.llama(torch.float32)
    models.save(model, folder / "base")
    configs = {name: LoraConfig(r=rank, lora_alpha=8, target_modules=["q_proj"]) for name, rank in RANKS.items()}
    wrapped = get_peft_model(model, configs["default"], autocast_adapter_dtype=False)
    for name in NAMES[1:]:
        wrapped.add_adapter(name, configs[name], autocast_adapter_dtype=False)
    torch.manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) * 0.1
    wrapped.save_pretrained(folder / "all")
    wrapped.save_pretrained(folder / "two", selected_adapters=["math", "code"])
    return wrapped, folder


def expected(model: PeftModel, folder: Path, name: str) -> dict[str, Tensor]:
    """The base with one adapter's deltas by peft, float32."""
    weights = stock.tensors(folder / "base")
    for module_name, module in model.base_model.model.named_modules():
        if name in getattr(module, "lora_A", {}):
            weights[f"{module_name}.weight"] = weights[f"{module_name}.weight"] + module.get_delta_weight(name).detach()
    return weights


def merged(cli: Cli, folder: Path, adapter: object, out: Path) -> dict[str, Tensor]:
    ran = cli("--base", folder / "base", "--adapter", adapter, "--target", "fp32", "--out", out, "--device", "cpu")
    assert ran.code == 0, ran.err
    return stock.tensors(out)


def test_what_peft_saves_is_where_it_is_looked_for(made: tuple[PeftModel, Path]) -> None:
    _, folder = made
    assert adapters_in(folder / "all") == {
        "default": folder / "all",
        "code": folder / "all/code",
        "math": folder / "all/math",
    }
    assert adapters_in(folder / "two").keys() == {"math", "code"}
    assert adapters_in(folder / "base") == {}


@pytest.mark.parametrize(("place", "there"), [("all", ("default", "code", "math")), ("two", ("code", "math"))])
def test_none_is_guessed(
    made: tuple[PeftModel, Path], tmp_path: Path, cli: Cli, place: str, there: tuple[str, ...]
) -> None:
    """All are listed, with what to write, also where one lies in the folder itself; nothing is written."""
    _, folder = made
    for command in ((), ("plan",)):
        ran = cli(
            *command,
            "--base",
            folder / "base",
            "--adapter",
            folder / place,
            "--target",
            "nf4",
            "--out",
            tmp_path / "out",
        )
        assert ran.code == 3 and isinstance(ran.error, AdapterError) and not (tmp_path / "out").exists()
        said = " or ".join(f"--adapter {folder / place}#{name}" for name in there)
        assert f"contains the adapters: {', '.join(there)}. Choose one: {said}" in ran.err
    assert "contains the adapters" in cli("inspect", folder / place).err


@pytest.mark.parametrize("name", NAMES)
def test_each_can_be_named(
    made: tuple[PeftModel, Path], tmp_path: Path, cli: Cli, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit base + peft's delta of this adapter; the control is another one of them."""
    model, folder = made
    found = merged(cli, folder, f"{folder / 'all'}#{name}", tmp_path / "out")
    assert not stock.differing(found, expected(model, folder, name))
    assert stock.differing(found, expected(model, folder, "code" if name == "math" else "math")), "the control"
    report = json.loads((tmp_path / "out/qmerge.json").read_text())
    assert report["weights"][0]["rank"] == RANKS[name]
    assert report["inputs"][1]["name"] == ("all#default" if name == "default" else name)
    monkeypatch.chdir(folder)  # where base and adapter are found again
    again = cli("run", tmp_path / "out/qmerge_recipe.yaml", "--out", tmp_path / "again")
    assert again.code == 0 and not stock.differing(stock.tensors(tmp_path / "again"), found)


def test_a_folder_below_is_a_folder(made: tuple[PeftModel, Path], tmp_path: Path, cli: Cli) -> None:
    model, folder = made
    assert not stock.differing(
        merged(cli, folder, folder / "two/math", tmp_path / "out"), expected(model, folder, "math")
    )


def test_several_with_weights(made: tuple[PeftModel, Path], tmp_path: Path, cli: Cli) -> None:
    """Two adapters of one folder, combined; names and ranks are theirs."""
    _, folder = made
    ran = cli("--base", folder / "base", "--adapter", f"{folder / 'all'}#math=0.7", "--adapter", f"{folder / 'all'}#code=0.3",
              "--target", "fp32", "--out", tmp_path / "out", "--json")  # fmt: skip
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    assert [record["name"] for record in report["inputs"]] == ["base", "math", "code"]
    assert {weight["rank"] for weight in report["weights"]} == {10}


def test_the_tokenizer_beside_them_is_theirs(made: tuple[PeftModel, Path], tmp_path: Path, cli: Cli) -> None:
    """One adapter's own, else the one that lies where all of them lie."""
    _, folder = made
    place = shutil.copytree(folder / "two", tmp_path / "two")
    (place / "chat_template.jinja").write_text("shared")
    (place / "code/chat_template.jinja").write_text("own")
    for name, said in (("math", "shared"), ("code", "own")):
        merged(cli, folder, f"{place}#{name}", tmp_path / name)
        assert (tmp_path / name / "chat_template.jinja").read_text() == said


def test_a_wrong_name(made: tuple[PeftModel, Path], tmp_path: Path) -> None:
    _, folder = made
    with pytest.raises(AdapterError, match=r"contains no adapter 'maths'; there are: default, code, math\. Choose one"):
        find_adapter(f"{folder / 'all'}#maths")
    with pytest.raises(AdapterError, match="contains no adapter, so none that is called 'math'"):
        find_adapter(f"{folder / 'base'}#math")
    for name in ("../all", "..", "math/../code", "math/"):
        with pytest.raises(AdapterError, match="contains no adapter"):
            find_adapter(f"{folder / 'all'}#{name}")


def test_a_hash_in_a_folders_own_name(made: tuple[PeftModel, Path], tmp_path: Path) -> None:
    _, folder = made
    place = shutil.copytree(folder / "all/math", tmp_path / "run#7")
    assert find_adapter(str(place)).folder == place and split_reference(str(place)) == (str(place), None)
    assert split_reference("someone/adapters#math") == ("someone/adapters", "math")


def test_checkpoints_of_training_are_no_other_adapters(made: tuple[PeftModel, Path], tmp_path: Path) -> None:
    """Trainer leaves them below the finished adapter; they can be named, and the last one counts where there is no finished one."""
    _, folder = made
    place = tmp_path / "run"
    for below in ("", "checkpoint-10", "checkpoint-200"):
        shutil.copytree(folder / "two/math", place / below, dirs_exist_ok=True)
    assert find_adapter(str(place)).folder == place
    assert find_adapter(f"{place}#checkpoint-10").folder == place / "checkpoint-10"
    shutil.copytree(folder / "two/math", place / "qmerge-adapter")  # by QmergeCallback, when the training ended
    assert find_adapter(str(place)).folder == place
    (place / CONFIG).unlink()
    assert find_adapter(str(place)).folder == place / "qmerge-adapter"
    shutil.rmtree(place / "qmerge-adapter")
    assert find_adapter(str(place)).folder == place / "checkpoint-200"
    shutil.copytree(folder / "two/math", place / "math")  # an adapter of its own: none is guessed
    with pytest.raises(AdapterError, match="contains the adapters: math, checkpoint-10, checkpoint-200"):
        find_adapter(str(place))


def test_a_repository_with_folders(
    made: tuple[PeftModel, Path], tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same by Hub id, from a cache; id and name stand in the report."""
    model, folder = made
    repository = tmp_path / "hub/models--someone--adapters"
    shutil.copytree(folder / "two", repository / "snapshots" / ("b" * 40))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("b" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        AdapterError, match=r"Choose one: --adapter someone/adapters#code or --adapter someone/adapters#math"
    ):
        find_adapter("someone/adapters")
    found = merged(cli, folder, "someone/adapters#math", tmp_path / "out")
    assert not stock.differing(found, expected(model, folder, "math"))
    record = json.loads((tmp_path / "out/qmerge.json").read_text())["inputs"][1]
    assert (record["id"], record["name"], record["commit"]) == ("someone/adapters", "someone/adapters#math", "b" * 40)


# --- one file --------------------------------------------------------------------------------------------------------


def in_one_file(out: Path) -> Path:
    """What a state dict gives: all in one file, with the adapters' names in the tensors'."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["lm_head"])
    wrapped = get_peft_model(models.llama(torch.float32), config, autocast_adapter_dtype=False)
    wrapped.add_adapter("math", config, autocast_adapter_dtype=False)
    torch.manual_seed(4)
    tensors = {
        name: torch.randn(tensor.shape) * 0.1
        for name, tensor in wrapped.state_dict().items()
        if "lora_" in name or ".modules_to_save." in name
    }
    out.mkdir()
    save_file(tensors, out / TENSORS)
    (out / CONFIG).write_text(json.dumps({**config.to_dict(), "target_modules": ["q_proj"]}, default=str))
    return out


def test_one_file_with_several_adapters(made: tuple[PeftModel, Path], tmp_path: Path, cli: Cli) -> None:
    _, folder = made
    place = in_one_file(tmp_path / "both")
    with pytest.raises(
        AdapterError, match=r"contains the adapters: default, math\. Choose one: --adapter .*#default or"
    ):
        find_adapter(str(place))
    tensors, base = stock.tensors(place), stock.tensors(folder / "base")
    results = {name: merged(cli, folder, f"{place}#{name}", tmp_path / name) for name in ("default", "math")}
    name, head = "model.layers.1.self_attn.q_proj", "lm_head"
    for adapter, found in results.items():
        A_RI, B_OR = (tensors[f"base_model.model.{name}.lora_{half}.{adapter}.weight"] for half in "AB")
        assert torch.equal(found[f"{name}.weight"], base[f"{name}.weight"] + B_OR @ A_RI * 2)
        assert torch.equal(
            found[f"{head}.weight"], tensors[f"base_model.model.{head}.modules_to_save.{adapter}.weight"]
        )
    assert not torch.equal(results["math"][f"{name}.weight"], results["default"][f"{name}.weight"]), "the control"
    assert json.loads((tmp_path / "math/qmerge.json").read_text())["inputs"][1]["name"] == "both#math"
    with pytest.raises(QmergeError, match=r"there are: default, math"):
        find_adapter(f"{place}#chat")
    inspected = json.loads(cli("inspect", f"{place}#math", "--json").out)
    assert inspected["problem"] is None and inspected["tensors"] == 5


def test_a_name_in_one_adapters_tensors_is_no_matter(made: tuple[PeftModel, Path], tmp_path: Path, cli: Cli) -> None:
    """One adapter whose tensors carry its name needs none."""
    _, folder = made
    tensors = stock.tensors(folder / "two/math")
    place = shutil.copytree(folder / "two/math", tmp_path / "one")
    save_file({name.replace(".weight", ".math.weight"): tensor for name, tensor in tensors.items()}, place / TENSORS)
    found = merged(cli, folder, place, tmp_path / "out")
    assert not stock.differing(found, merged(cli, folder, folder / "two/math", tmp_path / "plain"))
