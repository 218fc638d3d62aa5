"""Measure how many images a second an exported site labels in a browser, and the time of each part.

    python benchmarks/browser.py SITE [SITE ...] [--seconds 10] [--threads 1 2]

Each SITE is a folder written by `useg export`. Its page is opened in Chromium, whose fake camera
gives 1280x720 pixels, and every label map that the page paints is counted. Each part of the work is
also timed alone, on the camera's images, with the site's own modules: "model" would remain if all
else took no time, "half_size" is what the page falls back to when the model takes too long, and the
parts of "full_size" are the cost of a still image. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from record import ROOT, record

from useg.machine import describe_machine

sys.path.append(str(ROOT / "tests"))
from chromium import browsing

COUNT = """
const put = CanvasRenderingContext2D.prototype.putImageData;
self.painted = [];
CanvasRenderingContext2D.prototype.putImageData = function (...rest) {
    painted.push(performance.now());
    return put.apply(this, rest);
};"""
WORKER = """
import { toPrediction } from "./postprocess.js";
import { startSession } from "./session.js";
import { decodeImage } from "./decode.js";
import { resize } from "./resize.js";
const times = {};
async function timed(name, work) {
    const began = performance.now();
    const answer = await work();
    (times[name] ??= []).push(performance.now() - began);
    return answer;
}
addEventListener("message", async ({ data: { frames, threads } }) => {
    const model = await (await fetch("model.json")).json();
    const content = new Uint8Array(await (await fetch(model.file)).arrayBuffer());
    const network = await startSession(content, model.channels);
    const { channels, temperature } = model;
    const [[width, height], numClasses] = [model.working.frame, model.classes.length];
    const area = width * height;
    for (const frame of frames) {
        const copies = [frame, await createImageBitmap(frame)];
        const size = [frame.width, frame.height];
        const { planes } = await timed("pixels_full_size", () => decodeImage(copies[0], channels));
        await timed("resize_full_size", () =>
            planes.map((plane) => resize(plane, ...size, width, height)));
        const { planes: small } = await timed("pixels", () =>
            decodeImage(copies[1], channels, [width, height]));
        const x = Uint8Array.from({ length: 3 * area }, (_, k) =>
            small[Math.floor(k / area)][k % area]);
        const logits = await timed("model", () => network.run(x, height, width));
        const quarter = x.subarray(0, x.length / 4);
        await timed("model_half_size", () => network.run(quarter, height / 2, width / 2));
        await timed("labels", () =>
            toPrediction(logits, numClasses, width, height, width, height, temperature));
        await timed("labels_full_size", () =>
            toPrediction(logits, numClasses, width, height, ...size, temperature));
    }
    postMessage({ times, runtime: network.name });
});"""
PARTS = """async (count) => {
    const { openCamera } = await import("/video.js");
    const { countPixels, colorTables, paint } = await import("/labels.js");
    const { video, close } = await openCamera();
    await video.play();
    const [frames, capture, painting] = [[], [], []];
    const [canvas, width, height] = [document.createElement("canvas"), 256, 192];
    const ids = new Uint8Array(width * height);
    for (let k = 0; k < count; k++) {
        await new Promise((resolve) => setTimeout(resolve, 40));
        let began = performance.now();
        frames.push(await createImageBitmap(video));
        capture.push(performance.now() - began);
        began = performance.now();
        canvas.getContext("2d").drawImage(frames[k], 0, 0);
        countPixels(ids, 13);
        paint(canvas, { width, height, ids }, colorTables([], new Set()).overlay);
        painting.push(performance.now() - began);
    }
    close();
    const size = [frames[0].width, frames[0].height];
    const worker = new Worker("/timing.js", { type: "module" });
    const { times, runtime } = await new Promise((resolve, reject) => {
        worker.onmessage = ({ data }) => resolve(data);
        worker.onerror = reject;
        worker.postMessage({ frames });
    });
    worker.terminate();
    const median = (all) => all.sort((a, b) => a - b)[all.length >> 1];
    const parts = Object.entries({ capture, ...times, painting });
    const milliseconds = Object.fromEntries(parts.map(([name, all]) => [name, median(all)]));
    return { runtime, camera: size, milliseconds };
}"""


@contextmanager
def hosted(site: Path, threads: int) -> Iterator[str]:
    """Serve a site; its workers see a machine with ``threads`` cores."""
    cores = f"Object.defineProperty(navigator, 'hardwareConcurrency', {{value: {threads}}});\n"

    class Host(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            worker = {"/timing.js": WORKER, "/worker.js": (site / "worker.js").read_text()}.get(
                self.path
            )
            if worker is None:
                return super().do_GET()
            self.send_response(200)
            self.send_header("content-type", "text/javascript")
            self.end_headers()
            self.wfile.write((cores + worker).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Host, directory=str(site))
    ) as host:
        threading.Thread(target=host.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{host.server_port}/"
        host.shutdown()


def measure(site: Path, threads: int, seconds: float) -> dict[str, Any]:
    """Return images per second of the page and the model alone, and milliseconds per part."""
    with hosted(site, threads) as url, browsing() as browser:
        page = browser.new_context(
            viewport={"width": 1280, "height": 800}, bypass_csp=True
        ).new_page()
        page.add_init_script(COUNT)
        page.goto(url)
        page.wait_for_selector("body[data-ready]", timeout=120_000)
        page.click("#camera")
        page.wait_for_function("painted.length > 3", timeout=120_000)
        page.evaluate("painted.length = 0")
        page.wait_for_timeout(1000 * seconds)
        rate = page.evaluate("(painted.length - 1) / (painted.at(-1) - painted[0]) * 1000")
        page.click("#camera")
        parts = page.evaluate(PARTS, 20)
    return {
        "threads": threads,
        "pictures_per_second": rate,
        "model_alone_per_second": 1000 / parts["milliseconds"]["model"],
        **parts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sites", type=Path, nargs="+")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    rows = []
    for site in arguments.sites:
        model = json.loads((site / "model.json").read_text())
        named = {
            "precision": model["precision"],
            "working_size": model["working"]["frame"],
            "megabytes": model["bytes"] / 1e6,
        }
        for threads in arguments.threads:
            rows.append({**named, **measure(site, threads, arguments.seconds)})
            print(json.dumps(rows[-1]), flush=True)
    print(
        record(
            "browser", {"machine": describe_machine(), "seconds": arguments.seconds, "sites": rows}
        )
    )


if __name__ == "__main__":
    main()
