"""Lets an instance use the cores of the others while these have nothing to do.

Each instance of the classifier is a process with as many cores as it has threads. A run that starts while no other
instance runs may take the cores of all. An instance that gets work meanwhile waits for that one run; from then on each
keeps to its own. So a lone review is answered about as soon as by one instance with all cores, and a busy server has
the throughput of several.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


class Cores:
    """The cores of all instances, as a lock on a folder that all of them open: a process that dies frees its own."""

    def __init__(self, folder: Path) -> None:
        """Opens the lock on `folder`, into which nothing is written.

        Raises:
            OSError: the file system has no such locks.
        """
        self._descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._take_all()
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        except OSError:
            self.close()
            raise

    @classmethod
    def of_server(cls) -> "Cores":
        """Opens the lock of the instances of this process's server: on the folder in /proc of its parent, Triton.

        Not on the model's folder, which servers with other cores may share.
        """
        return cls(Path("/proc") / str(os.getppid()))

    @contextlib.contextmanager
    def taken(self, want_all: bool) -> Iterator[bool]:
        """Holds the cores of all instances if `want_all` and no other instance holds any, else this instance's own.

        Yields whether it is all of them. Whoever had to wait gets its own: it has company.
        """
        has_all = want_all and self._take_all()
        if not has_all:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)  # waits for a run on all cores to end, not for others
        try:
            yield has_all
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Lets go of the lock."""
        os.close(self._descriptor)

    def _take_all(self) -> bool:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
