"""Fine-tunes DistilBERT on labelled reviews and saves a checkpoint.

    python -m training.train --config training/configs/smoke.yaml                 # under a minute, no download
    python -m training.train --config training/configs/baseline.yaml -o training.learning_rate=3e-5
    python -m training.train --config training/configs/offline.yaml --resume     # go on after an interruption

Reads the configuration (training/config.py documents every key). Writes artefacts/<name>/: model.safetensors,
config.json with id2label, the tokenizer with its truncation, vocab.txt, metrics_test.json, training_config.yaml and
manifest.json; and appends to artefacts/logs/train.log. The last line on stdout is one JSON object.
"""

import argparse
import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import transformers

from training import data, fit, runs, soft_labels, tokenizer, weights
from training.config import Config, ConfigError, load
from training.evaluate import score
from training.provenance import sha256_file, sha256_texts
from training.runs import RunExistsError
from training.scorers import CheckpointScorer

log = logging.getLogger("training")


def run(config: Config, folder: Path, resume_from: Path | None = None) -> dict[str, Any]:
    """Trains as `config` says, fills `folder`, and returns the manifest."""
    started_at = _started_at(folder / "state" / "started_at")
    transformers.set_seed(config.seed)
    splits = data.split(config.data, config.seed)
    repeated = data.num_held_out_texts(splits)
    log.info("reviews: %s; training texts that are also held out: %s", _sizes(splits), repeated)
    train, added = _train_reviews(config, splits)
    fast_tokenizer = tokenizer.build(config.base, config.tokens, train["text"], folder)
    encoder = tokenizer.save(fast_tokenizer, folder, config.tokens)
    model = weights.load_model(config, vocab_size=len(fast_tokenizer))
    trainer = fit.make_trainer(
        config,
        model,
        fast_tokenizer,
        data.encode(train, encoder),
        data.encode(splits.validation, encoder),
        folder / "state",
        show_progress=sys.stderr.isatty(),
    )
    log.info("%s parameters, bf16 %s", f"{model.num_parameters():,}", trainer.args.bf16)
    trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    model.save_pretrained(folder)  # the Trainer has put the best weights back into it
    best = {"step": trainer.state.best_global_step, "validation_loss": trainer.state.best_metric}
    log.info("best on validation: %s; scoring the test reviews", best)
    metrics = score(CheckpointScorer(folder), splits.test["text"], splits.test["label"])
    runs.write_json(folder / "metrics_test.json", metrics)
    manifest = {
        **runs.identity(config),
        "data": {**_data_facts(config, splits), "num_train_texts_held_out": repeated, **added},
        "best": best,
        "metrics_test": metrics,
        "bf16": trainer.args.bf16,
        "model_sha256": sha256_file(folder / "model.safetensors"),
        **runs.provenance(trainer.args.device),
        "wall_time_s": round(time.time() - started_at, 1),  # from the first start, interruptions included
        "resumed": resume_from is not None,
    }
    runs.write_json(folder / "manifest.json", manifest)
    shutil.rmtree(folder / "state")
    return manifest


def _train_reviews(config: Config, splits: data.Splits) -> tuple[datasets.Dataset, dict[str, Any]]:
    """Returns the reviews to train on, soft labels among them if there are any, and what the manifest says of these."""
    if config.data.soft_labels is None:
        return splits.train, {}
    path = Path(config.data.soft_labels)
    soft = soft_labels.read(path, config.data.labels)
    train = soft_labels.append(splits, soft)
    num_added = len(train) - len(splits.train)
    log.info("soft labels: %d reviews added, %d held out ones left out", num_added, len(soft) - num_added)
    facts = {"file": path.name, "sha256": sha256_file(path), "num_reviews": num_added, "num_all": len(soft)}
    return train, {"soft_labels": facts}


def _sizes(splits: data.Splits) -> dict[str, int]:
    return {field.name: len(getattr(splits, field.name)) for field in fields(splits)}


def _data_facts(config: Config, splits: data.Splits) -> dict[str, Any]:
    """Returns what the manifest says of the reviews."""
    return {
        "source": runs.name_of(config.data.source),
        "num_reviews": _sizes(splits),
        "sha256": {field.name: sha256_texts(_rows(getattr(splits, field.name))) for field in fields(splits)},
    }


def _started_at(path: Path) -> float:
    """Returns when this run first started (Unix time), which a resumed run reads from its state."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(time.time()), encoding="utf-8")
    return float(path.read_text(encoding="utf-8"))


def _rows(split: datasets.Dataset) -> Iterator[tuple[str, int]]:
    return zip(split["text"], split["label"], strict=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    runs.add_options(parser, "training/configs/smoke.yaml")
    parser.add_argument("--resume", action="store_true", help="go on from the last state of an interrupted run")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.resume and args.overwrite:
        parser.error("--resume goes on with a run and --overwrite replaces it: give one of them")
    try:
        config = load(args.config, args.override)
        runs.set_up_logging(args.artefacts / "logs" / "train.log", args.verbose)
        folder = args.artefacts / config.name
        with runs.replacing(folder, args.overwrite):
            runs.check_base(config.base)
            resume_from = runs.prepare_folder(folder, args.resume)
            runs.save_config(config, folder, resumed=resume_from is not None)
            manifest = run(config, folder, resume_from)
    except (ConfigError, data.DataError, RunExistsError) as error:
        print(f"training.train: {error}", file=sys.stderr)
        return 2
    log.info("checkpoint written to %s", folder)
    print(json.dumps({"checkpoint": str(folder), **manifest["metrics_test"]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
