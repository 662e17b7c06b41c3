"""The model behind every peer: the fp32 checkpoint with torch, or what this service ships, on its engine.

Frameworks start their workers each in their own way, so that settings travel in environment variables:

    PEER_ENGINE       torch | torch-dropping | shipped
    PEER_CHECKPOINT   folder of the checkpoint, for torch
    PEER_WORKERS      workers of a batching peer, each with a model of its own
    PEER_THREADS      threads that inference may use in each of them

With torch the checkpoint is what transformers' own classes make of it. These know nothing of dropping tokens and keep
all, so that a checkpoint which drops some does the whole work there; torch-dropping, of the pipeline alone, drops them.

Every answer is {"label": "negative" | "positive", "score": its probability}.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

from typing_extensions import TypedDict  # pydantic refuses the one of typing below Python 3.12

from model_repository.tokenizer.review_text import clean

MAX_BATCH_SIZE = 8
"""Reviews that a batching peer may merge. The LitServe and Ray Serve documentation use 8 in their examples."""
MAX_WAIT_S = 0.01
"""How long a batching peer waits for company: the default of Ray Serve, whose documentation asks for the limit of
the latency less the time of a batch at most. On two cores a batch of long reviews leaves nothing of 200 ms."""


class Answer(TypedDict):
    """What a peer says about one review."""

    label: str
    score: float


Classify = Callable[[Sequence[str]], list[Answer]]
"""Reviews in, an answer for each out; they are padded to the longest of them and run as one batch."""


def engine() -> str:
    """Returns $PEER_ENGINE; raises ValueError for another one than those above."""
    name = os.environ.get("PEER_ENGINE", "")
    if name not in ("torch", "torch-dropping", "shipped"):
        raise ValueError(f"PEER_ENGINE is {name!r}, expected torch, torch-dropping or shipped")
    return name


def num_workers() -> int:
    """Returns $PEER_WORKERS, by default 1."""
    return int(os.environ.get("PEER_WORKERS", 1))


def num_threads() -> int:
    """Returns $PEER_THREADS, by default the cores of this machine."""
    return int(os.environ.get("PEER_THREADS", os.cpu_count() or 1))


def load() -> Classify:
    """Returns the model that the environment asks for; call it once in each worker process."""
    if engine() == "torch-dropping":
        raise ValueError("PEER_ENGINE is torch-dropping, which the pipeline alone can do: expected torch or shipped")
    return _torch() if engine() == "torch" else _shipped()


def pipeline() -> Classify:
    """Returns transformers' text-classification pipeline over the checkpoint, which runs reviews one by one.

    Its documentation advises against batches on CPUs and where lengths vary.
    """
    import torch
    import transformers

    torch.set_num_threads(num_threads())
    folder = os.environ["PEER_CHECKPOINT"]
    model: Any = folder
    if engine() == "torch-dropping":
        from training.token_dropping import TokenDroppingClassifier

        model = TokenDroppingClassifier.from_pretrained(folder)
    pipe = transformers.pipeline("text-classification", model=model, tokenizer=folder, truncation=True)

    def classify(reviews: Sequence[str]) -> list[Answer]:
        return [Answer(label=a["label"], score=a["score"]) for a in pipe([clean(review) for review in reviews])]

    return classify


def _torch() -> Classify:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.set_num_threads(num_threads())
    folder = os.environ["PEER_CHECKPOINT"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()

    def classify(reviews: Sequence[str]) -> list[Answer]:
        batch = tokenizer([clean(r) for r in reviews], truncation=True, padding=True, return_tensors="pt")
        with torch.inference_mode():
            scores, indices = model(**batch).logits.softmax(dim=1).max(dim=1)  # (B,), (B,)
        labels = [model.config.id2label[index] for index in indices.tolist()]
        return [Answer(label=label, score=score) for label, score in zip(labels, scores.tolist(), strict=True)]

    return classify


def _shipped() -> Classify:
    from benchmarks.peers import shipped_engine

    encoder, infer = shipped_engine.open_encoder(), shipped_engine.open_engine(num_threads())

    def classify(reviews: Sequence[str]) -> list[Answer]:
        labels, scores = infer(encoder.encode(reviews))
        return [Answer(label=label, score=score) for label, score in zip(labels, scores, strict=True)]

    return classify
