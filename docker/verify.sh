#!/usr/bin/env bash
# Everything that needs a Docker engine and a GPU, once, into one report:
#
#   docker/verify.sh                                              # the configurations and the shipped model
#   ONNX=artefacts/mine/onnx/fp16/model.onnx CHECKPOINT=artefacts/mine docker/verify.sh    # also builds an engine
#   DATA=/data/imdb docker/verify.sh                 # scores all of a folder's test.parquet, not two examples
#
# Builds the images (that of engines only with ONNX and CHECKPOINT), starts each configuration under Compose, runs the
# client tests against it, the parity gate and the load test. Writes artefacts/verify/report.md; exit status 1 if anything
# failed. It removes its containers.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
case "${1:-}" in -h | --help) sed -n '2,10p' "$0"; exit 0 ;; esac
for tool in docker nvidia-smi make; do
  command -v "$tool" >/dev/null || { echo "verify.sh: $tool was not found; run this on a GPU node with Docker" >&2; exit 2; }
done
# shellcheck source=/dev/null
source docker/.env
report=artefacts/verify/report.md
mkdir -p artefacts/verify/logs
failures=0
compose=(docker compose -f docker/compose.yml)

say() { echo "$*" | tee -a "$report"; }

check() { # check NAME COMMAND...: runs it, its output in a log, one line in the report
  local name=$1 log status=passed
  log=artefacts/verify/logs/$(tr -c 'a-z0-9\n' - <<<"${name,,}").log
  shift
  "$@" >"$log" 2>&1 || { status=FAILED; failures=$((failures + 1)); }
  say "| $name | $status | $log |"
}

wait_healthy() { # wait_healthy SERVICE: until the health check's first real prediction
  local id state
  id=$("${compose[@]}" ps -q "$1")
  for _ in $(seq 120); do
    state=$(docker inspect -f '{{.State.Health.Status}}' "$id" 2>/dev/null) || return 1
    [ "$state" = healthy ] && return 0
    sleep 3
  done
  docker logs "$id"
  return 1
}

classify() { # the request that ends Triton 2.51.0 (README, Limits): does this release answer it, with whatever status?
  curl -s -o /dev/null --max-time 30 http://127.0.0.1:8000/v2/models/sentiment/infer -d '{"inputs": [{"name": "text",
    "datatype": "BYTES", "shape": [1, 1], "data": ["good"]}], "outputs": [{"name": "label", "parameters": {"classification": 1}}]}'
}

serve() { # serve SERVICE CONFIGURATION [LOAD]: starts it, tests it, stops it
  local service=$1 configuration=$2 load=${3:-slo} profile=${1#server-}
  export CONFIGURATION=$configuration ON_MISMATCH=stop
  check "$service $configuration starts" "${compose[@]}" --profile "$profile" up --build --detach
  check "$service $configuration answers" wait_healthy "$service"
  check "$service $configuration client tests" env SENTIMENT_URL=http://127.0.0.1:8000 \
    SENTIMENT_GRPC_URL=grpc://127.0.0.1:8001 .venv/bin/python -m pytest -q tests/test_running_service.py
  local scored=accuracy
  [ -n "${DATA:-}" ] || scored="two examples"  # DATA=FOLDER with IMDb's test.parquet scores all of them
  check "$service $configuration $scored" make evaluate MODEL=grpc://127.0.0.1:8001 ${DATA:+"DATA=$DATA"}
  check "$service $configuration SLO gate" make bench PROFILE="$load" \
    BENCH_ARGS="--no-start --metrics-url http://192.168.251.2:8002/metrics" # not published: the monitoring network's
  check "$service $configuration survives a classification of text" classify
  "${compose[@]}" --profile "$profile" logs --no-color >"artefacts/verify/logs/$service-$configuration.txt" 2>&1
  "${compose[@]}" --profile "$profile" down --timeout 20 >/dev/null 2>&1
}

{
  echo "# Container verification, $(date -u +%FT%TZ)"
  echo
  echo "Commit $(git rev-parse HEAD), release ${TRITON_RELEASE}, $(docker --version)"
  echo
  echo '```'
  nvidia-smi --query-gpu=name,compute_cap,driver_version,memory.total --format=csv
  echo '```'
  echo
  echo "| check | result | log |"
  echo "|---|---|---|"
} >"$report"
trap '"${compose[@]}" --profile cpu --profile gpu down --timeout 20 >/dev/null 2>&1' EXIT

make -s .venv/.ready || exit 2
REVISION=$(git rev-parse HEAD)
export REVISION # for every build by Compose
check "server image builds" "${compose[@]}" --profile gpu build
# shellcheck disable=SC2016  # the container's shell expands it
check "tritonserver knows every flag" docker run --rm --entrypoint bash "sentiment-server:${TRITON_RELEASE}" -c \
  'tritonserver --help > /tmp/help 2>&1; for flag in $(grep -oE "^--[a-z-]+" docker/server.flags); do grep -q -- "$flag" /tmp/help || { echo "unknown $flag"; exit 1; }; done'
if [ -n "${ONNX:-}" ]; then
  check "engine: build, precision, parity gate" make engine ONNX="$ONNX" CHECKPOINT="${CHECKPOINT:?the parity gate compares with it}"
else
  say "| engine: build, precision, parity gate | NOT RUN: set ONNX and CHECKPOINT | |"
fi
serve server-cpu cpu
serve server-cpu onnxruntime smoke # slower on CPUs than what `cpu` runs, so not at the load of the promise
serve server-gpu onnxruntime
if [ -e model_repository/classifier/engine.json ]; then
  serve server-gpu tensorrt
else
  say "| server-gpu tensorrt | NOT RUN: no engine is installed | |"
fi
say ""
docker pull --quiet "nvcr.io/nvidia/tritonserver:${TRITON_RELEASE}-py3" >/dev/null # builds keep no record of their base
say "Base image: $(docker inspect -f '{{join .RepoDigests " "}}' "nvcr.io/nvidia/tritonserver:${TRITON_RELEASE}-py3" 2>/dev/null || echo 'digest unknown: docker pull it')"
say "$failures checks failed."
[ "$failures" -eq 0 ]
