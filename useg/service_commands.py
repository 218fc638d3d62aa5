"""``useg label`` and ``useg serve``: the commands that run until they are stopped."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from useg.console import Device, Model, Reporter, finite, global_options, runtime_option, show
from useg.errors import SettingsError, need


def label_command(
    images: Annotated[
        Path, typer.Argument(metavar="IMAGES", help="Folder with the images to label")
    ],
    classes: Annotated[
        str | None,
        typer.Option(metavar="NAME,NAME,...", help="Class names (default: the page asks for them)"),
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder for the masks (default: masks, next to a folder named images, else inside "
            "IMAGES)",
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Model that suggests labels from the first image on"),
    ] = None,
    correct: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="RUN", help="Model whose predictions are the initial masks to correct"
        ),
    ] = None,
    faulty: Annotated[
        bool,
        typer.Option("--faulty", help="Inspect existing masks, and show the faulty ones first"),
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 picks a free one")] = 0,
    no_open: Annotated[
        bool, typer.Option("--no-open", help="Print the address without opening a browser")
    ] = False,
) -> None:
    """Label images in the browser while a model learns and suggests the rest.

    Prints the address of the page, including its token. Every stroke is saved; stop with Ctrl+C.
    """
    _need_packages()
    if model and correct:
        raise SettingsError("--model and --from cannot be combined; use only one of them")
    from useg.labelling.app import LabelOptions, serve_labelling_page
    from useg.labelling.folder import split_names

    options = LabelOptions(
        images,
        split_names(classes) if classes is not None else (),
        masks,
        model or correct,
        bool(correct),
        port,
        faulty,
    )
    reporter = Reporter(global_options.quiet)
    serve_labelling_page(options, show, reporter.say, browse=not no_open)


def serve_command(
    model: Model,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on; 0.0.0.0 allows other machines to connect with a token"
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 picks a free one")] = 8000,
    runtime: Annotated[str | None, runtime_option("auto")] = None,
    device: Device = None,
    token: Annotated[
        str,
        typer.Option(
            envvar="USEG_TOKEN",
            show_default=False,
            help="Token that clients must send; safer in the environment than in the command line",
        ),
    ] = "",
    no_token: Annotated[
        bool,
        typer.Option(
            "--no-token", help="Allow other machines without a token (default: generate a token)"
        ),
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            show_default=False,
            help="Host name that clients use, such as example.org; repeatable. Without a token, "
            "requests must use an IP address, localhost or one of these names",
        ),
    ] = None,
    upload: Annotated[
        float, typer.Option(callback=finite, metavar="MB", help="Maximum size of a request body")
    ] = 32,
    pixels: Annotated[
        float,
        typer.Option(
            callback=finite, metavar="MILLIONS", help="Maximum image size, in millions of pixels"
        ),
    ] = 25,
    waiting: Annotated[
        int, typer.Option(help="Maximum number of queued images; further requests get status 503")
    ] = 64,
    seconds: Annotated[
        float,
        typer.Option(callback=finite, help="Time limit of a request; then it gets status 503"),
    ] = 25,
    memory: Annotated[
        float,
        typer.Option(callback=finite, metavar="MB", help="Memory limit for all images in progress"),
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
        # The service also runs if nobody reads its output.
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
