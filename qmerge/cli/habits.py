"""Options that users type from habit, of other tools, and ours that do the same.

From peft's and transformers' arguments, mergekit, axolotl, LLaMA-Factory (``adapter_name_or_path``, ``export_dir``), ms-swift,
Unsloth (``save_method``), mlx_lm, auto-gptq (``desc_act``) and llama.cpp (``--outtype``).
"""

from __future__ import annotations

import difflib
from collections.abc import Collection

OURS = {
    "--base": "model model-name model-name-or-path model-path model-id base-model base-model-name-or-path pretrained hf-path",
    "--adapter": (
        "lora lora-path lora-model-dir lora-dir peft peft-model adapters adapter-path adapter-name-or-path adapter-model "
        "adapter-dir checkpoint qlora"
    ),
    "--out": "output output-dir output-path out-dir export-dir save-dir save-path save-directory save merged-dir o",
    "--target": (
        "quantize quantization quant quant-method quant-type quantization-method save-method format f outtype out-type dtype "
        "torch-dtype out-dtype export-format to"
    ),
    "--calibration": "dataset data calib calib-data calibration-data calibration-dataset",
    "--calibration-tokens": "num-calibration-samples num-samples nsamples",
    "--sequence-length": "max-seq-length max-seq-len seqlen max-length",
    "--combine": "merge-method method merge-type combination-type",
    "--trained-on nf4-dq (if training loaded the base in 4 bits) or --target nf4 (for a 4-bit model)": (
        "load-in-4bit use-4bit quantization-bit quant-bits"
    ),
    "--trained-on int8 (if training loaded the base in 8 bits) or --target int8 (for an 8-bit model)": "load-in-8bit",
    "--device": "device-map gpu cuda cpu export-device",
    "--workers": "num-workers threads num-threads jobs j nproc num-proc",
    "--max-shard-size": "shard-size out-shard-size export-size",
    "--max-memory": "memory max-cpu-memory low-cpu-memory",
    "--group-size": "groupsize q-group-size",
    "--bits": "wbits q-bits w-bit nbits",
    "--act-order": "desc-act",
    "--double-quant": "use-double-quant bnb-4bit-use-double-quant",
    "--verify": "eval eval-data heldout test-data eval-file",
    "--revision": "commit branch",
    "--json": "print-json",
    "--version": "V",
}
"""Option of ours → names of other tools, without dashes in front."""

ADVICE = {
    "trust-remote-code": "qmerge runs no code of a model: leave it out",
    "allow-crimes": "leave it out",
    "token": "the Hub's token comes from HF_TOKEN or from hf auth login: leave it out",
    "overwrite": "an output folder is never overwritten: delete it, or give another --out",
    "verbose": "progress and warnings are shown without it; --quiet shows less",
    "config": "a recipe is run with: qmerge run FILE",
    "safe-serialization": "all models are written as safetensors files: leave it out",
    "low-cpu-mem-usage": "weights are read one at a time anyway: leave it out",
    "template": "the chat template of the adapter, else of the base, is kept: leave it out",
    "max-size-gb": "did you mean --max-size 6GB, with --target auto?",
}
"""Name of an option that has no counterpart → what to do."""

SAME_ADVICE = {
    "hf-token": "token",
    "use-auth-token": "token",
    "force": "overwrite",
    "y": "overwrite",
    "yes": "overwrite",
    "overwrite-output-dir": "overwrite",
    "recipe": "config",
    "cfg": "config",
    "v": "verbose",
}

_OUR_OPTION = {name: ours for ours, names in OURS.items() for name in names.split()}


PLACES = ("--adapter", "--base", "--out")
"""Options for a folder, which other commands take without an option."""


def names_a_folder(option: str) -> bool:
    """Whether an option, of ours or of another tool, names a folder."""
    name = option.lstrip("-").partition("=")[0].replace("_", "-").lower()
    return _OUR_OPTION.get(name, f"--{name}") in PLACES


def hint(option: str, known: Collection[str]) -> str:
    """What to write in place of an unknown option, as the end of a sentence; empty where nobody knows.

    Args:
        option: as typed, with dashes or underscores.
        known: the options of the command.
    """
    name = option.lstrip("-").partition("=")[0].replace("_", "-")
    if f"--{name}" in known:  # --max_memory
        return f"did you mean --{name}?"
    lower = name.lower()
    # As typed first: some letters mean one thing in capitals and another in small ones (-V, -v).
    ours = _OUR_OPTION.get(name) or _OUR_OPTION.get(lower)
    if ours and ours.partition(" ")[0] in known:
        return f"did you mean {ours}?"
    advice = ADVICE.get(SAME_ADVICE.get(lower, lower))
    if advice:
        return advice
    close = difflib.get_close_matches(f"--{name}", sorted(known), n=1)
    return f"did you mean {close[0]}?" if close else ""
