"""Log-probabilities of tokens without holding the logits of all of them."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dsv3_ref.grpo import token_logprobs
from dsv3_ref.ops import CE_CHUNK_TOKENS


def chunked_logprobs(
    h_nd: Tensor, head_wd: Tensor, y_n: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Compute `token_logprobs` of chapter 16 in chunks whose logits the backward pass recomputes.

    Memory for logits does not grow with n: at most `CE_CHUNK_TOKENS` rows exist at a time.
    """
    logprobs, entropies = [], []
    for chunk_nd, y_chunk_n in zip(h_nd.split(CE_CHUNK_TOKENS), y_n.split(CE_CHUNK_TOKENS)):
        logp_n, entropy_n = checkpoint(
            token_logprobs, chunk_nd, head_wd, y_chunk_n, temperature, use_reentrant=False
        )
        logprobs.append(logp_n)
        entropies.append(entropy_n)
    return torch.cat(logprobs), torch.cat(entropies)
