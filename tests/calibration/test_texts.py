"""Texts, chats and datasets → token ids; and one clear line for everything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import qmerge.demo
from qmerge.calibration import texts
from qmerge.calibration.documents import Exchange, read_texts
from qmerge.errors import CheckpointError, QmergeError, RecipeError

FOLDER = Path(qmerge.demo.__file__).parent / "base-nf4"
VOCABULARY = 10**6


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def ids_of(text: str) -> list[int]:
    return list(texts.load_tokenizer(FOLDER)(text)["input_ids"])


def test_plain_text(tmp_path: Path) -> None:
    text = "one two three four five six seven " * 40
    path = tmp_path / "a.txt"
    path.write_text(text)
    batches = texts.token_batches(path, FOLDER, tokens=None, length=16, vocab_size=VOCABULARY)
    flat = [token for batch in batches for token in batch.flatten().tolist()]
    assert all(batch.shape[1] == 16 for batch in batches) and flat == ids_of(text)[: len(flat)]
    assert len(ids_of(text)) - len(flat) < 16
    assert (
        sum(batch.numel() for batch in texts.token_batches(path, FOLDER, tokens=40, length=16, vocab_size=VOCABULARY))
        == 32
    )


def test_a_text_shorter_than_a_sequence_is_taken_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("only a few words")
    (batch,) = texts.token_batches(path, FOLDER, tokens=None, length=512, vocab_size=VOCABULARY)
    assert batch.shape == (1, len(ids_of("only a few words")))


def test_jsonl_of_texts(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"text": "first", "id": 1}, {"text": "second"})
    assert read_texts(path) == ["first", "second"]


ALPACA = {"instruction": "Add.", "input": "1 + 1", "output": "2"}
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def test_rows_of_prompts_and_completions(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "a.jsonl",
        {"prompt": "hi ", "completion": "ho"},
        {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
    )
    assert read_texts(path) == ["hi ho", MESSAGES]


@pytest.mark.parametrize("content", [[ALPACA, {"text": "second"}], [ALPACA | {"input": ""}, {"text": "second"}]])
def test_a_json_array_of_rows(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content, indent=1))
    first, second = read_texts(path)
    addition = "\n\n1 + 1" if content[0]["input"] else ""
    assert isinstance(first, Exchange) and first.text == f"Add.{addition}\n\n2"
    assert second == "second"


def test_a_question_with_its_answer_is_a_chat_where_there_is_a_template(monkeypatch: pytest.MonkeyPatch) -> None:
    exchange = Exchange("one two", "three")
    assert texts.tokenize([exchange], FOLDER) == ids_of("one two\n\nthree")
    tokenizer = texts.load_tokenizer(FOLDER)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}; {% endfor %}"
    monkeypatch.setattr(texts, "load_tokenizer", lambda folder: tokenizer)
    found = texts.tokenize([exchange], FOLDER)
    assert found == tokenizer("user: one two; assistant: three; ", add_special_tokens=False)["input_ids"]


def test_documents_are_separated_by_the_end_of_text_token(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = texts.load_tokenizer(FOLDER)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(5)
    monkeypatch.setattr(texts, "load_tokenizer", lambda folder: tokenizer)
    assert texts.tokenize(["a b", "c"], FOLDER) == [*ids_of("a b"), 5, *ids_of("c")]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
    ],
)
def test_chats_go_through_the_template_of_the_tokenizer(
    record: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = texts.load_tokenizer(FOLDER)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}; {% endfor %}"
    monkeypatch.setattr(texts, "load_tokenizer", lambda folder: tokenizer)
    found = texts.tokenize(read_texts(lines(tmp_path / "a.jsonl", record)), FOLDER)
    assert found == tokenizer("user: hi; assistant: ho; ", add_special_tokens=False)["input_ids"]


def test_a_template_that_raises_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = texts.load_tokenizer(FOLDER)
    tokenizer.chat_template = "{{ raise_exception('only users') }}"
    monkeypatch.setattr(texts, "load_tokenizer", lambda folder: tokenizer)
    with pytest.raises(RecipeError, match="only users"):
        texts.tokenize([[{"role": "system", "content": "x"}]], FOLDER)


BAD: dict[str, tuple[str, bytes, type[QmergeError], str]] = {
    "no UTF-8": ("a.txt", b"abc\xff", RecipeError, "not UTF-8 text"),
    "no JSON": ("a.jsonl", b'{"text": "a"}\n{"text"\n', RecipeError, "line 2: expected one JSON object"),
    "another field": (
        "a.jsonl",
        b'{"question": "a", "answer": "b"}\n',
        RecipeError,
        "`conversations`, `prompt` and `completion`, `instruction` and `output`; found question, answer",
    ),
    "another content": ("a.jsonl", b'{"text": 1}\n', RecipeError, "line 1: expected the fields"),
    "half a pair": ("a.jsonl", b'{"prompt": "a", "completion": []}\n', RecipeError, "found prompt, completion"),
    "a list": ("a.jsonl", b"[1]\n", RecipeError, "row 1: expected a JSON object, found int"),
    "half an array": ("a.json", b'[{"text": "a"},', RecipeError, "a.json: not a JSON array"),
    "half a message": ("a.jsonl", b'{"messages": [{"role": "user"}]}\n', RecipeError, "line 1: a message needs"),
    "empty": ("a.txt", b"", RecipeError, "0 tokens"),
    "no template": ("a.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}\n', RecipeError, "no chat template"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_texts(name: str, tmp_path: Path) -> None:
    file, data, kind, words = BAD[name]
    (tmp_path / file).write_bytes(data)
    with pytest.raises(kind) as caught:
        texts.token_batches(tmp_path / file, FOLDER, tokens=None, length=16, vocab_size=VOCABULARY)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_tokens_that_the_model_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three")
    with pytest.raises(CheckpointError, match="the model knows 3"):
        texts.token_batches(tmp_path / "a.txt", FOLDER, tokens=None, length=16, vocab_size=3)


def test_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three")
    with pytest.raises(CheckpointError, match="no tokenizer"):
        texts.token_batches(tmp_path / "a.txt", tmp_path, tokens=None, length=16, vocab_size=VOCABULARY)


def test_neither_a_file_nor_a_dataset(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no such thing\.txt: no such file;"):
        texts.find_text("no such thing.txt")
    with pytest.raises(RecipeError, match="expected a"):
        texts.find_text(str(tmp_path))


def test_a_dataset_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first data file with `train` in its name, or the file that the user names."""
    import huggingface_hub

    asked: list[str] = []

    def download(name: str, file: str, repo_type: str) -> str:
        asked.append(file)
        return str(lines(tmp_path / Path(file).name, {"text": "from the hub"}))

    files = ["README.md", "data/test.jsonl", "data/train.jsonl", "images.zip"]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name, repo_type: files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert read_texts(texts.find_text("someone/chats")) == ["from the hub"]
    texts.find_text("someone/chats:data/test.jsonl")
    assert asked == ["data/train.jsonl", "data/test.jsonl"]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name, repo_type: ["a.parquet"])
    with pytest.raises(RecipeError, match="holds no"):
        texts.find_text("someone/tables")


@pytest.mark.parametrize(
    ("count", "length", "held_out"), [(3, 16, 0), (4, 16, 2), (32, 512, 4), (64, 512, 4), (40, 16, 10), (32, 2048, 2)]
)
def test_a_part_is_held_out_and_never_seen(count: int, length: int, held_out: int) -> None:
    ids = torch.arange(count * length).view(count, length)
    tokens = texts.hold_out(ids, "a.txt")
    seen = [tuple(row.tolist()) for batch in tokens.seen for row in batch]
    held = [tuple(row.tolist()) for batch in tokens.held_out for row in batch]
    assert len(held) == held_out
    assert sorted(seen + held) == [tuple(row.tolist()) for row in ids]
    assert tokens.judged_on == (f"{held_out * length:,} tokens of a.txt" if held_out else "")
    starts = [row[0] // length for row in held]
    # Evenly: as many from the first half as from the second.
    assert abs(sum(start < count / 2 for start in starts) - held_out / 2) < 1
