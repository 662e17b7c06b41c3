"""Builds the TensorRT engine that this GPU node serves, checks it, and installs it. Run it in docker/Dockerfile.export.

    python -m export.tensorrt --onnx artefacts/mine/onnx/fp16/model.onnx --checkpoint artefacts/mine \\
        --config model_repository/classifier/configs/tensorrt.pbtxt
    python -m export.tensorrt --onnx ... --config ... --plan-only      # what would be built; needs no GPU
    ... --data test.parquet                                            # parity and accuracy on labelled reviews

Batches, widths and profiles are read from the configurations and tokenizer.json, precision from the graph: fp16 as
export.onnx writes it; bf16 by ModelOpt's AutoCast; int8 and fp8 by explicit QuantizeLinear and DequantizeLinear. When
the built engine has that precision and passes the parity gate, it is installed beside the configuration: model.plan,
engine.json, and the label graph in the labels repository. Otherwise nothing is and the exit status is 1.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from export import engine_manifest
from export.engine_graph import GraphError
from export.engine_install import install_engine
from export.engine_plan import EnginePlan, PlanError, read_plan
from export.engine_precision import BuildError, check_precision
from training.command_line import positive

_LABELS_REPOSITORY = Path(__file__).resolve().parent.parent / "docker" / "tensorrt"
_TOLERANCE_OF = {"bf16": "int8", "fp8": "int8"}
"""Whose tolerances hold for precisions that export.parity has none for: both have fewer significant bits than fp16."""

Tokens = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
Runner = Callable[[Tokens], dict[str, npt.NDArray[Any]]]


def describe_plan(plan: EnginePlan) -> dict[str, Any]:
    """Returns the plan as JSON shows it: precision, tensors, and min, opt and max shape (B, T) of each profile."""
    return {
        "precision": plan.precision,
        "inputs": plan.inputs,
        "outputs": plan.outputs,
        "profiles": [dataclasses.asdict(profile) for profile in plan.profiles],
    }


def with_labels(plan: EnginePlan, run: Callable[..., dict[str, Any]]) -> Runner:
    """Returns a runner of the whole: the engine's outputs, and `label` by the graph that is served behind it."""
    session = onnxruntime.InferenceSession(plan.labels.SerializeToString(), providers=["CPUExecutionProvider"])

    def runner(tokens: Tokens) -> dict[str, npt.NDArray[Any]]:
        outputs = run(*tokens)
        (label,) = session.run(["label"], {"probabilities": outputs["probabilities"]})
        return {**outputs, "label": label}

    return runner


def _labelled(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the splits of --data that training and test reviews are, with the ids of the checkpoint's labels."""
    from export.checkpoint_folder import read_labels
    from training.config import Data
    from training.data import load

    columns = {"text_column": args.text_column, "label_column": args.label_column}
    return load(Data(source=args.data, labels=read_labels(args.checkpoint), **columns))


def _accuracy(run: Runner, args: argparse.Namespace) -> float:
    from model_repository.tokenizer.review_text import ReviewEncoder, pad

    splits = _labelled(args)
    split = splits["test"] if "test" in splits else splits["train"]
    chosen = split.shuffle(seed=args.seed).select(range(min(args.num_reviews, len(split))))
    rows = ReviewEncoder(args.checkpoint / "tokenizer.json").encode(list(chosen["text"]))
    predicted = [run(pad([row]))["logits"].argmax() for row in rows]
    return float(np.mean(np.array(predicted) == np.array(chosen["label"])))


def _gate(
    args: argparse.Namespace, plan: EnginePlan, reviews: Sequence[str], run: Runner
) -> tuple[dict[str, Any], bool]:
    from export import parity

    tolerance = _TOLERANCE_OF.get(plan.precision, plan.precision)
    checks = parity.compare(args.checkpoint, args.onnx, tolerance, reviews, run)
    print(parity.table(checks, plan.precision, len(reviews)), flush=True)
    results: dict[str, Any] = {check.name: {"measured": check.measured, "limit": check.limit} for check in checks}
    if args.data:
        results["accuracy"] = _accuracy(run, args)
        print(f"  accuracy on {len(reviews)} reviews of {args.data}: {results['accuracy']:.4f}")
    return results, all(check.passed for check in checks)


def _facts(args: argparse.Namespace, plan: EnginePlan, checked: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    from training.provenance import git_revision, sha256_file, utc_now, versions

    machine = engine_manifest.this_machine()
    return {
        **describe_plan(plan),
        **checked,
        "machine": {
            "tensorrt": machine.tensorrt,
            "compute_capability": machine.compute_capabilities[0],
            "gpu": machine.gpu,
            "driver": machine.driver,
            "cuda": torch.version.cuda,
        },
        "onnx_sha256": sha256_file(args.onnx),
        "versions": versions("tensorrt", "torch", "onnx", "onnxruntime", "tokenizers"),
        "git_revision": git_revision(),
        "date": utc_now(),
    }


def run(args: argparse.Namespace) -> int:
    """Builds, checks and installs as `args` say; returns the exit status."""
    plan = read_plan(args.onnx, args.config)
    print(json.dumps(describe_plan(plan), indent=2), flush=True)
    if args.plan_only:
        return 0
    from export import parity
    from export.checkpoint_folder import CheckpointError
    from training.data import DataError

    try:  # before minutes of building
        reviews = _reviews(args)
    except (CheckpointError, DataError, parity.ReviewsError) as error:
        print(f"export.tensorrt: {error}", file=sys.stderr)
        return 2
    return _build(args, plan, reviews)


def _reviews(args: argparse.Namespace) -> list[str]:
    """Returns the reviews of the parity gate, once checkpoint and data are known to be what building needs."""
    from export import parity
    from export.checkpoint_folder import read_labels

    read_labels(args.checkpoint)
    reviews = parity.read_reviews(args.data, args.num_reviews, args.seed, text_column=args.text_column)
    if args.data:
        _labelled(args)
    return reviews


def _build(args: argparse.Namespace, plan: EnginePlan, reviews: Sequence[str]) -> int:
    from export.engine_build import Engine, build

    repository = args.config.resolve().parents[2]
    engine_manifest.check_source(args.checkpoint, repository)
    timing_cache = repository / "classifier" / engine_manifest.TIMING_CACHE_FILE
    try:
        serialised = build(plan, timing_cache)
        engine = Engine(serialised, plan)
        results, passed = _gate(args, plan, reviews, with_labels(plan, engine.run))
        layers = check_precision(engine.layers(), plan.precision)
        print(f"matrix layers by type of their inputs: {layers}")
    except BuildError as error:
        print(f"export.tensorrt: {error}", file=sys.stderr)
        return 1
    if not passed:
        print("parity is BROKEN: nothing was installed", file=sys.stderr)
        return 1
    facts = _facts(args, plan, {"parity": results, "matrix_layers": layers})
    with tempfile.TemporaryDirectory(prefix="engine-") as folder:
        built = Path(folder) / "model.plan"
        built.write_bytes(serialised)
        install_engine(built, plan.labels.SerializeToString(), facts, repository, args.labels_repository)
    print(json.dumps({"bytes": len(serialised), "installed": str(repository / engine_manifest.ENGINE_FILE)}))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export.tensorrt", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--onnx", type=Path, required=True, help="graph in the wanted precision, by export.onnx")
    parser.add_argument("--config", type=Path, required=True, help="classifier/configs/tensorrt.pbtxt, to be served")
    parser.add_argument("--checkpoint", type=Path, help="what the parity gate compares with; needed for building")
    parser.add_argument("--labels-repository", type=Path, default=_LABELS_REPOSITORY, help="(%(default)s)")
    parser.add_argument("--plan-only", action="store_true", help="print what would be built and end")
    parser.add_argument(
        "--data", help="labelled reviews (file, folder, hub) instead of generated ones; `make engine` takes a folder"
    )
    parser.add_argument("--text-column", default="text", help="column of the reviews in --data (%(default)s)")
    parser.add_argument("--label-column", default="label", help="column of their labels, names or ids (%(default)s)")
    parser.add_argument("--num-reviews", type=positive, default=200, help="reviews in the parity gate (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of those reviews (%(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.checkpoint is None and not args.plan_only:
        parser.error("--checkpoint is needed: no engine is installed that was not compared with its checkpoint")
    try:
        return run(args)
    except ModuleNotFoundError as error:
        if error.name != "tensorrt":
            raise
        print("export.tensorrt: TensorRT is not installed: run this in docker/Dockerfile.export", file=sys.stderr)
    except (PlanError, GraphError, engine_manifest.EngineError) as error:
        print(f"export.tensorrt: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
