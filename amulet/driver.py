"""Many callers, one engine: whoever waits for a token runs the next step for everybody.

There is no background thread: an `Amulet` that nobody waits on does nothing, an interrupt reaches
the caller that runs the step, and there is nothing to shut down.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping

from amulet.engine import Engine
from amulet.errors import AmuletError, DecodeError, InterruptedDecodeError
from amulet.generation import Generation
from amulet.openmp import release

# Every thread that computes has OpenMP helpers of its own, and too many helpers are slow ones (see
# `openmp`). So the thread that ran the last step is waited for, but not long.
PATIENCE = 0.003  # seconds


class Driver:
    """Thread-safe access to an engine.

    Args:
        engine: the engine to share.
        max_rows: rows that may be decoded at once; further generations wait their turn.
    """

    def __init__(self, engine: Engine, max_rows: int) -> None:
        self._engine = engine
        self._max_rows = max_rows
        self._waiting: deque[Generation] = deque()
        self._changed = threading.Condition()
        self._busy = False  # one caller is running a step
        self._runner = 0  # the thread that ran the last one, if it still has an answer to decode

    def submit(self, generation: Generation) -> None:
        """Queue a generation; it joins the batch at the next step that anyone runs."""
        with self._changed:
            self._waiting.append(generation)

    def advance(self, generation: Generation, known: int) -> None:
        """Return once the generation has more than `known` tokens or has ended.

        Raises:
            DecodeError: the step failed, for this generation or for the whole batch.
        """
        self.advance_any({generation: known})
        self.check(generation)

    def advance_any(self, known: Mapping[Generation, int]) -> None:
        """Return once one of the generations has more tokens than are known of it, or has ended."""
        while self._is_our_turn(known):
            self._take_turn()
        if all(generation.done for generation in known):
            self._leave()

    def _is_our_turn(self, known: Mapping[Generation, int]) -> bool:
        """Wait for news, or for the turn to run a step; return whether it is the turn."""
        me, deadline = threading.get_ident(), time.monotonic() + PATIENCE
        with self._changed:
            while not any(self._has_news(*one) for one in known.items()):
                if self._busy:
                    self._changed.wait()
                    deadline = time.monotonic() + PATIENCE  # who ran it has so long to come back
                elif self._runner in (0, me) or (left := deadline - time.monotonic()) <= 0:
                    self._busy, self._runner = True, me
                    return True
                else:
                    self._changed.wait(left)
        return False

    def _leave(self) -> None:
        """Let another thread run the steps at once, and with quick helpers."""
        with self._changed:
            if not self._busy and self._runner == threading.get_ident():
                self._runner = 0
                self._changed.notify_all()
        release()

    @staticmethod
    def check(generation: Generation) -> None:
        """Raise the error that ended a generation, if one did."""
        if generation.error is not None:
            raise _for_caller(generation.error) from generation.error

    def cancel(self, generation: Generation) -> None:
        """End a generation; its rows leave the batch before the next step. Never blocks long."""
        with self._changed:
            if not generation.done:
                generation.finish_reason = "cancelled"
            if generation in self._waiting:
                self._waiting.remove(generation)
            if not self._busy:
                self._engine.sweep()
        self._leave()

    @staticmethod
    def _has_news(generation: Generation, known: int) -> bool:
        return generation.done or len(generation.token_ids) > known

    def _take_turn(self) -> None:
        """Admit who waits, or run one step; then let the others look."""
        try:
            if not self._admit_waiting():
                self._engine.step()
        except Exception as error:
            self._engine.fail_all(error)
        except BaseException:  # an interrupt: nothing is lost unless tokens were being handed over
            if self._engine.committing:
                self._engine.fail_all(
                    InterruptedDecodeError(
                        "Another caller's interrupt ended the step that this request shared; "
                        "send the request again."
                    )
                )
            raise
        finally:
            with self._changed:
                self._engine.sweep()
                self._busy = False
                self._changed.notify_all()

    def _admit_waiting(self) -> bool:
        """Prefill waiting generations while there is room; return whether one was admitted."""
        admitted = False
        while (generation := self._next_waiting()) is not None:
            try:
                self._engine.admit(generation)
                admitted = True
            except Exception as error:
                generation.error = error
                admitted = True
            except BaseException:
                if generation not in self._engine.running and not generation.done:
                    self._waiting.appendleft(generation)
                raise
        return admitted

    def _next_waiting(self) -> Generation | None:
        with self._changed:
            if not self._waiting:
                return None
            rows = sum(len(generation.prompts) for generation in self._engine.running)
            if rows and rows + len(self._waiting[0].prompts) > self._max_rows:
                return None
            return self._waiting.popleft()


def _for_caller(error: BaseException) -> AmuletError:
    """A fresh error per caller: one instance raised in several threads would mix tracebacks."""
    if isinstance(error, AmuletError):
        return type(error)(str(error))
    return DecodeError(
        f"Decoding failed: {type(error).__name__}: {error}. The Amulet object stays usable."
    )
