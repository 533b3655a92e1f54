"""A ``Modelfile``, with which Ollama takes a GGUF file: ``ollama create NAME -f Modelfile``.

Ollama reads chat template and stop tokens from the file's own keys (https://docs.ollama.com/modelfile); stop tokens are
repeated here, because a chat model may end its turn with another token than the one that ends a text.
"""

from __future__ import annotations

from pathlib import Path

from qmerge.gguf.header import read_header

STOP_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")


def modelfile(path: Path) -> str:
    """The content of the Modelfile for a GGUF file in the same folder."""
    header = read_header(path)
    stops = dict.fromkeys(header.text("tokenizer.ggml.tokens", header.scalars.get(key, -1)) for key in STOP_KEYS)
    lines = [f"FROM ./{path.name}"]
    for stop in stops:
        # A token with a quotation mark or a line break could become a line of its own.
        if stop and stop.isprintable() and '"' not in stop:
            lines.append(f'PARAMETER stop "{stop}"')
    return "\n".join(lines) + "\n"
