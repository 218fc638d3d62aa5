"""The service's predictions are the offline ones; its documentation, headers, errors, token."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import re
import socket
import threading
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from served import Site, encoded, form, labels, picture, served, tiny

from useg.classes import IGNORE, most_probable, palette
from useg.data.annotations.shapes import RunLengths, decode_rle, decompress_rle
from useg.images.image_files import decode_image_and_missing
from useg.inference.polygons import to_geojson, to_polygons
from useg.serving import responses
from useg.serving.site import PAGE, page_files
from useg.visualization import overlay

pytestmark = pytest.mark.wheel

IMAGE = picture()
CONFORMS = ["status_code_conformance", "content_type_conformance", "response_schema_conformance"]


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with served() as running:
        yield running


def test_an_image_in_the_body_returns_its_label_map(site: Site) -> None:
    answer = site.ask("/predict", encoded(IMAGE), accept="image/png")
    assert (answer.status, answer.headers["content-type"]) == (200, "image/png")
    assert (labels(answer.content) == tiny()(IMAGE)).all()
    with Image.open(io.BytesIO(answer.content)) as opened:
        assert (
            np.array(opened.getpalette()[:12]).reshape(4, 3) == palette(tiny().classes)[:4]
        ).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
def test_every_file_format_is_read_from_body_and_form(site: Site, kind: str) -> None:
    content = encoded(IMAGE, kind)
    expected = tiny()(np.array(Image.open(io.BytesIO(content)).convert("RGB")))
    body, form_type = form(content)
    for answer in (
        site.ask("/predict", content, accept="image/png"),
        site.ask("/predict?format=labels", body, content_type=form_type),
    ):
        assert answer.status == 200, answer.content
        assert (labels(answer.content) == expected).all()


def test_images_of_every_size_and_in_grey_are_predicted_as_offline(site: Site) -> None:
    for image in (picture(1, 1), picture(13, 40), picture(200, 200), picture()[..., 0]):
        answer = site.ask("/predict", encoded(image), accept="image/png")
        assert (labels(answer.content) == tiny()(image)).all()


def test_the_overlay_is_the_offline_one(site: Site) -> None:
    answer = site.ask("/predict?format=overlay", encoded(IMAGE))
    assert (
        np.array(Image.open(io.BytesIO(answer.content)))
        == overlay(IMAGE, tiny()(IMAGE), tiny().classes)
    ).all()


def test_json_has_every_class_and_its_share(site: Site) -> None:
    content = site.ask("/predict", encoded(IMAGE)).json
    counts = np.bincount(tiny()(IMAGE).ravel(), minlength=4)
    assert (content["width"], content["height"]) == (60, 40)
    assert content["unlike_training"] is None
    assert [each["pixels"] for each in content["classes"]] == counts.tolist()
    assert [each["share"] for each in content["classes"]] == (counts / 2400).tolist()
    assert content["classes"][1] == {
        "id": 1,
        "name": "b",
        "color": "#f2523d",
        "pixels": int(counts[1]),
        "share": counts[1] / 2400,
    }


def test_polygons_are_the_offline_ones(site: Site) -> None:
    answer = site.ask("/predict", encoded(IMAGE), accept="application/geo+json")
    expected = to_geojson(to_polygons(tiny()(IMAGE)), tiny().classes)
    assert answer.json["features"] == json.loads(json.dumps(expected["features"]))
    assert len(answer.json["classes"]) == 4


def test_probabilities_are_the_offline_ones(site: Site) -> None:
    answer = site.ask("/predict?format=probabilities", encoded(IMAGE))
    with np.load(io.BytesIO(answer.content)) as content:
        assert content["names"].tolist() == ["a", "b", "c", "d"]
        assert content["probabilities"].dtype == np.float32
        assert (content["probabilities"] == tiny().probabilities(IMAGE)).all()


def test_planes_are_the_label_map_and_its_confidence(site: Site) -> None:
    plain = site.ask("/predict?format=planes", encoded(IMAGE))
    assert (plain.headers["x-width"], plain.headers["x-height"]) == ("60", "40")
    ids, confidences = np.frombuffer(plain.content, np.uint8).reshape(2, 40, 60)
    probabilities = tiny().probabilities(IMAGE)
    assert (ids == most_probable(tiny().logits(IMAGE))).all()
    np.testing.assert_allclose(confidences, 255 * probabilities.max(0), atol=0.51)
    import gzip

    packed = site.ask("/predict?format=planes", encoded(IMAGE), accept_encoding="gzip, br")
    assert packed.headers["content-encoding"] == "gzip"
    assert gzip.decompress(packed.content) == plain.content


def test_pixels_without_data_have_no_class_in_any_format(site: Site) -> None:
    image = IMAGE.copy()
    image[:, :25] = 0
    opaque = np.full((40, 60), 255, np.uint8)
    opaque[:, :25] = 0
    content = encoded(np.dstack([image, opaque]))
    image, _ = decode_image_and_missing(content)
    expected = most_probable(tiny().logits(image))[:, 25:]
    planes = site.ask("/predict?format=planes", content).content
    ids, confidences = np.frombuffer(planes, np.uint8).reshape(2, 40, 60)
    assert (ids[:, 25:] == expected).all()
    assert (ids[:, :25] == IGNORE).all()
    assert not confidences[:, :25].any()
    answer = site.ask("/predict?format=probabilities", content)
    with np.load(io.BytesIO(answer.content)) as arrays:
        probabilities = arrays["probabilities"]
    assert not probabilities[:, :, :25].any()
    assert (probabilities[:, :, 25:] == tiny().probabilities(image)[:, :, 25:]).all()
    classes = site.ask("/predict", content).json["classes"]
    counts = np.bincount(expected.ravel(), minlength=4)
    assert [each["pixels"] for each in classes] == counts.tolist()
    assert [each["share"] for each in classes] == (counts / expected.size).tolist()


def test_objects_are_the_offline_ones(site: Site) -> None:
    answer = site.ask("/predict?format=objects", encoded(IMAGE)).json
    expected = tiny().objects(IMAGE)
    assert (answer["width"], answer["height"], answer["kept_apart"]) == (60, 40, False)
    numbers = np.zeros((40, 60), np.uint32)
    for row in answer["objects"]:
        lengths = np.array(decompress_rle(row["segmentation"]["counts"]), np.uint32)
        numbers[decode_rle(RunLengths(lengths.tobytes(), 60, 40, by_columns=True))] = row["id"]
    assert (numbers == expected.numbers).all()
    rows = [
        {key: value for key, value in row.items() if key != "segmentation"}
        for row in answer["objects"]
    ]
    assert rows == expected.table.rows(tiny().classes)


def test_too_many_objects_are_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "MAX_OBJECTS", 0)
    answer = site.ask("/predict?format=objects", encoded(IMAGE))
    assert answer.status == 413
    assert "more than the allowed 0" in answer.json["error"]


def test_a_batch_returns_predictions_in_the_order_of_its_files(site: Site) -> None:
    images = [picture(50 + k, 30, k) for k in range(4)]
    body, kind = form(*map(encoded, images), names=("b.png", "a.png", "../../c.png", "ä b.png"))
    content = site.ask("/predict/batch", body, content_type=kind).json
    assert [each["width"] for each in content["pictures"]] == [50, 51, 52, 53]
    with zipfile.ZipFile(
        io.BytesIO(site.ask("/predict/batch?format=labels", body, content_type=kind).content)
    ) as archive:
        assert archive.namelist() == ["0.png", "1.png", "2.png", "3.png"]
        for k, image in enumerate(images):
            assert (labels(archive.read(f"{k}.png")) == tiny()(image)).all()


def test_the_error_of_a_batch_names_the_file(site: Site) -> None:
    body, kind = form(encoded(IMAGE), b"not an image", names=("good.png", "bad.png"))
    answer = site.ask("/predict/batch", body, content_type=kind)
    assert answer.status == 400
    assert answer.json["error"].startswith("'image 2 (bad.png)' is not an image that useg can read")


def test_model_describes_the_model_and_the_limits(site: Site) -> None:
    content = site.ask("/model").json
    assert (content["name"], content["channels"], content["pixels"], content["runtime"]) == (
        "street",
        3,
        "uint8",
        "torch",
    )
    assert [each["name"] for each in content["classes"]] == ["a", "b", "c", "d"]
    limits = {"bytes": 200_000, "pixels": 40_000, "pictures": 4, "seconds": 25}
    assert content["limits"] == limits | {"memory": site.service.memory}


def test_health_and_metrics(site: Site) -> None:
    assert site.ask("/healthz").json == {"status": "ok"}
    assert site.ask("/readyz").json == {"status": "ready"}
    site.ask("/predict", encoded(IMAGE))
    site.ask("/no/such/place")
    text = site.ask("/metrics").content.decode()
    assert re.search(r'useg_requests_total\{route="/predict",status="200"\} [1-9]', text)
    assert re.search(r'useg_requests_total\{route="other",status="404"\} [1-9]', text)
    assert re.search(r'useg_request_seconds_bucket\{route="/predict",le="\+Inf"\} [1-9]', text)
    assert "\nuseg_waiting 0\n" in text
    assert "\nuseg_upload_bytes 0\n" in text
    for line in text.splitlines():
        assert re.fullmatch(r"# (HELP|TYPE) [a-z_]+ .+|[a-z_]+(\{[^}]*\})? [0-9.e+]+", line), line


def test_the_log_has_an_entry_for_every_request(site: Site) -> None:
    answers = [
        site.ask("/predict?format=labels", encoded(IMAGE)),
        site.ask("/predict", b"nonsense"),
    ]
    good, bad = (site.line_of(answer) for answer in answers)
    assert (
        good.items()
        >= {
            "method": "POST",
            "path": "/predict",
            "status": 200,
            "pixels": 2400,
            "bytes": len(answers[0].content),
        }.items()
    )
    assert bad["status"] == 400
    assert "is not an image" in bad["error"]


def test_responses_do_not_wait_for_the_client_s_acknowledgement(site: Site) -> None:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", site.port)) as connection:
        connection.request("GET", "/healthz")
        assert connection.getresponse().read()
        own = connection.sock.getsockname()
        [accepted] = [
            one.transport.get_extra_info("socket")
            for one in site.server.server_state.connections
            if one.client == own
        ]
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize(
    "path", ["/", "/main.js", "/model", "/nothing", "/healthz", "/openapi.json", "/docs"]
)
def test_every_response_has_the_security_headers(site: Site, path: str) -> None:
    headers = site.ask(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert "server" not in headers


def test_the_page_needs_no_other_host_and_has_no_inline_code(site: Site) -> None:
    files = page_files()
    for path, (content, kind) in files.items():
        answer = site.ask(path)
        assert (answer.status, answer.content) == (200, content)
        assert answer.headers["content-type"].split(";")[0] == kind
        text = content.decode()
        assert not re.search(
            r"(https?:)?//[\w-]+\.\w", text.replace("http://www.w3.org/2000/svg", "")
        ), path
        for name in re.findall(r'(?:from|src|href)=? ?"(?:\./)?([\w.-]+)"', text):
            assert f"/{name}" in files, f"{path} wants {name}"
    page = files["/"][0].decode()
    assert not re.search(r"<script(?![^>]*src=)|\son\w+=|style=", page)
    assert (PAGE / "engine-server.js").read_bytes() == files["/engine.js"][0]
    assert sum(len(content) for content, _ in files.values()) < 64_000


@pytest.mark.parametrize(
    ("path", "status", "sentence"),
    [
        ("/nothing", 404, "there is nothing at this address; see /docs"),
        ("/../../etc/passwd", 404, "there is nothing at this address; see /docs"),
        ("/%2e%2e/server.py", 404, "there is nothing at this address; see /docs"),
        ("/predict", 405, "this address does not accept this method; see /docs"),
        ("/v2/models/other", 404, "there is no model 'other' here; ask for 'street'"),
    ],
)
def test_a_wrong_address_is_refused(site: Site, path: str, status: int, sentence: str) -> None:
    answer = site.ask(path)
    assert (answer.status, answer.json) == (status, {"error": sentence})


def test_a_refusal_wakes_no_thread(site: Site) -> None:
    def workers() -> set[str]:
        return {each.name for each in threading.enumerate() if each.name.startswith("AnyIO")}

    # Starlette would call a handler that is not a coroutine in a thread of its own pool.
    before = workers()
    assert site.ask("/predict?format=nothing", b"x").status == 422
    assert workers() == before


@pytest.mark.parametrize(
    ("body", "path", "headers", "status", "sentence"),
    [
        (
            b"",
            "/predict",
            {},
            400,
            "the request has no body; send an image file as the body, or in a form",
        ),
        (
            b"hello",
            "/predict",
            {},
            400,
            "'the image' is not ",
        ),
        (encoded(IMAGE)[:300], "/predict", {}, 400, "'the image' is damaged or incomplete"),
        (
            encoded(IMAGE),
            "/predict?format=jpeg",
            {},
            422,
            "'format' is not valid: Input should be 'labels', 'overlay', ",
        ),
        (
            encoded(IMAGE),
            "/predict",
            {"accept": "text/html"},
            406,
            "no response has the media type 'text/html'; accept one of application/json, ",
        ),
        (
            encoded(IMAGE),
            "/predict",
            {"content-encoding": "gzip"},
            415,
            "the body is compressed; send it uncompressed",
        ),
        (
            encoded(picture(201, 200)),
            "/predict",
            {},
            413,
            "the image has 201x200 pixels, more than the allowed 40,000; send a smaller one",
        ),
        (
            bytes(200_001),
            "/predict",
            {},
            413,
            "the body has more than the allowed 200,000 bytes; send less at a time",
        ),
        (
            form(b"1", b"2")[0],
            "/predict",
            {"content-type": form()[1]},
            400,
            "the form has 2 files; send one, or send them to /predict/batch",
        ),
        (form()[0], "/predict", {"content-type": form()[1]}, 400, "the form "),
        (
            form(encoded(IMAGE), encoded(IMAGE))[0][:-900],
            "/predict/batch",
            {"content-type": form()[1]},
            400,
            "the form cannot be read (it ends in the middle of a part); ",
        ),
        (
            form(*5 * [b"1"])[0],
            "/predict/batch",
            {"content-type": form()[1]},
            400,
            "the form cannot be read (it has more than 4 files or 16 fields); send a complete form",
        ),
        (
            b"x",
            "/predict",
            {"content-type": "multipart/form-data"},
            400,
            "the form cannot be read (its content type names no boundary); send a complete form",
        ),
        (encoded(IMAGE), "/predict/batch", {}, 200, ""),
    ],
)
def test_an_error_says_what_to_do(
    site: Site, body: bytes, path: str, headers: dict[str, str], status: int, sentence: str
) -> None:
    answer = site.ask(path, body, **headers)
    assert answer.status == status, answer.content
    if sentence:
        assert answer.json["error"].startswith(sentence)


def test_an_image_that_does_not_fit_the_model_is_refused(site: Site) -> None:
    deep = encoded(np.zeros((4, 4), np.uint16))
    assert (
        "holds uint16 pixels, but the others (or the model) have uint8"
        in site.ask("/predict", deep).json["error"]
    )


def test_every_operation_in_the_openapi_document_has_an_example(site: Site) -> None:
    document = site.ask("/openapi.json").json
    assert {
        "/predict",
        "/predict/batch",
        "/model",
        "/healthz",
        "/readyz",
        "/metrics",
        "/v2/models/{name}/infer",
    } <= set(document["paths"])
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            content = operation["responses"]["200"]["content"]
            assert any("example" in each for each in content.values()), (path, method)
            assert operation["summary"]


def test_every_response_conforms_to_the_openapi_document(site: Site) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings

    document = schemathesis.openapi.from_dict(site.ask("/openapi.json").json)
    document.config.update(base_url=site.url)
    tried_paths: set[str] = set()
    for result in document.get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=6,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def call_operation(case: Any) -> None:
            response = case.call()
            tried_paths.add(case.path)
            checks = schemathesis.checks
            case.validate_response(
                response,
                checks=[checks.not_a_server_error, *(checks.CHECKS.get_by_names(CONFORMS))],
            )

        call_operation()
    assert len(tried_paths) == 12


def test_without_the_token_only_page_docs_and_health_are_served() -> None:
    with served(token="secret") as site:
        for path in ("/", "/main.js", "/docs", "/healthz", "/readyz", "/v2/health/live"):
            assert site.ask(path).status == 200
        for path in ("/model", "/metrics", "/v2/models/street", "/openapi.json"):
            answer = site.ask(path)
            assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert site.ask(path, Authorization="Bearer wrong").status == 401
            assert site.ask(path, Authorization="Bearer secret").status == 200
        assert site.ask("/model", Authorization="bearer secret").status == 200
        assert site.ask("/predict", encoded(IMAGE)).json == {
            "error": "this service requires a token; send the header 'Authorization: Bearer TOKEN'"
        }
        assert site.ask("/predict", encoded(IMAGE), Authorization="Bearer secret").status == 200
