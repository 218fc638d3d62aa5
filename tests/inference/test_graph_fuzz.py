"""Damaged ONNX and OpenVINO files with a right checksum are read or refused, and soon.

``USEG_SOAK=1`` reads 20,000 of them.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from golden_store import OLD
from hostile_models import seal_onnx, seal_openvino
from made_inference import skip_if_missing

from useg.errors import UsageError
from useg.inference import exported, graph_checks, runtimes

skip_if_missing("onnx")
skip_if_missing("openvino")
onnx = pytest.importorskip("onnx")

COUNT = 20_000 if os.environ.get("USEG_SOAK") == "1" else 120
SECONDS = 20
NUMBERS = (0, -1, 1, 2, 3, 255, 256, 65_537, 2**31 - 1, 2**31, 2**62, -(2**63))


@pytest.fixture
def good(tmp_path: Path) -> Path:
    for suffix in (".onnx", ".xml", ".bin"):
        shutil.copy(OLD / f"valid{suffix}", tmp_path / f"good{suffix}")
    return tmp_path


def change_message(message: Any, draw: random.Random) -> None:
    """Change, repeat or remove one field of a protobuf message, or of one inside it."""
    fields = message.ListFields()
    if not fields:
        return
    field, value = draw.choice(fields)
    is_list = hasattr(value, "append") or hasattr(value, "add")
    if is_list and draw.random() < 0.1:
        del value[draw.randrange(len(value))]
    elif is_list and draw.random() < 0.05:
        value.extend(list(value) * draw.choice((1, 30)))
    elif field.message_type:
        change_message(draw.choice(list(value)) if is_list else value, draw)
    else:
        changed = other_value(draw.choice(list(value)) if is_list else value, draw)
        try:
            if is_list:
                value[draw.randrange(len(value))] = changed
            else:
                setattr(message, field.name, changed)
        except (ValueError, TypeError):
            # The field does not have such values.
            message.ClearField(field.name)


def other_value(value: Any, draw: random.Random) -> Any:
    if isinstance(value, bytes):
        return draw.choice((b"", value[: len(value) // 2], value * 2, b"\xff" * len(value)))
    if isinstance(value, str):
        return draw.choice(("", "x", "\x1b[31m", "../x", "Loop", "If", "Expand", "x" * 5000))
    return draw.choice((float("nan"), 1e38)) if isinstance(value, float) else draw.choice(NUMBERS)


def damaged_onnx(good: Path, draw: random.Random) -> Path:
    content, text = exported.read_onnx(good / "good.onnx")
    model = onnx.load_from_string(content)
    del model.metadata_props[:]
    for _ in range(draw.choice((1, 1, 2, 5))):
        change_message(model, draw)
    graph = model.SerializeToString()
    if draw.random() < 0.1:
        at = draw.randrange(len(graph))
        graph = graph[:at] + draw.randbytes(draw.choice((0, 1, 8))) + graph[at + 1 :]
    return seal_onnx(good / "damaged.onnx", graph, text)


def damaged_openvino(good: Path, draw: random.Random) -> Path:
    text, weights = (good / "good.xml").read_text("utf-8"), (good / "good.bin").read_bytes()
    for _ in range(draw.choice((1, 1, 2, 5))):
        match draw.randrange(3):
            case 0:
                found = draw.choice(list(re.finditer(r"(?<=[>\"])-?\d+(?=[<\"])", text)))
                new = str(draw.choice((*NUMBERS, 10**30, "nan", "")))
            case 1:
                found = draw.choice(list(re.finditer(r'(?<=type=")\w+', text)))
                new = draw.choice(("If", "Loop", "Parameter", "Result", "Broadcast", "x"))
            case _:
                found = draw.choice(list(re.finditer(r"<(dim|edge|port)\b[^>]*>", text)))
                new = draw.choice(("", found[0] * 2, found[0] * 300))
        text = text[: found.start()] + new + text[found.end() :]
    if draw.random() < 0.2:
        weights = weights[: draw.randrange(len(weights))]
    return seal_openvino(good / "damaged.xml", text.encode(), weights)


@pytest.mark.parametrize("damage", [damaged_onnx, damaged_openvino])
def test_damaged_graphs_are_read_or_refused(
    good: Path, damage: Callable[[Path, random.Random], Path]
) -> None:
    outcomes = Counter[str]()
    for seed in range(COUNT // 2):
        path, began = damage(good, random.Random(seed)), time.process_time()
        try:
            runtimes.read_model(path)
            outcomes["read"] += 1
        except UsageError as error:
            outcomes["refused" if str(error).isprintable() else f"unprintable: {seed}"] += 1
        except Exception as error:
            pytest.fail(f"seed {seed}: {type(error).__name__}: {error}")
        assert time.process_time() - began < SECONDS, seed
    assert outcomes["refused"], outcomes
    assert set(outcomes) <= {"read", "refused"}


def test_the_test_sees_a_reader_without_checks(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_checks, "_check_finite", lambda values, name, source: None)
    content, text = exported.read_onnx(good / "good.onnx")
    model = onnx.load_from_string(content)
    del model.metadata_props[:]
    tensor = next(each for each in model.graph.initializer if len(each.dims) == 4)
    tensor.raw_data = b"\xff" * len(tensor.raw_data)
    path = seal_onnx(good / "damaged.onnx", model.SerializeToString(), text)
    runtimes.read_model(path)
    monkeypatch.undo()
    with pytest.raises(UsageError):
        runtimes.read_model(path)
