"""Long context: recipes, needles, position encodings, chunked prefill, and `dsv3 extend`."""

import json
from dataclasses import replace
from pathlib import Path

import miniruns
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from miniruns import metrics, options, override, results

from dsv3_ref.checkpoints.native import load, load_checkpoint_config
from dsv3_ref.cli import main
from dsv3_ref.config import SMALL, TINY, V2_LITE, V3, count_params
from dsv3_ref.cpu.decoder import blockwise_attention
from dsv3_ref.decode import Decoder, stream
from dsv3_ref.long_context import (
    EXTENSION_RECIPES,
    build_needle,
    cache_bytes,
    extend_config,
    extension_recipe,
    insert_needle,
    interpolated_decoder,
    kv_cache_numbers_per_token,
    log_spaced_bins,
    needle_recall,
    nll_by_position,
    with_config,
)
from dsv3_ref.mla import GQA, LayerKVCache, attention
from dsv3_ref.model import Transformer
from dsv3_ref.optim import get_batch_size_schedule, get_bias_update_rate, get_lr, get_mtp_weight
from dsv3_ref.training import loop

# ── The report's numbers (§4.3) ──


@pytest.mark.parametrize("phase, length, rows", [("32k", 32_768, 1920), ("128k", 131_072, 480)])
def test_a_phase_has_the_settings_of_the_report(phase, length, rows):
    r = extension_recipe(phase, "v3", 4096)
    assert (r.seq_len, r.steps) == (length, 1000)
    assert set(get_batch_size_schedule(r, r.steps)) == {rows}
    for step in (0, 1, 500, 999):
        done = step / 1000
        assert get_lr(r, step, done) == 7.3e-6 and get_bias_update_rate(r, done) == 0
        assert get_mtp_weight(r, done) == 0.1


def test_both_phases_use_one_rope_factor():
    before = replace(V3, rope_factor=1.0, max_seq_len=4096)
    assert extend_config(before) == V3 and extend_config(V3) == V3
    for c in (TINY, SMALL):
        longer = extend_config(c)
        assert (longer.rope_factor, longer.max_seq_len) == (40, 40 * c.original_seq_len)
        assert extend_config(longer) == longer
        assert replace(longer, rope_factor=1.0, max_seq_len=c.max_seq_len) == c


def test_sequence_length_follows_pretraining():
    for phase, times in (("32k", 8), ("128k", 32)):
        for size, c in (("tiny", TINY), ("small", SMALL), ("mine.json", V2_LITE)):
            r = extension_recipe(phase, size, c.original_seq_len)
            assert r.seq_len == times * c.original_seq_len <= extend_config(c).max_seq_len
    tiny = [extension_recipe(phase, "tiny", 256) for phase in EXTENSION_RECIPES]
    tokens_per_step = {recipe.global_batch_size * recipe.seq_len for recipe in tiny}
    assert len(tokens_per_step) == 1


# ── Needles ──


def encode_letters(text: str) -> list[int]:
    return [ord(c) % 64 for c in text]


NEEDLE = build_needle(encode_letters)
SIZE = len(NEEDLE.sentence(0))


def find_needles(row: list[int]) -> list[int]:
    """Return the positions at which a needle begins."""
    n = len(NEEDLE.prefix)
    return [i for i in range(len(row)) if row[i : i + n] == NEEDLE.prefix]


@given(st.integers(1, 400), st.integers(0, 2**30))
def test_a_row_with_needles_keeps_its_length_and_has_one_key(length, seed):
    row = insert_needle([63] * length, NEEDLE, np.random.default_rng(seed))
    needles = [tuple(row[i : i + SIZE]) for i in find_needles(row)]
    assert len(row) == length and len(set(needles)) <= 1
    assert row.count(63) == length - SIZE * len(needles)
    assert (2 <= len(needles) <= 33) if length >= 2 * SIZE else not needles


def test_keys_and_gaps_vary():
    rng = np.random.default_rng(0)
    rows = [insert_needle([63] * 2048, NEEDLE, rng) for _ in range(300)]
    positions = [find_needles(row) for row in rows]
    keys = {row[first + len(NEEDLE.prefix)] for row, (first, *_) in zip(rows, positions)}
    assert len(keys) == 10
    assert sum(len(x) == 2 for x in positions) > 30 and max(map(len, positions)) > 25


@torch.no_grad()
def test_recall_in_one_pass_equals_a_pass_per_length(micro):
    model = Transformer(replace(micro, vocab_size=64))
    hays = torch.randint(64, (2, 90)).tolist()
    lengths = [60, 61, 80]
    for position in (0, 7, 30):
        decoder = interpolated_decoder(model, 2, 80)
        recall_bn = needle_recall(decoder, hays, NEEDLE, [3, 8], position, lengths)
        for b, key in enumerate((3, 8)):
            for j, length in enumerate(lengths):
                text = hays[b][:position] + NEEDLE.sentence(key) + hays[b][position:]
                text = text[: length - len(NEEDLE.prefix)] + NEEDLE.prefix
                p_w = model(torch.tensor([text]))[0, -1].softmax(-1)
                assert abs(p_w[NEEDLE.keys[key][0]] - recall_bn[b, j]) < 1e-5


# ── Position encodings ──


@torch.no_grad()
def test_loss_by_position_is_that_of_the_forward_pass(micro):
    model, rows_bs = Transformer(micro), torch.randint(micro.vocab_size, (3, 41))
    d = interpolated_decoder(model, 3, 40)
    d.prefill_chunk = 16
    want_bws = model(rows_bs[:, :-1]).transpose(1, 2)
    want_bs = F.cross_entropy(want_bws, rows_bs[:, 1:], reduction="none")
    torch.testing.assert_close(nll_by_position(d, rows_bs), want_bs, atol=1e-4, rtol=1e-4)


def test_another_encoding_shares_the_weights(micro):
    model = Transformer(micro)
    other = with_config(model, replace(micro, rope_factor=8.0))
    for (name, x), y in zip(model.state_dict().items(), other.state_dict().values()):
        assert x.data_ptr() == y.data_ptr(), name
    assert other.config.rope_factor == other.layers["0"].attn.config.rope_factor == 8


@torch.no_grad()
def test_interpolation_divides_positions(micro):
    """With step 4, position t is rotated as position t/4."""
    model = Transformer(replace(micro, rope_factor=1.0))
    slow, plain = interpolated_decoder(model, 1, 33, 4.0), interpolated_decoder(model, 1, 9)
    torch.testing.assert_close(slow.freqs_cis_tx[::4], plain.freqs_cis_tx)


def test_bins_cover_every_position_once():
    for length in (64, 100, 8192):
        edges = log_spaced_bins(length)
        assert edges[0] == 0 and edges[-1] == length and edges == sorted(set(edges))


# ── Chunked prefill ──


@given(st.integers(1, 20), st.integers(0, 20), st.integers(1, 41))
def test_blockwise_attention_equals_attention(s, num_cached, size):
    t = s + num_cached
    q = torch.randn(2, s, 3, 8)
    k, v = torch.randn(2, t, 3, 8), torch.randn(2, t, 3, 6)
    got = blockwise_attention(q, zip(k.split(size, 1), v.split(size, 1)), t, 0.4)
    torch.testing.assert_close(got, attention(q, k, v, 0.4), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chunk", [17, 20, 32, 59, 60])
@torch.no_grad()
def test_chunked_prefill_equals_one_forward_pass(micro, chunk, monkeypatch):
    monkeypatch.setattr("dsv3_ref.cpu.decoder.KV_BLOCK", 13)
    model, tokens_bs = Transformer(micro), torch.randint(micro.vocab_size, (2, 60))
    d = Decoder(model, 2, 64)
    d.prefill_chunk, d.token_bt[:, :60] = chunk, tokens_bs
    torch.testing.assert_close(
        d.hidden_states([0, 0], 60), model.hidden_states(tokens_bs)[0], atol=1e-4, rtol=1e-4
    )
    whole = Decoder(model, 2, 64)
    whole.token_bt[:, :60] = tokens_bs
    whole.hidden_states([0, 0], 60)
    for layer, other in zip(d.layers[:3], whole.layers):
        torch.testing.assert_close(
            layer.attention.kv_btx, other.attention.kv_btx, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_chunked_prefill_does_not_change_generation(micro, num_drafts, monkeypatch):
    """Prompts of unequal length, also with drafts, whose MTP modules prefill in chunks too."""
    model = Transformer(micro)
    prompts = [torch.randint(micro.vocab_size, (n,)).tolist() for n in (50, 33)]

    def generate_tokens() -> list[list[int]]:
        tokens: list[list[int]] = [[] for _ in prompts]
        for step in stream(model, prompts, 6, num_speculative_tokens=num_drafts):
            for row, new in zip(tokens, step):
                row += new
        return tokens

    want = generate_tokens()
    monkeypatch.setattr(Decoder, "prefill_chunk", 18)
    assert generate_tokens() == want


# ── Memory ──


def test_cache_bytes_are_those_of_the_caches():
    assert cache_bytes(V3, 1) == count_params(V3).cache_bytes == 70_272
    assert cache_bytes(V3, 131_072) == 9_210_691_584
    assert LayerKVCache(TINY, 1, 10).kv_btx.numel() == 10 * kv_cache_numbers_per_token(TINY)
    narrow = replace(TINY, qk_nope_head_dim=1)  # GQA rotates all of a head and has no part i
    assert GQA(narrow, 2).wkv.weight.shape[0] == kv_cache_numbers_per_token(narrow, 2) - 2


# ── Runs ──


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    with miniruns.home(tmp_path_factory.mktemp("home")) as folder:
        patch = pytest.MonkeyPatch()
        patch.setattr("dsv3_ref.training.report.write_report", miniruns.no_report)
        patch.setattr("dsv3_ref.data.loader.SHUFFLE_ROWS", 16)
        shape = "--model.original-seq-len 16 --model.max-seq-len 32".split()
        assert main.main(options(folder, folder / "base", *shape)) == 0
        yield folder
        patch.undo()


def extend(home, out, *more, init="base") -> int:
    fixed = ["extend", "--init", home / init, "--data", home / "text", "--out", out]
    fixed += "--steps 4 --global-batch-size 2 --start-batch-size 2".split()
    return main.main(override(fixed, more))


@pytest.fixture(scope="module")
def longer(home):
    more = "--needles 0.5 --lr 1e-3 --min-lr 1e-3 --final-lr 1e-3".split()
    assert extend(home, home / "longer", *more) == 0
    return home / "longer"


def test_a_phase_changes_positions_and_nothing_else(home, longer):
    before, after = load_checkpoint_config(home / "base"), load_checkpoint_config(longer)
    assert (after.rope_factor, after.max_seq_len) == (40, 640)
    assert replace(after, rope_factor=1.0, max_seq_len=32) == before
    settings = json.loads((longer / "run.json").read_text())["settings"]
    assert settings["recipe"]["seq_len"] == 8 * 16 and settings["phase"] == "32k"
    rows = metrics(longer)
    assert {row["lr"] for row in rows} == {1e-3}
    assert {row["bias_update_rate"] for row in rows} == {0}
    assert load(longer).config == after


def test_the_second_phase_continues_the_first(home, longer, tmp_path):
    assert extend(home, tmp_path / "run", "--phase", "128k", "--steps", 1, init="longer") == 0
    assert load_checkpoint_config(tmp_path / "run") == load_checkpoint_config(longer)
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert settings["recipe"]["seq_len"] == 32 * 16 and settings["recipe"]["lr"] == 7.3e-6
    assert metrics(tmp_path / "run")[0]["tokens"] == 2 * 512


def test_extension_starts_from_the_weights_of_init(home, tmp_path):
    frozen = "--lr 0 --min-lr 0 --final-lr 0 --steps 1".split()
    assert extend(home, tmp_path / "run", *frozen) == 0
    before, after = load(home / "base"), load(tmp_path / "run")
    assert all(map(torch.equal, before.state_dict().values(), after.state_dict().values()))


def test_a_resumed_run_equals_an_uninterrupted_one(home, tmp_path, monkeypatch):
    real = loop.take_step

    def stopping(run):
        if run.state.step == 3:
            raise KeyboardInterrupt
        return real(run)

    more = "--needles 0.5 --save-every 2".split()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", stopping)
        assert extend(home, tmp_path / "run", *more) == 130
    assert main.main(["extend", "--resume", "--out", str(tmp_path / "run")]) == 0
    assert extend(home, tmp_path / "whole", *more) == 0
    assert results(tmp_path / "run") == results(tmp_path / "whole")


REFUSED = [
    (["--config", "tiny"], "--init is missing"),
    (["--init", "{base}", "--needles", "1.5"], "--needles must be a fraction from 0 to 1"),
    (["--init", "{base}", "--seq-len", "641", "--model.max-seq-len", "700"], "is beyond"),
    (["--init", "{base}", "--seq-len", "641"], "longer than --model.max-seq-len 640"),
    (["--init", "{base}", "--steps", "0"], "--steps must be at least 1"),
    (["--init", "{base}", "--model.dim", "32"], "does not fit this model"),
    (["--init", "nowhere"], "nowhere"),
]


@pytest.mark.parametrize("argv, why", REFUSED, ids=[why for _, why in REFUSED])
def test_refusals(argv, why, home, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [x.format(base=home / "base") for x in argv]
    assert main.main(["extend", *argv, "--data", str(home / "text"), "--out", "run"]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and why in message
    assert not (tmp_path / "run" / "run.json").exists()


def test_an_unknown_phase_is_an_error(home, capsys):
    assert main.main(["extend", "--init", str(home / "base"), "--phase", "64k"]) == 2
    assert capsys.readouterr().err == "error: --phase must be 32k or 128k, not 64k\n"


# ── Committed results ──


def test_committed_results_name_their_command_and_commit():
    path = Path(__file__).parents[1] / "notebooks" / "results" / "long_context.json"
    stored = json.loads(path.read_text())
    assert stored["command"].startswith("python -m dsv3_ref.studies.long_context --init ")
    assert len(stored["commit"]) == 40 and stored["seed"] == 0
    assert stored["cpu_seconds"] < 12 * 60  # without stages of earlier runs
    grid = len(stored["depths"]), len(stored["lengths"])
    assert all(np.shape(recall) == grid for recall in stored["needles"].values())
