"""Hosts, keys and limits of a server and the queue of its tokenizer, without a listening socket."""

import asyncio
import base64
import json
import socket
import threading
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from dsv3_ref.config import UserError
from dsv3_ref.data.tokenizer import train_tokenizer
from dsv3_ref.serve import QueueFull
from dsv3_ref.serving.config import (
    ChatConfig,
    GenerateConfig,
    ServeConfig,
    api_keys,
    validate_generation_options,
    validate_serve_config,
)
from dsv3_ref.serving.json_body import SMALL_BODY_BYTES, parse_json
from dsv3_ref.serving.network import (
    CACHE_SALT,
    ApiKeys,
    bind_socket,
    guard_app,
    is_loopback,
    origin_rule,
    password_of,
)
from dsv3_ref.serving.tokenize_pool import TokenizePool, max_bytes_per_token, pipeline_steps

# ── Addresses ──


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_has_sixteen_bits(port):
    with pytest.raises(UserError, match=f"--port must be from 0 to 65535, not {port}"):
        bind_socket("127.0.0.1", port)


def test_an_address_that_is_in_use_or_unknown_is_an_error():
    with bind_socket("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"--host 127.0.0.1 --port {port} cannot be used: "):
            bind_socket("127.0.0.1", port)
    with pytest.raises(UserError, match="--host a..b --port 0 cannot be used: "):
        bind_socket("a..b", 0)


def test_the_first_address_of_a_name_is_used(monkeypatch):
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 0))
        for host in ("127.0.0.1", "192.0.2.1")
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with bind_socket("two.example", 0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_loopback_addresses_and_one_name():
    hosts = [
        "localhost",
        "127.0.0.1",
        "127.9.9.9",
        "::1",
        "0.0.0.0",
        "192.0.2.1",
        "example.org",
        "",
    ]
    assert [host for host in hosts if is_loopback(host)] == hosts[:4]


# ── API keys ──


def basic(text: str) -> bytes:
    return b"Basic " + base64.b64encode(text.encode())


def test_keys_of_clients_and_passwords_of_browsers():
    keys, passwords = ApiKeys(("a", "b")), ApiKeys(("a",), is_password=True)
    salts = [keys.salt(b"Bearer a"), keys.salt(b"bearer  b "), keys.salt(b"BEARER a")]
    assert salts[0] == salts[2] != salts[1] and None not in salts
    for header in (b"", b"a", b"Bearer", b"Bearer c", b"Basic a", b"Bearer a b", basic("x:a")):
        assert keys.salt(header) is None
    assert passwords.salt(basic("any:a")) == passwords.salt(basic(":a")) == passwords.digest(b"a")
    for header in (b"Bearer a", basic("a"), basic("a:b"), b"Basic a", basic("any:a") + b"!"):
        assert passwords.salt(header) is None
    assert ApiKeys(()).salt(b"") == ApiKeys(()).salt(b"Bearer a") == b""
    assert keys.challenge == b"Bearer" and passwords.challenge == b'Basic realm="dsv3"'
    assert len(keys.secret) == 32 and password_of(b"YTpiOmM=") == b"b:c"


def guarded(keys: ApiKeys, scope: dict, **options) -> tuple[list[dict], list[dict]]:
    """Return the scopes that reach an app behind its guard, and the messages that are sent."""
    reached: list[dict] = []
    sent: list[dict] = []

    async def app(scope, receive, send) -> None:
        reached.append(dict(scope))

    async def send(message: dict) -> None:
        sent.append(message)

    guard = guard_app(app, lambda host: host == "here", keys, ("/open",), **options)
    asyncio.run(guard(scope, None, send))
    return reached, sent


def request(path: str, host: str = "here", key: str = "") -> dict:
    headers = [(b"host", host.encode())]
    headers += [(b"authorization", f"Bearer {key}".encode())] if key else []
    return {"type": "http", "path": path, "headers": headers}


def test_a_guard_lets_known_hosts_with_a_key_through():
    keys = ApiKeys(("k",))
    (scope,), sent = guarded(keys, request("/v1", key="k"))
    assert scope[CACHE_SALT] == keys.digest(b"k") and not sent
    (scope,), sent = guarded(keys, request("/open"))
    assert scope[CACHE_SALT] == b"" and not sent
    for path in ("/v1", "/opened"):
        reached, (start, body) = guarded(keys, request(path, key="wrong"))
        assert not reached and start["status"] == 401
        assert json.loads(body["body"])["error"]["code"] == "invalid_api_key"
        assert dict(start["headers"])[b"www-authenticate"] == b"Bearer"
        assert dict(start["headers"])[b"content-length"] == str(len(body["body"])).encode()
        assert dict(start["headers"])[b"connection"] == b"close"
        assert "as “Authorization: Bearer KEY”" in json.loads(body["body"])["error"]["message"]
    _, (_, body) = guarded(ApiKeys(("k",), is_password=True), request("/v1"))
    assert "as “Authorization: Basic KEY”" in json.loads(body["body"])["error"]["message"]


def test_a_guard_refuses_foreign_pages_where_it_is_asked_to():
    own = {"is_own_page": origin_rule(("proxy.example",))}
    for origins, is_own in (
        ([], True), (["http://here"], True), (["https://proxy.example"], True),
        (["http://there"], False), (["http://here", "http://there"], False),
    ):  # fmt: skip
        scope = request("/open")
        scope["headers"] += [(b"origin", origin.encode()) for origin in origins]
        reached, sent = guarded(ApiKeys(()), scope, **own)
        assert bool(reached) is is_own and bool(sent) is not is_own
        assert len(guarded(ApiKeys(()), scope)[0]) == 1
    foreign = request("/open")
    foreign["headers"].append((b"origin", b"http://" + b"x" * 90))
    _, (start, body) = guarded(ApiKeys(()), foreign, **own)
    assert start["status"] == 403
    message = json.loads(body["body"])["error"]["message"]
    assert message == f"pages of 'http://{'x' * 73}' may not use this server"


def test_a_guard_refuses_other_hosts_and_protocols():
    none = ApiKeys(())
    reached, (start, body) = guarded(none, request("/open", host="x" * 90))
    assert not reached and start["status"] == 403
    assert f"the host '{'x' * 80}' is not allowed" in json.loads(body["body"])["error"]["message"]
    assert guarded(none, {"type": "http", "path": "/", "headers": []})[1][0]["status"] == 403
    assert guarded(none, {"type": "websocket"}) == ([], [])
    assert guarded(none, {"type": "lifespan"}) == ([{"type": "lifespan"}], [])
    assert len(guarded(none, request("/v1"))[0]) == 1


# ── Options ──

SERVE_LIMITS = {
    "max_num_seqs": 1, "max_n": 1, "block_size": 1, "prefill_chunk": 1, "max_new_tokens": 1,
    "max_queue": 1, "max_connections": 1, "num_speculative_tokens": 0, "prefill_workers": 0,
    "grace": 0,
}  # fmt: skip


@pytest.mark.parametrize("name, least", SERVE_LIMITS.items())
def test_the_least_values_of_the_servers_options(name, least):
    validate_serve_config(ServeConfig(Path("m"), **{name: least}))
    for value in (least - 1, float("nan"), float("inf")):
        option = f"--{name.replace('_', '-')} must be at least {least}"
        with pytest.raises(UserError, match=option):
            validate_serve_config(ServeConfig(Path("m"), **{name: value}))


def test_a_cache_has_at_least_two_blocks():
    validate_serve_config(ServeConfig(Path("m"), kv_cache_tokens=16, block_size=8))
    with pytest.raises(UserError, match=r"at least two blocks \(16 tokens\)"):
        validate_serve_config(ServeConfig(Path("m"), kv_cache_tokens=15, block_size=8))


def test_the_servers_defaults():
    args = ServeConfig(Path("m"))
    assert (args.host, args.port, args.max_num_seqs, args.max_queue) == ("127.0.0.1", 8000, 64, 256)
    assert (args.kv_cache_tokens, args.block_size, args.prefill_chunk) == (32768, 16, 128)
    assert (args.max_n, args.max_new_tokens, args.grace, args.seed) == (16, 256, 30.0, None)
    assert (args.max_connections, args.num_speculative_tokens, args.prefill_workers) == (512, 0, 0)
    assert args.verify and not args.report_cached_tokens and not args.allow_unauthenticated


def test_the_defaults_of_generation_and_of_the_web_page():
    args = ChatConfig(Path("m"))
    assert (args.max_new_tokens, args.num_speculative_tokens, args.seed) == (200, 0, 0)
    assert (args.host, args.port, args.web) == ("127.0.0.1", 7860, False)
    assert args.verify and not args.compile and args.temperature is args.top_p is None
    assert GenerateConfig(Path("m")).prompt == ("",)


@pytest.mark.parametrize(
    "good, bad, option",
    [
        ({"max_new_tokens": 1}, {"max_new_tokens": 0}, "--max-new-tokens"),
        ({"temperature": 0.0}, {"temperature": -0.1}, "--temperature"),
        ({"temperature": None}, {"temperature": float("inf")}, "--temperature"),
        ({"top_p": 1.0}, {"top_p": 1.1}, "--top-p"),
        ({"top_p": None}, {"top_p": 0.0}, "--top-p"),
        ({"num_speculative_tokens": 0}, {"num_speculative_tokens": -1}, "--num-speculative-tokens"),
        ({"stop": ("a",)}, {"stop": ("a", "")}, "--stop"),
    ],
)
def test_the_limits_of_generation(good, bad, option):
    validate_generation_options(GenerateConfig(Path("m"), **good))
    with pytest.raises(UserError, match=option):
        validate_generation_options(GenerateConfig(Path("m"), **bad))


def test_keys_are_those_of_the_options_or_else_of_the_environment(monkeypatch):
    monkeypatch.setenv("DSV3_API_KEY", " one, ,two")
    assert api_keys(ServeConfig(Path("m"))) == ("one", "two")
    assert api_keys(ServeConfig(Path("m"), api_key=("x",))) == ("x",)
    for key in ("", "a b", "é", "a\n"):
        with pytest.raises(UserError, match="visible ASCII characters"):
            api_keys(ServeConfig(Path("m"), api_key=(key,)))
    monkeypatch.delenv("DSV3_API_KEY")
    assert api_keys(ServeConfig(Path("m"))) == ()


# ── Bodies ──


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["we talk again and again\n"] * 50, 300)


def test_the_most_bytes_of_a_token(tokenizer):
    assert "Ġagain" in tokenizer.get_vocab() and max_bytes_per_token(tokenizer) == len(" again")
    lossy = Tokenizer.from_str(tokenizer.to_str())
    lossy.normalizer = normalizers.Sequence([normalizers.Strip()])
    assert max_bytes_per_token(lossy) is None
    removed = Tokenizer.from_str(tokenizer.to_str())
    removed.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    assert max_bytes_per_token(removed) is None
    words = Tokenizer(models.BPE({"a": 0}, []))
    words.decoder = decoders.Fuse()
    assert max_bytes_per_token(words) is None
    steps = pipeline_steps(lossy.normalizer)
    assert [step["type"] for step in steps] == ["Sequence", "Strip"] and pipeline_steps(None) == []


def test_the_longest_prompt_and_the_largest_body(tokenizer):
    pool = TokenizePool(tokenizer, max_tokens=10, max_queue=1)
    per_token = pool.bytes_per_token
    pool.check_length(10 * per_token)
    with pytest.raises(UserError, match=f"a prompt of {10 * per_token + 1} bytes cannot fit"):
        pool.check_length(10 * per_token + 1)
    assert pool.max_body_bytes(3, 1 << 30) == (1 << 16) + 3 * 10 * max(per_token, 10) * 6
    assert pool.max_body_bytes(3, 1000) == 1000
    pool.bytes_per_token = 3  # an id of ten bytes is longer than a token's text
    assert pool.max_body_bytes(3, 1 << 30) == (1 << 16) + 3 * 10 * 10 * 6
    pool.bytes_per_token = None
    assert pool.max_body_bytes(3, 1 << 30) == 1 << 30
    pool.check_length(1 << 40)
    pool.stop()


def test_small_bodies_do_not_wait_for_large_ones_and_the_queue_has_an_end(tokenizer):
    pool = TokenizePool(tokenizer, max_tokens=10, max_queue=2)
    release = threading.Event()
    begun = []

    def name() -> str:
        return threading.current_thread().name

    def wait() -> str:
        begun.append(name())
        release.wait(20)
        return name()

    async def run() -> list[str]:
        large = asyncio.create_task(pool.run(SMALL_BODY_BYTES + 1, wait))
        await asyncio.sleep(0)
        small = await pool.run(SMALL_BODY_BYTES, name)
        waiting = asyncio.create_task(pool.run(SMALL_BODY_BYTES + 1, wait))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await pool.run(1, name)
        await asyncio.sleep(0.02)
        assert len(begun) == 1  # large ones are read one after another
        release.set()
        return [small, await large, await waiting, await pool.run(1, name)]

    names = [text.rpartition("_")[0] for text in asyncio.run(run())]
    assert names == ["tokenize-small", "tokenize-large", "tokenize-large", "tokenize-small"]
    pool.small.shutdown()
    assert pool.num_pending == 0
    pool.stop()
    with pytest.raises(RuntimeError):
        asyncio.run(pool.run(1, name))
    assert pool.num_pending == 0


def test_json_is_read_strictly():
    assert parse_json(b'\xef\xbb\xbf{"a": [1]}') == {"a": [1]}
    for data, sentence in (
        (b'{"a": 1, "b": 2, "b": 3}', 'the field "b" occurs twice'),
        (b'{"a": "\\ud83d"}', "must be JSON in UTF-8: an invalid value"),
        (b'{"a": "\\uD83D"}', "must be JSON in UTF-8: an invalid value"),
        (b'{"a": ', "must be JSON in UTF-8: Expecting value"),
        (b'"\xff"', "must be JSON in UTF-8: an invalid value"),
        (b'{"%s": 1, "%s": 1}' % (b"x" * 99, b"x" * 99), f'the field "{"x" * 59} occurs twice'),
    ):
        for padding in (b"", b" " * SMALL_BODY_BYTES):  # by the scanner in C and by Python's
            with pytest.raises(UserError) as e:
                parse_json(data + padding)
            assert sentence in str(e.value)
    assert parse_json(b'{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}
