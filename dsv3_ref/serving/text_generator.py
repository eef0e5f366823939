"""Text generation: a model with its tokenizer, and text that is decoded token by token."""

import codecs
import sys
import time
from collections.abc import Callable, Iterator
from copy import copy
from functools import cache
from typing import Generic, TypeVar

import torch
from tokenizers import Tokenizer, decoders
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import InvalidCxxCompiler

from dsv3_ref.checkpoints.native import find_tokenizer_dir, load
from dsv3_ref.config import UserError
from dsv3_ref.data.tokenizer import ASSISTANT, BOS, EOS, USER, load_tokenizer
from dsv3_ref.decode import SamplingParams, stream
from dsv3_ref.model import Transformer
from dsv3_ref.serving.config import ChatConfig, GenerationOptions, validate_generation_options
from dsv3_ref.training.strategy import pick_device

Options = TypeVar("Options", bound=GenerationOptions)


# ── Text from tokens ──


class ByteDecoder:
    """Incremental decoder of a byte-level tokenizer: each byte is read once."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.special = special_ids(tokenizer)

    def push(self, token: int) -> str:
        """Return the characters that a token completes."""
        text = None if token in self.special else self.tokenizer.id_to_token(token)
        return self.utf8.decode(token_bytes(text)) if text else ""

    @property
    def has_pending(self) -> bool:
        """True if the last character is incomplete."""
        return bool(self.utf8.getstate()[0])

    def flush(self) -> str:
        """Return “\ufffd” in the place of an incomplete character."""
        return self.utf8.decode(b"", final=True)


class WholeDecoder:
    """Decoder of any other tokenizer: decodes all tokens at every step."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.num_decoded = 0  # characters
        self.has_pending = False

    def push(self, token: int) -> str:
        """Return the characters that a token completes."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        certain = text.rstrip("\ufffd")
        self.has_pending = len(certain) < len(text)
        return self.advance(certain)

    def flush(self) -> str:
        """Return what `push` has held back."""
        self.has_pending = False
        return self.advance(self.tokenizer.decode(self.ids))

    def advance(self, text: str) -> str:
        """Return the part of the text that was not returned before."""
        new = text[self.num_decoded :]
        self.num_decoded = max(self.num_decoded, len(text))
        return new


@cache
def byte_of_sign() -> dict[str, int]:
    """Return the byte of each character that byte-level tokens are written with."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    signs = {chr(byte): byte for byte in printable}
    return signs | {chr(256 + i): byte for i, byte in enumerate(others)}


def token_bytes(text: str) -> bytes:
    """Return the bytes of a byte-level token; a text with other characters stands for itself."""
    signs = byte_of_sign()
    if all(sign in signs for sign in text):
        return bytes(signs[sign] for sign in text)
    return text.encode()


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids of special tokens, which are not part of a text."""
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(i for i, token in added.items() if token.special)


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Return whether tokens are strings of bytes."""
    return isinstance(tokenizer.decoder, decoders.ByteLevel)


class StreamDetokenizer:
    """Incremental detokenizer that withholds incomplete characters and stop strings.

    It reads token by token, so that the text does not depend on how many tokens arrive together.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()):
        decoder = ByteDecoder if is_byte_level(tokenizer) else WholeDecoder
        self.decoder: ByteDecoder | WholeDecoder = decoder(tokenizer)
        self.stop = stop
        self.withheld = ""  # complete characters that may begin a stop string
        self.num_emitted = 0  # characters
        self.ended = False  # a stop string was found

    def push(self, tokens: list[int]) -> str:
        """Append tokens and return the text that is now certain and was not returned before."""
        return "".join([self.emit(self.decoder.push(token)) for token in tokens])

    def flush(self) -> str:
        """Return the withheld text; call it when no more tokens will come."""
        return self.emit(self.decoder.flush(), is_last=True)

    @property
    def end_of_token(self) -> int:
        """The number of characters that must be returned before the last token's text has been."""
        return self.num_emitted + len(self.withheld) + self.decoder.has_pending + self.ended

    def emit(self, new: str, is_last: bool = False) -> str:
        """Return the text up to a stop string or to what may begin one."""
        if self.ended:
            return ""
        text = self.withheld + new
        stops = [i for s in self.stop if (i := text.find(s)) >= 0]
        if stops:
            self.ended = True
            end = min(stops)
        else:
            end = len(text) - (0 if is_last else partial_stop_length(text, self.stop))
        self.withheld = "" if self.ended else text[end:]
        self.num_emitted += end
        return text[:end]


def partial_stop_length(text: str, stop: tuple[str, ...]) -> int:
    """Return the length of the longest suffix of `text` that may begin a stop string."""
    longest = 0
    for s in stop:
        lengths = (n for n in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:n]))
        longest = max(longest, *lengths, 0)
    return longest


# ── A model with its tokenizer ──


class TextGenerator(Generic[Options]):
    """A model, its tokenizer, and the options for sampling."""

    def __init__(self, args: Options):
        validate_generation_options(args)
        self.device = pick_device(args.device)
        model = load(args.model, verify=args.verify)
        self.model: Transformer = model.to(self.device).eval()
        self.tokenizer = load_tokenizer(find_tokenizer_dir(args.model))
        self.set_sampling(args)
        if args.compile:
            warm_up(self.model, args.num_speculative_tokens)

    def set_sampling(self, args: Options) -> None:
        """Replace the options and seed the random number generator again.

        Raises a `UserError` if an option is out of range for this model.
        """
        validate_generation_options(args)
        num_modules = len(self.model.mtp)
        if args.num_speculative_tokens > num_modules:
            raise UserError(
                f"--num-speculative-tokens {args.num_speculative_tokens}: "
                f"this model has {num_modules} MTP modules"
            )
        generator = torch.Generator(self.device).manual_seed(args.seed)
        self.args = args
        self.sampling_params = SamplingParams(args.temperature, args.top_p, generator)

    def with_options(self, args: Options) -> "TextGenerator[Options]":
        """Return a generator with other options that shares this one's model."""
        other = copy(self)
        other.set_sampling(args)
        return other

    def special_token_id(self, token: str) -> int:
        """Return the id of a special token; raise a `UserError` if the tokenizer lacks it."""
        token_id = self.tokenizer.token_to_id(token)
        if token_id is None:
            raise UserError(f"the tokenizer of {self.args.model} has no token {token}")
        return token_id

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, in which special tokens are treated as plain text."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_user_turn(self, text: str) -> list[int]:
        """Return the token ids of a user's turn and of the token that begins the answer."""
        return [self.special_token_id(USER), *self.encode(text), self.special_token_id(ASSISTANT)]

    def encode_assistant_turn(self, text: str) -> list[int]:
        """Return the token ids of a finished answer, as it appears in the history."""
        return [*self.encode(text), self.special_token_id(EOS)]

    def num_new_tokens(self, prompts: list[list[int]]) -> int:
        """Return how many tokens may follow the longest prompt.

        Raises a `UserError` if that prompt fills the model's context.
        """
        longest = max(map(len, prompts))
        limit = self.model.config.max_seq_len
        if longest >= limit:
            raise UserError(
                f"the prompt has {longest} tokens, but the model reads at most {limit - 1}: "
                "shorten the prompt"
            )
        return min(self.args.max_new_tokens, limit - longest)

    def iter_steps(
        self, prompts: list[list[int]], live: Callable[[], list[bool]]
    ) -> Iterator[list[list[int]]]:
        """Yield the new tokens of every sequence, step by step.

        live: returns for every sequence whether to continue it; called after each step.
        """
        steps = stream(
            self.model, prompts, self.num_new_tokens(prompts), self.sampling_params,
            {self.special_token_id(EOS)}, self.args.num_speculative_tokens, self.args.compile,
        )  # fmt: skip
        new_tokens = next(steps, None)
        while new_tokens is not None:
            yield new_tokens
            try:
                new_tokens = steps.send(live())
            except StopIteration:
                return

    def iter_text(self, prompts: list[list[int]]) -> Iterator[list[str]]:
        """Yield the new text of every sequence, step by step, up to its stop string."""
        texts = [StreamDetokenizer(self.tokenizer, self.args.stop) for _ in prompts]
        for new_tokens in self.iter_steps(prompts, lambda: [not text.ended for text in texts]):
            yield [text.push(tokens) for text, tokens in zip(texts, new_tokens)]
        yield [text.flush() for text in texts]


def warm_up(model: Transformer, num_speculative_tokens: int) -> None:
    """Compile the decoding step for one sequence and print how long that took.

    Raises a `UserError` if there is no working C++ compiler.
    """
    start = time.perf_counter()
    depth = num_speculative_tokens
    try:
        list(stream(model, [[0]], 2 + depth, num_speculative_tokens=depth, compiled=True))
    except (InvalidCxxCompiler, BackendCompilerFailed) as e:
        raise UserError(f"--compile needs a C++ compiler such as g++ ({e})") from None
    print(f"compiled in {time.perf_counter() - start:.1f} s", file=sys.stderr)


def truncate_history(generator: TextGenerator[ChatConfig], turns: list[list[int]]) -> list[int]:
    """Return system text and turns as token ids, with room left for an answer.

    Removes the oldest turns from `turns` until the rest fits; the newest always stays.
    """
    prefix = [generator.special_token_id(BOS), *generator.encode(generator.args.system)]
    limit = generator.model.config.max_seq_len - generator.args.max_new_tokens
    while len(turns) > 1 and len(prefix) + sum(map(len, turns)) > limit:
        del turns[0]
    return sum(turns, prefix)
