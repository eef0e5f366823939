"""Plan the memory of a rank with --fully-shard, in bytes by kind (chapter 17).

The slices of masters, gradients and moments last from step to step. A micro-batch adds activations,
and the weights and gradients of the blocks that are being computed.
"""

from collections import Counter, defaultdict
from typing import NamedTuple

from dsv3_ref.cluster.memory import MemorySettings, stage_activations
from dsv3_ref.config import Config, ceil_div
from dsv3_ref.parallel.bucket import parameter_shapes, weight_format
from dsv3_ref.scale import DispatchRows

BLOCK_DEPTH = 2  # `layers.3`
MTP_BLOCK_DEPTH = 3  # `mtp.0.block`


class ShardedMemory(NamedTuple):
    """Bytes on each GPU by kind, at the peak of a step."""

    masters: int  # fp32 slices
    moments: int  # bf16 slices
    gradients: int  # fp32 slices
    resident: int  # gathered for a whole micro-batch: embedding, head, all norms and gates
    block: int  # matrices of the largest one, gathered in bf16
    prefetched: int  # buffers of two all-gathers, of the next block and of this one or the last
    block_gradients: int  # of a block, in bf16, and the fp32 input of the sum over ranks
    activations: int

    @property
    def total(self) -> int:
        """The sum of all kinds."""
        return sum(self)


KIND_LABELS = {
    "masters": "masters, slices in fp32",
    "moments": "moments, slices in bf16",
    "gradients": "gradients, slices in fp32",
    "resident": "embedding, head, norms and gates, gathered",
    "block": "matrices of a block, gathered in bf16",
    "prefetched": "buffers of two blocks' all-gathers",
    "block_gradients": "gradients of a block, and in their sum",
    "activations": "activations of a micro-batch",
}


def unit_of(name: str) -> str:
    """Return the module with which a parameter is gathered; "" for the model itself."""
    parts = name.split(".")
    if name.startswith("layers."):
        return ".".join(parts[:BLOCK_DEPTH])
    if ".block." in name:
        return ".".join(parts[:MTP_BLOCK_DEPTH])
    return ".".join(parts[:BLOCK_DEPTH]) if name.startswith("mtp.") else ""


def gathered_bytes(config: Config, world: int) -> dict[str, Counter[str]]:
    """Return the bytes of each module's gathered weights, by their format.

    Slices have equally many entries of the first axis, so the last ones may be padded.
    """
    sizes: dict[str, Counter[str]] = defaultdict(Counter)
    for name, shape in parameter_shapes(config).items():
        numel = ceil_div(shape[0], world) * world * shape[1:].numel()
        form = weight_format(name, len(shape), "bf16")
        sizes[unit_of(name)][form] += numel * (2 if form == "bf16" else 4)
    return sizes


def recomputed_bytes_per_token(config: Config, dense: bool) -> int:
    """Return the bytes per token that a block saves only without --recompute, in bf16.

    They are the outputs of norms, of MLA's up-projections and of SwiGLU, gate and up of dense and
    shared MLPs, and the fp32 input of the gate. Values are a view of the up-projection of keys and
    values, which they keep.
    """
    c = config
    keys_and_values = c.qk_nope_head_dim + c.v_head_dim
    heads = c.n_heads * (2 * (c.qk_nope_head_dim + c.qk_rope_head_dim) + keys_and_values)
    experts = (c.n_activated_experts + c.n_shared_experts) * c.moe_inter_dim
    hidden = c.inter_dim if dense else experts
    pair = 2 * (c.inter_dim if dense else c.n_shared_experts * c.moe_inter_dim)
    norms = 2 * c.dim + c.q_lora_rank + c.kv_lora_rank
    return 2 * (norms + heads + hidden + pair) + (0 if dense else 4 * c.dim)


def sharded_activations(config: Config, tokens: int, sequences: int, recompute: bool) -> int:
    """Return the bytes that a micro-batch saves for its backward pass.

    The gradient of the head is computed in the forward pass and kept, in bf16. Routing weights are
    applied to the outputs of experts, whose gradient they need.
    """
    at = MemorySettings(
        config, "1f1b", 1, 1, 1, 1, tokens * sequences, False, 2, DispatchRows(0.0, 0.0, ())
    )
    saved = stage_activations(at, 0).total()
    saved += 2 * config.vocab_size * config.dim * (1 + config.n_mtp_layers)
    for i in range(config.n_layers + config.n_mtp_layers):
        dense = i < config.n_dense_layers
        saved += 0 if dense else at.tokens * 2 * config.n_activated_experts * config.dim
        saved += 0 if recompute else at.tokens * recomputed_bytes_per_token(config, dense)
    projections = at.tokens * 2 * 2 * config.dim * config.n_mtp_layers  # inputs of MTP's
    return saved if recompute else saved + projections


def sharded_memory(
    config: Config, world: int, tokens: int, sequences: int, recompute: bool
) -> ShardedMemory:
    """Return the bytes on each of `world` GPUs; a micro-batch has `sequences` of so many tokens."""
    sizes = gathered_bytes(config, world)
    root = sizes.pop("")
    numel = sum(x["bf16"] // 2 + x["fp32"] // 4 for x in [root, *sizes.values()]) // world
    resident = root.total() + sum(x["fp32"] for x in sizes.values())
    largest = max(x["bf16"] for x in sizes.values())
    return ShardedMemory(
        masters=4 * numel,
        moments=2 * 2 * numel,
        gradients=4 * numel,
        resident=resident,
        block=largest,
        prefetched=2 * largest,
        block_gradients=3 * largest,
        activations=sharded_activations(config, tokens, sequences, recompute),
    )


def sharded_bytes_sent(config: Config, world: int) -> int:
    """Return the bytes that a GPU sends per micro-batch.

    Matrices of blocks are gathered twice, the rest once; all gradients are summed in fp32.
    """
    sizes = gathered_bytes(config, world)
    total = -sizes[""]["bf16"]
    for x in sizes.values():
        total += 2 * x["bf16"] + x["fp32"]  # weights
        total += 2 * x["bf16"] + x["fp32"]  # gradients
    return total * (world - 1) // world
