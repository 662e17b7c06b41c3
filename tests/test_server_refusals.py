"""What the real server refuses, how it says so, and that requests on their way meanwhile never notice."""

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from serving import Server, generate, infer, post, probabilities, texts, triton_request
from tiny_model import MAX_LENGTH, REVIEWS
from tritonclient.utils import InferenceServerException

CLOSE = 1e-4
"""The tiny model computes in fp32: company changes a probability in its last digits only."""

NOTHING = "nothing to classify"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param("", NOTHING, id="empty"),
        pytest.param(" \n\t\u2003", NOTHING, id="blank"),
        pytest.param("\x00\x01\x7f", NOTHING, id="control characters"),
        pytest.param("<br /><br />", NOTHING, id="tags"),
        pytest.param("x" * 10_000_000, "10,000,000 bytes; at most 262,144", id="10 MB"),
    ],
)
def test_a_text_without_a_review_is_refused_with_its_row(server: Server, text: str, reason: str) -> None:
    for status, answer in (generate(server, text), infer(server, texts([text]))):
        assert status == 400
        assert "text[0]: review" in answer["error"]
        assert reason in answer["error"]
    assert generate(server, REVIEWS[0])[0] == 200


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize(
    "raw", [pytest.param(b"caf\xe9", id="latin-1"), pytest.param(b"a\xed\xa0\x80b", id="encoded surrogate")]
)
def test_invalid_utf8_is_refused_with_its_offset(server: Server, protocol: str, raw: bytes) -> None:
    module = getattr(tritonclient, protocol)
    client = module.InferenceServerClient(f"127.0.0.1:{server.ports[protocol]}")
    reason = r"text\[1\]: review is not valid UTF-8: byte 0x.. at offset"
    with client, pytest.raises(InferenceServerException, match=reason):
        client.infer("sentiment", [triton_request(module, [b"fine", raw])])


def test_every_bad_row_of_a_request_is_named(server: Server) -> None:
    status, answer = infer(server, texts(["good", "", "good", "<br />"]))
    assert status == 400
    assert re.findall(r"text\[(\d+)\]", answer["error"]) == ["1", "3"]


def test_an_error_stays_short_enough_for_a_grpc_header(server: Server) -> None:
    client = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{server.ports['grpc']}")
    with client, pytest.raises(InferenceServerException, match="and 54 more") as caught:
        client.infer("sentiment", [triton_request(tritonclient.grpc, [b""] * 64)])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_control_characters_inside_a_review_are_dropped(server: Server) -> None:
    clean, dirty = probabilities(server, ["a fine film"]), probabilities(server, ["a f\x00in\x7fe fi\u200blm"])
    np.testing.assert_allclose(dirty, clean, atol=CLOSE)


def test_a_long_review_is_answered_by_its_end(server: Server) -> None:
    end = " film" * MAX_LENGTH
    first, second = probabilities(server, ["dull " * 5000 + end]), probabilities(server, ["great " * 5000 + end])
    np.testing.assert_allclose(first, second, atol=CLOSE)


@pytest.mark.parametrize(
    ("body", "expected_status"),
    [
        pytest.param(rb'{"text": "a\ud800b"}', 500, id="lone surrogate"),
        pytest.param(b'{"text": 3}', 500, id="number"),
        pytest.param(b'{"text": null}', 500, id="null"),
        pytest.param(b'{"text": []}', 400, id="empty list"),
        pytest.param(b"{}", 400, id="no text"),
        pytest.param(b'{"text": ', 500, id="cut JSON"),
        pytest.param(b'{"text": "caf\xe9"}', 400, id="invalid UTF-8 in JSON"),
    ],
)
def test_a_malformed_request_is_answered_by_triton_itself(server: Server, body: bytes, expected_status: int) -> None:
    status, answer = post(f"{server.http_url}/v2/models/sentiment/generate", body)
    assert (status, "error" in answer) == (expected_status, True)
    assert generate(server, REVIEWS[0])[0] == 200


def test_bad_requests_never_disturb_their_neighbours_under_load(server: Server) -> None:
    expected = {review: probabilities(server, [review]) for review in REVIEWS}
    bad = {"": 400, "<br />": 400, "\x01": 400, "y" * (1 << 21): 400}
    mixed = [*REVIEWS, *bad] * 30

    def ask(text: str) -> tuple[int, Any]:
        return generate(server, text)

    with ThreadPoolExecutor(16) as pool:
        for text, (status, answer) in zip(mixed, pool.map(ask, mixed), strict=True):
            assert status == bad.get(text, 200), answer
            if text in bad:
                assert "text[0]" in answer["error"], "the review's fault, not the server's"
            if text in expected:
                np.testing.assert_allclose([answer["probabilities"]], expected[text], atol=CLOSE)


# ---- its inner models and its closed interfaces ----------------------------------------------------------------------


def ids(rows: list[list[int]], mask: list[list[int]]) -> list[dict[str, Any]]:
    shape = [len(rows), len(rows[0])]
    return [
        {"name": name, "datatype": "INT64", "shape": shape, "data": data}
        for name, data in (("input_ids", rows), ("attention_mask", mask))
    ]


@pytest.mark.parametrize(
    ("rows", "mask", "reason"),
    [
        pytest.param([[2, 10**6, 3]], [[1, 1, 1]], "expected 0 to", id="beyond the vocabulary"),
        pytest.param([[2, -1, 3]], [[1, 1, 1]], "expected 0 to", id="negative"),
        pytest.param([[2, 5, 3]], [[0, 0, 0]], "at least one", id="all padding"),
        pytest.param([[2, 5, 3]], [[1, 0, 1]], "then zeros", id="hole in the mask"),
        pytest.param([[5] * (MAX_LENGTH + 1)], [[1] * (MAX_LENGTH + 1)], f"at most {MAX_LENGTH}", id="too long"),
    ],
)
def test_impossible_tokens_fail_alone(
    server: Server, rows: list[list[int]], mask: list[list[int]], reason: str
) -> None:
    """Only who calls the inner classifier directly can send them; reviews on their way meanwhile are answered."""
    with ThreadPoolExecutor(12) as pool:
        bad = [pool.submit(infer, server, ids(rows, mask), "classifier") for _ in range(30)]
        good = [pool.submit(generate, server, "fine") for _ in range(30)]
        for status, answer in (future.result() for future in bad):
            assert status == 400
            assert reason in answer["error"]
        assert [future.result()[0] for future in good] == [200] * 30


@pytest.mark.parametrize(
    "path", ["repository/index", "systemsharedmemory/region/x/register", "logging", "trace/setting"]
)
def test_control_interfaces_are_closed_over_http(server: Server, path: str) -> None:
    status, answer = post(f"{server.http_url}/v2/{path}", {})
    assert status == 403, answer


def test_control_interfaces_are_closed_over_grpc(server: Server) -> None:
    with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{server.ports['grpc']}") as client:
        for call in (
            client.get_model_repository_index,
            client.get_system_shared_memory_status,
            client.get_log_settings,
            client.get_trace_settings,
        ):
            with pytest.raises(InferenceServerException, match="restricted"):
                call()
