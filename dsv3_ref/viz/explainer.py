"""One HTML file with a small model inside, which runs in the browser and shows what it does.

The forward pass, the tokenizer and the page are JavaScript (`components/`); weights are 8-bit
integers with a scale per row.
"""

import base64
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from dsv3_ref import mla, moe, mtp
from dsv3_ref.block import MTP
from dsv3_ref.config import UserError
from dsv3_ref.mla import LATENT_NORM_EPS, MLA
from dsv3_ref.model import Transformer
from dsv3_ref.moe import Gate, MoE
from dsv3_ref.ops import MLP
from dsv3_ref.rope import softmax_scale, yarn_freqs
from dsv3_ref.viz.component import document, embed_json

MAX_NUMBERS = 32_000_000
SHIPPED_MODEL = Path(__file__).parents[2] / "notebooks/models/tiny"  # in a checkout
SOURCES: dict[str, list[Callable[..., Any]]] = {  # box of the page → the code that it shows
    "embedding": [Transformer.hidden_states],
    "attention": [MLA.forward, mla.attend_absorbed, mla.latent_attention],
    "latent": [MLA.down_project_kv],
    "dense": [MLP.forward],
    "router": [Gate.forward, moe.route, moe.mask_to_top_groups, MoE.forward],
    "logits": [Transformer.forward],
    "mtp": [MTP.project, MTP.forward, mtp.mtp_hidden_states],
}

# ── Weights ──


def quantize_to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return 8-bit integers and an fp32 scale per row, (…, 1): weight ≈ scale · integers."""
    scale = weight.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (weight.float() / scale).round().to(torch.int8), scale


def round_weights(model: Transformer) -> dict[str, Tensor]:
    """Return the state of a model with the weights that the page computes with, in fp32."""
    return {name: dequantize(*pack(name, t)) for name, t in model.state_dict().items()}


def pack(name: str, tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return a tensor as the page stores it: matrices in 8 bits, vectors and the router in fp32."""
    tensor = tensor.detach().cpu()
    if tensor.ndim == 1 or name.endswith("gate.weight"):
        return tensor.float(), None
    return quantize_to_int8(tensor)


def dequantize(values: Tensor, scale: Tensor | None) -> Tensor:
    """Return the numbers that `pack` stored, in fp32."""
    return values if scale is None else values.float() * scale


def pack_weights(model: Transformer) -> tuple[list[dict[str, Any]], bytes]:
    """Return the table of all tensors (name, shape, offsets in bytes) and their bytes."""
    entries, data = [], bytearray()

    def append(tensor: Tensor) -> int:
        data.extend(bytes(-len(data) % 4))  # JavaScript reads fp32 at multiples of 4
        offset = len(data)
        data.extend(tensor.contiguous().numpy().tobytes())
        return offset

    for name, tensor in model.state_dict().items():
        values, scale = pack(name, tensor)
        entry = {"name": name, "shape": list(tensor.shape), "values": append(values)}
        entries.append(entry if scale is None else entry | {"scales": append(scale)})
    return entries, bytes(data)


# ── The other parts of the page ──


def pack_config(model: Transformer) -> dict[str, Any]:
    """Return the fields of the config, and what the page need not compute again."""
    config = model.config
    return asdict(config) | {
        "freqs": yarn_freqs(config).tolist(),
        "softmax_scale": softmax_scale(config),
        "latent_norm_eps": LATENT_NORM_EPS,
    }


def pack_tokenizer(tokenizer: Tokenizer, bos: int, eos: int) -> dict[str, Any]:
    """Return the vocabulary in the order of ids, the merges and the special tokens."""
    settings = json.loads(tokenizer.to_str())
    merges = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in settings["model"]["merges"]
    ]
    special = [token["id"] for token in settings["added_tokens"]]
    vocab = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    return {"vocab": vocab, "merges": merges, "special": special, "bos": bos, "eos": eos}


def read_sources() -> dict[str, str]:
    """Return the Python source of every box, without the indentation of methods."""
    return {
        box: "\n\n".join(inspect.cleandoc(f"\n{inspect.getsource(f)}") for f in functions)
        for box, functions in SOURCES.items()
    }


# ── The page ──


def explainer(
    model: Transformer, tokenizer: Tokenizer, bos: int, eos: int, prompts: Sequence[str]
) -> str:
    """Return the page of a model as HTML.

    Raise a `UserError` if the model has more than 32 million numbers, which no page should hold.
    """
    numbers = sum(t.numel() for t in model.state_dict().values())
    if numbers > MAX_NUMBERS:
        raise UserError(
            f"the model has {numbers / 1e6:,.0f} million parameters; a page can hold "
            f"{MAX_NUMBERS / 1e6:.0f} million: train a small one with `dsv3 train --config tiny`"
        )
    entries, weights = pack_weights(model)
    data = {
        "config": pack_config(model),
        "tensors": entries,
        "tokenizer": pack_tokenizer(tokenizer, bos, eos),
        "sources": read_sources(),
        "prompts": list(prompts),
        "parameters": numbers,
    }
    return document(
        "Follow one token through DeepSeek-V3",
        "explainer",
        ("dom.js", "model.js", "tokenizer.js", "explainer.js"),
        {"model": embed_json(data), "weights": base64.b64encode(weights).decode()},
    )
