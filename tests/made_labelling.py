"""A labelling session in a thread of the test's own process, and folders of made images."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from requesting import Reply, request

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from useg.labelling.app import LabelOptions, make_label_server, open_session
from useg.labelling.session import LabelSession
from useg.serving.run import listen

TOKEN = "a-token-of-the-test"


def scene(seed: int, size: tuple[int, int] = (64, 48)) -> tuple[np.ndarray, np.ndarray]:
    """An image of a bright square on dark ground, and its label map: 0 and 1."""
    width, height = size
    rng = np.random.default_rng(seed)
    label = np.zeros((height, width), np.uint8)
    x, y = rng.integers(4, width // 2), rng.integers(4, height // 2)
    label[y : y + height // 3, x : x + width // 3] = 1
    image = np.where(label[..., None], [200, 180, 60], [40, 60, 90])
    return (image + rng.integers(0, 20, image.shape)).astype(np.uint8), label


def write_images(folder: Path, count: int = 3, size: tuple[int, int] = (64, 48)) -> Path:
    """Write ``images/p0.png``, ...; returns the folder ``images``."""
    images = folder / "images"
    images.mkdir(parents=True)
    for k in range(count):
        Image.fromarray(scene(k, size)[0]).save(images / f"p{k}.png")
    return images


@dataclass
class LabelSite:
    """A running labelling session."""

    port: int
    session: LabelSession
    key: str = ""
    token: str = TOKEN
    log: list[dict[str, Any]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/?token={self.token}"

    def ask(
        self, path: str, body: bytes | None = None, method: str | None = None, **headers: str
    ) -> Reply:
        """Send one request; underscores in header names mean hyphens."""
        given = {"authorization": f"Bearer {self.token}", "x_session": self.key, **headers}
        return request(self.port, path, body, method, given)

    def join(self, take: bool = False) -> bool:
        answer = self.ask(f"/session?take={str(take).lower()}", b"").json
        self.key = answer["session"]
        return bool(answer["editor"])

    def revision(self, k: int) -> str:
        return self.ask(f"/images/{k}/mask").headers["x-revision"]

    def paint(self, k: int, part: np.ndarray, x: int = 0, y: int = 0, revision: str = "") -> Reply:
        height, width = part.shape
        query = f"x={x}&y={y}&width={width}&height={height}"
        known = revision or self.revision(k)
        path = f"/images/{k}/mask?{query}&revision={known}"
        return self.ask(path, part.astype(np.uint8).tobytes(), "PATCH")


@contextlib.contextmanager
def labelling(
    images: Path, classes: tuple[str, ...] = ("ground", "square"), **options: Any
) -> Iterator[LabelSite]:
    """Serve a folder; rounds wait, so that no test trains by accident."""
    with open_session(LabelOptions(images, classes, **options)) as session:
        session.rounds.paused = True
        listener = listen("127.0.0.1", 0)
        port = listener.getsockname()[1]
        server = make_label_server(session, TOKEN, port)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield LabelSite(port, session)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
