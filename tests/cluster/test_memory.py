"""All tensors that real ranks hold after each step of a schedule, beside the plan, to the byte."""

import gc
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from dsv3_ref import ops
from dsv3_ref.cluster.memory import (
    MemorySettings,
    fixed_rows,
    usage_after_steps,
    working_set_bytes,
)
from dsv3_ref.config import TINY
from dsv3_ref.optim import RECIPES
from dsv3_ref.parallel.engine import EngineSettings, ParallelEngine
from dsv3_ref.parallel.mesh import Mesh
from dsv3_ref.parallel.pipeline import PipelineRun
from dsv3_ref.scale import dispatch_rows
from dsv3_ref.training.recompute import SavedTensors, saved_tensors

CONFIG = replace(  # with widths that tell kinds of tensors apart
    TINY, vocab_size=500, n_layers=5, n_dense_layers=1, n_routed_experts=16,
    n_activated_experts=4, embed_std=0.02, dim=256, n_heads=6, qk_rope_head_dim=24,
)  # fmt: skip
WITHOUT_MTP = replace(CONFIG, n_mtp_layers=0)
S = 48  # tokens of a micro-batch
WORKING_SET = 12_000_000  # within a step


# ── Counting ──


class LiveStorages(TorchDispatchMode):
    """The memory of every tensor that exists: those of before, and all results of operations.

    Weights do not count, nor do products of their shape, which kernels add to gradients at once.
    """

    def __init__(self, weight_shapes: frozenset[torch.Size] = frozenset(), every: int = 8):
        super().__init__()
        self.weight_shapes, self.every = weight_shapes, every  # operations between two counts
        self.live: dict[int, tuple[StorageWeakRef, int, tuple]] = {}
        self.peak, self.working_set = 0, 0
        self.inside, self.num_calls = False, 0
        for x in gc.get_objects():
            if isinstance(x, torch.Tensor):
                self.add(x)

    def add(self, x: torch.Tensor) -> None:
        if x.device.type == "cpu" and x.shape not in self.weight_shapes:
            memory = x.untyped_storage()
            if memory._cdata not in self.live:
                about = x.dtype, tuple(x.shape)
                self.live[memory._cdata] = StorageWeakRef(memory), memory.nbytes(), about

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        result = fn(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.add(x)
        self.num_calls += 1
        if self.inside and self.num_calls % self.every == 0:
            self.peak = max(self.peak, self.total())
        return result

    @contextmanager
    def one_step(self):
        """Find the most memory within the block above that before and after it."""
        before = self.total()
        self.peak, self.inside = before, True
        yield
        self.inside = False
        self.working_set = max(self.working_set, self.peak - max(before, self.total()))

    def sizes(self) -> dict[int, int]:
        """Bytes by the address of the storage, of those that are still alive."""
        self.live = {k: entry for k, entry in self.live.items() if not entry[0].expired()}
        return {k: n for k, (_, n, _) in self.live.items()}

    def total(self) -> int:
        return sum(self.sizes().values())


def addresses(*values) -> set[int]:
    """Addresses of the storages of all tensors in nested values."""
    return {x.untyped_storage()._cdata for x in tree_leaves(values) if isinstance(x, torch.Tensor)}


def closure_values(deferred) -> list:
    """Values that the functions of deferred weight gradients hold."""
    cells = []
    for calls in deferred.values():
        for _, wgrad in calls:
            cells += [cell.cell_contents for cell in wgrad.__closure__ or ()]
    return cells


class Lean(torch.autograd.Function):
    """Attention that saves what kernels save: inputs, output, a number per head and row."""

    @staticmethod
    def forward(ctx, scale, *qkv):
        with _disable_current_modes():  # no kernel holds all scores
            ctx.scale, o = scale, ops.IMPLS["attention"]["torch"](*qkv, scale).contiguous()
        o = o.clone()
        ctx.save_for_backward(*qkv, o, torch.empty(qkv[0].shape[:3]))
        return o

    @staticmethod
    def backward(ctx, g):
        qkv = [x.detach().requires_grad_() for x in ctx.saved_tensors[:3]]
        with _disable_current_modes(), torch.enable_grad():
            o = ops.IMPLS["attention"]["torch"](*qkv, ctx.scale)
            grads = torch.autograd.grad(o, qkv, g)
        return None, *(x.clone() for x in grads)


def evenly(scores_bse, topk, *_):
    """Choose experts at equal distances: every token has as many on every rank."""
    e = scores_bse.shape[-1]
    first_s = torch.arange(scores_bse.shape[1])
    ids_sk = (first_s[:, None] + torch.arange(0, e, e // topk)) % e
    return ids_sk.expand(len(scores_bse), -1, -1).contiguous()


def gemm(a, a_s, b, b_s, dtype=torch.float32, out=None):
    return a.new_zeros(len(a), len(b), dtype=dtype) if out is None else out


def grouped_gemm(a, a_s, b, b_s, tokens_per_expert_e, dtype=torch.float32):
    return a.new_zeros(len(a), b.shape[1], dtype=dtype)


def grouped_wgrad(g, g_s, x, x_s, tokens_per_expert_e, out=None):
    if out is None:
        return g.new_zeros(len(tokens_per_expert_e), len(g), len(x), dtype=torch.float32)
    return out


@contextmanager
def kernels_like(precision: str = "fp8"):
    """Attention that saves what kernels do, and even routes, in FP8 or bf16.

    Products in FP8 allocate their results, as kernels do, and compute nothing.
    """
    ops.impl("attention", "lean")(lambda q, k, v, scale: Lean.apply(scale, q, k, v))
    ops.impl("group_limited_topk", "lean")(evenly)
    ops.impl("fp8_gemm", "lean")(gemm)
    ops.impl("fp8_grouped_gemm", "lean")(grouped_gemm)
    ops.impl("fp8_grouped_wgrad", "lean")(grouped_wgrad)
    products = ["fp8"] if precision == "fp8" else ["zero_bubble"]
    with ops.use("lean", *products, "auto"):
        yield


TOLD_APART = {  # by dtype and shape; other lines of the plan are compared as a sum
    "output of attention", "expert inputs", "gate and up of experts", "rotations", "messages",
    "deferred weight gradients",
}  # fmt: skip


def merge_kinds(sizes: Counter, told_apart: set[str]) -> Counter:
    """The sizes by kind, with the sum of kinds that are not told apart as "rest"."""
    merged: Counter = Counter()
    for kind, size in sizes.items():
        merged[kind if kind in told_apart else "rest"] += size
    return merged


def kind_of(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    """Which line of the plan an activation belongs to, by the widths of `CONFIG`."""
    d, h = CONFIG.dim, CONFIG.n_heads
    attention = "output of attention"
    inputs, gate_up = "expert inputs", "gate and up of experts"
    width, is_row = shape[-1] if shape else 0, len(shape) == 2
    if dtype == torch.float8_e4m3fn:
        return {d: inputs, CONFIG.moe_inter_dim: gate_up}[width]
    if dtype == torch.uint8:
        return attention
    if dtype == torch.float32 and is_row:  # scales, and cosines and sines
        kinds = {d // 128: inputs, 1: gate_up, CONFIG.qk_rope_head_dim // 2: "rotations"}
        return kinds.get(width, "rest")
    if dtype == torch.float32 and shape[2:] in {(2,), (h,)}:
        return attention
    return "rest"


def activation_kind(about: tuple, saved: SavedTensors, address: int) -> tuple[str, tuple]:
    """The kind of a storage and its (dtype, shape), as autograd has saved it if it has."""
    if address in saved.storages:
        handles = [x.x for x in saved.storages[address][2] if x.x is not None]
        if handles:
            about = handles[0].dtype, min((tuple(x.shape) for x in handles), key=len)
    return kind_of(*about), about


def bytes_by_kind(
    live: LiveStorages, run: PipelineRun, known: set[int], saved: SavedTensors
) -> tuple[Counter, Counter]:
    """Bytes of everything alive that was not there before, by what holds it; the activations.

    Whatever nothing else holds is an activation.
    """
    p2p, statistics = run.p2p, run.microbatches[0].stats
    fixed = run.pipeline.dispatcher.fixed
    left_out = fixed.num_left_out if fixed else None
    messages = [x for _, x in p2p.sent.values()], [x for _, x in p2p.pending.values()]
    groups = {
        "messages": addresses(messages, list(p2p.local.values())),
        "deferred weight gradients": addresses(closure_values(run.deferred_wgrads)),
        "losses and loads": addresses(list(vars(statistics).values()), left_out),
    }
    found: Counter = Counter()
    tensors: Counter = Counter()
    for address, size in live.sizes().items():
        if address not in known:
            kinds = [kind for kind, group in groups.items() if address in group]
            if not kinds:
                kind, about = activation_kind(live.live[address][2], saved, address)
                kinds = [kind]
                tensors[kind, str(about)] += 1
            found[kinds[0]] += size
    del found["losses and loads"]
    return found, tensors


def count_step(
    shape, name: str, batch: int, ranks_per_node: int, cp: int = 1, capacity: float = 0.0,
    precision: str = "fp8",
):  # fmt: skip
    """Return (pp rank, bytes by kind after each step of the schedule, the most within a step).

    Beside the bytes are the activations, counted by kind, dtype and shape. Ranks that share
    sequences have no MTP module, for which one of them has fewer tokens.
    """
    config = CONFIG if cp == 1 else WITHOUT_MTP
    mesh = Mesh(*shape, torch.device("cpu"), cp=cp)
    recipe = replace(RECIPES["tiny"], max_grad_norm=1e9)
    step = EngineSettings(
        name, precision=precision, ranks_per_node=ranks_per_node, fp8_dispatch=precision == "fp8",
        dispatch_capacity=capacity,
    )  # fmt: skip
    engine = ParallelEngine(config, recipe, mesh, step)
    rows = torch.randint(config.vocab_size, (batch, cp * S + 1))
    counted, saved = [], []
    run_step = PipelineRun.run_step

    def measured_step(run, step):
        with live.one_step():
            run_step(run, step)
        counted.append(bytes_by_kind(live, run, known, saved[-1]))

    def train(rows_bs):
        with saved_tensors(True) as now, torch.autocast("cpu", torch.bfloat16):
            saved.append(now)
            engine.train_step(rows_bs, recipe, 1e-3, 1e-3, 0.3)

    with kernels_like(precision), pytest.MonkeyPatch.context() as patch:
        train(rows[: batch // 2])  # the optimizer allocates its moments
        gc.collect()
        shapes = frozenset(p.shape for p in engine.model.parameters())
        with LiveStorages(shapes, 1 if precision == "bf16" else 32) as live:
            known = set(live.sizes())
            patch.setattr(PipelineRun, "run_step", measured_step)
            train(rows)
    return mesh.pp_rank, counted, live.working_set


# ── The test ──


def settings(
    name: str, pp: int, ep: int, microbatches: int, ranks_per_node: int, cp: int = 1,
    capacity: float = 0.0, fp8: bool = True,
) -> MemorySettings:  # fmt: skip
    """Return what the plan of such a mesh depends on."""
    num_stages, per_node = 2 * pp if name == "dualpipev" else pp, ranks_per_node or ep
    fixed = fixed_rows(CONFIG, ep, per_node, S, capacity)
    with kernels_like():
        rows = dispatch_rows(CONFIG, ep, per_node)
    config = CONFIG if cp == 1 else WITHOUT_MTP
    return MemorySettings(
        config, name, pp, ep, num_stages, microbatches, S, fp8, 2, rows, fixed, cp
    )


SHORT = [("zb1p", 2, 2, 0, 4), ("dualpipev", 2, 2, 0, 4)]  # below: dualpipe with cp, 1f1b in bf16
LONG = [
    ("1f1b", 2, 2, 0, 4), ("dualpipe", 2, 2, 0, 4),
    ("1f1b", 4, 1, 0, 6), ("1f1b", 2, 4, 2, 3), ("zb1p", 4, 2, 0, 6), ("gpipe", 2, 2, 0, 3),
    ("dualpipe", 4, 2, 0, 10), ("dualpipe", 2, 4, 2, 6), ("dualpipev", 2, 4, 0, 5),
]  # fmt: skip
CASES = [*SHORT, *(pytest.param(*case, marks=pytest.mark.full) for case in LONG)]


@pytest.mark.parametrize("name, pp, ep, ranks_per_node, m", CASES)
def test_ranks_hold_what_was_planned_to_the_byte(name, pp, ep, ranks_per_node, m, gang):
    """After every step of the schedule, not only at the peak, and on every rank."""
    at = settings(name, pp, ep, m, ranks_per_node)
    mesh = (pp, 1, ep)
    check_bytes(at, gang.run(pp * ep, count_step, mesh, name, m * ep, ranks_per_node))


SHARED = [
    ("dualpipe", 2, 2, 2, 4),
    *(
        pytest.param(*case, marks=pytest.mark.full)
        for case in [("1f1b", 2, 2, 2, 3), ("zb1p", 2, 2, 2, 4), ("dualpipev", 1, 4, 4, 2)]
    ),
]


@pytest.mark.parametrize("name, pp, ep, cp, m", SHARED)
def test_ranks_that_share_sequences_hold_what_was_planned(name, pp, ep, cp, m, gang):
    """Their activations are those of their own tokens; gathered latents are not kept."""
    at = settings(name, pp, ep, m, 0, cp)
    check_bytes(at, gang.run(pp * ep, count_step, (pp, 1, ep), name, m * ep // cp, 0, cp))


PADDED = [("dualpipe", 2, 2, 0, 4, 1.5), ("zb1p", 2, 4, 2, 3, 1.5)]


@pytest.mark.parametrize("name, pp, ep, ranks_per_node, m, capacity", PADDED)
@pytest.mark.full
def test_so_do_ranks_that_dispatch_with_fixed_sizes(
    name, pp, ep, ranks_per_node, m, capacity, gang
):
    at = settings(name, pp, ep, m, ranks_per_node, capacity=capacity)
    args = (pp, 1, ep), name, m * ep, ranks_per_node, 1, capacity
    check_bytes(at, gang.run(pp * ep, count_step, *args))


BF16 = [
    ("1f1b", 2, 1, 0, 3),
    *(
        pytest.param(*case, marks=pytest.mark.full)
        for case in [("dualpipe", 2, 2, 0, 4), ("zb1p", 2, 4, 2, 3)]
    ),
]


@pytest.mark.parametrize("name, pp, ep, ranks_per_node, m", BF16)
def test_so_do_ranks_in_bf16(name, pp, ep, ranks_per_node, m, gang):
    at = settings(name, pp, ep, m, ranks_per_node, fp8=False)
    args = (pp, 1, ep), name, m * ep, ranks_per_node, 1, 0.0, "bf16"
    answers = gang.run(pp * ep, count_step, *args)
    check_bytes(at, answers)
    assert 0.5 < max(within for *_, within in answers) / working_set_bytes(at) < 1


def check_bytes(at: MemorySettings, answers) -> None:
    """Compare what each rank holds after every step with the plan, by kind.

    In bf16 the widths of activations do not tell their kinds, so their sum is compared.
    """
    told_apart = TOLD_APART if at.fp8 else {"messages", "deferred weight gradients"}
    for rank, counted, within in answers:
        planned = usage_after_steps(at, rank)
        for i, (want, (got, tensors)) in enumerate(zip(planned, counted, strict=True)):
            planned_kinds, held_kinds = (merge_kinds(x, told_apart) for x in (want, got))
            for kind in planned_kinds | held_kinds:
                held = [f"{n} × {about}" for about, n in tensors.items()]
                assert held_kinds[kind] == planned_kinds[kind], (rank, i, kind, "\n".join(held))
        assert within < WORKING_SET
