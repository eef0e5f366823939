"""Text into shards and back into rows: the same documents, whatever happens in between."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path

import datasets
import miniruns
import numpy as np
import pytest
import torch
from miniruns import flip_bit, no_report, options, prose, results, timeless

from dsv3_ref.checkpoints.manifest import file_sha256
from dsv3_ref.cli import main
from dsv3_ref.cluster.plan import PlanConfig, estimate
from dsv3_ref.config import UserError
from dsv3_ref.data import (
    dedup,
    loader,
    permutation,
    prepare,
    shard_writer,
    shards,
    tokenize_workers,
)
from dsv3_ref.data import tokenizer as tok
from dsv3_ref.data.loader import PackedDataLoader
from dsv3_ref.data.prepare import PrepareConfig
from dsv3_ref.data.shards import Shards
from dsv3_ref.data.sources import open_sources, stored_tokenizer
from dsv3_ref.studies import data_bench
from dsv3_ref.training.checkpointer import join_tensors, split_tensors


def write_jsonl(path: Path, texts) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def texts_of(name: str, n: int) -> list[str]:
    """Documents of unlike length, some of them blank."""
    made = [f"{name} {i}. {prose(random.Random(f'{name}{i}'), 10 + i % 50)}" for i in range(n)]
    return [" \n" if i % 17 == 3 else text for i, text in enumerate(made)]


def near_twin(text: str) -> str:
    """In capitals, and another last word."""
    return text.upper().rpartition(" ")[0] + " other"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The folder of runs, with two files of documents; b holds a few of a's again, retouched."""
    with miniruns.home(tmp_path_factory.mktemp("home")) as folder:
        a = texts_of("a", 150)
        twins = [near_twin(text) for text in a[40:140:20] if text.strip()]
        write_jsonl(folder / "a.jsonl", a)
        write_jsonl(folder / "b.jsonl", [*texts_of("b", 90), *twins])
        yield folder


def specs(home) -> tuple[str, ...]:
    return f"{home}/a.jsonl=0.7", f"{home}/b.jsonl=0.3"


def plan(home, out, **more) -> PrepareConfig:
    """Several shards, in this process."""
    fixed = {"vocab_size": 400, "shard_tokens": 3000, "workers": 1, "data": specs(home)}
    return PrepareConfig(out, **(fixed | more))


def command(args: PrepareConfig) -> list[str]:
    """The same as a command line."""
    named = {"--out": args.out, "--vocab-size": args.vocab_size, "--workers": args.workers,
             "--shard-tokens": args.shard_tokens, "--dedup": args.dedup}  # fmt: skip
    pairs = [str(x) for x in chain.from_iterable(named.items())]
    return ["data", "prepare", "--data", *args.data, *pairs]


def left(folder: Path) -> dict[str, bytes]:
    """Every file, the index without the record of the run."""
    found = {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
    index = json.loads(found["index.json"])
    return found | {"index.json": index | {"run": None}}


@pytest.fixture(scope="module")
def whole(home):
    """Shards that nothing disturbed."""
    prepare.prepare_shards(plan(home, home / "whole"))
    return home / "whole"


@pytest.fixture(scope="module")
def all_kept(home):
    """Shards with the near-duplicates in them."""
    prepare.prepare_shards(plan(home, home / "all", dedup=0.0))
    return home / "all"


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


# ── What is written ──


@pytest.mark.parametrize("split", ["val", "train"])
def test_shards_hold_the_documents_in_their_places(all_kept, home, split):
    found, texts = Shards(all_kept), open_sources(specs(home), 0, False)
    for i, source in enumerate(texts):
        want = list(source.iter_split(split, 0))
        documents = found.documents(i, split)
        assert len(documents) == len(want)
        for tokens, text in zip(documents, want):
            assert found.tokenizer.decode(tokens.tolist()) == (text if text.strip() else "")
    assert documents.dtype == "<u2"


def test_the_index_counts(all_kept, home):
    index = Shards(all_kept).index
    for i, about in enumerate(index["sources"]):
        (source,) = open_sources(specs(home)[i : i + 1], 0, False)
        assert [about["name"], about["weight"]] == [source.name, source.weight]
        for split in shard_writer.SPLITS:
            texts = list(source.iter_split(split, 0))
            full = [text for text in texts if text.strip()]
            assert about[split]["documents"] == len(full)
            assert about[split]["blank"] == len(texts) - len(full)
            assert about[split]["text_bytes"] == sum(len(text.encode()) for text in full)
    for shard in index["shards"][:-1]:
        assert shard["end"] or 3000 <= shard["tokens"] < 3000 + 400
    assert len(index["shards"]) > 6
    assert index["tokenizer"] == file_sha256(all_kept / "tokenizer.json")


def test_held_out_documents_are_in_validation_shards_alone(all_kept, home):
    """As training from the texts splits them."""
    for source, coded in zip(*(open_sources(x, 0, False) for x in (specs(home), [str(all_kept)]))):
        assert coded.val_texts == source.val_texts
        trained = {coded.to_text(document) for document in coded.documents(seed=0)}
        assert not trained & set(coded.val_texts)
        assert trained | {""} == {t if t.strip() else "" for t in source.documents(seed=0)} | {""}


def test_a_large_vocabulary_takes_four_bytes():
    assert [shards.dtype_for(n).itemsize for n in (400, 65_535, 65_536, 129_280)] == [2, 2, 4, 4]


def test_workers_and_chunks_change_nothing(home, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "CHUNK_CHARS", 700)
    prepare.prepare_shards(plan(home, tmp_path / "two", workers=2))
    assert left(tmp_path / "two") == left(whole)


def test_streams_are_shards_too(home, tmp_path):
    args = replace(plan(home, tmp_path / "s", streaming=True), data=(specs(home)[0],))
    prepare.prepare_shards(args)
    (coded,) = open_sources([str(args.out)], 0, False)
    (source,) = open_sources(args.data, 0, True)
    assert coded.val_texts == source.val_texts
    want = Counter(text for text in source.documents(0) if text.strip())
    assert Counter(filter(None, map(coded.to_text, coded.documents(0)))) == want


def test_a_name_on_the_hub_goes_on_where_it_was_stopped(home, tmp_path, monkeypatch):
    """Without the network: the library is asked for a stream."""
    monkeypatch.setenv("DSV3_CACHE", str(tmp_path / "cache"))
    memory = datasets.Dataset.from_dict({"text": texts_of("h", 150)})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: memory.to_iterable_dataset())
    one, two = (plan(home, tmp_path / n, data=("owner/name",), shard_tokens=900) for n in "ab")
    prepare.prepare_shards(one)
    real, calls = shard_writer.ShardWriter.end_shard, iter(range(9))

    def stopped(*args):
        real(*args)
        if next(calls) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shard_writer.ShardWriter, "end_shard", stopped)
        prepare.prepare_shards(two)
    assert len(shards.read_index(two.out)["shards"]) == 4
    prepare.prepare_shards(two)
    assert left(two.out) == left(one.out)


# ── Killed and started again ──


@pytest.mark.parametrize(
    ("deadly", "at"),
    [
        ("dsv3_ref.data.prepare.write_json", 1),  # before there is anything
        ("dsv3_ref.data.tokenizer.save_tokenizer", 1),  # with an index that knows of none
        ("dsv3_ref.data.prepare.write_json", 2),  # with a tokenizer nobody knows of
        ("dsv3_ref.data.shard_writer.Shard.add", 30),
        ("dsv3_ref.data.shard_writer.Shard.add", 180),
        ("dsv3_ref.data.shard_writer.Shard.save_array", 7),  # tokens are there, offsets are not
        ("dsv3_ref.data.shard_writer.write_json", 4),  # a whole shard that does not count yet
        ("dsv3_ref.data.shard_writer.clean_up", 1),  # finished but for what is swept up
    ],
)
def test_killed_at_any_moment_it_ends_with_the_same_bytes(deadly, at, home, whole, tmp_path):
    args = plan(home, tmp_path / "s")
    process = miniruns.start(home, command(args), 1, deadly, at)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    if deadly != "dsv3_ref.data.shard_writer.clean_up":
        with pytest.raises(UserError, match="is not finished|not a folder of shards"):
            Shards(args.out)
    before = {p.name: p.stat().st_mtime_ns for p in args.out.glob("shard-*.bin")}
    prepare.prepare_shards(args)
    assert left(args.out) == left(whole)
    index = json.loads((args.out / "index.json").read_text())
    if "add" in deadly and at > 100:  # what was there is not made again
        same = [n for n, t in before.items() if (args.out / n).stat().st_mtime_ns == t]
        assert len(same) >= len(before) > 2
    assert index["run"] is None or index["run"]["name"] == "data prepare"


def test_a_killed_command_leaves_no_worker_behind(home, whole, tmp_path):
    args = plan(home, tmp_path / "s", workers=2)
    env = os.environ | {"HF_DATASETS_CACHE": str(home / "hf")}
    slow = "import sys, time; from dsv3_ref.cli import main as cli; "
    slow += "from dsv3_ref.data.shard_writer import Shard; real = Shard.add; "
    slow += "Shard.add = lambda *a: (time.sleep(0.01), real(*a)); "
    slow += "__name__ == '__main__' and cli.main(sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", slow, *command(args)], env=env,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    while not list(args.out.glob("shard-00003*")):
        time.sleep(0.02)
        assert process.poll() is None
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(workers) >= 2
    process.kill()
    process.wait()
    until = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(map(alive, workers))
    prepare.prepare_shards(replace(args, workers=1))
    assert left(args.out) == left(whole)


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_dead_worker_is_a_sentence(whole):
    def chunks():
        yield ["one"]
        for _ in range(50):
            for process in multiprocessing.active_children():
                process.kill()
            time.sleep(0.02)
            yield ["two"]

    coder = tokenize_workers.TokenizeWorker(Shards(whole).tokenizer, np.dtype("<u2"), False)
    with pytest.raises(UserError, match="a worker was killed.*rerun the same command to resume"):
        list(tokenize_workers.imap_ordered(chunks(), coder, 2))


def test_a_finished_folder_is_left_alone(home, copy, capsys):
    before = {p.name: p.stat().st_mtime_ns for p in copy.iterdir()}
    prepare.prepare_shards(plan(home, copy, workers=3))
    assert f"{copy} is finished: " in capsys.readouterr().out
    assert {p.name: p.stat().st_mtime_ns for p in copy.iterdir()} == before


# ── Refused ──


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"dedup": 0.0}, "was begun with --dedup 0.8, not 0.0: give another --out"),
        ({"vocab_size": 500}, "was begun with --vocab-size 400, not 500"),
        ({"shard_tokens": 9}, "was begun with --shard-tokens 3000, not 9"),
        ({"streaming": True}, "was begun with --streaming False, not True"),
        ({"data": ("stdlib",)}, "was begun with --data .*a.jsonl=0.7 .*=0.3, not stdlib=1"),
    ],
)
def test_other_settings_are_refused(more, sentence, home, copy):
    with pytest.raises(UserError, match=sentence):
        prepare.prepare_shards(replace(plan(home, copy), **more))


def test_another_tokenizer_or_other_files_are_refused(home, whole, tmp_path):
    out, text = tmp_path / "s", tmp_path / "text.jsonl"
    write_jsonl(text, texts_of("c", 40))
    args = replace(plan(home, out), data=(str(text),))
    prepare.prepare_shards(args)
    with pytest.raises(UserError, match="was begun with another tokenizer"):
        prepare.prepare_shards(replace(args, vocab_size=0, tokenizer=whole))
    write_jsonl(text, texts_of("d", 40))
    with pytest.raises(UserError, match="files of its sources have changed since .* was begun"):
        prepare.prepare_shards(args)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"dedup": 1.5}, "--dedup is a fraction"),
        ({"workers": 0}, "--workers must be at least 1"),
        ({"shard_tokens": 0}, "--shard-tokens must be"),
        ({"vocab_size": 9}, "vocab_size 9 is too small"),
        ({"tokenizer": Path("x")}, "--tokenizer and --vocab-size exclude each other"),
        ({"data": ("missing.txt",)}, "no data at 'missing.txt'"),
    ],
)
def test_mistakes_are_sentences(more, sentence, home, tmp_path, capsys):
    args = replace(plan(home, tmp_path / "s"), **more)
    with pytest.raises(UserError, match=sentence):
        prepare.prepare_shards(args)


def test_the_limits_of_deduplication(home, tmp_path):
    for good, bad in ((0.0, -0.01), (1.0, 1.01)):
        prepare.validate_prepare_args(plan(home, tmp_path, dedup=good))
        with pytest.raises(UserError, match="--dedup is a fraction from 0 to 1"):
            prepare.validate_prepare_args(plan(home, tmp_path, dedup=bad))


def test_folders_that_are_no_place_for_shards(home, whole, tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match="holds other files, such as mine.txt"):
        prepare.prepare_shards(plan(home, tmp_path))
    with pytest.raises(UserError, match="mine.txt is a file; shards are a folder"):
        prepare.prepare_shards(plan(home, tmp_path / "mine.txt"))
    with pytest.raises(UserError, match="holds shards already: dsv3 train --data"):
        prepare.prepare_shards(replace(plan(home, tmp_path / "s"), data=(str(whole),)))
    with prepare.lock_dir(tmp_path / "s"), pytest.raises(UserError, match="another process is"):
        prepare.prepare_shards(plan(home, tmp_path / "s"))


def test_the_commands_are_listed_and_errors_are_exit_code_2(home, copy, capsys):
    assert main.main(["data", "--help"]) == 0
    overview = capsys.readouterr().out
    assert all(f"data {name} " in overview for name in ("prepare", "bench"))
    assert "train" not in overview.split("Data")[0]
    assert main.main(["data", "prepare", "--help"]) == 0
    assert "--dedup FLOAT" in capsys.readouterr().out
    twice = ["--data", specs(home)[0], "--data", *specs(home)[1:]]
    argv = command(plan(home, copy))
    assert main.main(argv[:2] + twice + argv[5:]) == 0
    assert main.main(["check", str(copy)]) == 0
    assert "is whole" in capsys.readouterr().out
    assert main.main([*argv, "--dedup", "0"]) == 2
    assert "error: " in capsys.readouterr().err


# ── Near-duplicates ──


def test_planted_near_duplicates_are_dropped_and_told(home, whole, all_kept, capsys):
    """Those of b that are like a's; every other document is there."""
    more, fewer = (
        [Counter(map(s.to_text, s.documents(0))) for s in open_sources([str(x)], 0, False)]
        for x in (all_kept, whole)
    )
    twins = {near_twin(text) for text in texts_of("a", 150)[40:140:20] if text.strip()}
    (held,) = (s.val_texts for s in open_sources(specs(home)[1:], 0, False))
    assert not twins & set(held)
    assert not more[0].keys() ^ fewer[0].keys() and not fewer[1].keys() - more[1].keys()
    assert more[1].keys() - fewer[1].keys() == twins and len(twins) == 5
    a, b = Shards(whole).sources
    assert b["train"]["near_duplicates_of"] == {a["name"]: 5}
    assert not a["train"]["near_duplicates_of"] and not b["val"]["near_duplicates_of"]
    print("\n".join(prepare.near_duplicate_lines(Shards(whole).index)))
    assert f"b.jsonl: 5 near-duplicates left out (5 of {a['name']})" in capsys.readouterr().out
    assert prepare.near_duplicate_lines(Shards(all_kept).index) == [
        "near-duplicates were not searched for"
    ]


def test_a_training_document_like_a_held_out_one_goes(tmp_path):
    """Though it comes first in the file: nothing near the validation text is trained on."""
    plain = [text for text in texts_of("x", 40) if text.strip()]
    name = write_jsonl(tmp_path / "x.jsonl", plain + plain)
    prepare.prepare_shards(PrepareConfig(tmp_path / "s", (name,), vocab_size=400, workers=1))
    (s,) = open_sources([str(tmp_path / "s")], 0, False)
    trained = [text for text in map(s.to_text, s.documents(0)) if text]
    assert sorted(trained + s.val_texts) == sorted(plain)
    about = s.data.sources[0]
    dropped = sum(about[k]["near_duplicates_of"].get(name, 0) for k in ("train", "val"))
    assert dropped == len(plain)


def test_a_source_of_which_nothing_is_left(tmp_path):
    names = [write_jsonl(tmp_path / f"{n}.jsonl", texts_of("x", 40)) for n in "ab"]
    args = PrepareConfig(tmp_path / "s", tuple(names), vocab_size=350, workers=1)
    with pytest.raises(UserError, match="all held-out documents of .*b.jsonl are near-duplicates"):
        prepare.prepare_shards(args)
    blank = write_jsonl(tmp_path / "c.jsonl", [" "] * 40)
    with pytest.raises(UserError, match="the held-out documents of .*c.jsonl are empty"):
        prepare.prepare_shards(replace(args, out=tmp_path / "t", data=(names[0], blank)))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.95])
def test_signatures_agree_as_often_as_shingles_do(share):
    """Against the sets themselves; σ of a mean over 100 pairs is below 0.005."""
    near = []
    for k in range(100):
        words = [f"{k}.{i}" for i in range(300)]
        cut = int(300 * share)
        a, b = (words[:cut] + [f"{n}{w}" for w in words[cut : (300 + cut) // 2]] for n in "ab")
        sets = [set(dedup.shingles(" ".join(x))) for x in (a, b)]
        found = dedup.minhash_signatures([" ".join(a), " ".join(b)])
        near.append((found[0] == found[1]).mean() - len(sets[0] & sets[1]) / len(sets[0] | sets[1]))
    assert abs(np.mean(near)) < 0.015


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.95])
def test_the_table_finds_what_comparing_all_pairs_finds(threshold):
    rng = np.random.default_rng(0)
    found = rng.integers(0, 1 << 32, (300, dedup.NUM_PERM), np.uint32)
    for i in range(100, 300):  # like an earlier one in a random share of places
        same = rng.random(dedup.NUM_PERM) < rng.random()
        found[i, same] = found[rng.integers(i), same]
    near, kept = dedup.MinHashLSH(threshold), []
    wrong = 0
    for i, (signature, keys) in enumerate(zip(found, near.band_keys(found))):
        alike = [j for j in kept if (found[j] == signature).mean() >= threshold]
        like = near.query(signature, keys)
        wrong += like != (alike[0] if alike else None)
        if like is None:
            near.insert(signature, keys, i)
            kept.append(i)
    assert wrong <= 2 and len(kept) < 300


def test_without_the_library_a_sentence_says_what_to_install(home, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(UserError, match="pip install 'dsv3-ref.data.', or --dedup 0"):
        prepare.prepare_shards(plan(home, tmp_path / "s"))


# ── Rows ──


def rows(names, seed=3, fim_rate=0.3) -> PackedDataLoader:
    sources = open_sources(names, seed, False)
    t = stored_tokenizer(sources) or loader.load_or_train_tokenizer(sources, 400, lambda _: None)
    return PackedDataLoader(sources, t, 33, seed, fim_rate)


@pytest.fixture
def small_buffer(monkeypatch):
    monkeypatch.setattr(loader, "SHUFFLE_ROWS", 64)


def test_rows_from_shards_are_those_from_text(home, all_kept, small_buffer):
    """FIM, line breaks, mixture and order, bit for bit, over several epochs."""
    text, coded = rows(specs(home)), rows([str(all_kept)])
    assert torch.equal(text.next_batch(1500), coded.next_batch(1500))
    for key in ("sources", "rng"):
        assert text.state_dict()[key] == coded.state_dict()[key]
    assert min(s.epoch for s in coded.sources) > 1


def test_rows_go_on_where_they_stopped_and_read_nothing_again(whole, small_buffer, monkeypatch):
    one = rows([str(whole)])
    one.next_batch(700)
    values, tensors = split_tensors({"data": one.state_dict()})
    state = join_tensors(json.loads(json.dumps(values)), tensors)["data"]
    asked, real = [], shards.Documents.__getitem__
    monkeypatch.setattr(
        shards.Documents, "__getitem__", lambda self, i: asked.append(i) or real(self, i)
    )
    other = rows([str(whole)])
    other.load_state_dict(state)
    assert asked == []
    assert torch.equal(other.next_batch(5), one.next_batch(5))
    assert len(asked) < 30
    assert torch.equal(other.next_batch(300), one.next_batch(300))


def test_the_mixture_holds_and_an_epoch_is_every_document_once(whole):
    r = rows([str(whole)])
    for _ in range(4000):
        r.refill()
    drawn = [s.tokens_drawn for s in r.sources]
    assert drawn[0] / sum(drawn) == pytest.approx(0.7, abs=0.005)
    for s, fresh in zip(r.sources, open_sources([str(whole)], 3, False)):
        n = fresh.data.sources[fresh.number]["train"]["documents"]
        found = [tuple(d.tolist()) for d in islice(fresh.train_documents(), 2 * n)]
        assert Counter(found[:n]) == Counter(found[n:]) and found[:n] != found[n:]
        assert s.epoch > 2


def test_weights_of_a_folder_among_others(home, whole):
    """A folder's weight is shared among its sources."""
    found = open_sources([f"{whole}=2", f"{home}/text=1"], 5, False)
    assert [s.weight for s in found] == pytest.approx([1.4, 0.6, 1.0])
    assert [s.seed for s in found] == [5, 1005, 2005]


@pytest.mark.parametrize("n", [1, 2, 5, 64, 257, 1000])
def test_too_many_documents_for_a_permutation_are_permuted_all_the_same(n, monkeypatch):
    monkeypatch.setattr(permutation, "MAX_PERMUTATION", 0)
    a, b = (list(permutation.permuted_indices(n, [0, epoch], 0)) for epoch in (0, 1))
    assert sorted(a) == sorted(b) == list(range(n))
    assert n < 5 or a != b and a != sorted(a)
    assert list(permutation.permuted_indices(n, [0, 0], n // 2)) == a[n // 2 :]
    assert n < 1000 or abs(np.corrcoef(a, range(n))[0, 1]) < 0.15


# ── Training ──


@pytest.fixture(scope="module")
def text_shards(home):
    """Of the texts that `miniruns.options` trains on."""
    args = PrepareConfig(home / "shards", (str(home / "text"),), vocab_size=400, workers=1)
    prepare.prepare_shards(args)
    return args.out


@pytest.fixture(scope="module")
def runs(home, text_shards):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsv3_ref.training.report.write_report", no_report)
        for out, more in {"t": [], "s": ["--data", text_shards]}.items():
            assert main.main(options(home, home / out, *more)) == 0
    return home / "t", home / "s"


def test_a_run_from_shards_is_the_run_from_text(runs, home):
    """Bit for bit: losses, validation, weights and optimizer."""
    text, coded = runs
    assert results(text) == results(coded)
    a, b = (json.loads((run / "summary.json").read_text()) for run in runs)
    assert timeless(a) == timeless(b)


def test_a_run_from_shards_goes_on(runs, home, monkeypatch):
    monkeypatch.setattr("dsv3_ref.training.report.write_report", no_report)
    before = results(runs[1])
    shutil.rmtree(runs[1] / "checkpoints" / "step_0000008")
    assert main.main(["train", "--resume", "--out", str(runs[1])]) == 0
    assert results(runs[1]) == before


def rank(home, argvs: list[list[str]], out: Path, number: int) -> None:
    """Rows of three steps of several runs, on one of two ranks."""
    import torch.distributed as dist

    from dsv3_ref.parallel.mesh_parallel import MeshParallel
    from dsv3_ref.training import settings
    from dsv3_ref.training.state import build_run
    from dsv3_ref.training.task import PretrainTask

    miniruns.own_caches(home, pytest.MonkeyPatch())
    torch.set_num_threads(1)
    found = []
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=number, world_size=2)
    for argv in argvs:
        config = settings.parse_args(argv)
        strategy = MeshParallel(config, torch.device("cpu"))
        run = build_run(PretrainTask(config), strategy, out)
        batches = [run.task.next_batch(run, n) for n in run.data.batch_size_schedule[:3]]
        found.append([batch.rows.rows_bs.tolist() for batch in batches])
    (out / f"{number}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_two_ranks_read_what_one_reads(home, text_shards, tmp_path):
    """From shards and from text, whatever the mesh."""
    alone = rows([str(text_shards)], seed=0, fim_rate=0.1)
    more = [["--data", text_shards], ["--data", text_shards, "--pp", "2"], ["--ep", "2"]]
    argvs = [options(home, tmp_path, *x)[1:] for x in more]
    ranks = [miniruns.FORK.Process(target=rank, args=(home, argvs, tmp_path, n)) for n in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    first, second = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (0, 1))
    want = [alone.next_batch(len(batch)).tolist() for batch in first[1]]
    assert first[1] == second[1] == want  # two stages of one pipeline
    for mesh in (0, 2):  # two pipelines, a half each
        assert [a + b for a, b in zip(first[mesh], second[mesh])] == want


def test_another_tokenizer_than_that_of_the_shards(home, whole, text_shards, tmp_path, capsys):
    both = ["--data", text_shards, whole]
    assert main.main(options(home, tmp_path / "run", *both)) == 2
    assert "have different tokenizers" in capsys.readouterr().err
    more = ["--data", text_shards, "--tokenizer", whole]
    assert main.main(options(home, tmp_path / "run", *more)) == 2
    assert "the shards were made with another tokenizer" in capsys.readouterr().err
    small = ["--data", text_shards, "--model.vocab-size", "300"]
    assert main.main(options(home, tmp_path / "run", *small)) == 2
    assert "the model only 300: raise --model.vocab-size" in capsys.readouterr().err


# ── Damage ──


def shorter(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


flipped = partial(flip_bit, at=-40)


@pytest.mark.parametrize(
    ("name", "damage", "sentence"),
    [
        ("shard-00002.bin", shorter, "it has .* bytes, not "),
        ("shard-00001.npy", shorter, "it has .* bytes, not "),
        ("shard-00003.bin", Path.unlink, "it is missing"),
        ("shard-00003.npy", Path.unlink, "it is missing"),
        ("tokenizer.json", flipped, "its checksum differs"),
        ("tokenizer.json", Path.unlink, "it is missing"),
        ("index.json", shorter, "is damaged: "),
    ],
)
def test_damage_is_named_before_training(name, damage, sentence, home, copy, tmp_path, capsys):
    damage(copy / name)
    assert main.main(options(home, tmp_path / "run", "--data", copy)) == 2
    assert f"{copy}/{name} is damaged" in capsys.readouterr().err
    with pytest.raises(UserError, match=sentence):
        Shards(copy)
    assert not list(tmp_path.glob("run/*"))


@pytest.mark.parametrize(
    "name", ["shard-00000.bin", "shard-00002.bin", "shard-00002.npy", "shard-00002.sum"]
)
def test_checksums_find_a_flipped_bit(name, copy, capsys):
    flipped(copy / name)
    assert Shards(copy)
    assert main.main(["check", str(copy)]) == 2
    assert f"{copy}/{name} is damaged (its checksum differs)" in capsys.readouterr().err


def test_a_token_that_does_not_exist_is_named_when_it_is_read(copy, monkeypatch):
    path = copy / "shard-00002.bin"
    path.write_bytes(b"\xff" * path.stat().st_size)
    monkeypatch.setattr(shards.Documents, "verify_blocks", lambda *args: None)
    with pytest.raises(UserError, match="shard-00002.bin is damaged .document 0 is invalid"):
        next(iter(Shards(copy).documents(0, "train")))


def test_a_flipped_bit_is_found_when_its_block_is_read(tmp_path, monkeypatch):
    """Documents of other blocks are read as they were; each block is compared once."""
    monkeypatch.setattr(shards, "SUM_BYTES", 64)
    (tmp_path / "text").mkdir()
    for i in range(60):
        (tmp_path / "text" / f"{i}.txt").write_text(f"Document {i} is about {i * i}. " * (i % 4))
    data = (str(tmp_path / "text"),)
    out = tmp_path / "shards"
    prepare.prepare_shards(prepare.PrepareConfig(out, data, vocab_size=300, dedup=0, workers=1))
    whole = [d.tolist() for d in Shards(out).documents(0, "train")]
    path = next(p for p in sorted(out.glob("*.bin")) if p.stat().st_size > 400)
    flip_bit(path, 8 * 300)  # in block 4, bytes 256 to 319
    documents = Shards(out).documents(0, "train")
    offsets = np.load(path.with_suffix(".npy")) * np.dtype(documents.dtype).itemsize
    for i, want in enumerate(whole):
        touches = offsets[i] < 320 and offsets[i + 1] > 256 and want
        if touches:
            for _ in range(2):
                with pytest.raises(UserError, match="bytes from 256 on have changed"):
                    documents[i]
            break
        assert documents[i].tolist() == want
    else:
        pytest.fail("no document lies in the changed block")


def test_a_split_without_shards_has_no_documents(tmp_path):
    assert list(shards.Documents(tmp_path, [], "<u2", 400)) == []


def test_no_folder_of_shards(tmp_path):
    with pytest.raises(UserError, match="holds no index.json: it is not a folder of shards"):
        Shards(tmp_path)
    (tmp_path / "index.json").write_text('{"format": 9}')
    with pytest.raises(UserError, match="is of format 9, not 1"):
        Shards(tmp_path)


def test_a_bench_is_measured(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loader, "SHUFFLE_ROWS", 8)
    monkeypatch.setattr("dsv3_ref.studies.data_bench.N_SEQUENCES", 8)
    out = tmp_path / "b.json"
    argv = ["data", "bench", "--megabytes", "0.1", "--rounds", "1", "--workers", "1"]
    assert main.main([*argv, "--data", str(home / "text"), "--out", str(out)]) == 0
    assert json.loads(out.read_text())["megabytes_per_s"].keys() >= {"encode_batch", "prepare"}
    said = capsys.readouterr().out
    assert tok.BOS not in said
    assert re.search(
        r"^v3 on 2,048 GPUs needs [67]\.\d per reader \(--data-streams 128", said, re.M
    )


@pytest.mark.parametrize("streams, rows", [(128, 120), (64, 240), (1, 15_360), (96, 320)])
def test_a_reader_draws_all_rows_of_its_streams(streams, rows):
    """With 96 streams of 160 rows, a reader of 120 rows has some of two streams."""
    args = data_bench.DataBenchConfig(data_streams=streams)
    need = data_bench.needed_rows_per_second(args)
    assert need * estimate(PlanConfig()).seconds == pytest.approx(rows)
    said = data_bench.format_need(args, {"shards": need / 2})
    assert "is too SLOW: raise --data-streams" in said
    assert "keeps up" in data_bench.format_need(args, {"shards": 2 * need})
