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
from pathlib import Path

import torch
import tyro

from dsv3_ref.checkpoints.native import find_tokenizer_dir, load
from dsv3_ref.config import UserError
from dsv3_ref.data.tokenizer import load_tokenizer
from dsv3_ref.decode import SamplingParams
from dsv3_ref.posttraining.policy import Policy
from dsv3_ref.serve import Engine, QueueFull, Request
from dsv3_ref.serving.generate import Text
from dsv3_ref.serving.prefill import Reader, hand_out
from dsv3_ref.serving.protocol import (
    Ask,
    Refused,
    choice_of,
    complaint,
    flag,
    form,
    is_tokens,
    known,
    likeliest,
    number,
    spoken,
    stops,
)  # fmt: skip
from dsv3_ref.serving.web import listen, loopback
from dsv3_ref.training.loop import pick_device

MISSING = "dsv3 serve needs FastAPI and uvicorn: pip install -e '.[serve]'"
BODY = 4 << 20  # bytes of a request, at most
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@dataclass(frozen=True)
class Serve:
    """Serve a model to any number of OpenAI clients."""

    model: tyro.conf.Positional[Path]
    """a run, one of its checkpoints, or a Hugging Face directory"""
    host: str = "127.0.0.1"
    """this machine alone; 0.0.0.0 is the whole network"""
    port: int = 8000
    """0: a free one"""
    name: str = ""
    """what clients call the model; by default the name of its folder"""
    draft: int = 0
    """tokens that MTP modules guess ahead in every row, up to the model's n_mtp_layers"""
    max_rows: int = 64
    """answers that are written side by side"""
    max_queue: int = 256
    """requests that may wait; the next one is told to come again"""
    max_n: int = 16
    """answers that one request may ask for"""
    cache_tokens: int = 32768
    """positions that the latent cache holds for all rows together"""
    page: int = 16
    """positions of a page of that cache"""
    chunk: int = 128
    """tokens of prompts that are read between two tokens of those who write"""
    max_new_tokens: int = 256
    """of an answer, where the request does not say"""
    prefill_workers: int = 0
    """processes that read prompts, so that this one only writes"""
    grace: float = 30.0
    """seconds that running answers are given at the end"""
    seed: int | None = None
    """of requests that name none; by default each is drawn anew"""
    device: str = "auto"


def check(args: Serve) -> None:
    """Raise a `UserError` for options that cannot be used."""
    least = {"max_rows": 1, "max_n": 1, "page": 1, "chunk": 1, "max_new_tokens": 1, "max_queue": 1}
    for name, low in (least | {"draft": 0, "prefill_workers": 0, "grace": 0}).items():
        if getattr(args, name) < low:
            raise UserError(f"--{name.replace('_', '-')} must be at least {low}")
    if args.cache_tokens < 2 * args.page:
        raise UserError("--cache-tokens must be at least two pages")


def engine_of(model, args: Serve) -> Engine:
    """An engine with these limits."""
    n_pages = args.cache_tokens // args.page
    return Engine(model, n_pages, args.page, args.max_rows, args.chunk, args.max_queue, args.draft)


# ── Numbers for Prometheus ──


class Histogram:
    """How often a time was at most so long."""

    def __init__(self):
        self.counts, self.sum = [0] * (len(SECONDS) + 1), 0.0

    def add(self, seconds: float) -> None:
        self.counts[sum(seconds > s for s in SECONDS)] += 1
        self.sum += seconds

    def lines(self, name: str):
        total = 0
        for bound, n in zip([*SECONDS, "+Inf"], self.counts):
            total += n
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self.sum:.6f}"
        yield f"{name}_count {total}"


# ── The engine's thread ──


@dataclass(eq=False)
class Call(Request):
    """A row that somebody waits for."""

    index: int = 0  # among the answers of its request
    sink: asyncio.Queue | None = None  # (call, new tokens, why it ended or "")
    born: float = 0.0
    last: float = 0.0  # when its newest token was written
    told: int = 0  # tokens that its text is made of
    stopped: bool = False  # by one of its own stop texts


class Desk(threading.Thread):
    """Steps while there is work; rows come in from any thread, tokens go to the event loop."""

    def __init__(self, engine: Engine):
        super().__init__(daemon=True)
        self.engine, self.wake, self.stopped, self.failed = engine, threading.Event(), False, False
        self.loop: asyncio.AbstractEventLoop | None = None
        self.ended: Counter = Counter()
        self.first, self.each = Histogram(), Histogram()
        self.readers: list[Reader] = []

    def submit(self, calls: list[Call]) -> None:
        """Queue rows, all or none."""
        self.loop = asyncio.get_running_loop()
        for call in calls:
            call.born = time.monotonic()
        self.engine.submit(*calls)
        self.wake.set()

    def leave(self, calls: list[Call]) -> None:
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
        alive = any(not row.remote_prefill or row.aborted for row in e.running)
        return bool(e.waiting or e.pending_callbacks or e.incoming_transfers or alive)

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
                out = [(row, []) for row in [*self.engine.running, *self.engine.waiting]]
                for row, _ in out:
                    row.finish_reason = "failed"
            self.deliver(out)

    def deliver(self, out: list[tuple[Request, list[int]]]) -> None:
        """Note the times, and hand new tokens over, all of a step at once."""
        now, told = time.monotonic(), []
        for call, tokens in out:
            if tokens:
                self.first.add(now - call.born) if not call.last else None
                for _ in tokens if call.last else tokens[1:]:
                    self.each.add((now - (call.last or now)) / len(tokens))
                call.last = now
            if call.finish_reason:
                self.ended["stop" if call.stopped else call.finish_reason] += 1
                for reader in self.readers:
                    reader.forget(call)
            told.append((call, tokens, call.finish_reason))
        if told:
            with suppress(RuntimeError):  # the loop is closed: nobody listens
                self.loop.call_soon_threadsafe(spread, told)

    def stop(self) -> None:
        """After the running step."""
        self.stopped = True
        self.wake.set()
        self.join()


def spread(told) -> None:
    """Each to its own sink; on the event loop."""
    for call, *rest in told:
        call.sink.put_nowait((call, *rest))


# ── The service ──


class Service:
    """A model, its engine at work, and the app that clients reach."""

    def __init__(self, args: Serve, model=None, tokenizer=None):
        check(args)
        self.args, self.born = args, int(time.time())
        model = model or load(args.model).to(pick_device(args.device)).eval()
        tokenizer = tokenizer or load_tokenizer(find_tokenizer_dir(args.model))
        self.policy = Policy(model, tokenizer)
        self.tokenizer, self.special_tokens = tokenizer, self.policy.special_tokens
        self.name = args.name or args.model.resolve().name
        self.engine, self.requests = engine_of(model, args), Counter()
        self.desk = Desk(self.engine)

    def __enter__(self) -> "Service":
        workers = self.args.prefill_workers
        threads = max(1, torch.get_num_threads() // (1 + workers))
        readers = self.desk.readers
        if workers:
            readers += [Reader(self.args, self.desk, threads) for _ in range(workers)]
            torch.set_num_threads(threads)
            for reader in readers:
                reader.ready()
            self.engine.send_to_prefill = lambda row: hand_out(readers, row)
        self.desk.start()
        return self

    def __exit__(self, *_) -> None:
        self.desk.stop()
        for reader in self.desk.readers:
            reader.stop()

    # From a body to rows

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def prompts(self, body: dict, chat: bool) -> list[list[int]]:
        """Tokens of every prompt; text cannot spell a special token."""
        if chat:
            return [self.policy.prompt(spoken(body.get("messages")))]
        x = body.get("prompt", "")
        x = [x] if isinstance(x, str) or (x and isinstance(x, list) and is_tokens(x)) else x
        if not isinstance(x, list) or not x or len(x) > self.args.max_n:
            raise UserError(f"prompt must be a text, or a list of 1 to {self.args.max_n} texts")
        out, w = [], self.engine.paged.model.config.vocab_size
        for prompt in x:
            if isinstance(prompt, str):
                out.append([self.special_tokens.bos, *self.encode(prompt)])
            elif isinstance(prompt, list) and is_tokens(prompt) and all(0 <= t < w for t in prompt):
                out.append(prompt)
            else:
                raise UserError(f"a prompt is a text or a list of token numbers below {w}")
        return out

    def ask(self, body: dict, chat: bool) -> Ask:
        """The request, checked."""
        if not isinstance(body, dict):
            raise UserError("the body must be a JSON object")
        if body.get("model", self.name) != self.name:
            raise Refused(404, f"there is no model {str(body['model'])[:80]!r}, only {self.name!r}")
        known(body)
        options = body.get("stream_options") or {}
        most = self.engine.max_model_len
        long = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
        seed = secrets.randbits(62) if self.args.seed is None else self.args.seed
        return Ask(
            self.prompts(body, chat), chat, number(body, "n", 1, 1, self.args.max_n),
            number(body, long, None, 1, most), number(body, "temperature", 1.0, 0, 2, float),
            number(body, "top_p", 1.0, 1e-6, 1, float),
            number(body, "seed", seed, -(2**63), 2**63 - 1), stops(body), flag(body, "stream"),
            isinstance(options, dict) and flag(options, "include_usage"), likeliest(body, chat),
        )  # fmt: skip

    def calls(self, ask: Ask) -> list[Call]:
        """A row for every answer, queued; raises what `submit` raises."""
        if (total := ask.n * len(ask.prompts)) > self.args.max_n:
            raise UserError(f"{total} answers are more than the {self.args.max_n} of one request")
        sink, calls, device = asyncio.Queue(), [], self.engine.paged.freqs_cis_tx.device
        for prompt in ask.prompts:
            room = max(1, min(self.args.max_new_tokens, self.engine.max_model_len - len(prompt)))
            for _ in range(ask.n):
                seed = (ask.seed + len(calls)) % (1 << 63)
                choice = SamplingParams(
                    ask.temperature, ask.top_p, torch.Generator(device).manual_seed(seed)
                )
                eos = frozenset({self.special_tokens.eos})
                new = ask.max_tokens or room
                calls.append(
                    Call(
                        list(prompt),
                        new,
                        choice,
                        eos,
                        ask.num_logprobs,
                        index=len(calls),
                        sink=sink,
                    )
                )
        if self.desk.failed:
            raise Refused(503, "the engine has failed; see the server's log")
        self.desk.submit(calls)
        return calls

    # From rows to text

    async def told(self, ask: Ask, calls: list[Call]) -> AsyncIterator[tuple]:
        """(call, text that became certain, log-probabilities, why it ended or "") as they come."""
        texts = {call: Text(self.tokenizer, ask.stop) for call in calls}
        sink = calls[0].sink
        while texts:
            call, tokens, ended = await sink.get()
            if (text := texts.get(call)) is None:  # its stop text came in the step before
                continue
            if ended in ("failed", "abort"):
                raise Refused(503, "the engine has failed; see the server's log")
            noted = call.logprobs[call.told : call.told + len(tokens)]
            call.told += len(tokens)
            said = [t for t in tokens if t != self.special_tokens.eos]
            piece = text.add(said)
            if text.ended:
                ended, call.stopped = "stop", True
                self.desk.leave([call])
            elif ended:
                piece += text.rest()
            if ended:
                del texts[call]
            yield call, piece, self.noted(said, noted, ask.chat), ended

    def noted(self, tokens: list[int], logp: list, chat: bool) -> list[dict]:
        """Log-probabilities of tokens as clients read them."""
        word = lambda t: self.tokenizer.decode([t], skip_special_tokens=False)
        one = lambda t, x: {"token": word(t), "logprob": x, "bytes": list(word(t).encode())}
        return [
            one(t, x) | {"top_logprobs": [one(*pair) for pair in best]}
            for t, (x, best) in zip(tokens, logp)
        ]

    def usage(self, ask: Ask, calls: list[Call]) -> dict:
        read, said = sum(map(len, ask.prompts)), sum(call.told for call in calls)
        hits = sum(call.num_cached_tokens for call in calls[:: ask.n])
        return {
            "prompt_tokens": read, "completion_tokens": said, "total_tokens": read + said,
            "prompt_tokens_details": {"cached_tokens": hits},
        }  # fmt: skip

    def metrics(self) -> str:
        """What Prometheus reads."""
        e, lines = self.engine, []
        gauges = {
            "running": len(e.running), "queue": len(e.waiting), "pages": e.block_pool.num_blocks,
            "pages_used": e.block_pool.num_used, "pages_idle": len(e.block_pool.evictable),
            "prefill_workers": sum(r.alive for r in self.desk.readers),
        }  # fmt: skip
        counters = {
            "prompt_tokens_read": e.counters["prompt_tokens"], "prefix_hit_tokens": e.counters["prefix_cache_hits"],
            "tokens_written": e.counters["generation_tokens"], "steps": e.counters["steps"],
            "rows_put_back": e.counters["preemptions"], "drafts": e.counters["draft_tokens"],
            "drafts_accepted": e.counters["accepted_tokens"],
        }  # fmt: skip
        for kind, found, end in (("gauge", gauges, ""), ("counter", counters, "_total")):
            for name, value in found.items():
                lines += [f"# TYPE dsv3_{name}{end} {kind}", f"dsv3_{name}{end} {value}"]
        for name, label, found in (
            ("requests", "status", self.requests), ("answers", "ended", self.desk.ended)
        ):  # fmt: skip
            lines.append(f"# TYPE dsv3_{name}_total counter")
            lines += [f'dsv3_{name}_total{{{label}="{k}"}} {n}' for k, n in found.items()]
        for name, x in (("first_token", self.desk.first), ("each_token", self.desk.each)):
            lines += [f"# TYPE dsv3_{name}_seconds histogram", *x.lines(f"dsv3_{name}_seconds")]
        return "\n".join(lines) + "\n"


# ── HTTP ──


async def whole(service: Service, ask: Ask, calls: list[Call], head: dict) -> dict:
    """All answers of a request."""
    texts, noted, why = dict.fromkeys(calls, ""), {c: [] for c in calls}, {}
    async for call, piece, new, ended in service.told(ask, calls):
        texts[call] += piece
        noted[call] += new
        why[call] = ended
    choices = [choice_of(ask, c.index, texts[c], noted[c], why[c]) for c in calls]
    return head | {"choices": choices, "usage": service.usage(ask, calls)}


async def events(service: Service, ask: Ask, calls: list[Call], head: dict):
    """Server-sent events: pieces as they come, the usage if asked for, and [DONE]."""
    line = lambda x: f"data: {json.dumps(x, ensure_ascii=False)}\n\n"
    if ask.chat:
        for call in calls:
            start = choice_of(ask, call.index, "", [], None)
            start["delta"]["role"] = "assistant"
            yield line(head | {"choices": [start]})
    try:
        async for call, piece, noted, ended in service.told(ask, calls):
            if piece or ended or (noted and ask.num_logprobs >= 0):
                yield line(head | {"choices": [choice_of(ask, call.index, piece, noted, ended)]})
    except Refused as e:
        yield line(complaint(str(e), e.status))
        return
    if ask.usage:
        yield line(head | {"choices": [], "usage": service.usage(ask, calls)})
    yield "data: [DONE]\n\n"


async def body_of(request) -> dict:
    """The JSON of a request. Only pages that may ask this server can send this content type."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, "the content type must be application/json")
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > BODY:
            raise Refused(413, f"the request has more than {BODY} bytes")
    try:
        body = json.loads(data)
        json.dumps(body, ensure_ascii=False).encode()  # halves of characters cannot be encoded
        return body
    except (ValueError, RecursionError):
        raise UserError("the body is not JSON in UTF-8") from None


async def left(request) -> None:
    """Returns when the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def unless_left(request, answer):
    """An answer, or None if the client goes away before."""
    tasks = [asyncio.ensure_future(x) for x in (answer, left(request))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()


class Endpoints:
    """What can be asked of a service over HTTP."""

    def __init__(self, service: Service):
        self.service, (_, self.responses) = service, library()
        model = {"object": "model", "created": service.born, "owned_by": "dsv3"}
        self.model = {"id": service.name} | model

    def refusal(self, status: int, sentence: str, headers: dict | None = None):
        return self.responses.JSONResponse(complaint(sentence, status), status, headers)

    async def answer(self, request, chat: bool):
        """An answer, whole or as a stream; mistakes become a status and a sentence."""
        try:
            response = await self.written(request, chat)
        except UserError as e:
            response = self.refusal(400, str(e))
        except QueueFull:
            sentence = "all places are taken, and so are those in the queue; come again"
            response = self.refusal(429, sentence, {"Retry-After": "1"})
        except Refused as e:
            response = self.refusal(e.status, str(e))
        self.service.requests[response.status_code] += 1
        return response

    async def written(self, request, chat: bool):
        service = self.service
        ask = service.ask(await body_of(request), chat)
        calls = service.calls(ask)
        name = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        head = form(ask, name, service.name)
        if ask.stream:
            stream = events(service, ask, calls, head)
            kind = {"media_type": "text/event-stream", "headers": {"Cache-Control": "no-cache"}}
            response = self.responses.StreamingResponse(stream, **kind)
            return leaving(response, lambda: service.desk.leave(calls))
        try:
            found = await unless_left(request, whole(service, ask, calls, head))
            return self.responses.JSONResponse(found, 200 if found else 499)
        finally:
            service.desk.leave(calls)

    def health(self):
        fine = self.service.desk.is_alive() and not self.service.desk.failed
        said = {"status": "ok" if fine else "failed"}
        return self.responses.JSONResponse(said, 200 if fine else 503)


def leaving(response, goodbye):
    """A response that says goodbye when it is sent or when nobody reads it any more."""

    class Leaving(type(response)):
        async def __call__(self, *args):
            try:
                await super().__call__(*args)
            finally:
                goodbye()

    response.__class__ = Leaving
    return response


def site(service: Service):
    """The endpoints as an ASGI app."""
    fastapi, responses = library()
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
        unknown = ends.refusal(404, f"there is no model {name[:80]!r}")
        return ends.model if name == service.name else unknown

    @app.get("/health")
    async def health():
        return ends.health()

    @app.get("/metrics")
    async def metrics():
        kind = "text/plain; version=0.0.4"
        return responses.PlainTextResponse(service.metrics(), media_type=kind)

    return app


def library():
    """FastAPI and its responses."""
    try:
        import fastapi
        import fastapi.responses
    except ImportError:
        raise UserError(MISSING) from None
    return fastapi, fastapi.responses


def server(app, grace: float = 30.0):
    """uvicorn; the first signal ends it after the running answers, the second at once."""
    try:
        import uvicorn
    except ImportError:
        raise UserError(MISSING) from None

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


def serve(args: Serve) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    check(args)
    library()
    listener = listen(args.host, args.port)
    with Service(args) as service:
        if not loopback(args.host):
            print("anyone who reaches this machine can use the model", file=sys.stderr)
        host, port = f"[{args.host}]" if ":" in args.host else args.host, listener.getsockname()[1]
        print(f"http://{host}:{port}/v1 serves {service.name}", flush=True)
        server(site(service), args.grace).run(sockets=[listener])
    count = service.engine.counters
    print(
        f"{count['generation_tokens']} tokens written, {count['prompt_tokens']} read",
        file=sys.stderr,
    )
