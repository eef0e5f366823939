"""Exercises: a reader's function is tried, and answered with a hint instead of a traceback."""

from collections.abc import Callable
from functools import wraps


class Unfilled(Exception):
    """The reader's function still returns the `...` that it starts with."""


def attempt(test: Callable, hint: str) -> bool:
    """Run a test of the reader's function, which asserts or returns truth: print ✓ or the hint."""
    try:
        result = test()
        right = result is None or bool(result)
    except AssertionError:
        right = False
    except Exception as e:
        todo = isinstance(e, Unfilled) or "'ellipsis'" in str(e)
        print("… not filled in yet" if todo else f"✗ {type(e).__name__}: {e} (hint: {hint})")
        return False
    print("✓ right" if right else f"✗ not yet: {hint}")
    return right


def filled(fn: Callable) -> Callable:
    """The reader's function; it raises while it returns `...`."""

    @wraps(fn)
    def tried(*args, **kwargs):
        if (out := fn(*args, **kwargs)) is ...:
            raise Unfilled
        return out

    return tried


def checker(test: Callable) -> Callable:
    """Make of `test(fn)` a check of the reader's `fn`; its docstring is the hint."""
    return lambda fn: attempt(lambda: test(filled(fn)), test.__doc__)
