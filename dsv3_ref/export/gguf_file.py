"""A model as one GGUF file, for llama.cpp and what is built on it: the architecture `deepseek2`.

Norms, gates and biases are fp32. MTP modules are left out: llama.cpp does not read them.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor

from dsv3_ref.checkpoints.native import WeightReader, read_whole
from dsv3_ref.checkpoints.storage import whole_ranges
from dsv3_ref.config import Config, UserError
from dsv3_ref.data.tokenizer import new_tokenizer

ARCHITECTURE = "deepseek2"
NAMES = {  # ours, llama.cpp's; L a layer
    "embed.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "head.weight": "output.weight",
    "L.attn_norm.weight": "attn_norm.weight",
    "L.attn.wq.weight": "attn_q.weight",
    "L.attn.wq_a.weight": "attn_q_a.weight",
    "L.attn.q_norm.weight": "attn_q_a_norm.weight",
    "L.attn.wq_b.weight": "attn_q_b.weight",
    "L.attn.wkv_a.weight": "attn_kv_a_mqa.weight",
    "L.attn.kv_norm.weight": "attn_kv_a_norm.weight",
    "L.attn.wo.weight": "attn_output.weight",
    "L.ffn_norm.weight": "ffn_norm.weight",
    "L.ffn.w1.weight": "ffn_gate.weight",
    "L.ffn.w2.weight": "ffn_down.weight",
    "L.ffn.w3.weight": "ffn_up.weight",
    "L.ffn.gate.weight": "ffn_gate_inp.weight",
    "L.ffn.gate.bias": "exp_probs_b.bias",
    "L.ffn.experts.w1": "ffn_gate_exps.weight",
    "L.ffn.experts.w2": "ffn_down_exps.weight",
    "L.ffn.experts.w3": "ffn_up_exps.weight",
    "L.ffn.shared_experts.w1.weight": "ffn_gate_shexp.weight",
    "L.ffn.shared_experts.w2.weight": "ffn_down_shexp.weight",
    "L.ffn.shared_experts.w3.weight": "ffn_up_shexp.weight",
}
NORMAL, CONTROL = 1, 3  # kinds of tokens
USER_DEFINED, UNUSED = 4, 5
SOFTMAX, SIGMOID = 1, 2  # kinds of gates
Q8_0_BLOCK = 32  # numbers that share a scale
INSTALL = "--gguf needs the package gguf: pip install 'dsv3-ref[gguf]'"


def write_gguf(
    path: Path, reader: WeightReader, tokenizer: Tokenizer, special_ids: dict[str, int],
    adds_bos: bool, chat_template: str | None, kind: str,
) -> None:  # fmt: skip
    """Write the weights of a checkpoint and its tokenizer as a GGUF file.

    One matrix or expert is in memory at a time. special_ids: `bos_token_id` and so on. adds_bos:
    each text begins with the begin token. kind: bf16, f16 or q8_0, of the matrices. Raise a
    `UserError` if llama.cpp cannot compute this model, or split texts as its tokenizer does.
    """
    try:
        import gguf
    except ImportError:
        raise UserError(INSTALL) from None
    config = reader.config
    check_shape(config)
    vocabulary = read_vocabulary(tokenizer, config.vocab_size)
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    add_hyperparameters(writer, config)
    add_vocabulary(writer, vocabulary, special_ids, adds_bos, chat_template)
    add_tensors(writer, list(gguf_tensors(reader)), kind)
    writer.close()


# ── What llama.cpp can compute ──


def check_shape(config: Config) -> None:
    """Raise a `UserError` for a model that llama.cpp would compute in another way or not load."""
    lite = config.n_layers in (26, 27) or (config.n_layers == 48 and config.vocab_size == 128_256)
    if lite and config.q_lora_rank:
        raise UserError(
            f"llama.cpp takes a model of {config.n_layers} layers for one without query latent, "
            "and cannot load this one: use the exported directory"
        )
    if not config.n_shared_experts:
        raise UserError("llama.cpp needs a shared expert: use the exported directory")
    if config.n_expert_groups == config.n_routed_experts > 1:
        raise UserError("llama.cpp needs two experts in each group: use the exported directory")


def find_differences(config: Config) -> list[str]:
    """Return a sentence for each way in which llama.cpp computes this model differently."""
    notes = []
    if config.norm_eps != 1e-6:
        notes.append(
            f"llama.cpp uses ε = {config.norm_eps} in the norms of latents, too (not 1e-6)"
        )
    if config.score_func == "softmax" and config.n_expert_groups > 1:
        notes.append("llama.cpp chooses groups by their two best experts (not by the best one)")
    return notes


def add_hyperparameters(writer: Any, config: Config) -> None:
    """Write shape, router and RoPE as llama.cpp's metadata."""
    writer.add_context_length(config.max_seq_len)
    writer.add_block_count(config.n_layers)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.inter_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(1)  # the latent
    writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    add_experts(writer, config)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_factor > 1:
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(config.rope_factor)
        writer.add_rope_scaling_orig_ctx_len(config.original_seq_len)
        writer.add_rope_scaling_yarn_beta_fast(config.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(config.beta_slow)
        writer.add_rope_scaling_yarn_log_mul(0.1 * config.mscale)


def add_experts(writer: Any, config: Config) -> None:
    """Write the experts and their router as llama.cpp's metadata."""
    from gguf import ExpertGatingFuncType

    is_sigmoid = config.score_func == "sigmoid"
    writer.add_leading_dense_block_count(config.n_dense_layers)
    writer.add_expert_feed_forward_length(config.moe_inter_dim)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.n_activated_experts)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_group_count(config.n_expert_groups)
    writer.add_expert_group_used_count(config.n_limited_groups)
    writer.add_expert_weights_scale(config.route_scale)
    writer.add_expert_weights_norm(is_sigmoid)
    writer.add_expert_gating_func(ExpertGatingFuncType(SIGMOID if is_sigmoid else SOFTMAX))


# ── The vocabulary ──


def read_vocabulary(tokenizer: Tokenizer, size: int) -> dict[str, list]:
    """Return tokens, their kinds and the merges; raise a `UserError` for another kind of tokenizer.

    size: rows of the embedding; those without a token are filled.
    """
    values, own = (json.loads(t.to_str()) for t in (tokenizer, new_tokenizer()))
    is_like_v3 = values["model"]["type"] == "BPE" and not changes_texts(values["normalizer"])
    if not is_like_v3 or values["pre_tokenizer"] != own["pre_tokenizer"]:
        raise UserError(
            "the tokenizer does not split texts like V3's, the only way that --gguf can express: "
            "export a directory and convert that with llama.cpp's convert_hf_to_gguf.py"
        )
    tokens = [f"[PAD{i}]" for i in range(size)]
    kinds = [UNUSED] * size
    for token, i in tokenizer.get_vocab().items():
        tokens[i], kinds[i] = token, NORMAL
    for i, added in tokenizer.get_added_tokens_decoder().items():
        kinds[i] = CONTROL if added.special else USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in values["model"]["merges"]]
    return {"tokens": tokens, "kinds": kinds, "merges": merges}


def changes_texts(normalizer: dict[str, Any] | None) -> bool:
    """Return whether a tokenizer changes a text before it splits it, which V3's does not."""
    return bool(normalizer) and normalizer != {"type": "Sequence", "normalizers": []}


def add_vocabulary(
    writer: Any, vocabulary: dict[str, list], special_ids: dict[str, int], adds_bos: bool,
    chat_template: str | None,
) -> None:  # fmt: skip
    """Write the tokenizer and the chat template."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("deepseek-v3")
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["kinds"])
    writer.add_token_merges(vocabulary["merges"])
    adders = {
        "bos_token_id": writer.add_bos_token_id,
        "eos_token_id": writer.add_eos_token_id,
        "pad_token_id": writer.add_pad_token_id,
    }
    for name, add in adders.items():
        if name in special_ids:
            add(special_ids[name])
    writer.add_add_bos_token(adds_bos and "bos_token_id" in special_ids)
    if chat_template:
        writer.add_chat_template(chat_template)


# ── Tensors ──


class GGUFTensor(NamedTuple):
    """A tensor of llama.cpp: its shape, and functions that read its parts, such as experts."""

    name: str
    shape: tuple[int, ...]
    parts: Sequence[Callable[[], Tensor]]


def key_half(x: Tensor, config: Config) -> Tensor:
    """Return W^UK of wkv_b, transposed by head, (h, c, i)."""
    return split_by_head(x, config)[0].transpose(1, 2)


def value_half(x: Tensor, config: Config) -> Tensor:
    """Return W^UV of wkv_b by head, (h, v, c)."""
    return split_by_head(x, config)[1]


def split_by_head(x: Tensor, config: Config) -> tuple[Tensor, ...]:
    """Return the two halves of wkv_b by head, (h, i, c) and (h, v, c)."""
    x_hxc = x.view(config.n_heads, -1, config.kv_lora_rank)
    return x_hxc.tensor_split([config.qk_nope_head_dim], dim=1)


def gguf_tensors(reader: WeightReader) -> Iterator[GGUFTensor]:
    """Yield each of llama.cpp's tensors; wkv_b is two of them."""
    for name, x in reader.expected.items():
        if name.startswith("mtp."):
            continue
        parts = name.split(".")
        is_layer = parts[0] == "layers"
        prefix = f"blk.{parts[1]}." if is_layer else ""
        key = ".".join(["L", *parts[2:]]) if is_layer else name
        dtype = reader.target_dtype(name)
        reads = [
            partial(read_whole, reader, part_name, part.shape, dtype)
            for part_name, part in whole_ranges(name, x).items()
        ]
        if key != "L.attn.wkv_b.weight":
            yield GGUFTensor(prefix + NAMES[key], tuple(x.shape), reads)
            continue
        for half, take in (("attn_k_b", key_half), ("attn_v_b", value_half)):
            read = partial(read_half, take, reads[0], reader.config)
            yield GGUFTensor(f"{prefix}{half}.weight", tuple(take(x, reader.config).shape), [read])


def read_half(
    take: Callable[[Tensor, Config], Tensor], read: Callable[[], Tensor], config: Config
) -> Tensor:
    """Return take(…) of the tensor that `read` returns."""
    return take(read(), config)


def stored_kind(tensor: GGUFTensor, kind: str) -> str:
    """Return how a tensor is stored: a vector or a gate in fp32, a matrix as `kind`.

    Rows that have no whole number of q8_0's blocks are stored in f16, as llama.cpp does.
    """
    if len(tensor.shape) == 1 or "ffn_gate_inp" in tensor.name:
        return "F32"
    if kind == "q8_0" and tensor.shape[-1] % Q8_0_BLOCK:
        return "F16"
    return kind.upper()


@dataclass
class LazyValues:
    """The values of a tensor for gguf's writer, which are read and converted part by part."""

    tensor: GGUFTensor
    stored: Any  # gguf's type of a quantized number
    nbytes: int

    def tofile(self, file: IO[bytes]) -> None:
        """Write all parts to a file."""
        import gguf

        for read in self.tensor.parts:
            values = read().float().contiguous().numpy()
            gguf.quants.quantize(values, self.stored).tofile(file)


def add_tensors(writer: Any, tensors: list[GGUFTensor], kind: str) -> None:
    """Write all tensors, one after another."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    file_types = {"bf16": "MOSTLY_BF16", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[file_types[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    values = []
    for tensor in tensors:
        stored = kinds[stored_kind(tensor, kind)]
        block, block_bytes = gguf.GGML_QUANT_SIZES[stored]
        nbytes = prod(tensor.shape) // block * block_bytes
        values.append(LazyValues(tensor, stored, nbytes))
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), nbytes, raw_dtype=stored
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for x in values:
        writer.write_tensor_data(x)
