"""Directories of models as they lie around: leftovers, half copies, other people's exports."""

import json
import shutil

import pytest
import torch
from chat_forms import FORMS, ChatForm, form_tokenizer, write_form
from family import FAMILY, FP8, shrink
from safetensors.torch import load_file, save_file
from support import randomize

from dsv3_ref.checkpoints.hf_config import config_from_hf
from dsv3_ref.checkpoints.huggingface import save_hf
from dsv3_ref.checkpoints.native import load
from dsv3_ref.cli.main import main
from dsv3_ref.config import UserError
from dsv3_ref.data.tokenizer import vocab_size
from dsv3_ref.model import Transformer

FIRST = "model-00001-of-"


@pytest.fixture
def model(tmp_path):
    """A directory with weights in several files."""
    torch.manual_seed(0)
    folder = tmp_path / "model"
    config = config_from_hf(shrink(FAMILY["V3"]))
    save_hf(randomize(Transformer(config)).to(torch.bfloat16), folder, shard_bytes=30_000)
    return folder


def weights(folder) -> torch.Tensor:
    return load(folder).head.weight


def first_shard(folder):
    return next(folder.glob(f"{FIRST}*"))


def test_a_single_file_beside_an_index_is_refused(model):
    """Blaizzy/mlx-vlm #1329: a quantized model.safetensors lay beside the shards, and was read."""
    shutil.copyfile(first_shard(model), model / "model.safetensors")
    with pytest.raises(UserError, match="has model.safetensors and also .*: remove the one"):
        load(model)
    (model / "model.safetensors.index.json").unlink()
    for shard in model.glob("model-*"):
        shard.unlink()
    with pytest.raises(UserError, match="lacks"):  # the rest of the model
        load(model)


def test_an_index_may_name_the_single_file(model, tmp_path):
    merged = {}
    for shard in sorted(model.glob("model-*")):
        merged |= load_file(shard)
        shard.unlink()
    save_file(merged, model / "model.safetensors")  # without metadata: hiyouga/LlamaFactory #6843
    index = {"weight_map": dict.fromkeys(merged, "model.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(weights(model), merged["lm_head.weight"])


def test_what_the_index_does_not_name_is_not_read(model):
    """Another model's shards, an adapter, a consolidated copy in the same folder."""
    right = weights(model)
    for name in (
        "adapter_model.safetensors",
        "consolidated.safetensors",
        "model-00001-of-00099.safetensors",
    ):
        save_file({"lm_head.weight": torch.zeros_like(right)}, model / name)
    assert torch.equal(weights(model), right)


def test_a_missing_shard_is_named(model):
    """sgl-project/sglang #32279: the server started, with uninitialized weights; CoSER #3."""
    shard = first_shard(model)
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is named in .* but is not there"):
        load(model)


def test_a_stub_of_git_lfs_is_named(model):
    """A clone without git lfs has pointers of 130 bytes in the place of weights."""
    stub = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    first_shard(model).write_text(stub)
    with pytest.raises(UserError, match="is damaged or cut off"):
        load(model)


def test_quantization_settings_that_were_left_behind(model):
    """deepseek-ai/DeepSeek-V3 #190, sgl-project/sglang #7593: bf16 weights, a config of FP8."""
    right = weights(model)
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(values | {"quantization_config": FP8}))
    assert torch.equal(weights(model), right)


def test_fp8_weights_without_their_scales_are_refused(model):
    """FP8 weights whose scales a conversion has dropped are not numbers of the model."""
    shard = first_shard(model)
    tensors = load_file(shard)
    name = next(k for k, v in tensors.items() if v.ndim == 2 and "proj" in k)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, shard)
    with pytest.raises(UserError, match="FP8 weights but lacks .*_scale_inv"):
        load(model)


def test_a_tokenizer_that_is_larger_than_the_model(model, capsys):
    """huggingface/transformers #12763, tokenizers #1609: IndexError: index out of range in self."""
    write_form(model, FORMS["V3"])  # some 300 tokens beside 61 rows
    assert main(["generate", str(model), "--prompt", "a fine day"]) == 2
    assert "but the model has only 61: use the tokenizer" in capsys.readouterr().err


# ── GGUF ──


def exported(tmp_path, **config) -> dict:
    """Return the metadata of the GGUF file of a small model with this tokenizer_config.json."""
    gguf = pytest.importorskip("gguf", reason="pip install 'dsv3-ref[gguf]'")
    form = FORMS["V3"]
    values = shrink(FAMILY["V3"], vocab_size=vocab_size(form_tokenizer(form)))
    folder = tmp_path / "model"
    save_hf(randomize(Transformer(config_from_hf(values))), folder)
    write_form(folder, form, **config)
    out = tmp_path / "a.gguf"
    assert main(["export", str(folder), "--gguf", str(out)]) == 0
    return {name: field.contents() for name, field in gguf.GGUFReader(out).fields.items()}


@pytest.mark.parametrize("adds", [True, False])
def test_a_gguf_file_adds_the_begin_token_as_the_tokenizer_does(adds, tmp_path):
    """ggml-org/llama.cpp #3966: models that are not trained with it write nonsense."""
    found = exported(tmp_path, add_bos_token=adds)
    assert found["tokenizer.ggml.add_bos_token"] is adds
    assert found["tokenizer.chat_template"] == FORMS["V3"].template


@pytest.mark.parametrize("change", ["normalizer", "pre_tokenizer"])
def test_a_tokenizer_that_gguf_cannot_express_is_refused(change, tmp_path, capsys):
    """ggml-org/llama.cpp #8649 and #9927: “BPE pre-tokenizer was not recognized”."""
    pytest.importorskip("gguf", reason="pip install 'dsv3-ref[gguf]'")
    form = ChatForm(FORMS["V3"].template)
    values = shrink(FAMILY["V3"], vocab_size=vocab_size(form_tokenizer(form)))
    folder = tmp_path / "model"
    save_hf(randomize(Transformer(config_from_hf(values))), folder)
    write_form(folder, form)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    changes = {"normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Whitespace"}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {change: changes[change]}))
    assert main(["export", str(folder), "--gguf", str(tmp_path / "a.gguf")]) == 2
    assert "does not split texts like V3's" in capsys.readouterr().err
    assert not (tmp_path / "a.gguf").exists()
