"""Every exported tensor has its place in vLLM's DeepSeek model or MTP drafter; none is missing.

The rules are those of `load_weights` in vllm/model_executor/models/deepseek_v2.py and
deepseek_mtp.py, stated independently; vLLM itself needs a GPU to be imported.
"""

import re
from collections import defaultdict
from dataclasses import replace
from itertools import product

import pytest
import torch
from support import randomize

from dsv3_ref.checkpoints.hf_config import FP8_CONFIG, config_to_hf
from dsv3_ref.checkpoints.huggingface import write_hf
from dsv3_ref.checkpoints.safetensors_files import TensorFiles
from dsv3_ref.model import Transformer

FUSED = {  # part of a checkpoint's name → (parameter of vLLM, which part of it)
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "q_a_proj": ("fused_qkv_a_proj", 0),
    "kv_a_proj_with_mqa": ("fused_qkv_a_proj", 1),
}
EXPERT = {"gate_proj": ("w13", 0), "up_proj": ("w13", 1), "down_proj": ("w2", 0)}
SHARED = ("embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head")  # outside of `mtp_block`


def place(name: str, config) -> tuple[str, object]:
    """Return vLLM's parameter for a tensor, and the part of it that the tensor fills."""
    if m := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight(_scale_inv)?", name):
        parameter, part = EXPERT[m[3]]
        return f"{m[1]}.{parameter}_weight{m[4] or ''}", (int(m[2]), part)
    module = name.split(".")[-2]
    if module in FUSED and (config.q_lora_rank or module != "kv_a_proj_with_mqa"):
        parameter, part = FUSED[module]
        return name.replace(module, parameter), part
    return name, None


def drafter_name(name: str, layer: int) -> str:
    """Return the name of an MTP layer's tensor in the drafter."""
    prefix = f"model.layers.{layer}."
    own = name.removeprefix(prefix)
    if own.startswith("embed_tokens"):
        return f"model.{own}"
    return name if own.startswith(SHARED) else f"{prefix}mtp_block.{own}"


def block_parameters(prefix: str, config, is_moe: bool, use_fp8: bool) -> dict[str, set]:
    """Return the parameters of vLLM's decoder layer with the parts that must be filled."""
    pair, single = {0, 1}, {None}
    projections = {f"{prefix}self_attn.{n}": single for n in ("q_b_proj", "kv_b_proj", "o_proj")}
    projections[f"{prefix}self_attn.fused_qkv_a_proj"] = pair
    mlp = f"{prefix}mlp.shared_experts." if is_moe else f"{prefix}mlp."
    projections |= {f"{mlp}gate_up_proj": pair, f"{mlp}down_proj": single}
    norms = ["input_layernorm", "post_attention_layernorm"]
    norms += ["self_attn.q_a_layernorm", "self_attn.kv_a_layernorm"]
    kinds = ("weight", "weight_scale_inv") if use_fp8 else ("weight",)
    want = {f"{prefix}{norm}.weight": single for norm in norms}
    experts = range(config.n_routed_experts)
    for kind in kinds:
        want |= {f"{name}.{kind}": parts for name, parts in projections.items()}
        if is_moe:
            want[f"{prefix}mlp.experts.w13_{kind}"] = set(product(experts, pair))
            want[f"{prefix}mlp.experts.w2_{kind}"] = set(product(experts, {0}))
    if is_moe:
        want |= {f"{prefix}mlp.gate.{n}": single for n in ("weight", "e_score_correction_bias")}
    return want


@pytest.mark.parametrize("use_fp8", [False, True], ids=["bf16", "fp8"])
def test_every_parameter_of_vllm_is_filled_once(use_fp8, micro, tmp_path):
    config = replace(micro, n_mtp_layers=1)
    values = config_to_hf(config, torch.bfloat16)
    values |= {"quantization_config": FP8_CONFIG} if use_fp8 else {}
    write_hf(tmp_path, randomize(Transformer(config)), values, torch.bfloat16, use_fp8)
    main: dict[str, list] = defaultdict(list)
    drafter: dict[str, list] = defaultdict(list)
    n = config.n_layers
    for name in TensorFiles(tmp_path).files:
        parameter, part = place(name, config)
        if name.startswith(f"model.layers.{n}."):
            drafter[drafter_name(parameter, n)].append(part)
        else:
            main[parameter].append(part)

    single = {None}
    want = {f"{x}.weight": single for x in ("model.embed_tokens", "model.norm", "lm_head")}
    for i in range(n):
        is_moe = i >= config.n_dense_layers
        want |= block_parameters(f"model.layers.{i}.", config, is_moe, use_fp8)
    want_drafter = block_parameters(f"model.layers.{n}.mtp_block.", config, True, use_fp8)
    own = ("enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head")
    want_drafter |= {f"model.layers.{n}.{x}.weight": single for x in own}
    want_drafter["model.embed_tokens.weight"] = single
    for got, expected in ((main, want), (drafter, want_drafter)):
        assert {name: set(parts) for name, parts in got.items()} == expected
        assert all(len(parts) == len(set(parts)) for parts in got.values())
