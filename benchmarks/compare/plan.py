"""How long everything takes and how often it is repeated: the one place that says so.

`minutes` adds it up with the shortest probes, so that limits for that (50 minutes, 6 with --quick, for eleven systems)
can be tested. They are those of two cores with VNNI; slow systems get longer probes, and without VNNI everything takes
longer: 78 minutes in a fast hour.
"""

from dataclasses import dataclass

LIMIT_S = 0.2
"""The promise: a request must be answered within this ..."""
MIN_SHARE_IN_TIME = 0.99
"""... and this share of them is, rightly: p99 <= 200 ms, where a failure or a wrong answer counts as late."""
PROMISE = f"{100 * MIN_SHARE_IN_TIME:g} % within {1000 * LIMIT_S:g} ms"
"""In short, for headings."""
TIMEOUT_S = 30.0
"""A request without an answer by then is a failure; so is a server that does not answer its first one within
`START_TIMEOUT_S`."""
START_TIMEOUT_S = 90.0
START_S = 9.0
"""What starting and ending a server takes, roughly: Ray Serve needs twice that, the others less."""
IN_PROCESS_START_S = 2.0
CEILING_REVIEWS_PER_S = 100.0
LONE_S = 0.015
"""What an in-process task takes to start, its pace over the texts and a review alone, on two cores with VNNI, roughly;
only `Plan.minutes` uses them."""
CURVE_TOKENS = (20, 32, 64, 128, 192, 256, 320, 384, 512)
"""Lengths of the texts of the curve of time against tokens."""

GROUPINGS = {"one by one": 1, "256 tokens": 256, "512 tokens": 512, "1024 tokens": 1024, "4096 tokens": 4096}
"""`max_group_tokens` for `length_groups`, which gets all texts at once: a server sees no more than its queue."""


def layouts(threads: int) -> dict[str, tuple[int, int]]:
    """Returns (engines, threads of each) that use all `threads`, by name."""
    return {f"{count} x {size}": (count, size) for count, size in dict.fromkeys([(1, threads), (threads, 1)])}


@dataclass(frozen=True)
class Plan:
    """Durations in seconds; counts are for one round."""

    reviews: int
    """Different texts."""
    rounds: int
    """Every system is measured once in each, in another order each time."""
    users: int
    """Of the closed loop that saturates: so many that every queue always holds several batches."""
    warmup_s: float
    """Closed loop before the window that counts; open loops follow on warm servers and lose `settle_s`."""
    saturated_s: float
    """Closed loop that saturates ..."""
    turns: int
    """... of this service as often, in turn with its ceiling in process."""
    settle_s: float
    probe_s: float
    """Window of an open loop at one rate, at least ..."""
    probe_requests: int
    """... and so long that about as many requests are due ...

    With 60, of which none may be late, simulated slow systems came out 1.2 to 1.9 times as fast as they are, where this
    service, with its hundreds, came out 1.1 to 1.4 times; with 200 both 1.1 to 1.4 times (CHANGELOG)."""
    probe_at_most_s: float
    """... but for no longer than this. It may end early: as soon as too many requests are late to pass."""
    ladder: tuple[float, ...]
    """Rates to choose from for the open loops, as shares of the saturated throughput; found by bisection."""
    lone_requests: int
    """Requests one after the other, of this service, and the same work in process."""
    ceiling_s: float
    """In-process ceiling of each layout, before and after each turn of this service's saturating load, at least; it
    runs whole passes."""
    candidate_s: float
    """Each layout and grouping that the ceiling is chosen from, once, at least one pass."""
    curve_repeats: int
    """Requests for each length of the curve of time against tokens, of this service, and the same work in process."""
    one_length_s: float
    """Closed loop of texts of one length, for each of two lengths, of this service."""

    @property
    def probes(self) -> int:
        """Open loops that the bisection takes at most."""
        return len(self.ladder).bit_length()

    def probe_window_s(self, rate_per_s: float) -> float:
        """Returns how long an open loop at `rate_per_s` counts."""
        return max(self.probe_s, min(self.probe_requests / rate_per_s, self.probe_at_most_s))

    def minutes(self, num_systems: int) -> float:
        """Returns about how long the whole takes, each probe `probe_s`: some end early, slow systems' take longer."""
        num_candidates = len(layouts(2)) * len(GROUPINGS)
        pass_s = self.reviews / CEILING_REVIEWS_PER_S
        load_s = START_S + self.warmup_s + self.saturated_s + self.probes * (self.settle_s + self.probe_s)
        ceilings_s = (self.turns + 1) * (IN_PROCESS_START_S + len(layouts(2)) * max(self.ceiling_s, 2 * pass_s))
        lone = self.lone_requests + len(CURVE_TOKENS) * self.curve_repeats
        lone_s = 2 * IN_PROCESS_START_S + 3 * lone * LONE_S  # in process twice: a warm-up
        turns_s = (self.turns - 1) * (self.warmup_s + self.saturated_s)
        own_s = ceilings_s + turns_s + lone_s + 2 * (self.warmup_s + self.one_length_s)
        round_s = num_systems * load_s + 2 * own_s  # over HTTP and over gRPC
        return (self.rounds * round_s + num_candidates * max(self.candidate_s, pass_s)) / 60


def _ladder(lowest_percent: int, step_percent: int, count: int) -> tuple[float, ...]:
    return tuple((lowest_percent + step_percent * place) / 100 for place in range(count))


DEFAULT = Plan(
    reviews=512,
    rounds=3,
    users=64,
    warmup_s=2,
    saturated_s=9,
    turns=2,
    settle_s=1,
    probe_s=8,
    probe_requests=200,
    probe_at_most_s=60,
    ladder=_ladder(12, 3, 31),  # 12 % to 102 % in 5 probes
    lone_requests=512,
    ceiling_s=8,
    candidate_s=3,
    curve_repeats=20,
    one_length_s=5,
)
QUICK = Plan(
    reviews=128,
    rounds=1,
    users=64,
    warmup_s=1,
    saturated_s=4,
    turns=1,
    settle_s=0.5,
    probe_s=3,
    probe_requests=20,
    probe_at_most_s=20,
    ladder=_ladder(20, 13, 7),  # 20 % to 98 % in 3 probes
    lone_requests=50,
    ceiling_s=3,
    candidate_s=1,
    curve_repeats=5,
    one_length_s=2,
)
