"""Arguments -> one call -> print. Every import that costs time waits inside the command that needs it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from useg import __version__
from useg.errors import UsageError

app = typer.Typer(
    help="Label every pixel: train a U-Net on your own pictures and masks, score it, use it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="--quiet and --debug may stand anywhere. Exit status: 0 done, 1 something was found wrong, 2 wrong use or bad input, 130 interrupted.",
)
_ANYWHERE = ("--quiet", "--debug")
_quiet = False

Data = Annotated[Path, typer.Argument(metavar="DATA", help="folder of images and masks whose layout is recognised, or a dataset.toml")]
Model = Annotated[Path, typer.Argument(metavar="MODEL", help="run folder or model.safetensors")]
Out = Annotated[Path, typer.Option("--out", help="folder to write")]
Set = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="change a setting; may be repeated (useg train --settings lists them)")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the result as JSON ('-': to standard output)")]
Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="write a page with pictures")]


@app.callback()
def options(
    quiet: Annotated[bool, typer.Option("--quiet", help="say nothing but results and errors")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
    version: Annotated[bool, typer.Option("--version", help="print the version", is_eager=True)] = False,
) -> None:
    """Options of every command."""
    global _quiet
    _quiet = quiet
    if version:
        print(f"useg {__version__}")
        raise typer.Exit


@app.command()
def demo(out: Out = Path("demo"), minutes: Annotated[float | None, typer.Option(help="time for training")] = None) -> None:
    """Do the whole job on made street scenes: scenes, inspect, train, evaluate, predict."""
    from useg.demo import MINUTES
    from useg.demo import demo as do_it_all
    from useg.progress import Reporter

    with Reporter(_quiet) as reporter:
        result = do_it_all(out, minutes=minutes or MINUTES, progress=reporter)
    scores = result.evaluation.scores
    print(f"held-out mIoU {scores.mean_iou:.3f}, pixel accuracy {scores.pixel_accuracy:.3f} on {scores.num_images} scenes, {result.seconds:.0f} s")
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
    from useg.data.scenes import write_scenes

    write_scenes(out, count, parse_size(size), seed)
    print(out)


@app.command()
def inspect(data: Data, html: Html = None, json_file: Json = None, assign: Set = []) -> None:  # noqa: B006 - typer copies it
    """Show what is in a data set and what is wrong with it; exit status 1 when something needs attention."""
    from useg.config import Settings, parse_assignments
    from useg.reporting.inspection import inspect as look_through

    survey = look_through(data, Settings().with_(parse_assignments(assign)), html)
    if json_file:
        _write_json(json_file, survey.as_dict())
    if json_file != Path("-"):
        print("\n".join(survey.lines()))
    if any(finding.severity == "error" for finding in survey.findings):
        raise typer.Exit(1)


def _list_settings(wanted: bool) -> None:
    if wanted:
        from useg.config import describe

        print(f"{'setting':22} {'default':>12}  (-: decided from the data and the machine, unless set)")
        for key, default, text in describe():
            print(f"{key:22} {default:>12}  {text}")
        raise typer.Exit


@app.command()
def train(
    data: Data,
    out: Out,
    minutes: Annotated[float | None, typer.Option(help="time for the whole command")] = None,
    epochs: Annotated[int | None, typer.Option(help="passes over the training pictures")] = None,
    assign: Set = [],  # noqa: B006
    config: Annotated[Path | None, typer.Option("--config", help="a run.toml to start from; the one that a run left repeats it")] = None,
    json_file: Json = None,
    settings_: Annotated[bool, typer.Option("--settings", help="list every setting and exit", is_eager=True, callback=_list_settings)] = False,
) -> None:
    """Train a U-Net: DATA -> RUN/model.safetensors, run.toml, log.jsonl, curves.png, report.html."""
    from useg.config import Settings, parse_assignments

    settings = parse_assignments(assign)
    Settings().with_(settings)  # a slip is answered at once, before torch is loaded
    from useg import api
    from useg.progress import Reporter

    with Reporter(_quiet) as reporter:
        run = api.train(data, out, minutes=minutes, epochs=epochs, settings=settings, config=config, progress=reporter)
    if json_file:
        _write_json(json_file, {**run.scores.as_dict(), "steps": len(run.log), "interrupted": run.interrupted})
    if json_file != Path("-"):
        print(f"validation mIoU {run.scores.mean_iou:.3f}, pixel accuracy {run.scores.pixel_accuracy:.3f}")
        print(out / ("model.safetensors" if run.interrupted else "report.html"))
    if run.interrupted:
        raise typer.Exit(130)


@app.command()
def evaluate(
    model: Model,
    data: Data,
    split: Annotated[str, typer.Option(help="val, train, test or all")] = "val",
    json_file: Json = None,
    html: Html = None,
    assign: Set = [],  # noqa: B006
) -> None:
    """Score a model on a data set, at the labels' native resolution."""
    from useg import api
    from useg.config import parse_assignments
    from useg.progress import Reporter

    with Reporter(_quiet) as reporter:
        evaluation = api.evaluate(
            model, data, split, settings=parse_assignments(assign), html=html, progress=lambda done, total: reporter.count("scoring", done, total)
        )
    if json_file:
        _write_json(json_file, evaluation.scores.as_dict())
    if json_file != Path("-"):
        _print_scores(evaluation.scores)


@app.command()
def predict(
    model: Model,
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="image files, folders, globs")],
    out: Out,
    overlays: Annotated[bool, typer.Option(help="draw overlays too")] = True,
    json_file: Json = None,
) -> None:
    """Label images: palette PNGs in OUT, overlays in OUT/overlays."""
    from useg import api
    from useg.progress import Reporter

    with Reporter(_quiet) as reporter:
        written = api.predict(model, sources, out, overlays=overlays, progress=lambda done, total: reporter.count("labelling", done, total))
    if json_file:
        _write_json(json_file, {"num_images": len(written), "label_maps": [str(path) for path in written]})
    if json_file != Path("-"):
        print(f"{len(written)} label maps in {out}")


def _print_scores(scores: Any) -> None:
    width = max(len(entry.name) for entry in scores.classes)
    print(f"{'class':{width}}    IoU   Dice  precision  recall")
    for entry in scores.classes:
        if entry.pixels:
            print(f"{entry.name:{width}}  {entry.iou:.3f}  {entry.dice:.3f}      {entry.precision:.3f}   {entry.recall:.3f}")
    print(f"mean IoU {scores.mean_iou:.4f}, mean Dice {scores.mean_dice:.4f}, pixel accuracy {scores.pixel_accuracy:.4f}, {scores.num_images} images")
    if scores.absent:
        print(f"absent from the truth and left out of the means: {', '.join(scores.absent)}")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    if path == Path("-"):
        print(json.dumps(content, indent=2))
    else:
        from useg.files import write_json

        write_json(path, content)


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
