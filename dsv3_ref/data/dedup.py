"""Near-duplicates: MinHash signatures (rensa's), and a table of their bands that finds them."""

from collections.abc import Iterable, Sequence

import numpy as np

from dsv3_ref.config import UserError

NUMBERS, SEED, WORDS = 128, 42, 5  # of a signature; what is compared are runs of five words
MISSED = 0.01  # share of pairs exactly at the threshold that the bands may overlook


def rensa():
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
    return [" ".join(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))]


def signatures(texts: Iterable[str]) -> np.ndarray:
    """(documents, 128) uint32; P[two agree at a place] = Jaccard similarity of their shingles."""
    sets = [shingles(text) for text in texts]
    found = rensa().RMinHash.digests_from_token_sets(sets, NUMBERS, SEED)
    return np.array(found, np.uint32).reshape(-1, NUMBERS)


def band_rows(threshold: float) -> int:
    """Most numbers r a band may have: 128/r bands overlook (1 − Jʳ)^(128/r) of pairs at J."""
    missed = lambda r: (1 - threshold**r) ** (NUMBERS // r)
    return max((r for r in range(1, 33) if missed(r) <= MISSED), default=1)


class Near:
    """The documents kept so far, about 4 kB each; the first of those that are alike is kept."""

    def __init__(self, threshold: float):
        self.threshold, self.rows = threshold, band_rows(threshold)
        self.kept = np.empty((1024, NUMBERS), np.uint32)
        self.owners: list[int] = []  # sources
        self.table: dict[int, list[int]] = {}

    def keys(self, found: np.ndarray) -> list[list[int]]:
        """A number for every band of every signature, other bands other numbers."""
        bands = NUMBERS // self.rows
        banded = found[:, : bands * self.rows].reshape(len(found), bands, self.rows)
        key = np.arange(1, bands + 1, dtype=np.uint64)[None].repeat(len(found), 0)
        for i in range(self.rows):
            key = (key ^ banded[:, :, i]) * np.uint64(0x9E3779B97F4A7C15)
            key ^= key >> np.uint64(29)
        return key.tolist()

    def like(self, signature: np.ndarray, keys: Sequence[int]) -> int | None:
        """The source of the first kept document that this one is much like."""
        near = sorted({i for key in keys for i in self.table.get(key, ())})
        if not near:
            return None
        alike = (self.kept[near] == signature).mean(1) >= self.threshold
        return self.owners[near[int(alike.argmax())]] if alike.any() else None

    def keep(self, signature: np.ndarray, keys: Sequence[int], source: int) -> None:
        """Remember a document."""
        n = len(self.owners)
        if n == len(self.kept):
            self.kept = np.concatenate([self.kept, np.empty_like(self.kept)])
        self.kept[n] = signature
        self.owners.append(source)
        for key in keys:
            self.table.setdefault(key, []).append(n)

    def restore(self, found: np.ndarray, source: int) -> None:
        """Remember documents that were kept before."""
        for signature, keys in zip(found, self.keys(found)):
            self.keep(signature, keys, source)
