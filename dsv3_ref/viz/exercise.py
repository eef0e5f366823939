"""Exercises: the reader's function is tried, and a hint is printed instead of a traceback."""

from collections.abc import Callable
from functools import wraps
from typing import Any


class Unfilled(Exception):
    """The error for a reader's function that still returns the `...` that it starts with."""


def attempt(test: Callable[[], Any], hint: str) -> bool:
    """Run a test, which asserts or returns truth; print ✓ or the hint, and return whether it held.

    `test` calls the reader's function.
    """
    try:
        result = test()
        right = result is None or bool(result)
    except AssertionError:
        right = False
    except Exception as e:
        unfilled = isinstance(e, Unfilled) or "'ellipsis'" in str(e)
        print("… not filled in yet" if unfilled else f"✗ {type(e).__name__}: {e} (hint: {hint})")
        return False
    print("✓ right" if right else f"✗ not yet: {hint}")
    return right


def require_filled(fn: Callable) -> Callable:
    """Return the reader's function, made to raise `Unfilled` while it returns `...`."""

    @wraps(fn)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if (result := fn(*args, **kwargs)) is ...:
            raise Unfilled
        return result

    return checked


def checker(test: Callable) -> Callable[[Callable], bool]:
    """Make a check of the reader's `fn` from `test(fn)`, whose docstring is the hint."""

    def check(fn: Callable) -> bool:
        return attempt(lambda: test(require_filled(fn)), test.__doc__ or "")

    return check
