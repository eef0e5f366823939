"""`dsv3 generate` and `dsv3 chat`: text in, text out as it comes."""

import sys
import time
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import InvalidCxxCompiler

from dsv3_ref.checkpoints.native import find_tokenizer_dir, load
from dsv3_ref.config import UserError
from dsv3_ref.data.tokenizer import (
    ASSISTANT,
    BOS,
    EOS,
    USER,
    load_tokenizer,
)
from dsv3_ref.decode import SamplingParams, stream
from dsv3_ref.model import Transformer
from dsv3_ref.training.strategy import pick_device


@dataclass(frozen=True)
class GenerationOptions:
    """What `generate` and `chat` share."""

    model: tyro.conf.Positional[Path]
    """a run, one of its checkpoints, or a Hugging Face directory"""
    max_new_tokens: int = 200
    """tokens to write at most"""
    temperature: float = 0.8
    """0: always the likeliest token"""
    top_p: float = 0.95
    """draw from the fewest likeliest tokens that reach this probability together"""
    stop: tuple[str, ...] = ()
    """texts that end an answer (they are not printed)"""
    num_speculative_tokens: int = 0
    """tokens that MTP modules guess ahead each round, up to the model's n_mtp_layers"""
    compile: bool = False
    """fuse each layer's step: twice as fast after some 20 seconds of compiling (needs g++)"""
    seed: int = 0
    """seed of the sampling"""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU if there is one"""


@dataclass(frozen=True)
class GenerateConfig(GenerationOptions):
    """Continue texts."""

    prompt: tuple[str, ...] = ("",)
    """one or several; several are written side by side and printed one after another"""


@dataclass(frozen=True)
class ChatConfig(GenerationOptions):
    """Talk to a model, line by line; an empty line or Ctrl-D ends the talk."""

    system: str = ""
    """what is said before the first turn"""
    web: bool = False
    """in a browser instead: a page with these settings, and the experts behind every token"""
    host: str = "127.0.0.1"
    """where the page is served: this machine alone; 0.0.0.0 is the whole network"""
    port: int = 7860
    """of the page; 0: a free one"""


# ── Text from tokens ──


class StreamDetokenizer:
    """Tokens in, text out as soon as it is certain: no half character, no half stop string."""

    def __init__(self, tokenizer, stop: tuple[str, ...] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.ids, self.num_emitted, self.ended = [], 0, False

    def push(self, tokens: list[int]) -> str:
        """The text that has become certain with these tokens."""
        self.ids += tokens
        text = self.tokenizer.decode(self.ids)
        ends = [i for s in self.stop if (i := text.find(s)) >= 0]
        if ends:
            self.ended = True
            return self.emit(text, min(ends))
        return self.emit(text, len(text.rstrip("\ufffd")) - partial_stop_length(text, self.stop))

    def flush(self) -> str:
        """What was held back, when nothing more will come."""
        text = self.tokenizer.decode(self.ids)
        return "" if self.ended else self.emit(text, len(text))

    def emit(self, text: str, end: int) -> str:
        new = text[self.num_emitted : end]
        self.num_emitted = max(self.num_emitted, end)
        return new


def partial_stop_length(text: str, stop: tuple[str, ...]) -> int:
    """Characters at the end of a text that may be the beginning of a stop string."""
    sizes = [n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])]
    return max(sizes, default=0)


# ── A model with its tokenizer ──


class TextGenerator:
    """A model, its tokenizer, and how tokens are chosen."""

    def __init__(self, args: GenerationOptions):
        validate_options(args)
        self.device = pick_device(args.device)
        self.model: Transformer = load(args.model).to(self.device).eval()
        self.tokenizer = load_tokenizer(find_tokenizer_dir(args.model))
        self.set_sampling(args)
        if args.compile:
            warm_up(self.model, args.num_speculative_tokens)

    def set_sampling(self, args: GenerationOptions) -> None:
        """From now on, choose tokens so."""
        validate_options(args)
        if args.num_speculative_tokens > len(self.model.mtp):
            raise UserError(
                f"--num-speculative-tokens {args.num_speculative_tokens}: this model has {len(self.model.mtp)} MTP modules"
            )
        generator = torch.Generator(self.device).manual_seed(args.seed)
        self.args, self.sampling_params = (
            args,
            SamplingParams(args.temperature, args.top_p, generator),
        )

    def with_options(self, args: GenerationOptions) -> "TextGenerator":
        """The same model with other options."""
        other = copy(self)
        other.set_sampling(args)
        return other

    def special_token_id(self, token: str) -> int:
        """The id of a special token; text never contains one."""
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise UserError(f"the tokenizer of {self.args.model} has no token {token}")
        return found

    def encode(self, text: str) -> list[int]:
        """Tokens of a text; what looks like a special token is spelled as plain characters."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_user_turn(self, text: str) -> list[int]:
        """A question as tokens, up to where the answer begins."""
        return [self.special_token_id(USER), *self.encode(text), self.special_token_id(ASSISTANT)]

    def encode_assistant_turn(self, text: str) -> list[int]:
        """An answer as it is remembered."""
        return [*self.encode(text), self.special_token_id(EOS)]

    def num_new_tokens(self, prompts: list[list[int]]) -> int:
        """Tokens that may be written after the longest prompt."""
        longest, limit = max(map(len, prompts)), self.model.config.max_seq_len
        if longest >= limit:
            raise UserError(f"the prompt has {longest} tokens, the model reads at most {limit - 1}")
        return min(self.args.max_new_tokens, limit - longest)

    def iter_steps(
        self, prompts: list[list[int]], live: Callable[[], list[bool]]
    ) -> Iterator[list[list[int]]]:
        """The new tokens of every row, round by round; `live` says which rows are to go on."""
        ends = {self.special_token_id(EOS)}
        options = self.args.num_speculative_tokens, self.args.compile
        rounds = stream(
            self.model, prompts, self.num_new_tokens(prompts), self.sampling_params, ends, *options
        )
        new = next(rounds, None)
        while new is not None:
            yield new
            try:
                new = rounds.send(live())
            except StopIteration:
                new = None

    def iter_text(self, prompts: list[list[int]]) -> Iterator[list[str]]:
        """The next piece of text of every row, round by round."""
        texts = [StreamDetokenizer(self.tokenizer, self.args.stop) for _ in prompts]
        for new in self.iter_steps(prompts, lambda: [not text.ended for text in texts]):
            yield [text.push(tokens) for text, tokens in zip(texts, new)]
        yield [text.flush() for text in texts]


def warm_up(model: Transformer, draft: int) -> None:
    """Compile the step for one row, and say how long it took."""
    start = time.perf_counter()
    try:
        list(stream(model, [[0]], 2 + draft, num_speculative_tokens=draft, compiled=True))
    except (InvalidCxxCompiler, BackendCompilerFailed) as e:
        raise UserError(f"--compile needs a C++ compiler such as g++ ({e})") from None
    print(f"compiled in {time.perf_counter() - start:.1f} s", file=sys.stderr)


def validate_options(args: GenerationOptions) -> None:
    """Raise a `UserError` for options that cannot be used."""
    rules = [
        (args.max_new_tokens >= 1, "--max-new-tokens must be at least 1"),
        (args.temperature >= 0, "--temperature must be at least 0"),
        (0 < args.top_p <= 1, "--top-p must be above 0 and at most 1"),
        (args.num_speculative_tokens >= 0, "--num-speculative-tokens must be at least 0"),
        (all(args.stop), "--stop needs a text that is not empty"),
    ]
    for holds, sentence in rules:
        if not holds:
            raise UserError(sentence)


# ── The commands ──


def run_generate(args: GenerateConfig) -> None:
    """Print each prompt with its continuation; a single one as it comes."""
    generator = TextGenerator(args)
    prompts = [[generator.special_token_id(BOS), *generator.encode(p)] for p in args.prompt]
    start, pieces, texts = time.perf_counter(), 0, list(args.prompt)
    alone = len(prompts) == 1
    if alone:
        print(args.prompt[0], end="", flush=True)
    for new in generator.iter_text(prompts):
        pieces += 1
        texts = [text + piece for text, piece in zip(texts, new)]
        if alone:
            print(new[0], end="", flush=True)
    print("" if alone else "\n\n".join(texts))
    seconds = time.perf_counter() - start
    print(f"{pieces - 1} rounds in {seconds:.1f} s", file=sys.stderr)


def run_chat(args: ChatConfig) -> None:
    """Talk here, or in a browser."""
    if args.web:
        from dsv3_ref.serving.web import serve_web_chat

        serve_web_chat(args)
    else:
        chat_loop(TextGenerator(args))


def chat_loop(generator: TextGenerator) -> None:
    """Read a line, answer it, remember both."""
    turns = []
    while line := read_line():
        turns.append(generator.encode_user_turn(line))
        answer = ""
        for new in generator.iter_text([truncate_history(generator, turns)]):
            answer += new[0]
            print(new[0], end="", flush=True)
        print()
        turns[-1] += generator.encode_assistant_turn(answer)


def read_line() -> str:
    """What the user says; '' at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def truncate_history(generator: TextGenerator, turns: list[list[int]]) -> list[int]:
    """System text and turns as tokens; the oldest turns go when they no longer fit."""
    start = [generator.special_token_id(BOS), *generator.encode(generator.args.system)]
    limit = generator.model.config.max_seq_len
    while (
        len(turns) > 1 and len(start) + sum(map(len, turns)) + generator.args.max_new_tokens > limit
    ):
        del turns[0]
    return start + [token for turn in turns for token in turn]
