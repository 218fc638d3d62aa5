"""The browser that some tests drive: starts it, uses its pages, checks their accessibility."""

from __future__ import annotations

import base64
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]


@contextmanager
def browsing() -> Iterator[Any]:
    """Start Chromium, driven by Playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as running:
        started = running.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


def violations(page: Any) -> list[str]:
    """Return axe-core's findings on a page, of any severity: the rule and the element."""
    bundled = pytest.importorskip("axe_playwright_python")
    page.evaluate((Path(bundled.__file__).parent / "axe.min.js").read_text())
    found = page.evaluate("axe.run()")
    return [
        f"{each['id']}: {node['html']}" for each in found["violations"] for node in each["nodes"]
    ]


def shown(page: Any, canvas: str) -> np.ndarray:
    """Return what an opaque canvas shows, ``(H, W, 3)`` uint8."""
    content = page.evaluate(f"document.getElementById('{canvas}').toDataURL()")
    with Image.open(io.BytesIO(base64.b64decode(content.partition(",")[2]))) as image:
        return np.array(image.convert("RGB"))


def clip(path: Path, seconds: float = 1, size: tuple[int, int] = (96, 64)) -> bytes:
    """Make a video, VP8 at 10 frames per second: an image that moves to the left."""
    av = pytest.importorskip("av")
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 20, 3), np.uint8))
    wide = np.array(coarse.resize((3 * size[0], size[1]), Image.Resampling.BICUBIC))
    with av.open(str(path), "w", format="webm") as container:
        stream = container.add_stream("vp8", rate=10)
        stream.width, stream.height = size
        for k in range(round(10 * seconds)):
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(
                        np.ascontiguousarray(wide[:, 4 * k :][:, : size[0]]), format="rgb24"
                    )
                )
            )
        container.mux(stream.encode())
    return path.read_bytes()


def pick(page: Any, content: bytes, name: str = "street.png") -> None:
    """Choose an image file on the page, and wait for its label map."""
    page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": content})
    page.wait_for_selector("body[data-state=done]")


def saved(page: Any, button: str) -> tuple[str, bytes]:
    """Click a save button; returns the name and the content of the download."""
    with page.expect_download() as waiting:
        page.click(button)
    return waiting.value.suggested_filename, Path(waiting.value.path()).read_bytes()
