"""Messages between pipeline ranks: start-up on NCCL, and how long sent ones stay in memory."""

import weakref
from collections import Counter
from functools import cache
from math import gcd
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_ref.config import TINY
from dsv3_ref.dualpipe import SCHEDULES, min_microbatches, schedule, stages_by_rank
from dsv3_ref.parallel import mesh as mesh_module
from dsv3_ref.parallel import pipeline
from dsv3_ref.parallel.build import count_stages, owning_ranks
from dsv3_ref.parallel.mesh import Mesh, MeshLayout
from dsv3_ref.parallel.pipeline import P2PCommunicator, Pipeline
from dsv3_ref.parallel.stage import LossWeights
from dsv3_ref.training.objective import NEXT_TOKEN_LOSS, RowBatch

CPU = torch.device("cpu")
cached_schedule = cache(schedule)


# ── A pipeline that computes nothing ──


class EmptyTape:
    """A tape without segments, whose input has a gradient of its own."""

    def __init__(self, training):
        pass

    def id_of(self, x):
        return 0

    def add_grad(self, out, grad):
        pass

    def backward(self):
        yield from ()

    def pop_grad(self, x):
        return torch.zeros(1, 1, 1)


class EmptyStage:
    """A stage without layers: a new row in, a new row out."""

    def __init__(self, first: bool):
        self.first = first

    def forward(self, tape, x, batch):
        yield from ()
        return torch.zeros(1, 1, 1)


def empty_pipeline(name: str, mesh) -> Pipeline:
    """Return a pipeline whose messages are real and whose stages compute nothing."""
    empty, stages = Pipeline.__new__(Pipeline), stages_by_rank(name, mesh.pp)
    empty.config, empty.mesh = SimpleNamespace(dim=1), mesh
    empty.cp_group = None
    empty.schedule_name, empty.dtype = name, torch.float32
    empty.last = count_stages(stages) - 1
    empty.stages = {s: EmptyStage(s == 0) for s in stages[mesh.pp_rank]}
    return empty


def run_empty(empty: Pipeline, m: int, training: bool = True) -> None:
    batch = RowBatch(torch.zeros(1, 2, dtype=torch.int64))
    empty.objective, empty.dispatcher = NEXT_TOKEN_LOSS, None
    empty.run([batch] * m, [LossWeights(1.0)] * m, training)


@pytest.mark.parametrize(
    "pp, cp, seq_len, rows, sizes",
    [
        (1, 1, 4096, 5, [1] * 5),  # `dsv3 plan`, too, has micro-batches of one row
        (1, 1, 1024, 6, [3, 3]),
        (1, 1, 8192, 2, [1, 1]),
        (1, 4, 8192, 4, [2, 2]),
        (2, 1, 16, 3, [1, 1, 1]),
    ],
)
def test_a_rank_never_runs_all_rows_of_a_large_step_at_once(pp, cp, seq_len, rows, sizes):
    pipeline = Pipeline.__new__(Pipeline)
    pipeline.mesh = SimpleNamespace(pp=pp, cp=cp, data_size=1, data_rank=0)
    pipeline.micro_batch, pipeline.schedule_name = 0, "1f1b"
    pipeline.dispatcher = None
    batch = RowBatch(torch.zeros(rows, seq_len + 1, dtype=torch.int64))
    assert [len(part) for part in pipeline.split(batch)] == sizes


# ── Hosts with communicators that are opened at the first use ──


class Recorder:
    """A stand-in for torch.distributed that records what the host of one rank calls."""

    def __init__(self, completes_after: float = float("inf")):
        self.calls, self.counts = [], Counter()
        self.live, self.peak = 0, 0
        self.completes_after = completes_after  # later messages until one is reported as arrived
        self.num_sent = 0

    def isend(self, x, peer, group):
        return self.start("send", peer, group)

    def irecv(self, x, peer, group):
        return self.start("recv", peer, group)

    def start(self, kind, peer, group):
        number = self.counts[kind, group, peer]
        self.counts[kind, group, peer] += 1
        self.calls.append((kind, group, peer, number))
        if kind == "send":
            self.num_sent += 1
            self.live += 1
            self.peak = max(self.peak, self.live)
        return RecordedWork(self, kind, group, peer, number)


class RecordedWork:
    def __init__(self, recorder, kind, *transfer):
        self.recorder = recorder
        self.kind, self.transfer = kind, transfer
        self.sent_as = recorder.num_sent

    def is_completed(self):
        return self.recorder.num_sent - self.sent_as >= self.recorder.completes_after

    def wait(self):
        self.recorder.calls.append((f"wait for {self.kind}", *self.transfer))
        self.recorder.live -= self.kind == "send"


def record(name: str, pp: int, m: int, rank: int, recorder: Recorder, warm: bool) -> list:
    """Return what one rank calls in a batch of m micro-batches, after a warm-up if `warm`."""
    mesh = Mesh.__new__(Mesh)
    MeshLayout.__init__(mesh, pp, 1, 1, rank)
    mesh.device = CPU
    mesh.up_group, mesh.down_group = "up", "down"
    close = P2PCommunicator.close

    def marked_close(p2p):
        recorder.calls.append(("close",))
        close(p2p)

    with pytest.MonkeyPatch.context() as patch:
        for module in (pipeline, mesh_module):
            patch.setattr(module, "dist", recorder)
        patch.setattr(pipeline, "Tape", EmptyTape)
        patch.setattr(pipeline, "schedule", cached_schedule)
        patch.setattr(P2PCommunicator, "close", marked_close)
        if warm:
            mesh.connect_neighbors()
        if m:
            recorder.calls.append(("begin",))
            run_empty(empty_pipeline(name, mesh), m)
    return recorder.calls


class Hosts:
    """The hosts of all ranks, which run the recorded calls.

    The first use of a pair of ranks in a group blocks until the peer uses it too, as NCCL does when
    it opens a communicator. With `wait_blocks` a receive is waited for by the host, as in gloo;
    on NCCL the host goes on.
    """

    def __init__(self, calls: list[list], wait_blocks: bool):
        self.calls, self.wait_blocks = calls, wait_blocks
        self.at = [0] * len(calls)
        self.at_first_use: set = set()
        self.num_sent: Counter = Counter()
        self.received: set = set()
        self.in_batch = [False] * len(calls)

    def stuck(self) -> list[int]:
        """Return the ranks that never finish."""
        ranks = range(len(self.calls))
        while sum(map(self.advance, ranks)):
            pass
        return [rank for rank in ranks if self.at[rank] < len(self.calls[rank])]

    def advance(self, rank: int) -> int:
        """Run the calls of a rank until one blocks; return how many."""
        before = self.at[rank]
        while self.at[rank] < len(self.calls[rank]) and self.can_run(rank, *self.next(rank)):
            self.at[rank] += 1
        return self.at[rank] - before

    def next(self, rank: int):
        return self.calls[rank][self.at[rank]]

    def can_run(self, rank: int, kind: str, group="", peer=-1, number=0) -> bool:
        up_or_down = (group, rank, peer)
        if kind in ("begin", "close"):
            self.in_batch[rank] = kind == "begin"
        elif kind in ("send", "recv"):
            self.at_first_use.add(up_or_down)
            if (group, peer, rank) not in self.at_first_use:
                return False
            self.num_sent[up_or_down] += kind == "send"
        elif kind == "wait for recv":
            if self.wait_blocks and self.num_sent[group, peer, rank] <= number:
                return False
            self.received.add((group, peer, rank, number))
        elif self.wait_blocks and (*up_or_down, number) not in self.received:
            assert not self.in_batch[rank], "a wait for a sent message blocks within the batch"
            return False
        return True


def record_all(name: str, pp: int, m: int, warm: bool) -> list[list]:
    return [record(name, pp, m, rank, Recorder(), warm) for rank in range(pp)]


def sizes(name: str) -> list[tuple[int, int]]:
    """Return numbers of ranks from 2 to 16 with numbers of micro-batches from the minimum on."""
    step = 2 if name == "dualpipe" else 1
    cases = []
    for pp in range(2, 17, step):
        least = min_microbatches(name, pp)
        cases += [(pp, min_microbatches(name, pp, n)) for n in {least, least + 1, pp + 1}]
    return sorted(set(cases))


@pytest.mark.parametrize("name", SCHEDULES)
def test_with_a_warm_up_no_schedule_waits_forever(name):
    for pp, m in sizes(name):
        calls = record_all(name, pp, m, warm=True)
        for wait_blocks in (False, True):
            assert not Hosts(calls, wait_blocks).stuck(), (pp, m, wait_blocks)


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_it_receives_that_are_posted_first_wait_for_each_other(name):
    """DualPipe always hangs, DualPipeV never, the others with a single micro-batch."""
    for pp, m in sizes(name):
        hangs = name == "dualpipe" or (name != "dualpipev" and m == 1)
        calls = record_all(name, pp, m, warm=False)
        assert bool(Hosts(calls, wait_blocks=False).stuck()) == hangs, (pp, m)


@given(st.integers(1, 64))
def test_a_warm_up_connects_every_pair_both_ways_and_cannot_block(pp):
    calls = [record("gpipe", pp, 0, rank, Recorder(), warm=True) for rank in range(pp)]
    assert not Hosts(calls, wait_blocks=True).stuck()
    sent = set()
    for rank, own in enumerate(calls):
        sent |= {(call[1], rank, call[2]) for call in own if call[0] == "send"}
    up = {("up", rank, rank + 1) for rank in range(pp - 1)}
    assert sent == up | {("down", rank + 1, rank) for rank in range(pp - 1)}
    assert max(map(len, calls)) <= 8  # two neighbors, two groups, a transfer and a wait


# ── Sent messages ──


@pytest.mark.parametrize("name", [n for n in SCHEDULES if n != "gpipe"])
@pytest.mark.parametrize("pp", [2, 4, 8])
def test_sent_messages_are_dropped_at_their_receipts(name, pp):
    """Without any report of completion, as on gloo: the schedule bounds them."""
    for rank in range(pp):
        peaks = []
        for m in (64, 128):
            recorder = Recorder()
            record(name, pp, m, rank, recorder, warm=False)
            assert recorder.num_sent >= m * (pp > 1) // 2 and recorder.live == 0
            peaks.append(recorder.peak)
        assert peaks[0] == peaks[1] <= 2 * pp + 1, (rank, peaks)


@pytest.mark.parametrize("name", SCHEDULES)
def test_sent_messages_are_dropped_when_nccl_reports_them(name):
    for rank in range(4):
        recorder = Recorder(completes_after=2)
        record(name, 4, 64, rank, recorder, warm=False)
        assert 0 < recorder.peak <= 3 and recorder.live == 0


def live_messages(name: str, m: int, training: bool) -> tuple[int, int]:
    """Return how many messages this rank sent over gloo, and the most that were in memory."""
    messages, live = [], []
    with pytest.MonkeyPatch.context() as patch:
        isend = pipeline.dist.isend

        def counted(x, *args, **kwargs):
            work = isend(x, *args, **kwargs)
            messages.append(weakref.ref(x))
            live.append(sum(ref() is not None for ref in messages))
            return work

        mesh = Mesh(4, 1, 1, CPU)
        patch.setattr(pipeline.dist, "isend", counted)
        patch.setattr(pipeline, "Tape", EmptyTape)
        run_empty(empty_pipeline(name, mesh), m, training)
    assert not any(ref() is not None for ref in messages)
    return len(messages), max(live)


@pytest.mark.parametrize("name", SCHEDULES)
def test_memory_of_messages_does_not_grow_with_the_batch(name, gang):
    for num_sent, peak in gang.run(4, live_messages, name, 64, True):
        assert num_sent >= 64 and (peak <= 9 or name == "gpipe"), (num_sent, peak)


def test_a_forward_pass_sends_all_messages_and_keeps_none_afterwards(gang):
    sent = gang.run(4, live_messages, "dualpipe", 16, False)
    assert [num for num, _ in sent] == [8, 16, 16, 8]


# ── Groups ──


def owners_of(name: str, pp: int):
    config = TINY.__class__(**{**vars(TINY), "n_layers": 2 * pp})
    names = ["embed.weight", "head.weight", *(f"layers.{i}.attn.wo.weight" for i in range(2 * pp))]
    return {owning_ranks(n, config, stages_by_rank(name, pp)) for n in names}


@settings(max_examples=30)
@given(st.sampled_from(list(SCHEDULES)), st.sampled_from([1, 2, 4, 6]), st.integers(1, 3),
       st.sampled_from([1, 2, 4]), st.sampled_from([0, 2, 8]), st.integers(1, 12))  # fmt: skip
def test_all_members_of_a_group_have_as_many_groups_before_it(name, pp, dp, ep, ranks_per_node, cp):
    """torch.distributed derives a group's name from that number: else its members never meet."""
    owners, seen = owners_of(name, pp), {}
    for rank in range(pp * dp * ep):
        layout = MeshLayout(pp, dp, ep, rank, gcd(cp, dp * ep))
        groups = [layout.pipeline_ranks(), layout.pipeline_ranks()]
        groups += layout.reduce_ranks(owners).values()
        groups += [*layout.expert_ranks(ranks_per_node), layout.context_ranks()]
        for number, ranks in enumerate(groups):
            assert rank in ranks and ranks == sorted(set(ranks))
            seen.setdefault((number, *ranks), []).append(rank)
    assert all(list(ranks) == members for (_, *ranks), members in seen.items())


def test_a_rank_of_2048_opens_no_more_communicators_than_one_of_64():
    for name in SCHEDULES:
        owners = owners_of(name, 16)
        large, small = (
            [MeshLayout(16, dp, ep, rank).count_communicators(owners, 8) for rank in (0, 77, 255)]
            for dp, ep in ((2, 64), (1, 16))
        )
        assert [sum(c.values()) for c in large] <= [11] * 3
        assert max(sum(c.values()) for c in large) == max(sum(c.values()) for c in small)
