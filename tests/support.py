"""Random Hugging Face models, small and with nothing left at its starting value."""

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from dsv3_ref.model import KVCache, Transformer

HF = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 40,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 24,
    "v_head_dim": 16,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "num_nextn_predict_layers": 0,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 2.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


@torch.no_grad()
def randomize(model, bias_mean: float = 0.0):
    """Norms around 1, gate biases around `bias_mean` and wide enough to change choices."""
    for name, t in model.state_dict().items():
        if "bias" in name:
            t.normal_(bias_mean, 0.3)
        elif t.ndim == 1:
            t.uniform_(0.5, 1.5)
        else:
            t.normal_(0.0, 0.1)
    return model.eval()


def hf_model(bias_mean: float = 0.0, **changes):
    """A random transformers model; `changes` are fields of its config."""
    return randomize(DeepseekV3ForCausalLM(DeepseekV3Config(**HF | changes)), bias_mean)


@torch.no_grad()
def decode(model: Transformer, tokens_bs, chunks: list[int]):
    """All logits, computed on the cache in pieces of these lengths, then one by one."""
    b, s = tokens_bs.shape
    cache = KVCache(model.config, b, s)
    pieces = tokens_bs.split([*chunks, *[1] * (s - sum(chunks))], dim=1)
    return torch.cat([model(piece, cache) for piece in pieces], dim=1)
