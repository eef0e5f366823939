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
# ## Why
# An H800 (the GPU that trained V3) can do **295** operations in the time it needs to fetch one byte.
# RMSNorm, which brings a token's vector to a standard size, does about **one** operation per byte. So a
# model is made of two kinds of work: matrix products, which keep the machine busy, and everything
# between them, which waits for memory. The second kind is a ten-thousandth of the operations and yet
# costs real time, unless a *kernel* (a program written for the GPU) joins several steps and reads each
# number once.
#
# Readable code and fast code thus look different. This chapter writes the four smallest pieces of
# DeepSeek-V3 readably, and builds the one switch that lets a fast form take the place of each.

# %%
#| export
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from importlib import import_module
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_ref.config import UserError

# %%
import math

from torch.utils._python_dispatch import TorchDispatchMode

from dsv3_ref.config import V3
from dsv3_ref.viz import BLUE, GREEN, GRAY, ORANGE, attempt, figure, play, show

PEAK, BANDWIDTH = 989e12, 3.35e12  # H800: bf16 operations and bytes of memory per second


def work(tokens: int, size: int = 2) -> dict[str, tuple[float, float]]:
    """Return piece of V3 → (operations, bytes) for so many tokens, `size` bytes per number."""
    d, f = V3.dim, V3.moe_inter_dim

    def product(i: int, o: int) -> tuple[float, float]:
        return 2 * tokens * i * o, size * (tokens * i + i * o + tokens * o)

    return {
        "RMSNorm": (4 * tokens * d, 2 * size * tokens * d),
        "SwiGLU": (5 * tokens * f, 3 * size * tokens * f),
        "expert's W₁": product(d, f),
        "attention's $W^O$": product(V3.n_heads * V3.v_head_dim, d),
        "head": product(d, V3.vocab_size),
    }


def roofline(tokens: int = 4096, size: int = 2) -> None:
    """Plot each piece under the machine's two limits: memory (slope) and arithmetic (flat)."""
    fig, ax = figure(width=8, height=3.6)
    peak, x = PEAK * 2 / size, torch.logspace(-1, 4, 200)  # numbers of half the size: twice as fast
    ax.plot(x, (x * BANDWIDTH).clamp(max=peak) / 1e12, color=GRAY, label="the most an H800 can do")
    for (name, (ops, moved)), marker in zip(
        work(tokens, size).items(), ["o11", "s7", "D13", "^9", "v5"]
    ):
        per_byte, look = ops / moved, {"marker": marker[0], "markersize": int(marker[1:])}
        label = f"{name}: {per_byte:,.1f}"
        ax.plot(per_byte, min(per_byte * BANDWIDTH, peak) / 1e12, linestyle="", label=label, **look)
    ax.axvline(peak / BANDWIDTH, color=GRAY, linestyle=":", linewidth=1)
    ax.set(xscale="log", yscale="log", ylim=(0.2, 4000))
    ax.set(
        xlabel="operations for each byte moved (numbers in the legend)", ylabel="TFLOP/s at best"
    )
    ax.set_title(f"{tokens:,} tokens: left of the dotted line, memory is the limit")
    ax.legend(loc="lower right")
    show(fig)


roofline()

# %% [markdown]
# ## Paper
# The report has no chapter on these pieces; it presumes them, and says in passing what matters:
#
# - a block normalizes before attention and before its feed-forward network, and there are **extra
#   RMSNorms on both latents** of MLA (§4.2);
# - the outputs of **RMSNorm are recomputed** in the backward pass instead of kept (§3.2.3), and so is
#   the **output of SwiGLU**, from inputs that are kept (§3.3.3);
# - every linear layer is three products, *Fprop*, *Dgrad* and *Wgrad*, and **all three run in FP8**
#   (§3.3.1), while embedding, head, gates, norms and attention stay in higher precision;
# - the vocabulary has 128K tokens (§4.1), padded to **129,280** rows in the released weights: the
#   scores for all of them, from which the loss is made, are far larger than any other activation.

# %% [markdown]
# ## The seam
# Call a function with several implementations an **op**. Its *reference* is a torch function with the mark
# `@op`: the plain form, which defines what is right. Another implementation registers under
# the same name for a **backend**: `cpu` for tuned torch, `triton` for GPU kernels. A call goes to
#
# $$\text{op}(x) = \text{IMPLS}[\text{op}][b^\ast](x),\qquad
# b^\ast = \text{the first of the active backends that implements it.}$$
#
# The code that calls an op does not know of this. There are no flags in the model, and no `if cuda`.
#
# A function that a notebook marks with `@op` is the new reference of its op and also the backend `notebook`,
# which comes first by default: edit such a cell, run it, and every later call goes to your function. Only a backend that
# you name yourself comes before it, as in `with use("cpu", "torch")`, and modules imported later do not undo it.

# %%
#| export
Impl = Callable[..., Any]
IMPLS: dict[str, dict[str, Impl]] = {}  # op name → backend → function
OpParams = ParamSpec("OpParams")
OpResult = TypeVar("OpResult")
Form = TypeVar("Form", bound=Impl)


def is_from_notebook(fn: Impl) -> bool:
    """Return whether a function is defined in the running notebook or script, not in a module."""
    return fn.__module__ in ("__main__", "__mp_main__")  # the second in a child that it spawns


def register_impl(name: str, backend: str, fn: Impl) -> None:
    """Set the implementation of an op; one from a notebook is not replaced by one from a module."""
    earlier = IMPLS.setdefault(name, {}).get(backend)
    if earlier is None or is_from_notebook(fn) or not is_from_notebook(earlier):
        IMPLS[name][backend] = fn


def op(reference: Callable[OpParams, OpResult]) -> Callable[OpParams, OpResult]:
    """Mark a torch function as an op: calls go to the first active backend that implements it.

    The function is the op's backend `torch`. In a notebook or script it is also the backend
    `notebook`, which `auto` prefers to all others, so that an edited cell takes effect.
    """
    name = reference.__name__
    register_impl(name, "torch", reference)
    if is_from_notebook(reference):
        register_impl(name, "notebook", reference)

    @wraps(reference)
    def call(*args: OpParams.args, **kwargs: OpParams.kwargs) -> OpResult:
        return resolve_impl(name, device_of(args))(*args, **kwargs)

    return call


def impl(name: str, backend: str) -> Callable[[Form], Form]:
    """Register another implementation of op `name`: same signature, same result."""
    if name not in IMPLS:
        raise KeyError(f"no op {name!r}; ops are {', '.join(IMPLS)}")

    def register(fn: Form) -> Form:
        register_impl(name, backend, fn)
        return fn

    return register


# %% [markdown]
# ## The switch
# The environment variable `DSV3_BACKEND` sets the backends for a run, `with use(…)` for a few
# lines. Both name them in order of preference: `cpu,torch` reads "the tuned form where there is one,
# else the reference". That *else* must be written down. With `triton` alone, an op without a kernel
# raises: otherwise a misspelled name would cost a factor of ten and look like success. The default,
# `auto`, follows the device of the tensors, after what the notebook itself defines.


# %%
#| export
AUTO_BACKENDS = {  # what `auto` means
    "cpu": ("notebook", "cpu", "torch"), "cuda": ("notebook", "triton", "torch")
}  # fmt: skip
ACTIVE_BACKENDS = tuple(os.environ.get("DSV3_BACKEND", "auto").split(","))
BACKEND_MODULES = {  # imported when first asked for
    "cpu": "dsv3_ref.cpu", "compiled": "dsv3_ref.cpu", "triton": "dsv3_ref.kernels",
    "fp8": "dsv3_ref.fp8", "zero_bubble": "dsv3_ref.dualpipe",
}  # fmt: skip


def device_of(args: tuple[object, ...]) -> str:
    """Return the device type of the first tensor, `cpu` if there is none."""
    for x in args:
        if isinstance(x, Tensor):
            return x.device.type
    return "cpu"


@cache
def expand_backends(backends: tuple[str, ...], device: str) -> tuple[str, ...]:
    """Replace `auto` by the backends of a device type and import what registers them."""
    names: list[str] = []
    for backend in backends:
        names += AUTO_BACKENDS.get(device, ("torch",)) if backend == "auto" else (backend,)
    for name in names:
        if name in BACKEND_MODULES:
            import_module(BACKEND_MODULES[name])  # only the kernels need triton
    return tuple(dict.fromkeys(names))


def resolve_impl(name: str, device: str = "cpu") -> Impl:
    """Return the implementation of op `name` under the active backends; raise if none has it."""
    backends = expand_backends(ACTIVE_BACKENDS, device)
    for backend in backends:
        if backend in IMPLS[name]:
            return IMPLS[name][backend]
    raise UserError(
        f"op {name!r} has no {' or '.join(backends)} implementation, "
        f"only {', '.join(IMPLS[name])}; name a second choice: DSV3_BACKEND={backends[0]},torch"
    )


@contextmanager
def use(*backends: str) -> Iterator[None]:
    """Run a block under these backends, in order of preference: `with use("fp8", "auto")`."""
    global ACTIVE_BACKENDS
    expand_backends(backends, "cpu")
    known = {"auto", "notebook"}.union(*IMPLS.values())
    if unknown := set(backends) - known:
        raise UserError(
            f"no backend {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}"
        )
    before, ACTIVE_BACKENDS = ACTIVE_BACKENDS, backends
    try:
        yield
    finally:
        ACTIVE_BACKENDS = before


def backend_table(device: str = "cpu") -> str:
    """Return a line per op: the implementation active on a device type, then the others."""
    backends, rows = expand_backends(ACTIVE_BACKENDS, device), []
    for name, impls in sorted(IMPLS.items()):
        active = next((b for b in backends if b in impls), "none")
        others = " ".join(sorted(set(impls) - {active}))
        rows.append(f"{name:24}{active:10}{others}".rstrip())
    return "\n".join(rows)


# %% [markdown]
# ## Forget, and compute again
# A training step needs most of its memory for what the forward pass keeps for the backward pass.
# The report keeps no output of RMSNorm, of SwiGLU or of MLA's up-projections (§3.2.3, §3.3.3):
# each costs little to compute and much to keep. (Our dense and shared MLPs also recompute gate and up: a
# dense layer of V3 is 18,432 wide.) So the model writes the call `recompute(f, x)`:
#
# $$y = f(x),\quad\text{and whatever saves } y \text{ for its gradient saves } (f, x) \text{ instead.}$$
#
# $x$ may itself be such a result; then a chain is computed again from its start. Two more calls serve formats
# that are narrower than $x$ (chapter 09). `recompute_from(f, x)` drops $f(x)$ only if $x$ is dropped too, and
# `save_instead(x, f, z)` drops an $x$ that has already been saved, because $f(z) \approx x$ from a smaller $z$ is near
# enough. By themselves the calls do nothing. A training step that wants them installs a hook:
# `saved_tensors(recompute=True)` of
# [dsv3_ref/training/recompute.py](../dsv3_ref/training/recompute.py), written with PyTorch's saved-tensor hooks.


# %%
#| export
class RecomputeHook(Protocol):
    """The part of a training step that saves calls in place of their results."""

    def recompute(self, fn: Impl, args: tuple[Any, ...]) -> Any:
        """Return fn(*args), and save this call wherever autograd would save the result."""
        ...

    def is_recomputed(self, x: Tensor) -> bool:
        """Return whether x is the result of a saved call, or a view of one."""
        ...

    def replace(self, x: Tensor, fn: Impl, args: tuple[Any, ...]) -> None:
        """Save the call fn(*args) wherever autograd saves x, or has saved it."""
        ...


RECOMPUTE_HOOK: RecomputeHook | None = None  # set while a step recomputes


def recompute(fn: Callable[..., OpResult], *args: Any) -> OpResult:
    """Return fn(*args), which a training step may drop and compute again in its backward pass.

    Tensors that `fn` itself saves for backward are kept: an RMSNorm's input, not its output.
    """
    return fn(*args) if RECOMPUTE_HOOK is None else RECOMPUTE_HOOK.recompute(fn, args)


def recompute_from(fn: Callable[[Tensor], OpResult], x: Tensor) -> OpResult:
    """Return fn(x), which is dropped and computed again if x is; otherwise it is saved."""
    if RECOMPUTE_HOOK is None or not RECOMPUTE_HOOK.is_recomputed(x):
        return fn(x)
    return RECOMPUTE_HOOK.recompute(fn, (x,))


def save_instead(x: Tensor, fn: Callable[..., Tensor], *args: Any) -> None:
    """Let a training step save the call fn(*args), whose result approximates x, in place of x.

    The result must have the shape and dtype of x, which must be contiguous and own its memory.
    """
    if RECOMPUTE_HOOK is not None:
        RECOMPUTE_HOOK.replace(x, fn, args)


@contextmanager
def recomputing_with(hook: RecomputeHook | None) -> Iterator[None]:
    """Pass the calls of `recompute` to `hook(fn, args)` inside a block."""
    global RECOMPUTE_HOOK
    before, RECOMPUTE_HOOK = RECOMPUTE_HOOK, hook
    try:
        yield
    finally:
        RECOMPUTE_HOOK = before


# %%
calls = []


class CallNames:
    """A hook that computes fn(*args), as `recompute` does without one, and records the name."""

    def recompute(self, fn, args):
        calls.append(fn.__name__)
        return fn(*args)

    def is_recomputed(self, x):
        return False


with recomputing_with(CallNames()):
    y = recompute(torch.cos, recompute(torch.sin, torch.ones(2)))
    assert torch.equal(recompute_from(torch.exp, y), y.exp())  # y is kept, and so is this
assert torch.equal(y, torch.ones(2).sin().cos()) and recompute(torch.sin, y).shape == (2,)
print("the hook saw", calls)
assert calls == ["sin", "cos"]

# %% [markdown]
# ## RMSNorm
# Activations drift in size as layers add up. RMSNorm divides each token's vector by its *root mean
# square* and lets the model choose a scale for each coordinate:
#
# $$y_{nd} = \frac{x_{nd}}{\rho_n}\,w_d,\qquad \rho_n = \sqrt{\tfrac1D \textstyle\sum_d x_{nd}^2 + \epsilon}$$
#
# with $x, y$ of shape $(n, d)$, $w$ of shape $(d)$, $D$ the length of axis $d$ and
# $\epsilon = 10^{-6}$ against a division by zero. Unlike LayerNorm it subtracts no mean and adds no
# bias. The squares are summed in fp32, whatever the type of $x$: the eight significant bits of bf16 are
# too few to sum 7168 of them.
#
# *Its gradient*, which autograd finds by itself. With $\hat x = x/\rho$ and $a = g \odot w$, where $g$ is the gradient that arrives
# at $y$,
#
# $$\frac{\partial L}{\partial x} = \frac{1}{\rho}\left(a - \hat x\,\operatorname{mean}(a\odot\hat x)\right),
# \qquad \frac{\partial L}{\partial w} = \sum_n g_n \odot \hat x_n .$$
#
# The mean takes away the part along $x$, because the length of $x$ changes nothing. And the
# gradient shrinks as $1/\rho$: large vectors move slowly. The `cpu` backend writes it down, because autograd
# follows every small step of the formula, keeps its result and reads it again.


# %%
#| export
def upcast(x: Tensor) -> Tensor:
    """Return x in fp32; fp64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def matmul_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of a matrix product of x: that of autocast, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


@op
def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """Divide x by the root mean square of its last axis: y = x / √(mean(x²) + ε) · weight.

    dtype: the result's, by default that of x; it is computed in fp32 and rounded once.
    """
    wide = upcast(x)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight
    return y.to(dtype or x.dtype)


class RMSNorm(nn.Module):
    """RMSNorm with a learned scale; the result has x's shape and the dtype of matrix products."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return recompute(rms_norm, x, self.weight, self.eps, matmul_dtype(x))


# %%
torch.manual_seed(0)
x_nd, w_d = torch.randn(3, 64) * torch.tensor([[0.01], [1.0], [100.0]]), torch.rand(64)
right = F.rms_norm(x_nd, (64,), w_d, 1e-6)  # torch's own
assert torch.allclose(rms_norm(x_nd, w_d, 1e-6), right, atol=1e-5)
y_nd = rms_norm(x_nd, torch.ones(64), 1e-6)
print("size before:", *[f"{v:.3g}" for v in x_nd.square().mean(-1).sqrt()])
print("size after: ", *[f"{v:.3g}" for v in y_nd.square().mean(-1).sqrt()])
assert torch.allclose(rms_norm(8 * x_nd, w_d, 0.0), rms_norm(x_nd, w_d, 0.0))  # size is forgotten

# %% [markdown]
# The sizes differed by thousands and are now equal. Only the smallest is a little short of 1:
# beside its mean square, a ten-thousandth, $\epsilon$ still counts.
#
# Next the gradient against finite differences, and two of its properties: nothing of it lies
# along $x$, and a factor of 10 in front of $x$ leaves it as it is.

# %%
x_nd = torch.randn(5, 64, dtype=torch.float64, requires_grad=True)
w_d, g_nd = torch.rand(64, dtype=torch.float64), torch.randn(5, 64, dtype=torch.float64)
assert torch.autograd.gradcheck(rms_norm, (x_nd[:, :6], w_d[:6].requires_grad_(), 1e-6))
(grad_nd,) = torch.autograd.grad(rms_norm(x_nd, w_d, 0.0), x_nd, g_nd)
(far_nd,) = torch.autograd.grad(rms_norm(10 * x_nd, w_d, 0.0), x_nd, g_nd)
assert torch.allclose((grad_nd * x_nd).sum(-1), torch.zeros(5).double(), atol=1e-12)
assert torch.allclose(far_nd, grad_nd)  # 10 from the chain rule, 1/10 from ρ
print("size of each token's gradient:", *[f"{v:.2f}" for v in grad_nd.norm(dim=-1)])


# %% [markdown]
# ## Linear: the one place where matrix products pass
# $$y_{no} = \textstyle\sum_i x_{ni} W_{oi}\qquad (n, i)\times(o, i) \to (n, o)$$
#
# One line, but its own op: nearly all the arithmetic of the model passes here, so this is where FP8
# enters ([chapter 09](09_fp8.ipynb)). Weights are stored (out, in), as in the released files. No
# such layer of DeepSeek-V3 adds a bias. Its backward is two more products of the same size, named in
# §3.3.1:
#
# $$\text{Dgrad: } \frac{\partial L}{\partial x} = g\,W,\qquad \text{Wgrad: } \frac{\partial L}{\partial W} = g^\top x .$$
#
# Two hooks for later chapters change nothing here: `saved_input_format` says in which format FP8 stores $x$ for Wgrad
# (chapter 09), and `defer_wgrad` lets a pipeline put Wgrad off (chapter 12). A weight on a mesh has an attribute
# `main_grad`, a tensor of its shape in fp32, and Wgrad adds to that: gradients of many micro-batches are summed in
# fp32 even where the weight itself is kept in eight bits (chapter 17).


# %%
#| export
@op
def linear(x: Tensor, weight_oi: Tensor, saved_input_format: str = "e4m3") -> Tensor:
    """Multiply the last axis of x by a matrix: y_…o = Σ_i x_…i W_oi.

    saved_input_format: the format in which FP8 stores x for Wgrad (§3.3.3).
    """
    return F.linear(x, weight_oi)


# Computes ∂L/∂weight; given a tensor, adds ∂L/∂weight to it in place
WgradFn = Callable[..., Tensor]
Wgrad = tuple[Tensor, WgradFn]
DEFERRED_WGRADS: list[Wgrad] | None = None  # set while a pipeline splits the backward pass


def compute_wgrad(weight: Tensor, wgrad_fn: WgradFn) -> Tensor | None:
    """Return ∂L/∂weight = wgrad_fn(), or None if the weight has a `main_grad`.

    wgrad_fn(main_grad) then adds to it in place.
    """
    main_grad: Tensor | None = getattr(weight, "main_grad", None)
    if main_grad is None:
        return wgrad_fn()
    wgrad_fn(main_grad)
    return None


def defer_wgrad(weight: Tensor, wgrad_fn: WgradFn) -> Tensor | None:
    """Return the result of `compute_wgrad`, or None inside `deferring_wgrads`, which stores it.

    A weight with the attribute `wgrad_at_once` is not deferred: its operands are too large to keep.
    """
    if DEFERRED_WGRADS is None or getattr(weight, "wgrad_at_once", False):
        return compute_wgrad(weight, wgrad_fn)
    DEFERRED_WGRADS.append((weight, wgrad_fn))
    return None


@contextmanager
def deferring_wgrads() -> Iterator[list[Wgrad]]:
    """Collect the weight gradients of a block for the caller to compute later (chapter 12)."""
    global DEFERRED_WGRADS
    before, DEFERRED_WGRADS = DEFERRED_WGRADS, []
    try:
        yield DEFERRED_WGRADS
    finally:
        DEFERRED_WGRADS = before


class Linear(nn.Module):
    """Linear layer without bias; the weight is stored (out, in), as in the released weights."""

    def __init__(self, n_in: int, n_out: int, saved_input_format: str = "e4m3"):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.saved_input_format = saved_input_format

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.saved_input_format)


# %%
x_ni = torch.randn(6, 16, requires_grad=True)
w_oi = torch.randn(8, 16, requires_grad=True)
g_no = torch.randn(6, 8)
y_no = linear(x_ni, w_oi)
assert torch.allclose(y_no, (x_ni[:, None] * w_oi).sum(-1), atol=1e-5)  # the sum, as written
grad_x_ni, grad_w_oi = torch.autograd.grad(y_no, (x_ni, w_oi), g_no)
assert torch.allclose(grad_x_ni, g_no @ w_oi) and torch.allclose(grad_w_oi, g_no.T @ x_ni)
for name, t in {"Fprop": y_no, "Dgrad": grad_x_ni, "Wgrad": grad_w_oi}.items():
    print(name, tuple(t.shape), end="  ")


# %% [markdown]
# ## SwiGLU
# A feed-forward network makes a token's vector wide, applies something that is not linear, and
# makes it narrow again. Here the nonlinear step is a *gate*: two wide vectors, of which one decides
# how much of the other passes:
#
# $$\text{swiglu}(g, u) = g\,\sigma(g)\odot u,\qquad
# \text{MLP}(x) = W_2\,\text{swiglu}(W_1 x,\; W_3 x),\qquad d \to f \to d .$$
#
# with $\sigma$ the sigmoid, and gate $g$ and $u$ both of width $f$. $g\,\sigma(g)$ is called SiLU. It is
# a smooth switch: for large $g$ it is nearly $g$, for very negative $g$ nearly 0. Three matrices make
# $3\,d f$ parameters, the count of the previous chapter. Every dense layer, every shared and every
# routed expert is of this form.


# %%
#| export
@op
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Gate one vector by another: y = gate · σ(gate) · up."""
    return F.silu(gate) * up


@op
def swiglu_linear(gate: Tensor, up: Tensor, weight_oi: Tensor) -> Tensor:
    """Apply SwiGLU and a matrix: one op, so that the tensor between them need not be saved."""
    return linear(recompute(swiglu, gate, up), weight_oi)


class MLP(nn.Module):
    """Dense feed-forward network: y = W₂ (silu(W₁ x) · W₃ x), d → f → d.

    Gate and up may be recomputed: two products in exchange for 2·f numbers per token.
    """

    def __init__(self, dim: int, inter_dim: int):
        super().__init__()
        self.w1, self.w3 = Linear(dim, inter_dim), Linear(dim, inter_dim)
        self.w2 = Linear(inter_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = recompute(self.w1, x), recompute(self.w3, x)
        return swiglu_linear(gate, up, self.w2.weight)


# %%
gate_n, up_n = torch.linspace(-8, 8, 9, dtype=torch.float64), torch.ones(9, dtype=torch.float64)
assert torch.allclose(swiglu(gate_n, up_n), gate_n / (1 + torch.exp(-gate_n)) * up_n)
print("gate", *[f"{v:6.0f}" for v in gate_n])
print("out ", *[f"{v:6.3f}" for v in swiglu(gate_n, up_n)])
assert torch.allclose(swiglu(40 * up_n, gate_n), 40 * gate_n)  # open: gate · up
assert swiglu(-40 * up_n, gate_n).abs().max() < 1e-14  # shut
# ∂/∂gate = up·(σ + gate·σ·(1 − σ)), by hand, by autograd and by finite differences
gate_n.requires_grad_()
s_n = gate_n.sigmoid()
(auto_n,) = torch.autograd.grad(swiglu(gate_n, up_n).sum(), gate_n)
assert torch.allclose(auto_n, s_n + gate_n * s_n * (1 - s_n))
assert torch.autograd.gradcheck(swiglu, (gate_n, up_n.requires_grad_()))

# %% [markdown]
# *The seam, live.* Let us listen in on an MLP without touching it: a backend called `spy` notes the
# shapes it meets and computes the same. `backend_table()` returns a line for each op: its name, the active
# implementation, the others. Afterwards we remove the spy.

# %%
heard = []


@impl("swiglu", "spy")
def _(gate, up):
    heard.append(tuple(gate.shape))
    return IMPLS["swiglu"]["torch"](gate, up)


mlp = MLP(16, 40)
for p in mlp.parameters():
    nn.init.normal_(p, std=0.1)
x_nd = torch.randn(5, 16)
with use("torch"):
    quiet = mlp(x_nd)
with use("spy", "torch"):
    assert torch.equal(mlp(x_nd), quiet) and heard == [(5, 40)]
    print(backend_table())
del IMPLS["swiglu"]["spy"]
print("heard:", heard)


# %%
def error(fn) -> str:
    """Return what `fn()` raises, in one line; fail if it raises nothing."""
    try:
        fn()
    except Exception as e:
        return f"{type(e).__name__}: {e.args[0]}"
    raise AssertionError("it should have raised")


def under(*backends: str):
    """Return the same MLP's output under these backends."""
    with use(*backends):
        return mlp(x_nd)


before = ACTIVE_BACKENDS
print(error(lambda: under("spy")))  # it is gone
IMPLS["swiglu"]["spy"] = IMPLS["swiglu"]["torch"]
print(error(lambda: under("spy")))  # `linear` has no such form: no silent fallback
del IMPLS["swiglu"]["spy"]
print(error(lambda: impl("swigloo", "spy")))
assert before == ACTIVE_BACKENDS  # put back, errors or not
assert torch.allclose(under("torch"), quiet)

# %% [markdown]
# ## Cross-entropy straight from the hidden state
# The loss of a token is the surprise at the right next word: minus the logarithm of its probability.
# With hidden states $h$ (n, d) and the head's matrix $W$ (w, d),
#
# $$L = \sum_n \Big(\log \sum_w e^{h_n\cdot W_w} - h_n\cdot W_{y_n}\Big),\qquad
# \frac{\partial L}{\partial h_n} = \sum_w (p_{nw} - [w = y_n])\,W_w ,$$
#
# in nats (surprise with the natural logarithm). Here $y_n$ is the right next word, $p_{nw}$ the softmax
# over words, and $[w = y_n]$ is 1 for the right word and 0 for others. Head and loss are *one* op because
# the scores between them, the **logits** $h_n\cdot W_w$, are the problem: an implementation need not hold all
# of them. Once a few tokens' logits are there, their gradient $p - [w = y]$ is one subtraction away, so a
# backend takes 512 tokens at a time and forgets their logits at once. The reference is the formula. In a
# pipeline the gradient of $W$ would wait for the backward pass too, and at V3's vocabulary it has 3.7 GB. A
# second op adds it to the sum over micro-batches during the forward pass.


# %%
#| export
CE_CHUNK_TOKENS = 512  # tokens whose logits a backend holds at a time


@op
def linear_cross_entropy(h_nd: Tensor, head_wd: Tensor, target_n: Tensor) -> Tensor:
    """Return the sum over tokens of −log softmax(h Wᵀ)[target], in nats."""
    logit_nw = upcast(F.linear(h_nd, head_wd))
    return F.cross_entropy(logit_nw, target_n, reduction="sum")


@op
def cross_entropy_and_grads(
    h_nd: Tensor, head_wd: Tensor, target_n: Tensor, scale: float, head_grad_wd: Tensor
) -> tuple[Tensor, Tensor]:
    """Return `linear_cross_entropy` and its gradient with respect to h times `scale`.

    scale times the gradient with respect to the head is added to head_grad_wd, in its dtype. A
    pipeline knows the loss's weight in the batch before its backward pass, and so keeps nothing of
    the head's size for it.
    """
    with torch.enable_grad():
        h_nd, head_wd = h_nd.detach().requires_grad_(), head_wd.detach().requires_grad_()
        nll = linear_cross_entropy(h_nd, head_wd, target_n)
    dh_nd, dhead_wd = torch.autograd.grad(nll, (h_nd, head_wd))
    head_grad_wd.add_(dhead_wd, alpha=scale)
    return nll.detach(), dh_nd * scale


# %%
h_nd = torch.randn(7, 16, requires_grad=True)
head_wd, target_n = torch.randn(50, 16), torch.arange(7)
(auto_nd,) = torch.autograd.grad(linear_cross_entropy(h_nd, head_wd, target_n), h_nd)
p_nw = (h_nd @ head_wd.T).softmax(-1)
hand_nd = (p_nw - F.one_hot(target_n, 50)) @ head_wd
assert torch.allclose(auto_nd, hand_nd, atol=1e-5)
head_grad_wd = torch.zeros_like(head_wd)
_, scaled_nd = cross_entropy_and_grads(h_nd, head_wd, target_n, 0.5, head_grad_wd)
assert torch.allclose(scaled_nd, hand_nd / 2, atol=1e-5)
assert torch.allclose(head_grad_wd, (p_nw - F.one_hot(target_n, 50)).T @ h_nd / 2, atol=1e-5)
blind = linear_cross_entropy(torch.zeros(1, 16), head_wd, target_n[:1]).item()
assert abs(blind - math.log(50)) < 1e-5  # a hidden state that says nothing: ln w
print(f"a blind guess among 50 words costs {blind:.3f} nats; ln 129,280 = {math.log(129_280):.2f}")

# %% [markdown]
# How large are the logits? At V3's vocabulary one sequence of 4096 tokens has half a billion of them.
# The product makes them in bf16, the loss wants them in fp32, and their gradient comes back in bf16.

# %%
sequence = 4096 * V3.vocab_size
print(f"logits of a sequence: {sequence:,}")
for what, size in {"in bf16": 2, "in fp32": 4, "both, and a bf16 gradient": 8}.items():
    print(f"{what:26}{sequence * size / 1e9:6.2f} GB")
print(f"{'its hidden states, bf16':26}{4096 * V3.dim * 2 / 1e9:6.2f} GB")
assert round(sequence * 4 / 1e9, 2) == 2.12

# %% [markdown]
# ## In practice: tuned forms behind the same ops
# [dsv3_ref/cpu](../dsv3_ref/cpu/__init__.py) registers the backend `cpu`. Its RMSNorm and SwiGLU have their gradients by hand and
# keep only their inputs; its loss takes 512 tokens at a time and turns their logits into loss and gradient in
# place, so that nothing of size $n \times w$ ever exists. One test holds every backend of every op to its reference,
# forward and backward. Below, the package's ops, of which this chapter's cells are the source.

# %%
from dsv3_ref import ops

with ops.use("cpu", "torch"):
    print("\n".join(ops.backend_table().splitlines()[-4:]))
    assert torch.allclose(
        ops.rms_norm(x_nd, w_d := torch.rand(16), 1e-6), rms_norm(x_nd, w_d, 1e-6), atol=1e-6
    )
    fast = ops.linear_cross_entropy(h_nd, head_wd, target_n)
assert torch.allclose(fast, linear_cross_entropy(h_nd, head_wd, target_n), atol=1e-4)

# %% [markdown]
# ## Experiment: what is kept, counted
# Take one feed-forward network with its norm. Step by step, torch keeps for each token $x$,
# $\hat x$ and $y$ of the norm, then gate, up, silu(gate) and the product that enters $W_2$. Norm and
# SwiGLU with gradients by hand keep only their inputs, but the matrices after them still keep the
# outputs. With `recompute` these are computed once more instead, and so are gate and up:
#
# $$\underbrace{3d + 4f + 1}_{\text{step by step}} \;\to\; \underbrace{2d + 3f + 1}_{\text{by hand}} \;\to\;
# \underbrace{d + 1}_{\text{recomputed}}\quad\text{numbers per token}$$
#
# (the 1 is $1/\rho$). Is the gradient still the same? "Step by step" is a backend like any other.

# %%
from dsv3_ref.ops import MLP, RMSNorm, use
from dsv3_ref.training.recompute import saved_tensors


@ops.impl("rms_norm", "steps")
def rms_norm_steps(x, weight, eps, dtype=None):
    return F.rms_norm(x, weight.shape, weight, eps)


@ops.impl("swiglu", "steps")
def swiglu_steps(gate, up):
    return F.silu(gate) * up


def train_once(norm: RMSNorm, mlp: MLP, x_nd, recompute: bool):
    """Return the gradient of x in Σ MLP(norm(x))², and the numbers kept for it per token."""
    with saved_tensors(recompute, [*norm.parameters(), *mlp.parameters()]) as saved:
        out_nd = mlp(norm(x_nd))
    numbers = saved.bytes // x_nd.element_size() // len(x_nd)
    (grad_nd,) = torch.autograd.grad(out_nd, x_nd, 2 * out_nd.detach())
    return grad_nd, numbers


# %%
D = 64
WAYS = {
    "step by step": (False, "steps"),
    "by hand": (False, "cpu"),
    "recomputed": (True, "cpu"),
}
widths = [32, 64, 128, 192, 256]
numbers_kept = {way: [] for way in WAYS}
for f in widths:
    norm, mlp = RMSNorm(D, 1e-6), MLP(D, f)
    for p in mlp.parameters():
        nn.init.normal_(p, std=0.1)
    x_nd = torch.randn(10, D, requires_grad=True)
    grads = {}
    for way, (enabled, backend) in WAYS.items():
        with use(backend, "torch"):
            grads[way], n = train_once(norm, mlp, x_nd, enabled)
        numbers_kept[way].append(n)
    assert numbers_kept["step by step"][-1] >= numbers_kept["by hand"][-1] + f == 2 * D + 4 * f + 1
    assert numbers_kept["recomputed"][-1] == D + 1
    assert torch.allclose(grads["step by step"], grads["by hand"], atol=1e-5)
    assert torch.equal(grads["by hand"], grads["recomputed"])  # bit for bit
del ops.IMPLS["rms_norm"]["steps"], ops.IMPLS["swiglu"]["steps"]

fig, ax = figure(width=8, height=3.2)
styles, colors = ["o-", "s--", "D:"], [GRAY, BLUE, ORANGE]
for (way, numbers), style, color in zip(numbers_kept.items(), styles, colors):
    ax.plot(widths, numbers, style, color=color, label=way)
ax.set(xlabel=f"width f of the network (d = {D})", ylabel="numbers kept per token", ylim=(0, None))
ax.set_title("With recomputation only the input is kept; the gradient is the same")
ax.legend()
show(fig)
d, f = V3.dim, V3.inter_dim
print(
    f"a dense layer of V3, kB per token in bf16: {2 * (3 * d + 4 * f) / 1e3:.0f} step by step,",
    end=" ",
)
print(f"{2 * (2 * d + 3 * f) / 1e3:.0f} by hand, {2 * d / 1e3:.0f} recomputed")

# %% [markdown]
# ## Play
# The figure at the top is a function of the number of tokens. While training, thousands pass a
# weight at once; while generating, a few. Slide down: at which number do even the matrix products
# fall left of the dotted line? With one byte per number (FP8) half as much moves and twice as much is
# computed per second, so the line itself moves.

# %%
roofline(tokens=32)

# %%
play(
    lambda log2_tokens, bytes_per_number: roofline(2**log2_tokens, bytes_per_number),
    log2_tokens=(0, 14, 1),
    bytes_per_number=[2, 1],
)

# %% [markdown]
# The same as a curve: a product is bound by arithmetic once 310 (head) to 360 tokens (expert) share its
# weights. But a token visits only 8 of 256 experts, so a batch must be 32 times as large to keep them
# all busy: one reason why 40 nodes generate together (§3.4.2).

# %%
fig, ax = figure(width=8, height=3)
tokens = [2**k for k in range(15)]
looks = {"expert's W₁": ("-", ORANGE), "head": ("--", BLUE), "SwiGLU": (":", GREEN)}
for name, (style, color) in looks.items():
    ratio = [ops / moved for ops, moved in (work(n)[name] for n in tokens)]
    ax.plot(tokens, ratio, style, color=color, label=name)
ax.axhline(PEAK / BANDWIDTH, color=GRAY, linestyle=":", linewidth=1)
ax.text(1, PEAK / BANDWIDTH * 1.15, "above: bound by arithmetic", color=GRAY)
ax.set(xscale="log", yscale="log", xlabel="tokens that share the weights")
ax.set(ylabel="operations per byte")
ax.set_title("Products need company; SwiGLU stays bound by memory")
ax.legend()
show(fig)

# %% [markdown]
# ## Exercises
# Fill in the functions that return `...`; the checkers defined here say how you did.


# %%
def check_logits(fn) -> bool:
    """Check that `fn(tokens, words)` is the size of fp32 logits in bytes."""
    cases = {(1, 10): 40, (3, 1000): 12_000, (4096, 129_280): 2_118_123_520}
    return attempt(
        lambda: all(abs(fn(*x) - n) < 0.5 for x, n in cases.items()),
        "one number for each token and word; how many bits has fp32?",
    )


def check_gradient(fn) -> bool:
    """Check that `fn(a)` is |gradient at a·x| / |gradient at x| of RMSNorm, for ε = 0."""

    def size(scale: float) -> float:
        x = (scale * torch.arange(1.0, 9.0, dtype=torch.float64)).requires_grad_()
        y = rms_norm(x, torch.ones_like(x), 0.0)
        return torch.autograd.grad(y[0], x)[0].norm().item()

    return attempt(
        lambda: all(abs(fn(a) - size(a) / size(1.0)) < 1e-9 for a in (0.5, 2.0, 10.0)),
        "y stays as it is when x grows; which factors of the gradient do not?",
    )


def check_overflow(fn) -> bool:
    """Check that `fn()` is a finite fp16 tensor whose norm is right in fp32 and wrong in fp16."""

    def test():
        x = fn()
        by_half = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        right = rms_norm(x.float(), torch.ones(x.shape[-1]), 1e-6)
        off = (by_half.float() - right).abs().max()
        return x.dtype == torch.float16 and x.isfinite().all() and not off < 0.5

    return attempt(test, "the largest finite fp16 number is 65,504; which numbers square to more?")


class Largest(TorchDispatchMode):
    """Mode that records the size of the largest tensor that any torch operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves(out)
        self.numel = max([self.numel, *(t.numel() for t in leaves if torch.is_tensor(t))])
        return out


def check_chunked(fn) -> bool:
    """Check that `fn(h, head, target, rows)` equals the op with logits of at most `rows` tokens."""

    def test():
        source = torch.Generator().manual_seed(1)
        h, head = (torch.randn(n, 8, generator=source) for n in (100, 400))
        target = torch.arange(100)
        with Largest() as largest:
            loss = fn(h, head, target, 16)
        right = linear_cross_entropy(h, head, target).item()
        close = torch.as_tensor(loss).numel() == 1 and abs(float(loss) / right - 1) < 1e-5
        return close and largest.numel <= max(16 * 400, head.numel())

    return attempt(test, "cut h and target into parts; does cross_entropy add or average?")


# %% [markdown]
# **1 · Compute.** How many bytes do fp32 logits of `tokens` tokens and `words` words take? Try V3's
# whole batch of 15,360 sequences of 4096.


# %%
def my_logits(tokens: int, words: int) -> int:
    return ...


check_logits(my_logits)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_logits(tokens, words):
#     return 4 * tokens * words
# ```
#
# 32.5 TB for V3's batch, if anyone stored them at once.
# </details>
#
# **2 · Predict.** Multiply the input of RMSNorm by $a > 0$. By what factor does the gradient
# with respect to the input change?


# %%
def my_gradient(a: float) -> float:
    return ...


check_gradient(my_gradient)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_gradient(a):
#     return 1 / a
# ```
#
# The output is the same, so a step of the same size counts $1/a$ as much.
# </details>
#
# **3 · Break.** Find a finite fp16 vector whose norm goes wrong if the squares are taken in fp16.


# %%
def my_overflow() -> torch.Tensor:
    return ...


check_overflow(my_overflow)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_overflow():
#     return torch.full((4,), 300.0, dtype=torch.float16)
# ```
#
# 300² = 90,000 is above 65,504, so it becomes infinite and the result 0. Hence `upcast(x)` in the
# op.
# </details>
#
# **4 · Extend.** Write the loss (the sum, without gradients) so that logits of at most `rows` tokens
# exist at a time, with what torch offers: `F.cross_entropy`.


# %%
def my_chunked(h_nd, head_wd, target_n, rows: int):
    return ...


check_chunked(my_chunked)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_chunked(h_nd, head_wd, target_n, rows):
#     parts = zip(h_nd.split(rows), target_n.split(rows))
#     return sum(F.cross_entropy(h @ head_wd.T, y, reduction="sum") for h, y in parts)
# ```
#
# Forward only: autograd would keep every chunk, which is why the op computes each chunk's gradient
# at once.
# </details>

# %% [markdown]
# ## Scale-up
# What does one token of V3 spend between its products? Each block has two norms of 7168 and two of
# the latents; each of 58 mixture layers runs SwiGLU on nine experts, each of three dense layers on
# one wide network of the same total width.

# %%
norm_dims = V3.n_layers * (2 * V3.dim + V3.q_lora_rank + V3.kv_lora_rank) + V3.dim
glu_dims = (V3.n_layers - 3) * 9 * V3.moe_inter_dim + 3 * V3.inter_dim
ops, moved = 4 * norm_dims + 5 * glu_dims, 2 * (2 * norm_dims + 3 * glu_dims)
products = 73.3e9  # chapter 00: the products of one token with weights, forward
print(f"norms and SwiGLU: {ops / products:.4%} of the operations,", end=" ")
print(f"{moved / BANDWIDTH / (products / PEAK):.1%} of the time of the products, forward")
tokens = 4096
print(f"kept for the backward pass, {tokens} tokens, one dense layer:", end=" ")
print(f"{tokens * 2 * (2 * V3.dim + 3 * V3.inter_dim) / 1e9:.2f} GB", end=", recomputed ")
print(f"{tokens * 2 * (V3.dim + 2 * V3.inter_dim) / 1e9:.2f} GB")
assert glu_dims == 61 * 18_432 and moved / ops > 1

# %% [markdown]
# **Memory traffic** binds these ops, so a kernel gains by joining neighbors: SwiGLU with the FP8
# quantization that follows it, RMSNorm with the residual sum before it. Such a kernel registers
# with `@impl("swiglu", "triton")` and changes nothing else. **Memory size** binds the loss: in fp32 one
# sequence's logits take 36 times as much as its hidden states in bf16, so head and loss stay one op.
# Several GPUs change none of this: the report trains without tensor parallelism, which would cut
# vectors and matrices into pieces, so these ops see whole vectors.
#
# Next: [02 · RoPE and YaRN](02_rope.ipynb), where position enters.
