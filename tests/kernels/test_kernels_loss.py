"""Cross-entropy from the hidden state equals its torch reference and never holds all logits."""

import interpreter  # noqa: F401  first: makes Triton's interpreter round as a GPU does
import pytest
import torch
from dsv3_ref.kernels import loss
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsv3_ref import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8}  # relative, of one number
SLACK = {torch.float32: 16, torch.bfloat16: 4}
fused, reference = (ops.IMPLS["linear_cross_entropy"][backend] for backend in ("triton", "torch"))


def arguments(n: int, d: int, w: int, dtype=torch.float32, scale: float = 1.0) -> tuple:
    h_nd = (scale * d**-0.5 * torch.randn(n, d)).to(DEVICE, dtype).requires_grad_()
    head_wd = torch.randn(w, d).to(DEVICE, dtype).requires_grad_()
    return h_nd, head_wd, torch.randint(w, (n,)).to(DEVICE)


def results(fn, h_nd, head_wd, target_n, dtype=None) -> list[torch.Tensor]:
    """Return the loss and both gradients, for an incoming gradient of 1.5."""
    h, head = (x.detach().to(dtype).requires_grad_() for x in (h_nd, head_wd))
    nll = fn(h, head, target_n)
    return [nll, *torch.autograd.grad(1.5 * nll, (h, head))]


def error(got, want) -> float:
    """Return the relative 2-norm of the difference, or infinity for NaN."""
    difference = ((got.double() - want).norm() / want.norm()).item()
    return difference if difference == difference else float("inf")


def errors(args, dtype) -> list[float]:
    want = results(reference, *args, dtype=torch.float64)
    got = results(fused, *args, dtype=dtype)
    assert [g.dtype for g in got] == [torch.float32, dtype, dtype]
    return [error(g, w) for g, w in zip(got, want)]


# ── Equal to the reference ──


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("n, d, w", [(1, 5, 2), (1, 64, 4096), (19, 33, 300), (7, 576, 4097)])
@pytest.mark.parametrize("scale", [1, 0.1])
def test_loss_and_gradients_equal_the_reference(n, d, w, scale, dtype):
    assert max(errors(arguments(n, d, w, dtype, scale), dtype)) < SLACK[dtype] * ROUNDING[dtype]


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("n", [15, 16, 17, 33])
def test_chunks_change_nothing(n, dtype, monkeypatch):
    args = arguments(n, 24, 100, dtype)
    monkeypatch.setattr(loss, "MAX_LOGITS", 16 * 100 + 99)  # 16 tokens
    assert max(errors(args, dtype)) < SLACK[dtype] * ROUNDING[dtype]


def test_the_gradient_of_the_head_is_summed_in_fp32(monkeypatch):
    monkeypatch.setattr(loss, "MAX_LOGITS", 1)  # one token per chunk: 200 sums
    h_nd, head_wd, target_n = arguments(200, 8, 3, torch.bfloat16)
    got, want = (
        results(fn, h_nd, head_wd, target_n, dtype)[2]
        for fn, dtype in ((fused, torch.bfloat16), (reference, torch.float64))
    )
    assert error(got, want) < 2 * ROUNDING[torch.bfloat16]


def test_logits_of_any_size():
    """With logits of some thousand, exp is 0 or infinite unless the maximum is subtracted."""
    assert max(errors(arguments(9, 64, 5000, scale=1000), torch.float32)) < 1e-4
    h_nd, head_wd, target_n = arguments(6, 16, 50)
    assert fused(h_nd * 0 - 1, head_wd * 0 + 1, target_n).item() == pytest.approx(
        6 * torch.tensor(50.0).log().item(), rel=1e-6
    )


def test_strided_inputs():
    wide_nd, head_wd, target_n = arguments(14, 40, 70)
    args = wide_nd[::2, 8:], head_wd[:, 8:], target_n[::2]
    assert max(errors(args, torch.float32)) < SLACK[torch.float32] * ROUNDING[torch.float32]
    assert torch.equal(fused(*args[:2], args[2].int()), fused(*args))


def test_no_tokens():
    got = results(fused, *arguments(0, 8, 30), dtype=torch.float32)
    assert [x.numel() for x in got] == [1, 0, 240]
    assert not got[0] and not got[2].any()


def test_autocast_casts_as_the_reference_does():
    args = arguments(21, 64, 300)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = results(fused, *args, dtype=torch.float32)
        want = results(reference, *args, dtype=torch.float32)
    assert all(g.dtype == torch.float32 for g in got)
    for g, w in zip(got, want):
        assert error(g, w.double()) < 2 * ROUNDING[torch.bfloat16]
    exact = results(fused, *args, dtype=torch.float32)
    assert error(got[1], exact[1].double()) > ROUNDING[torch.bfloat16] / 8  # it did cast


# ── Work and memory ──


class OperationLog(TorchDispatchMode):
    """A record of all operations and of the bytes of their largest result."""

    def __init__(self):
        super().__init__()
        self.largest_bytes, self.operations = 0, []

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        result = fn(*args, **(kwargs or {}))
        sizes = [x.nbytes for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.largest_bytes = max([self.largest_bytes, *sizes])
        self.operations.append(fn.overloadpacket)
        return result


def largest_result(fn, n: int, d: int, w: int) -> int:
    """Return the bytes of the largest tensor in the forward and backward pass of fn."""
    args = arguments(n, d, w)
    with OperationLog() as log:
        fn(*args).backward()
    return log.largest_bytes


def test_logits_exist_in_chunks_only(monkeypatch):
    n, d = 60, 4
    w = 200
    monkeypatch.setattr(loss, "MAX_LOGITS", 16 * w)
    naive = ops.IMPLS["linear_cross_entropy"]["torch"]
    assert largest_result(naive, n, d, w) >= 4 * n * w
    assert largest_result(fused, n, d, w) <= 4 * 16 * w
    monkeypatch.setattr(loss, "MAX_LOGITS", 2**28)
    assert largest_result(fused, n, d, w) == 4 * n * w


def test_the_logits_of_v3_take_half_a_gigabyte():
    rows = loss.MAX_LOGITS // 129_280
    assert rows >= 2048
    assert rows * 129_280 * 2 <= 2**29


@pytest.mark.parametrize("h, head", [(True, False), (False, True), (False, False)])
def test_only_needed_gradients_are_computed(h, head):
    h_nd, head_wd, target_n = arguments(11, 8, 60)
    want = results(reference, h_nd, head_wd, target_n, torch.float64)
    leaves = [x.requires_grad_(needed) for x, needed in ((h_nd, h), (head_wd, head)) if needed]
    h_nd.requires_grad_(h)
    head_wd.requires_grad_(head)
    with OperationLog() as log:
        nll = fused(h_nd, head_wd, target_n)
    assert error(nll.detach(), want[0]) < 1e-6
    assert log.operations.count(torch.ops.aten.mm) == 1 + h  # logits, and their gradient times W
    assert log.operations.count(torch.ops.aten.addmm_) == head
    grads = torch.autograd.grad(1.5 * nll, leaves) if leaves else ()
    for g, w in zip(grads, [w for w, needed in zip(want[1:], (h, head)) if needed]):
        assert error(g, w) < 1e-6


def test_no_gradient_work_without_a_backward_pass():
    args = arguments(11, 8, 60)
    with torch.no_grad(), OperationLog() as log:
        nll = fused(*args)
    assert log.operations.count(torch.ops.aten.mm) == 1
    assert torch.ops.aten.addmm_ not in log.operations
    assert error(nll, reference(*(x.double() for x in args[:2]), args[2])) < 1e-6


# ── Errors ──

INVALID = {
    "h_nd must be float32 or bfloat16, not float64": (0, lambda x: x.double()),
    "h_nd must have shape .any, any., not": (0, lambda x: x[None]),
    "head_wd must be float32, not bfloat16": (1, lambda x: x.bfloat16()),
    "head_wd must have shape .any, 8., not": (1, lambda x: x[:, :7]),
    "target_n must be int64 or int32, not float32": (2, lambda x: x.float()),
    "target_n must have shape .5., not": (2, lambda x: x[:4]),
}


@pytest.mark.parametrize("message", INVALID)
def test_invalid_arguments(message):
    args, (i, change) = list(arguments(5, 8, 30)), INVALID[message]
    args[i] = change(args[i])
    with pytest.raises(ValueError, match=message):
        fused(*args)


@pytest.mark.parametrize("target", [-100, -1, 30, 2**40])
def test_a_target_outside_the_vocabulary_raises_or_gives_nan(target):
    h_nd, head_wd, target_n = arguments(5, 8, 30)
    target_n[3] = target
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="target_n must lie within the vocabulary of 30"):
            fused(h_nd, head_wd, target_n)
    else:
        assert fused(h_nd, head_wd, target_n).isnan()


@pytest.mark.parametrize("target", [-1, 30])
def test_the_kernel_gives_nan_for_a_target_outside_the_vocabulary(target):
    logit_nw, nll_n = torch.randn(3, 30, device=DEVICE), torch.empty(3, device=DEVICE)
    target_n = torch.tensor([4, target, 5], device=DEVICE)
    loss._cross_entropy_kernel[3,](logit_nw, target_n, nll_n, 30, 30, GRADIENT=True)
    assert nll_n.isnan().tolist() == [False, True, False]
    assert logit_nw.isnan().all(1).tolist() == [False, True, False]
