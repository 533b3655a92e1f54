"""The output folder: who may write there, what a run leaves in it, and the files that make it a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qmerge import hub
from qmerge.checkpoint import journal
from qmerge.checkpoint.scan import INDEX
from qmerge.errors import RecipeError, RoomError
from qmerge.safetensors_io.writer import PARTIAL, ShardWriter, write_file

LOCK = ".qmerge.lock"
SLACK = 64 * 2**20
"""Bytes for tokenizer, config, report and file system overhead."""

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
BESIDE_THE_WEIGHTS = (
    *TOKENIZER, "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "additional_chat_templates/*.jinja", "LICENSE*", "NOTICE*", "USE_POLICY*", "*.py",
)  # fmt: skip


def check_out(out: Path, inputs: Mapping[str, Path], resume: bool) -> None:
    """Refuse an output folder that holds something, or that lies inside an input or the Hub cache.

    Raises:
        RecipeError: which, and what to do.
    """
    real = out.resolve()
    for role, folder in {**inputs, "the Hub cache": hub.cache_folder()}.items():
        if real == folder.resolve() or folder.resolve() in real.parents:
            raise RecipeError(f"--out {out} lies inside {role} ({folder}); write somewhere else")
    if out.exists() and not out.is_dir():
        raise RecipeError(f"--out {out} is a file; expected a folder that is new or empty")
    if (out / LOCK).exists():
        hold(out).release()  # a killed run leaves the file behind, but nobody holds it
    names = sorted(path.name for path in out.iterdir() if path.name != LOCK) if out.is_dir() else []
    unfinished = journal.NAME in names
    if resume and not unfinished:
        if names:
            raise RecipeError(f"--resume: {out} holds no unfinished run")
    elif unfinished and not resume:
        raise RecipeError(
            f"--out {out} holds an unfinished run: add --resume to go on, or delete the folder to start again"
        )
    elif names and not resume:
        raise RecipeError(f"--out {out} is not empty ({names[0]} …); expected a folder that is new or empty")


def free_bytes(out: Path) -> int:
    """Free space on the disk that ``out`` will be on."""
    place = out.resolve()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def check_room(out: Path, needed: int) -> None:
    """Raise RoomError unless the disk has room for ``needed`` more bytes."""
    free = free_bytes(out)
    if free < needed + SLACK:
        raise RoomError(
            f"--out {out}: the model needs {needed / 1e9:.2f} GB and {SLACK / 1e6:.0f} MB beside it, "
            f"the disk has {free / 1e9:.2f} GB free"
        )


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Only one run writes to a folder. The lock file goes when the run ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise RecipeError(f"--out {out}: cannot be made: {cause.strerror}") from cause
    lock = hold(out)
    try:
        yield
    finally:
        lock.release()
        (out / LOCK).unlink(missing_ok=True)


def hold(out: Path) -> FileLock:
    """Take the lock, or raise RecipeError: another run has it, or the folder cannot be written to."""
    lock = FileLock(out / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout as cause:
        raise RecipeError(f"--out {out}: another qmerge is writing there") from cause
    except OSError as cause:
        raise RecipeError(f"--out {out}: cannot be written to: {cause.strerror}") from cause
    return lock


def discard(out: Path, made_by_us: bool) -> None:
    """After an error that no resume can mend: remove what the run wrote."""
    for path in [*out.glob(f"*{PARTIAL}"), *out.glob("*.safetensors"), out / journal.NAME]:
        path.unlink(missing_ok=True)
    if made_by_us and not any(path.name != LOCK for path in out.iterdir()):
        (out / LOCK).unlink(missing_ok=True)
        out.rmdir()


def write_index(out: Path, shards: Mapping[str, ShardWriter]) -> None:
    """``model.safetensors.index.json``, where there is more than one file."""
    if len(shards) == 1:
        return
    weight_map, total = {}, 0
    for file, writer in shards.items():
        for name, (spec, _) in writer.layout.tensors.items():
            weight_map[name] = file
            total += spec.nbytes
        for name in writer.layout.texts:
            weight_map[name] = file
            total += len(writer.texts[name].encode())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(out / INDEX, index)


def side_files(base: Path, adapter: Path) -> dict[str, Path]:
    """Everything beside weights and config that makes a folder a model: tokenizer and chat template from the adapter
    where it has them (tokens may have been added in training), the rest from the base. Copied, never run or rendered."""
    chosen = {path.relative_to(base).as_posix(): path for path in _matching(base, BESIDE_THE_WEIGHTS)}
    theirs = {path.relative_to(adapter).as_posix(): path for path in _matching(adapter, TOKENIZER)}
    if "chat_template.jinja" not in theirs and _has_template(adapter / "tokenizer_config.json"):
        chosen.pop("chat_template.jinja", None)  # the base's file would win over the adapter's own template
    return {**chosen, **theirs}


def tokenizer_warning(tokenizer: Path | None, config: Mapping[str, Any]) -> str | None:
    """A warning when a tokenizer.json knows more tokens than the embedding has rows."""
    rows = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if tokenizer is None or not rows:
        return None
    try:
        content = json.loads(tokenizer.read_bytes())
        vocabulary = content["model"]["vocab"]
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        largest = max([*ids, *(token["id"] for token in content.get("added_tokens", []))])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if largest < rows:
        return None
    return (
        f"the tokenizer has ids up to {largest}, but the embedding has {rows} rows: tokens were added without training "
        f"them into the adapter; the model cannot read them"
    )


def copy_side_files(out: Path, files: Mapping[str, Path]) -> None:
    for name, path in sorted(files.items()):
        (out / name).parent.mkdir(exist_ok=True)
        write_file(out / name, path.read_bytes())


def write_json(path: Path, value: Any, sort_keys: bool = False) -> None:
    write_file(path, (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=sort_keys) + "\n").encode())


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Files of a folder; a link that leads out of it (and not into the Hub cache) is left alone."""
    places = (folder.resolve(), hub.cache_folder())
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if any(path.resolve().is_relative_to(place) for place in places))


def _has_template(path: Path) -> bool:
    try:
        return "chat_template" in json.loads(path.read_bytes())
    except (OSError, ValueError, TypeError):
        return False
