"""Pauses Python's garbage collector while torch and Transformers are imported.

Importing creates a million permanent objects, and scanning them again and again for garbage takes a
quarter of the time.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused_collector() -> Iterator[None]:
    """Turn the garbage collector off in the block, for all threads."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
