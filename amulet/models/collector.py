"""Pauses Python's garbage collector while torch and Transformers are imported.

It makes a million objects that stay; to look through them again and again for garbage takes a
quarter of the time.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused_collector() -> Iterator[None]:
    """Collect no garbage in the block, in no thread."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
