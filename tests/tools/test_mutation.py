"""The mutation check: which tests a module has, which changes are made, how they are counted."""

import json

import mutation
import pytest


@pytest.mark.parametrize(
    "path, tests",
    [
        ("dsv3_ref/rope.py", ["tests/test_rope.py", "tests/test_mla.py", "tests/test_ops.py"]),
        ("dsv3_ref/optim.py", ["tests/test_pretrain.py"]),
        ("dsv3_ref/data/dedup.py", ["tests/data/test_dedup.py"]),
        ("dsv3_ref/parallel/physical_experts.py", ["tests/test_eplb.py"]),
        ("dsv3_ref/grpo.py", ["tests/test_grpo.py", "tests/posttraining/test_rl.py"]),
    ],
)
def test_a_module_has_the_tests_named_after_it(path, tests):
    assert mutation.tests_of(path) == tests


def test_every_module_of_the_default_has_tests():
    assert [path for path in mutation.default_modules() if not mutation.tests_of(path)] == []


@pytest.mark.parametrize("path", mutation.EXTRA_TESTS)
def test_the_chosen_tests_of_a_module_exist(path):
    found = {}
    for test in mutation.tests_of(path):
        file = mutation.ROOT / mutation.file_of(test)
        found[test.replace(mutation.file_of(test), file.stem)] = file.read_text()
    assert set(mutation.EXTRA_TESTS[path]) <= set(found)
    names = [(test.partition("::")[2], text) for test, text in found.items()]
    assert all(f"def {name}(" in text for name, text in names if name)


def mutant(line: int) -> mutation.Mutant:
    return mutation.Mutant("dsv3_ref/a.py", "core/AddNot", 0, line, "", "")


def test_a_mutant_gets_the_tests_that_call_its_function_the_quickest_first():
    def row(seconds: float, *calls: tuple[str, int, int], processes: bool = False) -> dict:
        return {"seconds": seconds, "calls": [list(call) for call in calls], "processes": processes}

    f, g = ("dsv3_ref/a.py", 3, 9), ("dsv3_ref/a.py", 5, 6)
    other = ("dsv3_ref/b.py", 1, 99)
    rows = {
        "x.py::slow": row(5.0, f, g),
        "x.py::quick": row(2.0, f, other),
        "y.py::f": row(1.0, f),
        "y.py::b": row(0.1, other),
        "y.py::gang": row(0.2, processes=True),
    }
    slow, quick, y_f, y_b, gang = rows
    assert mutation.tests_for(mutant(4), rows) == [y_f, gang, quick, slow]
    assert mutation.tests_for(mutant(6), rows) == [y_f, gang, quick, slow]
    assert mutation.tests_for(mutant(20), rows) == [y_b, y_f, gang, quick, slow]  # of no function
    only_g = {name: rows[name] for name in (slow, y_b, gang)}
    assert mutation.tests_for(mutant(5), only_g) == [gang, slow]


def test_calls_are_recorded_by_test_and_those_of_fixtures_for_their_file(tmp_path):
    pytest.importorskip("cosmic_ray")
    for folder in ("dsv3_ref", "tests"):
        (tmp_path / folder).mkdir()
    (tmp_path / "dsv3_ref" / "__init__.py").touch()
    (tmp_path / "dsv3_ref" / "a.py").write_text(
        "def f(x):\n    return (\n        x + 1)\n\n\ndef g():\n    return 2\n"
    )
    (tmp_path / "tests" / "test_a.py").write_text(
        "import pytest\nfrom dsv3_ref.a import f, g\n\n"
        "@pytest.fixture(scope='module')\ndef two():\n    return g()\n\n"
        "def test_f():\n    assert f(1) == 2\n\ndef test_g(two):\n    assert two == 2\n"
    )
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    copy = mutation.Copy.__new__(mutation.Copy)
    copy.folder, copy.process = tmp_path, None
    path, code = "dsv3_ref/a.py", (tmp_path / "dsv3_ref" / "a.py").read_text()
    copy.start(["tests/test_a.py"])
    assert copy.run(path, code, ["tests/test_a.py"], 60, is_traced=True).kind == "survived"
    rows = copy.report()["rows"]
    f, g = ["dsv3_ref/a.py", 1, 3], ["dsv3_ref/a.py", 6, 7]
    assert sorted(rows["tests/test_a.py::test_f"]["calls"]) == [f, g]
    assert rows["tests/test_a.py::test_g"]["calls"] == [g]
    changed = code.replace("x + 1", "x - 1")
    assert copy.is_local(path, changed) and not copy.is_local(path, "X = 1\n" + code)
    chosen = ["tests/test_a.py::test_g", "tests/test_a.py::test_f"]
    for run in (copy.run, copy.run_afresh):
        killed = run(path, changed, ["tests/test_a.py"], 60, chosen)
        assert killed[::2] == ("killed", "tests/test_a.py::test_f")
        survived = run(path, changed, ["tests/test_a.py"], 60, chosen[:1])
        assert survived.kind == "survived"
        assert (tmp_path / "dsv3_ref" / "a.py").read_text() == code
    endless = code.replace("return 2", "while 2: pass")
    assert copy.run(path, endless, ["tests/test_a.py"], 2, chosen[:1]).kind == "timeout"
    assert copy.run(path, code, ["tests/test_a.py"], 60).kind == "survived"
    copy.stop()


def test_code_is_replaced_function_by_function():
    code = "def f(x):\n    def g(y):\n        return x + y\n    return [lambda: 1, lambda: 2, g]\n"
    old = compile(code, "a.py", "exec")
    assert mutation.changed_functions(old, compile(code, "a.py", "exec")) == {}
    assert mutation.changed_functions(old, compile(code + "x = 2", "a.py", "exec")) is None
    default = code.replace("f(x)", "f(x=1)")
    assert mutation.changed_functions(old, compile(default, "a.py", "exec")) is None
    names: dict = {}
    exec(old, names)
    one, two, g = names["f"](10)
    functions = [names["f"], one, two, g, names["f"]]
    for before, after in (("x + y", "x - y"), ("lambda: 2", "lambda: 3")):
        new = compile(code.replace(before, after), "a.py", "exec")
        changed = mutation.changed_functions(old, new)
        mutation.replace_functions(functions, "b.py", changed)
        mutation.replace_functions(functions, "a.py", changed)
        code, old = code.replace(before, after), new
    assert (one(), two(), g(1)) == (1, 3, 9)
    assert [function() for function in names["f"](0)[:2]] == [1, 3]


def test_each_place_is_changed_once():
    pytest.importorskip("cosmic_ray")
    code = "def f(a, b):\n    return a + b if a < 3 else True\n"
    places = mutation.places_of(code)
    changed = {mutation.mutate(code, *place) for place in places}
    assert code not in changed and len(changed) == len(places)
    assert {x for x in changed if "a - b" in x} and {x for x in changed if "a <= 3" in x}
    assert mutation.mutate(code, "core/AddNot", 99) is None


def test_the_stars_of_a_dict_are_no_power(tmp_path, monkeypatch):
    pytest.importorskip("cosmic_ray")
    monkeypatch.setattr(mutation, "ROOT", tmp_path)
    (tmp_path / "a.py").write_text("def f(a, b):\n    return {**a, 'x': b**2}\n")
    found = {mutant.after for mutant in mutation.draw("a.py", 0, 1)}
    assert "return {**a, 'x': b*2}" in found
    assert all("{**a" in text for text in found)


def test_equivalent_mutants_do_not_count(tmp_path, monkeypatch):
    known = [{"path": "a.py", "before": "x = 1", "after": "x = 2", "reason": "only speed"}]
    (tmp_path / "known.json").write_text(json.dumps(known))
    monkeypatch.setattr(mutation, "EQUIVALENT", tmp_path / "known.json")
    row = {"path": "a.py", "line": 3, "before": "x = 1", "after": "x = 2", "outcome": "survived"}
    rows = [row, row | {"after": "x = 0"}, row | {"after": "x = 5", "outcome": "killed"}]
    text, share = mutation.summarize(rows)
    assert share == 0.5
    assert "x = 0" in text and "x = 2" not in text
    assert text.endswith("3 mutants, 1 equivalent, 1 of 2 killed: 50.0%")
