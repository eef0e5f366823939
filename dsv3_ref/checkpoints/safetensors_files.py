"""Weights as safetensors, in one file or in several behind an index; FP8 weights with scales."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dsv3_ref.checkpoints.atomic import read_json
from dsv3_ref.checkpoints.layout import CONFIG, INDEX, WEIGHTS
from dsv3_ref.config import UserError
from dsv3_ref.fp8 import weight_dequant

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


def open_file(path: Path) -> Any:
    """Map a safetensors file, without reading it yet."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{path} is named in {INDEX} but is not there: copy it too") from None
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is damaged or cut off ({e}): copy it again") from None


# ── Writing ──


def keep_tensor(name: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a tensor to be stored as it is."""
    return {name: x}


def write_safetensors(
    directory: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], shard_bytes: int,
    convert: ConvertTensor = keep_tensor,
) -> None:  # fmt: skip
    """Write config.json and safetensors, with an index if one file would exceed `shard_bytes`.

    convert: returns what is stored for a tensor, by name; it is called file by file, so that the
    converted tensors of one file are in memory.
    """
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    groups = group_by_size({name: t.nbytes for name, t in tensors.items()}, shard_bytes)
    weight_map: dict[str, str] = {}
    total = 0
    for i, names in enumerate(groups, start=1):
        file = WEIGHTS if len(groups) == 1 else f"model-{i:05}-of-{len(groups):05}.safetensors"
        group: dict[str, torch.Tensor] = {}
        for name in names:
            group |= convert(name, tensors[name].detach())
        group = {name: x.cpu().contiguous() for name, x in group.items()}
        save_file(group, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(group, file)
        total += sum(x.nbytes for x in group.values())
    if len(groups) > 1:
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
