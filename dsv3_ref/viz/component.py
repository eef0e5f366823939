"""Interactive pages of JavaScript: one HTML file each, which requests nothing.

The parts of a page are in `components/`: NAME.html (its body), NAME.css, and JavaScript modules.
The content security policy allows the one script and the one stylesheet that it names by hash.
"""

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dsv3_ref.viz.page import hash_source, text
from dsv3_ref.viz.style import in_notebook

COMPONENTS = Path(__file__).parent / "components"


def read(name: str) -> str:
    """Return the text of a file of `components/`."""
    return (COMPONENTS / name).read_text(encoding="utf-8")


def bundle(names: Sequence[str]) -> str:
    """Join JavaScript modules into one script: their imports and exports are of each other."""
    code = "\n".join(map(read, names))
    return re.sub(r"^export ", "", re.sub(r"^import .*\n", "", code, flags=re.M), flags=re.M)


def embed_json(value: Any) -> str:
    """Return JSON that cannot end the script element around it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def document(
    title: str, name: str, modules: Sequence[str], data: Mapping[str, str] | None = None
) -> str:
    """Return the HTML document of a component.

    modules: file names, each after those that it imports. data: text without `</script` by the id
    of the element that holds it.
    """
    css = read("base.css") + read(f"{name}.css")
    script = bundle(modules)
    policy = (
        f"default-src 'none'; script-src {hash_source(script)}; style-src {hash_source(css)}; "
        "base-uri 'none'; form-action 'none'"
    )
    elements = "".join(
        f'<script type="text/plain" id="{key}">{value}</script>\n'
        for key, value in (data or {}).items()
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{css}</style></head>\n<body>{read(f'{name}.html')}"
        f'{elements}<script type="module">{script}</script></body></html>\n'
    )


def embed(html: str, title: str, height: int) -> None:
    """Show a document below its cell, in a frame `height` pixels high; a script shows nothing.

    JupyterLab removes the frame from a notebook that it does not trust, and shows the text in it.
    """
    if in_notebook():
        from IPython.display import display

        element = (
            f'<iframe srcdoc="{escape(html)}" title="{text(title)}" sandbox="allow-scripts" '
            f'width="100%" height="{height}" style="border: 0">Run this cell to see: '
            f"{text(title)}.</iframe>"
        )
        display({"text/html": element}, raw=True)
