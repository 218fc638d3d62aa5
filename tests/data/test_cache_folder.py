"""Cache entries are complete or not there, old ones are removed, and digests notice every edit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from made_data import build_samples, list_cache_entries, write_random_dataset

import useg
from useg.data import cache_folder
from useg.files import find_cache_folder

BUILDER = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from made_data import build_samples, random_dataset
from useg.data import cache
dataset = random_dataset(Path({data!r}))
if {hang}:
    read_sample = cache.read_sample
    def slow(pair, dataset):
        if pair == dataset.pairs[-1]:
            print("half", flush=True)
            sys.stdin.read()
        return read_sample(pair, dataset)
    cache.read_sample = slow
sys.stdin.readline()
print(int(sum(sample.image.sum() for sample in build_samples(dataset))))
"""


def start_builder(tmp_path: Path, hang: bool = False) -> subprocess.Popen[str]:
    code = BUILDER.format(
        tests=str(Path(__file__).parents[1]), data=str(tmp_path / "data"), hang=hang
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_two_processes_may_fill_one_entry_and_a_killed_one_is_cleaned_up(
    tmp_path: Path, cache_path: Path, decoded: list[str]
) -> None:
    dataset = write_random_dataset(tmp_path / "data")
    alive, dead = start_builder(tmp_path, hang=True), start_builder(tmp_path, hang=True)
    for process in (alive, dead):
        assert process.stdin
        assert process.stdout
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "half\n"
    dead.kill()
    dead.communicate()
    assert len(list(cache_path.glob(".useg-*"))) == 2
    samples = build_samples(dataset)
    assert len(decoded) == 4, "an unfinished entry was used"
    assert len(list(cache_path.glob(".useg-*"))) == 1, "the folder of a living process was removed"
    total = int(sum(sample.image.sum() for sample in samples))
    assert alive.communicate()[0] == f"{total}\n"
    assert len(list_cache_entries(cache_path)) == len(list(cache_path.glob("[.s]*"))) == 1


def test_the_longest_unused_entry_is_removed_first(
    tmp_path: Path, cache_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = [write_random_dataset(tmp_path / f"data{k}", size=(12 + k, 8)) for k in range(3)]
    (cache_path / "somebody's").mkdir(parents=True)
    (cache_path / "somebody's" / "file").write_bytes(bytes(10**6))
    build_samples(datasets[0])
    one = sum(file.stat().st_size for file in list_cache_entries(cache_path)[0].iterdir())
    monkeypatch.setenv("USEG_CACHE_GB", str(2.5 * one / 2**30))
    build_samples(datasets[1])
    oldest = {path: -k for k, path in enumerate(list_cache_entries(cache_path))}
    for path, age in oldest.items():
        os.utime(path, (1000 + age, 1000 + age))
    kept = set(list_cache_entries(cache_path))
    # This entry is used again, so it is the newest now.
    first = build_samples(datasets[0])
    build_samples(datasets[2])
    assert len(list_cache_entries(cache_path)) == 2
    assert len(kept & set(list_cache_entries(cache_path))) == 1
    assert (cache_path / "somebody's" / "file").exists()
    assert len([sample.image.sum() for sample in first]) == 4
    calls: list[int] = []
    build_samples(datasets[0], progress=calls.append)
    assert calls == []


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other places")
@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"XDG_CACHE_HOME": "/x"}, "/x/useg"),
        ({"XDG_CACHE_HOME": "relative"}, "/me/.cache/useg"),
        ({"XDG_CACHE_HOME": ""}, "/me/.cache/useg"),
        ({}, "/me/.cache/useg"),
        ({"USEG_CACHE": "~/here", "XDG_CACHE_HOME": "/x"}, "/me/here"),
        ({"USEG_CACHE": "Off"}, None),
    ],
)
def test_the_cache_folder_is_where_the_environment_says(
    variables: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("USEG_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/me", **variables}.items():
        monkeypatch.setenv(name, value)
    assert find_cache_folder() == (None if expected is None else Path(expected))


def test_an_edit_within_one_tick_of_the_clock_changes_the_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, digest_file = tmp_path / "file", tmp_path / "digests" / "files.json"
    path.write_bytes(b"one")
    at = path.stat().st_mtime_ns
    first = cache_folder.compute_digests([path], digest_file)
    assert not digest_file.exists(), (
        "a file that was just written may be written again without a trace"
    )
    # The file counts as old.
    monkeypatch.setattr(cache_folder, "MIN_FILE_AGE_NANOSECONDS", -(10**12))
    assert cache_folder.compute_digests([path], digest_file) == first
    assert digest_file.exists()
    read: list[str] = []
    digest = cache_folder.hashlib.file_digest
    monkeypatch.setattr(
        cache_folder.hashlib,
        "file_digest",
        lambda file, name: read.append(file.name) or digest(file, name),
    )
    assert cache_folder.compute_digests([path, path], digest_file) == first
    assert read == [], "a settled file is not read again"
    for content in (b"four", b"two"):
        path.write_bytes(content)
        os.utime(path, ns=(at, at))
        assert cache_folder.compute_digests([path], digest_file) != first
    assert len(read) == 2
    digest_file.write_text('{"a": 1')
    missing = tmp_path / "none"
    digests = cache_folder.compute_digests([path, missing], digest_file)
    assert digests[missing] == cache_folder.UNREADABLE_FILE_DIGEST


def test_the_key_covers_all_modules_that_decode_samples() -> None:
    """Modules that an import of data/cache.py loads either decode, or decide no pixel."""
    no_pixels = {
        "__init__.py",
        "data/__init__.py",
        "data/annotations/__init__.py",
        "data/cache_folder.py",
        "errors.py",
        "files.py",
        "images/__init__.py",
        "images/stacks.py",
        "machine.py",
        "models/__init__.py",
        "objects/__init__.py",
        "ownership.py",
        "parsing.py",
        "scoring/__init__.py",
    }
    code = """
import sys, useg.data.cache
print(*(m.__file__ for name, m in sys.modules.items() if name.split('.')[0] == 'useg'))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    root = Path(useg.__file__).parent
    loaded = {Path(file).relative_to(root).as_posix() for file in run.stdout.split()}
    assert loaded - no_pixels == set(cache_folder.DECODING_MODULES)
