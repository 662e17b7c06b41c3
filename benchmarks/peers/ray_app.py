"""Ray Serve with `@serve.batch`.

    python -m benchmarks.peers.ray_app --port 8100
    curl localhost:8100/ -d '{"text": "Amazing movie!"}'

As https://docs.ray.io/en/latest/serve/advanced-guides/dyn-req-batch.html sets it up. A replica holds as many cores as
its model has threads, which also makes Ray give torch that many; it may take more requests than a batch, as the page
asks.
"""

import argparse
import signal
import sys
from collections.abc import Sequence

import ray
from ray import serve
from starlette.requests import Request

from benchmarks.peers import model
from benchmarks.peers.model import Answer

MAX_ONGOING_REQUESTS = 256
"""Far more than users in any comparison: with the default of 5 no batch could fill."""


@serve.deployment(
    num_replicas=model.num_workers(),
    ray_actor_options={"num_cpus": model.num_threads()},
    max_ongoing_requests=MAX_ONGOING_REQUESTS,
)
class Sentiment:
    """Classifies the reviews that Ray Serve merged."""

    def __init__(self) -> None:
        self._classify = model.load()

    @serve.batch(max_batch_size=model.MAX_BATCH_SIZE, batch_wait_timeout_s=model.MAX_WAIT_S)
    async def classify(self, reviews: list[str]) -> list[Answer]:
        """Returns an answer for each review of a batch."""
        return self._classify(reviews)

    async def __call__(self, request: Request) -> Answer:
        """Answers one request."""
        answer: Answer = await self.classify((await request.json())["text"])
        return answer


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until it is ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True, help="where to listen, on this machine only")
    options = parser.parse_args(argv)
    ray.init(
        num_cpus=model.num_workers() * model.num_threads(),
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        logging_level="error",
    )
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    serve.run(Sentiment.bind(), name="sentiment")  # type: ignore[attr-defined]
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
