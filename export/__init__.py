"""From a fine-tuned checkpoint to the ONNX files that are served, through a parity gate, into the model repository."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before onnxruntime is imported, which reads it once
