"""Rows on every data-parallel index: the same on every mesh, ahead of the step, errors once."""

import json
import random
import threading
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace

import datasets
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from miniruns import prose

from dsv3_ref.config import TINY, UserError, ceil_div
from dsv3_ref.data import loader as loader_module
from dsv3_ref.data import tokenizer as tok
from dsv3_ref.data.loader import PackedDataLoader
from dsv3_ref.data.packing import PackedDataset, flag_sample
from dsv3_ref.data.sources import TextSource
from dsv3_ref.data.streams import StreamLoader, part_bounds
from dsv3_ref.long_context import Needle
from dsv3_ref.optim import RECIPES
from dsv3_ref.parallel.mesh_parallel import MeshParallel
from dsv3_ref.parallel.rows import PrefetchingLoader
from dsv3_ref.training.checkpointer import join_tensors, split_tensors
from dsv3_ref.training.extend import NeedleLoader
from dsv3_ref.training.settings import TrainConfig
from dsv3_ref.training.task import Data

TEXTS = [f"Document {i}. {prose(random.Random(i), 30)}" for i in range(90)]
TOKENS = tok.train_tokenizer(TEXTS, 330)
SIZES = [7, 7, 8, 13, 5, 12, 6]  # a ramp, and sizes that nothing divides


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    monkeypatch.setattr(loader_module, "SHUFFLE_ROWS", 40)


def sources() -> list[TextSource]:
    data = datasets.Dataset.from_dict({"text": TEXTS})
    stream = datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()
    return [TextSource("a", 0.7, data, 0), TextSource("b", 0.3, stream, 1000)]


def text_rows(n: int) -> StreamLoader:
    """Return n streams of text, with FIM and split line breaks."""
    loaders = [PackedDataLoader(sources(), TOKENS, 17, 3, 0.3, 0.1, i, n) for i in range(n)]
    return StreamLoader(loaders)


def packed_rows(n: int) -> PackedDataset:
    """Return packed samples with flags, as SFT has them."""
    rng = random.Random(1)
    lengths = [rng.randrange(3, 17) for _ in range(40)]
    samples = [flag_sample(list(range(k)), [i % 2 == 0 for i in range(k)]) for k in lengths]
    return PackedDataset(samples, 17, 4, 0)


def needle_rows(n: int) -> NeedleLoader:
    needle = Needle([5], [[10 + i] for i in range(10)], [7])
    return NeedleLoader(text_rows(n), needle, 0.5, 5)


LOADERS = {"text": text_rows, "packed": packed_rows, "needles": needle_rows}


# ── Without ranks ──


@given(n=st.integers(0, 500), parts=st.integers(1, 40), times=st.integers(1, 9))
def test_parts_are_even_and_a_multiple_divides_them(n, parts, times):
    bounds = [part_bounds(n, parts, i) for i in range(parts)]
    assert [bounds[0][0], bounds[-1][1]] == [0, n]
    assert all(a[1] == b[0] for a, b in zip(bounds, bounds[1:]))
    assert {end - begin for begin, end in bounds} <= {n // parts, ceil_div(n, parts)}
    finer = {part_bounds(n, parts * times, i)[0] for i in range(parts * times)}
    assert {begin for begin, _ in bounds} <= finer


def test_one_stream_is_the_plain_loader():
    plain = PackedDataLoader(sources(), TOKENS, 17, 3, 0.3)
    assert torch.equal(text_rows(1).next_batch(300), plain.next_batch(300))


def through_json(state: dict) -> dict:
    """Return a state as a checkpoint keeps it."""
    values, tensors = split_tensors({"data": state})
    return join_tensors(json.loads(json.dumps(values)), tensors)["data"]


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize(("streams", "readers", "others"), [(1, 3, 2), (4, 2, 4), (6, 4, 1)])
def test_readers_share_the_rows_of_one(kind, streams, readers, others):
    """Also after another number of readers has resumed from the state of all."""
    one, make = LOADERS[kind](streams), LOADERS[kind]
    group = [make(streams) for _ in range(readers)]
    for step, n in enumerate(SIZES * 4):
        if step == 9:
            state = through_json(group[0].merge_states([x.state_dict() for x in group]))
            assert state.keys() == one.state_dict().keys()
            group = [make(streams) for _ in range(others)]
            for x in group:
                x.load_state_dict(state)
        parts = [x.next_part(n, *part_bounds(n, len(group), i)) for i, x in enumerate(group)]
        assert torch.equal(torch.cat(parts), one.next_batch(n)), step


def test_a_reader_reads_its_own_streams_only():
    """With a multiple of the readers, no reader takes a document of another's stream."""
    group = [text_rows(6) for _ in range(3)]
    for n in SIZES * 3:
        for i, x in enumerate(group):
            x.next_part(n, *part_bounds(n, 3, i))
    for i, x in enumerate(group):
        read = [any(s.tokens_drawn for s in stream.sources) for stream in x.streams]
        assert read == [j // 2 == i for j in range(6)]


def test_streams_share_the_documents_of_an_epoch():
    """Each document is in one stream, and FIM cuts it as in a single stream."""
    whole, streams = text_rows(1).streams[0].sources[0], text_rows(4).streams
    n = len(whole.train_data)
    taken = [list(stream.sources[0].documents(0)) for stream in streams]
    assert sorted(chain.from_iterable(taken)) == sorted(whole.documents(0))
    assert {len(part) for part in taken} <= {n // 4, n // 4 + 1}
    source = streams[2].sources[0]
    next(source.train_documents())
    assert source.document_number == 3


def test_more_streams_than_documents_are_refused():
    with pytest.raises(UserError, match="--data-streams 200 is more than a has"):
        text_rows(200)


# ── Ahead of the step ──


class FakeGroup:
    """A stand-in for the process group of a `PrefetchingLoader` on one rank."""


def test_rows_are_drawn_ahead_but_not_counted(monkeypatch):
    monkeypatch.setattr("dsv3_ref.parallel.rows.gather_on_first", lambda own, group: [own])
    ahead, plain = PrefetchingLoader(text_rows(2), 0, 1, FakeGroup()), text_rows(2)
    for i, n in enumerate(SIZES):
        assert torch.equal(ahead.next_part(SIZES[i:]), plain.next_batch(n))
        assert len(ahead.pending) == min(2, len(SIZES) - i - 1)
        state = ahead.state_dict()
        assert state["streams"] == plain.state_dict()["streams"]
    assert ahead.prefetch([9, 9]) is False
    assert ahead.prefetch([4, 9]) is True  # a rollback changes the size of the next batch
    assert torch.equal(ahead.next_part([4, 9]), plain.next_batch(4))
    assert torch.equal(ahead.next_part([9]), plain.next_batch(9))


def test_the_thread_works_while_the_caller_does_something_else():
    drawn, go = threading.Event(), threading.Event()

    class Slow(PackedDataset):
        def next_part(self, n, begin, end):
            if self.index:
                drawn.set()
                go.wait(10)
            return super().next_part(n, begin, end)

    plain = packed_rows(1)
    slow = Slow(plain.samples, 17, 4, 0)
    ahead = PrefetchingLoader(slow, 0, 1, FakeGroup())
    first = ahead.next_part([3, 3, 3])
    assert drawn.wait(10) and not ahead.pending[0][1].done()
    go.set()
    assert torch.equal(first, plain.next_batch(3)) and ahead.failure() is None


# ── On ranks ──


class Failing(PackedDataset):
    """Samples of which one rank cannot read the third batch."""

    rank, calls = -1, 0

    def next_part(self, n, begin, end):
        self.calls += 1
        if self.calls == 3 and dist.get_rank() == self.rank:
            raise UserError("the shard data/shard-00007.bin is damaged")
        return super().next_part(n, begin, end)


def build_strategy(world: int, loader) -> tuple[MeshParallel, SimpleNamespace]:
    """Return a mesh with dp 2 and a run that has only its data."""
    recipe = replace(RECIPES["tiny"], seq_len=16)
    config = TrainConfig(model=TINY, recipe=recipe, pp=world // 2, dp=2)
    strategy = MeshParallel(config, torch.device("cpu"))
    data = Data(["a"], SIZES, {}, TOKENS, loader=loader)
    task = SimpleNamespace(build_data=lambda: data, replicates_data=False)
    rows = strategy.build_data(task)
    strategy.engine = SimpleNamespace(global_loss_weight=len)
    return strategy, SimpleNamespace(data=rows, state=SimpleNamespace(step=0))


def draw_on_ranks(kind: str, streams: int):
    """Return this rank's data index, its rows of every step, and the state after the fourth."""
    loader_module.SHUFFLE_ROWS = 40  # in this process of the gang only
    strategy, run = build_strategy(dist.get_world_size(), LOADERS[kind](streams))
    parts, state = [], None
    for step, n in enumerate(SIZES):
        rows = strategy.next_rows(run, n)
        assert len(rows) == n
        parts.append(rows.rows.rows_bs)
        run.state.step += 1
        assert not strategy.should_stop([])
        if step == 3:
            state = run.data.loader.state_dict()
    return strategy.mesh.data_rank, parts, state if dist.get_rank() == 0 else None


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("streams", [1, 2])
def test_ranks_read_the_rows_of_one_process(kind, streams, gang):
    answers = gang.run(4, draw_on_ranks, kind, streams)
    one, state = LOADERS[kind](streams), None
    for step, n in enumerate(SIZES):
        want = one.next_batch(n)
        state = state or (step == 3 and one.state_dict())
        for index, parts, _ in answers:
            begin, end = part_bounds(n, 2, index)
            assert torch.equal(parts[step], want[begin:end])
    other = LOADERS[kind](streams)
    other.load_state_dict(through_json(answers[0][2]))
    again = LOADERS[kind](streams)
    again.load_state_dict(through_json(state))
    assert torch.equal(other.next_batch(30), again.next_batch(30))


def meet_a_failure(rank: int) -> tuple[int, str]:
    """Return the step before which reading fails, and the error."""
    plain = packed_rows(1)
    loader = Failing(plain.samples, 17, 4, 0)
    loader.rank = rank
    strategy, run = build_strategy(4, loader)
    with pytest.raises((UserError, SystemExit)) as caught:
        for n in SIZES:
            strategy.next_rows(run, n)
            run.state.step += 1
            strategy.should_stop([])
    return run.state.step, str(caught.value)


@pytest.mark.parametrize("rank", [0, 3])
def test_a_reader_that_fails_stops_all_ranks_with_the_file(rank, gang):
    answers = gang.run(4, meet_a_failure, rank, seconds=60)
    reported, ended = (2, "the shard data/shard-00007.bin is damaged"), (2, "2")
    assert answers == [reported, ended, ended, ended]
