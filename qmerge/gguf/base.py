"""A GGUF file as a base: its tensors as weights with Hugging Face names, in the order of Hugging Face rows.

Config and tokenizer come from the file, as transformers reads them, or from the folder of ``--original``, which an architecture
needs that transformers does not read from GGUF files. Which tensor is which weight is found the same way as for writing: by
following llama.cpp's converter (``mapping.py``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from qmerge.checkpoint.architecture import meta_model
from qmerge.checkpoint.documents import read_json
from qmerge.checkpoint.scan import Checkpoint, scan
from qmerge.errors import CheckpointError, listed
from qmerge.formats.base import NoOptions
from qmerge.formats.gguf import BLOCK_TYPES, GgufOptions
from qmerge.gguf.byte_level import pre_tokenizer_of
from qmerge.gguf.header import GgufHeader, read_header
from qmerge.gguf.mapping import GgufMap, Place, trace
from qmerge.safetensors_io.reader import Reader
from qmerge.safetensors_io.temporary import folder_until_exit
from qmerge.types import Weight, as_matrix

SUFFIX = ".gguf"


@dataclass(frozen=True)
class GgufCheckpoint(Checkpoint):
    """A model in a GGUF file; ``folder`` has its config and its tokenizer.

    Tensors that are not weights of the model (rope factors), or whose values llama.cpp's converter computes, are weights of the
    format ``raw`` under their own names.
    """

    header: GgufHeader
    mapped: GgufMap


def read_gguf(path: Path, original: Checkpoint | None) -> GgufCheckpoint:
    """A GGUF file as a checkpoint.

    Args:
        original: the model that it was made from, whose config, tokenizer and names are then taken.

    Raises:
        CheckpointError: it cannot be read, or its tensors are not those of the architecture.
    """
    header = read_header(path)
    if original is None and header.scales_rope:
        raise CheckpointError(
            f"{path.name} scales its rotary embeddings, which transformers does not read from GGUF files: give the model that it "
            f"was made from with --original"
        )
    if original is not None:
        folder = original.folder
        config = original.config
        shapes = {weight.name: weight.shape for weight in original.weights.values()}
    else:
        folder = extracted_folder(path)
        config = read_json(folder / "config.json", CheckpointError)
        shapes = parameter_shapes(config)
    mapped = trace(folder, config, shapes)
    weights: dict[str, Weight] = {}
    used: set[str] = set()
    for name, place in mapped.places.items():
        if place.tensor not in header.tensors and name.endswith("lm_head.weight"):
            continue  # tied: the file has no output embedding
        weights[name] = _weight(name, shapes[name], header, mapped)
        used.add(place.tensor)
    for name in header.tensors:
        if name not in used:
            weights[name] = _raw(name, header)
    quantized = {**config, "quantization_config": {"quant_method": "gguf"}}
    places = {name: place for name, place in mapped.places.items() if name in weights}
    return GgufCheckpoint(folder, quantized, weights, (path,), header, replace(mapped, places=places))


def _weight(name: str, shape: tuple[int, ...], header: GgufHeader, mapped: GgufMap) -> Weight:
    """A weight of the model, which is a tensor of the file or some rows of one.

    Raises:
        CheckpointError: the file lacks the tensor, or it has another shape.
    """
    place = mapped.places[name]
    found = header.tensors.get(place.tensor)
    expected = mapped.tensors[place.tensor].shape
    if found is None or found.shape != expected:
        shown = list(found.shape) if found else "nothing"
        raise CheckpointError(
            f"{header.path.name}: expected {place.tensor} of shape {list(expected)}, found {shown}: is this config that of the "
            f"file? Give the model that it was made from with --original"
        )
    rows, columns = as_matrix(shape)
    row_bytes = BLOCK_TYPES[header.types[place.tensor]].row_bytes(columns)
    whole = header.info(place.tensor)
    info = replace(whole, name=name, shape=(rows, row_bytes), offset=whole.offset + place.first_row * row_bytes)
    module, _, local = name.rpartition(".")
    options = GgufOptions(header.types[place.tensor], place.order, place.shift)
    return Weight(module=module, local=local, format="gguf", shape=shape, parts={local: info}, options=options)


def _raw(name: str, header: GgufHeader) -> Weight:
    """A tensor that is only copied."""
    info = header.info(name)
    module, _, local = name.rpartition(".")
    return Weight(module=module, local=local, format="raw", shape=info.shape, parts={local: info}, options=NoOptions())


def places_of(base: Checkpoint) -> Mapping[str, Place]:
    """Where the weights of a model are in a GGUF file of it."""
    if isinstance(base, GgufCheckpoint):
        return base.mapped.places
    shapes = {weight.name: weight.shape for weight in base.weights.values() if weight.format != "raw"}
    return trace(base.folder, base.config, shapes).places


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that a path is, or that an output folder of qmerge has; None for a folder with safetensors files."""
    files = _gguf_files(path)
    return files[0] if len(files) == 1 else None


def _gguf_files(path: Path) -> list[Path]:
    if path.suffix == SUFFIX and path.is_file():
        return [path]
    if (path / "config.json").exists():
        return []
    return sorted(path.glob(f"*{SUFFIX}"))


def open_model(path: Path, reader: Reader, like: Checkpoint | None = None) -> Checkpoint:
    """A model in a folder, or in a GGUF file.

    Args:
        like: has the config, the tokenizer and the names for a GGUF file; None: they come from the file.

    Raises:
        CheckpointError: it cannot be read.
    """
    files = _gguf_files(path)
    if len(files) > 1:
        raise CheckpointError(
            f"{path} holds {listed([file.name for file in files])}: give one of these files, such as --base {files[0]}. To be "
            f"merged, the most exact one (the largest) loses least"
        )
    return read_gguf(files[0], like) if files else scan(path, reader)


def unnamed(path: Path) -> Checkpoint:
    """The tensors of a GGUF file under their own names, for a fingerprint."""
    header = read_header(path)
    return Checkpoint(path.parent, dict(header.scalars), {name: _raw(name, header) for name in header.tensors}, (path,))


def parameter_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name → shape of the weights of a model as transformers saves them; tied ones once."""
    from transformers.core_model_loading import revert_weight_conversion

    model: Any = meta_model(config)
    stored = revert_weight_conversion(model, dict(model.named_parameters()))
    return {name: tuple(tensor.shape) for name, tensor in stored.items()}


def extracted_folder(path: Path) -> Path:
    """A folder with the config and the tokenizer that a GGUF file holds, as transformers reads them. It is removed at exit.

    Raises:
        CheckpointError: transformers does not read this architecture from GGUF files.
    """
    status = path.stat()
    return _extracted_folder(path, status.st_size, status.st_mtime_ns)


@cache
def _extracted_folder(path: Path, size: int, changed: int) -> Path:
    """The same; a file that has another size or time is another file."""
    from transformers import AutoConfig, AutoTokenizer

    folder = folder_until_exit()
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    except Exception as cause:  # transformers raises many types
        raise CheckpointError(
            f"{path.name}: transformers cannot read its config and tokenizer ({cause}): give the model that it was made from "
            f"with --original"
        ) from cause
    content = config.to_dict()
    content["architectures"] = [architecture_of(config)]
    (folder / "config.json").write_text(json.dumps(content, default=str))
    tokenizer.save_pretrained(folder)
    _correct_tokenizer(folder / "tokenizer.json", config.vocab_size, read_header(path).scalars)
    return folder


def _correct_tokenizer(path: Path, vocab_size: int, scalars: Mapping[str, Any]) -> None:
    """Mend what transformers leaves out or adds when it reads a tokenizer from a GGUF file.

    It does not look at ``tokenizer.ggml.pre``, by which byte-level tokenizers split text, and adds tokens that the model has no
    rows for.
    """
    if not path.is_file():
        return
    content = json.loads(path.read_bytes())
    content["added_tokens"] = [token for token in content.get("added_tokens") or [] if token["id"] < vocab_size]
    known = pre_tokenizer_of(str(scalars.get("tokenizer.ggml.pre")))
    if known is not None and scalars.get("tokenizer.ggml.model") == "gpt2":
        content["pre_tokenizer"], content["model"]["ignore_merges"] = known
    path.write_text(json.dumps(content, ensure_ascii=False))


def architecture_of(config: Any) -> str:
    """The class that transformers builds for a config: ``LlamaForCausalLM``."""
    from transformers import AutoModelForCausalLM

    return str(AutoModelForCausalLM._model_mapping[type(config)].__name__)
