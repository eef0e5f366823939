"""Expert routing as figures and as a page: affinities, chosen experts, load per expert."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tokenizers import Tokenizer

from dsv3_ref.model import Transformer, moe_layers
from dsv3_ref.moe import Gate, Route, max_vio, tokens_per_expert
from dsv3_ref.viz.component import document, embed_json
from dsv3_ref.viz.style import BLUE, GRAY, ORANGE, figure, play, show

MAX_TOKENS = 32  # as many as fit into a figure


@contextmanager
def shift_bias(gate: Gate, expert: int, offset: float) -> Iterator[None]:
    """Add an offset to the bias of one expert inside a `with` block."""
    bias_e: torch.Tensor = gate.get_buffer("bias")
    before = bias_e.clone()
    bias_e[expert] += offset
    try:
        yield
    finally:
        bias_e.copy_(before)


@torch.no_grad()
def trace_route(
    model: Transformer, tokens: Sequence[int], layer: str, expert: int = 0, offset: float = 0.0
) -> Route:
    """Return the route of a sequence in one MoE layer, with an offset on one expert's bias."""
    layers = moe_layers(model)
    tokens_bs = torch.tensor([list(tokens)], device=model.embed.weight.device)
    with shift_bias(layers[layer].gate, expert, offset):
        routes = model.hidden_states(tokens_bs)[1]
    return routes[list(layers).index(layer)]


def draw_affinities(ax: Axes, route: Route, texts: Sequence[str], groups: int, title: str) -> None:
    """Draw affinities (rows: tokens, columns: experts) and a circle on each chosen expert."""
    n_tokens, n_experts = route.scores_bse.shape[1:]
    image = ax.imshow(route.scores_bse[0].cpu().numpy(), aspect="auto", cmap="cividis")
    ax.figure.colorbar(image, ax=ax, label="affinity", pad=0.01)
    token_n = torch.arange(n_tokens).repeat_interleave(route.topk_ids_bsk.shape[2]).tolist()
    share_nk = route.topk_weights_bsk[0] / route.topk_weights_bsk[0].sum(-1, keepdim=True)
    ax.scatter(
        route.topk_ids_bsk[0].flatten().tolist(),
        token_n,
        s=(110 * share_nk).flatten().tolist(),
        facecolor="white",
        edgecolor="#D55E00",
    )
    for group in range(1, groups):
        ax.axvline(group * n_experts / groups - 0.5, color="white", lw=1.5)
    labels = [repr(text)[1:-1] for text in texts]
    ax.set_yticks(range(n_tokens), labels, fontsize=8, parse_math=False)
    ax.set(title=title or "○ chosen; size: weight", xlabel="expert, by group")


def draw_loads(ax: Axes, route: Route) -> None:
    """Draw the number of tokens of each expert, and the mean."""
    n_experts = route.scores_bse.shape[-1]
    load_e = tokens_per_expert(route.topk_ids_bsk.cpu(), n_experts)
    ax.bar(range(n_experts), load_e.tolist(), color=BLUE)
    ax.axhline(load_e.float().mean().item(), color=ORANGE, ls="--")
    ax.set(title=f"Load, MaxVio {max_vio(load_e):.2f}", xlabel="expert", ylabel="tokens")


def draw_routing(route: Route, texts: Sequence[str], groups: int = 1, title: str = "") -> Figure:
    """Draw a route: affinities and chosen experts on the left, load per expert on the right."""
    n_tokens, n_experts = route.scores_bse.shape[1:]
    fig, axes = figure(1, 2, 9.5, max(2.6, 0.24 * n_tokens + 0.9), width_ratios=(3, 2))
    draw_affinities(axes[0], route, texts, groups, title)
    draw_loads(axes[1], route)
    for ax in axes:
        ax.set_xticks(range(0, n_experts, max(1, n_experts // 8)))
        ax.tick_params(colors=GRAY, labelcolor="black")
    return fig


def explore_routing(model: Transformer, tokenizer: Tokenizer, text: str) -> None:
    """Show how a sentence is routed; a notebook adds controls for text, layer and one bias."""
    config = model.config
    names = [name for name in moe_layers(model) if not name.startswith("mtp")]

    def draw(text: str = text, layer: str = names[0], expert: int = 0, bias: float = 0.0) -> None:
        ids = tokenizer.encode(text, add_special_tokens=False).ids[:MAX_TOKENS]
        if not ids:
            print("enter a text")
            return
        route = trace_route(model, ids, layer, expert, bias)
        show(draw_routing(route, [tokenizer.decode([i]) for i in ids], config.n_expert_groups))

    draw()
    play(
        draw,
        text=text,
        layer=names,
        expert=(0, config.n_routed_experts - 1, 1),
        bias=(-0.5, 0.5, 0.02),
    )


def router_page(model: Transformer, tokenizer: Tokenizer, text: str, layer: str) -> str:
    """Return a page of one MoE layer's router on a text, with a slider for every bias, as HTML.

    The layer's inputs, and so the affinities, do not depend on its own biases.
    """
    tokens = tokenizer.encode(text).ids[: MAX_TOKENS + 1]
    texts = [tokenizer.decode([token]) for token in tokens]
    shown = [t for t, piece in enumerate(texts) if piece]  # no special tokens
    config = model.config
    bias_e: torch.Tensor = moe_layers(model)[layer].gate.get_buffer("bias")
    scores_bse = trace_route(model, tokens, layer).scores_bse
    data = {
        "config": {
            "score_func": config.score_func, "route_scale": config.route_scale,
            "n_routed_experts": config.n_routed_experts,
            "n_activated_experts": config.n_activated_experts,
            "n_expert_groups": config.n_expert_groups,
            "n_limited_groups": config.n_limited_groups,
        },
        "tokens": [texts[t] for t in shown],
        "logits": scores_bse[0, shown].double().logit().tolist(),
        "bias": bias_e.tolist(),
    }  # fmt: skip
    modules = "dom.js", "model.js", "router.js"
    return document(
        "The router of a trained model", "router", modules, {"router": embed_json(data)}
    )
