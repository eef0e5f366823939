"""Files and directories that appear whole or not at all: staging, renaming, locks, JSON."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from dsv3_ref.config import UserError

TMP, OLD = "dsv3-tmp", "dsv3-old"


@contextmanager
def atomic_dir(directory) -> Iterator[Path]:
    """`with atomic_dir(d) as tmp`: what is written to tmp becomes d, or d stays as it was."""
    final = Path(directory).resolve()
    try:
        tmp = make_staging_dir(final)
        try:
            yield tmp
            publish_dir(tmp, final)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)
    except (OSError, SafetensorError) as e:
        raise UserError(f"could not write {final} ({e}); what was there is untouched") from e


def make_staging_dir(final: Path) -> Path:
    """An empty temporary directory beside `final`; drops what a killed run left there."""
    recover_dir(final)
    tmp = temp_sibling(final, TMP)
    if tmp.exists():
        shutil.rmtree(tmp)
    tmp.mkdir(parents=True)
    return tmp


def publish_dir(tmp: Path, final: Path) -> None:
    """Make `tmp` the directory `final`, on disk before in name; what `final` was is dropped."""
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
    """Drop a directory set aside, or put it back when nothing took its place."""
    old = temp_sibling(final, OLD)
    if old.is_dir() and final.exists():
        shutil.rmtree(old)
    elif old.is_dir():
        os.rename(old, final)


def remove_dir(directory) -> None:
    """Drop a directory: killed half way, nothing is left under its name."""
    tmp = temp_sibling(Path(directory), TMP)
    shutil.rmtree(tmp, ignore_errors=True)
    os.rename(directory, tmp)
    shutil.rmtree(tmp)


def clean_temp(parent) -> None:
    """Clean up after killed runs: temporary directories go, one set aside gets its name back."""
    for old in Path(parent).glob(f".*.{OLD}"):
        recover_dir(old.with_name(old.name[1 : -len(OLD) - 1]))
    for tmp in Path(parent).glob(f".*.{TMP}"):
        shutil.rmtree(tmp)


def temp_sibling(directory: Path, suffix: str) -> Path:
    """`runs/x` → `runs/.x.dsv3-tmp`: on the same disk, so that renaming is atomic."""
    return directory.with_name(f".{directory.name}.{suffix}")


def fsync_path(path: Path) -> None:
    """Wait until a file or directory is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def try_lock(handle: int) -> bool:
    """False if another process holds the folder; a file system without locks is trusted."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def write_json(path: Path, value) -> None:
    """Write beside, then rename: a reader never sees half a file."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1))
    part.replace(path)


def read_json(path: Path) -> dict:
    """A JSON object from a file, or a `UserError`."""
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path.parent} is no checkpoint: it has no {path.name}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is not JSON: {e}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold an object of fields, not a {type(values).__name__}")
    return values
