"""DeepSeek-V3, readable and full-scale. Names are imported when first used."""

from importlib import import_module
from importlib.metadata import version

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


def __getattr__(name: str):
    if name == "__version__":
        return version("dsv3-ref")
    if name not in _HOME:
        raise AttributeError(f"module 'dsv3_ref' has no attribute {name!r}")
    return getattr(import_module(f"dsv3_ref.{_HOME[name]}"), name)


def __dir__():
    return sorted([*__all__, "__version__"])
