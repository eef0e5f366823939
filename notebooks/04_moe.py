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
# # 04 · DeepSeekMoE: sixteen small experts instead of one large one

# %%
#| export
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import nn

from dsv3_ref.config import Config
from dsv3_ref.ops import MLP, impl, op, swiglu


# %% [markdown]
# ## The gate


# %%
#| export
class Route(NamedTuple):
    """What the gate decided for every token."""

    weight_bsk: torch.Tensor  # how much each chosen expert counts
    expert_bsk: torch.Tensor  # which experts, int64
    affinity_bse: torch.Tensor  # of all experts, without bias; carries the gradient


def limit_groups(score_bse, n_groups: int, n_limited: int, best: int):
    """−∞ outside the groups with the largest sum of their `best` highest scores (§2.1.2)."""
    score_bsgx = rearrange(score_bse, "b s (g x) -> b s g x", g=n_groups)
    group_bsg = score_bsgx.topk(best, dim=-1).values.sum(-1)
    chosen = group_bsg.topk(n_limited, dim=-1).indices
    shut_bsg = torch.ones_like(group_bsg, dtype=torch.bool).scatter(-1, chosen, False)
    return score_bsgx.masked_fill(shut_bsg[..., None], -torch.inf).flatten(-2)


def route(logit_bse, bias_e, c: Config) -> Route:
    """eq. 12–16: choose k experts by affinity + bias, weigh them by the affinity alone."""
    sigmoid = c.score_func == "sigmoid"
    affinity_bse = logit_bse.sigmoid() if sigmoid else logit_bse.softmax(-1)
    score_bse = affinity_bse if bias_e is None else affinity_bse + bias_e
    if c.n_expert_groups > 1:
        best = min(2 if sigmoid else 1, c.n_routed_experts // c.n_expert_groups)
        score_bse = limit_groups(score_bse, c.n_expert_groups, c.n_limited_groups, best)
    expert_bsk = score_bse.topk(c.n_activated_experts, dim=-1).indices
    weight_bsk = affinity_bse.gather(-1, expert_bsk)
    if sigmoid:
        weight_bsk = weight_bsk / (weight_bsk.sum(-1, keepdim=True) + 1e-20)
    return Route(weight_bsk * c.route_scale, expert_bsk, affinity_bse)


# %%
#| export
class Gate(nn.Module):
    """Affinity of every token to every expert, in fp32; only `update_bias` moves the bias."""

    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.weight = nn.Parameter(torch.empty(c.n_routed_experts, c.dim))
        bias = torch.zeros(c.n_routed_experts) if c.score_func == "sigmoid" else None
        self.register_buffer("bias", bias)

    def forward(self, x_bsd) -> Route:
        with torch.autocast(x_bsd.device.type, enabled=False):
            logit_bse = F.linear(x_bsd.float(), self.weight.float())
        return route(logit_bse, self.bias, self.config)


# %% [markdown]
# ## Balance without a loss


# %%
#| export
def expert_load(expert_bsk, n_experts: int):
    """Tokens each expert received, (e,), int64."""
    return expert_bsk.flatten().bincount(minlength=n_experts)


def max_vio(load_e) -> float:
    """How far the busiest expert is above the mean: max/mean − 1."""
    return (load_e.max() / load_e.float().mean() - 1).item()


@torch.no_grad()
def update_bias(bias_e, load_e, gamma: float) -> None:
    """Lift idle, lower busy experts: b += γ·sign(mean − load), load of the global batch, §2.1.2."""
    load_e = load_e.float()
    bias_e += gamma * (load_e.mean() - load_e).sign()


# %% [markdown]
# ## A small loss, per sequence


# %%
#| export
def balance_loss(r: Route):
    """eq. 17–20 without α: Σ_e f_e·P_e of each sequence, averaged over the batch; 1 when even."""
    (_, t, k), e = r.expert_bsk.shape, r.affinity_bse.shape[-1]
    chosen_bse = torch.zeros_like(r.affinity_bse).scatter(-1, r.expert_bsk, 1.0)
    f_be = chosen_bse.sum(1) * e / (k * t)
    p_be = (r.affinity_bse / r.affinity_bse.sum(-1, keepdim=True)).mean(1)
    return (f_be * p_be).sum(-1).mean()


# %% [markdown]
# ## Many experts, one product


# %%
#| export
@op
def grouped_linear(x_mi, weight_eoi, count_e):
    """Rows sorted by expert, each times its own matrix: y_m = W_e(m) x_m; count_e sums to m."""
    if torch.is_autocast_enabled(x_mi.device.type):
        dtype = torch.get_autocast_dtype(x_mi.device.type)
        x_mi, weight_eoi = x_mi.to(dtype), weight_eoi.to(dtype)
    end_e = count_e.cumsum(0).to(torch.int32)
    return F.grouped_mm(x_mi, weight_eoi.transpose(1, 2), offs=end_e)


@impl("grouped_linear", "naive")
def _(x_mi, weight_eoi, count_e):
    rows = x_mi.split(count_e.tolist())
    return torch.cat([F.linear(x, w) for x, w in zip(rows, weight_eoi)])


class Experts(nn.Module):
    """All routed experts of a layer; rows arrive sorted by expert, (m, d) → (m, d)."""

    def __init__(self, n_experts: int, dim: int, inter_dim: int):
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(n_experts, inter_dim, dim))
        self.w2 = nn.Parameter(torch.empty(n_experts, dim, inter_dim))
        self.w3 = nn.Parameter(torch.empty(n_experts, inter_dim, dim))

    def forward(self, x_md, count_e):
        gate, up = grouped_linear(x_md, self.w1, count_e), grouped_linear(x_md, self.w3, count_e)
        return grouped_linear(swiglu(gate, up), self.w2, count_e)


# %% [markdown]
# ## Out to the experts and back


# %%
#| export
class Permute(torch.autograd.Function):
    """Copy each token to its k rows, sorted by expert; the gradient sums the k rows again."""

    @staticmethod
    def forward(ctx, x_nd, order_m, k):
        ctx.k, ctx.n = k, x_nd.shape[0]
        ctx.save_for_backward(order_m)
        return x_nd[order_m // k]

    @staticmethod
    def backward(ctx, g_md):
        (order_m,) = ctx.saved_tensors
        return unsort(g_md, order_m).unflatten(0, (ctx.n, ctx.k)).sum(1), None, None


class Unpermute(torch.autograd.Function):
    """Put the rows back in token order; the gradient sorts them again."""

    @staticmethod
    def forward(ctx, y_md, order_m):
        ctx.save_for_backward(order_m)
        return unsort(y_md, order_m)

    @staticmethod
    def backward(ctx, g_md):
        (order_m,) = ctx.saved_tensors
        return g_md[order_m], None


def unsort(y_md, order_m):
    """Undo `y[order]`: row j of y goes to place order[j]."""
    return torch.empty_like(y_md).index_copy_(0, order_m, y_md)


# %%
#| export
class MoE(nn.Module):
    """Shared experts for all, k routed ones for each token: y = shared(x) + Σ_k w_k·expert_k(x)."""

    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.gate = Gate(c)
        self.experts = Experts(c.n_routed_experts, c.dim, c.moe_inter_dim)
        self.shared_experts = MLP(c.dim, c.n_shared_experts * c.moe_inter_dim)

    def exchange(self, x_md, count_e, experts):
        """Where rows travel to the ranks that hold their experts; on one device they are here."""
        return experts(x_md, count_e)

    def forward(self, x_bsd) -> tuple[torch.Tensor, Route]:
        r = self.gate(x_bsd)
        order_m = r.expert_bsk.flatten().argsort(stable=True)
        count_e = expert_load(r.expert_bsk, self.config.n_routed_experts)
        x_md = Permute.apply(x_bsd.flatten(0, 1), order_m, self.config.n_activated_experts)
        y_md = Unpermute.apply(self.exchange(x_md, count_e, self.experts), order_m)
        y_bskd = y_md.unflatten(0, r.expert_bsk.shape)
        y_bsd = einsum(y_bskd, r.weight_bsk.to(y_md.dtype), "b s k d, b s k -> b s d")
        return y_bsd + self.shared_experts(x_bsd), r
