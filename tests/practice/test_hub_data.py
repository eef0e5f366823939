"""Datasets of the Hugging Face hub by name: configuration, split, column; and without the hub."""

import socket
import time

import datasets
import huggingface_hub
import pytest
from miniruns import own_caches

from dsv3_ref.checkpoints import hub as checkpoint_hub
from dsv3_ref.config import UserError
from dsv3_ref.data import files, hub
from dsv3_ref.data.files import open_source, valid_rows

ROWS = [{"question": f"q{i}", "answer": str(i), "text": f"text {i}"} for i in range(5)]


@pytest.fixture(autouse=True)
def caches(tmp_path_factory, monkeypatch):
    own_caches(tmp_path_factory.mktemp("caches"), monkeypatch)
    monkeypatch.setattr("dsv3_ref.checkpoints.hub.hub_answers", lambda: True)


@pytest.fixture
def asked(monkeypatch):
    """What `datasets.load_dataset` is asked for."""
    calls = []

    def load_dataset(*args, streaming, **options):
        calls.append((args, options, streaming))
        data = datasets.Dataset.from_list(ROWS)
        return data.to_iterable_dataset() if streaming else data

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("openai/gsm8k", {"split": "train"}),
        # many datasets have no data without a configuration (huggingface/datasets#203)
        ("openai/gsm8k:main", {"name": "main", "split": "train"}),
        ("openai/gsm8k@test", {"split": "test"}),
        ("openai/gsm8k:main@test", {"name": "main", "split": "test"}),
        ("a-b.c/d_e-1.0:en-US@train[:10%]", {"name": "en-US", "split": "train[:10%]"}),
    ],
)
def test_names_say_configuration_and_split(name, options, asked):
    found = open_source(name)
    assert [row["text"] for row in found] == [row["text"] for row in ROWS]
    path = name.partition(":")[0].partition("@")[0]
    assert asked == [((path,), options, True)]
    told: list[str] = []
    rows, _ = valid_rows(name, dict, told.append)
    assert rows == ROWS and told == [f"{name}: 5 rows"]
    assert asked[1] == ((path,), options, False)


def test_a_column_and_a_weight(asked):
    name, weight = files.parse_source_spec("openai/gsm8k:main@test#answer=0.5")
    assert (name, weight) == ("openai/gsm8k:main@test#answer", 0.5)
    assert list(open_source(name)) == [{"text": row["answer"]} for row in ROWS]
    with pytest.raises(
        UserError, match="has no column 'body', only question, answer, text: choose"
    ):
        open_source("openai/gsm8k#body")


def test_a_rejected_row_of_the_hub_is_reported_by_number(asked):
    def parse(row: dict) -> dict:
        if row["answer"] == "3":
            raise UserError("no")
        return row

    told: list[str] = []
    rows, num_rejected = valid_rows("openai/gsm8k", parse, told.append)
    assert (len(rows), num_rejected) == (4, 1)
    assert told == [
        "openai/gsm8k, row 4 is left out: no", "openai/gsm8k: 4 rows, 1 row left out"
    ]  # fmt: skip


def test_a_path_comes_before_the_hub(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai").mkdir()
    (tmp_path / "openai" / "gsm8k").write_text("mine\n\ntoo")
    assert open_source("openai/gsm8k")["text"][0] == "mine"
    assert not asked


@pytest.mark.parametrize("error", [
    ConnectionError("Couldn't reach 'a/b' on the Hub (LocalEntryNotFoundError)"),
    # both several lines long in `datasets`
    ValueError("Config name is missing.\nPlease pick one among: ['main', 'socratic']"),
    ValueError("Unknown split \"train\".\nShould be one of ['test']."),
    RuntimeError("Dataset scripts are no longer supported, but found a.py"),
])  # fmt: skip
def test_what_the_hub_refuses_is_one_sentence(error, monkeypatch):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    words = " ".join(str(error).split())
    for read in (open_source, lambda name: valid_rows(name, dict, str)):
        with pytest.raises(UserError) as raised:
            read("a/b")
        assert (
            str(raised.value) == f"cannot read a/b (no file here; looked for on the hub): {words}"
        )


def test_an_error_in_the_middle_of_a_stream_is_a_sentence(monkeypatch):
    def rows():
        yield {"text": "a"}
        raise TimeoutError("the hub is gone")

    stream = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    with pytest.raises(UserError, match="cannot read a/b: the hub is gone"):
        valid_rows("a/b", dict, str)


def test_without_a_cache_rows_are_streamed(asked, monkeypatch):
    """A shared cache without permission (huggingface/datasets#7900, huggingface_hub#2797)."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/proc/nowhere")
    rows, _ = valid_rows("a/b", dict, str)
    assert rows == ROWS and asked[0][2] is True


def test_a_local_copy_of_a_dataset(tmp_path):
    """A clone of a repository of the hub: its card and its metadata are not data."""
    folder = tmp_path / "gsm8k"
    (folder / "data").mkdir(parents=True)
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    (folder / "README.md").write_text("---\nconfigs: []\n---\n# Card\n")
    (folder / "dataset_infos.json").write_text("{}")
    (folder / ".gitattributes").write_text("*.parquet filter=lfs")
    told: list[str] = []
    assert open_source(str(folder), warn=told.append)["text"][:] == [row["text"] for row in ROWS]
    assert told[0].startswith(
        f"{folder}: 1 file, 5 documents; skipped 2 (about the data), 1 (hidden"
    )
    assert valid_rows(str(folder), dict, str)[0] == ROWS


@pytest.mark.parametrize(
    "name", ["gsm8k", "a/b/c", "./a/b", "../b", "/a/b", "~/b", "a/b.jsonl.gz", "a/b.csv", "a /b"]
)
def test_what_is_not_a_name_of_the_hub(name):
    assert not hub.could_be_on_hub(name)


# ── Without a network ──


@pytest.fixture
def silent_hub(monkeypatch):
    """A hub that accepts connections and never answers, and one that nobody listens at."""
    monkeypatch.undo()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(checkpoint_hub, "HUB_SECONDS", 0.5)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_hub_that_does_not_answer_is_asked_once(silent_hub, tmp_path, monkeypatch):
    """Half a minute of retries without a network (huggingface/datasets #4568)."""
    own_caches(tmp_path, monkeypatch)
    for endpoint in (silent_hub, "http://127.0.0.1:9"):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        start = time.monotonic()
        for read in (open_source, lambda name: valid_rows(name, dict, str)):
            with pytest.raises(UserError, match="the hub does not answer, and"):
                read("a/b")
        with pytest.raises(UserError, match="the Hugging Face Hub cannot be reached"):
            checkpoint_hub.download("a/b")
        assert time.monotonic() - start < 10
        assert not huggingface_hub.constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE


def test_who_is_offline_on_purpose_is_not_asked(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(checkpoint_hub, "hub_answers", lambda: pytest.fail("asked"))
    with checkpoint_hub.offline_if_unreachable() as can_ask:
        assert can_ask and huggingface_hub.constants.HF_HUB_OFFLINE
