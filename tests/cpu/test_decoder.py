"""The fast CPU decoder equals the plain one of chapter 08."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_ref import ops
from dsv3_ref.cpu.decoder import BlockTables, small_matmul
from dsv3_ref.decode import BlockWeights, Decoder, decode_weights, stream
from dsv3_ref.mla import LayerKVCache
from dsv3_ref.model import Transformer

SHAPES = [
    {},
    {"q_lora_rank": 0},
    {"score_func": "softmax", "n_expert_groups": 1, "n_limited_groups": 1},
    {"n_dense_layers": 3, "n_mtp_layers": 0},
    {"n_shared_experts": 0},
    {"rope_factor": 1.0, "qk_nope_head_dim": 7, "kv_lora_rank": 13},
]


def readings(model: Transformer, tokens_bt: torch.Tensor, steps: list[int]) -> list[torch.Tensor]:
    """Return hidden states, logits and MTP states of a decoder fed in steps of these sizes."""
    decoder = Decoder(model, len(tokens_bt), tokens_bt.shape[1])
    decoder.token_bt[:] = tokens_bt
    start, results = 0, []
    for s in steps:
        h_bsd = decoder.hidden_states([start] * len(tokens_bt), s)
        results += [h_bsd, decoder.logits(h_bsd[:, -1])]
        start += s
    for k in range(1, len(model.mtp) + 1):
        h_bsd = decoder.h_btd[:, : start - len(model.mtp)]
        results.append(decoder.mtp_forward(k, h_bsd, [0] * len(tokens_bt)))
    return results


@pytest.mark.parametrize("changes", SHAPES, ids=str)
@pytest.mark.parametrize("batch", [1, 2, 3])
@torch.no_grad()
def test_the_fast_decoder_is_the_plain_one(micro, changes, batch):
    """A prompt, chunks of it on both sides of the limits, one and two tokens; rows and heads."""
    model, steps = Transformer(replace(micro, **changes)).eval(), [20, 17, 1, 2, 1]
    tokens_bt = torch.randint(micro.vocab_size, (batch, sum(steps)))
    with ops.use("torch"):
        want = readings(model, tokens_bt, steps)
    with ops.use("cpu", "torch"):
        assert all(isinstance(w, BlockTables) for w in decode_weights(model).blocks)
        got = readings(model, tokens_bt, steps)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lengths", [[1], [40, 40], [50, 2, 19], [1, 37, 3, 60]], ids=str)
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_rows_of_unequal_length_continue_alike(micro, exact, lengths, depth, monkeypatch):
    """In fp64, where both forms call the modules, only attention of chunks differs, by rounding."""
    monkeypatch.setattr(Decoder, "prefill_chunk", 18)
    model = Transformer(micro).double().eval()
    prompts = [torch.randint(micro.vocab_size, (n,)).tolist() for n in lengths]
    plain = list(stream(model, prompts, 6, num_speculative_tokens=depth))
    impls = ops.IMPLS["attend_prefill"]
    monkeypatch.setitem(impls, "torch", impls["cpu"])
    assert plain == list(stream(model, prompts, 6, num_speculative_tokens=depth))


def test_other_dtypes_decode_with_their_modules(micro):
    model = Transformer(micro).bfloat16()
    with ops.use("cpu", "torch"):
        assert {type(w) for w in decode_weights(model).blocks} == {BlockWeights}


@torch.no_grad()
def test_tables_follow_the_weights(micro):
    model, x = Transformer(micro), torch.randn(1, 1, micro.dim)
    with ops.use("cpu", "torch"):
        first = decode_weights(model)
        assert decode_weights(model) is first
        model.layers["0"].attn.wo.weight.mul_(2.0)
        second = decode_weights(model)
    before, after = (w.blocks[0].tables["wo"] for w in (first, second))
    torch.testing.assert_close(after, 2 * before)
    assert second.logits(x).shape == (1, 1, micro.vocab_size)


@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 40))
def test_a_product_with_few_rows_is_the_product(n, d, o):
    x_nd, w_do = torch.randn(n, d), torch.randn(d, o)
    torch.testing.assert_close(small_matmul(x_nd, w_do), x_nd @ w_do, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("t", [30, 513, 1100])
@pytest.mark.parametrize("s", [17, 30])
def test_a_chunk_attends_as_the_whole(micro, s, t):
    """The first chunk, a chunk within a block of keys, and one that needs three blocks."""
    h, i = 3, 5
    r, v = 4, 6
    c = 8
    q_bshi, q_bshr = torch.randn(2, s, h, i), torch.randn(2, s, h, r)
    kv_btx, wkv_b = torch.randn(2, t, c + r), torch.randn(h * (i + v), c)
    args = q_bshi, q_bshr, kv_btx, wkv_b, 0.2
    got, want = (ops.IMPLS["attend_prefill"][backend](*args) for backend in ("cpu", "torch"))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_the_cache_is_that_of_chapter_03(micro):
    decoder = Decoder(Transformer(micro), 2, 7)
    want = LayerKVCache(micro, 2, 7).kv_btx.shape
    assert {layer.attention.kv_btx.shape for layer in decoder.layers} == {want}
