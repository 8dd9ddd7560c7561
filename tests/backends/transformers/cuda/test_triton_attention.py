"""The GPU's attention kernel against its definition; on a CPU in Triton's interpreter.

pip install --target /tmp/triton triton  # where PyTorch's build for CPUs has brought none
export PYTHONPATH=/tmp/triton TRITON_INTERPRET=1
pytest tests/backends/transformers/cuda/test_triton_attention.py
"""

from __future__ import annotations

import os

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

pytest.importorskip("triton", reason="comes with PyTorch for GPUs alone")
if not torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET"):
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from amulet.backends.transformers.cuda.triton_attention import attend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter computes with numpy, which has no bfloat16.
DTYPES = {torch.float32: 1e-6, torch.float16: 1e-3}
if DEVICE == "cuda":
    DTYPES[torch.bfloat16] = 5e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "kv_heads", "groups", "width", "columns", "dim"),
    [
        (2, 2, 3, 1, 300, 64),
        (3, 1, 4, 5, 77, 80),  # a dimension that is no power of two
        (1, 2, 1, 12, 20, 32),
        (2, 1, 2, 1, 5000, 128),
        (4, 2, 2, 4, 700, 256),
    ],
)
def test_it_gives_what_attention_is(
    dtype: torch.dtype, rows: int, kv_heads: int, groups: int, width: int, columns: int, dim: int
) -> None:
    generator = torch.Generator(DEVICE).manual_seed(columns)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)

    query = draw(rows, width, kv_heads * groups, dim).transpose(1, 2)
    key, value = (
        draw(rows, kv_heads, columns + 40, dim)[:, :, :columns],
        draw(rows, kv_heads, columns, dim),
    )
    starts = torch.randint(0, columns - width, (rows, 1), generator=generator, device=DEVICE)
    positions = (starts + torch.arange(width, device=DEVICE))[:, None, :, None]
    column = torch.arange(columns, device=DEVICE)
    for mask in (column <= positions, (column <= positions) & (column > positions - 16)):
        found = attend(query, key, value, mask, 0.3)
        key_64, value_64 = (t.double().repeat_interleave(groups, 1) for t in (key, value))
        expected = scaled_dot_product_attention(
            query.double(), key_64, value_64, attn_mask=mask, scale=0.3
        ).transpose(1, 2)
        assert found.shape == (rows, width, kv_heads * groups, dim)
        assert (found - expected).norm() <= DTYPES[dtype] * expected.norm()


def test_a_row_does_not_depend_on_the_others() -> None:
    generator = torch.Generator(DEVICE).manual_seed(0)
    query = torch.randn(3, 4, 1, 64, generator=generator, device=DEVICE)
    key, value = torch.randn(2, 3, 2, 300, 64, generator=generator, device=DEVICE)
    mask = torch.arange(300, device=DEVICE) <= torch.tensor([9, 130, 299], device=DEVICE)[:, None]
    mask = mask[:, None, None]
    together = attend(query, key, value, mask, 0.125)
    for row in range(3):
        one = slice(row, row + 1)
        alone = attend(query[one], key[one], value[one], mask[one], 0.125)
        assert torch.equal(together[one], alone)
