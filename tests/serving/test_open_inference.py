"""The Open Inference Protocol with JSON, binary data and a client."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from requesting import Reply
from served import SMALL, Site, picture, served, tiny
from waiting import eventually

from useg.serving import open_inference

IMAGES = np.stack([picture(24, 20, seed) for seed in range(2)])
INFER = "/v2/models/street/infer"


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with served() as running:
        yield running


def tensor(**changes: Any) -> dict[str, Any]:
    return {
        "name": "image",
        "datatype": "UINT8",
        "shape": [2, 20, 24, 3],
        "data": IMAGES.tolist(),
    } | changes


def infer(site: Site, content: dict[str, Any], binary_data: bytes = b"") -> Reply:
    text = json.dumps(content).encode()
    headers = {"inference-header-content-length": str(len(text))} if binary_data else {}
    return site.ask(INFER, text + binary_data, **headers)


def test_server_and_model_metadata(site: Site) -> None:
    assert site.ask("/v2").json["extensions"] == ["binary_tensor_data"]
    assert site.ask("/v2/health/live").json == {"live": True}
    assert site.ask("/v2/health/ready").json == {"ready": True}
    assert site.ask("/v2/models/street/ready").json == {"name": "street", "ready": True}
    content = site.ask("/v2/models/street").json
    assert content["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, -1, -1, 3]}]
    assert [output["shape"] for output in content["outputs"]] == [[-1, -1, -1], [-1, 4, -1, -1]]


@pytest.mark.parametrize("data", [IMAGES.tolist(), IMAGES.ravel().tolist()])
def test_tensors_in_json(site: Site, data: list[Any]) -> None:
    content = infer(
        site,
        {
            "id": "7",
            "inputs": [tensor(data=data)],
            "outputs": [{"name": "label_map"}, {"name": "probabilities"}],
        },
    ).json
    assert (content["model_name"], content["id"]) == ("street", "7")
    labels, probabilities = content["outputs"]
    assert (labels["name"], labels["datatype"], labels["shape"]) == (
        "label_map",
        "UINT8",
        [2, 20, 24],
    )
    assert labels["data"] == np.stack([tiny()(image) for image in IMAGES]).ravel().tolist()
    assert probabilities["shape"] == [2, 4, 20, 24]
    expected = np.stack([tiny().probabilities(image) for image in IMAGES])
    assert (np.array(probabilities["data"], np.float32).reshape(expected.shape) == expected).all()


def test_binary_data_follow_the_json(site: Site) -> None:
    given = {
        "name": "image",
        "datatype": "UINT8",
        "shape": [2, 20, 24, 3],
        "parameters": {"binary_data_size": IMAGES.nbytes},
    }
    answer = infer(
        site, {"inputs": [given], "parameters": {"binary_data_output": True}}, IMAGES.tobytes()
    )
    length = int(answer.headers["inference-header-content-length"])
    content = json.loads(answer.content[:length])
    assert content["outputs"] == [
        {
            "name": "label_map",
            "datatype": "UINT8",
            "shape": [2, 20, 24],
            "parameters": {"binary_data_size": 960},
        }
    ]
    assert answer.content[length:] == np.stack([tiny()(image) for image in IMAGES]).tobytes()


@pytest.mark.parametrize("binary", [True, False])
def test_triton_s_client_gets_the_offline_prediction(site: Site, binary: bool) -> None:
    with warnings.catch_warnings():
        # Triton's client warns about its own packages.
        warnings.simplefilter("ignore")
        client_module = pytest.importorskip("tritonclient.http")
        client = client_module.InferenceServerClient(f"127.0.0.1:{site.port}")
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("street")
        assert not client.is_model_ready("other")
        assert client.get_model_metadata("street")["name"] == "street"
        given = client_module.InferInput("image", list(IMAGES.shape), "UINT8")
        given.set_data_from_numpy(IMAGES, binary_data=binary)
        wanted = [
            client_module.InferRequestedOutput(name, binary_data=binary)
            for name in ("label_map", "probabilities")
        ]
        result = client.infer("street", [given], outputs=wanted)
        client.close()
    assert (result.as_numpy("label_map") == np.stack([tiny()(image) for image in IMAGES])).all()
    assert (
        result.as_numpy("probabilities")
        == np.stack([tiny().probabilities(image) for image in IMAGES])
    ).all()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            {},
            "the request does not follow the Open Inference Protocol (KeyError); see GET /v2/",
        ),
        (
            {"inputs": []},
            "the request does not follow the Open Inference Protocol (ValueError); see GET /v2/",
        ),
        ({"inputs": 3}, "the request does not follow the Open Inference Protocol (TypeError)"),
        (
            {"inputs": [tensor(name="picture")]},
            "the input 'picture' is not known; choose one of image",
        ),
        (
            {"inputs": [tensor(datatype="INT8")]},
            "the datatype 'INT8' is not known; choose one of FP32, UINT16, UINT8; did you mean",
        ),
        (
            {"inputs": [tensor(datatype=[])]},
            "the request does not follow the Open Inference Protocol (TypeError)",
        ),
        (
            {"inputs": [tensor(shape=[20, 24, 3])]},
            "the input has the shape [20, 24, 3]; give [images, height, width, bands]",
        ),
        ({"inputs": [tensor(shape=[2, 20, 24, 0])]}, "the input has the shape [2, 20, 24, 0]"),
        ({"inputs": [tensor(shape=[2, 20, 24, 10**30])]}, "the input's shape needs "),
        (
            {"inputs": [tensor(shape=[2, 20, 25, 3])]},
            "the input's shape needs 3,000 numbers, but its data have 2,880; send as many numbers",
        ),
        (
            {"inputs": [tensor(data=[[1], [2, 3]])]},
            "the request does not follow the Open Inference Protocol (ValueError)",
        ),
        (
            {"inputs": [tensor(shape=[1, 1, 1, 3], data=[1, 2, 256])]},
            "the input has numbers that uint8 cannot represent; send integers from 0 to 255",
        ),
        (
            {"inputs": [tensor(shape=[1, 1, 1, 3], data=[1, 2, 0.5])]},
            "the input has numbers that uint8 cannot represent",
        ),
        (
            {"inputs": [tensor(shape=[1, 1, 1, 3], data=["a", "b", "c"])]},
            "the input's data are not numbers; send numbers",
        ),
        (
            {"inputs": [tensor(parameters={"binary_data_size": 9})]},
            "the input's shape needs 2,880 bytes, but 0 follow the JSON; send as many bytes as the",
        ),
        (
            {"inputs": [tensor()], "outputs": [{"name": "logits"}]},
            "the output 'logits' is not known; choose one of label_map, probabilities",
        ),
        (
            {"inputs": [tensor(datatype="FP32")]},
            "the image holds float32 values from 0 to 255, but the model takes uint8",
        ),
        (
            {"inputs": [tensor(shape=[4, 20, 24, 1], data=[0] * 1920)], "outputs": [{}]},
            "the request does not follow the Open Inference Protocol (KeyError)",
        ),
    ],
)
def test_a_request_against_the_protocol_is_refused(
    site: Site, content: dict[str, Any], sentence: str
) -> None:
    answer = infer(site, content)
    assert answer.status == 400, answer.content
    assert answer.json["error"].startswith(sentence)


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"[" * 100_000, {}, 400),
        (b'{"inputs"', {}, 400),
        (b"\xff\xfe", {}, 400),
        (b"{}", {"inference-header-content-length": "-3"}, 400),
        (b"{}", {"inference-header-content-length": "99999999999999999999999"}, 400),
        (
            json.dumps({"inputs": [tensor(shape=[1, 200, 201, 1], data=[0] * 40_200)]}).encode(),
            {},
            413,
        ),
        (b"", {}, 400),
    ],
)
def test_a_malformed_body_is_refused(
    site: Site, body: bytes, headers: dict[str, str], status: int
) -> None:
    assert site.ask(INFER, body, **headers).status == status


@pytest.mark.parametrize(
    ("body", "length", "sentence"),
    [
        (b"[" * 2_000_001, None, "the body has more than the allowed 2,000,000 bytes"),
        (b"[" * 100, "3000000", "the request has 3,000,000 bytes of JSON, more than the allowed"),
        (b"[" * 250_000, None, "the JSON has more than 200,000 lists or 1,000 names; send the"),
        (b'"a",' * 1000, None, "the JSON has more than 200,000 lists or 1,000 names; send the"),
        (b"{}," * 2000, None, "the JSON has more than 200,000 lists or 1,000 names; send the"),
    ],
)
def test_json_that_is_costly_to_parse_is_refused(
    site: Site,
    body: bytes,
    length: str | None,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(site.service, "limits", replace(SMALL, upload_bytes=4_000_000))
    monkeypatch.setattr(site.service.uploads, "limits", site.service.limits)
    headers = {} if length is None else {"inference-header-content-length": length}
    answer = site.ask(INFER, body, **headers)
    assert (answer.status, answer.json["error"][: len(sentence)]) == (413, sentence)


@pytest.mark.parametrize("length", ["9" * 5000, "-1", "\u00b2", "0x10", "", "1" * 19])
def test_a_length_of_json_that_is_no_number_of_bytes_is_refused(site: Site, length: str) -> None:
    answer = site.ask(INFER, b"{}", inference_header_content_length=length)
    assert (answer.status, answer.json["error"][:41]) == (
        400,
        "the header inference-header-content-lengt",
    )


def test_the_outputs_have_one_limit_together(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"inputs": [tensor()], "outputs": [{"name": "label_map"}, {"name": "probabilities"}]}
    monkeypatch.setattr(open_inference, "MAX_JSON_VALUES", 2 * 20 * 24 * 5)
    assert infer(site, both).status == 200
    monkeypatch.setattr(open_inference, "MAX_JSON_VALUES", 2 * 20 * 24 * 5 - 1)
    answer = infer(site, both)
    assert (answer.status, answer.json["error"]) == (
        413,
        "the outputs have 4,800 values, too many for JSON; ask for binary data, or send fewer or "
        "smaller images",
    )


def test_binary_outputs_have_the_limit_of_every_response(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = replace(SMALL, response_bytes=2 * 20 * 24 * 16 - 1)
    monkeypatch.setattr(site.service.uploads, "limits", limits)
    wanted = {"name": "probabilities", "parameters": {"binary_data": True}}
    answer = infer(site, {"inputs": [tensor()], "outputs": [wanted]})
    assert answer.status == 413
    assert answer.json["error"].startswith("the response has 15,360 bytes or more")
    eventually(lambda: site.service.uploads.response_bytes == 0)
