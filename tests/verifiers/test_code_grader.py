"""Results of code are compared exactly, and no program obtains a verdict that it has not earned."""

import json
import math
import os
import secrets
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from test_sandbox import boxed, living

from dsv3_ref.verifiers.code_grader import (
    FunctionCase,
    StdinCase,
    count_passed,
    json_equal,
    output_lines,
)
from dsv3_ref.verifiers.sandbox import LIMITS, map_parallel

# ── What is equal ──

TEXTS = st.text(max_size=8)
INTEGERS = st.integers() | st.integers(-(10**400), 10**400)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
EXACT = st.none() | st.booleans() | INTEGERS | TEXTS


def nest(children):
    return st.lists(children, max_size=4) | st.dictionaries(TEXTS, children, max_size=4)


def replace_leaf(value, draw, change):
    """Change one leaf of a nested value, which a path drawn on the way down selects."""
    if isinstance(value, list) and value:
        index = draw(st.integers(0, len(value) - 1))
        return [*value[:index], replace_leaf(value[index], draw, change), *value[index + 1 :]]
    if isinstance(value, dict) and value:
        key = draw(st.sampled_from(sorted(value)))
        return {**value, key: replace_leaf(value[key], draw, change)}
    return change(value)


@given(st.recursive(EXACT | st.floats(), nest, max_leaves=12))
def test_every_value_equals_itself(value):
    assert json_equal(json.loads(json.dumps(value)), value)


@given(st.data(), st.recursive(EXACT, nest, max_leaves=12))
def test_a_value_with_another_leaf_is_another_value(data, expected):
    leaf = data.draw(EXACT)
    value = replace_leaf(expected, data.draw, lambda _: leaf)
    same = json.dumps(value, sort_keys=True) == json.dumps(expected, sort_keys=True)
    assert json_equal(value, expected) is same


@given(INTEGERS, FLOATS)
@example(1_000_000_007, 1_000_000_500.0)
@example(1_000_000_007, 1_000_000_007.0)
@example(2**53 + 1, 2.0**53)
@example(10**23, 1e23)
@example(0, 1e-300)
@example(0, -0.0)
def test_an_expected_integer_has_no_tolerance(expected, value):
    is_same = value.is_integer() and int(value) == expected
    assert json_equal(value, expected) is is_same
    assert json_equal([{"x": value}], [{"x": expected}]) is is_same


@given(INTEGERS, INTEGERS.filter(bool))
def test_integers_differ_however_large_they_are(value, difference):
    assert json_equal(value, value)
    assert not json_equal(value + difference, value)


@given(FLOATS.filter(bool), st.floats(-0.99e-6, 0.99e-6))
def test_an_expected_float_has_a_tolerance_of_its_size(expected, change):
    assume(abs(expected) > 1e-290 and math.isfinite(expected * 1.01))
    assert json_equal(expected * (1 + change), expected)
    assert not json_equal(expected * 1.00001, expected)
    assert not json_equal(-expected, expected)
    assert not json_equal(0.0, expected)
    assert json_equal(0.9e-9, 0.0) and not json_equal(2e-9, 0.0)


@pytest.mark.parametrize(
    ("value", "expected", "is_equal"),
    [
        (True, 1, False), (1, True, False), (False, 0, False), (0, False, False),
        (True, 1.0, False), (1.0, True, False), (None, False, False), (None, 0, False),
        ("1", 1, False), (1, "1", False), ("", None, False), ("True", True, False),
        (2.0, 2, True), (2, 2.0, True), (0, -0.0, True), (-0.0, 0, True), (-0.0, 0.0, True),
        (math.nan, math.nan, True), (math.nan, 0, False), (0.0, math.nan, False),
        (math.nan, 1.5, False), (math.nan, math.inf, False), (math.inf, math.nan, False),
        (math.inf, math.inf, True), (-math.inf, math.inf, False), (1e308, math.inf, False),
        (math.inf, 1e308, False), (math.inf, sys.float_info.max, False), (math.inf, 10**400, False),
        (10**400, math.inf, False), (10**400, sys.float_info.max, False), (10**400, 1.0, False),
        (-(10**400), -sys.float_info.max, False), (10**400 + 1, 10**400, False),
        (0, 6.62607015e-34, False), (6.62607015e-34, 0, False), (1e-12, 5e-13, False),
        (5e-324, 5e-324, True), (1e-323, 5e-324, False), (0.333333333, 1 / 3, True),
        ("café", "cafe\u0301", False), ("а", "a", False), ("４２", "42", False), ("a ", "a", False),
        ([], {}, False), ({}, [], False), ([], None, False), ([[]], [], False), ([1], 1, False),
        ([1, 2], [2, 1], False), ({"a": 1}, {"a": 1, "b": 1}, False), ({"a": 1.0}, {"a": 1}, True),
        ([1_000_000_500], [1_000_000_007.0], True),
        ([1_000_002_000], [1_000_000_007.0], False), ([True], [1], False), ("[1]", [1], False),
    ],
)  # fmt: skip
def test_pairs_of_values(value, expected, is_equal):
    assert json_equal(value, expected) is is_equal


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("42", True), ("42 \n\n", True), ("42\r\n", True), ("42\u00a0", False), ("42\u200b", False),
        ("42\u3000", False), ("42\x1f", False), ("４２", False), ("42\n\x00", False),
        (" 42", False),
        ("\n42", False), ("42.0", False), ("+42", False), ("42\u0085", False), ("\ufeff42", False),
    ],
)  # fmt: skip
def test_printed_texts_are_compared_by_character(text, same):
    assert (output_lines(text) == output_lines("42\n")) is same


# ── Forgeries ──

# Every program is asked for `f(41)` and for the output of the input 41; 42 is right. None of these
# computes it.
PRELUDE = """
import os, sys
def say(text):
    for fd in range(3, 64):
        try:
            os.write(fd, text)
        except OSError:
            pass
"""
EQUAL_TO_ALL = "__eq__ = lambda *_: True; __ne__ = lambda *_: False; __hash__ = lambda *_: 0"
FORGERIES = {
    # values that claim to be equal
    "an int equal to all": f"class E(int): {EQUAL_TO_ALL}\ndef f(x): return E(0)",
    "a float equal to all": f"class E(float): {EQUAL_TO_ALL}\ndef f(x): return E(0)",
    "a str equal to all": f"class E(str): {EQUAL_TO_ALL}\ndef f(x): return E('0')",
    "a list equal to all": f"class E(list): {EQUAL_TO_ALL}\ndef f(x): return E()",
    "a dict equal to all": f"class E(dict): {EQUAL_TO_ALL}\ndef f(x): return E()",
    "an object equal to all": f"class E: {EQUAL_TO_ALL}\ndef f(x): return E()",
    "a class equal to all": f"class M(type): {EQUAL_TO_ALL}\nclass E(metaclass=M): pass\n"
    "def f(x): return E",
    "an int that shows itself as 42": "class E(int):\n __repr__ = __str__ = lambda s: '42'\n"
    " __int__ = __index__ = lambda s: 42\ndef f(x): return E(0)",
    "a str that shows itself as 42": "class E(str):\n __repr__ = __str__ = lambda s: '42'\n"
    "def f(x): return E('0')",
    "a bool": "print(True)\ndef f(x): return True",
    "NaN": "print(float('nan'))\ndef f(x): return float('nan')",
    "infinity": "print(1e999)\ndef f(x): return 1e999",
    "almost 42": "print(42.0000000001)\ndef f(x): return 42.0000000001",
    "a text": "print(repr('42'))\ndef f(x): return '42'",
    "full-width digits": "print('４２')\ndef f(x): return '４２'",
    "a space without width": "print('4\\u200b2')\ndef f(x): return '4\\u200b2'",
    "a space of another kind": "print('42\\u00a0')\ndef f(x): return '42\\u00a0'",
    "bytes that are no text": "os.write(1, b'42\\xff')\ndef f(x): return '42\\udcff'",
    "all numbers": "print(*range(100))\ndef f(x): return list(range(100))",
    "all numbers, line by line": "print(*range(100), sep='\\n')\ndef f(x): return {'42': 42}",
    # streams and descriptors
    "the words of a verdict": "say(b'ok passed true 1'); print('ok passed true 1'); os._exit(0)",
    "two values": "say(b'42 '); say(b'42')\nprint(42); print(42)\ndef f(x): return 0",
    "a value before another": "say(b'4')\nprint('4')\nimport atexit; atexit.register(print, 2)\n"
    "def f(x): return 22",
    "closed outputs": "os.close(1); os.close(2)\ndef f(x): return 0",
    "no descriptor at all": "os.closerange(0, 64)\ndef f(x): return 0",
    "an output moved back": "print(421, flush=True)\nos.lseek(1, 0, 0)\nprint(4)\n"
    "def f(x): return 0",
    "results that grow to their limit": "for fd in range(1, 16):\n try: os.ftruncate(fd, 1 << 20)\n"
    " except OSError: pass\ndef f(x): return 42\nprint(42)",
    # ends
    "an exit": "print(4)\nsys.exit(0)",
    "an exit in the function": "def f(x): os._exit(0)\nprint(0)",
    "an exit after half a value": "say(b'4'); print(4, flush=True); os._exit(0)",
    "a right answer and a failure": "print(42)\ndef f(x): say(b'42'); os._exit(1)\nsys.exit(1)",
    "a right answer and a signal": "print(42, flush=True); say(b'42'); os.kill(os.getpid(), 9)",
    "a failure hidden at the end": "import atexit; atexit.register(os._exit, 0)\n"
    "raise SystemExit(3)",
    "an excepthook": "sys.excepthook = lambda *_: os._exit(0)\n1 / 0",
    "a wrong answer printed at the end": "import atexit; atexit.register(print, 43)\n"
    "def f(x): return 43",
    # the harness
    "a patched json": "import json\njson.dumps = lambda *_, **__: '4 2'\ndef f(x): return 0",
    "a patched encoder": "import json\njson.JSONEncoder.default = lambda *_: [42]\n"
    "def f(x): return object()",
    "a json of its own": "import types\nsys.modules['json'] = types.SimpleNamespace(\n"
    " dumps=lambda x: 'true', load=lambda f: [1])\ndef f(x): return 0",
    "patched builtins": "import builtins\nbuiltins.isinstance = builtins.all = lambda *_: True\n"
    "builtins.len = lambda _: 0\ndef f(x): return 0",
    "another import": "import builtins\nbuiltins.__import__ = lambda *_: None\ndef f(x): return 0",
    "another write": "os.write = lambda *_: 0\ndef f(x): return 42.5",
    "another program": "try: open('/main.py', 'w').write('print(42)')\nexcept OSError: print(43)",
    "other arguments": "try: open('/args.json', 'w').write('[42]')\nexcept OSError: pass\n"
    "def f(x): return x\nprint(input())",
    "a library planted in the sandbox": "for place in sys.path + ['/tmp', '/usr/lib']:\n"
    " try: open(place + '/json.py', 'w').write('dumps = lambda _: 42')\n except OSError: pass\n"
    "def f(x): return 0",
    "a trace that returns": "def t(frame, event, arg):\n"
    " if event == 'return': frame.f_globals['f'] = lambda x: 43\n return t\n"
    "sys.settrace(t); sys.setprofile(t)\ndef f(x): return 0",
    "frames of the harness": "frame = sys._getframe()\nwhile frame:\n"
    " frame.f_globals.update(expected=0, status='ok', passed=True); frame = frame.f_back\n"
    "def f(x): return 0",
    "an audit hook": "sys.addaudithook(lambda *_: None)\ndef f(x): return 0",
    # other processes
    "a signal to all": "import signal\nfor pid in (1, -1, os.getppid()):\n"
    " try: os.kill(pid, signal.SIGTERM)\n except OSError: pass\ndef f(x): return 0",
    "a signal to the group": "import signal\nsignal.signal(15, signal.SIG_IGN)\nos.killpg(0, 15)\n"
    "def f(x): return 0",
    "a parent that ends first": "if os.fork(): os._exit(0)\nprint(0)\ndef f(x): return 0",
    "a child that answers otherwise": "if os.fork() == 0:\n say(b'4'); print(4, flush=True)\n"
    " os._exit(0)\nos.wait()\ndef f(x): return 0",
}  # fmt: skip


@pytest.mark.parametrize("name", ["{}", "{value}", "{started}", "{0}"])
def test_the_name_of_a_function_is_not_a_format(name):
    assert FunctionCase(name, (), 1).passed("value = started = 1") is False


CASES = [FunctionCase("f", (41,), 42), StdinCase("41", "42\n")]


@boxed
@pytest.mark.parametrize("name", FORGERIES)
def test_a_forgery_is_graded_wrong(name):
    start = time.perf_counter()
    assert count_passed(PRELUDE + FORGERIES[name], CASES) == 0
    assert time.perf_counter() - start < 10


ENDLESS = {
    "an endless repr": "class E(int):\n def __repr__(s):\n  while True: pass\n"
    "print(E(42))\ndef f(x): return E(42).__repr__()",
    "an endless iterator": "class E(list):\n def __iter__(s):\n  while True: yield 1\n"
    " def __len__(s): return 1\ndef f(x): return list(E([1]))\nf(1)",
    "an endless dict": "class E(dict):\n def items(s):\n  while True: yield 'a', 1\n"
    "def f(x): return E(a=1)\nlist(E().items())",
    "a length of its own": "class E(list):\n def __len__(s): return 10**18\n"
    " def __getitem__(s, i): return 42\ndef f(x): return [x for x in E([1])]\n"
    "print(*[E()[i] for i in range(len(E()))])",
    "endless recursion": "def f(x): return f(x)\nsys.setrecursionlimit(10**9)\nf(1)",
    "an endless comparison": "class E:\n def __eq__(s, o):\n  while True: pass\n"
    "def f(x): return E() == x\nf(1)",
    "a thread that stays": "import threading, time\n"
    "threading.Thread(target=time.sleep, args=(99,)).start()\nprint(42)\ndef f(x): return 42",
    "a hook that stays": "import atexit, time\natexit.register(time.sleep, 99)\nprint(42)\n"
    "def f(x): return 42",
    "a destructor that stays": "import time\nclass E:\n def __del__(s): time.sleep(99)\ne = E()\n"
    "print(42)\ndef f(x): return 42",
    "a stopped process": "print(42, flush=True)\nos.kill(os.getpid(), 19)",
    "too much output": "print(42)\nwhile True: print(' ' * 10**6)",
    "an integer of a million digits": "def f(x): return 10 ** 10 ** 6\nprint(10 ** 10 ** 8)",
    "nested lists": "def f(x):\n x = []\n for _ in range(10**6): x = [x]\n return x\n"
    "print('[' * 10**6)",
    "a list that holds itself": "def f(x):\n x = []; x.append(x); return x\nprint(f(1))",
    "a bomb of processes": "while True:\n try: os.fork()\n except OSError: pass",
    "a bomb of threads": "import threading, time\nwhile True:\n"
    " try: threading.Thread(target=time.sleep, args=(99,)).start()\n except RuntimeError: pass",
}  # fmt: skip


QUICK = {
    "an endless repr", "endless recursion", "a thread that stays", "a stopped process",
    "too much output", "nested lists", "a bomb of processes",
}  # fmt: skip


@boxed
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.full) for n in ENDLESS]
)
def test_what_does_not_end_is_wrong_in_time(name):
    start = time.perf_counter()
    limits = replace(LIMITS, seconds=1.5, cpu=1)

    def grade(case):
        return case.passed(PRELUDE + ENDLESS[name], limits)

    assert map_parallel(grade, CASES, workers=2) == [False, False]
    assert time.perf_counter() - start < 10


RIGHT = {
    "an int of another class": "class E(int): pass\ndef f(x): return E(x + 1)\nprint(E(42))",
    "an integral float": "def f(x): return (x + 1.0)\nprint(int(f(41)))",
    "a written value": "print(42, flush=True); say(b'42'); os._exit(0)",
    "noise on other streams": "print('43', file=sys.stderr)\nprint(42)\ndef f(x): return x + 1",
    "a process that outlives": "import time\nprint(42, flush=True)\nif os.fork() == 0:\n"
    " time.sleep(99)\n os._exit(0)\ndef f(x): return x + 1",
    "a patched comparison": "class E(int): __eq__ = lambda *_: False\ndef f(x): return E(42)\n"
    "print(E(42))",
}  # fmt: skip


@boxed
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_answer_is_right_however_it_comes(name):
    assert count_passed(PRELUDE + RIGHT[name], CASES) == 2


# Looks for a secret in objects, frames, memory, files, environments and the processes that it sees.
HUNT = """
import gc, glob, re
def hunt():
    shapes = re.compile(rb"secret[0-9a-f]{16}")
    hits = set()
    def look(data):
        hits.update(shapes.findall(data))
    for thing in gc.get_objects():
        if isinstance(thing, (dict, list, tuple, set)):
            look(repr(thing)[:20_000].encode(errors="replace"))
    for pattern in ("/*", "/tmp/*", "/dev/shm/*", "/proc/*/environ", "/proc/*/cmdline",
                    "/proc/*/fd/*", "/proc/*/task/*/environ", "/proc/*/maps", "/proc/*/root/*"):
        for path in glob.glob(pattern):
            try:
                if os.path.isfile(path):
                    look(open(path, "rb", 0).read(1 << 20))
            except OSError:
                pass
    for pid in (1, os.getppid(), "self"):
        try:
            spans = [line.split()[0].split("-") for line in open(f"/proc/{pid}/maps")]
            with open(f"/proc/{pid}/mem", "rb", 0) as memory:
                for low, high in spans:
                    try:
                        memory.seek(int(low, 16))
                        look(memory.read(min(int(high, 16) - int(low, 16), 4 << 20)))
                    except (OSError, OverflowError, ValueError):
                        pass
        except OSError:
            pass
    return sorted(hit.decode() for hit in hits)
"""


@boxed
def test_no_hunt_finds_the_expected_answer():
    given_text, expected = (f"secret{secrets.token_hex(8)}" for _ in range(2))
    found = "def f(x):\n    return hunt()"
    assert FunctionCase("f", (given_text,), [given_text]).passed(PRELUDE + HUNT + found)
    assert not FunctionCase("f", (given_text,), expected).passed(
        PRELUDE + HUNT + "def f(x):\n    return next((y for y in hunt() if y != x), x)"
    )
    printed = "x = input()\nprint(next((y for y in hunt() if y != x), x))"
    assert not StdinCase(given_text, expected).passed(PRELUDE + HUNT + printed)
    assert StdinCase(given_text, given_text).passed(PRELUDE + HUNT + printed)


@boxed
def test_nothing_of_a_graded_program_outlives_its_verdict():
    mark = f"{secrets.randbelow(10**6) + 10**6}.{secrets.randbelow(10**6)}"
    program = f"""
import os, subprocess
def f(x):
    for _ in range(4):
        subprocess.Popen(["sleep", "{mark}"], start_new_session=True)
    return x + 1
"""
    assert FunctionCase("f", (41,), 42).passed(program)
    assert living(mark) == []


@boxed
def test_the_grader_survives_signals_and_keeps_its_files(tmp_path):
    """A program that attacks its surroundings leaves the grader, its files and its results."""
    script = tmp_path / "grade.py"
    script.write_text(
        "from dsv3_ref.verifiers.code_grader import *\n"
        f"attack = {PRELUDE + FORGERIES['a signal to all']!r}\n"
        "print(count_passed(attack, [FunctionCase('f', (41,), 42)] * 2))\n"
        "print(count_passed('def f(x): return x + 1', [FunctionCase('f', (41,), 42)] * 2))\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.split() == ["0", "2"]
