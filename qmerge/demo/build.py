"""Make the demo model: a small trained Llama, its NF4 checkpoint, and a QLoRA adapter trained on that checkpoint.

    python -m qmerge.demo.build OUT_DIR

Stages, in the order of `main`:

1. **Text.** Two small grammars (`texts.py`) write all text, so nothing is downloaded and no text is somebody else's work.
   `EVERYDAY` writes short stories, sums, letters, diaries, lists and news of the harbour: the base learns these.
   `SHIP_LOG` writes log books of sailing ships, with other words, another form, and figures that depend on each other
   (force of the wind and state of the sea, speed and day's run, date, rising or falling glass): the adapter learns these.
2. **Tokenizer.** A byte-level BPE, trained on both kinds of text: real tokenizers have seen more than the base needs.
3. **Base.** A Llama with grouped-query attention, trained in float32 on `EVERYDAY`, quantized by transformers and
   bitsandbytes, saved by `save_pretrained`: `base-nf4/` is a stock NF4 checkpoint.
4. **Adapter.** peft's LoRA on all seven projections, trained on the NF4 base with `SHIP_LOG`: a short QLoRA run.
   rms(delta) is 1.5 % of rms(weight). This is large: short QLoRA runs on real models change 0.02 % to 1 %
   (docs/benchmarks.md). It is still far below half a step of NF4, so a merge that rounds to nearest loses it, and smaller
   deltas as well. The demo shows this.
5. **Numbers.** The loss on held-out log books of the base, of the base with the adapter, and of peft's own merge.

Everything is seeded. Text and tokenizer are the same everywhere. Weights are the same on the same kind of processor with
the same versions of the libraries; elsewhere sums differ in the last bits, and training drifts apart.
It needs torch, tokenizers, transformers, peft, accelerate and bitsandbytes, no GPU, and six minutes on two cores.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from qmerge.demo.texts import everyday, ship_log, text_of

BASE_NAME = "qmerge-demo-base"
VOCABULARY = 768
CONTEXT = 128  # tokens per training example
BATCH = 32
THREADS = 2  # fixed, because the order of float sums depends on it

BASE_CHARACTERS = 6_000_000
BASE_STEPS = 500
BASE_RATE = 3e-3
LORA_RANK = 8
LORA_ALPHA = 16  # a scale of 2, as in most recipes for QLoRA
ADAPTER_STEPS = 60  # few, so that the delta stays far below half a step of NF4
ADAPTER_RATE = 1e-4
TEXT_CHARACTERS = 90_000  # of calibration.txt, which is the adapter's training text, and of heldout.txt


def make_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCABULARY` tokens; every digit is a token, as in Llama's."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # any text can be encoded
        show_progress=False,
    )
    bpe.train_from_iterator(text.split("\n\n"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", model_max_length=512)


def tokens_of(tokenizer: Any, text: str) -> torch.Tensor:
    """int64 [N, CONTEXT]: the tokens of a text in rows; the last, incomplete row is left out."""
    # Not verbose: transformers would warn that the text is longer than the model's context.
    ids = tokenizer(text, verbose=False)["input_ids"]
    rows = len(ids) // CONTEXT
    return torch.tensor(ids[: rows * CONTEXT]).view(rows, CONTEXT)


def batches(rows: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
    """`steps` batches of `BATCH` rows; the rows get a new random order whenever all have been used."""
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(rows))])
        yield rows[order[:BATCH]]
        order = order[BATCH:]


def train(model: Any, rows: torch.Tensor, steps: int, rate: float, decay: float) -> None:
    """Train with AdamW: a short warm-up, a cosine down to a tenth of `rate`, clipped gradients."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=decay)
    model.train()
    started = time.monotonic()
    for step, batch in enumerate(batches(rows, steps)):
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / (0.05 * steps)) * cosine
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, steps // 10) == 0 or step == steps - 1:
            print(f"  step {step:4d}  loss {loss.item():.3f}  {time.monotonic() - started:4.0f} s", flush=True)
    model.eval()


def make_base(tokenizer: PreTrainedTokenizerFast, text: str, out: Path) -> None:
    """Train the Llama in float32, quantize it to NF4 and save it with transformers."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,  # grouped-query attention, as in current models
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    train(model, tokens_of(tokenizer, text), BASE_STEPS, BASE_RATE, decay=0.1)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=False,
    )
    # bitsandbytes quantizes a checkpoint while it is loaded, so a dense one is needed for a moment.
    with tempfile.TemporaryDirectory() as dense:
        model.save_pretrained(dense)
        quantized = AutoModelForCausalLM.from_pretrained(dense, quantization_config=nf4, device_map="cpu")
    quantized.save_pretrained(out)
    tokenizer.save_pretrained(out)


def load_base(folder: Path) -> Any:
    """The NF4 checkpoint, loaded by transformers."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu").eval()


def load_adapted(base: Path, adapter: Path) -> Any:
    """The NF4 checkpoint with the adapter, unmerged, loaded by peft."""
    return PeftModel.from_pretrained(load_base(base), adapter).eval()


def make_adapter(base: Path, rows: torch.Tensor, out: Path) -> None:
    """QLoRA: train LoRA factors on the frozen NF4 base, and save them with a name for the base that is not a path."""
    config = LoraConfig(
        r=LORA_RANK,
        lora_alpha=LORA_ALPHA,
        lora_dropout=0.05,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(load_base(base), config)
    train(model, rows, ADAPTER_STEPS, ADAPTER_RATE, decay=0.0)
    saved = model.peft_config["default"]
    saved.base_model_name_or_path = BASE_NAME  # peft puts the path on this machine
    saved.target_modules = sorted(saved.target_modules)  # peft has a set, in another order in every process
    model.save_pretrained(out)
    (out / "README.md").unlink()  # peft's empty model card; the README of the demo describes the adapter


# ---------------------------------------------------------------------------------------------------------------------
# Numbers.
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def log_probs(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """float32 [N, CONTEXT, VOCABULARY]: log probabilities of every next token."""
    parts = []
    for start in range(0, len(rows), BATCH):
        logits = model(input_ids=rows[start : start + BATCH]).logits.float()
        parts.append(torch.log_softmax(logits, -1))
    return torch.cat(parts)


def loss_of(logs: torch.Tensor, rows: torch.Tensor) -> float:
    """Mean negative log-likelihood per token, in nats."""
    return -logs[:, :-1].gather(-1, rows[:, 1:, None]).mean().item()


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """KL(p || q) per token, in nats."""
    return (p.exp() * (p - q)).sum(-1).mean().item()


def change_by_projection(model: Any) -> dict[str, float]:
    """rms(delta) / rms(weight) of every kind of projection over all layers, and of all of them together."""
    from bitsandbytes.functional import dequantize_4bit

    squares: dict[str, list[float]] = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            # The weight as training used it, which is the dequantized one.
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
            delta = module.get_delta_weight("default")
            for key in (name.rsplit(".", 1)[1], "all"):
                sums = squares.setdefault(key, [0.0, 0.0])
                sums[0] += delta.square().sum().item()
                sums[1] += weight.square().sum().item()
    return {key: math.sqrt(delta / weight) for key, (delta, weight) in squares.items()}


def judge(base: Path, adapter: Path, rows: torch.Tensor) -> None:
    """Print the adapter's gain on held-out text, and how much of it peft's merge, which rounds to nearest, keeps."""
    adapted = load_adapted(base, adapter)
    for key, ratio in change_by_projection(adapted).items():
        print(f"  rms(delta) / rms(weight)  {key:10s} {100 * ratio:.2f} %")
    base_logs = log_probs(load_base(base), rows)
    tuned_logs = log_probs(adapted, rows)
    # A model of its own: in evaluation, bitsandbytes 0.50 repacks NF4 weights on CPUs with AVX512-BF16, and peft 0.21 then
    # merges into the repacked bytes.
    merged_logs = log_probs(load_adapted(base, adapter).merge_and_unload(), rows)
    base_loss = loss_of(base_logs, rows)
    tuned_loss = loss_of(tuned_logs, rows)
    merged_loss = loss_of(merged_logs, rows)
    print(f"  loss: base {base_loss:.4f}, base + adapter {tuned_loss:.4f}, merged by peft {merged_loss:.4f}")
    gain_kept = (base_loss - merged_loss) / (base_loss - tuned_loss)
    base_divergence = divergence(tuned_logs, base_logs)
    kl_ratio = divergence(tuned_logs, merged_logs) / base_divergence
    print(f"  KL(base + adapter || base) {base_divergence:.5f}")
    print(f"  merged by peft: gain kept {gain_kept:.3f}, KL ratio {kl_ratio:.3f}")


def main(out: Path) -> None:
    """Make everything in the folder `out`."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)

    print("text")
    base_text = text_of(everyday, "base", BASE_CHARACTERS)
    calibration = text_of(ship_log, "calibration", TEXT_CHARACTERS)
    heldout = text_of(ship_log, "heldout", TEXT_CHARACTERS)
    (out / "calibration.txt").write_text(calibration, encoding="utf-8")
    (out / "heldout.txt").write_text(heldout, encoding="utf-8")

    print("base")
    # A part of the base's text is enough. The words of the log books must become tokens, too.
    tokenizer = make_tokenizer(base_text[: 3 * TEXT_CHARACTERS] + calibration)
    make_base(tokenizer, base_text, out / "base-nf4")

    print("adapter")
    tokenizer = AutoTokenizer.from_pretrained(out / "base-nf4")  # from here on, everything is read from the files
    make_adapter(out / "base-nf4", tokens_of(tokenizer, calibration), out / "adapter")

    print("numbers")
    judge(out / "base-nf4", out / "adapter", tokens_of(tokenizer, heldout))
    for path in out.rglob("*"):  # safetensors creates files that only their owner can read
        path.chmod(0o755 if path.is_dir() else 0o644)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m qmerge.demo.build OUT_DIR")
    main(Path(sys.argv[1]))
