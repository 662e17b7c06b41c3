"""The rule by which the classifier's instances lend each other cores: locks between real processes and threads."""

import contextlib
import errno
import os
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model_repository.classifier import core_sharing
from model_repository.classifier.core_sharing import Cores
from model_repository.classifier.engine import ONNXRUNTIME, OPENVINO, Engine

CLASSIFIER = Path(__file__).resolve().parents[1] / "model_repository" / "classifier"
WAIT_S = 0.2
HOLDER = """
import sys, time
from pathlib import Path
from model_repository.classifier.core_sharing import Cores
with Cores([Path(file) for file in sys.argv[1:]], 0).taken(want_all=True) as has_all:
    print(has_all, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """A lock for each of two instances."""
    files = [tmp_path / "0", tmp_path / "1"]
    for file in files:
        file.touch()
    return files


@pytest.fixture
def pair(files: list[Path]) -> Iterator[tuple[Cores, Cores]]:
    """The cores as two instances see them."""
    pair = Cores(files, 0), Cores(files, 1)
    yield pair
    for cores in pair:
        cores.close()


@pytest.fixture
def crew(monkeypatch: pytest.MonkeyPatch, files: list[Path]) -> Any:
    """The crew of the first instance; its threads go on with its locks, which nobody closes."""
    monkeypatch.syspath_prepend(CLASSIFIER)  # Triton runs these files beside each other, in no package
    from crew import Crew

    return Crew(Cores(files, 0))


def test_who_is_alone_has_all_cores_if_it_wants_them(files: list[Path], pair: tuple[Cores, Cores]) -> None:
    for want_all in (True, False, True):
        with pair[0].taken(want_all) as has_all:
            assert has_all == want_all
    assert [file.read_bytes() for file in files] == [b"", b""]


def test_in_company_each_has_its_own_and_nobody_waits(pair: tuple[Cores, Cores]) -> None:
    first, second = pair
    with first.taken(want_all=False), second.taken(want_all=True) as has_all:
        assert not has_all
    with second.taken(want_all=True) as has_all:
        assert has_all


def test_who_comes_during_a_run_on_all_cores_waits_for_it_and_has_its_own(pair: tuple[Cores, Cores]) -> None:
    first, second = pair
    got: list[bool] = []

    def come() -> None:
        with second.taken(want_all=True) as has_all:
            got.append(has_all)

    coming = threading.Thread(target=come)
    with first.taken(want_all=True):
        coming.start()
        coming.join(WAIT_S)
        assert got == []
    coming.join()
    assert got == [False]


@pytest.mark.parametrize("idle_s", [0.0, 0.01])
def test_cores_are_lent_while_their_instance_idles_and_it_waits_for_them(
    pair: tuple[Cores, Cores], idle_s: float
) -> None:
    first, second = pair
    back = threading.Event()

    def come() -> None:
        with second.taken(want_all=False):
            back.set()

    coming = threading.Thread(target=come)
    with first.lent(1, idle_s) as is_lent:
        assert is_lent
        with first.taken(want_all=True) as has_all:
            assert not has_all  # its own are free, those that it lent to itself are not
        coming.start()
        assert not back.wait(WAIT_S)
    assert back.wait(60)
    coming.join()


@pytest.fixture
def idling(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Set once a borrower has seen cores free and looks whether they stay so; and to be set to let it look again."""
    looks, look_again = threading.Event(), threading.Event()

    def sleep(seconds: float) -> None:
        looks.set()
        look_again.wait(60)

    monkeypatch.setattr(core_sharing, "time", types.SimpleNamespace(sleep=sleep))
    yield looks, look_again
    look_again.set()


def test_instance_that_is_back_before_its_cores_count_as_idle_keeps_them(
    pair: tuple[Cores, Cores], idling: tuple[threading.Event, threading.Event]
) -> None:
    first, second = pair
    looks, look_again = idling
    got: list[bool] = []

    def borrow() -> None:
        with first.lent(1, WAIT_S) as is_lent:
            got.append(is_lent)

    borrowing = threading.Thread(target=borrow)
    borrowing.start()
    assert looks.wait(60)
    with second.taken(want_all=False):
        look_again.set()
        borrowing.join(60)
    assert got == [False]


def test_process_that_is_killed_frees_its_cores(files: list[Path], pair: tuple[Cores, Cores]) -> None:
    root = CLASSIFIER.parents[1]
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, *map(str, files)], stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert holder.stdout
    assert holder.stdout.readline() == "True\n"
    holder.kill()
    holder.wait()
    with pair[0].taken(want_all=True) as has_all:
        assert has_all


def test_instances_of_one_server_share_their_locks_and_those_of_another_do_not() -> None:
    ask = "\n".join(
        (
            "from model_repository.classifier.core_sharing import Cores",
            "with Cores.of_server(1, 2).taken(want_all=True) as has_all: print(has_all)",
        )
    )
    through = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ask!r}], check=True)"

    def said(code: str) -> str:
        root = CLASSIFIER.parents[1]
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True).stdout

    mine = Cores([Path("/proc") / str(os.getpid()) / entry for entry in ("stat", "statm")], 0)
    with mine.taken(want_all=False):
        assert said(ask) == "False\n"
        assert said(through) == "True\n"  # its parent is another process
    assert said(ask) == "True\n"
    mine.close()


def test_what_cannot_be_locked_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        Cores([tmp_path / "nowhere"], 0)
    with pytest.raises(OSError, match="100 instances came, at most"):
        Cores.of_server(0, 100)


def test_groups_run_on_own_and_lent_cores_at_once_and_each_once(crew: Any) -> None:
    both = threading.Barrier(2)  # broken unless two run at once
    begun: list[int] = []
    answered: dict[int, str] = {}

    def infer(number: int, whose: str) -> str:
        begun.append(number)
        if number < 2:
            both.wait(60)
        return whose

    crew.run(6, False, False, infer, answered.__setitem__)
    assert begun[2:] == [2, 3, 4, 5]
    assert sorted(answered) == [0, 1, 2, 3, 4, 5]
    assert {answered[0], answered[1]} == {"own", "lent"}


def test_while_the_other_instance_runs_all_groups_run_on_own_cores(crew: Any, pair: tuple[Cores, Cores]) -> None:
    answered: dict[int, str] = {}
    for is_busy in (False, True):
        with pair[1].taken(want_all=False):
            crew.run(3, False, is_busy, lambda number, whose: whose, answered.__setitem__)
        assert answered == dict.fromkeys(range(3), "own")


def test_a_busy_servers_instance_is_not_deprived_of_its_cores_between_two_executions(
    crew: Any, pair: tuple[Cores, Cores], idling: tuple[threading.Event, threading.Event]
) -> None:
    looks, look_again = idling
    answered: dict[int, str] = {}
    running, go_on = threading.Event(), threading.Event()

    def infer(number: int, whose: str) -> str:
        running.set()
        assert go_on.wait(60)
        return whose

    work = threading.Thread(target=crew.run, args=(2, False, True, infer, answered.__setitem__))
    with pair[1].taken(want_all=False):
        work.start()
        assert running.wait(60)
    assert looks.wait(60)
    with pair[1].taken(want_all=False):
        look_again.set()
        go_on.set()
        work.join(60)
    assert answered == {0: "own", 1: "own"}


def test_what_a_group_raises_is_raised_when_all_have_ended(crew: Any) -> None:
    answered: dict[int, str] = {}

    def infer(number: int, whose: str) -> str:
        if number == 1:
            raise RuntimeError("broken")
        return whose

    with pytest.raises(RuntimeError, match="broken"):
        crew.run(3, False, False, infer, answered.__setitem__)
    assert sorted(answered) == [0, 2]
    crew.run(1, True, False, lambda number, whose: whose, answered.__setitem__)
    assert answered[0] == "all"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_cores_that_cannot_be_borrowed_are_done_without(crew: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()

    @contextlib.contextmanager
    def locked(*_: object) -> Iterator[bool]:
        asked.set()
        raise OSError(errno.ENOLCK, "no locks available")
        yield False

    def infer(number: int, whose: str) -> str:
        assert asked.wait(60)  # until the thread that would borrow cores has tried
        return whose

    monkeypatch.setattr(crew._cores, "lent", locked)
    borrower = [thread for thread in threading.enumerate() if thread.name == "on cores 1"][-1]
    answered: dict[int, str] = {}
    crew.run(3, False, False, infer, answered.__setitem__)
    assert answered == dict.fromkeys(range(3), "own")
    borrower.join(60)
    assert not borrower.is_alive(), "it goes on asking"
    crew.run(3, False, False, infer, answered.__setitem__)


def test_fewer_threads_alone_than_in_company_are_refused(monkeypatch: pytest.MonkeyPatch, tiny_onnx: Path) -> None:
    monkeypatch.syspath_prepend(CLASSIFIER)
    from runner import Runner

    with pytest.raises(ValueError, match="num_threads_alone is 1, expected at least num_threads, which is 2"):
        Runner(tiny_onnx, ONNXRUNTIME, 640, num_threads=2, num_threads_alone=1, cores=None)


@pytest.mark.parametrize(("runtime", "expected"), [(ONNXRUNTIME, "all"), (OPENVINO, "own")])
def test_lone_review_runs_on_all_cores_where_the_runtime_shares_them(
    monkeypatch: pytest.MonkeyPatch, files: list[Path], tiny_onnx: Path, runtime: str, expected: str
) -> None:
    monkeypatch.syspath_prepend(CLASSIFIER)
    from runner import Runner

    runner = Runner(tiny_onnx, runtime, 640, num_threads=1, num_threads_alone=2, cores=Cores(files, 0))
    row = np.full(12, 5, dtype=np.int64)
    ran: dict[str, Any] = {}

    def infer(number: int, whose: str) -> Any:
        ran[whose] = runner.run([row], 12, whose)[2]  # probabilities
        return ran[whose]

    for is_alone in (True, False):
        runner.each(1, is_alone, False, infer, lambda number, result: None)
    assert set(ran) == {"own", expected}
    np.testing.assert_allclose(ran["own"], ran[expected], atol=1e-5)


def test_engine_leaves_the_cores_to_others_between_two_runs(tiny_onnx: Path) -> None:
    engine = Engine(tiny_onnx, 2, ONNXRUNTIME)
    ids = np.full((1, 60), 5, dtype=np.int64)
    engine.run(["label"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    busy_s = time.process_time()  # of all threads
    time.sleep(WAIT_S)
    assert time.process_time() - busy_s < WAIT_S / 10  # threads that spin on after a run: 40 to 60 ms


@pytest.mark.parametrize(("runtime", "expected"), [(ONNXRUNTIME, 2), (OPENVINO, 1)])
def test_long_reviews_wait_for_each_other_only_where_they_gain_by_it(
    monkeypatch: pytest.MonkeyPatch, tiny_onnx: Path, runtime: str, expected: int
) -> None:
    monkeypatch.syspath_prepend(CLASSIFIER)
    from runner import Runner

    runner = Runner(tiny_onnx, runtime, 640, num_threads=1, num_threads_alone=1, cores=None)
    assert len(runner.groups([160, 160])) == expected
    assert len(runner.groups([16, 16])) == 1


@pytest.mark.parametrize(
    ("runtime", "expected"), [(ONNXRUNTIME, [(11, [0, 1]), (61, [2])]), (OPENVINO, [(16, [0, 1]), (64, [2])])]
)
def test_lone_review_has_no_padding_where_no_shape_must_be_prepared(
    monkeypatch: pytest.MonkeyPatch, tiny_onnx: Path, runtime: str, expected: list[tuple[int, list[int]]]
) -> None:
    monkeypatch.syspath_prepend(CLASSIFIER)
    from runner import Runner

    runner = Runner(tiny_onnx, runtime, 640, num_threads=1, num_threads_alone=1, cores=None)
    assert runner.groups([11, 10, 61]) == expected
