"""Longer texts: the report's numbers, needles in rows, readings, pieces, and runs that extend."""

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
from miniruns import metrics, options, results

from dsv3_ref.checkpoints.native import load, load_checkpoint_config
from dsv3_ref.cli import main
from dsv3_ref.config import SMALL, TINY, V2_LITE, V3, count_params
from dsv3_ref.cpu.decoder import blockwise_attention
from dsv3_ref.decode import Decoder, stream
from dsv3_ref.long_context import (
    RECIPES,
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
def test_a_phase_is_the_reports(phase, length, rows):
    r = extension_recipe(phase, "v3", 4096)
    assert (r.seq_len, r.steps) == (length, 1000)
    assert set(get_batch_size_schedule(r, r.steps)) == {rows}
    for step in (0, 1, 500, 999):
        done = step / 1000
        assert get_lr(r, step, done) == 7.3e-6 and get_bias_update_rate(r, done) == 0
        assert get_mtp_weight(r, done) == 0.1


def test_both_phases_stretch_alike():
    before = replace(V3, rope_factor=1.0, max_seq_len=4096)
    assert extend_config(before) == V3 and extend_config(V3) == V3
    for c in (TINY, SMALL):
        longer = extend_config(c)
        assert (longer.rope_factor, longer.max_seq_len) == (40, 40 * c.original_seq_len)
        assert extend_config(longer) == longer
        assert replace(longer, rope_factor=1.0, max_seq_len=c.max_seq_len) == c


def test_rows_follow_the_length_of_pretraining():
    for phase, times in (("32k", 8), ("128k", 32)):
        for size, c in (("tiny", TINY), ("small", SMALL), ("mine.json", V2_LITE)):
            r = extension_recipe(phase, size, c.original_seq_len)
            assert r.seq_len == times * c.original_seq_len <= extend_config(c).max_seq_len
    tiny = [extension_recipe(phase, "tiny", 256) for phase in RECIPES]
    assert (
        tiny[0].global_batch_size * tiny[0].seq_len == tiny[1].global_batch_size * tiny[1].seq_len
    )


# ── Needles ──

LETTERS = lambda text: [ord(c) % 64 for c in text]
N = build_needle(LETTERS)
SIZE = len(N.sentence(0))


@given(st.integers(1, 400), st.integers(0, 2**30))
def test_a_planted_row_keeps_its_length_and_says_one_key(length, seed):
    row = insert_needle([63] * length, N, np.random.default_rng(seed))
    said = [row[i : i + SIZE] for i in range(length) if row[i : i + len(N.prefix)] == N.prefix]
    assert len(row) == length and len({*map(tuple, said)}) <= 1
    assert row.count(63) == length - SIZE * len(said)
    assert (2 <= len(said) <= 33) if length >= 2 * SIZE else not said


def test_keys_and_gaps_vary():
    rng = np.random.default_rng(0)
    rows = [insert_needle([63] * 2048, N, rng) for _ in range(300)]
    said = [[i for i in range(2048) if row[i : i + len(N.prefix)] == N.prefix] for row in rows]
    keys = {row[at[0] + len(N.prefix)] for row, at in zip(rows, said)}
    assert len(keys) == 10
    assert sum(len(at) == 2 for at in said) > 30 and max(map(len, said)) > 25


@torch.no_grad()
def test_recall_reads_once_what_others_read_again(micro):
    model = Transformer(replace(micro, vocab_size=64))
    hays = torch.randint(64, (2, 90)).tolist()
    for at in (0, 7, 30):
        got_bn = needle_recall(
            interpolated_decoder(model, 2, 80), hays, N, [3, 8], at, [60, 61, 80]
        )
        for b, key in enumerate((3, 8)):
            for j, length in enumerate((60, 61, 80)):
                text = hays[b][:at] + N.sentence(key) + hays[b][at:]
                text = text[: length - len(N.prefix)] + N.prefix
                p_w = model(torch.tensor([text]))[0, -1].softmax(-1)
                assert abs(p_w[N.keys[key][0]] - got_bn[b, j]) < 1e-5


# ── Readings ──


@torch.no_grad()
def test_loss_by_position_is_that_of_the_forward_pass(micro):
    model, rows_bs = Transformer(micro), torch.randint(micro.vocab_size, (3, 41))
    d = interpolated_decoder(model, 3, 40)
    d.prefill_chunk = 16
    want_bws = model(rows_bs[:, :-1]).transpose(1, 2)
    want_bs = F.cross_entropy(want_bws, rows_bs[:, 1:], reduction="none")
    torch.testing.assert_close(nll_by_position(d, rows_bs), want_bs, atol=1e-4, rtol=1e-4)


def test_another_reading_shares_the_weights(micro):
    model = Transformer(micro)
    other = with_config(model, replace(micro, rope_factor=8.0))
    for (name, x), y in zip(model.state_dict().items(), other.state_dict().values()):
        assert x.data_ptr() == y.data_ptr(), name
    assert other.config.rope_factor == other.layers["0"].attn.config.rope_factor == 8


@torch.no_grad()
def test_interpolation_is_a_slower_clock(micro):
    """Position t read with step 4 is turned as position t/4."""
    model = Transformer(replace(micro, rope_factor=1.0))
    slow, plain = interpolated_decoder(model, 1, 33, 4.0), interpolated_decoder(model, 1, 9)
    torch.testing.assert_close(slow.freqs_cis_tx[::4], plain.freqs_cis_tx)


def test_bins_cover_every_place_once():
    for length in (64, 100, 8192):
        edges = log_spaced_bins(length)
        assert edges[0] == 0 and edges[-1] == length and edges == sorted(set(edges))


# ── Pieces ──


@given(st.integers(1, 20), st.integers(0, 20), st.integers(1, 41))
def test_blocks_of_keys_are_the_whole(s, before, size):
    t = s + before
    q, k, v = torch.randn(2, s, 3, 8), torch.randn(2, t, 3, 8), torch.randn(2, t, 3, 6)
    got = blockwise_attention(q, zip(k.split(size, 1), v.split(size, 1)), t, 0.4)
    torch.testing.assert_close(got, attention(q, k, v, 0.4), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("piece", [17, 20, 32, 59, 60])
@torch.no_grad()
def test_a_prompt_in_pieces_is_the_whole_prompt(micro, piece, monkeypatch):
    monkeypatch.setattr("dsv3_ref.cpu.decoder.KV_BLOCK", 13)
    model, tokens_bs = Transformer(micro), torch.randint(micro.vocab_size, (2, 60))
    d = Decoder(model, 2, 64)
    d.prefill_chunk, d.token_bt[:, :60] = piece, tokens_bs
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


@pytest.mark.parametrize("draft", [0, 2])
def test_long_prompts_are_continued_as_ever(micro, draft, monkeypatch):
    """Prompts of unequal length, in pieces, with drafts whose modules read in pieces too."""
    model = Transformer(micro)
    prompts = [torch.randint(micro.vocab_size, (n,)).tolist() for n in (50, 33)]
    write = lambda: [[*x] for x in zip(*(map(tuple, r) for r in stream(model, prompts, 6,
                                                                     num_speculative_tokens=draft)))]  # fmt: skip
    flat = lambda rows: [[t for part in row for t in part] for row in rows]
    want = flat(write())
    monkeypatch.setattr(Decoder, "prefill_chunk", 18)
    assert flat(write()) == want


# ── Memory ──


def test_bytes_are_those_of_the_caches():
    assert cache_bytes(V3, 1) == count_params(V3).cache_bytes == 70_272
    assert cache_bytes(V3, 131_072) == 9_210_691_584
    assert LayerKVCache(TINY, 1, 10).kv_btx.numel() == 10 * kv_cache_numbers_per_token(TINY)
    narrow = replace(TINY, qk_nope_head_dim=1)  # GQA turns all of a head: i is nothing to it
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
    return main.main([str(x) for x in [*fixed, *more]])


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
    assert {row["lr"] for row in rows} == {1e-3} and {row["bias_update_rate"] for row in rows} == {
        0
    }
    assert load(longer).config == after


def test_the_second_phase_goes_on_from_the_first(home, longer, tmp_path):
    assert extend(home, tmp_path / "run", "--phase", "128k", "--steps", 1, init="longer") == 0
    assert load_checkpoint_config(tmp_path / "run") == load_checkpoint_config(longer)
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert settings["recipe"]["seq_len"] == 32 * 16 and settings["recipe"]["lr"] == 7.3e-6
    assert metrics(tmp_path / "run")[0]["tokens"] == 2 * 512


def test_its_first_weights_are_the_others(home, tmp_path):
    still = "--lr 0 --min-lr 0 --final-lr 0 --steps 1".split()
    assert extend(home, tmp_path / "run", *still) == 0
    before, after = load(home / "base"), load(tmp_path / "run")
    assert all(map(torch.equal, before.state_dict().values(), after.state_dict().values()))


def test_resumed_it_is_the_same_run(home, tmp_path, monkeypatch):
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
    (["--init", "{base}", "--needles", "1.5"], "--needles is a share from 0 to 1"),
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
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and why in said
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_phase_that_there_is_not(home, capsys):
    assert main.main(["extend", "--init", str(home / "base"), "--phase", "64k"]) == 2
    assert capsys.readouterr().err == "error: --phase is 32k or 128k, not 64k\n"


# ── What is stored ──


def test_stored_results_say_where_they_come_from():
    path = Path(__file__).parents[1] / "notebooks" / "results" / "long_context.json"
    found = json.loads(path.read_text())
    assert found["command"].startswith("python -m dsv3_ref.studies.long_context --init ")
    assert len(found["commit"]) == 40 and found["seed"] == 0
    assert found["cpu_seconds"] < 12 * 60  # what was found done not counted
    grid = len(found["depths"]), len(found["lengths"])
    assert all(np.shape(heat) == grid for heat in found["needles"].values())
