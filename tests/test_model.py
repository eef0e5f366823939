"""The whole model: causal, the same with and without a cache, first weights as stated."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv3_ref.config import V3
from dsv3_ref.model import KVCache, Transformer, init_weights, moe_layers
from dsv3_ref.moe import Gate, MoE
from dsv3_ref.ops import MLP
from dsv3_ref.rope import Rope

fixture_is_constant = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
lengths = st.lists(st.integers(1, 5), min_size=1, max_size=6)


def tokens(c, b: int, s: int):
    return torch.randint(c.vocab_size, (b, s))


def biased(model: Transformer) -> Transformer:
    """Draw gate biases as after some training, so that a forgotten bias would show."""
    for moe in moe_layers(model).values():
        moe.gate.bias.normal_(0, 0.3)
    return model


@torch.no_grad()
def test_a_later_token_changes_nothing_before_it(exact, micro):
    model, x_bs = biased(Transformer(micro)).double(), tokens(micro, 2, 12)
    changed = x_bs.clone()
    changed[:, 7] = (x_bs[:, 7] + 1) % micro.vocab_size
    change_bs = (model(changed) - model(x_bs)).abs().amax(-1)
    assert (change_bs[:, :7] < 1e-12).all()  # not 0: experts' rows are multiplied in other lots
    assert (change_bs[:, 7:] > 1e-6).all()


@fixture_is_constant
@given(cuts=lengths)
@torch.no_grad()
def test_any_chunks_on_the_cache_give_the_logits_of_the_whole(exact, micro, cuts):
    model, x_bs = biased(Transformer(micro)).double(), tokens(micro, 2, sum(cuts))
    cache = KVCache(micro, 2, sum(cuts), dtype=torch.float64)
    got = torch.cat([model(x, cache) for x in x_bs.split(cuts, dim=1)], dim=1)
    assert cache.length == sum(cuts)
    assert (got - model(x_bs)).abs().max() < 1e-10


@torch.no_grad()
def test_positions_count_from_zero_and_go_on_after_the_cache(micro):
    model, cache = Transformer(micro), KVCache(micro, 1, 8)
    ropes: list[Rope] = []
    model.layers["0"].register_forward_pre_hook(lambda _block, args: ropes.append(args[1]))
    model(tokens(micro, 1, 3))
    model(tokens(micro, 1, 3), cache)
    model(tokens(micro, 1, 2), cache)
    for rope, positions in zip(ropes, ([0, 1, 2], [0, 1, 2], [3, 4]), strict=True):
        want = Rope.from_positions(micro, torch.tensor(positions))
        assert torch.equal(rope.cos, want.cos) and torch.equal(rope.sin, want.sin)


@pytest.mark.parametrize("n_layers", [1, 3])
def test_a_cache_of_any_number_of_layers_has_a_length(micro, n_layers):
    c = replace(micro, n_layers=n_layers)
    cache = KVCache(c, 2, 5)
    assert len(cache) == n_layers and cache.length == 0
    Transformer(c)(tokens(c, 2, 4), cache)
    assert cache.length == 4


def test_no_matrix_has_a_bias(micro):
    names = [name for name, _ in Transformer(micro).named_parameters()]
    assert all(name.endswith(("weight", ".w1", ".w2", ".w3")) for name in names)


@torch.no_grad()
def test_every_row_is_its_own(micro):
    model, x_bs = Transformer(micro), tokens(micro, 3, 9)
    alone = torch.cat([model(row[None]) for row in x_bs])
    assert torch.allclose(model(x_bs), alone, atol=1e-5)


def test_hidden_states_are_the_normed_states_before_the_head(micro):
    model, x_bs = Transformer(micro), tokens(micro, 2, 5)
    h_bsd, routes = model.hidden_states(x_bs)
    assert torch.equal(model.head(h_bsd), model(x_bs))
    assert torch.allclose(h_bsd.square().mean(-1), torch.ones(2, 5), atol=1e-3)
    assert [r.topk_ids_bsk.shape for r in routes] == [(2, 5, 3)] * 2


def test_a_block_is_two_residual_steps(micro):
    block = Transformer(micro).layers["1"]
    x_bsd, rope = torch.randn(2, 5, micro.dim), Rope.from_positions(micro, torch.arange(5))
    mid_bsd = x_bsd + block.attn(block.attn_norm(x_bsd), rope)
    want, _ = block.ffn(block.ffn_norm(mid_bsd))
    assert torch.equal(block(x_bsd, rope)[0], mid_bsd + want)


def test_first_layers_are_dense_and_mtp_never_is(micro):
    model = Transformer(replace(micro, n_dense_layers=2))
    assert [type(b.ffn) for b in model.layers.values()] == [MLP, MLP, MoE]
    assert [type(m.block.ffn) for m in model.mtp.values()] == [MoE, MoE]
    with torch.device("meta"):
        big = Transformer(V3)
    assert [type(b.ffn) for b in big.layers.values()] == [MLP] * 3 + [MoE] * 58


def test_moe_layers_come_in_the_order_of_routes(micro):
    """Each gate's own choice is found under its own name: the bias update relies on it."""
    from dsv3_ref.mtp import mtp_hidden_states

    model, x_bs = Transformer(micro), tokens(micro, 2, 9)
    route_of = {}

    def record(gate, _args, route):
        route_of[gate] = route

    for moe in moe_layers(model).values():
        moe.gate.register_forward_hook(record)
    h_bsd, routes = model.hidden_states(x_bs)
    routes += [r for _, r in mtp_hidden_states(model, h_bsd, x_bs)]
    assert len(routes) == len(moe_layers(model)) == 4
    for moe, r in zip(moe_layers(model).values(), routes):
        assert r.topk_ids_bsk is route_of[moe.gate].topk_ids_bsk


def test_first_weights_are_normal_and_norms_one(micro):
    c = replace(micro, dim=128, vocab_size=300, inter_dim=200, init_std=0.006, embed_std=0.05)
    for name, p in Transformer(c).named_parameters():
        if p.ndim == 1:
            assert (p == 1).all(), name
        else:
            std = c.embed_std if name == "embed.weight" else c.init_std
            error = std * p.numel() ** -0.5
            assert abs(p.mean()) < 5 * error, name
            assert abs(p.std() - std) < 5 * error, name


def test_first_weights_reset_gate_biases(micro):
    model = biased(Transformer(micro))
    gates = [m for m in model.modules() if isinstance(m, Gate)]
    assert len(gates) == 4
    assert all((g.bias != 0).any() for g in gates)
    init_weights(model, 0.006)
    assert all((g.bias == 0).all() for g in gates)


def test_a_new_model_knows_nothing(micro):
    """Small first weights: every token is about equally likely, a loss of ln(vocabulary)."""
    model, x_bs = Transformer(replace(micro, init_std=0.006)), tokens(micro, 4, 16)
    nll = torch.nn.functional.cross_entropy(model(x_bs).flatten(0, 1), x_bs.flatten())
    assert nll.item() == pytest.approx(torch.tensor(61.0).log().item(), abs=0.01)


def test_the_same_seed_gives_the_same_model(micro):
    torch.manual_seed(3)
    one = Transformer(micro)
    torch.manual_seed(3)
    two = Transformer(micro)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))


def test_every_parameter_gets_a_gradient(micro):
    """Except the MTP modules: the logits do not need them."""
    model, x_bs = Transformer(micro), tokens(micro, 4, 16)
    model(x_bs).square().mean().backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith("mtp."), name
        assert p.grad is None or p.grad.abs().sum() > 0, name
