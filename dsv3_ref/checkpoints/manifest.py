"""Manifests: the size and SHA-256 of every file of a directory, verified when it is loaded.

A manifest detects accidents: a flipped bit, a truncated file, files of different copies. It does
not prove who wrote a directory, because anyone who can replace a file can replace the manifest.
"""

import hashlib
import os
import platform
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dsv3_ref import __version__
from dsv3_ref.checkpoints.atomic import read_json, write_json
from dsv3_ref.config import UserError

MANIFEST, MANIFEST_FORMAT = "manifest.json", 1


class DamageError(UserError):
    """A directory whose files are not those that were written."""


# ── Writing ──


def write_manifest(
    folder: Path, about: dict[str, Any] | None = None, known: Mapping[str, str] | None = None
) -> None:
    """Write the manifest of all files of a folder.

    about: what else belongs to the directory, such as the fingerprints of a run. known: SHA-256 of
    files that need not be read again, because another rank has hashed its own.
    """
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    names = [name for name in names if name != MANIFEST]
    digests = dict(known or {})
    unknown = [name for name in names if name not in digests]
    with ThreadPoolExecutor(hash_workers(len(unknown))) as pool:
        hashed = pool.map(file_sha256, [folder / name for name in unknown])
        digests |= zip(unknown, hashed)
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digests[name]} for name in names
    }
    value = {"format": MANIFEST_FORMAT, "files": files, "versions": installed_versions()} | (
        about or {}
    )
    write_json(folder / MANIFEST, value)


def installed_versions() -> dict[str, str]:
    """Return the versions that results depend on, without importing torch."""
    return {
        "dsv3_ref": __version__, "python": platform.python_version(), "torch": version("torch"),
    }  # fmt: skip


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def hash_workers(n_files: int) -> int:
    """Return the number of threads that hash n files; hashing releases the GIL."""
    return max(1, min(n_files, available_cores(), 16))


# ── Reading ──


def has_manifest(folder: Path) -> bool:
    """Return whether a directory can be verified."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a directory; raise a `DamageError` if it is invalid."""
    path = folder / MANIFEST
    try:
        value = read_json(path)
        if value["format"] != MANIFEST_FORMAT:
            raise ValueError(f"format {value['format']!r}, not {MANIFEST_FORMAT}")
        for name, entry in value["files"].items():
            check_entry(name, entry)
    except (UserError, LookupError, ValueError, TypeError, AttributeError) as e:
        raise DamageError(f"{path} cannot be read ({e}): copy the directory again") from None
    return value


def check_entry(name: str, entry: dict[str, Any]) -> None:
    """Raise a `ValueError` unless an entry names a file inside the folder, a size and a digest."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name!r} lies outside of the directory")
    if type(entry["bytes"]) is not int or not isinstance(entry["sha256"], str):
        raise ValueError(f"{name!r} has no size and digest")


def verify(folder: Path, part: int = 0, parts: int = 1) -> None:
    """Compare every file with the manifest; raise a `DamageError` that names the first difference.

    A directory without a manifest passes. Of several ranks, each verifies the files that are its
    `part` of `parts`.
    """
    if not has_manifest(folder):
        return
    files = list(read_manifest(folder)["files"].items())[part::parts]
    for name, entry in files:
        check_size(folder / name, entry["bytes"])
    with ThreadPoolExecutor(hash_workers(len(files))) as pool:
        digests = pool.map(read_digest, [folder / name for name, _ in files])
        for (name, entry), digest in zip(files, digests):
            if digest != entry["sha256"]:
                raise damaged(folder / name, "its SHA-256 is not that of the manifest")


def find_damage(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """Return a description of damage to a directory that must have a manifest, or None."""
    if not has_manifest(folder):
        return f"{folder} has no {MANIFEST}: it is incomplete"
    try:
        verify(folder, part, parts)
    except DamageError as e:
        return str(e)
    return None


def check_size(path: Path, expected: int) -> None:
    """Raise a `DamageError` unless a file exists and has the expected size."""
    try:
        size = path.stat().st_size
    except OSError:
        raise damaged(path, "it is missing") from None
    if size != expected:
        raise damaged(path, f"it has {size:,} bytes, not {expected:,}")


def read_digest(path: Path) -> str:
    """Return the SHA-256 of a file; raise a `DamageError` if it cannot be read."""
    try:
        return file_sha256(path)
    except OSError as e:
        raise damaged(path, str(e)) from None


def damaged(path: Path, why: str) -> DamageError:
    """Return the error for a file that differs from the one that was written."""
    return DamageError(f"{path} is damaged ({why}): copy it again, or load it with --no-verify")


@contextmanager
def verified(folder: Path, enabled: bool = True) -> Iterator[None]:
    """Verify a directory while the body loads it; raise a `DamageError` at the end if it differs.

    It replaces an error of the body, which the damage explains.
    """
    if not enabled:
        yield
        return
    with ThreadPoolExecutor(1) as pool:
        check: Future[None] = pool.submit(verify, folder)
        try:
            yield
        finally:
            check.result()
