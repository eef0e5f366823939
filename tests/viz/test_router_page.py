"""The page of a router: it routes, counts and corrects biases as chapter 04 does."""

import pytest
import torch
from pages import IN_CHROMIUM, opener

from dsv3_ref.checkpoints.native import load
from dsv3_ref.data.tokenizer import load_tokenizer
from dsv3_ref.moe import max_vio, route, tokens_per_expert, update_expert_bias
from dsv3_ref.viz.explainer import SHIPPED_MODEL
from dsv3_ref.viz.routing import router_page, trace_route

pytestmark = [
    *IN_CHROMIUM,
    pytest.mark.skipif(not SHIPPED_MODEL.is_dir(), reason="no checkout of the repository"),
]
TEXT = "My fellow Americans, the state of the Union is strong."
LAYER = "layers.2.ffn"


@pytest.fixture(scope="module")
def model():
    return load(SHIPPED_MODEL, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def opened(model, tmp_path_factory):
    html = router_page(model, load_tokenizer(SHIPPED_MODEL), TEXT, LAYER)
    with opener(tmp_path_factory.mktemp("pages")) as opened:
        yield lambda **options: opened(html, **options)


@pytest.fixture(scope="module")
def page(opened):
    return opened()


def test_the_biases_of_the_model_give_the_routes_of_the_model(model, page):
    tokens = load_tokenizer(SHIPPED_MODEL).encode(TEXT).ids
    wanted = trace_route(model, tokens, LAYER)
    routes = page.evaluate("router.routeAll(router.data.bias)")
    assert [r["chosen"] for r in routes] == wanted.topk_ids_bsk[0, 1:].tolist()  # without BOS
    weights = torch.tensor([r["weights"] for r in routes])
    assert torch.allclose(weights, wanted.topk_weights_bsk[0, 1:], atol=1e-5)
    assert "".join(page.evaluate("router.data.tokens")) == TEXT


def test_each_step_of_the_rule_is_that_of_the_chapter(model, page):
    logits_bse = torch.tensor([page.evaluate("router.data.logits")])
    bias_e = torch.zeros(16)
    page.get_by_role("button", name="Biases to zero").click()
    first = None
    for _ in range(30):
        load_e = tokens_per_expert(route(logits_bse, bias_e, model.config).topk_ids_bsk, 16)
        assert page.evaluate("router.page.load") == load_e.tolist()
        first = first or max_vio(load_e)
        update_expert_bias(bias_e, load_e, 0.01)
        page.get_by_role("button", name="One step").click()
        assert page.evaluate("router.page.bias") == pytest.approx(bias_e.tolist(), abs=1e-6)
    assert f"MaxVio {max_vio(load_e):.2f}" != f"MaxVio {first:.2f}" and max_vio(load_e) < first


def test_a_bias_is_moved_by_keyboard_and_said(opened):
    page = opened()
    busiest = int(page.locator("#status").inner_text().partition("expert ")[2].split()[0])
    before = page.evaluate("router.page.load")[busiest]
    slider = page.get_by_role("slider", name=f"bias of expert {busiest}", exact=True)
    slider.focus()
    for _ in range(60):
        page.keyboard.press("ArrowDown")
    assert page.evaluate("router.page.bias")[busiest] == pytest.approx(-0.6)
    assert page.evaluate("router.page.load")[busiest] < before
    assert "0 of" not in page.locator("#status").inner_text()


def test_a_token_is_chosen_by_keyboard_or_mouse(opened):
    page = opened(width=390, color_scheme="dark")
    page.locator("#tokens").focus()
    page.keyboard.press("ArrowDown")
    assert page.locator("#chosen").inner_text() == "␣fellow"
    page.locator("#token-0").click()
    assert page.locator("#chosen").inner_text() == "My"
    assert page.evaluate("() => document.documentElement.scrollWidth") == 390


def test_the_rule_runs_until_it_is_stopped(opened):
    page = opened()
    page.get_by_role("button", name="Run the rule").click()
    page.wait_for_function("() => Math.max(...router.page.bias) > 0.03")
    page.get_by_role("button", name="Stop").click()
    stopped = page.evaluate("router.page.bias")
    page.wait_for_timeout(150)
    assert page.evaluate("router.page.bias") == stopped
