"""Record the page with the shipped model as figures/play.gif, for the README.

    make film

Chromium opens the page, types a prompt, writes with drafts, and follows one token through the
layers; Pillow joins the screenshots.
"""

import io
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL.Image import Dither, Image
from PIL.Image import open as open_image
from playwright.sync_api import Page, sync_playwright

from dsv3_ref.studies.explain import ExplainConfig, run_explain
from dsv3_ref.viz.explainer import SHIPPED_MODEL

ROOT = Path(__file__).resolve().parent.parent
SIZE = {"width": 900, "height": 620}
PROMPT = "My fellow Americans, tonight"
COLORS = 64
Frame = tuple[Image, int]  # a picture, and the milliseconds that it stays


def snap(page: Page, milliseconds: int) -> Frame:
    """Return a screenshot that stays for a while."""
    image = open_image(io.BytesIO(page.screenshot())).convert("RGB")
    return image.quantize(COLORS, dither=Dither.NONE), milliseconds


def scroll_to(page: Page, selector: str) -> None:
    """Bring the first element of a selector near the top of the window."""
    page.locator(selector).first.evaluate(
        "e => scrollTo(0, e.getBoundingClientRect().top + scrollY - 90)"
    )


def play(page: Page) -> list[Frame]:
    """Use the page as a reader would; return the frames."""
    prompt = page.get_by_label("Text for the model to continue")
    prompt.fill("")
    frames = []
    for end in range(3, len(PROMPT) + 3, 3):
        prompt.fill(PROMPT[:end])
        frames.append(snap(page, 90))
    page.get_by_role("button", name="Back to the prompt").click()
    frames.append(snap(page, 600))
    for _ in range(24):
        page.get_by_role("button", name="One token").click()
        frames.append(snap(page, 140))
    frames.append(snap(page, 1000))
    page.locator("#token-6").click()
    for selector in ("#path", '[data-layer="layers.1."]', '[data-layer="layers.2."] .groups'):
        scroll_to(page, selector)
        frames.append(snap(page, 1400))
    page.locator('[data-layer="layers.2."] .expert.chosen').first.click()
    frames.append(snap(page, 1600))
    scroll_to(page, '[data-about="logits"]')
    frames.append(snap(page, 2000))
    return frames


def main() -> None:
    """Write the page, play and save the frames."""
    with TemporaryDirectory() as folder, sync_playwright() as p:
        html = Path(folder) / "page.html"
        run_explain(ExplainConfig(SHIPPED_MODEL, html))
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        page.goto(html.as_uri())
        images, durations = zip(*play(page))
        browser.close()
    out = ROOT / "figures/play.gif"
    images[0].save(
        out, save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=True
    )
    print(f"{out.relative_to(ROOT)}: {len(images)} frames, {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
