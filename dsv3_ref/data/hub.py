"""Datasets on the Hugging Face hub, by the names owner/name, owner/name:config and …@split."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsv3_ref.checkpoints.hub import offline_if_unreachable
from dsv3_ref.config import UserError
from dsv3_ref.data.formats import COMPRESSIONS, SUFFIXES, split_suffix
from dsv3_ref.data.text_cache import make_writable_dir

NAME = re.compile(r"([\w.-]+/[\w.-]+?)(?::([^@:]+))?(?:@(\S+))?")


def could_be_on_hub(name: str) -> bool:
    """Return whether a name that is not a local path has the form owner/name[:config][@split]."""
    match = NAME.fullmatch(name)
    if match is None or name.startswith("."):
        return False
    suffix, compression = split_suffix(match[1])
    return suffix not in SUFFIXES and compression not in COMPRESSIONS


def load_hub_dataset(name: str, streaming: bool) -> Any:
    """Return a dataset of the hub; its split is "train" if the name has none.

    Without a cache that can be written, it is streamed.
    """
    import datasets  # a second to import
    import huggingface_hub

    match = NAME.fullmatch(name)
    assert match is not None, "could_be_on_hub is true"
    path, config, split = match.groups()
    options = {"name": config} if config else {}
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # our sentence is enough
    huggingface_hub.logging.set_verbosity(datasets.logging.CRITICAL)  # also of five retries
    with (
        offline_if_unreachable() as can_ask,
        hub_errors(f"{name} (no file here; looked for on the hub)", can_ask),
    ):
        return datasets.load_dataset(
            path, **options, split=split or "train", streaming=streaming or not has_cache()
        )


def load_hub_texts(name: str, column: str) -> Any:
    """Return a stream of a column of a dataset of the hub, under the name `text`."""
    data = load_hub_dataset(name, streaming=True)
    with hub_errors(name):
        columns = data.column_names or list(next(iter(data), {}))
    if column not in columns:
        raise no_column_error(name, column, columns)
    data = data.select_columns([column])
    return data if column == "text" else data.rename_column(column, "text")


def no_column_error(name: str, column: str, columns: list[str]) -> UserError:
    """Return the error for data without the column of texts."""
    return UserError(
        f"{name} has no column {column!r}, only {', '.join(columns)}: choose one by "
        f"{name}#{columns[0] if columns else 'column'}"
    )


def has_cache() -> bool:
    """Return whether the caches of `datasets` and of the hub can be written, or made."""
    from datasets import config
    from huggingface_hub import constants

    folders = config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE
    return all(make_writable_dir(Path(folder)) for folder in folders)


@contextmanager
def hub_errors(name: str, can_ask: bool = True) -> Iterator[None]:
    """Turn an error of a library into a `UserError` about the data `name`.

    can_ask: False if the hub does not answer, which is then the reason.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of datasets, huggingface_hub, fsspec, httpx, pyarrow
        if not can_ask:
            raise UserError(
                f"cannot read {name}: the hub does not answer, and its cache lacks these data: "
                "check the path, or load them once where there is a network"
            ) from None
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(str(cause).split())[:400] or type(cause).__name__
        raise UserError(f"cannot read {name}: {reason}") from None
