"""The objective of GRPO on rows of prompts with their completions (chapter 16)."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dsv3_ref.grpo import GRPOOutput, grpo_loss
from dsv3_ref.posttraining.logprobs import chunked_logprobs
from dsv3_ref.rope import to_cu_seqlens
from dsv3_ref.training.objective import ModelInput, RowBatch, SequenceTokens, valid_places

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


class RolloutPlaces(NamedTuple):
    """The places of hidden states on this rank that predict completions' tokens, and the tokens."""

    place_k: Tensor
    y_k: Tensor
    slot_k: Tensor  # of the token among log-probabilities, (b, t), flattened
    total: int  # of all ranks that share the sequences


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
    is_cross_entropy: ClassVar[bool] = False

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

    def locate(self, batch: RolloutRows, part: SequenceTokens) -> RolloutPlaces:
        """Return where this rank predicts completions' tokens."""
        rows_bs = batch.rows_bs
        is_token_bs = valid_places(rows_bs, batch.num_tokens_b)
        is_prompt_n = valid_places(rows_bs, batch.num_prompt_tokens_b)[is_token_bs]
        y_n = rows_bs[is_token_bs].roll(-1)  # the first token of all is one of a prompt
        place_m = (~is_prompt_n).roll(-1).nonzero()[:, 0]
        own_k, number_k = part.take_places(place_m, (1, len(y_n)))
        slot_m = batch.completion_mask_bt.flatten().nonzero()[:, 0]
        return RolloutPlaces(own_k, y_n[place_m[number_k]], slot_m[number_k], len(place_m))

    def logprobs(
        self, h_1nd: Tensor, head_wd: Tensor, batch: RolloutRows, places: RolloutPlaces
    ) -> tuple[Tensor, Tensor]:
        """Return log π of the completions' tokens, (b, t), and the entropies end to end, (k,).

        Tokens that another rank predicts have 0.
        """
        h_kd = h_1nd[0, places.place_k]
        logp_k, entropy_k = chunked_logprobs(h_kd, head_wd, places.y_k, self.temperature)
        shape = batch.sampled_logp_bt.shape
        logp_x = logp_k.new_zeros(shape.numel()).index_copy(0, places.slot_k, logp_k)
        return logp_x.view(shape), entropy_k

    def read_logprobs(
        self, h_1nd: Tensor, head_wd: Tensor, batch: RolloutRows, places: RolloutPlaces,
        part: SequenceTokens,
    ) -> Tensor:  # fmt: skip
        """Return log π of the completions' tokens, (b, t); 0 for those of another rank."""
        return self.logprobs(h_1nd, head_wd, batch, places)[0]

    def loss(
        self, h_1nd: Tensor, head_wd: Tensor, batch: RolloutRows, places: RolloutPlaces,
        part: SequenceTokens,
    ) -> Tensor:  # fmt: skip
        """Return the loss of a micro-batch as its part of the mean over all rollouts."""
        if not len(batch):
            return h_1nd.sum()
        own_bt, entropy_k = self.logprobs(h_1nd, head_wd, batch, places)
        self.sums["tokens"] += len(entropy_k)
        self.sums["entropy"] += entropy_k.detach().sum()
        logp_bt = part.complete(own_bt)
        old_bt = logp_bt.detach() if batch.old_logp_bt is None else batch.old_logp_bt
        output = grpo_loss(
            logp_bt, old_bt, batch.ref_logp_bt, batch.advantage_b, batch.completion_mask_bt,
            self.epsilon, self.beta, self.loss_type, self.normalizer(len(batch)),
            batch.sampled_logp_bt if self.sampler_cap else None, self.sampler_cap,
        )  # fmt: skip
        if part.counts:
            self.add_metrics(logp_bt.detach(), places.total, batch, output)
        weight = 1.0 if self.loss_type == "dapo" else self.num_live / self.num_rollouts
        return part.count_once(output.loss * weight)

    def normalizer(self, num_rollouts: int) -> float | None:
        """Return the `normalizer` of `grpo_loss` for a micro-batch of so many rollouts."""
        if self.loss_type == "dapo":
            return self.mean_tokens * num_rollouts / self.num_live
        return self.max_new_tokens if self.loss_type == "dr_grpo" else None

    def add_metrics(self, logp_bt: Tensor, n: int, batch: RolloutRows, output: GRPOOutput) -> None:
        """Add the metrics of a micro-batch of n completions' tokens to the sums over tokens."""
        mask_bt = batch.completion_mask_bt
        self.sums["kl"] += n * output.kl
        self.sums["clip_ratio"] += n * output.clip_ratio
        self.sums["sampler_weight"] += n * output.sampler_weight
        difference_bt = (logp_bt - batch.sampled_logp_bt).abs()
        self.sums["sampling_logp_difference"] += masked_sum(difference_bt, mask_bt)
        if batch.ref_logp_bt is not None:
            self.sums["kl_k1"] += masked_sum(logp_bt - batch.ref_logp_bt, mask_bt)


def masked_sum(x_bt: Tensor, mask_bt: Tensor) -> Tensor:
    """Return the sum of x where the mask is True; elsewhere x may hold any value."""
    return torch.where(mask_bt, x_bt, 0).sum()
