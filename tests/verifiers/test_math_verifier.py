"""A mathematical answer is right only if it is exact, unless the right answer is a decimal."""

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_ref.verifiers.answers import answers_equal
from dsv3_ref.verifiers.math_verifier import MathVerifier, shared_verifier

INTEGERS = st.integers(-(10**6), 10**6) | st.integers(10**9, 10**30)


@pytest.mark.parametrize(
    ("answer", "truth", "is_equal"),
    [
        ("1000000500.0", "1000000007", False), ("1000000007.0000001", "1000000007", False),
        ("1000000007.0", "1000000007", True), ("1000000500", "1000000007.0", False),
        ("7.0000001", "7", False), ("7.00000000000000000000001", "7", False), ("7.0", "7", True),
        (r"7 + 10^{-20}", "7", False), (r"\sqrt{49 + 10^{-20}}", "7", False),
        (r"\frac{7.0000001}{1}", "7", False), ("x = 7.0000001", "7", False),
        ("0.0000001", "0", False), ("0", "0.0000001", False), ("-0.0", "0", True),
        ("0.333333", r"\frac{1}{3}", False), (r"\frac{1}{3}", "0.333333", True),
        (r"\frac{1}{3}", "0.333334", False), ("0.125", r"\frac{1}{8}", True),
        ("0.1 + 0.2", r"\frac{3}{10}", True), ("0.30000000000000004", r"\frac{3}{10}", False),
        ("3.14159265358979", r"\pi", False), ("1.4142136", r"\sqrt{2}", False),
        (r"\sqrt{2} + 10^{-20}", r"\sqrt{2}", False), (r"\sqrt{2} \sqrt{3}", r"\sqrt{6}", True),
        (r"\sqrt{2} + 10^{-200}", r"\sqrt{2}", False), ("2^{0.5}", r"\sqrt{2}", True),
        ("0.00000066", "0.00000065", False), ("0.00000065", "0.00000065", True),
        ("0", "0.00000000065", False), (r"\{0.333333, 1\}", r"\{\frac{1}{3}, 1\}", False),
        (r"\{0.5, 1\}", r"\{\frac{1}{2}, 1\}", True), ("[0.5, 1]", r"[\frac{1}{2}, 1]", True),
        ("[0.5000001, 1]", r"[\frac{1}{2}, 1]", False), ("x + 0.5", r"x + \frac{1}{2}", True),
        ("x + 0.5000000001", r"x + \frac{1}{2}", False), ("12.5\\%", r"\frac{1}{8}", True),
        ("10^{20} + 1", "10^{20}", False),
        ("100000000000000000001", "100000000000000000000", False),
        ("７", "8", False),
        ("７", "7", True), ("nan", "7", False), (r"\infty", "7", False), ("1/0", "7", False),
        ("true", "1", False), ("7, 7.0000001", "7", False), (r"7 \pm 0.0000001", "7", False),
        ("х", "x", False), ("7", r"\infty", False), ("7", r"1 - \infty", False),
        (r"\infty", r"\infty", True), (r"-\infty", r"\infty", False),
        ("[0, 7)", r"[0, \infty)", False), (r"[0, \infty)", r"[0, \infty)", True),
        (r"e^{i \pi} + 1 + \sqrt{2} i", r"i \sqrt{2}", True), ("7", r"\frac{1}{0}", False),
    ],
)  # fmt: skip
def test_answers_are_exact(answer, truth, is_equal):
    assert answers_equal(answer, truth) is is_equal


@pytest.mark.parametrize("truth", [r"\sqrt{2}", "7", "3.14", "0.5", r"2 \pi"])
def test_rounding_of_a_huge_zero_equals_no_number(truth):
    zero = r"\exp(1) \cdot \exp(-\sin(1)) - \exp(1 - \sin(1))"
    assert not answers_equal(rf"10^{{4000}} \cdot ({zero})", truth)
    assert not answers_equal(rf"10^{{120}} \cdot ({zero})", truth)


@settings(max_examples=15)
@given(INTEGERS, st.integers(1, 25), st.sampled_from([1, -1]))
def test_no_decimal_beside_an_integer_equals_it(truth, places, sign):
    beside = Fraction(truth) + sign * Fraction(1, 10**places)
    scaled = abs(beside.numerator * 10**places // beside.denominator)
    whole, part = divmod(scaled, 10**places)
    answer = f"{'-' if beside < 0 else ''}{whole}.{part:0{places}}"
    assert not answers_equal(answer, str(truth))
    assert answers_equal(f"{truth}.{'0' * places}", str(truth))


@settings(max_examples=15)
@given(INTEGERS, INTEGERS.filter(bool))
def test_integers_are_compared_as_integers(truth, difference):
    assert answers_equal(str(truth), str(truth))
    assert not answers_equal(str(truth + difference), str(truth))
    assert not answers_equal(f"{truth + difference}.0", str(truth))


@settings(max_examples=15)
@given(st.integers(1, 10**9), st.integers(-30, -1))
def test_a_decimal_answer_needs_six_digits_whatever_its_size(digits, exponent):
    number = Decimal(digits).scaleb(exponent)
    truth = f"{number:f}"
    assert answers_equal(f"{truth}0", truth)
    assert not answers_equal("0", truth)
    assert not answers_equal(f"{2 * number:f}", truth)
    assert not answers_equal(f"{number * Decimal('1.00002'):f}", truth)


def test_many_slow_parts_take_the_time_of_one(monkeypatch):
    """Each of nine pairs once took the whole time, and twice as much with separators."""
    assert answers_equal(r"\sqrt{4}", "2")  # the process is there
    monkeypatch.setattr(shared_verifier(), "seconds", 1.0)
    used: list[float] = []
    real = MathVerifier.ask

    def ask(self, *args):
        try:
            return real(self, *args)
        finally:
            used.append(self.seconds_used)

    monkeypatch.setattr(MathVerifier, "ask", ask)
    tower = "9^{9^{9^{%d}}}"
    truth = ", ".join(rf"\sqrt{{{n}}}" for n in (2, 3, 5))
    assert not answers_equal(", ".join(tower % n for n in (2, 3, 5)), truth)
    assert 1 <= sum(used) < 2
    monkeypatch.undo()
    assert answers_equal(truth, truth.replace(" ", "")) and answers_equal(r"\sqrt{4}", "2")
