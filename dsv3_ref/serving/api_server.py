"""`dsv3 serve`: an OpenAI-compatible HTTP server around the engine of chapter 18."""

import asyncio
import gc
import json
import secrets
import socket
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar

from dsv3_ref.config import UserError
from dsv3_ref.serve import QueueFull
from dsv3_ref.serving.config import (
    API_KEY_VARIABLE,
    ServeConfig,
    api_keys,
    validate_serve_config,
)
from dsv3_ref.serving.fields import InvalidField, JSONObject
from dsv3_ref.serving.json_body import BodyBudget
from dsv3_ref.serving.network import (
    CACHE_SALT,
    ApiKeys,
    bind_socket,
    guard_app,
    host_rule,
    is_loopback,
)
from dsv3_ref.serving.openapi import describe_api
from dsv3_ref.serving.output_processor import REQUEST_FAILED, CompletionPiece, ServedRequest
from dsv3_ref.serving.protocol import (
    RELOAD,
    CompletionRequest,
    HTTPError,
    error_body,
    make_choice,
    response_head,
    stream_choices,
)
from dsv3_ref.serving.service import ENGINE_FAILED, Service
from dsv3_ref.serving.tool_calls import AnswerParser, AnswerPart

if TYPE_CHECKING:  # optional dependencies
    from fastapi import FastAPI
    from fastapi import Request as HTTPRequest
    from fastapi.responses import JSONResponse, Response, StreamingResponse
    from starlette.types import ASGIApp

    from dsv3_ref.serving.http_server import ApiServer, ConnectionLimits

Answer = TypeVar("Answer")

INSTALL_HINT = "dsv3 serve needs FastAPI and uvicorn: pip install -e '.[serve]'"
FAILURE_LINGER = 5.0  # seconds in which a failed server still answers /health
READABLE = ["GET", "HEAD"]  # load balancers ask with either


# ── HTTP ──


async def collect_response(
    service: Service, request: CompletionRequest, served: list[ServedRequest], head: JSONObject
) -> JSONObject:
    """Return the response to a request without streaming, once all completions have ended.

    Raises an `HTTPError` if the engine fails, or if every completion ends with an error.
    """
    parsers = {r: request.make_parser() for r in served}
    texts = dict.fromkeys(served, "")
    logprobs: dict[ServedRequest, list[JSONObject]] = {r: [] for r in served}
    finish_reasons = {}
    error = ""
    num_tokens = dict.fromkeys(served, 0)
    async for piece in service.stream_outputs(served):
        num_tokens[piece.request] += piece.num_tokens
        texts[piece.request] += piece.text
        logprobs[piece.request] += piece.logprobs
        finish_reasons[piece.request] = piece.finish_reason
        error = piece.error or error
    if set(finish_reasons.values()) == {"error"}:
        raise HTTPError(500, error)
    choices = []
    for i, r in enumerate(choose_best(request, num_tokens)):
        part = parsers[r].push(texts[r], is_last=True)
        finish_reason = parsers[r].finish_reason(finish_reasons[r])
        choices.append(make_choice(request, i, part, logprobs[r], finish_reason))
        if request.returns_token_ids:
            choices[-1]["token_ids"] = r.tokens[r.num_prompt_tokens :]
    usage = service.usage(request, served, sum(num_tokens.values()))
    return head | {"choices": choices, "usage": usage}


def choose_best(
    request: CompletionRequest, num_tokens: dict[ServedRequest, int]
) -> list[ServedRequest]:
    """Return the n completions of each prompt with the highest log-probability per token.

    num_tokens: of each completion, in the order of the prompts.
    """
    served = list(num_tokens)
    if request.best_of == request.n:
        return served

    def mean_logprob(r: ServedRequest) -> float:
        values = [value for value, _ in r.logprobs[: num_tokens[r]]]
        return sum(values) / max(1, len(values))

    best: list[ServedRequest] = []
    for start in range(0, len(served), request.best_of):
        group = served[start : start + request.best_of]
        best += sorted(group, key=mean_logprob, reverse=True)[: request.n]
    return best


async def sse_events(
    service: Service, request: CompletionRequest, served: list[ServedRequest], head: JSONObject
) -> AsyncIterator[str]:
    """Yield server-sent events: pieces of completions, the usage if requested, and [DONE].

    If every completion ends with an error, an error event takes the place of the last two.
    """
    parsers = {r: request.make_parser() for r in served}
    finish_reasons: dict[ServedRequest, str] = {}
    num_new_tokens = 0
    error = ""
    if request.include_usage:
        head = head | {"usage": None}
    if request.chat:
        for r in served:
            choice = make_choice(request, r.index, AnswerPart("", []), [], None)
            choice["delta"]["role"] = "assistant"
            yield format_event(head | {"choices": [choice]})
    try:
        async for piece in service.stream_outputs(served):
            r, error = piece.request, piece.error
            num_new_tokens += piece.num_tokens
            finish_reasons[r] = piece.finish_reason
            for choice in choices_of_piece(request, parsers[r], piece):
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


def choices_of_piece(
    request: CompletionRequest, parser: AnswerParser, piece: CompletionPiece
) -> list[JSONObject]:
    """Return the entries of `choices` of a stream for the next piece of a completion."""
    num_calls = parser.num_calls
    part = parser.push(piece.text, is_last=bool(piece.finish_reason))
    calls = [{"index": i, **call} for i, call in enumerate(part.calls, start=num_calls)]
    reason = parser.finish_reason(piece.finish_reason)
    index = piece.request.index
    return stream_choices(request, index, part._replace(calls=calls), piece.logprobs, reason)


def format_event(data: JSONObject) -> str:
    """Return a server-sent event, in ASCII: some clients split lines at U+2028 and U+0085."""
    return f"data: {json.dumps(data)}\n\n"


async def receive_body(
    request: "HTTPRequest", data: bytearray, max_bytes: int, budget: BodyBudget
) -> None:
    """Append the body of an HTTP request to `data`, and count it; raise an `HTTPError`.

    Raises `QueueFull` if it exceeds what is left of the budget. The content type must be JSON: a
    browser then refuses to send the request for a foreign page.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise HTTPError(415, f"the content encoding {encoding[:20]} is not supported: send JSON")
    if int(request.headers.get("content-length") or 0) > max_bytes:  # h11 has validated it
        raise HTTPError(413, f"the body must not exceed {max_bytes} bytes")
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise HTTPError(415, "the content type must be application/json")
    async for part in request.stream():
        budget.take(len(part), len(data) + len(part))
        data += part
        if len(data) > max_bytes:
            raise HTTPError(413, f"the body must not exceed {max_bytes} bytes")


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
            "max_model_len": service.limits.max_model_len,
        }

    async def respond(
        self, http_request: "HTTPRequest", answer: "Callable[[HTTPRequest], Awaitable[Response]]"
    ) -> "Response":
        """Return the answer to a request with a body, an error response if it is invalid."""
        try:
            response = await answer(http_request)
        except HTTPError as e:
            headers = {"Retry-After": "1"} if e.status == 503 else None
            response = error_response(e.status, str(e), headers, e.param, e.code)
        except InvalidField as e:
            response = error_response(400, str(e), None, e.name)
        except UserError as e:
            response = error_response(400, str(e))
        except QueueFull:
            message = "the server is at capacity and its queue is full: retry later"
            response = error_response(429, message, {"Retry-After": "1"})
        except client_disconnect():
            response = error_response(499, "the client has disconnected")
        except Exception:  # concerns this request only
            traceback.print_exc()
            response = error_response(500, REQUEST_FAILED)
        self.service.requests[response.status_code] += 1
        return response

    @asynccontextmanager
    async def body_of(self, http_request: "HTTPRequest") -> AsyncIterator[bytearray]:
        """Yield the body of a request, which counts in the budget until the end of the `with`."""
        service, data = self.service, bytearray()
        try:
            await receive_body(http_request, data, service.max_body_bytes, service.body_budget)
            yield data
        finally:
            service.body_budget.used -= len(data)

    async def read(self, http_request: "HTTPRequest", parse: Callable[[bytes], Answer]) -> Answer:
        """Return the body of a request, parsed outside the event loop; raise an `HTTPError`."""
        async with self.body_of(http_request) as data:
            parsed = self.service.tokenize_pool.run(len(data), lambda: parse(bytes(data)))
            values = await cancel_on_disconnect(http_request, parsed)
        if values is None:
            raise HTTPError(499, "the client has disconnected")
        return values

    async def tokenize(self, http_request: "HTTPRequest") -> "Response":
        """Return the tokens of a prompt or of a conversation."""
        return json_response(await self.read(http_request, self.service.tokenize), 200)

    async def detokenize(self, http_request: "HTTPRequest") -> "Response":
        """Return the text of tokens."""
        return json_response(await self.read(http_request, self.service.detokenize), 200)

    async def complete(self, http_request: "HTTPRequest", chat: bool) -> "Response":
        """Return a whole or streaming response; abort its engine requests if the client leaves."""
        service = self.service
        request = await self.read(http_request, partial(service.read_request, chat=chat))
        served = service.submit(request, http_request.scope.get(CACHE_SALT, b""))
        request_id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        head = response_head(request, request_id, service.name, service.fingerprint)
        if request.stream:
            events = sse_events(service, request, served, head)
            return stream_response(events, lambda: service.close(request, served))
        try:
            answer = collect_response(service, request, served, head)
            body = await cancel_on_disconnect(http_request, answer)
            return json_response(body, 200 if body else 499)
        finally:
            service.close(request, served)

    async def update_weights(self, http_request: "HTTPRequest") -> "Response":
        """Load other weights into the running model."""
        values = await self.read(http_request, partial(self.service.read_values, path=RELOAD))
        return json_response(await self.service.update_weights(values), 200)

    def health(self) -> "Response":
        """Return whether the server is ready (status 200), draining or failed (status 503)."""
        status = self.service.status
        return json_response({"status": status}, 200 if status == "ready" else 503)

    def find_model(self, name: str) -> "Response":
        """Return the description of the model of this name, or an error."""
        if name == self.service.name:
            return json_response(self.model, 200)
        e = self.service.unknown_model(name)
        return error_response(e.status, str(e), None, e.param, e.code)


def client_disconnect() -> type[Exception]:
    """Return the exception that reading a body raises if the client disconnects."""
    from starlette.requests import ClientDisconnect

    return ClientDisconnect


def json_response(
    body: JSONObject | None, status: int, headers: Mapping[str, str] | None = None
) -> "JSONResponse":
    """Return an HTTP response with a JSON body."""
    from fastapi.responses import JSONResponse

    return JSONResponse(body, status, headers)


def error_response(
    status: int, message: str, headers: Mapping[str, str] | None = None, param: str | None = None,
    code: str | None = None,
) -> "JSONResponse":  # fmt: skip
    """Return an HTTP response that describes an error in OpenAI's format."""
    return json_response(error_body(message, status, param, code), status, headers)


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

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # a proxy must not wait
    return ClosingResponse(events, media_type="text/event-stream", headers=headers)


def build_app(service: Service) -> "FastAPI":
    """Return the endpoints as an ASGI app."""
    require_fastapi()
    from fastapi import FastAPI
    from fastapi import Request as HTTPRequest

    app = FastAPI(openapi_url=None)
    describe_errors(app)
    endpoints = Endpoints(service)

    @app.post("/v1/completions")
    async def completions(request: HTTPRequest):
        return await endpoints.respond(request, partial(endpoints.complete, chat=False))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: HTTPRequest):
        return await endpoints.respond(request, partial(endpoints.complete, chat=True))

    @app.api_route("/v1/models", methods=READABLE)
    @app.api_route("/v1/models/", methods=READABLE)
    async def models():
        return {"object": "list", "data": [endpoints.model]}

    @app.api_route("/v1/models/{name:path}", methods=READABLE)
    async def model(name: str):
        return endpoints.find_model(name)

    add_token_routes(app, endpoints)
    if service.args.reload_root:

        @app.post(RELOAD)
        async def update_weights(request: HTTPRequest):
            return await endpoints.respond(request, endpoints.update_weights)

    add_status_routes(app, endpoints)
    return app


def add_token_routes(app: "FastAPI", endpoints: Endpoints) -> None:
    """Add vLLM's endpoints between text and tokens."""
    from fastapi import Request as HTTPRequest

    @app.post("/tokenize")
    async def tokenize(request: HTTPRequest):
        return await endpoints.respond(request, endpoints.tokenize)

    @app.post("/detokenize")
    async def detokenize(request: HTTPRequest):
        return await endpoints.respond(request, endpoints.detokenize)


def add_status_routes(app: "FastAPI", endpoints: Endpoints) -> None:
    """Add what load balancers, Prometheus and generators of clients ask for."""
    from fastapi.responses import PlainTextResponse

    service = endpoints.service

    @app.api_route("/", methods=READABLE)
    @app.api_route("/health", methods=READABLE)
    async def health():
        return endpoints.health()

    @app.api_route("/metrics", methods=READABLE)
    async def metrics():
        return PlainTextResponse(service.metrics(), media_type="text/plain; version=0.0.4")

    @app.api_route("/openapi.json", methods=READABLE)
    async def openapi():
        return json_response(describe_api(service.fields, service.max_body_bytes), 200)


def describe_errors(app: "FastAPI") -> None:
    """Give errors of the framework itself, such as an unknown path, OpenAI's format."""
    from starlette.exceptions import HTTPException

    @app.exception_handler(HTTPException)
    async def respond(request: "HTTPRequest", e: HTTPException) -> "Response":
        phrase = HTTPStatus(e.status_code).phrase.lower()
        message = f"{request.method} {request.url.path[:80]}: {phrase}; see /openapi.json"
        return error_response(e.status_code, message, e.headers)


def allow_origins(app: "ASGIApp", origins: Sequence[str]) -> "ASGIApp":
    """Return an app that lets web pages of these origins use it (CORS); those of others may not.

    A browser asks without an API key whether a page may send one, and hides errors from pages
    that may not read them. So this comes before the check of keys.
    """
    from starlette.middleware.cors import CORSMiddleware

    if not origins:
        return app
    return CORSMiddleware(
        app, allow_origins=origins, allow_methods=["GET", "POST"],
        allow_headers=["*"],  # OpenAI's JavaScript client has many of its own
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
    guarded = allow_origins(guarded, service.args.allowed_origins)
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


def collect_garbage_rarely() -> None:
    """Leave out of garbage collection what has been made so far; collect the rest less often.

    A long list of log-probabilities otherwise costs more time in collections than in itself.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


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
        collect_garbage_rarely()
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
