"""LaTeX, plain notation and Unicode of a final answer in one normal form."""

import re
import unicodedata
from collections.abc import Callable

CHARACTERS = str.maketrans({
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "﹣": "-", "×": r"\times ", "·": r"\cdot ",
    "⋅": r"\cdot ", "÷": "/", "∕": "/", "√": r"\sqrt ", "π": r"\pi ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∓": r"\mp ", "°": r"^\circ ",
    "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "∈": r"\in ", "，": ",", "％": "%",
})  # fmt: skip
REPLACEMENTS: dict[str, str | Callable[[re.Match[str]], str]] = {  # in this order
    r"\\\\(?:\[[\d.]+[a-z]{2}\])?": r"\\cr ",  # the end of a row, before `\\ ` is read as a space
    r",\s*\\!\s*": ",",  # thousands
    r"\\[!]|\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle)(?![A-Za-z])\.?": "",
    r"\{,\}": ",",
    r"(?<=\d)(?:\\[,;: ]|~)(?=\d{3}(?!\d))": ",",  # thousands
    r"\\[,;: ]|~|\\q?quad(?![A-Za-z])|\s+": " ",
    r"\\(?:lbrace|rbrace)(?![A-Za-z])": lambda m: r"\{" if m[0] == r"\lbrace" else r"\}",
    r"\\[dtc]frac": r"\\frac",
    r"\\(?:le|ge|ne)q(?:slant)?(?![A-Za-z])": lambda m: m[0][:3],
    r"<=": r"\\le ", r">=": r"\\ge ", r"!=": r"\\ne ",
    r"\\(?:varnothing|emptyset)(?![A-Za-z])": r"\\{\\}",
    r"\\(?:land|lor)(?![A-Za-z])": lambda m: " and " if m[0] == r"\land" else " or ",
    r"\\%|(?i:\b(?:per ?cent(?:age)?|pct)\b)": "%",
    r"\\?\$|[€£¥]": "",  # of money, or around formulas
    r"^\s*\*\*(.*)\*\*\s*$": r"\1",  # bold in Markdown
    r"\*\*": "^",
    r"\*": r"\\cdot ",
    r"([\^_])\s*(-?\d+)": r"\1{\2}",
    r"\^\s*\{\s*\\circ\s*\}|\\degree(?![A-Za-z])": r"^\\circ",
    r"\^\s*\\circ": r"^\\circ ",
    r"\{\s*(-?\w+)\s*\\over\s*(-?\w+)\s*\}": r"\\frac{\1}{\2}",
    r"\\frac\s*([0-9A-Za-z])": r"\\frac{\1}",
    r"(\\frac\{[^{}]*\})\s*([0-9A-Za-z])": r"\1{\2}",
    r"\\sqrt\s*([0-9A-Za-z])": r"\\sqrt{\1}",
}  # fmt: skip
TEXT_COMMANDS = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt|normal)|[mhf]box|operatorname|"
    r"boldsymbol|bm|emph|underline|boxed)\s*\{"
)
FUNCTIONS = (
    "sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|log|ln|exp|sqrt|pi|min|max|gcd|lcm"
)
BARE_FUNCTION = re.compile(rf"(?<![\\A-Za-z])(?:{FUNCTIONS})(?![A-Za-z])")
OPENING = {"(": ")", "[": "]", "{": "}", r"\{": r"\}", r"\langle": r"\rangle"}
BRACKETS = re.compile(r"\\[{}]|\\[lr]angle(?![A-Za-z])|\\.|[()\[\]{}]", re.DOTALL)


def normalize_answer(text: str) -> str:
    """Return an answer with one notation for what Markdown, LaTeX and Unicode write in many."""
    text = translate_unicode(text)
    for delimiters in (r"\\[()\[\]](?=\s|$)", r"^\s*\\[(\[]"):
        text = re.sub(delimiters, "", text)
    text = unwrap_texts(text)
    for pattern, replacement in REPLACEMENTS.items():
        text = re.sub(pattern, replacement, text)
    text = BARE_FUNCTION.sub(r"\\\g<0>", text)
    return root_braces(text).strip().rstrip(".;,").strip()


def translate_unicode(text: str) -> str:
    """Return a text with digits, signs, fractions and powers of Unicode in ASCII and LaTeX."""
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda m: f"^{{{unicodedata.normalize('NFKC', m[0])}}}", text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉₊₋ₙ]+", lambda m: f"_{{{unicodedata.normalize('NFKC', m[0])}}}", text)
    chars = []
    for char in text:
        kind = unicodedata.decomposition(char).partition(" ")[0]
        if kind == "<fraction>":
            above, _, below = unicodedata.normalize("NFKC", char).partition("⁄")
            chars.append(rf"\frac{{{above}}}{{{below}}}")
        elif kind in ("<wide>", "<narrow>", "<font>"):
            chars.append(unicodedata.normalize("NFKC", char))
        else:
            chars.append(str(unicodedata.decimal(char, char)))
    return "".join(chars).translate(CHARACTERS)


def closing_index(text: str, start: int) -> int:
    """Return the index after the bracket that closes the one at `start`; 0 if none does."""
    depth = 0
    for match in BRACKETS.finditer(text, start):
        opens = match[0] in OPENING
        depth += opens - (match[0] in (")", "]", "}", r"\}", r"\rangle"))
        if depth <= 0:
            return match.end()
    return 0


def unwrap_texts(text: str) -> str:
    r"""Replace `\text{…}`, `\mathbf{…}`, `\boxed{…}` and the like by what they contain."""
    while match := TEXT_COMMANDS.search(text):
        end = closing_index(text, match.end() - 1)
        if not end:
            return text
        text = f"{text[: match.start()]} {text[match.end() : end - 1]} {text[end:]}"
    return text


def root_braces(text: str) -> str:
    r"""Write `\sqrt(…)` as `\sqrt{…}`."""
    while match := re.search(r"\\sqrt\s*\(", text):
        end = closing_index(text, match.end() - 1)
        if not end:
            return text
        text = rf"{text[: match.start()]}\sqrt{{{text[match.end() : end - 1]}}}{text[end:]}"
    return text


def split_top_level(text: str, separator: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """Split a text at the matches of a pattern outside of brackets; return parts and matches."""
    covered = bytearray(len(text) + 1)
    for bracket in BRACKETS.finditer(text):
        if bracket[0] in OPENING and not covered[bracket.start()]:
            end = closing_index(text, bracket.start()) or len(text)
            covered[bracket.start() : end] = b"1" * (end - bracket.start())
    matches = [m for m in separator.finditer(text) if not covered[m.start()]]
    starts = [0, *(m.end() for m in matches)]
    ends = [*(m.start() for m in matches), len(text)]
    parts = [text[start:end].strip() for start, end in zip(starts, ends)]
    return parts, [m[0] for m in matches]


def strip_brackets(text: str) -> tuple[str, str, str]:
    """Split a text that is one bracket into (opening, content, closing); "" if it is none."""
    match = BRACKETS.match(text)
    if match and match[0] in OPENING and closing_index(text, 0) == len(text):
        closing = next((c for c in (r"\}", r"\rangle") if text.endswith(c)), text[-1])
        return match[0], text[match.end() : -len(closing)].strip(), closing
    return "", text, ""
