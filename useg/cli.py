"""Arguments -> one call -> print. Every import that costs time waits inside the command that needs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from useg import __version__
from useg.console import (
    Augmented,
    Computed,
    Data,
    Html,
    Json,
    Model,
    Out,
    Set,
    said,
    write_json_output,
)
from useg.errors import UsageError
from useg.predict_command import predict_command

app = typer.Typer(
    help="Label every pixel: train a U-Net on your own pictures and masks, score it, use it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="--quiet and --debug may stand anywhere. Exit status: 0 done, 1 something was found wrong, 2 wrong use or bad input, 130 interrupted.",
)


_ANYWHERE = ("--quiet", "--debug")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"useg {__version__}")
        raise typer.Exit


@app.callback()
def options(
    quiet: Annotated[
        bool, typer.Option("--quiet", help="say nothing but results and errors")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="print the version", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    """Options of every command."""
    said.quiet = quiet


@app.command("demo")
def demo_command(
    out: Out = Path("demo"),
    minutes: Annotated[
        float | None,
        typer.Option(help="minutes of training (default 4.2; 0.5 with --quick)"),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="check that everything works, in less than a minute"),
    ] = False,
) -> None:
    """Do the whole job on made street scenes: scenes, inspect, train, evaluate, predict."""
    from useg.api import run_demo
    from useg.console import Reporter

    with Reporter(said.quiet) as reporter:
        result = run_demo(out, minutes=minutes, quick=quick, progress=reporter)
    scores = result.evaluation.scores
    print(
        f"held-out mIoU {100 * scores.mean_iou:.1f} %, "
        f"pixel accuracy {100 * scores.pixel_accuracy:.1f} % "
        f"on {scores.num_images} scenes, {result.seconds:.0f} s"
    )
    print(result.report)


@app.command()
def scenes(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder to make")],
    count: Annotated[int, typer.Option(help="number of scenes")] = 100,
    size: Annotated[str, typer.Option(metavar="WxH", help="size in pixels")] = "256x192",
    seed: Annotated[int, typer.Option(help="seed of all randomness")] = 0,
) -> None:
    """Write made street scenes in CARLA's layout."""
    from useg.config import parse_size
    from useg.scenes.scene import write_scenes

    write_scenes(out, count, parse_size(size), seed)
    print(out)


@app.command()
def inspect(
    data: Data,
    html: Html = None,
    json_file: Json = None,
    fix: Annotated[
        Path | None,
        typer.Option(
            "--fix",
            metavar="OUT",
            help="write a clean copy into a new folder, with a log of every change",
        ),
    ] = None,
    assign: Set = [],  # noqa: B006 - typer copies it
) -> None:
    """Show what is in a data set and what is wrong with it; exit status 1 when something needs attention."""
    from useg.config import Settings, parse_assignments
    from useg.reporting.inspection import inspect_dataset

    survey = inspect_dataset(data, Settings().with_(parse_assignments(assign)), html, fix)
    if json_file:
        write_json_output(json_file, survey.as_dict())
    if json_file != Path("-"):
        print("\n".join(survey.lines()))
        if fix:
            print(fix / "changes.txt")
    if any(finding.severity == "error" for finding in survey.findings):
        raise typer.Exit(1)


def _list_settings(wanted: bool) -> None:
    if wanted:
        from useg.config import describe_settings

        print(
            f"{'setting':22} {'default':>12}  (-: decided from the data and the machine, unless set)"
        )
        for key, default, text in describe_settings():
            print(f"{key:22} {default:>12}  {text}")
        raise typer.Exit


@app.command("train")
def train_command(
    data: Data,
    out: Out,
    minutes: Annotated[float | None, typer.Option(help="time for the whole command")] = None,
    epochs: Annotated[int | None, typer.Option(help="passes over the training pictures")] = None,
    assign: Set = [],  # noqa: B006
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", help="a run.toml to start from; the one that a run left repeats it"
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            help="go on with the run in --out that was interrupted or killed, to the same result to the bit"
        ),
    ] = False,
    deterministic: Annotated[
        bool, typer.Option(help="the same result to the bit on a GPU too, more slowly")
    ] = False,
    json_file: Json = None,
    settings_: Annotated[
        bool,
        typer.Option(
            "--settings", help="list every setting and exit", is_eager=True, callback=_list_settings
        ),
    ] = False,
) -> None:
    """Train a U-Net: DATA -> RUN/model.safetensors, run.toml, log.jsonl, curves.png, report.html."""
    from useg.config import Settings, parse_assignments

    settings = {
        **parse_assignments(assign),
        **({"train.deterministic": True} if deterministic else {}),
    }
    Settings().with_(settings)  # a slip is answered at once, before torch is loaded
    from useg.api import train
    from useg.console import Reporter
    from useg.distributed import is_main_process

    with Reporter(said.quiet) as reporter:
        run = train(
            data,
            out,
            minutes=minutes,
            epochs=epochs,
            settings=settings,
            config=config,
            resume=resume,
            progress=reporter,
        )
    if not is_main_process():
        return
    if json_file:
        write_json_output(
            json_file,
            {**run.scores.as_dict(), "steps": len(run.log), "interrupted": run.interrupted},
        )
    if json_file != Path("-"):
        mean_iou, accuracy = 100 * run.scores.mean_iou, 100 * run.scores.pixel_accuracy
        print(f"validation mIoU {mean_iou:.1f} %, pixel accuracy {accuracy:.1f} %")
        print(out / ("model.safetensors" if run.interrupted else "report.html"))
    if run.interrupted:
        raise typer.Exit(130)


@app.command("evaluate")
def evaluate_command(
    model: Model,
    data: Data,
    split: Annotated[str, typer.Option(help="val, train, test or all")] = "val",
    against: Annotated[
        Path | None,
        typer.Option(metavar="MODEL", help="a second model to compare with on the same images"),
    ] = None,
    ignore_mask: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="leave out what is not 0 in this picture, such as a hood"
        ),
    ] = None,
    objects: Annotated[
        str | None,
        typer.Option(
            metavar="CLASS",
            help="also count the connected regions of a class: found, merged, split",
        ),
    ] = None,
    membranes: Annotated[
        str | None,
        typer.Option(
            metavar="CLASS",
            help="also the errors of the ISBI 2012 challenge; CLASS is the membrane",
        ),
    ] = None,
    tolerance: Annotated[
        int | None,
        typer.Option(metavar="PIXELS", help="for boundary F; by default 0.8 % of the diagonal"),
    ] = None,
    tile: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS", help="windows of this size; 0: whole images; the scores are the same"
        ),
    ] = None,
    runtime: Computed = None,
    augment: Augmented = "none",
    json_file: Json = None,
    html: Html = None,
    assign: Set = [],  # noqa: B006
) -> None:
    """Score a model on a data set, at the labels' native resolution, with 95 % intervals."""
    from useg.config import parse_assignments
    from useg.console import Reporter
    from useg.inference.predictor import load
    from useg.reporting.evaluate import Extras
    from useg.reporting.report import compare, evaluate
    from useg.reporting.text import comparison_lines, evaluation_lines

    if against and html:
        raise UsageError(
            "--html and --against are both given, but a page shows one model; leave one of them out"
        )
    extras = Extras(ignore_mask, tolerance, objects, membranes, tile)
    with Reporter(said.quiet) as reporter:

        def count(done: int, total: int) -> None:
            reporter.count("scoring", done, total)

        settings = parse_assignments(assign)
        if against:
            first, second = load(model, runtime, augment), load(against, runtime, augment)
            comparison = compare(
                first, second, data, split, settings=settings, extras=extras, progress=count
            )
            content, lines = comparison.as_dict(), comparison_lines(comparison)
        else:
            evaluation = evaluate(
                model,
                data,
                split,
                settings=settings,
                extras=extras,
                html=html,
                runtime=runtime,
                augment=augment,
                progress=count,
            )
            content, lines = evaluation.as_dict(), evaluation_lines(evaluation)
    if json_file:
        write_json_output(json_file, content)
    if json_file != Path("-"):
        print("\n".join(lines))


app.command("predict")(predict_command)


@app.command("export")
def export_command(
    model: Model,
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="NAME.onnx, NAME.xml for OpenVINO, or SITE/: a page that runs it in the browser",
        ),
    ],
    int8: Annotated[
        Path | None,
        typer.Option(
            metavar="DATA",
            help="8 bits: calibrated on DATA's training pictures, judged on the others",
        ),
    ] = None,
    assign: Set = [],  # noqa: B006
    json_file: Json = None,
) -> None:
    """Write a model for other programs: raw pixels in, logits out; refuses when it does not answer as PyTorch does."""
    from useg.config import parse_assignments
    from useg.console import Reporter
    from useg.serving.export import export

    with Reporter(said.quiet) as reporter:
        exported = export(model, out, int8, settings=parse_assignments(assign), say=reporter.say)
    if json_file:
        write_json_output(json_file, exported.as_dict())
    if json_file != Path("-"):
        print("\n".join(exported.lines()))


@app.command("bench")
def bench_command(
    model: Model,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="WxH", help="size of the pictures; by default the model's working size"
        ),
    ] = None,
    json_file: Json = None,
) -> None:
    """Images per second of every runtime that is installed, and the share of this machine's measured peak."""
    from useg.config import parse_size
    from useg.console import Reporter

    pixels = parse_size(size) if size else None
    from useg.inference.bench import bench

    with Reporter(said.quiet) as reporter:
        measured = bench(model, pixels, say=reporter.say)
    if json_file:
        write_json_output(json_file, measured.as_dict())
    if json_file != Path("-"):
        _print_speeds(measured)


def _print_speeds(measured: Any) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("runtime", "precision", box=box.SIMPLE)
    for heading in ("images/s", "share of peak", "one picture"):
        table.add_column(heading, justify="right")
    for speed in sorted(measured.speeds, key=lambda speed: -speed.images_per_second):
        share = "-" if speed.share_of_peak is None else f"{speed.share_of_peak:.0%}"
        table.add_row(
            speed.name,
            speed.precision,
            f"{speed.images_per_second:.3g}",
            share,
            f"{1000 * speed.seconds_per_image:.3g} ms",
        )
    console = Console(highlight=False)
    console.print(
        f"{measured.size[0]}x{measured.size[1]} pixels, {measured.macs / 1e9:.3g} GMACs a picture, {measured.threads} threads"
    )
    console.print(table)
    peaks = ", ".join(
        f"{peak / 1e9:.0f} in {precision}" for precision, peak in measured.peaks.items()
    )
    console.print(f"measured peak, GFLOP/s: {peaks}", soft_wrap=True)
    for name, why in measured.missing.items():
        console.print(f"{name}: {why}", markup=False, soft_wrap=True)


@app.command("serve")
def serve_command(
    model: Model,
    host: Annotated[
        str, typer.Option(help="address to listen on; 0.0.0.0 lets other machines in")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8000,
    runtime: Computed = None,
    token: Annotated[
        str,
        typer.Option(
            envvar="USEG_TOKEN",
            show_default=False,
            help="what clients have to show; better in the environment",
        ),
    ] = "",
    upload: Annotated[float, typer.Option(metavar="MB", help="largest body of a request")] = 32,
    pixels: Annotated[float, typer.Option(metavar="MILLIONS", help="largest picture")] = 25,
    waiting: Annotated[
        int, typer.Option(help="pictures that may wait; more are refused with 503")
    ] = 64,
    seconds: Annotated[
        float, typer.Option(help="after which a request is given up, and refused with 503")
    ] = 25,
) -> None:
    """Serve a model over HTTP, with a page for people; ends well on SIGTERM. One JSON line per request on standard error."""
    from useg.errors import need

    need("fastapi", "serve")
    need("uvicorn", "serve")
    need("python_multipart", "serve")
    from useg.inference.predictor import Predictor
    from useg.serving.middleware import Limits, json_lines
    from useg.serving.run import listen, listener_url, run
    from useg.serving.service import make_service

    limits = Limits(round(upload * 1e6), round(pixels * 1e6), waiting=waiting, seconds=seconds)
    listener = listen(host, port)
    service = make_service(Predictor.load(model, runtime), limits)
    log = (lambda entry: None) if said.quiet else json_lines(sys.stderr.write)
    run(
        service,
        listener,
        log,
        token,
        ready=lambda: print(f"{service.name} at {listener_url(listener)}", flush=True),
    )


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    from useg.machine import tune

    given = sys.argv[1:] if arguments is None else arguments
    moved = [word for word in given if word in _ANYWHERE]
    debug = "--debug" in moved
    tune()
    try:
        app(moved + [word for word in given if word not in _ANYWHERE], prog_name="useg")
    except UsageError as error:
        if debug:
            raise
        print(f"useg: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("useg: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
