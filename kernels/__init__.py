"""Triton kernels, registered with `dsv3_ref.ops.impl(name, "triton")` when this is imported."""

from dsv3_ref.kernels import attention, decode, dispatch, gemm, loss, moe, norm, quant  # noqa: F401
