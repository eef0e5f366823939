"""The chapters in JupyterLab in a real browser: they run, and every control redraws its figure.

Screenshots are in the folder given by `--basetemp`, or in the temporary folder of pytest.
"""

import json
import os
import re
import shlex
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
NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SHORT_CHAPTER = """from dsv3_ref.viz import figure, play, show
def draw(power, factor):
    fig, ax = figure()
    ax.plot([factor * x**power for x in range(5)])
    show(fig)
play(draw, power=[1, 2, 3], factor=(0.0, 4.0, 0.5))
"""  # in the place of chapters, which take minutes all together
RUN_ALL = """async () => {
    const notebook = jupyterapp.shell.currentWidget;
    await notebook.context.ready;
    await notebook.sessionContext.ready;
    await notebook.sessionContext.session.kernel.info;
    await jupyterapp.commands.execute("notebook:run-all-cells");
}"""
FAILED = """() => jupyterapp.shell.currentWidget.content.widgets
    .flatMap(cell => cell.model.toJSON().outputs ?? [])
    .filter(output => output.output_type === "error")
    .map(output => output.ename + ": " + output.evalue)"""
TO_CELL = """async text => {
    const notebook = jupyterapp.shell.currentWidget.content;
    const i = notebook.widgets.findIndex(x => x.model.sharedModel.getSource().includes(text));
    notebook.activeCellIndex = i;
    await notebook.scrollToItem(i);
}"""
PICTURES = "cell => [...cell.querySelectorAll('img')].map(image => image.src)"
NEW_CELL = """async source => {
    const notebook = jupyterapp.shell.currentWidget;
    await notebook.context.ready;
    await notebook.sessionContext.ready;
    await notebook.sessionContext.session.kernel.info;
    await jupyterapp.commands.execute("notebook:insert-cell-above");
    notebook.content.activeCell.model.sharedModel.setSource(source);
    await jupyterapp.commands.execute("notebook:run-cell");
}"""
WATCH = """from dsv3_ref.viz import live
size = "--start-batch-size 1 --global-batch-size 1 --seq-len 32"
control = live.launch_run(f"train --config tiny --steps 400 {size}")
"""
EMBED = """from dsv3_ref.viz.component import embed
from dsv3_ref.viz.schedule import schedule_page
embed(schedule_page(), "a pipeline, step by step", height=1100)
"""
REDRAWN = """before => [...document.querySelectorAll(".jp-Cell.jp-mod-active img")]
    .some(image => !before.includes(image.src))"""
BEYOND = """n => +document.querySelector("[role=status]").innerText.match(/step (\\d+)/)?.[1] > n"""
CONTROLS = "[role=slider], .widget-output-controls select, select, input[type=text]"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine"),
]


def cells_with_controls() -> list:
    """Return (chapter, lines of cells with controls); chapters are for `make test-full`."""
    params = [pytest.param("short", [SHORT_CHAPTER.splitlines()[-1]], id="short")]
    for path in sorted(NOTEBOOKS.glob("[0-9]*.py")):
        lines = re.findall(r"^(?:play|explore_routing)\(.*", path.read_text(), re.M)
        chapter = pytest.param(path.stem, lines, id=path.stem, marks=pytest.mark.full)
        params += [chapter] if lines else []
    return params


def lab_command(folder: Path, *args: str) -> list[str]:
    """Return the command of `make lab` for a copy of the notebooks."""
    settings = f"CURDIR={folder}", f"BIN={Path(sys.executable).parent}", f"ARGS={shlex.join(args)}"
    makefile = NOTEBOOKS.parent / "Makefile"
    printed = subprocess.run(
        ["make", "-n", "--no-print-directory", "-f", makefile, "lab", *settings],
        cwd=folder, capture_output=True, text=True, check=True,
    ).stdout.replace("\\\n", " ")  # fmt: skip
    return shlex.split(printed[re.search(r"^.*/jupyter lab ", printed, re.M).start() :])


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Start `make lab` on a copy of the notebooks, which run in their short form; yield its URL."""
    tmp = tmp_path_factory.mktemp("lab")
    shutil.copytree(NOTEBOOKS, tmp / "notebooks", ignore=shutil.ignore_patterns("runs"))
    os.utime(tmp / "notebooks/01_ops.py", (0, 0))  # decades older than its .ipynb
    shutil.copytree(NOTEBOOKS.parent / "figures", tmp / "figures")
    shutil.copy(NOTEBOOKS.parent / "pyproject.toml", tmp)  # settings of jupytext
    cell = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    cell |= {"id": "short", "source": SHORT_CHAPTER}
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    short = {"cells": [cell], "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    (tmp / "notebooks/short.ipynb").write_text(json.dumps(short))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    args = ["--no-browser", "--ip=127.0.0.1", "--allow-root", f"--port={port}"]
    args += ["--IdentityProvider.token=", "--LabApp.news_url=None"]
    settings = tmp / "settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"fetchNews": "false"}')  # no dialog over the page
    args += [f"--LabApp.user_settings_dir={tmp / 'settings'}"]
    args += ["--LabApp.expose_app_in_browser=True"]
    args += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with (tmp / "lab.log").open("w") as log:
        env = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}  # as on a reader's machine
        env |= {"DSV3_SHORT": "1", "OMP_NUM_THREADS": "1"}
        server = subprocess.Popen(lab_command(tmp, *args), stdout=log, stderr=log, env=env)
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


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as p:
        context = p.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"), executable_path=CHROMIUM, args=FLAGS,
            headless=True, viewport={"width": 1200, "height": 900},
        )  # fmt: skip
        yield context
        context.close()


@pytest.fixture
def page(browser, tmp_path):
    page = browser.new_page()
    yield page
    page.screenshot(path=tmp_path / "page.png")
    page.evaluate("window.jupyterapp?.serviceManager.sessions.shutdownAll()")
    page.close()


def run(page, lab: str, chapter: str) -> None:
    """Open a chapter and run all cells; none may fail."""
    page.goto(f"{lab}/lab/tree/notebooks/{chapter}.ipynb?reset")
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
    page.set_default_timeout(120_000)
    page.evaluate(RUN_ALL)
    assert page.evaluate(FAILED) == []


def active(page, line: str):
    """Scroll to the cell with this line and return it; the page omits cells out of sight."""
    page.evaluate(TO_CELL, line)
    return page.locator(".jp-Cell.jp-mod-active")


def move(page, control, by: str) -> None:
    """Change a control to another value, by keyboard or mouse."""
    control.scroll_into_view_if_needed()
    kind = control.evaluate("x => x.getAttribute('role') ?? x.tagName")
    if kind == "SELECT":
        values = control.evaluate("x => [...x.options].map(o => o.index)")
        chosen = control.evaluate("x => x.selectedIndex")
        control.select_option(index=next(i for i in values if i != chosen))
    elif kind == "INPUT":
        control.fill("We, the people")
        page.keyboard.press("Enter")
    elif by == "keyboard":
        control.focus()
        low = control.get_attribute("aria-valuenow") == control.get_attribute("aria-valuemax")
        page.keyboard.press("ArrowLeft" if low else "ArrowRight")
    else:
        box = control.evaluate_handle("x => x.closest('.noUi-target')").as_element().bounding_box()
        low = float(control.get_attribute("aria-valuenow")) < 0.5 * (
            float(control.get_attribute("aria-valuemin"))
            + float(control.get_attribute("aria-valuemax"))
        )
        at = box["x"] + (0.8 if low else 0.2) * box["width"], box["y"] + box["height"] / 2
        page.mouse.click(*at)


def test_the_lab_lists_the_chapters_once_and_shows_their_pictures(lab):
    """Chapters without the .py beside them, even if a checkout wrote the .ipynb much later."""
    with urllib.request.urlopen(f"{lab}/api/contents/notebooks") as reply:
        names = [entry["name"] for entry in json.load(reply)["content"]]
    assert "00_tour.ipynb" in names and not [x for x in names if x.endswith(".py")]
    picture = urllib.request.Request(f"{lab}/files/figures/00_model.svg", headers={"Referer": lab})
    with urllib.request.urlopen(picture) as reply:
        assert b"<svg" in reply.read()
    with urllib.request.urlopen(f"{lab}/api/contents/notebooks/01_ops.ipynb") as reply:
        assert json.load(reply)["type"] == "notebook"


@pytest.mark.parametrize("chapter, lines", cells_with_controls())
def test_every_control_redraws_its_figure(lab, page, chapter, lines):
    run(page, lab, chapter)
    for line in lines:
        cell = active(page, line)
        cell.locator(".widget-output img").first.wait_for()
        controls = cell.locator(CONTROLS)
        for by, control in zip(("keyboard", "mouse"), (controls.first, controls.last)):
            before = cell.evaluate(PICTURES)
            assert before
            move(page, control, by)
            page.wait_for_function(REDRAWN, arg=before, timeout=60_000)
    assert page.evaluate(FAILED) == []


@pytest.mark.full
def test_a_page_in_a_frame_can_be_played(lab, page):
    page.goto(f"{lab}/lab/tree/notebooks/short.ipynb?reset")
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
    page.evaluate(NEW_CELL, EMBED)
    frame = page.frame_locator("iframe[title='a pipeline, step by step']")
    frame.get_by_role("radio", name="1F1B").click(timeout=60_000)
    frame.get_by_role("button", name="One event on").click()
    assert frame.locator("#time-value").inner_text() == "1.0"


@pytest.mark.full  # test_live does the same without a browser
def test_a_run_is_watched_paused_stopped_and_resumed(lab, page):
    """The dashboard follows a real run, and the page stays responsive."""
    page.goto(f"{lab}/lab/tree/notebooks/00_tour.ipynb?reset")
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
    page.set_default_timeout(120_000)
    page.evaluate(NEW_CELL, WATCH)
    cell = page.locator(".jp-Cell.jp-mod-active")

    def button(name: str):
        return cell.get_by_role("button", name=name)

    def steps() -> int:
        return int(re.search(r"step (\d+)", status.inner_text())[1])

    status, tab = cell.locator("[role=status]"), cell.locator(".widget-image").first
    button("start").click()
    tab.wait_for()
    first_step, first_image = steps(), tab.get_attribute("src")
    page.wait_for_function(REDRAWN, arg=[first_image])
    page.wait_for_function(BEYOND, arg=first_step)
    button("pause").click()
    page.wait_for_timeout(2500)
    paused_step = steps()
    page.wait_for_timeout(2500)
    assert steps() == paused_step
    cell.get_by_role("tab", name="Experts").click()
    page.wait_for_function("() => document.querySelectorAll('.widget-image[src^=blob]').length > 1")
    button("continue").click()
    button("stop").click()
    button("resume").wait_for()
    assert "stopped" in cell.inner_text()
    button("resume").click()
    page.wait_for_function(BEYOND, arg=paused_step + 2)
    button("stop").click()
    button("resume").wait_for()
    assert page.evaluate(FAILED) == []
