"""Models of the Hugging Face Hub, by name: `owner/name` or `owner/name@revision`.

Weights, JSON files and tokenizers are downloaded, never code or pickles.
"""

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import Any

from dsv3_ref.config import UserError

HUB_NAME = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*?)(@(?P<revision>[\w./-]+))?")
DOWNLOADED = (
    "*.safetensors", "config.json", "generation_config.json", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
    "tokenizer.model", "tiktoken.model", "vocab.json", "merges.txt",
)  # fmt: skip


HUB_SECONDS = 4.0  # in which the hub must begin to answer


def hub_answers() -> bool:
    """Return whether the hub answers a request within `HUB_SECONDS`."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    answers: list[bool] = []

    def ask() -> None:
        with suppress(Exception):  # of several libraries: no name, no route, no answer
            get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
            answers.append(True)

    asking = threading.Thread(target=ask, daemon=True)  # to look up a name has no timeout
    asking.start()
    asking.join(HUB_SECONDS)
    return bool(answers)


@contextmanager
def offline_if_unreachable() -> Iterator[bool]:
    """Yield whether the hub can be asked; if it does not answer, only caches are read meanwhile.

    By themselves its libraries ask again and again for half a minute.
    """
    from huggingface_hub import constants

    modules: list[Any] = [constants, *filter(None, [sys.modules.get("datasets.config")])]
    before = [module.HF_HUB_OFFLINE for module in modules]
    can_ask = any(before) or hub_answers()  # a user who is offline gets the libraries' errors
    try:
        for module in modules:
            module.HF_HUB_OFFLINE |= not can_ask
        yield can_ask
    finally:
        for module, value in zip(modules, before):
            module.HF_HUB_OFFLINE = value


def local_dir(path: str | PathLike[str]) -> Path:
    """Return a path, or the local copy of a model of the hub if it names one and no file.

    A path whose first folder exists here, or is `runs`, where training writes, is never looked up.
    Raise a `UserError` if the model is neither in the cache nor can be downloaded.
    """
    match = HUB_NAME.fullmatch(str(path))
    first = Path(*Path(path).parts[:1])
    if not match or first.name == "runs" or first.exists():
        return Path(path)
    return download(match["repo"], match["revision"])


def download(repo: str, revision: str | None = None) -> Path:
    """Return the local copy of a model's weights, JSON files and tokenizer."""
    from huggingface_hub import snapshot_download  # only now: it takes a moment to import
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name = f"{repo}@{revision}" if revision else repo
    try:
        with offline_if_unreachable():
            folder = snapshot_download(repo, revision=revision, allow_patterns=list(DOWNLOADED))
        return Path(folder)
    except LocalEntryNotFoundError:
        raise UserError(
            f"there is no directory {name}, and the Hugging Face Hub cannot be reached: check the "
            "path, or download the model where there is a network"
        ) from None
    except (HfHubHTTPError, ValueError, OSError) as e:
        raise UserError(
            f"there is no directory {name}, and the Hugging Face Hub does not have it for you "
            f"({brief_reason(e)}): check the name, or log in with `hf auth login`"
        ) from None


def brief_reason(error: Exception) -> str:
    """Return the first line of an error's text, or the name of its class if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def check_hub_name(repo: str) -> None:
    """Raise a `UserError` unless a model repository can have this name."""
    if "@" in repo or not HUB_NAME.fullmatch(repo):
        raise UserError(f"--push {repo}: a repository is called owner/name")


def upload(folder: Path, repo: str) -> str:
    """Create a private model repository unless it exists, upload a folder, return its address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api = HfApi()
        api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder)
    except (HfHubHTTPError, ValueError, OSError) as e:
        raise UserError(
            f"--push {repo} failed ({brief_reason(e)}); {folder} is complete: log in with "
            f"`hf auth login` and run `hf upload {repo} {folder}`"
        ) from None
    return f"https://huggingface.co/{repo}"
