"""Storage of sharded checkpoints: safetensors files and a table of their tensors in JSON.

torch.distributed.checkpoint plans who writes and who reads what. Its own format is not used: the
table (`.metadata`) can run code when it is read. Ours holds nothing but names and numbers.
"""

import json
import math
import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    STATE_DICT_TYPE,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from dsv3_ref.checkpoints.atomic import read_json, write_json
from dsv3_ref.checkpoints.layout import SHARD_TABLE
from dsv3_ref.checkpoints.manifest import file_checksums
from dsv3_ref.config import UserError

TABLE_FORMAT = 1
MAX_DIMS = 16  # of a tensor that the table may describe


class SafetensorsWriter(StorageWriter, AsyncStager):
    """Writes `rank_00000.safetensors` per rank and, on the coordinator, the table of tensors.

    The tensors are taken as they are: pass copies if training continues meanwhile.
    """

    _synchronize_after_execute = False

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.checksums: dict[str, dict[str, str]] = {}  # by file, on the coordinator, at the end

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Write to another folder."""
        self.folder = Path(checkpoint_id) if checkpoint_id else self.folder

    def stage(self, state_dict: STATE_DICT_TYPE) -> STATE_DICT_TYPE:
        """Return the tensors, which are copies already."""
        return state_dict

    def synchronize_staging(self) -> None:
        """Return at once: `stage` copies nothing."""

    def close(self) -> None:
        """Return at once: nothing is held open."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Return at once: the folder exists already."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Give each rank the name of its file."""
        return [
            SavePlan(p.items, f"rank_{i:05}.safetensors", p.planner_data, p.usable)
            for i, p in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future:
        """Write this rank's tensors into its file and hash it, so that no other rank must."""
        tensors: dict[str, torch.Tensor] = {}
        sizes: dict[MetadataIndex, int] = {}
        for item in plan.items:
            if item.tensor_data is None:
                raise TypeError(f"{item.index.fqn} is not a tensor")
            key = chunk_key(item.index.fqn, item.tensor_data.chunk.offsets)
            value = planner.resolve_data(item)
            assert isinstance(value, torch.Tensor)
            tensors[key] = value.detach().cpu().contiguous()
            sizes[item.index] = tensors[key].nbytes
        results = []
        if tensors:
            path = self.folder / plan.storage_data
            save_file(tensors, path)
            written = path.name, file_checksums(path)
            results = [WriteResult(index, size, written) for index, size in sizes.items()]
        done: Future = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the table: dtype, shape and chunks of every tensor, and the file of each chunk."""
        written = {r.index: r.storage_data for r in chain.from_iterable(results)}
        self.checksums = dict(written.values())
        tensors: dict[str, dict[str, Any]] = {}
        for name, about in metadata.state_dict_metadata.items():
            assert isinstance(about, TensorStorageMetadata)
            tensors[name] = {
                "dtype": str(about.properties.dtype).removeprefix("torch."),
                "shape": list(about.size),
                "chunks": [
                    [list(c.offsets), list(c.sizes), written[MetadataIndex(name, c.offsets)][0]]
                    for c in about.chunks
                ],
            }
        write_json(self.folder / SHARD_TABLE, {"format": TABLE_FORMAT, "tensors": tensors})

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether this is a path."""
        return isinstance(checkpoint_id, str | os.PathLike)


class SafetensorsReader(StorageReader):
    """Reads what `SafetensorsWriter` wrote: of every tensor only the part that a rank needs."""

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.files: dict[MetadataIndex, str] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Read from another folder."""
        self.folder = Path(checkpoint_id) if checkpoint_id else self.folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the table, or raise a `UserError` if it does not describe tensors."""
        return read_table(self.folder)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Remember which file holds which chunk."""
        self.files = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future:
        """Copy the planned parts of the stored tensors into their targets."""
        opened: dict[str, Any] = {}
        for item in plan.items:
            index = item.storage_index
            name = self.files[index]
            if name not in opened:
                opened[name] = open_shard(self.folder / name)
            parts = [
                slice(start, start + length)
                for start, length in zip(item.storage_offsets, item.lengths)
            ]
            target = planner.resolve_tensor(item)
            try:
                stored = opened[name].get_slice(chunk_key(index.fqn, index.offset or ()))
                value = stored[tuple(parts)] if parts else stored[...]
            except (SafetensorError, IndexError, ValueError) as e:
                raise UserError(f"{self.folder / name}: {index.fqn}: {e}") from None
            target.detach().copy_(value.view(target.shape))
            planner.commit_tensor(item, target)
        done: Future = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether this is a path."""
        return isinstance(checkpoint_id, str | os.PathLike)


def read_into(folder: Path, targets: dict[str, torch.Tensor], alone: bool = False) -> None:
    """Fill tensors from a sharded checkpoint; `alone`: not as one of several ranks.

    Raise a `UserError` on every rank if one of them cannot read its part.
    """
    try:
        dcp.load(targets, storage_reader=SafetensorsReader(folder), no_dist=alone)
    except dcp.CheckpointException as e:
        first = next(iter(e.failures.values()))[0]
        raise UserError(f"{folder} cannot be read: {first}") from None


def chunk_key(name: str, offsets: tuple[int, ...]) -> str:
    """Return the name of a chunk in its file: the tensor's, with the offsets unless all are 0."""
    return f"{name}@{','.join(map(str, offsets))}" if any(offsets) else name


def open_shard(path: Path) -> Any:
    """Map a safetensors file, or raise a `UserError` that names it."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is missing, damaged or cut off ({e}): copy it again") from None


# ── The table ──


def read_table(folder: Path) -> Metadata:
    """Return what the table of a folder says, or raise a `UserError` if it makes no sense."""
    path = folder / SHARD_TABLE
    table = read_json(path)
    if table.get("format") != TABLE_FORMAT:
        raise UserError(f"{path} is of format {table.get('format')!r}, not {TABLE_FORMAT}")
    tensors: dict[str, Any] = {}
    files: dict[MetadataIndex, str] = {}
    try:
        for name, about in table["tensors"].items():
            tensors[name] = tensor_metadata(about)
            files |= dict(chunk_files(name, about))
    except (TypeError, ValueError, KeyError, AttributeError) as e:
        raise UserError(f"{path} is damaged: {e}") from None
    return Metadata(tensors, storage_data=files)


def tensor_metadata(about: dict[str, Any]) -> TensorStorageMetadata:
    """Return dtype, shape and chunks of a tensor; raise a `ValueError` unless they fit together."""
    dtype = getattr(torch, about["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{about['dtype']!r} is not a dtype")
    shape = parse_sizes(about["shape"])
    chunks = [
        ChunkStorageMetadata(parse_sizes(offsets), parse_sizes(sizes))
        for offsets, sizes, _ in about["chunks"]
    ]
    for chunk in chunks:
        ends = [a + b for a, b in zip(chunk.offsets, chunk.sizes, strict=True)]
        if any(end > size for end, size in zip(ends, shape, strict=True)):
            raise ValueError(f"a chunk ends at {ends} in a tensor of shape {list(shape)}")
    if sum(math.prod(c.sizes) for c in chunks) != math.prod(shape):
        raise ValueError(f"the chunks of a tensor do not fill its shape {list(shape)}")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), shape, chunks)


def chunk_files(name: str, about: dict[str, Any]) -> Iterator[tuple[MetadataIndex, str]]:
    """Yield every chunk of a tensor with its file; raise a `ValueError` for a path outside."""
    for offsets, _, file in about["chunks"]:
        if file != os.path.basename(file) or not file.endswith(".safetensors"):
            raise ValueError(f"{file!r} is not the name of a safetensors file")
        yield MetadataIndex(name, parse_sizes(offsets)), file


def parse_sizes(values: list[int]) -> torch.Size:
    """Return a shape; raise a `ValueError` for anything but a few natural numbers."""
    is_sane = isinstance(values, list) and len(values) <= MAX_DIMS
    if not is_sane or not all(type(v) is int and v >= 0 for v in values):
        raise ValueError(f"{json.dumps(values)} is not a shape")
    return torch.Size(values)
