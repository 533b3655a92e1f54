"""The small models of the walk over adapters: together they have every kind of layer that peft adapts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from .. import models

VOCABULARY = 96


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model, and which of its modules an adapter may be put on.

    build       makes the model, with random values in every parameter
    inputs      arguments of its forward pass
    targets     kind of layer → ``target_modules``; the first one is the usual
    saved       a module that can be trained whole (``modules_to_save``)
    embedding   its input embedding; empty where it has none
    layered     whether its modules are in numbered layers, by this name
    task_type   of the adapter's config
    parameters  parameters that peft can wrap one by one (``target_parameters``)
    varied      whether every option of every type is tried on it
    """

    build: Callable[[], nn.Module]
    inputs: Mapping[str, Tensor]
    targets: Mapping[str, list[str]]
    saved: str
    embedding: str = ""
    layered: str = ""
    task_type: str | None = None
    parameters: list[str] = field(default_factory=list)
    varied: bool = False

    def fresh(self) -> nn.Module:
        """The model, the same every time, without a value that is zero or one by default."""
        torch.manual_seed(0)
        model = self.build().float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # biases and norms
                    parameter.add_(torch.randn(parameter.shape) * 0.1)
        return model

    def save(self, folder: Path) -> Path:
        """The model as a checkpoint."""
        model = self.fresh()
        if isinstance(model, PreTrainedModel):
            model.save_pretrained(folder)
            return folder
        folder.mkdir(parents=True)
        save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"model_type": "of_the_walk"}))
        return folder

    def load(self, folder: Path) -> nn.Module:
        """The model of a checkpoint, in float32, as its library loads it.

        Raises:
            RuntimeError: the checkpoint lacks a tensor, or has another one.
        """
        model = self.fresh()
        if not isinstance(model, PreTrainedModel):
            model.load_state_dict(load_file(folder / "model.safetensors"))
            return model
        loaded, info = type(model).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        if any(info.values()):
            raise RuntimeError(f"transformers does not load {folder} completely: {info}")
        return loaded.eval()

    def outputs(self, model: nn.Module) -> Tensor:
        """What the model puts out for the inputs, float32."""
        result = model(**self.inputs)
        if isinstance(result, Tensor):
            return result.float()
        output: Tensor = result.logits
        return output.float()


class Layers(nn.Module):
    """Two linear layers, with and without bias, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(32, 64, bias=False)
        self.norm = nn.LayerNorm(64)
        self.lin1 = nn.Linear(64, 32)
        self.head = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(torch.tanh(self.lin1(torch.tanh(self.norm(self.lin0(x))))))
        return output


class Convolutions(nn.Module):
    """Convolutions of one, two and three dimensions, in groups, with kernels of 1 and kernels that are not square."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1d = nn.Conv1d(8, 16, 3, padding=1)
        self.point1d = nn.Conv1d(16, 16, 1, bias=False)
        self.grouped1d = nn.Conv1d(16, 32, 3, padding=1, groups=4)
        self.conv2d = nn.Conv2d(32, 16, 3, padding=1, bias=False)
        self.point2d = nn.Conv2d(16, 32, 1)
        self.strided2d = nn.Conv2d(32, 16, 3, stride=2, padding=1)
        self.wide2d = nn.Conv2d(16, 16, (1, 3), padding=(0, 1))
        self.grouped2d = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.conv3d = nn.Conv3d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.grouped1d(torch.tanh(self.point1d(torch.tanh(self.conv1d(x))))))
        x = torch.tanh(self.conv2d(x.unflatten(2, (4, 4))))
        x = torch.tanh(self.strided2d(torch.tanh(self.point2d(x))))
        x = torch.tanh(self.grouped2d(torch.tanh(self.wide2d(x))))
        x = torch.tanh(self.conv3d(x.unsqueeze(2)))
        output: Tensor = self.head(x.flatten(2).mean(dim=2))
        return output


class EmbeddedConv1D(nn.Module):
    """An embedding whose name says nothing, and transformers' Conv1D outside GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCABULARY, 16)
        self.conv1d = Conv1D(32, 16)
        self.lin0 = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.lin0(torch.tanh(self.conv1d(self.emb(x))))
        return output


class Attention(nn.Module):
    """torch's own attention, whose three projections are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(32, 4, batch_first=True)
        self.lin0 = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.lin0(self.mha(x, x, x, need_weights=False)[0])
        return output


def bert() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=160,
            max_position_embeddings=64, num_labels=16,
        )
    )  # fmt: skip


def t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=160, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
    )


def bloom() -> nn.Module:
    return BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4))


def mixtral() -> nn.Module:
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
        )
    )  # fmt: skip


def resnet() -> nn.Module:
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=16)
    )


def tokens(**more: Tensor) -> dict[str, Tensor]:
    return {"input_ids": torch.arange(32).view(2, 16) % VOCABULARY, **more}


def noise(name: str, *shape: int) -> dict[str, Tensor]:
    return {name: torch.randn(shape, generator=torch.Generator().manual_seed(1))}


CAUSAL: dict[str, Any] = {"inputs": tokens(), "task_type": "CAUSAL_LM"}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        build=lambda: models.llama(torch.float32, attention_bias=True),
        targets={
            "linear": ["q_proj", "v_proj", "down_proj"],
            "embedding": ["embed_tokens"],
            "head": ["lm_head"],
            "norm": ["input_layernorm", "norm"],
        },
        varied=True,
        saved="lm_head",
        embedding="embed_tokens",
        layered="layers",
        **CAUSAL,
    ),
    "gpt2": Architecture(
        build=models.gpt2,
        targets={
            "Conv1D": ["c_attn", "mlp.c_proj"],
            "embedding": ["wte"],
            "positions": ["wpe"],
            "norm": ["ln_1", "ln_f"],
        },
        varied=True,
        saved="ln_f",
        embedding="wte",
        layered="h",
        **CAUSAL,
    ),
    "bloom": Architecture(
        build=bloom,
        targets={"linear": ["query_key_value"], "embedding": ["word_embeddings"], "norm": ["ln_f"]},
        saved="ln_f",
        embedding="word_embeddings",
        layered="h",
        **CAUSAL,
    ),
    "mixtral": Architecture(
        build=mixtral,
        targets={"linear": ["q_proj", "v_proj"]},
        saved="lm_head",
        embedding="embed_tokens",
        layered="layers",
        parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        **CAUSAL,
    ),
    "bert": Architecture(
        build=bert,
        inputs=tokens(),
        task_type="SEQ_CLS",
        targets={"linear": ["query", "value"], "embedding": ["word_embeddings"], "norm": ["LayerNorm"]},
        varied=True,
        saved="pooler",
        embedding="word_embeddings",
        layered="layer",
    ),
    "t5": Architecture(
        build=t5,
        inputs=tokens(decoder_input_ids=torch.arange(16).view(2, 8)),
        task_type="SEQ_2_SEQ_LM",
        targets={"linear": ["q", "v", "wo"], "norm": ["layer_norm"], "positions": ["relative_attention_bias"]},
        saved="final_layer_norm",
        embedding="shared",
        layered="block",
    ),
    "resnet": Architecture(
        build=resnet,
        inputs=noise("pixel_values", 2, 3, 32, 32),
        targets={"convolution": ["convolution"]},
        saved="classifier",
    ),
    "convolutions": Architecture(
        build=Convolutions,
        inputs=noise("x", 2, 8, 16),
        targets={
            name: [name]
            for name in ("conv2d", "conv1d", "point1d", "grouped1d", "point2d", "strided2d", "wide2d", "grouped2d", "conv3d")
        },
        varied=True,
        saved="head",
    ),
    "embedded Conv1D": Architecture(
        build=EmbeddedConv1D,
        inputs={"x": tokens()["input_ids"]},
        targets={"Conv1D": ["conv1d"], "embedding": ["emb"], "both": ["emb", "conv1d"], "linear": ["lin0"]},
        varied=True,
        saved="lin0",
        embedding="emb",
    ),
    "attention": Architecture(
        build=Attention,
        inputs=noise("x", 2, 8, 32),
        targets={"MultiheadAttention": ["mha"], "both": ["mha", "lin0"]},
        saved="lin0",
    ),
    "layers": Architecture(
        build=Layers,
        inputs=noise("x", 4, 32),
        targets={"linear": ["lin0", "lin1"], "norm": ["norm"]},
        saved="head",
    ),
}  # fmt: skip
