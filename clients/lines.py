"""Reviews from a stream, one a line, to answers in the same order, while several batches are on their way.

    reading thread -> queue of lines -> batches as tasks, in order -> answers

Nothing holds more than a few batches, so a file may be of any length; and a batch is whatever has been read by then, so
that a line typed into a pipe is answered at once.
"""

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO

from clients.aio import AsyncSentimentClient
from clients.prediction import Prediction


@dataclass(frozen=True)
class Line:
    """A review and where it stands.

    Attributes:
        number: from 1.
        text: the review; empty if there is a `problem`.
        problem: why it cannot be sent, or empty.
    """

    number: int
    text: str
    problem: str = ""


@dataclass(frozen=True)
class Answer:
    """What came of a line: a prediction, or the problem in words."""

    line: Line
    outcome: Prediction | str


def read_lines(stream: BinaryIO) -> Iterator[Line]:
    """Yields the lines of `stream`, UTF-8, without their ends; a broken one carries its problem and no text."""
    for number, raw in enumerate(stream, start=1):
        try:
            text = raw.rstrip(b"\r\n").decode()
        except UnicodeDecodeError as error:
            yield Line(number, "", f"not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}")
            continue
        yield Line(number, text) if text.strip() else Line(number, "", "empty")


class _Reader:
    """Reads ahead in a thread of its own, since reading a pipe blocks and the event loop must not."""

    def __init__(self, lines: Iterable[Line], batch_size: int) -> None:
        self._batch_size = batch_size
        self._queue: queue.Queue[Line | Exception | None] = queue.Queue(maxsize=2 * batch_size)
        self._end: Exception | bool = False
        # A daemon: a read that blocks on an idle terminal must not keep the program alive.
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()

    def _read(self, lines: Iterable[Line]) -> None:
        end = None
        try:
            for line in lines:
                self._queue.put(line)
        except Exception as error:
            end = error
        self._queue.put(end)

    def take(self) -> list[Line]:
        """Returns 1 to `batch_size` lines: waits for the first, adds those already there; none at the end.

        Raises:
            OSError: the stream could not be read; lines before that have been returned.
        """
        batch: list[Line] = []
        with suppress(queue.Empty):
            while not self._end and len(batch) < self._batch_size:
                item = self._queue.get(block=not batch)
                if isinstance(item, Line):
                    batch.append(item)
                else:
                    self._end = item or True
        if isinstance(self._end, Exception) and not batch:
            raise self._end
        return batch

    def stop(self) -> None:
        """Ends a `take` that waits."""
        with suppress(queue.Full):
            self._queue.put_nowait(None)


async def answer_lines(
    client: AsyncSentimentClient, lines: Iterable[Line], max_in_flight: int
) -> AsyncGenerator[list[Answer], None]:
    """Yields the answers to `lines` batch by batch, in their order.

    Raises:
        SentimentError: the server fails for another reason than a bad review; earlier batches have been yielded.
        OSError: the stream could not be read.
    """
    reader = _Reader(lines, (await client.signature()).max_batch_size)
    room = asyncio.Semaphore(max_in_flight)
    batches: asyncio.Queue[asyncio.Task[list[Answer]] | None] = asyncio.Queue()
    started: set[asyncio.Task[list[Answer]]] = set()

    async def start_batches() -> None:
        try:
            while await room.acquire() and (batch := await asyncio.to_thread(reader.take)):
                task = asyncio.create_task(_answer_batch(client, batch))
                started.add(task)
                batches.put_nowait(task)
        finally:
            batches.put_nowait(None)

    starter = asyncio.create_task(start_batches())
    try:
        while (task := await batches.get()) is not None:
            yield await task
            started.discard(task)
            room.release()
        await starter
    finally:
        reader.stop()
        for unfinished in (starter, *started):
            unfinished.cancel()
        await asyncio.gather(starter, *started, return_exceptions=True)


async def _answer_batch(client: AsyncSentimentClient, batch: list[Line]) -> list[Answer]:
    outcomes = iter(await client.predict_each(line.text for line in batch if not line.problem))
    answers = []
    for line in batch:
        outcome = line.problem or next(outcomes)
        answers.append(Answer(line, outcome if isinstance(outcome, Prediction | str) else outcome.reason))
    return answers
