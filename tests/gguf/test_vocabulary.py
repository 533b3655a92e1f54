"""Tokenizers in GGUF: the same ids with transformers' GGUF loader, and with llama.cpp where xllamacpp is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.tokenization_utils_base import generate_merges

from qmerge.errors import CheckpointError, RecipeError
from qmerge.gguf import byte_level as patterns
from qmerge.gguf.export import export
from qmerge.gguf.sentencepiece import SPACE

from .. import models
from ..gguf.test_gguf import DEMO, LINEAR, LLAMA3, ROOT, SIZE, YARN, fields, make

pytest.importorskip("gguf")

TEXT = (DEMO / "heldout.txt").read_text() + (ROOT / "README.md").read_text()
ODD = [
    "été 日本語 🦙🦙\t tab\n\nline  \r\n",
    "don't I'M we'LL",
    "3.14159 33333 x==y; //",
    "two  spaces   three    four",
]
TEXTS = [*ODD, *(TEXT[start : start + 400] for start in range(0, 40000, 400))]
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)


def split(regex: str) -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), BYTES])


PRE = {
    "llama-bpe": (split(patterns.LLAMA3), True),
    "smaug-bpe": (split(patterns.LLAMA3), False),
    "qwen2": (split(patterns.QWEN2), False),
    "tekken": (split(patterns.TEKKEN), True),
    "gpt-2": (WORDS, False),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), WORDS]), False),
}


def save(tokenizer: Tokenizer, folder: Path, **settings: Any) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    plain = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(plain))


def byte_level(folder: Path, pre: str) -> Tokenizer:
    """A tokenizer of 790 tokens, trained on text, that splits it in one of the known patterns."""
    how, ignore_merges = PRE[pre]
    tokenizer = Tokenizer(BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = how, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=790,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT, *ODD * 9], trainer)
    if ignore_merges:  # these models put a token before every text
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 0)])
    save(tokenizer, folder)
    return tokenizer


def sentencepiece(folder: Path, by_id: bool = False) -> Tokenizer:
    """A tokenizer as transformers makes it from a SentencePiece model. ``by_id``: merges in the order of the ids that they make,
    as in transformers 5; else by score, where all runs of spaces have the lowest one (Llama 2, Mistral)."""
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    trainer = trainers.BpeTrainer(vocab_size=480, show_progress=False)
    trained.train_from_iterator([TEXT], trainer)
    pieces = [t for t, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1]) if set(t) != {SPACE}]
    runs = [SPACE * n for n in (2, 4, 8, 3, 5, 6, 7)]
    made, single = [p for p in pieces if len(p) > 1], [p for p in pieces if len(p) == 1]
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *runs, *made, SPACE, *single]
    vocab = {text: i for i, text in enumerate(texts)}
    scores = {text: -1e9 if text in runs else -float(i) for text, i in vocab.items()}
    merges = generate_merges(vocab) if by_id else generate_merges(vocab, scores)
    model = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": vocab}
    special = [{"id": i, "content": texts[i], "special": True, **FLAGS} for i in range(3)]
    spaces = [{"type": "Prepend", "prepend": SPACE}, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    tokenizer = Tokenizer.from_str(json.dumps({
        "version": "1.0", "added_tokens": special, "normalizer": {"type": "Sequence", "normalizers": spaces},
        "model": {**model, "merges": [list(pair) for pair in merges]},
    }))  # fmt: skip
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    save(tokenizer, folder, unk_token="<unk>")
    models.edit_json(folder / "config.json", bos_token_id=1, eos_token_id=2)
    return tokenizer


def ids_from(file: Path) -> list[list[int]]:
    loaded = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    return [loaded(text).input_ids for text in TEXTS]


# --- byte-level BPE --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", [name for name in PRE if name != "smollm"])  # transformers does not split its digits
def test_byte_level_ids_are_the_same(pre: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    tokenizer = byte_level(folder, pre)
    written = export(folder, tmp_path / "model.gguf", "q8_0")
    assert written.tokenizer == f"gpt2, {pre}, {SIZE} tokens"
    expected = [tokenizer.encode(text).ids for text in TEXTS]
    assert ids_from(written.file) == expected
    other = "gpt-2" if pre != "gpt-2" else "llama-bpe"
    assert ids_from(export(folder, tmp_path / "other.gguf", "q8_0", pre=other).file) != expected


def test_the_patterns_are_those_of_transformers() -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as THEIRS

    for name, ours in {"llama-bpe": patterns.LLAMA3, "qwen2": patterns.QWEN2, "tekken": patterns.TEKKEN}.items():
        assert THEIRS[name] == ours


def test_an_unknown_pre_tokenizer_needs_a_name(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    for change in ("Lowercase", "NFKC"):
        models.edit_json(folder / "tokenizer.json", normalizer={"type": change})
        with pytest.raises(RecipeError, match="--pre NAME"):
            export(folder, tmp_path / "model.gguf", "q8_0")
    assert fields(export(folder, tmp_path / "a.gguf", "q8_0", pre="odd").file)["tokenizer.ggml.pre"] == "odd"
    models.edit_json(
        folder / "tokenizer.json", normalizer={"type": "NFC"}
    )  # as in Qwen's; llama.cpp leaves text as it is
    assert fields(export(folder, tmp_path / "b.gguf", "q8_0").file)["tokenizer.ggml.pre"] == "smollm"


def test_special_tokens_types_template_and_padding(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    added += [{"id": 768, "content": "<think>", "special": False, **FLAGS}]
    added += [{"id": 769, "content": "<|tool|>", "special": False, **FLAGS, "rstrip": True}]
    models.edit_json(folder / "tokenizer.json", added_tokens=added)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    written = export(folder, tmp_path / "model.gguf", "q8_0")
    found = fields(written.file)
    assert found["tokenizer.chat_template"] == "{{ messages }}"
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"]) == (False, False)
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert tokens[767:772] == [tokens[767], "<think>", "<|tool|>", "[PAD770]", "[PAD771]"]
    assert types[:3] + types[767:771] == [3, 3, 1, 1, 4, 3, 5]
    assert len(tokens) == SIZE and "<|tool|> strips the spaces" in written.notes[0]


def test_a_token_before_the_text_must_be_the_bos_token(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    tokenizer = byte_level(folder, "llama-bpe")
    assert fields(export(folder, tmp_path / "a.gguf", "q8_0").file)["tokenizer.ggml.add_bos_token"] is True
    for template, message in [("</s> $A", "puts token 1 before"), ("<s> <s> $A", "more than one token before")]:
        tokenizer.post_processor = processors.TemplateProcessing(template, template + " $B", [("<s>", 0), ("</s>", 1)])
        save(tokenizer, folder)
        with pytest.raises(CheckpointError, match=message):
            export(folder, tmp_path / "model.gguf", "q8_0")


# --- SentencePiece ---------------------------------------------------------------------------------------------------


def test_sentencepiece_ids_are_the_same(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    tokenizer = sentencepiece(folder, by_id=True)
    written = export(folder, tmp_path / "model.gguf", "q8_0")
    found = fields(written.file)
    assert written.tokenizer == f"llama, default, {SIZE} tokens"
    assert found["tokenizer.ggml.add_space_prefix"] is True and found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    texts = [text.replace("\n", " ").strip() for text in TEXTS]
    loaded = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    plain = [list(loaded(text).input_ids) for text in texts]
    assert plain == [tokenizer.encode(text).ids for text in texts]
    assert len({tuple(ids) for ids in plain}) > 50


def test_scores_are_positions_and_runs_of_spaces_share_one(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    sentencepiece(folder)
    found = fields(export(folder, tmp_path / "model.gguf", "q8_0").file)
    scores = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"], strict=True))
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    made = [scores[left + right] for left, right in merges]
    assert made == sorted(made, reverse=True) and len(set(made)) > 100
    assert len({scores[SPACE * n] for n in range(2, 9)}) == 1
    assert scores["<s>"] == -1000 and scores["<0x0A>"] == 0


def test_merges_without_scores_that_give_the_same_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    sentencepiece(folder, by_id=True)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    merges = model["merges"]
    twice = next(i for i, pair in enumerate(merges[100:], 100) if "".join(pair) == "".join(merges[i + 1]))
    for changed, message in [
        (merges[:twice] + merges[twice + 1 :], "but no merge joins the first two"),
        ([*merges[:twice], *merges[twice + 1 :], merges[twice]], "do not follow each other"),
    ]:
        models.edit_json(folder / "tokenizer.json", model={**model, "merges": changed})
        with pytest.raises(CheckpointError, match=message):
            export(folder, tmp_path / "model.gguf", "q8_0")
    models.edit_json(folder / "tokenizer.json", model=model, normalizer={"type": "NFKC"})
    with pytest.raises(CheckpointError, match="no step NFKC"):
        export(folder, tmp_path / "model.gguf", "q8_0")
    with pytest.raises(RecipeError, match="only byte-level"):
        export(folder, tmp_path / "model.gguf", "q8_0", pre="llama-bpe")


# --- llama.cpp itself ------------------------------------------------------------------------------------------------

LLAMA_CPP = """
import json, os, sys, urllib.request, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.port = sys.argv[1], 256, 1, False, int(sys.argv[2])
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
def post(path, **body):
    kind = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(), kind)
    return json.load(urllib.request.urlopen(request))
ids, texts = json.load(sys.stdin)
found = post("/completion", prompt=ids, n_predict=1, n_probs=10, temperature=0.0, post_sampling_probs=False)
top = {p["id"]: p["logprob"] for p in found["completion_probabilities"][0]["top_logprobs"]}
tokens = [post("/tokenize", content=text, add_special=True)["tokens"] for text in texts]
print(json.dumps([top, tokens]), flush=True)
os._exit(0)
"""
needs_llama_cpp = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="llama.cpp (xllamacpp) is not installed")


def llama_cpp(file: Path, ids: list[int], texts: list[str]) -> tuple[dict[int, float], list[list[int]]]:
    """Log probabilities of the ten most likely tokens after ``ids``, and the ids of texts."""
    port = str(20000 + os.getpid() % 20000)
    command = [sys.executable, "-c", LLAMA_CPP, str(file), port]
    done = subprocess.run(command, input=json.dumps([ids, texts]), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    top, tokens = json.loads(done.stdout.splitlines()[-1])
    return {int(i): p for i, p in top.items()}, tokens


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize(
    ("kind", "changes", "within"),
    [
        ("llama", {}, 1e-4), ("llama", {"rope_parameters": LLAMA3}, 1e-4), ("llama", {"rope_parameters": LINEAR}, 1e-4),
        ("qwen2", {"rope_parameters": YARN}, 1e-4), ("qwen3", {}, 1e-4), ("gemma2", {}, 0.02), ("gemma3", {}, 0.02),
    ],
    ids=["llama", "llama3", "linear", "yarn", "qwen3", "gemma2", "gemma3"],
)  # fmt: skip
def test_llama_cpp_computes_the_same(kind: str, changes: dict[str, Any], within: float, tmp_path: Path) -> None:
    """llama.cpp reads Gemma's activation from a float16 table, so the bound is wider."""
    folder = make(tmp_path / "model", kind, **changes)
    ids = (torch.arange(100) * 7 % 760 + 2).tolist()
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    top, _ = llama_cpp(export(folder, tmp_path / "model.gguf", "f32").file, ids, [])
    assert max(abs(float(expected[i]) - p) for i, p in top.items()) < within
    assert len(top) == 10 and max(abs(float(expected[i + 1]) - p) for i, p in top.items() if i < SIZE - 1) > 0.1


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize("pre", [*PRE, "sentencepiece"])
def test_llama_cpp_splits_text_the_same(pre: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    tokenizer = sentencepiece(folder) if pre == "sentencepiece" else byte_level(folder, pre)
    expected = [tokenizer.encode(text).ids for text in TEXTS]
    assert llama_cpp(export(folder, tmp_path / "model.gguf", "f32").file, [2, 3], TEXTS)[1] == expected
