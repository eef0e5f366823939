"""Options of `dsv3 serve`, their validation, and the engine built from them."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from dsv3_ref.config import UserError
from dsv3_ref.model import Transformer
from dsv3_ref.serve import Engine, make_engine


@dataclass(frozen=True)
class ServeConfig:
    """Serve a model to any number of OpenAI clients."""

    model: tyro.conf.Positional[Path]
    """a run, one of its checkpoints, or a Hugging Face directory"""
    host: str = "127.0.0.1"
    """this machine alone; 0.0.0.0 is the whole network"""
    port: int = 8000
    """0: a free one"""
    served_model_name: str = ""
    """what clients call the model; by default the name of its folder"""
    num_speculative_tokens: int = 0
    """tokens that MTP modules guess ahead in every row, up to the model's n_mtp_layers"""
    max_num_seqs: int = 64
    """answers that are written side by side"""
    max_queue: int = 256
    """requests that may wait; the next one is told to come again"""
    max_n: int = 16
    """answers that one request may ask for"""
    kv_cache_tokens: int = 32768
    """positions that the latent cache holds for all rows together"""
    block_size: int = 16
    """positions of a page of that cache"""
    prefill_chunk: int = 128
    """tokens of prompts that are read between two tokens of those who write"""
    max_new_tokens: int = 256
    """of an answer, where the request does not say"""
    prefill_workers: int = 0
    """processes that read prompts, so that this one only writes"""
    grace: float = 30.0
    """seconds that running answers are given at the end"""
    seed: int | None = None
    """random seed of requests that set none; by default each request draws its own"""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU if there is one"""


def validate_serve_config(args: ServeConfig) -> None:
    """Raise a `UserError` for options that cannot be used."""
    least = {
        "max_num_seqs": 1,
        "max_n": 1,
        "block_size": 1,
        "prefill_chunk": 1,
        "max_new_tokens": 1,
        "max_queue": 1,
    }
    for name, low in (
        least | {"num_speculative_tokens": 0, "prefill_workers": 0, "grace": 0}
    ).items():
        if getattr(args, name) < low:
            raise UserError(f"--{name.replace('_', '-')} must be at least {low}")
    if args.kv_cache_tokens < 2 * args.block_size:
        raise UserError("--kv-cache-tokens must be at least two pages")


def build_engine(model: Transformer, args: ServeConfig, prefill_only: bool = False) -> Engine:
    """Build an engine with these limits."""
    return make_engine(
        model, args.kv_cache_tokens // args.block_size, args.block_size, args.max_num_seqs,
        args.prefill_chunk, args.max_queue, args.num_speculative_tokens, prefill_only,
    )  # fmt: skip
