"""Rotation: lengths kept, products by distance only; YaRN's three regimes at the report's size."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_ref.config import V2_LITE, V3
from dsv3_ref.rope import (
    apply_rotary_emb,
    rope_cos_sin,
    rope_freqs,
    softmax_scale,
    yarn_freqs,
    yarn_ramp,
)

PLAIN = replace(V3, rope_factor=1.0)
position = st.integers(0, 4000)


def turned(x_r, at: int, c=PLAIN):
    """Return one vector rotated to position `at`."""
    return apply_rotary_emb(x_r[None, None, None], *rope_cos_sin(c, torch.tensor([at])))[0, 0, 0]


def test_frequencies_fall_from_one():
    freqs = rope_freqs(64, 10_000.0)
    assert freqs.tolist() == pytest.approx([10_000 ** (-2 * j / 64) for j in range(32)])


def test_every_interleaved_pair_turns_by_its_own_angle():
    x = torch.randn(64)
    y, freqs = turned(x, 7), rope_freqs(64, PLAIN.rope_theta).tolist()
    for j, freq in enumerate(freqs):
        cos, sin = math.cos(7 * freq), math.sin(7 * freq)
        want = torch.tensor([[cos, -sin], [sin, cos]]) @ x[2 * j : 2 * j + 2]
        assert torch.allclose(y[2 * j : 2 * j + 2], want, atol=1e-6)


def test_position_zero_turns_nothing():
    x = torch.randn(64)
    assert torch.equal(turned(x, 0), x)


@given(m=position, n=position, shift=position)
def test_a_product_depends_on_distance_alone(m, n, shift):
    q, k = torch.randn(2, 64, generator=torch.Generator().manual_seed(m))
    here, there = turned(q, m) @ turned(k, n), turned(q, m + shift) @ turned(k, n + shift)
    assert here.item() == pytest.approx(there.item(), abs=1e-4)
    assert turned(q, m).norm().item() == pytest.approx(q.norm().item(), rel=1e-5)


def test_a_far_position_is_exact_to_fp32():
    """Angles are formed in fp64: at 131,072 an fp32 product would be off by 0.004 rad."""
    cos, sin = rope_cos_sin(PLAIN, torch.tensor([131_071]))
    angles = [131_071 * 10_000 ** (-2 * j / 64) for j in range(32)]
    assert cos[0].tolist() == pytest.approx([math.cos(a) for a in angles], abs=1e-7)
    assert sin[0].tolist() == pytest.approx([math.sin(a) for a in angles], abs=1e-7)


def test_positions_may_start_anywhere():
    whole, part = rope_cos_sin(V3, torch.arange(8)), rope_cos_sin(V3, torch.arange(5) + 3)
    assert all(torch.equal(w[3:], p) for w, p in zip(whole, part))


def test_every_head_turns_alike_and_bf16_stays_bf16():
    x = torch.randn(1, 5, 1, 64).bfloat16()
    y = apply_rotary_emb(x.expand(2, 5, 3, 64), *rope_cos_sin(V3, torch.arange(5)))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, y[:1, :, :1].expand_as(y))


def test_yarn_keeps_fast_pairs_and_slows_slow_ones():
    """At V3's size pairs 0–10 turn as before, 23–31 forty times slower, between them a ramp."""
    share = yarn_freqs(V3) / rope_freqs(64, V3.rope_theta)
    assert torch.equal(share[:11], torch.ones(11).double())
    assert torch.allclose(share[23:], torch.full((9,), 1 / 40).double())
    between = share[10:24]
    assert (between[1:] < between[:-1]).all()
    assert torch.allclose(between.diff(), between.diff()[:1])  # linear in the pair


def test_the_ramp_ends_where_turns_say():
    """The pair that turns 32 times in 4,096 tokens lies just after the first end, 1 the last."""
    ramp = yarn_ramp(64, 10_000.0, 4096, 32.0, 1.0)
    turns = 4096 * rope_freqs(64, 10_000.0) / (2 * math.pi)
    assert (ramp[turns > 32] < 0.1).all()
    assert (ramp[turns < 1] > 0.95).all()


def test_factor_one_is_plain_rope():
    assert torch.equal(yarn_freqs(PLAIN), rope_freqs(64, 10_000.0))
    assert softmax_scale(PLAIN) == 192**-0.5


def test_yarn_sharpens_the_softmax():
    assert softmax_scale(V3) == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert softmax_scale(V3) / softmax_scale(PLAIN) == pytest.approx(1.8739, abs=1e-4)
    lite = 0.1 * 0.707 * math.log(40) + 1
    assert softmax_scale(V2_LITE) == pytest.approx(192**-0.5 * lite**2)
