"""What the same work costs without a server, in the environment that serves; a process of its own.

    python -m benchmarks.compare.inprocess TASK SPEC.json OUT.json

SPEC holds `texts`, `threads` (cores that may be used), `served` ([instances, threads] of the service) and the task's
own numbers. Tasks, and what OUT then holds:

    labels      the label of every text, null where its score is below SURE_SCORE
    candidates  reviews a second of every layout and grouping, tokens ready
    ceiling     the same for one of them: `layout`, `grouping`
    lone        seconds of tokenizing and inferring each text alone, with one instance's threads
    curve       a text of exactly n tokens for each of `tokens`, and the seconds of each of its `repeats`
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.compare.plan import GROUPINGS, layouts
from benchmarks.peers import shipped_engine
from benchmarks.peers.shipped_engine import Infer
from model_repository.classifier.length_groups import length_groups

SURE_SCORE = 0.9
"""A label counts as known from here on: another precision, or company in a batch, moves a score a little, so that a
review on the fence may tip without anything being wrong."""
Rows = Sequence[Sequence[int]]


def _groups(rows: Rows, grouping: str) -> list[list[list[int]]]:
    limits = GROUPINGS[grouping]
    return [[list(rows[index]) for index in group] for group in length_groups([len(r) for r in rows], *limits)]


def ceiling(rows: Rows, layout: tuple[int, int], grouping: str, length_s: float) -> dict[str, float]:
    """Returns reviews and tokens a second of running `rows` over and over, at least once and for `length_s`."""
    engines = [shipped_engine.open_engine(layout[1]) for _ in range(layout[0])]
    groups = _groups(rows, grouping)[::-1]  # long ones first: the last to finish keeps nobody waiting
    with ThreadPoolExecutor(layout[0]) as pool:
        for infer in engines:
            shipped_engine.infer_rows(infer, groups[0])
        queue = _Queue(groups, time.perf_counter() + length_s)
        start_s = time.perf_counter()
        counts = list(pool.map(lambda infer: _run(infer, queue), engines))
        wall_s = time.perf_counter() - start_s
    return {"reviews_per_s": sum(c[0] for c in counts) / wall_s, "tokens_per_s": sum(c[1] for c in counts) / wall_s}


class _Queue:
    """Hands out groups, pass after pass, until `end_s` is over at the end of one: every text counts equally often."""

    def __init__(self, groups: Sequence[Rows], end_s: float) -> None:
        self._groups = groups
        self._end_s = end_s
        self._next = 0
        self._lock = threading.Lock()

    def take(self) -> Rows | None:
        """Returns the next group, None for the end."""
        with self._lock:
            place = self._next % len(self._groups)
            if place == 0 and self._next and time.perf_counter() >= self._end_s:
                return None
            self._next += 1
            return self._groups[place]


def _run(infer: Infer, queue: _Queue) -> tuple[int, int]:
    """Runs groups until there are no more; returns reviews and tokens."""
    reviews = tokens = 0
    while (group := queue.take()) is not None:
        shipped_engine.infer_rows(infer, group)
        reviews, tokens = reviews + len(group), tokens + sum(map(len, group))
    return reviews, tokens


def text_of(num_tokens: int, encode: Callable[[Sequence[str]], list[list[int]]]) -> str:
    """Returns a text of `num_tokens` tokens, [CLS] and [SEP] included; longer than the model's window for more.

    Raises:
        ValueError: the tokenizer splits one of these words.
    """
    words = ("the", "film", "was", "good", "and", "long", "but", "the", "end", "came", "late")
    text = " ".join(words[place % len(words)] for place in range(num_tokens - 2))
    if len(encode([text])[0]) > num_tokens:
        raise ValueError(f"{words} are not one token each in this vocabulary")
    return text


def _timed(work: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


def _labels(spec: dict[str, Any]) -> object:
    rows = shipped_engine.open_encoder().encode(spec["texts"])
    infer = shipped_engine.open_engine(spec["threads"])
    answers = [shipped_engine.infer_rows(infer, [row]) for row in rows]
    return [labels[0] if scores[0] >= SURE_SCORE else None for labels, scores in answers]


def _candidates(spec: dict[str, Any]) -> object:
    return list(_each_candidate(spec))


def _each_candidate(spec: dict[str, Any]) -> Iterator[dict[str, object]]:
    rows = shipped_engine.open_encoder().encode(spec["texts"])
    for name, layout in layouts(spec["threads"]).items():
        for grouping in GROUPINGS:
            yield {"layout": name, "grouping": grouping, **ceiling(rows, layout, grouping, spec["length_s"])}


def _ceiling(spec: dict[str, Any]) -> object:
    rows = shipped_engine.open_encoder().encode(spec["texts"])
    return ceiling(rows, layouts(spec["threads"])[spec["layout"]], spec["grouping"], spec["length_s"])


def _lone(spec: dict[str, Any]) -> object:
    encoder, infer = shipped_engine.open_encoder(), shipped_engine.open_engine(spec["served"][1])
    for text in spec["texts"][:20]:  # warm-up
        shipped_engine.infer_rows(infer, encoder.encode([text]))
    return [_timed(lambda t=text: shipped_engine.infer_rows(infer, encoder.encode([t]))) for text in spec["texts"]]  # type: ignore[misc]


def _curve(spec: dict[str, Any]) -> object:
    encoder, infer = shipped_engine.open_encoder(), shipped_engine.open_engine(spec["served"][1])
    points = []
    for num_tokens in spec["tokens"]:
        text = text_of(num_tokens, encoder.encode)
        shipped_engine.infer_rows(infer, encoder.encode([text]))
        seconds = [
            _timed(lambda t=text: shipped_engine.infer_rows(infer, encoder.encode([t])))  # type: ignore[misc]
            for _ in range(spec["repeats"])
        ]
        points.append({"tokens": num_tokens, "text": text, "seconds": seconds})
    return points


TASKS = {"labels": _labels, "candidates": _candidates, "ceiling": _ceiling, "lone": _lone, "curve": _curve}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one task."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 3 or arguments[0] not in TASKS:
        print(f"benchmarks.compare.inprocess: error: expected {'|'.join(TASKS)} SPEC.json OUT.json", file=sys.stderr)
        return 2
    result = TASKS[arguments[0]](json.loads(Path(arguments[1]).read_text()))
    Path(arguments[2]).write_text(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
