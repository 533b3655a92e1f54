"""A finished dense folder → one GGUF file, for llama.cpp and what is built on it.

``model.py`` has what a model is there, ``vocab.py`` its tokenizer; the file is laid out, and Q8_0 rounded, by
llama.cpp's own ``gguf`` package. What GGUF or llama.cpp has no place for is refused by name before the first byte.
Values go through float32, some rows of one tensor at a time.
Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from qmerge.checkpoint.folder import check_room
from qmerge.checkpoint.scan import read_json, scan
from qmerge.errors import CheckpointError, NumbersError, RecipeError, RoomError
from qmerge.formats import get_format
from qmerge.gguf.model import (
    Planned,
    add_metadata,
    check_config,
    fallback_notes,
    family_of,
    nbytes_of,
    plan_tensors,
    qtype,
    read_config,
)
from qmerge.gguf.vocab import Vocabulary, read_vocabulary
from qmerge.safetensors_io.header import fsync_folder
from qmerge.safetensors_io.reader import Reader
from qmerge.safetensors_io.writer import PARTIAL
from qmerge.types import Rows

TYPES = ("f16", "bf16", "f32", "q8_0")
BLOCK_ENTRIES = 2**21
"""Values in memory at a time (a block has at least one row, or one attention head where rows are permuted)."""


@dataclass(frozen=True)
class Exported:
    """What was written. ``tensors``: how many of each type; ``notes``: what a user should know, in plain words."""

    file: Path
    nbytes: int
    arch: str
    tensors: dict[str, int]
    tokenizer: str
    notes: tuple[str, ...]


def export(model: Path, out: Path, type: str, pre: str | None = None) -> Exported:
    """Write ``model`` as ``out``. The file gets its name when it is whole; nothing is left behind otherwise.

    Args:
        model: a dense Hugging Face folder with config.json, safetensors files and tokenizer.json.
        type: what matrices become: f16, bf16, f32 or q8_0. Vectors are F32.
        pre: ``tokenizer.ggml.pre``, where it cannot be told from the tokenizer.

    Raises:
        RecipeError: the ``gguf`` package is missing, or ``type`` or ``out`` cannot be used.
        CheckpointError: the folder is quantized, or has something that this module cannot express in GGUF.
        NumbersError: NaN, infinity, or a value past the range of ``type``.
        RoomError: no room on the disk.
    """
    gguf = library()
    check_request(model, out, type)
    refuse_quantized(model)
    with Reader() as reader:
        checkpoint = scan(model, reader)
        family, config = family_of(checkpoint), read_config(model)
        notes = check_config(family, config)
        plan = plan_tensors(gguf, checkpoint, family, config, type)
        notes += fallback_notes(plan, type)
        vocabulary = read_vocabulary(gguf, model, config.vocab_size, pre)
        writer = gguf.GGUFWriter(path=None, arch=family.arch)
        add_metadata(gguf, writer, model.resolve().name, family, config, plan, type)
        vocabulary.add_to(writer)
        nbytes = write(gguf, writer, plan, reader, out)
    counts = {name: sum(t.type == name for t in plan) for name in sorted({t.type for t in plan})}
    return Exported(out, nbytes, family.arch, counts, described(vocabulary), (*notes, *vocabulary.notes))


def library() -> Any:
    """The ``gguf`` package (an extra: not everybody wants it)."""
    logging.getLogger("gguf").setLevel(logging.ERROR)  # it comments on tokenizers, to developers of its converter
    try:
        return importlib.import_module("gguf")
    except ImportError as cause:
        raise RecipeError('GGUF files are written by the gguf package: pip install "qmerge[gguf]"') from cause


def described(vocabulary: Vocabulary) -> str:
    return f"{vocabulary.model}, {vocabulary.pre}, {len(vocabulary.tokens)} tokens"


# --- what is refused before the first byte ---------------------------------------------------------------------------


def check_request(model: Path, out: Path, type: str) -> None:
    if type not in TYPES:
        raise RecipeError(f"--type {type}: expected one of {', '.join(TYPES)}")
    if not model.is_dir():
        raise RecipeError(f"{model} is no folder: expected a dense model, as --target bf16 writes it")
    if out.is_dir():
        raise RecipeError(f"--out {out} is a folder: expected the name of a file, such as {out / 'model.gguf'}")
    if out.exists():
        raise RecipeError(f"--out {out} exists: delete it or choose another name")
    if not out.absolute().parent.is_dir():
        raise RecipeError(f"--out {out}: there is no folder {out.parent}; make it first")


def refuse_quantized(model: Path) -> None:
    config = read_json(model / "config.json", CheckpointError)
    found = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if found:
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise CheckpointError(
            f"{model} is quantized ({method}): merge with --target bf16 first, and export that folder"
        )


# --- writing ---------------------------------------------------------------------------------------------------------


def write(gguf: Any, writer: Any, plan: list[Planned], reader: Reader, out: Path) -> int:
    """The whole file, under a temporary name until then; returns its size."""
    sizes = {t.name: nbytes_of(gguf, t) for t in plan}
    check_room(out.absolute().parent, sum(sizes.values()))
    for t in plan:
        writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), sizes[t.name], qtype(gguf, t.type))
    partial = out.with_name(out.name + PARTIAL)
    try:
        partial.unlink(missing_ok=True)  # of a run that was killed
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        with partial.open("ab") as file:
            for t in plan:
                write_tensor(gguf, t, sizes[t.name], reader, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(out)
    except BaseException as cause:
        writer.close()
        partial.unlink(missing_ok=True)
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise RoomError(f"--out {out}: no room left: {cause.strerror}. Nothing was kept.") from cause
        if isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG):
            raise RecipeError(f"--out {out}: cannot be written: {cause.strerror}") from cause
        raise
    fsync_folder(out.absolute().parent)
    return out.stat().st_size


def write_tensor(gguf: Any, t: Planned, nbytes: int, reader: Reader, file: BinaryIO) -> None:
    """Padding, then all values: a tensor begins at a multiple of the alignment, as its offset in the header says."""
    pad = -file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT
    file.write(bytes(pad))
    start = file.tell()
    for values in blocks(t, reader):
        file.write(stored(gguf, t, values))
    assert file.tell() - start == nbytes, f"{t.name}: {file.tell() - start} of {nbytes} bytes written"


def blocks(t: Planned, reader: Reader) -> Iterator[Tensor]:
    """float32 [rows, I], ready to be stored."""
    if t.weight is None:
        assert t.values is not None
        yield t.values
        return
    opened = get_format(t.weight.format).open(t.weight, reader, torch.device("cpu"))
    rows, unit = t.shape[0] if len(t.shape) > 1 else 1, t.head or 1
    count = max(unit, BLOCK_ENTRIES // max(1, t.shape[-1]) // unit * unit)
    for start in range(0, rows, count):
        values_OI = opened.values(Rows(start, min(start + count, rows))) + t.shift
        yield paired(values_OI, t.head) if t.head else values_OI


def paired(values_OI: Tensor, head: int) -> Tensor:
    """Rows 0, 1, 2, … of every head, from the order of transformers: 0, d/2, 1, d/2 + 1, …"""
    return values_OI.view(-1, 2, head // 2, values_OI.shape[-1]).transpose(1, 2).reshape(values_OI.shape)


def stored(gguf: Any, t: Planned, values_OI: Tensor) -> bytes:
    """The bytes of some rows.

    Raises:
        NumbersError: NaN or infinity, read or made by the target's range.
    """
    if not bool(values_OI.isfinite().all()):
        raise NumbersError(f"{t.name} holds NaN or infinity: the model is damaged; merge or download it again")
    largest = float(values_OI.abs().max()) if values_OI.numel() else 0.0
    if t.type == "f16" and largest >= 65520:  # what rounds past the largest float16
        raise NumbersError(f"{t.name} reaches {largest:.6g}, but F16 ends at 65504. Use --type bf16 or f32.")
    return bytes(gguf.quants.quantize(values_OI.contiguous().numpy(), qtype(gguf, t.type)).tobytes())
