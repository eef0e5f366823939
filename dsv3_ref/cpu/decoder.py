"""Decoding step of chapter 08 for CPUs: weights as tables, attention in blocks, fused steps.

A decoding step multiplies every active matrix with a few rows. Matrix libraries are slow at that;
embedding bags (weighted sums of rows of a table) are fast. So a transposed copy of every matrix is
stored. An index selects the rows, so all experts of all tokens are one call on one table.
"""

import math
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from weakref import WeakKeyDictionary

import torch
from einops import rearrange
from torch import Tensor

from dsv3_ref.block import Block
from dsv3_ref.decode import (
    MAX_ABSORBED_TOKENS,
    BlockWeights,
    DecodeWeights,
    Layers,
    blocks_of,
    ragged_positions,
)
from dsv3_ref.mla import attend_expanded, concat_nope_rope, up_project_kv
from dsv3_ref.model import Transformer
from dsv3_ref.moe import MoE
from dsv3_ref.ops import IMPLS, RMSNorm, impl, swiglu, upcast

MAX_TABLE_TOKENS = 16  # tokens for which weighted sums of rows beat sorting by expert
KV_BLOCK = 512  # cached positions whose keys and values are expanded at once
LAYERS_PER_GRAPH = 4  # layers compiled as one program

# ── Products with few rows ──


def arange_view(*shape: int) -> Tensor:
    """Return 0, 1, 2, … in this shape."""
    return torch.arange(math.prod(shape)).view(shape)


def embedding_bag_matmul(table_xo: Tensor, index_bm: Tensor, weight_bm: Tensor) -> Tensor:
    """Compute weighted sums of rows of a table: y_bo = Σ_m weight_bm · table[index_bm]_o."""
    start_b = arange_view(len(index_bm)) * index_bm.shape[1]
    flat = index_bm.flatten(), start_b, False, 0, False, weight_bm.flatten()
    return torch.embedding_bag(table_xo, *flat)[0]


def small_matmul(x_nd: Tensor, table_do: Tensor) -> Tensor:
    """Compute x W, for one or two rows of x as a weighted sum of the rows of W.

    The sum is computed in two halves, so that two threads share it.
    """
    n, d = x_nd.shape
    if n > 2 or d % 2 or not supports_embedding_bag(table_do):
        return x_nd @ table_do
    index = arange_view(2, d // 2) if n == 1 else arange_view(2, d // 2).repeat(n, 1)
    return embedding_bag_matmul(table_do, index, x_nd.reshape(2 * n, -1)).view(n, 2, -1).sum(1)


def supports_embedding_bag(table: Tensor) -> bool:
    """Return whether `embedding_bag_matmul` is fast for this table: fp32 on a CPU."""
    return table.device.type == "cpu" and table.dtype == torch.float32


def moe_small_batch(
    x_nd: Tensor, expert_nk: Tensor, weight_nk: Tensor, up_xo: Tensor, down_xd: Tensor
) -> Tensor:
    """Compute Σ_k w_k·W₂ swiglu(W₁x, W₃x): both products of all chosen experts, each in one call.

    up_xo: rows of all [W₁; W₃]ᵀ, (e·d, 2f); down_xd: rows of all W₂ᵀ, (e·f, d).
    """
    n, k = expert_nk.shape
    d, f = x_nd.shape[1], up_xo.shape[1] // 2
    start_nk1 = expert_nk[..., None]
    index, x = (start_nk1 * d + arange_view(d)).view(n * k, d), x_nd.repeat_interleave(k, 0)
    gate, up = embedding_bag_matmul(up_xo, index, x).chunk(2, -1)
    a_nkf = swiglu(gate, up).view(n, k, f) * weight_nk[..., None]
    index = (start_nk1 * f + arange_view(f)).view(n, k * f)
    return embedding_bag_matmul(down_xd, index, a_nkf.view(n, k * f))


# ── Weights as tables ──


class BlockTables(BlockWeights):
    """Weights of one block as transposed tables; more than a few tokens use the block's modules.

    The dense FFN and the shared experts are stored as experts that are always chosen.
    """

    def __init__(self, block: Block):
        super().__init__(block)
        attn, ffn = block.attn, block.ffn
        names = ("wq_a", "wq_b", "wkv_a", "wo") if hasattr(attn, "wq_a") else ("wq", "wkv_a", "wo")
        self.tables = {name: getattr(attn, name).weight.T.contiguous() for name in names}
        if isinstance(ffn, MoE):
            mlp, f = ffn.shared_experts, ffn.experts.w1.shape[1]
        else:
            mlp, f = ffn, len(ffn.w1.weight)
        up = torch.stack((mlp.w1.weight.unflatten(0, (-1, f)), mlp.w3.weight.unflatten(0, (-1, f))))
        down = mlp.w2.weight.unflatten(1, (-1, f)).transpose(0, 1)
        n_always = len(down)
        if isinstance(ffn, MoE):
            up = torch.cat((torch.stack((ffn.experts.w1, ffn.experts.w3)), up), dim=1)
            down = torch.cat((ffn.experts.w2, down))
        self.up_xo = rearrange(up, "two e f d -> (e d) (two f)").contiguous()
        self.down_xd = rearrange(down, "e d f -> (e f) d").contiguous()
        self.always_1k = torch.arange(len(down) - n_always, len(down))[None]

    def project(self, name: str, x_bsd: Tensor) -> Tensor:
        """Multiply x by the attention's matrix of this name, such as `wq_a`."""
        if x_bsd.shape[0] * x_bsd.shape[1] > MAX_TABLE_TOKENS:
            return super().project(name, x_bsd)
        y_no = small_matmul(x_bsd.flatten(0, 1), self.tables[name])
        return y_no.unflatten(0, x_bsd.shape[:2])

    def norm(self, x_bsd: Tensor, norm: RMSNorm) -> Tensor:
        """Apply an RMSNorm of the block; a single row is scaled by 1/ρ as a Python number."""
        if x_bsd.numel() != x_bsd.shape[-1] or torch.compiler.is_compiling():
            return norm(x_bsd)
        x_d = x_bsd.flatten()
        scale = (torch.dot(x_d, x_d).item() / len(x_d) + norm.eps) ** -0.5
        return (x_bsd * norm.weight).mul_(scale)

    def ffn(self, x_bsd: Tensor) -> Tensor:
        """Apply the MoE, eq. 12–16, or the dense FFN."""
        n = x_bsd.shape[0] * x_bsd.shape[1]
        if n > MAX_TABLE_TOKENS:
            return super().ffn(x_bsd)
        expert_nk = self.always_1k.expand(n, -1)
        weight_nk = torch.ones_like(expert_nk, dtype=x_bsd.dtype)
        if isinstance(self.block.ffn, MoE):
            route = self.block.ffn.gate(x_bsd)
            expert_nk = torch.cat((route.topk_ids_bsk.flatten(0, 1), expert_nk), dim=1)
            weight_nk = torch.cat((route.topk_weights_bsk.flatten(0, 1), weight_nk), dim=1)
        x_nd = x_bsd.flatten(0, 1)
        return moe_small_batch(x_nd, expert_nk, weight_nk, self.up_xo, self.down_xd).view_as(x_bsd)


WeightsState = list[tuple[int, int]]  # address and version of every weight
TABLES: WeakKeyDictionary[Transformer, tuple[WeightsState, DecodeWeights]] = WeakKeyDictionary()


@impl("decode_weights", "cpu")
@torch.no_grad()
def decode_weights_as_tables(model: Transformer) -> DecodeWeights:
    """Return tables of every block and of the head; rebuild them when a weight has changed.

    A model that is not in fp32 on a CPU decodes with its modules.
    """
    weights = list(model.parameters())
    if not all(supports_embedding_bag(w) for w in weights):
        return IMPLS["decode_weights"]["torch"](model)
    state = [(w.data_ptr(), w._version) for w in weights]
    if model not in TABLES or TABLES[model][0] != state:
        head_dw = model.head.weight.T.contiguous()

        def logits(h: Tensor) -> Tensor:
            return small_matmul(h.flatten(0, -2), head_dw).unflatten(0, h.shape[:-1])

        blocks: list[BlockWeights] = [BlockTables(block) for block in blocks_of(model)]
        TABLES[model] = state, DecodeWeights(blocks, logits)
    return TABLES[model][1]


# ── Attention ──


def blockwise_attention(
    q_bshx: Tensor, blocks: Iterable[tuple[Tensor, Tensor]], t: int, scale: float
) -> Tensor:
    """Attend causally from the last s of t positions to blocks (k_byhx, v_byhv) in turn: o/z."""
    q_bhsx = (scale * q_bshx).transpose(1, 2)
    s, start = q_bshx.shape[1], 0
    query_s1 = torch.arange(t - s, t, device=q_bshx.device)[:, None]
    m_i = o = z = torch.tensor(-torch.inf, device=q_bshx.device)
    for k_byhx, v_byhv in blocks:
        x_bhsy = upcast(q_bhsx @ k_byhx.permute(0, 2, 3, 1))
        end = start + k_byhx.shape[1]
        if end > t - s + 1:
            key_y = torch.arange(start, end, device=q_bshx.device)
            x_bhsy = x_bhsy.masked_fill_(query_s1 < key_y, -torch.inf)
        m_new = torch.maximum(m_i, x_bhsy.amax(-1, keepdim=True))
        p_bhsy, alpha = x_bhsy.sub_(m_new).exp_(), (m_i - m_new).exp()
        part = p_bhsy.to(v_byhv.dtype) @ v_byhv.transpose(1, 2)
        total = p_bhsy.sum(-1, keepdim=True)
        o, z = (o * alpha + part, z * alpha + total) if start else (part, total)
        m_i, start = m_new, end
    return (o / z).to(q_bshx.dtype).transpose(1, 2)


@impl("attend_prefill", "cpu")
def attend_prefill_blockwise(
    q_bshi: Tensor, q_bshr: Tensor, kv_btx: Tensor, wkv_b: Tensor, scale: float
) -> Tensor:
    """Attend from the last s of t positions; expand cached keys and values block by block."""
    _, s, h, i = q_bshi.shape
    t, c = kv_btx.shape[1], wkv_b.shape[1]
    if s == t:  # a prompt's first chunk, which has no other positions
        return attend_expanded(q_bshi, q_bshr, kv_btx[..., :c], kv_btx[..., c:], wkv_b, scale)
    parts = kv_btx.split(KV_BLOCK, dim=1)
    blocks = (up_project_kv(x_byx[..., :c], x_byx[..., c:], wkv_b, h, i) for x_byx in parts)
    return blockwise_attention(concat_nope_rope(q_bshi, q_bshr), blocks, t, scale)


@impl("paged_attention", "cpu")
def paged_attention_gathered(
    q_bshx: Tensor, kv_cache_pyx: Tensor, block_table_bp: Tensor, cache_seqlens_b: Tensor,
    c: int, scale: float,
) -> Tensor:  # fmt: skip
    """Attend for all rows at once, over a copy of their pages; later positions are masked."""
    kv_btx = kv_cache_pyx[block_table_bp].flatten(1, 2)
    b, s, h, _ = q_bshx.shape
    device = cache_seqlens_b.device
    score_bst = (q_bshx.flatten(1, 2) @ kv_btx.mT).mul_(scale)  # s: positions and heads
    visible_bs = cache_seqlens_b[:, None] - s + 1 + torch.arange(s, device=device)
    masked = visible_bs[..., None, None] <= torch.arange(kv_btx.shape[1], device=device)
    score_bst.view(b, s, h, -1).masked_fill_(masked, -torch.inf)
    return (score_bst.softmax(-1) @ kv_btx[..., :c]).view(b, s, h, c)


# ── Fused steps ──


def run_layers_ragged(
    layers: Layers, x_bsd: Tensor, position_bs: Tensor, freqs_cis_tx: Tensor
) -> Tensor:
    """Pass x through layers by one program for all positions: it reads the whole cache, masked."""
    positions = ragged_positions(position_bs, freqs_cis_tx, len(freqs_cis_tx))
    for layer in layers:
        x_bsd = layer(x_bsd, positions)
    return x_bsd


@cache
def compiled_layers() -> Callable[[Layers, Tensor, Tensor, Tensor], Tensor]:
    """Return `run_layers_ragged` as a fused program, compiled at the first call with a shape."""
    torch._dynamo.config.recompile_limit = 64  # kinds of groups × shapes
    warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex")
    return torch.compile(run_layers_ragged, options={"cpp_wrapper": True})


@impl("run_layers", "compiled")
def run_layers_compiled(
    layers: Layers, x_bsd: Tensor, lengths: list[int], freqs_cis_tx: Tensor
) -> Tensor:
    """Pass the next few tokens through layers as fused programs; a prompt takes the plain form."""
    b, s = x_bsd.shape[:2]
    if b * s > MAX_ABSORBED_TOKENS or max(lengths) == 0:
        return IMPLS["run_layers"]["torch"](layers, x_bsd, lengths, freqs_cis_tx)
    start_b1 = torch.tensor(lengths, device=freqs_cis_tx.device)[:, None]
    position_bs = start_b1 + torch.arange(s, device=start_b1.device)
    for first in range(0, len(layers), LAYERS_PER_GRAPH):
        group = layers[first : first + LAYERS_PER_GRAPH]
        x_bsd = compiled_layers()(group, x_bsd, position_bs, freqs_cis_tx)
    return x_bsd
