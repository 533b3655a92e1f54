"""Which model is this? A short hash of the names of its tensors, of its config, and of a sample of its bytes.

    tensors   names, dtypes and shapes of all tensors
    values    bytes of up to 64 tensors, at up to 4 positions each: 256 KiB at most, however large the model
    config    config.json, without settings that a library writes about itself

All three stay the same when the tensors come in other files: other shards, another order, other names of files, other
metadata or padding in a header. All but ``config`` change with the dtype or the quantization, and when a tensor is renamed.
The values are a sample: two models that differ in a few entries only may have the same one (qmerge.json also has the SHA-256
of every file); a training run, which changes every weight, always shows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qmerge.checkpoint.scan import Checkpoint
from qmerge.safetensors_io.reader import Reader
from qmerge.types import TensorInfo

SAMPLED_TENSORS = 64
POSITIONS = 4
"""Positions that are sampled in each of them."""

SAMPLE_BYTES = 1024
"""Bytes at each position."""

DIGITS = 16

VOLATILE_SETTINGS = frozenset(
    {"transformers_version", "unsloth_version", "unsloth_fixed", "use_cache", "torch_dtype", "dtype"}
)
"""Settings that depend on who saved the model, or that the tensors show themselves. So do all that begin with ``_``."""


@dataclass(frozen=True)
class Fingerprint:
    """Three hashes, 16 hexadecimal digits each. ``id`` is the hash of all three."""

    tensors: str
    values: str
    config: str

    @property
    def id(self) -> str:
        """16 hexadecimal digits."""
        return _hash(f"{self.tensors} {self.values} {self.config}".encode())


def fingerprint(checkpoint: Checkpoint, reader: Reader) -> Fingerprint:
    """The fingerprint of a checkpoint. Only the sampled bytes are read."""
    infos: dict[str, TensorInfo] = {}
    for weight in checkpoint.weights.values():
        for info in weight.parts.values():
            infos[info.name] = info
    # Sorted by name: independent of the order and the number of files.
    shapes = [[name, infos[name].dtype, list(infos[name].shape)] for name in sorted(infos)]
    return Fingerprint(
        tensors=_hash(json.dumps(shapes).encode()),
        values=_hash(b"".join(_sampled_bytes(infos, reader))),
        config=_hash(json.dumps(_lasting_settings(checkpoint.config), sort_keys=True).encode()),
    )


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:DIGITS]


def _sampled_bytes(infos: Mapping[str, TensorInfo], reader: Reader) -> list[bytes]:
    """Name and bytes of every sample; small tensors are sampled only where there are no others."""
    large = [name for name in sorted(infos) if infos[name].nbytes >= POSITIONS * SAMPLE_BYTES]
    samples: list[bytes] = []
    for name in _spread(large or sorted(infos), SAMPLED_TENSORS):
        last_start = max(0, infos[name].nbytes - SAMPLE_BYTES)
        # A set: in a small tensor several positions are the same.
        starts = {last_start * position // (POSITIONS - 1) for position in range(POSITIONS)}
        for start in sorted(starts):
            data = reader.bytes(infos[name], start, min(start + SAMPLE_BYTES, infos[name].nbytes))
            samples.append(name.encode() + bytes(data))
    return samples


def _spread(names: list[str], most: int) -> list[str]:
    """Up to ``most`` names, evenly spread, with the first and the last one."""
    if len(names) <= most:
        return names
    return [names[number * (len(names) - 1) // (most - 1)] for number in range(most)]


def _lasting_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config, and the configs inside it, without volatile settings."""
    result: dict[str, Any] = {}
    for name, value in config.items():
        if name in VOLATILE_SETTINGS or name.startswith("_"):
            continue
        result[name] = _lasting_settings(value) if isinstance(value, dict) else value
    return result
