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
# # 07 · Pre-training: from text to a model

# %%
#| export
import math
import random
from typing import NamedTuple

import torch

from dsv3_ref.model import Transformer, moe_layers
from dsv3_ref.moe import Route, balance_loss, expert_load, update_bias
from dsv3_ref.mtp import mtp_features, mtp_losses
from dsv3_ref.ops import linear_cross_entropy


# %% [markdown]
# ## Fill in the middle


# %%
#| export
def fim(text: str, rng: random.Random, rate: float) -> tuple[str, str, str] | None:
    """With probability `rate` cut a document twice at random: (prefix, middle, suffix), §4.1."""
    if rng.random() >= rate or len(text) < 3:
        return None
    a, b = sorted(rng.sample(range(1, len(text)), 2))
    return text[:a], text[a:b], text[b:]


# %% [markdown]
# ## Tokens that end in a line break


# %%
#| export
def split_newlines(
    tokens: list[int], splits: dict[int, list[int]], rng: random.Random, rate: float
):
    """With probability `rate`, spell a punctuation-and-newline token as its two parts (§4.1)."""
    out: list[int] = []
    for token in tokens:
        out += splits[token] if token in splits and rng.random() < rate else [token]
    return out


# %% [markdown]
# ## Packing


# %%
#| export
def pack(rest: list[int], tokens: list[int], length: int) -> tuple[list[list[int]], list[int]]:
    """Lay a document after what is left over and cut rows of `length`; nothing is padded (§4.1)."""
    line = rest + tokens
    end = len(line) - len(line) % length
    return [line[i : i + length] for i in range(0, end, length)], line[end:]


# %% [markdown]
# ## The loss


# %%
#| export
class Losses(NamedTuple):
    """Parts of the training loss of one micro-batch, and the routes they came from."""

    main: torch.Tensor  # nats a token
    mtp: list[torch.Tensor]  # nats a token, one a depth
    balance: torch.Tensor  # Σ over MoE layers, without α
    routes: list[Route]

    def total(self, mtp_weight: float, alpha: float):
        """main + λ/D·Σ MTP + α·balance (eq. 17, 25)."""
        mtp = mtp_weight / max(1, len(self.mtp)) * sum(self.mtp)
        return self.main + mtp + alpha * self.balance


def losses(model: Transformer, tokens_bs) -> Losses:
    """All losses of rows of T + 1 tokens."""
    x_bs, y_bs = tokens_bs[:, :-1], tokens_bs[:, 1:]
    h_bsd, routes = model.features(x_bs)
    main = linear_cross_entropy(h_bsd.flatten(0, 1), model.head.weight, y_bs.flatten())
    ahead = mtp_features(model, h_bsd, x_bs)
    routes = routes + [r for _, r in ahead]
    balance = sum(balance_loss(r) for r in routes)
    return Losses(main / y_bs.numel(), mtp_losses(model, ahead, x_bs, y_bs), balance, routes)


# %%
#| export
def expert_loads(routes: list[Route]):
    """Tokens each expert of each MoE layer received, (l, e)."""
    return torch.stack([expert_load(r.expert_bsk, r.affinity_bse.shape[-1]) for r in routes])


def balance(model: Transformer, load_le, gamma: float) -> None:
    """Move every gate's bias by the load of the whole global batch."""
    for moe, load_e in zip(moe_layers(model).values(), load_le):
        if moe.gate.bias is not None:
            update_bias(moe.gate.bias, load_e, gamma)


# %% [markdown]
# ## The schedule

# %%
#| export optim
import math
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Recipe:
    """How V3 was trained (§4.2); every `_at` is a fraction of the run's tokens."""

    steps: int = 242_768  # 14.8T tokens (computed)
    seq_len: int = 4096  # T
    lr: float = 2.2e-4
    lr_end: float = 2.2e-5
    lr_last: float = 7.3e-6
    warmup_steps: int = 2000
    decay_at: float = 10 / 14.8
    end_at: float = 14.3 / 14.8
    last_at: float = 14.633 / 14.8
    batch_start: int = 3072  # sequences
    batch: int = 15_360
    ramp: float = 0.469 / 14.8
    gamma: float = 1e-3  # bias update speed, 0 after `end_at`
    mtp_weight: float = 0.3  # λ until `decay_at`, then:
    mtp_weight_end: float = 0.1
    alpha: float = 1e-4
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0


# %%
#| export optim
RECIPES = {
    "v3": Recipe(),
    "tiny": replace(
        Recipe(), steps=680, seq_len=256, batch_start=2, batch=8, warmup_steps=20,
        lr=4e-3, lr_end=4e-4, lr_last=1.3e-4, gamma=1e-2,
    ),
    "small": replace(
        Recipe(), steps=20_000, seq_len=2048, batch_start=32, batch=128, warmup_steps=400,
        lr=6e-4, lr_end=6e-5, lr_last=2e-5,
    ),
    "v2_lite": replace(
        Recipe(), steps=100_000, batch_start=512, batch=2304, lr=4.2e-4, lr_end=4.2e-5,
        lr_last=1.4e-5, mtp_weight=0.0, mtp_weight_end=0.0, alpha=1e-3, gamma=0.0,
    ),
}  # fmt: skip


def lr_at(r: Recipe, step: int, done: float) -> float:
    """Warm up over steps; then by fraction of tokens `done`: constant, cosine, constant, lower."""
    if step < r.warmup_steps:
        return r.lr * (step + 1) / r.warmup_steps
    if done >= r.last_at:
        return r.lr_last
    through = min(max((done - r.decay_at) / (r.end_at - r.decay_at), 0.0), 1.0)
    return r.lr_end + (r.lr - r.lr_end) * (1 + math.cos(math.pi * through)) / 2


def gamma_at(r: Recipe, done: float) -> float:
    """Speed of the gate biases: γ until 14.3T of 14.8T tokens, then 0."""
    return r.gamma if done < r.end_at else 0.0


def mtp_weight_at(r: Recipe, done: float) -> float:
    """λ of eq. 25: 0.3 until 10T of 14.8T tokens, then 0.1."""
    return r.mtp_weight if done < r.decay_at else r.mtp_weight_end


def batch_plan(r: Recipe, steps: int) -> list[int]:
    """Sequences in each of `steps` steps: linear in tokens over the first `ramp`, then constant."""
    grow = r.batch - r.batch_start
    ramp_steps = r.ramp * (math.log(r.batch / r.batch_start) / grow if grow else 1 / r.batch)
    total = steps / (ramp_steps + (1 - r.ramp) / r.batch)
    plan, seen = [], 0
    for _ in range(steps):
        plan.append(round(r.batch_start + grow * min(1.0, seen / (r.ramp * total))))
        seen += plan[-1]
    return plan


# %% [markdown]
# ## AdamW


# %%
#| export optim
def adamw(model: torch.nn.Module, r: Recipe) -> torch.optim.AdamW:
    """AdamW with decay on matrices only: norms keep their scale."""
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": r.weight_decay},
        {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, r.lr, betas=(r.beta1, r.beta2), fused=True)


# %% [markdown]
# ## One step


# %%
#| export
class StepStats(NamedTuple):
    """What one optimizer step reports."""

    loss: float  # main cross-entropy, nats a token
    mtp: list[float]
    total: float
    grad_norm: float
    load_le: torch.Tensor  # tokens each expert received, (MoE layers, experts)


def train_step(model, optimizer, micro_batches, r, lr: float, gamma: float, mtp_weight: float):
    """One step over micro-batches (rows of T + 1 tokens): gradients, clip, AdamW, then biases."""
    sums, rows = None, sum(len(x) for x in micro_batches)
    load_le = 0
    for tokens_bs in micro_batches:
        share = len(tokens_bs) / rows
        parts = losses(model, tokens_bs)
        total = parts.total(mtp_weight, r.alpha) * share
        total.backward()
        values = torch.stack([parts.main * share, total, *(x * share for x in parts.mtp)]).detach()
        sums = values if sums is None else sums + values
        load_le = load_le + expert_loads(parts.routes)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), r.clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    main, total, *mtp = sums.tolist()
    if math.isfinite(total) and torch.isfinite(grad_norm):
        optimizer.step()
        balance(model, load_le, gamma)
    optimizer.zero_grad(set_to_none=True)
    return StepStats(main, mtp, total, grad_norm.item(), load_le)
