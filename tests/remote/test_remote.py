"""Models on a stand-in of the Hub: what a plan reads of them, and which files a merge downloads."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants

import qmerge
from qmerge import hub as hub_ids
from qmerge.adapters.reading.named import find_adapter
from qmerge.errors import CheckpointError
from qmerge.forecast import targets
from qmerge.formats import get_target
from qmerge.remote import ranges

from .. import models
from ..conftest import NF4, Cli
from ..hub_server import HubServer

LARGER = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "vocab_size": 4096}
"""Settings of a model whose weights are much larger than its headers."""


@pytest.fixture
def hub(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """In an empty folder: none is there that has the name of a model."""
    monkeypatch.chdir(tmp_path)
    return hub


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 Llama in several files, 8 million parameters."""
    model = models.llama(**LARGER)
    return models.save(model, tmp_path_factory.mktemp("larger") / "dense", max_shard_size="8MB")


@pytest.fixture(scope="module")
def larger_nf4(larger: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.quantize(larger, tmp_path_factory.mktemp("larger") / "nf4", **NF4)


@pytest.fixture(scope="module")
def larger_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.adapter(models.llama(torch.float32, **LARGER), tmp_path_factory.mktemp("larger") / "lora")


def header_bytes(folder: Path) -> int:
    """Of all safetensors files: the length, and the header."""
    return sum(8 + struct.unpack("<Q", path.read_bytes()[:8])[0] for path in folder.glob("*.safetensors"))


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def without_names(plan: dict[str, object]) -> dict[str, object]:
    """All that a plan says, except the base's name and commit, and the room on the disk."""
    base = plan.pop("base")
    assert isinstance(base, dict)
    plan.pop("disk_free", None)
    return {**plan, "base": {key: value for key, value in base.items() if key not in ("name", "commit")}}


@pytest.fixture
def few_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan compares with two targets only: the others read the same rows, and take time."""
    chosen = {name: get_target(name) for name in ("bf16", "nf4")}
    monkeypatch.setattr(targets, "all_targets", lambda: chosen)


@pytest.mark.parametrize(("stored", "target"), [("larger", "nf4"), ("larger_nf4", "bf16")])
def test_a_plan_of_a_model_on_the_hub(
    hub: HubServer, request: pytest.FixtureRequest, larger_lora: Path, few_targets: None, stored: str, target: str
) -> None:
    """It is that of the folder, to the last digit, and reads a small part of the model."""
    folder = request.getfixturevalue(stored)
    hub.add("someone/base", folder)
    remote = qmerge.plan(base="someone/base", adapter=larger_lora, target=target)
    assert remote["base"]["commit"] == hub.repos["someone/base"].commit
    local = qmerge.plan(base=folder, adapter=larger_lora, target=target)
    assert without_names(remote) == without_names(local)
    served = hub.served_of(".safetensors")
    assert header_bytes(folder) < served < 0.4 * weight_bytes(folder), (served, weight_bytes(folder))
    # Every byte was served once.
    assert not [name for name in hub.served if hub.served[name] > len(hub.repos["someone/base"].files[name[13:]])]
    assert not list((Path(constants.HF_HUB_CACHE)).rglob("*.safetensors"))


def test_opening_reads_headers_alone(hub: HubServer, larger: Path) -> None:
    from qmerge.remote import open_remote
    from qmerge.safetensors_io.reader import Reader

    hub.add("someone/base", larger)
    norms = 13 * 2 * LARGER["hidden_size"]  # two in each layer and the last one: smaller than a request's overhead
    with Reader() as reader:
        source = open_remote("someone/base@main", None, reader)
        assert source is not None and source.commit == hub.repos["someone/base"].commit
        assert hub.served_of(".safetensors") == header_bytes(larger) + norms
        # A reader that does not know the file finds an error, never zeros.
        with pytest.raises(CheckpointError, match="truncated"):
            from qmerge.safetensors_io.header import read_header

            read_header(next(source.folder.glob("*.safetensors")), CheckpointError)


def test_what_is_in_the_cache_is_not_read_again(hub: HubServer, nf4: Path, lora: Path, few_targets: None) -> None:
    hub.add("someone/base", nf4)
    hub_ids.resolve("someone/base", None, CheckpointError)
    hub.served.clear()
    qmerge.plan(base="someone/base", adapter=lora)
    assert hub.served_of(".safetensors") == 0


def test_a_busy_server_is_asked_again(
    hub: HubServer, nf4: Path, lora: Path, few_targets: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "SECONDS_BETWEEN_TRIES", 0.01)
    hub.add("someone/base", nf4)
    hub.busy_answers = 2
    assert qmerge.plan(base="someone/base", adapter=lora)["targets"]
    hub.busy_answers = 10**6
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read from the Hub: status 503"):
        qmerge.plan(base="someone/base", adapter=lora)


def test_a_silent_server_is_not_waited_for(hub: HubServer, nf4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "TRIES", 1)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    hub.add("someone/base", nf4)
    hub.silent_seconds = 0.5
    file = ranges.RemoteFile("someone/base", "model.safetensors", "main")
    with pytest.raises(CheckpointError, match="timed out"):
        file.read(0, 8)


def test_a_whole_file_in_the_place_of_a_range_is_not_read(
    hub: HubServer, nf4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "TRIES", 1)
    hub.add("someone/base", nf4)
    hub.knows_ranges = False
    file = ranges.RemoteFile("someone/base", "model.safetensors", "main")
    with pytest.raises(CheckpointError, match="answered with status 200, expected the 8 bytes from 16 on"):
        file.read(16, 24)


def test_ranges_at_the_ends_of_a_file(hub: HubServer, nf4: Path) -> None:
    content = (nf4 / "model.safetensors").read_bytes()
    hub.add("someone/base", nf4)
    file = ranges.RemoteFile("someone/base", "model.safetensors", "main")
    assert file.read(8, 8) == b"" and not hub.requests
    assert file.read(len(content) - 4, len(content)) == content[-4:] and file.size == len(content)
    with pytest.raises(CheckpointError, match="expected the 8 bytes"):
        file.read(len(content) - 4, len(content) + 4)


@pytest.mark.parametrize("stored", ["nf4", "sharded"])
def test_a_gated_model(
    hub: HubServer, request: pytest.FixtureRequest, lora: Path, cli: Cli, stored: str, few_targets: None
) -> None:
    """Everybody may list its files; its index or its config is the first one that is refused."""
    hub.add("someone/base", request.getfixturevalue(stored)).gated = True
    ran = cli("plan", "--base", "someone/base", "--adapter", lora)
    assert ran.code == 3 and type(ran.error) is CheckpointError, ran.err
    assert ran.err.splitlines()[-1].startswith("qmerge: someone/base is gated: ask for access on its page"), ran.err


def test_a_file_that_is_no_model(hub: HubServer, nf4: Path, lora: Path, cli: Cli) -> None:
    hub.add("someone/base", nf4, **{"model.safetensors": b"\xff" * 100})
    ran = cli("plan", "--base", "someone/base", "--adapter", lora)
    assert ran.code == 3 and "not a safetensors file" in ran.err, ran.err
    ran = cli("plan", "--base", "someone/nothing", "--adapter", lora)
    assert ran.code == 3 and "someone/nothing" in ran.err and len(ran.err.splitlines()) == 1


def test_only_needed_files_are_downloaded(hub: HubServer, sharded: Path, lora: Path, tmp_path: Path, cli: Cli) -> None:
    """Not other copies of the weights, and not earlier states of the training."""
    extra = {"model.fp32.safetensors": b"1", "onnx/model.onnx": b"2", "vae/model.safetensors": b"3", "model.bin": b"4"}
    hub.add("someone/base", sharded, **extra)
    adapter = (lora / "adapter_model.safetensors").read_bytes()
    config = (lora / "adapter_config.json").read_bytes()
    hub.add(
        "someone/lora", lora,
        **{"checkpoint-10/adapter_model.safetensors": adapter, "checkpoint-10/adapter_config.json": config,
           "optimizer.safetensors": b"5"},
    )  # fmt: skip
    out = tmp_path / "out"
    ran = cli("--base", "someone/base@main", "--adapter", "someone/lora@main=0.5", "--target", "nf4", "--rounding", "nearest",
              "--out", out, "--device", "cpu")  # fmt: skip
    assert ran.code == 0, ran.err
    needed = {f"someone/base/{path.name}" for path in sharded.glob("*.safetensors")}
    assert {name for name in hub.served if not name.endswith((".json", ".md"))} == {
        *needed, "someone/lora/adapter_model.safetensors"
    }  # fmt: skip
    recipe = yaml.safe_load((out / "qmerge_recipe.yaml").read_text())
    assert [recipe[name] for name in ("base", "revision", "adapter", "adapter_revision")] == [
        "someone/base", hub.repos["someone/base"].commit, "someone/lora=0.5", hub.repos["someone/lora"].commit
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["checkpoint-10", "epoch_0", "qmerge-adapter"])
def test_an_earlier_state_that_is_asked_for(hub: HubServer, lora: Path, cli: Cli, name: str) -> None:
    """Next to a finished adapter, it is downloaded only then."""
    earlier = {f"{name}/{path.name}": path.read_bytes() for path in lora.iterdir()}
    # Other values: of two files with the same content, the cache asks for one.
    weights = f"{name}/adapter_model.safetensors"
    earlier[weights] = earlier[weights][:-4] + bytes(4)
    hub.add("someone/lora", lora, **earlier)
    weights = f"someone/lora/{weights}"
    ran = cli("inspect", "someone/lora", "--json")
    assert ran.code == 0 and not hub.served[weights], ran.err
    ran = cli("inspect", f"https://huggingface.co/someone/lora/tree/main/{name}", "--json")
    assert ran.code == 0 and hub.served[weights], ran.err
    assert find_adapter(f"someone/lora#{name}").folder.name == name
    assert hub_ids.is_state_of_run(name)  # locally, too, it is an earlier state


def test_the_hub_is_asked_once_about_an_adapter(
    hub: HubServer, nf4: Path, lora: Path, tmp_path: Path, cli: Cli
) -> None:
    """Though its base is read from it, its tensors are, and ``--patch`` must not overwrite it."""
    named = tmp_path / "named"
    shutil.copytree(lora, named)
    models.edit_json(named / "adapter_config.json", base_model_name_or_path=str(nf4))
    hub.add("someone/lora", named)
    settings = {"adapter": "someone/lora", "target": "nf4", "rounding": "nearest", "device": "cpu"}
    options = [text for name, value in settings.items() for text in (f"--{name}", value)]
    ran = cli(*options, "--patch", tmp_path / "patch")
    assert ran.code == 0 and "the adapter names it" in ran.err, ran.err
    question = "GET /api/models/someone/lora"
    assert hub.requests.count(question) == 1
    qmerge.merge(**settings, out=tmp_path / "out", quiet=True)
    assert hub.requests.count(question) == 2, "another call asks again"


def test_an_id_is_one_commit_in_a_command(hub: HubServer, lora: Path) -> None:
    """Somebody may push while it runs; the next command takes what was pushed."""
    repo = hub.add("someone/lora", lora)
    old = repo.commit
    with hub_ids.one_commit_each():
        assert find_adapter("someone/lora").commit == old
        repo.files["adapter_config.json"] += b"\n"
        assert find_adapter("someone/lora").commit == old != repo.commit
    assert find_adapter("someone/lora").commit == repo.commit


def test_revisions_in_names(hub: HubServer, nf4: Path, lora: Path, tmp_path: Path, cli: Cli, few_targets: None) -> None:
    hub.add("someone/base", nf4)
    hub.add("someone/lora", lora)
    ran = cli("inspect", "someone/lora@main", "--json")
    assert ran.code == 0 and json.loads(ran.out)["commit"] == hub.repos["someone/lora"].commit, ran.err
    ran = cli("plan", "--base", "someone/base@v9", "--adapter", "someone/lora")
    assert ran.code == 3 and "someone/base at revision v9" in ran.err, ran.err
    ran = cli("plan", "--base", "someone/base@v9", "--revision", "v8", "--adapter", lora)
    assert ran.code == 2 and "two revisions are given" in ran.err, ran.err
    # Two adapters, each at its own revision.
    arguments = ("--adapter", "someone/lora@main", "--adapter", f"someone/lora@{hub.repos['someone/lora'].commit}=0.5")
    ran = cli("plan", "--base", "someone/base", *arguments, "--json")
    assert ran.code == 0, ran.err
    # A folder of that name comes first.
    (tmp_path / "someone/base@v9").mkdir(parents=True)
    assert hub_ids.resolve("someone/base@v9", None, CheckpointError).id is None
