"""The JSON document that every command here ends its output with."""

import json
from typing import Any


def one_line(document: Any) -> str:
    """Returns `document` as one line of JSON, with null for what JSON has no number for (infinity, not a number)."""
    return json.dumps(_finite(document))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value
