"""Random orders of documents that can be resumed anywhere, in memory or computed on the fly."""

from collections.abc import Iterator

import numpy as np

MAX_PERMUTATION = 1 << 24  # documents whose permutation is held in memory


def permuted_indices(n: int, seed: list[int], start: int, step: int = 1) -> Iterator[int]:
    """Yield every `step`-th element of a permutation of 0 … n − 1 from the `start`-th on.

    `seed` determines the permutation.
    """
    rng = np.random.default_rng(seed)
    if n <= MAX_PERMUTATION:
        yield from map(int, rng.permutation(n)[start::step])
        return
    keys = rng.integers(1 << 63, size=4).tolist()
    yield from (feistel_permute(i, n, keys) for i in range(start, n, step))


def feistel_permute(i: int, n: int, keys: list[int]) -> int:
    """Return the position of i in a permutation of 0 … n − 1, by a Feistel network.

    Each key maps (l, r) → (r, l ⊕ f(r)), which permutes the numbers of 2b bits for any f. The
    network is repeated until the result is below n.
    """
    half = ((n - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for key in keys:
            mixed = (right ^ key) * 0x9E3779B97F4A7C15 % (1 << 64)
            mixed = (mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93 % (1 << 64)
            left, right = right, left ^ mixed >> 32 & mask
        i = left << half | right
        if i < n:
            return i
