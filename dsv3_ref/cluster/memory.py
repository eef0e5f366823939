"""What a rank of a training mesh holds after each step of its schedule, by kind, in bytes.

Micro-batches in flight hold activations, deferred weight gradients hold the operands of their
products, and messages lie in their buffers from the call that sends or receives them until they
are consumed. Everything is derived from the config and the schedule (chapters 12, 17).
"""

from bisect import bisect_left
from collections import Counter, defaultdict
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from dsv3_ref.config import Config
from dsv3_ref.dualpipe import Action, Step, iter_actions, output_of, schedule
from dsv3_ref.ops import CE_CHUNK_TOKENS
from dsv3_ref.parallel.context_parallel import num_head_groups
from dsv3_ref.parallel.token_dispatcher import FixedSizes
from dsv3_ref.scale import (
    DispatchRows,
    activation_bytes_per_token,
    block_gemms,
    partition_layers,
)

Bytes = Counter[str]  # by kind
TILE = 128


class MemorySettings(NamedTuple):
    """All that a rank's memory depends on, apart from its weights."""

    config: Config
    schedule: str
    pp: int
    ep: int
    num_stages: int
    microbatches: int
    tokens: int  # of a micro-batch, which is one sequence, on this rank
    fp8: bool
    stream: int  # bytes per number of the residual stream and of messages between stages
    rows: DispatchRows
    fixed: "FixedRows | None" = None  # sizes of the dispatch; None: exact ones
    cp: int = 1  # ranks that share a sequence

    def mtp_tokens(self, k: int) -> int:
        """Return the tokens of a micro-batch in the MTP module of depth k.

        Among ranks that share a sequence only one has the last k tokens, which MTP leaves out.
        """
        return self.tokens - k if self.cp == 1 else self.tokens


class Hop(NamedTuple):
    """The members of a hop of the dispatch, and the number of experts behind each of them."""

    experts_per_member: int
    size: int


class FixedRows(NamedTuple):
    """The rows of a rank in a dispatch of fixed sizes, whatever the number of its tokens."""

    sent: tuple[int, ...]  # by hop; as many arrive
    computed: int  # by the rank's experts


def fixed_rows(
    config: Config, ep: int, ranks_per_node: int, tokens: int, capacity: float
) -> FixedRows | None:
    """Return the rows of a dispatch for micro-batches of so many tokens; None if sizes are exact.

    capacity: --dispatch-capacity of `dsv3 train`.
    """
    if ep == 1 or not capacity:
        return None
    k, per_rank = config.n_activated_experts, config.n_routed_experts // ep
    hops = [Hop(per_rank, min(ep, ranks_per_node))]
    if ep > ranks_per_node:
        hops.insert(0, Hop(per_rank * ranks_per_node, ep // ranks_per_node))
    # a row of data has one token more than the model reads of it, and sizes are those of rows
    fixed = FixedSizes(capacity, config.n_routed_experts, k, tokens + 1)
    *capacities, computed = fixed.rows_per_level(hops)
    return FixedRows(tuple(hop.size * n for hop, n in zip(hops, capacities)), computed)


# ── What a micro-batch leaves behind in a stage ──


def block_activations(at: MemorySettings, dense: bool, tokens: int, stream: int) -> Bytes:
    """Return the bytes that a block saves for its backward pass."""
    config, k = at.config, at.config.n_activated_experts
    arrived = at.rows.arrived if at.ep > 1 else None
    computed, sent = None, sum(at.rows.sent)
    if at.fixed:
        arrived, computed = at.fixed.sent[-1] / tokens, at.fixed.computed / tokens
        sent = sum(at.fixed.sent) / tokens
    per_token = activation_bytes_per_token(config, dense, at.fp8, stream, arrived, computed)
    saved = Counter({kind: round(tokens * n) for kind, n in per_token.items()})
    if dense:
        return saved
    e = config.n_routed_experts
    saved["gate"] += 4 * e + 4  # f of the balance loss (eq. 18), and the loss's gradient
    if at.ep > 1:  # of a row that is sent: its token, its address in the list, which experts it has
        saved["rows of experts"] += round(tokens * sent * ((8 if at.fixed else 16) + k))
    if at.fixed:  # the place of rows beyond the sizes
        saved["rows of experts"] += 8 * len(at.fixed.sent)
    saved["rows of experts"] += count_bytes(at)
    return saved


def stage_activations(at: MemorySettings, stage: int) -> Bytes:
    """Return the bytes that a micro-batch saves in a stage."""
    config, s = at.config, at.tokens
    d, r = config.dim, config.qk_rope_head_dim
    layers = partition_layers(config, at.num_stages)[stage]
    token = 8 if at.cp > 1 else 0  # bytes of the own tokens' ids, which are copied from their rows
    saved: Bytes = Counter({"rotations": 4 * r * s if layers else 0})
    saved["token ids"] += token * s * (stage == 0)
    for layer in layers:
        saved += block_activations(at, layer < config.n_dense_layers, s, at.stream)
    if stage < at.num_stages - 1:
        return saved
    # a loss leaves the gradient of its hidden state in bf16; the norm saves its input and 1/ρ
    saved["heads"] += s * (at.stream * d + 4 + 2 * d)
    for k in range(1, config.n_mtp_layers + 1):
        n = at.mtp_tokens(k)
        saved["rotations"] += 4 * r * n
        saved["token ids"] += token * n
        saved["heads"] += n * (at.stream * d + 4 + 4)  # embedding and the norms of both inputs
        saved += block_activations(at, False, n, 2)
        saved["heads"] += n * (2 * d + 4 + 2 * d)
    return saved


def count_bytes(at: MemorySettings) -> int:
    """Return the bytes of the numbers of rows of a rank's experts, which three products save.

    In FP8 it is one tensor; with exact sizes and several ranks, it has the number of rows of no
    expert, too. In bf16 each product has where the rows of every expert end, in int32.
    """
    local = at.config.n_routed_experts // at.ep
    if not at.fp8:
        return 3 * 4 * local
    return 8 * (local + (at.ep > 1 and at.fixed is None))


# ── What a deferred weight gradient keeps ──


def operand_bytes(at: MemorySettings, rows: int, groups: int, width: int) -> int:
    """Return the bytes of an operand of Wgrad: tiles of 128 × 1 in FP8, or bf16."""
    if not at.fp8:
        return 2 * rows * width
    return width * (TILE + 4) * (rows // TILE + groups)


def block_wgrads(at: MemorySettings, dense: bool, tokens: int) -> int:
    """Return the bytes that the deferred weight gradients of a block keep (I to W)."""
    num_bytes = 0 if dense else count_bytes(at)
    local = at.config.n_routed_experts // at.ep
    for name, gemm in block_gemms(at.config, dense).items():
        if name == "gate" or (name == "wkv_b" and at.cp > 1):  # computed at once
            continue
        routed = name.startswith("routed")
        rows, groups = tokens * gemm.rows_per_token, local if routed else 1
        if routed and at.fixed:
            rows = at.fixed.computed
        pair = name.endswith("w1, w3")
        for n_out in [gemm.n_out // 2] * 2 if pair else [gemm.n_out]:
            num_bytes += operand_bytes(at, rows, groups, n_out)
        if name != "wkv_a":  # reads the input of wq_a, or of wq
            num_bytes += operand_bytes(at, rows, groups, gemm.n_in)
        if name == "wkv_b" and not at.fp8:  # the latent lies in one tensor with the rotary key
            num_bytes += operand_bytes(at, rows, groups, at.config.qk_rope_head_dim)
    return num_bytes


def stage_wgrads(at: MemorySettings, stage: int) -> int:
    """Return the bytes that a micro-batch's deferred weight gradients keep in a stage."""
    config = at.config
    num_bytes = 0
    for layer in partition_layers(config, at.num_stages)[stage]:
        num_bytes += block_wgrads(at, layer < config.n_dense_layers, at.tokens)
    if stage == at.num_stages - 1:
        for k in range(1, config.n_mtp_layers + 1):
            num_bytes += block_wgrads(at, False, at.mtp_tokens(k))
    return num_bytes


# ── While a segment runs ──


def working_set(at: MemorySettings) -> Bytes:
    """Estimate what the backward pass of each segment of a layer holds while it runs, and the head.

    It is what kernels read and write in bf16: operands that are recomputed or read from FP8, and
    gradients.
    """
    c, tokens = at.config, at.tokens
    x, v = c.qk_nope_head_dim + c.qk_rope_head_dim, c.v_head_dim
    keys_and_values = c.n_heads * (c.qk_nope_head_dim + v)
    heads = c.n_heads * (4 * x + 2 * v)  # queries, keys, their gradients; output and its gradient
    rows = at.fixed.computed if at.fixed else c.n_activated_experts * tokens
    inter = max(c.inter_dim if c.n_dense_layers else 0, c.n_shared_experts * c.moe_inter_dim)
    logits = min(CE_CHUNK_TOKENS, tokens) * c.vocab_size
    return Counter({
        "attention": 2 * tokens * (heads + 2 * keys_and_values + 4 * c.dim),
        "experts": 2 * rows * (3 * c.dim + 6 * c.moe_inter_dim),
        "dense or shared MLP": 2 * tokens * (3 * c.dim + 6 * inter),
        "head": 2 * 4 * logits,  # and their gradients, in fp32
    })  # fmt: skip


def working_set_bytes(at: MemorySettings) -> int:
    """Estimate the most that a rank holds while it computes, beside what it has saved.

    A pair of DualPipe runs the forward pass of another micro-batch beside the backward pass, which
    needs at most half as much.
    """
    sizes = working_set(at)
    if at.cp > 1:
        sizes["attention"] += attention_buffers(at).total()
    return round(max(sizes.values()) * (1.5 if at.schedule.startswith("dualpipe") else 1))


# ── While attention runs ──


def attention_buffers(at: MemorySettings) -> Bytes:
    """Return what the attention of one layer holds in its backward pass if ranks share sequences.

    Latents are gathered and then put in order. Keys and values are those of a group of heads, each
    with its gradient; the sum over the two chunks of a rank takes two more.
    """
    c, t = at.config, at.cp * at.tokens
    num_rows = c.n_heads * (c.qk_nope_head_dim + c.v_head_dim)
    heads = c.n_heads // num_head_groups(c.n_heads, num_rows, at.cp, at.fp8)
    x = c.qk_nope_head_dim + c.qk_rope_head_dim
    return Counter({
        "gathered latents": 2 * 2 * t * (c.kv_lora_rank + c.qk_rope_head_dim),
        "keys and values": 4 * 2 * t * heads * (x + c.v_head_dim),
    })  # fmt: skip


# ── Messages ──


def input_of(action: Action, last: int) -> Action | None:
    """Return the message that an action consumes, named by its consumer; None at the ends."""
    action = output_of(action)
    has_input = {"F": action.stage > 0, "B": action.stage < last}
    return action if has_input.get(action.kind) else None


def result_of(action: Action, last: int) -> Action | None:
    """Return the message that an action produces, named by its consumer; None at the ends."""
    kind, stage, microbatch = output_of(action)
    after = {"F": stage + 1, "B": stage - 1}.get(kind, -1)
    return Action(kind, after, microbatch) if 0 <= after <= last else None


class MessageTimes:
    """Ranks and numbers of the steps that produce and consume each message."""

    def __init__(self, steps: list[list[Step]], last: int):
        self.produced: dict[Action, tuple[int, int]] = {}
        self.consumed: dict[Action, tuple[int, int]] = {}
        self.order: dict[tuple[int, int], list[Action]] = defaultdict(list)
        for find, times in ((input_of, self.consumed), (result_of, self.produced)):
            for rank, rank_steps in enumerate(steps):
                for i, step in enumerate(rank_steps):
                    for action in step:
                        if message := find(action, last):
                            times[message] = rank, i
        for message, (source, _) in self.produced.items():
            self.order[source, self.consumed[message][0]].append(message)

    def intervals(self, rank: int, num_steps: int) -> list[tuple[int, int]]:
        """Return for each message at a rank the steps after which it is there: first, end."""
        intervals = []
        for (source, destination), messages in self.order.items():
            if rank == source == destination:
                intervals += [(self.produced[m][1], self.consumed[m][1]) for m in messages]
            elif rank == destination:
                intervals += self.received(messages)
            elif rank == source:
                answers = self.order.get((destination, source), [])
                intervals += self.sent(messages, answers, num_steps)
        return intervals

    def received(self, messages: list[Action]) -> list[tuple[int, int]]:
        """Return the intervals of received messages.

        A message is posted one step before it is consumed, with all earlier ones of its source.
        """
        intervals = []
        posted = max((self.consumed[m][1] for m in messages), default=0)
        for message in reversed(messages):
            consumed = self.consumed[message][1]
            posted = min(posted, consumed - 1)
            intervals.append((posted, consumed))
        return intervals

    def sent(
        self, messages: list[Action], answers: list[Action], num_steps: int
    ) -> list[tuple[int, int]]:
        """Return the intervals of sent messages, which end with the next answer from their peer.

        An answer that the peer sends after it has consumed the message proves the arrival.
        """
        produced = [self.produced[a][1] for a in answers]  # in this order
        read = [self.consumed[a][1] for a in reversed(answers)]
        first_read = [*reversed([*accumulate(read, min)]), num_steps]  # of an answer and all later
        return [
            (self.produced[m][1], first_read[bisect_left(produced, self.consumed[m][1])])
            for m in messages
        ]


# ── A rank, step by step ──


@lru_cache(maxsize=1)
def scheduled(
    name: str, pp: int, num_microbatches: int, num_stages: int
) -> tuple[list[list[Step]], MessageTimes]:
    """Return the steps of all ranks, with the times of their messages."""
    steps = schedule(name, pp, num_microbatches)
    return steps, MessageTimes(steps, num_stages - 1)


def usage_after_steps(at: MemorySettings, rank: int) -> list[Bytes]:
    """Return what a rank holds after each step of its schedule, besides its weights."""
    steps, times = scheduled(at.schedule, at.pp, at.microbatches, at.num_stages)
    own = steps[rank]
    size = at.stream * at.tokens * at.config.dim
    changes: Counter[int] = Counter()  # of the number of messages, by step
    for first, end in times.intervals(rank, len(own)):
        changes[max(first, 0)] += 1
        changes[end] -= 1
    live: Counter[tuple[str, int]] = Counter()  # micro-batches by (kind of action, stage)
    stages = {action.stage for action in iter_actions([own])}
    saved = {stage: stage_activations(at, stage) for stage in stages}
    deferred = {stage: stage_wgrads(at, stage) for stage in stages}
    usages, num_messages = [], 0
    for i, step in enumerate(own):
        num_messages += changes[i]
        for kind, stage, _ in step:
            live["activations", stage] += {"F": 1, "B": -1, "I": -1}.get(kind, 0)
            live["wgrads", stage] += {"I": 1, "W": -1}.get(kind, 0)
        total: Bytes = Counter()
        for stage in stages:
            total += scaled(saved[stage], live["activations", stage])
            total["deferred weight gradients"] += live["wgrads", stage] * deferred[stage]
        total["messages"] += size * num_messages
        usages.append(total)
    return usages


def scaled(sizes: Bytes, n: int) -> Bytes:
    """Return n times the bytes of every kind."""
    return Counter({kind: n * size for kind, size in sizes.items()})


def peak_usage(at: MemorySettings, rank: int) -> Bytes:
    """Return what a rank holds after the step at which that is most."""
    return max(usage_after_steps(at, rank), key=lambda usage: usage.total())
