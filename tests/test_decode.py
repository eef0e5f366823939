"""Generation is the argmax, or a draw, of the full forward pass at every step."""

import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_ref.decode import (
    Decoder,
    InvalidLogits,
    SamplingParams,
    SpeculativeDecoder,
    generate,
    logits_to_probs,
    sample,
    stream,
    verify_draft,
)
from dsv3_ref.model import Transformer
from dsv3_ref.mtp import mtp_hidden_states


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
    x_bs = prompts(micro)

    def draw(seed):
        return generate(model, x_bs, 8, 1.0, torch.Generator().manual_seed(seed))

    one = draw(1)
    assert torch.equal(one, draw(1))
    assert not torch.equal(one, draw(2))


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
    with pytest.raises(ValueError, match="temperature must be at least 0 and finite, not -1"):
        sample(torch.zeros(1, 3), -1)


# ── Rows of unequal length, drafts, streams ──

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def continuations(model, prompts, new, **options):
    """Return the tokens that `stream` yields for each prompt."""
    rows = [[] for _ in prompts]
    for tokens in stream(model, prompts, new, **options):
        for row, more in zip(rows, tokens):
            row += more
    return rows


@torch.no_grad()
def logit_gaps(model, prompt, row):
    """Return how far each token of a row is below the best logit of a full forward pass."""
    logit_sw = model(torch.tensor([prompt + row]))[0, len(prompt) - 1 : -1]
    return logit_sw.amax(-1) - logit_sw.gather(1, torch.tensor(row)[:, None])[:, 0]


@given(LENGTHS, st.integers(0, 2), st.integers(1, 9))
def test_any_lengths_and_drafts_are_the_argmax_of_a_full_forward(micro, lengths, draft, new):
    model = Transformer(micro)
    prompts = [torch.randint(micro.vocab_size, (n,)).tolist() for n in lengths]
    rows = continuations(model, prompts, new, num_speculative_tokens=draft)
    for prompt, row in zip(prompts, rows):
        assert len(row) == new
        assert (logit_gaps(model, prompt, row) < 1e-4).all()


@pytest.mark.full
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_a_compiled_step_writes_the_same(micro):
    model = Transformer(micro)
    for prompts in ([[1, 2, 3, 4, 5]], [[1, 2, 3, 4, 5], [6, 7], [8]]):
        for draft in (0, 1):
            rows = continuations(model, prompts, 6, num_speculative_tokens=draft, compiled=True)
            for prompt, row in zip(prompts, rows):
                assert len(row) == 6
                assert (logit_gaps(model, prompt, row) < 1e-4).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"q_lora_rank": 0},
        {"score_func": "softmax", "n_expert_groups": 1, "n_limited_groups": 1},
        {"n_dense_layers": 3, "n_mtp_layers": 0},
        {"n_shared_experts": 0},
        {"rope_factor": 1.0, "qk_nope_head_dim": 7, "kv_lora_rank": 13},
    ],
    ids=str,
)
def test_every_shape_decodes(micro, changes):
    model = Transformer(replace(micro, **changes))
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    for draft in range(len(model.mtp) + 1):
        rows = continuations(model, prompts, 6, num_speculative_tokens=draft)
        for prompt, row in zip(prompts, rows):
            assert (logit_gaps(model, prompt, row) < 1e-4).all()


@torch.inference_mode()
def test_a_decoder_rolls_back(model, micro):
    """Tokens written over rejected ones leave no trace of those."""
    tokens_bs = prompts(micro, 2, 9)
    want_bsd, decoder = model.hidden_states(tokens_bs)[0], Decoder(model, 2, 12)
    decoder.token_bt[:, :9] = torch.randint(micro.vocab_size, (2, 9))
    decoder.token_bt[:, :4] = tokens_bs[:, :4]
    decoder.hidden_states([0, 0], 9)
    decoder.token_bt[:, :9] = tokens_bs
    pieces = [decoder.hidden_states([n, n], s) for n, s in ((4, 3), (7, 1), (8, 1))]
    torch.testing.assert_close(torch.cat(pieces, 1), want_bsd[:, 4:], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_guesses_are_those_of_the_mtp_chain(model, micro):
    """Round after round, draft k is the argmax of chapter 06's k-th head on the same text."""
    decoder, params = SpeculativeDecoder(model, [[3, 1, 4, 1, 5]], 30, 2), SamplingParams()
    decoder.first_token(params)
    for _ in range(8):
        guess_bk, _ = decoder.propose(params)
        n = decoder.lengths[0]
        text_bs = decoder.decoder.token_bt[:, : n + 2].clone()
        text_bs[0, n + 1] = guess_bk[0, 0]
        h_bsd = model.hidden_states(text_bs)[0]
        for k, (h, _) in enumerate(mtp_hidden_states(model, h_bsd, text_bs), start=1):
            logit_w = model.head(h[0, n - 1])
            assert logit_w.max() - logit_w[guess_bk[0, k - 1]] < 1e-4
        decoder.mtp_lengths = [0]  # `step` drafts again
        decoder.step(params, [True])


def test_a_stop_token_ends_a_row_and_only_that(model, micro):
    x = [[1, 2, 3], [4, 5, 6, 7]]
    for draft in (0, 2):
        free = continuations(model, x, 12, num_speculative_tokens=draft)
        stop = free[0][4]
        rows = continuations(model, x, 12, num_speculative_tokens=draft, stop=[stop])
        for row, whole in zip(rows, free):
            end = whole.index(stop) + 1 if stop in whole else len(whole)
            assert row == whole[:end]


def test_a_caller_can_end_a_row(model):
    rounds = stream(model, [[1, 2], [3]], 10)
    assert [len(row) for row in next(rounds)] == [1, 1]
    assert [len(row) for row in rounds.send([False, True])] == [0, 1]
    with pytest.raises(StopIteration):
        rounds.send([False, False])


def test_too_many_drafts_are_refused(model):
    with pytest.raises(ValueError, match="num_speculative_tokens is 3, but must be 0 to 2"):
        next(stream(model, [[1]], 5, num_speculative_tokens=3))


@pytest.mark.parametrize("depth", [1, 2])
def test_accepted_drafts_have_the_distribution_of_the_model(depth):
    """60,000 rounds: the first token's shares within five standard errors of p, q far from it."""
    n, w = 60_000, 5
    p_w = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0])
    q_w = torch.tensor([0.05, 0.15, 0.3, 0.2, 0.3])
    g = torch.Generator().manual_seed(depth)
    guess_bk = torch.multinomial(q_w.expand(n, w), depth, replacement=True, generator=g)
    p, q = p_w.expand(n, depth + 1, w), q_w.expand(n, depth, w)
    taken_b, next_b = verify_draft(p, q, guess_bk, g)
    accept = torch.minimum(p_w, q_w).sum()
    out = torch.cat((guess_bk, torch.zeros(n, 1, dtype=torch.int64)), 1)
    out[torch.arange(n), taken_b] = next_b
    for k in range(depth + 1):  # position k, where the first k drafts were accepted
        reached = taken_b >= k
        share = out[reached, k].bincount(minlength=w) / reached.sum()
        error = (p_w * (1 - p_w) / reached.sum()).sqrt()
        assert ((share - p_w).abs() <= 5 * error + 1e-6).all()
        want = accept**k
        assert abs(reached.float().mean() - want) < 5 * (want * (1 - want) / n) ** 0.5 + 1e-6


def test_a_draft_that_neither_distribution_allows_is_replaced_by_a_token_of_the_model():
    """Where p = q, nothing of p is left after q, and the next token is drawn from p itself."""
    p_w = torch.tensor([0.0, 0.5, 0.5])
    n_b, next_b = verify_draft(
        p_w.expand(40, 2, 3), p_w.expand(40, 1, 3), torch.zeros(40, 1, dtype=torch.int64)
    )
    assert n_b.tolist() == [0] * 40
    assert set(next_b.tolist()) == {1, 2}


@pytest.mark.full
def test_drafted_text_has_the_distribution_of_plain_text(micro):
    """Pairs of tokens drawn with and without drafts: χ² of two samples below its 99.9 % bound."""
    model = Transformer(replace(micro, vocab_size=6))
    counts = []
    for draft in (0, 2):
        params = SamplingParams(1.3, 0.9, torch.Generator().manual_seed(draft))
        options = {"sampling_params": params, "num_speculative_tokens": draft}
        pair = torch.zeros(36)
        for _ in range(20):
            for row in continuations(model, [[1, 2]] * 300, 3, **options):
                pair[row[1] * 6 + row[2]] += 1
        counts.append(pair)
    a, b = counts
    occurs = a + b > 0
    chi = ((a - b)[occurs] ** 2 / (a + b)[occurs]).sum()
    assert chi < 67.0  # 35 degrees of freedom: 66.6


def test_top_p_keeps_the_fewest_likeliest():
    logit_w = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, size in ((0.4, 1), (0.6, 2), (0.9, 3), (1.0, 4)):
        p_w = logits_to_probs(logit_w, 1.0, top_p)[0]
        assert (p_w > 0).tolist() == [i < size for i in range(4)]
        torch.testing.assert_close(p_w.sum(), torch.tensor(1.0))


SMALLEST = torch.finfo(torch.float32).smallest_normal / 2**20  # a subnormal number


@pytest.mark.parametrize("temperature", [0.0, 1e-38, SMALLEST, 5e-324, 9.9e-6])
@pytest.mark.parametrize("scale", [SMALLEST, 1.0, 1e30])
def test_a_tiny_temperature_is_greedy_on_every_path(temperature, scale):
    logit_bw = scale * torch.tensor([[1.0, 3.0, 2.0], [5.0, -9.0, 4.0]])
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    params = SamplingParams(temperature, 0.9, generator)
    assert sample(logit_bw, temperature, generator, 0.9).tolist() == [1, 0]
    assert logits_to_probs(logit_bw, temperature).tolist() == [[0, 1, 0], [1, 0, 0]]
    assert params.sample(logit_bw).tolist() == params.draft(logit_bw)[0].tolist() == [1, 0]
    n_b, token_b = params.verify(torch.stack((logit_bw, logit_bw)), (), torch.tensor([[1], [0]]))
    assert (n_b.tolist(), token_b.tolist()) == ([1, 0], [0, 1])
    assert torch.equal(before, generator.get_state())


@given(
    st.floats(1e-5, 2), st.sampled_from([1.0, 0.9, 1e-6, 1e-50]),
    st.lists(st.floats(max_value=2.0**127, width=32), min_size=2, max_size=5),
)  # fmt: skip
def test_every_finite_logit_has_a_distribution(temperature, top_p, row):
    logit_bw = torch.tensor([row])
    if max(row) == -float("inf"):
        return
    p_bw = logits_to_probs(logit_bw, temperature, top_p)
    assert p_bw.isfinite().all() and abs(p_bw.sum() - 1) < 1e-5
    token = sample(logit_bw, temperature, torch.Generator().manual_seed(0), top_p)
    assert p_bw[0, token] > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1e-38, 0.7])
def test_logits_that_are_not_finite_raise_on_every_path(micro, bad, temperature):
    row = torch.tensor([[1.0, bad, 0.0]])
    params = SamplingParams(temperature, 0.9)
    for call in (
        lambda: sample(row, temperature),
        lambda: params.draft(row),
        lambda: params.verify(row[None].expand(1, 2, 3), (row,), torch.tensor([[0]])),
        lambda: sample(torch.full((1, 3), -float("inf")), temperature),
    ):
        with pytest.raises(InvalidLogits, match="not finite"):
            call()
    model = Transformer(micro).eval()
    model.head.weight.data[3] = bad
    with pytest.raises(InvalidLogits):
        generate(model, prompts(micro), 4, temperature)


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_no_number_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature must be at least 0 and finite"):
        sample(torch.zeros(1, 3), temperature)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_tiny_temperature_changes_no_greedy_text(model, micro, depth):
    x_bs = prompts(micro)
    want_bs = generate(model, x_bs, 6)
    generator = torch.Generator().manual_seed(0)
    got_bs = generate(model, x_bs, 6, 1e-38, generator, 0.9, num_speculative_tokens=depth)
    assert torch.equal(got_bs, want_bs)
