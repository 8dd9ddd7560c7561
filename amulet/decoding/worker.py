"""One decode thread per model: callers queue requests and wait for tokens; it runs the engine.

Decoding continues while a caller waits: a reader for its next token, or an event loop.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from amulet.backends.base import Backend
from amulet.decoding.engine import Engine
from amulet.decoding.generation import Generation
from amulet.errors import (
    AmuletError,
    DecodeError,
    OutOfMemoryError,
    RequestError,
    is_out_of_memory,
    one_line,
)


@dataclass(eq=False)
class _Watch:
    """A caller that waits for a generation's tokens or its end."""

    generation: Generation
    wake: Callable[[], None]  # called when there are new tokens; must only set a flag
    known: int  # tokens that the waiter has seen
    lasting: bool  # call `wake` for all later tokens too

    @property
    def has_news(self) -> bool:
        return self.generation.done or len(self.generation.token_ids) > self.known


class DecodeThread:
    """The thread that all drivers of one model share; it ends with the last driver.

    An idle decode thread holds no reference to a driver, so that models can be freed.

    Attributes:
        changed: lock for all state that drivers share with callers. The decode thread holds it
            while it appends tokens, but not while it computes.
        cores: the number of PyTorch threads, as set in the last caller's thread.
    """

    def __init__(self) -> None:
        # Not the condition itself: its `with` is Python code, and Ctrl-C there leaves it locked.
        self.changed = threading.RLock()
        self._work = threading.Condition(self.changed)
        self.cores = torch.get_num_threads()
        self._drivers: list[weakref.ref[Driver]] = []  # the most recently served is last
        self._thread: threading.Thread | None = None
        self._ended = False

    def add(self, driver: Driver) -> None:
        """Serve a driver from now on."""
        with self.changed:
            self._drivers.append(weakref.ref(driver, self._forget))

    def wake(self) -> None:
        """Wake the thread, or start it. The caller holds `changed`."""
        if self._ended:
            raise DecodeError("The interpreter is exiting; nothing more can be decoded.")
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="amulet-decode", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # out of threads, or the interpreter is exiting
                raise DecodeError(f"The decode thread can't be started: {error}.") from error
            self._thread = thread
        self._work.notify_all()

    @property
    def is_current(self) -> bool:
        """Whether the caller is the decode thread itself."""
        return self._thread is threading.current_thread()

    def end(self) -> None:
        """Cancel all generations and end the thread; return when it has ended."""
        with self.changed:
            self._ended = True
            for driver in self._alive():
                driver.cancel_all()
            self._work.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(timeout=30)

    def lose_thread(self) -> None:
        """Reset in a forked child, which has no decode thread. The caller holds `changed`."""
        self._thread = None
        for driver in self._alive():
            driver.fail_all(DecodeError("The process was forked while the answer was decoded."))

    def _run(self) -> None:
        while True:
            with self.changed:
                driver = self._next()
                while driver is None:
                    if self._ended or not self._drivers:
                        self._thread = None
                        return
                    self._work.wait()
                    driver = self._next()
                cores = self.cores
            if torch.get_num_threads() != cores:  # set per thread
                torch.set_num_threads(cores)
            driver.run_turn()

    def _next(self) -> Driver | None:
        """Return a driver with a waiting caller, in round-robin order."""
        for reference in self._drivers:
            driver = reference()
            if driver is not None and driver.is_wanted:
                driver.busy = True
                self._drivers.remove(reference)
                self._drivers.append(reference)
                return driver
        return None

    def _alive(self) -> list[Driver]:
        return [driver for reference in self._drivers if (driver := reference()) is not None]

    def _forget(self, reference: weakref.ref[Driver]) -> None:
        with self.changed:
            self._drivers = [kept for kept in self._drivers if kept is not reference]
            self._work.notify_all()


class Driver:
    """Thread-safe access to an engine; `Driver.of` finds the one that serves a model.

    Args:
        engine: the engine to share.
        max_rows: rows that may be decoded at once; further generations wait in the queue.

    Attributes:
        engine: the engine.
        busy: the decode thread is working for this driver.
    """

    def __init__(self, engine: Engine, max_rows: int) -> None:
        self.engine = engine
        self.busy = False
        self._max_rows = max_rows
        self._waiting: deque[Generation] = deque()
        self._admitting: list[Generation] = []
        self._watches: list[_Watch] = []
        with _registry_lock:
            self._thread = _threads.setdefault(id(engine.backend.model), DecodeThread())
        self._changed = engine.handing_over = self._thread.changed
        pause = weakref.WeakMethod(self._pause)  # the engine doesn't keep its driver alive
        engine.paused = lambda: (to_pause := pause()) and to_pause()
        self._thread.add(self)

    @classmethod
    def of(
        cls,
        model: object,
        make_backend: Callable[[], Backend],
        max_rows: int,
        prefix_bytes: int,
        drafts: bool,
        *options: object,
    ) -> Driver:
        """Return the driver of a model with these options; calls with equal options share one.

        Args:
            model: the model that `make_backend` wraps.
            make_backend: called if there is no such driver yet.
            max_rows, prefix_bytes, drafts: see `Engine`.
            options: the backend's options; drivers with other options are separate.
        """
        key = id(model), max_rows, prefix_bytes, drafts, *options
        with _registry_lock:
            driver = _drivers.get(key)
        if driver is None:
            driver = cls(Engine(make_backend(), prefix_bytes, drafts), max_rows)
            with _registry_lock:
                driver = _drivers.setdefault(key, driver)
        return driver

    def submit(self, generation: Generation) -> None:
        """Queue a generation; it joins the batch at the next step."""
        self.engine.backend.queued()
        with self._changed:
            self._thread.cores = torch.get_num_threads()
            self._waiting.append(generation)

    def wait(self, generation: Generation, known: int) -> None:
        """Return once the generation has more than `known` tokens or has ended.

        Raises:
            RequestError: called in the decode thread itself, which would deadlock.
        """
        # Not an event: a stream that is garbage-collected while this thread holds the event's inner
        # lock would wait for the decode thread, and the decode thread for the event.
        news = threading.Lock()
        news.acquire()
        watch = _Watch(generation, news.release, known, lasting=False)
        try:
            self._add(watch)
            news.acquire()
        finally:  # an interrupt
            with self._changed:
                if watch in self._watches:
                    self._watches.remove(watch)

    def watch(self, generation: Generation, wake: Callable[[], None]) -> None:
        """Decode a submitted generation to its end; the decode thread calls `wake` for new tokens.

        If `wake` raises RuntimeError, its reader is gone and the generation is cancelled.

        Raises:
            RequestError: as for `wait`.
        """
        self._add(_Watch(generation, wake, 0, lasting=True))

    def _add(self, watch: _Watch) -> None:
        if self._thread.is_current:
            raise RequestError(
                "A logits processor can't call the model that is running it; use another model."
            )
        with self._changed:
            self._watches.append(watch)
            self._tell()
            if self.is_wanted:
                self._thread.wake()

    @staticmethod
    def check(generation: Generation) -> None:
        """Raise the error that ended a generation, if one did."""
        if generation.error is not None:
            raise _for_caller(generation.error) from generation.error

    def cancel(self, generation: Generation) -> None:
        """End a generation now; its rows leave the batch before the next step. Blocks only briefly.

        No token is appended afterwards.
        """
        with self._changed:
            if not generation.done:
                generation.finish_reason = "cancelled"
            if generation in self._waiting:
                self._waiting.remove(generation)
            if not self.busy:
                self.engine.sweep()
            self._tell()

    def cancel_all(self) -> None:
        """Cancel all running and waiting generations."""
        for generation in self._all():
            self.cancel(generation)

    def fail_all(self, error: BaseException) -> None:
        """End all running and waiting generations with an error; the decode thread is gone."""
        with self._changed:
            self.busy = False
            for generation in self._all():
                generation.fail(error)
            self._waiting.clear()
            self._admitting = []
            self.engine.fail_all(error)
            self._tell()

    def _all(self) -> list[Generation]:
        """All generations that are waiting, being prefilled or running."""
        return [*self._waiting, *self._admitting, *self.engine.running]

    @property
    def is_wanted(self) -> bool:
        """Whether a caller waits for a token."""
        return bool(self._watches)

    def run_turn(self) -> None:
        """Admit the waiting generations, or run one step; then wake the callers that wait."""
        try:
            if not self._admit_waiting():
                self.engine.step()
        except BaseException as error:  # nobody joins this thread, so its readers get the error
            self.engine.fail_all(error)
        with self._changed:
            try:
                self.engine.sweep()
            except BaseException as error:  # for example a lost GPU
                self.engine.fail_all(error)
            self.busy = False
            self._tell()

    def _tell(self) -> None:
        """Wake the callers whose tokens are there."""
        for watch in [watch for watch in self._watches if watch.has_news]:
            if watch not in self._watches:  # already woken by a stream's garbage collection
                continue
            watch.known = len(watch.generation.token_ids)
            if watch.generation.done or not watch.lasting:
                self._watches.remove(watch)
            try:
                watch.wake()
            except RuntimeError:  # its event loop is closed
                self.cancel(watch.generation)

    def _pause(self) -> None:
        """Wake callers in the middle of a prefill."""
        with self._changed:
            self._tell()

    def _admit_waiting(self) -> bool:
        """Prefill waiting generations while there is room; return whether one was admitted."""
        admitted = False
        while generations := self._next_waiting():
            admitted = True
            self._admit(generations)
        return admitted

    def _admit(self, generations: list[Generation]) -> None:
        try:
            self.engine.admit(*generations)
        except BaseException as error:
            if len(generations) == 1:
                generations[0].fail(error)
                return
            for generation in generations:  # each fails for its own reasons only
                self._admit([generation])

    def _next_waiting(self) -> list[Generation]:
        """Return the next generations to be prefilled together, or none."""
        with self._changed:
            self._admitting = []
            if not self._waiting:
                return []
            self._tell()  # the tokens that are there don't wait for the next prefill
            room = self._max_rows - sum(len(g.prompts) for g in self.engine.running)
            fitting: list[Generation] = []
            for generation in list(self._waiting):  # garbage collection may cancel some
                room -= len(generation.prompts)
                if room < 0 and (fitting or self.engine.running):
                    break
                fitting.append(generation)
        count = self.engine.together(fitting) if len(fitting) > 1 else len(fitting)
        with self._changed:
            for generation in fitting[:count]:
                if generation in self._waiting:  # not cancelled meanwhile
                    self._waiting.remove(generation)
                    self._admitting.append(generation)
                    generation.admitted_at = time.time_ns()
            return self._admitting


def _for_caller(error: BaseException) -> AmuletError:
    """Return a new error per caller: one instance raised in several threads mixes tracebacks."""
    if isinstance(error, AmuletError):
        return type(error)(str(error))
    if is_out_of_memory(error):  # in a caller's own processor or grammar
        return OutOfMemoryError(
            f"Out of memory while a token was chosen: {one_line(error)} Use fewer requests at once."
        )
    return DecodeError(
        f"Decoding failed: {type(error).__name__}: {error}. The Amulet object stays usable."
    )


# By the model's id, which is unique while a driver holds the model.
_drivers: weakref.WeakValueDictionary[tuple[object, ...], Driver] = weakref.WeakValueDictionary()
_threads: weakref.WeakValueDictionary[int, DecodeThread] = weakref.WeakValueDictionary()
_registry_lock = threading.RLock()
_forking: list[DecodeThread] = []


@atexit.register
def _end_threads() -> None:
    """End the threads: one that is inside PyTorch at interpreter exit would abort the process."""
    for thread in list(_threads.values()):
        thread.end()


def _before_fork() -> None:
    """Take all locks, so that no shared state is half-updated when the process is forked."""
    _registry_lock.acquire()
    _forking.extend(_threads.values())
    for thread in _forking:
        thread.changed.acquire()


def _after_fork(in_child: bool) -> None:
    for thread in _forking:
        if in_child:
            thread.lose_thread()
        thread.changed.release()
    _forking.clear()
    _registry_lock.release()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=lambda: _after_fork(False),
    after_in_child=lambda: _after_fork(True),
)
