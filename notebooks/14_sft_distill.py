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
# A pre-trained model continues texts. Asked a question, it may well write three more questions. Supervised fine-tuning (SFT)
# shows it conversations and lets it learn **one side** of them. The data are precious: V3 read 14.8 trillion tokens and
# was then shown 1.5 million conversations. Two things would waste them. Conversations are of every length, and rows padded to the
# longest one compute mostly padding; and a loss on everything would teach the model to ask as users do.

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
    xlabel="tokens of a conversation",
    ylabel="conversations",
    title=f"padded in batches of 16: {sum(lengths) / padded:.0%} of what is computed is text",
)
show(fig)

# %% [markdown]
# ## Paper
# §5.1, §5.4.1:
#
# - 1.5 million conversations of many domains, two epochs, learning rate by a cosine from $5\cdot10^{-6}$ to $10^{-6}$.
# - A row is **packed** from several samples, which are **masked from each other**.
# - Reasoning is distilled. R1, a model trained to reason at length, is right more often and says too much. For each domain
#   an **expert model** is made by SFT and RL, from two forms of each instance: ⟨problem, original response⟩ and ⟨system prompt,
#   problem, R1 response⟩; the system prompt asks for reflection and verification. RL then mixes both patterns, *even where no system
#   prompt is given*.
# - The expert's answers are filtered by **rejection sampling**, and the final model learns from what remains.
# - Price and gain, on V3's predecessor V2.5: MATH-500 74.6 → 83.2, mean length 769 → 1510 tokens.
#
# Axes: `b` rows, `s` positions, `n` all of them, `m` samples, `w` words.

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
# Four special tokens carry the form, a fifth fills rows; everything else is text:
#
# `<｜begin▁of▁sentence｜>`system`<｜User｜>`question`<｜Assistant｜>`answer`<｜end▁of▁sentence｜><｜User｜>`…
#
# A conversation that ends with a question is followed by the token after which the model speaks. Text is encoded so that it
# can never contain a special token: a user who *types* `<｜Assistant｜>` sends thirteen plain characters, and cannot put words into the model's mouth.


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
    """Render a conversation as tokens; after a final question follows the assistant token.

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
        raise UserError(f'turn {i + 1} is not a role with a text: write {{"role", "content"}}')
    return turn.get("role")


# %%
# ⌂ begins, ∎ ends, · fills
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
# Since no text can produce a special token, a row of tokens describes itself: the model speaks after its token up to and **including** the
# end, which it must learn to say. With $a_s$ the place of the last assistant token *before* $s$ and $o_s$ that of the last other special token,
#
# $$\mathrm{mask}_s = [\,a_s > o_s\,]\qquad (b,s) \to (b,s)$$
#
# and samples begin at each begin token. No mask has to be stored, shuffled, sent to another rank or kept in step with its tokens.


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
    """Return 0, then where each sample ends if all rows are laid end to end: (m + 1,), int32."""
    is_start_bs = tokens_bs == special_tokens.bos
    is_start_bs[:, :1] = True  # a row begins with a sample, whatever its first token is
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
print("bounds of samples", sample_cu_seqlens(row_1s, SPECIAL_TOKENS).tolist())
assert spell(row_1s[assistant_mask(row_1s, SPECIAL_TOKENS)]) == "four ∎ two ∎ four ∎"

# %% [markdown]
# ## Packing
# Whole samples, none cut, into rows of one length: bin packing. *First fit, longest first* is a few lines and wastes little.
# What is left of a row is padding after the last sample, which causality hides.


# %%
#| export sft
def pack_samples(samples: Sequence[list[int]], length: int, pad: int) -> list[list[int]]:
    """Pack whole samples into rows of `length` tokens: first fit, longest first."""
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
# **Invisible to each other.** Samples in one row share a row and nothing else: positions restart (`Rope.from_cu_seqlens`, chapter 02), attention ends at their
# borders (`varlen_attention`, chapter 03), and everything else in the model works token by token. So it can be tested: change one
# sample, and the states of the others must not move (but for the last digit: an expert that now serves other tokens too adds up its products in
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
assert (before - after)[7 + 1 : 19].abs().amax(1).min() > 0.01  # every token of the changed one
torch.testing.assert_close(before, alone, atol=1e-5, rtol=0)
print(f"the others' states moved by {(before - after)[others].abs().max():.0e}")

# %% [markdown]
# ## The loss
# $$L = -\frac{1}{N}\sum_{n\,:\,\mathrm{mask}_{n+1}} \log p(t_{n+1} \mid t_{\le n}),\qquad N = \sum_n \mathrm{mask}_{n+1}$$
#
# ($t_{\le n}$ within its own sample.) $N$ is counted over the **global batch**: averaging each micro-batch by its own $N$ would let a token of a short answer weigh more when it happens
# to lie among other short ones. So the trainer weighs the mean of each micro-batch by its `num_loss_tokens`. The hidden states of unsaid tokens are dropped *before* the head: no logits, 129,280 numbers each in V3,
# are computed for tokens without a loss. Gate biases are left as they are (the loads of a few topics say nothing about balance), and so are the MTP modules; their drafts stay correct, if accepted less often.


# %%
#| export sft
def num_loss_tokens(tokens_bs: Tensor, special_tokens: SpecialTokens) -> int:
    """Count N, the predicted tokens of rows of T + 1 that carry the loss."""
    return int(assistant_mask(tokens_bs, special_tokens)[:, 1:].sum())


def sft_loss(model: Transformer, tokens_bs: Tensor, special_tokens: SpecialTokens) -> LossOutput:
    """Compute the cross-entropy of the answers in packed rows of T + 1 tokens: Σ / N."""
    x_bs = tokens_bs[:, :-1]
    y_n = tokens_bs[:, 1:].flatten()
    mask_n = assistant_mask(tokens_bs, special_tokens)[:, 1:].flatten()
    cu_seqlens = sample_cu_seqlens(x_bs, special_tokens)
    h_1nd, routes = model.hidden_states(x_bs.reshape(1, -1), cu_seqlens=cu_seqlens)
    nll = linear_cross_entropy(h_1nd[0][mask_n], model.head.weight, y_n[mask_n])
    return LossOutput(nll / mask_n.sum(), [], nll.new_zeros(()), routes)


SFT_RECIPES = {
    "v3": replace(  # §5.1; batch and the rest are our choice
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
got = sft_loss(model, tokens_bs, SPECIAL_TOKENS)
want = []
for sample in [render_conversation(talk[1:3], encode, SPECIAL_TOKENS)] * 3 + [
    render_conversation(full, encode, SPECIAL_TOKENS)
] * 2:
    logp = model(torch.tensor([sample[:-1]]))[0].log_softmax(-1)
    speaks = assistant_mask(torch.tensor([sample]), SPECIAL_TOKENS)[0]
    want += [-logp[i - 1, t] for i, t in enumerate(sample) if speaks[i]]
torch.testing.assert_close(got.main, torch.stack(want).mean())
assert num_loss_tokens(tokens_bs, SPECIAL_TOKENS) == len(want)
print(f"{len(want)} of {tokens_bs.numel()} tokens carry the loss, {got.main:.3f} nats each")

# %% [markdown]
# ## Rejection sampling
# An expert that is right four times in five can still *teach* only right answers: ask it $K$ times, keep what the rule rewards, and of that the
# shortest, since R1's fault was to say too much. With chance $p$ of a right answer, a problem is kept with chance
#
# $$1 - (1-p)^K$$
#
# so hard problems are kept less often: distilled data lean to the easy.


# %%
#| export sft
def rejection_sample(
    completions: Sequence[str], reward_b: Sequence[float], num_generations: int
) -> list[str | None]:
    """Keep the shortest completion with full reward of each group; None where none has it.

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
# `make align` does to the 5M model of [chapter 07](07_pretrain.ipynb) what the report did to V3, with sums of three numbers in the place of
# olympiad problems. **Both forms**: 3,797 sums worked out step by step after the system prompt "Think first, then answer." (one in twenty of them without it, so that thinking without being told to is possible at all),
# and 600 sums with the bare answer, among counting, spelling and open conversations. After that the model *can* work a sum out, and without the system prompt mostly does not. **Expert**:
# GRPO without the system prompt ([chapter 16](16_grpo.ipynb)). **Distilled**: the pre-trained model again, taught only the expert's shortest right answer of
# four to each problem. **Short answers**: the pre-trained model, taught bare answers to all of these problems.

# %%
from dsv3_ref.viz.ablation import load_result

FOUND = load_result("align")["distillation"]
fig, ax = figure(1, 1, 8, 3)
by_height = sorted(FOUND.items(), key=lambda item: item[1]["greedy"])
label = 0.0
for (name, x), color in zip(by_height, COLORS):
    label = max(label + 0.11, x["greedy"])  # names must not lie on each other
    ax.plot(x["length"], x["greedy"], "D", color=color, markersize=8)
    ax.annotate(
        name, (x["length"], x["greedy"]), (x["length"] + 0.8, label), va="center", color="black",
        arrowprops={"arrowstyle": "-", "color": GRAY, "lw": 0.6},
    )  # fmt: skip
    print(
        f"{name:28} {x['greedy']:5.1%} right ({x['sampled']:5.1%} if drawn), {x['length']:.1f} tokens"
    )
ax.set(
    xlabel="mean length of an answer, tokens",
    ylabel="right on held-out sums",
    ylim=(0, 1.15),
    xlim=(12, 38),
    title="Length against accuracy: what thinking costs, and buys",
)
show(fig)
assert FOUND["expert (after GRPO)"]["greedy"] > FOUND["both forms"]["greedy"] + 0.4
assert FOUND["distilled"]["greedy"] > FOUND["short answers"]["greedy"] + 0.2

# %% [markdown]
# The report's numbers for V2.5, 74.6 → 83.2 at 769 → 1510 tokens, are the same picture: twice the tokens, more right. The distilled model was told no rule and given no system prompt,
# and thinks. Without the system prompt *both forms* mostly answers at once, and of short answers it saw 600, not 3,797: likely why it is behind *short answers*. Asked to think it is level with expert and
# distilled (81–87 %; one seed, 200 sums, ± 2.5 points). "Drawn" are four answers a sum at temperature 1.
#
# ## Play: how full is a row?
# Rows of 256 to 4,096 tokens, filled with conversations (longer ones are cut in this toy): padded to the longest of a batch, or packed. Packing fills rows of any length; padding wastes more, the more
# the lengths differ and the larger the batch is.


# %%
def fill(length: int = 4096, batch: int = 16, spread: float = 1.1):
    """Share of text in padded batches and in packed rows."""
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
    ax.set(xlim=(0, 1.1), xlabel="share of what is computed that is text")
    show(fig)


fill()
play(fill, length=[256, 512, 1024, 4096], batch=(4, 64, 4), spread=(0.3, 1.8, 0.1))

# %% [markdown]
# ## Exercises
# **1 · Compute.** An expert is right with chance $p$. How many tries does a problem need, for it to be kept with chance at least $q$?


# %%
@checker
def check_tries(fn):
    """All K tries fail with chance (1 − p)^K: how large may that be? K is a whole number."""
    for p, q in ((0.5, 0.9), (0.1, 0.99), (0.8, 0.5), (0.5, 0.75)):
        k = fn(p, q)
        assert 1 - (1 - p) ** k >= q and (k == 1 or 1 - (1 - p) ** (k - 1) < q)


@checker
def check_weight(fn):
    """How many terms of the mean are its own, and how many are there?"""
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
    """Who never said ∎?"""
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
# **2 · Predict.** A batch holds one answer of 30 tokens and one of 270. What is the short one's share of the loss if it averages over tokens, and if over answers?


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
# **3 · Break.** `lazy` above does not look at the user token: if every answer ends, begin and end suffice. Return a row (a list of tokens) in which it and `assistant_mask` differ.


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
# An answer that never ended (cut for its length, say) runs on into the next question, and the model would learn to ask it.
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
# Post-training as a whole cost 5K of 2,788K GPU hours (§1). It runs on the mesh of pre-training: `dsv3 sft --pp 16 --ep 64 --schedule dualpipe`. A stage finds the borders of samples
# in the tokens that it holds anyway, and attention's kernel ([chapter 10](10_triton.ipynb)) takes the ends as they are, without padding.
