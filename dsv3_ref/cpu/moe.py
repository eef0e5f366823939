"""Grouped products in one call; permutation to the experts and back as gathers and row sums."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

import dsv3_ref.moe  # noqa: F401 (defines the ops)
from dsv3_ref.ops import impl


@impl("grouped_linear", "cpu")
def grouped_linear(x_mi: Tensor, weight_eoi: Tensor, tokens_per_expert_e: Tensor) -> Tensor:
    """Multiply rows sorted by expert by their expert's matrix.

    There is no form for fp64, and rows must be multiples of 16 bytes.
    """
    if torch.is_autocast_enabled(x_mi.device.type):
        dtype = torch.get_autocast_dtype(x_mi.device.type)
        x_mi, weight_eoi = x_mi.to(dtype), weight_eoi.to(dtype)
    end_e = tokens_per_expert_e.cumsum(0).to(torch.int32)
    return F.grouped_mm(x_mi, weight_eoi.transpose(1, 2), offs=end_e)


class Permute(torch.autograd.Function):
    """Copy of each token to its k rows; the gradient sums the k rows."""

    @staticmethod
    def forward(ctx: Any, x_nd: Tensor, sorted_ids_m: Tensor, row_ids_nk: Tensor) -> Tensor:
        ctx.save_for_backward(row_ids_nk)
        return x_nd.index_select(0, sorted_ids_m // row_ids_nk.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_md: Tensor) -> tuple[Tensor, None, None]:
        return F.embedding_bag(ctx.saved_tensors[0], g_md, mode="sum"), None, None


class Unpermute(torch.autograd.Function):
    """Weighted sum of each token's k rows; the gradients are rows · weight and row · gradient."""

    @staticmethod
    def forward(
        ctx: Any, y_md: Tensor, weight_nk: Tensor, sorted_ids_m: Tensor, row_ids_nk: Tensor
    ) -> Tensor:
        ctx.save_for_backward(y_md, weight_nk, sorted_ids_m, row_ids_nk)
        return F.embedding_bag(row_ids_nk, y_md, mode="sum", per_sample_weights=weight_nk)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_nd: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_md, weight_nk, sorted_ids_m, row_ids_nk = ctx.saved_tensors
        g_md = g_nd.index_select(0, sorted_ids_m // row_ids_nk.shape[1])
        dweight_m = (g_md * y_md).sum(-1)
        g_md *= weight_nk.flatten()[sorted_ids_m, None]
        return g_md, dweight_m[row_ids_nk], None, None


@impl("permute", "cpu")
def permute(x_nd: Tensor, sorted_ids_m: Tensor, row_ids_nk: Tensor) -> Tensor:
    """Copy each token to its k rows, sorted by expert."""
    return Permute.apply(x_nd, sorted_ids_m, row_ids_nk)


@impl("unpermute", "cpu")
def unpermute(y_md: Tensor, weight_nk: Tensor, sorted_ids_m: Tensor, row_ids_nk: Tensor) -> Tensor:
    """Return the weighted sum of each token's k rows."""
    return Unpermute.apply(y_md, weight_nk, sorted_ids_m, row_ids_nk)
