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
# # 14 · Fine-tuning: a voice, and two ways to answer

# %% [markdown]
# ## Why
# A pre-trained model continues texts. Given a question, it may well write three more questions. Supervised fine-tuning (SFT)
# trains it on conversations, with a loss on **one side** of them. The data are scarce: V3 was pre-trained on 14.8 trillion tokens and
# fine-tuned on 1.5 million conversations. Two things would waste them. Conversations vary in length, so a batch padded to its
# longest one is mostly padding. And a loss on all tokens would teach the model to ask questions as users do.

# %%
import random

import torch

from dsv3_ref.viz import BLUE, COLORS, GREEN, GRAY, ORANGE, checker, figure, play, show

torch.manual_seed(0)
rng = random.Random(0)
lengths = [min(4096, int(rng.lognormvariate(5.8, 1.1)) + 20) for _ in range(512)]
batches = [lengths[i : i + 16] for i in range(0, 512, 16)]
padded = sum(max(batch) * len(batch) for batch in batches)
fig, ax = figure(1, 1, 8, 2.3)
ax.hist(lengths, bins=60, color=BLUE)
ax.set(
    xlabel="tokens per conversation",
    ylabel="conversations",
    title=f"padded in batches of 16: {sum(lengths) / padded:.0%} of the computed tokens are text",
)
show(fig)

# %% [markdown]
# ## Paper
# §5.1, §5.4.1:
#
# - 1.5 million conversations from many domains, two epochs, a cosine learning rate from $5\cdot10^{-6}$ to $10^{-6}$.
# - Each sequence is **packed** from several samples, which are **masked from each other**.
# - Reasoning is distilled. R1, a model trained to reason at length, is more accurate but too verbose. For each domain
#   an **expert model** is trained by SFT and RL, on two forms of each instance: ⟨problem, original response⟩ and ⟨system prompt,
#   problem, R1 response⟩. The system prompt asks for reflection and verification. After RL the expert combines both patterns, *even
#   without a system prompt*.
# - The expert's answers are filtered by **rejection sampling**, and the final model is trained on those that remain.
# - Cost and gain, on V3's predecessor V2.5: MATH-500 74.6 → 83.2, mean length 769 → 1510 tokens.
#
# Axes: `b` rows, `s` positions, `n` all positions, `m` samples, `w` words.

# %%
#| export sft
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_ref.config import UserError
from dsv3_ref.model import Transformer
from dsv3_ref.ops import linear_cross_entropy
from dsv3_ref.optim import TrainingRecipe
from dsv3_ref.pretrain import LossOutput

# %% [markdown]
# ## A conversation as tokens
# Four special tokens mark the structure and a fifth is padding; everything else is text:
#
# `<｜begin▁of▁sentence｜>`system`<｜User｜>`question`<｜Assistant｜>`answer`<｜end▁of▁sentence｜><｜User｜>`…
#
# A conversation that ends with a question is followed by the assistant token, after which the model answers. Text is encoded so that it
# can never contain a special token: a user who *types* `<｜Assistant｜>` sends thirteen plain characters, so users cannot forge an answer of the model.


# %%
#| export sft
class SpecialTokens(NamedTuple):
    """The ids of the special tokens of a conversation."""

    bos: int
    eos: int
    pad: int
    user: int
    assistant: int


def render_conversation(
    messages: Sequence[dict], encode: Callable[[str], list[int]], special_tokens: SpecialTokens
) -> list[int]:
    """Render a conversation as tokens; the assistant token follows a final question.

    messages: an optional system message, then user and assistant in turn, each {"role": …,
    "content": text}. encode turns text into tokens and must not produce special tokens.
    """
    turns = list(messages)
    tokens = [special_tokens.bos]
    if turn_role(turns, 0) == "system":
        tokens += encode(turns.pop(0)["content"])
    for i, turn in enumerate(turns):
        role = turn_role(turns, i)
        if role != ("user", "assistant")[i % 2]:
            raise UserError(
                f"turn {i + 1} is by {role!r}: user and assistant alternate, the user begins"
            )
        text = encode(turn["content"])
        if role == "user":
            tokens += [special_tokens.user, *text]
        else:
            tokens += [special_tokens.assistant, *text, special_tokens.eos]
    if not turns:
        raise UserError("a conversation needs a question: add a user message")
    if turns[-1]["role"] == "user":
        tokens.append(special_tokens.assistant)
    return tokens


def turn_role(turns: Sequence[dict], i: int) -> str | None:
    """Return the role of turn i, None if there is no such turn; raise if it is malformed."""
    turn = turns[i] if i < len(turns) else {}
    if not isinstance(turn, dict) or (turn and not isinstance(turn.get("content"), str)):
        raise UserError(f'turn {i + 1} is not a role with a string: write {{"role", "content"}}')
    return turn.get("role")


# %%
# ⌂ begin, ∎ end, · padding
WORDS = "⌂ ∎ · USER: MODEL: be brief how many legs has a cat ? four and bird two".split()
SPECIAL_TOKENS = SpecialTokens(*range(5))


def encode(text: str) -> list[int]:
    """Encode a text of known words."""
    return [WORDS.index(word) for word in text.split()]


def spell(tokens) -> str:
    """Decode tokens."""
    return " ".join(WORDS[t] for t in tokens)


talk = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "how many legs has a cat ?"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "and a bird ?"},
]
print(spell(render_conversation(talk, encode, SPECIAL_TOKENS)))
print(
    spell(
        render_conversation(
            [*talk, {"role": "assistant", "content": "two"}], encode, SPECIAL_TOKENS
        )
    )
)
assert render_conversation(talk, encode, SPECIAL_TOKENS)[-1] == SPECIAL_TOKENS.assistant
for wrong in ([], talk[2:], [talk[1], talk[3]], [{"role": "user"}]):
    try:
        render_conversation(wrong, encode, SPECIAL_TOKENS)
        raise AssertionError("accepted")
    except UserError as e:
        print("refused:", e)

# %% [markdown]
# ## Who speaks?
# Since no text can produce a special token, the loss mask can be recovered from the tokens: an answer starts after the assistant token and ends with, and
# **includes**, the end token, which the model must learn to emit. Let $a_s$ be the position of the last assistant token *before* $s$ and $o_s$ that of the last other special token:
#
# $$\mathrm{mask}_s = [\,a_s > o_s\,]\qquad (b,s) \to (b,s)$$
#
# Each begin token starts a sample. No mask has to be kept aligned with its tokens. Other models mark roles by ordinary words, and a row of data may leave
# an answer out of the loss (`"weight": 0`). For those `dsv3 sft` stores the mask and the starts of samples as two bits of each token
# ([`packing.py`](../dsv3_ref/data/packing.py)).


# %%
#| export sft
def assistant_mask(tokens_bs: Tensor, special_tokens: SpecialTokens) -> Tensor:
    """Mark the tokens that the model must predict: its answers and their eos, (b, s).

    An answer begins after an assistant token.
    """

    def last_index(is_bs: Tensor) -> Tensor:
        index_s = torch.arange(1, is_bs.shape[1] + 1, device=is_bs.device)
        return torch.where(is_bs, index_s, 0).cummax(1)[0]

    others = [special_tokens.bos, special_tokens.eos, special_tokens.user]
    is_other_bs = torch.isin(tokens_bs, torch.tensor(others, device=tokens_bs.device))
    is_assistant_bs = tokens_bs == special_tokens.assistant
    open_bs = last_index(is_assistant_bs) > last_index(is_other_bs)
    return F.pad(open_bs[:, :-1], (1, 0))


def sample_cu_seqlens(tokens_bs: Tensor, special_tokens: SpecialTokens) -> Tensor:
    """Return 0 and the end of each sample in all rows end to end: (m + 1,), int32."""
    is_start_bs = tokens_bs == special_tokens.bos
    is_start_bs[:, :1] = True  # a row starts a sample, whatever its first token is
    start_m = is_start_bs.flatten().nonzero()[:, 0]
    return torch.cat((start_m, start_m.new_full((1,), tokens_bs.numel()))).int()


# %%
row = render_conversation(
    [*talk, {"role": "assistant", "content": "two"}], encode, SPECIAL_TOKENS
) + render_conversation(talk[1:3], encode, SPECIAL_TOKENS)
row_1s = torch.tensor([row])
print(
    " ".join(
        f"[{WORDS[t]}]" if on else WORDS[t]
        for t, on in zip(row, assistant_mask(row_1s, SPECIAL_TOKENS)[0])
    )
)
print("cu_seqlens", sample_cu_seqlens(row_1s, SPECIAL_TOKENS).tolist())
assert spell(row_1s[assistant_mask(row_1s, SPECIAL_TOKENS)]) == "four ∎ two ∎ four ∎"

# %% [markdown]
# ## Packing
# Placing whole samples into rows of one length is bin packing. *First-fit decreasing* (longest first) takes a few lines and wastes little.
# The rest of a row is padding after the last sample, where the causal mask hides it.


# %%
#| export sft
def pack_samples(samples: Sequence[list[int]], length: int, pad: int) -> list[list[int]]:
    """Pack whole samples into rows of `length` tokens by first-fit decreasing."""
    rows: list[list[int]] = []
    for sample in sorted(samples, key=len, reverse=True):
        if len(sample) > length:
            raise UserError(
                f"a sample of {len(sample)} tokens does not fit a row of {length}: "
                "use longer rows or drop the sample"
            )
        row = next((row for row in rows if len(row) + len(sample) <= length), None)
        if row is None:
            row = []
            rows.append(row)
        row += sample
    return [row + [pad] * (length - len(row)) for row in rows]


# %%
samples = [[SPECIAL_TOKENS.bos] + [5] * (n - 1) for n in lengths]
rows = pack_samples(samples, 4096, SPECIAL_TOKENS.pad)
tokens = torch.tensor(rows)
assert sum(map(len, samples)) == (tokens != SPECIAL_TOKENS.pad).sum()
assert (tokens == SPECIAL_TOKENS.bos).sum() == len(samples)
print(f"{len(samples)} conversations in {len(rows)} rows, {sum(lengths) / tokens.numel():.1%} text")

# %% [markdown]
# **Masked from each other.** Samples share a row and nothing else: positions restart (`Rope.from_cu_seqlens`, chapter 02), attention stops at the sample
# boundary (`varlen_attention`, chapter 03), and everything else in the model works on single tokens. This can be tested: if one
# sample changes, the hidden states of the others must not (except in the last digit, because an expert with other tokens in its batch sums its products in
# other blocks).

# %%
from dsv3_ref.config import TINY
from dsv3_ref.model import Transformer

model = Transformer(replace(TINY, n_layers=2, vocab_size=64))
parts = [torch.randint(5, 64, (n,)) for n in (7, 12, 4)]
for part in parts:
    part[0] = SPECIAL_TOKENS.bos
changed = [parts[0], torch.cat((parts[1][:1], torch.randint(5, 64, (11,)))), parts[2]]
with torch.no_grad():
    before, after = (
        model.hidden_states(x, cu_seqlens=sample_cu_seqlens(x, SPECIAL_TOKENS))[0][0]
        for x in (torch.cat(p)[None] for p in (parts, changed))
    )
    alone = torch.cat([model.hidden_states(part[None])[0][0] for part in parts])
others = torch.cat((torch.arange(7), torch.arange(19, 23)))
torch.testing.assert_close(before[others], after[others], atol=1e-5, rtol=0)
assert (before - after)[7 + 1 : 19].abs().amax(1).min() > 0.01  # every token of the changed sample
torch.testing.assert_close(before, alone, atol=1e-5, rtol=0)
print(f"the states of the other samples changed by {(before - after)[others].abs().max():.0e}")

# %% [markdown]
# ## The loss
# $$L = -\frac{1}{N}\sum_{n\,:\,\mathrm{mask}_{n+1}} \log p(t_{n+1} \mid t_{\le n}),\qquad N = \sum_n \mathrm{mask}_{n+1}$$
#
# Here $t_{\le n}$ stays within its own sample. $N$ is counted over the **global batch**: if each micro-batch were averaged over its own $N$, a token would weigh more in a micro-batch
# of short answers. The trainer therefore weights the mean of each micro-batch by its number of masked tokens. The hidden states of tokens without a loss are dropped *before* the head, so no logits
# (129,280 per token in V3) are computed for them. Gate biases are not updated, because the expert loads of a few topics say little about balance. The MTP modules are not trained; their drafts are still verified, but accepted less often.


# %%
#| export sft
def sft_loss(
    model: Transformer, tokens_bs: Tensor, mask_bs: Tensor, cu_seqlens: Tensor
) -> LossOutput:
    """Compute the mean cross-entropy of the answers' tokens in packed rows of T + 1: Σ / N.

    mask_bs: the tokens to predict. cu_seqlens: of the samples in rows of the first T tokens.
    """
    x_bs = tokens_bs[:, :-1]
    y_n = tokens_bs[:, 1:].flatten()
    mask_n = mask_bs[:, 1:].flatten()
    h_1nd, routes = model.hidden_states(x_bs.reshape(1, -1), cu_seqlens=cu_seqlens)
    nll = linear_cross_entropy(h_1nd[0][mask_n], model.head.weight, y_n[mask_n])
    return LossOutput(nll / mask_n.sum(), [], nll.new_zeros(()), routes)


SFT_RECIPES = {
    "v3": replace(  # learning rates: §5.1; batch size and the rest are our choice
        TrainingRecipe(), steps=0, lr=5e-6, min_lr=1e-6, warmup_steps=0, decay_start=0.0,
        decay_end=1.0, final_start=1.1, start_batch_size=512, global_batch_size=512,
        bias_update_rate=0.0, mtp_weight=0.0, mtp_weight_end=0.0, balance_loss_coeff=0.0,
        weight_decay=0.0,
    ),
}  # fmt: skip
SFT_RECIPES["tiny"] = replace(
    SFT_RECIPES["v3"],
    seq_len=256,
    lr=3e-3,
    min_lr=6e-4,
    warmup_steps=10,
    start_batch_size=6,
    global_batch_size=6,
)

# %%
full = [*talk, {"role": "assistant", "content": "two"}]
rows = pack_samples(
    [render_conversation(talk[1:3], encode, SPECIAL_TOKENS)] * 3
    + [render_conversation(full, encode, SPECIAL_TOKENS)] * 2,
    60,
    SPECIAL_TOKENS.pad,
)
tokens_bs = torch.tensor(rows)
mask_bs = assistant_mask(tokens_bs, SPECIAL_TOKENS)
got = sft_loss(model, tokens_bs, mask_bs, sample_cu_seqlens(tokens_bs[:, :-1], SPECIAL_TOKENS))
want = []
for sample in [render_conversation(talk[1:3], encode, SPECIAL_TOKENS)] * 3 + [
    render_conversation(full, encode, SPECIAL_TOKENS)
] * 2:
    logp = model(torch.tensor([sample[:-1]]))[0].log_softmax(-1)
    speaks = assistant_mask(torch.tensor([sample]), SPECIAL_TOKENS)[0]
    want += [-logp[i - 1, t] for i, t in enumerate(sample) if speaks[i]]
torch.testing.assert_close(got.main, torch.stack(want).mean())
assert mask_bs[:, 1:].sum() == len(want)
print(f"{len(want)} of {tokens_bs.numel()} tokens carry the loss, {got.main:.3f} nats each")

# %% [markdown]
# ## Rejection sampling
# An expert that is right four times in five can still *teach* right answers only: sample $K$ answers, keep those that the rule rewards, and of them the
# shortest, since R1 is too verbose. If an answer is right with probability $p$, a problem is kept with probability
#
# $$1 - (1-p)^K$$
#
# Hard problems are therefore kept less often: distilled data are biased toward easy ones.


# %%
#| export sft
def rejection_sample(
    completions: Sequence[str], reward_b: Sequence[float], num_generations: int
) -> list[str | None]:
    """Keep the shortest completion with full reward of each group; None if there is none.

    A group is `num_generations` consecutive completions; full reward is 1 or more.
    """
    if len(completions) % num_generations:
        raise UserError(
            f"{len(completions)} completions cannot be cut into groups of {num_generations}: "
            "num_generations must divide their number"
        )
    accepted = []
    for start in range(0, len(completions), num_generations):
        group = range(start, start + num_generations)
        correct = [completions[i] for i in group if reward_b[i] >= 1]
        accepted.append(min(correct, key=len, default=None))
    return accepted


# %%
tries = ["two", "one and one is two", "three", "3", "four", "five"]
print(rejection_sample(tries, [1, 1, 0, 0, 0, 0], 3))
assert rejection_sample(tries, [1, 1, 0, 0, 0, 0], 3) == ["two", None]
chance = torch.rand(4000) < 0.4
accepted = [x is not None for x in rejection_sample(["x"] * 4000, chance.float().tolist(), 4)]
assert abs(sum(accepted) / 1000 - (1 - 0.6**4)) < 0.04

# %% [markdown]
# ## Experiment: an expert teaches
# `make align` repeats the report's procedure on the 5M model of [chapter 07](07_pretrain.ipynb), with sums of three numbers in place of
# olympiad problems. Four models are compared:
#
# - **Both forms**: trained on 3,797 sums worked out step by step after the system prompt "Think first, then answer.", and on 600 sums with the bare answer, among counting, spelling and open conversations.
#   One worked-out sum in twenty has no system prompt, so that the model sometimes thinks without one. It *can* work out a sum, but without the system prompt it mostly does not.
# - **Expert**: *both forms* after GRPO without the system prompt ([chapter 16](16_grpo.ipynb)).
# - **Distilled**: the pre-trained model, fine-tuned on the expert's shortest right answer out of four to each problem.
# - **Short answers**: the pre-trained model, fine-tuned on bare answers to all of these problems.

# %%
from dsv3_ref.viz.ablation import load_result

FOUND = load_result("align")["distillation"]
fig, ax = figure(1, 1, 8, 3)
by_height = sorted(FOUND.items(), key=lambda item: item[1]["greedy"])
label = 0.0
for (name, x), color in zip(by_height, COLORS):
    label = max(label + 0.11, x["greedy"])  # labels must not overlap
    ax.plot(x["length"], x["greedy"], "D", color=color, markersize=8)
    ax.annotate(
        name, (x["length"], x["greedy"]), (x["length"] + 0.8, label), va="center", color="black",
        arrowprops={"arrowstyle": "-", "color": GRAY, "lw": 0.6},
    )  # fmt: skip
    print(
        f"{name:28} {x['greedy']:5.1%} right ({x['sampled']:5.1%} if sampled), {x['length']:.1f} tokens"
    )
ax.set(
    xlabel="mean length of an answer (tokens)",
    ylabel="right on held-out sums",
    ylim=(0, 1.15),
    xlim=(12, 38),
    title="Length and accuracy: cost and gain of thinking",
)
show(fig)
assert FOUND["expert (after GRPO)"]["greedy"] > FOUND["both forms"]["greedy"] + 0.4
assert FOUND["distilled"]["greedy"] > FOUND["short answers"]["greedy"] + 0.2

# %% [markdown]
# The report's numbers for V2.5, 74.6 → 83.2 at 769 → 1510 tokens, show the same: twice the tokens, higher accuracy. The distilled model has never seen a reward and is given no system prompt,
# and yet it thinks. *Both forms* mostly answers directly without the system prompt, and it was trained on 600 short answers instead of 3,797, which likely explains why it scores below *short answers*. With the system prompt it is level with expert and
# distilled (81–87 %; one seed, 200 sums, ± 2.5 points). "Sampled" means four answers per sum at temperature 1.
#
# ## Play: how full is a row?
# Rows of 256 to 4,096 tokens with conversations in them (here longer ones are truncated): padded to the longest of a batch, or packed. Packing fills rows of any length. Padding wastes more when
# lengths differ more and batches are larger.


# %%
def fill(length: int = 4096, batch: int = 16, spread: float = 1.1):
    """Plot the fraction of text in padded batches and in packed rows."""
    rng = random.Random(1)
    sizes = [min(length, int(rng.lognormvariate(5.0, spread)) + 20) for _ in range(512)]
    cut = [sizes[i : i + batch] for i in range(0, 512, batch)]
    by_length = [sorted(sizes)[i : i + batch] for i in range(0, 512, batch)]
    rows = pack_samples([[0] * n for n in sizes], length, 1)
    shares = {
        "padded": sum(sizes) / sum(max(c) * len(c) for c in cut),
        "padded, sorted first": sum(sizes) / sum(max(c) * len(c) for c in by_length),
        "packed": sum(sizes) / (len(rows) * length),
    }
    fig, ax = figure(1, 1, 7, 2)
    ax.barh(list(shares), list(shares.values()), color=[GRAY, ORANGE, GREEN])
    for i, share in enumerate(shares.values()):
        ax.text(share + 0.01, i, f"{share:.1%}", va="center")
    ax.set(xlim=(0, 1.1), xlabel="fraction of computed tokens that is text")
    show(fig)


fill()
play(fill, length=[256, 512, 1024, 4096], batch=(4, 64, 4), spread=(0.3, 1.8, 0.1))

# %% [markdown]
# ## Exercises
# **1 · Compute.** An expert is right with probability $p$. How many samples does a problem need to be kept with probability at least $q$?


# %%
@checker
def check_tries(fn):
    """All K samples fail with probability (1 − p)^K: how large may it be? K is a whole number."""
    for p, q in ((0.5, 0.9), (0.1, 0.99), (0.8, 0.5), (0.5, 0.75)):
        k = fn(p, q)
        assert 1 - (1 - p) ** k >= q and (k == 1 or 1 - (1 - p) ** (k - 1) < q)


@checker
def check_weight(fn):
    """How many terms of the mean belong to the short answer, and how many are there in all?"""
    for short, long in ((30, 270), (50, 150)):
        assert abs(fn(short, long, "tokens") - short / (short + long)) < 1e-9
        assert fn(short, long, "answers") == 0.5


def lazy(tokens_bs):
    """Compute `assistant_mask` without looking at the user token."""
    out, on = [], False
    for token in tokens_bs[0].tolist():
        out.append(on)
        on = token == SPECIAL_TOKENS.assistant or (
            on and token not in (SPECIAL_TOKENS.bos, SPECIAL_TOKENS.eos)
        )
    return torch.tensor([out])


@checker
def check_apart(fn):
    """Which answer never ends with ∎?"""
    row = torch.tensor([fn()])
    assert not torch.equal(assistant_mask(row, SPECIAL_TOKENS), lazy(row))


def my_tries(p: float, q: float) -> int:
    return ...


check_tries(my_tries)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# import math
# def my_tries(p, q):
#     return math.ceil(math.log(1 - q) / math.log(1 - p))
# ```
# </details>
#
# **2 · Predict.** A batch holds one answer of 30 tokens and one of 270. What is the short one's weight in the loss if it is averaged over tokens, and if over answers?


# %%
def my_weight(short: int, long: int, over: str) -> float:
    return ...


check_weight(my_weight)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_weight(short, long, over):
#     return short / (short + long) if over == "tokens" else 0.5
# ```
# </details>
#
# **3 · Break.** `lazy` above ignores the user token: if every answer has an end token, begin and end suffice. Return a row (a list of tokens) for which it differs from `assistant_mask`.


# %%
def my_row() -> list[int]:
    return ...


check_apart(my_row)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_row():
#     t = SPECIAL_TOKENS
#     return [t.bos, t.user, 9, t.assistant, 10, t.user, 11, t.assistant, 12]
# ```
#
# Without an end token (in an answer that was truncated, for example) the mask extends into the next question, and the model would learn to ask it.
# </details>
#
# ## Scale-up
# 1.5 million conversations, two epochs; at, say, 1,500 tokens each:

# %%
from dsv3_ref.config import V3, count_params

tokens = 2 * 1.5e6 * 1500
print(f"{tokens / 1e9:.1f}B tokens, {tokens / 14.8e12:.2%} of pre-training")
print(f"{6 * count_params(V3).activated * tokens:.1e} FLOPs of products")

# %% [markdown]
# All of post-training cost 5K of 2,788K GPU hours (§1). SFT runs on the mesh of pre-training: `dsv3 sft --pp 16 --ep 64 --schedule dualpipe`. Each pipeline stage recovers the sample boundaries
# from the tokens that it has anyway, and the attention kernel ([chapter 10](10_triton.ipynb)) takes `cu_seqlens` directly, without padding.
