"""Workflows, forms and settings for GitHub: valid by their schemas, pinned, with few rights."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("ruamel.yaml", reason="needs ruamel.yaml: pip install '.[dev]'")
ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
SCHEMAS = [
    *((path, "vendor.github-workflows") for path in WORKFLOWS),
    *((path, "custom.github-workflows-require-timeout") for path in WORKFLOWS),
    *((path, "vendor.github-issue-forms") for path in FORMS),
    (GITHUB / "ISSUE_TEMPLATE" / "config.yml", "vendor.github-issue-config"),
    (GITHUB / "dependabot.yml", "vendor.dependabot"),
    (ROOT / "CITATION.cff", "vendor.citation-file-format"),
]


def read(path: Path) -> Any:
    """Return what a YAML file says. By YAML 1.2, where ``on`` is a word and not a truth value."""
    return yaml.YAML(typ="safe").load(path.read_text("utf-8"))


def jobs() -> dict[str, dict[str, Any]]:
    """Return the jobs of all workflows by "FILE JOB"."""
    return {
        f"{path.name} {name}": job for path in WORKFLOWS for name, job in read(path)["jobs"].items()
    }


def steps() -> list[dict[str, Any]]:
    """Return the steps of all jobs."""
    return [step for job in jobs().values() for step in job["steps"]]


@pytest.mark.parametrize(
    ("path", "schema"), SCHEMAS, ids=lambda value: getattr(value, "name", value)
)
def test_files_follow_their_schema(path: Path, schema: str) -> None:
    pytest.importorskip("check_jsonschema", reason="needs check-jsonschema: pip install '.[dev]'")
    words = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_other_yaml_is_left_unchecked() -> None:
    checked = {path for path, _ in SCHEMAS}
    assert {path for path in GITHUB.rglob("*") if path.suffix in (".yml", ".yaml")} <= checked


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_to_a_commit_with_its_version(path: Path) -> None:
    used = re.findall(r"uses: (.*)", path.read_text("utf-8"))
    assert used
    pin = re.compile(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")
    assert [line for line in used if not pin.fullmatch(line)] == []


def test_an_action_has_the_same_version_everywhere() -> None:
    pins = {step["uses"] for step in steps() if "uses" in step}
    assert len(pins) == len({pin.split("@")[0] for pin in pins})


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_may_do_no_more_than_read(path: Path) -> None:
    workflow = read(path)
    assert set(workflow["permissions"].items()) <= {("contents", "read")}
    assert workflow["concurrency"]["group"]
    assert "pull_request_target" not in workflow["on"]


def test_only_the_release_may_write() -> None:
    writing = {
        name: sorted(right for right, level in job["permissions"].items() if level == "write")
        for name, job in jobs().items()
        if "write" in job.get("permissions", {}).values()
    }
    assert writing == {
        "release.yml publish": ["attestations", "id-token"],
        "release.yml page": ["contents"],
    }


def test_publishing_needs_no_secret_and_waits_for_a_person() -> None:
    assert [path.name for path in WORKFLOWS if "secrets." in path.read_text("utf-8")] == []
    assert jobs()["release.yml publish"]["environment"] == "release"
    assert jobs()["release.yml publish"]["needs"] == "build"


def test_checkouts_keep_no_credentials() -> None:
    checkouts = [step for step in steps() if step.get("uses", "").startswith("actions/checkout@")]
    assert checkouts
    assert {step["with"]["persist-credentials"] for step in checkouts} == {False}


def test_text_of_strangers_is_never_part_of_a_command() -> None:
    assert [step["run"] for step in steps() if "${{" in step.get("run", "")] == []


def test_commands_exist() -> None:
    commands = "\n".join(step.get("run", "") for step in steps())
    scripts = set(re.findall(r"\bscripts/[\w.-]+", commands))
    assert "scripts/check" in scripts
    assert [name for name in scripts if not (ROOT / name).is_file()] == []
    rules = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert set(re.findall(r"^make (\w+)", commands, re.MULTILINE)) <= set(rules)


def test_tests_run_on_every_python_that_is_promised() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    prefix = "Programming Language :: Python :: 3."
    promised = [line[len(prefix) - 2 :] for line in project["classifiers"] if prefix in line]
    assert jobs()["ci.yml tests"]["strategy"]["matrix"]["python"] == promised


def test_hooks_before_a_commit_run_parts_of_the_check() -> None:
    repos = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert [repo["repo"] for repo in repos] == ["local"]
    parts = re.findall(r"^    (\w+)\)$", (ROOT / "scripts" / "check").read_text(), re.MULTILINE)
    entries = [hook["entry"].split() for hook in repos[0]["hooks"]]
    assert entries
    assert all(script == "scripts/check" and part in parts for script, part in entries)


def test_check_refuses_a_part_that_it_does_not_have() -> None:
    done = subprocess.run([ROOT / "scripts" / "check", "speed"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no part 'speed'; the parts are lint, types and tests" in done.stderr
