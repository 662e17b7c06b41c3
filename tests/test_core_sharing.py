"""The rule by which a classifier's instance takes the cores of the others: locks between real processes."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from model_repository.classifier.core_sharing import Cores
from model_repository.classifier.engine import ONNXRUNTIME, OPENVINO

CLASSIFIER = Path(__file__).resolve().parents[1] / "model_repository" / "classifier"
WAIT_S = 0.2
HOLDER = """
import sys, time
from pathlib import Path
from model_repository.classifier.core_sharing import Cores
with Cores(Path(sys.argv[1])).taken(want_all=True) as has_all:
    print(has_all, flush=True)
    time.sleep(60)
"""


def test_who_is_alone_has_all_cores_if_it_wants_them(tmp_path: Path) -> None:
    cores = Cores(tmp_path)
    for want_all in (True, False, True):
        with cores.taken(want_all) as has_all:
            assert has_all == want_all
    assert list(tmp_path.iterdir()) == []


def test_in_company_each_has_its_own_and_nobody_waits(tmp_path: Path) -> None:
    first, second = Cores(tmp_path), Cores(tmp_path)
    with first.taken(want_all=False), second.taken(want_all=True) as has_all:
        assert not has_all
    with second.taken(want_all=True) as has_all:
        assert has_all


def test_who_comes_during_a_run_on_all_cores_waits_for_it_and_has_its_own(tmp_path: Path) -> None:
    first, second = Cores(tmp_path), Cores(tmp_path)
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


def test_an_instance_may_open_the_lock_while_another_runs_on_all_cores(tmp_path: Path) -> None:
    with Cores(tmp_path).taken(want_all=True):
        Cores(tmp_path).close()


def test_process_that_is_killed_frees_its_cores(tmp_path: Path) -> None:
    root = CLASSIFIER.parents[1]
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert holder.stdout
    assert holder.stdout.readline() == "True\n"
    holder.kill()
    holder.wait()
    with Cores(tmp_path).taken(want_all=True) as has_all:
        assert has_all


def test_instances_of_one_server_share_a_lock_and_those_of_another_do_not() -> None:
    ask = "from model_repository.classifier.core_sharing import Cores\nprint(Cores.of_server()._take_all())"
    through = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ask!r}], check=True)"
    mine = Cores(Path("/proc") / str(os.getpid()))

    def said(code: str) -> str:
        root = CLASSIFIER.parents[1]
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True).stdout

    with mine.taken(want_all=True):
        assert said(ask) == "False\n"
        assert said(through) == "True\n"  # its parent is another process
    assert said(ask) == "True\n"


def test_folder_that_cannot_be_locked_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        Cores(tmp_path / "nowhere")


def test_fewer_threads_alone_than_in_company_are_refused(monkeypatch: pytest.MonkeyPatch, tiny_onnx: Path) -> None:
    monkeypatch.syspath_prepend(CLASSIFIER)  # Triton runs these files beside each other, in no package
    from runner import Runner

    with pytest.raises(ValueError, match="num_threads_alone is 1, expected at least num_threads, which is 2"):
        Runner(tiny_onnx, ONNXRUNTIME, 640, num_threads=2, num_threads_alone=1, cores=None)


@pytest.mark.parametrize(("runtime", "expected"), [(ONNXRUNTIME, 1), (OPENVINO, 0)])
def test_single_review_runs_on_all_cores_and_a_group_on_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_onnx: Path, runtime: str, expected: int
) -> None:
    monkeypatch.syspath_prepend(CLASSIFIER)
    import numpy as np
    from runner import Runner

    runner = Runner(tiny_onnx, runtime, 640, num_threads=1, num_threads_alone=2, cores=Cores(tmp_path))
    row = np.full(12, 5, dtype=np.int64)
    answers = {}
    for rows, may_take_all, on_all in (([row], True, expected), ([row], False, 0), ([row, row], True, 0)):
        answers[len(rows), may_take_all] = runner.run(rows, 12, may_take_all)[2][0]  # probabilities
        assert runner.take_reviews_on_all_cores() == on_all
    for other in answers.values():
        np.testing.assert_allclose(other, answers[1, True], atol=1e-5)


@pytest.mark.parametrize(("runtime", "expected"), [(ONNXRUNTIME, 2), (OPENVINO, 1)])
def test_long_reviews_wait_for_each_other_only_where_they_gain_by_it(
    monkeypatch: pytest.MonkeyPatch, tiny_onnx: Path, runtime: str, expected: int
) -> None:
    monkeypatch.syspath_prepend(CLASSIFIER)
    from runner import Runner

    runner = Runner(tiny_onnx, runtime, 640, num_threads=1, num_threads_alone=1, cores=None)
    assert len(runner.groups([160, 160])) == expected
    assert len(runner.groups([16, 16])) == 1
