"""Text generation: a model with its tokenizer."""

import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from copy import copy
from itertools import chain
from typing import Generic, TypeVar

import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import InvalidCxxCompiler

from dsv3_ref.checkpoints.native import find_tokenizer_dir, load
from dsv3_ref.config import UserError
from dsv3_ref.data.chat_template import ChatTemplate
from dsv3_ref.data.messages import Message
from dsv3_ref.data.tokenizer import check_tokens
from dsv3_ref.decode import SamplingParams, stream
from dsv3_ref.model import Transformer
from dsv3_ref.serving.config import ChatConfig, GenerationOptions, validate_generation_options
from dsv3_ref.serving.detokenizer import StreamDetokenizer
from dsv3_ref.training.strategy import pick_device

Options = TypeVar("Options", bound=GenerationOptions)

TEMPERATURE, TOP_P = 0.8, 0.95  # where neither an option nor generation_config.json says one
NO_PENALTY = (
    "the repetition_penalty of the model's generation_config.json has no effect here; `dsv3 serve` "
    "applies it"
)


# ── A model with its tokenizer ──


class TextGenerator(Generic[Options]):
    """A model, its tokenizer, and the options for sampling."""

    def __init__(self, args: Options):
        validate_generation_options(args)
        self.device = pick_device(args.device)
        model = load(args.model, verify=args.verify)
        self.model: Transformer = model.to(self.device).eval()
        self.chat = ChatTemplate.from_dir(find_tokenizer_dir(args.model))
        self.tokenizer = self.chat.tokenizer
        self.set_sampling(args)
        if self.chat.settings.sampling.get("repetition_penalty", 1) != 1:
            print(NO_PENALTY, file=sys.stderr)
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
        defaults = self.chat.settings.sampling
        temperature = first_given(args.temperature, defaults.get("temperature"), TEMPERATURE)
        top_p = first_given(args.top_p, defaults.get("top_p"), TOP_P)
        top_k = max(0, int(defaults.get("top_k", 0)))
        self.sampling_params = SamplingParams(
            temperature, top_p, generator, top_k, defaults.get("min_p", 0.0)
        )

    def with_options(self, args: Options) -> "TextGenerator[Options]":
        """Return a generator with other options that shares this one's model."""
        other = copy(self)
        other.set_sampling(args)
        return other

    def num_new_tokens(self, prompts: list[list[int]]) -> int:
        """Return how many tokens may follow the longest prompt.

        Raises a `UserError` if that prompt fills the model's context, or if the model lacks a
        token of a prompt.
        """
        check_tokens(prompts, self.model.config.vocab_size)
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
            self.chat.stop_token_ids, self.args.num_speculative_tokens, self.args.compile,
        )  # fmt: skip
        new_tokens = next(steps, None)
        while new_tokens is not None:
            yield new_tokens
            try:
                new_tokens = steps.send(live())
            except StopIteration:
                return

    def without_stop(self, tokens: list[int]) -> list[int]:
        """Return tokens without the stop token, which a tokenizer may declare as text."""
        return [token for token in tokens if token not in self.chat.stop_token_ids]

    def iter_text(self, prompts: list[list[int]]) -> Iterator[list[str]]:
        """Yield the new text of every sequence, step by step, up to its stop string."""
        texts = [StreamDetokenizer(self.tokenizer, self.args.stop) for _ in prompts]
        for new_tokens in self.iter_steps(prompts, lambda: [not text.ended for text in texts]):
            yield [text.push(self.without_stop(tokens)) for text, tokens in zip(texts, new_tokens)]
        yield [text.flush() for text in texts]


def first_given(*values: float | None) -> float:
    """Return the first value that is not None."""
    return next(value for value in values if value is not None)


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


def fit_history(generator: TextGenerator[ChatConfig], turns: list[list[Message]]) -> list[int]:
    """Return system text and turns as the tokens of a prompt, with room left for an answer.

    Removes the oldest turns from `turns` until the rest fits; the newest always stays. Text is
    tokenized a number of times that is logarithmic in the number of turns: a browser chooses both.
    """
    system = [{"role": "system", "content": generator.args.system}] if generator.args.system else []
    limit = generator.model.config.max_seq_len - generator.args.max_new_tokens

    def render(start: int) -> list[int]:
        return generator.chat.render_prompt([*system, *chain.from_iterable(turns[start:])])

    prompt, last = render(0), len(turns) - 1
    if len(prompt) > limit and last:
        start, prompt = last, render(last)
        if len(prompt) <= limit:
            start = bisect_left(range(last), True, 1, key=lambda i: len(render(i)) <= limit)
            prompt = render(start)
        del turns[:start]
    return prompt


def question(text: str) -> list[Message]:
    """Return a turn of a chat that waits for its answer."""
    return [{"role": "user", "content": text}]


def answered(turn: list[Message], text: str) -> list[Message]:
    """Return a turn of a chat with its answer, in which lone halves of characters are “\ufffd”."""
    return [*turn, {"role": "assistant", "content": text}]
