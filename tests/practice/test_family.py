"""Released models of the family: each field of their config.json has a meaning here or is refused.

Sources of the cases: huggingface/transformers#44261 (ε of the latents' norms), vllm-project/vllm
#35515 (the same in vLLM), MoonshotAI's deployment guide (`model_type` set to kimi_k2).
"""

import copy
import json
import warnings
from dataclasses import replace

import pytest
import torch
from family import FAMILY, PARAMETERS, shrink
from support import HF, YARN, decode, hf_model, randomize
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from dsv3_ref.checkpoints.hf_config import (
    FIELDS,
    QUANTIZATION_FIELDS,
    ROPE_FIELDS,
    base_type,
    config_from_hf,
    config_to_hf,
)
from dsv3_ref.checkpoints.huggingface import save_hf
from dsv3_ref.checkpoints.native import load
from dsv3_ref.config import V2_LITE, V3, UserError, count_params
from dsv3_ref.decode import generate
from dsv3_ref.model import Transformer
from dsv3_ref.ops import IMPLS, rms_norm

pytestmark = pytest.mark.filterwarnings("ignore:.*has no MTP layer")


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


# ── Every field of every released config ──


@pytest.mark.parametrize("name", FAMILY)
def test_every_field_stands_in_the_table(name):
    values = FAMILY[name]
    assert set(values) <= set(FIELDS)
    assert set(values.get("rope_scaling") or {}) <= set(ROPE_FIELDS)
    assert set(values.get("quantization_config") or {}) <= set(QUANTIZATION_FIELDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = config_from_hf(values)
    if name in PARAMETERS:
        assert count_params(config).total == PARAMETERS[name]


def test_the_table_covers_what_transformers_writes():
    for cls in (DeepseekV3Config, DeepseekV2Config):
        assert set(cls().to_dict()) <= set(FIELDS)
    uses = {field.use for field in FIELDS.values()}
    assert uses == {"honored", "checked", "refused", "harmless"}


def test_released_configs_are_our_own_sizes():
    values = {name: config_from_hf(v | {"initializer_range": 0.006}) for name, v in FAMILY.items()}
    assert values["V3"] == values["V3.1"] == values["R1"] == V3
    assert values["V2-Lite"] == V2_LITE


# ── The same function as transformers, with all fields as released ──


def theirs_of(values: dict):
    """Return a random transformers model with these fields."""
    is_v2 = base_type(values) == "deepseek_v2"
    config_cls, cls = (
        (DeepseekV2Config, DeepseekV2ForCausalLM)
        if is_v2
        else (DeepseekV3Config, DeepseekV3ForCausalLM)
    )
    fields = {k: v for k, v in copy.deepcopy(values).items() if k not in ("model_type", "auto_map")}
    return randomize(cls(config_cls(**fields)))


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILY)
def test_logits_are_those_of_transformers(name, tmp_path):
    values = shrink(FAMILY[name])
    theirs = theirs_of(values)
    theirs.save_pretrained(tmp_path)
    x = torch.randint(61, (2, 40))
    want = theirs(x).logits
    (tmp_path / "config.json").write_text(json.dumps(values))  # as released, not as saved
    ours = load(tmp_path)
    assert ours.config.norm_eps == values["rms_norm_eps"]
    close(ours(x), want)
    close(decode(ours, x[:, :12], [5]), want[:, :12])


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}], ids=["latent", "no latent"])
def test_norms_of_latents_keep_their_own_epsilon(changes, tmp_path):
    """Moonlight and later Kimi-K2 have rms_norm_eps 1e-5; a large one makes the rule visible."""
    theirs, x = hf_model(rms_norm_eps=0.3, **changes), torch.randint(96, (2, 20))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    close(ours(x), theirs(x).logits)
    save_hf(randomize(ours), tmp_path / "ours")
    close(ours(x), DeepseekV3ForCausalLM.from_pretrained(tmp_path / "ours").eval()(x).logits)


PLAIN = {"rope_type": "default", "rope_theta": 500.0}
ROPES = {  # a file that went through several versions of transformers has both spellings
    "both: rope_scaling counts": {"rope_parameters": PLAIN, "rope_scaling": YARN},
    "both, and a third theta": {
        "rope_parameters": YARN, "rope_scaling": {"type": "default"}, "rope_theta": 70.0,
    },
    "an empty rope_scaling": {"rope_parameters": PLAIN, "rope_scaling": {}},
    "null rope_scaling": {"rope_parameters": PLAIN, "rope_scaling": None},
    "theta inside and outside": {"rope_parameters": PLAIN, "rope_theta": 70.0},
    "type and rope_type": {"rope_scaling": YARN | {"type": "linear"}},
    "no original length": {
        "rope_scaling": {
            k: v for k, v in YARN.items() if k != "original_max_position_embeddings"
        },
    },
    "factor 1": {"rope_scaling": YARN | {"factor": 1.0}},
}  # fmt: skip


def rewrite_config(directory, without: tuple[str, ...], **fields) -> None:
    """Remove fields from a config.json, then add some."""
    path = directory / "config.json"
    values = json.loads(path.read_text())
    values = {name: value for name, value in values.items() if name not in without} | fields
    path.write_text(json.dumps(values))


@torch.no_grad()
@pytest.mark.parametrize("fields", ROPES.values(), ids=ROPES)
def test_rope_is_chosen_as_in_transformers(fields, tmp_path):
    theirs = theirs_of(HF | fields | {"model_type": "deepseek_v3"})
    x = torch.randint(96, (1, 72))
    theirs.save_pretrained(tmp_path)
    rewrite_config(tmp_path, ("rope_parameters",), **fields)
    close(load(tmp_path)(x), theirs(x).logits)


@torch.no_grad()
def test_absent_groups_are_those_of_transformers(tmp_path):
    values = {k: v for k, v in HF.items() if k not in ("n_group", "topk_group")}
    theirs, x = theirs_of(values | {"model_type": "deepseek_v3"}), torch.randint(96, (1, 30))
    theirs.save_pretrained(tmp_path)
    rewrite_config(tmp_path, ("n_group", "topk_group"))
    ours = load(tmp_path)
    assert (ours.config.n_expert_groups, ours.config.n_limited_groups) == (8, 4)
    close(ours(x), theirs(x).logits)


# ── What is refused, in one sentence that names the field ──

REFUSED = {
    "V3.2": ({"model_type": "deepseek_v32"}, "'deepseek_v32'.*sparse attention"),
    "V4": ({"model_type": "deepseek_v4"}, "'deepseek_v4'.*compressed attention"),
    "V3.2 with an older type": ({"index_topk": 2048}, "index_topk belongs to a kind of model"),
    "Kimi K2.5 reads images": ({"model_type": "kimi_k25"}, "'kimi_k25'.*reads images"),
    "no type": ({"model_type": None}, "type None; supported"),
    "a list as type": ({"model_type": ["deepseek_v3"]}, "type \\['deepseek_v3'\\]; supported"),
    "a size in quotes": ({"hidden_size": "7168"}, "hidden_size must be a whole number, not '7168'"),
    "a fraction": ({"num_hidden_layers": 61.5}, "num_hidden_layers must be a whole number"),
    "true as a size": ({"n_group": True}, "n_group must be a whole number, not True"),
    "NaN": ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be finite"),
    "rope as a text": ({"rope_scaling": "yarn"}, "rope_scaling must be an object, not 'yarn'"),
    "rope's factor in quotes": (
        {"rope_scaling": YARN | {"factor": "40"}},
        "factor of rope_scaling must be a number, not '40'",
    ),
    "fp8 as a text": ({"quantization_config": "fp8"}, "quantization_config must be an object"),
    "AWQ": ({"quantization_config": {"quant_method": "awq"}}, "quant_method is 'awq'"),
    "int4 of Kimi-K2-Thinking": (
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
        "quant_method is 'compressed-tensors'",
    ),
    "other blocks": (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
        r"weight_block_size is \[64, 64\]",
    ),
    "static scales": (
        {"quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}},
        "activation_scheme is 'static'",
    ),
    "MTP in quotes": (
        {"num_nextn_predict_layers": "1"},
        "num_nextn_predict_layers must be a whole",
    ),
    "tied embeddings": ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
    "fewer key heads": ({"num_key_value_heads": 8}, "num_key_value_heads is 8; supported: 128"),
    "another head_dim": ({"head_dim": 192}, "head_dim is 192; supported: 64"),
    "MoE in every second layer": ({"moe_layer_freq": 2}, "moe_layer_freq is 2; supported: 1"),
    "a list of layers": ({"moe_layer_freq": [0, 1]}, r"moe_layer_freq is \[0, 1\]"),
    "groups without a limit": ({"topk_group": None}, "topk_group is missing beside n_group"),
    "half-split rotation": ({"rope_interleave": False}, "rope_interleave is False"),
    "linear scaling": ({"rope_scaling": {"type": "linear", "factor": 4}}, "rope_type is 'linear'"),
    "two original lengths": (
        {"original_max_position_embeddings": 8192},
        "original_max_position_embeddings is 8192; supported: 4096",
    ),
}


@pytest.mark.parametrize(("changes", "words"), REFUSED.values(), ids=REFUSED)
def test_a_config_that_is_not_implemented_is_refused_by_name(changes, words):
    with pytest.raises(UserError, match=words) as e:
        config_from_hf(FAMILY["V3"] | changes)
    assert "\n" not in str(e.value)


def test_unknown_fields_are_named_once():
    values = FAMILY["Moonlight"] | {"my_note": 1, "swiglu_limit": 7.0}
    with pytest.warns(UserWarning, match="fields without effect: my_note, swiglu_limit"):
        config_from_hf(values)
    odd = YARN | {"ramp": 2}
    with pytest.warns(UserWarning, match="ramp of rope_scaling"):
        config_from_hf(FAMILY["V3"] | {"rope_scaling": odd})


MTP_PROMISES = {"missing": (None, 1), "0": (0, 0), "1": (1, 1)}


@pytest.mark.parametrize(("promise", "layers"), MTP_PROMISES.values(), ids=MTP_PROMISES)
def test_mtp_layers_by_the_field_or_by_the_weights(promise, layers, micro, tmp_path):
    """A bf16 conversion of V3 leaves the field out; Moonlight says 0."""
    save_hf(Transformer(replace(micro, n_mtp_layers=layers)), tmp_path)
    said = {} if promise is None else {"num_nextn_predict_layers": promise}
    rewrite_config(tmp_path, ("num_nextn_predict_layers",), **said)
    assert load(tmp_path).config.n_mtp_layers == layers


def test_code_of_a_directory_is_not_executed(tmp_path, micro):
    """`auto_map` names Python files beside the weights, which transformers would run on request."""
    save_hf(Transformer(micro), tmp_path)
    trap = tmp_path / "modeling_deepseek.py"
    trap.write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nraise SystemExit(3)\n")
    auto_map = {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}
    rewrite_config(tmp_path, (), auto_map=auto_map)
    load(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_config_there_and_back_for_the_family():
    for name, values in FAMILY.items():
        config = config_from_hf(values)
        assert config_from_hf(config_to_hf(config, torch.bfloat16)) == config, name


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_directory_in_bf16_computes_without_warnings(dtype, tmp_path):
    """torch's “Mismatch dtype between input and weight” (pytorch/pytorch #167308)."""
    values = shrink(FAMILY["V3"])
    save_hf(randomize(Transformer(config_from_hf(values))).to(torch.bfloat16), tmp_path)
    model = load(tmp_path, dtype=dtype).eval()
    (tokens,) = generate(model, torch.tensor([[1, 2, 3]]), max_new_tokens=3).tolist()
    assert len(tokens) == 6
    x_d, weight_d = torch.randn(8), torch.randn(8).bfloat16()
    for x in (x_d, x_d.bfloat16(), x_d.double()):
        with torch.no_grad():
            fast, right = IMPLS["rms_norm"]["cpu"](x, weight_d, 1e-6), rms_norm(x, weight_d, 1e-6)
        assert fast.dtype == x.dtype and torch.allclose(fast, right, atol=1e-2)
