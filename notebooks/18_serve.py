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
# # 18 · Serving: many talks, one model

# %% [markdown]
# ## Why
# [Chapter 08](08_generate.ipynb) writes for one caller. A server has many, who come when they like, with prompts of any
# length, and leave when they like. The simple way is to collect eight requests, write them side by side and take the
# next eight. But answers differ in length, and all wait for the longest: below, **more than half** of the places in
# the batch compute nothing. A decoding step with eight rows costs far less than eight steps with one (measured below), so an empty place is an
# answer that could have been cheap. *Continuous batching* fills a place the moment it becomes empty.

# %%
import random

import matplotlib.pyplot as plt
import torch

from dsv3_ref.config import TINY
from dsv3_ref.viz import BLUE, GRAY, GREEN, ORANGE, checker, figure, play, show

torch.manual_seed(0)


def filled(lengths: list[int], places: int, continuous: bool) -> list[int]:
    """How many places work, step by step."""
    waiting, live, out = list(lengths), [], []
    while waiting or live:
        if continuous or not live:
            while waiting and len(live) < places:
                live.append(waiting.pop(0))
        out.append(len(live))
        live = [n - 1 for n in live if n > 1]
    return out


dice = random.Random(0)
lengths = [1 + int(dice.expovariate(1 / 60)) for _ in range(48)]
fig, ax = figure(1, 1, 8, 2.4)
for name, continuous, color in (
    ("one batch after another", False, ORANGE),
    ("continuous", True, BLUE),
):
    busy = filled(lengths, 8, continuous)
    share = sum(busy) / (8 * len(busy))
    ax.step(
        range(len(busy)), busy, color=color, label=f"{name}: {len(busy)} steps, {share:.0%} full"
    )
ax.set(xlabel="step", ylabel="places that work", ylim=(0, 11), title="48 answers, 8 places")
ax.legend(loc="upper right", ncols=2, fontsize=8)
show(fig)
assert len(filled(lengths, 8, True)) < 0.65 * len(filled(lengths, 8, False))

# %% [markdown]
# ## Paper
# §3.4 deploys V3 as two services. *Prefill* reads prompts on units of 32 GPUs, *decoding* writes on units of 320, each with the parallelism that
# suits it, and the latent cache of a prompt travels from one to the other. Prefill treats two micro-batches at a time,
# so that one computes while the other's tokens travel. Decoding gives each GPU one expert of every layer, which sees a batch of usually no more than 256 tokens,
# so that reading its weights is the limit. Experts that are in demand have copies ("redundant experts"), placed
# anew about every ten minutes from the loads that were seen. And §5.4.3 lets MTP draft one token, for 1.8 times the speed.
#
# The report says nothing about the server itself: who shares memory, who waits, whose prompt was read before. We build that, with ideas
# known from PagedAttention (Kwon et al., 2023), Orca (Yu et al., 2022) and Sarathi (Agrawal et al., 2023).
#
# Axes: `b` rows (requests), `s` positions of this step, `t` positions in the cache, `p` pages, `y` slots of a page, `x` latent and rotary key, $c + r$ numbers; `l` layers, `h` heads, `d` model, `w` words.

# %%
#| export
import hashlib
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_ref.config import UserError, ceil_div
from dsv3_ref.decode import LatentProjections, SamplingParams, decode_layers, decode_weights
from dsv3_ref.mla import attend_expanded, paged_attention
from dsv3_ref.model import Transformer
from dsv3_ref.rope import rope_cos_sin

# %% [markdown]
# The engine is made of five parts, each with one task, under the names that vLLM gave them: a `BlockPool` knows which pages are free, a `Request` is the text
# of one caller, a `Scheduler` decides who reads and who writes, a `ModelRunner` computes, and a `Speculator` drafts and verifies. An `Engine` holds them together.
#
# ## Pages
# The length of an answer is not known beforehand. To reserve the longest possible stretch for each would leave most memory empty. So the
# cache is cut into pages (in code: *blocks*) of $y$ positions, and a request has a *block table*, the list of its pages. Position $t$ of request $b$ lies in
#
# $$\text{page}_t = \text{table}_{b,\lfloor t/y\rfloor},\qquad \text{slot}_t = t \bmod y$$
#
# which wastes at most $y-1$ positions per request. One table serves all layers.
#
# The latents of a page are a function of the tokens up to its end and of nothing else. So if a prompt begins like one that was read before, its pages
# can be *shared*. A full page is identified by a hash that contains all that came before it:
#
# $$\text{hash}_i = H(\text{hash}_{i-1},\ \text{tokens of page } i)$$
#
# $H$ is SHA-256: with a weak hash an attacker could construct a prompt that is answered from another's cache. Each page counts its users. One that
# has a hash and no users is *evictable*: it stays until memory is needed, and then the one that has been unused longest goes first. A
# request returns its pages from the last to the first, so a chain loses its end before its beginning.


# %%
#| export
def hash_blocks(
    tokens: Sequence[int], block_size: int, prefix_hashes: Sequence[bytes] = ()
) -> list[bytes]:
    """Return the hashes of full blocks, hash_i = SHA-256(hash_{i−1}, tokens of block i).

    prefix_hashes: those of the first blocks, which are known.
    """
    hashes = list(prefix_hashes)
    for i in range(len(hashes), len(tokens) // block_size):
        block = array("q", tokens[i * block_size : (i + 1) * block_size]).tobytes()
        hashes.append(hashlib.sha256((hashes[-1] if hashes else b"") + block).digest())
    return hashes


class BlockPool:
    """Blocks of the cache: used by some requests, evictable but known by hash, or free."""

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.free_blocks = list(range(num_blocks))[::-1]
        self.ref_cnt = [0] * num_blocks
        self.block_hash: dict[int, bytes] = {}  # of a full block
        self.cached_blocks: dict[bytes, int] = {}  # hash → block
        self.evictable: OrderedDict[int, None] = OrderedDict()  # the longest unused first

    @property
    def num_free(self) -> int:
        """The number of blocks that could be allocated."""
        return len(self.free_blocks) + len(self.evictable)

    @property
    def num_used(self) -> int:
        """The number of blocks with at least one user."""
        return self.num_blocks - self.num_free

    def allocate(self) -> int | None:
        """Return a block to write in, if need be an evicted one; None if all are in use."""
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
        """Return the blocks of the longest known beginning, and count one more user of each."""
        blocks = []
        for block_hash in hashes:
            if (block := self.cached_blocks.get(block_hash)) is None:
                break
            self.evictable.pop(block, None)
            self.ref_cnt[block] += 1
            blocks.append(block)
        return blocks

    def free(self, blocks: Sequence[int]) -> None:
        """Count one user less of each of these blocks."""
        for block in reversed(blocks):
            self.ref_cnt[block] -= 1
            if not self.ref_cnt[block]:
                if block in self.block_hash:
                    self.evictable[block] = None
                else:
                    self.free_blocks.append(block)

    def cache_block(self, block: int, block_hash: bytes) -> None:
        """Make a full block known by its hash, unless another block is known by it."""
        if block_hash not in self.cached_blocks and block not in self.block_hash:
            self.cached_blocks[block_hash] = block
            self.block_hash[block] = block_hash

    def reset_prefix_cache(self) -> None:
        """Forget all hashes, because the weights have changed."""
        self.free_blocks += self.evictable
        for known in (self.evictable, self.block_hash, self.cached_blocks):
            known.clear()


# %%
pool = BlockPool(6, 4)
first = [pool.allocate() for _ in range(3)]
hashes = hash_blocks(range(10), 4)  # two full pages and a half
for block, block_hash in zip(first, hashes):
    pool.cache_block(block, block_hash)
shared = pool.get_cached_blocks(hash_blocks([*range(8), 77, 78, 79, 80], 4))  # the third differs
assert shared == first[:2] and pool.ref_cnt[first[0]] == 2
pool.free(first)
pool.free(shared)
assert pool.num_free == 6
assert list(pool.evictable) == [first[1], first[0]]  # the end of the chain first
taken = [pool.allocate() for _ in range(5)]
assert pool.get_cached_blocks(hashes) == [first[0]]  # its successor was overwritten
assert pool.allocate() is None and hash_blocks([5, *range(1, 8)], 4)[1] != hashes[1]
print("6 pages: 3 used, 2 of them shared, evictable, found again, at last overwritten")

# %% [markdown]
# ## A request
# What the server knows of a request is the text so far and how much of it the model has read, $n$. All states follow from
# these: a new prompt is all unread; a request that decodes has exactly one token unread, the one just chosen; and a
# request that lost its pages is simply unread again. So "prefill" and "recover" are one piece of code. With $D$ drafts the MTP modules have
# read less (chapter 08), and the hidden states between the two wait in `h_sd`.


# %%
#| export
class QueueFull(Exception):
    """The queue has no room for another request."""


@dataclass(eq=False)
class Request:
    """One request: its tokens, how many of them are computed, and the blocks of their latents."""

    tokens: list[int]  # the prompt, then the output
    max_tokens: int
    # with random numbers of its own, so that neighbors change nothing
    sampling_params: SamplingParams = SamplingParams()
    stop_token_ids: frozenset[int] = frozenset()
    num_logprobs: int = -1  # of the likeliest tokens beside the chosen one's; −1: none at all
    num_computed_tokens: int = 0  # n
    num_mtp_computed_tokens: int = 0  # by the MTP modules
    h_sd: Tensor | None = None  # hidden states of the positions between the two
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_cached_blocks: int = 0  # blocks that are known by their hash
    num_cached_tokens: int = 0  # positions of the prompt that another request had computed
    remote_prefill: bool = False  # the prompt is being read by another process
    num_present_tokens: int = 0  # for a prefill process: positions that the other side has
    aborted: bool = False  # the client is gone
    finish_reason: str = ""  # stop, length, abort, prefilled, error; "" while it runs
    logprobs: list = field(default_factory=list)  # per output token, unless num_logprobs is −1

    def __post_init__(self):
        self.num_prompt_tokens = len(self.tokens)

    @property
    def output_tokens(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[self.num_prompt_tokens :]

    @property
    def num_uncomputed_tokens(self) -> int:
        """The number of tokens that the model has not read."""
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


# %% [markdown]
# ## The scheduler
# The engine repeats one step: **admit** requests while there is room; **prefill** at most `prefill_chunk` tokens of prompts, the oldest first; let all requests
# that are ready **decode** one token; **retire** those that ended. Reading a prompt of $N$ tokens whole would stop
# all others for the time of $N$ tokens; in chunks no request waits longer than
#
# $$\text{time of a step} \le \text{time}(\text{chunk tokens}) + \text{time}(\text{one token of every request})$$
#
# Pages are allocated only when they are needed. If there are none, the *youngest* request gives up all of its pages and goes back to the front of the queue; the
# oldest is never disturbed, so every request ends. A request that could not end even alone is refused at the door. The scheduler never sees the model: it decides by counting.


# %%
#| export
class Scheduler:
    """The queue, the running requests, and who has which block; no model in sight."""

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
        """Queue requests, all or none.

        Raises `QueueFull`, or a `UserError` for a request that can never end.
        """
        for request in requests:
            if not request.tokens or request.max_tokens < 1:
                raise UserError("a request needs at least one prompt token and one new token")
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
        """Admit requests in order while there are places and blocks that no other needs."""
        while self.waiting and len(self.running) < self.max_num_seqs:
            promised = sum(max(0, self.num_blocks_needed(request)) for request in self.running)
            needed = promised + self.num_blocks_needed(self.waiting[0])
            if self.running and needed > self.block_pool.num_free:
                return
            self.running.append(self.waiting.popleft())

    def num_blocks_needed(self, request: Request) -> int:
        """Return how many blocks a request lacks before it can decode."""
        num_slots = len(request.tokens) + 1 + self.num_speculative_tokens
        return ceil_div(num_slots, self.block_size) - len(request.block_ids)

    def is_decoding(self, request: Request) -> bool:
        """Return whether only the last token is unread, and the MTP modules have work if asked."""
        is_prefilled = request.num_uncomputed_tokens == 1 and not request.remote_prefill
        if self.num_speculative_tokens:
            is_prefilled &= request.num_mtp_computed_tokens < request.num_computed_tokens
        return is_prefilled and not request.finish_reason and not self.prefill_only

    def prefill_chunks(
        self, send_remote: Callable[[Request], bool] | None = None
    ) -> Iterator[tuple[Request, int]]:
        """Yield (request, number of its tokens to read), the oldest first, within `prefill_chunk`.

        The caller reads each chunk before it asks for the next, whose request may share the blocks.
        send_remote may take a whole prompt to another process, if it returns True.
        """
        budget = self.prefill_chunk
        for request in list(self.running):
            idle = request.remote_prefill or request.finish_reason or self.is_decoding(request)
            if idle or not budget or request not in self.running:
                continue
            if not request.block_ids:
                self.match_prefix(request)
            if send_remote and self.prefill_remotely(request, send_remote):
                continue
            num_tokens = min(budget, request.num_uncomputed_tokens)
            if self.allocate_slots(request, request.num_computed_tokens + num_tokens):
                budget -= num_tokens
                yield request, num_tokens

    def prefill_remotely(self, request: Request, send_remote: Callable[[Request], bool]) -> bool:
        """Allocate a prompt's blocks and send it away; return whether nothing is left to do."""
        if request.num_uncomputed_tokens == 1:
            return False
        if self.allocate_slots(request, len(request.tokens)):
            request.remote_prefill = send_remote(request)
        return request.remote_prefill or request not in self.running

    def decode_batch(self) -> list[Request]:
        """Return the requests that decode in this step, all with blocks for it."""
        ready = [request for request in self.running if self.is_decoding(request)]
        batch = []
        for request in ready:
            num_slots = request.num_computed_tokens + 1 + self.num_speculative_tokens
            if request in self.running and self.allocate_slots(request, num_slots):
                batch.append(request)
        return [request for request in batch if request in self.running]  # others were preempted

    def match_prefix(self, request: Request) -> None:
        """Begin with the blocks that are known; at least one token is left to read."""
        hashes = hash_blocks(request.tokens[:-1], self.block_size, request.block_hashes)
        num_full = (len(request.tokens) - 1) // self.block_size
        request.block_hashes = hashes
        request.block_ids = self.block_pool.get_cached_blocks(hashes[:num_full])
        request.num_cached_blocks = len(request.block_ids)
        num_tokens = request.num_cached_blocks * self.block_size
        request.num_computed_tokens = request.num_mtp_computed_tokens = num_tokens
        request.num_cached_tokens = min(num_tokens, request.num_prompt_tokens)
        self.counters["prefix_cache_hits"] += num_tokens

    def allocate_slots(self, request: Request, num_slots: int) -> bool:
        """Give a request blocks for so many positions, by preemption of the youngest if need be.

        Returns False if it must wait or was preempted itself.
        """
        while len(request.block_ids) * self.block_size < num_slots:
            if (block := self.block_pool.allocate()) is not None:
                request.block_ids.append(block)
                continue
            victims = (r for r in reversed(self.running) if r.block_ids and not r.remote_prefill)
            victim = next(victims, request)
            if victim is request and any(r.remote_prefill for r in self.running):
                return False
            self.preempt(victim)
            if victim is request:
                return False
        return True

    def preempt(self, request: Request) -> None:
        """Put a request back to the front of the queue, unread."""
        self.running.remove(request)
        self.free(request)
        self.waiting.appendleft(request)
        self.counters["preemptions"] += 1

    def free(self, request: Request) -> None:
        """Take a request's blocks; without them it is unread."""
        self.block_pool.free(request.block_ids)
        request.block_ids, request.h_sd = [], None
        request.num_cached_blocks = 0
        request.num_computed_tokens = request.num_mtp_computed_tokens = 0

    def cache_full_blocks(self, request: Request) -> None:
        """Make full blocks known by their hashes, once the MTP modules have filled them too."""
        num_tokens = request.num_computed_tokens
        if self.num_speculative_tokens:
            num_tokens = min(num_tokens, request.num_mtp_computed_tokens)
        num_full = num_tokens // self.block_size
        if num_full <= request.num_cached_blocks:
            return
        text = request.tokens[: num_full * self.block_size]
        request.block_hashes = hash_blocks(text, self.block_size, request.block_hashes)
        for i in range(request.num_cached_blocks, num_full):
            self.block_pool.cache_block(request.block_ids[i], request.block_hashes[i])
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
print("4 pages, two requests of up to 14 tokens: the younger gave way to the older")

# %% [markdown]
# ## The model runner
# A step gathers requests of unequal length. In each head, request $b$'s query at position $n_b$ sees its own positions up to there:
#
# $$o_b = \sum_{t \le n_b} p_{bt}\,c_t,\qquad p_{bt} = \operatorname{softmax}_{t \le n_b}\big(\sigma\,(q^C_b \cdot c_t + q^R_b\cdot k_t)\big),\qquad c_t, k_t\ \text{from}\ \text{page}_t, \text{slot}_t$$
#
# with $\sigma$ the scale of the softmax, $q^C$ the query's content part already mapped into the latent, $k_t$ the rotary key: $(b,s,h,x) \times (p,y,x) \to (b,s,h,c)$.
#
# That is `paged_attention` of [chapter 03](03_mla.ipynb), for which a GPU has [a kernel](../kernels/decode.py). Its plain form takes
# one request after another; on a CPU the backend "cpu" ([`decoder.py`](../dsv3_ref/cpu/decoder.py)) gathers all at once.
# Padding goes to one page more than there are, which is never read. Layers are those of chapter 08 with another attention passed in: over pages.


# %%
#| export
class PagedPositions(NamedTuple):
    """The positions of s new tokens per request: `DecodePositions` of chapter 08, in blocks."""

    cache_index: tuple[Tensor, Tensor]  # (block, slot), both (b, s)
    freqs_cis: Tensor  # rotations, (b, s, 1, r/2)
    block_table_bp: Tensor  # int32
    cache_seqlens_b: Tensor  # positions that exist afterwards
    is_prefill: bool  # a prompt's first chunk: attention on expanded keys and values


class PagedAttention:
    """MLA whose cache is blocks, (p, y, c + r)."""

    def __init__(self, projections: LatentProjections, kv_pyx: Tensor):
        self.projections, self.kv_pyx = projections, kv_pyx

    def __call__(self, x_bsd: Tensor, positions: PagedPositions) -> Tensor:
        """Apply eq. 1–11 to the new tokens at these positions."""
        mla, c = self.projections, self.projections.config.kv_lora_rank
        q_bshi, q_bshr = mla.queries(x_bsd, positions.freqs_cis)
        kv_bsx = mla.latents(x_bsd, positions.freqs_cis).to(self.kv_pyx.dtype)
        self.kv_pyx[positions.cache_index] = kv_bsx
        if positions.is_prefill:
            c_bsc, k_bsr = kv_bsx.tensor_split([c], dim=-1)
            return mla.output(attend_expanded(q_bshi, q_bshr, c_bsc, k_bsr, mla.wkv_b, mla.scale))
        q_bshx, table_bp = mla.absorb(q_bshi, q_bshr), positions.block_table_bp
        o_bshc = paged_attention(
            q_bshx, self.kv_pyx, table_bp, positions.cache_seqlens_b, c, mla.scale
        )
        return mla.output(mla.unabsorb(o_bshc))


# %% [markdown]
# A prompt may also be read by *another process*, as in the report: it is sent away, and a `KVTransfer` with its latents comes back. At
# full size these are $L\,(c + r)$ numbers per token, 70 kB, which travel once; pages that are here already are not sent.


# %%
#| export
class KVTransfer(NamedTuple):
    """A prompt that another process read: latents of positions start … n − 1 in all layers."""

    start: int
    kv_lsx: Tensor
    num_mtp_computed_tokens: int
    h_sd: Tensor  # hidden states of positions num_mtp_computed_tokens … n − 1; empty without drafts
    logit_w: Tensor  # after the last token


class ModelRunner:
    """A model over one pool of blocks, of which the last takes padding."""

    def __init__(self, model: Transformer, num_blocks: int, block_size: int):
        self.model, self.block_size, self.padding_block = model, block_size, num_blocks
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
        """Build the layers from the weights as they are now, over the same blocks."""
        weights, caches = decode_weights(self.model), iter(self.kv_caches)
        self.logits = weights.logits
        self.layers = decode_layers(
            self.model, weights, lambda projections: PagedAttention(projections, next(caches))
        )

    def positions(self, tables: list[list[int]], starts: list[int], s: int) -> PagedPositions:
        """Return the s positions from `starts` in block tables; missing blocks are padding."""
        width = ceil_div(max(starts) + s, self.block_size)
        padded = [[*x[:width], *[self.padding_block] * (width - len(x))] for x in tables]
        table_bp, position_bs = (
            torch.tensor(padded),
            torch.tensor(starts)[:, None] + torch.arange(s),
        )
        block_bs = table_bp.gather(1, position_bs // self.block_size).to(self.device)
        index = block_bs, (position_bs % self.block_size).to(self.device)
        seqlens_b, last = position_bs[:, -1].to(self.device) + 1, len(self.freqs_cis_tx) - 1
        freqs_cis = self.freqs_cis_tx[position_bs.to(self.device).clamp(max=last)[..., None]]
        table_bp = table_bp.int().to(self.device)
        return PagedPositions(index, freqs_cis, table_bp, seqlens_b, not any(starts))

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
        """Read the next tokens of a request; return their hidden states, (s, d)."""
        start = request.num_computed_tokens
        positions = self.positions([request.block_ids], [start], num_tokens)
        return self.hidden_states([request.tokens[start : start + num_tokens]], positions)[0]

    def decode_step(
        self, requests: list[Request], drafts: list[list[int]]
    ) -> tuple[Tensor, Tensor]:
        """Read the last token of every request and its drafts, equally many.

        Returns hidden states, (b, s, d), and logits, (b, s, w).
        """
        token_bs = [[request.tokens[-1], *draft] for request, draft in zip(requests, drafts)]
        tables = [request.block_ids for request in requests]
        starts = [request.num_computed_tokens for request in requests]
        h_bsd = self.hidden_states(token_bs, self.positions(tables, starts, len(token_bs[0])))
        return h_bsd, self.logits(h_bsd)

    def export_kv(self, request: Request, logit_w: Tensor) -> KVTransfer:
        """Return what the decoding process needs of a prompt."""
        start = min(request.num_present_tokens, request.num_computed_tokens)
        index = self.slots(request, start, request.num_computed_tokens)
        kv_lsx = torch.stack([kv_pyx[index] for kv_pyx in self.kv_caches])
        h_sd = kv_lsx.new_empty(0, 0) if request.h_sd is None else request.h_sd
        return KVTransfer(start, kv_lsx, request.num_mtp_computed_tokens, h_sd, logit_w)

    def import_kv(self, request: Request, transfer: KVTransfer) -> None:
        """Write the latents of a prompt into the blocks of its request."""
        index = self.slots(request, transfer.start, len(request.tokens))
        for kv_pyx, kv_sx in zip(self.kv_caches, transfer.kv_lsx):
            kv_pyx[index] = kv_sx.to(kv_pyx)

    def slots(self, request: Request, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Return (block, slot) of the positions start … end − 1 of a request."""
        position_s = torch.arange(start, end)
        return torch.tensor(request.block_ids)[
            position_s // self.block_size
        ], position_s % self.block_size


# %% [markdown]
# Hidden states of requests of unequal length must be those of a plain forward pass, whatever pages they lie in, read whole or in chunks; and
# both forms of the op must agree.

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
            for row, ends in ((0, (0, 9, 13)), (1, (0, 7))):  # read in chunks
                for a, z in zip(ends, ends[1:]):
                    positions = runner.positions(tables[row : row + 1], [a], z - a)
                    runner.hidden_states(token_bs[row : row + 1, a:z], positions)
            positions = runner.positions(tables, [13, 7], 3)  # then side by side
            both_bs = torch.stack((token_bs[0, 13:16], token_bs[1, 7:10]))
            got_bsd = runner.hidden_states(both_bs, positions)
        assert torch.allclose(got_bsd[0], want_bsd[0, 13:16], atol=1e-4)
        assert torch.allclose(got_bsd[1], want_bsd[1, 7:10], atol=1e-4)
print("requests of 16 and 10 positions in scattered pages: as in a plain forward pass")

# %% [markdown]
# ## The speculator
# With $D$ drafts a step reads $D+1$ tokens of every request and keeps, of request $b$, the $a_b$ drafts that the main model accepts and one token of its own: requests
# advance at different speeds, which pages do not mind. The MTP modules catch up on what was accepted since:
#
# $$\text{mtp}_b \leftarrow \max(\text{mtp}_b,\ n_b + 1 - D) \ \text{ before }\ n_b \leftarrow n_b + 1 + a_b$$
#
# Requests that share pages share the MTP modules' latents too. At a page's last $D$ positions these depend on tokens *after* the page, which another request may
# have written differently. Such a draft can be a little worse. The text cannot, for the main model verifies it.


# %%
#| export
class Draft(NamedTuple):
    """The drafts of one request, and the distributions that drawn ones came from."""

    tokens: list[int]
    distributions: list[Tensor]


class Speculator:
    """Drafts by the MTP modules, their verification, and how far either model has read.

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
        """Take the hidden states of a prompt's chunk, and let the MTP modules read after them."""
        if self.num_speculative_tokens:
            request.h_sd = h_sd if request.h_sd is None else torch.cat((request.h_sd, h_sd))
            self.catch_up(request)

    def catch_up(self, request: Request) -> None:
        """Let the MTP modules read what the main model has, where the next tokens are known."""
        start = request.num_mtp_computed_tokens
        end = min(request.num_computed_tokens, len(request.tokens) - self.num_speculative_tokens)
        if (s := end - start) <= 0:
            return
        positions, h_bsd = (
            self.runner.positions([request.block_ids], [start], s),
            request.h_sd[None, :s],
        )
        for k in range(1, self.num_speculative_tokens + 1):
            token_bs = [request.tokens[start + k : end + k]]
            h_bsd = self.runner.mtp_forward(k, h_bsd, token_bs, positions)
        request.h_sd, request.num_mtp_computed_tokens = request.h_sd[s:], end

    def propose(self, requests: list[Request]) -> list[Draft]:
        """Return D drafts for every request."""
        drafts = [Draft([], []) for _ in requests]
        if not self.num_speculative_tokens:
            return drafts
        starts = [request.num_mtp_computed_tokens for request in requests]
        behind = [r.num_computed_tokens - start for r, start in zip(requests, starts)]
        s, last_b = max(behind), [n - 1 for n in behind]
        positions = self.runner.positions([r.block_ids for r in requests], starts, s)
        h_bsd = torch.stack([F.pad(r.h_sd, (0, 0, 0, s - len(r.h_sd))) for r in requests])
        for k in range(1, self.num_speculative_tokens + 1):
            texts = [[*r.tokens[a + k :], *d.tokens] for r, a, d in zip(requests, starts, drafts)]
            token_bs = [(text + [0] * s)[:s] for text in texts]
            h_bsd = self.runner.mtp_forward(k, h_bsd, token_bs, positions)
            self.draft(requests, drafts, self.runner.logits(h_bsd[range(len(requests)), last_b]))
        return drafts

    def draft(self, requests: list[Request], drafts: list[Draft], logit_bw: Tensor) -> None:
        """Add one token to every draft."""
        for i, (request, token) in enumerate(zip(requests, logit_bw.argmax(-1).tolist())):
            if request.sampling_params.temperature:
                token_b, q_bw = request.sampling_params.draft(logit_bw[i : i + 1])
                token = int(token_b)
                drafts[i].distributions.append(q_bw)
            drafts[i].tokens.append(token)

    def verify(
        self, requests: list[Request], logit_bsw: Tensor, drafts: list[Draft]
    ) -> list[list[int]]:
        """Return the new tokens of every request: accepted drafts and one token more."""
        argmax_bs, new_tokens = logit_bsw.argmax(-1).tolist(), []
        for i, (request, argmax, draft) in enumerate(zip(requests, argmax_bs, drafts)):
            params = request.sampling_params
            if not params.temperature:
                wrong = (k for k, token in enumerate(draft.tokens) if token != argmax[k])
                new_tokens.append(argmax[: next(wrong, len(draft.tokens)) + 1])
            elif draft.tokens:
                draft_bk = torch.tensor([draft.tokens], device=logit_bsw.device)
                n_b, token_b = params.verify(logit_bsw[i : i + 1], draft.distributions, draft_bk)
                new_tokens.append([*draft.tokens[: int(n_b)], int(token_b)])
            else:
                new_tokens.append([int(params.sample(logit_bsw[i]))])
        return new_tokens

    def advance(self, request: Request, h_sd: Tensor, num_accepted: int) -> None:
        """Move both counts of read positions on, as in chapter 08; hidden states between wait."""
        start, n = request.num_mtp_computed_tokens, request.num_computed_tokens + 1 + num_accepted
        mtp = max(start, request.num_computed_tokens + 1 - self.num_speculative_tokens)
        if self.num_speculative_tokens:
            request.h_sd = torch.cat((request.h_sd, h_sd))[mtp - start : n - start]
        request.num_computed_tokens, request.num_mtp_computed_tokens = n, mtp


# %% [markdown]
# ## The engine
# Now the whole step is short. One more opening: `call_between_steps(fn)` runs `fn(model)` when no step is running, for a server that
# moves its experts to where the load is (§3.4.1). Running requests continue.


# %%
#| export
class Engine:
    """Continuous batching of many requests over one model; one thread calls `step` repeatedly."""

    def __init__(self, scheduler: Scheduler, runner: ModelRunner, speculator: Speculator):
        self.scheduler, self.runner, self.speculator = scheduler, runner, speculator
        self.counters = scheduler.counters
        self.pending_callbacks: deque = deque()  # (fn, reset_prefix_cache, future)
        self.send_remote: Callable[[Request], bool] | None = None  # to a prefill process
        self.incoming_transfers: deque[tuple[Request, KVTransfer]] = deque()
        self.outgoing_transfers: list[tuple[Request, KVTransfer]] = []  # of a prefill process

    def submit(self, *requests: Request) -> None:
        """Queue requests, all or none; raises what `Scheduler.submit` raises."""
        self.scheduler.submit(*requests)

    def has_unfinished_requests(self) -> bool:
        """Return whether any request is running or waiting."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def call_between_steps(self, fn: Callable, reset_prefix_cache: bool = False) -> Future:
        """Run fn(model) before the next step; return a future of its result.

        reset_prefix_cache: fn changes what the model computes.
        """
        future: Future = Future()
        self.pending_callbacks.append((fn, reset_prefix_cache, future))
        return future

    def run_pending_callbacks(self) -> None:
        """Run what `call_between_steps` was given."""
        while self.pending_callbacks:
            fn, reset_prefix_cache, future = self.pending_callbacks.popleft()
            try:
                result = fn(self.runner.model)
            except Exception as e:
                future.set_exception(e)
            else:
                future.set_result(result)
            self.runner.build_layers()  # also after half of a change
            if reset_prefix_cache:
                self.scheduler.block_pool.reset_prefix_cache()

    def step(self) -> list[tuple[Request, list[int]]]:
        """Do one step; return requests with their new tokens, none for those that were aborted."""
        self.run_pending_callbacks()
        outputs = [(request, []) for request in self.scheduler.drop_aborted()]
        with torch.inference_mode():
            outputs += self.finish_remote_prefills()
            self.scheduler.schedule_waiting()
            for request, num_tokens in self.scheduler.prefill_chunks(self.send_remote):
                outputs += self.prefill(request, num_tokens)
            if batch := self.scheduler.decode_batch():
                outputs += self.decode(batch)
        self.scheduler.drop_finished()
        self.counters["steps"] += 1
        return outputs

    def prefill(self, request: Request, num_tokens: int) -> list[tuple[Request, list[int]]]:
        """Read the next tokens of a prompt; after the last one, choose the first of the answer."""
        h_sd = self.runner.prefill_step(request, num_tokens)
        self.counters["prompt_tokens"] += num_tokens
        request.num_computed_tokens += num_tokens
        self.speculator.extend(request, h_sd)
        self.scheduler.cache_full_blocks(request)
        if request.num_uncomputed_tokens:
            return []
        logit_w = self.runner.logits(h_sd[-1:])[0]
        if self.scheduler.prefill_only:
            self.outgoing_transfers.append((request, self.runner.export_kv(request, logit_w)))
            request.finish_reason = "prefilled"
            return []
        return [(request, self.append_first_token(request, logit_w))]

    def append_first_token(self, request: Request, logit_w: Tensor) -> list[int]:
        """Choose the token after a prompt."""
        tokens = request.append_tokens([int(request.sampling_params.sample(logit_w[None]))])
        self.record_output(request, tokens, logit_w[None])
        return tokens

    def decode(self, requests: list[Request]) -> list[tuple[Request, list[int]]]:
        """Read D + 1 tokens of every request and write 1 to D + 1."""
        drafts = self.speculator.propose(requests)
        h_bsd, logit_bsw = self.runner.decode_step(requests, [draft.tokens for draft in drafts])
        new_tokens, outputs = self.speculator.verify(requests, logit_bsw, drafts), []
        for i, request in enumerate(requests):
            num_accepted = len(new_tokens[i]) - 1
            self.speculator.advance(request, h_bsd[i], num_accepted)
            self.counters["draft_tokens"] += len(drafts[i].tokens)
            self.counters["accepted_tokens"] += num_accepted
            tokens = request.append_tokens(new_tokens[i])
            # an end inside accepted drafts
            request.num_computed_tokens = min(request.num_computed_tokens, len(request.tokens) - 1)
            self.record_output(request, tokens, logit_bsw[i])
            self.scheduler.cache_full_blocks(request)
            outputs.append((request, tokens))
        return outputs

    def record_output(self, request: Request, tokens: list[int], logit_sw: Tensor) -> None:
        """Count tokens, and note their log-probabilities if the request asks for them."""
        self.counters["generation_tokens"] += len(tokens)
        if request.num_logprobs < 0:
            return
        logp_sw = logit_sw[: len(tokens)].float().log_softmax(-1)
        chosen = logp_sw[range(len(tokens)), tokens].tolist()
        top = logp_sw.topk(max(1, request.num_logprobs), -1)
        for logp, ids, values in zip(chosen, top.indices.tolist(), top.values.tolist()):
            request.logprobs.append((logp, list(zip(ids, values))[: request.num_logprobs]))

    def finish_remote_prefills(self) -> list[tuple[Request, list[int]]]:
        """Take in prompts that another process has read; return their first tokens."""
        outputs = []
        while self.incoming_transfers:
            request, transfer = self.incoming_transfers.popleft()
            if request.finish_reason or not request.remote_prefill:
                continue
            self.runner.import_kv(request, transfer)
            # positions that were here already are not written again
            mtp = max(request.num_mtp_computed_tokens, transfer.num_mtp_computed_tokens)
            request.remote_prefill = False
            request.num_computed_tokens, request.num_mtp_computed_tokens = len(request.tokens), mtp
            if self.speculator.num_speculative_tokens:
                h_sd = transfer.h_sd[mtp - transfer.num_mtp_computed_tokens :]
                request.h_sd = h_sd.to(self.runner.kv_caches[0])
            self.scheduler.cache_full_blocks(request)
            outputs.append((request, self.append_first_token(request, transfer.logit_w)))
        return outputs


def make_engine(
    model: Transformer, num_blocks: int = 512, block_size: int = 16, max_num_seqs: int = 64,
    prefill_chunk: int = 128, max_queue: int = 256, num_speculative_tokens: int = 0,
    prefill_only: bool = False,
) -> Engine:  # fmt: skip
    """Build an engine and its parts; a `prefill_only` engine reads prompts for another."""
    runner = ModelRunner(model, num_blocks, block_size)
    scheduler = Scheduler(
        BlockPool(num_blocks, block_size), max_num_seqs, max_queue, prefill_chunk,
        num_speculative_tokens, model.config.max_seq_len, prefill_only,
    )  # fmt: skip
    return Engine(scheduler, runner, Speculator(runner, num_speculative_tokens))


# %% [markdown]
# The check is the hardest there is: eight requests that come at different times, with prompts of 1 to 64 tokens of which some begin alike, read in chunks, with so few
# pages that requests lose theirs, with zero to two drafts. Each must write, token by token, what a full forward pass
# over its own text alone finds likeliest (its *regret* is how far it stays below that). In the end no page is in use. Then two more write side by side, one leaves early, and
# the other must not notice.


# %%
@torch.no_grad()
def regret(request: Request) -> float:
    """Return how far the worst token is below the best logit of a full forward pass."""
    tokens = request.output_tokens
    logit_sw = model(torch.tensor([request.tokens]))[0, request.num_prompt_tokens - 1 : -1]
    return (logit_sw.amax(-1) - logit_sw[range(len(tokens)), tokens]).max().item()


def run(engine: Engine, requests: Sequence[Request], apart: int = 0) -> list[Request]:
    """Step until all requests have ended; one comes every `apart` steps, or all at once."""
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
          f"{counts['prefix_cache_hits']} positions found, {counts['prompt_tokens']} read in prompts")  # fmt: skip

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
# And the handover: a second engine, which only reads, exports what it read; the first writes as if it had read it itself.


# %%
def prefill_elsewhere(depth: int) -> tuple[list[Request], int]:
    """Let one engine read three prompts that begin alike, and another answer; return bytes sent."""
    options = sizes | {"num_speculative_tokens": depth}
    decoder = make_engine(model, 64, **options)
    prefiller = make_engine(model, 64, prefill_only=True, **options)
    originals, num_bytes = {}, 0

    def send(request: Request) -> bool:
        num_present = request.num_computed_tokens
        copy = Request(list(request.tokens), 1, num_present_tokens=num_present)
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
    print(f"{depth} drafts: 3 prompts of 33 tokens, {known} known here, {num_bytes / 1e3:.0f} kB sent")  # fmt: skip

# %% [markdown]
# `dsv3 serve` puts a clock, sockets and processes around this: [`dsv3_ref/serving/api_server.py`](../dsv3_ref/serving/api_server.py). One thread steps; requests come in and tokens go out between two
# steps. A client that hangs up sets its request's `aborted`. Text becomes tokens by chapter 14's `render_conversation`, where no text can spell a special
# token. With `--prefill-workers 1` the transfers above travel through a pipe to a second process.
#
# ## Experiment: what does a full batch buy?
# A step reads every weight that any of its rows needs. One row needs 4 of the 16 routed experts in each layer, sixteen rows almost all of them; from there on another row costs arithmetic only. We let 1 to 32 rows write, and
# look at tokens a second and at the time of one (fast) step, which is what each caller feels.

# %%
import os
import time

SHORT = bool(os.environ.get("DSV3_SHORT"))
wide = replace(TINY, max_seq_len=2048, original_seq_len=2048)
model = Transformer(wide).eval()


def times(engine: Engine, steps: int) -> list[float]:
    """Seconds of each of the next steps."""
    out = []
    for _ in range(steps):
        clock = time.perf_counter()
        engine.step()
        out.append(time.perf_counter() - clock)
    return out


batches, step_ms = [1, 2, 4, 8, 16, 32], []
for b in batches:
    engine = make_engine(model, num_blocks=512)
    engine.submit(*(Request(random_prompt(16), 200) for _ in range(b)))
    while len(engine.scheduler.running) < b or not all(
        map(engine.scheduler.is_decoding, engine.scheduler.running)
    ):
        engine.step()
    step_ms.append(1e3 * sorted(times(engine, 6 if SHORT else 20))[1])  # others use these cores too
fig, (left, right) = figure(1, 2, 8.6, 2.9)
left.loglog(batches, [1e3 * b / ms for b, ms in zip(batches, step_ms)], "o-", base=2, color=BLUE)
left.set(xlabel="rows", ylabel="tokens a second, all rows", title="What the server gives")
right.semilogx(batches, step_ms, "o-", base=2, color=ORANGE)
right.set(
    xlabel="rows", ylabel="ms a step", ylim=(0, None), title="What each caller waits for a token"
)
for ax in (left, right):
    ax.set_xticks(batches, batches)
left.set_yticks([200, 400, 800, 1600, 3200], [200, 400, 800, 1600, 3200])
show(fig)
print(
    "tokens a second:", ", ".join(f"{b} rows {1e3 * b / ms:.0f}" for b, ms in zip(batches, step_ms))
)

# %% [markdown]
# The first rows are almost a gift: the step hardly grows. By 32 rows it grows nearly as fast as they do, and
# another caller buys little.
#
# ## Experiment: a long prompt among short answers
# Eight rows write when a prompt of 1,500 tokens comes. Read whole, it stops all of them for one very long step. In pieces of 64 tokens nobody stops, but for a while everybody
# writes several times more slowly. The newcomer pays too: each piece looks back at all before it in the latent, and waits for the eight, so its own first token comes later.

# %%
arrivals = {}
for chunk in (2048, 64):
    engine, long = (
        make_engine(model, num_blocks=256, prefill_chunk=chunk),
        Request(random_prompt(1500), 4),
    )
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
    end = shown.cumsum(0) - 1e3 * sum(before[-6:])  # the prompt comes at 0
    name = "whole" if chunk > 1500 else f"in pieces of {chunk}"
    label = f"{name}: first token after {sum(during):.2f} s"
    ax.step(end, shown, where="pre", color=color, label=label)
ax.set(
    yscale="log",
    xlabel="ms since the prompt came",
    ylabel="ms between two tokens",
    ylim=(None, 3e3),
)
ax.set_title("Eight who write while 1,500 tokens are read")
ax.legend(fontsize=8, loc="upper right")
show(fig)
worst = {chunk: max(during) for chunk, (_, during, _) in arrivals.items()}
for chunk, x in worst.items():
    usual = sorted(arrivals[chunk][0])[6]
    print(f"read {'whole' if chunk > 1500 else 'in pieces'}: longest wait for a token {1e3 * x:.0f} ms, "
          f"before the prompt came {1e3 * usual:.1f} ms")  # fmt: skip
assert len(arrivals[2048][1]) == 1 and len(arrivals[64][1]) == 24

# %% [markdown]
# ## Experiment: the same beginning
# Most talks with a server begin with the same system text. Here 24 requests with a common beginning of 0 to 192 tokens and 20 of their own come one after another. Counted is what had to be read.

# %%
shared, counts = [0, 48, 96, 144, 192], []
for n in shared:
    engine, begin = make_engine(model, num_blocks=128), random_prompt(n)
    run(engine, [Request(begin + random_prompt(20), 4) for _ in range(6 if SHORT else 24)], apart=2)
    counts.append((engine.counters["prompt_tokens"], engine.counters["prefix_cache_hits"]))
fig, ax = figure(1, 1, 7, 2.6)
reads, hits = zip(*counts)
ax.bar(shared, reads, width=24, color=BLUE, label="read")
ax.bar(shared, hits, width=24, bottom=reads, color=GREEN, label="found in the cache")
ax.set(
    xlabel="tokens that all prompts begin with",
    ylabel="tokens of prompts",
    xticks=shared,
    title="24 requests",
)
ax.legend()
show(fig)
assert hits[0] == 0 and hits[-1] > 0.7 * (hits[-1] + reads[-1])

# %% [markdown]
# Pages of 16 tokens are shared whole or not at all, and whoever arrives while the first is still being read finds what is ready so far.
# One thing leaks all the same: a prompt that is answered faster than it should be tells that *somebody* has sent its beginning before. Services for strangers keep their prefixes apart.
#
# ## Experiment: sixty-four clients
# The model of [chapter 07](07_pretrain.ipynb) behind `dsv3 serve`, and 1 to 64 clients that each stream an answer over HTTP, on two cores that others use too: `python -m dsv3_ref.studies.load_test runs/tiny --rounds 5`.

# %%
from dsv3_ref.viz.ablation import load_result

FOUND = load_result("serve")
fig, (left, right) = figure(1, 2, 8.6, 2.9)
for (name, kind), color in zip(FOUND["servers"].items(), (BLUE, ORANGE, GREEN)):
    clients = [r["clients"] for r in kind]
    left.loglog(clients, [r["tokens_s"] for r in kind], "-", base=2, color=color, label=name)
    for r in kind:
        left.plot(
            [r["clients"]] * len(r["rounds_tokens_s"]), r["rounds_tokens_s"], ".", color=color
        )
    right.loglog(clients, [1e3 * r["first"][1] for r in kind], "o-", base=2, color=color)
left.set(xlabel="clients", ylabel="tokens a second", title="All clients together")
right.set(xlabel="clients", ylabel="ms, median", title="Time to the first token")
for ax in (left, right):
    ax.set_xticks(clients, clients)
left.set_yticks([200, 400, 800, 1600], [200, 400, 800, 1600])
right.set_yticks([10, 40, 160, 640], [10, 40, 160, 640])
left.legend(fontsize=7)
show(fig)
for name, kind in FOUND["servers"].items():
    for r in kind:
        print(f"{name:22} {r['clients']:2} clients: {r['tokens_s']:5.0f} tokens/s, first token "
              f"{1e3 * r['first'][1]:4.0f} ms, {1e3 * r['each'][1]:.0f} ms a token, "
              f"{r['lost']} lost")  # fmt: skip
assert all(r["lost"] == 0 for kind in FOUND["servers"].values() for r in kind)

# %% [markdown]
# Nothing is lost. From 1 to 16 clients the server writes almost four times as much, and then its two cores are full: more clients wait longer, that is all. The three servers were asked in turn, five
# times; lines go through the median rounds, dots are all rounds. A *draft* is slower in every round with 16 or 64 clients: an MTP block beside four layers costs more
# than it saves, as in chapter 08. With *prefill apart* the tokens after the first come faster at 64 clients (24 ms instead of 32, median), since no prompt is read between them, and the first one comes later, since
# both processes share two cores. From 4 clients on the median is no more tokens a second, and the rounds scatter widely. What it is for shows only where each has its own GPUs.
#
# ## Play: who has which page?
# Ten rows in a pool of 40 pages, step by step. A color is a row; a page of several rows is dark; gray ones are idle but still known, white ones free. Watch the common beginning being shared, the last rows
# wait, and gray pages be taken when nothing else is free.


# %%
def history(rows_at_once: int = 4, alike: int = 24) -> list[list]:
    """Which rows use each page, after every step."""
    tiny = Transformer(replace(wide, n_layers=1, n_mtp_layers=0, dim=32)).eval()
    engine = make_engine(
        tiny, num_blocks=40, block_size=4, max_num_seqs=rows_at_once, prefill_chunk=16
    )
    begin, dice, out = random_prompt(alike), random.Random(1), []
    rows = [
        Request(begin + random_prompt(dice.randint(2, 12)), dice.randint(5, 40)) for _ in range(10)
    ]
    engine.submit(*rows)
    while engine.has_unfinished_requests():
        engine.step()
        users = [[i for i, r in enumerate(rows) if p in r.block_ids] for p in range(40)]
        out.append(
            [
                u or (["idle"] if p in engine.scheduler.block_pool.evictable else [])
                for p, u in enumerate(users)
            ]
        )
    return out


HISTORIES = {}
TEN = plt.get_cmap("tab10").colors
IDLE = ["idle"]


def look(users: list) -> tuple:
    """Color and text of a page."""
    if users in ([], IDLE):
        return ("#E5E7EB" if users else "white"), ""
    return ("#1F2937", f"{len(users)}×") if len(users) > 1 else (TEN[users[0]], users[0])


def pages_at(step: int = 30, rows_at_once: int = 4, alike: int = 24):
    key = rows_at_once, alike
    found = HISTORIES[key] = HISTORIES.get(key) or history(*key)
    step = min(step, len(found) - 1)
    fig, ax = figure(1, 1, 8, 1.9)
    for p, users in enumerate(found[step]):
        color, text = look(users)
        ax.barh(p // 20, 0.92, left=p % 20, height=0.85, color=color, edgecolor=GRAY, lw=0.6)
        ax.text(p % 20 + 0.46, p // 20, text, ha="center", va="center", fontsize=8, color="white")
    used = sum(users not in ([], IDLE) for users in found[step])
    ax.set(xticks=[], yticks=[], xlim=(-0.2, 20.1), ylim=(1.6, -0.6))
    ax.spines[:].set_visible(False)
    ax.set_title(f"after step {step + 1} of {len(found)}: {used} of 40 pages in use")
    show(fig)


pages_at()

# %%
play(pages_at, step=(0, 80, 1), rows_at_once=(1, 10, 1), alike=(0, 40, 8))

# %% [markdown]
# ## Exercises
# **1 · Compute.** Rows hold these numbers of tokens. With pages of $y$ positions, how many pages are in use, and which share of their
# positions is empty? (Small pages waste less and need longer tables.)


# %%
@checker
def check_waste(fn):
    """Can two rows share a page that is not full?"""
    for lengths, size in (([1, 16, 17], 16), ([5, 9, 2, 33], 4), ([100], 1)):
        used = sum(-(-n // size) for n in lengths)
        pages, empty = fn(lengths, size)
        assert pages == used and abs(empty - (1 - sum(lengths) / (used * size))) < 1e-9


@checker
def check_hits(fn):
    """At least one token must be left to read: without it there is no logit to go on from."""
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
    """Which page would the weak server take for another? Is every page before it known as well?"""
    texts, known, forged = [list(text) for text in fn(4)], {}, []
    for text in (*texts, texts[1]):  # the second comes twice
        for end in range(4, len(text), 4):  # one token is left to read
            if (source := known.get(tuple(text[end - 4 : end]))) is None:
                break
            forged += [(source, text[:end])] if source != text[:end] else []
        for end in range(4, len(text) + 1, 4):
            known.setdefault(tuple(text[end - 4 : end]), text[:end])
    assert forged, "all pages that it finds are its own"
    a, b = (model.hidden_states(torch.tensor([text]))[0][0, -4:] for text in forged[0])
    assert not torch.allclose(a, b, atol=1e-3)  # they are not the same to the model


def my_waste(lengths: list[int], size: int) -> tuple[int, float]:
    return ...


check_waste(my_waste)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_waste(lengths, size):
#     pages = sum(-(-n // size) for n in lengths)
#     return pages, 1 - sum(lengths) / (pages * size)
# ```
# </details>
#
# **2 · Predict.** Prompts come one after another, each when the one before has ended with a single new token. How many tokens are found, in all?


# %%
def my_hits(prompts: list[list[int]], size: int) -> int:
    return ...


check_hits(my_hits)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_hits(prompts, size):
#     known, found = set(), 0
#     for p in prompts:
#         for end in range(size, len(p), size):
#             if tuple(p[:end]) not in known:
#                 break
#             found += size
#         known |= {tuple(p[:end]) for end in range(size, len(p) + 1, size)}
#     return found
# ```
# </details>
#
# **3 · Break.** Somebody saves a hash and names a page by its own tokens only, without $\text{key}_{i-1}$. Give two prompts (lists of token
# numbers, with pages of `size`): the first comes once, then the second comes twice, and this server must answer it from the first one's latents. (A prompt's last token is always read anew.)


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
# "The *left* door: what is behind it?" and "the *right* door: …": equal from the second page on. The first time the second prompt's first page is new, so it is
# read whole; when it comes again both its pages are known, the second by the name that the other's page has: it is answered with the wrong door.
# </details>

# %% [markdown]
# ## Scale-up
# At 671B the parts are the same and the numbers are these.

# %%
from dsv3_ref.config import V3, count_params

token = count_params(V3).cache_bytes
weights = 3 * V3.dim * V3.moe_inter_dim * (V3.n_layers - V3.n_dense_layers)  # a byte each
print(f"latents of a token {token / 1e3:.0f} kB; a prompt of 4,096: {4096 * token / 1e6:.0f} MB to hand over, "
      f"{4096 * token / 50e9 * 1e3:.0f} ms at 50 GB/s")  # fmt: skip
print(
    f"one expert a GPU and layer, FP8: {weights / 1e9:.1f} GB; attention, embeddings and the rest beside it"
)
print(f"a page of 64 tokens {64 * token / 1e6:.1f} MB; 40 GB of cache hold {40e9 / (64 * token):,.0f} pages, "
      f"{40e9 / token / 1e3:.0f}k tokens")  # fmt: skip

# %% [markdown]
# *Prefill* is limited by arithmetic: whole chunks, expanded attention, tensor parallelism within a node. *Decoding* is limited by memory: the absorbed form
# over pages ([kernel](../kernels/decode.py)), one expert a GPU, tokens that travel by all-to-all (chapter 11). The latents could go over InfiniBand layer by layer, while the next layer is computed; ours wait for the whole prompt. Redundant experts
# are a new placement between two steps, the seam `call_between_steps`.
#
# This server is made to be read, and has served small models on a CPU only. For V3 itself export to Hugging Face's layout and let vLLM or SGLang serve it (their options as documented; **not run here**):
#
# ```
# .venv/bin/python -c "import torch; from dsv3_ref import load, save_hf
# save_hf(load('runs/v3', dtype=torch.bfloat16), 'export')"    # 1.3 TB
# cp runs/v3/tokenizer.json export/
# vllm serve export --tensor-parallel-size 8 --enable-expert-parallel --quantization fp8 \
#   --speculative-config '{"method": "mtp", "num_speculative_tokens": 1}'
# python -m sglang.launch_server --model-path export --tp 8 --quantization fp8 \
#   --speculative-algorithm EAGLE --speculative-num-steps 1 --speculative-eagle-topk 1 \
#   --speculative-num-draft-tokens 2
# ```
#
# Eight H200 (141 GB each) hold it in FP8. Talks need a chat template beside the tokenizer (`--chat-template`), with the marks of chapter 14. Both servers have the ideas of this chapter under the same names: paged attention, prefix caching (SGLang: RadixAttention), chunked prefill, prefill and decode
# apart. The official client talks to either as it does to ours.
