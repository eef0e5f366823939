"""Helpers of every kernel's launcher: autotuner configs, layouts, argument checks, AOT cases."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
import triton
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

BF16, FP32 = torch.bfloat16, torch.float32
E4M3, INT32 = torch.float8_e4m3fn, torch.int32
INT64 = torch.int64
FLOATS = (FP32, BF16)
AutotuneDecorator = Callable[[JITFunction], Autotuner]
Grid = Callable[[dict[str, int]], tuple[int, ...]]  # from a config's meta-parameters
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
SM_LIMIT: int | None = None  # multiprocessors that persistent kernels use at most; None: all


def autotune_bucket(n: int) -> int:
    """Return the autotuning key of n rows; those below 16, 256, 4096, … share a config."""
    return (n.bit_length() + 3) // 4


def num_blocks(k: int) -> int:
    """Return the number of scale blocks of 128 along an axis of length k."""
    return triton.cdiv(k, 128)


def num_sms(x: torch.Tensor, interpreted: int = 2) -> int:
    """Return the number of multiprocessors of x's GPU, or `interpreted` for a CPU tensor.

    With a small number, each program of a persistent kernel processes several tiles; `SM_LIMIT`
    leaves multiprocessors to others.
    """
    if not x.is_cuda:
        return interpreted
    existing = torch.cuda.get_device_properties(x.device).multi_processor_count
    return existing if SM_LIMIT is None else min(existing, SM_LIMIT)


def kernel_config(warps: int, stages: int = 3, **meta: int) -> triton.Config:
    """Return an autotuner config: `tl.constexpr` arguments, warps and pipeline stages."""
    return triton.Config(meta, num_warps=warps, num_stages=stages)


def cdiv_grid(n: int, block: str, factor: int = 1) -> Grid:
    """Return a grid of factor · ⌈n / meta[block]⌉ programs."""
    return lambda meta: (factor * triton.cdiv(n, meta[block]),)


# ── The device ──


def on_its_device(fn: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Return a function that makes the GPU of its first tensor the current one during a call.

    Triton launches on the current GPU, which need not be the one that holds the tensors.
    """

    @wraps(fn)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        x = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
        if not x.is_cuda or x.get_device() == torch.cuda.current_device():
            return fn(*args, **kwargs)
        with torch.cuda.device(x.get_device()):
            return fn(*args, **kwargs)

    return call


# ── Layouts ──


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """Reshape (…, d) to (n, d) with a last stride of 1, as a view where strides allow it."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def tma_aligned(x: torch.Tensor) -> torch.Tensor:
    """Return x if its rows start at multiples of 16 bytes, as TMA requires, else an aligned copy.

    The rows of a copy are padded with zeros to the next multiple of 16 bytes.
    """
    unit = 16 // x.element_size()
    aligned = x.data_ptr() % 16 == 0 and all(s > 0 and s % unit == 0 for s in x.stride()[:-1])
    if aligned and x.stride(-1) == 1:
        return x
    width = x.shape[-1]
    padded = x.new_zeros(*x.shape[:-1], triton.cdiv(width, unit) * unit)
    return padded[..., :width].copy_(x)


# ── Checks ──


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without `torch.`."""
    return str(dtype).removeprefix("torch.")


def check_tensor(
    name: str,
    x: torch.Tensor,
    shape: Sequence[int | None] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    contiguous: bool = True,
) -> None:
    """Raise a `ValueError` that names the tensor if a kernel does not accept it.

    shape: the lengths, None for any length; contiguous=False requires only a last stride of 1.
    """
    if dtypes and x.dtype not in dtypes:
        names = " or ".join(map(dtype_name, dtypes))
        raise ValueError(f"{name} must be {names}, not {dtype_name(x.dtype)}")
    if shape is not None:
        fits = x.ndim == len(shape) and all(n in (None, k) for n, k in zip(shape, x.shape))
        if not fits:
            lengths = ", ".join("any" if n is None else str(n) for n in shape)
            raise ValueError(f"{name} must have shape ({lengths}), not {tuple(x.shape)}")
    if contiguous and not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous, not of strides {x.stride()}")
    if x.ndim and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name} must have a last stride of 1, not {x.stride(-1)}")


def check_quantized(
    name: str,
    q: torch.Tensor,
    shape: Sequence[int | None],
    s_name: str,
    s: torch.Tensor,
    s_shape: Sequence[int | None],
) -> None:
    """Raise a `ValueError` unless q holds E4M3 values and s fp32 scales, both of these shapes."""
    check_tensor(name, q, shape, (E4M3,))
    check_tensor(s_name, s, s_shape, (FP32,))


# ── For the ahead-of-time compiler ──


@dataclass(frozen=True)
class AOTCase:
    """A kernel and the arguments to compile it for; a dtype stands for an aligned pointer."""

    name: str
    kernel: JITFunction | Autotuner  # of an autotuned kernel every config is compiled
    args: tuple
    meta: dict = field(default_factory=dict)  # tl.constexpr arguments that autotuning does not set
    tensor_cores: str = ""  # "fp8" or "bf16": the tensor-core instructions that must appear
