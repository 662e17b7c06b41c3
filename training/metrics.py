"""Quality of a binary or multi-class classifier from its logits: the same figures for training and evaluation."""

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support


def classification_metrics(
    log_probabilities: npt.NDArray[np.floating[Any]], labels: npt.NDArray[np.int64]
) -> dict[str, Any]:
    """Returns accuracy, precision, recall, F1, loss and the confusion matrix.

    Args:
        log_probabilities: (N, C) log-probabilities, or logits (normalised here).
        labels: (N,) class ids. With two classes precision, recall and F1 are those of class 1, else macro averages.
    """
    normalised = log_softmax(log_probabilities.astype(np.float64), axis=-1)  # (N, C)
    predicted = normalised.argmax(axis=-1)  # (N,)
    num_classes = normalised.shape[1]
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels, predicted, average="binary" if num_classes == 2 else "macro", zero_division=0.0
    )
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "loss": float(-normalised[np.arange(len(labels)), labels].mean()),
        "confusion": confusion_matrix(labels, predicted, labels=range(num_classes)).tolist(),
        "num_reviews": len(labels),
    }
