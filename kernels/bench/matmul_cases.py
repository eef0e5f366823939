"""Cases of matrix products: FP8 and bf16, of one weight and of a weight per expert."""

import torch
import torch.nn.functional as F
from dsv3_ref.kernels.bench.calls import (
    TORCH_BACKENDS,
    backward_vs_torch,
    expert_counts,
    leaf,
    randn,
    vs_torch,
    with_backends,
)
from dsv3_ref.kernels.bench.case import Call, Calls, Case, Goal, Sizes
from dsv3_ref.kernels.launch import BF16, num_blocks
from torch import Tensor

from dsv3_ref import fp8, moe

FP8_TOLERANCE = 0.08  # two operands with rounding errors of about 2.6 % each, against bf16

# ── One weight ──


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize with one scale per row, as torch._scaled_mm expects."""
    scale = x.float().abs().amax(1, keepdim=True) / fp8.E4M3_MAX
    return fp8.quantize(x.float(), scale), scale


def scaled_mm_call(x: Tensor, weight: Tensor) -> Call:
    """Return a call of torch._scaled_mm with one scale per row of x and of the weight."""
    (x_q, x_s), (w_q, w_s) = quantize_rows(x), quantize_rows(weight)
    return lambda: torch._scaled_mm(x_q, w_q.T, scale_a=x_s, scale_b=w_s.T, out_dtype=BF16)


def blockwise_scaled_mm_call(x_q: Tensor, x_s: Tensor, w_q: Tensor, w_s: Tensor) -> Call:
    """Return a call of torch's product with the same scales, which are stored column by column."""
    x_s, w_s = x_s.T.contiguous().T, w_s.T.contiguous().T

    def call() -> Tensor:
        recipe = F.ScalingType
        tiles, blocks = recipe.BlockWise1x128, recipe.BlockWise128x128
        return F.scaled_mm(x_q, w_q.T, x_s, tiles, w_s.T, blocks, output_dtype=BF16)

    return call


def case_fp8_gemm(m: int, n: int, k: int, goals: tuple[Goal, ...] = ()) -> Case:
    """Return the case of a linear layer's Fprop."""

    def make() -> Calls:
        x, w = randn(m, k), randn(n, k)
        args = *fp8.act_quant(x), *fp8.weight_quant(w)
        yardsticks = {
            "cuBLAS bf16": lambda: x @ w.T,
            "scaled_mm rows": scaled_mm_call(x, w),
            "scaled_mm blocks": blockwise_scaled_mm_call(*args),
        }
        return lambda: fp8.fp8_gemm(*args, BF16), yardsticks

    sizes = {"m": m, "n": n, "k": k}
    num_bytes = m * k + n * k + 2 * m * n + 4 * num_blocks(k) * (m + num_blocks(n))
    flops = 2 * m * n * k
    return Case("fp8_gemm", sizes, make, num_bytes, flops, "fp8", goals, tolerance=FP8_TOLERANCE)


def case_fp8_wgrad(m: int, n: int, k: int) -> Case:
    """Return the case of a linear layer's Wgrad."""

    def make() -> Calls:
        g, x = randn(m, n), randn(m, k)
        args = *fp8.act_quant_transposed(g), *fp8.act_quant_transposed(x)
        return lambda: fp8.fp8_gemm(*args), {"cuBLAS bf16": lambda: g.T @ x}

    sizes = {"m": m, "n": n, "k": k}
    num_bytes = num_blocks(m) * 132 * (n + k) + 4 * n * k
    flops = 2 * m * n * k
    return Case("fp8_gemm wgrad", sizes, make, num_bytes, flops, "fp8", tolerance=FP8_TOLERANCE)


# ── A weight per expert ──


def grouped_sizes(e: int, m: int, n: int, k: int, skewed: bool) -> Sizes:
    """Return the sizes of a grouped product."""
    return {"e": e, "m": m, "n": n, "k": k, "rows": "skewed" if skewed else "even"}


def case_fp8_grouped_gemm(
    e: int, m: int, n: int, k: int, skewed: bool, goals: tuple[Goal, ...] = ()
) -> Case:
    """Return the case of Fprop in FP8 for m rows of e experts."""

    def make() -> Calls:
        x, w = randn(m, k), randn(e, n, k)
        tokens_per_expert_e = expert_counts(e, m, skewed)
        args = *fp8.act_quant(x), *fp8.weight_quant(w), tokens_per_expert_e

        def bf16_product() -> Tensor:
            return moe.grouped_linear(x, w, tokens_per_expert_e)

        yardsticks = {
            "bf16 torch": with_backends(TORCH_BACKENDS, bf16_product),
            "bf16 triton": bf16_product,
        }
        return lambda: fp8.fp8_grouped_gemm(*args, BF16), yardsticks

    sizes = grouped_sizes(e, m, n, k, skewed)
    num_bytes = m * k + e * n * k + 2 * m * n + 4 * num_blocks(k) * (m + e * num_blocks(n))
    return Case(
        "fp8_grouped_gemm", sizes, make, num_bytes, 2 * m * n * k, "fp8", goals,
        tolerance=FP8_TOLERANCE,
    )  # fmt: skip


def case_fp8_grouped_wgrad(e: int, m: int, n: int, k: int, skewed: bool) -> Case:
    """Return the case of Wgrad in FP8 for m rows of e experts."""

    def make() -> Calls:
        g, x = randn(m, n), randn(m, k)
        tokens_per_expert_e = expert_counts(e, m, skewed)
        args = (
            *fp8.act_quant_transposed(g, tokens_per_expert_e),
            *fp8.act_quant_transposed(x, tokens_per_expert_e),
            tokens_per_expert_e,
        )
        end_e = tokens_per_expert_e.cumsum(0).to(torch.int32)
        yardsticks: dict[str, Call] = {"bf16 torch": lambda: F.grouped_mm(g.T, x, offs=end_e)}
        return lambda: fp8.fp8_grouped_wgrad(*args), yardsticks

    sizes = grouped_sizes(e, m, n, k, skewed)
    num_bytes = num_blocks(m) * 132 * (n + k) + 4 * e * n * k
    flops = 2 * m * n * k
    return Case("fp8_grouped_wgrad", sizes, make, num_bytes, flops, "fp8", tolerance=FP8_TOLERANCE)


def case_grouped_linear(e: int, m: int, n: int, k: int, skewed: bool) -> Case:
    """Return the case of Fprop in bf16 for m rows of e experts."""

    def make() -> Calls:
        x, w = randn(m, k), randn(e, n, k)
        tokens_per_expert_e = expert_counts(e, m, skewed)
        return vs_torch(lambda: moe.grouped_linear(x, w, tokens_per_expert_e))

    sizes = grouped_sizes(e, m, n, k, skewed)
    return Case("grouped_linear", sizes, make, 2 * (m * k + e * n * k + m * n), 2 * m * n * k)


def case_grouped_linear_backward(e: int, m: int, n: int, k: int, skewed: bool) -> Case:
    """Return the case of Dgrad and Wgrad in bf16 for m rows of e experts."""

    def make() -> Calls:
        tokens_per_expert_e = expert_counts(e, m, skewed)

        def product(x: Tensor, w: Tensor) -> Tensor:
            return moe.grouped_linear(x, w, tokens_per_expert_e)

        return backward_vs_torch(product, leaf(m, k), leaf(e, n, k))

    sizes = grouped_sizes(e, m, n, k, skewed)
    num_bytes = 2 * (m * n + 2 * (e * n * k + m * k))
    return Case("grouped_linear backward", sizes, make, num_bytes, 4 * m * n * k)
