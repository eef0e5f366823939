"""Dispatch with fixed sizes: equal to exact sizes bit for bit, and no host waits for the device."""

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_post_training import TASKS, make_objective
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3_ref import ops
from dsv3_ref.config import TINY, V3
from dsv3_ref.data.packing import LOSS, START
from dsv3_ref.expert_parallel import dispatch_layout, padded_dispatch_layout, sort_choices
from dsv3_ref.moe import GroupedExperts
from dsv3_ref.optim import RECIPES
from dsv3_ref.parallel import pipeline
from dsv3_ref.parallel.engine import EngineSettings, ParallelEngine
from dsv3_ref.parallel.mesh import Mesh
from dsv3_ref.parallel.stage import LossStats, LossWeights
from dsv3_ref.parallel.tape import Tape, run_to_completion
from dsv3_ref.parallel.token_dispatcher import (
    AllToAllDispatcher,
    CUDAClock,
    FixedSizes,
    Traffic,
    dispatch_levels,
)
from dsv3_ref.training.objective import NEXT_TOKEN_LOSS, CompletionLoss, RowBatch

CPU = torch.device("cpu")
SHAPE = replace(V3, dim=128, moe_inter_dim=128, n_routed_experts=16, n_activated_experts=4,
                n_expert_groups=4, n_limited_groups=2)  # fmt: skip
# The experts' rows are multiples of 32 numbers. Otherwise the last numbers of a tensor may be
# computed one by one, where exp rounds differently, and the last row depends on the rows after it.
MICRO = replace(
    TINY, vocab_size=64, dim=32, inter_dim=64, moe_inter_dim=32, n_layers=4, q_lora_rank=16,
    kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_mtp_layers=1,
)  # fmt: skip


# ── Layouts ──


@st.composite
def choices(draw):
    """Draw the experts of n tokens, k each, of which some are −1."""
    per, members = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    n, k = draw(st.integers(0, 12)), draw(st.integers(1, per * members))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    expert_nk = torch.rand(n, per * members, generator=generator).argsort(1)[:, :k]
    expert_nk[torch.rand(n, k, generator=generator) < 0.3] = -1
    return expert_nk, per, members


@given(choices(), st.integers(1, 14))
def test_a_padded_layout_has_the_first_rows_of_every_member(drawn, capacity):
    expert_nk, per, members = drawn
    token_m, dest_m, count = dispatch_layout(expert_nk, per, members)
    padded_m, padded_dest_m, left_out = padded_dispatch_layout(expert_nk, per, members, capacity)
    assert len(padded_m) == members * capacity
    for i in range(members):
        want, got = token_m[dest_m == i], padded_m[padded_dest_m == i]
        assert torch.equal(got[: len(want)], want[:capacity])
        assert (got[len(want) :] == len(expert_nk)).all()
    assert left_out == (count - capacity).clamp(min=0).sum()


@given(choices(), st.integers(1, 40))
def test_sorted_choices_are_cut_off_or_followed_by_none(drawn, max_rows):
    expert_nk, per, members = drawn
    choice_m, count_e = sort_choices(expert_nk, per * members)
    padded_m, padded_e = sort_choices(expert_nk, per * members, max_rows)
    kept = min(len(choice_m), max_rows)
    assert torch.equal(padded_m[:kept], choice_m[:kept]) and padded_e.sum() == kept
    assert (padded_m[kept:] == expert_nk.numel()).all()
    assert torch.equal(padded_e.cumsum(0), count_e.cumsum(0).clamp(max=max_rows))


# ── A layer's experts on several ranks ──


def run_layer(dispatcher, experts, x_nd, weight_nk, expert_nk, g_nd) -> list[torch.Tensor]:
    """Return the result of a forward pass and all gradients."""
    experts.zero_grad()
    tape = Tape()
    with ops.use("zero_bubble", "auto"):
        y_nd = run_to_completion(
            dispatcher.apply_experts(tape, experts, x_nd, weight_nk, expert_nk)
        )
        tape.add_grad(y_nd, g_nd)
        run_to_completion(tape.backward())
    grads = [tape.pop_grad(x_nd), tape.pop_grad(weight_nk)]
    return [y_nd.clone(), *grads, *(p.grad.clone() for p in experts.parameters())]


def compare_sizes(world: int, ranks_per_node: int, fp8: bool, dtype, factor: float):
    """Return whether fixed sizes give the results of exact ones, and how many are left out."""
    mesh, traffic = Mesh(1, 1, world, CPU), Traffic()
    levels = dispatch_levels(SHAPE, mesh, ranks_per_node, traffic)
    torch.manual_seed(mesh.ep_rank)
    experts = GroupedExperts(16 // world, 128, 128).to(dtype)
    for p in experts.parameters():
        torch.nn.init.normal_(p, std=0.1)
    n = 0 if mesh.ep_rank == 1 else 17 + mesh.ep_rank  # one rank has no tokens
    x_nd, weight_nk = torch.randn(n, 128, dtype=dtype), torch.rand(n, 4)
    expert_nk = torch.randn(n, 16).topk(4).indices
    fixed = FixedSizes(factor, 16, 4, num_tokens=24)
    args = experts, x_nd, weight_nk, expert_nk, torch.randn(n, 128, dtype=dtype)
    exact = run_layer(AllToAllDispatcher(levels, fp8), *args)
    padded = run_layer(AllToAllDispatcher(levels, fp8, fixed), *args)
    assert all(x.isfinite().all() for x in exact)
    same = all(torch.equal(a, b) for a, b in zip(exact, padded))
    return same, int(fixed.take_left_out()), fixed.rows_per_level(levels)


@pytest.mark.parametrize("world, ranks_per_node", [(2, 0), (4, 0), (4, 2)])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fixed_sizes_give_the_same_bits(world, ranks_per_node, fp8, dtype, gang):
    for same, left_out, sizes in gang.run(
        world, compare_sizes, world, ranks_per_node, fp8, dtype, 2.5
    ):
        assert same and left_out == 0 and len(sizes) == 2 + bool(ranks_per_node)


def test_what_exceeds_the_sizes_is_counted(gang):
    answers = gang.run(4, compare_sizes, 4, 0, False, torch.float32, 0.5)
    assert sum(left_out for _, left_out, _ in answers) > 0
    assert not all(same for same, *_ in answers)


# ── Whole steps ──


def compare_engines(shape, name: str, ranks_per_node: int, *capacities: float, precision="fp32"):
    """Take two steps with exact sizes and with each of the fixed ones.

    Return for each the numbers of the steps, how many batches were repeated so far, and by how many
    rows each step exceeded its sizes.
    """
    mesh, recipe = Mesh(*shape, CPU), RECIPES["tiny"]
    runs, said = [], []
    fp8, backends = precision == "fp8", ("zero_bubble", "auto")
    with (
        pytest.MonkeyPatch.context() as patch,
        ops.use(*(["fp8"] if fp8 else []), *backends),
        torch.autocast("cpu", torch.bfloat16, enabled=fp8),
    ):
        patch.setattr(pipeline.tqdm, "write", lambda text, *_: said.append(text))
        for factor in (0.0, *capacities):
            settings = EngineSettings(
                name, precision=precision, ranks_per_node=ranks_per_node, fp8_dispatch=fp8,
                dispatch_capacity=factor,
            )  # fmt: skip
            engine = ParallelEngine(MICRO, recipe, mesh, settings, 1)
            torch.manual_seed(3)
            numbers, overflows = [], []
            for _ in range(2):
                stats = engine.train_step(torch.randint(64, (5, 17)), recipe, 1e-3, 1e-2, 0.3)
                numbers.append([stats.total, stats.grad_norm, *stats.load_le.flatten().tolist()])
                overflows.append(engine.num_left_out)
            numbers.append(engine.mean_loss(RowBatch(torch.randint(64, (5, 17)))))
            runs.append((numbers, len(said), overflows))
    return runs


STEPS = [((1, 1, 4), "1f1b", 2), ((2, 1, 2), "dualpipe", 0), ((2, 1, 2), "zb1p", 0)]


@pytest.mark.parametrize(("shape", "name", "ranks_per_node"), STEPS, ids=str)
def test_steps_are_the_same_to_the_last_bit(shape, name, ranks_per_node, gang):
    """With 0.8 of the mean every step overflows, and is repeated with exact sizes."""
    answers = gang.run(4, compare_engines, shape, name, ranks_per_node, 4.0, 0.8)
    for exact, ample, scarce in answers:
        assert exact[0] == ample[0] == scarce[0]
        assert exact[1] == ample[1] == 0 and scarce[1] <= 3
        assert exact[2] == ample[2] == [0, 0] and min(scarce[2]) > 0
    assert answers[0][2][1] == 3


def test_emulated_fp8_has_fixed_sizes_too(gang):
    compare = partial(compare_engines, precision="fp8")
    for exact, ample in gang.run(4, compare, (2, 1, 2), "dualpipe", 0, 4.0):
        assert exact[0] == ample[0] and ample[1] == 0


# ── The host never waits ──

ATEN = torch.ops.aten
SYNCHRONIZING = {
    ATEN._local_scalar_dense, ATEN.nonzero, ATEN.bincount, ATEN.masked_select, ATEN.equal,
    ATEN._unique2, ATEN.unique_dim, ATEN.unique_consecutive,
}  # fmt: skip


class HostWaits(TorchDispatchMode):
    """A mode that counts the calls for which the host would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        takes_mask = packet in (ATEN.index, ATEN.index_put, ATEN.index_put_) and any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        )
        finds_size = packet == ATEN.repeat_interleave and (kwargs or {}).get("output_size") is None
        if packet in SYNCHRONIZING or takes_mask or finds_size:
            self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counting_host_waits():
    """Count waits in the `with` block, also those that a CPU tensor skips: `tolist`, `cpu`."""
    mode = HostWaits()

    def counted(name, method):
        def call(self, *args, **kwargs):
            mode.found[name] += 1
            return method(self, *args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch, mode:
        for name in ("tolist", "cpu", "numpy", "item"):
            patch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
        yield mode.found


def test_waits_are_found():
    x = torch.tensor([1.0, 0.0])
    with counting_host_waits() as found:
        calls = [x.tolist, x[0].item, x.nonzero, lambda: x[x > 0], lambda: bool(x[0])]
        calls += [lambda: x.long().bincount(), x.cpu, lambda: x.repeat_interleave(x.long())]
        for call in calls:
            before = sum(found.values())
            call()
            assert sum(found.values()) > before, call


@ops.impl("varlen_attention", "like a kernel")
def masked_attention(q_nhx, k_nhx, v_nhv, cu_seqlens, scale):
    """Attention that, like a kernel, never reads the ends of samples on the host."""
    place_n = torch.arange(len(q_nhx))
    sample_n = torch.searchsorted(cu_seqlens, place_n, right=True)
    visible = (sample_n[:, None] == sample_n) & (place_n[:, None] >= place_n)
    score_hnt = torch.einsum("nhx,thx->hnt", q_nhx, k_nhx) * scale
    weight_hnt = score_hnt.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hnt,thv->nhv", weight_hnt, v_nhv)


def packed_rows(n: int, s: int) -> torch.Tensor:
    """Rows of two samples each, with tokens that count in the second half of every sample."""
    rows_bs = torch.randint(64, (n, s))
    rows_bs[:, [0, s // 2]] += START
    return rows_bs + LOSS * (torch.arange(s) % (s // 2) >= s // 4)


def waits_of_a_batch(
    shape, name: str, ranks_per_node: int, capacity: float, fp8: bool, objective=NEXT_TOKEN_LOSS,
    batch=None, cp: int = 1,
):  # fmt: skip
    """Return what the host waits for in the forward and backward passes of a batch."""
    settings = EngineSettings(
        name, ranks_per_node=ranks_per_node, fp8_dispatch=fp8, dispatch_capacity=capacity
    )
    mesh = Mesh(*shape, CPU, cp=cp)
    engine = ParallelEngine(MICRO, RECIPES["tiny"], mesh, settings, objective=objective)
    pipeline = engine.pipeline
    batch = batch or RowBatch(torch.randint(64, (5, 17)))
    rows = pipeline.split(batch)
    weights = [LossWeights(share, 0.1, 1e-3) for share in pipeline.shares(batch, rows)]
    microbatches = pipeline.microbatches(rows, weights, LossStats())
    with ops.use("like a kernel", "zero_bubble", "auto"), counting_host_waits() as found:
        pipeline.run_microbatches(microbatches, training=True)
    return dict(found)


@pytest.mark.parametrize(("shape", "name", "ranks_per_node"), STEPS, ids=str)
def test_no_host_waits_in_a_batch(shape, name, ranks_per_node, gang):
    for fp8 in (False, True):
        found = gang.run(4, waits_of_a_batch, shape, name, ranks_per_node, 2.0, fp8)
        assert found == [{}] * 4


def test_no_host_waits_in_a_batch_of_packed_rows(gang):
    args = (2, 1, 2), "dualpipe", 0, 2.0, False, CompletionLoss(), RowBatch(packed_rows(5, 17))
    assert gang.run(4, waits_of_a_batch, *args) == [{}] * 4


@pytest.mark.parametrize("task, cp", [("reward", 1), ("rl", 1), ("rl", 2)])
def test_no_host_waits_in_a_batch_of_pairs_or_rollouts(task, cp, gang):
    batch = TASKS[task][0](5)
    args = (2, 1, 2), "dualpipe", 0, 2.0, False, make_objective(task, "grpo", batch), batch, cp
    assert gang.run(4, waits_of_a_batch, *args) == [{}] * 4


def test_no_host_waits_where_all_experts_are(gang):
    args = (2, 2, 1), "zb1p", 0, 0.0, False
    assert gang.run(4, waits_of_a_batch, *args) == [{}] * 4


def test_with_exact_sizes_it_waits_in_every_layer(gang):
    for found in gang.run(4, waits_of_a_batch, (1, 1, 4), "1f1b", 2, 0.0, False):
        assert found["tolist"] >= 4 * 4  # two counts in two hops of at least three layers and MTP


# ── Times on a GPU ──


def test_cuda_events_tell_the_exchange_from_the_computation(monkeypatch):
    """A stand-in clock: each stream has its own time, and waiting for an event moves it."""
    now = {"compute": 0.0, "network": 0.0, "side": 0.0}
    current = ["compute"]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = now[current[-1]]

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.time - self.time

    class Stream:
        def wait_event(self, event):
            now[current[-1]] = max(now[current[-1]], event.time)

    class Work:
        def wait(self):
            now[current[-1]] = max(now[current[-1]], now["network"])

    @contextmanager
    def stream(_):
        current.append("side")
        yield
        current.pop()

    for name, fake in {
        "Event": Event, "Stream": lambda device: Stream(), "stream": stream,
        "current_device": lambda: 0, "current_stream": Stream,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(CUDAClock, "streams", {})
    traffic = Traffic()
    for computing, exchange in ((30.0, 100.0), (100.0, 40.0)):
        clock = traffic.start_clock(torch.device("cuda"))
        now["network"] = now["compute"] + exchange
        now["compute"] += computing
        clock.wait(Work())
    traffic.read_device()
    assert traffic.exposed_s == pytest.approx(0.070) and not traffic.clocks
    assert traffic.in_flight_s == pytest.approx(0.140) and traffic.hidden == pytest.approx(0.5)


def test_sizes_are_a_multiple_of_the_mean():
    levels = [SimpleNamespace(experts_per_member=n, size=8) for n in (32, 4)]
    nodes, gpus, local = FixedSizes(1.5, 256, 8, 4096).rows_per_level(levels)
    missed_node, missed_gpu = 1.0, 1.0
    for i in range(8):
        missed_node *= (224 - i) / (256 - i)
        missed_gpu *= (252 - i) / (256 - i)
    assert nodes == pytest.approx(1.5 * 4096 * (1 - missed_node), abs=1)
    assert gpus == pytest.approx(1.5 * 8 * 4096 * (1 - missed_gpu), abs=1)
    assert local == 1.5 * 4096 * 8
