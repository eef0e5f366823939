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
# # 11 · Expert parallelism: tokens travel, experts stay

# %% [markdown]
# ## Why
# The routed experts of one V3 layer take 22.5 GB in bf16. A *pipeline stage*, the roughly four layers that one
# GPU is responsible for ([chapter 12](12_dualpipe.ipynb)), needs **90 GB** for its experts alone, but a GPU has
# 80 GB for everything. So 64 GPUs in 8 nodes (a *node* is a machine with 8 GPUs) share each layer, four experts
# per GPU. A token's eight experts are then on up to eight other GPUs. Its hidden state has to be sent there
# (*dispatch*) and the results have to come back (*combine*), in 58 layers, forward and backward. InfiniBand (IB)
# connects the nodes at 50 GB/s per GPU, NVLink the GPUs of a node at 160 GB/s. This chapter is about sending as
# little as possible over the slower link.

# %%
from dataclasses import replace
from itertools import product

import torch

from dsv3_ref.config import V3, ceil_div
from dsv3_ref.viz import BLUE, GREEN, GRAY, ORANGE, checker, figure, play, show

layer = 2 * V3.n_routed_experts * 3 * V3.dim * V3.moe_inter_dim / 1e9  # GB in bf16
expert_gb = {"58 layers": 58 * layer, "a stage of 4 layers": 4 * layer,
             "a stage, on one of 64 GPUs": 4 * layer / 64}  # fmt: skip
assert expert_gb["a stage of 4 layers"] > 80 > expert_gb["a stage, on one of 64 GPUs"]
fig, ax = figure(1, 1, 8, 1.9)
bars = ax.barh(list(expert_gb), list(expert_gb.values()), color=[GRAY, BLUE, GREEN])
ax.bar_label(bars, [f"{x:,.1f} GB" for x in expert_gb.values()], padding=4)
ax.axvline(80, color=ORANGE, ls="--", label="memory of a GPU")
ax.set(xscale="log", xlim=(0.8, 9000), xlabel="GB of routed experts, bf16 (logarithmic axis)",
       title="The experts of one stage do not fit on a GPU")  # fmt: skip
ax.invert_yaxis()
ax.legend(loc="lower right")
show(fig)

# %% [markdown]
# ## Paper
# - 16-way pipeline, **64-way expert parallelism over 8 nodes**, and no tensor parallelism in training (§3.2).
# - A token visits at most **4 nodes**. It crosses IB to the GPU with the same index in the other node, which
#   forwards it at once over NVLink to the GPUs that hold its experts. NVLink is 160/50 = 3.2 times as fast, so a
#   token can use **3.2 experts per node** on average at no extra cost: 4 · 3.2 ≈ 13, whereas V3 chooses 8
#   (§2.1.2, §3.2.2).
# - Tokens are dispatched in **FP8 with power-of-two scales**; results are combined in bf16 (§3.3.3).
# - Load balancing covers the **global batch**: the loads of all ranks are summed (§2.1.2).
#
# Attention, gate and shared expert need no communication: every GPU has them and runs them on its own tokens.
# Only the `token_dispatcher` of [chapter 04](04_moe.ipynb) is replaced. This chapter exports what one rank (a
# process with its GPU) *computes* there: which row goes where. The processes, groups and messages are plain
# Python in `dsv3_ref/parallel/token_dispatcher.py`.
#
# Axes: `n` tokens of a rank, `k` chosen experts, `m` rows that are sent, `i` members of a group of ranks, `e`
# experts, `d` model.

# %%
#| export
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_ref.fp8 import QUANT_CACHE, Quantized
from dsv3_ref.moe import GroupedExperts, tokens_per_expert
from dsv3_ref.ops import recompute

# %% [markdown]
# ## Who gets a token
# Member $i$ of a group holds experts $i p, \dots, (i+1)p - 1$, where $p$ is `experts_per_member`. Token $n$ chose
# the experts $e_{n1} \dots e_{nk}$, so it goes to the *set* of members
#
# $$D_n = \{\lfloor e_{nj} / p \rfloor : j = 1 \dots k\}, \qquad \text{rows: } \{(n, i) : i \in D_n\}, \qquad
# (n, k) \to (m),\ (m),\ (\text{members}).$$
#
# It is a set, not a list: two experts at one member need only one copy. In an *all-to-all* every member sends
# rows to every other member. It expects the rows for member 0 first, then those for member 1, and so on, with
# the number of rows for each. So we fill a Boolean table (token, member) and read its transpose row by row.
# Expert −1 means "none": it gets a column of its own, which is cut off. The next section needs that.


# %%
#| export
def find_destinations(expert_nk: Tensor, experts_per_member: int, num_members: int) -> Tensor:
    """Return whether each token goes to each member: bool, (n, num_members).

    Member i holds experts i·p … (i+1)·p − 1 with p = experts_per_member; expert −1 means none.
    """
    dest_nk = torch.where(expert_nk < 0, num_members, expert_nk // experts_per_member)
    is_sent_ni = torch.zeros(
        len(expert_nk), num_members + 1, dtype=torch.bool, device=expert_nk.device
    )
    return is_sent_ni.scatter_(1, dest_nk.long(), True)[:, :num_members]


def dispatch_layout(
    expert_nk: Tensor, experts_per_member: int, num_members: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows that a rank sends: tokens (m,), destinations (m,), counts (num_members,).

    Rows are sorted by destination. A token goes once to each member that holds any of its k
    experts.
    """
    is_sent_ni = find_destinations(expert_nk, experts_per_member, num_members)
    dest_m, token_m = is_sent_ni.T.nonzero(as_tuple=True)
    return token_m, dest_m, is_sent_ni.sum(0)


# %%
def slow_dispatch_layout(expert_nk, per: int, size: int):
    """Return the same by its definition: for every member, the tokens that have an expert there."""
    rows, counts = [], []
    for i in range(size):
        tokens = [n for n, chosen in enumerate(expert_nk.tolist())
                  if any(e >= 0 and e // per == i for e in chosen)]  # fmt: skip
        rows += [(n, i) for n in tokens]
        counts.append(len(tokens))
    return rows, counts


torch.manual_seed(0)
EXPERTS = torch.rand(40, 32).argsort(1)[:, :6]  # 40 tokens choose 6 of 32 experts
EXPERTS[torch.rand(40, 6) < 0.2] = -1
token_m, dest_m, count_i = dispatch_layout(EXPERTS, experts_per_member=4, num_members=8)
rows, counts = slow_dispatch_layout(EXPERTS, per=4, size=8)
assert list(zip(token_m.tolist(), dest_m.tolist())) == rows and count_i.tolist() == counts
assert sum(dispatch_layout(torch.full((3, 2), -1), 4, 8)[2]) == 0  # no expert: nothing is sent
print(f"{(EXPERTS >= 0).sum()} choices, {len(token_m)} rows: the other choices share a row")
for n in range(3):
    print(f"token {n}: experts {EXPERTS[n].tolist()} → members {dest_m[token_m == n].tolist()}")

# %% [markdown]
# ## What travels with it
# Row $m$ carries token $n_m$ to member $i_m$. That member numbers its experts from 0 and ignores those that are
# elsewhere ($\mathbb 1[\cdot]$ is 1 where the condition holds, else 0):
#
# $$e'_{mj} = \begin{cases} e_{n_m j} - p\,i_m & \text{if } 0 \le e_{n_m j} - p\,i_m < p\\ -1 & \text{otherwise}\end{cases}
# \qquad w'_{mj} = w_{n_m j}\,\mathbb 1[e'_{mj} \ge 0], \qquad (m,k)$$
#
# Each row carries $k$ expert ids and $k$ weights. Here −1 means the same as above, so a destination may be a
# *node*, which applies the same rule again to its GPUs. Setting remote weights to 0 looks redundant, since no
# expert reads them. It is needed for the backward pass: the gradient of each choice must come from the one
# member that has the expert.


# %%
#| export
def to_local_expert_ids(expert_mk: Tensor, dest_m: Tensor, experts_per_member: int) -> Tensor:
    """Number the experts of each row as its destination does, int32; −1 for those elsewhere."""
    local_mk = expert_mk - experts_per_member * dest_m[:, None]
    return torch.where((local_mk >= 0) & (local_mk < experts_per_member), local_mk, -1).int()


def mask_remote_weights(weight_mk: Tensor, expert_mk: Tensor) -> Tensor:
    """Return the weights of the experts at the destination, and 0 for the others."""
    return torch.where(expert_mk >= 0, weight_mk, 0)


# %%
local_mk = to_local_expert_ids(EXPERTS[token_m], dest_m, experts_per_member=4)
assert local_mk.min() == -1 and local_mk.max() == 3
back_mk = torch.where(local_mk >= 0, local_mk + 4 * dest_m[:, None], -1)
reunited_nk = torch.zeros_like(EXPERTS).index_add(0, token_m, back_mk + 1) - 1
assert torch.equal(reunited_nk, EXPERTS)  # all members together have every choice once
weight_mk = torch.rand(40, 6)[token_m].requires_grad_()
mask_remote_weights(weight_mk, local_mk).sum().backward()
assert torch.equal(weight_mk.grad.bool(), local_mk >= 0)  # a gradient where the expert is
print(f"experts {EXPERTS[token_m[5]].tolist()} → at member {dest_m[5]}: {local_mk[5].tolist()}")

# %% [markdown]
# ## At the destination
# Rows have arrived from all ranks, each with one to $k$ local experts. The rank sorts them by expert as
# `MoE.forward_routed` does, leaves out expert −1, and sums the results of each row *before* it is sent back:
#
# $$y_m = \sum_{j:\, e'_{mj} \ge 0} w'_{mj}\,\text{expert}_{e'_{mj}}(x_m), \qquad o_n = \sum_{m:\, n_m = n} y_m, \qquad (m,d) \to (m,d) \to (n,d).$$
#
# The first sum is taken at the destination, the second where the token came from. So the way back needs no more
# rows than the way out: one row per destination, not one per expert. Expert −1 gets the largest key, so sorting
# puts it at the end. Weights multiply the `up` half inside an expert. SwiGLU and $W_2$ are linear in it, so the
# result is the same, and for the gradient of the weights an expert saves 2048 numbers per row instead of the
# 7168 of its output.


# %%
#| export
class IndexAdd(torch.autograd.Function):
    """The sum o_n = Σ y_m over the rows m of token n; it saves no rows for the backward pass."""

    @staticmethod
    def forward(ctx: Any, y_md: Tensor, token_m: Tensor, n: int) -> Tensor:
        ctx.save_for_backward(token_m)
        return y_md.new_zeros(n, y_md.shape[1]).index_add_(0, token_m, y_md)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_nd: Tensor) -> tuple[Tensor, None, None]:
        return g_nd[ctx.saved_tensors[0]], None, None


def take_rows(x_nd: Tensor, token_m: Tensor, has_empty: bool = False) -> Tensor:
    """Return the rows x_nd[token_m]; with `has_empty`, index n gives a row of zeros."""
    if has_empty:
        x_nd = F.pad(x_nd, (0, 0) * (x_nd.ndim - 1) + (0, 1))  # torch.cat would fail for FP8
    return x_nd[token_m]


def take_quantized(
    q_nd: Tensor, s_nz: Tensor, token_m: Tensor, has_empty: bool = False
) -> Quantized:
    """Copy FP8 rows and their scales to the experts' rows; a step saves each row once (§3.2.3)."""
    return take_rows(q_nd, token_m, has_empty), take_rows(s_nz, token_m, has_empty)


def sum_token_rows(y_md: Tensor, token_m: Tensor, n: int, has_empty: bool = False) -> Tensor:
    """Return o_n = Σ y_m over the rows m of token n; with `has_empty`, row n is dropped."""
    return (
        IndexAdd.apply(y_md, token_m, n + 1)[:n] if has_empty else IndexAdd.apply(y_md, token_m, n)
    )


def sort_choices(
    expert_nk: Tensor, n_experts: int, max_rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the choices n·k + j sorted by expert, (m,), and how many each expert has, (e,).

    Expert −1 is left out. With max_rows there are that many rows, whatever the choices: number n·k
    follows the last choice, and choices that do not fit are left out.
    """
    key_m = torch.where(expert_nk < 0, n_experts, expert_nk).flatten()
    count_e = tokens_per_expert(key_m, n_experts + 1)[:n_experts]
    choice_m = key_m.argsort(stable=True)
    if max_rows is None:
        return choice_m[: count_e.sum()].clone(), count_e
    choice_m = choice_m[:max_rows]
    end_e = count_e.cumsum(0).clamp(max=max_rows)
    choice_m = torch.where(key_m[choice_m] < n_experts, choice_m, len(key_m))
    return choice_m, end_e.diff(prepend=end_e.new_zeros(1))


def apply_local_experts(
    experts: GroupedExperts,
    x_nd: Tensor,
    weight_nk: Tensor,
    expert_nk: Tensor,
    quantized: Quantized | None = None,
    max_rows: int | None = None,
) -> Tensor:
    """Return Σ_k w_nk·expert_nk(x_n) over the local experts, (n, d); expert −1 is not among them.

    quantized: the FP8 values and scales in which x_nd arrived; FP8 products then use them as they
    are. max_rows: the number of rows to compute, as in `sort_choices`; the grouped products must
    leave out the rows after the last expert's.
    """
    k, is_padded = expert_nk.shape[1], max_rows is not None
    choice_m, tokens_per_expert_e = sort_choices(expert_nk, len(experts.w1), max_rows)
    token_m = choice_m // k
    x_md = take_rows(x_nd, token_m, is_padded)
    if quantized is not None:
        rows = recompute(take_quantized, *quantized, token_m, is_padded)
        QUANT_CACHE[x_md] = x_md._version, *rows
    y_md = experts(x_md, tokens_per_expert_e, take_rows(weight_nk.flatten(), choice_m, is_padded))
    return sum_token_rows(y_md, token_m, len(x_nd), is_padded)


# %%
share = GroupedExperts(4, 64, 32)  # the experts of one rank
for p in share.parameters():
    torch.nn.init.normal_(p, std=0.2)
x_nd, w_nk = torch.randn(len(token_m), 64), torch.rand(len(token_m), 6)
mine = dest_m == 2  # the rows that arrive at member 2
y_nd = apply_local_experts(share, x_nd[mine], w_nk[mine], local_mk[mine])
for n, (x, w, chosen) in enumerate(zip(x_nd[mine], w_nk[mine], local_mk[mine].tolist())):
    slow = sum(w_j * (share.w2[e] @ (torch.nn.functional.silu(share.w1[e] @ x) * (share.w3[e] @ x)))
               for w_j, e in zip(w, chosen) if e >= 0)  # fmt: skip
    assert torch.allclose(y_nd[n], slow, atol=1e-4)
assert apply_local_experts(share, x_nd[:0], w_nk[:0], local_mk[:0]).shape == (0, 64)  # no rows
assert (apply_local_experts(share, x_nd, w_nk, torch.full_like(local_mk, -1)) == 0).all()
print(f"{mine.sum()} rows arrived, {(local_mk[mine] >= 0).sum()} rows computed")

# %% [markdown]
# ## A cluster in one process
# Now all ranks together. Here a rank is an entry in a list and the network is the function `swap`: what rank $a$
# has for rank $b$ arrives at rank $b$, sorted by sender. Everything else is what a rank really does, in this
# order: compute the layout, send rows, weights and expert ids, apply the experts or forward the rows, send the
# results back, and sum them. The counts are sent first, by the same `swap`; a rank needs them to send results back.
#
# `hops` is a list of (groups of ranks, experts per member). When it is empty, the experts are local.
#
# The check compares eight ranks with `MoE.forward_routed` on one device. Each rank has four experts; ranks have
# different numbers of tokens, one of them none. Results must agree, and so must the gradients of tokens, weights
# and experts.


# %%
def swap(messages, groups):
    """Send messages[rank][i] to the i-th member of the rank's group; return what each receives."""
    received = [None] * len(messages)
    for group in groups:
        for i, rank in enumerate(group):
            received[rank] = torch.cat([messages[sender][i] for sender in group])
    return received


def exchange(experts, x, weight, expert, hops):
    """Return Σ_k w·expert(x) for lists with an entry per rank, through all hops and back."""
    if not hops:
        return [apply_local_experts(*rank) for rank in zip(experts, x, weight, expert)]
    (groups, per), *rest = hops
    token, dest, count = zip(*(dispatch_layout(e_nk, per, len(groups[0])) for e_nk in expert))
    receive_count = swap([count_i.split(1) for count_i in count], groups)

    def dispatch(rows):
        return swap([r.split(c.tolist()) for r, c in zip(rows, count)], groups)

    ids = [to_local_expert_ids(e_nk[m], to_m, per) for e_nk, m, to_m in zip(expert, token, dest)]
    x_rows = [x_nd[m] for x_nd, m in zip(x, token)]
    w_rows = [mask_remote_weights(w_nk[m], id_mk) for w_nk, m, id_mk in zip(weight, token, ids)]
    y = exchange(experts, dispatch(x_rows), dispatch(w_rows), dispatch(ids), rest)
    back = swap([y_md.split(c.tolist()) for y_md, c in zip(y, receive_count)], groups)
    return [torch.zeros_like(x_nd).index_add(0, m, y_md) for x_nd, m, y_md in zip(x, token, back)]


# %%
from dsv3_ref.moe import MoE, route

SHAPE = replace(V3, dim=64, moe_inter_dim=32, n_routed_experts=32, n_activated_experts=6,
                n_expert_groups=4, n_limited_groups=2)  # fmt: skip
moe = MoE(SHAPE)
for p in moe.parameters():
    torch.nn.init.normal_(p, std=0.2)
SIZES = [5, 12, 0, 7, 9, 1, 16, 3]  # tokens per rank
x_nd = torch.randn(sum(SIZES), 64)
r = route(torch.randn(1, len(x_nd), 32), None, SHAPE)
w_nk, e_nk = r.topk_weights_bsk[0], r.topk_ids_bsk[0]
dy_nd = torch.randn_like(x_nd)


def share_of(experts, i: int, per: int):
    """Return the experts of rank i: i·per … (i+1)·per − 1, with their weights."""
    mine = GroupedExperts(per, 64, 32)
    for p, whole in zip(mine.parameters(), experts.parameters()):
        p.data = whole.detach()[i * per : (i + 1) * per].clone()
    return mine


def results(experts, run):
    """Return y = run(x, w) and the gradients of x, the weights and the experts' matrices."""
    x, w = x_nd.clone().requires_grad_(), w_nk.clone().requires_grad_()
    for part in experts:
        part.zero_grad()
    y = run(x, w)
    y.backward(dy_nd)
    matrices = zip(*(part.parameters() for part in experts))
    return [y.detach(), x.grad, w.grad, *(torch.cat([p.grad for p in ps]) for ps in matrices)]


shares = [share_of(moe.experts, i, 4) for i in range(8)]
alone = results([moe.experts], lambda x, w: moe.forward_routed(x, w, e_nk))


def compare(name: str, hops):
    """Compare eight ranks with one device."""

    def run_on_ranks(x, w):
        return torch.cat(exchange(shares, *(t.split(SIZES) for t in (x, w, e_nk)), hops))

    on_ranks = results(shares, run_on_ranks)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(on_ranks, alone))
    worst = max((a - b).abs().max().item() for a, b in zip(on_ranks, alone))
    print(f"{name}: y, dx, dw, dw1, dw2, dw3 differ by {worst:.0e} at most")


compare("one hop", [([range(8)], 4)])

# %% [markdown]
# ## Fixed sizes
# The number of rows depends on the routing, which only the GPU knows. So the host has to wait for the GPU before it
# can allocate memory and start an all-to-all, several times per layer, and meanwhile the GPU runs out of work. With
# *fixed* sizes it never waits: every member gets $C$ rows, some of them empty, and no counts are exchanged. The row
# of token $n$ for member $i$ has place $c$ if it is the $c$-th of its member,
#
# $$\text{row}(n, i) = i\,C + \sum_{n' < n} \mathbb 1[i \in D_{n'}] \quad\text{if the sum is below } C, \qquad
# (n, i) \to (i\,C).$$
#
# The order of rows stays the same, so every sum has the same terms in the same order, and results are equal bit for
# bit. If a member gets more than $C$ rows, the rest is left out and *counted*; a training step that has left out rows
# is repeated with exact sizes. How large should $C$ be? If all experts are equally likely, a token goes to a member
# with $p$ of the $E$ experts with probability
#
# $$P = 1 - \binom{E - p}{k} \Big/ \binom{E}{k}, \qquad C = \min(n, \lceil 1.5\, n P\rceil).$$


# %%
#| export
def visit_probability(n_experts: int, experts_per_member: int, k: int) -> float:
    """Return the probability that k of n equally likely experts include one of a member's."""
    return 1 - math.comb(n_experts - experts_per_member, k) / math.comb(n_experts, k)


def padded_dispatch_layout(
    expert_nk: Tensor, experts_per_member: int, num_members: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens (m,), destinations (m,) and the number of rows left out, m = members·capacity.

    It is `dispatch_layout` with `capacity` rows for every member; token n means an empty row. No
    shape depends on the choices.
    """
    n, m = len(expert_nk), num_members * capacity
    is_sent_ni = find_destinations(expert_nk, experts_per_member, num_members)
    place_ni = is_sent_ni.cumsum(0) - 1
    first_i = torch.arange(0, m, capacity, device=expert_nk.device)
    row_ni = torch.where(is_sent_ni & (place_ni < capacity), first_i + place_ni, m)
    token_ni = torch.arange(n, device=expert_nk.device)[:, None].expand(n, num_members)
    token_m = torch.full((m + 1,), n, device=expert_nk.device)
    token_m.scatter_(0, row_ni.flatten(), token_ni.flatten())  # row m: what is not sent
    dest_m = torch.arange(m, device=expert_nk.device) // capacity
    return token_m[:m], dest_m, (is_sent_ni.sum(0) - capacity).clamp(min=0).sum()


# %%
token_m, dest_m, _ = dispatch_layout(EXPERTS, 4, 8)
padded_m, padded_dest_m, left_out = padded_dispatch_layout(EXPERTS, 4, 8, 25)
real_m = padded_m < 40
assert torch.equal(padded_m[real_m], token_m) and torch.equal(padded_dest_m[real_m], dest_m)
print(f"{len(token_m)} rows in {len(padded_m)} places, {left_out} left out")
for capacity in (12, 25):
    want = (count_i - capacity).clamp(min=0).sum()
    assert padded_dispatch_layout(EXPERTS, 4, 8, capacity)[2] == want
chosen_nk = torch.rand(4000, 32).argsort(1)[:, :6]
visited = len(dispatch_layout(chosen_nk, 4, 8)[0]) / 8 / 4000
expected = visit_probability(32, 4, 6)
assert abs(visited - expected) < 0.01
print(f"a token goes to a member with probability {visited:.3f}; expected {expected:.3f}")

# %% [markdown]
# The experts get a fixed number of rows, too: `max_rows` in `apply_local_experts`. Rows after the last expert's belong
# to no group of the grouped product, which does not read or write them. Their values are arbitrary, their gradients
# too, and both end in an extra row that is cut off.

# %%
from dsv3_ref.ops import use

local_mk = torch.where(padded_m[:, None] < 40, take_rows(EXPERTS, padded_m, True), -1)
local_mk = to_local_expert_ids(local_mk, padded_dest_m, 4)[50:75]  # what arrives at member 2
with use("cpu", "auto"):
    x_md, w_mk = torch.randn(25, 64, requires_grad=True), torch.rand(25, 6)
    exact, padded = (apply_local_experts(share, x_md, w_mk, local_mk, None, n) for n in (None, 60))
    assert torch.equal(exact, padded)
    grads = [torch.autograd.grad(y.square().sum(), [x_md, share.w2]) for y in (exact, padded)]
assert all(map(torch.equal, *grads))
print(f"{(local_mk >= 0).sum()} choices in 60 rows: results and gradients are equal bit for bit")

# %% [markdown]
# Real processes do the same with `all_to_all_single`. `AllToAllDispatcher` in
# `dsv3_ref/parallel/token_dispatcher.py` calls these functions, cuts the autograd graph where a message is
# sent, and lets another micro-batch compute while it is in flight ([chapter 12](12_dualpipe.ipynb)).
# `tests/parallel/test_parallel.py` runs it on processes that communicate by gloo, PyTorch's communication backend
# for CPUs.
#
# ## Two hops
# One hop sends a token up to eight times over the slow link, perhaps four times to the same node. Instead, let the
# *node* be the member of a first exchange: a group consists of the GPUs with the same index $i$ in every node, and
# each member stands for all experts of its node. The second exchange is within each node. No new code is needed:
# where the first exchange would apply experts, it runs the second,
#
# $$\text{exchange}_{\text{ranks}}\big[\text{experts}\big] = \text{exchange}_{\text{nodes}}\Big[\text{exchange}_{\text{GPUs of a node}}\big[\text{experts}\big]\Big],$$
#
# since a row arrives with its experts renumbered and −1 for the others, just like a token's own choices. On the way
# back the results are summed within the node first, so only one row per node crosses IB there too.

# %%
NODES = [[2 * n, 2 * n + 1] for n in range(4)]  # four nodes of two ranks
ACROSS = [[2 * n + i for n in range(4)] for i in range(2)]
compare("two hops", [(ACROSS, 8), (NODES, 4)])

# %% [markdown]
# Which link does each row take? `journeys` returns, for each hop, the token, source and destination of every row.
# From these we count copies over IB (to another node) and over NVLink (to another GPU of the same node). As a
# baseline, *naive* sends a copy for every chosen expert, even if two of them are on one GPU.


# %%
def journeys(expert_nk, home_n, per: int, ranks_per_node: int, way: str):
    """Return (token, source rank, destination rank) of all rows, a triple of (m,) for every hop."""
    n_experts, k = V3.n_routed_experts, expert_nk.shape[1]
    if way == "naive":
        token_m = torch.arange(len(expert_nk)).repeat_interleave(k)
        return [(token_m, home_n[token_m], expert_nk.flatten() // per)]
    if way == "one hop":
        token_m, rank_m, _ = dispatch_layout(expert_nk, per, n_experts // per)
        return [(token_m, home_n[token_m], rank_m)]
    behind = per * ranks_per_node
    token_m, node_m, _ = dispatch_layout(expert_nk, behind, n_experts // behind)
    landed_m = node_m * ranks_per_node + home_n[token_m] % ranks_per_node  # same index, other node
    row_m, place_m, _ = dispatch_layout(
        to_local_expert_ids(expert_nk[token_m], node_m, behind), per, ranks_per_node
    )
    return [(token_m, home_n[token_m], landed_m),
            (token_m[row_m], landed_m[row_m], node_m[row_m] * ranks_per_node + place_m)]  # fmt: skip


def copies(hops, ranks_per_node: int, n: int) -> tuple[float, float]:
    """Return the copies of a token over IB and over NVLink, as the mean of n tokens."""
    ib = sum((a // ranks_per_node != b // ranks_per_node).sum().item() for _, a, b in hops)
    nvlink = sum(
        ((a // ranks_per_node == b // ranks_per_node) & (a != b)).sum().item() for _, a, b in hops
    )
    return ib / n, nvlink / n


def choices(limit: int = 4, k: int = 8, skew: float = 0.0, n: int = 8192):
    """Return the choices (n, k) of V3's gate on random affinities; skew: unequal popularity."""
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(1, n, 256, generator=g) + skew * torch.randn(256, generator=g)
    return route(
        logits, None, replace(V3, n_limited_groups=limit, n_activated_experts=k)
    ).topk_ids_bsk[0]


WAYS = ("naive", "one hop", "two hops")
home_n = torch.arange(8192) % 64
chosen = choices()
for way in WAYS:
    ib, nvlink = copies(journeys(chosen, home_n, 4, 8, way), 8, 8192)
    print(f"{way:9}{ib:6.2f} copies per token over IB, {nvlink:5.2f} over NVLink")
ends = [journeys(chosen, home_n, 4, 8, way)[-1] for way in ("one hop", "two hops")]
pairs = [set(zip(token_m.tolist(), rank_m.tolist())) for token_m, _, rank_m in ends]
assert pairs[0] == pairs[1]  # one hop and two end at the same GPUs
by_hand = [{e // 32 for e in row} - {h // 8} for row, h in zip(chosen.tolist(), home_n.tolist())]
ib, _ = copies(journeys(chosen, home_n, 4, 8, "two hops"), 8, 8192)
assert ib == sum(map(len, by_hand)) / 8192 and max(map(len, by_hand)) <= 4

# %% [markdown]
# ## FP8 out, bf16 back
# The experts' first product needs FP8 inputs anyway ([chapter 09](09_fp8.ipynb)), so rows are sent in FP8: one byte
# per number, and four bytes for the scale of each tile of 128. The results are sums of large and small terms, so
# they return in sixteen bits. The backward pass mirrors this: the gradient of the result is sent in FP8, the
# gradient of the input in bf16.
#
# $$\text{out: } d + 4\lceil d/128\rceil + 8k \text{ bytes per row}, \qquad \text{back: } 2d$$
#
# ($8k$: four bytes each for an expert id and its weight.)
#
# Why are the scales *powers of two*? A second hop is not the reason. The largest number of a tile is represented
# exactly, so a row that is dequantized to bf16 and quantized again keeps its values under either rule. There are two
# reasons. First, an FP8 value has four significant bits and a power of two changes only the exponent, so value times
# scale *is* a bf16 number, while $\max/448$ rounds once more. Second, Wgrad needs the same rows in tiles along the
# other axis (chapter 09). With powers of two on both sides nothing is rounded by requantization. (`FP8Linear` does
# not use this second gain: it requantizes all E4M3 tiles with $\max/448$.)
#
# At the destination the products must *use* the FP8 values that arrived; they must not dequantize the rows and
# quantize them again by their own rule. The argument `quantized` of `apply_local_experts` does this: it stores the gathered
# values in the cache that FP8 products read.

# %%
from dsv3_ref.fp8 import act_dequant, act_quant, requant_transposed

x_nd = (torch.randn(128, 1024) * torch.logspace(-1, 1, 128)[:, None]).bfloat16()
lost = {}
for use_ue8m0 in (False, True):
    wide_nd = act_dequant(*act_quant(x_nd, use_ue8m0))
    once_nd = wide_nd.bfloat16()
    assert torch.equal(
        act_dequant(*act_quant(once_nd, use_ue8m0)).bfloat16(), once_nd
    )  # a second hop
    tiles = requant_transposed(*act_quant(x_nd, use_ue8m0), None, use_ue8m0)
    transposed_nd = act_dequant(*tiles)[:, :128].T
    lost[use_ue8m0] = [
        ((t - wide_nd).norm() / wide_nd.norm()).item() for t in (once_nd, transposed_nd)
    ]
    print(f"powers of two: {use_ue8m0!s:5}  lost by dequantizing to bf16 {lost[use_ue8m0][0]:.2%}, "
          f"by transposing the tiles {lost[use_ue8m0][1]:.3%}")  # fmt: skip
assert lost[True][0] == 0 and lost[True][1] < 1e-3 * lost[False][1]

# %%
wide = GroupedExperts(4, 256, 128)
for p in wide.parameters():
    torch.nn.init.normal_(p, std=0.06)
x_nd, w_nk = torch.randn(200, 256), torch.rand(200, 2)
e_nk = torch.randint(-1, 4, (200, 2))
sent = act_quant(x_nd, True)
received_nd = act_dequant(*sent).bfloat16().float()  # as the destination sees it
with torch.no_grad():
    exact = apply_local_experts(wide, x_nd, w_nk, e_nk)
    with use("fp8", "auto"):
        reused = apply_local_experts(wide, received_nd, w_nk, e_nk, sent)
        requantized = apply_local_experts(wide, received_nd, w_nk, e_nk)
error = {name: ((y - exact).norm() / exact.norm()).item()
         for name, y in (("values reused", reused), ("quantized again", requantized))}  # fmt: skip
print("error of the experts' output:", *[f"{name} {e:.2%};" for name, e in error.items()])
assert 0 < error["values reused"] < error["quantized again"]

OUT = V3.dim + 4 * ceil_div(V3.dim, 128) + 8 * V3.n_activated_experts
BACK = 2 * V3.dim
print(f"bytes per row at V3: out {OUT:,} (in bf16 {2 * V3.dim + 64:,}), back {BACK:,}")

# %% [markdown]
# ## A budget of multiprocessors
# Communication uses **20 of 132** multiprocessors (§3.2.2). A kernel occupies as many as it has programs. Each is a
# *channel* for a part of the tokens. A row's place is the number of earlier tokens for the same rank. After its rows
# a channel writes a *flag*, for which the receiver waits. `kernels/dispatch.py` does this in Triton (not yet run on
# a GPU); programs get turns at random.


# %%
def channel_tokens(channel: int, channels: int, n: int):
    return range(n * channel // channels, n * (channel + 1) // channels)


def send_program(rank, channel, channels, x_nd, goes_ni, rows, flags):
    """Write a channel's tokens to all windows, then set its flags; yields after every token."""
    tokens = channel_tokens(channel, channels, len(x_nd))
    for n in tokens:
        for member in goes_ni[n].nonzero().flatten().tolist():
            rows[member][rank, goes_ni[:n, member].sum()] = x_nd[n]
        yield
    before, after = goes_ni[: tokens.start].sum(0), goes_ni[: tokens.stop].sum(0)
    for member, flag in enumerate(flags):
        flag[rank, channel] = before[member].item(), after[member].item()


def receive_program(rank, channel, rows, flags, arrived):
    """Wait for the flag of this channel from every rank, then copy its rows; yields meanwhile."""
    for source in range(len(rows)):
        while (source, channel) not in flags[rank]:
            yield
        for slot in range(*flags[rank][source, channel]):
            arrived[rank][source, slot] = rows[rank][source, slot]
            yield


def run_programs(programs) -> int:
    """Give all programs a turn, in random order, until they end; return the number of rounds."""
    rounds = 0
    while programs:
        rounds += 1
        order = torch.randperm(len(programs)).tolist()
        programs = [programs[i] for i in order if next(programs[i], "ended") is None]
    return rounds


def dispatch_in_channels(tokens, goes, channels: int):
    """Dispatch the tokens of every rank; return what arrives in each window and the rounds."""
    ranks, capacity = range(len(tokens)), max(map(len, tokens))
    rows, arrived = (
        [torch.zeros(len(tokens), capacity, tokens[0].shape[1]) for _ in ranks] for _ in range(2)
    )
    flags = [{} for _ in ranks]
    programs = []
    for rank, channel in product(ranks, range(channels)):
        send = send_program(rank, channel, channels, tokens[rank], goes[rank], rows, flags)
        programs += [send, receive_program(rank, channel, rows, flags, arrived)]
    return arrived, run_programs(programs)


tokens = [torch.randn(n, 4) for n in (24, 0, 17)]
goes = [torch.rand(len(x), 3) < 0.6 for x in tokens]
want = [torch.zeros(3, 24, 4) for _ in tokens]
for source, member in product(range(3), range(3)):
    sent = tokens[source][goes[source][:, member]]
    want[member][source, : len(sent)] = sent
for channels in (1, 2, 4, 8):
    arrived, rounds = dispatch_in_channels(tokens, goes, channels)
    assert all(map(torch.equal, arrived, want))
    print(f"{channels} channels: the same rows in {rounds} rounds")

# %% [markdown]
# ## Balance over all ranks
# The expert bias of chapter 04 is updated from the load of the *global* batch: each rank counts its own tokens, and
# the counts, 256 integers per layer, are summed over ranks before the update. If each rank used its own counts, the
# biases would diverge, and the models with them. The sequence-wise loss needs no communication: it is a mean over
# sequences, and a sequence is on one rank. So it does not depend on the mesh; a batch-wise loss would.
#
# $$c_e = \sum_{r=1}^R c_e^{(r)}, \qquad \mathcal L_{\text{Bal}} = \frac1R \sum_{r=1}^R \mathcal L_{\text{Bal}}^{(r)}$$
#
# ($R$ ranks with equally many sequences; rank $r$ chose expert $e$ for $c_e^{(r)}$ of its tokens.)

# %%
from dsv3_ref.moe import balance_loss, update_expert_bias

batch = route(torch.randn(8, 64, 32) + torch.randn(8, 1, 32), None, SHAPE)  # 8 sequences on 4 ranks
of_rank = [type(batch)(*parts) for parts in zip(*(t.chunk(4) for t in batch))]
loads = [tokens_per_expert(r.topk_ids_bsk, 32) for r in of_rank]
assert torch.equal(sum(loads), tokens_per_expert(batch.topk_ids_bsk, 32))
biases = [torch.zeros(32) for _ in loads]
for bias_e, load_e in zip(biases, loads):
    update_expert_bias(bias_e, load_e, 0.001)
diverged = (torch.stack(biases) != biases[0]).any(0).sum().item()
print(f"own loads instead of the sum: {diverged} of 32 biases differ between ranks after one step")
assert diverged > 0
for over in ("sequence", "batch"):
    whole, mean = balance_loss(batch, over), sum(balance_loss(r, over) for r in of_rank) / 4
    print(f"{over:8} loss: {whole:.4f} on one rank, {mean:.4f} as the mean of four")
    assert torch.allclose(whole, mean) == (over == "sequence")

# %% [markdown]
# ## Experiment: what each idea saves
# 8,192 tokens on 64 GPUs with V3's gate. Dispatch is in FP8, the time on a link is bytes / bandwidth, and both links
# work at the same time. The affinities are random, and experts are unequally popular (a normal offset with standard
# deviation 0.5 on the logits). How a trained gate differs from that is not measured here.

# %%
IB, NVLINK = 50e9, 160e9  # bytes/s of one GPU (§3.2.2)


def times(limit: int, way: str, k: int = 8, skew: float = 0.5, ranks_per_node: int = 8):
    """Return the nanoseconds for which the dispatch of a token occupies IB and NVLink."""
    hops = journeys(choices(limit, k, skew), home_n, 4, ranks_per_node, way)
    ib, nvlink = copies(hops, ranks_per_node, 8192)
    return 1e9 * ib * OUT / IB, 1e9 * nvlink * OUT / NVLINK


cases = list(product((8, 4), WAYS))
busy_ns = {case: times(*case) for case in cases}
for (limit, way), (ib, nvlink) in busy_ns.items():
    print(f"M = {limit}  {way:9} IB {ib * IB / 1e12:5.1f} kB {ib:5.0f} ns   "
          f"NVLink {nvlink * NVLINK / 1e12:5.1f} kB {nvlink:5.0f} ns")  # fmt: skip
fig, ax = figure(1, 1, 8, 3.2)
at = torch.arange(6) + torch.tensor([0, 0, 0, 0.6, 0.6, 0.6])
ib_ns, nvlink_ns = zip(*busy_ns.values())
ax.bar(at - 0.2, ib_ns, 0.38, color=ORANGE, label="InfiniBand, 50 GB/s")
ax.bar(at + 0.2, nvlink_ns, 0.38, color=BLUE, hatch="//", label="NVLink, 160 GB/s")
ax.set_xticks(at, [way for _, way in cases])
for x, text in ((1, "no limit"), (4.6, "at most 4 nodes (V3)")):
    ax.text(x, -0.2, text, ha="center", transform=ax.get_xaxis_transform(), color=GRAY)
ax.set(ylabel="ns per token, dispatch", ylim=(0, 1350))
ax.set_title("Two hops and four nodes halve the time on the slow link")
ax.legend(loc="upper right", ncols=2)
show(fig)
assert busy_ns[4, "two hops"][0] < 0.52 * busy_ns[8, "naive"][0]
assert busy_ns[4, "two hops"][1] < busy_ns[4, "two hops"][0]  # NVLink hides behind IB

# %% [markdown]
# Sending one copy per GPU saves little: a token rarely chooses two of the four experts of a GPU. Sending one copy per
# node saves nearly a third of IB's time even without a limit, and the limit saves a quarter of the rest. Forwarding
# within the node has moved to NVLink, which needs less time for it than IB does and so costs nothing.
#
# **3.2 experts per node.** While IB brings one token to a node, NVLink can forward 160/50 = 3.2 copies. Vary how many
# nodes are allowed (left) and how many experts are chosen (right): which link takes longer?

# %%
limits, widths = range(1, 9), range(4, 25, 2)
by_limit = [times(limit, "two hops") for limit in limits]
by_width = [times(4, "two hops", k) for k in widths]
fig, axes = figure(1, 2, 9, 3.2)
for ax, xs, ts, name in ((axes[0], limits, by_limit, "nodes allowed, M (8 experts)"),
                         (axes[1], widths, by_width, "experts chosen (M = 4)")):  # fmt: skip
    ax.plot(xs, [t[0] for t in ts], "o-", color=ORANGE, label="InfiniBand")
    ax.plot(xs, [t[1] for t in ts], "s--", color=BLUE, label="NVLink")
    ax.axvline({1: 4, 4: 8}[xs[0]], color=GRAY, lw=1)
    ax.annotate(
        "V3", ({1: 4, 4: 8}[xs[0]], 5), xytext=(4, 0), textcoords="offset points", color=GRAY
    )
    ax.set(xlabel=name, ylabel="ns per token, dispatch", ylim=(0, None))
    ax.legend(loc="lower right")
free = 4 * NVLINK / IB
axes[1].axvline(free, color=GREEN, ls=":")
axes[1].annotate(f"4 · 3.2 = {free:.1f}", (free, 200), xytext=(4, 0), textcoords="offset points",
                 color=GREEN)  # fmt: skip
axes[1].set_xticks(widths[::2])
axes[0].set_title("With three nodes or more IB sets the time")
axes[1].set_title("More experts would be free")
show(fig)
crossing = next(k for k, (ib, nvlink) in zip(widths, by_width) if nvlink > ib)
print(f"NVLink becomes the slower one between {crossing - 2} and {crossing} experts")
assert all(nvlink < ib for k, (ib, nvlink) in zip(widths, by_width) if k <= free)

# %% [markdown]
# The report's 12.8 is conservative: some experts share a GPU, and an eighth of the copies are for the GPU at which
# they arrived over IB. So about two more experts would still be free. In the left figure, with fewer than three nodes,
# a token's experts are concentrated in one or two nodes, and NVLink is the slower link.
#
# ## Play
# Each row is one of 24 tokens of one GPU (rank 3), each column one of 64 GPUs; lines separate the nodes. A pale cell
# is a GPU that receives a token only to forward it. Below, first four nodes are allowed, then all eight. Allow fewer,
# or change the size of a node: the gate limits the number of its eight *groups* of 32 experts, which do not change.
# With smaller nodes a group covers several of them, and a token may visit more than four nodes.

# %%
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

KINDS = {"no token": "white", "local": GRAY, "over IB": ORANGE, "over IB, only forwarded": "#F6DDA6",
         "over NVLink": BLUE}  # fmt: skip


def draw_journeys(limit: int = 4, ranks_per_node: int = 8):
    """Draw which GPUs receive each of 24 tokens of rank 3, and over which link."""
    chosen, home = choices(limit, n=24), torch.full((24,), 3)
    first, second = journeys(chosen, home, 4, ranks_per_node, "two hops")
    kind = torch.zeros(24, 64)
    for token, a, b in zip(*(t.tolist() for t in first)):
        kind[token, b] = 0 if b == a else 3
    for token, a, b in zip(*(t.tolist() for t in second)):
        kind[token, b] = 4 if b != a else (1 if b == 3 else 2)
    fig, ax = figure(1, 1, 9, 3.9)
    ax.imshow(kind, cmap=ListedColormap(list(KINDS.values())), vmin=0, vmax=4, aspect="auto",
              interpolation="nearest")  # fmt: skip
    for node in range(1, 64 // ranks_per_node):
        ax.axvline(node * ranks_per_node - 0.5, color=GRAY, lw=0.8)
    ib, nvlink = copies((first, second), ranks_per_node, 24)
    ax.set(
        title=f"At most {limit} of 8 groups: {ib:.1f} copies per token over IB, {nvlink:.1f} over NVLink",
        xlabel="GPU",
        ylabel="token",
    )
    patches = [
        Patch(facecolor=c, edgecolor=GRAY, label=name) for name, c in list(KINDS.items())[1:]
    ]
    ax.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=4)
    show(fig)


draw_journeys(4)
draw_journeys(8)
play(draw_journeys, limit=(1, 8, 1), ranks_per_node=[8, 2, 4, 16, 32])

# %% [markdown]
# ## Exercises
# Fill in a function and run its cell; the checkers come first.
#
# **1 · Compute.** A token of `dim` numbers visits `nodes` other nodes. How many bytes does the *forward* pass of one
# layer send over IB for it, out in FP8 with fp32 scales and back in bf16? (Ignore the ids and weights of its
# experts.)


# %%
@checker
def check_bytes(fn):
    """How many scales does a row have, if the last tile may be short? How many bytes is bf16?"""
    for dim, nodes, want in (
        (128, 1, 128 + 4 + 256),
        (576, 2, 2 * (576 + 20 + 1152)),
        (V3.dim, 4, 4 * (OUT - 64 + BACK)),
    ):
        assert abs(fn(dim, nodes) - want) < 1e-9


@checker
def check_worst(fn):
    """What is the worst possible routing? Is a token sent twice for two experts of one rank?"""
    for ranks, tokens, k in ((8, 16, 6), (4, 5, 1)):
        all_to_rank0_nk = torch.zeros(tokens, k, dtype=torch.int64) + torch.arange(k) % 4
        rows = sum(dispatch_layout(all_to_rank0_nk, 4, ranks)[2][0].item() for _ in range(ranks))
        assert abs(fn(ranks, tokens, k) - rows) < 1e-9


@checker
def check_jam(fn):
    """While IB brings one copy, NVLink forwards 3.2. How many nodes should the token visit?"""
    expert_k = torch.as_tensor(fn())
    assert expert_k.unique().numel() == 8 and set(expert_k.tolist()) <= set(range(256))
    hops = journeys(expert_k[None], torch.tensor([0]), 4, 8, "two hops")
    ib, nvlink = copies(hops, 8, 1)
    assert ib > 0 and nvlink / NVLINK > ib / IB


@checker
def check_spare(fn):
    """At which positions is `hot`? Change every second one of them, and nothing else."""
    expert_nk = choices(n=300, skew=1.0)
    hot = tokens_per_expert(expert_nk, 256).argmax().item()
    out_nk = fn(expert_nk.clone(), hot, 256)
    assert torch.equal(torch.where(out_nk == 256, hot, out_nk), expert_nk)
    moved = out_nk[expert_nk == hot] == 256  # of the tokens that chose it, in their order
    assert (moved[1:] != moved[:-1]).all()


# %%
def my_bytes(dim: int, nodes: int) -> int:
    return ...


check_bytes(my_bytes)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_bytes(dim, nodes):
#     return nodes * (dim + 4 * ceil_div(dim, 128) + 2 * dim)
# ```
#
# Two thirds of it are for the way back. The backward pass sends the same amount again.
# </details>
#
# **2 · Predict.** No token is dropped. How many rows can arrive at a rank in the worst case, if each of `ranks`
# ranks, itself included, has `tokens` tokens with `k` experts each?


# %%
def my_worst(ranks: int, tokens: int, k: int) -> int:
    return ...


check_worst(my_worst)

# %% [markdown]
# <details><summary>Answer</summary>
#
# $k$ does not matter. With V3's 64 ranks and 4096 tokens that is 262,144 rows of 7.5 kB: 2.0 GB, of which 12 % is
# typical. One can exchange the counts first and wait for them, or reserve memory for the typical case and repeat
# the step when it does not suffice.
#
# ```python
# def my_worst(ranks, tokens, k):
#     return ranks * tokens
# ```
# </details>
#
# **3 · Break.** The token is on GPU 0 (node 0). Choose eight of 256 experts, at least one of them in another
# node, so that NVLink, not IB, sets the time. (Expert $e$ is on GPU $\lfloor e/4\rfloor$; a node has 32 experts.)


# %%
def my_jam() -> list[int]:
    return ...


check_jam(my_jam)

# %% [markdown]
# <details><summary>Answer</summary>
#
# All in one other node, each on a different GPU: one copy over IB, seven forwarded. The gate does not forbid
# that. It is rare, and what counts is the sum over all tokens.
#
# ```python
# def my_jam():
#     return [32 + 4 * gpu for gpu in range(8)]
# ```
# </details>
#
# **4 · Extend.** In serving, *hot* experts, which many tokens choose, have a *redundant* copy on another GPU
# (§3.4.1). Send every second token that chose expert `hot` to the copy, whose id is `spare`.


# %%
def my_spare(expert_nk, hot: int, spare: int):
    return ...


check_spare(my_spare)

# %% [markdown]
# <details><summary>Answer</summary>
#
# The weights and the results stay the same; only `dispatch_layout` gets another id. Training has no copies: their
# gradients would have to be summed, and the bias balances the load anyway.
#
# ```python
# def my_spare(expert_nk, hot, spare):
#     places = (expert_nk == hot).nonzero()[::2]
#     expert_nk[places[:, 0], places[:, 1]] = spare
#     return expert_nk
# ```
# </details>

# %% [markdown]
# ## Scale-up
# A micro-batch of one sequence, 4096 tokens per GPU, on H800s. How long are the links busy, and how long the tensor
# cores?

# %%
T, TOKENS = 4096, 4096 * 64
ib, nvlink = copies(journeys(choices(4, skew=0.5), home_n, 4, 8, "two hops"), 8, 8192)
travel = {}
for name, rows in (("dispatch", OUT), ("combine", BACK)):
    travel[name] = T * max(ib * rows / IB, nvlink * rows / NVLINK) * 1e3
    print(f"{name:9}{ib * rows / 1e3:5.0f} kB per token over IB, {nvlink * rows / 1e3:5.0f} over NVLink; "
          f"{T * ib * rows / 1e6:4.0f} MB per GPU and layer: {travel[name]:.1f} ms")  # fmt: skip
bytes_all = 58 * 2 * ib * (OUT + BACK)
print(f"58 layers, forward and backward: {bytes_all / 1e6:.0f} MB over IB for each token")

c = V3
linear = c.dim * (c.q_lora_rank + c.kv_lora_rank + c.qk_rope_head_dim)
linear += c.n_heads * (c.q_lora_rank * (c.qk_nope_head_dim + c.qk_rope_head_dim)
                       + c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim) + c.dim * c.v_head_dim)  # fmt: skip
linear += 3 * c.dim * c.moe_inter_dim * (c.n_activated_experts + c.n_shared_experts)
attention = c.n_heads * T / 2 * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
compute = 1e3 * 2 * T * (linear / 1979e12 + attention / 989e12)  # ms at the peaks
print(f"forward pass of the layer: {compute:.1f} ms at the peak rate, {2 * compute:.1f} ms at half of it; "
      f"communication: {sum(travel.values()):.1f} ms")  # fmt: skip
rows = TOKENS * V3.n_activated_experts / V3.n_routed_experts
print(f"rows per expert: {rows:,.0f} from 64 GPUs; from one GPU alone {rows / 64:,.0f}")
assert 0.5 < sum(travel.values()) / (2 * compute) < 2

# %% [markdown]
# **InfiniBand is the bottleneck**, and the cost is large: if computation reaches half of the peak rate,
# communication takes as long as computation. This is the ratio of about 1 : 1 that the report gives as its reason
# for DualPipe (§3.2.1). Nothing in this chapter can reduce it much further, so it has to be *hidden*.
# [Chapter 12](12_dualpipe.ipynb) runs two micro-batches at once: one computes while the other communicates.
#
# - **Links and cores.** The report assigns 20 of 132 multiprocessors to communication, in 10 channels with three
#   kinds of warps: sending over IB, forwarding to NVLink, receiving (§3.2.2). `all_to_all_single` runs the two hops
#   one after the other. DeepEP, DeepSeek's library for this, overlaps them row by row and reports 153 GB/s for
#   dispatch and 158 GB/s for combine within a node, and 51 and 50 GB/s at 64 ranks. `--token-dispatcher deepep` uses
#   it in place of `AllToAllDispatcher` (written from its documentation, not yet run with the library itself).
# - **Arithmetic.** Each expert gets rows from 64 GPUs, enough to be compute-bound ([chapter 04](04_moe.ipynb)).
# - **Placement.** An expert group is 64 neighboring ranks, so it spans as few nodes as possible. The pipeline's
#   messages, which are far smaller, cross the remaining node boundaries (`dsv3_ref/parallel/mesh.py`).
# - **Serving** goes further: 32-way expert parallelism for reading prompts (*prefill*) and 320-way for decoding, with
#   one expert per GPU and copies of hot experts (§3.4). Decoding has few rows, so latency is the bottleneck instead
#   of bandwidth.
