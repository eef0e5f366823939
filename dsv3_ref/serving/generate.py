"""`dsv3 generate` and `dsv3 chat`: text generation in the terminal."""

import sys
import time
from contextlib import suppress

from dsv3_ref.config import UserError
from dsv3_ref.data.messages import Message
from dsv3_ref.data.terminal import printable
from dsv3_ref.serving.config import ChatConfig, GenerateConfig
from dsv3_ref.serving.text_generator import TextGenerator, answered, fit_history, question
from dsv3_ref.serving.web import serve_web_chat

FORGETTING = "the talk exceeds the model's context: from now on its oldest turns are left out"


def run_generate(args: GenerateConfig) -> None:
    """Print each prompt with its continuation; stream the text if there is only one prompt."""
    generator = TextGenerator(args)
    prompts = [generator.chat.encode_prompt(prompt) for prompt in args.prompt]
    is_single = len(prompts) == 1
    start = time.perf_counter()
    num_pieces = 0
    texts = list(args.prompt)
    if is_single:
        print_text(args.prompt[0])
    for pieces in generator.iter_text(prompts):
        num_pieces += 1
        texts = [text + piece for text, piece in zip(texts, pieces)]
        if is_single:
            print_text(pieces[0])
    print("" if is_single else printable("\n\n".join(texts), sys.stdout))
    seconds = time.perf_counter() - start
    print(f"{num_pieces - 1} decoding steps in {seconds:.1f} s", file=sys.stderr)


def print_text(text: str) -> None:
    """Print a text of a model at once; a terminal shows its control characters as escapes."""
    print(printable(text, sys.stdout), end="", flush=True)


def run_chat(args: ChatConfig) -> None:
    """Chat in the terminal or, with --web, in a browser."""
    if args.web:
        serve_web_chat(args)
    else:
        chat_loop(TextGenerator(args))


def chat_loop(generator: TextGenerator[ChatConfig]) -> None:
    """Read a line, print the answer, and add both to the history, until the input ends.

    A line that cannot be answered is reported and left out of the history; where lines come from a
    file or a pipe, the exit code is then 2. Says once when the model's context no longer holds the
    whole talk.
    """
    enable_line_editing()
    turns: list[list[Message]] = []
    is_whole, has_failed = True, False
    while line := read_line():
        before = list(turns)
        turns.append(question(line))
        num_turns = len(turns)
        try:
            prompt = fit_history(generator, turns)
            if is_whole and len(turns) < num_turns:
                is_whole = False
                print(FORGETTING, file=sys.stderr)
            turns[-1] = answered(turns[-1], print_answer(generator, prompt))
        except UserError as e:
            print(f"error: {printable(str(e), sys.stderr)}", file=sys.stderr)
            turns, has_failed = before, True
    if has_failed and not sys.stdin.isatty():
        raise SystemExit(2)


def enable_line_editing() -> None:
    """Let arrow keys move within a line of a terminal and recall earlier lines."""
    if sys.stdin.isatty():
        with suppress(ImportError):  # Windows has no such module: its console edits lines itself
            import readline  # noqa: F401  `input` then uses it


def print_answer(generator: TextGenerator[ChatConfig], prompt: list[int]) -> str:
    """Print an answer while it is generated and return it; Ctrl-C ends it early."""
    answer = ""
    try:
        for (piece,) in generator.iter_text([prompt]):
            answer += piece
            print_text(piece)
    except KeyboardInterrupt:
        print(" …", end="")
    print()
    return answer


def read_line() -> str:
    """Return the next line of the user's input; "" at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
