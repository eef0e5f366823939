"""Tuned torch for CPUs: backend `cpu` of the ops whose plain form is slow or saves much memory.

Importing the package registers its forms; `dsv3_ref.ops` does so by name. tests/test_ops.py
compares each with its reference, forward and backward, tests/cpu/test_decoder.py the decoder.
"""

from dsv3_ref.cpu import attention, decoder, fp8, fused, moe

__all__ = ["attention", "decoder", "fp8", "fused", "moe"]
