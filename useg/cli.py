"""The command line: each command makes one call of the library and prints the result.

Imports that cost time wait inside the command that needs them, so ``useg --help`` is instant.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from useg import __version__
from useg.console import (
    Assignments,
    Data,
    Device,
    HtmlFile,
    JsonFile,
    Model,
    Out,
    Reporter,
    TrainedModel,
    finite,
    format_table,
    global_options,
    print_device_warnings,
    print_json,
    runtime_option,
    show,
)
from useg.errors import MachineError, SettingsError, UsageError, need
from useg.predict_command import predict_command
from useg.train_commands import evaluate_command, train_command

if TYPE_CHECKING:
    from useg.inference.bench import BenchResult

app = typer.Typer(
    help="Label every pixel: train a U-Net on your own images and masks, score it, use it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="--quiet and --debug work in any position. Exit status: 0 done, 1 a problem was found, "
    "2 invalid use or input, 130 interrupted.",
)

GLOBAL_FLAGS = ("--quiet", "--debug")


def _print_version(wanted: bool) -> None:
    if wanted:
        show(f"useg {__version__}")
        raise typer.Exit


@app.callback()
def set_global_options(
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only results and errors")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    """Set the options of every command."""
    global_options.quiet = quiet


@app.command("demo")
def demo_command(
    out: Out = Path("demo"),
    minutes: Annotated[
        float | None,
        typer.Option(callback=finite, help="Minutes of training (default 4.2; 0.5 with --quick)"),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Only check that everything works, in less than a minute"),
    ] = False,
) -> None:
    """Run every step on generated street scenes: scenes, inspect, train, evaluate, predict."""
    from useg.api import run_demo

    with Reporter(global_options.quiet) as reporter:
        demo = run_demo(out, minutes=minutes, quick=quick, progress=reporter)
    scores = demo.evaluation.scores
    show(
        f"held-out mIoU {100 * scores.mean_iou:.1f} %, "
        f"pixel accuracy {100 * scores.pixel_accuracy:.1f} % "
        f"on {scores.num_images} scenes, {demo.seconds:.0f} s"
    )
    show(demo.report)


@app.command("scenes")
def scenes_command(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to create")],
    count: Annotated[int, typer.Option(help="Number of scenes")] = 100,
    size: Annotated[str, typer.Option(metavar="WxH", help="Size in pixels")] = "256x192",
    seed: Annotated[int, typer.Option(help="Random seed")] = 0,
) -> None:
    """Generate street scenes with exact masks, in the layout of CARLA."""
    from useg.config import parse_size
    from useg.scenes.generate import write_scenes

    write_scenes(out, count, parse_size(size), seed)
    show(out)


@app.command("inspect")
def inspect_command(
    data: Data,
    html: HtmlFile = None,
    json_file: JsonFile = None,
    fix: Annotated[
        Path | None,
        typer.Option(
            "--fix",
            metavar="OUT",
            help="Write a repaired copy to a new folder, with a log of all changes",
        ),
    ] = None,
    drop_doubtful: Annotated[
        bool,
        typer.Option(
            "--drop-doubtful",
            help="With --fix: also omit doubtful pairs, such as near duplicates",
        ),
    ] = False,
    init: Annotated[
        bool,
        typer.Option(
            "--init",
            help="Write what useg recognised to classes.toml, split.csv and dataset.toml in DATA",
        ),
    ] = False,
    assign: Assignments = [],  # noqa: B006 - typer copies it
) -> None:
    """Show the content of a data set and its problems; exit status 1 if there are errors."""
    from useg.config import Settings, parse_assignments
    from useg.labelling.mask_files import suggest_label_command
    from useg.reporting.inspection import inspect_dataset

    if drop_doubtful and not fix:
        raise SettingsError("--drop-doubtful only works with --fix OUT; add it")
    settings = Settings().with_(parse_assignments(assign))
    survey = inspect_dataset(data, settings, html, fix, drop_doubtful=drop_doubtful, init=init)
    if json_file:
        print_json(json_file, survey.as_dict())
    if json_file != Path("-"):
        show("\n".join(survey.lines()))
        if command := suggest_label_command(survey):
            show(command)
        if fix:
            show(fix / "changes.txt")
        if init:
            show(survey.root / "dataset.toml")
    if any(finding.severity == "error" for finding in survey.findings):
        raise typer.Exit(1)


app.command("train")(train_command)


@app.command("adapt")
def adapt_command(
    model: TrainedModel,
    images: Annotated[
        Path, typer.Argument(metavar="IMAGES", help="Folder with images; masks are not needed")
    ],
    out: Out,
    json_file: JsonFile = None,
) -> None:
    """Adapt a model to unlabelled images, for example of another season or laboratory.

    Mixes the batch normalisation statistics of the images into those of the model. useg measures,
    without labels, which share of them helps. The model stays unchanged if no share does, or if it
    gives all images the same brightness and contrast (data.standardize).
    """
    from useg.inference.adapt import adapt

    with Reporter(global_options.quiet) as reporter:
        adaptation = adapt(
            model,
            images,
            out,
            progress=lambda done, total: reporter.count("adapting", done, total),
        )
    if json_file:
        print_json(json_file, adaptation.as_dict())
    if json_file != Path("-"):
        show(adaptation.reason)
        show(out / "model.safetensors")


app.command("evaluate")(evaluate_command)
app.command("predict")(predict_command)


@app.command("export")
def export_command(
    model: TrainedModel,
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="NAME.onnx, NAME.xml (OpenVINO), or SITE/ (a page that runs it in the browser)",
        ),
    ],
    int8: Annotated[
        Path | None,
        typer.Option(
            metavar="DATA",
            help="Quantise to 8 bits: calibrate on training images of DATA, check on held-out ones",
        ),
    ] = None,
    assign: Assignments = [],  # noqa: B006 - typer copies it
    json_file: JsonFile = None,
) -> None:
    """Export a model as ONNX, OpenVINO or a web page: raw pixels in, logits out.

    useg compares the exported model with PyTorch and keeps it only if both agree.
    """
    from useg.config import parse_assignments
    from useg.serving.export import export

    with Reporter(global_options.quiet) as reporter:
        exported = export(model, out, int8, settings=parse_assignments(assign), say=reporter.say)
    if json_file:
        print_json(json_file, exported.as_dict())
    if json_file != Path("-"):
        show("\n".join(exported.lines()))


@app.command("bench")
def bench_command(
    model: Model,
    size: Annotated[
        str | None,
        typer.Option(metavar="WxH", help="Image size (default: the model's working size)"),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure each installed runtime: images per second, and share of the machine's peak FLOP/s."""
    from useg.config import parse_size

    pixels = parse_size(size) if size else None
    from useg.inference.bench import bench

    with Reporter(global_options.quiet) as reporter:
        measured = bench(model, pixels, say=reporter.say)
    if json_file:
        print_json(json_file, measured.as_dict())
    if json_file != Path("-"):
        show("\n".join(_bench_lines(measured)))


def _bench_lines(measured: BenchResult) -> list[str]:
    width, height = measured.size
    rows = [
        (
            speed.name,
            speed.precision,
            f"{speed.images_per_second:.3g}",
            "-" if speed.share_of_peak is None else f"{100 * speed.share_of_peak:.0f} %",
            f"{1000 * speed.seconds_per_image:.3g} ms",
        )
        for speed in sorted(measured.speeds, key=lambda speed: -speed.images_per_second)
    ]
    headings = ("runtime", "precision", "images/s", "share of peak", "one image")
    peaks = ", ".join(
        f"{peak / 1e9:.0f} in {precision}" for precision, peak in measured.peaks.items()
    )
    return [
        f"{width}x{height} pixels, {measured.macs / 1e9:.3g} GMACs per image, "
        f"{measured.threads} threads",
        "",
        *format_table(headings, rows),
        "",
        f"measured peak, GFLOP/s: {peaks}",
        *(f"{name}: {why}" for name, why in measured.missing.items()),
    ]


@app.command("label")
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


@app.command("serve")
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
        with suppress(OSError):
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


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Args:
        arguments: by default those of the process.
    """
    from useg.machine import tune

    given = sys.argv[1:] if arguments is None else arguments
    flags = [word for word in given if word in GLOBAL_FLAGS]
    rest = [word for word in given if word not in GLOBAL_FLAGS]
    tune()
    print_device_warnings()
    try:
        app(flags + rest, prog_name="useg")
    except UsageError as error:
        _fail(error, "--debug" in flags)
    except BrokenPipeError:
        # Whoever read the results has seen enough.
        _close_output()
        sys.exit(1)
    except OSError as error:
        name = error.filename or "the output"
        problem = MachineError(f"{name} cannot be read or written ({error.strerror or error})")
        _fail(problem, "--debug" in flags)
    except MemoryError as error:
        reason = f" ({error})" if str(error) else ""
        problem = MachineError(
            f"there is not enough memory{reason}; "
            "close other programs, or raise the limit of this process"
        )
        _fail(problem, "--debug" in flags)
    except KeyboardInterrupt:
        _end_interrupted()
    except SystemExit as ending:
        # typer turns an interruption into an exit without a word.
        if ending.__context__ and isinstance(ending.__context__.__cause__, KeyboardInterrupt):
            _end_interrupted()
        raise
    sys.exit(0)


def _end_interrupted() -> NoReturn:
    show("useg: interrupted", file=sys.stderr)
    sys.exit(130)


def _fail(error: UsageError, debug: bool) -> NoReturn:
    if debug:
        raise error
    with suppress(OSError):
        show(f"useg: {error}", file=sys.stderr)
    sys.exit(2)


def _close_output() -> None:
    """Let Python write what is left for a closed pipe to nowhere."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
