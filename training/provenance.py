"""Where an artefact comes from: hashes, versions, git revision. Standard library only, so that serving can use it."""

import hashlib
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent


def sha256_file(path: Path) -> str:
    """Returns the hexadecimal sha256 of the file at `path`."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_texts(rows: Iterable[tuple[str, int]]) -> str:
    """Returns the sha256 of labelled reviews in order: what was read, whatever file format it came in."""
    digest = hashlib.sha256()
    for text, label in rows:
        digest.update(f"{label}\t{len(text)}\t{text}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def git_state() -> tuple[str | None, bool | None]:
    """Returns the checkout's commit and whether tracked files differ from it; None and None outside git."""
    try:
        git = ["git", "-C", str(_ROOT)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return None, None
    return commit, bool(changed)


def git_revision() -> str:
    """Returns the checkout's commit, with `+changes` where tracked files differ, or `unknown` outside git."""
    commit, has_changes = git_state()
    return "unknown" if commit is None else commit + ("+changes" if has_changes else "")


def versions(*packages: str) -> dict[str, str]:
    """Returns the installed version of each package that is there, and Python's own."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def utc_now() -> str:
    """Returns the time as an ISO 8601 string in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
