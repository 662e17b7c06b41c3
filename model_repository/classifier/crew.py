"""Runs the groups of an execution on this instance's cores and on those that other instances lend."""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

from core_sharing import Cores

OWN, LENT, ALL = CORES = ("own", "lent", "all")
"""Whose cores a group ran on: this instance's, those of one that had nothing to do, those of all instances."""
_IDLE_S = 0.003
"""No instance of a busy server has nothing to do for that long: it is back sooner, and would wait for its cores."""
_GIVE_BACK_S = 0.0002
"""Between two runs on lent cores: else who waits for its own would lose them again to who is quicker."""
_Infer = Callable[[int, str], Any]
_Answer = Callable[[int, Any], None]


class Crew:
    """The thread that calls it, on this instance's cores, and one for each other instance, on that one's."""

    def __init__(self, cores: Cores) -> None:
        """Starts the threads, which end with the process."""
        self._cores = cores
        self._changed = threading.Condition()
        self._job = _Job(0, False, lambda number, whose: None, lambda number, result: None)
        for other in cores.others:
            threading.Thread(target=self._help, args=(other,), name=f"on cores {other}", daemon=True).start()

    def run(self, count: int, want_all: bool, is_busy: bool, infer: _Infer, answer: _Answer) -> None:
        """Calls `infer` with each number below `count`, in that order, and whose cores it has; returns when all ended.

        It has all of them if `want_all` and nobody else runs. With `is_busy` the server is: then only cores that stay
        idle are borrowed, else whichever come free. What `infer` returns goes to `answer`, after lent cores are back.
        Several threads call both at once. An exception of either is raised when all have ended.
        """
        job = _Job(count, is_busy, infer, answer)
        with self._cores.taken(want_all) as has_all:
            if count > 1:
                with self._changed:
                    self._job = job
                    self._changed.notify_all()
            while job.run_next(ALL if has_all else OWN, contextlib.nullcontext(True)):
                pass
        job.wait()

    def _help(self, other: int) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._job.has_next)
                job = self._job
            idle_s = _IDLE_S if job.is_busy else 0.0
            while job.run_next(LENT, self._cores.lent(other, idle_s)):
                idle_s = _GIVE_BACK_S


class _Job:
    """The groups of one execution, each begun by whoever has cores first."""

    def __init__(self, count: int, is_busy: bool, infer: _Infer, answer: _Answer) -> None:
        self.is_busy = is_busy
        self._infer, self._answer = infer, answer
        self._numbers = iter(range(count))
        self._num_waiting = self._num_unfinished = count
        self._changed = threading.Condition()
        self._errors: list[BaseException] = []

    @property
    def has_next(self) -> bool:
        """Whether a group has not been begun."""
        return self._num_waiting > 0

    def run_next(self, whose: str, cores: contextlib.AbstractContextManager[bool]) -> bool:
        """Runs the next group on `cores`, which are `whose`, if there still is one when they are free; returns that."""
        number = None
        try:
            with cores as has_cores:
                number = self._begin() if has_cores else None
                if number is None:
                    return False
                result = self._infer(number, whose)
            self._answer(number, result)
        except BaseException as error:  # for `wait`, which else would wait for ever
            if number is None:  # the cores cannot be locked, and nothing began: ends the thread that would borrow them
                raise
            self._errors.append(error)
        with self._changed:
            self._num_unfinished -= 1
            self._changed.notify_all()
        return True

    def wait(self) -> None:
        """Returns when all have ended; raises what the first that failed raised."""
        with self._changed:
            self._changed.wait_for(lambda: not self._num_unfinished)
        if self._errors:
            raise self._errors[0]

    def _begin(self) -> int | None:
        with self._changed:
            number = next(self._numbers, None)
            self._num_waiting -= number is not None
            return number
