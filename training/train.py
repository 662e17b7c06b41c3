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
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import transformers
import yaml

from training import data, fit, tokenizer, weights
from training.config import Config, ConfigError, load
from training.evaluate import score
from training.provenance import git_revision, sha256_file, sha256_texts, utc_now, versions
from training.scorers import CheckpointScorer

log = logging.getLogger("training")

_PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "accelerate", "numpy")


class RunExistsError(RuntimeError):
    """The run's folder holds an earlier run; the message says which option decides what becomes of it."""


def _set_up_logging(root: Path, verbose: bool) -> None:
    file = root / "logs" / "train.log"
    file.parent.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        handlers=[logging.StreamHandler(sys.stdout), logging.FileHandler(file, encoding="utf-8")],
        force=True,
    )
    # transformers says it at every saved state: file times are only its fallback for ordering them.
    warnings.filterwarnings("ignore", message="mtime may not be reliable")
    for noisy in ("fsspec", "urllib3", "filelock", "asyncio", "httpx", "httpcore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if not sys.stderr.isatty() and not verbose:
        datasets.disable_progress_bars()


def _prepare_folder(folder: Path, resume: bool, overwrite: bool) -> Path | None:
    """Returns the state to resume from, if any; leaves `folder` ready to write."""
    state = folder / "state"
    if overwrite and folder.exists():
        shutil.rmtree(folder)
    last = fit.last_complete_checkpoint(state)
    if (folder / "manifest.json").exists():
        raise RunExistsError(f"{folder} holds a finished run: pass --overwrite to replace it, or -o name=OTHER")
    if last is not None and not resume:
        raise RunExistsError(f"{folder} holds an interrupted run ({last.name}): pass --resume or --overwrite")
    if resume and last is None:
        log.warning("nothing to resume in %s: starting from the base weights", state)
    folder.mkdir(parents=True, exist_ok=True)
    return last


def _save_config(config: Config, folder: Path, resumed: bool) -> None:
    path = folder / "training_config.yaml"
    text = yaml.safe_dump(config.model_dump(), sort_keys=False)
    if resumed and path.read_text(encoding="utf-8") != text:
        raise RunExistsError(f"{path} differs from this configuration: resume with the same one, or pass --overwrite")
    path.write_text(text, encoding="utf-8")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def run(config: Config, folder: Path, resume_from: Path | None = None) -> dict[str, Any]:
    """Trains as `config` says, fills `folder`, and returns the manifest."""
    started_at = _started_at(folder / "state" / "started_at")
    transformers.set_seed(config.seed)
    splits = data.split(config.data, config.seed)
    sizes = {name: len(getattr(splits, name)) for name in ("train", "validation", "test")}
    log.info("reviews: %s", sizes)
    fast_tokenizer = tokenizer.build(config, splits.train["text"], folder)
    encoder = tokenizer.save(fast_tokenizer, folder, config.tokens)
    model = weights.load_model(config, vocab_size=len(fast_tokenizer))
    trainer = fit.make_trainer(
        config,
        model,
        fast_tokenizer,
        data.encode(splits.train, encoder),
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
    _write_json(folder / "metrics_test.json", metrics)
    manifest = {
        "name": config.name,
        "base": config.base.source,
        "seed": config.seed,
        "data": {
            "source": Path(config.data.source).name if Path(config.data.source).exists() else config.data.source,
            "num_reviews": sizes,
            "sha256": {name: sha256_texts(_rows(getattr(splits, name))) for name in sizes},
        },
        "best": best,
        "metrics_test": metrics,
        "bf16": trainer.args.bf16,
        "model_sha256": sha256_file(folder / "model.safetensors"),
        "versions": versions(*_PACKAGES),
        "git_revision": git_revision(),
        "hardware": {"cpus": os.cpu_count(), "device": str(trainer.args.device)},
        "finished_at": utc_now(),
        "wall_time_s": round(time.time() - started_at, 1),  # from the first start, interruptions included
        "resumed": resume_from is not None,
    }
    _write_json(folder / "manifest.json", manifest)
    shutil.rmtree(folder / "state")
    return manifest


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
    parser.add_argument("--config", type=Path, required=True, help="YAML file, such as training/configs/smoke.yaml")
    parser.add_argument(
        "-o", "--override", action="append", default=[], metavar="KEY=VALUE", help="set one key; may be repeated"
    )
    parser.add_argument("--artefacts", type=Path, default=Path("artefacts"), help="parent folder of runs (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the last state of an interrupted run")
    parser.add_argument("--overwrite", action="store_true", help="delete an earlier run of the same name first")
    parser.add_argument("--verbose", action="store_true", help="debug lines, and progress bars off a terminal too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        config = load(args.config, args.override)
        _set_up_logging(args.artefacts, args.verbose)
        folder = args.artefacts / config.name
        resume_from = _prepare_folder(folder, args.resume, args.overwrite)
        _save_config(config, folder, resumed=resume_from is not None)
        manifest = run(config, folder, resume_from)
    except (ConfigError, data.DataError, RunExistsError) as error:
        print(f"training.train: {error}", file=sys.stderr)
        return 2
    log.info("checkpoint written to %s", folder)
    print(json.dumps({"checkpoint": str(folder), **manifest["metrics_test"]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
