"""DeepSeek-V3, readable and full-scale. Public names are imported on first use."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the same names, for type checkers
    from dsv3_ref.checkpoints.huggingface import save_hf as save_hf
    from dsv3_ref.checkpoints.native import load as load
    from dsv3_ref.config import SMALL as SMALL
    from dsv3_ref.config import TINY as TINY
    from dsv3_ref.config import V2_LITE as V2_LITE
    from dsv3_ref.config import V3 as V3
    from dsv3_ref.config import Config as Config
    from dsv3_ref.config import count_params as count_params
    from dsv3_ref.decode import generate as generate
    from dsv3_ref.model import Transformer as Transformer

_HOME = {
    "Config": "config",
    "TINY": "config",
    "SMALL": "config",
    "V2_LITE": "config",
    "V3": "config",
    "count_params": "config",
    "Transformer": "model",
    "generate": "decode",
    "load": "checkpoints.native",
    "save_hf": "checkpoints.huggingface",
}
__all__ = list(_HOME)
_ROOT = Path(__file__).parent.parent
if (_ROOT / "kernels").is_dir() and (_ROOT / "pyproject.toml").is_file():  # a checkout
    __path__.append(str(_ROOT))  # where dsv3_ref.kernels is


def __getattr__(name: str) -> object:
    if name == "__version__":
        try:
            return version("dsv3-ref")
        except PackageNotFoundError:  # a checkout that is not installed
            return "0+unknown"
    if name not in _HOME:
        raise AttributeError(f"module 'dsv3_ref' has no attribute {name!r}")
    return getattr(import_module(f"dsv3_ref.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
