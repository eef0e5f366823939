"""A whole model on the kernels: losses and gradients of one step, in high precision and in FP8."""

from copy import deepcopy
from dataclasses import replace

import interpreter  # noqa: F401  first: makes Triton's interpreter round as a GPU does
import pytest
import torch

from dsv3_ref import ops
from dsv3_ref.model import Transformer
from dsv3_ref.pretrain import compute_losses

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("recipe, bound", [((), 1e-4), (("fp8",), 2e-2)], ids=["fp32", "fp8"])
def test_a_step_on_kernels_equals_that_of_the_references(micro, recipe, bound):
    config = replace(micro, n_layers=2, n_mtp_layers=1, dim=32, inter_dim=48, moe_inter_dim=16)
    start = Transformer(config).to(DEVICE)
    tokens_bs = torch.randint(config.vocab_size, (2, 12), device=DEVICE)
    results = []
    for backends in (("torch",), ("triton", "torch")):
        model = deepcopy(start)
        with ops.use(*recipe, *backends):
            parts = compute_losses(model, tokens_bs)
            parts.total(0.3, 1e-4).backward()
        topk_ids = [route.topk_ids_bsk for route in parts.routes]
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((parts.main.item(), topk_ids, grads))
    (want_loss, want_ids, want_grad), (loss, ids, grad) = results
    assert all(torch.equal(a.sort().values, b.sort().values) for a, b in zip(ids, want_ids))
    assert loss == pytest.approx(want_loss, rel=bound)
    assert (grad - want_grad).norm() < bound * want_grad.norm()
