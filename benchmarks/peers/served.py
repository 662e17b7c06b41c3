"""How the service is configured, read from its configuration: nothing here needs an engine."""

from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

CLASSIFIER_CONFIG = Path(__file__).resolve().parents[2] / "model_repository" / "classifier" / "config.pbtxt"


def served_layout(config_file: Path = CLASSIFIER_CONFIG) -> tuple[int, int]:
    """Returns (instances, threads of each) of the classifier.

    Raises:
        ValueError: the configuration does not say.
    """
    config = text_format.Parse(config_file.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    instances = sum(group.count for group in config.instance_group)
    if not instances or "num_threads" not in config.parameters:
        raise ValueError(f"{config_file}: expected instance groups with a count, and a parameter num_threads")
    return instances, int(config.parameters["num_threads"].string_value)
