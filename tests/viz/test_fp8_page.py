"""The page of FP8: it encodes, decodes and quantizes as PyTorch and chapter 09 do."""

import pytest
import torch
from pages import IN_CHROMIUM, opener

from dsv3_ref.fp8 import act_dequant, act_quant
from dsv3_ref.viz.fp8 import fp8_page

pytestmark = IN_CHROMIUM
DTYPES = {"E4M3": torch.float8_e4m3fn, "E5M2": torch.float8_e5m2}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    with opener(tmp_path_factory.mktemp("pages")) as opened:
        yield lambda **options: opened(fp8_page(), **options)


@pytest.fixture(scope="module")
def page(opened):
    return opened()


@pytest.mark.parametrize("name", DTYPES)
def test_every_byte_has_the_value_of_pytorch(page, name):
    got = page.evaluate(
        "name => Array.from({ length: 256 }, (_, b) => String(fp8.decode(b, fp8.FORMATS[name])))",
        name,
    )
    wanted = torch.arange(256, dtype=torch.uint8).view(DTYPES[name]).float()
    got = torch.tensor([float(x.replace("Infinity", "inf")) for x in got])
    assert torch.equal(got.nan_to_num(nan=-7e9), wanted.nan_to_num(nan=-7e9))


@pytest.mark.parametrize("name", DTYPES)
def test_numbers_are_rounded_as_pytorch_rounds_them(page, name):
    finite = torch.arange(256, dtype=torch.uint8).view(DTYPES[name]).float()
    finite = finite[finite.isfinite()].sort().values
    middles = (finite[1:] + finite[:-1]) / 2
    random = torch.randn(2000) * torch.logspace(-6, 2, 2000)
    x = torch.cat([finite, middles, random]).clamp(finite.min(), finite.max())
    got = page.evaluate(
        "([x, name]) => x.map(v => fp8.encode(v, fp8.FORMATS[name]))", [x.tolist(), name]
    )
    wanted = x.to(DTYPES[name])
    assert torch.equal(
        torch.tensor(got, dtype=torch.uint8).view(DTYPES[name]).float(), wanted.float()
    )
    largest = page.evaluate(
        "name => fp8.decode(fp8.encode(1e9, fp8.FORMATS[name]), fp8.FORMATS[name])", name
    )
    assert largest == finite.max()


@pytest.mark.parametrize("power", [0, 9, 20])
def test_tiles_are_quantized_as_in_the_chapter(page, power):
    exact, after = page.evaluate(
        """power => { fp8.page.power = power; const exact = fp8.withOutlier();
        return [exact, fp8.stored(exact, 128)]; }""",
        power,
    )
    wanted = act_dequant(*act_quant(torch.tensor([exact])))[0]
    assert torch.allclose(torch.tensor(after), wanted, rtol=1e-6, atol=0)


def test_bits_are_flipped_and_neighbors_found_by_keyboard(opened):
    page = opened(width=390, color_scheme="dark")
    number = page.get_by_label("number")
    number.fill("0.3")
    number.press("Enter")
    assert (
        "0.3 is stored as 2⁻² × (1 + 2/8) = 0.3125: 4.2 % off"
        in page.locator("#formula").inner_text()
    )
    page.get_by_role("button", name="next value above").press("Enter")
    assert number.input_value() == "0.34375"
    page.get_by_role("button", name="sign bit 0").press("Enter")
    assert number.input_value() == "-0.34375"
    assert page.evaluate("document.activeElement.id") == "bit-0"
    for i in range(1, 8):
        if page.locator(f"#bit-{i}").inner_text() == "0":
            page.locator(f"#bit-{i}").click()
    assert "no number" in page.locator("#formula").inner_text()
    assert page.evaluate("() => document.documentElement.scrollWidth") == 390


def test_an_outlier_harms_its_own_tile_only(opened):
    page = opened()

    def errors() -> dict:
        return page.evaluate(
            "[fp8.withOutlier()].map(x => fp8.errors(x, fp8.stored(x, fp8.page.tile)))[0]"
        )

    page.locator("#outlier").evaluate("e => { e.value = 18; e.dispatchEvent(new Event('input')); }")
    whole = errors()
    page.get_by_role("radio", name="a scale per 128").click()
    tiles = errors()
    assert whole["zeros"] > 150 and tiles["zeros"] < whole["zeros"] / 3
    assert tiles["error"] < whole["error"] and "became zero" in page.locator("#errors").inner_text()
