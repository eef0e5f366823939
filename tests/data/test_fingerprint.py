"""Fingerprints: equal for equal documents however they are stored, different for any change."""

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_ref.data import fingerprint
from dsv3_ref.data.fingerprint import fingerprint_dataset, fingerprint_rows, fingerprint_texts
from dsv3_ref.data.sources import TextSource

TEXTS = st.lists(st.text(max_size=5) | st.none(), min_size=1, max_size=12)


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprint, "BLOCK", 4)
        yield


@given(texts=TEXTS)
def test_arrow_gives_what_texts_give(texts):
    features = datasets.Features({"text": datasets.Value("string")})
    dataset = datasets.Dataset.from_dict({"text": texts}, features=features)
    want = fingerprint_texts("x", [t or "" for t in texts])
    assert fingerprint_dataset("x", dataset) == want
    wide = dataset.cast_column("text", datasets.Value("large_string"))
    assert fingerprint_dataset("x", wide) == want
    twice = datasets.concatenate_datasets([dataset, dataset]).select(
        range(len(texts), 2 * len(texts))
    )
    assert fingerprint_dataset("x", twice) == want


@given(texts=st.lists(st.text(max_size=5), min_size=1, max_size=12), data=st.data())
def test_every_change_is_seen_in_its_block(texts, data):
    i = data.draw(st.integers(0, len(texts) - 1))
    other = data.draw(st.text(max_size=5).filter(lambda t: t != texts[i]))
    before = fingerprint_texts("x", texts)
    after = fingerprint_texts("x", texts[:i] + [other] + texts[i + 1 :])
    changed = [k for k, (a, b) in enumerate(zip(before["blocks"], after["blocks"])) if a != b]
    assert changed == [i // 4]


def test_moving_a_boundary_is_a_change():
    assert fingerprint_texts("x", ["ab", "c"]) != fingerprint_texts("x", ["a", "bc"])


def test_rows_do_not_depend_on_the_order_of_their_keys():
    assert fingerprint_rows("x", [{"a": 1, "b": 2}]) == fingerprint_rows("x", [{"b": 2, "a": 1}])
    assert fingerprint_rows("x", [{"a": 1}]) != fingerprint_rows("x", [{"a": 2}])


def test_a_stream_is_known_by_names_and_sizes(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n")
    stream = datasets.load_dataset("text", split="train", data_files=[str(path)], streaming=True)
    source = TextSource(str(path), 1.0, stream, seed=0)
    assert source.fingerprint() == {"name": str(path), "files": [["a.txt", 9]]}
