"""The table of programs that serve models. It imports no library, so that the command line can check their names quickly."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from qmerge.formats import MIXES

MODEL = "MODEL"
"""In a command: the Hub id or the folder of the model."""

FILE = "FILE"
"""In a command: the name of the model's one file, where it has one (GGUF)."""

BITSANDBYTES_IN_VLLM = (
    "vLLM discusses dropping bitsandbytes (vllm-project/vllm#39583); `w4a16`, `gptq` and `fp8` are safer for it"
)


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program that serves models."""

    name: str
    """What users type: ``--for vllm``."""

    title: str
    """What its makers call it."""

    targets: tuple[str, ...]
    """Names of targets that it loads, the first choice first: those of 4 bits, then larger ones."""

    from_folder: str
    """Shell commands or Python code that load a folder of this machine. ``MODEL`` and ``FILE`` are filled in by ``command``."""

    from_hub: str
    """The same for a model on the Hub."""

    language: str = "sh"
    """``sh`` or ``python``: of both texts, for the fence in Markdown."""

    needs: str = ""
    """Packages or hardware that it needs, as the end of the sentence "It needs …"."""

    remarks: Mapping[str, str] = field(default_factory=dict)
    """Target → what its user should know, as a sentence without a full stop."""

    def command(self, model: str, *, file: str | None = None, on_hub: bool) -> str:
        """How to start the program.

        Args:
            model: a Hub id or a folder.
            file: name of the model's GGUF file.
            on_hub: whether ``model`` is an id.
        """
        text = self.from_hub if on_hub else self.from_folder
        # Both words at once: a folder may be called FILE.
        values = {MODEL: model, FILE: file or ""}
        return re.sub(rf"\b({MODEL}|{FILE})\b", lambda match: values[match[0]], text)


DENSE = ("bf16", "fp16", "fp32")
BITSANDBYTES = ("nf4", "fp4", "int8")
GGUF = ("q4_k_m", *(name for name in MIXES if name != "q4_k_m"), "gguf")

MLX = ("mlx", "mlx_mxfp4", "mlx_nvfp4")

TRANSFORMERS = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("MODEL", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("MODEL")
inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))"""

GPTQMODEL = """\
from gptqmodel import GPTQModel

model = GPTQModel.load("MODEL")
print(model.tokenizer.decode(model.generate("Once upon a time")[0]))"""


PROGRAMS: dict[str, Program] = {
    program.name: program
    for program in (
        Program(
            name="vllm",
            title="vLLM",
            targets=(
                "w4a16", "gptq", "awq", "nvfp4", "mxfp4a16", "mxfp4", "fp8", "w8a8", "w8a16", *DENSE, *BITSANDBYTES,
            ),
            from_folder="vllm serve MODEL",
            from_hub="vllm serve MODEL",
            needs="a GPU",
            remarks={
                **dict.fromkeys(BITSANDBYTES, BITSANDBYTES_IN_VLLM),
                "fp8": "FP8 is computed as such from Ada and Hopper on (compute capability 8.9)",
                "nvfp4": "NVFP4 is computed as such on Blackwell",
            },
        ),
        Program(
            name="sglang",
            title="SGLang",
            targets=("w4a16", "gptq", "awq", "nvfp4", "mxfp4", "fp8", "w8a8", "w8a16", *DENSE),
            from_folder="python -m sglang.launch_server --model-path MODEL",
            from_hub="python -m sglang.launch_server --model-path MODEL",
            needs="a GPU",
        ),
        Program(
            name="ollama",
            title="Ollama",
            targets=GGUF,
            from_folder="cd MODEL\nollama create my-model -f Modelfile\nollama run my-model",
            from_hub="ollama run hf.co/MODEL",
        ),
        Program(
            name="llama.cpp",
            title="llama.cpp",
            targets=GGUF,
            from_folder="llama-server -m MODEL/FILE",
            from_hub="llama-server --hf-repo MODEL --hf-file FILE",
        ),
        Program(
            name="lmstudio",
            title="LM Studio",
            targets=(*GGUF, *MLX),
            from_folder="lms import MODEL/FILE",
            from_hub="lms get https://huggingface.co/MODEL",
        ),
        Program(
            name="mlx",
            title="mlx_lm",
            targets=(*MLX, *DENSE),
            from_folder="mlx_lm.server --model MODEL",
            from_hub="mlx_lm.server --model MODEL",
            needs="a Mac with Apple silicon, or Linux",
        ),
        Program(
            name="transformers",
            title="transformers",
            targets=(
                "nf4", "w4a16", "gptq", "awq", "fp4", "mxfp4", "mxfp4a16", "nvfp4", "int8", "w8a16", "w8a8", "fp8", *DENSE,
            ),
            from_folder=TRANSFORMERS,
            from_hub=TRANSFORMERS,
            language="python",
            remarks={
                **dict.fromkeys(("nvfp4", "mxfp4a16"), "transformers dequantizes this format as it loads it"),
                **dict.fromkeys(("fp8", "mxfp4"), "Without a GPU, transformers dequantizes this format as it loads it"),
            },
        ),
        Program(
            name="gptqmodel",
            title="GPTQModel",
            targets=("gptq", "awq"),
            from_folder=GPTQMODEL,
            from_hub=GPTQMODEL,
            language="python",
        ),
    )
}  # fmt: skip
"""Every program, by name, in the order in which they are shown."""

PACKAGES = {
    **dict.fromkeys(BITSANDBYTES, "bitsandbytes"),
    "gptq": "gptqmodel and optimum",
    "awq": "gptqmodel",
    **dict.fromkeys(("w4a16", "w8a16", "w8a8", "nvfp4", "mxfp4a16"), "compressed-tensors"),
}
"""Target → the packages that transformers needs in addition to load it."""


def programs_for(target: str) -> list[Program]:
    """The programs that load a target, the best choice first: in the order of ``PROGRAMS``, but transformers leads for the
    formats of bitsandbytes, which vLLM may drop."""
    found = [program for program in PROGRAMS.values() if target in program.targets]
    if target in BITSANDBYTES:
        # A stable sort: the others keep their order.
        found.sort(key=lambda program: program.name != "transformers")
    return found
