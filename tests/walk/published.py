"""Models that people fine-tune now: config.json as published, and the layers that Unsloth and Axolotl adapt.

Sizes are the real ones (``sizes.scaled`` makes them small); so are the kinds of layers, head sizes, tied embeddings and rope
settings, in the spelling of the published file. Fields without influence on weights are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The layers that Unsloth's and Axolotl's examples adapt."""

MLA = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STACKS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


@dataclass(frozen=True, kw_only=True)
class Published:
    """One model.

    Attributes:
        class_name: as in ``architectures`` of its config.json.
        config: the rest of its config.json.
        layers: ``target_modules`` of the adapter.
        experts: ``target_parameters`` of the adapter.
        small: fields that the rules of ``sizes`` do not make fit; "text_config.head_dim" is one of a sub-config.
        others: name → shape of tensors that are in the published files, and that transformers does not load: layers that
            predict further tokens (MTP), and projections of layers that use another layer's keys and values.
    """

    class_name: str
    config: dict[str, Any]
    layers: tuple[str, ...] = LINEAR
    experts: tuple[str, ...] = ()
    small: dict[str, Any] = field(default_factory=dict)
    others: dict[str, tuple[int, ...]] = field(default_factory=dict)


def mtp(prefix: str) -> dict[str, tuple[int, ...]]:
    """Some tensors of a layer that predicts the token after the next one."""
    names = ("eh_proj.weight", "self_attn.o_proj.weight", "mlp.shared_experts.down_proj.weight")
    return {f"{prefix}.{name}": (32, 64) for name in names} | {f"{prefix}.enorm.weight": (32,)}


SLIDING = ["sliding_attention"] * 5 + ["full_attention"]
HYBRID = ["linear_attention"] * 3 + ["full_attention"]
LLAMA3_ROPE = {
    "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
DEEPSEEK_ROPE = {
    "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096, "type": "yarn",
}  # fmt: skip
PIXTRAL = {
    "model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "head_dim": 64, "image_size": 1540, "patch_size": 14, "num_channels": 3,
    "rope_theta": 10000.0,
}  # fmt: skip
QWEN_VISION = {
    "depth": 27, "hidden_size": 1152, "hidden_act": "gelu_pytorch_tanh", "intermediate_size": 4304, "num_heads": 16,
    "in_channels": 3, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 4096,
    "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24],
}  # fmt: skip

MODELS: dict[str, Published] = {
    "Qwen3-4B": Published(
        class_name="Qwen3ForCausalLM",
        config={
            "model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_size": 2560,
            "intermediate_size": 9728, "max_position_embeddings": 40960, "max_window_layers": 36,
            "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rope_scaling": None,
            "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True, "vocab_size": 151936,
        },
        small={"head_dim": 16},
    ),
    "Qwen3-30B-A3B": Published(
        class_name="Qwen3MoeForCausalLM",
        config={
            "model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128,
            "hidden_size": 2048, "intermediate_size": 6144, "mlp_only_layers": [], "moe_intermediate_size": 768,
            "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
            "num_hidden_layers": 48, "num_key_value_heads": 4, "rope_theta": 1000000.0, "tie_word_embeddings": False,
            "vocab_size": 151936,
        },
        experts=STACKS,
    ),
    "Qwen3-VL-8B": Published(
        class_name="Qwen3VLForConditionalGeneration",
        config={
            "model_type": "qwen3_vl", "image_token_id": 151655, "video_token_id": 151656,
            "vision_start_token_id": 151652, "vision_end_token_id": 151653, "tie_word_embeddings": False,
            "text_config": {
                "model_type": "qwen3_vl_text", "attention_bias": False, "head_dim": 128, "hidden_size": 4096,
                "intermediate_size": 12288, "num_attention_heads": 32, "num_hidden_layers": 36,
                "num_key_value_heads": 8, "rope_theta": 5000000, "vocab_size": 151936,
                "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            },
            "vision_config": {"model_type": "qwen3_vl", **QWEN_VISION},
        },
        layers=(*LINEAR, "qkv", "attn.proj", "linear_fc1", "linear_fc2"),
        small={
            "text_config.rope_parameters.mrope_section": [2, 1, 1],
            "vision_config.deepstack_visual_indexes": [0],
            "vision_config.out_hidden_size": 32,
        },
    ),
    "Qwen3.5-9B": Published(
        class_name="Qwen3_5ForConditionalGeneration",
        config={
            "model_type": "qwen3_5", "image_token_id": 248056, "video_token_id": 248057,
            "vision_start_token_id": 248053, "vision_end_token_id": 248054, "tie_word_embeddings": False,
            "text_config": {
                "model_type": "qwen3_5_text", "attention_bias": False, "attn_output_gate": True,
                "full_attention_interval": 4, "head_dim": 256, "hidden_size": 4096, "intermediate_size": 12288,
                "layer_types": HYBRID * 8, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
                "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_value_head_dim": 128,
                "mtp_num_hidden_layers": 1, "num_attention_heads": 16, "num_hidden_layers": 32,
                "num_key_value_heads": 4, "vocab_size": 248320,
                "rope_parameters": {
                    "mrope_interleaved": True, "mrope_section": [11, 11, 10], "rope_type": "default",
                    "rope_theta": 10000000, "partial_rotary_factor": 0.25,
                },
            },
            "vision_config": {"model_type": "qwen3_5", **QWEN_VISION, "deepstack_visual_indexes": []},
        },
        layers=(*LINEAR, "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj", "qkv"),
        small={
            "text_config.head_dim": 16,
            "text_config.rope_parameters.mrope_section": [1, 1, 0],
            "vision_config.out_hidden_size": 32,
        },
        others={"mtp.fc.weight": (32, 64), "mtp.layers.0.self_attn.q_proj.weight": (128, 32), "mtp.norm.weight": (32,)},
    ),
    "Qwen3.5-35B-A3B": Published(
        class_name="Qwen3_5MoeForCausalLM",
        config={
            "model_type": "qwen3_5_moe_text", "attention_bias": False, "attn_output_gate": True, "head_dim": 256,
            "hidden_size": 2048, "layer_types": HYBRID * 10, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
            "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_value_head_dim": 128,
            "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "num_attention_heads": 16,
            "num_experts": 256, "num_experts_per_tok": 8, "num_hidden_layers": 40, "num_key_value_heads": 2,
            "vocab_size": 248320, "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25},
        },
        layers=(*LINEAR, "in_proj_qkv", "in_proj_z", "out_proj"),
        experts=STACKS,
    ),
    "gemma-3-4b": Published(
        class_name="Gemma3ForConditionalGeneration",
        config={
            "model_type": "gemma3", "boi_token_index": 255999, "eoi_token_index": 256000,
            "image_token_index": 262144, "mm_tokens_per_image": 256,
            "text_config": {
                "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024, "vocab_size": 262208,
            },
            "vision_config": {
                "model_type": "siglip_vision_model", "hidden_size": 1152, "image_size": 896,
                "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14,
                "vision_use_head": False,
            },
        },
        small={"mm_tokens_per_image": 4},
    ),
    "gemma-4-E4B": Published(
        class_name="Gemma4ForCausalLM",
        config={
            "model_type": "gemma4_text", "attention_k_eq_v": False, "enable_moe_block": False, "head_dim": 256,
            "global_head_dim": 512, "hidden_size": 2560, "hidden_size_per_layer_input": 256,
            "intermediate_size": 10240, "layer_types": SLIDING * 7, "num_attention_heads": 8, "num_hidden_layers": 42,
            "num_key_value_heads": 2, "num_kv_shared_layers": 18, "sliding_window": 512, "tie_word_embeddings": True,
            "use_double_wide_mlp": False, "vocab_size": 262144, "vocab_size_per_layer_input": 262144,
        },
        layers=(*LINEAR, "per_layer_input_gate", "per_layer_projection"),
        small={
            "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4,
            "num_kv_shared_layers": 2, "per_layer_config": {"1": {"head_dim": 16}, "3": {"head_dim": 16}},
        },
        others={
            "model.layers.2.self_attn.k_proj.weight": (16, 32), "model.layers.2.self_attn.v_proj.weight": (16, 32),
            "model.layers.3.self_attn.k_norm.weight": (16,),
        },
    ),
    "gemma-4-26B-A4B": Published(
        class_name="Gemma4ForConditionalGeneration",
        config={
            "model_type": "gemma4", "image_token_id": 258880, "tie_word_embeddings": True,
            "text_config": {
                "model_type": "gemma4_text", "attention_k_eq_v": True, "enable_moe_block": True, "head_dim": 256,
                "global_head_dim": 512, "num_global_key_value_heads": 2, "hidden_size": 2816,
                "hidden_size_per_layer_input": 0, "intermediate_size": 2112, "layer_types": SLIDING * 5,
                "moe_intermediate_size": 704, "num_attention_heads": 16, "num_experts": 128, "num_hidden_layers": 30,
                "num_key_value_heads": 8, "num_kv_shared_layers": 0, "sliding_window": 1024, "top_k_experts": 8,
                "tie_word_embeddings": True, "vocab_size": 262144,
            },
            "audio_config": None,
        },
        layers=(r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",),
        experts=("experts.gate_up_proj", "experts.down_proj"),
    ),
    "gpt-oss-20b": Published(
        class_name="GptOssForCausalLM",
        config={
            "model_type": "gpt_oss", "attention_bias": True, "head_dim": 64, "hidden_size": 2880,
            "intermediate_size": 2880, "layer_types": ["sliding_attention", "full_attention"] * 12,
            "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
            "num_local_experts": 32, "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0,
            "tie_word_embeddings": False, "vocab_size": 201088,
            "rope_scaling": {
                "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
                "rope_type": "yarn", "truncate": False,
            },
        },
        layers=("q_proj", "k_proj", "v_proj", "o_proj"),
        experts=STACKS,
    ),
    "Llama-3.2-1B": Published(
        class_name="LlamaForCausalLM",
        config={
            "model_type": "llama", "attention_bias": False, "head_dim": 64, "hidden_size": 2048,
            "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
            "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "rope_scaling": LLAMA3_ROPE,
            "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256,
        },
    ),
    "Llama-4-Scout": Published(
        class_name="Llama4ForConditionalGeneration",
        config={
            "model_type": "llama4", "boi_token_index": 200080, "eoi_token_index": 200081, "image_token_index": 200092,
            "text_config": {
                "model_type": "llama4_text", "attention_chunk_size": 8192, "head_dim": 128, "hidden_size": 5120,
                "interleave_moe_layer_step": 1, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
                "no_rope_layers": [], "num_attention_heads": 40, "num_experts_per_tok": 1, "num_hidden_layers": 48,
                "num_key_value_heads": 8, "num_local_experts": 16, "rope_scaling": {**LLAMA3_ROPE, "factor": 16.0},
                "rope_theta": 500000.0, "use_qk_norm": True, "vocab_size": 202048, "tie_word_embeddings": False,
            },
            "vision_config": {
                "model_type": "llama4_vision_model", "hidden_size": 1408, "image_size": 336, "intermediate_size": 5632,
                "num_attention_heads": 16, "num_hidden_layers": 34, "patch_size": 14, "pixel_shuffle_ratio": 0.5,
                "projector_input_dim": 4096, "projector_output_dim": 4096, "vision_output_dim": 4096,
            },
        },
        experts=("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
    ),
    "Ministral-3-8B-2512": Published(
        class_name="Mistral3ForConditionalGeneration",
        config={
            "model_type": "mistral3", "image_token_index": 10, "multimodal_projector_bias": False,
            "projector_hidden_act": "gelu", "spatial_merge_size": 2, "vision_feature_layer": -1,
            "text_config": {
                "model_type": "ministral3", "head_dim": 128, "hidden_size": 4096, "intermediate_size": 14336,
                "num_attention_heads": 32, "num_hidden_layers": 34, "num_key_value_heads": 8, "vocab_size": 131072,
                "tie_word_embeddings": False,
                "rope_parameters": {
                    "type": "yarn", "rope_type": "yarn", "rope_theta": 1000000.0, "factor": 16.0, "beta_fast": 32.0,
                    "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
                    "original_max_position_embeddings": 16384,
                },
            },
            "vision_config": PIXTRAL,
        },
    ),
    "Magistral-Small-2509": Published(
        class_name="Mistral3ForConditionalGeneration",
        config={
            "model_type": "mistral3", "image_token_index": 10, "multimodal_projector_bias": False,
            "projector_hidden_act": "gelu", "spatial_merge_size": 2, "vision_feature_layer": -1,
            "text_config": {
                "model_type": "mistral", "head_dim": 128, "hidden_size": 5120, "intermediate_size": 32768,
                "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8,
                "rope_theta": 1000000000.0, "sliding_window": None, "vocab_size": 131072,
                "tie_word_embeddings": False,
            },
            "vision_config": PIXTRAL,
        },
        layers=(*LINEAR, "linear_1", "linear_2"),
    ),
    "DeepSeek-V3": Published(
        class_name="DeepseekV3ForCausalLM",
        config={
            "model_type": "deepseek_v3", "attention_bias": False, "first_k_dense_replace": 3, "hidden_size": 7168,
            "intermediate_size": 18432, "kv_lora_rank": 512, "moe_intermediate_size": 2048, "n_group": 8,
            "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
            "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
            "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
            "rope_scaling": DEEPSEEK_ROPE, "rope_theta": 10000, "routed_scaling_factor": 2.5, "topk_group": 4,
            "v_head_dim": 128, "vocab_size": 129280, "tie_word_embeddings": False,
        },
        layers=MLA,
        experts=STACKS,
        small={"num_key_value_heads": 4},
        others=mtp("model.layers.61"),
    ),
    "DeepSeek-V4": Published(
        class_name="DeepseekV4ForCausalLM",
        config={"model_type": "deepseek_v4"},
        layers=("q_a_proj", "q_b_proj", "kv_proj", "o_b_proj", "gate_proj", "up_proj", "down_proj"),
        experts=STACKS,
    ),
    "GLM-4.5-Air": Published(
        class_name="Glm4MoeForCausalLM",
        config={
            "model_type": "glm4_moe", "attention_bias": True, "first_k_dense_replace": 1, "head_dim": 128,
            "hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_group": 1,
            "n_routed_experts": 128, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 96,
            "num_experts_per_tok": 8, "num_hidden_layers": 46, "num_key_value_heads": 8,
            "num_nextn_predict_layers": 1, "partial_rotary_factor": 0.5, "rope_theta": 1000000,
            "routed_scaling_factor": 1.0, "tie_word_embeddings": False, "topk_group": 1, "use_qk_norm": False,
            "vocab_size": 151552,
        },
        experts=STACKS,
        others=mtp("model.layers.46"),
    ),
    "GLM-4.7-Flash": Published(
        class_name="Glm4MoeLiteForCausalLM",
        config={"model_type": "glm4_moe_lite"},
        layers=MLA,
        experts=STACKS,
        others=mtp("model.layers.47"),
    ),
    "GLM-4.5V": Published(
        class_name="Glm4vMoeForConditionalGeneration",
        config={"model_type": "glm4v_moe"},
        experts=STACKS,
        small={"text_config.rope_parameters.mrope_section": [1, 1, 0], "vision_config.out_hidden_size": 32},
    ),
    "phi-4": Published(
        class_name="Phi3ForCausalLM",
        config={
            "model_type": "phi3", "hidden_size": 5120, "intermediate_size": 17920, "max_position_embeddings": 16384,
            "num_attention_heads": 40, "num_hidden_layers": 40, "num_key_value_heads": 10,
            "original_max_position_embeddings": 16384, "rope_theta": 250000, "sliding_window": None,
            "tie_word_embeddings": False, "vocab_size": 100352, "pad_token_id": 100349,
        },
        layers=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    ),
    "granite-4.0-h-tiny": Published(
        class_name="GraniteMoeHybridForCausalLM",
        config={
            "model_type": "granitemoehybrid", "attention_multiplier": 0.0078125, "embedding_multiplier": 12,
            "hidden_size": 1536, "intermediate_size": 512, "layer_types": (["mamba"] * 5 + ["attention"]) * 4,
            "logits_scaling": 6, "mamba_chunk_size": 256, "mamba_conv_bias": True, "mamba_d_conv": 4,
            "mamba_d_head": 64, "mamba_d_state": 128, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_n_heads": 48,
            "num_attention_heads": 12, "num_experts_per_tok": 6, "num_hidden_layers": 24, "num_key_value_heads": 4,
            "num_local_experts": 64, "position_embedding_type": "nope", "residual_multiplier": 0.22,
            "shared_intermediate_size": 1024, "tie_word_embeddings": True, "vocab_size": 100352,
        },
        layers=("q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "out_proj", "shared_mlp.input_linear",
                "shared_mlp.output_linear"),
        experts=("experts.gate_up_proj", "experts.down_proj"),
    ),
    "granite-4.0-micro": Published(
        class_name="GraniteMoeHybridForCausalLM",
        config={
            "model_type": "granitemoehybrid", "attention_multiplier": 0.015625, "hidden_size": 2560,
            "intermediate_size": 8192, "layer_types": ["attention"] * 40, "num_attention_heads": 40,
            "num_experts_per_tok": 0, "num_hidden_layers": 40, "num_key_value_heads": 8, "num_local_experts": 0,
            "position_embedding_type": "rope", "rope_theta": 10000000, "shared_intermediate_size": 8192,
            "tie_word_embeddings": True, "vocab_size": 100352,
        },
        layers=("q_proj", "k_proj", "v_proj", "o_proj", "shared_mlp.input_linear", "shared_mlp.output_linear"),
        small={"layer_types": ["attention"] * 2, "num_local_experts": 0},
    ),
    "Falcon-H1-1.5B": Published(
        class_name="FalconH1ForCausalLM",
        config={
            "model_type": "falcon_h1", "attention_in_multiplier": 1.0, "attention_out_multiplier": 0.9375,
            "embedding_multiplier": 5.656854249492381, "head_dim": 128, "hidden_size": 2048,
            "intermediate_size": 4096, "key_multiplier": 0.39, "lm_head_multiplier": 0.0195, "mamba_chunk_size": 256,
            "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_head": 64, "mamba_d_ssm": 3072,
            "mamba_d_state": 256, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_n_heads": 48,
            "mamba_norm_before_gate": False, "mamba_rms_norm": False, "mlp_multipliers": [0.88, 0.26],
            "num_attention_heads": 8, "num_hidden_layers": 24, "num_key_value_heads": 2, "rope_theta": 100000000000.0,
            "ssm_in_multiplier": 1.25, "ssm_multipliers": [0.35, 0.25, 0.18, 0.5, 0.3], "ssm_out_multiplier": 0.23,
            "tie_word_embeddings": False, "vocab_size": 65537,
        },
        layers=("q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "gate_proj", "up_proj", "down_proj"),
    ),
    "SmolLM3-3B": Published(
        class_name="SmolLM3ForCausalLM",
        config={
            "model_type": "smollm3", "attention_bias": False, "hidden_size": 2048, "intermediate_size": 11008,
            "max_position_embeddings": 65536, "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16,
            "num_hidden_layers": 36, "num_key_value_heads": 4, "rope_theta": 5000000.0, "tie_word_embeddings": True,
            "vocab_size": 128256,
        },
        small={"no_rope_layers": [1, 0]},
    ),
}  # fmt: skip
