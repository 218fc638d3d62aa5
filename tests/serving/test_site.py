"""The exported site in a real browser: its label maps are useg's, also without a network."""

from __future__ import annotations

import functools
import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chromium import browsing, clip, pick, saved, shown, violations
from made_inference import make_model
from made_serving import save_run
from served import SMALL, encoded, labels, picture, served

from useg.classes import confidence, most_probable
from useg.cli import main
from useg.errors import UsageError
from useg.images.image_files import read_image, resize_image
from useg.inference import runtimes, tiles
from useg.inference.predictor import Predictor, resize_logits
from useg.models import geometry
from useg.models.geometry import WorkingSize, standardize
from useg.models.segmenter import save_model
from useg.scenes.generate import write_scenes
from useg.serving import site
from useg.serving.export import export_model
from useg.serving.site import model_name, onnxruntime_web

for needed in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(needed)

IMAGES = [picture(50 + 3 * k, 90 - 2 * k, k) for k in range(20)]


class Host(http.server.SimpleHTTPRequestHandler):
    """Any static web server: ``python -m http.server``."""

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(autouse=True, scope="module")
def fetched_once() -> Iterator[None]:
    try:
        archive = onnxruntime_web(lambda text: None)
    except UsageError as missing:
        pytest.skip(str(missing))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site, "onnxruntime_web", lambda say: archive)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model works at a reduced size and whose classes all occur."""
    model = make_model(working=WorkingSize((48, 40)))
    last = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)][-1]
    assert last.bias is not None
    with torch.no_grad():
        last.bias -= model(torch.from_numpy(picture(48, 40)[None].transpose(0, 3, 1, 2))).mean(
            (0, 2, 3)
        )
        # Confident in some places, not in others.
        last.weight *= 8
        last.bias *= 8
    model.temperature = 1.5
    folder = tmp_path_factory.mktemp("runs") / "street"
    folder.mkdir()
    save_model(model, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site") / "site"
    assert command("export", str(run), f"{out}/", "--quiet") == 0
    return out


@contextmanager
def hosted(folder: Path) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Host, directory=str(folder))
    ) as host:
        thread = threading.Thread(target=host.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{host.server_port}"
        host.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with hosted(folder) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsing() as started:
        yield started


@pytest.fixture(scope="module")
def page(browser: Any, url: str) -> Iterator[Any]:
    with opened(browser, url) as shown:
        yield shown


@contextmanager
def opened(browser: Any, url: str) -> Iterator[Any]:
    """The page; an error on it or a request to another host fails the test."""
    page = browser.new_context(
        viewport={"width": 1200, "height": 800}, accept_downloads=True
    ).new_page()
    page.set_default_timeout(60_000)
    page.troubles = []
    page.on("pageerror", lambda error: page.troubles.append(str(error)))
    page.on(
        "console",
        lambda message: page.troubles.append(message.text) if message.type == "error" else None,
    )
    page.context.on(
        "request",
        lambda request: request.url.startswith((url, "blob:")) or page.troubles.append(request.url),
    )
    page.goto(url)
    page.wait_for_selector("body[data-ready]")
    yield page
    assert page.troubles == []
    page.context.close()


def command(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    return int(ended.value.code or 0)


def labelled(page: Any, image: np.ndarray) -> np.ndarray:
    page.evaluate("document.body.dataset.state = 'empty'")
    pick(page, encoded(image))
    return labels(saved(page, "#save-mask")[1])


def test_browser_server_and_offline_agree(page: Any, run: Path) -> None:
    predictor = Predictor.load(run)
    assert page.inner_text("#model") == "street, 4 classes"
    assert page.evaluate("crossOriginIsolated"), (
        "the service worker allows threads on a host that sends no such headers"
    )
    with served(predictor, replace(SMALL, upload_bytes=1_000_000)) as service:
        for image in IMAGES:
            expected = predictor(image)
            assert len(np.unique(expected)) > 1
            assert (
                labels(service.ask("/predict", encoded(image), accept="image/png").content)
                == expected
            ).all()
            assert (labelled(page, image) == expected).mean() >= 0.999
    assert (labelled(page, IMAGES[0]) == predictor(IMAGES[0])).mean() >= 0.999, "and a second time"


def test_a_class_can_be_hidden_and_the_confidence_is_calibrated(page: Any, run: Path) -> None:
    predictor = Predictor.load(run)
    labelled(page, IMAGES[3])
    page.locator("#legend .toggle").first.click()
    assert page.locator("#legend .toggle").first.get_attribute("aria-pressed") == "false"
    page.click("#show-all")
    page.focus("#frame")
    page.keyboard.press("Shift+ArrowRight")
    height, width = IMAGES[3].shape[:2]
    y, x = height // 2, width // 2 + 1
    name, _, sure = page.inner_text("#status").removesuffix(" %").partition(", ")
    assert name == predictor.classes.names[predictor(IMAGES[3])[y, x]]
    assert float(sure) == pytest.approx(
        100 * predictor.probabilities(IMAGES[3]).max(0)[y, x], abs=0.5
    )


def test_a_stopped_camera_is_labelled_at_full_size(page: Any, run: Path) -> None:
    page.click("#camera")
    page.wait_for_selector("body[data-state=live]")
    assert page.evaluate("document.getElementById('colors').width") <= 60, (
        "about the model's working size"
    )
    page.click("#camera")
    page.wait_for_selector("body[data-state=done]")
    assert (
        labels(saved(page, "#save-mask")[1]) == Predictor.load(run)(shown(page, "image"))
    ).mean() >= 0.999


def test_a_paused_frame_of_a_video_is_labelled_at_full_size(
    page: Any, run: Path, tmp_path: Path
) -> None:
    page.set_input_files(
        "#file",
        {
            "name": "drive.webm",
            "mimeType": "video/webm",
            "buffer": clip(tmp_path / "drive.webm", 2),
        },
    )
    page.wait_for_selector("body[data-state=live]")
    page.click("#play")
    for _ in range(2):
        page.wait_for_selector("body[data-state=done]")
        assert (
            labels(saved(page, "#save-mask")[1]) == Predictor.load(run)(shown(page, "image"))
        ).mean() >= 0.999
        page.evaluate("document.body.dataset.state = 'busy'")
        page.locator("#seek").fill("1.2")


def test_a_site_in_8_bits_predicts_as_its_file_does(browser: Any, tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    write_scenes(tmp_path / "scenes", 10, (64, 48), 0)
    run, out = save_run("valid", tmp_path / "run"), tmp_path / "site"
    assert (
        command("export", str(run), f"{out}/", "--int8", str(tmp_path / "scenes"), "--quiet") == 0
    )
    predictor = Predictor.load(next(out.glob("model-*.onnx")))
    assert predictor.runtime.description.precision == "int8"
    images = [read_image(path) for path in sorted((tmp_path / "scenes").glob("*/*.png"))[:3]]
    with hosted(out) as url, opened(browser, url) as page:
        for image in images:
            expected = predictor(image)
            assert len(np.unique(expected)) > 1
            assert (labelled(page, image) == expected).mean() >= 0.999


def test_it_works_without_a_network_after_the_first_visit(page: Any, url: str, run: Path) -> None:
    page.context.set_offline(True)
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert (labelled(page, IMAGES[5]) == Predictor.load(run)(IMAGES[5])).mean() >= 0.999
    page.context.set_offline(False)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    "viewport", [{"width": 1280, "height": 800}, {"width": 360, "height": 740}]
)
def test_the_page_is_accessible(page: Any, scheme: str, viewport: dict[str, int]) -> None:
    # axe-core would measure the contrast of colours that still change.
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.set_viewport_size(viewport)
    page.evaluate("document.body.dataset.state = 'empty'")
    assert violations(page) == []
    labelled(page, IMAGES[3])
    page.locator("#legend .toggle").first.click()
    for view in ("overlay", "compare", "side"):
        page.check(f"[value={view}]")
        assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    page.check("[value=overlay]")
    page.click("#show-all")


def test_errors_are_shown(page: Any) -> None:
    page.set_input_files(
        "#file", {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"not an image"}
    )
    page.wait_for_selector("#error:not([hidden])")
    assert page.inner_text("#error-text") == (
        "notes.txt: This browser cannot read this file as an image. Use PNG, JPEG or WebP."
    )


def test_images_are_resized_to_the_bit(page: Any) -> None:
    script = """async ([plane, ...sizes]) => {
        const {resize} = await import('/resize.js');
        return [...resize(Uint8Array.from(plane), ...sizes)];
    }"""
    for size, new in (
        ((7, 5), (3, 2)),
        ((40, 31), (17, 31)),
        ((9, 13), (30, 13)),
        ((33, 20), (12, 47)),
        ((1, 6), (5, 1)),
    ):
        image = np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 1), np.uint8)
        found = page.evaluate(script, [image.ravel().tolist(), *size, *new])
        assert found == resize_image(image, new).ravel().tolist(), (size, new)


def test_images_are_standardised_to_the_bit(page: Any) -> None:
    script = """async (planes) => {
        const {standardize} = await import('/standardize.js');
        const bytes = planes.map((plane) => Uint8Array.from(plane));
        standardize(bytes);
        return bytes.map((plane) => [...plane]);
    }"""
    rng = np.random.default_rng(0)
    for low, high in ((0, 256), (3, 5), (200, 230), (7, 8)):
        image = rng.integers(low, high, (30, 40, 3), np.uint8)
        found = page.evaluate(script, image.reshape(-1, 3).T.tolist())
        assert found == standardize(image).reshape(-1, 3).T.tolist(), (low, high)


@pytest.mark.parametrize(("margin", "context", "smallest"), [(0, 10, 16), (0, 24, 8), (12, 0, 28)])
def test_windows_are_python_s_and_cover_the_image(
    page: Any, margin: int, context: int, smallest: int
) -> None:
    network = {"margin": margin, "stride": 8, "context": context, "smallest": smallest}
    shape = geometry.Geometry(
        margin, 8, context, lambda size: smallest + max(0, -(-(size - smallest) // 8)) * 8
    )
    script = """async ([image, height, width, network, tile]) => {
        const {cover, cut, paste} = await import('/tiles.js');
        const {size, rows, columns} = cover(height, width, network, tile);
        const [planes, margin] = [[Uint8Array.from(image)], network.margin];
        const logits = new Float32Array(height * width);
        const kept = size.map((length) => length - 2 * margin);
        for (const row of rows) for (const column of columns) {
            const x = cut(planes, width, height, row.start - margin, column.start - margin, size);
            const answer = new Float32Array(kept[0] * kept[1]);
            for (let y = 0; y < kept[0]; y++)
                for (let z = 0; z < kept[1]; z++)
                    answer[y * kept[1] + z] = x[(y + margin) * size[1] + z + margin];
            paste(logits, width, height, answer, kept, row, column);
        }
        return {size, rows, columns, same: logits.every((value, k) => value === image[k])};
    }"""
    for height, width, tile in ((50, 130, 0), (50, 130, 72), (9, 200, 1), (129, 131, 100)):
        image = np.random.default_rng(height).integers(0, 256, (height, width, 1), np.uint8)
        found = page.evaluate(script, [image.ravel().tolist(), height, width, network, tile])
        windows = tiles.tile_windows(image, shape, tile)
        assert tuple(found["size"]) == windows[0].size
        pairs = [(row, column) for row in found["rows"] for column in found["columns"]]
        assert [tuple(tiles.Span(**span) for span in pair) for pair in pairs] == [
            (window.rows, window.columns) for window in windows
        ]
        assert found["same"]


def test_logits_are_upsampled_as_in_python(page: Any) -> None:
    script = """async ([logits, ...rest]) => {
        const {toPrediction} = await import('/postprocess.js');
        const {ids, confidence} = toPrediction(Float32Array.from(logits), ...rest);
        return [[...ids], [...confidence]];
    }"""
    for (height, width), (new_height, new_width) in (
        ((5, 7), (33, 20)),
        ((12, 9), (12, 9)),
        ((20, 30), (11, 61)),
        ((1, 1), (3, 2)),
    ):
        logits = np.random.default_rng(width).normal(0, 4, (5, height, width)).astype(np.float32)
        ids, sure = page.evaluate(
            script, [logits.ravel().tolist(), 5, width, height, new_width, new_height, 1.5]
        )
        native = resize_logits(torch.from_numpy(logits)[None], new_height, new_width)[0].numpy()
        assert ids == most_probable(native).ravel().tolist()
        np.testing.assert_allclose(sure, 255 * confidence(native, 1.5).ravel(), atol=1)


def test_a_new_model_replaces_the_old_one_and_no_other_file(
    folder: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site, "onnxruntime_web", lambda say: _small_package())
    out = tmp_path / "site"
    out.mkdir()
    graph, model = next(folder.glob("model-*.onnx")).read_bytes(), runtimes.load_runtime(run)
    site.write_site(out, graph, model, lambda text: None)
    (out / "CNAME").write_text("mine")
    before = (out / "service-worker.js").read_text()
    site.write_site(out, graph, model, lambda text: None)
    assert (out / "service-worker.js").read_text() == before, (
        "the same site asks no browser to load it again"
    )
    site.write_site(out, graph + b"\x72\x00", model, lambda text: None)
    assert (out / "service-worker.js").read_text() != before
    assert len(list(out.glob("model-*"))) == len(list(out.glob("probe-*"))) == 1
    assert (out / "CNAME").read_text() == "mine"


def test_unusable_targets_models_and_archives_are_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    (tmp_path / "plain").write_text("a file")
    for out, expected in (
        ("full", "contains files that useg export did not write"),
        ("plain", "is a file; give a folder for the site"),
    ):
        assert command("export", str(run), str(tmp_path / out)) == 2
        assert expected in capsys.readouterr().err
    (tmp_path / "deep").mkdir()
    save_model(make_model(channels=4, pixels="uint16"), tmp_path / "deep" / "model.safetensors")
    with pytest.raises(
        UsageError,
        match=r"takes images with 4 bands of uint16, but a browser reads 1 or 3 bands of uint8",
    ):
        export_model(tmp_path / "deep", tmp_path / "site")
    monkeypatch.setenv("USEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        UsageError,
        match="npm could not fetch it; on a machine with npm and a network run: npm pack onnxr",
    ):
        onnxruntime_web(lambda text: None)
    (tmp_path / "cache").mkdir(exist_ok=True)
    (tmp_path / "cache" / site.ARCHIVE_NAME).write_bytes(b"half")
    with pytest.raises(UsageError, match="is damaged, or not onnxruntime-web@"):
        onnxruntime_web(lambda text: None)
    assert not (tmp_path / "site").exists()


def _small_package() -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:gz") as archive:
        for name in site.RUNTIME_FILES:
            archive.addfile(tarfile.TarInfo(f"package/dist/{name}"), io.BytesIO())
    return target.getvalue()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/street", "street"),
        ("runs/street/model.safetensors", "street"),
        ("a/b.onnx", "b"),
        ("b.xml", "b"),
        (".", Path.cwd().name),
    ],
)
def test_a_model_has_the_name_of_its_run_folder_or_file(path: str, name: str) -> None:
    assert model_name(Path(path)) == name
