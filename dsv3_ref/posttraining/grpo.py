"""`dsv3 rl`: GRPO on tasks (chapter 16)."""

import math
import random
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean as mean
from typing import Annotated, ClassVar, Literal

import torch
import tyro
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from dsv3_ref import grpo
from dsv3_ref.checkpoints import atomic, native
from dsv3_ref.checkpoints.atomic import write_json
from dsv3_ref.config import UserError
from dsv3_ref.data.tokenizer import get_special_tokens
from dsv3_ref.grpo import advantages, grpo_loss
from dsv3_ref.moe import Route
from dsv3_ref.optim import TrainingRecipe, get_batch_size_schedule
from dsv3_ref.posttraining.logprobs import chunked_logprobs
from dsv3_ref.posttraining.policy import Policy
from dsv3_ref.posttraining.prompts import Problem, build_messages, get_task, parse_weights
from dsv3_ref.posttraining.sft import print_to_stderr
from dsv3_ref.posttraining.vllm_rollout import VllmRollouts
from dsv3_ref.pretrain import LossOutput
from dsv3_ref.rewards import has_think_format, vote_reward
from dsv3_ref.rope import to_cu_seqlens
from dsv3_ref.training.settings import TrainConfig
from dsv3_ref.training.state import Run
from dsv3_ref.training.task import Data, find_tokenizer
from dsv3_ref.verifiers.sandbox import map_parallel

BEFORE = "before.json"  # how a run did before its first step, and what it said
TOKEN_METRICS = "kl", "kl_k1", "clip_ratio", "entropy", "sampling_logp_difference"


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
    """a mean log π/π_ref above this (nats per token; `kl_k1` in metrics.jsonl) ends the run, if the
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
        """Return conditions on the options, each with the sentence for when it is false."""
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


class PromptDataset:
    """Problems drawn at random: first a task by weight, then one of its problems."""

    def __init__(self, weights: dict[str, float], seed: int):
        self.weights, self.seed, self.drawn = weights, seed, 0

    def next_batch(self, n: int) -> list[Problem]:
        """Return the next n problems."""
        return [self.next() for _ in range(n)]

    def next(self) -> Problem:
        """Draw one problem."""
        rng = random.Random(f"{self.seed} {self.drawn}")
        self.drawn += 1
        name = rng.choices(list(self.weights), list(self.weights.values()))[0]
        return rng.choice(get_task(name).problems[0])

    def state_dict(self) -> tuple[dict, dict]:
        """Return how many were drawn; each has random numbers of its own."""
        return {"drawn": self.drawn}, {}

    def load_state_dict(self, small: dict, _: dict) -> None:
        """Continue after as many problems as were drawn."""
        self.drawn = small["drawn"]


# ── Answers ──


@dataclass
class Rollout:
    """A sampled completion of a group, with its reward and advantage."""

    problem: Problem
    prompt: list[int]
    tokens: list[int]
    logp: list[float]  # as it was written
    text: str
    reward: float
    advantage: float = 0.0
    old: torch.Tensor | None = None  # log π before the first of several updates


class RewardFn:
    """The rewards of completions: by the task's rule or, without a right answer, by a model."""

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

    def __call__(self, answers: list[Rollout]) -> None:
        """Fill in the rewards: 0 for an answer without an end, or whose scorer fails."""
        whole = [a for a in answers if a.tokens[-1] == self.end]
        opinions = [a for a in whole if get_task(a.problem.domain).is_open_ended]
        ruled = [a for a in whole if not get_task(a.problem.domain).is_open_ended]
        for a, reward in zip(ruled, map_parallel(self.rule_reward, ruled)):
            a.reward = reward
        for a, reward in zip(opinions, self.model_reward(opinions)):
            a.reward = reward

    def model_reward(self, answers: list[Rollout]) -> list[float]:
        """Return the share of yes votes, or the reward model's σ(r), between 0 and 1."""
        if self.votes and answers:
            yes_nk = self.first.sample_votes(
                [(a.problem.question, a.text) for a in answers], self.votes
            )
            return vote_reward(yes_nk, self.votes).tolist()
        if answers:
            return self.model.score([a.prompt + a.tokens for a in answers]).sigmoid().tolist()
        return []

    def rule_reward(self, a: Rollout) -> float:
        """Return the task's score; report the first failure of each kind, which counts 0."""
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


class GRPOTask:
    """GRPO: the model is trained on its own answers, rewarded relative to their group."""

    requires_whole_model: ClassVar[bool] = True
    monitor: ClassVar[str] = "val_reward"
    monitor_mode: ClassVar[Literal["min", "max"]] = "max"

    def __init__(self, config: GRPOConfig):
        self.config = config
        self.reference: nn.Module | None = None
        self.vllm: VllmRollouts | None = None
        self.synced_step: int | None = None  # whose weights vLLM has
        self.groups: list[list[Rollout]] = []  # of all processes, of the last batch
        self.rollout_seconds = 0.0
        self.sums: dict[str, float] = defaultdict(float)  # metrics of this batch times tokens
        self.num_answers = self.num_live = 0  # of this minibatch; with a gradient
        self.mean_tokens = 0.0  # of this minibatch, per process

    def build_data(self) -> Data:
        """Parse the tasks and decide how many questions each step asks."""
        config, recipe = self.config, self.config.recipe
        weights = parse_weights(config.tasks)
        tokenizer = find_tokenizer(config)
        return Data(
            names=list(weights),
            batch_size_schedule=get_batch_size_schedule(recipe, recipe.steps),
            val={},
            special_tokens=get_special_tokens(tokenizer),
            minibatches=config.steps_per_generation,
            loader=PromptDataset(weights, config.seed),
            tokenizer=tokenizer,
        )

    def prepare(self, run: Run) -> None:
        """Load the reference model and the scorer; record how the model does before training."""
        config, strategy = self.config, run.strategy
        self.device = strategy.device
        if config.beta or config.votes:
            self.reference = native.load(config.init, dtype=torch.float32).to(self.device)
            self.reference.requires_grad_(False)
        first = Policy(self.reference, run.data.tokenizer)
        self.score = RewardFn(config, first, print_to_stderr, self.device)
        if config.rollout_backend == "vllm":
            if strategy.dp_size > 1:
                raise UserError("--rollout-backend vllm runs in one process")
            self.vllm = VllmRollouts(strategy.model, run.run_dir / "vllm", config.vllm_tp)
        if run.is_new_from_init:
            before = {"held_out": self.score_held_out(run), "samples": self.answer_samples(run)}
            if strategy.is_main:
                write_json(run.run_dir / BEFORE, before)

    # ── Rollouts ──

    def generate_rollouts(
        self, run: Run, problems: list[Problem], group: int, temperature: float
    ) -> list[Rollout]:
        """Return a group of scored answers to each problem, one group after another."""
        model, config = run.strategy.model, self.config
        prompts = [build_messages(p.question, system=config.system) for p in problems]
        policy = Policy(model, run.data.tokenizer, self.vllm)
        if self.vllm and self.synced_step != run.state.step:
            self.vllm.refresh(model)
            self.synced_step = run.state.step
        with run.strategy.precision_context():
            completions = policy.generate(prompts, group, config.max_new_tokens, temperature)
            answers = [
                Rollout(problems[i // group], c.prompt, c.tokens, c.logp, c.text, 0.0)
                for i, c in enumerate(completions)
            ]
            self.score(answers)
        return answers

    def next_batch(self, run: Run, n: int) -> list[Rollout]:
        """Return this process's answers to the next n questions, with their advantages."""
        config, start = self.config, time.perf_counter()
        group = config.num_generations
        problems = run.strategy.shard(run.data.loader.next_batch(n))
        answers = self.generate_rollouts(run, problems, group, config.temperature)
        reward_b = torch.tensor([a.reward for a in answers])
        if config.negative_control == "random-reward":
            reward_b = (torch.rand(len(answers)) < 0.5).float()
        if config.negative_control != "no-baseline":
            reward_b = advantages(reward_b, group, config.scale_rewards)
        for a, advantage in zip(answers, reward_b.tolist()):
            a.advantage = advantage
        groups = [answers[i : i + group] for i in range(0, len(answers), group)]
        self.groups = run.strategy.all_gather(groups)
        self.rollout_seconds = time.perf_counter() - start
        return answers

    def num_tokens(self, batch: list[Rollout]) -> int:
        return sum(len(a.tokens) for a in batch)

    # ── The loss ──

    def minibatches(self, run: Run, batch: list[Rollout]) -> list[list[Rollout]]:
        """Deal the groups out to the optimizer steps of this batch."""
        n = self.config.steps_per_generation
        self.sums = defaultdict(float)
        parts: list[list[Rollout]] = [[] for _ in range(n)]
        for i, answer in enumerate(batch):
            parts[i // self.config.num_generations % n].append(answer)
        if n > 1:
            self.compute_old_logprobs(run.strategy.model, batch)
        return parts

    def micro_batches(self, run: Run, batch: list[Rollout]) -> list[list[Rollout]]:
        """Split the answers with a gradient; the others are not computed, but counted."""
        total = run.strategy.all_reduce({"tokens": self.num_tokens(batch)})["tokens"]
        self.num_answers, self.mean_tokens = len(batch), total / run.strategy.dp_size
        live = [a for a in batch if a.advantage or self.config.beta] or batch[:1]
        self.num_live = len(live)
        return self.split(live)

    def split(self, answers: list[Rollout]) -> list[list[Rollout]]:
        """Split answers into parts that one forward pass reads."""
        n = self.config.micro_batch or len(answers)
        return [answers[i : i + n] for i in range(0, len(answers), n)]

    @torch.no_grad()
    def compute_old_logprobs(self, model: nn.Module, answers: list[Rollout]) -> None:
        """Store log π of all answers before the first of several optimizer steps."""
        for part in self.split(answers):
            logp_n = self.logprobs(model, part)[0]
            for a, logp in zip(part, logp_n.split([len(a.tokens) for a in part])):
                a.old = logp

    def logprobs(
        self, model: nn.Module, answers: list[Rollout]
    ) -> tuple[torch.Tensor, torch.Tensor, list[Route]]:
        """Return log π and entropy of all tokens of the answers end to end, and the routes.

        Positions are counted instead of read off the special tokens, because a model may generate
        any token, special ones too.
        """
        rows = [a.prompt + a.tokens for a in answers]
        tokens_1n = torch.tensor([[token for row in rows for token in row]], device=self.device)
        generated: list[bool] = []
        for a in answers:
            generated += [False] * len(a.prompt) + [True] * len(a.tokens)
        mask_n = torch.tensor(generated, device=self.device)[1:]
        cu_seqlens = to_cu_seqlens([len(row) for row in rows], self.device)
        h_1nd, routes = model.hidden_states(tokens_1n, cu_seqlens=cu_seqlens)
        h_nd, y_n = h_1nd[0, :-1][mask_n], tokens_1n[0, 1:][mask_n]
        temperature = self.config.temperature
        logp_n, entropy_n = chunked_logprobs(h_nd, model.head.weight, y_n, temperature)
        return logp_n, entropy_n, routes

    def loss(
        self, model: nn.Module, micro_batch: list[Rollout], balance_loss_scope: str
    ) -> LossOutput:
        """Return `grpo_loss` of a micro-batch as its part of the mean over all answers."""
        config, lengths = self.config, [len(a.tokens) for a in micro_batch]

        def pad(x_n: torch.Tensor) -> torch.Tensor:
            return pad_sequence(x_n.split(lengths), batch_first=True)

        logp_n, entropy_n, routes = self.logprobs(model, micro_batch)
        old_n = logp_n.detach()
        if micro_batch[0].old is not None:
            old_n = torch.cat([a.old for a in micro_batch])
        ref_n = None
        if self.reference:
            with torch.no_grad():
                ref_n = self.logprobs(self.reference, micro_batch)[0]
        advantage_b = torch.tensor([a.advantage for a in micro_batch], device=self.device)
        sizes = {
            "dapo": self.mean_tokens * len(micro_batch) / self.num_live,
            "dr_grpo": config.max_new_tokens,
        }
        output = grpo_loss(
            pad(logp_n), pad(old_n), None if ref_n is None else pad(ref_n), advantage_b,
            pad(torch.ones_like(logp_n)), (config.epsilon, config.epsilon_high), config.beta,
            config.loss_type, sizes.get(config.loss_type),
        )  # fmt: skip
        sampled_n = torch.tensor([x for a in micro_batch for x in a.logp], device=self.device)
        self.accumulate_metrics(
            len(logp_n), kl=output.kl, clip_ratio=output.clip_ratio, entropy=entropy_n.mean(),
            sampling_logp_difference=(logp_n - sampled_n).abs().mean(),
        )  # fmt: skip
        if ref_n is not None:
            self.sums["kl_k1"] += (logp_n - ref_n).sum().item()
        weight = 1.0 if config.loss_type == "dapo" else self.num_live / self.num_answers
        return LossOutput(output.loss * weight, [], output.loss.new_zeros(()), routes)

    def loss_weight(self, micro_batch: list[Rollout]) -> int:
        return len(micro_batch)

    def accumulate_metrics(self, n: int, **means: torch.Tensor) -> None:
        """Add means over n tokens to the sums of this batch."""
        self.sums["tokens"] += n
        for name, value in means.items():
            self.sums[name] += n * float(torch.as_tensor(value).detach())

    # ── Metrics and validation ──

    def token_means(self, run: Run) -> dict[str, float]:
        """Return this batch's metrics averaged over tokens; stop a run that went astray."""
        config, sums = self.config, run.strategy.all_reduce(self.sums)
        means = {k: v / max(1.0, sums["tokens"]) for k, v in sums.items()}
        if not means.get("kl_k1", 0.0) <= config.max_kl:  # k₃ has too heavy a tail to judge by
            run.abort("KL to the first model", means["kl_k1"])
        difference = means["sampling_logp_difference"]
        if self.vllm and not difference <= config.max_sampling_logp_difference:
            run.abort("difference of log π between writer and trainer", difference)
        return means

    def metrics(self, run: Run, row: dict) -> dict:
        """Replace the gate biases, which rest, by rewards and what shows a run going wrong."""
        means = self.token_means(run)
        answers = [a for group in self.groups for a in group]
        rewards: dict[str, list[float]] = defaultdict(list)
        for a in answers:
            rewards[a.problem.domain].append(a.reward)
        silent = [float(not any(a.advantage for a in group)) for group in self.groups]
        example = answers[0]
        row = {k: v for k, v in row.items() if k != "expert_bias"}
        return row | {k: means.get(k) for k in TOKEN_METRICS} | {
            "reward": mean(a.reward for a in answers),
            "reward_by": {name: mean(values) for name, values in rewards.items()},
            "length": mean(len(a.tokens) for a in answers),
            "frac_reward_zero_std": mean(silent),
            "rollout_seconds": self.rollout_seconds,
            "example": {
                "prompt": example.problem.question, "text": example.text,
                "reward": example.reward,
            },
        }  # fmt: skip

    def score_held_out(self, run: Run) -> dict[str, dict[str, float]]:
        """Return each task's mean rewards of greedy and of sampled answers, and their length."""
        results = {}
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            for name in run.data.names:
                problems = run.strategy.shard(get_task(name).problems[1])
                greedy = self.generate_rollouts(run, problems, 1, 0.0)
                greedy = run.strategy.all_gather(greedy)
                sampled = self.generate_rollouts(run, problems, 1, 1.0)
                sampled = run.strategy.all_gather(sampled)
                results[name] = {
                    "greedy": mean(a.reward for a in greedy),
                    "sampled": mean(a.reward for a in sampled),
                    "length": mean(len(a.tokens) for a in sampled),
                }
        return results

    def validate(self, run: Run) -> dict:
        held_out = self.score_held_out(run)
        return {"held_out": held_out, "val_reward": held_out[run.data.names[0]]["greedy"]}

    def answer_samples(self, run: Run) -> list[dict]:
        """Return greedy answers to a few held-out questions of each task."""
        problems = [p for name in run.data.names for p in get_task(name).problems[1][:3]]
        return [
            {"prompt": a.problem.question, "text": a.text, "temperature": 0.0}
            for a in self.generate_rollouts(run, problems, 1, 0.0)
        ]

    def summarize(self, run: Run, row: dict) -> dict:
        before = atomic.read_json(run.run_dir / BEFORE)
        pairs = zip(self.answer_samples(run), before["samples"])
        return {
            "val_reward": row["val_reward"], "seconds": run.state.seconds,
            "tokens": run.state.tokens, "before": before["held_out"], "after": row["held_out"],
            "samples": [after | {"before": earlier["text"]} for after, earlier in pairs],
        }  # fmt: skip

    def summarize_rank(self, run: Run) -> None:
        """Rank 0 answers the samples alone; what else it reports was gathered before."""

    def describe_data(self, run: Run) -> str:
        questions = self.config.recipe.global_batch_size
        names = ", ".join(run.data.names)
        return f"{questions} questions × {self.config.num_generations} answers of {names}"

    def result_line(self, run: Run, row: dict) -> str:
        name = run.data.names[0]
        before = atomic.read_json(run.run_dir / BEFORE)["held_out"][name]["greedy"]
        after = row["held_out"][name]["greedy"]
        what = "mean reward" if get_task(name).is_open_ended else "share right"
        return f"{name}: {what} {before:.3f} before, {after:.3f} after, on held-out problems"
