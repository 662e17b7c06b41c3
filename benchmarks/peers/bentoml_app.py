"""BentoML with adaptive batching.

    bentoml serve benchmarks.peers.bentoml_app:Sentiment --port 8100
    curl localhost:8100/classify -H 'Content-Type: application/json' -d '{"texts": ["Amazing movie!"]}'

As https://docs.bentoml.com/en/latest/get-started/adaptive-batching.html sets it up; one worker, since it uses all
cores. BentoML chooses by itself how long to wait for company. Its limit of the latency stays at a minute: a lower one
would refuse requests (503) under saturation.
"""

import bentoml

from benchmarks.peers import model
from benchmarks.peers.model import Answer


@bentoml.service(workers=1)
class Sentiment:
    """Classifies the reviews that BentoML merged."""

    def __init__(self) -> None:
        self._classify = model.load()

    @bentoml.api(batchable=True, max_batch_size=model.MAX_BATCH_SIZE)
    def classify(self, texts: list[str]) -> list[Answer]:
        """Returns an answer for each review of a batch."""
        return self._classify(texts)
