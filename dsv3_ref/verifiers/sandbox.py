"""Run model-written code in bubblewrap, with limits and without network.

`code_grader` compares the results.
"""

import json
import os
import platform
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from dsv3_ref.config import UserError


@dataclass(frozen=True)
class Limits:
    """The limits of a program; `cpu`, `memory` and `files` hold for each of its processes."""

    seconds: float = 10.0  # wall-clock time
    cpu: int = 5  # seconds of CPU time
    memory: int = 512 << 20  # bytes of address space
    processes: int = 8  # threads included
    files: int = 64  # open at once
    output: int = 1 << 20  # bytes of each stream and of each file
    disk: int = 16 << 20  # bytes of /tmp, which is in memory
    inodes: int = 4096  # files, folders, links, sockets and named pipes in /tmp, about 1 KB each
    signals: int = 64  # queued signals and POSIX timers


@dataclass(frozen=True)
class ExecutionResult:
    """The status, the outputs and the time of a program that has ended."""

    status: str  # ok, error, or the limit that ended it: time, memory, output
    code: int  # exit code; 128 + signal
    stdout: str
    stderr: str
    value: str  # JSON of what a called function returned
    seconds: float  # including the start of the sandbox


LIMITS = Limits()
KILLED = 128 + 9  # by SIGKILL, which Windows lacks
BWRAP_MISSING = (
    "model-written code runs only in bubblewrap, and there is no bwrap: "
    "apt-get install bubblewrap (Debian, Ubuntu), dnf install bubblewrap (Fedora)"
)
CANNOT_START = (
    "bubblewrap could not start Python ({}): it needs version 0.8 and user namespaces (sysctl "
    "user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns=0), or root with "
    "CAP_SYS_ADMIN"
)

# ── System calls that are denied ──

AUDIT_ARCHS = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}  # AUDIT_ARCH_… of linux/audit.h
# Calls that evade namespaces or limits, or whose objects the kernel counts against no limit: their
# numbers on both AUDIT_ARCHS
DENIED_SYSCALLS = {
    "unshare": (272, 97), "setns": (308, 268), "ptrace": (101, 117), "bpf": (321, 280),
    "process_vm_writev": (311, 271), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "io_setup": (206, 0),
    "inotify_init": (253, 26), "inotify_init1": (294, 26), "fanotify_init": (300, 262),
    "landlock_create_ruleset": (444, 444), "vmsplice": (278, 75), "syslog": (103, 116),
    "process_vm_readv": (310, 270), "pidfd_getfd": (438, 438), "kcmp": (312, 272),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
}  # fmt: skip
SOCKETS = ((41, 198), (53, 199))  # socket, socketpair
CLONE = (56, 220)
FCNTL = (72, 25)
MMAP = (9, 222)
CLONE3 = 435
CLONE_NEW_FLAGS = 0x7E02_0000  # every CLONE_NEW… bit
X32_BIT = 0x4000_0000  # of calls through the second table of x86_64
AF_UNIX = 1
RECORD_LOCKS = (6, 7, 37, 38)  # F_SETLK, F_SETLKW and both for open files: RLIMIT_LOCKS is ignored
MAP_SHARED = 0x01
MAP_ANONYMOUS = 0x20

LOAD = 0x20  # operations of BPF
IF_EQUAL = 0x15
IF_AT_LEAST = 0x35
IF_ANY_BIT = 0x45
RETURN = 0x06

ALLOW = (RETURN, 0, 0, 0x7FFF_0000)
KILL = (RETURN, 0, 0, 0x8000_0000)
DENY = (RETURN, 0, 0, 0x5_0001)  # the call returns EPERM
NO_MEMORY = (RETURN, 0, 0, 0x5_000C)  # the call returns ENOMEM
NOT_IMPLEMENTED = (RETURN, 0, 0, 0x5_0026)  # the call returns ENOSYS
# operation, instructions to skip if it is true, if it is false, value
Instruction = tuple[int, int, int, int]


def check_argument(number: int, index: int, *instructions: Instruction) -> list[Instruction]:
    """Return instructions that decide a call by its argument of this index."""
    return [
        (IF_EQUAL, 0, 1 + len(instructions), number),
        (LOAD, 0, 0, 16 + 8 * index),
        *instructions,
    ]


def seccomp_filter() -> bytes:
    """Build a seccomp filter: none of DENIED_SYSCALLS, no new namespaces, only AF_UNIX sockets.

    It denies record locks and anonymous shared memory too, since no limit counts them: such memory
    outlives the part of it that is still mapped.
    """
    machine = platform.machine()
    if machine not in AUDIT_ARCHS:
        raise UserError(
            f"the sandbox supports {' and '.join(AUDIT_ARCHS)}, not {machine}: use such a machine"
        )
    i = list(AUDIT_ARCHS).index(machine)
    load_architecture, load_number = (LOAD, 0, 0, 4), (LOAD, 0, 0, 0)
    program = [load_architecture, (IF_EQUAL, 1, 0, AUDIT_ARCHS[machine]), KILL]
    program += [load_number, (IF_AT_LEAST, 0, 1, X32_BIT), DENY]
    for numbers in DENIED_SYSCALLS.values():
        program += [(IF_EQUAL, 0, 1, numbers[i]), DENY]
    # the flags of clone3 cannot be inspected; libc falls back to clone
    program += [(IF_EQUAL, 0, 1, CLONE3), NOT_IMPLEMENTED]
    for numbers in SOCKETS:
        program += check_argument(numbers[i], 0, (IF_EQUAL, 1, 0, AF_UNIX), DENY, ALLOW)
    program += check_argument(CLONE[i], 0, (IF_ANY_BIT, 0, 1, CLONE_NEW_FLAGS), DENY, ALLOW)
    are_locks = list(chain.from_iterable(((IF_EQUAL, 0, 1, lock), DENY) for lock in RECORD_LOCKS))
    program += check_argument(FCNTL[i], 1, *are_locks, ALLOW)
    is_shared, is_anonymous = (IF_ANY_BIT, 0, 2, MAP_SHARED), (IF_ANY_BIT, 0, 1, MAP_ANONYMOUS)
    program += check_argument(MMAP[i], 3, is_shared, is_anonymous, NO_MEMORY, ALLOW)
    program.append(ALLOW)
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


# ── What a program sees ──

FIRST_PROCESS = "/proc/1"
TMPFS = "/sys"  # where /tmp is mounted first: a folder of every Linux that sandboxes do not show

# Runs in the program's own interpreter; `STARTED_FD` is closed before the program runs.
RUN_SCRIPT = """
import os, site
os.write(STARTED_FD, b"+")
os.close(STARTED_FD)
site.setquit()
{setup}
with open("/main.py", "rb") as source:
    __file__, code = source.name, compile(source.read(), source.name, "exec")
del os, site, source
exec(globals().pop("code"))
"""
CALL_SCRIPT = f"""
__import__("sys").modules["main"] = __import__("sys").modules[__name__]; __name__ = "main"
{RUN_SCRIPT}
__import__("os").write(VALUE_FD, __import__("json").dumps({{function}}(
    *__import__("json").load(__import__("io").open("/args.json")))).encode())
"""


def pick_user_id() -> int | None:
    """Pick an unused user id, so that the limit on processes counts only the program's.

    The kernel does not limit root's processes. Return None if this process cannot change its user.
    """
    start, _, count = map(int, Path("/proc/self/uid_map").read_text(encoding="utf-8").split()[-3:])
    end = min(start + count, 1 << 31)
    ids = range(max(1, end // 2), end)
    return random.SystemRandom().choice(ids) if os.geteuid() == 0 and ids else None


def tmpfs_args(user: int | None, limits: Limits) -> list[str]:
    """Return a command that mounts a small tmpfs, in a namespace of its own, and runs the rest.

    The OOM killer ends all of it first. bwrap limits the bytes of a tmpfs but not its inodes, which
    occupy kernel memory.
    """
    namespaces = ["--mount", *(["--user", "--map-root-user"] if user is None else [])]
    options = f"mode=1777,nosuid,nodev,size={limits.disk},nr_inodes={limits.inodes}"
    script = f'mount -t tmpfs -o "$0" tmpfs {TMPFS} && exec "$@"'
    return ["choom", "-n1000", "--", "unshare", *namespaces, "--", "sh", "-c", script, options]


def bwrap_args(user: int | None) -> list[str]:
    """Return arguments for new namespaces, read-only system files and Python, and a small /tmp."""
    own_user = ["--unshare-user", "--uid", str(os.getuid()), "--gid", str(os.getgid())]
    namespaces = ["ipc", "pid", "net", "uts", "cgroup-try"]
    read_only = ["/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", sys.base_prefix]
    parents = ["/etc", *map(str, reversed(Path(sys.base_prefix).parents))]
    return [
        *(f"--unshare-{namespace}" for namespace in namespaces), "--hostname", "sandbox",
        *(own_user if user is None else []), "--new-session", "--die-with-parent",
        "--clearenv", "--setenv", "PATH", "/usr/bin:/bin", "--setenv", "HOME", "/tmp",
        "--setenv", "PYTHONHASHSEED", "0",  # the same program ends the same way
        "--bind", TMPFS, "/tmp", "--chdir", "/tmp",
        *chain.from_iterable(("--perms", "755", "--dir", path) for path in parents),
        *chain.from_iterable(("--ro-bind-try", path, path) for path in read_only),
        # shared mappings of /dev/zero are anonymous memory: there, it cannot be opened
        "--proc", "/proc", "--dev", "/dev", "--ro-bind", "/dev/null", "/dev/zero",
        "--remount-ro", "/dev",
        # the first process, bwrap's own, has neither limits nor the filter, and without a user of
        # its own, a program could write into its memory
        "--perms", "555", "--tmpfs", FIRST_PROCESS, "--remount-ro", FIRST_PROCESS,
        # where root lacks CAP_SYS_RESOURCE, a program could take back what `choom` has set
        "--remount-ro", "/proc",
    ]  # fmt: skip


def interpreter_args(user: int | None, limits: Limits) -> list[str]:
    """Return the command of an unprivileged Python with limits."""
    drop_privileges = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    limit_values = {
        "as": limits.memory,
        "cpu": f"{limits.cpu}:{limits.cpu + 1}",  # SIGXCPU, then SIGKILL
        "nproc": limits.processes + (user is None),  # without a user of its own, bwrap counts too
        "nofile": limits.files,
        "fsize": limits.output,
        "sigpending": limits.signals,
        "msgqueue": 0,  # bytes
        "core": 1,  # byte; 0 would still call the host's crash handler
    }
    prlimit = ["prlimit", *(f"--{name}={value}" for name, value in limit_values.items())]
    interpreter = [os.path.realpath(sys.executable), "-S", "-c"]
    return [*(drop_privileges if user else []), *prlimit, *interpreter]


# ── Running a program ──


class Launched(NamedTuple):
    """A started bwrap, what it reports of itself, and the files of the program's outputs."""

    process: subprocess.Popen[bytes]
    info: str  # JSON with the id of the sandbox's first process; "" if bwrap failed
    stdout_fd: int
    stderr_fd: int
    value_fd: int
    started_fd: int  # holds a byte once Python runs in the sandbox


def memfd(stack: ExitStack, text: str | bytes = "") -> int:
    """Create an unnamed file; unlike a pipe, it is subject to the limit on file sizes."""
    fd = os.memfd_create("sandbox")
    stack.callback(os.close, fd)
    os.write(fd, text if isinstance(text, bytes) else text.encode(errors="replace"))
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def launch(
    stack: ExitStack, script: str, texts: dict[str, str], stdin: str, limits: Limits
) -> Launched:
    """Start a script in a sandbox that holds these files."""
    bwrap = shutil.which("bwrap")
    if not bwrap:
        raise UserError(BWRAP_MISSING)
    user, rules_fd = pick_user_id(), memfd(stack, seccomp_filter())
    info_fd, info_write_fd = os.pipe()
    stdout_fd, stderr_fd = memfd(stack), memfd(stack)
    value_fd, started_fd = memfd(stack), memfd(stack)
    files = {path: memfd(stack, text) for path, text in texts.items()}
    command = [*tmpfs_args(user, limits), bwrap, *bwrap_args(user)]
    command += ["--info-fd", str(info_write_fd), "--seccomp", str(rules_fd)]
    for path, fd in files.items():
        command += ["--file", str(fd), path]
    command += ["--remount-ro", "/", "--", *interpreter_args(user, limits)]
    script = script.replace("VALUE_FD", str(value_fd)).replace("STARTED_FD", str(started_fd))
    command.append(script)
    with open(info_fd, encoding="utf-8") as info:
        with open(info_write_fd, "w", encoding="utf-8"):
            process = subprocess.Popen(
                command,
                env={},  # a program could read bwrap's environment
                stdin=memfd(stack, stdin),
                stdout=stdout_fd,
                stderr=stderr_fd,
                pass_fds=[info_write_fd, rules_fd, *files.values(), value_fd, started_fd],
            )
            stack.callback(process.kill)
        return Launched(process, info.read(), stdout_fd, stderr_fd, value_fd, started_fd)


def wait_for_exit(process: subprocess.Popen[bytes], info: str, seconds: float) -> int:
    """Wait until the sandbox has no process left (its first ends last); return the exit code."""
    with suppress(ValueError, ProcessLookupError):  # bwrap failed, or the program has ended
        first = os.pidfd_open(json.loads(info)["child-pid"])
        poll = select.poll()
        poll.register(first, select.POLLIN)
        if not poll.poll(1000 * seconds):
            signal.pidfd_send_signal(first, signal.SIGKILL)
            poll.poll()
        os.close(first)
    return process.wait()


def classify_exit(
    code: int, is_output_full: bool, errors: str, seconds: float, limits: Limits
) -> str:
    """Return the limit that ended a program, "error" or "ok"."""
    if is_output_full:
        return "output"
    if code == 128 + signal.SIGXCPU:
        return "time"
    if code == KILLED:  # by us, by the second limit on CPU, or by the kernel for lack of memory
        return "time" if seconds > min(limits.seconds, limits.cpu) else "memory"
    if code and "MemoryError" in errors[-100:]:
        return "memory"
    return "error" if code else "ok"


def execute(script: str, texts: dict[str, str], stdin: str, limits: Limits) -> ExecutionResult:
    """Run a script beside these files until none of its processes is left."""
    start = time.perf_counter()
    with ExitStack() as stack:
        launched = launch(stack, script, texts, stdin, limits)
        code = wait_for_exit(launched.process, launched.info, limits.seconds)
        seconds = time.perf_counter() - start
        fds = launched.stdout_fd, launched.stderr_fd, launched.value_fd, launched.started_fd
        contents = [os.pread(fd, limits.output, 0) for fd in fds]
    is_output_full = max(map(len, contents)) == limits.output
    stdout, stderr, value, started = (data.decode(errors="replace") for data in contents)
    if not started:
        reason = stderr.strip().rpartition("\n")[2] or f"exit code {code}"
        raise UserError(CANNOT_START.format(reason))
    status = classify_exit(code, is_output_full, stderr, seconds, limits)
    return ExecutionResult(status, code, stdout, stderr, value, seconds)


def run_program(
    program: str, stdin: str = "", limits: Limits = LIMITS, setup: str = ""
) -> ExecutionResult:
    """Run a program on this input; it may use Python's standard library.

    setup: statements that run before it, without braces.
    """
    return execute(RUN_SCRIPT.replace("{setup}", setup), {"/main.py": program}, stdin, limits)


def call_function(
    program: str, function: str, args: Iterable, limits: Limits = LIMITS, setup: str = ""
) -> ExecutionResult:
    """Call a program's function with JSON values; it returns JSON.

    function: its name, which may be that of a method of the program's class `Solution`.
    setup: statements that run before the program, without braces.
    """
    texts = {"/main.py": program, "/args.json": json.dumps(list(args))}
    is_method = (
        f"{function!r} not in globals() and hasattr(globals().get('Solution'), {function!r})"
    )
    name = f"(Solution().{function} if {is_method} else globals()[{function!r}])"
    called = name if function.isidentifier() else function
    script = CALL_SCRIPT.replace("{setup}", setup).replace("{function}", called)
    return execute(script, texts, "", limits)


def map_parallel(work: Callable, *jobs: Iterable, workers: int | None = None) -> list:
    """Return `list(map(work, *jobs))`, computed by `workers` threads (default: one per core)."""
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return list(pool.map(work, *jobs))
