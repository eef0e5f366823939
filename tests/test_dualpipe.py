"""Schedules: every action once, no deadlocks, the published order, and the report's table."""

from itertools import chain, product

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
    bidirectional_steps,
    bubble,
    dependencies,
    max_in_flight,
    min_microbatches,
    output_of,
    rank_of_stage,
    ready_time,
    schedule,
    simulate,
    stages_by_rank,
    validate_schedule,
)  # fmt: skip
from dsv3_ref.moe import grouped_linear
from dsv3_ref.ops import linear

NAMES = list(SCHEDULES)


@st.composite
def plans(draw):
    """Draw (name, pp, m) that a schedule supports."""
    name, pp = draw(st.sampled_from(NAMES)), draw(st.integers(1, 8))
    pp += name == "dualpipe" and pp % 2
    return name, pp, min_microbatches(name, pp, draw(st.integers(1, 24)))


@given(plans())
def test_every_action_runs_once_where_its_stage_is_held_and_none_waits_forever(plan):
    name, pp, m = plan
    steps = schedule(name, pp, m)
    validate_schedule(steps, stages_by_rank(name, pp), m)
    for r, rank_steps in enumerate(steps):
        for action in chain.from_iterable(rank_steps):
            assert rank_of_stage(name, pp, m, action.stage, action.microbatch) == r
        pairs = [step for step in rank_steps if len(step) > 1]
        assert all([action.kind for action in step] == ["F", "B"] for step in pairs)
        assert not pairs or "dual" in name


# ── The published order ──

PUBLISHED = {  # (name, ranks, micro-batches): steps by rank; F0.1: F, stage 0, micro-batch 1
    ("gpipe", 2, 3): [
        "F0.0 F0.1 F0.2 B0.0 B0.1 B0.2",
        "F1.0 F1.1 F1.2 B1.0 B1.1 B1.2",
    ],
    ("1f1b", 3, 4): [
        "F0.0 F0.1 F0.2 B0.0 F0.3 B0.1 B0.2 B0.3",
        "F1.0 F1.1 B1.0 F1.2 B1.1 F1.3 B1.2 B1.3",
        "F2.0 B2.0 F2.1 B2.1 F2.2 B2.2 F2.3 B2.3",
    ],
    ("zb1p", 3, 4): [
        "F0.0 F0.1 F0.2 I0.0 W0.0 F0.3 I0.1 W0.1 I0.2 W0.2 I0.3 W0.3",
        "F1.0 F1.1 I1.0 F1.2 I1.1 W1.0 F1.3 I1.2 W1.1 I1.3 W1.2 W1.3",
        "F2.0 I2.0 F2.1 I2.1 F2.2 I2.2 W2.0 F2.3 I2.3 W2.1 W2.2 W2.3",
    ],
    ("zb1p", 3, 2): [
        "F0.0 F0.1 I0.0 W0.0 I0.1 W0.1",
        "F1.0 F1.1 I1.0 I1.1 W1.0 W1.1",
        "F2.0 I2.0 F2.1 I2.1 W2.0 W2.1",
    ],
    ("dualpipe", 2, 4): [
        "F0.0 F1.2 F0.1 B1.2 F1.3&B0.0 B1.3 I0.1 W0.1",
        "F0.2 F1.0 F0.3 B1.0 F1.1&B0.2 B1.1 I0.3 W0.3",
    ],
    ("dualpipe", 4, 8): [
        "F0.0 F0.1 F0.2 F3.4 I3.4 W3.4 F3.5 F0.3&B3.5 F3.6&B0.0 B3.6 F3.7&B0.1 B3.7 I0.2 "
        "W0.2 I0.3 W0.3",
        "F1.0 F2.4 F1.1 F2.5 F1.2 B2.4 F2.6&B1.0 F1.3&B2.5 F2.7&B1.1 B2.6 B1.2 I2.7 I1.3 "
        "W2.7 W1.3",
        "F1.4 F2.0 F1.5 F2.1 F1.6 B2.0 F2.2&B1.4 F1.7&B2.1 F2.3&B1.5 B2.2 B1.6 I2.3 I1.7 "
        "W2.3 W1.7",
        "F0.4 F0.5 F0.6 F3.0 I3.0 W3.0 F3.1 F0.7&B3.1 F3.2&B0.4 B3.2 F3.3&B0.5 B3.3 I0.6 "
        "W0.6 I0.7 W0.7",
    ],
    ("dualpipe", 4, 10): [
        "F0.0 F0.1 F0.2 F3.5 I3.5 W3.5 F3.6 F0.3&B3.6 F3.7&B0.0 F0.4&B3.7 F3.8&B0.1 B3.8 "
        "F3.9&B0.2 B3.9 I0.3 W0.3 I0.4 W0.4",
        "F1.0 F2.5 F1.1 F2.6 F1.2 B2.5 F2.7&B1.0 F1.3&B2.6 F2.8&B1.1 F1.4&B2.7 F2.9&B1.2 "
        "B2.8 B1.3 I2.9 I1.4 W2.9 W1.4",
        "F1.5 F2.0 F1.6 F2.1 F1.7 B2.0 F2.2&B1.5 F1.8&B2.1 F2.3&B1.6 F1.9&B2.2 F2.4&B1.7 "
        "B2.3 B1.8 I2.4 I1.9 W2.4 W1.9",
        "F0.5 F0.6 F0.7 F3.0 I3.0 W3.0 F3.1 F0.8&B3.1 F3.2&B0.5 F0.9&B3.2 F3.3&B0.6 B3.3 "
        "F3.4&B0.7 B3.4 I0.8 W0.8 I0.9 W0.9",
    ],
    ("dualpipev", 1, 3): [
        "F0.0 F1.0 F0.1 B1.0 F1.1&B0.0 F0.2&B1.1 F1.2&B0.1 B1.2 I0.2 W0.2",
    ],
    ("dualpipev", 2, 4): [
        "F0.0 F0.1 F0.2 F3.0 I3.0 W3.0 F3.1 F0.3&B3.1 F3.2&B0.0 B3.2 F3.3&B0.1 B3.3 I0.2 "
        "W0.2 I0.3 W0.3",
        "F1.0 F2.0 F1.1 F2.1 F1.2 B2.0 F2.2&B1.0 F1.3&B2.1 F2.3&B1.1 B2.2 B1.2 I2.3 I1.3 "
        "W2.3 W1.3",
    ],
    ("dualpipev", 2, 5): [
        "F0.0 F0.1 F0.2 F3.0 I3.0 W3.0 F3.1 F0.3&B3.1 F3.2&B0.0 F0.4&B3.2 F3.3&B0.1 B3.3 "
        "F3.4&B0.2 B3.4 I0.3 W0.3 I0.4 W0.4",
        "F1.0 F2.0 F1.1 F2.1 F1.2 B2.0 F2.2&B1.0 F1.3&B2.1 F2.3&B1.1 F1.4&B2.2 F2.4&B1.2 "
        "B2.3 B1.3 I2.4 I1.4 W2.4 W1.4",
    ],
    ("dualpipev", 3, 6): [
        "F0.0 F0.1 F0.2 F0.3 F0.4 F5.0 I5.0 W5.0 F5.1 I5.1 W5.1 F5.2 F0.5&B5.2 F5.3&B0.0 "
        "B5.3 F5.4&B0.1 B5.4 F5.5&B0.2 B5.5 I0.3 W0.3 I0.4 W0.4 I0.5 W0.5",
        "F1.0 F1.1 F1.2 F4.0 F1.3 F4.1 I4.0 W4.0 F4.2 F1.4&B4.1 F4.3&B1.0 F1.5&B4.2 "
        "F4.4&B1.1 B4.3 F4.5&B1.2 B4.4 B1.3 I4.5 I1.4 W4.5 I1.5 W1.4 W1.5",
        "F2.0 F3.0 F2.1 F3.1 F2.2 F3.2 F2.3 B3.0 F3.3&B2.0 F2.4&B3.1 F3.4&B2.1 F2.5&B3.2 "
        "F3.5&B2.2 B3.3 B2.3 B3.4 I2.4 I3.5 I2.5 W2.4 W3.5 W2.5",
    ],
}  # fmt: skip


def as_text(rank_steps) -> str:
    words = []
    for step in rank_steps:
        words.append("&".join(f"{kind}{stage}.{i}" for kind, stage, i in step))
    return " ".join(words)


@pytest.mark.parametrize(("name", "pp", "m"), PUBLISHED)
def test_schedules_are_the_published_ones(name, pp, m):
    assert list(map(as_text, schedule(name, pp, m))) == PUBLISHED[name, pp, m]


F0, F1 = "F0", "F1"
I0, I1 = "I0", "I1"
B0, B1 = "B0", "B1"
W = "W"
PAIRS = ["F0&B1", "F1&B0"]
TURN = [F0, B1, "F1&B0"]  # the first pairs at the turning point
PHASES = {  # (ranks to the turning point, micro-batches per direction): (times, steps) by rank
    (1, 2): [
        [(0, [F0]), (1, [F0, F1]), (0, [I1, W, F1]), (1, TURN),
         (0, [B1, "F1&B0"]), (1, [B1, I0]), (0, [W, I0]), (1, [W])],
    ],
    (1, 4): [
        [(0, [F0]), (1, [F0, F1]), (0, [I1, W, F1]), (1, TURN), (2, PAIRS),
         (0, [B1, "F1&B0"]), (1, [B1, I0]), (0, [W, I0]), (1, [W])],
    ],
    (2, 5): [
        [(2, [F0]), (1, [F0, F1]), (1, [I1, W, F1]), (2, PAIRS),
         (1, [B1, "F1&B0"]), (1, [B1, I0]), (1, [W, I0]), (1, [W])],
        [(0, [F0]), (2, [F0, F1]), (0, [I1, W, F1]), (1, TURN), (2, PAIRS),
         (0, [B1, "F1&B0"]), (1, [B1, B0]), (1, [I1, I0]), (0, [W, I0]), (2, [W])],
    ],
    (3, 6): [
        [(4, [F0]), (1, [F0, F1]), (2, [I1, W, F1]), (1, PAIRS),
         (2, [B1, "F1&B0"]), (1, [B1, I0]), (2, [W, I0]), (1, [W])],
        [(2, [F0]), (2, [F0, F1]), (1, [I1, W, F1]), (2, PAIRS),
         (1, [B1, "F1&B0"]), (1, [B1, B0]), (1, [I1, I0]), (1, [W, I0]), (2, [W])],
        [(0, [F0]), (3, [F0, F1]), (0, [I1, W, F1]), (1, TURN), (2, PAIRS),
         (0, [B1, "F1&B0"]), (1, [B1, B0, B1, I0]), (1, [I1, I0]), (0, [W, I0]), (3, [W])],
    ],
    (4, 8): [
        [(6, [F0]), (1, [F0, F1]), (3, [I1, W, F1]), (1, PAIRS),
         (3, [B1, "F1&B0"]), (1, [B1, I0]), (3, [W, I0]), (1, [W])],
        [(4, [F0]), (2, [F0, F1]), (2, [I1, W, F1]), (2, PAIRS),
         (2, [B1, "F1&B0"]), (1, [B1, B0]), (1, [I1, I0]), (2, [W, I0]), (2, [W])],
        [(2, [F0]), (3, [F0, F1]), (1, [I1, W, F1]), (3, PAIRS),
         (1, [B1, "F1&B0"]), (1, [B1, B0, B1, I0]), (1, [I1, I0]), (1, [W, I0]), (3, [W])],
        [(0, [F0]), (4, [F0, F1]), (0, [I1, W, F1]), (1, TURN), (3, PAIRS),
         (0, [B1, "F1&B0"]), (2, [B1, B0]), (2, [I1, I0]), (0, [W, I0]), (4, [W])],
    ],
    (8, 60): [  # V3: 16 ranks, 120 micro-batches
        [(14, [F0]), (1, [F0, F1]), (7, [I1, W, F1]), (45, PAIRS),
         (7, [B1, "F1&B0"]), (1, [B1, I0]), (7, [W, I0]), (1, [W])],
        [(12, [F0]), (2, [F0, F1]), (6, [I1, W, F1]), (46, PAIRS),
         (6, [B1, "F1&B0"]), (1, [B1, B0]), (1, [I1, I0]), (6, [W, I0]), (2, [W])],
        [(10, [F0]), (3, [F0, F1]), (5, [I1, W, F1]), (47, PAIRS),
         (5, [B1, "F1&B0"]), (1, [B1, B0, B1, I0]), (1, [I1, I0]), (5, [W, I0]), (3, [W])],
        [(8, [F0]), (4, [F0, F1]), (4, [I1, W, F1]), (48, PAIRS),
         (4, [B1, "F1&B0"]), (2, [B1, B0]), (2, [I1, I0]), (4, [W, I0]), (4, [W])],
        [(6, [F0]), (5, [F0, F1]), (3, [I1, W, F1]), (49, PAIRS),
         (3, [B1, "F1&B0"]), (2, [B1, B0]), (1, [B1, I0]), (2, [I1, I0]), (3, [W, I0]), (5, [W])],
        [(4, [F0]), (6, [F0, F1]), (2, [I1, W, F1]), (50, PAIRS),
         (2, [B1, "F1&B0"]), (3, [B1, B0]), (3, [I1, I0]), (2, [W, I0]), (6, [W])],
        [(2, [F0]), (7, [F0, F1]), (1, [I1, W, F1]), (51, PAIRS),
         (1, [B1, "F1&B0"]), (3, [B1, B0]), (1, [B1, I0]), (3, [I1, I0]), (1, [W, I0]), (7, [W])],
        [(0, [F0]), (8, [F0, F1]), (0, [I1, W, F1]), (1, TURN), (51, PAIRS),
         (0, [B1, "F1&B0"]), (4, [B1, B0]), (4, [I1, I0]), (0, [W, I0]), (8, [W])],
    ],
}  # fmt: skip


@pytest.mark.parametrize(("n", "c"), PHASES)
def test_dualpipe_has_the_eight_published_phases(n, c):
    assert len(PHASES[n, c]) == n
    for i, phases in enumerate(PHASES[n, c]):
        published = chain.from_iterable(times * steps for times, steps in phases)
        assert ["&".join(step) for step in bidirectional_steps(n, i, c)] == list(published)


LEAST = {  # (schedule, ranks, wanted): micro-batches
    ("gpipe", 4, 1): 1, ("1f1b", 4, 3): 3, ("zb1p", 8, 5): 5, ("dualpipe", 4, 1): 8,
    ("dualpipe", 4, 8): 8, ("dualpipe", 4, 9): 10, ("dualpipe", 4, 10): 10, ("dualpipev", 4, 1): 8,
    ("dualpipev", 4, 8): 8, ("dualpipev", 4, 9): 9, ("dualpipev", 3, 1): 6,
}  # fmt: skip


@pytest.mark.parametrize("case", LEAST)
def test_the_least_number_of_micro_batches(case):
    assert min_microbatches(*case) == LEAST[case]


def test_the_stages_of_every_rank():
    assert stages_by_rank("gpipe", 3) == stages_by_rank("1f1b", 3) == [(0,), (1,), (2,)]
    assert stages_by_rank("zb1p", 2) == [(0,), (1,)]
    assert stages_by_rank("dualpipe", 4) == [(0, 3), (1, 2), (2, 1), (3, 0)]
    assert stages_by_rank("dualpipev", 3) == [(0, 5), (1, 4), (2, 3)]


@pytest.mark.parametrize(
    ("name", "pp", "m", "stages", "ranks"),  # ranks: of each stage for the first and the last one
    [
        ("1f1b", 3, 4, (0, 1, 2), [(0, 0), (1, 1), (2, 2)]),
        ("dualpipe", 4, 8, (0, 1, 2, 3), [(0, 3), (1, 2), (2, 1), (3, 0)]),
        ("dualpipev", 2, 4, (0, 1, 2, 3), [(0, 0), (1, 1), (1, 1), (0, 0)]),
    ],
)
def test_the_rank_of_every_stage(name, pp, m, stages, ranks):
    first_and_last = [
        (rank_of_stage(name, pp, m, s, 0), rank_of_stage(name, pp, m, s, m - 1)) for s in stages
    ]
    assert first_and_last == ranks


def test_half_of_the_micro_batches_enter_dualpipe_at_the_last_rank():
    assert [rank_of_stage("dualpipe", 4, 8, 0, i) for i in range(8)] == [0] * 4 + [3] * 4


@given(plans(), st.floats(0.1, 3), st.floats(0.1, 3), st.floats(0, 2))
def test_no_step_starts_before_its_dependencies_have_ended(plan, f, w, comm):
    name, pp, m = plan
    spans = simulate(schedule(name, pp, m), ActionCosts(f, f + w, w, 2 * f + w, comm))
    end = {}
    for span in spans:
        end |= dict.fromkeys(map(output_of, span.step), span.end)
    last = max(action.stage for action in end)
    free = {}  # by rank
    for span in spans:
        for action in span.step:
            assert all(end[q] <= span.start for q in dependencies(action, last))
        assert free.get(span.rank, 0) <= span.start
        free[span.rank] = span.end


@pytest.mark.parametrize("stages", [2, 4, 8, 16])
@pytest.mark.parametrize("more", [0, 2, 10])
@pytest.mark.parametrize("name", ["1f1b", "zb1p", "dualpipe", "dualpipev"])
def test_the_reports_table(name, more, stages):
    """§3.2.1, Table 2, at F = W = B/2 and F&B = F + B."""
    is_v, dual = name == "dualpipev", "dual" in name
    m = 2 * stages + more
    pp = stages // 2 if is_v else stages
    steps = schedule(name, pp, m)
    formula = BUBBLE_FORMULAS[name.removesuffix("v")]
    assert bubble(simulate(steps), m, 1 + is_v) == formula(stages, DEFAULT_COSTS)
    assert max(max_in_flight(steps)) == stages + dual
    assert {len(s) for s in stages_by_rank(name, pp)} == {1 + dual}


def test_gpipe_has_all_micro_batches_in_flight():
    assert max_in_flight(schedule("gpipe", 4, 9)) == [9] * 4


A = Action
DEPENDENCIES = {  # of an action in a pipeline whose last stage is 2
    A("F", 0, 3): [],
    A("F", 1, 3): [A("F", 0, 3)],
    A("F", 2, 3): [A("F", 1, 3)],
    A("B", 2, 3): [A("F", 2, 3)],
    A("B", 1, 3): [A("F", 1, 3), A("B", 2, 3)],
    A("I", 0, 3): [A("F", 0, 3), A("B", 1, 3)],
    A("W", 1, 3): [A("B", 1, 3)],
}


@pytest.mark.parametrize("action", DEPENDENCIES)
def test_what_an_action_depends_on(action):
    assert dependencies(action, 2) == DEPENDENCIES[action]


def test_the_output_of_i_is_that_of_b():
    assert output_of(A("I", 1, 2)) == A("B", 1, 2)
    assert [output_of(A(kind, 1, 2)).kind for kind in "FBW"] == ["F", "B", "W"]


def test_the_durations_of_steps():
    costs = ActionCosts(f=2.0, b=7.0, w=3.0, pair=8.0, comm=0.5)
    durations = {kind: costs.duration((A(kind, 0, 0),)) for kind in "FBIW"}
    assert durations == {"F": 2.5, "B": 7.5, "I": 4.5, "W": 3.0}
    assert costs.duration((A("F", 0, 0), A("B", 0, 0))) == 8.0
    assert ActionCosts() == (1.0, 2.0, 1.0, 3.0, 0.0)


def test_a_schedule_in_time():
    """1F1B on two ranks, two micro-batches: (rank, start, end, kind, micro-batch)."""
    spans = simulate(schedule("1f1b", 2, 2))
    rows = [(s.rank, s.start, s.end, s.step[0].kind, s.step[0].microbatch) for s in spans]
    assert sorted(rows) == [
        (0, 0, 1, "F", 0), (0, 1, 2, "F", 1), (0, 4, 6, "B", 0), (0, 7, 9, "B", 1),
        (1, 1, 2, "F", 0), (1, 2, 4, "B", 0), (1, 4, 5, "F", 1), (1, 5, 7, "B", 1),
    ]  # fmt: skip
    assert bubble(spans, 2, 1) == 3 and bubble(spans, 1, 2) == 3 and bubble(spans, 1, 1) == 6
    assert bubble(spans, 2, 1, ActionCosts(comm=0.5)) == 1


IN_FLIGHT = {
    ("gpipe", 3, 5): [5, 5, 5], ("1f1b", 4, 8): [4, 3, 2, 1], ("1f1b", 4, 2): [2, 2, 2, 1],
    ("zb1p", 4, 8): [4, 4, 4, 4], ("dualpipe", 4, 8): [5, 5, 5, 5], ("dualpipev", 2, 4): [5, 5],
}  # fmt: skip


@pytest.mark.parametrize("case", IN_FLIGHT)
def test_micro_batches_in_flight(case):
    assert max_in_flight(schedule(*case)) == IN_FLIGHT[case]


def test_pairs_hide_communication_until_it_is_longer_than_their_computation():
    step = (Action("F", 0, 0), Action("B", 1, 1))
    assert ActionCosts(comm=1.5).duration(step) == 3 and ActionCosts(comm=2).duration(step) == 4
    assert ActionCosts(comm=1.5).duration(step[:1]) == 2.5
    assert ActionCosts(comm=9).duration((Action("W", 0, 0),)) == 1


def faulty(change) -> str:
    steps = schedule("zb1p", 2, 4)
    with pytest.raises(ValueError) as e:
        validate_schedule([change(steps[0]), steps[1]], stages_by_rank("zb1p", 2), 4)
    return str(e.value)


def test_planted_faults_are_named():
    assert faulty(lambda s: s[:-1]) == "stage 0 runs ['F', 'I'] for micro-batch 3"
    assert "runs 2 times" in faulty(lambda s: [*s, s[0]])
    assert "deadlock: rank 0 waits forever" in faulty(lambda s: [s[-1], *s[:-1]])  # W before its I
    assert "holds stages (0,)" in faulty(lambda s: [(Action("F", 1, 0),), *s])
    first_i = next(i for i, step in enumerate(schedule("zb1p", 2, 4)[0]) if step[0].kind == "I")
    i_before_its_f = faulty(lambda s: [s[first_i], *s[:first_i], *s[first_i + 1 :]])
    assert "deadlock" in i_before_its_f


def test_a_stage_that_never_runs_is_named():
    f0, b0 = (Action("F", 0, 0),), (Action("B", 0, 0),)
    with pytest.raises(ValueError, match=r"stage 1 runs \[\] for micro-batch 0"):
        validate_schedule([[f0, b0], []], [(0,), (1,)], 1)


def test_a_rank_without_forward_passes_has_nothing_in_flight():
    assert max_in_flight([[(Action("F", 0, 0),)], []]) == [1, 0]


def test_zb1p_with_fewer_micro_batches_than_ranks():
    steps = schedule("zb1p", 4, 2)
    validate_schedule(steps, stages_by_rank("zb1p", 4), 2)
    assert as_text(steps[3]) == "F3.0 I3.0 F3.1 I3.1 W3.0 W3.1"


def test_a_step_is_ready_when_its_last_dependency_has_ended():
    f0, b0 = Action("F", 0, 0), Action("B", 0, 0)
    assert ready_time((f0,), 0, {}) == 0.0 and ready_time((b0,), 0, {}) is None
    assert ready_time((b0,), 1, {f0: 2.0, Action("B", 1, 0): 5.0}) == 5.0


def test_two_ranks_that_wait_for_each_other():
    f0, f1, b0, b1 = ((Action(kind, stage, 0),) for kind, stage in product("FB", (0, 1)))
    validate_schedule([[f0, b0], [f1, b1]], [(0,), (1,)], 1)
    with pytest.raises(ValueError, match="deadlock: rank 0 waits forever before"):
        validate_schedule([[b0, f0], [f1, b1]], [(0,), (1,)], 1)


@pytest.mark.parametrize(
    ("name", "pp", "m", "sentence"),
    [
        ("dualpipe", 3, 8, "dualpipe needs an even number of ranks, not 3"),
        ("dualpipe", 4, 9, "dualpipe needs an even number of micro-batches, at least 8, not 9"),
        ("dualpipev", 4, 7, "dualpipev needs micro-batches, at least 8, not 7"),
        ("1f1b", 2, 0, "1f1b needs micro-batches, at least 1, not 0"),
        ("2f2b", 2, 4, "no schedule '2f2b': choose one of gpipe, 1f1b"),
    ],
)
def test_impossible_schedules_are_refused(name, pp, m, sentence):
    with pytest.raises(UserError, match=sentence):
        schedule(name, pp, m)


@pytest.mark.parametrize("counts", [[3, 0, 5], [0, 0, 0], [0, 8, 0]])
def test_both_halves_of_a_backward_pass_make_the_whole(counts):
    x = torch.randn(sum(counts), 16, requires_grad=True)
    w, g = torch.randn(3, 24, 16, requires_grad=True), torch.randn(sum(counts), 24)
    counts = torch.tensor(counts)
    want = torch.autograd.grad(grouped_linear(x, w, counts), (x, w), g)
    with ops.use("zero_bubble", "auto"), ops.deferring_wgrads() as deferred:
        (dx,) = torch.autograd.grad(grouped_linear(x, w, counts), x, g)
    ((weight, wgrad),) = deferred
    assert weight is w and torch.allclose(dx, want[0], atol=1e-5)
    assert torch.allclose(wgrad(), want[1], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer_in_two_halves_is_the_whole(dtype):
    x = torch.randn(2, 3, 16, dtype=dtype, requires_grad=True)
    w = torch.randn(24, 16, requires_grad=True)
    g = torch.randn(2, 3, 24, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        want_y = linear(x, w)
        want = torch.autograd.grad(want_y, (x, w), g)
        with ops.use("zero_bubble", "torch"), ops.deferring_wgrads() as deferred:
            y = linear(x, w)
            (dx,) = torch.autograd.grad(y, x, g)
    ((weight, wgrad),) = deferred
    assert weight is w and y.dtype == want_y.dtype and torch.allclose(y, want_y)
    assert dx.dtype == x.dtype and torch.allclose(dx, want[0], atol=1e-5, rtol=1e-2)
    assert wgrad().dtype == w.dtype and torch.allclose(wgrad(), want[1], atol=1e-4, rtol=1e-2)
