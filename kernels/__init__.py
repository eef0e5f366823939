"""Triton kernels, registered with `dsv3_ref.ops.impl(name, "triton")` when this is imported."""
