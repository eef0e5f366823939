"""Schedules: every operation once, no deadlock, and the report's table to the last digit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_ref import ops
from dsv3_ref.config import UserError
from dsv3_ref.dualpipe import (
    BUBBLE_FORMULAS,
    DEFAULT_COSTS,
    SCHEDULES,
    Action,
    ActionCosts,
    bubble,
    dependencies,
    max_in_flight,
    min_microbatches,
    output_of,
    rank_of_stage,
    schedule,
    simulate,
    stages_by_rank,
    validate_schedule,
)  # fmt: skip
from dsv3_ref.moe import grouped_linear

NAMES = list(SCHEDULES)


@st.composite
def plans(draw):
    """(name, pp, m) that a schedule can do."""
    name, pp = draw(st.sampled_from(NAMES)), draw(st.integers(1, 8))
    pp += name == "dualpipe" and pp % 2
    return name, pp, min_microbatches(name, pp, draw(st.integers(1, 24)))


@given(plans())
def test_every_operation_once_where_it_is_held_and_none_waits_for_ever(plan):
    name, pp, m = plan
    steps = schedule(name, pp, m)
    validate_schedule(steps, stages_by_rank(name, pp), m)
    for r, mine in enumerate(steps):
        for op in (op for step in mine for op in step):
            assert rank_of_stage(name, pp, m, op.stage, op.microbatch) == r
        pairs = [step for step in mine if len(step) > 1]
        assert all([op.kind for op in step] == ["F", "B"] for step in pairs)
        assert not pairs or "dual" in name


@given(plans(), st.floats(0.1, 3), st.floats(0.1, 3), st.floats(0, 2))
def test_no_step_begins_before_what_it_needs(plan, f, w, comm):
    name, pp, m = plan
    spans = simulate(schedule(name, pp, m), ActionCosts(f, f + w, w, 2 * f + w, comm))
    end = {output_of(op): span.end for span in spans for op in span.step}
    last = max(op.stage for op in end)
    by_rank = {}
    for span in spans:
        assert all(end[q] <= span.start for op in span.step for q in dependencies(op, last))
        assert by_rank.get(span.rank, 0) <= span.start
        by_rank[span.rank] = span.end


@pytest.mark.parametrize("stages", [2, 4, 8, 16])
@pytest.mark.parametrize("more", [0, 2, 10])
@pytest.mark.parametrize("name", ["1f1b", "zb1p", "dualpipe", "dualpipev"])
def test_the_reports_table(name, more, stages):
    """§3.2.1, Table 2, at F = W = B/2 and F&B = F + B."""
    v, dual, m = name == "dualpipev", "dual" in name, 2 * stages + more
    pp = stages // 2 if v else stages
    steps = schedule(name, pp, m)
    assert bubble(simulate(steps), m, 1 + v) == BUBBLE_FORMULAS[name.removesuffix("v")](
        stages, DEFAULT_COSTS
    )
    assert max(max_in_flight(steps)) == stages + dual
    assert {len(s) for s in stages_by_rank(name, pp)} == {1 + dual}


def test_gpipe_keeps_all_micro_batches():
    assert max_in_flight(schedule("gpipe", 4, 9)) == [9] * 4


def test_pairs_hide_communication_until_it_is_longer_than_their_computation():
    step = (Action("F", 0, 0), Action("B", 1, 1))
    assert ActionCosts(comm=1.5).duration(step) == 3 and ActionCosts(comm=2).duration(step) == 4
    assert (
        ActionCosts(comm=1.5).duration(step[:1]) == 2.5
        and ActionCosts(comm=9).duration((Action("W", 0, 0),)) == 1
    )


def faulty(change) -> str:
    steps = schedule("zb1p", 2, 4)
    with pytest.raises(ValueError) as e:
        validate_schedule([change(steps[0]), steps[1]], stages_by_rank("zb1p", 2), 4)
    return str(e.value)


def test_planted_faults_are_named():
    assert faulty(lambda s: s[:-1]) == "stage 0 does ['F', 'I'] for micro-batch 3"
    assert "is done 2 times" in faulty(lambda s: [*s, s[0]])
    assert "deadlock: rank 0 waits" in faulty(lambda s: [s[-1], *s[:-1]])  # W before its I
    assert "holds stages (0,)" in faulty(lambda s: [(Action("F", 1, 0),), *s])
    first_i = next(i for i, step in enumerate(schedule("zb1p", 2, 4)[0]) if step[0].kind == "I")
    swapped = lambda s: [s[first_i], *s[:first_i], *s[first_i + 1 :]]  # I before its own F
    assert "deadlock" in faulty(swapped)


def test_two_ranks_that_wait_for_one_another():
    f0, f1, b0, b1 = ((Action(k, s, 0),) for k in "FB" for s in (0, 1))
    validate_schedule([[f0, b0], [f1, b1]], [(0,), (1,)], 1)
    with pytest.raises(ValueError, match="deadlock: rank 0 waits before"):
        validate_schedule([[b0, f0], [f1, b1]], [(0,), (1,)], 1)


@pytest.mark.parametrize(
    ("name", "pp", "m", "sentence"),
    [
        ("dualpipe", 3, 8, "dualpipe needs an even number of ranks, not 3"),
        ("dualpipe", 4, 9, "dualpipe needs an even number of micro-batches, at least 8, not 9"),
        ("dualpipev", 4, 7, "dualpipev needs micro-batches, at least 8, not 7"),
        ("1f1b", 2, 0, "1f1b needs micro-batches, at least 1, not 0"),
        ("2f2b", 2, 4, "no schedule '2f2b': there are gpipe"),
    ],
)
def test_what_cannot_be_scheduled(name, pp, m, sentence):
    with pytest.raises(UserError, match=sentence):
        schedule(name, pp, m)


@pytest.mark.parametrize("counts", [[3, 0, 5], [0, 0, 0], [0, 8, 0]])
def test_both_halves_of_a_backward_pass_make_the_whole(counts):
    x = torch.randn(sum(counts), 16, requires_grad=True)
    w, g = torch.randn(3, 24, 16, requires_grad=True), torch.randn(sum(counts), 24)
    counts = torch.tensor(counts)
    want = torch.autograd.grad(grouped_linear(x, w, counts), (x, w), g)
    with ops.use("zero_bubble", "torch"), ops.deferring_wgrads() as todo:
        (dx,) = torch.autograd.grad(grouped_linear(x, w, counts), x, g)
    ((weight, wgrad),) = todo
    assert weight is w and torch.allclose(dx, want[0], atol=1e-5)
    assert torch.allclose(wgrad(), want[1], atol=1e-5)
