"""A request's tokens and text are those of the request served alone, whatever else is served."""

import asyncio
import time
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from threading import Event

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dsv3_ref.data.tokenizer import train_tokenizer
from dsv3_ref.decode import SamplingParams
from dsv3_ref.model import Transformer
from dsv3_ref.serve import Engine, LogitsProcessor, Request, StepOutput, make_engine
from dsv3_ref.serving.detokenizer import (
    StopMatcher,
    StreamDetokenizer,
    byte_of_sign,
    partial_stop_length,
    token_bytes,
)
from dsv3_ref.serving.output_processor import (
    MIN_LOGPROB,
    REQUEST_FAILED,
    OutputProcessor,
    ServedRequest,
)

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


# ── What a client receives ──


def receive(model, depth: int, rows: list[ServedRequest], max_num_seqs: int) -> list[tuple]:
    """Return text, log-probabilities, number of tokens and finish reason of every request."""
    processor = OutputProcessor(tokenizer(), Event())
    e = small_engine(model, depth, max_num_seqs=max_num_seqs)
    e.submit(*rows)
    pieces = {r: [] for r in rows}
    while e.has_unfinished_requests():
        for output in e.step():
            if piece := processor.process(output):
                pieces[output.request].append(piece)
    return [
        (
            "".join(p.text for p in pieces[r]),
            list(chain(*(p.logprobs for p in pieces[r]))),
            sum(p.num_tokens for p in pieces[r]),
            pieces[r][-1].finish_reason,
        )
        for r in rows
    ]


def rounded(x: object) -> object:
    """Return a received value with its log-probabilities rounded."""
    if isinstance(x, float):
        return round(x, 6)
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    return [rounded(v) for v in x] if isinstance(x, list | tuple) else x


PROCESSORS = [
    LogitsProcessor(),
    LogitsProcessor(1.3, 0.5, 0.5, ((7, 3.0), (270, 2.0)), 4),
    LogitsProcessor(logit_bias=tuple((i, 50.0) for i in range(150, 260))),  # halves of characters
]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.integers(0, 299), min_size=1, max_size=9), min_size=1, max_size=3),
    st.sampled_from(PROCESSORS), st.lists(st.text("ab世é☕ t", min_size=1, max_size=2), max_size=3),
    st.booleans(), st.integers(-1, 3), st.integers(0, 20), st.integers(1, 3),
)  # fmt: skip
def test_drafts_and_company_change_nothing_that_is_received(
    micro, exact, prompts, processor, stop, echo, num_logprobs, max_tokens, max_num_seqs
):
    """Text, log-probabilities, bytes, offsets and usage of greedy requests with half characters."""
    torch.manual_seed(0)
    model = Transformer(replace(micro, vocab_size=300)).double().eval()

    def served() -> list[ServedRequest]:
        return [
            ServedRequest(
                tokens=list(prompt), max_tokens=max_tokens, stop_token_ids=frozenset({5}),
                num_logprobs=num_logprobs, wants_prompt_logprobs=echo and num_logprobs >= 0,
                logits_processor=processor, index=0, sink=asyncio.Queue(), echo=echo,
                text=StreamDetokenizer(tokenizer(), tuple(stop)),
            )
            for prompt in prompts
        ]  # fmt: skip

    want = [receive(model, 0, [r], 1)[0] for r in served()]
    for depth in (0, 1, 2):
        assert rounded(receive(model, depth, served(), max_num_seqs)) == rounded(want)
    for text, entries, _, _ in want:
        starts = [entry["text_offset"] for entry in entries]
        assert starts == sorted(starts) and all(start <= len(text) for start in starts)


# ── Single outputs ──


def listener(*stop: str, **options) -> ServedRequest:
    """Return a request with the prompt “we”, whose stop token is 5."""
    text = StreamDetokenizer(tokenizer(), stop)
    tokens = tokenizer().encode("we", add_special_tokens=False).ids
    return ServedRequest(
        tokens=tokens, max_tokens=99, stop_token_ids=frozenset({5}), index=0,
        sink=asyncio.Queue(), text=text, **options,
    )  # fmt: skip


def output(request: ServedRequest, words: str, reason: str = "", *more: int) -> StepOutput:
    ids = tokenizer().encode(words, add_special_tokens=False).ids
    return StepOutput(request, [*ids, *more], [], reason)


@pytest.mark.parametrize("reason", ["", "length"])
def test_a_stop_string_closes_a_request(reason):
    """The engine is woken only if it still runs the request."""
    wake = Event()
    processor, request = OutputProcessor(tokenizer(), wake), listener("b")
    assert processor.process(output(request, "a")).text == "a"
    ids = [tokenizer().token_to_id(sign) for sign in "aba"]
    piece = processor.process(StepOutput(request, ids, [], reason))
    assert (piece.text, piece.finish_reason, piece.num_tokens) == ("a", "stop", 2)
    assert request.is_closed and request.hit_stop_text
    assert request.aborted is wake.is_set() is (reason == "")
    assert processor.process(output(request, "a")) is None


def test_the_last_output_returns_what_was_withheld_and_no_stop_token():
    processor, request = OutputProcessor(tokenizer(), Event()), listener("bc")
    assert processor.process(output(request, "ab")).text == "a"
    piece = processor.process(output(request, "", "stop", 5))
    assert (piece.text, piece.finish_reason, piece.num_tokens) == ("b", "stop", 1)
    assert request.is_closed and not request.hit_stop_text and not request.aborted


@pytest.mark.parametrize("reason", ["error", "failed", "abort"])
def test_an_end_without_text(reason, capsys):
    request = listener(echo=True)
    processor = OutputProcessor(tokenizer(), Event())
    piece = processor.process(StepOutput(request, [], [], reason, "boom"))
    assert piece == (request, "", [], reason, 0, REQUEST_FAILED)
    assert capsys.readouterr().err == "a request ended with an error: boom\n"


def test_a_fault_ends_its_request(monkeypatch, capsys):
    wake = Event()
    processor, request = OutputProcessor(tokenizer(), wake), listener()
    monkeypatch.setattr(processor, "make_piece", lambda *_: 1 / 0)
    piece = processor.process(output(request, "a"))
    assert (piece.finish_reason, piece.error) == ("error", REQUEST_FAILED)
    assert request.is_closed and request.aborted and wake.is_set()
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_an_echoed_prompt_comes_once_and_moves_the_offsets():
    processor, request = OutputProcessor(tokenizer(), Event()), listener(echo=True, num_logprobs=1)
    a = tokenizer().token_to_id("a")
    first = processor.process(StepOutput(request, [a], [(-0.5, [(a, -0.5)])], ""))
    assert first.text == "wea" and not request.echo and request.num_prompt_characters == 2
    (entry,) = first.logprobs
    assert entry["text_offset"] == 2 and entry["token"] == "a" and entry["bytes"] == [97]
    assert entry["top_logprobs"] == [{"token": "a", "logprob": -0.5, "bytes": [97]}]
    second = processor.process(StepOutput(request, [a], [(-0.5, [])], "length"))
    assert second.text == "a" and second.logprobs[0]["text_offset"] == 3


def test_logprobs_wait_for_their_text():
    processor, request = OutputProcessor(tokenizer(), Event()), listener("ab", num_logprobs=0)
    a, c = (tokenizer().token_to_id(sign) for sign in "ac")
    held = processor.process(StepOutput(request, [a], [(-1.0, [])], ""))
    assert held.text == "" and held.logprobs == []
    told = processor.process(StepOutput(request, [c], [(-2.0, [])], ""))
    assert told.text == "ac" and [entry["logprob"] for entry in told.logprobs] == [-1.0, -2.0]


def test_an_impossible_token_has_a_finite_logprob():
    processor = OutputProcessor(tokenizer(), Event())
    assert processor.describe_token(9, float("-inf"))["logprob"] == MIN_LOGPROB == -9999.0
    assert processor.describe_token(9, None)["logprob"] is None
    assert processor.describe_token(9, -0.5)["logprob"] == -0.5


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


@given(st.lists(st.text("ab", max_size=4), max_size=12), st.text("ab", min_size=1, max_size=7))
@example(["aaaab"], "aaab")  # a false start, in which the right one begins
@example(["ababab", "abb"], "ababb")
def test_a_stop_string_is_found_as_by_searching_the_whole_text(pieces, stop):
    matcher = StopMatcher(stop)
    text = ""
    for piece in pieces:
        found = matcher.push(piece)
        begin = (text + piece).find(stop)
        assert found == (None if begin < 0 else begin - len(text))
        if found is not None:
            return
        text += piece
        partial = [n for n in range(len(stop)) if text.endswith(stop[:n])]
        assert matcher.num_matched == max(partial)


@given(st.text("ab", max_size=12), st.text("ab", min_size=1, max_size=5))
def test_what_may_begin_a_stop_string_is_shorter_than_it(text, stop):
    ends = [n for n in range(len(stop)) if text.endswith(stop[:n])]
    assert partial_stop_length(text, stop) == max(ends)


def test_long_stop_strings_cost_little_for_each_token():
    """A client may send strings that nearly occur, and force their letter by logit_bias."""
    letter = tokenizer().encode("a", add_special_tokens=False).ids[0]
    stops = tuple("a" * 999 + chr(ord("b") + i) for i in range(16))
    text = StreamDetokenizer(tokenizer(), stops)
    start = time.process_time()
    assert "".join([text.push([letter]) for _ in range(4000)]) + text.flush() == "a" * 4000
    assert time.process_time() - start < 2


def test_a_stop_string_of_byte_tokens_leaks_nothing():
    ids = tokenizer().encode("a世界", add_special_tokens=False).ids
    assert len(ids) == 7  # a character of three bytes is three tokens
    text = StreamDetokenizer(tokenizer(), ("世界",))
    assert [text.push([i]) for i in ids] == ["a", *[""] * 6] and text.ended
    text = StreamDetokenizer(tokenizer(), ("世界",))
    assert "".join(text.push([i]) for i in ids[:5]) + text.flush() == "a世\ufffd"


def test_every_byte_has_a_sign():
    assert sorted(byte_of_sign().values()) == list(range(256))
    assert sorted(byte_of_sign()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert token_bytes("Ġa") == b" a" and token_bytes("世") == "世".encode()


@pytest.mark.parametrize(
    "data, starts",
    [
        ("a世é".encode(), [0, 1, 1, 1, 2, 2]),
        (b"\xe4a", [0, 1]), (b"\xe4\xb8\xe4\xb8\x96", [0, 0, 1, 1, 1]),  # cut off by the next
        ("\ufffda".encode(), [0, 0, 0, 1]),  # bytes of the very sign that stands for broken ones
    ],
    ids=["whole", "broken", "broken twice", "sign"],
)  # fmt: skip
def test_a_token_begins_in_the_character_of_its_first_byte(data, starts):
    text, found = StreamDetokenizer(tokenizer()), []
    sign_of_byte = {byte: sign for sign, byte in byte_of_sign().items()}
    for byte in data:
        text.push([tokenizer().token_to_id(sign_of_byte[byte])])
        found.append(text.start_of_token)
    assert found == starts


def unigram() -> Tokenizer:
    """Return a tokenizer as SentencePiece makes them: words, and bytes for what it lacks."""
    model = models.BPE(
        {"<unk>": 0, "▁": 1, "▁we": 2, "▁talk": 3, "a": 4}
        | {f"<0x{i:02X}>": 5 + i for i in range(256)},
        [], byte_fallback=True, unk_token="<unk>",
    )  # fmt: skip
    tokens = Tokenizer(model)
    tokens.add_special_tokens(["<s>"])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokens.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return tokens


def byte_ids(text: str) -> list[int]:
    """Return the byte tokens of a text."""
    return [5 + byte for byte in text.encode()]


@pytest.mark.parametrize(
    "ids, text",
    [
        ([2, 3, 1, 2], "we talk  we"),
        ([2, *byte_ids("世"), 4, *byte_ids("é"), 3], "we世aé talk"),
        ([2, 261, 261, 3], "we talk"),
        ([*byte_ids("世")[:2]], "\ufffd\ufffd"),
        ([*byte_ids("☕") * 3, 4], "☕☕☕a"),
    ],
    ids=["words", "bytes", "special", "half", "several"],
)
def test_a_tokenizer_of_words_and_bytes_streams_the_same_text(ids, text):
    tokens = unigram()
    detokenizer = StreamDetokenizer(tokens)
    assert "".join([detokenizer.push([i]) for i in ids]) + detokenizer.flush() == text
    assert tokens.decode(ids) == text


@pytest.mark.parametrize("kind", [tokenizer, unigram])
@pytest.mark.parametrize("ids", [[4, 3, 2], [229, 233, 156], [261]], ids=["words", "bytes", "mark"])
def test_a_long_text_costs_no_more_per_token(kind, ids):
    """vllm #119, sglang pull request #653: all tokens were decoded again at every step."""
    tokens = kind()
    seconds = []
    for repeats in (1000, 8000):
        text = StreamDetokenizer(tokens)
        start = time.process_time()
        for _ in range(repeats):
            for i in ids:
                text.push([i])
        seconds.append(time.process_time() - start)
    assert seconds[1] < 8 * 4 * max(seconds[0], 0.005)
