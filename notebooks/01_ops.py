# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 01 · Ops: norm, SwiGLU and the kernel seam

# %% [markdown]
# ## The seam
# One switch decides which implementation of an op runs.

# %%
#| export
import os
from contextlib import contextmanager
from functools import wraps

import torch
import torch.nn.functional as F
from torch import nn

IMPLS: dict[str, dict[str, callable]] = {}  # op name → backend → function


def op(reference):
    """Mark a torch function as an op: calls go to the first active backend that implements it."""
    name = reference.__name__
    IMPLS[name] = {"torch": reference}

    @wraps(reference)
    def call(*args, **kwargs):
        return chosen(name)(*args, **kwargs)

    return call


def impl(name: str, backend: str):
    """Register another implementation of op `name`: same signature, same result."""
    if name not in IMPLS:
        raise KeyError(f"no op {name!r}; ops are {', '.join(IMPLS)}")
    return lambda fn: IMPLS[name].setdefault(backend, fn)


# %%
#| export
ACTIVE = tuple(os.environ.get("DSV3_BACKEND", "torch").split(","))  # in order of preference


def chosen(name: str):
    """The implementation of op `name` under the active backends; raises if none has it."""
    for backend in ACTIVE:
        if backend in IMPLS[name]:
            return IMPLS[name][backend]
    raise NotImplementedError(
        f"op {name!r} has no {' or '.join(ACTIVE)} implementation, only {', '.join(IMPLS[name])}; "
        f"name a second choice: DSV3_BACKEND={ACTIVE[0]},torch"
    )


@contextmanager
def use(*backends: str):
    """Run a block under these backends, in order of preference: `with use("naive", "torch")`."""
    global ACTIVE
    known = {b for impls in IMPLS.values() for b in impls}
    if unknown := set(backends) - known:
        raise ValueError(
            f"no backend {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}"
        )
    before, ACTIVE = ACTIVE, backends
    try:
        yield
    finally:
        ACTIVE = before


def table() -> str:
    """One line an op: the active implementation, then the others."""
    rows = []
    for name, impls in sorted(IMPLS.items()):
        active = next((b for b in ACTIVE if b in impls), "none")
        others = " ".join(sorted(set(impls) - {active}))
        rows.append(f"{name:22}{active:8}{others}".rstrip())
    return "\n".join(rows)


# %% [markdown]
# ## RMSNorm


# %%
#| export
@op
def rms_norm(x, weight, eps: float):
    """Divide by the root mean square of the last axis: y = x / √(mean(x²) + ε) · weight."""
    return F.rms_norm(x, weight.shape, weight, eps)


@impl("rms_norm", "naive")
def _(x, weight, eps):
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


class RMSNorm(nn.Module):
    """A learned scale after `rms_norm`; shape in = shape out."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


# %% [markdown]
# ## Linear: the one place where matrix products pass


# %%
#| export
@op
def linear(x, weight_oi):
    """Multiply the last axis: y_…o = Σ_i x_…i W_oi."""
    return F.linear(x, weight_oi)


class Linear(nn.Module):
    """A matrix without bias, stored (out, in) as in the released weights."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))

    def forward(self, x):
        return linear(x, self.weight)


# %% [markdown]
# ## SwiGLU


# %%
#| export
@op
def swiglu(gate, up):
    """A smooth switch: y = gate · σ(gate) · up."""
    return F.silu(gate) * up


@impl("swiglu", "naive")
def _(gate, up):
    return gate / (1 + torch.exp(-gate)) * up


class MLP(nn.Module):
    """Dense feed-forward network: y = W₂ (silu(W₁ x) · W₃ x), d → f → d."""

    def __init__(self, dim: int, inter_dim: int):
        super().__init__()
        self.w1, self.w3 = Linear(dim, inter_dim), Linear(dim, inter_dim)
        self.w2 = Linear(inter_dim, dim)

    def forward(self, x):
        return self.w2(swiglu(self.w1(x), self.w3(x)))


# %% [markdown]
# ## Cross-entropy straight from the hidden state


# %%
#| export
@op
def linear_cross_entropy(h_nd, head_wd, target_n):
    """Sum over tokens of −log softmax(h Wᵀ)[target], in nats."""
    return F.cross_entropy(F.linear(h_nd, head_wd).float(), target_n, reduction="sum")


@impl("linear_cross_entropy", "naive")
def _(h_nd, head_wd, target_n):
    logp_nw = (h_nd @ head_wd.T).float().log_softmax(-1)
    return -logp_nw.gather(1, target_n[:, None]).sum()
