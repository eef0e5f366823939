"""Hangs: which rank is stuck in which operation since when, and which rank holds the others up.

    with watch(run / "logs", rank, world, seconds=300, store=store):
        with track_operation("load batch, step 3"):
            …
        with track_operation("all-reduce of gradients, step 3", waits_for=group):
            …

A thread of every rank tells the store at every beat what the main thread does. When the first rank
has made no progress for so long, it says who holds it up, all of them write their stacks to
`hang-rank<k>.txt`, and leave with HUNG.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

EXIT_HANG = 70  # exit code: EX_SOFTWARE, which the launchers answer with another start
HEARTBEAT_S = 5.0  # seconds between two words of a rank, or a tenth of what an operation may take
MAX_MISSED_HEARTBEATS = 5  # beats without a word: that process is stopped or gone

_stack: list[tuple[str, object]] = []  # this rank's operations, the outer ones first
_since = time.monotonic()  # when the innermost one began, or the one within it ended


# ── What this rank does ──


@contextmanager
def track_operation(
    operation: str, waits_for: dist.ProcessGroup | Iterable[int] = ()
) -> Iterator[None]:
    """Name what happens in the `with`, and the ranks that must do the same for it to end.

    Both ends of a transfer give it the same name, as all ranks of a collective do.
    """
    global _since
    _stack.append((operation, waits_for))
    _since = time.monotonic()
    try:
        yield
    finally:
        _stack.pop()
        _since = time.monotonic()


def current_operation() -> dict:
    """The operation this rank is in, since when, and for whom it waits."""
    operation, group = [("between operations", ()), *_stack][-1]
    known, told = isinstance(group, dist.ProcessGroup), time.time()
    ranks = dist.get_process_group_ranks(group) if known else list(group)
    since = told - (time.monotonic() - _since)
    return {"operation": operation, "since": since, "waits_for": ranks, "reported_at": told}


# ── What all of them do ──


def absent_peers(rank: int, states: dict[int, dict | None]) -> list[int]:
    """Those a rank waits for that are not in the operation themselves."""
    mine = states[rank]
    others = (r for r in mine["waits_for"] if r != rank)
    return [r for r in others if not states[r] or states[r]["operation"] != mine["operation"]]


def stragglers(states: dict[int, dict | None], silent_after: float) -> list[int]:
    """Ranks that are silent, else those that others wait for and that wait for nobody."""
    at = max(s["reported_at"] for s in states.values() if s)
    silent = [r for r, s in states.items() if not s or at - s["reported_at"] > silent_after]
    waits = {r: absent_peers(r, states) for r in states if r not in silent}
    awaited = {r for ranks in waits.values() for r in ranks}
    alone = [r for r in waits if not states[r]["waits_for"]]
    return silent or sorted(r for r in awaited or alone if not waits[r])


def hang_report(states: dict[int, dict | None], silent_after: float) -> str:
    """Who holds the others up, and after it a line for every rank."""
    at = max(s["reported_at"] for s in states.values() if s)
    lines = {r: f"rank {r} {describe_rank(s, at, silent_after)}" for r, s in states.items()}
    who = "; ".join(lines[r] for r in stragglers(states, silent_after))
    return "\n".join([f"hang: held up by {who or 'no rank alone'}", *lines.values()])


def describe_rank(state: dict | None, at: float, silent_after: float) -> str:
    """`sits in 'load batch' for 31 s`, or that the process does not answer."""
    if state is None:
        return "has never said a word"
    if (silence := at - state["reported_at"]) > silent_after:
        return f"does not answer for {silence:.0f} s; it was in '{state['operation']}'"
    waits = f", waiting for ranks {state['waits_for']}" if state["waits_for"] else ""
    return f"sits in '{state['operation']}' for {at - state['since']:.0f} s{waits}"


# ── The watchdog ──


class Watchdog(threading.Thread):
    """Tells the store what its rank does; ends the process when a rank is stuck."""

    def __init__(self, folder: Path, rank: int, world: int, seconds: float, store: dist.Store):
        super().__init__(name="watchdog", daemon=True)
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.rank, self.world = folder / f"hang-rank{rank}.txt", rank, world
        self.store, self.seconds, self.heartbeat_s = store, seconds, min(HEARTBEAT_S, seconds / 10)
        self.ended = threading.Event()
        self.file = self.path.open("a")  # now: later nothing may be sure to work
        self.heartbeat()

    def run(self) -> None:
        """Beat until the end of the `with`; from C if Python's lock is never given up."""
        while not self.ended.wait(self.heartbeat_s):
            faulthandler.dump_traceback_later(2 * self.seconds, exit=True, file=self.file)
            try:
                self.heartbeat()
                if first := self.stuck():
                    self.report_hang(int(first))
            except dist.DistError as e:  # the store is gone with rank 0, which may have finished
                if self.overdue():
                    mine = describe_rank(current_operation(), time.time(), self.seconds)
                    self.exit_with(f"hang: rank {self.rank} {mine}; rank 0 is gone ({e})")

    def heartbeat(self) -> None:
        self.store.set(f"doing/{self.rank}", json.dumps(current_operation()))

    def overdue(self) -> bool:
        return time.monotonic() - _since > self.seconds

    def stuck(self) -> bytes:
        """The first rank whose time was over, as the store has it; empty if there is none."""
        if self.overdue():
            return self.store.compare_set("hang", "", str(self.rank))
        return self.store.get("hang") if self.store.check(["hang"]) else b""

    def report_hang(self, first: int) -> None:
        """The first rank writes the verdict, once all had the time to say where they are."""
        time.sleep(3 * self.heartbeat_s)
        text = f"hang: rank {self.rank} {describe_rank(current_operation(), time.time(), self.seconds)}"
        if self.rank == first:
            states = {r: self.read_heartbeat(f"doing/{r}") for r in range(self.world)}
            text = hang_report(states, MAX_MISSED_HEARTBEATS * self.heartbeat_s)
        time.sleep(
            2 * self.heartbeat_s
        )  # nobody leaves, and takes others along, before all have written
        self.exit_with(text)

    def read_heartbeat(self, key: str) -> dict | None:
        return json.loads(self.store.get(key)) if self.store.check([key]) else None

    def exit_with(self, text: str) -> None:
        """The verdict to stderr, and with this rank's stacks to the file; leave."""
        print(text, file=sys.stderr, flush=True)
        print(time.ctime(), text, "Python's stacks:", sep="\n", file=self.file, flush=True)
        faulthandler.dump_traceback(self.file, all_threads=True)
        os._exit(EXIT_HANG)

    def close(self) -> None:
        """Stop; a file is kept for what an earlier start has written."""
        self.ended.set()
        self.join()
        faulthandler.cancel_dump_traceback_later()
        self.file.close()
        if not self.path.stat().st_size:
            self.path.unlink()


@contextmanager
def watch(
    folder: Path, rank: int, world: int, seconds: float, store: dist.Store | None = None
) -> Iterator[None]:
    """Watch this process during the `with`; `seconds` is how long one operation may take."""
    global _since
    _since = time.monotonic()
    dog = Watchdog(
        folder, rank, world, seconds, dist.PrefixStore("watchdog", store or connect_store())
    )
    dog.start()
    try:
        yield
    finally:
        dog.close()


def connect_store() -> dist.Store:
    """Where torch.distributed met (env://), by a connection that nobody else waits on."""
    if not dist.is_initialized():
        return dist.HashStore()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False)
