"""RMSNorm, SwiGLU, rotary embedding and cross-entropy with gradients by hand.

Autograd would save the result of every small step of a formula. These functions save only their
inputs (§3.2.3) and work in place on tensors that they allocated.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

import dsv3_ref.rope  # noqa: F401 (defines an op)
from dsv3_ref.ops import CE_CHUNK_TOKENS, impl, upcast

# ── RMSNorm ──


class RMSNormFunction(torch.autograd.Function):
    """RMSNorm that saves x and 1/ρ: ∂L/∂x = (a − x̂·mean(a·x̂))/ρ with a = g·weight, x̂ = x/ρ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = upcast(x)
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, rstd)
        return (wide * rstd).mul_(weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, rstd = ctx.saved_tensors
        unit, g = upcast(x) * rstd, upcast(g)
        dweight = (g * unit).sum_to_size(weight.shape)
        a = g * weight
        along = (a * unit).mean(-1, keepdim=True)
        dx = a.sub_(unit.mul_(along)).mul_(rstd).to(x.dtype)
        return dx, dweight.to(weight.dtype), None, None


@impl("rms_norm", "cpu")
def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """Divide x by the root mean square of its last axis and multiply by weight."""
    if torch.is_grad_enabled():
        return RMSNormFunction.apply(x, weight, eps, dtype or x.dtype)
    wide = upcast(x)
    return F.rms_norm(wide, weight.shape, weight.to(wide.dtype), eps).to(dtype or x.dtype)


# ── SwiGLU ──


class SwiGLUFunction(torch.autograd.Function):
    """SwiGLU that saves only its two inputs."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(g * up, gate), F.silu(gate).mul_(g)


@impl("swiglu", "cpu")
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Gate one vector by another: gate · σ(gate) · up."""
    return SwiGLUFunction.apply(gate, up) if torch.is_grad_enabled() else F.silu(gate).mul_(up)


# ── Rotary embedding ──


def rotate_as_complex(x_bshr: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs as complex numbers: one product in place of four."""
    x = torch.view_as_complex(x_bshr.float().unflatten(-1, (-1, 2)).contiguous())
    rotated = x * torch.complex(cos, sin)[:, None]  # the same for every head
    return torch.view_as_real(rotated).flatten(-2).to(x_bshr.dtype)


class RotaryFunction(torch.autograd.Function):
    """A rotation that saves only its tables, which all layers share; its gradient rotates back."""

    @staticmethod
    def forward(ctx: Any, x_bshr: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate_as_complex(x_bshr, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_bshr: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotate_as_complex(g_bshr, cos, -sin), None, None


@impl("apply_rotary_emb", "cpu")
def apply_rotary_emb(x_bshr: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs (x₀, x₁) by their angles; cos and sin are (s, r/2) in fp32."""
    if torch.is_grad_enabled():
        return RotaryFunction.apply(x_bshr, cos, sin)
    return rotate_as_complex(x_bshr, cos, sin)


# ── Cross-entropy straight from the hidden state ──


def cross_entropy_and_grad_(logit_nw: Tensor, target_n: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ −log p[target] in nats and ∂L/∂logit = p − [w = target]; overwrite the logits."""
    wide_nw, target_n1 = upcast(logit_nw), target_n[:, None]
    max_n1 = wide_nw.amax(1, keepdim=True)
    right_n1 = wide_nw.gather(1, target_n1)
    sum_n1 = wide_nw.sub_(max_n1).exp_().sum(1, keepdim=True)
    nll = (sum_n1.log() + max_n1 - right_n1).sum()
    wide_nw.mul_(sum_n1.reciprocal()).scatter_add_(1, target_n1, -torch.ones_like(right_n1))
    return nll, wide_nw.to(logit_nw.dtype)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy with both gradients in one pass over chunks of CE_CHUNK_TOKENS tokens."""

    @staticmethod
    def forward(ctx: Any, h_nd: Tensor, head_wd: Tensor, target_n: Tensor) -> Tensor:
        total = h_nd.new_zeros((), dtype=torch.float32)
        dh, dw_wd = [], torch.zeros_like(head_wd)
        for h, target in zip(h_nd.split(CE_CHUNK_TOKENS), target_n.split(CE_CHUNK_TOKENS)):
            nll, g_nw = cross_entropy_and_grad_(F.linear(h, head_wd), target)
            total = total + nll
            if any(ctx.needs_input_grad):
                dh.append((g_nw @ head_wd).to(h_nd.dtype))
                dw_wd += g_nw.T @ h
        ctx.save_for_backward(torch.cat(dh) if dh else None, dw_wd)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        dh_nd, dw_wd = ctx.saved_tensors
        return dh_nd * g, dw_wd * g, None


@impl("cross_entropy_and_grads", "cpu")
@torch.no_grad()
def cross_entropy_and_grads(
    h_nd: Tensor, head_wd: Tensor, target_n: Tensor, scale: float, head_grad_wd: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the loss and its scaled gradient; add that of the head to head_grad_wd by chunks."""
    total, dh_nd = h_nd.new_zeros((), dtype=torch.float32), torch.empty_like(h_nd)
    for start in range(0, len(h_nd), CE_CHUNK_TOKENS):
        chunk = slice(start, start + CE_CHUNK_TOKENS)
        nll, g_nw = cross_entropy_and_grad_(F.linear(h_nd[chunk], head_wd), target_n[chunk])
        total = total + nll
        dh_nd[chunk] = (g_nw @ head_wd).mul_(scale)
        head_grad_wd.add_(g_nw.T @ h_nd[chunk], alpha=scale)
    return total, dh_nd


@impl("linear_cross_entropy", "cpu")
def linear_cross_entropy(h_nd: Tensor, head_wd: Tensor, target_n: Tensor) -> Tensor:
    """Return the sum over tokens of −log softmax(h Wᵀ)[target], in nats."""
    return ChunkedCrossEntropy.apply(h_nd, head_wd, target_n)
