"""Versions of what a system runs on, read in its own environment."""

import functools
import json
import subprocess
from pathlib import Path

PACKAGES = ("torch", "transformers", "tokenizers", "onnxruntime", "openvino", "numpy")
_FRAMEWORKS = {
    "serve": "nvidia-pytriton",
    "bentoml": "bentoml",
    "fastapi": "fastapi",
    "litserve": "litserve",
    "ray": "ray",
}
_CODE = """
import importlib.metadata as metadata, json, platform, sys
found = {"python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


@functools.cache  # systems share environments, and run.json is written twice
def of(python: Path, environment: str) -> dict[str, str]:
    """Returns the versions of Python, framework and engines in the environment of `python`; empty if there is none."""
    if not python.exists():
        return {}
    names = (_FRAMEWORKS.get(environment, environment), *PACKAGES)
    done = subprocess.run([python, "-c", _CODE, *names], capture_output=True, text=True, check=True)
    versions: dict[str, str] = json.loads(done.stdout)
    return versions
