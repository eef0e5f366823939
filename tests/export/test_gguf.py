"""GGUF files beside llama.cpp's own tables: names, shapes, metadata, tokens, stored kinds.

llama.cpp itself, where llama-cpp-python is installed, writes the same greedy text.
"""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from miniruns import prose
from support import randomize

from dsv3_ref.checkpoints.native import load, save
from dsv3_ref.cli.main import main
from dsv3_ref.config import UserError
from dsv3_ref.data import tokenizer as tok
from dsv3_ref.decode import generate
from dsv3_ref.export.gguf_file import check_shape, read_vocabulary
from dsv3_ref.export.tokenizer_files import CHAT_TEMPLATE
from dsv3_ref.model import Transformer

gguf = pytest.importorskip("gguf", reason="pip install 'dsv3-ref[gguf]'")


@pytest.fixture(scope="module")
def run(micro, tmp_path_factory):
    """Return a run whose rows are multiples of 32, except in the keys' half of wkv_b."""
    rng = random.Random(0)
    tokenizer = tok.train_tokenizer([prose(rng, 200) for _ in range(20)], 400)
    config = replace(
        micro, vocab_size=tok.vocab_size(tokenizer) + 3, dim=64, inter_dim=96, moe_inter_dim=32,
        q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32,
        max_seq_len=128, original_seq_len=32, n_mtp_layers=1,
    )  # fmt: skip
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("run") / "model"
    save(with_clear_choices(randomize(Transformer(config)), tokenizer), folder)
    tok.save_tokenizer(tokenizer, folder / "tokenizer.json")
    return folder


@torch.no_grad()
def with_clear_choices(model: Transformer, tokenizer) -> Transformer:
    """Let each token of plain text have one clear successor, so that rounding changes no choice."""
    model.embed.weight.normal_()
    model.head.weight.zero_()
    texts = {i: text for text, i in tokenizer.get_vocab().items() if text.isascii()}
    plain = torch.tensor(sorted(i for i in texts if i >= len(tok.SPECIAL)))
    model.head.weight[plain[torch.randperm(len(plain))]] = model.embed.weight[plain]
    return model


def export(run: Path, tmp_path: Path, kind: str) -> Path:
    path = tmp_path / f"{kind}.gguf"
    assert main(["export", str(run), "--gguf", str(path), "--gguf-type", kind]) == 0
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    return path


def field(reader, name: str):
    return reader.fields[name].contents()


def test_names_are_in_llama_cpps_table(run, tmp_path):
    """The table of the gguf package is the one that llama.cpp loads by."""
    tensors = gguf.MODEL_TENSORS[gguf.MODEL_ARCH.DEEPSEEK2]
    known = {gguf.TENSOR_NAMES[tensor] for tensor in tensors}
    reader = gguf.GGUFReader(export(run, tmp_path, "bf16"))
    bases = {t.name.rpartition(".")[0] for t in reader.tensors}
    generic = set()
    for base in bases:
        parts = base.split(".")
        generic.add(".".join(["blk", "{bid}", *parts[2:]]) if parts[0] == "blk" else base)
    assert generic <= known
    # of llama.cpp's loader for deepseek2: what it requires for a query latent and MLA
    needed = "attn_norm attn_q_a_norm attn_kv_a_norm attn_q_a attn_q_b attn_kv_a_mqa attn_k_b"
    needed += " attn_v_b attn_output ffn_norm ffn_gate_inp exp_probs_b ffn_gate_exps ffn_down_exps"
    needed += " ffn_up_exps ffn_gate_shexp ffn_down_shexp ffn_up_shexp"
    assert {f"blk.2.{name}" for name in needed.split()} == {b for b in bases if "blk.2." in b}
    assert not any("blk.3." in b for b in bases)


def test_values_and_shapes(run, tmp_path):
    model, reader = load(run), gguf.GGUFReader(export(run, tmp_path, "bf16"))
    stored = {t.name: t for t in reader.tensors}
    c, attn = model.config, model.layers["1"].attn

    def values(name: str) -> torch.Tensor:
        t = stored[name]
        array = gguf.quants.dequantize(t.data, t.tensor_type)
        return torch.from_numpy(np.array(array)).view(*reversed(t.shape.tolist()))

    assert stored["blk.1.attn_k_b.weight"].shape.tolist() == [16, 32, 3]
    assert stored["blk.1.attn_v_b.weight"].shape.tolist() == [32, 32, 3]
    k_b, v_b = values("blk.1.attn_k_b.weight"), values("blk.1.attn_v_b.weight")
    whole = torch.cat((k_b.transpose(1, 2), v_b), dim=1).reshape(-1, c.kv_lora_rank)
    assert torch.equal(whole, attn.wkv_b.weight.bfloat16().float())
    experts = model.layers["1"].ffn.experts.w2.bfloat16().float()
    assert torch.equal(values("blk.1.ffn_down_exps.weight"), experts)
    assert torch.equal(values("blk.1.exp_probs_b.bias"), model.layers["1"].ffn.gate.bias)
    assert torch.equal(values("output_norm.weight"), model.norm.weight)


def test_metadata(run, tmp_path):
    reader = gguf.GGUFReader(export(run, tmp_path, "bf16"))
    want = {
        "general.architecture": "deepseek2", "deepseek2.block_count": 3,
        "deepseek2.attention.head_count": 3, "deepseek2.attention.head_count_kv": 1,
        "deepseek2.attention.key_length": 48, "deepseek2.attention.value_length": 32,
        "deepseek2.attention.key_length_mla": 32, "deepseek2.attention.value_length_mla": 32,
        "deepseek2.expert_gating_func": 2, "deepseek2.expert_weights_norm": True,
        "deepseek2.expert_group_count": 4, "deepseek2.expert_group_used_count": 2,
        "deepseek2.leading_dense_block_count": 1, "deepseek2.rope.scaling.type": "yarn",
        "deepseek2.rope.scaling.original_context_length": 32, "deepseek2.context_length": 128,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "deepseek-v3",
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True, "tokenizer.chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    assert {name: field(reader, name) for name in want} == want
    assert field(reader, "deepseek2.rope.scaling.yarn_log_multiplier") == pytest.approx(0.1)
    assert field(reader, "deepseek2.attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    own = tok.load_tokenizer(run)
    tokens, kinds = (field(reader, f"tokenizer.ggml.{n}") for n in ("tokens", "token_type"))
    assert len(tokens) == len(kinds) == tok.vocab_size(own) + 3
    assert [own.token_to_id(token) for token in tokens[:-3]] == [*range(len(tokens) - 3)]
    assert kinds[:9] == [3] * 9
    assert (kinds[9], kinds[-3:]) == (1, [5] * 3)


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_stored_kinds(kind, run, tmp_path):
    reader = gguf.GGUFReader(export(run, tmp_path, kind))
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert kinds["blk.1.attn_norm.weight"] == kinds["blk.1.ffn_gate_inp.weight"] == "F32"
    assert kinds["blk.1.exp_probs_b.bias"] == "F32"
    assert kinds["token_embd.weight"] == kinds["blk.1.ffn_up_exps.weight"] == kind.upper()
    assert kinds["blk.1.attn_k_b.weight"] == "F16"  # rows of 16, half of a block


def test_what_llama_cpp_cannot_hold_is_refused(micro):
    for changes, words in (
        ({"n_layers": 27}, "27 layers for one without query latent"),
        ({"n_shared_experts": 0}, "needs a shared expert"),
        ({"n_expert_groups": 16, "n_limited_groups": 4}, "two experts in each group"),
    ):
        with pytest.raises(UserError, match=words):
            check_shape(replace(micro, **changes))
    other = tok.new_tokenizer()
    other.pre_tokenizer = tok.pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match="does not split texts like V3's"):
        read_vocabulary(other, 10)


def test_a_file_in_its_place_is_kept(run, tmp_path, capsys):
    (tmp_path / "a.gguf").write_text("precious")
    assert main(["export", str(run), "--gguf", str(tmp_path / "a.gguf")]) == 2
    assert "exists: choose a new name" in capsys.readouterr().err
    assert (tmp_path / "a.gguf").read_text() == "precious"
    assert main(["export", str(run), "--gguf", str(tmp_path / "no" / "a.gguf")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert main(["export", str(run)]) == 2
    assert "name a directory, or a file with --gguf" in capsys.readouterr().err


# Mean error of logits over their mean size, twice what was measured; rounding flips some experts.
ERRORS = {"f16": 0.002, "bf16": 0.015, "q8_0": 0.04}


@torch.no_grad()
@pytest.mark.parametrize("kind", ERRORS)
def test_llama_cpp_writes_the_same_text(kind, run, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")
    model, own = load(run), tok.load_tokenizer(run)
    rng = random.Random(1)
    path = str(export(run, tmp_path, kind))
    llm = llama_cpp.Llama(path, n_ctx=256, n_threads=1, verbose=False, logits_all=True)
    errors: list[torch.Tensor] = []
    for _ in range(20):
        prompt = prose(rng, 6).strip()
        tokens = [0, *own.encode(prompt, add_special_tokens=False).ids]
        assert llm.tokenize(prompt.encode()) == tokens
        want = own.decode(generate(model, torch.tensor([tokens]), 16)[0, len(tokens) :].tolist())
        got = llm(prompt, max_tokens=16, temperature=0.0)["choices"][0]["text"]
        assert got == want
        logits = torch.tensor(np.array(llm.scores[: len(tokens)]))
        theirs = model(torch.tensor([tokens]))[0]
        errors.append((logits - theirs).abs().mean() / theirs.abs().mean())
    assert torch.stack(errors).mean() < ERRORS[kind]
