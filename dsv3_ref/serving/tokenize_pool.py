"""Reading and tokenizing of requests outside the event loop, and limits on their length."""

import asyncio
import json
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any, TypeVar

from tokenizers import Tokenizer

from dsv3_ref.config import UserError
from dsv3_ref.data.tokenizer import byte_lengths
from dsv3_ref.serve import QueueFull
from dsv3_ref.serving.detokenizer import is_byte_level
from dsv3_ref.serving.json_body import SMALL_BODY_BYTES

Tokens = TypeVar("Tokens")

MAX_ESCAPE = 6  # bytes of “\\u0061”, which stands for one
MAX_ID_BYTES = 10  # of a token id in JSON, with what separates it from the next
OTHER_FIELDS_BYTES = 1 << 16
LOSSLESS_STEPS = {"Sequence", "Split", "ByteLevel", "Digits"}  # that keep every byte of a text


def max_bytes_per_token(tokenizer: Tokenizer) -> int | None:
    """Return how many bytes of text a token can stand for; None if that has no limit.

    A text of n bytes has at least n / max_bytes_per_token tokens, provided that the tokenizer
    drops nothing.
    """
    steps = [*pipeline_steps(tokenizer.normalizer), *pipeline_steps(tokenizer.pre_tokenizer)]
    is_lossless = all(step["type"] in LOSSLESS_STEPS for step in steps)
    is_lossless &= not any(step.get("behavior") == "Removed" for step in steps)
    if not is_lossless or not is_byte_level(tokenizer):
        return None
    return max(byte_lengths(tokenizer))


def pipeline_steps(component: Any) -> list[dict]:
    """Return the settings of a component of a tokenizer and of the components inside it."""
    if component is None:
        return []
    steps = [json.loads(component.__getstate__())]
    for step in steps:  # grows while it is read
        steps += step.get("normalizers") or step.get("pretokenizers") or []
    return steps


def run_job(job: list[Callable[[], Tokens]]) -> Tokens:
    """Return the result of the function in a list; raise `CancelledError` if the list is empty."""
    if not job:
        raise CancelledError
    return job.pop()()


def take_exception(future: asyncio.Future) -> None:
    """Read the exception of a future: asyncio logs those that no caller awaits anymore."""
    if not future.cancelled():
        future.exception()


class TokenizePool:
    """Two threads that read and tokenize the bodies of requests: one for small ones, one for large.

    So a small request never waits for a large one, nor do running streams.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int, max_queue: int):
        self.max_tokens = max_tokens
        self.max_queue = max_queue
        self.num_pending = 0
        self.lock = threading.Lock()  # of the count, which several threads change
        self.bytes_per_token = max_bytes_per_token(tokenizer)
        self.small = ThreadPoolExecutor(1, "tokenize-small")
        self.large = ThreadPoolExecutor(1, "tokenize-large")

    def check_length(self, num_bytes: int) -> None:
        """Raise a `UserError` for a prompt with so many bytes that it cannot fit."""
        if self.bytes_per_token and num_bytes > self.max_tokens * self.bytes_per_token:
            raise UserError(
                f"a prompt of {num_bytes} bytes cannot fit: it exceeds the limit of "
                f"{self.max_tokens} tokens, which have at most {self.bytes_per_token} bytes each; "
                "shorten the prompt"
            )

    def max_body_bytes(self, max_prompts: int, most: int) -> int:
        """Return how many bytes of JSON the prompts of a request may need, at most `most`."""
        if self.bytes_per_token is None:
            return most
        prompt_bytes = self.max_tokens * max(self.bytes_per_token, MAX_ID_BYTES)
        return min(most, OTHER_FIELDS_BYTES + max_prompts * prompt_bytes * MAX_ESCAPE)

    async def run(self, num_bytes: int, fn: Callable[[], Tokens]) -> Tokens:
        """Return fn(), which reads a body of `num_bytes`, from one of the threads.

        Raises `QueueFull` if too many bodies wait already. If the caller is cancelled, the body is
        dropped at once, but its place in the queue is free only when the thread comes to it.
        """
        with self.lock:
            if self.num_pending >= self.max_queue:
                raise QueueFull
            self.num_pending += 1
        pool = self.large if num_bytes > SMALL_BODY_BYTES else self.small
        job = [fn]  # empty once the result is no longer awaited
        try:
            future = pool.submit(run_job, job)
        except RuntimeError:  # the pool has been stopped
            self.forget()
            raise
        future.add_done_callback(self.forget)
        try:
            result = asyncio.wrap_future(future)
            result.add_done_callback(take_exception)
            return await asyncio.shield(result)
        finally:
            job.clear()

    def forget(self, _: object = None) -> None:
        """Count a body as read; called by the thread that has read it."""
        with self.lock:
            self.num_pending -= 1

    def stop(self) -> None:
        """Let the threads end, without waiting for them."""
        for pool in (self.small, self.large):
            pool.shutdown(wait=False, cancel_futures=True)
