"""Uploads, against a stand-in of the Hub: what arrives, what is refused before the merge, and what is sent again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard, constants

from qmerge.errors import HubError
from qmerge.evaluation.verify import verify
from qmerge.publish import check_destination, upload
from qmerge.recipe import make_recipe
from qmerge.schema import read_report

from ..conftest import Cli, nearest_merge, snapshot
from ..hub_server import READER, STRANGER, WRITER, HubServer, Repo
from ..report.reports import full_report

ID = "alice/merged-nf4"
SECRETS = (WRITER, READER, STRANGER)


@pytest.fixture
def hub(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """Logged in."""
    monkeypatch.setenv("HF_TOKEN", WRITER)
    return hub


@pytest.fixture(scope="module")
def finished(nf4: Path, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged model in several files."""
    from qmerge import merge

    out = tmp_path_factory.mktemp("finished") / "merged"
    merge(base=nf4, adapter=lora, target="nf4", out=out, rounding="nearest", max_shard_size="20kB", quiet=True)
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, which may be changed."""
    return Path(shutil.copytree(finished, tmp_path / "merged"))


def without_secrets(*texts: str) -> bool:
    return not any(secret in text for secret in SECRETS for text in texts)


def test_a_merge_is_pushed(hub: HubServer, nf4: Path, lora: Path, tmp_path: Path, cli: Cli) -> None:
    """The files of the folder arrive, and no others; the card names the model; the folder still verifies."""
    out = tmp_path / "out"
    ran = cli(*nearest_merge(nf4, lora, out), "--push-to-hub", ID, "--private")
    assert ran.code == 0, ran.err
    repo = hub.repos[ID]
    assert repo.private and len(repo.commits) == 1
    assert {name: content for name, content in repo.files.items() if name != ".gitattributes"} == {
        path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()
    }
    assert f"vllm serve {ID}" in repo.files["README.md"].decode()
    assert f"{hub.url}/{ID}" in ran.err
    assert all(check.ok for check in verify(out, reload=False))
    # What others get says nothing about how it was uploaded.
    report = read_report(out)
    assert "push_to_hub" not in report.recipe and not report.recipe.get("private")
    texts = [path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
    assert without_secrets(ran.out, ran.err, *texts)


def test_a_finished_folder_is_pushed(hub: HubServer, out: Path, cli: Cli) -> None:
    before = snapshot(out)
    (out / "notes.txt").write_text("of the user")
    ran = cli("push", out, "merged-nf4", "--json")
    assert ran.code == 0, ran.err
    assert ID in ran.out and not hub.repos[ID].private
    # Only the files that qmerge wrote: others may be private.
    assert hub.repos[ID].files.keys() - {".gitattributes"} == before.keys()
    # A second push changes nothing: the card has the name already.
    card = (out / "README.md").read_bytes()
    assert cli("push", out, ID).code == 0
    assert (out / "README.md").read_bytes() == card and card.count(b"## How to load it") == 1
    ModelCard.load(out / "README.md").validate()


def test_held_out_text_is_not_published_unasked(
    hub: HubServer, out: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"base": "b", "adapter": "a", "target": "nf4"}
    assert make_recipe(settings).quoted_beginnings == 3
    assert make_recipe({**settings, "push_to_hub": ID}).quoted_beginnings == 0
    assert make_recipe({**settings, "push_to_hub": ID, "continuations": 2}).quoted_beginnings == 2
    assert "the report quotes" not in cli("push", out, ID).err
    # A model that was made without thinking of the Hub.
    report = read_report(out).model_copy(update={"fidelity": full_report().fidelity})
    monkeypatch.setattr(upload, "_complete_report", lambda _: report)
    assert "the report quotes 1 beginning of the text" in cli("push", out, ID).err


def test_a_gated_model_of_an_organization_is_refused_before_the_merge(hub: HubServer) -> None:
    """It exists, and the token may not write there, though the user belongs to the organization."""
    hub.organizations = ["team"]
    assert check_destination("team/new", None).files is None
    hub.repos["team/model"] = Repo({}, gated=True)
    with pytest.raises(HubError, match=r"team/model cannot be written: the token may not do this.*status 403"):
        check_destination("team/model", None)


def test_a_fine_grained_token_needs_the_right_to_write_of_the_owner(hub: HubServer) -> None:
    hub.organizations = ["team"]
    hub.scopes = [
        {"entity": {"name": "alice"}, "permissions": ["repo.content.read"]},
        {"entity": {"name": "team"}, "permissions": ["repo.content.read", "repo.write"]},
    ]
    assert check_destination("team/new", None).files is None
    with pytest.raises(HubError, match="alice/new: the token may not create models of alice: log in with"):
        check_destination("alice/new", None)


def test_an_interrupted_upload_goes_on(hub: HubServer, out: Path, cli: Cli) -> None:
    """One of several files of weights fails: the second push sends that one only."""
    weights = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(weights) > 2
    hub.failing_uploads = 1
    ran = cli("push", out, ID, "--private")
    assert ran.code == 8 and len(ran.err.splitlines()) == 2, ran.err  # a note, and the error
    assert f"qmerge push {out} {ID} --private" in ran.err and "the connection was lost" in ran.err
    assert not hub.repos[ID].commits and hub.repos[ID].files.keys() == {".gitattributes"}
    sent = len(hub.uploaded)
    assert sent < len(weights)  # how many were under way when one failed depends on the threads
    assert cli("push", out, ID, "--private").code == 0
    assert len(hub.uploaded) == len(weights) and len(set(hub.uploaded)) == len(weights)
    assert hub.repos[ID].private
    assert hub.repos[ID].files[weights[0]] == (out / weights[0]).read_bytes()


def test_ctrl_c_says_how_to_go_on(hub: HubServer, out: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(HfApi, "upload_folder", interrupted)
    ran = cli("push", out, ID, "--quiet")
    assert ran.code == 130 and ran.err.count("\n") == 1 and f"qmerge push {out} {ID}" in ran.err


def test_files_of_an_earlier_push_are_removed(
    hub: HubServer, out: Path, nf4: Path, lora: Path, tmp_path: Path, cli: Cli
) -> None:
    """Shards of another number would be loaded, too. A file that somebody added stays."""
    assert cli("push", out, ID).code == 0
    hub.repos[ID].files["picture.png"] = b"added on the Hub"
    single = tmp_path / "single"
    ran = cli(*nearest_merge(nf4, lora, single), "--push-to-hub", ID)
    assert ran.code == 0, ran.err
    names = hub.repos[ID].files.keys()
    assert "model.safetensors" in names and "picture.png" in names
    assert not [name for name in names if name.startswith("model-0") or name.endswith("index.json")]


def test_a_model_past_its_limit_is_not_pushed(hub: HubServer, nf4: Path, lora: Path, tmp_path: Path, cli: Cli) -> None:
    ran = cli(*nearest_merge(nf4, lora, tmp_path / "out"), "--push-to-hub", ID, "--min-kept", "0.999")
    assert ran.code == 5 and "not pushed to" in ran.err and ID not in hub.repos


CASES = {
    "no token": (None, ID, 8, ("needs a token", "hf auth login", "HF_TOKEN")),
    "a wrong token": ("hf_of_nobody", ID, 8, ("not valid", "hf auth login")),
    "a token that only reads": (READER, ID, 8, ("alice may only read",)),
    "somebody else's model": (STRANGER, "alice/taken", 8, ("alice/taken", "may not do this", "403")),
    "somebody else's name": (WRITER, "carol/new", 8, ("carol/new", "may not write there", "alice")),
    "another model": (WRITER, "alice/other", 2, ("alice/other", "qmerge did not write", "model.safetensors")),
    "a public model": (WRITER, "alice/taken", 2, ("alice/taken", "is public", "--private")),
    "no id": (WRITER, "a b/c", 2, ("a b/c", "owner/name")),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_refused_before_the_merge(
    hub: HubServer, nf4: Path, lora: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    token, hub_id, code, words = CASES[case]
    hub.repos["alice/taken"] = Repo({"README.md": b""})
    hub.repos["alice/other"] = Repo({"model.safetensors": b""})
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    ran = cli(*nearest_merge(nf4, lora, tmp_path / "out"), "--push-to-hub", hub_id, "--private")
    assert ran.code == code, ran.err
    assert ran.err.startswith("qmerge: ") and len(ran.err.splitlines()) == 1
    assert not [word for word in words if word not in ran.err], ran.err
    assert not (tmp_path / "out").exists() and not hub.uploaded
    assert without_secrets(ran.err, ran.out)


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_connection(
    hub: HubServer, out: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    before = snapshot(out)
    if offline:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    ran = cli("push", out, ID)
    assert ran.code == 8 and len(ran.err.splitlines()) == 1, ran.err
    assert ("HF_HUB_OFFLINE" in ran.err) == offline
    assert snapshot(out) == before


def test_what_cannot_be_pushed(hub: HubServer, out: Path, nf4: Path, tmp_path: Path, cli: Cli) -> None:
    ran = cli("push", nf4, ID)
    assert ran.code == 3 and "qmerge.json" in ran.err
    next(out.glob("*.safetensors")).unlink()
    ran = cli("push", out, ID)
    assert ran.code == 3 and "is missing" in ran.err and ID not in hub.repos
    ran = cli("--base", nf4, "--adapter", nf4, "--target", "nf4", "--patch", tmp_path / "a.patch", "--push-to-hub", ID)
    assert ran.code == 2 and "use out instead of patch" in ran.err
    ran = cli("--base", nf4, "--adapter", nf4, "--target", "nf4", "--out", out, "--private")
    assert ran.code == 2 and "push_to_hub" in ran.err
    ran = cli("--base", nf4, "--adapter", nf4, "--target", "nf4", "--out", out, "--push-to-hub", ID, "--shard", "1/2")
    assert ran.code == 2 and "qmerge push OUT ID" in ran.err
