"""A self-contained HTML file: figures are inline SVG, styles are inline, nothing is requested.

Everything that comes from data passes through `text`, which escapes it. The content security
policy of the page forbids scripts, outside resources and all styles but the page's one stylesheet,
which it names by hash.
"""

import base64
import hashlib
import io
import json
import re
from html import escape, unescape
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.text import Text

PAGE_CSS = """
:root { color-scheme: light; --ink: #1f2430; --soft: #5b6472; --line: #d9dee5; --back: #ffffff;
  --card: #f4f6f9; --mark: #ffe9b3; --link: #0060a0; }
@media screen and (prefers-color-scheme: dark) {
  :root { color-scheme: dark; --ink: #e4e8ee; --soft: #a3adba; --line: #39414d; --back: #14181f;
    --card: #1e242d; --mark: #5c4a12; --link: #7cc4f5; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 50rem; background: var(--back);
  color: var(--ink); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-top: .8rem;
  border-top: 1px solid var(--line); }
a { color: var(--link); }
nav { font-size: .9rem; margin: 1.2rem 0 0; }
nav a { display: inline-block; padding: .25rem .9rem .25rem 0; }
.soft, figcaption, caption { color: var(--soft); font-size: .9rem; }
dl.tiles { display: grid; grid-template-columns: repeat(2, 1fr); gap: .6rem; margin: 1.2rem 0; }
@media (min-width: 36rem) { dl.tiles { grid-template-columns: repeat(3, 1fr); } }
dl.tiles div { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; }
dl.tiles dt { color: var(--soft); font-size: .85rem; }
dl.tiles dd { margin: 0; font-size: 1.25rem; font-weight: 600; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0 1.6rem; break-inside: avoid; }
.wide { overflow-x: auto; }
.wide svg { display: block; width: 100%; min-width: 34rem; height: auto; }
.wide svg text { fill: currentColor; }
figcaption { margin-top: .3rem; }
.tables { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr));
  gap: 0 2.5rem; align-items: start; }
@media (min-width: 42rem) { .tables table:first-child { grid-row: span 9; } }
table { border-collapse: collapse; width: 100%; margin: .6rem 0 1rem; font-size: .92rem; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; font-weight: normal; }
thead th { color: var(--soft); }
td { font-variant-numeric: tabular-nums; }
td.number, th.number { text-align: right; padding-right: 0; }
tr.ours > * { font-weight: 600; }
pre, code { font: .9rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  overflow-wrap: anywhere; }
pre { white-space: pre-wrap; background: var(--card); border-radius: .5rem; padding: .8rem 1rem;
  margin: .3rem 0 1.2rem; }
mark { background: var(--mark); color: inherit; border-radius: .2rem; padding: .05rem .15rem; }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } nav { display: none; }
  .wide { overflow: visible; } .wide svg { min-width: 0; } h2 { break-after: avoid; }
  mark { border-bottom: 2px solid #000; } tr, dl.tiles div { break-inside: avoid; } }
"""
SVG_CSS = "svg * { stroke-linejoin: round; stroke-linecap: butt; }\n"  # as matplotlib writes it

# ── Figures ──


def titles(fig: Figure) -> str:
    """Return the titles of a figure's axes, a sentence each: its text alternative."""
    return ". ".join(ax.get_title() for ax in fig.axes if ax.get_title())


def svg(fig: Figure, name: str, alt: str) -> str:
    """Return a figure as inline SVG in the text color of the page; `name` makes its ids unique.

    A name from data may hold $, which begins no formula here.
    """
    out = io.StringIO()
    for label in fig.findobj(Text):
        label.set_parse_math(False)
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        fig.savefig(out, format="svg", transparent=True, metadata=no_metadata, dpi=160)
    plt.close(fig)
    code = out.getvalue()
    head, body = code[code.index("<svg") :].split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', head)
    assert view_box, "matplotlib wrote an SVG without a viewBox"
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'href="#', f'href="#{name}-', body).replace("url(#", f"url(#{name}-")
    body = re.sub(r"#000000\b", "currentColor", body)
    body = re.sub(r"font: ([\w. ]*?px) [^;\"]*", r"font: \1 system-ui, sans-serif", body)
    return f'<svg {view_box[0]} role="img" aria-label="{text(alt)}">{body}'


def drawing(fig: Figure, name: str, caption: str = "") -> str:
    """Return a figure with its caption; on a narrow screen it scrolls inside its own box."""
    alt = titles(fig)
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return (
        f'<figure><div class="wide" tabindex="0" role="group" aria-label="{text(alt)}">'
        f"{svg(fig, name, alt)}</div>{below}</figure>"
    )


# ── Words and tables ──


def text(value: Any) -> str:
    """Return data as escaped HTML text: numbers with separators, everything else as JSON."""
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, bool) or value is None or isinstance(value, list | dict):
        return escape(json.dumps(value))
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def table(
    rows: dict,
    caption: str,
    head: tuple[str, str] = ("name", "value"),
    ours: str = "",
    digits: int | None = None,
) -> str:
    """Return a table of two columns.

    ours: the row to highlight. digits: decimals of the values, which are then right-aligned.
    """
    side = "" if digits is None else ' class="number"'
    row_tag = {True: '<tr class="ours">', False: "<tr>"}
    body = "".join(
        f'{row_tag[name == ours]}<th scope="row">{text(str(name))}</th>'
        f"<td{side}>{text(v if digits is None else f'{v:.{digits}f}')}</td></tr>"
        for name, v in rows.items()
    )
    return (
        f"<table><caption>{text(caption)}</caption><thead><tr>"
        f'<th scope="col">{text(head[0])}</th><th scope="col"{side}>{text(head[1])}</th>'
        f"</tr></thead><tbody>{body}</tbody></table>"
    )


def tiles(values: dict[str, str]) -> str:
    """Return key figures as a grid of large numbers."""
    pairs = (f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for k, v in values.items())
    return f'<dl class="tiles">{"".join(pairs)}</dl>'


# ── The page ──


def hash_source(text: str) -> str:
    """Return the source expression that allows an inline script or stylesheet with this text."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def move_styles(html: str) -> tuple[str, str]:
    """Return HTML with a class in place of every style attribute, and the classes' stylesheet.

    Stylesheets inside the HTML, which matplotlib adds to every figure, are removed: `SVG_CSS` says
    the same. Text that only looks like an attribute stays as it is, because only tags are changed.
    """
    classes: dict[str, str] = {}

    def name_class(attribute: re.Match[str]) -> str:
        style = unescape(attribute[1])
        return f' class="{classes.setdefault(style, f"s{len(classes)}")}"'

    def change_tag(tag: re.Match[str]) -> str:
        return re.sub(r' style="([^"{}]*)"', name_class, tag[0])

    html = re.sub(r"<style\b[^>]*>.*?</style>", "", html, flags=re.DOTALL)
    html = re.sub(r"<\w[^<>]*>", change_tag, html)
    rules = "".join(f"svg .{name}.{name} {{ {style} }}\n" for style, name in classes.items())
    return html, rules


def page(title: str, intro: str, sections: dict[str, str]) -> str:
    """Return an HTML document: title, introduction (HTML), contents, sections by heading."""
    ids = {heading: re.sub(r"\W+", "-", heading.lower()) for heading in sections}
    links = "".join(f'<a href="#{ids[h]}">{text(h)}</a>' for h in sections)
    body = "".join(
        f'<section aria-labelledby="{ids[h]}"><h2 id="{ids[h]}">{text(h)}</h2>{html}</section>\n'
        for h, html in sections.items()
    )
    body, figure_css = move_styles(body)
    css = PAGE_CSS + SVG_CSS + figure_css
    policy = (
        f"default-src 'none'; style-src {hash_source(css)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{css}</style></head>\n"
        f"<body><header><h1>{text(title)}</h1>{intro}"
        f'<nav aria-label="Contents">{links}</nav></header>\n<main>{body}</main></body></html>\n'
    )
