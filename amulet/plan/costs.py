"""Computes the cost of steered requests: rows, KV cache, time of a step. Measures nothing."""

from __future__ import annotations

from dataclasses import dataclass

from amulet.backends.transformers.cache import GPU_COLUMN_STEP
from amulet.errors import RequestError
from amulet.plan.shapes import BYTES, Shape

BLOCK = 16  # tokens in a block of vLLM's cache on a GPU


@dataclass(frozen=True)
class Work:
    """The request of one user.

    Attributes:
        prompt: tokens of the prompt without preference.
        answer: tokens of the answer.
        preferences: number of preferences; 0 is a plain request.
        preference_tokens: tokens that one preference adds to its prompt.
        shared: tokens of the common prefix of all prompts except `alone`: with the placement
            "system" those before the preference, with "user" nearly all.
        alone: tokens of the focus prompt, which has only the preferences; 0 is without focus.

    Raises:
        RequestError: a number is out of range.
    """

    prompt: int
    answer: int
    preferences: int = 1
    preference_tokens: int = 16
    shared: int = 0
    alone: int = 48  # a preference of 16 tokens in a chat template

    def __post_init__(self) -> None:
        for name in ("prompt", "answer", "preferences", "preference_tokens", "shared", "alone"):
            value = 1 if name in ("prompt", "answer") else 0
            if getattr(self, name) < value:
                raise RequestError(f"{name}={getattr(self, name)}: expected {value} or more.")
        if self.shared > self.prompt:
            raise RequestError(
                f"shared={self.shared}: expected at most the prompt's {self.prompt} tokens."
            )

    @property
    def rows(self) -> list[int]:
        """Tokens of each row at the end of the answer: preferred rows, focus row, base row."""
        base = self.prompt + self.answer
        alone = [self.alone + self.answer] if self.preferences and self.alone else []
        return [*[base + self.preference_tokens] * self.preferences, *alone, base]

    @property
    def plain(self) -> Work:
        """The same request without preferences."""
        return Work(self.prompt, self.answer, 0)

    @property
    def mean(self) -> float:
        """Tokens that a step reads: of all rows, averaged over the answer."""
        return sum(self.rows) - len(self.rows) * self.answer / 2


def law(weights: float, row: float, users: int, preferences: int = 1) -> float:
    """Return the ratio of a steered step's time to a plain one's: (W + (1+k)bK) / (W + bK).

    This ignores focus, whose row is short compared with a long prompt. A decode step reads the
    weights once, and the keys and values of every user. Where the memory bandwidth limits it, as
    on a GPU, its time is proportional to what it reads.

    Args:
        weights: W, bytes of weights read in a step.
        row: K, bytes of keys and values of one row.
        users: b, the number of users.
        preferences: k, the number of preferences per user.
    """
    return (weights + (1 + preferences) * users * row) / (weights + users * row)


def vllm_blocks(work: Work, block: int = BLOCK) -> int:
    """Return the number of blocks of vLLM's cache that one user takes at the end of the answer.

    Whole blocks of the common prefix are stored once. Those of the answer are not, because the same
    tokens follow different prompts.
    """
    each = sum(-(-tokens // block) for tokens in work.rows)
    return each - work.preferences * (work.shared // block)


def vllm_block_bytes(shape: Shape, dtype: str, parts: int = 1, block: int = BLOCK) -> int:
    """Return the bytes of a block in all layers, on each of `parts` GPUs."""
    return block * shape.token(dtype, parts)


def vllm_users(
    shape: Shape, dtype: str, work: Work, memory: float, parts: int = 1, block: int = BLOCK
) -> int:
    """Return how many users' rows fit into this many bytes per GPU, without the weights."""
    blocks = int(max(memory, 0) // vllm_block_bytes(shape, dtype, parts, block))
    return max(blocks - 1, 0) // vllm_blocks(work, block)  # vLLM reserves one block


def amulet_bytes(
    shape: Shape, dtype: str, work: Work, users: int, column_step: int = GPU_COLUMN_STEP
) -> int:
    """Return the bytes of Amulet's own cache for this many users who arrive one by one.

    All rows are in one buffer as long as the longest, rounded up to `column_step` tokens. It first
    has room for one user's rows, and doubles when it is full. Rows share no memory.
    """
    if users < 1:
        return 0
    wanted = len(work.rows) * users
    rows = len(work.rows)
    while rows < wanted:
        rows *= 2
    columns = -(-max(work.rows) // column_step) * column_step
    return rows * columns * shape.token(dtype)


def amulet_users(shape: Shape, dtype: str, work: Work, memory: float) -> int:
    """Return how many users' rows fit into this many bytes, without the weights."""
    users = 0
    while amulet_bytes(shape, dtype, work, max(1, 2 * users)) <= memory:
        users = max(1, 2 * users)
    return users


def step_bytes(shape: Shape, dtype: str, work: Work, users: float, parts: int = 1) -> float:
    """Return the bytes that each of `parts` GPUs reads in a step, halfway through the answer."""
    weights = shape.read * BYTES[dtype] / parts
    return weights + users * work.mean * shape.token(dtype, parts)
