"""Weights in FP8 or bf16 on real ranks, with fp32 masters in shards and fp32 gradients."""

from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from math import prod
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from gang import gather_bucket
from hypothesis import given, settings
from hypothesis import strategies as st
from test_parallel import gradient_errors, save_grads
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsv3_ref import ops
from dsv3_ref.checkpoints.sharded import held_ranges, stage
from dsv3_ref.config import TINY, V3
from dsv3_ref.dualpipe import stages_by_rank
from dsv3_ref.fp8 import E4M3, weight_quant
from dsv3_ref.model import Transformer
from dsv3_ref.optim import RECIPES, build_adamw
from dsv3_ref.parallel.block_scales import BlockScales, num_scales
from dsv3_ref.parallel.bucket import (
    parameter_shapes,
    rank_state_bytes,
    staged_bytes,
    weight_format,
)
from dsv3_ref.parallel.engine import EngineSettings, ParallelEngine
from dsv3_ref.parallel.mesh import Mesh
from dsv3_ref.parallel.stage import EmbeddingFunction, Stage
from dsv3_ref.pretrain import train_step
from dsv3_ref.training.objective import RowBatch

CPU = torch.device("cpu")
# matrices of less than a block, of whole blocks, and of more in both directions
CONFIG = replace(
    TINY, vocab_size=64, dim=160, inter_dim=256, moe_inter_dim=136, n_layers=4, n_dense_layers=1,
    n_routed_experts=8, n_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16,
    qk_rope_head_dim=16, v_head_dim=16, n_mtp_layers=1,
)  # fmt: skip
RECIPE = replace(RECIPES["tiny"], max_grad_norm=1e9)
MESHES = [  # pp × dp × ep, schedule, ZeRO
    ((2, 1, 2), "dualpipe", True),
    pytest.param((1, 2, 1), "1f1b", True, marks=pytest.mark.full),
    pytest.param((2, 1, 2), "zb1p", True, marks=pytest.mark.full),
    pytest.param((2, 2, 1), "dualpipev", False, marks=pytest.mark.full),
]  # fmt: skip


@contextmanager
def computing_in(precision: str, *backends: str):
    """Compute as the ranks of a mesh do: in bf16 what is not in FP8."""
    fp8 = ("fp8",) if precision == "fp8" else ()
    bf16 = torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32")
    with ops.use(*fp8, *backends, "auto"), bf16:
        yield


def build(shape, schedule, precision, zero=True, seed=1):
    settings = EngineSettings(schedule, zero=zero, precision=precision)
    return ParallelEngine(CONFIG, RECIPE, Mesh(*shape, CPU), settings, seed)


def step(engine, rows_bs, precision, lr=1e-3):
    with computing_in(precision, "zero_bubble"):
        return engine.train_step(rows_bs, RECIPE, lr, 1e-2, 0.3)


def draw(n: int, seed: int = 0) -> torch.Tensor:
    """Draw n rows in which every token follows from the one before, most of the time."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(64, (n, 1), generator=generator)
    for _ in range(32):
        jump = torch.randint(10, (n, 1), generator=generator) == 0
        rows = torch.cat((rows, (rows[:, -1:] * 5 + 3 + 7 * jump) % 64), 1)
    return rows


# ── The embedding ──


class Results(TorchDispatchMode):
    """(shape, address) of the results of all operations."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        result = fn(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.found |= {(x.shape, x.data_ptr()) for x in tensors}
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_gradients_of_tokens_are_added_to_the_table_without_a_table_of_their_own(dtype):
    """The sum of two micro-batches is exact: only the gradients of tokens are narrow."""
    weight, wide = torch.randn(50, 8, dtype=dtype, requires_grad=True), torch.float64
    weight.main_grad = torch.zeros(50, 8, dtype=wide)
    reference = weight.detach().to(wide).requires_grad_()
    for _ in range(2):
        tokens_bs, g_bsd = torch.randint(20, (3, 40)), torch.randn(3, 40, 8, dtype=dtype)
        F.embedding(tokens_bs, reference).backward(g_bsd.to(wide))
        x_bsd = EmbeddingFunction.apply(weight, tokens_bs)
        assert torch.equal(x_bsd, weight[tokens_bs])
        with Results() as results:
            x_bsd.backward(g_bsd)
        assert weight.grad is None
        tables = [address for shape, address in results.found if shape == weight.shape]
        assert set(tables) == {weight.main_grad.data_ptr()}
    torch.testing.assert_close(weight.main_grad, reference.grad, rtol=1e-14, atol=1e-14)


# ── Quantization of slices ──


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([(5, 7), (130, 200), (2, 136, 40), (3, 100, 300), (256, 128)]),
    st.lists(st.floats(0, 1), max_size=4),
)
def test_slices_quantize_as_the_whole_does(shape, cuts):
    w = torch.randn(shape) * torch.logspace(-3, 3, shape[-2])[:, None]
    ends = [0, *sorted(int(x * w.numel()) for x in cuts), w.numel()]
    slices = [(a, b) for a, b in zip(ends, ends[1:]) if a < b]
    shapes = {"other": torch.Size((3, 5)), "w": w.shape}
    ranks = [BlockScales(shapes, CPU) for _ in slices]
    for scales, (a, b) in zip(ranks, slices):
        scales.add_amax("w", w.flatten()[a:b], a)
    largest = torch.stack([scales.flat for scales in ranks]).amax(0)
    parts = []
    for scales, (a, b) in zip(ranks, slices):
        scales.flat.copy_(largest)
        scales.set_from_amax()
        parts.append(scales.quantize("w", w.flatten()[a:b], a))
    q, s = weight_quant(w)
    assert torch.equal(torch.cat(parts).float(), q.flatten().float())
    assert all(torch.equal(scales.view("w"), s) for scales in ranks)


def weights_of_masters(shape, schedule, zero: bool, precision: str):
    """Take a step; return whether every weight is its rounded master, and its gradient's dtype."""
    engine = build(shape, schedule, precision, zero)
    step(engine, draw(8), precision)
    weights, dtypes = dict(engine.model.named_parameters()), {}
    same = True
    for bucket in engine.optimizer.buckets:
        masters = gather_bucket(bucket, bucket.shard.detach())
        assert masters.dtype == bucket.grad.dtype == torch.float32
        for name in bucket.names:
            master, w = bucket.view(masters, name), weights[name]
            dtypes[name] = w.dtype
            want = master
            if w.dtype == E4M3:
                want, s = weight_quant(master)
                same &= torch.equal(w.scale, s)
            same &= torch.equal(w.detach().float(), want.to(w.dtype).float())
    return same, dtypes


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("shape, schedule, zero", MESHES, ids=str)
def test_weights_are_the_rounded_masters(shape, schedule, zero, precision, gang):
    answers = gang.run(prod(shape), weights_of_masters, shape, schedule, zero, precision)
    assert all(same for same, _ in answers)
    narrow = {"layers.1.ffn.experts.w2", "layers.0.attn.wkv_b.weight", "mtp.0.block.attn.wo.weight"}
    bf16 = {"embed.weight", "head.weight", "mtp.0.eh_proj.weight"}
    fp32 = {"norm.weight", "layers.1.ffn.gate.weight", "layers.3.attn.q_norm.weight"}
    found = {}
    for _, dtypes in answers:
        found |= dtypes
    assert {found[n] for n in narrow} == {E4M3 if precision == "fp8" else torch.bfloat16}
    assert {found[n] for n in bf16} == {torch.bfloat16}
    assert {found[n] for n in fp32} == {torch.float32}


# ── Bytes ──


def state_bytes(shape, schedule, zero: bool, precision: str):
    """Return the planned bytes of a rank, the bytes of its tensors, and those of its model."""
    engine = build(shape, schedule, precision, zero)
    step(engine, draw(8), precision)
    mesh, zero_optimizer = engine.mesh, engine.optimizer
    planned = rank_state_bytes(
        CONFIG, stages_by_rank(schedule, mesh.pp), mesh.pp_rank, mesh.dp, mesh.ep, precision,
        sharded=zero,
    )  # fmt: skip
    storages = {}
    for p in engine.model.parameters():
        scale = getattr(p, "scale", p)
        storages |= {t.untyped_storage().data_ptr(): t.untyped_storage() for t in (p, scale)}
    grads = {b.grad.untyped_storage().data_ptr() for b in zero_optimizer.buckets}
    reduced = {b.shard.grad.untyped_storage().data_ptr() for b in zero_optimizer.buckets}
    own = sum(storage.nbytes() for storage in storages.values())
    average = SimpleNamespace(mean=zero_optimizer.masters())
    staged = sum(x.values.nbytes for x in stage(held_ranges(engine, average, once=True)).values())
    stages = stages_by_rank(schedule, mesh.pp)
    limit = staged_bytes(CONFIG, stages, mesh.pp_rank, mesh.dp, mesh.ep, precision)
    return planned, zero_optimizer.bytes, own, grads == reduced, (mesh.pp_rank, limit, staged)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("shape, schedule, zero", MESHES, ids=str)
def test_a_rank_keeps_the_bytes_that_the_formula_says(shape, schedule, zero, precision, gang):
    answers = gang.run(prod(shape), state_bytes, shape, schedule, zero, precision)
    most: dict[tuple[int, int], int] = {}
    for planned, held, own, in_place, (pp_rank, limit, staged) in answers:
        assert planned == held and own == planned.weights
        assert in_place, "the reduced gradient lies in the flat gradient"
        most[pp_rank, limit] = max(staged, most.get((pp_rank, limit), 0))
    for (_, limit), staged in most.items():
        assert staged == limit, "a checkpoint copies the shards, also without ZeRO"


def test_the_state_of_v3_on_2048_gpus():
    stages = stages_by_rank("dualpipe", 16)

    def gigabytes(rank: int, precision: str):
        return [round(x / 1e9, 2) for x in rank_state_bytes(V3, stages, rank, 2, 64, precision)]

    assert gigabytes(5, "fp8") == [3.32, 1.44, 13.09, 1.44]
    assert gigabytes(0, "fp8") == gigabytes(15, "fp8")
    assert gigabytes(0, "fp8") == [6.91, 0.6, 19.74, 0.6]
    weights, masters, gradients, _ = gigabytes(5, "fp32")
    assert weights == gradients == 13.09 and masters == 0


def test_padding_is_less_than_an_element_per_rank():
    """FP8 slices need no whole blocks, so the bytes are those of the parameters."""
    stages = stages_by_rank("1f1b", 1)
    numel = sum(shape.numel() for shape in parameter_shapes(CONFIG).values())
    gradients = rank_state_bytes(CONFIG, stages, 0, 7, 1, "fp8").gradients
    assert 4 * numel <= gradients < 4 * (numel + 7 * 6)
    shapes = parameter_shapes(CONFIG).items()
    fp8 = [s for n, s in shapes if weight_format(n, len(s), "fp8") == "fp8"]
    assert num_scales(fp8) == sum(weight_quant(torch.zeros(s))[1].numel() for s in fp8)


# ── The residual stream ──


def residual_dtypes(precision: str):
    """Return the dtypes of block outputs, and the bytes of messages of a step."""
    engine = build((2, 1, 1), "1f1b", precision)
    found, sent = set(), []
    run_block, isend = Stage.block, dist.isend

    def block(*args):
        x_bsd = yield from run_block(*args)
        found.add(x_bsd.dtype)
        return x_bsd

    def counting_isend(x, *args, **kwargs):
        sent.append(x.nbytes)
        return isend(x, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "block", block)
        patch.setattr(dist, "isend", counting_isend)
        step(engine, draw(4), precision)
    return found, sum(sent)


def test_the_residual_stream_and_its_messages_are_in_bf16(gang):
    numel = 4 * 32 * CONFIG.dim  # of four rows, up or down
    assert gang.run(2, residual_dtypes, "fp32") == [({torch.float32}, 4 * numel)] * 2
    for precision in ("bf16", "fp8"):
        assert gang.run(2, residual_dtypes, precision) == [({torch.bfloat16}, 2 * numel)] * 2


# ── Gradients and losses ──


LEARNING_RATES = 0.0, 3e-4, 3e-4


def step_alone(precision: str) -> tuple[dict, list[float]]:
    """Return the first gradients and three losses of this process, with fp32 weights."""
    torch.manual_seed(1)
    whole = Transformer(CONFIG)
    whole.embed.bfloat16()  # and with it the residual stream
    optimizer = build_adamw(whole, RECIPE)
    grads, hook = save_grads(whole, optimizer)
    losses = []
    for i, lr in enumerate(LEARNING_RATES):
        with computing_in(precision):
            losses.append(train_step(whole, optimizer, [draw(8, i)], RECIPE, lr, 1e-2, 0.3).loss)
        hook.remove()
    return grads, losses


@cache
def reference_steps(gang, precision: str) -> tuple[dict, list[float]]:
    """Return the gradients and losses with which those of every mesh are compared."""
    return gang.run(1, step_alone, precision)[0]


def compare_steps(shape, schedule, zero: bool, precision: str, grads: dict, want: list[float]):
    """Return the errors of gradients and of three losses against those of one process."""
    engine = build(shape, schedule, precision, zero)
    losses, errors = [], {}
    for i, lr in enumerate(LEARNING_RATES):
        losses.append(step(engine, draw(8, i), precision, lr).loss)
        errors = errors or gradient_errors(engine, grads)
    return errors, [abs(got / alone - 1) for got, alone in zip(losses, want, strict=True)]


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("shape, schedule, zero", MESHES, ids=str)
def test_a_step_is_that_of_one_process_within_rounding(shape, schedule, zero, precision, gang):
    setting = shape, schedule, zero, precision, *reference_steps(gang, precision)
    for errors, losses in gang.run(prod(shape), compare_steps, *setting):
        assert max(errors.values()) < 0.1, max(errors.items(), key=lambda e: e[1])
        assert max(losses) < 0.0025


SHALLOW = replace(CONFIG, n_layers=2, n_mtp_layers=0)


def train_for(steps: int, precision: str, seed: int):
    """Return the loss of every step, and that of rows that were not seen."""
    settings = EngineSettings(precision=precision)
    engine = ParallelEngine(SHALLOW, RECIPE, Mesh(1, 1, dist.get_world_size(), CPU), settings, seed)
    losses = [step(engine, draw(8, i), precision, 5e-5).loss for i in range(steps)]
    with computing_in(precision, "zero_bubble"):
        unseen = engine.mean_loss(RowBatch(draw(16, 999)))
    return losses, unseen


@pytest.mark.parametrize("world, steps", [(1, 8), pytest.param(2, 20, marks=pytest.mark.full)])
def test_the_loss_of_a_run_in_fp8_stays_within_the_reports_bound(world, steps, gang):
    """§3.3: the relative difference to bf16 is below 0.25 %.

    At this size, single steps of one seed differ by about as much with the processor's way of
    summing; the mean over seeds has less of that noise.
    """
    differences = []
    for seed in range(1, 6):
        runs = {}
        for precision in ("bf16", "fp8"):
            (losses, unseen), *others = gang.run(world, train_for, steps, precision, seed)
            assert all(other == (losses, unseen) for other in others)
            runs[precision] = torch.tensor([*losses, unseen])
        assert runs["bf16"][-1] < 0.95 * runs["bf16"][0], "the run learns"
        differences.append(runs["fp8"] / runs["bf16"] - 1)
    assert torch.stack(differences).mean(0).abs().max() < 0.0025
    assert all(difference.mean().abs() < 0.0025 for difference in differences)


# ── Checkpoints ──


def resume(precision: str):
    """Return whether a run that another continues from its tensors equals the run itself."""
    engine = build((2, 1, 2), "dualpipe", precision)
    step(engine, draw(8), precision)
    saved = stage(held_ranges(engine))
    again = build((2, 1, 2), "dualpipe", precision, seed=2)
    for name, part in held_ranges(again).items():
        part.values.copy_(saved[name].values)
    again.optimizer.gather_weights()
    again.optimizer.step_count = engine.optimizer.step_count
    stats = [step(e, draw(8, 1), precision) for e in (engine, again)]
    same = stats[0].loss == stats[1].loss and stats[0].grad_norm == stats[1].grad_norm
    for a, b in zip(held_ranges(engine).values(), held_ranges(again).values()):
        same &= torch.equal(a.values, b.values)
    masters = {n: part.values for n, part in saved.items() if n.startswith("model.")}
    exact = any(not torch.equal(x.bfloat16().float(), x) for x in masters.values())
    return same, exact, {x.dtype for x in masters.values()}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_a_checkpoint_has_the_masters_and_resumes_bit_for_bit(precision, gang):
    assert gang.run(4, resume, precision) == [(True, True, {torch.float32})] * 4
