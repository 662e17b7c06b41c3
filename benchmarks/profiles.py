"""Load profiles: profiles.yaml read and validated; a misspelt key is an error that names it and the nearest one."""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

PROFILES_FILE = Path(__file__).resolve().parent / "profiles.yaml"

Protocol = Literal["grpc", "infer", "generate"]
"""gRPC, HTTP /infer (tritonclient's binary tensors), HTTP /generate (the simple JSON API)."""
TextKind = Literal["imdb", "short"]


class ProfileError(ValueError):
    """A profile cannot be used; the message names the key, what came and what was expected."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Limits(_Section):
    """The promise: latencies in ms, failures in percent of the requests, memory."""

    p50_ms: float = Field(gt=0)
    p99_ms: float = Field(gt=0)
    failures_percent: float = Field(ge=0, le=100)
    memory_mib: dict[Literal["triton", "tokenizer", "classifier"], Annotated[float, Field(gt=0)]] = {}
    """Resident at most, each process of that kind; where the processes are out of sight nothing is checked."""


class Validity(_Section):
    """What makes a measurement worthless, whatever it says about the service."""

    max_generator_cpu_percent: float = Field(gt=0, le=100)
    """Share of one core that the load generator used."""
    max_littles_law_percent: float = Field(gt=0)
    """Difference between rate x mean latency and the requests in flight (`summary.littles_law`)."""
    max_disagreement_percent: float = Field(gt=0)
    """Difference of p50 or p99 between Locust and perf_analyzer from which on the report warns."""


class Load(_Section):
    """One measurement: a tool, a protocol and one level of load."""

    tool: Literal["locust", "perf_analyzer"]
    protocol: Protocol
    loop: Literal["open", "closed"]
    level: float = Field(gt=0)
    """Requests a second of an open loop, users of a closed one."""
    texts: TextKind = "imdb"
    batch_size: int = Field(default=1, ge=1, le=64)
    """Reviews in each request."""
    warmup_s: float = Field(ge=0)
    duration_s: float = Field(gt=0)
    probe: bool = False
    """A step of a search, which goes beyond what the service can do: requests may fail there."""

    @model_validator(mode="after")
    def _has_arrivals(self) -> "Load":
        if self.loop == "open" and round(self.level * self.duration_s) < 1:
            raise ValueError(f"{self.level:g} requests/s for {self.duration_s:g} s are no request: raise one of them")
        return self

    @property
    def sent(self) -> tuple[Any, ...]:
        """What is sent and when: tools that agree in it have the same load, and the same arrivals in an open loop."""
        length_s = self.duration_s if self.loop == "open" else None
        return self.protocol, self.loop, self.texts, self.batch_size, self.level, length_s

    @property
    def kind(self) -> tuple[Protocol, TextKind, int]:
        """What its requests are; measurements of one kind can stand on one plot."""
        return self.protocol, self.texts, self.batch_size


class _Stage(_Section):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    protocol: Protocol
    texts: TextKind = "imdb"
    batch_size: int = Field(default=1, ge=1, le=64)


class LoadStage(_Stage):
    """One kind of load at each of `rates_per_s` (open loop) or of `users` (closed loop)."""

    tool: Literal["locust", "perf_analyzer"]
    rates_per_s: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)] | None = None
    users: Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=1)] | None = None
    warmup_s: float | None = Field(default=None, ge=0)
    """Locust's alone, which needs it: perf_analyzer has no warm-up."""
    duration_s: float = Field(gt=0)
    gate: bool = False
    """Whether each of these runs must keep the limits."""

    @model_validator(mode="after")
    def _consistent(self) -> "LoadStage":
        if (self.rates_per_s is None) == (self.users is None):
            raise ValueError("expected either rates_per_s (open loop) or users (closed loop)")
        if self.tool == "perf_analyzer" and self.protocol == "generate":
            raise ValueError("perf_analyzer speaks grpc and infer only")
        if self.tool == "perf_analyzer" and self.warmup_s is not None:
            raise ValueError("perf_analyzer has no warm-up: leave warmup_s out")
        if self.tool == "locust" and self.warmup_s is None:
            raise ValueError("warmup_s is missing, which locust needs")
        return self

    def loads(self) -> Iterator[Load]:
        """Yields one measurement for each level."""
        for level in self.rates_per_s or self.users or []:
            yield Load(
                loop="open" if self.rates_per_s else "closed",
                level=level,
                warmup_s=self.warmup_s or 0,
                **{key: getattr(self, key) for key in ("tool", "protocol", "texts", "batch_size", "duration_s")},
            )


class SearchStage(_Stage):
    """The search for the highest rate of an open Locust loop that keeps the limits for `duration_s`."""

    tool: Literal["search"]
    duration_s: float = Field(gt=0)
    probe_s: float = Field(default=20, gt=0)
    """Least length of the runs that find out which rates to try for `duration_s`."""
    warmup_s: float = Field(default=5, ge=0)
    precision_percent: float = Field(default=5, gt=0)
    """By which the rate is lowered where none of the runs of `duration_s` held."""


class Profile(_Section):
    """Stages that run one after the other."""

    about: str
    max_memory_growth_percent: float | None = Field(default=None, gt=0)
    """Limit of each server process's growth, from two minutes after the start to the end."""
    stages: list[Annotated[LoadStage | SearchStage, Field(discriminator="tool")]] = Field(min_length=1)

    @model_validator(mode="after")
    def _unique(self) -> "Profile":
        levels = [(s.name, load.level) for s in self.stages if isinstance(s, LoadStage) for load in s.loads()]
        names = [*levels, *((s.name, 0.0) for s in self.stages if isinstance(s, SearchStage))]
        twice = sorted({f"{name}-{level:g}" for name, level in names if names.count((name, level)) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} would be measured twice, into the same raw file: give stages names")
        return self

    def at_rate(self, rate_per_s: float) -> "Profile":
        """Returns the profile with its gated open loops at `rate_per_s` requests a second.

        Raises:
            ProfileError: it has none, or the rate is not positive or so low that no request comes.
        """
        gated = [isinstance(stage, LoadStage) and stage.gate and bool(stage.rates_per_s) for stage in self.stages]
        if not any(gated) or not rate_per_s > 0:
            raise ProfileError(f"rate {rate_per_s:g}: expected a positive one, and a profile with a gated open loop")
        change = {"rates_per_s": [rate_per_s]}
        pairs = zip(self.stages, gated, strict=True)
        changed = self.model_copy(update={"stages": [s.model_copy(update=change) if g else s for s, g in pairs]})
        try:
            return Profile.model_validate(changed.model_dump())
        except ValidationError as error:
            problems = "; ".join(_describe(problem) for problem in error.errors())
            raise ProfileError(f"rate {rate_per_s:g}: {problems}") from error


class Profiles(_Section):
    """The whole file."""

    limits: Limits
    validity: Validity
    profiles: dict[str, Profile]

    def of_run(self, name: str, profile: Profile) -> "Profiles":
        """Returns these limits with the one profile that is run, as it is run: what the run is judged by for ever."""
        return self.model_copy(update={"profiles": {name: profile}})

    def profile(self, name: str) -> Profile:
        """Returns the profile called `name`.

        Raises:
            ProfileError: there is none.
        """
        if name not in self.profiles:
            raise ProfileError(f"no profile {name!r}; there are: {', '.join(self.profiles)}")
        return self.profiles[name]


_SECTIONS: tuple[type[BaseModel], ...] = (Profiles, Limits, Validity, Profile, LoadStage, SearchStage)


def load(path: Path = PROFILES_FILE) -> Profiles:
    """Reads the profiles in the YAML file at `path`.

    Raises:
        ProfileError: no such file, broken YAML, or keys and values that do not validate; names every wrong key at once.
    """
    try:
        return Profiles.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ProfileError(f"{path}: {error.strerror}, expected a profile file as {PROFILES_FILE}") from error
    except yaml.YAMLError as error:
        raise ProfileError(f"{path}: {error}") from error
    except ValidationError as error:
        problems = "\n  ".join(_describe(problem) for problem in error.errors())
        raise ProfileError(f"{path}:\n  {problems}") from error


def _describe(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = sorted({name for section in _SECTIONS for name in section.model_fields})
        nearest = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        return f"unknown key {key!r}" + (
            f"; did you mean {nearest[0]!r}?" if nearest else f"; known: {', '.join(known)}"
        )
    if error["type"] == "missing":
        return f"key {key!r} is missing"
    return f"key {key!r}: {error['msg']}, got {error['input']!r}"
