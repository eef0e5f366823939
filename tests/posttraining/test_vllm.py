"""Rollouts by vLLM, against a stand-in with its calls: vLLM itself needs a GPU and is not here."""

import sys
from importlib import import_module
from types import ModuleType, SimpleNamespace

import pytest
import torch
from miniruns import metrics
from safetensors.torch import load_file
from test_rl import home, rl  # noqa: F401  a fixture

from dsv3_ref.checkpoints.huggingface import hf_names
from dsv3_ref.checkpoints.native import load
from dsv3_ref.config import UserError
from dsv3_ref.grpo import generate_rollouts
from dsv3_ref.model import Transformer
from dsv3_ref.posttraining.vllm_rollout import VllmRollouts


class Params(SimpleNamespace):
    """SamplingParams."""


class MLAAttention(SimpleNamespace):
    """Its module of that name."""


class Engine:
    """LLM: a model of its own, read from the directory; it changes by load_weights alone."""

    deaf = False  # an engine that keeps its old weights

    def __init__(self, model, skip_tokenizer_init, dtype, max_model_len, tensor_parallel_size,
                 gpu_memory_utilization, logprobs_mode, worker_extension_cls):  # fmt: skip
        assert skip_tokenizer_init and logprobs_mode == "processed_logprobs"
        module, _, name = worker_extension_cls.rpartition(".")
        self.worker = getattr(import_module(module), name)()
        self.model, self.reset = load(model, dtype=torch.float32), 0
        self.limits = max_model_len, tensor_parallel_size, gpu_memory_utilization
        mla = MLAAttention(process_weights_after_loading=self.absorb)
        self.worker.model_runner = SimpleNamespace(
            model=SimpleNamespace(load_weights=self.load_weights, modules=lambda: [mla]),
            model_config=SimpleNamespace(dtype=torch.float32),
        )
        self.absorb(torch.float32)

    def absorb(self, dtype):
        """The copies that MLA decodes with."""
        self.absorbed = {
            name: x.to(dtype, copy=True)
            for name, x in self.model.state_dict().items()
            if "wkv_b" in name
        }

    def load_weights(self, pairs):
        """From Hugging Face's names to ours."""
        if self.deaf:
            return
        found, c = dict(pairs), self.model.config
        with torch.no_grad():
            for name, x in self.model.state_dict().items():
                parts = hf_names(name, c)
                for row, part in zip(x.unbind() if len(parts) > 1 else [x], parts):
                    row.copy_(found[part])

    def collective_rpc(self, name, args):
        return [getattr(self.worker, name)(*args)]

    def reset_prefix_cache(self):
        self.reset += 1

    def generate(self, asked, how, use_tqdm):
        prompts = [a["prompt_token_ids"] for a in asked]
        self.model.load_state_dict(self.absorbed, strict=False)
        assert how.logprobs == 0 and how.ignore_eos and not how.detokenize
        found = generate_rollouts(self.model, prompts, how.n, how.max_tokens, how.stop_token_ids,
                         how.temperature)  # fmt: skip
        rows = [
            SimpleNamespace(token_ids=tuple(tokens), logprobs=[
                {t: SimpleNamespace(logprob=p), 10**9: None} for t, p in zip(tokens, logp)])
            for tokens, logp in zip(*found)
        ]  # fmt: skip
        return [SimpleNamespace(outputs=rows[i : i + how.n]) for i in range(0, len(rows), how.n)]


@pytest.fixture
def vllm(monkeypatch):
    fake = ModuleType("vllm")
    fake.LLM, fake.SamplingParams = Engine, Params
    monkeypatch.setitem(sys.modules, "vllm", fake)
    return fake


def test_answers_and_log_probabilities_come_through(vllm, micro, tmp_path):
    model = Transformer(micro)
    write = VllmRollouts(model, tmp_path / "hf")
    torch.manual_seed(0)
    got = write([[1, 2], [3]], 3, 6, {7}, 1.0)
    torch.manual_seed(0)
    assert got == generate_rollouts(model, [[1, 2], [3]], 3, 6, {7}, 1.0)


def test_by_default_the_engine_has_half_of_the_memory_of_one_gpu(vllm, micro, tmp_path):
    model = Transformer(micro)
    write = VllmRollouts(model, tmp_path / "hf")
    assert write.engine.limits == (micro.max_seq_len, 1, 0.5)
    write = VllmRollouts(model, tmp_path / "hf", tensor_parallel=8, memory=0.9)
    assert write.engine.limits == (micro.max_seq_len, 8, 0.9)


def test_the_engine_follows_the_model(vllm, micro, tmp_path):
    model = Transformer(micro)
    write = VllmRollouts(model, tmp_path / "hf")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    before = write([[1, 2]], 1, 6, {7}, 0.0)
    write.refresh(model)
    assert write.engine.reset == 1
    assert (
        write([[1, 2]], 1, 6, {7}, 0.0)
        == generate_rollouts(model, [[1, 2]], 1, 6, {7}, 0.0)
        != before
    )
    files = list((tmp_path / "hf").glob("*.safetensors"))
    assert any("experts" in " ".join(load_file(path)) for path in files)


def test_a_run_on_vllm(vllm, home, tmp_path):  # noqa: F811
    assert rl(home, tmp_path / "rl", "--rollout-backend", "vllm") == 0
    assert all(row["sampling_logp_difference"] < 1e-5 for row in metrics(tmp_path / "rl"))


def test_an_engine_with_old_weights_is_noticed(vllm, home, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(Engine, "deaf", True)
    argv = ["--rollout-backend", "vllm", "--lr", "0.1", "--min-lr", "0.1", "--max-kl", "100"]
    assert rl(home, tmp_path / "rl", *argv, "--max-sampling-logp-difference", "0.02") == 2
    assert "difference of log π between sampler and trainer became" in capsys.readouterr().err


def test_without_vllm_it_says_what_is_missing(micro, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="needs a machine with vLLM"):
        VllmRollouts(Transformer(micro), tmp_path / "hf")
