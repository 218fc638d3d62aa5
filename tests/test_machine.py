"""How threads wait on a busy machine; parallel work in order and only a few items ahead."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import pytest
import torch
from made_training import restored_threads
from waiting import eventually

import useg
from useg import machine
from useg.data.cache_folder import compute_decoder_version
from useg.machine import in_parallel, prefetch

TUNE = """
import os
import useg
from useg import machine
from useg.data.cache_folder import compute_decoder_version

machine.is_machine_busy = lambda: {busy}
machine.tune()
print(os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.parametrize(
    ("running", "busy"),
    [
        (["1"] * 5, False),
        (["2"] * 5, True),
        (["1", "3", "1", "1", "2"], False),
        (["3", "2", "2", "1", "1"], True),
        (["?"], True),
    ],
)
def test_processes_that_run_for_a_moment_do_not_count(
    running: list[str], busy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(running)
    monkeypatch.setattr(Path, "read_text", lambda path: f"0.1 0.2 0.3 {next(answers)}/345 678\n")
    assert machine.is_machine_busy() is busy


def test_system_without_loadavg_counts_as_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    assert machine.is_machine_busy()


@pytest.mark.parametrize(
    ("busy", "own", "expected"), [(False, None, "None"), (True, None, "2000"), (True, "7", "7")]
)
def test_threads_sleep_on_a_busy_machine_unless_the_user_decides(
    busy: bool, own: str | None, expected: str
) -> None:
    environment = dict(os.environ)
    for key in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        environment.pop(key, None)
    environment |= {"GOMP_SPINCOUNT": own} if own else {}
    program = [sys.executable, "-c", TUNE.format(busy=busy)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


def test_parallel_results_keep_the_order() -> None:
    assert list(in_parallel(lambda k: (time.sleep(0.002 * (k % 3)), k)[1], range(20), 3)) == list(
        range(20)
    )


def test_parallel_work_is_only_a_few_items_ahead() -> None:
    begun: list[int] = []
    results = in_parallel(begun.append, range(100), 2)
    next(results)
    eventually(lambda: len(begun) == 5)
    time.sleep(0.05)
    assert len(begun) == 5
    results.close()  # type: ignore[attr-defined]


def test_parallel_work_that_has_not_begun_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    go_on = threading.Event()

    def work(k: int) -> None:
        begun.append(k)
        assert k == 0 or go_on.wait(60)

    def shut_down(pool: ThreadPoolExecutor, *arguments: object, **named: object) -> None:
        go_on.set()
        genuine(pool, *arguments, **named)

    # Called when what has not begun has been cancelled.
    genuine = ThreadPoolExecutor.shutdown
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", shut_down)
    results = in_parallel(work, range(100), 2)
    next(results)
    eventually(lambda: begun == [0, 1, 2])
    results.close()  # type: ignore[attr-defined]
    assert begun == [0, 1, 2]


def test_items_made_ahead_take_no_threads_from_those_that_use_them() -> None:
    with restored_threads():
        torch.set_num_threads(3)
        threads = prefetch(torch.get_num_threads() for _ in range(2))
        assert [(made, torch.get_num_threads()) for made in threads] == [(1, 3), (1, 3)]


def test_a_checkout_that_is_not_installed_has_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    find_version = metadata.version

    def version_of_others(package: str) -> str:
        if package == "useg":
            raise metadata.PackageNotFoundError(package)
        return find_version(package)

    monkeypatch.setattr(metadata, "version", version_of_others)
    assert machine.describe_machine()["useg"] == useg.__version__
    assert compute_decoder_version.__wrapped__()


def test_garbage_collection_goes_on_after_a_pause() -> None:
    def fail_in_a_pause() -> None:
        with machine.paused_garbage_collection(freeze=True):
            with machine.paused_garbage_collection(freeze=True):
                pass
            assert not gc.isenabled()
            raise KeyError

    assert gc.isenabled()
    with pytest.raises(KeyError):
        fail_in_a_pause()
    assert gc.isenabled()


def test_what_is_made_in_a_pause_of_garbage_collection_is_not_looked_at_again() -> None:
    before = gc.get_freeze_count()
    try:
        with machine.paused_garbage_collection(freeze=True):
            lists: list[list[int]] = [[] for _ in range(10_000)]
        assert gc.get_freeze_count() - before >= len(lists)
    finally:
        gc.unfreeze()


def test_python_does_not_look_for_garbage_when_it_ends() -> None:
    """What was registered before ``tune`` is called after it."""
    code = """
import atexit, gc
from useg.machine import tune
atexit.register(lambda: print(gc.get_freeze_count() > 1000))
tune()
"""
    printed = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    assert printed == "True\n"
