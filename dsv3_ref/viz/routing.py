"""Where tokens go: a sentence, its affinities, the experts that were chosen, and their loads."""

from contextlib import contextmanager

import torch

from dsv3_ref.model import Transformer, moe_layers
from dsv3_ref.moe import Route, max_vio, tokens_per_expert
from dsv3_ref.viz.style import BLUE, GRAY, ORANGE, figure, play, show

MOST = 32  # tokens that fit a picture


@contextmanager
def biased(gate, expert: int, bias: float):
    """A gate with one bias moved."""
    before = gate.bias.clone()
    gate.bias[expert] += bias
    try:
        yield
    finally:
        gate.bias.copy_(before)


@torch.no_grad()
def routes(model: Transformer, tokens: list[int], layer: str, expert=0, bias=0.0) -> Route:
    """What the gate of an MoE layer of the main model decides, one of its biases moved."""
    names = list(moe_layers(model))
    with biased(moe_layers(model)[layer].gate, expert, bias):
        found = model.hidden_states(torch.tensor([tokens], device=model.embed.weight.device))[1]
    return found[names.index(layer)]


def draw_routing(r: Route, texts: list[str], groups: int = 1, title: str = ""):
    """Left: affinities, the chosen experts circled by weight. Right: how many tokens each got."""
    n_tokens, n_experts = r.scores_bse.shape[1:]
    load_e = tokens_per_expert(r.topk_ids_bsk.cpu(), n_experts)
    fig, axes = figure(1, 2, 9.5, max(2.6, 0.24 * n_tokens + 0.9), width_ratios=(3, 2))
    shown = axes[0].imshow(r.scores_bse[0].cpu().numpy(), aspect="auto", cmap="cividis")
    fig.colorbar(shown, ax=axes[0], label="affinity", pad=0.01)
    row_n = torch.arange(n_tokens).repeat_interleave(r.topk_ids_bsk.shape[2]).tolist()
    share_nk = r.topk_weights_bsk[0] / r.topk_weights_bsk[0].sum(-1, keepdim=True)
    size_n = (110 * share_nk).flatten().tolist()
    axes[0].scatter(r.topk_ids_bsk[0].flatten().tolist(), row_n, s=size_n, facecolor="white",
                    edgecolor="#D55E00")  # fmt: skip
    for g in range(1, groups):
        axes[0].axvline(g * n_experts / groups - 0.5, color="white", lw=1.5)
    axes[0].set_yticks(range(n_tokens), [repr(text)[1:-1] for text in texts], fontsize=8,
                       parse_math=False)  # fmt: skip
    axes[0].set(title=title or "○ chosen, larger: weighs more", xlabel="expert, by group")
    axes[1].bar(range(n_experts), load_e.tolist(), color=BLUE)
    axes[1].axhline(load_e.float().mean().item(), color=ORANGE, ls="--")
    axes[1].set(title=f"Load, MaxVio {max_vio(load_e):.2f}", xlabel="expert", ylabel="tokens")
    for ax in axes:
        ax.set_xticks(range(0, n_experts, max(1, n_experts // 8)))
        ax.tick_params(colors=GRAY, labelcolor="black")
    return fig


def explore_routing(model: Transformer, tokenizer, text: str) -> None:
    """Type a sentence, choose a layer, drag a bias: figures and, in a notebook, their sliders."""
    c, names = model.config, [n for n in moe_layers(model) if not n.startswith("mtp")]

    def look(text: str = text, layer: str = names[0], expert: int = 0, bias: float = 0.0):
        ids = tokenizer.encode(text, add_special_tokens=False).ids[:MOST]
        if not ids:
            print("type something")
            return
        r = routes(model, ids, layer, expert, bias)
        show(draw_routing(r, [tokenizer.decode([i]) for i in ids], c.n_expert_groups))

    look()
    play(
        look, text=text, layer=names, expert=(0, c.n_routed_experts - 1, 1), bias=(-0.5, 0.5, 0.02)
    )
