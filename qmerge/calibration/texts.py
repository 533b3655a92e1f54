"""Text → batches of token ids: for calibration and for judging.

Plain text, or one JSON object per line with a ``text``, or with chat ``messages``, which transformers' own sandboxed
renderer turns into text by the tokenizer's chat template.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmerge import hub
from qmerge.errors import CheckpointError, RecipeError

BATCH_TOKENS = 2048
"""Tokens that go through a layer at once."""

CHATS = ("messages", "conversations")
DATA = (".jsonl", ".json", ".txt")

Document = str | list[dict[str, Any]]
"""A text, or the messages of a chat (``role`` and ``content``)."""


def find_text(source: str) -> Path:
    """A file as it is, or the data file of a dataset on the Hub (``owner/name``, or ``owner/name:path/in/it.jsonl``).

    Raises:
        RecipeError: there is no such file, or the dataset has none that can be read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    name, _, inside = source.partition(":")
    if path.exists() or not hub.HUB_ID.fullmatch(name):
        raise RecipeError(f"calibration text {source}: expected a .txt or .jsonl file, or a dataset on the Hub")
    return _from_hub(name, inside)


def _from_hub(name: str, inside: str) -> Path:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        if not inside:
            files = [file for file in HfApi().list_repo_files(name, repo_type="dataset") if file.endswith(DATA)]
            inside = min((file for file in files if "train" in file), default=min(files, default=""))
        if not inside:
            raise RecipeError(f"dataset {name} holds no {', '.join(DATA)} file; save it as jsonl: --calibration FILE")
        return Path(hf_hub_download(name, inside, repo_type="dataset"))
    except (HfHubHTTPError, OSError, ValueError) as cause:
        raise RecipeError(f"dataset {name} on the Hub cannot be read: {' '.join(str(cause).split())[:200]}") from cause


def read_texts(path: Path) -> list[Document]:
    """The documents of a file.

    Raises:
        RecipeError: it cannot be read, is no text, or a line holds no text and no chat.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as cause:
        raise RecipeError(f"{path}: cannot be read: {cause.strerror}") from cause
    except UnicodeDecodeError as cause:
        raise RecipeError(f"{path}: no UTF-8 text (byte {cause.start}); expected plain text or JSON lines") from cause
    if path.suffix not in (".jsonl", ".json"):
        return [text]
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    return [_document(f"{path.name}, line {number}", line) for number, line in lines]


def _document(where: str, line: str) -> Document:
    try:
        record = json.loads(line)
    except ValueError as cause:
        raise RecipeError(f"{where}: no JSON object on one line: {cause}") from cause
    if isinstance(record, dict):
        if isinstance(record.get("text"), str):
            return str(record["text"])
        for name in CHATS:
            chat = record.get(name)
            if isinstance(chat, list) and chat and all(isinstance(message, dict) for message in chat):
                return [_message(where, message) for message in chat]
    found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
    raise RecipeError(f"{where}: expected a field `text` or `messages`, found {found[:80]}")


def _message(where: str, message: dict[str, Any]) -> dict[str, Any]:
    """A message as chat templates know it; ShareGPT's spelling (``from``, ``value``) is understood."""
    roles = {"human": "user", "gpt": "assistant"}
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if not isinstance(role, str) or content is None:
        raise RecipeError(f"{where}: a message needs `role` and `content`, found {', '.join(message)[:80]}")
    return {**message, "role": roles.get(role, role), "content": content}


def token_batches(
    source: Path, tokenizer_folder: Path, tokens: int | None, length: int, vocabulary: int
) -> list[Tensor]:
    """int64 [sequences, length] each: the first ``tokens`` tokens of a text (all for None), cut into sequences.

    Documents follow one another, with the tokenizer's end-of-text token between them. What is left over at the end is
    dropped, unless it is all there is.

    Raises:
        RecipeError, CheckpointError: no text, no tokenizer, or tokens that the model does not know.
    """
    ids = tokenize(read_texts(source), tokenizer_folder)[:tokens]
    if len(ids) < 2:
        raise RecipeError(f"{source}: {len(ids)} tokens; at least 2 are needed")
    if max(ids) >= vocabulary:
        raise CheckpointError(
            f"{tokenizer_folder}: the tokenizer makes token {max(ids)}, but the model knows {vocabulary}: is it another model's?"
        )
    length = min(length, len(ids))
    whole = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return split_batches(whole)


def split_batches(ids: Tensor, length: int | None = None) -> list[Tensor]:
    """[sequences, …] cut so that each batch holds about ``BATCH_TOKENS``, at ``length`` tokens per sequence."""
    return list(torch.split(ids, max(1, BATCH_TOKENS // (length or ids.shape[1]))))


def tokenize(documents: Sequence[Document], tokenizer_folder: Path) -> list[int]:
    tokenizer = load_tokenizer(tokenizer_folder)
    ids: list[int] = []
    for document in documents:
        if ids and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        if isinstance(document, str):
            ids += tokenizer(document)["input_ids"]
        else:
            ids += _chat(tokenizer, document)
    return ids


def _chat(tokenizer: Any, messages: list[dict[str, Any]]) -> list[int]:
    if not tokenizer.chat_template:
        raise RecipeError("the text holds chats, but the tokenizer has no chat template; give plain text instead")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as cause:  # whatever a template raises
        raise RecipeError(f"the chat template does not take this chat: {' '.join(str(cause).split())[:200]}") from cause
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        tokenizer.model_max_length = 2**40  # texts are cut into sequences here; no warning about their length
        return tokenizer
    except Exception as cause:  # transformers raises whatever it finds
        raise CheckpointError(
            f"{folder}: no tokenizer that transformers can load, so no text can be read: {' '.join(str(cause).split())[:200]}"
        ) from cause


def random_tokens(vocabulary: int, tokens: int, length: int, seed: int) -> list[Tensor]:
    """int64 [sequences, length] each, uniform over the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    count = max(1, tokens // length)
    ids = torch.randint(0, vocabulary, (count, length), generator=generator)
    return split_batches(ids)


def vocab_size(config: Mapping[str, Any]) -> int:
    """Number of token ids that the model knows."""
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if not size:
        raise CheckpointError(
            "config.json has no vocab_size, so there are no random tokens; give a text: --calibration FILE"
        )
    return int(size)


def max_sequence_length(config: Mapping[str, Any]) -> int:
    """Most tokens of a sequence (no limit where the config names none)."""
    text = {**config, **(config.get("text_config") or {})}
    return int(text.get("max_position_embeddings") or text.get("n_positions") or 2**20)


def batches_sha256(batches: Sequence[Tensor]) -> str:
    sha256 = hashlib.sha256()
    for batch in batches:
        sha256.update(f"{tuple(batch.shape)}".encode() + batch.contiguous().numpy().tobytes())
    return sha256.hexdigest()
