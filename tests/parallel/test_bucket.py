"""Parameters in flat tensors: the shards of all ranks, one after another, without processes."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dsv3_ref.config import ceil_div
from dsv3_ref.fp8 import E4M3, weight_quant
from dsv3_ref.parallel.bucket import (
    Bucket,
    BucketKey,
    bucket_bytes,
    residual_dtype,
    wait_all,
    weight_format,
)

SHAPES = {"a": (5, 7), "b": (3,), "c": (2, 136, 40)}
NUMEL = 5 * 7 + 3 + 2 * 136 * 40
FORMATS = ["fp32", "bf16", "fp8"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": E4M3}


def parameters(precision: str = "fp32") -> dict[str, nn.Parameter]:
    """Return parameters of these shapes; FP8 is for matrices."""
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {k: nn.Parameter(x) for k, x in values.items() if precision != "fp8" or x.ndim > 1}


@pytest.fixture
def buckets(monkeypatch):
    """Return a function to build the bucket of every rank of a group."""

    def build(size: int, sharded: bool, precision: str = "fp32") -> list[Bucket]:
        monkeypatch.setattr(dist, "get_world_size", lambda group: size)
        ranks = []
        for rank in range(size):
            monkeypatch.setattr(dist, "get_rank", lambda group, rank=rank: rank)
            ranks.append(Bucket(parameters(precision), object(), sharded, precision))
        return ranks

    return build


def put_together(ranks: list[Bucket], once: bool) -> dict[str, torch.Tensor]:
    """Return the parameters from the ranges of all ranks; raise if any overlap or are missing."""
    whole = {name: torch.full(shape, torch.nan).flatten() for name, shape in SHAPES.items()}
    for bucket in ranks:
        for name, part in bucket.ranges(bucket.shard.detach(), once):
            assert part.shape == SHAPES[name]
            place = whole[name][part.start : part.start + len(part.values)]
            assert place.isnan().all() and len(part.values)
            place.copy_(part.values)
    return {name: x.view(SHAPES[name]) for name, x in whole.items()}


@pytest.mark.parametrize("size", [1, 2, 5, 16])
@pytest.mark.parametrize("sharded", [True, False])
def test_the_ranks_hold_every_element_once(size, sharded, buckets):
    ranks, want = buckets(size, sharded), parameters()
    length = ceil_div(NUMEL, size) * (1 if sharded else size)
    assert [len(x.shard) for x in ranks] == [length] * size
    whole = put_together(ranks, once=True)
    assert all(torch.equal(whole[name], x) for name, x in want.items())
    if not sharded:  # every rank has all of them
        whole = put_together(ranks[-1:], once=False)
        assert all(torch.equal(whole[name], x) for name, x in want.items())


@pytest.mark.parametrize("sharded", [True, False])
def test_a_parameter_is_a_view_of_the_flat_weights_and_gradients(sharded, buckets):
    for bucket in buckets(2, sharded):
        start = 0
        for name, p in zip(bucket.names, bucket.params):
            assert p.shape == SHAPES[name] and p.grad is p.main_grad
            p.main_grad.fill_(start + 1)
            assert (bucket.grad[start : start + p.numel()] == start + 1).all()
            assert p.data_ptr() == bucket.flat[start:].data_ptr()
            start += p.numel()
        assert start == NUMEL and not bucket.grad[NUMEL:].any()
        own = slice(bucket.rank * len(bucket.shard), None) if sharded else slice(0, None)
        assert bucket.shard_of(bucket.grad).data_ptr() == bucket.grad[own].data_ptr()
        bucket.shard.data.fill_(2.0)  # fp32 masters are the weights
        assert (bucket.shard_of(bucket.flat) == 2).all()


@pytest.mark.parametrize("precision", FORMATS)
def test_weights_are_the_rounded_masters_of_one_rank(precision, buckets):
    (bucket,), want = buckets(1, False, precision), parameters(precision)
    if bucket.scales:
        bucket.scales.flat.fill_(1e9)  # of the step before
    assert bucket.start_amax() is None and bucket.start_all_gather() is None
    bucket.round_masters()
    for name, p in zip(bucket.names, bucket.params):
        assert p.dtype == DTYPES[precision]
        if precision == "fp8":
            q, s = weight_quant(want[name].detach())
            assert torch.equal(p.float(), q.float()) and torch.equal(p.scale, s)
        else:
            assert torch.equal(p, want[name].to(p.dtype))


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("size, sharded", [(1, True), (5, True), (5, False)])
def test_the_bytes_of_a_bucket(size, sharded, precision, buckets):
    key = BucketKey((0,), False, True, precision)
    shapes = [p.shape for p in parameters(precision).values()]
    for bucket in buckets(size, sharded, precision):
        planned = bucket_bytes(shapes, key, size, torch.bfloat16, sharded)
        assert bucket.bytes == planned._replace(moments=0)
        assert planned.moments == 2 * 2 * len(bucket.shard)
        assert bucket_bytes(shapes, key, size, torch.float32, sharded).moments == (
            2 * planned.moments
        )
    numel = sum(shape.numel() for shape in shapes)
    padded = ceil_div(numel, size) * size
    scales = 4 * (1 + 2 * 2) if precision == "fp8" else 0  # one block, and two times two
    assert planned.weights == padded * {"fp32": 4, "bf16": 2, "fp8": 1}[precision] + scales
    shard = padded // size if sharded else padded
    assert planned.masters == (0 if precision == "fp32" else 4 * shard)
    assert planned.gradients == 4 * padded


def test_a_narrow_gradient_is_added_to_the_wide_sum_and_released(buckets):
    (bucket,) = buckets(1, True, "bf16")
    bucket.round_masters()
    p = bucket.params[0]
    for _ in range(2):
        (p.float() * 3).sum().backward()
        assert p.grad is None
    assert p.main_grad.dtype == torch.float32 and (p.main_grad == 6).all()
    assert not bucket.grad[p.numel() :].any()


@pytest.mark.parametrize(
    "name, ndim, formats",
    [
        ("layers.3.attn.wo.weight", 2, ("fp32", "bf16", "fp8")),
        ("mtp.0.block.attn.wo.weight", 2, ("fp32", "bf16", "fp8")),
        ("layers.1.ffn.experts.w2", 3, ("fp32", "bf16", "fp8")),
        ("embed.weight", 2, ("fp32", "bf16", "bf16")),
        ("mtp.0.eh_proj.weight", 2, ("fp32", "bf16", "bf16")),
        ("layers.1.ffn.gate.weight", 2, ("fp32", "fp32", "fp32")),
        ("layers.3.attn.q_norm.weight", 1, ("fp32", "fp32", "fp32")),
    ],
)
def test_the_format_of_a_parameter(name, ndim, formats):
    assert tuple(weight_format(name, ndim, precision) for precision in FORMATS) == formats


def test_gradients_of_experts_are_summed_by_fewer_ranks():
    assert BucketKey((0,), False, True, "fp32").group_size(3, 4) == 12
    assert BucketKey((0,), True, True, "fp32").group_size(3, 4) == 3
    assert BucketKey((0, 7), False, True, "fp32").group_size(3, 4) == 24


@pytest.mark.parametrize("precision", FORMATS)
def test_the_residual_stream_is_narrow_where_weights_are(precision, buckets):
    (bucket,) = buckets(1, True, precision)
    wide = nn.ParameterList([nn.Parameter(torch.zeros(3))])
    assert residual_dtype(wide) == torch.float32
    model = nn.ParameterList([*wide, *bucket.params])
    assert residual_dtype(model) == (torch.float32 if precision == "fp32" else torch.bfloat16)


def test_all_operations_start_before_the_first_is_waited_for():
    events = []

    def start(name: str):
        events.append(f"start {name}")
        if name == "none":
            return None
        return SimpleNamespace(wait=lambda: events.append(f"wait {name}"))

    wait_all(start(name) for name in ("a", "none", "b"))
    assert events == ["start a", "start none", "start b", "wait a", "wait b"]
