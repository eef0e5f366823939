"""Cases of whole layers: head with cross-entropy, and a training step of an MoE layer."""

from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import torch
from dsv3_ref.kernels.bench import calls
from dsv3_ref.kernels.bench.calls import TORCH_BACKENDS, leaf, randn, vs_torch, with_backends
from dsv3_ref.kernels.bench.case import Call, Calls, Case, Goal
from dsv3_ref.kernels.launch import BF16
from torch import Tensor, nn

from dsv3_ref import moe, ops
from dsv3_ref.config import V3


def liger_cross_entropy_call(h_nd: Tensor, head_wd: Tensor, target_n: Tensor) -> Call:
    """Return a call of Liger's fused loss and both of its gradients."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda: torch.autograd.grad(loss(head_wd, h_nd, target_n), (h_nd, head_wd))


def case_linear_cross_entropy(n: int, d: int, w: int) -> Case:
    """Return the case of the loss of n tokens and of both gradients."""

    def make() -> Calls:
        h_nd, head_wd = leaf(n, d), leaf(w, d)
        target_n = torch.randint(w, (n,))

        def gradients() -> tuple[Tensor, ...]:
            loss = ops.linear_cross_entropy(h_nd, head_wd, target_n)
            return torch.autograd.grad(loss, (h_nd, head_wd))

        call, yardsticks = vs_torch(gradients)
        if find_spec("liger_kernel"):
            yardsticks["Liger"] = liger_cross_entropy_call(h_nd, head_wd, target_n)
        return call, yardsticks

    sizes = {"n": n, "d": d, "w": w}
    return Case("linear_cross_entropy", sizes, make, 4 * (n * d + w * d), 6 * n * d * w)


def case_cross_entropy_and_grads(n: int, d: int, w: int) -> Case:
    """Return the case of the loss whose head gradient is added to that of earlier tokens, in fp32.

    The buffer is made by each call, so that its results can be compared.
    """

    def make() -> Calls:
        h_nd, head_wd = randn(n, d), randn(w, d)
        target_n = torch.randint(w, (n,))

        def gradients() -> tuple[Tensor, ...]:
            head_grad_wd = torch.zeros(w, d)
            nll, dh_nd = ops.cross_entropy_and_grads(h_nd, head_wd, target_n, 1.0, head_grad_wd)
            return nll, dh_nd, head_grad_wd

        return vs_torch(gradients)

    sizes = {"n": n, "d": d, "w": w}
    num_bytes = 4 * n * d + 2 * w * d + 4 * w * d
    return Case("cross_entropy_and_grads", sizes, make, num_bytes, 6 * n * d * w)


def layer_gradients(layer: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """Run a layer forward and backward; return the gradients of x and of the parameters.

    The layer reads x as a new tensor, since FP8 would reuse the cached quantized form of x.
    """
    with torch.autocast(x.device.type, BF16):
        y = layer(x.view_as(x))[0]
    return torch.autograd.grad(y, [x, *layer.parameters()], g)


def case_moe_step(b: int, s: int, e: int, d: int, f: int, goals: tuple[Goal, ...] = ()) -> Case:
    """Return the case of a training step of an MoE layer in FP8 with fp32 weights.

    Its yardsticks are the same step in bf16.
    """
    config = replace(V3, n_routed_experts=e, dim=d, moe_inter_dim=f)

    def make() -> Calls:
        layer, x = moe.MoE(config), leaf(b, s, d)
        for p in layer.parameters():
            nn.init.normal_(p, std=config.init_std)
        step = partial(layer_gradients, layer, x, randn(b, s, d))
        yardsticks = {
            "bf16 triton": with_backends(calls.KERNEL_BACKENDS, step),
            "bf16 torch": with_backends(TORCH_BACKENDS, step),
        }
        return with_backends(("fp8", *calls.KERNEL_BACKENDS), step), yardsticks

    active = (config.n_activated_experts + config.n_shared_experts) * 3 * d * f + e * d
    weights = (e + config.n_shared_experts) * 3 * d * f + e * d
    sizes = {"b": b, "s": s, "e": e, "d": d, "f": f}
    num_bytes = 8 * weights + 8 * b * s * d
    note = f"{e} routed experts instead of {V3.n_routed_experts}"
    return Case(
        "moe_step", sizes, make, num_bytes, 6 * b * s * active, "fp8", goals, note=note,
        tolerance=0.2,  # of a gradient behind several products in FP8
    )  # fmt: skip
