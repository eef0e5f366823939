"""transformers' DeepSeek-V3 and ours are the same function, through files in both directions."""

from dataclasses import replace

import pytest
import torch
from support import HF, YARN, decode, hf_model, randomize
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from dsv3_ref.checkpoints.huggingface import save_hf
from dsv3_ref.checkpoints.native import load
from dsv3_ref.mla import MLA
from dsv3_ref.model import Transformer
from dsv3_ref.mtp import mtp_hidden_states

pytestmark = pytest.mark.filterwarnings("ignore:.*has no MTP layer")
CASES = {
    "query latent, 2 of 4 groups": {},
    "no query latent, random bias": {"q_lora_rank": None, "bias_mean": 0.5},
    "yarn, negative bias": {"rope_parameters": YARN, "bias_mean": -2.0},
    "yarn with m = 0.7, no query latent": {
        "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7},
        "q_lora_rank": None,
        "n_shared_experts": 2,
    },
    "one group, scale 1": {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0},
    "all groups, negative bias": {"topk_group": 4, "bias_mean": -2.0, "first_k_dense_replace": 0},
    "groups of two, theta 500": {
        "n_group": 8,
        "topk_group": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    "one group of two, V3's own yarn": {
        "n_group": 2,
        "topk_group": 1,
        "qk_rope_head_dim": 64,
        "rope_parameters": YARN
        | {"rope_theta": 10_000, "factor": 40, "beta_fast": 32}
        | {"original_max_position_embeddings": 4096},
    },
}
LENGTH = 72  # past YARN's 64


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def theirs(request):
    return hf_model(**request.param)


def tokens(length: int = LENGTH, batch: int = 2):
    return torch.randint(HF["vocab_size"], (batch, length))


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def read_back(directory, cls=DeepseekV3ForCausalLM):
    """Load a directory with transformers; every tensor must have its place."""
    model, info = cls.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


@torch.no_grad()
def test_theirs_to_ours(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    for length in (1, 7, LENGTH):
        x = tokens(length)
        close(ours(x), theirs(x).logits)


@torch.no_grad()
def test_ours_to_theirs(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs")
    ours = randomize(load(tmp_path / "theirs"))  # their shape, our weights
    save_hf(ours, tmp_path / "ours")
    x = tokens()
    close(ours(x), read_back(tmp_path / "ours")(x).logits)


@torch.no_grad()
@pytest.mark.parametrize("absorb", [True, False, None])
def test_decoding(theirs, tmp_path, absorb):
    theirs.save_pretrained(tmp_path)
    ours, x = load(tmp_path), tokens(20)
    for module in ours.modules():
        if isinstance(module, MLA):
            module.absorb = absorb
    step = theirs(x[:, :5], use_cache=True)
    want = [step.logits]
    for i in range(5, 20):
        step = theirs(x[:, i : i + 1], past_key_values=step.past_key_values, use_cache=True)
        want.append(step.logits)
    close(decode(ours, x, [5]), torch.cat(want, dim=1))
    close(decode(ours, x, [3, 6]), torch.cat(want, dim=1))


@torch.no_grad()
def test_small_mistakes_show(tmp_path):
    """1e-5 is tight: biases with the wrong sign, a norm off by 0.1 %, experts off by one."""
    theirs = hf_model()
    theirs.save_pretrained(tmp_path)
    x = tokens()
    want = theirs(x).logits
    for break_it in (
        lambda m: m.layers["1"].ffn.gate.bias.neg_(),
        lambda m: m.layers["2"].attn.kv_norm.weight.mul_(1.001),
        lambda m: m.layers["1"].ffn.experts.w1.copy_(m.layers["1"].ffn.experts.w1.roll(1, 0)),
    ):
        ours = load(tmp_path)
        break_it(ours)
        assert (ours(x) - want).abs().max() > 1e-4


V2 = {k: v for k, v in HF.items() if k != "num_nextn_predict_layers"} | {"norm_topk_prob": False}
V2_CASES = {
    "V2-Lite": {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "V2": {"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0},
}


@torch.no_grad()
@pytest.mark.parametrize("changes", V2_CASES.values(), ids=V2_CASES.keys())
def test_softmax_gate_of_v2(tmp_path, changes):
    config = DeepseekV2Config(**V2 | changes, rope_parameters=YARN)
    theirs, x = randomize(DeepseekV2ForCausalLM(config)), tokens()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    close(ours(x), theirs(x).logits)
    save_hf(randomize(ours), tmp_path / "ours")
    close(ours(x), read_back(tmp_path / "ours", DeepseekV2ForCausalLM)(x).logits)


def mtp_logits(ours, theirs, x):
    """Return (ours, theirs) for every depth; their positions count from the embedded token."""
    h, draft = theirs.model(x).last_hidden_state, MtpModel.from_pretrained(theirs)
    pairs = []
    for k, (mine, _) in enumerate(mtp_hidden_states(ours, ours.hidden_states(x)[0], x), start=1):
        s = x.shape[1] - k
        position = torch.arange(k, k + s)[None]
        h = draft.forward_layer(k - 1, h[:, :s], position, None, input_ids=x[:, k:])
        pairs.append((ours.head(mine), draft._project_to_logits(h)))
    return pairs


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("changes", [{}, {"rope_parameters": YARN, "q_lora_rank": None}])
def test_mtp(tmp_path, monkeypatch, depth, changes):
    """transformers looks for MTP at V3's layer 61 only; here the last layer is the third."""
    layers = [rf"model\.layers\.{3 + k}.*" for k in range(depth)]
    monkeypatch.setattr(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", layers)
    ours = with_mtp(hf_model(**changes, num_nextn_predict_layers=depth), depth, tmp_path)
    x = tokens(16)
    pairs = mtp_logits(ours, read_back(tmp_path / "ours"), x)
    assert len(pairs) == depth
    for mine, yours in pairs:
        close(mine, yours)


def with_mtp(theirs, depth: int, tmp_path):
    """Write a random model of theirs' shape with MTP modules for transformers; return it."""
    theirs.save_pretrained(tmp_path / "theirs")
    config = replace(load(tmp_path / "theirs").config, n_mtp_layers=depth)
    ours = randomize(Transformer(config))
    save_hf(ours, tmp_path / "ours")
    return ours


@torch.no_grad()
def test_sixty_one_layers(tmp_path):
    """V3's depth, nothing patched: transformers takes layer 61 for MTP and reports no stray key."""
    narrow = {"hidden_size": 16, "num_hidden_layers": 61, "first_k_dense_replace": 60}
    ours = with_mtp(hf_model(**narrow), 1, tmp_path)
    theirs, x = read_back(tmp_path / "ours"), tokens(12)
    [(mine, yours)] = mtp_logits(ours, theirs, x)
    close(mine, yours)
    close(ours(x), theirs(x).logits)
