"""Rollouts by vLLM, the weights of the model in training brought over before each step.

The model goes to a Hugging Face directory on a disk that the engine's workers see, and each worker
reads it into its running model. vLLM computes in its own kernels and precision, so the log π that
it reports is not quite that of the trainer: `sampling_logp_difference` in metrics.jsonl says by
how much.
"""

from collections.abc import Iterator
from pathlib import Path

from dsv3_ref.checkpoints.huggingface import save_hf
from dsv3_ref.config import UserError

MISSING = "--rollout-backend vllm needs a machine with vLLM (pip install vllm) and a GPU for it"


class WeightSyncExtension:
    """The methods that vLLM adds to its workers, to load weights into the running model."""

    def sync_weights(self, folder: str) -> None:
        """Load the weights of a Hugging Face directory into the running model."""
        from safetensors.torch import load_file  # in the engine's process

        model = self.model_runner.model
        for path in sorted(Path(folder).glob("*.safetensors")):
            model.load_weights(load_file(path).items())
        for module in model.modules():  # MLA decodes with copies of wkv_b, made once
            renew = getattr(module, "process_weights_after_loading", None)
            if renew and type(module).__name__.endswith("Attention"):
                renew(self.model_runner.model_config.dtype)


class VllmRollouts:
    """A vLLM engine beside the model, called like `generate_rollouts` of chapter 16."""

    def __init__(self, model, folder: Path, tensor_parallel: int = 1, memory: float = 0.5):
        try:
            from vllm import LLM
        except ImportError:
            raise UserError(MISSING) from None
        self.folder, self.c = folder, model.config
        self.export(model)
        self.engine = LLM(
            model=str(folder), skip_tokenizer_init=True, dtype="bfloat16",
            max_model_len=self.c.max_seq_len, tensor_parallel_size=tensor_parallel,
            gpu_memory_utilization=memory, logprobs_mode="processed_logprobs",
            worker_extension_cls=f"{__name__}.{WeightSyncExtension.__name__}",
        )  # fmt: skip

    def export(self, model) -> None:
        """Write the model as a Hugging Face directory for the engine."""
        save_hf(model, self.folder)

    def refresh(self, model) -> None:
        """Update the engine's weights and drop its prefix cache, which belongs to the old ones."""
        self.export(model)
        self.engine.collective_rpc("sync_weights", args=(str(self.folder),))
        self.engine.reset_prefix_cache()

    def __call__(
        self, prompts: list[list[int]], group: int, max_new: int, end: int, temperature: float
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Return `group` consecutive answers to each prompt, and log π of each token as vLLM computed it."""
        from vllm import SamplingParams

        how = SamplingParams(
            n=group, temperature=temperature, max_tokens=max_new, stop_token_ids=[end],
            ignore_eos=True, detokenize=False, logprobs=0,
        )  # fmt: skip
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        found = list(self.iter_completions(self.engine.generate(asked, how, use_tqdm=False)))
        return [tokens for tokens, _ in found], [logp for _, logp in found]

    def iter_completions(self, outputs) -> Iterator[tuple[list[int], list[float]]]:
        """Yield (tokens, log π) of every answer, in the order of the prompts."""
        for output in outputs:
            for one in output.outputs:
                tokens = list(one.token_ids)
                yield tokens, [row[t].logprob for t, row in zip(tokens, one.logprobs)]
