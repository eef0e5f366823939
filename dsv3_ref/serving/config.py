"""Options of `dsv3 generate`, `chat` and `serve`, and their validation."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import tyro

from dsv3_ref.config import UserError
from dsv3_ref.model import Transformer
from dsv3_ref.serve import Engine, make_engine

# ── Generation ──


@dataclass(frozen=True)
class GenerationOptions:
    """Options that `generate` and `chat` share."""

    model: tyro.conf.Positional[Path]
    """directory of a run, of one of its checkpoints, or of a model in Hugging Face format"""
    max_new_tokens: int = 200
    """maximum number of tokens to generate"""
    temperature: float | None = None
    """sampling temperature; 0 selects the most likely token (greedy decoding); by default that of
    the model's generation_config.json, or 0.8"""
    top_p: float | None = None
    """sample from the smallest set of tokens whose probabilities sum to at least this value; by
    default that of the model's generation_config.json, or 0.95"""
    stop: tuple[str, ...] = ()
    """strings that end the output; they are not printed"""
    num_speculative_tokens: int = 0
    """tokens drafted by MTP modules in each decoding step, at most the model's n_mtp_layers"""
    compile: bool = False
    """compile the decoding step, which takes about 20 seconds and makes it about twice as fast;
    needs a C++ compiler such as g++"""
    seed: int = 0
    """random seed for sampling"""
    device: str = "auto"
    """cpu, cuda, or auto, which selects a GPU if there is one"""
    verify: bool = True
    """compare the files of the model with their checksums, where it has any"""


@dataclass(frozen=True)
class GenerateConfig(GenerationOptions):
    """Continue one or several texts."""

    prompt: tuple[str, ...] = ("",)
    """one or several texts to continue; several are decoded as one batch and printed in order"""


@dataclass(frozen=True)
class ChatConfig(GenerationOptions):
    """Chat with a model in the terminal, one line per turn.

    An empty line or Ctrl-D ends the conversation; Ctrl-C ends an answer early.
    """

    system: str = ""
    """system text, placed before the first turn"""
    web: bool = False
    """serve a web page instead, which also shows the experts that process each token"""
    host: str = "127.0.0.1"
    """address at which the web page is served; 0.0.0.0 makes it reachable from the network"""
    port: int = 7860
    """port of the web page; 0 selects a free one"""
    allowed_hosts: tuple[str, ...] = ()
    """further names under which a browser may address the web page"""
    api_key: tuple[str, ...] = ()
    """passwords of the web page, with any user name; without this option, those in the environment
    variable DSV3_API_KEY, separated by commas"""


def validate_generation_options(args: GenerationOptions) -> None:
    """Raise a `UserError` if an option is out of range."""
    rules = [
        (args.max_new_tokens >= 1, "--max-new-tokens must be at least 1"),
        (0 <= (args.temperature or 0) < math.inf, "--temperature must be at least 0 and finite"),
        (
            args.top_p is None or 0 < args.top_p <= 1,
            "--top-p must be above 0 and at most 1",
        ),
        (args.num_speculative_tokens >= 0, "--num-speculative-tokens must be at least 0"),
        (all(args.stop), "--stop needs a non-empty text"),
    ]
    for holds, sentence in rules:
        if not holds:
            raise UserError(sentence)


# ── The server ──


@dataclass(frozen=True)
class ServeConfig:
    """Serve a model to any number of clients that use OpenAI's API."""

    model: tyro.conf.Positional[Path]
    """directory of a run, of one of its checkpoints, or of a model in Hugging Face format"""
    host: str = "127.0.0.1"
    """address to listen on; 0.0.0.0 makes the server reachable from the network, for which it
    needs an API key"""
    port: int = 8000
    """port to listen on; 0 selects a free one"""
    api_key: tuple[str, ...] = ()
    """keys of clients, one of which each request must carry; without this option, the keys in the
    environment variable DSV3_API_KEY, separated by commas (a command line is visible to others)"""
    allow_unauthenticated: bool = False
    """let the server be reachable from the network without an API key"""
    allowed_hosts: tuple[str, ...] = ()
    """further names under which clients may address the server, such as that of a reverse proxy"""
    allowed_origins: tuple[str, ...] = ()
    """origins of web pages that may use the API (CORS), such as https://example.org; none by
    default"""
    max_connections: int = 512
    """maximum number of connections; reduced if the limit on open files is lower"""
    report_cached_tokens: bool = False
    """tell clients how many tokens of their prompt were found in the prefix cache"""
    served_model_name: str = ""
    """model name in the API; if empty, the name of the model's directory"""
    num_speculative_tokens: int = 0
    """tokens drafted by MTP modules in each decoding step, at most the model's n_mtp_layers"""
    max_num_seqs: int = 64
    """maximum number of sequences decoded in one batch"""
    max_queue: int = 256
    """maximum number of waiting requests and of prompts to tokenize; further ones are rejected with
    status 429"""
    max_n: int = 16
    """maximum number of completions per HTTP request"""
    kv_cache_tokens: int = 32768
    """size of the KV cache in tokens, shared by all requests"""
    block_size: int = 16
    """tokens per block of the KV cache"""
    prefill_chunk: int = 128
    """maximum number of prompt tokens processed between two decoding steps (chunked prefill)"""
    max_new_tokens: int = 256
    """maximum number of tokens per completion if the request sets no limit"""
    prefill_workers: int = 0
    """number of additional processes that run prefill, so that the main process only decodes"""
    grace: float = 30.0
    """seconds that running requests may take to finish after a shutdown signal"""
    seed: int | None = None
    """random seed of requests that set none; None draws a new one for each request"""
    generation_config: bool = True
    """take temperature, top_p, top_k, min_p and repetition_penalty from the model's
    generation_config.json where a request leaves them out, as vLLM does; otherwise OpenAI's
    defaults"""
    separate_reasoning: bool = False
    """return the thoughts of an answer, between <think> and </think>, as `reasoning_content`, as
    DeepSeek's API does; otherwise they are part of its content. A request's own field
    `separate_reasoning` comes first"""
    reload_root: Path | None = None
    """let clients load other weights of the same shape from directories under this one (POST
    /update_weights_from_disk, as in SGLang), for `dsv3 rl --rollout`; needs an API key"""
    device: str = "auto"
    """cpu, cuda, or auto, which selects a GPU if there is one"""
    verify: bool = True
    """compare the files of the model with their checksums, where it has any"""


API_KEY_VARIABLE = "DSV3_API_KEY"
MINIMUM = {
    "max_num_seqs": 1,
    "max_n": 1,
    "block_size": 1,
    "prefill_chunk": 1,
    "max_new_tokens": 1,
    "max_queue": 1,
    "max_connections": 1,
    "num_speculative_tokens": 0,
    "prefill_workers": 0,
    "grace": 0,
}


def validate_serve_config(args: ServeConfig) -> None:
    """Raise a `UserError` if an option is out of range."""
    for name, minimum in MINIMUM.items():
        if not minimum <= getattr(args, name) < math.inf:  # nor NaN
            raise UserError(f"--{name.replace('_', '-')} must be at least {minimum}")
    if args.kv_cache_tokens < 2 * args.block_size:
        raise UserError(
            f"--kv-cache-tokens must be at least two blocks ({2 * args.block_size} tokens)"
        )
    if not api_keys(args) and args.reload_root:
        raise UserError(
            f"--reload-root {args.reload_root} lets clients change the model: set an API key "
            f"(--api-key or {API_KEY_VARIABLE})"
        )
    if args.prefill_workers and args.reload_root:
        raise UserError(
            "--reload-root does not reach the models of --prefill-workers: set --prefill-workers 0"
        )


def api_keys(args: ServeConfig | ChatConfig) -> tuple[str, ...]:
    """Return the keys of clients, from the options or else from the environment.

    Raises a `UserError` for a key that a header cannot carry.
    """
    words = os.environ.get(API_KEY_VARIABLE, "").split(",")
    keys = args.api_key or tuple(word.strip() for word in words if word.strip())
    for key in keys:
        if not (key.isascii() and key.isprintable()) or " " in key or not key:
            raise UserError("--api-key must consist of visible ASCII characters")
    return keys


def build_engine(model: Transformer, args: ServeConfig, prefill_only: bool = False) -> Engine:
    """Build an engine with the limits in `args`."""
    return make_engine(
        model, args.kv_cache_tokens // args.block_size, args.block_size, args.max_num_seqs,
        args.prefill_chunk, args.max_queue, args.num_speculative_tokens, prefill_only,
    )  # fmt: skip
