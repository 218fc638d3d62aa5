"""The command line: each command makes one call of the library and prints the result.

Imports that cost time wait inside the command that needs them, so ``useg --help`` is instant.
"""

from __future__ import annotations

import contextlib
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from useg import __version__
from useg.console import (
    Assignments,
    Augmentation,
    Data,
    Device,
    HtmlFile,
    JsonFile,
    Model,
    Out,
    Reporter,
    RuntimeName,
    TrainedModel,
    finite,
    format_table,
    global_options,
    print_device_warnings,
    print_json,
    show,
)
from useg.errors import MachineError, SettingsError, UsageError, need
from useg.predict_command import predict_command

if TYPE_CHECKING:
    from useg.inference.bench import BenchResult

app = typer.Typer(
    help="Label every pixel: train a U-Net on your own images and masks, score it, use it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="--quiet and --debug may stand anywhere. Exit status: 0 done, 1 a problem was found, "
    "2 wrong use or bad input, 130 interrupted.",
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
        bool, typer.Option("--quick", help="Check in less than a minute that everything works")
    ] = False,
) -> None:
    """Run every step on made street scenes: scenes, inspect, train, evaluate, predict."""
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
    seed: Annotated[int, typer.Option(help="Seed of all random numbers")] = 0,
) -> None:
    """Write made street scenes with exact masks, in CARLA's layout."""
    from useg.config import parse_size
    from useg.scenes.scene import write_scenes

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
            "--fix", metavar="OUT", help="Write a fixed copy to a new folder, and log every change"
        ),
    ] = None,
    drop_doubtful: Annotated[
        bool,
        typer.Option(
            "--drop-doubtful",
            help="With --fix: also leave out pairs that may be right, such as near duplicates",
        ),
    ] = False,
    init: Annotated[
        bool,
        typer.Option(
            "--init",
            help="Write classes.toml, split.csv and dataset.toml into DATA, as it was recognised",
        ),
    ] = False,
    assign: Assignments = [],  # noqa: B006 - typer copies it
) -> None:
    """Show what is in a data set and what is wrong with it; exit status 1 if there are errors."""
    from useg.config import Settings, parse_assignments
    from useg.labelling.faulty import label_command
    from useg.reporting.inspection import inspect_dataset

    if drop_doubtful and not fix:
        raise SettingsError("--drop-doubtful says what --fix leaves out; give --fix OUT too")
    settings = Settings().with_(parse_assignments(assign))
    survey = inspect_dataset(data, settings, html, fix, drop_doubtful=drop_doubtful, init=init)
    if json_file:
        print_json(json_file, survey.as_dict())
    if json_file != Path("-"):
        show("\n".join(survey.lines()))
        if command := label_command(survey):
            show(command)
        if fix:
            show(fix / "changes.txt")
        if init:
            show(survey.root / "dataset.toml")
    if any(finding.severity == "error" for finding in survey.findings):
        raise typer.Exit(1)


def _print_settings(wanted: bool) -> None:
    if wanted:
        from useg.config import describe_settings

        show("'-' as default: useg decides from the data, the machine and the time.\n")
        for key, default, text in describe_settings():
            show(f"{key:22} {default:>12}  {text}")
        raise typer.Exit


@app.command("train")
def train_command(
    data: Data,
    out: Out,
    minutes: Annotated[
        float | None,
        typer.Option(
            callback=finite, help="Total minutes, including decoding and report (default 10)"
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the training images, instead of --minutes")
    ] = None,
    assign: Assignments = [],  # noqa: B006 - typer copies it
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", help="Settings file to start from; the run.toml of a run repeats that run"
        ),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="MODEL",
            help="Start from the weights of this run folder or model.safetensors, and take over "
            "its network and working size",
        ),
    ] = None,
    class_map: Annotated[
        str | None,
        typer.Option(
            "--map",
            metavar="NAME=NAME,...",
            help="With --from: which class of DATA starts as which class of MODEL, where the names "
            "differ",
        ),
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            help="Train K models in the time, and score each image by one that has not seen it: "
            "what to expect of new images, and of new groups where names show groups",
        ),
    ] = None,
    final: Annotated[
        bool,
        typer.Option(
            "--final", help="With --folds: also train a model on all images, for as many steps"
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option(help="Continue the interrupted run in --out, with the identical result")
    ] = False,
    deterministic: Annotated[
        bool, typer.Option(help="Make a GPU give identical results every time (slower)")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Train although useg inspect finds errors in DATA")
    ] = False,
    device: Device = None,
    json_file: JsonFile = None,
    settings_: Annotated[
        bool,
        typer.Option(
            "--settings", help="List all settings and exit", is_eager=True, callback=_print_settings
        ),
    ] = False,
) -> None:
    """Train a U-Net on DATA and write model.safetensors and report.html to --out.

    useg picks every setting that you omit and prints why.
    """
    from useg.config import Settings, parse_assignments

    settings = parse_assignments(assign)
    if deterministic:
        settings["train.deterministic"] = True
    if class_map is not None:
        if start is None:
            raise SettingsError("--map says which classes are taken over; give --from MODEL too")
        from useg.data.class_mapping import parse_class_map

        parse_class_map(class_map)
        settings["model.start_map"] = class_map
    # A mistake in the settings is reported at once, before torch is loaded.
    Settings().with_(settings)
    if final and folds is None:
        raise SettingsError("--final trains a model that --folds K scores; give --folds too")
    from useg.api import train
    from useg.distributed import is_main_process

    arguments: dict[str, Any] = {
        "minutes": minutes,
        "epochs": epochs,
        "settings": settings,
        "config": config,
        "start": start,
        "resume": resume,
        "force": force,
    }
    if folds is not None:
        _train_folds(data, out, folds, final, json_file, arguments)
        return
    with Reporter(global_options.quiet) as reporter:
        run = train(data, out, progress=reporter, **arguments)
    if not is_main_process():
        return
    if json_file:
        steps = {"steps": len(run.log), "interrupted": run.interrupted}
        print_json(json_file, {**run.scores.as_dict(), **steps})
    if json_file != Path("-"):
        mean_iou, accuracy = 100 * run.scores.mean_iou, 100 * run.scores.pixel_accuracy
        show(f"validation mIoU {mean_iou:.1f} %, pixel accuracy {accuracy:.1f} %")
        show(out / ("model.safetensors" if run.interrupted else "report.html"))
    if run.interrupted:
        raise typer.Exit(130)


def _train_folds(
    data: Path,
    out: Path,
    folds: int,
    final: bool,
    json_file: Path | None,
    arguments: dict[str, Any],
) -> None:
    from useg.cross_validation import FOLDS_NAME, train_folds

    with Reporter(global_options.quiet) as reporter:
        result = train_folds(data, out, folds, final=final, progress=reporter, **arguments)
    if json_file:
        print_json(json_file, result.as_dict())
    if result.interrupted:
        show(f"interrupted; the same command with --resume goes on: {out}")
        raise typer.Exit(130)
    if json_file != Path("-"):
        show("\n".join(result.lines()))
        show(out / ("model.safetensors" if final else FOLDS_NAME))


@app.command("adapt")
def adapt_command(
    model: TrainedModel,
    pictures: Annotated[
        Path, typer.Argument(metavar="PICTURES", help="Folder of pictures; masks are not needed")
    ],
    out: Out,
    json_file: JsonFile = None,
) -> None:
    """Adapt a model to pictures without masks: another light, season or laboratory.

    Some of the pictures' batch statistics are mixed into those of the model, and a measurement
    without labels decides how much. If nothing is better, the model stays as it is.
    """
    from useg.inference.adapt import adapt

    with Reporter(global_options.quiet) as reporter:
        adaptation = adapt(
            model,
            pictures,
            out,
            progress=lambda done, total: reporter.count("adapting", done, total),
        )
    if json_file:
        print_json(json_file, adaptation.as_dict())
    if json_file != Path("-"):
        show(adaptation.reason)
        show(out / "model.safetensors")


@app.command("evaluate")
def evaluate_command(
    model: Model,
    data: Data,
    split: Annotated[
        str | None,
        typer.Option(
            help="Images to score: val, train, test or all "
            "(default: val of the training data, all of other data)"
        ),
    ] = None,
    class_map: Annotated[
        str | None,
        typer.Option(
            "--map",
            metavar="NAME=NAME,...",
            help="Which class of DATA is which of the model; 'ids' if equal ids are equal classes",
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(metavar="MODEL", help="Compare with this second model on the same images"),
    ] = None,
    ignore_mask: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Ignore pixels that are not 0 in this image, such as a car's hood"
        ),
    ] = None,
    objects: Annotated[
        str | None,
        typer.Option(
            metavar="CLASS",
            help="Also count objects (connected regions) of a class: found, merged, split",
        ),
    ] = None,
    membranes: Annotated[
        str | None,
        typer.Option(
            metavar="CLASS",
            help="Also compute the ISBI 2012 errors (warping, Rand, pixel); CLASS is the membrane",
        ),
    ] = None,
    tolerance: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS", help="Tolerance of boundary F (default: 0.8 % of the diagonal)"
        ),
    ] = None,
    tile: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS",
            help="Predict in tiles of this size, 0 for whole images; the scores are the same",
        ),
    ] = None,
    runtime: RuntimeName = None,
    device: Device = None,
    augment: Augmentation = "none",
    json_file: JsonFile = None,
    html: HtmlFile = None,
    assign: Assignments = [],  # noqa: B006 - typer copies it
) -> None:
    """Score a model on a data set at the masks' own resolution, with 95 % confidence intervals."""
    from useg.config import parse_assignments
    from useg.data.class_mapping import parse_class_map
    from useg.inference.predictor import load
    from useg.reporting.evaluate import Extras
    from useg.reporting.report import compare, evaluate
    from useg.reporting.text import comparison_lines, evaluation_lines

    if against and html:
        raise SettingsError(
            "--html and --against are both given, but a report shows one model; leave one out"
        )
    extras = Extras(ignore_mask, tolerance, objects, membranes, tile)
    settings = parse_assignments(assign)
    mapping = None if class_map is None else parse_class_map(class_map)
    with Reporter(global_options.quiet) as reporter:

        def count(done: int, total: int) -> None:
            reporter.count("scoring", done, total)

        if against:
            first, second = load(model, runtime, augment), load(against, runtime, augment)
            comparison = compare(
                first,
                second,
                data,
                split,
                settings=settings,
                extras=extras,
                class_map=mapping,
                progress=count,
            )
            content, lines = comparison.as_dict(), comparison_lines(comparison)
        else:
            evaluation = evaluate(
                model,
                data,
                split,
                settings=settings,
                extras=extras,
                class_map=mapping,
                html=html,
                runtime=runtime,
                augment=augment,
                progress=count,
            )
            content, lines = evaluation.as_dict(), evaluation_lines(evaluation)
    if json_file:
        print_json(json_file, content)
    if json_file != Path("-"):
        show("\n".join(lines))


app.command("predict")(predict_command)


@app.command("export")
def export_command(
    model: TrainedModel,
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="NAME.onnx, NAME.xml (OpenVINO), or SITE/: a page that runs it in the browser",
        ),
    ],
    int8: Annotated[
        Path | None,
        typer.Option(
            metavar="DATA",
            help="Quantise to 8 bits: calibrate on DATA's training images, check on the others",
        ),
    ] = None,
    assign: Assignments = [],  # noqa: B006 - typer copies it
    json_file: JsonFile = None,
) -> None:
    """Write a model for other programs: raw pixels in, logits out.

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
    """Measure the images per second of every installed runtime, and their share of the peak."""
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
    pictures: Annotated[
        Path, typer.Argument(metavar="PICTURES", help="Folder of the pictures to label")
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
        typer.Option(metavar="RUN", help="Model that makes suggestions from the first picture on"),
    ] = None,
    correct: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="RUN", help="Begin each picture with this model's answer, to correct"
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
    """Label pictures in the browser, while a model learns and suggests the rest.

    Prints the address of the page, with the token that it needs. Ctrl+C ends it; every stroke is
    already saved.
    """
    for package in ("fastapi", "uvicorn", "python_multipart"):
        need(package, "serve")
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


@app.command("serve")
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
    for package in ("fastapi", "uvicorn", "python_multipart"):
        need(package, "serve")
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
        problem = MachineError(f"{name} cannot be read or written ({error.strerror})")
        _fail(problem, "--debug" in flags)
    except KeyboardInterrupt:
        show("useg: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


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
