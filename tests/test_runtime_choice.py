"""Which runtime the classifier takes on which CPU. That either serves: tests/test_serving_options.py."""

from pathlib import Path

import pytest

from model_repository.classifier import engine
from model_repository.classifier.engine import ONNXRUNTIME, OPENVINO, choose


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        pytest.param("fpu avx2 avx512f avx512_vnni", OPENVINO, id="x86 with AVX-512"),
        pytest.param("fpu avx2 avx_vnni", OPENVINO, id="x86 without AVX-512"),
        pytest.param("fpu avx2 avx512f amx_int8", OPENVINO, id="x86 with tiles"),
        pytest.param("fp asimd asimddp", OPENVINO, id="ARM"),
        pytest.param("fpu avx2 fma", ONNXRUNTIME, id="AVX2 alone"),
        pytest.param("fpu avx2 avx512f avx512bw", ONNXRUNTIME, id="the first AVX-512"),
        pytest.param("", OPENVINO, id="unknown"),
    ],
)
def test_cpu_decides(flags: str, expected: str) -> None:
    assert choose(cpu_flags=flags.split()) == expected


def test_name_decides_where_one_is_given() -> None:
    assert choose(OPENVINO, ["avx2"]) == OPENVINO
    assert choose(ONNXRUNTIME, ["avx512_vnni"]) == ONNXRUNTIME
    with pytest.raises(ValueError, match="expected one of auto, openvino, onnxruntime"):
        choose("onnx", ["avx2"])


def test_unreadable_cpu_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engine, "Path", lambda _: tmp_path / "none")
    assert choose() == OPENVINO
