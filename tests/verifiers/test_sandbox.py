"""Code that a model wrote stays inside, ends in time, and cannot forge a verdict."""

import errno
import json
import os
import secrets
import shutil
import site
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dsv3_ref.config import UserError
from dsv3_ref.verifiers import sandbox
from dsv3_ref.verifiers.code_grader import FunctionCase, StdinCase, count_passed
from dsv3_ref.verifiers.sandbox import LIMITS, map_parallel, run_program

ROOT = Path(__file__).resolve().parents[2]
LIBC = "import ctypes; libc = ctypes.CDLL(None, use_errno=True)\n"
TRY = """
def attempt(what):
    try:
        return what()
    except Exception as e:
        return type(e).__name__
"""


def why_not() -> str:
    """What keeps bubblewrap from working here, by its own words; '' if nothing does."""
    if not shutil.which("bwrap"):
        return "bubblewrap is not installed"
    spaces = ["--unshare-pid", "--unshare-net", *(["--unshare-user"] if os.geteuid() else [])]
    done = subprocess.run(["bwrap", *spaces, "--bind", "/", "/", "true"], capture_output=True)
    return done.stderr.decode().strip()


OBSTACLE = why_not()
boxed = pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE)


def answer(program: str, *args, limits=LIMITS, **kwargs):
    """What a program that must end well prints as JSON."""
    done = run_program(TRY + program, *args, limits=limits, **kwargs)
    assert done.status == "ok", done
    return json.loads(done.stdout)


def living(mark: str) -> list[int]:
    """Processes of this machine whose command line holds the mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.fixture
def mark() -> str:
    """A time to sleep that no other process has in its command line."""
    return f"{secrets.randbelow(10**6) + 10**6}.{secrets.randbelow(10**6)}"


# ── A program is a program ──


@boxed
def test_a_program_reads_prints_and_ends():
    done = run_program("import sys; print(int(input()) + 1); sys.stderr.write('so'); exit(3)", "41")
    assert (done.stdout, done.stderr, done.code) == ("42\n", "so", 3)
    assert done.status == "error"
    assert 0 < done.seconds < 5
    assert run_program("print(input())", "x").status == "ok"


@boxed
@pytest.mark.parametrize(
    ("program", "code", "errors"),
    [
        ("print(\n", 1, "SyntaxError"),
        ("x = 1\n1 / 0", 1, 'File "/main.py", line 2, in <module>'),
        ("input()", 1, "EOFError"),
        ("raise SystemExit('no')", 1, "no"),
        ("raise SystemExit(7)", 7, ""),
        ("import os; os._exit(9)", 9, ""),
        ("import os; os.abort()", 134, ""),
        ("import ctypes; ctypes.string_at(0)", 139, ""),
        ("import numpy", 1, "ModuleNotFoundError"),
    ],
)
def test_what_goes_wrong_is_the_programs_error(program, code, errors):
    done = run_program(program)
    assert (done.status, done.code) == ("error", code), done
    assert errors in done.stderr


@boxed
def test_a_program_is_main_and_finds_nothing_of_ours_there():
    program = "print(sorted(globals()), __name__)"
    plain = [sys.executable, "-S", "-c", "__file__ = ''; " + program]
    assert (
        run_program(program).stdout == subprocess.run(plain, capture_output=True, text=True).stdout
    )
    assert run_program("print(__file__)").stdout == "/main.py\n"


@boxed
def test_classes_of_a_program_can_be_found_by_their_module():
    program = """
from __future__ import annotations
import dataclasses, pickle
@dataclasses.dataclass
class A:
    x: int
def f(x):
    return pickle.loads(pickle.dumps(A(x))).x
if __name__ == "__main__":
    print(f(int(input())))
"""
    assert count_passed(program, [StdinCase("5", "5"), FunctionCase("f", (6,), 6)]) == 2


@boxed
def test_bytes_that_are_no_text_come_out():
    done = run_program("import os; os.write(1, b'a\\xff\\xc3'); os.write(2, b'\\xfe')")
    assert (done.status, done.stdout, done.stderr) == ("ok", "a\ufffd\ufffd", "\ufffd")
    assert run_program("print(ascii(input()), 'ü')", "\ud800é").stdout == "'?\\xe9' ü\n"


@boxed
def test_input_may_be_long_and_need_not_be_read():
    long = "x" * (4 * LIMITS.output)
    assert run_program("", long).status == "ok"
    assert answer("print(len(input()))", long) == len(long)


@boxed
def test_equal_programs_print_equal_things():
    outputs = {
        run_program("print({'one', 'two', 'three', 'four', 'five'})").stdout for _ in range(4)
    }
    assert len(outputs) == 1


# ── Nothing of the host is within reach ──


@boxed
def test_no_file_of_the_host_can_be_read(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("treasure")
    paths = [
        secret,
        "/etc/passwd",
        "/etc/shadow",
        sandbox.__file__,
        __file__,
        "/proc/1/root/etc/passwd",
    ]
    program = f"""
import json, os
paths = {[str(path) for path in paths]}
for i, path in enumerate(paths):
    os.symlink(path, f"/tmp/link{{i}}")
    attempt(lambda: os.link(path, f"/tmp/hard{{i}}"))
up = ["/tmp/" + "../" * 9 + path for path in paths]
tricks = [f"/tmp/{{name}}{{i}}" for i in range(len(paths)) for name in ("link", "hard")]
ways = [f"/proc/{{pid}}/{{way}}" for pid in (1, "self") for way in ("root", "cwd/..")]
roots = [way + path for way in ways for path in paths]
print(json.dumps([attempt(lambda: open(path).read()) for path in paths + up + tricks + roots]))
"""
    assert set(answer(program)) <= {"FileNotFoundError", "PermissionError", "NotADirectoryError"}


@boxed
def test_only_the_system_and_the_interpreter_are_there():
    program = "import json, os; print(json.dumps([os.listdir(x) for x in ('/', '/etc', '/tmp')]))"
    top, etc, tmp = answer(program)
    own = Path(sys.base_prefix).parts[1]
    assert set(top) <= {"bin", "dev", "etc", "lib", "lib64", "main.py", "proc", "tmp", "usr", own}
    assert set(etc) <= {"ld.so.cache"}
    assert set(tmp) <= {*Path(sys.base_prefix).parts}


@boxed
def test_the_environment_of_the_host_is_hidden(monkeypatch):
    monkeypatch.setenv("HOST_KEY", "treasure")
    program = """
import json, os, pathlib
files = [*pathlib.Path("/proc").glob("*/environ"), *pathlib.Path("/proc").glob("*/task/*/environ")]
found = [attempt(f.read_bytes) for f in files]
print(json.dumps([sorted(os.environ), str(found)]))
"""
    names, found = answer(program)
    assert set(names) == {"HOME", "LC_CTYPE", "PATH", "PWD", "PYTHONHASHSEED"}
    assert "PYTHONHASHSEED" in found  # something was read
    assert "treasure" not in found


@boxed
def test_no_descriptor_of_the_host_is_inherited(tmp_path):
    with open(tmp_path / "ours", "w") as ours:
        os.set_inheritable(ours.fileno(), True)
        program = """
import json, os
print(json.dumps([attempt(lambda: os.readlink(f"/proc/self/fd/{f}")) for f in range(60)]))
"""
        found = set(answer(program)) - {"FileNotFoundError"}
    assert found == {"/memfd:sandbox (deleted)"}


@boxed
def test_the_network_is_out_of_reach():
    name = f"\0{secrets.token_hex(8)}"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as local:
        local.bind(name)
        local.listen()
        tcp.setblocking(False)
        local.setblocking(False)
        program = f"""
import json, socket
port = {tcp.getsockname()[1]}
kinds = [socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET, socket.AF_VSOCK]
found = [attempt(lambda: socket.socket(kind)) for kind in kinds]
found.append(attempt(lambda: socket.create_connection(("127.0.0.1", port), 1)))
found.append(attempt(lambda: socket.socket(socket.AF_UNIX).connect({name!r})))
a, b = socket.socketpair()
a.send(b"own")
print(json.dumps([str(x) for x in found] + [b.recv(3).decode()]))
"""
        *found, own = answer(program)
        assert found == ["PermissionError"] * 6 + ["ConnectionRefusedError"]
        assert own == "own"
        for server in (tcp, local):
            with pytest.raises(BlockingIOError):
                server.accept()


@boxed
def test_processes_of_the_host_are_neither_seen_nor_signalled():
    victim = subprocess.Popen(["sleep", "60"])
    program = f"""
import json, os, signal
seen = sorted(int(x) for x in os.listdir("/proc") if x.isdigit())
kill = lambda pid: attempt(lambda: os.kill(pid, signal.SIGKILL))
others = {{*range(3, 200), {victim.pid}, {os.getpid()}, {os.getppid()}}}
hit = [pid for pid in others if kill(pid) != "ProcessLookupError"]
kill(1), kill(-1)
print(json.dumps([seen, hit]))
"""
    try:
        assert answer(program) == [[1, 2], []]
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


@boxed
def test_a_program_has_no_rights_and_gets_none():
    program = (
        LIBC
        + """
import json, os
lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
def libc_says(*call):
    return ctypes.get_errno() if libc.syscall(*call) < 0 else 0
numbers = {"x86_64": (272, 165, 101, 29, 319, 56), "aarch64": (97, 40, 117, 194, 279, 220)}
unshare, mount, ptrace, shmget, memfd_create, clone = numbers[os.uname().machine]
user = 0x1000_0000
print(json.dumps([
    os.getuid() * os.geteuid() * os.getgid() > 0, os.getgroups(),
    [lines[name].strip() for name in ("CapInh", "CapPrm", "CapEff", "CapAmb", "NoNewPrivs")],
    attempt(lambda: os.setuid(0)), attempt(lambda: os.setgroups([0])),
    libc_says(unshare, user), libc_says(clone, user | 17, 0, 0, 0, 0),
    libc_says(435, 0, 0), libc_says(ptrace, 16, 1, 0, 0),  # 435: clone3
    libc_says(mount, b"x", b"/tmp", b"tmpfs", 0, 0),
    libc_says(shmget, 0, 1 << 30, 0o1600), libc_says(memfd_create, b"x", 0),
]))
"""
    )
    user, groups, caps, *refused = answer(program)
    assert user
    assert set(groups) <= {os.getgid()}
    assert caps == ["0" * 16] * 4 + ["1"]
    assert set(refused[:2]) <= {"PermissionError", "OSError"}
    assert refused[2:] == [1, 1, 38, 1, 1, 1, 1]


@boxed
def test_the_first_process_is_out_of_reach():
    """It is bwrap's, without limits and filter; who writes into its memory has neither, too.

    Without a user of its own, a program runs as the same user.
    """
    program = (
        LIBC
        + """
import json, os
def read_memory(pid):
    with open(f"/proc/{pid}/maps") as maps:
        start = next(line for line in maps if "r-xp" in line).split("-")[0]
    fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY)  # no process may write there, not even its own
    return len(os.pread(fd, 8, int(start, 16)))
def libc_says(*call):
    return ctypes.get_errno() if libc.syscall(*call) < 0 else 0
readv = {"x86_64": 310, "aarch64": 270}[os.uname().machine]
first = os.pidfd_open(1)
print(json.dumps([
    attempt(lambda: read_memory("self")), attempt(lambda: read_memory(1)),
    attempt(lambda: read_memory("self/../1")), attempt(lambda: read_memory("1/task/1")),
    os.listdir("/proc/1"), attempt(lambda: os.mkdir("/proc/1/x")),
    [libc_says(438, first, i, 0) for i in range(9)], libc_says(readv, 1, 0, 0, 0, 0, 0),
]))
"""
    )
    own, *others, listed, made, taken, read = answer(program)
    assert own == 8 and others == ["FileNotFoundError"] * 3
    assert listed == [] and made in ("OSError", "PermissionError")
    assert taken == [1] * 9 and read == 1


@boxed
def test_every_namespace_is_its_own():
    spaces = ["ipc", "mnt", "net", "pid", "uts"]
    program = f"""
import json, os
inside = [os.readlink(f"/proc/self/ns/{{name}}") for name in {spaces}]
print(json.dumps([inside, os.getsid(0), os.uname().nodename]))
"""
    inside, session, name = answer(program)
    assert [os.readlink(f"/proc/self/ns/{x}") == y for x, y in zip(spaces, inside)] == [False] * 5
    assert session > 0  # 0: that of somebody outside, with their terminal
    assert name == "sandbox"


@boxed
def test_only_tmp_is_mounted_to_be_written():
    program = """
import json
mounts = [line.split() for line in open("/proc/self/mounts")]
print(json.dumps([place for _, place, _, flags, *_ in mounts if "rw" in flags.split(",")]))
"""
    devices = {f"/dev/{x}" for x in ("null", "zero", "full", "random", "urandom", "tty", "pts")}
    assert set(answer(program)) - devices == {"/tmp"}


@boxed
def test_nothing_can_be_written_outside_tmp():
    ours = [
        sandbox.__file__,
        __file__,
        os.path.realpath(sys.executable),
        json.__file__,
        "/usr/bin/env",
    ]
    before = [Path(path).stat() for path in ours]
    program = f"""
import json, os
ways = [
    lambda p: open(p, "a"), os.unlink, os.utime, lambda p: os.chmod(p, 0o777),
    lambda p: os.rename("/tmp/x", p), lambda p: os.symlink("/tmp/x", os.path.dirname(p) + "/new"),
]
open("/tmp/x", "w").write("mine")
paths = {ours} + ["/main.py", "/new", "/dev/new", "/dev/shm/new", "/proc/sys/kernel/hostname"]
print(json.dumps([[path, attempt(lambda: way(path))] for path in paths for way in ways]))
"""
    done = answer(program)
    good = {"FileNotFoundError", "PermissionError", "OSError", "NotADirectoryError"}
    assert [path for path, result in done if result not in good] == []
    after = [Path(path).stat() for path in ours]
    assert [(x.st_mtime_ns, x.st_size, x.st_mode) for x in before] == [
        (x.st_mtime_ns, x.st_size, x.st_mode) for x in after
    ]


@boxed
def test_programs_leave_nothing_to_each_other():
    assert run_program("open('/tmp/x', 'w').write('hello')").status == "ok"
    assert "FileNotFoundError" in run_program("open('/tmp/x')").stderr


# ── Limits ──


@boxed
@pytest.mark.parametrize(
    "program",
    [
        "import time; time.sleep(60)",
        "import signal, os; os.kill(os.getpid(), signal.SIGSTOP)",
        "import os\nos.closerange(0, 64)\nimport time\ntime.sleep(60)",
        "import signal\nfor s in (15, 2, 1, 24): signal.signal(s, signal.SIG_IGN)\nsignal.pause()",
        "import threading; threading.Event().wait()",
    ],
)
def test_waiting_ends_by_the_clock(program):
    done = run_program(program, limits=replace(LIMITS, seconds=0.4))
    assert (done.status, done.code) == ("time", 137)
    assert done.seconds < 2


@boxed
@pytest.mark.parametrize("ignore", ["", "import signal; signal.signal(24, signal.SIG_IGN)\n"])
def test_computing_ends_by_its_own_time(ignore):
    done = run_program(ignore + "while True: pass", limits=replace(LIMITS, cpu=1))
    assert done.status == "time"
    assert done.seconds < 8  # of 10


@boxed
@pytest.mark.parametrize(
    "program",
    [
        "x = bytearray(1 << 30)",
        "x = [0]\nwhile True: x += x",
        "x = 'ab' * (1 << 40)",
        "import mmap; mmap.mmap(-1, 1 << 30)",
    ],
)
def test_memory_is_bounded(program):
    done = run_program(program)
    assert done.status == "memory" or "Cannot allocate memory" in done.stderr, done


@boxed
def test_a_program_may_use_what_it_has_and_survive_what_it_has_not():
    program = """
import traceback
x = bytearray(100 << 20)
try:
    bytearray(1 << 30)
except MemoryError:
    traceback.print_exc()
"""
    done = run_program(program)
    assert (done.status, done.code) == ("ok", 0)
    assert "MemoryError" in done.stderr


BOMB = """
import json, os, time
children, full = 0, False
while children < 100 and not full:
    try:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        children += 1
    except BlockingIOError:
        full = True
time.sleep(0.3)  # beside its neighbor
print(json.dumps([children, full]))
"""


@boxed
def test_processes_are_bounded_in_each_sandbox_by_itself():
    done = map_parallel(run_program, [BOMB] * 2, workers=2)
    assert [json.loads(x.stdout) for x in done] == [[LIMITS.processes - 1, True]] * 2


@boxed
def test_threads_count_as_processes():
    program = """
import json, threading, time
def many():
    for n in range(100):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        print(n + 1, file=log, flush=True)
log = open("/tmp/n", "w")
print(json.dumps([attempt(many), int(open("/tmp/n").read().split()[-1])]), flush=True)
"""
    assert answer(program) == ["RuntimeError", LIMITS.processes - 1]


@boxed
@pytest.mark.parametrize(
    "program",
    [
        "while True: print('x' * 1000)",
        "import sys\nwhile True: sys.stderr.write('x' * 1000)",
        "import subprocess; subprocess.run('yes')",
        "import os\nwhile True: os.write(1, b'x' * (1 << 20))",
        "import os; os.truncate('/proc/self/fd/1', 1 << 40)",
    ],
)
def test_output_is_bounded(program):
    done = run_program(program)
    assert done.status == "output" or "File too large" in done.stderr
    assert max(len(done.stdout), len(done.stderr)) <= LIMITS.output
    assert done.seconds < 5


@boxed
def test_output_beyond_its_limit_takes_no_memory():
    program = """
import os
try:
    for i in range(200):
        os.write(1, bytes(1 << 20))
except OSError:
    os.write(2, str(os.fstat(1).st_size).encode())
"""
    assert run_program(program).stderr == str(LIMITS.output)


@boxed
def test_when_memory_ends_the_sandbox_goes_first_and_leaves_no_core():
    program = """
import json, resource
score = int(open("/proc/self/oom_score_adj").read())
print(json.dumps([score, resource.getrlimit(resource.RLIMIT_CORE)]))
"""
    assert answer(program) == [1000, [1, 1]]


@boxed
def test_a_program_changes_nothing_in_proc():
    """It once lowered its score, so that memory ended the process that trains."""
    program = """
import json, os
refused = []
for name in ("oom_score_adj", "coredump_filter", "loginuid", "timerslack_ns", "comm"):
    try:
        open(f"/proc/self/{name}", "w").close()
    except OSError as e:
        refused.append(e.errno)
with open("/proc/self/fd/1", "w") as out:  # not a file of /proc
    out.write(json.dumps(refused))
"""
    assert answer(program) == [errno.EROFS] * 5


@boxed
def test_files_are_bounded():
    program = """
import json, os
def fill():
    for i in range(1000):
        with open(f"/tmp/{i}", "wb") as f:
            f.write(bytes(1 << 20))
def grow():
    with open("/tmp/big", "wb") as f:
        for i in range(1000):
            f.write(bytes(1 << 20))
kept = []
def many():
    for i in range(1000):
        kept.append(os.open("/dev/null", os.O_RDONLY))
results = [attempt(grow), attempt(fill), attempt(many)]
for fd in kept:
    os.close(fd)
print(json.dumps([*results, len(kept), os.statvfs("/tmp").f_blocks * os.statvfs("/tmp").f_frsize]))
"""
    *results, descriptors, size = answer(program)
    assert results == ["OSError"] * 3
    assert descriptors < LIMITS.files
    assert size == LIMITS.disk


# Each makes objects of a kind until the kernel refuses one, and prints how many.
MAKERS = {
    "files": "close(os.open(f'/tmp/{i}', os.O_CREAT | os.O_WRONLY))",
    "folders": "os.mkdir(f'/tmp/{i}')",
    "nested folders": "os.mkdir('/tmp/x'), os.rename('/tmp/x', f'/tmp/{i}')",
    "symbolic links": "os.symlink('x' * 4000, f'/tmp/{i}')",
    "short symbolic links": "os.symlink('x' * 100, f'/tmp/{i}')",
    "hard links": "os.link('/tmp/first', f'/tmp/{i}')",
    "named pipes": "os.mkfifo(f'/tmp/{i}')",
    "named sockets": "listen(f'/tmp/{i}')",
    "files of long names": "close(os.open(f'/tmp/{i:0255}', os.O_CREAT | os.O_WRONLY))",
    "files without a name": "os.open('/tmp', os.O_TMPFILE | os.O_WRONLY)",
    "pipes": "os.pipe()",
    "sockets": "kept.append(socket.socketpair())",
    "sockets in flight": "send(i)",
    "terminals": "os.openpty()",
    "timers": "check(libc.timer_create(1, None, ctypes.byref(ctypes.c_void_p())))",
    "signals": "check(libc.sigqueue(os.getpid(), 40, None))",
    "leases": "fcntl.fcntl(os.open('/tmp/second', os.O_RDONLY), fcntl.F_SETLEASE, fcntl.F_RDLCK)",
}
DENIED_MAKERS = {  # of objects that no limit counts
    "memory files": "os.memfd_create('x')",
    "record locks": "fcntl.lockf(first, fcntl.LOCK_EX, 1, 2 * (N - i))",
    "locks of open files": "fcntl.fcntl(first, 37, struct.pack('hhqqi4x', 1, 0, i * 2, 1, 0))",
    "watches": "check(libc.inotify_init1(0))",
    "message queues": "check(libc.mq_open(f'/{i}'.encode(), os.O_CREAT | os.O_RDWR, 0o600, None))",
    "attributes": "os.setxattr('/tmp/first', f'user.{i}', b'x' * 1000)",
    "access lists": "os.setxattr('/tmp/first', 'system.posix_acl_access', ACL)",
    "shared memory": "kept.append(mmap.mmap(-1, 1 << 20)), kept[-1].resize(4096)",
    "shared memory by a device": "kept.append(mmap.mmap(os.open('/dev/zero', 2), 1 << 20))",
    "rings": "check(libc.syscall(IO_SETUP, 8, ctypes.byref(ctypes.c_void_p())))",
    "rulesets": "check(libc.syscall(444, ctypes.byref(ctypes.c_uint64(1)), 8, 0))",
}
MAKE = (
    LIBC
    + """
import fcntl, json, mmap, os, signal, socket, struct
N = 100_000
IO_SETUP = {"x86_64": 206, "aarch64": 0}[os.uname().machine]
entry = struct.Struct("<HHI").pack
owners = b"".join(entry(*x) for x in [(1, 7, 2**32 - 1), *[(2, 7, os.getuid())] * 999])
ACL = struct.pack("<I", 2) + owners + b"".join(entry(x, 7, 2**32 - 1) for x in (4, 16, 32))
close, kept = os.close, []
def check(code):
    if code < 0:
        raise OSError(ctypes.get_errno(), "")
def listen(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
def send(i):
    if i % 2 == 0:
        kept.append(socket.socketpair())
    a, b = kept[-1]
    socket.send_fds(a, [b"x"], [b.fileno()] * 200)
signal.pthread_sigmask(signal.SIG_BLOCK, {40})
first = os.open("/tmp/first", os.O_CREAT | os.O_RDWR)
close(os.open("/tmp/second", os.O_CREAT | os.O_RDWR))
made = 0
try:
    for i in range(N):
        WHAT
        made += 1
except (OSError, MemoryError):
    pass
print(json.dumps(made))
"""
)


@boxed
@pytest.mark.parametrize("kind", MAKERS)
def test_objects_in_the_kernels_memory_are_bounded(kind):
    made = answer(MAKE.replace("WHAT", MAKERS[kind]))
    assert 0 < made < LIMITS.inodes
    if kind in ("files", "folders", "short symbolic links", "hard links", "named pipes"):
        assert made > LIMITS.inodes - 10  # what is allowed can be made


@boxed
@pytest.mark.parametrize("kind", DENIED_MAKERS)
def test_objects_that_no_limit_counts_cannot_be_made(kind):
    assert answer(MAKE.replace("WHAT", DENIED_MAKERS[kind])) == 0


@boxed
def test_all_processes_of_a_program_share_the_limit_on_inodes():
    program = """
import json, os
def fill(name):
    n = 0
    while True:
        try:
            os.mkdir(f"/tmp/{name}.{n}")
        except OSError:
            return
        n += 1
for name in range(4):
    if os.fork() == 0:
        fill(name)
        os._exit(0)
for name in range(4):
    os.wait()
disk = os.statvfs("/tmp")
print(json.dumps([len(os.listdir("/tmp")), disk.f_files, disk.f_ffree]))
"""
    made, limit, free = answer(program)
    assert limit == LIMITS.inodes and free == 0
    assert made < LIMITS.inodes
    few = replace(LIMITS, inodes=20)
    assert answer(program, limits=few)[1:] == [20, 0]


@boxed
def test_a_program_can_use_locks_of_files_and_private_memory():
    program = """
import fcntl, json, mmap, os, tempfile
with tempfile.TemporaryFile() as f:
    fcntl.flock(f, fcntl.LOCK_EX)
    f.write(bytes(1 << 16))
    f.flush()
    of_file = mmap.mmap(f.fileno(), 1 << 16)
    of_file[5] = 7
    private = mmap.mmap(-1, 1 << 16, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    private[5] = of_file[5]
    print(json.dumps([private[5], fcntl.fcntl(f, fcntl.F_GETFD)]))
"""
    assert answer(program) == [7, 1]


# ── When it is over, it is over ──

DAEMON = """
import os, subprocess, sys, time
for command in (["sleep", "MARK"], [sys.executable, "-S", "-c", "import time; time.sleep(MARK)"]):
    subprocess.Popen(command, start_new_session=True, stdin=-3, stdout=-3, stderr=-3)
if os.fork() == 0:
    os.setsid()
    os.closerange(0, 64)
    subprocess.run(["sleep", "MARK"])
time.sleep(0.1)
print("done", flush=True)
"""


@boxed
def test_daemons_end_with_their_program(mark):
    done = run_program(DAEMON.replace("MARK", mark))
    assert (done.status, done.stdout) == ("ok", "done\n")
    assert done.seconds < 5
    assert living(mark) == []


@boxed
def test_daemons_end_with_the_time(mark):
    program = DAEMON.replace("MARK", mark) + "time.sleep(60)"
    assert run_program(program, limits=replace(LIMITS, seconds=0.5)).status == "time"
    assert living(mark) == []


@boxed
def test_a_sandbox_ends_with_us(mark):
    program = f"import os; os.execlp('sleep', 'sleep', '{mark}')"
    code = f"from dsv3_ref.verifiers.sandbox import run_program; run_program({program!r})"
    us = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    until = time.monotonic() + 20
    while not living(f"sleep\0{mark}") and time.monotonic() < until:
        time.sleep(0.02)
    assert living(f"sleep\0{mark}")
    us.kill()
    us.wait()
    while living(mark) and time.monotonic() < until:
        time.sleep(0.02)
    assert living(mark) == []


# ── Verdicts ──


@boxed
def test_what_is_printed_is_compared_line_by_line():
    program = "print('1 2 ')\nprint(int(input()) + 1, end='')"
    cases = [
        StdinCase("2", "1 2\n3\n\n"),
        StdinCase("3", "1 2\r\n4"),
        StdinCase("2", "1 2 3"),
        StdinCase("2", "1  2\n3"),
    ]
    assert count_passed(program, cases) == 2
    assert count_passed(program + "\n1 / 0", cases) == 0  # right, then wrong


@boxed
def test_what_is_returned_is_compared_by_value():
    program = """
def keep(x):
    print("noise", x)
    return x
def pair(a, b):
    return {a: (b, [True, None, "é"])}
def total(xs):
    return sum(xs)
class Solution:
    def third(self, x):
        return x / 3
"""
    long = list(range(200_000))
    right = [
        FunctionCase("keep", ([1, "2", 3.5, None, {"a": []}],), [1, "2", 3.5, None, {"a": []}]),
        FunctionCase("pair", (1, 2), {1: (2, [True, None, "é"])}),
        FunctionCase("Solution().third", (1,), 0.33333333),
        FunctionCase("keep", (10**200,), 10**200),
        FunctionCase("keep", (2.0,), 2),
        FunctionCase("total", (long,), sum(long)),
    ]
    assert [case.passed(program) for case in right] == [True] * len(right)
    wrong = [
        FunctionCase("keep", (1,), "1"),
        FunctionCase("keep", ([1, 2],), [1, 2, 3]),
        FunctionCase("keep", ([1, 2],), [2, 1]),
        FunctionCase("keep", ({"a": 1},), {"a": 1, "b": 2}),
        FunctionCase("Solution().third", (1,), 0.333),
        FunctionCase("keep", (10**200,), 10**200 + 1),
        FunctionCase("absent", (1,), 1),
        FunctionCase("sum", ([1, 2],), 3),  # not the program's own
        FunctionCase("keep", (1, 2), 1),
    ]
    assert [case.passed(program) for case in wrong] == [False] * len(wrong)


@boxed
@pytest.mark.parametrize(
    "value",
    [
        "float('nan')", "float('inf')", "10 ** 5000", "10 ** 400", "object()", "{1, 2}", "b'1'",
        "'x' * (1 << 21)", "(lambda x: x.append(x) or x)([])", "exit(0)", "input()", "1 / 0",
        "type('Liar', (dict,), {'__eq__': lambda a, b: True})()",
    ],
)  # fmt: skip
def test_a_strange_value_is_a_wrong_one(value):
    case = FunctionCase("f", (), 1.5)
    assert case.passed(f"def f(): return {value}") is False
    assert case.passed("def f(): return 1.5") is True


RAW = """
import os
def say(text):
    for fd in range(3, 64):
        try:
            os.write(fd, text)
        except OSError:
            pass
"""


@boxed
@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[" * 100_000 + "]" * 100_000,
        "1" * 100_000,
        "1e999",
        "\\xff",
        "NaN",
        '{"a": 1',
        "",
    ],
)
def test_a_channel_full_of_anything_is_a_wrong_value(text):
    program = RAW + f"say(b'{text}'); os._exit(0)"
    assert FunctionCase("f", (), [1]).passed(program) is False


EMPTY = """
for fd in range(64):
    try:
        os.ftruncate(fd, 0)
        os.close(fd)
    except OSError:
        pass
"""
FORGERIES = {
    "a printed answer": "print('true'); print('{\"value\": true}'); print('ok'); os._exit(0)",
    "words for a grader": "say(b'ok'); say(b'passed'); os._exit(0)",
    "an early end": "os._exit(0)",
    "an end on leaving": "import atexit; atexit.register(os._exit, 0)\ndef f(x): return 0",
    "two answers": "say(b'1'); say(b'42')\ndef f(x): return 42",
    "any equality": "class E(int): __eq__ = lambda *_: True\ndef f(x): return E(0)",
    "a patched json": "import json; json.dumps = lambda x: 'true'\ndef f(x): return 0",
    "patched builtins": "__builtins__.isinstance = lambda *_: True\ndef f(x): return 0",
    "the wrapper's frame": "import sys; sys._getframe(1).f_globals['f'] = lambda x: 'yes'",
    "emptied files": EMPTY + "os._exit(0)",
    "another main": "try: open('/main.py', 'w')\nexcept OSError: pass\ndef f(x): return None",
}


@boxed
@pytest.mark.parametrize("name", FORGERIES)
def test_a_verdict_cannot_be_forged(name):
    program = RAW + FORGERIES[name]
    assert count_passed(program, [FunctionCase("f", (41,), 42), StdinCase("41", "42")]) == 0
    assert FunctionCase("f", (41,), 42).passed(RAW + "def f(x): return x + 1") is True


SEARCH = """
import gc, os, pathlib, sys
def everything():
    seen = [repr(x)[:10_000] for x in gc.get_objects() if isinstance(x, (dict, list, tuple))]
    frame = sys._getframe()
    while frame:
        seen.append(str({**frame.f_globals, **frame.f_locals}))
        frame = frame.f_back
    places = ["/", "/tmp", "/proc/1", "/proc/self", "/proc/self/fd"]
    paths = [path for place in places for path in pathlib.Path(place).iterdir()]
    for path in paths:
        try:
            seen.append(path.open("rb", 0).read(100_000).decode("latin-1"))
        except OSError:
            pass
    return ascii(seen)
"""


@boxed
@pytest.mark.parametrize("kind", ["printed", "returned"])
def test_the_expected_answer_is_not_inside(kind, monkeypatch):
    """A program that looks everywhere finds its input and its own text, but not the answer."""
    given, expected = secrets.token_hex(8), secrets.token_hex(8)
    outcomes = []
    execute = sandbox.execute
    monkeypatch.setattr(sandbox, "execute", lambda *a: outcomes.append(execute(*a)) or outcomes[-1])
    case = (
        StdinCase(given, expected) if kind == "printed" else FunctionCase("f", (given,), expected)
    )
    last = "print(everything())" if kind == "printed" else "def f(x):\n    print(everything())"
    assert case.passed(SEARCH + last, replace(LIMITS, output=16 << 20)) is False
    (done,) = outcomes
    assert done.status == "ok", done.stderr[-1000:]
    assert "def everything" in done.stdout
    assert given in done.stdout
    assert expected not in done.stdout


# ── Many at once ──


def open_handles() -> tuple[list[str], list[str]]:
    """Return descriptors of this process, and the children of its threads."""
    children = sorted(x.read_text() for x in Path("/proc/self/task").glob("*/children"))
    return sorted(os.listdir("/proc/self/fd")), [x for x in children if x]


@boxed
def test_nothing_is_left_open_by_many_runs():
    """Neither descriptors nor children without a `wait`."""
    run_program("")
    before = open_handles()
    done = map_parallel(run_program, ["print(1)", "1 / 0", "while True: print(1)"] * 6, workers=6)
    assert [x.status for x in done] == ["ok", "error", "output"] * 6
    assert open_handles() == before


@boxed
def test_many_run_at_once_in_order():
    start = time.perf_counter()
    program = "import time; n = input(); time.sleep(0.6 if n == '0' else 0.3); print(n)"
    done = map_parallel(run_program, [program] * 6, map(str, range(6)), workers=6)
    assert [x.stdout for x in done] == [f"{n}\n" for n in range(6)]
    assert time.perf_counter() - start < 1.6  # 2.1 one after the other
    cases = [[StdinCase("", str(n))] for n in range(3)]
    assert map_parallel(count_passed, [f"print({n})" for n in (0, 9, 2)], cases) == [1, 0, 1]


@boxed
def test_a_sandbox_costs_less_than_half_a_second():
    run_program("")
    assert min(run_program("").seconds for _ in range(5)) < 0.5


# ── No sandbox, no run ──


def test_without_bubblewrap_nothing_runs(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="apt-get install bubblewrap"):
        run_program(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match="only in bubblewrap"):
        count_passed("print(1)", [StdinCase("", "1")])
    with pytest.raises(UserError, match="only in bubblewrap"):
        map_parallel(run_program, ["print(1)"] * 3)
    assert not (tmp_path / "ran").exists()


# what bwrap tells before it fails later than at once: the process that it had started
TOLD = """
while [ "$1" != --info-fd ]; do shift; done
echo '{"child-pid": 999999999}' > /proc/self/fd/$2
"""


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo 'bwrap: No permissions to create new namespace' >&2; exit 1", "No permissions to"),
        ("exit 7", "exit code 7"),
        ("kill -9 $$", "exit code -9"),
        (TOLD + "exit 1", "exit code 1"),
    ],
)
def test_a_sandbox_that_cannot_be_made_runs_nothing(script, why, monkeypatch, tmp_path):
    fake = tmp_path / "bwrap"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=f"could not start Python .*{why}"):
        run_program("print(1)")


@boxed
def test_a_kernel_that_grants_no_namespaces_runs_nothing():
    code = "from dsv3_ref.verifiers.sandbox import run_program; run_program('print(1)')"
    poor = ["bwrap", "--unshare-user", "--uid", "1234", "--disable-userns", "--dev-bind", "/", "/"]
    done = subprocess.run([*poor, sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert b"could not start Python (unshare: " in done.stderr.splitlines()[-1]


@boxed
@pytest.mark.parametrize("few", [{"seconds": 0.0001}, {"memory": 1 << 20}, {"files": 3}])
def test_limits_that_let_nothing_start_are_no_fault_of_the_program(few):
    with pytest.raises(UserError, match="could not start Python"):
        run_program("print(1)", limits=replace(LIMITS, **few))


@boxed
def test_no_program_can_make_the_sandbox_look_broken():
    program = RAW + EMPTY + "os.kill(os.getpid(), 9)"
    assert run_program(program).code == 137


def test_an_unknown_machine_runs_nothing(monkeypatch):
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "riscv64")
    with pytest.raises(UserError, match="riscv64"):
        sandbox.seccomp_filter()


ISOLATION = "host or rights or namespace or outside or proc or network or daemons or bounded_in"
MOST = "not value and not forged and not compared and not clock and not own_time"


@boxed
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(
    "tests", [ISOLATION, pytest.param(MOST, marks=pytest.mark.full)], ids=["isolation", "most"]
)
def test_all_of_this_holds_for_an_ordinary_user(tests):
    """This file again, as somebody who owns nothing, with what it needs in their reach."""
    places = {
        sys.base_prefix: "python",
        site.getsitepackages()[0]: "site",
        str(ROOT / "dsv3_ref"): "dsv3_ref",
        str(ROOT / "tests"): "tests",
    }
    binds = []
    for path, name in places.items():
        binds += ["--ro-bind", path, f"/tmp/{name}"]
    python = f"/tmp/python/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    command = ["bwrap", "--dev-bind", "/", "/", "--perms", "1777", "--tmpfs", "/tmp", *binds]
    command += ["--chdir", "/tmp"]  # where root is may be out of reach, or hidden
    command += ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", "env"]
    command += ["PYTHONPATH=/tmp:/tmp/site", "PYTHONDONTWRITEBYTECODE=1", python, "-m", "pytest"]
    command += ["--noconftest", "-p", "no:cacheprovider", "-c", "/dev/null", "-q"]
    command += ["-k", tests]
    command += ["/tmp/tests/verifiers/test_sandbox.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout
