"""Rollouts by vLLM, whose weights are synchronized with the trained model before each step.

The model is written as a Hugging Face directory on a disk that the engine's workers can read, and
each worker loads it into its running model. vLLM has its own kernels and precision, so its log π
differs slightly from the trainer's; `sampling_logp_difference` in metrics.jsonl reports by how
much.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from dsv3_ref.checkpoints.huggingface import save_hf
from dsv3_ref.config import UserError
from dsv3_ref.model import Transformer

VLLM_MISSING = "--rollout-backend vllm needs a machine with vLLM and a GPU for it: pip install vllm"


class WeightSyncExtension:
    """The methods that vLLM adds to its workers, to load weights into the running model."""

    model_runner: Any  # of the worker; vLLM brings no types

    def sync_weights(self, folder: str) -> None:
        """Load the weights of a Hugging Face directory into the running model."""
        from safetensors.torch import load_file  # runs in the engine's process

        model = self.model_runner.model
        for path in sorted(Path(folder).glob("*.safetensors")):
            model.load_weights(load_file(path).items())
        for module in model.modules():  # MLA decodes with copies of wkv_b, which are made once
            copy_weights = getattr(module, "process_weights_after_loading", None)
            if copy_weights and type(module).__name__.endswith("Attention"):
                copy_weights(self.model_runner.model_config.dtype)


class VllmRollouts:
    """A vLLM engine beside the model, called like `generate_rollouts` of chapter 16."""

    def __init__(
        self, model: Transformer, folder: Path, tensor_parallel: int = 1, memory: float = 0.5
    ):
        try:
            from vllm import LLM
        except ImportError:
            raise UserError(VLLM_MISSING) from None
        self.folder = folder
        self.export(model)
        self.engine = LLM(
            model=str(folder), skip_tokenizer_init=True, dtype="bfloat16",
            max_model_len=model.config.max_seq_len, tensor_parallel_size=tensor_parallel,
            gpu_memory_utilization=memory, logprobs_mode="processed_logprobs",
            worker_extension_cls=f"{__name__}.{WeightSyncExtension.__name__}",
        )  # fmt: skip

    def export(self, model: Transformer) -> None:
        """Write the model as a Hugging Face directory for the engine."""
        save_hf(model, self.folder)

    def refresh(self, model: Transformer) -> None:
        """Update the engine's weights and drop its prefix cache, which belongs to the old ones."""
        self.export(model)
        self.engine.collective_rpc("sync_weights", args=(str(self.folder),))
        self.engine.reset_prefix_cache()

    def __call__(
        self,
        prompts: list[list[int]],
        num_generations: int,
        max_new_tokens: int,
        stop_token_ids: Collection[int],
        temperature: float,
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Sample `num_generations` consecutive completions of each prompt, and vLLM's log π."""
        from vllm import SamplingParams

        params = SamplingParams(
            n=num_generations, temperature=temperature, max_tokens=max_new_tokens,
            stop_token_ids=list(stop_token_ids), ignore_eos=True, detokenize=False, logprobs=0,
        )  # fmt: skip
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.engine.generate(requests, params, use_tqdm=False)
        completions = list(self.iter_completions(outputs))
        return [tokens for tokens, _ in completions], [logps for _, logps in completions]

    def iter_completions(self, outputs: list[Any]) -> Iterator[tuple[list[int], list[float]]]:
        """Yield (tokens, log π) of every completion in vLLM's `RequestOutput`s, in their order."""
        for output in outputs:
            for completion in output.outputs:
                tokens = list(completion.token_ids)
                yield tokens, [row[t].logprob for t, row in zip(tokens, completion.logprobs)]
