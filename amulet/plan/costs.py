"""The arithmetic of steered requests: rows, cache, time of a step. Nothing is measured here."""

from __future__ import annotations

from dataclasses import dataclass

from amulet.backends.transformers.cache import GPU_COLUMN_STEP
from amulet.errors import RequestError
from amulet.plan.shapes import BYTES, Shape

BLOCK = 16  # tokens in a block of vLLM's cache on a GPU


@dataclass(frozen=True)
class Work:
    """What one user asks for.

    Attributes:
        prompt: tokens of the prompt without preference.
        answer: tokens of the answer.
        preferences: how many; 0 is a plain request.
        preference_tokens: what one of them adds to its prompt.
        shared: leading tokens that all prompts but the next have in common: with the placement
            "system" those before the preference, with "user" nearly all.
        alone: tokens of the prompt that focus takes: the preferences, without what was asked. 0 is
            without focus.

    Raises:
        RequestError: a number is out of its range.
    """

    prompt: int
    answer: int
    preferences: int = 1
    preference_tokens: int = 16
    shared: int = 0
    alone: int = 48  # a wish of 16 tokens in a chat template's turns

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
        """Tokens of each row at the answer's end: one per preference, focus's, and the base row."""
        base = self.prompt + self.answer
        alone = [self.alone + self.answer] if self.preferences and self.alone else []
        return [*[base + self.preference_tokens] * self.preferences, *alone, base]

    @property
    def plain(self) -> Work:
        """The same without preference."""
        return Work(self.prompt, self.answer, 0)

    @property
    def mean(self) -> float:
        """Tokens of all rows on average over the answer: what a step reads."""
        return sum(self.rows) - len(self.rows) * self.answer / 2


def law(weights: float, row: float, users: int, preferences: int = 1) -> float:
    """Return how many times a plain step's time a steered one takes: (W + (1+k)bK) / (W + bK).

    That is without focus, whose row is short where the prompt is long. A step of decoding reads the
    weights once for everybody, and everybody's keys and values; where memory is what limits it, as
    on a GPU, its time is what it reads.

    Args:
        weights: W, bytes of weights read in a step.
        row: K, bytes of keys and values of one row.
        users: b.
        preferences: k, per user.
    """
    return (weights + (1 + preferences) * users * row) / (weights + users * row)


def vllm_blocks(work: Work, block: int = BLOCK) -> int:
    """Return how many blocks of vLLM's cache one user takes at the end of the answer.

    Whole blocks of the shared beginning are stored once. The answer's are not: its tokens are the
    same in all rows, what came before them is not.
    """
    each = sum(-(-tokens // block) for tokens in work.rows)
    return each - work.preferences * (work.shared // block)


def vllm_block_bytes(shape: Shape, dtype: str, parts: int = 1, block: int = BLOCK) -> int:
    """Return the bytes of a block in all layers, on each of `parts` GPUs."""
    return block * shape.token(dtype, parts)


def vllm_users(
    shape: Shape, dtype: str, work: Work, memory: float, parts: int = 1, block: int = BLOCK
) -> int:
    """Return how many users' rows fit into a number of bytes per GPU, without the weights."""
    blocks = int(max(memory, 0) // vllm_block_bytes(shape, dtype, parts, block))
    return max(blocks - 1, 0) // vllm_blocks(work, block)  # one block is vLLM's own, for nothing


def amulet_bytes(
    shape: Shape, dtype: str, work: Work, users: int, column_step: int = GPU_COLUMN_STEP
) -> int:
    """Return the bytes of Amulet's own cache for so many users who come one after the other.

    All rows lie in one buffer as long as the longest, in steps of `column_step` tokens. It has room
    for the first user's rows, and doubles when it is full. Rows share no memory.
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
    """Return how many users' rows fit into a number of bytes, without the weights."""
    users = 0
    while amulet_bytes(shape, dtype, work, max(1, 2 * users)) <= memory:
        users = max(1, 2 * users)
    return users


def step_bytes(shape: Shape, dtype: str, work: Work, users: float, parts: int = 1) -> float:
    """Return what each of `parts` GPUs reads in a step of so many users, halfway the answer."""
    weights = shape.read * BYTES[dtype] / parts
    return weights + users * work.mean * shape.token(dtype, parts)
