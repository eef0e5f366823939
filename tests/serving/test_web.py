"""`dsv3 chat --web`: the experts of every token; nothing is forged, mixed up or sent away."""

import asyncio
import io
import json
import re
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import redirect_stderr, suppress
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from urllib.parse import urlsplit

import httpx
import pytest
import test_browser
import torch
from miniruns import MINI
from policy import Content, digest, directives

from dsv3_ref.checkpoints.native import save
from dsv3_ref.cli import main
from dsv3_ref.config import UserError, from_dict
from dsv3_ref.data.tokenizer import EOS, SPECIAL, save_tokenizer, train_tokenizer
from dsv3_ref.decode import SpeculativeDecoder
from dsv3_ref.model import Transformer, moe_layers
from dsv3_ref.serving import http_server, web
from dsv3_ref.serving.config import ChatConfig
from dsv3_ref.serving.text_generator import TextGenerator, fit_history
from dsv3_ref.serving.text_generator import answered as answered_turn
from dsv3_ref.serving.text_generator import question as question_turn
from dsv3_ref.serving.web import Session, Turn

TALK = ["we talk, and <b>talk</b> again: naïve ☕ 漢字, over & over.\n"] * 50
SETTINGS = (1.0, 0.95, 12, 2, "")  # temperature, top-p, new tokens, drafts, system text
ATTACK = "<script>hacked = 1</script><img src=x onerror='hacked = 1'>${hacked = 1}{{hacked}}"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio")  # gradio's own

CALLED = []  # hosts that this process connects to while `watch` is installed


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A random model of three layers, two of them with experts, and two MTP modules."""
    folder = tmp_path_factory.mktemp("run") / "model"
    torch.manual_seed(0)
    sizes = {"n_layers": 3, "n_mtp_layers": 2, "max_seq_len": 256, "original_seq_len": 256}
    save(Transformer(from_dict(MINI | sizes)), folder)
    save_tokenizer(train_tokenizer(TALK, MINI["vocab_size"]), folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def generator(run):
    return TextGenerator(ChatConfig(run, max_new_tokens=12, num_speculative_tokens=1))


def answered(generator, question="we talk", session=None, settings=SETTINGS) -> Turn:
    """Ask a question and return the finished turn."""
    session = session or Session()
    assert session.ask(question)
    *_, turn = web.answer_turn(generator, session, *settings)
    return turn


class Page(HTMLParser):
    """Text, tags and attributes of a page, as a browser reads them."""

    def __init__(self, html: str):
        super().__init__()
        self.text = ""
        self.tags = set()
        self.attributes = set()
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


# ── Tokens and their experts ──


def test_the_experts_of_a_token_are_those_that_read_it(generator):
    """Compare with the slow form: one forward pass per prefix, of which the last token counts."""
    turn = answered(generator)
    names = [
        name.split(".")[1] for name in moe_layers(generator.model) if name.startswith("layers")
    ]
    assert names == ["1", "2"]
    for i, token in enumerate(turn.tokens):
        row = torch.tensor([turn.prompt + turn.tokens[: i + 1]])
        with torch.no_grad():
            routes = generator.model.hidden_states(row)[1]
        assert row[0, -1] == token and list(turn.routes[i]) == names
        for picks, r in zip(turn.routes[i].values(), routes):
            assert [expert for expert, _ in picks] == r.topk_ids_bsk[0, -1].tolist()
            torch.testing.assert_close(
                torch.tensor([weight for _, weight in picks]), r.topk_weights_bsk[0, -1]
            )


@pytest.mark.parametrize("draft", [0, 1, 2])
@pytest.mark.parametrize("new", [1, 2, 11, 12, 13])
def test_marked_are_the_drafts_that_the_model_accepted(generator, draft, new, monkeypatch):
    """Compare with the steps of `SpeculativeDecoder`: accepted drafts and one token of its own."""
    marks, real = [False], SpeculativeDecoder.step

    def spy(writer, *args):
        (tokens,) = out = real(writer, *args)
        marks.extend([True] * (len(tokens) - 1) + [False])
        return out

    monkeypatch.setattr(SpeculativeDecoder, "step", spy)
    turn = answered(generator, settings=(2.0, 1.0, new, draft, ""))
    assert turn.accepted == marks[: len(turn.tokens)]
    assert len(turn.tokens) == len(turn.pieces) <= new
    assert any(turn.accepted) or draft == 0 or new < 11
    num_drafts = web.plural(turn.num_draft_steps * draft, "draft")
    num_steps = web.plural(turn.num_draft_steps, "step")
    status = f"{sum(turn.accepted)} of {num_drafts} accepted in {num_steps}"
    assert (status in web.render_turn(turn)) == (draft > 0)
    assert web.render_turn(turn).count("token accepted") == sum(turn.accepted)
    assert web.render_turn(turn).count(", accepted draft") == sum(turn.accepted)


def test_a_draft_that_ends_the_answer_is_marked(generator, monkeypatch):
    settings = (2.0, 1.0, 13, 2, "")
    whole = answered(generator, settings=settings)
    i = whole.accepted.index(True)
    assert whole.tokens.index(whole.tokens[i]) == i
    monkeypatch.setitem(vars(generator.chat), "stop_token_ids", {whole.tokens[i]})
    turn = answered(generator, settings=settings)
    assert (turn.tokens, turn.accepted) == (whole.tokens[: i + 1], whole.accepted[: i + 1])


@pytest.mark.parametrize("stop", [(), ("e",), ("a", "th")])
def test_the_answer_is_that_of_the_command(generator, stop):
    """Compare the text and the history, with stop strings too."""
    args = replace(generator.args, temperature=1.0, num_speculative_tokens=2, stop=stop)
    session, turns = Session(), []
    for i, question in enumerate(["we talk", "again ☕"]):
        turn = answered(generator.with_options(args), question, session)
        plain = generator.with_options(replace(args, seed=i))
        turns.append(question_turn(question))
        text = "".join(new[0] for new in plain.iter_text([fit_history(plain, turns)]))
        turns[-1] = answered_turn(turns[-1], text)
        assert turn.text == text == "".join(piece for _, piece in web.visible_tokens(turn))
        assert not any(s in turn.text for s in stop)
    assert session.turns == turns


def test_every_token_of_a_page_says_what_it_is(generator):
    turn = answered(generator)
    html = web.render_turn(turn)
    spans = re.findall(r'<span class="token[^>]*>', html)
    assert len(spans) == len(turn.tokens)
    assert [re.search(r'tabindex="(-?\d)"', s)[1] for s in spans] == ["0"] + ["-1"] * 11
    ids = re.findall(r'aria-describedby="([^"]*)"', html)
    assert ids == re.findall(r'role="tooltip" id="([^"]*)"', html) and len(set(ids)) == 12
    card = web.render_card(turn, 3)
    assert f"token {turn.tokens[3]}" in card
    for layer, picks in turn.routes[3].items():
        assert f"layer {layer}" in card
        assert all(f"expert {e} {w:.2f}<" in card for e, w in picks)


def test_tokens_without_letters_can_be_pointed_at():
    """The end mark, a part of a character, a line break."""
    turn = Turn("", 0, tokens=[1, 90, 91, 92], pieces=["", "", "☕", ",\n"], text="☕,\n")
    turn.accepted, turn.names = [False, True, False, True], [EOS, "\ufffd", "\ufffd", ",\n"]
    turn.routes = [{}] * 4
    html = web.render_turn(turn)
    assert html.count('<i class="silent">') == 2
    assert ',<i class="yes"></i><i class="break"></i>\n' in html
    assert web.escape(EOS) in web.render_card(
        turn, 0
    ) and "no layer has experts" in web.render_card(turn, 0)
    assert "part of a character" in web.render_card(turn, 1)
    assert r'",\n"' in Page(web.render_card(turn, 3)).text
    turn.pieces, turn.text = ["stop", "", "", ""], ""  # cut off at once
    assert re.findall(r'tabindex="(-?\d)"', web.render_turn(turn)) == ["0", "-1", "-1"]


# ── Nothing is forged ──


def test_whatever_is_written_is_only_text(generator):
    turn = answered(generator, ATTACK)
    harmless = Page(web.render_turn(turn))
    turn.pieces, turn.text = [ATTACK] * 12, ATTACK * 12
    turn.names = ['"><script>'] * 12
    page = Page(web.render_turn(turn, status=f"error: {ATTACK}"))
    assert page.tags == {"div", "span", "i", "b"}
    assert page.attributes == harmless.attributes
    assert page.attributes <= {"class", "role", "id", "tabindex", "aria-describedby", "style"}
    assert page.text.count(ATTACK) == 14
    assert Page(web.page_heading(ATTACK, generator)).tags == {"h1", "p", "span", "i"}


def test_no_text_becomes_a_special_token(generator):
    words = "".join(SPECIAL)
    turn = answered(generator, words, settings=(1.0, 1.0, 1, 0, ""))
    special = {generator.tokenizer.token_to_id(s) for s in SPECIAL}
    assert [i for i in turn.prompt if i in special] == [
        generator.tokenizer.token_to_id(s) for s in (SPECIAL[0], "<｜User｜>", "<｜Assistant｜>")
    ]
    system = web.apply_settings(generator.args, 1.0, 1.0, 1, 0, "".join(SPECIAL)).system
    assert not special & set(generator.chat.encode(system))


def test_halves_of_characters_are_replaced(generator):
    turn = answered(generator, "a\ud800b", settings=(1.0, 1.0, 1, 0, "\udfff"))
    assert turn.question == "a?b" and web.render_turn(turn).encode()


# ── What a tab remembers ──


def test_sessions_do_not_mix(generator, monkeypatch):
    monkeypatch.setattr(web, "FRAME_SECONDS", 0)
    one, two = Session(), Session()
    one.ask("we talk")
    two.ask("over & over")
    first, second = (web.answer_turn(generator, s, *SETTINGS) for s in (one, two))
    turns = [(next(first), next(second)) for _ in range(2)][-1]
    *_, a = first
    *_, b = second
    assert (a, b) == turns and a is not b
    assert a.text == answered(generator, "we talk").text
    assert b.text == answered(generator, "over & over").text
    assert len(one.turns) == len(two.turns) == 1 and one.turns != two.turns
    assert "over &amp; over" not in one.pages[0]


def test_one_question_at_a_time(generator):
    session = Session()
    assert session.ask(" \n") is None and session.turn is None
    assert session.ask("one") and session.ask("two") is None
    *_, turn = web.answer_turn(generator, session, *SETTINGS)
    assert turn.question == "one" and session.turn is None
    assert session.ask("two")


def test_stop_keeps_what_is_written(generator, monkeypatch):
    monkeypatch.setattr(web, "FRAME_SECONDS", 0)
    session = Session()
    session.ask("we talk")
    pages = web.answer_turn(generator, session, *SETTINGS)
    next(pages)
    session.stop()
    *_, turn = pages
    assert 1 <= len(turn.tokens) <= 3 and len(turn.routes) == len(turn.tokens)
    assert "; stopped" in web.render_turn(turn) and session.pages == [web.render_turn(turn)]
    assert session.turns == [answered_turn(question_turn("we talk"), turn.text)]


def test_a_question_may_be_stopped_or_cleared_while_it_waits(generator):
    session = Session()
    session.ask("we talk")
    session.stop()
    (html,) = web.stream_reply(generator, session, *SETTINGS)
    assert "stopped" in html and session == Session(num_questions=1)
    session.ask("we talk")
    session.clear()
    assert len(list(web.stream_reply(generator, session, *SETTINGS))) == 1  # nothing changes
    assert session == Session(num_questions=2)


def test_clear_forgets_what_is_being_written(generator, monkeypatch):
    monkeypatch.setattr(web, "FRAME_SECONDS", 0)
    session = Session()
    answered(generator, "we talk", session)
    session.ask("again")
    pages = web.answer_turn(generator, session, *SETTINGS)
    next(pages)
    assert web.clear_session(session) == ("", "")
    assert session.ask("over"), "a new question need not wait for the old answer's end"
    assert list(pages) == []
    assert (session.turns, session.pages, session.turn.question) == ([], [], "over")


def test_a_closed_answer_ends_and_is_forgotten(generator, monkeypatch):
    monkeypatch.setattr(web, "FRAME_SECONDS", 0)
    ended, real = [], TextGenerator.iter_steps

    def rounds(*args):
        try:
            yield from real(*args)
        finally:
            ended.append(True)

    monkeypatch.setattr(TextGenerator, "iter_steps", rounds)
    session = Session()
    session.ask("we talk")
    pages = web.stream_reply(generator, session, *SETTINGS)
    next(pages)
    pages.close()
    assert ended and session == Session(num_questions=1)


def test_the_oldest_turns_are_dropped_and_counted(generator):
    session = Session()
    for _ in range(3):
        turn = answered(generator, "over and over", session, (1.0, 1.0, 120, 0, ""))
    assert turn.num_dropped_turns
    assert f"{turn.num_dropped_turns} old turn" in session.pages[-1]
    assert len(turn.prompt) + 120 <= 256 and len(session.pages) == 3


def test_a_session_keeps_a_limited_page(monkeypatch):
    monkeypatch.setattr(web, "MAX_PAGE_CHARACTERS", 10)
    session = Session()
    for page in ("aaaa", "bbbb", "cccc", "d" * 20):
        session.remember([], page)
        kept = session.pages[:]
        assert kept[-1] == page and (sum(map(len, kept)) <= 10 or len(kept) == 1)
    assert kept == ["d" * 20]


# ── Mistakes ──


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ((-1.0, 0.9, 9, 0, ""), "--temperature must be at least 0"),
        ((float("nan"), 0.9, 9, 0, ""), "--temperature must be at least 0"),
        ((1.0, 0, 9, 0, ""), "--top-p must be above 0"),
        ((1.0, 0.9, 0, 0, ""), "--max-new-tokens must be at least 1"),
        ((1.0, 0.9, float("inf"), 0, ""), "drafts must be numbers"),
        ((1.0, 0.9, 9, 3, ""), "this model has 2 MTP modules"),
        ((None, 0.9, 9, 0, ""), "temperature, top-p, new tokens and drafts must be numbers"),
        ((1.0, 0.9, 9, 0, "again " * 300), "the model reads at most 255"),
    ],
)
def test_a_mistake_is_a_sentence_and_the_talk_goes_on(generator, settings, sentence):
    session = Session()
    session.ask("we talk")
    *_, html = web.stream_reply(generator, session, *settings)
    assert sentence in html and session == Session(num_questions=1)
    assert answered(generator, "we talk", session).tokens


def test_without_gradio_a_sentence_names_the_command(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main.main(["chat", str(run), "--web"]) == 2
    assert capsys.readouterr().err == "error: --web needs gradio: pip install 'dsv3-ref[web]'\n"


def test_where_it_listens(capsys):
    with web.bind_socket("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
        assert free.getsockname()[0] == "127.0.0.1" and port
        with pytest.raises(UserError, match=f"--port {port} cannot be used: Address already in"):
            web.bind_socket("127.0.0.1", port)
    for port in (-1, 65536):
        with pytest.raises(UserError, match=f"--port must be from 0 to 65535, not {port}"):
            web.bind_socket("127.0.0.1", port)
    with pytest.raises(UserError, match="--host 203.0.113.9 --port 0 cannot be used"):
        web.bind_socket("203.0.113.9", 0)


@pytest.mark.parametrize("more, address", [([], "127.0.0.1"), (["--host", "0.0.0.0"], "0.0.0.0")])
def test_only_this_machine_reaches_the_page_by_default(run, more, address, capsys, monkeypatch):
    bound = []

    class Server:
        def run(self, sockets):
            bound.extend(s.getsockname() for s in sockets)
            sockets[0].close()

    monkeypatch.setattr(web, "make_web_server", lambda app: Server())
    assert main.main(["chat", str(run), "--web", "--port", "0", *more]) == 0
    out = capsys.readouterr()
    ((host, port),) = bound
    assert host == address and out.out == f"http://{host}:{port}\n"
    assert ("without authentication" in out.err) == bool(more)


def test_only_its_own_names_reach_the_page(run, monkeypatch):
    """A page of another name that is made to resolve to this machine gets nothing."""
    apps = []

    class Server:
        def run(self, sockets):
            sockets[0].close()

    monkeypatch.setattr(web, "make_web_server", lambda app: apps.append(app) or Server())
    argv = ["chat", str(run), "--web", "--port", "0", "--allowed-hosts", "chat.example"]
    assert main.main(argv) == 0

    async def status(host: str, method: str = "GET", **headers: str) -> int:
        transport = httpx.ASGITransport(apps[0])
        async with httpx.AsyncClient(transport=transport) as client:
            headers["host"] = host
            url = "http://127.0.0.1/config"
            return (await client.request(method, url, headers=headers)).status_code

    for host, want in (("127.0.0.1", 200), ("chat.example:80", 200), ("evil.example", 403)):
        assert asyncio.run(status(host)) == want
    for host, origin, want in (
        ("localhost:7860", "http://localhost:7860", 200),
        ("localhost.:7860", "http://localhost.:7860", 200),
        ("127.0.0.1:7860", "https://chat.example", 200),  # a proxy that changes Host
        ("localhost:7860", "http://localhost:3000", 403),
        ("localhost.:7860", "http://evil.example", 403),  # for gradio, not this machine
        ("chat.example", "http://evil.example", 403),
        ("localhost:7860", "null", 403),
        ("localhost:7860", "file://localhost:7860", 403),
    ):
        assert asyncio.run(status(host, origin=origin)) == want, origin
        more = {"access-control-request-method": "POST"}
        preflight = asyncio.run(status(host, "OPTIONS", origin=origin, **more))
        assert (preflight == 403) == (want == 403), origin


@pytest.fixture(scope="module")
def locked(run):
    """The application of a page that asks for the key “secret”."""
    apps = []

    class Server:
        def run(self, sockets):
            sockets[0].close()

    argv = ["chat", str(run), "--web", "--port", "0", "--host", "0.0.0.0", "--api-key", "secret"]
    told = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(told):
        patch.setattr(web, "make_web_server", lambda app: apps.append(app) or Server())
        assert main.main(argv) == 0
    assert "without authentication" not in told.getvalue()
    return apps[0]


@pytest.mark.parametrize(
    "credentials, want",
    [(None, 401), (("any", "secret"), 200), (("any", "other"), 401), ("Bearer secret", 401),
     ("Basic ?", 401), ("Basic c2VjcmV0", 401)],
    ids=["none", "right", "wrong", "bearer", "not base64", "no user"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/", "/config"])
def test_a_page_with_a_key_asks_for_it(locked, credentials, want, path):
    """A browser shows its own form, and sends what its user has entered with every request."""

    async def get() -> httpx.Response:
        transport = httpx.ASGITransport(locked)
        options = (
            {"headers": {"authorization": credentials}}
            if isinstance(credentials, str)
            else {"auth": credentials}
        )
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.get(path, **options)

    response = asyncio.run(get())
    assert response.status_code == want
    if want == 401:
        assert response.headers["www-authenticate"] == 'Basic realm="dsv3"'


# ── Over HTTP ──


def watch(event, args):
    if event == "socket.connect" and isinstance(args[1], tuple):
        CALLED.append(args[1][0])
    elif event == "socket.getaddrinfo":
        CALLED.append(args[0])


@pytest.fixture(scope="module")
def address(generator):
    """The page, served in a thread."""
    sys.addaudithook(watch)
    CALLED.clear()
    listener = web.bind_socket("127.0.0.1", 0)
    server = web.make_web_server(web.build_web_app(generator))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()


def test_connections_to_the_page_are_limited(monkeypatch):
    """One that sends nothing, or half a head, is closed: before any key is asked for."""
    limits = http_server.ConnectionLimits(headers=0.3, idle=0.3)
    monkeypatch.setattr(http_server, "ConnectionLimits", lambda **_: limits)

    async def app(scope, receive, send):
        """Answer nothing."""

    listener = web.bind_socket("127.0.0.1", 0)
    server = web.make_web_server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        for sent in (b"", b"GET / HT"):
            with socket.create_connection(listener.getsockname(), timeout=10) as connection:
                connection.sendall(sent)
                assert connection.recv(10) == b""
    finally:
        server.should_exit = True
        thread.join()


def test_responses_without_an_end_give_way_to_others(monkeypatch):
    """512 heartbeats of one client once kept everyone else from the page."""
    monkeypatch.setattr(
        http_server, "ConnectionLimits", partial(http_server.ConnectionLimits, max_connections=3)
    )

    async def app(scope, receive, send):
        """Answer at once, a heartbeat or the events of a queue never to the end."""
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        if scope["path"] not in ("/", "/gradio_api/heartbeat"):
            await asyncio.sleep(60)
        await send({"type": "http.response.body", "body": b""})

    listener = web.bind_socket("127.0.0.1", 0)
    server = web.make_web_server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    streams = []
    try:
        for path in ("heartbeat/a1", "queue/data", "heartbeat/b", "other", "other", "other"):
            streams.append(socket.create_connection(listener.getsockname(), timeout=10))
            head = f"GET /gradio_api/{path} HTTP/1.1\r\nHost: localhost\r\n\r\n"
            streams[-1].sendall(head.encode())
            assert streams[-1].recv(100).startswith(b"HTTP/1.1 200")
        for stream in streams[:3]:  # the oldest first
            with suppress(ConnectionResetError):
                while stream.recv(100):
                    pass
        with socket.create_connection(listener.getsockname(), timeout=10) as last:
            assert last.recv(100).startswith(b"HTTP/1.1 503")
    finally:
        for stream in streams:
            stream.close()
        server.should_exit = True
        thread.join()


def test_no_client_chooses_the_server_that_a_page_calls(address):
    head = {"X-Gradio-Server": "http://evil.example"}
    with urllib.request.urlopen(urllib.request.Request(address, headers=head)) as response:
        assert b"evil" not in response.read()


def test_the_page_forbids_to_fetch_from_elsewhere(address):
    with urllib.request.urlopen(address) as response:
        html, policy = response.read().decode(), response.headers["content-security-policy"]
    rules = directives(policy)
    assert rules["default-src"] == ["'none'"] and "http" not in policy
    assert "'unsafe-inline'" not in rules["script-src"]
    assert {digest(script) for script in Content(html).inline["script"]} <= set(rules["script-src"])
    config = json.loads(re.search(r"window.gradio_config = (\{.*?\});</script>", html)[1])
    assert not config["analytics_enabled"] and not config.get("run_history")
    assert not config.get("is_colab") and not config.get("space_id")


@pytest.mark.parametrize(
    "method, path",
    [("POST", "upload"), ("POST", "process_recording"), ("POST", "component_server"),
     ("POST", "vibe-edit"), ("GET", "file=/etc/passwd"), ("GET", "proxy=https://a.hf.space"),
     ("GET", "deep_link?session_hash=a"), ("GET", "stream/a/b/0/playlist-file"),
     ("GET", "queue/data/../../file=a"), ("GET", "token")],
)  # fmt: skip
def test_only_what_the_page_needs_is_served(address, method, path):
    """Some of gradio's other routes write files for anyone who asks."""
    files = {"files": ("a.txt", b"x")} if method == "POST" else None
    response = httpx.request(method, f"{address}/gradio_api/{path}", files=files)
    assert response.status_code == 404 and "there is no" in response.json()["error"]["message"]


def test_a_long_question_is_refused_before_it_is_read(address):
    """150 MB once took 20 GB of memory, and the page answered nobody else for two minutes."""
    tab = Tab(address)
    with pytest.raises(urllib.error.HTTPError) as error:
        tab.ask("x" * (1 << 20))
    assert error.value.code == 413
    last(tab.ask("we talk")[1])


@pytest.mark.parametrize(
    "place, text",
    [("http://a.example/endless", ""), ("/etc/hostname", ""), ("/dev/zero", '"data": [], ')],
)
@pytest.mark.parametrize("name", ["submit_question", "reply"])
def test_no_file_takes_the_place_of_a_text(address, name, place, text):
    """gradio copied any file, read /dev/zero for ever, and fetched any address to its disk."""
    file = {"path": place, "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [None, *[file] * 5], "fn_index": 1, "session_hash": "a"})
    for path in (f"run/{name}", "queue/join"):
        response = httpx.post(
            f"{address}/gradio_api/{path}", content=body[0] + text + body[1:], timeout=5,
            headers={"Content-Type": "application/json"},
        )  # fmt: skip
        assert response.status_code == 400, response.text


def test_what_a_page_may_send():
    web.check_page_body(b"")
    web.check_page_body(rb'{"data": [null, "half a character: \ud83d", 1.5, true], "fn_index": 0}')
    for body in (
        b'{"data": [[{}]]}', b'{"data": {}}', b'{"event_data": {"a": 1}}', b"[]", b"{", b"\xff",
        b'{"data": [{}], "data": []}', '{"data": []}'.encode("utf-16"), b"[" * 100_000,
    ):  # fmt: skip
        with pytest.raises(UserError):
            web.check_page_body(body)


def test_waiting_answers_are_limited(address, monkeypatch):
    def endless(generator, turn):
        while True:
            time.sleep(0.05)
            yield turn

    monkeypatch.setattr(web, "generate_turn", endless)
    tabs = [Tab(address) for _ in range(web.MAX_WAITING + 2)]
    streams = []
    with pytest.raises(urllib.error.HTTPError) as error:
        for tab in tabs:
            streams.append(tab.ask("we talk")[1])
    assert error.value.code == 503 and len(streams) >= web.MAX_WAITING
    for stream in streams:
        stream.close()


class Tab:
    """A browser tab without a browser; gradio's own client would call Hugging Face."""

    def __init__(self, address: str):
        self.api, self.hash = f"{address}/gradio_api", f"tab{id(self)}"
        with urllib.request.urlopen(f"{address}/config") as response:
            dependencies = json.load(response)["dependencies"]
        self.number = {d["api_name"]: d["id"] for d in dependencies}

    def post(self, path: str, name: str, *data) -> dict:
        """Call a function of the page; its first argument is the session, kept by the server."""
        body = {"data": [None, *data], "fn_index": self.number[name], "session_hash": self.hash}
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.api}{path}", json.dumps(body).encode(), head)
        with urllib.request.urlopen(request) as response:
            return json.load(response)

    def ask(self, question: str):
        """Ask a question; return what the page shows at once and the stream of its updates."""
        shown = self.post("/run/ask", "submit_question", question)["data"]
        self.post("/queue/join", "reply", *SETTINGS)
        return shown, urllib.request.urlopen(f"{self.api}/queue/data?session_hash={self.hash}")


def test_two_tabs_do_not_mix_and_take_turns(address, generator, monkeypatch):
    tabs, words = [Tab(address), Tab(address)], ["we talk", "over and over"]
    expected = [web.render_turn(answered(generator, question)) for question in words]
    at_once, most = [], []
    real = web.generate_turn

    def write(*args):
        at_once.append(1)
        most.append(len(at_once))
        for turn in real(*args):
            time.sleep(0.02)
            yield turn
        at_once.pop()

    monkeypatch.setattr(web, "generate_turn", write)
    for again in range(2):
        streams = []
        for tab, question in zip(tabs, words):
            (box, past, now), stream = tab.ask(question)
            assert box == "" and past.count('class="question"') == again
            assert f">{question}</div>" in now and "waiting for the model" in now
            streams.append(stream)
        pages = [last(stream) for stream in streams]
        assert again or pages == expected
        for html, question in zip(pages, words):
            assert f">{question}</div>" in html and f'id="t{again}-0"' in html
    assert most == [1] * 4


def last(stream) -> str:
    """Return the page at the end of a stream of events."""
    with stream:
        events = [json.loads(x[6:]) for x in stream if x.startswith(b"data: ")]
    assert any(e["msg"] == "process_generating" for e in events)
    (done,) = (e for e in events if e["msg"] == "process_completed")
    assert done["success"]
    return done["output"]["data"][0]


def test_a_tab_that_goes_away_stops_its_answer(address, monkeypatch):
    wrote, ended = threading.Event(), threading.Event()

    def endless(generator, turn):
        try:
            while True:
                turn.tokens, turn.accepted = [5], [False]
                turn.pieces, turn.text = ["x"], "x"
                time.sleep(0.05)
                wrote.set()
                yield turn
        finally:
            ended.set()

    monkeypatch.setattr(web, "generate_turn", endless)
    _, stream = Tab(address).ask("we talk")
    assert wrote.wait(10) and not ended.is_set()
    stream.close()
    assert ended.wait(10)


def test_this_process_connects_to_no_other_host(address):
    last(Tab(address).ask("we talk")[1])
    assert CALLED and set(CALLED) <= {"127.0.0.1", "localhost"}


# ── In a browser ──

browser, page = test_browser.browser, test_browser.page
WHOLE = "document.querySelectorAll('.answer .token[tabindex]').length"
GROWING = "n => document.querySelectorAll('.answer .token:not([tabindex])').length > n"


@pytest.mark.browser
@pytest.mark.skipif(not test_browser.CHROMIUM, reason="no Chromium on this machine")
def test_a_question_is_answered_and_its_tokens_explained(address, page, tmp_path, monkeypatch):
    asked, real = [], web.generate_turn

    def slow(*args):
        for turn in real(*args):
            time.sleep(0.15)
            yield turn

    monkeypatch.setattr(web, "generate_turn", slow)
    page.context.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.get_by_label("question").fill(ATTACK)
    page.keyboard.press("Enter")
    page.wait_for_function(GROWING, arg=0)
    page.wait_for_function(GROWING, arg=2)
    page.wait_for_function(f"{WHOLE} == 12")
    assert page.locator(".question").inner_text() == ATTACK
    assert page.evaluate("window.hacked") is None

    token = page.locator(".answer .token").nth(4)
    token.hover()
    card = token.locator(".card")
    assert card.is_visible() and "layer 2" in card.inner_text()
    page.keyboard.press("Escape")
    assert not card.is_visible()
    page.mouse.move(0, 0)
    page.locator(".answer .token").first.focus()
    page.keyboard.press("ArrowRight")
    second = page.locator(".answer .token .card").nth(1)
    assert second.is_visible() and "layer 1" in second.inner_text()
    page.screenshot(path=tmp_path / "web.png")
    stop_and_clear(page)
    assert {urlsplit(url).hostname for url in asked if urlsplit(url).netloc} == {"127.0.0.1"}


def stop_and_clear(page):
    """Stop an answer, which stays; clear a half-finished one; then ask again."""
    box = page.get_by_label("question")
    box.fill("stop this")
    page.keyboard.press("Enter")
    page.wait_for_function(GROWING, arg=1)
    page.get_by_role("button", name="Stop").click()
    page.wait_for_function("document.querySelector('#talk').innerText.includes('; stopped')")
    assert page.locator(".answer").count() == 2
    box.fill("clear this")
    page.keyboard.press("Enter")
    page.wait_for_function(GROWING, arg=1)
    page.get_by_role("button", name="Clear").click()
    box.fill("answer this")
    page.keyboard.press("Enter")
    page.wait_for_function(f"{WHOLE} == 12")
    assert page.locator(".question").all_inner_texts() == ["answer this"]
