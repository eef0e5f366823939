"""Weights as safetensors, in one file or in several behind an index; FP8 weights with scales."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dsv3_ref.checkpoints.atomic import check_regular, read_json
from dsv3_ref.checkpoints.layout import CONFIG, INDEX, WEIGHTS
from dsv3_ref.config import UserError, ceil_div
from dsv3_ref.fp8 import BLOCK_SIZE, weight_dequant

SAFETENSORS = ".safetensors"
SHARD_BYTES = 5_000_000_000  # of a file before another one starts
SCALE_SUFFIX = "_scale_inv"  # an FP8 weight's scales have its name and this suffix
FP8 = torch.float8_e4m3fn
ConvertTensor = Callable[[str, torch.Tensor], dict[str, torch.Tensor]]
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}


class FlatRange(NamedTuple):
    """Consecutive elements of a tensor in row-major order."""

    shape: torch.Size  # of the whole tensor
    start: int  # number of the first element
    values: torch.Tensor  # (n,); to be filled, or to be stored


# ── Reading ──


class TensorFiles:
    """The tensors of a directory, by stored name; each is read when it is asked for."""

    def __init__(self, directory: Path, names: Sequence[str] = ()):
        self.directory = directory
        self.files: dict[str, Any] = {}
        for file in [open_file(directory / name) for name in names or weight_files(directory)]:
            self.files |= dict.fromkeys(file.keys(), file)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a stored tensor."""
        return tuple(self.files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a stored tensor, or raise a `UserError` if it is not supported."""
        code = self.files[name].get_slice(name).get_dtype()
        if code not in DTYPES:
            raise UserError(f"{name} is stored as {code}; supported: {', '.join(DTYPES)}")
        return DTYPES[code]

    def nbytes(self, name: str) -> int:
        """Return the bytes of a stored tensor."""
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def read(self, name: str) -> torch.Tensor:
        """Return a stored tensor; an FP8 weight is multiplied by its block scales, in fp32."""
        try:
            tensor = self.files[name].get_tensor(name)
            if tensor.dtype != FP8:
                return tensor
            scales = name + SCALE_SUFFIX
            return weight_dequant(tensor, self.files[scales].get_tensor(scales))
        except (ValueError, SafetensorError) as e:
            raise UserError(f"{self.directory}: {name}: {e}") from None

    def fill(self, name: str, target: FlatRange, expert: int | None = None) -> None:
        """Fill a range of a stored tensor, or of one expert of a stack, (e, …).

        Raise a `LookupError` if there is no such tensor of that shape.
        """
        shape = self.shape(name)[0 if expert is None else 1 :]
        if shape != tuple(target.shape):
            raise LookupError(f"{name} has shape {shape}, not {tuple(target.shape)}")
        end = target.start + len(target.values)
        target.values.copy_(self.read_flat(name, target.start, end, expert))

    def read_flat(self, name: str, start: int, end: int, expert: int | None) -> torch.Tensor:
        """Return elements start … end − 1 of a stored tensor, or of one expert of a stack, (n,).

        Only the rows that hold them are read, of an FP8 weight also the rest of their blocks.
        """
        try:
            stored = self.files[name].get_slice(name)
            if self.dtype(name) != FP8:
                return read_flat(stored, start, end, expert)
            scales = self.files[name + SCALE_SUFFIX].get_slice(name + SCALE_SUFFIX)
            return read_fp8(stored, scales, start, end)
        except (ValueError, SafetensorError) as e:
            raise UserError(f"{self.directory}: {name}: {e}") from None


def read_flat(stored: Any, start: int, end: int, expert: int | None = None) -> torch.Tensor:
    """Return elements start … end − 1 of a slice of safetensors in row-major order, (n,).

    expert: elements are counted in this expert of a stack, (e, …). Only the rows that hold the
    elements are read.
    """
    shape = stored.get_shape()[0 if expert is None else 1 :]
    if not shape:
        return stored[...].view(-1)[start:end]
    width = math.prod(shape[1:])
    first = start // width
    rows = slice(first, ceil_div(end, width))
    values = stored[rows] if expert is None else stored[expert, rows]
    return values.reshape(-1)[start - first * width : end - first * width]


def read_fp8(stored: Any, scales: Any, start: int, end: int) -> torch.Tensor:
    """Return elements start … end − 1 of an FP8 weight times its block scales, in fp32, (n,)."""
    width = stored.get_shape()[1]
    first = start // width // BLOCK_SIZE  # block of rows
    stop = ceil_div(end, width)
    codes = stored[first * BLOCK_SIZE : stop]
    values = weight_dequant(codes, scales[first : ceil_div(stop, BLOCK_SIZE)]).view(-1)
    skipped = first * BLOCK_SIZE * width
    return values[start - skipped : end - skipped]


def weight_files(directory: Path) -> list[str]:
    """Return the names of the files that hold a directory's weights.

    Raises a `UserError` if there are none, or if one file and an index of others could both be
    meant.
    """
    has_one = (directory / WEIGHTS).is_file()
    if not (directory / INDEX).is_file():
        if has_one:
            return [WEIGHTS]
        raise UserError(f"{directory} has neither {WEIGHTS} nor {INDEX}; only these are read")
    names = indexed_files(directory / INDEX)
    if has_one and WEIGHTS not in names:
        raise UserError(
            f"{directory} has {WEIGHTS} and also {INDEX}, which names {len(names)} other files: "
            "remove the one that does not belong to this model"
        )
    return names


def indexed_files(path: Path) -> list[str]:
    """Return the files that an index names; raise a `UserError` unless they are in its folder."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path} has no weight_map: copy it again")
    for name in weight_map.values():
        if not isinstance(name, str) or name != Path(name).name or not name.endswith(SAFETENSORS):
            raise UserError(
                f"{path}: {name!r} is not the name of a safetensors file in this directory: "
                "copy the model again from a place that you trust"
            )
    return sorted(set(weight_map.values()))


def open_file(path: Path, named_in: str = INDEX) -> Any:
    """Map a safetensors file, without reading it yet."""
    try:
        check_regular(path, max_bytes=math.inf)
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{path} is named in {named_in} but is not there: copy it too") from None
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is damaged or cut off ({e}): copy it again") from None


# ── Writing ──


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when it is written."""

    nbytes: int  # about; decides which tensors share a file
    read: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class WrittenTensor:
    """A tensor of a directory that is being written."""

    name: str
    file: str
    nbytes: int


def keep_tensor(name: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a tensor to be stored as it is."""
    return {name: x}


def write_safetensors(
    directory: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], shard_bytes: int
) -> None:
    """Write config.json and safetensors, with an index if one file would exceed `shard_bytes`."""
    write_config(directory, config)
    lazy = {name: LazyTensor(x.nbytes, x.detach) for name, x in tensors.items()}
    write_index(directory, write_files(directory, lazy, shard_bytes))


def write_config(directory: Path, config: dict[str, Any]) -> None:
    """Write config.json."""
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_files(
    directory: Path, tensors: dict[str, LazyTensor], shard_bytes: int,
    convert: ConvertTensor = keep_tensor, part: int = 0, parts: int = 1,
) -> list[WrittenTensor]:  # fmt: skip
    """Write the safetensors files that are the `part` of `parts`; return what they hold.

    Tensors are read and converted file by file, so that those of one file are in memory. convert:
    returns what is stored for a tensor, by name.
    """
    groups = group_by_size({name: t.nbytes for name, t in tensors.items()}, shard_bytes)
    written: list[WrittenTensor] = []
    for i, names in list(enumerate(groups, start=1))[part::parts]:
        file = WEIGHTS if len(groups) == 1 else f"model-{i:05}-of-{len(groups):05}.safetensors"
        group: dict[str, torch.Tensor] = {}
        for name in names:
            stored = convert(name, tensors[name].read())
            group |= {key: x.cpu().contiguous() for key, x in stored.items()}
        save_file(group, directory / file, metadata={"format": "pt"})
        written += [WrittenTensor(name, file, x.nbytes) for name, x in group.items()]
    return written


def write_index(directory: Path, written: Iterable[WrittenTensor]) -> None:
    """Write the index of the tensors of all parts, unless they are all in model.safetensors."""
    weight_map: dict[str, str] = {}
    total = 0
    for tensor in sorted(written, key=lambda tensor: tensor.file):
        weight_map[tensor.name] = tensor.file
        total += tensor.nbytes
    if set(weight_map.values()) != {WEIGHTS}:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def group_by_size(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Cut names, in order, into groups of at most `limit` bytes; a larger tensor is alone."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if groups[-1] and used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups
