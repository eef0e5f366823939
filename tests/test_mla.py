"""MLA: one result from three forms, from a loop over eq. 1–11, and from a cache."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv3_ref import mla as chapter
from dsv3_ref import ops
from dsv3_ref.config import TINY, Config
from dsv3_ref.mla import (
    GQA,
    LATENT_NORM_EPS,
    MLA,
    LayerKVCache,
    causal_mask,
    varlen_attention,
)
from dsv3_ref.model import init_weights
from dsv3_ref.rope import Rope, softmax_scale, to_cu_seqlens

fixture_is_constant = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
shapes = st.fixed_dictionaries(
    {
        "dim": st.integers(1, 30),
        "n_heads": st.integers(1, 4),
        "q_lora_rank": st.sampled_from([0, 1, 9]),
        "kv_lora_rank": st.integers(1, 20),
        "qk_nope_head_dim": st.integers(1, 12),
        "qk_rope_head_dim": st.sampled_from([2, 6, 8]),
        "v_head_dim": st.integers(1, 12),
    }
)
lengths = st.integers(1, 12)


def layer(c: Config) -> MLA:
    """Return an fp64 layer whose weights keep activations of order one."""
    torch.manual_seed(0)
    mla = MLA(c).double()
    for p in mla.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5 if p.ndim > 1 else 1.0)
    return mla


def inputs(c: Config, s: int, b: int = 2):
    return torch.randn(b, s, c.dim).double(), Rope.from_positions(c, torch.arange(s))


def run(mla: MLA, x_bsd, rope, absorb: bool):
    """Return the output and the gradients of x and of every parameter."""
    mla.absorb, x_bsd = absorb, x_bsd.clone().requires_grad_()
    y_bsd = mla(x_bsd, rope)
    wave = torch.linspace(-1, 1, y_bsd.numel()).double().view(y_bsd.shape)
    return [y_bsd, *torch.autograd.grad(y_bsd, [x_bsd, *mla.parameters()], wave)]


def close(got, want, tolerance=1e-10):
    return all((g - w).abs().max() <= tolerance * (1 + w.abs().max()) for g, w in zip(got, want))


def by_hand(mla: MLA, x_sd, rope):
    """Compute eq. 1–11, one position, one head, one key at a time: (s, d) → (s, d)."""
    c, w = mla.config, {n: p.detach() for n, p in mla.named_parameters()}
    rotate = ops.IMPLS["apply_rotary_emb"]["torch"]

    def norm(x, name):
        return x / (x.square().mean() + LATENT_NORM_EPS).sqrt() * w[f"{name}.weight"]

    def turn(x, at):
        return rotate(x[None, None, None], rope.cos[at, None], rope.sin[at, None])

    r, i = c.qk_rope_head_dim, c.qk_nope_head_dim
    v = c.v_head_dim
    latent, key_r = [], []
    out = []
    for at, x_d in enumerate(x_sd):
        down = w["wkv_a.weight"] @ x_d
        latent.append(norm(down[:-r], "kv_norm"))
        key_r.append(turn(down[-r:], at).flatten())
        if c.q_lora_rank:
            q = w["wq_b.weight"] @ norm(w["wq_a.weight"] @ x_d, "q_norm")
        else:
            q = w["wq.weight"] @ x_d
        heads = []
        for h in range(c.n_heads):
            q_x = q[h * (i + r) : (h + 1) * (i + r)]
            up = w["wkv_b.weight"][h * (i + v) : (h + 1) * (i + v)]
            q_r = turn(q_x[i:], at).flatten()
            score = [q_x[:i] @ (up[:i] @ c_t) + q_r @ k for c_t, k in zip(latent, key_r)]
            p = (torch.stack(score) * softmax_scale(c)).softmax(0)
            heads.append(sum(p_t * (up[i:] @ c_t) for p_t, c_t in zip(p, latent)))
        out.append(w["wo.weight"] @ torch.cat(heads))
    return torch.stack(out)


@fixture_is_constant
@given(shape=shapes, s=lengths)
def test_absorbed_is_expanded_is_naive_with_gradients(exact, shape, s):
    c = replace(Config(), **shape)
    mla = layer(c)
    x_bsd, rope = inputs(c, s)
    naive = run(mla, x_bsd, rope, absorb=False)
    assert close(run(mla, x_bsd, rope, absorb=True), naive)
    with ops.use("torch"):  # no grouped product in attention: the fast forms have fp64
        assert close(run(mla, x_bsd, rope, absorb=False), naive)
        assert close(run(mla, x_bsd, rope, absorb=True), naive)


@pytest.mark.parametrize("q_lora_rank", [0, 12])
def test_the_layer_is_equations_1_to_11(exact, micro, q_lora_rank):
    c = replace(micro, q_lora_rank=q_lora_rank)
    mla = layer(c)
    x_bsd, rope = inputs(c, 6)
    want = torch.stack([by_hand(mla, x_sd, rope) for x_sd in x_bsd])
    assert close([mla(x_bsd, rope)], [want])


@fixture_is_constant
@given(
    cuts=st.lists(st.integers(1, 4), min_size=1, max_size=6), absorb=st.sampled_from([None, True])
)
@torch.no_grad()
def test_any_cut_into_chunks_gives_the_whole(exact, micro, cuts, absorb):
    mla, s = layer(micro), sum(cuts)
    x_bsd, rope = inputs(micro, s)
    whole = mla(x_bsd, rope)
    mla.absorb, cache = absorb, LayerKVCache(micro, 2, s, dtype=torch.float64)
    got = []
    for n in cuts:
        at = slice(cache.length, cache.length + n)
        got.append(mla(x_bsd[:, at], Rope(*(x[at] for x in rope[:2])), cache))
    assert close([torch.cat(got, 1)], [whole])
    assert cache.length == s


def test_only_single_token_decoding_absorbs(micro, monkeypatch):
    calls = []

    def spy_on(form):
        real = getattr(chapter, f"attend_{form}")

        def spy(*args):
            calls.append(form)
            return real(*args)

        monkeypatch.setattr(chapter, f"attend_{form}", spy)

    spy_on("absorbed")
    spy_on("expanded")
    mla, cache = layer(micro).float(), LayerKVCache(micro, 1, 4)
    x_bsd = torch.randn(1, 3, micro.dim)
    with torch.no_grad():
        mla(x_bsd, Rope.from_positions(micro, torch.arange(3)))
        mla(x_bsd, Rope.from_positions(micro, torch.arange(3)), cache)
        mla(x_bsd[:, :1], Rope.from_positions(micro, torch.arange(1) + 3), cache)
    assert calls == ["expanded", "expanded", "absorbed"]


def test_a_full_cache_raises_and_keeps_what_it_had(micro):
    cache = LayerKVCache(micro, batch=2, max_len=3)
    cache.append(torch.ones(2, 2, 24))
    before = cache.kv_btx.clone()
    with pytest.raises(ValueError, match="cache holds 3 positions, 4 are needed"):
        cache.append(torch.ones(2, 2, 24))
    assert cache.length == 2
    assert torch.equal(cache.kv_btx, before)
    assert cache.append(torch.ones(2, 1, 24)).shape == (2, 3, 24)


def test_the_cache_of_671b_is_576_numbers_a_token():
    assert LayerKVCache(Config(), 1, 1, device="meta").kv_btx.numel() == 576


def test_the_mask_lets_the_last_queries_see_the_past():
    want = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert causal_mask(3, 5).int().tolist() == want


def test_attention_never_looks_ahead(micro):
    mla = layer(micro)
    x_bsd, rope = inputs(micro, 8)
    x_bsd.requires_grad_()
    mla(x_bsd, rope)[:, 4].sum().backward()
    assert (x_bsd.grad[:, 5:] == 0).all()
    assert (x_bsd.grad[:, :5] != 0).all()


@pytest.mark.parametrize("cu_seqlens", [[0], [0, 0, 0]], ids=str)
def test_nothing_packed(cu_seqlens):
    q = torch.randn(0, 2, 6, requires_grad=True)
    o = varlen_attention(q, q, q[..., :4], torch.tensor(cu_seqlens, dtype=torch.int32), 1.0)
    assert o.shape == (0, 2, 4)
    o.sum().backward()
    assert q.grad.shape == q.shape


def test_packed_samples_are_as_if_alone(micro, exact):
    """Whatever their lengths, an empty one included, and whatever the others say."""
    mla, lengths = layer(micro), [5, 0, 1, 9]
    parts = [torch.randn(1, n, micro.dim).double() for n in lengths]
    cu_seqlens = to_cu_seqlens(lengths)
    got = mla(torch.cat(parts, 1), Rope.from_cu_seqlens(micro, cu_seqlens))
    ropes = [Rope.from_positions(micro, torch.arange(x.shape[1])) for x in parts]
    alone = [mla(x, rope) for x, rope in zip(parts, ropes) if x.shape[1]]
    torch.testing.assert_close(got, torch.cat(alone, 1), atol=1e-12, rtol=0)


# ── What MLA replaces ──


def gqa(c, n: int) -> GQA:
    layer = GQA(c, n)
    init_weights(layer, 0.3)
    return layer.double()


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_gqa_is_torchs_attention_with_repeated_heads(n, factor, exact):
    c = replace(TINY, dim=24, qk_rope_head_dim=8, v_head_dim=6, rope_factor=factor)
    layer, x_bsd = gqa(c, n), torch.randn(2, 9, 24).double()
    rope = Rope.from_positions(c, torch.arange(9))
    k, v = layer.wkv(x_bsd).split([n * 8, n * 6], -1)
    q = naive_rope(layer.wq(x_bsd).view(2, 9, 4, 8), rope)
    k, v = naive_rope(k.view(2, 9, n, 8), rope), v.view(2, 9, n, 6)
    k, v = (x.repeat_interleave(4 // n, 2).transpose(1, 2) for x in (k, v))
    scale = 8**-0.5 * (0.1 * math.log(factor) + 1) ** 2
    o = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True, scale=scale)
    want = layer.wo(o.transpose(1, 2).flatten(2))
    assert (layer(x_bsd, rope) - want).abs().max() < 1e-10


def naive_rope(x_bshr, rope):
    cos, sin = (x[:, None].double() for x in rope[:2])
    a, b = x_bshr[..., ::2], x_bshr[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
