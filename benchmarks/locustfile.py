"""Locust users of the service: three protocols, each as a closed and as an open loop.

    locust -f benchmarks/locustfile.py --class-picker           # web UI: pick a user class, its options are in the form
    locust -f benchmarks/locustfile.py --headless --users 8 --window-s 30 --out artefacts/try GrpcUser
    locust -f benchmarks/locustfile.py --headless --users 1 --rate 40 --window-s 30 --out artefacts/try GrpcArrivals

...User: closed loop, each of `--users` sends as soon as it has its answer, and latency counts from there: the client's
own time between two requests is in it, 0.1 ms for one user, 1 ms for eight that send 230 short reviews a second.
...Arrivals: open loop, requests arrive at random (Poisson) at `--rate`, whether or not earlier ones are answered, and
latency counts from the arrival. Each is one Locust user however many are asked for. Answers are checked
(benchmarks/answers.py); a wrong one is a failure. Without `--known`, the first start runs a quarter of the texts
through this checkout's model, which takes some ten seconds.

One process: `--processes` would write several sets of samples to the same file. Open loops run here too, and not in an
asyncio process of their own: measured per request, the client took 1.9 ms of CPU under gevent and 1.6 ms under asyncio.
"""

import locust  # noqa: F401  first: it makes the standard library cooperative

# isort: split

import logging
import sys
import time
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import gevent
import gevent.pool
from grpc.experimental import gevent as grpc_gevent
from locust import User, constant, events, task
from locust.env import Environment
from locust.exception import StopTest

from benchmarks import texts
from benchmarks.load_test import TIMEOUT_S, LoadTest, Options
from benchmarks.profiles import Load, Protocol
from benchmarks.texts import TextSource

grpc_gevent.init_gevent()  # before the first channel: otherwise a gRPC call stops every other user

logger = logging.getLogger(__name__)
DRAIN_S = 30
"""How long requests in flight may take once no more are sent; the client gives up on them before."""
STOP_TIMEOUT_S = TIMEOUT_S + 1
"""Default of --stop-timeout: with Locust's own, 0, what is in flight at the end is cut off, the slowest of all."""


@dataclass
class _Running:
    test: LoadTest
    watcher: gevent.Greenlet


_running: dict[int, _Running] = {}
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
    parser.add_argument("--out", default="", help="write samples to OUT.csv.gz, the rest to OUT.json")
    parser.add_argument("--known", type=Path, help="file of known answers to these texts; default: they are found out")
    texts.add_arguments(parser)
    parser.set_defaults(stop_timeout=STOP_TIMEOUT_S)


@events.test_start.add_listener
def _start(environment: Environment, **_: Any) -> None:
    try:
        test = _make(environment)
    except Exception as error:  # Locust would log it and run on without a test
        _give_up(environment, error)
        raise StopTest(str(error)) from error
    _running[id(environment)] = _Running(test, gevent.spawn(_stop_after_window, environment, test))


def _make(environment: Environment) -> LoadTest:
    options = environment.parsed_options
    assert options is not None
    made = Options(
        http_url=environment.host or Options().http_url,
        grpc_url=options.grpc_url,
        metrics_url=options.metrics_url,
        rate_per_s=options.rate,
        batch_size=options.batch_size,
        kind=options.kind,
        source=TextSource(Path(options.data) if options.data else None, options.reviews, options.seed),
        known=Path(options.known) if options.known else None,
        warmup_s=options.warmup_s,
        window_s=options.window_s,
        out=options.out,
    )
    return LoadTest(made, _load(environment, made))


def _load(environment: Environment, options: Options) -> Load | None:
    """Returns what the raw files say of the load, None where none are written.

    Raises:
        ValueError: options that are no load, or that no raw file describes.
    """
    picked = cast("list[type[_SentimentUser]]", environment.user_classes)
    users = environment.runner.target_user_count if environment.runner is not None else 1
    loads = [user.load(options, users) for user in picked]
    if not options.out:
        return None
    if options.window_s <= 0 or len(loads) != 1:
        names = ", ".join(user.__name__ for user in picked)
        raise ValueError(
            f"--out needs --window-s above 0 and one kind of user, got {options.window_s:g} and {names or 'none'}"
        )
    return loads[0]


def _give_up(environment: Environment, error: Exception) -> None:
    """Says why, and ends the process; with the web UI only the test."""
    reason = f"benchmarks/locustfile.py: error: {type(error).__name__}: {error}"
    if environment.web_ui is None:
        sys.exit(reason)
    logger.error(reason)
    if environment.runner is not None:
        environment.runner.stop()


def _stop_after_window(environment: Environment, test: LoadTest) -> None:
    try:
        test.watch_window(gevent.sleep)
    except Exception as error:
        _give_up(environment, error)
        return
    runner = environment.runner
    if test.options.window_s and runner is not None:
        (runner.quit if environment.web_ui is None else runner.stop)()


@events.test_stop.add_listener
def _finish(environment: Environment, **_: Any) -> None:
    running = _running.pop(id(environment), None)
    if running is None:
        return
    if running.watcher is not gevent.getcurrent():
        running.watcher.kill()  # else it would stop the next test
    running.test.end()


class _SentimentUser(User):
    """Asks over one protocol and tells Locust how it went."""

    abstract = True
    host = Options().http_url
    wait_time = constant(0)
    protocol: Protocol
    loop: Literal["open", "closed"]

    @classmethod
    def load(cls, options: Options, users: int) -> Load:
        """Returns what `options` and that many users amount to; raises ValueError."""
        return options.load(cls.protocol, cls.loop, options.rate_per_s if cls.loop == "open" else max(users, 1))

    def on_start(self) -> None:
        self.test = _running[id(self.environment)].test

    def ask(self, due_s: float) -> float:
        """Sends one request that was due at `due_s` (time.perf_counter), records it, returns when it ended."""
        sample, error = self.test.ask(self.protocol, due_s)
        self.environment.events.request.fire(
            request_type=self.protocol,
            name=f"{sample.reviews} reviews" if sample.reviews > 1 else "1 review",
            response_time=(sample.done_s - sample.scheduled_s) * 1000,
            response_length=0,
            exception=error,
            context={},
        )
        return sample.done_s


class _ClosedLoop(_SentimentUser):
    abstract = True
    loop = "closed"

    def on_start(self) -> None:
        super().on_start()
        self.free_s = time.perf_counter()

    @task
    def ask_again(self) -> None:
        self.test.due(self.free_s)
        self.free_s = self.ask(self.free_s)


class _OpenLoop(_SentimentUser):
    abstract = True
    loop = "open"
    fixed_count = 1

    def on_start(self) -> None:
        super().on_start()
        self.in_flight = gevent.pool.Group()
        self.arrivals_s = self.test.arrivals_s(self.protocol)

    @task
    def arrive(self) -> None:
        due_s = next(self.arrivals_s)
        gevent.sleep(max(0.0, due_s - time.perf_counter()))
        self.test.due(due_s)
        self.in_flight.spawn(self.ask, due_s)

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
