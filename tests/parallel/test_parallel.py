"""Ranks as real processes: a rank's part of the model, and the exchange of tokens, over gloo."""

from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations, pairwise, product
from math import inf, prod

import pytest
import torch
from gang import Gang

from dsv3_ref import ops, scale
from dsv3_ref.config import TINY, V3, UserError
from dsv3_ref.model import Transformer, moe_layers
from dsv3_ref.moe import MoE
from dsv3_ref.optim import RECIPES, build_adamw
from dsv3_ref.parallel.build import build_local_model, owning_ranks
from dsv3_ref.parallel.engine import ParallelEngine
from dsv3_ref.parallel.mesh import Mesh, resolve_parallel_dims
from dsv3_ref.parallel.tape import Tape, interleave, run_to_completion
from dsv3_ref.parallel.token_dispatcher import (
    AllToAllDispatcher,
    Traffic,
    dispatch_levels,
    pack_bytes,
    unpack_bytes,
)
from dsv3_ref.pretrain import train_step
from dsv3_ref.sft import SpecialTokens, num_loss_tokens, pack_samples, sft_loss

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def gang():
    made = Gang()
    yield made
    made.stop()


# ── The mesh ──


def test_dp_is_what_is_left_of_the_world():
    assert resolve_parallel_dims(2048, 16, 64) == (16, 2, 64)  # V3
    assert resolve_parallel_dims(8, 2, 2, 2) == (2, 2, 2)


@pytest.mark.parametrize("world, pp, ep, dp", [(8, 3, 1, None), (8, 2, 2, 1), (4, 1, 8, None)])
def test_ranks_that_do_not_fill_the_world_are_refused(world, pp, ep, dp):
    with pytest.raises(UserError, match=f"but the world size is {world}"):
        resolve_parallel_dims(world, pp, ep, dp)


def places():
    mesh = Mesh(2, 2, 2, CPU)
    mesh.create_reduce_groups([(0,), (0, 1)])
    mine = torch.tensor([1.0])
    members = {}
    for key, group in mesh.reduce_groups.items():
        seen = mine.clone()
        torch.distributed.all_reduce(seen, group=group)
        members[key] = int(seen)
    return (mesh.pp_rank, mesh.dp_rank, mesh.ep_rank, mesh.data_rank), members


def test_groups_sum_dense_parameters_over_dp_and_ep_and_experts_over_dp(gang):
    answers = gang.run(8, places)
    want = [(p, d, e, 2 * d + e) for p in (0, 1) for d in (0, 1) for e in (0, 1)]
    assert [place for place, _ in answers] == want
    for (p, *_), members in answers:
        alone = {((0,), False): 4, ((0,), True): 2} if p == 0 else {}
        assert members == alone | {((0, 1), False): 8, ((0, 1), True): 4}


# ── What a rank holds ──


def spent(c, ends) -> list[int]:
    """Multiplications of stages whose layers end there."""
    layers, after = scale.layer_costs(c)
    shares = [sum(layers[a:b]) for a, b in pairwise((0, *ends))]
    return [*shares[:-1], shares[-1] + after]


@pytest.mark.parametrize("n, stages", [(61, 16), (4, 4), (5, 2), (61, 1), (12, 8)])
def test_stages_share_all_layers_in_order_and_the_work_evenly(n, stages):
    c = replace(V3, n_layers=n)
    parts = scale.partition_layers(c, stages)
    assert [i for part in parts for i in part] == list(range(n)) and len(parts) == stages
    assert all(parts[:-1]), "only the last stage may have no layers: it has the head"
    if n < 61:
        squares = lambda ends: sum(share**2 for share in spent(c, (*ends, n)))
        best = min(map(squares, combinations(range(1, n + (stages > 1)), stages - 1)))
        assert squares([part.stop for part in parts[:-1]]) == best


def test_the_embedding_is_held_where_tokens_enter_and_where_mtp_is():
    line, bent = [(0,), (1,), (2,)], [(0, 3), (1, 2), (2, 1), (3, 0)]
    assert owning_ranks("embed.weight", TINY, line) == (0, 2)
    assert owning_ranks("embed.weight", replace(TINY, n_mtp_layers=0), line) == (0,)
    assert (
        owning_ranks("embed.weight", TINY, bent)
        == owning_ranks("head.weight", TINY, bent)
        == (0, 3)
    )
    assert owning_ranks("layers.2.attn.wo.weight", TINY, bent) == (1, 2)


def part(p: int, stages: int):
    mesh = Mesh(1, 1, 2, CPU)
    mine = build_local_model(TINY, mesh, (p,), stages, seed=3)
    after = torch.rand(1)
    torch.manual_seed(3)
    whole = dict(Transformer(TINY).state_dict())
    same = [
        torch.equal(t, whole[n].chunk(2)[mesh.ep_rank] if ".experts." in n else whole[n])
        for n, t in mine.state_dict().items()
    ]
    return all(same), sorted(mine.state_dict()), torch.equal(after, torch.rand(1)), sorted(whole)


@pytest.mark.parametrize("stages", [1, 2])
def test_a_rank_begins_with_the_weights_of_one_device_bit_for_bit(stages, gang):
    held = set()
    for stage in range(stages):
        for same, names, goes_on, whole in gang.run(2, part, stage, stages):
            assert same and goes_on  # nor has the stream of random numbers moved
            assert set(names) <= set(whole) and (stages == 1 or len(names) < len(whole))
            held |= set(names)
    assert held == set(whole)


# ── The tape ──


def test_a_tape_of_pieces_has_the_gradients_of_autograd():
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


def test_generators_take_turns():
    log = []

    def steps(name, n):
        for i in range(n):
            log.append((name, i))
            yield
        return name

    assert interleave(steps("f", 2), steps("b", 3)) == ["f", "b"]
    assert log == [("f", 0), ("b", 0), ("f", 1), ("b", 1), ("b", 2)]


# ── The exchange ──


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_tensors_side_by_side_come_apart_again(rows):
    tensors = [
        torch.randn(rows, 3), torch.randn(rows, 2).to(torch.float8_e4m3fn),
        torch.randint(9, (rows, 4)), torch.randn(rows, 1).bfloat16(),
    ]  # fmt: skip
    for got, want in zip(unpack_bytes(pack_bytes(*tensors), *tensors), tensors):
        assert got.dtype == want.dtype and torch.equal(got.float(), want.float())


def relative(got, want) -> float:
    return ((got - want).norm() / want.norm()).item()


def exchanged(world: int, ranks_per_node: int, fp8: bool):
    """Relative errors of output and gradients beside `MoE.forward_routed`, and the bytes by link."""
    c = replace(V3, dim=128, moe_inter_dim=128, n_routed_experts=16, n_activated_experts=4,
                n_expert_groups=4, n_limited_groups=2)  # fmt: skip
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
    exchange = AllToAllDispatcher(dispatch_levels(c, mesh, ranks_per_node, traffic), fp8)
    got = run_to_completion(exchange.apply_experts(tape, experts, x_nd, weight_nk, expert_nk))
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
    for errors, _ in gang.run(world, exchanged, world, ranks_per_node, False):
        assert max(errors.values()) < 1e-6, errors


def test_dispatch_in_fp8_loses_a_rounding_and_halves_no_gradient(gang):
    for errors, _ in gang.run(4, exchanged, 4, 2, True):
        assert 0.005 < max(errors.values()) < 0.08, errors


def test_a_second_hop_takes_bytes_off_the_links_between_nodes(gang):
    one = gang.run(8, exchanged, 8, 0, False)
    two = gang.run(8, exchanged, 8, 4, False)
    assert all("internode" not in links for _, links in one)  # without nodes all are neighbors
    row, k = 128 * 4, 4 * 4  # bytes of a token's numbers, and of one number for each choice
    there_and_back = (row + k + k) + row  # with weights and experts, and the result
    backward = row + (row + k)  # its gradient, and those of token and weights
    across = sum(links["internode"] for _, links in two)
    tokens = sum(0 if e == 1 else 7 + e for e in range(8))
    sent, rest = divmod(across, there_and_back + backward)
    assert not rest and 0 < sent <= tokens  # once a token and node, of which there are two


def test_experts_that_no_group_size_divides_are_refused(gang):
    (message,) = set(gang.run(3, refusal))
    assert message == "--ep 3 does not divide 16 routed experts"


def refusal() -> str:
    try:
        build_local_model(TINY, Mesh(1, 1, 3, CPU), (0,), 1, 0)
    except UserError as e:
        return str(e)
    return "not refused"


# ── A step over all ranks, beside one process ──

MICRO = replace(
    TINY, vocab_size=64, dim=32, inter_dim=64, moe_inter_dim=16, n_layers=8, q_lora_rank=16,
    kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_mtp_layers=2,
)  # fmt: skip


def grouped_mm(a, b, offs):
    """`F.grouped_mm` in any dtype: a group's rows by its matrix, or its columns by its rows."""
    sizes = offs.diff(prepend=offs.new_zeros(1)).tolist()
    if b.ndim == 3:
        return torch.cat([x @ w for x, w in zip(a.split(sizes), b)])
    return torch.stack([x @ y for x, y in zip(a.split(sizes, 1), b.split(sizes))])


@contextmanager
def computing_in(dtype):
    """Modules begin in it; in fp64 `.float()` is no way back, and a loop does what torch lacks."""
    to_float = torch.Tensor.float
    wide = lambda x: x if x.dtype == torch.float64 else to_float(x)
    with pytest.MonkeyPatch.context() as patch:
        if dtype == torch.float64:
            patch.setattr(torch.Tensor, "float", wide)
            patch.setattr(torch.nn.functional, "grouped_mm", grouped_mm)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


SPECIAL_TOKENS = SpecialTokens(*range(5))


def talks(n: int) -> torch.Tensor:
    """n rows of 17 tokens, packed with conversations of 7 to 17, some without an answer's end."""
    samples = []
    for i in range(3 * n):
        words = torch.randint(5, 64, (2 + i % 9,)).tolist()
        cut = 1 + i % (len(words) - 1)
        asked, said = words[:cut], words[cut:]
        samples.append(
            [
                SPECIAL_TOKENS.bos,
                SPECIAL_TOKENS.user,
                *asked,
                SPECIAL_TOKENS.assistant,
                *said,
                SPECIAL_TOKENS.eos,
            ]
        )
    return torch.tensor(pack_samples(samples, 17, SPECIAL_TOKENS.pad)[:n])


def trained(shape, name: str, zero: bool, ranks_per_node: int, dtype, special_tokens=None):
    """`compared`, all of it in fp32 or in fp64."""
    with computing_in(dtype):
        return compared(shape, name, zero, ranks_per_node, dtype, special_tokens)


def compared(shape, name: str, zero: bool, ranks_per_node: int, dtype, special_tokens):
    """Relative errors of every gradient, and of three steps' numbers, beside `train_step`."""
    c, r = (
        MICRO,
        replace(
            RECIPES["tiny"], balance_loss_coeff=0.0 if special_tokens else 0.01, max_grad_norm=1e9
        ),
    )
    draw, weight = (
        talks if special_tokens else lambda n: torch.randint(0, 64, (n, 17)),
        0.0 if special_tokens else 0.3,
    )
    how = (
        (
            lambda m, x, _: sft_loss(m, x, special_tokens),
            lambda x: num_loss_tokens(x, special_tokens),
        )
        if special_tokens
        else ()
    )
    mesh, moments = Mesh(*shape, CPU), torch.bfloat16 if dtype == torch.float32 else dtype
    engine = ParallelEngine(
        c,
        r,
        mesh,
        name,
        1,
        moments,
        zero,
        ranks_per_node=ranks_per_node,
        special_tokens=special_tokens,
    )
    torch.manual_seed(1)
    whole = Transformer(c)
    optimizer, rows = build_adamw(whole, r, moments), draw(7)
    grads, stats = {}, []
    zeros = lambda p: torch.zeros_like(p) if p.grad is None else p.grad.clone()
    see = lambda *_: grads.update({n: zeros(p) for n, p in whole.named_parameters()})
    hook = optimizer.register_step_pre_hook(see)
    want = train_step(whole, optimizer, [rows], r, 0.0, 1e-2, weight, inf, *how)
    hook.remove()
    with ops.use("zero_bubble", "auto"):
        got = engine.train_step(rows, r, 0.0, 1e-2, weight)
        errors = {}
        for bucket in engine.optimizer.buckets:
            flat = bucket.all_gather(bucket.shard.grad)
            for n in bucket.names:
                g = grads[n].chunk(mesh.ep)[mesh.ep_rank] if ".experts." in n else grads[n]
                errors[n] = relative(bucket.view(flat, n), g) if g.norm() else 0.0
        stats.append((got, want))
        for _ in range(2):
            rows = draw(5)
            want = train_step(whole, optimizer, [rows], r, 1e-3, 1e-2, weight, inf, *how)
            stats.append((engine.train_step(rows, r, 1e-3, 1e-2, weight), want))
    main = len(stats[0][1].load_le)  # MTP modules rest where only answers are learnt
    same = all(torch.equal(a.load_le.long()[:main], b.load_le.long()) for a, b in stats)
    gates = moe_layers(whole)
    same &= all(
        torch.equal(m.gate.bias, gates[n].gate.bias) for n, m in moe_layers(engine.model).items()
    )
    mtp = len(stats[0][1].mtp)
    numbers = lambda s: torch.tensor([s.loss, s.total, s.grad_norm, *s.mtp[:mtp]], dtype=dtype)
    apart = max((numbers(a) / numbers(b) - 1).abs().max().item() for a, b in stats)
    return errors, same, apart, sorted(errors)


SHAPES = [
    ((1, 2, 2), "1f1b", True, 0), ((2, 1, 2), "1f1b", False, 0), ((4, 1, 2), "1f1b", True, 0),
    ((2, 2, 2), "zb1p", True, 0), ((2, 1, 4), "zb1p", False, 2), ((2, 2, 1), "dualpipe", True, 0),
    ((4, 1, 2), "dualpipe", True, 0), ((2, 1, 4), "dualpipe", False, 2),
    ((2, 1, 1), "dualpipev", True, 0), ((4, 1, 2), "dualpipev", True, 0),
    ((2, 1, 4), "dualpipev", False, 0), ((4, 2, 1), "gpipe", True, 0),
]  # fmt: skip


SCHEDULES = "1f1b", "zb1p", "dualpipe", "dualpipev"
GRID = [  # two hops for ep 4
    pytest.param(
        (2, 1 if ep == 4 else 2, ep), name, zero, 2 * (ep == 4),
        marks=[] if (ep, zero) == (2, True) else pytest.mark.full,
    )
    for name, ep, zero in product(SCHEDULES, (1, 2, 4), (True, False))
]  # fmt: skip
CASE = "shape", "name", "zero", "ranks_per_node"


def check_a_step(gang, dtype, gradient: float, number: float, shape, *setting, special_tokens=None):
    """Every parameter's gradient, loads, biases and the numbers of three steps."""
    held = set()
    for errors, same, apart, names in gang.run(
        prod(shape), trained, shape, *setting, dtype, special_tokens
    ):
        assert max(errors.values()) < gradient, max(errors.items(), key=lambda e: e[1])
        assert same and apart < number
        held |= set(names)
    assert held == {n for n, _ in Transformer(MICRO).named_parameters()}


@pytest.mark.parametrize(CASE, SHAPES, ids=str)
def test_a_step_on_any_mesh_is_the_step_of_one_process(shape, name, zero, ranks_per_node, gang):
    """Sums have another order: up to 6e-7, in norms of latents; one process is 7e-7 off fp64."""
    check_a_step(gang, torch.float32, 1e-6, 1e-6, shape, name, zero, ranks_per_node)


@pytest.mark.parametrize(CASE, GRID, ids=str)
def test_in_fp64_nothing_is_left_of_what_the_order_of_sums_does(
    shape, name, zero, ranks_per_node, gang
):
    check_a_step(gang, torch.float64, 1e-13, 1e-13, shape, name, zero, ranks_per_node)


PACKED = [
    ((1, 2, 2), "1f1b", True, 0), ((2, 1, 2), "dualpipe", True, 0), ((2, 2, 1), "zb1p", False, 0),
    ((2, 1, 4), "dualpipev", True, 2),
]  # fmt: skip


@pytest.mark.parametrize(CASE, PACKED, ids=str)
def test_so_is_a_step_on_packed_conversations(shape, name, zero, ranks_per_node, gang):
    """Samples blind to each other, the mean over all answers' tokens, on every mesh."""
    setting = shape, name, zero, ranks_per_node
    check_a_step(gang, torch.float64, 1e-13, 1e-13, *setting, special_tokens=SPECIAL_TOKENS)


def measured(name: str, micro: int):
    """What a pass leaves to wait for, and how many pairs it ran."""
    mesh = Mesh(2, 1, 2, CPU)
    engine = ParallelEngine(MICRO, RECIPES["tiny"], mesh, name)
    with ops.use("zero_bubble", "auto"):
        engine.train_step(torch.randint(0, 64, (2 * micro, 33)), RECIPES["tiny"], 1e-3, 0.0, 0.3)
    t = engine.traffic
    return t.in_flight_s, t.exposed_s, t.hidden


def test_pairs_take_turns_so_that_exchanges_lie_behind_computation(gang):
    share = {}
    for name in ("1f1b", "dualpipe"):
        found = gang.run(4, measured, name, 8)
        assert all(0 < exposed <= under_way for under_way, exposed, _ in found)
        share[name] = sum(hidden for *_, hidden in found) / len(found)
    assert share["dualpipe"] > share["1f1b"]


def sums(balance_over: str) -> str:
    engine = ParallelEngine(MICRO, RECIPES["tiny"], Mesh(1, 1, 1, CPU))
    try:
        r = replace(RECIPES["tiny"], balance_loss_scope=balance_over)
        engine.train_step(torch.randint(0, 64, (2, 17)), r, 0.0, 0.0, 0.3)
    except UserError as e:
        return str(e)
    return "not refused"


def test_a_loss_over_the_batch_is_refused(gang):
    assert "over sequences only" in gang.run(1, sums, "batch")[0]


def too_deep() -> str:
    try:
        ParallelEngine(replace(MICRO, n_layers=3), RECIPES["tiny"], Mesh(2, 1, 1, CPU), "dualpipev")
    except UserError as e:
        return str(e)
    return "not refused"


def test_more_stages_than_layers_are_refused(gang):
    assert set(gang.run(2, too_deep)) == {"3 layers cannot be cut into 4 stages"}
