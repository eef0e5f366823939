"""What the Python side of all kernels shares: checks that name the tensor, compiler's cases."""

from dataclasses import dataclass, field

import torch


def require(name: str, x: torch.Tensor, shape=None, dtypes=None, contiguous: bool = True) -> None:
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
class Compile:
    """A kernel as the ahead-of-time compiler sees it; a dtype stands for an aligned pointer."""

    name: str
    kernel: object  # triton.jit, or triton.autotune of it: then every config is compiled
    args: tuple
    meta: dict = field(default_factory=dict)  # tl.constexpr arguments that autotuning does not set
    tensor_cores: str = ""  # "fp8" or "bf16": the instructions that must appear
