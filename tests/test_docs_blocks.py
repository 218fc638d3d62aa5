"""Every shell and Python block of README and docs/ runs, in a folder with a tiny data set and
model.

A page is read from top to bottom, in a folder of its own. What a reader does not see is in HTML
comments, before the block that they are about:

    <!-- not run: needs a GPU -->       the next block does not run; the reason is listed
    <!-- slow: measures for seconds --> the next block runs with USEG_SOAK=1 only
    <!-- file: own/dataset.toml -->     the next block is written to that file
    <!-- setup: mkdir own -->           a shell command that only the test needs
    <!-- check: label.max() < 13 -->    a Python expression that has to be true here

Commands of useg run in this process. Some of them are made short: `scenes` makes few small scenes,
`train` checks its arguments and copies a model that was trained before, and what one page exports
is not exported again for the next. With USEG_SOAK=1 they do all that they say, `train` for seconds.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import useg
from useg.cli import main
from useg.config import Settings, read_settings
from useg.data.dataset import Dataset
from useg.models.segmenter import load_model

ROOT = Path(__file__).parent.parent
SOAK = bool(os.environ.get("USEG_SOAK"))
ADDRESS = "http://127.0.0.1:8000"  # of the service, in the pages; the test takes a free port
PACKAGES = ("onnxruntime", "openvino", "nncf", "fastapi", "uvicorn", "av")
TINY = {
    "model.encoder": "plain",
    "model.padding": "valid",
    "model.width": 4,
    "model.depth": 1,  # with more, the export of an unpadded network takes twice as long
    "data.size": "64x48",
    "train.steps": 2,
}
SHELL, PYTHON = ("sh", "bash", "shell", "console"), ("python", "py")
SILENT = ("", "text", "toml", "yaml", "json", "{eval-rst}", "{include}")
ELSEWHERE = {"tutorial.md": "the tests of the tutorial run the notebook that it is made of"}
NOT_RUN = {
    "labelling.md": 3,  # blocks of each page that no test can run; their reasons stand in the pages
    "README.md": 1,
    "cluster.md": 2,
    "distributed.md": 3,
    "index.md": 2,
    "serving.md": 4,
}
_STEP = re.compile(
    r"<!-- (?P<marker>not run|slow|file|setup|check): (?P<text>.*?) -->"
    r"|^ *```(?P<language>\S*)[^\n]*\n(?P<code>.*?)^ *```",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Step:
    """A block of a page, or a check: its language, its content, and the marker before it."""

    kind: str
    code: str
    marker: str = ""
    reason: str = ""

    @property
    def is_wanted(self) -> bool:
        """Whether there is something to do now."""
        if self.marker == "file":
            return True
        there = self.marker != "not run" and (SOAK or self.marker != "slow")
        return there and self.kind not in SILENT


def pages() -> list[Path]:
    everything = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [page for page in everything if page.name not in ELSEWHERE]


def steps(page: Path) -> list[Step]:
    found: list[Step] = []
    marker, reason = "", ""
    for match in _STEP.finditer(page.read_text("utf-8")):
        if match["marker"] in ("setup", "check"):
            found.append(Step(match["marker"], match["text"]))
        elif match["marker"]:
            marker, reason = match["marker"], match["text"]
        else:
            found.append(Step(match["language"], textwrap.dedent(match["code"]), marker, reason))
            marker, reason = "", ""
    assert not marker, f"{page.name}: no block follows '{marker}: {reason}'"
    return found


def test_every_block_is_run_or_says_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    counts: dict[str, int] = {}
    for page in pages():
        for step in steps(page):
            assert step.kind in (*SHELL, *PYTHON, *SILENT, "setup", "check"), (
                f"{page.name}: {step.kind}"
            )
            if step.marker == "not run":
                counts[page.name] = counts.get(page.name, 0) + 1
                with capsys.disabled():
                    print(f"\nnot run in {page.name}: {step.reason}", end="")
    assert counts == NOT_RUN


Prepared = tuple[Path, Any]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A folder with what the pages take for granted, and the run in it."""
    folder = tmp_path_factory.mktemp("pages")
    run_useg(["scenes", str(folder / "data")])
    run = useg.train(folder / "data", folder / "run", settings=TINY)
    shutil.copytree(folder / "run", folder / "other")
    scenes = sorted((folder / "data" / "CameraRGB").iterdir())
    (folder / "images").mkdir()
    for k, scene in enumerate(scenes[:3], 1):
        shutil.copy(scene, folder / "images" / f"street_{k}.png")
    with Image.open(scenes[3]) as image:
        image.save(folder / "scan.tif")
        image.resize((800, 600)).save(folder / "image.png")
        Image.new("L", (800, 600)).save(folder / "label.png")
    write_video(folder / "drive.mp4", scenes[:3])
    return folder, run


def write_video(path: Path, pictures: list[Path]) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 128, 96
        for picture in pictures:
            image = np.asarray(Image.open(picture))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


class Services(ExitStack):
    """The services that pages have started; pages that start the same one share it."""

    def __init__(self) -> None:
        super().__init__()
        self.address = ADDRESS
        self._running: dict[tuple[str, ...], str] = {}

    def start(self, words: list[str]) -> None:
        """Start a service, whose address is that of the pages from now on."""
        if tuple(words) not in self._running:
            self._running[tuple(words)] = self.enter_context(serving(words))
        self.address = self._running[tuple(words)]


@pytest.fixture(scope="module")
def services() -> Iterator[Services]:
    with Services() as started:
        yield started


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_blocks_of_a_page_run(
    page: Path,
    request: pytest.FixtureRequest,
    services: Services,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = [step for step in steps(page) if step.is_wanted]
    if not wanted:
        return  # and nothing to prepare
    if missing := [package for package in PACKAGES if not find_spec(package)]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if any("curl" in step.code for step in wanted) and not shutil.which("curl"):
        pytest.skip("not installed: curl")
    folder, run = request.getfixturevalue("prepared")
    shutil.copytree(folder, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    home = f"{useg._PUBLIC['train']}.train"
    monkeypatch.setattr(home, short_training(useg.train, folder, run))
    names: dict[str, Any] = {"__name__": page.stem}
    checking = {"PAGE": text(str(page)), "text": text, "load": load_json, "useg": useg}
    # No page uses a service that only another page starts.
    services.address = ADDRESS
    for step in wanted:
        if step.marker == "file":
            Path(step.reason).parent.mkdir(parents=True, exist_ok=True)
            Path(step.reason).write_text(step.code)
        elif step.kind == "check":
            assert eval(step.code, {**checking, **names}), f"{page.name}: {step.code}"
        elif step.kind in PYTHON:
            exec(compile(step.code, page.name, "exec"), names)
        else:
            run_shell(step.code, services)


def text(path: str) -> str:
    return Path(path).read_text("utf-8")


def load_json(path: str) -> Any:
    return json.loads(text(path))


def short_training(train: Callable[..., Any], folder: Path, run: Any) -> Callable[..., Any]:
    """Return what takes the place of `useg.train`: it checks its arguments and copies a run."""

    def checked(data: str | Dataset, out: str, **given: Any) -> Any:
        if not given.get("resume"):
            shutil.rmtree(out, ignore_errors=True)  # a reader has no run before it is trained
        if SOAK:
            settings = {**TINY, **(given.get("settings") or {})}
            known = {key: given.get(key) for key in ("start", "resume")}
            return train(data, out, settings=settings, **known)
        limits = given.get("minutes"), given.get("epochs")
        assert None in limits, "both minutes and epochs"
        if given.get("start"):
            load_model(Path(given["start"]))
        config = given.get("config")
        settings = (read_settings(Path(config)) if config else Settings()).with_(
            given.get("settings") or {}
        )
        dataset = data if isinstance(data, Dataset) else useg.open_dataset(data, settings)
        assert dataset.of("train")
        shutil.copytree(folder / "run", out, dirs_exist_ok=True)
        return replace(run, out=Path(out))

    return checked


def run_shell(code: str, services: Services) -> None:
    """Run a block: commands of useg in this process, everything else by bash."""
    for line in commands(code):
        words = shlex.split(line, comments=True)
        if words[:2] == ["useg", "serve"]:
            services.start(words[2:])
        elif words[:1] == ["useg"] and not set(words) & {"|", "||", ">"}:
            run_useg(words[1:])
        elif words:
            line = line.replace(ADDRESS, services.address)
            bash = ["bash", "-euo", "pipefail", "-c", line]
            done = subprocess.run(bash, capture_output=True, text=True)
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


def commands(code: str) -> Iterator[str]:
    """Take a block apart: a command ends with its line, unless a quote is open or a \\ ends it."""
    waiting = ""
    for line in code.splitlines(keepends=True):
        waiting += line
        if waiting.endswith("\\\n"):
            continue
        try:
            shlex.split(waiting, comments=True)
        except ValueError:  # a quote is open
            continue
        yield waiting
        waiting = ""
    assert not waiting, f"the block ends within a command: {waiting}"


exported: dict[tuple[str, ...], dict[str, bytes]] = {}  # command -> the files that it made


def run_useg(words: list[str]) -> None:
    if words[0] != "export" or SOAK:
        call_useg(words)
    elif tuple(words) in exported:  # of the same model, by another page
        for name, content in exported[tuple(words)].items():
            Path(name).write_bytes(content)
    else:
        before = set(Path().iterdir())
        call_useg(words)
        made = set(Path().iterdir()) - before
        exported[tuple(words)] = {path.name: path.read_bytes() for path in made}


def call_useg(words: list[str]) -> None:
    if words[0] == "scenes":
        shutil.rmtree(words[1], ignore_errors=True)
        words = [*words[:2], "--count", "12", "--size", "128x96"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--quiet"])
    assert ended.value.code == 0, f"useg {shlex.join(words)}: exit status {ended.value.code}"


@contextmanager
def serving(words: list[str]) -> Iterator[str]:
    """Start `useg serve` on a free port; its address."""
    command = [sys.executable, "-m", "useg", "serve", *words, "--port", "0", "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield process.stdout.readline().split()[-1]
        finally:
            process.terminate()
