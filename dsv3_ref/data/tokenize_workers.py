"""Worker processes of `dsv3 data prepare`, which turn texts into tokens and signatures, in order.

This module does not import torch, so that processes start fast and stay small.
"""

import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
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
    """A chunk of tokenized documents; a blank one has no tokens."""

    tokens: np.ndarray  # one document after another
    lengths: np.ndarray  # tokens of each
    n_bytes: np.ndarray  # of each text
    signatures: np.ndarray | None  # (documents, 128)


class TokenizeWorker(NamedTuple):
    """A function that tokenizes a chunk and, optionally, computes MinHash signatures."""

    tokenizer: Tokenizer
    dtype: np.dtype
    with_signatures: bool

    def __call__(self, texts: list[str]) -> TokenizedChunk:
        """Return the tokens and signatures of texts; a text of white space counts as empty."""
        texts = [text if text.strip() else "" for text in texts]
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = [np.array(e.ids, self.dtype) for e in encodings]
        return TokenizedChunk(
            np.concatenate([np.empty(0, self.dtype), *ids]),
            np.array([len(x) for x in ids], np.int64),
            np.array([len(text.encode()) for text in texts], np.int64),
            dedup.minhash_signatures(texts) if self.with_signatures else None,
        )


def imap_ordered(
    chunks: Iterable[list[str]], worker: TokenizeWorker, workers: int
) -> Iterator[TokenizedChunk]:
    """Yield every chunk tokenized, in order; one worker runs in this process."""
    if workers == 1:
        yield from (worker(chunk) for chunk in chunks)
        return
    init_args = worker.tokenizer.to_str(), worker.dtype, worker.with_signatures
    try:
        pool = ProcessPoolExecutor(workers, get_context("spawn"), init_worker, init_args)
    except OSError as e:  # semaphores need /dev/shm
        reason = e.strerror or e
        raise UserError(f"processes cannot share memory ({reason}): --workers 1 needs none") from e
    pending: deque[Future[TokenizedChunk]] = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(tokenize_chunk, chunk))
            if len(pending) > CHUNKS_AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a worker was killed, perhaps for lack of memory: rerun the same command to resume; "
            "--workers sets the number of processes"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


# ── Inside a process ──

_WORKER: list[TokenizeWorker] = []


def init_worker(tokenizer: str, dtype: np.dtype, with_signatures: bool) -> None:
    """Set up a worker process: a tokenizer with one thread, and a thread to watch the parent."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    own = encode_special_as_text(Tokenizer.from_str(tokenizer))
    _WORKER.append(TokenizeWorker(own, dtype, with_signatures))
    threading.Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent() -> None:
    """Wait until the parent process has ended, and end this process."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
    os._exit(1)


def tokenize_chunk(texts: list[str]) -> TokenizedChunk:
    """Tokenize a chunk with the worker of this process."""
    return _WORKER[0](texts)
