"""Triton's counters before and after a load, and what their differences say about batching and where time goes."""

import json
import re
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

STEPS = ("tokenizer", "classifier")
"""The models of the ensemble `sentiment`, in order."""
ENSEMBLE = "sentiment"
_TIMEOUT_S = 10
_LINE = re.compile(r"^((?:nv_inference|sentiment_)\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
_MODEL = re.compile(r'model="([^"]*)"')


def get(url: str) -> str:
    """Returns the body at `url`, asked without any proxy; raises OSError, also where no HTTP is spoken."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_TIMEOUT_S) as response:
            return str(response.read().decode())
    except HTTPException as error:
        raise OSError(f"{url} answered with something else than HTTP: {type(error).__name__} {error}") from error


def parse(text: str) -> dict[str, float]:
    """Returns Triton's inference counters and this project's own by `name` or `name{model-or-labels}`.

    Labels are reduced to the model's name where there is one; failures are added up over their reasons.
    """
    counters: dict[str, float] = {}
    for name, labels, value in _LINE.findall(text):
        model = _MODEL.search(labels)
        inner = model[1] if model else labels
        key = f"{name}{{{inner}}}" if inner else name
        counters[key] = counters.get(key, 0.0) + float(value)
    return counters


def snapshot(http_url: str, metrics_url: str) -> dict[str, Any]:
    """Returns the counters now, and how many executions each step has had by number of reviews; raises OSError."""
    batches = {}
    for step in STEPS:
        (stats,) = json.loads(get(f"{http_url}/v2/models/{step}/stats"))["model_stats"]
        batches[step] = {str(b["batch_size"]): int(b["compute_infer"]["count"]) for b in stats.get("batch_stats", [])}
    return {"counters": parse(get(metrics_url)), "batches": batches}


def server_version(http_url: str) -> str:
    """Returns the version of Triton that answers at `http_url`; raises OSError."""
    return str(json.loads(get(f"{http_url}/v2"))["version"])


def configuration(http_url: str, model: str) -> dict[str, Any]:
    """Returns the configuration that `model` is served with; raises OSError."""
    served: dict[str, Any] = json.loads(get(f"{http_url}/v2/models/{model}/config"))
    return served


def instances(config: Mapping[str, Any]) -> int:
    """Returns how many instances of a model of that configuration work side by side."""
    return sum(int(group["count"]) * max(len(group.get("gpus", [])), 1) for group in config["instance_group"])


def runtime(config: Mapping[str, Any]) -> str:
    """Returns what runs the classifier of that configuration: its parameter `runtime`, or its backend without one."""
    named = config.get("parameters", {}).get("runtime", {}).get("string_value")
    return str(named or config["backend"])


def has_response_cache(metrics: str) -> bool:
    """Whether a server with these metrics answers out of a response cache, once it has answered a request.

    Every server counts hits and misses by model, and stays at zero without a cache; the local cache alone counts its
    entries.
    """
    counted = re.findall(r"^nv_cache_num_(?:hits|misses)_per_model\S* (\S+)", metrics, re.MULTILINE)
    return "nv_cache_num_entries" in metrics or any(float(value) > 0 for value in counted)


_REVIEWS_BY_CORES = {cores: f'sentiment_classifier_reviews{{cores="{cores}"}}' for cores in ("all", "own", "lent")}


PHASES = ("queue", "tokenizing", "inference", "other")
"""Where a request's time goes, all of it: the shares of `Batching`."""


@dataclass(frozen=True)
class Batching:
    """What the server did between two snapshots; shares are of the ensemble's time from receiving to answering."""

    reviews: float
    """Answered by the classifier."""
    reviews_per_execution: dict[str, float]
    """By step: 1 means that nothing was merged."""
    executions_by_reviews: dict[str, dict[int, int]]
    """By step: executions with exactly that many reviews."""
    padded_over_real_tokens: float | None
    """Tokens run over tokens of reviews, 1 without padding; None where the server does not count them."""
    window_filled_share: float | None
    """Share of the reviews that fill the model's window, nearly all of them truncated."""
    all_cores_share: float | None
    """Share of the reviews that ran alone on the cores of all instances; None where the server does not count them."""
    queue_share: float
    """Waiting for a step to take the request."""
    tokenizing_share: float
    inference_share: float
    other_share: float
    """Of the ensemble itself: handing tensors over, scheduling."""
    mean_ms: float
    """Mean time of a request in the server as Triton counts it, to the end of its execution; it is answered before."""


def batching(before: Mapping[str, Any], after: Mapping[str, Any]) -> Batching | None:
    """Returns what happened between two snapshots, None if no request was answered."""

    def difference(key: str) -> float:
        return float(after["counters"].get(key, 0.0)) - float(before["counters"].get(key, 0.0))

    def times_us(model: str, *phases: str) -> float:
        return sum(difference(f"nv_inference_{phase}_duration_us{{{model}}}") for phase in phases)

    requests = difference(f"nv_inference_request_success{{{ENSEMBLE}}}")
    total_us = times_us(ENSEMBLE, "request")
    if requests <= 0 or total_us <= 0:
        return None
    compute = ("compute_input", "compute_infer", "compute_output")
    queue_us = sum(times_us(step, "queue") for step in STEPS)
    tokenizing_us, inference_us = (times_us(step, *compute) for step in STEPS)
    reviews = {step: difference(f"nv_inference_count{{{step}}}") for step in STEPS}
    executions = {step: difference(f"nv_inference_exec_count{{{step}}}") for step in STEPS}
    real_tokens = difference('sentiment_classifier_tokens{kind="review"}')
    padding_tokens = difference('sentiment_classifier_tokens{kind="padding"}')
    on_cores = {cores: difference(key) for cores, key in _REVIEWS_BY_CORES.items()}
    counts_cores = _REVIEWS_BY_CORES["all"] in after["counters"]
    counts_windows = "sentiment_reviews_filling_window" in after["counters"]
    return Batching(
        reviews=reviews["classifier"],
        reviews_per_execution={step: reviews[step] / max(executions[step], 1) for step in STEPS},
        executions_by_reviews={step: _differences(before, after, step) for step in STEPS},
        padded_over_real_tokens=(real_tokens + padding_tokens) / real_tokens if real_tokens else None,
        window_filled_share=difference("sentiment_reviews_filling_window") / reviews["tokenizer"]
        if counts_windows and reviews["tokenizer"]
        else None,
        all_cores_share=on_cores["all"] / max(sum(on_cores.values()), 1) if counts_cores else None,
        queue_share=queue_us / total_us,
        tokenizing_share=tokenizing_us / total_us,
        inference_share=inference_us / total_us,
        other_share=1 - (queue_us + tokenizing_us + inference_us) / total_us,
        mean_ms=total_us / requests / 1000,
    )


def _differences(before: Mapping[str, Any], after: Mapping[str, Any], step: str) -> dict[int, int]:
    earlier, later = before["batches"].get(step, {}), after["batches"].get(step, {})
    counts = {int(size): count - earlier.get(size, 0) for size, count in later.items()}
    return {size: count for size, count in sorted(counts.items()) if count}
