"""The header of a GGUF file: everything before the tensors. Read strictly, and without the texts of the vocabulary.

    magic, version, counts      24 bytes: numbers of tensors and of keys
    keys                        name, type, value: hyperparameters, tokenizer, chat template
    tensor infos                name, shape (reversed), type, offset
    data                        tensors, each from a multiple of the alignment on

The ``gguf`` package's reader is not used: it makes several numpy arrays for every token of a vocabulary, which takes seconds, and
raises what numpy raises on a damaged file. Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qmerge.errors import CheckpointError
from qmerge.formats.gguf import BLOCK_TYPES
from qmerge.gguf.converter import packages
from qmerge.gguf.mapping import GgufTensor
from qmerge.types import TensorInfo, as_matrix

START = struct.Struct("<4sIQQ")
"""Magic, version, number of tensors, number of keys."""

MAGIC, VERSION = b"GGUF", 3

READ_VERSIONS = (2, 3)
"""Version 2 differs in nothing that a little-endian file could show."""

ALIGNMENT = 32
"""Bytes; where ``general.alignment`` says nothing else."""

ARCHITECTURE, FILE_TYPE, ALIGNMENT_KEY, SPLIT_COUNT = (
    "general.architecture", "general.file_type", "general.alignment", "split.count"
)  # fmt: skip

SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"
}  # fmt: skip
"""Number of a type of values → its struct format. 8 is a string, 9 an array."""

STRING, ARRAY = 8, 9

MOST_ENTRIES, MOST_DIMENSIONS, LONGEST_STRING = 2**26, 4, 2**26
"""Limits of one array, of a shape, and of one string, in bytes. The last one holds any chat template."""


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """Everything before the tensors of a GGUF file.

    scalars    name → value of the keys that hold one number or one text
    lists      name → where the texts of a key begin that holds several, and how many they are
    keys       the bytes of all keys
    tensors    name → shape, in the order of the file
    types      name → type of its blocks
    offsets    name → position of its first byte in the file
    """

    path: Path
    scalars: Mapping[str, Any]
    lists: Mapping[str, tuple[int, int]]
    keys: bytes
    key_count: int
    tensors: Mapping[str, GgufTensor]
    types: Mapping[str, str]
    offsets: Mapping[str, int]

    @property
    def arch(self) -> str:
        """``general.architecture``."""
        return str(self.scalars.get(ARCHITECTURE, ""))

    @property
    def alignment(self) -> int:
        """Bytes; every tensor starts at a multiple of it."""
        return int(self.scalars.get(ALIGNMENT_KEY, ALIGNMENT))

    def info(self, name: str) -> TensorInfo:
        """The bytes of a tensor, [rows, bytes of a row]."""
        rows, columns = as_matrix(self.tensors[name].shape)
        row_bytes = BLOCK_TYPES[self.types[name]].row_bytes(columns)
        return TensorInfo(dtype="U8", shape=(rows, row_bytes), name=name, file=self.path, offset=self.offsets[name])

    def text(self, key: str, index: int) -> str | None:
        """One of the texts of a key that holds several, such as the vocabulary; None where there is none."""
        position, count = self.lists.get(key, (0, 0))
        if not 0 <= index < count:
            return None
        with self.path.open("rb") as file:
            file.seek(position)
            parser = _HeaderParser(self.path, file)
            for _ in range(index):
                parser.string()
            return parser.string()

    @property
    def scales_rope(self) -> bool:
        """Whether rotary embeddings are scaled (Llama 3.1, YaRN, linear): by a key, or by factors."""
        kind = self.scalars.get(f"{self.arch}.rope.scaling.type", "none")
        return kind != "none" or any(name.startswith(("rope_freqs", "rope_factors")) for name in self.tensors)

    def keys_with_file_type(self, file_type: int) -> bytes:
        """The keys, with the number of another mix."""
        name = FILE_TYPE.encode()
        start = struct.pack("<Q", len(name)) + name + struct.pack("<I", 4)
        before, found, after = self.keys.partition(start)
        if not found:
            return self.keys
        return before + start + struct.pack("<I", file_type) + after[4:]


def read_header(path: Path) -> GgufHeader:
    """The header of a GGUF file.

    Raises:
        CheckpointError: it is not a whole GGUF file, or one part of several, or has a type that qmerge does not read.
        RecipeError: the ``gguf`` package is missing.
    """
    try:
        with path.open("rb") as file:
            return _HeaderParser(path, file).parse()
    except OSError as cause:
        raise CheckpointError(f"{path.name}: cannot be read: {cause.strerror} ({path})") from cause
    except (struct.error, UnicodeDecodeError) as cause:
        raise CheckpointError(
            f"{path.name}: the header of this GGUF file is damaged or not whole: download it again"
        ) from cause


class _HeaderParser:
    """Reads one header. The end of the file in it is a struct.error."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._size = path.stat().st_size
        gguf, _ = packages()
        self._types = {int(gguf.GGMLQuantizationType[name]): name for name in BLOCK_TYPES}

    def parse(self) -> GgufHeader:
        """See ``read_header``."""
        tensor_count, key_count = self._counts()
        scalars: dict[str, Any] = {}
        lists: dict[str, tuple[int, int]] = {}
        for _ in range(key_count):
            name = self.string()
            kind = self._number("<I")
            if kind == ARRAY:
                lists[name] = self._skip_array()
            else:
                scalars[name] = self._scalar(kind)
        if scalars.get(SPLIT_COUNT, 1) > 1:
            raise CheckpointError(
                f"{self._path.name} is one part of {scalars[SPLIT_COUNT]}: join them (llama-gguf-split --merge), and give the "
                f"whole file"
            )
        alignment = scalars.get(ALIGNMENT_KEY, ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"the alignment is {alignment}, expected a power of 2")
        keys_end = self._file.tell()
        infos = [self._tensor_info() for _ in range(tensor_count)]
        data_start = self._file.tell()
        data_start += -data_start % alignment
        tensors, types, offsets = self._tensors(infos, data_start)
        self._file.seek(START.size)
        return GgufHeader(
            path=self._path,
            scalars=scalars,
            lists=lists,
            keys=self._file.read(keys_end - START.size),
            key_count=key_count,
            tensors=tensors,
            types=types,
            offsets=offsets,
        )

    def _counts(self) -> tuple[int, int]:
        start = self._file.read(START.size)
        if start[:4] != MAGIC:
            raise CheckpointError(
                f"{self._path.name} is not a GGUF file: it starts with {start[:4]!r}, expected {MAGIC!r}; download it again"
            )
        _, version, tensor_count, key_count = START.unpack(start)
        if version not in READ_VERSIONS:
            raise CheckpointError(f"{self._path.name}: GGUF version {version}, expected {VERSION}, little endian")
        # The shortest info takes 24 bytes, the shortest key 13.
        if 24 * tensor_count + 13 * key_count > self._size:
            raise self._damaged(f"it announces {tensor_count} tensors and {key_count} keys in {self._size} bytes")
        return tensor_count, key_count

    def _tensors(
        self, infos: list[tuple[Any, ...]], data_start: int
    ) -> tuple[dict[str, GgufTensor], dict[str, str], dict[str, int]]:
        """Shapes, types and positions by name."""
        tensors: dict[str, GgufTensor] = {}
        types: dict[str, str] = {}
        offsets: dict[str, int] = {}
        for name, shape, block_type, offset in infos:
            if name in tensors:
                raise self._damaged(f"it has two tensors {name}")
            rows, columns = as_matrix(shape)
            blocks = BLOCK_TYPES[block_type]
            if columns % blocks.block:
                raise self._damaged(
                    f"{name} has rows of {columns}, which is not a multiple of {blocks.block}, the block of {block_type}"
                )
            if data_start + offset + rows * blocks.row_bytes(columns) > self._size:
                raise self._damaged(f"it ends inside {name}, at {self._size} bytes")
            tensors[name] = GgufTensor(name=name, shape=shape)
            types[name] = block_type
            offsets[name] = data_start + offset
        return tensors, types, offsets

    def _tensor_info(self) -> tuple[str, tuple[int, ...], str, int]:
        """Name, shape, type and offset from the start of the data."""
        name = self.string()
        dimensions = self._number("<I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise self._damaged(f"{name} has {dimensions} dimensions, expected 1 to {MOST_DIMENSIONS}")
        shape = tuple(reversed([self._number("<Q") for _ in range(dimensions)]))
        if 0 in shape:
            raise self._damaged(f"{name} has the shape {list(shape)}")
        number = self._number("<I")
        if number not in self._types:
            gguf, _ = packages()
            raise CheckpointError(
                f"{self._path.name}: {name} has type {_type_name(gguf, number)}, which this version does not read; it reads "
                f"{', '.join(BLOCK_TYPES)}"
            )
        return name, shape, self._types[number], self._number("<Q")

    def _scalar(self, kind: int) -> Any:
        """One number or one text."""
        if kind == STRING:
            return self.string()
        if kind not in SCALARS:
            raise self._damaged(f"a key has the type {kind}")
        return self._number(SCALARS[kind])

    def _skip_array(self) -> tuple[int, int]:
        """Where its texts begin, and how many they are; 0 for numbers."""
        kind = self._number("<I")
        count = self._number("<Q")
        if count > MOST_ENTRIES:
            raise self._damaged(f"an array has {count} entries")
        position = self._file.tell()
        if kind in SCALARS:
            self._file.seek(count * struct.calcsize(SCALARS[kind]), 1)
            return position, 0
        if kind != STRING:
            raise self._damaged(f"an array has entries of type {kind}")
        for _ in range(count):
            self.string()
        return position, count

    def string(self) -> str:
        """The text at this position."""
        length = self._number("<Q")
        if length > LONGEST_STRING:
            raise self._damaged(f"a text has {length} bytes")
        data = self._file.read(length)
        if len(data) < length:
            raise struct.error
        return data.decode()

    def _number(self, form: str) -> Any:
        (value,) = struct.unpack(form, self._file.read(struct.calcsize(form)))
        return value

    def _damaged(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._path.name}: this GGUF file is damaged: {problem}. Download it again")


def _type_name(gguf: Any, number: int) -> str:
    try:
        return str(gguf.GGMLQuantizationType(number).name)
    except ValueError:
        return str(number)
