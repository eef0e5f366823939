"""Fields of the config.json of each released model of the family, as data."""

FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
V3_YARN = {
    "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096, "type": "yarn",
}  # fmt: skip
AUTO_MAP = {
    "AutoConfig": "configuration_deepseek.DeepseekV3Config",
    "AutoModel": "modeling_deepseek.DeepseekV3Model",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
}
R1 = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": AUTO_MAP, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1,
    "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
    "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048,
    "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "quantization_config": FP8, "rms_norm_eps": 1e-06, "rope_scaling": V3_YARN,
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16", "transformers_version": "4.46.3", "use_cache": True,
    "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip
V3 = R1 | {
    "aux_loss_alpha": 0.001, "pretraining_tp": 1, "seq_aux": True, "transformers_version": "4.33.1",
}  # fmt: skip
MOONLIGHT = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": AUTO_MAP, "aux_loss_alpha": 0.001, "bos_token_id": 163584, "eos_token_id": 163585,
    "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 11264, "kv_lora_rank": 512,
    "max_position_embeddings": 8192, "model_type": "deepseek_v3", "moe_intermediate_size": 1408,
    "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
    "norm_topk_prob": True, "num_attention_heads": 16, "num_experts_per_tok": 6,
    "num_hidden_layers": 27, "num_key_value_heads": 16, "num_nextn_predict_layers": 0,
    "pretraining_tp": 1, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446, "scoring_func": "sigmoid", "seq_aux": True,
    "tie_word_embeddings": False, "topk_group": 1, "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16", "transformers_version": "4.44.0", "use_cache": True,
    "v_head_dim": 128, "vocab_size": 163840,
}  # fmt: skip
KIMI_K2 = V3 | {
    "model_type": "kimi_k2", "bos_token_id": 163584, "eos_token_id": 163585,
    "first_k_dense_replace": 1, "max_position_embeddings": 131072, "n_group": 1,
    "n_routed_experts": 384, "num_attention_heads": 64, "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0, "rope_theta": 50000.0, "routed_scaling_factor": 2.827,
    "rope_scaling": V3_YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
    "topk_group": 1, "transformers_version": "4.48.3", "vocab_size": 163840,
}  # fmt: skip
GIGACHAT3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 1, "dtype": "bfloat16", "eos_token_id": 2, "first_k_dense_replace": 1,
    "head_dim": 64, "hidden_act": "silu", "hidden_size": 1536, "initializer_range": 0.02,
    "intermediate_size": 8960, "kv_lora_rank": 512, "max_position_embeddings": 262144,
    "model_type": "deepseek_v3", "moe_intermediate_size": 1280, "n_group": 1,
    "n_routed_experts": 64, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 32, "num_experts_per_tok": 4, "num_hidden_layers": 26,
    "num_key_value_heads": 32, "num_nextn_predict_layers": 1, "q_lora_rank": None,
    "qk_head_dim": 192, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_interleave": True, "rope_scaling": V3_YARN | {"factor": 64.0}, "rope_theta": 100000,
    "routed_scaling_factor": 1.0, "tie_word_embeddings": False, "topk_group": 1,
    "topk_method": "noaux_tc", "use_cache": True, "v_head_dim": 192, "vocab_size": 128256,
}  # fmt: skip
V2 = V3 | {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2",
    "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1,
    "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536,
    "n_routed_experts": 160, "n_shared_experts": 2, "norm_topk_prob": False,
    "num_experts_per_tok": 6, "num_hidden_layers": 60, "topk_group": 3,
    "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0,
    "scoring_func": "softmax", "vocab_size": 102400, "transformers_version": "4.39.3",
    "rope_scaling": V3_YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
}  # fmt: skip
V2 = {k: v for k, v in V2.items() if k not in ("num_nextn_predict_layers", "quantization_config")}
V2_LITE = V2 | {
    "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_group": 1,
    "n_routed_experts": 64, "num_attention_heads": 16, "num_hidden_layers": 27,
    "num_key_value_heads": 16, "q_lora_rank": None, "routed_scaling_factor": 1.0, "topk_group": 1,
    "topk_method": "greedy", "transformers_version": "4.33.1",
}  # fmt: skip
FAMILY = {
    "V3": V3,
    "V3-0324": V3,
    "V3.1": R1 | {"quantization_config": FP8 | {"scale_fmt": "ue8m0"}},
    "R1": R1,
    "R1-0528": R1,
    "Moonlight": MOONLIGHT,
    "Kimi-K2": KIMI_K2,
    "Kimi-K2-0905": KIMI_K2
    | {
        "max_position_embeddings": 262144,
        "rope_scaling": KIMI_K2["rope_scaling"] | {"factor": 64.0},
        "rms_norm_eps": 1e-05,
    },
    "GigaChat3": GIGACHAT3,
    "V2": V2,
    "V2.5": V2 | {"transformers_version": "4.39.3"},
    "V2-Lite": V2_LITE,
    "V2-Lite-Chat": V2_LITE,
}
PARAMETERS = {  # as published with the weights; MTP layers and their copies are not counted
    "V3": 671_026_419_200,
    "Moonlight": 15_960_110_208,
    "Kimi-K2": 1_026_408_232_448,
    "V2-Lite": 15_706_484_224,
}
SIZES = {  # small, and no two alike
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "moe_intermediate_size": 16,
    "num_hidden_layers": 3, "first_k_dense_replace": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "kv_lora_rank": 20, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 6, "n_routed_experts": 16, "num_experts_per_tok": 3,
}  # fmt: skip


def shrink(values: dict, **sizes) -> dict:
    """Return a config with small sizes, and every other field as it was."""
    small = {k: v for k, v in (SIZES | sizes).items() if k in values}
    small |= {"q_lora_rank": 12} if values["q_lora_rank"] else {}
    if values["n_group"] == 8:
        small |= {"n_group": 4, "topk_group": 2}
    rope = values.get("rope_scaling")
    if rope:
        small["rope_scaling"] = rope | {"original_max_position_embeddings": 16}
    if "head_dim" in values:
        small |= {"head_dim": 4, "qk_head_dim": 12}
    return {k: v for k, v in (values | small).items() if k != "quantization_config"}
