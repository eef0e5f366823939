"""A run on several ranks: that of one process, its parts replaced by the cluster's."""

from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from dsv3_ref import ops
from dsv3_ref.checkpoints import atomic, native
from dsv3_ref.checkpoints import sharded as sharded
from dsv3_ref.config import UserError
from dsv3_ref.parallel.build import local_experts_of
from dsv3_ref.parallel.data_parallel import Replicas, Several
from dsv3_ref.parallel.engine import ParallelEngine
from dsv3_ref.parallel.mesh import Mesh, init_distributed, resolve_parallel_dims
from dsv3_ref.parallel.watchdog import track_operation, watch
from dsv3_ref.pretrain import StepStats
from dsv3_ref.training import resume, settings
from dsv3_ref.training.ema import EMA
from dsv3_ref.training.loop import Trainer, start, work
from dsv3_ref.training.malloc import tune_malloc
from dsv3_ref.training.settings import TrainConfig
from dsv3_ref.training.spike_guard import EXIT_CODES, catch_signals


class Ranks(Several):
    """A rank's part of a run, before a `Trainer` in the order of bases.

    Rank 0 reads the data for all.
    """

    def __init__(self, args: TrainConfig, folder: Path, device: torch.device):
        self.mesh = Mesh(
            *resolve_parallel_dims(dist.get_world_size(), args.pp, args.ep, args.dp or None), device
        )
        super().__init__(args, folder)

    @property
    def params(self) -> int:
        return self.engine.num_params

    @property
    def where(self) -> str:
        m = self.mesh
        return f"{m.world} ranks (pp {m.pp} × dp {m.dp} × ep {m.ep}) on {self.device.type}"

    def pick_device(self) -> torch.device:
        return self.mesh.device

    def open_data(self) -> None:
        self.rows, read = None, super().open_data
        told = lambda: read() or tuple(getattr(self, name) for name in self.KNOWN)
        for name, value in zip(self.KNOWN, from_first(told)):
            setattr(self, name, value)

    def build(self) -> None:
        a = self.args
        moments = torch.bfloat16 if a.optimizer_dtype == "bf16" else torch.float32
        fp8 = a.dispatch_dtype == "fp8" or (a.dispatch_dtype == "auto" and a.precision == "fp8")
        self.engine = ParallelEngine(a.model, a.recipe, self.mesh, a.schedule, a.seed, moments, a.zero,
                               a.micro_batch, a.ep_ranks_per_node, fp8, a.token_dispatcher == "deepep",
                               self.special_tokens)  # fmt: skip
        if self.fresh:
            native.load_into(self.engine.model, a.init, partial(local_experts_of, self.mesh))
        self.model, self.checkpointer = self.engine.model, sharded.AsyncCheckpointer()
        self.ema = (
            EMA(self.model, self.engine.optimizer.adamw, a.ema_decay) if a.ema_decay else None
        )

    @contextmanager
    def arithmetic(self):
        """As one process computes, with backward passes that can be split."""
        with super().arithmetic():
            backends = ops.expand_backends(ops.ACTIVE_BACKENDS, self.device.type)
            with ops.use(*split(backends)):
                yield

    def batch(self, n: int) -> torch.Tensor:
        shape = n, self.args.recipe.seq_len + 1
        rows_bs = self.rows.next_batch(n) if self.first else None
        with track_operation(f"rows of step {self.step + 1}", range(self.mesh.world)):
            return self.mesh.broadcast_from_rank0(rows_bs, shape, torch.int64)

    def compute(self, tokens_bs, *settings) -> StepStats:
        return self.engine.train_step(tokens_bs, *settings)

    def row(self, s: StepStats) -> dict:
        return super().row(s) | self.engine.comm_stats()

    def nll(self, rows_bs) -> float:
        return self.engine.sum_nll(rows_bs)

    def biases(self) -> list:
        return list(self.engine.gather_expert_biases())

    def samples(self) -> list[dict]:
        """By rank 0, from the checkpoint just written."""
        mine, self.model = self.model, native.load(self.folder).to(self.device)
        try:
            return super().samples()
        finally:
            self.model = mine

    # ── Checkpoints ──

    def save(self, val_loss: float | None) -> None:
        """Start to write; the rows before it are on disk first. The last one is waited for."""
        extra = None
        if self.ema:
            self.ema.wait()
        if self.first:
            atomic.fsync_path(self.folder / "metrics.jsonl")
            state, tensors = resume.train_state(self, val_loss)
            state |= {
                "optimizer_steps": self.engine.optimizer.step_count,
                "ema_t": self.ema.t if self.ema else 0,
            }
            extra = state, tensors
        self.settle()
        folder = self.folder / "checkpoints" / f"step_{self.step:07}"
        self.checkpointer.save(self.engine, folder, extra, self.ema)
        if self.step == len(self.plan) or self.asked:
            self.settle()

    def settle(self) -> None:
        """Until the last checkpoint is complete; then the old ones go."""
        self.checkpointer.wait()
        if self.first and native.list_checkpoints(self.folder):
            resume.prune(self.folder, self.args.keep_latest_k)

    def load(self, folder: Path, data: bool = True) -> None:
        if self.ema:
            self.ema.wait()
        sharded.load_sharded(self.engine, folder, self.ema)
        state = atomic.read_json(folder / resume.STATE)
        self.engine.optimizer.step_count = state["optimizer_steps"]
        if self.ema:
            self.ema.t = state["ema_t"]
        resume.load_train_state(self, state, load_file(folder / resume.TENSORS), data)

    def rollback_point(self) -> Path | None:
        self.settle()
        return from_first(lambda: (resume.rollback_point(self.folder),))[0]


def split(backends: tuple[str, ...]) -> tuple[str, ...]:
    """Return the backends with `zero_bubble` before those whose products cannot be deferred."""
    if "torch" not in backends:
        raise UserError(f"on several ranks DSV3_BACKEND needs torch after {','.join(backends)}")
    i = min(backends.index(name) for name in ("cpu", "torch") if name in backends)
    return *backends[:i], "zero_bubble", *backends[i:]


# ── From start to report ──


def from_first(make):
    """make() on rank 0, its result on all; if rank 0 gives up, so does everyone."""
    box = [None]
    try:
        box = [make()] if dist.get_rank() == 0 else box
    finally:
        dist.broadcast_object_list(box, 0)
    if box[0] is None:
        raise SystemExit(2)  # rank 0 has said why
    return box[0]


def run(args: TrainConfig, command: str | None = None, trainer_of=Trainer) -> Path:
    """A run as one of the ranks that torchrun or srun has started."""
    settings.validate_args(args)
    tune_malloc()
    with init_distributed(args.device) as device, ExitStack() as stack:
        folder = from_first(lambda: stack.enter_context(settings.lock_run_dir(args)))
        asked = stack.enter_context(catch_signals())
        here = dist.get_rank(), dist.get_world_size()
        stack.enter_context(watch(folder / "logs", *here, args.hang_timeout))
        part = Ranks if trainer_of.sharded else Replicas
        kind = type("ClusterTrainer", (part, trainer_of), {})
        make = lambda args, folder: kind(args, folder, device)
        if dist.get_rank() == 0:
            trainer = start(args, folder, command, make)
            trainer.asked = asked
            work(trainer)
        else:
            trainer = make(args, folder)
            trainer.restore()
            trainer.asked = asked
            follow(trainer)
        dist.barrier()  # nobody leaves, and takes the store along, while others work
    return folder


def follow(trainer) -> None:
    """What the other ranks do while rank 0 works."""
    for _ in trainer.train():
        pass
    if trainer.step < len(trainer.plan):
        raise SystemExit(EXIT_CODES[trainer.asked[-1]])
    trainer.other_sources()  # for rank 0's summary
