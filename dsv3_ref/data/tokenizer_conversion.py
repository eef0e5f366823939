"""Tokenizers of directories without a tokenizer.json: tiktoken's and SentencePiece's files."""

import base64
import binascii
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from dsv3_ref.checkpoints.atomic import read_text
from dsv3_ref.config import UserError
from dsv3_ref.data.tokenizer_settings import read_object

TIKTOKEN, SENTENCEPIECE = "tiktoken.model", "tokenizer.model"
MAX_TOKEN_BYTES = 1024  # those of Kimi-K2 have 128; each is cut in every place
NUM_RESERVED = 256  # ids that Moonlight and Kimi-K2 keep for special tokens, after the bytes'
LETTERS = r"\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]"
ELISION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# How Moonlight and Kimi-K2 split a text, which tiktoken.model does not say.
KIMI_SPLITS = "|".join([
    r"[\p{Han}]+",
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{LETTERS}]*[\p{{Ll}}{LETTERS}]+{ELISION}",
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{LETTERS}]+[\p{{Ll}}{LETTERS}]*{ELISION}",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
])  # fmt: skip


def convert_tokenizer(directory: Path) -> Tokenizer:
    """Return the tokenizer of a directory with tiktoken.model or SentencePiece's tokenizer.model.

    Runs no code of the directory. Raises a `UserError` if there is none, or if it cannot be read.
    """
    if (directory / TIKTOKEN).is_file():
        return convert_tiktoken(directory)
    if not (directory / SENTENCEPIECE).is_file():
        raise UserError(f"no tokenizer.json in {directory}")
    try:
        from transformers import LlamaTokenizer
    except ImportError:
        raise UserError(
            f"{directory} has no tokenizer.json, and its tokenizer needs: "
            "pip install transformers sentencepiece protobuf"
        ) from None
    try:
        tokenizer = LlamaTokenizer.from_pretrained(str(directory), local_files_only=True)
        return Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    except Exception as e:  # the library raises any kind
        raise UserError(
            f"the tokenizer of {directory} cannot be read ({short_message(e)}): add a "
            "tokenizer.json"
        ) from None


def short_message(error: Exception) -> str:
    """Return the first line of an error's message, of at most 200 characters."""
    return str(error).strip().partition("\n")[0][:200]


def convert_tiktoken(directory: Path) -> Tokenizer:
    """Return the tokenizer of Moonlight's or Kimi-K2's tiktoken.model."""
    config = read_object(directory / "tokenizer_config.json")
    if config.get("tokenizer_class") != "TikTokenTokenizer":
        raise UserError(
            f"{directory / TIKTOKEN} does not say how a text is split, and tokenizer_config.json "
            "names no class that this program knows: add a tokenizer.json"
        )
    ranks = read_ranks(directory / TIKTOKEN)
    byte_signs = pre_tokenizers.ByteLevel.alphabet()
    signs = dict(zip(sorted(range(256), key=byte_order), sorted(byte_signs, key=ord)))
    names = {token: "".join(signs[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        parts = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(a, b) for a, b in parts if a in ranks and b in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(names[a], names[b]) for a, b in pairs]
    vocab = {names[token]: rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(KIMI_SPLITS), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(special_tokens(config, len(ranks)))
    return tokenizer


def byte_order(byte: int) -> tuple[bool, int]:
    """Return the key by which bytes are sorted as their byte-level signs are: printable first."""
    is_printable = 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255
    return not is_printable, byte


def read_ranks(path: Path) -> dict[bytes, int]:
    """Return the rank of each token of a tiktoken file, whose lines hold base64 and a rank."""
    ranks = {}
    try:
        for line in read_text(path).split("\n"):
            if line.strip():
                code, rank = line.split()
                token = base64.b64decode(code, validate=True)
                if len(token) > MAX_TOKEN_BYTES:
                    raise ValueError(f"a token has {len(token):,} bytes")
                ranks[token] = int(rank)
    except (ValueError, binascii.Error) as e:
        raise UserError(f"{path} is not a tiktoken file ({e}): download it again") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(f"{path} is not a tiktoken file (ranks are missing): download it again")
    return ranks


def special_tokens(config: dict[str, Any], first_id: int) -> list[AddedToken]:
    """Return the special tokens after the last rank, those without a name reserved."""
    named = config.get("added_tokens_decoder") or {}
    tokens = []
    for i in range(first_id, first_id + NUM_RESERVED):
        about = (named.get(str(i)) if isinstance(named, dict) else named) or {}
        text = about.get("content", f"<|reserved_token_{i}|>") if isinstance(about, dict) else None
        if not isinstance(text, str):
            raise UserError(
                'added_tokens_decoder in tokenizer_config.json must map ids to {"content": text}: '
                "download it again"
            )
        is_special = bool(about.get("special", True))
        tokens.append(AddedToken(text, special=is_special, normalized=False))
    return tokens
