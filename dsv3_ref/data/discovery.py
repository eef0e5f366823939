"""The files of a folder: which are data, and which are skipped, by reason."""

import os
import stat
from collections import Counter
from collections.abc import Iterator

from dsv3_ref.config import UserError
from dsv3_ref.data.formats import PLAIN_TEXT, DataFile, known_file, split_suffix

FOREIGN = {"__macosx", "__pycache__", "thumbs.db", "desktop.ini", "$recycle.bin", "lost+found",
           "system volume information", "@eadir"}  # fmt: skip
UNFINISHED = (".tmp", ".temp", ".part", ".partial", ".crdownload", ".download", ".swp", ".swo",
              ".lock", ".bak", ".orig", "~")  # fmt: skip
ABOUT = {"readme", "license", "copying", "notice", "changelog", "citation"}
METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


def list_folder(root: str) -> tuple[list[DataFile], Counter[str]]:
    """Return the data files below a folder, sorted by path, and the number skipped by reason.

    Links are followed, but a folder or a file that is reached twice is read once.
    """
    skipped: Counter[str] = Counter()
    data_files: list[DataFile] = []
    links: list[str] = []
    for entry in walk(root, folder_and_parents(root), skipped):
        file = known_file(entry.path)
        reason = why_skipped(entry.name) or about_reason(entry.name, file)
        if reason or file is None:
            skipped[reason or suffix_reason(entry.name)] += 1
        elif not os.path.isfile(entry.path):
            skipped["broken link" if entry.is_symlink() else "pipe or device"] += 1
        elif entry.stat().st_size == 0:
            skipped["empty"] += 1
        else:
            data_files.append(file)
            links += [entry.path] if entry.is_symlink() else []
    twice = second_links(data_files, links)
    skipped["link to a file that is read already"] += len(twice)
    return [file for file in data_files if file.path not in twice], +skipped


def folder_and_parents(root: str) -> set[tuple[int, int]]:
    """Return what identifies a folder and those that hold it."""
    path, ids = os.path.realpath(root), set()
    while path not in ids:
        ids.add(path)
        path = os.path.dirname(path)
    return {identity(x) for x in ids}


def identity(path: str) -> tuple[int, int]:
    """Return what identifies a file or folder, whatever links lead to it."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def walk(
    folder: str, entered: set[tuple[int, int]], skipped: Counter[str]
) -> Iterator["os.DirEntry[str]"]:
    """Yield what is below a folder and not itself a folder, in the order of paths.

    entered: folders that are not entered; this function adds those that are.
    """
    try:
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError as e:
        raise UserError(f"cannot read the folder {folder}: {e.strerror}; allow it") from None
    for entry in entries:
        is_link_to_folder = entry.is_symlink() and os.path.isdir(entry.path)
        if not (is_link_to_folder or entry.is_dir(follow_symlinks=False)):
            yield entry
        elif reason := why_skipped(entry.name):
            skipped[reason] += 1
        elif identity(entry.path) in entered:
            skipped["link to a folder that is read already"] += 1
        else:
            entered.add(identity(entry.path))
            yield from walk(entry.path, entered, skipped)


def why_skipped(name: str) -> str:
    """Return why a file or folder of this name is never data; "" if it may be."""
    lower = name.lower()
    is_autosave = name.startswith("#") and name.endswith("#")
    if name.startswith((".", "~$")) or lower in FOREIGN or is_autosave:
        return "hidden or of another program"
    return "unfinished or backup" if lower.endswith(UNFINISHED) else ""


def about_reason(name: str, file: DataFile | None) -> str:
    """Return a reason to skip files that describe data, such as README.md; "" for others."""
    is_about = name.lower().split(".")[0] in ABOUT and (file is None or file.kind == PLAIN_TEXT)
    return "about the data" if is_about or name.lower() in METADATA else ""


def suffix_reason(name: str) -> str:
    """Return the suffix of a file that is not data, as a reason."""
    suffix = "".join(split_suffix(name))
    return suffix or "without a suffix"


def second_links(files: list[DataFile], links: list[str]) -> set[str]:
    """Return the links that lead to a file which is read under another path."""
    if not links:
        return set()
    linked = set(links)
    entered = {identity(file.path) for file in files if file.path not in linked}
    twice = set()
    for path in links:
        if identity(path) in entered:
            twice.add(path)
        entered.add(identity(path))
    return twice


def is_special(path: str) -> bool:
    """Return whether a path is a pipe, a socket or a device."""
    mode = os.stat(path).st_mode
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def require_one_kind(name: str, files: list[DataFile]) -> None:
    """Raise a `UserError` if files are partly texts and partly tables."""
    texts = [file for file in files if file.kind == PLAIN_TEXT]
    if texts and len(texts) < len(files):
        counts = Counter("".join(split_suffix(file.path)) for file in files)
        listed = ", ".join(f"{n} {suffix}" for suffix, n in sorted(counts.items()))
        raise UserError(
            f"{name} holds several kinds of data ({listed}): give the files or the folders of one "
            "kind each"
        )
