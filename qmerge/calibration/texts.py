"""Text → batches of token ids, to calibrate on and to measure fidelity on.

Chats become text by the tokenizer's chat template, in transformers' own sandboxed renderer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmerge import hub
from qmerge.calibration.documents import JSON_SUFFIXES, Document, Exchange, read_texts
from qmerge.checkpoint.documents import LARGEST_JSON
from qmerge.checkpoint.folder import TOKENIZER
from qmerge.errors import CheckpointError, RecipeError, TokenizerError
from qmerge.schema import BUILT_IN_SOURCES, TextKind

BATCH_TOKENS = 2048
"""Tokens that go through a layer at once."""

HELD_OUT_SHARE = 1 / 4
"""Share of a text's sequences that are held out, …"""

FEWEST_HELD_OUT = 2
"""… at least this many sequences, …"""

MOST_HELD_OUT_TOKENS = 2048
"""… and at most this many tokens. The whole model is judged on them."""

FEWEST_SEQUENCES = 4
"""Of a text with fewer sequences, nothing is held out: rounding needs them all."""

TEXT_SUFFIXES = (*JSON_SUFFIXES, ".txt")

LONGEST_QUOTE = 200
"""Characters of another library's message that an error line repeats."""

POSITIONS_AFTER_PADDING = (
    "camembert", "data2vec-text", "esm", "ibert", "longformer", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta",
    "xlm-roberta-xl", "xmod",
)  # fmt: skip
"""``model_type`` of models whose first position is the one after ``pad_token_id`` (``create_position_ids_from_input_ids``)."""

TEXT_KINDS: dict[str, TextKind] = {"generate": "generated", "general": "general", "random": "random"}
"""Source → kind of text. All others are the user's own."""

JUDGED_ON = {
    "general": "of qmerge's general text",
    "generate": "that the adapter model wrote",
    "random": "drawn at random",
}
"""Source → what its held-out tokens are, after "2,048 tokens"."""


@dataclass(frozen=True, kw_only=True)
class CalibrationTokens:
    """The tokens of one run.

    seen       token ids that rounding learns from, int64 [sequences, length] each
    held_out   token ids that rounding never sees, in the same form: the whole model is judged on them; may be empty
    judged_on  what ``held_out`` is, in words: "2,048 tokens of train.jsonl"; "" where it is empty
    source     what the tokens are from: a file's name, ``generate``, ``general`` or ``random``
    """

    seen: list[Tensor]
    held_out: list[Tensor]
    judged_on: str
    source: str

    @property
    def text_kind(self) -> TextKind:
        """What ``held_out`` is, as the report has it."""
        return TEXT_KINDS.get(self.source, "held out")

    @property
    def is_of_task(self) -> bool:
        """Whether the text is the user's own."""
        return self.source not in TEXT_KINDS


def hold_out(ids: Tensor, source: str) -> CalibrationTokens:
    """Split sequences into those to round with and those to judge with.

    Args:
        ids: int64 [sequences, length].
        source: see ``CalibrationTokens``.
    """
    count, length = ids.shape
    if count < FEWEST_SEQUENCES:
        return CalibrationTokens(seen=split_batches(ids), held_out=[], judged_on="", source=source)
    held_out_count = max(FEWEST_HELD_OUT, min(round(count * HELD_OUT_SHARE), MOST_HELD_OUT_TOKENS // length))
    is_held_out = torch.zeros(count, dtype=torch.bool)
    for number in range(held_out_count):  # from the middle of equal parts
        is_held_out[(2 * number + 1) * count // (2 * held_out_count)] = True
    return CalibrationTokens(
        seen=split_batches(ids[~is_held_out]),
        held_out=split_batches(ids[is_held_out]),
        judged_on=f"{held_out_count * length:,} tokens {JUDGED_ON.get(source, f'of {source}')}",
        source=source,
    )


def add_batches(tokens: CalibrationTokens, ids: Tensor) -> CalibrationTokens:
    """The same with more sequences, int64 [sequences, length], for rounding to learn from."""
    added = split_batches(ids) if len(ids) else []
    return replace(tokens, seen=[*tokens.seen, *added])


def find_text(source: str) -> Path:
    """The local file of a text.

    Args:
        source: a file, or a dataset on the Hub: ``owner/name``, or ``owner/name:path/in/it.jsonl``.

    Raises:
        RecipeError: there is no such file, or the dataset has no file that can be read.
    """
    check_source(source)
    path = Path(source).expanduser()
    if path.is_file():  # a local file wins over a dataset of the same name
        return path
    name, _, file_in_dataset = source.partition(":")
    return _download_text(name, file_in_dataset)


def is_of_user(source: str | None) -> bool:
    """Whether a source of the recipe is a text of the user: a file or a dataset."""
    return source not in (None, "default", *BUILT_IN_SOURCES)


def check_source(source: str) -> None:
    """Refuse a text that is neither a file nor can be a dataset on the Hub.

    Raises:
        RecipeError: the file does not exist, or no dataset can have this name.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return
    # data/train.jsonl has the form of a dataset's id, too; no dataset is called so.
    if ":" not in source and not path.exists() and (path.suffix in TEXT_SUFFIXES or path.is_absolute()):
        raise RecipeError(f"calibration text {source}: no such file; give its path with --calibration FILE")
    if path.exists() or not hub.HUB_ID.fullmatch(source.partition(":")[0]):
        raise RecipeError(
            f"calibration text {source}: expected a .txt, .jsonl or .json file, or a dataset on the Hub: --calibration FILE"
        )


def _download_text(name: str, file: str) -> Path:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        if not file:
            file = _training_file(HfApi().list_repo_files(name, repo_type="dataset"))
        if not file:
            suffixes = ", ".join(TEXT_SUFFIXES)
            raise RecipeError(f"dataset {name} holds no {suffixes} file; save it as jsonl and use --calibration FILE")
        return Path(hf_hub_download(name, file, repo_type="dataset"))
    except (HfHubHTTPError, OSError, ValueError) as cause:
        raise RecipeError(f"dataset {name} on the Hub cannot be read: {_quoted(cause)}") from cause


def _training_file(files: Sequence[str]) -> str:
    """The first text file by name, of those with ``train`` in their name where there are any; "" where there is none."""
    text_files = [file for file in files if file.endswith(TEXT_SUFFIXES)]
    training_files = [file for file in text_files if "train" in file]
    return min(training_files or text_files, default="")


def token_batches(
    source: Path, tokenizer_folder: Path, *, tokens: int | None, length: int, vocab_size: int
) -> list[Tensor]:
    """The beginning of a text as sequences of token ids.

    Documents follow one another, with the tokenizer's end-of-text token between them. The rest that does not fill a
    sequence is dropped, unless the whole text is shorter than one.

    Args:
        tokens: how many tokens of the text; None for all.
        length: tokens per sequence.
        vocab_size: number of token ids that the model knows.

    Returns:
        int64 [sequences, length] each.

    Raises:
        RecipeError: the text cannot be read, or has fewer than two tokens.
        TokenizerError: the tokenizer cannot be loaded, or makes tokens that the model does not know.
    """
    ids = tokenize(read_texts(source), tokenizer_folder)[:tokens]
    if len(ids) < 2:
        raise RecipeError(f"{source}: {len(ids)} tokens; at least 2 are needed")
    check_vocabulary(ids, vocab_size, tokenizer_folder)
    length = min(length, len(ids))
    sequences = len(ids) // length
    return split_batches(torch.tensor(ids[: sequences * length]).view(sequences, length))


def check_vocabulary(ids: Sequence[int], vocab_size: int, tokenizer_folder: Path) -> None:
    """Refuse token ids that the model does not know.

    Raises:
        TokenizerError: an id is not below ``vocab_size``.
    """
    # The embedding has no row for such an id: torch would fail in the middle of the work.
    if max(ids, default=0) >= vocab_size:
        raise TokenizerError(
            f"{tokenizer_folder}: the tokenizer makes token {max(ids)}, but the model knows {vocab_size}: does it belong to "
            f"another model?"
        )


def split_batches(ids: Tensor, length: int | None = None) -> list[Tensor]:
    """Sequences [N, …] in batches of about ``BATCH_TOKENS`` tokens, counted with ``length`` tokens per sequence."""
    sequences_per_batch = max(1, BATCH_TOKENS // (length or ids.shape[1]))
    return list(torch.split(ids, sequences_per_batch))


def tokenize(documents: Sequence[Document], tokenizer_folder: Path) -> list[int]:
    """Token ids of all documents, with the end-of-text token between them.

    Raises:
        RecipeError: a chat, but the tokenizer has no chat template, or its template refuses it.
        TokenizerError: the tokenizer cannot be loaded.
    """
    return tokenize_with(load_tokenizer(tokenizer_folder), documents)


def tokenize_with(tokenizer: Any, documents: Sequence[Document]) -> list[int]:
    """The same, with a tokenizer that is loaded already.

    Raises:
        RecipeError: a chat, but the tokenizer has no chat template, or its template refuses it.
    """
    ids: list[int] = []
    for document in documents:
        if ids and tokenizer.eos_token_id is not None:  # between documents, not before the first one
            ids.append(tokenizer.eos_token_id)
        if isinstance(document, Exchange):
            document = document.messages if tokenizer.chat_template else document.text
        if isinstance(document, str):
            ids += tokenizer(document)["input_ids"]
        else:
            ids += _tokenize_chat(tokenizer, document)
    return ids


def _tokenize_chat(tokenizer: Any, messages: list[dict[str, Any]]) -> list[int]:
    if not tokenizer.chat_template:
        raise RecipeError(
            "the text holds chats, but the tokenizer has no chat template; use plain text, or rows of prompt and completion"
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as cause:  # a template may raise anything
        raise RecipeError(f"the chat template does not accept this chat: {_quoted(cause)}") from cause
    # The template writes the special tokens itself.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def load_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of a folder, from local files only; code in the folder is not run.

    Raises:
        TokenizerError: transformers cannot load one.
    """
    from transformers import AutoTokenizer

    for name in TOKENIZER:
        # The library would read all of it, and needs many times its size.
        if (folder / name).is_file() and (folder / name).stat().st_size > LARGEST_JSON:
            raise TokenizerError(f"{folder / name}: larger than {LARGEST_JSON >> 20} MiB, which no tokenizer needs")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as cause:  # transformers passes on whatever a tokenizer's file or class raises
        if not any((folder / name).is_file() for name in TOKENIZER):
            raise TokenizerError(
                f"no tokenizer in {folder}, so no text can be read: copy the tokenizer files of the model on the Hub into it"
            ) from cause
        raise TokenizerError(
            f"{folder}: no tokenizer that transformers can load, so no text can be read: {_quoted(cause)}"
        ) from cause
    # Of a folder without a tokenizer's files, transformers makes some classes (BERT's) with special tokens only.
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise TokenizerError(f"{folder}: its tokenizer has no vocabulary, so no text can be read")
    tokenizer.model_max_length = 2**40  # texts are cut into sequences later: no warning about their length
    return tokenizer


def random_tokens(vocab_size: int, *, tokens: int, length: int, seed: int) -> list[Tensor]:
    """Token ids, int64 [sequences, length] each, uniform over the vocabulary; at least one sequence."""
    generator = torch.Generator().manual_seed(seed)
    sequences = max(1, tokens // length)
    return split_batches(torch.randint(0, vocab_size, (sequences, length), generator=generator))


def vocab_size(config: Mapping[str, Any]) -> int:
    """Number of token ids that the model of a config.json knows.

    Raises:
        CheckpointError: the config does not say.
    """
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if not size:
        raise CheckpointError(
            "config.json has no vocab_size, so random tokens cannot be drawn; calibrate on a text: --calibration FILE"
        )
    return int(size)


def max_sequence_length(config: Mapping[str, Any]) -> int:
    """Most tokens of a sequence that the model of a config.json takes; 2**20 where the config has no limit."""
    text_config = {**config, **(config.get("text_config") or {})}
    positions = int(text_config.get("max_position_embeddings") or text_config.get("n_positions") or 2**20)
    if text_config.get("model_type") in POSITIONS_AFTER_PADDING:
        positions -= (text_config.get("pad_token_id") or 0) + 1
    return positions


def batches_sha256(batches: Sequence[Tensor]) -> str:
    """SHA-256 of shapes and token ids, hexadecimal."""
    sha256 = hashlib.sha256()
    for batch in batches:
        # With the shape: the same ids, cut into other sequences, calibrate differently.
        sha256.update(f"{tuple(batch.shape)}".encode() + batch.contiguous().numpy().tobytes())
    return sha256.hexdigest()


def _quoted(error: BaseException) -> str:
    """Another library's message on one line, shortened."""
    return " ".join(str(error).split())[:LONGEST_QUOTE]
