"""What an engine is to be, read from the files that serve it: profiles, precision, tensors. Needs no TensorRT.

B reviews, T tokens. The classifier's configuration gives the largest and the usual batch and the profile indices; the
tokenizer's configuration of the same name and its tokenizer.json give the widths. Nothing is typed a second time.
"""

from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf import text_format
from google.protobuf.message import DecodeError
from tritonclient.grpc import model_config_pb2

from export.engine_graph import graph_precision, split_labels
from export.repository import TOKENIZER_FILE
from model_repository.tokenizer.review_text import ReviewEncoder, fixed_widths

Shape = tuple[int, int]


class PlanError(ValueError):
    """Configurations, tokenizer and graph do not fit together; the message says what to change."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Shapes (B, T) of one optimisation profile; T is fixed, since the tokenizer gives no other width."""

    min: Shape
    opt: Shape
    max: Shape


@dataclass(frozen=True, kw_only=True)
class EnginePlan:
    """Everything that the build needs to know."""

    profiles: tuple[Profile, ...]
    """In the order of their indices: ascending widths."""
    precision: str
    """What the strongly typed graph asks for, and what the built engine must have."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    graph: onnx.ModelProto
    """Without the label strings."""
    labels: onnx.ModelProto
    """From probabilities to label strings."""


def read_config(file: Path) -> model_config_pb2.ModelConfig:
    """Returns the parsed Triton configuration in `file`.

    Raises:
        PlanError: there is none, or it does not parse.
    """
    try:
        return text_format.Parse(file.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    except (OSError, text_format.ParseError) as error:
        raise PlanError(f"{file} cannot be read as a Triton configuration: {error}") from error


def read_plan(onnx_file: Path, config_file: Path) -> EnginePlan:
    """Returns the plan for `onnx_file` to be served as `config_file` (classifier/configs/tensorrt.pbtxt) says.

    Raises:
        PlanError: the files do not fit together.
        GraphError: TensorRT cannot take the graph.
    """
    if not onnx_file.is_file():
        raise PlanError(f"{onnx_file} is no file, expected an ONNX file as export.onnx writes it: make export")
    repository = config_file.resolve().parents[2]
    config = read_config(config_file)
    widths = _widths(repository, config_file.name)
    _check_profiles(config, widths, config_file)
    try:
        model = onnx.load(onnx_file, load_external_data=False)
    except DecodeError as error:
        raise PlanError(f"{onnx_file} is no whole ONNX file ({error}): make export") from error
    graph, labels = split_labels(model)
    for side, tensors, expected in (
        ("inputs", graph.graph.input, config.input),
        ("outputs", graph.graph.output, config.output),
    ):
        came, wanted = {tensor.name for tensor in tensors}, {tensor.name for tensor in expected}
        if came != wanted:
            raise PlanError(f"{onnx_file} has the {side} {sorted(came)}, {config_file} names {sorted(wanted)}")
    _check_largest_batch(config, config_file)
    largest = config.max_batch_size
    opt = int(config.parameters["opt_batch_size"].string_value or largest)
    return EnginePlan(
        profiles=tuple(Profile(min=(1, width), opt=(opt, width), max=(largest, width)) for width in widths),
        precision=graph_precision(graph),
        inputs=tuple(tensor.name for tensor in config.input),
        outputs=tuple(tensor.name for tensor in config.output),
        graph=graph,
        labels=labels,
    )


def _widths(repository: Path, config_name: str) -> list[int]:
    tokenizer_config = repository / "tokenizer" / "configs" / config_name
    multiple = read_config(tokenizer_config).parameters["pad_to_multiple_of"].string_value
    if not multiple.isdecimal() or int(multiple) == 0:
        raise PlanError(f"{tokenizer_config} has pad_to_multiple_of {multiple!r}, expected a number of tokens")
    tokenizer_file = repository / TOKENIZER_FILE
    if not tokenizer_file.is_file():
        raise PlanError(f"{tokenizer_file} is missing, which says how long a review can be: make export")
    return fixed_widths(int(multiple), ReviewEncoder(tokenizer_file).max_length)


def _check_largest_batch(config: model_config_pb2.ModelConfig, file: Path) -> None:
    from export.parity import NUM_NEIGHBOURS  # takes seconds: it needs torch

    if config.max_batch_size <= NUM_NEIGHBOURS:
        raise PlanError(
            f"{file} has max_batch_size {config.max_batch_size}, expected at least {NUM_NEIGHBOURS + 1}: the parity "
            f"gate runs a review among {NUM_NEIGHBOURS} others through the engine"
        )


def _check_profiles(config: model_config_pb2.ModelConfig, widths: list[int], file: Path) -> None:
    indices = [str(index) for index in range(len(widths))]
    for group in config.instance_group:
        if list(group.profile) != indices:
            raise PlanError(
                f"{file} lists the profiles {list(group.profile)}, but the tokenizer pads to {widths}: write "
                f"profile: {indices} there, and a warm-up for each width"
            )
    warmed = [list(warm_up.inputs["input_ids"].dims) for warm_up in config.model_warmup]
    if warmed != [[width] for width in widths]:
        raise PlanError(f"{file} warms up the widths {warmed}, but the tokenizer pads to {widths}: one for each")
    opt = config.parameters["opt_batch_size"].string_value
    if opt and not (opt.isdecimal() and 1 <= int(opt) <= config.max_batch_size):
        raise PlanError(f"{file} has opt_batch_size {opt!r}, expected 1 to max_batch_size {config.max_batch_size}")
