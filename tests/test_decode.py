"""Generation is the argmax, or a draw, of the full forward pass at every step."""

import pytest
import torch

from dsv3_ref.decode import generate, sample
from dsv3_ref.model import Transformer


@pytest.fixture
def model(micro):
    return Transformer(micro)


def prompts(micro, b: int = 3, s: int = 5):
    return torch.randint(micro.vocab_size, (b, s))


@torch.no_grad()
def test_greedy_is_the_argmax_of_the_full_forward(model, micro):
    out_bs = generate(model, prompts(micro), 8)
    for at in range(5, 13):
        logit_bw = model(out_bs[:, :at])[:, -1]
        best = logit_bw.gather(1, out_bs[:, at, None])[:, 0]
        assert (logit_bw.amax(-1) - best < 1e-4).all()  # a near tie may fall either way


def test_the_prompt_comes_back_unchanged(model, micro):
    x_bs = prompts(micro)
    out_bs = generate(model, x_bs, 4)
    assert out_bs.shape == (3, 9)
    assert torch.equal(out_bs[:, :5], x_bs)
    assert torch.equal(generate(model, x_bs, 0), x_bs)


def test_rows_do_not_disturb_one_another(model, micro):
    x_bs = prompts(micro)
    alone = torch.cat([generate(model, row[None], 6) for row in x_bs])
    assert torch.equal(generate(model, x_bs, 6), alone)


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="the prompt is empty"):
        generate(model, torch.empty(2, 0, dtype=torch.int64), 3)


def test_a_seed_repeats_a_draw(model, micro):
    x_bs, draw = prompts(micro), lambda seed: torch.Generator().manual_seed(seed)
    one, two = (generate(model, x_bs, 8, 1.0, draw(1)) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, generate(model, x_bs, 8, 1.0, draw(2)))


def test_nothing_keeps_a_graph(model, micro):
    assert not generate(model, prompts(micro), 2).requires_grad
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_softmax(temperature):
    """100,000 draws: every frequency within five standard errors."""
    logit_w, n = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0]), 100_000
    p_w = torch.exp(logit_w / temperature)
    p_w = p_w / p_w.sum()
    drawn_n = sample(logit_w.expand(n, -1), temperature, torch.Generator().manual_seed(0))
    share_w = drawn_n.bincount(minlength=5) / n
    assert ((share_w - p_w).abs() <= 5 * (p_w * (1 - p_w) / n).sqrt() + 1e-6).all()


def test_a_low_temperature_is_the_argmax():
    logit_bw = torch.randn(50, 20)
    want = logit_bw.argmax(-1)
    assert torch.equal(sample(logit_bw, 0.0), want)
    assert torch.equal(sample(logit_bw, 1e-4), want)


def test_a_negative_temperature_is_refused():
    with pytest.raises(ValueError, match="temperature must be at least 0, not -1"):
        sample(torch.zeros(1, 3), -1)
