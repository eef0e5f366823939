"""Storage of sharded checkpoints: safetensors files and a table of their tensors in JSON.

Each rank writes one file of flat ranges: consecutive elements of a tensor in row-major order, such
as a ZeRO slice. The table has the dtype and shape of every tensor, and the file, first element and
length of each of its ranges. Tensors can be read in any other cut. Nothing is unpickled.
"""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dsv3_ref.checkpoints.atomic import read_json, write_json
from dsv3_ref.checkpoints.layout import SHARD_TABLE, is_expert
from dsv3_ref.checkpoints.manifest import file_checksums
from dsv3_ref.checkpoints.safetensors_files import FlatRange, open_file, read_flat
from dsv3_ref.config import UserError, ceil_div

TABLE_FORMAT = 2
MAX_DIMS = 16  # of a tensor that the table may describe


class StoredRange(NamedTuple):
    """A range of a stored tensor."""

    start: int  # number of the first element
    length: int  # elements
    file: str


class StoredTensor(NamedTuple):
    """An entry of the table; the ranges are in order and without gaps."""

    dtype: torch.dtype
    shape: torch.Size
    ranges: tuple[StoredRange, ...]


class RankReport(NamedTuple):
    """The file that a rank has written."""

    tensors: dict[str, tuple[str, list[int], StoredRange]]  # by name: dtype, shape, range
    checksums: dict[str, dict[str, str]]  # by file


def split_experts(name: str, part: FlatRange, first: int = 0) -> dict[str, FlatRange]:
    """Return a range under its global name; that of stacked experts, (e, …), once per expert.

    first: the number of the first of these experts. Experts are stored one by one, so that a
    checkpoint does not depend on which rank held which.
    """
    if not is_expert(name):
        return {name: part}
    shape = part.shape[1:]
    size, end = shape.numel(), part.start + len(part.values)
    ranges: dict[str, FlatRange] = {}
    for i in range(part.start // size, ceil_div(end, size)):
        begin, stop = max(part.start, i * size), min(end, (i + 1) * size)
        values = part.values[begin - part.start : stop - part.start]
        ranges[f"{name}.{first + i}"] = FlatRange(shape, begin - i * size, values)
    return ranges


def whole_ranges(name: str, x: Tensor) -> dict[str, FlatRange]:
    """Return a whole tensor as `split_experts` does; the ranges are views of it."""
    return split_experts(name, FlatRange(x.shape, 0, x.detach().view(-1)))


# ── Writing ──


def range_key(name: str, shape: torch.Size, start: int, length: int) -> str:
    """Return the name of a range in its file: the tensor's, with the start if it is a part."""
    return name if length == shape.numel() else f"{name}@{start}"


def write_ranges(folder: Path, file: str, ranges: dict[str, FlatRange]) -> RankReport:
    """Write the ranges of one rank and hash the file, so that no other rank must read it.

    A whole tensor is stored in its shape, a part as a vector.
    """
    tensors: dict[str, Tensor] = {}
    entries: dict[str, tuple[str, list[int], StoredRange]] = {}
    for name, (shape, start, values) in ranges.items():
        key = range_key(name, shape, start, len(values))
        tensors[key] = values.view(shape) if key == name else values
        dtype = str(values.dtype).removeprefix("torch.")
        entries[name] = dtype, list(shape), StoredRange(start, len(values), file)
    if not tensors:
        return RankReport({}, {})
    save_file(tensors, folder / file)
    return RankReport(entries, {file: file_checksums(folder / file)})


def write_table(folder: Path, reports: Iterable[RankReport]) -> None:
    """Write the table of the tensors that all ranks have written."""
    tensors: dict[str, dict[str, Any]] = {}
    for report in reports:
        for name, (dtype, shape, part) in report.tensors.items():
            entry = tensors.setdefault(name, {"dtype": dtype, "shape": shape, "ranges": []})
            entry["ranges"].append(part)
    for entry in tensors.values():
        entry["ranges"].sort()
    write_json(folder / SHARD_TABLE, {"format": TABLE_FORMAT, "tensors": tensors})


# ── Reading ──


class ShardedFiles:
    """The tensors of a sharded checkpoint; of every file only what is asked for is read."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.table = read_table(folder)
        self.opened: dict[str, Any] = {}

    def entry(self, name: str, shape: torch.Size) -> StoredTensor:
        """Return a tensor's entry; raise a `UserError` if it is missing or has another shape."""
        stored = self.table.get(name)
        if stored is None or stored.shape != shape:
            other = f"it has shape {list(stored.shape)}" if stored else "it is not in the table"
            raise UserError(f"{self.folder} lacks {name} of shape {list(shape)} ({other})")
        return stored

    def fill(self, name: str, target: FlatRange) -> None:
        """Copy a range of a stored tensor into the values of `target`."""
        stored = self.entry(name, target.shape)
        end = target.start + len(target.values)
        for part in stored.ranges:
            begin, stop = max(part.start, target.start), min(part.start + part.length, end)
            if begin < stop:
                values = self.read(name, stored, part, begin, stop)
                target.values[begin - target.start : stop - target.start].copy_(values)

    def read(
        self, name: str, stored: StoredTensor, part: StoredRange, begin: int, stop: int
    ) -> Tensor:
        """Return elements begin … stop − 1 of a tensor, which are in one range."""
        if part.file not in self.opened:
            self.opened[part.file] = open_file(self.folder / part.file, SHARD_TABLE)
        key = range_key(name, stored.shape, part.start, part.length)
        try:
            values = self.opened[part.file].get_slice(key)
            return read_flat(values, begin - part.start, stop - part.start)
        except (SafetensorError, IndexError, ValueError) as e:
            raise UserError(f"{self.folder / part.file}: {name}: {e}") from None


def read_table(folder: Path) -> dict[str, StoredTensor]:
    """Return what the table of a folder says, or raise a `UserError` if it makes no sense."""
    path = folder / SHARD_TABLE
    table = read_json(path)
    if table.get("format") != TABLE_FORMAT:
        raise UserError(f"{path} is of format {table.get('format')!r}, not {TABLE_FORMAT}")
    try:
        return {name: parse_entry(about) for name, about in table["tensors"].items()}
    except (TypeError, ValueError, KeyError, AttributeError) as e:
        raise UserError(f"{path} is damaged: {e}") from None


def parse_entry(about: dict[str, Any]) -> StoredTensor:
    """Return dtype, shape and ranges of a tensor; raise a `ValueError` unless they fit together."""
    dtype = getattr(torch, about["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{about['dtype']!r} is not a dtype")
    shape = parse_sizes(about["shape"])
    ranges = []
    end = 0
    for start, length, file in about["ranges"]:
        parse_sizes([start, length])
        if start != end:
            raise ValueError(f"a range begins at element {start}, the one before it ends at {end}")
        if file != os.path.basename(file) or not file.endswith(".safetensors"):
            raise ValueError(f"{file!r} is not the name of a safetensors file")
        ranges.append(StoredRange(start, length, file))
        end += length
    if end != math.prod(shape):
        raise ValueError(f"the ranges of a tensor do not fill its shape {list(shape)}")
    return StoredTensor(dtype, shape, tuple(ranges))


def parse_sizes(values: list[int]) -> torch.Size:
    """Return a shape; raise a `ValueError` for anything but a few natural numbers."""
    is_sane = isinstance(values, list) and len(values) <= MAX_DIMS
    if not is_sane or not all(type(v) is int and v >= 0 for v in values):
        raise ValueError(f"{json.dumps(values)} is not a shape")
    return torch.Size(values)
