"""`dsv3 reward`: a reward model from pairs of answers, and its use as a judge (chapter 15)."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
import tyro
from torch import nn

from dsv3_ref.checkpoints import atomic, native
from dsv3_ref.config import UserError
from dsv3_ref.data import files
from dsv3_ref.data.tokenizer import get_special_tokens, load_tokenizer
from dsv3_ref.grpo import generate_rollouts
from dsv3_ref.optim import TrainingRecipe, get_batch_size_schedule
from dsv3_ref.posttraining.policy import check_prompt_length
from dsv3_ref.posttraining.sft import print_to_stderr, train_val_split
from dsv3_ref.pretrain import LossOutput
from dsv3_ref.rewards import (
    bradley_terry,
    calibration,
    judge_prompt,
    preference_loss,
    reward_scores,
)
from dsv3_ref.rope import to_cu_seqlens
from dsv3_ref.sft import RECIPES, SpecialTokens, render_conversation, sample_cu_seqlens
from dsv3_ref.training.settings import TrainConfig
from dsv3_ref.training.state import Run
from dsv3_ref.training.task import Data, find_tokenizer

Pair = tuple[list[int], list[int]]  # tokens of the better conversation and of the other
MAX_JUDGMENT_TOKENS = 64  # tokens that a judge may write

VAL_PAIRS = 16  # held-out pairs that one forward pass scores


@dataclass(frozen=True)
class RewardConfig(TrainConfig):
    """Train a reward model from a fine-tuned model, on pairs of answers.

    A row of data is {"prompt": messages that end with a question, "chosen": text, "rejected":
    text} and, for judges that think or are told, "judgment_chosen", "judgment_rejected", "reference".
    Rows that cannot be used are reported by number. --global-batch-size counts pairs.
    """

    data: tuple[str, ...] = ()
    """.jsonl or .parquet files, folders of them, or owner/name"""
    epochs: float = 1.0
    """how often each pair is read, unless --steps says how long"""
    judge: Literal["direct", "cot"] = "direct"
    """score at once, or write a judgment first and score behind it"""
    with_reference: bool = False
    """show the judge the right answer, "reference" """
    judgment_weight: float = 0.1
    """λ of −log p of a judgment"""
    micro_batch: int = 16
    """pairs in one forward pass; 0: all"""
    fim_rate: Annotated[float, tyro.conf.Suppress] = 0.0
    streaming: Annotated[bool, tyro.conf.Suppress] = False

    COMMAND: ClassVar[str] = "reward"
    RECIPES: ClassVar[dict[str, TrainingRecipe]] = {
        "v3": replace(RECIPES["v3"], start_batch_size=256, global_batch_size=256),
        "tiny": replace(
            RECIPES["tiny"], lr=1e-3, min_lr=1e-4, start_batch_size=16, global_batch_size=16
        ),
    }
    DEFAULT_RECIPE: ClassVar[str] = "v3"

    def validation_rules(self) -> list[tuple[bool, str]]:
        """Return conditions on the options, each with the sentence for when it is false."""
        return [
            (self.init is not None, "--init is missing: the fine-tuned model to start from"),
            (self.pp == self.ep == 1, "--pp, --ep: each rank of dsv3 reward holds the whole model"),
            (len(self.data) > 0, "--data needs at least one file of pairs"),
            (self.recipe.steps >= 0, "--steps must be at least 0 (0: as many as --epochs take)"),
            (0 < self.epochs < float("inf"), "--epochs must be above 0"),
            (self.judgment_weight >= 0, "--judgment-weight must be at least 0"),
        ]


# ── Pairs ──


def encode_sample(
    row: dict, which: str, args: RewardConfig, encode, special_tokens: SpecialTokens
) -> list[int]:
    """Encode a conversation up to an answer, the judge's turn after it, or a judgment."""
    texts = [row.get(which)]
    if args.with_reference or args.judge == "cot":
        texts.append(judge_prompt(required_reference(row) if args.with_reference else ""))
    if args.judge == "cot":
        texts.append(row.get(f"judgment_{which}"))
    if not all(isinstance(text, str) and text for text in texts):
        raise UserError(f"{which!r} or its judgment is no text")
    roles = ("assistant", "user", "assistant")
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    tokens = render_conversation([*row["prompt"], *turns], encode, special_tokens)
    room = args.model.max_seq_len
    if len(tokens) > room:
        raise UserError(f"{len(tokens)} tokens, the model reads {room}")
    return tokens


def required_reference(row: dict) -> str:
    """Return the right answer of a row; raise if it has none."""
    if not isinstance(row.get("reference"), str):
        raise UserError("it has no 'reference'")
    return row["reference"]


def read_pairs(
    name: str, args: RewardConfig, encode, special_tokens: SpecialTokens, say=print
) -> list[Pair]:
    """Read the pairs of a source; report bad rows by number and leave them out."""

    def pair(row) -> Pair:
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), list | tuple):
            raise UserError("it has no list of messages as its prompt")
        return tuple(
            encode_sample(row, which, args, encode, special_tokens)
            for which in ("chosen", "rejected")
        )

    found, bad = files.valid_rows(name, pair, say)
    if not found:
        raise UserError(f"{name} has no pair to learn from ({bad} rows were left out)")
    return found


class PairDataset:
    """Pairs in a new random order each epoch."""

    def __init__(self, pairs: list[Pair], seed: int):
        self.pairs, self.seed, self.drawn = pairs, seed, 0

    def next_batch(self, n: int) -> list[Pair]:
        """Return the next n pairs."""
        self.drawn += n
        return [self.at(i) for i in range(self.drawn - n, self.drawn)]

    def at(self, i: int) -> Pair:
        """Return pair number i of the stream."""
        epoch, i = divmod(i, len(self.pairs))
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.pairs))
        return self.pairs[order[i]]

    def state_dict(self) -> tuple[dict, dict]:
        """Return the position in the stream."""
        return {"drawn": self.drawn}, {}

    def load_state_dict(self, small: dict, _: dict) -> None:
        """Continue at the position where `state_dict` was called."""
        self.drawn = small["drawn"]


def concat_pairs(pairs: list[Pair], device) -> torch.Tensor:
    """Concatenate the samples of pairs, (1, n)."""
    flat = [token for pair in pairs for tokens in pair for token in tokens]
    return torch.tensor([flat], device=device)


# ── The run ──


class RewardTask:
    """Training a reward model on pairs of answers."""

    requires_whole_model: ClassVar[bool] = True
    monitor: ClassVar[str] = "val_loss"
    monitor_mode: ClassVar[Literal["min", "max"]] = "min"

    def __init__(self, config: RewardConfig):
        self.config = config
        self.held_out: list[Pair] = []

    def build_data(self) -> Data:
        """Read pairs, hold some out, and decide how many each step reads."""
        config, recipe = self.config, self.config.recipe
        tokenizer = find_tokenizer(config)
        self.special_tokens = get_special_tokens(tokenizer)

        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False).ids

        pairs: list[Pair] = []
        for name in config.data:
            train, held_out = train_val_split(
                read_pairs(name, config, encode, self.special_tokens, print_to_stderr)
            )
            pairs += train
            self.held_out += held_out
        steps = recipe.steps or max(1, round(config.epochs * len(pairs) / recipe.global_batch_size))
        return Data(
            names=list(config.data),
            batch_size_schedule=get_batch_size_schedule(replace(recipe, steps=steps), steps),
            val={},
            special_tokens=self.special_tokens,
            loader=PairDataset(pairs, config.seed),
            tokenizer=tokenizer,
        )

    def prepare(self, run: Run) -> None:
        self.device = run.strategy.device

    def next_batch(self, run: Run, n: int) -> list[Pair]:
        return run.strategy.shard(run.data.loader.next_batch(n))

    def minibatches(self, run: Run, batch: list[Pair]) -> list[list[Pair]]:
        return [batch]

    def micro_batches(self, run: Run, batch: list[Pair]) -> list[list[Pair]]:
        n = self.config.micro_batch or len(batch)
        return [batch[i : i + n] for i in range(0, len(batch), n)]

    def loss(
        self, model: nn.Module, micro_batch: list[Pair], balance_loss_scope: str
    ) -> LossOutput:
        tokens_1n = concat_pairs(micro_batch, self.device)
        weight = self.config.judgment_weight * (self.config.judge == "cot")
        return preference_loss(model, tokens_1n, self.special_tokens, weight).losses

    def loss_weight(self, micro_batch: list[Pair]) -> int:
        return len(micro_batch)

    def num_tokens(self, batch: list[Pair]) -> int:
        return sum(len(tokens) for pair in batch for tokens in pair)

    @torch.no_grad()
    def score_held_out(self, run: Run) -> torch.Tensor:
        """Return the rewards of held-out pairs, with the judgments of the data, (m,)."""
        rewards = []
        for i in range(0, len(self.held_out), VAL_PAIRS):
            tokens_1n = concat_pairs(self.held_out[i : i + VAL_PAIRS], self.device)
            cu_seqlens = sample_cu_seqlens(tokens_1n, self.special_tokens)
            with run.strategy.precision_context():
                rewards.append(
                    score_packed(run.strategy.model, tokens_1n, cu_seqlens, self.special_tokens)
                )
        return torch.cat(rewards)

    def metrics(self, run: Run, row: dict) -> dict:
        return row

    def validate(self, run: Run) -> dict:
        loss, agrees = bradley_terry(self.score_held_out(run))
        return {"val_loss": loss.mean().item(), "agreement": agrees.float().mean().item()}

    def summarize(self, run: Run, row: dict) -> dict:
        chosen, rejected = self.score_held_out(run).view(-1, 2).unbind(1)
        probability_n = torch.sigmoid(chosen - rejected)
        table = calibration(probability_n, torch.ones_like(probability_n))
        return {
            "val_loss": row["val_loss"], "agreement": row["agreement"],
            "seconds": run.state.seconds, "tokens": run.state.tokens,
            "calibration": table.nan_to_num(0.5).tolist(), "samples": [],
        }  # fmt: skip

    def summarize_rank(self, run: Run) -> None:
        """Rank 0 scores the held-out pairs alone."""

    def describe_data(self, run: Run) -> str:
        return f"{sum(run.data.batch_size_schedule):,} pairs of {' and '.join(run.data.names)}"

    def result_line(self, run: Run, row: dict) -> str:
        return f"agrees with {row['agreement']:.1%} of held-out pairs"


def score_packed(model, tokens_1n, cu_seqlens, special_tokens: SpecialTokens) -> torch.Tensor:
    """Return the rewards of the samples of a packed row, (m,)."""
    h_1nd, _ = model.hidden_states(tokens_1n, cu_seqlens=cu_seqlens)
    return reward_scores(h_1nd[0], model.head.weight, cu_seqlens, special_tokens)


# ── A judge ──


class RewardModel:
    """A trained reward model: conversations that end with an answer in, rewards out."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu"):
        self.model = native.load(folder, device).eval().requires_grad_(False)
        home = native.find_tokenizer_dir(Path(folder))
        self.tokenizer = load_tokenizer(home)
        self.special_tokens = get_special_tokens(self.tokenizer)
        settings = atomic.read_json(home / "run.json")["settings"]
        if "judge" not in settings:
            raise UserError(f"{folder} is no reward model: it was not made by dsv3 reward")
        self.uses_cot, self.with_reference = settings["judge"] == "cot", settings["with_reference"]

    def score(self, samples: list[list[int]], references: list[str] | None = None) -> torch.Tensor:
        """Return the reward of each answer, (b,); write a judgment first if trained to."""
        if self.with_reference and references is None:
            raise UserError("this reward model was trained to be told the right answer")
        told = references if self.with_reference else [""] * len(samples)
        if self.uses_cot:
            samples = self.add_judgments(samples, told)
        elif self.with_reference:
            samples = self.add_judge_turns(samples, told)
        lots = [samples[i : i + 64] for i in range(0, len(samples), 64)]
        return torch.cat([self.score_batch(lot) for lot in lots])

    @torch.no_grad()
    def score_batch(self, samples: list[list[int]]) -> torch.Tensor:
        """Return the rewards of a few conversations in one forward pass."""
        tokens_1n = concat_pairs([tuple(samples)], self.model.head.weight.device)
        cu_seqlens = to_cu_seqlens([len(s) for s in samples], tokens_1n.device)
        return score_packed(
            self.model, tokens_1n, cu_seqlens, self.special_tokens
        )  # an answer may hold any token

    def add_judge_turns(self, samples: list[list[int]], references: list[str]) -> list[list[int]]:
        """Append the judge's turn to each conversation."""
        m, encode = (
            self.special_tokens,
            lambda text: self.tokenizer.encode(text, add_special_tokens=False),
        )
        return [
            [*s, m.user, *encode(judge_prompt(t)).ids, m.assistant]
            for s, t in zip(samples, references)
        ]

    def add_judgments(self, samples: list[list[int]], references: list[str]):
        """Append the judge's turn and a judgment of at most MAX_JUDGMENT_TOKENS tokens."""
        asked, end = self.add_judge_turns(samples, references), self.special_tokens.eos
        check_prompt_length(self.model, asked, MAX_JUDGMENT_TOKENS)
        lots = [asked[i : i + 256] for i in range(0, len(asked), 256)]
        told = [
            generate_rollouts(self.model, lot, 1, MAX_JUDGMENT_TOKENS, end, 0.0)[0] for lot in lots
        ]
        written = [answer for lot in told for answer in lot]
        return [[*a, *w, *([end] if w[-1] != end else [])] for a, w in zip(asked, written)]
