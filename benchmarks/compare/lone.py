"""Lone reviews: what the server takes for one at a time beside the same work in this process, a few of each in turn.

A machine's speed changes within seconds, by more than the two differ, so that both must be measured in the same ones.
"""

import time
from collections.abc import Awaitable, Callable, Sequence

from benchmarks.peers import shipped_engine

TURN = 5
"""Reviews run in process, then sent: a quarter of a second of each on a slow CPU. The first of a turn finds the CPU's
caches as the other side left them, the rest as in a loop of its own."""

Send = Callable[[float, int], Awaitable[None]]
"""Time (time.perf_counter) and the index of a text in; sends it and notes what came of it."""


async def in_turn(texts: Sequence[str], num_threads: int, send: Send) -> list[float]:
    """Sends each text once, alone, in their order; returns the seconds of tokenizing and inferring each in process."""
    encoder, infer = shipped_engine.open_encoder(), shipped_engine.open_engine(num_threads)
    for text in texts:  # the first run of a shape takes longer
        infer(encoder.encode([text]))
    in_process_s = []
    for start in range(0, len(texts), TURN):
        indices = range(start, min(start + TURN, len(texts)))
        for index in indices:
            start_s = time.perf_counter()
            infer(encoder.encode([texts[index]]))
            in_process_s.append(time.perf_counter() - start_s)
        for index in indices:
            await send(time.perf_counter(), index)
    return in_process_s
