"""Near-duplicates: MinHash signatures (by rensa) and an index of their bands (LSH)."""

import re
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType

import numpy as np

from dsv3_ref.config import UserError

NUM_PERM, SEED = 128, 42  # of a signature
NGRAM = 5  # words, or parts of text without spaces, of the runs that are compared
SHINGLES = 2  # version of what `shingles` returns
LONG_WORD, LONG_PIECE = 16, 32  # characters: longer ones are split
# Scripts that are written without spaces between words: Thai to Tibetan, Burmese, Khmer, Chinese
# and Japanese.
UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3040-\u30ff"
    "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
HAS_UNSPACED = re.compile(f"[{UNSPACED}]")
PIECE = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+|[^\w\s]")
MAX_MISS_RATE = 0.01  # fraction of pairs exactly at the threshold that the bands may miss
FIRST_CAPACITY = 1024  # signatures


def import_rensa() -> ModuleType:
    """Return the module rensa, or raise a `UserError` that says how to install it."""
    try:
        import rensa
    except ImportError:
        raise UserError(
            "near-duplicates are found by rensa: pip install 'dsv3-ref[data]', or --dedup 0"
        ) from None
    return rensa


def shingles(text: str) -> list[str]:
    """Return all runs of five units of a text, or the whole of a shorter text."""
    parts = list(units(text.lower()))
    return [" ".join(parts[i : i + NGRAM]) for i in range(max(1, len(parts) - NGRAM + 1))]


def units(text: str) -> Iterator[str]:
    """Yield the words of a text; where they are not separated by spaces, smaller parts.

    These are single characters in Chinese, Japanese, Thai and the like and in runs of more than
    LONG_PIECE letters, and names and signs in words of more than LONG_WORD characters, such as
    minified code.
    """
    has_unspaced = HAS_UNSPACED.search(text) is not None
    for word in text.split():
        if len(word) <= LONG_WORD and not (has_unspaced and HAS_UNSPACED.search(word)):
            yield word
            continue
        for piece in PIECE.findall(word):
            if len(piece) > LONG_PIECE:
                yield from piece
            else:
                yield piece


def minhash_signatures(texts: Iterable[str]) -> np.ndarray:
    """Return (documents, 128) uint32; P[two agree at a place] = Jaccard similarity of shingles."""
    sets = [shingles(text) for text in texts]
    digests = import_rensa().RMinHash.digests_from_token_sets(sets, NUM_PERM, SEED)
    return np.array(digests, np.uint32).reshape(-1, NUM_PERM)


def miss_rate(threshold: float, rows: int) -> float:
    """Return (1 − Jʳ)^(128/r): the probability that bands of r rows miss a pair at J."""
    return (1 - threshold**rows) ** (NUM_PERM // rows)


def max_rows_per_band(threshold: float) -> int:
    """Return the most numbers r a band may have for a miss rate of at most 1 % at the threshold."""
    allowed = [rows for rows in range(1, 33) if miss_rate(threshold, rows) <= MAX_MISS_RATE]
    return max(allowed, default=1)


class MinHashLSH:
    """An index of documents, about 4 kB each, that finds one similar to a new document."""

    def __init__(self, threshold: float):
        self.threshold, self.rows_per_band = threshold, max_rows_per_band(threshold)
        self.signatures = np.empty((FIRST_CAPACITY, NUM_PERM), np.uint32)
        self.owners: list[int] = []  # the source of each document
        self.table: dict[int, list[int]] = {}  # band key → documents

    def band_keys(self, signatures: np.ndarray) -> list[list[int]]:
        """Return a number per band of every signature; different bands have different numbers."""
        bands = NUM_PERM // self.rows_per_band
        numbers = signatures[:, : bands * self.rows_per_band]
        banded = numbers.reshape(len(signatures), bands, self.rows_per_band)
        key = np.arange(1, bands + 1, dtype=np.uint64)[None].repeat(len(signatures), 0)
        for i in range(self.rows_per_band):
            key = (key ^ banded[:, :, i]) * np.uint64(0x9E3779B97F4A7C15)
            key ^= key >> np.uint64(29)
        return key.tolist()

    def query(self, signature: np.ndarray, keys: Sequence[int]) -> int | None:
        """Return the source of the first document that is similar enough, or None."""
        candidates: set[int] = set()
        for key in keys:
            candidates.update(self.table.get(key, ()))
        if not candidates:
            return None
        near = sorted(candidates)
        similar = (self.signatures[near] == signature).mean(1) >= self.threshold
        return self.owners[near[int(similar.argmax())]] if similar.any() else None

    def insert(self, signature: np.ndarray, keys: Sequence[int], source: int) -> None:
        """Add a document of a source."""
        n = len(self.owners)
        if n == len(self.signatures):
            self.signatures = np.concatenate([self.signatures, np.empty_like(self.signatures)])
        self.signatures[n] = signature
        self.owners.append(source)
        for key in keys:
            self.table.setdefault(key, []).append(n)

    def insert_all(self, signatures: np.ndarray, source: int) -> None:
        """Add the documents of a source that an earlier process has inserted."""
        for signature, keys in zip(signatures, self.band_keys(signatures)):
            self.insert(signature, keys, source)
