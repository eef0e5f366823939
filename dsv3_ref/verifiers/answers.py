r"""Comparison of final answers by value.

- An exact answer is compared exactly. A decimal number as the right answer has a tolerance: half a
  unit of its sixth decimal, or of its sixth significant digit if that is smaller.
- Lists and sets have no order; tuples, intervals and matrices have. `\pm` stands for two values.
- A name before the value may be left out (`x = 5`), and so may a currency, degrees and words after
  a number (`5 cm`); two different units are different. `%` divides by 100 or is a unit.
- Words are compared without case. If the right answer is a letter from A to J, the label counts:
  `(B)`, `B.` and `B: 12` are B.
- What cannot be compared as numbers or texts is parsed and compared by sympy (`math_verifier`).
"""

import re
from fractions import Fraction
from itertools import chain, product
from typing import NamedTuple

from dsv3_ref.verifiers.latex import normalize_answer, split_top_level, strip_brackets
from dsv3_ref.verifiers.math_verifier import (
    equations_equal,
    expressions_equal,
    limited_together,
)

MAX_CHARS = 1000  # of an answer; a longer one must be the same text
MAX_DEPTH = 20  # of its brackets
MAX_EXPONENT = 4000  # of a number that is compared here
SIGNIFICANT_DIGITS = 6  # of a decimal number as the right answer

GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")  # 1,000
SEPARATOR = re.compile(r"[,;]|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])")
COLON = re.compile(r":")
UNION = re.compile(r"\\cup(?![A-Za-z])")
RELATION = re.compile(r"\\(?:le|ge|ne|in|approx|equiv)(?![A-Za-z])|[<>=]")
CHOICE = re.compile(r"\(?\s*([A-J])\s*\)?[.:]?")
LABEL = re.compile(r"\(?\s*([A-Za-z])\s*(?:\)|\)?[.:](?!\d)|$)(.*)", re.DOTALL)
VARIABLE = re.compile(
    r"\\?[A-Za-z]+(?:_\{?\w+\}?)?'*(?:\s*\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])*\s*\))?"
)
MATRIX = re.compile(r"\\begin\{(\w*matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}", re.DOTALL)
OPAQUE = re.compile(r"\\[lcdv]?dots(?![a-z])|\.\.\.|…|\d\s*_")  # series, numbers to another base
WORD = re.compile(r"(?i)(?=[a-z]*[aeiou])[a-z]{2,}|[a-z]{4,}")
TRIGONOMETRIC = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
SHORT_UNITS = (
    "mm|cm|dm|km|mg|kg|lb|lbs|oz|ft|in|yd|mi|ml|mL|cl|dl|hr|hrs|min|ms|mph|kmh|Hz|kHz|kW|kPa|Pa|mol|"
    "am|pm|AM|PM"
)
UNIT = re.compile(
    r"(?P<value>.*[\d)}.])\s*(?P<unit>%|\^\\circ\s*[CF]?|"
    rf"(?:(?<=\s)[A-Za-z]{{3,}}|(?:{SHORT_UNITS})(?![A-Za-z])|(?<=\s)[mgshLlVWJNKACF](?![A-Za-z]))"
    r"(?:\s*(?:[/.-]\s*)?[A-Za-z]++|\s*\^\{-?\d\})*+)",
    re.DOTALL,
)
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
NOT_UNITS = re.compile(
    r"\b(?:or|and|not|to|by|than|but|minus|plus|times|over|under|point|half|dozen|negative)\b"
)
VALUE = r"(?P<decimal>\d+(?:\.\d*)?|\.\d+)"
EXPONENT = r"(?P<exponent>[+-]?\d+)"
INTEGERS = r"\s*\{\s*(?P<above>-?\d+)\s*\}\s*\{\s*(?P<below>-?\d+)\s*\}"
NUMBERS = [
    re.compile(rf"{VALUE}(?:[eE]{EXPONENT})?"),
    re.compile(rf"(?:{VALUE}\s*\\(?:times|cdot)\s*)?10\s*\^\s*\{{{EXPONENT}\}}"),
    re.compile(r"(?P<decimal>\d*\.\d*)\s*\\overline\s*\{?(?P<period>\d+)\}?"),
    re.compile(rf"(?:(?P<whole>\d+)\s*)?\\frac{INTEGERS}"),
    re.compile(r"(?:(?P<whole>\d+)\s+)?(?P<above>\d+)\s*/\s*(?P<below>-?\d+)"),
]


class Number(NamedTuple):
    """An exact value, and whether it was written as a decimal number."""

    value: Fraction
    is_decimal: bool


class Relation(NamedTuple):
    """The name on one side of an equation, "" if there is none, and its other sides.

    An inequality of a name is the equation of that name and an interval; other inequalities have
    no sides.
    """

    name: str
    sides: list[str]


def answers_equal(answer: str, truth: str) -> bool:
    """Return whether an answer has the value of the right one, by the rules of this module."""
    if " ".join(answer.split()) == " ".join(truth.split()):
        return bool(truth.strip())
    if max(len(answer), len(truth)) > MAX_CHARS:
        return False
    answer, truth = normalize_answer(answer), normalize_answer(truth)
    if max(bracket_depth(answer), bracket_depth(truth)) > MAX_DEPTH:
        return False
    with limited_together():
        return any(is_equal(*pair) for pair in product(readings(answer), readings(truth)))


def bracket_depth(text: str) -> int:
    """Return an upper bound of the depth of the brackets of a text."""
    return sum(text.count(opening) for opening in "([{")


def readings(text: str) -> list[str]:
    """Return a text without thousands separators; then as it is, if they may separate a list."""
    merged = GROUPED.sub(lambda match: match[0].replace(",", ""), text)
    is_list = any(",0" not in match[0] for match in GROUPED.finditer(text))
    return [merged, text] if is_list else [merged]


def compact(text: str) -> str:
    """Return a text without white space, except between letters or digits."""
    return re.sub(r"(?<![A-Za-z\d])\s+|\s+(?![A-Za-z\d])", "", text)


def is_equal(answer: str, truth: str) -> bool:
    """Return whether two normalized answers are equal."""
    if compact(answer) == compact(truth):
        return bool(compact(truth))
    for compare in (compare_texts, compare_relations, compare_collections, compare_quantities):
        verdict = compare(answer, truth)
        if verdict is not None:
            return verdict
    return expressions_equal(answer, truth)


# ── Texts ──


def compare_texts(answer: str, truth: str) -> bool | None:
    """Compare words and labels of choices; return None if neither answer is one."""
    if OPAQUE.search(answer) or OPAQUE.search(truth) or not answer or not truth:
        return False
    if choice := CHOICE.fullmatch(truth):
        label = LABEL.fullmatch(answer)
        is_hedged = label is None or re.search(r"(?<![A-Za-z])[A-J](?![A-Za-z])", label[2])
        return label is not None and not is_hedged and label[1].upper() == choice[1]
    if is_words(answer) or is_words(truth):
        return is_words(answer) and answer.casefold() == truth.casefold()
    return None


def is_words(text: str) -> bool:
    """Return whether a text consists of words, not of products of letters such as xy."""
    rest = re.sub(r"\b(?:and|or)\b", "", text)
    return bool(re.fullmatch(r"[A-Za-zÀ-ÿ\s'’.-]+", text) and WORD.search(rest))


# ── Relations ──


def compare_relations(answer: str, truth: str) -> bool | None:
    """Compare equations and inequalities, or one with a value; None if there is none."""
    relation, right = parse_relation(answer), parse_relation(truth)
    if relation is None and right is None:
        return None
    if relation is None:
        assert right is not None
        return bool(right.sides) and all(is_equal(answer, side) for side in right.sides)
    if right is None:
        return bool(relation.sides) and all(is_equal(side, truth) for side in relation.sides)
    if relation.name and relation.name == right.name:
        return all(is_equal(side, right.sides[-1]) for side in relation.sides)
    if {*RELATION.findall(answer), *RELATION.findall(truth)} != {"="}:
        return False
    return equations_equal(answer, truth)


def parse_relation(text: str) -> Relation | None:
    """Parse an equation or inequality; return None for another text, and for several of them."""
    parts, signs = split_top_level(text, RELATION)
    items = split_list(text)
    if not signs or (len(items) > 1 and all(RELATION.search(item) for item in items)):
        return None
    if set(signs) <= {"=", r"\approx", r"\equiv", r"\in"}:
        if len(parts) == 2 and VARIABLE.fullmatch(parts[1]) and not VARIABLE.fullmatch(parts[0]):
            parts.reverse()
        is_named = VARIABLE.fullmatch(parts[0]) is not None
        return Relation(compact(parts[0]), parts[1:]) if is_named else Relation("", parts)
    return parse_inequality(parts, signs) or Relation("", [])


def parse_inequality(parts: list[str], signs: list[str]) -> Relation | None:
    r"""Parse `x < b`, `a \le x` or `a < x \le b` as a name and its interval."""
    if all(sign in (">", r"\ge") for sign in signs):
        parts, signs = parts[::-1], [{">": "<", r"\ge": r"\le"}[sign] for sign in reversed(signs)]
    if not all(sign in ("<", r"\le") for sign in signs) or len(parts) > 3:
        return None
    if len(parts) == 2 and VARIABLE.fullmatch(parts[0]):
        parts, signs = [r"-\infty", *parts], ["<", *signs]
    elif len(parts) == 2:
        parts, signs = [*parts, r"\infty"], [*signs, "<"]
    below, name, above = parts
    if not VARIABLE.fullmatch(name):
        return None
    opening, closing = "(["[signs[0] != "<"], ")]"[signs[1] != "<"]
    return Relation(compact(name), [f"{opening}{below}, {above}{closing}"])


# ── Lists, sets, tuples, intervals, matrices ──


def compare_collections(answer: str, truth: str) -> bool | None:
    """Compare answers of several parts; return None if both have only one."""
    (kind, items), (right_kind, right) = parse_collection(answer), parse_collection(truth)
    if kind == right_kind == "one":
        return None if (items, right) == ([answer], [truth]) else is_equal(items[0], right[0])
    kinds = {kind, right_kind}
    if len(items) != len(right):
        return False
    if kinds <= {"list", "set", "one"} or kinds == {"union"}:
        return is_permutation(items, right)
    if len(kinds) > 1 and kinds != {"list", "()"}:
        return False
    return all(map(is_equal, items, right))


def is_permutation(items: list[str], right: list[str]) -> bool:
    """Return whether two lists are equal in any order; unnamed values are in that of the names."""
    names = [{r.name if r else "" for r in map(parse_relation, part)} for part in (items, right)]
    if {""} in names and max(map(len, names)) > 1:
        return all(map(is_equal, items, right))
    rest = list(items)
    for truth in right:
        match = next((i for i, item in enumerate(rest) if is_equal(item, truth)), None)
        if match is None:
            return False
        del rest[match]
    return True


def parse_collection(text: str) -> tuple[str, list[str]]:
    """Return the kind of an answer (one, list, set, union, ratio, matrix, brackets), its parts."""
    items = split_list(text)
    if len(items) > 1:
        return "list", items
    if matrix := MATRIX.fullmatch(text):
        rows = [row for row in re.split(r"\\\\|\\cr(?![a-z])", matrix[2]) if row.strip()]
        kind = "determinant" if matrix[1] == "vmatrix" else "matrix"
        return kind, [f"({row.replace('&', ',')})" for row in rows]
    for kind, separator in ("union", UNION), ("ratio", COLON):
        parts, signs = split_top_level(text, separator)
        if signs:
            return kind, parts
    opening, content, closing = strip_brackets(text)
    parts = split_list(content) if opening else [text]
    if opening == r"\{" or (opening == "{" and len(parts) > 1):
        return "set", parts
    if len(parts) == 1:
        return parse_collection(content) if opening in ("(", "{") else ("one", [text])
    return f"{opening}{closing}".replace(r"\langle", "(").replace(r"\rangle", ")"), parts


def split_list(text: str) -> list[str]:
    r"""Split a text at commas and words between its parts, with both values of `\pm`."""
    parts, _ = split_top_level(text, SEPARATOR)
    return list(chain.from_iterable(expand_signs(part) for part in parts if part))


def expand_signs(text: str) -> list[str]:
    r"""Return both values of a text with `\pm` or `\mp`, or the text."""
    if not re.search(r"\\[pm]m(?![a-z])|\\mp(?![a-z])", text):
        return [text]
    upper = re.sub(r"\\pm(?![a-z])", "+", re.sub(r"\\mp(?![a-z])", "-", text))
    lower = re.sub(r"\\pm(?![a-z])", "-", re.sub(r"\\mp(?![a-z])", "+", text))
    return [upper, lower]


# ── Numbers and units ──


def compare_quantities(answer: str, truth: str) -> bool | None:
    """Compare numbers, with units if there are any; return None if there are neither."""
    (value, unit), (right, right_unit) = split_unit(answer), split_unit(truth)
    if not unit and not right_unit and (value, right) != (answer, truth):
        return is_equal(value, right)
    if unit or right_unit:
        if unit and right_unit and unit != right_unit:
            return False
        if unit != right_unit and unit == "%":
            return is_equal(value, right) or is_equal(rf"\frac{{{value}}}{{100}}", right)
        if unit != right_unit and right_unit == "%":
            return is_equal(value, right) or is_equal(value, rf"\frac{{{right}}}{{100}}")
        return is_equal(value, right)
    number, right_number = parse_number(answer), parse_number(truth)
    if right_number is None:
        return None
    if number is None:
        return expressions_equal(answer, truth, decimals(right_number))
    places = decimals(right_number)
    if places is None:
        return number.value == right_number.value
    return abs(number.value - right_number.value) <= Fraction(1, 2 * 10**places)


def split_unit(text: str) -> tuple[str, str]:
    """Split `5 cm` into the value and the unit, which is "" if there is none."""
    match = UNIT.fullmatch(text)
    if not match or TRIGONOMETRIC.search(text) or NOT_UNITS.search(match["unit"]):
        return text, ""
    value, unit = match["value"].strip(), match["unit"]
    first, _, rest = unit.partition(" ")
    if first in SCALES:
        value, unit = rf"{value} \cdot 10^{{{SCALES[first]}}}", rest
    if unit.startswith(r"^\circ"):
        unit = "degree" + unit.removeprefix(r"^\circ").strip()
    return value, compact(unit).casefold().rstrip("s").rstrip(".")


def parse_number(text: str) -> Number | None:
    """Parse an integer, decimal, fraction or power of ten; return None for another text."""
    signs = re.match(r"[\s+-]*", text)
    assert signs is not None
    for pattern in NUMBERS:
        if match := pattern.fullmatch(text[signs.end() :].strip()):
            number = read_number(match.groupdict())
            negative = signs[0].count("-") % 2
            return Number(-number.value, number.is_decimal) if negative and number else number
    return None


def read_number(parts: dict[str, str | None]) -> Number | None:
    """Return the number whose parts a pattern of NUMBERS has found; None if it is too large."""
    exponent = int(parts.get("exponent") or 0)
    if abs(exponent) > MAX_EXPONENT or int(parts.get("below") or 1) == 0:
        return None
    decimal = parts.get("decimal") or ""
    value = Fraction(decimal.strip(".") and (decimal + "0" if "." in decimal else decimal) or 1)
    if parts.get("above"):
        value = Fraction(int(parts["above"] or 0), int(parts["below"] or 1))
        value += int(parts.get("whole") or 0)
    if period := parts.get("period"):
        places = len(decimal.partition(".")[2])
        start = Fraction(decimal + "0") if decimal.strip(".") else Fraction(0)
        value = start + Fraction(int(period), (10 ** len(period) - 1) * 10**places)
    return Number(value * Fraction(10) ** exponent, "." in decimal and not parts.get("period"))


def decimals(truth: Number) -> int | None:
    """Return the decimals to which an answer must be right; None if it must be exact."""
    if not truth.is_decimal:
        return None
    places, size = SIGNIFICANT_DIGITS, abs(truth.value)
    while size and size * 10 ** (places - SIGNIFICANT_DIGITS + 1) < 1:
        places += 1
    return places
