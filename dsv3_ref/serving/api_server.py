"""`dsv3 serve`: an OpenAI-compatible HTTP server around the engine of chapter 18."""

import asyncio
import json
import secrets
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from tokenizers import Tokenizer

from dsv3_ref.checkpoints.native import find_tokenizer_dir, load
from dsv3_ref.config import UserError
from dsv3_ref.data.tokenizer import load_tokenizer
from dsv3_ref.decode import SamplingParams
from dsv3_ref.model import Transformer
from dsv3_ref.posttraining.policy import Policy
from dsv3_ref.serve import QueueFull
from dsv3_ref.serving.config import (
    API_KEY_VARIABLE,
    ServeConfig,
    api_keys,
    build_engine,
    validate_serve_config,
)
from dsv3_ref.serving.engine_thread import EngineThread
from dsv3_ref.serving.network import (
    CACHE_SALT,
    ApiKeys,
    bind_socket,
    guard_app,
    host_rule,
    is_loopback,
)
from dsv3_ref.serving.output_processor import REQUEST_FAILED, CompletionPiece, ServedRequest
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
from dsv3_ref.serving.tokenize_pool import TokenizePool
from dsv3_ref.sft import render_conversation
from dsv3_ref.training.strategy import pick_device

if TYPE_CHECKING:  # optional dependencies
    from fastapi import FastAPI
    from fastapi import Request as HTTPRequest
    from fastapi.responses import JSONResponse, Response, StreamingResponse

    from dsv3_ref.serving.http_server import ApiServer, ConnectionLimits

Answer = TypeVar("Answer")

INSTALL_HINT = "dsv3 serve needs FastAPI and uvicorn: pip install -e '.[serve]'"
ENGINE_FAILED = "the engine has failed and this server is about to end; see its log"
DRAINING = "the server is shutting down: retry later"
FAILURE_LINGER = 5.0  # seconds in which a failed server still answers /health
STOP_SECONDS = 5.0  # that a step of the engine may take to end
MAX_BODY_BYTES = 4 << 20
MAX_SEED = (1 << 63) - 1


# ── The service ──


class Service:
    """A model with its tokenizer, its engine thread and its prefill workers."""

    def __init__(
        self, args: ServeConfig, model: Transformer | None = None,
        tokenizer: Tokenizer | None = None,
    ):  # fmt: skip
        validate_serve_config(args)
        self.args = args
        self.created = int(time.time())
        model = model or load(args.model, verify=args.verify).to(pick_device(args.device)).eval()
        self.tokenizer = tokenizer or load_tokenizer(find_tokenizer_dir(args.model))
        self.policy = Policy(model, self.tokenizer)
        self.special_tokens = self.policy.special_tokens
        self.name = args.served_model_name or args.model.resolve().name
        self.engine = build_engine(model, args)
        self.engine_thread = EngineThread(self.engine, self.tokenizer, self.special_tokens.eos)
        max_len = self.engine.scheduler.max_model_len
        self.tokenize_pool = TokenizePool(self.tokenizer, max_len, args.max_queue)
        self.max_body_bytes = self.tokenize_pool.max_body_bytes(args.max_n, MAX_BODY_BYTES)
        self.is_draining = False
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
        self.tokenize_pool.stop()
        self.engine_thread.stop(STOP_SECONDS)
        for worker in self.engine_thread.prefill_workers:
            worker.stop()

    @property
    def status(self) -> str:
        """The state of the server: ready, draining (it accepts no new requests) or failed."""
        if self.has_failed():
            return "failed"
        return "draining" if self.is_draining else "ready"

    def has_failed(self) -> bool:
        """Return whether the engine or what processes its outputs has failed."""
        thread = self.engine_thread
        return thread.failed or not (thread.is_alive() and thread.processor.is_alive())

    def drain(self) -> None:
        """Accept no new requests from now on."""
        self.is_draining = True

    # From the body of an HTTP request to requests to the engine

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, in which special tokens are treated as plain text.

        The fast form computes no offsets, and lets other threads run throughout.
        """
        return self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def encode_prompts(self, body: JSONObject, chat: bool) -> list[list[int]]:
        """Return the token ids of every prompt; text cannot produce a special token."""
        if chat:
            turns = flatten_content(body.get("messages"))
            return [render_conversation(turns, self.encode, self.special_tokens)]
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

    def check_prompt_length(self, body: JSONObject, chat: bool) -> int:
        """Return the bytes of all prompts; raise a `UserError` if one cannot fit.

        Takes no longer than to read the body: its structure is validated later.
        """
        texts = body.get("messages") if chat else body.get("prompt")
        parts = texts if isinstance(texts, list) else [texts]
        longest = max(len(part) for part in (parts, *parts) if isinstance(part, list))
        if longest > max(self.args.max_n, self.tokenize_pool.max_tokens):
            raise UserError(
                f"a list of {longest} messages, prompts or token ids cannot fit: it exceeds the "
                f"limit of {self.tokenize_pool.max_tokens} tokens"
            )
        if chat:
            contents = [part.get("content") for part in parts if isinstance(part, dict)]
            sizes = [sum(map(num_text_bytes, contents))]
        else:
            sizes = [num_text_bytes(part) for part in parts]
        for size in sizes:
            self.tokenize_pool.check_length(size)
        return sum(sizes)

    async def parse_request(self, body: JSONObject, chat: bool) -> CompletionRequest:
        """Validate the body of an HTTP request; raise a `UserError` or an `HTTPError`."""
        if not isinstance(body, dict):
            raise UserError("the body must be a JSON object")
        if body.get("model", self.name) != self.name:
            model = str(body["model"])[:80]
            raise HTTPError(404, f"there is no model {model!r}; this server serves {self.name!r}")
        reject_unknown(body)
        num_bytes = self.check_prompt_length(body, chat)
        options = body.get("stream_options") or {}
        max_len = self.engine.scheduler.max_model_len
        is_new_name = "max_completion_tokens" in body
        max_tokens_name = "max_completion_tokens" if is_new_name else "max_tokens"
        seed = secrets.randbits(62) if self.args.seed is None else self.args.seed
        request = CompletionRequest(
            prompts=[],
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
        prompts = await self.tokenize_pool.run(num_bytes, partial(self.encode_prompts, body, chat))
        return replace(request, prompts=prompts)

    def submit(self, request: CompletionRequest, cache_salt: bytes = b"") -> list[ServedRequest]:
        """Queue one engine request per completion and return them.

        Raises a `UserError` for too many completions, an `HTTPError` if the engine has failed or
        the server is draining, and what `Scheduler.submit` raises.
        """
        total = request.n * len(request.prompts)
        if total > self.args.max_n:
            raise UserError(
                f"{total} completions are more than the {self.args.max_n} allowed per request: "
                "lower n or send fewer prompts"
            )
        if self.is_draining:
            raise HTTPError(503, DRAINING)
        sink: asyncio.Queue[CompletionPiece] = asyncio.Queue()
        served = [
            self.make_served_request(request, index, sink, cache_salt)
            for index in range(request.n * len(request.prompts))
        ]
        self.engine_thread.submit(served)
        if self.has_failed():  # checked after `submit`: a failing engine ends what it sees
            raise HTTPError(503, ENGINE_FAILED)
        return served

    def make_served_request(
        self, request: CompletionRequest, index: int, sink: asyncio.Queue[CompletionPiece],
        cache_salt: bytes,
    ) -> ServedRequest:  # fmt: skip
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
            cache_salt=cache_salt,
            index=index,
            sink=sink,
            text=StreamDetokenizer(self.tokenizer, request.stop),
        )

    # From engine outputs to text

    async def stream_outputs(self, served: list[ServedRequest]) -> AsyncIterator[CompletionPiece]:
        """Yield the pieces of all completions as they come, until all have ended.

        Raises an `HTTPError` if the engine fails.
        """
        num_running = len(served)
        while num_running:
            piece = await served[0].sink.get()
            if piece.finish_reason in ("failed", "abort"):
                raise HTTPError(503, ENGINE_FAILED)
            num_running -= bool(piece.finish_reason)
            yield piece

    def usage(
        self, request: CompletionRequest, served: list[ServedRequest], num_new_tokens: int
    ) -> JSONObject:
        """Return the token counts of an HTTP request.

        What was found in the cache tells of other requests, so it is reported only if that is on.
        """
        num_prompt_tokens = sum(map(len, request.prompts))
        counts: JSONObject = {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_new_tokens,
            "total_tokens": num_prompt_tokens + num_new_tokens,
        }
        if self.args.report_cached_tokens:
            num_cached_tokens = sum(r.num_cached_tokens for r in served[:: request.n])
            counts["prompt_tokens_details"] = {"cached_tokens": num_cached_tokens}
        return counts

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
    """Return the response to a request without streaming, once all completions have ended.

    Raises an `HTTPError` if the engine fails, or if every completion ends with an error.
    """
    texts = dict.fromkeys(served, "")
    logprobs: dict[ServedRequest, list[JSONObject]] = {r: [] for r in served}
    finish_reasons = {}
    error = ""
    num_tokens = 0
    async for piece in service.stream_outputs(served):
        num_tokens += piece.num_tokens
        texts[piece.request] += piece.text
        logprobs[piece.request] += piece.logprobs
        finish_reasons[piece.request] = piece.finish_reason
        error = piece.error or error
    if set(finish_reasons.values()) == {"error"}:
        raise HTTPError(500, error)
    choices = [
        make_choice(request, r.index, texts[r], logprobs[r], finish_reasons[r]) for r in served
    ]
    return head | {"choices": choices, "usage": service.usage(request, served, num_tokens)}


async def sse_events(
    service: Service, request: CompletionRequest, served: list[ServedRequest], head: JSONObject
) -> AsyncIterator[str]:
    """Yield server-sent events: pieces of completions, the usage if requested, and [DONE].

    If every completion ends with an error, an error event takes the place of the last two.
    """
    finish_reasons: dict[ServedRequest, str] = {}
    num_new_tokens = 0
    error = ""
    if request.chat:
        for r in served:
            choice = make_choice(request, r.index, "", [], None)
            choice["delta"]["role"] = "assistant"
            yield format_event(head | {"choices": [choice]})
    try:
        async for piece in service.stream_outputs(served):
            r, text, logprobs, finish_reason, num_tokens, error = piece
            num_new_tokens += num_tokens
            finish_reasons[r] = finish_reason
            if text or finish_reason or (logprobs and request.num_logprobs >= 0):
                choice = make_choice(request, r.index, text, logprobs, finish_reason)
                yield format_event(head | {"choices": [choice]})
    except HTTPError as e:
        yield format_event(error_body(str(e), e.status))
        return
    if set(finish_reasons.values()) == {"error"}:
        yield format_event(error_body(error, 500))
        return
    if request.include_usage:
        usage = service.usage(request, served, num_new_tokens)
        yield format_event(head | {"choices": [], "usage": usage})
    yield "data: [DONE]\n\n"


def format_event(data: JSONObject) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def read_json_body(request: "HTTPRequest", max_bytes: int = MAX_BODY_BYTES) -> JSONObject:
    """Return the decoded body of an HTTP request; raise an `HTTPError` or a `UserError`.

    The content type must be JSON: a browser then refuses to send the request for a foreign page.
    """
    if int(request.headers.get("content-length") or 0) > max_bytes:  # h11 has validated it
        raise HTTPError(413, f"the body must not exceed {max_bytes} bytes")
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise HTTPError(415, "the content type must be application/json")
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > max_bytes:
            raise HTTPError(413, f"the body must not exceed {max_bytes} bytes")
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
            headers = {"Retry-After": "1"} if e.status == 503 else None
            response = error_response(e.status, str(e), headers)
        except client_disconnect():
            response = error_response(499, "the client has disconnected")
        except Exception:  # concerns this request only
            traceback.print_exc()
            response = error_response(500, REQUEST_FAILED)
        self.service.requests[response.status_code] += 1
        return response

    async def complete(self, http_request: "HTTPRequest", chat: bool) -> "Response":
        """Return a whole or streaming response; abort its engine requests if the client leaves."""
        service = self.service
        parsing = service.parse_request(
            await read_json_body(http_request, service.max_body_bytes), chat
        )
        request = await cancel_on_disconnect(http_request, parsing)
        if request is None:
            raise HTTPError(499, "the client has disconnected")
        served = service.submit(request, http_request.scope.get(CACHE_SALT, b""))
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
        """Return whether the server is ready (status 200), draining or failed (status 503)."""
        status = self.service.status
        return json_response({"status": status}, 200 if status == "ready" else 503)


def num_text_bytes(value: object) -> int:
    """Return the bytes of a prompt or of a message's content, as far as it is text."""
    parts = value if isinstance(value, list) else [{"text": value}]
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return sum(len(text.encode(errors="replace")) for text in texts if isinstance(text, str))


def client_disconnect() -> type[Exception]:
    """Return the exception that reading a body raises if the client disconnects."""
    from starlette.requests import ClientDisconnect

    return ClientDisconnect


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
    allow_origins(app, service.args.allowed_origins)
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


def allow_origins(app: "FastAPI", origins: Sequence[str]) -> None:
    """Let web pages of these origins use the API (CORS); those of others may not."""
    from fastapi.middleware.cors import CORSMiddleware

    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )  # fmt: skip


def require_fastapi() -> None:
    """Raise a `UserError` if FastAPI is not installed."""
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise UserError(INSTALL_HINT) from None


def make_api_server(
    service: Service, listener: socket.socket, limits: "ConnectionLimits | None" = None
) -> "ApiServer":
    """Return an HTTP server for a service, with limits on who may use it and how long."""
    app = build_app(service)
    from dsv3_ref.serving.http_server import ApiServer, ConnectionLimits

    keys = ApiKeys(api_keys(service.args))
    guarded = guard_app(app, host_rule(listener, service.args.allowed_hosts), keys)
    limits = limits or ConnectionLimits(service.args.max_connections)
    grace = service.args.grace
    return ApiServer(guarded, limits, grace, service.drain, service.has_failed, FAILURE_LINGER)


def check_exposure(args: ServeConfig, listener: socket.socket) -> None:
    """Raise a `UserError` if anybody on the network could use the server without a key."""
    address = listener.getsockname()[0]
    if is_loopback(address) or api_keys(args):
        return
    if not args.allow_unauthenticated:
        listener.close()
        raise UserError(
            f"--host {args.host} makes the server reachable from the network: set an API key "
            f"(--api-key or {API_KEY_VARIABLE}), or confirm with --allow-unauthenticated"
        )
    sentence = "warning: this server is reachable from the network without authentication"
    print(sentence, file=sys.stderr)


def run_server(args: ServeConfig) -> None:
    """Serve until Ctrl-C or SIGTERM; exit with code 1 if the engine fails."""
    validate_serve_config(args)
    require_fastapi()
    listener = bind_socket(args.host, args.port)
    check_exposure(args, listener)
    with Service(args) as service:
        host = f"[{args.host}]" if ":" in args.host else args.host
        port = listener.getsockname()[1]
        server = make_api_server(service, listener)
        print(f"http://{host}:{port}/v1 serves {service.name}", flush=True)
        server.run(sockets=[listener])
        has_failed = service.has_failed()
    counters = service.engine.counters
    print(
        f"generated {counters['generation_tokens']} tokens, "
        f"processed {counters['prompt_tokens']} prompt tokens",
        file=sys.stderr,
    )
    if has_failed:
        print(f"error: {ENGINE_FAILED}", file=sys.stderr)
        raise SystemExit(1)
