"""Every implementation of every op equals its torch reference; the switch never falls back."""

import os
import re
import subprocess
import sys
from importlib import import_module
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dsv3_ref
from dsv3_ref import ops
from dsv3_ref.config import UserError
from dsv3_ref.moe import sort_by_expert
from dsv3_ref.rope import to_cu_seqlens
from dsv3_ref.training.recompute import saved_tensors

for path in sorted(Path(dsv3_ref.__file__).parent.glob("*.py")):
    if re.search(r"^@(op|impl)\b", path.read_text(), re.MULTILINE):
        import_module(f"dsv3_ref.{path.stem}")
import_module("dsv3_ref.cpu")

ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8}  # relative, of one number
SLACK = {"cpu": 16, "sdpa": 16}  # backend → allowed error in roundings, relative 2-norm


# ── Arguments of every op: `size(low, high)` draws a length, `randn` fills a tensor ──


def rms_norm(size, randn):
    d = size(2, 300)  # of one number only the sign is left: its gradient is rounding
    return randn(size(), d), randn(d), 1e-6


def linear(size, randn):
    i = size()
    return randn(size(), size(), i), randn(size(), i)


def swiglu(size, randn):
    shape = size(), size()
    return 4 * randn(*shape), randn(*shape)


def swiglu_linear(size, randn):
    n, f = size(), size()
    return 4 * randn(n, f), randn(n, f), randn(size(), f)


def linear_cross_entropy(size, randn):
    n, d = size(), size()
    w = size(2, 200)
    return randn(n, d), randn(w, d), torch.arange(n) * 7 % w


def apply_rotary_emb(size, randn):
    b, s = size(1, 3), size()
    h, pairs = size(1, 5), size(1, 9)
    angle = randn(s, pairs).detach().float() * 10
    return randn(b, s, h, 2 * pairs), angle.cos(), angle.sin()


def attention(size, randn):
    b, s = size(1, 3), size(1, 20)
    h, x = size(1, 4), size()
    v = size()
    t = s + size(0, 20)
    return randn(b, s, h, x), randn(b, t, h, x), randn(b, t, h, v), x**-0.5


def latent_attention(size, randn):
    b, s = size(1, 3), size(1, 20)
    h, c = size(1, 4), size()
    r = size()
    t = s + size(0, 20)
    return randn(b, s, h, c), randn(b, s, h, r), randn(b, t, c), randn(b, t, r), (c + r) ** -0.5


def varlen_attention(size, randn):
    h, x = size(1, 4), size()
    v = size()
    cu_seqlens = to_cu_seqlens([*(size(0, 12) for _ in range(size(0, 3))), size(1, 12)]).long()
    n = int(cu_seqlens[-1])
    return randn(n, h, x), randn(n, h, x), randn(n, h, v), cu_seqlens, x**-0.5


def paged_attention(size, randn):
    b, s = size(1, 3), size(1, 3)
    h, c = size(1, 4), size()
    r, y = size(), size(1, 8)
    pages = size(1, 5)
    block_table_bp = torch.stack([torch.randperm(pages + 2)[:pages] for _ in range(b)]).int()
    cache_seqlens_b = torch.tensor([max(s, size(1, pages * y)) for _ in range(b)]).clamp(
        max=pages * y
    )
    s = min(s, pages * y)
    q = randn(b, s, h, c + r)
    return q, randn(pages + 2, y, c + r), block_table_bp, cache_seqlens_b, c, (c + r) ** -0.5


def group_limited_topk(size, randn):
    groups, each = size(1, 4), size(1, 8)
    limited = size(1, groups)
    k = size(1, limited * each)
    score = torch.rand(size(), size(), groups * each)
    return score, k, groups, limited, min(2, each)


def grouped_linear(size, randn):
    i, o = 8 * size(1, 5), 8 * size(1, 5)  # the fast product wants rows of 16 bytes
    tokens_per_expert_e = torch.tensor([size(0, 9) for _ in range(size(1, 6))])
    return (
        randn(int(tokens_per_expert_e.sum()), i),
        randn(len(tokens_per_expert_e), o, i),
        tokens_per_expert_e,
    )


def grouped_swiglu_linear(size, randn):
    up, weight_eoi, tokens_per_expert_e = grouped_linear(size, randn)
    return 4 * randn(*up.shape), up, weight_eoi, tokens_per_expert_e, randn(len(up))


def rows(size):
    """Return n and k, and the rows of n tokens with k random experts each, sorted by expert."""
    n, k = size(), size(1, 5)
    return n, k, *sort_by_expert(torch.randint(4, (n, k)))


def permute(size, randn):
    n, _, sorted_ids_m, row_ids_nk = rows(size)
    return randn(n, size()), sorted_ids_m, row_ids_nk


def unpermute(size, randn):
    n, k, sorted_ids_m, row_ids_nk = rows(size)
    return randn(n * k, size()), randn(n, k), sorted_ids_m, row_ids_nk


CASES = [
    permute,
    unpermute,
    rms_norm,
    linear,
    swiglu,
    swiglu_linear,
    grouped_swiglu_linear,
    linear_cross_entropy,
    apply_rotary_emb,
    attention,
    latent_attention,
    varlen_attention,
    paged_attention,
    group_limited_topk,
]
CASES = {case.__name__: case for case in [*CASES, grouped_linear]}
ELSEWHERE = {"decode_weights", "attend_prefill", "run_layers"}  # tests/cpu/test_decoder.py
ELSEWHERE |= {"cross_entropy_and_grads"}  # below; it adds to one of its arguments
PAIRS = [  # other backends are tested elsewhere
    (name, backend) for name, backend in product(CASES, SLACK) if backend in ops.IMPLS[name]
]


# ── One test for all of them ──


def arguments(data, name: str, dtype) -> list:
    """Draw arguments of an op; the floating tensors from `randn` require a gradient."""
    source = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), label="seed"))

    def size(low=1, high=40):
        return data.draw(st.integers(low, high))

    def randn(*shape):
        return torch.randn(shape, generator=source).to(dtype).requires_grad_()

    return [detached(x) for x in CASES[name](size, randn)]


def detached(x):
    """Return the same values as a leaf that requires a gradient if `x` does."""
    return x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x


def results(fn, args: list, dtype=None) -> list[torch.Tensor]:
    """Return output and gradients of `fn`, computed in `dtype`, for a fixed incoming gradient."""
    floats = [isinstance(x, torch.Tensor) and x.requires_grad for x in args]
    args = [x.detach().to(dtype).requires_grad_() if f else x for x, f in zip(args, floats)]
    y = fn(*args)
    grad = torch.linspace(0.5, 1.5, y.numel()).view(y.shape)  # `.sum()` would hide permutations
    leaves = [x for x, f in zip(args, floats) if f]
    return [y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def error(got, want, least: float = 0.5) -> float:
    """Return rms(got − want) / rms(want), with rms(want) at least `least`.

    The cases are of order 1; a result far below that comes from cancellation.
    """

    def rms(x):
        return x.double().square().mean().sqrt()

    return (rms(got - want) / rms(want).clamp(min=least)).item() if want.numel() else 0.0


def floor(name: str, i: int) -> float:
    """Return the least size of a result: more, where larger numbers are subtracted for it."""
    gradient = i and name.endswith("attention")  # of a softmax: sums of up to 40 terms
    loss = name == "linear_cross_entropy" and not i  # two logits
    return 4.0 if gradient or loss else 0.5


def test_every_op_has_a_case():
    own = {n for n, i in ops.IMPLS.items() if i["torch"].__module__ != "dsv3_ref.fp8"}  # test_fp8
    assert set(CASES) == own - ELSEWHERE
    assert own >= ELSEWHERE
    assert all("torch" in impls for impls in ops.IMPLS.values())


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("name, backend", PAIRS)
@given(data=st.data())
def test_an_implementation_equals_the_reference(name, backend, dtype, data):
    args = arguments(data, name, dtype)
    want = results(ops.IMPLS[name]["torch"], args, torch.float32)
    got = results(ops.IMPLS[name][backend], args, dtype)
    for i, (g, w) in enumerate(zip(got, want)):
        assert g.shape == w.shape
        assert error(g, w, floor(name, i)) < SLACK[backend] * ROUNDING[dtype]


@given(data=st.data())
def test_linear_is_the_sum_it_says(data):
    x, w = arguments(data, "linear", torch.float64)
    assert torch.allclose(ops.linear(x, w), (x[..., None, :] * w).sum(-1))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_norm_keeps_the_dtype_unless_another_is_asked_for(backend, dtype):
    x, weight = torch.randn(3, 8).to(dtype), torch.ones(8)
    norm = ops.IMPLS["rms_norm"][backend]
    assert norm(x, weight, 1e-6).dtype == dtype
    assert norm(x, weight, 1e-6, torch.bfloat16).dtype == torch.bfloat16
    assert norm(x, weight, 1e-6, torch.float32).dtype == torch.float32


def test_the_norm_layer_returns_the_dtype_of_matrix_products():
    norm, x = ops.RMSNorm(8, 1e-6), torch.randn(3, 8)
    assert norm(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == ops.linear(x, x).dtype == torch.bfloat16


def test_a_weight_gradient_waits_only_inside_the_block_that_defers_it():
    weight, calls = torch.ones(2), []

    def wgrad_fn():
        calls.append("run")
        return 3 * weight

    assert torch.equal(ops.defer_wgrad(weight, wgrad_fn), 3 * weight)
    with ops.deferring_wgrads() as deferred:
        assert ops.defer_wgrad(weight, wgrad_fn) is None
    assert deferred == [(weight, wgrad_fn)] and calls == ["run"]
    assert torch.equal(ops.defer_wgrad(weight, wgrad_fn), 3 * weight)


def test_a_weight_gradient_is_added_to_main_grad():
    weight, x = torch.ones(3, dtype=torch.bfloat16), torch.tensor([1.0, 2**-12, 3.0])
    weight.main_grad = torch.ones(3)

    def wgrad_fn(out=None):
        return x if out is None else out.add_(x)

    assert ops.defer_wgrad(weight, wgrad_fn) is None
    with ops.deferring_wgrads() as deferred:
        assert ops.defer_wgrad(weight, wgrad_fn) is None
    assert torch.equal(weight.main_grad, 1 + x)  # bf16 would round 1 + 2⁻¹² to 1
    for pair in deferred:
        assert ops.compute_wgrad(*pair) is None
    assert torch.equal(weight.main_grad, 1 + x + x)


# ── The seam ──


def test_the_switch_chooses_and_is_put_back():
    before = ops.ACTIVE_BACKENDS
    with ops.use("cpu", "torch"):
        assert ops.resolve_impl("swiglu") is ops.IMPLS["swiglu"]["cpu"]
        assert ops.resolve_impl("linear") is ops.IMPLS["linear"]["torch"]
        with ops.use("torch"):
            assert ops.resolve_impl("swiglu") is ops.IMPLS["swiglu"]["torch"]
        assert ops.resolve_impl("swiglu") is ops.IMPLS["swiglu"]["cpu"]
    with pytest.raises(ZeroDivisionError), ops.use("cpu"):
        _ = 1 / 0
    assert before == ops.ACTIVE_BACKENDS


def test_a_call_reaches_the_chosen_implementation(monkeypatch):
    monkeypatch.setitem(ops.IMPLS["swiglu"], "loud", lambda gate, up: "heard")
    with ops.use("loud", "torch"):
        assert ops.swiglu(1, 2) == "heard"


def test_an_unknown_backend_raises():
    words = "no backend cuda-graph; known: .*cpu.*torch"
    with pytest.raises(ValueError, match=words), ops.use("torch", "cuda-graph"):
        pass


def test_nothing_falls_back_in_silence():
    x = torch.randn(3, 4)
    with ops.use("cpu"), pytest.raises(UserError) as e:
        ops.linear(x, x)
    assert "'linear' has no cpu implementation, only torch" in str(e.value)
    assert "DSV3_BACKEND=cpu,torch" in str(e.value)
    with ops.use("cpu", "sdpa"), pytest.raises(UserError) as e:
        ops.linear(x, x)
    assert "DSV3_BACKEND=cpu,torch" in str(e.value)  # the first choice is kept


def test_an_implementation_of_no_op_raises():
    with pytest.raises(KeyError, match="no op 'swigloo'"):
        ops.impl("swigloo", "cpu")


def run_with_backend(value: str, code: str):
    env = {**os.environ, "DSV3_BACKEND": value}
    command = [sys.executable, "-c", f"import torch\nfrom dsv3_ref.ops import *\n{code}"]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_the_environment_chooses():
    done = run_with_backend("cpu,torch", "print(resolve_impl('swiglu') is IMPLS['swiglu']['cpu'])")
    assert done.stdout == "True\n", done.stderr


def test_the_environment_never_falls_back():
    done = run_with_backend("cuda-graph", "swiglu(torch.ones(1), torch.ones(1))")
    assert done.returncode == 1
    assert "op 'swiglu' has no cuda-graph implementation" in done.stderr


@pytest.fixture
def registry(monkeypatch):
    """The registered forms, restored after the test."""
    forms = {name: dict(impls) for name, impls in ops.IMPLS.items()}
    monkeypatch.setattr(ops, "IMPLS", forms)
    return forms


def cell(name: str):
    """Return a function as a notebook's cell defines it; it returns its name and module."""

    def fn(*args):
        return f"{name} of the notebook"

    fn.__name__, fn.__module__ = name, "__main__"
    return fn


def test_a_notebooks_op_comes_before_every_tuned_form(registry):
    tuned = ops.resolve_impl("swiglu")
    call = ops.op(cell("swiglu"))
    assert call(1, 2) == ops.swiglu(1, 2) == "swiglu of the notebook"  # the package's callers too
    assert {names[0] for names in ops.AUTO_BACKENDS.values()} == {"notebook"}  # on every device
    assert re.search(r"^swiglu +notebook +cpu", ops.backend_table(), re.MULTILINE)
    assert registry["swiglu"]["cpu"] is tuned


def test_an_edited_cell_takes_effect_again(registry):
    ops.op(cell("swiglu"))
    edited = cell("swiglu")
    ops.op(edited)
    assert ops.resolve_impl("swiglu") is edited
    with ops.use("torch"):
        assert ops.resolve_impl("swiglu") is edited  # it is the reference as well


def test_a_chosen_backend_comes_before_a_notebooks_op(registry):
    ops.op(cell("swiglu"))
    with ops.use("cpu", "torch"):
        assert ops.resolve_impl("swiglu") is registry["swiglu"]["cpu"]
        assert re.search(r"^swiglu +cpu +notebook", ops.backend_table(), re.MULTILINE)
    with ops.use("cpu", "auto"):
        assert ops.resolve_impl("swiglu") is registry["swiglu"]["cpu"]
    with ops.use("notebook", "cpu"):
        assert ops.resolve_impl("swiglu") is registry["swiglu"]["notebook"]


def test_a_module_does_not_undo_a_notebooks_forms(registry):
    mine, tuned = cell("swiglu"), cell("rms_norm")
    ops.op(mine)
    ops.impl("rms_norm", "cpu")(tuned)
    module = {}
    exec("def swiglu(gate, up): ...\ndef rms_norm(x): ...", {"__name__": "a.module"}, module)
    ops.op(module["swiglu"])
    ops.impl("rms_norm", "cpu")(module["rms_norm"])
    ops.impl("swiglu", "cpu")(module["swiglu"])
    assert registry["swiglu"]["torch"] is registry["swiglu"]["notebook"] is mine
    assert registry["swiglu"]["cpu"] is module["swiglu"]
    assert ops.resolve_impl("rms_norm") is tuned


def test_a_scripts_op_comes_first_in_a_child_process_too(registry):
    spawned = cell("swiglu")
    spawned.__module__ = "__mp_main__"  # the name under which multiprocessing imports a script
    ops.op(spawned)
    assert ops.resolve_impl("swiglu") is spawned


def test_a_new_op_of_a_notebook_needs_no_other_form(registry):
    call = ops.op(cell("brand_new"))
    assert call() == "brand_new of the notebook"
    with ops.use("cpu", "torch"):
        assert call() == "brand_new of the notebook"


SCRIPT = """
from dsv3_ref.ops import IMPLS, op, resolve_impl, use

@op
def apply_rotary_emb(x_bshr, cos, sin):
    return x_bshr  # an edit of chapter 02's cell

from dsv3_ref import rope  # defines the same op, and the backend cpu is imported later still

x = torch.randn(1, 3, 2, 4)
turned = rope.apply_rotary_emb(x, torch.zeros(3, 2), torch.ones(3, 2))
assert turned is x, "the package's own callers reach the edited cell"
with use("cpu", "torch"):
    assert not torch.equal(rope.apply_rotary_emb(x, torch.zeros(3, 2), torch.ones(3, 2)), x)
print(sorted(IMPLS["apply_rotary_emb"]))
"""


def test_a_script_that_edits_an_op_reaches_the_package():
    done = run_with_backend("auto", SCRIPT)
    assert done.stdout.startswith("['cpu', 'notebook', 'torch'"), done.stderr


def test_table_shows_who_is_active():
    with ops.use("cpu", "torch"):
        rows = {line.split()[0]: line.split()[1:] for line in ops.backend_table().splitlines()}
    assert set(rows) == set(ops.IMPLS)
    assert rows["swiglu"][0] == "cpu"
    assert rows["linear"][0] == "torch"
    with ops.use("cpu"):
        assert any(
            line.split()[:2] == ["linear", "none"] for line in ops.backend_table().splitlines()
        )


# ── Kept, or computed again ──


def chain(x, w):
    """Return Σ of squares after norm, product, SwiGLU and product."""
    y = ops.recompute(ops.rms_norm, x, torch.ones(x.shape[-1], dtype=x.dtype), 1e-6)
    z = ops.recompute(ops.swiglu, ops.linear(y, w), ops.linear(y[:, :], 2 * w))
    return ops.linear(z, w.T).square().sum()


@pytest.mark.parametrize("cast", [False, True], ids=["fp32", "autocast"])
def test_recomputing_changes_no_bit_of_a_gradient(cast):
    x, w = torch.randn(9, 32, requires_grad=True), torch.randn(48, 32, requires_grad=True)
    saved_bytes, grads = [], []
    for recompute in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            with saved_tensors(recompute, [w]) as saved:
                loss = chain(x, w)
            saved_bytes.append(saved.bytes)
        grads.append(torch.autograd.grad(loss, (x, w)))  # outside of the autocast block
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    assert saved_bytes[1] < saved_bytes[0]


def test_results_are_made_once_for_all_who_need_them_and_then_let_go():
    calls = []

    def double(x):
        calls.append(x)
        return 2 * x, 3 * x

    x = torch.randn(5, requires_grad=True)
    with saved_tensors(True):
        a, b = ops.recompute(double, x)
        y = a.sin().sum() + a.cos().sum() + b.view(1, 5).sin().sum()
    for n in (2, 3):  # the forward pass, then once for each backward pass
        (grad,) = torch.autograd.grad(y, x, retain_graph=True)
        want = 2 * (2 * x).cos() - 2 * (2 * x).sin() + 3 * (3 * x).cos()
        assert torch.allclose(grad, want)
        assert len(calls) == n


def test_an_address_that_is_used_again_is_not_taken_for_a_result():
    x = torch.randn(1000, requires_grad=True)
    with saved_tensors(True):
        ops.recompute(torch.sin, x)  # freed at once; what comes next may lie where it lay
        others = [(x + i).exp() for i in range(20)]
        y = sum(o.square().sum() for o in others)
    (grad,) = torch.autograd.grad(y, x)
    assert torch.allclose(grad, sum(2 * (2 * (x + i)).exp() for i in range(20)), rtol=1e-4)


def test_outside_of_a_block_again_is_a_plain_call():
    x = torch.randn(3, requires_grad=True)
    with pytest.raises(ZeroDivisionError), saved_tensors(True):
        _ = 1 / 0
    assert ops.RECOMPUTE_HOOK is None
    with torch.no_grad(), saved_tensors(True) as saved:
        assert torch.equal(ops.recompute(torch.sin, x), x.sin())
    assert saved.bytes == 0


@pytest.mark.parametrize("backend", sorted(ops.IMPLS["cross_entropy_and_grads"]))
@pytest.mark.parametrize("n", [0, 1, 511, 1025])
def test_the_loss_adds_the_gradient_of_the_head_during_the_forward_pass(n, backend):
    fused = ops.IMPLS["cross_entropy_and_grads"][backend]
    h_nd, head_wd = torch.randn(n, 64), torch.randn(300, 64)
    target_n = torch.arange(n) * 7 % 300
    before_wd = torch.randn(300, 64)
    head_grad_wd = before_wd.clone()
    nll, dh_nd = fused(h_nd, head_wd, target_n, 0.125, head_grad_wd)
    leaves = [x.double().requires_grad_() for x in (h_nd, head_wd)]
    exact = ops.IMPLS["linear_cross_entropy"]["torch"](*leaves, target_n)
    want_h, want_head = torch.autograd.grad(exact, leaves)
    assert nll.item() == pytest.approx(exact.item(), rel=1e-5)
    assert error(dh_nd, 0.125 * want_h, 1e-3) < 1e-5
    assert error(head_grad_wd - before_wd, 0.125 * want_head, 1e-3) < 1e-5


@pytest.mark.parametrize("n", [1, 511, 513])
def test_the_chunked_loss_under_autocast(n):
    h_nd, head_wd = torch.randn(n, 64, requires_grad=True), torch.randn(300, 64, requires_grad=True)
    target_n = torch.arange(n) * 7 % 300
    exact = ops.IMPLS["linear_cross_entropy"]["torch"](h_nd, head_wd, target_n)
    want = torch.autograd.grad(exact, (h_nd, head_wd))
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.linear_cross_entropy(h_nd, head_wd, target_n)
    got = torch.autograd.grad(loss, (h_nd, head_wd))
    assert loss.dtype == torch.float32  # bf16 is too coarse for a sum over a batch
    assert loss.item() == pytest.approx(exact.item(), rel=0.01)
    for g, w in zip(got, want):
        assert g.dtype == torch.float32
        assert error(g, w) < 0.02
