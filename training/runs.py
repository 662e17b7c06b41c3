"""What a run of `training.train` and one of `training.adapt` share: options, log, folder, and the manifest's facts."""

import argparse
import contextlib
import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from pydantic import BaseModel

from training import weights
from training.config import AdaptConfig, BaseWeights, Config, ConfigError
from training.fit import last_complete_checkpoint
from training.provenance import git_revision, utc_now, versions

log = logging.getLogger("training")

_PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "accelerate", "numpy")


class RunExistsError(RuntimeError):
    """What the run would write is there already; the message says which option decides what becomes of it."""


def add_options(parser: argparse.ArgumentParser, config: str) -> None:
    """Adds the options of every run; `config` is the configuration that --help names."""
    parser.add_argument("--config", type=Path, required=True, help=f"YAML file, such as {config}")
    parser.add_argument(
        "-o", "--override", action="append", default=[], metavar="KEY=VALUE", help="set one key; may be repeated"
    )
    parser.add_argument("--artefacts", type=Path, default=Path("artefacts"), help="parent folder of runs (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run of the same name")
    parser.add_argument("--verbose", action="store_true", help="debug lines too")


def set_up_logging(file: Path, verbose: bool) -> None:
    """Sends the log to stdout and, appended, to `file`."""
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
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


@contextlib.contextmanager
def replacing(folder: Path, overwrite: bool) -> Iterator[None]:
    """Moves an earlier run out of the way if it is to be overwritten; it is deleted when the new one is complete.

    One that fails before it has a state to resume from leaves the earlier run where it was. What a run that was killed
    had moved away stays there: the next one overwrites the killed run, not that.

    Raises:
        RunExistsError: the killed run could be resumed, so that one of two runs would be lost.
    """
    earlier = folder.with_name(f"{folder.name}.replaced")
    is_moved = overwrite and folder.exists()
    if is_moved and earlier.exists() and not (folder / "manifest.json").exists():
        if last_complete_checkpoint(folder / "state") is not None:
            raise RunExistsError(
                f"{folder} holds an interrupted run and {earlier} the one that it was to replace: pass --resume, or "
                "remove one of the two first"
            )
        shutil.rmtree(folder)
    elif is_moved:
        shutil.rmtree(earlier, ignore_errors=True)
        folder.rename(earlier)
    try:
        yield
    except BaseException:
        if is_moved and last_complete_checkpoint(folder / "state") is None:
            shutil.rmtree(folder, ignore_errors=True)
            earlier.rename(folder)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def check_base(base: BaseWeights) -> None:
    """Raises `ConfigError` if the base's tokenizer cannot be loaded, or a local folder has no weights with it.

    Such folders are what a killed run leaves: its tokenizer comes first, its weights last.
    """
    if base.source == "random":
        return
    folder = Path(weights.resolve(base.source))
    needed = (
        ["config.json"],
        ["model.safetensors", "model.safetensors.index.json"],  # not pytorch_model.bin, which is a pickle
        ["tokenizer.json", "vocab.txt"],
    )
    missing = [names[0] for names in needed if not any(any(folder.glob(name)) for name in names)]
    if folder.is_dir() and missing:
        raise ConfigError(
            f"base.source={base.source} has no {', no '.join(missing)}, expected a whole folder as training.adapt and "
            "training.train write it: run again what was to write it, or name another"
        )
    try:
        weights.load_tokenizer(base)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"base.source={base.source}: neither a local folder with weights and tokenizer nor what the hub gave "
            f"({reason}); training.adapt and training.train write such folders"
        ) from error


def prepare_folder(folder: Path, resume: bool = False) -> Path | None:
    """Returns the state to resume from, if any; leaves `folder` ready to write.

    Raises:
        RunExistsError: the folder holds a run, finished or not to be resumed.
    """
    state = folder / "state"
    last = last_complete_checkpoint(state)
    if (folder / "manifest.json").exists():
        raise RunExistsError(f"{folder} holds a finished run: pass --overwrite to replace it, or -o name=OTHER")
    if last is not None and not resume:
        raise RunExistsError(f"{folder} holds an interrupted run ({last.name}): pass --resume or --overwrite")
    if resume and last is None:
        log.warning("nothing to resume in %s: starting from the base weights", state)
    if last is None:
        shutil.rmtree(state, ignore_errors=True)  # of a run that ended before it had anything to resume
    folder.mkdir(parents=True, exist_ok=True)
    return last


def save_config(config: BaseModel, folder: Path, resumed: bool = False) -> None:
    """Writes training_config.yaml into `folder`; a resumed run must have the one that stands there.

    Raises:
        RunExistsError: it has another.
    """
    path = folder / "training_config.yaml"
    text = yaml.safe_dump(config.model_dump(), sort_keys=False)
    if resumed and path.read_text(encoding="utf-8") != text:
        raise RunExistsError(f"{path} differs from this configuration: resume with the same one, or pass --overwrite")
    path.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def name_of(source: str) -> str:
    """Returns a data source as manifests name it: a path without the folders above it, a hub name as it is."""
    return Path(source).name if Path(source).exists() else source


def identity(config: Config | AdaptConfig) -> dict[str, Any]:
    """Returns what a manifest says first: the run's name, what it started from, and its seed."""
    return {
        "name": config.name,
        "base": config.base.source,
        "base_sha256": weights.sha256(config.base),
        "seed": config.seed,
    }


def provenance(device: torch.device | str) -> dict[str, Any]:
    """Returns the versions, commit, hardware and time of what was computed on `device`."""
    hardware = {"cpus": os.cpu_count(), "device": str(device)}
    if str(device).startswith("cuda"):
        hardware["gpu"] = torch.cuda.get_device_name()
    return {
        "versions": versions(*_PACKAGES),
        "git_revision": git_revision(),
        "hardware": hardware,
        "finished_at": utc_now(),
    }
