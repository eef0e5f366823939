"""Exported directories: the same function, text and conversations in transformers and lm-eval."""

import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from family import FAMILY, shrink
from miniruns import WORDS, prose
from safetensors.torch import load_file
from support import randomize
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from dsv3_ref.checkpoints.hf_config import config_from_hf
from dsv3_ref.checkpoints.huggingface import save_hf
from dsv3_ref.checkpoints.native import load, save
from dsv3_ref.cli.main import main
from dsv3_ref.config import ceil_div
from dsv3_ref.data import tokenizer as tok
from dsv3_ref.export.command import ExportConfig, run_export
from dsv3_ref.fp8 import weight_dequant
from dsv3_ref.model import Transformer
from dsv3_ref.sft import render_conversation

PROMPTS = ["the sea was calm", "A light, far off:", "Number 3. 12 ships"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, micro_with_text):
    """Return a directory as a run leaves it: our own format, with its tokenizer."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer, config = micro_with_text
    torch.manual_seed(1)
    save(randomize(Transformer(config)), folder / "model")
    tok.save_tokenizer(tokenizer, folder / "model" / "tokenizer.json")
    return folder / "model"


@pytest.fixture(scope="module")
def micro_with_text(micro):
    rng = random.Random(0)
    tokenizer = tok.train_tokenizer([prose(rng, 200) for _ in range(20)], 400)
    config = replace(micro, vocab_size=tok.vocab_size(tokenizer), max_seq_len=128, n_mtp_layers=1)
    return tokenizer, config


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "out"
    assert main(["export", str(run), str(out), "--dtype", "float32"]) == 0
    return out


def stored(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def our_text(capsys, directory: Path, prompt: str) -> str:
    argv = ["generate", str(directory), "--prompt", prompt, "--temperature", "0"]
    capsys.readouterr()
    assert main([*argv, "--max-new-tokens", "20"]) == 0
    return capsys.readouterr().out.removesuffix("\n")


# ── Others read it ──


def test_transformers_writes_the_same_text(run, exported, capsys):
    """The begin token comes from tokenizer.json, the end token from generation_config.json."""
    write = pipeline("text-generation", str(exported), dtype=torch.float32)
    for prompt in PROMPTS:
        want = our_text(capsys, run, prompt)
        [theirs] = write(prompt, max_new_tokens=20, do_sample=False)
        assert theirs["generated_text"] == want
        assert our_text(capsys, exported, prompt) == want


def test_lm_eval_scores_the_same(run, exported):
    hf = pytest.importorskip("lm_eval.models.huggingface")
    from dsv3_ref.evaluation.lm_eval_adapter import DSV3LM
    from dsv3_ref.posttraining.policy import Policy

    pairs = [(prompt, f" {WORDS[i]} {WORDS[i + 3]}") for i, prompt in enumerate(PROMPTS)]
    requests = [SimpleNamespace(args=pair) for pair in pairs]
    ours = DSV3LM(Policy.from_pretrained(run)).loglikelihood(requests, disable_tqdm=True)
    lm = hf.HFLM(str(exported), dtype="float32", device="cpu", add_bos_token=True)
    theirs = lm.loglikelihood(requests, disable_tqdm=True)
    for (mine, _), (yours, _) in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(yours, abs=1e-4)


TALKS = {
    "a question": [{"role": "user", "content": "the sea?"}],
    "with a system text": [
        {"role": "system", "content": "be calm\n"},
        {"role": "user", "content": "ships "},
    ],
    "an answer": [
        {"role": "user", "content": "old;"},
        {"role": "assistant", "content": " gulls"},
    ],
    "three turns": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": " b\n"},
    ],
    "braces": [{"role": "user", "content": "{{ messages }} {% if %} <b> 'x'"}],
}


@pytest.mark.parametrize("messages", TALKS.values(), ids=TALKS)
def test_the_chat_template_renders_our_conversations(messages, run, exported):
    theirs = AutoTokenizer.from_pretrained(exported)
    own = tok.load_tokenizer(run)

    def encode(text: str) -> list[int]:
        return own.encode(text, add_special_tokens=False).ids

    want = render_conversation(messages, encode, tok.get_special_tokens(own))
    got = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert got == want
    prompt = theirs.apply_chat_template(messages, return_dict=False)
    assert prompt == (want[:-1] if messages[-1]["role"] == "user" else want)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant", "content": "first"}],
        [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
        [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}],
    ],
    ids=["the assistant begins", "two questions", "a tool"],
)
def test_the_chat_template_refuses_what_we_refuse(messages, exported):
    theirs = AutoTokenizer.from_pretrained(exported)
    with pytest.raises(Exception, match="alternate"):
        theirs.apply_chat_template(messages)


def test_what_the_directory_says(run, exported):
    config = json.loads((exported / "config.json").read_text())
    ids = {name: config[f"{name}_token_id"] for name in ("bos", "eos", "pad")}
    assert ids == {"bos": 0, "eos": 1, "pad": 2}
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert config["num_nextn_predict_layers"] == 1
    assert config["torch_dtype"] == "float32"
    assert json.loads((exported / "generation_config.json").read_text())["eos_token_id"] == 1
    assert (exported / "README.md").read_text().startswith("---\nlibrary_name: transformers\n")
    assert AutoTokenizer.from_pretrained(exported).model_max_length == 128
    assert {p.name for p in exported.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors",
        "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


# ── Weights ──


def test_bf16_is_the_default(run, tmp_path):
    run_export(ExportConfig(run, tmp_path / "out"))
    model = load(run)
    tensors = stored(tmp_path / "out")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert {n for n, x in tensors.items() if x.dtype != torch.bfloat16} == {
        n for n in tensors if n.endswith("e_score_correction_bias")
    }
    assert torch.equal(tensors[bias], model.layers["1"].ffn.gate.bias)
    assert torch.equal(tensors["lm_head.weight"], model.head.weight.bfloat16())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(loaded.lm_head.weight, tensors["lm_head.weight"])


def test_mtp_layers_have_copies_of_embedding_and_head(exported):
    tensors = stored(exported)
    for copy, original in {
        "model.layers.3.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.3.shared_head.head.weight": "lm_head.weight",
    }.items():
        assert torch.equal(tensors[copy], tensors[original])


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_fp8_in_blocks(scale_fmt, run, tmp_path):
    like = []
    if scale_fmt:  # V3.1's directory
        values = FAMILY["V3.1"] | {"num_nextn_predict_layers": 1}
        (tmp_path / "V3.1").mkdir()
        (tmp_path / "V3.1" / "config.json").write_text(json.dumps(values))
        like = ["--like", str(tmp_path / "V3.1")]
    assert main(["export", str(run), str(tmp_path / "out"), "--fp8", *like]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    assert config["quantization_config"].get("scale_fmt") == scale_fmt
    tensors, whole = stored(tmp_path / "out"), stored_fp32(run, tmp_path)
    codes = {n for n, x in tensors.items() if x.dtype == torch.float8_e4m3fn}
    kinds = {name.split(".")[-2] for name in codes}
    assert kinds == {
        "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj",
        "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    for name in codes:
        scales = tensors[name + "_scale_inv"]
        assert tuple(scales.shape) == tuple(ceil_div(n, 128) for n in tensors[name].shape)
        if scale_fmt:
            assert torch.equal(scales.log2(), scales.log2().round())
        error = weight_dequant(tensors[name], scales) - whole[name]
        assert error.abs().max() <= whole[name].abs().max() / 16
    assert load(tmp_path / "out").head.weight.dtype == torch.bfloat16


def stored_fp32(run: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    run_export(ExportConfig(run, tmp_path / "whole", dtype="float32"))
    return stored(tmp_path / "whole")


# ── Round trips ──


@pytest.mark.parametrize("name", FAMILY)
def test_a_directory_of_the_family_keeps_every_field_and_tensor(name, tmp_path):
    """Fine-tuned weights go back to where the model came from, and nothing else changes."""
    values = shrink(FAMILY[name]) | {"_note": "ours"}
    source = tmp_path / "source"
    config = config_from_hf({k: v for k, v in values.items() if k != "_note"})
    save_hf(randomize(Transformer(config)).to(torch.bfloat16), source)
    (source / "config.json").write_text(json.dumps(values))
    files = {
        "tokenizer.json": Tokenizer(models.BPE({"a": 0}, [])).to_str(),
        "tokenizer_config.json": '{"chat_template": "x"}',
        "generation_config.json": '{"temperature": 0.6}',
        "modeling_deepseek.py": "raise SystemExit(3)",
        "chat_template.jinja": "y",
    }
    for file, text in files.items():
        (source / file).write_text(text)
    with pytest.warns(UserWarning, match="_note"):
        assert main(["export", str(source), str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == values
    assert list(written) == list(values)
    before, after = stored(source), stored(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    for file, text in files.items():
        assert (tmp_path / "out" / file).read_text() == text


def test_like_another_directory_takes_the_shape_of_the_model(run, tmp_path):
    like = tmp_path / "like"
    like.mkdir()
    (like / "config.json").write_text(json.dumps(FAMILY["GigaChat3"]))
    (like / "tokenizer_config.json").write_text("{}")
    assert main(["export", str(run), str(tmp_path / "out"), "--like", str(like)]) == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(written)[:20] == list(FAMILY["GigaChat3"])[:20]
    assert (written["head_dim"], written["qk_head_dim"]) == (4, 12)
    assert (written["rope_theta"], written["dtype"]) == (10_000.0, "bfloat16")
    assert load(tmp_path / "out").config == load(run).config


# ── What is refused, with nothing left behind ──


def nonempty(tmp_path: Path, run: Path) -> list:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    return []


def like_v2(tmp_path: Path, run: Path) -> list:
    (tmp_path / "like").mkdir()
    (tmp_path / "like" / "config.json").write_text(json.dumps(FAMILY["V2"]))
    return ["--like", tmp_path / "like"]


def without_tokenizer(tmp_path: Path, run: Path) -> list:
    (run / "tokenizer.json").rename(run / "away")
    return []


def with_more_tokens(tmp_path: Path, run: Path) -> list:
    tokenizer = tok.load_tokenizer(run)
    tokenizer.add_tokens(["<added1>", "<added2>", "<added3>", "<added4>", "<added5>"])
    tok.save_tokenizer(tokenizer, run / "tokenizer.json")
    return []


REFUSALS = {
    "a directory with something in it": (nonempty, "out is not an empty directory"),
    "another kind": (like_v2, "--like .*like: it is a deepseek_v2, but the model a deepseek_v3"),
    "our own format": (lambda t, run: ["--like", run], "is not in Hugging Face format"),
    "a name with a typing mistake": (lambda t, run: ["--like", t / "nix"], "is not a directory"),
    # huggingface/transformers #27053: a tokenizer of 32,004 beside an embedding of 32,000 rows
    "more tokens than rows": (with_more_tokens, r"has \d+ tokens, the model only \d+: name a dir"),
    "more tokens than rows in GGUF": (
        lambda t, run: [*with_more_tokens(t, run), "--gguf", t / "model.gguf"],
        r"has \d+ tokens, the model only \d+: name a dir",
    ),
    "no tokenizer": (without_tokenizer, "has no tokenizer.json: name a directory"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refused_export_leaves_nothing(name, run, tmp_path, capsys):
    change, words = REFUSALS[name]
    model = tmp_path / "model"
    shutil.copytree(run, model)
    more = [str(x) for x in change(tmp_path, model)]
    before = sorted(tmp_path.rglob("*"))
    assert main(["export", str(model), str(tmp_path / "out"), *more]) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert re.search(words, error)
    assert sorted(tmp_path.rglob("*")) == before
