"""Every rule of tools/style.py finds violations and accepts correct text."""

import pytest
import style


def violating_lines(rule: str, text: str, path: str = "dsv3_ref/training/loop.py") -> list[int]:
    """Return the lines of a text at which a rule finds a violation."""
    return [line for line, _ in style.RULES[rule](style.Source(path, text))]


def repeated(**modules: str) -> dict[str, list[int]]:
    """Return the lines with names that are defined twice, by module."""
    sources = [style.Source(f"dsv3_ref/{name}.py", text) for name, text in modules.items()]
    places = style.repeated_names(sources)
    return {path: [line for line, _ in lines] for path, lines in places.items()}


BAD = {
    "lambda": [
        "f = lambda x: x",
        "f: object = lambda x: x",
        "f, g = lambda x: x, lambda y: y",
        "if (f := lambda: 1)(): pass",
    ],
    "parallel": ["a, b, c = 1, 2, 3", "def f(self):\n    self.a, self.b, c = 1, 2, 3"],
    "conditional": ["f() if x else g()", "x and f()", "x or f()"],
    "comprehension": ["[x for y in z for x in y]", "f(x for y in z for x in y if x)"],
    "ceil": ["-(-a // b)", "n = 1 - -(-len(x) // (b + 1))"],
    "runtime-class": ["type('A', (B, C), {})"],
    "encoding": [
        "path.read_text()",
        "path.write_text('x', errors='replace')",
        "open('x')",
        "open('x', 'w')",
        "(folder / 'x').open('a')",
        "path.open(mode='r')",
    ],
    "local": ["found = []", "for told in x: pass", "[x for seen in x]", "kept, y = f()"],
    "letter": [
        "def f(c: Config): pass",
        "def f(x, c): pass",
        "def f(p: float): pass",
        "class A:\n    def __init__(self, t: Trainer): pass",
        "class A:\n    def f(self, *, d: Decoder | None): pass",
    ],
    "typed": [
        "def f(x) -> int: pass",
        "def f(x: int): pass",
        "def f(*args) -> None: pass",
        "class A:\n    def f(self, x) -> None: pass",
    ],
    "docstring": [
        "def f(): pass",
        "class A: pass",
        'def f(): """Of the whole model."""',
        'def f(): """What binds."""',
        'def f(): """In the thread."""',
        'def f(): """The mean loss."""',
        'def f(): """Returns the loss."""',
        'def f(): """Fitted to the page."""',
        'def f(): """Writing the page."""',
        'def f(): """(a, b) of the page."""',
        'def f(): """Return the loss"""',
        'class A: """Whether it holds."""',
        'class A:\n    """A loss."""\n    def f(self): """That of the loss."""',
    ],
    "spelling": [
        "# a colour", "normalise = 1", "Tokenised = 1", "def f(): 'neighbouring'", "GREY = 1",
        "# dequantised", "# re-initialisation of behaviour",
    ],
    "phrase": ["# bytes a token", "# it starts anew", "# this is no error", "# nobody reads it"],
}  # fmt: skip
GOOD = {
    "lambda": ["sorted(x, key=lambda y: y)", "d = dict(f=lambda x: x)", "self.f = lambda: 1"],
    "parallel": ["a, b = 1, 2", "a, b, c = f()", "a, b, c = (f(x) for x in y)", "t = 1, 2, 3"],
    "conditional": ["x = f() if y else 1", "if x:\n    f()", "f(x and y)"],
    "comprehension": ["[x for x in y]", "[[z for z in x] for x in y]"],
    "ceil": ["a // b", "-(a // b)", "-(-a / b)"],
    "runtime-class": ["type(x)", "type(self)(1, 2)"],
    "encoding": [
        "path.read_text(encoding='utf-8')",
        "open('x', 'rb')",
        "path.open('wb')",
        "os.open('x', os.O_RDONLY)",
        "path.open(**how)",
        "path.read_bytes()",
    ],
    "local": ["results = []", "f(seen=1)", "self.kept = 1", "def f(asked): pass"],
    "letter": [
        "def f(x, _): pass",
        "def f(n: int, w: Tensor | None = None): pass",
        "def _f(c): pass",
        "def f(config: Config):\n    def g(c): pass",
        "@triton.jit\ndef f(p): pass",
    ],
    "typed": [
        "def f(x: int) -> None: pass",
        "def _f(x): pass",
        "class A:\n    def __init__(self, x): pass",
        "class A:\n    @staticmethod\n    def f(x: int) -> int: pass",
        "@triton.jit\ndef f(p): pass",
    ],
    "docstring": [
        'def f(): """Return the mean loss."""',
        'def f(): """Pass x on."""',
        'def f(): """Embed tokens: x = E[t].\n\n    Shapes follow\n    """',
        'class A: """Tokens of a document."""',
        'class A:\n    """A loss."""\n    @property\n    def f(self): """The loss."""',
        "def _f(): pass",
        'class A:\n    """A layer."""\n    def forward(self, x): pass',
        'def f():\n    """Return f."""\n    def g(): pass',
        '@impl("norm", "naive")\ndef norm(): pass',
    ],
    "spelling": ["# a color", "x = otherwise", "# a promise, precise exercises", "# four hours"],
    "phrase": ["# bytes per token", "# there is no error", "# it is no longer there"],
}


def cases(texts_by_rule: dict[str, list[str]]) -> list[tuple[str, str]]:
    """Return (rule, text) of all texts."""
    pairs = []
    for rule, texts in texts_by_rule.items():
        pairs += [(rule, text) for text in texts]
    return pairs


@pytest.mark.parametrize(("rule", "text"), cases(BAD))
def test_violations_are_found(rule, text):
    assert len(violating_lines(rule, text)) >= 1


@pytest.mark.parametrize(("rule", "text"), cases(GOOD))
def test_correct_text_passes(rule, text):
    assert violating_lines(rule, text) == []


def test_every_rule_has_examples_of_both_kinds():
    assert set(BAD) == set(GOOD) == set(style.RULES)


def test_a_violation_is_reported_with_its_line():
    source = style.Source("tests/test_x.py", "x = 1\n\nf = lambda: 1\n")
    assert style.check([source]) == [("tests/test_x.py", 3, "lambda", "a named lambda: write def")]


def test_a_name_belongs_to_one_module():
    assert repeated(a="x = 1\n\ndef f(): pass", b="def f(): pass") == {
        "dsv3_ref/a.py": [3],
        "dsv3_ref/b.py": [1],
    }


@pytest.mark.parametrize("text", ["_f = 1", "def main(): pass", "@impl('f', 'cpu')\ndef f(): pass"])
def test_names_that_modules_may_share(text):
    name = "main" if "main" in text else "_f" if "_f" in text else "f"
    assert repeated(a=f"def {name}(): pass", b=text) == {}


def test_an_imported_name_is_not_a_second_definition():
    assert repeated(a="def f(): pass", b="from dsv3_ref.a import f") == {}


def test_docstrings_of_a_chapter_count_where_cells_are_exported():
    text = "# %%\n#| export\ndef f():\n    pass\n\n# %%\ndef g():\n    pass\n"
    assert violating_lines("docstring", text, "notebooks/01_x.py") == [3]
    assert violating_lines("docstring", text, "tests/test_x.py") == []


def test_a_generated_module_is_checked_in_its_chapter():
    text = '"""X.\n\nGenerated by tools/export.py from notebooks/01_x.py.\n"""\nf = lambda: 1\n'
    assert style.check([style.Source("dsv3_ref/x.py", text)]) == []


def test_the_log_is_exempt():
    assert violating_lines("spelling", "# a colour", "LOG.md") == []
