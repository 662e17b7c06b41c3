"""Puts a built engine beside its configuration. Its manifest goes first and comes last: none, no engine."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.engine_manifest import ENGINE_FILE, LABELS_FILE, engine_manifest_path
from export.repository import MODEL_FILE, TOKENIZER_FILE, describe


def install_engine(
    plan_file: Path, labels: bytes, facts: Mapping[str, Any], repository: Path, labels_repository: Path
) -> dict[str, Any]:
    """Installs the engine and its label graph and returns the manifest written: `facts` and each file's sha256.

    A kill at any point leaves the old engine, the new one, or none that is served, never a mixture.
    """
    manifest_path = engine_manifest_path(repository)
    manifest_path.unlink(missing_ok=True)
    engine, label_graph = repository / ENGINE_FILE, labels_repository / LABELS_FILE
    for file in (engine, label_graph):
        file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(plan_file, engine)
    label_graph.write_bytes(labels)
    files = {ENGINE_FILE: engine, LABELS_FILE: label_graph}
    files |= {name: repository / name for name in (TOKENIZER_FILE, MODEL_FILE)}  # whoever installs others needs another
    manifest = {**facts, "files": {name: describe(file) for name, file in files.items()}}
    staged = manifest_path.with_name("engine.json.installing")
    staged.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    os.replace(staged, manifest_path)
    return manifest
