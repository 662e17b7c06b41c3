"""A predictor that is opened by its first use and refuses to be used after its end or in the wrong place."""

import os
import threading
from collections.abc import Callable

from clients.address import Address
from clients.errors import ClientStateError
from clients.predictor import Predictor
from clients.retry import RetryPolicy
from clients.transport import Transport
from clients.workers import Workers

DEFAULT_MODEL = "sentiment"
DEFAULT_TIMEOUT_S = 30.0
"""A full batch of long reviews takes a second or two on two cores; this leaves room for a queue before it."""
MAX_TIMEOUT_S = 1e9
"""30 years. Where much more comes gRPC ends each call at once, and an event loop waits for ever."""


class Connection:
    """What a client owns: its settings, and from the first use on, its predictor.

    Args:
        url: `grpc://host:port` or `http://host:port[/base]`.
        model: name of the model.
        timeout_s: time for each request, its retries and their waits included.
        retry: when to send again, see `clients.retry`.
        open_transport: makes the transport.
        open_workers: makes the workers.
        place: what must be the same at each use, beside the process: the event loop of an asyncio client.

    Raises:
        ValueError: a malformed URL, or a time that is not positive or beyond `MAX_TIMEOUT_S`.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str,
        timeout_s: float,
        retry: RetryPolicy | None,
        open_transport: Callable[[Address], Transport],
        open_workers: Callable[[], Workers],
        place: Callable[[], object] = lambda: None,
    ) -> None:
        if not 0 < timeout_s <= MAX_TIMEOUT_S:
            raise ValueError(f"timeout_s is {timeout_s}, expected more than 0 and at most {MAX_TIMEOUT_S:g} seconds")
        self.address = Address.parse(url)
        self.settings = (model, timeout_s, retry or RetryPolicy())
        self._open_transport = open_transport
        self._open_workers = open_workers
        self._find_place = place
        self._opening = threading.RLock()  # a signal handler may close what the thread below it opens
        self._opened: tuple[Predictor, int, object] | None = None
        self._closed = False

    def predictor(self) -> Predictor:
        """Returns the predictor, opened here if this is its first use.

        Raises:
            ClientStateError: closed, or opened in another process or event loop.
        """
        self._refuse_if_closed()
        opened = self._opened
        if opened is None:
            with self._opening:
                self._refuse_if_closed()  # nor by another thread
                opened = self._opened
                if opened is None:
                    predictor = Predictor(self._open_transport(self.address), self._open_workers(), *self.settings)
                    opened = self._opened = (predictor, os.getpid(), self._find_place())
                    if self._closed:  # by a signal handler, meanwhile: the garbage collector ends the connection
                        self._opened = None
                        self._refuse_if_closed()
        predictor, process, place = opened
        if process != os.getpid():
            raise ClientStateError(
                f"this client of {self.address.url} was opened in process {process} and is used in its fork "
                f"{os.getpid()}, which cannot share a connection: open one in each process"
            )
        if place is not self._find_place():
            raise ClientStateError(
                f"this client of {self.address.url} was opened in another event loop: open one in each asyncio.run"
            )
        return predictor

    def end(self) -> Transport | None:
        """Marks the end and returns the transport if it is left to close here; the second time there is none."""
        with self._opening:
            opened, self._closed = self._opened, True
        if opened is None or opened[1] != os.getpid() or opened[2] is not self._find_place():
            return None
        self._opened = None
        return opened[0].transport

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise ClientStateError(f"this client of {self.address.url} is closed: open another one")
