"""Build the book as a static site in build/site/ from the executed notebooks/NN_name.ipynb.

    python tools/website.py

Sphinx reads a copy of the repository with three kinds of additional pages: the front page from the
README, the appendices of tools/appendices.py, and every Python file with an anchor for each line.
Nothing is executed, and the site works offline. A warning of Sphinx, a dead link or a page that
would load something from the network ends the build with exit code 1.
"""

import html
import io
import re
import shutil
import sys
import time
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import unquote

import appendices
import nbformat
from book import SLIDERS
from docutils import nodes
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.parsers import Parser
from sphinx.util.docutils import docutils_namespace, patch_docutils

from dsv3_ref.studies.explain import ExplainConfig, run_explain
from dsv3_ref.viz.page import hash_source

ROOT = Path(__file__).resolve().parent.parent
FILES = (
    "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "Dockerfile", "LICENSE", "LOG.md",
    "Makefile", "README.md", "SECURITY.md", "environment.yml", "pyproject.toml",
)  # fmt: skip
FOLDERS = "docs", "dsv3_ref", "figures", "kernels", "notebooks", "slurm", "tests", "tools"
STATIC_NOTE = (
    "*This page shows the figure above as it is. In JupyterLab (`make lab`) it has controls.*"
)
MATHJAX = {"loader": {"load": ["input/tex", "output/svg", "a11y/assistive-mml"]}}
CONFIG = {
    "project": "dsv3-ref",
    "author": "",
    "html_title": "dsv3-ref",
    "extensions": ["myst_nb"],
    "source_suffix": {".ipynb": "myst-nb", ".md": "myst-nb", ".py": "python"},
    "suppress_warnings": ["toc.not_included"],  # Python files
    "highlight_language": "text",
    "smartquotes_action": "qe",  # two hyphens are an option, not a dash
    "myst_enable_extensions": ["amsmath", "dollarmath"],
    "myst_heading_anchors": 4,
    "nb_execution_mode": "off",
    "nb_ipywidgets_js": {},
    "mathjax_path": "mathjax/startup.js",
    "mathjax3_config": MATHJAX,
    "html_theme": "sphinx_book_theme",
    "html_theme_options": {
        "navbar_persistent": [],  # the sidebar has a search field
        "use_download_button": False,
        "use_fullscreen_button": False,
        "show_navbar_depth": 1,
        "show_toc_level": 2,
    },
    "html_context": {"default_mode": "auto"},
    "html_copy_source": False,
    "html_show_copyright": False,
    "html_css_files": ["website.css"],
}


FRONT_PAGE = """# {title}

{paragraph}

{play}{figure}

Every chapter has been executed; its outputs and figures are below its code. To change and rerun
something, or to use the interactive controls, start `make lab` (see the [README](README.md)).

{chapters}

Four appendices: [where everything is](where.md), [from the report's section to the line of
code](report.md), the [API reference](api.md), and the [glossary](notebooks/glossary.md), with the
Chinese terms.

```{{toctree}}
:caption: Chapters
:hidden:

{contents}
```

```{{toctree}}
:caption: Appendices
:hidden:

Where it is <where>
Report to code <report>
API reference <api>
Glossary <notebooks/glossary>
```

```{{toctree}}
:caption: The project
:hidden:

README <README>
CONTRIBUTING <CONTRIBUTING>
Notation <docs/notation>
Data <docs/data>
Metrics <docs/metrics>
Extending <docs/extending>
CHANGELOG <CHANGELOG>
SECURITY <SECURITY>
LOG <LOG>
```
"""

MODEL, EXPLAINER = "notebooks/models/tiny", "explainer.html"
PLAY = """<iframe class="explainer" src="explainer.html" title="A small DeepSeek-V3"></iframe>

This model is in the page: type a text, let it write, and follow each token through attention,
latent cache, router and experts. <a href="explainer.html">The same in a page of its own</a>

"""

# ── The copy that Sphinx reads ──


def copy_sources(root: Path, src: Path) -> None:
    """Copy the files of the repository; of the notebooks only the .ipynb."""
    skip = shutil.ignore_patterns("__pycache__", ".*", "[0-9]*_*.py", "[!0-9]*.ipynb")
    for folder in FOLDERS:
        if (root / folder).is_dir():
            shutil.copytree(root / folder, src / folder, ignore=skip)
    for name in FILES:
        if (root / name).exists():
            shutil.copy(root / name, src)


def replace_widgets(path: Path) -> None:
    """Replace the stored line of each widget by a note on where it is interactive."""
    nb = nbformat.read(path, 4)
    for cell in nb.cells:
        for output in cell.get("outputs", []):
            if output.get("data", {}).get("text/plain") == SLIDERS:
                output.data = {"text/markdown": STATIC_NOTE}
    nbformat.write(nb, path)


def front_page(book: appendices.Book, play: str) -> str:
    """Return the front page: title, first paragraph and figure of the README, and the chapters.

    play: what stands above the figure.
    """
    start = re.match(r"# (.*)\n\n(.*)\n", book.readme)
    figure = re.search(r"!\[.*?\]\(figures/.*?\.svg\)", book.readme)
    if not start or not figure:
        sys.exit("README.md must begin with a title and a paragraph, and show an SVG figure")
    topics = [book.readme_row(c)["notebook"].partition(": ")[2] for c in book.chapters]
    body = [[c.link(), topic or "—"] for c, topic in zip(book.chapters, topics)]
    return FRONT_PAGE.format(
        title=start[1],
        paragraph=start[2],
        play=play,
        figure=figure[0],
        chapters=appendices.table("chapter | what it builds", body),
        contents="\n".join(f"{c.short_title} <{c.path}>" for c in book.chapters),
    )


def stage(root: Path, src: Path) -> dict[str, list[str]]:
    """Write the files that Sphinx reads; return the glossary: term → all its names."""
    book, terms = (
        appendices.read_book(root),
        glossary((root / "notebooks/glossary.md").read_text(encoding="utf-8")),
    )
    copy_sources(root, src)
    for chapter in book.chapters:
        replace_widgets(src / chapter.path)
    play = PLAY if (root / MODEL).is_dir() else ""
    (src / "index.md").write_text(front_page(book, play), encoding="utf-8")
    (src / "where.md").write_text(appendices.where_page(book), encoding="utf-8")
    (src / "report.md").write_text(appendices.report_page(book), encoding="utf-8")
    (src / "api.md").write_text(appendices.api_page(book), encoding="utf-8")
    (src / "notebooks/glossary.md").write_text(terms[0], encoding="utf-8")
    return terms[1]


# ── Glossary ──


def glossary(text: str) -> tuple[str, dict[str, list[str]]]:
    """Return the page with its tables as lists of definitions, and term → all its names."""
    names: dict[str, list[str]] = {}
    page: list[str] = []
    entries: list[str] = []
    for line in [*text.splitlines(), ""]:
        cells = appendices.cells(line)
        if not cells:
            page += ["```{glossary}", *entries, "```"] if entries else []
            page, entries = [*page, line], []
        elif cells[0] != "term" and not appendices.is_rule(line):
            terms, chinese, what, where = cells
            names[terms.split(", ")[0]] = terms.split(", ")
            entries += [*terms.split(", "), chinese, f"  {what} *{where}*", ""]
    return "\n".join(page), names


def term_pattern(name: str) -> str:
    """Return a pattern for a name: abbreviations verbatim, words in any case and number."""
    words = r"[\s-]+".join(re.escape(x) for x in re.split(r"[ -]", name))
    return rf"(?i:{words})(?:e?s)?" if name.islower() else rf"{words}s?"


class Terms:
    """A Sphinx pass that links the first use of each term in a chapter to the glossary."""

    NOT_PROSE = (
        nodes.title, nodes.literal, nodes.literal_block, nodes.math, nodes.math_block, nodes.raw,
        nodes.reference, addnodes.pending_xref, addnodes.download_reference, nodes.comment,
    )  # fmt: skip

    def __init__(self, names: dict[str, list[str]]):
        self.names = list(names)
        ways: list[tuple[str, int]] = []
        for i, spellings in enumerate(names.values()):
            ways += [(name, i) for name in spellings]
        ways.sort(key=lambda x: -len(x[0]))  # the longest name first
        parts = (f"(?P<t{i}_{j}>{term_pattern(name)})" for j, (name, i) in enumerate(ways))
        self.pattern = re.compile(rf"(?<![\w-])(?:{'|'.join(parts)})(?![\w-])")

    def __call__(self, app: Sphinx, doctree: nodes.document) -> None:
        if not re.match(r"notebooks/\d", app.env.docname):
            return
        linked: set[str] = set()
        for node in list(doctree.findall(nodes.Text)):
            if self.is_prose(node) and (new := self.link(app.env.docname, str(node), linked)):
                node.parent.replace(node, new)

    def is_prose(self, node: nodes.Node) -> bool:
        """Return whether a text is not in code, output, an equation, a heading or a link."""
        while node := node.parent:
            if isinstance(node, self.NOT_PROSE) or "cell_output" in node.get("classes", []):
                return False
        return True

    def link(self, doc: str, text: str, linked: set[str]) -> list[nodes.Node]:
        """Split a text at its new terms, which become references; [] if it has none."""
        pieces: list[nodes.Node] = []
        end = 0
        for use in self.pattern.finditer(text):
            term = self.names[int((use.lastgroup or "")[1:].split("_")[0])]
            if term in linked:
                continue
            linked.add(term)
            inner = nodes.inline("", use[0], classes=["term"])
            to = {"refdomain": "std", "reftype": "term", "reftarget": term}
            ref = addnodes.pending_xref("", inner, refdoc=doc, refexplicit=True, refwarn=True, **to)
            pieces += [nodes.Text(text[end : use.start()]), ref]
            end = use.end()
        return [*pieces, nodes.Text(text[end:])] if pieces else []


# ── Python files as pages ──


class Python(Parser):
    """A parser for pages of Python files; `file.py#L12` is line 12, as on GitHub."""

    supported = ("python",)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        """Add the highlighted lines of a file to a page."""
        env = document.settings.env
        name = env.docname
        lines = highlight(inputstring, PythonLexer(stripnl=False), HtmlFormatter(nowrap=True))
        body = "".join(self.line(i, x) for i, x in enumerate(lines.splitlines(), start=1))
        section = nodes.section("", nodes.title("", f"{name}.py"), ids=["top"], names=["top"])
        section += self.origin(inputstring)
        raw = f'<div class="highlight source notranslate"><pre>{body}</pre></div>'
        section += nodes.raw("", raw, format="html")
        document += section
        anchors = {f"L{i}": (i, f"L{i}", f"line {i}") for i in range(1, body.count("\n") + 1)}
        env.metadata[name] |= {"nosearch": "", "orphan": "", "myst_slugs": anchors}

    def line(self, i: int, code: str) -> str:
        """Return a line with its number, which links to itself."""
        return f'<span id="L{i}"><a href="#L{i}">{i:4}</a> {code}</span>\n'

    def origin(self, text: str) -> list[nodes.Node]:
        """Return a paragraph that links the chapters of a generated module; [] for others."""
        line = re.search(r"^Generated by .* from (.*); edit", text, re.MULTILINE)
        stems = re.findall(r"notebooks/(\w+)\.py", line[1] if line else "")
        out = nodes.paragraph("", "Exported from " if stems else "")
        for stem in stems:
            inner = nodes.inline("", f"chapter {stem[:2]}")
            to = {"refdomain": "std", "reftype": "doc", "reftarget": f"/notebooks/{stem}"}
            out += [addnodes.pending_xref("", inner, refexplicit=True, refwarn=True, **to)]
            out += [nodes.Text(", " if stem != stems[-1] else ".")]
        return [out] if stems else []


# ── Building ──


def copy_mathjax(static: Path) -> None:
    """Copy the parts of MathJax 3 that read TeX and write SVG, without fonts, menu and speech."""
    spec = find_spec("sphinx-mathjax-offline")
    source, target = Path(spec.origin).parent / "static/mathjax", static / "mathjax"
    for name in ("startup", "core", "output/svg/fonts/tex", *MATHJAX["loader"]["load"]):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / f"{name}.js", target / f"{name}.js")
    shutil.copytree(source / "input/tex/extensions", target / "input/tex/extensions")


DEAD_LINKS = {  # warning of Sphinx → target of the dead link
    r"'myst' cross-reference target not found: '(.*)'": r"\1",
    r"local id not found in doc '(.*)': '(.*)'": r"\1#\2",
    r"image file not readable: (\S+)": r"\1",
    r"download file not readable: (\S+)": r"\1",
}


def run_sphinx(src: Path, out: Path, names: dict[str, list[str]]) -> list[str]:
    """Run Sphinx; return its warnings, one sentence each."""
    warnings = io.StringIO()
    config = CONFIG | {"html_static_path": [str(src / "_site")]}
    with patch_docutils(), docutils_namespace():
        app = Sphinx(
            src, None, out, src.parent / "doctrees", "html", config,
            status=None, warning=warnings, freshenv=True,
        )  # fmt: skip
        app.add_source_parser(Python)
        app.connect("doctree-read", Terms(names))
        app.build(force_all=True)
    return [format_warning(line, src) for line in warnings.getvalue().splitlines() if line.strip()]


def format_warning(warning: str, src: Path) -> str:
    """Format a warning of Sphinx, with the notebook cell in place of the line."""
    text = re.sub(r"\x1b\[[\d;]*m", "", warning).replace(f"{src}/", "").replace("WARNING: ", "")
    text = re.sub(r"(\.ipynb):(\d+):", lambda m: f"{m[1]}, cell {int(m[2]) // 10000}:", text)
    for pattern, target in DEAD_LINKS.items():
        text = re.sub(pattern, f"{target} leads nowhere", text)
    return re.sub(r" \[[\w.]+\]$", "", text)


def build(root: Path, out: Path) -> list[str]:
    """Build the site of a repository; return its problems, a sentence each, if it has any."""
    with TemporaryDirectory() as folder:
        src, site = Path(folder).resolve() / "source", Path(folder).resolve() / "site"
        (src / "_site").mkdir(parents=True)
        shutil.copy(Path(__file__).parent / "website.css", src / "_site")
        copy_mathjax(src / "_site")
        bad = run_sphinx(src, site, stage(root, src))
        add_explainer(root, site)
        bad = bad or find_problems(site)
        if not bad:
            add_policies(site)
            shutil.rmtree(out, ignore_errors=True)
            out.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(site, out)
    return bad


def add_explainer(root: Path, site: Path) -> None:
    """Write the page with the shipped model inside, if there is one."""
    if (root / MODEL).is_dir():
        run_explain(ExplainConfig(root / MODEL, site / EXPLAINER))


# ── Content security policy ──

SITE_POLICY = (
    "default-src 'none'; script-src 'self'{scripts}; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self'; connect-src 'self'; frame-src 'self'; "
    "base-uri 'none'; form-action 'self'"
)  # MathJax and Font Awesome write stylesheets while the page is read
FRAME = re.compile(r'<iframe\b[^>]*\bsrcdoc="([^"]*)"')
INLINE_SCRIPT = re.compile(r"<script\b(?![^>]*\bsrc=)[^>]*>(.*?)</script>", re.DOTALL)


def add_policies(site: Path) -> None:
    """Write into every page a policy that allows the site's files and the page's own scripts.

    Scripts inside a page are allowed by hash: all come from the repository and from Sphinx's theme.
    """
    for path in site.rglob("*.html"):
        if site / "_static" in path.parents or path == site / EXPLAINER:
            continue  # templates of the theme; a page with a stricter policy of its own
        page = path.read_text(encoding="utf-8")
        frames = map(html.unescape, FRAME.findall(page))  # a frame inherits the page's policy
        scripts = chain.from_iterable(map(INLINE_SCRIPT.findall, [page, *frames]))
        sources = {f" {hash_source(script)}" for script in scripts}
        policy = SITE_POLICY.format(scripts="".join(sorted(sources)))
        meta = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        path.write_text(page.replace("<head>", f"<head>{meta}", 1), encoding="utf-8")


# ── What was built ──

TAG = re.compile(r"<(\w+)(\s[^<>]*)>")
ATTRIBUTE = re.compile(r"""([\w-]+)\s*=\s*(?:"([^"]*)"|'([^']*)')""")
ELEMENTS = {x: re.compile(rf"<{x}\b[^>]*>(.*?)</{x}>", re.DOTALL) for x in ("script", "style")}
OUTSIDE_URL = re.compile(r"(?:https?:)?//", re.IGNORECASE)
CSS_URL = re.compile(r"""(?:url\(\s*|@import\s+)["']?((?:https?:)?//[^"')]+)""")
SCRIPT_URL = re.compile(
    r"""(?:fetch\(|import\(|importScripts\(|\bsrc\s*=|\.open\([^)]*?,)\s*["'`](https?://[^"'`]+)"""
    r"""|["'`](https?://(?:cdn|unpkg|fonts|www\.google)[^"'`]*)"""
)


def tags(page: str) -> list[tuple[str, dict[str, str]]]:
    """Return (tag, attributes) of everything on a page that has attributes."""
    return [
        (tag.lower(), {k.lower(): html.unescape(a or b) for k, a, b in ATTRIBUTE.findall(rest)})
        for tag, rest in TAG.findall(page)
    ]


def loaded_urls(tag: str, attributes: dict[str, str]) -> list[str]:
    """Return the URLs that a browser loads for a tag without a click."""
    if tag == "a" or attributes.get("rel") in ("index", "search", "next", "prev"):
        return []
    names = ("href",) if tag in ("link", "image", "use") else ("src", "data", "poster")
    addresses = [attributes[n] for n in names if n in attributes]
    return addresses + [x.split()[0] for x in attributes.get("srcset", "").split(",") if x.strip()]


def outside_urls(path: Path, text: str) -> list[str]:
    """Return the URLs outside the site that a browser would load for a built file."""
    scripts = styles = text
    addresses: list[str] = []
    if path.suffix == ".html":
        scripts, styles = ("\n".join(ELEMENTS[x].findall(text)) for x in ("script", "style"))
        every = chain.from_iterable(loaded_urls(*tag) for tag in tags(text))
        addresses += [x for x in every if OUTSIDE_URL.match(x)]
    if path.suffix != ".css":
        addresses += [a or b for a, b in SCRIPT_URL.findall(scripts)]
    if path.suffix != ".js":
        addresses += CSS_URL.findall(styles)
    return addresses


def dead_links(
    path: Path, elements: list[tuple[str, dict[str, str]]], anchors: dict[Path, set[str]]
) -> list[str]:
    """Return the targets of a page that do not exist or lack the anchor."""
    bad = []
    for tag, attributes in elements:
        for target in loaded_urls(tag, attributes) + [attributes.get("href", "")]:
            if not target or re.match(r"(?:[a-z]+:|//)", target):
                continue
            name, _, anchor = target.partition("#")
            file = (path.parent / unquote(name.split("?")[0])).resolve() if name else path
            known = anchors.get(file, {unquote(anchor)})
            gone = not file.exists() or (anchor and unquote(anchor) not in known)
            bad += [target] if gone else []
    return bad


def find_problems(site: Path) -> list[str]:
    """Return a sentence per dead link and per URL that a page would load from another site."""
    site = site.resolve()
    bad: list[str] = []
    kinds = list(chain.from_iterable(sorted(site.rglob(x)) for x in ("*.html", "*.css", "*.js")))
    unread = site / "_static"  # holds templates of the theme
    texts = {
        p: p.read_text(encoding="utf-8")
        for p in kinds
        if p.suffix != ".html" or unread not in p.parents
    }
    pages = {p: tags(text) for p, text in texts.items() if p.suffix == ".html"}
    anchors = {p: {a["id"] for _, a in elements if "id" in a} for p, elements in pages.items()}
    for path, text in texts.items():
        where = path.relative_to(site)
        bad += [f"{where}: would load {x}" for x in outside_urls(path, text)]
        bad += [
            f"{where}: {x} leads nowhere" for x in dead_links(path, pages.get(path, []), anchors)
        ]
    return list(dict.fromkeys(bad))


def main() -> int:
    """Build the site; print its problems and return 1 if there are any."""
    start, out = time.perf_counter(), ROOT / "build/site"
    if bad := build(ROOT, out):
        print("\n".join(bad))
        return 1
    print(f"{out.relative_to(ROOT)}/index.html {time.perf_counter() - start:5.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
