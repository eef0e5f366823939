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
# A pre-trained model has seen answers, but it has never learned which of *its own* answers are right. Reinforcement
# learning teaches this: sample, score, make the better answers more likely. The difficulty is to define "better". PPO compares with a baseline from a second
# network as large as the policy, the critic, which predicts the score: for V3 another **671 billion** parameters. GRPO samples
# $G$ answers to the same question and uses the mean score of the group as the baseline.
#
# | | trained, with gradients and moments | only evaluated | answers per question |
# |---|---|---|---|
# | PPO (Schulman et al., 2017) | policy, critic | reference, reward model | 1 |
# | GRPO (Shao et al., 2024) | policy | reference, reward model | $G$ |
#
# So half of the *trained* state is gone; the reference, the reward model and the KV cache of the samples stay.
#
# **Why any baseline is allowed.** REINFORCE (Williams, 1992) follows $\nabla\,\mathbb E[r] = \mathbb E[r\,\nabla\log\pi(o)]$.
# Since $\mathbb E[\nabla\log\pi] = \sum_o \nabla\pi(o) = 0$, a number $b$ that does not depend on the answer changes nothing in the mean:
# $\mathbb E[(r - b)\,\nabla\log\pi] = \nabla\,\mathbb E[r]$. It changes the noise, which grows with the mean square of the factor.
# Here is that factor for a question that is solved with probability $p$, by samples beside the formulas: subtracting the mean helps where most answers
# are right and hardly at $p = 0.1$. Dividing by the standard deviation, as eq. 28 does, undoes most of it: its purpose is another, equal weight for easy and hard questions.

# %%
import os
from dataclasses import replace

import torch

from dsv3_ref.config import TINY
from dsv3_ref.decode import generate
from dsv3_ref.viz import BLUE, COLORS, GREEN, GRAY, ORANGE, checker, figure, play, show

torch.manual_seed(0)
G, solved = 16, torch.linspace(0.02, 0.98, 25)
squares = {"reward": [], "− mean": [], "− mean, / std (eq. 28)": []}
for p in solved:
    r_xg = (torch.rand(4000, G) < p).float()
    centered = r_xg - r_xg.mean(1, keepdim=True)
    for values, factor in zip(
        squares.values(), (r_xg, centered, centered / (r_xg.std(1, keepdim=True) + 1e-4))
    ):
        values.append(factor.square().mean().item())
formulas = (
    solved,
    solved * (1 - solved) * (1 - 1 / G),
    (1 - 1 / G) * (1 - solved**G - (1 - solved) ** G),
)
fig, ax = figure(1, 1, 8, 2.6)
for (name, values), formula, color in zip(squares.items(), formulas, (GRAY, GREEN, BLUE)):
    ax.plot(solved, values, color=color, label=name)
    ax.plot(solved, formula, ":", color="black", lw=1)
    assert (torch.tensor(values) - formula).abs().max() < 0.03
    print(f"{name:24} p = 0.1: {values[2]:.2f}   p = 0.9: {values[-3]:.2f}")
ax.set(xlabel="probability p that an answer is right", ylabel="mean square", ylim=(0, 1.05),
       title="Factor on ∇ log π of a group of 16; dotted: formulas")  # fmt: skip
ax.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.28))
show(fig)

# %% [markdown]
# ## Paper
# §5.2.2, and DeepSeekMath, which introduced GRPO:
#
# - For a question $q$ sample $o_1 \dots o_G$ from the old policy; reward $r_i$; **advantage**
#   $A_i = (r_i - \mathrm{mean}(r)) / \mathrm{std}(r)$ (eq. 28).
# - Maximize $\frac1G\sum_i \min(\rho_i A_i,\ \mathrm{clip}(\rho_i, 1-\varepsilon, 1+\varepsilon) A_i) - \beta\,\mathbb D_{KL}$ with $\rho_i = \pi_\theta(o_i|q) / \pi_{old}(o_i|q)$ (eq. 26).
# - $\mathbb D_{KL} = \frac{\pi_{ref}}{\pi_\theta} - \log\frac{\pi_{ref}}{\pi_\theta} - 1$ (eq. 27) estimates the Kullback–Leibler divergence from the reference model, with which RL starts: the mean of $\log \pi_\theta/\pi_{ref}$ under $\pi_\theta$.
# - $\varepsilon$, $\beta$ and $G$ are not published. Prompts: code, mathematics, writing, role-play, question answering.
#
# The report's eq. 26 has **one ratio per answer**, DeepSeekMath's eq. 3 **one per token**, averaged over the
# answer. Most released code uses the second. We implement both, and later variants.
#
# Axes: `b` answers, all groups one after another (`x` groups of `g`); `s` tokens of an answer, padded; `n` tokens; `d` model; `w` words.

# %%
#| export
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_ref.config import UserError
from dsv3_ref.decode import (
    CachedAttention,
    Decoder,
    greedy_token,
    is_greedy,
    multinomial_sample,
)
from dsv3_ref.model import Transformer
from dsv3_ref.ops import upcast
from dsv3_ref.optim import TrainingRecipe

# %% [markdown]
# ## Advantage
# $$A_i = \frac{r_i - \mathrm{mean}(r_{1..G})}{\mathrm{std}(r_{1..G}) + \epsilon}\qquad (b) \to (b)$$
#
# Code bases differ in three details:
#
# - *Which standard deviation?* The unbiased one ($G - 1$), as in `torch.std`.
# - *Which* $\epsilon$? $10^{-4}$ in TRL (Hugging Face's library for RL), $10^{-6}$ elsewhere. It matters only if the rewards of a group differ by little more than $\epsilon$, which is possible for the scores of a reward model and not for rewards of 0 and 1.
# - *Divide at all?* Easy and hard questions have groups with little spread. Division gives them the same weight as questions that are answered right half of the time. "Dr. GRPO" (Liu et al., 2025) does not divide.


# %%
#| export
def advantages(
    reward_b: Tensor, num_generations: int, scale_rewards: str = "group", std_eps: float = 1e-4
) -> Tensor:
    """Compute how much better each completion is than the mean of its group (eq. 28), (b,).

    A group is `num_generations` consecutive rewards. scale_rewards: divide by the standard
    deviation of the "group" or of the "batch", or "none".
    """
    if num_generations < 2 or len(reward_b) % num_generations:
        raise UserError(
            f"{len(reward_b)} rewards cannot be cut into groups of {num_generations}: "
            "num_generations must be at least 2 and divide the number of rewards"
        )
    reward_xg = reward_b.view(-1, num_generations)
    advantage_xg = reward_xg - reward_xg.mean(1, keepdim=True)
    if scale_rewards == "group":
        advantage_xg = advantage_xg / (reward_xg.std(1, keepdim=True) + std_eps)
    elif scale_rewards == "batch":
        advantage_xg = advantage_xg / (reward_b.std() + std_eps)
    elif scale_rewards != "none":
        raise UserError(f"scale_rewards is {scale_rewards!r}: use group, batch or none")
    return advantage_xg.flatten()


# %%
r = torch.tensor([0.0, 0, 0, 1, 1, 1, 1, 1, 0.2, 0.2, 0.2, 0.2])
a = advantages(r, 4)
for group, of in zip(r.view(-1, 4).tolist(), a.view(-1, 4).tolist()):
    print("rewards", [f"{x:.1f}" for x in group], "→ advantages", [f"{x:+.2f}" for x in of])
assert a.view(-1, 4).sum(1).abs().max() < 1e-5  # the advantages of a group sum to 0
assert torch.allclose(
    advantages(5 * r + 3, 4), a, atol=2e-3
)  # neither scale nor offset of rewards matters
assert (a[4:] == 0).all()  # equal rewards in a group give no gradient

# %% [markdown]
# A group with equal rewards has no gradient: questions that are too easy or too hard cost samples and contribute nothing. Curricula,
# and later "dynamic sampling", address this.
#
# ## Log-probabilities
# Everything below needs $\log \pi(o_t)$ of the tokens of an answer, under three models. The logits of V3 for
# 16 answers of 4,096 tokens would take 34 GB, so training calls this function on a few hundred tokens at a time and
# recomputes their logits in the backward pass (`dsv3_ref.posttraining.logprobs`). The entropy
# $-\sum_w p_w \log p_w$ comes from the same logits; it shows whether the policy still explores.
#
# $$\ell_n = z_{n,y_n} - \log\sum_w e^{z_{nw}},\qquad z = h W^\top / \tau \qquad (n,d)\times(w,d) \to (n,w) \to (n)$$


# %%
#| export
def token_logprobs(
    h_nd: Tensor, head_wd: Tensor, y_n: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Compute log p of the given tokens and the entropy at each position, both (n,), in nats."""
    logp_nw = upcast(F.linear(h_nd, head_wd) / temperature).log_softmax(-1)
    entropy_n = -(logp_nw.exp() * logp_nw).sum(-1)
    return logp_nw.gather(1, y_n[:, None])[:, 0], entropy_n


def completion_mask(tokens_bs: Tensor, eos_id: int) -> Tensor:
    """Mark each completion up to and including its first `eos_id`; the rest is padding, (b, s)."""
    is_eos_bs = (tokens_bs == eos_id).long()
    return is_eos_bs.cumsum(1) - is_eos_bs == 0


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
# Sampling is most of the cost, so it has its own loop. Each prompt is prefilled **once**, and its cache (the latents of
# [chapter 03](03_mla.ipynb), not keys and values) is then repeated for the $G$ answers. A finished answer leaves the batch, so
# late steps are cheap. The $\log \pi$ of each sampled token is stored. The trainer computes it again, and the two must agree.


# %%
#| export
def prefill_prompts(
    model: Transformer, prompts: Sequence[list[int]], num_generations: int, max_new_tokens: int
) -> tuple[Decoder, Tensor]:
    """Prefill each prompt once; return a decoder with `num_generations` rows of each, and logits.

    Logits are those of the first new token, (b, w).
    """
    decoder = Decoder(model, len(prompts), max(map(len, prompts)) + max_new_tokens)
    for row_t, prompt in zip(decoder.token_bt, prompts):
        row_t[: len(prompt)] = torch.tensor(prompt)
    last = [len(prompt) - 1 for prompt in prompts]
    h_bsd = decoder.hidden_states([0] * len(prompts), max(last) + 1)
    logit_bw = decoder.logits(h_bsd[range(len(prompts)), last])
    row_b = torch.arange(len(prompts), device=decoder.token_bt.device)
    reorder_cache(decoder, row_b.repeat_interleave(num_generations))
    return decoder, logit_bw.repeat_interleave(num_generations, 0)


@torch.inference_mode()
def generate_rollouts(
    model: Transformer, prompts: Sequence[list[int]], num_generations: int, max_new_tokens: int,
    stop_token_ids: Collection[int], temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[list[list[int]], list[list[float]]]:  # fmt: skip
    """Sample `num_generations` consecutive completions of each prompt, and log π of each token.

    A completion ends with its first token of `stop_token_ids` or after `max_new_tokens`. At
    temperature 0 tokens are the most likely ones, and their log π is that of temperature 1.
    """
    decoder, logit_bw = prefill_prompts(model, prompts, num_generations, max_new_tokens)
    lengths = torch.tensor([len(p) for p in prompts]).repeat_interleave(num_generations).tolist()
    active = list(range(len(lengths)))  # the completion of each row of the decoder
    completions: list[list[int]] = [[] for _ in active]
    logprobs: list[list[float]] = [[] for _ in active]
    greedy = is_greedy(temperature)
    for tokens_left in reversed(range(max_new_tokens)):
        logp_bw = (logit_bw / (1.0 if greedy else temperature)).log_softmax(-1)
        y_b = greedy_token(logp_bw) if greedy else multinomial_sample(logp_bw.exp(), generator)
        logp_b = logp_bw.gather(1, y_b[:, None])[:, 0]
        for i, token, logp in zip(active, y_b.tolist(), logp_b.tolist()):
            completions[i].append(token)
            logprobs[i].append(logp)
        is_stop_b = torch.tensor([token in stop_token_ids for token in y_b.tolist()])
        row_b = (~is_stop_b).nonzero()[:, 0]  # the unfinished ones
        if not (len(row_b) and tokens_left):
            break
        decoder.token_bt[range(len(lengths)), lengths] = y_b
        reorder_cache(decoder, row_b)
        active = [active[row] for row in row_b.tolist()]
        lengths = [lengths[row] for row in row_b.tolist()]
        logit_bw = decoder.logits(decoder.hidden_states(lengths, 1))[:, 0]
        lengths = [length + 1 for length in lengths]
    return completions, logprobs


def reorder_cache(decoder: Decoder, row_b: Tensor) -> None:
    """Replace the rows of a decoder's caches by these; rows may be repeated or left out."""
    for layer in decoder.layers[: decoder.n_main]:
        attention = layer.attention
        assert isinstance(attention, CachedAttention)
        attention.kv_btx = attention.kv_btx[row_b]
    decoder.token_bt = decoder.token_bt[row_b]
    decoder.h_btd = decoder.h_btd[row_b]


# %%
model = Transformer(replace(TINY, n_layers=2, vocab_size=64))
prompts, END = [[1, 2, 3], [4, 5, 6, 7, 8], [9]], 63
answers, logprobs = generate_rollouts(
    model, prompts, 8, 30, [END], generator=torch.Generator().manual_seed(0)
)
for i, (answer, logp_s) in enumerate(zip(answers, logprobs)):
    prompt = prompts[i // 8]
    h_sd = model.hidden_states(torch.tensor([prompt + answer[:-1]]))[0][0, len(prompt) - 1 :]
    again_s, _ = token_logprobs(h_sd, model.head.weight, torch.tensor(answer))
    torch.testing.assert_close(again_s, torch.tensor(logp_s), atol=1e-4, rtol=0)
    assert END not in answer[:-1] and (answer[-1] == END or len(answer) == 30)
print("lengths of 24 answers:", [len(answer) for answer in answers])
greedy = generate_rollouts(model, prompts, 1, 10, [END], temperature=0)[0]
assert greedy[1] == generate(model, torch.tensor([prompts[1]]), 10)[0, 5:].tolist()

# %% [markdown]
# ## How far from where we began?
# The exact KL sums over all possible answers. From samples of $\pi_\theta$ there are three common estimators, with
# $\Delta = \log\pi_{ref} - \log\pi_\theta$:
#
# $$k_1 = -\Delta,\qquad k_2 = \tfrac12\Delta^2,\qquad k_3 = e^{\Delta} - \Delta - 1 \ge 0$$
#
# $k_1$ is unbiased but negative half of the time. $k_2$ is never negative but biased. $k_3$ is
# $k_1$ plus $e^\Delta - 1$, whose mean is 0: it is unbiased, never negative, and has low variance while the models are close.
#
# That is true of the *values*. A loss differentiates the estimator at samples that it holds fixed, and there the roles change:
# $\nabla k_2 = -\Delta\,\nabla\log\pi$ has the mean $\nabla\,\mathrm{KL}(\pi\,\|\,\pi_{ref})$ exactly, $\nabla k_3 = (1 - e^\Delta)\,\nabla\log\pi$ has that
# of the *other* divergence, $\mathrm{KL}(\pi_{ref}\,\|\,\pi)$, and the mean of $\nabla k_1$ is 0. Close to the reference both divergences agree to second order.
# The second cell sums over all 40 words to show it. We keep $k_3$, because the report does.


# %%
#| export
def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Estimate KL(π ‖ π_ref) elementwise (eq. 27): e^Δ − Δ − 1, Δ = log π_ref − log π, in nats.

    The tokens must be samples of π.
    """
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

# %%
z_w = torch.randn(40, dtype=torch.double, requires_grad=True)
ref_logp_w = torch.randn(40, dtype=torch.double).log_softmax(-1)
logp_w = z_w.log_softmax(-1)
delta_w = ref_logp_w - logp_w


def gradient(value):
    """Return the gradient with respect to the logits."""
    return torch.autograd.grad(value, z_w, retain_graph=True)[0]


means = [  # of the gradient of each estimator, over all words with their probability
    gradient((logp_w.detach().exp() * k_w).sum())
    for k_w in (-delta_w, delta_w.square() / 2, kl_k3(logp_w, ref_logp_w))
]
forward = gradient((logp_w.exp() * (logp_w - ref_logp_w)).sum())  # KL(π ‖ π_ref)
reverse = gradient((ref_logp_w.exp() * (ref_logp_w - logp_w)).sum())  # KL(π_ref ‖ π)
for mean_w, expected in zip(means, (torch.zeros(40), forward, reverse)):
    assert torch.allclose(mean_w, expected.double(), atol=1e-12)
print(
    f"k₃'s gradient and that of KL(π ‖ π_ref): cosine {F.cosine_similarity(means[2], forward, 0):.2f}"
)

# %% [markdown]
# ## The objective
# With the ratio $\rho = \pi_\theta/\pi_{old}$, the gain of a token (or of an answer) is
#
# $$g = \min\big(\rho A,\ \mathrm{clip}(\rho,\,1-\varepsilon,\,1+\varepsilon')\,A\big)$$
#
# with $\varepsilon$ below and $\varepsilon'$ above (equal in the report). At $\rho = 1$ its gradient is $A\,\nabla\log\pi$, the plain policy gradient. Once a good answer is
# $1 + \varepsilon'$ times as likely, or a bad one $1 - \varepsilon$ times, these samples give no more gradient.
# In the other direction nothing is clipped, so a change for the worse can always be undone. The loss averages $\beta\,k_3 - g$, and
# the variants differ in how (lengths $|o_i|$; names as in TRL, after the papers DAPO and Dr. GRPO, both 2025). DAPO has four parts: a higher upper
# clip ($\varepsilon' > \varepsilon$), dynamic sampling, this average, and a soft penalty of answers that are too long:
#
# | `loss_type` | average | why |
# |---|---|---|
# | `sequence` | $\frac1b\sum_i$, one ratio per answer | the report's eq. 26; TRL's `importance_sampling_level="sequence"` is GSPO (2025), whose ratio is the $\lvert o_i\rvert$-th root of it |
# | `grpo` | $\frac1b\sum_i\frac1{\lvert o_i\rvert}\sum_t$ | DeepSeekMath's eq. 3 |
# | `bnpo` | $\sum_{it} / \sum_i \lvert o_i\rvert$ | equal weight for all tokens of the micro-batch |
# | `dapo` | the same over the *global* batch | equal weight for all tokens, so long wrong answers are not diluted |
# | `dr_grpo` | $\sum_{it} / (b\cdot\text{longest allowed})$ | no length bias |
#
# **Two programs, one policy.** Answers are sampled by an inference engine whose kernels and precision are not the trainer's, so even with equal weights
# $\pi_{sampler} \ne \pi_{old}$, and the gradient is that of samples from another policy. Truncated importance sampling
# ([Ionides 2008](https://doi.org/10.1198/106186008X320456); for RL of language models [Yao et al. 2025](https://fengyao.notion.site/off-policy-rl)) corrects it: the gain of each token is weighted by
#
# $$w = \min\left(\frac{\pi_{old}}{\pi_{sampler}},\ C\right)$$
#
# $w$ has no gradient. Without the cap $C$ the expectation would be exact, but a token that the sampler found a thousand times less likely than the trainer would outweigh the batch;
# the cap trades that variance for a small bias. The KL term is not weighted, as in TRL (`token_truncate`).


# %%
#| export
class GRPOOutput(NamedTuple):
    """A loss and metrics without gradient, which are means over tokens (or completions)."""

    loss: Tensor
    kl: Tensor  # estimated by k₃, in nats
    clip_ratio: Tensor  # fraction whose gradient is clipped to 0
    importance_ratio: Tensor  # π / π_old
    sampler_weight: Tensor  # min(π_old / π_sampler, cap); 1 without a correction


def sequence_logprob(logp_bs: Tensor) -> Tensor:
    """Sum log p over the tokens of each completion, (b, 1); padding must be 0."""
    return logp_bs.sum(1, keepdim=True)


def aggregate_loss(
    x_bs: Tensor, mask_bs: Tensor, loss_type: str, normalizer: float | None
) -> Tensor:
    """Average masked losses of tokens into a scalar; `normalizer` as in `grpo_loss`."""
    if loss_type in ("grpo", "sequence"):
        return (x_bs.sum(1) / mask_bs.sum(1).clamp(min=1)).mean()
    if loss_type == "dr_grpo":
        return x_bs.sum() / (len(x_bs) * (normalizer or x_bs.shape[1]))
    if loss_type not in ("bnpo", "dapo"):
        raise UserError(
            f"there is no loss_type {loss_type!r}: use grpo, bnpo, dapo, dr_grpo or sequence"
        )
    if loss_type == "dapo" and normalizer:
        return x_bs.sum() / normalizer
    return x_bs.sum() / mask_bs.sum().clamp(min=1)


def grpo_loss(
    logp_bs: Tensor, old_logp_bs: Tensor, ref_logp_bs: Tensor | None, advantage_b: Tensor,
    mask_bs: Tensor, epsilon: float | tuple[float, float] = 0.2, beta: float = 0.0,
    loss_type: str = "grpo", normalizer: float | None = None,
    sampler_logp_bs: Tensor | None = None, sampler_cap: float = 2.0,
) -> GRPOOutput:  # fmt: skip
    """Compute eq. 26: −min(ρ·A, clip(ρ)·A) + β·k₃, averaged by `loss_type` (chapter 16).

    epsilon: one number, or (below, above). normalizer: for dapo the tokens of the global batch, for
    dr_grpo the longest completion allowed; by default those of this batch. ref_logp_bs may be None
    if beta is 0. sampler_logp_bs: log π of the engine that sampled the tokens; the gain is then
    weighted by min(π_old / π_sampler, sampler_cap). Values at masked positions are ignored.
    """

    def unpadded(x_bs: Tensor) -> Tensor:
        x_bs = torch.where(mask_bs.bool(), x_bs, 0)  # padding may hold any value
        return sequence_logprob(x_bs) if loss_type == "sequence" else x_bs

    below, above = epsilon if isinstance(epsilon, tuple) else (epsilon, epsilon)
    ratio_bs = (unpadded(logp_bs) - unpadded(old_logp_bs)).exp()
    gain_bs = ratio_bs * advantage_b[:, None]
    clipped_bs = ratio_bs.clamp(1 - below, 1 + above) * advantage_b[:, None]
    kl_bs = torch.zeros_like(ratio_bs)
    if beta:
        if ref_logp_bs is None:
            raise UserError(f"beta is {beta} without ref_logp_bs: pass it, or set beta to 0")
        kl_bs = kl_k3(unpadded(logp_bs), unpadded(ref_logp_bs))
    sampler_weight_bs = torch.ones_like(ratio_bs)
    weight_bs = sampler_weight_bs if loss_type == "sequence" else mask_bs.to(ratio_bs.dtype)
    if sampler_logp_bs is not None:
        log_ratio_bs = unpadded(old_logp_bs) - unpadded(sampler_logp_bs)
        sampler_weight_bs = log_ratio_bs.exp().clamp(max=sampler_cap).detach()
    gained_bs = sampler_weight_bs * torch.minimum(gain_bs, clipped_bs)
    loss = aggregate_loss((beta * kl_bs - gained_bs) * weight_bs, weight_bs, loss_type, normalizer)
    n = weight_bs.sum().clamp(min=1)
    means = [
        ((x_bs * weight_bs).sum() / n).detach()
        for x_bs in (kl_bs, (clipped_bs < gain_bs).float(), ratio_bs, sampler_weight_bs)
    ]
    return GRPOOutput(loss, *means)


GRPO_RECIPES = {
    "v3": replace(  # the report publishes none of these
        TrainingRecipe(), steps=1000, lr=1e-6, min_lr=1e-6, warmup_steps=10, decay_start=0.0,
        decay_end=1.0, final_start=1.1, start_batch_size=32, global_batch_size=32,
        bias_update_rate=0.0, mtp_weight=0.0, mtp_weight_end=0.0, balance_loss_coeff=0.0,
        weight_decay=0.0,
    ),
}  # fmt: skip
GRPO_RECIPES["tiny"] = replace(
    GRPO_RECIPES["v3"], steps=60, seq_len=256, lr=3e-4, min_lr=3e-5, warmup_steps=5,
    start_batch_size=16, global_batch_size=16,
)  # fmt: skip


# %%
def slow(logp, old, ref, a, mask, eps, beta, kind, size, sampler, cap):
    """Compute the same one answer and one token at a time, from the equations."""
    answers = []
    for i in range(len(a)):
        tokens = [t for t in range(logp.shape[1]) if mask[i, t]]
        models = logp, old, ref, sampler
        ways = [[sum(x[i, t] for t in tokens) for x in models]] if kind == "sequence" else \
               [[x[i, t] for x in models] for t in tokens]  # fmt: skip
        terms = []
        for new, was, began, sampled in ways:
            rho, d = (new - was).exp(), began - new
            w = min((was - sampled).exp(), cap)
            gain = min(rho * a[i], min(max(rho, 1 - eps), 1 + eps) * a[i])
            terms.append(beta * (d.exp() - d - 1) - w * gain)
        answers.append(terms)
    n = sum(map(len, answers))
    if kind in ("grpo", "sequence"):
        return sum(sum(terms) / len(terms) for terms in answers) / len(a)
    return sum(map(sum, answers)) / {"bnpo": n, "dapo": size, "dr_grpo": len(a) * size}[kind]


def example(b=6, s=5):
    """Return log-probabilities under three models, advantages, and a mask of 1 to s tokens."""
    logp = -torch.rand(b, s, dtype=torch.double).mul(3)
    old, ref = (logp + 0.3 * torch.randn(b, s, dtype=torch.double) for _ in range(2))
    mask = torch.arange(s) < torch.randint(1, s + 1, (b, 1))
    return logp.requires_grad_(), old, ref, torch.randn(b, dtype=torch.double), mask


inputs = example()
sampler = inputs[1] + 0.5 * torch.randn(6, 5, dtype=torch.double)
for kind in ("grpo", "bnpo", "dapo", "dr_grpo", "sequence"):
    args = *inputs, 0.2, 0.04, kind, 40, sampler, 1.5
    got, want = grpo_loss(*args), slow(*args)
    grads = [torch.autograd.grad(x, inputs[0])[0] for x in (got.loss, want)]
    assert torch.allclose(got.loss, want, atol=1e-12) and torch.allclose(*grads, atol=1e-12)
    print(f"{kind:9} loss {got.loss:+.4f}, KL {got.kl:.4f}, {got.clip_ratio:.0%} clipped")

# %% [markdown]
# The four token-level variants share ratios, KL and clip, and differ only in the average. `sequence` has one ratio per answer, the product of those of its tokens. Gate biases are not updated in RL (`--bias-update-rate 0`),
# because the expert loads of a few hundred problems say little about balance.
#
# The effect of the clip: gain over ratio, for a good and a bad answer. Where a curve is flat there is no gradient.

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
    title="clip at 0.8 and 1.3: no gradient where the ratio has moved far enough",
)
ax.legend()
show(fig)

# %% [markdown]
# ## Experiment: does the group matter?
# A small policy: for each of 24 questions it writes four letters out of eight, independently, from a table of
# logits. One word per question is right, and each letter in its place has a reward of ¼. There are 300 steps of 4 questions × 8
# answers, five seeds, and two negative controls:
#
# - *no baseline*: the reward itself in place of $A$;
# - *random reward*: 0 or 1 at random. If accuracy improved here, our metric would be broken.


# %%
QUESTIONS = 24
LETTERS = 8
PLACES = 4


def train(
    baseline="group", reward="true", beta=0.0, kind="grpo", group=8, lr=0.15, steps=300, seed=0
):
    """Train a table policy; return accuracy per letter and KL per letter at each step."""
    g = torch.Generator().manual_seed(seed)
    word_qs = torch.randint(LETTERS, (QUESTIONS, PLACES), generator=g)
    table_qsw = torch.zeros(QUESTIONS, PLACES, LETTERS, requires_grad=True)
    optimizer = torch.optim.Adam([table_qsw], lr)
    right, far = [], []
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
SEEDS = 2 if os.environ.get("DSV3_SHORT") else 5
curves = {name: [train(**how, seed=seed) for seed in range(SEEDS)] for name, how in RUNS.items()}
fig, axes = figure(1, 2, 8.6, 3)
for (name, runs), color in zip(curves.items(), (GREEN, GRAY, ORANGE, BLUE)):
    for ax, of_all in zip(axes, zip(*runs)):
        mean = torch.stack(of_all).mean(0)
        ax.plot(mean, color=color, label=name)
axes[0].set(xlabel="step", ylabel="probability of the right letter", title="Accuracy")
axes[1].set(xlabel="step", ylabel="k₃ per letter", title="Distance from the start")
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
# Each curve is the mean of five seeds. GRPO learns fastest. Without the baseline all answers are reinforced, the right ones only more strongly. A
# random reward gives no improvement, yet the policy moves nearly as far from the start: distance does not indicate learning. β keeps the policy close to the reference, at a cost in accuracy.
#
# ## Experiment: a model that learns to think
# Now a language model: `make align` on the 5M model of [chapter 07](07_pretrain.ipynb), fine-tuned as in [chapter 14](14_sft_distill.ipynb) so that it *can* work
# out sums but mostly answers directly. Each step has 16 prompts with 16 answers each: sums, counting, spelling, and open prompts (writing, role-play, questions). The open ones are
# scored by a reward model as in [chapter 15](15_rewards.ipynb), trained on pairs of a president's sentence and a corrupted one; the reward is $\sigma(r)$, between 0 and 1. 200 sums are held out. There are three seeds of GRPO and one of each control.

# %%
from dsv3_ref.viz.ablation import load_result

FOUND = load_result("align")
runs = FOUND["runs"]
KINDS = {"GRPO": GREEN, "no-baseline": GRAY, "random-reward": ORANGE}
fig, axes = figure(1, 2, 9, 3)
for name, run in runs.items():
    kind = name.partition(",")[0]
    evaluations = [(0, run["before"])] + [
        (c["step"], c["held_out"]) for c in run["curve"] if "held_out" in c
    ]
    first = name.endswith("seed 0")
    steps, right = zip(*((step, scores["sums"]["greedy"]) for step, scores in evaluations))
    axes[0].plot(steps, right, "o-", color=KINDS[kind], ms=4, label=kind if first else None)
    print(f"{name:22} greedy {right[0]:5.1%} → {right[-1]:5.1%}, sampled "
          f"{run['before']['sums']['sampled']:5.1%} → {run['after']['sums']['sampled']:5.1%}")  # fmt: skip
domains = {}
for c in runs["GRPO, seed 0"]["curve"]:
    for name, reward in c["reward_by"].items():
        domains.setdefault(name, []).append((c["step"], reward))
for (name, points), color in zip(sorted(domains.items()), COLORS):
    steps, reward = (torch.tensor(x, dtype=torch.double) for x in zip(*points))
    smoothed = torch.stack([reward[max(0, i - 3) : i + 4].mean() for i in range(len(reward))])
    axes[1].plot(steps, smoothed, color=color, label=name)
accuracy_if_asked = FOUND["distillation"]["both forms, asked to think"]["greedy"]
axes[0].axhline(accuracy_if_asked, color="black", lw=1, ls=":", label="before RL, asked to think")
axes[0].set(xlabel="step", ylabel="accuracy", ylim=(0, 1), title="200 held-out sums")
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
# Within 15 steps the model learns to think before it answers. RL did not teach it to add; it selected one of two behaviors that the model already had:
# with the system prompt that asks for reasoning, the fine-tuned model is right in 84.5 % of the sums before any RL (dotted); the three seeds end 2.5 to 9 points above that. The report
# describes the same for its expert models, which after hundreds of steps answer in R1's style "even in the absence of explicit system prompts".
#
# A random reward gives no improvement and even degrades the model, as expected. *No baseline* is a control that **still works**: with rewards of 0 and 1 only right answers are ever reinforced, so little is lost (83.5 %, one seed; GRPO 87 to 93.5 %). In the
# table experiment rewards of ¼ also reinforce half-right words, and the loss is larger. The clip has no effect here: with one update per batch $\rho = 1$ throughout. It matters with `--steps-per-generation` above 1.

# %%
fig, axes = figure(1, 4, 10, 2.3)
for ax, (key, title) in zip(
    axes, {"kl_k1": "KL, nats per token", "kl": "KL by k₃, nats per token", "entropy": "entropy, nats", "length": "tokens per answer"}.items()
):  # fmt: skip
    for name in of_grpo:
        steps, values = zip(*((c["step"], c[key]) for c in runs[name]["curve"] if key in c))
        ax.plot(steps, values, color=GREEN, lw=1, alpha=0.8)
    ax.set_title(title, fontsize=10)
    ax.set_xlabel("step")
show(fig)
for s in runs["GRPO, seed 0"]["samples"][:7] + runs["GRPO, seed 0"]["samples"][9::3]:
    print(s["prompt"][-78:].strip())
    print(f"  before  {s['before'][:70]}\n  after   {s['text'][:70]}")

# %% [markdown]
# Two observations. *$k_3$ has a heavy tail*: a token that has become a thousand times less likely, and is sampled nevertheless, contributes a thousand. The criterion for stopping a run is therefore the plain
# mean of $\log \pi/\pi_{ref}$ (`--max-kl`), not $k_3$. And *not every reward gives a gradient*: spelling is never right, so all rewards of its groups are equal and it stays at 0. "Always 1" is right for 82 % of the counting questions, and the model
# gave this answer before RL too; the chain of thought before it no longer leads to it. The rewards of open answers hardly rise (0.057 → 0.066 if sampled), and the texts get shorter, not better.
#
# ## Play: groups of the model
# Eight answers of the fine-tuned model to one sum, sampled at temperature 1, with their advantages. A right answer among wrong ones has the largest advantage.
# *After* RL most groups have equal rewards and no gradient.


# %%
def answered(question: int = 0, when: str = "before"):
    """Plot a group's answers, rewards and advantages."""
    group = FOUND["groups"][when][question]
    r_b = torch.tensor([a["reward"] for a in group["answers"]])
    a_b = advantages(r_b, len(r_b))
    fig, ax = figure(1, 1, 9, 2.8)
    ax.barh(range(len(r_b)), a_b, color=[GREEN if x > 0 else ORANGE for x in a_b], height=0.7)
    ax.axvline(0, color="black", lw=0.8)
    for i, (answer, r, a) in enumerate(zip(group["answers"], r_b, a_b)):
        mark = "✓" if r > 0 else "✗"
        ax.text(-9.8, i, f"{mark} {answer['text'][:56]}", va="center", fontsize=8, parse_math=False)
        ax.text(3.0, i, f"{a:+.2f}", va="center", ha="right", fontsize=8)
    ax.set(yticks=[], xlim=(-10, 3.1), xticks=[-2, 0, 2], xlabel="advantage", ylim=(7.6, -0.6))
    ax.set_title(f"{group['question'].rpartition(':')[2].strip()}   {when} RL")
    show(fig)


answered()

# %%
play(answered, question=(0, 3, 1), when=["before", "after"])

# %% [markdown]
# ## Play: one group, by hand
# Eight answers, their rewards and their advantages. Raise the number of right ones from 0 to 8:
# a single right answer among wrong ones has a large advantage, a single wrong one among right ones a large negative one, and equal rewards give none.


# %%
def one_group(right: int = 2, scale="group", partial: float = 0.0):
    """Plot rewards and advantages of a group of eight."""
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
    for p in (0.1, 0.5, 0.95):
        for g in (2, 16):
            assert abs(fn(p, g) - (p**g + (1 - p) ** g)) < 1e-9


@checker
def check_short(fn):
    """Which loss types divide by the answer's own length?"""
    mask_bs = torch.arange(200) < torch.tensor([[20], [200]])
    for loss_type in ("grpo", "bnpo", "dapo", "dr_grpo"):
        x_bs = torch.zeros(2, 200, requires_grad=True)
        loss = grpo_loss(
            x_bs, x_bs.detach(), None, torch.ones(2), mask_bs, loss_type=loss_type
        ).loss
        short, long = (-torch.autograd.grad(loss, x_bs)[0][:, 0]).tolist()
        assert abs(fn(loss_type) - short / long) < 1e-3


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
# **2 · Predict.** A question is solved with probability $p$. How often does a group of $G$ answers have equal rewards, and so no gradient?


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
# **3 · Compute.** Two wrong answers have the same advantage; one has 20 tokens, the other 200. How many times as large is the gradient of each *token* of
# the short one, for each `loss_type` (grpo, bnpo, dapo, dr_grpo)?


# %%
def my_short(loss_type: str) -> float:
    return ...


check_short(my_short)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_short(loss_type):
#     return 10.0 if loss_type == "grpo" else 1.0  # so grpo favors long wrong answers
# ```
# </details>

# %% [markdown]
# ## Scale-up
# A step of V3 with 32 questions × 16 answers × 4,096 tokens *generates* 2.1M tokens. The reference and the new policy then compute their log-probabilities
# (and so does the old policy, if there are several updates). Generation dominates, because it is one token after another; the log-probabilities are batched forward passes.
# PPO would also train a fourth model, the critic: GRPO saves its weights, gradients and moments.

# %%
from dsv3_ref.config import V3, count_params

tokens = 32 * 16 * 4096
critic = count_params(V3).total * (4 + 4 + 4)  # fp32 weights and gradients, two bf16 moments
print(
    f"{tokens / 1e6:.1f}M tokens; logits of them all {tokens * V3.vocab_size * 4 / 1e12:.1f} TB, {512 * V3.vocab_size * 4 / 1e6:.0f} MB in chunks"
)
print(f"a critic as large as the policy: {critic / 1e12:.1f} TB more")
