"""Files: what is written comes back, what is broken is said in a sentence, nothing is half done."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support import randomize

from dsv3_ref.checkpoints import atomic, safetensors_files
from dsv3_ref.checkpoints.hf_config import config_from_hf, config_to_hf
from dsv3_ref.checkpoints.huggingface import hf_names, save_hf
from dsv3_ref.checkpoints.manifest import DamageError
from dsv3_ref.checkpoints.meta import build_on_meta
from dsv3_ref.checkpoints.native import load, save
from dsv3_ref.config import V2_LITE, V3, UserError, ceil_div
from dsv3_ref.model import Transformer, moe_layers

FP8 = torch.float8_e4m3fn


@pytest.fixture
def model(micro):
    return randomize(Transformer(micro))


@pytest.fixture
def ours(model, tmp_path):
    save(model, tmp_path / "ours")
    return tmp_path / "ours"


@pytest.fixture
def theirs(model, tmp_path):
    save_hf(model, tmp_path / "theirs", shard_bytes=60_000)
    return tmp_path / "theirs"


def same(a: Transformer, b: Transformer) -> bool:
    """Same config, names, dtypes and bits."""
    x, y = a.state_dict(), b.state_dict()
    pairs = [(x[n], y[n]) for n in x if n in y]
    return (
        a.config == b.config
        and x.keys() == y.keys()
        and all(p.dtype == q.dtype and torch.equal(p, q) for p, q in pairs)
    )


def edit_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory by stored name."""
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        stored |= load_file(file)
    return stored


def rewrite(directory: Path, stored: dict[str, torch.Tensor]) -> None:
    """Put these tensors in place of those of a directory, as one file."""
    for file in directory.glob("model*"):
        file.unlink()
    save_file(stored, directory / "model.safetensors")


# ── There and back ──


def test_bits_survive(model, ours, theirs):
    assert same(load(ours), model)
    assert same(load(theirs), model)
    assert len(list(theirs.glob("*.safetensors"))) > 2  # it was in shards


def test_mixed_dtypes_survive(model, ours, tmp_path):
    """As stored unless asked; gate biases are fp32 either way: steps of 0.001 vanish in bf16."""
    model.to(torch.bfloat16)
    for moe in moe_layers(model).values():
        moe.gate.float()
    save(model, tmp_path / "mixed")
    save_hf(model, tmp_path / "mixed_hf")
    assert same(load(tmp_path / "mixed"), model)
    assert same(load(tmp_path / "mixed_hf"), model)
    narrow = load(ours, dtype=torch.bfloat16).state_dict()
    wide = load(ours).state_dict()
    for name, t in narrow.items():
        assert t.dtype == (torch.float32 if name.endswith("bias") else torch.bfloat16)
        assert torch.equal(t, wide[name].to(t.dtype))


def test_loaded_weights_are_trainable_memory_of_their_own(ours, model):
    loaded = load(ours)
    loaded(torch.tensor([[1, 2, 3]])).sum().backward()
    assert loaded.head.weight.grad is not None
    with torch.no_grad():
        loaded.head.weight.zero_()  # a mapped file would refuse, or change
    assert same(load(ours), model)


def test_a_checkpoint_saves_over_itself(ours, model):
    save(load(ours), ours)
    assert same(load(ours), model)
    assert [p.name for p in ours.parent.iterdir()] == ["ours"]


@st.composite
def shapes(draw):
    """Small configs of every kind that both sides can hold."""

    def size(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    groups, per_group = size(1, 3), size(2, 4)
    layers = size(1, 3)
    sigmoid = draw(st.booleans())
    yarn = draw(st.booleans())
    return replace(
        V3, vocab_size=size(1, 9), dim=size(1, 9), inter_dim=size(1, 9), moe_inter_dim=size(1, 9),
        n_layers=layers, n_dense_layers=size(0, layers), n_heads=size(1, 3), q_lora_rank=size(0, 5),
        kv_lora_rank=size(1, 9), qk_nope_head_dim=size(1, 5), qk_rope_head_dim=2 * size(1, 3),
        v_head_dim=size(1, 5), n_routed_experts=groups * per_group, n_expert_groups=groups,
        n_limited_groups=1, n_activated_experts=size(1, per_group), n_shared_experts=size(0, 2),
        score_func="sigmoid" if sigmoid else "softmax", n_mtp_layers=size(0, 2), max_seq_len=40,
        original_seq_len=10 if yarn else 40, rope_factor=4.0 if yarn else 1.0,
        mscale=draw(st.sampled_from([1.0, 0.7])) if yarn else 1.0,
    )  # fmt: skip


@given(c=shapes(), shard=st.integers(1, 3000))
def test_any_shape_round_trips(tmp_path_factory, c, shard):
    folder = tmp_path_factory.mktemp("shape")
    model = randomize(Transformer(c))
    save_hf(model, folder / "theirs", shard_bytes=shard)
    save(model, folder / "ours", shard_bytes=shard)
    assert same(load(folder / "theirs"), model)
    assert same(load(folder / "ours"), model)
    shutil.rmtree(folder)


@given(c=shapes())
def test_a_model_on_meta_has_the_tensors_of_one_in_memory(c):
    want, got = Transformer(c).state_dict(), build_on_meta(c).state_dict()
    assert all(x.is_meta for x in got.values())
    assert [(n, x.shape, x.dtype) for n, x in got.items()] == [
        (n, x.shape, x.dtype) for n, x in want.items()
    ]


@given(c=shapes())
def test_every_name_is_its_own_place(c):
    state = build_on_meta(c).state_dict()
    names = [*chain.from_iterable(hf_names(name, c) for name in state)]
    assert len(set(names)) == len(names)
    rows = sum(len(t) if t.ndim == 3 else 1 for t in state.values())
    assert len(names) == rows


def test_experts_and_mtp_are_where_the_released_files_have_them(model, theirs):
    """Written out by hand, so that the table is not compared with itself."""
    stored = tensors(theirs)
    want = {
        "model.layers.1.mlp.experts.5.gate_proj.weight": model.layers["1"].ffn.experts.w1[5],
        "model.layers.2.mlp.experts.0.up_proj.weight": model.layers["2"].ffn.experts.w3[0],
        "model.layers.2.mlp.experts.15.down_proj.weight": model.layers["2"].ffn.experts.w2[15],
        "model.layers.1.mlp.gate.e_score_correction_bias": model.layers["1"].ffn.gate.bias,
        "model.layers.0.mlp.up_proj.weight": model.layers["0"].ffn.w3.weight,
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": model.layers["0"].attn.wkv_a.weight,
        "model.layers.3.eh_proj.weight": model.mtp["0"].eh_proj.weight,
        "model.layers.4.shared_head.norm.weight": model.mtp["1"].norm.weight,
        "model.layers.4.self_attn.q_a_proj.weight": model.mtp["1"].block.attn.wq_a.weight,
    }
    for name, t in want.items():
        assert torch.equal(stored[name], t), name


# ── Config ──

RELEASED = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3,
    "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
    "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                            "weight_block_size": [128, 128]},
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
                     "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
                     "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip


def test_the_released_config_is_v3():
    assert config_from_hf(RELEASED) == replace(V3, init_std=0.02)


def test_both_spellings_of_rope():
    old = {k: v for k, v in RELEASED.items() if not k.startswith("rope")}
    yarn = {k: v for k, v in RELEASED["rope_scaling"].items() if k != "type"}
    new = old | {"rope_parameters": yarn | {"rope_type": "yarn", "rope_theta": 10000}}
    assert config_from_hf(new) == config_from_hf(RELEASED)
    plain = old | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    want = replace(V3, init_std=0.02, rope_factor=1.0, rope_theta=500.0, original_seq_len=163840)
    assert config_from_hf(plain) == want
    assert config_from_hf(old | {"rope_theta": 500.0, "rope_scaling": None}) == want


@pytest.mark.parametrize("c", [V3, V2_LITE], ids=["V3", "V2-Lite"])
def test_config_there_and_back(c):
    assert config_from_hf(config_to_hf(c, torch.bfloat16)) == c


REFUSED = {  # field: a value, and what the sentence says
    "rope_interleave": (False, "rope_interleave is False; supported: True"),
    "attention_bias": (True, "attention_bias is True"),
    "hidden_act": ("gelu", "hidden_act is 'gelu'"),
    "tie_word_embeddings": (True, "tie_word_embeddings is True"),
    "scoring_func": ("softmax", "scoring_func is 'softmax'"),
    "topk_method": ("group_limited_greedy", "topk_method is 'group_limited_greedy'"),
    "norm_topk_prob": (False, "norm_topk_prob is False"),
    "num_key_value_heads": (8, "num_key_value_heads is 8; supported: 3"),
    "moe_layer_freq": (2, "moe_layer_freq is 2"),
    "model_type": ("llama", "type 'llama'; supported: deepseek_v3 or kimi_k2 or deepseek_v2"),
    "hidden_size": (None, "the field hidden_size is missing"),
    "n_group": (7, "n_expert_groups"),
    "routed_scaling_factor": ("big", "routed_scaling_factor must be a number, not 'big'"),
    "quantization_config": ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
    "rope_scaling": ({"type": "linear", "factor": 4}, "rope_type is 'linear'"),
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_config_we_do_not_implement_is_named(theirs, field):
    value, sentence = REFUSED[field]
    edit_config(theirs, **{field: value})
    with pytest.raises(UserError, match=sentence) as e:
        load(theirs)
    assert str(theirs / "config.json") in str(e.value)


@pytest.mark.parametrize(
    "change",
    [
        {"mscale": 0.7},
        {"mscale_all_dim": None},
        {"mscale": 0, "mscale_all_dim": 0},
        {"attention_factor": 1.2},
    ],
    ids=str,
)
def test_scaled_rotation_is_refused(change):
    """cos and sin keep their length only when mscale = mscale_all_dim."""
    yarn = RELEASED["rope_scaling"] | change
    with pytest.raises(UserError, match="mscale"):
        config_from_hf(RELEASED | {"rope_scaling": yarn})
    assert config_from_hf(RELEASED | {"rope_scaling": yarn | {"attention_factor": 1.0}})


def test_what_transformers_cannot_hold_is_not_written(micro, tmp_path):
    one_expert_per_group = replace(micro, n_expert_groups=16, n_limited_groups=4)
    with pytest.raises(UserError, match="two experts in each group"):
        save_hf(Transformer(one_expert_per_group), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_router_that_transformers_lacks_is_not_written(micro):
    config = replace(micro)
    object.__setattr__(config, "score_func", "other")  # `Config` accepts only the two that exist
    with pytest.raises(UserError, match="score_func is 'other'; supported: 'sigmoid' or 'softmax'"):
        config_to_hf(config, torch.bfloat16)


# ── FP8 ──


def blocks(shape: tuple[int, int]):
    """Row and column ranges of the 128×128 blocks; the last ones are ragged."""
    for o in range(0, shape[0], 128):
        for i in range(0, shape[1], 128):
            yield slice(o, o + 128), slice(i, i + 128), (o // 128, i // 128)


def quantize(w):
    """(codes, scales, what they stand for), block by block."""
    scale = torch.empty(ceil_div(w.shape[0], 128), ceil_div(w.shape[1], 128))
    q, meant = torch.empty(w.shape, dtype=FP8), torch.empty(w.shape)
    for o, i, at in blocks(w.shape):
        scale[at] = w[o, i].abs().max() / 448
        q[o, i] = (w[o, i] / scale[at]).to(FP8)
        meant[o, i] = q[o, i].float() * scale[at]
    return q, scale, meant


@pytest.fixture
def fp8(micro, tmp_path):
    """A directory with FP8 projections (576 × 200 among them) and what each weight stands for."""
    c = replace(
        micro, dim=200, inter_dim=130, moe_inter_dim=136, kv_lora_rank=512, qk_rope_head_dim=64,
        n_layers=2, n_mtp_layers=1, n_routed_experts=4, n_activated_experts=2, n_expert_groups=2,
        n_limited_groups=1,
    )  # fmt: skip
    save_hf(randomize(Transformer(c)), tmp_path / "fp8")
    stored, want = {}, {}
    for name, t in tensors(tmp_path / "fp8").items():
        high = t.ndim < 2 or "mlp.gate.weight" in name or "embed" in name or "lm_head" in name
        stored[name] = want[name] = t if high else None
        if not high:
            stored[name], stored[name + "_scale_inv"], want[name] = quantize(t)
            assert (want[name] - t).abs().max() < t.abs().max() / 16
    rewrite(tmp_path / "fp8", stored)
    return tmp_path / "fp8", want


def test_fp8_blocks_with_ragged_edges(fp8):
    directory, want = fp8
    assert want["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"].shape == (576, 200)
    model = load(directory)
    for name, t in model.state_dict().items():
        rows = t.unbind() if t.ndim == 3 else [t]
        for row, place in zip(rows, hf_names(name, model.config), strict=True):
            assert torch.equal(row, want[place]), place


def test_fp8_takes_the_dtype_of_the_embedding(fp8):
    directory, want = fp8
    stored = {k: t.bfloat16() if "embed_tokens" in k else t for k, t in tensors(directory).items()}
    rewrite(directory, stored)
    name = "model.layers.0.self_attn.o_proj.weight"
    attn = load(directory).layers["0"].attn
    assert attn.wo.weight.dtype == torch.bfloat16
    assert torch.equal(attn.wo.weight, want[name].bfloat16())
    assert torch.equal(load(directory, dtype=torch.float32).layers["0"].attn.wo.weight, want[name])


def test_fp8_without_its_scales(fp8):
    directory, _ = fp8
    stored, name = tensors(directory), "model.layers.0.self_attn.o_proj.weight_scale_inv"
    rewrite(directory, {k: t for k, t in stored.items() if k != name})
    with pytest.raises(UserError, match=f"FP8.*lacks {name}"):
        load(directory)
    rewrite(directory, stored | {name: stored[name][:1]})
    with pytest.raises(UserError, match="needs scales"):
        load(directory)


# ── MTP ──


def test_copies_of_embedding_and_head_in_mtp_layers_are_ignored(model, theirs):
    junk = {
        "model.layers.3.embed_tokens.weight": torch.ones(1),
        "model.layers.4.shared_head.head.weight": torch.ones(1),
    }
    rewrite(theirs, tensors(theirs) | junk)
    assert same(load(theirs), model)


def test_a_promise_of_mtp_that_is_not_kept(model, theirs):
    """transformers writes the field and drops the layers: load the main model, and say so."""
    stored = tensors(theirs)
    main = {
        k: t for k, t in stored.items() if not k.startswith(("model.layers.3", "model.layers.4"))
    }
    rewrite(theirs, main)
    with pytest.warns(UserWarning, match="no MTP layer"):
        loaded = load(theirs)
    assert loaded.config == replace(model.config, n_mtp_layers=0)
    rewrite(theirs, {k: t for k, t in stored.items() if not k.startswith("model.layers.4")})
    with pytest.raises(UserError, match="model.layers.4"):
        load(theirs)
    edit_config(theirs, num_nextn_predict_layers=0)
    with pytest.raises(UserError, match="does not call for: model.layers.3"):
        load(theirs)


# ── Broken directories ──


def cut(directory: Path) -> None:
    file = max(directory.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])


def drop_shard(directory: Path) -> None:
    max(directory.glob("model-*.safetensors")).unlink()


def change_tensor(change):
    def breaks(directory: Path) -> None:
        stored = tensors(directory)
        change(stored)
        rewrite(directory, stored)

    return breaks


def edit_index(**fields):
    def breaks(directory: Path) -> None:
        path = next(directory.glob("*.index.json"))
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return breaks


WO = "model.layers.1.self_attn.o_proj.weight"
EXPERT = "model.layers.1.mlp.experts.3.gate_proj.weight"
BROKEN = {
    "missing": (shutil.rmtree, "there is no directory .*theirs"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    "no json": (lambda d: (d / "config.json").write_text("{"), "config.json is not JSON"),
    "a list": (lambda d: (d / "config.json").write_text("[]"), "not a list"),
    "no index": (lambda d: next(d.glob("*.index.json")).unlink(), "neither model.safetensors nor"),
    "cut off": (cut, "safetensors is damaged or cut off .*copy it again"),
    "no shard": (drop_shard, "model-0.* is named in .*index.json but is not there"),
    "no map": (edit_index(weight_map=[]), "index.json has no weight_map"),
    "outside": (
        edit_index(weight_map={WO: "../x.safetensors"}),
        "'../x.safetensors' is not the name of a safetensors file in this directory",
    ),
    "absolute": (edit_index(weight_map={WO: "/etc/passwd"}), "'/etc/passwd' is not the name"),
    "a number": (edit_index(weight_map={WO: 1}), "1 is not the name of a safetensors file"),
    "no tensor": (change_tensor(lambda t: t.pop(WO)), f"lacks {WO}"),
    "shape": (
        change_tensor(lambda t: t.update({WO: torch.ones(24, 17)})),
        rf"{WO} has shape \(24, 17\), but config.json asks for \(24, 18\)",
    ),
    "one expert's shape": (
        change_tensor(lambda t: t.update({EXPERT: torch.ones(8, 23)})),
        rf"{EXPERT} has shape \(8, 23\), .* asks for \(8, 24\)",
    ),
    "dtype": (
        change_tensor(lambda t: t.update({WO: t[WO].to(torch.int8)})),
        f"{WO} is stored as I8",
    ),
    "stray tensor": (
        change_tensor(lambda t: t.update({WO.replace("weight", "bias"): torch.ones(24)})),
        "does not call for: model.layers.1.self_attn.o_proj.bias",
    ),
    "layers without end": (
        lambda d: edit_config(d, num_hidden_layers=10**9),
        "asks for 1,000,000,00. layers, but .* tensors are stored",
    ),
    "MTP layers without end": (
        lambda d: edit_config(d, num_nextn_predict_layers=10**9),
        "asks for 1,000,000,00. layers, but .* tensors are stored",
    ),
    "experts without end": (
        lambda d: edit_config(d, n_routed_experts=10**9),
        "asks for 1,000,000,000 experts per layer, but",
    ),
    "beyond 64 bits": (lambda d: edit_config(d, hidden_size=10**30), "dim must be at most 21474"),
    "vocabulary": (lambda d: edit_config(d, vocab_size=60), "61 rows, but vocab_size .* is 60"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_directories(theirs, how):
    breaks, sentence = BROKEN[how]
    breaks(theirs)
    with pytest.raises(UserError, match=sentence) as e:
        load(theirs)
    assert "\n" not in str(e.value)


def test_broken_directories_of_ours(ours, tmp_path):
    shutil.copytree(ours, tmp_path / "whole")
    edit_config(ours, dimm=3)
    with pytest.raises(UserError, match="unknown config field 'dimm'.*did you mean dim"):
        load(ours, verify=False)
    with pytest.raises(DamageError, match="config.json is damaged"):
        load(ours)
    with pytest.raises(UserError, match="is a file"):
        load(ours / "config.json")
    with pytest.raises(UserError, match="could not write .*unchanged"):
        save(load(tmp_path / "whole"), ours / "config.json" / "x")


# ── All or nothing ──


def test_nobody_else_is_locked_out(ours):
    """safetensors writes files that only their owner may read; the directory's mode decides."""
    want = ours.stat().st_mode & 0o666
    assert {p.stat().st_mode & 0o777 for p in ours.iterdir()} == {want}


def fails(at: int, error: Exception):
    """A function that raises at its n-th call, before doing anything."""

    def wrap(real):
        calls = iter(range(1_000_000))

        def call(*args, **kwargs):
            if next(calls) == at:
                raise error
            return real(*args, **kwargs)

        return call

    return wrap


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("module", "name", "at"),
    [
        (safetensors_files, "save_file", 0),
        (safetensors_files, "save_file", 2),
        (os, "fsync", 0),
        (os, "fsync", 3),
        (os, "rename", 0),
        (os, "rename", 1),
    ],
)
def test_a_full_disk_leaves_the_checkpoint_before(model, ours, monkeypatch, module, name, at):
    with monkeypatch.context() as m:
        m.setattr(module, name, fails(at, FULL)(getattr(module, name)))
        with pytest.raises(UserError, match="No space left on device.*unchanged"):
            save(randomize(Transformer(model.config)), ours, shard_bytes=20_000)
    assert same(load(ours), model)
    assert [p.name for p in ours.parent.iterdir()] == ["ours"]


def test_a_real_limit_on_file_size(model, ours):
    """The kernel refuses the write, not a patch."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match="File too large"):
            save(model, ours)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert same(load(ours), model)


KILLED = """
import os, signal, sys
from dsv3_ref.checkpoints import native, safetensors_files
model = native.load(sys.argv[1])
writes = sys.argv[2] == "write"
module, name = (safetensors_files, "save_file") if writes else (os, "rename")
at = 2 if writes else 1
real, calls = getattr(module, name), iter(range(99))
def call(*args, **kwargs):
    if next(calls) == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(module, name, call)
native.save(model, sys.argv[1], shard_bytes=20_000)
"""


@pytest.mark.parametrize("when", [pytest.param("write", marks=pytest.mark.full), "rename"])
def test_kill_9(model, ours, when):
    """Killed while writing, and between the two renames: the checkpoint before is still read."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(ours), when])
    assert done.returncode == -signal.SIGKILL
    assert same(load(ours), model)
    assert len(list(ours.parent.iterdir())) > 1  # it left something behind
    other = randomize(Transformer(model.config))
    save(other, ours)
    assert same(load(ours), other)
    assert [p.name for p in ours.parent.iterdir()] == ["ours"]


def test_sweep(model, ours):
    """What a killed run left goes; a directory set aside gets its name back; others stay."""
    parent = ours.parent
    (parent / ".x.dsv3-tmp").mkdir()
    (parent / ".config").mkdir()
    ours.rename(parent / ".ours.dsv3-old")
    atomic.clean_temp(parent)
    assert sorted(p.name for p in parent.iterdir()) == [".config", "ours"]
    assert same(load(ours), model)


def test_remove(ours):
    (ours.parent / ".ours.dsv3-tmp").mkdir()  # from a removal that was killed
    atomic.remove_dir(ours)
    assert not list(ours.parent.iterdir())


def test_other_files_travel_with_the_weights(model, tmp_path):
    """A trainer writes its own files beside the weights; both appear at once."""
    with atomic.atomic_dir(tmp_path / "step") as tmp:
        (tmp / "state.json").write_text("{}")
        assert not (tmp_path / "step").exists()
    assert (tmp_path / "step" / "state.json").read_text() == "{}"
    with pytest.raises(KeyboardInterrupt), atomic.atomic_dir(tmp_path / "step") as tmp:
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["step"]
