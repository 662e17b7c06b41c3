"""The GPU path without the container: ONNX files alone, and the native configuration on the real server."""
