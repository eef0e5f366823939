"""Run model-written code in bubblewrap: limits, no network; `code_grader` judges the results."""

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
from pathlib import Path

from dsv3_ref.config import UserError


@dataclass(frozen=True)
class Limits:
    """The resources of a program; `cpu`, `memory` and `files` bound each of its processes."""

    seconds: float = 10.0  # by the clock
    cpu: int = 5  # seconds
    memory: int = 512 << 20  # bytes of addresses
    processes: int = 8  # threads count
    files: int = 64  # open at once
    output: int = 1 << 20  # bytes of each stream and of each file
    disk: int = 16 << 20  # bytes of /tmp, which is memory


@dataclass(frozen=True)
class ExecutionResult:
    """The status, the outputs and the time of a program that has ended."""

    status: str  # ok, error, or the limit that ended it: time, memory, output
    code: int  # of exit; 128 + signal
    stdout: str
    stderr: str
    value: str  # JSON of what a called function returned
    seconds: float  # with those that the sandbox takes


LIMITS, KILLED = Limits(), 128 + signal.SIGKILL
BWRAP_MISSING = (
    "code that a model wrote runs only in bubblewrap, and there is no bwrap: "
    "apt-get install bubblewrap (Debian, Ubuntu), dnf install bubblewrap (Fedora)"
)
CANNOT_START = (
    "bubblewrap could not start Python ({}): it needs version 0.8 and user namespaces (sysctl "
    "user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns=0), or root with "
    "CAP_SYS_ADMIN"
)

# ── What the kernel refuses ──

AUDIT_ARCHS = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}  # AUDIT_ARCH_… of linux/audit.h
DENIED_SYSCALLS = {  # calls that lead past namespaces or limits, with their numbers on MACHINES
    "unshare": (272, 97), "setns": (308, 268), "ptrace": (101, 117), "bpf": (321, 280),
    "process_vm_writev": (311, 271), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190),
}  # fmt: skip
SOCKET, CLONE, CLONE3 = (41, 198), (56, 220), 435
NAMESPACES = 0x7E02_0000  # every CLONE_NEW… bit
LOAD, EQUAL, AT_LEAST, ANY_BIT, ANSWER = 0x20, 0x15, 0x35, 0x45, 0x06  # operations of BPF
ANSWERS = (0x7FFF_0000, 0x8000_0000, 0x5_0001, 0x5_0026)  # yes, die, EPERM, ENOSYS


def seccomp_filter() -> bytes:
    """Build a seccomp filter: none of DENIED_SYSCALLS, no new namespaces, only AF_UNIX sockets.

    A step is (operation, steps to skip if it is true, if it is false, value).
    """
    if (machine := platform.machine()) not in AUDIT_ARCHS:
        raise UserError(f"the sandbox knows {' and '.join(AUDIT_ARCHS)}, not {machine}")
    here = list(AUDIT_ARCHS).index(machine)
    allow, kill, refuse, lack = ((ANSWER, 0, 0, value) for value in ANSWERS)
    architecture, number, argument = ((LOAD, 0, 0, at) for at in (4, 0, 16))
    steps = [architecture, (EQUAL, 1, 0, AUDIT_ARCHS[machine]), kill]
    steps += [number, (AT_LEAST, 0, 1, 0x4000_0000), refuse]  # x86_64's second table of calls
    steps += [
        step
        for name in DENIED_SYSCALLS
        for step in ((EQUAL, 0, 1, DENIED_SYSCALLS[name][here]), refuse)
    ]
    steps += [(EQUAL, 0, 1, CLONE3), lack]  # its flags are out of sight; libc then takes clone
    steps += [(EQUAL, 0, 4, SOCKET[here]), argument, (EQUAL, 0, 1, 1), allow, refuse]
    steps += [(EQUAL, 0, 3, CLONE[here]), argument, (ANY_BIT, 0, 1, NAMESPACES), refuse, allow]
    return b"".join(struct.pack("HBBI", *step) for step in steps)


# ── What a program sees ──

# Runs in the program's own interpreter; `{began}` is closed before the program could touch it.
RUN_SCRIPT = """
import os, site
os.write({began}, b"+")
os.close({began})
site.setquit()
with open("/main.py", "rb") as source:
    __file__, code = source.name, compile(source.read(), source.name, "exec")
del os, site, source
exec(globals().pop("code"))
"""
CALL_SCRIPT = f"""
__import__("sys").modules["main"] = __import__("sys").modules[__name__]; __name__ = "main"
{RUN_SCRIPT}
__import__("os").write({{value}}, __import__("json").dumps({{function}}(
    *__import__("json").load(__import__("io").open("/args.json")))).encode())
"""


def pick_user_id() -> int | None:
    """Pick an unused user id, so that the kernel counts only the program's processes.

    The kernel does not limit root's processes. Return None if this process cannot change its user.
    """
    start, _, count = map(int, Path("/proc/self/uid_map").read_text().split()[-3:])
    end = min(start + count, 1 << 31)
    ids = range(max(1, end // 2), end)
    return random.SystemRandom().choice(ids) if os.geteuid() == 0 and ids else None


def bwrap_args(user: int | None, disk: int) -> list[str]:
    """Return arguments for new namespaces, read-only system files and Python, and a small /tmp."""
    spaces = ["ipc", "pid", "net", "uts", "cgroup-try", *(["user"] if user is None else [])]
    shown = ["/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", sys.base_prefix]
    parents = ["/etc", *reversed(Path(sys.base_prefix).parents)]
    return [
        *(f"--unshare-{space}" for space in spaces), "--hostname", "sandbox", "--new-session",
        "--die-with-parent", "--setenv", "PATH", "/usr/bin:/bin", "--setenv", "HOME", "/tmp",
        "--setenv", "PYTHONHASHSEED", "0",  # equal programs end equally
        "--perms", "1777", "--size", str(disk), "--tmpfs", "/tmp", "--chdir", "/tmp",
        *(word for path in parents for word in ("--perms", "755", "--dir", str(path))),
        *(word for path in shown for word in ("--ro-bind-try", path, path)),
        "--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev",
    ]  # fmt: skip


def interpreter_args(user: int | None, limits: Limits) -> list[str]:
    """Return the command of an unprivileged Python within limits, the first to be killed for memory."""
    drop = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    most = {
        "as": limits.memory,
        "cpu": f"{limits.cpu}:{limits.cpu + 1}",  # SIGXCPU, then SIGKILL
        "nproc": limits.processes + (user is None),  # bwrap's own counts too
        "nofile": limits.files,
        "fsize": limits.output,
        "core": 1,  # byte; 0 would still call the host's crash handler
    }
    bound = ["prlimit", *(f"--{name}={value}" for name, value in most.items())]
    interpreter = [os.path.realpath(sys.executable), "-S", "-c"]
    return ["choom", "-n1000", "--", *(drop if user else []), *bound, *interpreter]


# ── A program runs ──


def memfd(stack: ExitStack, text: str | bytes = "") -> int:
    """Create an unnamed file; limits on file sizes bound what is written there, unlike to a pipe."""
    fd = os.memfd_create("sandbox")
    stack.callback(os.close, fd)
    os.write(fd, text if isinstance(text, bytes) else text.encode(errors="replace"))
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def launch(stack: ExitStack, script: str, texts: dict[str, str], stdin: str, limits: Limits):
    """Start a script beside these files; return bwrap, its report and descriptors of the outputs."""
    if not (bwrap := shutil.which("bwrap")):
        raise UserError(BWRAP_MISSING)
    user, rules, (info, tell) = pick_user_id(), memfd(stack, seccomp_filter()), os.pipe()
    ends = {name: memfd(stack) for name in ("output", "errors", "value", "began")}
    files = {path: memfd(stack, text) for path, text in texts.items()}
    command = [bwrap, *bwrap_args(user, limits.disk), "--info-fd", tell, "--seccomp", rules]
    command += [word for path, fd in files.items() for word in ("--file", fd, path)]
    command += ["--remount-ro", "/", "--", *interpreter_args(user, limits), script.format(**ends)]
    with open(info) as told:
        with open(tell, "w"):
            process = subprocess.Popen(
                [str(word) for word in command],
                env={},  # a program could read that of bwrap
                stdin=memfd(stack, stdin),
                stdout=ends["output"],
                stderr=ends["errors"],
                pass_fds=[tell, rules, *files.values(), ends["value"], ends["began"]],
            )
            stack.callback(process.kill)
        return process, told.read(), ends


def wait_for_exit(process: subprocess.Popen, info: str, seconds: float) -> int:
    """Wait until no process of the sandbox is left (its first ends last); return the exit code."""
    with suppress(ValueError, ProcessLookupError):  # bwrap failed, or all is over
        first = os.pidfd_open(json.loads(info)["child-pid"])
        ended = select.poll()
        ended.register(first, select.POLLIN)
        if not ended.poll(1000 * seconds):
            signal.pidfd_send_signal(first, signal.SIGKILL)
            ended.poll()
        os.close(first)
    return process.wait()


def classify_exit(code: int, full: bool, errors: str, seconds: float, limits: Limits) -> str:
    """Return the limit that ended a program, "error" or "ok"."""
    if full:
        return "output"
    if code == 128 + signal.SIGXCPU:
        return "time"
    if code == KILLED:  # by us, by the second limit on CPU, or by a machine without memory
        return "time" if seconds > min(limits.seconds, limits.cpu) else "memory"
    if code and "MemoryError" in errors[-100:]:
        return "memory"
    return "error" if code else "ok"


def execute(script: str, texts: dict[str, str], stdin: str, limits: Limits) -> ExecutionResult:
    """Run a script beside these files until none of its processes is left."""
    start = time.perf_counter()
    with ExitStack() as stack:
        process, info, ends = launch(stack, script, texts, stdin, limits)
        code = wait_for_exit(process, info, limits.seconds)
        seconds = time.perf_counter() - start
        found = [os.pread(fd, limits.output, 0) for fd in ends.values()]
    full = max(map(len, found)) == limits.output
    output, errors, value, began = (data.decode(errors="replace") for data in found)
    if not began:
        raise UserError(
            CANNOT_START.format(errors.strip().rpartition("\n")[2] or f"exit code {code}")
        )
    label = classify_exit(code, full, errors, seconds, limits)
    return ExecutionResult(label, code, output, errors, value, seconds)


def run_program(program: str, stdin: str = "", limits: Limits = LIMITS) -> ExecutionResult:
    """Run a program that may use Python's standard library on this input."""
    return execute(RUN_SCRIPT, {"/main.py": program}, stdin, limits)


def call_function(
    program: str, function: str, args: Iterable, limits: Limits = LIMITS
) -> ExecutionResult:
    """Call a program's `name` or `Solution().name` with JSON values; its value is JSON."""
    texts = {"/main.py": program, "/args.json": json.dumps(list(args))}
    return execute(CALL_SCRIPT.replace("{function}", function), texts, "", limits)


def map_parallel(work: Callable, *jobs: Iterable, workers: int | None = None) -> list:
    """Return `list(map(work, *jobs))`, computed by as many threads as there are cores."""
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return list(pool.map(work, *jobs))
