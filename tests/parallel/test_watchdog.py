"""Hangs are detected, and the rank that holds up the others is reported with its operation."""

import os
import re
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from miniruns import Command, start_ranks

from dsv3_ref.parallel import watchdog
from dsv3_ref.parallel.watchdog import (
    EXIT_HANG,
    HEARTBEAT_S,
    MAX_MISSED_HEARTBEATS,
    Watchdog,
    hang_report,
    stragglers,
    track_operation,
    watch_for_hangs,
)


def misfortune(kind: str) -> None:
    """Let this process sleep, stop, or never release Python's lock."""
    if kind == "sleep":
        time.sleep(1000)
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "compute":
        time.sleep(0.5)
        re.match("(a+)+b", "a" * 60)


def worker(folder: Path, kind: str) -> None:
    """Reduce six times; a misfortune happens to rank 1 before the fourth time."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    with watch_for_hangs(folder, rank, 2, 2.0):
        for step in range(6):
            with track_operation(f"load batch, step {step}"):
                if (rank, step) == (1, 3):
                    misfortune(kind)
            with track_operation(f"all-reduce, step {step}", dist.group.WORLD):
                dist.all_reduce(torch.ones(1))
        dist.barrier()
    dist.destroy_process_group()
    print("finished")


def start(folder: Path, kind: str) -> list[Command]:
    return start_ranks(2, {}, worker, folder, kind)


# ── Two processes over gloo ──


def test_nothing_is_reported_without_a_hang(tmp_path):
    for p in start(tmp_path, "none"):
        out, _ = p.communicate(timeout=60)
        assert (p.returncode, out) == (0, "finished\n")
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_sleeps_is_named_with_its_operation(tmp_path):
    """Either rank may notice first; both write their stacks and exit with EXIT_HANG."""
    ranks = start(tmp_path, "sleep")
    reports = [p.communicate(timeout=60)[0] for p in ranks]
    assert [p.returncode for p in ranks] == [EXIT_HANG, EXIT_HANG]
    assert "hang: held up by rank 1 has been in 'load batch, step 3' for " in "".join(reports)
    assert "rank 0 has been in 'all-reduce, step 3' for " in reports[0]
    stacks = [(tmp_path / f"hang-rank{r}.txt").read_text() for r in range(2)]
    assert "in all_reduce" in stacks[0]
    assert "in misfortune" in stacks[1]


def test_a_stopped_process_is_reported_by_the_other(tmp_path):
    """Its last report names its operation. Rank 1 is stopped, because rank 0 serves the store."""
    ranks = start(tmp_path, "stop")
    try:
        err = ranks[0].communicate(timeout=60)[0]
        assert ranks[0].returncode == EXIT_HANG
        assert "hang: held up by rank 1 has not responded for " in err
    finally:
        ranks[1].kill()
        ranks[1].communicate(timeout=60)


def test_a_process_that_never_releases_pythons_lock_ends_too(tmp_path):
    """Its watchdog thread cannot run: faulthandler writes the stack after twice the time limit."""
    ranks = start(tmp_path, "compute")
    reports = [p.communicate(timeout=60)[0] for p in ranks]
    assert ranks[0].returncode == EXIT_HANG
    assert ranks[1].returncode not in (0, None)
    assert "held up by rank 1 has not responded for " in reports[0]
    assert "it was in 'load batch, step 3'" in reports[0]
    assert "in misfortune" in (tmp_path / "hang-rank1.txt").read_text()


# ── Stragglers ──


def states(*operations) -> dict[int, dict]:
    """Return the states of ranks in (operation, ranks waited for), reported at second 100."""
    row = {"since": 40.0, "reported_at": 100.0}
    return {r: row | {"operation": o, "waits_for": w} for r, (o, w) in enumerate(operations)}


@pytest.mark.parametrize(
    ("operations", "ranks"),
    [
        ([("reduce", [0, 1, 2]), ("reduce", [0, 1, 2]), ("load", [])], [2]),
        # a chain over two groups: 0 waits for 1's activations, 1 for the experts of 2
        ([("0-1", [0, 1]), ("dispatch", [1, 2]), ("save", [])], [2]),
        ([("load", [])], [0]),
        ([("reduce", [0, 1]), ("reduce", [0, 1])], []),  # the network
        ([("a", [0, 1]), ("b", [0, 1])], []),  # each waits for the other
        ([("load", []), ("load", []), ("reduce", [0, 1, 2])], [0, 1]),
    ],
)
def test_stragglers_are_awaited_and_wait_for_no_other_rank(operations, ranks):
    assert stragglers(states(*operations), 10) == ranks


def test_silent_ranks_are_stragglers():
    reported = states(("reduce", [0, 1, 2]), ("load", []), ("load", []))
    reported[1]["reported_at"], reported[2] = 50.0, None
    assert stragglers(reported, 10) == [1, 2]
    assert hang_report(reported, 10).splitlines()[0] == (
        "hang: held up by rank 1 has not responded for 50 s; it was in 'load'; "
        "rank 2 has sent no heartbeat"
    )


def test_ranks_in_one_operation_have_no_straggler():
    text = hang_report(states(("reduce", [0, 1]), ("reduce", [0, 1])), 10)
    assert text.splitlines() == [
        "hang: held up by no single rank",
        "rank 0 has been in 'reduce' for 60 s, waiting for ranks [0, 1]",
        "rank 1 has been in 'reduce' for 60 s, waiting for ranks [0, 1]",
    ]


# ── In this process ──


@pytest.fixture
def two(tmp_path, monkeypatch):
    """Return the watchdogs of two ranks, which are not started, and what they write and sleep."""
    store, done = dist.HashStore(), []
    dogs = [Watchdog(tmp_path / "logs", rank, 2, 30.0, store) for rank in range(2)]
    monkeypatch.setattr(watchdog.time, "sleep", done.append)
    monkeypatch.setattr(Watchdog, "exit_with", lambda self, text: done.append(text))
    monkeypatch.setattr(watchdog, "_since", time.monotonic())
    yield *dogs, done
    for dog in dogs:
        dog.file.close()


def test_the_times_of_the_watchdog(two, tmp_path):
    assert (EXIT_HANG, HEARTBEAT_S, MAX_MISSED_HEARTBEATS) == (70, 5.0, 5)
    assert two[0].heartbeat_s == 3.0 and two[0].daemon
    long = Watchdog(tmp_path, 0, 1, 600.0, dist.HashStore())
    assert long.heartbeat_s == HEARTBEAT_S
    long.file.close()


def test_the_first_rank_that_is_overdue_is_kept_in_the_store(two, monkeypatch):
    first, second, _ = two
    assert first.read_heartbeat(1)["operation"] == "between operations"
    assert first.read_heartbeat(2) is None
    assert first.first_stuck_rank() == second.first_stuck_rank() == b""
    with monkeypatch.context() as patch:
        patch.setattr(watchdog, "_since", time.monotonic() - 29)
        assert not second.is_overdue()
        patch.setattr(watchdog, "_since", time.monotonic() - 31)
        assert second.is_overdue() and second.first_stuck_rank() == b"1"
    assert not first.is_overdue() and first.first_stuck_rank() == b"1"


def test_the_first_stuck_rank_reports_on_all_after_they_have_had_time(two):
    first, second, done = two
    first.report_hang(1)
    assert done == [9.0, 6.0, "hang: rank 0 has been in 'between operations' for 0 s"]
    done.clear()
    second.report_hang(1)
    *pauses, text = done
    assert pauses == [9.0, 6.0] and text.startswith("hang: held up by rank 0 has been in ")
    assert [line.split(" has been")[0] for line in text.splitlines()[1:]] == ["rank 0", "rank 1"]


def test_a_report_is_written_with_the_stacks_before_the_process_ends(tmp_path, monkeypatch, capsys):
    dog, codes = Watchdog(tmp_path, 0, 1, 30.0, dist.HashStore()), []
    monkeypatch.setattr(watchdog.os, "_exit", codes.append)
    dog.exit_with("hang: held up")
    dog.file.close()
    assert codes == [EXIT_HANG] and capsys.readouterr().err == "hang: held up\n"
    text = (tmp_path / "hang-rank0.txt").read_text()
    assert "hang: held up\nPython's stacks:\n" in text and "test_watchdog.py" in text


def test_operations_nest_and_each_change_is_progress():
    log = []

    def record():
        log.append((watchdog.current_operation()["operation"], watchdog._since))

    with track_operation("step 3"):
        record()
        with track_operation("reduce", [0, 1]):
            assert watchdog.current_operation()["waits_for"] == [0, 1]
            record()
        record()
    record()
    assert [name for name, _ in log] == ["step 3", "reduce", "step 3", "between operations"]
    assert all(a < b for (_, a), (_, b) in pairwise(log))


def test_a_state_has_the_start_of_its_operation():
    with track_operation("load"):
        time.sleep(0.2)
        state = watchdog.current_operation()
    assert 0.2 <= state["reported_at"] - state["since"] < 2


def test_an_error_ends_an_operation():
    with pytest.raises(ValueError, match="bad"), track_operation("step 3"):
        raise ValueError("bad")
    assert watchdog.current_operation()["operation"] == "between operations"


def test_one_process_alone_needs_no_store(tmp_path, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with watch_for_hangs(tmp_path / "logs", 0, 1, 0.5):
        for _ in range(10):
            with track_operation("a tenth of a second"):
                time.sleep(0.1)
    assert list((tmp_path / "logs").iterdir()) == []


def test_the_report_of_an_earlier_start_is_kept(tmp_path):
    """A launcher restarts the run in the same folder."""
    (tmp_path / "hang-rank0.txt").write_text("hang: before\n")
    with watch_for_hangs(tmp_path, 0, 1, 60):
        pass
    assert (tmp_path / "hang-rank0.txt").read_text() == "hang: before\n"


def test_naming_an_operation_is_cheap():
    began = time.perf_counter()
    for _ in range(10_000):
        with track_operation("dispatch, layer 3"):
            pass
    assert (time.perf_counter() - began) / 10_000 < 50e-6
