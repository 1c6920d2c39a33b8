"""Warnings as lines for the user."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def notices(tell: Callable[[str], None]) -> Iterator[None]:
    """Warnings as lines for the user, without their place in the code, each once; `tell` takes them."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *place, **_: tell(f"note: {' '.join(str(message).split())}")
        yield
