"""Parameters in flat tensors: narrow weights, their fp32 masters in shards, and fp32 gradients.

Linear layers of blocks keep their weights in FP8 if they compute in FP8. Embedding, head and the
projection of MTP are in bf16, gates and norms in fp32 (§3.3.1). Masters and gradients are in fp32
(§3.3.3).
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsv3_ref.checkpoints.layout import is_expert
from dsv3_ref.checkpoints.meta import build_on_meta
from dsv3_ref.checkpoints.safetensors_files import FlatRange
from dsv3_ref.config import Config, ceil_div
from dsv3_ref.fp8 import E4M3
from dsv3_ref.parallel.block_scales import BlockScales, num_scales
from dsv3_ref.parallel.build import owning_ranks

Precision = Literal["fp32", "bf16", "fp8"]  # as a format, "fp32" means the parameter's own dtype

# ── Which parameters share a bucket ──


class BucketKey(NamedTuple):
    """The properties that the parameters of a bucket share."""

    owners: tuple[int, ...]  # the pp ranks that hold them
    expert: bool
    is_matrix: bool  # matrices have weight decay
    weight_format: Precision

    def group_size(self, dp: int, ep: int) -> int:
        """Return the number of ranks that sum their gradients."""
        return len(self.owners) * dp * (1 if self.expert else ep)


def weight_format(name: str, ndim: int, precision: Precision) -> Precision:
    """Return the format in which a mesh keeps a parameter when it computes in `precision`."""
    if ndim == 1 or ".gate." in name:
        return "fp32"
    in_block = name.startswith("layers.") or ".block." in name
    return "bf16" if precision == "fp8" and not in_block else precision


def residual_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of the residual stream: bf16 if weights are narrow, else their own."""
    dtypes = {p.dtype for p in model.parameters()}
    return torch.bfloat16 if dtypes & {torch.bfloat16, E4M3} else dtypes.pop()


def bucket_key(
    name: str, ndim: int, config: Config, stages_by_rank: Sequence[Sequence[int]],
    precision: Precision,
) -> BucketKey:  # fmt: skip
    """Return the key of the bucket of a parameter."""
    owners = owning_ranks(name, config, stages_by_rank)
    return BucketKey(owners, is_expert(name), ndim > 1, weight_format(name, ndim, precision))


# ── Bytes ──


class StateBytes(NamedTuple):
    """The bytes that a rank keeps between steps, by kind."""

    weights: int  # with the scales of FP8
    masters: int  # in fp32, of weights that are narrower
    gradients: int
    moments: int


def shard_numel(shapes: Sequence[torch.Size], group_size: int) -> int:
    """Return the elements of a bucket that one of `group_size` ranks updates."""
    return ceil_div(sum(shape.numel() for shape in shapes), group_size)


def bucket_bytes(
    shapes: Sequence[torch.Size], key: BucketKey, group_size: int, moments: torch.dtype,
    sharded: bool,
) -> StateBytes:  # fmt: skip
    """Return the bytes of a bucket of fp32 parameters of these shapes."""
    numel = shard_numel(shapes, group_size) * group_size
    shard = numel // group_size if sharded else numel
    bytes_per_weight = {"fp32": 4, "bf16": 2, "fp8": 1}[key.weight_format]
    scales = 4 * num_scales(shapes) if key.weight_format == "fp8" else 0
    masters = 0 if key.weight_format == "fp32" else 4 * shard
    return StateBytes(
        bytes_per_weight * numel + scales, masters, 4 * numel, 2 * moments.itemsize * shard
    )


@cache
def parameter_shapes(config: Config) -> dict[str, torch.Size]:
    """Return the shape of every parameter of the whole model."""
    return {name: p.shape for name, p in build_on_meta(config).named_parameters()}


def rank_state_bytes(
    config: Config, stages_by_rank: Sequence[Sequence[int]], pp_rank: int, dp: int, ep: int,
    precision: Precision, moments: torch.dtype = torch.bfloat16, sharded: bool = True,
) -> StateBytes:  # fmt: skip
    """Return the bytes of the buckets that a rank of a mesh pp × dp × ep holds."""
    shapes = bucket_shapes(config, stages_by_rank, pp_rank, ep, precision)
    buckets = [
        bucket_bytes(own, key, key.group_size(dp, ep), moments, sharded)
        for key, own in shapes.items()
    ]
    return StateBytes(*map(sum, zip(*buckets)))


@cache
def bucket_keys(
    config: Config, stages_by_rank: tuple[tuple[int, ...], ...], precision: Precision
) -> dict[str, BucketKey]:
    """Return the key of the bucket of every parameter of the whole model."""
    return {
        name: bucket_key(name, len(shape), config, stages_by_rank, precision)
        for name, shape in parameter_shapes(config).items()
    }


def bucket_shapes(
    config: Config, stages_by_rank: Sequence[Sequence[int]], pp_rank: int, ep: int,
    precision: Precision,
) -> dict[BucketKey, list[torch.Size]]:  # fmt: skip
    """Return the shapes of the parameters in each bucket of a rank."""
    shapes: dict[BucketKey, list[torch.Size]] = {}
    keys = bucket_keys(config, tuple(map(tuple, stages_by_rank)), precision)
    for name, shape in parameter_shapes(config).items():
        key = keys[name]
        if pp_rank in key.owners:
            first, *rest = shape
            local = torch.Size((first // ep, *rest)) if key.expert else shape
            shapes.setdefault(key, []).append(local)
    return shapes


def staged_bytes(
    config: Config, stages_by_rank: Sequence[Sequence[int]], pp_rank: int, dp: int, ep: int,
    precision: Precision, moments: torch.dtype = torch.bfloat16,
) -> int:  # fmt: skip
    """Return the most bytes that a rank of a mesh copies to its host for a checkpoint.

    They are its shards, whether or not it holds more: masters, moments, averaged masters, and the
    biases of the gates, which the first rank of a stage writes.
    """
    numel = 0
    for key, shapes in bucket_shapes(config, stages_by_rank, pp_rank, ep, precision).items():
        numel += shard_numel(shapes, key.group_size(dp, ep))
    biases = 0
    for name, numel_of_bias in gate_biases(config).items():
        if owning_ranks(name, config, stages_by_rank)[0] == pp_rank:
            biases += 4 * numel_of_bias
    return (4 + 2 * moments.itemsize + 4) * numel + biases


@cache
def gate_biases(config: Config) -> dict[str, int]:
    """Return the number of elements of every bias of a gate, which no optimizer updates."""
    return {name: x.numel() for name, x in build_on_meta(config).named_buffers()}


# ── The tensors ──


class Piece(NamedTuple):
    """The part of a parameter that lies in this rank's shard of a bucket."""

    name: str
    of_param: slice  # of the flattened parameter
    of_shard: slice


class Bucket:
    """Parameters whose gradients one group reduces, concatenated in one flat tensor.

    A gradient is added to its parameter's `main_grad`, a view of the flat gradient. `shard` has
    the master weights that this rank updates: the weights themselves if they are in fp32.
    """

    def __init__(
        self, named: dict[str, nn.Parameter], group: dist.ProcessGroup, sharded: bool,
        weight_format: Precision = "fp32",
    ):  # fmt: skip
        self.names, self.params = list(named), list(named.values())
        self.group, self.sharded = group, sharded
        self.weight_format = weight_format
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.offsets: dict[str, tuple[int, torch.Size]] = {}
        end = 0
        for name, p in named.items():
            self.offsets[name] = end, p.shape
            end += p.numel()
        wide = self.params[0].detach()
        self.grad = wide.new_zeros(ceil_div(end, self.size) * self.size)
        dtype = {"bf16": torch.bfloat16, "fp8": E4M3}.get(weight_format, wide.dtype)
        self.flat = torch.zeros_like(self.grad, dtype=dtype)
        masters = self.shard_of(self.flat)
        if weight_format != "fp32":
            masters = torch.zeros_like(self.shard_of(self.grad))
        for piece in self.pieces():
            x = named[piece.name].detach().flatten()
            masters[piece.of_shard] = x[piece.of_param]
        self.shard = nn.Parameter(masters)
        self.scales: BlockScales | None = None
        if weight_format == "fp8":
            self.scales = BlockScales({n: p.shape for n, p in named.items()}, wide.device)
        for name, p in named.items():
            self.attach(name, p)

    def attach(self, name: str, parameter: Any) -> None:
        """Give a parameter its views of the flat tensors; its values come from the masters."""
        parameter.data = self.view(self.flat, name)
        parameter.main_grad = self.view(self.grad, name)
        if self.scales:
            parameter.scale = self.scales.view(name)
        elif self.weight_format == "fp32":
            parameter.grad = parameter.main_grad
        else:
            parameter.register_post_accumulate_grad_hook(add_to_main_grad)

    def view(self, flat: Tensor, name: str) -> Tensor:
        """Return the view of a parameter in a flat tensor."""
        start, shape = self.offsets[name]
        return flat[start : start + shape.numel()].view(shape)

    def shard_of(self, flat: Tensor) -> Tensor:
        """Return the part of a flat tensor that this rank updates."""
        return flat.chunk(self.size)[self.rank] if self.sharded else flat

    def pieces(self) -> list[Piece]:
        """Return the parts of parameters that lie in this rank's shard."""
        length = len(self.grad) // self.size if self.sharded else len(self.grad)
        first = self.rank * length if self.sharded else 0
        pieces = []
        for name, (start, shape) in self.offsets.items():
            a, b = max(start, first), min(start + shape.numel(), first + length)
            if a < b:
                of_param, of_shard = slice(a - start, b - start), slice(a - first, b - first)
                pieces.append(Piece(name, of_param, of_shard))
        return pieces

    def ranges(self, shard: Tensor, once: bool) -> Iterator[tuple[str, FlatRange]]:
        """Yield the part of each parameter that a shard holds, as views.

        once: only what no other rank of the group yields too.
        """
        first, last = 0, len(shard)
        if once and not self.sharded:
            length = len(shard) // self.size
            first, last = self.rank * length, (self.rank + 1) * length
        for name, of_param, of_shard in self.pieces():
            a, b = max(of_shard.start, first), min(of_shard.stop, last)
            if a < b:
                start = of_param.start + a - of_shard.start
                yield name, FlatRange(self.offsets[name][1], start, shard[a:b])

    # ── Communication ──

    def start_reduce(self) -> dist.Work:
        """Start to sum the gradient over the group, in place; return the work to wait for."""
        self.shard.grad = self.shard_of(self.grad)
        if not self.sharded:
            return dist.all_reduce(self.grad, group=self.group, async_op=True)
        return dist.reduce_scatter_tensor(
            self.shard.grad, self.grad, group=self.group, async_op=True
        )

    def start_amax(self) -> dist.Work | None:
        """Start to find the largest master of every FP8 block; return the work to wait for."""
        if not self.scales:
            return None
        self.scales.flat.zero_()
        for name, of_param, of_shard in self.pieces():
            self.scales.add_amax(name, self.shard.detach()[of_shard], of_param.start)
        if not self.sharded:
            return None
        return dist.all_reduce(self.scales.flat, dist.ReduceOp.MAX, group=self.group, async_op=True)

    def round_masters(self) -> None:
        """Round this rank's masters to the format of the weights."""
        weights, masters = self.shard_of(self.flat), self.shard.detach()
        if self.scales:
            self.scales.set_from_amax()
            for name, of_param, of_shard in self.pieces():
                values = self.scales.quantize(name, masters[of_shard], of_param.start)
                weights[of_shard].copy_(values)
        elif self.weight_format == "bf16":
            weights.copy_(masters)

    def start_all_gather(self) -> dist.Work | None:
        """Start to collect the other shards; return the work to wait for, or None if unsharded."""
        if not self.sharded:
            return None
        flat = self.flat.view(torch.uint8) if self.scales else self.flat  # gloo has no FP8
        own = self.shard_of(flat)
        return dist.all_gather_into_tensor(flat, own, group=self.group, async_op=True)

    @property
    def bytes(self) -> StateBytes:
        """The bytes of weights, masters and gradients; the optimizer has the moments."""
        scales = self.scales.flat.nbytes if self.scales else 0
        masters = self.shard.nbytes if self.weight_format != "fp32" else 0
        return StateBytes(self.flat.nbytes + scales, masters, self.grad.nbytes, 0)


def add_to_main_grad(parameter: Any) -> None:
    """Add a gradient that autograd has computed in a narrow dtype to the fp32 sum; release it."""
    if parameter.grad is not None:  # Wgrad may have added it already
        parameter.main_grad.add_(parameter.grad)
        parameter.grad = None


def wait_all(works: Iterable[dist.Work | None]) -> None:
    """Wait for operations, all of which are started first."""
    for work in list(works):
        if work:
            work.wait()
