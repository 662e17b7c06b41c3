"""LitServe with batching.

    python -m benchmarks.peers.litserve_app --port 8100
    curl localhost:8100/predict -H 'Content-Type: application/json' -d '{"text": "Amazing movie!"}'

As https://lightning.ai/docs/litserve/features/batching sets it up.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import litserve

from benchmarks.peers import model
from benchmarks.peers.model import Answer


class Sentiment(litserve.LitAPI):
    """Classifies the reviews that LitServe merged."""

    def setup(self, device: str) -> None:
        """Loads the model, once in each worker."""
        self._classify = model.load()

    def decode_request(self, request: dict[str, Any]) -> str:
        """Returns the review in the body of a request."""
        return str(request["text"])

    def predict(self, x: list[str]) -> list[Answer]:
        """Returns an answer for each review of a batch."""
        return self._classify(x)

    def encode_response(self, output: Answer) -> Answer:
        """Returns the body of an answer."""
        return output


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until it is ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True, help="where to listen, on this machine only")
    options = parser.parse_args(argv)
    api = Sentiment(max_batch_size=model.MAX_BATCH_SIZE, batch_timeout=model.MAX_WAIT_S)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=model.num_workers())
    server.run(host="127.0.0.1", port=options.port, generate_client_file=False, log_level="warning")
    return 0


if __name__ == "__main__":
    sys.exit(main())
