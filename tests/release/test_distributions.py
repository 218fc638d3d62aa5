"""Wheel and source distribution hold every file that they need.

``make dist`` runs these tests with ``USEG_DIST=1``, which also opens what it built in ``dist/``.
"""

from __future__ import annotations

import email.message
import email.parser
import os
import re
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
needs_dist = pytest.mark.skipif(
    os.environ.get("USEG_DIST") != "1",
    reason="opens what `make dist` has built; runs there, with USEG_DIST=1",
)


def package_files() -> set[str]:
    """Return every file of the package folder, as the wheel names it."""
    paths = [path for path in (ROOT / "useg").rglob("*") if path.is_file()]
    return {
        path.relative_to(ROOT).as_posix()
        for path in paths
        if "__pycache__" not in path.parts and path.suffix != ".pyc"
    }


def repository_files() -> set[str]:
    """Return every file of the repository that git does not ignore."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return {name for name in listed.split("\0") if name and (ROOT / name).is_file()}


def test_the_wheel_is_configured_to_hold_the_package_folder() -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel")
    included = wheel.WheelBuilder(str(ROOT)).recurse_included_files()
    assert {file.distribution_path for file in included} == package_files()


def test_the_source_distribution_is_configured_to_hold_the_repository() -> None:
    sdist = pytest.importorskip("hatchling.builders.sdist")
    included = sdist.SdistBuilder(str(ROOT)).recurse_included_files()
    names = {Path(file.path).relative_to(ROOT).as_posix() for file in included}
    # hatchling's own additions are in the list already, but for .gitignore
    assert names | {".gitignore"} == repository_files()


@pytest.fixture(scope="module")
def wheel() -> zipfile.ZipFile:
    [path] = (ROOT / "dist").glob("useg-*-py3-none-any.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> email.message.Message:
    [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return email.parser.Parser().parsestr(wheel.read(name).decode())


@needs_dist
def test_the_wheel_holds_the_package_folder(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == package_files()
    assert "useg/py.typed" in names
    for name in names:
        assert wheel.read(name) == (ROOT / name).read_bytes(), name


@needs_dist
def test_the_wheel_brings_the_licence(wheel: zipfile.ZipFile) -> None:
    [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/licenses/LICENSE")]
    assert wheel.read(name) == (ROOT / "LICENSE").read_bytes()


@needs_dist
def test_the_wheel_names_version_command_and_addresses(
    wheel: zipfile.ZipFile, metadata: email.message.Message
) -> None:
    source = (ROOT / "useg" / "__init__.py").read_text("utf-8")
    assert f'__version__ = "{metadata["Version"]}"' in source
    assert metadata["License-Expression"] == "Apache-2.0"
    addresses = metadata.get_all("Project-URL", [])
    assert {entry.split(",")[0] for entry in addresses} >= {"Changelog", "Issues", "Source"}
    [name] = [name for name in wheel.namelist() if name.endswith("/entry_points.txt")]
    assert "useg = useg.__main__:main" in wheel.read(name).decode()


@needs_dist
def test_the_readme_on_an_index_page_has_no_relative_links(
    metadata: email.message.Message,
) -> None:
    text = metadata.get_payload()
    assert isinstance(text, str)
    assert "# useg" in text
    assert re.findall(r"\]\((?![a-z]+:|#)[^)]*\)", text) == []
    assert f"/raw/v{metadata['Version']}/" in text


@needs_dist
def test_the_source_distribution_holds_the_repository() -> None:
    [path] = (ROOT / "dist").glob("useg-*.tar.gz")
    with tarfile.open(path) as archive:
        files = [member.name for member in archive.getmembers() if member.isfile()]
    names = {name.split("/", 1)[1] for name in files}
    assert names - {"PKG-INFO"} == repository_files()
