"""The report of a run: one file, nothing fetched, nothing unescaped, whatever the run has left."""

import bz2
import gzip
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import chain

import matplotlib.pyplot as plt
import policy
import pytest
from test_browser import CHROMIUM, browser  # noqa: F401  fixture
from test_viz import fake_rows, rl_rows

from dsv3_ref.config import UserError
from dsv3_ref.training import report
from dsv3_ref.training.report import compute_baselines, write_report

EVIL = "<script>alert('x')</script> & \"<img src=http://example.org/x.png>"
RUN = {
    "command": "dsv3 train --config tiny",
    "commit": "0123abc",
    "versions": {"torch": "2.13.0", "python": "3.11.7"},
    "moe_layers": ["layers.1.ffn", "layers.2.ffn", "mtp.0.block.ffn"],
    "model": {"dim": 256, "rope_theta": 10000.0, "score_func": EVIL},
    "settings": {"seed": 7, "model": {"dim": 256}, "recipe": {"lr": 0.001}},
    "params": {"total": 8_700_000},
}
SUMMARY = {
    "val_loss": 3.412,
    "val_bpb": 1.4872,
    "val_bpb_by_source": {"sotu": 1.4872, "stdlib": 1.5311},
    "baselines": {"gzip": 2.66, "bzip2": 1.89, "unigram": 2.16},
    "seconds": 1350.0,
    "tokens": 3_276_800,
    "samples": [{"prompt": "Fellow <b>", "text": f"citizens {EVIL}", "temperature": 0.8}],
}
VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """The tree of a page, checked while it is read: every tag closed in order, every id once."""

    def __init__(self, html: str):
        super().__init__()
        self.stack, self.tags = [], []
        self.words = []
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if not self.stack or self.stack[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def values(self, *names: str) -> list[str]:
        """The values of these attributes, of all tags."""
        pairs = chain.from_iterable(attrs.items() for _, attrs in self.tags)
        return [value for name, value in pairs if name in names]

    def all(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]


def make(folder, rows, run=RUN, summary=SUMMARY, tail=""):
    """A run directory; what is None is not written."""
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines + tail)
    for name, value in {"run": run, "summary": summary}.items():
        if value is not None:
            (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def read(folder) -> tuple[str, Page]:
    html = write_report(folder).read_text(encoding="utf-8")
    return html, Page(html)


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made but not rendered: for tests of what is on the page, not of how it looks."""

    def svg(fig, name, alt):
        plt.close(fig)
        return f'<svg id="{name}" role="img" aria-label="{alt}"></svg>'

    monkeypatch.setattr(report.page, "svg", svg)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The report of a finished run: (html, page)."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    return read(make(folder, fake_rows(120), tail='{"step": 121, "lo'))


# ── One file ──


def test_nothing_is_fetched(whole):
    html, page = whole
    loads = page.values("src", "href", "xlink:href", "data")
    assert loads and all(x.startswith(("#", "data:image/png;base64,")) for x in loads)
    assert not re.search(r"@import|url\((?!#)", html)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed"}
    assert page.all("meta")[1]["http-equiv"] == "Content-Security-Policy"


def test_the_policy_allows_one_stylesheet_and_nothing_else(whole):
    html, page = whole
    assert policy.find_faults(html) == []
    rules = policy.directives(policy.Content(html).policy)
    assert "script-src" not in rules and rules["img-src"] == ["data:"]
    assert len(page.all("style")) == 1 and page.values("style") == []
    assert len(rules["style-src"]) == 1


def test_styles_become_classes_only_in_tags():
    label = '<text>a style=&quot;b&quot; style="c"</text>'
    html, css = report.page.move_styles(f'<svg><g style="fill: none"/>{label}<style>x</style>')
    assert html == f'<svg><g class="s0"/>{label}'
    assert css == "svg .s0.s0 { fill: none }\n"
    assert report.page.move_styles('<g style="a}b{">')[1] == ""


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_a_browser_draws_it_and_runs_nothing_from_the_data(browser, tmp_path):  # noqa: F811
    """Names, samples and labels try to run; a script that is put into the file is blocked, too."""
    attack = "<script>window.ran = 1</script><img src=x onerror='window.ran = 1'>"
    run = RUN | {"command": attack, "moe_layers": [attack, "b", "c"]}
    samples = [{"prompt": attack, "text": f"{attack}</pre>{attack}", "temperature": 0.8}]
    summary = SUMMARY | {"samples": samples, "baselines": {attack: 2.0}}
    folder = make(tmp_path / "<img src=x onerror=ran=1>", fake_rows(30), run, summary)
    path = write_report(folder)
    tab, messages = browser.new_page(), []
    tab.on("console", lambda message: messages.append(message.text))
    tab.on("pageerror", lambda error: messages.append(str(error)))
    tab.goto(path.as_uri())
    assert messages == []
    assert tab.evaluate("window.ran") is None
    line = tab.locator("svg [class]").first
    assert line.evaluate("x => getComputedStyle(x).strokeLinejoin") in ("round", "miter")
    path.write_text(path.read_text().replace("</main>", f"{attack}</main>"))
    tab.goto(path.as_uri())
    assert tab.evaluate("window.ran") is None
    assert any("Content Security Policy" in message for message in messages)
    tab.close()


def test_every_link_inside_has_its_target_and_every_id_is_single(whole):
    html, page = whole
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    wanted = {x[1:] for x in page.values("href", "xlink:href") if x.startswith("#")}
    assert wanted | set(re.findall(r"url\(#([^)]+)\)", html)) <= set(ids)


def test_it_reads_on_phones_in_the_dark_and_on_paper(whole):
    html, page = whole
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all(
        "meta"
    )
    assert "prefers-color-scheme: dark" in html and "@media print" in html
    assert page.all("html") == [{"lang": "en"}]


def test_no_color_of_the_dark_page_is_lost_in_it(whole):
    ink = re.search(r"prefers-color-scheme: dark\) \{(.*?)\} \}", whole[0], re.S)[1]
    light = re.search(r":root \{(.*?)\}", whole[0], re.S)[1]
    for css in (light, ink):
        color = dict(re.findall(r"--(\w+): #(\w{6})", css))
        for name in ("ink", "soft", "link"):
            assert contrast(color[name], color["back"]) > 4.5
            assert contrast(color[name], color["card"]) > 4.5
        assert contrast(color["ink"], color["mark"]) > 4.5


def contrast(a: str, b: str) -> float:
    """WCAG 2 contrast of two colors: (L₁ + 0.05) / (L₂ + 0.05)."""
    low, high = sorted(luminance(c) for c in (a, b))
    return (high + 0.05) / (low + 0.05)


def luminance(color: str) -> float:
    rgb = [int(color[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    lin = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * lin[0] + 0.7152 * lin[1] + 0.0722 * lin[2]


def test_every_figure_says_in_words_what_it_shows(whole):
    page = whole[1]
    figures = page.all("svg")
    assert len(figures) == 10  # loss, bits, 3 loads, bias, MaxVio, schedule, gradient, speed
    assert all(f["role"] == "img" and len(f["aria-label"]) > 20 for f in figures)
    assert sum("busiest expert" in f["aria-label"] for f in figures) == 3


# ── What it says ──


def test_key_numbers(whole):
    text = whole[1].text
    for words in ("Training run tiny", "120 steps over 3,276,800 tokens in 22.5 minutes",
                  "validation loss 3.412", "1.487 bits per byte", "gzip 2.66, bzip2 1.89",
                  "stdlib 1.531", "dsv3 train --config tiny", "commit 0123abc", "torch 2.13.0",
                  "rope_theta 10,000", "recipe.lr 0.001", "total 8,700,000"):  # fmt: skip
        assert words in text, words
    assert "model.dim" not in text


def test_training_loss_is_the_running_mean(whole):
    losses = [row["loss"] for row in fake_rows(120)]
    assert f"Training loss {sum(losses[-3:]) / 3:.3f}" in whole[1].text


def test_text_from_the_run_is_escaped(whole):
    html, page = whole
    assert EVIL in page.text  # shown as it was, and parsed as words
    assert "<script" not in html and "<img" not in html and "Fellow <b>" not in html
    assert "Fellow <b>" in page.text


def test_a_prompt_is_marked_once(tmp_path, undrawn):
    both = SUMMARY | {"samples": [{"prompt": "Fellow", "text": "Fellow citizens"}]}
    html, page = read(make(tmp_path / "x", fake_rows(3), summary=both))
    assert "<mark>Fellow</mark> citizens</pre>" in html
    assert "Temperature" not in page.text


# ── Runs that are not finished, or lack something ──


def test_one_row(tmp_path):
    assert (
        "1 step over 4,096 tokens" in read(make(tmp_path / "x", fake_rows(1), summary=None))[1].text
    )


def test_no_row_yet(tmp_path):
    _, page = read(make(tmp_path / "x", [], summary=None))
    assert "No step is finished yet" in page.text and page.all("svg") == []
    assert "dim 256" in page.text


def test_a_running_run(tmp_path, undrawn):
    _, page = read(make(tmp_path / "x", fake_rows(40), summary=None))
    assert "40 steps over 163,840 tokens in 1.1 minutes so far" in page.text
    assert "Samples" not in page.text and "gzip" not in page.text


def test_metrics_alone_are_enough(tmp_path, undrawn):
    _, page = read(make(tmp_path / "x", fake_rows(40), run=None, summary=None))
    assert not {"settings", "origin", "samples"} & {h["id"] for h in page.all("h2")}
    assert any("MoE layer 2: the busiest" in svg["aria-label"] for svg in page.all("svg"))


@pytest.mark.parametrize("key", [k for k in fake_rows(1)[0] if k != "step"])
def test_any_key_may_be_absent(tmp_path, undrawn, key):
    rows = [{k: v for k, v in row.items() if k != key} for row in fake_rows(21)]
    lost = {
        "expert_load": 3,
        "loss": 1,
        "expert_bias": 1,
        "max_vio": 1,
        "grad_norm": 1,
        "tokens_per_s": 1,
    }
    assert len(read(make(tmp_path / "x", rows))[1].all("svg")) == 10 - lost.get(key, 0)


@pytest.mark.parametrize("key", SUMMARY)
def test_any_part_of_the_summary_may_be_absent(tmp_path, undrawn, key):
    for value in ({}, {key: None}):
        rest = {k: v for k, v in SUMMARY.items() if k != key} | value
        read(make(tmp_path / "x", fake_rows(21), summary=rest))


@pytest.mark.parametrize("key", RUN)
def test_any_part_of_the_run_may_be_absent(tmp_path, undrawn, key):
    for value in ({}, {key: None}):
        read(
            make(
                tmp_path / "x", fake_rows(3), run={k: v for k, v in RUN.items() if k != key} | value
            )
        )


def test_a_gate_without_biases(tmp_path, undrawn):
    rows = [row | {"expert_bias": [[], [], []]} for row in fake_rows(5)]
    assert "Gate biases" not in read(make(tmp_path / "x", rows))[1].text


def test_written_again_it_is_the_same_and_leaves_nothing(tmp_path):
    folder = make(tmp_path / "x", fake_rows(30))
    before = plt.get_fignums()
    assert write_report(folder).read_bytes() == write_report(str(folder)).read_bytes()
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["metrics.jsonl", "report.html", "run.json", "summary.json"]
    assert plt.get_fignums() == before


def test_mistakes_are_told_in_a_sentence(tmp_path, undrawn):
    with pytest.raises(
        UserError, match="holds no metrics.jsonl: give the directory of a training run"
    ):
        write_report(tmp_path)
    make(tmp_path / "x", fake_rows(2))
    (tmp_path / "x" / "run.json").write_text("{")
    with pytest.raises(UserError, match="run.json is not JSON"):
        write_report(tmp_path / "x")


def test_values_that_cannot_be_shown_are_a_sentence(tmp_path, undrawn, monkeypatch):
    folder = make(tmp_path, fake_rows(2), summary=SUMMARY | {"val_bpb": "x"})
    monkeypatch.setattr(sys, "argv", ["report", str(folder)])
    with pytest.raises(SystemExit, match="error: the run holds values that cannot be shown"):
        report.main()


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "dsv3_ref.training.report"]
    folder = make(tmp_path / "x", fake_rows(5))
    done = subprocess.run([*command, folder], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(folder / "report.html") and not done.stderr
    wrong = subprocess.run([*command, tmp_path], capture_output=True, text=True)
    assert wrong.returncode == 1 and "Traceback" not in wrong.stderr
    assert "holds no metrics.jsonl" in wrong.stderr


# ── Baselines ──


def test_baselines_by_hand():
    text = "äb" * 40  # 3 bytes a pair
    got = compute_baselines(text, [2, 5, 0, 0], [0, 1] * 40)
    assert got["unigram"] == pytest.approx(40 * -math.log2(3 / 11 * 6 / 11) / 120)
    assert got["gzip"] == 8 * len(gzip.compress(text.encode(), 9)) / 120
    assert got["bzip2"] == 8 * len(bz2.compress(text.encode(), 9)) / 120


def test_an_even_unigram_needs_log2_of_the_vocabulary():
    assert compute_baselines("abcd", [0] * 256, b"abcd")["unigram"] == pytest.approx(8.0)


def test_a_token_never_seen_is_finite_and_dear():
    seen, unseen = (compute_baselines("a", [9, 0], [i])["unigram"] for i in (0, 1))
    assert seen == pytest.approx(math.log2(11 / 10)) and unseen == pytest.approx(math.log2(11))


def test_no_text_has_no_bits():
    with pytest.raises(ValueError, match="no text"):
        compute_baselines("", [1], [])


def test_key_numbers_prefer_the_summary():
    rows = fake_rows(20)
    assert report.collect_key_numbers(rows, {"val_loss": 1.0})["validation loss"] == "1.000"
    assert report.collect_key_numbers(rows, {})["validation loss"] == f"{rows[-1]['val_loss']:.3f}"
    assert report.collect_key_numbers([], {}) == {}


def test_a_run_of_rl_shows_rewards_and_what_was_said_before_and_after(tmp_path, undrawn):
    samples = [{"prompt": "2 + 2?", "text": "4", "before": f"5 {EVIL}", "temperature": 0.0}]
    summary = {"before": {"sums": {"greedy": 0.1}}, "samples": samples}
    html, page = read(make(tmp_path, rl_rows(60), summary=summary))
    assert {"reward", "watch"} <= {tag.get("id") for tag in page.all("svg")}
    assert "loss" not in {tag.get("id") for tag in page.all("svg")}
    assert EVIL not in html and f"before: 5 {EVIL} after: 4".replace("  ", " ") in page.text


def test_skipped_steps_are_told_and_drawn(tmp_path, undrawn):
    """A row without numbers leaves gaps in the curves, not a broken page."""
    rows = fake_rows(60)
    rows[20] |= {"skipped": "spike", "grad_norm": 900.0}
    rows[30] |= {"skipped": "nan", "grad_norm": None, "loss": None, "loss_total": None}
    rows[30]["mtp_loss"] = [None for _ in rows[30]["mtp_loss"]]
    rows[40]["rolled_back_from"] = 45
    _, page = read(make(tmp_path, rows))
    said = "1 step skipped (spike), 1 step skipped (nan), 1 rollback to a checkpoint."
    assert said in page.text
