"""Sequences of tokens from sources: the tokenizer, FIM, packing, shuffling, validation windows."""

import hashlib
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Encoding, Tokenizer

from dsv3_ref.data import tokenizer as tok
from dsv3_ref.data.sources import Document, Source
from dsv3_ref.data.text_cache import cache_dir, writable_cache_dir
from dsv3_ref.pretrain import fim, pack_documents, split_newlines

VAL_BATCH = 8  # windows evaluated at a time
SHUFFLE_ROWS, SHUFFLE_TOKENS = 2048, 1 << 23  # of all buffers; long rows: fewer, at least 32
MIN_SHUFFLE_ROWS = 16  # of the buffer of one of several streams
TOKENIZER_CHARS = 12_000_000  # of training text that a tokenizer learns from


# ── The tokenizer of this data ──


def load_or_train_tokenizer(
    sources: Sequence[Source], vocab_size: int, log: Callable[[str], object] = print
) -> Tokenizer:
    """Train a tokenizer on up to 12 MB of the sources' text, or load it from the cache."""
    texts = sample_texts(sources)
    digest = hashlib.sha256(f"{vocab_size}{tok.SPECIAL}{tok.new_tokenizer().to_str()}".encode())
    for text in texts:
        digest.update(f"\0{text}".encode())
    folder = writable_cache_dir()
    path = (folder or cache_dir()) / f"bpe-{digest.hexdigest()[:16]}" / "tokenizer.json"
    if path.is_file():
        return tok.load_tokenizer(path)
    megabytes = sum(map(len, texts)) / 1e6
    log(f"training a tokenizer of {vocab_size} tokens on {megabytes:.1f} MB of text")
    tokenizer = tok.train_tokenizer(texts, vocab_size)
    if folder:
        tok.save_tokenizer(tokenizer, path)
    return tokenizer


def sample_texts(sources: Sequence[Source], budget: int = TOKENIZER_CHARS) -> list[str]:
    """Return training documents up to each source's share of `budget` characters.

    Their order does not depend on the run's seed, so that all runs get the same tokenizer.
    """
    total = sum(s.weight for s in sources)
    texts: list[str] = []
    for source in sources:
        room = int(budget * source.weight / total)
        for text in map(source.to_text, source.documents(seed=0)):
            if room <= 0:
                break
            texts.append(text[:room])
            room -= len(text)
    return texts


# ── Packed sequences ──


class PackedDataLoader:
    """An endless, resumable stream of rows of `length` tokens, mixed by weight and shuffled.

    stream, num_streams: of the documents, take those that belong to one of several streams.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: Tokenizer,
        length: int,
        seed: int,
        fim_rate: float = 0.1,
        split_rate: float = 0.1,
        stream: int = 0,
        num_streams: int = 1,
    ):
        tok.check_document_tokens(tokenizer, needs_fim=fim_rate > 0)
        self.sources = [source.take_part(stream, num_streams) for source in sources]
        self.tokenizer = tokenizer
        self.length = length
        self.fim_rate, self.split_rate = fim_rate, split_rate
        self.rng = np.random.default_rng([seed, 7, stream])
        self.documents = [s.train_documents() for s in self.sources]
        self.num_streams = num_streams
        self.splits = tok.newline_splits(tokenizer)
        self.ids = {s: i for s in tok.SPECIAL if (i := tokenizer.token_to_id(s)) is not None}
        self.remainder: list[int] = []  # tokens that did not fill a row yet
        self.buffer: list[np.ndarray] = []  # rows to draw from

    def encode(self, document: Document, rng: random.Random) -> list[int]:
        """Return BOS, the tokens of a document, EOS; in PSM order where FIM applies (§4.1).

        A document that is already tokenized is decoded only if FIM applies to it.
        """
        if not isinstance(document, str) and will_apply_fim(rng, self.fim_rate):
            document = self.tokenizer.decode(document.tolist())
        if isinstance(document, str):
            cut = fim(document, rng, self.fim_rate)
            pieces = [e.ids for e in self.encode_batch([document] if cut is None else list(cut))]
        else:
            rng.random()  # `fim` draws one number, too: later draws stay the same
            cut, pieces = None, [document.tolist()]
        parts = [split_newlines(ids, self.splits, rng, self.split_rate) for ids in pieces]
        bos, eos = [self.ids[tok.BOS]], [self.ids[tok.EOS]]
        if cut is None:
            return bos + parts[0] + eos
        begin, hole, end = ([self.ids[s]] for s in (tok.FIM_BEGIN, tok.FIM_HOLE, tok.FIM_END))
        prefix, middle, suffix = parts
        return bos + begin + prefix + hole + suffix + end + middle + eos

    def encode_batch(self, pieces: list[str]) -> list[Encoding]:
        """Tokenize texts without special tokens."""
        return self.tokenizer.encode_batch_fast(pieces, add_special_tokens=False)

    def refill(self) -> None:
        """Pack a document of the source that has drawn the fewest tokens relative to its weight."""
        drawn = [s.tokens_drawn / s.weight for s in self.sources]
        i = drawn.index(min(drawn))
        source, document = self.sources[i], next(self.documents[i])
        rng = random.Random(f"{source.seed} {source.epoch} {source.document_number}")
        tokens = self.encode(document, rng)
        source.tokens_drawn += len(tokens)
        rows, self.remainder = pack_documents(self.remainder, tokens, self.length)
        self.buffer += [np.array(row, dtype=np.int32) for row in rows]

    def __next__(self) -> np.ndarray:
        """Fill the buffer and return a random row of it."""
        full = min(SHUFFLE_ROWS, max(32, SHUFFLE_TOKENS // self.length))
        if self.num_streams > 1:
            full = max(MIN_SHUFFLE_ROWS, full // self.num_streams)
        while len(self.buffer) < full:
            self.refill()
        i = int(self.rng.integers(len(self.buffer)))
        self.buffer[i], self.buffer[-1] = self.buffer[-1], self.buffer[i]
        return self.buffer.pop()

    def next_batch(self, n: int) -> torch.Tensor:
        """Return n rows, (n, length), int64."""
        return torch.from_numpy(np.stack([next(self) for _ in range(n)])).long()

    def snapshot(self) -> Callable[[], dict[str, Any]]:
        """Return a function that returns the present state; it is cheap until it is called."""
        sources = [[s.epoch, s.index, s.tokens_drawn] for s in self.sources]
        rng, rows = self.rng.bit_generator.state, list(self.buffer)
        remainder = self.remainder

        def state_dict() -> dict[str, Any]:
            buffer = np.stack(rows) if rows else np.zeros((0, self.length), np.int32)
            return {
                "sources": sources, "rng": rng, "buffer": torch.from_numpy(buffer),
                "remainder": torch.tensor(remainder, dtype=torch.int32),
            }  # fmt: skip

        return state_dict

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream: values for JSON, and tensors of buffered tokens."""
        return self.snapshot()()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        for source, (epoch, index, tokens_drawn) in zip(self.sources, state["sources"]):
            source.epoch, source.index = epoch, index
            source.tokens_drawn = tokens_drawn
        self.documents = [s.train_documents() for s in self.sources]
        self.rng.bit_generator.state = state["rng"]
        self.remainder = state["remainder"].tolist()
        self.buffer = list(state["buffer"].numpy())


def will_apply_fim(rng: random.Random, rate: float) -> bool:
    """Return whether the next number drawn from rng is below the rate, without drawing it."""
    state = rng.getstate()
    number = rng.random()
    rng.setstate(state)
    return number < rate


# ── Validation windows ──


def val_windows(texts: list[str], tokenizer: Tokenizer, length: int) -> list[torch.Tensor]:
    """Return windows over concatenated held-out documents, in batches (≤ VAL_BATCH, ≤ length + 1).

    Consecutive windows share a token, so that every token except the first is predicted once.
    """
    bos, eos = tokenizer.token_to_id(tok.BOS), tokenizer.token_to_id(tok.EOS)
    documents = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ids = torch.cat([torch.tensor([bos, *document.ids, eos]) for document in documents])
    *windows, last = (ids[i : i + length + 1] for i in range(0, len(ids) - 1, length))
    batches = (windows[i : i + VAL_BATCH] for i in range(0, len(windows), VAL_BATCH))
    return [*map(torch.stack, batches), last[None]]
