"""A thread's OpenMP helpers can be let go of, and what is computed after it is the same."""

from __future__ import annotations

import sys
import threading

import pytest
import torch

from amulet.backends.transformers.cpu import openmp


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch has GNU's OpenMP on Linux only")
def test_pytorchs_library_is_found() -> None:
    assert openmp._library() is not None


def test_computing_goes_on_after_it() -> None:
    left, right = torch.randn(2, 256, 256)
    expected = left @ right
    openmp.release()
    openmp.release()  # there is nothing to let go of
    torch.testing.assert_close(left @ right, expected)
    found: list[torch.Tensor] = []

    def work() -> None:
        found.append(left @ right)
        openmp.release()
        found.append(left @ right)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    for one in found:
        torch.testing.assert_close(one, expected)
