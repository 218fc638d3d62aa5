"""``useg label`` and ``useg serve``: the commands that run until somebody ends them."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from useg.console import Device, Model, Reporter, RuntimeName, finite, global_options, show
from useg.errors import SettingsError, need


def label_command(
    pictures: Annotated[
        Path, typer.Argument(metavar="PICTURES", help="Folder of the images to label")
    ],
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME,...", help="Classes of a new folder; the page can name them, too"
        ),
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of the masks (default: masks beside a folder called images, else in "
            "PICTURES)",
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Model that makes suggestions from the first image on"),
    ] = None,
    correct: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="RUN", help="Begin each image with this model's answer, to correct"
        ),
    ] = None,
    faulty: Annotated[
        bool,
        typer.Option("--faulty", help="Inspect the masks first, and begin with those in question"),
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 picks a free one")] = 0,
    no_open: Annotated[
        bool, typer.Option("--no-open", help="Print the address, but open no browser")
    ] = False,
) -> None:
    """Label images in the browser, while a model learns and suggests the rest.

    Prints the address of the page, with the token that it needs. Ctrl+C ends it; every stroke is
    already saved.
    """
    _need_packages()
    if model and correct:
        raise SettingsError("--model and --from are both given; give the model to one of them")
    from useg.labelling.folder import name_list
    from useg.labelling.run import LabelOptions, label_pictures

    options = LabelOptions(
        pictures,
        name_list(classes) if classes is not None else (),
        masks,
        model or correct,
        bool(correct),
        port,
        faulty,
    )
    reporter = Reporter(global_options.quiet)
    label_pictures(options, show, reporter.say, browse=not no_open)


def serve_command(
    model: Model,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 admits other machines, with a token")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 picks a free one")] = 8000,
    runtime: RuntimeName = None,
    device: Device = None,
    token: Annotated[
        str,
        typer.Option(
            envvar="USEG_TOKEN",
            show_default=False,
            help="Token that clients must send; safer in the environment than on the command line",
        ),
    ] = "",
    no_token: Annotated[
        bool,
        typer.Option(
            "--no-token", help="Admit other machines without a token; otherwise useg makes one up"
        ),
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            show_default=False,
            help="Name by which clients call the service, such as example.org; repeatable. Without "
            "a token, only addresses, localhost and these names are served",
        ),
    ] = None,
    upload: Annotated[
        float, typer.Option(callback=finite, metavar="MB", help="Largest request body")
    ] = 32,
    pixels: Annotated[
        float,
        typer.Option(
            callback=finite, metavar="MILLIONS", help="Largest image, in millions of pixels"
        ),
    ] = 25,
    waiting: Annotated[
        int, typer.Option(help="Images that may wait in the queue; further ones get a 503")
    ] = 64,
    seconds: Annotated[
        float, typer.Option(callback=finite, help="Deadline of a request; later it gets a 503")
    ] = 25,
    memory: Annotated[
        float,
        typer.Option(
            callback=finite, metavar="MB", help="Memory for the images in progress, all together"
        ),
    ] = 2500,
) -> None:
    """Serve a model over HTTP, with a web page; SIGTERM shuts it down gracefully.

    Each request is logged as one JSON line on standard error.
    """
    _need_packages()
    from useg.inference.predictor import Predictor
    from useg.serving.middleware import make_limits
    from useg.serving.run import LogWriter, choose_token, listen, listener_url, run
    from useg.serving.service import make_service

    limits = make_limits(upload, pixels, waiting, seconds, memory)
    listener = listen(host, port)
    token, notice = choose_token(listener, token, no_token)
    service = make_service(Predictor.load(model, runtime or "auto"), limits)

    def ready() -> None:
        # Nobody needs to read it.
        with contextlib.suppress(OSError):
            show(f"{service.name} at {listener_url(listener)}")
            if not global_options.quiet:
                show(f"computed by {service.predictor.runtime.name}")
            if notice:
                show(notice, file=sys.stderr)

    writer = None if global_options.quiet else LogWriter(sys.stderr.fileno())
    run(service, listener, writer, token, [host, *(allow_host or [])], ready)


def _need_packages() -> None:
    for package in ("fastapi", "uvicorn", "python_multipart"):
        need(package, "serve")
