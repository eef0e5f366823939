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
# # 15 · Rewards: who says what is good?

# %% [markdown]
# ## Why
# Reinforcement learning optimizes whatever the reward measures, wanted or not. A rule that cannot be fooled is best, where one
# exists: a sum is right or wrong, a program passes its tests or does not. Most questions have no such rule, so a *model* must
# judge, and a model can be fooled. The *policy* (the model in training) then raises its reward without giving better answers, which is called **reward hacking**. The report's remedy is to let the judge **think before it scores**.
#
# Below we choose the best of $n$ answers to a sum by reward. One judge scores directly;
# the other first works out the sum. Both were trained on the same pairs, in which right answers usually also *sounded* sure.

# %%
import torch

from dsv3_ref.viz import COLORS, GREEN, GRAY, ORANGE, checker, figure, play, show
from dsv3_ref.viz.ablation import load_result

torch.manual_seed(0)
FOUND = load_result("rewards")

# %% [markdown]
# ## Paper
# §5.2.1, §5.3.4, §5.4.2:
#
# - **Rule-based** reward wherever a rule can check: mathematics with a final answer in a given format (in a box), code against
#   test cases. Such a reward is "resistant to manipulation or exploitation".
# - **Model-based** otherwise: free-form answers are compared with a ground truth if there is one; otherwise (creative writing) the
#   question and the answer alone are judged. The model is trained from the fine-tuned checkpoint ([chapter 14](14_sft_distill.ipynb)), on preference data with *not only the reward, but the chain of thought
#   that leads to it*, which mitigates reward hacking.
# - **Self-reward**: V3's own votes judge open questions, guided by a constitution (sentences that state what a good answer is). RewardBench 87.0; majority of six votes 89.6.
#
# Axes: `m` samples in one packed row of `n` tokens; `d` model; `k` votes.

# %%
#| export
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_ref.model import Transformer
from dsv3_ref.ops import linear_cross_entropy
from dsv3_ref.pretrain import LossOutput
from dsv3_ref.sft import SpecialTokens, sample_cu_seqlens, assistant_mask

# %% [markdown]
# ## A rule: the box
# "Give the final answer in a box" makes a free text checkable. The rule must be strict. *Two* boxes count as no answer, or a
# policy would soon box every candidate. The content of a box may contain balanced braces. A model that thinks first may box what it likes
# while it thinks; what counts follows `</think>`.
#
# $$r = [\text{exactly one box}] \cdot [\text{its content equals the truth}]$$


# %%
#| export
def final_answer(text: str) -> str:
    """Return what follows the last </think>; "" if the text ends while the model thinks."""
    thought, tag, rest = text.rpartition("</think>")
    answer = rest if tag else text
    return "" if "<think>" in answer else answer


def extract_boxed(text: str) -> str | None:
    """Return the content of the only \\boxed{…} of an answer; None for no box, several or no end.

    \\fbox{…} is a box too. Braces are balanced, and escaped ones are text.
    """
    answer = final_answer(text)
    starts = [match.end() for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", answer)]
    if len(starts) != 1:
        return None
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(answer, starts[0]):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return answer[starts[0] : match.start()].strip()
    return None


def has_think_format(text: str) -> bool:
    """Return whether a text is one `<think>…</think>`, then an answer with one box.

    The prompt may already have opened the thought, so that the text has only its end.
    """
    thought, tag, answer = text.strip().removeprefix("<think>").partition("</think>")
    is_single = bool(tag) and not re.search(r"</?think>", thought + answer)
    return is_single and extract_boxed(answer) is not None


# %% [markdown]
# A program stands in a fenced block, as in Markdown: at least three backticks or tildes, closed by as many, perhaps indented.
# As with boxes, only one program may be there. Blocks in other languages, such as a shell command or the output, are not programs.


# %%
#| export
FENCE = re.compile(r"([ \t]*+)(`{3,}+|~{3,}+)[ \t]*+([^`\n]*+)")
PYTHON = re.compile(r"\{?\.?(?:python|py)[\d.]*\b|$", re.IGNORECASE)


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """Return (info string, content) of the closed fenced blocks of a Markdown text.

    Content loses the indentation of its fence.
    """
    blocks: list[tuple[str, str]] = []
    fence: re.Match[str] | None = None
    lines: list[str] = []
    for line in text.replace("\r\n", "\n").split("\n"):
        if fence is None:
            fence, lines = FENCE.fullmatch(line), []
        elif re.fullmatch(rf"[ \t]*{fence[2][0]}{{{len(fence[2])},}}[ \t]*", line):
            blocks.append((fence[3].strip(), "".join(lines)))
            fence = None
        else:
            indent = min(len(fence[1]), len(line) - len(line.lstrip()))
            lines.append(line[indent:] + "\n")
    return blocks


def extract_code(text: str) -> str | None:
    """Return the only Python program in the fenced blocks of an answer; None for none or several.

    A block in another language does not count, nor does one without a language beside one that is
    marked as Python.
    """
    programs = [b for b in fenced_blocks(final_answer(text)) if PYTHON.match(b[0])]
    marked = [content for info, content in programs if info]
    unmarked = [content for info, content in programs if not info]
    candidates = marked or unmarked
    return candidates[0] if len(candidates) == 1 else None


# %%
assert extract_boxed(r"so \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
assert extract_boxed(r"\boxed{1} or \boxed{2}") is None and extract_boxed(r"\boxed{1") is None
assert extract_boxed(r"<think>perhaps \boxed{1}</think>\boxed {2}") == "2"
assert has_think_format(r"<think>1+1=2</think>\boxed{2}") and not has_think_format(
    r"<think>\boxed{2}</think>"
)
assert not has_think_format(r"<think>a</think><think>b</think>\boxed{2}")
assert (
    extract_code("So:\n```python\nprint(7)\n```\n") == "print(7)\n"
    and extract_code("print(7)") is None
)

# %% [markdown]
# Equal answers may be different strings: $\frac12$, 0.5 and 2/4 have one value. `dsv3_ref.verifiers.answers` compares numbers, lists, intervals
# and units exactly, and sympy compares expressions. An answer such as
# $9^{9^{9}}$ could keep sympy busy forever, so it runs in a separate process with a time limit (`dsv3_ref.verifiers.math_verifier`).

# %%
import time

from dsv3_ref.verifiers import answers, math_verifier

for answer, truth in ((r"\frac{1}{2}", "0.5"), ("x+1", "1+x"), ("(1, 2)", "(1,2)"), ("3", "4")):
    print(f"{answer:>12} = {truth:<6}", answers.answers_equal(answer, truth))
math_verifier.shared_verifier().seconds, start = 1.0, time.perf_counter()
assert not answers.answers_equal("9^{9^{9^{9}}}", "7")
print(f"{'9^9^9^9':>12} = 7      refused after {time.perf_counter() - start:.1f} s")

# %% [markdown]
# **Code** is graded by running it. The model that wrote it is *rewarded for passing*, so it may learn to cheat, and the code
# runs on our machine. `dsv3_ref.verifiers.sandbox` runs it in [bubblewrap](https://github.com/containers/bubblewrap) as an unprivileged user, without network, with limits on
# time, memory, processes, files and output. Expected results stay outside of the sandbox, where they are compared.

# %%
import shutil

from dsv3_ref.verifiers import sandbox
from dsv3_ref.verifiers import code_grader

GOOD = "def double(x):\n    return 2 * x"
CHEAT = "class All:\n    def __eq__(self, other):\n        return True\ndef double(x):\n    return All()"
LOOP = "def double(x):\n    while True:\n        pass"
cases = [code_grader.FunctionCase("double", (n,), 2 * n) for n in (1, 7)]
if shutil.which("bwrap"):
    quick = sandbox.Limits(seconds=3.0, cpu=1)
    for name, code in {"good": GOOD, "equal to everything": CHEAT, "endless": LOOP}.items():
        print(f"{name:>20}: {code_grader.count_passed(code, cases, quick)} of {len(cases)} cases")
    assert (
        code_grader.count_passed(GOOD, cases) == 2 and code_grader.count_passed(CHEAT, cases) == 0
    )
else:
    print("no code is run:", sandbox.BWRAP_MISSING)

# %% [markdown]
# ## A model: where is its score?
# A reward model is a language model with one more output. It needs no new matrix: the output head has a row for every token, including
# the padding token, which no text contains. The padding token's logit after the end of an answer is the reward. Like any reward head, it is a linear map of the last hidden state:
#
# $$r = h_{\mathrm{end}} \cdot W^{\mathrm{out}}_{\mathrm{pad}}\qquad (n,d) \to (m)$$
#
# A reward model is therefore a checkpoint like any other. It exports to Hugging Face, and it can still *generate text*, which its judgments require.


# %%
#| export
def reward_scores(
    h_nd: Tensor, head_wd: Tensor, cu_seqlens: Tensor, special_tokens: SpecialTokens
) -> Tensor:
    """Return the reward of each of m packed samples, read at its last token: (m,), fp32."""
    last_m = cu_seqlens[1:].long() - 1
    return (h_nd[last_m] @ head_wd[special_tokens.pad]).float()


# %% [markdown]
# **Pairs.** People (or rules) decide which of two answers is better, not by how much. In the Bradley–Terry model each answer has a strength $r$. The
# probability that the first is preferred is a logistic function of the difference, and its negative log-likelihood is the loss:
#
# $$P(a \succ b) = \sigma(r_a - r_b),\qquad L = -\log \sigma(r_a - r_b),\qquad \frac{\partial L}{\partial r_a} = -\big(1 - P(a \succ b)\big)$$
#
# A pair that is already separated has almost no gradient. The loss does not fix the zero of $r$. [GRPO](16_grpo.ipynb) compares answers to one question, so a constant offset of $r$ would cancel. We reward $\sigma(r)$, which lies between 0 and 1 like all
# our rewards; there the offset still determines the slope.


# %%
#| export
def bradley_terry(reward_m: Tensor) -> tuple[Tensor, Tensor]:
    """Compute −log σ(r_chosen − r_rejected) and whether r_chosen > r_rejected, each (m/2,).

    Rewards alternate: chosen, rejected, chosen, …
    """
    chosen, rejected = reward_m.view(-1, 2).unbind(1)
    return -F.logsigmoid(chosen - rejected), chosen > rejected


# %%
r_m = torch.tensor([2.0, 0.0, -1.0, 1.0], requires_grad=True)
loss, agrees = bradley_terry(r_m)
loss.sum().backward()
p = torch.sigmoid(torch.tensor([2.0, -2.0]))
assert torch.allclose(r_m.grad.view(2, 2)[:, 0], -(1 - p)) and agrees.tolist() == [True, False]
assert torch.allclose(bradley_terry(r_m + 5)[0], loss)  # only differences count
print(
    "loss",
    [f"{x:.2f}" for x in loss.tolist()],
    "gradient",
    [f"{x:+.2f}" for x in r_m.grad.tolist()],
)

# %% [markdown]
# ## The chain of thought that leads to the reward
# The judge writes *before* it scores. In the format of [chapter 14](14_sft_distill.ipynb) this is one more turn:
#
# `…<｜User｜>`question`<｜Assistant｜>`answer`<｜end▁of▁sentence｜><｜User｜>`judge`<｜Assistant｜>`judgment`<｜end▁of▁sentence｜>` $\to r$
#
# If there is a ground truth, the judge's turn states it. (A judge that scores directly with a reference is read at the end of that turn.) Training has
# two losses: Bradley–Terry at the end token, and the negative log-likelihood of the *judgments* $j$ with a weight $\lambda = 0.1$. The answers themselves are not trained on, because half of them are bad.
#
# $$L = -\log\sigma(r_a - r_b) - \tfrac{\lambda}{2} \big(\log p(j_a) + \log p(j_b)\big)$$
#
# The log-likelihood is a sum over the tokens of a judgment, not a mean over the tokens of a batch, so the gradient does not depend on how the batch is split into micro-batches.


# %%
#| export
JUDGE_PROMPT = "Is this right? Work it out."


def judge_prompt(reference: str = "") -> str:
    """Return the turn that requests a judgment, with the right answer if one is given."""
    return f"{JUDGE_PROMPT} It should be {reference}." if reference else JUDGE_PROMPT


def judgment_mask(tokens_1n: Tensor, special_tokens: SpecialTokens) -> Tensor:
    """Mark judgments: the last answer of each sample that holds several answers, (1, n)."""
    cu_seqlens = sample_cu_seqlens(tokens_1n, special_tokens).long()
    length_m = cu_seqlens.diff()
    count_n = (tokens_1n[0] == special_tokens.assistant).long().cumsum(0)
    before_m = F.pad(count_n, (1, 0))[cu_seqlens[:-1]]  # answers of earlier samples
    answer_n = count_n - before_m.repeat_interleave(length_m)  # 1 in a sample's first answer, …
    last_m = count_n[cu_seqlens[1:] - 1] - before_m
    last_n = last_m.repeat_interleave(length_m)
    return assistant_mask(tokens_1n, special_tokens) & (answer_n == last_n) & (last_n >= 2)


class PreferenceOutput(NamedTuple):
    """The loss of a packed row of pairs, and the rewards of its samples."""

    losses: LossOutput
    reward_m: Tensor


def judgment_loss(
    h_kd: Tensor, head_wd: Tensor, y_k: Tensor, num_samples: int, judgment_weight: float
) -> Tensor:
    """Compute −λ/m log p of the tokens of judgments in m samples, the last term of the loss.

    h_kd: the hidden states that predict the tokens; y_k: the tokens.
    """
    if not (judgment_weight and len(y_k)):
        return h_kd.new_zeros(())
    return judgment_weight * linear_cross_entropy(h_kd, head_wd, y_k) / num_samples


def preference_loss(
    model: Transformer, tokens_1n: Tensor, mask_1n: Tensor, cu_seqlens: Tensor,
    special_tokens: SpecialTokens, judgment_weight: float,
) -> PreferenceOutput:  # fmt: skip
    """Average −log σ(r_chosen − r_rejected) − λ/2 log p(judgments) over consecutive pairs.

    mask_1n: the tokens of judgments. cu_seqlens: 0 and the end of each sample.
    """
    h_1nd, routes = model.hidden_states(tokens_1n, cu_seqlens=cu_seqlens)
    head_wd, mask_n = model.head.weight, mask_1n[0, 1:]
    reward_m = reward_scores(h_1nd[0], head_wd, cu_seqlens, special_tokens)
    h_kd, y_k = h_1nd[0, :-1][mask_n], tokens_1n[0, 1:][mask_n]
    loss = bradley_terry(reward_m)[0].mean()
    loss = loss + judgment_loss(h_kd, head_wd, y_k, len(reward_m), judgment_weight)
    return PreferenceOutput(LossOutput(loss, [], loss.new_zeros(()), routes), reward_m)


# %%
from dataclasses import replace

from dsv3_ref.config import TINY

SPECIAL_TOKENS = SpecialTokens(*range(5))
bos, eos, _, user, assistant = SPECIAL_TOKENS
right = [bos, user, 10, 11, assistant, 21, eos, user, 9, assistant, 30, 31, eos]
wrong = [bos, user, 10, 11, assistant, 22, 23, eos, user, 9, assistant, 30, 32, eos]
pair_1n = torch.tensor([right + wrong])
spoken = pair_1n[judgment_mask(pair_1n, SPECIAL_TOKENS)].tolist()
assert spoken == [30, 31, eos, 30, 32, eos]
model = Transformer(replace(TINY, n_layers=2, vocab_size=64))
for sample in (right, wrong):  # a score depends on its own sample only
    h_1sd = model.hidden_states(torch.tensor([sample]))[0]
    alone = reward_scores(
        h_1sd[0], model.head.weight, torch.tensor([0, len(sample)]), SPECIAL_TOKENS
    )
    print(f"scored alone {alone.item():+.4f}")
judgment_1n = judgment_mask(pair_1n, SPECIAL_TOKENS)
cu_seqlens = sample_cu_seqlens(pair_1n, SPECIAL_TOKENS)
both = preference_loss(model, pair_1n, judgment_1n, cu_seqlens, SPECIAL_TOKENS, 0.0)
print("in a pair   ", [f"{x:+.4f}" for x in both.reward_m.tolist()])
assert abs(both.reward_m[1] - alone).item() < 1e-4
both.losses.main.backward()
assert (
    model.head.weight.grad[SPECIAL_TOKENS.pad].norm() > 0
)  # the row of the padding token learns to score

# %% [markdown]
# ## Calibration
# Does $\sigma(r_a - r_b) = 0.8$ mean that the model is right in 80 % of cases? To check, sort pairs by the claimed probability and count. A model may agree often and still be
# overconfident, and RL depends on the magnitude of $r$.


# %%
#| export
def calibration(claim_n: Tensor, right_n: Tensor, bins: int = 5) -> Tensor:
    """Tabulate pairs by claimed P(a ≻ b): mean claim, accuracy and size of each bin, (bins, 3).

    Each pair counts from the side that the model prefers, so claims lie between ½ and 1. The means
    of an empty bin are NaN.
    """
    confidence_n = torch.maximum(claim_n, 1 - claim_n)
    hit_n = torch.where(claim_n >= 0.5, right_n.float(), 1 - right_n.float())
    bin_n = ((confidence_n - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    rows = []
    for i in range(bins):
        in_bin_n = bin_n == i
        means = confidence_n[in_bin_n].mean().item(), hit_n[in_bin_n].mean().item()
        rows.append([*means, int(in_bin_n.sum())])
    return torch.tensor(rows)


# %%
claim_n = torch.rand(20_000)
calibrated = calibration(claim_n, torch.rand(20_000) < claim_n)
overconfident = calibration(torch.sigmoid(3 * torch.logit(claim_n)), torch.rand(20_000) < claim_n)
assert (calibrated[:, 0] - calibrated[:, 1]).abs().max() < 0.03
assert overconfident[-1, 0] - overconfident[-1, 1] > 0.05
for name, table in (("calibrated", calibrated), ("overconfident", overconfident)):
    print(name, [f"claims {c:.2f}, right {r:.2f}" for c, r, _ in table.tolist()])

# %% [markdown]
# ## Votes
# Where there is no ground truth, the model itself votes. A constitution of a few sentences defines a good answer. The model is asked $k$ times at temperature 1, and the share of
# yes is the reward (`dsv3 rl --votes`). If votes were independent and each right with probability $p > \frac12$, the majority would be right more often (Condorcet):
#
# $$P_k = \sum_{j > k/2} \binom{k}{j} p^j (1-p)^{k-j} \;+\; \tfrac12 \binom{k}{k/2} p^{k/2}(1-p)^{k/2}\,[k\ \text{even}]$$
#
# They are not independent: all votes come from the same model, so its errors are correlated.
#
# Two related metrics evaluate answers instead of judgments: *maj@k* measures whether the most frequent of $k$ final answers is right, *pass@k* whether any of them is. From $n \ge k$ answers,
# of which $c$ are right, the unbiased estimate of pass@k is $1 - \binom{n-c}{k} / \binom{n}{k}$: of all choices of $k$ answers, the share that contains a right one.


# %%
#| export
CONSTITUTION = (
    "An answer is good if it is true, keeps to the question, and says no more than needed."
)


def vote_prompt(question: str, answer: str) -> str:
    """Return the turn that asks a model for its vote on an answer."""
    return f"{CONSTITUTION}\nQuestion: {question}\nAnswer: {answer}\nIs it good, yes or no?"


def majority_accuracy(accuracy: float, k: int) -> float:
    """Compute how often the majority of k independent votes is right; a tie counts ½."""
    total = 0.0
    for j in range(k + 1):  # right votes
        chance = math.comb(k, j) * accuracy**j * (1 - accuracy) ** (k - j)
        if 2 * j > k:
            total += chance
        elif 2 * j == k:
            total += chance / 2
    return total


def vote_reward(yes_nk: Tensor, k: int) -> Tensor:
    """Return the share of yes in the first k votes on each answer, (n,): the self-reward."""
    return yes_nk[:, :k].float().mean(1)


def majority_agreement(yes_nk: Tensor, good_n: Tensor, k: int) -> float:
    """Return how often the majority of k votes agrees with the truth; a tie counts ½."""
    share_n = vote_reward(yes_nk, k)
    right_n = torch.where(share_n == 0.5, 0.5, ((share_n > 0.5) == good_n).float())
    return right_n.mean().item()


def pass_at_k(num_correct: int, num_samples: int, k: int) -> float:
    """Estimate pass@k without bias from n samples of which c are correct: 1 − C(n−c, k)/C(n, k)."""
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority(answers: Sequence[str | None]) -> str | None:
    """Return the most frequent of k final answers (maj@k), the earliest of a tie; ignore None."""
    votes = [answer for answer in answers if answer is not None]
    return max(votes, key=lambda x: (votes.count(x), -votes.index(x)), default=None)


# %%
for p in (0.45, 0.7, 0.9):
    good_n = torch.rand(20_000) < 0.5
    yes_nk = torch.where(torch.rand(20_000, 9) < p, good_n[:, None], ~good_n[:, None])
    for k in (1, 2, 6, 9):
        assert abs(majority_agreement(yes_nk, good_n, k) - majority_accuracy(p, k)) < 0.015
    print(
        f"a vote is right with {p:.0%}: of 1, 6, 9 votes {[f'{majority_accuracy(p, k):.0%}' for k in (1, 6, 9)]}"
    )
answers = ["7", "5", "7", None, "7", "5"]
print("maj@6 of", answers, "→", majority(answers), "· two of six right: pass@3", pass_at_k(2, 6, 3))
assert majority(answers) == "7" and pass_at_k(2, 6, 3) == 0.8

# %% [markdown]
# ## Experiment: can the judge be fooled?
# `python -m dsv3_ref.studies.reward` trains three judges from the fine-tuned 5M model on 3,000 pairs of answers to sums. One answer of each pair is right. In a random 70 % of the
# pairs the right answer also ends with "I am quite sure of it."; independently, so does the wrong one in 30 %. The judges are **direct** (score only), **cot** (chain of thought: work
# out the sum, write the result and the given number side by side and a verdict, then score), and **cot with reference** (the judge's turn also states the right answer). The candidates of the right plot are synthetic: right with probability 0.3 and,
# independently, sure with probability ½.

# %%
judges = FOUND["judges"]
fig, axes = figure(1, 2, 9, 3)
kinds = list(next(iter(judges.values()))["agreement"])
for i, (name, x) in enumerate(judges.items()):
    at = [k + 0.26 * (i - 1) for k in range(len(kinds))]
    axes[0].bar(at, list(x["agreement"].values()), width=0.24, color=COLORS[i], label=name)
    n = [int(k) for k in x["best of"]]
    right = [row["right"] for row in x["best of"].values()]
    axes[1].plot(n, right, "o-", color=COLORS[i], label=name)
    print(f"{name:15}", {k: f"{v:.0%}" for k, v in x["agreement"].items()},
          f"best of {n[-1]}: {right[-1]:.0%} right, {x['best of'][str(n[-1])]['sure']:.0%} sure, "
          f"reward {x['best of']['1']['reward']:.1f} → {x['best of'][str(n[-1])]['reward']:.1f}")  # fmt: skip
    for k, share in zip(at, x["agreement"].values()):
        if share < 0.05:
            axes[0].text(k, 0.02, f"{share:.0%}", ha="center", color=COLORS[i])
axes[0].axhline(0.5, color=GRAY, lw=1)
axes[0].set(xticks=range(len(kinds)), xticklabels=[k.replace(" sounds", "\nsounds") for k in kinds],
            ylabel="agreement", ylim=(0, 1.05), title="Held-out pairs, by who sounds sure")  # fmt: skip
axes[1].set(xscale="log", xticks=n, xticklabels=n, xlabel="answers to choose from", ylim=(0, 1.05),
            ylabel="accuracy of the chosen answer", title="Best of n by reward")  # fmt: skip
axes[1].legend(fontsize=8)
show(fig)
direct, thinking = judges["direct"], judges["cot"]
assert thinking["agreement"]["wrong sounds sure"] > direct["agreement"]["wrong sounds sure"] + 0.3
assert thinking["best of"]["16"]["right"] > direct["best of"]["16"]["right"] + 0.3

# %% [markdown]
# The direct judge cannot add, so it learned the only feature that it could: confidence. With more candidates the reward of the chosen answer rises, and from 8 answers on every chosen answer sounds
# sure. Its accuracy falls instead of rising (36 to 20 %; 200 sums, ± 3 points). This is reward hacking: the score rises and no longer measures correctness. The judge that works out the sum is more robust, but not
# immune: 80 % of its chosen answers sound sure, where 50 % would be chance, and from 8 to 16 answers its accuracy does not rise. With the reference, accuracy rises with every doubling.
#
# **A chain of thought alone is not enough.** In an earlier trial (LOG.md) *nine* of ten right answers had the phrase. For a sum of 12 and an answer of 16 the thinking judge wrote "12 16 **right**": it worked out the sum
# and still followed the phrase. There the phrase alone gave 90 % agreement, here 70 %. Chains of thought help only if the score has to depend on them.

# %%
fig, axes = figure(1, 2, 9, 2.8)
for i, (name, x) in enumerate(judges.items()):
    table = torch.tensor(x["calibration"])
    table = table[table[:, 2] > 20]
    axes[0].plot(table[:, 0], table[:, 1], "o-", color=COLORS[i], label=name)
axes[0].plot([0.5, 1], [0.5, 1], color=GRAY, lw=1)
axes[0].set(xlabel="claimed P(better)", ylabel="right", title="Calibration", ylim=(0.3, 1.03))
v = FOUND["votes"]
ks = range(1, len(v["agreement"]) + 1)
axes[1].plot(ks, v["independent"], color=GRAY, label="independent votes (Condorcet)")
axes[1].plot(ks, v["agreement"], "o-", color=GREEN, label="votes of one model")
axes[1].set(
    xlabel="votes k",
    ylabel="the majority is right",
    title=f"One vote is right: {v['one vote']:.0%}",
)
for ax in axes:
    ax.legend(fontsize=8)
show(fig)

# %% [markdown]
# Left (bins of more than 20 pairs): below the line a judge is overconfident. Where one answer sounds sure, the direct judge claims 85 %, which matches its training data (49 of 58 such pairs). In our held-out pairs sounding sure is random, and
# the judge is right half of the time: calibration holds only on the training distribution. The thinking judges almost always claim nearly 100 %, and are right in 93 % and 98 %.
#
# Right: open questions. The 5M model was trained to vote yes on a president's sentence and no on one that is off-topic, shuffled or repetitive, and votes up to nine times on
# 600 held-out answers. The votes share one model and therefore most of their errors, so a majority gains far less than independent votes would (gray, computed from the mean of all votes). In the report, too, six votes gain 2.6 points, not ten.
#
# ## Play: how many votes?


# %%
def assembly(p: float = 0.7, k: int = 6, shared: float = 0.3):
    """Plot the accuracy of a majority of k votes, some of which repeat the first."""
    g = torch.Generator().manual_seed(0)
    good_n = torch.rand(4000, generator=g) < 0.5
    own = torch.rand(4000, 15, generator=g) < p
    repeat = torch.rand(4000, 15, generator=g) < shared
    hit_nk = torch.where(repeat, own[:, :1], own)
    yes_nk = torch.where(hit_nk, good_n[:, None], ~good_n[:, None])
    ks = range(1, 16)
    fig, ax = figure(1, 1, 7, 2.4)
    ax.plot(ks, [majority_accuracy(p, j) for j in ks], color=GRAY, label="independent")
    ax.plot(
        ks,
        [majority_agreement(yes_nk, good_n, j) for j in ks],
        color=GREEN,
        label=f"{shared:.0%} repeat",
    )
    ax.axvline(k, color=ORANGE, lw=1)
    ax.set(
        xlabel="votes",
        ylabel="majority is right",
        ylim=(0.3, 1.02),
        title=f"a vote is right with {p:.0%}",
    )
    ax.legend()
    show(fig)


assembly()
play(assembly, p=(0.4, 0.95, 0.05), k=(1, 15, 1), shared=(0.0, 1.0, 0.1))

# %% [markdown]
# ## Exercises
# **1 · Compute.** A reward model gives $r_a = 2$ and $r_b = 0.5$. With what probability is $a$ preferred, and what is $\partial L/\partial r_a$ of the pair?


# %%
@checker
def check_chance(fn):
    """Bradley–Terry and its derivative are above: only the difference counts; the sign is minus."""
    for a, b in ((2.0, 0.5), (-1.0, 3.0)):
        p = 1 / (1 + math.exp(b - a))
        chance, pull = fn(a, b)
        assert abs(chance - p) < 1e-9 and abs(pull + (1 - p)) < 1e-9


@checker
def check_even(fn):
    """Which outcomes are ties, how likely are they, and who decides them?"""
    assert all(abs(fn(p) - majority_accuracy(p, 2)) < 1e-9 for p in (0.3, 0.6, 0.9))


@checker
def check_cheat(fn):
    """Put the truth in one box and another number in a second one."""
    for truth in ("7", "-3"):
        text = fn(truth)
        boxes = set(re.findall(r"\\boxed\{(.*?)\}", text))
        assert truth in boxes and len(boxes) > 1 and extract_boxed(text) is None


def my_chance(a: float, b: float) -> tuple[float, float]:
    return ...


check_chance(my_chance)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_chance(a, b):
#     p = 1 / (1 + math.exp(b - a))
#     return p, -(1 - p)
# ```
#
# 0.82 and −0.18.
# </details>
#
# **2 · Predict.** How often is the majority of *two* independent votes right, if ties are decided at random?


# %%
def my_even(p: float) -> float:
    return ...


check_even(my_even)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_even(p):
#     return p * p + p * (1 - p)  # = p: the second vote does not help
# ```
# </details>
#
# **3 · Break.** Suppose a rule rewarded an answer whenever *any* box contains the truth. Write the answer that a policy would learn to give when it is unsure between several numbers, one of them right.


# %%
def my_cheat(truth: str) -> str:
    return ...


check_cheat(my_cheat)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_cheat(truth):
#     return "".join(f"\\boxed{{{n}}}" for n in (6, truth, 8))
# ```
# </details>
#
# ## Scale-up
# A judge of V3's size that writes 500 tokens about each of 512 answers generates a quarter of a million tokens per step, an eighth of what the policy itself generates in [chapter 16](16_grpo.ipynb). Rules cost almost nothing and cannot be persuaded.

# %%
from dsv3_ref.config import V3, count_params

answers_, thought = 512, 500
print(
    f"{answers_ * thought:,} tokens of judgments per step, {2 * count_params(V3).activated * answers_ * thought:.1e} FLOPs"
)
print(f"the reward itself: one dot product with a row of {V3.dim:,} numbers per answer")
