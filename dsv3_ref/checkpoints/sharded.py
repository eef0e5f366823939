"""Sharded checkpoints by torch.distributed.checkpoint, which any mesh can load.

Every tensor has its global name, and every expert is a tensor of its own, so that nothing depends
on which rank held it. Moments are put together from their slices first.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import FileSystemReader

from dsv3_ref.checkpoints.atomic import TMP, make_staging_dir, publish_dir, temp_sibling
from dsv3_ref.checkpoints.layout import CONFIG, STATE, TENSORS, is_expert
from dsv3_ref.config import Config, from_dict
from dsv3_ref.model import Transformer


def global_tensors(prefix: str, name: str, x: torch.Tensor, first: int) -> dict[str, torch.Tensor]:
    """A tensor under its global name; experts each under theirs, the first of them is `first`."""
    if not is_expert(name):
        return {f"{prefix}{name}": x}
    return {f"{prefix}{name}.{first + i}": row for i, row in enumerate(x)}


def local_tensors(engine, ema=None) -> dict[str, torch.Tensor]:
    """Copies of all that this rank can say: parameters, biases, moments, averages; on the CPU."""
    c, mesh = engine.config, engine.mesh
    first, out = mesh.ep_rank * c.n_routed_experts // mesh.ep, {}
    for name, x in engine.model.state_dict().items():
        out |= global_tensors("model.", name, x, first)
    for bucket in engine.optimizer.buckets:
        for kind, own in engine.optimizer.moments(bucket).items():
            flat = bucket.all_gather(own)
            for name in bucket.names:
                out |= global_tensors(f"{kind}.", name, bucket.view(flat, name), first)
    for name, x in ema.mean.items() if ema else ():
        out |= global_tensors("ema.", name, x, first)
    return {name: x.detach().to("cpu", copy=True) for name, x in out.items()}


def load_tensors(engine, tensors: dict[str, torch.Tensor], ema=None) -> None:
    """The reverse of `local_tensors`, from tensors of the names that it gave."""
    c, mesh = engine.config, engine.mesh
    first = mesh.ep_rank * c.n_routed_experts // mesh.ep
    found = lambda prefix, name, like: copy_into(global_tensors(prefix, name, like, first), tensors)
    with torch.no_grad():
        for name, x in engine.model.state_dict().items():
            found("model.", name, x)
        for bucket in engine.optimizer.buckets:
            for kind, own in engine.optimizer.moments(bucket).items():
                flat = torch.zeros_like(bucket.flat, dtype=own.dtype)
                for name in bucket.names:
                    found(f"{kind}.", name, bucket.view(flat, name))
                own.copy_(bucket.shard_of(flat))
        for name, x in ema.mean.items() if ema else ():
            found("ema.", name, x)


def copy_into(places: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    """Tensors into the places of the same names."""
    for name, x in places.items():
        x.copy_(tensors[name])


class AsyncCheckpointer:
    """Writes in the background; a checkpoint appears under its name once it is whole."""

    def __init__(self):
        self.group, self.thread, self.writing = (
            dist.new_group(backend="gloo"), ThreadPoolExecutor(1), None
        )  # fmt: skip

    def save(self, engine, folder: Path, extra, ema=None) -> None:
        """Copy, and go on; extra: what rank 0 adds, (values for JSON, tensors), elsewhere None."""
        self.wait()
        if extra:
            make_staging_dir(folder)
        dist.barrier(self.group)
        copies, part = local_tensors(engine, ema), temp_sibling(folder, TMP)
        saved = dcp.async_save(copies, checkpoint_id=part, process_group=self.group)
        self.writing = self.thread.submit(self.finish, saved, folder, extra, engine.config)

    def finish(self, saved, folder: Path, extra, c: Config) -> None:
        """In the thread: rank 0's part ends after all others', and then it gives the name."""
        saved.result()
        if extra:
            part, (state, tensors) = temp_sibling(folder, TMP), extra
            (part / CONFIG).write_text(json.dumps(asdict(c), indent=2) + "\n")
            save_file(tensors, part / TENSORS)
            (part / STATE).write_text(json.dumps(state))
            publish_dir(part, folder)

    def wait(self) -> None:
        """Until the checkpoint under way has its name, on all ranks."""
        if self.writing:
            self.writing.result()
            dist.barrier(self.group)
            self.writing = None


def load_sharded(engine, folder: Path, ema=None) -> None:
    """What this rank holds, from a checkpoint of any mesh."""
    tensors = local_tensors(engine, ema)
    dcp.load(tensors, checkpoint_id=folder)
    load_tensors(engine, tensors, ema)


def consolidate(folder: Path) -> Transformer:
    """The model of a sharded checkpoint, read by one process."""
    with torch.device("meta"):
        model = Transformer(from_dict(json.loads((folder / CONFIG).read_text())))
    model, places = model.to_empty(device="cpu"), {}
    for name, x in model.state_dict().items():
        places |= global_tensors("model.", name, x, 0)
    dcp.load(places, storage_reader=FileSystemReader(folder), no_dist=True)
    return model
