"""Tables of prediction: runtimes, exports, files, large images, the service, videos."""

from __future__ import annotations

from board_format import (
    Results,
    cite,
    count_of,
    format_table,
    judge,
    names_with,
    percent,
    three_digits,
)

RUNTIMES = """\
The network alone, without decoding and writing: a course's U-Net of width 32. The columns have
images/s in batches, and milliseconds for a single image."""
EXPORTS = """\
A trained model and its exports are compared on held-out images. *Equal labels* is the share of
pixels that have the same label as with PyTorch in fp32. Images/s is of the network alone.
`benchmark_app` is OpenVINO's own benchmark of the same file, in the same precision and tuned for
throughput."""
PREDICTING = """\
`useg predict` reads image files and writes label map files, with the runtime that it chooses. The
*bound* is the speed of the work without any waiting. The *usual loop* decodes with Pillow, computes
with PyTorch in fp32 and saves a PNG, one image after the other. The seconds for one image are those
of the whole command, from the start of Python to the written files."""
SCANS = "`useg predict` on a synthetic scan, into a tiled label map with overviews."
SCAN_OBJECTS = (
    "`useg predict --objects` finds the objects of a scan, separates and writes them. The scan "
    "shows discs, of which every fifth touches the next one. A plain function replaces the "
    "network, so the time is that of everything else. The discs are larger than the training "
    "objects of the model, so that useg computes the scan at two scales."
)
SERVING = """\
Clients send images to `useg serve`, on the same cores, and wait for each label map. The speed
without a service is that of the same work in one process, with one image on each core. The bound is
the speed of all cores if each worked as fast as one thread alone."""


def runtimes(found: Results) -> str:
    names = names_with(found, "runtimes_")
    # By image, runtime and precision; then by file.
    cells: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for name in names:
        for case in ("M1", "M3"):
            for row in found[name].get(case, {"runtimes": []})["runtimes"]:
                key = (
                    "x".join(str(side) for side in found[name][case]["size"]),
                    row["name"],
                    row["precision"],
                )
                speeds = [
                    three_digits(row["images_per_second"]),
                    percent(row["share_of_peak"]),
                    f"{1000 * row['seconds_per_image']:.1f}",
                ]
                cells.setdefault(key, {})[name] = speeds
    head = [
        f"{part}, {count_of(found[name]['threads'], 'thread')}"
        for name in names
        for part in ("images/s", "share of peak", "ms for one")
    ]
    rows = [
        (*key, *(cell for name in names for cell in files.get(name, ["-"] * 3)))
        for key, files in cells.items()
    ]
    table = format_table(("image", "runtime", "precision", *head), rows)
    return (
        "\n\n".join([RUNTIMES, table, *(cite(name, found[name]) for name in names)])
        if names
        else ""
    )


def exports(found: Results) -> str:
    parts = []
    for name in names_with(found, "exports_"):
        content, rows, said = found[name], [], []
        exact = content["forms"][0]["mean_iou"]
        for form in content["forms"]:
            what, speed = f"{form['runtime']} {form['precision']}", form["images_per_second"]
            peer = speed.get("benchmark_app")
            rows.append(
                (
                    form["runtime"],
                    form["precision"],
                    f"{100 * form['mean_iou']:.1f} %",
                    f"{100 * form['equal_labels']:.2f} %",
                    three_digits(speed["useg"]),
                    three_digits(peer) if peer else "",
                    percent(speed["share"]) if peer else "",
                )
            )
            if peer:
                sentence = f"{percent(speed['share'])} of benchmark_app with {what}"
                said.append(judge(sentence, speed["share"] >= 0.95, "95 %"))
            if form["precision"] == "int8":
                lost = 100 * (exact - form["mean_iou"])
                sentence = f"8 bits lose {lost:.1f} points of mean IoU"
                said.append(judge(sentence, lost <= 1, "at most 1"))
        kept, layers = content["int8"]["kept"], content["int8"]["num_layers"]
        said.append(f"{layers - len(kept)} of {count_of(layers, 'layer')} are in 8 bits.")
        head = (
            "runtime",
            "precision",
            "mean IoU",
            "equal labels",
            "images/s",
            "benchmark_app",
            "share of it",
        )
        width, height = content["size"]
        title = f"### {content['network']['encoder']} at {width}x{height}"
        parts.append(
            "\n\n".join([title, format_table(head, rows), " ".join(said), cite(name, content)])
        )
    return "\n\n".join([EXPORTS, *parts]) if parts else ""


def predicting(found: Results) -> str:
    rows, sources, said = [], [], []
    for name in names_with(found, "predict_"):
        content = found[name]
        speed = content["images_per_second"]
        share, times = content["share_of_bound"], content["times_the_loop"]
        said += [
            judge(f"`{name}`: {percent(share)} of the bound", share >= 0.9, "90 %"),
            judge(f"{times:.1f} times the usual loop", times >= 5, "5"),
        ]
        one, shown = content["seconds_of_one_picture"], content["seconds_of_help"]
        starts = (f"{one:.2f}", f"{shown:.2f}")
        rows.append(
            (
                content["network"]["encoder"],
                content["runtime"],
                content["precision_of_the_file"],
                content["pictures"],
                three_digits(speed["predict"]),
                three_digits(speed["predict with overlays"]),
                three_digits(speed["loop"]),
                f"{times:.2f} x",
                percent(share),
                *starts,
            )
        )
        said.append(judge(f"one image takes {one:.2f} s", one < 1.5, "below 1.5 s"))
        said.append(judge(f"`useg --help` {shown:.2f} s", shown < 0.3, "below 0.3 s"))
        sources.append(cite(name, content))
    head = (
        "network",
        "runtime",
        "model file",
        "images",
        "images/s",
        "with overlays",
        "usual loop",
        "speed-up",
        "share of the bound",
        "s for one image",
        "s for --help",
    )
    return (
        "\n\n".join([PREDICTING, format_table(head, rows), " ".join(said), *sources])
        if rows
        else ""
    )


def scans(found: Results) -> str:
    if "scans" not in found:
        return ""
    content = found["scans"]
    rows = [
        (
            f"{scan['side']:,} x {scan['side']:,}",
            three_digits(scan["seconds"]),
            three_digits(scan["megapixels_per_second"]),
            f"{scan['peak_mb']:.0f}",
        )
        for scan in content["scans"]
    ]
    table = format_table(("pixels", "seconds", "megapixels/s", "peak memory, MB"), rows)
    return f"{SCANS}\n\n{table}\n\n{cite('scans', content)}{scan_objects(found)}"


def scan_objects(found: Results) -> str:
    if "scan_objects" not in found:
        return ""
    content = found["scan_objects"]
    rows = [
        (
            f"{scan['side']:,} x {scan['side']:,}",
            f"{scan['objects']:,}",
            f"{scan['found']:,}",
            three_digits(scan["processor_seconds"]),
            f"{scan['peak_mb']:.0f}",
        )
        for scan in content["scans"]
    ]
    heads = ("pixels", "objects", "found", "processor seconds", "peak memory, MB")
    source = cite("scan_objects", content)
    return f"\n\n{SCAN_OBJECTS}\n\n{format_table(heads, rows)}\n\n{source}"


def serving(found: Results) -> str:
    rows, sources, said = [], [], []
    for name in names_with(found, "serving_"):
        content = found[name]
        alone, slow = content["milliseconds_alone"], content["milliseconds_alone_p95"]
        share = content["share_of_offline"]
        rows.append(
            (
                content["network"]["encoder"],
                content["runtime"],
                str(content["clients"]),
                three_digits(content["served"]),
                percent(share),
                percent(content["share_of_bound"]),
                f"{content['gain_of_several']:.2f} x",
                f"{content['milliseconds']:.0f} / {content['milliseconds_p99']:.0f}",
                f"{alone:.0f} / {slow:.0f}",
            )
        )
        said.append(judge(f"{percent(share)} of the speed without a service", share >= 0.9, "90 %"))
        sources.append(cite(name, content))
    head = (
        "network",
        "runtime",
        "clients",
        "images/s",
        "share of the speed without a service",
        "share of the bound",
        "gain from computing several",
        "ms under load, median / 99 %",
        "ms alone, median / 95 %",
    )
    return (
        "\n\n".join([SERVING, format_table(head, rows), " ".join(said), *sources]) if rows else ""
    )


def video(found: Results) -> str:
    rows, sources = [], []
    for name in names_with(found, "video_"):
        content = found[name]
        times = content["speed"]["milliseconds_per_frame"]
        rows.append(
            (
                content["runtime"],
                *(f"{times[part]:.1f}" for part in ("network", "codecs", "together")),
                f"{1000 / times['together']:.0f}",
            )
        )
        sources.append(cite(name, content))
    head = ("runtime", "ms of the network", "ms of reading and writing", "ms together", "frames/s")
    return "\n\n".join([format_table(head, rows), *sources]) if rows else ""
