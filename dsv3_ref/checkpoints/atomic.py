"""Files and directories that appear whole or not at all: staging, renaming, locks, JSON."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dsv3_ref.config import UserError

TMP, OLD = "dsv3-tmp", "dsv3-old"


@contextmanager
def atomic_dir(directory: str | PathLike[str]) -> Iterator[Path]:
    """Yield a temporary directory that is renamed to `directory` at the end.

    If an error occurs, `directory` stays as it was.
    """
    final = Path(directory).resolve()
    try:
        tmp = make_staging_dir(final)
        try:
            yield tmp
            publish_dir(tmp, final)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)
    except (OSError, SafetensorError) as e:
        raise UserError(f"could not write {final} ({e}); its previous content is unchanged") from e


def make_staging_dir(final: Path) -> Path:
    """Create an empty temporary directory next to `final` and remove that of a killed run."""
    recover_dir(final)
    tmp = temp_sibling(final, TMP)
    if tmp.exists():
        shutil.rmtree(tmp)
    tmp.mkdir(parents=True)
    return tmp


def publish_dir(tmp: Path, final: Path) -> None:
    """Flush `tmp` to disk, then rename it to `final` and remove the directory it replaces."""
    readable = tmp.stat().st_mode & 0o666  # safetensors writes for its owner only
    for path in [*tmp.rglob("*"), tmp]:
        if path.is_file():
            path.chmod(readable)
        fsync_path(path)
    recover_dir(final)
    if final.exists():
        os.rename(final, temp_sibling(final, OLD))
    try:
        os.rename(tmp, final)
    finally:
        recover_dir(final)
    fsync_path(final.parent)


def recover_dir(final: Path) -> None:
    """Remove the directory that `publish_dir` has set aside; restore it if nothing replaced it."""
    old = temp_sibling(final, OLD)
    if old.is_dir() and final.exists():
        shutil.rmtree(old)
    elif old.is_dir():
        os.rename(old, final)


def remove_dir(directory: str | PathLike[str]) -> None:
    """Remove a directory; rename it first, so that a kill never leaves part of it."""
    tmp = temp_sibling(Path(directory), TMP)
    shutil.rmtree(tmp, ignore_errors=True)
    os.rename(directory, tmp)
    shutil.rmtree(tmp)


def clean_temp(parent: str | PathLike[str]) -> None:
    """Clean up after killed processes: remove temporary directories, restore those set aside."""
    for old in Path(parent).glob(f".*.{OLD}"):
        recover_dir(old.with_name(old.name[1 : -len(OLD) - 1]))
    for tmp in Path(parent).glob(f".*.{TMP}"):
        shutil.rmtree(tmp)


def temp_sibling(directory: Path, suffix: str) -> Path:
    """Return `runs/.x.dsv3-tmp` for `runs/x`: on the same disk, so that renaming is atomic."""
    return directory.with_name(f".{directory.name}.{suffix}")


def fsync_path(path: Path) -> None:
    """Wait until a file or directory is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def try_lock(handle: int) -> bool:
    """Lock an open folder; return False if another process holds the lock.

    On a file system without locks, return True.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a temporary file, then rename it, so that readers never see part of it."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1))
    part.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a checkpoint or run, or raise a `UserError`."""
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path.parent} is not a checkpoint: {path.name} is missing") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e}") from None
    except (ValueError, RecursionError) as e:  # not JSON, not UTF-8, or nested without end
        raise UserError(f"{path} is not JSON: {e}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold an object of fields, not a {type(values).__name__}")
    return values
