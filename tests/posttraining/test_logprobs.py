"""Log-probabilities in chunks beside those of all logits at once, forward and backward."""

import math

import pytest
import torch

from dsv3_ref.grpo import token_logprobs
from dsv3_ref.ops import CE_CHUNK_TOKENS
from dsv3_ref.posttraining.logprobs import chunked_logprobs


@pytest.mark.parametrize("n", [0, 1, 513, 1100])
def test_chunks_of_logits_are_all_logits(n):
    torch.manual_seed(n)
    h = torch.randn(n, 6, dtype=torch.double, requires_grad=True)
    w = torch.randn(11, 6, dtype=torch.double, requires_grad=True)
    y, t = torch.randint(11, (n,)), 0.6
    for x, z in zip(chunked_logprobs(h, w, y, t), token_logprobs(h, w, y, t)):
        assert torch.allclose(x, z)
        for got, right in zip(
            *(torch.autograd.grad(v.sum(), (h, w), retain_graph=True) for v in (x, z))
        ):
            assert torch.allclose(got, right)


def test_without_a_temperature_the_probabilities_are_the_models():
    h_nd, head_wd = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    logp_n, entropy_n = chunked_logprobs(h_nd, head_wd, torch.tensor([1]))
    p = 1 / (1 + math.exp(-1))  # of two logits that differ by 1
    assert logp_n.item() == pytest.approx(math.log(p))
    assert entropy_n.item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p))


def test_no_more_logits_than_those_of_a_chunk_are_saved():
    """What autograd saves of 4,000 tokens is their hidden states, not their logits."""
    h = torch.randn(4000, 6, requires_grad=True)
    w = torch.randn(1000, 6, requires_grad=True)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: sizes.append(x.numel()) or x, lambda x: x
    ):
        logp_n, _ = chunked_logprobs(h, w, torch.zeros(4000, dtype=torch.long))
    assert max(sizes) <= max(h.numel(), w.numel(), CE_CHUNK_TOKENS * 6)
    logp_n.sum().backward()
    assert h.grad.isfinite().all()
