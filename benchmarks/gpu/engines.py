"""Times ONNX files on the GPU, without a server: widths in steps of 64 tokens, batches to 64, and what they answer.

    python -m export.onnx --checkpoint artefacts/mine --no-install          # fp32, fp16, int8
    .venv-gpu/bin/python -m benchmarks.gpu.engines --out artefacts/gpu/engines \\
        --onnx artefacts/mine/onnx/fp32/model.onnx artefacts/mine/onnx/fp16/model.onnx

benchmarks/gpu/requirements.txt says how to make .venv-gpu. Inputs and outputs are in the CPU's memory, where requests
come from: copying counts. Answers are compared with those of the first file on the CPU, over generated reviews of
IMDb's lengths. Writes engines.json and engines.png into --out; the last line on stdout is the same JSON.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from benchmarks import texts
from benchmarks.gpu.session import CPU, CUDA, PROVIDERS, NoProviderError, open_session
from export.repository import REPOSITORY, TOKENIZER_FILE
from model_repository.tokenizer.review_text import ReviewEncoder, fixed_widths, pad
from training.command_line import positive
from training.provenance import utc_now

BATCHES = (1, 2, 4, 8, 16, 32, 64)
WIDTH_STEP = 64
"""Tokens between the widths that are timed; the native configurations pad to the last of them."""
_OUTPUTS = ["label", "score", "probabilities"]
_MIN_REPEATS = 20


def median_s(run: Callable[[], Any], window_s: float) -> float:
    """Returns the median time of `run` in seconds: after three warm-ups, for `window_s` and at least 20 times."""
    for _ in range(3):
        run()
    took_s: list[float] = []
    end_s = time.perf_counter() + window_s
    while len(took_s) < _MIN_REPEATS or time.perf_counter() < end_s:
        start_s = time.perf_counter()
        run()
        took_s.append(time.perf_counter() - start_s)
    return float(np.median(took_s))


def time_shapes(session: Any, widths: Sequence[int], window_s: float, vocabulary: int) -> list[dict[str, float]]:
    """Returns for each width and batch the median time of a run in ms and the reviews a second that it makes."""
    drawn = np.random.default_rng(0)
    shapes = []
    for width in tqdm(widths, desc="widths", disable=None):
        for batch in BATCHES:
            input_ids = drawn.integers(0, vocabulary, (batch, width), dtype=np.int64)
            feed = {"input_ids": input_ids, "attention_mask": np.ones_like(input_ids)}
            took_s = median_s(partial(session.run, _OUTPUTS, feed), window_s)
            shapes.append({"width": width, "batch": batch, "ms": took_s * 1000, "reviews_per_s": batch / took_s})
    return shapes


def probabilities(session: Any, rows: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
    """Returns (N, C) for the token ids of N reviews, run one by one."""

    def one(row: Sequence[int]) -> Any:
        input_ids, attention_mask = pad([row])
        return session.run(["probabilities"], {"input_ids": input_ids, "attention_mask": attention_mask})[0]

    return np.concatenate([one(row) for row in rows])


def measure(
    files: Sequence[Path], tokenizer_file: Path, provider: str, window_s: float, num_reviews: int
) -> dict[str, Any]:
    """Returns the figures of each of `files`, by path.

    Raises:
        NoProviderError: no such device.
    """
    encoder = ReviewEncoder(tokenizer_file)
    widths = fixed_widths(WIDTH_STEP, encoder.max_length)
    rows = encoder.encode(texts.make("imdb", num_reviews))
    # Not 0: ONNX Runtime would pin a thread to each core of the machine, whichever this process may use.
    expected = probabilities(open_session(files[0], CPU, num_threads=len(os.sched_getaffinity(0))), rows)
    found = {}
    for file in files:
        print(f"{file} on {provider} ...", flush=True)
        session = open_session(file, provider)
        answers = probabilities(session, rows)
        found[str(file)] = {
            "shapes": time_shapes(session, widths, window_s, vocabulary=int(max(map(max, rows)))),
            "largest_difference": float(np.abs(answers - expected).max()),
            "labels_that_differ": int((answers.argmax(1) != expected.argmax(1)).sum()),
        }
    return found


def describe() -> dict[str, Any]:
    """Returns date, command, GPU and versions."""
    import onnxruntime

    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        gpu = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        gpu = "none"
    return {
        "date": utc_now(),
        "command": shlex.join(["python", "-m", "benchmarks.gpu.engines", *sys.argv[1:]]),
        "gpu": gpu,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
    }


def table(files: dict[str, Any]) -> str:
    """Returns reviews a second by width and batch, a row for each file and width, in Markdown."""
    lines = ["| file | width | " + " | ".join(f"{batch} a batch" for batch in BATCHES) + " |"]
    lines.append("|---" * (len(BATCHES) + 2) + "|")
    for name, figures in files.items():
        by_shape = {(shape["width"], shape["batch"]): shape for shape in figures["shapes"]}
        for width in sorted({width for width, _ in by_shape}):
            cells = (f"{by_shape[width, b]['reviews_per_s']:,.0f} ({by_shape[width, b]['ms']:.2f} ms)" for b in BATCHES)
            lines.append(f"| {name} | {width} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(files: dict[str, Any], out: Path) -> None:
    """Writes reviews a second against the batch, a line for each file at the widest width, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, figures in files.items():
        widest = max(shape["width"] for shape in figures["shapes"])
        line = [shape for shape in figures["shapes"] if shape["width"] == widest]
        axes.plot(
            [s["batch"] for s in line], [s["reviews_per_s"] for s in line], "o-", label=f"{name}, {widest} tokens"
        )
    axes.set(xlabel="reviews a batch", ylabel="reviews/s", xscale="log", yscale="log", title="ONNX files on the GPU")
    axes.set_xticks(BATCHES, [str(batch) for batch in BATCHES])
    axes.minorticks_off()
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.engines", description=__doc__, formatter_class=texts.ManPage
    )
    parser.add_argument("--onnx", type=Path, nargs="+", required=True, help="files; the first is the one to agree with")
    parser.add_argument("--tokenizer", type=Path, default=REPOSITORY / TOKENIZER_FILE, help="theirs")
    parser.add_argument("--provider", choices=PROVIDERS, default=CUDA, help="of ONNX Runtime")
    parser.add_argument("--window-s", type=float, default=0.2, help="seconds for each shape, at least 20 runs")
    parser.add_argument("--num-reviews", type=positive, default=200, help="whose answers are compared")
    parser.add_argument("--out", type=Path, required=True, help="folder for engines.json and engines.png")
    options = parser.parse_args(argv)
    missing = [str(file) for file in options.onnx if not file.is_file()]
    if missing:
        parser.error(f"no such file: {', '.join(missing)}; `python -m export.onnx --no-install` writes them")
    try:
        files = measure(options.onnx, options.tokenizer, options.provider, options.window_s, options.num_reviews)
    except NoProviderError as error:
        print(f"benchmarks.gpu.engines: error: {error}", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    result = {**describe(), "provider": options.provider, "files": files}
    (options.out / "engines.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(files, options.out / "engines.png")
    print(table(files))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
