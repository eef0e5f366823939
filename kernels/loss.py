"""Cross-entropy straight from the hidden state: a kernel between products that cuBLAS does best.

Logits of a chunk of tokens exist at a time; the kernel turns them into their own gradient, in
place. At V3's width the three products around it take some thirty times as long.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from dsv3_ref.kernels.launch import BF16, FLOATS, FP32, AOTCase, check_tensor
from dsv3_ref.ops import impl

MAX_LOGITS = 2**28  # at a time: 2048 tokens of a vocabulary of 129,280, in bf16 half a gigabyte


# ── Logits to gradient ──


@triton.autotune(
    [triton.Config({"BLOCK_W": w}, num_warps=n) for w, n in ((4096, 8), (4096, 16), (8192, 16))],
    key=["w", "GRADIENT"],
    restore_value=["logit_ptr"],
)
@triton.jit
def _cross_entropy_kernel(
    logit_ptr, target_ptr, nll_ptr, w, stride, GRADIENT: tl.constexpr, BLOCK_W: tl.constexpr
):
    """A token's −log p[target]; with GRADIENT its logits become p − [w = target], in place.

    The second pass goes backwards: what was read last is still in the cache.
    """
    token = tl.program_id(0)
    logit_ptr += token.to(tl.int64) * stride
    target = tl.load(target_ptr + token)
    known = (target >= 0) & (target < w)
    right = tl.load(logit_ptr + target, mask=known, other=float("nan")).to(tl.float32)
    col = tl.arange(0, BLOCK_W)
    m_i, sum_w = -1e30, tl.zeros((BLOCK_W,), tl.float32)
    for start in range(0, w, BLOCK_W):
        x = tl.load(logit_ptr + start + col, mask=start + col < w, other=-float("inf"))
        x = x.to(tl.float32)
        m_new = tl.maximum(m_i, tl.max(x, 0))
        sum_w = sum_w * tl.exp(m_i - m_new) + tl.exp(x - m_new)
        m_i = m_new
    total = tl.sum(sum_w, 0)
    tl.store(nll_ptr + token, tl.log(total) + (m_i - right))
    if GRADIENT:
        inverse = tl.where(known, 1 / total, float("nan"))
        blocks = tl.cdiv(w, BLOCK_W)
        for i in range(blocks):
            at = (blocks - 1 - i) * BLOCK_W + col
            x = tl.load(logit_ptr + at, mask=at < w, other=-float("inf")).to(tl.float32)
            p = tl.exp(x - m_i) * inverse - (at == target).to(tl.float32)
            tl.store(logit_ptr + at, p.to(logit_ptr.dtype.element_ty), mask=at < w)


def add_product_(sum_wd, g_nw, h_nd) -> None:
    """Σ_wd += gᵀ h, summed in fp32 where it lies: no product of that size beside it."""
    if sum_wd.is_cuda and g_nw.dtype == BF16:
        torch.addmm(sum_wd, g_nw.T, h_nd, out_dtype=FP32, out=sum_wd)
    else:
        sum_wd.addmm_(g_nw.T.to(FP32), h_nd.to(FP32))


# ── The op ──


class ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and both gradients in one pass; of the logits MAX_LOGITS exist at a time."""

    @staticmethod
    def forward(ctx, h_nd, head_wd, target_n, dtype, gradient):
        h, head, (w, _) = h_nd.to(dtype), head_wd.to(dtype), head_wd.shape
        need_h, need_head = (gradient and need for need in ctx.needs_input_grad[:2])
        dh_nd = torch.empty_like(h) if need_h else None
        dw_wd = torch.zeros_like(head, dtype=FP32) if need_head else None
        nll_n = h.new_empty(n := len(h), dtype=FP32)
        rows = -(-n // max(1, -(-n // max(1, MAX_LOGITS // w))))  # in chunks of equal length
        for at in (slice(a, a + rows) for a in range(0, n, rows or 1)):
            logit_nw = F.linear(h[at], head)
            args = logit_nw, target_n[at], nll_n[at], w, logit_nw.stride(0)
            _cross_entropy_kernel[len(logit_nw),](*args, GRADIENT=need_h or need_head)
            if need_h:
                torch.mm(logit_nw, head, out=dh_nd[at])
            if need_head:
                add_product_(dw_wd, logit_nw, h[at])
        grads = (dh_nd, h_nd), (dw_wd, head_wd)
        ctx.save_for_backward(*(g if g is None else g.to(x.dtype) for g, x in grads))
        return nll_n.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        dh_nd, dw_wd = (x if x is None else x * g for x in ctx.saved_tensors)
        return dh_nd, dw_wd, None, None, None


@impl("linear_cross_entropy", "triton")
def linear_cross_entropy(h_nd, head_wd, target_n):
    """Sum over tokens of −log softmax(h Wᵀ)[target], in nats.

    A target outside of the vocabulary raises on a CPU; a GPU does not wait to look, but makes the
    loss and the token's gradient NaN.
    """
    device = h_nd.device.type
    cast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if cast else h_nd.dtype
    check_tensor("h_nd", h_nd, (None, None), FLOATS, contiguous=False)
    like = FLOATS if cast else (h_nd.dtype,)
    check_tensor("head_wd", head_wd, (None, h_nd.shape[1]), like, contiguous=False)
    target_n = target_n.contiguous()
    check_tensor("target_n", target_n, (len(h_nd),), (torch.int64, torch.int32))
    w = len(head_wd)
    if device == "cpu" and ((target_n < 0) | (target_n >= w)).any():
        raise ValueError(f"target_n must lie within the vocabulary of {w}")
    with torch.autocast(device, enabled=False):
        args = h_nd, head_wd, target_n, dtype, torch.is_grad_enabled()
        return ChunkedCrossEntropy.apply(*args)


# ── For the compiler: V3's shapes ──

AOT_CASES = [
    AOTCase(
        f"cross_entropy{name}",
        _cross_entropy_kernel,
        (dtype, torch.int64, FP32, 129280, 129280),
        {"GRADIENT": gradient},
    )
    for name, dtype, gradient in (("", BF16, True), ("_only", BF16, False), ("_fp32", FP32, True))
]
