"""Adapts base weights to the domain: masked language modelling on unlabelled reviews, before any fine-tuning.

    python -m training.adapt --config training/configs/adapt.yaml -o data.source=FOLDER   # train.*, unsupervised.*
    python -m training.adapt --config training/configs/adapt.yaml -o data.source=reviews.parquet -o name=other

Domain-adaptive pretraining of Gururangan et al. 2020, "Don't Stop Pretraining: Adapt Language Models to Domains and
Tasks": some tokens of each review are hidden, and the encoder learns to predict them. Labels are not read, nor is a
folder's test split.

Reads the configuration (training/config.py, AdaptConfig, documents every key). Writes artefacts/<name>/, which
base.source of training.train takes: model.safetensors, config.json, the tokenizer, training_config.yaml and
manifest.json with the validation loss before and after; and appends to artefacts/logs/adapt.log. There is no --resume:
a run that was cut short begins anew. The last line on stdout is one JSON object.
"""

import argparse
import json
import logging
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import transformers
from tqdm import tqdm

from model_repository.tokenizer.review_text import ReviewEncoder
from training import data, fit, runs, tokenizer, weights
from training.config import AdaptConfig, ConfigError, UnlabelledReviews, load_as
from training.masked_lm import Masker, plain
from training.provenance import sha256_file, sha256_texts

log = logging.getLogger("training")

PARTS = ("train", "unsupervised")
"""Files of a folder that are read. Not the test split: the model is to be judged on reviews that it has not seen."""


def split(reviews: UnlabelledReviews, seed: int) -> tuple[list[str], list[str]]:
    """Returns training and validation reviews, drawn at random; the same seed gives the same ones.

    Raises:
        training.data.DataError: no reviews at the source, or fewer than two.
    """
    texts = data.load_unlabelled(reviews.source, PARTS, reviews.text_column)
    if len(texts) < 2:
        raise data.DataError(f"data.source={reviews.source}: {len(texts)} reviews, expected at least 2")
    order = np.random.default_rng(seed).permutation(len(texts))[: reviews.max_reviews]
    num_validation = max(1, round(len(order) * reviews.validation_fraction))
    return [texts[index] for index in order[num_validation:]], [texts[index] for index in order[:num_validation]]


def _encode(reviews: Sequence[str], encoder: ReviewEncoder, batch_size: int = 1000) -> list[npt.NDArray[np.int32]]:
    """Returns a row of token ids, of its own length, for each review."""
    rows: list[npt.NDArray[np.int32]] = []
    for start in tqdm(range(0, len(reviews), batch_size), desc="tokenizing", unit="batch", disable=None):
        batch = encoder.encode(reviews[start : start + batch_size])
        rows += [np.asarray(row, dtype=np.int32) for row in batch]
    return rows


def _data_facts(source: str, parts: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Returns what the manifest says of the reviews."""
    return {
        "source": runs.name_of(source),
        "num_reviews": {name: len(texts) for name, texts in parts.items()},
        # Unlabelled reviews count as label -1, as in IMDb's unsupervised split.
        "sha256": {name: sha256_texts((text, -1) for text in texts) for name, texts in parts.items()},
    }


def run(config: AdaptConfig, folder: Path) -> dict[str, Any]:
    """Adapts as `config` says, fills `folder`, and returns the manifest."""
    started = time.monotonic()
    transformers.set_seed(config.seed)
    train, validation = split(config.data, config.seed)
    log.info("reviews: train %d, validation %d", len(train), len(validation))
    fast_tokenizer = tokenizer.build(config.base, config.tokens, train, folder)
    encoder = tokenizer.save(fast_tokenizer, folder, config.tokens)
    model = weights.load_masked_lm(config, vocab_size=len(fast_tokenizer))
    masker = Masker(fast_tokenizer, config.training.masked_fraction, seed=config.seed)
    trainer = fit.make_masked_lm_trainer(
        config,
        model,
        fast_tokenizer,
        [{"input_ids": row} for row in _encode(train, encoder)],
        masker.mask_once(_encode(validation, encoder)),
        folder / "state",
        show_progress=sys.stderr.isatty(),
    )
    log.info("%s parameters, bf16 %s", f"{model.num_parameters():,}", trainer.args.bf16)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    log.info("validation loss %.4f before, %.4f after", before, after)
    plain(model).save_pretrained(folder)
    manifest = {
        **runs.identity(config),
        "data": _data_facts(config.data.source, {"train": train, "validation": validation}),
        "num_steps": trainer.state.global_step,
        "validation_loss": {"before": before, "after": after},
        "bf16": trainer.args.bf16,
        "model_sha256": sha256_file(folder / "model.safetensors"),
        **runs.provenance(trainer.args.device),
        "wall_time_s": round(time.monotonic() - started, 1),
    }
    runs.write_json(folder / "manifest.json", manifest)
    shutil.rmtree(folder / "state", ignore_errors=True)
    return manifest


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.adapt", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    runs.add_options(parser, "training/configs/adapt.yaml")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        config = load_as(AdaptConfig, args.config, args.override)
        runs.set_up_logging(args.artefacts / "logs" / "adapt.log", args.verbose)
        folder = args.artefacts / config.name
        with runs.replacing(folder, args.overwrite):
            runs.check_base(config.base)
            runs.prepare_folder(folder)
            runs.save_config(config, folder)
            manifest = run(config, folder)
    except (ConfigError, data.DataError, runs.RunExistsError) as error:
        print(f"training.adapt: {error}", file=sys.stderr)
        return 2
    log.info("base weights written to %s", folder)
    print(json.dumps({"base": str(folder), "validation_loss": manifest["validation_loss"], **manifest["data"]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
