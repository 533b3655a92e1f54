"""JSON files from outside: config.json, adapter_config.json, indexes. Types, sizes, depth and counts are checked here, once.

A missing key is not an error here: the code that needs it reports it. Keys without a check may hold anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from qmerge.errors import InputError
from qmerge.safetensors_io.disk import file_size
from qmerge.safetensors_io.strict_json import LONE_SURROGATE, strict_json

LARGEST_JSON = 64 * 2**20
"""Bytes; the largest tokenizers have 35 MB."""

DEEPEST = 50
"""Levels of nested lists and objects. config.json has up to 6."""

MOST_LAYERS = 10_000
"""Layers of a model; the deepest have a few hundred."""

LARGEST_SIZE = 2**31
"""Largest size in a config: of a vocabulary, of a hidden state."""

LARGEST_NUMBER = 2**64
"""Largest number in a file of qmerge: of bytes, or a seed."""

LONGEST_PART = 255
"""Bytes of a file's name; the limit of all common file systems."""

LONGEST_NAME = 1000
"""Characters of a name or an id."""


def _limited(value: Any) -> Any:
    """Sizes up to the limit; other values mean something else in some architectures."""
    if isinstance(value, int) and not -LARGEST_SIZE <= value <= LARGEST_SIZE:
        raise ValueError(f"expected a number up to {LARGEST_SIZE}")
    return value


def _few(value: Any) -> Any:
    if isinstance(value, int) and not 0 <= value <= MOST_LAYERS:
        raise ValueError(f"expected a number from 0 to {MOST_LAYERS}")
    return value


def _encodable(text: str) -> str:
    """NUL ends a path."""
    if "\0" in text or LONE_SURROGATE.search(text):
        raise ValueError("expected text without NUL and lone surrogates")
    return text


Size = Annotated[Any, AfterValidator(_limited)]
Count = Annotated[Any, AfterValidator(_few)]
Name = Annotated[str, Field(max_length=LONGEST_NAME), AfterValidator(_encodable)]

SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""A surrogate as JSON escapes it."""


class _Document(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class Quantization(_Document):
    """``quantization_config``."""

    quant_method: Name | None = None
    bits: Any = None
    llm_int8_skip_modules: list[Name] | None = None
    modules_to_not_convert: list[Name] | None = None
    bnb_4bit_compute_dtype: Name | None = None
    bnb_4bit_quant_type: Name | None = None
    bnb_4bit_quant_storage: Name | None = None
    group_size: Annotated[int, Field(ge=-1, le=LARGEST_SIZE)] | list[int] | None = None


class PartConfig(_Document):
    """The config of a part of a multimodal model."""

    model_type: Name | None = None
    vocab_size: Size = None
    hidden_size: Size = None
    intermediate_size: Size = None
    max_position_embeddings: Size = None
    num_hidden_layers: Count = None
    n_layer: Count = None
    n_layers: Count = None
    num_layers: Count = None
    quantization_config: Quantization | None = None


class ModelConfig(PartConfig):
    """config.json."""

    architectures: list[Name] | None = None
    dtype: Name | None = None
    torch_dtype: Name | None = None
    text_config: PartConfig | None = None
    vision_config: PartConfig | None = None
    audio_config: PartConfig | None = None


class AdapterConfig(_Document):
    """adapter_config.json. Numbers that may be wrong in many ways (``r``, ``lora_alpha``) are checked where they are used."""

    peft_type: Name | None = None
    task_type: Name | None = None
    base_model_name_or_path: Name | None = None
    revision: Name | None = None
    peft_version: Annotated[Name, Field(max_length=100)] | None = None
    target_modules: list[Name] | Annotated[str, Field(max_length=100_000)] | None = None
    modules_to_save: list[Name] | None = None
    target_parameters: list[Name] | None = None
    auto_mapping: dict[str, Any] | None = None


def is_file_name(name: str) -> bool:
    """Whether a text names a file inside a folder, on every system."""
    # Parsed as a Windows path on every system: so drives, UNC shares and backslashes are noticed everywhere.
    path = PureWindowsPath(name)
    leads_out = path.drive or path.root or ".." in path.parts
    # Not printable: NUL, line breaks, lone surrogates.
    if leads_out or not path.parts or len(name) > LONGEST_NAME or not name.isprintable():
        return False
    # File systems limit each part of a path.
    return all(len(part.encode()) <= LONGEST_PART for part in path.parts)


def odd_number(value: Any) -> str | None:
    """The first number in a document that is NaN, infinite or larger than any that qmerge writes; None where all are usual."""
    for item in chain.from_iterable(_levels(value)):
        # The comparison is false for NaN, too.
        if isinstance(item, int | float) and not -LARGEST_NUMBER <= item <= LARGEST_NUMBER:
            return f"{item:.3g}" if isinstance(item, float) else f"a number of {item.bit_length()} bits"
    return None


DocumentT = TypeVar("DocumentT", bound=_Document)


def check_document(content: dict[str, Any], kind: type[DocumentT], name: str, error: type[InputError]) -> None:
    """Check the keys of a document that have a type here.

    Args:
        name: of the file, for messages.

    Raises:
        error: one line about the first value that is wrong.
    """
    try:
        kind.model_validate(content)
    except ValidationError as cause:
        first = cause.errors()[0]
        key = ".".join(
            str(part) for part in first["loc"] if not str(part).startswith(("constrained", "list[", "function"))
        )
        message = first["msg"].removeprefix("Value error, ")
        raise error(f"{name}: {key}: {message}, found {str(first.get('input'))[:80]!r}") from cause


def read_json(path: Path, error: type[InputError]) -> dict[str, Any]:
    """A JSON object from a file, without duplicate keys.

    Raises:
        error: the file cannot be read, is not a regular file, is larger than ``LARGEST_JSON``, or holds something else.
    """
    try:
        if file_size(path, error) > LARGEST_JSON:
            raise error(f"{path.name}: larger than {LARGEST_JSON >> 20} MiB, which no model needs ({path})")
        text = path.read_bytes()
        content = strict_json(text, path.name, error)
    except OSError as cause:
        raise error(f"{path.name} cannot be read: {cause.strerror} ({path})") from cause
    if is_deeper(content, DEEPEST):
        raise error(f"{path.name}: lists and objects are nested more than {DEEPEST} levels deep")
    # Only then, since it takes time; a pair of surrogates is one character.
    if SURROGATE.search(text) and LONE_SURROGATE.search(json.dumps(content, ensure_ascii=False)):
        raise error(f"{path.name}: a text holds a lone surrogate, which cannot be written again ({path})")
    return content


def is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and dicts are nested in more levels than this."""
    innermost = next(islice(_levels(value), levels, None), [])
    return any(isinstance(item, dict | list) for item in innermost)


def _levels(value: Any) -> Iterator[list[Any]]:
    """A value, then the values that lists and dicts hold, level by level: without recursion, which Python limits."""
    level = [value]
    while level:
        yield level
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += item.values()
            elif isinstance(item, list):
                inner += item
        level = inner
