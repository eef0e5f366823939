"""uvicorn with limits on connections and time, and a shutdown that always ends."""

import asyncio
import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar

import h11
import uvicorn
from h11._receivebuffer import ReceiveBuffer  # no other way to see a head before its regex does
from uvicorn.protocols.http.h11_impl import H11Protocol

from dsv3_ref.serving.protocol import error_body

if TYPE_CHECKING:
    import socket

    from starlette.types import ASGIApp

BACKLOG = 128  # connections that wait to be accepted
SPARE_DESCRIPTORS = 16  # left for files that the server opens
MIN_BYTES_READ = 1024  # by a client that counts as reading
MAX_UNREAD_BYTES = 1 << 28  # of all responses whose clients are slower to read than the server
CLOSING_SECONDS = 1.0  # in which a refused client may read the answer
TICK_SECONDS = 0.1  # how often uvicorn looks for the end
MAX_HEAD_BYTES = 1 << 16  # of a request line with its headers, or of trailers
MAX_HEADERS = 128  # each of which takes time to read, however short
MAX_BLANKS = 64  # before the value of a header
MAX_CHUNK_HEAD_BYTES = 256  # of the line with the length of a chunk
FREE_PIECES = 512  # of a body, however short
MIN_PIECE_BYTES = 256  # of the others on average: each takes time to read, however short
# ── Limits of a connection ──


@dataclass(frozen=True)
class ConnectionLimits:
    """The number of connections, and how many seconds each phase of one may take."""

    max_connections: int = 512
    headers: float = 10.0  # to send the headers of a request
    body: float = 30.0  # to send its body
    idle: float = 75.0  # between two requests; clients keep connections for up to a minute
    stall: float = 30.0  # in which the client reads nothing of a response
    endless: re.Pattern[str] = re.compile("(?!)")  # paths whose responses last as long as a page


def descriptor_limits(max_connections: int) -> tuple[int, int]:
    """Return (connections, backlog), reduced to what the limit on file descriptors allows."""
    try:
        import resource
    except ImportError:  # Windows
        return max_connections, BACKLOG
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return max_connections, BACKLOG
    backlog = max(1, min(BACKLOG, soft // 4))
    try:
        num_open = len(os.listdir("/dev/fd"))
    except OSError:
        num_open = SPARE_DESCRIPTORS
    room = soft - num_open - backlog - SPARE_DESCRIPTORS
    return max(1, min(max_connections, room)), backlog


class HeadLimitedBuffer(ReceiveBuffer):
    """Received bytes, from which no head is taken that is too long or that h11 is slow to read.

    h11 limits a head only while it is incomplete, and the number of its headers not at all. Its
    patterns of a header and of the line before a chunk take a time quadratic in the blanks of an
    invalid one: 18 s and 9 s for 64 KB.
    """

    def maybe_extract_next_line(self) -> bytearray | None:
        """Return the complete line before a chunk, or None; raise a `RemoteProtocolError`."""
        line = super().maybe_extract_next_line()
        if line and len(line) > MAX_CHUNK_HEAD_BYTES:
            raise h11.RemoteProtocolError("the line before a chunk is too long")
        return line

    def maybe_extract_lines(self) -> list[bytearray] | None:
        """Return the lines of a complete head, or None; raise a `RemoteProtocolError`.

        A line that begins with a blank continues the one before it, so that its blanks add up:
        RFC 9112 (§5.2) lets a server refuse it.
        """
        *first, _ = self._data[:MAX_HEAD_BYTES].split(b"\n", MAX_HEADERS + 2)
        if len(first) > MAX_HEADERS + 1 and not any(line in (b"", b"\r") for line in first):
            raise h11.RemoteProtocolError("the head has too many headers")
        lines = super().maybe_extract_lines()
        if lines and sum(map(len, lines)) + 2 * len(lines) > MAX_HEAD_BYTES:
            raise h11.RemoteProtocolError("the head is too long")
        for line in lines or ():
            value = line.partition(b":")[2]
            if len(value) - len(value.lstrip(b" \t")) > MAX_BLANKS or line[:1] in (b" ", b"\t"):
                raise h11.RemoteProtocolError("a header with too many blanks")
        return lines


class LimitedConnection(h11.Connection):
    """HTTP of a connection with limits on heads and on the pieces of a body.

    A body in many short pieces, such as chunks of one byte, is an error: a piece takes as long to
    read as 10 KB of a longer one, and the event loop reads many at once.
    """

    num_pieces = 0
    num_bytes = 0

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEAD_BYTES)
        self._receive_buffer = HeadLimitedBuffer()

    def next_event(self) -> Any:
        """Return what has been received next; raise an `h11.RemoteProtocolError`."""
        event = super().next_event()
        if isinstance(event, h11.Data):
            self.num_pieces += 1
            self.num_bytes += len(event.data)
            if (self.num_pieces - FREE_PIECES) * MIN_PIECE_BYTES > self.num_bytes:
                raise h11.RemoteProtocolError("the pieces of this body are too short")
        elif isinstance(event, h11.Request):
            self.num_pieces = self.num_bytes = 0
        return event


class LimitedProtocol(H11Protocol):
    """A connection that is closed when a phase of it takes too long.

    If there are too many, the one that has been waiting longest for a request is closed or, if none
    is, the one whose client has been behind longest in reading or, at last, the oldest response
    without an end: no half of a request or response can keep others out.
    """

    limits: ClassVar[ConnectionLimits] = ConnectionLimits()
    phase = ""  # idle, headers, body, response, closing
    phase_start = 0.0
    phase_timer: asyncio.TimerHandle | None = None
    stall_timer: asyncio.TimerHandle | None = None  # while the client is behind in reading
    stall_start = 0.0

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.conn = LimitedConnection()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count a new connection, and start the time in which it must send a request."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections and not self.make_room():
            retry = [(b"retry-after", b"1")]
            self.refuse(503, "the server has too many connections: retry later", retry)
            self.phase = "closing"
            transport.close()
            return
        self.update_phase()

    def make_room(self) -> bool:
        """Close a connection that others need not wait for; return False if there is none."""
        others = [c for c in self.connections if isinstance(c, LimitedProtocol) and c is not self]
        others.sort(key=phase_start)
        waiting = (c for c in others if c.phase in ("idle", "headers", "body"))
        endless = (c for c in others if c.phase == "response" and c.is_endless())
        first = next(chain(waiting, self.behind(), endless), None)
        if first:
            first.abort()
        return first is not None

    def is_endless(self) -> bool:
        """Return whether the response in progress ends only when its client leaves."""
        return bool(self.limits.endless.fullmatch(self.scope["path"]))

    def behind(self) -> "list[LimitedProtocol]":
        """Return the connections whose clients are behind in reading, the longest first."""
        connections = [c for c in self.connections if isinstance(c, LimitedProtocol)]
        stalled = [c for c in connections if c.stall_timer and c.phase != "closing"]
        return sorted(stalled, key=stall_start)

    def drop_unread(self) -> None:
        """Close the connections that are behind longest while too much is unread in all."""
        behind = self.behind()
        unread = sum(c.transport.get_write_buffer_size() for c in behind)
        for connection in behind:
            if unread <= MAX_UNREAD_BYTES:
                return
            unread -= connection.transport.get_write_buffer_size()
            connection.abort()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, unless a response has begun; then close the connection.

        What the client still sends is read: a reset would overtake the answer.
        """
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.abort()
            return
        self.refuse(400, "this is not a valid HTTP request")
        self.transport.write_eof()
        self.enter("closing")

    def refuse(
        self, status: int, message: str, headers: Sequence[tuple[bytes, bytes]] = ()
    ) -> None:
        """Send an error in OpenAI's format, after which the connection must be closed."""
        body = json.dumps(error_body(message, status)).encode()
        fixed = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        response = h11.Response(status_code=status, headers=[*fixed, *headers])
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")

    def data_received(self, data: bytes) -> None:
        """Process what a client sends."""
        if self.phase == "closing":
            return
        super().data_received(data)
        self.update_phase()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request, unless it has arrived already."""
        self.enter("idle")
        super().on_response_complete()
        if not self.cycle.response_complete:
            self.update_phase()

    def update_phase(self) -> None:
        """Enter the phase that what has been received leads to."""
        if self.cycle is None or self.cycle.response_complete:
            self.enter("headers")
        else:
            self.enter("body" if self.cycle.more_body else "response")

    def enter(self, phase: str) -> None:
        """Start the timer of a phase, unless the connection is in it already."""
        if self.phase in (phase, "closing"):
            return
        self.phase = phase
        self.phase_start = self.loop.time()
        if self.phase_timer:
            self.phase_timer.cancel()
        limits = self.limits
        times = {"headers": limits.headers, "body": limits.body, "idle": limits.idle}
        times["closing"] = CLOSING_SECONDS
        seconds = times.get(phase)
        self.phase_timer = self.loop.call_later(seconds, self.abort) if seconds else None

    def pause_writing(self) -> None:
        """Start the time in which the client must read something."""
        super().pause_writing()
        self.stall_start = self.loop.time()
        self.watch_stall()
        self.drop_unread()

    def watch_stall(self) -> None:
        """Look after some time whether the client has read enough since now."""
        unread = self.transport.get_write_buffer_size()
        self.stall_timer = self.loop.call_later(self.limits.stall, self.end_stall, unread)

    def end_stall(self, unread_before: int) -> None:
        """Close the connection unless its client has read something, however slowly."""
        if unread_before - self.transport.get_write_buffer_size() < MIN_BYTES_READ:
            self.abort()
        else:
            self.watch_stall()

    def resume_writing(self) -> None:
        """Stop the timer of `pause_writing`."""
        super().resume_writing()
        if self.stall_timer:
            self.stall_timer.cancel()
            self.stall_timer = None

    def abort(self) -> None:
        """Close the connection at once, and drop what has not been sent."""
        self.phase = "closing"
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timers."""
        super().connection_lost(exc)
        self.phase = "closing"
        for timer in (self.phase_timer, self.stall_timer):
            if timer:
                timer.cancel()


def phase_start(connection: LimitedProtocol) -> float:
    """Return when a connection entered its phase."""
    return connection.phase_start


def stall_start(connection: LimitedProtocol) -> float:
    """Return when the client of a connection fell behind in reading."""
    return connection.stall_start


def limited_options(limits: ConnectionLimits) -> dict[str, Any]:
    """Return the options of `uvicorn.Config` that limit connections, as far as descriptors do."""
    max_connections, backlog = descriptor_limits(limits.max_connections)
    fitted = replace(limits, max_connections=max_connections)

    class Protocol(LimitedProtocol):
        limits = fitted

    return {
        "http": Protocol, "ws": "none", "backlog": backlog, "log_level": "critical",
        "timeout_keep_alive": math.ceil(limits.idle),
        "proxy_headers": False, "server_header": False, "access_log": False,
    }  # fmt: skip


# ── The server ──


class ApiServer(uvicorn.Server):
    """A server that finishes running requests after the first signal, within `grace` seconds.

    on_drain: called when the first signal arrives. is_failed: returns whether the server must end
    because of a failure; it then still answers for `linger` seconds. The second signal ends the
    process at once, and so does a thread if it still runs after the time has passed.
    """

    def __init__(
        self, app: "ASGIApp", limits: ConnectionLimits, grace: float,
        on_drain: Callable[[], None], is_failed: Callable[[], bool], linger: float,
    ):  # fmt: skip
        options = limited_options(limits)
        super().__init__(uvicorn.Config(app, lifespan="off", loop="asyncio", **options))
        self.grace = grace
        self.on_drain = on_drain
        self.is_failed = is_failed
        self.linger = linger
        self.end_time: float | None = None  # when draining, or after a failure

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install signal handlers; uvicorn's would end the process by the signal itself."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = signal.SIGINT, signal.SIGTERM
        previous = [signal.signal(number, self.handle_exit) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, previous):
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; at the second signal end the process."""
        if self.end_time is not None:
            end_process(128 + sig)
        self.end_time = time.monotonic() + self.grace
        self.on_drain()
        watchdog = threading.Timer(self.grace + 0.5, end_process, (0,))
        watchdog.daemon = True
        watchdog.start()

    async def on_tick(self, counter: int) -> bool:
        """Return whether to shut down: nothing runs anymore, or the time has passed."""
        if self.end_time is None and self.is_failed():
            self.end_time = time.monotonic() + self.linger
        if self.end_time is not None:
            is_late = time.monotonic() >= self.end_time
            is_done = not self.server_state.tasks and not self.is_failed()
            self.should_exit |= is_late or is_done
        return await super().on_tick(counter)

    async def shutdown(self, sockets: "list[socket.socket] | None" = None) -> None:
        """Close all connections, in what is left of the time; abort those that remain."""
        if self.end_time is None:
            self.end_time = time.monotonic() + self.grace
        seconds = max(2 * TICK_SECONDS, self.end_time - time.monotonic())
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(super().shutdown(sockets), seconds)
        for connection in list(self.server_state.connections):
            if isinstance(connection, LimitedProtocol):
                connection.abort()


def end_process(code: int) -> None:
    """End the process, whatever its threads do."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError, RuntimeError):  # closed, none, in use
            stream.flush()
    os._exit(code)
