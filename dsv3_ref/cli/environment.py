"""The process environment of a command: standard streams, encoding, and out-of-memory errors."""

import errno
import io
import locale
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dsv3_ref.data.terminal import printable

BROKEN_PIPE = 128 + 13  # what a shell reports for a process that SIGPIPE has ended
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "cannot allocate memory",
                 "failed to map segment", "out of memory")  # fmt: skip


def open_missing_streams() -> None:
    """Replace closed standard streams by the null device.

    Otherwise the next file that is opened gets the number of a closed stream, and what is printed
    is written into that file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def require_utf8() -> None:
    """Start this process again in Python's UTF-8 mode if the locale has another encoding.

    Files are then read as UTF-8. The terminal keeps its encoding; characters that it lacks are
    printed as escapes.
    """
    encoding = locale.getpreferredencoding(False).lower().replace("-", "")
    if sys.flags.utf8_mode or encoding == "utf8" or os.name == "nt":  # there, exec starts another
        return
    os.environ["PYTHONUTF8"] = "1"
    os.environ.setdefault("PYTHONIOENCODING", f"{sys.stdout.encoding}:backslashreplace")
    os.execv(sys.executable, sys.orig_argv)


def isolate_children() -> None:
    """Keep processes that this one starts from importing modules of the current directory.

    It may be a stranger's: `python -m` and `python -c`, by which multiprocessing starts processes,
    would run a random.py that lies there. Where this process imports from it, so do the others.
    """
    if not {"", os.getcwd()} & set(sys.path):
        os.environ["PYTHONSAFEPATH"] = "1"


def honor_no_color() -> None:
    """Turn off the colors of --help and of errors if NO_COLOR is set (https://no-color.org)."""
    if os.environ.get("NO_COLOR"):
        os.environ.setdefault("PYTHON_TYRO_ANSI_CODES", "False")  # tyro reads it on import


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error reports that memory could not be allocated, on CPU or GPU."""
    words = str(error).lower()
    return isinstance(error, MemoryError) or any(x in words for x in OUT_OF_MEMORY)


def report(message: str) -> None:
    """Print an error as a sentence, if there is still somewhere to print it."""
    try:
        print(f"error: {printable(message, sys.stderr)}", file=sys.stderr, flush=True)
    except OSError:
        discard(2)


def discard(number: int) -> None:
    """Send what is still printed to a standard stream to the null device."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def flush_output(code: int) -> int:
    """Write what is still buffered; return the exit code, or another if that fails."""
    try:
        sys.stdout.flush()
    except OSError as e:
        discard(1)
        if e.errno == errno.EPIPE:
            return BROKEN_PIPE
        report(f"the output cannot be written: {e.strerror}")
        return code or 2
    return code


@contextmanager
def writable_caches() -> Iterator[None]:
    """Keep caches in a temporary directory if that of the user cannot be written to."""
    if not os.environ.get("HOME", "."):
        del os.environ["HOME"]  # an empty one would be the current directory
    names = {"HF_HOME": "huggingface", "DSV3_CACHE": "dsv3", "MPLCONFIGDIR": "matplotlib"}
    with ExitStack() as stack:
        if not is_writable(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dsv3-")))
            for name, part in names.items():
                os.environ.setdefault(name, str(folder / part))
        yield


def is_writable(folder: Path) -> bool:
    """Return whether files can be created in a directory, which is created if it is missing."""
    try:
        folder = folder.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except (OSError, RuntimeError):  # RuntimeError: no home directory
        return False


def has_working_directory() -> bool:
    """Return whether the current directory still exists; if not, report it."""
    try:
        os.getcwd()
    except OSError:
        report("the current directory has been deleted: change to another one")
        return False
    return True


def run_as_process(run: Callable[[list[str]], int]) -> int:
    """Run a command on the command line's arguments; return the exit code of the process."""
    open_missing_streams()
    if not has_working_directory():
        return 2
    require_utf8()
    isolate_children()
    honor_no_color()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with writable_caches():
        return flush_output(run(sys.argv[1:]))
