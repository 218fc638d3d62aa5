"""A killed labelling server loses no stroke that it has acknowledged, and leaves no half file."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from made_labelling import LabelSite, write_pictures
from PIL import Image

from useg.classes import IGNORE
from useg.files import is_draft
from useg.labelling.folder import LabelFolder, find_place

KILLS = 50 if os.environ.get("USEG_SOAK") else 4


class Servers:
    """Labelling servers, one after the other."""

    def __init__(self, images: Path) -> None:
        self._images = images
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forked_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self) -> tuple[int, LabelSite]:
        self._process.stdin.write(f"{self._images}\n")
        self._process.stdin.flush()
        pid, address = self._line(), urlsplit(self._line())
        token = address.query.removeprefix("token=")
        return int(pid), LabelSite(address.port, session=None, token=token)

    def wait(self) -> int:
        return int(self._line())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()

    def _line(self) -> str:
        return self._process.stdout.readline().strip()


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    running = Servers(write_pictures(tmp_path, 2))
    yield running
    running.close()


def paint_until_killed(
    site: LabelSite, pid: int, expected: list[np.ndarray], num_strokes: int
) -> tuple[int, tuple[int, int, int]]:
    """Paint strokes, kill the server during one of them; return the picture and the stroke."""
    revisions = [site.revision(k) for k in range(2)]
    for stroke in range(num_strokes + 1):
        k, x, y = stroke % 2, random.randrange(60), random.randrange(44)
        part = np.full((4, 4), random.randrange(2), np.uint8)
        if stroke == num_strokes:
            body, query = part.tobytes(), f"x={x}&y={y}&width=4&height=4&revision={revisions[k]}"
            connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=30)
            headers = {"authorization": f"Bearer {site.token}", "x-session": site.key}
            connection.request("PATCH", f"/pictures/{k}/mask?{query}", body, headers)
            os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection.getresponse()
            connection.close()
            return k, (x, y, int(part[0, 0]))
        answer = site.paint(k, part, x, y, revisions[k])
        assert answer.status == 200
        revisions[k] = answer.json["revision"]
        expected[k][y : y + 4, x : x + 4] = part
    raise AssertionError


def test_kills_lose_no_acknowledged_stroke(servers: Servers, tmp_path: Path) -> None:
    random.seed(0)
    expected = [np.full((48, 64), IGNORE, np.uint8) for _ in range(2)]
    for _ in range(KILLS):
        pid, site = servers.start()
        assert site.join(take=True)
        k, (x, y, value) = paint_until_killed(site, pid, expected, random.randrange(1, 7))
        assert servers.wait() == -signal.SIGKILL
        for path in (tmp_path / "masks").glob("p*.png"):
            with Image.open(path) as whole:
                whole.load()
        folder = LabelFolder(find_place(tmp_path / "images"))
        # The stroke that nobody has acknowledged is there, or not.
        with_last = expected[k].copy()
        with_last[y : y + 4, x : x + 4] = value
        if np.array_equal(folder.read(k)[0], with_last):
            expected[k] = with_last
        for picture in range(2):
            np.testing.assert_array_equal(folder.read(picture)[0], expected[picture])
    pid, site = servers.start()
    for picture in range(2):
        assert site.ask(f"/pictures/{picture}/mask").content == expected[picture].tobytes()
    os.kill(pid, signal.SIGTERM)
    assert servers.wait() == 0
    assert [path for path in (tmp_path / "masks").iterdir() if is_draft(path)] == []
