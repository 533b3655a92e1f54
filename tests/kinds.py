"""Small random models of every kind of task, as transformers builds them. Widths are multiples of 64: bitsandbytes 0.50 reads
narrower 4-bit matrices wrongly on a CPU."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
import transformers

ENCODER = {
    "vocab_size": 1032, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BOTH = {
    "vocab_size": 1032, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
EYES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
T5 = {
    "vocab_size": 1032,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
EARS = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "conv_dim": (64, 64),
    "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
DISTIL = {"vocab_size": 1032, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 128}

KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertModel", "BertConfig", ENCODER),
    "bert-classes": ("BertForSequenceClassification", "BertConfig", {**ENCODER, "num_labels": 3}),
    "bert-score": ("BertForSequenceClassification", "BertConfig", {**ENCODER, "num_labels": 1}),
    "bert-tokens": ("BertForTokenClassification", "BertConfig", {**ENCODER, "num_labels": 5}),
    "bert-answers": ("BertForQuestionAnswering", "BertConfig", ENCODER),
    "bert-masked": ("BertForMaskedLM", "BertConfig", ENCODER),
    "roberta-classes": ("RobertaForSequenceClassification", "RobertaConfig", {**ENCODER, "num_labels": 3}),
    "distilbert-classes": ("DistilBertForSequenceClassification", "DistilBertConfig", {**DISTIL, "num_labels": 3}),
    "mpnet": ("MPNetModel", "MPNetConfig", {**ENCODER, "pad_token_id": 1}),
    "modernbert": (
        "ModernBertModel", "ModernBertConfig", {**ENCODER, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "albert": ("AlbertModel", "AlbertConfig", {**ENCODER, "embedding_size": 64}),
    "llama-classes": ("LlamaForSequenceClassification", "LlamaConfig", {**ENCODER, "num_labels": 3}),
    "llama-embeddings": ("LlamaModel", "LlamaConfig", ENCODER),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "bart": ("BartForConditionalGeneration", "BartConfig", {**BOTH, "max_position_embeddings": 128}),
    "whisper": (
        "WhisperForConditionalGeneration", "WhisperConfig",
        {**BOTH, "num_mel_bins": 16, "max_source_positions": 50, "max_target_positions": 32},
    ),
    "wav2vec2": ("Wav2Vec2ForCTC", "Wav2Vec2Config", {**EARS, "vocab_size": 40, "num_feat_extract_layers": 2}),
    "vit": ("ViTForImageClassification", "ViTConfig", {**EYES, "num_labels": 3}),
    "resnet": (
        "ResNetForImageClassification", "ResNetConfig",
        {"embedding_size": 64, "hidden_sizes": [64, 64], "depths": [1, 1], "num_labels": 3},
    ),
    "clip": ("CLIPModel", "CLIPConfig", {"text_config": ENCODER, "vision_config": EYES, "projection_dim": 64}),
    "llava": (
        "LlavaForConditionalGeneration", "LlavaConfig",
        {
            "text_config": {**ENCODER, "model_type": "llama"},
            "vision_config": {**EYES, "model_type": "clip_vision_model"},
        },
    ),
}  # fmt: skip


def build(name: str, **changes: Any) -> Any:
    """A model whose weights keep the size of what goes through them, so that changes of a layer show in the output."""
    model_class, config_class, settings = KINDS[name]
    config = getattr(transformers, config_class)(**deepcopy(settings), **changes)
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape) / parameter[0].numel() ** 0.5)
        for key, buffer in model.named_buffers():
            if "running_" in key:  # ResNet's
                buffer.copy_(0.5 + torch.rand(buffer.shape))
    return model
