"""The optimisation itself: Hugging Face `Trainer` set up for short, reproducible fine-tuning and adaptation."""

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import (
    DataCollatorWithPadding,
    DistilBertForSequenceClassification,
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedTokenizerFast,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from training.config import AdaptConfig, Config, ConfigError, Optimisation
from training.masked_lm import MaskedPositionsLM, Masker
from training.metrics import classification_metrics

log = logging.getLogger(__name__)


def bf16_is_native() -> bool:
    """Says whether the GPU, or the CPU without one, computes in bf16 (on CPUs: AVX512-BF16 or AMX)."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class _LogToLogger(TrainerCallback):
    """Sends the Trainer's figures to the log, so that stdout and train.log hold the same lines."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        figures = {key: round(value, 6) for key, value in (logs or {}).items() if isinstance(value, float)}
        log.info("step %d of %d: %s", state.global_step, state.max_steps, figures)


class _Bar(ProgressCallback):
    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Prints nothing: `_LogToLogger` does, once."""


class _EpochOrder(LengthGroupedSampler):
    """The order of an epoch's reviews by its number and the seed alone.

    The library's own draws it from a generator that dropout uses as well: a run resumed within an epoch has another
    order than the one that was stopped, and so reads some reviews twice and others never.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int, epoch: Callable[[], float | None]) -> None:
        super().__init__(batch_size, lengths=lengths)
        self._seed, self._epoch = seed, epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self._seed + int(self._epoch() or 0))
        return super().__iter__()


class _ResumableTrainer(Trainer):
    def train(self, resume_from_checkpoint: str | bool | None = None, *others: Any, **options: Any) -> Any:
        """Trains, but of a run whose training had ended in that state, as by early stopping, loads the best weights.

        The library's own goes on with it: the callback that stopped the run is only asked after another evaluation.
        """
        if isinstance(resume_from_checkpoint, str):
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / "trainer_state.json"))
            if state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]:
                log.info("training had ended at step %d: nothing of it is left to do", state.global_step)
                self.state = state
                self._load_best_model()
                return None
        return super().train(resume_from_checkpoint, *others, **options)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> _EpochOrder:
        reviews: Any = self.train_dataset if train_dataset is None else train_dataset
        lengths = [len(ids) for ids in reviews["input_ids"]]
        return _EpochOrder(self.args.train_batch_size, lengths, self.args.seed, lambda: self.state.epoch)


def _arguments(
    training: Optimisation, seed: int, folder: Path, num_train: int, show_progress: bool, **others: Any
) -> TrainingArguments:
    """Returns the Trainer's arguments; `others` are what fine-tuning and adaptation do not share.

    Raises:
        ConfigError: several GPUs are visible. The Trainer would spread each batch over all, `batch_size` for each.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        data_seed=seed,
        num_train_epochs=training.num_epochs,
        learning_rate=training.learning_rate,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.eval_batch_size,
        warmup_ratio=training.warmup_fraction,
        weight_decay=training.weight_decay,
        bf16=training.precision == "bf16" or (training.precision == "auto" and bf16_is_native()),
        use_cpu=not torch.cuda.is_available(),
        group_by_length=True,
        eval_strategy="steps",
        eval_steps=_steps_between_evaluations(training, num_train),
        logging_steps=max(1, min(25, _steps_between_evaluations(training, num_train))),
        disable_tqdm=not show_progress,
        report_to="none",
        **others,
    )
    if arguments.n_gpu > 1:
        raise ConfigError(
            f"{arguments.n_gpu} GPUs are visible, expected one, for which training.batch_size is meant: set "
            "CUDA_VISIBLE_DEVICES=0"
        )
    return arguments


def _steps_between_evaluations(training: Optimisation, num_train: int) -> int:
    num_steps = math.ceil(training.num_epochs * math.ceil(num_train / training.batch_size))
    return max(1, num_steps // training.num_evaluations)


def _with_log(trainer: Trainer, show_progress: bool) -> Trainer:
    trainer.remove_callback(ProgressCallback if show_progress else PrinterCallback)
    trainer.add_callback(_LogToLogger())
    if show_progress:
        trainer.add_callback(_Bar())
    return trainer


def _cross_entropy(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Returns the mean loss of logits (B, C) against class ids (B,) or class probabilities (B, C)."""
    return cross_entropy(outputs["logits"].float(), labels)


def make_trainer(
    config: Config,
    model: DistilBertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    train: Dataset,
    validation: Dataset,
    folder: Path,
    show_progress: bool = True,
) -> Trainer:
    """Returns a Trainer over encoded reviews that keeps its resumable state in `folder`.

    With soft labels `train` has class probabilities for labels, `validation` class ids all the same.
    """

    def compute_metrics(evaluated: EvalPrediction) -> dict[str, float]:
        metrics = classification_metrics(np.asarray(evaluated.predictions), np.asarray(evaluated.label_ids))
        return {name: value for name, value in metrics.items() if isinstance(value, float) and name != "loss"}

    steps_between_evaluations = _steps_between_evaluations(config.training, len(train))
    args = _arguments(
        config.training,
        config.seed,
        folder,
        len(train),
        show_progress,
        save_strategy="steps",
        save_steps=steps_between_evaluations,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",  # of a thousand reviews it tells more than the count of right answers
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,
    )
    trainer = _ResumableTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_loss_func=_cross_entropy if config.data.soft_labels is not None else None,
        compute_metrics=compute_metrics,
        callbacks=[EarlyStoppingCallback(config.training.early_stopping_patience)],
    )
    return _with_log(trainer, show_progress)


def make_masked_lm_trainer(
    config: AdaptConfig,
    model: MaskedPositionsLM,
    tokenizer: PreTrainedTokenizerFast,
    train: Sequence[dict[str, Any]],
    validation: Sequence[dict[str, Any]],
    folder: Path,
    show_progress: bool = True,
) -> Trainer:
    """Returns a Trainer over rows of `input_ids`; those of `validation` are masked already and have `labels`.

    Lists, not a Dataset: of arrays a batch of 256 reviews is made in milliseconds, so that a GPU need not wait for it.
    It saves no state, so there is nothing to resume.
    """
    trainer = Trainer(
        model=model,
        args=_arguments(
            config.training,
            config.seed,
            folder,
            len(train),
            show_progress,
            save_strategy="no",
            prediction_loss_only=True,
            remove_unused_columns=False,
        ),
        train_dataset=train,
        eval_dataset=validation,
        data_collator=Masker(tokenizer, config.training.masked_fraction),
    )
    return _with_log(trainer, show_progress)


def last_complete_checkpoint(folder: Path) -> Path | None:
    """Returns the newest resumable state in `folder`, or None."""
    # trainer_state.json is written last: a state that a kill cut short has none, or not the whole of it.
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json") if _is_json(path)]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True
