"""The smoke recipe, whole: what it writes, that it repeats itself, and that it survives a kill."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, DistilBertForSequenceClassification, TrainingArguments

from model_repository.tokenizer.review_text import ReviewEncoder
from training import evaluate, fit, train

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ROOT / "training" / "configs" / "smoke.yaml"


def run_smoke(artefacts: Path, *arguments: str) -> int:
    return train.main(["--config", str(SMOKE), "--artefacts", str(artefacts), *arguments])


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artefacts")
    assert run_smoke(folder) == 0
    return folder


def test_smoke_writes_what_it_promises(artefacts: Path) -> None:
    run = artefacts / "smoke"
    metrics = json.loads((run / "metrics_test.json").read_text())
    assert {"accuracy", "precision", "recall", "f1", "loss", "confusion"} <= metrics.keys()
    assert sum(map(sum, metrics["confusion"])) == metrics["num_reviews"] == 16
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["seed"] == 7
    assert manifest["metrics_test"] == metrics
    assert set(manifest["data"]["sha256"]) == {"train", "validation", "test"}
    assert {"versions", "git_revision", "wall_time_s"} <= manifest.keys()
    assert yaml.safe_load((run / "training_config.yaml").read_text())["tokens"]["max_length"] == 64
    assert "best on validation" in (artefacts / "logs" / "train.log").read_text()
    assert AutoConfig.from_pretrained(run).id2label == {0: "negative", 1: "positive"}
    assert AutoConfig.from_pretrained(run).architectures == ["DistilBertForSequenceClassification"]
    assert (run / "vocab.txt").is_file()
    assert not list(run.rglob("*.bin"))
    assert not list(run.rglob("*.pt"))


def test_training_tells_how_many_of_its_texts_are_also_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reviews = (ROOT / "training" / "configs" / "smoke_reviews.csv").read_text().splitlines()
    (tmp_path / "train.csv").write_text("\n".join(reviews) + "\n")
    (tmp_path / "test.csv").write_text("\n".join([reviews[0], "not seen,positive", *reviews[1:]]) + "\n")
    assert run_smoke(tmp_path, "-o", f"data.source={tmp_path}", "-o", "training.num_epochs=1") == 0
    repeated = json.loads((tmp_path / "smoke" / "manifest.json").read_text())["data"]["num_train_texts_held_out"]
    assert repeated == {"validation": 0, "test": 64}
    assert "training texts that are also held out: {'validation': 0, 'test': 64}" in capsys.readouterr().out


def test_smoke_learns_its_reviews(artefacts: Path) -> None:
    assert json.loads((artefacts / "smoke" / "metrics_test.json").read_text())["accuracy"] >= 0.9


def test_a_model_can_learn_to_drop_tokens(tmp_path: Path) -> None:
    dropping = ("-o", "training.kept_percent=[60]", "-o", "training.min_kept_tokens=4")
    assert run_smoke(tmp_path, *dropping, "-o", "name=dropping") == 0
    run = tmp_path / "dropping"
    config = AutoConfig.from_pretrained(run)
    assert (config.kept_percent, config.min_kept_tokens) == ([60], 4)
    assert json.loads((run / "metrics_test.json").read_text())["accuracy"] >= 0.9


def test_dropping_in_a_layer_that_is_not_there_is_told_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_smoke(tmp_path, "-o", "training.kept_percent=[60,30]") == 2
    assert "training.kept_percent names 2 layers, expected fewer than the model's 2" in capsys.readouterr().err


def test_hugging_face_tokenizer_of_the_checkpoint_agrees_with_the_served_one(artefacts: Path) -> None:
    run = artefacts / "smoke"
    long_review = "The plot was superb. " * 40
    theirs = AutoTokenizer.from_pretrained(run)(long_review, truncation=True)
    assert set(theirs) == {"input_ids", "attention_mask"}
    assert theirs["input_ids"] == ReviewEncoder(run / "tokenizer.json").encode([long_review])[0]
    assert len(theirs["input_ids"]) == 64


def test_same_seed_gives_the_same_weights_and_metrics(artefacts: Path, tmp_path: Path) -> None:
    assert run_smoke(tmp_path) == 0
    first, second = artefacts / "smoke", tmp_path / "smoke"
    assert (first / "metrics_test.json").read_text() == (second / "metrics_test.json").read_text()
    weights, again = (load_file(run / "model.safetensors") for run in (first, second))
    assert all(weights[name].equal(again[name]) for name in weights)


def test_finished_run_is_not_overwritten_unasked(artefacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_smoke(artefacts) == 2
    assert "pass --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("override", ["data.source=nowhere.csv", "base.source=./nowhere", "base.source={run}"])
def test_overwrite_keeps_the_finished_run_when_the_new_one_cannot_begin(
    artefacts: Path, capsys: pytest.CaptureFixture[str], override: str
) -> None:
    run = artefacts / "smoke"
    assert run_smoke(artefacts, "--overwrite", "-o", override.format(run=run)) == 2
    assert override.partition("=")[0] in capsys.readouterr().err
    assert (run / "model.safetensors").is_file()
    assert [path.name for path in artefacts.iterdir() if path.name != "logs"] == ["smoke"]


def test_a_finished_run_survives_a_refusal_beside_what_a_kill_left(
    artefacts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = artefacts / "smoke.replaced"
    left.mkdir()
    assert run_smoke(artefacts) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert (artefacts / "smoke" / "model.safetensors").is_file()
    left.rmdir()


def test_overwriting_a_killed_run_keeps_the_finished_one_that_it_had_replaced(
    artefacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(artefacts / "smoke", tmp_path / "smoke.replaced")
    state = tmp_path / "smoke" / "state" / "checkpoint-9"  # what a kill leaves of the run that replaces it
    state.mkdir(parents=True)
    (state / "trainer_state.json").write_text("{}")
    assert run_smoke(tmp_path, "--overwrite") == 2  # hours of training may be in there
    assert "pass --resume, or remove one of the two" in capsys.readouterr().err
    assert state.is_dir()
    shutil.rmtree(state)
    assert run_smoke(tmp_path, "--overwrite", "-o", "data.source=nowhere.csv") == 2
    assert (tmp_path / "smoke" / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir() if path.name != "logs"] == ["smoke"]


def test_going_on_and_replacing_exclude_each_other(artefacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_smoke(artefacts, "--resume", "--overwrite")
    assert "give one of them" in capsys.readouterr().err
    assert (artefacts / "smoke" / "model.safetensors").is_file()


def test_a_package_that_is_not_there_is_told_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_smoke(tmp_path, "-o", "base.source=package:no_such_package/model") == 2
    error = capsys.readouterr().err
    assert "no package 'no_such_package'" in error
    assert "hub" not in error


@pytest.mark.parametrize(
    ("without", "missing"),
    [
        (["config.json", "model.safetensors"], "has no config.json, no model.safetensors,"),  # what a kill leaves
        (["model.safetensors"], "has no model.safetensors,"),
        (["tokenizer.json", "vocab.txt"], "has no tokenizer.json,"),
    ],
)
def test_a_base_that_is_not_whole_is_told_before_training(
    artefacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], without: list[str], missing: str
) -> None:
    base = shutil.copytree(artefacts / "smoke", tmp_path / "base")
    for name in without:
        (base / name).unlink()
    assert run_smoke(tmp_path, "-o", f"base.source={base}") == 2
    assert f"training.train: base.source={base} {missing} expected a whole folder" in capsys.readouterr().err


def test_a_base_of_pickled_weights_is_not_opened(
    artefacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(artefacts / "smoke", tmp_path / "base")
    model = DistilBertForSequenceClassification.from_pretrained(base)
    torch.save(model.state_dict(), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    assert run_smoke(tmp_path, "-o", f"base.source={base}") == 2
    assert "has no model.safetensors," in capsys.readouterr().err


def test_a_base_with_another_number_of_labels_or_cut_weights_is_told(
    artefacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(artefacts / "smoke", tmp_path / "base")
    two_labels = DistilBertForSequenceClassification.from_pretrained(base)
    two_labels.config.num_labels = 3
    DistilBertForSequenceClassification(two_labels.config).save_pretrained(base)
    assert run_smoke(tmp_path, "-o", f"base.source={base}") == 2
    error = capsys.readouterr().err
    assert f"training.train: base.source={base}: its weights cannot be loaded" in error
    assert "if they have a classifier, 2 labels: name another base" in error
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert run_smoke(tmp_path, "-o", f"base.source={base}") == 2
    assert f"training.train: base.source={base}: its weights cannot be loaded" in capsys.readouterr().err


def test_several_gpus_are_refused_and_the_earlier_run_stays(
    artefacts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    assert run_smoke(artefacts, "--overwrite") == 2
    assert "CUDA_VISIBLE_DEVICES=0" in capsys.readouterr().err
    assert (artefacts / "smoke" / "manifest.json").is_file()


def test_overwrite_leaves_the_new_run_alone(tmp_path: Path) -> None:
    (tmp_path / "smoke").mkdir()
    (tmp_path / "smoke" / "manifest.json").write_text("{}")
    assert run_smoke(tmp_path, "--overwrite", "-o", "training.num_epochs=1") == 0
    assert json.loads((tmp_path / "smoke" / "manifest.json").read_text())["seed"] == 7
    assert [path.name for path in tmp_path.iterdir() if path.name != "logs"] == ["smoke"]


def test_a_state_whose_last_file_a_kill_cut_short_is_passed_over(tmp_path: Path) -> None:
    for step, content in (("7", "{}"), ("14", "")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(content)
    assert fit.last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-7"


def test_resume_after_a_kill_ends_with_the_same_weights(tmp_path: Path) -> None:
    within_an_epoch = ["-o", "training.num_evaluations=6"]  # the first state is of step 23, an epoch has 7
    assert run_smoke(tmp_path / "whole", *within_an_epoch) == 0
    command = [sys.executable, "-m", "training.train", "--config", str(SMOKE), "--artefacts", str(tmp_path)]
    command += within_an_epoch
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not fit.last_complete_checkpoint(tmp_path / "smoke" / "state"):
        assert process.poll() is None, "training ended before it saved a state"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if (tmp_path / "smoke" / "manifest.json").exists():
        pytest.skip("the run finished before the kill arrived")
    assert run_smoke(tmp_path, *within_an_epoch) == 2  # neither --resume nor --overwrite: nothing is guessed
    assert run_smoke(tmp_path, "--resume", *within_an_epoch) == 0
    resumed, whole = tmp_path / "smoke", tmp_path / "whole" / "smoke"
    assert json.loads((resumed / "metrics_test.json").read_text()) == json.loads(
        (whole / "metrics_test.json").read_text()
    )
    weights, again = (load_file(run / "model.safetensors") for run in (resumed, whole))
    assert all(weights[name].equal(again[name]) for name in weights)


def test_resume_of_a_run_that_had_stopped_early_does_not_train_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    # Its loss rises in steps 8, 12 and 16, and falls again in 20, so that another evaluation would change the result.
    overrides = ("learning_rate=1e-2", "early_stopping_patience=3", "num_evaluations=35", "precision=fp32")
    stops_early = [part for override in overrides for part in ("-o", f"training.{override}")]
    assert run_smoke(tmp_path / "whole", *stops_early) == 0
    assert "step 140 of 140" not in capsys.readouterr().out, "a run that trains to its end proves nothing"
    score = train.score
    monkeypatch.setattr(train, "score", killed)
    with pytest.raises(KeyboardInterrupt):
        run_smoke(tmp_path, *stops_early)
    monkeypatch.setattr(train, "score", score)
    assert run_smoke(tmp_path, "--resume", *stops_early) == 0
    resumed, whole = tmp_path / "smoke", tmp_path / "whole" / "smoke"
    best, of_whole = (json.loads((run / "manifest.json").read_text())["best"] for run in (resumed, whole))
    assert best == of_whole
    weights, again = (load_file(run / "model.safetensors") for run in (resumed, whole))
    assert all(weights[name].equal(again[name]) for name in weights)


def test_evaluate_labels_examples(artefacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.json"
    examples = ["The acting was superb and moving.", "The script was dreadful and tedious."]
    arguments = ["--model-path", str(artefacts / "smoke"), "--output-json", str(output), "--examples", *examples]
    assert evaluate.main(arguments) == 0
    answers = json.loads(output.read_text())["examples"]
    assert [answer["label"] for answer in answers] == ["positive", "negative"]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["examples"] == answers


def test_evaluate_scores_labelled_reviews(artefacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reviews = str(ROOT / "training" / "configs" / "smoke_reviews.csv")
    assert evaluate.main(["--model-path", str(artefacts / "smoke"), "--data", reviews]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"]["num_reviews"] == 80


def test_evaluate_refuses_a_path_that_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--model-path", str(tmp_path), "--examples", "fine"]) == 2
    assert "make train" in capsys.readouterr().err
