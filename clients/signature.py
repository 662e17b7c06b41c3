"""What a sentiment model takes and gives, read from the server's own description of it.

Shapes: B reviews in one request, C classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from clients.errors import ModelContractError
from clients.prediction import Prediction

Rows: TypeAlias = Sequence[Sequence[Any]]
"""A tensor of two dimensions: its rows, and their elements."""


@dataclass(frozen=True)
class Signature:
    """Names and limits of one model, as its server states them.

    Attributes:
        model: the model's name.
        max_batch_size: most reviews in one request.
        text: name of the input, BYTES (B, 1).
        label, score, probabilities: names of the outputs, BYTES (B, 1), FP32 (B, 1) and FP32 (B, C).
    """

    model: str
    max_batch_size: int
    text: str
    label: str
    score: str
    probabilities: str

    @classmethod
    def read(cls, metadata: Mapping[str, Any], config: Mapping[str, Any]) -> "Signature":
        """Reads the KServe metadata and the Triton configuration of a model.

        Tensors are told apart by type and width, so a model may name them as it likes.

        Raises:
            ModelContractError: not one text in, and one string, one number and one row of numbers out.
        """
        max_batch_size = int(config.get("max_batch_size", 0))
        texts = _names(metadata["inputs"], "BYTES", wide=False)
        labels = _names(metadata["outputs"], "BYTES", wide=False)
        scores = _names(metadata["outputs"], "FP32", wide=False)
        rows = _names(metadata["outputs"], "FP32", wide=True)
        found = (len(metadata["inputs"]), len(texts), len(labels), len(scores), len(rows))
        if found != (1, 1, 1, 1, 1) or max_batch_size < 1:
            raise ModelContractError(
                f"model {metadata['name']!r} takes {_describe(metadata['inputs'])}, "
                f"gives {_describe(metadata['outputs'])} and has max_batch_size {max_batch_size}; expected one BYTES "
                "[-1,1] in, BYTES [-1,1], FP32 [-1,1] and FP32 [-1,C] out, and max_batch_size of at least 1: ask for "
                "the model `sentiment`"
            )
        return cls(str(metadata["name"]), max_batch_size, texts[0], labels[0], scores[0], rows[0])

    @property
    def outputs(self) -> tuple[str, str, str]:
        """Names of the outputs that a prediction is made of."""
        return self.label, self.score, self.probabilities

    def plain(self, reason: str) -> str:
        """Returns why a request of one review was refused, without the places Triton and the model name before it.

        They would mislead: row 0 of that request is another place in the caller's list.
        """
        return reason.removeprefix(f"in ensemble '{self.model}', ").removeprefix(f"{self.text}[0]: ")

    def predictions(self, tensors: Mapping[str, Rows], num_reviews: int) -> list[Prediction]:
        """Returns B predictions from the rows of the output tensors by name.

        Raises:
            ModelContractError: an output is missing or has another number of rows than there were reviews.
            TypeError, ValueError: a row of it is none, or not as wide as the model says.
        """
        columns = []
        for name in self.outputs:
            rows = tensors.get(name)
            if rows is None or len(rows) != num_reviews:
                came = "no rows" if rows is None else f"{len(rows)} rows"
                raise ModelContractError(
                    f"model {self.model!r} gave {came} as {name!r}, expected {num_reviews} rows: "
                    "look for errors in the server's log"
                )
            columns.append(rows)
        return [
            Prediction(label.decode() if isinstance(label, bytes) else str(label), score, tuple(probabilities))
            for (label,), (score,), probabilities in zip(*columns, strict=True)
        ]


def _names(tensors: Sequence[Mapping[str, Any]], datatype: str, *, wide: bool) -> list[str]:
    """Returns the names of the tensors of `datatype` [-1, 1], or, if `wide`, [-1, more than 1]."""
    return [
        str(tensor["name"])
        for tensor in tensors
        if tensor["datatype"] == datatype and len(tensor["shape"]) == 2 and (int(tensor["shape"][1]) != 1) == wide
    ]


def _describe(tensors: Sequence[Mapping[str, Any]]) -> str:
    return (
        ", ".join(f"{t['name']} {t['datatype']} [{','.join(str(d) for d in t['shape'])}]" for t in tensors) or "nothing"
    )
