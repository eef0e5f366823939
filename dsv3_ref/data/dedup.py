"""Near-duplicates: MinHash signatures (rensa's), and a table of their bands that finds them."""

from collections.abc import Iterable, Sequence

import numpy as np

from dsv3_ref.config import UserError

NUM_PERM, SEED, NGRAM = 128, 42, 5  # of a signature; what is compared are runs of five words
MAX_MISS_RATE = 0.01  # share of pairs exactly at the threshold that the bands may overlook


def import_rensa():
    """The library, or what to install."""
    try:
        import rensa
    except ImportError:
        raise UserError(
            "near-duplicates are found by rensa: pip install 'dsv3-ref[data]', or --dedup 0"
        ) from None
    return rensa


def shingles(text: str) -> list[str]:
    """All runs of five words, in small letters; of a shorter text the whole."""
    words = text.lower().split()
    return [" ".join(words[i : i + NGRAM]) for i in range(max(1, len(words) - NGRAM + 1))]


def minhash_signatures(texts: Iterable[str]) -> np.ndarray:
    """(documents, 128) uint32; P[two agree at a place] = Jaccard similarity of their shingles."""
    sets = [shingles(text) for text in texts]
    found = import_rensa().RMinHash.digests_from_token_sets(sets, NUM_PERM, SEED)
    return np.array(found, np.uint32).reshape(-1, NUM_PERM)


def max_rows_per_band(threshold: float) -> int:
    """Most numbers r a band may have: 128/r bands overlook (1 − Jʳ)^(128/r) of pairs at J."""
    missed = lambda r: (1 - threshold**r) ** (NUM_PERM // r)
    return max((r for r in range(1, 33) if missed(r) <= MAX_MISS_RATE), default=1)


class MinHashLSH:
    """The documents kept so far, about 4 kB each; the first of those that are alike is kept."""

    def __init__(self, threshold: float):
        self.threshold, self.rows_per_band = threshold, max_rows_per_band(threshold)
        self.signatures = np.empty((1024, NUM_PERM), np.uint32)
        self.owners: list[int] = []  # sources
        self.table: dict[int, list[int]] = {}

    def band_keys(self, found: np.ndarray) -> list[list[int]]:
        """A number for every band of every signature, other bands other numbers."""
        bands = NUM_PERM // self.rows_per_band
        banded = found[:, : bands * self.rows_per_band].reshape(
            len(found), bands, self.rows_per_band
        )
        key = np.arange(1, bands + 1, dtype=np.uint64)[None].repeat(len(found), 0)
        for i in range(self.rows_per_band):
            key = (key ^ banded[:, :, i]) * np.uint64(0x9E3779B97F4A7C15)
            key ^= key >> np.uint64(29)
        return key.tolist()

    def query(self, signature: np.ndarray, keys: Sequence[int]) -> int | None:
        """The source of the first kept document that this one is much like."""
        near = sorted({i for key in keys for i in self.table.get(key, ())})
        if not near:
            return None
        alike = (self.signatures[near] == signature).mean(1) >= self.threshold
        return self.owners[near[int(alike.argmax())]] if alike.any() else None

    def insert(self, signature: np.ndarray, keys: Sequence[int], source: int) -> None:
        """Remember a document."""
        n = len(self.owners)
        if n == len(self.signatures):
            self.signatures = np.concatenate([self.signatures, np.empty_like(self.signatures)])
        self.signatures[n] = signature
        self.owners.append(source)
        for key in keys:
            self.table.setdefault(key, []).append(n)

    def insert_all(self, found: np.ndarray, source: int) -> None:
        """Remember documents that were kept before."""
        for signature, keys in zip(found, self.band_keys(found)):
            self.insert(signature, keys, source)
