"""What the same work costs without a server, in the environment that serves; a process of its own.

    python -m benchmarks.compare.inprocess TASK SPEC.json OUT.json

SPEC holds `texts`, `threads` (cores that may be used) and the task's own numbers. Tasks, and what OUT then holds:

    labels      the label of every text, null where its score is below SURE_SCORE
    candidates  reviews a second of every layout and grouping, tokens ready
    ceiling     the same for some of them: `candidates`, each with `layout` and `grouping`
    lengths     a text of exactly n tokens for each of `tokens`
"""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.answers import SURE_SCORE
from benchmarks.compare.plan import GROUPINGS, layouts
from benchmarks.peers import shipped_engine
from model_repository.classifier.engine import WIDTH_STEPS, choose
from model_repository.classifier.length_groups import length_groups

Rows = Sequence[Sequence[int]]


def _groups(rows: Rows, grouping: str) -> list[list[list[int]]]:
    lengths = [len(row) for row in rows]
    groups = length_groups(lengths, max(lengths), GROUPINGS[grouping], WIDTH_STEPS[choose()])
    return [[list(rows[index]) for index in group] for _, group in groups]


def ceiling(rows: Rows, layout: tuple[int, int], grouping: str, length_s: float) -> dict[str, float]:
    """Returns reviews and tokens a second of running `rows` over and over, at least once and for `length_s`.

    Each engine is in a process of its own, as in the server, and on cores of its own: OpenVINO pins its threads, those
    of every engine to the same cores if it may.
    """
    groups = _groups(rows, grouping)[::-1]  # long ones first: the last to finish keeps nobody waiting
    context = multiprocessing.get_context("spawn")
    shared = (groups, layout, length_s, context.Value("q", 0), context.Barrier(layout[0]))
    with context.Pool(layout[0], _share, (shared,)) as pool:
        runs = pool.map(_run, range(layout[0]), chunksize=1)
    wall_s = max(run.end_s for run in runs) - min(run.start_s for run in runs)
    return {
        "reviews_per_s": sum(r.reviews for r in runs) / wall_s,
        "tokens_per_s": sum(r.tokens for r in runs) / wall_s,
    }


class _Run(NamedTuple):
    """What one engine did; times of `time.perf_counter`, which all processes share."""

    reviews: int
    tokens: int
    start_s: float
    end_s: float


_shared: dict[str, Any] = {}
"""In an engine's process: what `ceiling` gave to all of them."""


def _share(shared: tuple[Any, ...]) -> None:
    _shared.update(zip(("groups", "layout", "length_s", "next", "barrier"), shared, strict=True))


def _run(place: int) -> _Run:
    """Runs groups in the process of engine `place` until there are no more."""
    groups, (_, num_threads), barrier = _shared["groups"], _shared["layout"], _shared["barrier"]
    cores = sorted(os.sched_getaffinity(0))[place * num_threads : (place + 1) * num_threads]
    if len(cores) == num_threads:
        os.sched_setaffinity(0, cores)
    infer = shipped_engine.open_engine(num_threads)
    for group in {(len(group), len(group[-1])): group for group in groups}.values():
        infer(group)  # the first run of a shape takes longer, and counts for nothing here
    barrier.wait()
    start_s = time.perf_counter()
    reviews = tokens = 0
    while (index := _take(start_s + _shared["length_s"])) is not None:
        group = groups[index]
        infer(group)
        reviews, tokens = reviews + len(group), tokens + sum(map(len, group))
    return _Run(reviews, tokens, start_s, time.perf_counter())


def _take(end_s: float) -> int | None:
    """Returns the next group's index, None from the end of the pass on in which `end_s` lies.

    Whole passes only, so that every text counts equally often.
    """
    following = _shared["next"]
    with following.get_lock():
        if following.value < 0:
            return None
        index = int(following.value) % len(_shared["groups"])
        if index == 0 and following.value and time.perf_counter() >= end_s:
            following.value = -1
            return None
        following.value += 1
        return index


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


def _labels(spec: dict[str, Any]) -> object:
    rows = shipped_engine.open_encoder().encode(spec["texts"])
    infer = shipped_engine.open_engine(spec["threads"])
    answers = [infer([row]) for row in rows]
    return [labels[0] if scores[0] >= SURE_SCORE else None for labels, scores in answers]


def _candidates(spec: dict[str, Any]) -> object:
    names = layouts(spec["threads"])
    return list(_each(spec, [{"layout": name, "grouping": grouping} for name in names for grouping in GROUPINGS]))


def _ceiling(spec: dict[str, Any]) -> object:
    return list(_each(spec, spec["candidates"]))


def _each(spec: dict[str, Any], candidates: Sequence[dict[str, str]]) -> Iterator[dict[str, object]]:
    rows = shipped_engine.open_encoder().encode(spec["texts"])
    for one in candidates:
        layout = layouts(spec["threads"])[one["layout"]]
        yield {**one, **ceiling(rows, layout, one["grouping"], spec["length_s"])}


def _lengths(spec: dict[str, Any]) -> object:
    encoder = shipped_engine.open_encoder()
    return [{"tokens": num_tokens, "text": text_of(num_tokens, encoder.encode)} for num_tokens in spec["tokens"]]


TASKS = {"labels": _labels, "candidates": _candidates, "ceiling": _ceiling, "lengths": _lengths}


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
