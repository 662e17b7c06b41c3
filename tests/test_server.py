"""The real server over every protocol: what it answers to whom."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from serving import Server, classifier_counts, generate, get, infer, post, probabilities, texts, triton_request
from tiny_model import REVIEWS
from tritonclient.grpc import service_pb2, service_pb2_grpc

from model_repository.classifier.engine import ONNXRUNTIME, choose
from model_repository.tokenizer.review_text import ReviewEncoder

CLOSE = 1e-4
"""The tiny model computes in fp32: company changes a probability in its last digits only."""


def test_start_announces_a_curl_line_with_its_answer(server: Server) -> None:
    match = re.search(r"curl -s (\S+) \\\n +-d '(.*)'\n +(.*)\n", server.announcement)
    assert match, server.announcement
    status, answer = post(match[1], match[2].encode())
    assert (status, answer) == (200, json.loads(match[3]))


def test_generate_answers_a_single_review(server: Server) -> None:
    status, answer = generate(server, REVIEWS[0])
    assert status == 200
    assert answer["label"] == ("negative", "positive")[int(np.argmax(answer["probabilities"]))]
    assert answer["score"] == max(answer["probabilities"])
    assert sum(answer["probabilities"]) == pytest.approx(1)


def test_generate_answers_a_list_in_order(server: Server) -> None:
    alone = [generate(server, review)[1] for review in REVIEWS]
    status, together = generate(server, list(REVIEWS))
    assert status == 200
    assert together["label"] == [answer["label"] for answer in alone]
    assert together["score"] == pytest.approx([answer["score"] for answer in alone], abs=CLOSE)
    assert len(set(together["label"])) == 2


def test_infer_answers_kserve_json(server: Server) -> None:
    status, answer = infer(server, texts(list(REVIEWS)))
    assert status == 200
    outputs = {output["name"]: output for output in answer["outputs"]}
    assert {name: (output["datatype"], output["shape"]) for name, output in outputs.items()} == {
        "label": ("BYTES", [len(REVIEWS), 1]),
        "score": ("FP32", [len(REVIEWS), 1]),
        "probabilities": ("FP32", [len(REVIEWS), 2]),
    }


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_tritonclient_gets_the_answers_of_generate(server: Server, protocol: str) -> None:
    module = getattr(tritonclient, protocol)
    with module.InferenceServerClient(f"127.0.0.1:{server.ports[protocol]}") as client:
        request = triton_request(module, [review.encode() for review in REVIEWS])  # binary tensors over both
        result = client.infer("sentiment", [request])
    expected = generate(server, list(REVIEWS))[1]
    assert [label.decode() for label in result.as_numpy("label").ravel()] == expected["label"]
    np.testing.assert_allclose(result.as_numpy("score").ravel(), expected["score"], atol=CLOSE)
    np.testing.assert_allclose(result.as_numpy("probabilities").ravel(), expected["probabilities"], atol=CLOSE)


def test_open_inference_protocol_over_plain_grpc(server: Server) -> None:
    """As KServe's client sends it: strings in the message's typed contents instead of raw bytes."""
    request = service_pb2.ModelInferRequest(model_name="sentiment")
    tensor = request.inputs.add(name="text", datatype="BYTES", shape=[2, 1])
    tensor.contents.bytes_contents.extend(review.encode() for review in REVIEWS[:2])
    with grpc.insecure_channel(f"127.0.0.1:{server.ports['grpc']}") as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        assert stub.ModelReady(service_pb2.ModelReadyRequest(name="sentiment")).ready
        response = stub.ModelInfer(request)
    assert {output.name: list(output.shape) for output in response.outputs} == {
        "label": [2, 1],
        "score": [2, 1],
        "probabilities": [2, 2],
    }


def test_largest_batch_is_answered_and_one_more_is_refused_clearly(server: Server) -> None:
    reviews = [f"{REVIEWS[index % 5]} {index}" for index in range(64)]
    assert probabilities(server, reviews).shape == (64, 2)
    status, answer = infer(server, texts([*reviews, "one more"]))
    assert status == 400
    assert "batch-size must be <= 64" in answer["error"]


def test_a_review_is_answered_alike_alone_and_in_company(server: Server) -> None:
    alone = np.concatenate([probabilities(server, [review]) for review in REVIEWS])
    company = [word for review in REVIEWS for word in review.split()][: 64 - len(REVIEWS)]
    np.testing.assert_allclose(probabilities(server, [*REVIEWS, *company])[: len(REVIEWS)], alone, atol=CLOSE)


def test_concurrent_requests_of_mixed_lengths_share_executions(server: Server) -> None:
    before = classifier_counts(server)
    # 1 to 15 words, each four tokens here: no two in a row of as many tokens.
    requests = [triton_request(tritonclient.grpc, [b"word " * (1 + index % 15)]) for index in range(300)]
    address = f"127.0.0.1:{server.ports['grpc']}"
    with tritonclient.grpc.InferenceServerClient(address) as client, ThreadPoolExecutor(32) as pool:
        list(pool.map(lambda request: client.infer("sentiment", [request]), requests))
    after = classifier_counts(server)
    assert after["inference_count"] - before["inference_count"] == 300
    # Merged, but four at most: more would wait for each other in one instance while the other has nothing to do.
    assert 300 / 4 <= after["execution_count"] - before["execution_count"] < 240


def own_metrics(server: Server) -> dict[str, float]:
    """Returns the models' own metrics by name and labels, once they stand still."""
    classifier_counts(server)  # it comes to rest after the metrics do
    status, metrics = get(server.metrics_url)
    assert status == 200
    return {name: float(value) for name, value in re.findall(r"^(sentiment_\S+) (\S+)$", metrics, re.MULTILINE)}


def test_metrics_count_tokens_reviews_and_full_windows(server: Server, tiny_checkpoint: Path) -> None:
    reviews = [REVIEWS[0], "short", "word " * 100]
    lengths = [len(row) for row in ReviewEncoder(tiny_checkpoint / "tokenizer.json").encode(reviews)]
    assert lengths[-1] == 64, "the last fills the window"
    before = own_metrics(server)
    assert generate(server, reviews)[0] == 200
    grown = {name: value - before[name] for name, value in own_metrics(server).items()}
    assert grown['sentiment_classifier_tokens{kind="review"}'] == sum(lengths)
    assert 0 <= grown['sentiment_classifier_tokens{kind="padding"}'] < 3 * 8
    assert grown["sentiment_classifier_batch_reviews_sum"] == len(reviews)
    assert grown["sentiment_classifier_batch_reviews_count"] == 1
    assert sum(value for name, value in grown.items() if name.startswith("sentiment_classifier_reviews{")) == 3
    assert grown["sentiment_reviews_filling_window"] == 1


def test_metrics_count_the_padding_of_reviews_that_share_a_run(server: Server, tiny_checkpoint: Path) -> None:
    reviews = ["word word", "word word a"]
    lengths = [len(row) for row in ReviewEncoder(tiny_checkpoint / "tokenizer.json").encode(reviews)]
    assert 8 < lengths[0] < lengths[1] <= 12, "one width, whether in steps of 4 or 8"
    before = own_metrics(server)
    assert generate(server, reviews)[0] == 200
    padding = 'sentiment_classifier_tokens{kind="padding"}'
    width = lengths[1] if choose() == ONNXRUNTIME else 16
    assert own_metrics(server)[padding] - before[padding] == 2 * width - sum(lengths)


def test_every_port_listens_on_loopback_alone(server: Server) -> None:
    tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    listening = [line.split()[1] for lines in tables for line in lines if line.split()[3] == "0A"]
    for name, port in server.ports.items():
        addresses = [address for address in listening if address.endswith(f":{port:04X}")]
        assert addresses, name
        for address in addresses:  # 127.0.0.1 as IPv4 has it, and as IPv6 writes it
            assert address in (f"0100007F:{port:04X}", f"0000000000000000FFFF00000100007F:{port:04X}"), name


def test_nothing_is_written_to_the_home_folder(server: Server) -> None:
    """OpenVINO's telemetry would put an analytics id there, ONNX Runtime's a device id and a database."""
    assert generate(server, REVIEWS[0])[0] == 200
    assert list(server.home.rglob("*")) == []
