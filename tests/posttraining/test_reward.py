"""The objective of a reward model beside each pair by itself, and the options of `dsv3 reward`."""

from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dsv3_ref.config import TINY
from dsv3_ref.data.conversations import PairFormat
from dsv3_ref.data.packing import flag_sample
from dsv3_ref.posttraining.reward import (
    PreferenceObjective,
    RewardConfig,
    RewardTask,
    concat_samples,
)
from dsv3_ref.sft import SpecialTokens
from dsv3_ref.training.objective import ALL_TOKENS

VOCAB, DIM = 11, 6
WEIGHT = 0.3
TOKENS = SpecialTokens(bos=0, eos=1, pad=2, user=3, assistant=4)
# pairs of (tokens, which of them are judgments)
PAIRS = [
    (([5, 6, 7], [0, 1, 1]), ([5, 8], [0, 0])),
    (([6, 9, 9, 10], [0, 0, 0, 0]), ([6, 5, 5, 5], [0, 0, 1, 1])),
    (([7, 2], [0, 1]), ([7, 3, 4], [0, 0, 0])),
]
LENGTHS = [5, 8, 5]


RECIPE = RewardConfig.RECIPES["tiny"]


def task_of(**options) -> RewardTask:
    task = RewardTask(RewardConfig(model=TINY, recipe=RECIPE, **options))
    task.device = torch.device("cpu")
    return task


def flagged_pairs() -> list[tuple[list[int], list[int]]]:
    return [tuple(flag_sample(tokens, map(bool, mask)) for tokens, mask in pair) for pair in PAIRS]


@pytest.fixture
def states():
    torch.manual_seed(0)
    h_nd = torch.randn(sum(LENGTHS), DIM, requires_grad=True)
    return h_nd, torch.randn(VOCAB, DIM)


def loss_alone(states, i: int) -> torch.Tensor:
    """Return the loss of a pair: its ranking, and half of λ for each judgment's token."""
    h_nd, head_wd = states
    logit_nw = (h_nd.split(LENGTHS)[i] @ head_wd.T).double()
    (chosen, _), _ = PAIRS[i]
    reward, other = logit_nw[len(chosen) - 1, TOKENS.pad], logit_nw[-1, TOKENS.pad]
    loss = torch.log1p(torch.exp(other - reward))
    tokens, mask = (list(chain.from_iterable(parts)) for parts in zip(*PAIRS[i]))
    learned = [j for j, is_learned in enumerate(mask) if is_learned]
    logp_nw = logit_nw.log_softmax(-1)
    return loss - WEIGHT / 2 * sum(logp_nw[j - 1, tokens[j]] for j in learned)


@pytest.mark.parametrize("sizes", [(3,), (1, 2), (1, 1, 1)], ids=str)
def test_micro_batches_are_parts_of_the_mean_over_pairs(sizes, states):
    objective, h_nd = PreferenceObjective(TOKENS, WEIGHT), states[0]
    total, begin = torch.zeros(()), 0
    for n in sizes:
        batch = task_of().row_batch(None, flagged_pairs()[begin : begin + n])
        first, last = sum(LENGTHS[:begin]), sum(LENGTHS[: begin + n])
        places = objective.locate(batch, ALL_TOKENS)
        loss = objective.loss(h_nd[None, first:last], states[1], batch, places, ALL_TOKENS)
        total = total + objective.loss_weight(batch) / 3 * loss
        begin += n
    want = sum(loss_alone(states, i) for i in range(3)).float() / 3
    torch.testing.assert_close(total, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, h_nd)[0] for x in (total, want)))


def test_the_model_reads_all_samples_without_padding(states):
    objective, batch = (
        PreferenceObjective(TOKENS, WEIGHT),
        task_of().row_batch(None, flagged_pairs()),
    )
    assert batch.rows_bs.shape == (3, 8) and len(batch) == 3
    tokens_1n, cu_seqlens = objective.model_input(batch)
    all_tokens = []
    for (chosen, _), (rejected, _) in PAIRS:
        all_tokens += chosen + rejected
    assert tokens_1n.tolist() == [all_tokens]
    assert cu_seqlens.tolist() == [0, 3, 5, 9, 13, 15, 18]
    h_nd, head_wd = states
    places = objective.locate(batch, ALL_TOKENS)
    score_b2 = objective.read_scores(h_nd[None], head_wd, batch, places, ALL_TOKENS)
    want = h_nd[[2, 4, 8, 12, 14, 17]] @ head_wd[TOKENS.pad]
    torch.testing.assert_close(score_b2, want.view(3, 2))


def test_a_process_without_pairs_has_a_loss_of_0():
    batch = task_of().row_batch(None, flagged_pairs()).tensor_split(4)[3]
    h_1nd = torch.zeros(1, 0, DIM, requires_grad=True)
    objective, head_wd = PreferenceObjective(TOKENS, WEIGHT), torch.zeros(VOCAB, DIM)
    places = objective.locate(batch, ALL_TOKENS)
    loss = objective.loss(h_1nd, head_wd, batch, places, ALL_TOKENS)
    assert loss == 0 and torch.autograd.grad(loss, h_1nd)[0].shape == h_1nd.shape


def test_a_batch_is_cut_into_micro_batches_of_so_many_pairs():
    pairs = flagged_pairs()
    for size, sizes in ((0, [3]), (1, [1, 1, 1]), (2, [2, 1]), (16, [3])):
        task = task_of(micro_batch=size)
        parts = task.micro_batches(None, pairs)
        assert [len(x) for x in parts] == [task.loss_weight(x) for x in parts] == sizes
    assert task.num_tokens(pairs) == 18 and task.minibatches(None, pairs) == [pairs]
    assert concat_samples([[5, 6], [7]], "cpu").tolist() == [[5, 6, 7]]


def test_held_out_pairs_are_ranked_and_calibrated(monkeypatch):
    """The scores rank three of the four pairs as labeled."""
    task = task_of()
    rewards = torch.tensor([2.0, 0.0, 1.0, 0.5, 0.0, 3.0, 0.25, 0.0])
    monkeypatch.setattr(task, "score_held_out", lambda run: rewards)
    differences = torch.tensor([2.0, 0.5, -3.0, 0.25])
    found = task.validate(None)
    want = torch.log1p(torch.exp(-differences)).mean().item()
    assert found == {"val_loss": pytest.approx(want), "agreement": 0.75}
    state = SimpleNamespace(seconds=5.0, tokens=7)
    summary = task.summarize(SimpleNamespace(state=state), found)
    assert (summary["seconds"], summary["tokens"], summary["agreement"]) == (5.0, 7, 0.75)
    assert summary["samples"] == [] and summary["val_loss"] == found["val_loss"]
    assert task.result_line(None, found) == "agrees with 75.0% of held-out pairs"


@pytest.mark.parametrize(
    "changes, option",
    [
        ({"init": None}, "--init"), ({"data": ()}, "--data"), ({"epochs": 0.0}, "--epochs"),
        ({"epochs": float("inf")}, "--epochs"), ({"epochs": float("nan")}, "--epochs"),
        ({"judgment_weight": -0.1}, "--judgment-weight"), ({"steps": -1}, "--steps"),
    ],
)  # fmt: skip
def test_the_limits_of_the_options(changes, option):
    recipe = replace(RECIPE, steps=0)
    good = RewardConfig(
        model=TINY, recipe=recipe, init=Path("m"), data=("a",), epochs=0.1, judgment_weight=0.0
    )
    assert all(holds for holds, _ in good.validation_rules())
    steps = changes.pop("steps", 0)
    bad = replace(good, recipe=replace(recipe, steps=steps), **changes)
    (sentence,) = [sentence for holds, sentence in bad.validation_rules() if not holds]
    assert sentence.startswith(option)


@pytest.mark.parametrize("judge, uses_cot", [("direct", False), ("cot", True)])
def test_the_format_of_pairs(judge, uses_cot):
    config = RewardConfig(model=TINY, recipe=RECIPE, judge=judge, with_reference=uses_cot)
    assert config.pair_format == PairFormat(TINY.max_seq_len, uses_cot, uses_cot)
    for pp, ep in ((1, 1), (2, 1), (1, 2)):
        task = RewardTask(replace(config, pp=pp, ep=ep))
        assert task.requires_whole_model is (pp == ep == 1)
