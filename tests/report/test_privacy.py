"""No output file names the user, a folder of this machine or a secret; and what is named is found again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from qmerge import hub, run
from qmerge.evaluation.verify import verify
from qmerge.patch import apply_patch, direct
from qmerge.progress import NoProgress
from qmerge.recipe import make_recipe

from .. import models
from ..conftest import Cli, snapshot
from ..gguf.test_vocabulary import byte_level
from ..models import edit_json

USER = "zaphodbeeblebrox"
SECRET = "hf_secret0123456789"


@pytest.fixture
def place(nf4: Path, dense: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a user with all inputs, which is not the current folder."""
    place = tmp_path / USER / "work"
    shutil.copytree(nf4, place / "base")
    shutil.copytree(dense, place / "original")
    shutil.copytree(lora, place / "lora")
    models.adapter(models.llama(), place / "other", seed=9)
    texts = place / "texts"
    texts.mkdir()
    sentence = "Some words of a text that is long enough for the model. "
    (texts / "calibration.txt").write_text(sentence * 40)
    (texts / "heldout.txt").write_text(sentence * 10)
    for folder in ("base", "original"):
        save_tokenizer(place / folder)
    # What transformers and peft write where a model was trained.
    edit_json(place / "lora/adapter_config.json", base_model_name_or_path=str(place / "trained/on-another"))
    for folder in ("base", "original"):
        edit_json(place / folder / "config.json", _name_or_path=str(place / "trained/model"))
        edit_json(place / folder / "tokenizer_config.json", name_or_path=str(place / "trained/model"))
    for name in ("USER", "LOGNAME"):
        monkeypatch.setenv(name, USER)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    return place


def save_tokenizer(folder: Path) -> None:
    """Of single characters, as many as the models have rows for."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = {chr(32 + number): number for number in range(95)} | {"<unk>": 95}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def settings(place: Path, **more: Any) -> dict[str, Any]:
    return {"base": place / "base", "adapter": place / "lora", "target": "nf4", "device": "cpu", **more}


MERGES: dict[str, dict[str, Any]] = {
    "everything": {
        "calibration": "texts/calibration.txt", "verify": "texts/heldout.txt", "original": "original", "rounding": "preserve",
        "residual": 2, "promote": "4kB", "calibration_tokens": 512, "sequence_length": 32, "min_kept": -1, "max_kl_ratio": 100,
    },
    "several": {"adapter": ["lora", "other"], "rounding": "nearest", "combine": "ties", "verify": "texts/heldout.txt"},
    "gptq": {"target": "gptq", "rounding": "nearest"},
}  # fmt: skip
PATHS = ("base", "adapter", "original", "calibration", "verify")


def in_place(place: Path, more: dict[str, Any]) -> dict[str, Any]:
    """The settings with absolute paths."""
    changed: dict[str, Any] = {}
    for name, value in more.items():
        if name in PATHS:
            value = [place / item for item in value] if isinstance(value, list) else place / value
        changed[name] = value
    return changed


def check_private(folder: Path, tmp_path: Path) -> None:
    for name in snapshot(folder):
        content = (folder / name).read_bytes()
        for secret in (str(tmp_path), tmp_path.name, USER, SECRET, str(Path.cwd()), str(Path.home()) + "/"):
            assert secret.encode() not in content, f"{name} names {secret}"


@pytest.mark.parametrize("home", ["elsewhere", "above"])
@pytest.mark.parametrize("name", MERGES)
def test_no_output_names_what_is_private(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, home: str
) -> None:
    if home == "above":  # the user's own home folder
        monkeypatch.setenv("HOME", str(place.parent))
    out = place / "out"
    run.merge(make_recipe(settings(place, out=out, **in_place(place, MERGES[name]))))
    check_private(out, tmp_path)
    (out / "control").write_text(f"by {USER}")
    with pytest.raises(AssertionError, match="control names"):
        check_private(out, tmp_path)


def test_no_gguf_output_names_what_is_private(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("conversion")
    base = models.save(models.llama(vocab_size=790), place / "dense")
    byte_level(base, "gpt-2")
    run.merge(make_recipe(settings(place, base=base, target="q8_0", rounding="nearest", out=place / "out")))
    check_private(place / "out", tmp_path)
    checks = {check.name: check for check in verify(place / "out", reload=False, against_inputs=True)}
    assert checks["hashes"].ok and checks["inputs"].found == "21 of 21 weights computed again, same bytes"
    (place / "out/Modelfile").write_text("FROM ./other.gguf")
    assert not verify(place / "out", reload=False)[0].ok


def test_no_patch_names_what_is_private(place: Path, tmp_path: Path) -> None:
    recipe = settings(place, rounding="nearest", residual=2, patch=place / "a.patch")
    direct.merge(make_recipe(recipe), False, NoProgress())
    apply_patch(place / "base", place / "a.patch", place / "applied")
    check_private(place / "applied", tmp_path)


def test_published_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / USER))
    monkeypatch.chdir(tmp_path)
    names = {
        "owner/name": "owner/name", "models/base": "models/base", "../base": "../base", "lora#math=0.5": "lora#math=0.5",
        str(tmp_path / USER / "models/base"): "~/models/base", "~/models/base/": "~/models/base",
        str(tmp_path / "models/base"): "models/base", "/data/of/base/": "base", "/data/lora=0.5": "lora=0.5",
        f"../../home/{USER}/base": "base", "/data/model.gguf": "model.gguf", "owner/name:file.gguf": "owner/name:file.gguf",
    }  # fmt: skip
    assert {name: hub.published_name(name) for name in names} == names


def test_inputs_are_found_next_to_the_output(place: Path, cli: Cli) -> None:
    """The stored recipe makes the same model again; what is not found has to be given."""
    calibration = place / "texts/calibration.txt"
    more = {"rounding": "preserve", "calibration": calibration, "calibration_tokens": 512, "sequence_length": 32}
    run.merge(make_recipe(settings(place, out=place / "out", **more)))
    stored = place / "out/qmerge_recipe.yaml"
    written = yaml.safe_load(stored.read_text())
    assert (written["base"], written["adapter"], written["calibration"]) == ("base", "lora", "calibration.txt")
    ran = cli("run", stored, "--out", place / "again")
    assert ran.code == 2 and "calibration.txt" in ran.err and "--calibration FILE" in " ".join(ran.err.split())
    assert not (place / "again").exists()
    assert cli("run", stored, "--out", place / "again", "--calibration", calibration).code == 0
    same = {"qmerge_recipe.yaml", "README.md", "model.safetensors", "config.json"}
    first, second = snapshot(place / "out"), snapshot(place / "again")
    assert {name: first[name] for name in same} == {name: second[name] for name in same}
    (place / "base").rename(place / "moved")
    ran = cli("run", stored, "--out", place / "third", "--calibration", calibration)
    assert ran.code == 2 and "base base: not found" in ran.err and "add --base DIR" in " ".join(ran.err.split())
    (place / "lora").rename(place / "moved-lora")
    ran = cli("run", stored, "--out", place / "third", "--calibration", calibration)
    assert "base base, adapter lora: not found" in ran.err, "all at once"
    assert "add --base DIR --adapter DIR" in " ".join(ran.err.split())


def test_a_missing_held_out_text_is_asked_for(place: Path, cli: Cli) -> None:
    recipe = settings(
        place, out=place / "out", rounding="nearest", verify=place / "texts/heldout.txt", sequence_length=32
    )
    run.merge(make_recipe(recipe))
    ran = cli("run", place / "out/qmerge_recipe.yaml", "--out", place / "again")
    assert ran.code == 2 and "--verify FILE" in " ".join(ran.err.split()) and not (place / "again").exists()
