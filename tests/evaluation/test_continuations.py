"""What base, unmerged and merged model write after a beginning of a text, against transformers and peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import qmerge.demo
from qmerge.evaluation import continuations
from qmerge.evaluation.continuations import NEW_TOKENS, PROMPT_TOKENS, chosen_prompts
from qmerge.schema import read_report

from ..conftest import Cli
from .test_fidelity import whole

DEMO = Path(qmerge.demo.__file__).parent
TEXT = DEMO / "heldout.txt"
SETTINGS = {
    "base": DEMO / "base-nf4", "adapter": DEMO / "adapter", "target": "bf16", "rounding": "nearest", "device": "cpu",
    "sequence_length": 256,
}  # fmt: skip
ASKED = [part for name, value in SETTINGS.items() for part in (f"--{name.replace('_', '-')}", value)]


class Digits:
    """A tokenizer: token 7 ends a text, token 5 a line."""

    eos_token_id = 7

    def decode(self, ids: list[int]) -> str:
        return "".join("\n" if token == 5 else "x" for token in ids)


def test_prompts_are_from_all_over_the_text() -> None:
    batches = list(torch.arange(9 * 100).add(100).view(9, 100).split(4))
    prompts = chosen_prompts(batches, 3, Digits())
    assert prompts.shape == (3, PROMPT_TOKENS) and prompts[:, 0].tolist() == [100, 400, 700]
    assert chosen_prompts([torch.arange(10, 18).view(1, 8)], 3, Digits()).tolist() == [[10, 11, 12, 13]]


@pytest.mark.parametrize(
    ("ids", "start"),
    [
        ([1, 5, 5, 7, 3, 4, 5, 6], 4), ([5, 2, 5, 5, 3, 4, 5, 6], 4), ([1, 5, 2, 3, 3, 4, 5, 6], 2),
        ([1, 2, 3, 4, 7, 5, 1, 1], 0),
    ],
    ids=["document", "paragraph", "line", "none with room after it"],
)  # fmt: skip
def test_prompts_begin_where_a_part_of_the_text_begins(ids: list[int], start: int) -> None:
    assert chosen_prompts([torch.tensor([ids])], 1, Digits()).tolist() == [ids[start : start + 4]]


def written(model: Any, prompt: str) -> str:
    """By transformers' own pipeline of steps: the likeliest token each time, without a cache."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base-nf4")
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    length = ids.shape[1]
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    return str(tokenizer.decode(ids[0, length:]))


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("continued") / "out"
    text = out.with_name("text.txt")
    text.write_text(TEXT.read_text()[:4000])
    qmerge.merge(**SETTINGS, out=out, verify=text, continuations=3, quiet=True)
    return out


def test_each_model_writes_what_transformers_writes(merged: Path, tmp_path: Path) -> None:
    fidelity = read_report(merged).fidelity
    assert fidelity is not None and len(fidelity.continuations) == 3
    qmerge.merge(**{**SETTINGS, "target": "fp32"}, out=tmp_path / "unmerged", quiet=True)
    for record in fidelity.continuations:
        assert record.prompt in TEXT.read_text()
        assert record.unmerged == written(whole(tmp_path / "unmerged"), record.prompt)
        assert record.merged == written(whole(merged), record.prompt)
        assert record.base == written(whole(DEMO / "base-nf4"), record.prompt)
    assert any(record.base != record.unmerged for record in fidelity.continuations)


def test_none_are_written_where_the_model_is_too_large(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    monkeypatch.setattr(continuations, "fits_whole", lambda layered, max_memory: False)
    text = merged.with_name("text.txt")
    ran = cli(*ASKED, "--out", tmp_path / "out", "--verify", text)
    record = json.loads((tmp_path / "out" / "qmerge.json").read_text())["fidelity"]
    assert ran.code == 0 and record["kl_ratio"] is not None and record["continuations"] == []
    assert "What the models write" not in (tmp_path / "out" / "qmerge.html").read_text()


def test_a_private_text_is_kept_out(merged: Path, tmp_path: Path, cli: Cli) -> None:
    secret = "The reactor at Oslo is blue. "
    (tmp_path / "private.txt").write_text(secret * 60)
    for count, names in ((0, set()), (1, {"qmerge.json", "qmerge.html"})):
        out = tmp_path / f"out-{count}"
        assert cli(*ASKED, "--verify", tmp_path / "private.txt", "--out", out, "--continuations", count).code == 0
        assert {path.name for path in out.iterdir() if "reactor" in path.read_text(errors="replace")} == names


def test_a_model_that_cannot_write_is_judged_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions may end before the continuation does, and code of an architecture may raise anything."""

    def failing(*_: object) -> list[str]:
        raise IndexError("index out of range in self")

    monkeypatch.setattr(continuations, "_continued", failing)
    text = tmp_path / "text.txt"
    text.write_text(TEXT.read_text()[:4000])
    report = qmerge.merge(**SETTINGS, out=tmp_path / "out", verify=text, quiet=True)
    assert report.gain_kept is not None and report.data.fidelity is not None
    assert report.data.fidelity.continuations == []
