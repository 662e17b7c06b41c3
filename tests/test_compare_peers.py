"""The peers' servers: whether each imports in its own environment, and whether what they need is pinned."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks.compare.systems import CHECKOUT, SYSTEMS, default_machine

PEERS = {s.environment: s for s in SYSTEMS if not s.is_service}
REQUIREMENTS = sorted((CHECKOUT / "benchmarks" / "peers").glob("requirements-*.txt"))


@pytest.mark.parametrize("name", PEERS)
def test_server_of_peer_imports_in_its_environment(name: str) -> None:
    python = default_machine(1).python(PEERS[name])
    if not python.exists():
        pytest.skip(f"{python} is missing: make .venv-peer-{name}/.ready")
    module = f"benchmarks.peers.{name}_app"
    environ = {**os.environ, "PYTHONPATH": str(CHECKOUT), "PEER_ENGINE": "shipped", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run([python, "-c", f"import {module}"], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", PEERS)
def test_every_peer_has_requirements_and_a_target_that_makes_its_environment(name: str) -> None:
    assert CHECKOUT / "benchmarks" / "peers" / f"requirements-{name}.txt" in REQUIREMENTS
    assert re.search(rf"^PEERS := .*\b{name}\b", (CHECKOUT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("file", REQUIREMENTS, ids=lambda file: file.name)
def test_every_requirement_is_pinned_here_or_by_the_projects_constraints(file: Path) -> None:
    constraints = (CHECKOUT / "constraints.txt").read_text()
    for line in file.read_text().splitlines():
        if line and not line.startswith(("#", "-r ", "-c ")):
            assert "==" in line or re.search(rf"^{line}==", constraints, re.MULTILINE), line
