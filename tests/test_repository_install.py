"""The installed model files: checked against their manifest, and replaced all or nothing whatever moment a kill comes.

Run: python -m pytest tests/test_repository_install.py
"""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export import repository as repo

CHECKOUT = Path(__file__).resolve().parent.parent


def sources(folder: Path, text: str) -> dict[str, Path]:
    """Writes a model and a tokenizer that differ by `text` and returns them under their installed names."""
    folder.mkdir(parents=True)
    files = {}
    for name in (repo.MODEL_FILE, repo.TOKENIZER_FILE):
        files[name] = folder / Path(name).name
        files[name].write_text(f"{name} {text}")
    return files


def installed_text(repository: Path) -> str:
    """Returns the text of the installed set after `recover`, having checked that it is whole."""
    repo.recover(repository)
    manifest = repo.verify(repository)
    texts = {(repository / name).read_text() for name in manifest["files"]}
    expected = str(manifest["precision"])
    assert texts == {f"{name} {expected}" for name in manifest["files"]}
    assert not list(repository.rglob("*.installing"))
    return expected


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "model_repository"
    folder.mkdir()
    repo.install(sources(tmp_path / "old", "old"), {"precision": "old"}, folder)
    return folder


def test_install_records_each_file_and_the_caller_s_facts(repository: Path) -> None:
    manifest = repo.verify(repository)
    assert manifest == json.loads(repo.manifest_path(repository).read_text())
    assert manifest["precision"] == "old"
    assert manifest["files"][repo.MODEL_FILE] == repo.describe(repository / repo.MODEL_FILE)
    assert set(manifest["files"]) == {repo.MODEL_FILE, repo.TOKENIZER_FILE}


class Interrupted(BaseException):
    """Stands for the kill: no `except Exception` may swallow it."""


def interrupt_at(call: int, monkeypatch: pytest.MonkeyPatch, after: bool) -> Callable[[], int]:
    """Makes the `call`-th system call that makes state durable raise, before or after its effect."""
    num_calls = 0

    def interrupting(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            if num_calls == call and not after:
                raise Interrupted
            result = real(*args)
            if num_calls == call:
                raise Interrupted
            return result

        return wrapper

    monkeypatch.setattr(os, "replace", interrupting(os.replace))
    monkeypatch.setattr(os, "fsync", interrupting(os.fsync))
    return lambda: num_calls


@pytest.mark.parametrize("after", [False, True], ids=["before_the_call", "after_the_call"])
def test_an_interruption_at_any_step_leaves_the_old_or_the_new_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    outcomes = []
    for call in range(1, 100):
        folder = tmp_path / str(call) / "model_repository"
        folder.mkdir(parents=True)
        repo.install(sources(folder.parent / "old", "old"), {"precision": "old"}, folder)
        files = sources(folder.parent / "new", "new")
        with monkeypatch.context() as patch:
            interrupt_at(call, patch, after)
            try:
                repo.install(files, {"precision": "new"}, folder)
                break
            except Interrupted:
                pass
        outcomes.append(installed_text(folder))
    assert len(outcomes) >= 8
    assert outcomes == sorted(outcomes, key=["old", "new"].index), "once committed, later steps cannot fall back"
    assert set(outcomes) == {"old", "new"}


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_recovery_that_is_itself_interrupted_can_be_repeated(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    files = sources(tmp_path / "new", "new")
    with monkeypatch.context() as patch:
        patch.setattr(repo, "_roll_forward", lambda *_: (_ for _ in ()).throw(Interrupted()))
        with pytest.raises(Interrupted):
            repo.install(files, {"precision": "new"}, repository)
    with monkeypatch.context() as patch:
        interrupt_at(call, patch, after=False)
        with pytest.raises(Interrupted):
            repo.recover(repository)
    assert installed_text(repository) == "new"


KILLED = """
import os, signal, sys
from pathlib import Path
from export import repository as repo

folder, new, call = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
count = 0

def killing(real):
    def wrapper(*args):
        global count
        count += 1
        if count == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)
    return wrapper

os.replace, os.fsync = killing(os.replace), killing(os.fsync)
files = {name: new / Path(name).name for name in (repo.MODEL_FILE, repo.TOKENIZER_FILE)}
repo.install(files, {"precision": "new"}, folder)
"""


@pytest.mark.parametrize(("call", "expected"), [(2, "old"), (5, "old"), (7, "new"), (9, "new")])
def test_a_killed_process_leaves_a_whole_set(repository: Path, tmp_path: Path, call: int, expected: str) -> None:
    sources(tmp_path / "new", "new")
    command = [sys.executable, "-c", KILLED, str(repository), str(tmp_path / "new"), str(call)]
    finished = subprocess.run(command, cwd=CHECKOUT, check=False, timeout=60)
    assert finished.returncode == -signal.SIGKILL
    assert installed_text(repository) == expected


def test_a_half_written_manifest_is_not_a_commit(repository: Path) -> None:
    repo.manifest_path(repository).with_name("unfinished-manifest.json.installing").write_text('{"files": {')
    (repository / (repo.MODEL_FILE + ".installing")).write_text("half a mod")
    assert installed_text(repository) == "old"


def test_installing_after_an_interruption_starts_clean(repository: Path, tmp_path: Path) -> None:
    (repository / "classifier" / "1" / "left-over.onnx.installing").write_text("stray")
    repo.install(sources(tmp_path / "new", "new"), {"precision": "new"}, repository)
    assert installed_text(repository) == "new"


def test_recover_waits_for_a_running_installation(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged, go_on = threading.Event(), threading.Event()
    commit = repo._commit

    def paused(manifest: Any, path: Path) -> None:
        staged.set()
        assert go_on.wait(30)
        commit(manifest, path)

    monkeypatch.setattr(repo, "_commit", paused)
    files = sources(tmp_path / "new", "new")
    installing = threading.Thread(target=repo.install, args=(files, {"precision": "new"}, repository))
    recovering = threading.Thread(target=repo.recover, args=(repository,))
    installing.start()
    assert staged.wait(30)
    recovering.start()
    recovering.join(0.2)
    assert recovering.is_alive(), "recover must not discard what a running installation has staged"
    go_on.set()
    installing.join(30)
    recovering.join(30)
    assert installed_text(repository) == "new"


def test_recover_without_anything_staged_touches_nothing(tmp_path: Path) -> None:
    repo.recover(tmp_path / "does not exist")


def test_verify_names_a_changed_file_with_both_sums_and_the_remedy(repository: Path) -> None:
    expected = repo.verify(repository)["files"][repo.MODEL_FILE]["sha256"]
    (repository / repo.MODEL_FILE).write_text("tampered")
    found = repo.describe(repository / repo.MODEL_FILE)["sha256"]
    with pytest.raises(repo.RepositoryError) as raised:
        repo.verify(repository)
    for part in (repo.MODEL_FILE, expected, found, "git checkout -- model_repository", "make export"):
        assert str(part) in str(raised.value)


@pytest.mark.parametrize("name", [repo.MODEL_FILE, repo.TOKENIZER_FILE, "classifier/manifest.json"])
def test_verify_names_a_missing_file(repository: Path, name: str) -> None:
    (repository / name).unlink()
    with pytest.raises(repo.RepositoryError, match=f"{name} cannot be read .*make export"):
        repo.verify(repository)


def test_verify_says_how_to_open_a_file_that_may_not_be_read(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def describe(path: Path) -> dict[str, Any]:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))  # root, who may run this, can read anything

    monkeypatch.setattr(repo, "describe", describe)
    with pytest.raises(repo.RepositoryError, match=r"Permission denied.*user \d+.*chmod -R o\+rX model_repository"):
        repo.verify(repository)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "has no table `files` with bytes and sha256 of each"),
        ('{"files": {"a": "b"}}', "has no table `files` with bytes and sha256 of each"),
        ('{"files": {}}', f"does not list {repo.MODEL_FILE}"),
    ],
    ids=["broken", "list", "names alone", "empty"],
)
def test_verify_says_what_is_wrong_with_the_manifest(repository: Path, text: str, message: str) -> None:
    repo.manifest_path(repository).write_text(text)
    with pytest.raises(repo.RepositoryError, match=message):
        repo.verify(repository)


def test_install_refuses_a_set_without_the_tokenizer(repository: Path, tmp_path: Path) -> None:
    files = sources(tmp_path / "new", "new")
    del files[repo.TOKENIZER_FILE]
    with pytest.raises(ValueError, match=repo.TOKENIZER_FILE):
        repo.install(files, {"precision": "new"}, repository)
    assert installed_text(repository) == "old"
