// Runs the model in a worker, so that the page stays responsive. Images never leave the browser.

import { decodeImage } from "./decode.js";
import { toPrediction } from "./postprocess.js";
import { resize } from "./resize.js";
import { startSession } from "./session.js";
import { standardize } from "./standardize.js";
import { cover, cut, paste } from "./tiles.js";

// An image with more pixels is predicted in windows. The result is the same.
const MAX_WHOLE_PIXELS = 600_000;
const TILE = 512;
// The most logits of one image that are kept in memory: 1 GB.
const MAX_LOGITS = 2 ** 28;
// A video frame should take at most so many milliseconds. The scales are tried in this order.
const FRAME_MILLISECONDS = 100;
const FRAME_SCALES = [1, 0.75, 0.5];

let newestId = 0;
// Moving average of the network's time on video frames.
let millisecondsPerPixel = 0;
const ready = load();
// Each request reports this error.
ready.catch(() => {});

addEventListener("message", async ({ data: { id, image, frame } }) => {
  newestId = id;
  try {
    const { model, session } = await ready;
    if (image) send(id, await predict(image, model, session, () => newestId === id));
    else if (frame) send(id, await predictFrame(frame, model, session));
    else postMessage({ id, result: { ...model, runtime: session.name } });
  } catch (error) {
    postMessage({ id, error: error.message });
  }
});

function send(id, prediction) {
  const buffers = [prediction.ids.buffer, prediction.confidence.buffer];
  postMessage({ id, result: prediction }, buffers);
}

async function load() {
  const model = await (await fetchFile("model.json")).json();
  const content = await download(model.file, model.bytes);
  const probe = new Uint8Array(await (await fetchFile(model.probe.file)).arrayBuffer());
  postMessage({ status: "Starting the model" });
  const { height, width } = model.probe;
  const pixels = probe.subarray(0, model.channels * height * width);
  const labels = probe.subarray(pixels.length);
  const session = await startSession(content, model, { pixels, labels, height, width });
  return { model, session };
}

async function fetchFile(name) {
  const response = await fetch(name).catch(() => null);
  if (!response?.ok) throw new Error(`${name} does not load. Check the network and reload.`);
  return response;
}

/** Fetches a file of `size` bytes and reports the progress. */
async function download(name, size) {
  const content = new Uint8Array(size);
  const megabytes = (size / 1e6).toFixed(1);
  let numBytes = 0;
  let lastPercent = -1;
  for await (const chunk of chunks((await fetchFile(name)).body)) {
    content.set(chunk, numBytes);
    numBytes += chunk.length;
    const percent = Math.floor((100 * numBytes) / size);
    if (percent > lastPercent) {
      postMessage({ status: `Loading the model: ${percent} % of ${megabytes} MB` });
      lastPercent = percent;
    }
  }
  if (numBytes !== size)
    throw new Error("The download of the model is incomplete. Reload the page.");
  return content;
}

async function* chunks(stream) {
  const reader = stream.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    yield value;
  }
}

async function predict(image, model, session, isNewest) {
  const { planes, width, height } = await decodeImage(image, model.channels);
  const [newWidth, newHeight] = workingSize(width, height, model.working);
  const numClasses = model.classes.length;
  const numLogits = numClasses * newWidth * newHeight;
  const megapixels = (width * height) / 1e6;
  if (numLogits > MAX_LOGITS) {
    const most = Math.floor((MAX_LOGITS / numLogits) * megapixels);
    throw new Error(
      `This image has ${Math.ceil(megapixels)} megapixels. ` +
        `With this model, a browser can process at most ${most}.`,
    );
  }
  const small = planes.map((plane) => resize(plane, width, height, newWidth, newHeight));
  if (model.working.standardize) standardize(small);
  const logits = await runNetwork(small, newWidth, newHeight, model, session, isNewest);
  const { temperature } = model;
  return toPrediction(logits, numClasses, newWidth, newHeight, width, height, temperature);
}

/** Predicts a video frame at the working size, or at a smaller one if that takes too long. */
async function predictFrame(frame, model, session) {
  const whole = workingSize(frame.width, frame.height, model.working);
  const milliseconds = millisecondsPerPixel * whole[0] * whole[1];
  const isFast = (scale) => milliseconds * scale ** 2 < FRAME_MILLISECONDS;
  const scale = FRAME_SCALES.find(isFast) ?? FRAME_SCALES.at(-1);
  const size = whole.map((length) => Math.max(1, Math.round(length * scale)));
  const { planes } = await decodeImage(frame, model.channels, size);
  if (model.working.standardize) standardize(planes);
  const start = performance.now();
  const logits = await runNetwork(planes, ...size, model, session, () => true);
  const measured = (performance.now() - start) / (size[0] * size[1]);
  const average = 0.8 * millisecondsPerPixel + 0.2 * measured;
  millisecondsPerPixel = millisecondsPerPixel ? average : measured;
  return toPrediction(logits, model.classes.length, ...size, ...size, model.temperature);
}

/** Returns the logits of an image. It stops with an error when `isNewest()` becomes false. */
async function runNetwork(planes, width, height, model, session, isNewest) {
  const tile = width * height > MAX_WHOLE_PIXELS ? TILE : 0;
  const { size, rows, columns } = cover(height, width, model, tile);
  const { margin } = model;
  const logits = new Float32Array(model.classes.length * width * height);
  const outputSize = size.map((length) => length - 2 * margin);
  for (const row of rows) {
    for (const column of columns) {
      const x = cut(planes, width, height, row.start - margin, column.start - margin, size);
      const windowLogits = await session.run(x, ...size);
      paste(logits, width, height, windowLogits, outputSize, row, column);
      // Let the message of a newer image arrive.
      await new Promise((resolve) => setTimeout(resolve));
      if (!isNewest()) throw new Error("A newer image replaced this one.");
    }
  }
  return logits;
}

/** Returns the [width, height] at which the model sees an image, as WorkingSize in Python does. */
function workingSize(width, height, { frame, scale }) {
  const factor = frame ? Math.sqrt((frame[0] * frame[1]) / (width * height)) : scale;
  return [width, height].map((length) => Math.max(1, roundHalfEven(length * factor)));
}

function roundHalfEven(value) {
  const rounded = Math.round(value);
  return value % 1 === 0.5 && rounded % 2 ? rounded - 1 : rounded;
}
