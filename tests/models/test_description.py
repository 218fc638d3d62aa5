"""A forged description with a valid checksum is refused in one sentence.

``USEG_SOAK=1`` forges model files for ten minutes.
"""

from __future__ import annotations

import json
import math
import os
import random
import resource
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_models import (
    ODD_VALUES,
    TENSOR_CHANGES,
    changed,
    parts_of,
    places,
    seal_model,
    tiny_model,
    whole_description,
)

from useg.errors import ModelError
from useg.models import description, segmenter
from useg.models.description import description_from_json
from useg.models.segmenter import check_geometry, load_model

pytestmark = pytest.mark.wheel

# Statistics of images with another number of bands.
FORGED_IMAGES = {"mean": [0.0], "deviation": [1.0], "examples": [[0]], "limit": 1.0}

SOAK_SECONDS = 600 if os.environ.get("USEG_SOAK") == "1" else 0


def outcome(path: Path) -> str:
    """Load a model file and compute with it: "" if both work, "refused", or what went wrong."""
    try:
        model = load_model(path)
        with torch.inference_mode():
            logits = model(torch.zeros(1, model.channels, 32, 32))
        assert logits.isfinite().all()
    except ModelError as error:
        short = len(str(error)) < 600 and str(error).isprintable()
        return "refused" if short else f"refused in {str(error)!r}"
    # Anything else is what a user would see as a traceback.
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def forged_descriptions(folder: Path) -> dict[str, Path]:
    """Model files with one field changed that makes them unusable."""
    content, tensors = parts_of(tiny_model())
    cases: dict[str, Any] = {
        "missing format": {k: v for k, v in content.items() if k != "format"},
        "unknown field": {**content, "extra": 1},
        "unknown setting": changed(content, ("network",), {**content["network"], "__class__": "x"}),
        "unknown class field": changed(content, ("classes",), {**content["classes"], "x": 1}),
        "a path as the encoder": changed(content, ("network", "encoder"), "../../x"),
        "another encoder": changed(content, ("network", "encoder"), "lite0"),
        "wider than the file": changed(content, ("network", "width"), 1024),
        "deeper than the file": changed(content, ("network", "depth"), 7),
        "more names": changed(content, ("classes", "names"), list("abcdef")),
        "a frame above USEG_MAX_PIXELS": changed(content, ("working", "frame"), [65536, 65536]),
        "standardised at a scale": changed(
            content, ("working",), {"frame": None, "scale": 1.0, "standardize": True}
        ),
        "standardised and 16 bits": changed(
            {**content, "pixels": "uint16"},
            ("working",),
            {"frame": [8, 8], "scale": 1.0, "standardize": True},
        ),
        "split from a path": changed(content, ("provenance",), {"split": {"data.classes": "/x"}}),
        "a list": [],
    }
    for at, value in (
        *((("network", "width"), value) for value in (0, 2048, 10**5, "4", 4.0, True)),
        *((("network", "depth"), value) for value in (0, 40, 10**9)),
        *((("network", "classes"), value) for value in (0, 10**9, None, "5")),
        *((("network", "channels"), value) for value in (0, 10**9, "3", 2)),
        *((("working", "frame"), value) for value in ([0, 0], [-1, 5], [200000, 2], [1], "8x8")),
        *((("working", "scale"), value) for value in (0, -1, 1e9, "a", None)),
        *((("working", "standardize"), value) for value in (1, "yes", None)),
        *((("temperature",), value) for value in (0, -1, 1e300, "x", None, True)),
        *((("pixels",), value) for value in ("object", "float64", [1], None)),
        *((("format",), value) for value in ("9", 0, -1, [], 4, 10**30)),
        *((("classes", "names"), value) for value in ([1] * 5, [["a"]] * 5, [], None, "abcde")),
        *((("classes", "colors", 0), value) for value in ([0, 0], [0, 0, 256], [0.5] * 3, 5)),
        *((("classes", "values", 0), value) for value in (-1, 1 << 16, 0.5, 1)),
        *((("provenance",), value) for value in ([1], None, {"num_train": -1}, {"dataset": 5})),
        *((("provenance",), {"validation": value}) for value in (5, {"classes": [1]})),
        *((("provenance",), {"training_images": value}) for value in (5, {}, FORGED_IMAGES)),
        *((("provenance",), {"enlarged_biases": value}) for value in (5, [0.0], [1e9] * 5)),
    ):
        cases[f"{'.'.join(map(str, at))} = {str(value)[:20]}"] = changed(content, at, value)
    texts = {name: json.dumps(case) for name, case in cases.items()}
    texts |= {
        "not JSON": "nonsense",
        "nested deeply": '{"format":' + "[" * 100_000 + "]" * 100_000 + "}",
        "NaN": json.dumps(changed(content, ("working", "scale"), float("nan"))),
        "an integer of 5000 digits": json.dumps(content).replace("1.5", "9" * 5000),
        "very long": json.dumps({**content, "provenance": {"a": "b" * (5 << 20)}}),
    }
    return {
        name: seal_model(folder / f"{k}" / "model.safetensors", text, tensors)
        for k, (name, text) in enumerate(texts.items())
    }


def forged_tensors(folder: Path) -> dict[str, Path]:
    """Model files with tensors that make them unusable."""
    content, tensors = parts_of(tiny_model())
    return {
        name: seal_model(
            folder / f"t{k}" / "model.safetensors", json.dumps(content), change(tensors)
        )
        for k, (name, change) in enumerate(TENSOR_CHANGES.items())
    }


def test_forged_model_files_are_refused(tmp_path: Path) -> None:
    files = forged_descriptions(tmp_path) | forged_tensors(tmp_path)
    assert {name: outcome(path) for name, path in files.items() if outcome(path) != "refused"} == {}
    content, tensors = parts_of(tiny_model())
    assert outcome(seal_model(tmp_path / "good.safetensors", json.dumps(content), tensors)) == ""


def test_the_test_sees_a_reader_that_believes_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = forged_tensors(tmp_path)
    monkeypatch.setattr(segmenter, "check_weights", lambda tensors, source: None)
    assert {outcome(files[name]) for name in ("NaN", "negative variance")} != {"refused"}
    files = forged_descriptions(tmp_path)
    monkeypatch.setattr(description, "_validate", lambda schema, content, *rest: schema())
    assert {outcome(path) for path in files.values()} != {"refused"}


def test_any_values_in_any_fields_are_refused_or_work(tmp_path: Path) -> None:
    content, tensors = parts_of(tiny_model())
    rng, path = random.Random(0), tmp_path / "model.safetensors"
    until, tries, outcomes = time.monotonic() + SOAK_SECONDS, 0, Counter[str]()
    while tries < 60 or time.monotonic() < until:
        forged, tries = content, tries + 1
        for _ in range(rng.choice((1, 1, 2, 5))):
            at = rng.choice(list(places(forged)))
            value = rng.choice((*ODD_VALUES, rng.randrange(1 << rng.randrange(1, 70))))
            forged = changed(forged, at, value)
        text, weights = json.dumps(forged), rng.choice((tensors, damaged(tensors, rng)))
        began = time.process_time()
        outcomes[outcome(seal_model(path, text, weights))] += 1
        assert time.process_time() - began < 30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{tries} forged model files: {dict(outcomes)}, at most {peak} MB")
    assert outcomes.keys() <= {"", "refused"}
    assert outcomes["refused"]


def damaged(tensors: dict[str, torch.Tensor], rng: random.Random) -> dict[str, torch.Tensor]:
    """The tensors with a name, shape, type or number changed."""
    name = rng.choice(list(tensors))
    tensor = tensors[name].clone()
    match rng.randrange(5):
        case 0:
            return {
                rng.choice(list(tensors)) + "x" if key == name else key: value
                for key, value in tensors.items()
            }
        case 1:
            return {**tensors, name: tensor.flatten()[: rng.randrange(4)]}
        case 2:
            return {**tensors, name: tensor.to(rng.choice((torch.float16, torch.int8, torch.bool)))}
        case 3:
            tensor.view(-1).view(torch.uint8)[rng.randrange(tensor.nbytes)] = rng.randrange(256)
        case _:
            tensor.fill_(
                rng.choice((0, -1, 1e30, math.inf, math.nan)) if tensor.is_floating_point() else -1
            )
    return {**tensors, name: tensor}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("stride", value) for value in (0, 1, 10**9, "8", None)),
        *(("margin", value) for value in (-5, 50_000)),
        *(("smallest", value) for value in (0, 10**6)),
        *(("context", value) for value in (-1, 0, 10**9)),
        *(("channels", value) for value in (0, 4, "3")),
        *(("mean", value) for value in ([], [1.0] * 4, "abc", None, [1e999] * 3)),
        *(("std", value) for value in ([0.0] * 3, [-1.0] * 3, [1.0])),
        *(("precision", value) for value in ("int4", 8)),
    ],
)
def test_a_forged_field_of_an_exported_file_is_refused(key: str, value: Any) -> None:
    content = {**whole_description(tiny_model()), key: value}
    with pytest.raises(ModelError, match=r"^m\.onnx is not a usable model: ") as caught:
        check_geometry(description_from_json(json.dumps(content), "m.onnx"), "m.onnx")
    assert str(caught.value).isprintable()
