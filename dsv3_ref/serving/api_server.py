"""`dsv3 serve`: many talks at once behind OpenAI's protocol. Clock, sockets and processes."""

import asyncio
import json
import secrets
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch

from dsv3_ref.checkpoints.native import find_tokenizer_dir, load
from dsv3_ref.config import UserError
from dsv3_ref.data.tokenizer import load_tokenizer
from dsv3_ref.decode import SamplingParams
from dsv3_ref.posttraining.policy import Policy
from dsv3_ref.serve import Engine, QueueFull, Request
from dsv3_ref.serving.config import ServeConfig, build_engine, validate_serve_config
from dsv3_ref.serving.text_generator import StreamDetokenizer
from dsv3_ref.serving.prefill import PrefillWorker, dispatch_prefill
from dsv3_ref.serving.protocol import (
    CompletionRequest,
    HTTPError,
    error_body,
    flatten_content,
    is_token_ids,
    make_choice,
    parse_flag,
    parse_logprobs,
    parse_number,
    parse_stop,
    reject_unknown,
    response_head,
)  # fmt: skip
from dsv3_ref.serving.web import bind_socket, is_loopback
from dsv3_ref.training.strategy import pick_device

INSTALL_HINT = "dsv3 serve needs FastAPI and uvicorn: pip install -e '.[serve]'"
MAX_BODY_BYTES = 4 << 20  # bytes of a request, at most
HISTOGRAM_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


# ── Numbers for Prometheus ──


class Histogram:
    """How often a time was at most so long."""

    def __init__(self):
        self.counts, self.sum = [0] * (len(HISTOGRAM_BOUNDS) + 1), 0.0

    def observe(self, seconds: float) -> None:
        self.counts[sum(seconds > s for s in HISTOGRAM_BOUNDS)] += 1
        self.sum += seconds

    def exposition(self, name: str):
        total = 0
        for bound, n in zip([*HISTOGRAM_BOUNDS, "+Inf"], self.counts):
            total += n
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self.sum:.6f}"
        yield f"{name}_count {total}"


# ── The engine's thread ──


@dataclass(eq=False)
class ServedRequest(Request):
    """A row that somebody waits for."""

    index: int = 0  # among the answers of its request
    sink: asyncio.Queue | None = None  # (call, new tokens, why it ended or "")
    arrival_time: float = 0.0
    last_token_time: float = 0.0  # when its newest token was written
    num_delivered: int = 0  # tokens that its text is made of
    hit_stop_text: bool = False  # by one of its own stop texts


class EngineThread(threading.Thread):
    """Steps while there is work; rows come in from any thread, tokens go to the event loop."""

    def __init__(self, engine: Engine):
        super().__init__(daemon=True)
        self.engine, self.wake, self.stopped, self.failed = engine, threading.Event(), False, False
        self.loop: asyncio.AbstractEventLoop | None = None
        self.finish_reasons: Counter = Counter()
        self.time_to_first_token, self.inter_token_latency = Histogram(), Histogram()
        self.prefill_workers: list[PrefillWorker] = []

    def submit(self, calls: list[ServedRequest]) -> None:
        """Queue rows, all or none."""
        self.loop = asyncio.get_running_loop()
        for call in calls:
            call.arrival_time = time.monotonic()
        self.engine.submit(*calls)
        self.wake.set()

    def abort(self, calls: list[ServedRequest]) -> None:
        """Nobody waits for these any more; whatever they hold is freed before the next step."""
        for call in calls:
            call.aborted = True
        self.wake.set()

    def call_between_steps(self, fn, forget: bool = False):
        """Run fn(model) when no step is running, in this process; a future of its result."""
        future = self.engine.call_between_steps(fn, forget)
        self.wake.set()
        return future

    def busy(self) -> bool:
        """Whether a step would do something."""
        e = self.engine
        alive = any(not row.remote_prefill or row.aborted for row in e.scheduler.running)
        return bool(e.scheduler.waiting or e.pending_callbacks or e.incoming_transfers or alive)

    def run(self) -> None:
        while not self.stopped:
            if not self.busy():
                self.wake.wait()
            self.wake.clear()
            try:
                out = self.engine.step()
            except Exception:  # what the engine holds can no longer be trusted
                traceback.print_exc()
                self.failed = self.stopped = True
                out = [
                    (row, [])
                    for row in [*self.engine.scheduler.running, *self.engine.scheduler.waiting]
                ]
                for row, _ in out:
                    row.finish_reason = "failed"
            self.deliver(out)

    def deliver(self, out: list[tuple[Request, list[int]]]) -> None:
        """Note the times, and hand new tokens over, all of a step at once."""
        now, told = time.monotonic(), []
        for call, tokens in out:
            if tokens:
                if not call.last_token_time:
                    self.time_to_first_token.observe(now - call.arrival_time)
                for _ in tokens if call.last_token_time else tokens[1:]:
                    self.inter_token_latency.observe(
                        (now - (call.last_token_time or now)) / len(tokens)
                    )
                call.last_token_time = now
            if call.finish_reason:
                self.finish_reasons["stop" if call.hit_stop_text else call.finish_reason] += 1
                for reader in self.prefill_workers:
                    reader.cancel(call)
            told.append((call, tokens, call.finish_reason))
        if told:
            with suppress(RuntimeError):  # the loop is closed: nobody listens
                self.loop.call_soon_threadsafe(deliver_outputs, told)

    def stop(self) -> None:
        """After the running step."""
        self.stopped = True
        self.wake.set()
        self.join()


def deliver_outputs(told) -> None:
    """Each to its own sink; on the event loop."""
    for call, *rest in told:
        call.sink.put_nowait((call, *rest))


# ── The service ──


class Service:
    """A model, its engine at work, and the app that clients reach."""

    def __init__(self, args: ServeConfig, model=None, tokenizer=None):
        validate_serve_config(args)
        self.args, self.born = args, int(time.time())
        model = model or load(args.model).to(pick_device(args.device)).eval()
        tokenizer = tokenizer or load_tokenizer(find_tokenizer_dir(args.model))
        self.policy = Policy(model, tokenizer)
        self.tokenizer, self.special_tokens = tokenizer, self.policy.special_tokens
        self.name = args.served_model_name or args.model.resolve().name
        self.engine, self.requests = build_engine(model, args), Counter()
        self.engine_thread = EngineThread(self.engine)

    def __enter__(self) -> "Service":
        workers = self.args.prefill_workers
        threads = max(1, torch.get_num_threads() // (1 + workers))
        readers = self.engine_thread.prefill_workers
        if workers:
            readers += [
                PrefillWorker(self.args, self.engine_thread, threads) for _ in range(workers)
            ]
            torch.set_num_threads(threads)
            for reader in readers:
                reader.wait_until_ready()
            self.engine.send_remote = lambda row: dispatch_prefill(readers, row)
        self.engine_thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.engine_thread.stop()
        for reader in self.engine_thread.prefill_workers:
            reader.stop()

    # From a body to rows

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_prompts(self, body: dict, chat: bool) -> list[list[int]]:
        """Tokens of every prompt; text cannot spell a special token."""
        if chat:
            return [self.policy.encode_prompt(flatten_content(body.get("messages")))]
        x = body.get("prompt", "")
        x = [x] if isinstance(x, str) or (x and isinstance(x, list) and is_token_ids(x)) else x
        if not isinstance(x, list) or not x or len(x) > self.args.max_n:
            raise UserError(f"prompt must be a text, or a list of 1 to {self.args.max_n} texts")
        out, w = [], self.engine.runner.model.config.vocab_size
        for prompt in x:
            if isinstance(prompt, str):
                out.append([self.special_tokens.bos, *self.encode(prompt)])
            elif (
                isinstance(prompt, list)
                and is_token_ids(prompt)
                and all(0 <= t < w for t in prompt)
            ):
                out.append(prompt)
            else:
                raise UserError(f"a prompt is a text or a list of token numbers below {w}")
        return out

    def parse_request(self, body: dict, chat: bool) -> CompletionRequest:
        """The request, checked."""
        if not isinstance(body, dict):
            raise UserError("the body must be a JSON object")
        if body.get("model", self.name) != self.name:
            raise HTTPError(
                404, f"there is no model {str(body['model'])[:80]!r}, only {self.name!r}"
            )
        reject_unknown(body)
        options = body.get("stream_options") or {}
        most = self.engine.scheduler.max_model_len
        long = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
        seed = secrets.randbits(62) if self.args.seed is None else self.args.seed
        return CompletionRequest(
            self.encode_prompts(body, chat), chat, parse_number(body, "n", 1, 1, self.args.max_n),
            parse_number(body, long, None, 1, most), parse_number(body, "temperature", 1.0, 0, 2, float),
            parse_number(body, "top_p", 1.0, 1e-6, 1, float),
            parse_number(body, "seed", seed, -(2**63), 2**63 - 1), parse_stop(body), parse_flag(body, "stream"),
            isinstance(options, dict) and parse_flag(options, "include_usage"), parse_logprobs(body, chat),
        )  # fmt: skip

    def submit(self, ask: CompletionRequest) -> list[ServedRequest]:
        """A row for every answer, queued; raises what `submit` raises."""
        if (total := ask.n * len(ask.prompts)) > self.args.max_n:
            raise UserError(f"{total} answers are more than the {self.args.max_n} of one request")
        sink, calls, device = asyncio.Queue(), [], self.engine.runner.device
        for prompt in ask.prompts:
            room = max(
                1, min(self.args.max_new_tokens, self.engine.scheduler.max_model_len - len(prompt))
            )
            for _ in range(ask.n):
                seed = (ask.seed + len(calls)) % (1 << 63)
                choice = SamplingParams(
                    ask.temperature, ask.top_p, torch.Generator(device).manual_seed(seed)
                )
                eos = frozenset({self.special_tokens.eos})
                new = ask.max_tokens or room
                calls.append(
                    ServedRequest(
                        list(prompt),
                        new,
                        choice,
                        eos,
                        ask.num_logprobs,
                        index=len(calls),
                        sink=sink,
                    )
                )
        if self.engine_thread.failed:
            raise HTTPError(503, "the engine has failed; see the server's log")
        self.engine_thread.submit(calls)
        return calls

    # From rows to text

    async def stream_outputs(
        self, ask: CompletionRequest, calls: list[ServedRequest]
    ) -> AsyncIterator[tuple]:
        """(call, text that became certain, log-probabilities, why it ended or "") as they come."""
        texts = {call: StreamDetokenizer(self.tokenizer, ask.stop) for call in calls}
        sink = calls[0].sink
        while texts:
            call, tokens, ended = await sink.get()
            if (text := texts.get(call)) is None:  # its stop text came in the step before
                continue
            if ended in ("failed", "abort"):
                raise HTTPError(503, "the engine has failed; see the server's log")
            noted = call.logprobs[call.num_delivered : call.num_delivered + len(tokens)]
            call.num_delivered += len(tokens)
            said = [t for t in tokens if t != self.special_tokens.eos]
            piece = text.push(said)
            if text.ended:
                ended, call.hit_stop_text = "stop", True
                self.engine_thread.abort([call])
            elif ended:
                piece += text.flush()
            if ended:
                del texts[call]
            yield call, piece, self.describe_logprobs(said, noted, ask.chat), ended

    def describe_logprobs(self, tokens: list[int], logp: list, chat: bool) -> list[dict]:
        """Log-probabilities of tokens as clients read them."""
        word = lambda t: self.tokenizer.decode([t], skip_special_tokens=False)
        one = lambda t, x: {"token": word(t), "logprob": x, "bytes": list(word(t).encode())}
        return [
            one(t, x) | {"top_logprobs": [one(*pair) for pair in best]}
            for t, (x, best) in zip(tokens, logp)
        ]

    def usage(self, ask: CompletionRequest, calls: list[ServedRequest]) -> dict:
        read, said = sum(map(len, ask.prompts)), sum(call.num_delivered for call in calls)
        hits = sum(call.num_cached_tokens for call in calls[:: ask.n])
        return {
            "prompt_tokens": read, "completion_tokens": said, "total_tokens": read + said,
            "prompt_tokens_details": {"cached_tokens": hits},
        }  # fmt: skip

    def metrics(self) -> str:
        """What Prometheus reads."""
        e, lines = self.engine, []
        gauges = {
            "num_requests_running": len(e.scheduler.running), "num_requests_waiting": len(e.scheduler.waiting), "kv_blocks": e.scheduler.block_pool.num_blocks,
            "kv_blocks_used": e.scheduler.block_pool.num_used, "kv_blocks_evictable": len(e.scheduler.block_pool.evictable),
            "prefill_workers": sum(r.alive for r in self.engine_thread.prefill_workers),
        }  # fmt: skip
        counters = {
            "prompt_tokens": e.counters["prompt_tokens"], "prefix_cache_hit_tokens": e.counters["prefix_cache_hits"],
            "generation_tokens": e.counters["generation_tokens"], "steps": e.counters["steps"],
            "preemptions": e.counters["preemptions"], "spec_decode_draft_tokens": e.counters["draft_tokens"],
            "spec_decode_accepted_tokens": e.counters["accepted_tokens"],
        }  # fmt: skip
        for kind, found, end in (("gauge", gauges, ""), ("counter", counters, "_total")):
            for name, value in found.items():
                lines += [f"# TYPE dsv3_{name}{end} {kind}", f"dsv3_{name}{end} {value}"]
        for name, label, found in (
            ("requests", "status", self.requests), ("completions", "finish_reason", self.engine_thread.finish_reasons)
        ):  # fmt: skip
            lines.append(f"# TYPE dsv3_{name}_total counter")
            lines += [f'dsv3_{name}_total{{{label}="{k}"}} {n}' for k, n in found.items()]
        for name, x in (
            ("time_to_first_token", self.engine_thread.time_to_first_token),
            ("inter_token_latency", self.engine_thread.inter_token_latency),
        ):
            lines += [
                f"# TYPE dsv3_{name}_seconds histogram",
                *x.exposition(f"dsv3_{name}_seconds"),
            ]
        return "\n".join(lines) + "\n"


# ── HTTP ──


async def collect_response(
    service: Service, ask: CompletionRequest, calls: list[ServedRequest], head: dict
) -> dict:
    """All answers of a request."""
    texts, noted, why = dict.fromkeys(calls, ""), {c: [] for c in calls}, {}
    async for call, piece, new, ended in service.stream_outputs(ask, calls):
        texts[call] += piece
        noted[call] += new
        why[call] = ended
    choices = [make_choice(ask, c.index, texts[c], noted[c], why[c]) for c in calls]
    return head | {"choices": choices, "usage": service.usage(ask, calls)}


async def sse_events(
    service: Service, ask: CompletionRequest, calls: list[ServedRequest], head: dict
):
    """Server-sent events: pieces as they come, the usage if asked for, and [DONE]."""
    line = lambda x: f"data: {json.dumps(x, ensure_ascii=False)}\n\n"
    if ask.chat:
        for call in calls:
            start = make_choice(ask, call.index, "", [], None)
            start["delta"]["role"] = "assistant"
            yield line(head | {"choices": [start]})
    try:
        async for call, piece, noted, ended in service.stream_outputs(ask, calls):
            if piece or ended or (noted and ask.num_logprobs >= 0):
                yield line(head | {"choices": [make_choice(ask, call.index, piece, noted, ended)]})
    except HTTPError as e:
        yield line(error_body(str(e), e.status))
        return
    if ask.include_usage:
        yield line(head | {"choices": [], "usage": service.usage(ask, calls)})
    yield "data: [DONE]\n\n"


async def read_json_body(request) -> dict:
    """The JSON of a request. Only pages that may ask this server can send this content type."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPError(415, "the content type must be application/json")
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY_BYTES:
            raise HTTPError(413, f"the request has more than {MAX_BODY_BYTES} bytes")
    try:
        body = json.loads(data)
        json.dumps(body, ensure_ascii=False).encode()  # halves of characters cannot be encoded
        return body
    except (ValueError, RecursionError):
        raise UserError("the body is not JSON in UTF-8") from None


async def wait_disconnect(request) -> None:
    """Returns when the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def cancel_on_disconnect(request, answer):
    """An answer, or None if the client goes away before."""
    tasks = [asyncio.ensure_future(x) for x in (answer, wait_disconnect(request))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()


class Endpoints:
    """What can be asked of a service over HTTP."""

    def __init__(self, service: Service):
        self.service, (_, self.responses) = service, import_fastapi()
        model = {"object": "model", "created": service.born, "owned_by": "dsv3"}
        self.model = {"id": service.name} | model

    def error_response(self, status: int, sentence: str, headers: dict | None = None):
        return self.responses.JSONResponse(error_body(sentence, status), status, headers)

    async def answer(self, request, chat: bool):
        """An answer, whole or as a stream; mistakes become a status and a sentence."""
        try:
            response = await self.completion(request, chat)
        except UserError as e:
            response = self.error_response(400, str(e))
        except QueueFull:
            sentence = "all places are taken, and so are those in the queue; come again"
            response = self.error_response(429, sentence, {"Retry-After": "1"})
        except HTTPError as e:
            response = self.error_response(e.status, str(e))
        self.service.requests[response.status_code] += 1
        return response

    async def completion(self, request, chat: bool):
        service = self.service
        ask = service.parse_request(await read_json_body(request), chat)
        calls = service.submit(ask)
        name = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        head = response_head(ask, name, service.name)
        if ask.stream:
            stream = sse_events(service, ask, calls, head)
            kind = {"media_type": "text/event-stream", "headers": {"Cache-Control": "no-cache"}}
            response = self.responses.StreamingResponse(stream, **kind)
            return on_close(response, lambda: service.engine_thread.abort(calls))
        try:
            found = await cancel_on_disconnect(request, collect_response(service, ask, calls, head))
            return self.responses.JSONResponse(found, 200 if found else 499)
        finally:
            service.engine_thread.abort(calls)

    def health(self):
        fine = self.service.engine_thread.is_alive() and not self.service.engine_thread.failed
        said = {"status": "ok" if fine else "failed"}
        return self.responses.JSONResponse(said, 200 if fine else 503)


def on_close(response, goodbye):
    """A response that says goodbye when it is sent or when nobody reads it any more."""

    class Leaving(type(response)):
        async def __call__(self, *args):
            try:
                await super().__call__(*args)
            finally:
                goodbye()

    response.__class__ = Leaving
    return response


def build_app(service: Service):
    """The endpoints as an ASGI app."""
    fastapi, responses = import_fastapi()
    app, ends = fastapi.FastAPI(openapi_url=None), Endpoints(service)
    asked = fastapi.Request

    @app.post("/v1/completions")
    async def completions(request: asked):
        return await ends.answer(request, False)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: asked):
        return await ends.answer(request, True)

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [ends.model]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str):
        unknown = ends.error_response(404, f"there is no model {name[:80]!r}")
        return ends.model if name == service.name else unknown

    @app.get("/health")
    async def health():
        return ends.health()

    @app.get("/metrics")
    async def metrics():
        kind = "text/plain; version=0.0.4"
        return responses.PlainTextResponse(service.metrics(), media_type=kind)

    return app


def import_fastapi():
    """FastAPI and its responses."""
    try:
        import fastapi
        import fastapi.responses
    except ImportError:
        raise UserError(INSTALL_HINT) from None
    return fastapi, fastapi.responses


def make_api_server(app, grace: float = 30.0):
    """uvicorn; the first signal ends it after the running answers, the second at once."""
    try:
        import uvicorn
    except ImportError:
        raise UserError(INSTALL_HINT) from None

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self):
            """Ours: uvicorn's own would end the process by the signal, not with a code."""
            if threading.current_thread() is not threading.main_thread():
                yield
                return
            numbers = signal.SIGINT, signal.SIGTERM
            before = [signal.signal(n, self.handle_exit) for n in numbers]
            try:
                yield
            finally:
                for n, handler in zip(numbers, before):
                    signal.signal(n, handler)

    options = {"log_level": "critical", "timeout_graceful_shutdown": int(grace) or None}
    return Server(uvicorn.Config(app, ws="none", lifespan="off", access_log=False, **options))


def run_server(args: ServeConfig) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    validate_serve_config(args)
    import_fastapi()
    listener = bind_socket(args.host, args.port)
    with Service(args) as service:
        if not is_loopback(args.host):
            print("anyone who reaches this machine can use the model", file=sys.stderr)
        host, port = f"[{args.host}]" if ":" in args.host else args.host, listener.getsockname()[1]
        print(f"http://{host}:{port}/v1 serves {service.name}", flush=True)
        make_api_server(build_app(service), args.grace).run(sockets=[listener])
    count = service.engine.counters
    print(
        f"{count['generation_tokens']} tokens written, {count['prompt_tokens']} read",
        file=sys.stderr,
    )
