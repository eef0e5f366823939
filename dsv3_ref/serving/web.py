"""`dsv3 chat --web`: a page to talk to a model, which shows the experts behind every token."""

import inspect
import json
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from html import escape

import torch

from dsv3_ref.config import UserError
from dsv3_ref.decode import SamplingParams
from dsv3_ref.model import Transformer, moe_layers
from dsv3_ref.serving.config import ChatConfig
from dsv3_ref.serving.text_generator import StreamDetokenizer, TextGenerator, truncate_history

FRAME_SECONDS = 0.05  # seconds between two pictures of an answer that grows
# what a browser may fetch; gradio 5 asks for a script from a CDN, refused and not missed
CONTENT_SECURITY_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'"
)
ExpertWeights = list[tuple[int, float]]  # the experts a layer chose for a token, with their weights


# ── What a tab remembers ──


@dataclass
class Turn:
    """A question, and its answer as far as it is written."""

    question: str
    number: int
    num_speculative_tokens: int = 0
    prompt: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)  # the text that each token completes
    accepted: list[bool] = field(default_factory=list)  # whether an MTP module had guessed it
    names: list[str] = field(default_factory=list)  # each token by itself, once all are there
    routes: list[dict[str, ExpertWeights]] = field(
        default_factory=list
    )  # its experts in every layer
    text: str = ""
    rounds: int = 0  # that began with a draft
    num_dropped_turns: int = 0  # oldest turns that no longer fit
    stopped: bool = False


@dataclass
class Session:
    """One browser tab: its conversation as tokens and as pages, and what it is asking."""

    turns: list[list[int]] = field(default_factory=list)
    pages: list[str] = field(default_factory=list)
    turn: Turn | None = None
    asked: int = 0

    def ask(self, question: str) -> Turn | None:
        """A new turn; none for an empty question or while another is being answered."""
        if self.turn or not question.strip():
            return None
        self.turn = Turn(replace_surrogates(question.strip()), self.asked)
        self.asked += 1
        return self.turn

    def stop(self) -> None:
        """What is written so far is the answer."""
        if self.turn:
            self.turn.stopped = True

    def clear(self) -> None:
        """Forget everything; what is being written belongs to nobody."""
        self.stop()
        self.turns, self.pages, self.turn = [], [], None


def replace_surrogates(text: str) -> str:
    """Text without halves of characters, which a browser can send and UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode()


# ── An answer, token by token ──


class Watched(SamplingParams):
    """A `SamplingParams` that remembers how many drafts the last round accepted."""

    num_accepted = 0

    def verify(self, logit_bsw, q, guess_bk):
        n_b, token_b = super().verify(logit_bsw, q, guess_bk)
        self.num_accepted = int(n_b[0])
        return n_b, token_b


def answer_turn(generator: TextGenerator, session: Session, *settings) -> Iterator[Turn]:
    """Answer what the session asks: its turn as it grows, with routes when it is whole."""
    turn, ours = session.turn, lambda: session.turn is turn  # until somebody clears the session
    try:
        if turn.stopped:  # while it was waiting
            yield turn
            return
        args = apply_settings(generator.args, *settings)
        generator = generator.with_options(replace(args, seed=args.seed + turn.number))
        turns = [*session.turns, generator.encode_user_turn(turn.question)]
        turn.prompt, turn.num_speculative_tokens = (
            truncate_history(generator, turns),
            args.num_speculative_tokens,
        )
        turn.num_dropped_turns = len(session.turns) + 1 - len(turns)
        for grown in throttle(generate_turn(generator, turn)):
            if not ours():
                return
            yield grown
        annotate_turn(generator, turn)
        if ours():
            session.turns = [*turns[:-1], turns[-1] + generator.encode_assistant_turn(turn.text)]
            session.pages.append(render_turn(turn))
            yield turn
    finally:  # also when the browser has gone away
        if ours():
            session.turn = None


def generate_turn(generator: TextGenerator, turn: Turn) -> Iterator[Turn]:
    """Write an answer into its turn, round by round, until it ends or is stopped."""
    generator.sampling_params = Watched(*generator.sampling_params)
    text, whole = (
        StreamDetokenizer(generator.tokenizer, generator.args.stop),
        StreamDetokenizer(generator.tokenizer),
    )
    live = lambda: [not (text.ended or turn.stopped)]
    for (new,) in generator.iter_steps([turn.prompt], live):
        turn.rounds += bool(turn.tokens and turn.num_speculative_tokens)
        turn.accepted += [i < generator.sampling_params.num_accepted for i in range(len(new))]
        turn.pieces += [whole.push([token]) for token in new]
        turn.tokens += new
        turn.text += text.push(new)
        yield turn
    turn.text += text.flush()
    turn.pieces[-1] += whole.flush()


def throttle(turns: Iterable[Turn]) -> Iterator[Turn]:
    """Some of many pictures, `FRAME_SECONDS` apart."""
    last = -FRAME_SECONDS
    for turn in turns:
        if time.monotonic() - last >= FRAME_SECONDS:
            yield turn
            last = time.monotonic()


def annotate_turn(generator: TextGenerator, turn: Turn) -> None:
    """Add to a turn what can be said about its tokens."""
    turn.names = [generator.tokenizer.decode([i], skip_special_tokens=False) for i in turn.tokens]
    turn.routes = expert_routes(generator.model, turn.prompt, turn.tokens)


@torch.inference_mode()
def expert_routes(
    model: Transformer, prompt: list[int], tokens: list[int]
) -> list[dict[str, ExpertWeights]]:
    """The experts that read each token and their weights, by layer: one forward pass."""
    device = model.embed.weight.device
    routes = model.hidden_states(torch.tensor([prompt + tokens], device=device))[1]
    layers = [name.split(".")[1] for name in moe_layers(model)]  # as in a checkpoint; MTP last
    found = [{} for _ in tokens]
    for layer, r in zip(layers, routes):
        pairs = zip(found, r.topk_ids_bsk[0, len(prompt) :], r.topk_weights_bsk[0, len(prompt) :])
        for token, expert_k, weight_k in pairs:
            token[layer] = list(zip(expert_k.tolist(), weight_k.tolist()))
    return found


# ── Its page ──


def render_turn(turn: Turn, said: str = "") -> str:
    """A turn as HTML: the question, the answer in tokens, a line about both."""
    spans = "".join(
        render_token(turn, *x, first=n == 0) for n, x in enumerate(visible_tokens(turn))
    )
    return (
        f'<div class="question">{escape(turn.question)}</div><div class="answer">{spans}</div>'
        f'<div class="told" role="status">{escape(said or status_line(turn))}</div>'
    )


def visible_tokens(turn: Turn) -> Iterator[tuple[int, str]]:
    """Tokens with their texts, up to where the answer ends: a stop text is not shown."""
    left = len(turn.text)
    for i, piece in enumerate(turn.pieces):
        if left or not piece:
            yield i, piece[:left]
        left = max(0, left - len(piece))


def render_token(turn: Turn, i: int, text: str, first: bool) -> str:
    """A token; with its experts once they are known. Tab stops at the first, arrows go on."""
    kind, name = "token accepted" if turn.accepted[i] else "token", f"t{turn.number}-{i}"
    if not turn.routes:
        return f'<span class="{kind}">{render_text(text, turn.accepted[i])}</span>'
    return (
        f'<span class="{kind}" tabindex="{0 if first else -1}" aria-describedby="{name}">'
        f"{render_text(text, turn.accepted[i])}"
        f'<span class="card" role="tooltip" id="{name}">{render_card(turn, i)}</span></span>'
    )


def render_text(text: str, accepted: bool) -> str:
    """A token's text with signs, which are not copied, for what is not seen."""
    sign = '<i class="{}"></i>'.format
    words = text.rstrip("\n")
    line = escape(words).replace("\n", sign("break") + "\n") or sign("silent") * (not text)
    return line + sign("yes") * accepted + (sign("break") + "\n") * (len(text) - len(words))


def render_card(turn: Turn, i: int) -> str:
    """What there is to know about a token: text, id, and the experts of every layer."""
    text = escape(json.dumps(turn.names[i], ensure_ascii=False))
    part = ", part of a character" if "\ufffd" in text else ""
    drafted = ", accepted draft" if turn.accepted[i] else ""
    rows = "".join(render_layer(*pair) for pair in turn.routes[i].items())
    head = f"<b>{text}</b>{part}, token {turn.tokens[i]}{drafted}"
    return f"<div>{head}</div>{rows or '<div>no layer has experts</div>'}"


def render_layer(layer: str, picks: ExpertWeights) -> str:
    """A layer's experts and weights, as numbers and as bars."""
    total = sum(weight for _, weight in picks) or 1.0
    cells = [
        f'<span class="pick" style="--share:{weight / total:.0%}">expert {e} {weight:.2f}</span> '
        for e, weight in picks
    ]
    return f'<div class="layer"><span>layer {layer}</span> {"".join(cells)}</div>'


def status_line(turn: Turn) -> str:
    """A line about an answer: how long, how many drafts were right, what was forgotten."""
    if not turn.tokens:
        return "stopped" if turn.stopped else "waiting for the model …"
    n, drafts = len(turn.tokens), turn.rounds * turn.num_speculative_tokens
    parts = [f"{n} token{'s' * (n != 1)}"]
    if turn.num_speculative_tokens:
        parts.append(f"{sum(turn.accepted)} of {drafts} drafts accepted in {turn.rounds} rounds")
    if turn.stopped:
        parts.append("stopped")
    if turn.num_dropped_turns:
        parts.append(f"no room for the oldest turns, {turn.num_dropped_turns} forgotten")
    return "; ".join(parts)


# ── What its buttons do ──


def submit_question(session: Session, question: str):
    """Show a question at once, though the model may be busy with another tab's."""
    if turn := session.ask(question):
        return "", "".join(session.pages), render_turn(turn)
    return [import_gradio().skip()] * 3


def stream_reply(generator: TextGenerator, session: Session, *settings) -> Iterator[str]:
    """The answer as it grows; a mistake is a sentence in its place."""
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
    """An empty conversation."""
    session.clear()
    return "", ""


def apply_settings(
    args: ChatConfig, temperature, top_p, max_new_tokens, draft, system
) -> ChatConfig:
    """The settings of the page in place of the command line's."""
    try:
        numbers = {"temperature": float(temperature), "top_p": float(top_p)}
        counts = {"max_new_tokens": int(max_new_tokens), "num_speculative_tokens": int(draft)}
    except (TypeError, ValueError, OverflowError):
        raise UserError("temperature, top-p, new tokens and drafts are numbers") from None
    return replace(args, **numbers, **counts, system=replace_surrogates(str(system or "")))


def import_gradio():
    """gradio, which is an extra."""
    try:
        import gradio
    except ModuleNotFoundError:
        raise UserError("--web needs gradio: pip install 'dsv3-ref[web]'") from None
    return gradio


def build_page(generator: TextGenerator):
    """The page: a conversation, a line to write in, settings at the side."""
    gr, args = import_gradio(), generator.args
    look = {"head": f"<style>{CHAT_CSS}</style><script>{SCRIPT}</script>", "theme": page_theme()}
    title = f"dsv3 chat · {'/'.join(args.model.parts[-2:])}"
    with gr.Blocks(
        analytics_enabled=False, title=title, **supported_options(gr.Blocks, look)
    ) as blocks:
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
        gr.on([box.submit, send.click], submit_question, [session, box], [box, past, now], **at_once).then(
            partial(stream_reply, generator), [session, *settings], now, show_progress="hidden",
            concurrency_limit=1, api_name="reply", trigger_mode="multiple",
        )  # fmt: skip
        stop.click(Session.stop, session, **at_once)
        forget.click(clear_session, session, [past, now], **at_once)
    return blocks, look


def page_theme():
    """Fonts that every machine has: nothing is fetched."""
    font, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    return import_gradio().themes.Default(font=font, font_mono=mono)


def page_heading(title: str, generator: TextGenerator) -> str:
    """What is talked to, and how to look into it."""
    c, n = generator.model.config, len(generator.model.mtp)
    sizes = f"{c.n_layers - c.n_dense_layers} layers of {c.n_routed_experts} experts"
    return (
        f"<h1>{escape(title)}</h1><p>{sizes}, {c.n_activated_experts} of which read each token; "
        f"{n} MTP module{'s' * (n != 1)}. Point at a token of an answer, or go there with Tab and "
        "the arrow keys, to see its experts and their weights. "
        f'<span class="token accepted">{render_text("Underlined", True)}</span> tokens are accepted drafts.'
        "</p>"
    )


def page_controls(generator: TextGenerator) -> list:
    """What can be set between two questions; it begins with the command line's options."""
    gr, args, most = import_gradio(), generator.args, generator.model.config.max_seq_len - 1
    drafts, new = len(generator.model.mtp), min(args.max_new_tokens, most)
    hot, sharp = max(2.0, args.temperature), min(0.01, args.top_p)
    return [
        gr.Slider(0, hot, args.temperature, step=0.01, label="temperature"),
        gr.Slider(sharp, 1, args.top_p, step=0.01, label="top-p"),
        gr.Slider(1, most, new, step=1, label="new tokens at most"),
        gr.Slider(0, max(drafts, 1), args.num_speculative_tokens, step=1, label="MTP drafts a round",
                  interactive=drafts > 0),
        gr.Textbox(args.system, label="system text", lines=3),
    ]  # fmt: skip


# ── Serving it ──


def serve_web_chat(args: ChatConfig) -> None:
    """Serve the page until Ctrl-C."""
    import_gradio()
    listener = bind_socket(args.host, args.port)
    app, port = build_web_app(TextGenerator(args)), listener.getsockname()[1]
    if not is_loopback(args.host):
        print("anyone who reaches this machine can talk to the model", file=sys.stderr)
    print(f"http://{f'[{args.host}]' if ':' in args.host else args.host}:{port}", flush=True)
    make_web_server(app).run(sockets=[listener])


def bind_socket(host: str, port: int) -> socket.socket:
    """An open port, before anything slow happens."""
    if not 0 <= port < 1 << 16:
        raise UserError(f"--port must be from 0 to 65535, not {port}")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as e:
        raise UserError(f"--host {host} --port {port} cannot be used: {e.strerror}") from None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    return host in ("localhost", "::1") or host.startswith("127.")


def build_web_app(generator: TextGenerator):
    """The page as an ASGI app: no share link, no telemetry, no history, no uploads."""
    gr, (blocks, look) = import_gradio(), build_page(generator)
    from fastapi import FastAPI

    off = {"run_history": False, "enable_monitoring": False, "mcp_server": False, "pwa": False}
    options = supported_options(
        gr.mount_gradio_app, look | off | {"footer_links": [], "max_file_size": 1}
    )
    app = FastAPI(openapi_url=None)
    return with_security_policy(
        gr.mount_gradio_app(app, blocks, path="/", ssr_mode=False, **options)
    )


def make_web_server(app):
    """uvicorn, which came with gradio."""
    import uvicorn

    quiet = {"log_level": "critical", "timeout_graceful_shutdown": 1}
    return uvicorn.Server(uvicorn.Config(app, ws="none", **quiet))


def with_security_policy(app):
    """With every response, forbid the browser to fetch anything from elsewhere."""

    async def wrapped(scope, receive, send):
        async def with_policy(message):
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", CONTENT_SECURITY_POLICY.encode())
                message = message | {"headers": [*message["headers"], policy]}
            await send(message)

        await app(scope, receive, with_policy if scope["type"] == "http" else send)

    return wrapped


def supported_options(function, options: dict) -> dict:
    """The options that this version of gradio knows here: they have moved from 5 to 6."""
    names = inspect.signature(function).parameters
    return {k: v for k, v in options.items() if k in names}


# ── How it looks ──

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
.told { color: var(--body-text-color); opacity: .8; font-size: .85rem; }
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
SCRIPT = """
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
