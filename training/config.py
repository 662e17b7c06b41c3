"""The configuration of a run: YAML file plus `-o section.key=value` overrides, validated before anything is loaded.

Every field says what it means; a misspelt key or a wrong type is an error that names the key and the nearest one.
"""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from yaml import YAMLError


class ConfigError(ValueError):
    """The configuration cannot be used; the message names the key, what came and what was expected."""


class _Section(BaseModel):
    # strict: "two" is no number of epochs, and 2.5 is no batch size.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class BaseWeights(_Section):
    """Where the encoder's weights come from before fine-tuning."""

    source: str
    """Hub name, local folder, `package:NAME/FOLDER` (inside an installed Python package), or `random`."""
    hidden_size: int = Field(default=32, gt=0)
    """Width of a `random` model; a source with weights brings its own."""
    num_layers: int = Field(default=2, gt=0)
    """Depth of a `random` model."""
    num_heads: int = Field(default=2, gt=0)
    """Attention heads of a `random` model."""


class Data(_Section):
    """Labelled reviews: columns `text` and `label`."""

    source: str
    """Hub data set, or a local parquet or CSV file, or a folder with train.* and, where there is one, test.*."""
    text_column: str = "text"
    """Column of the reviews."""
    label_column: str = "label"
    """Column of their labels: names in `labels`, or their ids."""
    labels: Annotated[list[str], Field(min_length=2)] = ["negative", "positive"]
    """Label names in the order of their ids; they become the checkpoint's id2label and the server's answers."""
    validation_fraction: float = Field(default=0.04, gt=0, lt=1)
    """Share of the training split held out, stratified by label, to choose the best checkpoint."""
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share held out for the test where the source has no test split of its own."""
    max_train_reviews: int | None = Field(default=None, gt=0)
    """Upper bound on training reviews (stratified), for trials; null takes all of them."""
    soft_labels: str | None = None
    """Parquet file of `python -m training.soft_labels`, whose reviews join the training split; null for none."""


class UnlabelledReviews(_Section):
    """Reviews whose text alone is read: the base weights are adapted to them."""

    source: str
    """A folder with train.* and unsupervised.*, both read (test.* never is), or one parquet or CSV file."""
    text_column: str = "text"
    """Column of the reviews."""
    validation_fraction: float = Field(default=0.01, gt=0, lt=1)
    """Share held out, on whose masked tokens the validation loss is measured."""
    max_reviews: int | None = Field(default=None, ge=2)
    """Upper bound on reviews (drawn at random), for trials; null takes all of them."""


class Tokens(_Section):
    """How a review becomes tokens; saved into the checkpoint's tokenizer.json, which the server reads."""

    max_length: int = Field(default=256, ge=8, le=512)
    """Longest row in tokens, [CLS] and [SEP] included."""
    truncation_side: Literal["left", "right"] = "right"
    """Side that is cut from a longer review: `left` keeps its end, where reviewers put the verdict."""


class Optimisation(_Section):
    """AdamW with a linear warm-up and decay."""

    num_epochs: float = Field(default=2.0, gt=0)
    """Times that the training reviews are gone through."""
    learning_rate: float = Field(default=5e-5, gt=0)
    """At the end of the warm-up, the highest."""
    batch_size: int = Field(default=32, gt=0)
    """Reviews a step."""
    eval_batch_size: int = Field(default=64, gt=0)
    """Reviews at once on the validation reviews."""
    warmup_fraction: float = Field(default=0.06, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's, of all weights but biases and layer norms."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of activations left out in a step, attention's apart."""
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    """0 lets PyTorch use its fused attention; 0.1 made training 2.3 times slower on a CPU."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` takes bf16 where the GPU or the CPU computes in it, else fp32."""
    num_evaluations: int = Field(default=6, gt=0)
    """Evaluations on the validation reviews, evenly spaced."""


class Training(Optimisation):
    """Fine-tuning: the checkpoint of the evaluation with the lowest validation loss is kept."""

    early_stopping_patience: int = Field(default=6, gt=0)
    """Evaluations without a lower validation loss after which training stops; never, if as many as there are."""
    kept_percent: list[Annotated[int, Field(ge=1, le=100)]] = []
    """Percent of all a review's tokens that are kept after the attention of the first layer, the second and so on, not
    more than before (training.token_dropping); layers that are not named keep what reaches them, and [] drops none."""
    min_kept_tokens: int = Field(default=0, ge=0)
    """Tokens that a review keeps at least, all if it has no more, whatever `kept_percent` says."""

    @field_validator("kept_percent")
    @classmethod
    def _never_more_than_before(cls, percent: list[int]) -> list[int]:
        if percent != sorted(percent, reverse=True):
            raise ValueError("tokens that were dropped do not come back: expected numbers that do not rise")
        return percent


class Adaptation(Optimisation):
    """Masked language modelling: the weights after the last step are kept."""

    masked_fraction: float = Field(default=0.15, gt=0, lt=1)
    """Share of the tokens to be predicted; of these 80 % read [MASK], 10 % a random token, 10 % themselves."""


class _Run(_Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Folder under artefacts/ that the run writes."""
    seed: int = Field(default=42, ge=0)
    """Of the splits, the order of reviews, dropout, and whatever weights are drawn at random."""
    base: BaseWeights


class Config(_Run):
    """One run of `training.train`, whole."""

    data: Data
    tokens: Tokens = Tokens()
    training: Training = Training()


class AdaptConfig(_Run):
    """One run of `training.adapt`, whole."""

    data: UnlabelledReviews
    tokens: Tokens = Tokens()
    training: Adaptation = Adaptation()


_AnyConfig = TypeVar("_AnyConfig", bound=_Run)


def _key_paths(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _key_paths(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _describe(error: Any, schema: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(key, [*_key_paths(schema), *schema.model_fields], n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; known keys: {', '.join(_key_paths(schema))}"
        return f"unknown key {key!r}{hint}"
    if error["type"] == "missing":
        return f"key {key!r} is missing"
    return f"key {key!r}: {error['msg']}, got {error['input']!r} ({type(error['input']).__name__})"


def parse(values: Any, origin: str, schema: type[_AnyConfig]) -> _AnyConfig:
    """Validates nested `values` (as YAML gives them) read from `origin` as a `schema`.

    Raises:
        ConfigError: names every wrong key at once.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        problems = "\n  ".join(_describe(problem, schema) for problem in error.errors())
        raise ConfigError(f"{origin}:\n  {problems}") from error


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Returns `load_as` of a training run's configuration."""
    return load_as(Config, path, overrides)


def load_as(schema: type[_AnyConfig], path: Path, overrides: Sequence[str] = ()) -> _AnyConfig:
    """Reads the YAML file at `path` with `section.key=value` overrides applied as a `schema`.

    Raises:
        ConfigError: no such file, one that is no YAML of keys, an override without `=`, or keys and values that do not
            validate.
    """
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override {override!r} has no '=': write -o training.learning_rate=3e-5")
    try:
        loaded = OmegaConf.load(path)
        if not isinstance(loaded, DictConfig):
            raise ConfigError(f"{path}: a list came, expected keys with values, such as name: mine")
        merged = OmegaConf.merge(loaded, OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(merged, resolve=True)
    except FileNotFoundError as error:
        known = ", ".join(str(file) for file in sorted(Path(__file__).parent.glob("configs/*.yaml")))
        raise ConfigError(f"{path}: no such file; shipped configurations: {known}") from error
    except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    return parse(values, str(path), schema)
