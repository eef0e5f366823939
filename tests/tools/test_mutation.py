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
        ("dsv3_ref/serve.py", ["tests/serving/test_serve.py"]),
    ],
)
def test_a_module_has_the_tests_named_after_it(path, tests):
    assert mutation.tests_of(path) == tests


def test_every_module_of_the_default_has_tests():
    assert [path for path in mutation.default_modules() if not mutation.tests_of(path)] == []


def test_each_place_is_changed_once():
    pytest.importorskip("cosmic_ray")
    code = "def f(a, b):\n    return a + b if a < 3 else True\n"
    places = mutation.places_of(code)
    changed = {mutation.mutate(code, *place) for place in places}
    assert code not in changed and len(changed) == len(places)
    assert {x for x in changed if "a - b" in x} and {x for x in changed if "a <= 3" in x}
    assert mutation.mutate(code, "core/AddNot", 99) is None


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
