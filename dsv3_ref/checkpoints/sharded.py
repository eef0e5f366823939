"""Sharded checkpoints, planned by torch.distributed.checkpoint, which any mesh can load.

Every tensor has its global name, and every expert is a tensor of its own, so a checkpoint does not
depend on which rank held what. Moments are gathered from their shards first.
"""

import json
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn

from dsv3_ref.checkpoints.atomic import TMP, make_staging_dir, publish_dir, read_json, temp_sibling
from dsv3_ref.checkpoints.layout import CONFIG, STATE, TENSORS, is_expert
from dsv3_ref.checkpoints.manifest import write_manifest
from dsv3_ref.checkpoints.storage import SafetensorsWriter, read_into, read_table
from dsv3_ref.config import Config, UserError, from_dict
from dsv3_ref.model import Transformer


class ShardedModel(Protocol):
    """One rank's part of a model in training, with its optimizer buckets and its mesh."""

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
    def optimizer(self) -> Any:
        """The optimizer, whose buckets hold this rank's shards."""
        ...


class WeightAverage(Protocol):
    """An exponential moving average of this rank's shards, by the number of their bucket."""

    mean: dict[str, Tensor]


Extra = tuple[dict, dict[str, Tensor], dict]  # values for JSON, tensors, what the manifest says


def global_tensors(prefix: str, name: str, x: Tensor, first: int) -> dict[str, Tensor]:
    """Return a tensor under its global name, or each of its experts from number `first` on."""
    if not is_expert(name):
        return {f"{prefix}{name}": x}
    return {f"{prefix}{name}.{first + i}": row for i, row in enumerate(x)}


def first_expert(engine: ShardedModel) -> int:
    """Return the number of the first expert that this rank holds."""
    return engine.mesh.ep_rank * engine.config.n_routed_experts // engine.mesh.ep


def shards_by_kind(
    engine: ShardedModel, ema: WeightAverage | None
) -> list[tuple[Any, dict[str, Tensor]]]:
    """Return every bucket with this rank's shards of its masters, moments and averages."""
    shards = []
    for i, bucket in enumerate(engine.optimizer.buckets):
        own = {"model": bucket.shard.detach(), **engine.optimizer.moments(bucket)}
        if ema:
            own["ema"] = ema.mean[str(i)]
        shards.append((bucket, own))
    return shards


def buffers(engine: ShardedModel) -> dict[str, Tensor]:
    """Return the tensors of the model that are not parameters: the biases of its gates."""
    params = dict(engine.model.named_parameters())
    return {n: x for n, x in engine.model.state_dict().items() if n not in params}


def local_tensors(engine: ShardedModel, ema: WeightAverage | None = None) -> dict[str, Tensor]:
    """Return CPU copies of this rank's master weights, biases, moments and averages."""
    first = first_expert(engine)
    out: dict[str, Tensor] = {}
    for name, x in buffers(engine).items():
        out |= global_tensors("model.", name, x, first)
    for bucket, shards in shards_by_kind(engine, ema):
        for kind, shard in shards.items():
            flat = bucket.all_gather(shard.to(bucket.flat.device))
            for name in bucket.names:
                out |= global_tensors(f"{kind}.", name, bucket.view(flat, name), first)
    return {name: x.detach().to("cpu", copy=True) for name, x in out.items()}


def load_tensors(
    engine: ShardedModel, tensors: dict[str, Tensor], ema: WeightAverage | None = None
) -> None:
    """Copy tensors with the names of `local_tensors` to where that function took them from.

    A collective call, which ends by computing the model's weights from their masters.
    """
    first = first_expert(engine)

    def load(prefix: str, name: str, target: Tensor) -> None:
        for key, x in global_tensors(prefix, name, target, first).items():
            x.copy_(tensors[key])

    with torch.no_grad():
        for name, x in buffers(engine).items():
            load("model.", name, x)
        for bucket, shards in shards_by_kind(engine, ema):
            for kind, shard in shards.items():
                flat = torch.zeros_like(bucket.flat, dtype=shard.dtype, device=shard.device)
                for name in bucket.names:
                    load(f"{kind}.", name, bucket.view(flat, name))
                shard.copy_(bucket.shard_of(flat))
    engine.optimizer.gather_weights()


class AsyncCheckpointer:
    """Writes checkpoints in the background; each appears under its name once it is complete."""

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo")
        self.thread = ThreadPoolExecutor(1)
        self.writing: Future | None = None

    def save(
        self, engine: ShardedModel, folder: Path, extra: Extra | None,
        ema: WeightAverage | None = None,
    ) -> None:  # fmt: skip
        """Copy this rank's tensors and start to write them.

        extra: what rank 0 adds; None on the other ranks. A collective call.
        """
        self.wait()
        if extra:
            make_staging_dir(folder)
        dist.barrier(self.group)
        writer = SafetensorsWriter(temp_sibling(folder, TMP))
        saved = dcp.async_save(
            local_tensors(engine, ema), process_group=self.group, storage_writer=writer
        )
        self.writing = self.thread.submit(self.finish, saved, writer, folder, extra, engine.config)

    def finish(
        self, saved: Any, writer: SafetensorsWriter, folder: Path, extra: Extra | None,
        config: Config,
    ) -> None:  # fmt: skip
        """Complete a checkpoint; runs in the writer thread.

        Once all ranks have written their shards, rank 0 renames the directory to its final name.
        """
        saved.result()
        if extra:
            part = temp_sibling(folder, TMP)
            values, tensors, about = extra
            (part / CONFIG).write_text(
                json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8"
            )
            save_file(tensors, part / TENSORS)
            (part / STATE).write_text(json.dumps(values), encoding="utf-8")
            write_manifest(part, about, writer.checksums)
            publish_dir(part, folder)

    def wait(self) -> None:
        """Wait until the checkpoint in progress has its final name, on all ranks."""
        if self.writing:
            self.writing.result()
            dist.barrier(self.group)
            self.writing = None


def build_on_meta(config: Config, n_stored: int, folder: Path) -> Transformer:
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
        with torch.device("meta"):
            return Transformer(config)
    except RuntimeError as e:  # more elements than a tensor can have
        raise UserError(f"{folder / CONFIG} has impossible sizes ({e}): copy it again") from None


def consolidate(folder: Path) -> Transformer:
    """Return the whole model of a sharded checkpoint, loaded by this process alone."""
    n_stored = len(read_table(folder).state_dict_metadata)
    model = build_on_meta(from_dict(read_json(folder / CONFIG)), n_stored, folder)
    n_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if sum(x.numel() for x in model.state_dict().values()) > n_bytes:
        raise UserError(
            f"{folder / CONFIG} asks for more weights than the files hold: copy the directory again"
        )
    model = model.to_empty(device="cpu")
    targets: dict[str, Tensor] = {}
    for name, x in model.state_dict().items():
        targets |= global_tensors("model.", name, x, 0)
    read_into(folder, targets, alone=True)
    return model
