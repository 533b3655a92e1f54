"""Configs that the rules of ``sizes`` get wrong: ``model_type`` → the reason, and the fields with their values."""

from __future__ import annotations

from typing import Any

MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2}
OF_MAMBA = "heads · d_head = expand · hidden_size"
TWO_HYBRIDS = {
    "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "attention_hidden_size": 64, "attention_head_dim": 16,
}  # fmt: skip
OF_ZAMBA = "the second hybrid layer shares the first one's weights; attention is twice as wide as the model"
NONE = "None by default"
MHA = "as many key and value heads as heads"
SECTIONS = "the class takes sections for a head of 128"
GLM_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}

EXCEPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "bamba": (f"{OF_MAMBA}; no attention layer by default", {**MAMBA, "attn_layer_indices": [1]}),
    "chameleon": (NONE, {"vocabulary_map": {"<image>": 5}}),
    "cohere_compass_text": (
        "empty by default",
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    ),
    "cosmos3_edge_text": (
        "sections make up half of head_dim",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e8, "mrope_section": [2, 1, 1]}},
    ),
    "ctrl": ("a name of its own", {"dff": 48}),
    "dbrx": (
        "sub-configs without model_type; the class reads a rope_theta that their defaults have lost",
        {
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "deepseek_ocr2_text": (NONE, {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}),
    "diffusion_gemma_text": (NONE, {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24}),
    "dots1": (NONE, {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}),
    "dots3_note_text": (
        "head_dim = qk_nope_head_dim + qk_rope_head_dim",
        {"num_key_value_heads": 4, "head_dim": 16, "per_layer_config": {"2": {"kv_lora_rank": 8}}},
    ),
    "esm": (NONE, {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32}),
    "esmc": (MHA, {"num_key_value_heads": 4}),
    "falcon_h1": (OF_MAMBA, {**MAMBA, "mamba_d_ssm": 64}),
    "glm5_next_text": (f"{MHA}; index_topk is a multiple of index_kpool", {"num_key_value_heads": 4, "index_kpool": 2}),
    "glm46v_text": (SECTIONS, GLM_ROPE),
    "glm4v_text": (SECTIONS, GLM_ROPE),
    "glm4v_moe_text": (
        "the class takes sections for a head of 128, half of which rotates",
        {"rope_parameters": {**GLM_ROPE["rope_parameters"], "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}},
    ),
    "glm_ocr_text": (SECTIONS, GLM_ROPE),
    "granitemoehybrid": (
        f"{OF_MAMBA}; no attention layer by default",
        {**MAMBA, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
    ),
    "hunyuan_v1_dense": (NONE, {"head_dim": 8}),
    "hunyuan_v1_moe": (NONE, {"head_dim": 8}),
    "hunyuan_vl": (NONE, {"head_dim": 8}),
    "hunyuan_vl_text": (NONE, {"head_dim": 8}),
    "jamba": ("periods of layers", {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4}),
    "lfm2_moe": (NONE, {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "longcat_flash": (
        "experts without weights; qk_head_dim = qk_nope_head_dim + qk_rope_head_dim",
        {"zero_expert_num": 2, "qk_head_dim": 16},
    ),
    "mamba2": (OF_MAMBA, {"num_heads": 4, "head_dim": 16, "n_groups": 1}),
    "mimi": ("a power of 2", {"codebook_size": 64}),
    "ministral": (NONE, {"head_dim": 8}),
    "molmo2_adapter": ("layers of the vision tower", {"vision_feature_layer": [1, 0]}),
    "moonshine_streaming": (NONE, {"num_key_value_heads": 4}),
    "moshi": ("a power of 2", {"audio_vocab_size": 64}),
    "moshi_depth": ("a power of 2", {"audio_vocab_size": 64}),
    "nemotron": (NONE, {"num_key_value_heads": 2}),
    "neomme": ("a quarter of head_dim rotates, in two axes", {"head_dim": 16}),
    "qwen4_exp_text": (
        NONE,
        {
            "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
            "indexer_compress_ratio": 2,
        },
    ),
    "reformer": (
        "positions in two axes",
        {"is_decoder": True, "axial_pos_shape": [4, 16], "axial_pos_embds_dim": [16, 16], "num_buckets": 4},
    ),
    "wav2vec2-bert": (NONE, {"vocab_size": 96}),
    "wav2vec2-conformer": (NONE, {"vocab_size": 96}),
    "zamba": (OF_ZAMBA, {**TWO_HYBRIDS, "mamba_dt_rank": 4}),
    "zamba2": (OF_ZAMBA, {**TWO_HYBRIDS, "mamba_headdim": 8, "mamba_d_state": 16, "n_mamba_heads": 8}),
}  # fmt: skip

STARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4_assistant": (
        "the class refuses its own default",
        {
            "text_config": {
                "model_type": "gemma4_text",
                "hidden_size_per_layer_input": 0,
                "vocab_size_per_layer_input": 0,
            }
        },
    ),
}
"""The same for arguments without which a config class cannot be made."""
