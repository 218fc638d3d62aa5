// A picture -> its label map, away from the page's own thread so that the page never stops. Pictures do not leave the browser.

import { read } from "./answers.js";
import { start } from "./network.js";
import { decoded } from "./pixels.js";
import { resize } from "./resize.js";
import { cover, cut, paste } from "./tiles.js";

const [WHOLE_PIXELS, TILE] = [600_000, 512]; // above so many pixels a picture is predicted in windows; the answer is the same
const MOST_NUMBERS = 2 ** 28; // logits of one picture that are kept: 1 GB
const [SOON, SHARES] = [100, [1, 0.75, 0.5]]; // milliseconds in which a glance shall be answered; the sizes at which it may look for that

let newest = 0;
let pace = 0; // milliseconds of the network for each pixel of a glance
const ready = load();
ready.catch(() => {}); // it is told to whoever asks

addEventListener("message", async ({ data: { id, picture, frame } }) => {
  newest = id;
  try {
    const { model, network } = await ready;
    if (picture) send(id, await predict(picture, model, network, () => newest === id));
    else if (frame) send(id, await glance(frame, model, network));
    else postMessage({ id, answer: { ...model, runtime: network.name } });
  } catch (problem) {
    postMessage({ id, error: problem.message });
  }
});

function send(id, answer) {
  postMessage({ id, answer }, [answer.ids.buffer, answer.confidence.buffer]);
}

async function load() {
  const model = await (await file("model.json")).json();
  const [content, probe] = [await loaded(model.file, model.bytes), new Uint8Array(await (await file(model.probe.file)).arrayBuffer())];
  postMessage({ said: "Starting the model" });
  const { height, width } = model.probe;
  const pixels = probe.subarray(0, model.channels * height * width);
  return { model, network: await start(content, model.channels, { pixels, labels: probe.subarray(pixels.length), height, width }) };
}

async function file(name) {
  const answer = await fetch(name).catch(() => null);
  if (!answer?.ok) throw new Error(`The file ${name} could not be loaded; reload the page when there is a network.`);
  return answer;
}

async function loaded(name, size) {
  const content = new Uint8Array(size);
  let [at, told] = [0, -1];
  for await (const chunk of parts((await file(name)).body)) {
    content.set(chunk, at);
    at += chunk.length;
    const share = Math.floor((100 * at) / size);
    if (share > told) postMessage({ said: `Loading the model, ${(told = share)} % of ${(size / 1e6).toFixed(1)} MB` });
  }
  if (at !== size) throw new Error("The model was cut off while it was loaded; reload the page.");
  return content;
}

async function* parts(stream) {
  const reader = stream.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    yield value;
  }
}

async function predict(picture, model, network, wanted) {
  const { planes, width, height } = await decoded(picture, model.channels);
  const [newWidth, newHeight] = workingSize(width, height, model.working);
  const numClasses = model.classes.length;
  if (numClasses * newWidth * newHeight > MOST_NUMBERS) {
    const most = Math.floor(((MOST_NUMBERS / numClasses) * width * height) / (newWidth * newHeight) / 1e6);
    throw new Error(`This picture has ${Math.ceil((width * height) / 1e6)} megapixels; a browser has room for ${most} with this model.`);
  }
  const small = planes.map((plane) => resize(plane, width, height, newWidth, newHeight));
  const logits = await logitsOf(small, newWidth, newHeight, model, network, wanted);
  return read(logits, numClasses, newWidth, newHeight, width, height, model.temperature);
}

/** Labels a picture that moves, at the model's own size, or a smaller one where that takes too long. */
async function glance(frame, model, network) {
  const whole = workingSize(frame.width, frame.height, model.working);
  const share = SHARES.find((each) => pace * whole[0] * whole[1] * each ** 2 < SOON) ?? SHARES.at(-1);
  const size = whole.map((length) => Math.max(1, Math.round(length * share)));
  const { planes } = await decoded(frame, model.channels, size);
  const began = performance.now();
  const logits = await logitsOf(planes, ...size, model, network, () => true);
  const now = (performance.now() - began) / (size[0] * size[1]);
  pace = pace ? 0.8 * pace + 0.2 * now : now;
  return read(logits, model.classes.length, ...size, ...size, model.temperature);
}

async function logitsOf(planes, width, height, model, network, wanted) {
  const { size, rows, columns } = cover(height, width, model, width * height > WHOLE_PIXELS ? TILE : 0);
  const logits = new Float32Array(model.classes.length * width * height);
  const kept = size.map((length) => length - 2 * model.margin);
  for (const row of rows) {
    for (const column of columns) {
      const x = cut(planes, width, height, row.start - model.margin, column.start - model.margin, size);
      paste(logits, width, height, await network.run(x, ...size), kept, row, column);
      await new Promise((resolve) => setTimeout(resolve)); // lets a newer picture be heard of
      if (!wanted()) throw new Error("A newer picture overtook this one.");
    }
  }
  return logits;
}

/** Returns the [width, height] at which the model looks at a picture: the same rule as in Python (WorkingSize in data/cache.py). */
function workingSize(width, height, { frame, scale }) {
  const factor = frame ? Math.sqrt((frame[0] * frame[1]) / (width * height)) : scale;
  return [width, height].map((length) => Math.max(1, toEven(length * factor)));
}

function toEven(value) {
  const whole = Math.round(value);
  return value % 1 === 0.5 && whole % 2 ? whole - 1 : whole;
}
