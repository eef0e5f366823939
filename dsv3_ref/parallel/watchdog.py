"""Detection of hangs: which rank is stuck, in which operation, and which rank blocks the others.

    with watch_for_hangs(run / "logs", rank, world, seconds=300, store=store):
        with track_operation("load batch, step 3"):
            …
        with track_operation("all-reduce of gradients, step 3", waits_for=group):
            …

In every rank a thread reports the main thread's operation to the store at every heartbeat. When a
rank makes no progress for `seconds`, all ranks write their stacks to `hang-rank<k>.txt` and exit
with EXIT_HANG. The first rank to notice also reports which rank blocks the others.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypedDict

import torch.distributed as dist

from dsv3_ref.checkpoints.atomic import open_own

EXIT_HANG = 70  # EX_SOFTWARE: the launchers queue the job again
HEARTBEAT_S = 5.0  # between two heartbeats, or a tenth of an operation's time limit if that is less
LONGEST_S = 1e8  # three years, which means no limit
MAX_MISSED_HEARTBEATS = 5  # after more of them the process counts as stopped or gone

_stack: list[tuple[str, dist.ProcessGroup | Iterable[int]]] = []  # operations, outer ones first
_since = time.monotonic()  # when the innermost operation started, or the one within it ended
_waited_s = 0.0  # time in operations that wait for other ranks


def collective_timeout(seconds: float) -> timedelta:
    """Return the time limit of collectives for a watchdog with a limit of `seconds`.

    torch.distributed aborts the process at its own limit. The report of a hang comes first: within
    `seconds` and six heartbeats, or from faulthandler after twice `seconds` and one heartbeat.
    """
    return timedelta(seconds=2 * min(max(0.0, seconds), LONGEST_S) + 6 * HEARTBEAT_S)


class RankState(TypedDict):
    """The operation of a rank, its start, the ranks it waits for, and the time of this report."""

    operation: str
    since: float
    waits_for: list[int]
    reported_at: float


States = dict[int, RankState | None]  # by rank; None: no heartbeat yet


# ── This rank ──


@contextmanager
def track_operation(
    operation: str, waits_for: dist.ProcessGroup | Iterable[int] = ()
) -> Iterator[None]:
    """Name the operation of the `with` block, and the ranks that it needs in the same operation.

    Both ends of a transfer use the same name, and so do all ranks of a collective.
    """
    global _since, _waited_s
    _stack.append((operation, waits_for))
    start = _since = time.monotonic()
    try:
        yield
    finally:
        _stack.pop()
        _since = time.monotonic()
        if waits_for and not any(group for _, group in _stack):
            _waited_s += _since - start


def pop_waited_seconds() -> float:
    """Return how long this process has waited for other ranks since the last call."""
    global _waited_s
    seconds, _waited_s = _waited_s, 0.0
    return seconds


def current_operation() -> RankState:
    """Return the current operation of this rank, its start, and the ranks that it waits for."""
    operation, group = _stack[-1] if _stack else ("between operations", ())
    if isinstance(group, dist.ProcessGroup):
        ranks = dist.get_process_group_ranks(group)
    else:
        ranks = list(group)
    now = time.time()
    since = now - (time.monotonic() - _since)
    return {"operation": operation, "since": since, "waits_for": ranks, "reported_at": now}


# ── All ranks ──


def absent_peers(rank: int, states: States) -> list[int]:
    """Return the ranks that a rank waits for and that are in another operation."""
    own = states[rank]
    if own is None:
        return []
    absent = []
    for peer in own["waits_for"]:
        state = states[peer]
        if peer != rank and (state is None or state["operation"] != own["operation"]):
            absent.append(peer)
    return absent


def last_report(states: States) -> float:
    """Return the time of the last heartbeat of any rank."""
    return max(state["reported_at"] for state in states.values() if state)


def stragglers(states: States, silent_after: float) -> list[int]:
    """Return the silent ranks; without any, those that others wait for and that wait for none."""
    now = last_report(states)
    silent = [r for r, s in states.items() if not s or now - s["reported_at"] > silent_after]
    if silent:
        return silent
    absent = {r: absent_peers(r, states) for r in states}
    awaited = set().union(*absent.values())
    if not awaited:
        awaited = {r for r, s in states.items() if s and not s["waits_for"]}
    return sorted(r for r in awaited if not absent[r])


def hang_report(states: States, silent_after: float) -> str:
    """Return one line that names the ranks that hold up the others, then one line per rank."""
    now = last_report(states)
    lines = {r: f"rank {r} {describe_rank(s, now, silent_after)}" for r, s in states.items()}
    late = "; ".join(lines[r] for r in stragglers(states, silent_after))
    return "\n".join([f"hang: held up by {late or 'no single rank'}", *lines.values()])


def describe_rank(state: RankState | None, now: float, silent_after: float) -> str:
    """Describe a rank: `has been in 'load batch' for 31 s`, or that it does not respond."""
    if state is None:
        return "has sent no heartbeat"
    silence = now - state["reported_at"]
    if silence > silent_after:
        return f"has not responded for {silence:.0f} s; it was in '{state['operation']}'"
    waits = f", waiting for ranks {state['waits_for']}" if state["waits_for"] else ""
    return f"has been in '{state['operation']}' for {now - state['since']:.0f} s{waits}"


# ── The watchdog ──


class Watchdog(threading.Thread):
    """A thread that reports its rank's operation, and ends the process when a rank is stuck.

    seconds: the time limit of one operation.
    """

    def __init__(self, folder: Path, rank: int, world: int, seconds: float, store: dist.Store):
        super().__init__(name="watchdog", daemon=True)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"hang-rank{rank}.txt"
        self.rank, self.world = rank, world
        self.store, self.seconds = store, seconds
        self.heartbeat_s = min(HEARTBEAT_S, seconds / 10)
        self.ended = threading.Event()
        # opened now, because it may fail during a hang
        self.file = open_own(self.path, "a")
        self.heartbeat()

    def run(self) -> None:
        """Send heartbeats until `close`.

        If Python's global lock is never released, faulthandler ends the process from C.
        """
        while not self.ended.wait(self.heartbeat_s):
            faulthandler.dump_traceback_later(2 * self.seconds, exit=True, file=self.file)
            try:
                self.heartbeat()
                if first := self.first_stuck_rank():
                    self.report_hang(int(first))
            except dist.DistError as e:  # rank 0 serves the store, and may have finished
                if self.is_overdue():
                    self.exit_with(f"{self.describe_self()}; rank 0 is gone ({e})")

    def heartbeat(self) -> None:
        """Report this rank's operation to the store."""
        self.store.set(f"operation/{self.rank}", json.dumps(current_operation()))

    def read_heartbeat(self, rank: int) -> RankState | None:
        """Return the last report of a rank, or None if there is none."""
        key = f"operation/{rank}"
        return json.loads(self.store.get(key)) if self.store.check([key]) else None

    def is_overdue(self) -> bool:
        """Return whether this rank's operation has exceeded the time limit."""
        return time.monotonic() - _since > self.seconds

    def first_stuck_rank(self) -> bytes:
        """Return the store's number of the first rank that was overdue; empty if none was."""
        if self.is_overdue():
            return self.store.compare_set("hang", "", str(self.rank))
        return self.store.get("hang") if self.store.check(["hang"]) else b""

    def describe_self(self) -> str:
        """Return this rank's line of the report."""
        state = describe_rank(current_operation(), time.time(), self.seconds)
        return f"hang: rank {self.rank} {state}"

    def report_hang(self, first: int) -> None:
        """Write the report and exit.

        The first stuck rank reports on all ranks, after giving each of them time to report its
        state.
        """
        time.sleep(3 * self.heartbeat_s)
        text = self.describe_self()
        if self.rank == first:
            states = {r: self.read_heartbeat(r) for r in range(self.world)}
            text = hang_report(states, MAX_MISSED_HEARTBEATS * self.heartbeat_s)
        # When a rank exits, others may end before they have written their reports.
        time.sleep(2 * self.heartbeat_s)
        self.exit_with(text)

    def exit_with(self, text: str) -> None:
        """Write the report to stderr, and to the file with this rank's stacks; end the process."""
        print(text, file=sys.stderr, flush=True)
        print(time.ctime(), text, "Python's stacks:", sep="\n", file=self.file, flush=True)
        faulthandler.dump_traceback(self.file, all_threads=True)
        os._exit(EXIT_HANG)

    def close(self) -> None:
        """Stop the thread; delete the file unless an earlier start has written to it."""
        self.ended.set()
        self.join()
        faulthandler.cancel_dump_traceback_later()
        self.file.close()
        if not self.path.stat().st_size:
            self.path.unlink()


@contextmanager
def watch_for_hangs(
    folder: Path, rank: int, world: int, seconds: float, store: dist.Store | None = None
) -> Iterator[None]:
    """Watch this process in the `with` block; `seconds` is the time limit of one operation."""
    global _since
    _since = time.monotonic()
    prefixed = dist.PrefixStore("watchdog", store or connect_store())
    watchdog = Watchdog(folder, rank, world, seconds, prefixed)
    watchdog.start()
    try:
        yield
    finally:
        watchdog.close()


def connect_store() -> dist.Store:
    """Connect to torch.distributed's store (env://) with a connection for this thread alone."""
    if not dist.is_initialized():
        return dist.HashStore()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False)
