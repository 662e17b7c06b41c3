"""From a fine-tuned checkpoint to the ONNX files that are served, through a parity gate, into the model repository."""
