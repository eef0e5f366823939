"""Manifests: the size and checksums of every file of a directory, verified when it is loaded.

A manifest detects accidents: a flipped bit, a truncated file, files of different copies. It does
not prove who wrote a directory, because anyone who can replace a file can replace the manifest.
Loading compares XXH3, which is as fast as memory; `dsv3 check` compares SHA-256, which cannot be
forged, and which `sha256sum` computes as well.
"""

import hashlib
import os
import platform
import stat
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from dsv3_ref import __version__
from dsv3_ref.checkpoints.atomic import read_json, write_json
from dsv3_ref.checkpoints.layout import CONFIG, INDEX, SHARD_TABLE, STATE
from dsv3_ref.config import UserError

MANIFEST, MANIFEST_FORMAT = "manifest.json", 1
OWN_FIELDS = {"format", "files", "versions"}
XXH3 = "xxh3_128"
FILES_READ = (CONFIG, INDEX, SHARD_TABLE, STATE)  # with a model, beside all safetensors files
HASH_BLOCK = 1 << 20  # bytes read at a time
Loaded = TypeVar("Loaded")


class DamageError(UserError):
    """A directory whose files are not those that were written."""


# ── Writing ──


def write_manifest(
    folder: Path,
    about: dict[str, Any] | None = None,
    known: Mapping[str, dict[str, str]] | None = None,
) -> None:
    """Write the manifest of all files of a folder.

    about: what else belongs to the directory, such as the fingerprints of a run. known: the
    `file_checksums` of files that need not be read again, because another rank has hashed its own.
    """
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    names = [name for name in names if name != MANIFEST]
    checksums = dict(known or {})
    unknown = [name for name in names if name not in checksums]
    with ThreadPoolExecutor(hash_workers(len(unknown))) as pool:
        hashed = pool.map(file_checksums, [folder / name for name in unknown])
        checksums |= zip(unknown, hashed)
    files = {name: {"bytes": (folder / name).stat().st_size} | checksums[name] for name in names}
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


def file_xxh3(path: Path) -> str:
    """Return the XXH3 of a file, 128 bits in hexadecimal.

    One call over the mapped file releases the GIL throughout, so that loading is not interrupted.
    """
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return xxhash.xxh3_128_hexdigest(b"")
        with mmap(file.fileno(), 0, access=ACCESS_READ) as mapped:
            return xxhash.xxh3_128_hexdigest(mapped)


def file_checksums(path: Path) -> dict[str, str]:
    """Return the SHA-256 and the XXH3 of a file, which is read once."""
    sha256, xxh3 = hashlib.sha256(), xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK):
            sha256.update(block)
            xxh3.update(block)
    return {"sha256": sha256.hexdigest(), XXH3: xxh3.hexdigest()}


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def hash_workers(n_files: int) -> int:
    """Return the number of threads that hash n files; hashing releases the GIL."""
    return max(1, min(n_files, available_cores(), 16))


# ── Reading ──


def has_manifest(folder: Path) -> bool:
    """Return whether a directory can be verified."""
    return (folder / MANIFEST).is_file() and not is_foreign(folder)


def is_foreign(folder: Path) -> bool:
    """Return whether the manifest.json of a directory belongs to another program.

    Directories in Hugging Face's format have no manifest of ours, so one without any field of ours
    is not damaged. In our own format it is.
    """
    try:
        if "model_type" not in read_json(folder / CONFIG):
            return False
    except UserError:
        return False
    try:
        return OWN_FIELDS.isdisjoint(read_json(folder / MANIFEST))
    except UserError:
        return True


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
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(f"{name!r} lies outside of the directory")
    if type(entry["bytes"]) is not int or not isinstance(entry["sha256"], str):
        raise ValueError(f"{name!r} has no size and SHA-256")


def verify(folder: Path, part: int = 0, parts: int = 1, by_sha256: bool = False) -> None:
    """Compare every file with the manifest; raise a `DamageError` that names the first difference.

    A directory without a manifest passes. Of several ranks, each verifies the files that are its
    `part` of `parts`. XXH3 is compared, or SHA-256 with `by_sha256` and where there is no XXH3.
    """
    if not has_manifest(folder):
        return
    entries = read_manifest(folder)["files"]
    check_listed(folder, entries)
    files = list(entries.items())[part::parts]
    for name, entry in files:
        check_size(folder / name, entry["bytes"])
    with ThreadPoolExecutor(hash_workers(len(files))) as pool:
        algorithms = ["sha256" if by_sha256 or XXH3 not in entry else XXH3 for _, entry in files]
        digests = pool.map(read_digest, [folder / name for name, _ in files], algorithms)
        for (name, entry), algorithm, digest in zip(files, algorithms, digests):
            if digest != entry[algorithm]:
                raise damaged(folder / name, f"its {algorithm} is not that of the manifest")


def check_listed(folder: Path, names: Container[str]) -> None:
    """Raise a `DamageError` for a file that would be read but is not in the manifest."""
    for path in sorted(folder.glob("*")):
        is_read = path.name in FILES_READ or path.suffix == ".safetensors"
        if is_read and path.name not in names:
            raise damaged(path, f"{MANIFEST} does not list it")


def find_damage(folder: Path, part: int = 0, parts: int = 1, by_sha256: bool = False) -> str | None:
    """Return a description of damage to a directory that must have a manifest, or None."""
    try:
        require_manifest(folder)
        verify(folder, part, parts, by_sha256)
    except DamageError as e:
        return str(e)
    return None


def require_manifest(folder: Path) -> None:
    """Raise a `DamageError` if a checkpoint of a run has no manifest, which is written last."""
    if not has_manifest(folder):
        raise DamageError(f"{folder} has no {MANIFEST}: it is incomplete")


def check_size(path: Path, expected: int) -> None:
    """Raise a `DamageError` unless a file exists and has the expected size."""
    try:
        about = path.stat()
    except OSError:
        raise damaged(path, "it is missing") from None
    if not stat.S_ISREG(about.st_mode):  # reading a pipe or a device would not end
        raise damaged(path, "it is not a regular file")
    if about.st_size != expected:
        raise damaged(path, f"it has {about.st_size:,} bytes, not {expected:,}")


def read_digest(path: Path, algorithm: str) -> str:
    """Return a checksum of a file; raise a `DamageError` if it cannot be read."""
    try:
        return file_sha256(path) if algorithm == "sha256" else file_xxh3(path)
    except OSError as e:
        raise damaged(path, str(e)) from None


def damaged(path: Path, why: str) -> DamageError:
    """Return the error for a file that differs from the one that was written."""
    return DamageError(f"{path} is damaged ({why}): copy it again, or load it with --no-verify")


@contextmanager
def verified(folder: Path, enabled: bool = True, part: int = 0, parts: int = 1) -> Iterator[None]:
    """Verify a directory while the body loads it; raise a `DamageError` at the end if it differs.

    Of several ranks, each verifies its `part` of `parts` of the files. The error replaces one of
    the body, which the damage explains.
    """
    if not enabled:
        yield
        return
    with ThreadPoolExecutor(1) as pool:
        check: Future[None] = pool.submit(verify, folder, part, parts)
        try:
            yield
        finally:
            check.result()


def first_whole(
    newest_first: Iterable[Path], read: Callable[[Path], Loaded]
) -> tuple[Loaded, dict[Path, DamageError]]:
    """Return `read(folder)` for the first folder that is whole, and the damage of those before it.

    `read` raises a `DamageError` for a damaged folder; if all are, one that names all is raised.
    """
    damages: dict[Path, DamageError] = {}
    for folder in newest_first:
        try:
            return read(folder), damages
        except DamageError as e:
            damages[folder] = e
    raise DamageError("; ".join(map(str, damages.values())))
