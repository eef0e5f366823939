"""`dsv3 reward`: a reward model from pairs of answers, and its use as a judge (chapter 15)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dsv3_ref.checkpoints import atomic, native
from dsv3_ref.config import UserError
from dsv3_ref.data.chat_template import ChatTemplate
from dsv3_ref.data.conversations import (
    Pair,
    PairDataset,
    PairFormat,
    read_pairs,
    split_samples,
)
from dsv3_ref.data.files import print_to_stderr
from dsv3_ref.data.fingerprint import fingerprint_samples
from dsv3_ref.data.packing import FlaggedRows, find_cu_seqlens, read_flags
from dsv3_ref.grpo import generate_rollouts
from dsv3_ref.model import Transformer
from dsv3_ref.optim import TrainingRecipe, get_batch_size_schedule
from dsv3_ref.posttraining.policy import check_prompt_length
from dsv3_ref.pretrain import LossOutput
from dsv3_ref.rewards import (
    bradley_terry,
    calibration,
    judge_prompt,
    judgment_loss,
    reward_scores,
)
from dsv3_ref.rope import to_cu_seqlens
from dsv3_ref.sft import SFT_RECIPES, SpecialTokens
from dsv3_ref.training.objective import (
    ModelInput,
    RowBatch,
    SequenceTokens,
    Targets,
    find_targets,
    objective_loss,
    valid_places,
)
from dsv3_ref.training.settings import MAX_EPOCHS, TrainConfig, unused_loss_rules
from dsv3_ref.training.state import Run
from dsv3_ref.training.task import BalanceLossScope, Data, find_chat_template

MAX_JUDGMENT_TOKENS = 64  # of a judgment that the reward model writes
VAL_PAIRS = 16  # held-out pairs per forward pass
SCORE_BATCH = 64  # answers that `RewardModel` scores per forward pass
JUDGMENT_BATCH = 256  # judgments that it writes at a time


@dataclass(frozen=True)
class RewardConfig(TrainConfig):
    """Train a reward model from a fine-tuned model, on pairs of answers.

    A row of data is {"prompt": messages that end with a question, "chosen": text, "rejected":
    text}, or of another of TRL's preference forms. --judge cot also needs "judgment_chosen" and
    "judgment_rejected", --with-reference also needs "reference". Invalid rows are reported by
    number and skipped. --global-batch-size counts pairs.
    """

    data: tuple[str, ...] = ()
    """files of rows (.jsonl, .json, .csv, .parquet; docs/data.md), folders of them, or datasets
    owner/name:config@split on the Hugging Face hub"""
    epochs: float = 1.0
    """passes over the pairs, unless --steps is given"""
    judge: Literal["direct", "cot"] = "direct"
    """score the answer directly, or write a judgment first (chain of thought) and score after it"""
    with_reference: bool = False
    """state the right answer ("reference" of the row) in the judge's turn"""
    judgment_weight: float = 0.1
    """weight λ of the judgments' −log p in the loss"""
    micro_batch: int = 16
    """pairs per forward pass; 0: all"""
    fim_rate: Annotated[float, tyro.conf.Suppress] = 0.0
    data_streams: Annotated[int, tyro.conf.Suppress] = 1
    streaming: Annotated[bool, tyro.conf.Suppress] = False

    COMMAND: ClassVar[str] = "reward"
    RECIPES: ClassVar[dict[str, TrainingRecipe]] = {
        "v3": replace(SFT_RECIPES["v3"], start_batch_size=256, global_batch_size=256),
        "tiny": replace(
            SFT_RECIPES["tiny"], lr=1e-3, min_lr=1e-4, start_batch_size=16, global_batch_size=16
        ),
    }
    DEFAULT_RECIPE: ClassVar[str] = "v3"

    def validation_rules(self) -> list[tuple[bool, str]]:
        """Return the rules of this command: whether each holds, and the error if not."""
        return [
            (self.init is not None, "--init is missing: the fine-tuned model to start from"),
            (len(self.data) > 0, "--data needs at least one file of pairs"),
            (self.recipe.steps >= 0, "--steps must be at least 0 (0: as many as --epochs needs)"),
            (
                0 < self.epochs <= MAX_EPOCHS,
                f"--epochs must be above 0 and at most {MAX_EPOCHS:,}",
            ),
            (self.judgment_weight >= 0, "--judgment-weight must be at least 0"),
            *unused_loss_rules(self.recipe),
        ]

    @property
    def pair_format(self) -> PairFormat:
        """The format of a sample, by --judge and --with-reference."""
        return PairFormat(self.model.max_seq_len, self.judge == "cot", self.with_reference)


@dataclass(frozen=True)
class PairRows(RowBatch):
    """Pairs as rows: both flagged samples end to end, chosen first, and padding."""

    num_tokens_b: Tensor

    def packed(self) -> FlaggedRows:
        """Return all samples end to end without padding, (1, n)."""
        return read_flags(self.rows_bs[valid_places(self.rows_bs, self.num_tokens_b)][None])


class PairPlaces(NamedTuple):
    """The places of hidden states on this rank that give rewards or predict judgments."""

    ends_k: Tensor  # 0, and the place after the last token of each sample that ends on this rank
    sample_k: Tensor  # the numbers of these samples
    judgments: Targets


@dataclass(frozen=True)
class PreferenceObjective:
    """`preference_loss` of chapter 15, averaged over pairs, each of which is one row."""

    special_tokens: SpecialTokens
    judgment_weight: float
    trains_mtp: ClassVar[bool] = False
    is_cross_entropy: ClassVar[bool] = False

    def model_input(self, batch: PairRows) -> ModelInput:
        """Return all samples, as one row."""
        rows = batch.packed()
        return ModelInput(rows.tokens_bs, find_cu_seqlens(rows.start_bs))

    def loss_weight(self, batch: PairRows) -> int:
        """Return the number of pairs."""
        return len(batch)

    def locate(self, batch: PairRows, part: SequenceTokens) -> PairPlaces:
        """Return where samples end, and where tokens of judgments are predicted."""
        rows = batch.packed()
        last_m = find_cu_seqlens(rows.start_bs)[1:].long() - 1
        last_k, sample_k = part.take_places(last_m[: 2 * len(batch)], rows.tokens_bs.shape)
        is_learned_1n = (
            rows.mask_bs & ~rows.start_bs
        )  # nothing predicts the first token of a sample
        judgments = find_targets(is_learned_1n.roll(-1), rows.tokens_bs.roll(-1), part)
        return PairPlaces(F.pad(last_k + 1, (1, 0)), sample_k, judgments)

    def loss(
        self, h_1nd: Tensor, head_wd: Tensor, batch: PairRows, places: PairPlaces,
        part: SequenceTokens,
    ) -> Tensor:  # fmt: skip
        """Return the mean loss of the pairs."""
        if not len(batch):
            return h_1nd.sum()
        reward_m = part.complete(self.read_scores(h_1nd, head_wd, batch, places, part).flatten())
        ranking = part.count_once(bradley_terry(reward_m)[0].mean())
        place_k, y_k, _ = places.judgments
        return ranking + judgment_loss(
            h_1nd[0, place_k], head_wd, y_k, len(reward_m), self.judgment_weight
        )

    def read_scores(
        self, h_1nd: Tensor, head_wd: Tensor, batch: PairRows, places: PairPlaces,
        part: SequenceTokens,
    ) -> Tensor:  # fmt: skip
        """Return the rewards of both samples of each pair, (b, 2); 0 if another rank has it."""
        reward_k = reward_scores(h_1nd[0], head_wd, places.ends_k, self.special_tokens)
        rewards = reward_k.new_zeros(2 * len(batch)).index_copy(0, places.sample_k, reward_k)
        return rewards.view(len(batch), 2)


class RewardTask:
    """Training of a reward model on pairs of answers."""

    objective: PreferenceObjective  # `build_data` sets it
    replicates_data: ClassVar[bool] = True
    monitor: ClassVar[str] = "val_loss"
    monitor_mode: ClassVar[Literal["min", "max"]] = "min"

    def __init__(self, config: RewardConfig):
        self.config = config
        self.requires_whole_model = not config.divides_model
        self.held_out: list[Pair] = []

    def build_data(self) -> Data:
        """Read pairs, hold some out, and decide how many each step reads."""
        config, recipe = self.config, self.config.recipe
        chat = find_chat_template(config)
        weight = config.judgment_weight * (config.judge == "cot")
        self.objective = PreferenceObjective(chat.special_tokens, weight)
        pairs: list[Pair] = []
        fingerprints = []
        for name in config.data:
            samples = read_pairs(name, chat, config.pair_format, print_to_stderr)
            fingerprints.append(fingerprint_samples(name, chain.from_iterable(samples)))
            if not config.val_data:
                samples, held_out = split_samples(samples)
                self.held_out += held_out
            pairs += samples
        for name in config.val_data:
            samples = read_pairs(name, chat, config.pair_format, print_to_stderr)
            fingerprints.append(fingerprint_samples(name, chain.from_iterable(samples)))
            self.held_out += samples
        steps = recipe.steps or max(1, round(config.epochs * len(pairs) / recipe.global_batch_size))
        return Data(
            names=list(config.data),
            batch_size_schedule=get_batch_size_schedule(replace(recipe, steps=steps), steps),
            val={},
            special_tokens=chat.special_tokens,
            loader=PairDataset(pairs, config.seed),
            chat=chat,
            tokenizer=chat.tokenizer,
            fingerprints=tuple(fingerprints),
        )

    def prepare(self, run: Run) -> None:
        """Do nothing: the data is ready."""

    def next_batch(self, run: Run, n: int) -> list[Pair]:
        """Return this process's part of the next n pairs."""
        assert run.data.loader is not None  # `replicates_data`: every rank reads the data
        return run.strategy.shard(run.data.loader.next_batch(n))

    def minibatches(self, run: Run, batch: list[Pair]) -> list[list[Pair]]:
        """Return the batch as one minibatch: it takes one optimizer step."""
        return [batch]

    def micro_batches(self, run: Run, batch: list[Pair]) -> list[PairRows]:
        """Split a minibatch into parts of at most --micro-batch pairs."""
        return self.row_batch(run, batch).split(self.config.micro_batch)

    def row_batch(self, run: Run, batch: list[Pair]) -> PairRows:
        """Return pairs as rows, on the host."""
        rows = [torch.tensor(chosen + rejected) for chosen, rejected in batch]
        lengths = torch.tensor([len(row) for row in rows])
        return PairRows(pad_sequence(rows, batch_first=True), lengths)

    def loss(
        self, model: Transformer, micro_batch: PairRows, balance_loss_scope: BalanceLossScope
    ) -> LossOutput:
        """Return `preference_loss` of a micro-batch, averaged over its pairs."""
        return objective_loss(self.objective, model, micro_batch)

    def loss_weight(self, micro_batch: PairRows) -> int:
        """Return the number of pairs."""
        return len(micro_batch)

    def num_tokens(self, batch: list[Pair]) -> int:
        """Return the number of tokens that the model reads."""
        return sum(len(chosen) + len(rejected) for chosen, rejected in batch)

    def score_held_out(self, run: Run) -> Tensor:
        """Return the rewards of held-out pairs, with the judgments of the data, (m,)."""
        rewards = []
        for i in range(0, len(self.held_out), VAL_PAIRS):
            rows = self.row_batch(run, self.held_out[i : i + VAL_PAIRS])
            with run.strategy.precision_context():
                reward_b2 = run.strategy.read_out(self, rows, self.objective.read_scores, 2)
            rewards.append(reward_b2.flatten())
        return torch.cat(rewards)

    def metrics(self, run: Run, row: dict) -> dict:
        """Return the metrics row unchanged."""
        return row

    def validate(self, run: Run) -> dict:
        """Return the Bradley–Terry loss of held-out pairs and the fraction ranked as labeled."""
        loss, agrees = bradley_terry(self.score_held_out(run))
        return {"val_loss": loss.mean().item(), "agreement": agrees.float().mean().item()}

    def summarize(self, run: Run, row: dict) -> dict:
        """Return the contents of summary.json, with the calibration on held-out pairs."""
        chosen, rejected = self.score_held_out(run).view(-1, 2).unbind(1)
        probability_n = torch.sigmoid(chosen - rejected)
        table = calibration(probability_n, torch.ones_like(probability_n))
        return {
            "val_loss": row["val_loss"], "agreement": row["agreement"],
            "seconds": run.state.seconds, "tokens": run.state.tokens,
            "calibration": table.nan_to_num(0.5).tolist(), "samples": [],
        }  # fmt: skip

    def summarize_rank(self, run: Run) -> None:
        """Take part in scoring the held-out pairs, unless rank 0 has the whole model."""
        if not self.requires_whole_model:
            self.score_held_out(run)

    def describe_data(self, run: Run) -> str:
        """Return how many pairs of which files are trained on, for the start message."""
        return f"{sum(run.data.batch_size_schedule):,} pairs of {' and '.join(run.data.names)}"

    def result_line(self, run: Run, row: dict) -> str:
        """Return the result in one sentence: the agreement on held-out pairs."""
        return f"agrees with {row['agreement']:.1%} of held-out pairs"


# ── Packed samples ──


def concat_samples(samples: Sequence[list[int]], device: torch.device | str) -> Tensor:
    """Concatenate samples in one packed row, (1, n)."""
    tokens: list[int] = []
    for sample in samples:
        tokens += sample
    return torch.tensor([tokens], device=device)


def score_packed(
    model: Transformer, tokens_1n: Tensor, cu_seqlens: Tensor, special_tokens: SpecialTokens
) -> Tensor:
    """Return the rewards of the samples of a packed row, (m,)."""
    h_1nd, _ = model.hidden_states(tokens_1n, cu_seqlens=cu_seqlens)
    return reward_scores(h_1nd[0], model.head.weight, cu_seqlens, special_tokens)


# ── A judge ──


class RewardModel:
    """A trained reward model: conversations that end with an answer in, rewards out."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu"):
        self.model = native.load(folder, device).eval().requires_grad_(False)
        home = native.find_tokenizer_dir(Path(folder))
        self.chat = ChatTemplate.from_dir(home)
        self.special_tokens = self.chat.special_tokens
        settings = atomic.read_json(home / "run.json")["settings"]
        if "judge" not in settings:
            raise UserError(f"{folder} is not a reward model: train one with dsv3 reward")
        self.uses_cot = settings["judge"] == "cot"
        self.with_reference = settings["with_reference"]
        self.num_malformed = 0  # judgments without an end

    def score(self, samples: list[list[int]], references: list[str] | None = None) -> Tensor:
        """Return the reward of each answer, (b,); write a judgment first if trained to."""
        if not self.with_reference:
            references = [""] * len(samples)
        elif references is None:
            raise UserError(
                "this reward model was trained with reference answers: pass `references`"
            )
        if self.uses_cot:
            samples = self.add_judgments(samples, references)
        elif self.with_reference:
            samples = self.add_judge_turns(samples, references)
        batches = [samples[i : i + SCORE_BATCH] for i in range(0, len(samples), SCORE_BATCH)]
        return torch.cat([self.score_batch(batch) for batch in batches])

    @torch.no_grad()
    def score_batch(self, samples: list[list[int]]) -> Tensor:
        """Return the rewards of a few conversations in one forward pass, (b,)."""
        tokens_1n = concat_samples(samples, self.model.head.weight.device)
        # lengths, because an answer that a model wrote may hold any token, special ones too
        cu_seqlens = to_cu_seqlens([len(sample) for sample in samples], tokens_1n.device)
        return score_packed(self.model, tokens_1n, cu_seqlens, self.special_tokens)

    def add_judge_turns(self, samples: list[list[int]], references: list[str]) -> list[list[int]]:
        """Append the judge's turn to each conversation."""
        return [
            [*sample, *self.chat.encode_next_turn(judge_prompt(reference))]
            for sample, reference in zip(samples, references)
        ]

    def add_judgments(self, samples: list[list[int]], references: list[str]) -> list[list[int]]:
        """Append the judge's turn and a judgment of at most MAX_JUDGMENT_TOKENS tokens."""
        prompts = self.add_judge_turns(samples, references)
        eos_id, stops = self.special_tokens.eos, self.chat.stop_token_ids
        check_prompt_length(self.model, prompts, MAX_JUDGMENT_TOKENS)
        judgments = []
        for start in range(0, len(prompts), JUDGMENT_BATCH):
            batch = prompts[start : start + JUDGMENT_BATCH]
            judgments += generate_rollouts(
                self.model, batch, 1, MAX_JUDGMENT_TOKENS, stops, temperature=0.0
            )[0]
        self.num_malformed += sum(judgment[-1] != eos_id for judgment in judgments)
        return [
            [*prompt, *judgment, *([eos_id] if judgment[-1] not in stops else [])]
            for prompt, judgment in zip(prompts, judgments)
        ]
