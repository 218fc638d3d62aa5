"""Container file and systemd unit: what they copy, install, call and ask is there. Nothing is built here."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer

from useg.cli import app

ROOT = Path(__file__).parent.parent
if not (ROOT / "Containerfile").is_file():
    pytest.skip("not in a checkout", allow_module_level=True)


def steps() -> list[tuple[str, str]]:
    lines = [line for line in (ROOT / "Containerfile").read_text("utf-8").splitlines() if line and not line.startswith("#")]
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines]


def called(words: list[str]) -> dict[str, object]:
    """What the command line makes of ``useg serve ...``, without running it."""
    assert words[:2] == ["/opt/useg/bin/useg", "serve"]
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    return dict(command.make_context("serve", words[2:]).params)


def test_the_container_copies_and_installs_what_there_is() -> None:
    copied = {name for step, rest in steps() if step == "COPY" and "--from" not in rest for name in rest.split()[:-1]}
    assert [name for name in copied if not (ROOT / name).exists()] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert {project["readme"], *project["license-files"], "pyproject.toml", "useg"} <= copied
    [install] = [rest for step, rest in steps() if step == "RUN"]
    [extras] = re.findall(r'"\.\[(.*)\]"', install)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    [constraints] = re.findall(r"--constraint (\S+)", install)
    assert constraints in copied


def test_the_container_serves_as_nobody_and_asks_for_its_health() -> None:
    last = dict(steps())  # of the second stage
    params = called(json.loads(last["ENTRYPOINT"]) + json.loads(last["CMD"]))
    assert (str(params["model"]), params["host"], str(params["port"])) == ("/model", "0.0.0.0", last["EXPOSE"])
    assert int(last["USER"].split(":")[0]) > 0
    asks = json.loads(last["HEALTHCHECK"].split("CMD ")[1])
    compile(asks[-1], "HEALTHCHECK", "exec")
    assert f":{params['port']}/healthz" in asks[-1]


def test_the_unit_serves_here_and_waits_for_the_last_answer() -> None:
    lines = (ROOT / "packaging" / "useg.service").read_text("utf-8").splitlines()
    settings = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    params = called(shlex.split(settings["ExecStart"]))
    assert params["host"] == "127.0.0.1"
    assert int(settings["TimeoutStopSec"]) > float(str(params["seconds"])) + 5
