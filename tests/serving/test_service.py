"""From the body of a request to requests to the engine, and counts, without a server."""

import asyncio
import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from miniruns import MINI

from dsv3_ref.config import UserError, from_dict
from dsv3_ref.data.chat_template import ChatTemplate, check_said
from dsv3_ref.data.tokenizer import FIM_BEGIN, FIM_END, FIM_HOLE, train_tokenizer
from dsv3_ref.model import Transformer
from dsv3_ref.serve import StepOutput
from dsv3_ref.serving.config import ServeConfig
from dsv3_ref.serving.conversation import (
    arrange_turns,
    check_variables,
    continues_answer,
    drop_prefix_mark,
    hide_path,
    render_messages,
    text_parts,
)
from dsv3_ref.serving.engine_thread import HISTOGRAM_BOUNDS, EngineThread, Histogram
from dsv3_ref.serving.fields import MAX_SEED, InvalidField
from dsv3_ref.serving.output_processor import CompletionPiece
from dsv3_ref.serving.protocol import CompletionRequest, HTTPError
from dsv3_ref.serving.service import (
    MAX_BODY_BYTES,
    Service,
    is_token_list,
    labeled_counter,
    num_prompts,
    num_text_bytes,
)

TEXT = ["we talk again and again\n"] * 50


@pytest.fixture(scope="module")
def service():
    """Return a service that is not started: 256 positions, at most four completions."""
    torch.manual_seed(0)
    sizes = {"max_seq_len": 256, "original_seq_len": 256}
    model = Transformer(from_dict(MINI | sizes)).eval()
    args = ServeConfig(Path("nowhere"), served_model_name="m", seed=3, max_n=4, max_new_tokens=20)
    return Service(args, model, train_tokenizer(TEXT, MINI["vocab_size"]))


def read(service, chat: bool = False, **values) -> CompletionRequest:
    return service.read_request(json.dumps(values).encode(), chat)


# ── Bodies ──


def test_a_body_becomes_prompts(service):
    bos, text = service.special_tokens.bos, service.chat.encode("we")
    assert read(service, prompt="we").prompts == [[bos, *text]]
    assert read(service).prompts == [[bos]] and read(service, prompt=[5, 6]).prompts == [[5, 6]]
    assert read(service, prompt=["we", [7]]).prompts == [[bos, *text], [7]]
    assert read(service, prompt="we").seed == 3 and read(service, prompt="we", seed=9).seed == 9
    assert read(service, model="m").n == 1


def test_a_suffix_surrounds_the_hole(service):
    bos = service.special_tokens.bos
    a, b = service.chat.encode("a"), service.chat.encode("b")
    begin, hole, end = (service.tokenizer.token_to_id(s) for s in (FIM_BEGIN, FIM_HOLE, FIM_END))
    assert read(service, prompt="a", suffix="b").prompts == [[bos, begin, *a, hole, *b, end]]
    assert read(service, prompt=[9], suffix="b").prompts == [[begin, 9, hole, *b, end]]
    assert read(service, prompt=[9], suffix="").prompts == [[9]]


@pytest.mark.parametrize(
    "prompt", [[], 5, [[]], [[400]], [[-1]], [True], [5, "a"]], ids=str
)  # fmt: skip
def test_what_is_no_prompt(service, prompt):
    with pytest.raises(InvalidField) as e:
        read(service, prompt=prompt)
    assert e.value.name == "prompt"


@pytest.mark.parametrize(
    "values, fits",
    [
        ({"prompt": "a", "n": 4}, True), ({"prompt": ["a", "b"], "n": 2}, True),
        ({"prompt": ["a", "b"], "n": 3}, False), ({"prompt": [5, 6, 7], "n": 4}, True),
        ({"prompt": ["a", "b"], "n": 1, "best_of": 3}, False),
        ({"prompt": "a", "n": 1, "best_of": 4}, True),
    ],
)  # fmt: skip
def test_the_number_of_completions_has_a_limit(service, values, fits):
    if fits:
        assert read(service, **values).n == values["n"]
        return
    with pytest.raises(UserError, match="completions are more than the 4 allowed per request"):
        read(service, **values)


@pytest.mark.parametrize(
    "values, count",
    [
        ({}, 0), ({"logprobs": 0}, 2 * 20), ({"logprobs": 5, "max_tokens": 7}, 2 * 7 * 6),
        ({"logprobs": 5, "max_tokens": 7, "n": 2}, 2 * 2 * 7 * 6),
        ({"best_of": 2, "max_tokens": 7}, 2 * 2 * 7),  # to choose the better one
        ({"logprobs": 1, "echo": True, "max_tokens": 7}, (3 + 2 * 7) * 2),
    ],
)  # fmt: skip
def test_the_log_probabilities_that_a_request_may_list(service, values, count):
    assert service.count_listed(read(service, prompt=[[5], [6, 7]], **values)) == count


def test_an_answer_begins_with_the_thought_that_its_prompt_opens(service, monkeypatch):
    talk = [turn("user"), turn("assistant")]
    assert read(service, True, messages=talk[:1]).opening == ""
    monkeypatch.setattr(service.chat, "opened_thought", lambda prompt: "<think>")
    assert read(service, True, messages=talk[:1]).opening == "<think>"
    assert read(service, True, messages=talk).opening == ""  # the answer is continued
    assert read(service, prompt="a").opening == ""


@pytest.mark.parametrize("missing", [FIM_BEGIN, FIM_HOLE, FIM_END])
def test_a_suffix_needs_three_tokens(service, monkeypatch, missing):
    ids = {name: i for i, name in enumerate((FIM_BEGIN, FIM_HOLE, FIM_END)) if name != missing}
    monkeypatch.setattr(service, "tokenizer", SimpleNamespace(token_to_id=ids.get))
    with pytest.raises(InvalidField, match="cannot express a suffix") as e:
        service.encode_prompt([5], "b")
    assert e.value.name == "suffix"


def test_a_model_has_one_name(service):
    with pytest.raises(HTTPError) as e:
        read(service, model="y" * 99)
    assert (e.value.status, e.value.param, e.value.code) == (404, "model", "model_not_found")
    assert str(e.value) == f"there is no model '{'y' * 80}'; this server serves 'm'"
    with pytest.raises(UserError, match="the body must be a JSON object"):
        service.read_request(b"[]", False)


def test_what_cannot_fit_is_refused_by_its_length(service):
    most = service.tokenize_pool.max_tokens * service.tokenize_pool.bytes_per_token
    half = "x" * (most // 2)
    for values, chat in (
        ({"prompt": "x" * most}, False), ({"prompt": ["x" * most] * 2}, False),
        ({"prompt": "x" * (most - 3), "suffix": "abc"}, False), ({"prompt": [5] * 256}, False),
        ({"messages": [{"role": "user", "content": half}, {"content": half}]}, True),
        ({"messages": [{"role": "user", "content": [{"text": half}, {"text": half}]}]}, True),
        ({"messages": [{"content": 5}, 7] * 100}, True), ({"prompt": None}, False),
    ):  # fmt: skip
        service.check_prompt_length(values, chat)
    for values, chat in (
        ({"prompt": "x" * (most + 1)}, False), ({"prompt": ["a", "é" * (most // 2 + 1)]}, False),
        ({"prompt": "x" * (most - 3), "suffix": "abcd"}, False), ({"prompt": [5] * 257}, False),
        ({"prompt": [[5] * 257]}, False), ({"messages": [{}] * 257}, True),
        ({"messages": [{"content": half}, {"content": half + "abc"}]}, True),
    ):  # fmt: skip
        with pytest.raises(UserError, match="cannot fit"):
            service.check_prompt_length(values, chat)


def test_prompts_and_texts_are_counted():
    assert [num_prompts(x) for x in ("a", None, [5, 6], ["a"], ["a", "b"], [])] == [
        1,
        1,
        1,
        1,
        2,
        0,
    ]
    assert [is_token_list(x) for x in ([5], [], ["a"], [True], "5")] == [True, *[False] * 4]
    assert [num_text_bytes(x) for x in ("aé", None, 5, "\ud800")] == [3, 0, 0, 1]
    assert num_text_bytes([{"text": "ab"}, {"text": 5}, "c", {"text": "d"}]) == 3


# ── Requests to the engine ──


def served(service, **values):
    request = read(service, **values)
    count = range(request.best_of * len(request.prompts))
    return [service.make_served_request(request, i, asyncio.Queue(), b"salt") for i in count]


def test_every_completion_has_its_prompt_and_its_seed(service):
    rows = served(service, prompt=[[5], [6, 7]], n=2, seed=MAX_SEED, temperature=0.5, top_p=0.9)
    assert [r.tokens for r in rows] == [[5], [5], [6, 7], [6, 7]]
    assert [r.index for r in rows] == [0, 1, 2, 3]
    seeds = [r.sampling_params.generator.initial_seed() for r in rows]
    assert seeds == [MAX_SEED, 0, 1, 2]
    assert rows[0].sampling_params[:2] == (0.5, 0.9) and rows[0].cache_salt == b"salt"
    assert rows[0].stop_token_ids == service.chat.stop_token_ids


def test_the_number_of_new_tokens_is_given_or_what_fits(service):
    assert served(service, prompt=[5], max_tokens=7)[0].max_tokens == 7
    assert served(service, prompt=[5])[0].max_tokens == 20
    assert served(service, prompt=[5] * 250)[0].max_tokens == 6
    assert served(service, prompt=[5] * 256)[0].max_tokens == 1


def test_what_the_engine_is_asked_for(service):
    (plain,) = served(service, prompt=[5])
    assert plain.num_logprobs == -1 and not plain.wants_prompt_logprobs and not plain.echo
    ranked = served(service, prompt=[5], best_of=2)
    assert [r.num_logprobs for r in ranked] == [0, 0]
    (echoed,) = served(service, prompt=[5], echo=True, logprobs=0)
    assert echoed.num_logprobs == 0 and echoed.wants_prompt_logprobs and echoed.echo
    assert not served(service, prompt=[5], echo=True)[0].wants_prompt_logprobs
    (free,) = served(service, prompt=[5], ignore_eos=True, stop_token_ids=[9])
    assert free.stop_token_ids == {9}


def test_a_draining_server_accepts_nothing(service, monkeypatch):
    assert service.status == "failed" and service.has_failed()  # it is not started
    monkeypatch.setattr(service, "has_failed", lambda: False)
    assert service.status == "ready"
    monkeypatch.setattr(service, "is_draining", True)
    assert service.status == "draining"
    with pytest.raises(HTTPError) as e:
        service.submit(read(service, prompt="we"))
    assert e.value.status == 503 and "shutting down" in str(e.value)


class Worker:
    """A prefill process that is never started."""

    alive = True

    def __init__(self, args, engine, wake, threads: int):
        self.threads, self.is_ready = threads, False

    def wait_until_ready(self) -> None:
        self.is_ready = True


def test_prefill_workers_share_the_threads_with_the_server(service, monkeypatch):
    given = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr("dsv3_ref.serving.service.PrefillWorker", Worker)
    monkeypatch.setattr(service.engine, "send_remote", None)
    for num_workers, threads in ((1, 4), (3, 2), (12, 1)):
        monkeypatch.setattr(service.engine_thread, "prefill_workers", [])
        service.start_prefill_workers(num_workers)
        workers = service.engine_thread.prefill_workers
        assert [(w.threads, w.is_ready) for w in workers] == [(threads, True)] * num_workers
    assert given == [4, 2, 1] and service.engine.send_remote is not None


def test_a_server_without_prefill_workers_computes_prompts_itself(service):
    args = ServeConfig(Path("nowhere"), max_n=4)
    with Service(args, service.policy.model, service.tokenizer) as started:
        assert started.status == "ready" and started.engine.send_remote is None


def test_all_completions_of_a_request_are_submitted_together(service, monkeypatch):
    taken = []
    monkeypatch.setattr(service.engine_thread, "submit", taken.append)
    request = read(service, prompt=[[5], [6]], n=2)
    with pytest.raises(HTTPError):  # the engine has failed
        service.submit(request)
    monkeypatch.setattr(service, "has_failed", lambda: False)
    rows = service.submit(request, b"s")
    assert [row.index for row in rows] == [0, 1, 2, 3] and taken[1] == rows
    assert len({id(row.sink) for row in rows}) == 1 and rows[3].cache_salt == b"s"


def test_pieces_are_passed_on_until_all_completions_have_ended(service):
    rows = served(service, prompt=[5]) * 2

    async def stream(*reasons: str) -> list[str]:
        for reason in reasons:
            rows[0].sink.put_nowait(CompletionPiece(rows[0], "a", [], reason))
        return [piece.finish_reason async for piece in service.stream_outputs(rows)]

    reasons = ["", "stop", "", "length"]
    assert asyncio.run(stream(*reasons)) == reasons
    for reason in ("failed", "abort"):
        with pytest.raises(HTTPError) as e:
            asyncio.run(stream("", reason))
        assert e.value.status == 503


# ── Counts ──


def test_the_usage_of_a_request(service, monkeypatch):
    request = read(service, prompt=[[5], [6, 7]], best_of=2, n=1)
    rows = served(service, prompt=[[5], [6, 7]], best_of=2, n=1)
    for i, row in enumerate(rows):
        row.num_cached_tokens = 10**i
    want = {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12}
    assert service.usage(request, rows, 9) == want
    args = ServeConfig(Path("nowhere"), report_cached_tokens=True)
    monkeypatch.setattr(service, "args", args)
    details = {"prompt_tokens_details": {"cached_tokens": 101}}
    assert service.usage(request, rows, 9) == want | details


def test_metrics_of_a_new_server(service):
    lines = service.metrics().splitlines()
    assert "dsv3_kv_blocks 2048" in lines and "dsv3_kv_blocks_used 0" in lines
    assert "# TYPE dsv3_steps_total counter" in lines and "dsv3_steps_total 0" in lines
    assert "# TYPE dsv3_num_requests_waiting gauge" in lines
    assert "dsv3_time_to_first_token_seconds_count 0" in lines
    assert labeled_counter("requests", "status", Counter({200: 3})) == [
        "# TYPE dsv3_requests_total counter", 'dsv3_requests_total{status="200"} 3'
    ]  # fmt: skip
    assert service.fingerprint.startswith("fp_") and len(service.fingerprint) == 13
    pool = service.tokenize_pool
    assert service.max_body_bytes == pool.max_body_bytes(4, MAX_BODY_BYTES)
    assert MAX_BODY_BYTES == 4 * 2**20


def test_the_times_of_tokens(service):
    thread = EngineThread(service.engine, service.tokenizer)
    (row,) = served(service, prompt=[5])
    row.arrival_time = 10.0
    thread.record_latency(row, 3, 10.2)  # three tokens of one step
    thread.record_latency(row, 2, 10.8)
    assert thread.time_to_first_token.sum == pytest.approx(0.2)
    assert sum(thread.time_to_first_token.counts) == 1
    latency = thread.inter_token_latency
    assert latency.sum == pytest.approx(0.6) and sum(latency.counts) == 4
    assert latency.counts[0] == 2 and latency.counts[HISTOGRAM_BOUNDS.index(0.5)] == 2
    assert row.last_token_time == 10.8


def test_an_idle_engine_is_not_busy(service):
    thread = EngineThread(service.engine, service.tokenizer)
    assert not thread.busy()
    (row,) = served(service, prompt=[5])
    scheduler = service.engine.scheduler
    scheduler.waiting.append(row)
    assert thread.busy()
    scheduler.running.append(scheduler.waiting.popleft())
    assert thread.busy()
    row.remote_prefill = True
    assert not thread.busy()
    row.aborted = True
    assert thread.busy()
    ends = thread.fail_all()
    assert [(x.request, x.finish_reason) for x in ends] == [(row, "failed")]
    assert row.finish_reason == "failed"
    scheduler.running.clear()
    service.engine.incoming_transfers.append((row, None))
    assert thread.busy()
    service.engine.incoming_transfers.clear()


def test_who_aborts_wakes_the_engine(service):
    thread = EngineThread(service.engine, service.tokenizer)
    rows = served(service, prompt=[[5], [6]])
    assert not any(row.aborted for row in rows)
    thread.abort(rows)
    assert all(row.aborted for row in rows) and thread.wake.is_set()


def test_the_ends_of_requests_are_counted_by_reason(service):
    thread, cancelled = EngineThread(service.engine, service.tokenizer), []
    thread.prefill_workers = [SimpleNamespace(cancel=cancelled.append)]
    row, other = served(service, prompt=[[5], [6]])
    other.hit_stop_text = True
    outputs = [(row, [7], ""), (row, [7], "length"), (other, [], "abort")]
    thread.deliver([StepOutput(request, ids, [], reason) for request, ids, reason in outputs])
    assert thread.finish_reasons == {"length": 1, "stop": 1} and cancelled == [row, other]
    assert [x.finish_reason for x in thread.processor.batches.get_nowait()] == [
        "",
        "length",
        "abort",
    ]


def test_a_step_that_fails_ends_all_requests(service, monkeypatch, capsys):
    thread = EngineThread(service.engine, service.tokenizer)
    (row,) = served(service, prompt=[5])
    monkeypatch.setattr(service.engine, "step", lambda: 1 / 0)
    monkeypatch.setattr(service.engine.scheduler, "waiting", [row])
    assert not thread.failed and not thread.stopped
    thread.run()
    assert thread.failed and thread.stopped and "ZeroDivisionError" in capsys.readouterr().err
    (end,) = thread.processor.batches.get_nowait()
    assert (end.request, end.finish_reason) == (row, "failed")


def test_a_duration_on_a_bound_belongs_to_it():
    h = Histogram()
    for bound in (0.005, 30.0, 31.0):
        h.observe(bound)
    assert h.counts == [1, *[0] * 10, 1, 1] and len(HISTOGRAM_BOUNDS) == 12


# ── Conversations ──


def turn(role: str, content: object = "a", **more) -> dict:
    return {"role": role, "content": content} | more


@pytest.mark.parametrize(
    "last, fields, continues",
    [
        ("user", {}, False), ("assistant", {}, True),
        ("assistant", {"add_generation_prompt": True}, False),
        ("assistant", {"add_generation_prompt": False}, True),
        ("assistant", {"continue_final_message": False}, False),
        ("user", {"continue_final_message": True}, True),
    ],
)  # fmt: skip
def test_when_an_answer_is_continued(last, fields, continues):
    messages = [turn("user"), turn(last)]
    assert continues_answer({"messages": messages} | fields) is continues
    assert not continues_answer({"messages": []})


def test_the_mark_of_a_given_beginning():
    marked = [turn("user", prefix=True), turn("assistant", prefix=True)]
    assert drop_prefix_mark(marked) == [marked[0], turn("assistant")]
    assert drop_prefix_mark([turn("user"), *marked[1:]]) == [turn("user"), turn("assistant")]
    kept = [turn("user", prefix=True), turn("assistant", prefix=False)]
    assert drop_prefix_mark(kept) == kept and drop_prefix_mark([]) == []


def test_turns_in_the_order_of_v3s_form():
    a, b, c, d = ({"type": "text", "text": text} for text in "abcd")
    gap = {"type": "text", "text": "\n\n"}
    turns = [
        turn("user"), turn("developer", "b"), turn("user", [c]), turn("system", "d"),
        turn("user", 5), turn("user", []),
    ]  # fmt: skip
    assert arrange_turns(turns) == [
        turn("system", [b, gap, d]), turn("user", [a, gap, c]), turn("user", 5), turn("user", [])
    ]  # fmt: skip
    apart = [turn("user"), turn("assistant"), turn("user", "b")]
    assert arrange_turns(apart) == apart
    assert text_parts("a") == [a] and text_parts([1]) == [1] and text_parts(None) == []


def test_many_turns_of_one_role_take_linear_time(service):
    """A body of 4 MB once took minutes, in which no other large one was read."""
    fields = {f"k{i}": 1 for i in range(50_000)}
    turns = [turn("user", **fields), *([turn("user")] * 50_000)]
    start = time.process_time()
    (only,) = arrange_turns(turns)
    assert time.process_time() - start < 2 and len(only["content"]) == 100_001


def test_what_a_template_drops_is_found_in_linear_time():
    template = SimpleNamespace(source="m")
    turns = [turn("user", f'{"a" * 90}"{i:06}') for i in range(30_000)]
    text = "".join(each["content"] for each in turns)
    start = time.process_time()
    check_said(template, turns, text)
    check_said(template, turns, text.replace('"', '\\"'))
    check_said(template, [turns[1], turns[0], turn("assistant", "b")], text)
    assert time.process_time() - start < 2
    with pytest.raises(UserError, match="drops turn 2"):
        check_said(template, [turns[1], turn("user", "b"), turns[2]], text)


def test_no_order_of_turns_takes_long_to_follow():
    """A body of 2 MB once took two minutes: V3's template moves system texts to the front."""
    template = SimpleNamespace(source="m")
    systems, long = [turn("system", "aab")] * 2_000, turn("user", "a" * 2_000_000)
    moved = "".join(each["content"] for each in [*systems, turn("user", "b"), long])
    users = [turn("user", f"{i:06}" + "a" * 90) for i in range(20_000)]
    backwards = "".join(each["content"] for each in reversed(users))
    start = time.process_time()
    check_said(template, [turn("user", "b"), *systems, long], moved)
    with pytest.raises(UserError, match="another order, and there are too many"):
        check_said(template, users, backwards)
    assert time.process_time() - start < 5
    check_said(template, users[:50], "".join(each["content"] for each in reversed(users[:50])))


@pytest.mark.parametrize("messages", [None, "hi", {}, [[]], [turn("user"), "hi"]], ids=str)
def test_what_is_no_conversation(service, messages):
    with pytest.raises(InvalidField, match="a list of turns, which are objects") as e:
        render_messages(service.chat, {"messages": messages})
    assert e.value.name == "messages"


def test_a_conversation_becomes_tokens(service):
    ids, a = service.special_tokens, service.chat.encode("a")
    asked = [ids.bos, ids.user, *a, ids.assistant]
    talk = [turn("user"), turn("assistant")]
    assert render_messages(service.chat, {"messages": talk[:1]}) == asked
    assert render_messages(service.chat, {"messages": talk}) == [*asked, *a]
    new = {"messages": talk, "add_generation_prompt": True}
    assert render_messages(service.chat, new) == [*asked, *a, ids.eos, ids.assistant]
    for unused in ({"tools": []}, {"tools": [{}], "tool_choice": "none"}):
        assert render_messages(service.chat, {"messages": talk[:1]} | unused) == asked
    with pytest.raises(InvalidField) as e:
        render_messages(service.chat, {"messages": talk[:1], "tools": [{}]})
    assert e.value.name == "tools"


@pytest.mark.parametrize("source, shown", [("/srv/v3", "this model"), ("", "/srv/v3")])
def test_an_error_does_not_name_the_servers_directory(service, source, shown):
    settings = replace(service.chat.settings, source=source)
    chat = ChatTemplate(service.tokenizer, settings)
    assert hide_path(chat, ValueError("/srv/v3 has no template")) == f"{shown} has no template"


@pytest.mark.parametrize(
    "tools, variables, name",
    [
        (None, {}, ""), ([{}], {"x": 1}, ""), ([5], {}, "tools"), ({}, {}, "tools"),
        (None, {"messages": 1}, "chat_template_kwargs"), (None, [], "chat_template_kwargs"),
        (None, {"add_generation_prompt": 1}, "chat_template_kwargs"),
    ],
)  # fmt: skip
def test_variables_of_a_template(tools, variables, name):
    if not name:
        check_variables(tools, variables)
        return
    with pytest.raises(InvalidField) as e:
        check_variables(tools, variables)
    assert e.value.name == name
