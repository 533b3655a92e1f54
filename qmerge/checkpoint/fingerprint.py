"""Which model is this? A short hash of what its tensors are called, of its config, and of a few of its bytes.

    tensors   names, dtypes and shapes of all tensors
    values    bytes of up to 64 tensors, at up to 4 places each: 256 KiB at most, however large the model
    config    config.json, without what a library writes into it about itself

All three stay what they are when the same tensors come in other files: other shards, another order, other names of files,
other metadata or padding in a header. All but ``config`` change with the dtype or the quantization, and when a tensor is
renamed. The values are a sample: two models that differ in a few entries only may share it (the SHA-256 of every file
stands beside it in qmerge.json); a training run that moves every weight cannot go unseen.
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

SAMPLED, PLACES, PIECE = 64, 4, 1024
"""Tensors that are looked into, places in each, bytes at each place."""

DIGITS = 16
VOLATILE = ("transformers_version", "unsloth_version", "unsloth_fixed", "use_cache", "torch_dtype", "dtype")
"""Settings that change with who saved the model, or that the tensors show themselves; and all that begin with ``_``."""


@dataclass(frozen=True)
class Fingerprint:
    """Hexadecimal, 16 digits each. ``id`` is the hash of the other three."""

    tensors: str
    values: str
    config: str

    @property
    def id(self) -> str:
        return digest(f"{self.tensors} {self.values} {self.config}".encode())


def fingerprint(checkpoint: Checkpoint, reader: Reader) -> Fingerprint:
    """Reads the sampled bytes; the rest is known from the headers."""
    infos = {info.name: info for weight in checkpoint.weights.values() for info in weight.parts.values()}
    shapes = [[name, infos[name].dtype, list(infos[name].shape)] for name in sorted(infos)]
    return Fingerprint(
        tensors=digest(json.dumps(shapes).encode()),
        values=digest(b"".join(sampled(infos, reader))),
        config=digest(json.dumps(lasting(checkpoint.config), sort_keys=True).encode()),
    )


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:DIGITS]


def sampled(infos: Mapping[str, TensorInfo], reader: Reader) -> list[bytes]:
    """Pieces of tensors that are spread evenly over the sorted names; small ones only where there are no others."""
    large = [name for name in sorted(infos) if infos[name].nbytes >= PLACES * PIECE]
    names = large or sorted(infos)
    pieces: list[bytes] = []
    for name in spread(names, SAMPLED):
        last = max(0, infos[name].nbytes - PIECE)
        for start in sorted({last * place // (PLACES - 1) for place in range(PLACES)}):
            piece = reader.bytes(infos[name], start, min(start + PIECE, infos[name].nbytes))
            pieces.append(name.encode() + bytes(piece))
    return pieces


def spread(names: list[str], most: int) -> list[str]:
    if len(names) <= most:
        return names
    return [names[place * (len(names) - 1) // (most - 1)] for place in range(most)]


def lasting(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config (and those of its parts) without what says nothing about the model."""
    return {
        name: lasting(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in VOLATILE and not name.startswith("_")
    }
