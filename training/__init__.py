"""Fine-tunes and scores the sentiment classifier: `python -m training.train`, `python -m training.evaluate`."""
