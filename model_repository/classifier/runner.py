"""Runs groups of reviews of one width on this instance's cores or, while the other instances idle, on all of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from core_sharing import Cores
from engine import GROUP_TOKENS, Engine, takes_all_cores
from length_groups import length_groups, shapes

Ids = npt.NDArray[np.int64]
OUTPUTS = ("label", "score", "probabilities")


class Runner:
    """model.onnx for one instance; one thread at a time may call it."""

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
        self._cores = cores
        self._alone: Engine | None = None
        if cores and num_threads_alone > num_threads and takes_all_cores(self.runtime):
            self._alone = Engine(model_file, num_threads_alone, runtime, spins=False)
        self._reviews_on_all_cores = 0

    def groups(self, lengths: Sequence[int]) -> list[tuple[int, list[int]]]:
        """Returns the width and the members of every group that reviews of `lengths` tokens run in, in their order."""
        return list(length_groups(lengths, *self._grouping))

    def prepare(self, max_length: int) -> None:
        """Runs every shape that reviews up to `max_length` tokens can have, or where none needs it the largest alone.

        A broken model fails here, memory is taken here, and no review waits for what only a first run does.
        """
        rectangles = list(shapes(max_length, *self._grouping))
        if not self._engine.prepares_each_shape:
            rectangles = [max(rectangles, key=lambda rectangle: rectangle[0] * rectangle[1])]
        for size, width in rectangles:
            self._infer(self._engine, [np.zeros(width, dtype=np.int64)] * size, width)
        if self._alone:
            self._infer(self._alone, [np.zeros(max_length, dtype=np.int64)], max_length)

    def run(self, rows: Sequence[Ids], width: int, may_take_all: bool) -> list[npt.NDArray[Any]]:
        """Returns the outputs (n, ...), in the order of `OUTPUTS`, of `rows` as one rectangle of `width` tokens.

        A single review takes all cores if it `may_take_all` and no other instance runs. Groups do not: they are short
        reviews, which gain less from more threads than from running together.
        """
        if not self._alone or not self._cores:
            return self._infer(self._engine, rows, width)
        with self._cores.taken(may_take_all and len(rows) == 1) as has_all:
            outputs = self._infer(self._alone if has_all else self._engine, rows, width)
        self._reviews_on_all_cores += has_all
        return outputs

    def take_reviews_on_all_cores(self) -> int:
        """Returns how many reviews ran on all cores since the last call."""
        count, self._reviews_on_all_cores = self._reviews_on_all_cores, 0
        return count

    @staticmethod
    def _infer(engine: Engine, rows: Sequence[Ids], width: int) -> list[npt.NDArray[Any]]:
        input_ids = np.zeros((len(rows), width), dtype=np.int64)  # (n, width)
        attention_mask = np.zeros_like(input_ids)
        for index, row in enumerate(rows):
            input_ids[index, : len(row)] = row
            attention_mask[index, : len(row)] = 1
        return engine.run(OUTPUTS, {"input_ids": input_ids, "attention_mask": attention_mask})
