"""MTP against a loop over depths and positions with the indices of eq. 21–25."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from dsv3_ref.model import Transformer
from dsv3_ref.mtp import mtp_draft_matches, mtp_hidden_states, mtp_losses
from dsv3_ref.rope import Rope

T = 9


def norm(x, module):
    return x / (x.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight


def slow(model: Transformer, row: list[int]):
    """Compute every depth's states and loss of a row of T + 1 tokens, position by position.

    Token t_{i+1} is row[i]: the indices of the report count from 1.
    """
    t = {i + 1: token for i, token in enumerate(row)}
    h = dict(enumerate(model.hidden_states(torch.tensor([row[:T]]))[0][0], start=1))
    states, losses = [], []
    for k, module in enumerate(model.mtp.values(), start=1):
        last = T - k  # positions 1 … T − k still have token t_{i+k} in the input
        pairs = []
        for i in range(1, last + 1):
            emb = norm(model.embed.weight[t[i + k]], module.enorm)
            pairs.append(module.eh_proj.weight @ torch.cat((emb, norm(h[i], module.hnorm))))
        rope = Rope.from_positions(model.config, torch.arange(last))
        out, _ = module.block(torch.stack(pairs)[None], rope)
        h = {i: norm(x, module.norm) for i, x in enumerate(out[0], start=1)}
        logp = {i: (model.head.weight @ x).log_softmax(0) for i, x in h.items()}
        losses.append(-sum(logp[i][t[i + k + 1]] for i in range(1, last + 1)) / T)
        states.append(torch.stack(list(h.values())))
    return states, losses


def fast(model: Transformer, tokens_bs):
    """Return the same from the package, for rows of T + 1 tokens."""
    x_bs, y_bs = tokens_bs[:, :-1], tokens_bs[:, 1:]
    hidden_states = mtp_hidden_states(model, model.hidden_states(x_bs)[0], x_bs)
    return [h_bsd for h_bsd, _ in hidden_states], mtp_losses(model, hidden_states, x_bs, y_bs)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_states_losses_and_gradients_are_the_loop(exact, micro, depth):
    model = Transformer(replace(micro, n_mtp_layers=depth)).double()
    tokens_bs = torch.randint(micro.vocab_size, (2, T + 1))
    states, losses = fast(model, tokens_bs)
    rows = [slow(model, row) for row in tokens_bs.tolist()]
    for k in range(depth):
        assert states[k].shape == (2, T - k - 1, micro.dim)
        assert torch.allclose(states[k], torch.stack([row[0][k] for row in rows]), rtol=1e-10)
        want = sum(row[1][k] for row in rows) / 2
        assert torch.allclose(losses[k], want, rtol=1e-12)
    leaves = list(model.parameters())
    got = torch.autograd.grad(sum(losses), leaves)
    want = torch.autograd.grad(sum(sum(row[1]) for row in rows) / 2, leaves)
    assert all(torch.allclose(g, w, rtol=1e-8, atol=1e-10) for g, w in zip(got, want))


@torch.no_grad()
def test_depth_k_sees_tokens_up_to_i_plus_k(exact, micro):
    model = Transformer(replace(micro, n_mtp_layers=3)).double()
    x_bs = torch.randint(micro.vocab_size, (1, T + 1))
    changed, at = x_bs.clone(), 5
    changed[0, at] = (x_bs[0, at] + 1) % micro.vocab_size
    for k, (a, b) in enumerate(zip(fast(model, x_bs)[0], fast(model, changed)[0]), start=1):
        same = ((a - b).abs().amax(-1) < 1e-12)[0].tolist()
        assert same == [i + k < at for i in range(T - k)]


def test_every_depth_teaches_embedding_head_and_main_model(micro):
    model = Transformer(micro)
    _, losses = fast(model, torch.randint(micro.vocab_size, (2, T + 1)))
    shared = [model.embed.weight, model.head.weight, model.layers["0"].attn.wo.weight]
    for loss in losses:
        grads = torch.autograd.grad(loss, shared, retain_graph=True)
        assert all(g.abs().sum() > 0 for g in grads)


def test_without_modules_there_is_nothing(micro):
    model = Transformer(replace(micro, n_mtp_layers=0))
    assert fast(model, torch.randint(micro.vocab_size, (2, T + 1))) == ([], [])


def test_a_draft_is_compared_with_the_main_model_at_its_position(micro):
    torch.manual_seed(0)
    model, tokens_bs = Transformer(micro), torch.randint(61, (2, 10))
    h_bsd, _ = model.hidden_states(tokens_bs)
    mtp_out = mtp_hidden_states(model, h_bsd, tokens_bs)
    for k, matches in enumerate(mtp_draft_matches(model, tokens_bs), start=1):
        assert matches.shape == (2, 10 - k)
        for b, i in product(range(2), range(10 - k)):
            draft = (model.head.weight @ mtp_out[k - 1][0][b, i]).argmax()
            assert matches[b, i] == (draft == (model.head.weight @ h_bsd[b, i + k]).argmax())
