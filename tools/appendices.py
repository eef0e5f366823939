"""Appendices of the book, made from the sources: index, sections of the report, API reference.

A chapter is represented by its headings: the citations below each and the definitions of its
`#| export` cells. A file is represented by its definitions: its `@op`s, `@impl`s and citations.
"""

import ast
import re
import sys
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
from export import EXPORT

REPORT = """
§1 Introduction
§2 Architecture
§2.1 Basic architecture
§2.1.1 Multi-head latent attention
    eq. 1 the latent of keys and values
    eq. 2 keys of all heads from the latent
    eq. 3 the rotary key that all heads share
    eq. 4 a key: its two parts joined
    eq. 5 values of all heads from the latent
    eq. 6 the latent of queries
    eq. 7 queries of all heads from their latent
    eq. 8 rotary queries
    eq. 9 a query: its two parts joined
    eq. 10 attention
    eq. 11 the heads' outputs joined
§2.1.2 DeepSeekMoE with auxiliary-loss-free load balancing
    eq. 12 shared and chosen experts, added up
    eq. 13 weights that sum to one
    eq. 14 the top k by affinity
    eq. 15 affinity of a token and an expert
    eq. 16 the top k by affinity plus bias
    eq. 17 the sequence-wise balance loss
    eq. 18 share of tokens that chose an expert
    eq. 19 affinities that sum to one
    eq. 20 mean affinity of an expert
§2.2 Multi-token prediction
    eq. 21 hidden state and next token, brought together
    eq. 22 one Transformer block for each depth
    eq. 23 the shared head
    eq. 24 the loss of a depth
    eq. 25 the mean over depths
§3 Infrastructures
§3.1 Compute clusters
§3.2 Training framework
§3.2.1 DualPipe and computation-communication overlap
§3.2.2 Efficient implementation of cross-node all-to-all communication
§3.2.3 Extremely memory saving with minimal overhead
§3.3 FP8 training
§3.3.1 Mixed precision framework
§3.3.2 Improved precision from quantization and multiplication
§3.3.3 Low-precision storage and communication
§3.4 Inference and deployment
§3.4.1 Prefilling
§3.4.2 Decoding
§3.5 Suggestions on hardware design
§3.5.1 Communication hardware
§3.5.2 Compute hardware
§4 Pre-training
§4.1 Data construction
§4.2 Hyper-parameters
§4.3 Long context extension
§4.4 Evaluations
§4.4.1 Evaluation benchmarks
§4.4.2 Evaluation results
§4.5 Discussion
§4.5.1 Ablation studies for multi-token prediction
§4.5.2 Ablation studies for the auxiliary-loss-free balancing strategy
§4.5.3 Batch-wise load balance vs. sequence-wise load balance
§5 Post-training
§5.1 Supervised fine-tuning
§5.2 Reinforcement learning
§5.2.1 Reward model
§5.2.2 Group relative policy optimization
    eq. 26 the objective
    eq. 27 distance from the reference
    eq. 28 advantage within a group
§5.3 Evaluations
§5.3.1 Evaluation settings
§5.3.2 Standard evaluation
§5.3.3 Open-ended evaluation
§5.3.4 DeepSeek-V3 as a generative reward model
§5.4 Discussion
§5.4.1 Distillation from DeepSeek-R1
§5.4.2 Self-rewarding
§5.4.3 Multi-token prediction evaluation
§6 Conclusion, limitations, and future directions
App. A Contributions and acknowledgments
App. B Ablation studies for low-precision training
App. B.1 FP8 v.s. BF16 training
App. B.2 Discussion about block-wise quantization
App. C Expert specialization patterns of the 16B aux-loss-based and aux-loss-free models
"""
TITLES = dict(re.findall(r"(§[\d.]+|(?:App|eq)\. \S+) (.*)", REPORT))  # in the report's order

SECTION = re.compile(r"§(\d(?:\.\d+)*)")
APPENDIX = re.compile(r"\bApp(?:endix|\.) ([A-C](?:\.\d)?)")
NUMBERS = r"(\d+(?:(?:–|, | and )\d+)*)"
EQUATION = re.compile(rf"(?<!DeepSeekMath's )\beq\. {NUMBERS}|\\(?:tag\{{|text\{{\(){NUMBERS}")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#{1,4} (.+)$", re.MULTILINE)


# ── What a text cites ──


def numbers(text: str) -> list[int]:
    """Return the numbers in a text such as `4, 8 and 10–12`, with every range written out."""
    listed: list[int] = []
    for part in re.split(r", | and ", text):
        ends = [int(x) for x in part.split("–")]
        listed += range(ends[0], ends[-1] + 1)
    return listed


def cited(text: str) -> list[str]:
    """Return the sections, appendices and equations that a text cites, once each, sorted."""
    keys = [f"§{x}" for x in SECTION.findall(text)]
    keys += [f"App. {x}" for x in APPENDIX.findall(text)]
    for plain, tagged in EQUATION.findall(text):
        keys += [f"eq. {i}" for i in numbers(plain or tagged)]
    order = list(TITLES)
    return sorted(set(keys), key=lambda x: order.index(x) if x in TITLES else len(order))


# ── Chapters ──


class Head(NamedTuple):
    """A heading of a chapter: its anchor, its citations, (module, name) of its exports."""

    title: str
    slug: str
    cites: list[str]
    exports: list[tuple[str, str]]


class Chapter(NamedTuple):
    """A chapter of the book, represented by its headings."""

    path: str  # from the root of the repository
    title: str
    heads: list[Head]
    links: list[str]  # files of kernels/ that its text links to

    @property
    def short_title(self) -> str:
        """The title without its explanation: `03 · MLA`."""
        return self.title.split(": ")[0]

    def link(self, head: Head | None = None) -> str:
        """Return a Markdown link to a heading, or to the chapter."""
        if head in (None, self.heads[0]):
            return f"[{self.short_title}]({self.path})"
        return f"[{self.title[:2]} · {head.title}]({self.path}#{head.slug})"

    def modules(self) -> list[str]:
        """Return the files that the chapter exports to, in order."""
        exports = chain.from_iterable(head.exports for head in self.heads)
        return list(dict.fromkeys(f"dsv3_ref/{module}.py" for module, _ in exports))


def slug(title: str, taken: list[str]) -> str:
    """Return GitHub's anchor of a heading; the second of two equal ones ends in `-1`."""
    plain = re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
    again = (f"{plain}-{i}" for i in range(1, 99))
    return next(x for x in (plain, *again) if x not in taken)


def exported(source: str, stem: str) -> list[tuple[str, str]]:
    """Return (module, name) of the definitions in an `#| export` cell; [] for other cells."""
    if not (mark := EXPORT.match(source)):
        return []
    module = mark[1] or re.sub(r"^\d+_", "", stem)
    return [(module, x.name) for x in definitions(ast.parse(source[mark.end() :])) if x.top]


def read_chapter(root: Path, path: Path) -> Chapter:
    """Read an executed chapter."""
    heads: list[Head] = []
    links: list[str] = []
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type != "markdown":
            heads[-1].exports.extend(exported(cell.source, path.stem))
            continue
        links += re.findall(r"\]\(\.\./(kernels/\w+\.py)", cell.source)
        before, *parts = HEADING.split(FENCE.sub("", cell.source))
        if heads:
            heads[-1].cites.extend(cited(before))
        for title, text in zip(parts[::2], parts[1::2]):
            heads.append(Head(title, slug(title, [h.slug for h in heads]), cited(text), []))
    return Chapter(str(path.relative_to(root)), heads[0].title, heads, links)


class Book(NamedTuple):
    """The chapters, modules and README of a repository."""

    root: Path
    chapters: list[Chapter]
    modules: list["Module"]  # package and kernels; exported modules come first
    readme: str

    def readme_row(self, chapter: Chapter) -> dict[str, str]:
        """Return the README's row of a chapter, with empty cells if there is none."""
        table_rows = rows(self.readme, "notebook")
        of_chapter = [row for row in table_rows if f"({chapter.path})" in row["notebook"]]
        return of_chapter[0] if of_chapter else {"notebook": "", "report": "", "tests": ""}


def read_book(root: Path) -> Book:
    """Read the chapters, modules and README of a repository."""
    chapters = [read_chapter(root, p) for p in sorted(root.glob("notebooks/[0-9]*.ipynb"))]
    exported_to = list(chain.from_iterable(c.modules() for c in chapters))
    every = [*root.glob("dsv3_ref/**/*.py"), *root.glob("kernels/**/*.py")]
    names = sorted(str(p.relative_to(root)) for p in every)
    modules = [read_module(root, x) for x in dict.fromkeys([*exported_to, *names])]
    return Book(root, chapters, modules, (root / "README.md").read_text(encoding="utf-8"))


# ── Python files ──


class Definition(NamedTuple):
    """A function, class or constant of a module, with its lines and decorators."""

    name: str
    first: int
    line: int
    last: int
    top: bool
    marks: tuple[tuple[str, ...], ...]  # its decorators: ("op",), ("impl", name, backend)


def short_path(file: str) -> str:
    """Return a path relative to the package."""
    return file.removeprefix("dsv3_ref/")


class Place(NamedTuple):
    """A line of a file and the name defined there."""

    file: str
    line: int
    name: str

    @property
    def link(self) -> str:
        """A Markdown link to the line."""
        return f"[`{self.name}`, {short_path(self.file)}:{self.line}]({self.file}#L{self.line})"


class Module(NamedTuple):
    """A Python file, represented by its definitions."""

    file: str  # from the root of the repository
    lines: list[str]
    summary: str  # the first paragraph of its docstring
    start: int  # the last line of its docstring
    definitions: list[Definition]

    def places(self, name: str) -> list[Place]:
        """Return the places where a name is defined."""
        return [Place(self.file, x.line, name) for x in self.definitions if x.name == name]


def parse_decorator(decorator: ast.expr) -> tuple[str, ...]:
    """Split a decorator into words: ("impl", "norm", "naive") for `@impl("norm", "naive")`."""
    call = decorator if isinstance(decorator, ast.Call) else None
    name = ast.unparse(call.func if call else decorator)
    return (name, *(str(getattr(a, "value", "")) for a in (call.args if call else ())))


def qualified_name(node: Any, marks: tuple[tuple[str, ...], ...]) -> str:
    """Return a function's name, or `attention (naive)` for an implementation called `_`."""
    impls = [m for m in marks if m[0] == "impl"]
    return f"{impls[0][1]} ({impls[0][2]})" if node.name == "_" and impls else node.name


def definitions(
    tree: ast.Module | ast.FunctionDef | ast.ClassDef, prefix: str = ""
) -> list[Definition]:
    """Return the functions, classes, methods and constants of a module."""
    defined = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            marks = tuple(parse_decorator(d) for d in node.decorator_list)
            name = prefix + qualified_name(node, marks)
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            defined += [Definition(name, first, node.lineno, node.end_lineno, not prefix, marks)]
            defined += definitions(node, f"{name}.")
        elif isinstance(node, ast.Assign | ast.AnnAssign) and not prefix:
            name = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
            defined += [Definition(name, node.lineno, node.lineno, node.end_lineno, True, ())]
    return defined


def read_module(root: Path, file: str) -> Module:
    """Read a Python file."""
    text = (root / file).read_text(encoding="utf-8")
    tree = ast.parse(text)
    docstring = ast.get_docstring(tree) or ""
    summary = " ".join(docstring.split("\n\n")[0].split()).replace("|", r"\|")
    start = tree.body[0].end_lineno or 0 if docstring else 0
    return Module(file, text.splitlines(), summary, start, definitions(tree))


def enclosing_definition(module: Module, line: int) -> Place:
    """Return the innermost definition around a line, else the next one, else the module."""
    inside = [x for x in module.definitions if x.first <= line <= x.last]
    below = [x for x in module.definitions if x.first > line]
    if line <= module.start or not inside + below:
        path = Path(module.file)
        return Place(module.file, 1, path.parent.name if path.stem == "__init__" else path.stem)
    nearest = inside[-1] if inside else below[0]
    return Place(module.file, nearest.line, nearest.name)


def find_citations(modules: list[Module]) -> dict[str, list[Place]]:
    """Return section or equation → definitions that cite it; the most specific come first."""
    citations: dict[str, list[tuple[int, Place]]] = {}
    for module in modules:
        for i, line in enumerate(module.lines, start=1):
            keys = cited(line)
            for key in keys:
                citations.setdefault(key, []).append((len(keys), enclosing_definition(module, i)))
    ordered = {}
    for key, places in citations.items():
        places.sort(key=lambda x: x[0])
        ordered[key] = list(dict.fromkeys(place for _, place in places))
    return ordered


def marked_functions(book: Book, kind: str) -> list[tuple[str, str, Place]]:
    """Return (op, backend, place) of every function with `@op` or `@impl(op, backend)`."""
    places = []
    for module in book.modules:
        for x in module.definitions:
            words = [w for w in x.marks if w[0] == kind]
            for _, *of in words:
                op, backend = of or (x.name, "torch")
                places.append((op, backend, Place(module.file, x.line, x.name)))
    return places


# ── Tables of Markdown ──


def cells(line: str) -> list[str]:
    r"""Return the cells of a table's line; `\|` does not end one."""
    return [x.strip() for x in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


def is_rule(line: str) -> bool:
    """Return whether a table's line is the one between its head and its body."""
    return not set(line) - set("|-: ")


def rows(text: str, first: str) -> list[dict[str, str]]:
    """Return the rows of every table whose first column is called `first`, as column → cell."""
    body, columns = [], []
    for line in text.splitlines():
        row = cells(line)
        if not row or row[0] == first:
            columns = row
        elif columns and not is_rule(line):
            body.append(dict(zip(columns, row)))
    return body


def table(columns: str, body: list[list[str]]) -> str:
    """Return a table in Markdown; `columns` are separated by ` | `."""
    head = columns.split(" | ")
    return "\n".join(f"| {' | '.join(x)} |" for x in [head, ["---"] * len(head), *body])


def join_links(links: Iterable[str]) -> str:
    """Join links as the lines of a cell, each once."""
    return "<br>".join(dict.fromkeys(links)) or "—"


# ── Where it is ──


def link_tests(book: Book, cell: str) -> str:
    """Link `test_a`, `test_b_*` to their files; a name without a file ends the build."""
    links = []
    for name in re.findall(r"`(\w+\*?)`", cell):
        paths = sorted(book.root.glob(f"tests/**/{name}.py"))
        if not paths:
            sys.exit(f"README.md names tests/{name}.py, which does not exist")
        links += [f"[`{p.stem}`]({p.relative_to(book.root)})" for p in paths]
    return join_links(links)


def kernels_of(book: Book, chapter: Chapter) -> list[str]:
    """Return the kernel files that implement ops of a chapter or that its text links to."""
    mine = set(chapter.modules())
    ops = {name for name, _, place in marked_functions(book, "op") if place.file in mine}
    impls = marked_functions(book, "impl")
    files = [place.file for name, backend, place in impls if backend == "triton" and name in ops]
    return sorted({*files, *chapter.links} & {m.file for m in book.modules})


def anchor(key: str) -> str:
    """Return the anchor of a section: `report-2-1-1` for `§2.1.1`."""
    return "report-" + re.sub(r"\W+", "-", key.lower()).strip("-")


def file_link(name: str) -> str:
    """Return a link to a file of the repository."""
    return f"[`{short_path(name)}`]({name})"


def chapter_rows(book: Book) -> list[list[str]]:
    """Return a row per chapter: modules, sections, kernels and tests."""
    body = []
    for c in book.chapters:
        row = book.readme_row(c)
        report = join_links(f"[{x}](report.md#{anchor(x)})" for x in cited(row["report"]))
        modules = join_links(file_link(m) for m in c.modules())
        kernels = join_links(file_link(k) for k in kernels_of(book, c))
        body.append([c.link(), modules, report, kernels, link_tests(book, row["tests"])])
    return body


def op_rows(book: Book) -> list[list[str]]:
    """Return a row per op: its definition, the heading that introduces it, its other forms."""
    impls, body = marked_functions(book, "impl"), []
    for name, _, place in marked_functions(book, "op"):
        export = (Path(place.file).stem, name)
        heads = head_links(book, lambda head: export in head.exports)  # noqa: B023
        mine = [(backend, p) for op, backend, p in impls if op == name]
        forms = [f"{b}: [{short_path(p.file)}:{p.line}]({p.file}#L{p.line})" for b, p in mine]
        body.append([place.link, join_links(heads), join_links(forms)])
    return body


def head_links(book: Book, is_wanted: Callable[[Head], bool]) -> list[str]:
    """Return links to the headings of all chapters for which `is_wanted` holds."""
    links = []
    for chapter in book.chapters:
        links += [chapter.link(head) for head in chapter.heads if is_wanted(head)]
    return links


def kernel_rows(book: Book) -> list[list[str]]:
    """Return a row per kernel file: purpose, ops and tests."""
    readme_rows = {row["kernels"].strip("`"): row for row in rows(book.readme, "kernels")}
    impls, body = marked_functions(book, "impl"), []
    for m in book.modules:
        if m.file.startswith("kernels/"):
            row = readme_rows.get(Path(m.file).stem, {})
            ops = join_links(
                f"[`{op}`]({m.file}#L{p.line})" for op, _, p in impls if p.file == m.file
            )
            checks = link_tests(book, row.get("tests", ""))
            body.append([file_link(m.file), row.get("ops") or m.summary, ops, checks])
    return body


def where_page(book: Book) -> str:
    """Return the page 'Where it is'."""
    exported_to = set(chain.from_iterable(c.modules() for c in book.chapters))
    tools = sorted(str(p.relative_to(book.root)) for p in book.root.glob("tools/*.py"))
    hand = [
        m for m in book.modules if m.file not in exported_to and not m.file.startswith("kernels/")
    ]
    hand += [read_module(book.root, file) for file in tools]
    parts = [
        "# Where it is",
        "Every chapter with the module that its `#| export` cells become, the sections of the "
        "report that it covers, the kernels of its ops, and its tests.",
        table("chapter | module | report | kernels | tests", chapter_rows(book)),
        "## Ops",
        "An op is a function with several implementations. Its definition is the equation in "
        "torch; `triton` is the kernel for GPUs, `cpu` the tuned form.",
        table("op | introduced in | other forms", op_rows(book)),
        "## Kernels",
        table("file | what | ops | tests", kernel_rows(book)),
        "## Written by hand",
        table("file | what it is for", [[file_link(m.file), m.summary] for m in hand]),
    ]
    return "\n\n".join(parts) + "\n"


# ── From the report's section to the line of code ──


def check_keys(where_cited: str, keys: Iterable[str]) -> None:
    """End the build if the report has no such section or equation."""
    for key in keys:
        if key not in TITLES:
            sys.exit(f"{where_cited} cites {key}, which the report does not have")


def report_rows(book: Book) -> list[list[str]]:
    """Return [section or equation, chapters, code] of all citations, in the report's order."""
    code, body = find_citations(book.modules), []
    check_keys("the package", code)
    for c in book.chapters:
        for h in c.heads:
            check_keys(f"{c.path}, '{h.title}',", h.cites)
    for key in TITLES:
        whole = [c for c in book.chapters if key in cited(book.readme_row(c)["report"])]
        heads = head_links(book, lambda head: key in head.cites)  # noqa: B023
        files = [file_link(m) for m in chain.from_iterable(c.modules() for c in whole)]
        places = [p.link for p in code.get(key, [])]
        if whole or heads or places:
            links = [f"**{c.link()}**" for c in whole] + heads
            body.append([key, join_links(links), join_links(files + places)])
    return body


def report_page(book: Book) -> str:
    """Return the page 'From the report's section to the line of code'."""
    parts = [
        "# From the report's section to the line of code",
        "Every section and equation of the DeepSeek-V3 technical report (arXiv 2412.19437) that "
        "this book cites, in the report's order. On the left: its chapters, in bold, and sections "
        "of other chapters that cite it. On the right: the modules of its chapters and every "
        "definition that cites it, by file and line.",
    ]
    for key, chapters, code in report_rows(book):
        if key.startswith("eq."):
            parts[-1] += f"\n| {key}: {TITLES[key]} | {chapters} | {code} |"
            continue
        level = "##" if re.fullmatch(r"§\d|App\. .", key) else "###"
        parts.append(f"({anchor(key)})=\n{level} {key} {TITLES[key]}")
        parts.append(table("report | chapters | code", [[key, chapters, code]]))
    return "\n\n".join(parts) + "\n"


# ── API reference ──


def escape_markdown(text: str) -> str:
    """Escape the special characters of Markdown, except in code spans."""
    parts = text.split("`")
    outside = [re.sub(r"([\\*_\[\]<>$|{}~])", r"\\\1", part) for part in parts[::2]]
    inside = [part.replace("|", r"\|") for part in parts[1::2]]
    if len(parts) % 2 == 0:  # a lone backtick
        return re.sub(r"([\\`*_\[\]<>$|{}~])", r"\\\1", text)
    spans = [f"`{part}`" for part in inside]
    return "".join(chain.from_iterable(zip(outside, [*spans, ""])))


def api_rows(module: Module) -> list[list[str]]:
    """Return [link, parameters, first paragraph] of each public function and class of a module."""
    body = []
    for node in ast.parse("\n".join(module.lines)).body:
        is_definition = isinstance(node, ast.FunctionDef | ast.ClassDef)
        if not is_definition or node.name.startswith("_"):
            continue
        text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        args = ast.unparse(node.args) if isinstance(node, ast.FunctionDef) else ""
        link = f"[`{node.name}`]({module.file}#L{node.lineno})"
        body.append([link, f"`{args}`".replace("|", r"\|") if args else "—", escape_markdown(text)])
    return body


def api_page(book: Book) -> str:
    """Return the page 'API reference': public functions and classes of every module."""
    parts = ["# API reference", "Public functions and classes by module, with their parameters."]
    for module in book.modules:
        if body := api_rows(module):
            path = module.file.removesuffix(".py").removesuffix("/__init__")
            dotted = path.replace("kernels/", "dsv3_ref/kernels/").replace("/", ".")
            parts += [f"## {dotted}", table("name | parameters | what", body)]
    return "\n\n".join(parts) + "\n"
