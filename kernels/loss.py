"""Cross-entropy from hidden states: a kernel between matrix products that cuBLAS computes.

Only the logits of one chunk of tokens exist at a time. The kernel overwrites them with their
gradient. At V3's width the three products around it take about thirty times as long.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from dsv3_ref.kernels.launch import (
    BF16,
    FLOATS,
    FP32,
    AOTCase,
    check_tensor,
    kernel_config,
    on_its_device,
)
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv3_ref.config import ceil_div
from dsv3_ref.ops import impl

# Logits that exist at a time: 2,076 tokens of V3's vocabulary of 129,280, half a gigabyte in bf16.
MAX_LOGITS = 2**28


# ── Logits to gradient ──


@triton.autotune(
    [kernel_config(warps, BLOCK_W=w) for w, warps in ((4096, 8), (4096, 16), (8192, 16))],
    key=["w", "GRADIENT"],
    restore_value=["logit_ptr"],
)
@triton.jit
def _cross_entropy_kernel(
    logit_ptr, target_ptr, nll_ptr, w, stride, GRADIENT: tl.constexpr, BLOCK_W: tl.constexpr
):
    """Compute −log p[target] of a token; with GRADIENT overwrite its logits with p − [w = target].

    The second pass runs backwards, since the logits read last are still in the cache.
    """
    token = tl.program_id(0)
    logit_ptr += token.to(tl.int64) * stride
    target = tl.load(target_ptr + token)
    in_vocab = (target >= 0) & (target < w)
    target_logit = tl.load(logit_ptr + target, mask=in_vocab, other=float("nan")).to(tl.float32)
    col = tl.arange(0, BLOCK_W)
    m_i, sum_w = -1e30, tl.zeros((BLOCK_W,), tl.float32)
    for start in range(0, w, BLOCK_W):
        x = tl.load(logit_ptr + start + col, mask=start + col < w, other=-float("inf"))
        x = x.to(tl.float32)
        m_new = tl.maximum(m_i, tl.max(x, 0))
        sum_w = sum_w * tl.exp(m_i - m_new) + tl.exp(x - m_new)
        m_i = m_new
    total = tl.sum(sum_w, 0)
    tl.store(nll_ptr + token, tl.log(total) + (m_i - target_logit))
    if GRADIENT:
        inverse = tl.where(in_vocab, 1 / total, float("nan"))
        blocks = tl.cdiv(w, BLOCK_W)
        for i in range(blocks):
            index = (blocks - 1 - i) * BLOCK_W + col
            x = tl.load(logit_ptr + index, mask=index < w, other=-float("inf")).to(tl.float32)
            p = tl.exp(x - m_i) * inverse - (index == target).to(tl.float32)
            tl.store(logit_ptr + index, p.to(logit_ptr.dtype.element_ty), mask=index < w)


def add_product_(sum_wd: Tensor, g_nw: Tensor, h_nd: Tensor, scale: float) -> None:
    """Add scale·gᵀ h to sum_wd in place and in fp32, without a second tensor of its size."""
    if sum_wd.is_cuda and g_nw.dtype == BF16:
        torch.addmm(sum_wd, g_nw.T, h_nd, out_dtype=FP32, alpha=scale, out=sum_wd)
    else:
        sum_wd.addmm_(g_nw.T.to(FP32), h_nd.to(FP32), alpha=scale)


# ── The op ──


def chunk_slices(n: int, max_rows: int) -> list[slice]:
    """Split n rows into the fewest chunks of at most max_rows, equal but for the last."""
    rows = ceil_div(n, max(1, ceil_div(n, max_rows)))
    return [slice(start, start + rows) for start in range(0, n, max(1, rows))]


def loss_by_chunks(
    h: Tensor, head: Tensor, target_n: Tensor, dh_nd: Tensor | None, dhead_wd: Tensor | None,
    scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """Return Σ −log p[target]; write scale·∂/∂h to dh_nd and add scale·∂/∂head to dhead_wd."""
    w, nll_n = len(head), h.new_empty(len(h), dtype=FP32)
    gradient = dh_nd is not None or dhead_wd is not None
    for chunk in chunk_slices(len(h), max(1, MAX_LOGITS // w)):
        logit_nw = F.linear(h[chunk], head)
        args = logit_nw, target_n[chunk], nll_n[chunk], w, logit_nw.stride(0)
        _cross_entropy_kernel[len(logit_nw),](*args, GRADIENT=gradient)
        if dh_nd is not None:
            torch.mm(logit_nw, head, out=dh_nd[chunk])
            if scale != 1:
                dh_nd[chunk] *= scale
        if dhead_wd is not None:
            add_product_(dhead_wd, logit_nw, h[chunk], scale)
    return nll_n.sum()


class TritonCrossEntropy(torch.autograd.Function):
    """Loss and both gradients in one forward pass; at most MAX_LOGITS logits exist at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        h_nd: Tensor,
        head_wd: Tensor,
        target_n: Tensor,
        dtype: torch.dtype,
        gradient: bool,
    ) -> Tensor:
        h, head = h_nd.to(dtype), head_wd.to(dtype)
        need_h, need_head = (gradient and need for need in ctx.needs_input_grad[:2])
        dh_nd = torch.empty_like(h) if need_h else None
        dhead_wd = torch.zeros_like(head, dtype=FP32) if need_head else None
        nll = loss_by_chunks(h, head, target_n, dh_nd, dhead_wd)
        grads = (dh_nd, h_nd), (dhead_wd, head_wd)
        ctx.save_for_backward(*(g if g is None else g.to(x.dtype) for g, x in grads))
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        dh_nd, dhead_wd = (x if x is None else x * g for x in ctx.saved_tensors)
        return dh_nd, dhead_wd, None, None, None


def check_loss_inputs(h_nd: Tensor, head_wd: Tensor, target_n: Tensor) -> torch.dtype:
    """Return the dtype of the products, or raise a `ValueError` for invalid arguments.

    Targets outside the vocabulary raise one on CPU. On GPU they are not checked, which would
    synchronize; instead the loss and the token's gradient become NaN.
    """
    device = h_nd.device.type
    cast = torch.is_autocast_enabled(device)
    check_tensor("h_nd", h_nd, (None, None), FLOATS, contiguous=False)
    head_dtypes = FLOATS if cast else (h_nd.dtype,)
    check_tensor("head_wd", head_wd, (None, h_nd.shape[1]), head_dtypes, contiguous=False)
    check_tensor("target_n", target_n, (len(h_nd),), (torch.int64, torch.int32))
    w = len(head_wd)
    if device == "cpu" and ((target_n < 0) | (target_n >= w)).any():
        raise ValueError(f"target_n must lie within the vocabulary of {w}")
    return torch.get_autocast_dtype(device) if cast else h_nd.dtype


@impl("linear_cross_entropy", "triton")
@on_its_device
def linear_cross_entropy(h_nd: Tensor, head_wd: Tensor, target_n: Tensor) -> Tensor:
    """Sum −log softmax(h Wᵀ)[target] over tokens, in nats."""
    target_n = target_n.contiguous()
    dtype = check_loss_inputs(h_nd, head_wd, target_n)
    with torch.autocast(h_nd.device.type, enabled=False):
        args = h_nd, head_wd, target_n, dtype, torch.is_grad_enabled()
        return TritonCrossEntropy.apply(*args)


@impl("cross_entropy_and_grads", "triton")
@on_its_device
@torch.no_grad()
def cross_entropy_and_grads(
    h_nd: Tensor, head_wd: Tensor, target_n: Tensor, scale: float, head_grad_wd: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the loss and its scaled gradient; add that of the head to head_grad_wd by chunks."""
    target_n = target_n.contiguous()
    dtype = check_loss_inputs(h_nd, head_wd, target_n)
    check_tensor("head_grad_wd", head_grad_wd, head_wd.shape, (FP32,))
    with torch.autocast(h_nd.device.type, enabled=False):
        h, head = h_nd.to(dtype), head_wd.to(dtype)
        dh_nd = torch.empty_like(h)
        nll = loss_by_chunks(h, head, target_n, dh_nd, head_grad_wd, scale)
    return nll, dh_nd.to(h_nd.dtype)


# ── For the ahead-of-time compiler: V3's shapes ──

CROSS_ENTROPY_VARIANTS = (("", BF16, True), ("_loss_only", BF16, False), ("_fp32", FP32, True))
AOT_CASES = [
    AOTCase(
        f"cross_entropy{suffix}",
        _cross_entropy_kernel,
        (dtype, torch.int64, FP32, 129280, 129280),
        {"GRADIENT": gradient},
    )
    for suffix, dtype, gradient in CROSS_ENTROPY_VARIANTS
]
