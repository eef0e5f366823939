"""The site of the book: complete, offline, without dead links; appendices match the sources."""

import json
import re
import shutil
import time
from html import escape
from itertools import chain

import appendices
import nbformat
import numpy as np
import policy
import pytest
import website
from test_browser import CHROMIUM, browser, page  # noqa: F401  fixtures

from dsv3_ref.viz import component

ROOT = website.ROOT
CHAPTERS = sorted(ROOT.glob("notebooks/[0-9]*.ipynb"))
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated. Check CHANGES for Sphinx")
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5E"
PIXEL += "rkJggg=="
GLOSSARY = """# Glossary

| term | 中文 | what | where |
|---|---|---|---|
| op | 算子 | A function. | [07 · Why](07_x.ipynb#why) |
| mixture of experts, MoE | 混合专家 | Some of many. | [07 · Why](07_x.ipynb#why) |
| gate | 门控 | It chooses. | [07 · Why](07_x.ipynb#why) |
| token | 词元 | A piece of text. | [07 · Why](07_x.ipynb#why) |
| expert | 专家 | One of many. | [07 · Why](07_x.ipynb#why) |
"""
CHAPTER = """# 07 · X: a chapter

## Why
An op of an expert, as a thermostat: a token, its gate and the mixture of experts. This op is
[f](../dsv3_ref/one.py#L4), or `op`.

$$x = 1 \\tag{1}$$

```text
op $$
```"""


def write_repository(root) -> None:
    """Write a repository with all pages but chapters."""
    for folder in ("notebooks", "figures", "dsv3_ref", "kernels", "tests", "docs"):
        (root / folder).mkdir(parents=True)
    shutil.copy(ROOT / "figures/00_model.svg", root / "figures")
    (root / "README.md").write_text("# small\n\nA book.\n\n![it](figures/00_model.svg)\n")
    pages = ("docs/notation", "docs/data", "docs/metrics", "docs/extending")
    for name in ("CONTRIBUTING", "LOG", "CHANGELOG", "SECURITY", *pages):
        (root / f"{name}.md").write_text(f"# {name}\n\nWords of this page.\n")
    (root / "dsv3_ref/one.py").write_text('"""One."""\n\n\ndef f():\n    """eq. 1"""\n')
    (root / "notebooks/glossary.md").write_text(GLOSSARY)


def write_chapter(root, cells: list) -> None:
    metadata = {"language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=metadata)
    nbformat.write(notebook, root / "notebooks/07_x.ipynb")


def chapters(root) -> list:
    return sorted(root.glob("notebooks/[0-9]*.ipynb"))


@pytest.fixture(scope="module", params=["small", pytest.param("whole", marks=pytest.mark.full)])
def built(request, tmp_path_factory):
    """Build the site of a chapter with an output of each kind, or of the committed notebooks.

    Return the folders of the repository and of its site.
    """
    out, start = tmp_path_factory.mktemp("book") / "build" / "site", time.process_time()
    root = ROOT
    if request.param == "small":
        root = tmp_path_factory.mktemp("small")
        write_repository(root)
        outputs = [
            nbformat.v4.new_output("display_data", {"image/png": PIXEL}),
            nbformat.v4.new_output("display_data", {"text/plain": website.SLIDERS}),
        ]
        code = nbformat.v4.new_code_cell("op = 1", outputs=outputs)
        write_chapter(root, [nbformat.v4.new_markdown_cell(CHAPTER), code])
    assert website.build(root, out) == []
    assert time.process_time() - start < 150
    return root, out


@pytest.fixture(scope="module")
def book():
    return appendices.read_book(ROOT)


def text(site, name: str) -> str:
    return (site / name).read_text(encoding="utf-8")


# ── The whole site ──


def test_every_page_is_there_and_nothing_is_fetched(built):
    root, site = built
    for path in chapters(root):
        assert (site / "notebooks" / f"{path.stem}.html").exists()
    pages = ("index", "where", "report", "api", "notebooks/glossary", "search", "README")
    for name in pages:
        assert (site / f"{name}.html").exists()
    assert website.find_problems(site) == []


def test_scripts_of_a_frame_are_allowed_by_hash(tmp_path):
    """A document inside a page inherits the page's policy beside its own."""
    frame = component.document("small", "pipeline", ("dom.js", "schedule.js", "pipeline.js"))
    (tmp_path / "a.html").write_text(
        f'<html><head></head><iframe srcdoc="{escape(frame)}"></iframe></html>'
    )
    website.add_policies(tmp_path)
    html = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert policy.find_script_faults(html) == []
    changed = html.replace("const NAMES", "const OTHERS")
    faults = policy.find_script_faults(changed)
    assert [x.partition(":")[0] for x in faults] == [
        "script in a frame not allowed", "script not allowed",
    ]  # fmt: skip


def test_scripts_of_a_page_are_allowed_by_hash(tmp_path):
    head = "<html><head><style>a{}</style><script>let a = 1;</script><script src='a.js'></script>"
    for name in ("a.html", "b/c.html", "b/explainer.html", "_static/d.html"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{head}</head><form action='x'></form></html>")
    website.add_policies(tmp_path)
    html = (tmp_path / "b/c.html").read_text(encoding="utf-8")
    assert policy.find_script_faults(html) == []
    module = (tmp_path / "b/explainer.html").read_text(encoding="utf-8")
    assert policy.find_script_faults(module) == []  # the page of a file, not that of the model
    changed = html.replace("<form", "<script>run()</script><form")
    assert policy.find_script_faults(changed) == ["script not allowed: run()"]
    assert "Content-Security" not in (tmp_path / "_static/d.html").read_text(encoding="utf-8")


def test_every_page_has_a_policy(built):
    root, site = built
    pages = [p for p in site.rglob("*.html") if site / "_static" not in p.parents]
    assert len(pages) > (100 if root == ROOT else 15)
    faults = {p.name: policy.find_script_faults(p.read_text(encoding="utf-8")) for p in pages}
    assert {name: found[:3] for name, found in faults.items() if found} == {}


def test_the_front_page_has_the_figure_and_the_chapters_in_order(built):
    root, site = built
    stems = [p.stem for p in chapters(root)]
    front = text(site, "index.html")
    assert "_images/00_model.svg" in front
    article = front[front.index("<article") : front.index("</article")]
    links = re.findall(r'href="notebooks/(\d\w+)\.html"', article)
    assert list(dict.fromkeys(links)) == stems
    menu = front[front.index("bd-links") : front.index("<article")]
    assert re.findall(r'href="notebooks/(\d\w+)\.html"', menu) == stems


def test_equations_use_the_local_mathjax(built):
    root, site = built
    assert (site / "_static/mathjax/input/tex.js").exists()
    for path in chapters(root):
        html = text(site, f"notebooks/{path.stem}.html")
        cells = nbformat.read(path, 4).cells
        sources = "\n".join(c.source for c in cells if c.cell_type == "markdown")
        num_equations = appendices.FENCE.sub("", sources).count("$$") / 2
        assert html.count('<div class="math') == num_equations, path
        assert 'src="../_static/mathjax/startup.js' in html, path
        assert not re.search(r"[\x00-\x09\x0b-\x1f]", sources), f"{path}: a backslash was escaped"


def test_a_chapter_shows_its_figures_and_no_widget(built):
    root, site = built
    for path in chapters(root):
        html = text(site, f"notebooks/{path.stem}.html")
        cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
        outputs = chain.from_iterable(cell.outputs for cell in cells)
        num_figures = sum("image/png" in output.get("data", {}) for output in outputs)
        assert html.count("<img") >= num_figures > 0, path
        assert website.SLIDERS not in html, path
        assert "it has controls" in html or "<iframe srcdoc=" in html, path


def test_terms_are_linked_once_and_never_in_code_or_headings(built):
    root, site = built
    for path in chapters(root):
        html = text(site, f"notebooks/{path.stem}.html")
        links = re.findall(r'glossary\.html#(term-[\w-]+)"[^>]*><span class="term"', html)
        assert len(links) == len(set(links)) >= 5, path
        for element in re.finditer(r"<(h\d|pre|code)\b.*?</\1>", html, re.DOTALL):
            assert 'class="term"' not in element[0], path
        equations = "".join(re.findall(r'<div class="math.*?</div>', html, re.DOTALL))
        assert 'class="term"' not in equations, path


def test_the_search_index_has_the_chapters_and_not_the_code(built):
    root, site = built
    index = json.loads(text(site, "searchindex.js")[len("Search.setIndex(") : -1])

    def pages(numbers) -> list[str]:
        return [index["docnames"][i] for i in np.atleast_1d(numbers)]

    chapter = "notebooks/04_moe" if root == ROOT else "notebooks/07_x"
    assert chapter in pages((index["terms"] | index["titleterms"])["thermostat"])
    indexed = set(chain.from_iterable(map(pages, index["terms"].values())))
    assert {name.split("/")[0] for name in indexed if "/" in name} == {"docs", "notebooks"}
    assert "混合专家" in json.dumps(index, ensure_ascii=False)


# ── The appendices ──


def test_where_it_is_names_every_module_kernel_and_chapter(built):
    root, site = built
    html = text(site, "where.html")
    for path in [*root.glob("dsv3_ref/**/*.py"), *root.glob("kernels/**/*.py")]:
        to = path.relative_to(root).with_suffix(".html")
        assert f'href="{to}"' in html, to
    for path in chapters(root):
        assert f'href="notebooks/{path.stem}.html"' in html


def test_the_report_page_names_real_lines(built):
    root, site = built
    link = r'href="([\w/]+)\.html#L(\d+)">.*?<span class="pre">([^<]+)</span>.*?, ([\w/.]+):(\d+)<'
    links = re.findall(link, text(site, "report.html"))
    assert len(links) > (100 if root == ROOT else 0)
    for file, line, name, _, shown_line in links:
        assert line == shown_line
        source = (root / f"{file}.py").read_text(encoding="utf-8").splitlines()[int(line) - 1]
        last = re.escape(name.split(".")[-1])
        defined = rf"\s*(def|class) {last}\b|{last}( =|:)" if int(line) > 1 else r'"""'
        assert re.match(defined, source), (file, line, name, source)
        assert f'id="L{line}"' in text(site, f"{file}.html")


def test_an_equation_is_found_from_the_report(built):
    root, site = built
    want = ("eq. 27", "16_grpo.html#paper", "dsv3_ref/grpo", "def kl_k3(")
    if root != ROOT:
        want = ("eq. 1", "07_x.html#why", "dsv3_ref/one", "def f(")
    equation, place, module, function = want
    rows = text(site, "report.html").split("<tr")
    row = next(r for r in rows if equation in r)
    assert f"notebooks/{place}" in row
    line = re.search(rf"{module}\.html#L(\d+)", row)[1]
    assert (
        function in (root / f"{module}.py").read_text(encoding="utf-8").splitlines()[int(line) - 1]
    )


def test_a_registered_kernel_stands_beside_its_op(book):
    rows = {row[0]: row[2] for row in appendices.op_rows(book)}
    forms = next(forms for op, forms in rows.items() if op.startswith("[`attention`"))
    assert re.search(r"sdpa: \[mla\.py:\d+\]", forms)
    assert re.search(r"cpu: \[cpu/attention\.py:\d+\]", forms)
    assert re.search(r"triton: \[kernels/attention\.py:\d+\]", forms)


def test_the_glossary_gives_each_term_in_two_languages_and_a_place():
    lines = (ROOT / "notebooks/glossary.md").read_text(encoding="utf-8")
    rows = appendices.rows(lines, "term")
    assert len(rows) >= 50
    for row in rows:
        assert re.search(r"[\u4e00-\u9fff]", row["中文"]), row
        assert row["in a sentence"].endswith("."), row
        assert re.fullmatch(r"\[\d\d · [^\]]+\]\(\d\d_\w+\.ipynb#[^)]+\)", row["introduced in"])


# ── Parsers ──


@pytest.mark.parametrize(
    "words, keys",
    [
        ("as in §3.2.1, Table 2", ["§3.2.1"]),
        ("(§4.2, §2)", ["§2", "§4.2"]),
        ("§2.1.1, eq. 3, 4, 8 and 9).", ["§2.1.1", "eq. 3", "eq. 4", "eq. 8", "eq. 9"]),
        ("eq. 12–14, one token", ["eq. 12", "eq. 13", "eq. 14"]),
        ("appendix (App. B.1)", ["App. B.1"]),
        (r"$$x \tag{21}$$ and \text{(14, 16) choice}", ["eq. 14", "eq. 16", "eq. 21"]),
        ("DeepSeekMath's eq. 3, figure 2, 3 eq.", []),
    ],
)
def test_citations_are_read(words, keys):
    assert sorted(appendices.cited(words)) == sorted(keys)


def test_the_report_is_in_order_and_equations_follow_their_section():
    titles = list(appendices.TITLES)
    numbers = [int(x[4:]) for x in titles if x.startswith("eq.")]
    assert numbers == list(range(1, 29))
    assert titles.index("§5.2.2") < titles.index("eq. 26") < titles.index("§5.3")
    sections = [tuple(map(int, x[1:].split("."))) for x in titles if x.startswith("§")]
    assert sections == sorted(sections)


SOURCE = '''"""A module (§3)."""

LIMIT = 3  # §4.1


@op
def norm(x):
    """eq. 2"""


@impl("norm", "naive")
def _(x):
    """eq. 3"""


class A:
    size: int = 1  # §2

    def f(self):
        def inner():
            return 1  # eq. 5
        return inner


# ── Later (§5) ──
def last():
    pass
'''


def test_a_citation_belongs_to_the_innermost_definition(tmp_path):
    (tmp_path / "m.py").write_text(SOURCE)
    module = appendices.read_module(tmp_path, "m.py")
    assert module.summary == "A module (§3)."
    citations = {
        k: [(p.name, p.line) for p in v] for k, v in appendices.find_citations([module]).items()
    }
    assert citations == {
        "§3": [("m", 1)],
        "§4.1": [("LIMIT", 3)],
        "eq. 2": [("norm", 7)],
        "eq. 3": [("norm (naive)", 12)],
        "§2": [("A", 16)],
        "eq. 5": [("A.f.inner", 20)],
        "§5": [("last", 26)],
    }


def test_headings_get_the_anchors_of_github():
    assert appendices.slug("YaRN's ramp", ()) == "yarns-ramp"
    assert appendices.slug("Tiles of 1 × 128", ()) == "tiles-of-1--128"
    assert appendices.slug("What `make train` gives", ()) == "what-make-train-gives"
    assert appendices.slug("Why", ["why", "why-1"]) == "why-2"


def test_tables_are_read_by_their_first_column():
    lines = "| a | b |\n|---|---|\n| 1 | x \\| y |\n\n| c | d |\n|---|---|\n| 3 | 4 |\n"
    assert appendices.rows(lines, "a") == [{"a": "1", "b": "x \\| y"}]
    assert appendices.rows(lines, "c") == [{"c": "3", "d": "4"}]


@pytest.mark.parametrize(
    "words, terms",
    [
        ("a Mixture of\nexperts and MoE", ["Mixture of\nexperts"]),
        ("all-to-alls, all to all", ["all-to-alls"]),
        ("op, stop, ops, op-art, kl, KL", ["op", "KL"]),
        ("gate biases drop", ["gate biases"]),
    ],
)
def test_the_first_use_of_a_term_is_linked(words, terms):
    names = {
        "mixture of experts": ["mixture of experts", "MoE"], "all-to-all": ["all-to-all"],
        "op": ["op"], "KL": ["KL"], "balancing": ["balancing", "gate bias"],
    }  # fmt: skip
    pieces = website.Terms(names).link("x", words, set())
    assert [str(x.astext()) for x in pieces[1::2]] == terms
    assert "".join(x.astext() for x in pieces) == words


def test_the_reference_holds_signatures_and_no_markup():
    source = 'def f(x: int | None) -> int:\n    """Return a_b, `c|d` and *e*.\n\n    More.\n    """'
    module = appendices.Module("dsv3_ref/x.py", source.splitlines(), "", 0, [])
    assert appendices.api_rows(module) == [
        ["[`f`](dsv3_ref/x.py#L1)", r"`x: int \| None`", r"Return a\_b, `c\|d` and \*e\*."]
    ]


# ── Faults ──


@pytest.fixture
def small(tmp_path):
    """Create a repository with one chapter; return a function that builds it with more text."""
    root = tmp_path / "repository"
    write_repository(root)

    def build(*more: str) -> list[str]:
        head = "# 07 · X: a chapter\n\n## Why\nAn op, [f](../dsv3_ref/one.py#L4). $x$"
        write_chapter(root, [nbformat.v4.new_markdown_cell(x) for x in (head, *more)])
        return website.build(root, tmp_path / "site")

    return build


def test_a_valid_book_has_no_problem(small, tmp_path):
    links = "[it](../README.md), [there](https://example.org) ![](../figures/00_model.svg)"
    assert small(links) == []
    assert 'class="term">op<' in text(tmp_path / "site", "notebooks/07_x.html")


def test_every_kind_of_dead_link_is_reported(small, tmp_path):
    targets = "../kernels/no.py", "08_no.ipynb", "07_x.ipynb#no", "../dsv3_ref/one.py#L99", "#no"
    lines = [f"[x]({target})" for target in targets] + ["![x](../figures/no.svg)"]
    bad = small(*lines)
    assert len(bad) == len(lines), "\n".join(bad)
    words = "kernels/no.py", "08_no.ipynb", "07_x#no", "dsv3_ref/one#L99", "no", "figures/no.svg"
    for i, word in enumerate(words, start=2):
        problem = re.compile(rf"notebooks/07_x.ipynb, cell {i}: \S*{word} leads nowhere")
        assert any(map(problem.fullmatch, bad))
    assert not (tmp_path / "site").exists()


def test_a_dead_link_in_html_is_found_too(small):
    assert small('<a href="nowhere.html">x</a>') == [
        "notebooks/07_x.html: nowhere.html leads nowhere"
    ]


def test_a_section_that_the_report_lacks_stops_the_build(small):
    with pytest.raises(SystemExit, match="07_x.ipynb, 'Why', cites §9.9"):
        small("as §9.9 says")


def test_the_program_prints_problems_and_fails(small, monkeypatch, capsys):
    monkeypatch.setattr(website, "build", lambda root, out: ["a leads nowhere"])
    assert website.main() == 1
    assert "a leads nowhere" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, content, bad",
    [
        ("a.html", '<script src="https://cdn.x/y.js"></script>', True),
        ("a.html", '<link rel="stylesheet" href="//fonts.x/y.css" />', True),
        ("a.html", '<img srcset="https://x.org/a.png 2x" alt="">', True),
        ("a.html", "<style>@import 'https://x.org/a.css';</style>", True),
        ("a.html", '<script>fetch("https://x.org/count")</script>', True),
        ("a.css", "@font-face { src: url(https://fonts.x/a.woff2) }", True),
        ("a.js", 'var s; s.src = "https://x.org/analytics.js";', True),
        ("a.js", "load(`https://cdn.jsdelivr.net/npm/x`)", True),
        ("a.html", '<a href="https://arxiv.org/abs/2412.19437">the report</a>', False),
        ("a.html", "<pre>fetch(&quot;https://x.org&quot;); url(https://x.org/a)</pre>", False),
        ("a.js", '// see https://x.org\nvar ns = "http://www.w3.org/2000/svg";', False),
        ("a.css", "a { background: url(data:image/png;base64,AA) }", False),
        ("a.html", '<a href="#here">x</a><p id="here">y</p>', False),
        ("a.html", '<a href="#there">x</a><p id="here">y</p>', True),
        ("a.html", '<img src="no.png">', True),
    ],
)
def test_urls_that_a_page_would_load_are_found(tmp_path, name, content, bad):
    (tmp_path / name).write_text(content)
    assert bool(website.find_problems(tmp_path)) == bad


# ── As a reader sees it ──


@pytest.mark.full
@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
@pytest.mark.parametrize("built", ["whole"], indirect=True)
def test_a_reader_without_network_sees_equations_and_finds_words(built, page, tmp_path):  # noqa: F811
    _, site = built
    urls, blocked = [], []
    page.on("console", lambda message: blocked.append(message.text))
    page.on("request", lambda request: urls.append(request.url))
    page.context.set_offline(True)
    for path in CHAPTERS:
        page.goto((site / f"notebooks/{path.stem}.html").as_uri())
        page.wait_for_function("window.MathJax?.startup?.promise !== undefined")
        page.evaluate("MathJax.startup.promise")
        equations = page.locator("div.math, span.math").count()
        assert page.locator("mjx-container").count() == equations > 0
        assert page.locator("[data-mjx-error], [data-mml-node=merror]").count() == 0, path.stem
    page.screenshot(path=tmp_path / "chapter.png")
    page.keyboard.press("Control+k")
    page.keyboard.type("thermostat")
    page.keyboard.press("Enter")
    page.wait_for_selector("#search-results a[href*='04_moe']")
    page.screenshot(path=tmp_path / "search.png")
    page.goto((site / "notebooks/12_dualpipe.html").as_uri())
    frame = page.frame_locator("iframe[title='a pipeline, step by step']")
    frame.get_by_role("radio", name="1F1B").click()
    assert frame.locator("#time-value").inner_text() == "0.0"
    assert not [x for x in blocked if "Content Security Policy" in x]
    assert [url for url in urls if not url.startswith(("file:", "data:"))] == []
    page.set_viewport_size({"width": 390, "height": 844})
    for name in ("index", "where", "report", "notebooks/04_moe", "notebooks/glossary"):
        page.goto((site / f"{name}.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
