"""BentoML with adaptive batching.

    bentoml serve benchmarks.peers.bentoml_app:Sentiment --port 8100
    curl localhost:8100/classify -H 'Content-Type: application/json' -d '{"texts": ["Amazing movie!"]}'

As https://docs.bentoml.com/en/latest/get-started/adaptive-batching.html sets it up. BentoML chooses by itself how long
to wait for company, from how long the last batches waited, below a limit of the latency. That is $PEER_MAX_LATENCY_MS,
by default the minute that BentoML has: a lower one refuses requests (503) under saturation, and after a saturation with
a minute it goes on waiting for company that does not come.
"""

import os

import bentoml

from benchmarks.peers import model
from benchmarks.peers.model import Answer

MAX_LATENCY_MS = int(os.environ.get("PEER_MAX_LATENCY_MS", 60_000))


@bentoml.service(workers=model.num_workers())
class Sentiment:
    """Classifies the reviews that BentoML merged."""

    def __init__(self) -> None:
        self._classify = model.load()

    @bentoml.api(batchable=True, max_batch_size=model.MAX_BATCH_SIZE, max_latency_ms=MAX_LATENCY_MS)
    def classify(self, texts: list[str]) -> list[Answer]:
        """Returns an answer for each review of a batch."""
        return self._classify(texts)
