"""What pyproject.toml promises: bounds, Python versions, addresses, a README for index pages."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
CONFIG: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = CONFIG["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = [
    Requirement(line)
    for line in (*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra))
    if not line.startswith("useg[")
]
SOURCE = PROJECT["urls"]["Source"]


def pinned() -> dict[str, str]:
    """Return the versions of constraints.txt by package."""
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def tracked_texts() -> dict[str, str]:
    """Return the text of every tracked file that is one, by its name."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    words = ["git", "ls-files", "-z"]
    listed = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    paths = [ROOT / name for name in listed.split("\0") if name]
    contents = {path: path.read_bytes() for path in paths if path.is_file()}
    return {
        path.relative_to(ROOT).as_posix(): content.decode("utf-8", "ignore")
        for path, content in contents.items()
        if b"\0" not in content
    }


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_every_dependency_has_a_lower_bound(requirement: Requirement) -> None:
    assert any(bound.operator in (">=", "==", "~=") for bound in requirement.specifier)


def test_every_pinned_version_satisfies_its_bounds() -> None:
    versions = pinned()
    found = [(requirement, canonicalize_name(requirement.name)) for requirement in REQUIREMENTS]
    assert [
        f"{requirement}, but constraints.txt pins {versions[name]}"
        for requirement, name in found
        if name in versions and versions[name] not in requirement.specifier
    ] == []


def test_what_dependencies_need_is_pinned_too() -> None:
    versions, seen, missing = pinned(), set[tuple[str, str]](), set[str]()
    left = [(needed.name, extra) for needed in REQUIREMENTS for extra in ("", *needed.extras)]
    while left:
        name, extra = left.pop()
        if (name, extra) in seen or not (found := list(metadata.distributions(name=name))):
            continue
        seen.add((name, extra))
        missing |= {canonicalize_name(name)} - versions.keys()
        for line in found[0].requires or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                left += [(needed.name, extra) for extra in ("", *needed.extras)]
    assert missing == set(), "add them to constraints.txt: pip freeze"


def test_build_tools_are_pinned() -> None:
    names = {Requirement(line).name for line in CONFIG["build-system"]["requires"]}
    assert {canonicalize_name(name) for name in (*names, "build", "twine", "uv")} <= set(pinned())


def test_classifiers_list_the_supported_python_versions() -> None:
    prefix = "Programming Language :: Python :: 3."
    minors = [int(line[len(prefix) :]) for line in PROJECT["classifiers"] if prefix in line]
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert PROJECT["requires-python"] == f">=3.{minors[0]}"


def test_licence_is_an_expression_alone() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    assert [line for line in PROJECT["classifiers"] if line.startswith("License ::")] == []


def test_the_repository_has_one_address() -> None:
    pattern = re.compile(r"https://github\.com/[\w.-]+/useg\b")
    others = {
        f"{name}: {address}"
        for name, text in tracked_texts().items()
        for address in pattern.findall(text)
        if address != SOURCE
    }
    assert others == set()


def test_no_file_names_the_host_of_a_package_index() -> None:
    hosts = ("pypi" + ".org", "python" + "hosted.org", "download.pytorch" + ".org")
    assert [
        f"{name}: {host}"
        for name, text in tracked_texts().items()
        for host in hosts
        if host in text
    ] == []


def for_index_page(text: str) -> str:
    """Apply the substitutions of pyproject.toml to a text."""
    hook = CONFIG["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    for substitution in hook["substitutions"]:
        replacement = substitution["replacement"].replace("$HFPR_VERSION", "1.2.3")
        text = re.sub(substitution["pattern"], replacement, text)
    return text


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("![a, b](docs/a.png)", f"![a, b]({SOURCE}/raw/v1.2.3/docs/a.png)"),
        ("[`x`](docs/x.md#y)", f"[`x`]({SOURCE}/blob/v1.2.3/docs/x.md#y)"),
        (
            "[![b](docs/b.svg)](LICENSE)",
            f"[![b]({SOURCE}/raw/v1.2.3/docs/b.svg)]({SOURCE}/blob/v1.2.3/LICENSE)",
        ),
        (
            '<img width="9" src="docs/a.png">',
            f'<img width="9" src="{SOURCE}/raw/v1.2.3/docs/a.png">',
        ),
        ('<a href="docs/x.md">', f'<a href="{SOURCE}/blob/v1.2.3/docs/x.md">'),
        ("[x](https://example.org/a)", "[x](https://example.org/a)"),
        ("[x](#how-good)", "[x](#how-good)"),
        ("![x](https://example.org/a.png)", "![x](https://example.org/a.png)"),
    ],
)
def test_links_of_the_readme_get_an_address(written: str, shown: str) -> None:
    assert for_index_page(written) == shown


def test_the_readme_that_is_built_has_no_relative_links() -> None:
    pytest.importorskip("hatch_fancy_pypi_readme")
    core = pytest.importorskip("hatchling.metadata.core")
    manager = pytest.importorskip("hatchling.plugin.manager")
    readme = core.ProjectMetadata(str(ROOT), manager.PluginManager()).core.readme
    assert readme.startswith("# useg")
    assert re.findall(r"\]\((?![a-z]+:|#)[^)]*\)", readme) == []


def test_the_readme_names_only_files_that_exist() -> None:
    links = re.findall(r"\]\((?![a-z]+:|#)([^)#]*)", (ROOT / "README.md").read_text("utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []
