"""A service in a thread of the test's own process, plain requests to it, images to send."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_inference import make_model
from PIL import Image
from requesting import Reply, request
from waiting import eventually

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("python_multipart")

from useg.inference import runtimes
from useg.inference.predictor import Predictor
from useg.serving import run
from useg.serving.middleware import Limits
from useg.serving.service import Service, make_service
from useg.serving.shared_network import LoadPlan

SMALL = Limits(upload_bytes=200_000, pixels=40_000, images=4, waiting=3, seconds=25)


@dataclass
class Site:
    """A running service."""

    port: int
    service: Service
    server: run.Server
    log: list[dict[str, Any]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, path: str, body: Any = None, method: str | None = None, **headers: str) -> Reply:
        """Send one request on its own connection; underscores in header names mean hyphens."""
        return request(self.port, path, body, method, headers)

    def line_of(self, answer: Reply) -> dict[str, Any]:
        """The log entry of a response; it may be written after the response has come."""

        def lines() -> list[dict[str, Any]]:
            return [
                entry
                for entry in self.log
                if entry.get("request") == answer.headers["x-request-id"]
            ]

        eventually(lines)
        [line] = lines()
        return line


FOUR_TOGETHER = LoadPlan(4)


@contextlib.contextmanager
def served(
    predictor: Predictor | None = None,
    limits: Limits = SMALL,
    token: str = "",
    plan: LoadPlan = FOUR_TOGETHER,
    hosts: tuple[str, ...] = (),
) -> Iterator[Site]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "DRAIN_SECONDS", 0.0)
        patch.setattr(run, "LAST_REQUESTS_SECONDS", 0.0)
        service = make_service(predictor or tiny(), limits, plan)
        listener = run.listen("127.0.0.1", 0)
        log: list[dict[str, Any]] = []
        server = run.make_server(service, log.append, token, hosts)
        site = Site(listener.getsockname()[1], service, server, log)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield site
        finally:
            server.should_exit = True
            thread.join(60)
            service.queue.pool.shutdown(wait=False)
            service.large_queue.pool.shutdown(wait=False)
            assert not thread.is_alive()


def tiny() -> Predictor:
    """A model whose four classes all occur."""
    model = make_model()
    last = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)][-1]
    assert last.bias is not None
    pictures = torch.from_numpy(np.stack([picture(seed=seed) for seed in range(4)])).permute(
        0, 3, 1, 2
    )
    with torch.no_grad():
        last.bias -= model(pictures).mean((0, 2, 3))
    return Predictor(runtimes.runtime_of_model(model, Path("street")))


class Slow:
    """A network that waits until ``may_run`` is set; ``calls`` counts its calls."""

    def __init__(self) -> None:
        predictor = tiny()
        self.may_run = threading.Event()
        self.calls = 0
        self._run = predictor.runtime.run
        self.predictor = Predictor(replace(predictor.runtime, run=self))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.calls += 1
        assert self.may_run.wait(60)
        return self._run(x)


def picture(width: int = 60, height: int = 40, seed: int = 0) -> np.ndarray:
    """A smooth picture ``(height, width, 3)`` uint8, so that its label map has regions."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encoded(image: np.ndarray, form: str = "PNG") -> bytes:
    target = io.BytesIO()
    Image.fromarray(image).save(target, form)
    return target.getvalue()


def form(*files: bytes, names: tuple[str, ...] = ()) -> tuple[bytes, str]:
    """A multipart body of files, and its content type."""
    parts = []
    for k, file in enumerate(files):
        name = names[k] if names else f"{k}.png"
        head = f'Content-Disposition: form-data; name="file"; filename="{name}"'
        parts.append(f"--edge\r\n{head}\r\n\r\n".encode() + file + b"\r\n")
    return b"".join(parts) + b"--edge--\r\n", "multipart/form-data; boundary=edge"


def labels(content: bytes) -> np.ndarray:
    """The class ids in a palette PNG."""
    with Image.open(io.BytesIO(content)) as opened:
        assert opened.mode == "P"
        return np.array(opened)
