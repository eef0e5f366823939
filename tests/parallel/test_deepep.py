"""DeepEP as the token dispatcher, with a stand-in for `deep_ep` that keeps its contract on gloo.

Signatures, dtypes, shapes and the use of handles follow DeepEP's documentation and the checks of
its host code. Results are garbage until their event is waited for, as on a separate stream.
"""

import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from test_parallel import CPU, MICRO, relative

from dsv3_ref import ops
from dsv3_ref.config import V3, UserError, ceil_div
from dsv3_ref.moe import MoE
from dsv3_ref.optim import RECIPES
from dsv3_ref.parallel.deepep import DeepEPDispatcher, create_buffer
from dsv3_ref.parallel.engine import EngineSettings, ParallelEngine
from dsv3_ref.parallel.mesh import Mesh
from dsv3_ref.parallel.tape import Tape, run_to_completion
from dsv3_ref.parallel.token_dispatcher import AllToAllDispatcher, Traffic, dispatch_levels


# ── A module that keeps the contract of deep_ep ──


def is_matrix(x, dtype) -> bool:
    return x.dtype == dtype and x.dim() == 2 and x.is_contiguous()


def aligned(n: int, to: int) -> int:
    return ceil_div(n, to) * to


class Config:
    """Buffer sizes that grow with the rows; without NVSHMEM there is none for RDMA."""

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 256 * num_ranks * hidden_bytes

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        raise RuntimeError("NVSHMEM is disable during compilation")


class EventOverlap:
    """The event of an operation with `async_finish`; otherwise there is nothing to wait for."""

    def __init__(self, event=None):
        self.event = event

    def current_stream_wait(self) -> None:
        assert self.event is not None
        self.event()


def arriving(values, async_finish: bool):
    """Return (tensors, event); with `async_finish` tensors are garbage until the event is over."""
    if not async_finish:
        return values, EventOverlap()
    early = [None if v is None else torch.empty_like(v) for v in values]
    pairs = [(e, v) for e, v in zip(early, values) if v is not None]
    for e, _ in pairs:
        e.view(torch.uint8).fill_(0x7F)  # NaN, or a number far too large

    def finish() -> None:
        for e, v in pairs:
            e.copy_(v)

    return early, EventOverlap(finish)


class Buffer:
    """Dispatch and combine in one node of ranks; `calls` records which methods were called."""

    calls: list[str] = []  # of this process, as `num_sms` of the real class

    def __init__(
        self, group, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0, low_latency_mode=False
    ):
        self.group = group
        self.rank, self.group_size = group.rank(), group.size()
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8), f"Unsupported number of EP ranks: {num_ranks}"
        return Config()

    get_combine_config = get_dispatch_config

    def swap(self, rows, send: list[int], receive: list[int]):
        """Send rows to every rank, as bytes, since gloo does not support every dtype."""
        rows = rows.contiguous().view(torch.uint8)
        out = rows.new_empty(sum(receive), rows.shape[1])
        dist.all_to_all_single(out, rows, receive, send, group=self.group)
        return out

    def get_dispatch_layout(
        self, topk_idx, num_experts: int, previous_event=None, async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ):  # fmt: skip
        self.calls.append("layout")
        assert is_matrix(topk_idx, torch.int64) and num_experts % self.group_size == 0
        per = num_experts // self.group_size
        in_rank = torch.stack([(topk_idx // per == r).any(1) for r in range(self.group_size)], 1)
        per_expert = topk_idx[topk_idx >= 0].bincount(minlength=num_experts).int()
        return in_rank.sum(0).int(), None, per_expert, in_rank.contiguous(), EventOverlap()

    def dispatch(
        self, x, handle=None, num_tokens_per_rank=None, num_tokens_per_rdma_rank=None,
        is_token_in_rank=None, num_tokens_per_expert=None, topk_idx=None, topk_weights=None,
        expert_alignment: int = 1, num_worst_tokens: int = 0, config=None, previous_event=None,
        async_finish: bool = False, allocate_on_comm_stream: bool = False,
    ):  # fmt: skip
        self.calls.append("dispatch" if handle is None else "dispatch again")
        parts = self.parts(x)

        def like_x(received):
            return tuple(received) if isinstance(x, tuple) else received[0]

        if handle is not None:
            assert topk_idx is None and topk_weights is None
            assert len(parts[0]) == len(handle[2])
            got, event = arriving(self.send(parts, *handle[::2]), async_finish)
            return like_x(got), None, None, None, None, event
        in_rank = is_token_in_rank
        per_rank, per_expert = num_tokens_per_rank, num_tokens_per_expert
        self.check_layout(len(parts[0]), per_rank, in_rank, per_expert)
        assert is_matrix(topk_idx, torch.int64) and is_matrix(topk_weights, torch.float32)
        assert topk_idx.shape == topk_weights.shape and len(topk_idx) == len(in_rank)
        receive = torch.empty_like(per_rank)
        dist.all_to_all_single(receive, per_rank, group=self.group)
        source = torch.arange(len(in_rank), dtype=torch.int32)[:, None]
        *got, idx, weights, source = self.send(
            (*parts, topk_idx, topk_weights, source), receive, in_rank
        )
        per = len(per_expert) // self.group_size
        idx = torch.where(idx // per == self.rank, idx - per * self.rank, -1)
        counts = [aligned(int((idx == e).sum()), expert_alignment) for e in range(per)]
        values = [*got, idx, torch.where(idx < 0, 0.0, weights)]
        (*got, idx, weights), event = arriving(values, async_finish)
        return like_x(got), idx, weights, counts, (receive, source[:, 0], in_rank), event

    def parts(self, x) -> tuple:
        """Return rows in bf16, or FP8 values and scales, after the checks of DeepEP's host code."""
        bytes_of_row = (x[0] if isinstance(x, tuple) else x)[:1].nbytes or 16
        assert bytes_of_row % 16 == 0
        assert self.num_nvl_bytes >= 256 * self.group_size * bytes_of_row
        if not isinstance(x, tuple):
            assert is_matrix(x, torch.bfloat16)
            return (x,)
        q, s = x
        assert is_matrix(q, torch.float8_e4m3fn) and s.dtype == torch.float32
        assert s.shape == (len(q), q.shape[1] // 128)
        return q, s

    def check_layout(self, n: int, per_rank, in_rank, per_expert) -> None:
        assert per_rank.dtype == per_expert.dtype == torch.int32
        assert is_matrix(in_rank, torch.bool) and in_rank.shape == (n, self.group_size)
        assert torch.equal(per_rank.long(), in_rank.sum(0))

    def send(self, parts, receive, in_rank) -> list:
        """Send a token once to each rank, in the order of source rank and token."""
        token_m, send = in_rank.T.nonzero()[:, 1], in_rank.sum(0).tolist()
        rows = [self.swap(part[token_m], send, receive.tolist()) for part in parts]
        return [r.view(part.dtype) for r, part in zip(rows, parts)]

    def combine(
        self, x, handle, topk_weights=None, bias=None, config=None, previous_event=None,
        async_finish: bool = False, allocate_on_comm_stream: bool = False,
    ):  # fmt: skip
        self.calls.append("combine" if topk_weights is None else "combine with weights")
        receive, source, in_rank = handle
        assert is_matrix(x, torch.bfloat16) and len(x) == len(source)
        assert topk_weights is None or is_matrix(topk_weights, torch.float32)
        y = self.reduce(x, receive, in_rank).bfloat16()
        w = None if topk_weights is None else self.reduce(topk_weights, receive, in_rank)
        (y, w), event = arriving([y, w], async_finish)
        return y, w, event

    def reduce(self, rows, receive, in_rank):
        """Send rows back to their tokens and sum them in fp32."""
        token_m, back = in_rank.T.nonzero()[:, 1], in_rank.sum(0).tolist()
        got = self.swap(rows, receive.tolist(), back).view(rows.dtype).float()
        return torch.zeros(len(in_rank), rows.shape[1]).index_add_(0, token_m, got)


@contextmanager
def deep_ep():
    """Make the module importable in the block; yield the list of calls."""
    module = ModuleType("deep_ep")
    module.Buffer, Buffer.calls[:] = Buffer, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "deep_ep", module)
        yield Buffer.calls


# ── Results and gradients ──

WIDE = replace(V3, dim=128, moe_inter_dim=128, n_routed_experts=16, n_activated_experts=4,
               n_expert_groups=4, n_limited_groups=2)  # fmt: skip


def layer(mesh):
    """Return this rank's experts, tokens (none on rank 1), weights, expert ids, and a gradient."""
    torch.manual_seed(0)
    moe = MoE(WIDE)
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    for name in ("w1", "w2", "w3"):
        local = getattr(moe.experts, name).detach().chunk(mesh.ep)[mesh.ep_rank].clone()
        setattr(moe.experts, name, torch.nn.Parameter(local))
    torch.manual_seed(5 + mesh.ep_rank)
    x_nd, g_nd = torch.randn(2, 0 if mesh.ep_rank == 1 else 7 + mesh.ep_rank, WIDE.dim).bfloat16()
    r = moe.gate(x_nd[None])
    return moe.experts, x_nd, r.topk_weights_bsk[0].detach(), r.topk_ids_bsk[0], g_nd


def run_passes(dispatcher, experts, x_nd, weight_nk, expert_nk, g_nd) -> dict:
    """Return output and gradients, and how often the forward and the backward pass yield."""
    tape = Tape()
    for p in experts.parameters():
        p.grad = None
    y_nd, yields = run_counted(dispatcher.apply_experts(tape, experts, x_nd, weight_nk, expert_nk))
    tape.add_grad(y_nd, g_nd)
    _, backward_yields = run_counted(tape.backward())
    results = {"y": y_nd, "dx": tape.pop_grad(x_nd), "dweight": tape.pop_grad(weight_nk)}
    results |= {name: getattr(experts, name).grad for name in ("w1", "w2", "w3")}
    return results | {"yields": (yields, backward_yields)}


def run_counted(steps):
    """Run a generator; return its result and how often it yields."""
    n = 0
    try:
        while True:
            next(steps)
            n += 1
    except StopIteration as end:
        return end.value, n


def all_to_all(mesh, fp8: bool = False) -> AllToAllDispatcher:
    return AllToAllDispatcher(dispatch_levels(WIDE, mesh, 0, Traffic()), fp8)


def compare_dispatchers(world: int, fp8: bool, backends: tuple):
    """Return the results by DeepEP and by all-to-alls, and the calls of DeepEP."""
    mesh = Mesh(1, 1, world, CPU)
    with ops.use(*backends), torch.autocast("cpu", torch.bfloat16), deep_ep() as calls:
        args = layer(mesh)
        want = run_passes(all_to_all(mesh, fp8), *args)
        got = run_passes(DeepEPDispatcher(WIDE, mesh.ep_group, fp8), *args)
    return got, want, list(calls)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("fp8, backends", [(False, ("auto",)), (True, ("auto",)),
                                           (True, ("fp8", "auto"))], ids=str)  # fmt: skip
def test_results_and_gradients_are_those_of_all_to_alls(world, fp8, backends, gang):
    for got, want, calls in gang.run(world, compare_dispatchers, world, fp8, backends):
        for name in ("dweight", "w1", "w2", "w3"):  # of the same rows in the same order
            assert torch.equal(got[name], want[name]), name
        for name in ("y", "dx"):  # sums over ranks: rounded once; in all-to-alls at every rank
            assert got[name].dtype == want[name].dtype == torch.bfloat16
            assert not len(want[name]) or relative(got[name].float(), want[name].float()) < 2**-7
        assert got["yields"] == want["yields"] == (2, 2)
        assert calls == ["layout", "dispatch", "combine", "dispatch again", "combine with weights"]


def compare_fp32_tokens():
    """Return (dtypes, largest difference to all-to-alls, which send fp32) for fp32 tokens."""
    mesh = Mesh(1, 1, 2, CPU)
    experts, x_nd, weight_nk, expert_nk, g_nd = layer(mesh)
    x_nd, g_nd = (t + 0.01 * torch.randn(t.shape) for t in (x_nd, g_nd))
    args = experts, x_nd, weight_nk, expert_nk, g_nd
    want = run_passes(all_to_all(mesh), *args)
    with deep_ep():
        got = run_passes(DeepEPDispatcher(WIDE, mesh.ep_group), *args)
    names = ("y", "dx", "dweight", "w1", "w2", "w3") if len(x_nd) else ("w1", "w2", "w3")
    return {got[n].dtype for n in names}, max(relative(got[n], want[n]) for n in names)


def test_fp32_tokens_lose_a_rounding_and_keep_their_dtype(gang):
    for dtypes, error in gang.run(2, compare_fp32_tokens):
        assert dtypes == {torch.float32} and 0 < error < 2**-7


def compare_forward_passes():
    mesh = Mesh(1, 1, 2, CPU)
    experts, *tokens, _ = layer(mesh)
    results = []
    with torch.autocast("cpu", torch.bfloat16), deep_ep():
        for dispatcher in (DeepEPDispatcher(WIDE, mesh.ep_group), all_to_all(mesh)):
            steps = dispatcher.apply_experts(Tape(False), experts, *tokens)
            results.append(run_to_completion(steps).float())
    return results


def test_a_forward_pass_alone(gang):
    for got, want in gang.run(2, compare_forward_passes):
        assert relative(got, want) < 2**-7 if len(want) else got.shape == want.shape


# ── A step ──


def train_three_steps(name: str):
    """Return (losses and gradient norms, traffic) of three steps by all-to-alls and by DeepEP."""
    mesh, results = Mesh(2, 1, 2, CPU), []
    for deepep in (False, True):
        torch.manual_seed(1)
        with deep_ep() if deepep else nullcontext(), ops.use("zero_bubble", "auto"):
            settings = EngineSettings(name, deepep=deepep)
            engine = ParallelEngine(MICRO, RECIPES["tiny"], mesh, settings, 1)
            rows = [torch.randint(0, 64, (6, 17)) for _ in range(3)]
            stats = [engine.train_step(r, RECIPES["tiny"], 1e-3, 0.0, 0.3) for r in rows]
        numbers = [(s.loss, s.total, s.grad_norm, *s.mtp) for s in stats]
        results.append((torch.tensor(numbers), engine.comm_stats()))
    return results


@pytest.mark.parametrize("name", ["zb1p", "dualpipe"])
def test_training_with_deepep(name, gang):
    for (want, traffic), (got, deepep_traffic) in gang.run(4, train_three_steps, name):
        assert 0 < (got / want - 1).abs().max() < 5e-3
        assert traffic and not deepep_traffic  # bytes that DeepEP sends are not counted


# ── Buffers ──


class Group:
    """A group of ranks of which only the size is read."""

    def __init__(self, size: int):
        self.n = size

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return self.n


class Hints:
    """Sizes that tell by what they were asked for."""

    def __init__(self, more: int):
        self.more = more

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 1000 * hidden_bytes + num_ranks + self.more

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 3000 * hidden_bytes + num_ranks + self.more


@pytest.mark.parametrize("ranks, rdma", [(2, False), (8, False), (9, True), (16, True)])
def test_a_buffer_is_as_large_as_dispatch_and_combine_need(ranks, rdma, monkeypatch):
    """A row has 2 bytes per number; only more ranks than a node has need RDMA."""
    monkeypatch.setattr(Buffer, "get_dispatch_config", staticmethod(lambda n: Hints(5)))
    monkeypatch.setattr(Buffer, "get_combine_config", staticmethod(lambda n: Hints(7)))
    with deep_ep():
        buffer = create_buffer(Group(ranks), 128)
    assert buffer.num_nvl_bytes == 256_000 + ranks + 7
    assert buffer.num_rdma_bytes == (768_000 + ranks + 7 if rdma else 0)


# ── Errors ──


def refusal() -> str:
    try:
        DeepEPDispatcher(WIDE, Mesh(1, 1, 3, CPU).ep_group)
    except UserError as e:
        return str(e)
    return "not refused"


def refusal_of_three_ranks() -> str:
    with deep_ep():
        return refusal()


def refusal_without_package() -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "deep_ep", None)
        return refusal()


def test_a_group_size_that_deepep_does_not_support_is_refused(gang):
    (message,) = set(gang.run(3, refusal_of_three_ranks))
    assert message == (
        "--token-dispatcher deepep has no settings for --ep 3: Unsupported number of EP ranks: 3"
    )


def test_without_the_package_the_error_explains_how_to_build_it(gang):
    (message,) = set(gang.run(3, refusal_without_package))
    assert "cannot import deep_ep" in message and "python setup.py install" in message
