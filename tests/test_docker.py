"""The container files without a Docker engine: lint, schema, files, pins, flags, and the start's decisions."""

import contextlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import text_format
from serving import CHECKOUT
from tritonclient.grpc import model_config_pb2

from export import engine_manifest
from local_server.arguments import CLOSED_APIS, KEY_HEADER
from local_server.triton import OPEN_FILES, STACK_BYTES

DOCKER = CHECKOUT / "docker"
DOCKERFILES = ("Dockerfile", "Dockerfile.export")


def release() -> str:
    (value,) = re.findall(r"^TRITON_RELEASE=(\d\d\.\d\d)$", (DOCKER / ".env").read_text(), re.MULTILINE)
    return str(value)


def tool(name: str) -> str:
    """Returns the path of a command that a package beside this Python brings."""
    path = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if path is None:
        pytest.skip(f"{name} is not installed: pip install -r requirements.txt -c constraints.txt")
    return path


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yml").read_text())
    return loaded


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"--[a-z][a-z0-9-]+", text))


def started_flags(configuration: str) -> list[str]:
    """Returns the longest command line that start.py makes for `configuration`, without `tritonserver`."""
    code = f"import start; print(*start.command(start.Path('/models'), {configuration!r}, '127.0.0.1', 64), sep='\\n')"
    environment = {**os.environ, "PYTHONPATH": f"{CHECKOUT}:{DOCKER}"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    program, *arguments = run.stdout.split()
    assert program == "tritonserver"
    return arguments


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_has_nothing_to_say(name: str) -> None:
    run = subprocess.run([tool("hadolint"), str(DOCKER / name)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_shell_script_is_clean() -> None:
    run = subprocess.run([tool("shellcheck"), str(DOCKER / "verify.sh")], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def schema_check(file: Path) -> int:
    command = [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(file)]
    return subprocess.run(command, capture_output=True).returncode


def test_compose_file_fits_the_published_schema_and_a_broken_one_does_not(tmp_path: Path) -> None:
    assert schema_check(DOCKER / "compose.yml") == 0
    broken = compose()
    broken["services"]["server-gpu"]["memory_limit"] = "16g"
    (tmp_path / "compose.yml").write_text(yaml.safe_dump(broken))
    assert schema_check(tmp_path / "compose.yml") != 0


@pytest.mark.parametrize("name", DOCKERFILES)
def test_copied_files_exist_and_reach_the_builder(name: str) -> None:
    ignore = (CHECKOUT / ".dockerignore").read_text().split()
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", (DOCKER / name).read_text(), re.MULTILINE)
    sources = [source for line in copies for source in line.split()]
    assert sources
    for source in sources:
        assert (CHECKOUT / source).exists(), source
        assert "!" + source.split("/")[0] in ignore, f".dockerignore keeps {source} away"


def test_mounted_files_exist() -> None:
    for name, service in compose()["services"].items():
        for volume in service.get("volumes", []):
            assert volume["read_only"], f"{name} can write to {volume['source']}"
            assert (DOCKER / volume["source"]).exists(), volume["source"]


def test_the_release_stands_in_one_file_and_is_recent_enough() -> None:
    assert release() >= "26.08", "older ones have a batcher that stalls; below 26.07 there are known vulnerabilities"
    for file in [*(DOCKER / name for name in DOCKERFILES), DOCKER / "compose.yml", DOCKER / "verify.sh"]:
        assert not re.search(r"\b2\d\.\d\d\b-py3|:2\d\.\d\d\b", file.read_text()), f"{file.name} names a release"
        assert "TRITON_RELEASE" in file.read_text()
    first_line = (DOCKER / "known-flags.txt").read_text().splitlines()[0]
    assert f"tritonserver {release()} " in first_line, "renew known-flags.txt from the release's source"


def pins(text: str) -> dict[str, str]:
    return {
        name.lower().replace("_", "-"): version
        for name, version in re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", text, re.MULTILINE)
    }


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-export.txt"])
def test_image_pins_agree_with_the_project_and_are_hashed(name: str) -> None:
    text = (DOCKER / name).read_text()
    project = {}
    for line in (CHECKOUT / "constraints.txt").read_text().splitlines():
        if 'python_version < "3.11"' not in line:
            project |= pins(line)
    image = pins(text)
    known = {key: version for key, version in image.items() if key in project}
    assert known == {key: project[key] for key in known}
    assert {"numpy", "tokenizers"} <= known.keys()
    for block in re.split(r"^(?=[A-Za-z0-9_.-]+==)", text, flags=re.MULTILINE)[1:]:
        assert "--hash=sha256:" in block, block.splitlines()[0]


@pytest.mark.parametrize("configuration", ["cpu", "onnxruntime", "tensorrt"])
def test_every_server_flag_exists_in_the_release_and_is_explained(configuration: str) -> None:
    used = {argument.partition("=")[0] for argument in started_flags(configuration)}
    assert used <= flags_in((DOCKER / "known-flags.txt").read_text())
    explained = re.findall(
        r"^\| `(--[a-z-]+)(?:=([^`]*))?` \| (.+) \|$", (DOCKER / "README.md").read_text(), re.MULTILINE
    )
    explained = [entry for entry in explained if configuration == "cpu" or "only for `cpu`" not in entry[2]]
    assert {flag for flag, _, _ in explained} == used
    given = set(started_flags(configuration))
    assert {f"{flag}={value}" for flag, value, _ in explained if value} <= given


def test_container_closes_what_the_local_server_closes() -> None:
    arguments = started_flags("onnxruntime")
    assert "--model-control-mode=none" in arguments
    for flag in ("--http-restricted-api", "--grpc-restricted-protocol"):
        (value,) = [argument for argument in arguments if argument.startswith(flag)]
        assert set(CLOSED_APIS.split(",")) <= set(value.partition("=")[2].partition(":")[0].split(","))
    assert f"KEY_HEADER = {KEY_HEADER!r}".replace("'", '"') in (DOCKER / "start.py").read_text()
    assert "STACK_BYTES = 64 << 20\n" in (DOCKER / "start.py").read_text()
    assert "OPEN_FILES = 1 << 16\n" in (DOCKER / "start.py").read_text()
    assert (STACK_BYTES, OPEN_FILES) == (64 << 20, 1 << 16)
    assert [a for a in arguments if a.startswith("--model-repository")] == ["--model-repository=/models"]


def test_compose_publishes_on_loopback_only_and_never_the_metrics_port() -> None:
    for name, service in compose()["services"].items():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} publishes {port}"
            assert not port.endswith(":8002"), f"{name} publishes {port}"


def test_compose_limits_every_service() -> None:
    for name, service in compose()["services"].items():
        assert {"cpus", "mem_limit", "read_only", "cap_drop", "security_opt"} <= service.keys(), name
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        if name.startswith("server"):
            assert {"shm_size", "pids_limit", "stop_grace_period"} <= service.keys()
            assert service["user"] == "1000:1000"
    (device,) = compose()["services"]["server-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", 1, ["gpu"])


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_run_as_nobody_in_particular(name: str) -> None:
    assert re.findall(r"^USER (.+)$", (DOCKER / name).read_text(), re.MULTILINE)[-1:] == ["1000:1000"]


@pytest.mark.parametrize(
    ("file", "parameter"), [("config.pbtxt", "num_threads"), ("configs/onnxruntime.pbtxt", "intra_op_thread_count")]
)
def test_cpu_limit_is_the_threads_of_all_instances(file: str, parameter: str) -> None:
    text = (CHECKOUT / "model_repository/classifier" / file).read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    threads = sum(group.count for group in config.instance_group) * int(config.parameters[parameter].string_value)
    assert compose()["services"]["server-cpu"]["cpus"] == threads


def test_memory_limit_is_enough_for_all_instances() -> None:
    text = (CHECKOUT / "model_repository/classifier/config.pbtxt").read_text()
    instances = sum(group.count for group in text_format.Parse(text, model_config_pb2.ModelConfig()).instance_group)
    limit = compose()["services"]["server-cpu"]["mem_limit"]
    assert int(limit.removesuffix("g")) >= 0.5 + 0.7 * instances, "model_repository/README.md: Instances and threads"


def test_metrics_address_is_the_one_that_prometheus_asks() -> None:
    (job,) = yaml.safe_load((DOCKER / "prometheus.yml").read_text())["scrape_configs"]
    for name in ("server-cpu", "server-gpu"):
        service = compose()["services"][name]
        address = service["environment"]["METRICS_ADDRESS"]
        assert service["networks"]["monitoring"]["ipv4_address"] == address
        assert job["static_configs"] == [{"targets": [f"{address}:8002"]}]
        assert f"--metrics-url http://{address}:8002/metrics" in (DOCKER / "verify.sh").read_text()


def test_health_check_asks_something_new_each_time_and_wants_a_label() -> None:
    texts = []
    answers = [
        (200, b'{"label": "positive"}'),
        (200, b'{"label": "negative"}'),
        (200, b'{"error": "no model"}'),
        (400, b'{"error":"Exceeds maximum queue size"}'),
    ]

    class Model(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            texts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            status, answer = answers[len(texts) - 1]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Model) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [sys.executable, "-S", str(DOCKER / "healthcheck.py"), f"http://127.0.0.1:{server.server_port}"]
        runs = [subprocess.run(command, capture_output=True, text=True) for _ in answers]
        server.shutdown()
    assert [run.returncode for run in runs] == [0, 0, 1, 1]
    assert "expected a label" in runs[2].stderr
    assert "Exceeds maximum queue size" in runs[3].stderr
    assert len(set(texts)) == len(answers), "a response cache would answer without the models"


def test_stop_allows_more_time_than_triton_takes() -> None:
    (seconds,) = re.findall(r"^--exit-timeout-secs=(\d+)$", (DOCKER / "server.flags").read_text(), re.MULTILINE)
    grace = compose()["services"]["server-cpu"]["stop_grace_period"]
    assert int(grace.removesuffix("s")) > int(seconds)


def copy_into_image(folder: Path) -> Path:
    """Returns `folder` as the image's /opt/sentiment: with what the Dockerfile copies, nothing else of the checkout."""
    for line in re.findall(r"^COPY (?!--from)(.+)$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE):
        *sources, target = line.split()
        if not target.startswith("/opt/sentiment/"):
            continue
        copied = folder / target.removeprefix("/opt/sentiment/")
        for source in sources:
            if (CHECKOUT / source).is_dir():
                shutil.copytree(CHECKOUT / source, copied, dirs_exist_ok=True)
            else:
                copied.mkdir(parents=True, exist_ok=True)
                shutil.copy(CHECKOUT / source, copied)
    return folder


def start(repository: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    image = copy_into_image(repository.parent / "image")
    # -S: the image's Python has none of this environment's packages.
    command = [
        sys.executable,
        "-S",
        str(image / "docker" / "start.py"),
        f"--model-repository={repository}",
        "--print",
        *arguments,
    ]
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(image), **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True)


def test_start_without_an_engine_serves_onnx_and_says_so(repository: Path) -> None:
    run = start(repository)
    assert run.returncode == 0
    assert "--model-config-name=onnxruntime" in run.stdout
    (line,) = run.stderr.splitlines()
    assert "serving the configuration onnxruntime instead" in line


def test_start_serves_the_configuration_of_cpu_nodes_without_looking_for_an_engine(repository: Path) -> None:
    run = start(repository, CONFIGURATION="cpu", ON_MISMATCH="stop")
    assert (run.returncode, run.stderr) == (0, "")
    assert "--model-config-name=cpu" in run.stdout
    for model in ("tokenizer", "classifier", "sentiment"):
        assert not (repository / model / "configs" / "cpu.pbtxt").exists(), "config.pbtxt is the one meant"


def test_start_stops_when_told_so_instead_of_serving_something_else(repository: Path) -> None:
    run = start(repository, "--configuration=tensorrt", ON_MISMATCH="stop")
    assert (run.returncode, run.stdout) == (1, "")
    assert "make engine" in run.stderr


def test_start_refuses_a_model_that_is_not_the_recorded_one(repository: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(repository, tmp_path / "models")
    with (copy / "classifier/1/model.onnx").open("ab") as file:
        file.write(b"x")
    run = start(copy, "--configuration=onnxruntime")
    assert (run.returncode, run.stdout) == (1, "")
    assert "sha256" in run.stderr


@pytest.mark.parametrize(("name", "value"), [("CONFIGURATION", "tensorflow"), ("RESPONSE_CACHE_MIB", "1g")])
def test_start_names_a_wrong_environment_variable(repository: Path, name: str, value: str) -> None:
    run = start(repository, **{name: value})
    assert run.returncode == 2
    assert f"'{value}' came" in run.stderr


def test_response_cache_has_no_memory_unless_given(repository: Path) -> None:
    assert "--cache-config" not in start(repository).stdout
    assert "--cache-config=local,size=67108864" in start(repository, RESPONSE_CACHE_MIB="64").stdout


def machine(**changes: Any) -> engine_manifest.Machine:
    facts: dict[str, Any] = {"tensorrt": "11.4.0", "compute_capabilities": ("9.0",), "gpu": "H200", "driver": "610.1"}
    return engine_manifest.Machine(**{**facts, **changes})


@pytest.fixture
def engine(repository: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A model repository with an installed engine (its plan is not one), and its labels repository."""
    models = shutil.copytree(repository, tmp_path / "models")
    labels = tmp_path / "tensorrt"
    files = {}
    for root, name in (
        (models, engine_manifest.ENGINE_FILE),
        (labels, engine_manifest.LABELS_FILE),
        (models, engine_manifest.TOKENIZER_FILE),
        (models, engine_manifest.MODEL_FILE),
    ):
        if not (root / name).exists():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(name.encode())
        files[name] = engine_manifest.describe(root / name)
    facts = {"tensorrt": "11.4.0", "compute_capability": "9.0", "gpu": "H200", "driver": "610.1"}
    path = engine_manifest.engine_manifest_path(models)
    path.write_text(json.dumps({"machine": facts, "files": files}))
    return models, labels


def test_an_engine_of_this_machine_is_served(engine: tuple[Path, Path]) -> None:
    models, labels = engine
    manifest = engine_manifest.check_engine(models, machine(), labels)
    assert manifest["machine"]["compute_capability"] == "9.0"
    engine_manifest.check_engine(
        models, machine(driver="700.0", gpu="H100", compute_capabilities=("9.0", "9.0")), labels
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param({"tensorrt": "11.3.0"}, "TensorRT 11.4.0, this machine has 11.3.0", id="tensorrt"),
        pytest.param({"compute_capabilities": ("8.9",)}, "compute capability 9.0", id="gpu"),
        pytest.param({"compute_capabilities": ("9.0", "8.9")}, "this machine has 8.9", id="one of two gpus"),
    ],
)
def test_an_engine_of_another_machine_is_refused(
    engine: tuple[Path, Path], changes: dict[str, Any], reason: str
) -> None:
    models, labels = engine
    with pytest.raises(engine_manifest.EngineError, match=reason) as refusal:
        engine_manifest.check_engine(models, machine(**changes), labels)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["plan", "labels", "tokenizer", "model"])
def test_an_engine_with_another_file_than_recorded_is_refused(engine: tuple[Path, Path], name: str) -> None:
    models, labels = engine
    file = {
        "plan": models / engine_manifest.ENGINE_FILE,
        "labels": labels / engine_manifest.LABELS_FILE,
        "tokenizer": models / engine_manifest.TOKENIZER_FILE,
        "model": models / engine_manifest.MODEL_FILE,  # another one was installed after the engine
    }[name]
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(engine_manifest.EngineError, match="is not the file"):
        engine_manifest.check_engine(models, machine(), labels)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"machine": null, "files": {}}', '{"machine": {}, "files": {}}'])
def test_a_broken_engine_manifest_is_refused(repository: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "classifier").mkdir()
    engine_manifest.engine_manifest_path(tmp_path).write_text(content)
    with pytest.raises(engine_manifest.EngineError, match="engine"):
        engine_manifest.check_engine(tmp_path, machine(), tmp_path)


def test_engine_image_has_every_package_that_building_imports(tmp_path: Path) -> None:
    """With the packages of requirements-export.txt and no others; TensorRT is the image's own."""
    names = re.findall(r"^([\w.-]+)==", (DOCKER / "requirements-export.txt").read_text(), re.MULTILINE)
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):  # CUDA's are not installed beside a CPU's torch
            files = metadata.files(name) or []
            for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
                if not (tmp_path / top).exists():
                    (tmp_path / top).symlink_to(metadata.distribution(name).locate_file(top))
    modules = ("tensorrt", "parity", "engine_graph", "engine_install", "engine_manifest", "engine_plan")
    imports = "; ".join(f"import export.{module}" for module in modules) + "; import training.data, training.provenance"
    environment = {"PYTHONPATH": f"{tmp_path}:{CHECKOUT}", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-S", "-c", imports], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_packages_of_the_server_image_install_and_import(tmp_path: Path) -> None:
    """The Dockerfile's own command, in the image's Python version; needs that and the package index."""
    python = os.environ.get("IMAGE_PYTHON")
    if not python:
        pytest.skip("IMAGE_PYTHON is not set: name a Python 3.12 to run the image's pip command with, some 10 s")
    (command,) = re.findall(
        r"^RUN (pip install .*?\\\n.*?) \\\n && ", (DOCKER / "Dockerfile").read_text(), re.MULTILINE | re.DOTALL
    )
    arguments = command.replace("\\\n", " ").replace("/opt/sentiment", str(tmp_path)).split()
    arguments[arguments.index("/tmp/requirements.txt")] = str(DOCKER / "requirements.txt")
    subprocess.run([python, "-m", *arguments], check=True, capture_output=True)
    steps = f"{CHECKOUT}/model_repository/tokenizer:{CHECKOUT}/model_repository/classifier"
    environment = {"PYTHONPATH": f"{tmp_path}/packages:{steps}"}
    subprocess.run(
        [python, "-c", "import engine, fused_graph, onnxruntime, openvino, review_text"], env=environment, check=True
    )
    assert sorted(path.name for path in (tmp_path / "packages").glob("*.dist-info")) == [
        "ml_dtypes-0.5.4.dist-info",
        "numpy-1.26.4.dist-info",
        "onnx-1.23.2.dist-info",
        "onnxruntime-1.32.0.dist-info",
        "openvino-2026.4.1.dist-info",
        "protobuf-6.33.6.dist-info",
        "tokenizers-0.22.2.dist-info",
        "typing_extensions-4.16.0.dist-info",
    ]
