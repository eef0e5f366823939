"""Fields of a Hugging Face config.json: what each means here, and the way to `Config` and back.

Every known field is in `FIELDS`: it is honored, it must have a value that this model implements, it
is refused, or it is harmless. Other fields cause a warning that names them.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dsv3_ref.config import Config, UserError, from_dict

# ── Kinds of models ──

MODEL_TYPES = {"deepseek_v3": "deepseek_v3", "kimi_k2": "deepseek_v3", "deepseek_v2": "deepseek_v2"}
OTHER_MODEL_TYPES = {  # relatives that are not implemented, and why
    "deepseek": "its attention is not MLA",
    "deepseek_v32": "its sparse attention (DSA) is not implemented",
    "deepseek_v4": "its compressed attention and hyper-connections are not implemented",
    "deepseek_vl": "it reads images",
    "deepseek_vl_v2": "it reads images",
    "deepseek_ocr2": "it reads images",
    "kimi_vl": "it reads images",
    "kimi_k25": "it reads images",
    "kimi_linear": "its linear attention is not implemented",
}


def base_type(values: Mapping[str, Any]) -> str:
    """Return `deepseek_v3` or `deepseek_v2` for a config.json; raise a `UserError` for others."""
    kind = values.get("model_type")
    if isinstance(kind, str) and kind in MODEL_TYPES:
        return MODEL_TYPES[kind]
    why = OTHER_MODEL_TYPES.get(kind) if isinstance(kind, str) else None
    reason = f" cannot be loaded, because {why}" if why else ""
    raise UserError(f"a model of type {kind!r}{reason}; supported: {' or '.join(MODEL_TYPES)}")


# ── The table of fields ──


@dataclass(frozen=True)
class ConfigField:
    """Meaning of a field of config.json here; null is the same as an absent field."""

    use: str  # honored, checked (must have one of `values`), refused, or harmless
    kind: str = "any"  # of its value
    values: tuple = ()  # that this model implements


def honored(kind: str, names: str) -> dict[str, ConfigField]:
    """Return fields that change the model, by name."""
    return {name: ConfigField("honored", kind) for name in names.split()}


def checked(kind: str, *values: Any) -> ConfigField:
    """Return a field that must have one of these values; without any, one that others imply."""
    return ConfigField("checked", kind, values)


def other(use: str, names: str) -> dict[str, ConfigField]:
    """Return fields with any value that are harmless, or that are refused, by name."""
    return {name: ConfigField(use) for name in names.split()}


FIELDS: dict[str, ConfigField] = {
    **honored("string", "model_type"),
    **honored(
        "whole",
        "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers"
        " first_k_dense_replace num_attention_heads q_lora_rank kv_lora_rank qk_nope_head_dim"
        " qk_rope_head_dim v_head_dim n_routed_experts n_shared_experts num_experts_per_tok n_group"
        " topk_group max_position_embeddings num_nextn_predict_layers num_mtp_layers",
    ),
    **honored(
        "number",
        "routed_scaling_factor rms_norm_eps initializer_range embedding_initializer_range"
        " rope_theta",
    ),
    **honored("object", "rope_scaling rope_parameters quantization_config"),
    "hidden_act": checked("string", "silu"),
    "rope_interleave": checked("boolean", True),
    "attention_bias": checked("boolean", False),
    "mlp_bias": checked("boolean", False),
    "attention_dropout": checked("number", 0.0),
    "tie_word_embeddings": checked("boolean", False),
    "is_encoder_decoder": checked("boolean", False),
    "moe_layer_freq": checked("any", 1),
    "partial_rotary_factor": checked("number", 1.0),
    "scoring_func": checked("string"),
    "topk_method": checked("string"),
    "norm_topk_prob": checked("boolean"),
    "num_key_value_heads": checked("whole"),
    "head_dim": checked("whole"),
    "qk_head_dim": checked("whole"),
    "num_local_experts": checked("whole"),
    "num_experts": checked("whole"),
    "original_max_position_embeddings": checked("number"),
    # of models that attend to some positions only, or that read images
    **other("refused", "index_topk index_n_heads index_head_dim vision_config text_config"),
    # who wrote the file, and code, which is never executed
    **other("harmless", "_name_or_path architectures auto_map transformers_version"),
    # of the tokenizer and of generation
    **other("harmless", "bos_token_id eos_token_id pad_token_id decoder_start_token_id"),
    # the weight files say how each tensor is stored
    **other("harmless", "torch_dtype dtype"),
    # of other training programs, and of parallel execution elsewhere
    **other("harmless", "aux_loss_alpha router_aux_loss_coef seq_aux ep_size pretraining_tp"),
    # what transformers returns, and of tasks other than text generation
    **other(
        "harmless",
        "use_cache output_attentions output_hidden_states output_router_logits return_dict"
        " torchscript problem_type id2label label2id num_labels finetuning_task"
        " task_specific_params chunk_size_feed_forward is_decoder add_cross_attention"
        " _attn_implementation attn_implementation unsloth_version unsloth_fixed",
    ),
}
ROPE_FIELDS: dict[str, ConfigField] = {
    **honored("string", "rope_type type"),
    **honored(
        "number",
        "rope_theta factor original_max_position_embeddings beta_fast beta_slow mscale"
        " mscale_all_dim attention_factor",
    ),
    "truncate": checked("boolean", True),
    "partial_rotary_factor": checked("number", 1.0),
}
QUANTIZATION_FIELDS: dict[str, ConfigField] = {
    "quant_method": checked("string", "fp8"),
    "fmt": checked("string", "e4m3"),
    "activation_scheme": checked("string", "dynamic"),
    "weight_block_size": checked("any", [128, 128]),
    # scales are stored as numbers; the dtype of a stored tensor says whether it is quantized
    **other("harmless", "scale_fmt modules_to_not_convert ignored_layers dequantize"),
}
FP8_CONFIG = {  # of the released V3
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
GATES: dict[str, dict[str, tuple]] = {
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
KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "any": ((object,), "any value"),
    "string": ((str,), "a string"),
    "whole": ((int,), "a whole number"),
    "number": ((int, float), "a number"),
    "boolean": ((bool,), "true or false"),
    "object": ((dict,), "an object"),
}


def check_fields(
    values: Mapping[str, Any], fields: Mapping[str, ConfigField], place: str = ""
) -> None:
    """Raise a `UserError` for the first field that this model cannot honor; warn of unknown ones.

    place: ` of rope_scaling` for the fields of that object.
    """
    for name, value in values.items():
        if value is not None and name in fields:
            check_kind(f"{name}{place}", value, fields[name].kind)
            if fields[name].use == "refused":
                raise UserError(f"{name} belongs to a kind of model that is not implemented here")
    require_supported(values, {n: f.values for n, f in fields.items() if f.values})
    if unknown := [f"{name}{place}" for name in values if name not in fields]:
        warnings.warn(
            f"config.json has fields without effect: {', '.join(unknown)} (unknown here)",
            stacklevel=2,
        )


def check_kind(name: str, value: Any, kind: str) -> None:
    """Raise a `UserError` unless a value is of this kind, and finite if it is a number."""
    types, words = KINDS[kind]
    if not isinstance(value, types) or (kind in ("whole", "number") and isinstance(value, bool)):
        raise UserError(f"{name} must be {words}, not {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} must be finite, not {value!r}")


def require_supported(values: Mapping[str, Any], allowed: Mapping[str, tuple]) -> None:
    """Raise a `UserError` for the first field with a value that this model does not implement."""
    for field, choices in allowed.items():
        value = values.get(field)
        if value is not None and value not in choices:
            raise UserError(f"{field} is {value!r}; supported: {' or '.join(map(repr, choices))}")


def check_hf_config(values: Mapping[str, Any]) -> None:
    """Raise a `UserError` for the first field of a config.json that this model cannot honor."""
    gates = GATES[base_type(values)]
    check_fields(values, FIELDS)
    require_supported(values, gates | implied_values(values))
    for name in ("rope_parameters", "rope_scaling"):
        check_fields(values.get(name) or {}, ROPE_FIELDS, f" of {name}")
    check_fields(
        values.get("quantization_config") or {}, QUANTIZATION_FIELDS, " of quantization_config"
    )


def implied_values(values: Mapping[str, Any]) -> dict[str, tuple]:
    """Return the value of each field that follows from others which the file has."""
    rope = chosen_rope(values)
    parts = {
        "num_key_value_heads": [values.get("num_attention_heads")],
        "head_dim": [values.get("qk_rope_head_dim")],
        "qk_head_dim": [values.get("qk_nope_head_dim"), values.get("qk_rope_head_dim")],
        "num_local_experts": [values.get("n_routed_experts")],
        "num_experts": [values.get("n_routed_experts")],
        "original_max_position_embeddings": [rope.get("original_max_position_embeddings")],
    }
    return {name: (sum(terms),) for name, terms in parts.items() if None not in terms}


def chosen_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of RoPE; of two objects that are not empty, `rope_scaling` is chosen.

    So it is in transformers.
    """
    return values.get("rope_scaling") or values.get("rope_parameters") or {}


# ── From Hugging Face's config to ours ──

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
ABSENT = {  # what transformers takes for a field that a file lacks
    "deepseek_v3": {"q_lora_rank": 1536, "n_group": 8, "topk_group": 4},
    "deepseek_v2": {"q_lora_rank": 1536},
}
HF_DEFAULTS = {  # for null, and for absent fields that are not in ABSENT
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


def map_fields(values: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """Return our fields from Hugging Face's, with HF_DEFAULTS for null and absent ones.

    Raise a `UserError` for a field that has no default.
    """
    mapped = {}
    for ours, theirs in fields.items():
        value = values.get(theirs)
        if value is None and theirs not in HF_DEFAULTS:
            raise UserError(f"the field {theirs} is missing")
        mapped[ours] = HF_DEFAULTS[theirs] if value is None else value
    return mapped


def config_from_hf(values: Mapping[str, Any]) -> Config:
    """Return our Config for a Hugging Face config.json, with the MTP layers that it promises."""
    check_hf_config(values)
    kind = base_type(values)
    values = {**ABSENT[kind], **values}
    if values.get("topk_group") is None and (values.get("n_group") or 1) > 1:
        raise UserError(f"topk_group is missing beside n_group ({values['n_group']})")
    ours = map_fields(values, HF_FIELDS)
    if kind == "deepseek_v2" and values.get("topk_method") != "group_limited_greedy":
        ours |= {"n_expert_groups": 1, "n_limited_groups": 1}
    ours |= rope_fields(values)
    ours |= {
        "score_func": GATES[kind]["scoring_func"][0],
        "n_mtp_layers": promised_mtp_layers(values) or 0,
    }
    return from_dict(ours)


def promised_mtp_layers(values: Mapping[str, Any]) -> int | None:
    """Return the number of MTP layers that a config.json promises; None if it does not say."""
    names = ("num_nextn_predict_layers", "num_mtp_layers")
    return next((values[name] for name in names if values.get(name) is not None), None)


def rope_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return RoPE and YaRN fields from `rope_scaling`, `rope_parameters` and `rope_theta`."""
    rope = chosen_rope(values)
    length = values.get("max_position_embeddings")
    theta = rope.get("rope_theta") or values.get("rope_theta") or Config.rope_theta
    kind = rope.get("rope_type") or rope.get("type") or "default"
    require_supported({"rope_type": kind}, {"rope_type": ("default", "yarn")})
    if kind == "default":
        return {"rope_theta": theta, "rope_factor": 1.0, "original_seq_len": length}
    if rope.get("original_max_position_embeddings") is None:
        rope = rope | {"original_max_position_embeddings": length}
    ours = map_fields(rope, HF_YARN_FIELDS)
    if ours["rope_factor"] > 1 and not is_unscaled_rotation(rope):
        mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        raise UserError(
            f"mscale ({mscale}) and mscale_all_dim ({all_dim}) of YaRN must be equal and not 0: "
            "otherwise cosine and sine are scaled, which is not supported"
        )
    return {"rope_theta": theta} | ours


def is_unscaled_rotation(rope: Mapping[str, Any]) -> bool:
    """Return whether YaRN leaves cosine and sine unscaled (attention factor 1)."""
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"] == 1
    return bool(rope.get("mscale")) and rope["mscale"] == rope.get("mscale_all_dim")


# ── From our config to Hugging Face's ──


def config_to_hf(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """Return the config as a Hugging Face config.json with the fields of the released one."""
    require_supported({"score_func": config.score_func}, {"score_func": ("sigmoid", "softmax")})
    sigmoid = config.score_func == "sigmoid"
    kind, name = ("deepseek_v3", "DeepseekV3") if sigmoid else ("deepseek_v2", "DeepseekV2")
    gate = {field: choices[0] for field, choices in GATES[kind].items()}
    if not sigmoid and config.n_expert_groups > 1:
        gate["topk_method"] = "group_limited_greedy"
    if sigmoid and config.n_expert_groups == config.n_routed_experts:
        raise UserError("transformers needs two experts in each group: choose fewer groups")
    yarn = None
    if config.rope_factor > 1:
        yarn = {theirs: getattr(config, ours) for ours, theirs in HF_YARN_FIELDS.items()}
        yarn = {"type": "yarn", "mscale": config.mscale} | yarn
    fixed = "hidden_act rope_interleave attention_bias attention_dropout tie_word_embeddings"
    return {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": kind,
        **{theirs: getattr(config, ours) for ours, theirs in HF_FIELDS.items()},
        **gate,
        **{field: FIELDS[field].values[0] for field in [*fixed.split(), "moe_layer_freq"]},
        "q_lora_rank": config.q_lora_rank or None,
        "num_key_value_heads": config.n_heads,
        "num_nextn_predict_layers": config.n_mtp_layers,
        "rope_theta": config.rope_theta,
        "rope_scaling": yarn,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def config_like(
    config: Config, like: Mapping[str, Any], dtype: torch.dtype, use_fp8: bool
) -> dict[str, Any]:
    """Return the fields of another config.json, in its order, with those of this model changed.

    Raise a `UserError` if it is of another kind.
    """
    ours, theirs = config_to_hf(config, dtype), config_from_hf(like)
    if base_type(like) != ours["model_type"]:
        raise UserError(f"it is a {like['model_type']}, but the model a {ours['model_type']}")
    changed = [name for name in HF_FIELDS if getattr(config, name) != getattr(theirs, name)]
    values = dict(like) | {HF_FIELDS[name]: ours[HF_FIELDS[name]] for name in changed}
    if "n_expert_groups" in changed:
        values["topk_method"] = ours["topk_method"]
    if any(
        getattr(config, name) != getattr(theirs, name) for name in ("rope_theta", *HF_YARN_FIELDS)
    ):
        values.pop("rope_parameters", None)
        values |= {name: ours[name] for name in ("rope_theta", "rope_scaling")}
    implied = implied_values(values)
    values |= {name: implied[name][0] for name in implied if values.get(name) is not None}
    if config.n_mtp_layers != (promised_mtp_layers(like) or 0):
        values.pop("num_mtp_layers", None)
        values["num_nextn_predict_layers"] = config.n_mtp_layers
    values["dtype" if "dtype" in like else "torch_dtype"] = str(dtype).removeprefix("torch.")
    quantization = values.pop("quantization_config", None)
    return values | ({"quantization_config": quantization or FP8_CONFIG} if use_fp8 else {})
