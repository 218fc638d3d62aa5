"""`useg predict`: its arguments -> pictures, scans, videos labelled here or on many machines, or ranked -> print."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from useg.console import Augmented, Computed, Json, Model, Out, said, write_json_output
from useg.errors import UsageError

if TYPE_CHECKING:
    from useg.console import Reporter
    from useg.inference.outputs import OutputOptions

_MOST_FAILURES = 20  # that are told one by one


def predict_command(
    model: Model,
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...", help="images, folders, globs, videos, TIFFs of any size"
        ),
    ],
    out: Out,
    overlays: Annotated[bool, typer.Option(help="draw overlays too")] = True,
    labels: Annotated[
        str, typer.Option(metavar="FORM", help="of the label maps: png or tif")
    ] = "png",
    probabilities: Annotated[
        str | None,
        typer.Option(
            metavar="FORM", help="each class's probability too, as uint8 or float16 (TIFF)"
        ),
    ] = None,
    confidence: Annotated[
        str | None,
        typer.Option(metavar="FORM", help="the probability of the class chosen too, as png or tif"),
    ] = None,
    polygons: Annotated[
        bool,
        typer.Option("--polygons", help="regions too, as GeoJSON; on maps in their coordinates"),
    ] = False,
    coco: Annotated[bool, typer.Option("--coco", help="one coco.json of all regions too")] = False,
    areas: Annotated[
        bool, typer.Option("--areas", help="one areas.csv of the classes' pixels too")
    ] = False,
    min_region: Annotated[
        int, typer.Option(metavar="PIXELS", help="smaller regions take the class around them")
    ] = 0,
    max_hole: Annotated[
        int, typer.Option(metavar="PIXELS", help="holes up to this size are filled")
    ] = 0,
    augment: Augmented = "none",
    smooth: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            help="of the past in each frame of a video where it hardly changes, 0 to below 1",
        ),
    ] = 0.0,
    rank: Annotated[
        bool,
        typer.Option(
            "--rank",
            help="do not label, but say in OUT/ranking.csv which pictures to label next by hand",
        ),
    ] = False,
    shard: Annotated[
        str,
        typer.Option(
            metavar="I/N", help="the I-th of N parts of the pictures, for N processes or machines"
        ),
    ] = "1/1",
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="label maps by a Ray cluster; local: one started here"
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="of the cluster; by default one a core")
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            help="label again what this model has labelled in OUT before, with these options"
        ),
    ] = False,
    runtime: Computed = None,
    json_file: Json = None,
) -> None:
    """Label images: palette PNGs in OUT, overlays in OUT/overlays.

    The same command again goes on where it was stopped. Exit status 1 when some images could not be labelled.
    """
    from useg.console import Reporter
    from useg.inference.files import parse_shard
    from useg.inference.outputs import OutputOptions
    from useg.inference.video import VIDEO_SUFFIXES

    wanted = OutputOptions(
        labels, overlays, probabilities, confidence, polygons, coco, areas, min_region, max_hole
    )
    part = parse_shard(shard)
    videos = [source for source in sources if Path(source).suffix.lower() in VIDEO_SUFFIXES]
    pictures = [source for source in sources if source not in videos]
    with Reporter(said.quiet) as reporter:
        if rank:
            content, line, failed = _rank(model, pictures, out, runtime, reporter)
        elif cluster is not None:
            content, line, failed = _on_cluster(
                model, pictures, out, cluster, workers, runtime, reporter
            )
        else:
            content, line, failed = _label(
                model,
                pictures,
                videos,
                out,
                wanted,
                part,
                overwrite,
                runtime,
                augment,
                smooth,
                reporter,
            )
    if json_file:
        write_json_output(
            json_file,
            {**content, "failed": [{"path": path, "error": reason} for path, reason in failed]},
        )
    if json_file != Path("-"):
        print(line)
    _tell(failed, content["num_images"], "ranked" if rank else "labelled")


Told = tuple[
    dict[str, Any], str, list[tuple[str, str]]
]  # for JSON, in a line, and what failed with the reason


def _label(
    model: Path, pictures: Sequence[str], videos: Sequence[str], out: Path, wanted: OutputOptions, shard: tuple[int, int], overwrite: bool,
    runtime: str | None, augment: str, smooth: float, reporter: Reporter,
) -> Told:  # fmt: skip
    from useg.inference.files import predict
    from useg.inference.video import predict_video

    content: dict[str, Any] = {"num_images": 0, "kept": 0, "label_maps": [], "videos": []}
    lines, failed = [], []
    stems = [Path(video).stem for video in videos]
    if len(set(stems)) < len(stems):
        raise UsageError(
            f"two videos have one name ({', '.join(sorted(stems))}), and one would overwrite the other; label them into different folders"
        )
    for video in videos:
        film = predict_video(
            model,
            video,
            out,
            overlays=wanted.overlays,
            smooth=smooth,
            runtime=runtime,
            augment=augment,
            progress=reporter.timed("labelling"),
        )
        made = [str(path) for path in (film.overlay, film.masks) if path]
        content["videos"].append(
            {
                "path": video,
                "frames": film.frames,
                "seconds": film.seconds,
                "flicker": film.flicker,
                "written": made,
            }
        )
        lines.append(
            f"{' and '.join(made)}: {film.frames} frames, {film.frames / film.seconds:.1f} a second; flicker {film.flicker:.2%}; sound is not copied"
        )
    if pictures:
        outcome = predict(
            model,
            pictures,
            out,
            wanted=wanted,
            shard=shard,
            overwrite=overwrite,
            runtime=runtime,
            augment=augment,
            progress=reporter.timed("labelling"),
        )
        failed = [(str(failure.path), failure.reason) for failure in outcome.failed]
        label_maps = [str(path) for path in outcome.label_maps]
        content |= {"num_images": len(label_maps), "kept": outcome.kept, "label_maps": label_maps}
        lines.append(
            f"{len(label_maps)} label maps in {out}"
            + (f", {outcome.kept} of them from before" if outcome.kept else "")
        )
    return content, "\n".join(lines), failed


def _rank(
    model: Path, pictures: Sequence[str], out: Path, runtime: str | None, reporter: Reporter
) -> Told:
    from useg.inference.predictor import load
    from useg.inference.ranking import write_ranking

    ranking = write_ranking(load(model, runtime), pictures, out, progress=reporter.timed("ranking"))
    order = [
        {"path": str(one.path), "gain": one.gain, "uncertainty": one.uncertainty}
        for one in ranking.order
    ]
    failed = [(str(failure.path), failure.reason) for failure in ranking.failed]
    return {"num_images": len(order), "ranking": order}, str(out / "ranking.csv"), failed


def _on_cluster(
    model: Path,
    pictures: Sequence[str],
    out: Path,
    address: str,
    workers: int | None,
    runtime: str | None,
    reporter: Reporter,
) -> Told:
    from useg.inference.cluster import predict_cluster

    done = predict_cluster(
        model,
        pictures,
        str(out),
        address=None if address == "local" else address,
        workers=workers,
        runtime=runtime,
        progress=reporter.timed("labelling"),
    )
    made = done.num_images - len(done.failed)
    line = f"{made} label maps in {out}" + (
        f", {done.num_kept} of them from before" if done.num_kept else ""
    )
    return (
        {"num_images": made, "kept": done.num_kept, "seconds": done.seconds},
        line,
        list(done.failed.items()),
    )


def _tell(failed: Sequence[tuple[str, str]], done: int, what: str) -> None:
    for _, reason in failed[:_MOST_FAILURES]:
        print(f"useg: {reason}", file=sys.stderr)
    if failed:
        rest = "; --json FILE lists them all" if len(failed) > _MOST_FAILURES else ""
        print(
            f"useg: {len(failed)} of {len(failed) + done} images could not be {what}{rest}",
            file=sys.stderr,
        )
        raise typer.Exit(1)
