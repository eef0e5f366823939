"""Tuned torch for CPU: backend `cpu` of the ops whose plain form is slow or keeps much.

Importing the package registers them; `dsv3_ref.ops` does so by name. Each is held to its
reference, forward and backward, by tests/test_ops.py.
"""

from dsv3_ref.cpu import attention, fp8, fused, moe

__all__ = ["attention", "fp8", "fused", "moe"]
