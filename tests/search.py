"""How many examples Hypothesis tries: as a test says, or many more with `make test-random`."""

from __future__ import annotations

from hypothesis import settings

USUAL = 100  # of `settings.default`, unless a longer search is asked for


def examples(count: int) -> settings:
    """Try so many, and in a longer search as many times more as its profile says."""
    return settings(max_examples=count * settings.default.max_examples // USUAL)
