"""Small random models and adapters, made by the stock libraries: what users' files look like, in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from qmerge.adapters.updates.lora import LoraUpdate

LLAMA = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(dtype: torch.dtype = torch.bfloat16, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random Llama whose weights are rounded to ``dtype``."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changes})).to(dtype).eval()


def gpt2(dtype: torch.dtype = torch.float32, seed: int = 0) -> GPT2LMHeadModel:
    """A random GPT-2: its linear layers are Conv1D, whose weights lie as [in, out]."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=64)).to(dtype).eval()


def save(model: PreTrainedModel, folder: Path, max_shard_size: str = "5GB") -> Path:
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def quantize(dense: Path, folder: Path, dtype: torch.dtype = torch.bfloat16, **config: Any) -> Path:
    """Quantize on load with bitsandbytes and save, as the stock library does."""
    settings = BitsAndBytesConfig(**config)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=settings, dtype=dtype, device_map="cpu")
    model.save_pretrained(folder)
    return folder


def adapter(
    model: PreTrainedModel, folder: Path, size: float = 0.02, seed: int = 1, dtype: torch.dtype = torch.float32, **config: Any
) -> Path:  # fmt: skip
    """A random LoRA adapter saved by peft; ``size`` is the standard deviation of lora_B."""
    torch.manual_seed(seed)
    settings = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEAR, **config})
    wrapped = get_peft_model(model, settings, autocast_adapter_dtype=False)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            scale = size if "lora_B" in name else 0.2
            parameter.data = (torch.randn(parameter.shape) * scale).to(dtype)
    wrapped.save_pretrained(folder)
    wrapped.unload()
    return folder


def train(wrapped: torch.nn.Module) -> None:
    """Every parameter that would have been trained is moved, as training moves it."""
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                size = 0.2 if "lora_A" in name or "embedding_B" in name else 0.05
                parameter.add_(torch.randn(parameter.shape) * size)


def logits(model: torch.nn.Module, vocabulary: int = 96) -> torch.Tensor:
    """float32 [2, 16, V] on fixed token ids."""
    ids = torch.arange(32).view(2, 16) % vocabulary
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def lora_update(shape: tuple[int, int], rank: int = 4, size: float = 0.02, seed: int = 2) -> LoraUpdate:
    """A random LoRA update whose delta has about ``size`` as root mean square."""
    generator = torch.Generator().manual_seed(seed)
    A_RI = torch.randn(rank, shape[1], generator=generator)
    B_OR = torch.randn(shape[0], rank, generator=generator)
    return LoraUpdate(A_RI, B_OR, size / rank**0.5)
