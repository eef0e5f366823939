"""The smoke check notices wrong, unequal and failing results."""

import interpreter  # isort: skip  # noqa: F401  first: makes Triton's interpreter round as a GPU does
import json

import pytest
import torch

from dsv3_ref.kernels.bench import calls, smoke
from dsv3_ref.kernels.bench.case import Case

X = torch.arange(1.0, 5)


def make_case(name: str, call, expected=lambda: X) -> Case:
    return Case(name, {}, lambda: (call, {"expected": expected}), 16)


def broken():
    raise RuntimeError("no\nmore")


@pytest.mark.parametrize(
    "call, error",
    [
        (lambda: X.clone(), ""),
        (lambda: X * 1.01, ""),
        (lambda: X * 1.1, "wrong by 0.1, more than 0.02 of the yardstick"),
        (lambda: X * float("nan"), "wrong by nan, more than 0.02 of the yardstick"),
        (lambda: X + 1e-3 * torch.rand(4), "two calls differ"),
        (broken, "RuntimeError: no\nmore"),
    ],
)
def test_a_check_says_what_is_wrong(call, error, monkeypatch):
    monkeypatch.setattr(calls, "KERNEL_BACKENDS", ("torch",))
    assert smoke.check_case(make_case("a", call), "cpu").error == error


def test_all_kinds_are_checked_and_one_fault_fails(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(calls, "KERNEL_BACKENDS", ("torch",))
    cases = [make_case("a", lambda: X), make_case("b", broken), make_case("a", broken)]
    monkeypatch.setattr(smoke, "all_cases", lambda divisor: cases)
    arguments = ["--device", "cpu", "--out", str(tmp_path / "new" / "smoke.json")]
    assert smoke.main(arguments) == 1
    rows = json.loads((tmp_path / "new" / "smoke.json").read_text())
    errors = {row["name"]: row["error"] for row in rows}
    assert list(errors.items()) == [("a", ""), ("b", "RuntimeError: no\nmore")]
    assert capsys.readouterr().out.splitlines()[1].endswith("RuntimeError: no")
    assert smoke.main([*arguments, "--only", "a"]) == 0
