"""Conversations as tokens, the mask of answers, packing, and the report's recipe (§5.1)."""

from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_ref.config import UserError
from dsv3_ref.optim import TrainingRecipe, get_lr
from dsv3_ref.posttraining.sft import SFTConfig
from dsv3_ref.sft import (
    SFT_RECIPES,
    SpecialTokens,
    assistant_mask,
    pack_samples,
    render_conversation,
    sample_cu_seqlens,
)

SPECIAL_TOKENS = SpecialTokens(*range(5))
texts = st.lists(st.integers(5, 20), max_size=6)
talks = st.lists(st.tuples(texts, texts), min_size=1, max_size=3)


def tokens_of(talk, system=()) -> list[int]:
    """A conversation by hand."""
    out = [SPECIAL_TOKENS.bos, *system]
    for asked, answer in talk:
        out += [SPECIAL_TOKENS.user, *asked, SPECIAL_TOKENS.assistant, *answer, SPECIAL_TOKENS.eos]
    return out


def spoken(row: list[int]) -> list[bool]:
    """`assistant_mask`, a token at a time."""
    out, on = [], False
    for token in row:
        out.append(on)
        on = token == SPECIAL_TOKENS.assistant or (
            on and token not in (SPECIAL_TOKENS.eos, SPECIAL_TOKENS.bos, SPECIAL_TOKENS.user)
        )
    return out


def encode_numbers(text: str) -> list[int]:
    return [int(x) for x in text.split()]


def spell(tokens) -> str:
    return " ".join(map(str, tokens))


# ── Tokens ──


@given(talks, texts)
def test_a_conversation_is_its_turns_between_marks(talk, system):
    messages = [{"role": "system", "content": spell(system)}]
    for asked, answer in talk:
        messages += [{"role": "user", "content": spell(asked)}]
        messages += [{"role": "assistant", "content": spell(answer)}]
    tokens = tokens_of(talk, system)
    assert render_conversation(messages, encode_numbers, SPECIAL_TOKENS) == tokens
    unanswered = tokens[: -1 - len(talk[-1][1])]
    assert render_conversation(messages[:-1], encode_numbers, SPECIAL_TOKENS) == unanswered


@given(st.lists(talks, min_size=1, max_size=4))
def test_who_speaks_and_where_samples_end(rows):
    line, answers = [], []
    ends = [0]
    for talk in rows:
        line += tokens_of(talk)
        ends.append(len(line))
        for _, answer in talk:
            answers += [*answer, SPECIAL_TOKENS.eos]
    line_1s = torch.tensor([line])
    mask_1s = assistant_mask(line_1s, SPECIAL_TOKENS)
    assert mask_1s[0].tolist() == spoken(line)
    assert sample_cu_seqlens(line_1s, SPECIAL_TOKENS).tolist() == ends
    assert line_1s[mask_1s].tolist() == answers


def test_a_row_begins_a_sample_whatever_it_begins_with():
    tokens_bs = torch.tensor([[7, 7, 0, 7], [7, 0, 7, 7]])
    assert sample_cu_seqlens(tokens_bs, SPECIAL_TOKENS).tolist() == [0, 2, 4, 5, 8]
    assert sample_cu_seqlens(tokens_bs[:0], SPECIAL_TOKENS).tolist() == [0]


@given(st.lists(st.integers(1, 30), max_size=40))
def test_packing_keeps_every_sample_whole(lengths):
    samples = [[SPECIAL_TOKENS.bos, *[5 + i] * (n - 1)] for i, n in enumerate(lengths)]
    rows = pack_samples(samples, 30, SPECIAL_TOKENS.pad)
    found = []
    for row in rows:
        assert len(row) == 30 and row[0] == SPECIAL_TOKENS.bos
        starts = [i for i, t in enumerate(row) if t == SPECIAL_TOKENS.bos]
        pieces = [row[a:b] for a, b in zip(starts, [*starts[1:], 30])]
        pieces[-1] = [t for t in pieces[-1] if t != SPECIAL_TOKENS.pad]
        found += pieces
    assert sorted(found) == sorted(samples)
    assert (
        sum(2 * sum(t != SPECIAL_TOKENS.pad for t in row) <= 30 for row in rows) <= 1
    )  # else two fit one


def test_two_halves_fill_a_row():
    assert pack_samples([[5] * 15, [6] * 15], 30, SPECIAL_TOKENS.pad) == [[5] * 15 + [6] * 15]


def test_a_sample_longer_than_a_row_is_refused():
    with pytest.raises(UserError, match="31 tokens does not fit a row of 30"):
        pack_samples([[5] * 31], 30, SPECIAL_TOKENS.pad)


# ── The report's recipe, as data (§5.1) ──

REPORT = {"lr": 5e-6, "min_lr": 1e-6}  # of a cosine over the whole run
OWN_CHOICES = {  # numbers that the report does not state
    "steps": 0,  # as many as two epochs take
    "warmup_steps": 0, "decay_start": 0.0, "decay_end": 1.0, "final_start": 1.1,
    "start_batch_size": 512, "global_batch_size": 512, "bias_update_rate": 0.0,
    "mtp_weight": 0.0, "mtp_weight_end": 0.0, "balance_loss_coeff": 0.0, "weight_decay": 0.0,
}  # fmt: skip
TINY_CHOICES = {
    "seq_len": 256, "lr": 3e-3, "min_lr": 6e-4, "warmup_steps": 10, "start_batch_size": 6,
    "global_batch_size": 6,
}  # fmt: skip


@pytest.mark.parametrize("field, value", REPORT.items())
def test_every_number_of_the_recipe_is_the_reports(field, value):
    assert getattr(SFT_RECIPES["v3"], field) == value


def test_nothing_else_differs_from_pre_training_but_our_own_choices():
    v3 = asdict(TrainingRecipe()) | REPORT | OWN_CHOICES
    assert {name: asdict(recipe) for name, recipe in SFT_RECIPES.items()} == {
        "v3": v3,
        "tiny": v3 | TINY_CHOICES,
    }


@pytest.mark.parametrize(
    "progress, lr", [(0.0, 5e-6), (0.25, 4.414e-6), (0.5, 3e-6), (0.75, 1.586e-6), (1.0, 1e-6)]
)
def test_the_learning_rate_follows_a_cosine_over_the_whole_run(progress, lr):
    assert get_lr(SFT_RECIPES["v3"], 0, progress) == pytest.approx(lr, rel=1e-3)


def test_every_conversation_is_read_in_two_epochs():
    assert SFTConfig.epochs == 2.0 and SFTConfig.RECIPES is SFT_RECIPES
