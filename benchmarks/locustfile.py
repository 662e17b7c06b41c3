"""Locust users of the service: three protocols, each as a closed and as an open loop.

    locust -f benchmarks/locustfile.py --class-picker           # web UI: pick a user class, its options are in the form
    locust -f benchmarks/locustfile.py --headless --users 8 --window-s 30 --out artefacts/try GrpcUser
    locust -f benchmarks/locustfile.py --headless --users 1 --rate 40 --window-s 30 --out artefacts/try GrpcArrivals

...User: closed loop, each of `--users` sends as soon as it has its answer. ...Arrivals: open loop, requests arrive at
random (Poisson) at `--rate`, whether or not earlier ones are answered, and latency counts from the arrival. Each is one
Locust user however many are asked for. Answers are checked (benchmarks/answers.py); a wrong one is a failure.

One process: `--processes` would write several sets of samples to the same file. Open loops run here too, and not in an
asyncio process of their own: measured per request, the client took 1.9 ms of CPU under gevent and 1.6 ms under asyncio.
"""

import locust  # noqa: F401  first: it makes the standard library cooperative

# isort: split

import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import gevent
import gevent.pool
import numpy as np
from grpc.experimental import gevent as grpc_gevent
from locust import User, constant, events, task
from locust.env import Environment

from benchmarks import texts
from benchmarks.load_test import LoadTest, Options
from benchmarks.profiles import Protocol

grpc_gevent.init_gevent()  # before the first channel: otherwise a gRPC call stops every other user

DRAIN_S = 30
"""How long requests in flight may take once no more are sent; the client gives up on them before."""
_tests: dict[int, LoadTest] = {}
"""The running test of each Locust environment."""


@events.init_command_line_parser.add_listener
def _options(parser: ArgumentParser) -> None:
    defaults = Options()
    parser.add_argument("--rate", type=float, default=defaults.rate_per_s, help="requests a second of an open loop")
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size, help="reviews in each request")
    parser.add_argument("--kind", choices=["imdb", "short"], default=defaults.kind, help="lengths of the reviews")
    parser.add_argument("--grpc-url", default=defaults.grpc_url, help="where gRPC users send; HTTP users take --host")
    parser.add_argument("--metrics-url", default=defaults.metrics_url, help="Triton's metrics")
    parser.add_argument("--warmup-s", type=float, default=defaults.warmup_s, help="seconds that do not count")
    parser.add_argument("--window-s", type=float, default=0, help="seconds that count, then stop; 0 is until stopped")
    parser.add_argument("--out", default="", help="write samples to OUT.csv.gz and the window to OUT.json")
    texts.add_arguments(parser)


@events.test_start.add_listener
def _start(environment: Environment, **_: Any) -> None:
    options = environment.parsed_options
    assert options is not None
    test = LoadTest(
        Options(
            http_url=environment.host or Options().http_url,
            grpc_url=options.grpc_url,
            metrics_url=options.metrics_url,
            rate_per_s=options.rate,
            batch_size=options.batch_size,
            kind=options.kind,
            data=Path(options.data) if options.data else None,
            reviews=options.reviews,
            seed=options.seed,
            warmup_s=options.warmup_s,
            window_s=options.window_s,
            out=options.out,
        )
    )
    _tests[id(environment)] = test
    gevent.spawn(_stop_after_window, environment, test)


def _stop_after_window(environment: Environment, test: LoadTest) -> None:
    test.watch_window(gevent.sleep)
    runner = environment.runner
    if test.options.window_s and runner is not None:
        (runner.quit if environment.web_ui is None else runner.stop)()


@events.test_stop.add_listener
def _finish(environment: Environment, **_: Any) -> None:
    _tests.pop(id(environment)).end()


class _SentimentUser(User):
    """Asks over one protocol and tells Locust how it went."""

    abstract = True
    host = Options().http_url
    wait_time = constant(0)
    protocol: Protocol

    def on_start(self) -> None:
        self.test = _tests[id(self.environment)]

    def ask(self, due_s: float) -> None:
        """Sends one request that was due at `due_s` (time.perf_counter) and records it."""
        sample, error = self.test.ask(self.protocol, due_s)
        self.environment.events.request.fire(
            request_type=self.protocol,
            name=f"{sample.reviews} reviews" if sample.reviews > 1 else "1 review",
            response_time=(sample.done_s - sample.scheduled_s) * 1000,
            response_length=0,
            exception=error,
            context={},
        )


class _ClosedLoop(_SentimentUser):
    abstract = True

    @task
    def ask_again(self) -> None:
        self.ask(time.perf_counter())


class _OpenLoop(_SentimentUser):
    abstract = True
    fixed_count = 1

    def on_start(self) -> None:
        super().on_start()
        self.in_flight = gevent.pool.Group()
        self.random = np.random.default_rng(self.test.options.seed)
        self.due_s = time.perf_counter()

    @task
    def arrive(self) -> None:
        self.due_s += self.random.exponential(1 / self.test.options.rate_per_s)
        gevent.sleep(max(0.0, self.due_s - time.perf_counter()))
        self.in_flight.spawn(self.ask, self.due_s)

    def on_stop(self) -> None:
        self.in_flight.join(timeout=DRAIN_S)


class GrpcUser(_ClosedLoop):
    protocol = "grpc"


class InferUser(_ClosedLoop):
    protocol = "infer"


class GenerateUser(_ClosedLoop):
    protocol = "generate"


class GrpcArrivals(_OpenLoop):
    protocol = "grpc"


class InferArrivals(_OpenLoop):
    protocol = "infer"


class GenerateArrivals(_OpenLoop):
    protocol = "generate"
