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
from dsv3_ref.viz import BLUE, GREEN, GRAY, ORANGE, checker, figure, play, show

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
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dsv3_ref import ops
from dsv3_ref.config import UserError
from dsv3_ref.decode import (
    SamplingParams,
    DecodeLayer,
    MTPDecodeLayer,
    decode_weights,
    small_matmul,
)
from dsv3_ref.mla import attend_expanded, paged_attention
from dsv3_ref.block import Block
from dsv3_ref.model import Transformer
from dsv3_ref.ops import impl, use
from dsv3_ref.rope import rope_cos_sin, softmax_scale

# %% [markdown]
# ## Pages
# Nobody knows how long an answer will be. To reserve the longest possible stretch for each would leave most memory empty. So the
# cache is cut into pages of $y$ positions, and a row has a *block table*, the list of its pages. Position $t$ of row $b$ lies in
#
# $$\text{page}_t = \text{table}_{b,\lfloor t/y\rfloor},\qquad \text{slot}_t = t \bmod y$$
#
# which wastes at most $y-1$ positions a row. One table serves all layers.
#
# The latents of a page are a function of the tokens up to its end and of nothing else. So if a prompt begins like one that was read before, its pages
# can be *shared*. A full page is known by a name that contains all that came before it:
#
# $$\text{key}_i = H(\text{key}_{i-1},\ \text{tokens of page } i)$$
#
# $H$ is SHA-256: with a weak hash somebody could construct a prompt that is answered from another's cache. Each page counts its users. One that
# has a name and no users is *idle*: it stays until memory is needed, and then the one that has been idle longest goes first. A
# row gives its pages back from the last to the first, so a chain loses its end before its beginning.


# %%
#| export
def hash_blocks(
    tokens: Sequence[int], block_size: int, prefix_hashes: Sequence[bytes] = ()
) -> list[bytes]:
    """Names of full pages, key_i = SHA-256(key_{i−1}, tokens of page i); `before`: the first."""
    keys = list(prefix_hashes)
    for i in range(len(keys), len(tokens) // block_size):
        page = array("q", tokens[i * block_size : (i + 1) * block_size]).tobytes()
        keys.append(hashlib.sha256((keys[-1] if keys else b"") + page).digest())
    return keys


class BlockPool:
    """Which pages are in use by how many, which are idle but known by name, which are free."""

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks, self.block_size, self.free_blocks, self.ref_cnt = (
            num_blocks,
            block_size,
            list(range(num_blocks))[::-1],
            [0] * num_blocks,
        )
        self.block_hash: dict[int, bytes] = {}  # page → its name
        self.cached_blocks: dict[bytes, int] = {}
        self.evictable: OrderedDict[int, None] = OrderedDict()  # the longest idle first

    @property
    def num_free(self) -> int:
        """Pages that could be taken."""
        return len(self.free_blocks) + len(self.evictable)

    @property
    def num_used(self) -> int:
        """Pages that somebody uses."""
        return self.num_blocks - self.num_free

    def allocate(self) -> int | None:
        """A page to write in, if need be the longest idle one; None if all are in use."""
        if not self.num_free:
            return None
        if not self.free_blocks:
            page, _ = self.evictable.popitem(last=False)
            self.free_blocks.append(page)
            del self.cached_blocks[self.block_hash.pop(page)]
        page = self.free_blocks.pop()
        self.ref_cnt[page] = 1
        return page

    def get_cached_blocks(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest known beginning, from now on used once more."""
        found = []
        for key in keys:
            if (page := self.cached_blocks.get(key)) is None:
                break
            self.evictable.pop(page, None)
            self.ref_cnt[page] += 1
            found.append(page)
        return found

    def free(self, pages: Sequence[int]) -> None:
        """Use these no longer."""
        for page in reversed(pages):
            self.ref_cnt[page] -= 1
            if not self.ref_cnt[page]:
                if page in self.block_hash:
                    self.evictable[page] = None
                else:
                    self.free_blocks.append(page)

    def cache_block(self, page: int, key: bytes) -> None:
        """This page is full; if another of the same name is known, that one stays known."""
        if key not in self.cached_blocks and page not in self.block_hash:
            self.cached_blocks[key], self.block_hash[page] = page, key

    def reset_prefix_cache(self) -> None:
        """No page is known any more (the weights have changed)."""
        self.free_blocks += self.evictable
        for known in (self.evictable, self.block_hash, self.cached_blocks):
            known.clear()


# %%
pages = BlockPool(6, 4)
first = [pages.allocate() for _ in range(3)]
keys = hash_blocks(range(10), 4)  # two full pages and a half
for page, key in zip(first, keys):
    pages.cache_block(page, key)
again = pages.get_cached_blocks(
    hash_blocks([*range(8), 77, 78, 79, 80], 4)
)  # the third page differs
assert again == first[:2] and pages.ref_cnt[first[0]] == 2
pages.free(first)
pages.free(again)
assert pages.num_free == 6 and list(pages.evictable) == [
    first[1],
    first[0],
]  # the end of the chain first
taken = [pages.allocate() for _ in range(5)]
assert pages.get_cached_blocks(keys) == [first[0]]  # its successor was overwritten
assert pages.allocate() is None and hash_blocks([5, *range(1, 8)], 4)[1] != keys[1]
print("6 pages: 3 used, 2 of them shared, idle, found again, at last overwritten")

# %% [markdown]
# ## Attention over pages
# A step gathers rows of unequal length. In each head, row $b$'s query at position $n_b$ sees its own row up to there:
#
# $$o_b = \sum_{t \le n_b} p_{bt}\,c_t,\qquad p_{bt} = \operatorname{softmax}_{t \le n_b}\big(\sigma\,(q^C_b \cdot c_t + q^R_b\cdot k_t)\big),\qquad c_t, k_t\ \text{from}\ \text{page}_t, \text{slot}_t$$
#
# with $\sigma$ the scale of the softmax, $q^C$ the query's content part already mapped into the latent, $k_t$ the rotary key: $(b,s,h,x) \times (p,y,x) \to (b,s,h,c)$.
#
# That is `paged_attention` of [chapter 03](03_mla.ipynb), for which a GPU has [a kernel](../kernels/decode.py). Its plain form takes
# one row after another. On a CPU it pays to gather all rows at once, so we register a second form under the same
# name. Padding goes to one page more than there are, which nobody reads. Layers are those of chapter 08, with pages where they had rows.


# %%
#| export
@impl("paged_attention", "gathered")
def _(q_bshx, kv_cache_pyx, block_table_bp, cache_seqlens_b, c: int, scale: float):
    """All rows at once: a copy of every page in use, what lies in the future masked."""
    kv_btx = kv_cache_pyx[block_table_bp].flatten(1, 2)
    b, s, h, _ = q_bshx.shape
    score_bst = (q_bshx.flatten(1, 2) @ kv_btx.mT).mul_(scale)  # s: positions and heads
    seen_bs = cache_seqlens_b[:, None] - s + 1 + torch.arange(s, device=cache_seqlens_b.device)
    future = seen_bs[..., None, None] <= torch.arange(
        kv_btx.shape[1], device=cache_seqlens_b.device
    )
    score_bst.view(b, s, h, -1).masked_fill_(future, -torch.inf)
    return (score_bst.softmax(-1) @ kv_btx[..., :c]).view(b, s, h, c)


class PagedPositions(NamedTuple):
    """Where s positions of every row go: a `Place` of chapter 08, in pages."""

    cache_index: tuple  # (page, slot), both (b, s)
    end: int
    freqs_cis: torch.Tensor  # rotations, (b, s, 1, r/2)
    block_table_bp: torch.Tensor  # int32
    cache_seqlens_b: torch.Tensor  # positions that exist afterwards
    is_first_prefill: bool  # nothing came before: a prompt's first piece


def paged_positions_for(
    tables: list[list[int]], at: list[int], s: int, size: int, spare: int, freqs_cis_tx
):
    """The s positions behind `at` in rows with these tables; past its pages a row gets `spare`."""
    device, end = freqs_cis_tx.device, max(at) + s
    width = -(-end // size)
    block_table_bp = torch.tensor([[*t[:width], *[spare] * (width - len(t))] for t in tables])
    position_bs = torch.tensor(at)[:, None] + torch.arange(s)
    page_bs, block_table_bp = (
        block_table_bp.gather(1, position_bs // size),
        block_table_bp.int().to(device),
    )
    index = page_bs.to(device), (position_bs % size).to(device)
    turn = freqs_cis_tx[position_bs.to(device).clamp(max=len(freqs_cis_tx) - 1)[..., None]]
    return PagedPositions(
        index, size, turn, block_table_bp, position_bs[:, -1].to(device) + 1, not any(at)
    )


class Paged:
    """Attention of a `DecodeLayer` whose cache is pages: kv_btx is (p, y, x)."""

    def attention(self, x_bsd, at: PagedPositions):
        """eq. 1–11, a prompt's first piece on expanded keys, all else inside the latent."""
        c, scale, (b, s, _) = self.config.kv_lora_rank, softmax_scale(self.config), x_bsd.shape
        q_bshi, q_bshr = self.project_q(x_bsd, at)
        self.update_kv_cache(x_bsd, at)
        if at.is_first_prefill:
            latent = self.kv_btx[at.cache_index].tensor_split([c], -1)
            o_bshv = attend_expanded(q_bshi, q_bshr, *latent, self.block.attn.wkv_b.weight, scale)
            return self.project("wo", o_bshv.flatten(2))
        q_bshc = (q_bshi.flatten(0, 1).transpose(0, 1) @ self.wk_hic).transpose(0, 1)
        q_bshx = torch.cat((q_bshc.unflatten(0, (b, s)), q_bshr), -1)
        o_bshc = paged_attention(
            q_bshx, self.kv_btx, at.block_table_bp, at.cache_seqlens_b, c, scale
        )
        o_hnv = o_bshc.flatten(0, 1).transpose(0, 1) @ self.wv_hcv
        return self.project("wo", o_hnv.transpose(0, 1).reshape(b, s, -1))


class PagedLayer(Paged, DecodeLayer):
    """A block over pages."""


class PagedMTP(Paged, MTPDecodeLayer):
    """An MTP module over pages."""


# %% [markdown]
# Hidden states of rows of unequal length must be those of a plain forward pass, whatever pages they lie in, read whole or in pieces; and
# both forms of the op must agree.


# %%
#| export
class PagedModel:
    """A model's layers over one pool of pages, of which the last takes padding."""

    def __init__(self, model: Transformer, num_blocks: int, block_size: int):
        self.model, self.block_size, self.padding_block = model, block_size, num_blocks
        c, w = model.config, model.embed.weight
        shape = num_blocks + 1, block_size, c.kv_lora_rank + c.qk_rope_head_dim
        n_layers = len(model.layers) + len(model.mtp)
        self.kv_caches = [
            torch.zeros(shape, device=w.device, dtype=w.dtype) for _ in range(n_layers)
        ]
        position_t = torch.arange(c.max_seq_len, device=w.device)
        self.freqs_cis_tx = torch.complex(*rope_cos_sin(c, position_t))
        self.build_layers()

    def build_layers(self) -> None:
        """Layers of the weights as they are now, over the same pages."""
        tables, self.head_dw = decode_weights(self.model)
        modules, self.layers = [*self.model.layers.values(), *self.model.mtp.values()], []
        for x, table, kv_pyx in zip(modules, tables, self.kv_caches):
            kind = PagedLayer if isinstance(x, Block) else PagedMTP
            self.layers.append(kind(x, table, 1, 1))
            self.layers[-1].kv_btx = kv_pyx

    def hidden_states(self, token_bs, at: PagedPositions):
        """h⁰ of these tokens, (b, s, d), normed."""
        x_bsd = self.embed(token_bs)
        for layer in self.layers[: len(self.model.layers)]:
            x_bsd = layer(x_bsd, at)
        return self.model.norm(x_bsd)

    def mtp_forward(self, k: int, h_bsd, token_bs, at: PagedPositions):
        """h^k of the same positions from h^{k−1} and the tokens k later (eq. 21–22)."""
        return self.layers[len(self.model.layers) + k - 1]((self.embed(token_bs), h_bsd), at)

    def embed(self, token_bs):
        w = self.model.embed.weight
        return F.embedding(torch.as_tensor(token_bs, device=w.device), w)

    def logits(self, h):
        """Scores of every word, (…, w)."""
        return small_matmul(h.flatten(0, -2), self.head_dw).unflatten(0, h.shape[:-1])


# %%
from dataclasses import replace

model = Transformer(replace(TINY, vocab_size=256, n_layers=3, n_mtp_layers=2)).eval()
with torch.inference_mode():
    token_bs = torch.randint(256, (2, 20))
    want_bsd = model.hidden_states(token_bs)[0]
    scattered = PagedModel(model, 12, 4)
    tables = [[7, 2, 9, 0, 11], [3, 1, 10, 5, 6]]
    for backend in ("gathered", "auto"):
        for row, pieces in ((0, (0, 9, 13)), (1, (0, 7))):  # read in pieces
            for a, z in zip(pieces, pieces[1:]):
                at = paged_positions_for(
                    tables[row : row + 1], [a], z - a, 4, 12, scattered.freqs_cis_tx
                )
                scattered.hidden_states(token_bs[row : row + 1, a:z], at)
        at = paged_positions_for(
            tables, [13, 7], 3, 4, 12, scattered.freqs_cis_tx
        )  # then side by side
        with use(backend, "torch"):
            got_bsd = scattered.hidden_states(
                torch.stack((token_bs[0, 13:16], token_bs[1, 7:10])), at
            )
        assert torch.allclose(got_bsd[0], want_bsd[0, 13:16], atol=1e-4)
        assert torch.allclose(got_bsd[1], want_bsd[1, 7:10], atol=1e-4)
print("rows of 16 and 10 positions in scattered pages: as in a plain forward pass")

# %% [markdown]
# ## A row
# What the server knows of a request is the text so far and how much of it the model has read, $n$. All states follow from
# these: a new prompt is all unread; a row that writes has exactly one token unread, the one just chosen; and a
# row that lost its pages is simply unread again. So "prefill" and "recover" are one piece of code. With $D$ drafts the MTP modules have
# read less (chapter 08), and the hidden states between the two wait in `h_sd`.


# %%
#| export
class QueueFull(Exception):
    """The queue has no room for another row."""


@dataclass(eq=False)
class Request:
    """One request: its tokens, how many of them are read, and where their latents lie."""

    tokens: list[int]  # the prompt, then what is written
    max_tokens: int
    sampling_params: SamplingParams = (
        SamplingParams()
    )  # with its own random numbers, so that neighbors change nothing
    stop_token_ids: frozenset[int] = frozenset()
    num_logprobs: int = (
        -1
    )  # likeliest tokens whose log p is noted beside the chosen one's; −1: none
    num_computed_tokens: int = 0
    num_mtp_computed_tokens: int = 0  # positions read by the MTP modules
    h_sd: torch.Tensor | None = None  # of positions mtp … n − 1
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_cached_blocks: int = 0  # pages whose name is known to all
    num_cached_tokens: int = 0  # positions of the prompt that another had read
    remote_prefill: bool = False  # its prompt is being read elsewhere
    num_present_tokens: int = 0  # for whom it is read: positions that are there already
    aborted: bool = False  # nobody waits for it any more
    finish_reason: str = ""  # stop, length, abort, prefilled, error
    logprobs: list = field(
        default_factory=list
    )  # of each written token, if `num_logprobs` is not −1

    def __post_init__(self):
        self.num_prompt_tokens = len(self.tokens)

    @property
    def output_tokens(self) -> list[int]:
        """What is written."""
        return self.tokens[self.num_prompt_tokens :]

    def append_tokens(self, tokens: list[int]) -> list[int]:
        """Append tokens up to the first that ends the row; what was appended."""
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
# ## One step
# The engine repeats one step: **admit** rows while there is room; **read** at most `chunk` tokens of prompts, the oldest first; let all rows
# that are ready **write** one token; **retire** those that ended. Reading a prompt of $N$ tokens whole would stop
# everybody for the time of $N$ tokens; in pieces nobody waits longer than
#
# $$\text{time of a step} \le \text{time}(\text{chunk tokens}) + \text{time}(\text{one token of every row})$$
#
# Pages are taken only when they are needed. If there are none, the *youngest* row gives up all of its pages and goes back to the front of the queue; the
# oldest is never disturbed, so every row ends. A row that could not end even alone is refused at the door.


# %%
#| export
class Scheduler:
    """Rows that wait, rows that are in, and who has which page; no model in sight."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_queue: int,
        num_speculative_tokens: int,
        max_model_len: int,
    ):
        self.block_pool, self.block_size, self.max_num_seqs, self.max_queue = (
            BlockPool(num_blocks, block_size),
            block_size,
            max_num_seqs,
            max_queue,
        )
        self.num_speculative_tokens, self.max_model_len = (
            num_speculative_tokens,
            min(max_model_len, num_blocks * block_size - num_speculative_tokens),
        )
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # the oldest first
        self.counters: Counter = Counter()

    def submit(self, *rows: Request) -> None:
        """Queue rows, all or none; raises `QueueFull`, or a `UserError` for what can never end."""
        for row in rows:
            if not row.tokens or row.max_tokens < 1:
                raise UserError("a prompt needs at least one token, and so does an answer")
            if row.num_prompt_tokens + row.max_tokens > self.max_model_len:
                raise UserError(
                    f"a prompt of {row.num_prompt_tokens} tokens and an answer of {row.max_tokens} are more than "
                    f"the {self.max_model_len} that this server holds"
                )
        if len(self.waiting) + len(rows) > self.max_queue:
            raise QueueFull
        self.waiting.extend(rows)

    def num_blocks_needed(self, row: Request) -> int:
        """Pages that a row still needs before it can write."""
        return -(-(len(row.tokens) + 1 + self.num_speculative_tokens) // self.block_size) - len(
            row.block_ids
        )

    def schedule_waiting(self) -> None:
        """Rows come in, in order, while there are places and pages that nobody counts on."""
        while self.waiting and len(self.running) < self.max_num_seqs:
            promised = sum(max(0, self.num_blocks_needed(row)) for row in self.running)
            need = promised + self.num_blocks_needed(self.waiting[0])
            if self.running and need > self.block_pool.num_free:
                return
            self.running.append(self.waiting.popleft())

    def match_prefix(self, row: Request) -> None:
        """Begin with the pages that are known; at least one token is left to read."""
        row.block_hashes = hash_blocks(row.tokens[:-1], self.block_size, row.block_hashes)
        row.block_ids = self.block_pool.get_cached_blocks(
            row.block_hashes[: (len(row.tokens) - 1) // self.block_size]
        )
        row.num_computed_tokens = row.num_mtp_computed_tokens = len(row.block_ids) * self.block_size
        row.num_cached_blocks, row.num_cached_tokens = (
            len(row.block_ids),
            min(row.num_computed_tokens, row.num_prompt_tokens),
        )
        self.counters["prefix_cache_hits"] += row.num_computed_tokens

    def allocate_slots(self, row: Request, n: int) -> bool:
        """Pages for n positions of a row, the youngest row's if need be; False: not now."""
        while len(row.block_ids) * self.block_size < n:
            if (page := self.block_pool.allocate()) is not None:
                row.block_ids.append(page)
                continue
            victim = next(
                (r for r in reversed(self.running) if r.block_ids and not r.remote_prefill), row
            )
            if victim is row and any(r.remote_prefill for r in self.running):
                return False
            self.preempt(victim)
            if victim is row:
                return False
        return True

    def preempt(self, row: Request) -> None:
        """To the front of the queue, unread."""
        self.running.remove(row)
        self.free(row)
        self.waiting.appendleft(row)
        self.counters["preemptions"] += 1

    def free(self, row: Request) -> None:
        """A row without pages is unread."""
        self.block_pool.free(row.block_ids)
        (
            row.block_ids,
            row.num_cached_blocks,
            row.num_computed_tokens,
            row.num_mtp_computed_tokens,
            row.h_sd,
        ) = [], 0, 0, 0, None

    def cache_full_blocks(self, row: Request) -> None:
        """Name the pages that are full, also with what the MTP modules have read."""
        full = (
            min(row.num_computed_tokens, row.num_mtp_computed_tokens)
            if self.num_speculative_tokens
            else row.num_computed_tokens
        ) // self.block_size
        if full > row.num_cached_blocks:
            row.block_hashes = hash_blocks(
                row.tokens[: full * self.block_size], self.block_size, row.block_hashes
            )
            for i in range(row.num_cached_blocks, full):
                self.block_pool.cache_block(row.block_ids[i], row.block_hashes[i])
            row.num_cached_blocks = full

    def drop_aborted(self) -> list[Request]:
        """Rows that nobody waits for leave, from wherever they are; their pages are free."""
        gone = [r for r in [*self.running, *self.waiting] if r.aborted]
        for row in gone:
            row.finish_reason = "abort"
            (self.running if row in self.running else self.waiting).remove(row)
            self.free(row)
        return gone


# %%
ledger = Scheduler(
    num_blocks=4,
    block_size=4,
    max_num_seqs=3,
    max_queue=3,
    num_speculative_tokens=0,
    max_model_len=16,
)
old, young = Request([1] * 6, 8), Request([2] * 6, 8)
ledger.submit(old, young)
ledger.schedule_waiting()
assert (
    ledger.allocate_slots(old, 7)
    and ledger.allocate_slots(young, 7)
    and ledger.block_pool.num_free == 0
)
assert ledger.allocate_slots(old, 9) and not young.block_ids and ledger.waiting[0] is young
for row, sentence in (
    (Request([1] * 9, 8), "more than the 16"),
    (Request([], 1), "at least one token"),
):
    try:
        ledger.submit(row)
    except UserError as e:
        assert sentence in str(e)
young.aborted = True
assert ledger.drop_aborted() == [young] and not ledger.waiting
print("4 pages, two rows of up to 14 tokens: the younger gave way to the older")

# %% [markdown]
# ## Drafts inside the batch
# With $D$ drafts a step reads $D+1$ tokens of every row and keeps, of row $b$, the $a_b$ guesses that the main model accepts and one token of its own: rows
# advance at different speeds, which pages do not mind. The MTP modules catch up on what was accepted since:
#
# $$\text{mtp}_b \leftarrow \max(\text{mtp}_b,\ n_b + 1 - D) \ \text{ before }\ n_b \leftarrow n_b + 1 + a_b$$
#
# Whoever shares pages shares the MTP modules' latents too. At a page's last $D$ positions these depend on tokens *behind* the page, which another row may
# have written differently. Such a draft can be a little worse. The text cannot, for the main model judges it.


# %%
#| export
class Drafts:
    """How an engine guesses, judges, and lets the MTP modules catch up."""

    paged: PagedModel
    num_speculative_tokens: int

    def place(self, rows: list[Request], at: list[int], s: int) -> PagedPositions:
        tables = [row.block_ids for row in rows]
        return paged_positions_for(
            tables, at, s, self.paged.block_size, self.paged.padding_block, self.paged.freqs_cis_tx
        )

    def catch_up(self, row: Request) -> None:
        """The MTP modules read what the main model has read, where the tokens behind are known."""
        end = min(row.num_computed_tokens, len(row.tokens) - self.num_speculative_tokens)
        if (s := end - row.num_mtp_computed_tokens) <= 0:
            return
        at, h_bsd = self.place([row], [row.num_mtp_computed_tokens], s), row.h_sd[None, :s]
        for k in range(1, self.num_speculative_tokens + 1):
            token_bs = [row.tokens[row.num_mtp_computed_tokens + k : end + k]]
            h_bsd = self.paged.mtp_forward(k, h_bsd, token_bs, at)
        row.h_sd, row.num_mtp_computed_tokens = row.h_sd[s:], end

    def propose(self, rows: list[Request]) -> tuple[list[list[int]], list[list]]:
        """D guesses for every row, and the distributions that drawn ones came from."""
        guesses, drawn_from = [[] for _ in rows], [[] for _ in rows]
        s = max(row.num_computed_tokens - row.num_mtp_computed_tokens for row in rows)
        at = self.place(rows, [row.num_mtp_computed_tokens for row in rows], s)
        h_bsd = torch.stack([F.pad(row.h_sd, (0, 0, 0, s - len(row.h_sd))) for row in rows])
        last_b = [row.num_computed_tokens - 1 - row.num_mtp_computed_tokens for row in rows]
        for k in range(1, self.num_speculative_tokens + 1):
            texts = [
                [*r.tokens[r.num_mtp_computed_tokens + k :], *g] for r, g in zip(rows, guesses)
            ]
            h_bsd = self.paged.mtp_forward(k, h_bsd, [(t + [0] * s)[:s] for t in texts], at)
            logit_bw = self.paged.logits(h_bsd[range(len(rows)), last_b])
            likeliest_b = logit_bw.argmax(-1).tolist()
            for i, row in enumerate(rows):
                token = likeliest_b[i]
                if row.sampling_params.temperature:
                    token_b, q_bw = row.sampling_params.draft(logit_bw[i : i + 1])
                    token = int(token_b)
                    drawn_from[i].append(q_bw)
                guesses[i].append(token)
        return guesses, drawn_from

    def verify(self, rows: list[Request], logit_bsw, guesses, drawn_from) -> list[list[int]]:
        """What each row writes: accepted guesses and one token more."""
        said_bs, new = logit_bsw.argmax(-1).tolist(), []
        for i, (row, said, guess) in enumerate(zip(rows, said_bs, guesses)):
            if not row.sampling_params.temperature:
                n = next((k for k, g in enumerate(guess) if g != said[k]), len(guess))
                new.append(said[: n + 1])
            elif guess:
                guess_bk = torch.tensor([guess], device=logit_bsw.device)
                n_b, token_b = row.sampling_params.verify(
                    logit_bsw[i : i + 1], drawn_from[i], guess_bk
                )
                new.append([*guess[: int(n_b)], int(token_b)])
            else:
                new.append([int(row.sampling_params.sample(logit_bsw[i]))])
        return new

    def advance(self, row: Request, h_sd, accepted: int) -> None:
        """n and mtp move on, as in chapter 08; hidden states in between wait."""
        n, mtp = (
            row.num_computed_tokens + 1 + accepted,
            max(
                row.num_mtp_computed_tokens,
                row.num_computed_tokens + 1 - self.num_speculative_tokens,
            ),
        )
        if self.num_speculative_tokens:
            row.h_sd = torch.cat((row.h_sd, h_sd))[
                mtp - row.num_mtp_computed_tokens : n - row.num_mtp_computed_tokens
            ]
        row.num_computed_tokens, row.num_mtp_computed_tokens = n, mtp


# %% [markdown]
# ## Reading and writing
# These are the two halves of a step. A prompt may also be read by *another process*, as in the report: `send` gives a row away, and a `KVTransfer` with its latents comes back. At
# full size these are $L\,(c + r)$ numbers a token, 70 kB, which travel once; pages that are here already are not sent.


# %%
#| export
class KVTransfer(NamedTuple):
    """A prompt that was read elsewhere: latents of positions start … n − 1 in all layers."""

    start: int
    kv_lsx: torch.Tensor
    num_mtp_computed_tokens: int
    h_sd: torch.Tensor  # hidden states of positions mtp … n − 1; without drafts none
    logit_w: torch.Tensor  # behind the last token


class Halves(Drafts):
    """The two halves of a step: `read` prompts, `write` answers."""

    def prefill_step(self) -> list[tuple[Request, list[int]]]:
        """At most `chunk` tokens of the oldest unread prompts; first tokens of those that end."""
        left, out = self.prefill_chunk, []
        for row in [
            r
            for r in self.running
            if not (r.remote_prefill or r.finish_reason or self.is_decoding(r))
        ]:
            if not (left and row in self.running):
                continue
            if not row.block_ids:
                self.match_prefix(row)
            if self.send_to_prefill and len(row.tokens) - row.num_computed_tokens > 1:
                if self.allocate_slots(row, len(row.tokens)):
                    row.remote_prefill = self.send_to_prefill(row)
                if row.remote_prefill or row not in self.running:
                    continue
            s = min(left, len(row.tokens) - row.num_computed_tokens)
            if self.allocate_slots(row, row.num_computed_tokens + s):
                left -= s
                out += self.prefill_request(row, s)
        return out

    def prefill_request(self, row: Request, s: int) -> list[tuple[Request, list[int]]]:
        """Read s tokens of a prompt; behind the last one, choose the next."""
        at = self.place([row], [row.num_computed_tokens], s)
        h_sd = self.paged.hidden_states(
            [row.tokens[row.num_computed_tokens : row.num_computed_tokens + s]], at
        )[0]
        self.counters["prompt_tokens"] += s
        row.num_computed_tokens += s
        if self.num_speculative_tokens:
            row.h_sd = h_sd if row.h_sd is None else torch.cat((row.h_sd, h_sd))
            self.catch_up(row)
        self.cache_full_blocks(row)
        if row.num_computed_tokens < len(row.tokens):
            return []
        logit_w = self.paged.logits(h_sd[-1:])[0]
        if self.outgoing_transfers is None:
            return [(row, self.append_first_token(row, logit_w))]
        self.outgoing_transfers.append((row, self.export_kv(row, logit_w)))
        row.finish_reason = "prefilled"
        return []

    def append_first_token(self, row: Request, logit_w) -> list[int]:
        """The token behind a prompt."""
        new = row.append_tokens([int(row.sampling_params.sample(logit_w[None]))])
        self.record_logprobs(row, new, logit_w[None])
        return new

    def decode_step(self) -> list[tuple[Request, list[int]]]:
        """One round of every row that is ready: D + 1 tokens read, 1 to D + 1 written."""
        rows = [r for r in self.running if self.is_decoding(r)]
        rows = [
            r
            for r in rows
            if r in self.running
            and self.allocate_slots(r, r.num_computed_tokens + 1 + self.num_speculative_tokens)
        ]
        rows = [r for r in rows if r in self.running]  # a later one's need may have put it back
        if not rows:
            return []
        guesses, drawn_from = (
            self.propose(rows) if self.num_speculative_tokens else ([[]] * len(rows), [])
        )
        token_bs = [[row.tokens[-1], *guess] for row, guess in zip(rows, guesses)]
        at = self.place(
            rows, [row.num_computed_tokens for row in rows], 1 + self.num_speculative_tokens
        )
        h_bsd = self.paged.hidden_states(token_bs, at)
        logit_bsw = self.paged.logits(h_bsd)
        out = []
        written = self.verify(rows, logit_bsw, guesses, drawn_from)
        for row, h_sd, logit_sw, new in zip(rows, h_bsd, logit_bsw, written):
            self.advance(row, h_sd, len(new) - 1)
            self.counters.update(
                draft_tokens=self.num_speculative_tokens, accepted_tokens=len(new) - 1
            )
            out.append((row, new := row.append_tokens(new)))
            row.num_computed_tokens = min(
                row.num_computed_tokens, len(row.tokens) - 1
            )  # an end inside accepted drafts
            self.record_logprobs(row, new, logit_sw)
            self.cache_full_blocks(row)
        return out

    def record_logprobs(self, row: Request, new: list[int], logit_sw) -> None:
        """Count; and log p of what was written, where somebody asked."""
        self.counters["generation_tokens"] += len(new)
        if row.num_logprobs >= 0:
            logp_sw = logit_sw[: len(new)].float().log_softmax(-1)
            best = logp_sw.topk(max(1, row.num_logprobs), -1)
            pairs = (
                list(zip(*x))[: row.num_logprobs]
                for x in zip(best.indices.tolist(), best.values.tolist())
            )
            row.logprobs += list(zip(logp_sw[range(len(new)), new].tolist(), pairs))

    def export_kv(self, row: Request, logit_w) -> KVTransfer:
        """What the writing process needs of a prompt."""
        start = min(row.num_present_tokens, row.num_computed_tokens)
        position_s = torch.arange(start, row.num_computed_tokens)
        page_s = torch.tensor(row.block_ids)[position_s // self.block_size]
        kv_lsx = torch.stack(
            [kv_pyx[page_s, position_s % self.block_size] for kv_pyx in self.paged.kv_caches]
        )
        h_sd = row.h_sd if self.num_speculative_tokens else kv_lsx.new_empty(0, 0)
        return KVTransfer(start, kv_lsx, row.num_mtp_computed_tokens, h_sd, logit_w)

    def import_kv(self) -> list[tuple[Request, list[int]]]:
        """Write what has arrived into the pages that wait for it; the first tokens."""
        out = []
        while self.incoming_transfers:
            row, parcel = self.incoming_transfers.popleft()
            if row.finish_reason or not row.remote_prefill:
                continue
            position_s = torch.arange(parcel.start, len(row.tokens))
            page_s = torch.tensor(row.block_ids)[position_s // self.block_size]
            for kv_pyx, kv_sx in zip(self.paged.kv_caches, parcel.kv_lsx):
                kv_pyx[page_s, position_s % self.block_size] = kv_sx.to(kv_pyx)
            held = row.num_mtp_computed_tokens  # positions here already are not written again
            row.remote_prefill, row.num_computed_tokens, row.num_mtp_computed_tokens = (
                False,
                len(row.tokens),
                max(held, parcel.num_mtp_computed_tokens),
            )
            if self.num_speculative_tokens:
                row.h_sd = parcel.h_sd[
                    row.num_mtp_computed_tokens - parcel.num_mtp_computed_tokens :
                ].to(self.paged.kv_caches[0])
            self.cache_full_blocks(row)
            out.append((row, self.append_first_token(row, parcel.logit_w)))
        return out


# %% [markdown]
# ## The engine
# Now the whole step is short. One more opening: `call_between_steps(fn)` runs `fn(model)` when no step is running, for a server that
# moves its experts to where the load is (§3.4.1). Live rows go on.


# %%
#| export
class Engine(Scheduler, Halves):
    """Continuous batching of many rows over one model; one thread calls `step` again and again."""

    def __init__(
        self, model: Transformer, num_blocks: int = 512, block_size: int = 16, max_num_seqs: int = 64,
        prefill_chunk: int = 128, max_queue: int = 256, num_speculative_tokens: int = 0,
    ):  # fmt: skip
        if not 0 <= num_speculative_tokens <= len(model.mtp):
            raise UserError(f"draft must be 0 to {len(model.mtp)}, the model's MTP modules")
        super().__init__(
            num_blocks,
            block_size,
            max_num_seqs,
            max_queue,
            num_speculative_tokens,
            model.config.max_seq_len,
        )
        self.paged, self.prefill_chunk = PagedModel(model, num_blocks, block_size), prefill_chunk
        self.backends = ("gathered",) if self.paged.kv_caches[0].device.type == "cpu" else ()
        self.pending_callbacks: deque = deque()
        self.incoming_transfers: deque[tuple[Request, KVTransfer]] = deque()
        self.send_to_prefill: Callable[[Request], bool] | None = (
            None  # gives a prompt to another process
        )
        self.outgoing_transfers: list | None = (
            None  # in that process: rows that are read, not written
        )

    def call_between_steps(self, fn: Callable, reset_prefix_cache: bool = False) -> Future:
        """Run fn(model) before the next step; `forget` if it changes what the model computes."""
        self.pending_callbacks.append((fn, reset_prefix_cache, future := Future()))
        return future

    def run_pending_callbacks(self) -> None:
        """What was asked to run between two steps."""
        while self.pending_callbacks:
            fn, forget, future = self.pending_callbacks.popleft()
            try:
                result = fn(self.paged.model)
            except Exception as e:
                future.set_exception(e)
            else:
                future.set_result(result)
            self.paged.build_layers()  # also after half of a change
            if forget:
                self.block_pool.reset_prefix_cache()

    def step(self) -> list[tuple[Request, list[int]]]:
        """One step; rows with their new tokens, none for rows that were cancelled."""
        self.run_pending_callbacks()
        out = [(row, []) for row in self.drop_aborted()]
        with torch.inference_mode(), use(*self.backends, *ops.ACTIVE_BACKENDS):
            out += self.import_kv()
            self.schedule_waiting()
            out += self.prefill_step()
            out += self.decode_step()
        for row in [r for r in self.running if r.finish_reason]:
            self.running.remove(row)
            self.free(row)
        self.counters["steps"] += 1
        return out

    def is_decoding(self, row: Request) -> bool:
        """Whether only the last token is unread (and MTP, if it is to draft, has something)."""
        fit = len(row.tokens) - row.num_computed_tokens == 1 and (
            not self.num_speculative_tokens or row.num_mtp_computed_tokens < row.num_computed_tokens
        )
        return (
            fit
            and not row.remote_prefill
            and not row.finish_reason
            and (self.outgoing_transfers is None)
        )


# %% [markdown]
# The check is the hardest there is: eight requests that come at different times, with prompts of 1 to 64 tokens of which some begin alike, read in pieces, with so few
# pages that rows lose theirs, with zero to two drafts. Each must write, token by token, what a full forward pass
# over its own text alone finds likeliest (its *regret* is how far it stays behind that). In the end no page is in use. Then two more write side by side, one leaves early, and
# the other must not notice.


# %%
@torch.no_grad()
def regret(row: Request) -> float:
    """How far the worst token that was written is below the best logit of a full forward pass."""
    logit_sw = model(torch.tensor([row.tokens]))[0, row.num_prompt_tokens - 1 : -1]
    return (
        (logit_sw.amax(-1) - logit_sw[range(len(row.output_tokens)), row.output_tokens])
        .max()
        .item()
    )


def run(engine: Engine, rows: Sequence[Request], apart: int = 0) -> list[Request]:
    """Steps until all rows have ended; a row comes every `apart` steps."""
    todo = deque(rows)
    while todo or engine.running or engine.waiting:
        for _ in range(1 if apart else len(todo)):
            if todo:
                engine.submit(todo.popleft())
        for _ in range(max(1, apart)):
            engine.step()
    return list(rows)


common = torch.randint(256, (24,)).tolist()
for depth in (0, 1, 2):
    engine = Engine(
        model,
        num_blocks=24,
        block_size=4,
        max_num_seqs=6,
        prefill_chunk=16,
        num_speculative_tokens=depth,
    )
    more = lambda n: torch.randint(256, (n,)).tolist()
    rows = [
        Request((common if i % 2 else []) + more(n), 20)
        for i, n in enumerate((1, 9, 60, 2, 30, 17, 5, 40))
    ]
    for row in run(engine, rows, apart=2):
        assert len(row.output_tokens) == 20 and regret(row) < 1e-4
    assert (
        engine.block_pool.num_used == 0
        and engine.counters["preemptions"] > 0
        and engine.counters["prefix_cache_hits"] > 0
    )
    print(f"{depth} drafts: {engine.counters['steps']} steps, {engine.counters['preemptions']} times put back, "
          f"{engine.counters['prefix_cache_hits']} positions found, {engine.counters['prompt_tokens']} read in prompts")  # fmt: skip

engine = Engine(model, num_blocks=64, block_size=4, prefill_chunk=16)
goes, stays = Request(more(9), 30), Request(more(9), 30)
engine.submit(goes, stays)
for _ in range(5):
    engine.step()
goes.aborted = True
engine.call_between_steps(lambda model: model.head.weight.data.mul_(1.0))
run(engine, [])
assert (goes.finish_reason, stays.finish_reason) == ("abort", "length") and regret(stays) < 1e-4

# %% [markdown]
# And the handover: a second engine, which only reads, packs what it read; the first writes as if it had read it itself.


# %%
def handed_over(depth: int) -> tuple[list[Request], int]:
    """Three prompts that begin alike, read by one engine and answered by another; bytes sent."""
    writer, reader = (
        Engine(model, num_blocks=64, block_size=4, prefill_chunk=16, num_speculative_tokens=depth)
        for _ in range(2)
    )
    reader.outgoing_transfers, there, sent = [], {}, 0

    def send(row: Request) -> bool:
        copy = Request(list(row.tokens), 1, num_present_tokens=row.num_computed_tokens)
        there[copy] = row
        reader.submit(copy)
        return True

    writer.send_to_prefill, rows = send, [Request(common + more(9), 12) for _ in range(3)]
    for row in rows:
        writer.submit(row)
        while row.num_computed_tokens == 0 or row.remote_prefill:
            writer.step()
            reader.step()
            for copy, parcel in reader.outgoing_transfers:
                writer.incoming_transfers.append((there[copy], parcel))
                sent += parcel.kv_lsx.nbytes
            reader.outgoing_transfers.clear()
    run(writer, [])
    assert writer.counters["prompt_tokens"] == 0 and all(regret(row) < 1e-4 for row in rows)
    return rows, sent


for depth in (0, 2):
    rows, sent = handed_over(depth)
    known = [row.num_cached_tokens for row in rows]
    print(
        f"{depth} drafts: 3 prompts of 33 tokens, {known} known here, {sent / 1e3:.0f} kB traveled"
    )

# %% [markdown]
# `dsv3 serve` puts a clock, sockets and processes around this: [`dsv3_ref/serving/api_server.py`](../dsv3_ref/serving/api_server.py). One thread steps; requests come in and tokens go out between two
# steps. A client that hangs up is a row that is `gone`. Text becomes tokens by chapter 14's `render_conversation`, where no text can spell a special
# token. With `--prefill-workers 1` the parcels above travel through a pipe to a second process.
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


more = lambda n: torch.randint(wide.vocab_size, (n,)).tolist()
batches, step_ms = [1, 2, 4, 8, 16, 32], []
for b in batches:
    engine = Engine(model, num_blocks=512)
    engine.submit(*(Request(more(16), 200) for _ in range(b)))
    while len(engine.running) < b or not all(map(engine.is_decoding, engine.running)):
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
    engine, long = Engine(model, num_blocks=256, prefill_chunk=chunk), Request(more(1500), 4)
    engine.submit(*(Request(more(8), 120) for _ in range(8)))
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
    engine, begin = Engine(model, num_blocks=128), more(n)
    run(engine, [Request(begin + more(20), 4) for _ in range(6 if SHORT else 24)], apart=2)
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
    engine = Engine(tiny, num_blocks=40, block_size=4, max_num_seqs=rows_at_once, prefill_chunk=16)
    begin, dice, out = more(alike), random.Random(1), []
    rows = [Request(begin + more(dice.randint(2, 12)), dice.randint(5, 40)) for _ in range(10)]
    engine.submit(*rows)
    while engine.running or engine.waiting:
        engine.step()
        users = [[i for i, r in enumerate(rows) if p in r.block_ids] for p in range(40)]
        out.append(
            [
                u or (["idle"] if p in engine.block_pool.evictable else [])
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
        engine = Engine(model, num_blocks=64, block_size=4)
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
