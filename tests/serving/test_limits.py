"""The server over sockets: who may use it, for how long, and how it ends."""

import asyncio
import gc
import json
import resource
import shutil
import signal
import socket
import threading
import time
import weakref
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import httpx
import pytest
from served import command
from test_serve import folder, quiet

from dsv3_ref.cli import main
from dsv3_ref.config import UserError
from dsv3_ref.serve import ModelRunner, QueueFull
from dsv3_ref.serving import api_server, http_server
from dsv3_ref.serving.config import ServeConfig
from dsv3_ref.serving.http_server import ConnectionLimits
from dsv3_ref.serving.json_body import parse_json
from dsv3_ref.serving.network import ApiKeys, bind_socket, host_of, host_rule
from dsv3_ref.serving.tokenize_pool import TokenizePool, max_bytes_per_token

__all__ = ["folder"]  # the fixture that makes a model
SHORT = ConnectionLimits(max_connections=8, headers=0.4, body=0.6, idle=0.3, stall=0.5)


@contextmanager
def limited(folder, limits=SHORT, **options):
    """Yield (address, service, server) of a server with short timeouts."""
    listener = bind_socket("127.0.0.1", 0)
    options = {"seed": 0, "block_size": 8, "grace": 5} | options
    with api_server.Service(ServeConfig(folder, **options)) as service:
        server = api_server.make_api_server(service, listener, limits)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield listener.getsockname(), service, server
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def here(folder):
    with limited(folder) as found:
        yield found


def ask(address, body=None, **options) -> httpx.Response:
    """Send a completion request on a connection of its own."""
    url = f"http://{address[0]}:{address[1]}/v1/completions"
    return httpx.post(url, json=body or {"prompt": "we", "max_tokens": 2}, timeout=20, **options)


def seconds_until_closed(connection: socket.socket) -> float:
    """Return how long the server keeps a connection that sends nothing more."""
    start = time.monotonic()
    connection.settimeout(10)
    with suppress(ConnectionResetError):
        while connection.recv(1 << 16):
            pass
    return time.monotonic() - start


# ── Time ──

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "sent, least, most",
    [
        (b"", 0.3, 2),
        (b"GET /hea", 0.3, 2),
        (HEAD + b"Content-Length: 100\r\n\r\n", 0.5, 2.5),
        (HEAD + b'Content-Length: 100\r\n\r\n{"prompt": ', 0.5, 2.5),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 0.2, 2),  # then nothing
    ],
    ids=["silent", "half a head", "no body", "half a body", "idle"],
)
def test_no_phase_of_a_connection_lasts_forever(here, sent, least, most):
    with socket.create_connection(here[0]) as connection:
        connection.sendall(sent)
        assert least < seconds_until_closed(connection) < most


def test_drops_do_not_extend_the_time_of_a_head(here):
    """A byte every 50 ms, in the second request of a connection."""
    with socket.create_connection(here[0]) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        connection.recv(1000)
        start = time.monotonic()
        with suppress(OSError):
            for byte in b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100:
                connection.sendall(bytes([byte]))
                time.sleep(0.05)
        assert time.monotonic() - start < 2


def test_half_requests_do_not_lock_others_out(here):
    """Six times as many connections as there are places; nobody waits for their timeout."""
    attackers = []
    for i in range(48):
        attackers.append(socket.create_connection(here[0]))
        with suppress(OSError):
            attackers[-1].sendall(b"GET /hea" if i % 2 else HEAD + b"Content-Length: 9\r\n\r\n")
    start = time.monotonic()
    assert ask(here[0]).status_code == 200
    assert time.monotonic() - start < 2
    for attacker in attackers:
        attacker.close()


def test_a_body_in_tiny_chunks_does_not_stop_the_others(here):
    """One client once kept the event loop busy for seconds with a body of one byte per chunk."""
    chunks = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 200_000
    with socket.create_connection(here[0]) as connection:

        def send():
            with suppress(OSError):
                connection.sendall(chunks)

        sender = threading.Thread(target=send)
        sender.start()
        start = time.monotonic()
        assert ask(here[0]).status_code == 200 and time.monotonic() - start < 1
        seconds_until_closed(connection)
        sender.join()
    assert ask(here[0]).status_code == 200


BLANKS = b"X:" + b" " * 60_000 + b"\v\r\n\r\n"
FOLDS = b"X:" + b"\r\n " * 20_000 + b"\v\r\n\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "sent",
    [GET + BLANKS, GET + FOLDS, GET + b"a:b\r\n" * 14_000, GET + b"a:b\r\n" * 128 + b"\r\n",
     CHUNKED + b"0\r\n" + BLANKS, CHUNKED + b"5;" + b" " * 60_000 + b"\n\r\n",
     CHUNKED + b"5;" + b"a" * 253 + b"\r\n"],
    ids=["blanks", "continued lines", "a long head", "many headers", "trailers", "a chunk",
         "a line before a chunk"],
)  # fmt: skip
def test_no_head_takes_long_to_read(here, sent):
    """h11 read 64 KB of blanks for 18 s, in the event loop, before any key was asked for.

    It read 64 KB of blanks after the length of a chunk for 9 s, and 16,000 headers for 0.1 s: with
    many connections, all at once.
    """
    start = time.process_time()
    with socket.create_connection(here[0]) as connection:
        connection.sendall(sent)
        answer = connection.recv(1000)
    assert answer.startswith(b"HTTP/1.1 400") and time.process_time() - start < 1


def test_as_many_headers_as_a_proxy_may_add_are_read(here):
    with socket.create_connection(here[0]) as connection:
        connection.sendall(GET + b"a:b\r\n" * 127 + b"\r\n")  # and Host
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("blanks, status", [(64, b"200"), (65, b"400")])
def test_some_blanks_before_a_value_are_read(here, blanks, status):
    with socket.create_connection(here[0]) as connection:
        connection.sendall(GET + b"X:" + b" " * (blanks - 1) + b"\ta\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 " + status)


@pytest.mark.parametrize("size", [1, 500])
def test_a_body_in_chunks_is_read(here, size):
    """A client may write a small body piece by piece, and a large one in pieces of some size."""
    body = json.dumps({"prompt": "we", "max_tokens": 1, "user": "x" * (300 * size)}).encode()
    pieces = (body[i : i + size] for i in range(0, len(body), size))
    url = f"http://{here[0][0]}:{here[0][1]}/v1/completions"
    head = {"content-type": "application/json"}
    assert httpx.post(url, content=pieces, headers=head).status_code == 200


def test_running_requests_keep_their_places(folder):
    with limited(folder, ConnectionLimits(max_connections=2)) as (address, service, _):
        step = service.engine.step
        service.engine.step = lambda: (time.sleep(0.05), step())[1]
        url = f"http://{address[0]}:{address[1]}/v1/completions"
        body = {"prompt": "we", "max_tokens": 40, "stream": True}
        with (
            httpx.stream("POST", url, json=body) as one,
            httpx.stream("POST", url, json=body) as two,
        ):
            streams = [stream.iter_lines() for stream in (one, two)]  # kept: their end closes them
            next(streams[0])
            third = httpx.get(f"http://{address[0]}:{address[1]}/health")
            assert third.status_code == 503 and third.headers["retry-after"] == "1"
            for lines in streams:
                assert [line for line in lines if line][-1] == "data: [DONE]"


def test_few_descriptors_are_enough(folder):
    """160 connections with half a request, 128 descriptors: an honest client is served."""
    few = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (128, 128))
    with command(folder, prepare=few) as (base, _), ExitStack() as attackers:
        address = ("127.0.0.1", int(base.rsplit(":", 1)[1]))
        for _ in range(160):
            attacker = attackers.enter_context(socket.create_connection(address))
            attacker.sendall(b"GET /hea")
        for _ in range(3):
            assert ask(address).status_code == 200


def test_a_client_that_never_reads_is_disconnected(here):
    address, service, _ = here
    body = json.dumps({"prompt": "we", "max_tokens": 150, "n": 16, "stream": True, "logprobs": 5})
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect(address)
        connection.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n{body}".encode())
        end = time.monotonic() + 60
        while len(here[2].server_state.connections) and time.monotonic() < end:
            time.sleep(0.05)
        assert not here[2].server_state.connections and quiet(service)


@contextmanager
def half_read(server, address, num_clients: int):
    """Clients whose requests are answered with more than they read, a little now and then."""
    wait_until(lambda: server.started)
    listener = server.servers[0].sockets[0]
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # of its connections
    request = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
    clients, has_ended = [], threading.Event()

    def read_a_little():
        while not has_ended.wait(0.1):
            for client in clients:
                with suppress(OSError):
                    client.recv(1100)

    for _ in range(num_clients):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        client.connect(address)
        client.sendall(request * 20)
        client.setblocking(False)
        clients.append(client)
    reader = threading.Thread(target=read_a_little)
    reader.start()
    try:
        yield clients
    finally:
        has_ended.set()
        reader.join()
        for client in clients:
            client.close()


def wait_until(holds) -> None:
    """Wait until a condition holds, at most some seconds."""
    end = time.monotonic() + 10
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    assert holds()


def behind(server) -> int:
    """Return how many clients are behind in reading."""
    return sum(bool(c.stall_timer) for c in server.server_state.connections)


def test_slow_readers_give_way_to_others(folder):
    """Eight clients in all eight places, before any key is asked for, kept everyone out."""
    with limited(folder) as (address, _, server), half_read(server, address, 8):
        wait_until(lambda: behind(server) == 8)
        time.sleep(1)  # twice the time in which they must read something
        assert behind(server) == 8 and ask(address).status_code == 200


def test_what_clients_do_not_read_is_bounded(folder, monkeypatch):
    """Of two clients that together leave too much unread, the one that is behind longer goes."""
    monkeypatch.setattr(http_server, "MAX_UNREAD_BYTES", 130_000)  # one is behind with 65,536
    with limited(folder) as (address, _, server), half_read(server, address, 2) as clients:
        port = clients[1].getsockname()[1]
        wait_until(lambda: [c.client[1] for c in server.server_state.connections] == [port])
        assert ask(address).status_code == 200


# ── Size ──


def test_texts_that_a_response_repeats_are_bounded(here, monkeypatch):
    """Two bytes for a token of a hundred, sixteen times, made 32 MB of a request of 80 KB."""
    address, service, _ = here
    monkeypatch.setattr("dsv3_ref.serving.service.MAX_REPEATED_BYTES", 60)
    token = service.tokenizer.encode("a").ids[-1]
    body = {"prompt": [token] * 30, "max_tokens": 1}
    assert ask(address, body | {"echo": True, "n": 2}).status_code == 200
    assert ask(address, body | {"n": 3}).status_code == 200
    for more in ({"n": 3}, {"n": 1, "best_of": 3}):
        answer = ask(address, body | {"echo": True} | more)
        assert answer.json()["error"]["param"] == "echo" and "90 bytes of text" in answer.text
    url = f"http://{address[0]}:{address[1]}"
    assert httpx.post(f"{url}/detokenize", json={"tokens": [token] * 60}).status_code == 200
    answer = httpx.post(f"{url}/detokenize", json={"tokens": [token] * 61})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "tokens"
    long = {"prompt": "q%" * 150, "add_special_tokens": False}
    answer = httpx.post(f"{url}/tokenize", json=long)
    assert answer.status_code == 400 and "a text of 300 tokens exceeds" in answer.text


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenized(here, monkeypatch):
    address, service, _ = here
    per_token = max_bytes_per_token(service.tokenizer)
    assert per_token == max(len(t) for t in service.tokenizer.get_vocab() if "｜" not in t)
    monkeypatch.setattr(service.chat, "encode", lambda text: 1 / 0)
    long = "x" * (256 * per_token + 1)
    for body in ({"prompt": long}, {"prompt": ["we", long]}):
        answer = ask(address, body)
        assert answer.status_code == 400 and "cannot fit" in answer.json()["error"]["message"]
    url = f"http://{address[0]}:{address[1]}/v1/chat/completions"
    half = [{"role": "user", "content": long[: len(long) // 2 + 1]}] * 2
    for talk in (half, [{"role": "user", "content": ""}] * 300):
        answer = httpx.post(url, json={"messages": talk})
        assert answer.status_code == 400 and "cannot fit" in answer.json()["error"]["message"]


TEMPLATE = "{{ tools }}{% for turn in messages %}{{ turn.content }}{% endfor %}{{ more }}"


def test_a_conversation_that_cannot_fit_is_refused_before_it_is_tokenized(
    folder, tmp_path, monkeypatch
):
    """Whatever a template renders counts, tools and variables too; what it leaves out does not."""
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE)
    with limited(tmp_path / "model") as (address, service, _):
        long = "x" * (256 * max_bytes_per_token(service.tokenizer) + 1)
        url = f"http://{address[0]}:{address[1]}/tokenize"
        talk = {"messages": [{"role": "user", "content": "we"}]}
        dropped = talk | {"chat_template_kwargs": {"other": long}}
        assert httpx.post(url, json=dropped).json()["count"] > 0
        monkeypatch.setattr(service.chat.encoder, "encode_plain", lambda *_: 1 / 0)
        for more in ({"tools": [{"a": long}]}, {"chat_template_kwargs": {"more": long}}):
            answer = httpx.post(url, json=talk | more)
            assert answer.status_code == 400 and "cannot fit" in answer.json()["error"]["message"]


def test_a_request_that_cannot_fit_is_refused_before_it_is_read(here):
    """Long lists, nested content and bodies larger than any prompt that fits."""
    address, service, _ = here
    assert service.max_body_bytes < 1 << 20
    nested: list = []
    for _ in range(400):
        nested = [{"type": "text", "text": nested}]
    url = f"http://{address[0]}:{address[1]}/v1/chat/completions"
    for answer, status in (
        (ask(address, {"prompt": [1] * 300}), 400),
        (ask(address, {"prompt": [[1] * 300]}), 400),
        (ask(address, {"prompt": "x" * service.max_body_bytes}), 413),
        (httpx.post(url, json={"messages": [{"role": "user", "content": nested}]}), 400),
        (httpx.post(url, json={"messages": [{"role": "user", "content": {}}]}), 400),
        (httpx.post(url, json={"messages": 5}), 400),
        (ask(address, {"prompt": None, "max_tokens": 1}), 200),  # as if absent
    ):
        assert answer.status_code == status, answer.text


def test_bodies_that_arrive_at_the_same_time_are_bounded(here, monkeypatch):
    """Clients that stop in the middle of large ones keep other large ones out, no small ones."""
    address, service, _ = here
    monkeypatch.setattr(service.body_budget, "limit", 100_000)
    large = {"prompt": "we", "max_tokens": 1, "user": "x" * 50_000}
    senders = []
    for _ in range(2):
        senders.append(socket.create_connection(address))
        senders[-1].sendall(HEAD + b"Content-Length: 50000\r\n\r\n" + b" " * 45_000)
    end = time.monotonic() + 5
    while service.body_budget.used < 90_000 and time.monotonic() < end:
        time.sleep(0.01)
    assert service.body_budget.used == 90_000
    answer = ask(address, large)
    assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
    assert ask(address).status_code == 200
    for sender in senders:
        sender.close()
    while service.body_budget.used and time.monotonic() < end:
        time.sleep(0.01)
    assert service.body_budget.used == 0 and ask(address, large).status_code == 200


def test_tokens_that_cannot_fit_are_not_decoded(here):
    url = f"http://{here[0][0]}:{here[0][1]}/detokenize"
    assert httpx.post(url, json={"tokens": [5] * 256}).status_code == 200
    answer = httpx.post(url, json={"tokens": [5] * 257})
    assert answer.status_code == 400 and "a list of at most 256 token ids" in answer.text


def test_an_error_does_not_repeat_a_long_text(here):
    url = f"http://{here[0][0]}:{here[0][1]}/v1/chat/completions"
    answer = httpx.post(url, json={"messages": [{"role": "x" * 50_000, "content": ""}]})
    assert answer.status_code == 400 and "turn 1 is by" in answer.text
    assert len(answer.content) < 2000


def test_the_longest_prompt_that_fits_is_served(here):
    """Made of the longest token, so that it has as many bytes as fit at all."""
    address, service, _ = here
    vocab = service.tokenizer.get_vocab()
    token = max((t for t in vocab if "｜" not in t), key=len)
    text = service.tokenizer.decode([vocab[token]]) * 254
    answer = ask(address, {"prompt": text, "max_tokens": 1})
    if len(service.chat.encode(text)) <= 254:
        assert answer.status_code == 200, answer.text
    else:
        assert "tokens exceed the limit" in answer.json()["error"]["message"]


def test_tokenizing_does_not_stop_the_others(here, monkeypatch):
    address, service, _ = here
    encode = service.chat.encode
    monkeypatch.setattr(
        service.chat,
        "encode",
        lambda text: (time.sleep(1.5 if "slow" in text else 0), encode(text))[1],
    )
    monkeypatch.setattr(service.tokenize_pool, "bytes_per_token", None)
    slow = threading.Thread(target=ask, args=(address, {"prompt": "slow" * 5000}))
    slow.start()
    start = time.monotonic()
    assert ask(address).status_code == 200 and time.monotonic() - start < 1.2
    slow.join()


def test_a_long_stop_string_is_refused(here):
    answer = ask(here[0], {"prompt": "we", "stop": "x" * 1001})
    assert "a stop string must not exceed 1000 characters" in answer.text


def test_fields_that_occur_twice_are_found_in_linear_time():
    """A megabyte of names with one twice once took hours, and no large body was read meanwhile."""
    names = ", ".join(f'"{i}": 0' for i in [*range(100_000), 99_999])
    start = time.process_time()
    with pytest.raises(UserError, match='the field "99999" occurs twice'):
        parse_json(f"{{{names}}}".encode())
    assert time.process_time() - start < 5


class Body:
    """A body whose end can be observed."""

    def __len__(self) -> int:
        """Return the number of its bytes."""
        return 1 << 20


def test_a_body_that_nobody_waits_for_is_dropped(here):
    """Clients that leave once their body is queued must not fill the memory."""
    pool = TokenizePool(here[1].tokenizer, 256, max_queue=3)
    gate = threading.Event()

    logged: list[dict] = []

    async def leave() -> list[weakref.ref]:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: logged.append(context))
        blocker = asyncio.ensure_future(pool.run(1 << 20, gate.wait))
        await asyncio.sleep(0.01)
        bodies = []
        for _ in range(2):
            body = Body()
            bodies.append(weakref.ref(body))
            waiting = asyncio.ensure_future(pool.run(1 << 20, partial(len, body)))
            del body
            await asyncio.sleep(0.01)
            waiting.cancel()
            await asyncio.wait([waiting])
            del waiting
        gc.collect()
        assert [body() for body in bodies] == [None, None]
        with pytest.raises(QueueFull):  # their places are free once the thread comes to them
            await pool.run(1 << 20, bool)
        gate.set()
        assert await blocker
        while pool.num_pending:
            await asyncio.sleep(0.01)
        assert await pool.run(1 << 20, bool) is False
        gc.collect()
        assert not logged, "the log does not grow with clients that leave"
        return bodies

    try:
        asyncio.run(asyncio.wait_for(leave(), 20))
    finally:
        gate.set()
        pool.stop()


def test_log_probabilities_are_bounded(here, monkeypatch):
    """In one response, and in all that have not been sent, which stalled clients keep."""
    address, service, _ = here
    body = {"prompt": "we talk", "max_tokens": 200, "n": 16, "logprobs": 20, "echo": True}
    monkeypatch.setattr("dsv3_ref.serving.service.MAX_LISTED", 60_000)
    answer = ask(address, body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "logprobs"
    assert "are more than the 60000 allowed" in answer.text
    small = {"prompt": "we", "max_tokens": 100, "n": 8, "logprobs": 4}  # 4,000 of them
    monkeypatch.setattr("dsv3_ref.serving.service.MAX_LISTED_AT_ONCE", 6000)
    url = f"http://{address[0]}:{address[1]}/v1/completions"
    step = service.engine.step
    monkeypatch.setattr(service.engine, "step", lambda: (time.sleep(0.02), step())[1])
    with httpx.stream("POST", url, json=small | {"stream": True}) as stream:
        lines = stream.iter_lines()
        next(lines)
        assert service.num_listed == 4000
        assert ask(address, small).status_code == 429
        assert ask(address).status_code == 200  # without log-probabilities
    assert quiet(service) and service.num_listed == 0
    assert ask(address, small).status_code == 200 and service.num_listed == 0


# ── Who ──


@pytest.mark.parametrize(
    "header, host",
    [
        ("LocalHost:8000", "localhost"), ("127.0.0.1", "127.0.0.1"), ("[::1]:80", "::1"),
        ("evil.example", "evil.example"), ("a:b", ""), ("[::1", ""), ("[::1]x", ""),
        ("localhost.", "localhost"), ("", ""), ("::1", ""),
    ],
)  # fmt: skip
def test_the_host_of_a_header(header, host):
    assert host_of(header) == host


def test_only_known_hosts(here):
    for host, status in (
        ("localhost", 200), ("127.0.0.1:9", 200), ("[::1]", 200), ("evil.example", 403),
        ("127.0.0.1.evil.example", 403), ("192.0.2.7", 403), ("localhost@evil.example", 403),
    ):  # fmt: skip
        answer = httpx.get(f"http://{here[0][0]}:{here[0][1]}/health", headers={"host": host})
        assert answer.status_code == status, host
    with bind_socket("0.0.0.0", 0) as listener:
        rule = host_rule(listener, ["api.example"])
        assert rule("192.0.2.7") and rule("api.example:443") and rule(socket.gethostname())
        assert not rule("evil.example") and not rule("")


def test_a_request_with_two_lengths_is_refused_and_hides_no_other(here):
    """A reverse proxy that goes by the other length would take the second one for the body."""
    hidden = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    lengths = b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    with socket.create_connection(here[0]) as connection:
        connection.sendall(HEAD + lengths + hidden)
        received = b""
        with suppress(ConnectionResetError):
            while part := connection.recv(1 << 16):
                received += part
    assert received.startswith(b"HTTP/1.1 400") and received.count(b"HTTP/1.1") == 1


def test_a_key_is_needed_and_keeps_prefixes_apart(folder, monkeypatch):
    options = {"api_key": ("first", "second"), "report_cached_tokens": True}
    with limited(folder, **options) as (address, service, _):
        base = f"http://{address[0]}:{address[1]}"
        for path in ("/v1/models", "/metrics", "/v1/completions", "/nothing"):
            for header in (
                None,
                "Bearer wrong",
                "Basic first",
                "first",
                "Bearer",
                "Bearer first x",
            ):
                answer = httpx.get(base + path, headers={"authorization": header} if header else {})
                assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert httpx.get(f"{base}/health").status_code == 200
        body = {"prompt": "we talk again and again: " * 4, "max_tokens": 1}
        cached = []
        for key in ("first", "second", "first", "second"):
            answer = ask(address, body, headers={"authorization": f"Bearer {key}"})
            cached.append(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
        assert cached[:2] == [0, 0] and cached[2] == cached[3] > 0
    assert ApiKeys(("a",)).salt(b"Bearer a") != ApiKeys(("a",)).salt(b"Bearer a")  # per process


def test_cached_tokens_are_not_told_and_no_origin_is_allowed(here):
    for _ in range(2):
        body = {"prompt": "we talk " * 9, "max_tokens": 2}
        answer = ask(here[0], body, headers={"origin": "http://evil.example"})
        assert "prompt_tokens_details" not in answer.json()["usage"]
        assert not [name for name in answer.headers if name.startswith("access-control")]
    url = f"http://{here[0][0]}:{here[0][1]}/v1/completions"
    headers = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    assert httpx.options(url, headers=headers).status_code == 405


def test_an_allowed_origin(folder):
    with limited(folder, allowed_origins=("https://good.example",)) as (address, _, _):
        for origin, allowed in (("https://good.example", True), ("https://evil.example", False)):
            answer = ask(address, headers={"origin": origin})
            assert (answer.headers.get("access-control-allow-origin") == origin) == allowed


def test_a_key_from_the_environment(folder, monkeypatch, capsys):
    monkeypatch.setenv("DSV3_API_KEY", "one, two")
    with limited(folder) as (address, _, _):
        assert ask(address).status_code == 401
        assert ask(address, headers={"authorization": "Bearer two"}).status_code == 200
    assert main.main(["serve", str(folder), "--api-key", "a b"]) == 2
    assert "--api-key must consist of visible ASCII characters" in capsys.readouterr().err


# ── Faults ──

STAGES = ["encode", "submit", "push", "record", "cancel"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_fault_of_one_http_request_leaves_the_others_alone(folder, stage, streaming, monkeypatch):
    with limited(folder, num_speculative_tokens=1) as (address, service, _):
        body = {"prompt": "we talk", "max_tokens": 20, "seed": 5}
        want = ask(address, body).json()["choices"][0]["text"]
        inject(service, stage, monkeypatch)
        answers = []
        threads = [
            threading.Thread(target=lambda: answers.append(ask(address, body))) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        bad = ask(address, {"prompt": "bad one", "max_tokens": 9, "stream": streaming})
        for thread in threads:
            thread.join()
        assert [x.json()["choices"][0]["text"] for x in answers] == [want] * 3
        if stage != "cancel":  # which happens after the answer
            assert bad.status_code == 500 or '"error"' in bad.text and "[DONE]" not in bad.text
            assert "injected" not in bad.text
        assert httpx.get(f"http://{address[0]}:{address[1]}/health").json() == {"status": "ready"}
        assert quiet(service)


def inject(service, stage: str, monkeypatch) -> None:
    """Raise an exception in a stage of the request whose prompt begins with “bad”."""
    bad = service.chat.encode("bad")

    def is_bad(r) -> bool:
        return r.tokens[1 : 1 + len(bad)] == bad

    def broken(real, test):
        def call(*args):
            if test(*args):
                raise RuntimeError("injected")
            return real(*args)

        return call

    thread = service.engine_thread
    if stage == "encode":
        monkeypatch.setattr(
            service.chat, "encode", broken(service.chat.encode, lambda t: "bad" in t)
        )
    elif stage == "submit":
        monkeypatch.setattr(thread, "submit", broken(thread.submit, lambda rows: is_bad(rows[0])))
    elif stage == "push":
        processor = thread.processor
        real = broken(processor.make_piece, lambda output, r: is_bad(r))
        monkeypatch.setattr(processor, "make_piece", real)
    elif stage == "record":
        monkeypatch.setattr(thread, "record", broken(thread.record, lambda x, _: is_bad(x.request)))
    else:

        class Worker:
            alive = True

            def cancel(self, r):
                if is_bad(r):
                    raise RuntimeError("injected")

            def stop(self):
                pass

        thread.prefill_workers.append(Worker())


# ── The end ──


def break_engine() -> None:
    """Let every step of the engine fail, in a server that answers for a second more."""
    api_server.FAILURE_LINGER = 1.0
    ModelRunner.decode_step = lambda *_: 1 / 0


def test_a_failed_engine_is_told_and_ends_the_process(folder):
    with command(folder, prepare=break_engine) as (base, process):
        answer = httpx.post(f"{base}/v1/completions", json={"prompt": "we"}, timeout=20)
        assert answer.status_code == 503
        health = httpx.get(f"{base}/health")
        assert health.status_code == 503 and health.json() == {"status": "failed"}
        assert process.wait(30) == 1
        assert "ZeroDivisionError" in process.log.read()


@contextmanager
def never_reading(base: str):
    """A client of the server at an address that reads nothing of a long answer."""
    port = int(base.rsplit(":", 1)[1])
    body = json.dumps({"prompt": "we", "max_tokens": 250, "n": 16, "stream": True, "logprobs": 5})
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect(("127.0.0.1", port))
        connection.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n{body}".encode())
        yield connection


@pytest.mark.parametrize("grace", ["0", "0.9"])
def test_it_ends_within_its_grace_although_a_client_never_reads(folder, grace):
    with command(folder, "--grace", grace) as (base, process), never_reading(base):
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        assert process.wait(10) == 0
        assert time.monotonic() - start < float(grace) + 2


HALVES = {
    "half a head": b"POST /v1/comple",
    "half a body": HEAD + b'Content-Length: 100\r\n\r\n{"prompt": ',
}


@pytest.mark.parametrize(
    "name, grace, most, codes",
    [
        ("half a body", "60", 3, (143,)), ("half a body", "0", 2, (0, 143)),
        pytest.param("half a head", "0", 2, (0, 143), marks=pytest.mark.full),
        pytest.param("half a head", "60", 3, (0, 143), marks=pytest.mark.full),
    ],
)  # fmt: skip
def test_two_signals_end_it_although_a_request_is_half_sent(folder, name, grace, most, codes):
    """With --grace 0, or if no head is complete, the first one may already have done so."""
    with command(folder, "--grace", grace) as (base, process):
        port = int(base.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(HALVES[name])
            assert httpx.get(f"{base}/health").status_code == 200
            start = time.monotonic()
            process.send_signal(signal.SIGTERM)
            if grace == "60":
                connection_is_drained(base)
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) in codes
            assert time.monotonic() - start < most


def connection_is_drained(base: str) -> None:
    """Wait until the first signal has been handled, if the server still answers."""
    end = time.monotonic() + 2
    with suppress(httpx.TransportError):
        while httpx.get(f"{base}/health").status_code == 200 and time.monotonic() < end:
            pass


def test_it_drains_and_a_second_signal_ends_it(folder):
    with command(folder, "--grace", "60") as (base, process), never_reading(base):
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        end = time.monotonic() + 5
        while (health := httpx.get(f"{base}/health")).status_code == 200:
            assert time.monotonic() < end
        assert health.json() == {"status": "draining"}
        answer = httpx.post(f"{base}/v1/completions", json={"prompt": "we"})
        assert answer.status_code == 503 and "shutting down" in answer.text
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(3) == 128 + signal.SIGTERM
