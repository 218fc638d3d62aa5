"""``useg label``: open a folder, listen on this machine only, and print the address of the page."""

from __future__ import annotations

import contextlib
import logging
import secrets
import signal
import sys
import tempfile
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn

from useg.errors import MachineError
from useg.files import clear_drafts, locked_folder, make_folder
from useg.inference.predictor import Predictor
from useg.labelling.app import label_application
from useg.labelling.folder import LabelFolder
from useg.labelling.masks import find_faulty, find_paths
from useg.labelling.rounds import Rounds
from useg.labelling.session import LabelSession
from useg.serving.connections import bounded_config
from useg.serving.middleware import RequestLog
from useg.serving.run import listen, listener_url

HOST = "127.0.0.1"
_MAX_CONNECTIONS = 64
_SHUTDOWN_SECONDS = 3


@dataclass(frozen=True)
class LabelOptions:
    """The options of ``useg label``.

    Args:
        images: The folder of the images.
        classes: The class names, for a folder without classes.
        masks: The folder of the masks; None for the default.
        model: A model that makes the first suggestions.
        correct: Whether each image starts with the prediction of the model as its mask.
        port: The port to listen on; 0 picks a free one.
        faulty: Whether to show images with faulty masks first, as ``useg inspect`` finds them.
    """

    images: Path
    classes: Sequence[str] = ()
    masks: Path | None = None
    model: Path | None = None
    correct: bool = False
    port: int = 0
    faulty: bool = False


@contextmanager
def open_session(
    options: LabelOptions, log: RequestLog = lambda entry: None
) -> Iterator[LabelSession]:
    """Open a folder for labelling, and lock it until the block ends.

    Raises:
        UsageError: The images, masks or model cannot be used, or another process uses the folder.
    """
    paths = find_paths(options.images, options.masks)
    predictor = Predictor.load(options.model) if options.model else None
    make_folder(paths.masks)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked_folder(paths.masks))
        except MachineError as error:
            raise MachineError(
                f"another useg label uses '{paths.masks}', or the folder is not writable ({error})"
            ) from error
        clear_drafts(paths.masks)
        folder = LabelFolder(paths, options.classes)
        if options.faulty:
            folder.mark_faulty(find_faulty(paths))
        if predictor and folder.table is None:
            folder.use_model_classes(predictor.classes)
        rounds = Rounds(folder, predictor, only_done=options.correct)
        session = LabelSession(folder, rounds, log, prefill=options.correct)
        rounds.start()
        try:
            yield session
        finally:
            session.close()


class LabelServer(uvicorn.Server):
    """A server that shuts down without an error on SIGINT and SIGTERM."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start the shutdown; the method of uvicorn would raise the signal again."""
        self.force_exit = self.should_exit
        self.should_exit = True


def make_label_server(session: LabelSession, token: str, port: int) -> LabelServer:
    """Return a server for a session; ``run(sockets=[...])`` returns after its shutdown."""
    application = label_application(session, token, port)
    return LabelServer(bounded_config(application, _MAX_CONNECTIONS, _SHUTDOWN_SECONDS))


def serve_labelling_page(
    options: LabelOptions,
    show: Callable[[str], None],
    say: Callable[[str], None],
    *,
    browse: bool = True,
) -> None:
    """Serve the labelling page until SIGINT or SIGTERM.

    Args:
        options: What to label.
        show: Receives the address with its token.
        say: Receives notices, such as skipped images.
        browse: Whether to open a browser.

    Raises:
        UsageError: See :func:`open_session`; also if the port is in use.
    """
    token = secrets.token_urlsafe(24)
    with listen(HOST, options.port) as listener, open_session(options) as session:
        for note in session.folder.notes:
            say(note)
        address = listener_url(listener)
        server = make_label_server(session, token, listener.getsockname()[1])
        logging.getLogger("uvicorn").addHandler(logging.StreamHandler(sys.stderr))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, server.handle_exit)
        url = f"{address}/?token={token}"
        show(url)
        with tempfile.TemporaryDirectory() as private:
            if browse:
                _open_browser(Path(private, "useg-label.html"), url)
            server.run(sockets=[listener])


def _open_browser(file: Path, url: str) -> None:
    """Open the page through a private file, since all users can see the arguments of a process."""
    file.write_text(f'<meta http-equiv="refresh" content="0; url={url}">', "utf-8")
    with contextlib.suppress(webbrowser.Error):
        webbrowser.open(file.as_uri())
