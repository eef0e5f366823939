"""`dsv3 chat --web`: a web page to chat with a model, which shows the experts of every token."""

import base64
import hashlib
import inspect
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from html import escape
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsv3_ref.config import UserError
from dsv3_ref.data.files import plural
from dsv3_ref.decode import SamplingParams
from dsv3_ref.model import Transformer, moe_layers
from dsv3_ref.serving.config import ChatConfig, api_keys
from dsv3_ref.serving.network import (
    ApiKeys,
    bind_socket,
    guard_app,
    host_rule,
    is_loopback,
    limit_requests,
    origin_rule,
)
from dsv3_ref.serving.detokenizer import StreamDetokenizer
from dsv3_ref.serving.json_body import UniqueFieldsDecoder
from dsv3_ref.serving.text_generator import TextGenerator, answered, fit_history, question

if TYPE_CHECKING:  # optional dependencies
    import gradio
    import uvicorn
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# What a browser asks for. gradio also serves files, uploads, recordings, links and proxies.
PAGE_PATHS = re.compile(
    r"/|/(?:assets|static)/.*|/(?:config|theme\.css|favicon\.ico|manifest\.json)"
    r"|/gradio_api/(?:info|cancel|reset|heartbeat/\w+|run/\w+|queue/join|queue/data)"
)
ENDLESS_PATHS = re.compile(r"/gradio_api/(?:heartbeat/\w+|queue/data)")
MAX_PAGE_BODY_BYTES = 1 << 20
MAX_WAITING = 64  # answers
MAX_SESSIONS = 256  # in memory; beyond that, the one that has been used longest ago is forgotten
MAX_PAGE_CHARACTERS = 1 << 22  # of the past turns that a session keeps showing
FRAME_SECONDS = 0.05  # minimum time between two updates of a growing answer
# What a browser may do. gradio evaluates code, styles elements one by one, and needs workers.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-eval' {scripts}; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "media-src 'self' data: blob:; connect-src 'self'; worker-src 'self' blob:; "
    "manifest-src 'self'; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'none'"
)
INLINE_SCRIPT = re.compile(rb"<script(?![^>]*\ssrc=)[^>]*>(.*?)</script>", re.DOTALL)
ExpertWeights = list[tuple[int, float]]  # (expert, weight) of a token in one layer


# ── State of a browser tab ──


@dataclass
class Turn:
    """A question and its answer, which grows while it is generated."""

    question: str
    number: int
    num_speculative_tokens: int = 0
    prompt: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)  # the text that each token completes
    accepted: list[bool] = field(default_factory=list)  # whether each token is an accepted draft
    names: list[str] = field(default_factory=list)  # each token decoded alone; after the last one
    # experts per layer of each token; after the last one
    routes: list[dict[str, ExpertWeights]] = field(default_factory=list)
    text: str = ""
    num_draft_steps: int = 0  # decoding steps that verified drafts
    num_dropped_turns: int = 0  # oldest turns removed to fit the context
    stopped: bool = False


@dataclass
class Session:
    """The conversation in one browser tab, as messages and as HTML, and its unfinished turn."""

    turns: list[list[dict]] = field(default_factory=list)
    pages: list[str] = field(default_factory=list)
    turn: Turn | None = None
    num_questions: int = 0

    def ask(self, question: str) -> Turn | None:
        """Begin a turn and return it; return None if the question is empty or a turn is active."""
        if self.turn or not question.strip():
            return None
        self.turn = Turn(replace_surrogates(question.strip()), self.num_questions)
        self.num_questions += 1
        return self.turn

    def remember(self, turns: list[list[dict]], page: str) -> None:
        """Keep a conversation and the page of its last turn; drop the oldest of too long pages."""
        self.turns = turns
        self.pages.append(page)
        while len(self.pages) > 1 and sum(map(len, self.pages)) > MAX_PAGE_CHARACTERS:
            del self.pages[0]

    def stop(self) -> None:
        """End the active answer with the text generated so far."""
        if self.turn:
            self.turn.stopped = True

    def clear(self) -> None:
        """Forget the conversation and abandon the active answer."""
        self.stop()
        self.turns = []
        self.pages = []
        self.turn = None


def replace_surrogates(text: str) -> str:
    """Replace lone surrogates, which a browser can send but UTF-8 cannot encode, by “?”."""
    return text.encode("utf-8", "replace").decode()


# ── Generation ──


class RecordingSamplingParams(SamplingParams):
    """`SamplingParams` that record how many drafts the last step accepted."""

    num_accepted = 0

    def verify(
        self, logit_bsw: Tensor, distributions: Sequence, draft_bk: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Verify drafts as `SamplingParams.verify` does, and record how many are accepted."""
        n_b, token_b = super().verify(logit_bsw, distributions, draft_bk)
        self.num_accepted = int(n_b[0])
        return n_b, token_b


def answer_turn(
    generator: TextGenerator[ChatConfig], session: Session, *settings: Any
) -> Iterator[Turn]:
    """Yield the session's active turn as its answer grows, at last with the experts of each token.

    settings: as in `apply_settings`. Ends early if the session is cleared.
    """
    turn = session.turn
    if turn is None:
        return
    try:
        if turn.stopped:  # before its turn to be answered
            yield turn
            return
        args = apply_settings(generator.args, *settings)
        generator = generator.with_options(replace(args, seed=args.seed + turn.number))
        turns = [*session.turns, question(turn.question)]
        turn.prompt = fit_history(generator, turns)
        turn.num_speculative_tokens = args.num_speculative_tokens
        turn.num_dropped_turns = len(session.turns) + 1 - len(turns)
        for grown in throttle(generate_turn(generator, turn)):
            if session.turn is not turn:
                return
            yield grown
        annotate_turn(generator, turn)
        if session.turn is turn:
            session.remember([*turns[:-1], answered(turns[-1], turn.text)], render_turn(turn))
            yield turn
    finally:  # also when the browser has disconnected
        if session.turn is turn:
            session.turn = None


def generate_turn(generator: TextGenerator[ChatConfig], turn: Turn) -> Iterator[Turn]:
    """Generate an answer into its turn and yield the turn after each step."""
    sampling_params = RecordingSamplingParams(*generator.sampling_params)
    generator.sampling_params = sampling_params
    visible_text = StreamDetokenizer(generator.tokenizer, generator.args.stop)
    full_text = StreamDetokenizer(generator.tokenizer)

    def live() -> list[bool]:
        return [not (visible_text.ended or turn.stopped)]

    for (new_tokens,) in generator.iter_steps([turn.prompt], live):
        turn.num_draft_steps += bool(turn.tokens and turn.num_speculative_tokens)
        turn.accepted += [i < sampling_params.num_accepted for i in range(len(new_tokens))]
        turn.pieces += [full_text.push([token]) for token in new_tokens]
        turn.tokens += new_tokens
        turn.text += visible_text.push(generator.without_stop(new_tokens))
        yield turn
    turn.text += visible_text.flush()
    turn.pieces[-1] += full_text.flush()


def throttle(turns: Iterable[Turn]) -> Iterator[Turn]:
    """Yield only those turns that come at least `FRAME_SECONDS` after the last one yielded."""
    last = -FRAME_SECONDS
    for turn in turns:
        if time.monotonic() - last >= FRAME_SECONDS:
            yield turn
            last = time.monotonic()


def annotate_turn(generator: TextGenerator[ChatConfig], turn: Turn) -> None:
    """Add the name and the experts of every token to a finished turn."""
    turn.names = [generator.tokenizer.decode([i], skip_special_tokens=False) for i in turn.tokens]
    turn.routes = expert_routes(generator.model, turn.prompt, turn.tokens)


@torch.inference_mode()
def expert_routes(
    model: Transformer, prompt: list[int], tokens: list[int]
) -> list[dict[str, ExpertWeights]]:
    """Return, for each token after the prompt, its experts and their weights by layer.

    Runs one forward pass over prompt and tokens.
    """
    device = model.embed.weight.device
    routes = model.hidden_states(torch.tensor([prompt + tokens], device=device))[1]
    layers = [name.split(".")[1] for name in moe_layers(model)]  # as in a checkpoint; MTP last
    experts: list[dict[str, ExpertWeights]] = [{} for _ in tokens]
    for layer, route in zip(layers, routes):
        expert_sk = route.topk_ids_bsk[0, len(prompt) :].tolist()
        weight_sk = route.topk_weights_bsk[0, len(prompt) :].tolist()
        for token_experts, expert_k, weight_k in zip(experts, expert_sk, weight_sk):
            token_experts[layer] = list(zip(expert_k, weight_k))
    return experts


# ── HTML ──


def render_turn(turn: Turn, status: str = "") -> str:
    """Return a turn as HTML: the question, the tokens of the answer, and a status line."""
    spans = "".join(
        render_token(turn, i, text, is_first=n == 0)
        for n, (i, text) in enumerate(visible_tokens(turn))
    )
    return (
        f'<div class="question">{escape(turn.question)}</div><div class="answer">{spans}</div>'
        f'<div class="status" role="status">{escape(status or status_line(turn))}</div>'
    )


def visible_tokens(turn: Turn) -> Iterator[tuple[int, str]]:
    """Yield (index, text) of the tokens up to the end of the answer, without a stop string."""
    left = len(turn.text)
    for i, piece in enumerate(turn.pieces):
        if left or not piece:
            yield i, piece[:left]
        left = max(0, left - len(piece))


def render_token(turn: Turn, i: int, text: str, is_first: bool) -> str:
    """Return a token as HTML, with its experts in a tooltip once they are known.

    Tab moves the focus to the first token of an answer, the arrow keys to the others.
    """
    kind = "token accepted" if turn.accepted[i] else "token"
    card_id = f"t{turn.number}-{i}"
    if not turn.routes:
        return f'<span class="{kind}">{render_text(text, turn.accepted[i])}</span>'
    return (
        f'<span class="{kind}" tabindex="{0 if is_first else -1}" aria-describedby="{card_id}">'
        f"{render_text(text, turn.accepted[i])}"
        f'<span class="card" role="tooltip" id="{card_id}">{render_card(turn, i)}</span></span>'
    )


def render_text(text: str, accepted: bool) -> str:
    """Return a token's text as HTML, with symbols for line breaks, empty text and drafts.

    The symbols are CSS content: they are not part of text that a user copies.
    """
    symbol = '<i class="{}"></i>'.format
    words = text.rstrip("\n")
    line = escape(words).replace("\n", symbol("break") + "\n") or symbol("silent") * (not text)
    breaks = (symbol("break") + "\n") * (len(text) - len(words))
    return line + symbol("yes") * accepted + breaks


def render_card(turn: Turn, i: int) -> str:
    """Return the tooltip of a token: its text, its id and its experts in every layer."""
    text = escape(json.dumps(turn.names[i], ensure_ascii=False))
    part = ", part of a character" if "\ufffd" in text else ""
    drafted = ", accepted draft" if turn.accepted[i] else ""
    rows = "".join(render_layer(layer, experts) for layer, experts in turn.routes[i].items())
    head = f"<b>{text}</b>{part}, token {turn.tokens[i]}{drafted}"
    return f"<div>{head}</div>{rows or '<div>no layer has experts</div>'}"


def render_layer(layer: str, experts: ExpertWeights) -> str:
    """Return the experts of one layer as HTML, their weights as numbers and as bars."""
    total = sum(weight for _, weight in experts) or 1.0
    cells = [
        f'<span class="pick" style="--share:{weight / total:.0%}">expert {e} {weight:.2f}</span> '
        for e, weight in experts
    ]
    return f'<div class="layer"><span>layer {layer}</span> {"".join(cells)}</div>'


def status_line(turn: Turn) -> str:
    """Return a summary of an answer: its length, accepted drafts and dropped turns."""
    if not turn.tokens:
        return "stopped" if turn.stopped else "waiting for the model …"
    parts = [plural(len(turn.tokens), "token")]
    if turn.num_speculative_tokens:
        num_drafts = turn.num_draft_steps * turn.num_speculative_tokens
        parts.append(
            f"{sum(turn.accepted)} of {plural(num_drafts, 'draft')} accepted "
            f"in {plural(turn.num_draft_steps, 'step')}"
        )
    if turn.stopped:
        parts.append("stopped")
    if turn.num_dropped_turns:
        parts.append(f"{plural(turn.num_dropped_turns, 'old turn')} dropped to fit the context")
    return "; ".join(parts)


# ── Event handlers ──


def submit_question(session: Session, question: str) -> tuple[str, str, str] | list[dict]:
    """Show a question at once, even while the model answers another tab's.

    Returns the new contents of the input, of the past turns and of the active turn.
    """
    if turn := session.ask(question):
        return "", "".join(session.pages), render_turn(turn)
    return [import_gradio().skip()] * 3


def stream_reply(
    generator: TextGenerator[ChatConfig], session: Session, *settings: Any
) -> Iterator[str | dict]:
    """Yield the active turn as HTML while its answer grows; show a `UserError` in its place."""
    turn = session.turn
    if turn is None:
        yield import_gradio().skip()
        return
    try:
        for turn in answer_turn(generator, session, *settings):
            yield render_turn(turn)
    except UserError as e:
        yield render_turn(turn, f"error: {e}")


def clear_session(session: Session) -> tuple[str, str]:
    """Clear a session; return the empty contents of its past and active turns."""
    session.clear()
    return "", ""


def apply_settings(
    args: ChatConfig, temperature: Any, top_p: Any, max_new_tokens: Any, num_drafts: Any,
    system: Any,
) -> ChatConfig:  # fmt: skip
    """Return options in which the page's settings replace those of the command line.

    Raises a `UserError` if one is not a number: a browser can send anything.
    """
    try:
        return replace(
            args,
            temperature=float(temperature),
            top_p=float(top_p),
            max_new_tokens=int(max_new_tokens),
            num_speculative_tokens=int(num_drafts),
            system=replace_surrogates(str(system or "")),
        )
    except (TypeError, ValueError, OverflowError):
        raise UserError("temperature, top-p, new tokens and drafts must be numbers") from None


# ── The page ──


def import_gradio() -> ModuleType:
    """Import gradio, an optional dependency; raise a `UserError` if it is not installed."""
    try:
        import gradio
    except ModuleNotFoundError:
        raise UserError("--web needs gradio: pip install 'dsv3-ref[web]'") from None
    return gradio


def build_page(generator: TextGenerator[ChatConfig]) -> tuple["gradio.Blocks", dict[str, Any]]:
    """Return the page (conversation, input, settings) and the options for its appearance."""
    gr = import_gradio()
    appearance = {
        "head": f"<style>{CHAT_CSS}</style><script>{CHAT_JS}</script>",
        "theme": page_theme(),
    }
    title = f"dsv3 chat · {'/'.join(generator.args.model.parts[-2:])}"
    options = supported_options(gr.Blocks, appearance)
    with gr.Blocks(analytics_enabled=False, title=title, **options) as blocks:
        session = gr.State(Session())
        with gr.Row():
            with gr.Column(scale=3):
                gr.HTML(page_heading(title, generator))
                with gr.Column(elem_id="talk"), gr.Column():
                    past, now = gr.HTML(), gr.HTML()
                box = gr.Textbox(label="question", placeholder="Enter sends", autofocus=True)
                with gr.Row():
                    send = gr.Button("Send", variant="primary")
                    stop, forget = gr.Button("Stop"), gr.Button("Clear")
            with gr.Column(scale=1, min_width=260):
                settings = page_controls(generator)
        at_once = {"queue": False, "show_progress": "hidden"}
        gr.on(
            [box.submit, send.click], submit_question, [session, box], [box, past, now], **at_once
        ).then(
            partial(stream_reply, generator), [session, *settings], now, show_progress="hidden",
            concurrency_limit=1, api_name="reply", trigger_mode="multiple",
        )  # fmt: skip
        stop.click(Session.stop, session, **at_once)
        forget.click(clear_session, session, [past, now], **at_once)
    return blocks, appearance


def page_theme() -> "gradio.themes.Base":
    """Return a theme with system fonts, so that the page fetches none."""
    font, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    return import_gradio().themes.Default(font=font, font_mono=mono)


def page_heading(title: str, generator: TextGenerator[ChatConfig]) -> str:
    """Return the heading as HTML: the size of the model and how to inspect a token."""
    config = generator.model.config
    num_moe_layers = config.n_layers - config.n_dense_layers
    return (
        f"<h1>{escape(title)}</h1>"
        f"<p>{num_moe_layers} layers of {config.n_routed_experts} experts, "
        f"{config.n_activated_experts} of which process each token; "
        f"{plural(len(generator.model.mtp), 'MTP module')}. Hover over a token of an answer, "
        "or move to it with Tab and the arrow keys, to see its experts and their weights. "
        f'<span class="token accepted">{render_text("Underlined", True)}</span> tokens are '
        "accepted drafts.</p>"
    )


def page_controls(generator: TextGenerator[ChatConfig]) -> list["gradio.components.Component"]:
    """Return the controls for the settings, with the command line's options as initial values."""
    gr, args = import_gradio(), generator.args
    temperature, top_p = generator.sampling_params.temperature, generator.sampling_params.top_p
    num_modules = len(generator.model.mtp)
    max_tokens = generator.model.config.max_seq_len - 1
    new_tokens = min(args.max_new_tokens, max_tokens)
    return [
        gr.Slider(0, max(2.0, temperature), temperature, step=0.01, label="temperature"),
        gr.Slider(min(0.01, top_p), 1, top_p, step=0.01, label="top-p"),
        gr.Slider(1, max_tokens, new_tokens, step=1, label="maximum number of new tokens"),
        gr.Slider(
            0, max(num_modules, 1), args.num_speculative_tokens, step=1,
            label="MTP drafts per step", interactive=num_modules > 0,
        ),
        gr.Textbox(args.system, label="system text", lines=3),
    ]  # fmt: skip


# ── The web server ──


def serve_web_chat(args: ChatConfig) -> None:
    """Serve the page until Ctrl-C."""
    import_gradio()
    keys = ApiKeys(api_keys(args), is_password=True)
    listener = bind_socket(args.host, args.port)
    app = build_web_app(TextGenerator(args))
    rules = host_rule(listener, args.allowed_hosts), origin_rule(args.allowed_hosts)
    app = guard_app(app, rules[0], keys, (), rules[1])
    if not (is_loopback(args.host) or keys.digests):
        sentence = "warning: this page is reachable from the network without authentication"
        print(sentence, file=sys.stderr)
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"http://{host}:{listener.getsockname()[1]}", flush=True)
    make_web_server(app).run(sockets=[listener])


def build_web_app(generator: TextGenerator[ChatConfig]) -> "ASGIApp":
    """Return the page as an ASGI app without share link, telemetry, history or uploads."""
    gr, (blocks, appearance) = import_gradio(), build_page(generator)
    from fastapi import FastAPI

    options = appearance | {
        "run_history": False, "enable_monitoring": False, "mcp_server": False, "pwa": False,
        "footer_links": [], "max_file_size": 1,
    }  # fmt: skip
    options = supported_options(gr.mount_gradio_app, options)
    blocks.queue(max_size=MAX_WAITING)
    blocks.state_session_capacity = MAX_SESSIONS
    app = FastAPI(openapi_url=None)
    app = gr.mount_gradio_app(app, blocks, path="/", ssr_mode=False, **options)
    with_policy = with_security_policy(app)
    return limit_requests(with_policy, PAGE_PATHS, MAX_PAGE_BODY_BYTES, check_page_body)


def check_page_body(body: bytes) -> None:
    """Raise a `UserError` for a body with anything but texts, numbers and lists of them.

    In the place of a text, gradio takes an object that names a file: it copies that file, any file
    of this machine, or fetches it from any address, before a function of the page is called.
    """
    try:
        fields = UniqueFieldsDecoder(is_large=False).decode(body.decode() or "{}")
    except (ValueError, RecursionError):
        raise UserError("the body must be JSON in UTF-8") from None
    for value in fields.values() if isinstance(fields, dict) else [[fields]]:
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, (dict, list)) for item in items):
            raise UserError("the page sends texts and numbers only: leave out objects")


def make_web_server(app: "ASGIApp") -> "uvicorn.Server":
    """Return a uvicorn server (a dependency of gradio) for an app."""
    import uvicorn

    from dsv3_ref.serving.http_server import ConnectionLimits, limited_options

    options = limited_options(ConnectionLimits(endless=ENDLESS_PATHS))
    return uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=1, **options))


def with_security_policy(app: "ASGIApp") -> "ASGIApp":
    """Add a content security policy to every response, which allows a page's own scripts only."""

    async def wrapped(scope: "Scope", receive: "Receive", send: "Send") -> None:
        pages: list[Message] = []  # the start of a page, until its scripts are known
        body = bytearray()

        async def send_with_policy(message: "Message") -> None:
            if message["type"] == "http.response.start" and is_page(message["headers"]):
                pages.append(message)
            elif message["type"] == "http.response.start":
                await send(add_policy(message, b""))
            elif pages:
                body.extend(message.get("body", b""))
                if not message.get("more_body"):
                    await send(add_policy(pages.pop(), bytes(body)))
                    await send({"type": "http.response.body", "body": bytes(body)})
            else:
                await send(message)

        if scope["type"] == "http":
            headers = [
                (k, v) for k, v in scope["headers"] if k not in hidden_headers(scope["path"])
            ]
            scope = {**scope, "headers": headers}
        await app(scope, receive, send_with_policy if scope["type"] == "http" else send)

    return wrapped


def hidden_headers(path: str) -> tuple[bytes, ...]:
    """Return the headers that gradio must not see.

    With X-Gradio-Server a client chooses the server that a page calls; a cache might keep that page
    for others. The page itself is not compressed: its scripts are read here.
    """
    return (b"x-gradio-server", *([b"accept-encoding"] if path == "/" else []))


def is_page(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Return whether a response is HTML."""
    return dict(headers).get(b"content-type", b"").startswith(b"text/html")


def add_policy(message: "Message", html: bytes) -> "Message":
    """Return the start of a response with a policy that allows the inline scripts of `html`."""
    inline = [CHAT_JS.encode(), *INLINE_SCRIPT.findall(html)]  # gradio adds the first in its way
    scripts = " ".join(dict.fromkeys(map(script_source, inline)))
    policy = CONTENT_SECURITY_POLICY.format(scripts=scripts).replace(" ;", ";")
    header = (b"content-security-policy", policy.encode())
    return {**message, "headers": [*message["headers"], header]}


def script_source(script: bytes) -> str:
    """Return the source expression of an inline script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'"


def supported_options(function: Callable, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that a function of the installed gradio accepts.

    Some options moved to another function between versions 5 and 6.
    """
    names = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in names}


# ── Styles and scripts ──

CHAT_CSS = """
#talk { min-height: 40vh; max-height: 64vh; overflow-y: auto; flex-direction: column-reverse;
  flex-wrap: nowrap; }
#talk > * { margin-bottom: auto; flex-shrink: 0; }
.question { margin: 1rem 0 .4rem auto; width: fit-content; max-width: 80%; padding: .5rem .8rem;
  border-radius: .6rem; background: var(--background-fill-secondary); white-space: pre-wrap;
  border: 1px solid var(--border-color-primary); overflow-wrap: anywhere; }
.answer { --mark: #0b57d0; --bar: #b9d0f5; white-space: pre-wrap; overflow-wrap: anywhere;
  line-height: 1.8; }
.dark .answer { --mark: #8ab4f8; --bar: #274b86; }
.status { color: var(--body-text-color); opacity: .8; font-size: .85rem; }
.token.accepted { text-decoration: underline 2px; text-underline-offset: 3px; }
.token .yes::before { content: "✓"; content: "✓" / "accepted draft"; vertical-align: super;
  font-size: .7em; }
.token .break::before { content: "↵"; opacity: .6; }
.token .silent::before { content: "▫"; opacity: .6; }
.token[tabindex] { cursor: help; border-radius: 2px; }
.token[tabindex]:hover, .token:focus { outline: 2px solid var(--mark); outline-offset: 1px; }
.card { display: none; position: fixed; left: 1rem; bottom: 1rem; z-index: 1000; width: max-content;
  max-width: calc(100vw - 2rem); max-height: 60vh; overflow: auto; padding: .5rem .7rem;
  border-radius: .4rem; border: 2px solid var(--mark); background: var(--background-fill-primary);
  color: var(--body-text-color); font-size: .85rem; line-height: 1.4; white-space: normal; }
.token:hover > .card, .token:focus > .card { display: block; }
.answer:has(.token:hover) .token:focus:not(:hover) > .card { display: none; }
.token:not(:focus) > .card { pointer-events: none; }
.token.quiet > .card { display: none !important; }
.card .layer { display: flex; flex-wrap: wrap; gap: 3px; margin-top: 3px; }
.card .layer > * { min-width: 8.6em; padding: 0 .4em; white-space: nowrap; }
.card .layer > :first-child { min-width: 5em; padding: 0; }
.card .pick { font-variant-numeric: tabular-nums; background: var(--background-fill-secondary)
  linear-gradient(var(--bar) 0 0) no-repeat left / var(--share) 100%; }
.token i { font-style: normal; }
"""
CHAT_JS = """
const near = token => {  // the card goes below its token, or above where there is no room
  const card = token?.querySelector(".card"), box = token?.getClientRects()[0];
  if (!card || !box) return;
  const left = Math.min(box.left, innerWidth - card.offsetWidth - 16);
  const below = box.bottom + 6, above = box.top - card.offsetHeight - 6;
  const top = below + card.offsetHeight < innerHeight ? below : above;
  Object.assign(card.style, {
    left: Math.max(8, left) + "px", top: Math.max(8, top) + "px", bottom: "auto"
  });
};
const at = event => event.target.closest?.(".token[tabindex]");
for (const kind of ["mouseover", "focusin"]) document.addEventListener(kind, e => near(at(e)));
for (const kind of ["mouseout", "focusout"])
  document.addEventListener(kind, e => at(e)?.classList.remove("quiet"));
document.addEventListener("scroll", () => near(document.querySelector(".token:focus")), true);
document.addEventListener("keydown", event => {
  if (event.key === "Escape")
    document.querySelectorAll(".token:hover, .token:focus").forEach(t => t.classList.add("quiet"));
  const token = at(event);
  if (!token) return;
  const all = [...token.closest(".answer").querySelectorAll(".token")], i = all.indexOf(token);
  const to = {ArrowLeft: i - 1, ArrowRight: i + 1, Home: 0, End: all.length - 1}[event.key];
  if (!all[to]) return;
  event.preventDefault();
  token.tabIndex = -1;
  all[to].tabIndex = 0;
  all[to].focus();
});
"""
