"""A request's tokens and text are those of the request served alone, whatever else is served."""

from dataclasses import dataclass
from functools import cache
from itertools import chain

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv3_ref.data.tokenizer import train_tokenizer
from dsv3_ref.decode import SamplingParams
from dsv3_ref.model import Transformer
from dsv3_ref.serve import Engine, Request, make_engine
from dsv3_ref.serving.detokenizer import StreamDetokenizer, byte_of_sign, token_bytes

COMMON = [5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]
TALK = ["we talk, and talk again: naïve ☕, over and over.\n"] * 50


@dataclass(frozen=True)
class Job:
    """A request, when it arrives, and when it is cancelled."""

    num_common: int  # tokens of a prefix that others may have too
    prompt: tuple[int, ...]
    n: int  # completions, whose seeds follow each other
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: frozenset[int]
    arrival: int
    cancel_after: int | None  # steps

    def requests(self) -> list[Request]:
        """Return new requests to the engine."""
        out = []
        for i in range(self.n):
            dice = torch.Generator().manual_seed(self.seed + i)
            params = SamplingParams(self.temperature, self.top_p, dice)
            tokens = [*COMMON[: self.num_common], *self.prompt]
            out.append(Request(tokens, self.max_tokens, params, self.stop))
        return out


JOBS = st.builds(
    Job,
    num_common=st.integers(0, 12),
    prompt=st.lists(st.integers(0, 60), min_size=1, max_size=9).map(tuple),
    n=st.integers(1, 3),
    max_tokens=st.integers(1, 9),
    temperature=st.sampled_from([0.0, 1e-38, 0.7, 1.5]),
    top_p=st.sampled_from([1.0, 0.8]),
    seed=st.integers(0, 9),
    stop=st.frozensets(st.integers(0, 60), max_size=9),
    arrival=st.integers(0, 9),
    cancel_after=st.none() | st.none() | st.integers(0, 9),
)


def small_engine(model, depth: int, **options) -> Engine:
    """Build an engine with blocks of four tokens."""
    small = {"num_blocks": 64, "block_size": 4, "num_speculative_tokens": depth}
    return make_engine(model, **(small | options))


def drain(e: Engine, requests: list[Request]) -> list[list[int]]:
    """Serve requests; return the tokens that the outputs of the steps deliver."""
    delivered = {r: [] for r in requests}
    e.submit(*requests)
    while e.has_unfinished_requests():
        for output in e.step():
            delivered[output.request] += output.tokens
    return list(delivered.values())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # `exact` keeps no state
@given(
    st.lists(JOBS, min_size=1, max_size=5), st.integers(0, 2), st.integers(1, 20),
    st.integers(1, 6), st.integers(9, 40),
)  # fmt: skip
def test_company_changes_no_token(micro, exact, jobs, depth, chunk, max_num_seqs, num_blocks):
    """Compare with each request alone, in an engine that has room for all of it at once.

    Few blocks preempt requests, small chunks divide prompts, and common prefixes share pages.
    """
    torch.manual_seed(0)
    model = Transformer(micro).double().eval()
    e = small_engine(
        model, depth, num_blocks=num_blocks, prefill_chunk=chunk, max_num_seqs=max_num_seqs
    )
    requests = {job: job.requests() for job in dict.fromkeys(jobs)}
    delivered = {r: [] for r in chain(*requests.values())}
    reasons = {r: [] for r in delivered}
    for step in range(10_000):
        for job, rows in requests.items():
            if step == job.arrival:
                e.submit(*rows)
            if job.cancel_after is not None and step == job.arrival + job.cancel_after:
                for r in rows:
                    r.aborted = True
        for r, tokens, _, reason, _ in e.step():
            delivered[r] += tokens
            reasons[r] += [reason] if reason else []
        if step >= 20 and not e.has_unfinished_requests():
            break
    assert e.scheduler.block_pool.num_used == 0
    for job, rows in requests.items():
        for r, alone in zip(rows, job.requests()):
            (want,) = drain(small_engine(model, depth), [alone])
            assert len(reasons[r]) == 1 and delivered[r] == r.output_tokens
            if reasons[r] == ["abort"]:
                assert delivered[r] == want[: len(delivered[r])] and job.cancel_after is not None
                continue
            assert delivered[r] == want and reasons[r] == [alone.finish_reason]
            ends = [i for i, token in enumerate(want) if token in job.stop]
            assert len(want) == (ends[0] + 1 if ends else job.max_tokens)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_preemption_redraws_no_random_number(micro, exact, depth):
    model = Transformer(micro).double().eval()
    jobs = [Job(0, (i, 1, 2, 3), 1, 20, 1.0, 1.0, i, frozenset(), 0, None) for i in range(4)]
    want = [drain(small_engine(model, depth), job.requests())[0] for job in jobs]
    e = small_engine(model, depth, num_blocks=10)
    assert drain(e, list(chain(*(job.requests() for job in jobs)))) == want
    assert e.counters["preemptions"] > 0


# ── Text ──


@cache
def tokenizer():
    return train_tokenizer(TALK, 300)


WORDS = st.text("ab世界é☕", max_size=12)


@given(WORDS, st.lists(st.text("ab世界é☕", min_size=1, max_size=3), max_size=3), st.data())
def test_no_part_of_a_stop_string_leaks(words, stops, data):
    """Cut characters into bytes and bytes into groups: what is returned never depends on it."""
    ids = tokenizer().encode(words, add_special_tokens=False).ids
    cut = min([i for s in stops if (i := first_end(words, s, stops)) is not None], default=None)
    text = StreamDetokenizer(tokenizer(), tuple(stops))
    got = ""
    rest = list(ids)
    while rest:
        size = data.draw(st.integers(1, 4))
        got += text.push(rest[:size])
        assert words.startswith(got) and (cut is None or len(got) <= cut)
        rest = rest[size:]
    got += text.flush()
    assert got == words[:cut] and text.ended == (cut is not None)


def first_end(words: str, stop: str, stops: list[str]) -> int | None:
    """Return where `stop` begins, if no stop string is complete before it is."""
    begin = words.find(stop)
    if begin < 0:
        return None
    ends = [words.find(s) + len(s) for s in stops if s in words]
    return begin if begin + len(stop) == min(ends) else None


@given(st.lists(st.integers(9, 299), max_size=30))
def test_any_tokens_become_the_text_that_the_tokenizer_decodes(ids):
    text = StreamDetokenizer(tokenizer())
    assert "".join([text.push([i]) for i in ids]) + text.flush() == tokenizer().decode(ids)


def test_a_stop_string_of_byte_tokens_leaks_nothing():
    ids = tokenizer().encode("a世界", add_special_tokens=False).ids
    assert len(ids) == 7  # a character of three bytes is three tokens
    text = StreamDetokenizer(tokenizer(), ("世界",))
    assert [text.push([i]) for i in ids] == ["a", *[""] * 6] and text.ended
    text = StreamDetokenizer(tokenizer(), ("世界",))
    assert "".join(text.push([i]) for i in ids[:5]) + text.flush() == "a世\ufffd"


def test_every_byte_has_a_sign():
    assert sorted(byte_of_sign().values()) == list(range(256))
    assert token_bytes("Ġa") == b" a" and token_bytes("世") == "世".encode()
