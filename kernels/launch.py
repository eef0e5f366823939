"""What the Python side of all kernels shares: checks that name the tensor, compiler's cases."""

from dataclasses import dataclass, field

import torch

BF16, FP32 = torch.bfloat16, torch.float32
FLOATS = (FP32, BF16)


def autotune_bucket(n: int) -> int:
    """Key of autotuning for a number of rows: n < 16, 256, 4096, … share a choice."""
    return (n.bit_length() + 3) // 4


def as_rows(x):
    """(…, d) as (n, d) with a last stride of 1: a view where strides allow it, else a copy."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def num_sms(x, interpreted: int = 2) -> int:
    """Of the GPU that holds x; in the interpreter a few, so that there is work to share."""
    if not x.is_cuda:
        return interpreted
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def check_tensor(
    name: str, x: torch.Tensor, shape=None, dtypes=None, contiguous: bool = True
) -> None:
    """Raise a `ValueError` that names the tensor unless it can be given to a kernel.

    shape: lengths, with None for any; contiguous False asks only for a last stride of 1.
    """
    if dtypes and x.dtype not in dtypes:
        want = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name} must be {want}, not {str(x.dtype).removeprefix('torch.')}")
    if shape is not None and (
        x.ndim != len(shape) or any(w not in (None, n) for w, n in zip(shape, x.shape))
    ):
        want = "(" + ", ".join("any" if n is None else str(n) for n in shape) + ")"
        raise ValueError(f"{name} must have shape {want}, not {tuple(x.shape)}")
    if contiguous and not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous, not of strides {x.stride()}")
    if x.ndim and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name} must have a last stride of 1, not {x.stride(-1)}")


@dataclass(frozen=True)
class AOTCase:
    """A kernel as the ahead-of-time compiler sees it; a dtype stands for an aligned pointer."""

    name: str
    kernel: object  # triton.jit, or triton.autotune of it: then every config is compiled
    args: tuple
    meta: dict = field(default_factory=dict)  # tl.constexpr arguments that autotuning does not set
    tensor_cores: str = ""  # "fp8" or "bf16": the instructions that must appear
