"""Runs reviews in groups of one width, on this instance's cores and on those of instances that have nothing to do."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from core_sharing import Cores
from crew import ALL, OWN, Crew
from engine import GROUP_TOKENS, Engine, shares_cores
from length_groups import length_groups, shapes, width_of

Ids = npt.NDArray[np.int64]
OUTPUTS = ("label", "score", "probabilities")


class Runner:
    """model.onnx for one instance."""

    def __init__(
        self,
        model_file: Path,
        runtime: str,
        max_group_tokens: int,
        num_threads: int,
        num_threads_alone: int,
        cores: Cores | None,
    ) -> None:
        """Opens `model_file` for `num_threads` threads and, where runtime and `cores` allow, for `num_threads_alone`.

        Raises:
            ValueError: fewer threads alone than in company, or a file without the limits of its inputs.
        """
        if num_threads_alone < num_threads:
            raise ValueError(
                f"num_threads_alone is {num_threads_alone}, expected at least num_threads, which is {num_threads}"
            )
        self._engine = Engine(model_file, num_threads, runtime)
        self.runtime = self._engine.runtime
        group_tokens = min(max_group_tokens, GROUP_TOKENS[self.runtime])
        self._grouping = (self._engine.max_tokens, group_tokens, self._engine.width_step)
        self._alone = self._engine
        self._crew: Crew | None = None
        if cores and num_threads_alone > num_threads and shares_cores(self.runtime):
            self._alone = Engine(model_file, num_threads_alone, runtime)
            self._crew = Crew(cores)

    def groups(self, lengths: Sequence[int]) -> list[tuple[int, list[int]]]:
        """Returns the width and the members of every group that reviews of `lengths` tokens run in, in their order."""
        engine = self._engine
        groups = [group for _, group in length_groups(lengths, *self._grouping)]
        longest = [max(lengths[index] for index in group) for group in groups]
        widths = [width_of(length, engine.max_tokens, engine.padding_step) for length in longest]
        return list(zip(widths, groups, strict=True))

    def prepare(self, max_length: int) -> None:
        """Runs every shape that reviews up to `max_length` tokens can have, or where none needs it the largest alone.

        A broken model fails here, memory is taken here, and no review waits for what only a first run does.
        """
        rectangles = list(shapes(max_length, *self._grouping))
        if not self._engine.prepares_each_shape:
            rectangles = [max(rectangles, key=lambda rectangle: rectangle[0] * rectangle[1])]
        for size, width in rectangles:
            self._infer(self._engine, [np.zeros(width, dtype=np.int64)] * size, width)
        if self._alone is not self._engine:
            self._infer(self._alone, [np.zeros(max_length, dtype=np.int64)], max_length)

    def each(
        self,
        count: int,
        is_alone: bool,
        is_busy: bool,
        infer: Callable[[int, str], Any],
        answer: Callable[[int, Any], None],
    ) -> None:
        """Calls `infer` for each of `count` groups, in turn or several at once, and `answer` with what it returns.

        `infer` takes the group's number and whose cores it has, which `run` wants to know. With `is_alone`, for one
        review that came by itself, it has all cores if no other instance runs. Groups do not: they are short reviews,
        which gain less from more threads than from running together. `is_busy`: `Crew.run`.
        """
        if self._crew:
            self._crew.run(count, is_alone, is_busy, infer, answer)
            return
        for number in range(count):
            answer(number, infer(number, OWN))

    def run(self, rows: Sequence[Ids], width: int, whose: str) -> list[npt.NDArray[Any]]:
        """Returns the outputs (n, ...), in the order of `OUTPUTS`, of `rows` as one rectangle of `width` tokens."""
        return self._infer(self._alone if whose == ALL else self._engine, rows, width)

    @staticmethod
    def _infer(engine: Engine, rows: Sequence[Ids], width: int) -> list[npt.NDArray[Any]]:
        input_ids = np.zeros((len(rows), width), dtype=np.int64)  # (n, width)
        attention_mask = np.zeros_like(input_ids)
        for index, row in enumerate(rows):
            input_ids[index, : len(row)] = row
            attention_mask[index, : len(row)] = 1
        return engine.run(OUTPUTS, {"input_ids": input_ids, "attention_mask": attention_mask})
