"""Which reviews run together: pure arithmetic on token counts.

On a CPU a run has a fixed cost, which some hundred tokens outweigh, and padding costs what tokens cost. So short
reviews of like length are worth running together; of long ones few fill a group.
"""

from collections.abc import Iterator, Sequence


def length_groups(lengths: Sequence[int], max_group_tokens: int, max_padding_percent: float) -> Iterator[list[int]]:
    """Yields groups of indices into `lengths` (tokens per review), shortest reviews first, every index once.

    A group of n reviews runs as a rectangle n x longest. It takes no further review when the rectangle would exceed
    `max_group_tokens`, or when more than `max_padding_percent` of the rectangle would be padding. A review longer
    than `max_group_tokens` runs alone.
    """
    group: list[int] = []
    real_tokens = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        length = lengths[index]
        rectangle = (len(group) + 1) * length
        padding = rectangle - (real_tokens + length)
        if group and (rectangle > max_group_tokens or padding * 100 > max_padding_percent * rectangle):
            yield group
            group, real_tokens = [], 0
        group.append(index)
        real_tokens += length
    if group:
        yield group
