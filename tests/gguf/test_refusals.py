"""GGUF files that are damaged in their header, and tokenizers that cannot be exported."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qmerge.errors import CheckpointError
from qmerge.gguf.byte_level import pre_tokenizer_name, pre_tokenizer_of
from qmerge.gguf.families import _check_heads
from qmerge.gguf.header import ARRAY, MAGIC, VERSION, read_header
from qmerge.gguf.sentencepiece import puts_space_first
from qmerge.gguf.tokenizer_file import TokenizerFile, check_model, read_tokenizer
from qmerge.gguf.vocabulary import SPECIAL_TEXTS, added_to_text, looks_special, tokenizer_notes

F32, Q8_0 = 0, 8
UINT32 = 4


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def number(name: str, value: int) -> bytes:
    return text(name) + struct.pack("<II", UINT32, value)


def tensor(name: str, columns: int, kind: int, offset: int = 0) -> bytes:
    return text(name) + struct.pack("<IQQIQ", 2, columns, 1, kind, offset)


def file(folder: Path, keys: list[bytes], tensors: list[bytes]) -> Path:
    start = struct.pack("<4sIQQ", MAGIC, VERSION, len(tensors), len(keys))
    path = folder / "x.gguf"
    path.write_bytes(start + b"".join(keys) + b"".join(tensors) + bytes(4096))
    return path


def test_control_a_sound_header(tmp_path: Path) -> None:
    header = read_header(
        file(tmp_path, [number("general.file_type", 7)], [tensor("a", 32, F32), tensor("b", 32, Q8_0)])
    )
    assert header.types == {"a": "F32", "b": "Q8_0"} and header.scalars["general.file_type"] == 7
    other = header.keys_with_file_type(15)
    assert other == header.keys.replace(struct.pack("<I", 7), struct.pack("<I", 15)) != header.keys
    unnamed = read_header(file(tmp_path, [number("general.other", 7)], [tensor("a", 32, F32)]))
    assert unnamed.keys_with_file_type(15) == unnamed.keys


@pytest.mark.parametrize(
    ("keys", "tensors", "message"),
    [
        ([number("general.alignment", 24)], [tensor("a", 32, F32)], "the alignment is 24, expected a power of 2"),
        ([number("general.alignment", 0)], [tensor("a", 32, F32)], "the alignment is 0, expected a power of 2"),
        ([], [tensor("a", 32, F32), tensor("a", 32, F32)], "it has two tensors a"),
        ([], [tensor("a", 33, Q8_0)], "a has rows of 33, which is not a multiple of 32, the block of Q8_0"),
        ([text("k") + struct.pack("<IIQ", ARRAY, ARRAY, 1)], [], "an array has entries of type 9"),
        ([text("k") + struct.pack("<I", 99)], [], "a key has the type 99"),
    ],
)
def test_damaged_headers(keys: list[bytes], tensors: list[bytes], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"x.gguf: this GGUF file is damaged: {message}. Download it again"):
        read_header(file(tmp_path, keys, tensors))


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be read: Is a directory"):
        read_header(tmp_path)


# --- tokenizers ------------------------------------------------------------------------------------------------------


def tokenizer(model: dict[str, Any] | None = None, **content: Any) -> TokenizerFile:
    merges = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], "byte_fallback": True}
    return TokenizerFile({"added_tokens": [], **content, "model": {**merges, **(model or {})}})


def refuses(check: Callable[[TokenizerFile], object], found: TokenizerFile, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        check(found)


def test_models_of_tokens_that_llama_cpp_lacks() -> None:
    check_model(tokenizer())
    refuses(check_model, tokenizer({"dropout": 0.1}), "llama.cpp does not support dropout")
    refuses(check_model, tokenizer({"end_of_word_suffix": "</w>"}), "does not support end_of_word_suffix")
    refuses(check_model, tokenizer({"merges": []}), "tokenizer.json has no merges")
    refuses(check_model, tokenizer({"type": "Unigram"}), "a Unigram model cannot be exported")


def test_only_a_sentencepiece_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(CheckpointError, match=r"has only tokenizer.model: expected tokenizer.json"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(("scheme", "first"), [("always", True), ("never", False), (None, True)])
def test_spaces_of_a_metaspace_step(scheme: str | None, first: bool) -> None:
    step = {"type": "Metaspace", "replacement": "▁", "split": False}
    if scheme:
        step["prepend_scheme"] = scheme
    assert puts_space_first(tokenizer(pre_tokenizer=step)) is first
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    both = {"type": "Sequence", "pretokenizers": [step, split]}
    assert puts_space_first(tokenizer(pre_tokenizer=both)) is first, "no space is left"
    refuses(puts_space_first, tokenizer(pre_tokenizer=split), "llama.cpp has no step Split")
    refuses(puts_space_first, tokenizer(), "spaces are not replaced by ▁")


def test_names_of_pre_tokenizers() -> None:
    assert pre_tokenizer_of("nobody's") is None
    for unknown in (
        {"type": "Whitespace"},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    ):
        assert pre_tokenizer_name(tokenizer(pre_tokenizer=unknown)) is None
    words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    assert pre_tokenizer_name(tokenizer(pre_tokenizer=words)) == "gpt-2"


def test_a_tokenizer_that_the_library_does_not_load() -> None:
    refuses(added_to_text, tokenizer(version="1.0", post_processor={"type": "?"}), "tokenizers library cannot load")


def test_special_tokens_by_their_text_and_missing_eos() -> None:
    assert looks_special("<|im_end|>") and looks_special(next(iter(SPECIAL_TEXTS))) and not looks_special("word")
    plain = tokenizer(added_tokens=[{"content": "<x>", "lstrip": True}])
    notes = tokenizer_notes(plain, SimpleNamespace(special_token_ids={}))
    assert [note.partition(" ")[0] for note in notes] == ["<x>", "eos_token"]
    assert tokenizer_notes(tokenizer(), SimpleNamespace(special_token_ids={"eos": 1})) == ()


def test_heads_of_odd_size() -> None:
    even = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, head_dim=8, hidden_size=32)
    _check_heads(even)
    for changed in ({"head_dim": 7}, {"num_key_value_heads": 3}):
        with pytest.raises(CheckpointError, match=r"config.json: 4 heads of size \d and \d for keys and values"):
            _check_heads(SimpleNamespace(**{**vars(even), **changed}))
