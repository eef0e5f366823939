"""A chapter in JupyterLab in a real browser: it runs, and a slider redraws its figure."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
RUN_ALL = """async () => {
    const notebook = jupyterapp.shell.currentWidget;
    await notebook.context.ready;
    await notebook.sessionContext.ready;
    await notebook.sessionContext.session.kernel.info;
    await jupyterapp.commands.execute("notebook:run-all-cells");
}"""
TO_SLIDERS = """async () => {
    const notebook = jupyterapp.shell.currentWidget.content;
    const i = notebook.widgets.findIndex(x => /^play\\(/m.test(x.model.sharedModel.getSource()));
    notebook.activeCellIndex = i;
    await notebook.scrollToItem(i);
}"""
REDRAWN = """before => [...document.querySelectorAll(".jp-OutputArea img")]
    .some(image => !before.includes(image.src))"""

pytestmark = [
    pytest.mark.full,
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine"),
]


@pytest.fixture
def lab(tmp_path):
    """The address of a JupyterLab on a copy of the notebooks."""
    shutil.copytree(NOTEBOOKS, tmp_path / "notebooks")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", "--allow-root"]
    command += [f"--port={port}", "--IdentityProvider.token=", "--LabApp.news_url=None"]
    command += ["--LabApp.expose_app_in_browser=True", f"--ServerApp.root_dir={tmp_path}"]
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with (tmp_path / "lab.log").open("w") as log:
        env = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}  # as a reader has it
        server = subprocess.Popen(command, stdout=log, stderr=log, env=env)
        yield wait_for(f"http://127.0.0.1:{port}", server)
        server.terminate()
        server.wait(20)


def wait_for(address: str, server) -> str:
    for _ in range(300):
        assert server.poll() is None, "the server ended"
        try:
            urllib.request.urlopen(f"{address}/api").close()
            return address
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(address)


@pytest.fixture
def page(tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as p:
        context = p.chromium.launch_persistent_context(
            tmp_path / "profile", executable_path=CHROMIUM, args=FLAGS, headless=True,
            viewport={"width": 1200, "height": 900},
        )  # fmt: skip
        yield context.pages[0]
        context.close()


@pytest.mark.parametrize("chapter", ["09_fp8", "10_triton"])
def test_a_slider_redraws_its_figure(lab, page, tmp_path, chapter):
    page.goto(f"{lab}/lab/tree/notebooks/{chapter}.ipynb?reset")
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
    page.evaluate(RUN_ALL)
    page.evaluate(TO_SLIDERS)  # cells out of sight are not in the page
    slider = page.locator(".jp-OutputArea [role=slider]").first
    slider.wait_for(timeout=60_000)
    page.wait_for_selector(".widget-output img")
    before = page.evaluate("[...document.querySelectorAll('.jp-OutputArea img')].map(i => i.src)")
    assert before
    slider.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(REDRAWN, arg=before, timeout=30_000)
    page.screenshot(path=tmp_path / "lab.png")
