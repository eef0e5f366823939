"""`dsv3 rl`: GRPO on prompt tasks (chapter 16)."""

import math
import random
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean as mean
from typing import Annotated, Any, ClassVar, Literal

import torch
import tyro
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dsv3_ref.checkpoints import atomic, native
from dsv3_ref.checkpoints.atomic import write_json
from dsv3_ref.checkpoints.manifest import has_manifest, read_manifest
from dsv3_ref.config import UserError
from dsv3_ref.data.chat_template import ChatTemplate
from dsv3_ref.data.files import print_to_stderr
from dsv3_ref.data.fingerprint import fingerprint_files
from dsv3_ref.grpo import GRPO_RECIPES, advantages
from dsv3_ref.model import Transformer
from dsv3_ref.optim import TrainingRecipe, get_batch_size_schedule
from dsv3_ref.posttraining.grpo_objective import GRPOObjective, RolloutRows
from dsv3_ref.posttraining.policy import Policy, as_transformer, check_prompt_length
from dsv3_ref.posttraining.prompts import (
    TASKS,
    Problem,
    fingerprint_task,
    get_task,
    parse_weights,
)
from dsv3_ref.posttraining.reward import RewardModel
from dsv3_ref.posttraining.rollout_engines import RolloutEngines
from dsv3_ref.posttraining.vllm_rollout import VllmRollouts
from dsv3_ref.pretrain import LossOutput
from dsv3_ref.rewards import has_think_format, vote_reward
from dsv3_ref.training.objective import objective_loss
from dsv3_ref.training.settings import TrainConfig, unused_loss_rules
from dsv3_ref.training.state import Run
from dsv3_ref.training.task import BalanceLossScope, Data, find_chat_template
from dsv3_ref.verifiers.sandbox import map_parallel

CONSTANT_STEPS = 10  # after so many steps without a difference between rewards, it is told
BEFORE = "before.json"  # held-out rewards and samples of the initial model
TOKEN_METRICS = (
    "kl", "kl_k1", "clip_ratio", "entropy", "sampling_logp_difference", "sampler_weight",
)  # fmt: skip


@dataclass(frozen=True)
class GRPOConfig(TrainConfig):
    """Improve a model by reinforcement learning on its own completions: GRPO.

    --global-batch-size counts prompts. --bias-update-rate above 0 updates the gate biases.
    Held-out problems are answered before the first step and at every checkpoint.
    """

    tasks: tuple[str, ...] = ("sums",)
    """problems to train on, with weights: sums=0.7 counting spelling writing role-play questions;
    or files of problems (.jsonl, .json, .csv, .parquet; docs/data.md) with answers, with test cases
    for code, or with neither"""
    reward: Path | None = None
    """a reward model (of dsv3 reward) that scores open-ended tasks"""
    votes: int = 0
    """self-reward instead of --reward: the share of yes in so many votes of the initial model"""
    num_generations: int = 16
    """completions per prompt"""
    max_new_tokens: int = 48
    """tokens of a completion at most; a completion without its end token has reward 0"""
    temperature: float = 1.0
    """sampling temperature"""
    require_think_format: bool = False
    """require <think>…</think> followed by an answer with exactly one box; otherwise the reward is
    0"""
    system: str = ""
    """system prompt before each question"""
    loss_type: Literal["grpo", "bnpo", "dapo", "dr_grpo", "sequence"] = "grpo"
    """how the loss is aggregated; sequence: one importance ratio per completion, the report's
    eq. 26"""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """divide advantages by the standard deviation of the rewards of the group or of the batch"""
    epsilon: float = 0.2
    """the importance ratio is clipped below at 1 − this"""
    epsilon_high: float = 0.2
    """the importance ratio is clipped above at 1 + this"""
    beta: float = 0.001
    """weight of the KL to the reference model, which is the initial one; 0: it is not loaded"""
    steps_per_generation: int = 1
    """optimizer steps per batch of completions, each on its part of the prompts"""
    max_kl: float = 1.0
    """stop if the mean log π/π_ref (nats per token; `kl_k1` in metrics.jsonl) exceeds this; needs
    the reference model"""
    rollout_backend: Literal["native", "vllm"] = "native"
    """what generates completions: our own decoder, or vLLM, which reads the weights from a Hugging
    Face directory"""
    vllm_tp: int = 1
    """GPUs of vLLM's engine (tensor parallelism)"""
    rollout: tuple[str, ...] = ()
    """URLs of OpenAI-compatible engines that sample the completions (vLLM, SGLang, dsv3 serve with
    --reload-root), such as http://node7:8000; the environment variable DSV3_API_KEY holds their
    key. --hang-timeout must exceed the time of a batch"""
    rollout_dir: Path | None = None
    """directory, on a disk that the engines read, into which the weights are written for them after
    each update, in Hugging Face's format; vLLM must serve it; by default RUN/rollout"""
    sampler_cap: float = 2.0
    """cap C of the weight min(π_old / π_sampler, C) that corrects for the engines' own numerics
    (truncated importance sampling, with --rollout); 0: no correction"""
    max_sampling_logp_difference: float = 0.5
    """stop if the mean |log π| difference between sampler and trainer exceeds this (nats)"""
    negative_control: Literal["none", "random-reward", "no-baseline"] = "none"
    """negative controls: random rewards, or raw rewards used as advantages"""
    micro_batch: int = 64
    """completions per forward pass; 0: all"""
    data: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    val_data: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    fim_rate: Annotated[float, tyro.conf.Suppress] = 0.0
    data_streams: Annotated[int, tyro.conf.Suppress] = 1
    streaming: Annotated[bool, tyro.conf.Suppress] = False

    COMMAND: ClassVar[str] = "rl"
    RECIPES: ClassVar[dict[str, TrainingRecipe]] = GRPO_RECIPES
    DEFAULT_RECIPE: ClassVar[str] = "v3"

    def validation_rules(self) -> list[tuple[bool, str]]:
        """Return the rules of this command: whether each holds, and the error if not."""
        open_ended = [name for name in parse_weights(self.tasks) if get_task(name).is_open_ended]
        batch_size = min(self.recipe.global_batch_size, self.recipe.start_batch_size)
        return [
            (self.init is not None, "--init is missing: the fine-tuned model to start from"),
            (self.recipe.steps >= 1, "--steps must be at least 1"),
            (
                self.num_generations >= 2,
                "--num-generations must be at least 2: rewards are compared within a group",
            ),
            (self.max_new_tokens >= 1, "--max-new-tokens must be at least 1"),
            (0 < self.temperature < math.inf, "--temperature must be above 0"),
            (0 <= self.epsilon < 1, "--epsilon must be from 0 to below 1"),
            (self.epsilon_high >= 0, "--epsilon-high must be at least 0"),
            (0 <= self.beta < math.inf, "--beta must be at least 0"),
            (
                min(self.max_kl, self.max_sampling_logp_difference) > 0,
                "--max-kl and --max-sampling-logp-difference must be above 0",
            ),
            (self.vllm_tp >= 1, "--vllm-tp must be at least 1"),
            (len(self.tasks) > 0, "--tasks needs at least one name"),
            *unused_loss_rules(self.recipe),
            (
                1 <= self.steps_per_generation <= batch_size,
                "--steps-per-generation must be from 1 to --global-batch-size and "
                "--start-batch-size",
            ),
            (
                self.reward is not None or self.votes != 0 or not open_ended,
                f"{', '.join(open_ended)} have no right answers: --reward must name a reward "
                "model, or --votes a number of votes",
            ),
            *self.rollout_rules(),
            (self.votes >= 0, "--votes must be at least 0"),
            (not (self.reward and self.votes), "give --reward or --votes, not both"),
        ]

    def rollout_rules(self) -> list[tuple[bool, str]]:
        """Return the rules of engines that sample, and of a mesh, which cannot sample itself."""
        is_whole = not self.divides_model
        return [
            (
                is_whole or bool(self.rollout),
                "with --pp, --ep or --fully-shard no rank holds a whole model to sample from: give "
                "--rollout the URLs of engines",
            ),
            (
                is_whole or not (self.reward or self.votes),
                "--reward and --votes need a whole model on each rank: leave --pp, --ep and "
                "--fully-shard out, or choose tasks with right answers",
            ),
            (
                is_whole or self.precision != "fp8",
                "with --pp and --ep above 1, weights in FP8 cannot be given to engines: set "
                "--precision bf16",
            ),
            (
                not self.rollout or self.rollout_backend == "native",
                "give --rollout or --rollout-backend vllm, not both",
            ),
            (
                not self.rollout or self.temperature == 1,
                "--rollout needs --temperature 1: engines report log-probabilities of the model "
                "before the temperature is applied",
            ),
            (0 <= self.sampler_cap < math.inf, "--sampler-cap must be at least 0"),
        ]


# ── Prompts ──


class PromptDataset:
    """Problems drawn at random: first a task by weight, then one of its problems."""

    def __init__(self, weights: dict[str, float], seed: int):
        self.weights = weights
        self.seed = seed
        self.num_drawn = 0

    def next_batch(self, n: int) -> list[Problem]:
        """Return the next n problems."""
        return [self.draw() for _ in range(n)]

    def draw(self) -> Problem:
        """Draw one problem."""
        rng = random.Random(f"{self.seed} {self.num_drawn}")
        self.num_drawn += 1
        name = rng.choices(list(self.weights), list(self.weights.values()))[0]
        return rng.choice(get_task(name).problems[0])

    def state_dict(self) -> dict[str, int]:
        """Return the number of problems drawn, which seeds the next draw."""
        return {"drawn": self.num_drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at the position where `state_dict` was called."""
        self.num_drawn = state["drawn"]


# ── Rewards ──


@dataclass
class Rollout:
    """A sampled completion of a group, with its reward and advantage."""

    problem: Problem
    prompt: list[int]
    tokens: list[int]
    logps: list[float]  # log π of each token when it was sampled
    text: str
    reward: float
    advantage: float = 0.0
    is_invalid: bool = False  # the score was not a number from 0 to 1, or there was none
    old_logps: Tensor | None = None  # log π before the first of several optimizer steps
    ref_logps: Tensor | None = None  # log π of the reference model


class RewardFn:
    """The rewards of completions: by the task's rule or, for open-ended tasks, by a model."""

    def __init__(
        self,
        config: GRPOConfig,
        chat: ChatTemplate,
        voter: Policy | None,
        warn: Callable[[str], object],
        device: torch.device,
    ):
        self.stop_token_ids = chat.stop_token_ids
        self.voter = voter
        self.votes = config.votes
        self.require_think_format = config.require_think_format
        self.warn = warn
        self.reported: set[tuple[str, str]] = set()  # (task, kind of failure)
        self.model: RewardModel | None = None
        if config.reward:
            self.model = RewardModel(config.reward, device)
            if self.model.with_reference:
                raise UserError(
                    f"--reward {config.reward} needs reference answers, which open-ended tasks "
                    "lack: train one without --with-reference"
                )
            if self.model.chat.tokenizer.get_vocab() != chat.tokenizer.get_vocab():
                raise UserError(
                    f"--reward {config.reward} and --init {config.init} have different "
                    "tokenizers: train the reward model from the same model"
                )

    def __call__(self, rollouts: list[Rollout]) -> None:
        """Fill in the rewards; a completion without an end token or with an invalid one has 0."""
        open_ended: list[Rollout] = []
        verifiable: list[Rollout] = []
        for rollout in rollouts:
            if rollout.tokens[-1] in self.stop_token_ids:
                task = get_task(rollout.problem.domain)
                part = open_ended if task.is_open_ended else verifiable
                part.append(rollout)
        rewards = [*map_parallel(self.rule_reward, verifiable), *self.model_reward(open_ended)]
        failures: dict[tuple[str, str], list[str]] = defaultdict(list)
        for rollout, value in zip([*verifiable, *open_ended], rewards):
            rollout.reward, failure = check_reward(value)
            rollout.is_invalid = bool(failure)
            if failure:
                failures[rollout.problem.domain, failure.partition(":")[0]].append(failure)
        self.report(failures, len(rollouts))

    def report(self, failures: dict[tuple[str, str], list[str]], num_rollouts: int) -> None:
        """Report each kind of invalid reward of a task once, with its number."""
        for (name, kind), messages in failures.items():
            if (name, kind) not in self.reported:
                self.reported.add((name, kind))
                self.warn(
                    f"the scorer of {name} failed and counts 0 for {len(messages)} of "
                    f"{num_rollouts} answers: {messages[0]} (later ones: invalid_rewards in "
                    "metrics.jsonl)"
                )

    def model_reward(self, rollouts: list[Rollout]) -> list[float]:
        """Return the share of yes votes, or the reward model's σ(r), between 0 and 1."""
        if not rollouts:
            return []
        if self.votes:
            assert self.voter is not None
            answers = [(rollout.problem.transcript, rollout.text) for rollout in rollouts]
            return vote_reward(self.voter.sample_votes(answers, self.votes), self.votes).tolist()
        assert self.model is not None
        samples = [rollout.prompt + rollout.tokens for rollout in rollouts]
        return self.model.score(samples).sigmoid().tolist()

    @property
    def num_malformed(self) -> int:
        """The judgments so far that are neither yes nor no, or have no end."""
        return (self.voter.num_malformed if self.voter else 0) + (
            self.model.num_malformed if self.model else 0
        )

    def rule_reward(self, rollout: Rollout) -> object:
        """Return the task's score as it is, or the exception of a scorer that fails."""
        if self.require_think_format and not has_think_format(rollout.text):
            return 0.0
        try:
            return get_task(rollout.problem.domain).score(rollout.text, rollout.problem)
        except UserError:  # only the user can fix it
            raise
        except Exception as e:  # a scorer's failure must not end the run
            return e


def check_reward(value: Any) -> tuple[float, str]:
    """Return a score as a reward and "", or 0 and what is wrong with it.

    Numbers of numpy, tensors with one value and booleans are scores too.
    """
    if isinstance(value, Exception):
        return 0.0, f"{type(value).__name__}: {value}"
    try:
        reward = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError):
        reward = math.nan
    if not 0 <= reward <= 1:
        return 0.0, f"not a number from 0 to 1: {value!r}"
    return reward, ""


# ── The run ──


def fingerprint_model(name: str, directory: Path) -> dict[str, Any]:
    """Return the checksums of a model's files, or without a manifest their names and sizes."""
    folder = native.resolve_checkpoint_dir(directory)
    if has_manifest(folder):
        files = read_manifest(folder)["files"]
        return {"name": name, "files": {file: about["sha256"] for file, about in files.items()}}
    return fingerprint_files(name, [str(p) for p in sorted(folder.glob("*.safetensors"))])


class GRPOTask:
    """GRPO: the model is trained on its own completions, rewarded relative to their group."""

    replicates_data: ClassVar[bool] = True
    monitor: ClassVar[str] = "val_reward"
    monitor_mode: ClassVar[Literal["min", "max"]] = "max"

    def __init__(self, config: GRPOConfig):
        self.config = config
        self.requires_whole_model = not config.divides_model
        self.objective = GRPOObjective(
            config.temperature, (config.epsilon, config.epsilon_high), config.beta,
            config.loss_type, config.max_new_tokens, config.sampler_cap if config.rollout else 0.0,
        )  # fmt: skip
        self.reference: Any = None  # as the strategy holds it
        self.vllm: VllmRollouts | None = None
        self.engines: RolloutEngines | None = None
        self.synced_step: int | None = None  # the step whose weights these have
        self.groups: list[list[Rollout]] = []  # of all processes, of the last batch
        self.rollout_seconds = 0.0
        self.num_malformed = 0  # judgments of this process's last batch
        self.num_constant_steps = 0  # consecutive ones without a difference between rewards

    def build_data(self) -> Data:
        """Parse the tasks and decide how many prompts each step has."""
        config, recipe = self.config, self.config.recipe
        weights = parse_weights(config.tasks)
        chat = find_chat_template(config)
        return Data(
            names=list(weights),
            batch_size_schedule=get_batch_size_schedule(recipe, recipe.steps),
            val={},
            special_tokens=chat.special_tokens,
            chat=chat,
            minibatches=config.steps_per_generation,
            loader=PromptDataset(weights, config.seed),
            tokenizer=chat.tokenizer,
            fingerprints=(*map(fingerprint_task, weights), *self.fingerprint_models()),
        )

    def fingerprint_models(self) -> list[dict]:
        """Return the fingerprints of the models that the objective and the reward depend on."""
        config = self.config
        fingerprints = []
        if config.beta or config.votes:
            assert config.init is not None  # `validation_rules`
            fingerprints.append(fingerprint_model("the reference model", config.init))
        if config.reward:
            fingerprints.append(fingerprint_model("the reward model", config.reward))
        return fingerprints

    def prepare(self, run: Run) -> None:
        """Load the reference model and the scorer; evaluate the initial model."""
        config, strategy = self.config, run.strategy
        chat = run.data.chat
        assert chat is not None  # `build_data` sets it
        self.device = strategy.device
        voter = None
        if config.beta or config.votes:
            assert config.init is not None  # `validation_rules`
            self.reference = strategy.load_frozen(self, config.init)
        if config.votes:
            voter = Policy(as_transformer(self.reference), chat)
        self.reward_fn = RewardFn(config, chat, voter, print_to_stderr, self.device)
        self.check_prompts(run)
        if config.rollout_backend == "vllm":
            if strategy.dp_size > 1:
                raise UserError("--rollout-backend vllm runs in one process: start one")
            model = as_transformer(strategy.model)
            self.vllm = VllmRollouts(model, run.run_dir / "vllm", config.vllm_tp)
        if config.rollout:
            self.engines = RolloutEngines(config.rollout, config.seed)
        if run.is_new_from_init:
            before = {"held_out": self.score_held_out(run), "samples": self.answer_samples(run)}
            if strategy.is_main:
                write_json(run.run_dir / BEFORE, before)

    def check_prompts(self, run: Run) -> None:
        """Raise a `UserError` if a prompt of a file leaves no room for its answer."""
        assert run.data.chat is not None  # `build_data` sets it
        policy = Policy(as_transformer(run.strategy.model), run.data.chat)
        system = self.config.system
        for name in run.data.names:
            if name not in TASKS:
                train, held_out = get_task(name).problems
                prompts = [policy.chat.render_prompt(p.messages(system)) for p in train + held_out]
                check_prompt_length(policy.model, prompts, self.config.max_new_tokens)

    # ── Rollouts ──

    def generate_rollouts(
        self, run: Run, problems: list[Problem], num_generations: int, temperature: float
    ) -> list[Rollout]:
        """Return a group of rewarded completions of each problem, one group after another."""
        self.refresh_samplers(run)
        with run.strategy.precision_context():
            return run.strategy.call_once(
                lambda: self.sample_rollouts(run, problems, num_generations, temperature)
            )

    def sample_rollouts(
        self, run: Run, problems: list[Problem], num_generations: int, temperature: float
    ) -> list[Rollout]:
        """Sample completions of each problem and reward them, in this process."""
        model, config = as_transformer(run.strategy.model), self.config
        prompts = [problem.messages(config.system) for problem in problems]
        assert run.data.chat is not None  # `build_data` sets it
        policy = Policy(model, run.data.chat, self.engines or self.vllm)
        completions = policy.generate(prompts, num_generations, config.max_new_tokens, temperature)
        rollouts = []
        for i, x in enumerate(completions):
            problem = problems[i // num_generations]
            rollouts.append(Rollout(problem, x.prompt, x.tokens, x.logps, x.text, 0.0))
        self.reward_fn(rollouts)
        return rollouts

    def refresh_samplers(self, run: Run) -> None:
        """Give vLLM or the engines behind --rollout the weights of this step."""
        if self.synced_step == run.state.step:
            return
        if self.vllm:
            self.vllm.refresh(as_transformer(run.strategy.model))
        if self.engines:
            folder = (self.config.rollout_dir or run.run_dir / "rollout").resolve()
            run.strategy.export_weights(folder)
            engines, step = self.engines, run.state.step
            run.strategy.broadcast(lambda: engines.refresh(folder, step))
        self.synced_step = run.state.step

    def next_batch(self, run: Run, n: int) -> list[Rollout]:
        """Return this process's rollouts of the next n prompts, with their advantages."""
        config, start = self.config, time.perf_counter()
        group = config.num_generations
        assert run.data.loader is not None  # `replicates_data`: every rank reads the data
        problems = run.strategy.shard(run.data.loader.next_batch(n))
        num_malformed = self.reward_fn.num_malformed
        rollouts = self.generate_rollouts(run, problems, group, config.temperature)
        self.num_malformed = self.reward_fn.num_malformed - num_malformed
        reward_b = torch.tensor([x.reward for x in rollouts])
        if config.negative_control == "random-reward":
            reward_b = (torch.rand(len(rollouts)) < 0.5).float()
        if config.negative_control != "no-baseline":
            reward_b = advantages(reward_b, group, config.scale_rewards)
        for rollout, advantage in zip(rollouts, reward_b.tolist()):
            rollout.advantage = advantage
        groups = [rollouts[i : i + group] for i in range(0, len(rollouts), group)]
        self.groups = run.strategy.all_gather(groups)
        self.rollout_seconds = time.perf_counter() - start
        return rollouts

    def num_tokens(self, batch: list[Rollout]) -> int:
        """Return the number of tokens of the completions."""
        return sum(len(rollout.tokens) for rollout in batch)

    # ── The loss ──

    def minibatches(self, run: Run, batch: list[Rollout]) -> list[list[Rollout]]:
        """Deal the groups out to the optimizer steps of this batch.

        Log-probabilities that do not depend on these steps are computed before them.
        """
        n = self.config.steps_per_generation
        self.objective.start_batch(has_reference=self.reference is not None)
        parts: list[list[Rollout]] = [[] for _ in range(n)]
        for i, rollout in enumerate(batch):
            parts[i // self.config.num_generations % n].append(rollout)
        for part in map(self.with_gradient, parts):
            if n > 1:
                for rollout, logps in zip(part, self.logprobs(run, part)):
                    rollout.old_logps = logps
            if self.reference is not None:
                for rollout, logps in zip(part, self.logprobs(run, part, self.reference)):
                    rollout.ref_logps = logps
        return parts

    def with_gradient(self, rollouts: list[Rollout]) -> list[Rollout]:
        """Return the rollouts with a gradient, or the first one if there are none."""
        return [x for x in rollouts if x.advantage or self.config.beta] or rollouts[:1]

    def logprobs(self, run: Run, rollouts: list[Rollout], frozen: Any = None) -> list[Tensor]:
        """Return log π of each completion's tokens, under the trained or under a frozen model."""
        rows = make_rows(rollouts)
        width = rows.sampled_logp_bt.shape[1]
        logp_bt = run.strategy.read_out(self, rows, self.objective.read_logprobs, width, frozen)
        return [logp_t[: len(x.tokens)] for x, logp_t in zip(rollouts, logp_bt.to("cpu"))]

    def micro_batches(self, run: Run, batch: list[Rollout]) -> list[RolloutRows]:
        """Split the rollouts with a gradient into parts of at most --micro-batch."""
        return self.row_batch(run, batch).split(self.config.micro_batch)

    def row_batch(self, run: Run, batch: list[Rollout]) -> RolloutRows:
        """Return the rollouts with a gradient as rows; the others are counted but not computed."""
        total = run.strategy.all_reduce({"tokens": self.num_tokens(batch)})["tokens"]
        live = self.with_gradient(batch)
        self.objective.start_minibatch(len(batch), len(live), total / run.strategy.dp_size)
        return make_rows(live)

    def loss(
        self, model: Transformer, micro_batch: RolloutRows, balance_loss_scope: BalanceLossScope
    ) -> LossOutput:
        """Return `grpo_loss` of a micro-batch as its part of the mean over all rollouts."""
        return objective_loss(self.objective, model, micro_batch)

    def loss_weight(self, micro_batch: RolloutRows) -> int:
        """Return the number of rollouts."""
        return len(micro_batch)

    # ── Metrics and validation ──

    def token_means(self, run: Run) -> dict[str, float]:
        """Return this batch's metrics averaged over tokens; abort a run that diverges."""
        own = {name: float(value) for name, value in self.objective.sums.items()}
        config, sums = self.config, run.strategy.sum_over_ranks(own)
        means = {k: v / max(1.0, sums["tokens"]) for k, v in sums.items()}
        if not means.get("kl_k1", 0.0) <= config.max_kl:  # the tail of k₃ is too heavy
            run.abort("KL to the reference model", means["kl_k1"])
        difference = means["sampling_logp_difference"]
        if (self.vllm or self.engines) and not difference <= config.max_sampling_logp_difference:
            run.abort("difference of log π between sampler and trainer", difference)
        return means

    def metrics(self, run: Run, row: dict) -> dict:
        """Return the metrics row with rewards and token means, without the gate biases."""
        means = self.token_means(run)
        rollouts: list[Rollout] = []
        for group in self.groups:
            rollouts += group
        rewards: dict[str, list[float]] = defaultdict(list)
        for rollout in rollouts:
            rewards[rollout.problem.domain].append(rollout.reward)
        has_zero_std = [float(not any(x.advantage for x in group)) for group in self.groups]
        self.warn_of_constant_rewards(run, {x.reward for x in rollouts}, mean(has_zero_std))
        judgments = run.strategy.all_reduce({"malformed": self.num_malformed})
        example = rollouts[0]
        row = {k: v for k, v in row.items() if k != "expert_bias"}
        return row | {k: means.get(k) for k in TOKEN_METRICS} | {
            "reward": mean(x.reward for x in rollouts),
            "reward_by": {name: mean(values) for name, values in rewards.items()},
            "length": mean(len(x.tokens) for x in rollouts),
            "frac_reward_zero_std": mean(has_zero_std),
            "invalid_rewards": sum(x.is_invalid for x in rollouts),
            "malformed_judgments": int(judgments["malformed"]),
            "rollout_seconds": self.rollout_seconds,
            "example": {
                "prompt": example.problem.question, "text": example.text,
                "reward": example.reward,
            },
        }  # fmt: skip

    def warn_of_constant_rewards(self, run: Run, rewards: set[float], frac_zero_std: float) -> None:
        """Report once that no group has had different rewards for CONSTANT_STEPS steps."""
        self.num_constant_steps = self.num_constant_steps + 1 if frac_zero_std == 1 else 0
        if self.num_constant_steps == CONSTANT_STEPS and run.strategy.is_main:
            values = ", ".join(f"{reward:g}" for reward in sorted(rewards)[:3])
            print_to_stderr(
                f"no group had different rewards in the last {CONSTANT_STEPS} steps (now all "
                f"{values}), so nothing is learned: look at the example in metrics.jsonl, at the "
                "answers of the data and at --max-new-tokens"
            )

    def score_held_out(self, run: Run) -> dict[str, dict[str, float]]:
        """Return each task's mean reward of greedy and of sampled answers, and their length."""
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
                    "greedy": mean(x.reward for x in greedy),
                    "sampled": mean(x.reward for x in sampled),
                    "length": mean(len(x.tokens) for x in sampled),
                }
        return results

    def validate(self, run: Run) -> dict:
        """Return rewards on held-out problems; `val_reward` is the first task's, greedy."""
        held_out = self.score_held_out(run)
        return {"held_out": held_out, "val_reward": held_out[run.data.names[0]]["greedy"]}

    def answer_samples(self, run: Run) -> list[dict]:
        """Return greedy answers to a few held-out questions of each task."""
        problems: list[Problem] = []
        for name in run.data.names:
            problems += get_task(name).problems[1][:3]
        return [
            {"prompt": x.problem.question, "text": x.text, "temperature": 0.0}
            for x in self.generate_rollouts(run, problems, 1, 0.0)
        ]

    def summarize(self, run: Run, row: dict) -> dict:
        """Return the contents of summary.json: held-out rewards and answers, before and after."""
        before = atomic.read_json(run.run_dir / BEFORE)
        pairs = zip(self.answer_samples(run), before["samples"])
        return {
            "val_reward": row["val_reward"], "seconds": run.state.seconds,
            "tokens": run.state.tokens, "before": before["held_out"], "after": row["held_out"],
            "samples": [after | {"before": earlier["text"]} for after, earlier in pairs],
        }  # fmt: skip

    def summarize_rank(self, run: Run) -> None:
        """Take part in answering the samples, unless rank 0 can do it alone."""
        if not self.requires_whole_model:
            self.answer_samples(run)

    def describe_data(self, run: Run) -> str:
        """Return how many prompts and completions of which tasks a step has."""
        prompts = self.config.recipe.global_batch_size
        names = ", ".join(run.data.names)
        return f"{prompts} questions × {self.config.num_generations} answers of {names}"

    def result_line(self, run: Run, row: dict) -> str:
        """Return the result in one sentence: the first task's reward, before and after."""
        name = run.data.names[0]
        before = atomic.read_json(run.run_dir / BEFORE)["held_out"][name]["greedy"]
        after = row["held_out"][name]["greedy"]
        what = "mean reward" if get_task(name).is_open_ended else "accuracy"
        return f"{name}: {what} {before:.3f} before, {after:.3f} after, on held-out problems"


# ── Rows ──


def make_rows(rollouts: list[Rollout]) -> RolloutRows:
    """Return rollouts as rows of prompts with their completions, on the host."""
    samples = [torch.tensor(x.prompt + x.tokens) for x in rollouts]
    return RolloutRows(
        rows_bs=pad_sequence(samples, batch_first=True),
        num_prompt_tokens_b=torch.tensor([len(x.prompt) for x in rollouts]),
        num_tokens_b=torch.tensor([len(sample) for sample in samples]),
        advantage_b=torch.tensor([x.advantage for x in rollouts]),
        sampled_logp_bt=pad_sequence([torch.tensor(x.logps) for x in rollouts], batch_first=True),
        old_logp_bt=pad_logprobs([x.old_logps for x in rollouts]),
        ref_logp_bt=pad_logprobs([x.ref_logps for x in rollouts]),
    )


def pad_logprobs(logps: list[Tensor | None]) -> Tensor | None:
    """Pad log-probabilities of completions to equal lengths, (b, t); None if not computed."""
    computed = [x for x in logps if x is not None]
    return pad_sequence(computed, batch_first=True) if computed else None
