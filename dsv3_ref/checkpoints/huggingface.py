"""Hugging Face's format: names of tensors, and writing a directory.

A Hugging Face directory has a `deepseek_v3` or `deepseek_v2` config. Each expert is a tensor of its
own, and the MTP layers are numbered after the last layer.
"""

import re
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from dsv3_ref.checkpoints.atomic import atomic_dir
from dsv3_ref.checkpoints.safetensors_files import (
    SCALE_SUFFIX,
    SHARD_BYTES,
    LazyTensor,
    WrittenTensor,
    write_config,
    write_files,
    write_index,
)
from dsv3_ref.checkpoints.hf_config import config_to_hf
from dsv3_ref.config import Config
from dsv3_ref.fp8 import weight_quant
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
IN_FP8 = re.compile(  # the matrices that the released files hold in FP8
    r"model\.layers\.\d+\.(self_attn\.\w+_proj(_with_mqa)?"
    r"|mlp\.(experts\.\d+\.|shared_experts\.)?(gate|up|down)_proj)\.weight"
)
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


# ── Writing ──


def save_hf(
    model: Transformer,
    directory: str | PathLike[str],
    shard_bytes: int = SHARD_BYTES,
    **fields: Any,
) -> None:
    """Write a model in Hugging Face's format; `fields` are added to config.json."""
    values = config_to_hf(model.config, model.embed.weight.dtype) | fields
    with atomic_dir(directory) as tmp:
        write_hf(tmp, model, values, shard_bytes=shard_bytes)


def write_hf(
    folder: Path, model: Transformer, values: dict[str, Any], dtype: torch.dtype | None = None,
    use_fp8: bool = False, shard_bytes: int = SHARD_BYTES,
) -> None:  # fmt: skip
    """Write config.json, weights and their index into a folder.

    values: the fields of config.json. dtype, use_fp8: see `write_hf_files`.
    """
    tensors: dict[str, LazyTensor] = {}
    for name, x in model.state_dict().items():
        parts = x.unbind() if x.ndim == 3 else [x]
        lazy = [LazyTensor(part.nbytes, part.detach) for part in parts]
        tensors |= zip(hf_names(name, model.config), lazy, strict=True)
    tensors |= mtp_copies(tensors, model.config)
    write_config(folder, values)
    written = write_hf_files(folder, tensors, values, dtype, use_fp8, shard_bytes)
    write_index(folder, written)


def write_hf_files(
    folder: Path, tensors: dict[str, LazyTensor], values: dict[str, Any],
    dtype: torch.dtype | None = None, use_fp8: bool = False, shard_bytes: int = SHARD_BYTES,
    part: int = 0, parts: int = 1,
) -> list[WrittenTensor]:  # fmt: skip
    """Write the safetensors files that are the `part` of `parts`, one after another.

    tensors: by Hugging Face's names. values: the fields of config.json. dtype: of the weights,
    None: as they are. use_fp8: quantize the matrices of attention and FFN, with scales in powers of
    two if `values` ask for ue8m0.
    """
    quantization = values.get("quantization_config") or {}
    use_ue8m0 = quantization.get("scale_fmt") == "ue8m0"

    def convert(name: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
        if name.endswith("e_score_correction_bias"):
            return {name: x.float()}
        if use_fp8 and IN_FP8.fullmatch(name):
            codes, scales = weight_quant(x, use_ue8m0)
            return {name: codes, name + SCALE_SUFFIX: scales}
        return {name: x.to(dtype or x.dtype, copy=bool(IGNORED.fullmatch(name)))}

    return write_files(folder, tensors, shard_bytes, convert, part, parts)


def mtp_copy_names(name: str, config: Config) -> list[str]:
    """Return the names that MTP layers have for our embedding or head; none for other tensors.

    The released files hold these copies, and vLLM and SGLang read them.
    """
    suffixes = {"embed.weight": "embed_tokens.weight", "head.weight": "shared_head.head.weight"}
    if name not in suffixes:
        return []
    layers = range(config.n_layers, config.n_layers + config.n_mtp_layers)
    return [f"model.layers.{i}.{suffixes[name]}" for i in layers]


def mtp_copies(tensors: dict[str, LazyTensor], config: Config) -> dict[str, LazyTensor]:
    """Return embedding and head under the names that each MTP layer has for them."""
    copies: dict[str, LazyTensor] = {}
    for name in ("embed.weight", "head.weight"):
        copies |= dict.fromkeys(mtp_copy_names(name, config), tensors[HF_NAMES[name]])
    return copies
