"""The models' own metrics when the server does not take one, for which Triton's Python module has a stand-in here."""

import importlib
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest

MODELS = Path(__file__).resolve().parents[1] / "model_repository"


class Server:
    """Takes metrics as Triton does, but for the first report, for which it has no memory."""

    def __init__(self) -> None:
        self.total = 0.0
        self.logged: list[str] = []
        self.has_failed, self.has_counted = threading.Event(), threading.Event()

    def increment(self, number: float) -> None:
        if not self.has_failed.is_set():
            raise MemoryError("no shared memory")
        self.total += number
        self.has_counted.set()

    def log_error(self, message: str) -> None:
        self.logged.append(message)
        self.has_failed.set()

    def module(self) -> types.ModuleType:
        metric = types.SimpleNamespace(increment=self.increment, observe=lambda value: None)
        family = types.SimpleNamespace(Metric=lambda **_: metric)
        module = types.ModuleType("triton_python_backend_utils")
        module.__dict__["MetricFamily"] = type(
            "MetricFamily", (), {"COUNTER": 0, "HISTOGRAM": 1, "__new__": lambda cls, **_: family}
        )
        module.__dict__["Logger"] = types.SimpleNamespace(log_error=self.log_error)
        return module


def metrics_of(step: str) -> tuple[Any, Any]:
    """Returns the metrics of a step, and what to note of one review of five tokens."""
    if step == "tokenizer":
        return importlib.import_module("window_metric").WindowMetric(), 5
    module = importlib.import_module("execution_metrics")
    return module.ExecutionMetrics(), module.Execution(5, 0, 1, {})


@pytest.mark.parametrize("step", ["tokenizer", "classifier"])
def test_what_the_server_did_not_take_is_lost_and_the_next_is_counted(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server()
    monkeypatch.syspath_prepend(MODELS / step)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", server.module())
    for name in ("window_metric", "execution_metrics"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    metrics, noted = metrics_of(step)
    metrics.note(noted)
    assert server.has_failed.wait(60)
    metrics.note(noted)
    assert server.has_counted.wait(60)
    metrics.close()
    assert server.total == 5
    assert "no shared memory" in server.logged[0]
