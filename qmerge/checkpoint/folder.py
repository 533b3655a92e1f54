"""The output folder: who may write to it, cleaning up after a run, and the files that complete a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qmerge import hub
from qmerge.checkpoint import journal
from qmerge.checkpoint.documents import read_json
from qmerge.checkpoint.parts import Part, name_of_part, part_of_name
from qmerge.checkpoint.scan import INDEX
from qmerge.errors import AdapterError, CheckpointError, RecipeError, RoomError
from qmerge.safetensors_io.disk import PARTIAL, copy_file, disk_error, disk_errors, remove, write_file
from qmerge.safetensors_io.writer import FileLayout

LOCK = ".qmerge.lock"

TOOLS_FOLDERS = (".git", ".cache")
"""Folders that git and the Hub library keep in a model's folder. They are not part of the model, and a file in ``.git`` could
make git run a program."""

SLACK = 64 * 2**20
"""Bytes for tokenizer, config, report and the file system's overhead."""

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""Patterns of tokenizer files."""

SIDE_FILES = (
    *TOKENIZER, "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "additional_chat_templates/*.jinja", "modules.json", "sentence_bert_config.json",
    "config_sentence_transformers.json", "*_Pooling/config.json", "*_Normalize/config.json",
    "LICENSE*", "NOTICE*", "USE_POLICY*", "*.py",
)  # fmt: skip
"""Patterns of the files that complete a model, apart from weights and config."""


def check_out(out: Path, inputs: Mapping[str, Path], resume: bool) -> None:
    """Check that a run may write to an output folder.

    Args:
        inputs: name for messages ("the base") → a folder that it must not be inside of.
        resume: it must hold an unfinished run; else it must be new or empty.

    Raises:
        RecipeError: it may not.
    """
    check_place(out, inputs)
    check_content(out, resume)


def check_place(out: Path, inputs: Mapping[str, Path]) -> None:
    """Check that an output folder is not inside an input, and no file.

    Raises:
        RecipeError: it is.
    """
    real = out.resolve()  # a link may lead into an input
    for role, folder in {**inputs, "the Hub cache": hub.cache_folder()}.items():
        if real.is_relative_to(folder.resolve()):
            raise RecipeError(f"--out {out} is inside {role} ({folder}); write to another folder")
    if out.exists() and not out.is_dir():
        raise RecipeError(f"--out {out} is a file; expected a folder that is new or empty")


def check_content(out: Path, resume: bool) -> None:
    """Check that the folder of a whole run is empty, or holds an unfinished run to be resumed.

    Raises:
        RecipeError: as ``check_out``.
    """
    names = _names_in(out, None)
    if not names:  # a run that was killed before its first byte is resumed from the beginning
        return
    is_unfinished = journal.NAME in names
    begun = journal.parts_begun(out)
    if begun:
        raise RecipeError(
            f"--out {out} holds a run in {begun[0].count} parts: continue it with the same --shard or --workers ray and "
            f"--resume, or delete the folder to start again"
        )
    if resume and not is_unfinished:
        raise RecipeError(
            f"--resume: {out} holds no unfinished run; use a folder with an interrupted run, or omit --resume"
        )
    if not resume and is_unfinished:
        raise RecipeError(
            f"--out {out} holds an unfinished run: add --resume to continue it, or delete the folder to start again"
        )
    if not resume:
        raise RecipeError(f"--out {out} is not empty ({names[0]} …); expected a folder that is new or empty")


def check_content_for_part(out: Path, part: Part, resume: bool) -> None:
    """Check that the folder is empty, or holds other parts of the same run, or this part to be resumed.

    Raises:
        RecipeError: it holds something else, or this part was begun and is not resumed.
    """
    names = _names_in(out, part)
    if not names:
        return
    begun = journal.parts_begun(out)
    other_counts = {other.count for other in begun} - {part.count}
    if other_counts:
        raise RecipeError(
            f"--shard {part}: {out} holds a run in {min(other_counts)} parts; use the same number for all parts, or another "
            f"folder"
        )
    if part in begun:
        if not resume:
            raise RecipeError(
                f"--shard {part}: this part was begun in {out} before: add --resume to continue it, or use another number"
            )
    elif not begun or "config.json" in names:  # a finished model, an unfinished whole run, or another's files
        raise RecipeError(
            f"--shard {part}: {out} is not empty ({names[0]} …) and holds no run in parts; expected a folder that is new or "
            f"empty, or that other parts write to"
        )


def _names_in(out: Path, part: Part | None) -> list[str]:
    """The files in the folder, without locks, and without a journal that a killed run had not yet begun.

    Raises:
        RecipeError: another process has locked this part.
    """
    if not out.is_dir():
        return []
    if (out / name_of_part(LOCK, part)).exists():
        acquire_lock(out, part).release()  # a killed run leaves the file, but not the lock
    names = sorted(path.name for path in out.iterdir())
    others = [name for name in names if name != LOCK and part_of_name(name, LOCK) is None]
    return [name for name in others if not (name.startswith(journal.STEM) and name.endswith(PARTIAL))]


def free_bytes(out: Path) -> int:
    """Free space on the disk that ``out``, which need not exist yet, will be on."""
    folder = out.resolve()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_room(out: Path, needed: int) -> None:
    """Check that the disk has room for ``needed`` more bytes.

    Raises:
        RoomError: it has less.
    """
    free = free_bytes(out)
    if free < needed + SLACK:
        raise RoomError(
            f"--out {out}: the model needs {needed / 1e9:.2f} GB, and {SLACK / 1e6:.0f} MB for other files, but the disk has "
            f"{free / 1e9:.2f} GB free; free some space, or write to another disk"
        )


@contextmanager
def locked(out: Path, part: Part | None = None) -> Iterator[None]:
    """Inside, no other run can write to the folder, which is created if need be; of a run in parts, no other process can
    write this part.

    Raises:
        RecipeError: another run is writing to it, or its path leads through a file.
        RoomError, DiskError: an error of the operating system, also one that is raised inside.
    """
    with disk_errors(out):
        try:
            out.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as cause:
            raise RecipeError(f"--out {out}: cannot be created: {cause.strerror}") from cause
        lock = acquire_lock(out, part)
        try:
            yield
        except BaseException:
            # That error is to be reported, whatever becomes of the lock's file.
            lock.release()
            remove(out / name_of_part(LOCK, part))
            raise
        lock.release()
        (out / name_of_part(LOCK, part)).unlink(missing_ok=True)


def remove_lock(out: Path) -> None:
    """Remove the lock that a killed run has left.

    Raises:
        RecipeError: another run has locked the folder.
    """
    if (out / LOCK).exists():
        with disk_errors(out):
            acquire_lock(out).release()
            (out / LOCK).unlink(missing_ok=True)


def acquire_lock(out: Path, part: Part | None = None) -> FileLock:
    """Lock the folder, or a part of the model in it, for this run.

    Raises:
        RecipeError: another run has locked it.
        RoomError, DiskError: it cannot be written to.
    """
    lock = FileLock(out / name_of_part(LOCK, part))
    try:
        lock.acquire(blocking=False)
    except Timeout as cause:
        if part:
            raise RecipeError(f"{out}: another qmerge is writing part {part}; wait for it") from cause
        raise RecipeError(
            f"--out {out}: another qmerge is writing to it; wait for it, or use another folder"
        ) from cause
    except OSError as cause:
        raise disk_error(cause, out) from cause
    return lock


def discard(out: Path, made_by_us: bool) -> None:
    """After an error that no resume can repair: delete the run's files, and the folder if the run created it."""
    # All other files are written after the last step.
    for path in [*out.glob(f"*{PARTIAL}"), *out.glob("*.safetensors"), *out.glob("*.gguf"), out / journal.NAME]:
        remove(path)
    if made_by_us and not any(path.name != LOCK for path in out.iterdir()):
        remove(out / LOCK)
        with suppress(OSError):
            out.rmdir()


def discard_part(out: Path, part: Part, files: Iterable[str], made_by_us: bool) -> None:
    """The same for one part of a run: the other parts' files stay.

    Args:
        files: names of the files with weights that this part writes.
    """
    for name in (*files, name_of_part(journal.NAME, part)):
        remove(out / name)
        remove(out / f"{name}{PARTIAL}")
    if made_by_us:
        remove(out / name_of_part(LOCK, part))
        with suppress(OSError):  # another part may have begun in it
            out.rmdir()


def write_index(out: Path, layouts: Mapping[str, FileLayout], texts: Mapping[str, str]) -> None:
    """Write ``model.safetensors.index.json``, if there is more than one file.

    Args:
        layouts: file name → what is in it.
        texts: name → content of the tensors whose size was known only at the end.
    """
    if len(layouts) == 1:
        return
    weight_map: dict[str, str] = {}
    total_size = 0
    for file, layout in layouts.items():
        for name, tensor in layout.tensors.items():
            weight_map[name] = file
            total_size += tensor.spec.nbytes
        for name in layout.texts:
            weight_map[name] = file
            total_size += len(texts[name].encode())
    # total_size counts the tensors alone, without headers, as in the stock library.
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(out / INDEX, index)


def side_files(base: Path, adapter: Path) -> dict[str, Path]:
    """The files that complete a model, apart from weights and config: path in the output folder → file to copy.

    Tokenizer and chat template are the adapter's where it has them, since training may have added tokens; all else is the
    base's. Files are copied, never run or rendered.
    """
    chosen: dict[str, Path] = {}
    for path in _matching_files(base, SIDE_FILES):
        chosen[path.relative_to(base).as_posix()] = path
    adapter_files: dict[str, Path] = {}
    for path in _matching_files(adapter, TOKENIZER):
        adapter_files[path.relative_to(adapter).as_posix()] = path
    if "chat_template.jinja" not in adapter_files and _has_template(adapter / "tokenizer_config.json"):
        # transformers would prefer the base's file to the adapter's own template.
        chosen.pop("chat_template.jinja", None)
    return chosen | adapter_files


def tokenizer_warning(tokenizer: Path | None, config: Mapping[str, Any]) -> str | None:
    """A warning if the tokenizer has ids that the embedding has no rows for.

    Args:
        tokenizer: a tokenizer.json; None, or a file that cannot be read, gives no warning.
        config: config.json of the output.
    """
    rows = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if tokenizer is None or not isinstance(rows, int) or rows < 1:
        return None
    try:
        content = read_json(tokenizer, CheckpointError)
        vocabulary = content["model"]["vocab"]
        # A dict token → id, or (Unigram) a list whose positions are the ids.
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
        ids += [token["id"] for token in content.get("added_tokens", [])]
        largest = max(ids)
    except (CheckpointError, ValueError, KeyError, TypeError):
        return None
    if not isinstance(largest, int) or largest < rows:
        return None
    return (
        f"the tokenizer has ids up to {largest}, but the embedding has {rows} rows: the model cannot read the tokens above. "
        f"They were added without training them into the adapter; use the base's tokenizer, or train the embedding too"
    )


def copy_side_files(out: Path, files: Mapping[str, Path]) -> None:
    """Copy files into the output folder, each whole or not at all; see ``side_files``."""
    for name, path in sorted(files.items()):
        (out / name).parent.mkdir(exist_ok=True)
        if path.name == "tokenizer_config.json":
            write_file(out / name, _without_local_paths_in_json(path.read_bytes()))
        else:
            copy_file(path, out / name)


def without_local_paths(value: Any) -> Any:
    """JSON in which ``_name_or_path``, the folder that transformers read it from, is not an absolute path."""
    if isinstance(value, list):
        return [without_local_paths(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    cleaned = {name: without_local_paths(inner) for name, inner in value.items()}
    for name in ("_name_or_path", "name_or_path"):
        if isinstance(cleaned.get(name), str):
            cleaned[name] = hub.published_name(cleaned[name])
    return cleaned


def _without_local_paths_in_json(content: bytes) -> bytes:
    """The same for the bytes of a file; those without such a path, or that are not JSON, stay as they are."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return content
    cleaned = without_local_paths(value)
    return content if cleaned == value else json_bytes(cleaned)


def write_json(path: Path, value: Any, sort_keys: bool = False) -> None:
    """Write a JSON file, whole or not at all, with an indentation of 2."""
    write_file(path, json_bytes(value, sort_keys))


def json_bytes(value: Any, sort_keys: bool = False) -> bytes:
    """The content of a JSON file, with an indentation of 2."""
    return (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=sort_keys) + "\n").encode()


def _matching_files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Files of a folder, sorted. A link that leads out of it is ignored, unless it leads into the Hub cache."""
    # Snapshots in the Hub cache consist of links to its blobs.
    allowed = (folder.resolve(), hub.cache_folder())
    files: set[Path] = set()
    for pattern in patterns:
        for path in folder.glob(pattern):
            if path.is_file() and any(path.resolve().is_relative_to(parent) for parent in allowed):
                files.add(path)
    return sorted(files)


def _has_template(tokenizer_config: Path) -> bool:
    try:
        return "chat_template" in read_json(tokenizer_config, AdapterError)
    except AdapterError:  # there is none, or whatever a stranger's file holds
        return False
