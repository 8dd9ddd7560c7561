"""Marks that several test files share."""

import os
import shlex
import shutil
import sys
from importlib.util import find_spec

import pytest

from amulet.backends.transformers.cpu import native, products


def _compiles() -> bool:
    name, *_ = shlex.split(os.environ.get("CC") or "cc") or ["cc"]
    return sys.platform == "linux" and shutil.which(name) is not None


# By what the machine has, and not by whether the code was compiled: where it should have been and
# was not, its tests fail.
INSTRUCTIONS = native.processor().split() if _compiles() else []
needs_code = pytest.mark.skipif(
    "avx512f" not in INSTRUCTIONS and native.library() is None,
    reason="needs Linux, a C compiler, and a processor with AVX-512",
)
needs_bfloat16_code = pytest.mark.skipif(
    "avx512_bf16" not in INSTRUCTIONS and not products.serves(products.INT4),
    reason="needs Linux, a C compiler, and a processor with AVX-512's bfloat16",
)
needs_llamacpp = pytest.mark.skipif(
    find_spec("llama_cpp") is None, reason="needs llama.cpp, which `make test-gguf` compiles"
)
