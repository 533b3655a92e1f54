"""Hub ids from a cache, offline: how they are resolved and recorded, and the errors for ids that are missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import ModelCard, constants

from qmerge import hub
from qmerge.errors import AdapterError, CheckpointError

from ..conftest import Cli

BASE, ADAPTER = "someone/base-nf4", "someone-else/my.adapter"
COMMITS = {BASE: "a" * 40, ADAPTER: "b" * 40}


def cached(cache: Path, hub_id: str, commit: str, files: Path, revision: str = "main") -> Path:
    """What huggingface_hub leaves after a download: blobs, links to them, and a branch's name."""
    repo = cache / f"models--{hub_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir(exist_ok=True)
    for path in files.iterdir():
        blob = repo / "blobs" / f"{commit[:8]}-{path.name}"
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / revision).write_text(commit)
    return snapshot


@pytest.fixture
def cache(nf4: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub"
    cached(folder, BASE, COMMITS[BASE], nf4)
    cached(folder, ADAPTER, COMMITS[ADAPTER], lora)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize("revision", [None, "main", "a" * 40])
def test_an_id_becomes_its_snapshot(cache: Path, revision: str | None) -> None:
    source = hub.resolve(BASE, revision, CheckpointError)
    assert source.id == BASE and source.commit == COMMITS[BASE]
    assert source.folder.name == COMMITS[BASE] and (source.folder / "model.safetensors").exists()


def test_a_revision_chooses(cache: Path, nf4: Path) -> None:
    cached(cache, BASE, "c" * 40, nf4, revision="better")
    assert hub.resolve(BASE, "better", CheckpointError).commit == "c" * 40
    assert hub.resolve(BASE, None, CheckpointError).commit == COMMITS[BASE]


def test_an_error_without_words_is_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's errors need not have a message."""

    def silent(*_: object, **__: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", silent)
    with pytest.raises(CheckpointError, match=r"it cannot be loaded from the Hub .*: TimeoutError$"):
        hub.resolve(BASE, None, CheckpointError)


def test_a_folder_of_that_name_comes_first(cache: Path, tmp_path: Path) -> None:
    (tmp_path / BASE).mkdir(parents=True)
    source = hub.resolve(BASE, None, CheckpointError)
    assert source.id is None and source.commit is None and source.folder == (tmp_path / BASE).resolve()


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert hub.resolve("~/model", None, CheckpointError).folder == (tmp_path / "model").resolve()


def test_a_merge_of_ids(cache: Path, tmp_path: Path, cli: Cli) -> None:
    """Report and card have ids and commits; they have no path of this machine where an id was given."""
    ran = cli("--base", BASE, "--adapter", ADAPTER, "--target", "nf4", "--out", tmp_path / "out", "--device", "cpu")
    assert ran.code == 0, ran.err
    report = json.loads((tmp_path / "out" / "qmerge.json").read_text())
    found = {entry["role"]: (entry["id"], entry["commit"], entry["name"]) for entry in report["inputs"]}
    assert found["base"] == (BASE, COMMITS[BASE], BASE)
    assert found["adapter"] == (ADAPTER, COMMITS[ADAPTER], ADAPTER)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == [BASE, ADAPTER]
    assert COMMITS[BASE] in card.text and str(tmp_path) not in card.content
    assert str(tmp_path) not in (tmp_path / "out" / "qmerge.json").read_text()
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (
            ("--base", "nobody/nothing", "--adapter", ADAPTER),
            CheckpointError,
            ("nobody/nothing", "because HF_HUB_OFFLINE is set"),
        ),
        (("--base", BASE, "--adapter", "nobody/nothing"), AdapterError, ("nobody/nothing", "offline")),
        (("--base", BASE, "--adapter", ADAPTER, "--revision", "v9"), CheckpointError, (BASE, "v9", "offline")),
        (("--base", BASE, "--adapter", ADAPTER, "--adapter-revision", "v9"), AdapterError, (ADAPTER, "v9")),
        (("--base", "nothing", "--adapter", ADAPTER), CheckpointError, ("nothing", "no such folder", "owner/name")),
        (("--base", "../up/base", "--adapter", ADAPTER), CheckpointError, ("../up/base", "no such folder")),
        (("--base", "../base", "--adapter", ADAPTER), CheckpointError, ("../base", "no such folder")),
        (("--base", "a b/c", "--adapter", ADAPTER), CheckpointError, ("a b/c", "no such folder")),
        (("--base", "/", "--adapter", ADAPTER), CheckpointError, ("config.json",)),
        (("--base", "", "--adapter", ADAPTER), CheckpointError, ("an empty name",)),
        (("--base", "./--x/y--z", "--adapter", ADAPTER), CheckpointError, ("no such folder",)),
        (("--base", "a--b/c..d", "--adapter", ADAPTER), CheckpointError, ("a--b/c..d", "no such folder")),
    ],
)
def test_missing_inputs(
    cache: Path, tmp_path: Path, cli: Cli, arguments: tuple[str, ...], error: type[Exception], words: tuple[str, ...]
) -> None:
    ran = cli(*arguments, "--target", "nf4", "--out", tmp_path / "out")
    assert ran.code == 3, ran.err
    assert type(ran.error) is error
    assert ran.err.startswith("qmerge: ") and len(ran.err.splitlines()) == 1
    assert not [word for word in words if word not in ran.err], ran.err
    assert not (tmp_path / "out").exists()


def test_a_snapshot_without_its_weights(cache: Path, tmp_path: Path, cli: Cli) -> None:
    """A cache that holds only the config (as after AutoConfig.from_pretrained)."""
    snapshot = cache / f"models--{BASE.replace('/', '--')}" / "snapshots" / COMMITS[BASE]
    (snapshot / "model.safetensors").unlink()
    ran = cli("--base", BASE, "--adapter", ADAPTER, "--target", "nf4", "--out", tmp_path / "out")
    assert ran.code == 3 and "model.safetensors" in ran.err, ran.err


def test_the_cache_is_the_librarys(cache: Path) -> None:
    assert hub.cache_folder() == cache.resolve()
