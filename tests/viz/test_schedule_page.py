"""The page of pipeline schedules: its JavaScript schedules and simulates as chapter 12 does."""

import json
import random
from itertools import product

import pytest
from pages import IN_CHROMIUM, opener

from dsv3_ref.dualpipe import (
    SCHEDULES,
    Action,
    ActionCosts,
    max_in_flight,
    min_microbatches,
    schedule,
    simulate,
)
from dsv3_ref.viz.schedule import schedule_page

pytestmark = IN_CHROMIUM


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    with opener(tmp_path_factory.mktemp("pages")) as opened:
        yield lambda **options: opened(schedule_page(), **options)


@pytest.fixture(scope="module")
def page(opened):
    return opened()


def as_json(steps):
    """Steps in the form of the page."""
    return [[[one._asdict() for one in step] for step in own] for own in steps]


def evaluate(page, function: str, value):
    """Call a function of the page; large values travel as JSON in a hundredth of the time."""
    return json.loads(
        page.evaluate(f"text => JSON.stringify(({function})(JSON.parse(text)))", json.dumps(value))
    )


SIMULATE = """cases => cases.map(([steps, costs]) => {
    const { spans, blocked } = pipeline.simulate(steps, costs);
    return { spans: blocked.length ? null : spans.map(s => [s.rank, s.start, s.end, s.step]),
             inFlight: pipeline.maxInFlight(steps) }; })"""


def expected(steps, costs: ActionCosts):
    """Spans, or None in a deadlock, and activations by the chapter."""
    try:
        spans = [
            [s.rank, s.start, s.end, [one._asdict() for one in s.step]]
            for s in simulate(steps, costs)
        ]
    except ValueError:
        spans = None
    return {"spans": spans, "inFlight": max_in_flight(steps)}


def shuffled(steps, rng):
    """Steps with a few neighbors exchanged, as a reader may do."""
    steps = [list(own) for own in steps]
    for _ in range(4):
        own = rng.choice(steps)
        at = rng.randrange(len(own) - 1)
        own[at : at + 2] = own[at + 1], own[at]
    return steps


def test_schedules_are_those_of_the_chapter(page):
    cases = [
        (name, pp, min_microbatches(name, pp, m))
        for name, pp, m in product(SCHEDULES, (2, 3, 4, 8), (2, 5, 20))
        if name != "dualpipe" or pp % 2 == 0
    ]
    got = evaluate(page, "cases => cases.map(args => pipeline.schedule(...args))", cases)
    assert got == [as_json(schedule(*case)) for case in cases]


def test_times_and_deadlocks_are_those_of_the_chapter(page):
    rng = random.Random(0)
    cases = []
    for name, pp in product(SCHEDULES, (2, 4)):
        steps = schedule(name, pp, min_microbatches(name, pp, 6))
        for seed in range(6):
            costs = ActionCosts(1, 2, rng.choice((0.5, 1.0)), 3, rng.choice((0.0, 0.75, 2.0)))
            cases.append((shuffled(steps, rng) if seed else steps, costs))
    wanted = [expected(*case) for case in cases]
    assert 5 < sum(one["spans"] is None for one in wanted) < len(wanted) - 5
    got = evaluate(page, SIMULATE, [(as_json(steps), costs._asdict()) for steps, costs in cases])
    assert got == wanted


def test_a_deadlock_is_explained(page):
    steps = [
        [(Action("B", 0, 0),), (Action("F", 0, 0),)],
        [(Action("F", 1, 0),), (Action("B", 1, 0),)],
    ]
    circle = page.evaluate(
        """steps => pipeline.deadlockCircle(steps, pipeline.simulate(steps).blocked)
        .map(({ rank, needs, on }) => [rank, needs.kind, needs.stage, on])""",
        as_json(steps),
    )
    assert circle == [[0, "F", 0, 0]]


def press(page, keys: str) -> None:
    page.locator("#board").focus()
    for key in keys.split():
        page.keyboard.press(key)


def steps_of(page, rank: int) -> list[str]:
    return page.evaluate(
        "rank => pipeline.page.steps[rank].map(s => s.map(o => o.kind + o.microbatch).join('&'))",
        rank,
    )


def test_a_reader_builds_1f1b_with_the_keyboard(opened):
    """Move each backward pass of GPipe on three ranks to its place in 1F1B."""
    page = opened()
    page.get_by_role("button", name="Hold fewer activations").click()
    assert "More than 1F1B: 3 micro-batches in flight" in page.locator("#goal").inner_text()
    press(page, "ArrowRight ArrowRight ArrowRight Shift+ArrowRight")
    assert steps_of(page, 0) == "F0 F1 F2 B0 F3 B1 B2 B3".split()
    for rank, count in ((1, 2), (2, 3)):
        press(page, "ArrowDown " + "ArrowLeft " * 9)
        press(page, "ArrowRight " * 3)
        for behind in range(count):
            press(
                page, "Shift+ArrowRight " * (count - behind) + "ArrowLeft " * (count - behind + 1)
            )
        assert steps_of(page, rank) == [
            "".join(map(str, (one.kind, one.microbatch))) for (one,) in schedule("1f1b", 3, 4)[rank]
        ]
    assert "Done in 10 changes: as fast as 1F1B" in page.locator("#goal").inner_text()
    assert page.locator("li.solved").count() == 1
    press(page, "u")
    assert "Changes so far: 9" in page.locator("#goal").inner_text()


def test_a_wrong_move_is_explained_and_undone(opened):
    page = opened()
    page.get_by_role("button", name="Shrink the bubble").click()
    press(page, "ArrowDown ArrowDown ArrowRight Shift+ArrowLeft")  # the last rank: B0 before F0
    assert (
        page.get_by_role("alert")
        .inner_text()
        .startswith(
            "Deadlock: GPU 2 cannot begin B0 before the forward of micro-batch 0 in stage 2, "
            "which comes later in its own row."
        )
    )
    assert "deadlock" in page.locator("#compare").inner_text()
    press(page, "u s")
    assert steps_of(page, 2)[:3] == ["F0", "I0", "W0"]
    assert page.get_by_role("alert").count() == 0
    press(page, "s")
    assert steps_of(page, 2)[:2] == ["F0", "B0"]
    page.get_by_role("button", name="Start again").click()
    page.get_by_role("button", name="Hide the all-to-alls").click()
    at = steps_of(page, 0).index("F3")
    forward, backward = steps_of(page, 0)[at : at + 2]
    press(page, "ArrowRight " * at + "o")
    assert steps_of(page, 0)[at] == f"{forward}&{backward}"
    press(page, "o")
    assert steps_of(page, 0)[at : at + 2] == [forward, backward]


def test_time_moves_by_events_and_plays(opened):
    page = opened()
    page.get_by_role("radio", name="1F1B").click()
    assert page.locator("#time-value").inner_text() == "0.0"
    page.get_by_role("button", name="One event on").click()
    assert page.locator("#time-value").inner_text() == "1.0"
    assert "GPU 1 F0" in page.locator("#board").inner_text()
    assert page.locator("#tokens circle").count() == 1  # micro-batch 0 travels to GPU 1
    page.get_by_role("button", name="Play").click()
    page.wait_for_function("() => pipeline.page.time > 2")
    page.get_by_role("button", name="Pause").click()
    paused = page.evaluate("() => pipeline.page.time")
    page.wait_for_timeout(100)
    assert page.evaluate("() => pipeline.page.time") == paused


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_only_the_timeline(opened, scheme):
    page = opened(width=390, color_scheme=scheme)
    page.locator("#step-3-4").click()
    assert "GPU 3, step 5" in page.locator("#selection").inner_text()
    assert page.evaluate("() => document.documentElement.scrollWidth") == 390


def test_a_frame_of_the_largest_timeline_takes_less_than_16_ms(opened):
    page = opened()
    page.locator("#microbatches").evaluate(
        "e => { e.value = 24; e.dispatchEvent(new Event('input')); }"
    )
    milliseconds = page.evaluate(
        """() => { const times = [];
        for (let i = 0; i < 30; i++) { const start = performance.now();
            pipeline.setTime(i); times.push(performance.now() - start); }
        return times.sort((a, b) => a - b)[15]; }"""
    )
    assert milliseconds < 16
