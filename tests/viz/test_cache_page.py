"""The page of the latent cache: its sizes are those of chapters 00 and 03."""

import pytest
from pages import IN_CHROMIUM, opener

from dsv3_ref.config import TINY, V2_LITE, V3, count_params
from dsv3_ref.viz.cache import cache_page

pytestmark = IN_CHROMIUM
CONFIGS = {"DeepSeek-V3": V3, "V2-Lite": V2_LITE, "tiny": TINY}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with opener(tmp_path_factory.mktemp("pages")) as opened:
        yield opened(cache_page(CONFIGS), width=390, color_scheme="dark")


@pytest.mark.parametrize("name", CONFIGS)
def test_mla_takes_what_the_chapters_count(page, name):
    config = CONFIGS[name]
    page.get_by_role("button", name=name).click()
    sizes = page.evaluate("cache.bytesPerToken()")
    assert sizes["MLA"] == count_params(config).cache_bytes
    assert sizes["MHA"] == 2 * 2 * config.n_layers * config.n_heads * config.v_head_dim


def test_a_slider_moves_by_keyboard_and_the_verdict_follows(page):
    page.get_by_role("button", name="DeepSeek-V3").click()
    assert "56.9 times fewer" in (before := page.locator("#verdict").inner_text())  # § 2.1.1: 576
    assert "2.25 groups" in before  # DeepSeek-V2, Table 1
    page.get_by_label("latent").press("ArrowLeft")
    assert "MLA keeps 512 numbers" in page.locator("#verdict").inner_text()
    for name in ("context", "memory"):
        page.locator(f"#{name}").press("ArrowRight")
    verdict = page.locator("#verdict").inner_text()
    assert "64K tokens" in verdict and "44 GB" in verdict
    assert page.evaluate("() => document.documentElement.scrollWidth") == 390
