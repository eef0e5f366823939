"""Pages of one HTML file, opened in Chromium."""

import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = "--no-sandbox --disable-gpu --disable-quic --disable-background-networking".split()
IN_CHROMIUM = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM, reason="no Chromium")]


@contextmanager
def opener(folder: Path):
    """Yield a function that opens HTML; no request may leave a page, no error may occur."""
    sync_api = pytest.importorskip("playwright.sync_api")
    problems = []

    def opened(html: str, width=1200, **options):
        path = folder / "page.html"
        path.write_text(html, encoding="utf-8")
        page = browser.new_page(viewport={"width": width, "height": 900}, **options)
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: problems.append(str(e)))
        page.on("request", lambda r: problems.append(r.url) if r.url != path.as_uri() else None)
        page.goto(path.as_uri())
        return page

    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        browser.close()
    assert problems == []
