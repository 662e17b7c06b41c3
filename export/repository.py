"""The installed model files: what the manifest says of them, and how they are replaced without a torn moment.

`classifier/manifest.json` lists each installed file with its sha256 and size, and where the model came from.
`install` stages every file as `<name>.installing` beside its destination, then writes `manifest.json.installing`: that
one rename is the commit. Only then are the files moved over the old ones, the manifest last. `recover` completes a
committed installation and discards an uncommitted one, so after a kill at any point the old or the new set is there,
whole.

Standard library only: the server's launcher imports this file and must not need the export's packages.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent / "model_repository"
"""The model repository of this checkout."""

MODEL_FILE = "classifier/1/model.onnx"
"""The served classifier, relative to the repository."""

TOKENIZER_FILE = "tokenizer/1/tokenizer.json"
"""The served tokenizer with its truncation, relative to the repository."""

_REMEDY = "run `git checkout -- model_repository` for the shipped model, or `make export` to install your own"
_STAGED = ".installing"
_CHUNK_BYTES = 1 << 20
_FACTS = {"sha256", "bytes"}


class RepositoryError(ValueError):
    """The installed files are not what the manifest says; the message names the file and what to run."""


def manifest_path(repository: Path = REPOSITORY) -> Path:
    """Returns where the manifest of `repository` lies."""
    return repository / "classifier" / "manifest.json"


def describe(file: Path) -> dict[str, str | int]:
    """Returns the `sha256` (hex) and size in `bytes` of `file`, as the manifest records them."""
    digest = hashlib.sha256()
    num_bytes = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            num_bytes += len(chunk)
    return {"sha256": digest.hexdigest(), "bytes": num_bytes}


def verify(repository: Path = REPOSITORY) -> dict[str, Any]:
    """Checks each installed file against the manifest and returns the manifest.

    Raises:
        RepositoryError: the manifest or a file is missing or unreadable, or a file is not the one recorded.
    """
    path = manifest_path(repository)
    manifest = _read_manifest(path)
    for name in sorted({MODEL_FILE, TOKENIZER_FILE} | set(manifest["files"])):
        expected = manifest["files"].get(name)
        if expected is None:
            raise RepositoryError(f"{path} does not list {name}; {_REMEDY}")
        file = repository / name
        try:
            found = describe(file)
        except OSError as error:
            raise _unreadable(file, error) from error
        if found["sha256"] != expected["sha256"]:
            raise RepositoryError(
                f"{file} has sha256 {found['sha256']} ({found['bytes']:,} bytes), but {path} expects "
                f"{expected['sha256']} ({expected['bytes']:,} bytes); {_REMEDY}"
            )
    return manifest


def install(files: Mapping[str, Path], manifest: Mapping[str, Any], repository: Path = REPOSITORY) -> dict[str, Any]:
    """Replaces the installed set by `files`, all or nothing, and returns the manifest written.

    Args:
        files: where each file to install lies now, by its name relative to the repository; they are copied.
        manifest: what to record besides `files`, whose sha256 and sizes are added here.

    Raises:
        ValueError: `files` lacks the model or the tokenizer.
        OSError: a file could not be read or written; the set that was installed before is still whole (`recover`).
    """
    missing = {MODEL_FILE, TOKENIZER_FILE} - set(files)
    if missing:
        raise ValueError(
            f"files to install lack {', '.join(sorted(missing))}; got {', '.join(sorted(files)) or 'none'}"
        )
    with _locked(repository):
        _finish_interrupted(repository)
        described = {name: _stage(source, repository / name) for name, source in sorted(files.items())}
        complete = {**manifest, "files": described}
        _commit(complete, manifest_path(repository))
        _roll_forward(complete["files"], repository)
    return complete


def recover(repository: Path = REPOSITORY) -> None:
    """Completes an installation that was interrupted after its commit, and discards one interrupted before.

    Waits for an installation that is running. Without anything staged it changes nothing and needs no write access.

    Raises:
        RepositoryError: the commit marker is unreadable.
    """
    if any(repository.rglob("*" + _STAGED)):
        with _locked(repository):
            _finish_interrupted(repository)


def _finish_interrupted(repository: Path) -> None:
    marker = _staged(manifest_path(repository))
    if marker.exists():
        _roll_forward(_read_manifest(marker)["files"], repository)
    for stray in repository.rglob("*" + _STAGED):
        if stray.is_file():
            stray.unlink()


def _roll_forward(names: Mapping[str, Any], repository: Path) -> None:
    destinations = [repository / name for name in sorted(names)]
    for destination in [*destinations, manifest_path(repository)]:
        # Already moved when the interruption came during this very loop.
        if _staged(destination).exists():
            os.replace(_staged(destination), destination)
            _sync_directory(destination.parent)


def _stage(source: Path, destination: Path) -> dict[str, str | int]:
    destination.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as reader, _staged(destination).open("wb") as writer:
        while chunk := reader.read(_CHUNK_BYTES):
            writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())
    _sync_directory(destination.parent)
    return describe(_staged(destination))


def _commit(manifest: Mapping[str, Any], path: Path) -> None:
    # A kill halfway through writing must not look like a commit, hence the second name.
    unfinished = path.with_name("unfinished-" + path.name + _STAGED)
    with unfinished.open("w", encoding="utf-8") as writer:
        json.dump(manifest, writer, indent=2, sort_keys=True)
        writer.write("\n")
        writer.flush()
        os.fsync(writer.fileno())
    os.replace(unfinished, _staged(path))
    _sync_directory(path.parent)


def _unreadable(path: Path, error: OSError) -> RepositoryError:
    remedy = _REMEDY
    if isinstance(error, PermissionError):  # as in a container, whose user is not who cloned
        remedy = f"let user {os.getuid()} read it: run `chmod -R o+rX model_repository`"
    return RepositoryError(f"{path} cannot be read ({error.strerror}); {remedy}")


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:
        raise RepositoryError(f"{path} is not JSON ({error}); {_REMEDY}") from error
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(
        isinstance(each, dict) and each.keys() >= _FACTS for each in files.values()
    ):
        raise RepositoryError(f"{path} has no table `files` with bytes and sha256 of each; {_REMEDY}")
    return manifest


def _staged(destination: Path) -> Path:
    return destination.with_name(destination.name + _STAGED)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(repository: Path) -> Iterator[None]:
    # On the directory itself: no lock file among the models, and the kernel lets go when the process dies.
    descriptor = os.open(repository, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
