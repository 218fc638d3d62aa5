"""scripts/release, run in a temporary clone: one commit, one tag, nothing pushed."""

from __future__ import annotations

import datetime
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ("scripts/release", "useg/__init__.py", "CHANGELOG.md", "CITATION.cff")
NAMES = {"GIT_AUTHOR_NAME": "Tester", "GIT_COMMITTER_NAME": "Tester"}
EMAIL = "tester@example.org"
EMAILS = {"GIT_AUTHOR_EMAIL": EMAIL, "GIT_COMMITTER_EMAIL": EMAIL}
CHANGES = """\
# Changelog

## Unreleased

### Added
- Streets of gold.

## 0.1.0 - 2026-01-02

- All.
"""

pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")


class Clone:
    """A repository with what a release changes; ``origin`` is a bare one beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "clone"
        for name in FILES:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.folder / name)
        (self.folder / "CHANGELOG.md").write_text(CHANGES)
        self.git("init", "--quiet", "--initial-branch=main")
        subprocess.run(["git", "init", "--quiet", "--bare", folder / "origin"], check=True)
        self.git("remote", "add", "origin", str(folder / "origin"))
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "All of it")
        self.git("push", "--quiet", "origin", "main")

    def git(self, *words: str) -> str:
        """Run git here and return what it prints."""
        return self._run("git", *words, check=True).stdout.strip()

    def release(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run the script under test."""
        return self._run(sys.executable, "scripts/release", *words)

    def read(self, name: str) -> str:
        """Return a file's text."""
        return (self.folder / name).read_text()

    def _run(self, *words: str, check: bool = False) -> subprocess.CompletedProcess[str]:
        alone = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
        return subprocess.run(
            words,
            cwd=self.folder,
            env={**os.environ, **NAMES, **EMAILS, **alone},
            capture_output=True,
            text=True,
            check=check,
        )


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def test_one_command_cuts_version_changelog_and_citation(clone: Clone) -> None:
    days = {today()}
    done = clone.release("3.4.5")
    days.add(today())
    assert (done.returncode, done.stderr) == (0, "")
    assert '\n__version__ = "3.4.5"\n' in clone.read("useg/__init__.py")
    [day] = [day for day in days if f"## 3.4.5 - {day}" in clone.read("CHANGELOG.md")]
    cut = CHANGES.replace("## Unreleased\n", f"## Unreleased\n\n## 3.4.5 - {day}\n")
    assert clone.read("CHANGELOG.md") == cut
    assert f'\nversion: "3.4.5"\ndate-released: "{day}"\n' in clone.read("CITATION.cff")


def test_it_makes_one_commit_and_an_annotated_tag(clone: Clone) -> None:
    clone.release("3.4.5")
    assert clone.git("status", "--porcelain") == ""
    assert clone.git("log", "--format=%s").splitlines() == ["Release 3.4.5", "All of it"]
    assert clone.git("cat-file", "-t", "v3.4.5") == "tag"
    assert clone.git("rev-parse", "v3.4.5^{commit}") == clone.git("rev-parse", "HEAD")


def test_it_pushes_nothing_and_says_how_to(clone: Clone) -> None:
    done = clone.release("3.4.5")
    assert "git push --atomic origin HEAD v3.4.5" in done.stdout
    heads = clone.git("ls-remote", "origin").split()[1::2]
    assert "refs/tags/v3.4.5" not in heads
    assert clone.git("rev-parse", "origin/main") == clone.git("rev-parse", "HEAD~1")


def test_a_second_release_replaces_the_date_of_the_citation(clone: Clone) -> None:
    assert clone.release("3.4.5").returncode == 0
    text = clone.read("CHANGELOG.md").replace("## Unreleased\n", "## Unreleased\n\n- More.\n", 1)
    (clone.folder / "CHANGELOG.md").write_text(text)
    clone.git("commit", "--quiet", "--all", "--message", "More")
    done = clone.release("3.5.0")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(re.findall("^date-released:", clone.read("CITATION.cff"), re.MULTILINE)) == 1
    headings = re.findall(r"^## (\S+)", clone.read("CHANGELOG.md"), re.MULTILINE)
    assert headings == ["Unreleased", "3.5.0", "3.4.5", "0.1.0"]


@pytest.mark.parametrize("version", ["3.4", "v3.4.5", "3.4.5rc1", "03.4.5", "3.4.5.6"])
def test_a_version_of_another_form_is_refused(version: str, clone: Clone) -> None:
    done = clone.release(version)
    assert done.returncode == 1
    assert "is not a version; write three numbers" in done.stderr
    assert clone.git("log", "--format=%s") == "All of it"


def test_an_unclean_tree_is_refused(clone: Clone) -> None:
    (clone.folder / "stray.txt").write_text("left over")
    done = clone.release("3.4.5")
    assert (done.returncode, done.stdout) == (1, "")
    assert "the working tree has changes" in done.stderr
    assert clone.git("tag") == ""


def test_a_lower_version_is_refused(clone: Clone) -> None:
    assert "0.0.1 is lower than the present version" in clone.release("0.0.1").stderr


def test_a_tag_that_exists_is_refused(clone: Clone) -> None:
    clone.git("tag", "v3.4.5")
    assert "the tag v3.4.5 exists" in clone.release("3.4.5").stderr


@pytest.mark.parametrize(
    ("changelog", "message"),
    [
        ("# Changelog\n", 'no section "## Unreleased"'),
        ("## Unreleased\n\n### Added\n\n## 0.1.0 - 2026-01-02\n\n- All.\n", "lists nothing under"),
        ("## Unreleased\n\n- New.\n\n## 3.4.5 - 2026-01-02\n", "already has a section for 3.4.5"),
    ],
)
def test_a_changelog_without_news_is_refused(changelog: str, message: str, clone: Clone) -> None:
    (clone.folder / "CHANGELOG.md").write_text(changelog)
    clone.git("commit", "--quiet", "--all", "--message", "Changelog")
    assert message in clone.release("3.4.5").stderr
    assert clone.git("status", "--porcelain") == ""


def test_files_are_restored_when_the_commit_is_refused(clone: Clone) -> None:
    hook = clone.folder / ".git" / "hooks" / "pre-commit"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\necho 'not today' >&2\nexit 1\n")
    hook.chmod(0o755)
    done = clone.release("3.4.5")
    assert (done.returncode, "not today" in done.stderr) == (1, True)
    assert clone.git("status", "--porcelain") == ""
    assert clone.read("CHANGELOG.md") == CHANGES


def test_notes_are_the_entries_of_the_present_version(clone: Clone) -> None:
    clone.release("3.4.5")
    done = clone.release("--notes", "3.4.5")
    assert (done.returncode, done.stdout) == (0, "### Added\n- Streets of gold.\n")
    assert clone.git("status", "--porcelain") == ""


def test_notes_of_another_version_are_refused(clone: Clone) -> None:
    clone.release("3.4.5")
    done = clone.release("--notes", "3.4.6")
    assert (done.returncode, done.stdout) == (1, "")
    assert "useg/__init__.py says 3.4.5, not 3.4.6" in done.stderr


def test_the_real_changelog_can_be_cut(clone: Clone) -> None:
    shutil.copy(ROOT / "CHANGELOG.md", clone.folder)
    clone.git("commit", "--quiet", "--all", "--message", "The real one")
    done = clone.release("99.0.0")
    assert (done.returncode, done.stderr) == (0, "")
