"""When a failed request is sent again, and how long to wait before.

Only `ServerUnavailableError` is retried: the server did not take the request, or classifying it twice does no harm.
A deadline never is, since its time is spent; nor a refusal, since the answer would be the same.
"""

import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from clients.errors import ServerUnavailableError

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential backoff with jitter, bounded in number and, by the caller's deadline, in time.

    Attributes:
        max_attempts: how often a request is sent at most; 1 means no retry.
        first_backoff_s: longest wait before the second attempt; it doubles with each further one.
        max_backoff_s: no wait is longer than this.
    """

    max_attempts: int = 4
    first_backoff_s: float = 0.1
    max_backoff_s: float = 2.0

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts is {self.max_attempts}, expected at least 1 (no retry)")
        if not 0 < self.first_backoff_s <= self.max_backoff_s:
            raise ValueError(
                f"first_backoff_s is {self.first_backoff_s} and max_backoff_s {self.max_backoff_s}, "
                "expected 0 < first_backoff_s <= max_backoff_s"
            )

    def backoff_s(self, attempt: int, jitter: float) -> float:
        """Returns the wait after attempt number `attempt` (from 1); `jitter`, 0 to 1, takes off up to half of it.

        The jitter keeps clients that failed together from coming back together.
        """
        longest_s = min(self.first_backoff_s * 2.0 ** min(attempt - 1, 1000), self.max_backoff_s)
        return longest_s * (1 - jitter / 2)


async def with_retries(
    send: Callable[[float], Awaitable[T]],
    policy: RetryPolicy,
    timeout_s: float,
    sleep: Callable[[float], Awaitable[None]],
    monotonic: Callable[[], float] = time.monotonic,
    jitter: Callable[[], float] = random.random,
) -> T:
    """Returns the answer of `send`, called with the seconds left of `timeout_s`, again after each passing failure.

    Raises:
        ServerUnavailableError: still unavailable after the last attempt, or no time is left for another.
    """
    deadline = monotonic() + timeout_s
    attempt = 1
    while True:
        try:
            return await send(deadline - monotonic())
        except ServerUnavailableError as error:
            wait_s = policy.backoff_s(attempt, jitter())
            if attempt >= policy.max_attempts or monotonic() + wait_s >= deadline:
                raise ServerUnavailableError(f"{error} (attempts: {attempt})") from error
            logger.info("attempt %d of %d failed, next in %.2f s: %s", attempt, policy.max_attempts, wait_s, error)
        await sleep(wait_s)
        attempt += 1
