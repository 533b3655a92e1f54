"""A short QLoRA training for the notebooks: long enough to merge something real, not a trainer for real work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qmerge.calibration.documents import read_texts
from qmerge.calibration.texts import find_text, tokenize_with
from qmerge.errors import RecipeError
from qmerge.recipe import MOST_TOKENS, TrainedOn

REPORTS = 5
"""Lines that a training prints."""


@dataclass(frozen=True)
class Training:
    """How long, how fast, and on how much text at once."""

    steps: int = 60
    rate: float = 2e-4
    rank: int = 16
    sequences: int = 4
    """Per step."""
    sequence_length: int = 256
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """What a merge needs to know about a training."""

    adapter: Path
    trained_on: TrainedOn | None
    """How the base was quantized in memory; None where it was stored in 4 bits."""


def train_qlora(
    base: str | Path,
    text: str | Path,
    out: Path,
    *,
    settings: Training | None = None,
    report: Callable[[str], None] = print,
) -> Trained:
    """Train a LoRA on every linear layer of a base in NF4, and save it as peft does.

    Args:
        base: folder or Hub id. A 16-bit model is quantized to NF4 in memory, with double quantization.
        text: a txt or jsonl file, as for calibration.
        out: folder for the adapter and its tokenizer.
        report: gets a line about the loss now and then.

    Raises:
        RecipeError: the text is shorter than one batch.
    """
    settings = settings or Training()
    torch.manual_seed(settings.seed)
    # Without its limit, the tokenizer would warn that the text is longer than the model's context.
    unlimited = AutoTokenizer.from_pretrained(base, model_max_length=MOST_TOKENS)
    rows = _rows(tokenize_with(unlimited, read_texts(find_text(str(text)))), settings, text)
    model, trained_on = _load(str(base))
    config = LoraConfig(
        r=settings.rank, lora_alpha=2 * settings.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config)
    _train(adapted, rows, settings, report)
    adapted.save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    return Trained(out, trained_on)


def _load(base: str) -> tuple[Any, TrainedOn | None]:
    """The base in NF4, and how it was quantized if it was not stored so."""
    on_gpu = torch.cuda.is_available()
    place = {"device_map": {"": 0} if on_gpu else "cpu", "dtype": torch.float16 if on_gpu else torch.float32}
    if getattr(AutoConfig.from_pretrained(base), "quantization_config", None):
        return _prepared(AutoModelForCausalLM.from_pretrained(base, **place)), None
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=place["dtype"],
    )
    return _prepared(AutoModelForCausalLM.from_pretrained(base, quantization_config=nf4, **place)), "nf4-dq"


def _prepared(model: Any) -> Any:
    """Norms in float32; on a GPU, layers are computed again in the backward pass to save memory."""
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=torch.cuda.is_available())


def _rows(ids: list[int], settings: Training, text: str | Path) -> Tensor:
    """int64 [N, sequence_length]."""
    count = len(ids) // settings.sequence_length
    if count < settings.sequences:
        needed = settings.sequences * settings.sequence_length
        raise RecipeError(f"{text}: {len(ids)} tokens; expected at least {needed} to train on: give more text")
    return torch.tensor(ids[: count * settings.sequence_length]).view(count, settings.sequence_length)


def _train(model: Any, rows: Tensor, settings: Training, report: Callable[[str], None]) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.rate, weight_decay=0.0)
    model.train()
    for step, batch in enumerate(_batches(rows, settings), start=1):
        # A warm-up in the first tenth, then down to nothing.
        optimizer.param_groups[0]["lr"] = settings.rate * min(
            10 * step / settings.steps, 1.0, 1.0 - (step - 1) / settings.steps
        )
        inputs = batch.to(model.device)
        loss = model(input_ids=inputs, labels=inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 or step % max(1, settings.steps // REPORTS) == 0:
            report(f"step {step} of {settings.steps}: loss {loss.item():.3f}")
    model.eval()


def _batches(rows: Tensor, settings: Training) -> Iterator[Tensor]:
    """One batch for each step: all rows in a random order, then all of them in another one. A batch may have rows of both."""
    order = torch.empty(0, dtype=torch.long)
    for _ in range(settings.steps):
        if len(order) < settings.sequences:
            order = torch.cat([order, torch.randperm(len(rows))])
        yield rows[order[: settings.sequences]]
        order = order[settings.sequences :]
