"""Marks that several test files share."""

import pytest

from amulet import native

needs_code = pytest.mark.skipif(
    native.library() is None, reason="needs a C compiler, or a processor that it serves"
)
