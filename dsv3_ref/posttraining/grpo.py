"""`dsv3 rl`: GRPO on tasks (chapter 16)."""

import math
import random
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean as mean
from typing import Annotated, ClassVar, Literal

import torch
import tyro
from torch.nn.utils.rnn import pad_sequence

from dsv3_ref import grpo
from dsv3_ref.checkpoints import atomic, native
from dsv3_ref.checkpoints.atomic import write_json
from dsv3_ref.config import UserError
from dsv3_ref.data.tokenizer import get_special_tokens
from dsv3_ref.grpo import advantages, grpo_loss, token_logprobs
from dsv3_ref.optim import TrainingRecipe, get_batch_size_schedule
from dsv3_ref.posttraining.policy import Policy
from dsv3_ref.posttraining.prompts import Problem, build_messages, get_task, parse_weights
from dsv3_ref.posttraining.vllm_rollout import VllmRollouts
from dsv3_ref.pretrain import LossOutput, StepStats
from dsv3_ref.rewards import has_think_format, vote_reward
from dsv3_ref.rope import to_cu_seqlens
from dsv3_ref.training.loop import Trainer
from dsv3_ref.training.settings import TrainConfig
from dsv3_ref.verifiers.sandbox import map_parallel

BEFORE = "before.json"  # how a run did before its first step, and what it said


@dataclass(frozen=True)
class GRPOConfig(TrainConfig):
    """Improve a model by its own answers: GRPO.

    --global-batch-size is how many questions a step asks; --bias-update-rate above 0
    lets gate biases follow the load.
    Held-out problems are answered before the first step and at every checkpoint.
    """

    tasks: tuple[str, ...] = ("sums",)
    """what to practice, with weights: sums=0.7 counting spelling writing role-play questions; or
    .jsonl and .parquet files of problems with answers, with test cases for code, or with neither"""
    reward: Path | None = None
    """a reward model (of dsv3 reward) that scores tasks without a right answer"""
    votes: int = 0
    """self-reward in its place: the share of yes among so many votes of the model that the run
    began with"""
    num_generations: int = 16
    """answers to each question"""
    max_new_tokens: int = 48
    """an answer that is longer counts 0"""
    temperature: float = 1.0
    """temperature of the sampling"""
    require_think_format: bool = False
    """an answer must also be <think>…</think> and behind it one box, or it counts 0"""
    system: str = ""
    """system prompt before each question"""
    loss_type: Literal["grpo", "bnpo", "dapo", "dr_grpo", "sequence"] = "grpo"
    """how the loss is averaged; sequence: one ratio an answer, the report's eq. 26"""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """whose standard deviation advantages are divided by"""
    epsilon: float = 0.2
    """the ratio of probabilities is clipped below at 1 − this"""
    epsilon_high: float = 0.2
    """the ratio of probabilities is clipped above at 1 + this"""
    beta: float = 0.001
    """weight of the KL to the model that the run began with; 0: that model is not kept"""
    steps_per_generation: int = 1
    """optimizer steps from one set of answers, each from its part of the questions"""
    max_kl: float = 1.0
    """a mean log π/π_ref above this (nats a token; `kl_k1` in metrics.jsonl) ends the run, if the
    first model is kept"""
    rollout_backend: Literal["native", "vllm"] = "native"
    """who writes answers: our own decoder, or vLLM, fed through a Hugging Face directory"""
    vllm_tp: int = 1
    """GPUs that vLLM's engine takes (tensor parallel)"""
    max_sampling_logp_difference: float = 0.5
    """a mean difference of log π between writer and trainer (nats) above which the run ends"""
    negative_control: Literal["none", "random-reward", "no-baseline"] = "none"
    """experiments that should not work: a coin as reward; the reward as advantage"""
    micro_batch: int = 64
    """answers in one forward pass; 0: all"""
    data: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    fim_rate: Annotated[float, tyro.conf.Suppress] = 0.0
    streaming: Annotated[bool, tyro.conf.Suppress] = False

    COMMAND: ClassVar[str] = "rl"
    RECIPES: ClassVar[dict[str, TrainingRecipe]] = grpo.RECIPES
    DEFAULT_RECIPE: ClassVar[str] = "v3"

    def validation_rules(self) -> list[tuple[bool, str]]:
        is_open = [name for name in parse_weights(self.tasks) if get_task(name).is_open_ended]
        return [
            (self.init is not None, "--init is missing: the fine-tuned model to start from"),
            (self.recipe.steps >= 1, "--steps must be at least 1"),
            (
                self.num_generations >= 2,
                "--num-generations must be at least 2: answers are compared",
            ),
            (self.max_new_tokens >= 1, "--max-new-tokens must be at least 1"),
            (0 < self.temperature < math.inf, "--temperature must be above 0"),
            (0 <= self.epsilon < 1, "--epsilon must be from 0 to below 1"),
            (self.epsilon_high >= 0, "--epsilon-high must be at least 0"),
            (0 <= self.beta < math.inf, "--beta must be at least 0"),
            (
                min(self.max_kl, self.max_sampling_logp_difference) > 0,
                "--max-kl, --max-sampling-logp-difference must be above 0",
            ),
            (self.vllm_tp >= 1, "--vllm-tp must be at least 1"),
            (len(self.tasks) > 0, "--tasks needs at least one name"),
            (
                1
                <= self.steps_per_generation
                <= min(self.recipe.global_batch_size, self.recipe.start_batch_size),
                "--steps-per-generation: from 1 to --global-batch-size and --start-batch-size",
            ),
            (
                self.reward is not None or self.votes or not is_open,
                f"{', '.join(is_open)}: no answer is right, so --reward must name a reward model, "
                "or --votes say how many",
            ),
            (self.pp == self.ep == 1, "--pp, --ep: each rank of dsv3 rl holds the whole model"),
            (self.votes >= 0, "--votes must be at least 0"),
            (not (self.reward and self.votes), "--reward or --votes, not both"),
        ]


# ── Questions ──


class Questions:
    """Problems drawn at random: first the task by weight, then one of its own."""

    def __init__(self, weights: dict[str, float], seed: int):
        self.weights, self.seed, self.drawn = weights, seed, 0

    def next_batch(self, n: int) -> list[Problem]:
        """The next n."""
        return [self.next() for _ in range(n)]

    def next(self) -> Problem:
        rng = random.Random(f"{self.seed} {self.drawn}")
        self.drawn += 1
        name = rng.choices(list(self.weights), list(self.weights.values()))[0]
        return rng.choice(get_task(name).problems[0])

    def state_dict(self) -> tuple[dict, dict]:
        """How many were drawn; each has a stream of random numbers of its own."""
        return {"drawn": self.drawn}, {}

    def load_state_dict(self, small: dict, _: dict) -> None:
        self.drawn = small["drawn"]


# ── Answers ──


@dataclass
class Answer:
    """One of a group's answers, and what is known of it."""

    problem: Problem
    prompt: list[int]
    tokens: list[int]
    logp: list[float]  # as it was written
    text: str
    reward: float
    advantage: float = 0.0
    old: torch.Tensor | None = None  # log π before the first of several updates


class Scorer:
    """Rewards: a task's own rule, or opinions where nothing is right."""

    def __init__(self, args: GRPOConfig, first: Policy, say, device):
        self.end, self.say, self.failed = first.special_tokens.eos, say, set()
        self.first, self.votes, self.require_think_format, self.model = (
            first,
            args.votes,
            args.require_think_format,
            None,
        )
        if args.reward:
            from dsv3_ref.posttraining.reward import RewardModel

            self.model = RewardModel(args.reward, device)
            if self.model.with_reference:
                raise UserError(f"{args.reward} wants to be told the right answer: there is none")
            if self.model.tokenizer.get_vocab() != first.tokenizer.get_vocab():
                raise UserError(f"{args.reward} reads another tokenizer's tokens than {args.init}")

    def __call__(self, answers: list[Answer]) -> None:
        """Fill in the rewards: 0 for an answer without an end, or whose scorer fails."""
        whole = [a for a in answers if a.tokens[-1] == self.end]
        opinions = [a for a in whole if get_task(a.problem.domain).is_open_ended]
        ruled = [a for a in whole if not get_task(a.problem.domain).is_open_ended]
        for a, reward in zip(ruled, map_parallel(self.rule, ruled)):
            a.reward = reward
        for a, reward in zip(opinions, self.opinion(opinions)):
            a.reward = reward

    def opinion(self, answers: list[Answer]) -> list[float]:
        """Shares of yes, or a reward model's scores between 0 and 1."""
        if self.votes and answers:
            yes_nk = self.first.votes([(a.problem.question, a.text) for a in answers], self.votes)
            return vote_reward(yes_nk, self.votes).tolist()
        if answers:
            return self.model.score([a.prompt + a.tokens for a in answers]).sigmoid().tolist()
        return []

    def rule(self, a: Answer) -> float:
        """What the task says; the first failure of each kind is told."""
        if self.require_think_format and not has_think_format(a.text):
            return 0.0
        try:
            return get_task(a.problem.domain).score(a.text, a.problem)
        except UserError:  # what only the user can mend
            raise
        except Exception as e:  # whatever a scorer stumbles over, training goes on
            if (kind := (a.problem.domain, type(e).__name__)) not in self.failed:
                self.failed.add(kind)
                self.say(f"the scorer of {kind[0]} failed and counts 0: {kind[1]}: {e}")
            return 0.0


# ── The run ──


class RlTrainer(Trainer):
    """A run whose rows are its own answers."""

    sharded = False

    def open_data(self) -> None:
        """Questions, and how many each step asks."""
        args = self.args
        self.parts = args.steps_per_generation
        self.weights = parse_weights(args.tasks)
        self.names, self.sources, self.val = list(self.weights), [], {}
        self.tokenizer = self.find_tokenizer()
        self.special_tokens = get_special_tokens(self.tokenizer)
        self.rows = Questions(self.weights, args.seed)
        self.plan = get_batch_size_schedule(args.recipe, args.recipe.steps)

    def build(self) -> None:
        """The model, and the one it began as."""
        super().build()
        self.reference = None
        if self.args.beta or self.args.votes:
            self.reference = native.load(self.args.init, dtype=torch.float32).to(self.device)
            self.reference.requires_grad_(False)
        first = Policy(self.reference, self.tokenizer)
        say = lambda text: print(text, file=sys.stderr)
        self.score = Scorer(self.args, first, say, self.device)
        self.writer = self.brought = None  # the step whose weights it has
        if self.args.rollout_backend == "vllm":
            if self.replicas > 1:
                raise UserError("--rollout-backend vllm runs in one process")
            self.writer = VllmRollouts(self.model, self.folder / "vllm", self.args.vllm_tp)
        if self.fresh:
            began = {"held_out": self.held_out(), "samples": self.samples()}
            if self.first:
                write_json(self.folder / BEFORE, began)

    def ask(self, problems: list[Problem], group: int, temperature: float) -> list[Answer]:
        """A group of scored answers to each."""
        asked = [build_messages(p.question, system=self.args.system) for p in problems]
        policy = Policy(self.model, self.tokenizer, self.writer)
        if self.writer and self.brought != self.step:
            self.writer.refresh(self.model)
            self.brought = self.step
        with self.arithmetic():
            found = policy.answers(asked, group, self.args.max_new_tokens, temperature)
            answers = [
                Answer(problems[i // group], a.prompt, a.tokens, a.logp, a.text, 0.0)
                for i, a in enumerate(found)
            ]
            self.score(answers)
        return answers

    def batch(self, n: int) -> list[Answer]:
        """Groups of answers to the next n questions, with their advantages."""
        args, start = self.args, time.perf_counter()
        answers = self.ask(
            self.share(self.rows.next_batch(n)), args.num_generations, args.temperature
        )
        reward_b = torch.tensor([a.reward for a in answers])
        if args.negative_control == "random-reward":
            reward_b = (torch.rand(len(answers)) < 0.5).float()
        if args.negative_control != "no-baseline":
            reward_b = advantages(reward_b, args.num_generations, args.scale_rewards)
        for a, advantage in zip(answers, reward_b.tolist()):
            a.advantage = advantage
        groups = [
            answers[i : i + args.num_generations]
            for i in range(0, len(answers), args.num_generations)
        ]
        self.groups, self.rollout_seconds = self.gathered(groups), time.perf_counter() - start
        return answers

    def trained(self, answers: list[Answer]) -> int:
        return sum(len(a.tokens) for a in answers)

    def compute(self, answers: list[Answer], *settings) -> StepStats:
        """Optimizer steps, each from its part of the groups."""
        args, self.seen = self.args, defaultdict(float)
        parts = [[] for _ in range(args.steps_per_generation)]
        for i, a in enumerate(answers):
            parts[i // args.num_generations % args.steps_per_generation].append(a)
        if args.steps_per_generation > 1:
            self.remember(answers)
        stats = [self.update(part, *settings) for part in parts]
        seen = self.summed(self.seen)
        self.seen = {k: v / max(1.0, seen["tokens"]) for k, v in seen.items()}
        if not self.seen.get("kl_k1", 0.0) <= args.max_kl:  # k₃ has too heavy a tail to judge by
            self.give_up("KL to the first model", self.seen["kl_k1"])
        if (
            self.writer
            and not self.seen["sampling_logp_difference"] <= args.max_sampling_logp_difference
        ):
            self.give_up(
                "difference of log π between writer and trainer",
                self.seen["sampling_logp_difference"],
            )
        worst = next((s for s in stats if s.skipped), stats[-1])
        loss = sum(s.loss for s in stats) / len(stats)
        return worst._replace(loss=loss, load_le=sum(s.load_le for s in stats))

    def update(self, answers: list[Answer], *settings) -> StepStats:
        """One optimizer step. Answers that neither gain nor lose are not computed, but counted."""
        tokens = self.summed({"tokens": sum(len(a.tokens) for a in answers)})["tokens"]
        self.total = len(answers), tokens / self.replicas
        live = [a for a in answers if a.advantage or self.args.beta] or answers[:1]
        self.live = len(live)
        return self.step_on(self.lots(live), *settings)

    def lots(self, answers: list[Answer]) -> list[list[Answer]]:
        """Answers that one forward pass reads."""
        n = self.args.micro_batch or len(answers)
        return [answers[i : i + n] for i in range(0, len(answers), n)]

    @torch.no_grad()
    def remember(self, answers: list[Answer]) -> None:
        """log π of all answers before the first of several updates."""
        for lot in self.lots(answers):
            logp_n = self.logp(self.model, lot)[0]
            for a, logp in zip(lot, logp_n.split([len(a.tokens) for a in lot])):
                a.old = logp

    def logp(self, model, lot: list[Answer]):
        """(log π, entropy) of all tokens of a lot's answers, one after another, and the routes.

        Places are counted, not read off the marks: a model may say any token, marks too.
        """
        rows = [a.prompt + a.tokens for a in lot]
        line_1n = torch.tensor([[token for row in rows for token in row]], device=self.device)
        wrote = [i >= len(a.prompt) for a, row in zip(lot, rows) for i in range(len(row))]
        said_n = torch.tensor(wrote, device=self.device)[1:]
        cu_seqlens = to_cu_seqlens([len(row) for row in rows], self.device)
        h_1nd, routes = model.hidden_states(line_1n, cu_seqlens=cu_seqlens)
        h_nd, y_n = h_1nd[0, :-1][said_n], line_1n[0, 1:][said_n]
        return *token_logprobs(h_nd, model.head.weight, y_n, self.args.temperature), routes

    def losses(self, model, lot: list[Answer], _) -> LossOutput:
        """`grpo_loss` of a lot, as its part of the mean over all answers."""
        args, lengths = self.args, [len(a.tokens) for a in lot]
        rows = lambda x_n: pad_sequence(x_n.split(lengths), batch_first=True)
        logp_n, entropy_n, routes = self.logp(model, lot)
        written_n = torch.tensor([p for a in lot for p in a.logp], device=self.device)
        old_n = logp_n.detach() if lot[0].old is None else torch.cat([a.old for a in lot])
        ref_n = None
        if self.reference:
            with torch.no_grad():
                ref_n = self.logp(self.reference, lot)[0]
        advantage_b = torch.tensor([a.advantage for a in lot], device=self.device)
        mask_bs = rows(torch.ones_like(logp_n))
        size = {"dapo": self.total[1] * len(lot) / self.live, "dr_grpo": args.max_new_tokens}
        out = grpo_loss(
            rows(logp_n), rows(old_n), None if ref_n is None else rows(ref_n), advantage_b,
            mask_bs, (args.epsilon, args.epsilon_high), args.beta, args.loss_type,
            size.get(args.loss_type),
        )  # fmt: skip
        self.note(len(logp_n), kl=out.kl, clip_ratio=out.clip_ratio, entropy=entropy_n.mean(),
                  sampling_logp_difference=(logp_n - written_n).abs().mean())  # fmt: skip
        if ref_n is not None:
            self.seen["kl_k1"] += (logp_n - ref_n).sum().item()
        part = 1.0 if args.loss_type == "dapo" else self.live / self.total[0]
        return LossOutput(out.loss * part, [], out.loss.new_zeros(()), routes)

    def note(self, n: int, **means) -> None:
        """Means over n tokens, to be averaged over the step."""
        self.seen["tokens"] += n
        for name, value in means.items():
            self.seen[name] += n * float(torch.as_tensor(value).detach())

    def row(self, s: StepStats) -> dict:
        """Of pre-training's row all but the biases, and what GRPO is watched by."""
        row, by = super().row(s), defaultdict(list)
        answers = [a for group in self.groups for a in group]
        for a in answers:
            by[a.problem.domain].append(a.reward)
        a = answers[0]
        row |= {
            k: self.seen.get(k)
            for k in ("kl", "kl_k1", "clip_ratio", "entropy", "sampling_logp_difference")
        } | {
            "reward": mean(a.reward for a in answers),
            "reward_by": {name: mean(rewards) for name, rewards in by.items()},
            "length": mean(len(a.tokens) for a in answers),
            "frac_reward_zero_std": mean(
                float(not any(a.advantage for a in group)) for group in self.groups
            ),
            "rollout_seconds": self.rollout_seconds,
            "example": {"prompt": a.problem.question, "text": a.text, "reward": a.reward},
        }
        return {k: v for k, v in row.items() if k != "expert_bias"}

    # ── How good is it? ──

    def held_out(self) -> dict[str, dict[str, float]]:
        """For each task: mean reward of the likeliest answer and of one drawn, and its length."""
        out = {}
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(0)
            for name in self.names:
                problems = self.share(get_task(name).problems[1])
                asked = (self.ask(problems, 1, t) for t in (0.0, 1.0))
                likeliest, drawn = map(self.gathered, asked)
                out[name] = {
                    "greedy": mean(a.reward for a in likeliest),
                    "sampled": mean(a.reward for a in drawn),
                    "length": mean(len(a.tokens) for a in drawn),
                }
        return out

    def validate(self, row: dict) -> None:
        row["held_out"] = self.held_out()
        row["val_loss"] = 1 - row["held_out"][self.names[0]]["greedy"]

    def samples(self) -> list[dict]:
        """The likeliest answers to held-out questions."""
        problems = [p for name in self.names for p in get_task(name).problems[1][:3]]
        return [
            {"prompt": a.problem.question, "text": a.text, "temperature": 0.0}
            for a in self.ask(problems, 1, 0.0)
        ]

    def summary(self, row: dict) -> dict:
        began = atomic.read_json(self.folder / BEFORE)
        said = [s | {"before": b["text"]} for s, b in zip(self.samples(), began["samples"])]
        return {
            "val_loss": row["val_loss"], "seconds": self.seconds, "tokens": self.tokens,
            "before": began["held_out"], "after": row["held_out"], "samples": said,
        }  # fmt: skip

    def goal(self) -> str:
        args, names = self.args, ", ".join(self.names)
        return (
            f"{args.recipe.global_batch_size} questions × {args.num_generations} answers of {names}"
        )

    def verdict(self, row: dict) -> str:
        before, name = atomic.read_json(self.folder / BEFORE)["held_out"], self.names[0]
        was, now = (x[name]["greedy"] for x in (before, row["held_out"]))
        what = "mean reward" if get_task(name).is_open_ended else "share right"
        return f"{name}: {what} {was:.3f} before, {now:.3f} after, on held-out problems"
