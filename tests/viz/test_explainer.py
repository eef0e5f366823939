"""The page with a model inside: its JavaScript computes what the chapters' Python does."""

import json
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pages import IN_CHROMIUM, opener

from dsv3_ref import save_hf
from dsv3_ref.config import TINY, UserError
from dsv3_ref.data.tokenizer import BOS, EOS, SPECIAL, train_tokenizer
from dsv3_ref.model import Transformer
from dsv3_ref.mtp import mtp_hidden_states
from dsv3_ref.studies.explain import ExplainConfig, check_splits, run_explain
from dsv3_ref.viz import explainer as page_module
from dsv3_ref.viz.explainer import explainer, quantize_to_int8, round_weights

VOCAB = 320
SMALL = replace(
    TINY, vocab_size=VOCAB, dim=24, inter_dim=40, moe_inter_dim=8, n_layers=3, n_heads=3,
    q_lora_rank=12, kv_lora_rank=20, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6,
    n_activated_experts=3, max_seq_len=64, original_seq_len=16, rope_factor=4.0, init_std=0.3,
)  # fmt: skip
CONFIGS = {
    "v3": SMALL,
    "v2": replace(
        SMALL, q_lora_rank=0, score_func="softmax", n_expert_groups=1, n_limited_groups=1,
        n_shared_experts=2, n_mtp_layers=0, route_scale=1.0,
    ),
}  # fmt: skip
TEXTS = [
    "My fellow Americans,",
    "  two  spaces\n\n\tand tabs ",
    "12345 and 1,000.5 e-7",
    "naïve café — “quoted”",
    "漢字かな交じりカタカナ",
    "🙂👩‍👩‍👧 emoji",
    "x=[1,2];\r\nfoo_bar()\r\n",
    "\u0085\ufeff\u200b odd\u2003spaces",
    SPECIAL[0],
    "עברית العربية हिन्दी",
    "",
    "don't!!! …ok?",
    "\ufeffbyte order mark",
]

pytestmark = IN_CHROMIUM


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 3, VOCAB)


@pytest.fixture(scope="module")
def open_page(tmp_path_factory, tokenizer):
    """Return a function that opens the page of a model."""
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    with opener(tmp_path_factory.mktemp("pages")) as opened:
        yield lambda model, **options: opened(
            explainer(model, tokenizer, bos, eos, ["My fellow", "The"]), **options
        )


def built(name: str) -> Transformer:
    """A model with biases that move the choice of experts."""
    torch.manual_seed(0)
    model = Transformer(CONFIGS[name])
    for key, buffer in model.named_buffers():
        if key.endswith("gate.bias"):
            buffer.normal_(0, 0.2)
    return model


@pytest.fixture(scope="module")
def page(open_page):
    return open_page(built("v3"))


LOGITS = """tokens => { const { model } = explainer; model.reset();
    return tokens.map(token => { const t = model.step(token);
        return { logits: Array.from(t.logits), draft: t.draft && Array.from(t.draft.logits),
                 chosen: t.layers.map(layer => layer.routing?.chosen ?? null) }; }); }"""


@torch.no_grad()
def expected(model: Transformer, tokens: list[int]):
    """Logits, routes and MTP's logits by the chapters' modules, with the page's weights."""
    tokens_bs = torch.tensor([tokens])
    hidden, routes = model.hidden_states(tokens_bs)
    drafts = [model.head(h)[0] for h, _ in mtp_hidden_states(model, hidden, tokens_bs)[:1]]
    return model.head(hidden)[0], routes, drafts


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_routes_and_drafts_equal_those_of_pytorch(open_page, name, request):
    model = built(name)
    page = open_page(model)
    model.load_state_dict(round_weights(model))
    count = 50 if request.config.getoption("--full") else 5
    for seed in range(count):
        torch.manual_seed(seed)
        tokens = torch.randint(VOCAB, (torch.randint(2, 40, ()).item(),)).tolist()
        got = page.evaluate(LOGITS, tokens)
        logits, routes, drafts = expected(model, tokens)
        assert_close(torch.tensor([t["logits"] for t in got]), logits)
        for layer, route in enumerate(routes, start=SMALL.n_dense_layers):
            assert [t["chosen"][layer] for t in got] == route.topk_ids_bsk[0].tolist()
        for draft in drafts:
            assert_close(torch.tensor([t["draft"] for t in got[1:]]), draft)
    assert bool(drafts) == (name == "v3")


def assert_close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert wanted.abs().max() > 0.5  # logits that say something
    assert (got - wanted).abs().max() < 1e-3


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_split_as_by_the_tokenizer(page, tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert page.evaluate("text => explainer.tokenizer.encode(text)", text) == ids
    assert page.evaluate("ids => explainer.tokenizer.decode(ids)", ids) == text


def test_any_text_is_split_as_by_the_tokenizer(page, tokenizer):
    @given(st.text(st.characters(codec="utf-8"), max_size=40))
    def check(text):
        got = page.evaluate("text => explainer.tokenizer.encode(text)", text)
        assert got == tokenizer.encode(text).ids

    check()


def test_a_draft_does_not_change_the_distribution(page):
    """The frequencies of 20,000 tokens, whose drafts come from another distribution."""
    p, q = [0.5, 0.2, 0.05, 0.25], [0.1, 0.6, 0.3, 0.0]
    counts, accepted = page.evaluate(
        """([p, q]) => { const { randomNumbers, sample, verifyDraft } = explainer;
        const random = randomNumbers(7), counts = p.map(() => 0); let accepted = 0;
        for (let i = 0; i < 20000; i++) { const r = verifyDraft(sample(q, random), q, p, random);
            counts[r.token]++; accepted += r.accepted; }
        return [counts, accepted]; }""",
        [p, q],
    )  # fmt: skip
    chi2 = sum((n - 20_000 * x) ** 2 / (20_000 * x) for n, x in zip(counts, p))
    assert chi2 < 16.3  # 0.1 % of the χ² distribution with three degrees of freedom
    assert abs(accepted / 20_000 - sum(map(min, p, q))) < 0.02


def test_an_expert_that_is_switched_off_is_not_chosen_and_the_text_changes(page):
    page.click("#clear")
    chosen = page.locator('[data-layer="layers.1."] .expert.chosen').first
    number = chosen.get_attribute("data-expert")
    before = page.inner_text("[data-about=logits]")
    chosen.click()
    button = page.locator(f'[data-layer="layers.1."] [data-expert="{number}"]')
    assert button.get_attribute("aria-pressed") == "false"
    assert "chosen" not in button.get_attribute("class").split()
    assert page.inner_text("[data-about=logits]") != before
    button.click()
    assert page.inner_text("[data-about=logits]") == before


def test_it_writes_until_the_context_is_full_and_returns_to_the_prompt(page):
    page.click("#clear")
    before = page.inner_text("#tokens")
    page.evaluate("explainer.page.random = () => 0.5")  # not the end of the document
    page.click("#write")
    page.wait_for_selector("#status:has-text('The context is full')")
    assert page.locator("#tokens [role=option]").count() == SMALL.max_seq_len
    assert re.search(r"\d+ of \d+ drafts accepted", page.inner_text("#status"))
    page.click("#clear")
    assert page.inner_text("#tokens") == before


def test_the_keyboard_follows_the_tokens(page):
    page.click("#clear")
    page.focus("#tokens")
    last = page.inner_text("#chosen")
    page.keyboard.press("Home")
    assert page.inner_text("#chosen") == "“⟨start⟩”"
    page.keyboard.press("End")
    assert page.inner_text("#chosen") == last


@pytest.mark.parametrize(
    "about", ["embedding", "attention", "latent", "dense", "router", "logits", "mtp"]
)
def test_a_box_shows_its_equation_its_weights_and_its_code(page, about):
    page.click(f"[data-about={about}] .title >> nth=0")
    assert page.locator("#about-text i").count() > 0
    assert page.locator("#about-values li").count() > 0
    assert "def " in page.inner_text("#about-code pre")


def test_a_phone_shows_the_page_without_sideways_scrolling(open_page):
    page = open_page(built("v3"), width=390, has_touch=True, color_scheme="dark")
    page.tap("[data-about=latent] .title >> nth=1")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    below = page.locator(".box.current + #about")  # the panel follows the box
    assert "RoPE" in below.inner_text()


# ── Writing the page ──


def test_rows_of_weights_are_within_half_a_step_of_their_values():
    weight = torch.randn(3, 5, 7) * torch.logspace(-3, 3, 5)[:, None]
    values, scale = quantize_to_int8(weight)
    assert values.dtype == torch.int8
    assert ((values * scale - weight).abs() <= scale * 0.501).all()
    assert (quantize_to_int8(torch.zeros(2, 3))[0] == 0).all()


def test_text_in_the_data_cannot_end_its_script(tokenizer):
    html = explainer(built("v3"), tokenizer, 0, 1, ["</script><script>alert(1)</script>"])
    assert html.count("</script>") == 3
    data = re.search(r'id="model">(.*?)</script>', html, re.DOTALL)[1]
    assert json.loads(data)["prompts"] == ["</script><script>alert(1)</script>"]


def test_models_that_no_page_can_hold_are_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(page_module, "MAX_NUMBERS", 1000)
    with pytest.raises(UserError, match="a page can hold"):
        explainer(built("v3"), tokenizer, 0, 1, ["a"])


def test_tokenizers_that_split_text_differently_are_refused(tokenizer):
    from tokenizers import Tokenizer, models

    check_splits(tokenizer)
    with pytest.raises(UserError, match="splits it differently"):
        check_splits(Tokenizer(models.BPE()))


def test_the_command_writes_the_page_of_a_directory(tokenizer, tmp_path, capsys):
    save_hf(built("v3"), tmp_path / "model")
    tokenizer.save(str(tmp_path / "model/tokenizer.json"))
    run_explain(ExplainConfig(tmp_path / "model", tmp_path / "page.html", ("Hello",)))
    assert "page.html" in capsys.readouterr().out
    assert "Hello" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "page.html"]
