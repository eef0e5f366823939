"""Exercises: run a check on the reader's function and print a hint instead of a traceback."""

from collections.abc import Callable
from functools import wraps
from typing import Any


class Unfilled(Exception):
    """The error for a function that still returns the `...` of the skeleton."""


def attempt(test: Callable[[], Any], hint: str) -> bool:
    """Run a test; print ✓ or the hint, and return whether the test passed.

    `test` calls the reader's function. It fails by an assertion or by returning something false.
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
    """Wrap the reader's function so that it raises `Unfilled` while it returns `...`."""

    @wraps(fn)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if (result := fn(*args, **kwargs)) is ...:
            raise Unfilled
        return result

    return checked


def checker(test: Callable) -> Callable[[Callable], bool]:
    """Turn `test(fn)`, whose docstring is the hint, into a check of the reader's function."""

    def check(fn: Callable) -> bool:
        return attempt(lambda: test(require_filled(fn)), test.__doc__ or "")

    return check
