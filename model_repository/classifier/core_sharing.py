"""Who may run on which cores: the classifier's instances, each a process with its own, lend each other theirs.

A review that comes alone while nobody runs takes the cores of all instances. An execution of several groups runs some
of them on the cores of instances that have nothing to do. An instance that gets work meanwhile waits for the run on its
cores and has them back; of more than two instances others may be waiting to borrow them and come first. So a review
waits for a core, never for an instance, and a busy server keeps the throughput of several.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

_SERVER_ENTRIES = (
    *("stat", "statm", "status", "cmdline", "comm", "limits", "cgroup", "mounts"),
    *("mountinfo", "oom_score", "sched", "schedstat", "wchan", "cpuset", "net", "task"),
)
"""Of a process's folder in /proc: open to every reader, and there in every Linux that runs containers."""


class Cores:
    """The cores of each instance as a lock on a file that all of them open: a process that dies frees what it has."""

    def __init__(self, files: Sequence[Path], own: int) -> None:
        """Opens the locks on `files`, one an instance; that at `own` is this instance's. Nothing is written.

        Raises:
            OSError: a file cannot be opened, or not be locked.
        """
        self._own = own
        self._opened: list[int] = []
        try:
            self._files = [self._open(file) for file in files]
            # A lock belongs to what was opened: a borrower that is not this instance's main thread has its own.
            self._lent = {index: self._open(file) for index, file in enumerate(files) if index != own}
        except OSError:
            self.close()
            raise

    @classmethod
    def of_server(cls, own: int, instances: int) -> "Cores":
        """Opens the locks of the `instances` of this process's server: on entries of its parent, Triton, in /proc.

        Not on files of the model's folder, which servers with other cores may share.

        Raises:
            OSError: no such entries here, or fewer than instances.
        """
        if instances > len(_SERVER_ENTRIES):
            raise OSError(f"{instances} instances came, at most {len(_SERVER_ENTRIES)} can lend each other cores")
        folder = Path("/proc") / str(os.getppid())
        return cls([folder / entry for entry in _SERVER_ENTRIES[:instances]], own)

    @property
    def others(self) -> list[int]:
        """The other instances."""
        return list(self._lent)

    @contextlib.contextmanager
    def taken(self, want_all: bool) -> Iterator[bool]:
        """Holds the cores of all instances if `want_all` and nobody runs on any, else this instance's own.

        Waits for a run on its own cores to end. Yields whether it is all of them: whoever had to wait has company.
        """
        held = self._take_all() if want_all else []
        has_all = bool(held)
        if not has_all:
            held = [self._files[self._own]]
            fcntl.flock(held[0], fcntl.LOCK_EX)
        try:
            yield has_all
        finally:
            _release(held)

    @contextlib.contextmanager
    def lent(self, other: int, idle_s: float) -> Iterator[bool]:
        """Holds the cores of instance `other`, once it has had nothing to do for `idle_s`; yields whether it has them.

        It has not if somebody took them in that time. One thread at a time may call it for each instance.
        """
        lock = self._lent[other]
        fcntl.flock(lock, fcntl.LOCK_EX)
        if idle_s:
            _release([lock])
            time.sleep(idle_s)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
        try:
            yield True
        finally:
            _release([lock])

    def close(self) -> None:
        """Lets go of the locks."""
        while self._opened:
            os.close(self._opened.pop())

    def _open(self, file: Path) -> int:
        self._opened.append(os.open(file, os.O_RDONLY | os.O_CLOEXEC))
        fcntl.flock(self._opened[-1], fcntl.LOCK_UN)  # a file system without locks says so here, not to a review
        return self._opened[-1]

    def _take_all(self) -> list[int]:
        """Returns the locks of all instances, now held, or none of them."""
        held: list[int] = []
        for file in self._files:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _release(held)
                return []
            held.append(file)
        return held


def _release(held: Sequence[int]) -> None:
    for file in held:
        fcntl.flock(file, fcntl.LOCK_UN)
