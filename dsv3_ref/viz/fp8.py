"""The page of chapter 09: a number in eight bits, and an outlier among activations."""

import torch

from dsv3_ref.viz.component import document, embed_json


def fp8_page() -> str:
    """Return the page as HTML; its activations are 512 normal numbers."""
    activations = torch.randn(512, generator=torch.Generator().manual_seed(0)).tolist()
    modules = "dom.js", "float.js", "fp8.js"
    return document(
        "A number in eight bits", "fp8", modules, {"activations": embed_json(activations)}
    )
