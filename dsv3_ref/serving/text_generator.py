"""Text generation: a model with its tokenizer, and text that is decoded token by token."""

import sys
import time
from collections.abc import Callable, Iterator
from copy import copy
from typing import Generic, TypeVar

import torch
from tokenizers import Tokenizer
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


class StreamDetokenizer:
    """Incremental detokenizer that withholds incomplete characters and stop strings."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()):
        self.tokenizer = tokenizer
        self.stop = stop
        self.ids: list[int] = []
        self.num_emitted = 0  # characters
        self.ended = False  # a stop string was found

    def push(self, tokens: list[int]) -> str:
        """Append tokens and return the text that is now certain and was not returned before."""
        self.ids += tokens
        text = self.tokenizer.decode(self.ids)
        stops = [i for s in self.stop if (i := text.find(s)) >= 0]
        if stops:
            self.ended = True
            return self.emit(text, min(stops))
        return self.emit(text, len(text.rstrip("\ufffd")) - partial_stop_length(text, self.stop))

    def flush(self) -> str:
        """Return the withheld text; call it when no more tokens will come."""
        text = self.tokenizer.decode(self.ids)
        return "" if self.ended else self.emit(text, len(text))

    def emit(self, text: str, end: int) -> str:
        """Return the part of text[:end] that was not returned before."""
        new = text[self.num_emitted : end]
        self.num_emitted = max(self.num_emitted, end)
        return new


def partial_stop_length(text: str, stop: tuple[str, ...]) -> int:
    """Return the length of the longest suffix of `text` that may begin a stop string."""
    longest = 0
    for s in stop:
        lengths = (n for n in range(1, len(s)) if text.endswith(s[:n]))
        longest = max(longest, *lengths, 0)
    return longest


# ── A model with its tokenizer ──


class TextGenerator(Generic[Options]):
    """A model, its tokenizer, and the options for sampling."""

    def __init__(self, args: Options):
        validate_generation_options(args)
        self.device = pick_device(args.device)
        self.model: Transformer = load(args.model).to(self.device).eval()
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
