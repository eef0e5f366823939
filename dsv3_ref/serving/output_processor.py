"""From tokens to text: the thread between the engine and the event loop of `dsv3 serve`."""

import asyncio
import math
import sys
import threading
import traceback
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import NamedTuple

from tokenizers import Tokenizer

from dsv3_ref.serve import Request, StepOutput, TokenLogprob
from dsv3_ref.serving.protocol import JSONObject
from dsv3_ref.serving.detokenizer import StreamDetokenizer, TokenDescriber

MIN_LOGPROB = -9999.0  # in the place of −∞, which JSON lacks
REQUEST_FAILED = "the server could not continue this request; see its log"


class CompletionPiece(NamedTuple):
    """New text of a completion, with the log-probabilities of its tokens."""

    request: "ServedRequest"
    text: str
    logprobs: list[JSONObject]
    finish_reason: str  # "" while it runs
    num_tokens: int = 0  # that the model generated
    error: str = ""  # what the client is told, if the finish reason is "error"


@dataclass(eq=False, kw_only=True)
class ServedRequest(Request):
    """A request to the engine that belongs to an HTTP request."""

    index: int  # among the completions of the HTTP request
    sink: asyncio.Queue[CompletionPiece]
    text: StreamDetokenizer  # used by the output processor only, like `entries` and `is_closed`
    entries: deque[tuple[int, JSONObject]] = field(default_factory=deque)
    echo: bool = False  # its text begins with the prompt's
    returns_token_ids: bool = False  # with log-probabilities of all of them, its end's too
    num_prompt_characters: int = 0  # of an echoed prompt, once it has been returned
    is_closed: bool = False  # its last piece has been delivered
    hit_stop_text: bool = False  # ended by one of the client's stop strings
    arrival_time: float = 0.0
    last_token_time: float = 0.0  # 0: no token yet


class OutputProcessor(threading.Thread):
    """The thread that turns outputs of the engine into text and passes it to the event loop.

    The event loop then only formats and sends. A fault while one output is processed ends its
    request only.
    """

    def __init__(self, tokenizer: Tokenizer, wake_engine: threading.Event):
        super().__init__(daemon=True)
        self.tokenizer = tokenizer
        self.describer = TokenDescriber(tokenizer)
        self.wake_engine = wake_engine
        self.loop: asyncio.AbstractEventLoop | None = None
        self.batches: SimpleQueue[list[StepOutput] | None] = SimpleQueue()

    def run(self) -> None:
        """Process the outputs of one step after the other, until `stop` is called."""
        while (outputs := self.batches.get()) is not None:
            pieces = [piece for output in outputs if (piece := self.process(output))]
            if pieces and self.loop:
                with suppress(RuntimeError):  # the loop is closed: the server is shutting down
                    self.loop.call_soon_threadsafe(deliver_pieces, pieces)

    def stop(self) -> None:
        """End the thread after the outputs that it has received."""
        self.batches.put(None)

    def process(self, output: StepOutput) -> CompletionPiece | None:
        """Return the piece that an output adds; None if its request has already been closed."""
        request = output.request
        assert isinstance(request, ServedRequest)
        if request.is_closed:  # by a stop string, or a fault
            return None
        try:
            piece = self.make_piece(output, request)
        except Exception:
            traceback.print_exc()
            piece = CompletionPiece(request, "", [], "error", error=REQUEST_FAILED)
        if piece.finish_reason:
            request.is_closed = True
            if not output.finish_reason:  # the engine still runs it
                request.aborted = True
                self.wake_engine.set()
        return piece

    def make_piece(self, output: StepOutput, request: ServedRequest) -> CompletionPiece:
        """Return the text that the tokens of an output complete, up to a stop string."""
        if output.finish_reason in ("error", "failed", "abort"):
            if output.error:
                print(f"a request ended with an error: {output.error}", file=sys.stderr)
            return CompletionPiece(request, "", [], output.finish_reason, error=REQUEST_FAILED)
        new_text, entries = self.echo_prompt(request) if request.echo else ("", [])
        num_tokens = 0
        logprobs: list[TokenLogprob | None] = [*output.logprobs]
        for token, logprob in zip(output.tokens, logprobs or [None] * len(output.tokens)):
            num_tokens += 1
            if token not in request.stop_token_ids:
                new_text += request.text.push([token])
                if logprob:
                    start = request.num_prompt_characters + request.text.start_of_token
                    entry = self.describe_logprob(token, logprob, start)
                    request.entries.append((request.text.end_of_token, entry))
            elif request.returns_token_ids and logprob:
                end = request.text.end_of_token
                request.entries.append((end, self.describe_logprob(token, logprob, end)))
            if request.text.ended:
                break
        finish_reason = output.finish_reason
        if finish_reason and not request.text.ended:
            new_text += request.text.flush()
        if request.text.ended:
            finish_reason = "stop"
            request.hit_stop_text = True
        entries += release_entries(request)
        return CompletionPiece(request, new_text, entries, finish_reason, num_tokens)

    def echo_prompt(self, request: ServedRequest) -> tuple[str, list[JSONObject]]:
        """Return the text of a prompt and the log-probabilities of its tokens, which begin it."""
        request.echo = False
        text = StreamDetokenizer(self.tokenizer)
        prompt = ""
        starts = []
        for token in request.prompt_tokens:
            prompt += text.push([token])
            starts.append(text.start_of_token)
        prompt += text.flush()
        request.num_prompt_characters = len(prompt)
        if not request.wants_prompt_logprobs:
            return prompt, []
        logprobs = [None, *request.prompt_logprobs]
        rows = zip(request.prompt_tokens, logprobs, starts, strict=True)
        return prompt, [self.describe_logprob(*row) for row in rows]

    def describe_logprob(self, token: int, logprob: TokenLogprob | None, start: int) -> JSONObject:
        """Return the log-probabilities of a token and its alternatives, with what it looks like.

        logprob: None for the first token of a prompt. start: characters of the text before it.
        """
        if logprob is None:
            return self.describe_token(token, None) | {"top_logprobs": None, "text_offset": start}
        value, alternatives = logprob
        top = [self.describe_token(*pair) for pair in alternatives]
        return self.describe_token(token, value) | {"top_logprobs": top, "text_offset": start}

    def describe_token(self, token: int, logprob: float | None) -> JSONObject:
        """Return a token's text, its bytes and its log-probability."""
        text, data = self.describer.describe(token)
        if logprob is not None and not math.isfinite(logprob):
            logprob = MIN_LOGPROB
        return {"token": text, "logprob": logprob, "bytes": list(data)}


def release_entries(request: ServedRequest) -> list[JSONObject]:
    """Return the log-probabilities of the tokens whose text has been returned, and drop them.

    Those of a withheld text wait with it: they would reveal a stop string.
    """
    entries = []
    while request.entries and request.entries[0][0] <= request.text.num_emitted:
        entries.append(request.entries.popleft()[1])
    return entries


def deliver_pieces(pieces: list[CompletionPiece]) -> None:
    """Put each piece into the queue of its HTTP request; runs on the event loop."""
    for piece in pieces:
        piece.request.sink.put_nowait(piece)
