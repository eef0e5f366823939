"""Sharded checkpoints: every rank writes the slices that it holds, and any mesh can load them.

Every tensor has its global name, and every expert is a tensor of its own, so a checkpoint does not
depend on which rank held what. Each element of weights, moments and averages is written by exactly
one rank: the one whose ZeRO slice it is in.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from dsv3_ref.checkpoints.atomic import TMP, make_staging_dir, publish_dir, read_json, temp_sibling
from dsv3_ref.checkpoints.layout import CONFIG, STATE, TENSORS
from dsv3_ref.checkpoints.manifest import DamageError, write_manifest
from dsv3_ref.checkpoints.meta import build_on_meta
from dsv3_ref.checkpoints.safetensors_files import FlatRange
from dsv3_ref.checkpoints.storage import (
    RankReport,
    ShardedFiles,
    split_experts,
    whole_ranges,
    write_ranges,
    write_table,
)
from dsv3_ref.config import Config, UserError, from_dict
from dsv3_ref.model import Transformer

Made = TypeVar("Made")


class ShardedOptimizer(Protocol):
    """An optimizer whose states are flat shards of the parameters of a rank."""

    def ranges(
        self, more: Mapping[str, Mapping[str, Tensor]], once: bool
    ) -> Iterator[tuple[str, str, FlatRange]]:
        """Yield (kind, name of a parameter, range) of this rank's masters, moments and `more`.

        more: further shards by kind. once: only what no other rank yields too.
        """
        ...


class ShardedModel(Protocol):
    """One rank's part of a model in training, with its optimizer and its mesh."""

    @property
    def config(self) -> Config:
        """The config of the whole model."""
        ...

    @property
    def mesh(self) -> Any:
        """The mesh of ranks, with the coordinates of this one."""
        ...

    @property
    def model(self) -> nn.Module:
        """The modules that this rank holds."""
        ...

    @property
    def optimizer(self) -> ShardedOptimizer:
        """The optimizer, which holds this rank's shards."""
        ...

    def is_first_holder(self, name: str) -> bool:
        """Return whether this rank is the first of those that hold a buffer."""
        ...


class WeightAverage(Protocol):
    """An exponential moving average of the optimizer's shards, by their names."""

    mean: dict[str, Tensor]


Extra = tuple[dict, dict[str, Tensor], dict]  # values for JSON, tensors, what the manifest says


def first_expert(engine: ShardedModel) -> int:
    """Return the number of the first expert that this rank holds."""
    return engine.mesh.ep_rank * engine.config.n_routed_experts // engine.mesh.ep


def buffer_ranges(engine: ShardedModel, once: bool) -> dict[str, FlatRange]:
    """Return the tensors of a checkpoint that no optimizer updates: the biases of the gates.

    once: leave out what another rank returns, too.
    """
    parameters = dict(engine.model.named_parameters())
    ranges: dict[str, FlatRange] = {}
    for name, x in engine.model.state_dict().items():
        if name not in parameters and (not once or engine.is_first_holder(name)):
            ranges |= whole_ranges(f"model.{name}", x)
    return ranges


def held_ranges(
    engine: ShardedModel, ema: WeightAverage | None = None, once: bool = False
) -> dict[str, FlatRange]:
    """Return this rank's slices of weights, moments and averages by global name, as views.

    once: leave out what another rank returns, too.
    """
    ranges: dict[str, FlatRange] = {}
    for kind, name, part in engine.optimizer.ranges({"ema": ema.mean} if ema else {}, once):
        ranges |= split_experts(f"{kind}.{name}", part, first_expert(engine))
    return ranges | buffer_ranges(engine, once)


def weight_ranges(engine: ShardedModel) -> dict[str, FlatRange]:
    """Return this rank's slices of the weights and the biases of its gates, by our names."""
    ranges = held_ranges(engine)
    prefix = "model."
    return {
        name.removeprefix(prefix): part for name, part in ranges.items() if name.startswith(prefix)
    }


def stage(ranges: dict[str, FlatRange]) -> dict[str, FlatRange]:
    """Copy ranges to the CPU, so that training can continue."""
    return {
        name: part._replace(values=part.values.detach().to("cpu", copy=True))
        for name, part in ranges.items()
    }


def gather_results(make: Callable[[], Made], group: Any = None) -> list[Made]:
    """Return the values of make() of all ranks on the first one, and an empty list on the others.

    If it fails on a rank, raise its error on the first one, which reports it, and end the others. A
    damaged checkpoint is a `DamageError` on every rank. A collective call; a process that is not
    one of several ranks is the first one.
    """
    if not dist.is_initialized():
        return [make()]
    value: Made | None = None
    failure: Exception | SystemExit | None = None
    try:
        value = make()
    except (Exception, SystemExit) as e:  # the other ranks must not wait for this one; SystemExit
        failure = e  # is how a gathering within make() ends all ranks but the first
    errors: list[tuple[bool, str] | None] = [None] * dist.get_world_size(group)
    error = failure and (isinstance(failure, DamageError), str(failure) or repr(failure))
    dist.all_gather_object(errors, error, group)
    if failure and not isinstance(failure, UserError | OSError | SafetensorError):
        raise failure  # a fault of the program, with its traceback
    is_first = dist.get_rank(group) == 0
    for is_damage, text in filter(None, errors):
        if is_damage:
            raise DamageError(text)  # another checkpoint may be whole
        raise UserError(text) if is_first else SystemExit(2)
    return gather_on_first(value, group)


def gather_on_first(value: Any, group: Any = None) -> list[Any]:
    """Return the values of all ranks of a group on its first one, and [] on the others."""
    is_first = dist.get_rank(group) == 0
    values: list[Any] | None = [None] * dist.get_world_size(group) if is_first else None
    dist.gather_object(value, values, dist.get_global_rank(group, 0) if group else 0, group)
    return values or []


class AsyncCheckpointer:
    """Writes checkpoints in the background; each appears under its name once it is complete."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group  # of all ranks, on the CPU
        self.thread = ThreadPoolExecutor(1)
        self.writing: Future | None = None

    def save(
        self, engine: ShardedModel, folder: Path, extra: Extra | None,
        ema: WeightAverage | None = None,
    ) -> None:  # fmt: skip
        """Copy this rank's slices and start to write them.

        extra: what rank 0 adds; None on the other ranks. A collective call.
        """
        self.wait()
        gather_results(lambda: make_staging_dir(folder) if extra else None, self.group)
        staged = stage(held_ranges(engine, ema, once=True))
        self.writing = self.thread.submit(self.write, staged, folder, extra, engine.config)

    def write(
        self, staged: dict[str, FlatRange], folder: Path, extra: Extra | None, config: Config
    ) -> None:
        """Write this rank's file; on rank 0 complete the checkpoint and rename it.

        Runs in the writer thread. Raise a `UserError` if a rank cannot write.
        """
        part, file = temp_sibling(folder, TMP), f"rank_{dist.get_rank(self.group):05}.safetensors"

        def write_own() -> RankReport:
            try:
                return write_ranges(part, file, staged)
            except (OSError, SafetensorError) as e:
                raise UserError(f"could not write {part / file} ({e})") from e

        reports = gather_results(write_own, self.group)
        if extra:
            complete_checkpoint(part, reports, extra, config)
            publish_dir(part, folder)

    def wait(self) -> None:
        """Wait until the checkpoint in progress has its final name, on all ranks."""
        if self.writing:
            writing, self.writing = self.writing, None
            gather_results(writing.result, self.group)


def complete_checkpoint(
    part: Path, reports: list[RankReport], extra: Extra, config: Config
) -> None:
    """Add what rank 0 writes: config, table, state of the run and manifest."""
    values, tensors, about = extra
    (part / CONFIG).write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")
    write_table(part, reports)
    save_file(tensors, part / TENSORS)
    (part / STATE).write_text(json.dumps(values), encoding="utf-8")
    known: dict[str, dict[str, str]] = {}
    for report in reports:
        known |= report.checksums
    write_manifest(part, about, known)


# ── Loading by one process ──


def build_for_files(config: Config, n_stored: int, folder: Path) -> Transformer:
    """Return a model without memory for a folder that holds `n_stored` tensors.

    Raise a `UserError` if they cannot fill it; a model of a billion layers would take hours.
    """
    n_layers = config.n_layers + config.n_mtp_layers
    if n_layers > n_stored:
        raise UserError(
            f"{folder / CONFIG} asks for {n_layers:,} layers, but {n_stored:,} tensors are stored: "
            "copy the directory again"
        )
    try:
        return build_on_meta(config)
    except RuntimeError as e:  # more elements than a tensor can have
        raise UserError(f"{folder / CONFIG} has impossible sizes ({e}): copy it again") from None


class ShardedReader:
    """The weights of a sharded checkpoint, read on demand."""

    def __init__(self, folder: Path):
        self.files = ShardedFiles(folder)
        self.config = from_dict(read_json(folder / CONFIG))
        model = build_for_files(self.config, len(self.files.table), folder)
        self.model, self.expected = model, model.state_dict()
        n_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        if sum(x.numel() for x in self.expected.values()) > n_bytes:
            raise UserError(
                f"{folder / CONFIG} asks for more weights than the files hold: copy the directory "
                "again"
            )

    def target_dtype(self, name: str) -> torch.dtype:
        """Return the stored dtype of one of our tensors."""
        first, part = next(iter(whole_ranges(f"model.{name}", self.expected[name]).items()))
        return self.files.entry(first, part.shape).dtype

    def fill(self, name: str, target: FlatRange) -> None:
        """Fill a range of one of our tensors; experts are named one by one."""
        self.files.fill(f"model.{name}", target)


def consolidate(folder: Path) -> Transformer:
    """Return the whole model of a sharded checkpoint, loaded by this process alone."""
    reader = ShardedReader(folder)
    model = reader.model.to_empty(device="cpu")
    for name, x in model.state_dict().items():
        for key, part in whole_ranges(name, x).items():
            reader.fill(key, part)
    return model
