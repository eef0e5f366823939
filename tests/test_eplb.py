"""Placement of redundant experts: compared with a slow form, and on a model."""

import json
from collections import Counter
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_ref.config import TINY, UserError, ceil_div
from dsv3_ref.eplb import (
    ExpertLoadWindow,
    assign_replicas,
    balanced_packing,
    gpu_load,
    load_imbalance,
    logical_to_physical,
    occurrence_rank,
    rebalance_experts,
    replicate_experts,
)
from dsv3_ref.expert_parallel import dispatch_layout
from dsv3_ref.model import Transformer, moe_layers
from dsv3_ref.moe import MoE
from dsv3_ref.parallel.physical_experts import clear_expert_placement, set_expert_placement
from dsv3_ref.pretrain import expert_loads
from dsv3_ref.studies import expert_load
from dsv3_ref.viz.ablation import RESULTS_DIR

# ── The slow form: loops over layers, experts and GPUs ──


def slow_packed(weights, n: int) -> list[list[int]]:
    """Return the items of every pack in the order in which they were added."""
    if len(weights) == n:
        return [[i] for i in range(n)]
    packs, sums = [[] for _ in range(n)], [np.float32(0)] * n
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):  # of equals the first
        open_packs = [j for j in range(n) if len(packs[j]) < len(weights) // n]
        lightest = min(open_packs, key=lambda j: sums[j])
        packs[lightest].append(item)
        sums[lightest] += weights[item]
    return packs


def slow_slots(loads: dict[int, float], n: int) -> list[tuple[int, int]]:
    """Return (expert, index of its copy) of n slots; the busiest copy gets another one."""
    slots, copies = [(e, 0) for e in loads], dict.fromkeys(loads, 1)
    while len(slots) < n:
        busiest = max(loads, key=lambda e: loads[e] / np.float32(copies[e]))  # of equals the first
        slots.append((busiest, copies[busiest]))
        copies[busiest] += 1
    return slots


def slow_layer(loads: list[int], n: int, groups: int, nodes: int, gpus: int):
    """Return (expert, index of its copy) of every slot of one layer."""
    if groups % nodes:
        groups, nodes = 1, 1
    loads = [np.float32(x) for x in loads]
    size = len(loads) // groups
    experts_of = [[*range(g * size, (g + 1) * size)] for g in range(groups)]
    group_loads = [sum((loads[e] for e in group), np.float32(0)) for group in experts_of]
    layer = []
    for node_groups in slow_packed(group_loads, nodes):
        node_experts = chain.from_iterable(experts_of[g] for g in node_groups)
        node_loads = {e: loads[e] for e in node_experts}
        slots = slow_slots(node_loads, n // nodes)
        copies = Counter(e for e, _ in slots)
        shares = [node_loads[e] / np.float32(copies[e]) for e, _ in slots]
        for gpu in slow_packed(shares, gpus // nodes):
            layer += [slots[i] for i in gpu]
    return layer


@st.composite
def problems(draw):
    """Draw loads of some layers with many ties, and a cluster with groups of any number."""

    def number(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    nodes, groups = number(1, 4), number(1, 6)
    gpus, experts = nodes * number(1, 4), groups * number(1, 6)
    num_slots = (ceil_div(experts, gpus) + number(0, 3)) * gpus
    max_load = draw(st.sampled_from([1, 4, 100, 100_000]))
    layer = st.lists(st.integers(0, max_load), min_size=experts, max_size=experts)
    return draw(st.lists(layer, min_size=1, max_size=3)), num_slots, groups, nodes, gpus


def slots_by_copy(slot_eu: torch.Tensor) -> dict[tuple[int, int], int]:
    """Return (expert, copy) → slot, without the −1 of missing copies."""
    return {(e, u): slot_eu[e, u].item() for e, u in (slot_eu >= 0).nonzero().tolist()}


@settings(max_examples=300, deadline=None)
@given(problems())
def test_placements_equal_the_slow_form(problem):
    loads, *sizes = problem
    expert_la, slot_leu, count_le = rebalance_experts(torch.tensor(loads), *sizes)
    assert slot_leu.shape[2] == count_le.max()
    for layer, row in enumerate(loads):
        slots = slow_layer(row, *sizes)
        assert expert_la[layer].tolist() == [e for e, _ in slots]
        assert count_le[layer].tolist() == [sum(e == x for x, _ in slots) for e in range(len(row))]
        assert slots_by_copy(slot_leu[layer]) == {slot: a for a, slot in enumerate(slots)}


def test_the_published_example():
    weight = torch.tensor([[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
                           [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]])  # fmt: skip
    expert_la, slot_leu, count_le = rebalance_experts(weight, 16, 4, 2, 8)
    assert expert_la.tolist() == [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
                                  [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]  # fmt: skip
    assert count_le.tolist() == [
        [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1],
        [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1],
    ]
    assert sorted(slot_leu[0, 5].tolist()) == [0, 2]
    assert slot_leu[0, 0].tolist() == [12, -1]


@settings(max_examples=50, deadline=None)
@given(problems())
def test_groups_stay_on_one_node_and_loads_add_up(problem):
    loads, n, groups, nodes, gpus = problem
    load_le = torch.tensor(loads)
    expert_la, _, count_le = rebalance_experts(load_le, n, groups, nodes, gpus)
    assert (count_le >= 1).all()
    assert (count_le.sum(-1) == n).all()
    size = load_le.shape[1] // groups
    if groups % nodes == 0:
        for row in expert_la.view(-1, nodes, n // nodes):
            of_node = [set((x // size).tolist()) for x in row]
            assert sum(map(len, of_node)) == groups
    assert torch.allclose(gpu_load(load_le, expert_la, gpus).sum(-1), load_le.sum(-1).float())


def test_ties_take_the_first():
    assert replicate_experts(torch.ones(1, 3), 5)[0].tolist() == [[0, 1, 2, 0, 1]]
    assert balanced_packing(torch.ones(1, 4), 2)[0].tolist() == [[0, 1, 0, 1]]
    one_item_each = balanced_packing(torch.tensor([[1.0, 9, 5]]), 3)[0]
    assert one_item_each.tolist() == [[0, 1, 2]]  # the order stays


def test_the_units_of_v3():
    """Prefill: 8 + 1 experts on each of 32 GPUs, groups on nodes; decode: one on each of 320."""
    load_le = torch.randint(0, 1000, (58, 256), generator=torch.Generator().manual_seed(0))
    prefill = rebalance_experts(load_le, 288, 8, 4, 32)[0]
    decode, _, count_le = rebalance_experts(load_le, 320, 8, 40, 320)
    assert prefill.shape == (58, 288)
    assert (load_imbalance(gpu_load(load_le, prefill, 32)) < 1.1).all()
    assert torch.equal(decode[:, :256], torch.arange(256).expand(58, -1))  # nothing to arrange
    assert (count_le.sum(-1) == 320).all()


def test_loads_of_gpus_and_their_imbalance():
    load_le = torch.tensor([[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86]])
    in_order = gpu_load(load_le, torch.arange(12)[None], 4)
    assert in_order.tolist() == [[262, 330, 116, 325]]
    expert_la = torch.tensor([[*range(12), 5, 5, 10, 1]])  # three copies of 5, two of 10 and 1
    shared = gpu_load(load_le, expert_la, 4)
    assert shared.tolist() == [[90 + 66 + 40 + 61, 104 + 55 + 39 + 4, 73 + 56 + 91.5 + 86,
                                55 + 55 + 91.5 + 66]]  # fmt: skip
    assert load_imbalance(torch.tensor([[1, 2, 3], [2, 2, 2]])).tolist() == [1.5, 1.0]


def test_as_many_slots_as_experts_is_enough():
    expert_la, slot_leu, count_le = rebalance_experts(torch.ones(1, 12), 12, 4, 2, 4)
    assert sorted(expert_la[0].tolist()) == list(range(12))
    assert slot_leu.shape == (1, 12, 1)
    assert (count_le == 1).all()


def test_occurrences_are_counted_in_order():
    expert_m = torch.tensor([2, 0, 2, 2, 1, 0])
    assert occurrence_rank(expert_m, 4).tolist() == [0, 0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    "sizes, sentence",
    [
        ((17, 4, 2, 8), "17 slots do not fill 8 GPUs evenly"),
        ((8, 4, 2, 8), "12 experts do not fit into 8 slots"),
        ((16, 8, 2, 8), "12 experts do not form 8 equal groups"),
        ((15, 4, 2, 5), "5 GPUs do not form 2 equal nodes"),
    ],
)
def test_impossible_placements_are_errors(sizes, sentence):
    with pytest.raises(UserError, match=sentence):
        rebalance_experts(torch.ones(1, 12), *sizes)


# ── Tokens to copies ──


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_rows_of_an_expert_take_its_copies_in_turn(data):
    n_experts, k = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 3))
    expert = st.integers(0, n_experts - 1)
    chosen = data.draw(st.lists(st.lists(expert, min_size=k, max_size=k), max_size=20))
    expert_a = [*range(n_experts), *data.draw(st.lists(expert, max_size=8))]
    slot_eu, count_e = logical_to_physical(torch.tensor(expert_a), n_experts)
    slot_nk = assign_replicas(torch.tensor(chosen, dtype=torch.int64).view(-1, k), slot_eu, count_e)
    copies = {e: [a for a, x in enumerate(expert_a) if x == e] for e in range(n_experts)}
    rows = Counter()
    for token, slots in zip(chosen, slot_nk.tolist()):
        for e, a in zip(token, slots):
            assert a == copies[e][rows[e] % len(copies[e])]
            rows[e] += 1
    assert [x[x >= 0].tolist() for x in slot_eu] == list(copies.values())


# ── A running layer ──


SHAPE = replace(TINY, dim=32, moe_inter_dim=24, n_routed_experts=12, n_activated_experts=3)


@pytest.fixture
def moe():
    g, layer = torch.Generator().manual_seed(0), MoE(SHAPE).requires_grad_(False)
    for p in layer.parameters():
        p.normal_(std=0.3, generator=g)
    return layer


def placements(n: int = 3, slots: int = 16):
    g = torch.Generator().manual_seed(1)
    loads = torch.randint(0, 100, (n, 12), generator=g)
    return rebalance_experts(loads, slots, 4, 2, 8)[0]


@pytest.mark.parametrize("shape", [(2, 50, 32), (1, 1, 32), (1, 0, 32)])
def test_copies_change_no_output_and_can_be_changed_between_steps(moe, shape):
    x_bsd = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    alone, route = moe(x_bsd)
    state = {k: v.clone() for k, v in moe.state_dict().items()}
    for expert_a in [*placements(), *placements(2, 24), torch.arange(12)]:
        set_expert_placement(moe, expert_a)
        y_bsd, r = moe(x_bsd)
        assert torch.allclose(y_bsd, alone, atol=1e-5)
        assert torch.equal(r.topk_ids_bsk, route.topk_ids_bsk)
    assert moe.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in moe.state_dict().items())
    clear_expert_placement(moe)
    clear_expert_placement(moe)
    assert torch.equal(moe(x_bsd)[0], alone)


def test_only_slots_that_change_are_filled(moe):
    one, two, _ = placements()
    assert set_expert_placement(moe, one) == 16
    slots = moe.token_dispatcher
    assert set_expert_placement(moe, one) == 0
    assert set_expert_placement(moe, two) == (one != two).sum()
    assert moe.token_dispatcher is slots
    one[:] = 0  # the caller's tensor is not kept
    assert torch.equal(slots.physical.w1, moe.experts.w1[two])


def test_slots_have_the_dtype_of_the_experts(moe):
    moe.bfloat16()
    set_expert_placement(moe, placements()[0])
    assert {p.dtype for p in moe.token_dispatcher.physical.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in moe.token_dispatcher.physical.parameters())
    with pytest.raises(UserError, match="one layer"):
        set_expert_placement(moe, torch.arange(12)[None])


def test_every_gpu_receives_the_rows_of_its_slots(moe):
    chosen_nk = torch.rand(400, 12).argsort(-1)[:, :3]
    expert_a = placements()[0]
    slot_nk = assign_replicas(chosen_nk, *logical_to_physical(expert_a, 12))
    token_m, gpu_m, count_j = dispatch_layout(slot_nk, 2, 8)
    for gpu in range(8):
        gpu_slots = set(range(2 * gpu, 2 * gpu + 2))
        want = [n for n, slots in enumerate(slot_nk.tolist()) if gpu_slots & set(slots)]
        assert token_m[gpu_m == gpu].tolist() == want
    assert count_j.sum() == len(token_m)


def test_unsupported_uses_of_copies_are_errors(moe):
    with pytest.raises(UserError, match="each of its 12 experts at least once"):
        set_expert_placement(moe, torch.zeros(16, dtype=torch.long))
    set_expert_placement(moe, placements()[0])
    moe.requires_grad_(True)
    with pytest.raises(UserError, match="are not trained"):
        moe(torch.randn(1, 2, 32))
    with torch.no_grad():
        moe(torch.randn(1, 2, 32))


def test_a_model_placed_by_its_own_loads_is_unchanged():
    """Place every layer by the loads of a window; the logits stay the same."""
    torch.manual_seed(0)
    small = replace(TINY, vocab_size=64, n_layers=3, n_mtp_layers=0, max_seq_len=32)
    model, window = Transformer(small).eval(), ExpertLoadWindow(2)
    tokens_bs = torch.randint(0, 64, (2, 32))
    with torch.no_grad():
        alone = model(tokens_bs)
        for _ in range(3):
            routes = model.hidden_states(tokens_bs)[1]
            window.add(expert_loads(routes))
            expert_la, *_ = rebalance_experts(window.total(), 24, 4, 2, 8)
            for layer, expert_a in zip(moe_layers(model).values(), expert_la):
                set_expert_placement(layer, expert_a)
            assert torch.allclose(model(tokens_bs), alone, atol=1e-5)
    assert window.total().sum(-1).tolist() == [2 * 64 * 4] * 2  # the last two of three steps


# ── The recorded loads of chapter 19 ──


def test_loads_are_recorded_window_by_window(tmp_path, monkeypatch):
    small = replace(TINY, n_layers=2, max_seq_len=16)
    torch.manual_seed(0)
    monkeypatch.setattr(expert_load, "load", lambda path: Transformer(small))

    class Words:
        ids = [5, 6, 7] * 200

    class Coder:
        token_to_id = staticmethod(lambda token: 0)
        encode = staticmethod(lambda text, add_special_tokens: Words)

    monkeypatch.setattr(expert_load.tok, "load_tokenizer", lambda path: Coder)
    args = expert_load.ExpertLoadConfig(out=tmp_path, windows=3, rows=2)
    recorded = json.loads(expert_load.record_expert_loads(args, "this command").read_text())
    stored = json.loads((RESULTS_DIR / "expert_load.json").read_text())
    assert recorded.keys() == stored.keys()
    assert recorded["command"] == "this command"
    for load in recorded["tokens_per_expert"].values():
        assert torch.tensor(load).sum(-1).tolist() == [[32 * 4]] * 3
    with pytest.raises(UserError, match="at least 1"):
        expert_load.record_expert_loads(replace(args, windows=0), "")


def test_the_committed_loads_are_complete():
    stored = json.loads((RESULTS_DIR / "expert_load.json").read_text())
    for load in stored["tokens_per_expert"].values():
        load_xle = torch.tensor(load)
        assert load_xle.shape == (24, 3, 16)
        choices = stored["tokens_per_window"] * stored["n_activated_experts"]
        assert (load_xle.sum(-1) == choices).all()
