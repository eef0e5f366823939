"""Tuned torch for CPU: backend `cpu` of the ops whose plain form is slow or keeps much.

Importing the package registers them; `dsv3_ref.ops` does so by name. Each is held to its
reference, forward and backward, by tests/test_ops.py, the decoder by tests/cpu/test_decoder.py.
"""

from dsv3_ref.cpu import attention, decoder, fp8, fused, moe

__all__ = ["attention", "decoder", "fp8", "fused", "moe"]
