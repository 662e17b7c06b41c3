"""When a signal may end the server: at set moments only, so that none is lost and none strikes in between."""

import contextlib
import signal
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Each ends the server."""


def interrupt_on_signals() -> None:
    """Has each signal raise KeyboardInterrupt: SIGINT too, which a script's background job starts with ignored.

    Not nohup's SIGHUP.
    """
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


def hold_signals() -> None:
    """Has signals wait for `interruptible` from now on.

    Anywhere else one could lose Triton before its guard is there, or leave the lock in its Popen taken for ever, as one
    of some thousand did.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def release_signals() -> None:
    """Lets signals in, those that have waited first."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Lets signals in, those that have waited first: each raises KeyboardInterrupt."""
    try:
        release_signals()
        yield
    finally:
        # Not `hold_signals`: on the way into a function of Python's a second signal could raise before the mask is set.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
