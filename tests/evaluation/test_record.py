"""qmerge.json records every file of its folder: a changed bit in any of them is found, and a file too many or too few."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from qmerge import patch, run
from qmerge.errors import CheckpointError
from qmerge.evaluation.verify import check_hashes
from qmerge.patch import direct
from qmerge.progress import NoProgress
from qmerge.recipe import make_recipe
from qmerge.run import complete
from qmerge.run import texts as run_texts
from qmerge.schema import NAME, FidelityRecord, read_report

from ..conftest import Cli, snapshot

SIDE_FILES = {
    "tokenizer.json": '{"model": {"vocab": {"a": 0}}}',
    "tokenizer_config.json": '{"model_max_length": 64}',
    "chat_template.jinja": "{{ messages }}",
    "LICENSE": "Do what you like.\n",
    "modeling_own.py": "raise SystemExit\n",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
}
FLIPS = 200
"""Changed bits of each file that has more bytes; of a smaller file, one bit of every byte."""


@pytest.fixture(scope="module")
def base(nf4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shutil.copytree(nf4, tmp_path_factory.mktemp("record") / "base")
    for name, text in SIDE_FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def merged(base: Path, lora: Path, out: Path, **settings: Any) -> Path:
    recipe = {"base": base, "adapter": lora, "target": "nf4", "rounding": "nearest", "device": "cpu", "out": out}
    run.merge(make_recipe({**recipe, **settings}))
    return out


@pytest.fixture(scope="module")
def whole(base: Path, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in two files with a residual adapter."""
    out = tmp_path_factory.mktemp("record") / "out"
    return merged(base, lora, out, max_shard_size="60kB", residual=2)


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "out")


def is_sound(folder: Path) -> bool:
    try:
        check_hashes(folder, read_report(folder))
    except CheckpointError:
        return False
    return True


def all_files(folder: Path) -> list[str]:
    return list(snapshot(folder))


def test_every_kind_of_file_is_there(whole: Path) -> None:
    names = set(all_files(whole))
    assert names > {*SIDE_FILES, "config.json", "generation_config.json", "README.md", NAME, "qmerge.html"}
    assert names > {"qmerge_recipe.yaml", "model.safetensors.index.json", "residual/adapter_model.safetensors"}
    assert is_sound(whole), "the control"


def test_every_changed_bit_is_found(out: Path) -> None:
    chance = random.Random(0)
    for name in all_files(out):
        path = out / name
        content = path.read_bytes()
        offsets = range(len(content))
        if len(content) > FLIPS:
            offsets = chance.sample(offsets, FLIPS)  # type: ignore[assignment]
        for offset in offsets:
            changed = bytearray(content)
            changed[offset] ^= 1 << chance.randrange(8)
            path.write_bytes(changed)
            assert not is_sound(out), f"{name}, byte {offset}"
        path.write_bytes(content)
    assert is_sound(out), "the control"


@pytest.mark.parametrize("how", ["missing", "truncated", "longer"])
def test_missing_and_cut_files_are_found(out: Path, how: str) -> None:
    for name in all_files(out):
        path = out / name
        content = path.read_bytes()
        if how == "missing":
            path.unlink()
        else:
            path.write_bytes(content[:-1] if how == "truncated" else content + b" ")
        assert not is_sound(out), name
        path.write_bytes(content)


def test_all_damaged_files_are_named(out: Path, cli: Cli) -> None:
    (out / "LICENSE").write_text("Mine.")
    (out / "tokenizer.json").unlink()
    ran = cli("verify", out, "--no-reload")
    assert ran.code == 3 and "LICENSE has changed" in ran.out and "tokenizer.json is missing" in ran.out


def test_files_of_others_are_named(out: Path, cli: Cli) -> None:
    (out / "notes.txt").write_text("mine")
    (out / ".cache").mkdir()
    (out / ".cache/state").write_text("of the Hub library")
    ran = cli("verify", out, "--no-reload")
    assert ran.code == 0 and "Not part of the model: notes.txt" in ran.out and "state" not in ran.out
    shutil.copy(out / "residual/adapter_model.safetensors", out / "extra.safetensors")
    ran = cli("verify", out, "--no-reload")
    assert ran.code == 3 and "extra.safetensors: not in qmerge.json" in ran.out


def test_reports_of_older_versions_record_weights_only(out: Path, cli: Cli) -> None:
    """They are read, and verify says what they do not record."""
    content = json.loads((out / NAME).read_text())
    del content["files"], content["checksum"]
    (out / NAME).write_text(json.dumps(content))
    ran = cli("verify", out, "--no-reload")
    assert ran.code == 0 and "does not record the other files" in ran.out
    assert cli("report", out).code == 0 and json.loads((out / NAME).read_text()) == content


def test_report_keeps_the_record_right(out: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qmerge.report.html.html_report", lambda report: "<p>of a later version")
    assert cli("report", out).code == 0
    assert "later version" in (out / "qmerge.html").read_text() and is_sound(out)
    assert cli("report", out, "--html", out.parent / "elsewhere.html").code == 0 and is_sound(out)
    changed = (out / NAME).read_text().replace('"device": "', '"device": "my ')
    (out / NAME).write_text(changed)
    ran = cli("report", out)
    assert ran.code == 3 and "its checksum" in ran.err and not is_sound(out), "damage does not get a new checksum"


def test_reports_that_are_written_again_are_recorded(
    base: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a")
    judged = FidelityRecord(
        text="text.txt", tokens=2, sequence_length=2, loss_base=3, loss_unmerged=2, loss_merged=2, gain_kept=1, kl_base=1,
        kl_merged=0, kl_ratio=0, top1_agreement=1, kl_p99=0,
    )  # fmt: skip
    monkeypatch.setattr(complete, "fidelity", lambda *_, **__: judged)
    monkeypatch.setattr(run_texts, "load_tokenizer", lambda folder: None)  # that of SIDE_FILES is none
    out = merged(base, lora, tmp_path / "out", verify=text)
    report = read_report(out)
    assert report.fidelity == judged and is_sound(out)
    assert "text.txt" in (out / "README.md").read_text()


def test_a_patched_model_is_recorded(base: Path, lora: Path, tmp_path: Path) -> None:
    recipe = {"base": base, "adapter": lora, "target": "nf4", "rounding": "nearest", "device": "cpu", "residual": 2}
    direct.merge(make_recipe({**recipe, "patch": tmp_path / "a.patch"}), False, NoProgress())
    patch.apply_patch(base, tmp_path / "a.patch", tmp_path / "applied")
    assert is_sound(tmp_path / "applied")
    (tmp_path / "applied" / "qmerge_recipe.yaml").write_text("target: nf4")
    assert not is_sound(tmp_path / "applied")


def test_a_model_in_parts_is_recorded(base: Path, lora: Path, tmp_path: Path) -> None:
    from qmerge.checkpoint.parts import Part

    settings = {"base": base, "adapter": lora, "target": "nf4", "rounding": "nearest", "max_shard_size": "60kB"}
    recipe = make_recipe({**settings, "device": "cpu", "out": tmp_path / "out"})
    for number in (1, 2):
        run.merge_part(recipe, Part(number, 2))
    run.finalize(tmp_path / "out")
    assert is_sound(tmp_path / "out")
    recorded = {record.file for record in read_report(tmp_path / "out").files}
    assert recorded == {name for name in all_files(tmp_path / "out") if not name.startswith("model-")} - {NAME}
