"""Damage to bytes and to JSON documents. All choices come from one random generator."""

from __future__ import annotations

import struct
from copy import deepcopy
from random import Random
from typing import Any

ODD_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2**31, 2**63, 10**30, 0.5, float("nan"), float("inf"), 1e300, "", "x", "\ud800", "\0", "../x",
    "x" * 300, "~nosuchuser/x", [], {}, [[]], {"": {}}, [1, "a"], {"a": None},
)  # fmt: skip

ODD_BYTES = (
    b"\0", b"\xff", b"\n", b"{", b"[" * 2000, b'{"a":' * 2000, b"9" * 5000, b'"', b"\\ud800", b"-", b"NaN", b"1e999",
    b"\xed\xa0\x80",
    struct.pack("<Q", 2**63 - 1), struct.pack("<Q", 2**64 - 1), struct.pack("<I", 2**31), struct.pack("<Q", 0),
)  # fmt: skip


def damaged_bytes(data: bytes, random: Random) -> bytes:
    """One to four flips, insertions, cuts or repetitions."""
    result = bytearray(data)
    for _ in range(random.randint(1, 4)):
        start = random.randint(0, len(result))
        stop = min(len(result), start + random.randint(0, 16))
        kind = random.choice(("flip", "insert", "replace", "delete", "repeat", "cut"))
        if kind == "flip" and start < len(result):
            result[start] ^= 1 << random.randint(0, 7)
        elif kind == "insert":
            result[start:start] = random.choice(ODD_BYTES)
        elif kind == "replace":
            odd = random.choice(ODD_BYTES)
            result[start : start + len(odd)] = odd
        elif kind == "delete":
            del result[start:stop]
        elif kind == "repeat":
            result[start:start] = result[start:stop] * random.randint(1, 50)
        elif kind == "cut":
            del result[start:]
    return bytes(result)


def damaged_document(document: Any, random: Random) -> Any:
    """A copy with one to three values, keys or entries changed."""
    result = deepcopy(document)
    for _ in range(random.randint(1, 3)):
        containers = _containers(result)
        if not containers:
            return deepcopy(random.choice(ODD_VALUES))
        container = random.choice(containers)
        key = random.choice(sorted(container) if isinstance(container, dict) else list(range(len(container))))
        kind = random.choice(("value", "value", "value", "remove", "nest", "repeat", "key"))
        if kind == "value":
            container[key] = deepcopy(random.choice(ODD_VALUES))  # the next change may be inside it
        elif kind == "remove":
            del container[key]
        elif kind == "nest":
            container[key] = _nested(container[key], random.choice((1, 49, 200)))
        elif kind == "repeat":
            container[key] = [deepcopy(container[key]) for _ in range(random.choice((2, 30)))]
        elif isinstance(container, dict):
            container[random.choice(("", "\ud800", "x" * 2000, "../x", "__metadata__"))] = container.pop(key)
    return result


def _containers(value: Any) -> list[Any]:
    """All lists and dicts in a document that are not empty, those outside first."""
    found: list[Any] = []
    level = [value]
    while level:
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict | list) and item:
                found.append(item)
                inner += item.values() if isinstance(item, dict) else item
        level = inner
    return found


def _nested(value: Any, levels: int) -> Any:
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value
