"""The objective of GRPO on rows of prompts with their completions (chapter 16)."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from dsv3_ref.grpo import GRPOOutput, grpo_loss
from dsv3_ref.posttraining.logprobs import chunked_logprobs
from dsv3_ref.rope import to_cu_seqlens
from dsv3_ref.training.objective import ModelInput, RowBatch, valid_places

SUMS = (  # over tokens
    "tokens", "kl", "clip_ratio", "entropy", "sampling_logp_difference", "sampler_weight",
)  # fmt: skip


@dataclass(frozen=True)
class RolloutRows(RowBatch):
    """Prompts with their completions end to end, padded at the end of each row.

    Log-probabilities are those of the completions' tokens, padded at the end, (b, t). Positions are
    counted instead of read off the special tokens, because a model may generate any token.
    """

    num_prompt_tokens_b: Tensor
    num_tokens_b: Tensor  # of prompt and completion
    advantage_b: Tensor
    sampled_logp_bt: Tensor  # when the tokens were sampled
    old_logp_bt: Tensor | None = None  # before the first of several optimizer steps
    ref_logp_bt: Tensor | None = None  # under the reference model

    @property
    def completion_mask_bt(self) -> Tensor:
        """The places of completions' tokens in log-probabilities; the others are padding."""
        return valid_places(self.sampled_logp_bt, self.num_tokens_b - self.num_prompt_tokens_b)


@dataclass
class GRPOObjective:
    """`grpo_loss` of a minibatch, as a mean over its rollouts, and the sums of its metrics.

    The fields from `num_rollouts` on describe the current minibatch; `start_minibatch` sets them.
    """

    temperature: float
    epsilon: tuple[float, float]  # below, above
    beta: float
    loss_type: str
    max_new_tokens: int
    sampler_cap: float  # of π_old / π_sampler, which weights the gain; 0: no correction
    sums: dict[str, Tensor | float] = field(default_factory=lambda: defaultdict(float))
    num_rollouts: int = 0
    num_live: int = 0  # those of them with a gradient
    mean_tokens: float = 0.0  # of a process
    trains_mtp: ClassVar[bool] = False

    def start_batch(self, has_reference: bool) -> None:
        """Reset the sums of metrics, which have the same names on all ranks."""
        self.sums = dict.fromkeys([*SUMS, *["kl_k1"] * has_reference], 0.0)

    def start_minibatch(self, num_rollouts: int, num_live: int, mean_tokens: float) -> None:
        """Set the sizes of the minibatch that follows."""
        self.num_rollouts, self.num_live = num_rollouts, num_live
        self.mean_tokens = mean_tokens

    def model_input(self, batch: RolloutRows) -> ModelInput:
        """Return the rollouts without their padding, as one row of samples."""
        is_token_bs = valid_places(batch.rows_bs, batch.num_tokens_b)
        cu_seqlens = to_cu_seqlens(batch.num_tokens_b.tolist(), batch.rows_bs.device)
        return ModelInput(batch.rows_bs[is_token_bs][None], cu_seqlens)

    def loss_weight(self, batch: RolloutRows) -> int:
        """Return the number of rollouts."""
        return len(batch)

    def logprobs(self, h_1nd: Tensor, head_wd: Tensor, batch: RolloutRows) -> tuple[Tensor, Tensor]:
        """Return log π of the completions' tokens, (b, t), and the entropies end to end, (n,)."""
        rows_bs = batch.rows_bs
        is_token_bs = valid_places(rows_bs, batch.num_tokens_b)
        is_prompt_bs = valid_places(rows_bs, batch.num_prompt_tokens_b)
        mask_n = ~is_prompt_bs[is_token_bs][1:]
        y_n = rows_bs[is_token_bs][1:][mask_n]
        logp_n, entropy_n = chunked_logprobs(h_1nd[0, :-1][mask_n], head_wd, y_n, self.temperature)
        mask_bt = batch.completion_mask_bt
        return logp_n.new_zeros(mask_bt.shape).masked_scatter(mask_bt, logp_n), entropy_n

    def read_logprobs(self, h_1nd: Tensor, head_wd: Tensor, batch: RolloutRows) -> Tensor:
        """Return log π of the completions' tokens, (b, t)."""
        return self.logprobs(h_1nd, head_wd, batch)[0]

    def loss(self, h_1nd: Tensor, head_wd: Tensor, batch: RolloutRows) -> Tensor:
        """Return the loss of a micro-batch as its part of the mean over all rollouts."""
        if not len(batch):
            return h_1nd.sum()
        logp_bt, entropy_n = self.logprobs(h_1nd, head_wd, batch)
        old_bt = logp_bt.detach() if batch.old_logp_bt is None else batch.old_logp_bt
        output = grpo_loss(
            logp_bt, old_bt, batch.ref_logp_bt, batch.advantage_b, batch.completion_mask_bt,
            self.epsilon, self.beta, self.loss_type, self.normalizer(len(batch)),
            batch.sampled_logp_bt if self.sampler_cap else None, self.sampler_cap,
        )  # fmt: skip
        self.add_metrics(logp_bt.detach(), entropy_n.detach(), batch, output)
        weight = 1.0 if self.loss_type == "dapo" else self.num_live / self.num_rollouts
        return output.loss * weight

    def normalizer(self, num_rollouts: int) -> float | None:
        """Return the `normalizer` of `grpo_loss` for a micro-batch of so many rollouts."""
        if self.loss_type == "dapo":
            return self.mean_tokens * num_rollouts / self.num_live
        return self.max_new_tokens if self.loss_type == "dr_grpo" else None

    def add_metrics(
        self, logp_bt: Tensor, entropy_n: Tensor, batch: RolloutRows, output: GRPOOutput
    ) -> None:
        """Add the metrics of a micro-batch to the sums over tokens."""
        n, mask_bt = len(entropy_n), batch.completion_mask_bt
        self.sums["tokens"] += n
        self.sums["kl"] += n * output.kl
        self.sums["clip_ratio"] += n * output.clip_ratio
        self.sums["sampler_weight"] += n * output.sampler_weight
        self.sums["entropy"] += entropy_n.sum()
        difference_bt = (logp_bt - batch.sampled_logp_bt).abs()
        self.sums["sampling_logp_difference"] += difference_bt[mask_bt].sum()
        if batch.ref_logp_bt is not None:
            self.sums["kl_k1"] += (logp_bt - batch.ref_logp_bt)[mask_bt].sum()
