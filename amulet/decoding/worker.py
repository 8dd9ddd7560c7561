"""One decode thread per model: callers queue answers and wait for news; it alone runs the engine.

Decoding goes on while somebody waits: a reader for its next token, or an event loop for an answer.
"""

from __future__ import annotations

import atexit
import os
import threading
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
    """Somebody waits for news of a generation."""

    generation: Generation
    wake: Callable[[], None]  # called at news; of one that only sets a flag
    known: int  # tokens that the waiter has seen
    lasting: bool  # wake at all further news, too

    @property
    def has_news(self) -> bool:
        return self.generation.done or len(self.generation.token_ids) > self.known


class DecodeThread:
    """The thread that all drivers of one model share; it ends with the last of them.

    While it idles it holds no reference to a driver, so that models are freed.

    Attributes:
        changed: guards all state that drivers share with callers. The decode thread holds it while
            it hands tokens over, but not while it computes.
        cores: threads that PyTorch may use, as the last caller had them.
    """

    def __init__(self) -> None:
        # Not the condition itself, whose `with` is Python code: Ctrl-C in there leaves it locked.
        self.changed = threading.RLock()
        self._work = threading.Condition(self.changed)
        self.cores = torch.get_num_threads()
        self._drivers: list[weakref.ref[Driver]] = []  # the one served last at the end
        self._thread: threading.Thread | None = None
        self._ended = False

    def add(self, driver: Driver) -> None:
        """Serve a driver from now on."""
        with self.changed:
            self._drivers.append(weakref.ref(driver, self._forget))

    def wake(self) -> None:
        """Look for work now. The caller holds `changed`."""
        if self._ended:
            raise DecodeError("The interpreter is exiting; nothing more can be decoded.")
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="amulet-decode", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # no thread to be had, or the interpreter is exiting
                raise DecodeError(f"The decode thread can't be started: {error}.") from error
            self._thread = thread
        self._work.notify_all()

    @property
    def is_current(self) -> bool:
        """Whether the caller is the decode thread itself."""
        return self._thread is threading.current_thread()

    def end(self) -> None:
        """End what is being decoded, and the thread; return once it has ended."""
        with self.changed:
            self._ended = True
            for driver in self._alive():
                driver.cancel_all()
            self._work.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(timeout=30)

    def lose_thread(self) -> None:
        """Go on in a forked child, which has no decode thread. The caller holds `changed`."""
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
        """Return a driver that somebody waits for, each in its turn."""
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
        max_rows: rows that may be decoded at once; further generations wait their turn.

    Attributes:
        engine: the engine.
        busy: the decode thread is at work for this driver.
    """

    def __init__(self, engine: Engine, max_rows: int) -> None:
        self.engine = engine
        self.busy = False
        self._max_rows = max_rows
        self._waiting: deque[Generation] = deque()
        self._admitting: Generation | None = None
        self._watches: list[_Watch] = []
        with _registry_lock:
            self._thread = _threads.setdefault(id(engine.backend.model), DecodeThread())
        self._changed = engine.handing_over = self._thread.changed
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
        """Return the driver of a model with these options; one serves all who ask alike.

        Args:
            model: what `make_backend` makes a backend of.
            make_backend: called where there is no such driver yet.
            max_rows, prefix_bytes, drafts: see `Engine`.
            options: those of the backend, which tell it from others over the model.
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
            RequestError: the decode thread itself asks, which would wait for ever.
        """
        # Not an event: a stream that is collected while this thread holds the event's inner lock
        # would wait for the decode thread, and that one for the event.
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
        """Decode a submitted generation to its end; call `wake` in the decode thread at all news.

        If `wake` raises RuntimeError, nobody reads any more and the generation is cancelled.

        Raises:
            RequestError: as for `wait`.
        """
        self._add(_Watch(generation, wake, 0, lasting=True))

    def _add(self, watch: _Watch) -> None:
        if self._thread.is_current:
            raise RequestError(
                "A logits processor can't ask the model that is calling it; use another model."
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
        """End a generation now; its rows leave the batch before the next step. Never blocks long.

        No token is handed over after it.
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
        """End all that is decoded or waits."""
        for generation in self._all():
            self.cancel(generation)

    def fail_all(self, error: BaseException) -> None:
        """End all that is decoded or waits with an error; nobody is at work any more."""
        with self._changed:
            self.busy = False
            for generation in self._all():
                generation.fail(error)
            self._waiting.clear()
            self._admitting = None
            self.engine.fail_all(error)
            self._tell()

    def _all(self) -> list[Generation]:
        """All that is decoded, prefilled or waits."""
        filling = [] if self._admitting is None else [self._admitting]
        return [*self._waiting, *filling, *self.engine.running]

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for a token."""
        return bool(self._watches)

    def run_turn(self) -> None:
        """Admit the waiting generations, or run one step; then tell who waits for news."""
        try:
            if not self._admit_waiting():
                self.engine.step()
        except BaseException as error:  # nobody joins this thread: its readers must learn of it
            self.engine.fail_all(error)
        with self._changed:
            try:
                self.engine.sweep()
            except BaseException as error:  # such as a GPU that is lost
                self.engine.fail_all(error)
            self.busy = False
            self._tell()

    def _tell(self) -> None:
        """Wake those who wait for what there is now."""
        for watch in [watch for watch in self._watches if watch.has_news]:
            if watch not in self._watches:  # a stream that was collected meanwhile told them
                continue
            watch.known = len(watch.generation.token_ids)
            if watch.generation.done or not watch.lasting:
                self._watches.remove(watch)
            try:
                watch.wake()
            except RuntimeError:  # its event loop is closed
                self.cancel(watch.generation)

    def _admit_waiting(self) -> bool:
        """Prefill waiting generations while there is room; return whether one was admitted."""
        admitted = False
        while (generation := self._next_waiting()) is not None:
            admitted = True
            try:
                self.engine.admit(generation)
            except BaseException as error:
                generation.fail(error)
        return admitted

    def _next_waiting(self) -> Generation | None:
        with self._changed:
            self._admitting = None
            if not self._waiting:
                return None
            rows = sum(len(generation.prompts) for generation in self.engine.running)
            if rows and rows + len(self._waiting[0].prompts) > self._max_rows:
                return None
            self._admitting = self._waiting.popleft()
            return self._admitting


def _for_caller(error: BaseException) -> AmuletError:
    """A fresh error per caller: one instance raised in several threads would mix tracebacks."""
    if isinstance(error, AmuletError):
        return type(error)(str(error))
    if is_out_of_memory(error):  # in a caller's own processor or grammar
        return OutOfMemoryError(
            f"Out of memory while a token was chosen: {one_line(error)} Use fewer requests at once."
        )
    return DecodeError(
        f"Decoding failed: {type(error).__name__}: {error}. The Amulet object stays usable."
    )


# By the model's identity, which nobody else has while a driver holds the model.
_drivers: weakref.WeakValueDictionary[tuple[object, ...], Driver] = weakref.WeakValueDictionary()
_threads: weakref.WeakValueDictionary[int, DecodeThread] = weakref.WeakValueDictionary()
_registry_lock = threading.RLock()
_forking: list[DecodeThread] = []


@atexit.register
def _end_threads() -> None:
    """A thread that is inside PyTorch while the interpreter goes down would abort the process."""
    for thread in list(_threads.values()):
        thread.end()


def _before_fork() -> None:
    """Let nobody be in the middle of a hand-over when the process is copied."""
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
