"""`dsv3 generate` and `dsv3 chat`: text generation in the terminal."""

import sys
import time

from dsv3_ref.data.tokenizer import BOS
from dsv3_ref.serving.config import ChatConfig, GenerateConfig
from dsv3_ref.serving.text_generator import TextGenerator, truncate_history
from dsv3_ref.serving.web import serve_web_chat


def run_generate(args: GenerateConfig) -> None:
    """Print each prompt with its continuation; stream the text if there is only one prompt."""
    generator = TextGenerator(args)
    prompts = [[generator.special_token_id(BOS), *generator.encode(p)] for p in args.prompt]
    is_single = len(prompts) == 1
    start = time.perf_counter()
    num_pieces = 0
    texts = list(args.prompt)
    if is_single:
        print(args.prompt[0], end="", flush=True)
    for pieces in generator.iter_text(prompts):
        num_pieces += 1
        texts = [text + piece for text, piece in zip(texts, pieces)]
        if is_single:
            print(pieces[0], end="", flush=True)
    print("" if is_single else "\n\n".join(texts))
    seconds = time.perf_counter() - start
    print(f"{num_pieces - 1} decoding steps in {seconds:.1f} s", file=sys.stderr)


def run_chat(args: ChatConfig) -> None:
    """Chat in the terminal or, with --web, in a browser."""
    if args.web:
        serve_web_chat(args)
    else:
        chat_loop(TextGenerator(args))


def chat_loop(generator: TextGenerator[ChatConfig]) -> None:
    """Read a line, print the answer, and add both to the history, until the input ends."""
    turns: list[list[int]] = []
    while line := read_line():
        turns.append(generator.encode_user_turn(line))
        answer = ""
        for (piece,) in generator.iter_text([truncate_history(generator, turns)]):
            answer += piece
            print(piece, end="", flush=True)
        print()
        turns[-1] += generator.encode_assistant_turn(answer)


def read_line() -> str:
    """Return the next line of the user's input; "" at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
