"""A mesh of one rank in this process: its parts are those of a model that knows no ranks."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from test_fixed_sizes import SHAPE, run_layer
from test_parallel import compare_training, micro, step_alone

from dsv3_ref.config import TINY
from dsv3_ref.model import Transformer
from dsv3_ref.moe import MoE
from dsv3_ref.optim import RECIPES
from dsv3_ref.parallel.bucket import rank_state_bytes
from dsv3_ref.parallel.engine import EngineSettings, ParallelEngine
from dsv3_ref.parallel.mesh import Mesh, MeshLayout
from dsv3_ref.parallel.pipeline import Pipeline
from dsv3_ref.parallel.rows import LocalRows
from dsv3_ref.parallel.token_dispatcher import (
    AllToAllDispatcher,
    DispatchLevel,
    FixedSizes,
    HostClock,
    Traffic,
    dispatch_levels,
    link_between,
)
from dsv3_ref.parallel.zero import ShardOptimizer
from dsv3_ref.training.objective import NEXT_TOKEN_LOSS, RowBatch

CPU = torch.device("cpu")
MICRO = replace(
    TINY, vocab_size=64, dim=32, inter_dim=64, moe_inter_dim=16, n_layers=4, q_lora_rank=16,
    kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_mtp_layers=1,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    """Make this process the only rank of a group."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def build(schedule: str = "1f1b", **options) -> ParallelEngine:
    settings = EngineSettings(schedule, **options)
    return ParallelEngine(MICRO, RECIPES["tiny"], Mesh(1, 1, 1, CPU), settings, seed=2)


# ── Steps ──


@pytest.mark.parametrize(
    "schedule, zero, is_packed",
    [("1f1b", True, False), ("zb1p", False, True), ("dualpipev", True, False)],
)
def test_a_step_is_that_of_a_plain_model(schedule, zero, is_packed):
    """DualPipeV has two stages even on one rank, which hand each other their results."""
    want = step_alone(micro(1), torch.float64, is_packed)
    setting = (1, 1, 1), schedule, zero, 0, torch.float64, is_packed, 1, want
    errors, same, difference = compare_training(*setting)
    assert max(errors.values()) < 1e-13 and same and difference < 1e-13


@pytest.mark.parametrize("schedule", ["gpipe", "dualpipev"])
def test_a_readout_is_that_of_a_plain_model(schedule):
    """Rows are read out in micro-batches, some of which are empty in DualPipeV."""
    pipeline = build(schedule, micro_batch=2).pipeline
    torch.manual_seed(2)
    plain, rows_bs = Transformer(MICRO).eval(), torch.randint(64, (3, 9))

    def readout(h_bsd, head_wd, rows, *_):
        return torch.stack((h_bsd[:, -1] @ head_wd[5], rows.rows_bs[:, 0].float()), 1)

    got = pipeline.read_out(RowBatch(rows_bs), readout, 2)
    want = torch.stack((plain(rows_bs[:, :-1])[:, -1, 5], rows_bs[:, 0].float()), 1)
    torch.testing.assert_close(got, want.detach())


def test_the_loss_of_a_batch_is_the_mean_over_its_tokens():
    engine, rows_bs = build(micro_batch=2), torch.randint(64, (5, 9))
    torch.manual_seed(2)
    logits = Transformer(MICRO)(rows_bs[:, :-1])
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows_bs[:, 1:].flatten())
    assert engine.mean_loss(RowBatch(rows_bs)) == pytest.approx(want.item(), rel=1e-5)
    assert engine.global_loss_weight(RowBatch(rows_bs)) == 5


# ── Micro-batches ──


def pipeline_of(pp: int, dp: int, rank: int = 0, cp: int = 1, **options) -> Pipeline:
    """Return a pipeline without a model."""
    pipeline = Pipeline.__new__(Pipeline)
    pipeline.mesh = MeshLayout(pp, dp, 1, rank, cp=cp)
    settings = {"schedule_name": "1f1b", "micro_batch": 0, "dispatcher": None}
    vars(pipeline).update(settings | {"objective": NEXT_TOKEN_LOSS} | options)
    return pipeline


@pytest.mark.parametrize(
    "pp, dp, options, num_rows, sizes",
    [
        (1, 1, {}, 7, [7]),  # all rows of a pipeline of one rank
        (2, 1, {}, 7, [1] * 7),  # else one at a time
        (1, 1, {"micro_batch": 3}, 7, [3, 2, 2]),
        (2, 2, {"micro_batch": 2}, 7, [2, 2]),  # of the first pipeline's four rows
        (2, 1, {"schedule_name": "dualpipe"}, 3, [1, 1, 1, 0]),  # at least four
        (2, 1, {"schedule_name": "dualpipe"}, 5, [1, 1, 1, 1, 1, 0]),  # and an even number
    ],
)
def test_rows_are_cut_into_micro_batches(pp, dp, options, num_rows, sizes):
    pipeline = pipeline_of(pp, dp, **options)
    batch = RowBatch(torch.arange(num_rows)[:, None])
    parts = pipeline.split(batch)
    assert [len(part) for part in parts] == sizes
    assert pipeline.shares(batch, parts) == pytest.approx([n / num_rows for n in sizes])
    own = LocalRows(RowBatch(batch.rows_bs[: sum(sizes)]), num_rows, weight=2 * num_rows)
    assert [part.rows_bs.tolist() for part in pipeline.split(own)] == [
        part.rows_bs.tolist() for part in parts
    ]
    assert pipeline.shares(own, parts) == pytest.approx([n / num_rows / 2 for n in sizes])


def test_every_pipeline_takes_its_own_rows():
    batch = RowBatch(torch.arange(7)[:, None])
    own = [pipeline_of(1, 3, rank).split(batch)[0].rows_bs.flatten() for rank in range(3)]
    assert [rows.tolist() for rows in own] == [[0, 1, 2], [3, 4], [5, 6]]


def test_the_sizes_of_a_dispatch_are_for_the_largest_micro_batch():
    """The ranks of a cp group share its tokens."""
    for cp, want in ((1, 2 * 8), (2, 8)):
        dispatcher = SimpleNamespace(fixed=SimpleNamespace(num_tokens=0))
        pipeline = pipeline_of(1, 2, cp=cp, micro_batch=2, dispatcher=dispatcher)
        pipeline.split(RowBatch(torch.zeros(7 // cp, 8, dtype=torch.int64)))
        assert dispatcher.fixed.num_tokens == want


@pytest.mark.parametrize("left_out, calls", [(0, ["run"]), (3, ["run", "clear", "run exactly"])])
def test_a_batch_whose_rows_do_not_fit_is_repeated_once_with_exact_sizes(left_out, calls, capsys):
    fixed, made = FixedSizes(1.0, 4, 2), []
    dispatcher = AllToAllDispatcher([], fixed=fixed)
    pipeline = pipeline_of(1, 1, dispatcher=dispatcher)
    pipeline.mesh = SimpleNamespace(device=CPU, rank=0, all_reduce_sum=lambda x: 2 * x)

    def attempt() -> int:
        made.append("run" if dispatcher.fixed else "run exactly")
        if dispatcher.fixed:
            fixed.add_left_out(torch.tensor(left_out))
        return len(made)

    assert pipeline.repeat_if_cut(attempt, lambda: made.append("clear")) == len(calls)
    assert made == calls and dispatcher.fixed is fixed and fixed.take_left_out() == 0
    assert pipeline.num_left_out == 2 * left_out  # of all ranks
    assert (f"{2 * left_out} rows exceeded" in capsys.readouterr().err) == bool(left_out)


# ── The optimizer ──


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", [True, False])
def test_an_optimizer_has_the_planned_bytes_and_yields_every_state_once(zero, precision):
    engine = build(zero=zero, precision=precision)
    optimizer = engine.optimizer
    assert optimizer.bytes == rank_state_bytes(MICRO, [(0,)], 0, 1, 1, precision, sharded=zero)
    numel = {name: p.numel() for name, p in engine.model.named_parameters()}
    found = {}
    averages = {name: shard.clone() for name, shard in optimizer.masters().items()}
    for kind, name, part in optimizer.ranges({"ema": averages}, once=True):
        found[kind, name] = found.get((kind, name), 0) + part.values.numel()
    kinds = ("model", "exp_avg", "exp_avg_sq", "ema")
    assert found == {(kind, name): numel[name] for kind, name in product(kinds, numel)}


def test_only_matrices_decay():
    """Without gradients, matrices shrink by lr times the decay, and vectors stay."""
    engine = build()
    before = {name: p.clone() for name, p in engine.model.named_parameters()}
    engine.optimizer.zero_grad()
    assert engine.optimizer.reduce_and_clip_grads(1.0) == 0
    engine.optimizer.step(0.5)
    factor = 1 - 0.5 * RECIPES["tiny"].weight_decay
    for name, p in engine.model.named_parameters():
        torch.testing.assert_close(p, before[name] * (factor if p.ndim > 1 else 1.0))


def test_the_number_of_steps_is_that_of_the_moments():
    optimizer = build().optimizer
    assert optimizer.step_count == 0
    optimizer.step_count = 7
    optimizer.zero_grad()
    optimizer.reduce_and_clip_grads(1.0)
    optimizer.step(0.0)
    assert optimizer.step_count == 8
    assert {int(optimizer.adamw_state(x)["step"]) for x in optimizer.shards.values()} == {8}


@pytest.mark.parametrize("max_norm, factor", [(2.5, 0.5), (5.1, 1.0), (50.0, 1.0)])
def test_gradients_are_clipped_to_a_norm(max_norm, factor):
    mesh = SimpleNamespace(all_reduce_sum=lambda x: 2 * x)  # two ranks alike
    optimizer = SimpleNamespace(mesh=mesh)
    own = [torch.tensor([1.0, 0.5]), torch.tensor([-3.0, 1.5])]
    squares = torch.tensor(sum(float(g.square().sum()) for g in own), dtype=torch.float64)
    assert squares == 12.5
    grads = [g.clone() for g in own]
    assert ShardOptimizer.clip_grads(optimizer, grads, squares, max_norm) == pytest.approx(5.0)
    for got, g in zip(grads, own):
        torch.testing.assert_close(got, factor * g)


# ── The dispatch of tokens ──


def test_links_are_those_of_nodes():
    assert [link_between(5, rank, 4) for rank in range(9)] == (
        ["internode"] * 4 + ["intranode", "local", "intranode", "intranode", "internode"]
    )
    assert [link_between(5, rank, 0) for rank in (4, 5, 6, 999)] == (
        ["intranode", "local", "intranode", "intranode"]
    )


def levels_of(rank: int, ep: int, ranks_per_node: int) -> list[tuple[int, list[str]]]:
    """Return the experts behind each member, and the links to all of them, of every level."""
    mesh = MeshLayout(1, 1, ep, rank)
    mesh.create_expert_groups = mesh.expert_ranks
    levels = dispatch_levels(replace(SHAPE, n_routed_experts=32), mesh, ranks_per_node, Traffic())
    for level, ranks in zip(levels, mesh.expert_ranks(ranks_per_node), strict=True):
        assert level.group == ranks and level.size == len(ranks)
        assert level.links == [link_between(rank, other, ranks_per_node) for other in ranks]
    return [(level.experts_per_member, level.links) for level in levels]


def test_a_group_over_several_nodes_has_two_levels():
    everyone = ["intranode"] * 5 + ["local"] + ["intranode"] * 2
    assert levels_of(5, 8, 0) == levels_of(5, 8, 8) == [(4, everyone)]
    assert levels_of(5, 8, 4) == [
        (16, ["internode", "local"]), (4, ["intranode", "local", "intranode", "intranode"])
    ]  # fmt: skip
    assert levels_of(5, 8, 2) == [
        (8, ["internode", "internode", "local", "internode"]), (4, ["intranode", "local"])
    ]  # fmt: skip


def one_level(**options) -> tuple[AllToAllDispatcher, Traffic]:
    """Return a dispatcher that sends all tokens to this rank."""
    traffic = Traffic()
    level = DispatchLevel(dist.group.WORLD, 16, ["local"], traffic)
    return AllToAllDispatcher([level], **options), traffic


@pytest.mark.parametrize("factor", [0.0, 2.0])
def test_experts_behind_an_all_to_all_are_the_experts(factor):
    """Also with fixed sizes; every token is sent once, with its weights and expert ids."""
    torch.manual_seed(0)
    moe = MoE(SHAPE)
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    x_nd, g_nd = torch.randn(2, 7, 128)
    weight_nk = torch.rand(7, 4)
    expert_nk = torch.randn(7, 16).topk(4).indices
    leaves = [x.clone().requires_grad_() for x in (x_nd, weight_nk)]
    y_nd = moe.forward_routed(*leaves, expert_nk)
    y_nd.backward(g_nd)
    want = [y_nd.detach(), *(x.grad for x in leaves), *(p.grad for p in moe.experts.parameters())]
    want = [x.clone() for x in want]
    fixed = FixedSizes(factor, 16, 4, num_tokens=9) if factor else None
    dispatcher, traffic = one_level(fixed=fixed)
    got = run_layer(dispatcher, moe.experts, x_nd, weight_nk, expert_nk, g_nd)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    rows = 9 if factor else 7
    row, k = 128 * 4, 4 * 4
    assert traffic.bytes == {"local": rows * (row + k + k + row + row + row + k)}
    assert dispatcher.levels[0].num_waited == 4
    assert 0 < traffic.exposed_s <= traffic.in_flight_s
    if fixed:
        assert fixed.take_left_out() == 0 and fixed.take_left_out() == 0


def test_choices_beyond_the_sizes_are_counted():
    """All seven tokens choose the same two experts, and four fit into the message."""
    fixed = FixedSizes(0.5, 16, 4, num_tokens=8)
    dispatcher, _ = one_level(fixed=fixed)
    assert fixed.rows_per_level(dispatcher.levels) == [4, 16]
    expert_nk = torch.tensor([[1, 2, 3, 4]]).expand(7, 4)
    layout = dispatcher.fixed_layout(dispatcher.levels[0], 4, expert_nk)
    assert layout.token_m.tolist() == [0, 1, 2, 3] and layout.has_empty
    assert layout.expert_mk.tolist() == [[1, 2, 3, 4]] * 4
    assert int(fixed.take_left_out()) == 3
    assert dispatcher.max_local_rows([10], layout.expert_mk) == 10
    assert int(fixed.take_left_out()) == 6
    assert dispatcher.max_local_rows([99], layout.expert_mk - 4) == 99  # −1: of another rank
    assert int(fixed.take_left_out()) == 0
    assert AllToAllDispatcher([]).max_local_rows([], layout.expert_mk) == 16  # all are here
    with dispatcher.exact_sizes():
        assert dispatcher.max_local_rows([], layout.expert_mk) is None
    assert dispatcher.fixed is fixed


def test_sizes_never_exceed_what_can_arrive():
    levels = [SimpleNamespace(experts_per_member=n, size=4) for n in (8, 2)]
    sizes = FixedSizes(100.0, 32, 3, num_tokens=5).rows_per_level(levels)
    assert sizes == [5, 20, 80 * 2]  # two of the three experts of a token can be on a rank
    assert FixedSizes(1e-9, 32, 3, num_tokens=5).rows_per_level(levels) == [1, 1, 1]
    assert FixedSizes(1.0, 32, 3, num_tokens=0).rows_per_level(levels) == [1, 1, 1]


def test_the_clock_of_the_host_tells_what_was_hidden(monkeypatch):
    times = iter([10.0, 13.0, 14.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    traffic = Traffic()
    clock = traffic.start_clock(CPU)
    assert isinstance(clock, HostClock) and traffic.hidden == 1.0
    clock.wait(SimpleNamespace(wait=lambda: None))
    assert (traffic.in_flight_s, traffic.exposed_s, traffic.hidden) == (4.0, 1.0, 0.75)
    traffic.bytes["local"] += 3
    traffic.clear()
    assert (traffic.in_flight_s, traffic.exposed_s, traffic.bytes) == (0.0, 0.0, {})
