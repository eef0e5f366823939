"""Absorbed attention over a latent cache, contiguous or paged, against its torch reference."""

import interpreter  # noqa: F401  first: makes Triton's interpreter round as a GPU does
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_ref import ops
from dsv3_ref.config import ceil_div
from dsv3_ref.kernels import decode
from dsv3_ref.mla import MLA
from dsv3_ref.rope import Rope, rope_cos_sin

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8}  # relative, of one number
SLACK = {torch.float32: 16, torch.bfloat16: 2}
paged, latent = (ops.IMPLS[name]["triton"] for name in ("paged_attention", "latent_attention"))
paged_torch, latent_torch = (
    ops.IMPLS[name]["torch"] for name in ("paged_attention", "latent_attention")
)


def cache(lengths: list[int], y: int, width: int):
    """Return pages in random order and their block table; unused slots hold NaN."""
    p = max(1, max(ceil_div(n, y) for n in lengths))
    order = torch.randperm(len(lengths) * p + 1)
    unused_page, block_table_bp = order[0], order[1:].view(-1, p).int()
    kv_cache_pyx = torch.full((len(order), y, width), torch.nan)
    for n, table_p in zip(lengths, block_table_bp):
        rows = torch.full((p * y, width), torch.nan)
        rows[:n] = torch.randn(n, width)
        kv_cache_pyx[table_p.long()] = rows.view(p, y, width)
        table_p[ceil_div(n, y) :] = unused_page
    return kv_cache_pyx, block_table_bp


def arguments(lengths, dtype, s=1, h=2, c=32, r=16, y=64) -> tuple:
    kv_cache_pyx, block_table_bp = cache(lengths, y, c + r)
    q_bshx, kv_cache_pyx = (
        x.to(DEVICE, dtype) for x in (torch.randn(len(lengths), s, h, c + r), kv_cache_pyx)
    )
    cache_seqlens_b = torch.tensor(lengths, device=DEVICE)
    return q_bshx, kv_cache_pyx, block_table_bp.to(DEVICE), cache_seqlens_b, c, (c + r) ** -0.5


def error(got, want) -> float:
    """Return the relative 2-norm of the difference, or infinity for NaN."""
    difference = ((got.double() - want.double()).norm() / want.double().norm()).item()
    return difference if difference == difference else float("inf")


def is_close(got, want, dtype) -> bool:
    assert got.dtype == dtype and got.shape == want.shape
    return error(got, want) < SLACK[dtype] * ROUNDING[dtype]


def in_fp64(fn, *args):
    """Return fn of the same numbers in fp64."""
    return fn(*(widen(x) for x in args))


def widen(x):
    is_float = isinstance(x, torch.Tensor) and x.is_floating_point()
    return x.double() if is_float else x


CASES = {
    "one position": {"lengths": [1]},
    "around a page": {"lengths": [63, 64, 65, 127, 128, 129]},
    "unequal": {"lengths": [3, 700, 1, 130]},
    "drafts": {"lengths": [2, 66, 129, 64], "s": 2},
    "three queries, two keys of them in the last page": {"lengths": [66, 194], "s": 3, "h": 3},
    "one head": {"lengths": [100, 70], "h": 1},
    "heads beside a block": {"lengths": [200], "h": 70},
    "drafts of many heads": {"lengths": [65, 4], "s": 3, "h": 43},
    "pages of 1": {"lengths": [5, 17], "y": 1},
    "pages of 48": {"lengths": [47, 48, 49, 150], "y": 48},
    "pages of 128": {"lengths": [127, 129, 300], "y": 128},
    "one page": {"lengths": [33, 64]},
    "odd widths": {"lengths": [70, 9], "c": 20, "r": 6},
    "V3": {"lengths": [65, 200], "h": 5, "c": 512, "r": 64},
}


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_paged_attention_equals_the_reference(case, dtype):
    args = arguments(dtype=dtype, **CASES[case])
    assert is_close(paged(*args), in_fp64(paged_torch, *args), dtype)


@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=5),
    parts=st.integers(1, 9),
    int32=st.booleans(),
)
def test_any_lengths_on_any_number_of_multiprocessors(lengths, parts, int32):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "num_sms", lambda *_: parts)
        args = list(arguments(lengths, torch.float32, h=1, c=16))
        args[3] = args[3].int() if int32 else args[3]
        got, want = paged(*args), in_fp64(paged_torch, *args)
    assert (got[args[3] == 0] == 0).all()  # unused rows of the batch
    assert not want.any() or is_close(got, want, torch.float32)


@pytest.mark.parametrize("parts", [1, 2, 40])
def test_the_splits_of_a_long_sequence_are_combined(parts, monkeypatch):
    launched, kernel = [], decode._combine_splits_kernel

    class Spy:
        def __getitem__(self, grid):
            launched.append(grid)
            return kernel[grid]

    monkeypatch.setattr(decode, "_combine_splits_kernel", Spy())
    monkeypatch.setattr(decode, "num_sms", lambda *_: parts)
    args = arguments([2500, 30], torch.float32, h=12)  # 20 splits: two iterations of the loop
    args[1].mul_(30)  # scores of some hundred, which overflow without the maximum
    assert error(paged(*args), in_fp64(paged_torch, *args)) < 1e-4
    assert len(launched) == (parts > 1)


@pytest.mark.parametrize("i", range(len(decode._combine_splits_kernel.configs)))
def test_splits_are_combined_in_groups_of_any_size(i, monkeypatch):
    """In every config; with 8 splits or more, later groups rescale the sums of earlier ones."""
    kernel = decode._combine_splits_kernel
    monkeypatch.setattr(kernel, "configs", kernel.configs[i : i + 1])
    monkeypatch.setattr(decode, "num_sms", lambda *_: 40)
    q_bshx, kv_cache_pyx, *rest = arguments([2600], torch.float32)
    args = 4 * q_bshx, kv_cache_pyx, *rest  # splits of very different weight
    assert is_close(paged(*args), in_fp64(paged_torch, *args), torch.float32)


@pytest.mark.parametrize("lengths", [[70, 3], [130, 257]])
def test_a_query_attends_to_no_later_key(lengths):
    q_bshx, kv_cache_pyx, block_table_bp, cache_seqlens_b, c, scale = arguments(
        lengths, torch.float32, s=3
    )
    together = paged(q_bshx, kv_cache_pyx, block_table_bp, cache_seqlens_b, c, scale)
    for back in range(3):
        q = q_bshx[:, 2 - back, None]
        alone = paged(q, kv_cache_pyx, block_table_bp, cache_seqlens_b - back, c, scale)
        assert is_close(together[:, 2 - back, None], alone, torch.float32)


def test_strided_queries_and_pages():
    args = arguments([65, 128], torch.float32, s=2, h=3)
    wide = torch.full((*args[1].shape[:2], 64), torch.nan, device=DEVICE)
    wide[..., :48] = args[1]
    q_hbsx = args[0].permute(2, 0, 1, 3).contiguous()
    got = paged(q_hbsx.permute(1, 2, 0, 3), wide[..., :48], *args[2:])
    assert torch.equal(got, paged(*args))


# ── Contiguous ──


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("s, t", [(1, 1), (1, 64), (1, 65), (3, 130), (5, 5)])
def test_latent_attention_equals_the_reference(s, t, dtype):
    kv_btx = torch.full((3, 200, 48), torch.nan)
    kv_btx[:, :t] = torch.randn(3, t, 48)
    c_btc, k_btr = kv_btx.to(DEVICE, dtype)[:, :t].split([32, 16], -1)
    q_bshc, q_bshr = torch.randn(3, s, 5, 48, device=DEVICE, dtype=dtype).split([32, 16], -1)
    args = q_bshc, q_bshr, c_btc, k_btr, 0.2
    assert is_close(latent(*args), in_fp64(latent_torch, *args), dtype)


def test_a_layer_decodes_with_the_kernels(micro):
    mla = MLA(micro).to(DEVICE)
    for p in mla.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5 if p.ndim > 1 else 1.0)
    mla.absorb, x_bsd = True, torch.randn(2, 9, micro.dim, device=DEVICE)
    rope = Rope(*(x.to(DEVICE) for x in rope_cos_sin(micro, torch.arange(9))))
    with torch.no_grad():
        want = mla(x_bsd, rope)
        with ops.use("triton", "torch"):
            got = mla(x_bsd, rope)
    assert error(got, want) < 64 * ROUNDING[torch.float32]


def test_autocast_casts_as_it_does_for_products():
    q_bshx, *rest = arguments([40, 65], torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = paged(q_bshx, *rest)
    assert is_close(got, in_fp64(paged_torch, q_bshx, *rest), torch.bfloat16)


def test_the_backward_pass_raises():
    args = list(arguments([5], torch.float32))
    args[0].requires_grad_()
    message = "no gradient in the triton backend.*absorb = False"
    with pytest.raises(NotImplementedError, match=message):
        paged(*args).sum().backward()


# ── Errors ──

INVALID = {
    "q_bshx must be float32 or bfloat16, not float64": (0, lambda x: x.double()),
    "q_bshx must have a last stride of 1": (0, lambda x: x.mT.contiguous().mT),
    "kv_cache_pyx must be float32, not bfloat16": (1, lambda x: x.bfloat16()),
    "kv_cache_pyx must have shape .any, any, 48., not": (1, lambda x: x[..., :40]),
    "block_table_bp must be int32, not int64": (2, lambda x: x.long()),
    "block_table_bp must have shape .2, any., not": (2, lambda x: x[:1]),
    "cache_seqlens_b must be int32 or int64, not float32": (3, lambda x: x.float()),
    "cache_seqlens_b must have shape .2., not": (3, lambda x: x[:1]),
    "c must lie between 0 and the 48 of q_bshx": (4, lambda x: 48),
}


@pytest.mark.parametrize("message", INVALID)
def test_invalid_arguments_of_paged_attention(message):
    args, (i, change) = list(arguments([65, 3], torch.float32)), INVALID[message]
    args[i] = change(args[i])
    with pytest.raises(ValueError, match=message):
        paged(*args)


@pytest.mark.parametrize("i", range(4))
def test_invalid_arguments_of_latent_attention(i):
    args = [torch.randn(2, 1, 3, 32), torch.randn(2, 1, 3, 16)]
    args += [torch.randn(2, 7, 32), torch.randn(2, 7, 16)]
    args[i] = (args[i].double, args[i][:1].clone, args[i][..., :3].clone, args[i].bfloat16)[i]()
    message = ("q_bshc must be float", "q_bshr must have shape", "c_btc must", "k_btr must be")[i]
    with pytest.raises(ValueError, match=message):
        latent(*(x.to(DEVICE) for x in args), 0.1)
