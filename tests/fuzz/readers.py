"""The readers of files from outside, each with good inputs that are small, and how they are damaged."""

from __future__ import annotations

import hashlib
import json
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import yaml

from qmerge.adapters.reading.folder import CONFIG, read_config
from qmerge.checkpoint.documents import ModelConfig, check_document, read_json
from qmerge.checkpoint.folder import tokenizer_warning
from qmerge.checkpoint.journal import Journal, read_journal
from qmerge.checkpoint.model_cards import card_fields
from qmerge.checkpoint.scan import INDEX, shard_files
from qmerge.errors import AdapterError, CheckpointError
from qmerge.gguf.header import read_header as read_gguf_header
from qmerge.patch.codec import pack
from qmerge.patch.file import MAGIC, VERSION, framed, header_of, read_patch
from qmerge.recipe import make_recipe, read_recipe
from qmerge.report.html import html_report
from qmerge.safetensors_io.header import read_header
from qmerge.safetensors_io.reader import Reader
from qmerge.schema import NAME, read_report

from ..report.reports import report as example_report
from .mutations import damaged_bytes, damaged_document


@dataclass(frozen=True)
class FuzzedReader:
    """A reader.

    file    name of the file that it reads
    read    reads a folder with that file
    seeds   makes good contents of the file
    damage  how one becomes a bad one, beside damage to its bytes; None where it has no other
    """

    file: str
    read: Callable[[Path], Any]
    seeds: Callable[[], list[bytes]]
    damage: Callable[[bytes, Random], bytes] | None = None

    def run(self, content: bytes) -> None:
        """Read this content.

        Raises:
            QmergeError: it is refused.
        """
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / self.file).write_bytes(content)
            self.read(Path(folder))

    def damaged(self, content: bytes, random: Random) -> bytes:
        """The content, damaged as bytes or as a document."""
        if self.damage is None or random.choice((True, False, False)):
            return damaged_bytes(content, random)
        return self.damage(content, random)


# --- damage that leaves the frame whole --------------------------------------------------------------------------------


def _json_damage(content: bytes, random: Random) -> bytes:
    return json.dumps(damaged_document(json.loads(content), random)).encode()


def _header_damage(content: bytes, random: Random) -> bytes:
    """In the header of a safetensors file, whose length stays right."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.dumps(damaged_document(json.loads(content[8 : 8 + length]), random)).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def _recipe_damage(content: bytes, random: Random) -> bytes:
    return json.dumps(damaged_document(yaml.safe_load(content), random)).encode()  # JSON is YAML


def _journal_damage(content: bytes, random: Random) -> bytes:
    """In one line, whose checksum is made again."""
    lines = content.splitlines()
    number = random.randint(0, len(lines) - 1)
    record = json.loads(lines[number])
    record.pop("line_sha256")
    record = damaged_document(record, random)
    if isinstance(record, dict):
        record["line_sha256"] = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    lines[number] = json.dumps(record).encode()
    return b"\n".join(lines)


def _patch_damage(content: bytes, random: Random) -> bytes:
    """In the manifest or in the data, sealed again."""
    (length,) = struct.unpack("<Q", content[:8])
    manifest = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["manifest"])
    data = content[8 + length :]
    if random.choice((True, False)):
        return _sealed_patch(json.dumps(damaged_document(manifest, random)), data)
    return _sealed_patch(json.dumps(manifest), damaged_bytes(data, random))


def _sealed_patch(manifest: str, blob: bytes) -> bytes:
    digest = hashlib.sha256(manifest.encode() + blob).hexdigest()
    return header_of({MAGIC: VERSION, "manifest": manifest, "sha256": digest}, {"0": len(blob)}) + blob


# --- good inputs ---------------------------------------------------------------------------------------------------------


def _safetensors() -> list[bytes]:
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "U8", "shape": [4], "data_offsets": [16, 20]},
    }
    text = json.dumps(header).encode()
    return [struct.pack("<Q", len(text)) + text + bytes(20)]


def _config() -> list[bytes]:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2,
        "vocab_size": 96, "dtype": "bfloat16", "text_config": {"hidden_size": 64, "model_type": "llama"},
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": ["lm_head"]},
    }  # fmt: skip
    return [json.dumps(config).encode()]


def _adapter_config() -> list[bytes]:
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"],
        "base_model_name_or_path": "a/b", "rank_pattern": {"q_proj": 8}, "modules_to_save": ["lm_head"],
        "ensure_weight_tying": True, "layer_replication": [[0, 2]], "use_dora": False,
    }  # fmt: skip
    mlx = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 8, "scale": 2.0, "keys": ["q_proj"]}}
    return [
        json.dumps(config).encode(),
        json.dumps({**config, "target_modules": ".*"}).encode(),
        json.dumps(mlx).encode(),
    ]


def _index() -> list[bytes]:
    return [
        json.dumps({"metadata": {"total_size": 8}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}).encode()
    ]


def _recipe() -> list[bytes]:
    return [
        b"base: a\nadapter: [b=0.5, c]\ntarget: nf4\nout: d\nmax_memory: 4GB\nseed: 3\nrounding: nearest\ndensity: 0.5\n"
    ]


def _journal() -> list[bytes]:
    facts = {"recipe": {"base": "a"}, "files": ["a.safetensors"], "records": [], "device": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder), {"recipe": {"base": "a"}}, resume=False, part_facts=facts)
        journal.step_done("a", {"sha256": "0" * 64, "texts": {}, "outcome": None})
        journal.file_done("a.safetensors", {"bytes": 8, "sha256": "0" * 64})
        return [journal.path.read_bytes()]


def _patch() -> list[bytes]:
    blob = framed(pack(b"\0\1\0\2\0\0\0\3", 1))
    sha256 = "0" * 64
    base = {
        "path": "a.safetensors",
        "bytes": 12,
        "sha256": sha256,
        "segments": [[4, "copy", 0, 0, ""], [8, "delta", 0, 4, "0"]],
    }
    merged = {"path": "a.safetensors", "bytes": 12, "sha256": sha256, "segments": base["segments"]}
    manifest = {
        "made_by": "qmerge", "reversible": True, "base": {"name": "a", "files": [base]}, "merged": {"name": "b", "files": [merged]},
    }  # fmt: skip
    return [_sealed_patch(json.dumps(manifest), blob)]


@cache
def _report() -> list[bytes]:
    return [example_report().model_dump_json().encode()]


def _gguf() -> list[bytes]:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    keys = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        text("general.alignment") + struct.pack("<II", 4, 32),
        text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b"),
        text("tokenizer.ggml.scores") + struct.pack("<IIQ", 9, 6, 2) + bytes(8),
    ]
    infos = [
        text("a.weight") + struct.pack("<IQQIQ", 2, 32, 2, 0, 0),
        text("b.weight") + struct.pack("<IQIQ", 1, 4, 0, 256),
    ]
    header = struct.pack("<4sIQQ", b"GGUF", 3, len(infos), len(keys)) + b"".join(keys) + b"".join(infos)
    return [header + bytes(-len(header) % 32) + bytes(288)]


def _card() -> list[bytes]:
    return [b"---\nlicense: mit\ntags:\n- a\ndatasets: [a/b]\n---\n# A model\n"]


def _tokenizer() -> list[bytes]:
    return [json.dumps({"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "c"}]}).encode()]


# --- reading -------------------------------------------------------------------------------------------------------------


def _read_config(folder: Path) -> None:
    check_document(read_json(folder / "config.json", CheckpointError), ModelConfig, "config.json", CheckpointError)


def _read_patch(folder: Path) -> None:
    """The patch, and all data that it is made of."""
    patch = read_patch(folder / "x.patch")
    with Reader() as reader:
        for file in (*patch.manifest.base.files, *patch.manifest.merged.files):
            for segment in file.segments:
                if segment.needs_blob:
                    for _ in patch.blocks(segment.blob, segment.bytes, reader):
                        pass


def _read_gguf(folder: Path) -> None:
    header = read_gguf_header(folder / "x.gguf")
    header.text("tokenizer.ggml.tokens", 1)
    for name in header.tensors:
        header.info(name)


READERS = {
    "header": FuzzedReader("x", lambda folder: read_header(folder / "x", AdapterError), _safetensors, _header_damage),
    "index": FuzzedReader(INDEX, shard_files, _index, _json_damage),
    "config": FuzzedReader("config.json", _read_config, _config, _json_damage),
    "adapter_config": FuzzedReader(CONFIG, read_config, _adapter_config, _json_damage),
    "recipe": FuzzedReader(
        "r.yaml", lambda folder: make_recipe(read_recipe(folder / "r.yaml")), _recipe, _recipe_damage
    ),
    "journal": FuzzedReader("j", lambda folder: read_journal(folder / "j"), _journal, _journal_damage),
    "patch": FuzzedReader("x.patch", _read_patch, _patch, _patch_damage),
    "report": FuzzedReader(NAME, lambda folder: html_report(read_report(folder)).encode(), _report, _json_damage),
    "gguf": FuzzedReader("x.gguf", _read_gguf, _gguf),
    "card": FuzzedReader("README.md", lambda folder: card_fields(folder, ("license", "datasets")), _card),
    "tokenizer": FuzzedReader(
        "tokenizer.json",
        lambda folder: tokenizer_warning(folder / "tokenizer.json", {"vocab_size": 2}),
        _tokenizer,
        _json_damage,
    ),
}
