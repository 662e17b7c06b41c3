"""How the service is configured, read from its configuration: nothing here needs an engine."""

from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from export.repository import REPOSITORY
from model_repository.classifier.engine import choose, shares_cores

CLASSIFIER_CONFIG = REPOSITORY / "classifier" / "config.pbtxt"


def served_layout(config_file: Path = CLASSIFIER_CONFIG) -> tuple[int, int]:
    """Returns (instances, threads of each) of the classifier.

    Raises:
        ValueError: the configuration does not say.
    """
    config = _read(config_file)
    instances = sum(group.count for group in config.instance_group)
    if not instances or "num_threads" not in config.parameters:
        raise ValueError(f"{config_file}: expected instance groups with a count, and a parameter num_threads")
    return instances, int(config.parameters["num_threads"].string_value)


def lone_threads(config_file: Path = CLASSIFIER_CONFIG) -> int:
    """Returns the threads of a review that comes alone: of one instance, or of all where that runtime takes them."""
    parameters = _read(config_file).parameters
    alone = shares_cores(choose(parameters["runtime"].string_value))
    return int(parameters["num_threads_alone" if alone else "num_threads"].string_value)


def _read(config_file: Path) -> model_config_pb2.ModelConfig:
    return text_format.Parse(config_file.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
