"""Marks that several test files share."""

import pytest

from amulet import native, products

needs_code = pytest.mark.skipif(
    native.library() is None, reason="needs a C compiler, or a processor that it serves"
)
needs_bfloat16_code = pytest.mark.skipif(
    not products.serves(products.INT4), reason="needs a processor with AVX-512's bfloat16"
)
