"""Which reviews run together, and in which rectangles: pure arithmetic on token counts.

On a CPU a run has a fixed cost, which short reviews share when they run together; padding costs what tokens cost. And
in some engines the first run of a shape takes two to three times as long as later ones, since they make kernels for it.
So widths go in the engine's steps (`Engine.width_step`) and group sizes are powers of two: in these engines few enough
shapes to run each once before the first review comes.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def max_merged(config: Mapping[str, Any]) -> int:
    """Returns how many reviews of several requests Triton merges at most into an execution of a model so configured."""
    preferred = config.get("dynamic_batching", {}).get("preferred_batch_size", [])
    return int(max(preferred, default=config["max_batch_size"]))


def width_of(length: int, max_width: int, width_step: int) -> int:
    """Returns the width that a review of `length` tokens runs at where the model takes `max_width`."""
    return max(length, min(-(-length // width_step) * width_step, max_width))


def length_groups(
    lengths: Sequence[int], max_width: int, max_group_tokens: int, width_step: int
) -> Iterator[tuple[int, list[int]]]:
    """Yields a width and the indices into `lengths` that run at it; every index once, who came first runs first.

    A group is a rectangle: reviews of one width, as many as a power of two, at most `max_group_tokens` tokens in all
    with their padding. A review longer than that runs alone. Shortest first would answer half of the reviews sooner,
    and those that decide the 99th percentile later.
    """
    same_width: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        same_width.setdefault(width_of(length, max_width, width_step), []).append(index)
    groups = [
        (width, group) for width, members in same_width.items() for group in _split(members, max_group_tokens // width)
    ]
    yield from sorted(groups, key=lambda group: group[1][0])


def _split(members: Sequence[int], max_size: int) -> Iterator[list[int]]:
    start = 0
    while start < len(members):
        size = _power_of_two(min(len(members) - start, max_size))
        yield list(members[start : start + size])
        start += size


def shapes(max_length: int, max_width: int, max_group_tokens: int, width_step: int) -> Iterator[tuple[int, int]]:
    """Yields every rectangle (reviews, width) that `length_groups` can make of reviews up to `max_length` tokens."""
    for width in sorted({width_of(length, max_width, width_step) for length in range(1, max_length + 1)}):
        largest = _power_of_two(max_group_tokens // width)
        yield from ((1 << power, width) for power in range(largest.bit_length()))


def _power_of_two(limit: int) -> int:
    """Returns the largest power of two up to `limit`, at least 1."""
    return 1 << (max(limit, 1).bit_length() - 1)
