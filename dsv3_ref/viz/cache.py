"""The page of chapter 03: what the cache takes under four kinds of attention."""

from collections.abc import Mapping

from dsv3_ref.config import Config
from dsv3_ref.viz.component import document, embed_json


def cache_page(configs: Mapping[str, Config]) -> str:
    """Return the page as HTML, with the shapes of these models to begin from."""
    models = [
        {
            "name": name, "heads": config.n_heads, "latent": config.kv_lora_rank,
            "layers": config.n_layers, "head_dim": config.v_head_dim,
            "rope": config.qk_rope_head_dim,
        }
        for name, config in configs.items()
    ]  # fmt: skip
    data = {"shapes": embed_json({"models": models})}
    return document("What must be remembered per token?", "cache", ("dom.js", "cache.js"), data)
