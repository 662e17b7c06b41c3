"""One interface over checkpoint, ONNX file and running server: the same reviews give the same figures."""

import json
import shutil
from pathlib import Path

import client_standins
import onnx
import pytest
from client_standins import Script, stand_in
from serving import Server

from training import evaluate

REVIEWS = Path(__file__).resolve().parent.parent / "training" / "configs" / "smoke_reviews.csv"


def evaluate_json(model: Path | str, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, object]:
    """Returns the last line that `python -m training.evaluate` prints, parsed."""
    assert evaluate.main(["--model-path", str(model), *options]) == 0
    result: dict[str, object] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def test_checkpoint_onnx_and_server_score_alike(
    tiny_checkpoint: Path, tiny_onnx: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(tiny_checkpoint / "tokenizer.json", tiny_onnx.parent)
    models = (tiny_checkpoint, tiny_onnx, server.grpc_url, server.http_url)
    checkpoint, *others = (evaluate_json(model, capsys, "--data", str(REVIEWS))["metrics"] for model in models)
    assert isinstance(checkpoint, dict)
    assert 0 < checkpoint["accuracy"] < 1, "a model that always says the same proves nothing"
    for other in others:
        assert isinstance(other, dict)
        assert other.pop("loss") == pytest.approx(checkpoint["loss"], abs=1e-4)
        assert other == {name: value for name, value in checkpoint.items() if name != "loss"}


def test_examples_are_labelled_by_a_running_server(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    answers = evaluate_json(server.grpc_url, capsys, "--examples", "Amazing movie!", "Terrible film.")["examples"]
    assert isinstance(answers, list)
    assert [answer["review"] for answer in answers] == ["Amazing movie!", "Terrible film."]
    assert {answer["label"] for answer in answers} <= {"negative", "positive"}


def test_a_server_that_is_not_there_is_an_error_with_its_url(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--model-path", "grpc://127.0.0.1:1", "--examples", "fine"]) == 2
    assert "127.0.0.1:1" in capsys.readouterr().err


def test_a_server_whose_labels_have_another_order_is_an_error_that_names_the_remedy(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--model-path", server.grpc_url, "--examples", "Amazing movie!"]
    assert evaluate.main([*asked, "--labels", "positive", "negative"]) == 2
    output = capsys.readouterr()
    assert f"{server.grpc_url} answers '" in output.err
    assert "by the order ['positive', 'negative']: pass --labels" in output.err
    assert not output.out
    assert evaluate.main([*asked, "--labels", "negative", "neutral", "positive"]) == 2
    assert "expected one for each of ['negative', 'neutral', 'positive']" in capsys.readouterr().err


def test_a_server_whose_labels_are_spelt_otherwise_is_scored_once_they_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spelt_otherwise(review: bytes) -> client_standins.Row:
        odds, label, score = row(review)
        return odds, {"negative": "rotten", "positive": "fresh"}[label], score

    row = client_standins._row
    monkeypatch.setattr(client_standins, "_row", spelt_otherwise)
    monkeypatch.setattr(client_standins, "MODEL", "sentiment")
    reviews = tmp_path / "reviews.csv"
    reviews.write_text("text,label\ngood 17,fresh\nbad 80,rotten\n")
    with stand_in("grpc", Script()) as url:
        assert evaluate.main(["--model-path", url, "--examples", "good 17"]) == 2
        assert "answers 'fresh'" in capsys.readouterr().err
        scored = evaluate_json(url, capsys, "--data", str(reviews), "--labels", "rotten", "fresh")["metrics"]
        assert isinstance(scored, dict)
        assert scored["accuracy"] == 1
        reviews.write_text("text,label\ngood 17,up\nbad 80,down\n")  # the data's names need not be the model's
        scored = evaluate_json(url, capsys, "--data", str(reviews), "--labels", "down", "up")["metrics"]
        assert isinstance(scored, dict)
        assert scored["accuracy"] == 1


def test_an_onnx_file_without_a_tokenizer_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lonely = tmp_path / "a" / "b" / "model.onnx"
    lonely.parent.mkdir(parents=True)
    lonely.touch()
    assert evaluate.main(["--model-path", str(lonely), "--examples", "fine"]) == 2
    assert "tokenizer.json" in capsys.readouterr().err


def test_labels_are_the_models_own_and_columns_can_be_named(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reviews = tmp_path / "reviews.csv"
    reviews.write_text("body,verdict\na good film,positive\na bad film,negative\n")
    named = ["--data", str(reviews), "--text-column", "body", "--label-column", "verdict"]
    assert evaluate_json(tiny_checkpoint, capsys, *named)["split"] is None
    reviews.write_text("body,verdict\na good film,fresh\na bad film,rotten\n")
    assert evaluate.main(["--model-path", str(tiny_checkpoint), *named]) == 2
    assert "['negative', 'positive']" in capsys.readouterr().err
    assert evaluate_json(tiny_checkpoint, capsys, *named, "--labels", "rotten", "fresh")["split"] is None


def test_a_split_that_is_not_there_is_refused_and_the_result_names_the_one_scored(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, count in (("train", 4), ("test", 2)):
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "a good film,1\na bad film,0\n" * (count // 2))
    command = ["--model-path", str(tiny_checkpoint), "--data", str(tmp_path)]
    assert evaluate.main([*command, "--split", "validation"]) == 2
    assert "no split 'validation'; there are: train, test" in capsys.readouterr().err
    assert evaluate.main(command) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["split"], result["metrics"]["num_reviews"]) == ("test", 2)
    assert evaluate.main(["--model-path", str(tiny_checkpoint), "--data", str(tmp_path / "train.csv")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["split"] is None
    (tmp_path / "test.csv").unlink()
    assert evaluate.main(command) == 2  # the training reviews are not scored unasked
    assert "no split 'test'; there are: train" in capsys.readouterr().err
    (tmp_path / "validation.csv").write_text("text,label\na good film,1\n")
    assert (
        evaluate_json(tiny_checkpoint, capsys, "--data", str(tmp_path), "--split", "validation")["split"]
        == "validation"
    )


def test_a_url_without_a_port_and_a_checkpoint_without_tokenizer_are_told(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(["--model-path", "grpc://127.0.0.1", "--examples", "fine"]) == 2
    assert "lacks a host or a port" in capsys.readouterr().err
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    (copy / "tokenizer.json").unlink()
    assert evaluate.main(["--model-path", str(copy), "--examples", "fine"]) == 2
    assert f"{copy / 'tokenizer.json'}: no such file" in capsys.readouterr().err


def test_an_onnx_file_that_does_not_say_its_labels_is_told(
    tiny_onnx: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = onnx.load(tiny_onnx)
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "model.onnx")
    shutil.copy(tiny_checkpoint / "tokenizer.json", tmp_path)
    assert evaluate.main(["--model-path", str(tmp_path / "model.onnx"), "--examples", "fine"]) == 2
    assert "does not say its labels: make it with `python -m export.onnx`" in capsys.readouterr().err


def test_a_model_that_was_cut_short_is_told(
    tiny_checkpoint: Path, tiny_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    (copy / "model.onnx").write_bytes(tiny_onnx.read_bytes()[:-8])
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    for model, message in (
        (copy, f"{weights} cannot be read (Error while"),
        (copy / "model.onnx", f"{copy / 'model.onnx'} is no ONNX file (Error parsing"),
    ):
        assert evaluate.main(["--model-path", str(model), "--examples", "fine"]) == 2
        assert f"training.evaluate: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["good"], "--labels good: expected at least two names, each once"),
        (["good", "good"], "--labels good good: expected at least two names, each once"),
        (["a", "b", "c"], "--labels a b c: expected a name for each label of the model: ['negative', 'positive']"),
    ],
)
def test_labels_that_cannot_be_the_models_are_refused(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], labels: list[str], message: str
) -> None:
    try:
        status = evaluate.main(["--model-path", str(tiny_checkpoint), "--data", str(REVIEWS), "--labels", *labels])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_the_result_goes_to_a_new_folder_too(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "result.json"
    result = evaluate_json(tiny_checkpoint, capsys, "--examples", "a good film", "--output-json", str(out))
    assert json.loads(out.read_text()) == result


@pytest.mark.parametrize("number", ["0", "-1", "many"])
def test_a_number_that_is_none_is_refused(
    tiny_checkpoint: Path, number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        evaluate.main(["--model-path", str(tiny_checkpoint), "--data", str(REVIEWS), "--limit", number])
    assert f"'{number}' came, expected a whole number, at least 1" in capsys.readouterr().err
