# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 18 · Serving: many requests, one model

# %% [markdown]
# ## Why
# [Chapter 08](08_generate.ipynb) generates text for one caller. A server has many. Their requests arrive at any time, have
# prompts of any length, and may be canceled at any time. The simple way is to collect eight requests, decode them as one batch, and then
# take the next eight. But answers differ in length, and the batch takes as long as its longest answer: below, **more than half** of the
# batch slots are idle. A decoding step with eight requests costs far less than eight steps with one (measured below), so every idle slot wastes
# an answer that would have been cheap. *Continuous batching* refills a slot as soon as it becomes free.

# %%
import random

import matplotlib.pyplot as plt
import torch

from dsv3_ref.config import TINY
from dsv3_ref.viz import BLUE, GRAY, GREEN, ORANGE, checker, figure, play, show

torch.manual_seed(0)


def count_busy(lengths: list[int], num_slots: int, continuous: bool) -> list[int]:
    """Return the number of busy batch slots in every step."""
    waiting = list(lengths)
    running = []  # tokens left
    busy = []
    while waiting or running:
        if continuous or not running:
            while waiting and len(running) < num_slots:
                running.append(waiting.pop(0))
        busy.append(len(running))
        running = [n - 1 for n in running if n > 1]
    return busy


dice = random.Random(0)
lengths = [1 + int(dice.expovariate(1 / 60)) for _ in range(48)]
fig, ax = figure(1, 1, 8, 2.4)
for name, continuous, color in (
    ("one batch after another", False, ORANGE),
    ("continuous", True, BLUE),
):
    busy = count_busy(lengths, 8, continuous)
    share = sum(busy) / (8 * len(busy))
    ax.step(
        range(len(busy)), busy, color=color, label=f"{name}: {len(busy)} steps, {share:.0%} busy"
    )
ax.set(xlabel="step", ylabel="busy slots", ylim=(0, 11), title="48 answers, 8 batch slots")
ax.legend(loc="upper right", ncols=2, fontsize=8)
show(fig)
assert len(count_busy(lengths, 8, True)) < 0.65 * len(count_busy(lengths, 8, False))

# %% [markdown]
# ## Paper
# §3.4 deploys V3 as two services. *Prefill* processes prompts on units of 32 GPUs, and *decoding* generates text on units of 320. Each uses the parallelism that
# suits it, and the KV cache of a prompt is transferred from one to the other. Prefill processes two micro-batches at a time,
# so that one computes while the other communicates. In decoding each GPU holds one expert of every layer. Its batch is usually at most 256 tokens,
# so reading the expert's weights is the bottleneck. Experts in demand have copies ("redundant experts"), which are placed
# again about every ten minutes according to the observed loads. §5.4.3 lets MTP draft one token, which makes decoding 1.8 times as fast.
#
# The report does not describe the server itself: how memory is shared, which request waits, and when a known prefix is reused. We build that with ideas
# from PagedAttention (Kwon et al., 2023), Orca (Yu et al., 2022) and Sarathi (Agrawal et al., 2023). Of the last we take chunked prefill only: its main idea,
# *decode-maximal batching*, lets decoding tokens ride in the same pass as a chunk of a prompt, while we run two passes per step, one for chunks and one for decoding.
#
# Axes: `b` requests, `s` positions of this step, `t` positions in the cache, `p` pages, `y` slots of a page, `x` latent and rotary key, $c + r$ numbers; `l` layers, `h` heads, `d` model, `w` vocabulary.

# %%
#| export
import hashlib
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_ref.config import UserError, ceil_div
from dsv3_ref.decode import (
    InvalidLogits,
    LatentProjections,
    SamplingParams,
    decode_layers,
    decode_weights,
    penalize,
)
from dsv3_ref.mla import attend_expanded, paged_attention
from dsv3_ref.model import Transformer
from dsv3_ref.rope import rope_cos_sin

# %% [markdown]
# The engine has five parts, named as in vLLM. A `BlockPool` tracks which pages are free. A `Request` holds the tokens
# of one request. A `Scheduler` decides which requests are prefilled and which decode. A `ModelRunner` runs the model. A `Speculator` drafts tokens and verifies them. An `Engine` combines these parts.
#
# ## Pages
# The length of an answer is not known beforehand. Reserving the maximum length for each request would leave most of the memory empty. So the
# cache is divided into pages (in code: *blocks*) of $y$ positions, and each request has a *block table*, the list of its pages. Position $t$ of request $b$ is stored in
#
# $$\text{page}_t = \text{table}_{b,\lfloor t/y\rfloor},\qquad \text{slot}_t = t \bmod y$$
#
# which wastes at most $y-1$ positions per request. All layers use the same table.
#
# The latents of a page depend only on the tokens up to its end. So if a prompt begins like an earlier one, the two can *share*
# the pages of their common prefix. A full page is identified by a hash that covers all preceding tokens:
#
# $$\text{hash}_i = H(\text{hash}_{i-1},\ \text{tokens of page } i)$$
#
# $H$ is SHA-256: with a weak hash an attacker could construct a prompt that collides with another user's and is answered from that user's cache. Each page counts its users. A page that
# has a hash and no users is *evictable*: it stays until memory is needed, and then the least recently used page is evicted first. A
# request frees its pages from last to first, so a chain of pages loses its end before its beginning.


# %%
#| export
def hash_blocks(
    tokens: Sequence[int], block_size: int, prefix_hashes: Sequence[bytes] = (), salt: bytes = b""
) -> list[bytes]:
    """Return the hashes of full blocks, hash_i = SHA-256(hash_{i−1}, tokens of block i).

    prefix_hashes: known hashes of the first blocks. salt: stands for hash_{−1}.
    """
    hashes = list(prefix_hashes)
    for i in range(len(hashes), len(tokens) // block_size):
        block = array("q", tokens[i * block_size : (i + 1) * block_size]).tobytes()
        hashes.append(hashlib.sha256((hashes[-1] if hashes else salt) + block).digest())
    return hashes


class BlockPool:
    """The blocks of the cache: in use, evictable (unused, but known by hash) or free."""

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.free_blocks = list(range(num_blocks))[::-1]
        self.ref_cnt = [0] * num_blocks
        self.block_hash: dict[int, bytes] = {}  # of a full block
        self.cached_blocks: dict[bytes, int] = {}  # hash → block
        self.evictable: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_free(self) -> int:
        """The number of blocks that could be allocated."""
        return len(self.free_blocks) + len(self.evictable)

    @property
    def num_used(self) -> int:
        """The number of blocks with at least one user."""
        return self.num_blocks - self.num_free

    def allocate(self) -> int | None:
        """Return a block to write to, evicting one if necessary; None if all are in use."""
        if not self.num_free:
            return None
        if not self.free_blocks:
            block, _ = self.evictable.popitem(last=False)
            self.free_blocks.append(block)
            del self.cached_blocks[self.block_hash.pop(block)]
        block = self.free_blocks.pop()
        self.ref_cnt[block] = 1
        return block

    def get_cached_blocks(self, hashes: Sequence[bytes]) -> list[int]:
        """Return the blocks of the longest known prefix, and add one user to each."""
        blocks = []
        for block_hash in hashes:
            if (block := self.cached_blocks.get(block_hash)) is None:
                break
            self.evictable.pop(block, None)
            self.ref_cnt[block] += 1
            blocks.append(block)
        return blocks

    def free(self, blocks: Sequence[int]) -> None:
        """Remove one user from each of these blocks."""
        for block in reversed(blocks):
            self.ref_cnt[block] -= 1
            if not self.ref_cnt[block]:
                if block in self.block_hash:
                    self.evictable[block] = None
                else:
                    self.free_blocks.append(block)

    def cache_block(self, block: int, block_hash: bytes) -> None:
        """Register a full block under its hash, unless another block has that hash."""
        if block_hash not in self.cached_blocks and block not in self.block_hash:
            self.cached_blocks[block_hash] = block
            self.block_hash[block] = block_hash

    def reset_prefix_cache(self) -> None:
        """Forget all hashes; call it when the weights have changed."""
        self.free_blocks += self.evictable
        for table in (self.evictable, self.block_hash, self.cached_blocks):
            table.clear()


# %%
pool = BlockPool(6, 4)
first = [pool.allocate() for _ in range(3)]
hashes = hash_blocks(range(10), 4)  # two full pages and half of a third
for block, block_hash in zip(first, hashes):
    pool.cache_block(block, block_hash)
shared = pool.get_cached_blocks(hash_blocks([*range(8), 77, 78, 79, 80], 4))  # the third differs
assert shared == first[:2] and pool.ref_cnt[first[0]] == 2
pool.free(first)
pool.free(shared)
assert pool.num_free == 6
assert list(pool.evictable) == [first[1], first[0]]  # the end of the chain first
taken = [pool.allocate() for _ in range(5)]
assert pool.get_cached_blocks(hashes) == [first[0]]  # its successor was evicted
assert pool.allocate() is None and hash_blocks([5, *range(1, 8)], 4)[1] != hashes[1]
print("6 pages: 3 used, 2 of them shared, then evictable, found again, and finally evicted")

# %% [markdown]
# ## A request
# The state of a request is its tokens and the number $n$ of them that the model has processed. All stages of a request follow from
# these two. For a new prompt, $n = 0$. A request that decodes has exactly one unprocessed token, the one just sampled. A
# request that lost its pages starts again with $n = 0$, so prefill and recovery after preemption are the same code. With $D$ drafts the MTP modules have
# processed fewer tokens than the main model (chapter 08), and the hidden states of the positions in between are kept in `h_sd`.
#
# A `LogitsProcessor` applies a request's penalties (chapter 08), biases and minimum length. Draft $k$ is verified with the logits that follow the output and the
# drafts before it, so drafts do not change what penalties mean. Log-probabilities are those of the model itself, before any of this.


# %%
#| export
TokenLogprob = tuple[float, list[tuple[int, float]]]  # of a token, and its alternatives'


class QueueFull(Exception):
    """The queue has no room for another request."""


@dataclass(frozen=True)
class LogitsProcessor:
    """Changes to a request's logits before a token is chosen; none by default."""

    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit)
    min_tokens: int = 0  # output tokens before the first that may end the request

    @property
    def is_neutral(self) -> bool:
        """True if no logit is changed."""
        return self == LogitsProcessor()

    def __call__(self, request: "Request", logit_sw: Tensor, draft: Sequence[int] = ()) -> Tensor:
        """Return the logits of s positions, (s, w): after the output and 0 … s − 1 draft tokens."""
        if self.is_neutral:
            return logit_sw
        rows = enumerate(logit_sw)
        return torch.stack([self.process(request, logit_w, draft[:k]) for k, logit_w in rows])

    def process(self, request: "Request", logit_w: Tensor, draft: Sequence[int]) -> Tensor:
        """Return the logits of one position, (w,)."""
        output = [*request.output_tokens, *draft]
        logit_w = penalize(
            logit_w, request.prompt_tokens, output, self.repetition_penalty,
            self.presence_penalty, self.frequency_penalty,
        )  # fmt: skip
        if self.logit_bias:
            tokens, biases = zip(*self.logit_bias)
            logit_w[list(tokens)] += torch.tensor(biases).to(logit_w)
        if len(output) < self.min_tokens:
            logit_w[list(request.stop_token_ids)] = -torch.inf
        return logit_w


@dataclass(eq=False)
class Request:
    """One request: its tokens, how many of them are computed, and the blocks with their latents."""

    tokens: list[int]  # the prompt, then the output
    max_tokens: int
    # with its own random number generator, so that other requests have no influence
    sampling_params: SamplingParams = SamplingParams()
    stop_token_ids: frozenset[int] = frozenset()
    num_logprobs: int = -1  # alternatives per token; −1: no log-probabilities at all
    cache_salt: bytes = b""  # pages are shared only between requests with the same salt
    wants_prompt_logprobs: bool = False  # also those of the prompt; its whole prefill runs here
    logits_processor: LogitsProcessor = LogitsProcessor()
    num_computed_tokens: int = 0  # n
    num_mtp_computed_tokens: int = 0  # by the MTP modules
    h_sd: Tensor | None = None  # hidden states of the positions between the two counts
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_cached_blocks: int = 0  # blocks registered under their hash
    num_cached_tokens: int = 0  # prompt tokens found in the cache
    remote_prefill: bool = False  # another process computes the prompt
    local_prefill: bool = False  # another process could not compute the prompt
    num_present_tokens: int = 0  # in a prefill process: tokens that the receiver already has
    aborted: bool = False  # the client has disconnected
    finish_reason: str = ""  # stop, length, abort, prefilled, error; "" while it runs
    # per output token, unless num_logprobs is −1
    logprobs: list["TokenLogprob"] = field(default_factory=list)
    # per prompt token after the first, if wanted
    prompt_logprobs: list["TokenLogprob"] = field(default_factory=list)

    def __post_init__(self):
        self.num_prompt_tokens = len(self.tokens)

    @property
    def is_argmax(self) -> bool:
        """True if each token is the likeliest according to the model's own logits."""
        return self.sampling_params.is_greedy and self.logits_processor.is_neutral

    @property
    def lacks_prompt_logprobs(self) -> bool:
        """True if log-probabilities of the prompt are wanted and not all of them are known."""
        num_known = len(self.prompt_logprobs)
        return self.wants_prompt_logprobs and num_known < self.num_prompt_tokens - 1

    @property
    def prompt_tokens(self) -> list[int]:
        """The tokens of the prompt."""
        return self.tokens[: self.num_prompt_tokens]

    @property
    def output_tokens(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[self.num_prompt_tokens :]

    @property
    def pending_h_sd(self) -> Tensor:
        """The hidden states that the MTP modules have not processed; raises if there are none."""
        assert self.h_sd is not None, "the main model has not computed this request"
        return self.h_sd

    @property
    def num_prefill_tokens(self) -> int:
        """The number of tokens to compute before decoding, which begins with the last output."""
        return len(self.tokens) - (len(self.tokens) > self.num_prompt_tokens)

    @property
    def num_uncomputed_tokens(self) -> int:
        """The number of tokens that the model has not processed."""
        return len(self.tokens) - self.num_computed_tokens

    def append_tokens(self, tokens: list[int]) -> list[int]:
        """Append tokens up to the first that ends the request; return what was appended."""
        for i, token in enumerate(tokens):
            self.tokens.append(token)
            if token in self.stop_token_ids:
                self.finish_reason = "stop"
            elif len(self.tokens) - self.num_prompt_tokens == self.max_tokens:
                self.finish_reason = "length"
            if self.finish_reason:
                return tokens[: i + 1]
        return tokens


class StepOutput(NamedTuple):
    """New tokens of a request, or its end: a value, which later steps do not change."""

    request: Request
    tokens: list[int]
    logprobs: list[TokenLogprob]  # of these tokens, if requested
    finish_reason: str  # "" while the request runs
    error: str = ""  # what ended it, if the finish reason is "error"


# %% [markdown]
# ## The scheduler
# The engine repeats one step: **admit** requests while there is room; **prefill** at most `prefill_chunk` prompt tokens, oldest request first; **decode** one token for
# every request whose prompt is complete; **remove** finished requests. Processing a prompt of $N$ tokens at once would stall
# all other requests for as long as $N$ tokens take. With chunks, the time between two tokens is bounded:
#
# $$\text{time of a step} \le \text{time}(\text{tokens of a chunk}) + \text{time}(\text{one token of every request})$$
#
# Pages are allocated only when they are needed. If none is free, the *youngest* request is preempted: it gives up all of its pages and returns to the front of the queue. The
# oldest request is never preempted, so every request finishes. A request that would not fit even alone is rejected on arrival. The scheduler never sees the model: all of its decisions are based on counts.


# %%
#| export
class Scheduler:
    """The queue, the running requests and their blocks; independent of the model."""

    def __init__(
        self, block_pool: BlockPool, max_num_seqs: int, max_queue: int, prefill_chunk: int,
        num_speculative_tokens: int, max_model_len: int, prefill_only: bool = False,
    ):  # fmt: skip
        self.block_pool, self.block_size = block_pool, block_pool.block_size
        self.max_num_seqs, self.max_queue = max_num_seqs, max_queue
        self.prefill_chunk, self.prefill_only = prefill_chunk, prefill_only
        self.num_speculative_tokens = num_speculative_tokens
        num_slots = block_pool.num_blocks * self.block_size
        self.max_model_len = min(max_model_len, num_slots - num_speculative_tokens)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # the oldest first
        self.counters: Counter = Counter()

    def submit(self, *requests: Request) -> None:
        """Queue all requests or none.

        Raises `QueueFull`, or a `UserError` for a request that would not fit even alone.
        """
        for request in requests:
            if not request.tokens or request.max_tokens < 0:
                raise UserError(
                    "a request needs at least one prompt token, and max_tokens cannot be negative"
                )
            if request.num_prompt_tokens + request.max_tokens > self.max_model_len:
                raise UserError(
                    f"a prompt of {request.num_prompt_tokens} tokens and {request.max_tokens} new "
                    f"tokens exceed the limit of {self.max_model_len}: shorten the prompt or lower "
                    "max_tokens"
                )
        if len(self.waiting) + len(requests) > self.max_queue:
            raise QueueFull
        self.waiting.extend(requests)

    def schedule_waiting(self) -> None:
        """Admit requests in order while there are free slots and enough blocks for all prompts."""
        while self.waiting and len(self.running) < self.max_num_seqs:
            promised = sum(max(0, self.num_blocks_needed(request)) for request in self.running)
            needed = promised + self.num_blocks_needed(self.waiting[0])
            if self.running and needed > self.block_pool.num_free:
                return
            self.running.append(self.waiting.popleft())

    def num_blocks_needed(self, request: Request) -> int:
        """Return how many more blocks a request needs before it can decode."""
        num_slots = len(request.tokens) + 1 + self.num_speculative_tokens
        return ceil_div(num_slots, self.block_size) - len(request.block_ids)

    def is_decoding(self, request: Request) -> bool:
        """Return whether a request can decode: its prompt is computed and it has not finished."""
        is_prefilled = request.num_uncomputed_tokens == 1 and not request.remote_prefill
        if self.num_speculative_tokens:  # drafts follow an output
            is_prefilled &= len(request.tokens) > request.num_prompt_tokens
        wants_tokens = request.max_tokens > 0 and not self.prefill_only
        return is_prefilled and wants_tokens and not request.finish_reason

    def schedule_chunk(
        self, request: Request, budget: int, send_remote: Callable[[Request], bool] | None = None
    ) -> int:
        """Return how many tokens of a running request to compute now, at most `budget`.

        The caller must compute them before it schedules the next chunk, which may share their
        blocks. send_remote: sends a whole prompt to another process; returns False if it cannot.
        """
        idle = request.remote_prefill or request.finish_reason or self.is_decoding(request)
        if idle or not budget or request not in self.running:
            return 0
        if not request.block_ids:
            self.match_prefix(request)
        if send_remote and self.prefill_remotely(request, send_remote):
            return 0
        num_tokens = min(budget, request.num_prefill_tokens - request.num_computed_tokens)
        is_allocated = self.allocate_slots(request, request.num_computed_tokens + num_tokens)
        return num_tokens if is_allocated else 0

    def prefill_remotely(self, request: Request, send_remote: Callable[[Request], bool]) -> bool:
        """Allocate a prompt's blocks and send it; return whether no local prefill is needed now."""
        is_local = request.local_prefill or request.lacks_prompt_logprobs
        if request.num_uncomputed_tokens == 1 or is_local:
            return False
        if self.allocate_slots(request, request.num_prefill_tokens):
            request.remote_prefill = send_remote(request)
        return request.remote_prefill or request not in self.running

    def schedule_decode(self, request: Request) -> bool:
        """Return whether a request decodes in this step, after allocating its blocks."""
        num_slots = request.num_computed_tokens + 1 + self.num_speculative_tokens
        is_ready = request in self.running and self.is_decoding(request)
        return is_ready and self.allocate_slots(request, num_slots)

    def match_prefix(self, request: Request) -> None:
        """Give a request the cached blocks of its prefix; leave at least one token to compute."""
        if request.lacks_prompt_logprobs:  # they are not cached
            return
        num_tokens = len(request.tokens) - 1
        if self.num_speculative_tokens:
            num_tokens = max(0, request.num_prefill_tokens - self.num_speculative_tokens)
        hashes = self.hash_request(request, num_tokens // self.block_size)
        request.block_ids = self.block_pool.get_cached_blocks(hashes)
        request.num_cached_blocks = len(request.block_ids)
        num_tokens = request.num_cached_blocks * self.block_size
        request.num_computed_tokens = request.num_mtp_computed_tokens = num_tokens
        request.num_cached_tokens = min(num_tokens, request.num_prompt_tokens)
        self.counters["prefix_cache_hits"] += num_tokens

    def hash_request(self, request: Request, num_blocks: int) -> list[bytes]:
        """Return the hashes of the first blocks of a request, and keep them.

        With D drafts each hash covers the D tokens after its block too.
        """
        depth = self.num_speculative_tokens
        salt = request.cache_salt + array("q", request.tokens[:depth]).tobytes()
        tokens = request.tokens[depth : depth + num_blocks * self.block_size]
        hashes = hash_blocks(tokens, self.block_size, request.block_hashes, salt)
        request.block_hashes = hashes
        return hashes[:num_blocks]

    def allocate_slots(self, request: Request, num_slots: int) -> bool:
        """Give a request blocks for `num_slots` positions, preempting the youngest if necessary.

        Returns False if the request must wait or was itself preempted.
        """
        while len(request.block_ids) * self.block_size < num_slots:
            if (block := self.block_pool.allocate()) is not None:
                request.block_ids.append(block)
                continue
            victims = (r for r in reversed(self.running) if self.is_preemptible(r))
            victim = next(victims, request)
            if victim is request and any(r.remote_prefill for r in self.running):
                return False
            self.preempt(victim)
            if victim is request:
                return False
        return True

    def is_preemptible(self, request: Request) -> bool:
        """Return whether preempting a running request would free blocks."""
        return bool(request.block_ids) and not (request.remote_prefill or request.finish_reason)

    def preempt(self, request: Request) -> None:
        """Free a request's blocks and return it to the front of the queue."""
        self.running.remove(request)
        self.free(request)
        self.waiting.appendleft(request)
        self.counters["preemptions"] += 1

    def free(self, request: Request) -> None:
        """Free the blocks of a request and reset its counts of computed tokens."""
        self.block_pool.free(request.block_ids)
        request.block_ids, request.h_sd = [], None
        request.num_cached_blocks = 0
        request.num_computed_tokens = request.num_mtp_computed_tokens = 0

    def cache_full_blocks(self, request: Request) -> None:
        """Register full blocks under their hashes, once the MTP modules have filled them too."""
        num_tokens = request.num_computed_tokens
        if self.num_speculative_tokens:
            num_tokens = min(num_tokens, request.num_mtp_computed_tokens)
        num_full = num_tokens // self.block_size
        if num_full <= request.num_cached_blocks:
            return
        hashes = self.hash_request(request, num_full)
        for i in range(request.num_cached_blocks, num_full):
            self.block_pool.cache_block(request.block_ids[i], hashes[i])
        request.num_cached_blocks = num_full

    def drop_aborted(self) -> list[Request]:
        """Remove aborted requests, running or waiting, and free their blocks; return them."""
        aborted = [r for r in [*self.running, *self.waiting] if r.aborted]
        for request in aborted:
            request.finish_reason = "abort"
            queue = self.running if request in self.running else self.waiting
            queue.remove(request)
            self.free(request)
        return aborted

    def drop_finished(self) -> None:
        """Remove finished requests and free their blocks."""
        for request in [r for r in self.running if r.finish_reason]:
            self.running.remove(request)
            self.free(request)


# %%
scheduler = Scheduler(
    BlockPool(num_blocks=4, block_size=4), max_num_seqs=3, max_queue=3, prefill_chunk=16,
    num_speculative_tokens=0, max_model_len=16,
)  # fmt: skip
old, young = Request([1] * 6, 8), Request([2] * 6, 8)
scheduler.submit(old, young)
scheduler.schedule_waiting()
assert scheduler.allocate_slots(old, 7) and scheduler.allocate_slots(young, 7)
assert scheduler.block_pool.num_free == 0
assert scheduler.allocate_slots(old, 9) and not young.block_ids and scheduler.waiting[0] is young
for request, sentence in (
    (Request([1] * 9, 8), "the limit of 16"),
    (Request([], 1), "at least one prompt token"),
):
    try:
        scheduler.submit(request)
    except UserError as e:
        assert sentence in str(e)
young.aborted = True
assert scheduler.drop_aborted() == [young] and not scheduler.waiting
print("4 pages, two requests of up to 14 tokens: the younger was preempted for the older")

# %% [markdown]
# ## The model runner
# A step batches requests of different lengths. In each head, the query of request $b$ at position $n_b$ attends to the request's own positions up to $n_b$:
#
# $$o_b = \sum_{t \le n_b} p_{bt}\,c_t,\qquad p_{bt} = \operatorname{softmax}_{t \le n_b}\big(\sigma\,(q^C_b \cdot c_t + q^R_b\cdot k_t)\big),\qquad c_t, k_t\ \text{from}\ \text{page}_t, \text{slot}_t$$
#
# with $\sigma$ the softmax scale, $q^C$ the query's content part already mapped into the latent space, and $k_t$ the rotary key: $(b,s,h,x) \times (p,y,x) \to (b,s,h,c)$.
#
# This is `paged_attention` of [chapter 03](03_mla.ipynb), for which there is [a GPU kernel](../kernels/decode.py). Its plain form processes
# one request after another; on a CPU the backend "cpu" ([`decoder.py`](../dsv3_ref/cpu/decoder.py)) gathers the pages of all requests at once.
# Padding is written to one extra page, which is kept at zero: attention masks it, but $0\cdot\text{NaN}$ is NaN, and one request must not harm another. For the same reason the pages of a request that ends with an error are cleared. The layers are those of chapter 08 with a different attention: over pages.


# %%
#| export
class PagedPositions(NamedTuple):
    """The positions of s new tokens per request: `DecodePositions` of chapter 08, for blocks."""

    cache_index: tuple[Tensor, Tensor]  # (block, slot), both (b, s)
    freqs_cis: Tensor  # rotations, (b, s, 1, r/2)
    block_table_bp: Tensor  # int32
    cache_seqlens_b: Tensor  # lengths after this step
    is_prefill: bool  # a prompt's first chunk: attention on expanded keys and values
    has_padding: bool  # some latents are written to the padding block


class PagedAttention:
    """MLA with a cache of blocks, (p, y, c + r)."""

    def __init__(self, projections: LatentProjections, kv_pyx: Tensor):
        self.projections, self.kv_pyx = projections, kv_pyx

    def __call__(self, x_bsd: Tensor, positions: PagedPositions) -> Tensor:
        """Apply eq. 1–11 to the new tokens at these positions."""
        mla, c = self.projections, self.projections.config.kv_lora_rank
        q_bshi, q_bshr = mla.queries(x_bsd, positions.freqs_cis)
        kv_bsx = mla.latents(x_bsd, positions.freqs_cis).to(self.kv_pyx.dtype)
        self.kv_pyx[positions.cache_index] = kv_bsx
        if positions.has_padding:  # a masked NaN is still a NaN: 0 · NaN
            self.kv_pyx[-1] = 0
        if positions.is_prefill:
            c_bsc, k_bsr = kv_bsx.tensor_split([c], dim=-1)
            return mla.output(attend_expanded(q_bshi, q_bshr, c_bsc, k_bsr, mla.wkv_b, mla.scale))
        q_bshx, table_bp = mla.absorb(q_bshi, q_bshr), positions.block_table_bp
        o_bshc = paged_attention(
            q_bshx, self.kv_pyx, table_bp, positions.cache_seqlens_b, c, mla.scale
        )
        return mla.output(mla.unabsorb(o_bshc))


# %% [markdown]
# A prompt may also be prefilled by *another process*, as in the report: the prompt is sent there, and a `KVTransfer` with its latents comes back. At
# full size these are $L\,(c + r)$ numbers per token (70 kB), sent once. Pages that the receiver already has are not sent.


# %%
#| export
class KVTransfer(NamedTuple):
    """A prompt computed by another process: latents of positions start … n − 1 in all layers."""

    start: int
    kv_lsx: Tensor
    num_mtp_computed_tokens: int
    h_sd: Tensor  # hidden states of positions num_mtp_computed_tokens … n − 1; empty without drafts
    logit_w: Tensor  # after the last token


class ModelRunner:
    """A model with a cache of blocks, plus one that receives padding."""

    def __init__(self, model: Transformer, num_blocks: int, block_size: int):
        self.model = model
        self.block_size = block_size
        self.padding_block = num_blocks
        config, w = model.config, model.embed.weight
        shape = num_blocks + 1, block_size, config.kv_lora_rank + config.qk_rope_head_dim
        n_layers = len(model.layers) + len(model.mtp)
        self.kv_caches = [
            torch.zeros(shape, device=w.device, dtype=w.dtype) for _ in range(n_layers)
        ]
        self.device, position_t = w.device, torch.arange(config.max_seq_len, device=w.device)
        self.freqs_cis_tx = torch.complex(*rope_cos_sin(config, position_t))
        self.build_layers()

    def build_layers(self) -> None:
        """Build the layers from the current weights, with the same cache."""
        weights, caches = decode_weights(self.model), iter(self.kv_caches)
        self.logits = weights.logits
        self.layers = decode_layers(
            self.model, weights, lambda projections: PagedAttention(projections, next(caches))
        )

    def positions(self, tables: list[list[int]], starts: list[int], s: int) -> PagedPositions:
        """Return s positions per request, from `starts`; missing blocks are padding."""
        width = ceil_div(max(starts) + s, self.block_size)
        padded = [[*x[:width], *[self.padding_block] * (width - len(x))] for x in tables]
        table_bp = torch.tensor(padded)
        position_bs = torch.tensor(starts)[:, None] + torch.arange(s)
        block_bs = table_bp.gather(1, position_bs // self.block_size)
        has_padding = bool((block_bs == self.padding_block).any())
        index = block_bs.to(self.device), (position_bs % self.block_size).to(self.device)
        seqlens_b, last = position_bs[:, -1].to(self.device) + 1, len(self.freqs_cis_tx) - 1
        freqs_cis = self.freqs_cis_tx[position_bs.to(self.device).clamp(max=last)[..., None]]
        table_bp = table_bp.int().to(self.device)
        is_prefill = not any(starts)
        return PagedPositions(index, freqs_cis, table_bp, seqlens_b, is_prefill, has_padding)

    def embed(self, token_bs: list[list[int]] | Tensor) -> Tensor:
        """Return the embeddings of tokens, (b, s, d)."""
        return F.embedding(torch.as_tensor(token_bs, device=self.device), self.model.embed.weight)

    def hidden_states(
        self, token_bs: list[list[int]] | Tensor, positions: PagedPositions
    ) -> Tensor:
        """Return h⁰ of these tokens, (b, s, d), normalized."""
        x_bsd = self.embed(token_bs)
        for layer in self.layers[: len(self.model.layers)]:
            x_bsd = layer(x_bsd, positions)
        return self.model.norm(x_bsd)

    def mtp_forward(
        self, k: int, h_bsd: Tensor, token_bs: list[list[int]], positions: PagedPositions
    ) -> Tensor:
        """Return h^k of the same positions from h^{k−1} and the tokens k later (eq. 21–22)."""
        layer = self.layers[len(self.model.layers) + k - 1]
        return layer(torch.cat((self.embed(token_bs), h_bsd), dim=-1), positions)

    def prefill_step(self, request: Request, num_tokens: int) -> Tensor:
        """Compute the next tokens of a request; return their hidden states, (s, d)."""
        start = request.num_computed_tokens
        positions = self.positions([request.block_ids], [start], num_tokens)
        return self.hidden_states([request.tokens[start : start + num_tokens]], positions)[0]

    def decode_step(
        self, requests: list[Request], drafts: list[list[int]]
    ) -> tuple[Tensor, Tensor]:
        """Compute the last token of every request and its drafts, the same number for each.

        Returns hidden states, (b, s, d), and logits, (b, s, w).
        """
        token_bs = [[request.tokens[-1], *draft] for request, draft in zip(requests, drafts)]
        tables = [request.block_ids for request in requests]
        starts = [request.num_computed_tokens for request in requests]
        h_bsd = self.hidden_states(token_bs, self.positions(tables, starts, len(token_bs[0])))
        return h_bsd, self.logits(h_bsd)

    def export_kv(self, request: Request, logit_w: Tensor) -> KVTransfer:
        """Return the latents, hidden states and logits that the decoding process needs."""
        start = min(request.num_present_tokens, request.num_computed_tokens)
        index = self.slots(request, start, request.num_computed_tokens)
        kv_lsx = torch.stack([kv_pyx[index] for kv_pyx in self.kv_caches])
        h_sd = kv_lsx.new_empty(0, 0) if request.h_sd is None else request.h_sd
        return KVTransfer(start, kv_lsx, request.num_mtp_computed_tokens, h_sd, logit_w)

    def import_kv(self, request: Request, transfer: KVTransfer) -> None:
        """Write the latents of a prompt into the blocks of its request."""
        index = self.slots(request, transfer.start, request.num_prefill_tokens)
        for kv_pyx, kv_sx in zip(self.kv_caches, transfer.kv_lsx):
            kv_pyx[index] = kv_sx.to(kv_pyx)

    def clear_blocks(self, blocks: list[int]) -> None:
        """Overwrite blocks that may hold NaN, which would spread to their next request.

        Raises the error of a device that can no longer compute.
        """
        for kv_pyx in self.kv_caches:
            kv_pyx[blocks] = 0
        torch.zeros(1, device=self.device).item()

    def slots(self, request: Request, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Return (block, slot) of the positions start … end − 1 of a request."""
        position_s = torch.arange(start, end)
        block_s = torch.tensor(request.block_ids)[position_s // self.block_size]
        return block_s, position_s % self.block_size


# %% [markdown]
# Hidden states of requests of different lengths must equal those of a plain forward pass, wherever their pages lie and however the prompt was divided into chunks. Both
# forms of the op must agree.

# %%
from dataclasses import replace

from dsv3_ref.ops import use

model = Transformer(replace(TINY, vocab_size=256, n_layers=3, n_mtp_layers=2)).eval()
with torch.inference_mode():
    token_bs = torch.randint(256, (2, 20))
    want_bsd = model.hidden_states(token_bs)[0]
    tables = [[7, 2, 9, 0, 11], [3, 1, 10, 5, 6]]
    for backends in (("cpu", "torch"), ("torch",)):
        with use(*backends):
            runner = ModelRunner(model, 12, 4)
            for row, ends in ((0, (0, 9, 13)), (1, (0, 7))):  # in chunks
                for a, z in zip(ends, ends[1:]):
                    positions = runner.positions(tables[row : row + 1], [a], z - a)
                    runner.hidden_states(token_bs[row : row + 1, a:z], positions)
            positions = runner.positions(tables, [13, 7], 3)  # then as one batch
            both_bs = torch.stack((token_bs[0, 13:16], token_bs[1, 7:10]))
            got_bsd = runner.hidden_states(both_bs, positions)
        assert torch.allclose(got_bsd[0], want_bsd[0, 13:16], atol=1e-4)
        assert torch.allclose(got_bsd[1], want_bsd[1, 7:10], atol=1e-4)
print("requests of 16 and 10 positions in scattered pages: same as in a plain forward pass")

# %% [markdown]
# ## The speculator
# With $D$ drafts a step processes $D+1$ tokens of every request. For request $b$ it keeps the $a_b$ drafts that the main model accepts and one token of its own. Requests
# therefore advance at different speeds, which paging allows. The MTP modules catch up on the tokens accepted since their last step:
#
# $$\text{mtp}_b \leftarrow \max(\text{mtp}_b,\ n_b + 1 - D) \ \text{ before }\ n_b \leftarrow n_b + 1 + a_b$$
#
# Requests that share pages also share the latents of the MTP modules. In the last $D$ positions of a page these depend on the $D$ tokens *after* the page. So with drafts
# the hash of a page covers those tokens too. Otherwise another user's continuation could change a draft, and with it how many random numbers the request draws.
#
# Each request is verified and sampled separately, with its own random number generator. A fault (an exception, or logits that are not finite) then ends one request instead of the batch.


# %%
#| export
@dataclass
class Draft:
    """The drafts of one request and the distributions they were sampled from (if T > 0)."""

    tokens: list[int] = field(default_factory=list)
    distributions: list[Tensor] = field(default_factory=list)
    fault: Exception | None = None  # raised while drafting


class Speculator:
    """Drafting by the MTP modules and verification by the main model.

    With 0 speculative tokens it samples one token per request and step.
    """

    def __init__(self, runner: ModelRunner, num_speculative_tokens: int):
        num_modules = len(runner.model.mtp)
        if not 0 <= num_speculative_tokens <= num_modules:
            raise UserError(
                f"num_speculative_tokens is {num_speculative_tokens}, but must be 0 to "
                f"{num_modules}, the number of MTP modules of the model"
            )
        self.runner, self.num_speculative_tokens = runner, num_speculative_tokens

    def extend(self, request: Request, h_sd: Tensor) -> None:
        """Add the hidden states of a chunk, and run the MTP modules on them."""
        if self.num_speculative_tokens:
            request.h_sd = h_sd if request.h_sd is None else torch.cat((request.h_sd, h_sd))
            self.catch_up(request)

    def catch_up(self, request: Request) -> None:
        """Run the MTP modules on computed positions whose following tokens are known."""
        start = request.num_mtp_computed_tokens
        num_known = request.num_prefill_tokens - self.num_speculative_tokens
        end = min(request.num_computed_tokens, num_known)
        if (s := end - start) <= 0:
            return
        positions = self.runner.positions([request.block_ids], [start], s)
        h_bsd = request.pending_h_sd[None, :s]
        for k in range(1, self.num_speculative_tokens + 1):
            token_bs = [request.tokens[start + k : end + k]]
            h_bsd = self.runner.mtp_forward(k, h_bsd, token_bs, positions)
        if not h_bsd.isfinite().all():
            raise InvalidLogits
        request.h_sd, request.num_mtp_computed_tokens = request.pending_h_sd[s:], end

    def propose(self, requests: list[Request]) -> list[Draft]:
        """Return D drafts for every request."""
        drafts = [Draft() for _ in requests]
        if not self.num_speculative_tokens:
            return drafts
        starts = [request.num_mtp_computed_tokens for request in requests]
        behind = [r.num_computed_tokens - start for r, start in zip(requests, starts)]
        s, last_b = max(behind), [n - 1 for n in behind]
        positions = self.runner.positions([r.block_ids for r in requests], starts, s)
        states = [request.pending_h_sd for request in requests]
        h_bsd = torch.stack([F.pad(h_sd, (0, 0, 0, s - len(h_sd))) for h_sd in states])
        for k in range(1, self.num_speculative_tokens + 1):
            texts = [[*r.tokens[a + k :], *d.tokens] for r, a, d in zip(requests, starts, drafts)]
            token_bs = [(text + [0] * s)[:s] for text in texts]
            h_bsd = self.runner.mtp_forward(k, h_bsd, token_bs, positions)
            self.draft(requests, drafts, self.runner.logits(h_bsd[range(len(requests)), last_b]))
        return drafts

    def draft(self, requests: list[Request], drafts: list[Draft], logit_bw: Tensor) -> None:
        """Append one token to every draft; keep an exception with the draft that it belongs to."""
        argmax_b, valid_b = logit_bw.argmax(-1).tolist(), logit_bw.amax(-1).isfinite().tolist()
        for i, (request, draft) in enumerate(zip(requests, drafts)):
            draft.tokens.append(argmax_b[i])
            try:
                if not valid_b[i]:
                    raise InvalidLogits
                if not request.is_argmax:
                    self.draw(request, draft, logit_bw[i])
            except Exception as e:
                draft.fault = e

    def draw(self, request: Request, draft: Draft, logit_w: Tensor) -> None:
        """Replace the last token of a draft by one that follows the request's parameters."""
        processor = request.logits_processor
        if not processor.is_neutral:
            logit_w = processor.process(request, logit_w, draft.tokens[:-1])
        token_b, q_bw = request.sampling_params.draft(logit_w[None])
        draft.tokens[-1] = int(token_b)
        if q_bw is not None:  # as at T = 0
            draft.distributions.append(q_bw)

    def verify(
        self, request: Request, logit_sw: Tensor, argmax_s: list[int], draft: Draft
    ) -> list[int]:
        """Return the new tokens of a request: accepted drafts and one more token."""
        if draft.fault:
            raise draft.fault
        params, processor = request.sampling_params, request.logits_processor
        if not processor.is_neutral:
            logit_sw = processor(request, logit_sw, draft.tokens)
            argmax_s = logit_sw.argmax(-1).tolist()
        if params.is_greedy:
            wrong = (k for k, token in enumerate(draft.tokens) if token != argmax_s[k])
            return argmax_s[: next(wrong, len(draft.tokens)) + 1]
        if not draft.tokens:
            return [int(params.sample(logit_sw))]
        draft_bk = torch.tensor([draft.tokens], device=logit_sw.device)
        n_b, token_b = params.verify(logit_sw[None], draft.distributions, draft_bk)
        return [*draft.tokens[: int(n_b)], int(token_b)]

    def advance(self, request: Request, h_sd: Tensor, num_accepted: int) -> None:
        """Advance both counts, as in chapter 08, and keep the hidden states between them."""
        start, n = request.num_mtp_computed_tokens, request.num_computed_tokens + 1 + num_accepted
        mtp = max(start, request.num_computed_tokens + 1 - self.num_speculative_tokens)
        if self.num_speculative_tokens:
            request.h_sd = torch.cat((request.pending_h_sd, h_sd))[mtp - start : n - start]
        request.num_computed_tokens, request.num_mtp_computed_tokens = n, mtp


# %% [markdown]
# ## The engine
# Now the whole step is short. There is one more hook: `call_between_steps(fn)` runs `fn(model)` between two steps, for a server that
# moves its experts to balance the load (§3.4.1). Running requests continue afterwards.
#
# What concerns one request runs inside `isolate`: an exception ends that request with the finish reason "error". An exception of the whole batch, or of a device that can no longer compute, is raised by `step`:
# then the engine cannot be trusted anymore. Each step returns its results as values (`StepOutput`): a request can end within the step that gave it its first tokens, and both facts are told apart.


# %%
#| export
class Engine:
    """Continuous batching of many requests with one model; one thread calls `step` repeatedly."""

    def __init__(self, scheduler: Scheduler, runner: ModelRunner, speculator: Speculator):
        self.scheduler = scheduler
        self.runner = runner
        self.speculator = speculator
        self.counters = scheduler.counters
        self.pending_callbacks: deque = deque()  # (fn, reset_prefix_cache, future)
        self.send_remote: Callable[[Request], bool] | None = None  # to a prefill process
        self.outputs: list[StepOutput] = []  # of the current step
        self.incoming_transfers: deque[tuple[Request, KVTransfer]] = deque()
        self.outgoing_transfers: list[tuple[Request, KVTransfer]] = []  # of a prefill process

    def submit(self, *requests: Request) -> None:
        """Queue all requests or none; raises what `Scheduler.submit` raises."""
        self.scheduler.submit(*requests)

    def has_unfinished_requests(self) -> bool:
        """Return whether any request is running or waiting."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def call_between_steps(self, fn: Callable, reset_prefix_cache: bool = False) -> Future:
        """Run fn(model) before the next step; return a future of its result.

        reset_prefix_cache: set it if fn changes what the model computes.
        """
        future: Future = Future()
        self.pending_callbacks.append((fn, reset_prefix_cache, future))
        return future

    def run_pending_callbacks(self) -> None:
        """Run the functions passed to `call_between_steps`."""
        while self.pending_callbacks:
            fn, reset_prefix_cache, future = self.pending_callbacks.popleft()
            try:
                result = fn(self.runner.model)
            except Exception as e:
                future.set_exception(e)
            else:
                future.set_result(result)
            self.runner.build_layers()  # also after an exception: fn may have changed some weights
            if reset_prefix_cache:
                self.scheduler.block_pool.reset_prefix_cache()

    def step(self) -> list[StepOutput]:
        """Do one step; return the new tokens and the ends of requests, in order."""
        self.outputs = []
        self.run_pending_callbacks()
        for request in self.scheduler.drop_aborted():
            self.end(request, "abort")
        with torch.inference_mode():
            self.finish_remote_prefills()
            self.scheduler.schedule_waiting()
            self.prefill()
            if batch := self.decode_batch():
                self.decode(batch)
        self.scheduler.drop_finished()
        self.counters["steps"] += 1
        return self.outputs

    def end(self, request: Request, finish_reason: str, error: str = "") -> None:
        """End a request without a new token."""
        request.finish_reason = finish_reason
        self.outputs.append(StepOutput(request, [], [], finish_reason, error))

    @contextmanager
    def isolate(self, request: Request) -> Iterator[None]:
        """End a request with the finish reason "error" if the code inside raises an exception.

        Raises the exception of a device that can no longer compute.
        """
        try:
            yield
        except Exception as e:
            self.runner.clear_blocks(request.block_ids[request.num_cached_blocks :])
            self.counters["errors"] += 1
            self.end(request, "error", str(e) if isinstance(e, UserError) else repr(e))

    def prefill(self) -> None:
        """Compute up to `prefill_chunk` tokens of prompts, oldest request first."""
        budget = self.scheduler.prefill_chunk
        for request in list(self.scheduler.running):
            with self.isolate(request):
                num_tokens = self.scheduler.schedule_chunk(request, budget, self.send_remote)
                budget -= num_tokens
                if num_tokens:
                    self.prefill_chunk(request, num_tokens)

    def prefill_chunk(self, request: Request, num_tokens: int) -> None:
        """Compute the next tokens of a prompt; after its last one, sample the first new token."""
        h_sd = self.runner.prefill_step(request, num_tokens)
        if not h_sd.isfinite().all():
            raise InvalidLogits
        self.counters["prompt_tokens"] += num_tokens
        self.append_prompt_logprobs(request, h_sd)
        request.num_computed_tokens += num_tokens
        self.speculator.extend(request, h_sd)
        self.scheduler.cache_full_blocks(request)
        if request.num_uncomputed_tokens:  # also after preemption: the last output is decoded
            return
        logit_w = self.runner.logits(h_sd[-1:])[0]
        if self.scheduler.prefill_only:
            self.outgoing_transfers.append((request, self.runner.export_kv(request, logit_w)))
            self.end(request, "prefilled")
        else:
            self.append_first_token(request, logit_w)

    def append_prompt_logprobs(self, request: Request, h_sd: Tensor) -> None:
        """Append log-probabilities of the prompt tokens after the positions of a chunk."""
        if not request.lacks_prompt_logprobs:
            return
        start = request.num_computed_tokens
        first = len(request.prompt_logprobs)  # more than `start` after a preemption
        end = min(start + len(h_sd), request.num_prompt_tokens - 1)
        if first < end:
            logit_sw = self.runner.logits(h_sd[first - start : end - start])
            request.prompt_logprobs += logprobs_with_alternatives(
                request.tokens[first + 1 : end + 1], logit_sw, request.num_logprobs
            )

    def append_first_token(self, request: Request, logit_w: Tensor) -> None:
        """Sample the token after a prompt, or end a request that wants none."""
        if not request.max_tokens:
            self.end(request, "length")
            return
        logit_sw = request.logits_processor(request, logit_w[None])
        token = int(request.sampling_params.sample(logit_sw))
        self.append_output(request, [token], logit_w[None])

    def decode_batch(self) -> list[Request]:
        """Return the requests that decode in this step."""
        batch = []
        for request in list(self.scheduler.running):
            with self.isolate(request):
                if self.scheduler.schedule_decode(request):
                    batch.append(request)
        running = self.scheduler.running  # without those that were preempted meanwhile
        return [request for request in batch if request in running and not request.finish_reason]

    def decode(self, requests: list[Request]) -> None:
        """Compute D + 1 tokens of every request; append 1 to D + 1 new tokens to each."""
        drafts = self.speculator.propose(requests)
        h_bsd, logit_bsw = self.runner.decode_step(requests, [draft.tokens for draft in drafts])
        valid_bs = logit_bsw.amax(-1).isfinite() & h_bsd.isfinite().all(-1)
        valid_b, argmax_bs = valid_bs.all(-1).tolist(), logit_bsw.argmax(-1).tolist()
        for i, request in enumerate(requests):
            with self.isolate(request):
                if not valid_b[i]:
                    raise InvalidLogits
                tokens = self.speculator.verify(request, logit_bsw[i], argmax_bs[i], drafts[i])
                self.counters["draft_tokens"] += len(drafts[i].tokens)
                self.counters["accepted_tokens"] += len(tokens) - 1
                self.speculator.advance(request, h_bsd[i], len(tokens) - 1)
                self.append_output(request, tokens, logit_bsw[i])

    def append_output(self, request: Request, tokens: list[int], logit_sw: Tensor) -> None:
        """Append new tokens to a request, and report them with their log-probabilities."""
        tokens = request.append_tokens(tokens)
        # it may have ended within the accepted drafts
        request.num_computed_tokens = min(request.num_computed_tokens, len(request.tokens) - 1)
        logprobs = logprobs_with_alternatives(tokens, logit_sw, request.num_logprobs)
        request.logprobs += logprobs
        self.scheduler.cache_full_blocks(request)
        self.counters["generation_tokens"] += len(tokens)
        self.outputs.append(StepOutput(request, tokens, logprobs, request.finish_reason))

    def finish_remote_prefills(self) -> None:
        """Import prompts that another process has computed, and sample their first tokens."""
        while self.incoming_transfers:
            request, transfer = self.incoming_transfers.popleft()
            if request.remote_prefill and not request.finish_reason:
                with self.isolate(request):
                    self.finish_remote_prefill(request, transfer)

    def finish_remote_prefill(self, request: Request, transfer: KVTransfer) -> None:
        """Import a prompt; sample its first token unless it was preempted after that token."""
        if not (transfer.kv_lsx.isfinite().all() and transfer.h_sd.isfinite().all()):
            raise InvalidLogits
        self.runner.import_kv(request, transfer)
        # MTP positions found in the cache are kept
        mtp = max(request.num_mtp_computed_tokens, transfer.num_mtp_computed_tokens)
        request.remote_prefill = False
        request.num_computed_tokens = request.num_prefill_tokens
        request.num_mtp_computed_tokens = mtp
        if self.speculator.num_speculative_tokens:
            h_sd = transfer.h_sd[mtp - transfer.num_mtp_computed_tokens :]
            request.h_sd = h_sd.to(self.runner.kv_caches[0])
        self.scheduler.cache_full_blocks(request)
        if not request.num_uncomputed_tokens:
            self.append_first_token(request, transfer.logit_w)


def logprobs_with_alternatives(
    tokens: list[int], logit_sw: Tensor, num_alternatives: int
) -> list[TokenLogprob]:
    """Return the log-probabilities of tokens and of the likeliest tokens in their places.

    num_alternatives: how many of the likeliest; none are computed at all if it is −1.
    """
    if num_alternatives < 0:
        return []
    logp_sw = logit_sw[: len(tokens)].float().log_softmax(-1)
    chosen = logp_sw[range(len(tokens)), tokens].tolist()
    top = logp_sw.topk(min(num_alternatives, logp_sw.shape[-1]), -1)
    alternatives = [list(zip(*x)) for x in zip(top.indices.tolist(), top.values.tolist())]
    return list(zip(chosen, alternatives))


def make_engine(
    model: Transformer, num_blocks: int = 512, block_size: int = 16, max_num_seqs: int = 64,
    prefill_chunk: int = 128, max_queue: int = 256, num_speculative_tokens: int = 0,
    prefill_only: bool = False,
) -> Engine:  # fmt: skip
    """Build an engine and its parts; a `prefill_only` engine computes prompts for another."""
    runner = ModelRunner(model, num_blocks, block_size)
    scheduler = Scheduler(
        BlockPool(num_blocks, block_size), max_num_seqs, max_queue, prefill_chunk,
        num_speculative_tokens, model.config.max_seq_len, prefill_only,
    )  # fmt: skip
    return Engine(scheduler, runner, Speculator(runner, num_speculative_tokens))


# %% [markdown]
# The test is a strict one. Eight requests arrive at different times, with prompts of 1 to 64 tokens, some with a common prefix. They are prefilled in chunks, with so few
# pages that some requests are preempted, and with zero to two drafts. Each output token must be the most likely one according to a full forward pass
# over that request alone (its *regret* is how far its logit is below the best one). In the end no page is in use. Then two more requests decode together; one is aborted, and
# the other must not be affected.


# %%
@torch.no_grad()
def regret(request: Request) -> float:
    """Return how far the worst token is below the best logit of a full forward pass."""
    tokens = request.output_tokens
    logit_sw = model(torch.tensor([request.tokens]))[0, request.num_prompt_tokens - 1 : -1]
    return (logit_sw.amax(-1) - logit_sw[range(len(tokens)), tokens]).max().item()


def run(engine: Engine, requests: Sequence[Request], apart: int = 0) -> list[Request]:
    """Step until all requests have ended; submit one every `apart` steps, or all at once if 0."""
    todo = deque(requests)
    while todo or engine.has_unfinished_requests():
        for _ in range(1 if apart else len(todo)):
            if todo:
                engine.submit(todo.popleft())
        for _ in range(max(1, apart)):
            engine.step()
    return list(requests)


def random_prompt(n: int) -> list[int]:
    """Return n random tokens."""
    return torch.randint(model.config.vocab_size, (n,)).tolist()


common = random_prompt(24)
sizes = {"block_size": 4, "prefill_chunk": 16}
for depth in (0, 1, 2):
    engine = make_engine(model, 24, max_num_seqs=6, num_speculative_tokens=depth, **sizes)
    requests = [
        Request((common if i % 2 else []) + random_prompt(n), 20)
        for i, n in enumerate((1, 9, 60, 2, 30, 17, 5, 40))
    ]
    for request in run(engine, requests, apart=2):
        assert len(request.output_tokens) == 20 and regret(request) < 1e-4
    counts = engine.counters
    assert engine.scheduler.block_pool.num_used == 0
    assert counts["preemptions"] > 0 and counts["prefix_cache_hits"] > 0
    print(f"{depth} drafts: {counts['steps']} steps, {counts['preemptions']} preemptions, "
          f"{counts['prefix_cache_hits']} tokens found in the cache, {counts['prompt_tokens']} prompt tokens computed")  # fmt: skip

engine = make_engine(model, 64, **sizes)
leaves, stays = Request(random_prompt(9), 30), Request(random_prompt(9), 30)
engine.submit(leaves, stays)
for _ in range(5):
    engine.step()
leaves.aborted = True
engine.call_between_steps(lambda model: model.head.weight.data.mul_(1.0))
run(engine, [])
assert (leaves.finish_reason, stays.finish_reason) == ("abort", "length") and regret(stays) < 1e-4

# %% [markdown]
# Then the transfer: a second engine only runs prefill and exports the results; the first continues as if it had processed the prompts itself.


# %%
def prefill_elsewhere(depth: int) -> tuple[list[Request], int]:
    """Prefill three prompts with a common prefix in one engine, decode in another.

    Returns the requests and the number of bytes sent.
    """
    options = sizes | {"num_speculative_tokens": depth}
    decoder = make_engine(model, 64, **options)
    prefiller = make_engine(model, 64, prefill_only=True, **options)
    originals, num_bytes = {}, 0

    def send(request: Request) -> bool:
        num_present = request.num_computed_tokens
        tokens = request.tokens[: request.num_prefill_tokens]
        copy = Request(tokens, 1, num_present_tokens=num_present)
        originals[copy] = request
        prefiller.submit(copy)
        return True

    decoder.send_remote = send
    requests = [Request(common + random_prompt(9), 12) for _ in range(3)]
    for request in requests:
        decoder.submit(request)
        while request.num_computed_tokens == 0 or request.remote_prefill:
            decoder.step()
            prefiller.step()
            for copy, transfer in prefiller.outgoing_transfers:
                decoder.incoming_transfers.append((originals[copy], transfer))
                num_bytes += transfer.kv_lsx.nbytes
            prefiller.outgoing_transfers.clear()
    run(decoder, [])
    assert decoder.counters["prompt_tokens"] == 0
    assert all(regret(request) < 1e-4 for request in requests)
    return requests, num_bytes


for depth in (0, 2):
    requests, num_bytes = prefill_elsewhere(depth)
    known = [request.num_cached_tokens for request in requests]
    print(f"{depth} drafts: 3 prompts of 33 tokens, {known} found in the cache, {num_bytes / 1e3:.0f} kB sent")  # fmt: skip

# %% [markdown]
# `dsv3 serve` adds a clock, sockets and processes: [`dsv3_ref/serving/api_server.py`](../dsv3_ref/serving/api_server.py). One thread steps the engine, one turns tokens into text, and two tokenize prompts, so that the event loop only parses and sends. When a client disconnects, its request is marked `aborted`. Text is tokenized by chapter 14's `render_conversation`, in which no text can produce a special
# token. With `--prefill-workers 1` the transfers above go through a pipe from a second process.
#
# ## Experiment: what does a full batch buy?
# A step reads every weight that any of its requests needs. One request needs 4 of the 16 routed experts in each layer, and sixteen requests need almost all of them; beyond that, another request costs only arithmetic. We decode 1 to 32 requests at once and
# measure the total throughput and the time of one (fast) step, which is the time per token for each caller.

# %%
import os
import time

SHORT = bool(os.environ.get("DSV3_SHORT"))
wide = replace(TINY, max_seq_len=2048, original_seq_len=2048)
model = Transformer(wide).eval()


def times(engine: Engine, steps: int) -> list[float]:
    """Return the seconds that each of the next steps takes."""
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - start)
    return seconds


batches, step_ms = [1, 2, 4, 8, 16, 32], []
for b in batches:
    engine = make_engine(model, num_blocks=512)
    engine.submit(*(Request(random_prompt(16), 200) for _ in range(b)))
    while len(engine.scheduler.running) < b or not all(
        map(engine.scheduler.is_decoding, engine.scheduler.running)
    ):
        engine.step()
    step_ms.append(
        1e3 * sorted(times(engine, 6 if SHORT else 20))[1]
    )  # a fast step: other work shares these cores
fig, (left, right) = figure(1, 2, 8.6, 2.9)
left.loglog(batches, [1e3 * b / ms for b, ms in zip(batches, step_ms)], "o-", base=2, color=BLUE)
left.set(xlabel="requests", ylabel="tokens per second", title="Throughput of the server")
right.semilogx(batches, step_ms, "o-", base=2, color=ORANGE)
right.set(
    xlabel="requests", ylabel="ms per step", ylim=(0, None), title="Time per token for each caller"
)
for ax in (left, right):
    ax.set_xticks(batches, batches)
left.set_yticks([200, 400, 800, 1600, 3200], [200, 400, 800, 1600, 3200])
show(fig)
print(
    "tokens per second:",
    ", ".join(f"{b} requests {1e3 * b / ms:.0f}" for b, ms in zip(batches, step_ms)),
)

# %% [markdown]
# The first few requests are almost free: the step hardly becomes slower. At 32 requests its time grows nearly in proportion to their number, and
# another request gains little throughput.
#
# ## Experiment: a long prompt among short answers
# Eight requests are decoding when a prompt of 1,500 tokens arrives. Processed at once, it stalls all of them for one very long step. In chunks of 64 tokens no request stalls, but for a while all of them
# decode several times more slowly. The new request pays too: each chunk attends to all previous ones in the latent form and shares its steps with the eight others, so its first token comes later.

# %%
arrivals = {}
for chunk in (2048, 64):
    engine = make_engine(model, num_blocks=256, prefill_chunk=chunk)
    long = Request(random_prompt(1500), 4)
    engine.submit(*(Request(random_prompt(8), 120) for _ in range(8)))
    before = times(engine, 12)
    engine.submit(long)
    during = []
    while not long.output_tokens:
        during += times(engine, 1)
    arrivals[chunk] = before, during, times(engine, 8)
fig, ax = figure(1, 1, 8, 2.9)
for (chunk, (before, during, after)), color in zip(arrivals.items(), (ORANGE, BLUE)):
    shown = torch.tensor([*before[-6:], *during, *after]) * 1e3
    end = shown.cumsum(0) - 1e3 * sum(before[-6:])  # the prompt arrives at 0
    name = "at once" if chunk > 1500 else f"in chunks of {chunk}"
    label = f"{name}: first token after {sum(during):.2f} s"
    ax.step(end, shown, where="pre", color=color, label=label)
ax.set(
    yscale="log",
    xlabel="ms since the prompt arrived",
    ylabel="ms between two tokens",
    ylim=(None, 3e3),
)
ax.set_title("Eight decoding requests while a prompt of 1,500 tokens is prefilled")
ax.legend(fontsize=8, loc="upper right")
show(fig)
worst = {chunk: max(during) for chunk, (_, during, _) in arrivals.items()}
for chunk, x in worst.items():
    usual = sorted(arrivals[chunk][0])[6]
    print(f"prefilled {'at once' if chunk > 1500 else 'in chunks'}: longest wait for a token {1e3 * x:.0f} ms, "
          f"before the prompt arrived {1e3 * usual:.1f} ms")  # fmt: skip
assert len(arrivals[2048][1]) == 1 and len(arrivals[64][1]) == 24

# %% [markdown]
# ## Experiment: a common prefix
# Most conversations with a server begin with the same system text. Here 24 requests, with a common prefix of 0 to 192 tokens and 20 tokens of their own, arrive one after another. We count how many prompt tokens must be computed.

# %%
shared, counts = [0, 48, 96, 144, 192], []
for n in shared:
    engine, prefix = make_engine(model, num_blocks=128), random_prompt(n)
    run(
        engine, [Request(prefix + random_prompt(20), 4) for _ in range(6 if SHORT else 24)], apart=2
    )
    counts.append((engine.counters["prompt_tokens"], engine.counters["prefix_cache_hits"]))
fig, ax = figure(1, 1, 7, 2.6)
computed, hits = zip(*counts)
ax.bar(shared, computed, width=24, color=BLUE, label="computed")
ax.bar(shared, hits, width=24, bottom=computed, color=GREEN, label="found in the cache")
ax.set(
    xlabel="tokens of the common prefix",
    ylabel="prompt tokens",
    xticks=shared,
    title="24 requests",
)
ax.legend()
show(fig)
assert hits[0] == 0 and hits[-1] > 0.7 * (hits[-1] + computed[-1])

# %% [markdown]
# Pages of 16 tokens are shared as a whole or not at all. A request that arrives while the first is still being prefilled reuses the pages that are complete so far.
# Sharing does leak one fact: a prompt that is answered unusually fast reveals that *some user* has sent its prefix before. Where users do not trust each other, each has a salt, which stands for $\text{hash}_{-1}$ (`cache_salt`; `dsv3 serve` derives it from
# the API key). Pages are then shared only between requests with the same salt.
#
# ## Experiment: sixty-four clients
# The model of [chapter 07](07_pretrain.ipynb) behind `dsv3 serve`, and 1 to 64 clients that each stream an answer over HTTP, on two cores shared with other work: `python -m dsv3_ref.studies.load_test runs/tiny --rounds 5`.

# %%
from dsv3_ref.viz.ablation import load_result

LOAD_TEST = load_result("serve")
fig, (left, right) = figure(1, 2, 8.6, 2.9)
for (name, kind), color in zip(LOAD_TEST["servers"].items(), (BLUE, ORANGE, GREEN)):
    clients = [r["clients"] for r in kind]
    left.loglog(clients, [r["tokens_per_s"] for r in kind], "-", base=2, color=color, label=name)
    for r in kind:
        rounds = r["tokens_per_s_by_round"]
        left.plot([r["clients"]] * len(rounds), rounds, ".", color=color)
    right.loglog(clients, [1e3 * r["ttft_s"][1] for r in kind], "o-", base=2, color=color)
left.set(xlabel="clients", ylabel="tokens per second", title="All clients together")
right.set(xlabel="clients", ylabel="ms, median", title="Time to the first token")
for ax in (left, right):
    ax.set_xticks(clients, clients)
left.set_yticks([200, 400, 800, 1600], [200, 400, 800, 1600])
right.set_yticks([10, 40, 160, 640], [10, 40, 160, 640])
left.legend(fontsize=7)
show(fig)
for name, kind in LOAD_TEST["servers"].items():
    for r in kind:
        print(f"{name:22} {r['clients']:2} clients: {r['tokens_per_s']:5.0f} tokens/s, first token "
              f"{1e3 * r['ttft_s'][1]:4.0f} ms, {1e3 * r['inter_token_latency_s'][1]:.0f} ms per token, "
              f"{r['failed']} failed")  # fmt: skip
    assert all(r["failed"] == 0 for r in kind)

# %% [markdown]
# No request fails. From 1 to 16 clients the throughput grows almost fourfold, and then the two cores are saturated: more clients only wait longer. The three servers were measured in turn, five
# times; lines connect the median rounds, dots are all rounds. A *draft* is slower in every round with 16 or 64 clients: one MTP block beside four layers costs more
# than it saves, as in chapter 08. With a *separate prefill* process the tokens after the first come faster at 64 clients (24 ms instead of 32, median), since no prompt is processed between them. The first one comes later, since
# both processes share two cores. From 4 clients on, the second process does not increase the median throughput, and the rounds vary widely. The benefit appears only when each process has its own GPUs.
#
# ## Play: which request uses which page?
# Ten requests in a pool of 40 pages, step by step. Each request has a color. A page shared by several requests is dark, an evictable page is gray, and a free page is white. Watch the common prefix being shared, the last requests
# waiting, and evictable pages being reused once no page is free.


# %%
def history(max_num_seqs: int = 4, prefix_len: int = 24) -> list[list]:
    """Return, for every step and page, the requests that use it or ["idle"] if evictable."""
    tiny = Transformer(replace(wide, n_layers=1, n_mtp_layers=0, dim=32)).eval()
    engine = make_engine(
        tiny, num_blocks=40, block_size=4, max_num_seqs=max_num_seqs, prefill_chunk=16
    )
    prefix, dice = random_prompt(prefix_len), random.Random(1)
    requests = [
        Request(prefix + random_prompt(dice.randint(2, 12)), dice.randint(5, 40)) for _ in range(10)
    ]
    engine.submit(*requests)
    steps = []
    while engine.has_unfinished_requests():
        engine.step()
        evictable = engine.scheduler.block_pool.evictable
        pages = []
        for page in range(40):
            users = [i for i, request in enumerate(requests) if page in request.block_ids]
            pages.append(users or (IDLE if page in evictable else []))
        steps.append(pages)
    return steps


HISTORIES = {}
TEN = plt.get_cmap("tab10").colors
IDLE = ["idle"]


def page_style(users: list) -> tuple:
    """Return the color and the text of a page."""
    if users in ([], IDLE):
        return ("#E5E7EB" if users else "white"), ""
    return ("#1F2937", f"{len(users)}×") if len(users) > 1 else (TEN[users[0]], users[0])


def pages_at(step: int = 30, max_num_seqs: int = 4, prefix_len: int = 24):
    key = max_num_seqs, prefix_len
    steps = HISTORIES[key] = HISTORIES.get(key) or history(*key)
    step = min(step, len(steps) - 1)
    fig, ax = figure(1, 1, 8, 1.9)
    for page, users in enumerate(steps[step]):
        row, column = divmod(page, 20)
        color, text = page_style(users)
        ax.barh(row, 0.92, left=column, height=0.85, color=color, edgecolor=GRAY, lw=0.6)
        ax.text(column + 0.46, row, text, ha="center", va="center", fontsize=8, color="white")
    used = sum(users not in ([], IDLE) for users in steps[step])
    ax.set(xticks=[], yticks=[], xlim=(-0.2, 20.1), ylim=(1.6, -0.6))
    ax.spines[:].set_visible(False)
    ax.set_title(f"after step {step + 1} of {len(steps)}: {used} of 40 pages in use")
    show(fig)


pages_at()

# %%
play(pages_at, step=(0, 80, 1), max_num_seqs=(1, 10, 1), prefix_len=(0, 40, 8))

# %% [markdown]
# ## Exercises
# **1 · Compute.** Requests hold these numbers of tokens. With pages of $y$ positions, how many pages are in use, and which fraction of their
# positions is empty? (Small pages waste less and need longer tables.)


# %%
@checker
def check_waste(fn):
    """Can two requests share a page that is not full?"""
    for lengths, size in (([1, 16, 17], 16), ([5, 9, 2, 33], 4), ([100], 1)):
        used = sum(ceil_div(n, size) for n in lengths)
        pages, empty = fn(lengths, size)
        assert pages == used and abs(empty - (1 - sum(lengths) / (used * size))) < 1e-9


@checker
def check_hits(fn):
    """At least one token must be computed: without it there are no logits for the next token."""
    for prompts in (
        [[1] * 9, [1] * 9, [1] * 8],
        [[*range(20)], [*range(13), 99], [99, *range(19)]],
    ):
        engine = make_engine(model, num_blocks=64, block_size=4)
        for p in prompts:
            run(engine, [Request(list(p), 1)])
        assert fn(prompts, 4) == engine.counters["prefix_cache_hits"]


@checker
def check_forgery(fn):
    """Which page would the weak server confuse with another? Is every page before it known too?"""
    texts = [list(text) for text in fn(4)]
    known, forged = {}, []
    for text in (*texts, texts[1]):  # the second is sent twice
        for end in range(4, len(text), 4):  # one token is left to compute
            if (source := known.get(tuple(text[end - 4 : end]))) is None:
                break
            forged += [(source, text[:end])] if source != text[:end] else []
        for end in range(4, len(text) + 1, 4):
            known.setdefault(tuple(text[end - 4 : end]), text[:end])
    assert forged, "every page that the server finds belongs to the same prefix"
    a, b = (model.hidden_states(torch.tensor([text]))[0][0, -4:] for text in forged[0])
    assert not torch.allclose(a, b, atol=1e-3)  # the model distinguishes the two


def my_waste(lengths: list[int], size: int) -> tuple[int, float]:
    return ...


check_waste(my_waste)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_waste(lengths, size):
#     pages = sum(ceil_div(n, size) for n in lengths)
#     return pages, 1 - sum(lengths) / (pages * size)
# ```
# </details>
#
# **2 · Predict.** Prompts arrive one after another, each after the previous request has ended with a single new token. How many prompt tokens are found in the cache in total?


# %%
def my_hits(prompts: list[list[int]], size: int) -> int:
    return ...


check_hits(my_hits)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_hits(prompts, size):
#     known, num_hits = set(), 0
#     for p in prompts:
#         for end in range(size, len(p), size):
#             if tuple(p[:end]) not in known:
#                 break
#             num_hits += size
#         known |= {tuple(p[:end]) for end in range(size, len(p) + 1, size)}
#     return num_hits
# ```
# </details>
#
# **3 · Break.** To save hashing, somebody identifies a page by its own tokens only, without $\text{hash}_{i-1}$. Give two prompts (lists of token
# ids, with pages of `size`): the first is sent once, then the second twice, and this server must answer the second from latents of the first. (A prompt's last token is always computed.)


# %%
def my_forgery(size: int) -> tuple[list[int], list[int]]:
    return ...


check_forgery(my_forgery)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_forgery(size):
#     return [1] * size + [7] * size + [5], [2] * size + [7] * size + [5]
# ```
#
# "The *left* door: what is behind it?" and "the *right* door: …" are equal from the second page on. When the second prompt is sent for the first time, its first page is unknown, so all of it
# is computed. When it is sent again, both of its pages are known, and the second is found under the name of the other prompt's page: the answer is about the wrong door.
# </details>

# %% [markdown]
# ## Scale-up
# At 671B the parts are the same. These are the numbers:

# %%
from dsv3_ref.config import V3, count_params

token = count_params(V3).cache_bytes
weights = 3 * V3.dim * V3.moe_inter_dim * (V3.n_layers - V3.n_dense_layers)  # 1 byte each
print(f"latents per token {token / 1e3:.0f} kB; a prompt of 4,096 tokens: {4096 * token / 1e6:.0f} MB to transfer, "
      f"{4096 * token / 50e9 * 1e3:.0f} ms at 50 GB/s")  # fmt: skip
print(
    f"one expert per GPU and layer, FP8: {weights / 1e9:.1f} GB, besides attention, embeddings and the rest"
)
print(f"a page of 64 tokens {64 * token / 1e6:.1f} MB; 40 GB of cache hold {40e9 / (64 * token):,.0f} pages, "
      f"{40e9 / token / 1e3:.0f}k tokens")  # fmt: skip

# %% [markdown]
# *Prefill* is compute-bound: large chunks, expanded attention, tensor parallelism within a node. *Decoding* is memory-bound: the absorbed form
# over pages ([kernel](../kernels/decode.py)), one expert per GPU, and all-to-all communication of tokens (chapter 11). The latents could be sent over InfiniBand layer by layer while the next layer is computed; ours are sent after the whole prompt. Redundant experts
# need a new placement between two steps, which `call_between_steps` allows.
#
# This server is written to be read, and has served only small models on a CPU. To serve V3 itself, export it to the Hugging Face format and use vLLM or SGLang (options as in their documentation; **not run here**):
#
# ```
# dsv3 export runs/v3 export --fp8    # 0.7 TB, blocks of 128 × 128 as in the release
# vllm serve export --tensor-parallel-size 8 --enable-expert-parallel \
#   --speculative-config '{"method": "mtp", "num_speculative_tokens": 1}'
# python -m sglang.launch_server --model-path export --tp 8 \
#   --speculative-algorithm EAGLE --speculative-num-steps 1 --speculative-eagle-topk 1 \
#   --speculative-num-draft-tokens 2
# ```
#
# Eight H200 GPUs (141 GB each) hold the model in FP8. The servers read the number format from `config.json`; vLLM's `--quantization fp8` would quantize again, with one scale per tensor. Both servers implement the ideas of this chapter under the same names: paged attention, prefix caching (SGLang: RadixAttention), chunked prefill, and prefill separate from
# decoding. OpenAI's client works with either as it does with ours.
