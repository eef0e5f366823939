# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 00 · Tour: one model, four sizes

# %% [markdown]
# ## The config
# Every size is the same dataclass; the defaults are the 671B model (report §4.2).

# %%
#| export config
import difflib
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path


class UserError(ValueError):
    """A mistake a person can mend: the command line prints the sentence, not a traceback."""


@dataclass(frozen=True)
class Config:
    """Shape of a DeepSeek-V3; the defaults are the 671B model, names are DeepSeek's (§2, §4.2)."""

    vocab_size: int = 129_280
    dim: int = 7168  # d
    inter_dim: int = 18_432  # f of a dense layer
    moe_inter_dim: int = 2048  # f of one expert
    n_layers: int = 61
    n_dense_layers: int = 3  # the first ones
    n_heads: int = 128  # h
    q_lora_rank: int = 1536  # q, 0: queries straight from x
    kv_lora_rank: int = 512  # c
    qk_nope_head_dim: int = 128  # i
    qk_rope_head_dim: int = 64  # r
    v_head_dim: int = 128  # v
    n_routed_experts: int = 256  # e
    n_shared_experts: int = 1
    n_activated_experts: int = 8  # k
    n_expert_groups: int = 8  # g
    n_limited_groups: int = 4  # groups a token may use, M in §2.1.2
    score_func: str = "sigmoid"  # or "softmax" (V2-Lite)
    route_scale: float = 2.5
    n_mtp_layers: int = 1  # D of §2.2
    max_seq_len: int = 163_840
    original_seq_len: int = 4096  # length before YaRN
    rope_theta: float = 10_000.0
    rope_factor: float = 40.0  # YaRN's s, 1: plain RoPE
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    norm_eps: float = 1e-6
    init_std: float = 0.006

    def __post_init__(self):
        check(self)


# %% [markdown]
# ## What must divide what


# %%
#| export config
def check(c: Config) -> None:
    """Raise a `UserError` naming the field for every shape that could not be built."""
    for f in fields(c):
        value, least = getattr(c, f.name), 0 if f.name in MAY_BE_ZERO else 1
        if isinstance(f.default, int) and (not isinstance(value, int) or value < least):
            raise UserError(f"{f.name} must be a whole number of at least {least}, not {value!r}")
    rules = [
        (c.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim must be even: RoPE turns pairs"),
        (c.n_dense_layers <= c.n_layers, "n_dense_layers cannot exceed n_layers"),
        (c.score_func in ("sigmoid", "softmax"), "score_func is 'sigmoid' or 'softmax'"),
        (c.rope_factor >= 1, "rope_factor must be at least 1 (1 switches YaRN off)"),
        (
            c.n_routed_experts % c.n_expert_groups == 0,
            f"n_routed_experts ({c.n_routed_experts}) must be a multiple of "
            f"n_expert_groups ({c.n_expert_groups})",
        ),
        (c.n_limited_groups <= c.n_expert_groups, "n_limited_groups cannot exceed n_expert_groups"),
        (
            c.n_activated_experts * c.n_expert_groups <= c.n_limited_groups * c.n_routed_experts,
            f"n_activated_experts ({c.n_activated_experts}) must fit into the "
            f"{c.n_limited_groups} groups a token may use",
        ),
    ]
    for holds, sentence in rules:
        if not holds:
            raise UserError(sentence)


MAY_BE_ZERO = {"q_lora_rank", "n_shared_experts", "n_dense_layers", "n_mtp_layers"}


# %% [markdown]
# ## Four sizes

# %%
#| export config
V3 = Config()
V2_LITE = replace(
    V3, vocab_size=102_400, dim=2048, inter_dim=10_944, moe_inter_dim=1408, n_layers=27,
    n_dense_layers=1, n_heads=16, q_lora_rank=0, n_routed_experts=64, n_shared_experts=2,
    n_activated_experts=6, n_expert_groups=1, n_limited_groups=1, score_func="softmax",
    route_scale=1.0, mscale=0.707, n_mtp_layers=0,
)  # fmt: skip
SMALL = replace(
    V3, vocab_size=32_768, dim=1024, inter_dim=2816, moe_inter_dim=512, n_layers=12,
    n_dense_layers=1, n_heads=8, q_lora_rank=384, kv_lora_rank=256, n_routed_experts=24,
    n_activated_experts=4, n_expert_groups=4, n_limited_groups=2, max_seq_len=2048,
    original_seq_len=2048, rope_factor=1.0, init_std=0.02,
)  # fmt: skip
TINY = replace(
    V3, vocab_size=4096, dim=256, inter_dim=640, moe_inter_dim=128, n_layers=4, n_dense_layers=1,
    n_heads=4, q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32,
    v_head_dim=64, n_routed_experts=16, n_activated_experts=4, n_expert_groups=4,
    n_limited_groups=2, max_seq_len=256, original_seq_len=256, rope_factor=1.0, init_std=0.02,
)  # fmt: skip
SIZES = {"tiny": TINY, "small": SMALL, "v2_lite": V2_LITE, "v3": V3}


# %% [markdown]
# ## Reading a config from a file


# %%
#| export config
def from_dict(values: dict) -> Config:
    """A Config from DeepSeek's field names; an unknown name raises with the nearest known one."""
    known = [f.name for f in fields(Config)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise UserError(f"unknown config field {name!r}; did you mean {near!r}?")
    return Config(**values)


def named(name: str) -> Config:
    """The config of a size (`tiny`) or of a JSON file (`my.json`)."""
    if name in SIZES:
        return SIZES[name]
    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        try:
            return from_dict(json.loads(path.read_text()))
        except json.JSONDecodeError as e:
            raise UserError(f"{path} is not JSON: {e}") from None
    near = difflib.get_close_matches(name, SIZES, n=1, cutoff=0.0)[0]
    raise UserError(
        f"no config {name!r}: sizes are {', '.join(SIZES)} (nearest: {near}), or a .json file"
    )


# %% [markdown]
# ## Counting parameters and cache


# %%
#| export config
@dataclass(frozen=True)
class Count:
    """Numbers of parameters, and bytes of cache a token."""

    total: int  # main model, gate biases included, MTP excluded
    activated: int  # touched by one token, both embeddings counted
    activated_one_embedding: int  # the same without the input embedding (one row is read)
    mtp: int  # unique to the MTP modules: embedding and head are shared
    cache_bytes: int  # latent cache of all main layers, bf16


def count_mla(c: Config) -> int:
    """Parameters of one MLA: d→q→h(i+r) (or d→h(i+r)), d→c+r, c→h(i+v), hv→d and two norms."""
    heads_q = c.n_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    q = c.q_lora_rank * (c.dim + 1 + heads_q) if c.q_lora_rank else c.dim * heads_q
    kv = c.dim * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank
    up = c.kv_lora_rank * c.n_heads * (c.qk_nope_head_dim + c.v_head_dim)
    return q + kv + up + c.n_heads * c.v_head_dim * c.dim


def count_moe(c: Config, experts: int) -> int:
    """Parameters of one MoE layer: the gate, 3·d·f for each of `experts` and the shared ones."""
    gate = c.n_routed_experts * (c.dim + (c.score_func == "sigmoid"))
    return gate + (experts + c.n_shared_experts) * 3 * c.dim * c.moe_inter_dim


def count(c: Config) -> Count:
    """Count a config by arithmetic alone: V3's total is 671,026,419,200."""
    attn = count_mla(c) + 2 * c.dim  # with the block's two norms
    dense = c.n_dense_layers * 3 * c.dim * c.inter_dim
    n_moe, embed = c.n_layers - c.n_dense_layers, c.vocab_size * c.dim
    rest = c.n_layers * attn + dense + 2 * embed + c.dim
    total = rest + n_moe * count_moe(c, c.n_routed_experts)
    active = rest + n_moe * count_moe(c, c.n_activated_experts)
    mtp = 2 * c.dim * c.dim + 3 * c.dim + attn + count_moe(c, c.n_routed_experts)
    cache = 2 * c.n_layers * (c.kv_lora_rank + c.qk_rope_head_dim)
    return Count(total, active, active - embed, c.n_mtp_layers * mtp, cache)


# %%
assert count(V3).total == 671_026_419_200
assert count(V3).cache_bytes == 70_272
count(V3)
