"""Hugging Face's format: names of tensors, fields of config.json, export.

A Hugging Face directory has a `deepseek_v3` or `deepseek_v2` config. Each expert is a tensor of its
own, and the MTP layers are numbered after the last layer.
"""

import re
from os import PathLike
from typing import Any

import torch

from dsv3_ref.checkpoints.atomic import atomic_dir
from dsv3_ref.checkpoints.safetensors_files import SHARD_BYTES, write_safetensors
from dsv3_ref.config import Config, UserError, from_dict
from dsv3_ref.model import Transformer

# ── Names: ours, Hugging Face's; L a layer (MTP layers come after the last), E each expert ──

HF_NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "L.attn_norm.weight": "model.layers.L.input_layernorm.weight",
    "L.attn.wq.weight": "model.layers.L.self_attn.q_proj.weight",
    "L.attn.wq_a.weight": "model.layers.L.self_attn.q_a_proj.weight",
    "L.attn.q_norm.weight": "model.layers.L.self_attn.q_a_layernorm.weight",
    "L.attn.wq_b.weight": "model.layers.L.self_attn.q_b_proj.weight",
    "L.attn.wkv_a.weight": "model.layers.L.self_attn.kv_a_proj_with_mqa.weight",
    "L.attn.kv_norm.weight": "model.layers.L.self_attn.kv_a_layernorm.weight",
    "L.attn.wkv_b.weight": "model.layers.L.self_attn.kv_b_proj.weight",
    "L.attn.wo.weight": "model.layers.L.self_attn.o_proj.weight",
    "L.ffn_norm.weight": "model.layers.L.post_attention_layernorm.weight",
    "L.ffn.w1.weight": "model.layers.L.mlp.gate_proj.weight",
    "L.ffn.w2.weight": "model.layers.L.mlp.down_proj.weight",
    "L.ffn.w3.weight": "model.layers.L.mlp.up_proj.weight",
    "L.ffn.gate.weight": "model.layers.L.mlp.gate.weight",
    "L.ffn.gate.bias": "model.layers.L.mlp.gate.e_score_correction_bias",
    "L.ffn.experts.w1": "model.layers.L.mlp.experts.E.gate_proj.weight",
    "L.ffn.experts.w2": "model.layers.L.mlp.experts.E.down_proj.weight",
    "L.ffn.experts.w3": "model.layers.L.mlp.experts.E.up_proj.weight",
    "L.ffn.shared_experts.w1.weight": "model.layers.L.mlp.shared_experts.gate_proj.weight",
    "L.ffn.shared_experts.w2.weight": "model.layers.L.mlp.shared_experts.down_proj.weight",
    "L.ffn.shared_experts.w3.weight": "model.layers.L.mlp.shared_experts.up_proj.weight",
    "L.enorm.weight": "model.layers.L.enorm.weight",
    "L.hnorm.weight": "model.layers.L.hnorm.weight",
    "L.eh_proj.weight": "model.layers.L.eh_proj.weight",
    "L.norm.weight": "model.layers.L.shared_head.norm.weight",
}
LAYER = re.compile(r"model\.layers\.(\d+)\.")
IGNORED = re.compile(  # copies of embedding and head in MTP layers; RoPE's frequency tables
    r"model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight|.*rotary_emb\.inv_freq"
)


def hf_names(name: str, config: Config) -> list[str]:
    """Return Hugging Face's names for our tensor `name`: one, or one per expert."""
    if not (match := re.match(r"(layers|mtp)\.(\d+)\.(block\.)?", name)):
        return [HF_NAMES[name]]
    layer = int(match[2]) + (config.n_layers if match[1] == "mtp" else 0)
    path = HF_NAMES["L." + name[match.end() :]].replace(".L.", f".{layer}.")
    if ".E." not in path:
        return [path]
    return [path.replace(".E.", f".{e}.") for e in range(config.n_routed_experts)]


def is_gate_bias(name: str) -> bool:
    """Return whether a tensor is a gate bias; these stay fp32, as bf16 would round 0.001 away."""
    return name.endswith("gate.bias")


# ── Config: ours, Hugging Face's ──

HF_FIELDS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "inter_dim": "intermediate_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_dense_layers": "first_k_dense_replace",
    "n_heads": "num_attention_heads",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "n_routed_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts",
    "n_activated_experts": "num_experts_per_tok",
    "n_expert_groups": "n_group",
    "n_limited_groups": "topk_group",
    "route_scale": "routed_scaling_factor",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
    "embed_std": "embedding_initializer_range",  # ours; others ignore it
}
HF_YARN_FIELDS = {
    "rope_factor": "factor",
    "original_seq_len": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale_all_dim",
}
HF_DEFAULTS = {
    "q_lora_rank": 0,
    "n_group": 1,
    "topk_group": 1,
    "initializer_range": 0.02,
    "embedding_initializer_range": 0.006,
    "rms_norm_eps": 1e-6,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 0.0,
}
SUPPORTED: dict[
    str, tuple
] = {  # values that this model implements, the first also when a config is silent
    "rope_interleave": (True,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "hidden_act": ("silu",),
    "tie_word_embeddings": (False,),
    "moe_layer_freq": (1,),
    "rms_norm_eps": (1e-6,),  # the latents' norms have this one, whatever the config says
}
SUPPORTED_GATES: dict[str, dict[str, tuple]] = {
    "deepseek_v3": {
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "norm_topk_prob": (True,),
    },
    "deepseek_v2": {
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
        "norm_topk_prob": (False,),
    },
}
SUPPORTED_ROPE: dict[str, tuple] = {"truncate": (True,), "partial_rotary_factor": (1.0,)}
SUPPORTED_FP8: dict[str, tuple] = {"quant_method": ("fp8",), "weight_block_size": ([128, 128],)}


def require_supported(values: dict[str, Any], allowed: dict[str, tuple]) -> None:
    """Raise a `UserError` for the first field with a value that this model does not implement."""
    for field, choices in allowed.items():
        value = values.get(field)
        if value is not None and value not in choices:
            raise UserError(f"{field} is {value!r}; supported: {' or '.join(map(repr, choices))}")


def map_fields(values: dict[str, Any], fields: dict[str, str]) -> dict[str, Any]:
    """Return our fields from Hugging Face's, with HF_DEFAULTS for null and absent ones.

    Raise a `UserError` for a field that has no default or is not a number.
    """
    mapped = {}
    for ours, theirs in fields.items():
        value = values.get(theirs)
        if value is None and theirs not in HF_DEFAULTS:
            raise UserError(f"the field {theirs} is missing")
        if not isinstance(value, int | float | None):
            raise UserError(f"{theirs} must be a number, not {value!r}")
        mapped[ours] = HF_DEFAULTS[theirs] if value is None else value
    return mapped


def config_from_hf(values: dict[str, Any], n_mtp_layers: int) -> Config:
    """Return our Config for a Hugging Face config.json."""
    kind = values["model_type"]
    if kind not in SUPPORTED_GATES:
        raise UserError(f"a model of type {kind!r}; supported: {' or '.join(SUPPORTED_GATES)}")
    require_supported(values, SUPPORTED | SUPPORTED_GATES[kind])
    require_supported(values, {"num_key_value_heads": (values.get("num_attention_heads"),)})
    require_supported(values.get("quantization_config") or {}, SUPPORTED_FP8)
    ours = map_fields(values, HF_FIELDS)
    if kind == "deepseek_v2" and values.get("topk_method") != "group_limited_greedy":
        ours |= {"n_expert_groups": 1, "n_limited_groups": 1}
    ours |= rope_fields(values)
    ours |= {"score_func": SUPPORTED_GATES[kind]["scoring_func"][0], "n_mtp_layers": n_mtp_layers}
    return from_dict(ours)


def rope_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Return RoPE and YaRN fields from `rope_parameters`, or `rope_theta` and `rope_scaling`."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or values.get("rope_theta") or Config.rope_theta
    kind = rope.get("rope_type") or rope.get("type") or "default"
    require_supported({"rope_type": kind}, {"rope_type": ("default", "yarn")})
    require_supported(rope, SUPPORTED_ROPE)
    if kind == "default":
        length = values.get("max_position_embeddings")
        return {"rope_theta": theta, "rope_factor": 1.0, "original_seq_len": length}
    ours = map_fields(rope, HF_YARN_FIELDS)
    if ours["rope_factor"] > 1 and not is_unscaled_rotation(rope):
        mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        raise UserError(
            f"mscale ({mscale}) and mscale_all_dim ({all_dim}) of YaRN must be equal and not 0: "
            "otherwise cosine and sine are scaled, which is not supported"
        )
    return {"rope_theta": theta} | ours


def is_unscaled_rotation(rope: dict[str, Any]) -> bool:
    """Return whether YaRN leaves cosine and sine unscaled (attention factor 1)."""
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"] == 1
    return bool(rope.get("mscale")) and rope["mscale"] == rope.get("mscale_all_dim")


def config_to_hf(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """Return the config as a Hugging Face config.json with the fields of the released one."""
    require_supported({"score_func": config.score_func}, {"score_func": ("sigmoid", "softmax")})
    sigmoid = config.score_func == "sigmoid"
    kind, name = ("deepseek_v3", "DeepseekV3") if sigmoid else ("deepseek_v2", "DeepseekV2")
    gate = {field: choices[0] for field, choices in SUPPORTED_GATES[kind].items()}
    if not sigmoid and config.n_expert_groups > 1:
        gate["topk_method"] = "group_limited_greedy"
    if sigmoid and config.n_expert_groups == config.n_routed_experts:
        raise UserError("transformers needs two experts in each group: choose fewer groups")
    values = {theirs: getattr(config, ours) for ours, theirs in HF_FIELDS.items()}
    require_supported(values, SUPPORTED)
    yarn = None
    if config.rope_factor > 1:
        yarn = {theirs: getattr(config, ours) for ours, theirs in HF_YARN_FIELDS.items()}
        yarn = {"type": "yarn", "mscale": config.mscale} | yarn
    return {field: choices[0] for field, choices in SUPPORTED.items()} | {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": kind,
        **values,
        **gate,
        "q_lora_rank": config.q_lora_rank or None,
        "num_key_value_heads": config.n_heads,
        "num_nextn_predict_layers": config.n_mtp_layers,
        "rope_theta": config.rope_theta,
        "rope_scaling": yarn,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


# ── Writing ──


def save_hf(
    model: Transformer,
    directory: str | PathLike[str],
    shard_bytes: int = SHARD_BYTES,
    **fields: Any,
) -> None:
    """Write a model in Hugging Face's format; `fields` are added to config.json."""
    config = config_to_hf(model.config, model.embed.weight.dtype) | fields
    tensors: dict[str, torch.Tensor] = {}
    for name, x in model.state_dict().items():
        parts = x.unbind() if x.ndim == 3 else [x.float() if is_gate_bias(name) else x]
        tensors |= zip(hf_names(name, model.config), parts, strict=True)
    with atomic_dir(directory) as tmp:
        write_safetensors(tmp, config, tensors, shard_bytes)
