"""Files and directories that appear whole or not at all: staging, renaming, locks, JSON."""

import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from dsv3_ref.config import UserError

TMP, OLD = "dsv3-tmp", "dsv3-old"
MAX_JSON_BYTES = 1 << 28  # the index of the full model has 9 MB
LOCK = ".lock"  # the file by which a process locks a directory


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
    """Remove a directory; rename it first, so that a kill never leaves part of it.

    Of a symbolic link, only the link is removed.
    """
    if Path(directory).is_symlink():
        os.unlink(directory)
        return
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
    """Wait until a file or directory is on disk; Windows cannot wait for a directory."""
    is_windows = os.name == "nt"
    if is_windows and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def remove_new_files(folder: Path, unless: Callable[[Path], bool]) -> Iterator[None]:
    """Create a directory if it is missing; if the `with` fails, remove what it has added.

    Other processes must not write there meanwhile: lock it inside the `with`.
    unless: called with the directory after an error; if it returns True, everything is kept.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = set(folder.iterdir())
    except OSError as e:
        raise UserError(f"{folder} cannot be used ({e.strerror}): choose another --out") from None
    try:
        yield
    except BaseException:
        if not unless(folder):
            for path in set(folder.iterdir()) - before:
                remove_path(path)
            with suppress(OSError):  # others have written there
                for path in missing:
                    path.rmdir()
        raise


def remove_path(path: Path) -> None:
    """Remove a file, or a directory with its contents."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextmanager
def lock_dir(folder: Path) -> Iterator[bool]:
    """Lock a directory until the end of the `with`; yield False if another process holds it.

    The lock is a file in the directory, removed at the end. On a file system without locks, yield
    True.
    """
    lock = FileLock(folder / LOCK, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    except OSError:
        if not os.access(folder, os.W_OK):
            raise
    try:
        yield True
    finally:
        with suppress(OSError):  # Windows removes it when it is released
            (folder / LOCK).unlink()
        lock.release()


def refuse_link(name: str, flags: int) -> int:
    """Open a file for `open`; raise a `UserError` for a link, which leads to a file elsewhere."""
    if os.path.islink(name):
        raise UserError(
            f"{name} is a link to {os.path.realpath(name)}: replace it by that file if you trust it"
        )
    return os.open(name, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def open_own(path: Path, mode: str) -> IO[Any]:
    """Open a file of a run for writing in place; raise a `UserError` if it is a link.

    A run may come from a stranger, whose links lead to files of yours. Text is UTF-8.
    """
    return open(path, mode, encoding=None if "b" in mode else "utf-8", opener=refuse_link)


def clear_path(path: Path) -> Path:
    """Remove the file or link at a path that is about to be written; return the path."""
    path.unlink(missing_ok=True)
    return path


def replace_text(path: Path, text: str) -> None:
    """Write a text to a temporary file, then rename it, so that readers never see part of it."""
    part = clear_path(path.with_suffix(".part"))
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, of which readers never see part."""
    replace_text(path, json.dumps(value, indent=1))


def check_regular(path: Path, max_bytes: float | None = None) -> None:
    """Raise an `OSError` for what reading would not end: a pipe, a device, a file too large.

    max_bytes: MAX_JSON_BYTES by default.
    """
    limit = MAX_JSON_BYTES if max_bytes is None else max_bytes
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise OSError("it is not a regular file")
    if about.st_size > limit:
        raise OSError(f"it has {about.st_size:,} bytes, more than {limit:,}")


def read_text(path: Path) -> str:
    """Return the text of a file that comes with a model; raise a `UserError` if it is too large."""
    try:
        check_regular(path)
        return path.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text ({e}): copy it again") from None


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a checkpoint or run, or raise a `UserError`."""
    try:
        check_regular(path)
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} is not a checkpoint: {path.name} is missing") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e}") from None
    except (ValueError, RecursionError) as e:  # not JSON, not UTF-8, or nested without end
        raise UserError(f"{path} is not JSON: {e}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold an object of fields, not {describe_json(values)}")
    return values


def describe_json(value: Any) -> str:
    """Return what kind of JSON value this is."""
    names = {list: "a list", dict: "an object", str: "a string", bool: "a truth value",
             int: "a number", float: "a number", type(None): "null"}  # fmt: skip
    return names.get(type(value), type(value).__name__)
