"""A ``Modelfile``, with which Ollama takes a GGUF file: ``ollama create NAME -f Modelfile``.

Ollama reads chat template and stop tokens from the file's own keys (https://docs.ollama.com/modelfile); stop tokens are
repeated here, because a chat model may end its turn with another token than the one that ends a text.
"""

from __future__ import annotations

from pathlib import Path

from qmerge.gguf.mapping import packages


def modelfile(path: Path) -> str:
    """The content of the Modelfile for a GGUF file in the same folder."""
    gguf, _ = packages()
    fields = gguf.GGUFReader(path).fields
    lines = [f"FROM ./{path.name}"]
    stops: list[str] = []
    for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"):
        if key in fields and "tokenizer.ggml.tokens" in fields:
            tokens, number = fields["tokenizer.ggml.tokens"], int(fields[key].contents())
            if 0 <= number < len(tokens.data):
                stops.append(str(tokens.contents(number)))
    # A token with a quotation mark or a line break could become a line of its own.
    lines += [f'PARAMETER stop "{stop}"' for stop in dict.fromkeys(stops) if stop.isprintable() and '"' not in stop]
    return "\n".join(lines) + "\n"
