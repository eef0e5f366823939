"""Inputs of the benchmark's cases, and calls of kernels and of their yardsticks."""

from collections.abc import Callable
from functools import partial

import torch
from dsv3_ref.kernels.bench.case import Call, Calls, Output
from dsv3_ref.kernels.launch import BF16
from torch import Tensor

from dsv3_ref.ops import use

KERNEL_BACKENDS: tuple[str, ...] = ("triton", "torch")
TORCH_BACKENDS: tuple[str, ...] = ("torch",)
Function = Callable[..., Tensor]

# ── Inputs ──


def randn(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Draw normal numbers."""
    return torch.randn(*shape, dtype=dtype)


def leaf(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Draw normal numbers that require a gradient."""
    return randn(*shape, dtype=dtype).requires_grad_()


def expert_counts(e: int, m: int, skewed: bool = False) -> Tensor:
    """Return the rows of each of e experts, m in all: even, or falling as 1/rank and shuffled."""
    share = 1 / torch.arange(1, e + 1, dtype=torch.float64) if skewed else torch.ones(e)
    tokens_per_expert_e = (m * share / share.sum()).floor().long()
    tokens_per_expert_e[: m - int(tokens_per_expert_e.sum())] += 1
    seed = torch.Generator(tokens_per_expert_e.device).manual_seed(0)
    return tokens_per_expert_e[torch.randperm(e, generator=seed)]


def skewed_counts(e: int, m: int) -> Tensor | None:
    """Return the skewed counts of e experts, or None for a single weight (e = 1)."""
    return expert_counts(e, m, skewed=True) if e > 1 else None


def num_padded_tiles(m: int, e: int = 1) -> int:
    """Return the number of tiles of 128 rows in the result of `act_quant_transposed`."""
    return m // 128 + e


# ── Calls ──


def with_backends(backends: tuple[str, ...], call: Call) -> Call:
    """Return the call, made with these backends."""

    def run() -> Output:
        with use(*backends):
            return call()

    return run


def vs_torch(call: Call) -> Calls:
    """Return the call, and the torch reference as its yardstick."""
    return call, {"torch": with_backends(TORCH_BACKENDS, call)}


def forward_call(forward: Function, inputs: tuple[Tensor, ...]) -> Call:
    """Return the call forward(*inputs)."""
    return partial(forward, *inputs)


def incoming_gradient(y: Tensor) -> Tensor:
    """Draw the gradient of y: 64 columns at a time, so that columns of padding do not change it."""
    seed, draws = torch.Generator(y.device).manual_seed(0), []
    for part in y.split(64, -1):
        draws.append(torch.randn(part.shape, generator=seed, device=y.device))
    return torch.cat(draws, -1).to(y.dtype)


def backward_call(forward: Function, inputs: tuple[Tensor, ...]) -> Call:
    """Return a repeatable call of the backward pass; its first call also runs forward(*inputs).

    The incoming gradient is the same for a kernel and its yardsticks.
    """
    output_and_gradient: list[Tensor] = []

    def run() -> tuple[Tensor, ...]:
        if not output_and_gradient:
            y = forward(*inputs)
            output_and_gradient.extend((y, incoming_gradient(y)))
        y, g = output_and_gradient
        return torch.autograd.grad(y, inputs, g, retain_graph=True)

    return run


def backward_vs_torch(forward: Function, *inputs: Tensor) -> Calls:
    """Return a call of the backward pass, and that of the torch reference as its yardstick."""
    reference = with_backends(TORCH_BACKENDS, backward_call(forward, inputs))
    return backward_call(forward, inputs), {"torch": reference}
