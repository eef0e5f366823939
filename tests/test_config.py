"""Counts against the report and against real modules; every bad shape named."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_ref.config import (
    CONFIGS,
    SMALL,
    TINY,
    V2_LITE,
    V3,
    Config,
    UserError,
    ceil_div,
    from_dict,
    load_config,
)
from dsv3_ref.config import count_params as count_of
from dsv3_ref.model import Transformer

SHARED = ("embed.", "head.")  # MTP modules own neither


@st.composite
def configs(draw):
    """Draw small configs of any valid shape."""

    def size(low, high):
        return draw(st.integers(low, high))

    groups, per_group = size(1, 4), size(1, 4)
    layers, limited = size(1, 4), size(1, groups)
    return Config(
        vocab_size=size(1, 50),
        dim=size(1, 20),
        inter_dim=size(1, 20),
        moe_inter_dim=size(1, 20),
        n_layers=layers,
        n_dense_layers=size(0, layers),
        n_heads=size(1, 4),
        q_lora_rank=size(0, 8),
        kv_lora_rank=size(1, 8),
        qk_nope_head_dim=size(1, 8),
        qk_rope_head_dim=2 * size(1, 4),
        v_head_dim=size(1, 8),
        n_routed_experts=groups * per_group,
        n_shared_experts=size(0, 2),
        n_activated_experts=size(1, limited * per_group),
        n_expert_groups=groups,
        n_limited_groups=limited,
        score_func=draw(st.sampled_from(["sigmoid", "softmax"])),
        n_mtp_layers=size(0, 2),
    )


def sizes_by_name(c: Config) -> dict[str, int]:
    """Return name → number of elements of every parameter and buffer, without allocating any."""
    with torch.device("meta"):
        state = Transformer(c).state_dict()
    return {name: x.numel() for name, x in state.items()}


def check_count(c: Config):
    sizes, n = sizes_by_name(c), count_of(c)
    assert n.total == sum(v for k, v in sizes.items() if not k.startswith("mtp."))
    assert n.mtp == sum(v for k, v in sizes.items() if k.startswith("mtp."))
    idle = (c.n_routed_experts - c.n_activated_experts) * 3 * c.dim * c.moe_inter_dim
    assert n.activated == n.total - idle * (c.n_layers - c.n_dense_layers)
    assert n.activated - n.activated_without_input_embedding == sizes["embed.weight"]


@pytest.mark.parametrize("name", CONFIGS)
def test_count_is_the_module(name):
    check_count(CONFIGS[name])


@given(configs())
def test_count_is_the_module_for_any_shape(c):
    check_count(c)


def test_671b_has_the_numbers_of_the_report():
    n = count_of(V3)
    assert n.total == 671_026_419_200
    assert f"{n.activated / 1e9:.2f}" == "37.55"
    assert f"{n.activated_without_input_embedding / 1e9:.1f}" == "36.6"
    assert f"{n.mtp / 1e9:.2f}" == "11.61"
    assert n.cache_bytes == 70_272


def test_gate_biases_are_14_848_buffers():
    with torch.device("meta"):
        model = Transformer(replace(V3, n_mtp_layers=0))
    biases = [n for n, _ in model.named_buffers()]
    assert len(biases) == 58
    assert all(n.endswith("gate.bias") for n in biases)
    assert sum(b.numel() for b in model.buffers()) == 14_848


def test_sizes_are_what_they_are_called():
    assert f"{count_of(V2_LITE).total / 1e9:.1f}" == "15.7"
    assert 0.4e9 < count_of(SMALL).total < 0.7e9
    assert count_of(TINY).total < 10e6


def test_tiny_switches_every_mechanism_on():
    c = TINY
    assert c.n_dense_layers and c.n_shared_experts and c.q_lora_rank and c.n_mtp_layers
    assert 1 < c.n_limited_groups < c.n_expert_groups
    for width in (c.dim, c.inter_dim, c.moe_inter_dim, c.q_lora_rank, c.kv_lora_rank):
        assert width % 128 == 0  # FP8 blocks


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("n_routed_experts", 250, "n_routed_experts (250) must be a multiple of n_expert_groups"),
        ("n_limited_groups", 9, "n_limited_groups cannot exceed n_expert_groups"),
        ("n_activated_experts", 129, "n_activated_experts (129) must fit"),
        ("qk_rope_head_dim", 63, "qk_rope_head_dim must be even"),
        ("n_dense_layers", 62, "n_dense_layers cannot exceed n_layers"),
        ("score_func", "tanh", "score_func is 'sigmoid' or 'softmax'"),
        ("rope_factor", 0.5, "rope_factor must be at least 1"),
        ("dim", 0, "dim must be a whole number of at least 1, not 0"),
        ("dim", 7168.0, "dim must be a whole number of at least 1, not 7168.0"),
        ("dim", True, "dim must be a whole number of at least 1, not True"),
        ("dim", 10**30, "dim must be at most 2147483647, not 1000"),
        ("vocab_size", "129280", "vocab_size must be a whole number of at least 1, not '129280'"),
        ("rope_factor", "40", "rope_factor must be a number of at least 0, not '40'"),
        ("init_std", -0.1, "init_std must be a number of at least 0, not -0.1"),
        ("norm_eps", float("nan"), "norm_eps must be a number of at least 0, not nan"),
        ("init_std", 10**400, "init_std must be at most 1000000000000.0, not 1000"),
        ("rope_theta", float("inf"), "rope_theta must be at most 1000000000000.0, not inf"),
        ("rope_theta", 1, "rope_theta must be above 1"),
        ("beta_fast", 0, "beta_fast and beta_slow must be above 0"),
        ("beta_slow", 0.0, "beta_fast and beta_slow must be above 0"),
        ("n_mtp_layers", -1, "n_mtp_layers must be a whole number of at least 0, not -1"),
    ],
)
def test_a_bad_value_is_named(field, value, words):
    with pytest.raises(UserError) as e:
        replace(V3, **{field: value})
    assert words in str(e.value)


def test_an_unknown_field_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown config field 'n_head' \(did you mean n_heads"):
        from_dict({"n_head": 3})


def test_a_file_is_read_as_written(tmp_path):
    path = tmp_path / "my.json"
    path.write_text(json.dumps(asdict(V2_LITE)))
    assert load_config(str(path)) == V2_LITE
    assert load_config("v2_lite") is V2_LITE


def test_a_broken_file_and_an_unknown_size_say_so(tmp_path):
    path = tmp_path / "my.json"
    path.write_text("{dim: 3}")
    with pytest.raises(UserError, match="is not JSON"):
        load_config(str(path))
    with pytest.raises(UserError, match="no config 'tny' .did you mean tiny"):
        load_config("tny")


def test_ceil_div_counts_the_blocks_that_cover():
    assert [ceil_div(a, 4) for a in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert ceil_div(129_280, 128) == 1010


# ── The report's tables, as data ──

V3_TABLE = {  # §4.2 and the released config.json
    "vocab_size": 129_280, "dim": 7168, "inter_dim": 18_432, "moe_inter_dim": 2048, "n_layers": 61,
    "n_dense_layers": 3, "n_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256,
    "n_shared_experts": 1, "n_activated_experts": 8, "n_expert_groups": 8, "n_limited_groups": 4,
    "score_func": "sigmoid", "route_scale": 2.5, "n_mtp_layers": 1, "max_seq_len": 163_840,
    "original_seq_len": 4096, "rope_theta": 10_000.0, "rope_factor": 40.0, "beta_fast": 32.0,
    "beta_slow": 1.0, "mscale": 1.0, "norm_eps": 1e-6, "init_std": 0.006, "embed_std": 0.006,
}  # fmt: skip
V2_LITE_TABLE = V3_TABLE | {  # the 16B model's released config.json
    "vocab_size": 102_400, "dim": 2048, "inter_dim": 10_944, "moe_inter_dim": 1408, "n_layers": 27,
    "n_dense_layers": 1, "n_heads": 16, "q_lora_rank": 0, "n_routed_experts": 64,
    "n_shared_experts": 2, "n_activated_experts": 6, "n_expert_groups": 1, "n_limited_groups": 1,
    "score_func": "softmax", "route_scale": 1.0, "mscale": 0.707, "n_mtp_layers": 0,
}  # fmt: skip
OWN_TABLES = {  # our sizes: V3 with these changes
    "small": {
        "vocab_size": 32_768, "dim": 1024, "inter_dim": 2816, "moe_inter_dim": 512, "n_layers": 12,
        "n_dense_layers": 1, "n_heads": 8, "q_lora_rank": 384, "kv_lora_rank": 256,
        "n_routed_experts": 24, "n_activated_experts": 4, "n_expert_groups": 4,
        "n_limited_groups": 2, "max_seq_len": 2048, "original_seq_len": 2048, "rope_factor": 1.0,
        "init_std": 0.02, "embed_std": 0.02,
    },
    "tiny": {
        "vocab_size": 4096, "dim": 128, "inter_dim": 640, "moe_inter_dim": 128, "n_layers": 4,
        "n_dense_layers": 1, "n_heads": 4, "q_lora_rank": 128, "kv_lora_rank": 128,
        "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32, "n_routed_experts": 16,
        "n_activated_experts": 4, "n_expert_groups": 4, "n_limited_groups": 2, "max_seq_len": 256,
        "original_seq_len": 256, "rope_factor": 1.0, "init_std": 0.06, "embed_std": 1.0,
    },
}  # fmt: skip


@pytest.mark.parametrize(("config", "table"), [(V3, V3_TABLE), (V2_LITE, V2_LITE_TABLE)])
def test_every_field_is_that_of_the_released_config(config, table):
    assert asdict(config) == table


@pytest.mark.parametrize("name", OWN_TABLES)
def test_our_sizes_differ_from_v3_in_these_fields(name):
    assert asdict(CONFIGS[name]) == V3_TABLE | OWN_TABLES[name]
