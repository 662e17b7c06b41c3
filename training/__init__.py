"""Fine-tunes and scores the sentiment classifier: `python -m training.train`, `python -m training.evaluate`."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before onnxruntime is imported, which reads it once
