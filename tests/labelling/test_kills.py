"""A killed labelling server loses no stroke that it has acknowledged, and leaves no half file."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from made_labelling import LabelSite, write_images
from PIL import Image

from useg.classes import IGNORE
from useg.errors import UsageError
from useg.files import is_draft
from useg.labelling.folder import LabelFolder
from useg.labelling.mask_files import find_paths

KILLS = 50 if os.environ.get("USEG_SOAK") else 3
# A kill comes at most so many seconds after the stroke during which it comes.
LATEST_KILL = 0.02
# How long a save of ``forked_server.py`` takes that loses strokes.
FAULTY_SAVE_SECONDS = 0.2


class Servers:
    """Labelling servers, one after the other; ``fault`` is a way to save that loses strokes."""

    def __init__(self, images: Path, fault: str = "") -> None:
        self._images = images
        program = str(Path(__file__).parent.parent / "forked_server.py")
        self._process = subprocess.Popen(
            [sys.executable, program, *filter(None, [fault])],
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
def start_servers(tmp_path: Path) -> Iterator[Callable[[str], Servers]]:
    images = write_images(tmp_path, 2)
    with contextlib.ExitStack() as stack:

        def start(fault: str = "") -> Servers:
            running = Servers(images, fault)
            stack.callback(running.close)
            return running

        yield start


class Strokes:
    """Paints and remembers what was acknowledged."""

    def __init__(self, tmp_path: Path) -> None:
        self.masks = tmp_path / "masks"
        self.images = tmp_path / "images"
        self.ids = [np.full((48, 64), IGNORE, np.uint8) for _ in range(2)]
        self.states = ["empty"] * 2
        # The stroke of the latest kill: image, column, row, class.
        self.last = (0, 0, 0, IGNORE)

    def paint_until_killed(self, site: LabelSite, pid: int, latest: float) -> None:
        """Paint strokes, say that images are done, and kill the server during a stroke."""
        revisions = [site.revision(k) for k in range(2)]
        for _ in range(random.randrange(1, 7)):
            k, x, y = random.randrange(2), random.randrange(60), random.randrange(44)
            part = np.full((4, 4), random.randrange(2), np.uint8)
            answer = site.paint(k, part, x, y, revisions[k])
            assert answer.status == 200
            revisions[k], self.states[k] = answer.json["revision"], answer.json["state"]
            self.ids[k][y : y + 4, x : x + 4] = part
            if random.random() < 0.2:
                answer = site.ask(f"/images/{k}/done?done=true", b"")
                self.states[k] = answer.json["state"]
                assert self.states[k] == "done"
        k, x, y = random.randrange(2), random.randrange(60), random.randrange(44)
        self.last = k, x, y, random.randrange(2)
        body = bytes([self.last[3]] * 16)
        query = f"x={x}&y={y}&width=4&height=4&revision={revisions[k]}"
        connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=30)
        headers = {"authorization": f"Bearer {site.token}", "x-session": site.key}
        connection.request("PATCH", f"/images/{k}/mask?{query}", body, headers)
        time.sleep(random.uniform(0, latest))
        os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection.getresponse()
        connection.close()

    def check_files(self) -> None:
        """Check that files are whole and hold all strokes; the last one is there, or not."""
        for path in self.masks.glob("p*.png"):
            with Image.open(path) as whole:
                whole.load()
        folder = LabelFolder(find_paths(self.images))
        k, x, y, value = self.last
        with_last = self.ids[k].copy()
        with_last[y : y + 4, x : x + 4] = value
        if np.array_equal(folder.read(k)[0], with_last):
            self.ids[k] = with_last
            self.states[k] = "scribbled" if self.states[k] == "empty" else self.states[k]
        for image in range(2):
            np.testing.assert_array_equal(folder.read(image)[0], self.ids[image])
        assert [each.state for each in folder.images] == self.states

    def check_server(self, site: LabelSite) -> None:
        """Check that a server which is started again shows the same."""
        for image in range(2):
            assert site.ask(f"/images/{image}/mask").content == self.ids[image].tobytes()
        assert site.ask("/state").json["states"] == self.states


def kill_and_check(
    servers: Servers, strokes: Strokes, kills: int, latest: float = LATEST_KILL
) -> None:
    """Kill servers at random moments; what they have acknowledged is there each time."""
    for _ in range(kills):
        pid, site = servers.start()
        strokes.check_server(site)
        assert site.join(take=True)
        strokes.paint_until_killed(site, pid, latest)
        assert servers.wait() == -signal.SIGKILL
        strokes.check_files()


def test_kills_lose_no_acknowledged_stroke(
    start_servers: Callable[[str], Servers], tmp_path: Path
) -> None:
    random.seed(0)
    servers, strokes = start_servers(""), Strokes(tmp_path)
    kill_and_check(servers, strokes, KILLS)
    pid, site = servers.start()
    strokes.check_server(site)
    os.kill(pid, signal.SIGTERM)
    assert servers.wait() == 0
    assert [path for path in (tmp_path / "masks").iterdir() if is_draft(path)] == []


@pytest.mark.parametrize("fault", ["plain", "late"])
def test_kills_find_a_save_that_loses_strokes(
    fault: str, start_servers: Callable[[str], Servers], tmp_path: Path
) -> None:
    random.seed(0)
    with pytest.raises((AssertionError, OSError, SyntaxError, UsageError)):
        kill_and_check(start_servers(fault), Strokes(tmp_path), 40, FAULTY_SAVE_SECONDS)
