"""Losses do not depend on how a batch is cut into micro-batches; what would is refused.

`accumulate_gradients` weighs a micro-batch by what its loss is a mean over, as torchtune #1875,
mlx-lm #1413 and prime-rl #583 had to. GRPO's four forms: tests/posttraining/test_rl.py,
`test_an_update_is_the_gradient_of_all_answers_at_once`.
"""

from itertools import chain

import pytest
import torch

from dsv3_ref.cli import main
from dsv3_ref.model import Transformer
from dsv3_ref.optim import RECIPES
from dsv3_ref.pretrain import accumulate_gradients, compute_losses
from dsv3_ref.rewards import preference_loss
from dsv3_ref.rope import to_cu_seqlens
from dsv3_ref.sft import SpecialTokens, assistant_mask, sample_cu_seqlens, sft_loss

SPECIAL_TOKENS = SpecialTokens(*range(5))
BOS, EOS, PAD, USER, ASSISTANT = SPECIAL_TOKENS


def pretrain_batch():
    rows_bs = torch.randint(5, 40, (6, 17), generator=torch.Generator().manual_seed(0))
    return rows_bs, lambda model, x, scope: compute_losses(model, x, scope), len


def sft_batch():
    """Answers of 1 to 11 tokens: the micro-batches have unequal numbers of loss tokens."""
    rows = []
    for n in (1, 11, 2, 9, 4, 1):
        row = [BOS, USER, 9, 10, ASSISTANT, *range(11, 11 + n), EOS]
        rows.append(row + [PAD] * (18 - len(row)))

    def loss(model, rows_bs, scope):
        cu_seqlens = sample_cu_seqlens(rows_bs[:, :-1], SPECIAL_TOKENS)
        return sft_loss(model, rows_bs, assistant_mask(rows_bs, SPECIAL_TOKENS), cu_seqlens)

    def num_loss_tokens(rows_bs) -> int:
        return int(assistant_mask(rows_bs, SPECIAL_TOKENS)[:, 1:].sum())

    return torch.tensor(rows), loss, num_loss_tokens


def reward_batch():
    """Judgments of 1 to 6 tokens, so that pairs have unequal numbers of tokens."""
    pairs = []
    for n in range(1, 7):
        turns = [BOS, USER, 9, ASSISTANT]
        pairs.append(([*turns, *range(11, 11 + n), EOS], [*turns, 20 + n, EOS]))

    def loss(model, pairs, scope):
        samples = list(chain.from_iterable(pairs))
        tokens_1n = torch.tensor([list(chain.from_iterable(samples))])
        cu_seqlens = to_cu_seqlens([len(sample) for sample in samples], "cpu")
        mask_1n = assistant_mask(tokens_1n, SPECIAL_TOKENS)
        return preference_loss(
            model, tokens_1n, mask_1n, cu_seqlens, SPECIAL_TOKENS, 0.3
        ).losses  # fmt: skip

    return pairs, loss, len


BATCHES = {"pretrain": pretrain_batch, "sft": sft_batch, "reward": reward_batch}


@pytest.mark.parametrize("task", BATCHES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_cut_batch_has_the_loss_and_the_gradient_of_the_whole(task, size, micro):
    batch, loss_fn, loss_weight = BATCHES[task]()
    torch.manual_seed(0)
    model = Transformer(micro)
    recipe = RECIPES["tiny"]
    mtp_weight = 0.3 if task == "pretrain" else 0.0

    def losses_and_gradients(n: int):
        model.zero_grad()
        parts = [batch[i : i + n] for i in range(0, len(batch), n)]
        losses, loads = accumulate_gradients(model, parts, recipe, mtp_weight, loss_fn, loss_weight)
        grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
        return losses, loads, grads

    losses, loads, grads = losses_and_gradients(len(batch))
    cut_losses, cut_loads, cut_grads = losses_and_gradients(size)
    torch.testing.assert_close(cut_losses, losses, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(cut_loads, loads)
    for name, grad in grads.items():
        torch.testing.assert_close(cut_grads[name], grad, atol=2e-6, rtol=2e-4)


def test_a_balance_loss_over_batches_is_refused_in_micro_batches(tmp_path, capsys):
    """pytorch/torchtitan #3000 and #4772: its counts are those of the micro-batch alone."""
    argv = "train --config tiny --balance-loss-scope batch --balance-loss-coeff 0.01".split()
    argv += ["--micro-batch", "1", "--steps", "1", "--out", str(tmp_path / "run")]
    assert main.main(argv) == 2
    assert "--balance-loss-scope batch needs the whole batch" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
