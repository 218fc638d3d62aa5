"""Forged ONNX and OpenVINO files with a valid checksum are refused before a runtime computes."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_store import OLD
from hostile_models import seal_onnx, seal_openvino
from made_inference import skip_if_missing

from useg.errors import ModelError
from useg.inference import exported, graph_checks, runtimes

skip_if_missing("onnx")
skip_if_missing("openvino")
onnx = pytest.importorskip("onnx")


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A folder with good.onnx, good.xml and good.bin, which an earlier useg wrote."""
    for suffix in (".onnx", ".xml", ".bin"):
        shutil.copy(OLD / f"valid{suffix}", tmp_path / f"good{suffix}")
    return tmp_path


def forge_onnx(good: Path, change: Callable[[Any], Any]) -> Path:
    """Change the graph of the good file, and seal it again."""
    content, text = exported.read_onnx(good / "good.onnx")
    model = onnx.load_from_string(content)
    del model.metadata_props[:]
    change(model)
    return seal_onnx(good / "forged.onnx", model.SerializeToString(), text)


def refer(model: Any, location: str) -> None:
    """Let the first weights lie in another file."""
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value


def replace_nodes(model: Any, *nodes: Any, **constants: np.ndarray) -> None:
    """Let the graph be these operations and constants."""
    del model.graph.node[:], model.graph.initializer[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    for name, value in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))


def weights(model: Any, value: float) -> None:
    tensor = next(each for each in model.graph.initializer if len(each.dims) == 4)
    tensor.raw_data = np.full(list(tensor.dims), value, np.float32).tobytes()


def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    return onnx.helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


def loop(model: Any) -> None:
    info = onnx.helper.make_tensor_value_info
    body = onnx.helper.make_graph(
        [node("Identity", "c", "d")],
        "body",
        [info("i", 7, []), info("c", 9, [])],
        [info("d", 9, [])],
    )
    replace_nodes(
        model,
        node("Loop", "n c", "", body=body),
        node("Cast", "pixels", "logits", to=1),
        n=np.array(2**62),
        c=np.array(True),
    )


CAST = ("Cast", "pixels", "x")
ONNX_CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "weights in /etc": (lambda m: refer(m, "/etc/passwd"), "are in another file"),
    "weights above": (lambda m: refer(m, "../../secret"), "are in another file"),
    "weights in the working folder": (lambda m: refer(m, "secret.bin"), "are in another file"),
    "a loop": (loop, "has the operation 'Loop'"),
    "an operation of others": (
        lambda m: replace_nodes(m, node("Evil", "pixels", "logits", domain="evil")),
        "has the operation 'evil.Evil'",
    ),
    "a large constant": (
        lambda m: replace_nodes(
            m, node("ConstantOfShape", "s", "logits"), s=np.array([1, 5, 20000, 20000])
        ),
        "has the operation 'ConstantOfShape'",
    ),
    "a constant made larger": (
        lambda m: replace_nodes(
            m,
            node("Expand", "one s", "big"),
            node("Cast", "pixels", "y", to=1),
            node("Slice", "big a b", "z"),
            node("Concat", "y z", "logits", axis=1),
            one=np.ones((1, 1, 1, 1), np.float32),
            s=np.array([1, 2, 96, 10**8]),
            a=np.array([0, 0, 0, 0]),
            b=np.array([1, 2, 96, 96]),
        ),
        "are inconsistent|constants need",
    ),
    "an image made larger": (
        lambda m: replace_nodes(
            m,
            node("Cast", "pixels", "x", to=1),
            node("Resize", "x  s", "y", mode="nearest"),
            node("Slice", "y a b", "logits"),
            s=np.array([1, 1, 1000, 1000], np.float32),
            a=np.array([0, 0, 0, 0]),
            b=np.array([1, 5, 64, 64]),
        ),
        "are inconsistent|logits have the shape",
    ),
    "logits of another shape": (
        lambda m: replace_nodes(m, node("Cast", "pixels", "logits", to=1)),
        "logits have the shape",
    ),
    "NaN": (lambda m: weights(m, np.nan), "are not finite"),
    "infinity": (lambda m: weights(m, np.inf), "are not finite"),
    "fewer numbers than declared": (
        lambda m: m.graph.initializer[0].dims.append(10**9),
        "do not have their declared size",
    ),
    "two outputs": (lambda m: m.graph.output.append(m.graph.output[0]), "needs one output"),
    "no pixels": (lambda m: m.graph.input.pop(), "needs one input"),
    "float pixels": (
        lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 1),
        "does not take uint8 pixels",
    ),
    "a function": (lambda m: m.functions.add(), "has local functions"),
}


@pytest.mark.parametrize("name", ONNX_CHANGES)
def test_a_forged_onnx_file_is_refused(name: str, good: Path) -> None:
    change, reason = ONNX_CHANGES[name]
    path = forge_onnx(good, change)
    with pytest.raises(ModelError, match=reason) as caught:
        runtimes.read_model(path)
    assert re.match(r"^.*forged\.onnx is not a usable model: ", str(caught.value))
    assert str(caught.value).isprintable()


def encoded_field(number: int, content: bytes) -> bytes:
    """A field of a protocol buffer, encoded here because the package makes objects."""
    size, rest = b"", len(content)
    while rest > 127:
        size, rest = size + bytes([rest % 128 + 128]), rest // 128
    return bytes([number * 8 + 2]) + size + bytes([rest]) + content


# Numbers of fields: of the file, of its graph, of its first operation and so on.
REPEATED_FIELDS = {
    "metadata": (14,),
    "operations": (7, 1),
    "weights": (7, 5),
    "results": (7, 13),
    "attributes": (7, 1, 5),
    "tensors of an attribute": (7, 1, 5, 10),
    "sides of weights": (7, 5, 1),
    "sides of the pixels": (7, 11, 2, 1, 2, 1),
}


@pytest.mark.parametrize("place", REPEATED_FIELDS)
def test_an_onnx_file_of_very_many_small_fields_is_refused_before_it_is_parsed(
    place: str, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, text = exported.read_onnx(good / "good.onnx")
    *outer, last = REPEATED_FIELDS[place]
    is_list = place == "sides of weights"
    added = encoded_field(last, b"\1" * 5000) if is_list else encoded_field(last, b"") * 5000
    for number in reversed(outer):
        added = encoded_field(number, added)
    model = onnx.load_from_string(content)
    del model.metadata_props[:]
    path = seal_onnx(good / "forged.onnx", model.SerializeToString() + added, text)
    monkeypatch.setattr(graph_checks, "MAX_ONNX_FIELDS", 4000)
    with pytest.raises(ModelError, match="it has more than 4,000 fields"):
        runtimes.read_model(path)
    # The control: without the limit, the package makes objects of all of them.
    monkeypatch.setattr(graph_checks, "MAX_ONNX_FIELDS", 10**6)
    parsed: list[Any] = []
    monkeypatch.setattr(graph_checks, "_check_onnx_tensor", lambda *_: parsed.append(1))
    with suppress(ModelError):
        graph_checks.parse_onnx(path.read_bytes(), path)
    assert place != "weights" or len(parsed) > 5000


@pytest.mark.parametrize(
    "content", [b"\x3a\xff", b"\x3a\x05\x0a", b"\x3b\x3c", b"\xff", b"\x3a" + b"\xff" * 2000]
)
def test_an_onnx_file_whose_fields_have_wrong_sizes_is_refused(content: bytes) -> None:
    with pytest.raises(ModelError, match="it is not a valid ONNX file"):
        graph_checks.parse_onnx(content, "a.onnx")


def test_an_onnx_file_without_a_description_is_refused(good: Path) -> None:
    for content, text in ((b"", ""), (b"garbage", "{}"), (b"\x08\x07", "{" * 10_000)):
        with pytest.raises(ModelError, match="is not a usable model"):
            runtimes.read_model(seal_onnx(good / "forged.onnx", content, text))


OPENVINO_CHANGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "weights beyond the file": (
        lambda x: re.sub(rb'offset="\d+"', b'offset="99999999999"', x, count=1),
        "are not in its .bin",
    ),
    "weights before the file": (
        lambda x: re.sub(rb'offset="\d+"', b'offset="-8"', x, count=1),
        "do not have their declared size",
    ),
    "larger weights": (
        lambda x: re.sub(rb' size="\d+"', b' size="99999999999"', x, count=1),
        "do not have their declared size",
    ),
    "entities": (
        lambda x: x.replace(b"<net ", b'<!DOCTYPE net [<!ENTITY a "b">]><net ', 1),
        "has a document type declaration",
    ),
    "no description": (lambda x: x.replace(b"<card ", b"<dard ", 1), "OpenVINO reports"),
    "another operation": (
        lambda x: x.replace(b'type="Convolution"', b'type="If"', 1),
        "has the operation 'If'",
    ),
    "huge sides": (
        lambda x: re.sub(rb"<dim>\d+</dim>", b"<dim>99999999999</dim>", x, count=1),
        "a dimension is '99999999999'",
    ),
    "another stride": (
        lambda x: x.replace(b'strides="2, 2"', b'strides="1, 1"', 1),
        "are inconsistent|logits have the shape|OpenVINO reports",
    ),
    "no operations": (
        lambda x: b'<a><sha256 value="' + b"0" * 64 + b'"/></a>',
        "it has 0 operations",
    ),
    "no XML": (lambda x: b"<<" + x, "is not valid"),
    "nested deeply": (
        lambda x: x.replace(b"<layers>", b"<layers>" + b"<a>" * 50_000, 1),
        "is not valid",
    ),
}


@pytest.mark.parametrize("name", OPENVINO_CHANGES)
def test_a_forged_openvino_file_is_refused(name: str, good: Path) -> None:
    change, reason = OPENVINO_CHANGES[name]
    content, weights = (good / "good.xml").read_bytes(), (good / "good.bin").read_bytes()
    path = seal_openvino(good / "forged.xml", change(content), weights)
    with pytest.raises(ModelError, match=reason) as caught:
        runtimes.read_model(path)
    assert re.match(r"^.*forged\.xml is not a usable model: ", str(caught.value))
    assert str(caught.value).isprintable()


def test_openvino_weights_of_very_many_axes_are_refused(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, weights = (good / "good.xml").read_bytes(), (good / "good.bin").read_bytes()
    forged = re.sub(rb'( shape=")(?=\d)', rb"\g<1>" + b"1," * 20, content, count=1)
    assert forged != content
    with pytest.raises(ModelError, match="weights have more than 8 axes"):
        graph_checks.check_openvino_files(forged, weights, "a.xml")
    # The control: without the limit, their product is computed, which is right here.
    monkeypatch.setattr(graph_checks, "MAX_AXES", 100)
    graph_checks.check_openvino_files(forged, weights, "a.xml")


def test_openvino_files_of_very_many_elements_are_refused(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, weights = (good / "good.xml").read_bytes(), (good / "good.bin").read_bytes()
    names = b"".join(b"<n%d/>" % k for k in range(graph_checks.MAX_XML_MARKS))
    path = seal_openvino(
        good / "forged.xml", content.replace(b"</net>", names + b"</net>"), weights
    )
    with pytest.raises(ModelError, match="more elements and attributes than useg ever exports"):
        runtimes.read_model(path)
    # The control: without the limit, it is read.
    monkeypatch.setattr(graph_checks, "MAX_XML_MARKS", 10 * graph_checks.MAX_XML_MARKS)
    assert runtimes.read_model(path).openvino_graph is not None


def test_memory_of_a_graph_is_that_of_the_results_still_needed() -> None:
    def memory(*steps: tuple[str, str, int]) -> int:
        made = [graph_checks.Step(tuple(i.split()), {o: size}) for i, o, size in steps]
        return graph_checks._check_memory(made, "pixels", 10, "a.onnx")

    chain = [("pixels", "a", 5), ("a", "b", 7), ("b", "c", 3)]
    assert memory(*chain) == 12
    # "a" stays until the end; "u" is never needed; "k" does not depend on the image.
    assert memory(*chain, ("one", "k", 9), ("k a c", "d", 4)) == 15
    assert memory(("pixels", "u", 50), *chain) == 50


def test_memory_of_a_graph_of_many_branches_is_counted_soon() -> None:
    half = graph_checks.MAX_OPERATIONS // 2
    branches = [graph_checks.Step(("pixels",), {f"b{k}": 1}) for k in range(half)]
    joins = [graph_checks.Step((f"b{k}",), {f"j{k}": 1}) for k in range(half)]
    started = time.process_time()
    assert graph_checks._check_memory(branches + joins, "pixels", 10, "a.onnx") == half + 1
    # Counting what is still needed anew at each step took three seconds.
    assert time.process_time() - started < 0.5


def test_openvino_weights_that_are_not_finite_are_refused(good: Path) -> None:
    content, weights = (good / "good.xml").read_bytes(), (good / "good.bin").read_bytes()
    nan = np.full(len(weights) // 4, np.nan, np.float32).tobytes()
    with pytest.raises(ModelError, match=r"are not finite"):
        runtimes.read_model(seal_openvino(good / "forged.xml", content, nan))


def test_good_files_are_read_and_their_memory_is_known(good: Path) -> None:
    for name in ("good.onnx", "good.xml"):
        runtime = runtimes.load_runtime(good / name)
        # Of 32-bit numbers at full resolution, no more than 32 live together.
        assert 16 <= runtime.pixel_bytes <= 128
        side = runtime.description.valid_size(64)
        logits = runtime.run(np.zeros((1, 3, side, side), np.uint8))
        assert logits.shape == (1, 13, side - 40, side - 40)


def test_the_test_fails_for_a_reader_that_trusts_the_graph(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = forge_onnx(good, ONNX_CHANGES["NaN"][0])
    monkeypatch.setattr(graph_checks, "_check_finite", lambda values, name, source: None)
    runtimes.read_model(path)
    path = forge_onnx(good, ONNX_CHANGES["logits of another shape"][0])
    monkeypatch.setattr(graph_checks, "_check_logits", lambda *arguments: None)
    runtimes.read_model(path)
