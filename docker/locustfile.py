"""A first load for the composed service: reviews of mixed length over HTTP, from Locust's own image and page.

Needs nothing but Locust, hence no client library and no report; benchmarks/ holds the measured load tests.
"""

import random

from locust import FastHttpUser, between, task

SENTENCES = (
    "The cast is superb and the ending moved me.",
    "I looked at my watch three times before the first hour was over.",
    "Some scenes work, others feel borrowed from better films.",
    "The music alone is worth the ticket.",
    "Nobody in this story behaves like a person I have ever met.",
)


class Reviewer(FastHttpUser):
    """Sends one review after another; overload (503) counts as a failure."""

    wait_time = between(0.1, 1.0)

    @task
    def classify(self) -> None:
        """Asks for one prediction; `/infer`, since `/generate` reports overload as the client's fault (400)."""
        review = " ".join(random.choices(SENTENCES, k=random.choice((1, 5, 20, 40))))
        tensor = {"name": "text", "datatype": "BYTES", "shape": [1, 1], "data": [review]}
        self.client.post("/v2/models/sentiment/infer", json={"inputs": [tensor]}, name="infer")
