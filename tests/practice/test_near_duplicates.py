"""Near-duplicates in text without spaces between words: found, and other documents are kept."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_ref.data.dedup import LONG_WORD, MinHashLSH, minhash_signatures, shingles

HAN = "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子"
KANA = (
    "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもやゆよらりるれろわをん"
)
THAI = "กขคงจฉชซญดตถทธนบปผฝพฟภมยรลวศสหอ" + "ะาิีึืุูเแโใไ"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def written(alphabet: str, rng: random.Random, n: int = 600) -> str:
    """Sentences of random characters with full stops and without spaces."""
    stop = "。" if alphabet in (HAN, KANA) else " "
    return "".join(rng.choice(alphabet) + stop * (i % 40 == 39) for i in range(n))


def minified(_: str, rng: random.Random) -> str:
    """A bundle of JavaScript as minifiers write it."""

    def name() -> str:
        return "".join(rng.choice(LETTERS) for _ in range(rng.choice([1, 1, 2, 7])))

    return "".join(
        f"function {name()}({name()},{name()}){{return {name()}.{name()}+{rng.randrange(99)}}};"
        for _ in range(60)
    )


def blob(_: str, rng: random.Random) -> str:
    """A gene, or data in base 64: a single word."""
    return "".join(rng.choice("acgt") for _ in range(600))


def retouched(text: str, rng: random.Random, alphabet: str) -> str:
    """Eight characters changed."""
    chars = list(text)
    for i in rng.sample(range(len(chars)), 8):
        chars[i] = rng.choice(alphabet)
    return "".join(chars)


@pytest.mark.parametrize(
    ("write", "alphabet"),
    [
        # a whole sentence is one word to str.split: rohitg00/agentmemory#1021,
        # mvanhorn/last30days-skill#547, ChenghaoMou/text-dedup#90
        pytest.param(written, HAN, id="chinese"),
        pytest.param(written, KANA, id="japanese"),
        pytest.param(written, THAI, id="thai"),
        # tokenization of code (bigcode-project/bigcode-analysis#10)
        pytest.param(minified, LETTERS, id="minified code"),
        pytest.param(blob, "acgt", id="one long word"),
    ],
)
def test_a_retouched_copy_is_found_and_another_text_is_not(write, alphabet):
    rng = random.Random(1)
    text, other = write(alphabet, rng), write(alphabet, rng)
    signatures = minhash_signatures([text, retouched(text, rng, alphabet), other])
    near = MinHashLSH(0.7)
    keys = near.band_keys(signatures)
    near.insert(signatures[0], keys[0], source=0)
    assert near.query(signatures[1], keys[1]) == 0
    assert near.query(signatures[2], keys[2]) is None


def test_the_order_of_sentences_hardly_matters_and_that_of_characters_does():
    """Short runs of characters: a bag of characters would call all Chinese texts alike."""
    rng = random.Random(2)
    sentences = [written(HAN, rng, 30) for _ in range(20)]
    text, moved = "。".join(sentences), "。".join(sentences[::-1])
    shuffled = "".join(rng.sample(text, len(text)))
    a, b, c = (set(shingles(x)) for x in (text, moved, shuffled))
    assert len(a & b) / len(a | b) > 0.6
    assert len(a & c) / len(a | c) < 0.01


@given(
    st.lists(st.text(st.characters(categories=["L", "P"], max_codepoint=0x5FF), max_size=LONG_WORD))
)
def test_languages_with_spaces_are_compared_by_words_as_before(words):
    text = " ".join(words).lower()
    parts = text.split()
    if max(map(len, parts), default=0) <= LONG_WORD:
        want = [" ".join(parts[i : i + 5]) for i in range(max(1, len(parts) - 4))]
        assert shingles(text) == want


def test_a_mixed_text_keeps_the_words_of_each_script():
    assert shingles("use 深度学习 for naïve-bayes") == [
        "use 深 度 学 习", "深 度 学 习 for", "度 学 习 for naïve-bayes"
    ]  # fmt: skip
    assert np.array_equal(*minhash_signatures(["深度学习模型", "深度 学习 模型"]))
