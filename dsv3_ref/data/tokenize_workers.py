"""The processes of `dsv3 data prepare`: texts go in, tokens and signatures come out, in order.

Nothing here imports torch, so that a process starts at once and stays small.
"""

import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from dsv3_ref.config import UserError
from dsv3_ref.data import dedup
from dsv3_ref.data.tokenizer import encode_special_as_text

CHUNKS_AHEAD = 3  # chunks that wait for each process


class TokenizedChunk(NamedTuple):
    """A chunk of documents; a blank one has no tokens."""

    tokens: np.ndarray  # one document after another
    lengths: np.ndarray  # tokens of each
    n_bytes: np.ndarray  # of each text
    signatures: np.ndarray | None  # (documents, 128)


class TokenizeWorker(NamedTuple):
    """What codes a chunk."""

    tokenizer: Tokenizer
    dtype: np.dtype
    with_signatures: bool

    def __call__(self, texts: list[str]) -> TokenizedChunk:
        texts = [text if text.strip() else "" for text in texts]
        coded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = [np.array(e.ids, self.dtype) for e in coded]
        return TokenizedChunk(
            np.concatenate([np.empty(0, self.dtype), *ids]),
            np.array([len(x) for x in ids], np.int64),
            np.array([len(text.encode()) for text in texts], np.int64),
            dedup.minhash_signatures(texts) if self.with_signatures else None,
        )


def imap_ordered(
    chunks: Iterable[list[str]], coder: TokenizeWorker, workers: int
) -> Iterator[TokenizedChunk]:
    """Every chunk coded, in the order of the chunks; one worker is this process."""
    if workers == 1:
        yield from map(coder, chunks)
        return
    told = coder.tokenizer.to_str(), coder.dtype, coder.with_signatures
    pool = ProcessPoolExecutor(workers, get_context("spawn"), init_worker, told)
    waiting = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(tokenize_chunk, chunk))
            if len(waiting) > CHUNKS_AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a worker was killed, perhaps for want of memory: the same command goes on where it "
            "stood; --workers sets how many there are"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


# ── Inside a process ──

_WORKER: list[TokenizeWorker] = []


def init_worker(tokenizer: str, dtype: np.dtype, near: bool) -> None:
    """What a process does first: its own tokenizer, one thread, and an eye on its parent."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    _WORKER.append(
        TokenizeWorker(encode_special_as_text(Tokenizer.from_str(tokenizer)), dtype, near)
    )
    threading.Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent() -> None:
    """End with the parent, however it ends."""
    connection.wait([parent_process().sentinel])
    os._exit(1)


def tokenize_chunk(texts: list[str]) -> TokenizedChunk:
    return _WORKER[0](texts)
