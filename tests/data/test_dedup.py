"""MinHash and its table of bands: what is compared, how many bands there are, what is found."""

import random
from itertools import chain

import numpy as np
import pytest

from dsv3_ref.data import dedup
from dsv3_ref.data.dedup import MinHashLSH, max_rows_per_band, minhash_signatures, shingles


@pytest.mark.parametrize(
    ("text", "runs"),
    [
        ("One two THREE four five", ["one two three four five"]),
        ("a b c d e F", ["a b c d e", "b c d e f"]),
        ("a b c d e f g", ["a b c d e", "b c d e f", "c d e f g"]),
        ("a b c d", ["a b c d"]),
        ("  one\n\ttwo ", ["one two"]),
        ("", [""]),
        ("one 你好吗 é", ["one 你 好 吗 é"]),  # scripts without spaces between words
        ("sixteen=letters! a", ["sixteen=letters! a"]),
        ("seventeen=letters a", ["seventeen = letters a"]),
        ("x" * 33, ["x x x x x"] * 29),
    ],
)
def test_runs_of_five_words_are_compared(text, runs):
    assert shingles(text) == runs


def test_signatures_are_128_numbers_by_one_seed():
    signatures = minhash_signatures(["a b c d e f g", "another text"])
    assert signatures.shape == (2, 128)
    assert signatures.dtype == np.uint32
    assert signatures[0, :4].tolist() == [3379257556, 3674807858, 664203908, 3598053546]
    assert minhash_signatures([]).shape == (0, 128)


@pytest.mark.parametrize(
    ("threshold", "rows"),
    [(0.0, 1), (0.1, 1), (0.3, 2), (0.5, 3), (0.7, 4), (0.8, 6), (0.9, 10), (0.95, 16), (1.0, 32)],
)
def test_bands_have_as_many_rows_as_one_miss_in_a_hundred_allows(threshold, rows):
    assert max_rows_per_band(threshold) == rows


def test_the_allowed_misses_include_their_bound(monkeypatch):
    monkeypatch.setattr(dedup, "MAX_MISS_RATE", (1 - 0.8**7) ** (128 // 7))
    assert max_rows_per_band(0.8) == 7


def test_a_band_has_a_key_of_its_own():
    lsh = MinHashLSH(0.8)
    a, b = np.arange(256, dtype=np.uint32).reshape(2, 128)
    (key_a, key_b, key_c) = lsh.band_keys(np.stack([a, b, np.zeros(128, np.uint32)]))
    assert len(key_a) == 128 // 6
    assert key_a[:2] == [14253110928325015522, 844382556650523583]
    assert len({*key_a, *key_b, *key_c}) == 3 * 21  # bands of equal numbers differ too
    other = a.copy()
    other[6:126] += 1  # all bands but the first; the last two numbers are in none
    other[126:] += 5
    assert [x == y for x, y in zip(key_a, lsh.band_keys(other[None])[0])] == [True] + 20 * [False]


def test_the_first_document_that_reaches_the_threshold_is_found():
    lsh = MinHashLSH(0.75)
    base = np.arange(128, dtype=np.uint32)
    for source, equal in enumerate([95, 96, 128]):  # 96 of 128 are exactly three quarters
        signature = np.where(base < equal, base, base + 1000 + 200 * source).astype(np.uint32)
        lsh.insert(signature, lsh.band_keys(signature[None])[0], source)
    assert lsh.query(base, lsh.band_keys(base[None])[0]) == 1
    strange = base + 5000
    assert lsh.query(strange, lsh.band_keys(strange[None])[0]) is None
    assert lsh.query(base, []) is None


def test_it_grows_and_forgets_nothing():
    rng = random.Random(0)
    signatures = np.array(
        [[rng.getrandbits(32) for _ in range(128)] for _ in range(2050)], np.uint32
    )
    lsh = MinHashLSH(0.8)
    lsh.insert_all(signatures[:1500], 3)
    lsh.insert_all(signatures[1500:], 4)
    keys = lsh.band_keys(signatures)
    found = [lsh.query(s, k) for s, k in zip(signatures, keys)]
    assert found == 1500 * [3] + 550 * [4]
    assert set(chain(*lsh.table.values())) == set(range(2050))
