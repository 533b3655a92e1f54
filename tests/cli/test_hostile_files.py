"""Hostile files next to the weights: cards, tokenizers, templates. They never stop a merge after its weights are written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from qmerge.calibration.texts import load_tokenizer
from qmerge.checkpoint.folder import side_files, tokenizer_warning
from qmerge.checkpoint.model_cards import card_fields
from qmerge.errors import TokenizerError

from ..conftest import Cli
from .test_bad_inputs import Place, merge, place
from .test_hostile_inputs import DEEP, within_bounds

__all__ = ["place"]

HUGE_FILE = 600 * 2**20
LIST = "[" * 3000 + "]" * 3000
BILLION = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{after}: &{after} [{','.join(['*' + before] * 9)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)


def card(front: str) -> bytes:
    return f"---\n{front}\n---\n# A model\n".encode("utf-8", "surrogatepass")


def sparse(path: Path, size: int = 5 * 2**30) -> None:
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(size)


CARDS = {
    "tags_is_a_number": card("tags: 5\nlicense: mit"),
    "license_is_a_number": card("license: 5"),
    "license_is_a_date": card("license: 2001-01-01"),
    "license_is_no_date": card("license: 2001-99-99"),
    "license_nested": card("license: " + LIST),
    "license_40_levels": card("license: " + "[" * 40 + "]" * 40),
    "nested_elsewhere": card("x: " + LIST + "\nlicense: mit"),
    "surrogate": card('license: "\\ud800"'),
    "control": card('license: "\\e[2J\\0"'),
    "aliases": card(BILLION + "license: *i"),
    "code": card("license: !!python/object/apply:os.system ['true']"),
    "line_breaks": b"---" + b"\n" * 200_000 + b"a: b",
    "spaces": b" " * 200_000,
    "no_text": b"\xff\xfe---",
    "long": card("license: " + "x" * 5_000_000),
    "a_list": card("- a"),
    "license_of_objects": card("license: {a: {b: [1, 2]}}\nlicense_link: [1]"),
    "digits": card("license: " + "9" * 5000),
    "datasets_is_a_number": card("datasets: 5\nlicense: mit"),
    "datasets_nested": card("datasets: " + LIST),
}


@pytest.mark.parametrize("name", CARDS)
def test_cards_give_lines_or_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "README.md").write_bytes(CARDS[name])
    fields = within_bounds(lambda: card_fields(tmp_path, ("license", "datasets")))
    assert fields in ({}, {"license": "mit"}), fields


def test_cards_of_every_shape_are_read(tmp_path: Path) -> None:
    """The control: as huggingface_hub reads them."""
    from huggingface_hub import ModelCard

    for front in (
        "license: mit",
        "tags:\n- a\nlicense: [a, b]\nx: {a: 1}",
        "license: |\n  mit",
        "datasets:\n- a/b\n- c/d",
    ):
        for line_break in ("\n", "\r\n"):
            (tmp_path / "README.md").write_bytes(card(front).replace(b"\n", line_break.encode()))
            library = ModelCard.load(tmp_path / "README.md").data.to_dict()
            expected = {name: library[name] for name in ("license", "datasets") if name in library}
            found = card_fields(tmp_path, ("license", "datasets"))
            assert found == expected or front.startswith("license: |")


@pytest.mark.parametrize("name", ["tags_is_a_number", "license_40_levels", "datasets_is_a_number"])
def test_no_card_stops_a_merge(place: Place, cli: Cli, name: str) -> None:
    for folder in (place.base, place.adapter):
        (folder / "README.md").write_bytes(CARDS[name])
    ran = within_bounds(lambda: merge(cli, place, "nf4", "--rounding", "preserve", "--calibration", "random"))
    assert ran.code == 0, ran.err
    assert ("license: mit" in (place.out / "README.md").read_text(encoding="utf-8")) == (name != "license_40_levels")


@pytest.mark.parametrize("kind", ["pipe", "sparse", "folder"])
def test_cards_that_are_no_small_file(tmp_path: Path, kind: str) -> None:
    make(tmp_path / "README.md", kind)
    assert within_bounds(lambda: card_fields(tmp_path, ("license",))) == {}


def make(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        sparse(path)


def tokenizer(**content: object) -> bytes:
    return json.dumps(content).encode()


TOKENIZERS = {
    "deep": DEEP.encode(),
    "deep_list": b'{"added_tokens":' + LIST.encode() + b"}",
    "a_list": b"[]",
    "no_json": b"\xff",
    "vocab_is_a_number": tokenizer(model={"vocab": 5}),
    "vocab_of_texts": tokenizer(model={"vocab": {"a": "b"}}),
    "vocab_of_lists": tokenizer(model={"vocab": {"a": [], "b": {}}}),
    "added_is_a_number": tokenizer(model={"vocab": {}}, added_tokens=5),
    "huge_id": tokenizer(model={"vocab": {"a": 10**400}}),
    "digits": b'{"model":{"vocab":{"a":' + b"9" * 5000 + b"}}}",
    "surrogate": tokenizer(model={"vocab": {"\ud800": 1}}),
    "id_is_infinite": tokenizer(model={"vocab": {"a": float("inf")}}),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_give_a_warning_or_none(tmp_path: Path, name: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(TOKENIZERS[name])
    for rows in (96, 0, -1, "96", 1.5, [96], True):
        tokenizer_warning(path, {"vocab_size": rows})
    (tmp_path / "tokenizer_config.json").write_bytes(TOKENIZERS[name])
    assert list(side_files(tmp_path, tmp_path)) == ["tokenizer.json", "tokenizer_config.json"]


def test_a_tokenizer_of_5_gb_is_not_read(tmp_path: Path) -> None:
    sparse(tmp_path / "tokenizer.json", 5 * 2**30)
    assert within_bounds(lambda: tokenizer_warning(tmp_path / "tokenizer.json", {"vocab_size": 96})) is None
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: larger than"):
        within_bounds(lambda: load_tokenizer(tmp_path))


def test_hostile_files_are_copied(place: Place, cli: Cli) -> None:
    files = ("tokenizer.json", "tokenizer_config.json", "chat_template.json", "chat_template.jinja", "vocab.json")
    for file in files:
        (place.adapter / file).write_bytes(DEEP.encode())
    (place.base / "generation_config.json").write_bytes(DEEP.encode())
    ran = within_bounds(lambda: merge(cli, place))
    assert ran.code == 0, ran.err
    for file in (*files, "generation_config.json"):
        assert (place.out / file).read_bytes() == DEEP.encode()


@pytest.mark.parametrize("file", ["tokenizer.json"])
def test_huge_files_are_not_read_whole(place: Place, cli: Cli, file: str) -> None:
    sparse(place.base / file, HUGE_FILE)
    ran = within_bounds(lambda: merge(cli, place))
    assert ran.code == 0, ran.err
    assert (place.out / file).stat().st_size == HUGE_FILE


def test_no_link_leads_out(place: Place, cli: Cli) -> None:
    """A file elsewhere would be published with the model."""
    (place.tmp / "secret").write_text("secret")
    for folder in (place.base, place.adapter):
        for file in ("tokenizer.json", "LICENSE"):
            (folder / file).symlink_to(place.tmp / "secret")
    assert merge(cli, place).code == 0
    assert not (place.out / "tokenizer.json").exists() and not (place.out / "LICENSE").exists()


def test_no_token_is_written(place: Place, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "hf_" + "s3cret" * 6
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, token)
    ran = merge(cli, place)
    assert ran.code == 0 and token not in ran.out + ran.err
    for path in place.out.rglob("*"):
        assert token.encode() not in path.read_bytes()
