"""Byte-level BPE with V3's pre-tokenizer and special tokens."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from dsv3_ref.checkpoints.atomic import check_regular, clear_path
from dsv3_ref.config import UserError
from dsv3_ref.data.tokenizer_conversion import convert_tokenizer
from dsv3_ref.data.tokenizer_settings import TokenizerSettings

if TYPE_CHECKING:
    from dsv3_ref.sft import SpecialTokens

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
FIM_HOLE = "<｜fim▁hole｜>"
FIM_BEGIN, FIM_END = "<｜fim▁begin｜>", "<｜fim▁end｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
SPECIAL = [BOS, EOS, PAD, FIM_HOLE, FIM_BEGIN, FIM_END, USER, ASSISTANT, "<|EOT|>"]
MAX_TOKEN_ID = (1 << 24) - 1  # V3 has 128,000 tokens
SAMPLE = "Hello, wörld 123\n"  # a tokenizer that cannot encode and decode it is refused
DIGITS = r"\p{N}{1,3}"
CJK = "[一-龥぀-ゟ゠-ヿ]+"
WORD_SPLITS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"  # one sign and the letters after it
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"  # a word with the space before it
    "| ?[\\p{P}\\p{S}]+[\r\n]*"  # punctuation, line breaks joined on: §4.1
    "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)


def new_tokenizer() -> Tokenizer:
    """Return an untrained byte-level BPE with V3's splitting rules."""
    tokenizer = Tokenizer(models.BPE())
    split = [pre_tokenizers.Split(Regex(p), "isolated") for p in (DIGITS, CJK, WORD_SPLITS)]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a tokenizer with `vocab_size` tokens, the special ones first; it is deterministic."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(SPECIAL)
    if vocab_size < smallest:
        raise UserError(
            f"vocab_size {vocab_size} is too small: bytes and special tokens need {smallest}"
        )
    tokenizer = new_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return encode_special_as_text(tokenizer)


def encode_special_as_text(tokenizer: Tokenizer) -> Tokenizer:
    """Make the tokenizer encode special tokens in a text as plain characters.

    Otherwise a text could contain the end of a document.
    """
    tokenizer.encode_special_tokens = True
    return tokenizer


def load_tokenizer(directory: Path) -> Tokenizer:
    """Read a `tokenizer.json`, or that of a directory, or convert the tokenizer that it has."""
    path = directory / "tokenizer.json" if directory.is_dir() else directory
    if not path.is_file():
        return encode_special_as_text(reset_options(convert_tokenizer(directory)))
    try:
        check_regular(path)
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.decode(tokenizer.encode(SAMPLE).ids)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # bare Exceptions, and panics of Rust, which are none
        raise UserError(f"{path} is not a tokenizer: {e}") from None
    check_ids(tokenizer, path)
    return encode_special_as_text(reset_options(tokenizer))


def check_ids(tokenizer: Tokenizer, path: Path) -> None:
    """Raise a `UserError` for ids so high that a list of all ids would take much memory."""
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest > MAX_TOKEN_ID:
        raise UserError(
            f"{path} has the token id {highest:,}, above {MAX_TOKEN_ID:,}: use another tokenizer"
        )


def check_document_tokens(tokenizer: Tokenizer, needs_fim: bool) -> None:
    """Raise a `UserError` if a tokenizer lacks the tokens that pre-training puts around texts."""
    missing = [s for s in (BOS, EOS) if tokenizer.token_to_id(s) is None]
    if missing:
        raise UserError(
            f"the tokenizer lacks {' and '.join(missing)}, which begin and end a document of "
            "pre-training: use one that `dsv3 train` has trained, or a DeepSeek tokenizer"
        )
    missing = [s for s in (FIM_BEGIN, FIM_HOLE, FIM_END) if tokenizer.token_to_id(s) is None]
    if missing and needs_fim:
        raise UserError(f"the tokenizer lacks {' and '.join(missing)}: pass --fim-rate 0")


def reset_options(tokenizer: Tokenizer) -> Tokenizer:
    """Undo the options of a file that change or cut a text: truncation, padding and dropout."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None) is not None:
        tokenizer.model.dropout = None
    return tokenizer


def get_special_tokens(
    tokenizer: Tokenizer, settings: TokenizerSettings | None = None
) -> "SpecialTokens":
    """Return the ids of the special tokens of conversations, −1 for those that a model lacks.

    The settings name them; V3's names are the default. Raises a `UserError` if there is no end
    token. Without one for padding, the end token pads.
    """
    from dsv3_ref.sft import SpecialTokens  # needs torch, which `dsv3 data` does not load

    names = settings.special_tokens if settings else {}

    def find(*texts: str | None) -> int:
        ids = (tokenizer.token_to_id(text) for text in texts if text)
        return next((i for i in ids if i is not None), -1)

    eos = find(names.get("eos_token"), EOS)
    if eos < 0:
        raise UserError(
            f"the tokenizer lacks {names.get('eos_token', EOS)}: name its end token as eos_token "
            "in tokenizer_config.json"
        )
    pad = find(PAD, names.get("pad_token"))
    bos = find(names.get("bos_token"), BOS)
    return SpecialTokens(bos, eos, eos if pad < 0 else pad, find(USER), find(ASSISTANT))


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write `tokenizer.json` atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = clear_path(path.with_suffix(f".{os.getpid()}"))
    part.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    part.replace(path)


def vocab_size(tokenizer: Tokenizer) -> int:
    """Return the rows that an embedding needs: the highest id + 1, since ids may have holes."""
    return max(tokenizer.get_vocab().values()) + 1


def check_vocab_size(tokenizer: Tokenizer, num_rows: int, remedy: str) -> None:
    """Raise a `UserError`, which ends with a remedy, if an embedding has too few rows."""
    size = vocab_size(tokenizer)
    if size > num_rows:
        raise UserError(
            f"the tokenizer has {size} tokens, the model only {num_rows}: "
            + remedy.format(size=size)
        )


def check_tokens(prompts: Iterable[Sequence[int]], num_rows: int) -> None:
    """Raise a `UserError` if an embedding of so many rows lacks a token of a prompt.

    A tokenizer that tokens were added to may be larger than the model beside it.
    """
    largest = max((max(prompt) for prompt in prompts if prompt), default=0)
    if largest >= num_rows:
        raise UserError(
            f"the tokenizer makes token {largest} of a text, but the model has only {num_rows}: "
            "use the tokenizer with which the model was trained"
        )


def byte_lengths(tokenizer: Tokenizer) -> list[int]:
    """Return the number of bytes of text of each token; 0 for special tokens."""
    lengths = [0] * vocab_size(tokenizer)
    for text, i in tokenizer.get_vocab().items():
        lengths[i] = len(text)  # of a byte-level token, whose characters are bytes
    for i, token in tokenizer.get_added_tokens_decoder().items():
        lengths[i] = 0 if token.special else len(token.content.encode())
    return lengths


def newline_splits(tokenizer: Tokenizer) -> dict[int, list[int]]:
    """Map each token of punctuation and line breaks to two tokens that spell the same (§4.1)."""
    vocab = tokenizer.get_vocab()
    newline = "Ċ"  # the byte-level sign for a line feed
    pairs = {}
    for token, i in vocab.items():
        head = token.rstrip(newline)
        parts = [head, token[len(head) :]]
        if head and parts[1] and not head[-1].isalnum() and all(p in vocab for p in parts):
            pairs[i] = [vocab[p] for p in parts]
    return pairs
