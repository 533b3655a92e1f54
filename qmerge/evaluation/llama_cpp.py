"""What llama.cpp itself computes from a GGUF file: log probabilities of the next token, through its server (``xllamacpp``).

The server runs in a process of its own, on a free port of this machine, because it cannot be stopped from Python.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from qmerge.errors import CheckpointError, RecipeError

TIMED_TOKENS = 64
"""Tokens that are written to measure speed; a prompt and they fit into the context."""

SECONDS_PER_PROMPT, SECONDS_TO_LOAD = 60, 600
"""A process that takes longer hangs."""

SERVER = """
import json, os, sys, urllib.request, xllamacpp
file, port = sys.argv[1], int(sys.argv[2])
prompts = json.load(sys.stdin)
params = xllamacpp.CommonParams()
params.model.path, params.port, params.n_parallel, params.warmup = file, port, 1, False
params.n_ctx = max(map(len, prompts)) + 256
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count()
server = xllamacpp.Server(params)
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # this machine, whatever http_proxy says
def post(path, **body):
    kind = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(), kind)
    return json.load(opener.open(request))
"""
"""Starts llama.cpp's server for a file, and reads prompts from stdin."""

PROGRAM = (
    SERVER
    + """
entries = int(sys.argv[3])
# The server shows no probabilities for a token without text (an end, a part of a character). So it is made to choose this one;
# the probabilities are those before the choice.
letter = post("/tokenize", content="a")["tokens"][-1]
for prompt in prompts:
    answer = post(
        "/completion", prompt=prompt, n_predict=1, n_probs=entries, temperature=0.0, post_sampling_probs=False,
        cache_prompt=True, logit_bias=[[letter, 1000]],
    )
    found = answer["completion_probabilities"][0]["top_logprobs"]
    print(json.dumps([[entry["id"], entry["logprob"]] for entry in found]), flush=True)
os._exit(0)
"""
)


SPEED_PROGRAM = (
    SERVER
    + """
answer = post("/completion", prompt=prompts[0], n_predict=int(sys.argv[3]), ignore_eos=True, temperature=0.0)
print(answer["timings"]["predicted_per_second"], flush=True)
os._exit(0)
"""
)


def has_llama_cpp() -> bool:
    """Whether xllamacpp is installed."""
    return find_spec("xllamacpp") is not None


def next_token_logprobs(file: Path, prompts: Sequence[Sequence[int]], vocab_size: int) -> Tensor:
    """float32 [N, V]: log probabilities of the token after each prompt.

    Args:
        prompts: token ids; a prompt that begins like the one before is computed from where they differ.

    Raises:
        RecipeError: xllamacpp is not installed.
        CheckpointError: llama.cpp does not load the file, or computes something else than numbers.
    """
    done = _run(PROGRAM, file, prompts, vocab_size)
    lines = [line for line in done.stdout.splitlines() if line.startswith("[[")]
    if len(lines) != len(prompts):
        raise _does_not_load(file, done)
    result = torch.full((len(prompts), vocab_size), -torch.inf)
    for row, line in zip(result, lines, strict=True):
        pairs = json.loads(line)
        row[[token for token, _ in pairs]] = torch.tensor([value for _, value in pairs])
    if bool(result.isinf().any() | result.isnan().any()):
        raise CheckpointError(f"llama.cpp loads {file.name}, but its probabilities hold NaN, or lack tokens")
    return result


def tokens_per_second(file: Path, prompt: Sequence[int], tokens: int = TIMED_TOKENS) -> float:
    """How fast llama.cpp writes, after the prompt, one token at a time.

    Raises:
        RecipeError: xllamacpp is not installed.
        CheckpointError: llama.cpp does not load the file.
    """
    done = _run(SPEED_PROGRAM, file, [prompt], tokens)
    words = done.stdout.split()
    if not words:
        raise _does_not_load(file, done)
    return float(words[-1])


def _run(program: str, file: Path, prompts: Sequence[Sequence[int]], number: int) -> subprocess.CompletedProcess[str]:
    """A program with the server, in a process of its own.

    Raises:
        RecipeError: xllamacpp is not installed.
        CheckpointError: llama.cpp does not load the file.
    """
    if not has_llama_cpp():
        raise RecipeError("--loader llama.cpp needs xllamacpp: pip install xllamacpp")
    command = [sys.executable, "-c", program, str(file), str(_free_port()), str(number)]
    try:
        done = subprocess.run(
            command,
            input=json.dumps([list(prompt) for prompt in prompts]),
            capture_output=True,
            text=True,
            timeout=SECONDS_TO_LOAD + SECONDS_PER_PROMPT * len(prompts),
        )
    except subprocess.TimeoutExpired as cause:
        raise CheckpointError(f"llama.cpp took longer than {cause.timeout:.0f} seconds for {file.name}") from cause
    if done.returncode:
        raise _does_not_load(file, done)
    return done


def _does_not_load(file: Path, done: subprocess.CompletedProcess[str]) -> CheckpointError:
    """The error of a program that has failed, with its last error message."""
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    reason = errors[-1] if errors else f"exit status {done.returncode}"
    return CheckpointError(f"llama.cpp does not load {file.name}: {reason}")


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
