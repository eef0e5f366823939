"""`dsv3 serve`: an OpenAI-compatible HTTP server around the engine of chapter 18."""

import asyncio
import json
import secrets
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from tokenizers import Tokenizer

from dsv3_ref.checkpoints.native import find_tokenizer_dir, load
from dsv3_ref.config import UserError
from dsv3_ref.data.tokenizer import load_tokenizer
from dsv3_ref.decode import SamplingParams
from dsv3_ref.model import Transformer
from dsv3_ref.posttraining.policy import Policy
from dsv3_ref.serve import Engine, QueueFull, Request
from dsv3_ref.serving.config import ServeConfig, build_engine, validate_serve_config
from dsv3_ref.serving.prefill import PrefillWorker, dispatch_prefill
from dsv3_ref.serving.protocol import (
    CompletionRequest,
    HTTPError,
    JSONObject,
    error_body,
    flatten_content,
    is_token_ids,
    make_choice,
    parse_flag,
    parse_float,
    parse_int,
    parse_logprobs,
    parse_stop,
    reject_unknown,
    response_head,
)
from dsv3_ref.serving.text_generator import StreamDetokenizer
from dsv3_ref.serving.web import bind_socket, is_loopback
from dsv3_ref.training.strategy import pick_device

if TYPE_CHECKING:  # optional dependencies
    import uvicorn
    from fastapi import FastAPI
    from fastapi import Request as HTTPRequest
    from fastapi.responses import JSONResponse, Response, StreamingResponse

Answer = TypeVar("Answer")

INSTALL_HINT = "dsv3 serve needs FastAPI and uvicorn: pip install -e '.[serve]'"
ENGINE_FAILED = "the engine has failed; see the server's log and restart the server"
MAX_BODY_BYTES = 4 << 20
MAX_SEED = (1 << 63) - 1
HISTOGRAM_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # seconds


# ── Metrics ──


class Histogram:
    """A Prometheus histogram of durations."""

    def __init__(self) -> None:
        self.counts = [0] * (len(HISTOGRAM_BOUNDS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        """Add a duration."""
        self.counts[sum(seconds > bound for bound in HISTOGRAM_BOUNDS)] += 1
        self.sum += seconds

    def exposition(self, name: str) -> Iterator[str]:
        """Yield the lines of Prometheus' text format, with cumulative counts."""
        total = 0
        for bound, count in zip([*HISTOGRAM_BOUNDS, "+Inf"], self.counts):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self.sum:.6f}"
        yield f"{name}_count {total}"


# ── The engine's thread ──


class RequestOutput(NamedTuple):
    """New tokens of a request, with its finish reason, "" while it runs."""

    request: "ServedRequest"
    tokens: list[int]
    finish_reason: str


@dataclass(eq=False)
class ServedRequest(Request):
    """A request to the engine that belongs to an HTTP request."""

    index: int = 0  # among the completions of the HTTP request
    sink: asyncio.Queue[RequestOutput] = field(default_factory=asyncio.Queue)
    arrival_time: float = 0.0
    last_token_time: float = 0.0  # 0: no token yet
    num_delivered: int = 0  # tokens passed to the detokenizer
    hit_stop_text: bool = False  # ended by one of the client's stop strings


class EngineThread(threading.Thread):
    """The thread that steps the engine while there is work.

    Requests may be submitted from any thread; outputs are passed to the event loop.
    """

    def __init__(self, engine: Engine):
        super().__init__(daemon=True)
        self.engine = engine
        self.wake = threading.Event()
        self.stopped = False
        self.failed = False
        self.loop: asyncio.AbstractEventLoop | None = None
        self.finish_reasons: Counter[str] = Counter()
        self.time_to_first_token = Histogram()
        self.inter_token_latency = Histogram()
        self.prefill_workers: list[PrefillWorker] = []

    def submit(self, requests: list[ServedRequest]) -> None:
        """Queue all requests or none; raises what `Scheduler.submit` raises."""
        self.loop = asyncio.get_running_loop()
        for request in requests:
            request.arrival_time = time.monotonic()
        self.engine.submit(*requests)
        self.wake.set()

    def abort(self, requests: list[ServedRequest]) -> None:
        """Abort requests; the engine frees their blocks before its next step."""
        for request in requests:
            request.aborted = True
        self.wake.set()

    def call_between_steps(
        self, fn: Callable[[Transformer], Any], reset_prefix_cache: bool = False
    ) -> Future:
        """Run fn(model) in the main process between two steps; return a future of its result."""
        future = self.engine.call_between_steps(fn, reset_prefix_cache)
        self.wake.set()
        return future

    def busy(self) -> bool:
        """Return whether a step of the engine would do something."""
        engine, scheduler = self.engine, self.engine.scheduler
        is_active = any(not r.remote_prefill or r.aborted for r in scheduler.running)
        has_events = engine.pending_callbacks or engine.incoming_transfers
        return bool(is_active or scheduler.waiting or has_events)

    def run(self) -> None:
        """Step the engine until `stop` is called or a step raises an exception."""
        while not self.stopped:
            if not self.busy():
                self.wake.wait()
            self.wake.clear()
            try:
                outputs = self.engine.step()
            except Exception:  # the state of the engine can no longer be trusted
                traceback.print_exc()
                self.failed = self.stopped = True
                outputs = self.fail_all()
            self.deliver(outputs)

    def fail_all(self) -> list[tuple[Request, list[int]]]:
        """End all requests with the finish reason "failed"; return them with no tokens."""
        requests = [*self.engine.scheduler.running, *self.engine.scheduler.waiting]
        for request in requests:
            request.finish_reason = "failed"
        return [(request, []) for request in requests]

    def deliver(self, outputs: list[tuple[Request, list[int]]]) -> None:
        """Update the metrics and pass the outputs of a step to the event loop."""
        now = time.monotonic()
        deliveries = []
        for request, tokens in outputs:
            assert isinstance(request, ServedRequest)
            if tokens:
                self.record_latency(request, len(tokens), now)
            if request.finish_reason:
                reason = "stop" if request.hit_stop_text else request.finish_reason
                self.finish_reasons[reason] += 1
                for worker in self.prefill_workers:
                    worker.cancel(request)
            deliveries.append(RequestOutput(request, tokens, request.finish_reason))
        if deliveries:
            assert self.loop is not None  # `submit` has set it
            with suppress(RuntimeError):  # the loop is closed: the server is shutting down
                self.loop.call_soon_threadsafe(deliver_outputs, deliveries)

    def record_latency(self, request: ServedRequest, num_tokens: int, now: float) -> None:
        """Add the times of new tokens to the histograms; tokens of one step share its time."""
        if request.last_token_time:
            latency = (now - request.last_token_time) / num_tokens
            num_latencies = num_tokens
        else:
            self.time_to_first_token.observe(now - request.arrival_time)
            latency = 0.0
            num_latencies = num_tokens - 1
        for _ in range(num_latencies):
            self.inter_token_latency.observe(latency)
        request.last_token_time = now

    def stop(self) -> None:
        """Let the current step finish, then end the thread."""
        self.stopped = True
        self.wake.set()
        self.join()


def deliver_outputs(outputs: list[RequestOutput]) -> None:
    """Put each output into the queue of its HTTP request; runs on the event loop."""
    for output in outputs:
        output.request.sink.put_nowait(output)


# ── The service ──


class CompletionPiece(NamedTuple):
    """New text of a completion, with the log-probabilities of its tokens."""

    request: ServedRequest
    text: str
    logprobs: list[JSONObject]
    finish_reason: str  # "" while it runs


class Service:
    """A model with its tokenizer, its engine thread and its prefill workers."""

    def __init__(
        self, args: ServeConfig, model: Transformer | None = None,
        tokenizer: Tokenizer | None = None,
    ):  # fmt: skip
        validate_serve_config(args)
        self.args = args
        self.created = int(time.time())
        model = model or load(args.model).to(pick_device(args.device)).eval()
        self.tokenizer = tokenizer or load_tokenizer(find_tokenizer_dir(args.model))
        self.policy = Policy(model, self.tokenizer)
        self.special_tokens = self.policy.special_tokens
        self.name = args.served_model_name or args.model.resolve().name
        self.engine = build_engine(model, args)
        self.engine_thread = EngineThread(self.engine)
        self.requests: Counter[int] = Counter()  # by HTTP status

    def __enter__(self) -> "Service":
        num_workers = self.args.prefill_workers
        if num_workers:
            self.start_prefill_workers(num_workers)
        self.engine_thread.start()
        return self

    def start_prefill_workers(self, num_workers: int) -> None:
        """Start prefill processes and divide the CPU threads among all processes."""
        threads = max(1, torch.get_num_threads() // (1 + num_workers))
        workers = self.engine_thread.prefill_workers
        for _ in range(num_workers):
            workers.append(PrefillWorker(self.args, self.engine, self.engine_thread.wake, threads))
        torch.set_num_threads(threads)
        for worker in workers:
            worker.wait_until_ready()
        self.engine.send_remote = lambda request: dispatch_prefill(workers, request)

    def __exit__(self, *_: object) -> None:
        self.engine_thread.stop()
        for worker in self.engine_thread.prefill_workers:
            worker.stop()

    # From the body of an HTTP request to requests to the engine

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, in which special tokens are treated as plain text."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_prompts(self, body: JSONObject, chat: bool) -> list[list[int]]:
        """Return the token ids of every prompt; text cannot produce a special token."""
        if chat:
            return [self.policy.encode_prompt(flatten_content(body.get("messages")))]
        prompts = body.get("prompt", "")
        is_token_list = isinstance(prompts, list) and prompts and is_token_ids(prompts)
        if isinstance(prompts, str) or is_token_list:
            prompts = [prompts]
        if not isinstance(prompts, list) or not 1 <= len(prompts) <= self.args.max_n:
            raise UserError(
                f"prompt must be a string or a list of 1 to {self.args.max_n} strings, "
                "where a list of token ids may take the place of a string"
            )
        return [self.encode_text_or_ids(prompt) for prompt in prompts]

    def encode_text_or_ids(self, prompt: Any) -> list[int]:
        """Return the token ids of a prompt that is a string or a list of token ids."""
        if isinstance(prompt, str):
            return [self.special_tokens.bos, *self.encode(prompt)]
        vocab_size = self.engine.runner.model.config.vocab_size
        is_valid = isinstance(prompt, list) and is_token_ids(prompt)
        if is_valid and all(0 <= token < vocab_size for token in prompt):
            return prompt
        raise UserError(f"each prompt must be a string or a list of token ids below {vocab_size}")

    def parse_request(self, body: JSONObject, chat: bool) -> CompletionRequest:
        """Validate the body of an HTTP request; raise a `UserError` or an `HTTPError`."""
        if not isinstance(body, dict):
            raise UserError("the body must be a JSON object")
        if body.get("model", self.name) != self.name:
            model = str(body["model"])[:80]
            raise HTTPError(404, f"there is no model {model!r}; this server serves {self.name!r}")
        reject_unknown(body)
        options = body.get("stream_options") or {}
        max_len = self.engine.scheduler.max_model_len
        is_new_name = "max_completion_tokens" in body
        max_tokens_name = "max_completion_tokens" if is_new_name else "max_tokens"
        seed = secrets.randbits(62) if self.args.seed is None else self.args.seed
        return CompletionRequest(
            prompts=self.encode_prompts(body, chat),
            chat=chat,
            n=parse_int(body, "n", 1, 1, self.args.max_n),
            max_tokens=parse_int(body, max_tokens_name, None, 1, max_len),
            temperature=parse_float(body, "temperature", 1.0, 0, 2),
            top_p=parse_float(body, "top_p", 1.0, 1e-6, 1),
            seed=parse_int(body, "seed", seed, -MAX_SEED - 1, MAX_SEED),
            stop=parse_stop(body),
            stream=parse_flag(body, "stream"),
            include_usage=isinstance(options, dict) and parse_flag(options, "include_usage"),
            num_logprobs=parse_logprobs(body, chat),
        )

    def submit(self, request: CompletionRequest) -> list[ServedRequest]:
        """Queue one engine request per completion and return them.

        Raises a `UserError` for too many completions, an `HTTPError` if the engine has failed,
        and what `Scheduler.submit` raises.
        """
        total = request.n * len(request.prompts)
        if total > self.args.max_n:
            raise UserError(
                f"{total} completions are more than the {self.args.max_n} allowed per request: "
                "lower n or send fewer prompts"
            )
        sink: asyncio.Queue[RequestOutput] = asyncio.Queue()
        served = [
            self.make_served_request(request, index, sink)
            for index in range(request.n * len(request.prompts))
        ]
        if self.engine_thread.failed:
            raise HTTPError(503, ENGINE_FAILED)
        self.engine_thread.submit(served)
        return served

    def make_served_request(
        self, request: CompletionRequest, index: int, sink: asyncio.Queue[RequestOutput]
    ) -> ServedRequest:
        """Return the engine request of a completion: number index % n of its prompt."""
        prompt = request.prompts[index // request.n]
        room = self.engine.scheduler.max_model_len - len(prompt)
        seed = (request.seed + index) % (MAX_SEED + 1)
        generator = torch.Generator(self.engine.runner.device).manual_seed(seed)
        return ServedRequest(
            tokens=list(prompt),
            max_tokens=request.max_tokens or max(1, min(self.args.max_new_tokens, room)),
            sampling_params=SamplingParams(request.temperature, request.top_p, generator),
            stop_token_ids=frozenset({self.special_tokens.eos}),
            num_logprobs=request.num_logprobs,
            index=index,
            sink=sink,
        )

    # From engine outputs to text

    async def stream_outputs(
        self, request: CompletionRequest, served: list[ServedRequest]
    ) -> AsyncIterator[CompletionPiece]:
        """Yield the pieces of all completions as they come, until all have ended.

        Raises an `HTTPError` if the engine fails.
        """
        texts = {r: StreamDetokenizer(self.tokenizer, request.stop) for r in served}
        sink = served[0].sink
        while texts:
            output, tokens, finish_reason = await sink.get()
            if (text := texts.get(output)) is None:  # a stop string ended it in the step before
                continue
            if finish_reason in ("failed", "abort"):
                raise HTTPError(503, ENGINE_FAILED)
            start = output.num_delivered
            logprobs = output.logprobs[start : start + len(tokens)]
            output.num_delivered += len(tokens)
            text_tokens = [t for t in tokens if t != self.special_tokens.eos]
            piece = text.push(text_tokens)
            if text.ended:
                finish_reason = "stop"
                output.hit_stop_text = True
                self.engine_thread.abort([output])
            elif finish_reason:
                piece += text.flush()
            if finish_reason:
                del texts[output]
            entries = self.describe_logprobs(text_tokens, logprobs)
            yield CompletionPiece(output, piece, entries, finish_reason)

    def describe_logprobs(
        self, tokens: list[int], logprobs: list[tuple[float, list[tuple[int, float]]]]
    ) -> list[JSONObject]:
        """Return log-probabilities of tokens, and of their alternatives, in the API's format."""
        return [
            self.describe_token(token, logprob)
            | {"top_logprobs": [self.describe_token(*pair) for pair in alternatives]}
            for token, (logprob, alternatives) in zip(tokens, logprobs)
        ]

    def describe_token(self, token: int, logprob: float) -> JSONObject:
        """Return a token's text, its bytes and its log-probability."""
        text = self.tokenizer.decode([token], skip_special_tokens=False)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def usage(self, request: CompletionRequest, served: list[ServedRequest]) -> JSONObject:
        """Return the token counts of an HTTP request."""
        num_prompt_tokens = sum(map(len, request.prompts))
        num_new_tokens = sum(r.num_delivered for r in served)
        num_cached_tokens = sum(r.num_cached_tokens for r in served[:: request.n])
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_new_tokens,
            "total_tokens": num_prompt_tokens + num_new_tokens,
            "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
        }

    def metrics(self) -> str:
        """Return the metrics in Prometheus' text format."""
        thread = self.engine_thread
        lines = []
        for name, value in self.gauges().items():
            lines += [f"# TYPE dsv3_{name} gauge", f"dsv3_{name} {value}"]
        for name, value in self.counters().items():
            lines += [f"# TYPE dsv3_{name}_total counter", f"dsv3_{name}_total {value}"]
        lines += labeled_counter("requests", "status", self.requests)
        lines += labeled_counter("completions", "finish_reason", thread.finish_reasons)
        for name, histogram in (
            ("dsv3_time_to_first_token_seconds", thread.time_to_first_token),
            ("dsv3_inter_token_latency_seconds", thread.inter_token_latency),
        ):
            lines += [f"# TYPE {name} histogram", *histogram.exposition(name)]
        return "\n".join(lines) + "\n"

    def gauges(self) -> dict[str, int]:
        """Return the current numbers of requests, blocks and workers."""
        scheduler = self.engine.scheduler
        pool = scheduler.block_pool
        return {
            "num_requests_running": len(scheduler.running),
            "num_requests_waiting": len(scheduler.waiting),
            "kv_blocks": pool.num_blocks,
            "kv_blocks_used": pool.num_used,
            "kv_blocks_evictable": len(pool.evictable),
            "prefill_workers": sum(worker.alive for worker in self.engine_thread.prefill_workers),
        }

    def counters(self) -> dict[str, int]:
        """Return the totals since the start."""
        counters = self.engine.counters
        return {
            "prompt_tokens": counters["prompt_tokens"],
            "prefix_cache_hit_tokens": counters["prefix_cache_hits"],
            "generation_tokens": counters["generation_tokens"],
            "steps": counters["steps"],
            "preemptions": counters["preemptions"],
            "spec_decode_draft_tokens": counters["draft_tokens"],
            "spec_decode_accepted_tokens": counters["accepted_tokens"],
        }


def labeled_counter(name: str, label: str, counts: Mapping[Any, int]) -> list[str]:
    """Return the lines of a Prometheus counter with one value per label."""
    lines = [f"# TYPE dsv3_{name}_total counter"]
    for value, count in counts.items():
        lines.append(f'dsv3_{name}_total{{{label}="{value}"}} {count}')
    return lines


# ── HTTP ──


async def collect_response(
    service: Service, request: CompletionRequest, served: list[ServedRequest], head: JSONObject
) -> JSONObject:
    """Return the response to a request without streaming, once all completions have ended."""
    texts = dict.fromkeys(served, "")
    logprobs: dict[ServedRequest, list[JSONObject]] = {r: [] for r in served}
    finish_reasons = {}
    async for piece in service.stream_outputs(request, served):
        texts[piece.request] += piece.text
        logprobs[piece.request] += piece.logprobs
        finish_reasons[piece.request] = piece.finish_reason
    choices = [
        make_choice(request, r.index, texts[r], logprobs[r], finish_reasons[r]) for r in served
    ]
    return head | {"choices": choices, "usage": service.usage(request, served)}


async def sse_events(
    service: Service, request: CompletionRequest, served: list[ServedRequest], head: JSONObject
) -> AsyncIterator[str]:
    """Yield server-sent events: pieces of completions, the usage if requested, and [DONE]."""
    if request.chat:
        for r in served:
            choice = make_choice(request, r.index, "", [], None)
            choice["delta"]["role"] = "assistant"
            yield format_event(head | {"choices": [choice]})
    try:
        async for r, text, logprobs, finish_reason in service.stream_outputs(request, served):
            if text or finish_reason or (logprobs and request.num_logprobs >= 0):
                choice = make_choice(request, r.index, text, logprobs, finish_reason)
                yield format_event(head | {"choices": [choice]})
    except HTTPError as e:
        yield format_event(error_body(str(e), e.status))
        return
    if request.include_usage:
        yield format_event(head | {"choices": [], "usage": service.usage(request, served)})
    yield "data: [DONE]\n\n"


def format_event(data: JSONObject) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def read_json_body(request: "HTTPRequest") -> JSONObject:
    """Return the decoded body of an HTTP request; raise an `HTTPError` or a `UserError`.

    The content type must be JSON: a browser then refuses to send the request for a foreign page.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise HTTPError(415, "the content type must be application/json")
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY_BYTES:
            raise HTTPError(413, f"the body must not exceed {MAX_BODY_BYTES} bytes")
    try:
        body = json.loads(data)
        json.dumps(body, ensure_ascii=False).encode()  # lone surrogates cannot be encoded
        return body
    except (ValueError, RecursionError):
        raise UserError("the body must be JSON in UTF-8") from None


async def wait_disconnect(request: "HTTPRequest") -> None:
    """Wait until the client disconnects."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def cancel_on_disconnect(
    request: "HTTPRequest", answer: Coroutine[Any, Any, Answer]
) -> Answer | None:
    """Await a coroutine and return its result; cancel it and return None on a disconnect."""
    answer_task = asyncio.ensure_future(answer)
    disconnect_task = asyncio.ensure_future(wait_disconnect(request))
    try:
        await asyncio.wait((answer_task, disconnect_task), return_when=asyncio.FIRST_COMPLETED)
        return answer_task.result() if answer_task.done() else None
    finally:
        answer_task.cancel()
        disconnect_task.cancel()


class Endpoints:
    """Handlers of HTTP requests to a service."""

    def __init__(self, service: Service):
        self.service = service
        self.model = {
            "id": service.name,
            "object": "model",
            "created": service.created,
            "owned_by": "dsv3",
        }

    async def respond(self, http_request: "HTTPRequest", chat: bool) -> "Response":
        """Return the response to a completion request, an error response if it is invalid."""
        try:
            response = await self.complete(http_request, chat)
        except UserError as e:
            response = error_response(400, str(e))
        except QueueFull:
            message = "the server is at capacity and its queue is full: retry later"
            response = error_response(429, message, {"Retry-After": "1"})
        except HTTPError as e:
            response = error_response(e.status, str(e))
        self.service.requests[response.status_code] += 1
        return response

    async def complete(self, http_request: "HTTPRequest", chat: bool) -> "Response":
        """Return a whole or streaming response; abort its engine requests if the client leaves."""
        service = self.service
        request = service.parse_request(await read_json_body(http_request), chat)
        served = service.submit(request)
        request_id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        head = response_head(request, request_id, service.name)
        if request.stream:
            events = sse_events(service, request, served, head)
            return stream_response(events, lambda: service.engine_thread.abort(served))
        try:
            answer = collect_response(service, request, served, head)
            body = await cancel_on_disconnect(http_request, answer)
            return json_response(body, 200 if body else 499)
        finally:
            service.engine_thread.abort(served)

    def health(self) -> "Response":
        """Return status 200 if the engine thread runs, else 503."""
        thread = self.service.engine_thread
        is_healthy = thread.is_alive() and not thread.failed
        body = {"status": "ok" if is_healthy else "failed"}
        return json_response(body, 200 if is_healthy else 503)


def json_response(
    body: JSONObject | None, status: int, headers: dict[str, str] | None = None
) -> "JSONResponse":
    """Return an HTTP response with a JSON body."""
    from fastapi.responses import JSONResponse

    return JSONResponse(body, status, headers)


def error_response(
    status: int, message: str, headers: dict[str, str] | None = None
) -> "JSONResponse":
    """Return an HTTP response that describes an error in OpenAI's format."""
    return json_response(error_body(message, status), status, headers)


def stream_response(
    events: AsyncIterator[str], on_close: Callable[[], None]
) -> "StreamingResponse":
    """Return a response of server-sent events.

    on_close: called after the last event and when the client disconnects.
    """
    from fastapi.responses import StreamingResponse

    class ClosingResponse(StreamingResponse):
        async def __call__(self, *args: Any) -> None:
            try:
                await super().__call__(*args)
            finally:
                on_close()

    headers = {"Cache-Control": "no-cache"}
    return ClosingResponse(events, media_type="text/event-stream", headers=headers)


def build_app(service: Service) -> "FastAPI":
    """Return the endpoints as an ASGI app."""
    require_fastapi()
    from fastapi import FastAPI
    from fastapi import Request as HTTPRequest
    from fastapi.responses import PlainTextResponse

    app = FastAPI(openapi_url=None)
    endpoints = Endpoints(service)

    @app.post("/v1/completions")
    async def completions(request: HTTPRequest):
        return await endpoints.respond(request, False)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: HTTPRequest):
        return await endpoints.respond(request, True)

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [endpoints.model]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str):
        if name == service.name:
            return endpoints.model
        return error_response(404, f"there is no model {name[:80]!r}; see /v1/models")

    @app.get("/health")
    async def health():
        return endpoints.health()

    @app.get("/metrics")
    async def metrics():
        return PlainTextResponse(service.metrics(), media_type="text/plain; version=0.0.4")

    return app


def require_fastapi() -> None:
    """Raise a `UserError` if FastAPI is not installed."""
    try:
        import fastapi  # noqa: F401
    except ImportError:
        raise UserError(INSTALL_HINT) from None


def make_api_server(app: "FastAPI", grace: float = 30.0) -> "uvicorn.Server":
    """Return a uvicorn server that finishes running requests after the first signal.

    It ends at once after the second signal or after `grace` seconds.
    """
    try:
        import uvicorn
    except ImportError:
        raise UserError(INSTALL_HINT) from None

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Install signal handlers; uvicorn's would end the process by the signal itself."""
            if threading.current_thread() is not threading.main_thread():
                yield
                return
            numbers = signal.SIGINT, signal.SIGTERM
            previous = [signal.signal(number, self.handle_exit) for number in numbers]
            try:
                yield
            finally:
                for number, handler in zip(numbers, previous):
                    signal.signal(number, handler)

    config = uvicorn.Config(
        app, ws="none", lifespan="off", access_log=False, log_level="critical",
        timeout_graceful_shutdown=int(grace) or None,
    )  # fmt: skip
    return Server(config)


def run_server(args: ServeConfig) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    validate_serve_config(args)
    require_fastapi()
    listener = bind_socket(args.host, args.port)
    with Service(args) as service:
        if not is_loopback(args.host):
            sentence = "warning: this server is reachable from the network without authentication"
            print(sentence, file=sys.stderr)
        host = f"[{args.host}]" if ":" in args.host else args.host
        port = listener.getsockname()[1]
        print(f"http://{host}:{port}/v1 serves {service.name}", flush=True)
        make_api_server(build_app(service), args.grace).run(sockets=[listener])
    counters = service.engine.counters
    print(
        f"generated {counters['generation_tokens']} tokens, "
        f"processed {counters['prompt_tokens']} prompt tokens",
        file=sys.stderr,
    )
