"""What the OpenAPI document says of requests and answers beyond what the routes' signatures do: bodies, examples, errors."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
Answers = dict[int | str, dict[str, Any]]

_BYTES: Schema = {"type": "string", "format": "binary"}
_CLASS = {"id": 7, "name": "Roads", "color": "#804080"}
_SHARES = {"width": 800, "height": 600, "classes": [{**_CLASS, "pixels": 115680, "share": 0.241}]}
_FEATURE = {
    "type": "Feature",
    "properties": {"class": "Roads", "id": 7, "pixels": 4},
    "geometry": {"type": "Polygon", "coordinates": [[[0, 0], [2, 0], [2, 2], [0, 2], [0, 0]]]},
}
_ERRORS = {
    400: (
        "the picture cannot be read, or does not fit the model",
        "'the picture' is not a picture useg can read (PNG, JPEG, WEBP, BMP, GIF or TIFF), ...",
    ),
    401: ("the token is missing or wrong", "this service wants a token; send the header 'Authorization: Bearer TOKEN'"),
    404: ("there is no such model", "there is no model 'x' here; ask for 'street'"),
    406: ("no form of answer is acceptable", "nothing is answered as 'text/html'; accept one of application/json, image/png, ..."),
    408: ("the body came too slowly", "the request's body was not complete after 25 seconds; send it faster, or less at a time"),
    413: ("the body, the picture or the answer is too large", "the body has more than 32,000,000 bytes, which is the most that is taken; ..."),
    415: ("the body is compressed", "the body is compressed, which is not taken; send it as it is"),
    422: ("a parameter is not valid", "'format' is not valid: Input should be 'labels', 'overlay', ..."),
    503: ("too much to do; the header Retry-After says when to come again", "64 pictures are waiting already; try again in 2 seconds"),
}


def _errors(*statuses: int) -> Answers:
    schema: Schema = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
    return {
        status: {"description": _ERRORS[status][0], "content": {"application/json": {"schema": schema, "example": {"error": _ERRORS[status][1]}}}}
        for status in statuses
    }


def _object(example: Schema, *required: str) -> Schema:
    return {"schema": {"type": "object", "required": list(required)}, "example": example}


def _ok(description: str, content: Schema) -> Answers:
    return {200: {"description": description, "content": content}}


def _body(content: Schema) -> Schema:
    return {"requestBody": {"required": True, "content": content}}


_FORM: Schema = {"schema": {"type": "object", "required": ["file"], "properties": {"file": _BYTES}}}
_FILES: Schema = {"schema": {"type": "object", "required": ["files"], "properties": {"files": {"type": "array", "items": _BYTES}}}}
_PICTURE_KINDS = ("image/png", "image/jpeg", "image/webp", "image/tiff", "application/octet-stream")

PICTURE = _body({"multipart/form-data": _FORM, **{kind: {"schema": _BYTES} for kind in _PICTURE_KINDS}})
PICTURES = _body({"multipart/form-data": _FILES})
TENSORS = _body(
    {
        "application/json": {
            "schema": {"type": "object", "required": ["inputs"]},
            "example": {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1, 1, 2, 3], "data": [[[[90, 80, 70], [30, 40, 50]]]]}]},
        },
        "application/octet-stream": {"schema": _BYTES},
    }
)

_REFUSED = _errors(400, 401, 406, 408, 413, 415, 422, 503)
PREDICTED = _REFUSED | _ok(
    "`labels`: a palette PNG whose values are class ids. `overlay`: a PNG to look at. `json`: every class's share. `polygons`: GeoJSON of every "
    "region, in pixels. `probabilities`: numpy's npz with `probabilities` (K, H, W) float32 and `names`. `planes`: the label map's bytes, then a "
    "byte of confidence for each pixel; the size is in the headers X-Width and X-Height.",
    {
        "application/json": _object(_SHARES, "width", "height", "classes"),
        "image/png": {"schema": _BYTES},
        "application/geo+json": _object({"type": "FeatureCollection", **_SHARES, "features": [_FEATURE]}, "type", "features"),
        "application/x-npz": {"schema": _BYTES},
        "application/vnd.useg.planes": {"schema": _BYTES},
    },
)
PREDICTED_BATCH = _REFUSED | _ok(
    "`json` and `polygons`: a list in the order of the files. Everything else: a zip of `0.png`, `1.png`, ...",
    {"application/json": _object({"pictures": [_SHARES]}, "pictures"), "application/zip": {"schema": _BYTES}},
)
MODEL = _errors(401) | _ok(
    "Classes and colours, sizes, scores on held-out pictures, what it was trained on, and what the service takes.",
    {"application/json": _object({"name": "street", "classes": [_CLASS], "working": {"frame": [256, 192], "scale": 1.0}}, "name", "classes")},
)
HEALTHY = _ok("It lives.", {"application/json": _object({"status": "ok"}, "status")})
READY = _errors(503) | _ok("Requests are wanted.", {"application/json": _object({"status": "ready"})})
METRICS = _errors(401) | _ok("Prometheus's text format.", {"text/plain": {"schema": {"type": "string"}, "example": "useg_waiting 0"}})
JSON = _errors(401) | _ok("An object.", {"application/json": _object({"name": "useg"})})
NAMED = _errors(401, 404, 422) | _ok("An object.", {"application/json": _object({"name": "street"}, "name")})
INFERRED = (
    _REFUSED
    | _errors(404)
    | _ok(
        "The outputs asked for, by default `label_map`; as bytes behind the JSON where the request says `binary_data`.",
        {
            "application/json": _object(
                {"model_name": "street", "outputs": [{"name": "label_map", "datatype": "UINT8", "shape": [1, 1, 2], "data": [7, 7]}]}
            ),
            "application/octet-stream": {"schema": _BYTES},
        },
    )
)
