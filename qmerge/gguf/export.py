"""A finished dense folder → one GGUF file, for llama.cpp and the programs built on it.

The layout of the file and the rounding to Q8_0 are those of llama.cpp's own ``gguf`` package. A model that GGUF or llama.cpp
cannot express is refused before the first byte. Values go through float32, some rows of one tensor at a time.
Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import importlib
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from qmerge.checkpoint.documents import read_json
from qmerge.checkpoint.folder import check_room
from qmerge.checkpoint.scan import scan
from qmerge.errors import CheckpointError, NumbersError, RecipeError
from qmerge.formats import get_format
from qmerge.gguf.families import check_config, family_of, read_config
from qmerge.gguf.hyperparameters import add_hyperparameters
from qmerge.gguf.tensors import PlannedTensor, fallback_notes, plan_tensors, quantization_type
from qmerge.gguf.vocabulary import read_vocabulary
from qmerge.safetensors_io.disk import new_file
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Rows

TYPES = ("f16", "bf16", "f32", "q8_0")

BLOCK_ENTRIES = 2**21
"""Values in memory at a time; at least one row, or one attention head where rows are permuted."""

LARGEST_F16 = 65504
OVERFLOWS_F16 = 65520
"""From here on, rounding to float16 gives infinity."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The written file. ``tensors``: type → number of tensors; ``notes``: what the user should know, one line each."""

    file: Path
    nbytes: int
    arch: str
    tensors: dict[str, int]
    tokenizer: str
    notes: tuple[str, ...]


def export(model: Path, out: Path, type: str, pre: str | None = None) -> Exported:
    """Write the model in the folder ``model`` to the file ``out``. The file gets its name when it is complete.

    Args:
        model: a dense Hugging Face folder with config.json, safetensors files and tokenizer.json.
        type: of the matrices: f16, bf16, f32 or q8_0. Vectors are F32.
        pre: ``tokenizer.ggml.pre``, where qmerge does not know the tokenizer.

    Raises:
        RecipeError: the ``gguf`` package is missing, or ``type`` or ``out`` cannot be used.
        CheckpointError: the model is quantized, or has something that qmerge cannot export.
        NumbersError: NaN, infinity, or a value beyond the range of ``type``.
        RoomError: not enough disk space. Nothing is left behind by any error.
    """
    gguf = gguf_package()
    check_request(model, out, type)
    refuse_quantized(model)
    with Reader() as reader:
        checkpoint = scan(model, reader)
        family = family_of(checkpoint)
        config = read_config(model)
        notes = check_config(family, config)
        plan = plan_tensors(gguf, checkpoint, family, config, type=type)
        notes += fallback_notes(plan, type)
        vocabulary = read_vocabulary(gguf, model, config.vocab_size, pre)
        notes += vocabulary.notes

        writer = gguf.GGUFWriter(path=None, arch=family.arch)
        add_names(gguf, writer, model, plan)
        add_hyperparameters(gguf, writer, config, type=type, has_window=family.full_every > 0)
        vocabulary.add_to(writer)
        nbytes = write_file(gguf, writer, plan, reader, out=out)
    return Exported(
        file=out,
        nbytes=nbytes,
        arch=family.arch,
        tensors=dict(sorted(Counter(tensor.type for tensor in plan).items())),
        tokenizer=vocabulary.describe(),
        notes=tuple(notes),
    )


def gguf_package() -> Any:
    """The ``gguf`` package, which is an optional dependency.

    Raises:
        RecipeError: it is not installed.
    """
    logging.getLogger("gguf").setLevel(logging.ERROR)  # its warnings are for developers of llama.cpp's converter
    try:
        return importlib.import_module("gguf")
    except ImportError as cause:
        raise RecipeError('the gguf package is missing, install it with: pip install "qmerge[gguf]"') from cause


def add_names(gguf: Any, writer: Any, model: Path, plan: list[PlannedTensor]) -> None:
    """Add the keys that name the model: kind of file, name of the folder, number of parameters (``8B``)."""
    writer.add_type("model")
    writer.add_name(model.resolve().name)
    entries = sum(tensor.entries for tensor in plan)
    # Parameters: all, outside experts, in experts; number of experts.
    writer.add_size_label(gguf.size_label(entries, entries, 0, 0))


# --- checks before the first byte ------------------------------------------------------------------------------------


def check_request(model: Path, out: Path, type: str) -> None:
    """Raise RecipeError where an argument cannot be used."""
    if type not in TYPES:
        raise RecipeError(f"--type {type}: expected one of {', '.join(TYPES)}")
    if not model.is_dir():
        raise RecipeError(f"{model} is not a folder: expected a dense model, as --target bf16 writes it")
    if out.is_dir():
        raise RecipeError(f"--out {out} is a folder: expected the name of a file, such as {out / 'model.gguf'}")
    if out.exists():
        raise RecipeError(f"--out {out} exists: delete it or choose another name")
    if not out.absolute().parent.is_dir():
        raise RecipeError(f"--out {out}: the folder {out.parent} does not exist; make it first")


def refuse_quantized(model: Path) -> None:
    """Raise CheckpointError for a quantized model, with the way to a dense one."""
    config = read_json(model / "config.json", CheckpointError)
    text_config = config.get("text_config") or {}
    quantization = config.get("quantization_config") or text_config.get("quantization_config")
    if quantization:
        method = quantization
        if isinstance(quantization, dict):
            method = quantization.get("quant_method")
        raise CheckpointError(
            f"{model} is quantized ({method}): merge with --target bf16 first, and export that folder"
        )


# --- writing ---------------------------------------------------------------------------------------------------------


def write_file(gguf: Any, writer: Any, plan: list[PlannedTensor], reader: Reader, *, out: Path) -> int:
    """Write keys and tensors. Returns the size in bytes.

    Raises:
        NumbersError: NaN, infinity, or a value beyond the range of the type.
        RoomError, DiskError: not enough disk space, or the disk cannot be written.
    """
    sizes = {tensor.name: tensor.nbytes(gguf) for tensor in plan}
    check_room(out.absolute().parent, sum(sizes.values()))
    for tensor in plan:
        # The writer reverses shapes itself. It ignores the dtype where a type is given.
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), sizes[tensor.name],
            raw_dtype=quantization_type(gguf, tensor.type),
        )  # fmt: skip
    with new_file(out) as file:
        try:
            writer.write_header_to_file(Path(file.name))
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()
        file.seek(0, os.SEEK_END)  # the writer has a descriptor of its own
        for tensor in plan:
            write_tensor(gguf, tensor, reader, file)
    return out.stat().st_size


def write_tensor(gguf: Any, tensor: PlannedTensor, reader: Reader, file: BinaryIO) -> None:
    """Write the values of a tensor. It starts at a multiple of the alignment, as its offset in the header says."""
    padding = -file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT
    file.write(bytes(padding))
    start = file.tell()
    for values in value_blocks(tensor, reader):
        file.write(stored_bytes(gguf, tensor, values))
    written = file.tell() - start
    assert written == tensor.nbytes(gguf), f"{tensor.name}: {written} of {tensor.nbytes(gguf)} bytes written"


def value_blocks(tensor: PlannedTensor, reader: Reader) -> Iterator[Tensor]:
    """The values of a tensor: float32 [rows, I], in blocks, with shift and permutation done."""
    if tensor.weight is None:
        assert tensor.values is not None
        yield tensor.values
        return
    stored = get_format(tensor.weight.format).open(tensor.weight, reader, torch.device("cpu"))
    row_count = tensor.shape[0] if len(tensor.shape) > 1 else 1
    rows_together = tensor.head_rows or 1
    rows_that_fit = BLOCK_ENTRIES // max(1, tensor.shape[-1])
    block_rows = max(rows_together, rows_that_fit // rows_together * rows_together)
    for start in range(0, row_count, block_rows):
        values_OI = stored.values(Rows(start, min(start + block_rows, row_count))) + tensor.shift
        yield halves_to_pairs(values_OI, tensor.head_rows) if tensor.head_rows else values_OI


def halves_to_pairs(values_OI: Tensor, head_rows: int) -> Tensor:
    """Reorder the rows of every head from transformers' order (rotated: row i with row i + d/2) to llama.cpp's (row 2i with
    row 2i + 1): 0, d/2, 1, d/2 + 1, …"""
    columns = values_OI.shape[-1]
    heads = values_OI.view(-1, 2, head_rows // 2, columns)
    return heads.transpose(1, 2).reshape(values_OI.shape)


def stored_bytes(gguf: Any, tensor: PlannedTensor, values_OI: Tensor) -> bytes:
    """Some rows of a tensor as they are stored.

    Raises:
        NumbersError: NaN or infinity, read or after rounding.
    """
    if not bool(values_OI.isfinite().all()):
        raise NumbersError(
            f"{tensor.name} contains NaN or infinity: the model is damaged; merge again, or download it again"
        )
    largest = float(values_OI.abs().max()) if values_OI.numel() else 0.0
    if tensor.type == "f16" and largest >= OVERFLOWS_F16:
        raise NumbersError(
            f"{tensor.name} reaches {largest:.6g}, but F16 ends at {LARGEST_F16}. Use --type bf16 or f32."
        )
    qtype = quantization_type(gguf, tensor.type)
    return bytes(gguf.quants.quantize(values_OI.contiguous().numpy(), qtype).tobytes())
