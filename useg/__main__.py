"""The command ``useg``, or ``python -m useg``: the command line, which Ctrl-C ends at any moment.

Python alone prints a traceback if it is interrupted while it imports, and forgets an interruption
within a callback. So this module imports almost nothing, and handles interruptions from its first
line on. Only those in the few milliseconds in which Python itself starts are not useg's to handle.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import NoReturn

_SENTENCE = b"useg: interrupted\n"
_STATUS = 130

# An interruption that comes at a bad moment is repeated after this time.
_REPEAT_SECONDS = 0.02


def main() -> NoReturn:
    """Run the command line and exit; an interruption ends it with one sentence and status 130."""
    # A background job of a shell starts with interruptions ignored.
    is_handled = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_handled:
        signal.signal(signal.SIGINT, _exit_with_sentence)
        # At the very end Python brings back the system's handler, which would kill the process
        # while libraries free their memory. It keeps one that ignores interruptions.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    from useg.cli import main as run_command_line

    status: object = None
    try:
        if is_handled:
            sys.unraisablehook = _report_unraisable
            signal.signal(signal.SIGINT, _interrupt)
        run_command_line()
    except KeyboardInterrupt:
        _exit_with_sentence()
    except SystemExit as ending:
        status = ending.code
        # If an interruption has passed through generated code, Python ends by the signal and not
        # with this status, unless other such code has run since.
        eval("0")
        raise
    finally:
        # Python still waits for threads. A command that shuts down gracefully has its own handler.
        if signal.getsignal(signal.SIGINT) is _interrupt:
            is_told = status == _STATUS
            signal.signal(signal.SIGINT, _exit_at_once if is_told else _exit_with_sentence)


def _exit_with_sentence(number: int = 0, frame: FrameType | None = None) -> NoReturn:
    try:
        os.write(2, _SENTENCE)
    finally:
        _exit_at_once()


def _exit_at_once(number: int = 0, frame: FrameType | None = None) -> NoReturn:
    os._exit(_STATUS)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise ``KeyboardInterrupt``, after the import during which it came, if any.

    Libraries hide an exception within their import, or turn it into another one.
    """
    while frame and "importlib._bootstrap" not in frame.f_code.co_filename:
        frame = frame.f_back
    if not frame:
        raise KeyboardInterrupt
    _repeat()


def _report_unraisable(problem: sys.UnraisableHookArgs) -> None:
    """Repeat an interruption within a callback, where Python ignores it; report anything else."""
    if isinstance(problem.exc_value, KeyboardInterrupt):
        _repeat()
    else:
        sys.__unraisablehook__(problem)


def _repeat() -> None:
    import threading

    timer = threading.Timer(_REPEAT_SECONDS, signal.raise_signal, [signal.SIGINT])
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    main()
