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
# # 19 · Redundant experts: a second copy of a busy expert

# %% [markdown]
# ## Why
# The gate's bias ([chapter 04](04_moe.ipynb)) keeps experts evenly loaded *over the batches of training*. Users send
# other text. Below, the model of `make train`, trained on nine tenths speeches, processes the other tenth: Python's
# standard library. Its 16 experts are placed on eight GPUs, two each, and in its last layer one GPU gets **3.3 times** the
# mean load. All GPUs wait for it before the next layer can begin, so the other seven are idle most of the time.
#
# Training cannot fix this, since the weights are final. But an expert may have more than one copy.

# %%
from collections import Counter
from dataclasses import replace
from itertools import combinations, product

import torch

from dsv3_ref.config import V3
from dsv3_ref.viz import BLUE, COLORS, GREEN, GRAY, ORANGE, checker, figure, play, show
from dsv3_ref.viz.ablation import load_result

recorded = load_result("expert_load")  # windows of 4,096 tokens: tokens per expert of every layer
print(recorded["command"])
# name → (windows, l, e)
LOADS = {name: torch.tensor(x) for name, x in recorded["tokens_per_expert"].items()}
pairs = {name: x.sum(0).unflatten(-1, (8, 2)).sum(-1).float() for name, x in LOADS.items()}
share = {name: (x / x.mean(-1, keepdim=True))[2] for name, x in pairs.items()}
assert 3.2 < share["stdlib"].max() < 3.4 and share["sotu"].max() < 1.3
fig, ax = figure(1, 1, 8, 2.8)
for shift, color, (name, text) in zip(
    (-0.2, 0.2), (GRAY, BLUE), {"sotu": "speeches", "stdlib": "Python source"}.items()
):
    ax.bar(torch.arange(8) + shift, share[name], 0.38, color=color, label=text)
ax.axhline(1, color=ORANGE, ls="--")
ax.set(title="One layer's experts on eight GPUs: same model, different text", xlabel="GPU",
       ylabel="load / mean", xticks=range(8))  # fmt: skip
ax.legend(loc="upper right")
show(fig)

# %% [markdown]
# ## Paper
# - **Prefill** (§3.4.1): 4 nodes of 8 GPUs share the 256 experts, 8 per GPU. **32 redundant** copies of busy experts are added,
#   one per GPU: 8 + 1. Which experts are copied follows from loads counted in service and is updated *about every ten minutes*. The experts are then
#   rearranged **within their node**, so that balancing causes no traffic between nodes.
# - **Decode** (§3.4.2): 40 nodes, 320 GPUs, **one expert each**. 256 GPUs hold the routed experts, 64 the redundant ones *and
#   the shared expert*, which counts as a routed one that every token chooses: nine per token. The copies are updated in the same way, but with
#   one expert per GPU there is nothing to rearrange.
# - *Being explored* at the time (§3.4.1): a GPU holds more experts, say 16, of which only 9 are active in a step, chosen at every layer.
#
# How copies are chosen and placed is not in the report but in a program that DeepSeek published later, *EPLB*
# (expert-parallelism load balancer, MIT license). This chapter implements its description with the same signature and, except for ties,
# the same results.
#
# Axes: `l` layer, `e` expert, `g` group of experts, `a` *physical* expert (a slot in a GPU's memory), `u` copy of an
# expert, `o` node, `j` GPU, `n` token, `k` choice of a token, `m` choices of all tokens in order. There are $A$ slots and $J$ GPUs.

# %%
#| export eplb
from collections import deque
from functools import reduce

import torch
from einops import rearrange
from torch import Tensor

from dsv3_ref.config import UserError
from dsv3_ref.moe import tokens_per_expert

# %% [markdown]
# ## How many copies
# Expert $e$ has load $L_e$ and $n_e$ copies that share it. Only the busiest copy matters:
#
# $$\min_{n}\ \max_e \frac{L_e}{n_e} \qquad \text{with } n_e \ge 1,\ \textstyle\sum_e n_e = A.$$
#
# A greedy algorithm is optimal: start with one copy each, and give every further slot to the expert whose copies are busiest
# *now*. No other choice could lower the maximum. Slots are numbered in the order in which they are assigned: the first `e` are the experts
# themselves. The loop runs over slots, for all layers at once; of equal experts the first one wins.


# %%
#| export eplb
def replicate_experts(load_le: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Give every expert a slot, and each further slot to argmax_e load_e / copies_e (§3.4.1).

    Returns the expert in each slot (l, a), the index of the copy in that slot (l, a), and the
    number of copies of each expert (l, e). Of equal experts the first one wins.
    """
    layers, experts = load_le.shape
    expert_la = torch.arange(experts).repeat(layers, 1)
    copy_la, count_le = torch.zeros_like(expert_la), torch.ones(load_le.shape, dtype=torch.long)
    for _ in range(num_slots - experts):
        busiest_l1 = (load_le / count_le).argmax(-1, keepdim=True)
        expert_la = torch.cat([expert_la, busiest_l1], 1)
        copy_la = torch.cat([copy_la, count_le.gather(1, busiest_l1)], 1)
        count_le = count_le.scatter_add(1, busiest_l1, torch.ones_like(busiest_l1))
    return expert_la, copy_la, count_le


# %%
g = torch.Generator().manual_seed(0)
load_le = torch.randint(1, 100, (50, 4), generator=g).float()
expert_la, copy_la, count_le = replicate_experts(load_le, 9)
ways = torch.tensor([n for n in product(range(1, 7), repeat=4) if sum(n) == 9])
best_l = (
    (load_le[:, None] / ways).amax(-1).amin(-1)
)  # over all ways to give nine slots to four experts
assert torch.equal((load_le / count_le).amax(-1), best_l)
assert all(Counter(row.tolist()) == Counter(dict(enumerate(n.tolist())))
           for row, n in zip(expert_la, count_le))  # fmt: skip
print("loads", load_le[0].int().tolist(), "→ expert in each slot", expert_la[0].tolist())

# %% [markdown]
# ## Placing copies on GPUs
# Every GPU gets exactly $A/J$ slots, since memory is reserved for that many.
#
# $$\min \max_j \sum_{a \,\in\, j} w_a, \qquad |j| = A / J, \qquad w_a = L_{e(a)} / n_{e(a)}$$
#
# where $e(a)$ is the expert in slot $a$ and $w_a$ the share of its load in that slot. *This* problem is NP-hard, and a good
# heuristic suffices: heaviest slot first, each on the lightest GPU that still has a free slot.
# If each GPU has only one slot, the slots stay in order, since any order is equally good. The same function packs groups
# into nodes, so its parameter is called `num_packs`.


# %%
#| export eplb
def balanced_packing(weight_lx: Tensor, num_packs: int) -> tuple[Tensor, Tensor]:
    """Pack x items into packs of x / num_packs items, heaviest first, each into the lightest pack.

    A full pack takes no further item; of equal packs the first one wins. Returns the pack of every
    item (l, x) and the item's rank inside that pack (l, x).
    """
    layers, items = weight_lx.shape
    if items == num_packs:
        return torch.arange(items).repeat(layers, 1), torch.zeros(layers, items, dtype=torch.long)
    pack_lx = torch.zeros(layers, items, dtype=torch.long)
    rank_lx = torch.zeros_like(pack_lx)
    size_lj = torch.zeros(layers, num_packs, dtype=torch.long)
    sum_lj = torch.zeros(layers, num_packs, dtype=weight_lx.dtype)
    for item_l1 in weight_lx.argsort(dim=-1, descending=True, stable=True).split(1, dim=1):
        open_lj = sum_lj.masked_fill(size_lj == items // num_packs, torch.inf)
        pack_l1 = open_lj.argmin(-1, keepdim=True)
        pack_lx.scatter_(1, item_l1, pack_l1)
        rank_lx.scatter_(1, item_l1, size_lj.gather(1, pack_l1))
        size_lj.scatter_add_(1, pack_l1, torch.ones_like(pack_l1))
        sum_lj.scatter_add_(1, pack_l1, weight_lx.gather(1, item_l1))
    return pack_lx, rank_lx


# %%
def heaviest_pack(weight_lx, pack_lx, n: int):
    """Return the sum of the heaviest of n packs in each layer, (l,)."""
    return torch.zeros(len(weight_lx), n).scatter_add(1, pack_lx, weight_lx).amax(-1)


weight_lx = torch.randint(1, 100, (200, 8), generator=g).float()
pack_lx, rank_lx = balanced_packing(weight_lx, 2)
assert (pack_lx.sum(-1) == 4).all()
assert all(sorted(zip(i, p)) == list(product(range(2), range(4)))
           for i, p in zip(pack_lx.tolist(), rank_lx.tolist()))  # fmt: skip
halves = [torch.tensor(x) for x in combinations(range(8), 4)]
best_l = torch.stack([weight_lx[:, x].sum(-1).maximum(weight_lx.sum(-1) - weight_lx[:, x].sum(-1))
                      for x in halves]).amin(0)  # fmt: skip
over_l = heaviest_pack(weight_lx, pack_lx, 2) / best_l - 1
assert (over_l >= 0).all() and 0 < over_l.mean() < 0.02
print(f"above the optimum of all {len(halves)} ways: {over_l.mean():.1%} on average, "
      f"{over_l.max():.0%} at worst; optimal in {(over_l == 0).float().mean():.0%}")  # fmt: skip

# %% [markdown]
# ## Node by node
# A token is sent to at most four of eight groups. That limit saves traffic only if a group lies *on one node*. The
# placement is therefore done in three steps that never split a group:
#
# $$\text{groups} \xrightarrow{\ \texttt{balanced\_packing}\ } \text{nodes}, \qquad
# \text{experts of a node} \xrightarrow{\ \texttt{replicate\_experts}\ } \text{its slots}
# \xrightarrow{\ \texttt{balanced\_packing}\ } \text{its GPUs}$$
#
# Steps two and three do not depend on nodes: a node of a layer is just another row, `(l o)`. Where groups cannot be divided
# evenly, as on the 40 nodes of a decode unit, the *global* policy does the same with one group and one node. It balances
# better, but a token may be sent to any node.


# %%
#| export eplb
def invert_permutation(perm_lx: Tensor) -> Tensor:
    """Return the inverse of each row's permutation: perm[inverse[x]] = x."""
    index_lx = torch.arange(perm_lx.shape[1]).expand_as(perm_lx)
    return torch.empty_like(perm_lx).scatter_(1, perm_lx, index_lx)


def by_node(x_lx: Tensor, nodes: int) -> Tensor:
    """Split each layer into its nodes, one row each: (l, o·x) → (l·o, x)."""
    return rearrange(x_lx, "l (o x) -> (l o) x", o=nodes)


def by_layer(x_ox: Tensor, nodes: int) -> Tensor:
    """Join the nodes of each layer: (l·o, x) → (l, o·x)."""
    return rearrange(x_ox, "(l o) x -> l (o x)", o=nodes)


def order_experts_by_node(load_le: Tensor, groups: int, nodes: int) -> Tensor:
    """Pack whole groups into nodes; return the experts in the order of their nodes, (l, e)."""
    group_lg = rearrange(load_le, "l (g x) -> l g x", g=groups).sum(-1)
    node_lg, rank_lg = balanced_packing(group_lg, nodes)
    order_lg = invert_permutation(node_lg * (groups // nodes) + rank_lg)
    size = load_le.shape[1] // groups
    return rearrange(order_lg[..., None] * size + torch.arange(size), "l g x -> l (g x)")


def rebalance_experts_hierarchical(
    load_le: Tensor, num_slots: int, groups: int, nodes: int, gpus: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Pack groups into nodes, replicate experts inside nodes, pack slots into GPUs (§3.4.1).

    The results are those of `replicate_experts`, with the slots in the order of their GPUs.
    """
    expert_le = order_experts_by_node(load_le, groups, nodes)
    load_xe = by_node(load_le.gather(1, expert_le), nodes)  # x: a node of a layer
    expert_xa, copy_xa, count_xe = replicate_experts(load_xe, num_slots // nodes)
    share_xa = (load_xe / count_xe).gather(1, expert_xa)
    gpu_xa, rank_xa = balanced_packing(share_xa, gpus // nodes)
    slot_xa = invert_permutation(gpu_xa * (num_slots // gpus) + rank_xa)
    expert_xa = by_node(expert_le, nodes).gather(1, expert_xa.gather(1, slot_xa))
    copy_la = by_layer(copy_xa.gather(1, slot_xa), nodes)
    count_le = by_layer(count_xe, nodes).gather(1, invert_permutation(expert_le))
    return by_layer(expert_xa, nodes), copy_la, count_le


# %% [markdown]
# The entry point has EPLB's names and order of arguments. `logical_to_physical_map[l, e, u]` is the slot of copy $u$ of
# expert $e$, −1 where there are fewer copies. Loads are computed in fp32: sums of equal loads must be equal, or
# ties would be broken differently.


# %%
#| export eplb
def check_cluster(experts: int, num_slots: int, groups: int, nodes: int, gpus: int) -> None:
    """Raise `UserError` unless the numbers divide each other and every expert has a slot."""
    rules = [
        (experts % groups == 0, f"{experts} experts do not form {groups} equal groups"),
        (gpus % nodes == 0, f"{gpus} GPUs do not form {nodes} equal nodes"),
        (num_slots % gpus == 0, f"{num_slots} slots do not fill {gpus} GPUs evenly"),
        (num_slots >= experts, f"{experts} experts do not fit into {num_slots} slots"),
    ]
    for holds, sentence in rules:
        if not holds:
            raise UserError(sentence)


def rebalance_experts(
    weight: Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Place experts by their loads (layers, experts), as DeepSeek's EPLB does (§3.4.1, §3.4.2).

    Returns physical_to_logical_map (layers, num_replicas), logical_to_physical_map (layers,
    experts, largest number of copies; −1 where there are fewer) and expert_count (layers, experts).
    The policy is hierarchical if the nodes divide the groups, else global. Raises `UserError` for
    numbers that do not divide each other.
    """
    layers, experts = weight.shape
    is_hierarchical = num_groups % num_nodes == 0
    groups, nodes = (num_groups, num_nodes) if is_hierarchical else (1, 1)
    check_cluster(experts, num_replicas, groups, nodes, num_gpus)
    expert_la, copy_la, count_le = rebalance_experts_hierarchical(
        weight.float().cpu(), num_replicas, groups, nodes, num_gpus
    )
    max_copies = int(count_le.max())
    slots = torch.full((layers, experts * max_copies), -1)
    index_la = expert_la * max_copies + copy_la
    slots.scatter_(1, index_la, torch.arange(num_replicas).expand(layers, -1))
    return expert_la, slots.view(layers, experts, max_copies), count_le


# %%
# The example of EPLB's README: two layers, 12 experts in 4 groups, 16 slots on 2 nodes of 4 GPUs.
EXAMPLE = torch.tensor([[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
                        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]])  # fmt: skip
expert_la, slot_leu, count_le = rebalance_experts(EXAMPLE, 16, 4, 2, 8)
assert expert_la.tolist() == [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
                              [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]  # fmt: skip
for layer, e in product(range(2), range(12)):  # the two maps agree
    slots = slot_leu[layer, e][slot_leu[layer, e] >= 0]
    assert len(slots) == count_le[layer, e] and (expert_la[layer, slots] == e).all()
group_ox = expert_la[0].view(2, 8) // 3
assert not {*group_ox[0].tolist()} & {*group_ox[1].tolist()}  # every group on one node
for gpu, slots in enumerate(expert_la[0].view(8, 2).tolist()):
    print(f"node {gpu // 4}, GPU {gpu}: experts {slots}")

# %% [markdown]
# `tests/test_eplb.py` compares the results with loops over the slots of one layer, written from the description, on hundreds
# of random cases with many ties. Ties need care: copies of one expert are *always* equal, and the published program
# sorts without requesting a stable order, so its placement of equal copies depends on the version of torch. Ours keeps their order.
#
# ## Load per GPU
# If copies share the load evenly, GPU $j$ has load $\sum_{a \in j} L_{e(a)}/n_{e(a)}$, and a layer takes as long as its busiest
# GPU:
#
# $$\text{load imbalance} = \frac{\max_j L_j}{\frac1J \sum_j L_j}, \qquad \text{1 is even; it equals MaxVio of chapter 04 plus 1.}$$


# %%
#| export eplb
def gpu_load(load_le: Tensor, expert_la: Tensor, gpus: int) -> Tensor:
    """Return the load of every GPU (l, j) if the copies of an expert share its load evenly."""
    one_la = torch.ones(expert_la.shape, device=load_le.device)
    count_le = torch.zeros(load_le.shape, device=load_le.device).scatter_add(1, expert_la, one_la)
    share_la = (load_le / count_le).gather(1, expert_la)
    return rearrange(share_la, "l (j a) -> l j a", j=gpus).sum(-1)


def load_imbalance(load_lj: Tensor) -> Tensor:
    """Return max_j / mean_j of each layer (l,): its time relative to even loads."""
    return load_lj.max(-1).values / load_lj.float().mean(-1)


# %%
alone_la = torch.arange(12).repeat(2, 1)  # one copy each, in order, on four GPUs
before, after = gpu_load(EXAMPLE, alone_la, 4), gpu_load(EXAMPLE, expert_la, 8)
assert torch.equal(before[0], torch.tensor([262.0, 330.0, 116.0, 325.0]))
assert torch.allclose(after.sum(-1), EXAMPLE.sum(-1).float())  # the total load is unchanged
even_la = rebalance_experts(torch.ones(1, 12), 16, 1, 1, 16)[0]
print(
    "12 experts on 4 GPUs:", [f"{x:.2f}" for x in load_imbalance(before)],
    "16 slots on 8 GPUs:", [f"{x:.2f}" for x in load_imbalance(after)],
)  # fmt: skip
worse = load_imbalance(gpu_load(torch.ones(1, 12), even_la, 16)).item()
print(f"even loads, 16 GPUs for 12 experts: {worse:.2f}")

# %% [markdown]
# The last line shows a limit. Four experts were copied, and their eight GPUs have half an expert's load each; the other eight GPUs
# have a whole expert's load as before. Redundancy can only reduce peaks.
#
# ## Choosing a copy
# A gate chooses experts, not copies. In between, the rows of an expert are assigned to its copies in turn: counted from 0, its row $t$ goes to copy
# $t \bmod n_e$. For all choices of all tokens in order, with choice $m$ being expert $e_m$:
#
# $$a_m = \text{slot}\big[e_m,\ t_m \bmod n_{e_m}\big], \qquad t_m = \#\{m' < m : e_{m'} = e_m\}.$$
#
# Copies therefore differ by at most one row, whatever the order of the tokens. Physical ids then replace expert
# ids everywhere: with $p = A/J$ slots per GPU, GPU $j$ holds slots $j p \dots (j+1) p - 1$, which is all that `dispatch_layout` of
# [chapter 11](11_expert_parallel.ipynb) requires.


# %%
#| export eplb
def occurrence_rank(expert_m: Tensor, n_experts: int) -> Tensor:
    """Count for each entry the earlier entries with the same expert: t_m, (m,)."""
    order_m = expert_m.argsort(stable=True)
    count_e = tokens_per_expert(expert_m, n_experts)
    first_e = count_e.cumsum(0) - count_e  # where each expert's entries begin in that order
    index_m = torch.arange(len(order_m), device=order_m.device)
    rank_m = torch.empty_like(order_m)
    rank_m[order_m] = index_m - first_e[expert_m[order_m]]
    return rank_m


def assign_replicas(expert_nk: Tensor, slot_eu: Tensor, count_e: Tensor) -> Tensor:
    """Return the slot of every choice (n, k); the rows of an expert use its copies in turn."""
    expert_m = expert_nk.flatten()
    turn_m = occurrence_rank(expert_m, len(count_e))
    return slot_eu[expert_m, turn_m % count_e[expert_m]].view_as(expert_nk)


def logical_to_physical(expert_a: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """Invert one layer's placement: the slots of every expert (e, u), and their number (e,).

    Slots are in ascending order; −1 fills the places of missing copies.
    """
    count_e = tokens_per_expert(expert_a, n_experts)
    slot_eu = expert_a.new_full((n_experts, int(count_e.max())), -1)
    slot_a = torch.arange(len(expert_a), device=expert_a.device)
    slot_eu[expert_a, occurrence_rank(expert_a, n_experts)] = slot_a
    return slot_eu, count_e


# %%
from dsv3_ref.expert_parallel import to_local_expert_ids, apply_local_experts, dispatch_layout
from dsv3_ref.moe import GroupedExperts, MoE, tokens_per_expert, route

chosen_nk = torch.rand(500, 12, generator=g).argsort(-1)[:, :3]
slot_nk = assign_replicas(chosen_nk, slot_leu[0], count_le[0])
assert torch.equal(expert_la[0][slot_nk], chosen_nk)  # always a copy of the chosen expert
rows_a = tokens_per_expert(slot_nk, 16)
even_a = (tokens_per_expert(chosen_nk, 12) / count_le[0])[expert_la[0]]
assert ((rows_a - even_a).abs() < 1).all()
print("rows of every slot:", rows_a.tolist())
turns = [[slot_leu[0, e, j % count_le[0, e]].item() for j in range((chosen_nk == e).sum())]
         for e in range(12)]  # fmt: skip
assert [slot_nk[chosen_nk == e].tolist() for e in range(12)] == turns

# %% [markdown]
# ## A running model
# `set_expert_placement(moe, physical_to_logical)` in `dsv3_ref/parallel/physical_experts.py` sets the `token_dispatcher` of a `MoE`: it
# copies weights into slots, and in each forward pass assigns the choices to slots and computes the slots. The model, its gate and
# its checkpoint are unchanged. Called again with another placement, it refills only the slots that change and
# returns their number. The check: the outputs are the same before, between two placements and after, and also with the slots on eight GPUs
# of their own.

# %%
from dsv3_ref.parallel.physical_experts import clear_expert_placement, set_expert_placement

SHAPE = replace(V3, dim=32, moe_inter_dim=16, n_routed_experts=12, n_activated_experts=3,
                n_expert_groups=4, n_limited_groups=2)  # fmt: skip
moe = MoE(SHAPE).requires_grad_(False)
for p in moe.parameters():
    p.normal_(std=0.3, generator=g)
x_bsd, names = torch.randn(4, 25, 32, generator=g), list(moe.state_dict())
alone, r = moe(x_bsd)
for placement in expert_la:
    refilled = set_expert_placement(moe, placement)
    error = (moe(x_bsd)[0] - alone).abs().max()
    assert error < 1e-5 and list(moe.state_dict()) == names
    print(f"{refilled} slots filled, outputs differ by {error:.0e} at most")
slot_eu, count_e = logical_to_physical(expert_la[1], 12)
slot_nk = assign_replicas(r.topk_ids_bsk.flatten(0, 1), slot_eu, count_e)
x_nd, w_nk = x_bsd.flatten(0, 1), r.topk_weights_bsk.flatten(0, 1)
token_m, gpu_m, rows_j = dispatch_layout(slot_nk, experts_per_member=2, num_members=8)
y_nd = torch.zeros_like(x_nd)
for gpu, slots in enumerate(expert_la[1].view(8, 2)):
    local, m = GroupedExperts(2, 32, 16).requires_grad_(False), token_m[gpu_m == gpu]
    for p, all_experts in zip(local.parameters(), moe.experts.parameters()):
        p.copy_(all_experts[slots])
    local_mk = to_local_expert_ids(slot_nk[m], gpu_m[gpu_m == gpu], experts_per_member=2)
    y_nd.index_add_(0, m, apply_local_experts(local, x_nd[m], w_nk[m], local_mk))
assert torch.allclose(y_nd.view_as(x_bsd) + moe.shared_experts(x_bsd), alone, atol=1e-5)
clear_expert_placement(moe)
assert torch.equal(moe(x_bsd)[0], alone)
print("rows that each GPU received:", rows_j.tolist())

# %% [markdown]
# ## Counting loads
# Loads come from the `Route`s that every forward pass returns, summed over a window of steps. A window that is too short is noisy, and one that is too
# long is out of date.


# %%
#| export eplb
class ExpertLoadWindow:
    """Expert loads (l, e) of the last `window` steps."""

    def __init__(self, window: int):
        self.steps: deque[Tensor] = deque(maxlen=window)

    def add(self, load_le: Tensor) -> None:
        """Append the loads of a step; a full window drops its oldest step."""
        self.steps.append(load_le)

    def total(self) -> Tensor:
        """Return the sum over the window, (l, e)."""
        return reduce(torch.add, self.steps)


# %%
from dsv3_ref.pretrain import expert_loads

recent = ExpertLoadWindow(window=2)
for step in range(3):
    recent.add(step * expert_loads([r, r]))
load_e = tokens_per_expert(r.topk_ids_bsk, 12)
assert torch.equal(recent.total(), 3 * load_e.expand(2, -1))
print(recent.total()[0].tolist())

# %% [markdown]
# ## Experiment: recorded routing
# The data are speeches in the order of their years and Python's standard library in the order of its files, 24 windows each: `expert_load.json`
# holds the choices of the 5M model's gates. There are eight GPUs in two nodes. A
# placement is computed from the first twelve windows of a source and measured on the other twelve, as the mean over the three layers: one copy per expert in numerical order
# (dotted), rearranged but still one copy each (0, left end), and with additional slots.

# %%
GPUS = 8
POLICY = {"hierarchical": (4, 2), "global": (1, 1)}  # groups and nodes
IN_ORDER = torch.arange(16).repeat(3, 1)


def mean_imbalance(load_xle, expert_la, gpus: int = GPUS) -> float:
    """Return slowest GPU / mean, averaged over windows and layers."""
    imbalance_xl = [load_imbalance(gpu_load(load_le, expert_la, gpus)) for load_le in load_xle]
    return torch.stack(imbalance_xl).mean().item()


def place(load_le, extra: int, policy: str):
    """Return the placement (l, a) of 16 experts and `extra` copies for these loads."""
    return rebalance_experts(load_le, 16 + extra, *POLICY[policy], GPUS)[0]


EXTRA = range(0, 33, 8)
TEXTS = {"sotu": "speeches", "stdlib": "source"}
measured = {}  # (placed by, measured on, policy) → a value per number of EXTRA slots
for by, on, policy in product(TEXTS, TEXTS, POLICY):
    placements = [place(LOADS[by][:12].sum(0), extra, policy) for extra in EXTRA]
    measured[by, on, policy] = [mean_imbalance(LOADS[on][12:], x_la) for x_la in placements]
unplaced = {on: mean_imbalance(LOADS[on][12:], IN_ORDER) for on in TEXTS}
fig, axes = figure(1, 2, 9, 3.4, sharey=True)
for ax, same in zip(axes, (True, False)):
    for (by, on, policy), values in measured.items():
        if (by == on) == same:
            ax.plot(EXTRA, values, "o-" if policy == "global" else "s--", ms=4,
                    color=GRAY if on == "sotu" else BLUE, label=f"{TEXTS[on]}, {policy}")  # fmt: skip
    for on, color in (("sotu", GRAY), ("stdlib", BLUE)):
        ax.axhline(unplaced[on], color=color, ls=":", lw=1)
    ax.set(xlabel="redundant experts (16 experts, 8 GPUs)", xticks=EXTRA)
    ax.set(ylim=(1, 2.75))
    ax.legend(fontsize=8.5, ncols=2, loc="upper right")
axes[0].set(title="Placed by earlier windows of the same text", ylabel="slowest GPU / mean")
axes[1].set(title="Placed by the other text")
show(fig)
for key, values in measured.items():
    print(*key, [f"{x:.2f}" for x in values])
for on in TEXTS:
    line = [f"{policy} {measured[on, on, policy][1]:.2f}" for policy in POLICY]
    print(f"{TEXTS[on]}: {unplaced[on]:.2f} in numerical order; with 8 redundant", ", ".join(line))
assert measured["stdlib", "stdlib", "global"][1] < 1.25 < 2 < unplaced["stdlib"]
assert measured["sotu", "stdlib", "global"][1] > 1.5

# %% [markdown]
# With eight copies a layer on source code is nearly twice as fast (2.20 → 1.17; 1.22 with groups kept on nodes). Rearranging
# alone achieves most of that (1.47). Placed by the loads of the *other* text, eight copies are wasted: source code is as slow as before
# (2.20) and slower than when rearranged by the same wrong loads without copies (1.66), and speeches get slower (1.20 → 1.37). Source
# code needs 24 additional slots for its 16 experts before wrongly placed copies help (1.55).
# Speeches, for which the bias was trained, have little to gain.
#
# ## Experiment: the benefit of the hierarchy
# At V3's shape we use 256 experts in 8 groups with loads by Zipf's law, load $\propto \text{rank}^{-s}$, in 16 layers of random order.
# A prefill unit has 32 GPUs in 4 nodes. Left: balance. Right: its cost. 8,192 tokens pass through V3's gate, with experts
# of unequal popularity as in chapter 11, and we count the nodes that a token is sent to.


# %%
def zipf(skew: float, layers: int = 16, experts: int = 256):
    """Return loads ∝ rank^−skew with ranks shuffled in each layer, (l, e)."""
    order = torch.rand(layers, experts, generator=torch.Generator().manual_seed(3)).argsort(-1)
    return (order + 1.0) ** -skew


def gate_tokens(seed: int, n: int = 8192):
    """Return choices of V3's gate for random affinities and experts of unequal popularity, (n, k)."""
    g = torch.Generator().manual_seed(seed)
    popularity_e = 0.5 * torch.randn(256, generator=torch.Generator().manual_seed(5))
    return route(torch.randn(1, n, 256, generator=g) + popularity_e, None, V3).topk_ids_bsk[0]


def nodes_visited(chosen_nk, placement, nodes: int) -> float:
    """Return the mean number of nodes that a token is sent to."""
    expert_la, slot_leu, count_le = placement
    slot_nk = assign_replicas(chosen_nk, slot_leu[0], count_le[0])
    node_nk = slot_nk // (expert_la.shape[1] // nodes)
    return torch.nn.functional.one_hot(node_nk, nodes).amax(1).sum(-1).float().mean().item()


def place_v3(load_le, num_slots: int, policy: str, nodes: int):
    """Return a placement of V3's 256 experts on nodes of eight GPUs."""
    groups_nodes = (8, nodes) if policy == "hierarchical" else (1, 1)
    return rebalance_experts(load_le, num_slots, *groups_nodes, 8 * nodes)


V3_POLICY = ("hierarchical", "global")
MORE = range(0, 161, 32)
IN_ORDER_V3 = torch.arange(256).repeat(16, 1)
curves, numbered = {}, {}  # load imbalance: by policy, and in numerical order
visited = {}  # nodes per token
for s in (0.5, 1.0):
    numbered[s] = mean_imbalance([zipf(s)], IN_ORDER_V3, 32)
    for policy in V3_POLICY:
        placements = [place_v3(zipf(s), 256 + extra, policy, 4)[0] for extra in MORE]
        curves[s, policy] = [mean_imbalance([zipf(s)], x_la, 32) for x_la in placements]
earlier_load_le = tokens_per_expert(gate_tokens(6), 256)[None]
for nodes, num_slots in ((4, 288), (8, 320)):
    for policy in V3_POLICY:
        placement = place_v3(earlier_load_le, num_slots, policy, nodes)
        visited[nodes, policy] = nodes_visited(gate_tokens(7), placement, nodes)
fig, axes = figure(1, 2, 9, 3.4, width_ratios=(3, 2))
for (s, policy), values in curves.items():
    axes[0].plot(MORE, values, "o-" if policy == "global" else "s--", ms=4,
                 color=BLUE if s == 0.5 else ORANGE, label=f"s = {s}, {policy}")  # fmt: skip
axes[0].axvline(32, color=GRAY, lw=1)
axes[0].annotate("V3", (32, 2.6), xytext=(4, 0), textcoords="offset points", color=GRAY)
axes[0].set(title="Balance, Zipf loads, 32 GPUs", xlabel="redundant experts", xticks=MORE,
            ylabel="slowest GPU / mean")  # fmt: skip
axes[0].legend(loc="upper right")
for shift, policy, color in ((-0.2, "hierarchical", GREEN), (0.2, "global", GRAY)):
    bars = axes[1].bar(torch.arange(2) + shift, [visited[n, policy] for n in (4, 8)], 0.38, color=color,
                       label=policy)  # fmt: skip
    axes[1].bar_label(bars, fmt="%.2f")
axes[1].set_xticks(range(2), ["4 nodes", "8 nodes"])
axes[1].set(title="Traffic: nodes per token", ylim=(0, 7.4))
axes[1].legend(loc="upper left")
show(fig)
print("in numerical order:", {s: f"{x:.2f}" for s, x in numbered.items()})
for (s, policy), values in curves.items():
    print(f"s = {s} {policy:12}", [f"{x:.3f}" for x in values])
assert visited[8, "hierarchical"] <= 4 < visited[8, "global"]

# %% [markdown]
# The first 32 copies, one per GPU, give nearly all of the gain. Under $s = 1$ a layer takes 5.8 times as long as with even loads if experts are in numerical order.
# Rearranging alone hardly helps (5.4), since a single expert exceeds the mean load of a GPU. With 32 copies the hierarchical policy reaches 1.38
# and the global one 1.004. Further copies cannot close the gap: the node with the busiest group keeps it. In
# return, a token is sent to 3.1 of four nodes instead of 3.6, and of eight nodes never to more than four, where the global
# policy sends it to 5.4.
#
# ## Experiment: drift
# A day has 144 windows of ten minutes: speeches at midnight, source code at noon and a mixture in between, made of the recorded
# loads. A placement (16 + 8 slots, global) is recomputed every few windows from the loads of those windows and used
# for the next ones. The cost is weight transfers: a GPU must fetch every expert that it did not hold before.


# %%
DAY = 144
noon = (1 - torch.cos(2 * torch.pi * torch.arange(DAY) / DAY)) / 2
DAY_LOADS = [
    (1 - p) * LOADS["sotu"][t % 24] + p * LOADS["stdlib"][t % 24] for t, p in enumerate(noon)
]


def count_fetched(old_la, new_la, gpus: int) -> int:
    """Count the experts per GPU that are in the new placement and not in the old one."""
    old, new = (x_la.view(-1, x_la.shape[1] // gpus).tolist() for x_la in (old_la, new_la))
    return sum(len({*after} - {*before}) for before, after in zip(old, new))


def simulate_day(every: int):
    """Return max / mean load of every window, and the experts fetched; every = 0: never updated."""
    recent = ExpertLoadWindow(every or 1)
    expert_la = place(DAY_LOADS[0], 8, "global")
    imbalance, fetched = [], 0
    for t, load_le in enumerate(DAY_LOADS):
        if every and t and t % every == 0:
            new_la = place(recent.total(), 8, "global")
            fetched += count_fetched(expert_la, new_la, GPUS)
            expert_la = new_la
        imbalance.append(mean_imbalance([load_le], expert_la))
        recent.add(load_le)
    return torch.tensor(imbalance), fetched


PERIODS = [1, 2, 3, 6, 12, 24, 48, 72]
days = {every: simulate_day(every) for every in [0, *PERIODS]}
none = torch.tensor([mean_imbalance([load_le], IN_ORDER) for load_le in DAY_LOADS])
fig, axes = figure(1, 2, 9, 3.4, width_ratios=(3, 2))
hours = torch.arange(DAY) / 6
axes[0].plot(hours, none, color=GRAY, ls=":", label="no copies")
axes[0].plot(hours, days[0][0], color=ORANGE, ls="--", label="placed at midnight")
axes[0].plot(hours, days[24][0], color=GREEN, lw=1.2, label="every 4 hours")
axes[0].plot(hours, days[1][0], color=BLUE, lw=1.2, label="every 10 minutes")
axes[0].set(
    title="A day of drifting text",
    xlabel="hour",
    ylabel="slowest GPU / mean",
    ylim=(1, 2.8),
    xticks=range(0, 25, 6),
)
axes[0].legend(loc="upper right", fontsize=8.5, ncols=2)
minutes = [10 * x for x in PERIODS]
axes[1].plot(minutes, [days[x][0].mean() for x in PERIODS], "o-", color=BLUE)
axes[1].axhline(days[0][0].mean(), color=ORANGE, ls="--", lw=1)
axes[1].annotate("once", (300, days[0][0].mean()), xytext=(0, -12), textcoords="offset points")
axes[1].set(xscale="log", title="Balance and transfers by update interval", xlabel="minutes between placements",
            ylabel="slowest / mean, whole day")  # fmt: skip
axes[1].set_xticks([10, 30, 60, 240, 720], ["10", "30", "60", "240", "720"])
axes[1].minorticks_off()
axes[1].tick_params(axis="y", colors=BLUE)
right = axes[1].twinx()
right.plot(minutes, [days[x][1] for x in PERIODS], "s--", ms=4, color=GRAY)
right.set(ylim=(0, None))
right.set_ylabel("experts fetched per day (squares)", color=GRAY)
right.spines["right"].set_visible(True)
show(fig)
print(f"no copies {none.mean():.2f}, placed once {days[0][0].mean():.2f}")
for every in PERIODS:
    print(
        f"every {10 * every:3} minutes: {days[every][0].mean():.3f}, {days[every][1]:5} experts fetched"
    )

# %% [markdown]
# A placement computed at midnight is out of date by noon (1.36 over the day; 1.61 without copies). Updated every half hour, the
# imbalance is 1.11. Every ten minutes is not better, because a window has only 4,096 tokens here and the placement also follows its noise. (A real unit
# processes millions in ten minutes.) Each update fetches **seven in ten** experts, even every ten minutes, when loads hardly change: the
# algorithm starts from scratch each time. Exercise 3 improves that.
#
# ## Play
# 256 experts are placed on GPUs in nodes of eight. Choose how unequal the loads are (Zipf's exponent), the number of additional slots per GPU,
# the number of GPUs, and the policy.


# %%
def draw_placement(skew: float = 1.0, extra: int = 1, gpus: int = 32, policy: str = "hierarchical"):
    """Draw a layer's load per GPU, before and after placement, and copies of the busiest experts."""
    load_le = zipf(skew, 1)
    placed = place_v3(load_le, 256 + extra * gpus, policy, gpus // 8)
    loads = [gpu_load(load_le, x, gpus)[0] for x in (torch.arange(256)[None], placed[0])]
    fig, axes = figure(1, 2, 9.5, 3.3, width_ratios=(2, 1))
    for load_j, color, name, width in zip(
        loads, (GRAY, BLUE), ("in numerical order", "placed"), (0.9, 0.5)
    ):
        ratio = load_imbalance(load_j[None]).item()
        axes[0].bar(
            range(gpus), load_j / load_j.mean(), width, color=color, label=f"{name}: {ratio:.2f}"
        )
    axes[0].axhline(1, color=ORANGE, ls="--")
    axes[0].set(
        title=f"{256 // gpus} + {extra} experts per GPU, {policy}",
        xlabel="GPU",
        ylabel="load / mean",
    )
    axes[0].legend(title="slowest / mean", fontsize=9)
    top = load_le[0].argsort(descending=True)[:24]
    axes[1].bar(
        range(24), placed[2][0, top], color=[[*COLORS, "black"][e // 32] for e in top.tolist()]
    )
    axes[1].set(
        title="Copies, busiest experts first",
        xlabel="expert (color: group)",
        ylabel="copies",
        xticks=[],
    )
    show(fig)


draw_placement()
play(
    draw_placement, skew=(0.0, 1.6, 0.1), extra=(0, 8, 1), gpus=[32, 8, 16, 64], policy=[*V3_POLICY]
)

# %% [markdown]
# ## Exercises
# Fill in a function and run its cell; the checkers come first.
#
# **1 · Compute.** In a decode unit the shared expert is one that every token chooses, in addition to $k$ of $e$ routed ones with
# equal loads. How many copies does it need at least, so that none of them is busier than a routed expert?


# %%
@checker
def check_copies(fn):
    """How many of n tokens go to one routed expert, and how many to the shared one? Round up."""
    assert (fn(256, 8), fn(16, 4), fn(64, 6), fn(160, 6)) == (32, 4, 11, 27)


@checker
def check_greedy(fn):
    """Heaviest first separates the two heaviest. When should they be in the same pack?"""
    weight_x = torch.as_tensor(fn()).float()
    assert weight_x.shape == (6,) and (weight_x >= 0).all() and weight_x.sum() > 0
    ours = heaviest_pack(weight_x[None], balanced_packing(weight_x[None], 2)[0], 2).item()
    triples = [weight_x[list(x)].sum() for x in combinations(range(6), 3)]
    assert ours > 1.1 * min(max(x, weight_x.sum() - x) for x in triples)


@checker
def check_reorder(fn):
    """Each GPU keeps the experts of the new placement; which of them can stay in their slots?"""
    g = torch.Generator().manual_seed(0)
    for gpus, per in ((1, 4), (4, 3), (8, 2), (5, 5)):
        for _ in range(20):
            old, new = torch.randint(0, 8, (2, gpus * per), generator=g)
            reordered = torch.as_tensor(fn(old.clone(), new.clone(), gpus))
            by_gpu = list(zip(*(t.view(gpus, per).tolist() for t in (old, new, reordered))))
            assert all(sorted(r) == sorted(n) for _, n, r in by_gpu)
            num_unmoved = sum((Counter(o) & Counter(n)).total() for o, n, _ in by_gpu)
            assert (reordered == old).sum() == num_unmoved


# %%
def my_copies(e: int, k: int) -> int:
    return ...


check_copies(my_copies)

# %% [markdown]
# <details><summary>Answer</summary>
#
# Of $n$ tokens a routed expert gets $nk/e$ and the shared one $n$, so $\lceil e/k \rceil$ copies are needed. For V3 that is 32: half of the 64
# additional GPUs would suffice for the shared expert, which leaves as many for redundant experts as in prefill. (The
# report does not say how they are divided.)
#
# ```python
# def my_copies(e, k):
#     return (e + k - 1) // k
# ```
# </details>
#
# **2 · Break.** Find six weights for which the heavier of the two packs of `balanced_packing` is more than a tenth above the optimum.


# %%
def my_greedy() -> list[float]:
    return ...


check_greedy(my_greedy)

# %% [markdown]
# <details><summary>Answer</summary>
#
# 3 + 2 + 2 = 7 against 3 + 2 + 0, where 3 + 3 + 0 = 2 + 2 + 2 = 6. With nine slots per GPU the last, small
# ones fill such gaps.
#
# ```python
# def my_greedy():
#     return [3, 3, 2, 2, 2, 0]
# ```
# </details>
#
# **3 · Extend.** `rebalance_experts` ignores the previous placement. Reorder a new placement of one layer (`new_a`, the expert in
# each slot) inside each GPU, so that every expert that the GPU already holds (`old_a`) keeps its slot. Return the reordered placement.


# %%
def my_reorder(old_a, new_a, gpus: int):
    return ...


check_reorder(my_reorder)

# %% [markdown]
# <details><summary>Answer</summary>
#
# Experts that stay on their GPU keep their slots; the others fill the gaps. The balance is unchanged, and `set_expert_placement`
# refills fewer slots. The GPUs of a node could be renumbered too.
#
# ```python
# def my_reorder(old_a, new_a, gpus):
#     slots = []
#     for old, new in zip(old_a.view(gpus, -1).tolist(), new_a.view(gpus, -1).tolist()):
#         unplaced, unmoved = Counter(new), []
#         for e in old:
#             unmoved.append(e if unplaced[e] else None)
#             unplaced[e] -= unplaced[e] > 0
#         moved = unplaced.elements()
#         slots += [next(moved) if e is None else e for e in unmoved]
#     return torch.tensor(slots)
# ```
# </details>

# %% [markdown]
# ## Scale-up
# - **Memory** is the cost. An expert takes 44 MB in FP8, and each of 58 layers needs its own copies: one more slot per GPU is 2.6 GB.
# - **The network** is hardly loaded. Refilling *every* slot of a prefill GPU over InfiniBand takes half a second, once in
#   ten minutes. It must not happen during a forward pass: new weights are written beside the old ones, or one layer at a time
#   between two steps.
# - **Prefill is bound by arithmetic**, so time follows the rows per GPU, as counted here. **For decode** the report states that an
#   expert usually processes no more than 256 tokens (§3.4.2), and that reading its weights takes longer than computing with them. With one
#   expert per GPU the differences are then smaller than the loads', but they remain: in [chapter 20](20_inference_scale.ipynb) an
#   expert with 252 rows takes 33 µs, one with twice as many 59 µs.
# - **16 experts per GPU, 9 of them active**: on 32 GPUs that is two copies of every expert, 41 GB per GPU. The loads of each layer then decide which
#   copy is active, and no window can be out of date.
#
# The all-to-all of chapter 11 needs no change: it takes physical ids. *Not* implemented here is a serving engine
# that moves weights between GPUs; `set_expert_placement` does it within one process.

# %%
expert = 3 * V3.dim * V3.moe_inter_dim  # bytes in FP8
layers = V3.n_layers - V3.n_dense_layers
for slots in (8, 9, 16):
    size = slots * layers * expert
    print(
        f"{slots:2} slots per GPU: {size / 1e9:5.1f} GB, refilled in {size / 50e9:.2f} s at 50 GB/s"
    )
loads_e = torch.tensor([[8 / 256] * 256 + [1.0]])  # decode unit; the shared expert is the 257th
expert_la, _, count_le = rebalance_experts(loads_e, 320, 1, 40, 320)
print(f"decode, even loads: {count_le[0, -1]} copies of the shared expert, "
      f"slowest / mean {load_imbalance(gpu_load(loads_e, expert_la, 320)).item():.2f}")  # fmt: skip
assert count_le[0, -1] == 32
