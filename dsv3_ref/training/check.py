"""`dsv3 check`: verify what lies on disk, without loading a model."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dsv3_ref.checkpoints.atomic import read_json
from dsv3_ref.checkpoints.layout import INDEX
from dsv3_ref.checkpoints.manifest import MANIFEST, find_damage, has_manifest, verify
from dsv3_ref.checkpoints.native import (
    CheckpointReader,
    is_sharded,
    list_checkpoints,
    resolve_checkpoint_dir,
)
from dsv3_ref.checkpoints.storage import read_table
from dsv3_ref.config import UserError
from dsv3_ref.data.prepare import summary
from dsv3_ref.data.shards import Shards, is_shards


@dataclass(frozen=True)
class CheckConfig:
    """Verify the files of a run, a model or a folder of shards.

    Checkpoints and shards carry checksums. A Hugging Face directory carries none: names, shapes,
    dtypes and sizes are compared with its config and index.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """a run, a checkpoint, a Hugging Face directory, or a folder of shards"""


def run_check(args: CheckConfig) -> None:
    """Print what is whole; raise a `UserError` that names everything damaged."""
    damages = []
    for damage, sentence in check_folder(args.folder):
        if damage:
            damages.append(damage)
        else:
            print(sentence)
    if damages:
        raise UserError("; ".join(damages))


def check_folder(folder: Path) -> Iterator[tuple[str | None, str]]:
    """Yield (damage or None, what is whole) for each part of a folder."""
    if is_shards(str(folder)):
        yield check_shards(folder)
    elif checkpoints := list_checkpoints(folder):
        for checkpoint in checkpoints:
            yield find_damage(checkpoint, by_sha256=True), f"{checkpoint} is whole"
    else:
        yield check_model(resolve_checkpoint_dir(folder))


def check_shards(folder: Path) -> tuple[str | None, str]:
    """Compare every checksum of a folder of shards."""
    try:
        shards = Shards(folder)
        shards.verify_checksums()
    except UserError as e:
        return str(e), ""
    return None, f"{folder} is whole: {summary(shards.index)}"


def check_model(folder: Path) -> tuple[str | None, str]:
    """Compare a model with its manifest, or without one with its config and index."""
    try:
        verify(folder, by_sha256=True)
        n_tensors = len(read_table(folder)) if is_sharded(folder) else check_tensors(folder)
    except UserError as e:
        return str(e), ""
    how = f"as {MANIFEST} says" if has_manifest(folder) else "by shapes and sizes; no checksums"
    return None, f"{folder} is whole ({how}): {n_tensors:,} tensors"


def check_tensors(folder: Path) -> int:
    """Compare names, shapes, dtypes and sizes of tensors with config and index; return how many."""
    stored = CheckpointReader(folder).stored  # raises for a missing tensor or another shape
    n_bytes = sum(stored.nbytes(name) for name in stored.files)  # raises for another dtype
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        stray = sorted(set(index.get("weight_map", {})) ^ set(stored.files))
        if stray:
            raise UserError(f"{folder / INDEX} and the files disagree about {stray[0]}")
        total = index.get("metadata", {}).get("total_size")
        if total is not None and int(total) != n_bytes:
            raise UserError(
                f"{folder}: its tensors have {n_bytes:,} bytes, but {INDEX} says {int(total):,}"
            )
    return len(stored.files)
