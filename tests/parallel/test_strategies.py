"""What a rank does, without processes: threads are ranks, or the engine is a stand-in."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dsv3_ref import ops
from dsv3_ref.checkpoints import manifest, sharded
from dsv3_ref.config import TINY, UserError, ceil_div
from dsv3_ref.mla import MLA
from dsv3_ref.optim import RECIPES
from dsv3_ref.parallel import context_parallel, data_parallel, mesh_parallel
from dsv3_ref.parallel.context_parallel import SequencePart, num_head_groups, split_heads
from dsv3_ref.parallel.data_parallel import DataParallel
from dsv3_ref.parallel.engine import EngineSettings
from dsv3_ref.parallel.mesh_parallel import MeshParallel, default_capacity, with_zero_bubble
from dsv3_ref.training.objective import RowBatch
from dsv3_ref.training.settings import TrainConfig
from dsv3_ref.training.strategy import SingleProcess
from dsv3_ref.training.task import Data

CPU = torch.device("cpu")


def config_of(**options) -> TrainConfig:
    return TrainConfig(model=TINY, recipe=RECIPES["tiny"], **options)


class Ranks:
    """A stand-in for torch.distributed whose ranks are threads."""

    ReduceOp = dist.ReduceOp

    def __init__(self, n: int):
        self.n, self.local = n, threading.local()
        self.values, self.meeting = [None] * n, threading.Barrier(n, timeout=20)

    def run(self, fn) -> list:
        """Return fn() of every rank, or the error that it raised."""

        def run_rank(rank: int):
            self.local.rank = rank
            try:
                return fn()
            except (UserError, SystemExit) as e:
                return e

        with ThreadPoolExecutor(self.n) as pool:
            return list(pool.map(run_rank, range(self.n)))

    def exchange(self, value) -> list:
        self.values[self.get_rank()] = value
        self.meeting.wait()
        values = list(self.values)
        self.meeting.wait()
        return values

    def is_initialized(self) -> bool:
        return True

    def get_rank(self, group=None) -> int:
        return self.local.rank

    def get_world_size(self, group=None) -> int:
        return self.n

    def all_reduce(self, x, op=dist.ReduceOp.SUM, group=None):
        stacked = torch.stack(self.exchange(x.clone()))
        x.copy_(stacked.amax(0) if op == dist.ReduceOp.MAX else stacked.sum(0))

    def all_gather_object(self, values, value, group=None):
        values[:] = self.exchange(value)

    def gather_object(self, value, values, dst=0, group=None):
        found = self.exchange(value)
        if values is not None:
            values[:] = found

    def all_gather_into_tensor(self, out, x, group=None):
        out.copy_(torch.cat(self.exchange(x.clone())))

    def reduce_scatter_tensor(self, out, x, group=None):
        rank = self.get_rank()
        out.copy_(sum(other.chunk(self.n)[rank] for other in self.exchange(x.clone())))

    def broadcast_object_list(self, box, src):
        box[:] = self.exchange(list(box))[src]

    def barrier(self):
        self.exchange(None)


@pytest.fixture
def ranks(monkeypatch) -> Ranks:
    """Return three ranks."""
    three = Ranks(3)
    for module in (data_parallel, sharded):
        monkeypatch.setattr(module, "dist", three)
    return three


def replica() -> DataParallel:
    return DataParallel(config_of(seed=5), CPU)


# ── Data parallelism ──


@pytest.mark.parametrize("num_items", [0, 2, 7])
def test_parts_of_a_list_come_back_in_its_order(num_items, ranks):
    items = [f"item {i}" for i in range(num_items)]

    def share():
        strategy = replica()
        part = strategy.shard(items)
        return part, strategy.all_gather(part)

    answers = ranks.run(share)
    assert [len(part) for part, _ in answers] == [
        ceil_div(num_items - rank, 3) for rank in range(3)
    ]
    assert all(gathered == items for _, gathered in answers)


def test_sums_do_not_depend_on_the_order_of_names(ranks):
    def add():
        strategy = replica()
        values = {"a": 1.0 + strategy.rank, "b": 10.0}
        return strategy.all_reduce(values if strategy.rank else dict(reversed(values.items())))

    assert ranks.run(add) == [{"a": 6.0, "b": 30.0}] * 3


def test_gradients_and_losses_are_means_and_loads_are_sums(ranks):
    """The second rank had no tokens for a weight, which then has no gradient."""

    def reduce():
        strategy, model = replica(), nn.Linear(2, 1, bias=False)
        if strategy.rank != 1:
            model.weight.grad = torch.tensor([[3.0, 6.0 * strategy.rank]])
        load_le = torch.tensor([[1, strategy.rank]])
        sums, load_le = strategy.reduce_step(model, torch.tensor([3.0 * strategy.rank]), load_le)
        return model.weight.grad.tolist(), sums.tolist(), load_le.tolist()

    assert ranks.run(reduce) == [([[2.0, 4.0]], [3.0], [[3, 3]])] * 3


def test_a_signal_to_one_rank_stops_all(ranks):
    def stop_after(own: list[list[int]]) -> list:
        signals = [list(found) for found in own]

        def stop():
            return replica().should_stop(signals[ranks.get_rank()])

        return [*zip(ranks.run(stop), signals)]

    assert stop_after([[], [], []]) == [(False, [])] * 3
    assert stop_after([[], [10], []]) == [(True, [10])] * 3
    assert stop_after([[10], [], [12]]) == [(True, [10]), (True, [12]), (True, [12])]


def test_the_slowest_rank_is_the_one_that_was_busy_longest(ranks, monkeypatch):
    """The last rank took longest, but waited for the others."""
    for seconds, waited, want in (
        ([2.0, 5.0, 9.0], [0.0, 0.0, 8.0], (1, 2.5)),
        ([1.0, 1.0, 1.0], [0.5, 0.5, 2.0], (0, 1.0)),
        ([3.0, 3.7037, 3.0], [0.0, 0.0, 0.0], (1, 1.2346)),
        ([1.0, 1.0, 2.0], [5.0, 5.0, 0.0], (2, 2e9)),  # more was waited than the step took
    ):
        monkeypatch.setattr(
            data_parallel, "pop_waited_seconds", lambda own=waited: own[ranks.get_rank()]
        )
        busy = ranks.run(lambda all_s=seconds: replica().straggler_metrics(all_s[ranks.get_rank()]))
        assert busy == [{"slowest_rank": want[0], "slowest_rank_ratio": want[1]}] * 3


def test_all_ranks_learn_of_damage_that_one_has_found(ranks, monkeypatch):
    def find(folder, rank, world):
        return f"{folder}: file {rank} of {world} is damaged" if rank else None

    monkeypatch.setattr(manifest, "find_damage", find)
    found = ranks.run(lambda: replica().find_damage(Path("step")))
    assert found == ["step: file 1 of 3 is damaged"] * 3
    monkeypatch.setattr(manifest, "find_damage", lambda *_: None)
    assert ranks.run(lambda: replica().find_damage(Path("step"))) == [None] * 3


def test_rank_0_computes_for_all_and_its_failure_ends_all(ranks):
    called = []

    def make(value):
        called.append(ranks.get_rank())
        if value is None:
            raise UserError("no run directory")
        return value

    assert ranks.run(lambda: replica().broadcast(lambda: make("run"))) == ["run"] * 3
    first, *others = ranks.run(lambda: replica().broadcast(lambda: make(None)))
    assert called == [0, 0] and str(first) == "no run directory"
    assert [(type(e), e.code) for e in others] == [(SystemExit, 2)] * 2


def test_an_error_of_any_rank_is_raised_on_the_first(ranks):
    def make():
        if ranks.get_rank() == 2:
            raise UserError("no space left")
        return ranks.get_rank()

    first, *others = ranks.run(lambda: data_parallel.call_on_ranks(make))
    assert str(first) == "no space left" and [e.code for e in others] == [2, 2]
    assert ranks.run(lambda: data_parallel.call_on_ranks(ranks.get_rank)) == [0, 1, 2]


def test_ranks_and_updates_divide_a_batch(ranks):
    def build(sizes: list[int], minibatches: int):
        data = Data(["a"], sizes, {}, None, minibatches=minibatches)
        return lambda: replica().build_data(SimpleNamespace(build_data=lambda: data)) is data

    assert ranks.run(build([6, 12], 2)) == [True] * 3
    for error in ranks.run(build([6, 9], 2)):
        assert "3 ranks × 2 updates per step must divide --global-batch-size" in str(error)


def test_random_numbers_are_those_of_seed_step_and_rank(ranks, monkeypatch):
    """Whatever was drawn before, so that a resumed run draws the same."""
    seeds = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    for step in (1, 2, 1):
        ranks.run(lambda now=step: replica().begin_step(now))
    assert set(seeds[:3]) == set(seeds[6:]) and len(set(seeds)) == 6


def test_rank_0_alone_writes(ranks, monkeypatch):
    written = []
    for name in ("save_checkpoint", "export_weights"):
        monkeypatch.setattr(
            SingleProcess, name, lambda self, folder, *_: written.append((self.rank, folder))
        )
    ranks.run(lambda: replica().save_checkpoint(Path("step"), {}, {}, None, {}))
    ranks.run(lambda: replica().export_weights(Path("hf")))
    assert written == [(0, Path("step")), (0, Path("hf"))]
    assert ranks.run(lambda: replica().description) == ["3 ranks with a model each, on cpu"] * 3


# ── A mesh ──


def mesh_strategy(engine=None, pp_rank: int = 0, **options) -> MeshParallel:
    """Return the strategy of a rank that belongs to no group; sums are over two ranks alike."""
    strategy = MeshParallel.__new__(MeshParallel)
    strategy.config, strategy.device = config_of(**options), CPU
    strategy.engine, strategy.rows = engine, None
    strategy.mesh = SimpleNamespace(
        pp=2, dp=3, ep=4, cp=1, world=24, pp_rank=pp_rank, all_reduce_sum=lambda x: 2 * x
    )
    return strategy


def test_a_mesh_is_described_by_its_sizes():
    strategy = mesh_strategy()
    assert strategy.description == "24 ranks (pp 2 × dp 3 × ep 4) on cpu"
    strategy.mesh.cp = 2
    assert strategy.description == "24 ranks (pp 2 × dp 3 × ep 4, cp 2) on cpu"
    strategy.config = config_of(fully_shard=True)
    assert strategy.description == "24 ranks, fully sharded, on cpu"


def test_the_dispatch_has_room_for_a_quarter_more_on_a_gpu_unless_it_is_told():
    cuda = torch.device("cuda")
    assert default_capacity(config_of(), cuda) == 1.25 and default_capacity(config_of(), CPU) == 0.0
    for capacity in (0.0, 1.5):
        assert default_capacity(config_of(dispatch_capacity=capacity), cuda) == capacity


def test_weight_gradients_are_deferred_before_backends_that_cannot():
    assert with_zero_bubble(("cpu", "torch")) == ("zero_bubble", "cpu", "torch")
    assert with_zero_bubble(("fp8", "triton", "torch")) == ("fp8", "triton", "zero_bubble", "torch")
    with pytest.raises(UserError, match="DSV3_BACKEND=triton does not run on several ranks"):
        with_zero_bubble(("triton",))


@pytest.mark.parametrize(
    "dtype, precision, is_fp8",
    [
        ("auto", "fp8", True), ("auto", "bf16", False), ("fp8", "bf16", True),
        ("unquantized", "fp8", False),
    ],
)  # fmt: skip
def test_tokens_are_sent_in_fp8_where_it_is_computed_in_unless_told(
    dtype, precision, is_fp8, monkeypatch
):
    options = {"dispatch_dtype": dtype, "precision": precision, "token_dispatcher": "deepep"}
    config = config_of(ep_ranks_per_node=2, seed=7, micro_batch=3, dispatch_capacity=1.2, **options)
    monkeypatch.setattr(mesh_parallel, "ParallelEngine", lambda *args: args)
    strategy = mesh_strategy(**options)
    task = SimpleNamespace(config=config, objective="loss")
    got = strategy.build_engine(task)
    settings = EngineSettings(
        schedule=config.schedule, moments=torch.bfloat16, zero=config.zero, micro_batch=3,
        precision=precision, ranks_per_node=2, fp8_dispatch=is_fp8, deepep=True,
        dispatch_capacity=1.2, fan_out_sms=0,
    )  # fmt: skip
    assert got == (TINY, config.recipe, strategy.mesh, settings, 7, "loss")


@pytest.mark.parametrize("fully_shard, names", [(False, ("zero_bubble", "cpu")), (True, ("cpu",))])
def test_a_mesh_defers_weight_gradients_and_fully_sharded_ranks_do_not(fully_shard, names):
    for precision in ("fp32", "bf16"):
        strategy = mesh_strategy(fully_shard=fully_shard, precision=precision)
        with ops.use("cpu", "torch"), strategy.precision_context():
            assert ops.ACTIVE_BACKENDS[: len(names)] == names
            assert torch.is_autocast_enabled("cpu") is (precision == "bf16")


def test_a_readout_passes_through_the_pipeline_of_its_model():
    made = []

    def pipeline(name: str) -> SimpleNamespace:
        def read_out(batch, readout, width):
            made.append(name)
            return torch.ones(len(batch), width)

        return SimpleNamespace(read_out=read_out)

    engine, batch = SimpleNamespace(pipeline=pipeline("own")), RowBatch(torch.zeros(3, 2))
    strategy = mesh_strategy(engine)
    assert strategy.read_out(None, batch, None, 2).tolist() == [[1.0, 1.0]] * 3
    strategy.read_out(None, batch, None, 2, frozen=pipeline("frozen"))
    assert made == ["own", "frozen"]


class Reader:
    """A stand-in for `PrefetchingLoader` that records the sizes that it is asked for."""

    def __init__(self, error=None):
        self.error, self.is_stale = error, False
        self.asked: list[list[int]] = []

    def prefetch(self, sizes) -> bool:
        self.asked.append(list(sizes))
        return self.is_stale

    def next_part(self, sizes):
        return torch.zeros(2, 3)

    def failure(self):
        return self.error


def test_rows_are_drawn_ahead_and_checked_once_per_step(monkeypatch):
    """Ranks agree that all can read their rows when they agree that no signal has come."""
    checks = []
    named = []

    def track(operation, waits_for):
        named.append((operation, list(waits_for)))
        return nullcontext()

    monkeypatch.setattr(mesh_parallel, "track_operation", track)
    monkeypatch.setattr(mesh_parallel, "call_on_ranks", lambda make: checks.append(make()))
    monkeypatch.setattr(mesh_parallel, "largest_on_ranks", lambda value, device: value)
    strategy = mesh_strategy(SimpleNamespace(global_loss_weight=lambda rows: 10 * len(rows)))
    strategy.rows, strategy.rows_are_ready = Reader(), False
    data = SimpleNamespace(batch_size_schedule=[4, 5, 6, 7])
    run = SimpleNamespace(data=data, state=SimpleNamespace(step=1))
    batch = strategy.next_rows(run, 5)
    assert (len(batch), batch.weight, len(batch.rows)) == (5, 20, 2)
    assert strategy.rows.asked == [[5, 6, 7], [6, 7]] and len(checks) == 1
    assert named == [("rows of step 2", list(range(24)))]  # what the report of a hang names
    assert not strategy.should_stop([]) and strategy.rows_are_ready
    run.state.step = 2
    strategy.next_rows(run, 6)
    assert len(checks) == 1 and not strategy.rows_are_ready
    strategy.should_stop([])
    strategy.rows.is_stale = True  # after a rollback, rows of other sizes were drawn
    strategy.next_rows(run, 6)
    assert len(checks) == 2


def test_a_reader_that_fails_stops_all_ranks_before_a_signal(monkeypatch):
    monkeypatch.setattr(mesh_parallel, "call_on_ranks", lambda make: make())
    others = [0]
    monkeypatch.setattr(mesh_parallel, "largest_on_ranks", lambda own, _: max(own, *others, 0))
    strategy = mesh_strategy()
    signals = []
    assert strategy.should_stop([]) is False and strategy.should_stop([12]) is True
    others[0] = 10
    assert strategy.should_stop(signals) is True and signals == [10]
    strategy.rows = Reader(UserError("the shard is damaged"))
    with pytest.raises(UserError, match="the shard is damaged"):
        strategy.should_stop([12])


def test_sums_and_losses_of_a_mesh():
    engine = SimpleNamespace(
        all_reduce_sum=lambda *values: [2 * v for v in values], mean_loss=lambda batch: 0.5
    )
    strategy = mesh_strategy(engine)
    assert strategy.sum_over_ranks({"b": 1.0, "a": 3.0}) == {"b": 2.0, "a": 6.0}
    values, items = {"a": 1.0}, ["x"]
    assert strategy.all_reduce(values) is values
    assert strategy.shard(items) is items and strategy.all_gather(items) is items
    task = SimpleNamespace(loss_targets=lambda rows_bs: rows_bs[:, 1:])
    assert strategy.nll(task, torch.zeros(3, 5)) == 0.5 * 12


def test_the_state_of_a_run_is_written_by_rank_0_with_the_counts_of_steps():
    saved = []
    engine = SimpleNamespace(optimizer=SimpleNamespace(step_count=9))
    strategy = mesh_strategy(engine)
    strategy.checkpointer = SimpleNamespace(save=lambda *args: saved.append(args))
    ema = SimpleNamespace(t=4)
    for strategy.is_main, average in ((True, ema), (True, None), (False, ema)):
        strategy.save_checkpoint(Path("step"), {"step": 3}, {"x": 1}, average, {"mesh": 2})
    extras = [extra for _, _, extra, _ in saved]
    counters = {"step": 3, "optimizer_steps": 9}
    assert extras == [
        (counters | {"ema_t": 4}, {"x": 1}, {"mesh": 2}),
        (counters | {"ema_t": 0}, {"x": 1}, {"mesh": 2}), None,
    ]  # fmt: skip
    assert [(own, folder, mean) for own, folder, _, mean in saved] == [
        (engine, Path("step"), ema), (engine, Path("step"), None), (engine, Path("step"), ema)
    ]  # fmt: skip


def test_a_whole_model_is_loaded_if_its_fp32_weights_just_fit(monkeypatch, capsys):
    strategy = mesh_strategy(SimpleNamespace(num_params=10))
    monkeypatch.setattr(mesh_parallel.native, "load", lambda run_dir: nn.Linear(1, 1))
    for free, fits in ((40, True), (39, False)):
        monkeypatch.setattr(mesh_parallel, "free_memory", lambda device, n=free: n)
        assert (strategy.load_whole_model(Path("run")) is not None) is fits
    assert "dsv3 generate run" in capsys.readouterr().out


# ── Sequences that ranks share ──

ENDS = torch.tensor([0, 5, 6, 13], dtype=torch.int32)  # of samples in a row of 13 tokens


def sequence_parts(n: int, monkeypatch, *args) -> tuple[Ranks, list[SequencePart]]:
    """Return ranks, and the part of the sequences that each of them computes."""
    ranks = Ranks(n)
    monkeypatch.setattr(context_parallel, "dist", ranks)
    return ranks, ranks.run(lambda: SequencePart("group", *args))


def positions_of(part: SequencePart) -> list[int]:
    return part.take(torch.arange(part.s)[None])[0].tolist()


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("ends", [None, ENDS], ids=["rows", "samples"])
def test_attention_of_all_ranks_is_that_of_the_whole_sequence(n, ends, monkeypatch):
    """With its gradients, also where chunks are uneven, or empty."""
    torch.manual_seed(0)
    attention = MLA(TINY)
    for p in attention.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    x_bsd, g_bsd = torch.randn(2, 1 if ends is not None else 2, 13, TINY.dim)
    x_bsd.requires_grad_()
    bounds = [] if ends is None else ends.tolist()
    whole = SequencePart(None, 13, ends, bounds)
    y_bsd = attention(x_bsd, whole.rope(TINY, CPU))
    y_bsd.backward(g_bsd)
    want = {name: p.grad.clone() for name, p in attention.named_parameters()}
    attention.zero_grad()
    ranks, parts = sequence_parts(n, monkeypatch, 13, ends, bounds)

    def attend():
        part = parts[ranks.get_rank()]
        own_bsd = part.take(x_bsd.detach()).requires_grad_()
        out_bsd = attention(own_bsd, part.rope(TINY, CPU))
        out_bsd.backward(part.take(g_bsd))
        return out_bsd.detach(), own_bsd.grad

    seen = []
    for part, (out_bsd, grad_bsd) in zip(parts, ranks.run(attend)):
        own = positions_of(part)
        assert len(own) == part.num_tokens
        torch.testing.assert_close(out_bsd, y_bsd.detach()[:, own], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(grad_bsd, x_bsd.grad[:, own], atol=1e-5, rtol=1e-4)
        seen += own
    assert sorted(seen) == list(range(13))
    for name, p in attention.named_parameters():
        torch.testing.assert_close(p.grad, want[name], atol=1e-4, rtol=1e-4)


def test_places_are_divided_like_the_tokens_before_them(monkeypatch):
    place_n = torch.tensor([0, 3, 4, 12, 13, 20, 25])
    found = []
    _, parts = sequence_parts(3, monkeypatch, 13)
    for part in parts:
        own_k, number_k = part.take_places(place_n, (2, 13))
        places = part.take(torch.arange(26).view(2, 13)).flatten()[own_k]
        assert torch.equal(places, place_n[number_k])
        found += places.tolist()
    assert sorted(found) == place_n.tolist()
    alone_n, number_n = SequencePart(None, 13).take_places(place_n, (2, 13))
    assert torch.equal(alone_n, place_n) and number_n.tolist() == list(range(len(place_n)))


@pytest.mark.parametrize("k", [0, 1, 4, 13])
def test_the_last_tokens_of_a_sequence_are_left_out_by_their_ranks(k, monkeypatch):
    ranks, parts = sequence_parts(3, monkeypatch, 13)
    shorter = ranks.run(lambda: parts[ranks.get_rank()].without_last(k))
    seen = []
    for part in shorter:
        seen += positions_of(part)
    assert sorted(seen) == list(range(13 - k))
    assert SequencePart(None, 13).without_last(k).num_tokens == 13 - k
    sums = ranks.run(lambda: shorter[0].sum_over_ranks(torch.tensor([1.0 + ranks.get_rank()])))
    assert [x.item() for x in sums] == [6.0] * 3


def test_keys_and_values_are_computed_for_half_as_many_groups_of_heads_as_ranks():
    assert [num_head_groups(128, 128 * 256, cp, False) for cp in (1, 2, 3, 4, 8, 32)] == [
        1, 1, 1, 2, 4, 16
    ]  # fmt: skip
    assert num_head_groups(6, 96, 10, False) == 3  # five do not divide six heads
    assert num_head_groups(8, 8 * 64, 16, True) == 4  # two heads are a block of 128 rows in FP8
    assert num_head_groups(8, 8 * 64, 16, False) == 8 and num_head_groups(8, 64, 16, True) == 1


def test_groups_of_heads_share_a_weight_with_its_gradient_and_scales():
    weight = nn.Parameter(torch.arange(12.0).view(4, 3))
    weight.main_grad, weight.scale = torch.zeros(4, 3), torch.arange(4.0)
    parts = split_heads(weight, 2)
    for part, rows in zip(parts, (slice(0, 2), slice(2, 4)), strict=True):
        assert torch.equal(part, weight[rows]) and part.wgrad_at_once is True
        assert torch.equal(part.scale, weight.scale[rows])
        part.main_grad += 1
    assert (weight.main_grad == 1).all()
