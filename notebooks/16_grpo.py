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
# # 16 · GRPO: a group is its own critic

# %% [markdown]
# ## Why
# A pre-trained model has seen answers; nobody has told it which of *its own* answers are right. Reinforcement learning
# does: sample, score, make the better ones likelier. "Better than what?" is the whole difficulty. PPO trains a second
# network, as large as the policy, that predicts the score: for V3 another **671 billion** parameters. GRPO asks the
# same question $G$ times and takes the mean score of the group. The critic is gone, and half of the memory with it.
#
# How much does that mean buy? Here is the mean square of what multiplies the gradient, for a question that is solved nine times
# in ten, without and with it.

# %%
from dataclasses import replace

import torch

from dsv3_ref.config import TINY
from dsv3_ref.decode import generate
from dsv3_ref.viz import BLUE, COLORS, GREEN, GRAY, ORANGE, checker, figure, play, show

torch.manual_seed(0)
rewards = (torch.rand(4000, 16) < 0.9).float()
fig, ax = figure(1, 1, 8, 2.2)
for name, factor, color in (
    ("reward", rewards, GRAY),
    ("reward − mean of its group", rewards - rewards.mean(1, keepdim=True), GREEN),
):
    spread = factor.square().mean().item()
    ax.bar(name, spread, color=color, width=0.5)
    ax.text(name, spread + 0.02, f"{spread:.2f}", ha="center")
ax.set(
    ylabel="mean square",
    ylim=(0, 1.05),
    title="What multiplies ∇ log π: the baseline removes what all answers share",
)
show(fig)

# %% [markdown]
# ## Paper
# §5.2.2, and DeepSeekMath, where GRPO was born:
#
# - For a question $q$ sample $o_1 \dots o_G$ from the old policy; reward $r_i$; **advantage**
#   $A_i = (r_i - \mathrm{mean}(r)) / \mathrm{std}(r)$ (eq. 28).
# - Maximize $\frac1G\sum_i \min(\rho_i A_i,\ \mathrm{clip}(\rho_i, 1-\varepsilon, 1+\varepsilon) A_i) - \beta\,\mathbb D_{KL}$ with $\rho_i = \pi_\theta(o_i|q) / \pi_{old}(o_i|q)$ (eq. 26).
# - $\mathbb D_{KL} = \frac{\pi_{ref}}{\pi_\theta} - \log\frac{\pi_{ref}}{\pi_\theta} - 1$ (eq. 27) estimates the Kullback–Leibler divergence, the mean of $\log \pi_\theta/\pi_{ref}$ under $\pi_\theta$, from the model that RL began with.
# - $\varepsilon$, $\beta$ and $G$ are not published. Prompts: code, mathematics, writing, role-play, question answering.
#
# The report's eq. 26 has **one ratio for a whole answer**, DeepSeekMath's eq. 3 **one for each token**, averaged over the
# answer. Most released code uses the second. We write both, and the variants that came later.
#
# Axes: `b` answers, all groups one after another (`x` groups of `g`); `s` tokens of an answer, padded; `n` tokens; `d` model; `w` words.

# %%
#| export
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from dsv3_ref.config import UserError
from dsv3_ref.decode import Decoder, multinomial_sample
from dsv3_ref.model import Transformer
from dsv3_ref.ops import CE_CHUNK_TOKENS, upcast
from dsv3_ref.optim import TrainingRecipe

# %% [markdown]
# ## Advantage
# $$A_i = \frac{r_i - \mathrm{mean}(r_{1..G})}{\mathrm{std}(r_{1..G}) + \epsilon}\qquad (b) \to (b)$$
#
# Three details part the code bases. *Which std?* Unbiased ($G - 1$), as `torch.std`. *Which* $\epsilon$? $10^{-4}$ in
# TRL (Hugging Face's library for this), $10^{-6}$ elsewhere: it matters only where a group's rewards differ by hardly more than $\epsilon$, which a reward model's scores can and rewards of 0 and 1 never do. *Divide at all?* Dividing makes easy
# and hard questions, whose groups spread little, weigh as much as those answered right half of the time; "Dr. GRPO" (Liu et al., 2025) leaves it out.


# %%
#| export
def advantages(reward_b, num_generations: int, scale_rewards: str = "group", std_eps: float = 1e-4):
    """eq. 28: how much better each answer is than its group of `group` answers in succession, (b,).

    scale: divide by the std of the "group" or of the "batch", or by "none".
    """
    if num_generations < 2 or len(reward_b) % num_generations:
        raise UserError(f"{len(reward_b)} rewards are no groups of {num_generations} (at least 2)")
    reward_xg = reward_b.view(-1, num_generations)
    better_xg = reward_xg - reward_xg.mean(1, keepdim=True)
    stds = {"group": lambda: reward_xg.std(1, keepdim=True), "batch": reward_b.std}
    if scale_rewards != "none":
        better_xg = better_xg / (stds[scale_rewards]() + std_eps)
    return better_xg.flatten()


# %%
r = torch.tensor([0.0, 0, 0, 1, 1, 1, 1, 1, 0.2, 0.2, 0.2, 0.2])
a = advantages(r, 4)
for group, of in zip(r.view(-1, 4).tolist(), a.view(-1, 4).tolist()):
    print("rewards", [f"{x:.1f}" for x in group], "→ advantages", [f"{x:+.2f}" for x in of])
assert a.view(-1, 4).sum(1).abs().max() < 1e-5  # what one gains, others lose
assert torch.allclose(
    advantages(5 * r + 3, 4), a, atol=2e-3
)  # neither unit nor zero of rewards matters
assert (a[4:] == 0).all()  # a group that agrees teaches nothing

# %% [markdown]
# A group that agrees has no gradient: questions that are too easy or too hard cost samples and teach nothing. Hence
# curricula, and later "dynamic sampling".
#
# ## Log-probabilities
# Everything below needs $\log \pi(o_t)$ of the tokens of an answer, under three models. Logits of V3 for
# 16 answers of 4,096 tokens would be 34 GB; as in [chapter 01](01_ops.ipynb) only a few hundred rows exist at a
# time, and the backward pass makes them again. The entropy $-\sum_w p_w \log p_w$ falls out on the way: it tells
# whether the policy still explores.
#
# $$\ell_n = z_{n,y_n} - \log\sum_w e^{z_{nw}},\qquad z = h W^\top / \tau \qquad (n,d)\times(w,d) \to (n,w) \to (n)$$


# %%
#| export
def token_logprobs(h_nd, head_wd, y_n, temperature: float = 1.0):
    """log p of given tokens, and each place's entropy: both (n,), in nats; in chunks."""

    def some(h_nd, y_n):
        logp_nw = upcast(F.linear(h_nd, head_wd) / temperature).log_softmax(-1)
        return logp_nw.gather(1, y_n[:, None])[:, 0], -(logp_nw.exp() * logp_nw).sum(-1)

    parts = zip(h_nd.split(CE_CHUNK_TOKENS), y_n.split(CE_CHUNK_TOKENS))
    return tuple(map(torch.cat, zip(*(checkpoint(some, *p, use_reentrant=False) for p in parts))))


def completion_mask(tokens_bs, eos_id: int):
    """True up to and including each answer's first `end` token; what follows is padding."""
    ended_bs = (tokens_bs == eos_id).long().cumsum(1) - (tokens_bs == eos_id).long()
    return ended_bs == 0


# %%
h_nd, head_wd = torch.randn(700, 16, dtype=torch.double), torch.randn(50, 16, dtype=torch.double)
y_n = torch.randint(50, (700,))
leaf = h_nd.clone().requires_grad_()
logp_n, entropy_n = token_logprobs(leaf, head_wd, y_n, 0.7)
p_nw = (h_nd @ head_wd.T / 0.7).softmax(-1)
assert torch.allclose(logp_n, p_nw[range(700), y_n].log())
assert torch.allclose(entropy_n, torch.distributions.Categorical(p_nw).entropy())
logp_n.sum().backward()
by_hand = (torch.nn.functional.one_hot(y_n, 50) - p_nw) @ head_wd / 0.7
assert torch.allclose(leaf.grad, by_hand)
print(completion_mask(torch.tensor([[5, 6, 1, 9], [1, 1, 7, 7], [4, 4, 4, 4]]), eos_id=1).int())

# %% [markdown]
# ## Rollouts
# Sampling is most of the cost, so it deserves its own loop. The prompt is read **once** and its cache (the latents of
# [chapter 03](03_mla.ipynb), not keys and values) is then repeated for the $G$ answers; a row that has ended leaves the batch, so that
# late steps are cheap. The $\log \pi$ of each token drawn is noted on the way: the trainer will compute it again, and the two must agree.


# %%
#| export
@torch.inference_mode()
def generate_rollouts(
    model: Transformer, prompts: list[list[int]], num_generations: int, max_new_tokens: int, eos_id: int,
    temperature: float = 1.0, generator: torch.Generator | None = None,
) -> tuple[list[list[int]], list[list[float]]]:  # fmt: skip
    """`group` answers to each prompt in succession, up to and with `end`, and log π of each token.

    At temperature 0 the likeliest tokens, whose log π is that of temperature 1.
    """
    decoder = Decoder(model, len(prompts), max(map(len, prompts)) + max_new_tokens)
    for row_t, prompt in zip(decoder.token_bt, prompts):
        row_t[: len(prompt)] = torch.tensor(prompt)
    lengths = [len(p) for p in prompts]
    h_bsd = decoder.hidden_states([0] * len(lengths), max(lengths))
    logit_bw = decoder.logits(
        h_bsd[range(len(lengths)), [x - 1 for x in lengths]]
    ).repeat_interleave(num_generations, 0)
    lengths, active = (
        [x for x in lengths for _ in range(num_generations)],
        list(range(num_generations * len(lengths))),
    )
    reorder_cache(
        decoder,
        torch.arange(len(prompts), device=decoder.token_bt.device).repeat_interleave(
            num_generations
        ),
    )
    completions, logprobs = [[] for _ in lengths], [[] for _ in lengths]
    for left in reversed(range(max_new_tokens)):
        logp_bw = (logit_bw / (temperature or 1.0)).log_softmax(-1)
        y_b = multinomial_sample(logp_bw.exp(), generator) if temperature else logp_bw.argmax(-1)
        next_tokens = y_b.tolist()
        for row, token, p in zip(
            active, next_tokens, logp_bw.gather(1, y_b[:, None])[:, 0].tolist()
        ):
            completions[row].append(token)
            logprobs[row].append(p)
        unfinished = [i for i, token in enumerate(next_tokens) if token != eos_id]
        if not (unfinished and left):
            break
        decoder.token_bt[range(len(lengths)), lengths] = y_b
        active, lengths = [active[i] for i in unfinished], [lengths[i] for i in unfinished]
        reorder_cache(decoder, torch.tensor(unfinished, device=y_b.device))
        logit_bw = decoder.logits(decoder.hidden_states(lengths, 1))[:, 0]
        lengths = [x + 1 for x in lengths]
    return completions, logprobs


def reorder_cache(decoder: Decoder, row_b) -> None:
    """Keep these rows of a decoder's caches, some perhaps several times."""
    for layer in decoder.layers[: decoder.n_main]:
        layer.kv_btx = layer.kv_btx[row_b]
    decoder.token_bt, decoder.h_btd = decoder.token_bt[row_b], decoder.h_btd[row_b]


# %%
model = Transformer(replace(TINY, n_layers=2, vocab_size=64))
prompts, END = [[1, 2, 3], [4, 5, 6, 7, 8], [9]], 63
said, logp = generate_rollouts(
    model, prompts, 8, 30, END, generator=torch.Generator().manual_seed(0)
)
for i, (answer, logp_s) in enumerate(zip(said, logp)):
    prompt = prompts[i // 8]
    h_sd = model.hidden_states(torch.tensor([prompt + answer[:-1]]))[0][0, len(prompt) - 1 :]
    again_s, _ = token_logprobs(h_sd, model.head.weight, torch.tensor(answer))
    torch.testing.assert_close(again_s, torch.tensor(logp_s), atol=1e-4, rtol=0)
    assert END not in answer[:-1] and (answer[-1] == END or len(answer) == 30)
print("lengths of 24 answers:", [len(answer) for answer in said])
greedy = generate_rollouts(model, prompts, 1, 10, END, temperature=0)[0]
assert greedy[1] == generate(model, torch.tensor([prompts[1]]), 10)[0, 5:].tolist()

# %% [markdown]
# ## How far from where we began?
# The exact KL sums over all answers there are. From samples of $\pi_\theta$ three estimates are usual, with
# $\Delta = \log\pi_{ref} - \log\pi_\theta$:
#
# $$k_1 = -\Delta,\qquad k_2 = \tfrac12\Delta^2,\qquad k_3 = e^{\Delta} - \Delta - 1 \ge 0$$
#
# $k_1$ has the right mean but is negative half of the time; $k_2$ is never negative but biased; $k_3$ is
# $k_1$ plus $e^\Delta - 1$, whose mean is 0: right mean, never negative, and it spreads little while the models are close.


# %%
#| export
def kl_k3(logp, ref_logp):
    """eq. 27: KL(π ‖ π_ref) from samples of π: e^Δ − Δ − 1, Δ = log π_ref − log π, elementwise."""
    delta = ref_logp - logp
    return delta.exp() - delta - 1


# %%
fig, axes = figure(1, 2, 8.6, 2.5)
for ax, far in zip(axes, (0.1, 1.0)):
    logits, shift = torch.randn(2, 40, dtype=torch.double)
    policy = torch.distributions.Categorical(logits=logits)
    ref = torch.distributions.Categorical(logits=logits + far * shift)
    true = torch.distributions.kl_divergence(policy, ref).item()
    x = policy.sample((100_000,))
    d = ref.log_prob(x) - policy.log_prob(x)
    estimates = {"k1": -d, "k2": d.square() / 2, "k3": kl_k3(policy.log_prob(x), ref.log_prob(x))}
    for i, k in enumerate(estimates.values()):
        ax.errorbar(i, k.mean() / true, k.std() / true, fmt="o", color=COLORS[i], capsize=4)
    ax.axhline(1, color=GRAY, lw=1)
    ax.set(xticks=range(3), xticklabels=estimates, title=f"KL = {true:.3f}", xlim=(-0.5, 2.5))
    assert estimates["k3"].min() >= 0 and abs(estimates["k3"].mean() / true - 1) < 0.03
    assert estimates["k3"].std() < estimates["k1"].std()
axes[0].set_ylabel("estimate / KL, ± std")
show(fig)

# %% [markdown]
# ## The objective
# With the ratio $\rho = \pi_\theta/\pi_{old}$, the gain of a token (or of an answer) is
#
# $$g = \min\big(\rho A,\ \mathrm{clip}(\rho,\,1-\varepsilon,\,1+\varepsilon')\,A\big)$$
#
# with $\varepsilon$ below and $\varepsilon'$ above (the report: the same). At $\rho = 1$ its gradient is $A\,\nabla\log\pi$, the plain policy gradient. Once a good answer has become
# $1 + \varepsilon'$ times as likely, or a bad one $1 - \varepsilon$ times, there is nothing more to gain *from these samples*.
# In the other direction the clip does nothing: a mistake may always be undone. The loss averages $\beta\,k_3 - g$, and here
# the variants differ (lengths $|o_i|$; names as in TRL, after the papers DAPO and Dr. GRPO, both 2025):
#
# | kind | average | why |
# |---|---|---|
# | `sequence` | $\frac1b\sum_i$, one ratio an answer | the report's eq. 26 |
# | `grpo` | $\frac1b\sum_i\frac1{\lvert o_i\rvert}\sum_t$ | DeepSeekMath's eq. 3 |
# | `bnpo` | $\sum_{it} / \sum_i \lvert o_i\rvert$ | all tokens of the micro-batch alike |
# | `dapo` | the same over the *global* batch | long wrong answers pay for every token |
# | `dr_grpo` | $\sum_{it} / (b\cdot\text{longest allowed})$ | no reward for being short or long |


# %%
#| export
class GRPOOutput(NamedTuple):
    """The loss, and what its curves need: means over tokens (or answers), without gradient."""

    loss: torch.Tensor
    kl: torch.Tensor  # nats
    clip_ratio: torch.Tensor  # share that the clip silenced
    importance_ratio: torch.Tensor


def sequence_logprob(logp_bs, mask_bs):
    """log p of whole answers, (b, 1)."""
    return (logp_bs * mask_bs).sum(1, keepdim=True)


def aggregate_loss(x_bs, mask_bs, loss_type: str, normalizer: float | None):
    """One number from the masked x of all tokens; `size` as in `grpo_loss`."""
    if loss_type in ("grpo", "sequence"):
        return (x_bs.sum(1) / mask_bs.sum(1).clamp(min=1)).mean()
    total = {
        "bnpo": None,
        "dapo": normalizer,
        "dr_grpo": len(x_bs) * (normalizer or x_bs.shape[1]),
    }[loss_type]
    return x_bs.sum() / (total or mask_bs.sum().clamp(min=1))


def grpo_loss(
    logp_bs, old_logp_bs, ref_logp_bs, advantage_b, mask_bs, epsilon=0.2, beta: float = 0.0,
    loss_type: str = "grpo", normalizer: float | None = None,
) -> GRPOOutput:  # fmt: skip
    """eq. 26: −min(ρ·A, clip(ρ)·A) + β·k₃, averaged by `kind`: see the table of chapter 16.

    eps: one number, or (below, above). size: dapo's tokens in the global batch, dr_grpo's longest
    answer; by default those of this one. Without beta, ref_logp_bs may be None.
    """
    low, high = epsilon if isinstance(epsilon, tuple) else (epsilon, epsilon)
    masked = lambda x_bs: torch.where(mask_bs.bool(), x_bs, 0)  # padding may hold anything
    logp_bs, old_logp_bs, ref_logp_bs = (
        masked(x_bs) if x_bs is not None else None for x_bs in (logp_bs, old_logp_bs, ref_logp_bs)
    )
    mask_bs = mask_bs.to(logp_bs.dtype)
    if loss_type == "sequence":
        logp_bs, old_logp_bs = (
            sequence_logprob(logp_bs, mask_bs),
            sequence_logprob(old_logp_bs, mask_bs),
        )
        ref_logp_bs = None if ref_logp_bs is None else sequence_logprob(ref_logp_bs, mask_bs)
        mask_bs = torch.ones_like(logp_bs)
    ratio_bs, a_b1 = (logp_bs - old_logp_bs).exp(), advantage_b[:, None]
    gain_bs, clipped_bs = ratio_bs * a_b1, ratio_bs.clamp(1 - low, 1 + high) * a_b1
    kl_bs = kl_k3(logp_bs, ref_logp_bs) if beta else torch.zeros_like(logp_bs)
    loss = aggregate_loss(
        (beta * kl_bs - torch.minimum(gain_bs, clipped_bs)) * mask_bs,
        mask_bs,
        loss_type,
        normalizer,
    )
    mean = lambda x_bs: ((x_bs * mask_bs).sum() / mask_bs.sum().clamp(min=1)).detach()
    return GRPOOutput(loss, mean(kl_bs), mean((clipped_bs < gain_bs).float()), mean(ratio_bs))


RECIPES = {
    "v3": replace(  # the report publishes none of these
        TrainingRecipe(), steps=1000, lr=1e-6, min_lr=1e-6, warmup_steps=10, decay_start=0.0,
        decay_end=1.0, final_start=1.1, start_batch_size=32, global_batch_size=32,
        bias_update_rate=0.0, mtp_weight=0.0, mtp_weight_end=0.0, balance_loss_coeff=0.0,
        weight_decay=0.0,
    ),
}  # fmt: skip
RECIPES["tiny"] = replace(
    RECIPES["v3"], steps=60, seq_len=256, lr=3e-4, min_lr=3e-5, warmup_steps=5, start_batch_size=16,
    global_batch_size=16,
)  # fmt: skip


# %%
def slow(logp, old, ref, a, mask, eps, beta, kind, size):
    """The same, an answer and a token at a time, from the equations."""
    answers = []
    for i in range(len(a)):
        tokens = [t for t in range(logp.shape[1]) if mask[i, t]]
        ways = [[sum(x[i, t] for t in tokens) for x in (logp, old, ref)]] if kind == "sequence" else \
               [[x[i, t] for x in (logp, old, ref)] for t in tokens]  # fmt: skip
        terms = []
        for new, was, began in ways:
            rho, d = (new - was).exp(), began - new
            terms.append(
                beta * (d.exp() - d - 1) - min(rho * a[i], min(max(rho, 1 - eps), 1 + eps) * a[i])
            )
        answers.append(terms)
    n = sum(map(len, answers))
    if kind in ("grpo", "sequence"):
        return sum(sum(terms) / len(terms) for terms in answers) / len(a)
    return sum(map(sum, answers)) / {"bnpo": n, "dapo": size, "dr_grpo": len(a) * size}[kind]


def example(b=6, s=5):
    """Log-probabilities under three models, advantages, and answers of 1 to s tokens."""
    logp = -torch.rand(b, s, dtype=torch.double).mul(3)
    old, ref = (logp + 0.3 * torch.randn(b, s, dtype=torch.double) for _ in range(2))
    mask = torch.arange(s) < torch.randint(1, s + 1, (b, 1))
    return logp.requires_grad_(), old, ref, torch.randn(b, dtype=torch.double), mask


inputs = example()
for kind in ("grpo", "bnpo", "dapo", "dr_grpo", "sequence"):
    got, want = grpo_loss(*inputs, 0.2, 0.04, kind, 40), slow(*inputs, 0.2, 0.04, kind, 40)
    grads = [torch.autograd.grad(x, inputs[0])[0] for x in (got.loss, want)]
    assert torch.allclose(got.loss, want, atol=1e-12) and torch.allclose(*grads, atol=1e-12)
    print(f"{kind:9} loss {got.loss:+.4f}, KL {got.kl:.4f}, {got.clip_ratio:.0%} clipped")

# %% [markdown]
# The four forms by token share ratios, KL and clip and differ in the average alone; `sequence` has one ratio an answer, the product of its tokens'. The biases of the gates are left as they are in RL (`--bias-update-rate 0`):
# the loads of a few hundred problems say nothing about balance.
#
# What the clip does, as a picture: gain over ratio, for a good and a bad answer. Where a curve is flat there is no gradient.

# %%
fig, ax = figure(1, 1, 8, 2.6)
rho = torch.linspace(0.5, 1.6, 200, dtype=torch.double)
for a, color, name in ((1.0, GREEN, "A = +1"), (-1.0, ORANGE, "A = −1")):
    x = rho.log()[:, None].requires_grad_()
    total = (
        -grpo_loss(
            x, torch.zeros_like(x), None, torch.full((200,), a), torch.ones_like(x), (0.2, 0.3)
        ).loss
        * 200
    )
    slope = torch.autograd.grad(total, x)[0][:, 0]
    gain = torch.minimum(rho * a, rho.clamp(0.8, 1.3) * a)
    ax.plot(rho, gain, color=color, label=name)
    flat = rho > 1.3 if a > 0 else rho < 0.8
    assert torch.equal(slope == 0, flat)
ax.axvspan(0.8, 1.3, color=GRAY, alpha=0.12)
ax.set(
    xlabel="ρ = π/π_old",
    ylabel="gain",
    title="clip at 0.8 and 1.3: silent only where the change has gone far enough",
)
ax.legend()
show(fig)

# %% [markdown]
# ## Experiment: does the group matter?
# A policy small enough to see: for each of 24 questions it writes four letters of eight, independently, from a table of
# logits. Right is one word a question; a letter in its place earns a quarter. 300 steps, 4 questions × 8
# answers a step, five seeds, and two controls:
#
# - *no baseline*: the reward itself in the place of $A$;
# - *random reward*: a coin. If this improved, our measure would be broken.


# %%
QUESTIONS, LETTERS, PLACES = 24, 8, 4


def train(
    baseline="group", reward="true", beta=0.0, kind="grpo", group=8, lr=0.15, steps=300, seed=0
):
    """Share of right letters and KL per letter, step by step, of a table policy."""
    g = torch.Generator().manual_seed(seed)
    word_qs = torch.randint(LETTERS, (QUESTIONS, PLACES), generator=g)
    table_qsw = torch.zeros(QUESTIONS, PLACES, LETTERS, requires_grad=True)
    optimizer, right, far = torch.optim.Adam([table_qsw], lr), [], []
    for _ in range(steps):
        q_b = torch.randint(QUESTIONS, (4,), generator=g).repeat_interleave(group)
        logp_bsw = table_qsw[q_b].log_softmax(-1)
        y_bs = torch.multinomial(logp_bsw.detach().exp().flatten(0, 1), 1, generator=g).view(
            -1, PLACES
        )
        logp_bs = logp_bsw.gather(-1, y_bs[..., None])[..., 0]
        r_b = (y_bs == word_qs[q_b]).float().mean(1)
        if reward == "random":
            r_b = (torch.rand(len(r_b), generator=g) < 0.5).float()
        a_b = advantages(r_b, group) if baseline == "group" else r_b
        ref_bs = torch.full_like(logp_bs, -torch.tensor(float(LETTERS)).log())
        out = grpo_loss(
            logp_bs, logp_bs.detach(), ref_bs, a_b, torch.ones_like(logp_bs), 0.2, beta, kind
        )
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        p_qs = table_qsw.detach().softmax(-1).gather(-1, word_qs[..., None])
        right.append(p_qs.mean().item())
        far.append(kl_k3(logp_bs, ref_bs).mean().item())
    return torch.tensor(right), torch.tensor(far)


RUNS = {
    "GRPO": {},
    "no baseline": {"baseline": "none"},
    "random reward": {"reward": "random"},
    "GRPO, β = 0.3": {"beta": 0.3},
}
curves = {name: [train(**how, seed=seed) for seed in range(5)] for name, how in RUNS.items()}
fig, axes = figure(1, 2, 8.6, 3)
for (name, runs), color in zip(curves.items(), (GREEN, GRAY, ORANGE, BLUE)):
    for ax, of_all in zip(axes, zip(*runs)):
        mean = torch.stack(of_all).mean(0)
        ax.plot(mean, color=color, label=name)
axes[0].set(xlabel="step", ylabel="chance of the right letter", title="What is learned")
axes[1].set(xlabel="step", ylabel="k₃ a letter", title="How far from the start")
axes[0].legend(fontsize=8)
show(fig)
end = {
    name: torch.stack([right[-20:].mean() for right, _ in runs]) for name, runs in curves.items()
}
for name, x in end.items():
    print(f"{name:15} right letters at the end {x.mean():5.1%} ± {x.std():.1%}")
assert end["GRPO"].mean() > end["no baseline"].mean() + 0.02 and end["random reward"].mean() < 0.2
assert end["GRPO, β = 0.3"].mean() < end["GRPO"].mean()

# %% [markdown]
# Five seeds a curve. The group learns fastest; without it all answers are pushed up, the right ones only harder; a
# coin teaches nothing, yet walks nearly as far from the start: distance is no sign of learning. β holds the policy back, which is its purpose and its price.
#
# ## Experiment: a model that learns to think
# Now the real thing: `make align` on the 5M model of [chapter 07](07_pretrain.ipynb), fine-tuned as in [chapter 14](14_sft_distill.ipynb) so that it *can* work
# sums out but mostly blurts. Each step asks 16 questions 16 times: sums, counting, spelling, and open prompts (writing, role-play, questions). Those are
# scored by a reward model made as in [chapter 15](15_rewards.ipynb), from pairs of a president's sentence and a spoilt one; the reward is $\sigma(r)$, between 0 and 1. 200 sums are never practiced on. Three seeds of GRPO, one of each control.

# %%
from dsv3_ref.viz.ablation import load_result

FOUND = load_result("align")
runs = FOUND["runs"]
KINDS = {"GRPO": GREEN, "no-baseline": GRAY, "random-reward": ORANGE}
fig, axes = figure(1, 2, 9, 3)
for name, run in runs.items():
    kind = name.partition(",")[0]
    held = [(0, run["before"])] + [
        (c["step"], c["held_out"]) for c in run["curve"] if "held_out" in c
    ]
    first = name.endswith("seed 0")
    at, right = zip(*((step, h["sums"]["greedy"]) for step, h in held))
    axes[0].plot(at, right, "o-", color=KINDS[kind], ms=4, label=kind if first else None)
    print(f"{name:22} likeliest answer {right[0]:5.1%} → {right[-1]:5.1%}, drawn "
          f"{run['before']['sums']['sampled']:5.1%} → {run['after']['sums']['sampled']:5.1%}")  # fmt: skip
domains = {}
for c in runs["GRPO, seed 0"]["curve"]:
    for name, reward in c["reward_by"].items():
        domains.setdefault(name, []).append((c["step"], reward))
for (name, points), color in zip(sorted(domains.items()), COLORS):
    at, reward = (torch.tensor(x, dtype=torch.double) for x in zip(*points))
    kept = torch.stack([reward[max(0, i - 3) : i + 4].mean() for i in range(len(reward))])
    axes[1].plot(at, kept, color=color, label=name)
axes[0].set(xlabel="step", ylabel="right", ylim=(0, 1), title="200 held-out sums")
axes[1].set(xlabel="step", ylabel="mean reward", ylim=(-0.03, 1), title="Reward by domain, seed 0")
axes[0].legend(fontsize=7)
axes[1].legend(fontsize=7, loc="center", bbox_to_anchor=(0.65, 0.4))
show(fig)
ends = {n: r["after"]["sums"]["greedy"] for n, r in runs.items()}
starts = {n: r["before"]["sums"]["greedy"] for n, r in runs.items()}
of_grpo = [n for n in runs if n.startswith("GRPO")]
assert all(starts[n] < 0.4 and ends[n] > 0.8 for n in of_grpo)
assert all(ends[n] < starts[n] + 0.1 for n in runs if n.startswith("random"))

# %% [markdown]
# Within 15 steps the model discovers that thinking pays, and from then on it thinks. RL did not teach it to add: it chose between two abilities that it had. That is what the report
# describes for its expert models, which after hundreds of steps answer in R1's way "even in the absence of explicit system prompts".
#
# The coin teaches nothing (and wears down what was there), as it must. *No baseline* is a control that **fails to fail**: with rewards of 0 and 1 no wrong answer is ever pushed up, so little is lost (83.5 %, one seed; GRPO 87 to 93.5 %). The
# table's quarter rewards push half-right words up too, and there it costs more. And the clip? With one update from each batch $\rho = 1$ throughout, and it is idle; it matters with `--steps-per-generation` above 1.

# %%
fig, axes = figure(1, 4, 10, 2.3)
for ax, (key, title) in zip(
    axes, {"kl_k1": "KL, nats a token", "kl": "the same by k₃", "entropy": "entropy, nats", "length": "tokens an answer"}.items()
):  # fmt: skip
    for name in of_grpo:
        at, x = zip(*((c["step"], c[key]) for c in runs[name]["curve"] if key in c))
        ax.plot(at, x, color=GREEN, lw=1, alpha=0.8)
    ax.set_title(title, fontsize=10)
    ax.set_xlabel("step")
show(fig)
for s in runs["GRPO, seed 0"]["samples"][:7] + runs["GRPO, seed 0"]["samples"][9::3]:
    print(s["prompt"][-78:].strip())
    print(f"  before  {s['before'][:70]}\n  after   {s['text'][:70]}")

# %% [markdown]
# Two things to see. *$k_3$ has a heavy tail*: one token that has become a thousand times rarer, and is drawn all the same, counts a thousand. A run is therefore stopped by the plain
# mean of $\log \pi/\pi_{ref}$ (`--max-kl`), not by $k_3$. And *not every reward teaches*: spelling is never right, so its groups are silent and it stays at 0. "Always 1" is right for 82 % of the counting questions, which the model
# said before RL too; behind it the thought has come loose. The rewards of open answers hardly rise (0.057 → 0.066 if drawn), and the texts grow shorter, not better.
#
# ## Play: groups, as they were answered
# Eight answers of the fine-tuned model to one sum, drawn at temperature 1, and what GRPO makes of them. Watch how a right answer among wrong ones
# is what the step learns from. *After* RL most groups are silent.


# %%
def answered(question: int = 0, when: str = "before"):
    """A group's answers, their rewards, their advantages."""
    found = FOUND["groups"][when][question]
    r_b = torch.tensor([a["reward"] for a in found["answers"]])
    a_b = advantages(r_b, len(r_b))
    fig, ax = figure(1, 1, 9, 2.8)
    ax.barh(range(len(r_b)), a_b, color=[GREEN if x > 0 else ORANGE for x in a_b], height=0.7)
    ax.axvline(0, color="black", lw=0.8)
    for i, (answer, r, a) in enumerate(zip(found["answers"], r_b, a_b)):
        mark = "✓" if r > 0 else "✗"
        ax.text(-9.8, i, f"{mark} {answer['text'][:56]}", va="center", fontsize=8, parse_math=False)
        ax.text(3.0, i, f"{a:+.2f}", va="center", ha="right", fontsize=8)
    ax.set(yticks=[], xlim=(-10, 3.1), xticks=[-2, 0, 2], xlabel="advantage", ylim=(7.6, -0.6))
    ax.set_title(f"{found['question'].rpartition(':')[2].strip()}   {when} RL")
    show(fig)


answered()

# %%
play(answered, question=(0, 3, 1), when=["before", "after"])

# %% [markdown]
# ## Play: one group, by hand
# Eight answers, their rewards, what remains of them as advantages. Raise the number of right ones from 0 to 8:
# a single right answer among wrong ones shouts, one wrong among right ones is shouted at, unanimity is silent.


# %%
def one_group(right: int = 2, scale="group", partial: float = 0.0):
    """Rewards and advantages of a group of eight."""
    r = torch.full((8,), partial)
    r[:right] = 1.0
    r_b = torch.cat((r, torch.tensor([0.0, 1, 0, 1, 0, 1, 0, 1])))  # a second group, for "batch"
    a = advantages(r_b, 8, scale)[:8]
    fig, ax = figure(1, 1, 7, 2.4)
    ax.bar(range(8), r, color=GRAY, width=0.4, label="reward")
    ax.bar(
        [i + 0.4 for i in range(8)],
        a,
        color=[GREEN if x > 0 else ORANGE for x in a],
        width=0.4,
        label="advantage",
    )
    ax.axhline(0, color="black", lw=0.8)
    ax.set(
        xlabel="answer",
        ylim=(-2.8, 2.8),
        title=f"{right} of 8 right, divided by the std of: {scale}",
    )
    ax.legend(loc="upper right", ncols=2)
    show(fig)


one_group()
play(one_group, right=(0, 8, 1), scale=["group", "batch", "none"], partial=(0.0, 0.9, 0.1))

# %% [markdown]
# ## Exercises
# **1 · Compute.** In a group of $G$ answers one is right (reward 1), the rest wrong (0). What is the right one's advantage, without $\epsilon$?


# %%
@checker
def check_lonely(fn):
    """The mean is 1/G. What is the unbiased variance of one 1 among G − 1 zeros?"""
    for g in (4, 16):
        r = torch.zeros(g, dtype=torch.double)
        r[0] = 1
        assert abs(fn(g) - advantages(r, g, std_eps=0.0)[0].item()) < 1e-9


@checker
def check_silent(fn):
    """When do all G agree?"""
    assert all(
        abs(fn(p, g) - (p**g + (1 - p) ** g)) < 1e-9 for p in (0.1, 0.5, 0.95) for g in (2, 16)
    )


@checker
def check_short(fn):
    """Which kinds divide by the answer's own length?"""
    weigh = lambda kind: [
        -torch.autograd.grad(
            grpo_loss(x, x.detach(), None, torch.ones(2), mask_bs, loss_type=kind).loss, x
        )[0]
        for x in [torch.zeros(2, 200, requires_grad=True)]
    ][0]
    mask_bs = torch.arange(200) < torch.tensor([[20], [200]])
    for kind in ("grpo", "bnpo", "dapo", "dr_grpo"):
        short, long = weigh(kind)[:, 0].tolist()
        assert abs(fn(kind) - short / long) < 1e-3


def my_lonely(g: int) -> float:
    return ...


check_lonely(my_lonely)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_lonely(g):
#     return (1 - 1 / g) * g**0.5
# ```
# </details>
#
# **2 · Predict.** A question is solved with chance $p$. How often is a group of $G$ answers silent?


# %%
def my_silent(p: float, g: int) -> float:
    return ...


check_silent(my_silent)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_silent(p, g):
#     return p**g + (1 - p) ** g
# ```
# </details>
#
# **3 · Compute.** Two wrong answers have the same advantage; one has 20 tokens, one 200. How many times as hard is each *token* of
# the short one pushed down, under `kind` (grpo, bnpo, dapo, dr_grpo)?


# %%
def my_short(kind: str) -> float:
    return ...


check_short(my_short)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_short(kind):
#     return 10.0 if kind == "grpo" else 1.0  # hence grpo's long wrong answers
# ```
# </details>

# %% [markdown]
# ## Scale-up
# A step of V3 with 32 questions × 16 answers × 4,096 tokens: 2.1M tokens are *written*, then read by the reference and
# the new policy (and by the old one, if there are several updates). Writing dominates, one token after another; the reads are plain forward passes, in batches.
# A fourth model, PPO's critic, would be trained too: its weights, gradients and moments are what GRPO saves.

# %%
from dsv3_ref.config import V3, count_params

tokens = 32 * 16 * 4096
critic = count_params(V3).total * (4 + 4 + 4)  # fp32 weights and gradients, two bf16 moments
print(
    f"{tokens / 1e6:.1f}M tokens; logits of them all {tokens * V3.vocab_size * 4 / 1e12:.1f} TB, {512 * V3.vocab_size * 4 / 1e6:.0f} MB at a time"
)
print(f"a critic as large as the policy: {critic / 1e12:.1f} TB more")
