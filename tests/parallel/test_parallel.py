"""Ranks as real processes over gloo: model parts, dispatch of tokens, and whole training steps."""

from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import chain, combinations, pairwise, product
from math import inf, prod
from typing import NamedTuple

import pytest
import torch
from gang import gather_bucket

from dsv3_ref import ops, scale
from dsv3_ref.config import TINY, V3, UserError
from dsv3_ref.model import Transformer, moe_layers
from dsv3_ref.moe import GroupedExperts, MoE
from dsv3_ref.optim import RECIPES, build_adamw
from dsv3_ref.parallel.build import build_local_model, owning_ranks
from dsv3_ref.parallel.engine import EngineSettings, ParallelEngine
from dsv3_ref.parallel.mesh import Mesh, resolve_parallel_dims
from dsv3_ref.parallel.tape import Tape, interleave, run_to_completion
from dsv3_ref.parallel.token_dispatcher import (
    LINKS,
    AllToAllDispatcher,
    Traffic,
    dispatch_levels,
    link_between,
    pack_bytes,
    unpack_bytes,
)
from dsv3_ref.pretrain import train_step
from dsv3_ref.data.packing import flag_sample, pack_rows
from dsv3_ref.posttraining.sft import flagged_loss, num_loss_tokens
from dsv3_ref.sft import SpecialTokens, assistant_mask
from dsv3_ref.training.objective import NEXT_TOKEN_LOSS, CompletionLoss

CPU = torch.device("cpu")


# ── The mesh ──


def test_dp_defaults_to_the_rest_of_the_world():
    assert resolve_parallel_dims(2048, 16, 64) == (16, 2, 64)  # V3
    assert resolve_parallel_dims(8, 2, 2, 2) == (2, 2, 2)


@pytest.mark.parametrize("world, pp, ep, dp", [(8, 3, 1, None), (8, 2, 2, 1), (4, 1, 8, None)])
def test_ranks_that_do_not_fill_the_world_are_refused(world, pp, ep, dp):
    with pytest.raises(UserError, match=f"but the world size is {world}"):
        resolve_parallel_dims(world, pp, ep, dp)


def mesh_coordinates():
    """Return the coordinates of this rank, and the sizes of its reduce groups."""
    mesh = Mesh(2, 2, 2, CPU)
    mesh.create_reduce_groups([(0,), (0, 1)])
    sizes = {}
    for key, group in mesh.reduce_groups.items():
        size = torch.tensor([1.0])
        torch.distributed.all_reduce(size, group=group)
        sizes[key] = int(size)
    return (mesh.pp_rank, mesh.dp_rank, mesh.ep_rank, mesh.data_rank), sizes


def test_groups_sum_dense_parameters_over_dp_and_ep_and_experts_over_dp(gang):
    answers = gang.run(8, mesh_coordinates)
    want = [(p, d, e, 2 * d + e) for p, d, e in product((0, 1), repeat=3)]
    assert [coordinates for coordinates, _ in answers] == want
    for (p, *_), sizes in answers:
        only_stage_0 = {((0,), False): 4, ((0,), True): 2} if p == 0 else {}
        assert sizes == only_stage_0 | {((0, 1), False): 8, ((0, 1), True): 4}


# ── A rank's part of the model ──


def sum_of_squares(config, ends) -> int:
    """Return Σ multiplications² of the stages whose layers end there."""
    layers, after = scale.layer_costs(config)
    work = [sum(layers[a:b]) for a, b in pairwise((0, *ends, config.n_layers))]
    work[-1] += after
    return sum(x**2 for x in work)


@pytest.mark.parametrize("n, stages", [(61, 16), (4, 4), (5, 2), (61, 1), (12, 8)])
def test_stages_share_all_layers_in_order_and_the_work_evenly(n, stages):
    c = replace(V3, n_layers=n)
    parts = scale.partition_layers(c, stages)
    assert list(chain.from_iterable(parts)) == list(range(n)) and len(parts) == stages
    assert all(parts[:-1]), "only the last stage may have no layers: it has the head"
    if n < 61:
        cuts = combinations(range(1, n + (stages > 1)), stages - 1)
        best = min(sum_of_squares(c, ends) for ends in cuts)
        assert sum_of_squares(c, [part.stop for part in parts[:-1]]) == best


def test_the_first_and_the_last_stage_hold_the_embedding():
    line, bent = [(0,), (1,), (2,)], [(0, 3), (1, 2), (2, 1), (3, 0)]
    assert owning_ranks("embed.weight", TINY, line) == (0, 2)  # tokens enter; MTP
    assert owning_ranks("embed.weight", replace(TINY, n_mtp_layers=0), line) == (0,)
    assert owning_ranks("embed.weight", TINY, bent) == (0, 3)
    assert owning_ranks("head.weight", TINY, bent) == (0, 3)
    assert owning_ranks("layers.2.attn.wo.weight", TINY, bent) == (1, 2)


def compare_local_model(stage: int, num_stages: int):
    """Build a rank's part; return (equal weights, names, equal random state, all names)."""
    mesh = Mesh(1, 1, 2, CPU)
    local = build_local_model(TINY, mesh, (stage,), num_stages, seed=3)
    after = torch.rand(1)
    torch.manual_seed(3)
    whole = dict(Transformer(TINY).state_dict())
    same = [
        torch.equal(t, whole[n].chunk(2)[mesh.ep_rank] if ".experts." in n else whole[n])
        for n, t in local.state_dict().items()
    ]
    return all(same), set(local.state_dict()), torch.equal(after, torch.rand(1)), set(whole)


@pytest.mark.parametrize("num_stages", [1, 2])
def test_a_rank_starts_with_the_weights_of_one_device_bit_for_bit(num_stages, gang):
    names_of_all = set()
    for stage in range(num_stages):
        answers = gang.run(2, compare_local_model, stage, num_stages)
        for same_weights, names, same_random_state, whole in answers:
            assert same_weights and same_random_state
            assert names <= whole and (num_stages == 1 or len(names) < len(whole))
            names_of_all |= names
    assert names_of_all == whole


# ── The tape ──


def test_a_tape_of_segments_has_the_gradients_of_autograd():
    w = torch.randn(3, 3, requires_grad=True)
    x = torch.randn(4, 3)
    tape, log = Tape(), []

    class Pause:
        def forward(self, a):
            log.append("forward")
            yield
            return (a,)

        def backward(self, g):
            log.append("backward")
            yield
            return [g]

    def run():
        a = tape.run(lambda x: x @ w, x)
        (b,) = yield from tape.run_comm(Pause(), a)
        c, d = tape.run(lambda a, b: (a * b, b.sum()), a, b)  # a has two readers
        return c, d

    c, d = run_to_completion(run())
    tape.add_grad(c, torch.ones_like(c))
    tape.add_grad(d, torch.tensor(2.0))
    run_to_completion(tape.backward())
    want_x = x.clone().requires_grad_()
    a = want_x @ w
    dx, dw = torch.autograd.grad((a * a).sum() + 2 * a.sum(), (want_x, w))
    assert torch.allclose(tape.pop_grad(x), dx) and torch.allclose(w.grad, dw)
    assert log == ["forward", "backward"]


def test_a_tape_has_no_gradient_of_integers_nor_of_unused_outputs():
    tape, x = Tape(), torch.randn(4, 2)
    index = torch.tensor([0, 2])
    rows, more = tape.run(lambda x, i: (3 * x[i], i + 1), x, index)
    unused = tape.run(lambda x: 2 * x, x)
    assert not rows.requires_grad and more.tolist() == [1, 3]
    assert tape.id_of(x) == tape.id_of(x) != tape.id_of(unused)
    tape.add_grad(tape.id_of(rows), torch.ones(2, 2))
    run_to_completion(tape.backward())
    grad = tape.pop_grad(tape.id_of(x))
    assert grad.tolist() == [[3, 3], [0, 0], [3, 3], [0, 0]]
    assert tape.pop_grad(x) is None and tape.pop_grad(index) is None


def test_a_tape_without_training_records_nothing():
    w, tape = torch.randn(2, 2, requires_grad=True), Tape(training=False)
    y = tape.run(lambda x: x @ w, torch.randn(3, 2))
    assert not y.requires_grad and not tape.records and Tape().training


def test_generators_take_turns():
    log = []

    def steps(name, n):
        for i in range(n):
            log.append((name, i))
            yield
        return name

    assert interleave(steps("f", 2), steps("b", 3)) == ["f", "b"]
    assert log == [("f", 0), ("b", 0), ("f", 1), ("b", 1), ("b", 2)]


# ── The dispatch of tokens ──


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_packed_tensors_can_be_unpacked(rows):
    tensors = [
        torch.randn(rows, 3), torch.randn(rows, 2).to(torch.float8_e4m3fn),
        torch.randint(9, (rows, 4)), torch.randn(rows, 1).bfloat16(),
    ]  # fmt: skip
    for got, want in zip(unpack_bytes(pack_bytes(*tensors), *tensors), tensors):
        assert got.dtype == want.dtype and torch.equal(got.float(), want.float())


def relative(got, want) -> float:
    return ((got - want).norm() / want.norm()).item()


DISPATCHED = replace(V3, dim=128, moe_inter_dim=128, n_routed_experts=16, n_activated_experts=4,
                     n_expert_groups=4, n_limited_groups=2)  # fmt: skip


def compare_dispatch(world: int, ranks_per_node: int, fp8: bool):
    """Return errors of output and gradients relative to `MoE.forward_routed`, and bytes by link."""
    c = DISPATCHED
    torch.manual_seed(0)
    moe, mesh = MoE(c), Mesh(1, 1, world, CPU)
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    torch.manual_seed(5 + mesh.ep_rank)
    n = 0 if mesh.ep_rank == 1 else 7 + mesh.ep_rank  # one rank has no tokens
    x_nd = torch.randn(n, c.dim)
    r = moe.gate(x_nd[None])
    weight_nk, expert_nk = r.topk_weights_bsk[0].detach(), r.topk_ids_bsk[0]
    leaves = [t.clone().requires_grad_() for t in (x_nd, weight_nk)]
    y_nd = moe.forward_routed(*leaves, expert_nk)
    g_nd = torch.randn_like(y_nd)
    y_nd.backward(g_nd)
    experts, want = moe.experts, {}
    for name in ("w1", "w2", "w3"):
        w = getattr(experts, name)
        want[name] = mesh.all_reduce_sum(w.grad).chunk(world)[mesh.ep_rank]
        setattr(experts, name, torch.nn.Parameter(w.detach().chunk(world)[mesh.ep_rank].clone()))
    tape, traffic = Tape(), Traffic()
    dispatcher = AllToAllDispatcher(dispatch_levels(c, mesh, ranks_per_node, traffic), fp8)
    got = run_to_completion(dispatcher.apply_experts(tape, experts, x_nd, weight_nk, expert_nk))
    tape.add_grad(got, g_nd)
    run_to_completion(tape.backward())
    errors = {name: relative(getattr(experts, name).grad, w) for name, w in want.items()}
    if n:
        dx, dw = tape.pop_grad(x_nd), tape.pop_grad(weight_nk)
        errors |= {"y": relative(got, y_nd), "dx": relative(dx, leaves[0].grad)}
        errors["dw"] = relative(dw, leaves[1].grad)
    return errors, dict(traffic.bytes)


@pytest.mark.parametrize("world, ranks_per_node", [(2, 0), (4, 0), (4, 2), (8, 4)])
def test_experts_on_many_ranks_are_the_experts_on_one(world, ranks_per_node, gang):
    for errors, _ in gang.run(world, compare_dispatch, world, ranks_per_node, False):
        assert max(errors.values()) < 1e-6, errors


def test_dispatch_in_fp8_loses_a_rounding_and_halves_no_gradient(gang):
    for errors, _ in gang.run(4, compare_dispatch, 4, 2, True):
        assert 0.005 < max(errors.values()) < 0.08, errors


def test_a_second_hop_takes_bytes_off_the_links_between_nodes(gang):
    one = gang.run(8, compare_dispatch, 8, 0, False)
    two = gang.run(8, compare_dispatch, 8, 4, False)
    assert all("internode" not in links for _, links in one)  # without nodes all are neighbors
    row, k = 128 * 4, 4 * 4  # bytes of a token's numbers, and of one number for each choice
    forward = (row + k + k) + row  # with weights and expert ids, and the result
    backward = row + (row + k)  # the result's gradient, and those of token and weights
    across = sum(links["internode"] for _, links in two)
    tokens = sum(0 if e == 1 else 7 + e for e in range(8))
    sent, rest = divmod(across, forward + backward)
    assert not rest and 0 < sent <= tokens  # once per token and node, of which there are two


# Four ranks in two nodes have two experts each. The tokens of every rank, by their two experts:
CHOICES = [[(0, 1), (2, 5)], [], [(6, 7), (0, 2)], [(6, 4)]]
# Rows in one hop: A 0→0; B 0→1, 0→2; C 2→3; D 2→0, 2→1; E 3→3, 3→2.
# In two: across nodes A 0→0; B 0→0, 0→2; C 2→2; D 2→0; E 3→3;
# then inside A 0→0; B 0→1, 2→2; C 2→3; D 0→0, 0→1; E 3→3, 3→2.
# A row has 128 numbers. Bytes in fp32: dispatch 512 + 8 + 8 with weights and expert ids, combine
# 512; backward 512 and 512 + 8. In FP8: dispatch 128 + 4 + 8 + 8, combine 512; 132 and 520.
BYTES = {  # (ranks per node, FP8, hops): by link, of all ranks and of rank 0
    (2, False, 1): ([4144, 6216, 6216], [2072, 1040, 2072]),
    (2, True, 1): ([2624, 3936, 3936], [1312, 280, 1312]),
    (2, False, 2): ([16_576, 8288, 4144], [8288, 2080, 2072]),
    (2, True, 2): ([10_496, 5248, 2624], [5248, 560, 1312]),
}


def count_bytes(ranks_per_node: int, fp8: bool, hops: int) -> list[int]:
    """Return the bytes that this rank sends by link, in a forward and a backward pass."""
    c = replace(DISPATCHED, n_routed_experts=8, n_activated_experts=2)
    mesh, traffic = Mesh(1, 1, 4, CPU), Traffic()
    levels = dispatch_levels(c, mesh, ranks_per_node if hops == 2 else 0, traffic)
    if hops == 1:  # one group over both nodes
        levels[0].links = [link_between(mesh.ep_rank, e, ranks_per_node) for e in range(4)]
    experts = GroupedExperts(2, 128, 128)
    for p in experts.parameters():
        torch.nn.init.normal_(p, std=0.1)
    expert_nk = torch.tensor(CHOICES[mesh.ep_rank], dtype=torch.int64).view(-1, 2)
    x_nd, weight_nk = torch.randn(len(expert_nk), 128), torch.rand(len(expert_nk), 2)
    tape = Tape()
    dispatcher = AllToAllDispatcher(levels, fp8)
    y_nd = run_to_completion(dispatcher.apply_experts(tape, experts, x_nd, weight_nk, expert_nk))
    tape.add_grad(y_nd, torch.ones_like(y_nd))
    run_to_completion(tape.backward())
    return [traffic.bytes[link] for link in LINKS]


@pytest.mark.parametrize("case", BYTES, ids=str)
def test_the_bytes_of_dispatch_and_combine(case, gang):
    all_ranks, rank_0 = BYTES[case]
    sent = gang.run(4, count_bytes, *case)
    assert [sum(of_link) for of_link in zip(*sent)] == all_ranks
    assert sent[0] == rank_0


def test_experts_that_no_group_size_divides_are_refused(gang):
    (message,) = set(gang.run(3, refusal))
    assert message == "--ep 3 does not divide the 16 routed experts: choose a divisor"


def refusal() -> str:
    try:
        build_local_model(TINY, Mesh(1, 1, 3, CPU), (0,), 1, 0)
    except UserError as e:
        return str(e)
    return "not refused"


# ── A step over all ranks, compared with one process ──

MICRO = replace(
    TINY, vocab_size=64, dim=32, inter_dim=64, moe_inter_dim=16, n_layers=4, q_lora_rank=16,
    kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_mtp_layers=2,
)  # fmt: skip


def grouped_mm(a, b, offs):
    """Compute `F.grouped_mm` in any dtype: a group's rows by its matrix, or its columns by rows."""
    sizes = offs.diff(prepend=offs.new_zeros(1)).tolist()
    if b.ndim == 3:
        return torch.cat([x @ w for x, w in zip(a.split(sizes), b)])
    return torch.stack([x @ y for x, y in zip(a.split(sizes, 1), b.split(sizes))])


@contextmanager
def computing_in(dtype):
    """Build modules in a dtype; in fp64 `.float()` keeps it, and a loop replaces `F.grouped_mm`."""
    to_float = torch.Tensor.float

    def keep_float64(x):
        return x if x.dtype == torch.float64 else to_float(x)

    with pytest.MonkeyPatch.context() as patch:
        if dtype == torch.float64:
            patch.setattr(torch.Tensor, "float", keep_float64)
            patch.setattr(torch.nn.functional, "grouped_mm", grouped_mm)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


SPECIAL_TOKENS = SpecialTokens(*range(5))


def draw_conversations(n: int) -> torch.Tensor:
    """Draw n rows of 17 tokens, packed with conversations of 7 to 17, some without an eos token."""
    special = SPECIAL_TOKENS
    samples = []
    for i in range(3 * n):
        words = torch.randint(5, 64, (2 + i % 9,)).tolist()
        cut = 1 + i % (len(words) - 1)
        question, answer = words[:cut], words[cut:]
        sample = [special.bos, special.user, *question, special.assistant, *answer, special.eos]
        mask = assistant_mask(torch.tensor([sample]), special)[0].tolist()
        samples.append(flag_sample(sample, mask))
    return torch.tensor(pack_rows(samples, 17, special.pad)[:n])


def draw_tokens(n: int) -> torch.Tensor:
    """Draw n rows of 17 tokens."""
    return torch.randint(0, 64, (n, 17))


def compare_training(
    shape, name: str, zero: bool, ranks_per_node: int, dtype, is_packed: bool, cp: int, want
):
    """Run `compare_steps` in fp32 or in fp64."""
    with computing_in(dtype):
        return compare_steps(shape, name, zero, ranks_per_node, dtype, is_packed, cp, want)


def save_grads(model, optimizer) -> tuple[dict, torch.utils.hooks.RemovableHandle]:
    """Copy all gradients into a dictionary before each step of an optimizer."""
    grads = {}

    def copy(*_):
        for name, p in model.named_parameters():
            grads[name] = torch.zeros_like(p) if p.grad is None else p.grad.clone()

    return grads, optimizer.register_step_pre_hook(copy)


def gradient_errors(engine: ParallelEngine, grads: dict) -> dict[str, float]:
    """Return the relative error of every gradient of a rank against those of one process."""
    errors, mesh = {}, engine.mesh
    for bucket in engine.optimizer.buckets:
        flat = gather_bucket(bucket, bucket.shard.grad)
        for n in bucket.names:
            g = grads[n].chunk(mesh.ep)[mesh.ep_rank] if ".experts." in n else grads[n]
            errors[n] = relative(bucket.view(flat, n), g) if g.norm() else 0.0
    return errors


def step_numbers(stats, num_mtp: int, dtype) -> torch.Tensor:
    """Return the losses and the gradient norm of a step."""
    return torch.tensor(
        [stats.loss, stats.total, stats.grad_norm, *stats.mtp[:num_mtp]], dtype=dtype
    )


class Alone(NamedTuple):
    """Three steps of one process: their rows and numbers, the first gradients, the last biases."""

    rows: list[torch.Tensor]
    stats: list
    grads: dict[str, torch.Tensor]
    biases: dict[int, torch.Tensor]


LEARNING_RATES = 0.0, 1e-3, 1e-3


def step_settings(is_packed: bool):
    """Return the recipe and the weight of MTP."""
    recipe = replace(RECIPES["tiny"], balance_loss_coeff=0.01, max_grad_norm=1e9)
    return (replace(recipe, balance_loss_coeff=0.0), 0.0) if is_packed else (recipe, 0.3)


def moments_for(dtype):
    return torch.bfloat16 if dtype == torch.float32 else dtype


def micro(num_ranks: int):
    """Return a config with layers for the stages of so many ranks of a pipeline."""
    return replace(MICRO, n_layers=8) if num_ranks == 4 else MICRO


def step_alone(config, dtype, is_packed: bool) -> Alone:
    """Take three steps in this process with `train_step`."""
    recipe, mtp_weight = step_settings(is_packed)
    draw, loss_functions = draw_tokens, []
    if is_packed:
        draw = draw_conversations
        loss_functions.append(lambda model, rows_bs, _: flagged_loss(model, rows_bs))
        loss_functions.append(num_loss_tokens)
    with computing_in(dtype):
        torch.manual_seed(1)
        whole = Transformer(config)
        optimizer = build_adamw(whole, recipe, moments_for(dtype))
        rows, stats = [draw(n) for n in (7, 5, 5)], []
        grads, hook = save_grads(whole, optimizer)
        for rows_bs, lr in zip(rows, LEARNING_RATES):
            args = recipe, lr, 1e-2, mtp_weight, inf
            stats.append(train_step(whole, optimizer, [rows_bs], *args, *loss_functions))
            hook.remove()
    return Alone(rows, stats, grads, {n: m.gate.bias for n, m in moe_layers(whole).items()})


@cache
def reference_steps(gang, config, dtype, is_packed: bool) -> Alone:
    """Return the steps of one process, with which those of every mesh are compared."""
    return gang.run(1, step_alone, config, dtype, is_packed)[0]


def compare_steps(
    shape, name: str, zero: bool, ranks_per_node: int, dtype, is_packed: bool, cp: int, want: Alone
):
    """Compare three steps on a mesh with those of one process.

    Return (relative errors of the gradients, whether loads and biases are equal, largest relative
    difference of a step's numbers).
    """
    recipe, mtp_weight = step_settings(is_packed)
    engine = ParallelEngine(
        micro(shape[0]), recipe, Mesh(*shape, CPU, cp=cp),
        EngineSettings(name, moments_for(dtype), zero, ranks_per_node=ranks_per_node), 1,
        CompletionLoss() if is_packed else NEXT_TOKEN_LOSS,
    )  # fmt: skip
    stats, errors = [], {}
    for rows_bs, lr in zip(want.rows, LEARNING_RATES):
        with ops.use("zero_bubble", "auto"):
            stats.append(engine.train_step(rows_bs, recipe, lr, 1e-2, mtp_weight))
        errors = errors or gradient_errors(engine, want.grads)
    main = len(want.stats[0].load_le)  # with special tokens MTP modules are not trained
    pairs = list(zip(stats, want.stats, strict=True))
    same = all(torch.equal(a.load_le.long()[:main], b.load_le.long()) for a, b in pairs)
    for n, m in moe_layers(engine.model).items():
        same &= torch.equal(m.gate.bias, want.biases[n])
    differences = []
    for a, b in pairs:
        got, alone = (step_numbers(x, len(b.mtp), dtype) for x in (a, b))
        differences.append((got / alone - 1).abs().max().item())
    return errors, same, max(differences)


SHAPES = [
    ((1, 2, 2), "1f1b", True, 0), ((2, 1, 2), "zb1p", False, 0), ((1, 1, 4), "1f1b", False, 2),
    ((2, 2, 1), "dualpipe", True, 0), ((4, 1, 1), "dualpipe", True, 0),
    ((2, 1, 1), "dualpipev", True, 0), ((2, 1, 1), "gpipe", True, 0),
]  # fmt: skip
MORE_SHAPES = [
    ((2, 1, 2), "1f1b", False, 0), ((2, 1, 4), "zb1p", False, 2), ((4, 1, 2), "1f1b", True, 0),
    ((2, 2, 2), "zb1p", True, 0), ((4, 1, 2), "dualpipe", True, 0),
    ((2, 1, 4), "dualpipe", False, 2), ((4, 1, 2), "dualpipev", True, 0),
    ((2, 1, 4), "dualpipev", False, 0), ((4, 2, 1), "gpipe", True, 0),
]  # fmt: skip
SHAPES += [pytest.param(*case, marks=pytest.mark.full) for case in MORE_SHAPES]


SCHEDULES = "1f1b", "zb1p", "dualpipe", "dualpipev"
GRID = [  # two hops for ep 4
    pytest.param(
        (2, 1 if ep == 4 else 2, ep), name, zero, 2 * (ep == 4),
        marks=[] if (name, ep, zero) == ("dualpipe", 1, True) else pytest.mark.full,
    )
    for name, ep, zero in product(SCHEDULES, (1, 2, 4), (True, False))
]  # fmt: skip
CASE = "shape", "name", "zero", "ranks_per_node"


def check_a_step(gang, dtype, tolerance: float, shape, *setting, is_packed=False, cp: int = 1):
    """Check every parameter's gradient, loads, biases and the numbers of three steps."""
    names = set()
    config = micro(shape[0])
    want = reference_steps(gang, config, dtype, is_packed)
    answers = gang.run(prod(shape), compare_training, shape, *setting, dtype, is_packed, cp, want)
    for errors, same, difference in answers:
        assert max(errors.values()) < tolerance, max(errors.items(), key=lambda e: e[1])
        assert same and difference < tolerance
        names |= set(errors)
    assert names == {n for n, _ in Transformer(config).named_parameters()}


@pytest.mark.parametrize(CASE, SHAPES, ids=str)
def test_a_step_on_any_mesh_is_the_step_of_one_process(shape, name, zero, ranks_per_node, gang):
    """Sums have another order, which costs up to 6e-7; one process differs from fp64 by 7e-7."""
    check_a_step(gang, torch.float32, 1e-6, shape, name, zero, ranks_per_node)


@pytest.mark.parametrize(CASE, GRID, ids=str)
def test_in_fp64_the_order_of_sums_does_not_matter(shape, name, zero, ranks_per_node, gang):
    check_a_step(gang, torch.float64, 1e-13, shape, name, zero, ranks_per_node)


PACKED = [
    ((2, 1, 2), "dualpipe", True, 0),
    pytest.param((1, 2, 2), "1f1b", True, 0, marks=pytest.mark.full),
    pytest.param((2, 2, 1), "zb1p", False, 0, marks=pytest.mark.full),
    pytest.param((2, 1, 4), "dualpipev", True, 2, marks=pytest.mark.full),
]  # fmt: skip


@pytest.mark.parametrize(CASE, PACKED, ids=str)
def test_so_is_a_step_on_packed_conversations(shape, name, zero, ranks_per_node, gang):
    """Samples do not attend to each other; the loss is a mean over all answers' tokens."""
    setting = shape, name, zero, ranks_per_node
    check_a_step(gang, torch.float64, 1e-13, *setting, is_packed=True)


def measure_traffic(name: str, num_microbatches: int):
    """Return the time of a step's all-to-alls: in flight, exposed, and the hidden fraction."""
    engine = ParallelEngine(MICRO, RECIPES["tiny"], Mesh(2, 1, 2, CPU), EngineSettings(name))
    rows = torch.randint(0, 64, (2 * num_microbatches, 33))
    with ops.use("zero_bubble", "auto"):
        engine.train_step(rows, RECIPES["tiny"], 1e-3, 0.0, 0.3)
    traffic = engine.traffic
    return traffic.in_flight_s, traffic.exposed_s, traffic.hidden


def test_pairs_hide_all_to_alls_behind_computation(gang):
    hidden = {}
    for name in ("1f1b", "dualpipe"):
        times = gang.run(4, measure_traffic, name, 4)
        assert all(0 < exposed <= in_flight for in_flight, exposed, _ in times)
        hidden[name] = sum(fraction for *_, fraction in times) / len(times)
    assert hidden["dualpipe"] > hidden["1f1b"]


def refusal_of_scope(balance_over: str) -> str:
    engine = ParallelEngine(MICRO, RECIPES["tiny"], Mesh(1, 1, 1, CPU))
    try:
        r = replace(RECIPES["tiny"], balance_loss_scope=balance_over)
        engine.train_step(torch.randint(0, 64, (2, 17)), r, 0.0, 0.0, 0.3)
    except UserError as e:
        return str(e)
    return "not refused"


def test_a_loss_over_the_batch_is_refused(gang):
    assert "over sequences only" in gang.run(1, refusal_of_scope, "batch")[0]


def too_deep() -> str:
    try:
        shallow, settings = replace(MICRO, n_layers=3), EngineSettings("dualpipev")
        ParallelEngine(shallow, RECIPES["tiny"], Mesh(2, 1, 1, CPU), settings)
    except UserError as e:
        return str(e)
    return "not refused"


def test_more_stages_than_layers_are_refused(gang):
    assert set(gang.run(2, too_deep)) == {"3 layers cannot be cut into 4 stages: reduce --pp"}
