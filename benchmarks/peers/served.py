"""How the service is configured, read from its configuration: nothing here needs an engine."""

import re
from pathlib import Path

CLASSIFIER_CONFIG = Path(__file__).resolve().parents[2] / "model_repository" / "classifier" / "config.pbtxt"


def served_layout(config_file: Path = CLASSIFIER_CONFIG) -> tuple[int, int]:
    """Returns (instances, threads of each) of the classifier.

    Raises:
        ValueError: the configuration does not say.
    """
    text = config_file.read_text(encoding="utf-8")
    counts = re.findall(r"^\s*count: (\d+)", text, re.MULTILINE)  # of each instance group
    threads = re.search(r'key: "(?:intra_op_)?num_threads"\s*value: \{ string_value: "(\d+)"', text)
    if not counts or not threads:
        raise ValueError(f"{config_file}: expected `count: N` and a parameter num_threads")
    return sum(map(int, counts)), int(threads[1])
