"""Ctrl-C ends a command at any moment with one sentence, and leaves nothing half written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from made_serving import save_run
from waiting import eventually

from useg.scenes.generate import write_scenes

SOAK = os.environ.get("USEG_SOAK") == "1"

# Runs the command line, and interrupts it when it imports a module, and where that module says.
PROGRAM = """
import os, runpy, signal, sys
# A background job of a shell starts with SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
moment, place = sys.argv.pop(1), sys.argv.pop(1)
def interrupt(*_):
    os.kill(os.getpid(), signal.SIGINT)
def watch(event, arguments):
    global moment
    if event == "import" and arguments[0] == moment:
        moment = None
        if place == "import":
            interrupt()
        elif place == "callback":
            class Callback:
                __del__ = interrupt
            Callback()
        elif place == "exit":
            import atexit
            atexit.register(interrupt)
sys.addaudithook(watch)
runpy.run_module("useg", run_name="__main__")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted")
    write_scenes(folder / "scenes", 4, (64, 48), 0)
    save_run("cnn", folder / "run")
    return folder


def words(command: str, place: Path, out: Path) -> list[str]:
    scenes, run = str(place / "scenes"), str(place / "run")
    return {
        "train": ["train", scenes, "--out", str(out / "new")],
        "predict": ["predict", run, f"{scenes}/CameraRGB", "--out", str(out / "labels")],
        "serve": ["serve", run, "--port", "0"],
        "export": ["export", run, str(out / "model.onnx")],
        "help": ["--help"],
    }[command]


@pytest.mark.parametrize(
    ("command", "moment", "where"),
    [
        ("train", "typer", "import"),
        ("train", "useg.api", "import"),
        ("predict", "useg.predict_command", "callback"),
        ("serve", "useg.inference.predictor", "import"),
        ("export", "useg.console", "import"),
        ("help", "useg.cli", "exit"),
    ],
)
def test_an_interrupt_ends_with_a_sentence(
    command: str, moment: str, where: str, place: Path, tmp_path: Path
) -> None:
    given = [sys.executable, "-c", PROGRAM, moment, where, *words(command, place, tmp_path)]
    done = subprocess.run(given, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "useg: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_within_generated_code_ends_with_the_status(tmp_path: Path) -> None:
    program = """
import signal, useg.__main__, useg.cli
signal.signal(signal.SIGINT, signal.default_int_handler)
useg.cli.app = lambda *_, **__: exec("signal.raise_signal(signal.SIGINT)")
useg.__main__.main()
"""
    (tmp_path / "program.py").write_text(program)
    given = [sys.executable, "-m", "program"]
    done = subprocess.run(given, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (130, "useg: interrupted\n")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_finished_command_is_not_killed_while_libraries_free_their_memory() -> None:
    # The library waits for a signal that is not ignored.
    program = """
import ctypes, signal, sys, useg.__main__
signal.signal(signal.SIGINT, signal.default_int_handler)
ctypes.pythonapi.Py_AtExit(ctypes.CDLL(None).pause)
print(flush=True)
sys.argv[1:] = ["--version"]
useg.__main__.main()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as running:
        assert running.stdout
        running.stdout.readline()
        eventually(lambda: not has_handler(running.pid, signal.SIGINT))
        running.send_signal(signal.SIGINT)
        running.terminate()
        assert running.wait(20) == -signal.SIGTERM


def has_handler(process: int, number: signal.Signals) -> bool:
    """Tell whether a process has a handler of its own for a signal."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines()
    )
    return bool(int(fields["SigCgt"], 16) & 1 << number - 1)


@pytest.mark.skipif(not SOAK, reason="takes minutes; USEG_SOAK=1 runs it")
@pytest.mark.parametrize("command", ["train", "predict", "serve", "export"])
def test_an_interrupt_at_any_time_ends_with_a_sentence(
    command: str, place: Path, tmp_path: Path
) -> None:
    for k in range(2, 60):
        out = tmp_path / str(k)
        out.mkdir()
        given = [sys.executable, "-m", "useg", *words(command, place, out)]
        with subprocess.Popen(
            given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as running:
            time.sleep(0.05 * k)
            was_running = running.poll() is None
            if was_running:
                os.killpg(running.pid, signal.SIGINT)
            _, error = running.communicate(timeout=60)
        assert "Traceback" not in error
        if was_running:
            assert (running.returncode, error.count("interrupted")) in ((130, 1), (0, 0))
        assert [path for path in out.rglob("*") if path.name.startswith(".")] == []
