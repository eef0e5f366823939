"""The model behind `dsv3 serve`: from bodies of HTTP requests to the engine and back to text."""

import asyncio
import hashlib
import secrets
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from dsv3_ref.checkpoints.native import find_tokenizer_dir, load, load_into
from dsv3_ref.config import UserError
from dsv3_ref.data.chat_template import ChatTemplate
from dsv3_ref.data.marks import num_utf8_bytes
from dsv3_ref.data.tokenizer import FIM_BEGIN, FIM_END, FIM_HOLE, check_tokens
from dsv3_ref.decode import SamplingParams
from dsv3_ref.model import Transformer
from dsv3_ref.posttraining.policy import Policy
from dsv3_ref.serve import QueueFull
from dsv3_ref.serving.config import ServeConfig, build_engine, validate_serve_config
from dsv3_ref.serving.conversation import continues_answer, render_messages
from dsv3_ref.serving.detokenizer import StreamDetokenizer
from dsv3_ref.serving.engine_thread import EngineThread
from dsv3_ref.serving.fields import (
    MAX_LISTED,
    MAX_LISTED_AT_ONCE,
    MAX_SEED,
    InvalidField,
    JSONObject,
    are_token_ids,
    parse_fields,
    string,
)
from dsv3_ref.serving.json_body import BodyBudget, parse_json
from dsv3_ref.serving.output_processor import CompletionPiece, ServedRequest
from dsv3_ref.serving.prefill import PrefillWorker, dispatch_prefill
from dsv3_ref.serving.protocol import (
    CompletionRequest,
    FieldLimits,
    HTTPError,
    CHAT,
    COMPLETIONS,
    DETOKENIZE,
    RELOAD,
    MAX_TEMPERATURE,
    TOKENIZE,
    endpoint_fields,
    make_request,
)
from dsv3_ref.serving.tokenize_pool import TokenizePool
from dsv3_ref.serving.tool_calls import CallMarks, find_call_marks
from dsv3_ref.training.strategy import pick_device

ENGINE_FAILED = "the engine has failed and this server is about to end; see its log"
DRAINING = "the server is shutting down: retry later"
STOP_SECONDS = 5.0  # that a step of the engine may take to end
MAX_BODY_BYTES = 4 << 20
MAX_ALL_BODIES_BYTES = 256 << 20
MAX_REPEATED_BYTES = 4 << 20  # of text for the tokens of a request, in its response


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
        home = find_tokenizer_dir(args.model)
        self.chat = ChatTemplate(tokenizer) if tokenizer else ChatTemplate.from_dir(home)
        self.tokenizer = self.chat.tokenizer
        self.policy = Policy(model, self.chat)
        self.special_tokens = self.chat.special_tokens
        self.name = args.served_model_name or args.model.resolve().name
        self.engine = build_engine(model, args)
        self.engine_thread = EngineThread(self.engine, self.tokenizer)
        self.fingerprint = make_fingerprint(model, args)
        max_len = self.engine.scheduler.max_model_len
        self.limits = FieldLimits(max_len, args.max_n, model.config.vocab_size)
        self.fields = endpoint_fields(self.limits)
        if args.reload_root:
            self.fields[RELOAD] = {"model_path": string()}
        self.sampling_defaults = sampling_defaults(self.chat, self.limits, args)
        self.tokenize_pool = TokenizePool(self.tokenizer, max_len, args.max_queue)
        self.max_body_bytes = self.tokenize_pool.max_body_bytes(args.max_n, MAX_BODY_BYTES)
        self.body_budget = BodyBudget(MAX_ALL_BODIES_BYTES)
        self.chat.encoder.check_length = self.tokenize_pool.check_length
        self.is_draining = False
        self.requests: Counter[int] = Counter()  # by HTTP status
        self.num_listed = 0  # log-probabilities of requests that have not been answered

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

    def read_values(self, data: bytes, path: str) -> JSONObject:
        """Return the fields of the body of an HTTP request to an endpoint, as `parse_fields`."""
        body = parse_json(data)
        if not isinstance(body, dict):
            raise UserError("the body must be a JSON object")
        values = parse_fields(body, self.fields[path])
        if values.get("model", self.name) != self.name:
            raise self.unknown_model(values["model"])
        return values

    def read_request(self, data: bytes, chat: bool) -> CompletionRequest:
        """Validate and tokenize the body of a request for completions.

        Raises a `UserError` or an `HTTPError`.
        """
        values = self.read_values(data, CHAT if chat else COMPLETIONS)
        self.check_prompt_length(values, chat)
        seed = secrets.randbits(62) if self.args.seed is None else self.args.seed
        defaults = self.sampling_defaults | {"separate_reasoning": self.args.separate_reasoning}
        request = make_request(defaults | values, chat, seed)
        num_completions = request.best_of * (1 if chat else num_prompts(values.get("prompt")))
        if num_completions > self.args.max_n:
            raise UserError(
                f"{num_completions} completions are more than the {self.args.max_n} allowed per "
                "request: lower n or best_of, or send fewer prompts"
            )
        prompts = self.encode_prompts(values, chat)
        check_tokens(prompts, self.limits.vocab_size)
        if request.echo:
            self.check_repeated(
                "echo", [self.decode(prompt) for prompt in prompts], request.best_of
            )
        is_new_answer = chat and not continues_answer(values)
        opening = self.chat.opened_thought(prompts[0]) if is_new_answer else ""
        marks = self.find_call_marks(values)
        request = replace(request, prompts=prompts, call_marks=marks, opening=opening)
        if (num_listed := self.count_listed(request)) > MAX_LISTED:
            raise InvalidField(
                "logprobs",
                f"{num_listed} log-probabilities are more than the {MAX_LISTED} allowed per "
                "response: ask for fewer alternatives, tokens or completions",
            )
        return request

    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens, special ones included."""
        return self.tokenizer.decode(tokens, skip_special_tokens=False)

    def check_repeated(self, name: str, texts: list[str], times: int = 1) -> None:
        """Raise `InvalidField` if texts are too long to stand in a response so many times.

        A token may be written in two bytes of a request and stand for a hundred of text.
        """
        num_bytes = times * sum(map(num_utf8_bytes, texts))
        if num_bytes > MAX_REPEATED_BYTES:
            raise InvalidField(
                name,
                f"the response would repeat {num_bytes} bytes of text, more than the "
                f"{MAX_REPEATED_BYTES} allowed: send fewer tokens or ask for fewer completions",
            )

    def count_listed(self, request: CompletionRequest) -> int:
        """Return how many log-probabilities the completions of a request may list."""
        if request.num_logprobs < 0 and request.best_of == request.n:
            return 0
        new = self.args.max_new_tokens if request.max_tokens is None else request.max_tokens
        prompt = sum(map(len, request.prompts)) if request.echo else 0
        num_tokens = request.best_of * (prompt + new * len(request.prompts))
        return num_tokens * (1 + max(0, request.num_logprobs))

    def find_call_marks(self, values: JSONObject) -> CallMarks | None:
        """Return the marks of the calls to parse; None if a request has no tools to call.

        Raises `InvalidField` if the calls of this model cannot be parsed.
        """
        if not values.get("tools") or values.get("tool_choice") == "none":
            return None
        marks = find_call_marks(self.tokenizer)
        if marks is None:
            raise InvalidField(
                "tools",
                "this server cannot parse the calls of tools that this model writes: leave out "
                "tools, or describe them in a message",
            )
        return marks

    def tokenize(self, data: bytes) -> JSONObject:
        """Return the tokens of a prompt or of a conversation, as a completion would read them."""
        values = self.read_values(data, TOKENIZE)
        chat = "messages" in values
        if chat is ("prompt" in values):
            raise InvalidField("prompt", "give either prompt or messages")
        self.check_prompt_length(values, chat)
        if chat:
            tokens = render_messages(self.chat, values)
        else:
            begins = values.get("add_special_tokens", True) and self.chat.adds_bos
            tokens = [self.special_tokens.bos] if begins else []
            tokens += self.chat.encode(values["prompt"])
        if len(tokens) > self.limits.max_model_len:
            raise UserError(
                f"a text of {len(tokens)} tokens exceeds the limit of "
                f"{self.limits.max_model_len}: shorten it"
            )
        names = [self.tokenizer.id_to_token(i) for i in tokens]
        return {
            "count": len(tokens),
            "max_model_len": self.limits.max_model_len,
            "tokens": tokens,
            "token_strs": names if values.get("return_token_strs") else None,
        }

    def detokenize(self, data: bytes) -> JSONObject:
        """Return the text of tokens, special ones included."""
        tokens = self.read_values(data, DETOKENIZE).get("tokens")
        limits = self.limits
        if (
            not isinstance(tokens, list)
            or len(tokens) > limits.max_model_len
            or not are_token_ids(tokens, limits.vocab_size)
        ):
            raise InvalidField(
                "tokens",
                f"tokens must be a list of at most {limits.max_model_len} token ids below "
                f"{limits.vocab_size}",
            )
        text = self.decode(tokens)
        self.check_repeated("tokens", [text])
        return {"prompt": text}

    async def update_weights(self, values: JSONObject) -> JSONObject:
        """Load the weights of a directory under --reload-root into the running model.

        values: of the request's body. Raises an `HTTPError` if it may not be loaded, a `UserError`
        if it does not fit. Requests that are running continue with the new weights.
        """
        if self.args.reload_root is None:
            raise HTTPError(403, "this server keeps its weights: start it with --reload-root")
        root, folder = self.args.reload_root.resolve(), Path(values.get("model_path", "")).resolve()
        if not folder.is_relative_to(root):
            raise HTTPError(403, "model_path is not under --reload-root: write the weights there")
        load = partial(load_into, directory=folder, verify=self.args.verify)
        future = self.engine_thread.call_between_steps(load, reset_prefix_cache=True)
        await asyncio.wrap_future(future)
        return {"success": True, "message": f"loaded {folder.name}"}

    def unknown_model(self, name: str) -> HTTPError:
        """Return the error for a model that this server does not serve."""
        message = f"there is no model {name[:80]!r}; this server serves {self.name!r}"
        return HTTPError(404, message, "model", "model_not_found")

    def encode_prompts(self, values: JSONObject, chat: bool) -> list[list[int]]:
        """Return the token ids of every prompt; text cannot produce a special token."""
        if chat:
            return [render_messages(self.chat, values)]
        prompts = values.get("prompt", "")
        if isinstance(prompts, str) or is_token_list(prompts):
            prompts = [prompts]
        if not isinstance(prompts, list) or not 1 <= len(prompts) <= self.args.max_n:
            raise InvalidField(
                "prompt",
                f"prompt must be a string or a list of 1 to {self.args.max_n} strings, "
                "where a list of token ids may take the place of a string",
            )
        return [self.encode_prompt(prompt, values.get("suffix", "")) for prompt in prompts]

    def encode_prompt(self, prompt: Any, suffix: str) -> list[int]:
        """Return the token ids of a prompt, a string or a list of token ids, and of a suffix.

        With a suffix, the model fills in the middle (§4.1).
        """
        if isinstance(prompt, str):
            if not suffix:
                return self.chat.encode_prompt(prompt)
            start = [self.special_tokens.bos] if self.chat.adds_bos else []
            tokens = self.chat.encode(prompt)
        else:
            start, tokens = [], self.check_token_ids(prompt)
            if not suffix:
                return tokens
        begin, hole, end = (self.tokenizer.token_to_id(s) for s in (FIM_BEGIN, FIM_HOLE, FIM_END))
        if begin is None or hole is None or end is None:
            raise InvalidField(
                "suffix", "the tokenizer of this model cannot express a suffix: leave it out"
            )
        return [*start, begin, *tokens, hole, *self.chat.encode(suffix), end]

    def check_token_ids(self, prompt: Any) -> list[int]:
        """Return a prompt of token ids; raise `InvalidField` if it is anything else."""
        vocab_size = self.limits.vocab_size
        if isinstance(prompt, list) and prompt and are_token_ids(prompt, vocab_size):
            return prompt
        raise InvalidField(
            "prompt", f"each prompt must be a string or a list of token ids below {vocab_size}"
        )

    def check_prompt_length(self, values: JSONObject, chat: bool) -> None:
        """Raise a `UserError` if a prompt cannot fit.

        Takes no longer than to read the body: its structure is validated later.
        """
        texts = values.get("messages") if chat else values.get("prompt")
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
            suffix = num_text_bytes(values.get("suffix"))
            sizes = [num_text_bytes(part) + suffix for part in parts]
        for size in sizes:
            self.tokenize_pool.check_length(size)

    def submit(self, request: CompletionRequest, cache_salt: bytes = b"") -> list[ServedRequest]:
        """Queue one engine request per completion and return them.

        Call `close` at the end. Raises an `HTTPError` if the engine has failed or the server is
        draining, `QueueFull` if unsent responses list too much, and what `Scheduler.submit` raises.
        """
        if self.is_draining:
            raise HTTPError(503, DRAINING)
        num_listed = self.count_listed(request)
        if self.num_listed + num_listed > MAX_LISTED_AT_ONCE:
            raise QueueFull
        sink: asyncio.Queue[CompletionPiece] = asyncio.Queue()
        served = [
            self.make_served_request(request, index, sink, cache_salt)
            for index in range(request.best_of * len(request.prompts))
        ]
        self.engine_thread.submit(served)
        if self.has_failed():  # checked after `submit`: a failing engine ends what it sees
            raise HTTPError(503, ENGINE_FAILED)
        self.num_listed += num_listed
        return served

    def close(self, request: CompletionRequest, served: list[ServedRequest]) -> None:
        """Abort what still runs of a request that has been answered or whose client has left."""
        self.engine_thread.abort(served)
        self.num_listed -= self.count_listed(request)

    def make_served_request(
        self, request: CompletionRequest, index: int, sink: asyncio.Queue[CompletionPiece],
        cache_salt: bytes,
    ) -> ServedRequest:  # fmt: skip
        """Return the engine request of a completion: number index % best_of of its prompt."""
        prompt = request.prompts[index // request.best_of]
        room = self.engine.scheduler.max_model_len - len(prompt)
        max_tokens = request.max_tokens
        if max_tokens is None:
            max_tokens = max(1, min(self.args.max_new_tokens, room))
        num_logprobs = request.num_logprobs
        if request.best_of > request.n:
            num_logprobs = max(0, num_logprobs)
        ends = frozenset() if request.ignores_eos else self.chat.stop_token_ids
        return ServedRequest(
            tokens=list(prompt),
            max_tokens=max_tokens,
            sampling_params=self.make_sampling_params(request, index),
            logits_processor=request.logits_processor,
            stop_token_ids=ends | request.stop_token_ids,
            num_logprobs=num_logprobs,
            wants_prompt_logprobs=request.echo and request.num_logprobs >= 0,
            cache_salt=cache_salt,
            index=index,
            echo=request.echo,
            returns_token_ids=request.returns_token_ids,
            sink=sink,
            text=StreamDetokenizer(self.tokenizer, request.stop, request.make_passage()),
        )

    def make_sampling_params(self, request: CompletionRequest, index: int) -> SamplingParams:
        """Return the parameters of a completion, with a random number generator of its own."""
        seed = (request.seed + index) % (MAX_SEED + 1)
        generator = torch.Generator(self.engine.runner.device).manual_seed(seed)
        return SamplingParams(
            request.temperature, request.top_p, generator, request.top_k, request.min_p
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
            num_cached_tokens = sum(r.num_cached_tokens for r in served[:: request.best_of])
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


def sampling_defaults(chat: ChatTemplate, limits: FieldLimits, args: ServeConfig) -> JSONObject:
    """Return what requests that leave it out take from the model's generation_config.json.

    Its values are brought within the limits on requests.
    """
    if not args.generation_config:
        return {}
    values: JSONObject = dict(chat.settings.sampling)
    if "top_k" in values:
        values["top_k"] = min(int(values["top_k"]), limits.vocab_size)
    if "temperature" in values:
        values["temperature"] = min(values["temperature"], MAX_TEMPERATURE)
    if values:
        settings = ", ".join(f"{name} {value:g}" for name, value in values.items())
        print(
            f"requests without them are sampled with {settings}, of generation_config.json "
            "(--no-generation-config: OpenAI's defaults)",
            file=sys.stderr,
        )
    return values


def make_fingerprint(model: Transformer, args: ServeConfig) -> str:
    """Return what stands for all that tokens depend on beside the request."""
    state = model.config, model.embed.weight.dtype, args.num_speculative_tokens, torch.__version__
    return "fp_" + hashlib.sha256(repr(state).encode()).hexdigest()[:10]


def num_prompts(prompt: Any) -> int:
    """Return how many prompts the field of this name holds; a list of token ids is one."""
    return len(prompt) if isinstance(prompt, list) and not is_token_list(prompt) else 1


def is_token_list(prompt: Any) -> bool:
    """Return whether a prompt begins like a list of token ids."""
    return isinstance(prompt, list) and bool(prompt) and type(prompt[0]) is int


def num_text_bytes(value: object) -> int:
    """Return the bytes of a prompt or of a message's content, as far as it is text."""
    parts = value if isinstance(value, list) else [{"text": value}]
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return sum(num_utf8_bytes(text) for text in texts if isinstance(text, str))


def labeled_counter(name: str, label: str, counts: Mapping[Any, int]) -> list[str]:
    """Return the lines of a Prometheus counter with one value per label."""
    lines = [f"# TYPE dsv3_{name}_total counter"]
    for value, count in counts.items():
        lines.append(f'dsv3_{name}_total{{{label}="{value}"}} {count}')
    return lines
