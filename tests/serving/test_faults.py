"""A fault in one request ends that request; the others' tokens are those of an undisturbed run."""

import pytest
import torch

from dsv3_ref.decode import SamplingParams
from dsv3_ref.model import Transformer
from dsv3_ref.serve import (
    BlockPool,
    Engine,
    KVTransfer,
    LogitsProcessor,
    Request,
    Scheduler,
    StepOutput,
    make_engine,
)
from dsv3_ref.serving.prefill import PrefillWorker

DEPTHS = (0, 1, 2)
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7], [9, 3, 2, 3, 8, 4, 6, 2]]


@pytest.fixture
def model(micro, exact):
    return Transformer(micro).double().eval()


def engine(model, depth: int = 0, **options) -> Engine:
    """Build an engine with small blocks and chunks, so that every test crosses their borders."""
    small = {"num_blocks": 64, "block_size": 4, "prefill_chunk": 6, "max_num_seqs": 5}
    return make_engine(model, **(small | {"num_speculative_tokens": depth} | options))


def request(i: int, max_tokens: int = 12, temperature: float = 1.0, **options) -> Request:
    """Return the i-th request: a prompt and a seed of its own."""
    params = SamplingParams(temperature, 0.95, torch.Generator().manual_seed(i))
    return Request(list(PROMPTS[i]), max_tokens, params, **options)


def drain(e: Engine, *requests: Request) -> list[StepOutput]:
    """Submit requests and step until all have ended; return all outputs."""
    e.submit(*requests)
    outputs = []
    while e.has_unfinished_requests():
        outputs += e.step()
    return outputs


SERVED_ALONE: dict[tuple, list[int]] = {}  # outputs of the model, which every test makes alike


def undisturbed(model, depth: int, *numbers: int, temperature: float = 1.0) -> list[list[int]]:
    """Return the output tokens of requests, each served alone."""
    for i in numbers:
        if (depth, i, temperature) not in SERVED_ALONE:
            drain(engine(model, depth), r := request(i, temperature=temperature))
            SERVED_ALONE[depth, i, temperature] = r.output_tokens
    return [SERVED_ALONE[depth, i, temperature] for i in numbers]


def poison(model) -> int:
    """Add a token whose embedding is NaN, which the model itself never chooses; return its id."""
    w = model.embed.weight
    w.data = torch.cat((w.data, torch.full_like(w[:1], float("nan"))))
    return len(w) - 1


# ── Exactly max_tokens ──


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_max_tokens_is_exact(model, depth, n, temperature):
    """Count what the outputs deliver: the end is in the last of them and in no earlier one."""
    r = request(0, n, temperature)
    outputs = drain(engine(model, depth), r)
    assert sum((x.tokens for x in outputs), []) == r.output_tokens and len(r.output_tokens) == n
    assert [x.finish_reason for x in outputs] == [""] * (len(outputs) - 1) + ["length"]


def test_an_output_is_not_changed_by_later_steps(model):
    e = engine(model)
    e.submit(Request([1], 2))
    first = e.step()
    before = list(first)
    e.step()
    assert first == before and first[0].finish_reason == "" and first[0].tokens


# ── A fault of one request ──


class Broken(SamplingParams):
    """Sampling parameters whose n-th use raises an exception."""

    def count(self) -> None:
        calls = self.generator.calls = getattr(self.generator, "calls", 0) + 1
        if calls == 3:
            raise RuntimeError("injected")

    def sample(self, logit_bw):
        self.count()
        return super().sample(logit_bw)

    def draft(self, logit_bw):
        self.count()
        return super().draft(logit_bw)

    def verify(self, *args):
        self.count()
        return super().verify(*args)


class Dice(torch.Generator):
    """A generator that can carry a count."""


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_fault_while_sampling_ends_one_request(model, depth):
    want = undisturbed(model, depth, 1, 2)
    bad = request(0)
    bad.sampling_params = Broken(1.0, 1.0, Dice().manual_seed(0))
    others = [request(1), request(2)]
    e = engine(model, depth)
    outputs = drain(e, others[0], bad, others[1])
    assert [r.output_tokens for r in others] == want
    (end,) = (x for x in outputs if x.request is bad and x.finish_reason)
    assert end.finish_reason == "error" and "injected" in end.error
    assert e.scheduler.block_pool.num_used == 0 and e.counters["errors"] == 1


class FaultyProcessor(LogitsProcessor):
    """A logits processor that fails after some output tokens."""

    def process(self, r, logit_w, draft):
        if len(r.output_tokens) >= 3:
            raise RuntimeError("injected")
        return super().process(r, logit_w, draft)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_fault_of_penalties_ends_one_request(model, depth, temperature):
    want = undisturbed(model, depth, 1, 2, temperature=temperature)
    bad = request(0, temperature=temperature, logits_processor=FaultyProcessor(1.2))
    others = [request(i, temperature=temperature) for i in (1, 2)]
    e = engine(model, depth)
    outputs = drain(e, others[0], bad, others[1])
    assert [r.output_tokens for r in others] == want
    (end,) = (x for x in outputs if x.request is bad and x.finish_reason)
    assert end.finish_reason == "error" and "injected" in end.error
    assert e.scheduler.block_pool.num_used == 0


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("stage", ["match_prefix", "allocate_slots", "cache_full_blocks"])
@pytest.mark.parametrize("call", [1, 2, 5])
def test_a_fault_while_scheduling_ends_one_request(model, depth, stage, call, monkeypatch):
    want = undisturbed(model, depth, 1, 2)
    e, bad = engine(model, depth), request(0)
    others, calls = [request(1), request(2)], []
    real = getattr(e.scheduler, stage)

    def inject(r, *args):
        if r is bad:
            calls.append(r)
            if len(calls) == call:
                raise RuntimeError("injected")
        return real(r, *args)

    monkeypatch.setattr(e.scheduler, stage, inject)
    drain(e, others[0], bad, others[1])
    assert [r.output_tokens for r in others] == want
    assert bad.finish_reason == ("error" if len(calls) >= call else "length")
    assert e.scheduler.block_pool.num_used == 0


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("stage", ["prefill_step", "mtp_forward", "logits"])
def test_a_fault_while_prefilling_ends_one_request(model, depth, stage, monkeypatch):
    if stage == "mtp_forward" and not depth:
        pytest.skip("no MTP module runs")
    want = undisturbed(model, depth, 1, 2)
    e, bad = engine(model, depth), request(0)
    others = [request(1), request(2)]
    real, runs = getattr(e.runner, stage), []
    chunk = e.prefill_chunk
    monkeypatch.setattr(e, "prefill_chunk", lambda r, n: (runs.append(r), chunk(r, n), runs.pop()))

    def inject(*args):
        if runs and runs[-1] is bad:
            runs.clear()
            raise RuntimeError("injected")
        return real(*args)

    monkeypatch.setattr(e.runner, stage, inject)
    drain(e, others[0], bad, others[1])
    assert [r.output_tokens for r in others] == want and bad.finish_reason == "error"
    assert e.scheduler.block_pool.num_used == 0


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("step", [1, 3, 5])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_ends_one_request_and_spreads_to_no_other(model, depth, step, temperature):
    """A token whose embedding is NaN: its request ends, also for those who get its pages next."""
    want = undisturbed(model, depth, 1, 2, temperature=temperature)
    e = engine(model, depth, num_blocks=14)
    bad, others = request(0, 30, temperature), [request(1, temperature=temperature)]
    e.submit(others[0], bad)
    for _ in range(step):
        e.step()
    bad.tokens[-1] = poison(model)
    outputs = e.step() + e.step()
    assert [x.finish_reason for x in outputs if x.request is bad][-1] == "error"
    others.append(request(2, temperature=temperature))
    drain(e, others[1])
    assert [r.output_tokens for r in others] == want
    assert all(kv_pyx.isfinite().all() for kv_pyx in e.runner.kv_caches)


def test_a_damaged_prefix_is_not_shared(model):
    """A prompt with NaN in its middle registers no page, and no chunk of it goes unnoticed."""
    common, e = [7] * 9, engine(model, 1)
    bad = Request([*common, poison(model), *range(1, 20)], 4)
    (end,) = (x for x in drain(e, bad) if x.finish_reason)
    assert end.finish_reason == "error" and "not finite" in end.error and not bad.output_tokens
    good = Request([*common, 5, *range(1, 20)], 4)
    drain(e, good)
    assert good.finish_reason == "length"


@pytest.mark.parametrize("stage", ["decode_step", "clear_blocks"])
def test_a_fault_of_the_engine_is_raised(model, stage, monkeypatch):
    """A failed batch, or a device that cannot compute anymore, concerns every request."""
    e = engine(model)
    monkeypatch.setattr(e.runner, stage, lambda *_: 1 / 0)
    bad = request(0)
    bad.sampling_params = Broken(1.0, 1.0, Dice().manual_seed(0))
    with pytest.raises(ZeroDivisionError):
        drain(e, bad)


# ── Prompts that another process computes ──


def test_a_prompt_that_a_worker_cannot_compute_is_computed_here(model):
    (want,) = undisturbed(model, 1, 1)
    e, sent = engine(model, 1), []
    e.send_remote = lambda r: sent.append(r) or True
    e.submit(r := request(1))
    e.step()
    assert r.remote_prefill
    worker = PrefillWorker.__new__(PrefillWorker)
    worker.engine, worker.requests = e, {7: r}
    worker.receive(b'{"failed": 7}', "cpu")
    drain(e)
    assert sent == [r] and r.output_tokens == want


def test_a_transfer_with_nan_ends_one_request(model):
    (want,) = undisturbed(model, 0, 2)
    e, sent = engine(model), []
    e.send_remote = lambda r: r is bad and not sent.append(r)
    bad, good = request(1), request(2)
    e.submit(bad, good)
    e.step()
    bad_lsx = torch.full((5, len(bad.tokens), 24), float("nan"), dtype=torch.float64)
    transfer = KVTransfer(0, bad_lsx, 0, torch.zeros(0, 0), torch.zeros(61))
    e.incoming_transfers.append((bad, transfer))
    drain(e)
    assert bad.finish_reason == "error" and good.output_tokens == want
    assert all(kv_pyx.isfinite().all() for kv_pyx in e.runner.kv_caches)


# ── Blocks of other users ──


def test_a_salt_keeps_prefixes_apart(model):
    e, prompt = engine(model), list(range(20))
    cached = []
    for salt in (b"a", b"b", b"a", b""):
        r = Request(list(prompt), 2, cache_salt=salt)
        drain(e, r)
        cached.append(r.num_cached_tokens)
    assert cached == [0, 0, 16, 0]


@pytest.mark.parametrize("depth", [1, 2])
def test_a_hash_covers_the_tokens_that_drafts_depend_on(depth):
    scheduler = Scheduler(BlockPool(9, 4), 1, 1, 9, depth, 64)
    text = list(range(12))
    hashes = scheduler.hash_request(Request(text, 1), 2)
    for i in range(12):
        changed = [*text[:i], 99, *text[i + 1 :]]
        other = scheduler.hash_request(Request(changed, 1), 2)
        assert [a == b for a, b in zip(hashes, other)] == [i >= 4 * k + depth for k in (1, 2)]
